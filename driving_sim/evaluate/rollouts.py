"""Generate the futures of clips with a world model.

Axes: B clips of a batch, N frames of the future, H W pixels, r c token rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from driving_sim.data.arrays import Pixels
from driving_sim.evaluate.footage import Clip
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Prefix
from driving_sim.world_model.world_model import WorldModel

BATCH = 8
"""Number of clips rolled out together.

Rounding depends on the batch size, so another batch size may change a few sampled tokens.
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
    """Run the model over the contexts of clips, and return its cached state.

    The contexts must have the same length. The actions within them are part of the input.
    """
    past = clips[0].context_frames - 1
    actions, valid = map(np.stack, zip(*(clip.actions for clip in clips), strict=True))
    tokens = torch.stack([clip.context_tokens for clip in clips])
    return world.encode_prefix(tokens, actions[:, :past], valid[:, :past])


def imagine(
    world: WorldModel, clips: Sequence[Clip], sampling: Sampling, *, hide_actions: bool = False
) -> Iterator[Imagined]:
    """Generate a future for every clip, under the clip's recorded actions.

    Clip n gets the n-th random draws of `sampling`, so the batch size does not change its draws.
    With `hide_actions` the model gets no actions for the future. The result shows where the model
    drives by itself.
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
