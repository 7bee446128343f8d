"""`python -m benchmarks.rollouts.session`: what it costs to fork and to rewind a session.

The cost of a fork includes the copies of the cache that the two sessions make when they drive on:
the time of a fork and of one step of each, less the time of two steps.
"""

import sys

import numpy as np
import torch

from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Figure,
    Settings,
    alternate,
    run_command,
)
from benchmarks.measuring.shapes import shape_of, world_model
from driving_sim.engine.precision import name_of

_ACTION = np.array((8.0, 0.1), np.float32)
_REPEATS = 10
_FORK_MS = 20.0


def measure(settings: Settings) -> list[Claim]:
    """Return the milliseconds of a fork and of a rewind by five seconds."""
    shape = shape_of("tiny", settings)
    world = world_model(shape, settings)
    grid = shape.grid
    past = world.context_frames
    tokens = torch.randint(grid.codebook_size, (past, grid.rows, grid.cols))
    prefix = world.encode_prefix(tokens, np.tile(_ACTION, (past - 1, 1)))
    back_s = 0.5 if settings.toy else 5.0
    session = world.drive(prefix, history_s=2 * back_s)
    other = session.fork()
    for _ in range(round(2 * back_s * world.fps)):
        session.step(_ACTION)

    def step_both() -> None:
        for _ in range(_REPEATS):
            session.step(_ACTION)
            other.step(_ACTION)

    def fork_and_step_both() -> None:
        for _ in range(_REPEATS):
            with session.fork() as fork:
                session.step(_ACTION)
                fork.step(_ACTION)

    times = alternate(
        {
            "steps": step_both,
            "forks": fork_and_step_both,
            "rewind": lambda: session.rewind(back_s),
            "drive on": lambda: [session.step(_ACTION) for _ in range(round(back_s * world.fps))],
        },
        settings,
    )
    forks = zip(times["forks"], times["steps"], strict=True)
    details = (f"{shape}, {name_of(world.dtype)}, {world.fps:g} frames/s",)
    return [
        Claim(
            what="forking a session, tiny-sized",
            figure=Figure.of([1000 * max(0.0, fork - step) / _REPEATS for fork, step in forks]),
            unit="ms",
            bar=_FORK_MS,
            at_most=True,
            details=details,
        ),
        Claim(
            what=f"rewinding a session by {back_s:g} s, tiny-sized",
            figure=Figure.of([1000 * taken for taken in times["rewind"]]),
            unit="ms",
            details=details,
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.session", BENCHMARKS, sys.argv[1:])
