"""Choose the number format of forward and backward passes: fp32 or bf16."""

import platform
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import nn

from driving_sim.engine.device import processor_features
from driving_sim.engine.errors import DriveSimError

MEASURE_SECONDS = 0.1
"""Time limit for measuring one format on the CPU, in seconds, not counting the first pass."""


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast format for auto, fp32 or bf16: `torch.float32` or `torch.bfloat16`.

    auto depends on the device. On CUDA GPUs and x86 CPUs it means bf16 if the hardware supports it,
    otherwise fp32. On other CPUs, both formats are timed and the faster one is chosen. On MPS it
    means fp32.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise DriveSimError(f"`precision` {name}: expected one of auto, fp32, bf16")
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and _bf16_is_faster_on_cpu()
    return torch.bfloat16 if faster else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a format in the settings: fp32 or bf16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def autocast(
    device: torch.device, dtype: torch.dtype, *, keep_casts: bool = True
) -> AbstractContextManager[object]:
    """Return a context that autocasts to bfloat16, or a no-op if `dtype` is another format.

    With `keep_casts`, a weight is cast once per context, otherwise at every use.
    """
    if dtype is not torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=keep_casts)


@cache
def _bf16_is_faster_on_cpu() -> bool:
    # An x86 CPU without bf16 instructions emulates bf16, which is up to 100 times slower. So do not
    # measure its speed, but look at its features.
    if platform.machine() == "x86_64" and (features := processor_features()):
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(features)
    # The factor 0.8 is a margin for noise in the measurements.
    return _cpu_seconds(torch.bfloat16) < 0.8 * _cpu_seconds(torch.float32)


def _cpu_seconds(dtype: torch.dtype) -> float:
    """Measure a forward and backward pass of a convolution and a linear layer.

    The passes are repeated. The shortest time is returned, in seconds.

    The layers are as large as those of the models. In much smaller layers, the casts to bf16 would
    take as much time as bf16 saves in the matrix products.
    """
    conv, linear = nn.Conv2d(128, 128, 3, padding=1), nn.Linear(512, 512)
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.ones(1, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    rows = torch.ones(256, 512)
    best, end = float("inf"), float("inf")
    while True:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = conv(image).float().mean() + linear(rows).float().mean()
        loss.backward()
        now = time.perf_counter()
        best = min(best, now - start)
        # The first pass also sets up the kernels, so the time limit starts after it.
        end = min(end, now + MEASURE_SECONDS)
        if now >= end or now - start > MEASURE_SECONDS:
            return best
