"""`python -m benchmarks.rollouts.length`: does frame 2,000 of a rollout cost more than frame 100?

One rollout goes on to its end; then a second one goes on to frame 100, and both take steps in
turns. The memory is the process's (on CUDA, what torch has allocated) at frame 100 and at the end
of the first rollout.
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
"""Frames that are timed together."""


def measure(settings: Settings) -> list[Claim]:
    """Time per frame and memory, both of the late frames as a share of the early ones'."""
    early, length = (4, 12) if settings.toy else (100, 2000)
    shape = shape_of("tiny", settings)
    world = world_model(shape, settings)
    context = shape.model.context_frames
    late_frames = endless(world, context=context)
    for _ in range(early):
        next(late_frames)
    before = _megabytes(settings.device)
    # The last of the frames are those that are timed, in a round that does not count and the rest.
    for _ in range(length - early - _STEPS * (settings.rounds + 1)):
        next(late_frames)
    grown = _megabytes(settings.device) / before
    early_frames = endless(world, context=context)
    for _ in range(early - _STEPS * (settings.rounds + 1)):
        next(early_frames)
    found = alternate(
        {
            "early": lambda: [next(early_frames) for _ in range(_STEPS)],
            "late": lambda: [next(late_frames) for _ in range(_STEPS)],
        },
        settings,
    )
    ratio = Figure.of([b / a for a, b in zip(found["early"], found["late"], strict=True)])
    what = f"rollout of {length:,} frames, {shape}, {name_of(world.dtype)}"
    return [
        Claim(
            what=f"{what}: time of a frame at its end",
            against=f"the same at frame {early}",
            figure=ratio,
            bar=1.05,
            at_most=True,
        ),
        Claim(
            what=f"{what}: memory at its end",
            against=f"the same at frame {early}",
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
    run_command(__doc__, "rollout_length", BENCHMARKS, sys.argv[1:])
