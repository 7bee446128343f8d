"""A short run of the chaos harness; `python -m tests.stress.chaos` is the long one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.numpy import save

from tests.stress import chaos_worker
from tests.stress.chaos import Chaos
from tests.stress.chaos_campaign import DAMAGES, Campaign, Figures, Kill, differing
from tests.stress.chaos_jobs import (
    SAVE_EVERY,
    File,
    State,
    checkpoint_steps,
    make_jobs,
    state_of,
    torn,
)
from tests.stress.chaos_worker import Request, Server, Watch

TRAININGS = ["train-tokenizer", "train-world-model"]
DISK = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=$1 none "$2" && shift 2 && "$@"', "-")
"""Start of a command line: mounts a disk of size $1 at folder $2, then runs the rest."""
DISK_BYTES = 16 << 20
LEAST_LIMIT = 4096
"""Smallest limit on file sizes if no disk can be mounted. What the process prints must fit."""


class Disk:
    """A folder whose disk can be filled, or a limit on file sizes instead."""

    def __init__(self, server: Server, folder: Path, real: bool) -> None:
        # Only the server sees the disk that it has mounted. Other processes see it through this
        # path.
        self.folder = Path(f"/proc/{server.pid}/root{folder}") if real else folder
        self.server, self._real = server, real

    @contextmanager
    def full(self, room: int) -> Iterator[int | None]:
        """Leave only `room` bytes on the disk until the context ends.

        If there is no real disk, yields the limit on file sizes to use instead, otherwise None.
        """
        if not self._real:
            yield max(room, LEAST_LIMIT)
            return
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            status = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_bsize - room)
        try:
            yield None
        finally:
            filler.unlink()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """Mount a small disk if the system allows it, otherwise fall back to a limit on file sizes."""
    folder = tmp_path_factory.mktemp("disk")
    prefix = (*DISK, str(DISK_BYTES), str(folder))
    try:
        real = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        real = False
    with Server(*(prefix if real else ())) as server:
        yield Disk(server, folder, real)


@pytest.fixture(scope="module")
def chaos(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with Server() as server:
        yield Chaos([server, disk.server], tmp_path_factory.mktemp("chaos"))


def assert_survived(figures: Figures, kills: int) -> None:
    assert figures.problems == []
    assert (figures.bytes_lost, figures.bytes_different) == (0, 0)
    assert figures.kills.total() == kills
    assert figures.done_over <= figures.done_over_allowed


def test_tokenize_killed_ten_times_writes_the_same_store(chaos: Chaos) -> None:
    assert_survived(chaos.kill("tokenize", 10, per_run=10), 10)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_training_ends_with_the_same_results(chaos: Chaos, name: str) -> None:
    assert_survived(chaos.kill(name, 5, per_run=5), 5)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_killed_while_writing_continues(chaos: Chaos, tmp_path: Path, name: str) -> None:
    """Kill it before it has written its configuration, and twice while it writes a checkpoint."""
    target = chaos.targets[name]
    figures, kills = target.figures(), [Kill("operation", 3)]
    kills += [Kill("operation", at, within="checkpoints") for at in (5, 17)]
    Campaign(target, tmp_path, figures, Random(0), share=0.0).run(kills)
    assert_survived(figures, 3)


@pytest.mark.parametrize("name", ["tokenize", *TRAININGS])
def test_a_kill_at_the_last_operation_leaves_no_files_behind(
    chaos: Chaos, tmp_path: Path, name: str
) -> None:
    target = chaos.targets[name]
    figures, last = target.figures(), Kill("operation", target.ended.operations)
    Campaign(target, tmp_path, figures, Random(0), share=0.0).run([last])
    assert_survived(figures, 1)


def test_sigterm_loses_no_step(chaos: Chaos, tmp_path: Path) -> None:
    target = chaos.targets["train-world-model"]
    figures, operations = target.figures(), target.ended.operations
    kills = [Kill("SIGTERM at operation", share * operations) for share in (0.4, 0.15)]
    Campaign(target, tmp_path, figures, Random(0), share=0.0).run(kills)
    assert_survived(figures, 2)
    assert figures.done_over_in_all == 0


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    chaos: Chaos, tmp_path: Path, kind: str
) -> None:
    target = chaos.targets["train-world-model"]
    figures, late = target.figures(), Kill("operation", 0.7 * target.ended.operations)
    Campaign(target, tmp_path, figures, Random(0), share=1.0, damages=[kind]).run([late])
    assert_survived(figures, 1)
    assert figures.damages == {kind: 1}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_full_disk_stops_a_training_cleanly(chaos: Chaos, disk: Disk, name: str) -> None:
    """However little room is left, the training ends with a one-line error and loses no file."""
    target = chaos.targets[name].on(disk.server)
    out = disk.folder / name
    state, ended = target.run(out, Kill("operation", 0.7 * target.ended.operations))
    assert ended.status == -9
    (*_, newest) = checkpoint_steps(state)
    assert newest >= SAVE_EVERY
    for room in (0, 4096, 30_000, 200_000):
        before = state
        with disk.full(room) as limit:
            state, ended = target.run(out, file_limit=limit)
        assert (room, ended.status) == (room, 1), state.printed
        last = state.printed.splitlines()[-1]
        assert last.startswith("error: ")
        assert "make room" in last
        assert "Traceback" not in state.printed
        assert target.job.lost(before, state) == 0
        assert torn(state) == []
    state, ended = target.run(out)
    assert ended.status == 0
    assert target.job.result(state) == target.job.result(target.whole)


def test_an_operation_counts_if_it_changes_the_watched_folder(tmp_path: Path) -> None:
    watched, other = tmp_path / "run", tmp_path / "runs"
    counts = memoryview(bytearray(8)).cast("q")
    watch = Watch(Request(command=(), log=other, watched=watched), counts)
    file = watched / "file"
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        for event, arguments, counted in (
            ("open", (str(file), "r", os.O_RDONLY), False),
            ("open", (str(file), None, os.O_RDONLY | os.O_CLOEXEC), False),
            ("open", (file, "w", 0), True),
            ("open", (os.fsencode(file), None, os.O_WRONLY), True),
            ("open", (7, "w", 0), False),
            ("os.rename", (str(other), str(file), -1, -1), True),
            ("os.rename", (str(file), str(other), -1, -1), True),
            ("os.mkdir", (str(other), 0o777, -1), False),
            ("os.mkdir", (str(watched), 0o777, -1), True),
            ("os.remove", ("run/file", descriptor), True),
            ("os.rmdir", ("runs", descriptor), False),
            ("os.listdir", (str(watched),), False),
        ):
            before = counts[0]
            watch(event, arguments)
            assert (event, arguments, counts[0] - before) == (event, arguments, int(counted))
    finally:
        os.close(descriptor)


def state(files: dict[str, bytes]) -> State:
    written = {name: File(content, (0, 0)) for name, content in files.items()}
    return State(files=written, rows=(), printed="")


def test_bytes_without_a_successor_count_as_lost() -> None:
    training, tokenize, _ = make_jobs(Path("folder"))
    model, third = "model.safetensors", "checkpoints/step-00000003/model.safetensors"
    before = state({model: b"12345", third: b"123"})
    assert training.lost(before, before) == 0
    assert training.lost(before, state({})) == 8
    assert training.lost(before, state({model: b"another", third: b"1"})) == 3
    newer = {f"checkpoints/step-{step:08d}/{model}": b"new" for step in (6, 9)}
    assert training.lost(before, state({model: b"another", **newer})) == 0
    parts = {f".unfinished/part-0000000{number}.safetensors": b"123" for number in range(3)}
    note = {".unfinished/shard-00000.json": b'{"drives": ["a", "a~mirror"]}'}
    assert tokenize.lost(state(parts), state({})) == 9
    assert tokenize.lost(state(parts), state(note)) == 3
    assert tokenize.lost(state(parts), state({"index.json": b"{}"})) == 0


def test_incomplete_files_are_named(tmp_path: Path) -> None:
    weights = save({"a": np.zeros(3, np.float32)})
    contents = {"a.safetensors": weights, "b.safetensors": weights[:-1], "c.json": b"{}"}
    contents |= {"d.json": b'{"a', "e.yaml": b"", ".f.1.partial.json": b"", "log.txt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert torn(state_of(tmp_path, "")) == ["b.safetensors", "d.json", "e.yaml"]


def test_differing_bytes_are_counted() -> None:
    assert differing(b"abcd", b"abcd") == 0
    assert differing(b"abcd", b"xbc") == 2


def test_a_process_that_hangs_is_killed_and_named(
    chaos: Chaos, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos_worker, "PATIENCE", 0.01)
    with pytest.raises(TimeoutError, match=r"train-tokenizer .* hung"):
        chaos.targets["train-tokenizer"].run(tmp_path / "out")
    assert not checkpoint_steps(state_of(tmp_path / "out", ""))
