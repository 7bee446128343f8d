"""Exponential moving average of a module's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from driving_sim.engine.ranks.sharding import placed_like


class Ema:
    """Averages the trainable parameters of `module`; buffers and frozen weights are left alone.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage: the average of a short run is not still the initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._averages = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters' present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self._averages.values()), list(self._parameters.values()), 1.0 - decay
        )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module's parameters hold the averages; afterwards their own values again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; `updates` is saved apart."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, averages: dict[str, Tensor], updates: int) -> None:
        """Take up saved averages; `KeyError` where one is missing."""
        for name, average in self._averages.items():
            average.copy_(placed_like(averages[name], average))
        self.updates = updates

    def _exchange(self) -> None:
        # Storages change hands: no copy, and optimiser and module keep their parameter objects.
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            parameter.data, average.data = average.data, parameter.data
