"""Drive in a world model: step frame by frame, fork, save, restore and rewind.

Axes: F futures, r c token rows and columns, H W pixels, A = 2 channels (speed, steering).
"""

import copy
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from driving_sim.data.arrays import Pixels
from driving_sim.engine.errors import DriveSimError, is_out_of_memory
from driving_sim.engine.progress import say
from driving_sim.engine.threads import adjust_threads
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import CHANNELS, ActionStatistics, with_validity
from driving_sim.world_model.cache import Cache
from driving_sim.world_model.sampling.draw_waves import FrameSample, FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling

HISTORY_S = 30.0
"""How far back a session can be rewound by default, in s."""
_Inputs = tuple[Tensor, Tensor, Sampling]
"""The actions [F, 2] that led to a frame, whether they are valid [F, 2], and how it was drawn."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Encoded contexts, from which any number of futures can start."""

    cache: Cache
    last: Tensor
    """Tokens of each context's last frame, [C, r * c]."""


class Drivable(Protocol):
    """What a session needs of a `WorldModel`."""

    tokenizer: Tokenizer
    fps: float
    device: torch.device
    known_channels: tuple[bool, bool]
    said_beyond: set[str]

    def encode_prefix(
        self,
        tokens: Tensor,
        past_actions: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        last_frame: int | None = None,
    ) -> Prefix:
        """Encode contexts whose last frame gets the number `last_frame`."""


@dataclass(frozen=True, eq=False)
class Frame(FrameSample):
    """The next frame of each future, with its tokens and their probabilities."""

    seconds: float
    """Time that it took to generate the tokens, in s; decoding them into pixels is extra."""
    tokenizer: Tokenizer = field(repr=False)

    @cached_property
    def pixels(self) -> Pixels:
        """The pictures, uint8 [F, H, W, 3]. They are decoded when they are first asked for."""
        return self.tokenizer.decode(self.tokens).numpy()


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """A stretch of the past: a state of the sampler, and what led to the frames after it.

    The state is never stepped, only copied. Drawing the frames again from it gives the same tokens,
    because the random numbers depend only on the seed and the number of the frame.
    """

    start: FrameSampler
    frame: int
    """Number of frames driven before the segment."""
    inputs: list[_Inputs]

    def copy(self, frames: int | None = None) -> "_Segment":
        """Return a segment that ends after `frames` of its frames, by default after all."""
        return _Segment(self.start, self.frame, self.inputs[:frames])


@dataclass(frozen=True, slots=True, eq=False)
class SavedSession:
    """A moment of a session, made by `Session.save`."""

    now: _Segment
    past: tuple[_Segment, ...]
    sampling: Sampling


class Session:
    """F futures that are driven together, one action at a time; made by `WorldModel.drive`.

    The same actions and seed give the same tokens as a rollout. `fork` tries another future and
    keeps this one; `rewind` goes back.
    """

    def __init__(
        self, world: Drivable, sampler: FrameSampler, *, history_s: float = HISTORY_S
    ) -> None:
        """Drive on from the state of `sampler`, which the session takes over."""
        if not 0 <= history_s < math.inf:
            raise DriveSimError(f"history_s {history_s:g}: give a finite time of 0 s or more")
        self.world = world
        self.fps = world.fps
        """Frames per second."""
        self.frame = 0
        """Number of frames driven so far."""
        self._history = round(history_s * world.fps)
        self._sampler: FrameSampler | None = sampler
        self._sampling = sampler.sampling
        self._segments: deque[_Segment] = deque()
        self._begin_segment()

    def __enter__(self) -> Self:
        """Return the session; `close` it when the `with` block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session and free its memory. Using it afterwards raises DriveSimError."""
        self._sampler = None
        self._segments.clear()

    @property
    def _now(self) -> FrameSampler:
        if self._sampler is None:
            raise DriveSimError("this session has ended; start a new one with `world.drive`")
        return self._sampler

    @property
    def has_ended(self) -> bool:
        """Whether the session was closed, or a step failed."""
        return self._sampler is None

    @property
    def futures(self) -> int:
        """Number of futures, F."""
        return len(self._now.samples)

    @property
    def tokens(self) -> Tensor:
        """Tokens of the current frame of each future, int64 [F, r, c]."""
        grid = self._now.model.grid
        return self._now.passes.tokens[: self.futures].view(-1, grid.rows, grid.cols).clone()

    @property
    def pixels(self) -> Pixels:
        """Pictures of the current frame of each future, uint8 [F, H, W, 3]."""
        return self.world.tokenizer.decode(self.tokens).numpy()

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn: temperature, truncation, guidance and seed. Can be set anytime.

        It holds for the next frame on. If guidance begins, its second stream of unknown actions
        branches off the past that was driven.
        """
        _ = self._now
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        _ = self._now
        self._sampling = sampling

    @property
    def rewindable_s(self) -> float:
        """How many seconds `rewind` can go back."""
        return self._rewindable / self.fps

    @property
    def _rewindable(self) -> int:
        return min(sum(len(segment.inputs) for segment in self._segments), self._history)

    def step(self, action: ArrayLike, valid: ArrayLike | None = None) -> Frame:
        """Drive one frame further: return the frame of each future that the action leads to.

        `action` is [2] for all futures or [F, 2]: speed in m/s, and steering in the unit of the
        model's steering kind (rad, or 1/m for curvature), left positive. NaN means unknown, and so
        does False in `valid`, of the same shape. An action beyond those of the training data is
        allowed, and said once for each model. Raises DriveSimError for an infinite action or an
        ended session. A step that is interrupted, or that runs out of memory, ends the session.
        If only new sampling settings need too much memory, the old ones stay.
        """
        device = self.world.device
        actions, known = self._checked(self._now, action, valid)
        try:
            with _memory_for("another stream"):
                sampler = self._sampler = _resampled(self._now, self._sampling)
        except DriveSimError:
            self._sampling = self._now.sampling
            raise
        adjust_threads(device)
        began = time.perf_counter()
        try:
            with _memory_for("the next frame, so this session has ended"):
                sample = sampler.step(actions, known)
                self.frame += 1
                self._remember((actions, known, self._sampling))
        except BaseException:
            self.close()  # the cache is half written
            raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Frame(
            sample.tokens,
            sample.log_probs,
            sample.sampling_log_probs,
            sample.entropy,
            seconds=time.perf_counter() - began,
            tokenizer=self.world.tokenizer,
        )

    def fork(self, branches: int = 1) -> Self:
        """Return a session that goes on from here independently, with the same past.

        With compiled passes, the two share one cache until they drive on. With several `branches`,
        the fork has branches * F futures: future b * F + f goes on from future f, with the same
        random numbers in every branch, and cannot be rewound to before the fork. Its tokens may
        differ from those of a single fork where rounding decides.
        """
        if branches < 1:
            raise ValueError(f"branches={branches}: must be at least 1")
        fork = copy.copy(self)
        with _memory_for("a fork"):
            fork._sampler = self._now.copy() if branches == 1 else self._now.branched(branches)
        fork._segments = deque()
        if branches == 1:
            fork._segments.extend(segment.copy() for segment in self._segments)
        else:
            fork._begin_segment()
        return fork

    def save(self) -> SavedSession:
        """Return the current moment and its past, for `restore`."""
        with _memory_for("a saved session"):
            now = _Segment(self._now.copy(), self.frame, [])
        past = tuple(segment.copy() for segment in self._segments)
        return SavedSession(now, past, self._sampling)

    def restore(self, saved: SavedSession) -> None:
        """Go back to a moment saved by this session or by one of the same model and futures."""
        start = saved.now.start
        if start.model is not self._now.model:
            raise DriveSimError("the saved session is of another model; restore it in one of its")
        if len(start.samples) != self.futures:
            raise DriveSimError(
                f"the saved session has {len(start.samples)} futures, this one {self.futures}; "
                "restore it in the session that saved it, or in a fork of that"
            )
        self._go_to(saved.now)
        self._sampling = saved.sampling
        if self._history:
            self._segments = deque(segment.copy() for segment in saved.past)
            self._forget()
            if not self._segments:
                self._begin_segment()

    def rewind(self, seconds: float) -> None:
        """Go back in time, exact to the last token; sampling settings go back too.

        Raises DriveSimError if the session remembers less (see `rewindable_s`).
        """
        _ = self._now
        frames = round(seconds * self.fps) if math.isfinite(seconds) else -1
        if not 0 <= frames <= self._rewindable:
            raise DriveSimError(
                f"`seconds` {seconds:g}: this session can go back {self.rewindable_s:g} s; choose "
                "a time from 0 to that, or start the session with a longer history"
            )
        if frames == 0:
            return
        segments = [segment.copy() for segment in self._segments]
        while frames > len(segments[-1].inputs):
            frames -= len(segments.pop().inputs)
        segments[-1] = segments[-1].copy(len(segments[-1].inputs) - frames)
        self._go_to(segments[-1])
        self._segments = deque(segments)

    def restart(
        self,
        futures: Sequence[int],
        tokens: Tensor,
        past_actions: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        draws: Sequence[int],
    ) -> None:
        """Let some of the futures begin again, each from a context of its own; the rest drive on.

        Takes the contexts as `encode_prefix` does: `tokens` int64 [C, T, r, c] and the actions
        [C, T - 1, 2] between them, one for each of the C `futures`. T must be at least 2 (W - 1)
        for a window of W frames, and the session itself needs W - 1 frames behind it.
        `draws` are the numbers of their random numbers, as in `drive`.
        """
        cache = self._now.passes.cache
        if cache.frame - cache.first + 2 < cache.frames:
            raise DriveSimError(
                f"this session has less than {cache.frames - 1} frames behind it, so none of its "
                "futures can begin again; start it from a longer context"
            )
        if not len(futures) == len(tokens) == len(draws):
            raise ValueError(
                f"{len(futures)} futures, {len(tokens)} contexts and {len(draws)} draws: must be "
                "as many of each"
            )
        with _memory_for("another context"):
            prefix = self.world.encode_prefix(tokens, past_actions, valid, last_frame=cache.frame)
            rows, samples = torch.tensor(futures), torch.tensor(draws)
            try:
                self._now.restart(rows, prefix.cache, prefix.last, samples)
                self._begin_segment()
            except BaseException:
                self.close()  # the cache is half written
                raise

    def _go_to(self, segment: _Segment) -> None:
        """Continue from the end of a segment, whose frames are drawn again."""
        with _memory_for("an earlier moment"):
            sampler = segment.start.copy()
            for actions, known, sampling in segment.inputs:
                sampler = _resampled(sampler, sampling)
                sampler.step(actions, known)
        self._sampler, self._sampling = sampler, sampler.sampling
        self.frame = segment.frame + len(segment.inputs)

    def _begin_segment(self) -> None:
        if not self._history:
            return
        if self._segments and not self._segments[-1].inputs:
            self._segments.pop()
        self._segments.append(_Segment(self._now.copy(), self.frame, []))

    def _remember(self, inputs: _Inputs) -> None:
        """Add a frame to the past. The cache is kept once for every full turn of its ring."""
        if not self._history:
            return
        self._segments[-1].inputs.append(inputs)
        if len(self._segments[-1].inputs) == self._now.passes.cache.frames:
            self._begin_segment()
        self._forget()

    def _forget(self) -> None:
        """Drop the oldest segments while those after them reach back far enough."""
        remembered = sum(len(segment.inputs) for segment in self._segments)
        while self._segments and remembered - len(self._segments[0].inputs) >= self._history:
            remembered -= len(self._segments.popleft().inputs)

    def _checked(
        self, sampler: FrameSampler, action: ArrayLike, valid: ArrayLike | None
    ) -> tuple[Tensor, Tensor]:
        """Return an action as float32 [F, 2], and whether it is valid [F, 2]."""
        values, known = with_validity("action", action, valid)
        shape = (self.futures, len(CHANNELS))
        if values.shape not in (shape, shape[1:]):
            raise ValueError(f"action of shape {tuple(values.shape)}: must be [2] or {list(shape)}")
        inputs = values.expand(shape), known.expand(shape)
        self._say_beyond(sampler.model.statistics, *inputs)
        return inputs[0].to(self.world.device), inputs[1].to(self.world.device)

    def _say_beyond(self, statistics: ActionStatistics, values: Tensor, known: Tensor) -> None:
        """Say once for each channel that an action is beyond those of the training data."""
        if statistics.lowest is None or statistics.highest is None:
            return
        bounds = zip(CHANNELS, statistics.lowest, statistics.highest, strict=True)
        for channel, (name, low, high) in enumerate(bounds):
            if not self.world.known_channels[channel]:
                continue  # the model takes no notice of it
            given = values[known[:, channel], channel]
            beyond = given[(given < low) | (given > high)]
            if len(beyond) and name not in self.world.said_beyond:
                self.world.said_beyond.add(name)
                say(
                    f"{name} {float(beyond[0]):g} is beyond what the model was trained on "
                    f"({low:.3g} to {high:.3g}), so what it shows may be wrong"
                )


def _resampled(sampler: FrameSampler, sampling: Sampling) -> FrameSampler:
    """Return a sampler that goes on with these settings; it is the same one if it has them."""
    return sampler if sampling == sampler.sampling else sampler.resampled(sampling)


@contextmanager
def _memory_for(what: str) -> Iterator[None]:
    """Turn an error of the allocator into a DriveSimError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DriveSimError(
            f"out of memory: there is no room for {what}; close other sessions or drive fewer "
            "futures"
        ) from error
