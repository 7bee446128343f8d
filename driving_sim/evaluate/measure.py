"""What `drivesim evaluate tokenizer` and `world-model` do, as functions: drives to a report."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driving_sim.data.drive import DriveSet, SampledDrive, sample
from driving_sim.data.tokens.index import INDEX
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.engine.config import load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import say
from driving_sim.engine.run_folder import CONFIG
from driving_sim.evaluate.actions.lessons import (
    PROBE_FILE,
    fit_probe,
    load_probe,
    reconstructed_lessons,
    recorded_lessons,
)
from driving_sim.evaluate.footage import (
    HeldOutStore,
    check_apart,
    check_tokens_apart,
    footage_of,
    recording_digests,
    sampled_fingerprint,
)
from driving_sim.evaluate.likelihood.held_out_bits import learned_drives
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
from driving_sim.world_model.world_model import WorldModel

TOKENIZER_HEADLINE = (
    KeyFigure("PSNR, dB", "reconstruction.psnr_db"),
    KeyFigure("SSIM", "reconstruction.ssim"),
    KeyFigure("perplexity of the codes", "reconstruction.codebook.perplexity"),
    KeyFigure("flicker", "reconstruction.flicker.flicker"),
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
    found = find_frames(videos)
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
    store = _held_out_store(world, data)
    videos = find_for(world, data, time_offset) if store is None else DriveSet([])
    sampled = _sampled(world, videos, rate)
    recordings = recording_digests(store.drives if store else sampled, world.known_channels)
    check_apart(recordings, training)
    trained, lessons = None, []
    if probe is not None:
        origin = f"that of {probe}"
        trained = load_probe(world, probe, recordings)
    elif training_videos:
        origin = "learned from the training videos"
        shown = find_for(world, training_videos, time_offset).drives
        lessons = recorded_lessons(
            world, training, [sample(drive, **rate) for drive in shown], recordings
        )
    else:
        origin = "learned from reconstructed training tokens"
        lessons = reconstructed_lessons(world, training)
    with tempfile.TemporaryDirectory() as work:
        if store is None:
            tokenize(videos, world.tokenizer, Path(work) / "tokens", **rate)
        heldout = store or HeldOutStore(Path(work) / "tokens", world.known_channels)
        footage = footage_of(heldout.drives, sampled, world.tokenizer)
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
            "true frames": "of the recorded videos"
            if store is None
            else "reconstructions, for the held-out drives are tokens without their videos",
            "inverse-dynamics probe": origin if reader is not None else "none",
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
        _check_store(world, training)
    except DriveSimError as error:
        raise DriveSimError(
            f"{error}, or name the token store that the model was trained on with `training_tokens`"
        ) from error
    learned_drives(world, training)
    config = load_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
    content = training.index.content
    if config.get("store", {}).get("content", content) != content:
        raise DriveSimError(
            f"{path} is not the token store that {run} was trained on: name that one "
            "with `training_tokens`"
        )
    return training


def _check_store(world: WorldModel, store: TokenStore) -> None:
    """Raise DriveSimError where the model cannot judge a store's tokens.

    A line says where their number format is another than the model's.
    """
    world.check_store(store)
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


def _held_out_store(world: WorldModel, data: Sequence[Path]) -> HeldOutStore | None:
    """Open the token store of held-out drives, where `data` is one and not videos."""
    stores = [path for path in data if (path / INDEX).exists()]
    if not stores:
        return None
    if len(data) > 1:
        raise DriveSimError(f"{stores[0]} is a token store: name it alone, or videos")
    store = HeldOutStore(stores[0], world.known_channels)
    _check_store(world, store)
    store.verify()
    return store


def _sampled(world: WorldModel, videos: DriveSet, rate: dict[str, Any]) -> list[SampledDrive]:
    """Choose the frames of held-out videos; DriveSimError where the rate is not the model's."""
    sampled = [sample(drive, **rate) for drive in videos.drives]
    for each in sampled:
        if abs(each.fps / world.fps - 1) > RATE_TOLERANCE:
            raise DriveSimError(
                f"{each.drive.id}: {each.fps:.3g} frames/s at this rate, the model was trained on "
                f"{world.fps:.3g}: leave out `fps` and `every`, or use a video of that rate or more"
            )
    return sampled
