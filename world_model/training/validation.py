"""Validation of a world model during training: bits on held-out drives, and a preview.

Axes: B windows, T frames, R C token rows and columns, K codes, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from driving_sim.data.arrays import Pixels
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.data.tokens.windows import sequential_windows
from driving_sim.engine.training.trainable import Batch, Validation
from driving_sim.world_model.training.objective import WorldModelObjective
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel


class WindowValidation:
    """Evaluates an objective's transformer on adjacent windows of the validation drives.

    `frames` is the length of a window, and `windows` the maximum number of windows. `as_world`
    turns the transformer into a frozen `WorldModel`, which generates the preview. If `as_world` is
    None, there is no preview. Raises `DriveSimError` if all drives are shorter than a window.
    """

    def __init__(
        self,
        drives: Sequence[DriveTokens],
        *,
        frames: int,
        windows: int,
        batch_size: int,
        as_world: Callable[[nn.Module], WorldModel] | None = None,
    ) -> None:
        self.frames, self.as_world = frames, as_world
        batches = partial(sequential_windows, drives, frames=frames)
        self.batches = list(batches(batch_size=batch_size, limit=windows))
        *_, self.preview_window = batches(batch_size=1, limit=2)

    def __call__(self, model: nn.Module) -> Validation:
        """Return bits per token as the score, further metrics, and the preview.

        `full_window/bits_per_token` is measured only on the last frame of each window.
        `action_gain` is the increase of bits per token if each window gets the actions of another
        window.
        """
        assert isinstance(model, WorldModelObjective)
        rows = [_measure(model.transformer, batch) for batch in self.batches]
        # A batch of one window has no `action_gain`, because there is no other window to swap with.
        columns = {
            name: torch.cat([row[name] for row in rows if name in row])
            for name in dict.fromkeys(name for row in rows for name in row)
        }
        metrics = {name: float(values.mean()) for name, values in columns.items()}
        videos = {}
        if self.as_world is not None and self.frames > 3:
            videos["preview"] = self._preview(self.as_world(model.transformer))
        return Validation(score=metrics.pop("bits_per_token"), metrics=metrics, videos=videos)

    def _preview(self, world: WorldModel) -> Pixels:
        """Return a video [T, H, 2 W, 3]: the second half of a window beside its prediction.

        The model predicts it from the first half, with the recorded actions.
        """
        tokens, half = self.preview_window["tokens"][0], self.frames // 2
        unknown = ~self.preview_window["action_valid"][0]
        actions = self.preview_window["actions"][0].masked_fill(unknown, torch.nan).numpy()
        true = world.tokenizer.decode(tokens)
        future = world.rollout(true[:half], actions[1:half], actions[half:])
        pair = np.stack([true[half:].numpy(), future.frames[0]])
        return rearrange(pair, "two t h w c -> t h (two w) c")


def _measure(transformer: Transformer, batch: Batch) -> dict[str, Tensor]:
    """Return the metrics of a batch from `TokenWindows`, by name, for each window [B]."""
    batch = {name: value.to(transformer.source.device) for name, value in batch.items()}
    bits, accuracy = _token_bits(transformer, batch)
    measured = {
        "bits_per_token": bits.mean(1),
        "full_window/bits_per_token": bits[:, -1],
        "accuracy": accuracy,
    }
    if len(bits) > 1 and batch["action_valid"].any():
        shuffled = {name: batch[name].roll(1, 0) for name in ("actions", "action_valid")}
        wrong_bits, _ = _token_bits(transformer, batch | shuffled)
        measured["action_gain"] = wrong_bits.mean(1) - bits.mean(1)
    return {name: values.cpu() for name, values in measured.items()}


def _token_bits(transformer: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the bits per token of each frame [B, T] and the accuracy of each window [B]."""
    logits = transformer(**batch).float()
    nats = F.cross_entropy(
        rearrange(logits, "b t r c k -> b k t (r c)"),
        rearrange(batch["tokens"], "b t r c -> b t (r c)"),
        reduction="none",
    )
    right = logits.argmax(-1) == batch["tokens"]
    return nats.mean(2) / math.log(2), right.float().mean((1, 2, 3))
