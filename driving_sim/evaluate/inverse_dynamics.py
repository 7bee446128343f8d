"""An inverse-dynamics probe: the speed and steering that pictures show.

It learns from real footage and then reads rollouts, so that what they did can be compared with what
they were told. It must measure the motion, not guess from the road ahead what a driver would do: a
rollout that follows the road and ignores its commands would else pass for obedient. So the network
sees nothing but how the features of neighbouring frames correlate at small displacements
(FlowNet's correlation layer, arXiv 1504.06852): how things moved, not what they are.

Legend: T frames of a clip, F frames of all clips, M transitions of all clips, B of a batch,
K frames of a stack, N = B (K - 1) pairs of neighbours in stacks, C channels, H rows, W columns,
D displacements, A = 2 channels of an action.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.schedule import learning_rate_factor, position_by_steps
from driving_sim.evaluate.following import balanced_sign_accuracy

Frames = NDArray[np.uint8]

STANDING_MPS = 1.0
"""The steering of a slower car does not show: it is neither learned nor judged."""

_CHANNELS = {"speed": SPEED, "steering": STEERING}
_MIRROR = torch.tensor([1.0, -1.0])
"""What becomes of speed and steering in a mirror."""

_STACK = (-1, 0, 1, 2)
"""The frames that the estimate from t to t + 1 looks at, beside t."""
# Frames are seen at this size, whatever they come in: blur and blocks of a decoder matter little.
_ROWS, _COLUMNS = 64, 128
_DETAIL_SIGMA = 6.0
_FAINTEST_DETAIL = 4.0
_FEATURES, _WIDTH = 24, 48
_ACROSS, _UP, _DOWN = 6, 1, 2
"""Displacements at a quarter of the size; the ground comes nearer, so it moves down."""
_SHARPNESS = 3.0
_DROPOUT = 0.3

_BATCH = 48
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 30
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
_VALIDATIONS = 12
_VALIDATED_TRANSITIONS = 512
_BLUR_SIGMA = 1.5
_CONTRAST = 0.3
_EDGE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeClip:
    """Frames and the actions that lead from each to the next; of any size and aspect."""

    frames: Frames
    """uint8 RGB [T, H, W, 3]."""
    actions: NDArray[np.float32]
    """[T, 2] speed in m/s and steering, the mean from each frame to the next."""
    action_valid: NDArray[np.bool_]
    """[T, 2] where the actions are known."""
    segments: Sequence[tuple[int, int]]
    """Ranges [begin, stop) of frames that follow each other without a gap."""

    def __post_init__(self) -> None:
        _check_frames(self.frames)
        count = len(self.frames)
        for name in ("actions", "action_valid"):
            shape = getattr(self, name).shape
            if shape != (count, 2):
                raise ValueError(f"{name} is {list(shape)}; it must be [{count}, 2], as the frames")
        for begin, stop in self.segments:
            if not 0 <= begin <= stop <= count:
                raise ValueError(f"segment {begin}..{stop} is not within {count} frames")


class InverseDynamics:
    """Estimates speed and steering from frames at the rate of those that it learned from.

    Mirrored frames give the same speed and exactly the negated steering, so that it leans to
    neither side.
    """

    look_back = 1 - min(_STACK)
    """Frames before a future that its first estimate looks at."""

    def __init__(self, network: "_Network") -> None:
        self._network = network.eval().requires_grad_(False)
        digest = hashlib.sha256(_RECIPE.encode())
        digest.update(self.to_bytes())
        self.fingerprint = digest.hexdigest()
        """SHA-256, in hexadecimal, of all that the estimates depend on."""

    @classmethod
    def fit(
        cls,
        training: Sequence[ProbeClip],
        validation: Sequence[ProbeClip],
        *,
        steps: int = 600,
        seed: int = 0,
        advance: Callable[[int], object] = lambda steps: None,
    ) -> "InverseDynamics":
        """Learn from clips of one frame rate and kind of steering; keep what is best on others.

        Reconstructions of the same drives are more clips. The result is a function of the clips,
        `steps` and `seed`; `advance` is called with the number of steps done since the last call.
        Channels that no clip has are not learned. Raises DriveSimError where none has any.
        """
        learned, held = _Samples.of(training), _Samples.of(validation)
        if not (learned.known.any() and held.known.any()):
            which = "validation" if learned.known.any() else "training"
            raise DriveSimError(
                f"no two neighbouring frames of the probe's {which} drives have a known action: "
                "use drives with speed or steering"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network()
            network.standardise(learned)
            return cls(_train(network, learned, held.thinned(), steps, advance))

    @classmethod
    def load(cls, path: Path) -> "InverseDynamics":
        """Read a file of `to_bytes`; raises DriveSimError where it is not one."""
        network = _Network()
        try:
            network.load_state_dict(load(path.read_bytes()))
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DriveSimError(
                f"{path}: not an inverse-dynamics probe of this version ({reason}); train it anew"
            ) from error
        return cls(network)

    def to_bytes(self) -> bytes:
        """Return the probe as a safetensors file."""
        return save(
            {name: value.contiguous() for name, value in self._network.state_dict().items()}
        )

    def estimate(
        self, frames: Frames, segments: Sequence[tuple[int, int]] | None = None
    ) -> NDArray[np.float32]:
        """Estimate the action [T - 1, 2] from each frame to the next, of uint8 [T, H, W, 3].

        The estimate from t to t + 1 looks at frames t - 1 to t + 2; where there is none, at the
        clip's end or a segment's, the last one before it stands in. NaN between segments, and in
        channels that were not learned.
        """
        _check_frames(frames)
        segments = [(0, len(frames))] if segments is None else segments
        found = np.full((max(len(frames) - 1, 0), 2), np.nan, np.float32)
        places, stacks = _stacks(segments)
        if len(places):
            found[places] = _predict(self._network, _grey(frames), torch.from_numpy(stacks)).numpy()
        return found

    def errors(
        self, clips: Sequence[ProbeClip], *, curve: float | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Measure the estimates of clips, by channel, beside a constant: the training clips' mean.

        `curve` is the |steering| above which its sign is judged, by default half of the training
        clips' root mean square. None is what cannot be told from these clips.
        """
        samples = _Samples.of(clips)
        estimated = _predict(self._network, samples.grey, samples.stacks).numpy()
        curve = 0.5 * float(self._network.scale[STEERING]) if curve is None else curve
        found: dict[str, dict[str, float | None]] = {}
        for name, channel in _CHANNELS.items():
            known = samples.known[:, channel].numpy() & ~np.isnan(estimated[:, channel])
            truth = samples.actions[known, channel].numpy().astype(np.float64)
            found[name] = _errors(
                estimated[known, channel],
                truth,
                constant=float(self._network.mean[channel]),
                curve=curve if channel == STEERING else None,
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Samples:
    """The transitions of clips that have an action."""

    grey: Tensor
    """float16 [F, 64, 128]."""
    stacks: Tensor
    """int64 [M, K] frames around each transition."""
    actions: Tensor
    """float32 [M, 2]."""
    known: Tensor
    """bool [M, 2] where the action is known and shows."""

    @classmethod
    def of(cls, clips: Sequence[ProbeClip]) -> "_Samples":
        grey = [torch.zeros(0, _ROWS, _COLUMNS, dtype=torch.float16)]
        stacks = [np.zeros((0, len(_STACK)), np.int64)]
        actions, known = [np.zeros((0, 2), np.float32)], [np.zeros((0, 2), np.bool_)]
        begin = 0
        for clip in clips:
            places, around = _stacks(clip.segments)
            shows = clip.action_valid & _shows(clip.actions, clip.action_valid)
            kept = shows[places].any(axis=1)
            grey.append(_grey(clip.frames))
            stacks.append(begin + around[kept])
            actions.append(clip.actions[places[kept]])
            known.append(shows[places[kept]])
            begin += len(clip.frames)
        return cls(
            grey=torch.cat(grey),
            stacks=torch.from_numpy(np.concatenate(stacks)),
            actions=torch.from_numpy(np.concatenate(actions)),
            known=torch.from_numpy(np.concatenate(known)),
        )

    def thinned(self) -> "_Samples":
        """Return at most 512 of the transitions, spread evenly."""
        count = len(self.stacks)
        kept = torch.linspace(0, count - 1, min(count, _VALIDATED_TRANSITIONS)).round().long()
        return _Samples(
            grey=self.grey,
            stacks=self.stacks[kept],
            actions=self.actions[kept],
            known=self.known[kept],
        )


class _Network(nn.Module):
    """Detail [B, K, H, W] to speed and steering [B, A], in units of the data's spread."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((2,), torch.nan))
        self.register_buffer("scale", torch.ones(2))
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(16, _FEATURES, 3, stride=2, padding=1),
        )
        displacements = (2 * _ACROSS + 1) * (_UP + 1 + _DOWN)
        self.motion = nn.Sequential(
            *_layer((len(_STACK) - 1) * displacements, kernel=1, stride=1),
            *_layer(_WIDTH, kernel=3, stride=2),
            *_layer(_WIDTH, kernel=3, stride=2),
            nn.Flatten(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_WIDTH * (_ROWS // 16) * (_COLUMNS // 16), 64),
            nn.GELU(),
            nn.Linear(64, 2),
        )

    def standardise(self, samples: _Samples) -> None:
        """Learn in units of the spread; steering about 0, so that left and right are alike."""
        for channel in _CHANNELS.values():
            values = samples.actions[samples.known[:, channel], channel]
            if len(values):
                self.mean[channel] = values.mean()
                centre = 0.0 if channel == STEERING else values.mean()
                self.scale[channel] = (values - centre).square().mean().sqrt().clamp(min=1e-3)

    @property
    def offset(self) -> Tensor:
        """What an output of 0 means; NaN in channels that were not learned."""
        return self.mean * torch.tensor([1.0, 0.0])

    def forward(self, detail: Tensor) -> Tensor:
        """Average over the picture and its mirror image."""
        return (self._read(detail) + _MIRROR * self._read(detail.flip(-1))) / 2

    def _read(self, detail: Tensor) -> Tensor:
        frames = rearrange(detail, "b k h w -> (b k) 1 h w")
        features = functional.normalize(self.features(frames), dim=1)
        features = rearrange(features, "(b k) c h w -> b k c h w", k=len(_STACK))
        before, after = (
            rearrange(part, "b k c h w -> (b k) c h w")
            for part in (features[:, :-1], features[:, 1:])
        )
        motion = rearrange(_correlation(before, after), "(b k) d h w -> b (k d) h w", b=len(detail))
        read: Tensor = self.motion(_SHARPNESS * motion)
        return read


def _layer(channels: int, *, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, _WIDTH, kernel, stride=stride, padding=kernel // 2)
    return convolution, nn.GroupNorm(8, _WIDTH), nn.GELU()


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """Products [N, D, H, W] of features [N, C, H, W] with the displaced ones of the next frame."""
    rows, columns = before.shape[-2:]
    padded = functional.pad(after, (_ACROSS, _ACROSS, _UP, _DOWN))
    return torch.stack(
        [
            (before * padded[..., down : down + rows, right : right + columns]).sum(dim=1)
            for down in range(_UP + 1 + _DOWN)
            for right in range(2 * _ACROSS + 1)
        ],
        dim=1,
    )


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
        seen = _varied(learned.grey[_cut_short(learned.stacks[chosen])].float())
        loss = _loss(
            network, network(_detail(seen)), learned.actions[chosen], learned.known[chosen]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
        optimizer.step()
        advance(1)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = _validate(network, held)
            if now < lowest:
                best, lowest = copy.deepcopy(network), now
    return best


def _loss(network: _Network, output: Tensor, actions: Tensor, known: Tensor) -> Tensor:
    """Huber loss in units of the spread, each channel's mean over what is known of it."""
    # The offset of a channel that was not learned is NaN: none of it may reach a gradient.
    wanted = torch.where(known, (actions - network.offset) / network.scale, 0.0)
    losses = known * functional.smooth_l1_loss(output, wanted, reduction="none")
    return (losses.sum(dim=0) / known.sum(dim=0).clamp(min=1)).sum()


def _validate(network: _Network, held: _Samples) -> float:
    network.eval()
    with torch.inference_mode():
        output = _outputs(network, held.grey, held.stacks)
        loss = _loss(network, output, held.actions, held.known)
    network.train()
    return float(loss)


def _outputs(network: _Network, grey: Tensor, stacks: Tensor) -> Tensor:
    parts = [network(_detail(grey[part].float())) for part in torch.split(stacks, _BATCH)]
    return torch.cat([torch.zeros(0, 2), *parts])


@torch.inference_mode()
def _predict(network: _Network, grey: Tensor, stacks: Tensor) -> Tensor:
    """Return actions [M, 2] in the data's units."""
    actions: Tensor = _outputs(network, grey, stacks) * network.scale + network.offset
    return actions


def _cut_short(stacks: Tensor) -> Tensor:
    """Now and then let frame t + 1 stand in for those after it, as at a clip's end."""
    ends = torch.rand(len(stacks), 1) < _EDGE_SHARE
    last = stacks[:, _STACK.index(1), None]
    return torch.where(ends, stacks.minimum(last), stacks)


def _varied(grey: Tensor) -> Tensor:
    """Vary contrast and blur of [B, K, H, W]: reconstructions and rollouts are softer than life."""
    stacks, frames = grey.shape[:2]
    blur = torch.rand(stacks, 1, 1, 1) * torch.rand(stacks, frames, 1, 1)
    contrast = 1 + _CONTRAST * (2 * torch.rand(stacks, 1, 1, 1) - 1)
    return contrast * torch.lerp(grey, _blurred(grey, _BLUR_SIGMA), blur)


def _stacks(segments: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the frames t [M] with a next one, and the frames [M, K] to look at for each."""
    places = [np.zeros(0, np.int64)]
    around = [np.zeros((0, len(_STACK)), np.int64)]
    for begin, stop in segments:
        first = np.arange(begin, max(stop - 1, begin))
        places.append(first)
        around.append((first[:, None] + np.array(_STACK)).clip(begin, stop - 1))
    return np.concatenate(places), np.concatenate(around)


def _shows(actions: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where the pictures can tell the actions [T, 2]: not the steering of a car that stands."""
    stands = valid[:, SPEED] & (actions[:, SPEED] < STANDING_MPS)
    return np.stack([np.ones_like(stands), ~stands], axis=1)


def _check_frames(frames: Frames) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames of shape {frames.shape} and {frames.dtype}: must be uint8 [T, H, W, 3]"
        )


def _grey(frames: Frames) -> Tensor:
    """Frames [T, H, W, 3] as grey levels, float16 [T, 64, 128]."""
    parts = [torch.zeros(0, _ROWS, _COLUMNS, dtype=torch.float16)]
    for part in torch.split(torch.from_numpy(np.ascontiguousarray(frames)), _BATCH):
        # A sum of bytes is exact in any order: a mirrored picture gives mirrored levels.
        light = reduce(part.float(), "t h w c -> t 1 h w", "sum")
        small = functional.interpolate(light, (_ROWS, _COLUMNS), mode="area")
        parts.append((small[:, 0] / 3).half())
    return torch.cat(parts)


@cache
def _blur_matrix(length: int, sigma: float) -> Tensor:
    """Gaussian weights [length, length] of the neighbours of each place; each row sums to 1."""
    places = torch.arange(length, dtype=torch.float32)
    return torch.softmax(-((places[:, None] - places) / sigma).square() / 2, dim=1)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [..., H, W]."""
    return _blur_matrix(images.shape[-2], sigma) @ images @ _blur_matrix(images.shape[-1], sigma).T


def _detail(grey: Tensor) -> Tensor:
    """Grey levels [..., H, W] minus their surroundings, at equal contrast everywhere.

    A change of light then changes nothing, and a bright kerb weighs no more than a faint hill.
    """
    detail = grey - _blurred(grey, _DETAIL_SIGMA)
    return detail / (_blurred(detail.square(), _DETAIL_SIGMA).sqrt() + _FAINTEST_DETAIL)


def _errors(
    estimated: NDArray[np.float32],
    truth: NDArray[np.float64],
    *,
    constant: float,
    curve: float | None,
) -> dict[str, float | None]:
    """Errors of estimates [M] of one channel, and those of a constant."""
    if not len(truth):
        return dict.fromkeys(_ERRORS)
    error, spread = estimated - truth, truth - truth.mean()
    varies = float(np.abs(spread).max()) > 0 and float(np.ptp(estimated)) > 0
    return {
        "transitions": len(truth),
        "mean_absolute_error": float(np.abs(error).mean()),
        "constant_mean_absolute_error": float(np.abs(truth - constant).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "constant_rmse": float(np.sqrt(np.square(truth - constant).mean())),
        "r_squared": 1 - float(np.square(error).sum() / np.square(spread).sum())
        if varies
        else None,
        "correlation": float(np.corrcoef(estimated, truth)[0, 1]) if varies else None,
        "sign_accuracy": (
            None if curve is None else balanced_sign_accuracy(truth, estimated, curve)
        ),
    }


_ERRORS = (
    "transitions",
    "mean_absolute_error",
    "constant_mean_absolute_error",
    "rmse",
    "constant_rmse",
    "r_squared",
    "correlation",
    "sign_accuracy",
)
_RECIPE = f"{_STACK} {_ROWS} {_COLUMNS} {_DETAIL_SIGMA} {_FAINTEST_DETAIL} {_SHARPNESS}"
