"""Run all parts of a world model's evaluation, and record what was measured in a protocol."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import digest
from driving_sim.data.split import original_id
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.engine.config import Count, Positive, config, require
from driving_sim.engine.errors import TooLittleDataError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.control import MOVING_MPS
from driving_sim.evaluate.actions.fidelity import evaluate_fidelity
from driving_sim.evaluate.actions.inverse_dynamics import CHANNELS, InverseDynamics
from driving_sim.evaluate.actions.sweep import evaluate_sweep
from driving_sim.evaluate.footage import (
    Clip,
    Footage,
    HeldOutStore,
    choose_clips,
    clock_and_actions,
    evenly,
    first_frames,
    footage_of,
)
from driving_sim.evaluate.likelihood.action_information import evaluate_action_information
from driving_sim.evaluate.likelihood.coding import evaluate_coding
from driving_sim.evaluate.likelihood.held_out_bits import evaluate_likelihood, learned_drives
from driving_sim.evaluate.pictures.features import VideoFeatures
from driving_sim.evaluate.pictures.long_rollouts import evaluate_stability
from driving_sim.evaluate.pictures.quality import evaluate_quality
from driving_sim.evaluate.pictures.stability import StabilityConfig
from driving_sim.evaluate.pictures.standing import choose_standing_start, evaluate_standing
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.report import KeyFigure
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.evaluate.rollouts import BATCH, imagine
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

NOT_MEASURED = "not_measured"
"""Name of the section that lists the missing sections, and why each could not be measured."""
NO_TRAINING = "the tokens that the model was trained on are not at hand"


@config
class EvaluationConfig:
    """Settings of a world model's evaluation. All of them are part of the protocol."""

    stride: Count = 1
    """The likelihood is measured on every `stride`-th frame."""
    shuffles: Count = 20
    """Number of random shuffles of the actions in the section on action information."""
    coded_seconds: float = 60.0
    """Length in s of the footage to compress, from the start of the first drive."""
    clips: Count = 32
    """Maximum number of clips that are rolled out to measure quality and fidelity."""
    seconds: float = 3.0
    """Length of the future of each clip, in s."""
    sweeps: Count = 3
    """Maximum number of starts of the sweep, which rolls out a grid of commands from each."""
    long_rollouts: Count = 4
    """Maximum number of long rollouts that are judged for stability."""
    long_seconds: Positive = 60.0
    """Length of each long rollout, in s, at least `stability.block_s`."""
    standing_seconds: Positive = 60.0
    """Time in s for which the car stands still."""
    real_seconds: float = 150.0
    """Maximum length in s of the real footage that sets the bounds for stability."""
    probe_steps: Count = 600
    """Number of training steps of the inverse-dynamics probe."""
    sampling: Sampling = Sampling()
    """Sampling settings of all rollouts."""
    stability: StabilityConfig = StabilityConfig()
    """Settings that decide when a long rollout has collapsed."""

    def __post_init__(self) -> None:
        least = self.stability.block_s
        require(self, "long_seconds", self.long_seconds >= least, f"at least {least:g}")


FULL = EvaluationConfig()
"""Settings of a full evaluation, whose numbers can be published."""
QUICK = EvaluationConfig(
    stride=6,
    shuffles=1,
    coded_seconds=4.0,
    clips=4,
    seconds=2.0,
    sweeps=1,
    long_rollouts=2,
    long_seconds=10.0,
    standing_seconds=10.0,
    real_seconds=40.0,
    probe_steps=150,
)
"""Settings of a quick evaluation, for a first look."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evidence:
    """The data and the networks with which a world model is evaluated."""

    heldout: HeldOutStore
    footage: Sequence[Footage]
    """Footage of the held-out drives, in the order of the store."""
    training: TokenStore | None
    """Tokens that the model was trained on, or None if they are not at hand.

    The baselines are fitted to them.
    """
    probe: InverseDynamics | None
    """Network that estimates actions from frames, or None if there is none; see `no_probe`."""
    no_probe: str = ""
    """Reason why there is no probe. Empty if there is a probe."""
    probe_floor: dict[str, Any]
    """Errors of the probe on the true frames of the held-out drives."""
    extractor: VideoFeatures
    perceptual: PerceptualLoss | None


def evaluate_world_model(
    world: WorldModel, evidence: Evidence, config: EvaluationConfig
) -> tuple[list[Section], Protocol]:
    """Measure likelihood, action information, rollouts, action fidelity and stability.

    A section is left out if the drives or the model do not allow its measurement. The last section
    then lists the missing sections and the reasons.
    """
    heldout, probe, sampling = evidence.heldout, evidence.probe, config.sampling
    choose = partial(choose_clips, evidence.footage, context_frames=world.context_frames)
    sections: list[Section] = []
    left_out: dict[str, str] = {}

    @contextmanager
    def attempt(*names: str) -> Iterator[None]:
        """Run the `with` block. On TooLittleDataError, record that the sections are missing."""
        try:
            yield
        except TooLittleDataError as error:
            left_out.update(dict.fromkeys(names, str(error)))

    if evidence.training is None:
        left_out |= dict.fromkeys(("baselines", "leak_check"), NO_TRAINING)
    with attempt("likelihood"):
        likelihood = evaluate_likelihood(world, heldout, evidence.training, stride=config.stride)
        sections.append(likelihood)
    with attempt("coding"):
        sections.append(evaluate_coding(world, heldout.drives[0], seconds=config.coded_seconds))
    with attempt("action_information"):
        sections.append(evaluate_action_information(world, heldout, shuffles=config.shuffles))
    clips: list[Clip] = []
    with attempt("quality", "fidelity", "sweep"):
        clips = choose(frames=round(config.seconds * world.fps), count=config.clips)
        with progress(len(clips), "rollouts", "rollouts") as bar:
            rollouts = [*bar.counted(imagine(world, clips, sampling))]
        quality = evaluate_quality(rollouts, world.fps, evidence.extractor, evidence.perceptual)
        sections.append(quality)
        if probe is not None:
            floor = evidence.probe_floor
            sections.append(evaluate_fidelity(world, probe, floor, rollouts, sampling))
    if probe is None:
        left_out |= dict.fromkeys(("fidelity", "sweep"), evidence.no_probe)
    sweep_starts: list[Clip] = []
    if probe is not None and clips:
        with attempt("sweep"):
            sweep_starts = _sweeps(world, choose(frames=clips[0].frames), config.sweeps)
            sections.append(evaluate_sweep(world, probe, sweep_starts, sampling))
    starts: list[Clip] = []
    with attempt("stability"):
        starts = choose(frames=1, count=config.long_rollouts)
        stability = evaluate_stability(
            world,
            starts,
            _real(world, evidence, config),
            seconds=config.long_seconds,
            sampling=sampling,
            config=config.stability,
        )
        sections.append(stability)
    standing: list[Clip] = []
    with attempt("standing"):
        start = choose_standing_start(evidence.footage, world.context_frames)
        seconds = config.standing_seconds
        sections.append(evaluate_standing(world, start, seconds=seconds, sampling=sampling))
        standing.append(start.clip)
    if left_out:
        rows = [(name.replace("_", " "), why) for name, why in left_out.items()]
        text = "This report lacks the parts below, for the reasons given."
        parts = (Table("What is missing", ("part", "reason"), rows),)
        sections.append(Section(NOT_MEASURED, "What could not be measured", text, left_out, parts))
    chosen = {"clips": clips, "sweeps": sweep_starts, "starts": starts, "standing": standing}
    return sections, _protocol(world, evidence, chosen, config)


_SOURCES = {"true frames": "recorded", "model without actions": "action_free"}
HEADLINE = (
    KeyFigure(
        "bits per token",
        "likelihood.bits_per_token.model",
        {
            "copy last": "likelihood.bits_per_token.copy_last",
            "unigram": "likelihood.bits_per_token.unigram",
        },
    ),
    KeyFigure(
        "steering is worth, bits per frame",
        "action_information.gain_over_shuffled_bits_per_frame.steering",
    ),
    KeyFigure(
        "steering sign accuracy",
        "fidelity.steering.model.sign_accuracy",
        {name: f"fidelity.steering.{source}.sign_accuracy" for name, source in _SOURCES.items()},
    ),
    KeyFigure(
        "steering, commanded against realised: correlation",
        "fidelity.steering.model.correlation",
        {name: f"fidelity.steering.{source}.correlation" for name, source in _SOURCES.items()},
    ),
    KeyFigure(
        "PSNR over the horizon, dB",
        "quality.psnr_db.model",
        {"floor": "quality.psnr_db.floor", "copy last": "quality.psnr_db.copy_last"},
    ),
    KeyFigure(
        "speed, commanded against realised: correlation",
        "fidelity.speed.model.correlation",
        {name: f"fidelity.speed.{source}.correlation" for name, source in _SOURCES.items()},
    ),
    *(
        KeyFigure(
            f"{channel} gain",
            f"fidelity.{channel}.model.gain",
            {name: f"fidelity.{channel}.{source}.gain" for name, source in _SOURCES.items()},
        )
        for channel in CHANNELS
    ),
    KeyFigure(
        "sweep rollouts nearest to their own truth, share",
        "sweep.nearest",
        {"by sight": "sweep.nearest_by_sight", "by chance": "sweep.nearest_by_chance"},
    ),
    KeyFigure("long rollouts last, s", "stability.mean_lasted_s", {"at most": "stability.seconds"}),
    KeyFigure(
        "long rollouts that last to their end", "stability.lasted", total="stability.rollouts"
    ),
    KeyFigure("long rollouts that freeze", "stability.froze", total="stability.rollouts"),
    KeyFigure(
        "standing still, PSNR with the start, dB",
        "standing.psnr_db.model",
        {"same place": "standing.psnr_db.floor", "another place": "standing.psnr_db.elsewhere"},
    ),
    KeyFigure("standing still shows the same road", "standing.same_road"),
)
"""Key figures at the top of a world model's report."""


def _real(world: WorldModel, evidence: Evidence, config: EvaluationConfig) -> list[Footage]:
    """Return at most `real_seconds` of real footage, without mirror images.

    Training drives are used only if the held-out drives are too short, and if they are at hand.
    """
    training = evidence.training.drives if evidence.training else ()
    sources = [*evidence.footage, *footage_of(training, (), world.tokenizer)]
    chosen: list[Footage] = []
    frames = round(config.real_seconds * world.fps)
    for source in sources:
        if frames > 0 and source.drive.id == original_id(source.drive.id):
            chosen.append(replace(source, drive=first_frames(source.drive, frames)))
            frames -= len(chosen[-1].drive)
    return chosen


def _sweeps(world: WorldModel, clips: Sequence[Clip], count: int) -> list[Clip]:
    """Choose up to `count` evenly spread clips, from those in which the car moves at the start.

    The choice depends only on the clips and on `count`.
    """
    if not world.known_channels[STEERING] or not world.statistics.steering_p99 > 0:
        raise TooLittleDataError("the model learned no steering, so there is nothing to sweep")
    moving = [clip for clip in clips if _starts_moving(clip)]
    if not moving:
        raise TooLittleDataError(
            f"no clip starts at a known speed of {MOVING_MPS:g} m/s or more, so there is no start "
            "for the sweep"
        )
    return evenly(moving, count)


def _starts_moving(clip: Clip) -> bool:
    """Return whether the speed at the last context frame is known and at least `MOVING_MPS`."""
    if clip.context_frames < 2:
        return False
    # The action that led to the last context frame has the speed at that frame.
    speed, valid = (array[clip.context_frames - 2, SPEED] for array in clip.actions)
    return bool(valid and speed >= MOVING_MPS)


def _protocol(
    world: WorldModel,
    evidence: Evidence,
    chosen: Mapping[str, Sequence[Clip]],
    config: EvaluationConfig,
) -> Protocol:
    """Return the protocol: everything that decides the measured numbers, except the model."""
    size, statistics = world.tokenizer.frame_size, world.statistics
    training = evidence.training.drives if evidence.training else ()
    learned = learned_drives(world, evidence.training) if evidence.training else ()
    return Protocol.of(
        "world-model",
        {
            "drives": [_listed(source.drive, source.fingerprint) for source in evidence.footage],
            "recorded": all(source.recorded is not None for source in evidence.footage),
            "training": [_listed(drive, digest(*clock_and_actions(drive))) for drive in training],
            "learned": list(dict.fromkeys(drive.id for drive in learned)),
            "known_channels": world.known_channels,
            # The fidelity section compares with the mean action as a baseline. The 95th percentile
            # defines what counts as a curve of the road, the 99th the sweep's hardest steering.
            "mean_action": statistics.mean,
            "steering_p95": statistics.steering_p95,
            "steering_p99": statistics.steering_p99,
            "size": [size.height, size.width],
            "fps": round(world.fps, 4),
            "context_frames": world.context_frames,
            **{
                name: [[*clip.footage.place, clip.start, clip.frames] for clip in clips]
                for name, clips in chosen.items()
            },
            "batch": BATCH,
            "precision": world.precisions,
            "settings": asdict(config),
            "features": {
                "name": evidence.extractor.name,
                "fingerprint": evidence.extractor.fingerprint,
            },
            "probe": evidence.probe.fingerprint if evidence.probe else None,
            "lpips": evidence.perceptual is not None,
        },
    )


def _listed(drive: DriveTokens, content: str) -> dict[str, str | int]:
    """Return the protocol's entry for a drive, or for one part of a split drive."""
    return {"id": drive.id, "start": drive.entry.start, "sha256": content}
