"""Embed speed and steering, with learned null features for values that are unknown or dropped.

Axes: B batch, T frames, A = 2 channels (speed in m/s, steering in rad, left positive), F Fourier
features, D width.
"""

import math
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor, nn

from driving_sim.data.arrays import Floats32, Mask
from driving_sim.engine.config import Count, NonNegative, Share, config
from driving_sim.engine.errors import DriveSimError

CHANNELS = ("speed", "steering")


@config
class ActionStatistics:
    """Statistics of the valid actions in the training data, per channel (speed, steering)."""

    mean: tuple[float, float] = (0.0, 0.0)
    """Mean speed in m/s and mean steering in rad."""
    std: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    """Standard deviations of speed (m/s) and steering (rad); 0 for a channel that never changed."""
    steering_p95: float = 0.0
    """95th percentile of |steering| in rad."""
    steering_p99: float = 0.0
    """99th percentile of |steering| in rad."""
    lowest: tuple[float, float] | None = None
    """Lowest speed (m/s) and steering (rad). None without actions, and in older models."""
    highest: tuple[float, float] | None = None
    """Highest speed (m/s) and steering (rad). None without actions, and in older models."""

    @property
    def speed_limits(self) -> tuple[float, float]:
        """Lowest and highest speed of the training data in m/s, at least 0.

        In older models, which did not record them, they lie 3 standard deviations from the mean.
        """
        mean, spread = self.mean[0], 3 * self.std[0]
        lowest = mean - spread if self.lowest is None else self.lowest[0]
        highest = mean + spread if self.highest is None else self.highest[0]
        return max(0.0, lowest), max(0.0, highest)

    @classmethod
    def measure(cls, actions: Floats32, valid: Mask) -> "ActionStatistics":
        """Measure the `valid` actions [N, 2]; a channel without valid values keeps its defaults."""
        channels = [actions[valid[:, c], c].astype(np.float64) for c in range(2)]
        mean = [float(x.mean()) if len(x) else 0.0 for x in channels]
        std = [float(x.std()) if len(x) else 1.0 for x in channels]
        # The deviation of a constant can differ from 0 by a rounding error.
        std = [spread if spread > 1e-6 else 0.0 for spread in std]
        steering = np.abs(channels[1])
        p95, p99 = np.quantile(steering, [0.95, 0.99]) if len(steering) else (0.0, 0.0)
        low, high = ([float(f(x)) if len(x) else 0.0 for x in channels] for f in (np.min, np.max))
        return cls(
            mean=(mean[0], mean[1]),
            std=(std[0], std[1]),
            steering_p95=float(p95),
            steering_p99=float(p99),
            lowest=(low[0], low[1]) if valid.any() else None,
            highest=(high[0], high[1]) if valid.any() else None,
        )


def with_validity(name: str, actions: ArrayLike, valid: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """Return the actions as float32, and whether they are valid as bool of the same shape.

    Actions that are not `valid` become 0. NaN stays NaN, which the action embedding treats as
    unknown. Raises DriveSimError for infinite actions; `name` is their name in the message.
    """
    values = torch.from_numpy(np.array(actions, np.float32))
    known = np.ones(values.shape) if valid is None else np.broadcast_to(valid, values.shape)
    mask = torch.from_numpy(known.astype(np.bool_))
    values = torch.where(mask, values, 0.0)
    infinite = values.isinf().nonzero().tolist()
    if infinite:
        raise DriveSimError(
            f"{name}{infinite[0]} is {values[tuple(infinite[0])]}; give finite values, in m/s and "
            "rad, or NaN if unknown"
        )
    return values, mask


@config
class ActionEmbeddingConfig:
    """Size of the network that embeds actions."""

    octaves: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of frequencies per channel. Their periods are 16, 8, 4, ... standard deviations."""
    hidden: Count = 128
    """Width of the MLP's hidden layer."""


class ActionEmbedding(nn.Module):
    """Embedding of actions: Fourier features of the normalised values, then an MLP.

    If a value is unknown, the learned null features of its channel take the place of its features.
    """

    mean: Tensor
    std: Tensor
    frequency: Tensor

    def __init__(
        self, config: ActionEmbeddingConfig, width: int, statistics: ActionStatistics
    ) -> None:
        super().__init__()
        features = 1 + 2 * config.octaves
        frequency = 2 * math.pi / 16 * 2.0 ** torch.arange(config.octaves)
        self.register_buffer("mean", torch.tensor(statistics.mean), persistent=False)
        # The standard deviation of a channel that never changed is 0, so divide it by 1 instead.
        std = torch.tensor([spread or 1.0 for spread in statistics.std])
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("frequency", frequency, persistent=False)
        self.null = nn.Parameter(torch.randn(len(CHANNELS), features))
        self.hidden = nn.Linear(len(CHANNELS) * features, config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, width, bias=False)

    def forward(self, actions: Tensor, valid: Tensor) -> Tensor:
        """Return the embeddings [..., D] of actions [..., 2] (m/s, rad).

        A value is unknown if it is NaN or if `valid` [..., 2] is false.
        """
        valid = valid & ~actions.isnan()
        x = (actions - self.mean) / self.std
        # Clamp, because the model has not seen the features of more extreme actions in training.
        x = torch.where(valid, x, 0.0).clamp(-8, 8).unsqueeze(-1)
        angle = x * self.frequency
        features = torch.cat([x, angle.sin(), angle.cos()], dim=-1)
        features = torch.where(valid.unsqueeze(-1), features, self.null)
        hidden = self.hidden(rearrange(features, "... a f -> ... (a f)"))
        embedded: Tensor = self.out(nn.functional.silu(hidden))
        return embedded


@config
class ActionDropoutConfig:
    """How often training hides actions, so that the model learns to predict without them."""

    both: Share = 0.1
    """Share of windows in which both channels are hidden."""
    channel: Share = 0.1
    """Share of the remaining windows in which speed is hidden.

    Steering is hidden in the same share of them, which is drawn independently.
    """


def drop_actions(valid: Tensor, config: ActionDropoutConfig) -> Tensor:
    """Hide channels in a random share of the windows; return the new `valid` [B, T, A].

    In about half of these windows, channels are hidden in all frames. In the other half, they are
    hidden from a random frame to the end. This resembles guidance, where the actions of the context
    are known and the actions of the future are not. A single frame in the middle is never hidden,
    because the actions before and after it would reveal its action.
    """
    batch, frames, channels = valid.shape
    device = valid.device
    both_B1 = torch.rand(batch, 1, device=device) < config.both
    hidden_BA = both_B1 | (torch.rand(batch, channels, device=device) < config.channel)
    begin_B1 = torch.randint(-frames, frames, (batch, 1), device=device)
    after_BT = torch.arange(frames, device=device) >= begin_B1
    return valid & ~(hidden_BA[:, None, :] & after_BT[:, :, None])
