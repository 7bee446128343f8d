"""`python -m benchmarks.rollouts.futures`: the speed of sampling eight futures at once.

Samples eight futures of 32 frames after the same 16 frames. The 16 frames are encoded only once,
and the futures are sampled as one batch. For comparison, one future alone is also timed.
"""

import sys

import numpy as np
import torch

from benchmarks.measuring.machine import limits, precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Figure,
    Settings,
    alternate,
    rounded,
    run_command,
)
from benchmarks.measuring.shapes import shape_of, world_model
from benchmarks.rollouts.speed import pass_flops
from driving_sim.engine.precision import name_of

_FUTURES = 8


def measure(settings: Settings) -> list[Claim]:
    """Return the frames per second of all futures together. Encoding the past does not count."""
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

    times = alternate(
        {
            "prefix": lambda: world.encode_prefix(tokens, driven),
            "together": lambda: imagine(_FUTURES),
            "one": lambda: imagine(1),
        },
        settings,
    )
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    frames = _FUTURES * length
    return [
        Claim(
            what=f"{_FUTURES} futures at once as tokens, tiny-sized",
            figure=Figure.of([frames / taken for taken in times["together"]]),
            unit="frames/s",
            limits=limits(settings, precision(settings)).share(
                medians["together"], flops=pass_flops(world) * frames
            ),
            details=(
                f"{length} frames after {past}, {shape}, {name_of(world.dtype)}",
                f"one future alone {rounded(length / medians['one'])} frames/s; encoding the past "
                f"takes {rounded(medians['prefix'])} s",
            ),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.futures", BENCHMARKS, sys.argv[1:])
