"""Writes a token store: drive by drive, whole or not at all, continued after a kill.

A plan fixes beforehand which frames of which drives lie in which shard. Every drive becomes a part
file, and the parts of a shard become the shard as soon as all are there, so a store that was killed
and continued is byte for byte the store that was not.
"""

import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.tokens.index import (
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
from driving_sim.data.tokens.plan import Piece, StorePlan
from driving_sim.data.tokens.store import Columns, checksum, column_forms, open_shard
from driving_sim.engine.config import from_dict, load_json, save_json, to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.weights import write_safetensors

_PLAN = "plan.json"
_NUMBERS = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U16": "<u2", "BOOL": "?"}
_PATIENCE_S = 90
_ROOT = r"(?<![\w.~/\\-])(?:[A-Za-z]:)?[/\\]"  # where an absolute path begins


class TokenStoreWriter:
    """Writes the store `out` by a plan; continues one of the same plan that is unfinished.

    `add` or `skip` each drive that is not `done`, in any order, then `finish`. A context manager,
    which lets the folder go. On several ranks all of them make one, of the same folder on a shared
    disk; each drive is added by one of them, and all `finish`.

    Raises:
        DriveSimError: `out` is a finished store, one of another plan, in use, or something else.
    """

    def __init__(self, out: Path, plan: StorePlan, ranks: Ranks | None = None) -> None:
        self.out, self.plan, self._ranks = out, plan, ranks or Ranks()
        self._lock: int | None = None
        self._work = out / UNFINISHED
        self._numbers = {drive.id: number for number, drive in enumerate(plan.drives)}
        self._shards = plan.shards()
        self._shards_of: defaultdict[int, list[int]] = defaultdict(list)
        for shard, pieces in enumerate(self._shards):
            for piece in pieces:
                self._shards_of[piece.drive].append(shard)
        if self._ranks.is_main:
            with _writing(out):
                self._lock = _lock(out)
                try:
                    self._start()
                except BaseException:
                    self.close()
                    raise
        self._ranks.barrier()
        self._ranks.require_same(plan.hash, "the drives that were found")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write; the store stays as far as it came."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self) -> None:
        if (self.out / INDEX).exists():
            shutil.rmtree(self._work, ignore_errors=True)  # it was killed while it tidied up
            raise DriveSimError(
                f"{self.out}: holds a finished token store; remove it or choose another folder"
            )
        if any(self._work.glob("part-*")) or any(self._work.glob("shard-*")):
            self._check_plan()
            for leftover in self.out.glob(".*.partial*"):
                leftover.unlink()
        elif others := {file.name for file in self.out.iterdir()} - {UNFINISHED}:
            raise DriveSimError(
                f"{self.out}: exists and holds {min(others)!r}, not a token store; remove it or "
                "choose another folder"
            )
        else:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir()
            save_json(self._work / _PLAN, self.plan.summary())

    def _check_plan(self) -> None:
        found, own = load_json(self._work / _PLAN), self.plan.summary()
        if found.get("hash") == own.pop("hash"):
            return
        differences = (
            f"{name} is {found.get(name)} there and {value} here"
            for name, value in own.items()
            if found.get(name) != value
        )
        raise DriveSimError(
            f"{self.out}: holds an unfinished token store of another plan "
            f"({next(differences, 'the drives or their actions differ')}): repeat "
            "the command that made it, remove it or choose another folder"
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
        shards = self._shards_of[number]
        return bool(shards) and all(self._shard_note(shard).exists() for shard in shards)

    def add(
        self,
        drive_id: str,
        tokens: ArrayLike,
        actions: ArrayLike,
        action_valid: ArrayLike,
        timestamps: ArrayLike,
        segments: Sequence[tuple[int, int]],
    ) -> None:
        """Write a drive: tokens [T, rows, cols], actions and action_valid [T, 2], timestamps [T].

        `segments` are the [start, stop) runs without a gap in time. Actions that are not valid are
        stored as 0.

        Raises:
            ValueError: a shape, value or length is not what the plan says.
            DriveSimError: the disk is full or not writable.
        """
        number, info = self._numbers[drive_id], self.plan.info
        valid = np.asarray(action_valid, np.bool_)
        columns: Columns = {
            "timestamps": np.asarray(timestamps, np.float64),
            "actions": np.array(actions, np.float32),
            "tokens": np.asarray(tokens),
            "action_valid": valid,
        }
        lengths = [self.plan.drives[number].frames]
        for name, column in columns.items():
            shape = column_forms(info, lengths)[name][1]
            if column.shape != shape or not column.size:
                raise ValueError(f"{drive_id}: {name} is {column.shape}, planned {shape}")
        is_whole, ids = columns["tokens"].dtype.kind in "iu", columns["tokens"]
        if not is_whole or ids.min() < 0 or ids.max() >= info.codebook_size:
            raise ValueError(f"{drive_id}: tokens must be integers from 0 to {info.codebook_size}")
        if not np.isfinite(columns["actions"][valid]).all():
            raise ValueError(f"{drive_id}: an action that is valid is not finite")
        if (np.diff(columns["timestamps"]) <= 0).any():
            raise ValueError(f"{drive_id}: timestamps must rise")
        columns["actions"][~valid] = 0
        metadata = {"segments": json.dumps([[int(a), int(b)] for a, b in segments])}
        with _writing(self.out):
            write_shard(self._part(number), info, lengths, metadata, lambda name: [columns[name]])
            self._merge(self._shards_of[number])

    def skip(self, drive_id: str, reason: str) -> None:
        """Leave a drive out; the index will say why (folders in the reason are left out)."""
        number = self._numbers[drive_id]
        note = {"id": drive_id, "reason": _without_folders(reason, drive_id)}
        with _writing(self.out):
            save_json(self._skip_note(number), note)
            self._merge(self._shards_of[number])

    def _merge(self, shards: Sequence[int]) -> None:
        """Turn parts into shards, those that are this rank's, where all drives are settled."""
        own = [shard for shard in shards if shard % self._ranks.size == self._ranks.rank]
        for shard in own:
            drives = {piece.drive for piece in self._shards[shard]}
            if not self._shard_note(shard).exists() and all(map(self._settled, drives)):
                self._write_shard(shard)
        for number in {piece.drive for shard in own for piece in self._shards[shard]}:
            if all(self._shard_note(shard).exists() for shard in self._shards_of[number]):
                self._part(number).unlink(missing_ok=True)

    def _write_shard(self, shard: int) -> None:
        pieces = [p for p in self._shards[shard] if not self._skip_note(p.drive).exists()]
        entries = tuple(map(self._entry, pieces))

        def column(name: str) -> Iterator[NDArray[Any]]:
            for number, start, stop in pieces:
                yield self._open_part(number)[0][name][start:stop]

        path, lengths = self.out / shard_name(shard), [entry.frames for entry in entries]
        write_shard(path, self.plan.info, lengths, shard_metadata(self.plan.info, entries), column)
        entry = ShardEntry(bytes=path.stat().st_size, sha256=checksum(path), drives=entries)
        save_json(self._shard_note(shard), to_dict(entry))

    def _open_part(self, number: int) -> tuple[Columns, dict[str, str]]:
        return open_shard(self._part(number), self.plan.info, [self.plan.drives[number].frames])

    def _entry(self, piece: Piece) -> DriveEntry:
        drive, (_, metadata) = self.plan.drives[piece.drive], self._open_part(piece.drive)
        runs = [
            (max(begin, piece.start) - piece.start, min(end, piece.stop) - piece.start)
            for begin, end in json.loads(metadata["segments"])
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
        self._ranks.barrier()
        if missing := self._missing():
            raise ValueError(f"{len(missing)} drives are missing, {missing[0]!r} first")
        with _writing(self.out):
            self._merge(range(len(self._shards)))
        self._ranks.barrier()
        index = self._index()
        self._ranks.barrier()
        if self._ranks.is_main:
            with _writing(self.out):
                self._settle(index)
            self.close()
        self._ranks.barrier()
        return index

    def _missing(self) -> list[str]:
        # A network file system may show a rank what others wrote a while later.
        for _ in range(_PATIENCE_S if self._ranks.size > 1 else 0):
            if all(map(self.done, self._numbers)):
                break
            time.sleep(1)
        return [name for name in self._numbers if not self.done(name)]

    def _settle(self, index: StoreIndex) -> None:
        if index.frames:
            save_json(self.out / INDEX, to_dict(index))
            shutil.rmtree(self._work)
            return
        shutil.rmtree(self._work)
        for shard in range(len(self._shards)):
            (self.out / shard_name(shard)).unlink(missing_ok=True)
        self.out.rmdir()
        first = f"{index.skipped[0].id!r} as {index.skipped[0].reason}"
        raise DriveSimError(f"{self.out}: every drive was skipped, {first}")

    def _index(self) -> StoreIndex:
        done = map(self._shard_note, range(len(self._shards)))
        shards = tuple(from_dict(ShardEntry, load_json(note), str(note)) for note in done)
        left_out = filter(Path.exists, map(self._skip_note, self._numbers.values()))
        skipped = tuple(from_dict(SkippedDrive, load_json(note), str(note)) for note in left_out)
        entries = [entry for shard in shards for entry in shard.drives]
        return StoreIndex(
            schema=SCHEMA,
            plan=self.plan.hash,
            info=self.plan.info,
            drives=len({entry.id for entry in entries}),
            frames=sum(entry.frames for entry in entries),
            shards=shards,
            skipped=skipped,
        )


def write_shard(
    path: Path,
    info: StoreInfo,
    lengths: Sequence[int],
    metadata: dict[str, str],
    column: Callable[[str], Iterable[NDArray[Any]]],
) -> None:
    """Write a shard of drives with `lengths` frames, whole or not at all.

    `column(name)` yields the drives' arrays of that column in order, so that only one needs to be
    in memory at a time. Equal content is equal bytes.
    """

    forms = column_forms(info, lengths)

    def pieces() -> Iterator[NDArray[Any]]:
        for name, (code, _) in forms.items():
            for array in [np.cumsum([0, *lengths])] if name == "offsets" else column(name):
                yield np.ascontiguousarray(array, _NUMBERS[code])

    with atomic_file(path) as temporary:
        write_safetensors(temporary, forms, pieces(), metadata)


def _without_folders(text: str, drive_id: str) -> str:
    """The text on one line, each absolute path cut to its last name (that of the drive, if any)."""
    text = " ".join(text.split())
    # A folder's name may hold spaces: what lies before the drive's own name is surely folders.
    name = re.escape(drive_id.rpartition("/")[2])
    text = re.sub(rf"{_ROOT}(?:.*?[/\\])?(?={name}\b)", "", text)
    return re.sub(rf"{_ROOT}(?:[^\s/\\:'\"]+[/\\])*", "", text)


def _lock(folder: Path) -> int | None:
    """Make a folder and hold it; the system lets go of it however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DriveSimError(f"{folder}: another process is writing here; wait for it") from error
    return descriptor


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DriveSimError(
            f"{out}: cannot write: {error.strerror or error}; the drives that are done stay, and "
            "the same command goes on after them"
        ) from error
