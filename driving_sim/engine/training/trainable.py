"""What training asks of a model, and what a validation hands back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from driving_sim.engine.training.optimizer import Player

Batch = dict[str, Tensor]
Pixels = NDArray[np.uint8]


class Trainable(nn.Module, ABC):
    """A model with what training asks of it."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a mean over the batch, and metrics: scalar tensors by name."""

    @abstractmethod
    def players(self) -> list[Player]:
        """The parts that hold all trainable parameters: one, or those of an adversarial loss."""

    @abstractmethod
    def ema_module(self) -> nn.Module:
        """The part that is averaged and exported."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The repeated parts: what is sharded, compiled and recomputed one at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What one validation found."""

    score: float
    """What decides which weights are kept: lower is better."""
    provisional: bool = False
    """Whether every later score that is not provisional counts as better, whatever its value."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    images: Mapping[str, Pixels] = field(default_factory=dict)
    """uint8 [H, W, 3] by name."""
    videos: Mapping[str, Pixels] = field(default_factory=dict)
    """uint8 [T, H, W, 3] by name."""
