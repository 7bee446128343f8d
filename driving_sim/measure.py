"""What `drivesim evaluate` and `drivesim surprise` do, as functions: drives to a report."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from driving_sim.data.drive import Drive, sample
from driving_sim.data.split import original_id
from driving_sim.data.token_store import TokenStore
from driving_sim.data.token_store_index import INDEX
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.control import evaluate_control
from driving_sim.evaluate.footage import Footage, recorded_footage, sampled_fingerprint
from driving_sim.evaluate.inverse_dynamics import InverseDynamics, ProbeClip
from driving_sim.evaluate.protocol import Protocol
from driving_sim.evaluate.reconstruction import evaluate_tokenizer
from driving_sim.evaluate.report import KeyFigure, refuse_existing, write_report
from driving_sim.evaluate.surprise import surprise
from driving_sim.evaluate.video_features import I3DFeatures, SeededFeatures, VideoFeatures
from driving_sim.evaluate.world_model import (
    HEADLINE,
    EvaluationConfig,
    Evidence,
    evaluate_world_model,
)
from driving_sim.pipeline import find_for, find_frames, frame_rate
from driving_sim.tokenizer.perceptual import PerceptualLoss, has_vgg16_weights, vgg16_weights
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.rollout import sample_for
from driving_sim.world_model.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel

_PROBE_FILE = "probe.safetensors"
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
    `training_tokens`. Returns the key figures by their labels.
    """
    began = time.perf_counter()
    world = WorldModel.from_run(run, device, precision)
    refuse_existing(out)
    extractor: VideoFeatures = SeededFeatures() if i3d is None else I3DFeatures(i3d)
    training = TokenStore(training_tokens)
    world.check_store(training)
    with tempfile.TemporaryDirectory() as work:
        heldout, footage = _held_out(world, data, Path(work), fps, every, time_offset)
        world.check_store(heldout)
        reader, floor = _probe(world, footage, training, training_videos, probe, config.probe_steps)
        evidence = Evidence(
            heldout=heldout,
            footage=footage,
            training=training,
            probe=reader,
            probe_floor=floor,
            extractor=extractor,
            perceptual=_perceptual(),
        )
        sections, protocol = evaluate_world_model(world, evidence, config)
    return write_report(
        out,
        title="World model evaluation",
        description={
            "world model": str(run),
            "held-out drives": ", ".join(heldout.drive_ids),
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


def _perceptual() -> PerceptualLoss | None:
    """LPIPS where its backbone's weights are at hand; nothing is downloaded for a report."""
    return PerceptualLoss(vgg16_weights()) if has_vgg16_weights() else None


def _held_out(
    world: WorldModel,
    data: Sequence[Path],
    work: Path,
    fps: float | None,
    every: int | None,
    time_offset: float,
) -> tuple[TokenStore, list[Footage]]:
    """The held-out drives' tokens, and their frames: those of the videos, if they are videos."""
    stores = [path for path in data if (path / INDEX).exists()]
    if stores:
        if len(data) > 1:
            raise DriveSimError(f"{stores[0]} is a token store: name it alone, or videos")
        store = TokenStore(stores[0])
        store.verify()
        footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
        return store, footage
    found = find_for(world, data, time_offset)
    rate = frame_rate(fps, every) if fps or every else {"fps": world.fps, "every": None}
    tokenize(found, world.tokenizer, work / "tokens", **rate)
    store = TokenStore(work / "tokens")
    sampled = [sample(drive, **rate) for drive in found.drives]
    return store, recorded_footage(store.drives, sampled, world.tokenizer)


def _probe(
    world: WorldModel,
    footage: Sequence[Footage],
    training: TokenStore,
    videos: Sequence[Path],
    trained: Path | None,
    steps: int,
) -> tuple[InverseDynamics | None, dict[str, Any]]:
    """The probe, and its error on the held-out drives; none where no actions are known."""
    if not any(world.known_channels) or not any(f.drive.action_valid.any() for f in footage):
        return None, {}
    held = [_probe_clip(each) for each in footage]
    if trained is not None:
        file = trained / _PROBE_FILE if trained.is_dir() else trained
        probe = InverseDynamics.load(file)
        return probe, probe.errors(held)
    if videos:
        learned, validation = _real_clips(world, footage, training, videos)
    else:
        learned, validation = _reconstructed_clips(world, training)
    with progress(steps, "inverse-dynamics probe", "steps") as bar:
        probe = InverseDynamics.fit(learned, validation, steps=steps, advance=bar.advance)
    return probe, probe.errors(held)


def _probe_clip(footage: Footage) -> ProbeClip:
    """All of a held-out drive's true frames."""
    drive = footage.drive
    return ProbeClip(
        frames=footage.frames(0, len(drive)),
        actions=np.asarray(drive.actions),
        action_valid=np.asarray(drive.action_valid),
        segments=drive.entry.segments,
    )


def _real_clips(
    world: WorldModel, footage: Sequence[Footage], training: TokenStore, videos: Sequence[Path]
) -> tuple[list[ProbeClip], list[ProbeClip]]:
    """Real footage of the drives that are in the model's training tokens, and not held out."""
    recorded = [each.recorded.drive.video for each in footage if each.recorded is not None]
    held = {video.path.resolve() for video in recorded if video is not None}
    # By their ids too: held-out tokens do not say which videos they were made of.
    trained = {original_id(name) for name in training.drive_ids}
    drives = [
        drive
        for drive in find_for(world, videos, 0.0).drives
        if drive.id in trained and (drive.video is None or drive.video.path.resolve() not in held)
    ]
    if not drives:
        raise DriveSimError(
            f"none of --training-videos is a drive of {training.path} that is not held out: name "
            "the videos as they were named to `drivesim tokenize`"
        )
    return _split(world, [(drive.id, _real_clip(world, drive)) for drive in drives])


def _real_clip(world: WorldModel, drive: Drive) -> ProbeClip:
    sampled = sample_for(world, drive)
    return ProbeClip(
        frames=np.concatenate(list(sampled.batches(world.tokenizer.frame_size, 64))),
        actions=sampled.actions,
        action_valid=sampled.action_valid,
        segments=sampled.segments,
    )


def _reconstructed_clips(
    world: WorldModel, training: TokenStore
) -> tuple[list[ProbeClip], list[ProbeClip]]:
    drives = [drive for drive in training.drives if drive.id == original_id(drive.id)]
    clips = [
        (drive.id, _probe_clip(Footage(drive=drive, tokenizer=world.tokenizer))) for drive in drives
    ]
    return _split(world, clips)


def _split(
    world: WorldModel, clips: Sequence[tuple[str, ProbeClip]]
) -> tuple[list[ProbeClip], list[ProbeClip]]:
    """What the probe learns from and what chooses its weights: the model's validation drives."""
    chosen = set(world.validation_drives) & {name for name, _ in clips}
    if not chosen and len(clips) > 1:
        chosen = {clips[-1][0]}
    learned = [clip for name, clip in clips if name not in chosen]
    validation = [clip for name, clip in clips if name in chosen]
    if not learned or not validation:
        raise DriveSimError(
            "the inverse-dynamics probe needs at least two training drives: name more with "
            "--training-videos"
        )
    return learned, validation


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
