"""Find the drive from which a rollout starts: a context of the run, or a drive in a token store.

A run folder may have a folder `contexts` with short drives, as videos with CSVs beside them.
Futures start at the end of such a context.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.drive import DriveSet
from driving_sim.data.sources import find_drives
from driving_sim.data.sources.video_folder import VIDEO_SUFFIXES
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say
from driving_sim.engine.run_folder import find_run
from driving_sim.world_model.rollout import (
    Context,
    context_from_drive,
    context_from_tokens,
    sample_for,
)
from driving_sim.world_model.world_model import WorldModel

CONTEXTS = "contexts"
"""Name of the folder, inside a run folder, that contains the run's contexts."""


def contexts_of(run: Path | str) -> dict[str, Path]:
    """Return the videos of a run's contexts by name, sorted by name. A run may have none.

    `run` is a run folder, or the name of a packaged model.
    """
    folder = find_run(run) / CONTEXTS
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        path.stem: path
        for path in files
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    }


def find_for(world: WorldModel, videos: Sequence[Path], reading: Reading = AS_NAMED) -> DriveSet:
    """Find drives for a world model. Their steering is of the model's kind.

    Prints the assumptions made. Raises BadDriveError if a drive cannot be read, and DriveSimError
    if their kind of steering differs from the model's.
    """
    drive_set = find_drives(
        videos,
        replace(reading, steering_kind=reading.steering_kind or world.steering_kind),
        # A model that learned no actions ignores action files, so do not fail on errors in them.
        actions=any(world.known_channels),
    ).require_all()
    for line in dict.fromkeys(drive_set.notices):
        say(line)
    return drive_set


def load_context(
    world: WorldModel, video: Path, start_s: float | None = None, *, reading: Reading = AS_NAMED
) -> Context:
    """Load a context of a run, given the path of its video.

    `start_s` is the time of the last context frame, in seconds; by default it is the last frame of
    the video. Raises DriveSimError if the video or its CSV cannot be read or does not fit the world
    model.
    """
    (drive,) = find_for(world, [video], reading).drives
    if start_s is None:
        start_s = float(sample_for(world, drive).timestamps[-1])
    return context_from_drive(world, drive, start_s)


def context_from_store(world: WorldModel, tokens: Path, start_s: float | None) -> Context:
    """Return a context from the first drive in `tokens` that is a validation drive of the model.

    If there is none, the context is from the first drive. Raises DriveSimError if `tokens` is not a
    token store that fits the model.
    """
    try:
        store = TokenStore(tokens)
        world.check_store(store)
    except DriveSimError as error:
        raise DriveSimError(f"{error}, or name a video with `context`") from error
    if notice := world.format_notice(store):
        say(notice)
    # Prefer a validation drive, because the model was not trained on it.
    unseen = [drive_id for drive_id in store.drive_ids if drive_id in world.validation_drives]
    drive, *_ = store.select((unseen or store.drive_ids)[:1])
    return context_from_tokens(world, drive, start_s)
