import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from driving_sim.engine import precision
from driving_sim.engine.config import from_dict, to_dict
from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.run_folder import is_finished
from driving_sim.engine.training import loop as training
from driving_sim.engine.training.checkpoint import damage
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.trainable import Batch, Validation
from tests import ROOT
from tests.fixtures.tiny_training import (
    EXPORTED,
    TinyBatches,
    TinyModel,
    checkpoint_tensors,
    tiny_config,
    tiny_train,
    validate,
)

TIMINGS = ("step_seconds", "training_seconds")


def metric_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class InterruptingBatches(TinyBatches):
    """Batches that send this process a signal while batch 15 is loaded."""

    def __getitem__(self, number: int) -> Batch:
        if number == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(number)


def test_parameters_are_limited_after_each_step(tmp_path: Path) -> None:
    class Limited(TinyModel):
        def limit_parameters(self) -> None:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-0.01, 0.01)

    model = Limited()
    model.limit_parameters()
    tiny_train(tmp_path / "run", model=model, steps=10)
    weights = load_file(tmp_path / "run" / EXPORTED)
    assert max(float(value.abs().max()) for value in weights.values()) <= 0.0101


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    result = tiny_train(uninterrupted)
    with pytest.raises(Interrupted, match=r"step 15.*`resume`") as stopped:
        tiny_train(interrupted, dataset=InterruptingBatches())
    assert stopped.value.exit_code == 128 + signal.SIGINT
    assert checkpoint_steps(interrupted)[-1] == 15
    resumed = tiny_train(interrupted, resume=True)
    assert_same(checkpoint_tensors(uninterrupted, 30), checkpoint_tensors(interrupted, 30))
    assert_same(load_file(uninterrupted / EXPORTED), load_file(interrupted / EXPORTED))
    assert metric_rows(uninterrupted) == metric_rows(interrupted)
    assert (resumed.best_score, resumed.best_step, resumed.steps) == (
        result.best_score,
        result.best_step,
        30,
    )


def test_resumed_after_a_kill_equals_uninterrupted(tmp_path: Path) -> None:
    """After a kill, the metrics and the exported weights are newer than the last checkpoint."""

    class KillingBatches(TinyBatches):
        def __getitem__(self, number: int) -> Batch:
            if number == 27:
                raise RuntimeError("killed")
            return super().__getitem__(number)

    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    tiny_train(uninterrupted, save_every=7)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_train(interrupted, save_every=7, dataset=KillingBatches())
    assert checkpoint_steps(interrupted)[-1] == 21
    with (interrupted / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 26, "pha')
    tiny_train(interrupted, save_every=7, resume=True)
    assert_same(checkpoint_tensors(uninterrupted, 30), checkpoint_tensors(interrupted, 30))
    assert metric_rows(uninterrupted) == metric_rows(interrupted)


def damage_newest(run: Path) -> Path:
    newest = run / "checkpoints" / f"step-{checkpoint_steps(run)[-1]:08d}"
    content = bytearray((newest / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "ema.safetensors").write_bytes(content)
    return newest


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    tiny_train(uninterrupted)
    tiny_train(run)
    damaged = damage_newest(run)
    capsys.readouterr()
    tiny_train(run, resume=True)
    messages = [line for line in capsys.readouterr().err.splitlines() if " is damaged " in line]
    assert messages == [
        line for line in (run / "log.txt").read_text().splitlines() if " is damaged " in line
    ]
    assert len(messages) == 1
    assert messages[0].startswith(str(damaged))
    assert_same(checkpoint_tensors(uninterrupted, 30), checkpoint_tensors(run, 30))
    assert metric_rows(uninterrupted) == metric_rows(run)
    for path in (run / "checkpoints").iterdir():
        assert damage(path) is None


def test_weights_exported_after_the_resumed_step_are_replaced(tmp_path: Path) -> None:
    """The exported weights are the best ones up to the checkpoint from which the run resumes."""
    run = tmp_path / "run"
    tiny_train(run, steps=20)
    best = {name: value.clone() for name, value in load_file(run / EXPORTED).items()}
    tiny_train(run, steps=30, resume=True)
    assert any(not torch.equal(load_file(run / EXPORTED)[name], best[name]) for name in best)
    damage_newest(run)
    tiny_train(run, steps=30, resume=True, validate=lambda _: Validation(score=1e9))
    assert_same(load_file(run / EXPORTED), best)


def test_resumed_run_with_more_steps_continues(tmp_path: Path) -> None:
    tiny_train(tmp_path / "run", steps=10)
    assert tiny_train(tmp_path / "run", steps=10, resume=True).steps == 10
    assert tiny_train(tmp_path / "run", steps=20, resume=True).steps == 20


def test_a_run_is_finished_only_after_its_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        tiny_train(run, dataset=InterruptingBatches())
    assert (run / EXPORTED).exists()
    assert not is_finished(run)
    tiny_train(run, resume=True)
    assert is_finished(run)
    kept = (run / "finished.json").read_bytes(), (run / EXPORTED).read_bytes()
    assert json.loads(kept[0])["steps"] == 30
    assert "was finished" not in capsys.readouterr().err

    tiny_train(run, resume=True)
    assert kept == ((run / "finished.json").read_bytes(), (run / EXPORTED).read_bytes())
    assert "was finished at step 30" in capsys.readouterr().err

    nan = TinyBatches(nan_at=tuple(range(30, 60)))
    with pytest.raises(DriveSimError, match="not finite"):
        tiny_train(run, steps=60, resume=True, dataset=nan)
    assert not is_finished(run)


def test_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    tiny_train(tmp_path / "none", steps=10)
    tiny_train(tmp_path / "two", steps=10, workers=2)
    assert_same(checkpoint_tensors(tmp_path / "none", 10), checkpoint_tensors(tmp_path / "two", 10))


def test_random_numbers_depend_on_the_seed_only(tmp_path: Path) -> None:
    tiny_train(tmp_path / "a", steps=5, seed=0)
    torch.rand(7)
    tiny_train(tmp_path / "b", steps=5, seed=0)
    tiny_train(tmp_path / "c", steps=5, seed=1)
    weights = [checkpoint_tensors(tmp_path / name, 5)["model/net.1.weight"] for name in "abc"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_numbers_of_a_batch_depend_only_on_the_seed_and_its_number(tmp_path: Path) -> None:
    class Recording(TinyModel):
        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            drawn.append(torch.rand(()).item())
            return super().forward(batch)

    draws: list[list[float]] = []
    for accumulate in (1, 2):
        drawn: list[float] = []
        run, steps = tmp_path / str(accumulate), 4 // accumulate
        tiny_train(run, model=Recording(), accumulate=accumulate, steps=steps)
        draws.append(drawn)
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 4


def test_accumulated_equals_one_big_batch(tmp_path: Path) -> None:
    class BigBatches(TinyBatches):
        def __getitem__(self, number: int) -> Batch:
            small = [super(BigBatches, self).__getitem__(2 * number + i) for i in (0, 1)]
            return {key: torch.cat([batch[key] for batch in small]) for key in small[0]}

    # Dropout is off, because it draws one mask per batch. Clipping is off, because it would hide
    # gradients of a wrong scale.
    options: dict[str, Any] = {"grad_clip": None, "steps": 10}
    tiny_train(tmp_path / "small", model=TinyModel(dropout=0), accumulate=2, **options)
    tiny_train(tmp_path / "big", model=TinyModel(dropout=0), dataset=BigBatches(), **options)
    small, big = (checkpoint_tensors(tmp_path / name, 10) for name in ("small", "big"))
    for name in small:
        torch.testing.assert_close(small[name], big[name])


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Two ranks use the same batches as one rank that accumulates two, with the same gradients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.fixtures.tiny_training",
                str(tmp_path / "two"),
                "new",
                "0",
            ],
            cwd=ROOT,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    tiny_train(tmp_path / "one", accumulate=2)
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    one, two = (checkpoint_tensors(tmp_path / name, 30) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    rows = zip(metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two"), strict=True)
    for row_one, row_two in rows:
        assert row_one.pop("phase") == row_two.pop("phase")
        assert row_one == pytest.approx(row_two, rel=1e-4)


def test_sigterm_saves_and_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tests.fixtures.tiny_training", str(run), "new", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].endswith("to continue, give `resume`")
    stopped_at = checkpoint_steps(run)[-1]
    assert 5 <= stopped_at < 30
    tiny_train(run, resume=True)
    tiny_train(tmp_path / "uninterrupted")
    assert_same(checkpoint_tensors(tmp_path / "uninterrupted", 30), checkpoint_tensors(run, 30))


def ask_to_stop(within: str) -> None:
    """Send SIGTERM to this process, and then wait until it is interrupted."""
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError(f"{within} was not interrupted")


class SlowModel(TinyModel):
    """A model that gets SIGTERM within a pass of one step. Its buffer holds the last step begun."""

    last: Tensor

    def __init__(self, step: int = -1, within: str = "") -> None:
        super().__init__()
        self.register_buffer("last", torch.tensor(-1))
        self.stop_step, self.within = step, within

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.last.fill_(batch["step"])
        loss, metrics = super().forward(batch)
        if batch["step"] == self.stop_step:
            if self.within == "forward":
                ask_to_stop("forward")
            loss.register_hook(lambda _: ask_to_stop("backward"))  # type: ignore[no-untyped-call]
        return loss, metrics


@pytest.mark.parametrize(
    ("stop_step", "within"),
    [(0, "forward"), (15, "forward"), (15, "backward"), (20, "batch"), (20, "validation")],
)
def test_interrupted_work_leaves_no_traces(stop_step: int, within: str, tmp_path: Path) -> None:
    """The saved state is the one before the interrupted step or validation."""

    class SlowBatches(TinyBatches):
        def __getitem__(self, number: int) -> Batch:
            if within == "batch" and number == stop_step:
                ask_to_stop("a batch")
            return super().__getitem__(number)

    validations = []

    def slow_validate(model: nn.Module) -> Validation:
        validations.append(model)
        if within == "validation" and len(validations) == 2:
            ask_to_stop("validation")
        return validate(model)

    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    tiny_train(uninterrupted, model=SlowModel())
    with pytest.raises(Interrupted, match=rf"step {stop_step} .*`resume`") as stopped:
        tiny_train(
            interrupted,
            model=SlowModel(stop_step if "ward" in within else -1, within),
            dataset=SlowBatches(),
            validate=slow_validate,
        )
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    if stop_step:
        assert checkpoint_steps(interrupted)[-1] == stop_step
        assert checkpoint_tensors(interrupted, stop_step)["model/last"] == stop_step - 1
    tiny_train(interrupted, model=SlowModel(), resume=True)
    assert_same(checkpoint_tensors(uninterrupted, 30), checkpoint_tensors(interrupted, 30))
    assert_same(load_file(uninterrupted / EXPORTED), load_file(interrupted / EXPORTED))
    assert metric_rows(uninterrupted) == metric_rows(interrupted)


def test_an_interrupted_step_does_not_change_the_logged_learning_rate(tmp_path: Path) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    tiny_train(uninterrupted, log_every=1)
    with pytest.raises(Interrupted):
        tiny_train(interrupted, model=SlowModel(13, "forward"))
    last = metric_rows(interrupted)[-1]
    (expected,) = (row for row in metric_rows(uninterrupted) if row["step"] == 13)
    assert last["step"] == 13
    assert last["learning_rate"] == expected["learning_rate"]


def test_nonfinite_loss_is_skipped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_train(run, steps=5, validate_every=4, save_every=4, dataset=TinyBatches(nan_at=(4,)))
    before, after = checkpoint_tensors(run, 4), checkpoint_tensors(run, 5)
    assert_same(before, after)
    state = json.loads((run / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["skipped_steps"] == 1
    assert all(value is not None for row in metric_rows(run) for value in row.values())


def test_nonfinite_gradients_of_a_finite_loss_are_skipped(tmp_path: Path) -> None:
    class Rooted(TinyModel):
        """A model whose loss adds a square root, which has an infinite gradient in step 4."""

        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = super().forward(batch)
            length = cast(nn.Linear, self.net[1]).weight.square().sum() * (batch["step"] != 4)
            return loss + length.sqrt(), metrics

    run = tmp_path / "run"
    tiny_train(run, steps=5, validate_every=4, save_every=4, model=Rooted())
    assert_same(checkpoint_tensors(run, 4), checkpoint_tensors(run, 5))
    state = json.loads((run / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["skipped_steps"] == 1


def test_lasting_nonfinite_loss_ends_the_run(tmp_path: Path) -> None:
    dataset = TinyBatches(nan_at=tuple(range(12, 60)))
    with pytest.raises(DriveSimError, match=r"in the last 20 steps, up to step 32.*step-00000030"):
        tiny_train(tmp_path / "run", steps=60, dataset=dataset)


def test_a_run_that_logs_rarely_still_counts_skipped_steps(tmp_path: Path) -> None:
    dataset = TinyBatches(nan_at=tuple(range(12, 99)))
    options: dict[str, Any] = {"log_every": 99, "validate_every": 99, "save_every": 99}
    with pytest.raises(DriveSimError, match=r"in the last 20 steps, up to step 32.*none"):
        tiny_train(tmp_path / "run", steps=99, dataset=dataset, **options)


def test_a_resumed_run_continues_to_count_skipped_steps(tmp_path: Path) -> None:
    run, dataset = tmp_path / "run", TinyBatches(nan_at=(3, *range(9, 99)))
    tiny_train(run, steps=12, dataset=dataset)
    with pytest.raises(DriveSimError, match=r"in the last 20 steps, up to step 29"):
        tiny_train(run, steps=99, resume=True, dataset=dataset)
    rows = [row for row in metric_rows(run) if row["phase"] == "train"]
    assert [row["skipped_steps"] for row in rows] == [1, 2]


def test_no_finite_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no validation score was finite"):
        tiny_train(tmp_path / "run", steps=2, validate=lambda _: Validation(score=float("nan")))
    assert not (tmp_path / "run" / EXPORTED).exists()


class Clock:
    """A clock that advances only when a test changes `now`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowBatches(TinyBatches):
    """Batches that take 4 s each on a simulated clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __getitem__(self, number: int) -> Batch:
        self.clock.now += 4.0
        return super().__getitem__(number)


def test_minutes_end_on_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step ends late, the last learning rate is near its floor, and validation is not timed."""
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)

    def slow_validate(model: nn.Module) -> Validation:
        clock.now += 50.0
        return validate(model)

    run = tmp_path / "run"
    batches = SlowBatches(clock)
    options: dict[str, Any] = {"dataset": batches, "validate": slow_validate, "log_every": 1}
    result = tiny_train(run, minutes=1.1, **options)
    # There are 17 steps, because the first batch is loaded before the training time begins.
    assert (result.steps, result.seconds) == (17, 64.0)
    assert clock.now == 17 * 4.0 + 2 * 50.0
    rates = [row["learning_rate"] for row in metric_rows(run) if "loss" in row]
    assert rates[-1] < 0.1 * max(rates)
    assert tiny_train(run, minutes=1.1, resume=True, **options).steps == 17
    assert tiny_train(run, minutes=2.2, resume=True, **options).seconds == 132.0


@pytest.mark.parametrize(("least", "steps"), [(5, 17), (30, 30)])
def test_a_run_exceeds_its_minutes_until_min_steps_are_taken(
    least: int,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run says so once, and its last step is always at the end of the schedule."""
    clock, run = Clock(), tmp_path / "run"
    monkeypatch.setattr(training, "time", clock)
    options: dict[str, Any] = {"dataset": SlowBatches(clock), "log_every": 1}
    assert tiny_train(run, minutes=1.1, min_steps=least, **options).steps == steps
    rates = [row["learning_rate"] for row in metric_rows(run) if "loss" in row]
    assert rates[-1] < 0.1 * max(rates)
    messages = [line for line in capsys.readouterr().err.splitlines() if "minutes are over" in line]
    assert messages == (
        []
        if steps == 17
        else ["1.1 minutes are over after 18 steps; this training needs 30 steps: about 1 min more"]
    )


def test_the_last_step_has_the_final_learning_rate(tmp_path: Path) -> None:
    tiny_train(tmp_path / "run", min_learning_rate_ratio=0.02, log_every=1)
    rows = [row for row in metric_rows(tmp_path / "run") if row["phase"] == "train"]
    assert rows[-1]["learning_rate"] == pytest.approx(0.02 * 0.05)
    assert rows[0]["progress"] == 0.0
    assert rows[-1]["progress"] == 1.0


def test_best_averaged_weights_are_exported(tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0])
    seen = []

    def scripted(model: nn.Module) -> Validation:
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return Validation(score=next(scores))

    run = tmp_path / "run"
    model = TinyModel()
    result = tiny_train(run, model=model, validate=scripted, keep_last=1)
    assert (result.best_step, result.best_score) == (20, 1.0)
    exported = load_file(run / EXPORTED)
    averages = {
        name.removeprefix("ema/"): value
        for name, value in checkpoint_tensors(run, 20).items()
        if name.startswith("ema/")
    }
    assert_same(exported, averages)
    assert_same(exported, {name: seen[1][f"net.{name}"] for name in exported})
    assert not torch.equal(exported["1.weight"], checkpoint_tensors(run, 20)["model/net.1.weight"])
    assert checkpoint_steps(run) == [20, 30]
    assert model.training


def test_any_final_score_is_better_than_a_provisional_one(tmp_path: Path) -> None:
    scores = [(1.0, True), (0.5, True), (2.0, False), (0.1, True), (1.5, False), (1.8, False)]
    validations = (Validation(score=score, provisional=early) for score, early in scores)
    bests = []
    for steps in (10, 20, 30, 40, 50, 60):
        result = tiny_train(
            tmp_path / "run",
            steps=steps,
            resume=steps > 10,
            validate=lambda _: next(validations),
        )
        bests.append((result.best_step, result.best_score))
    assert bests == [(10, 1.0), (20, 0.5), (30, 2.0), (30, 2.0), (50, 1.5), (50, 1.5)]


@pytest.mark.parametrize(("later", "best"), [(0.45, 10), (0.35, 20)])
def test_a_run_of_an_earlier_version_keeps_its_provisional_best(
    later: float, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions added 100 to a score until the GAN loss had its full weight."""

    def earlier(state: Any) -> dict[str, Any]:
        values = to_dict(state)
        del values["best_provisional"]
        return values | {"best_score": 100.4}

    run = tmp_path / "run"
    with monkeypatch.context() as before:
        before.setattr(training, "to_dict", earlier)
        tiny_train(run, steps=10)

    def validated(_: nn.Module) -> Validation:
        return Validation(score=later, provisional=True)

    assert tiny_train(run, steps=20, resume=True, validate=validated).best_step == best
    final = tiny_train(run, steps=30, resume=True, validate=lambda _: Validation(score=9.0))
    assert (final.best_step, final.best_score) == (30, 9.0)


def test_every_validation_draws_the_same_random_numbers(tmp_path: Path) -> None:
    drawn = []

    def drawing(model: nn.Module) -> Validation:
        drawn.append(torch.rand(3))
        return Validation(score=1.0)

    tiny_train(tmp_path / "run", validate=drawing)
    tiny_train(tmp_path / "other", validate=drawing, seed=1)
    assert [bool(torch.equal(draw, drawn[0])) for draw in drawn] == [True] * 3 + [False] * 3


def test_patience_stops_early(tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0, 2.0])
    result = tiny_train(
        tmp_path / "run",
        steps=100,
        patience=2,
        validate=lambda _: Validation(score=next(scores)),
    )
    assert (result.steps, result.best_step) == (40, 20)


def test_user_error_in_a_worker_stays_one_line(tmp_path: Path) -> None:
    class BadBatches(TinyBatches):
        def __getitem__(self, number: int) -> Batch:
            raise DriveSimError("video.mp4 is truncated")

    for workers in (0, 2):
        with pytest.raises(DriveSimError, match=r"^video\.mp4 is truncated$"):
            tiny_train(tmp_path / str(workers), dataset=BadBatches(), workers=workers)


def test_existing_run_needs_resume(tmp_path: Path) -> None:
    tiny_train(tmp_path / "run", steps=2, run_config={"levels": 8})
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(DriveSimError, match="`resume`"):
        tiny_train(tmp_path / "run", steps=2)
    with pytest.raises(DriveSimError, match="levels=8"):
        tiny_train(tmp_path / "run", steps=2, resume=True, run_config={"levels": 5})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_bf16_trains_and_survives_resume(tmp_path: Path) -> None:
    class Watching(TinyModel):
        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            assert self.net(batch["x"]).dtype is torch.bfloat16
            return super().forward(batch)

    run = tmp_path / "run"
    tiny_train(run, steps=5, precision="bf16", model=Watching())
    # On the same device, auto keeps the format with which the run began.
    tiny_train(run, steps=10, precision="auto", model=Watching(), resume=True)
    assert all(value.dtype is torch.float32 for value in checkpoint_tensors(run, 10).values())


def test_a_number_format_measured_on_another_device_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began on a GPU with bf16 would be many times slower on a CPU that emulates it."""
    run = tmp_path / "run"
    monkeypatch.setattr(precision, "_bf16_is_faster_on_cpu", lambda: False)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(training, "to_dict", lambda state: to_dict(state) | {"device": "cuda"})
        tiny_train(run, steps=5, precision="bf16")
    tiny_train(run, steps=10, precision="auto", resume=True)
    states = [
        json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        for step in (5, 10)
    ]
    assert [(state["device"], state["precision"]) for state in states] == [
        ("cuda", "bf16"),
        ("cpu", "fp32"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "exactly one of steps and minutes"),
        ({"minutes": 1.0, "steps": 1}, "steps=1, minutes=1.0"),
        (
            {"steps": None, "minutes": 1.0, "min_steps": 0},
            "min_steps: must be greater than or equal to 1, found 0",
        ),
        ({"accumulate": 0}, "accumulate: must be greater than or equal to 1"),
        ({"seed": -1}, "seed: must be greater than or equal to 0, found -1"),
        ({"ema_decay": 1.0}, "ema_decay: must be less than 1, found 1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: must be less than 1"),
        ({"precision": "fp8"}, "precision: must be 'auto', 'fp32' or 'bf16', found 'fp8'"),
    ],
)
def test_config_names_the_mistake(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_config_survives_a_dict() -> None:
    config = tiny_config(minutes=3.0, grad_clip=None)
    assert from_dict(TrainingConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("steps", "seconds", "line"),
    [
        (995, 2.3, "995 steps to go at 2.3 s a step: about 38 minutes"),
        (52, 2.3, ""),
        (53, 2.3, "53 steps to go at 2.3 s a step: about 2 minutes"),
        (99_995, 0.25, "99,995 steps to go at 0.25 s a step: about 7 hours"),
        (
            99_995,
            25.4,
            "99,995 steps to go at 25 s a step: about 29 days; a smaller preset, fewer steps or a "
            "GPU take less",
        ),
    ],
)
def test_the_time_left_is_estimated_from_the_first_steps(
    steps: int, seconds: float, line: str
) -> None:
    """The estimate ignores the warm-up steps, and a single step that was delayed."""
    first = [1000.0, 1000.0, seconds, 1000.0, seconds]
    assert training.time_to_go(steps, first) == line


def test_a_run_with_steps_prints_once_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(step=100)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    tiny_train(tmp_path / "steps", steps=30)
    tiny_train(tmp_path / "minutes", minutes=50)

    def messages(run: Path) -> list[str]:
        return [line for line in (run / "log.txt").read_text().splitlines() if "to go" in line]

    assert messages(tmp_path / "steps") == ["25 steps to go at 100 s a step: about 42 minutes"]
    assert messages(tmp_path / "minutes") == []
    tiny_train(tmp_path / "steps", steps=60, resume=True)
    assert messages(tmp_path / "steps")[1:] == ["25 steps to go at 100 s a step: about 42 minutes"]
