"""An inverse-dynamics probe: the speed and steering that pictures show.

It learns from real footage and then reads rollouts, so that what they did can be compared with what
they were told. It must measure the motion, not guess from the road ahead what a driver would do: a
rollout that follows the road and ignores its commands would else pass for obedient. So a small
network sees only `motion_cues`: how far the picture turned from frame to frame, and how its parts
moved beside that. Steering is the turns around a transition under weights that the network chooses:
without a turn there is none, and a mirrored one is negated.

Legend: T frames of a clip, P pairs of neighbours, M transitions, B of a batch, K pairs around each,
V versions of a picture, D displacements, A = 2 channels of an action; H, W pixels and R, C cells of
a picture.
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

from driving_sim.data.actions.action_file import SPEED, STEERING, SteeringKind
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
"""The steering of a slower car does not show: it is neither learned nor judged."""

CHANNELS = {"speed": SPEED, "steering": STEERING}

_AROUND = (-1, 0, 1)
"""The pairs that the estimate of a transition looks at, counted from its own."""

_CELL_WIDTH, _WIDTH = 16, 64
_DROPOUT = 0.3
_BATCH = 64
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 30
_WEIGHT_DECAY = 0.05
_CLIP_NORM = 1.0
_VALIDATIONS = 20
_END_SHARE = 0.1
"""Of the transitions in training that are seen as if the clip ended there."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeClip:
    """Frames and the actions that lead from each to the next; of any size and aspect."""

    frames: Pixels
    """uint8 RGB [T, H, W, 3]."""
    actions: Floats32
    """[T, 2] speed in m/s and steering, the mean from each frame to the next."""
    action_valid: Mask
    """[T, 2] where the actions are known."""
    segments: Sequence[tuple[int, int]]
    """Ranges [begin, stop) of frames that follow each other without a gap."""


@config
class ProbeSource:
    """What a probe learned from: it can judge drives of this rate and kind, but not these ones."""

    fps: Positive
    """Frames per second."""
    steering_kind: SteeringKind | None
    """What its steering measures; None where no drive has any."""
    drives: tuple[str, ...]
    """A digest of each drive that it learned from or that chose its weights."""


class InverseDynamics:
    """Estimates speed and steering from frames at the rate of those that it learned from.

    Mirrored frames give the same speed and the negated steering: it leans to neither side.
    """

    look_back = 1 - min(_AROUND)
    """Frames before a future that its first estimate looks at."""

    def __init__(self, network: "_Network", source: ProbeSource) -> None:
        self._network = network.eval().requires_grad_(False)
        self.source = source
        """What it learned from."""
        digest = hashlib.sha256(RECIPE.encode())
        digest.update(save(self._weights()))
        self.fingerprint = digest.hexdigest()
        """SHA-256, in hexadecimal, of all that the estimates depend on."""

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
        """Learn from clips of one frame rate and kind of steering; keep what is best on others.

        Reconstructions of the same drives are more clips. The estimates are a function of the
        clips, `steps` and `seed`; `source` is kept in the probe's file. `advance` is called with
        the number of steps done since the last call. Channels that no clip has are not learned.
        Raises DriveSimError where none has any.
        """
        learned, held = _Samples.of(training, soften=True), _Samples.of(validation)
        if not (learned.known.any() and held.known.any()):
            which = "validation" if learned.known.any() else "training"
            raise TooLittleDataError(
                f"no two neighbouring frames of the probe's {which} drives have a known action: "
                "use drives with speed or steering"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network()
            network.standardise(learned)
            return cls(_train(network, learned, held, steps, advance), source)

    @classmethod
    def load(cls, path: Path) -> "InverseDynamics":
        """Read a file of `to_bytes`; raises DriveSimError where it is not one."""
        network = _Network()
        try:
            metadata = load_weights(network, path, of="a probe")
            if "source" not in metadata:
                raise DriveSimError("it does not say what it learned from")
            source = from_dict(ProbeSource, parse_json(metadata["source"]), where="source")
        except (ValueError, DriveSimError) as error:
            raise DriveSimError(
                f"{path}: not an inverse-dynamics probe of this version ({one_line(error)}); "
                "train it anew"
            ) from error
        return cls(network, source)

    def to_bytes(self) -> bytes:
        """Return the probe as a safetensors file, with its source as JSON in the metadata."""
        return save(self._weights(), {"source": json.dumps(to_dict(self.source))})

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self._network.state_dict().items()}

    def estimate(self, frames: Pixels) -> Floats32:
        """Estimate the action [T - 1, 2] from each frame to the next, of uint8 [T, H, W, 3].

        The estimate from t to t + 1 looks at frames t - 1 to t + 2: at the motion from t to t + 1,
        the one before and the one after. Where the frames begin or end, their first or last motion
        stands in for what is missing. NaN in channels that were not learned.
        """
        _, stacks = _stacks([(0, len(frames))])
        return self._network.predict(*motion_cues(frames), torch.from_numpy(stacks))

    def errors(
        self, clips: Sequence[ProbeClip], *, curve: float | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Measure the estimates of clips, by channel, beside a constant: the training clips' mean.

        `curve` is the |steering| above which its sign is judged, by default half of the training
        clips' root mean square. None is what cannot be told from these clips.
        """
        samples = _Samples.of(clips)
        estimates = self._network.predict(samples.turns, samples.motion, samples.stacks)
        curve = 0.5 * float(self._network.scale[STEERING]) if curve is None else curve
        found: dict[str, dict[str, float | None]] = {}
        for name, channel in CHANNELS.items():
            known = samples.known[:, channel].numpy() & ~np.isnan(estimates[:, channel])
            estimated = estimates[known, channel]
            truth = samples.actions[known, channel].numpy().astype(np.float64)
            count = len(truth)
            if not count:  # computed of a single unknown, so that the names stand here alone
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
            found[name] = errors if count else dict.fromkeys(errors)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """The transitions of clips that have an action, and the `motion_cues` around them."""

    turns: Tensor
    """float32 [V, P]."""
    motion: Tensor
    """float16 [V, P, D, R, C]: half the memory."""
    stacks: Tensor
    """int64 [M, K] pairs around each transition."""
    actions: Tensor
    """float32 [M, 2]."""
    known: Tensor
    """bool [M, 2] where the action is known and shows: not the steering of a car that stands."""

    @classmethod
    def of(cls, clips: Sequence[ProbeClip], *, soften: bool = False) -> "_Samples":
        turns, motion, stacks, actions, known = [], [], [], [], []
        begin = 0
        for clip in clips:
            turned, moved = motion_cues(clip.frames, soften=soften)
            turns.append(turned)
            motion.append(moved.half())
            places, around = _stacks(clip.segments)
            stands = clip.action_valid[:, SPEED] & (clip.actions[:, SPEED] < STANDING_MPS)
            shows = (clip.action_valid & ~np.stack([np.zeros_like(stands), stands], 1))[places]
            kept = shows.any(axis=1)
            stacks.append(begin + around[kept])
            actions.append(clip.actions[places[kept]])
            known.append(shows[kept])
            begin += turned.shape[1]
        of_transitions = (torch.from_numpy(np.concatenate(a)) for a in (stacks, actions, known))
        return cls(torch.cat(turns, dim=1), torch.cat(motion, dim=1), *of_transitions)


class _Network(nn.Module):
    """Cues of the pairs around transitions to speed and steering [B, A], in units of the spread."""

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
        """Learn the units: the data's spread, that of what has a sign about 0."""
        self.turn_scale.copy_(_root_mean_square(samples.turns))
        for channel in CHANNELS.values():
            values = samples.actions[samples.known[:, channel], channel]
            if len(values):
                self.mean[channel] = values.mean()
                spread = values if channel == STEERING else values - values.mean()
                self.scale[channel] = _root_mean_square(spread)

    @property
    def offset(self) -> Tensor:
        """What an output of 0 means; NaN in channels that were not learned."""
        return self.mean * torch.tensor([1.0, 0.0])

    def forward(self, turns: Tensor, motion: Tensor) -> Tensor:
        """Read turns [B, K] and motion [B, K, D, R, C]."""
        turns = turns / self.turn_scale
        # Alike for a picture and its mirror image: only the turns have a sign.
        one, other = (self._read(turns.abs(), m) for m in (motion, mirrored_motion(motion)))
        read = (one + other) / 2
        steering = (read[:, 1:] * turns).sum(dim=1)
        return torch.stack([read[:, 0], steering], dim=1)

    def _read(self, turned: Tensor, motion: Tensor) -> Tensor:
        cells = self.cells(rearrange(motion, "b k d r c -> (b k) d r c"))
        picture = self.picture(rearrange(cells, "(b k) w r c -> b (k w r c)", b=len(motion)))
        read: Tensor = self.head(torch.cat([picture, turned], dim=1))
        return read

    def loss(self, output: Tensor, samples: _Samples, chosen: Tensor | slice) -> Tensor:
        """Huber loss in units of the spread, each channel's mean over what is known of it."""
        known = samples.known[chosen]
        # The offset of a channel that was not learned is NaN: none of it may reach a gradient.
        wanted = torch.where(known, (samples.actions[chosen] - self.offset) / self.scale, 0.0)
        losses = known * functional.smooth_l1_loss(output, wanted, reduction="none")
        return (losses.sum(dim=0) / known.sum(dim=0).clamp(min=1)).sum()

    def outputs(self, turns: Tensor, motion: Tensor, stacks: Tensor) -> Tensor:
        """Read the sharp pictures' cues [V, P, ...] around transitions [M, K]."""
        parts = [stacks[at : at + _BATCH] for at in range(0, len(stacks), _BATCH)]
        read = [self(turns[0, part], motion[0, part].float()) for part in parts]
        return torch.cat([torch.zeros(0, 2), *read])

    @torch.inference_mode()
    def predict(self, turns: Tensor, motion: Tensor, stacks: Tensor) -> Floats32:
        """Return actions [M, 2] in the data's units, as `outputs` reads them."""
        actions = self.outputs(turns, motion, stacks) * self.scale + self.offset
        return np.asarray(actions.numpy(), np.float32)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt().clamp(min=1e-6)


def _train(
    network: _Network,
    learned: _Samples,
    held: _Samples,
    steps: int,
    advance: Callable[[int], object],
) -> _Network:
    """Train, and return the network as it was when it did best on the held-out transitions."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    every = max(1, steps // _VALIDATIONS)
    best, lowest = copy.deepcopy(network), float("inf")
    for step in range(steps):
        position = position_by_steps(step, steps)
        factor = learning_rate_factor(step, position, warmup_steps=_WARMUP_STEPS, floor=0.0)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * factor
        chosen = torch.randint(len(learned.stacks), (_BATCH,))
        version = torch.randint(len(learned.turns), (_BATCH,))[:, None]
        stacks = learned.stacks[chosen]
        # Now and then a transition's own pair stands in for the next, as at a clip's end.
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
        if (step + 1) % every == 0 or step + 1 == steps:
            network.eval()
            with torch.inference_mode():
                output = network.outputs(held.turns, held.motion, held.stacks)
                now = float(network.loss(output, held, slice(None)))
            network.train()
            if now < lowest:
                best, lowest = copy.deepcopy(network), now
    return best


def _stacks(segments: Sequence[tuple[int, int]]) -> tuple[Ints, Ints]:
    """Return the frames t [M] with a next one, and the pairs [M, K] to look at for each."""
    places = [np.arange(begin, stop - 1) for begin, stop in segments]
    around = [
        (frames[:, None] + np.array(_AROUND)).clip(begin, stop - 2)
        for frames, (begin, stop) in zip(places, segments, strict=True)
    ]
    return np.concatenate(places), np.concatenate(around)
