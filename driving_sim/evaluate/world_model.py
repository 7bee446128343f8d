"""All of a world model's evaluation, section by section, under one frozen protocol."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from driving_sim.data.split import original_id
from driving_sim.data.token_store import DriveTokens, TokenStore
from driving_sim.engine.progress import progress
from driving_sim.evaluate.action_information import evaluate_action_information
from driving_sim.evaluate.entropy_coding import coded_size_check
from driving_sim.evaluate.fidelity import FidelityMeter, measure_fidelity
from driving_sim.evaluate.footage import Clip, Footage, choose_clips, digest
from driving_sim.evaluate.inverse_dynamics import InverseDynamics
from driving_sim.evaluate.likelihood import evaluate_likelihood
from driving_sim.evaluate.long_rollouts import evaluate_stability
from driving_sim.evaluate.protocol import Protocol
from driving_sim.evaluate.quality import QualityMeter
from driving_sim.evaluate.report import KeyFigure
from driving_sim.evaluate.rollouts import BATCH, imagine
from driving_sim.evaluate.section import Section, Table
from driving_sim.evaluate.stability import StabilityConfig
from driving_sim.evaluate.sweep import evaluate_sweep
from driving_sim.evaluate.video_features import VideoFeatures
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.bits import streamed_bits
from driving_sim.world_model.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How much is measured."""

    stride: int = 1
    """Likelihood: every n-th frame with a full window behind it."""
    shuffles: int = 20
    """Shuffles of the actions."""
    coded_frames: int | None = None
    """Frames of the first drive that are compressed and decoded; None: all of them."""
    clips: int = 32
    """Clips rolled out for quality and fidelity, spread over the held-out drives."""
    seconds: float = 3.0
    """Length of their futures."""
    sweeps: int = 3
    """Starts of the sweep of commands."""
    long_rollouts: int = 4
    """Rollouts judged for stability."""
    long_seconds: float = 60.0
    """Their length."""
    real_seconds: float = 150.0
    """Real footage that bounds what is stable, at most."""
    probe_steps: int = 600
    """Training of the inverse-dynamics probe."""
    sampling: Sampling = Sampling()  # noqa: RUF009
    """How tokens are drawn."""
    stability: StabilityConfig = StabilityConfig()  # noqa: RUF009
    """Where a rollout counts as no longer a drive."""

    def __post_init__(self) -> None:
        for name in ("stride", "shuffles", "clips", "sweeps", "long_rollouts", "probe_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


FULL = EvaluationConfig()
"""What is reported."""
QUICK = EvaluationConfig(
    stride=6,
    shuffles=2,
    coded_frames=48,  # of fewer, the header alone is over 1 %
    clips=8,
    sweeps=1,
    long_rollouts=2,
    long_seconds=15.0,
    real_seconds=40.0,
    probe_steps=150,
)
"""A first look."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evidence:
    """What a world model is measured on and with."""

    heldout: TokenStore
    footage: Sequence[Footage]
    """Of the held-out drives, in the store's order."""
    training: TokenStore
    """What the model was trained on, for the baselines and for what real footage looks like."""
    probe: InverseDynamics | None
    """Reads actions off pictures; None where the drives have none."""
    probe_floor: dict[str, Any]
    """The probe's own error on real held-out footage."""
    extractor: VideoFeatures
    perceptual: PerceptualLoss | None


def evaluate_world_model(
    world: WorldModel, evidence: Evidence, config: EvaluationConfig
) -> tuple[list[Section], Protocol]:
    """Measure likelihood, action information, rollout quality, action fidelity and stability."""
    clips = _clips(world, evidence, config)
    sections = [
        evaluate_likelihood(world, evidence.heldout, evidence.training, stride=config.stride),
        _coding(world, evidence.heldout.drives[0], config.coded_frames),
    ]
    has_actions = any(drive.action_valid.any() for drive in evidence.heldout.drives)
    if has_actions:
        sections.append(
            evaluate_action_information(world, evidence.heldout, shuffles=config.shuffles)
        )
    sections += _rollouts(world, evidence, clips, config)
    if evidence.probe is not None and world.steering_p99 > 0:
        chosen = clips[:: max(1, len(clips) // config.sweeps)][: config.sweeps]
        sections.append(evaluate_sweep(world, evidence.probe, chosen, config.sampling))
    starts = _starts(world, evidence, config)
    sections.append(
        evaluate_stability(
            world,
            starts,
            _real(world, evidence, config),
            seconds=config.long_seconds,
            sampling=config.sampling,
            config=config.stability,
        )
    )
    return sections, _protocol(world, evidence, clips, starts, config)


HEADLINE = (
    KeyFigure(
        label="bits per token",
        metric="likelihood.bits_per_token.model",
        beside={
            "copy last": "likelihood.bits_per_token.copy_last",
            "unigram": "likelihood.bits_per_token.unigram",
        },
    ),
    KeyFigure(
        label="steering is worth, bits per frame",
        metric="action_information.gain_over_shuffled_bits_per_frame.steering",
    ),
    KeyFigure(
        label="steering sign accuracy",
        metric="fidelity.steering.model.sign_accuracy",
        beside={
            "recorded": "fidelity.steering.recorded.sign_accuracy",
            "without actions": "fidelity.steering.action_free.sign_accuracy",
        },
    ),
    KeyFigure(
        label="steering, commanded against realised: correlation",
        metric="fidelity.steering.model.correlation",
        beside={"recorded": "fidelity.steering.recorded.correlation"},
    ),
    KeyFigure(
        label="PSNR over the horizon, dB",
        metric="quality.psnr_db.model",
        beside={"floor": "quality.psnr_db.floor", "copy last": "quality.psnr_db.copy_last"},
    ),
    KeyFigure(label="long rollouts last, s", metric="stability.mean_lasted_s"),
)
"""What stands at the head of the report."""


def _clips(world: WorldModel, evidence: Evidence, config: EvaluationConfig) -> list[Clip]:
    return choose_clips(
        evidence.footage,
        context_frames=world.context_frames,
        frames=round(config.seconds * world.fps),
        count=config.clips,
    )


def _starts(world: WorldModel, evidence: Evidence, config: EvaluationConfig) -> list[Clip]:
    return choose_clips(
        evidence.footage,
        context_frames=world.context_frames,
        frames=1,
        count=config.long_rollouts,
    )


def _real(world: WorldModel, evidence: Evidence, config: EvaluationConfig) -> list[DriveTokens]:
    """The held-out drives and as many of the training ones as fit; no mirror images."""
    drives = [*evidence.heldout.drives, *evidence.training.drives]
    chosen: list[DriveTokens] = []
    frames = config.real_seconds * world.fps
    for drive in drives:
        if drive.id == original_id(drive.id) and (not chosen or len(drive) <= frames):
            chosen.append(drive)
            frames -= len(drive)
    return chosen


def _rollouts(
    world: WorldModel, evidence: Evidence, clips: Sequence[Clip], config: EvaluationConfig
) -> list[Section]:
    """Quality and fidelity, of the same rollouts."""
    quality = QualityMeter(world.fps, evidence.extractor, evidence.perceptual)
    fidelity = None
    if evidence.probe is not None:
        fidelity = FidelityMeter(world, evidence.probe, evidence.probe_floor)
    with progress(len(clips), "rollouts", "rollouts") as bar:
        for imagined in imagine(world, clips, config.sampling):
            quality.add(imagined)
            if fidelity is not None:
                fidelity.add(imagined)
            bar.advance(1)
    if fidelity is None:
        return [quality.section()]
    measure_fidelity(world, fidelity, clips, config.sampling)
    return [quality.section(), fidelity.section()]


def _coding(world: WorldModel, drive: DriveTokens, frames: int | None) -> Section:
    """Prove the bits: compress a drive with the model and decode it again."""
    count = len(drive) if frames is None else min(frames, len(drive))
    with progress(2 * count, "arithmetic coding", "frames") as bar:
        checked = coded_size_check(world, drive, frames=count, advance=bar.advance)
    claimed = [
        bits
        for begin, stop in drive.entry.segments
        if begin < count
        for bits in streamed_bits(
            world.transformer,
            drive,
            begin,
            drive.actions[None, begin : min(stop, count)],
            drive.action_valid[None, begin : min(stop, count)],
        )[0]
    ]
    metrics = {
        "per_tokenizer": True,
        **checked,
        "claimed_bits_per_token": float(np.mean(claimed)),
        "ratio_to_claimed": checked["coded_bits_per_token"] / float(np.mean(claimed)),
    }
    rows = tuple(
        (name.replace("_", " "), str(value) if isinstance(value, bool) else value)
        for name, value in metrics.items()
        if name != "per_tokenizer"
    )
    return Section(
        name="coding",
        title="The bits, proved",
        text="The tokens of a held-out drive are compressed by range coding under the model's "
        "probabilities, wave by wave through the cache as in a rollout, and decoded again. The "
        "file must be as large as the likelihood claims (streamed from the drive's start, "
        "float32), and what comes back must be the same tokens.",
        metrics=metrics,
        parts=(Table(caption=f"Drive {drive.id}", columns=("", "value"), rows=rows),),
    )


def _protocol(
    world: WorldModel,
    evidence: Evidence,
    clips: Sequence[Clip],
    starts: Sequence[Clip],
    config: EvaluationConfig,
) -> Protocol:
    size = world.tokenizer.frame_size
    return Protocol.of(
        "world-model",
        {
            "drives": {each.drive.id: each.fingerprint for each in evidence.footage},
            "training": {
                drive.id: digest(drive.actions, drive.timestamps)
                for drive in evidence.training.drives
            },
            "size": [size.height, size.width],
            "fps": round(world.fps, 4),
            "context_frames": world.context_frames,
            "clips": [[clip.footage.drive.id, clip.start, clip.frames] for clip in clips],
            "starts": [[clip.footage.drive.id, clip.start] for clip in starts],
            "batch": BATCH,
            "precision": str(world.dtype).removeprefix("torch."),
            "settings": asdict(config),
            "features": {
                "name": evidence.extractor.name,
                "fingerprint": evidence.extractor.fingerprint,
            },
            "probe": evidence.probe.fingerprint if evidence.probe else None,
            "lpips": evidence.perceptual is not None,
        },
    )
