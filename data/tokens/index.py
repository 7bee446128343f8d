"""What the index of a token store says: `index.json` as dataclasses."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from driving_sim.data.inner_name import is_inner_name
from driving_sim.engine.config import from_dict, load_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

SCHEMA = 1
INDEX = "index.json"
UNFINISHED = ".unfinished"  # the writer's folder inside a store that is not complete yet


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
    """Mean rate of the frames chosen, between gaps, in frames per second."""
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
    precision: str = "fp32"
    """The number format that frames were encoded in."""

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
        bounds = [bound for begin, stop in self.segments for bound in (begin, stop)]
        if not all(type(n) is int for n in (self.frames, self.start, *bounds)):
            raise ValueError("frames, start and segments must be whole numbers")
        if bounds != sorted(bounds) or any(not 0 <= bound <= self.frames for bound in bounds):
            raise ValueError(f"segments must rise within 0 and {self.frames}")
        if self.frames < 1 or self.start < 0:
            raise ValueError(f"frames and start must not be {self.frames} and {self.start}")
        if max(self.frames, self.start) >= 2**63:
            raise ValueError("frames and start must fit 64 bits")
        if not isinstance(self.id, str) or not isinstance(self.source, str):
            raise ValueError("id and source must be text")
        if not is_inner_name(self.id):
            raise ValueError(f"id must be a relative name, on one line, got {self.id!r}")
        if not isinstance(self.mirrored, bool):
            raise ValueError(f"mirrored must be true or false, got {self.mirrored!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as the index lists it."""

    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file."""
    drives: tuple[DriveEntry, ...]
    """The drives in it, in order."""

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or not isinstance(self.sha256, str):
            raise ValueError("bytes must be a whole number, and sha256 text")

    @property
    def frames(self) -> int:
        """Number of frames in it."""
        return sum(drive.frames for drive in self.drives)


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

    @property
    def content(self) -> str:
        """SHA-256, in hexadecimal, of all shards: what the store holds, not what was planned."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


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


def read_index(path: Path) -> StoreIndex:
    """The index of the finished store in a folder.

    Raises:
        DriveSimError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise DriveSimError(f"{path}: no such token store; make one with `drivesim tokenize`")
    file = path / INDEX
    if not file.is_file():
        state = "is unfinished: run the same" if (path / UNFINISHED).exists() else "is not one: run"
        raise DriveSimError(f"{path}: this token store {state} `drivesim tokenize`")
    values = load_json(file)
    if values.get("schema") != SCHEMA:
        raise DriveSimError(f"{file}: not a token store index of schema {SCHEMA}; tokenize again")
    shards = values.pop("shards", None)
    if not isinstance(shards, list):
        raise DriveSimError(f"{file}: damaged token store index: no shards; tokenize again")
    index = from_dict(StoreIndex, values | {"shards": []}, where=str(file))
    return replace(index, shards=tuple(read_shard_entry(entry, file) for entry in shards))


def read_shard_entry(values: Any, file: Path) -> ShardEntry:
    """A shard's entry from plain values, which `file` held.

    Without `from_dict`: an index may list millions of drives, and this is many times as fast.

    Raises:
        DriveSimError: they are not a shard's entry.
    """
    try:
        drives = tuple(
            DriveEntry(**{**drive, "segments": tuple((a, b) for a, b in drive["segments"])})
            for drive in values["drives"]
        )
        entry = ShardEntry(**{**values, "drives": drives})
    except (KeyError, TypeError, ValueError) as error:
        raise DriveSimError(
            f"{file}: damaged entry of a shard: {one_line(error)}; tokenize again"
        ) from error
    return entry
