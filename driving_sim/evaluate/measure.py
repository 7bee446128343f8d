"""What `drivesim evaluate` and `drivesim surprise` do, as functions: drives to a report."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driving_sim.data.drive import DriveSet, SampledDrive, sample
from driving_sim.data.tokens.index import INDEX
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.engine.config import load_yaml
from driving_sim.engine.device import name_of
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say
from driving_sim.engine.run_folder import CONFIG
from driving_sim.evaluate.actions.control import evaluate_control
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics
from driving_sim.evaluate.actions.lessons import (
    PROBE_FILE,
    fit_probe,
    learned_digest,
    load_probe,
    reconstructed_lessons,
    recorded_lessons,
)
from driving_sim.evaluate.footage import (
    Footage,
    HeldOutStore,
    check_apart,
    check_tokens_apart,
    recorded_footage,
    recording_digests,
    sampled_fingerprint,
)
from driving_sim.evaluate.likelihood.bits import learned_drives
from driving_sim.evaluate.likelihood.surprise import surprise
from driving_sim.evaluate.pictures.features import I3DFeatures, SeededFeatures, VideoFeatures
from driving_sim.evaluate.pictures.reconstruction import evaluate_tokenizer
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.report import KeyFigure, refuse_existing, write_report
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
from driving_sim.world_model.sampling.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel

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
    precision: str = "auto",
) -> dict[str, Any]:
    """Evaluate a tokenizer's reconstructions of videos; the report goes into the folder `out`.

    Returns the key figures by their labels.
    """
    began = time.perf_counter()
    tokenizer = Tokenizer.from_run(run, device, precision)
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
        model={
            "path": str(run),
            "fingerprint": tokenizer.fingerprint,
            "precision": name_of(tokenizer.dtype),
        },
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
    training = _training_store(run, world, training_tokens)
    rate = _rate(world, training, fps, every)
    named = _named(world, data, rate, time_offset)
    recordings = named.digests(world)
    check_apart(recordings, training)
    trained, lessons = None, []
    if probe is not None:
        trained = load_probe(world, probe, recordings)
    elif training_videos:
        videos = find_for(world, training_videos, time_offset).drives
        sampled = [sample(drive, **rate) for drive in videos]
        lessons = recorded_lessons(world, training, sampled, recordings)
    else:
        lessons = reconstructed_lessons(world, training)
    with tempfile.TemporaryDirectory() as work:
        heldout, footage = _held_out(world, named, rate, Path(work))
        check_tokens_apart(heldout, training)
        reader, floor, no_probe = fit_probe(world, footage, trained, lessons, config.probe_steps)
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
            "device": f"{world.device}, {name_of(world.dtype)}",
            "number format of the tokens": f"held-out {heldout.info.precision}, "
            f"training {training.info.precision}",
        },
        sections=sections,
        protocol=protocol,
        model={
            "path": str(run),
            "fingerprint": world.fingerprint,
            "tokenizer_fingerprint": world.tokenizer.fingerprint,
            "precision": name_of(world.dtype),
            "tokenizer_precision": name_of(world.tokenizer.dtype),
        },
        seconds=time.perf_counter() - began,
        headline=HEADLINE,
        attachments={PROBE_FILE: reader.to_bytes()} if reader is not None else {},
    )
    left_out = [name for each in sections if each.name == NOT_MEASURED for name in each.metrics]
    return figures | ({"not measured (see the report)": ", ".join(left_out)} if left_out else {})


def _perceptual() -> PerceptualLoss | None:
    """LPIPS where its backbone's weights are at hand; nothing is downloaded for a report."""
    return PerceptualLoss(vgg16_weights()) if has_vgg16_weights() else None


def _training_store(run: Path, world: WorldModel, path: Path) -> TokenStore:
    """Open a token store that the model was trained on, as far as its run says.

    Raises DriveSimError, naming the option, where it was not.
    """
    try:
        training = TokenStore(path)
        world.check_store(training)
    except DriveSimError as error:
        raise DriveSimError(
            f"{error}, or name the token store that the model was trained on with --training-tokens"
        ) from error
    _say_format(world, training)
    learned_drives(world, training)
    config = load_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
    content = training.index.content
    if config.get("store", {}).get("content", content) != content:
        raise DriveSimError(
            f"{path} is not the token store that {run} was trained on: name that one "
            "with --training-tokens"
        )
    return training


def _say_format(world: WorldModel, store: TokenStore) -> None:
    if line := world.format_notice(store):
        say(line)


def _rate(
    world: WorldModel, training: TokenStore, fps: float | None, every: int | None
) -> dict[str, Any]:
    """How frames are chosen: as asked, or else as in the training tokens."""
    if fps is not None or every is not None:
        return frame_rate(fps, every)
    # The rate that was asked for then; the model's own is what came of it, a hair's breadth off.
    asked = training.info.requested_fps
    return {
        "fps": asked if asked and abs(asked / world.fps - 1) <= 0.01 else world.fps,
        "every": None,
    }


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
        found = {each.drive.id: learned_digest(world, each) for each in self.sampled}
        return {name: own for name, own in found.items() if own is not None}


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
        _say_format(world, store)
        store.verify()
        return _Named(store=store, videos=DriveSet([]), sampled=())
    found = find_for(world, data, time_offset)
    sampled = [sample(drive, **rate) for drive in found.drives]
    for each in sampled:
        if abs(each.fps / world.fps - 1) > RATE_TOLERANCE:
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


def _probe_origin(
    probe: InverseDynamics | None, trained: Path | None, videos: Sequence[Path]
) -> str:
    if probe is None:
        return "none"
    if trained is not None:
        return f"that of {trained}"
    return f"learned from {'the training videos' if videos else 'reconstructed training tokens'}"


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
    precision: str = "auto",
) -> dict[str, Any]:
    """Evaluate whether a world model turns the way it is steered, from starts in videos."""
    world = WorldModel.from_run(run, device, precision)
    found = find_for(world, videos, time_offset)
    return evaluate_control(
        world, found.drives, starts=starts, seconds=seconds, sampling=sampling, sheet=sheet
    )


def measure_surprise(
    run: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    time_offset: float = 0.0,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Draw what a world model did not expect in videos; returns what the JSON in `out` holds."""
    world = WorldModel.from_run(run, device, precision)
    return surprise(world, find_for(world, videos, time_offset).drives, out)
