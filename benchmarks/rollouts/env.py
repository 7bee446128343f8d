"""`python -m benchmarks.rollouts.env`: what the Gymnasium environment costs on top of a rollout.

Steps `DriveVectorEnv` with 1 and with 8 environments, from their reset on. For comparison,
`WorldModel.generate` samples as many futures from the same context, and their frames are decoded.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Settings,
    alternate,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.measuring.shapes import FPS, shape_of, world_model
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine.precision import name_of
from driving_sim.env import DriveVectorEnv
from driving_sim.env.starts import find_starts
from driving_sim.world_model.world_model import WorldModel

_ENVIRONMENTS = (1, 8)
_BAR = 0.95


def measure(settings: Settings) -> list[Claim]:
    """Return the speed of the environments, divided by that of as many futures."""
    shape = shape_of("tiny", settings)
    world = world_model(shape, settings)
    steps = 2 if settings.toy else 32
    config = SyntheticConfig(height=shape.frames.height, width=shape.frames.width, fps=FPS)
    with tempfile.TemporaryDirectory() as folder:
        videos = write_synthetic_drives(
            Path(folder) / "drives",
            drives=1,
            seconds=(2 * shape.model.context_frames + 2) / FPS,
            config=config,
        )
        return [_compared(world, videos[0], count, steps, settings) for count in _ENVIRONMENTS]


def _compared(world: WorldModel, video: Path, count: int, steps: int, settings: Settings) -> Claim:
    env = DriveVectorEnv(count, world, video)
    (start,) = find_starts(world, video)
    prefix = world.encode_prefix(start.tokens, start.actions, start.valid)
    actions = np.zeros((count, 2), np.float32)
    driven = np.full((steps, 2), (8.0, 0.0), np.float32)

    def drive() -> None:
        env.reset(seed=0)
        for _ in range(steps):
            env.step(actions)

    def roll_out() -> None:
        for frame in world.generate(prefix, driven, samples=count):
            _ = frame.pixels

    times = alternate({"environment": drive, "futures": roll_out}, settings)
    env.close()
    own, peer = (count * steps / float(np.median(taken)) for taken in times.values())
    return Claim(
        what=f"steps of {count} environment{'s' if count > 1 else ''} at once, tiny-sized",
        figure=times_faster(times["futures"], times["environment"]),
        bar=_BAR,
        against="as many futures",
        own=f"{rounded(own)} frames/s",
        peer=f"{rounded(peer)} frames/s",
        details=(
            f"{steps} steps after a reset, with the default reward and end; tokens in "
            f"{name_of(world.dtype)}, pictures in {name_of(world.tokenizer.dtype)}",
        ),
    )


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.env", BENCHMARKS, sys.argv[1:])
