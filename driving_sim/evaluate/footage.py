"""Held-out drives as an evaluation sees them, and the clips of them that are rolled out.

Axes: T context frames, N frames of the future, H W pixels, r c token rows and columns.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.data.actions.action_file import STEERING
from driving_sim.data.arrays import Floats, Floats32, Mask, Pixels, digest
from driving_sim.data.drive import SampledDrive
from driving_sim.data.split import original_id
from driving_sim.data.synthetic.drives import DRIVE_FORMAT, SyntheticDrive
from driving_sim.data.synthetic.true_future import load_synthetic_drive
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.data.video.segments import clipped
from driving_sim.engine.config import load_json
from driving_sim.engine.errors import DriveSimError, TooLittleDataError
from driving_sim.engine.files import sha256_of
from driving_sim.tokenizer.tokenizer import Tokenizer

APART_S = 2.0
"""Frames that are shown for what is worst of them are this far apart: neighbours are alike."""
_SAME_TOKENS = 0.9
"""Share of equal tokens from which two drives of equal times are one, tokenized on two devices."""


def first_frames(drive: DriveTokens, frames: int) -> DriveTokens:
    """A drive's first `frames` alone, or all of it where it is shorter."""
    count = min(frames, len(drive))
    segments = tuple(clipped(drive.entry.segments, 0, count))
    return replace(drive, entry=replace(drive.entry, frames=count, segments=segments))


def frames_apart(ranked: Iterable[int], times_s: Floats, most: int) -> list[int]:
    """The first `most` of ranked frames that lie apart from those before: of a moment only one."""
    chosen: list[int] = []
    for frame in ranked:
        if all(abs(times_s[frame] - times_s[other]) >= APART_S for other in chosen):
            chosen.append(frame)
        if len(chosen) == most:
            break
    return chosen


class HeldOutStore(TokenStore):
    """A token store as a model is measured on it.

    Only the channels that the model learned count as known: it would take others for noise. Drives
    that were stored mirrored are left out, the same footage again.
    """

    def __init__(self, path: Path, known_channels: tuple[bool, bool]) -> None:
        super().__init__(path)
        self.drives = tuple(
            replace(drive, channels=known_channels)
            for drive in self.drives
            if drive.id == original_id(drive.id)
        )
        if not self.drives:
            raise DriveSimError(f"{path} holds mirror images only: name the drives themselves")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Footage:
    """A drive's tokens and actions, and its true frames: recorded, or else reconstructed.

    The tokenizer's reconstructions are as good as a model can get.
    """

    drive: DriveTokens
    tokenizer: Tokenizer
    recorded: SampledDrive | None = None
    """The same frames in the video that the tokens were made of, where it is at hand."""

    def frames(self, begin: int, stop: int, *, in_order: bool = False) -> Pixels:
        """Frames `begin` to `stop`, uint8 [n, H, W, 3], at the tokenizer's size.

        A few are read wherever they are; `in_order` decodes all from the first of them on.
        """
        if self.recorded is None:
            return self.tokenizer.decode(self.drive.tokens[begin:stop]).numpy()
        first, drive = self.drive.entry.start, self.recorded.drive
        indices = self.recorded.indices[first + begin : first + stop]
        size = self.tokenizer.frame_size
        return np.stack([*drive.stream(size, indices)]) if in_order else drive.frames(indices, size)

    @property
    def synthetic(self) -> SyntheticDrive | None:
        """The world that `drivesim synth` wrote beside the video, if it did, to replay it in."""
        video = self.recorded.drive.video if self.recorded is not None else None
        beside = Path(video.path).with_suffix(".json") if video else None
        if beside is None or not beside.is_file():
            return None
        is_ours = load_json(beside).get("format") == DRIVE_FORMAT
        return load_synthetic_drive(beside) if is_ours else None

    @property
    def place(self) -> list[str | int]:
        """The drive's id and where this part of it begins: of very long drives there are many."""
        return [self.drive.id, self.drive.entry.start]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the drive's video (else its tokens), actions and times."""
        if self.recorded is not None:
            return sampled_fingerprint(self.recorded)
        return digest(self.drive.tokens, *clock_and_actions(self.drive))


def sampled_fingerprint(sampled: SampledDrive) -> str:
    """SHA-256, in hexadecimal, of a drive's files, its choice of frames, actions and times."""
    files = map(sha256_of, sampled.drive.reader.files(sampled.indices))
    content = np.frombuffer(hashlib.sha256(bytes.fromhex("".join(files))).digest(), np.uint8)
    clock = sampled.timestamps, sampled.actions, sampled.action_valid, np.array(sampled.segments)
    return digest(content, sampled.indices, *clock)


def clock_and_actions(drive: DriveTokens) -> tuple[NDArray[Any], ...]:
    """All that is stored of a drive but its tokens, for a digest."""
    return drive.timestamps, drive.actions, drive.action_valid, np.array(drive.entry.segments)


def recording_digest(timestamps: Floats, actions: Floats32, valid: Mask) -> str | None:
    """SHA-256, in hexadecimal, of a drive's times and actions, whatever it is called.

    A video and its tokens have the same, and so has the mirror image. None where no known action
    changes: many drives have the same times, and many cars stand.
    """
    known = np.where(valid, actions, np.float32(0))
    known[:, STEERING] = np.abs(known[:, STEERING])
    if not any(np.ptp(known[own, channel]) > 0 for channel, own in enumerate(valid.T) if own.any()):
        return None
    return digest(timestamps, known, valid)


def recording_digests(
    drives: Sequence[DriveTokens | SampledDrive], channels: tuple[bool, bool] = (True, True)
) -> dict[str, str]:
    """The `recording_digest` of drives by their ids, each with all of its parts.

    Only `channels` of the actions count, those that a model learned.
    """
    parts: dict[str, list[DriveTokens | SampledDrive]] = {}
    for drive in drives:
        name = drive.drive.id if isinstance(drive, SampledDrive) else drive.id
        parts.setdefault(name, []).append(drive)
    found = {}
    for name, own in parts.items():
        columns = [(part.timestamps, part.actions, part.action_valid & channels) for part in own]
        if content := recording_digest(*map(np.concatenate, zip(*columns, strict=True))):
            found[name] = content
    return found


def check_apart(heldout: Mapping[str, str], training: TokenStore) -> None:
    """Raise DriveSimError for a drive, of digests by ids, that is in the training tokens too."""
    # A drive comes before its mirror image; named is the drive.
    trained = {own: name for name, own in reversed(recording_digests(training.drives).items())}
    for name, own in heldout.items():
        if own in trained:
            raise _leak(name, trained[own], training)


def check_tokens_apart(heldout: TokenStore, training: TokenStore) -> None:
    """As `check_apart`, by the tokens: for drives without actions, or with another time offset."""
    for drive in heldout.drives:
        for other in training.drives:
            if np.array_equal(drive.timestamps, other.timestamps):
                same = (drive.tokens == other.tokens).mean()
                if same > _SAME_TOKENS:
                    raise _leak(drive.id, other.id, training)


def _leak(name: str, other: str, training: TokenStore) -> DriveSimError:
    called = "" if other == name else f" as {other!r}"
    return DriveSimError(
        f"held-out drive {name!r} is in the training tokens {training.path} too{called}: measure "
        "on drives that were held out"
    )


def footage_of(
    drives: Sequence[DriveTokens], sampled: Sequence[SampledDrive], tokenizer: Tokenizer
) -> list[Footage]:
    """Join the tokens of drives with the videos that they were made of, if any, by their ids."""
    recorded = {each.drive.id: each for each in sampled}
    return [
        Footage(drive=drive, tokenizer=tokenizer, recorded=recorded.get(drive.id))
        for drive in drives
    ]


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
    def context(self) -> Pixels:
        """The context's frames, uint8 [T, H, W, 3]."""
        return self._frames(self.start - self.context_frames, self.start)

    @property
    def truth(self) -> Pixels:
        """The frames that were recorded next, uint8 [N, H, W, 3]."""
        return self._frames(self.start, self.start + self.frames)

    @property
    def context_tokens(self) -> torch.Tensor:
        """int64 [T, r, c]."""
        return self._tokens(self.start - self.context_frames, self.start)

    @property
    def true_tokens(self) -> torch.Tensor:
        """int64 [N, r, c]."""
        return self._tokens(self.start, self.start + self.frames)

    @property
    def actions(self) -> tuple[Floats32, Mask]:
        """Actions and validity [T - 1 + N, 2]: T - 1 within the context, then the future's."""
        first = self.start - self.context_frames
        chosen = slice(first, self.start + self.frames - 1)
        actions, valid = self.footage.drive.actions[chosen], self.footage.drive.action_valid[chosen]
        if self.mirrored:
            actions = actions * np.array([1, -1], np.float32)
        return np.asarray(actions), np.asarray(valid)

    def _tokens(self, begin: int, stop: int) -> torch.Tensor:
        if self.mirrored:
            return self.footage.tokenizer.encode(self._frames(begin, stop))
        return torch.from_numpy(self.footage.drive.tokens[begin:stop].astype(np.int64))

    def _frames(self, begin: int, stop: int) -> Pixels:
        frames = self.footage.frames(begin, stop)
        return np.ascontiguousarray(frames[:, :, ::-1]) if self.mirrored else frames


def choose_clips(
    footage: Sequence[Footage], *, context_frames: int, frames: int, count: int
) -> list[Clip]:
    """Spread `count` clips, or all there are, evenly over the drives by their length.

    No two futures share a frame: clips are independent evidence. No clip crosses a gap. Raises
    DriveSimError where no drive is long enough for one.
    """
    places = [
        Clip(footage=each, start=start, context_frames=context_frames, frames=frames)
        for each in footage
        for begin, stop in each.drive.entry.segments
        # Futures lie end to end.
        for start in range(begin + context_frames, stop - frames + 1, frames)
    ]
    if not places:
        raise TooLittleDataError(
            f"no run of {context_frames + frames} frames without a gap in {len(footage)} held-out "
            "drives (mirror images are none): use longer drives or a shorter future"
        )
    count = min(count, len(places))
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]
