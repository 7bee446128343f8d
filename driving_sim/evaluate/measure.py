"""Measure a tokenizer or a world model on held-out drives and write a report.

These functions do the work of `drivesim evaluate tokenizer` and `drivesim evaluate world-model`.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.drive import DriveSet, SampledDrive, sample
from driving_sim.data.tokens.index import INDEX
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.engine.config import load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import say
from driving_sim.engine.run_folder import CONFIG, find_run
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
    NO_TRAINING,
    NOT_MEASURED,
    EvaluationConfig,
    Evidence,
    evaluate_world_model,
)
from driving_sim.pipeline import find_frames, frame_rate
from driving_sim.tokenizer.perceptual import PerceptualLoss, has_vgg16_weights, vgg16_weights
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.contexts import find_for
from driving_sim.world_model.world_model import WorldModel

TOKENIZER_HEADLINE = (
    KeyFigure("PSNR, dB", "reconstruction.psnr_db"),
    KeyFigure("SSIM", "reconstruction.ssim"),
    KeyFigure("perplexity of the codes", "reconstruction.codebook.perplexity"),
    KeyFigure("flicker", "reconstruction.flicker.flicker"),
)
"""Key figures at the top of a tokenizer's report."""


def measure_tokenizer(
    run: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    reading: Reading = AS_NAMED,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Measure how well a tokenizer reconstructs videos, and write a report to the folder `out`.

    Returns the key figures as text, by their labels.
    """
    began = time.perf_counter()
    tokenizer = Tokenizer.from_run(run, device, precision)
    refuse_existing(out)
    rate = frame_rate(fps, every)
    drives = find_frames(videos, reading).drives
    sampled = [sample(drive, **rate) for drive in drives]
    perceptual = _perceptual()
    section = evaluate_tokenizer(tokenizer, sampled, perceptual=perceptual)
    protocol = Protocol.of(
        "tokenizer",
        {
            "drives": {video.drive.id: sampled_fingerprint(video) for video in sampled},
            "size": [tokenizer.height, tokenizer.width],
            "rate": rate,
            "frames": {video.drive.id: len(video.indices) for video in sampled},
            "lpips": perceptual is not None,
        },
    )
    return write_report(
        out,
        title="Tokenizer evaluation",
        description={
            "tokenizer": str(run),
            "drives": ", ".join(drive.id for drive in drives),
            "key figures": "more is better, except for flicker",
        },
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
    training_tokens: Path | None = None,
    usual_tokens: Path | None = None,
    training_videos: Sequence[Path] = (),
    config: EvaluationConfig,
    fps: float | None = None,
    every: int | None = None,
    reading: Reading = AS_NAMED,
    i3d: Path | None = None,
    probe: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Measure a world model on held-out drives, and write a report to the folder `out`.

    `data` names videos or one token store. `training_tokens` is the store that the model was
    trained on. Without it, `usual_tokens` is used if it is that store. Otherwise the baselines and
    the check that no held-out drive was trained on are left out.

    `probe` names an earlier report, or the file of the inverse-dynamics probe in it. Without
    `probe`, a new probe is trained on `training_videos`. If these are missing too, it is trained on
    the frames that the tokenizer decodes from the training tokens. Returns the key figures as text,
    by their labels, and a line that names what could not be measured.

    Raises DriveSimError if the model or the probe was trained on a held-out drive, if the model was
    not trained on `training_tokens`, or if the probe's frame rate or kind of steering is not the
    model's. Almost all checks run before any tokenizing or training. Only a held-out drive without
    actions is checked later, because its tokens are compared with the training tokens.
    """
    began = time.perf_counter()
    world = WorldModel.from_run(run, device, precision)
    refuse_existing(out)
    extractor: VideoFeatures = SeededFeatures() if i3d is None else I3DFeatures(i3d)
    training = _training_store(run, world, training_tokens, usual_tokens)
    if training is None:
        _say_left_out(needs_probe=not (probe or training_videos))
    rate = _rate(world, training, fps, every)
    store = _held_out_store(world, data)
    videos = find_for(world, data, reading) if store is None else DriveSet([])
    sampled = _sampled(world, videos, rate)
    recordings = recording_digests(store.drives if store else sampled, world.known_channels)
    if training is not None:
        check_apart(recordings, training)
    trained, lessons = None, []
    if probe is not None:
        origin = f"taken from {probe}"
        trained = load_probe(world, probe, recordings)
    elif training_videos:
        origin = "trained on the training videos"
        training_drives = find_for(world, training_videos, reading).drives
        lessons = recorded_lessons(
            world, training, [sample(drive, **rate) for drive in training_drives], recordings
        )
    elif training is not None:
        origin = "trained on frames decoded from the training tokens"
        lessons = reconstructed_lessons(world, training)
    with tempfile.TemporaryDirectory() as work:
        if store is None:
            tokenize(videos, world.tokenizer, Path(work) / "tokens", **rate)
        heldout = store or HeldOutStore(Path(work) / "tokens", world.known_channels)
        footage = footage_of(heldout.drives, sampled, world.tokenizer)
        if training is not None:
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
            "true frames": "recorded videos"
            if store is None
            else "decoded by the tokenizer, because the held-out drives are tokens without videos",
            "inverse-dynamics probe": origin if reader is not None else "none",
            "device": f"{world.device}, {name_of(world.dtype)}",
            "number format of the tokens": f"held-out {heldout.info.precision}, "
            f"training {training.info.precision if training is not None else 'not at hand'}",
            "key figures": "fewer bits per token and fewer freezes are better, and gains are best "
            "at 1; of the others, more is better",
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
    left_out = [
        name for section in sections if section.name == NOT_MEASURED for name in section.metrics
    ]
    return figures | ({"not measured (see the report)": ", ".join(left_out)} if left_out else {})


def _perceptual() -> PerceptualLoss | None:
    """Return LPIPS if the weights of its backbone are on this machine, otherwise None.

    An evaluation never downloads them.
    """
    return PerceptualLoss(vgg16_weights()) if has_vgg16_weights() else None


def _say_left_out(*, needs_probe: bool) -> None:
    """Print what is left out because the training tokens are not at hand."""
    probe = ", and without `training_videos` or `probe`, action fidelity and the sweep"
    say(
        f"{NO_TRAINING} (`training_tokens`): left out are the baselines and the check that no "
        f"held-out drive was trained on{probe if needs_probe else ''}"
    )


def _training_store(
    run: Path, world: WorldModel, path: Path | None, usual: Path | None
) -> TokenStore | None:
    """Open the token store that the model was trained on.

    Raises DriveSimError if `path` is not that store. If the run folder has no config file, as that
    of a packaged model, accept any `path` with the model's tokenizer, steering kind and frame rate.
    If `path` is None, return the `usual` store, or None if it does not exist or if the run's config
    does not name it.
    """
    run_config = find_run(run) / CONFIG
    config = load_yaml(run_config) if run_config.is_file() else {}
    if path is None:
        if usual is None or not (usual / INDEX).exists() or not config:
            return None
        try:
            return _training_store(run, world, usual, None)
        except DriveSimError as error:
            say(f"{usual} is not used: {error}")
            return None
    try:
        training = TokenStore(path)
        _check_store(world, training)
    except DriveSimError as error:
        raise DriveSimError(
            f"{error}, or use `training_tokens` to name the store that the model was trained on"
        ) from error
    learned_drives(world, training)
    content = training.index.content
    if config.get("store", {}).get("content", content) != content:
        raise DriveSimError(
            f"{path}: not the token store that {run} was trained on; use `training_tokens` to name "
            "that store"
        )
    return training


def _check_store(world: WorldModel, store: TokenStore) -> None:
    """Raise DriveSimError if the model cannot be measured on a store's tokens.

    Print a line if the number format of the tokens, such as bf16, is not the model's.
    """
    world.check_store(store)
    if line := world.format_notice(store):
        say(line)


def _rate(
    world: WorldModel, training: TokenStore | None, fps: float | None, every: int | None
) -> dict[str, Any]:
    """Return the frame rate or stride that the user requested, or the training tokens' rate."""
    if fps is not None or every is not None:
        return frame_rate(fps, every)
    # Prefer the rate that the user requested for the training tokens. The model's own rate is the
    # rate after resampling, which may differ slightly from the requested one.
    asked = training.info.requested_fps if training is not None else None
    return {
        "fps": asked if asked and abs(asked / world.fps - 1) <= 0.01 else world.fps,
        "every": None,
    }


def _held_out_store(world: WorldModel, data: Sequence[Path]) -> HeldOutStore | None:
    """Open `data` as a token store of held-out drives, or return None if it names videos."""
    stores = [path for path in data if (path / INDEX).exists()]
    if not stores:
        return None
    if len(data) > 1:
        raise DriveSimError(
            f"{stores[0]}: a token store cannot be evaluated together with other drives; name only "
            "this store, or only videos"
        )
    store = HeldOutStore(stores[0], world.known_channels)
    _check_store(world, store)
    store.verify()
    return store


def _sampled(world: WorldModel, videos: DriveSet, rate: dict[str, Any]) -> list[SampledDrive]:
    """Choose the frames of the held-out videos.

    Raises DriveSimError if their frame rate is not the model's.
    """
    sampled = [sample(drive, **rate) for drive in videos.drives]
    for video in sampled:
        if abs(video.fps / world.fps - 1) > RATE_TOLERANCE:
            raise DriveSimError(
                f"{video.drive.id}: sampled at {video.fps:.3g} frames/s, but the model was trained "
                f"at {world.fps:.3g}; leave out `fps` and `every`, and use a video with at least "
                "the model's rate"
            )
    return sampled
