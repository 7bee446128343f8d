"""`python -m benchmarks.rollouts.futures`: eight futures at once against eight rollouts.

Eight futures of 32 frames after 16: the past is encoded once and the futures' passes are one
batch. Of the eight separate rollouts one is timed, and counted eight times.
"""

import sys

import numpy as np
import torch

from benchmarks.measuring.machine import limits, precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Settings,
    alternate,
    run_command,
    times_faster,
)
from benchmarks.measuring.shapes import shape_of, world_model
from benchmarks.rollouts.speed import pass_flops
from driving_sim.engine.precision import name_of

_FUTURES = 8


def measure(settings: Settings) -> list[Claim]:
    """With the time of the prefix, and without."""
    shape = shape_of("tiny", settings)
    past, length = (4, 2) if settings.toy else (16, 32)
    world = world_model(shape, settings)
    grid = shape.grid
    tokens = torch.randint(grid.codebook_size, (past, grid.rows, grid.cols))
    driven = np.full((past - 1, 2), (8.0, 0.1), np.float32)
    actions = np.full((length, 2), (8.0, 0.1), np.float32)
    prefix = world.encode_prefix(tokens, driven)

    def imagine(samples: int) -> None:
        for _ in world.generate(prefix, actions, samples=samples):
            pass

    found = alternate(
        {
            "prefix": lambda: world.encode_prefix(tokens, driven),
            "together": lambda: imagine(_FUTURES),
            "one": lambda: imagine(1),
        },
        settings,
    )
    encoding = found["prefix"]
    together = [sum(pair) for pair in zip(encoding, found["together"], strict=True)]
    one = [sum(pair) for pair in zip(encoding, found["one"], strict=True)]
    seconds = float(np.median(found["together"]))
    what = f"{_FUTURES} futures of {length} frames after {past}, {shape}, {name_of(world.dtype)}"
    against = f"{_FUTURES} separate rollouts"
    reached = limits(settings, precision(settings)).reached(
        seconds, flops=pass_flops(world) * _FUTURES * length
    )
    figures = (
        f"prefix {np.median(encoding):.3g} s, together {seconds:.3g} s, "
        f"one alone {np.median(found['one']):.3g} s"
    )
    return [
        Claim(
            what=f"{what}, with the prefix",
            against=against,
            figure=times_faster(one, together, work=1 / _FUTURES),
            bar=3,
            details=(figures, reached),
        ),
        Claim(
            what=f"{what}, without the prefix",
            against=against,
            figure=times_faster(found["one"], found["together"], work=1 / _FUTURES),
            bar=2.2,
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "futures", BENCHMARKS, sys.argv[1:])
