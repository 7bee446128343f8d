"""Futures of clips, imagined from each clip's own context.

Axes: B clips of a batch, N frames of the future, H W pixels, r c token rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from driving_sim.data.arrays import Pixels
from driving_sim.evaluate.footage import Clip
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import Prefix, WorldModel

BATCH = 8
"""Clips rolled out at once; rounding differs with it, and so may a sampled token."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Imagined:
    """One future of a clip."""

    clip: Clip
    tokens: torch.Tensor
    """int64 [N, r, c]."""
    frames: Pixels
    """uint8 [N, H, W, 3]."""


def encode_contexts(world: WorldModel, clips: Sequence[Clip]) -> Prefix:
    """Encode the contexts of clips, all of one length, and the actions within them."""
    past = clips[0].context_frames - 1
    actions, valid = map(np.stack, zip(*(clip.actions for clip in clips), strict=True))
    tokens = torch.stack([clip.context_tokens for clip in clips])
    return world.encode_prefix(tokens, actions[:, :past], valid[:, :past])


def imagine(
    world: WorldModel, clips: Sequence[Clip], sampling: Sampling, *, hide_actions: bool = False
) -> Iterator[Imagined]:
    """Roll every clip's context out under the actions that were recorded after it.

    Clip n has the n-th draws of the sampling. With `hide_actions` the model knows none of the
    future's actions: what it does by itself.
    """
    for first in range(0, len(clips), BATCH):
        batch = clips[first : first + BATCH]
        actions, valid = map(np.stack, zip(*(clip.actions for clip in batch), strict=True))
        future = slice(batch[0].context_frames - 1, None)
        steps = world.generate(
            encode_contexts(world, batch),
            actions[:, future],
            valid[:, future] & (not hide_actions),
            sampling=sampling,
            first_draw=first,
        )
        futures = torch.stack([step.tokens for step in steps], dim=1).cpu()
        for clip, future in zip(batch, futures, strict=True):
            frames = world.tokenizer.decode(future).numpy()
            yield Imagined(clip=clip, tokens=future, frames=frames)
