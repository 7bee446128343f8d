"""Futures of clips, imagined from each clip's own context.

Axes: B clips of a batch, N frames of the future, H W pixels, r c token rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.footage import Clip
from driving_sim.world_model.sampling.sampler import Sampling
from driving_sim.world_model.world_model import Prefix, WorldModel

BATCH = 8
"""Clips rolled out at once; rounding differs with it, and so may a sampled token."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Imagined:
    """One future of a clip."""

    clip: Clip
    tokens: torch.Tensor
    """int64 [N, r, c]."""
    frames: NDArray[np.uint8]
    """uint8 [N, H, W, 3]."""


def encode_contexts(world: WorldModel, clips: Sequence[Clip]) -> Prefix:
    """Encode the contexts of clips, all of one length, and the actions within them."""
    past = clips[0].context_frames - 1
    pairs = [clip.actions for clip in clips]
    actions, valid = (np.stack([pair[i][:past] for pair in pairs]) for i in (0, 1))
    return world.encode_prefix(torch.stack([clip.context_tokens for clip in clips]), actions, valid)


def imagine(
    world: WorldModel, clips: Sequence[Clip], sampling: Sampling, *, hide_actions: bool = False
) -> Iterator[Imagined]:
    """Roll every clip's context out under the actions that were recorded after it.

    Clip n has the n-th draws of the sampling. With `hide_actions` the model knows none of the
    future's actions: what it does by itself.
    """
    for first in range(0, len(clips), BATCH):
        batch = clips[first : first + BATCH]
        pairs = [clip.actions for clip in batch]
        actions, valid = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
        past = batch[0].context_frames - 1
        prefix = encode_contexts(world, batch)
        known = np.zeros_like(valid[:, past:]) if hide_actions else valid[:, past:]
        steps = world.generate(
            prefix, actions[:, past:], known, sampling=sampling, first_draw=first
        )
        futures = torch.stack([step.tokens for step in steps], dim=1).cpu()
        for clip, future in zip(batch, futures, strict=True):
            frames = world.tokenizer.decode(future).numpy()
            yield Imagined(clip=clip, tokens=future, frames=frames)
