"""`python -m benchmarks.rollouts.length`: does frame 2,000 of a rollout cost more than frame 100?

Runs one rollout to shortly before frame 2,000 and another to shortly before frame 100. Then times
the next frames of both rollouts, in turns. Also compares the memory near frame 2,000 with the
memory at frame 100. On CUDA, this is the memory that torch has allocated, otherwise the memory of
the process.
"""

import resource
import sys
from pathlib import Path

import torch

from benchmarks.measuring.paired import Benchmark, Claim, Figure, Settings, alternate, run_command
from benchmarks.measuring.shapes import shape_of, world_model
from benchmarks.rollouts.speed import endless
from driving_sim.engine.precision import name_of

_STEPS = 8
"""Number of frames that are timed together."""


def measure(settings: Settings) -> list[Claim]:
    """Return the time and the memory of late frames, divided by those of early frames."""
    early, length = (4, 12) if settings.toy else (100, 2000)
    shape = shape_of("tiny", settings)
    world = world_model(shape, settings)
    context = shape.model.context_frames
    late_frames = endless(world, context=context)
    for _ in range(early):
        next(late_frames)
    before = _megabytes(settings.device)
    # Leave the last frames for timing: one warm-up round, and the rounds that count.
    for _ in range(length - early - _STEPS * (settings.rounds + 1)):
        next(late_frames)
    grown = _megabytes(settings.device) / before
    early_frames = endless(world, context=context)
    for _ in range(early - _STEPS * (settings.rounds + 1)):
        next(early_frames)
    times = alternate(
        {
            "early": lambda: [next(early_frames) for _ in range(_STEPS)],
            "late": lambda: [next(late_frames) for _ in range(_STEPS)],
        },
        settings,
    )
    ratio = Figure.of([b / a for a, b in zip(times["early"], times["late"], strict=True)])
    return [
        Claim(
            what=f"time of frame {length:,} relative to frame {early}",
            figure=ratio,
            bar=1.05,
            at_most=True,
            details=(f"rollout as tokens, {shape}, {name_of(world.dtype)}",),
        ),
        Claim(
            what=f"memory at frame {length:,} relative to frame {early}",
            figure=Figure.of([grown]),
            bar=1.02,
            at_most=True,
            details=(f"{before:.0f} MB at frame {early}",),
        ),
    ]


def _megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        return int(sizes.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.length", BENCHMARKS, sys.argv[1:])
