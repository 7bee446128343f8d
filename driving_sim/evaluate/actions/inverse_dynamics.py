"""An inverse-dynamics probe: a small network that estimates speed and steering from pictures.

The probe learns from real footage. Then it estimates the actions that a rollout shows, which are
compared with the commands. The probe must not look at the road. If it could guess from the road
ahead what a driver would do, a rollout that follows the road and ignores its commands would look
obedient. So the network gets only `motion_cues`: how far the picture turned from frame to frame,
and how its cells moved in addition. It computes weights, and the steering estimate is the weighted
sum of the turns around a transition. So pictures that do not turn give no steering, and mirrored
pictures give the negated steering.

A transition is a step from one frame to the next. A pair is two neighbouring frames.

Legend: T frames of a clip, P pairs, M transitions, B transitions of a batch, K pairs around a
transition, V versions of a picture, D displacements, A = 2 channels of an action; H, W pixels and
R, C cells of a picture.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from driving_sim.data.actions.action_log import SPEED, STEERING, SteeringKind
from driving_sim.data.arrays import Floats32, Ints, Mask, Pixels
from driving_sim.engine.config import Positive, config, from_dict, to_dict
from driving_sim.engine.errors import DriveSimError, TooLittleDataError
from driving_sim.engine.parsing import one_line, parse_json
from driving_sim.engine.training.schedule import learning_rate_factor, position_by_steps
from driving_sim.engine.weights import load_weights
from driving_sim.evaluate.actions.cues import (
    CELLS,
    DISPLACEMENTS,
    RECIPE,
    mirrored_motion,
    motion_cues,
)
from driving_sim.evaluate.actions.following import balanced_sign_accuracy

STANDING_MPS = 1.0
"""Speed below which a car counts as standing.

Steering is neither learned nor judged below this speed, because a standing car does not turn.
"""

CHANNELS = {"speed": SPEED, "steering": STEERING}
"""Index of each channel in an action, by name."""

_AROUND = (-1, 0, 1)
"""The pairs of frames used to estimate a transition, as offsets from the transition's own pair."""

_CELL_WIDTH, _WIDTH = 16, 64
_DROPOUT = 0.3
_BATCH = 64
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 30
_WEIGHT_DECAY = 0.05
_CLIP_NORM = 1.0
_VALIDATIONS = 20
_END_SHARE = 0.1
"""Share of the training samples that are treated as if the clip ended after the transition."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeClip:
    """A clip of any frame size, with the action that leads from each frame to the next."""

    frames: Pixels
    """Frames, uint8 RGB [T, H, W, 3]."""
    actions: Floats32
    """Mean speed in m/s and mean steering between each frame and the next, [T, 2]."""
    action_valid: Mask
    """Whether each action is known, [T, 2]."""
    segments: Sequence[tuple[int, int]]
    """Ranges [begin, stop) of frames without a time gap."""


@config
class ProbeSource:
    """The data that a probe was trained on.

    The probe can judge other drives of the same frame rate and steering kind.
    """

    fps: Positive
    """Frame rate in frames per second."""
    steering_kind: SteeringKind | None
    """Kind of the steering values, or None if no drive has steering."""
    drives: tuple[str, ...]
    """Digests of the drives that the probe was trained or validated on."""


class InverseDynamics:
    """A probe that estimates speed and steering from frames at the frame rate of its training data.

    Mirrored frames give the same speed and the negated steering, so the probe prefers neither side.
    """

    look_back = 1 - min(_AROUND)
    """Number of frames before a rollout that are needed to estimate its first action."""

    def __init__(self, network: "_Network", source: ProbeSource) -> None:
        self._network = network.eval().requires_grad_(False)
        self.source = source
        """The data that the probe was trained on."""
        digest = hashlib.sha256(RECIPE.encode())
        digest.update(save(self._weights()))
        self.fingerprint = digest.hexdigest()
        """SHA-256, in hexadecimal, of everything that the estimates depend on."""

    @classmethod
    def fit(
        cls,
        training: Sequence[ProbeClip],
        validation: Sequence[ProbeClip],
        *,
        source: ProbeSource,
        steps: int = 600,
        seed: int = 0,
        advance: Callable[[int], object] = lambda steps: None,
    ) -> "InverseDynamics":
        """Train a probe on `training`, and keep the weights that do best on `validation`.

        All clips must have the same frame rate and steering kind. Their frames may be recorded or
        reconstructed. The weights depend only on the clips, `steps` and `seed`. `source` is stored
        in the probe's file. `advance` is called with the number of steps done since the last call.
        A channel that is unknown in all training clips is not learned. Raises TooLittleDataError
        if the training or the validation clips have no known action at all.
        """
        learned, held_out = _Samples.of(training, soften=True), _Samples.of(validation)
        if not (learned.known.any() and held_out.known.any()):
            which = "validation" if learned.known.any() else "training"
            raise TooLittleDataError(
                f"no two neighbouring frames of the probe's {which} drives have a known action; "
                "use drives with speed or steering"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network()
            network.standardise(learned)
            return cls(_train(network, learned, held_out, steps, advance), source)

    @classmethod
    def load(cls, path: Path) -> "InverseDynamics":
        """Load a probe from a file that contains the bytes of `to_bytes`.

        Raises DriveSimError for any other file.
        """
        network = _Network()
        try:
            metadata = load_weights(network, path, of="a probe")
            if "source" not in metadata:
                raise DriveSimError("it does not name the data that it was trained on")
            source = from_dict(ProbeSource, parse_json(metadata["source"]), where="source")
        except (ValueError, DriveSimError) as error:
            raise DriveSimError(
                f"{path}: not an inverse-dynamics probe of this version ({one_line(error)}); "
                "train a new probe"
            ) from error
        return cls(network, source)

    def to_bytes(self) -> bytes:
        """Return a safetensors file with the probe's weights, and with `source` in its metadata."""
        return save(self._weights(), {"source": json.dumps(to_dict(self.source))})

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self._network.state_dict().items()}

    def estimate(self, frames: Pixels) -> Floats32:
        """Estimate the actions [T - 1, 2] between neighbouring frames, uint8 [T, H, W, 3].

        The estimate for the step from t to t + 1 uses the motion of this step, of the step before
        and of the step after (frames t - 1 to t + 2). Where one of these is missing, at the start
        and the end, the step's own motion is used twice. Channels that were not learned are NaN.
        """
        _, stacks = _stacks([(0, len(frames))])
        return self._network.predict(*motion_cues(frames), torch.from_numpy(stacks))

    def errors(
        self, clips: Sequence[ProbeClip], *, curve: float | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Return the errors of the estimates for these clips, by channel and metric.

        Metrics whose names begin with `constant_` are errors of a baseline, which always guesses
        the mean of the training clips. The sign of the steering is judged only where |steering| is
        above `curve`, by default half the root mean square of the training clips' steering. A
        metric is None if it cannot be computed from these clips.
        """
        samples = _Samples.of(clips)
        estimates = self._network.predict(samples.turns, samples.motion, samples.stacks)
        curve = 0.5 * float(self._network.scale[STEERING]) if curve is None else curve
        by_channel: dict[str, dict[str, float | None]] = {}
        for name, channel in CHANNELS.items():
            known = samples.known[:, channel].numpy() & ~np.isnan(estimates[:, channel])
            estimated = estimates[known, channel]
            truth = samples.actions[known, channel].numpy().astype(np.float64)
            count = len(truth)
            if not count:
                # Nothing can be compared, and all metrics become None below. Their names are still
                # needed, so compute the metrics of one NaN and keep only the names.
                estimated, truth = np.full((2, 1), np.nan)
            squares, off = np.square(estimated - truth), truth - float(self._network.mean[channel])
            spread = float(np.square(truth - truth.mean()).sum())
            varies, moves = float(np.ptp(truth)) > 0, float(np.ptp(estimated)) > 0
            both_vary, has_sign = varies and moves, channel == STEERING
            errors = {
                "transitions": count,
                "mean_absolute_error": float(np.abs(estimated - truth).mean()),
                "constant_mean_absolute_error": float(np.abs(off).mean()),
                "rmse": float(np.sqrt(squares.mean())),
                "constant_rmse": float(np.sqrt(np.square(off).mean())),
                "r_squared": 1 - float(squares.sum()) / spread if varies else None,
                "correlation": float(np.corrcoef(estimated, truth)[0, 1]) if both_vary else None,
                "sign_accuracy": (
                    balanced_sign_accuracy(truth, estimated, curve) if has_sign else None
                ),
            }
            by_channel[name] = errors if count else dict.fromkeys(errors)
        return by_channel


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """The `motion_cues` of all pairs of frames, and the transitions that have a known action."""

    turns: Tensor
    """Turns of all pairs, float32 [V, P]."""
    motion: Tensor
    """Motion of all pairs, float16 [V, P, D, R, C]; float32 would take twice the memory."""
    stacks: Tensor
    """Indices of the pairs around each transition, int64 [M, K]."""
    actions: Tensor
    """Action of each transition, float32 [M, 2]."""
    known: Tensor
    """Whether each action is known and can be seen in the pictures, bool [M, 2].

    The steering of a standing car cannot be seen.
    """

    @classmethod
    def of(cls, clips: Sequence[ProbeClip], *, soften: bool = False) -> "_Samples":
        turns, motion, stacks, actions, known = [], [], [], [], []
        begin = 0
        for clip in clips:
            turned, moved = motion_cues(clip.frames, soften=soften)
            turns.append(turned)
            motion.append(moved.half())
            frames, around = _stacks(clip.segments)
            stands = clip.action_valid[:, SPEED] & (clip.actions[:, SPEED] < STANDING_MPS)
            visible = (clip.action_valid & ~np.stack([np.zeros_like(stands), stands], 1))[frames]
            kept = visible.any(axis=1)
            stacks.append(begin + around[kept])
            actions.append(clip.actions[frames[kept]])
            known.append(visible[kept])
            begin += turned.shape[1]
        of_transitions = (torch.from_numpy(np.concatenate(a)) for a in (stacks, actions, known))
        return cls(torch.cat(turns, dim=1), torch.cat(motion, dim=1), *of_transitions)


class _Network(nn.Module):
    """A network that estimates a transition's standardised speed and steering from its cues."""

    mean: Tensor
    scale: Tensor
    turn_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((2,), torch.nan))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("turn_scale", torch.ones(()))
        self.cells = nn.Sequential(nn.Conv2d(DISPLACEMENTS, _CELL_WIDTH, 1), nn.GELU())
        self.picture = nn.Sequential(
            nn.Dropout(_DROPOUT),
            nn.Linear(len(_AROUND) * _CELL_WIDTH * CELLS, _WIDTH),
            nn.GELU(),
        )
        self.head = nn.Sequential(
            nn.Linear(_WIDTH + len(_AROUND), _WIDTH),
            nn.GELU(),
            nn.Linear(_WIDTH, 1 + len(_AROUND)),
        )

    def standardise(self, samples: _Samples) -> None:
        """Set the mean action, and the scales of turns and actions, from the training samples.

        Turns and steering have a sign, so their scale is the root mean square. The scale of the
        speed is its standard deviation.
        """
        self.turn_scale.copy_(_root_mean_square(samples.turns))
        for channel in CHANNELS.values():
            values = samples.actions[samples.known[:, channel], channel]
            if len(values):
                self.mean[channel] = values.mean()
                spread = values if channel == STEERING else values - values.mean()
                self.scale[channel] = _root_mean_square(spread)

    @property
    def offset(self) -> Tensor:
        """The action [A] for an output of 0, with NaN in channels that were not learned."""
        return self.mean * torch.tensor([1.0, 0.0])

    def forward(self, turns: Tensor, motion: Tensor) -> Tensor:
        """Return standardised actions [B, A] for turns [B, K] and motion [B, K, D, R, C]."""
        turns = turns / self.turn_scale
        # Average the features of the motion and of its mirror image. The averages are the same for
        # mirrored pictures. So mirroring only negates the turns, and with them the steering.
        plain, mirrored = (self._read(turns.abs(), m) for m in (motion, mirrored_motion(motion)))
        features = (plain + mirrored) / 2
        steering = (features[:, 1:] * turns).sum(dim=1)
        return torch.stack([features[:, 0], steering], dim=1)

    def _read(self, turn_sizes: Tensor, motion: Tensor) -> Tensor:
        """Return the standardised speed and the weight of each turn, [B, 1 + K]."""
        cells = self.cells(rearrange(motion, "b k d r c -> (b k) d r c"))
        picture = self.picture(rearrange(cells, "(b k) w r c -> b (k w r c)", b=len(motion)))
        features: Tensor = self.head(torch.cat([picture, turn_sizes], dim=1))
        return features

    def loss(self, output: Tensor, samples: _Samples, chosen: Tensor | slice) -> Tensor:
        """Return the mean Huber loss of the standardised actions, summed over both channels.

        Unknown actions do not count. `chosen` selects the transitions of `samples` to which
        `output` [B, A] belongs.
        """
        known = samples.known[chosen]
        # The offset is NaN in a channel that was not learned. Keep NaN out of the gradients.
        target = torch.where(known, (samples.actions[chosen] - self.offset) / self.scale, 0.0)
        losses = known * functional.smooth_l1_loss(output, target, reduction="none")
        return (losses.sum(dim=0) / known.sum(dim=0).clamp(min=1)).sum()

    def outputs(self, turns: Tensor, motion: Tensor, stacks: Tensor) -> Tensor:
        """Return standardised actions [M, A] for transitions with the pairs `stacks` [M, K].

        The cues are [V, P, ...]. Only their first version, without blur, is used.
        """
        batches = [stacks[at : at + _BATCH] for at in range(0, len(stacks), _BATCH)]
        outputs = [self(turns[0, batch], motion[0, batch].float()) for batch in batches]
        return torch.cat([torch.zeros(0, 2), *outputs])

    @torch.inference_mode()
    def predict(self, turns: Tensor, motion: Tensor, stacks: Tensor) -> Floats32:
        """Return actions [M, 2] in the data's units. The arguments are those of `outputs`."""
        actions = self.outputs(turns, motion, stacks) * self.scale + self.offset
        return np.asarray(actions.numpy(), np.float32)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt().clamp(min=1e-6)


def _train(
    network: _Network,
    learned: _Samples,
    held_out: _Samples,
    steps: int,
    advance: Callable[[int], object],
) -> _Network:
    """Train the network, and return a copy with the weights of the lowest held-out loss."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    validation_interval = max(1, steps // _VALIDATIONS)
    best, lowest = copy.deepcopy(network), float("inf")
    for step in range(steps):
        position = position_by_steps(step, steps)
        factor = learning_rate_factor(step, position, warmup_steps=_WARMUP_STEPS, floor=0.0)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * factor
        chosen = torch.randint(len(learned.stacks), (_BATCH,))
        version = torch.randint(len(learned.turns), (_BATCH,))[:, None]
        stacks = learned.stacks[chosen]
        # At the end of a clip there is no next pair, and the transition's own pair is used instead.
        # Imitate this in some samples.
        ends = torch.rand(_BATCH, 1) < _END_SHARE
        own = stacks[:, _AROUND.index(0), None]
        stacks = torch.where(ends, stacks.minimum(own), stacks)
        output = network(learned.turns[version, stacks], learned.motion[version, stacks].float())
        loss = network.loss(output, learned, chosen)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
        optimizer.step()
        advance(1)
        if (step + 1) % validation_interval == 0 or step + 1 == steps:
            network.eval()
            with torch.inference_mode():
                output = network.outputs(held_out.turns, held_out.motion, held_out.stacks)
                held_out_loss = float(network.loss(output, held_out, slice(None)))
            network.train()
            if held_out_loss < lowest:
                best, lowest = copy.deepcopy(network), held_out_loss
    return best


def _stacks(segments: Sequence[tuple[int, int]]) -> tuple[Ints, Ints]:
    """Return the first frame of each transition, [M], and the pairs around it, [M, K].

    A pair has the index of its first frame. No pair and no transition crosses a time gap.
    """
    first_frames = [np.arange(begin, stop - 1) for begin, stop in segments]
    around = [
        (frames[:, None] + np.array(_AROUND)).clip(begin, stop - 2)
        for frames, (begin, stop) in zip(first_frames, segments, strict=True)
    ]
    return np.concatenate(first_frames), np.concatenate(around)
