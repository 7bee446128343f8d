"""Bits per token, frame by frame: how well a model predicts drives that it has not seen.

The functions expect a frozen transformer, such as that of a `WorldModel`. A segment is a part of a
drive without missing frames.

Axes: n windows or frames, B batch, V variants of the actions, N frames of a segment,
W frames of context, P = rows * cols tokens of a frame, r c rows and columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import ArrayLike
from torch import Tensor

from driving_sim.data.arrays import Floats, Floats32, Ints, Mask
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.data.tokens.windows import WindowIndex
from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class TokenBits:
    """How well the model predicted each token of B frames. Tensors are on the model's device."""

    bits: Tensor
    """[B, P]: surprise of each token, which is minus log2 of its probability."""
    right: Tensor
    """Bool [B, P]: whether the token was the model's most probable one."""
    confidence: Tensor
    """[B, P]: probability of the model's most probable token."""

    @classmethod
    def judge(cls, logits: Tensor, tokens: Tensor) -> Self:
        """Measure how well logits [B, P, K] predict tokens [B, P]."""
        log_probs = logits.float().log_softmax(-1)
        bits = -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / math.log(2)
        return cls(bits, logits.argmax(-1) == tokens, log_probs.amax(-1).exp())

    def means(self) -> Floats:
        """Return the mean bits and the accuracy of each frame, [2, B]."""
        means = torch.stack([self.bits.mean(-1), self.right.float().mean(-1)])
        return means.double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class FrameBits:
    """How well the model predicted n frames. Frames are sorted by drive and time."""

    drive: Ints
    """[n]: index of each frame's drive in the list of drives."""
    frame: Ints
    """[n]: index of each frame in its drive."""
    bits: Floats
    """[n]: mean bits per token of each frame."""
    accuracy: Floats
    """[n]: share of each frame's tokens that were the model's most probable ones."""

    @property
    def mean(self) -> float:
        """Mean bits per token of all frames."""
        return float(self.bits.mean())


class FullWindows(WindowIndex):
    """Windows of `frames` frames. Only the last frame is measured; the rest are its context."""

    def __init__(self, drives: Sequence[DriveTokens], *, frames: int, stride: int = 1) -> None:
        super().__init__(drives, frames=frames, stride=stride)
        self.drive, start, _ = self.places(np.arange(len(self)))
        self.frame = start + frames - 1

    def last_frames(self) -> tuple[Ints, Ints]:
        """Return the tokens [n, P] of the windows' last frames and of the frames before these."""
        pairs = [
            self._drives[drive].tokens[frame - 1 : frame + 1].astype(np.int64)
            for drive, frame in zip(self.drive, self.frame, strict=True)
        ]
        tokens = rearrange(np.stack(pairs), "n two r c -> two n (r c)")
        return tokens[1], tokens[0]

    def judged(self, bits: Floats, accuracy: Floats) -> FrameBits:
        """Return the windows' last frames as `FrameBits`, given their `bits` and `accuracy` [n]."""
        return FrameBits(self.drive, self.frame, bits, accuracy)


@torch.inference_mode()
def bits_per_token(
    model: Transformer,
    windows: FullWindows,
    *,
    batch_size: int = 4,
    advance: Callable[[int], object] = lambda frames: None,
    watch: Callable[[TokenBits], object] = lambda judged: None,
) -> FrameBits:
    """Measure how well a model predicts the last frame of every window.

    As in training, one pass computes a whole window, without a cache.
    After every batch, calls `advance` with the number of windows in the batch, and `watch` with the
    `TokenBits` of their last frames.
    """
    device, tables = model.source.device, model.tables()
    means = []
    for at in range(0, len(windows), batch_size):
        batch = windows.load(np.arange(at, min(at + batch_size, len(windows))))
        batch = {name: value.to(device) for name, value in batch.items()}
        hidden = model.window_hidden(tables, **batch)
        logits = F.linear(hidden[:, -1], tables.output)
        judged = TokenBits.judge(logits, batch["tokens"][:, -1].flatten(1))
        means.append(judged.means())
        watch(judged)
        advance(len(hidden))
    return windows.judged(*np.concatenate(means, axis=1))


def streamed_bits_per_token(
    model: Transformer,
    drives: Sequence[DriveTokens],
    *,
    first: int = 0,
    stop: int | None = None,
    advance: Callable[[int], object] = lambda drives: None,
) -> FrameBits:
    """Measure how well a model predicts the frames of every segment.

    As in a rollout, frames are computed one by one with a cache, which is empty at the beginning of
    each segment. The result contains only frames `first` to `stop` (exclusive) of each segment,
    counted from 0. Segments of at most `first` frames are skipped. Calls `advance(1)` after every
    drive.
    """
    rows: list[tuple[float, ...]] = []
    for number, drive in enumerate(drives):
        for begin, end in drive.entry.segments:
            if end - begin <= first:
                continue
            last = end if stop is None else min(begin + stop, end)
            actions, valid = drive.actions[None, begin:last], drive.action_valid[None, begin:last]
            run = streamed_token_bits(model, drive.tokens[begin:last], actions, valid)
            judged = [(number, begin + t, *frame.means()[:, 0]) for t, frame in enumerate(run)]
            rows += judged[first:]
        advance(1)
    drive_n, frame_n, bits, accuracy = np.array(rows, np.float64).reshape(-1, 4).T
    return FrameBits(drive_n.astype(np.int64), frame_n.astype(np.int64), bits, accuracy)


@torch.inference_mode()
def streamed_token_bits(
    model: Transformer,
    tokens: Iterable[ArrayLike],
    actions: Floats32,
    valid: Mask,
) -> Iterator[TokenBits]:
    """Measure how well a model predicts each token of a segment.

    As in a rollout, frames are computed one by one with a cache. `tokens` are N frames [r, c], read
    one at a time, so memory does not grow with N. `actions` [V, N, 2] are V variants of the
    segment's actions; `actions[:, t]` lead from frame t to frame t + 1.
    `valid` [V, N, 2] says which actions are known. Yields one `TokenBits` for each frame, with a
    batch size of V.

    The keys and values of a frame are computed once and never updated. From frame W on, they
    therefore still contain information from frames that have left the cache.
    """
    device, variants = model.source.device, len(actions)
    cache = RingCache(model, model.tables(), variants)
    before = torch.full((variants, model.order.tokens), model.grid.codebook_size, device=device)
    # Shift the actions by one frame; the action that leads to the first frame is unknown.
    led = [
        torch.from_numpy(np.pad(rearrange(x, "v n a -> n v a")[:-1], ((1, 0), (0, 0), (0, 0))))
        for x in (actions, valid)
    ]
    for frame, *action in zip(tokens, *led, strict=True):
        tokens_P = torch.from_numpy(np.asarray(frame).astype(np.int64).ravel()).to(device)
        tokens_VP = tokens_P.expand(variants, -1)
        logits = encode_frame(cache, tokens_VP, before, *(x.to(device) for x in action))
        yield TokenBits.judge(logits, tokens_VP)
        before = tokens_VP
