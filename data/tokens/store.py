"""The token store: drives as tokens and actions, in shards, for training and evaluation.

A store is a folder with `index.json`, `shard-00000.safetensors`, `shard-00001.safetensors` and so
on. The index lists the stored drives with counts and checksums, and the skipped drives with the
reasons. A drive too long for one shard is split into parts; a part's `start` is the index of its
first frame in the drive.

A shard with N frames of D drives has these columns. In each column, the rows of drive d are
offsets[d] : offsets[d + 1].

    offsets       I64   [D + 1]
    timestamps    F64   [N]               seconds from the drive's first frame
    actions       F32   [N, 2]            speed in m/s, steering in rad, left positive
    tokens        U16   [N, rows, cols]
    action_valid  BOOL  [N, 2]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.data.tokens.index import (
    INDEX,
    DriveEntry,
    StoreInfo,
    frame_bytes,
    read_index,
    shard_metadata,
    shard_name,
)
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import sha256_of
from driving_sim.engine.parsing import one_line, shown

__all__ = ["DriveTokens", "StoreInfo", "TokenStore"]

Columns = dict[str, NDArray[Any]]

# Maximum number of open shards of all stores together, because the operating system limits the
# number of memory mappings.
_OPEN_SHARDS = 128


def column_forms(info: StoreInfo, lengths: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the number format and shape of each column of a shard.

    `lengths` lists the number of frames of each drive in the shard.
    """
    frames = sum(lengths)
    return {
        "offsets": ("int64", (len(lengths) + 1,)),
        "timestamps": ("float64", (frames,)),
        "actions": ("float32", (frames, 2)),
        "tokens": ("uint16", (frames, info.rows, info.cols)),
        "action_valid": ("bool", (frames, 2)),
    }


def blank_columns(info: StoreInfo, lengths: Sequence[int]) -> Columns:
    """Return the columns of a shard, with `offsets` set and zeros in all other columns.

    `lengths` lists the number of frames of each drive in the shard.
    """
    forms = column_forms(info, lengths)
    columns = {name: np.zeros(shape, kind) for name, (kind, shape) in forms.items()}
    columns["offsets"][1:] = np.cumsum(lengths)
    return columns


def open_shard(
    path: Path, info: StoreInfo, lengths: Sequence[int]
) -> tuple[Columns, dict[str, str]]:
    """Map a shard into memory; return its read-only columns and its metadata.

    `lengths` lists the expected number of frames of each drive in the shard.

    Raises:
        DriveSimError: the file is missing or damaged, or its columns are not as expected.
    """
    forms = column_forms(info, lengths)
    try:
        # Try to open the file first, because safetensors does not say why it cannot open a file.
        path.open("rb").close()
    except OSError as error:
        reason = error.strerror
        raise DriveSimError(
            f"{path}: cannot read the token shard ({reason}); check the file, "
            "or tokenize the videos again"
        ) from error
    try:
        # `safe_open` raises an error if the columns do not fill the file exactly.
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        actual = {name: (column.dtype.name, column.shape) for name, column in columns.items()}
        for name in forms | actual:
            if actual.get(name) != forms.get(name):
                raise ValueError(
                    f"column {shown(name)} is {shown(actual.get(name))}, expected {forms.get(name)}"
                )
        if not np.array_equal(columns["offsets"], np.cumsum([0, *lengths])):
            raise ValueError("its offsets do not match the lengths of its drives")
    # TypeError: `Tensor.numpy` raises it for number formats that NumPy does not have.
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DriveSimError(
            f"{path}: damaged token shard: {one_line(error)}; tokenize the videos again"
        ) from error
    for column in columns.values():
        column.flags.writeable = False
    return columns, metadata


@dataclass(kw_only=True, slots=True, eq=False)
class DriveTokens:
    """One drive of a store, or one part of a split drive.

    Its arrays are read-only views of the memory-mapped shard.
    """

    store: "TokenStore"
    shard: int
    """Number of the shard that holds the drive."""
    begin: int
    """Index of the drive's first frame in the shard."""
    entry: DriveEntry
    """Index entry of the drive."""
    channels: tuple[bool, bool] = (True, True)
    """Whether to use the speed and the steering. `action_valid` is false for an unused channel."""

    def __len__(self) -> int:
        return self.entry.frames

    @property
    def id(self) -> str:
        """Id of the drive."""
        return self.entry.id

    @property
    def info(self) -> StoreInfo:
        """Facts that are the same for all drives of the store."""
        return self.store.info

    def _column(self, name: str) -> NDArray[Any]:
        return self.store.shard(self.shard)[name][self.begin : self.begin + self.entry.frames]

    @property
    def tokens(self) -> NDArray[np.uint16]:
        """Tokens of the frames, uint16 [T, rows, cols]."""
        return self._column("tokens")

    @property
    def actions(self) -> Floats32:
        """Speed (m/s), steering (rad), float32 [T, 2]; actions[t] applies from frame t to t+1."""
        return self._column("actions")

    @property
    def action_valid(self) -> Mask:
        """Whether speed and steering are valid, bool [T, 2]."""
        valid = self._column("action_valid")
        return valid if all(self.channels) else valid & self.channels

    @property
    def timestamps(self) -> Floats:
        """Time of each frame in seconds from the drive's first frame, float64 [T]."""
        return self._column("timestamps")


class TokenStore:
    """A finished token store. Each process maps a shard into memory when it first uses the shard.

    Attributes: `index`, `info` and `drives`. `drives` is a tuple with a `DriveTokens` for each
    drive, or for each part of a split drive, in order.

    Raises:
        DriveSimError: `path` holds no finished store, or one of its files is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self.info = self.index.info
        bytes_per_frame = frame_bytes(self.info.rows, self.info.cols)
        drives: list[DriveTokens] = []
        for number, shard in enumerate(self.index.shards):
            file = path / shard_name(number)
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DriveSimError(
                    f"{file}: this shard of the token store {problem}; tokenize the videos again"
                )
            frames = 0
            for drive in shard.drives:
                drives.append(DriveTokens(store=self, shard=number, begin=frames, entry=drive))
                frames += drive.frames
            if frames * bytes_per_frame > shard.bytes:
                raise DriveSimError(
                    f"{path / INDEX}: {shard_name(number)} has {shard.bytes} bytes, too few for "
                    f"{frames} frames of {bytes_per_frame} bytes; tokenize the videos again"
                )
        self.drives = tuple(drives)

    @property
    def drive_ids(self) -> tuple[str, ...]:
        """Ids of the drives in order; a split drive counts once."""
        return tuple(dict.fromkeys(drive.id for drive in self.drives))

    def select(self, ids: Sequence[str]) -> tuple[DriveTokens, ...]:
        """Return the drives with these ids, in the store's order.

        Raises:
            DriveSimError: the store has no drive with one of these ids.
        """
        requested = set(ids)
        for missing in sorted(requested.difference(self.drive_ids)):
            raise DriveSimError(
                f"{self.path}: no drive {missing!r} in this token store; its drives are "
                + ", ".join(self.drive_ids[:8])
                + (", ..." if len(self.drive_ids) > 8 else "")
            )
        return tuple(drive for drive in self.drives if drive.id in requested)

    @lru_cache(_OPEN_SHARDS)  # noqa: B019 (a store lives as long as its process)
    def shard(self, number: int) -> Columns:
        """Return the columns of a shard. The first call opens and checks the shard."""
        path, entry = self.path / shard_name(number), self.index.shards[number]
        columns, metadata = open_shard(path, self.info, [drive.frames for drive in entry.drives])
        for key, value in shard_metadata(self.info, entry.drives).items():
            if metadata.get(key) != value:
                raise DriveSimError(
                    f"{path}: this shard is from another store (its {key} is "
                    f"{shown(metadata.get(key))}, the index says {shown(value)}); "
                    "tokenize the videos again"
                )
        return columns

    def verify(self) -> None:
        """Read all shards and compare their checksums with the index.

        Raises:
            DriveSimError: a shard has changed since it was written.
        """
        for number, entry in enumerate(self.index.shards):
            path = self.path / shard_name(number)
            if sha256_of(path) != entry.sha256:
                raise DriveSimError(
                    f"{path}: damaged shard: its checksum differs from the index; "
                    "tokenize the videos again"
                )
