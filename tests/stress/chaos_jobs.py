"""What the chaos harness kills, at toy size, and what each of the commands promises.

Work is counted in the unit that is done over after a kill: steps of a training, drives of
`tokenize`. A mark says how far a killed run had come and from where it will go on.
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
    """A file as it was."""

    content: bytes
    written: tuple[int, int]
    """Its inode and time: other ones where it was written anew, with whatever content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a process left behind in its folder."""

    files: Mapping[str, File]
    """What it had committed, by name: not what was being written, nor the logs that grow."""
    rows: tuple[str, ...]
    """The whole lines of its metrics."""
    checkpoints: frozenset[int] = frozenset()
    """Steps of all folders that are named like checkpoints."""
    printed: str
    """What it printed."""
    aside: frozenset[bytes] = frozenset()
    """Contents that a writer had moved out of the way, and whose successor was not there yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How far a killed run had come, and from where the next one goes on."""

    done: int
    kept: int


def state_of(out: Path, printed: str) -> State:
    """Read everything in `out`."""
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
    """Names of committed files that are not whole."""
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
    """A command that makes the folder `out`, however often it is killed."""

    name: str
    makes: str
    """The folder of its uninterrupted run, which other jobs start from."""
    unit: str
    allowed: int
    """Most work that is to be done over after a kill."""

    @abstractmethod
    def command(self, out: Path) -> tuple[str, ...]:
        """What a user types to begin, or to go on with what is there."""

    @abstractmethod
    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """Where it stands; `damaged` are steps of checkpoints that it cannot go on from."""

    @abstractmethod
    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Whether a committed file that is gone, or other than before, has a successor."""

    @abstractmethod
    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Traces of work that the next run did again though it was kept."""

    @abstractmethod
    def result(self, state: State) -> dict[str, bytes]:
        """All that must be the same in the end, by name."""

    def is_over(self, status: int, state: State) -> bool:
        """Whether a run came to its end."""
        return status == 0

    def lost(self, before: State, after: State) -> int:
        """Bytes that were committed and that nothing replaced."""
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
        """A run that was killed before it wrote its configuration has nothing to resume."""
        resume = ("--resume",) if (out / "config.yaml").is_file() else ()
        return (*self._command, "--out", str(out), *resume)

    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """The last step that was logged, and the newest whole checkpoint."""
        kept = max(set(checkpoint_steps(state)) - set(damaged), default=0)
        return Mark(done=max([kept, *map(_row_step, state.rows)]), kept=kept)

    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Checkpoints give way to enough newer ones or as a whole, other files one by one."""
        if not name.startswith(CHECKPOINTS):
            return name in after.files
        steps = checkpoint_steps(after)
        newer = sum(step > _step(name) for step in steps)
        return newer >= KEEP_LAST or (_step(name) in steps and _is_anew(name, before, after))

    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Rows of steps that were kept, and logged anew: they hold times, so they would differ."""
        rows = [row for row in before.rows if _row_step(row) <= kept]
        return [row for row in rows if row not in after.rows]

    def result(self, state: State) -> dict[str, bytes]:
        """Exported files, the last checkpoint's tensors, and what was logged but for times."""
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
    """`tokenize`, each drive also mirrored."""

    name, makes, unit, allowed = "tokenize", "tokens", "drives", 1

    def __init__(self, videos: Path, tokenizer: Path) -> None:
        inputs = (str(videos), "--tokenizer", str(tokenizer))
        self._command = (self.name, *inputs, "--mirror", "--batch-size", "4", "--device", "cpu")

    def command(self, out: Path) -> tuple[str, ...]:
        """The same at each start."""
        return (*self._command, "--out", str(out))

    def mark(self, state: State, damaged: Collection[int] = ()) -> Mark:
        """Drives that are written, in both forms, and the one in work if there is one."""
        written = set(range(_merged(state)))
        written |= {number for name in state.files if (number := _part(name)) is not None}
        kept = sum({2 * drive, 2 * drive + 1} <= written for drive in range(DRIVES))
        in_work = "tokenize: " in state.printed and kept < DRIVES
        return Mark(done=kept + in_work, kept=kept)

    def is_replaced(self, name: str, before: State, after: State) -> bool:
        """Parts give way to their shard, everything that is unfinished to the index."""
        if not name.startswith(_UNFINISHED):
            return False
        number = _part(name)
        return INDEX in after.files or (number is not None and number < _merged(after))

    def done_over(self, kept: int, before: State, after: State) -> list[str]:
        """Parts that were written anew."""
        return [
            name
            for name, file in before.files.items()
            if _part(name) is not None
            and name in after.files
            and after.files[name].written != file.written
        ]

    def result(self, state: State) -> dict[str, bytes]:
        """Every file of the store."""
        return {name: file.content for name, file in state.files.items()}

    def is_over(self, status: int, state: State) -> bool:
        """A run that was killed after it wrote the index is refused: its store is finished."""
        refused = status == 1 and "token store" in state.printed.splitlines()[-1]
        return status == 0 or (refused and INDEX in state.files)


def make_jobs(folder: Path) -> tuple[Job, ...]:
    """The commands in the order in which each makes the input of the next; `folder` is theirs."""
    videos, tokenizer, tokens = (folder / name for name in ("videos", "tokenizer", "tokens"))
    return (
        Training("tokenizer", (str(videos),), _TOKENIZER),
        Tokenize(videos, tokenizer),
        Training("world-model", (str(tokens), "--tokenizer", str(tokenizer)), _WORLD_MODEL),
    )


def make_videos(folder: Path) -> None:
    """Synthetic drives for the jobs."""
    from driving_sim.data.synthetic.world import SyntheticConfig
    from driving_sim.data.synthetic.writer import write_synthetic_drives

    config = SyntheticConfig(height=32, width=64)
    write_synthetic_drives(folder / "videos", drives=DRIVES, seconds=1.5, config=config)


def checkpoint_steps(state: State) -> list[int]:
    """The steps of the checkpoints that miss no file, rising."""
    names: dict[int, set[str]] = {}
    for name in state.files:
        if name.startswith(CHECKPOINTS):
            names.setdefault(_step(name), set()).add(Path(name).name)
    whole = set().union(*names.values())
    return sorted(step for step, found in names.items() if found == whole)


def _step(name: str) -> int:
    return int(name.removeprefix(CHECKPOINTS).partition("/")[0])


def _is_anew(name: str, before: State, after: State) -> bool:
    """Whether every file in a file's folder was written since."""
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
    found = re.fullmatch(rf"{re.escape(_UNFINISHED)}/part-(\d+)\.safetensors", name)
    return int(found[1]) if found else None


def _merged(state: State) -> int:
    """Drives, counting both forms of each, that are in shards; those are made in order."""
    if INDEX in state.files:
        return 2 * DRIVES
    notes = [f.content for n, f in state.files.items() if n.startswith(f"{_UNFINISHED}/shard-")]
    return sum(len(json.loads(note)["drives"]) for note in notes)
