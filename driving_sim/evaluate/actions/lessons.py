"""What an inverse-dynamics probe learns from, and what it is judged on."""

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
"""Its name in a report."""
_SECONDS = 1200.0
"""Footage that a probe learns from, and that its error is measured on, at most."""
_DRIVES = 100
"""Drives that it is taken from, at most, spread over all."""
_RATE_TOLERANCE = 0.02
"""How far a probe's frame rate may be off the model's: it reads motion from frame to frame."""


Source = SampledDrive | Footage
"""A drive's frames and actions."""
Lesson = tuple[str, Source]
"""A training drive that a probe can learn from, behind the digest of its recording."""


def load_probe(world: WorldModel, path: Path, recordings: Mapping[str, str]) -> InverseDynamics:
    """Load a probe; raise DriveSimError where it cannot judge this model on these recordings."""
    probe = InverseDynamics.load(path / PROBE_FILE if path.is_dir() else path)
    source = probe.source
    if abs(source.fps / world.fps - 1) > _RATE_TOLERANCE:
        raise DriveSimError(
            f"`probe` {path}: it learned from {source.fps:.3g} frames/s, the model from "
            f"{world.fps:.3g}: name a probe of that rate, or none"
        )
    if world.steering_kind is not None and source.steering_kind != world.steering_kind:
        raise DriveSimError(
            f"`probe` {path}: its steering is {source.steering_kind}, the model's is "
            f"{world.steering_kind}: name a probe of that kind, or none"
        )
    for name, own in recordings.items():
        if own in source.drives:
            raise DriveSimError(
                f"`probe` {path}: it learned from the held-out drive {name!r}: name another probe, "
                "or none"
            )
    return probe


def recorded_lessons(
    world: WorldModel,
    training: TokenStore,
    videos: Sequence[SampledDrive],
    recordings: Mapping[str, str],
) -> list[Lesson]:
    """Real footage of the drives that are in the model's training tokens, and not held out."""
    trained = {original_id(name) for name in training.drive_ids}
    digests = recording_digests(videos, world.known_channels)
    lessons: list[Lesson] = [
        (digests[name], sampled)
        for sampled in videos
        for name in [sampled.drive.id]
        if name in trained & digests.keys() and digests[name] not in recordings.values()
    ]
    if not lessons:
        raise DriveSimError(
            f"none of `training_videos` is a drive of {training.path} that has actions and is not "
            "held out: name the videos as they were named to `drivesim tokenize`"
        )
    return lessons


def reconstructed_lessons(world: WorldModel, training: TokenStore) -> list[Lesson]:
    """The tokenizer's reconstructions of the same drives, where no videos are at hand."""
    originals = [drive for drive in training.drives if drive.id == original_id(drive.id)]
    digests = recording_digests(originals)
    return [
        (digests[drive.id], Footage(drive=drive, tokenizer=world.tokenizer))
        for drive in originals
        if drive.id in digests
    ]


def _clips(world: WorldModel, sources: Sequence[Source]) -> list[ProbeClip]:
    """The beginnings of drives, as a probe learns from them or is measured on them."""
    drives = [source.drive if isinstance(source, Footage) else source for source in sources]
    counts = _shared([len(drive.actions) for drive in drives], _SECONDS * world.fps)
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
    """The probe and its error on the held-out drives; or none, and why."""
    if not any(each.drive.action_valid.any() for each in footage):
        return None, {}, "no action that the model learned is known of the held-out drives"
    try:
        probe = trained or _learn(world, lessons, steps)
    except TooLittleDataError as error:
        return None, {}, str(error)
    held = _clips(world, _spread(footage))
    return probe, probe.errors(held, curve=CURVE * world.statistics.steering_p95), ""


def _learn(world: WorldModel, lessons: Sequence[Lesson], steps: int) -> InverseDynamics:
    """Train a probe; the model's validation drives choose its weights."""
    names = list(dict.fromkeys(source.drive.id for _, source in lessons))
    chosen = set(world.validation_drives) & set(names) or set(names[-1:])
    if chosen == set(names):
        raise TooLittleDataError(
            "the inverse-dynamics probe takes two or more training drives with actions, one of "
            "which the model was not validated on"
        )
    learned, validation = (
        _spread([each for each in lessons if (each[1].drive.id in chosen) is validates])
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


def _spread(drives: Sequence[T]) -> Sequence[T]:
    """As many drives as a probe is taken from, evenly spread over these."""
    return drives[:: max(1, -(-len(drives) // _DRIVES))]


def _shared(lengths: Sequence[int], frames: float) -> list[int]:
    """Share out so many frames over drives: short ones whole, of the others equally much."""
    left, shares = int(frames), [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for number, place in enumerate(order):
        shares[place] = min(lengths[place], left // (len(order) - number))
        left -= shares[place]
    return shares
