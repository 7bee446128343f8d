"""Choose the drives for training, validating and testing an inverse-dynamics probe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from driving_sim.data.drive import SampledDrive
from driving_sim.data.split import original_id
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.segments import clipped
from driving_sim.engine.errors import DriveSimError, TooLittleDataError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.fidelity import CURVE
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics, ProbeClip, ProbeSource
from driving_sim.evaluate.footage import Footage, recording_digests
from driving_sim.world_model.world_model import WorldModel

T = TypeVar("T")

PROBE_FILE = "probe.safetensors"
"""Name of the probe's file in a report."""
_SECONDS = 1200.0
"""Maximum length in s of the footage for a probe's training and validation together.

The footage for its test has the same limit.
"""
_DRIVES = 100
"""Maximum number of drives in each of a probe's training, validation and test sets."""
_RATE_TOLERANCE = 0.02
"""Maximum relative difference between the frame rates of a probe and a world model.

The probe measures motion from frame to frame, so its estimates depend on the frame rate.
"""


Source = SampledDrive | Footage
"""A drive with its frames and actions."""
Lesson = tuple[str, Source]
"""The `recording_digest` of a training drive, and the drive itself."""


def load_probe(world: WorldModel, path: Path, recordings: Mapping[str, str]) -> InverseDynamics:
    """Load a trained probe from a report's folder or from the probe's own file.

    `recordings` maps the ids of the held-out drives to their `recording_digest`. Raises
    DriveSimError if the probe's frame rate or steering kind differs from the model's, or if the
    probe was trained on a held-out drive.
    """
    probe = InverseDynamics.load(path / PROBE_FILE if path.is_dir() else path)
    source = probe.source
    if abs(source.fps / world.fps - 1) > _RATE_TOLERANCE:
        raise DriveSimError(
            f"`probe` {path}: its frame rate is {source.fps:.3g} frames/s, but the model's is "
            f"{world.fps:.3g}; name a probe of the model's rate, or leave out `probe`"
        )
    if world.steering_kind is not None and source.steering_kind != world.steering_kind:
        raise DriveSimError(
            f"`probe` {path}: its steering kind is {source.steering_kind}, but the model's is "
            f"{world.steering_kind}; name a probe of the model's kind, or leave out `probe`"
        )
    for name, recording in recordings.items():
        if recording in source.drives:
            raise DriveSimError(
                f"`probe` {path}: it learned from the held-out drive {name!r}; name another "
                "probe, or leave out `probe`"
            )
    return probe


def recorded_lessons(
    world: WorldModel,
    training: TokenStore | None,
    videos: Sequence[SampledDrive],
    recordings: Mapping[str, str],
) -> list[Lesson]:
    """Return those of `videos` that are in the training tokens, have actions, and are not held out.

    Without training tokens, it is not checked that the videos are in them.
    `recordings` maps the ids of the held-out drives to their `recording_digest`.
    """
    digests = recording_digests(videos, world.known_channels)
    trained = set(map(original_id, training.drive_ids)) if training else digests.keys()
    lessons: list[Lesson] = [
        (digests[name], sampled)
        for sampled in videos
        for name in [sampled.drive.id]
        if name in trained & digests.keys() and digests[name] not in recordings.values()
    ]
    if not lessons:
        of_store = f" of {training.path}" if training else ""
        raise DriveSimError(
            f"none of `training_videos` is a drive{of_store} that has actions and is not held out; "
            "name the videos that the model was trained on"
        )
    return lessons


def reconstructed_lessons(world: WorldModel, training: TokenStore) -> list[Lesson]:
    """Return the training drives as the tokenizer reconstructs them from their tokens.

    Use them if the videos of these drives are not available.
    """
    originals = [drive for drive in training.drives if drive.id == original_id(drive.id)]
    digests = recording_digests(originals)
    return [
        (digests[drive.id], Footage(drive=drive, tokenizer=world.tokenizer))
        for drive in originals
        if drive.id in digests
    ]


def _clips(world: WorldModel, sources: Sequence[Source]) -> list[ProbeClip]:
    """Return the beginning of every drive with its actions, at most `_SECONDS` in total."""
    drives = [source.drive if isinstance(source, Footage) else source for source in sources]
    counts = _shares([len(drive.actions) for drive in drives], _SECONDS * world.fps)
    clips = []
    for source, drive, count in zip(sources, drives, counts, strict=True):
        valid = np.asarray(drive.action_valid[:count])
        if isinstance(source, Footage):
            frames, segments = source.frames(0, count, in_order=True), source.drive.entry.segments
        else:
            stream = source.drive.stream(world.tokenizer.frame_size, source.indices[:count])
            frames, segments = np.stack([*stream]), tuple(source.segments)
            valid = valid & world.known_channels
        clip = ProbeClip(
            frames=frames,
            actions=np.asarray(drive.actions[:count]),
            action_valid=valid,
            segments=clipped(segments, 0, count),
        )
        clips.append(clip)
    return clips


def fit_probe(
    world: WorldModel,
    footage: Sequence[Footage],
    trained: InverseDynamics | None,
    lessons: Sequence[Lesson],
    steps: int,
) -> tuple[InverseDynamics | None, dict[str, Any], str]:
    """Return a probe, its errors on the held-out drives by channel, and an empty string.

    The probe is `trained`, or if that is None, a new one trained on `lessons` for `steps` steps. If
    there can be no probe, return None, an empty dict and the reason.
    """
    if not any(drive_footage.drive.action_valid.any() for drive_footage in footage):
        return None, {}, "no action that the model learned is known for the held-out drives"
    try:
        probe = trained or _train_probe(world, lessons, steps)
    except TooLittleDataError as error:
        return None, {}, str(error)
    held_out = _clips(world, _evenly_chosen(footage))
    return probe, probe.errors(held_out, curve=CURVE * world.statistics.steering_p95), ""


def _train_probe(world: WorldModel, lessons: Sequence[Lesson], steps: int) -> InverseDynamics:
    """Train a probe, and keep the weights that do best on the model's validation drives.

    If the lessons contain no validation drive of the model, their last drive is used instead.
    """
    if not lessons:
        raise TooLittleDataError("the inverse-dynamics probe has no training drives to learn from")
    names = list(dict.fromkeys(source.drive.id for _, source in lessons))
    validation_names = set(world.validation_drives) & set(names) or set(names[-1:])
    if validation_names == set(names):
        raise TooLittleDataError(
            "the inverse-dynamics probe needs two or more training drives with actions; at least "
            "one of them must not be a validation drive of the model"
        )
    learned, validation = (
        _evenly_chosen(
            [lesson for lesson in lessons if (lesson[1].drive.id in validation_names) is validates]
        )
        for validates in (False, True)
    )
    digests, sources = zip(*learned, *validation, strict=True)
    clips = _clips(world, sources)
    with progress(steps, "inverse-dynamics probe", "steps") as bar:
        return InverseDynamics.fit(
            clips[: len(learned)],
            clips[len(learned) :],
            source=ProbeSource(fps=world.fps, steering_kind=world.steering_kind, drives=digests),
            steps=steps,
            advance=bar.advance,
        )


def _evenly_chosen(drives: Sequence[T]) -> Sequence[T]:
    """Return every n-th drive, with the smallest n that gives at most `_DRIVES` drives."""
    return drives[:: max(1, -(-len(drives) // _DRIVES))]


def _shares(lengths: Sequence[int], frames: float) -> list[int]:
    """Return how many frames to take from each drive, at most `frames` in total.

    Short drives give all their frames. The long drives share the rest equally.
    """
    left, shares = int(frames), [0] * len(lengths)
    shortest_first = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for number, index in enumerate(shortest_first):
        shares[index] = min(lengths[index], left // (len(shortest_first) - number))
        left -= shares[index]
    return shares
