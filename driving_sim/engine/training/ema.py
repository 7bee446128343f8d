"""Exponential moving average of a module's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Moving averages of the trainable parameters of `module`.

    After n updates, the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage. With a constant decay, the average of a short run would stay close to
    the initial weights. `averages` maps parameter names to averages. `updates`, a float64 scalar,
    is the number of updates.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.float64)
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.averages = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move the averages towards the current parameters, unless the scalar `skipped` is 1."""
        applied = 1.0 if skipped is None else 1.0 - skipped.double()
        self.updates = self.updates + applied
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        weight = ((1.0 - decay) * applied).float()
        for name, average in self.averages.items():
            average.lerp_(self._parameters[name], weight.to(average.device))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context, replace the module's parameters with their averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        # Swap the storages instead of copying values. Optimisers keep the same parameter objects.
        for name, parameter in self._parameters.items():
            average = self.averages[name]
            parameter.data, average.data = average.data, parameter.data
