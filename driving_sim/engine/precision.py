"""Which number format passes run in: what decides between fp32 and bf16."""

import platform
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import nn

from driving_sim.engine.device import processor_features
from driving_sim.engine.errors import DriveSimError

MEASURE_SECONDS = 0.1
"""How long each format may be measured on the CPU, beyond its first pass."""


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast format behind auto, fp32 or bf16: `torch.float32` or `torch.bfloat16`.

    auto is bf16 where CUDA or an x86 processor has it in hardware, fp32 on MPS, and on other CPUs
    whichever measures faster.
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
    """Fp32 or bf16, as the options are called."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def autocast(
    device: torch.device, dtype: torch.dtype, *, keep_casts: bool = True
) -> AbstractContextManager[object]:
    """Passes in bfloat16, whatever the weights are kept in; else in what they are kept in.

    Weights are cast once where `keep_casts`, else at each use.
    """
    if dtype is not torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=keep_casts)


@cache
def _bf16_is_faster_on_cpu() -> bool:
    # Without bf16 hardware a CPU emulates it, up to 100 times slower.
    if platform.machine() == "x86_64" and (features := processor_features()):
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(features)
    # The margin is for noise.
    return _cpu_seconds(torch.bfloat16) < 0.8 * _cpu_seconds(torch.float32)


def _cpu_seconds(dtype: torch.dtype) -> float:
    """The best time of a convolution and a matrix product, forward and backward.

    Of the size that the models have: on much smaller ones the casts cost what the products save.
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
        # The first pass sets kernels up; the clock starts after it.
        end = min(end, now + MEASURE_SECONDS)
        if now >= end or now - start > MEASURE_SECONDS:
            return best
