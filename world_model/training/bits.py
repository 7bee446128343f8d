"""Bits per token, frame by frame: how well a model predicts drives that it has not seen.

Models are judged as they are given: frozen, as a `WorldModel` holds its transformer.

Axes: n windows or frames, B batch, V variants of the actions, N frames of a run without a gap,
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

    def means(self) -> Floats:
        """Mean bits and accuracy of each frame, [2, B]."""
        means = torch.stack([self.bits.mean(-1), self.right.float().mean(-1)])
        return means.double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class FrameBits:
    """One value per frame, in the drives' order: blocks of neighbours can be resampled."""

    drive: Ints
    """[n], the drive's place in the sequence that was given."""
    frame: Ints
    """[n], the frame's number in its drive."""
    bits: Floats
    """[n], mean bits per token of the frame."""
    accuracy: Floats
    """[n], share of tokens that were the model's most probable ones."""

    @property
    def mean(self) -> float:
        """Bits per token over all frames."""
        return float(self.bits.mean())


class FullWindows(WindowIndex):
    """Every window of `frames` frames: each has one frame to judge, its last, and W-1 behind it."""

    def __init__(self, drives: Sequence[DriveTokens], *, frames: int, stride: int = 1) -> None:
        super().__init__(drives, frames=frames, stride=stride)
        self.drive, start, _ = self.places(np.arange(len(self)))
        self.frame = start + frames - 1

    def last_frames(self) -> tuple[Ints, Ints]:
        """Return the tokens [n, P] of the judged frames and of the frames before them."""
        pairs = [
            self._drives[drive].tokens[frame - 1 : frame + 1].astype(np.int64)
            for drive, frame in zip(self.drive, self.frame, strict=True)
        ]
        tokens = rearrange(np.stack(pairs), "n two r c -> two n (r c)")
        return tokens[1], tokens[0]

    def judged(self, bits: Floats, accuracy: Floats) -> FrameBits:
        """Attach values [n] to the windows' judged frames."""
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
    """Judge the last frame of every window, recomputing each window as training does.

    `advance` is called with the number of frames judged since, `watch` with their tokens, in the
    windows' order.
    """
    device, tables = model.source.device, model.tables()
    found = []
    for at in range(0, len(windows), batch_size):
        batch = windows.load(np.arange(at, min(at + batch_size, len(windows))))
        batch = {name: value.to(device) for name, value in batch.items()}
        hidden = model.window_hidden(tables, **batch)
        logits = F.linear(hidden[:, -1], tables.output)
        judged = TokenBits.judge(logits, batch["tokens"][:, -1].flatten(1))
        found.append(judged.means())
        watch(judged)
        advance(len(hidden))
    return windows.judged(*np.concatenate(found, axis=1))


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
    found: list[tuple[float, ...]] = []
    for number, drive in enumerate(drives):
        for begin, end in drive.entry.segments:
            if end - begin <= first:
                continue
            last = end if stop is None else min(begin + stop, end)
            actions, valid = drive.actions[None, begin:last], drive.action_valid[None, begin:last]
            run = streamed_token_bits(model, drive.tokens[begin:last], actions, valid)
            judged = [(number, begin + t, *frame.means()[:, 0]) for t, frame in enumerate(run)]
            found += judged[first:]
        advance(1)
    drive_n, frame_n, bits, accuracy = np.array(found, np.float64).reshape(-1, 4).T
    return FrameBits(drive_n.astype(np.int64), frame_n.astype(np.int64), bits, accuracy)


@torch.inference_mode()
def streamed_token_bits(
    model: Transformer,
    tokens: Iterable[ArrayLike],
    actions: Floats32,
    valid: Mask,
) -> Iterator[TokenBits]:
    """Judge the tokens of a run without a gap, frame after frame, as a rollout would meet them.

    Each frame goes through the ring cache once and nothing is recomputed, so that from frame W on
    the cache holds what its frames saw of frames that have left. `tokens` are N frames [r, c],
    taken one at a time: memory does not grow with their number. `actions` [V, N, 2] are V variants
    of the run's own, `actions[:, t]` leading from frame t to frame t + 1, and `valid` [V, N, 2]
    says which are known; B is V.
    """
    device, variants = model.source.device, len(actions)
    cache = RingCache(model, model.tables(), variants)
    before = torch.full((variants, model.order.tokens), model.grid.codebook_size, device=device)
    # Nothing that is known leads to the first frame.
    led = [
        torch.from_numpy(np.pad(rearrange(each, "v n a -> n v a")[:-1], ((1, 0), (0, 0), (0, 0))))
        for each in (actions, valid)
    ]
    for frame, *action in zip(tokens, *led, strict=True):
        one = torch.from_numpy(np.asarray(frame).astype(np.int64).ravel()).to(device)
        tokens_VP = one.expand(variants, -1)
        logits = encode_frame(cache, tokens_VP, before, *(each.to(device) for each in action))
        yield TokenBits.judge(logits, tokens_VP)
        before = tokens_VP
