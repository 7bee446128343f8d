"""The token store: drives as tokens and actions, in shards, for training and evaluation.

A folder of `index.json`, `shard-00000.safetensors`, `shard-00001.safetensors` and so on. The index
says what the store holds, with counts and checksums, and what was skipped and why. A drive too long
for one shard is split into parts (`start` is where a part begins in its drive).
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.token_shard import TokenShard
from driving_sim.engine.config import from_dict, load_json
from driving_sim.engine.errors import DriveSimError

SCHEMA = 1
INDEX = "index.json"
UNFINISHED = ".unfinished"  # the writer's folder inside a store that is not complete yet

_OPEN_SHARDS = 128  # each costs a file descriptor


def shard_name(number: int) -> str:
    """The file name of a store's shard."""
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreInfo:
    """What is the same for every drive of a store."""

    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that made the tokens."""
    rows: int
    """Token rows per frame."""
    cols: int
    """Token columns per frame."""
    codebook_size: int
    """Every token is below this."""
    fps: float
    """Median rate of the frames chosen, in frames per second."""
    steering_kind: str | None = None
    """What the steering column means, one kind for all drives; None where no drive has actions."""
    levels: tuple[int, ...] = ()
    """The tokenizer's FSQ levels."""
    height: int | None = None
    """Height of the frames that were encoded, in pixels."""
    width: int | None = None
    """Width of the frames that were encoded, in pixels."""
    requested_fps: float | None = None
    """The rate asked for, in frames per second, where one was."""
    every: int | None = None
    """The stride over the video's frames asked for, where one was."""
    transform: dict[str, Any] = field(default_factory=dict)
    """How frames were resized, cropped and converted."""

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "codebook_size", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.codebook_size > 2**16:
            raise ValueError(f"codebook_size must be at most 65536, got {self.codebook_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DriveEntry:
    """One drive, or one part of a very long one, as the index lists it."""

    id: str
    """The drive's id; a mirrored drive's ends in `~mirror`."""
    frames: int
    """Frames of it in this shard."""
    segments: tuple[tuple[int, int], ...]
    """[start, stop) runs of frames without a gap in time, counted within this entry."""
    start: int = 0
    """Where this part begins in its drive; 0 but for the later parts of a split drive."""
    source: str = ""
    """The kind of data source it came from."""
    mirrored: bool = False
    """Whether the frames are flipped and the steering negated."""

    def __post_init__(self) -> None:
        bounds = [bound for segment in self.segments for bound in segment]
        if bounds != sorted(bounds) or any(not 0 <= bound <= self.frames for bound in bounds):
            raise ValueError(f"segments must rise within 0 and {self.frames}")
        if self.frames < 1 or self.start < 0:
            raise ValueError(f"frames and start must not be {self.frames} and {self.start}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as the index lists it."""

    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file."""
    drives: tuple[DriveEntry, ...]
    """The drives in it, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedDrive:
    """A drive that was left out."""

    id: str
    """The drive's id."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreIndex:
    """The contents of `index.json`."""

    schema: int
    """Version of the store's format."""
    plan: str
    """Hash of the plan that the store was written from."""
    info: StoreInfo
    """What is the same for every drive."""
    drives: int
    """Number of drives, parts of one counted once."""
    frames: int
    """Number of frames."""
    shards: tuple[ShardEntry, ...]
    """The shards, in order."""
    skipped: tuple[SkippedDrive, ...]
    """The drives that were left out."""


def shard_metadata(info: StoreInfo, drives: Sequence[DriveEntry]) -> dict[str, str]:
    """What a shard's header says of itself, so that a shard is usable without the index."""
    return {
        "schema": str(SCHEMA),
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
        "codebook_size": str(info.codebook_size),
        "fps": repr(info.fps),
        "steering_kind": info.steering_kind or "",
        "drives": json.dumps([drive.id for drive in drives]),
        "starts": json.dumps([drive.start for drive in drives]),
    }


class DriveTokens:
    """One drive of a store; its arrays are read-only views into the memory-mapped shard."""

    def __init__(self, store: "TokenStore", shard: int, position: int) -> None:
        self._store, self._shard, self._position = store, shard, position
        self.entry = store.index.shards[shard].drives[position]

    def __len__(self) -> int:
        return self.entry.frames

    @property
    def id(self) -> str:
        """The drive's id."""
        return self.entry.id

    @property
    def info(self) -> StoreInfo:
        """What is the same for every drive of its store."""
        return self._store.info

    def _column(self, name: str) -> NDArray[Any]:
        shard = self._store.shard(self._shard)
        start, stop = shard.offsets[self._position : self._position + 2].tolist()
        return shard.columns[name][start:stop]

    @property
    def tokens(self) -> NDArray[np.uint16]:
        """Uint16 [T, rows, cols]."""
        return self._column("tokens")

    @property
    def actions(self) -> NDArray[np.float32]:
        """Float32 [T, 2]: speed in m/s, steering in rad; actions[t] leads from frame t to t+1."""
        return self._column("actions")

    @property
    def action_valid(self) -> NDArray[np.bool_]:
        """Bool [T, 2]."""
        return self._column("action_valid")

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """Float64 [T]: seconds from the drive's first frame."""
        return self._column("timestamps")


class TokenStore:
    """A finished token store, memory-mapped; shards are opened as they are used, in each process.

    Attributes: `index`, `info` and `drives`, a `DriveTokens` for each drive (part) in order.

    Raises:
        DriveSimError: `path` is not a finished store, or a file in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = _read_index(path)
        self.info = self.index.info
        self._open: OrderedDict[int, TokenShard] = OrderedDict()
        for number, entry in enumerate(self.index.shards):
            _check_size(path / shard_name(number), entry.bytes)
        self.drives = tuple(
            DriveTokens(self, shard, position)
            for shard, entry in enumerate(self.index.shards)
            for position in range(len(entry.drives))
        )

    def __getstate__(self) -> dict[str, Any]:
        # Maps do not travel between processes: a worker opens its own.
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def drive_ids(self) -> tuple[str, ...]:
        """The drives' ids in order, parts of one drive counted once."""
        return tuple(dict.fromkeys(drive.id for drive in self.drives))

    def select(self, ids: Sequence[str]) -> tuple[DriveTokens, ...]:
        """The drives with these ids, in the store's order.

        Raises:
            DriveSimError: the store has no drive of one of these ids.
        """
        missing = sorted(set(ids) - set(self.drive_ids))
        if missing:
            raise DriveSimError(
                f"{self.path}: no drive {missing[0]!r} in this token store; it has "
                + ", ".join(self.drive_ids[:8])
                + (", ..." if len(self.drive_ids) > 8 else "")
            )
        wanted = set(ids)
        return tuple(drive for drive in self.drives if drive.id in wanted)

    def shard(self, number: int) -> TokenShard:
        """A shard, opened and checked against the index on first use."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._open_shard(number)
        self._open[number] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _open_shard(self, number: int) -> TokenShard:
        path, entry = self.path / shard_name(number), self.index.shards[number]
        _check_size(path, entry.bytes)
        shard = TokenShard(path, rows=self.info.rows, cols=self.info.cols)
        expected = shard_metadata(self.info, entry.drives)
        for key, value in expected.items():
            if shard.metadata.get(key) != value:
                raise DriveSimError(
                    f"{path}: its {key} is {shard.metadata.get(key)!r}, the store's index says "
                    f"{value!r}: this shard is from another store; tokenize again"
                )
        if np.diff(shard.offsets).tolist() != [drive.frames for drive in entry.drives]:
            raise DriveSimError(
                f"{path}: its drive lengths differ from the index's; tokenize again"
            )
        return shard

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            DriveSimError: a shard is not what was written.
        """
        for number, entry in enumerate(self.index.shards):
            path = self.path / shard_name(number)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise DriveSimError(f"{path}: damaged (its checksum differs); tokenize again")


def check_same_kind(stores: Sequence[TokenStore]) -> None:
    """Refuse stores that must not be mixed in one training run.

    Raises:
        DriveSimError: two stores differ in tokenizer, token grid or steering kind.
    """
    for first, second in pairwise(stores):
        for name in ("tokenizer_fingerprint", "rows", "cols", "steering_kind"):
            one, other = getattr(first.info, name), getattr(second.info, name)
            if one != other:
                raise DriveSimError(
                    f"{first.path} and {second.path} cannot be mixed: {name} {one!r} and {other!r}"
                )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes, not {expected}"
        raise DriveSimError(f"{path}: a shard of the token store {what}; tokenize again")


def _read_index(path: Path) -> StoreIndex:
    if not path.is_dir():
        raise DriveSimError(f"{path}: no such token store; make one with `drivesim tokenize`")
    file = path / INDEX
    if not file.is_file():
        state = "is unfinished: run the same" if (path / UNFINISHED).exists() else "is not one: run"
        raise DriveSimError(f"{path}: this token store {state} `drivesim tokenize`")
    values = load_json(file)
    if values.get("schema") != SCHEMA:
        raise DriveSimError(f"{file}: not a token store index of schema {SCHEMA}; tokenize again")
    return from_dict(StoreIndex, values, where=str(file))
