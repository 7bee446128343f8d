"""The token store: drives as tokens and actions, in shards, for training and evaluation.

A folder of `index.json`, `shard-00000.safetensors`, `shard-00001.safetensors` and so on. The index
says what the store holds, with counts and checksums, and what was skipped and why. A drive too long
for one shard is split into parts (`start` is where a part begins in its drive). The columns of a
shard, for N frames of D drives (drive d is frames offsets[d] : offsets[d + 1]):

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

_OPEN_SHARDS = 128  # of all stores: each costs a map


def column_forms(info: StoreInfo, lengths: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The columns of a shard of drives with `lengths` frames: number format and shape by name."""
    frames = sum(lengths)
    return {
        "offsets": ("int64", (len(lengths) + 1,)),
        "timestamps": ("float64", (frames,)),
        "actions": ("float32", (frames, 2)),
        "tokens": ("uint16", (frames, info.rows, info.cols)),
        "action_valid": ("bool", (frames, 2)),
    }


def blank_columns(info: StoreInfo, lengths: Sequence[int]) -> Columns:
    """The columns of a shard of drives with `lengths` frames, to be filled: all 0 but `offsets`."""
    forms = column_forms(info, lengths)
    columns = {name: np.zeros(shape, kind) for name, (kind, shape) in forms.items()}
    columns["offsets"][1:] = np.cumsum(lengths)
    return columns


def open_shard(
    path: Path, info: StoreInfo, lengths: Sequence[int]
) -> tuple[Columns, dict[str, str]]:
    """Map a shard of drives with `lengths` frames; return its read-only columns and its metadata.

    Raises:
        DriveSimError: the file is missing, cut short or another than that shard.
    """
    forms = column_forms(info, lengths)
    try:
        path.open("rb").close()  # the library hides why a file cannot be opened
    except OSError as error:
        reason = error.strerror
        raise DriveSimError(f"{path}: cannot read the token shard: {reason}") from error
    try:
        # The library checks that the columns fill the file without a gap.
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        found = {name: (column.dtype.name, column.shape) for name, column in columns.items()}
        for name in forms | found:
            if found.get(name) != forms.get(name):
                raise ValueError(
                    f"{shown(name)} is {shown(found.get(name))}, expected {forms.get(name)}"
                )
        if not np.array_equal(columns["offsets"], np.cumsum([0, *lengths])):
            raise ValueError("its drive offsets are not those of the drives that it should hold")
    # TypeError: numbers of a format that NumPy has not
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DriveSimError(
            f"{path}: damaged token shard: {one_line(error)}; tokenize again"
        ) from error
    for column in columns.values():
        column.flags.writeable = False
    return columns, metadata


@dataclass(kw_only=True, slots=True, eq=False)
class DriveTokens:
    """One drive of a store; its arrays are read-only views into the memory-mapped shard."""

    store: "TokenStore"
    shard: int
    """The number of the shard that holds it."""
    begin: int
    """The frame of the shard that is its first."""
    entry: DriveEntry
    """What the index says of it."""
    channels: tuple[bool, bool] = (True, True)
    """Which channels of the actions count as known, where the store knows them."""

    def __len__(self) -> int:
        return self.entry.frames

    @property
    def id(self) -> str:
        """The drive's id."""
        return self.entry.id

    @property
    def info(self) -> StoreInfo:
        """What is the same for every drive of its store."""
        return self.store.info

    def _column(self, name: str) -> NDArray[Any]:
        return self.store.shard(self.shard)[name][self.begin : self.begin + self.entry.frames]

    @property
    def tokens(self) -> NDArray[np.uint16]:
        """Uint16 [T, rows, cols]."""
        return self._column("tokens")

    @property
    def actions(self) -> Floats32:
        """Float32 [T, 2]: speed in m/s, steering in rad; actions[t] leads from frame t to t+1."""
        return self._column("actions")

    @property
    def action_valid(self) -> Mask:
        """Bool [T, 2]."""
        valid = self._column("action_valid")
        return valid if all(self.channels) else valid & self.channels

    @property
    def timestamps(self) -> Floats:
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
        self.index = read_index(path)
        self.info = self.index.info
        least = frame_bytes(self.info.rows, self.info.cols)
        drives: list[DriveTokens] = []
        for number, shard in enumerate(self.index.shards):
            file = path / shard_name(number)
            found = file.stat().st_size if file.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found} bytes, not {shard.bytes}"
                raise DriveSimError(f"{file}: a shard of the token store {what}; tokenize again")
            frames = 0
            for drive in shard.drives:
                drives.append(DriveTokens(store=self, shard=number, begin=frames, entry=drive))
                frames += drive.frames
            if frames * least > shard.bytes:
                raise DriveSimError(
                    f"{path / INDEX}: says that {frames} frames of {least} bytes are in the "
                    f"{shard.bytes} bytes of {shard_name(number)}; tokenize again"
                )
        self.drives = tuple(drives)

    @property
    def drive_ids(self) -> tuple[str, ...]:
        """The drives' ids in order, parts of one drive counted once."""
        return tuple(dict.fromkeys(drive.id for drive in self.drives))

    def select(self, ids: Sequence[str]) -> tuple[DriveTokens, ...]:
        """The drives with these ids, in the store's order.

        Raises:
            DriveSimError: the store has no drive of one of these ids.
        """
        wanted = set(ids)
        for missing in sorted(wanted.difference(self.drive_ids)):
            raise DriveSimError(
                f"{self.path}: no drive {missing!r} in this token store; it has "
                + ", ".join(self.drive_ids[:8])
                + (", ..." if len(self.drive_ids) > 8 else "")
            )
        return tuple(drive for drive in self.drives if drive.id in wanted)

    @lru_cache(_OPEN_SHARDS)  # noqa: B019 (stores live as long as their process)
    def shard(self, number: int) -> Columns:
        """The columns of a shard, opened and checked against the index on first use."""
        path, entry = self.path / shard_name(number), self.index.shards[number]
        columns, metadata = open_shard(path, self.info, [drive.frames for drive in entry.drives])
        for key, value in shard_metadata(self.info, entry.drives).items():
            if metadata.get(key) != value:
                raise DriveSimError(
                    f"{path}: its {key} is {shown(metadata.get(key))}, the store's index says "
                    f"{shown(value)}: this shard is from another store; tokenize again"
                )
        return columns

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            DriveSimError: a shard is not what was written.
        """
        for number, entry in enumerate(self.index.shards):
            path = self.path / shard_name(number)
            if sha256_of(path) != entry.sha256:
                raise DriveSimError(f"{path}: damaged (its checksum differs); tokenize again")
