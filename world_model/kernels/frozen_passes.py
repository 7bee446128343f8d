"""A transformer's cached passes with fixed weights: compiled for this CPU, or else torch's."""

import copy
from dataclasses import replace

import torch
from torch import nn

from driving_sim.engine.precision import resolve_precision
from driving_sim.world_model.cache import Cache, RingCache
from driving_sim.world_model.kernels.decode import NativeCache, NativeModel, is_supported
from driving_sim.world_model.transformer import Transformer


class FrozenPasses:
    """Caches whose passes have a transformer's weights as they are now, in the format `dtype`.

    `precision` is auto, fp32 or bf16; auto: bf16 where it is faster, which on a CPU it is wherever
    passes are compiled. They are for weights in float32.
    """

    def __init__(self, model: Transformer, precision: str) -> None:
        device = model.source.device
        self._model, self.dtype = model, resolve_precision(precision, device)
        with torch.inference_mode():
            self._tables = model.tables()
        self._native: NativeModel | None = None
        exact = self._tables.output.dtype is torch.float32
        if device.type == "cpu" and exact and is_supported(model):
            if precision == "auto":
                self.dtype = torch.bfloat16
            self._native = NativeModel(model, self._tables, self.dtype)
        elif self.dtype is not torch.float32:
            self._cast_once()

    def _cast_once(self) -> None:
        """Make the matrices of torch's passes in their number format, beside the exact weights.

        Autocast would make them anew in every pass: it keeps only what gets gradients.
        """
        self._model = copy.deepcopy(self._model)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        self._tables = replace(self._tables, output=self._tables.output.to(self.dtype))

    def new_cache(self, sequences: int) -> Cache:
        """Return a cache of so many sequences, without a frame yet."""
        if self._native is not None:
            return NativeCache(self._model, self._tables, sequences, self._native)
        return RingCache(self._model, self._tables, sequences)
