"""What the index of a token store says: `index.json` as dataclasses.

They are validated as they are made, from the index or by the writer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from driving_sim.data.inner_name import is_inner_name
from driving_sim.engine.config import load_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

T = TypeVar("T")

SCHEMA = 1
INDEX = "index.json"
UNFINISHED = ".unfinished"  # the writer's folder inside a store that is not complete yet

_OF_A_STORE = ConfigDict(extra="forbid", allow_inf_nan=False)


def _inner(name: str) -> str:
    if not is_inner_name(name):
        raise ValueError(f"must be a relative name, on one line, got {name!r}")
    return name


# Matched, half characters are found, which no file can hold.
Text = Annotated[str, Field(pattern="")]
DriveId = Annotated[Text, AfterValidator(_inner)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Positive = Annotated[Count, Field(gt=0)]
Rate = Annotated[float, Strict(), Field(gt=0)]


def shard_name(number: int) -> str:
    """The file name of a store's shard."""
    return f"shard-{number:05d}.safetensors"


def frame_bytes(rows: int, cols: int) -> int:
    """Bytes that one frame takes in a shard."""
    timestamp, actions, action_valid = 8, 2 * 4, 2 * 1
    return timestamp + actions + rows * cols * 2 + action_valid


@dataclass(frozen=True, kw_only=True, slots=True, config=_OF_A_STORE)
class StoreInfo:
    """What is the same for every drive of a store."""

    tokenizer_fingerprint: Text
    """Fingerprint of the tokenizer that made the tokens."""
    rows: Positive
    """Token rows per frame."""
    cols: Positive
    """Token columns per frame."""
    codebook_size: Annotated[Positive, Field(le=2**16)]
    """Every token is below this."""
    fps: Rate
    """Mean rate of the frames chosen, between gaps, in frames per second."""
    steering_kind: Text | None = None
    """What the steering column means, one kind for all drives; None where no drive has actions."""
    levels: tuple[Count, ...] = ()
    """The tokenizer's FSQ levels."""
    height: Count | None = None
    """Height of the frames that were encoded, in pixels."""
    width: Count | None = None
    """Width of the frames that were encoded, in pixels."""
    requested_fps: Annotated[int, Strict()] | Rate | None = None
    """The rate asked for, in frames per second, where one was."""
    every: Count | None = None
    """The stride over the video's frames asked for, where one was."""
    transform: dict[Text, Any] = field(default_factory=dict)
    """How frames were resized, cropped and converted."""
    precision: Text = "fp32"
    """The number format that frames were encoded in."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_OF_A_STORE)
class DriveEntry:
    """One drive, or one part of a very long one, as the index lists it."""

    id: DriveId
    """The drive's id; a mirrored drive's ends in `~mirror`."""
    frames: Positive
    """Frames of it in this shard."""
    segments: tuple[tuple[Count, Count], ...]
    """[start, stop) runs of frames without a gap in time, counted within this entry."""
    start: Count = 0
    """Where this part begins in its drive; 0 but for the later parts of a split drive."""
    source: Text = ""
    """The kind of data source it came from."""
    mirrored: Annotated[bool, Strict()] = False
    """Whether the frames are flipped and the steering negated."""

    def __post_init__(self) -> None:
        bounds = [*(bound for segment in self.segments for bound in segment), self.frames]
        if bounds != sorted(bounds):
            raise ValueError(f"segments must rise within 0 and {self.frames}")


@dataclass(frozen=True, kw_only=True, slots=True, config=_OF_A_STORE)
class ShardEntry:
    """One shard as the index lists it."""

    bytes: Count
    """Size of the file."""
    sha256: Text
    """Checksum of the file."""
    drives: tuple[DriveEntry, ...]
    """The drives in it, in order."""

    @property
    def frames(self) -> int:
        """Number of frames in it."""
        return sum(drive.frames for drive in self.drives)


@dataclass(frozen=True, kw_only=True, slots=True, config=_OF_A_STORE)
class SkippedDrive:
    """A drive that was left out."""

    id: Text
    """The drive's id."""
    reason: Text
    """Why, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_OF_A_STORE)
class StoreIndex:
    """The contents of `index.json`."""

    schema: Count
    """Version of the store's format."""
    plan: Text
    """Hash of the plan that the store was written from."""
    info: StoreInfo
    """What is the same for every drive."""
    drives: Count
    """Number of drives, parts of one counted once."""
    frames: Count
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
    return validated(StoreIndex, values, file)


def validated(kind: type[T], values: dict[str, Any], file: Path) -> T:
    """One of the dataclasses above from plain values, which `file` held.

    Raises:
        DriveSimError: they are not what it takes.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = one_line(f"{place}: {first['msg']}")
        raise DriveSimError(
            f"{file}: damaged token store index: {reason}; tokenize again"
        ) from error
