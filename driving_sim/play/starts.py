"""The starts that a driver can choose from: a run's contexts, or videos that the user names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats32
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.true_future import synthetic_beside
from driving_sim.data.synthetic.world import SyntheticWorld
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say
from driving_sim.world_model.contexts import (
    context_from_store,
    contexts_of,
    find_for,
    load_context,
)
from driving_sim.world_model.rollout import Context, context_from_drive
from driving_sim.world_model.world_model import WorldModel

_MOST = 24  # starts that are offered
_SAME_RATE = 1e-3  # a step of the simulator must be a frame of the model


@dataclass(frozen=True, slots=True)
class Truth:
    """The world in which a start was filmed, and the state of the car."""

    world: SyntheticWorld
    state: VehicleState

    def after(self, actions: Floats32) -> "Truth":
        """Return the truth after actions [N, 2]."""
        state = self.state
        for action in actions:
            state = self.world.step(state, action)
        return Truth(self.world, state)


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A place to start from."""

    name: str
    context: Context
    truth: Truth | None = None
    """The truth at the end of the context; None if no simulator knows it, frame by frame."""

    @property
    def has_recording(self) -> bool:
        """Whether recorded actions follow the context."""
        return bool(self.context.action_valid[len(self.context.tokens) - 1 :].any())


def find_starts(
    world: WorldModel, videos: Path | None, tokens: Path, reading: Reading = AS_NAMED
) -> dict[str, Start]:
    """Return the starts in `videos`, or else the contexts of the model's run, by name.

    `reading` says how to read `videos`. A run without contexts starts from a drive in the token
    store `tokens`. Raises DriveSimError if there is none, or if a
    start does not fit the model.
    """
    own = contexts_of(world.run) if world.run else {}
    if videos is not None:
        starts = list(_in_videos(world, videos, reading))
    elif own:
        starts = [
            _start(world, name, load_context(world, path), path) for name, path in own.items()
        ]
    else:
        context = context_from_store(world, tokens, None)
        starts = [_start(world, context.label, context, None)]
    return {start.name: start for start in starts}


def _in_videos(world: WorldModel, videos: Path, reading: Reading) -> Iterator[Start]:
    drives = find_for(world, [videos], reading).drives
    if len(drives) > _MOST:
        say(f"{videos}: starts from the first {_MOST} of {len(drives)} drives are offered")
    for drive in drives[:_MOST]:
        video = Path(drive.video.path) if drive.video else None
        yield _start(world, drive.id, context_from_drive(world, drive, None), video)


def _start(world: WorldModel, name: str, context: Context, video: Path | None) -> Start:
    if len(context.tokens) < 2:
        raise DriveSimError(f"{name}: the context has a single frame; use a longer drive")
    driven = synthetic_beside(video) if video else None
    if driven is None or world.steering_kind != "road_wheel":
        return Start(name, context)
    if abs(driven.world.config.fps / world.fps - 1) > _SAME_RATE:
        return Start(name, context)
    state = driven.states[round(context.start_s * driven.world.config.fps)]
    return Start(name, context, Truth(driven.world, state))
