"""Held-out drives as an evaluation sees them, and the clips of them that are rolled out.

Axes: T context frames, N frames of the future, H W pixels, r c token rows and columns.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.data.drive import SampledDrive
from driving_sim.data.synthetic import SyntheticDrive, load_synthetic_drive
from driving_sim.data.synthetic.drives import DRIVE_FORMAT
from driving_sim.data.token_store import DriveTokens
from driving_sim.engine.config import load_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.tokenizer.tokenizer import Tokenizer

Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Footage:
    """A drive's tokens and actions, and its true frames: recorded, or else reconstructed."""

    drive: DriveTokens
    tokenizer: Tokenizer
    recorded: SampledDrive | None = None
    """The same frames in the video that the tokens were made of, where it is at hand."""
    synthetic: SyntheticDrive | None = None
    """The world to replay a synthetic drive in, where it is one."""

    def frames(self, begin: int, stop: int) -> Frames:
        """Frames `begin` to `stop`, uint8 [n, H, W, 3], at the tokenizer's size."""
        if self.recorded is None:
            return self.reconstructed(begin, stop)
        first = self.drive.entry.start
        indices = self.recorded.indices[first + begin : first + stop]
        return self.recorded.drive.frames(indices, self.tokenizer.frame_size)

    def reconstructed(self, begin: int, stop: int) -> Frames:
        """The tokenizer's reconstructions of the same frames: as good as a model can get."""
        return self.tokenizer.decode(self.drive.tokens[begin:stop]).numpy()

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the drive's video (else its tokens), actions and times."""
        if self.recorded is not None:
            return sampled_fingerprint(self.recorded)
        return digest(self.drive.tokens, self.drive.actions, self.drive.timestamps)


def sampled_fingerprint(sampled: SampledDrive) -> str:
    """SHA-256, in hexadecimal, of a drive's video file, if it is one, its actions and times."""
    video = sampled.drive.video
    content = b""
    if video is not None:
        with video.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    arrays = (sampled.indices, sampled.actions, sampled.timestamps)
    return digest(np.frombuffer(content, np.uint8), *arrays)


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256, in hexadecimal, of the arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def recorded_footage(
    drives: Sequence[DriveTokens], sampled: Sequence[SampledDrive], tokenizer: Tokenizer
) -> list[Footage]:
    """Join the tokens of drives with the videos that they were made of, by the drives' ids."""
    by_id = {each.drive.id: each for each in sampled}
    return [
        Footage(
            drive=drive,
            tokenizer=tokenizer,
            recorded=by_id[drive.id],
            synthetic=_synthetic(by_id[drive.id]),
        )
        for drive in drives
    ]


def _synthetic(sampled: SampledDrive) -> SyntheticDrive | None:
    """The world that `drivesim synth` wrote beside a video, if it did."""
    video = sampled.drive.video
    beside = Path(video.path).with_suffix(".json") if video else None
    if beside is None or not beside.is_file():
        return None
    saved = load_json(beside)
    is_ours = isinstance(saved, dict) and saved.get("format") == DRIVE_FORMAT
    return load_synthetic_drive(beside) if is_ours else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """A piece of a drive: a context and the future that was recorded after it."""

    footage: Footage
    start: int
    """The first frame of the future."""
    context_frames: int
    frames: int
    """Of the future."""
    mirrored: bool = False
    """Flipped left to right, with steering negated."""

    @property
    def name(self) -> str:
        """The drive, the time of the last context frame and whether it is mirrored."""
        time = self.footage.drive.timestamps[self.start - 1]
        return f"{self.footage.drive.id} at {time:.1f} s{' mirrored' if self.mirrored else ''}"

    @property
    def context(self) -> Frames:
        """The context's frames, uint8 [T, H, W, 3]."""
        return self._flip(self.footage.frames(self.start - self.context_frames, self.start))

    @property
    def truth(self) -> Frames:
        """The frames that were recorded next, uint8 [N, H, W, 3]."""
        return self._flip(self.footage.frames(self.start, self.start + self.frames))

    @property
    def context_tokens(self) -> torch.Tensor:
        """int64 [T, r, c]."""
        return self._tokens(self.start - self.context_frames, self.start)

    @property
    def true_tokens(self) -> torch.Tensor:
        """int64 [N, r, c]."""
        return self._tokens(self.start, self.start + self.frames)

    @property
    def actions(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Actions and validity [T - 1 + N, 2]: T - 1 within the context, then the future's."""
        first = self.start - self.context_frames
        chosen = slice(first, self.start + self.frames - 1)
        actions, valid = self.footage.drive.actions[chosen], self.footage.drive.action_valid[chosen]
        if self.mirrored:
            actions = actions * np.array([1, -1], np.float32)
        return np.asarray(actions), np.asarray(valid)

    def _tokens(self, begin: int, stop: int) -> torch.Tensor:
        if self.mirrored:
            frames = self._flip(self.footage.frames(begin, stop))
            return self.footage.tokenizer.encode(frames)
        return torch.from_numpy(self.footage.drive.tokens[begin:stop].astype(np.int64))

    def _flip(self, frames: Frames) -> Frames:
        return np.ascontiguousarray(frames[:, :, ::-1]) if self.mirrored else frames


def choose_clips(
    footage: Sequence[Footage], *, context_frames: int, frames: int, count: int
) -> list[Clip]:
    """Spread `count` clips (or all there are) evenly over where the drives have them.

    A clip crosses no gap. Raises DriveSimError where no drive is long enough for one.
    """
    places = list(_places(footage, context_frames, frames))
    if not places:
        needed = context_frames + frames
        raise DriveSimError(
            f"no run of {needed} frames without a gap in {len(footage)} held-out drives: use "
            "longer drives or a shorter future"
        )
    count = min(count, len(places))
    chosen = [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]
    return [
        Clip(footage=each, start=start, context_frames=context_frames, frames=frames)
        for each, start in chosen
    ]


def _places(
    footage: Sequence[Footage], context_frames: int, frames: int
) -> Iterator[tuple[Footage, int]]:
    for each in footage:
        for begin, stop in each.drive.entry.segments:
            for start in range(begin + context_frames, stop - frames + 1):
                yield each, start
