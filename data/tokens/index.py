"""The index of a token store (`index.json`) as dataclasses."""

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
# Name of the folder in which the writer keeps its files until the store is complete.
UNFINISHED = ".unfinished"


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def frame_bytes(rows: int, cols: int) -> int:
    """Return the number of bytes that one frame takes in a shard."""
    timestamp, actions, action_valid = 8, 2 * 4, 2 * 1
    return timestamp + actions + rows * cols * 2 + action_valid


@config
class StoreInfo:
    """Facts that are the same for all drives of a store."""

    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that made the tokens."""
    rows: Count
    """Number of token rows per frame."""
    cols: Count
    """Number of token columns per frame."""
    codebook_size: Annotated[Count, Field(le=2**16)]
    """Number of codes in the codebook. Tokens are numbers from 0 to codebook_size - 1."""
    fps: Positive
    """Frame rate of the stored frames in frames per second, measured where there are no gaps."""
    steering_kind: str | None = None
    """Kind of steering of all drives (`road_wheel`, ...), or None if no drive has actions."""
    levels: tuple[Int64, ...] = ()
    """Number of FSQ levels of each code channel of the tokenizer."""
    height: Int64 | None = None
    """Height of the frames that were encoded, in pixels."""
    width: Int64 | None = None
    """Width of the frames that were encoded, in pixels."""
    requested_fps: int | float | None = None
    """Frame rate that the user asked for, in frames per second, or None if the user gave none."""
    every: Int64 | None = None
    """The number n if the user asked to store only every n-th frame, otherwise None."""
    transform: dict[str, Any] = field(default_factory=dict)
    """Description of how frames were resized, cropped and converted."""
    precision: str = "fp32"
    """Number format in which the tokenizer ran: fp32 or bf16."""


@config
class DriveEntry:
    """Index entry of one drive, or of one part of a drive too long for one shard."""

    id: str
    """Id of the drive. The id of a mirrored drive ends in `~mirror`."""
    frames: Count
    """Number of frames of the drive in this shard."""
    segments: tuple[tuple[Natural, Natural], ...]
    """Ranges [start, stop) of this entry's frames, counted from 0, without a gap in time."""
    start: Natural = 0
    """Index of this part's first frame in the drive; above 0 only if the drive is split."""
    source: str = ""
    """Kind of data source that the drive came from."""
    mirrored: bool = False
    """Whether the frames are flipped left to right and the steering is negated."""
    notices: tuple[str, ...] = ()
    """What was assumed, left out, resampled or guessed about the drive, one line each."""

    def __post_init__(self) -> None:
        bounds = [0, *(bound for run in self.segments for bound in run), self.frames]
        require(
            self, "segments", bounds == sorted(bounds), f"ascending, within {self.frames} frames"
        )
        require(self, "id", is_inner_name(self.id), "a relative path without '..', on one line")


@config
class ShardEntry:
    """Index entry of one shard."""

    bytes: Int64
    """Size of the file in bytes."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    drives: tuple[DriveEntry, ...]
    """Drives in the shard, in order."""


@config
class StoreIndex:
    """The contents of `index.json`."""

    schema: Int64
    """Version number of the store's format."""
    plan: str
    """SHA-256 of the plan that the store was written from."""
    info: StoreInfo
    """Facts that are the same for all drives."""
    drives: Int64
    """Number of drives; a split drive counts once."""
    frames: Int64
    """Number of frames of all drives."""
    shards: tuple[ShardEntry, ...]
    """Shards of the store, in order."""
    skipped: tuple[Skipped, ...]
    """Drives that were left out, with the reasons."""
    passed_over: tuple[str, ...] = ()
    """What else was left out of the searched folders, one line each."""

    @property
    def content(self) -> str:
        """Hash of the stored data: SHA-256 over the checksums of all shards, in hexadecimal."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        rate = f"{self.info.fps:.3g} fps"
        return f"tokens of {self.drives} drives, {self.frames:,} frames at {rate}{skipped}"


def shard_metadata(info: StoreInfo, drives: Sequence[DriveEntry]) -> dict[str, str]:
    """Return the metadata for a shard's header. With them, a shard is usable without the index."""
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
    """Return the index of the finished store in a folder.

    Raises:
        DriveSimError: the folder holds no finished store, or the index is damaged.
    """
    if not path.is_dir():
        raise DriveSimError(f"{path}: no such token store; make one with `drivesim tokenize`")
    file = path / INDEX
    if not file.is_file():
        if (path / UNFINISHED).exists():
            problem = "this token store is unfinished; run the same `drivesim tokenize` again"
        else:
            problem = "holds no token store; make one with `drivesim tokenize`"
        raise DriveSimError(f"{path}: {problem}")
    values = load_json(file)
    if values.get("schema") != SCHEMA:
        raise DriveSimError(
            f"{file}: not the index of a token store of schema {SCHEMA}; tokenize the videos again"
        )
    try:
        return from_dict(StoreIndex, values, where=str(file))
    except DriveSimError as error:
        raise DriveSimError(f"{error}; tokenize the videos again") from error
