"""The machine's limits, measured: products of matrices, reading memory; and what it is."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.paired import Settings, Work, seconds
from driving_sim.engine.precision import name_of, resolve_precision

_SECONDS = 1.0
"""How long each limit is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The best rates that were seen."""

    dtype: torch.dtype
    flops: float
    """Floating-point operations a second of a product of large matrices in `dtype`."""
    bandwidth: float
    """Bytes a second, reading much more than any cache holds."""

    def reached(self, seconds: float, *, flops: float = 0.0, read: float = 0.0) -> str:
        """How much of the limits work of so many operations and bytes makes use of."""
        parts = []
        if flops:
            share = flops / seconds / self.flops
            parts.append(
                f"{share:.1%} of the matrix-product rate ({self.flops / 1e9:.0f} GFLOP/s in "
                f"{name_of(self.dtype)})"
            )
        if read:
            share = read / seconds / self.bandwidth
            parts.append(f"{share:.1%} of the memory bandwidth ({self.bandwidth / 1e9:.1f} GB/s)")
        return " and ".join(parts)


def precision(settings: Settings) -> torch.dtype:
    """The format that `auto` trains in and the device multiplies.

    Rollouts on a CPU keep numbers in bf16 even where it multiplies float32.
    """
    return resolve_precision("auto", settings.device)


def number_formats(settings: Settings) -> tuple[torch.dtype, ...]:
    """Those that a device multiplies: torch emulates bf16 elsewhere."""
    return tuple(dict.fromkeys((torch.float32, precision(settings))))


@cache
def limits(settings: Settings, dtype: torch.dtype) -> Limits:
    """Measure both on the settings' device."""
    device, large = settings.device, settings.device.type == "cuda"
    size = 64 if settings.toy else 8192 if large else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        product = _best(lambda: a @ b, settings)
        rows, columns = (64, 64) if settings.toy else (8192, 32768 if large else 16384)
        matrix = torch.ones(rows, columns, device=device)
        vector = torch.ones(columns, device=device)
        # Which of the two reads faster depends on the library.
        reading = min(_best(act, settings) for act in (lambda: matrix @ vector, matrix.sum))
    return Limits(dtype=dtype, flops=2 * size**3 / product, bandwidth=matrix.nbytes / reading)


def _best(act: Work, settings: Settings) -> float:
    """The shortest time that it was seen to take."""
    end = time.perf_counter() + (0.01 if settings.toy else _SECONDS)
    best = seconds(act, settings.device)
    while time.perf_counter() < end:
        best = min(best, seconds(act, settings.device))
    return best


def describe(settings: Settings) -> str:
    """The processor, what of it is used, its limits and the libraries' versions, in one line."""
    parts = [f"{_processor()}, {torch.get_num_threads()} threads"]
    if settings.device.type == "cuda":
        parts.append(torch.cuda.get_device_name(settings.device))
    else:
        parts.append(torch.backends.cpu.get_cpu_capability())
    parts += [
        f"{limits(settings, dtype).flops / 1e9:.0f} GFLOP/s in {name_of(dtype)}"
        for dtype in number_formats(settings)
    ]
    parts.append(f"{limits(settings, torch.float32).bandwidth / 1e9:.1f} GB/s read from memory")
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}")
    return "; ".join(parts)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def flops_of(act: Work) -> float:
    """Operations of the matrix products, convolutions and attention in `act`, forth and back.

    As torch would do them: what is compiled cannot be counted.
    """
    aten: Any = torch.ops.aten
    counted = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention(2, first=0),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5, first=1),
    }
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with mock.patch.dict(os.environ, {"DRIVESIM_NATIVE": "0"}), counter:
        act()
    return float(counter.get_total_flops())


def _attention(products: int, *, first: int) -> Callable[..., int]:
    """Count the products of an attention whose queries are argument `first`, then keys, values.

    Torch counts those of its CUDA kernels alone. Of a causal one, half is computed.
    """

    def count(*arguments: Any, **_: Any) -> int:
        queries, keys = arguments[first], arguments[first + 1]
        causal = True in arguments[first + 3 :]
        return int(products * 2 * prod(queries) * keys[-2] // (2 if causal else 1))

    return count
