"""The machine's name and its measured limits: speed of matrix products, and memory bandwidth."""

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
"""Seconds for which each limit is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Highest rates that were measured on the machine."""

    dtype: torch.dtype
    """Number format of the matrix products."""
    flops: float
    """Floating-point operations per second in a product of large matrices in `dtype`."""
    bandwidth: float
    """Bytes per second when reading a matrix that is larger than any cache."""

    def share(self, seconds: float, *, flops: float = 0.0, read: float = 0.0) -> str:
        """Return how close some work comes to the machine's limits, as text.

        The work takes `seconds`, computes `flops` operations and reads `read` bytes from memory.
        "41 % of products, 98 % of memory" means 41 % of the operations per second of matrix
        products, and 98 % of the memory bandwidth. If `flops` or `read` is 0, its percentage is
        left out.
        """
        parts = []
        if flops:
            parts.append(f"{_percent(flops / seconds / self.flops)} of products")
        if read:
            parts.append(f"{_percent(read / seconds / self.bandwidth)} of memory")
        return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def precision(settings: Settings) -> torch.dtype:
    """Return the number format that precision `auto` chooses for training on the device.

    Rollouts are different: on a CPU, they store weights in bf16 even if the CPU multiplies in fp32.
    """
    return resolve_precision("auto", settings.device)


def number_formats(settings: Settings) -> tuple[torch.dtype, ...]:
    """Return the formats to measure: fp32, and bf16 unless torch only emulates it on the device."""
    return tuple(dict.fromkeys((torch.float32, precision(settings))))


@cache
def limits(settings: Settings, dtype: torch.dtype) -> Limits:
    """Measure the device's speed of matrix products in `dtype`, and its memory bandwidth."""
    device, large = settings.device, settings.device.type == "cuda"
    size = 64 if settings.toy else 8192 if large else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        product = _best(lambda: a @ b, settings)
        rows, columns = (64, 64) if settings.toy else (8192, 32768 if large else 16384)
        matrix = torch.ones(rows, columns, device=device)
        vector = torch.ones(columns, device=device)
        # Read the matrix in two ways, because the faster way depends on torch's math library.
        reading = min(_best(act, settings) for act in (lambda: matrix @ vector, matrix.sum))
    return Limits(dtype=dtype, flops=2 * size**3 / product, bandwidth=matrix.nbytes / reading)


def _best(act: Work, settings: Settings) -> float:
    """Call `act` repeatedly, and return the seconds of the fastest call."""
    end = time.perf_counter() + (0.01 if settings.toy else _SECONDS)
    best = seconds(act, settings.device)
    while time.perf_counter() < end:
        best = min(best, seconds(act, settings.device))
    return best


def describe(settings: Settings) -> str:
    """Return the machine's limits and the versions of torch and Python, as two sentences."""
    rates = [
        f"{limits(settings, dtype).flops / 1e9:.0f} GFLOP/s in {name_of(dtype)}"
        for dtype in number_formats(settings)
    ]
    rates.append(f"{limits(settings, torch.float32).bandwidth / 1e9:.1f} GB/s from memory")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{', '.join(rates)}. {versions}."


def machine_name(settings: Settings) -> str:
    """Return the machine's name, as in "AMD EPYC 7B13 (AVX2), 2 threads".

    On CUDA, the GPU's name takes the place of the vector instructions.
    """
    if settings.device.type == "cuda":
        kind = torch.cuda.get_device_name(settings.device)
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} ({kind}), {torch.get_num_threads()} threads"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def flops_of(act: Work) -> float:
    """Return the number of operations in the matrix products, convolutions and attention of `act`.

    Includes the backward pass if `act` runs one. The C++ kernels are turned off for this, because
    torch cannot count their operations.
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
    """Return a function that counts the operations of an attention kernel on a CPU.

    Torch has such functions for CUDA kernels only. The kernel computes `products` matrix products.
    Its arguments from index `first` on are queries, keys and values. A causal kernel computes only
    half of all pairs of queries and keys.
    """

    def count(*arguments: Any, **_: Any) -> int:
        queries, keys = arguments[first], arguments[first + 1]
        causal = True in arguments[first + 3 :]
        return int(products * 2 * prod(queries) * keys[-2] // (2 if causal else 1))

    return count
