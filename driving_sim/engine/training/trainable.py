"""The interface of a model that can be trained, and the result of a validation."""

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
    """A model that the training loop can train."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over the batch, and metrics as scalar tensors by name."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Return the parts that contain the trainable parameters: one part, or two for a GAN."""

    @abstractmethod
    def ema_module(self) -> nn.Module:
        """Return the part of the model that is averaged and exported."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the repeated blocks, which are sharded, compiled and recomputed one by one."""

    def limit_parameters(self) -> None:
        """Bring the parameters back into their range after a step. By default, does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The result of one validation."""

    score: float
    """Score that decides which weights are kept. Lower is better."""
    provisional: bool = False
    """Whether the score is provisional, as it is until a tokenizer's GAN loss has its full weight.
    Any score that is not provisional counts as better than a provisional one, even if it is
    higher."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    images: Mapping[str, Pixels] = field(default_factory=dict)
    """Images by name, uint8 [H, W, 3]."""
    videos: Mapping[str, Pixels] = field(default_factory=dict)
    """Videos by name, uint8 [T, H, W, 3]."""
