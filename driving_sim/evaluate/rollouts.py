"""Let the world model generate the futures of clips.

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
"""Number of clips rolled out together.

Another batch size rounds differently, so it may sample a different token here and there.
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Imagined:
    """A clip and one future that the model generated for it."""

    clip: Clip
    tokens: torch.Tensor
    """Tokens of the generated future, int64 [N, r, c]."""
    frames: Pixels
    """Decoded frames of the generated future, uint8 [N, H, W, 3]."""


def encode_contexts(world: WorldModel, clips: Sequence[Clip]) -> Prefix:
    """Run the model over the contexts of clips, all of the same length, and return its state.

    The actions within the contexts are part of the input.
    """
    past = clips[0].context_frames - 1
    actions, valid = map(np.stack, zip(*(clip.actions for clip in clips), strict=True))
    tokens = torch.stack([clip.context_tokens for clip in clips])
    return world.encode_prefix(tokens, actions[:, :past], valid[:, :past])


def imagine(
    world: WorldModel, clips: Sequence[Clip], sampling: Sampling, *, hide_actions: bool = False
) -> Iterator[Imagined]:
    """Yield a generated future for every clip, under the actions that were recorded.

    Clip n uses the n-th random draws of `sampling`, whatever its batch. With `hide_actions` the
    model gets no action of the future, which shows where it drives by itself.
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
