"""Writes a token store drive by drive, and continues where an interrupted writer stopped.

A plan decides beforehand which frames of which drives go into which shard. The writer first writes
each drive to a temporary file, its part file. When all part files exist, the writer merges them
into shards, one by one. A writer that was killed and restarted therefore writes the same bytes as
an uninterrupted writer.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.drive import Skipped
from driving_sim.data.tokens.index import (
    INDEX,
    SCHEMA,
    UNFINISHED,
    DriveEntry,
    ShardEntry,
    StoreIndex,
    shard_metadata,
    shard_name,
)
from driving_sim.data.tokens.plan import StorePlan
from driving_sim.data.tokens.store import Columns, blank_columns, open_shard
from driving_sim.data.video.segments import clipped
from driving_sim.engine.config import from_dict, load_json, save_json, to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file, sha256_of
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.weights import write_safetensors

_PLAN = "plan.json"
_FORMATS = {"int64": "I64", "float64": "F64", "float32": "F32", "uint16": "U16", "bool": "BOOL"}
_PATIENCE_S = 90  # maximum time to wait for the files of other ranks
_ROOT = r"(?<![\w.~/\\-])(?:[A-Za-z]:)?[/\\]"  # matches the start of an absolute path


class TokenStoreWriter:
    """Writes the token store `out` as planned, or continues an unfinished store of the same plan.

    Call `add` or `skip` for each drive, in any order, except the drives for which `done` is true.
    Then call `finish`. The writer is a context manager, which unlocks the folder at the end. With
    several ranks, all ranks make a writer for the same folder on a shared disk and call `finish`,
    but only one rank adds a given drive.

    Raises:
        DriveSimError: `out` holds a finished store, a store of another plan or other files, or
            another process is writing to it.
    """

    def __init__(self, out: Path, plan: StorePlan, ranks: Ranks | None = None) -> None:
        self.out, self.plan, self._ranks = out, plan, ranks or Ranks()
        self._lock: int | None = None
        self._work = out / UNFINISHED
        self._numbers = {drive.id: number for number, drive in enumerate(plan.drives)}
        self._shards = plan.shards()
        self._shard_of = {p.drive: n for n, pieces in enumerate(self._shards) for p in pieces}
        if self._ranks.is_main:
            self._lock = _lock(out)
            try:
                self._start()
            except BaseException:
                self.close()
                raise
        self._ranks.barrier()
        self._ranks.require_same(plan.hash, "the planned drives")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder for other processes. An unfinished store can be continued later."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self) -> None:
        if (self.out / INDEX).exists():
            # The work folder still exists if a writer was killed right after it wrote the index.
            shutil.rmtree(self._work, ignore_errors=True)
            raise DriveSimError(
                f"{self.out}: holds a finished token store; choose another `out`, or delete it"
            )
        if any(self._work.glob("part-*")) or any(self._work.glob("shard-*")):
            self._check_plan()
            for leftover in self.out.glob(".*.partial*"):
                leftover.unlink()
        elif foreign := {file.name for file in self.out.iterdir()} - {UNFINISHED}:
            raise DriveSimError(
                f"{self.out}: holds {min(foreign)!r}, which is not part of a token store; "
                "choose another `out`"
            )
        else:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir()
            save_json(self._work / _PLAN, self.plan.summary())

    def _check_plan(self) -> None:
        saved, own = load_json(self._work / _PLAN), self.plan.summary()
        if saved.get("hash") == own.pop("hash"):
            return
        differences = (
            f"{name} was {saved.get(name)} and is now {value}"
            for name, value in own.items()
            if saved.get(name) != value
        )
        raise DriveSimError(
            f"{self.out}: holds an unfinished token store of another plan "
            f"({next(differences, 'the drives or their actions differ')}); "
            "repeat the command that made it, choose another `out`, or delete it"
        )

    def _part(self, number: int) -> Path:
        return self._work / f"part-{number:08d}.safetensors"

    def _skip_note(self, number: int) -> Path:
        return self._work / f"skipped-{number:08d}.json"

    def _shard_note(self, shard: int) -> Path:
        return self._work / f"shard-{shard:05d}.json"

    def done(self, drive_id: str) -> bool:
        """Return whether a drive has already been written or skipped."""
        number = self._numbers[drive_id]
        files = [self._part(number), self._skip_note(number)]
        if number in self._shard_of:
            files.append(self._shard_note(self._shard_of[number]))
        return any(file.exists() for file in files)

    def add(
        self,
        drive_id: str,
        tokens: ArrayLike,
        actions: ArrayLike,
        action_valid: ArrayLike,
        timestamps: ArrayLike,
        segments: Sequence[tuple[int, int]],
        notices: Sequence[str] = (),
    ) -> None:
        """Write a drive: tokens [T, rows, cols], actions and action_valid [T, 2], timestamps [T].

        `segments` are the ranges [start, stop) of frames without a gap in time. Invalid actions are
        stored as 0. `notices` are lines that were not known when the store was planned.

        Raises:
            ValueError: an array's shape differs from the plan, or its values are not allowed.
            DriveSimError: the disk is full or not writable.
        """
        number, codes = self._numbers[drive_id], self.plan.info.codebook_size
        tokens, actions = np.asarray(tokens), np.asarray(actions)
        columns = blank_columns(self.plan.info, [self.plan.drives[number].frames])
        for name, values in (
            ("timestamps", timestamps),
            ("actions", actions),
            ("tokens", tokens),
            ("action_valid", action_valid),
        ):
            if np.shape(values) != columns[name].shape:
                planned = columns[name].shape
                raise ValueError(
                    f"{drive_id}: {name} has shape {np.shape(values)}, but the plan says {planned}"
                )
            columns[name][:] = values
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= codes:
            raise ValueError(f"{drive_id}: tokens must be integers from 0 to {codes - 1}")
        if not (np.diff(columns["timestamps"]) > 0).all():
            raise ValueError(f"{drive_id}: timestamps must increase from frame to frame")
        columns["actions"][~columns["action_valid"]] = 0
        if not np.isfinite(columns["actions"]).all():
            raise ValueError(f"{drive_id}: valid actions must be finite")
        metadata = {
            "segments": json.dumps([[int(a), int(b)] for a, b in segments]),
            "notices": json.dumps([*notices]),
        }
        _write(self._part(number), columns, metadata)

    def skip(self, drive_id: str, reason: str) -> None:
        """Leave a drive out, and record the reason with paths shortened to file names."""
        note = {"id": drive_id, "reason": _without_folders(reason, drive_id)}
        save_json(self._skip_note(self._numbers[drive_id]), note)

    def finish(self) -> StoreIndex:
        """Merge the part files into shards, delete temporary files, and write and return the index.

        Raises:
            ValueError: a planned drive was neither added nor skipped.
            DriveSimError: every drive was skipped, or the disk is full or not writable.
        """
        self._ranks.barrier()
        if missing := self._missing():
            raise ValueError(
                f"{len(missing)} drives are missing (neither added nor skipped), "
                f"the first is {missing[0]!r}"
            )
        for shard in range(self._ranks.rank, len(self._shards), self._ranks.size):
            if not self._shard_note(shard).exists():
                self._merge(shard)
            for piece in self._shards[shard]:
                # Do not delete the part file of a drive that is split across shards, because
                # another shard may still need the file.
                if piece.stop - piece.start == self.plan.drives[piece.drive].frames:
                    self._part(piece.drive).unlink(missing_ok=True)
        self._ranks.barrier()
        index = self._index()
        self._ranks.barrier()
        if self._ranks.is_main:
            if index.frames:
                save_json(self.out / INDEX, to_dict(index))
            shutil.rmtree(self._work)
            if not index.frames:
                for shard in range(len(self._shards)):
                    (self.out / shard_name(shard)).unlink(missing_ok=True)
                with suppress(OSError):  # the folder may contain other files
                    self.out.rmdir()
        self._ranks.barrier()
        if not index.frames:
            first = index.skipped[0]
            raise DriveSimError(
                f"{self.out}: every drive was skipped; the first is {first.id!r}: {first.reason}"
            )
        return index

    def _missing(self) -> list[str]:
        # Wait, because a rank may see the files of other ranks late on a network file system.
        for _ in range(_PATIENCE_S if self._ranks.size > 1 else 0):
            if all(map(self.done, self._numbers)):
                break
            time.sleep(1)
        return [name for name in self._numbers if not self.done(name)]

    def _merge(self, shard: int) -> None:
        """Write a shard from the part files of its drives."""
        pieces = [p for p in self._shards[shard] if not self._skip_note(p.drive).exists()]
        info, path = self.plan.info, self.out / shard_name(shard)
        columns = blank_columns(info, [piece.stop - piece.start for piece in pieces])
        begins, entries = columns["offsets"].tolist(), []
        for piece, begin, end in zip(pieces, begins[:-1], begins[1:], strict=True):
            drive = self.plan.drives[piece.drive]
            part, metadata = open_shard(self._part(piece.drive), info, [drive.frames])
            for name in part.keys() - {"offsets"}:
                columns[name][begin:end] = part[name][piece.start : piece.stop]
            runs = clipped(json.loads(metadata["segments"]), piece.start, piece.stop)
            entry = DriveEntry(
                id=drive.id,
                frames=end - begin,
                segments=tuple(runs),
                start=piece.start,
                source=drive.source,
                mirrored=drive.mirrored,
                notices=(*drive.notices, *json.loads(metadata.get("notices", "[]"))),
            )
            entries.append(entry)
        _write(path, columns, shard_metadata(info, entries))
        shard_entry = ShardEntry(
            bytes=path.stat().st_size, sha256=sha256_of(path), drives=tuple(entries)
        )
        save_json(self._shard_note(shard), to_dict(shard_entry))

    def _index(self) -> StoreIndex:
        done = map(self._shard_note, range(len(self._shards)))
        shards = tuple(from_dict(ShardEntry, load_json(note), str(note)) for note in done)
        left_out = filter(Path.exists, map(self._skip_note, self._numbers.values()))
        skipped = tuple(from_dict(Skipped, load_json(note), str(note)) for note in left_out)
        entries = [entry for shard in shards for entry in shard.drives]
        return StoreIndex(
            schema=SCHEMA,
            plan=self.plan.hash,
            info=self.plan.info,
            drives=len({entry.id for entry in entries}),
            frames=sum(entry.frames for entry in entries),
            shards=shards,
            skipped=skipped,
            passed_over=self.plan.passed_over,
        )


def _write(path: Path, columns: Columns, metadata: dict[str, str]) -> None:
    """Write a shard or part file atomically. Its bytes depend only on the columns and metadata."""
    forms = {name: (_FORMATS[column.dtype.name], column.shape) for name, column in columns.items()}
    with atomic_file(path) as temporary:
        write_safetensors(temporary, forms, columns.values(), metadata)


def _without_folders(text: str, drive_id: str) -> str:
    """Return the text on one line, with absolute paths in it shortened to file names."""
    text = " ".join(text.split())
    # First shorten paths that lead to the drive's name, even if their folders contain spaces. Then
    # shorten all other paths.
    name = re.escape(drive_id.rpartition("/")[2])
    text = re.sub(rf"{_ROOT}(?:.*?[/\\])?(?={name}\b)", "", text)
    return re.sub(rf"{_ROOT}(?:[^\s/\\:'\"]+[/\\])*", "", text)


def _lock(folder: Path) -> int | None:
    """Make and lock a folder. Return the lock's file descriptor, or None on Windows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DriveSimError(
            f"{folder}: cannot write ({error.strerror}); choose another `out`"
        ) from error
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            problem = "another process is writing this token store; wait until it ends"
        else:
            problem = f"cannot lock the folder ({error.strerror}); choose another `out`"
        raise DriveSimError(f"{folder}: {problem}") from error
    return descriptor
