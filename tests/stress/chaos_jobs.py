"""The jobs that the chaos harness kills, at toy size, and what their commands guarantee.

Work is counted in steps for trainings and in drives for `tokenize`.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints/step-"
METRICS = "metrics.jsonl"
INDEX = "index.json"
STEPS, SAVE_EVERY, KEEP_LAST = 12, 3, 2
DRIVES = 8

_LOGS = (METRICS, "log.txt", "tensorboard/")
_TIMES = ("step_seconds", "training_seconds", "seconds")
_UNFINISHED = ".unfinished"
_TRAINING: dict[str, Any] = {
    "threads": 1,
    "workers": 0,
    "log_every": 1,
    "validate_every": 2 * SAVE_EVERY,
    "save_every": SAVE_EVERY,
    "keep_last": KEEP_LAST,
}
_TOKENIZER: dict[str, Any] = {
    "model.height": 32,
    "model.width": 64,
    "model.widths": [16, 16, 16],
    "model.blocks": [0, 0, 0],
    "model.head_size": 16,
    "objective.gan_weight": 0.1,
    "objective.gan_start": 0.5,
    "objective.discriminator.width": 16,
    "data.validation_frames": 8,
}
_WORLD_MODEL: dict[str, Any] = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.context_frames": 4,
    "data.validation_windows": 4,
}


@dataclass(frozen=True, slots=True)
class File:
    """Content of a file at one moment."""

    content: bytes
    written: tuple[int, int]
    """Inode and modification time, which change whenever the file is rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Files and output that a process left behind."""

    files: Mapping[str, File]
    """Committed files by name. Temporary files and logs are left out."""
    rows: tuple[str, ...]
    """Complete lines of the metrics file."""
    checkpoints: frozenset[int] = frozenset()
    """Steps of all checkpoint folders, including incomplete ones."""
    printed: str
    """Text that the process printed."""
    aside: frozenset[bytes] = frozenset()
    """Contents of files that a writer had moved aside before it put new files in their place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Progress of a killed run."""

    done: int
    """Amount of work that was done before the kill."""
    kept: int
    """Amount of work that was saved, from which the next run continues."""


def state_of(out: Path, printed: str) -> State:
    """Return the state of the folder `out`, with `printed` as the output of its process."""
    files, aside = {}, set()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith(_LOGS):
            continue
        if not _is_temporary(name):
            status = path.stat()
            files[name] = File(path.read_bytes(), (status.st_ino, status.st_mtime_ns))
        elif ".replaced" in name:
            aside.add(path.read_bytes())
    metrics = out / METRICS
    lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() else []
    rows = tuple(line for line in lines if line.endswith("}"))
    return State(
        files=files,
        rows=rows,
        checkpoints=frozenset(int(path.name[5:]) for path in out.glob(f"{CHECKPOINTS}*")),
        printed=printed,
        aside=frozenset(aside),
    )


def torn(state: State) -> list[str]:
    """Return the names of committed files that are incomplete."""
    return [name for name, file in state.files.items() if not _is_whole(name, file.content)]


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") and part != _UNFINISHED for part in name.split("/"))


def _is_whole(name: str, content: bytes) -> bool:
    try:
        if name.endswith(".json"):
            return isinstance(json.loads(content), dict)
        if name.endswith(".safetensors"):
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            header.pop("__metadata__", None)
            ends = [tensor["data_offsets"][1] for tensor in header.values()]
            return start + max(ends, default=0) == len(content)
    except ValueError:
        return False
    return bool(content)


class Job(ABC):
    """A command that has to complete the folder `out`, no matter how often it is killed."""

    name: str
    """Name of the command."""
    makes: str
    """Name of the folder that the uninterrupted run makes. Other jobs use it as input."""
    unit: str
    """Unit of work, as in "steps"."""
    allowed: int
    """Most work that may have to be repeated after a kill."""

    @abstractmethod
    def command(self, out: Path) -> tuple[str, ...]:
        """Return the arguments with which a user starts or continues the job in `out`."""

    @abstractmethod
    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """Return the progress of the run.

        Checkpoints of the steps `damaged` do not count, because the run cannot resume from them.
        """

    @abstractmethod
    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Return whether something replaces a committed file that is gone or has changed."""

    @abstractmethod
    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Return traces of work that was repeated although it had been saved.

        `before` and `after` are the states before and after a process ran.
        """

    @abstractmethod
    def result(self, state: State) -> dict[str, bytes]:
        """Return all contents that must equal those of an uninterrupted run, by name."""

    def is_over(self, status: int, state: State) -> bool:
        """Return whether the job is finished after a process ended with exit code `status`."""
        return status == 0

    def lost(self, before: State, after: State) -> int:
        """Return the number of committed bytes that are gone and that nothing replaces."""
        return sum(
            len(file.content)
            for name, file in before.files.items()
            if (name not in after.files or after.files[name].content != file.content)
            and file.content not in after.aside
            and not self.is_replaced(name, before, after)
        )


class Training(Job):
    """`train-tokenizer` or `train-world-model`."""

    unit, allowed = "steps", SAVE_EVERY

    def __init__(self, makes: str, inputs: tuple[str, ...], options: dict[str, Any]) -> None:
        self.name, self.makes = f"train-{makes}", makes
        settings = {f"training.{key}": value for key, value in _TRAINING.items()} | options
        self._command: tuple[str, ...] = (
            self.name,
            *inputs,
            "--preset",
            "demo",
            "--steps",
            str(STEPS),
        )
        self._command += ("--precision", "fp32", "--device", "cpu")
        for key, value in settings.items():
            self._command += ("--set", f"{key}={json.dumps(value)}")

    def command(self, out: Path) -> tuple[str, ...]:
        """Return the command with `--resume`, if the run has written its configuration already."""
        resume = ("--resume",) if (out / "config.yaml").is_file() else ()
        return (*self._command, "--out", str(out), *resume)

    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """Return the last logged step as `done`, and the newest complete checkpoint as `kept`."""
        kept = max(set(checkpoint_steps(state)) - set(damaged), default=0)
        return Mark(done=max([kept, *map(_row_step, state.rows)]), kept=kept)

    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Return whether a committed file may be gone or may have changed.

        A checkpoint may be gone if there are enough newer ones. It may change if it is written
        again as a whole. Any other file may change, but must exist.
        """
        if not name.startswith(CHECKPOINTS):
            return name in after.files
        steps = checkpoint_steps(after)
        newer = sum(step > _step(name) for step in steps)
        return newer >= KEEP_LAST or (_step(name) in steps and _is_anew(name, before, after))

    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Return the rows of saved steps that were logged again.

        Rows contain times, so a row that was logged again differs from the first one.
        """
        rows = [row for row in before.rows if _row_step(row) <= kept]
        return [row for row in rows if row not in after.rows]

    def result(self, state: State) -> dict[str, bytes]:
        """Return exported files, tensors of the last checkpoint, and metrics without times."""
        last = f"{CHECKPOINTS}{STEPS:08d}/"
        kept = {
            name: file.content
            for name, file in state.files.items()
            if not name.startswith(CHECKPOINTS)
            or (name.startswith(last) and name.endswith(".safetensors"))
        }
        kept["finished.json"] = _without_times(kept["finished.json"])
        return kept | {METRICS: b"\n".join(map(_without_times, state.rows))}


class Tokenize(Job):
    """`tokenize` with `--mirror`."""

    name, makes, unit, allowed = "tokenize", "tokens", "drives", 1

    def __init__(self, videos: Path, tokenizer: Path) -> None:
        inputs = (str(videos), "--tokenizer", str(tokenizer))
        self._command = (self.name, *inputs, "--mirror", "--batch-size", "4", "--device", "cpu")

    def command(self, out: Path) -> tuple[str, ...]:
        """Return the same arguments to start and to continue."""
        return (*self._command, "--out", str(out))

    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """Count the drives that are written with their mirror images.

        `done` also counts the drive that the process was working on.
        """
        written = set(range(_merged(state)))
        written |= {number for name in state.files if (number := _part(name)) is not None}
        kept = sum({2 * drive, 2 * drive + 1} <= written for drive in range(DRIVES))
        in_work = "tokenize: " in state.printed and kept < DRIVES
        return Mark(done=kept + in_work, kept=kept)

    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Return whether a shard has replaced the partial file of a drive.

        The finished index replaces all unfinished files.
        """
        if not name.startswith(_UNFINISHED):
            return False
        number = _part(name)
        return INDEX in after.files or (number is not None and number < _merged(after))

    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Return the drives' partial files that were written again."""
        return [
            name
            for name, file in before.files.items()
            if _part(name) is not None
            and name in after.files
            and after.files[name].written != file.written
        ]

    def result(self, state: State) -> dict[str, bytes]:
        """Return every file of the store."""
        return {name: file.content for name, file in state.files.items()}

    def is_over(self, status: int, state: State) -> bool:
        """Return whether the store is finished.

        A run may be killed after it has written the index. The next run then refuses to start,
        because the store is finished.
        """
        refused = status == 1 and "token store" in state.printed.splitlines()[-1]
        return status == 0 or (refused and INDEX in state.files)


def make_jobs(folder: Path) -> tuple[Job, ...]:
    """Return the jobs in `folder`, in their order: each job makes the input of the next one."""
    videos, tokenizer, tokens = (folder / name for name in ("videos", "tokenizer", "tokens"))
    return (
        Training("tokenizer", (str(videos),), _TOKENIZER),
        Tokenize(videos, tokenizer),
        Training("world-model", (str(tokens), "--tokenizer", str(tokenizer)), _WORLD_MODEL),
    )


def make_videos(folder: Path) -> None:
    """Write synthetic drives for the jobs."""
    from driving_sim.data.synthetic.world import SyntheticConfig
    from driving_sim.data.synthetic.writer import write_synthetic_drives

    config = SyntheticConfig(height=32, width=64)
    write_synthetic_drives(folder / "videos", drives=DRIVES, seconds=1.5, config=config)


def checkpoint_steps(state: State) -> list[int]:
    """Return the steps of complete checkpoints, in ascending order."""
    names: dict[int, set[str]] = {}
    for name in state.files:
        if name.startswith(CHECKPOINTS):
            names.setdefault(_step(name), set()).add(Path(name).name)
    complete = set().union(*names.values())
    return sorted(step for step, files in names.items() if files == complete)


def _step(name: str) -> int:
    return int(name.removeprefix(CHECKPOINTS).partition("/")[0])


def _is_anew(name: str, before: State, after: State) -> bool:
    """Return whether all files in the folder of the file `name` have been rewritten."""
    folder = name.rpartition("/")[0] + "/"
    return not any(
        name.startswith(folder) and after.files.get(name, file).written == file.written
        for name, file in before.files.items()
    )


def _row_step(row: str) -> int:
    return int(json.loads(row)["step"])


def _without_times(row: str | bytes) -> bytes:
    return json.dumps({k: v for k, v in json.loads(row).items() if k not in _TIMES}).encode()


def _part(name: str) -> int | None:
    match = re.fullmatch(rf"{re.escape(_UNFINISHED)}/part-(\d+)\.safetensors", name)
    return int(match[1]) if match else None


def _merged(state: State) -> int:
    """Return the number of drives in shards. The mirror image of a drive counts as another drive.

    Shards are written in the order of the drives, so the drives in shards are the first ones.
    """
    if INDEX in state.files:
        return 2 * DRIVES
    notes = [f.content for n, f in state.files.items() if n.startswith(f"{_UNFINISHED}/shard-")]
    return sum(len(json.loads(note)["drives"]) for note in notes)
