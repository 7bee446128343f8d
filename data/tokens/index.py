"""What the index of a token store says: `index.json` as dataclasses."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from driving_sim.data.drive import Skipped
from driving_sim.data.inner_name import is_inner_name
from driving_sim.engine.config import (
    Count,
    Int64,
    Natural,
    Positive,
    config,
    from_dict,
    load_json,
    require,
)
from driving_sim.engine.errors import DriveSimError

SCHEMA = 1
INDEX = "index.json"
UNFINISHED = ".unfinished"  # the writer's folder inside a store that is not complete yet


def shard_name(number: int) -> str:
    """The file name of a store's shard."""
    return f"shard-{number:05d}.safetensors"


def frame_bytes(rows: int, cols: int) -> int:
    """Bytes that one frame takes in a shard."""
    timestamp, actions, action_valid = 8, 2 * 4, 2 * 1
    return timestamp + actions + rows * cols * 2 + action_valid


@config
class StoreInfo:
    """What is the same for every drive of a store."""

    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that made the tokens."""
    rows: Count
    """Token rows per frame."""
    cols: Count
    """Token columns per frame."""
    codebook_size: Annotated[Count, Field(le=2**16)]
    """Every token is below this."""
    fps: Positive
    """Mean rate of the frames chosen, between gaps, in frames per second."""
    steering_kind: str | None = None
    """What the steering column means, one kind for all drives; None where no drive has actions."""
    levels: tuple[Int64, ...] = ()
    """The tokenizer's FSQ levels."""
    height: Int64 | None = None
    """Height of the frames that were encoded, in pixels."""
    width: Int64 | None = None
    """Width of the frames that were encoded, in pixels."""
    requested_fps: int | float | None = None
    """The rate asked for, in frames per second, where one was."""
    every: Int64 | None = None
    """The stride over the video's frames asked for, where one was."""
    transform: dict[str, Any] = field(default_factory=dict)
    """How frames were resized, cropped and converted."""
    precision: str = "fp32"
    """The number format that frames were encoded in."""


@config
class DriveEntry:
    """One drive, or one part of a very long one, as the index lists it."""

    id: str
    """The drive's id; a mirrored drive's ends in `~mirror`."""
    frames: Count
    """Frames of it in this shard."""
    segments: tuple[tuple[Natural, Natural], ...]
    """[start, stop) runs of frames without a gap in time, counted within this entry."""
    start: Natural = 0
    """Where this part begins in its drive; 0 but for the later parts of a split drive."""
    source: str = ""
    """The kind of data source it came from."""
    mirrored: bool = False
    """Whether the frames are flipped and the steering negated."""

    def __post_init__(self) -> None:
        bounds = [0, *(bound for run in self.segments for bound in run), self.frames]
        require(self, "segments", bounds == sorted(bounds), f"runs that rise within {self.frames}")
        require(self, "id", is_inner_name(self.id), "a relative name, on one line")


@config
class ShardEntry:
    """One shard as the index lists it."""

    bytes: Int64
    """Size of the file."""
    sha256: str
    """Checksum of the file."""
    drives: tuple[DriveEntry, ...]
    """The drives in it, in order."""


@config
class StoreIndex:
    """The contents of `index.json`."""

    schema: Int64
    """Version of the store's format."""
    plan: str
    """Hash of the plan that the store was written from."""
    info: StoreInfo
    """What is the same for every drive."""
    drives: Int64
    """Number of drives, parts of one counted once."""
    frames: Int64
    """Number of frames."""
    shards: tuple[ShardEntry, ...]
    """The shards, in order."""
    skipped: tuple[Skipped, ...]
    """The drives that were left out."""

    @property
    def content(self) -> str:
        """SHA-256, in hexadecimal, of all shards: what the store holds, not what was planned."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        rate = f"{self.info.fps:.3g} fps"
        return f"tokens of {self.drives} drives, {self.frames:,} frames at {rate}{skipped}"


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
    try:
        return from_dict(StoreIndex, values, where=str(file))
    except DriveSimError as error:
        raise DriveSimError(f"{error}; tokenize again") from error
