"""Read held-out drives for an evaluation, and choose the clips that the model rolls out.

Axes: T context frames, N frames of the future, H W pixels, r c token rows and columns.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.data.actions.action_log import STEERING
from driving_sim.data.arrays import Floats, Floats32, Ints, Mask, Pixels, digest
from driving_sim.data.drive import SampledDrive
from driving_sim.data.split import original_id
from driving_sim.data.synthetic.drives import SyntheticDrive
from driving_sim.data.synthetic.true_future import synthetic_beside
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.data.video.segments import clipped
from driving_sim.engine.errors import DriveSimError, TooLittleDataError
from driving_sim.engine.files import sha256_of
from driving_sim.tokenizer.tokenizer import Tokenizer

APART_S = 2.0
"""Minimum time in s between frames that are shown together; closer frames look alike."""
_SAME_TOKENS = 0.9
"""Share of equal tokens above which two drives with the same timestamps are the same recording.

The share may be below 1, because two devices tokenize the same video a little differently.
"""


def first_frames(drive: DriveTokens, frames: int) -> DriveTokens:
    """Return a drive's first `frames` frames, or the entire drive if it is shorter."""
    count = min(frames, len(drive))
    segments = tuple(clipped(drive.entry.segments, 0, count))
    return replace(drive, entry=replace(drive.entry, frames=count, segments=segments))


def frames_apart(ranked: Iterable[int], times_s: Floats, most: int) -> list[int]:
    """Choose up to `most` frames, best first, that are at least `APART_S` apart.

    `ranked` lists the indices of frames, best first. `times_s` is the time of every frame of the
    drive.
    """
    chosen: list[int] = []
    for frame in ranked:
        if all(abs(times_s[frame] - times_s[better]) >= APART_S for better in chosen):
            chosen.append(frame)
        if len(chosen) == most:
            break
    return chosen


class HeldOutStore(TokenStore):
    """A token store of held-out drives, prepared for measuring a model.

    Action channels that the model never learned are marked as unknown, because the model cannot
    use them. Mirror images are left out, because they show the same footage again.
    """

    def __init__(self, path: Path, known_channels: tuple[bool, bool]) -> None:
        super().__init__(path)
        self.drives = tuple(
            replace(drive, channels=known_channels)
            for drive in self.drives
            if drive.id == original_id(drive.id)
        )
        if not self.drives:
            raise DriveSimError(
                f"{path}: contains only mirror images; name a store that contains the original "
                "drives"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Footage:
    """A drive's tokens and actions, with the true frames that rollouts are compared with.

    The true frames come from the recorded video. Without a video they are the tokenizer's
    reconstructions, which are the best frames that a world model could produce.
    """

    drive: DriveTokens
    tokenizer: Tokenizer
    recorded: SampledDrive | None = None
    """The sampled video that the tokens were made from, or None without a video."""

    def frames(self, begin: int, stop: int, *, in_order: bool = False) -> Pixels:
        """Return the frames from `begin` up to `stop`, uint8 [n, H, W, 3], at the tokenizer's size.

        By default the video reader seeks to each frame, which is fast for a few frames. With
        `in_order` it decodes the video from frame `begin` onwards, which is fast for many frames.
        """
        if self.recorded is None:
            return self.tokenizer.decode(self.drive.tokens[begin:stop]).numpy()
        if in_order:
            return np.stack([*self.stream(begin, stop)])
        indices = self._indices(self.recorded, begin, stop)
        return self.recorded.drive.frames(indices, self.tokenizer.frame_size)

    def stream(self, begin: int, stop: int) -> Iterator[Pixels]:
        """Yield the recorded frames from `begin` up to `stop`, uint8 [H, W, 3], if there are any.

        Without a video, yield nothing.
        """
        if self.recorded is not None:
            indices = self._indices(self.recorded, begin, stop)
            yield from self.recorded.drive.stream(self.tokenizer.frame_size, indices)

    def _indices(self, recorded: SampledDrive, begin: int, stop: int) -> Ints:
        first = self.drive.entry.start
        return recorded.indices[first + begin : first + stop]

    @property
    def synthetic(self) -> SyntheticDrive | None:
        """The simulated drive that the video shows, or None if `drivesim synth` did not make it.

        It is loaded from the JSON file beside the video. It can be replayed with other actions.
        """
        video = self.recorded.drive.video if self.recorded is not None else None
        return synthetic_beside(Path(video.path)) if video else None

    @property
    def place(self) -> list[str | int]:
        """The drive's id, and the index in the drive of this footage's first frame.

        A very long drive is split into several parts, which have the same id.
        """
        return [self.drive.id, self.drive.entry.start]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the drive's actions and times, and of its video or else its tokens."""
        if self.recorded is not None:
            return sampled_fingerprint(self.recorded)
        return digest(self.drive.tokens, *clock_and_actions(self.drive))


def sampled_fingerprint(sampled: SampledDrive) -> str:
    """Return the SHA-256 (hex) of a drive's video files, frame indices, actions and times."""
    files = map(sha256_of, sampled.drive.reader.files(sampled.indices))
    content = np.frombuffer(hashlib.sha256(bytes.fromhex("".join(files))).digest(), np.uint8)
    clock = sampled.timestamps, sampled.actions, sampled.action_valid, np.array(sampled.segments)
    return digest(content, sampled.indices, *clock)


def clock_and_actions(drive: DriveTokens) -> tuple[NDArray[Any], ...]:
    """Return everything stored for a drive except its tokens, as arrays to hash."""
    return drive.timestamps, drive.actions, drive.action_valid, np.array(drive.entry.segments)


def recording_digest(timestamps: Floats, actions: Floats32, valid: Mask) -> str | None:
    """Return the SHA-256 (hex) of a drive's times and actions, to recognise a renamed recording.

    A video, its tokens and its mirror image all have the same digest. Returns None if no known
    action ever changes, as with a parked car: two such drives could have equal times and actions.
    """
    known = np.where(valid, actions, np.float32(0))
    known[:, STEERING] = np.abs(known[:, STEERING])
    varies = (
        np.ptp(known[mask, channel]) > 0 for channel, mask in enumerate(valid.T) if mask.any()
    )
    if not any(varies):
        return None
    return digest(timestamps, known, valid)


def recording_digests(
    drives: Sequence[DriveTokens | SampledDrive], channels: tuple[bool, bool] = (True, True)
) -> dict[str, str]:
    """Return the `recording_digest` of every drive, by drive id.

    The parts of a split drive have one digest together. `channels` says whether to use speed and
    steering; a channel that is not used counts as unknown. Drives without a digest are left out.
    """
    parts: dict[str, list[DriveTokens | SampledDrive]] = {}
    for drive in drives:
        name = drive.drive.id if isinstance(drive, SampledDrive) else drive.id
        parts.setdefault(name, []).append(drive)
    digests = {}
    for name, pieces in parts.items():
        columns = [(part.timestamps, part.actions, part.action_valid & channels) for part in pieces]
        if content := recording_digest(*map(np.concatenate, zip(*columns, strict=True))):
            digests[name] = content
    return digests


def check_apart(heldout: Mapping[str, str], training: TokenStore) -> None:
    """Raise DriveSimError if a held-out drive is also in the training tokens.

    `heldout` is the result of `recording_digests` for the held-out drives.
    """
    # A drive comes before its mirror image and has the same digest. Insert the drives in reverse
    # order, so the drive overwrites its mirror image and the error names the drive.
    digests = recording_digests(training.drives)
    trained = {content: name for name, content in reversed(digests.items())}
    for name, content in heldout.items():
        if content in trained:
            raise _leak(name, trained[content], training)


def check_tokens_apart(heldout: TokenStore, training: TokenStore) -> None:
    """Raise DriveSimError if a held-out drive has almost the same tokens as a training drive.

    This finds drives that `check_apart` misses, because they have no actions or because their
    actions were read with another time offset.
    """
    for drive in heldout.drives:
        for trained in training.drives:
            if np.array_equal(drive.timestamps, trained.timestamps):
                same = (drive.tokens == trained.tokens).mean()
                if same > _SAME_TOKENS:
                    raise _leak(drive.id, trained.id, training)


def _leak(name: str, trained_name: str, training: TokenStore) -> DriveSimError:
    alias = "" if trained_name == name else f" as {trained_name!r}"
    return DriveSimError(
        f"{training.path}: the training tokens contain the held-out drive {name!r}{alias}; "
        "evaluate on drives that were not trained on"
    )


def footage_of(
    drives: Sequence[DriveTokens], sampled: Sequence[SampledDrive], tokenizer: Tokenizer
) -> list[Footage]:
    """Pair the tokens of each drive with the sampled video of the same id, if there is one."""
    recorded = {video.drive.id: video for video in sampled}
    return [
        Footage(drive=drive, tokenizer=tokenizer, recorded=recorded.get(drive.id))
        for drive in drives
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """A piece of a drive: context frames, followed by the future that was recorded."""

    footage: Footage
    start: int
    """Index of the first frame of the future."""
    context_frames: int
    frames: int
    """Number of frames in the future."""
    mirrored: bool = False
    """Whether the frames are flipped left to right and the steering is negated."""

    @property
    def name(self) -> str:
        """The drive's id, the time of the last context frame, and "mirrored" if the clip is."""
        time = self.footage.drive.timestamps[self.start - 1]
        return f"{self.footage.drive.id} at {time:.1f} s{' mirrored' if self.mirrored else ''}"

    @property
    def context(self) -> Pixels:
        """The context frames, uint8 [T, H, W, 3]."""
        return self._frames(self.start - self.context_frames, self.start)

    @property
    def truth(self) -> Pixels:
        """The true frames of the future, uint8 [N, H, W, 3]."""
        return self._frames(self.start, self.start + self.frames)

    @property
    def context_tokens(self) -> torch.Tensor:
        """The tokens of the context frames, int64 [T, r, c]."""
        return self._tokens(self.start - self.context_frames, self.start)

    @property
    def true_tokens(self) -> torch.Tensor:
        """The tokens of the true future, int64 [N, r, c]."""
        return self._tokens(self.start, self.start + self.frames)

    @property
    def actions(self) -> tuple[Floats32, Mask]:
        """Actions and their validity, [T - 1 + N, 2] each.

        The first T - 1 actions lie within the context. The next N lead to the frames of the future.
        """
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
    footage: Sequence[Footage], *, context_frames: int, frames: int, count: int | None = None
) -> list[Clip]:
    """Choose up to `count` clips, spread evenly over all possible clips of the drives.

    The choice depends only on the drives and the numbers given. Without `count`, return all clips.

    No two futures share a frame, so the clips are independent. No clip crosses a time gap.
    Raises TooLittleDataError if no drive is long enough for a clip.
    """
    places = [
        Clip(footage=source, start=start, context_frames=context_frames, frames=frames)
        for source in footage
        for begin, stop in source.drive.entry.segments
        # The step is the length of a future, so each future begins where the last one ended.
        for start in range(begin + context_frames, stop - frames + 1, frames)
    ]
    if not places:
        raise TooLittleDataError(
            f"no stretch of {context_frames + frames} frames without a gap in {len(footage)} "
            "held-out drives (mirror images do not count); use longer drives or a shorter future"
        )
    return places if count is None else evenly(places, count)


def evenly(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Return up to `count` of the clips, evenly spread."""
    count = min(count, len(clips))
    return [clips[(2 * number + 1) * len(clips) // (2 * count)] for number in range(count)]
