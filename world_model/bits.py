"""Bits per token, frame by frame: how well a model predicts drives that it has not seen.

Axes: n windows or frames, B batch, W frames of context, P = rows * cols tokens of a frame.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.data.token_store import DriveTokens
from driving_sim.data.token_windows import WindowIndex, load_windows
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.transformer import Transformer


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

    `actions` [n, W, 2] and `action_valid` [n, W, 2] lead to the windows' frames; a caller may
    permute copies of them and hand those to `bits_per_token`. Raises `DriveSimError` where no
    drive is as long as a window.
    """

    def __init__(self, drives: Sequence[DriveTokens], *, frames: int, stride: int = 1) -> None:
        index = WindowIndex(drives, frames=frames, stride=stride)
        if not len(index):
            raise DriveSimError(
                f"no run of {frames} frames without a gap in {len(drives)} drives: nothing to "
                "measure; use longer drives"
            )
        self.drives, self.frames = drives, frames
        self.windows = [index[number] for number in range(len(index))]
        self.drive = np.array([window.drive for window in self.windows], np.int64)
        self.frame = np.array([window.start + frames - 1 for window in self.windows], np.int64)
        batches = [self.batch(slice(at, at + 64)) for at in range(0, len(self), 64)]
        self.actions = np.concatenate([batch["actions"].numpy() for batch in batches])
        self.action_valid = np.concatenate([batch["action_valid"].numpy() for batch in batches])

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, chosen: slice) -> dict[str, Tensor]:
        """Load some of the windows, as `TokenWindows` does."""
        return load_windows(self.drives, self.windows[chosen], self.frames)

    def last_frames(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens [n, P] of the judged frames and of the frames before them."""
        pairs = [
            self.drives[window.drive].tokens[frame - 1 : frame + 1].astype(np.int64)
            for window, frame in zip(self.windows, self.frame, strict=True)
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
    actions: NDArray[np.float32] | None = None,
    action_valid: NDArray[np.bool_] | None = None,
    batch_size: int = 4,
    advance: Callable[[int], object] = lambda frames: None,
) -> FrameBits:
    """Judge the last frame of every window, recomputing each window as training does.

    `actions` and `action_valid` [n, W, 2] replace the windows' own (shuffled ones, say). `advance`
    is called with the number of frames judged since.
    """
    actions = windows.actions if actions is None else actions
    action_valid = windows.action_valid if action_valid is None else action_valid
    device = model.source.device
    found = []
    with _frozen(model):
        tables = model.tables()
        for at in range(0, len(windows), batch_size):
            chosen = slice(at, at + batch_size)
            batch = windows.batch(chosen)
            tokens = rearrange(batch["tokens"], "b t r c -> b t (r c)").to(device)
            before = batch["previous"].masked_fill(
                ~batch["has_previous"][:, None, None], model.grid.codebook_size
            )
            hidden = model.window_hidden(
                tables,
                tokens,
                rearrange(before, "b r c -> b (r c)").to(device),
                torch.from_numpy(actions[chosen]).to(device),
                torch.from_numpy(action_valid[chosen]).to(device),
            )
            found.append(_judge(F.linear(hidden[:, -1], tables.output), tokens[:, -1]))
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
    with _frozen(model):
        frames = _streamed(model, drive, begin, actions, valid)
        return np.stack([bits for bits, _ in frames], axis=1)


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
    with _frozen(model):
        for number, drive in enumerate(drives):
            for begin, end in drive.entry.segments:
                if end - begin <= first:
                    continue
                last = end if stop is None else min(begin + stop, end)
                actions = drive.actions[None, begin:last]
                valid = drive.action_valid[None, begin:last]
                found += list(_streamed(model, drive, begin, actions, valid))[first:]
                places += [(number, frame) for frame in range(begin + first, last)]
            advance(1)
    drive_n, frame_n = np.array(places, np.int64).reshape(-1, 2).T
    return FrameBits(drive_n, frame_n, *np.concatenate(found, axis=1))


def _streamed(
    model: Transformer,
    drive: DriveTokens,
    begin: int,
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> Iterator[NDArray[np.float64]]:
    """Yield bits and accuracy [2, V] of one frame after the other."""
    variants, count, _ = actions.shape
    device, none = model.source.device, model.grid.codebook_size
    tables = model.tables()
    cache = RingCache(model, variants, device, tables.output.dtype)
    previous = torch.full((variants, model.order.tokens), none, device=device)
    led, known = np.zeros((variants, 2), np.float32), np.zeros((variants, 2), np.bool_)
    for t in range(count):
        frame = drive.tokens[begin + t].astype(np.int64).ravel()
        values = (np.tile(frame, (variants, 1)), np.array(led), np.array(known))
        tokens, *action = (torch.from_numpy(value).to(device) for value in values)
        hidden = encode_frame(model, tables, cache, tokens, previous, *action)
        yield _judge(F.linear(hidden, tables.output), tokens)
        previous, led, known = tokens, actions[:, t], valid[:, t]


def _judge(logits: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Return mean bits and accuracy [2, B] of tokens [B, P] under logits [B, P, K]."""
    log_probs = logits.float().log_softmax(-1)
    bits = -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / math.log(2)
    right = logits.argmax(-1) == tokens
    return torch.stack([bits.mean(-1), right.float().mean(-1)]).double().cpu().numpy()
