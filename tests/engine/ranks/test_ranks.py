"""Several ranks, as `torchrun` starts them, train in the same way as a single process."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.pipeline import tokenize_videos
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.tokenizer import Tokenizer
from tests import ROOT
from tests.fixtures.rank_training import FAILED, STEPS, rank_train, said_by
from tests.fixtures.ranks import assert_same_losses, exported, launch, rows


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("model", ["tokenizer", "world_model"])
def test_two_ranks_with_half_batches_equal_one_rank_with_whole_batches(
    tmp_path: Path, model: str, shard: bool
) -> None:
    assert launch(2, model, tmp_path / "two", shard=shard) == [0, 0]
    rank_train(model, tmp_path / "one", halves=False)
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    one, two = exported(tmp_path / "one"), exported(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


SHARDED, ALL, ALONE = {"shard": True}, {"shard": False}, None


def start(run: Path, ranks: dict[str, bool] | None, **options: Any) -> None:
    """Train on two ranks, or on one with two batches per step, so that the steps are the same."""
    if ranks is None:
        rank_train("world_model", run, accumulate=2, **options)
    else:
        assert launch(2, "world_model", run, **ranks, **options) == [0, 0]


@pytest.mark.parametrize(("before", "after"), [(SHARDED, ALONE), (ALONE, SHARDED), (SHARDED, ALL)])
def test_a_checkpoint_is_resumed_on_other_ranks(
    tmp_path: Path, before: dict[str, bool] | None, after: dict[str, bool] | None
) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    start(uninterrupted, ALONE)
    start(run, before)
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    assert {file.suffix for file in last.iterdir()} == {".safetensors", ".json"}
    assert len(list(last.glob("shard-*.safetensors"))) == (2 if before == SHARDED else 0)
    shutil.rmtree(last)
    (run / "finished.json").unlink()
    start(run, after, resume=True)
    assert last.exists()
    assert_same_losses(run, uninterrupted)
    for name, tensor in exported(uninterrupted).items():
        torch.testing.assert_close(exported(run)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_sharded_tokenizer_is_resumed(tmp_path: Path) -> None:
    """A tokenizer has a scalar buffer, and a parameter with a single element."""
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    assert launch(2, "tokenizer", uninterrupted, shard=True) == [0, 0]
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "finished.json").unlink()
    (run / "model.safetensors").unlink()
    assert launch(2, "tokenizer", run, shard=True, resume=True) == [0, 0]
    assert rows(run) == rows(uninterrupted)
    resumed, expected = exported(run), exported(uninterrupted)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def on_two_ranks(*arguments: str, restarts: int = 0) -> tuple[int, str]:
    """Run a module on two ranks of `torchrun`. Return its exit code and its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"--max-restarts={restarts}", "-m", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def torchrun(run: Path, restarts: int = 0, **options: Any) -> tuple[int, str]:
    """Train on two ranks with `torchrun`. Return its exit code and its output."""
    training = ("tests.fixtures.rank_training", "world_model", str(run), json.dumps(options))
    return on_two_ranks(*training, restarts=restarts)


def test_torchrun_continues_after_a_rank_was_killed(tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    # The second rank gets batch 7 in its fourth step, and the last checkpoint is after two steps.
    code, output = torchrun(run, restarts=1, shard=True, fatal=7, mark=str(mark))
    assert (code, mark.exists()) == (0, True), output
    start(tmp_path / "uninterrupted", ALONE)
    assert_same_losses(run, tmp_path / "uninterrupted")


def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, output = torchrun(tmp_path / "run", bad=7)
    assert code != 0
    assert "error: batch 7 cannot be made" in output
    assert "error: rank 0: another rank has stopped" in output
    assert output.count("Traceback") == 1  # from torchrun itself
    assert time.monotonic() - begun < 60


def test_a_full_disk_ends_a_sharded_run_cleanly(tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = launch(2, "world_model", run, shard=True, most_bytes=200_000)
    assert codes == [FAILED, FAILED]
    for rank in ("0", "1"):
        output = said_by(run, rank).read_text()
        assert "File too large; make room" in output
        assert "Traceback" not in output
    assert not any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("shard", [False, True])
def test_sigterm_saves_on_all_ranks(tmp_path: Path, shard: bool) -> None:
    run = tmp_path / "run"
    options = json.dumps({"shard": shard, "seconds": 0.3, "steps": 12})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node=2",
        "-m",
        "tests.fixtures.rank_training",
        "world_model",
        str(run),
        options,
    ]
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (run / "checkpoints" / "step-00000002").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=120) != 0
    last = max(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
    assert last < 12
    start(run, ALONE, resume=True, steps=12)
    start(tmp_path / "uninterrupted", ALONE, steps=12)
    assert_same_losses(run, tmp_path / "uninterrupted")


def test_a_restart_does_not_continue_the_run_of_another_launch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rank_train("world_model", run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code, output = torchrun(run, restarts=1, learning_rate=0.1)
    assert code != 0
    assert output.count("already holds a run") >= 2  # in both attempts
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_two_ranks_share_the_drives_and_the_store_is_the_same(tmp_path: Path) -> None:
    config = AutoencoderConfig(
        height=32, width=64, widths=(16, 16, 32), blocks=(0, 1, 1), attention_blocks=0, head_size=16
    )
    torch.manual_seed(0)
    Tokenizer(Autoencoder(config)).save(tmp_path / "tokenizer")
    world = SyntheticConfig(height=32, width=64, fps=10)
    write_synthetic_drives(tmp_path / "videos", drives=5, seconds=2, config=world)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    common = ["--mirror", "--skip-bad", "--tokenizer", str(tmp_path / "tokenizer"), "--out"]
    videos = str(tmp_path / "videos")
    code, output = on_two_ranks(
        "driving_sim.cli", "tokenize", videos, *common, str(tmp_path / "two")
    )
    assert code == 0, output
    assert output.count("next: drivesim train-world-model") == 1
    assert output.count("skipped bad") == 1
    tokenize_videos(
        [tmp_path / "videos"], tmp_path / "tokenizer", tmp_path / "one", mirror=True, skip_bad=True
    )
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
