"""What `drivesim evaluate` and `drivesim surprise` do, as functions: drives to a report."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.drive import DriveSet, SampledDrive, sample
from driving_sim.data.split import original_id
from driving_sim.data.timing import RATE_TOLERANCE
from driving_sim.data.token_store import TokenStore
from driving_sim.data.token_store_index import INDEX
from driving_sim.engine.config import load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.engine.run_folder import CONFIG
from driving_sim.evaluate.control import evaluate_control
from driving_sim.evaluate.footage import (
    DriveView,
    Footage,
    HeldOutStore,
    check_apart,
    check_tokens_apart,
    recorded_footage,
    recording_digest,
    recording_digests,
    sampled_fingerprint,
)
from driving_sim.evaluate.inverse_dynamics import InverseDynamics, ProbeClip, ProbeSource
from driving_sim.evaluate.likelihood import learned_drives
from driving_sim.evaluate.protocol import Protocol
from driving_sim.evaluate.reconstruction import evaluate_tokenizer
from driving_sim.evaluate.report import KeyFigure, refuse_existing, write_report
from driving_sim.evaluate.surprise import surprise
from driving_sim.evaluate.video_features import I3DFeatures, SeededFeatures, VideoFeatures
from driving_sim.evaluate.world_model import (
    HEADLINE,
    NOT_MEASURED,
    EvaluationConfig,
    Evidence,
    evaluate_world_model,
)
from driving_sim.pipeline import find_for, find_frames, frame_rate
from driving_sim.tokenizer.perceptual import PerceptualLoss, has_vgg16_weights, vgg16_weights
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel

Frames = NDArray[np.uint8]
T = TypeVar("T")

_PROBE_FILE = "probe.safetensors"
_PROBE_SECONDS = 1200.0
"""Footage that a probe learns from, and that its error is measured on, at most."""
_PROBE_DRIVES = 100
"""Drives that it is taken from, at most, spread over all."""
_PROBE_RATE_TOLERANCE = 0.02
"""How far a probe's frame rate may be off the model's: it reads motion from frame to frame."""
_CHUNK = 64  # frames decoded at once
TOKENIZER_HEADLINE = (
    KeyFigure(label="PSNR, dB", metric="reconstruction.psnr_db"),
    KeyFigure(label="SSIM", metric="reconstruction.ssim"),
    KeyFigure(label="perplexity of the codes", metric="reconstruction.codebook.perplexity"),
    KeyFigure(label="flicker", metric="reconstruction.flicker.flicker"),
)
"""What stands at the head of a tokenizer's report."""


def measure_tokenizer(
    run: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a tokenizer's reconstructions of videos; the report goes into the folder `out`.

    Returns the key figures by their labels.
    """
    began = time.perf_counter()
    tokenizer = Tokenizer.from_run(run, device)
    refuse_existing(out)
    rate = frame_rate(fps, every)
    found = find_frames(videos, skip_bad=None)
    sampled = [sample(drive, **rate) for drive in found.drives]
    perceptual = _perceptual()
    section = evaluate_tokenizer(tokenizer, sampled, perceptual=perceptual)
    protocol = Protocol.of(
        "tokenizer",
        {
            "drives": {each.drive.id: sampled_fingerprint(each) for each in sampled},
            "size": [tokenizer.height, tokenizer.width],
            "rate": rate,
            "frames": {each.drive.id: len(each.indices) for each in sampled},
            "lpips": perceptual is not None,
        },
    )
    return write_report(
        out,
        title="Tokenizer evaluation",
        description={"tokenizer": str(run), "drives": ", ".join(d.id for d in found.drives)},
        sections=[section],
        protocol=protocol,
        model={"path": str(run), "fingerprint": tokenizer.fingerprint},
        seconds=time.perf_counter() - began,
        headline=TOKENIZER_HEADLINE,
    )


def measure_world_model(
    run: Path,
    data: Sequence[Path],
    out: Path,
    *,
    training_tokens: Path,
    training_videos: Sequence[Path] = (),
    config: EvaluationConfig,
    fps: float | None = None,
    every: int | None = None,
    time_offset: float = 0.0,
    i3d: Path | None = None,
    probe: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Evaluate a world model on held-out `data`, videos or one token store; the report is `out`.

    `training_videos` are real footage for the inverse-dynamics probe, which `probe` (a report or
    the file in it) replaces by a trained one; without either it learns from the reconstructions in
    `training_tokens`. Returns the key figures by their labels, and what could not be measured.

    Raises DriveSimError, before anything is tokenized or trained, for drives that the model or the
    probe learned from, for tokens that the model was not trained on, and for a probe of another
    frame rate or kind of steering.
    """
    began = time.perf_counter()
    world = WorldModel.from_run(run, device, precision)
    refuse_existing(out)
    extractor: VideoFeatures = SeededFeatures() if i3d is None else I3DFeatures(i3d)
    training = TokenStore(training_tokens)
    _check_training(run, world, training)
    rate = _rate(world, training, fps, every)
    named = _named(world, data, rate, time_offset)
    recordings = named.digests(world)
    check_apart(recordings, training)
    trained, lessons = None, []
    if probe is not None:
        trained = _trained_probe(world, probe, recordings)
    elif training_videos:
        lessons = _recorded_lessons(world, training, training_videos, recordings, rate, time_offset)
    else:
        lessons = _reconstructed_lessons(world, training)
    with tempfile.TemporaryDirectory() as work:
        heldout, footage = _held_out(world, named, rate, Path(work))
        check_tokens_apart(heldout, training)
        reader, floor, no_probe = _probe(world, footage, trained, lessons, config.probe_steps)
        evidence = Evidence(
            heldout=heldout,
            footage=footage,
            training=training,
            probe=reader,
            no_probe=no_probe,
            probe_floor=floor,
            extractor=extractor,
            perceptual=_perceptual(),
        )
        sections, protocol = evaluate_world_model(world, evidence, config)
    figures = write_report(
        out,
        title="World model evaluation",
        description={
            "world model": str(run),
            "held-out drives": ", ".join(heldout.drive_ids),
            "true frames": named.described,
            "inverse-dynamics probe": _probe_origin(reader, probe, training_videos),
            "device": f"{world.device}, {str(world.dtype).removeprefix('torch.')}",
        },
        sections=sections,
        protocol=protocol,
        model={
            "path": str(run),
            "fingerprint": world.fingerprint,
            "tokenizer_fingerprint": world.tokenizer.fingerprint,
        },
        seconds=time.perf_counter() - began,
        headline=HEADLINE,
        attachments={_PROBE_FILE: reader.to_bytes()} if reader is not None else {},
    )
    left_out = [name for each in sections if each.name == NOT_MEASURED for name in each.metrics]
    return figures | ({"not measured (see the report)": ", ".join(left_out)} if left_out else {})


def _perceptual() -> PerceptualLoss | None:
    """LPIPS where its backbone's weights are at hand; nothing is downloaded for a report."""
    return PerceptualLoss(vgg16_weights()) if has_vgg16_weights() else None


def _check_training(run: Path, world: WorldModel, training: TokenStore) -> None:
    """Raise DriveSimError unless the model was trained on these tokens, as far as its run says."""
    world.check_store(training)
    learned_drives(world, training)
    config = load_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
    saved = config.get("store", {})
    index = training.index
    for name, found in {"content": index.content, "plan": index.plan}.items():
        if saved.get(name, found) != found:
            raise DriveSimError(
                f"{training.path} is not the token store that {run} was trained on: name that one "
                "with --training-tokens"
            )


def _rate(
    world: WorldModel, training: TokenStore, fps: float | None, every: int | None
) -> dict[str, Any]:
    """How frames are chosen: as asked, or else as in the training tokens."""
    if fps is not None or every is not None:
        return frame_rate(fps, every)
    # The rate that was asked for then; the model's own is what came of it, a hair's breadth off.
    asked = training.info.requested_fps
    return {
        "fps": asked if asked and _is_near(asked, world.fps, 0.01) else world.fps,
        "every": None,
    }


def _is_near(rate: float, other: float, tolerance: float) -> bool:
    return abs(rate / other - 1) <= tolerance


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Named:
    """The held-out drives as the user named them: videos, or a token store."""

    store: HeldOutStore | None
    videos: DriveSet
    sampled: Sequence[SampledDrive]
    """The videos' frames and actions."""

    @property
    def described(self) -> str:
        """What the true frames are."""
        if self.store is None:
            return "of the recorded videos"
        return "reconstructions, for the held-out drives are tokens without their videos"

    def digests(self, world: WorldModel) -> dict[str, str]:
        """Digests of the recordings by their ids."""
        if self.store is not None:
            return recording_digests(self.store.drives)
        found = {each.drive.id: _digest(world, each) for each in self.sampled}
        return {name: own for name, own in found.items() if own is not None}


def _digest(world: WorldModel, sampled: SampledDrive) -> str | None:
    known = sampled.action_valid & np.array(world.known_channels)
    return recording_digest(sampled.timestamps, sampled.actions, known)


def _named(
    world: WorldModel, data: Sequence[Path], rate: dict[str, Any], time_offset: float
) -> _Named:
    """Find the held-out drives; raise DriveSimError where they do not fit the model."""
    stores = [path for path in data if (path / INDEX).exists()]
    if stores:
        if len(data) > 1:
            raise DriveSimError(f"{stores[0]} is a token store: name it alone, or videos")
        store = HeldOutStore(stores[0], world.known_channels)
        world.check_store(store)
        store.verify()
        return _Named(store=store, videos=DriveSet([]), sampled=())
    found = find_for(world, data, time_offset)
    sampled = [sample(drive, **rate) for drive in found.drives]
    for each in sampled:
        if not _is_near(each.fps, world.fps, RATE_TOLERANCE):
            raise DriveSimError(
                f"{each.drive.id}: {each.fps:.3g} frames/s at this rate, the model was trained on "
                f"{world.fps:.3g}: leave out --fps and --every, or use a video of that rate or more"
            )
    return _Named(store=None, videos=found, sampled=sampled)


def _held_out(
    world: WorldModel, named: _Named, rate: dict[str, Any], work: Path
) -> tuple[HeldOutStore, list[Footage]]:
    """The held-out drives' tokens, and their frames: those of the videos, if they are videos."""
    if named.store is not None:
        drives = named.store.drives
        return named.store, [Footage(drive=drive, tokenizer=world.tokenizer) for drive in drives]
    tokenize(named.videos, world.tokenizer, work / "tokens", **rate)
    store = HeldOutStore(work / "tokens", world.known_channels)
    return store, recorded_footage(store.drives, named.sampled, world.tokenizer)


@dataclass(frozen=True, slots=True, eq=False)
class _Lesson:
    """A training drive that a probe can learn from."""

    id: str
    digest: str
    """Of the recording."""
    frames: int
    clip: Callable[[int], ProbeClip]
    """Reads so many frames from the drive's beginning."""


def _trained_probe(world: WorldModel, path: Path, recordings: Mapping[str, str]) -> InverseDynamics:
    """Load a probe; raise DriveSimError where it cannot judge this model on these recordings."""
    probe = InverseDynamics.load(path / _PROBE_FILE if path.is_dir() else path)
    source = probe.source
    if not _is_near(source.fps, world.fps, _PROBE_RATE_TOLERANCE):
        raise DriveSimError(
            f"--probe {path}: it learned from {source.fps:.3g} frames/s, the model from "
            f"{world.fps:.3g}: name a probe of that rate, or none"
        )
    if world.steering_kind is not None and source.steering_kind != world.steering_kind:
        raise DriveSimError(
            f"--probe {path}: its steering is {source.steering_kind}, the model's is "
            f"{world.steering_kind}: name a probe of that kind, or none"
        )
    for name, own in recordings.items():
        if own in source.drives:
            raise DriveSimError(
                f"--probe {path}: it learned from the held-out drive {name!r}: name another probe, "
                "or none"
            )
    return probe


def _probe_origin(
    probe: InverseDynamics | None, trained: Path | None, videos: Sequence[Path]
) -> str:
    if probe is None:
        return "none"
    if trained is not None:
        return f"that of {trained}"
    return f"learned from {'the training videos' if videos else 'reconstructed training tokens'}"


def _recorded_lessons(
    world: WorldModel,
    training: TokenStore,
    videos: Sequence[Path],
    recordings: Mapping[str, str],
    rate: dict[str, Any],
    time_offset: float,
) -> list[_Lesson]:
    """Real footage of the drives that are in the model's training tokens, and not held out."""
    trained = {original_id(name) for name in training.drive_ids}
    lessons = []
    for drive in find_for(world, videos, time_offset).drives:
        sampled = sample(drive, **rate)
        own = _digest(world, sampled)
        if drive.id in trained and own is not None and own not in recordings.values():
            clip = partial(_recorded_clip, world, sampled)
            lessons.append(_Lesson(drive.id, own, len(sampled.indices), clip))
    if not lessons:
        raise DriveSimError(
            f"none of --training-videos is a drive of {training.path} that has actions and is not "
            "held out: name the videos as they were named to `drivesim tokenize`"
        )
    return lessons


def _reconstructed_lessons(world: WorldModel, training: TokenStore) -> list[_Lesson]:
    originals = [drive for drive in training.drives if drive.id == original_id(drive.id)]
    digests = recording_digests(originals)
    return [
        _Lesson(drive.id, digests[drive.id], len(drive), partial(_stored_clip, footage))
        for drive in originals
        if drive.id in digests
        for footage in [Footage(drive=drive, tokenizer=world.tokenizer)]
    ]


def _recorded_clip(world: WorldModel, sampled: SampledDrive, frames: int) -> ProbeClip:
    """The first frames of a video."""
    chosen = replace(sampled, indices=sampled.indices[:frames])
    return _clip(
        chosen.batches(world.tokenizer.frame_size, _CHUNK),
        sampled.actions[:frames],
        sampled.action_valid[:frames] & np.array(world.known_channels),
        sampled.segments,
    )


def _stored_clip(footage: Footage, frames: int) -> ProbeClip:
    """The first true frames of a drive of a token store."""
    drive = DriveView(footage.drive, frames=frames)
    return _clip(footage.beginning(frames), drive.actions, drive.action_valid, drive.entry.segments)


def _clip(
    batches: Iterable[Frames],
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
    segments: Sequence[tuple[int, int]],
) -> ProbeClip:
    """What a probe learns from or is measured on; of the segments, what lies within it."""
    count = len(actions)
    return ProbeClip(
        frames=np.concatenate(list(batches)),
        actions=np.asarray(actions),
        action_valid=np.asarray(valid),
        segments=[(begin, min(stop, count)) for begin, stop in segments if begin < count],
    )


def _probe(
    world: WorldModel,
    footage: Sequence[Footage],
    trained: InverseDynamics | None,
    lessons: Sequence[_Lesson],
    steps: int,
) -> tuple[InverseDynamics | None, dict[str, Any], str]:
    """The probe and its error on the held-out drives; or none, and why."""
    if not any(each.drive.action_valid.any() for each in footage):
        return None, {}, "no action that the model learned is known of the held-out drives"
    try:
        probe = trained or _learn(world, lessons, steps)
    except DriveSimError as error:
        return None, {}, str(error)
    footage = _spread(footage)
    counts = _shared([len(each.drive) for each in footage], _PROBE_SECONDS * world.fps)
    held = [_stored_clip(each, count) for each, count in zip(footage, counts, strict=True)]
    return probe, probe.errors(held, curve=world.steering_p95 / 2), ""


def _learn(world: WorldModel, lessons: Sequence[_Lesson], steps: int) -> InverseDynamics:
    """Train a probe; the model's validation drives choose its weights."""
    names = list(dict.fromkeys(each.id for each in lessons))
    chosen = set(world.validation_drives) & set(names) or set(names[-1:])
    if chosen == set(names):
        raise DriveSimError(
            "the inverse-dynamics probe takes two or more training drives with actions, one of "
            "which the model was not validated on"
        )
    learned = _spread([each for each in lessons if each.id not in chosen])
    validation = _spread([each for each in lessons if each.id in chosen])
    taken = [*learned, *validation]
    counts = _shared([each.frames for each in taken], _PROBE_SECONDS * world.fps)
    clips = [each.clip(count) for each, count in zip(taken, counts, strict=True)]
    with progress(steps, "inverse-dynamics probe", "steps") as bar:
        return InverseDynamics.fit(
            clips[: len(learned)],
            clips[len(learned) :],
            source=ProbeSource(
                fps=world.fps,
                steering_kind=world.steering_kind,
                drives=tuple(each.digest for each in taken),
            ),
            steps=steps,
            advance=bar.advance,
        )


def _spread(drives: Sequence[T]) -> Sequence[T]:
    """As many drives as a probe is taken from, evenly spread over these."""
    return drives[:: max(1, -(-len(drives) // _PROBE_DRIVES))]


def _shared(lengths: Sequence[int], frames: float) -> list[int]:
    """Share out so many frames over drives: short ones whole, of the others equally much."""
    left, shares = int(frames), [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for number, place in enumerate(order):
        shares[place] = min(lengths[place], left // (len(order) - number))
        left -= shares[place]
    return shares


def measure_control(
    run: Path,
    videos: Sequence[Path],
    *,
    starts: int = 10,
    seconds: float = 2.0,
    sampling: Sampling,
    time_offset: float = 0.0,
    sheet: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate whether a world model turns the way it is steered, from starts in videos."""
    world = WorldModel.from_run(run, device)
    found = find_for(world, videos, time_offset)
    return evaluate_control(
        world, found.drives, starts=starts, seconds=seconds, sampling=sampling, sheet=sheet
    )


def measure_surprise(
    run: Path, videos: Sequence[Path], out: Path, *, time_offset: float = 0.0, device: str = "auto"
) -> dict[str, Any]:
    """Draw what a world model did not expect in videos; returns what the JSON in `out` holds."""
    world = WorldModel.from_run(run, device)
    return surprise(world, find_for(world, videos, time_offset).drives, out)
