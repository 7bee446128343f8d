"""Bits per token, frame by frame: how well a model predicts drives that it has not seen.

Axes: n windows or frames, B batch, V variants of the actions, N frames of a run without a gap,
W frames of context, P = rows * cols tokens of a frame, r c rows and columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from driving_sim.data.tokens.store import DriveTokens
from driving_sim.data.tokens.windows import WindowIndex
from driving_sim.engine.errors import TooLittleDataError
from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class TokenBits:
    """One value per token of B frames, on the model's device."""

    bits: Tensor
    """[B, P]: minus the logarithm of the probability that the token had, its surprise."""
    right: Tensor
    """Bool [B, P], whether it was the model's most probable one."""
    confidence: Tensor
    """[B, P], the probability of the model's most probable one."""

    @classmethod
    def judge(cls, logits: Tensor, tokens: Tensor) -> Self:
        """Judge tokens [B, P] under logits [B, P, K]."""
        log_probs = logits.float().log_softmax(-1)
        bits = -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / math.log(2)
        return cls(bits, logits.argmax(-1) == tokens, log_probs.amax(-1).exp())

    def means(self) -> NDArray[np.float64]:
        """Mean bits and accuracy of each frame, [2, B]."""
        means = torch.stack([self.bits.mean(-1), self.right.float().mean(-1)])
        return means.double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class FrameBits:
    """One value per frame, in the drives' order: blocks of neighbours can be resampled."""

    drive: NDArray[np.int64]
    """[n], the drive's place in the sequence that was given."""
    frame: NDArray[np.int64]
    """[n], the frame's number in its drive."""
    bits: NDArray[np.float64]
    """[n], mean bits per token of the frame."""
    accuracy: NDArray[np.float64]
    """[n], share of tokens that were the model's most probable ones."""

    @property
    def mean(self) -> float:
        """Bits per token over all frames."""
        return float(self.bits.mean())


class FullWindows:
    """Every window of `frames` frames: each has one frame to judge, its last, and W-1 behind it.

    Raises `DriveSimError` where no drive is as long as a window.
    """

    def __init__(self, drives: Sequence[DriveTokens], *, frames: int, stride: int = 1) -> None:
        self.index = WindowIndex(drives, frames=frames, stride=stride)
        if not len(self.index):
            raise TooLittleDataError(
                f"no run of {frames} frames without a gap in {len(drives)} drives: nothing to "
                "measure; use longer drives"
            )
        self.drives, self.frames = drives, frames
        self.drive, start = self.index.places(np.arange(len(self.index)))
        self.frame = start + frames - 1

    def __len__(self) -> int:
        return len(self.index)

    def last_frames(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens [n, P] of the judged frames and of the frames before them."""
        pairs = [
            self.drives[drive].tokens[frame - 1 : frame + 1].astype(np.int64)
            for drive, frame in zip(self.drive, self.frame, strict=True)
        ]
        tokens = rearrange(np.stack(pairs), "n two r c -> two n (r c)")
        return tokens[1], tokens[0]

    def judged(self, bits: NDArray[np.float64], accuracy: NDArray[np.float64]) -> FrameBits:
        """Attach values [n] to the windows' judged frames."""
        return FrameBits(self.drive, self.frame, bits, accuracy)


@contextmanager
def _frozen(model: Transformer) -> Iterator[None]:
    """Without gradients and dropout."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def bits_per_token(
    model: Transformer,
    windows: FullWindows,
    *,
    batch_size: int = 4,
    advance: Callable[[int], object] = lambda frames: None,
    watch: Callable[[TokenBits], object] = lambda judged: None,
) -> FrameBits:
    """Judge the last frame of every window, recomputing each window as training does.

    `advance` is called with the number of frames judged since, `watch` with their tokens, in the
    windows' order.
    """
    device = model.source.device
    found = []
    with _frozen(model):
        tables = model.tables()
        for at in range(0, len(windows), batch_size):
            numbers = np.arange(at, min(at + batch_size, len(windows)))
            batch = windows.index.load(numbers)
            tokens = rearrange(batch["tokens"], "b t r c -> b t (r c)").to(device)
            before = batch["previous"].masked_fill(
                ~batch["has_previous"][:, None, None], model.grid.codebook_size
            )
            hidden = model.window_hidden(
                tables,
                tokens,
                rearrange(before, "b r c -> b (r c)").to(device),
                batch["actions"].to(device),
                batch["action_valid"].to(device),
            )
            judged = TokenBits.judge(F.linear(hidden[:, -1], tables.output), tokens[:, -1])
            found.append(judged.means())
            watch(judged)
            advance(len(tokens))
    return windows.judged(*np.concatenate(found, axis=1))


def streamed_bits(
    model: Transformer,
    drive: DriveTokens,
    begin: int,
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Judge frames `begin` to `begin + N` of a drive as a rollout would meet them: [V, N].

    Each goes through the ring cache once and nothing is recomputed, so that from frame W on the
    cache holds what its frames saw of frames that have left. `actions` [V, N, 2] are V variants of
    the drive's own, `actions[:, t]` leading from frame t of these to frame t + 1, and `valid`
    [V, N, 2] says which are known.
    """
    tokens = drive.tokens[begin : begin + actions.shape[1]]
    frames = streamed_token_bits(model, tokens, actions, valid)
    return np.stack([frame.means()[0] for frame in frames], axis=1)


def streamed_bits_per_token(
    model: Transformer,
    drives: Sequence[DriveTokens],
    *,
    first: int = 0,
    stop: int | None = None,
    advance: Callable[[int], object] = lambda drives: None,
) -> FrameBits:
    """Judge frames `first` to `stop` of every run without a gap as a rollout would meet them.

    Each run starts afresh, at its frame 0; runs of `first` frames or fewer are left out. `advance`
    is called with the number of drives judged since.
    """
    places: list[tuple[int, int]] = []
    found: list[NDArray[np.float64]] = [np.empty((2, 0))]
    for number, drive in enumerate(drives):
        for begin, end in drive.entry.segments:
            if end - begin <= first:
                continue
            last = end if stop is None else min(begin + stop, end)
            actions = drive.actions[None, begin:last]
            valid = drive.action_valid[None, begin:last]
            frames = streamed_token_bits(model, drive.tokens[begin:last], actions, valid)
            found += [frame.means() for frame in frames][first:]
            places += [(number, frame) for frame in range(begin + first, last)]
        advance(1)
    drive_n, frame_n = np.array(places, np.int64).reshape(-1, 2).T
    return FrameBits(drive_n, frame_n, *np.concatenate(found, axis=1))


def streamed_token_bits(
    model: Transformer,
    tokens: Iterable[ArrayLike],
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> Iterator[TokenBits]:
    """Judge the tokens of a run without a gap, frame after frame, as a rollout would meet them.

    `tokens` are N frames [r, c], taken one at a time: memory does not grow with their number.
    `actions` and `valid` [V, N, 2] are as in `streamed_bits`; B is V.
    """
    device, none = model.source.device, model.grid.codebook_size
    led, known = np.zeros_like(actions[:, 0]), np.zeros_like(valid[:, 0])
    with _frozen(model):
        tables = model.tables()
        cache = RingCache(model, tables, len(actions))
        before = torch.full((len(actions), model.order.tokens), none, device=device)
    led_NVA, known_NVA = (rearrange(each, "v n a -> n v a") for each in (actions, valid))
    for frame, next_led, next_known in zip(tokens, led_NVA, known_NVA, strict=True):
        values = (np.asarray(frame).astype(np.int64).ravel(), np.array(led), np.array(known))
        # Frozen for each frame anew: between two of them the caller's own code runs.
        with _frozen(model):
            one, *action = (torch.from_numpy(value).to(device) for value in values)
            tokens_VP = one.expand(len(actions), -1)
            judged = TokenBits.judge(encode_frame(cache, tokens_VP, before, *action), tokens_VP)
        yield judged
        before, led, known = tokens_VP, next_led, next_known
