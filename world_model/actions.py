"""Speed and steering as an embedding, with a learned null for what is unknown or dropped.

Axes: B batch, T frames, A = 2 channels (speed in m/s, steering in rad, left positive), F Fourier
features, D width.
"""

import math
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from driving_sim.data.arrays import Floats32, Mask
from driving_sim.engine.config import Count, NonNegative, Share, config

CHANNELS = ("speed", "steering")


@config
class ActionStatistics:
    """What the training data's valid actions look like, per channel (speed, steering)."""

    mean: tuple[float, float] = (0.0, 0.0)
    """Mean, m/s and rad."""
    std: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    """Standard deviation, m/s and rad; 0 where a channel never moved."""
    steering_p95: float = 0.0
    """95th percentile of |steering|, rad."""
    steering_p99: float = 0.0
    """99th percentile of |steering|, rad."""

    @classmethod
    def measure(cls, actions: Floats32, valid: Mask) -> "ActionStatistics":
        """Measure actions [N, 2] where `valid` [N, 2]; a channel never valid keeps its default."""
        channels = [actions[valid[:, c], c].astype(np.float64) for c in range(2)]
        mean = [float(x.mean()) if len(x) else 0.0 for x in channels]
        std = [float(x.std()) if len(x) else 1.0 for x in channels]
        std = [spread if spread > 1e-6 else 0.0 for spread in std]  # but for rounding
        steering = np.abs(channels[1])
        p95, p99 = np.quantile(steering, [0.95, 0.99]) if len(steering) else (0.0, 0.0)
        return cls(
            mean=(mean[0], mean[1]),
            std=(std[0], std[1]),
            steering_p95=float(p95),
            steering_p99=float(p99),
        )


@config
class ActionEmbeddingConfig:
    """How actions are embedded."""

    octaves: Annotated[int, Field(ge=1, le=64)] = 4
    """Sines and cosines per channel, of periods 16, 8, 4, ... standard deviations."""
    hidden: Count = 128
    """Width of the MLP's hidden layer."""


class ActionEmbedding(nn.Module):
    """Normalise by the training statistics, Fourier features, an MLP; a null per channel."""

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
        # A channel that never moved carries nothing: any scale will do for it.
        std = torch.tensor([spread or 1.0 for spread in statistics.std])
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("frequency", frequency, persistent=False)
        self.null = nn.Parameter(torch.randn(len(CHANNELS), features))
        self.hidden = nn.Linear(len(CHANNELS) * features, config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, width, bias=False)

    def forward(self, actions: Tensor, valid: Tensor) -> Tensor:
        """Embed actions [..., 2] (m/s, rad) where `valid` [..., 2], as [..., D].

        NaN is unknown, whatever `valid` says.
        """
        valid = valid & ~actions.isnan()
        x = (actions - self.mean) / self.std
        # An absurd request must not leave the range in which features were ever seen.
        x = torch.where(valid, x, 0.0).clamp(-8, 8).unsqueeze(-1)
        angle = x * self.frequency
        features = torch.cat([x, angle.sin(), angle.cos()], dim=-1)
        features = torch.where(valid.unsqueeze(-1), features, self.null)
        hidden = self.hidden(rearrange(features, "... a f -> ... (a f)"))
        embedded: Tensor = self.out(nn.functional.silu(hidden))
        return embedded


@config
class ActionDropoutConfig:
    """How often training hides actions, so that null means "unknown" (for guidance)."""

    both: Share = 0.1
    """Share of windows that hide both channels."""
    channel: Share = 0.1
    """Share of the other windows that hide one channel, for each channel."""


def drop_actions(valid: Tensor, config: ActionDropoutConfig) -> Tensor:
    """Return `valid` [B, T, A] with channels of whole windows hidden, from a random frame on.

    From half of these windows nothing is left; in the others the frames before a random one keep
    their actions: guidance compares with futures whose context's actions are known. A frame
    hidden alone would be given away by its neighbours.
    """
    batch, frames, channels = valid.shape
    device = valid.device
    both_B1 = torch.rand(batch, 1, device=device) < config.both
    hidden_BA = both_B1 | (torch.rand(batch, channels, device=device) < config.channel)
    begin_B1 = torch.randint(-frames, frames, (batch, 1), device=device)
    after_BT = torch.arange(frames, device=device) >= begin_B1
    return valid & ~(hidden_BA[:, None, :] & after_BT[:, :, None])
