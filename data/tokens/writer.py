"""Writes a token store: drive by drive, whole or not at all, continued after a kill.

A plan fixes beforehand which frames of which drives lie in which shard. Every drive becomes a part
file, and when all are there, the parts become shards one by one, so a store that was killed and
continued is byte for byte the store that was not.
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
        self._shard_of = {p.drive: n for n, pieces in enumerate(self._shards) for p in pieces}
        if self._ranks.is_main:
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
    ) -> None:
        """Write a drive: tokens [T, rows, cols], actions and action_valid [T, 2], timestamps [T].

        `segments` are the [start, stop) runs without a gap in time. Actions that are not valid are
        stored as 0.

        Raises:
            ValueError: a shape, value or length is not what the plan says.
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
                raise ValueError(f"{drive_id}: {name} is {np.shape(values)}, planned {planned}")
            columns[name][:] = values
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= codes:
            raise ValueError(f"{drive_id}: tokens must be integers from 0 to below {codes}")
        if not (np.diff(columns["timestamps"]) > 0).all():
            raise ValueError(f"{drive_id}: timestamps must increase from frame to frame")
        columns["actions"][~columns["action_valid"]] = 0
        if not np.isfinite(columns["actions"]).all():
            raise ValueError(f"{drive_id}: actions that are valid must be finite")
        metadata = {"segments": json.dumps([[int(a), int(b)] for a, b in segments])}
        _write(self._part(number), columns, metadata)

    def skip(self, drive_id: str, reason: str) -> None:
        """Leave a drive out; the index will say why (folders in the reason are left out)."""
        note = {"id": drive_id, "reason": _without_folders(reason, drive_id)}
        save_json(self._skip_note(self._numbers[drive_id]), note)

    def finish(self) -> StoreIndex:
        """Make the shards of the parts, write the index and remove what was needed on the way.

        Raises:
            ValueError: a planned drive was neither added nor skipped.
            DriveSimError: every drive was skipped, or the disk is full or not writable.
        """
        self._ranks.barrier()
        if missing := self._missing():
            raise ValueError(f"{len(missing)} drives are missing, {missing[0]!r} first")
        for shard in range(self._ranks.rank, len(self._shards), self._ranks.size):
            if not self._shard_note(shard).exists():
                self._merge(shard)
            for piece in self._shards[shard]:
                # The part of a split drive stays to the end: another shard may be made of it yet.
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
                with suppress(OSError):  # somebody else's files may be there
                    self.out.rmdir()
        self._ranks.barrier()
        if not index.frames:
            first = f"{index.skipped[0].id!r} as {index.skipped[0].reason}"
            raise DriveSimError(f"{self.out}: every drive was skipped, {first}")
        return index

    def _missing(self) -> list[str]:
        # A network file system may show a rank what others wrote a while later.
        for _ in range(_PATIENCE_S if self._ranks.size > 1 else 0):
            if all(map(self.done, self._numbers)):
                break
            time.sleep(1)
        return [name for name in self._numbers if not self.done(name)]

    def _merge(self, shard: int) -> None:
        """Turn the parts of a shard's drives into the shard."""
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
            )
            entries.append(entry)
        _write(path, columns, shard_metadata(info, entries))
        made = ShardEntry(bytes=path.stat().st_size, sha256=sha256_of(path), drives=tuple(entries))
        save_json(self._shard_note(shard), to_dict(made))

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
        )


def _write(path: Path, columns: Columns, metadata: dict[str, str]) -> None:
    """Write a shard, or a drive as one, whole or not at all; equal content is equal bytes."""
    forms = {name: (_FORMATS[column.dtype.name], column.shape) for name, column in columns.items()}
    with atomic_file(path) as temporary:
        write_safetensors(temporary, forms, columns.values(), metadata)


def _without_folders(text: str, drive_id: str) -> str:
    """The text on one line, each absolute path cut to its last name (that of the drive, if any)."""
    text = " ".join(text.split())
    # A folder's name may hold spaces: what lies before the drive's own name is surely folders.
    name = re.escape(drive_id.rpartition("/")[2])
    text = re.sub(rf"{_ROOT}(?:.*?[/\\])?(?={name}\b)", "", text)
    return re.sub(rf"{_ROOT}(?:[^\s/\\:'\"]+[/\\])*", "", text)


def _lock(folder: Path) -> int | None:
    """Make a folder and hold it; the system lets go of it however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DriveSimError(f"{folder}: cannot write: {error.strerror}") from error
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        is_taken = isinstance(error, BlockingIOError)
        reason = "another process is writing here; wait for it" if is_taken else error.strerror
        raise DriveSimError(f"{folder}: {reason}") from error
    return descriptor
