"""`python -m benchmarks.rollouts.session`: driving in the packaged world model, forks and rewinds.

The cost of a fork includes the copies of the cache that the two sessions make when they drive on:
the time of a fork and of one step of each, less the time of two steps.
"""

import sys

import numpy as np

from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Figure,
    Settings,
    alternate,
    run_command,
)
from driving_sim.engine.precision import name_of
from driving_sim.world_model.contexts import contexts_of, load_context
from driving_sim.world_model.world_model import WorldModel

_ACTION = np.array((8.0, 0.02), np.float32)
_REPEATS = 10
_FORK_MS = 20.0


def measure(settings: Settings) -> list[Claim]:
    """Return the frames driven per second, and the milliseconds of a fork and of a rewind."""
    world = WorldModel.from_run("synthetic", str(settings.device))
    start = load_context(world, contexts_of("synthetic")["noon"])
    back_s = 0.5 if settings.toy else 5.0
    back = round(back_s * world.fps)
    session = world.drive(start, history_s=2 * back_s)
    other = session.fork()
    for _ in range(2 * back):
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

    def drive() -> None:
        for _ in range(back):
            _ = session.step(_ACTION).pixels

    times = alternate(
        {
            "steps": step_both,
            "forks": fork_and_step_both,
            "rewind": lambda: session.rewind(back_s),
            "drive": drive,
        },
        settings,
    )
    forks = zip(times["forks"], times["steps"], strict=True)
    details = (f"{name_of(world.dtype)}, {world.fps:g} frames/s is real time",)
    return [
        Claim(
            what="driving in `synthetic`, with pictures",
            figure=Figure.of([back / taken for taken in times["drive"]]),
            unit="frames/s",
            bar=world.fps,
            details=details,
        ),
        Claim(
            what="forking a session in `synthetic`",
            figure=Figure.of([1000 * max(0.0, fork - step) / _REPEATS for fork, step in forks]),
            unit="ms",
            bar=_FORK_MS,
            at_most=True,
            details=details,
        ),
        Claim(
            what=f"rewinding a session in `synthetic` by {back_s:g} s",
            figure=Figure.of([1000 * taken for taken in times["rewind"]]),
            unit="ms",
            details=details,
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {"synthetic": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.session", BENCHMARKS, sys.argv[1:])
