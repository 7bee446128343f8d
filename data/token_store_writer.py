"""Writes a token store: drive by drive, whole or not at all, continued after a kill.

A plan fixes beforehand which frames of which drives lie in which shard. Every drive becomes a part
file, and the parts of a shard become the shard as soon as all are there, so a store that was killed
and continued is byte for byte the store that was not.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.timing import gaps
from driving_sim.data.token_shard import Array, TokenShard, frame_bytes, write_shard
from driving_sim.data.token_store import (
    INDEX,
    SCHEMA,
    UNFINISHED,
    DriveEntry,
    ShardEntry,
    SkippedDrive,
    StoreIndex,
    StoreInfo,
    shard_metadata,
    shard_name,
)
from driving_sim.engine.config import from_dict, load_json, save_json, to_dict
from driving_sim.engine.errors import DriveSimError

_PLAN = "plan.json"
_ABSOLUTE_FOLDERS = re.compile(r"(?<![\w.~/\\-])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])*")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedDrive:
    """A drive that the store is to hold."""

    id: str
    """Its id, unique in the store."""
    frames: int
    """How many frames of it will be written; 0 for one known to be skipped."""
    source: str = ""
    """The kind of data source it comes from."""
    mirrored: bool = False
    """Whether the frames are flipped and the steering negated."""
    content: str = ""
    """Digest of what is known of it beforehand (frame choice, actions), so that a change shows."""

    def __post_init__(self) -> None:
        if not self.id or not self.id.isprintable() or ".." in self.id.split("/"):
            raise ValueError(f"id must be a printable relative name, got {self.id!r}")
        if self.frames < 0:
            raise ValueError(f"frames must not be negative, got {self.frames}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorePlan:
    """Everything that decides a store's bytes but the tokens and actions themselves."""

    info: StoreInfo
    """What is the same for every drive."""
    drives: tuple[PlannedDrive, ...]
    """The drives in the order they are stored."""
    shard_bytes: int = 512 * 2**20
    """Most bytes of data in one shard."""

    def __post_init__(self) -> None:
        ids = [drive.id for drive in self.drives]
        if len(set(ids)) != len(ids):
            raise ValueError("drives must have different ids")
        if self.shard_bytes < frame_bytes(self.info.rows, self.info.cols):
            raise ValueError(f"shard_bytes must hold a frame, got {self.shard_bytes}")

    @property
    def hash(self) -> str:
        """SHA-256 of the plan."""
        text = json.dumps({"schema": SCHEMA, **to_dict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Frames [start, stop) of drive number `drive`, which lie in one shard."""

    drive: int
    start: int
    stop: int


def _assign(plan: StorePlan) -> list[list[_Piece]]:
    """Which pieces each shard holds: drives in order, split only if no shard could hold one."""
    capacity = plan.shard_bytes // frame_bytes(plan.info.rows, plan.info.cols)
    shards: list[list[_Piece]] = [[]]
    free = capacity
    for number, drive in enumerate(plan.drives):
        for start in range(0, drive.frames, capacity):
            stop = min(start + capacity, drive.frames)
            if stop - start > free:
                shards.append([])
                free = capacity
            shards[-1].append(_Piece(number, start, stop))
            free -= stop - start
    return [pieces for pieces in shards if pieces]


class TokenStoreWriter:
    """Writes the store `out` by a plan; continues one of the same plan that is unfinished.

    `add` or `skip` each drive that is not `done`, in any order, then `finish`. A context manager,
    which lets the folder go.

    Raises:
        DriveSimError: `out` is a finished store, one of another plan, in use, or something else.
    """

    def __init__(self, out: Path, plan: StorePlan) -> None:
        self.out, self.plan = out, plan
        self._work = out / UNFINISHED
        self._numbers = {drive.id: number for number, drive in enumerate(plan.drives)}
        self._shards = _assign(plan)
        self._shards_of: dict[int, list[int]] = {}
        for shard, pieces in enumerate(self._shards):
            for piece in pieces:
                self._shards_of.setdefault(piece.drive, []).append(shard)
        with _writing(out):
            self._start()
        self._lock = _lock(self._work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write; the store stays as far as it came."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self) -> None:
        plan_file = self._work / _PLAN
        if (self.out / INDEX).exists():
            if _plan_hash(plan_file) == self.plan.hash:  # killed while it tidied up
                shutil.rmtree(self._work)
            raise DriveSimError(
                f"{self.out}: holds a finished token store; remove it or choose another folder"
            )
        if plan_file.exists() and _plan_hash(plan_file) != self.plan.hash:
            raise DriveSimError(
                f"{self.out}: holds an unfinished token store of other drives, settings or another "
                "tokenizer; repeat that command, remove the folder or choose another"
            )
        if not plan_file.exists():
            self._check_new()
            self._work.mkdir(parents=True, exist_ok=True)
            save_json(plan_file, {"hash": self.plan.hash, **to_dict(self.plan)})

    def _check_new(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise DriveSimError(f"{self.out}: is a file; choose another folder for the tokens")
        others = [p.name for p in self.out.iterdir()] if self.out.exists() else []
        if set(others) - {UNFINISHED}:
            raise DriveSimError(
                f"{self.out}: exists and holds {min(others)!r}, not a token store; remove it or "
                "choose another folder"
            )

    def _part(self, number: int) -> Path:
        return self._work / f"part-{number:08d}.safetensors"

    def _skip_note(self, number: int) -> Path:
        return self._work / f"skipped-{number:08d}.json"

    def _shard_note(self, shard: int) -> Path:
        return self._work / f"shard-{shard:05d}.json"

    def done(self, drive_id: str) -> bool:
        """Whether a drive is written or skipped already."""
        return self._settled(self._numbers[drive_id])

    def _settled(self, number: int) -> bool:
        if self._part(number).exists() or self._skip_note(number).exists():
            return True
        shards = self._shards_of.get(number, [])
        return bool(shards) and all(self._shard_note(shard).exists() for shard in shards)

    def add(
        self,
        drive_id: str,
        tokens: ArrayLike,
        actions: ArrayLike,
        action_valid: ArrayLike,
        timestamps: ArrayLike,
        segments: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Write a drive: tokens [T, rows, cols], actions and action_valid [T, 2], timestamps [T].

        `segments` are the [start, stop) runs without a gap in time, found from the timestamps where
        not given. Actions that are not valid are stored as 0.

        Raises:
            ValueError: a shape, value or length is not what the plan says.
            DriveSimError: the disk is full or not writable.
        """
        number = self._numbers[drive_id]
        valid = np.asarray(action_valid, np.bool_)
        columns: dict[str, Array] = {
            "timestamps": np.asarray(timestamps, np.float64),
            "actions": np.where(valid, np.asarray(actions, np.float32), np.float32(0)),
            "tokens": np.asarray(tokens),
            "action_valid": valid,
        }
        self._check(self.plan.drives[number], columns)
        runs = gaps(columns["timestamps"]) if segments is None else segments
        with _writing(self.out):
            write_shard(
                self._part(number),
                metadata={"segments": json.dumps([[int(a), int(b)] for a, b in runs])},
                lengths=[len(columns["tokens"])],
                rows=self.plan.info.rows,
                cols=self.plan.info.cols,
                column=lambda name: [columns[name]],
            )
            self._merge(self._shards_of.get(number, []))

    def _check(self, drive: PlannedDrive, columns: Mapping[str, Array]) -> None:
        info, frames = self.plan.info, drive.frames
        expected = {
            "timestamps": (frames,),
            "actions": (frames, 2),
            "tokens": (frames, info.rows, info.cols),
            "action_valid": (frames, 2),
        }
        for name, shape in expected.items():
            if columns[name].shape != shape or not prod(shape):
                raise ValueError(f"{drive.id}: {name} is {columns[name].shape}, planned {shape}")
        tokens = columns["tokens"]
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= info.codebook_size:
            raise ValueError(f"{drive.id}: tokens must be integers from 0 to {info.codebook_size}")
        if not np.isfinite(columns["actions"]).all():
            raise ValueError(f"{drive.id}: an action that is valid is not finite")
        if (np.diff(columns["timestamps"]) <= 0).any():
            raise ValueError(f"{drive.id}: timestamps must rise")

    def skip(self, drive_id: str, reason: str) -> None:
        """Leave a drive out; the index will say why (folders in the reason are left out)."""
        number = self._numbers[drive_id]
        note = {"id": drive_id, "reason": _without_folders(reason)}
        with _writing(self.out):
            save_json(self._skip_note(number), note)
            self._merge(self._shards_of.get(number, []))

    def _merge(self, shards: Sequence[int]) -> None:
        """Turn parts into shards where all of a shard's drives are settled."""
        for shard in shards:
            pieces = self._shards[shard]
            if not self._shard_note(shard).exists() and all(
                self._settled(piece.drive) for piece in pieces
            ):
                self._write_shard(shard)
        self._drop_parts({piece.drive for shard in shards for piece in self._shards[shard]})

    def _drop_parts(self, drives: set[int]) -> None:
        for number in drives:
            if all(self._shard_note(shard).exists() for shard in self._shards_of[number]):
                self._part(number).unlink(missing_ok=True)

    def _write_shard(self, shard: int) -> None:
        info = self.plan.info
        pieces = [p for p in self._shards[shard] if not self._skip_note(p.drive).exists()]
        entries = tuple(self._entry(piece) for piece in pieces)

        def column(name: str) -> Iterator[Array]:
            for piece in pieces:
                part = TokenShard(self._part(piece.drive), rows=info.rows, cols=info.cols)
                yield part.columns[name][piece.start : piece.stop]

        path = self.out / shard_name(shard)
        checksum = write_shard(
            path,
            metadata=shard_metadata(info, entries),
            lengths=[entry.frames for entry in entries],
            rows=info.rows,
            cols=info.cols,
            column=column,
        )
        entry = ShardEntry(bytes=path.stat().st_size, sha256=checksum, drives=entries)
        save_json(self._shard_note(shard), to_dict(entry))

    def _entry(self, piece: _Piece) -> DriveEntry:
        info, drive = self.plan.info, self.plan.drives[piece.drive]
        part = TokenShard(self._part(piece.drive), rows=info.rows, cols=info.cols)
        runs = [
            (max(begin, piece.start) - piece.start, min(end, piece.stop) - piece.start)
            for begin, end in json.loads(part.metadata["segments"])
            if begin < piece.stop and end > piece.start
        ]
        return DriveEntry(
            id=drive.id,
            frames=piece.stop - piece.start,
            segments=tuple(runs),
            start=piece.start,
            source=drive.source,
            mirrored=drive.mirrored,
        )

    def finish(self) -> StoreIndex:
        """Write the index and remove what was only needed on the way.

        Raises:
            ValueError: a planned drive was neither added nor skipped.
            DriveSimError: every drive was skipped, or the disk is full or not writable.
        """
        missing = [drive.id for drive in self.plan.drives if not self.done(drive.id)]
        if missing:
            raise ValueError(f"{len(missing)} drives are missing, {missing[0]!r} first")
        with _writing(self.out):
            self._merge(range(len(self._shards)))
            index = self._index()
            if not index.frames:
                raise DriveSimError(
                    f"{self.out}: every drive was skipped, there is nothing to store"
                )
            save_json(self.out / INDEX, to_dict(index))
            shutil.rmtree(self._work)
        self.close()
        return index

    def _index(self) -> StoreIndex:
        shards = tuple(
            from_dict(ShardEntry, load_json(note), where=str(note))
            for note in map(self._shard_note, range(len(self._shards)))
        )
        notes = [self._skip_note(number) for number in range(len(self.plan.drives))]
        skipped = [
            from_dict(SkippedDrive, load_json(note), where=str(note))
            for note in notes
            if note.exists()
        ]
        entries = [entry for shard in shards for entry in shard.drives]
        return StoreIndex(
            schema=SCHEMA,
            plan=self.plan.hash,
            info=self.plan.info,
            drives=len({entry.id for entry in entries}),
            frames=sum(entry.frames for entry in entries),
            shards=shards,
            skipped=tuple(skipped),
        )


def _without_folders(text: str) -> str:
    """The text on one line, each absolute path cut to its last name."""
    return _ABSOLUTE_FOLDERS.sub("", " ".join(text.split()))


def _plan_hash(plan_file: Path) -> Any:
    return load_json(plan_file).get("hash") if plan_file.exists() else None


def _lock(folder: Path) -> int | None:
    """Hold a folder for this process; the system lets go of it however the process ends."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DriveSimError(f"{folder.parent}: another process is writing here") from error
    for leftover in folder.parent.glob(".*.partial*"):
        leftover.unlink()
    return descriptor


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DriveSimError(
            f"{out}: cannot write: {error.strerror}; what is whole stays, and the same command "
            "continues there"
        ) from error
