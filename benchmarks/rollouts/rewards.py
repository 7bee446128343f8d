"""`python -m benchmarks.rollouts.rewards`: do the ready rewards tell good driving from bad?

Four drivers drive in the packaged world model, from all of its contexts. Prints a Markdown table
of the reward and of the ends. The first driver steers against the offset and the heading that the
lane probe reads.
"""

import argparse
from collections.abc import Callable

import numpy as np

from driving_sim.data.arrays import Floats, Pixels
from driving_sim.engine.threads import keep_freed_memory, leave_busy_cores
from driving_sim.env import DriveVectorEnv, KeepLane, LaneProbe, ProgressWithoutSurprise
from driving_sim.env.lane_probe import PROBE_FILE
from driving_sim.env.moment import Moment
from driving_sim.world_model.world_model import WorldModel

_PER_METRE, _PER_RADIAN = 0.4, 4.0
"""Steering against an offset of 1 m and a heading of 1 rad; 1 is full steering."""


def compare(world: WorldModel, episodes: int, steps: int) -> str:
    """Drive `episodes` episodes of at most `steps` steps with each driver; return the table."""
    assert world.run is not None
    probe = LaneProbe.load(world.run / PROBE_FILE)
    rng = np.random.default_rng(0)

    def by_probe(frames: Pixels) -> Floats:
        offset, heading = probe.read(frames)
        return -_PER_METRE * offset - _PER_RADIAN * heading

    drivers: dict[str, Callable[[Pixels], Floats]] = {
        "steers by the probe": by_probe,
        "straight on": lambda frames: np.zeros(len(frames)),
        "random": lambda frames: rng.uniform(-1, 1, len(frames)),
        "full left": lambda frames: np.ones(len(frames)),
    }
    rows = [
        "| driver | reward of `KeepLane`, m | steps until the end | would end by surprise |",
        "|---|---|---|---|",
    ]
    for name, steer in drivers.items():
        reward, lasted, surprised = _drive(world, steer, episodes, steps)
        rows.append(f"| {name} | {reward:.1f} | {lasted:.1f} | {surprised:.0%} |")
    return "\n".join(rows)


def _drive(
    world: WorldModel, steer: Callable[[Pixels], Floats], episodes: int, steps: int
) -> tuple[float, float, float]:
    """Return the mean reward, the mean length in steps, and the share that surprise ends."""
    surprise = ProgressWithoutSurprise()
    surprised = np.zeros(episodes, np.bool_)
    running = np.ones(episodes, np.bool_)

    def reward(moment: Moment) -> Floats:
        surprised[:] |= surprise.end(moment) & running
        return KeepLane()(moment)

    env = DriveVectorEnv(episodes, world, reward=reward, end=KeepLane().end)
    frames, _ = env.reset(seed=0)
    total, lasted = np.zeros(episodes), np.zeros(episodes)
    for _ in range(steps):
        actions = np.stack([np.zeros(episodes), np.clip(steer(frames), -1, 1)], axis=1)
        frames, rewards, ended, _, _ = env.step(actions)
        total += np.where(running, rewards, 0)
        lasted += running
        running &= ~ended
    env.close()
    return float(total.mean()), float(lasted.mean()), float(surprised.mean())


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.rollouts.rewards"
    )
    parser.add_argument(
        "--model", default="synthetic", help="run folder or name; default: synthetic"
    )
    parser.add_argument("--episodes", type=int, default=16, help="default: 16")
    parser.add_argument("--steps", type=int, default=120, help="default: 120")
    options = parser.parse_args()
    keep_freed_memory()
    leave_busy_cores()
    world = WorldModel.from_run(options.model, "cpu")
    print(compare(world, options.episodes, options.steps))


if __name__ == "__main__":
    main()
