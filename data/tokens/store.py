"""The token store: drives as tokens and actions, in shards, for training and evaluation.

A folder of `index.json`, `shard-00000.safetensors`, `shard-00001.safetensors` and so on. The index
says what the store holds, with counts and checksums, and what was skipped and why. A drive too long
for one shard is split into parts (`start` is where a part begins in its drive).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.tokens.index import (
    INDEX,
    DriveEntry,
    StoreInfo,
    read_index,
    shard_metadata,
    shard_name,
)
from driving_sim.data.tokens.shard import TokenShard, frame_bytes
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import shown

__all__ = ["DriveTokens", "StoreInfo", "TokenStore"]

_OPEN_SHARDS = 128  # each costs a file descriptor


class DriveTokens:
    """One drive of a store; its arrays are read-only views into the memory-mapped shard."""

    channels = (True, True)
    """Which channels of the actions count as known, where the store knows them."""

    def __init__(self, store: "TokenStore", shard: int, position: int, begin: int) -> None:
        self._store, self._shard, self.begin = store, shard, begin
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

    @property
    def shard_key(self) -> Hashable:
        """Equal for drives of one shard, which this does not open."""
        return self._store.path, self._shard

    @property
    def shard(self) -> TokenShard:
        """The shard that holds it, from its frame `begin` on."""
        return self._store.shard(self._shard)

    def _column(self, name: str) -> NDArray[Any]:
        return self.shard.columns[name][self.begin : self.begin + self.entry.frames]

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
        valid = self._column("action_valid")
        return valid if all(self.channels) else valid & self.channels

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
        self.index = read_index(path)
        self.info = self.index.info
        self._open: OrderedDict[int, TokenShard] = OrderedDict()
        least = frame_bytes(self.info.rows, self.info.cols)
        for number, entry in enumerate(self.index.shards):
            _check_size(path / shard_name(number), entry.bytes)
            if entry.frames * least > entry.bytes:
                raise DriveSimError(
                    f"{path / INDEX}: says that {entry.frames} frames of {least} bytes are in the "
                    f"{entry.bytes} bytes of {shard_name(number)}; tokenize again"
                )
        self.drives = tuple(
            DriveTokens(self, shard, position, begin)
            for shard, entry in enumerate(self.index.shards)
            for position, begin in enumerate(_begins(entry.drives))
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
                found = shown(shard.metadata.get(key))
                raise DriveSimError(
                    f"{path}: its {key} is {found}, the store's index says {shown(value)}: this "
                    "shard is from another store; tokenize again"
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


def _begins(drives: Sequence[DriveEntry]) -> list[int]:
    """Where each of a shard's drives begins in it."""
    return list(accumulate((drive.frames for drive in drives), initial=0))[:-1]


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes, not {expected}"
        raise DriveSimError(f"{path}: a shard of the token store {what}; tokenize again")
