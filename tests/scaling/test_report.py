"""Tests of fitting a law to run folders: counting compute, comparing runs, refusing others."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.training import cost, scaling_runs
from driving_sim.cli import app
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.scaling.report import fit_runs, scale, target_compute
from driving_sim.scaling.run import read_run
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective
from driving_sim.world_model.training.train import (
    WorldModelDataConfig,
    WorldModelRunConfig,
    train_world_model,
)
from driving_sim.world_model.transformer import TransformerConfig
from tests.fixtures.scaling_runs import BATCH, FRAMES, GRID, LAW, finish, transformer, write_run
from tests.fixtures.token_drives import tiny_tokenizer, write_store


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    sizes = ((8, 100), (16, 200), (24, 400), (32, 800), (48, 1600))
    return [write_run(tmp_path / "runs" / f"w{width}", width, steps) for width, steps in sizes]


def test_compute_matches_torchs_count_of_a_training_step(runs: list[Path]) -> None:
    """Torch counts the matrix products forward and backward; those in attention are left out."""
    run, model = read_run(runs[2]), transformer(24)
    batch = {
        "tokens": torch.randint(1000, (BATCH, FRAMES, GRID.rows, GRID.cols)),
        "previous": torch.randint(1000, (BATCH, GRID.rows, GRID.cols)),
        "has_previous": torch.ones(BATCH, dtype=torch.bool),
        "actions": torch.zeros(BATCH, FRAMES, 2),
        "action_valid": torch.ones(BATCH, FRAMES, 2, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as counter:
        loss, _ = WorldModelObjective(InputNoiseConfig(token_noise=0.0), model)(batch)
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if "attention" not in str(operator))
    # Torch also counts the slots that predict no token, one per row, and the action layers.
    assert run.compute == pytest.approx(400 * products, rel=0.1)
    assert run.compute < 400 * products


def test_only_weights_of_matrices_count(runs: list[Path]) -> None:
    model = transformer(24)
    linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    expected = sum(linear.weight.numel() for linear in [*linears, model.gather])
    expected += model.output.codes.numel()
    run = read_run(runs[2])
    assert run.parameters == expected
    assert run.all_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert run.tokens == 400 * BATCH * FRAMES * GRID.rows * GRID.cols
    slots = FRAMES * GRID.rows * (GRID.cols + 1)
    assert run.attention_share == pytest.approx(2 * 24 * slots / expected)


def test_batches_of_all_ranks_count_up_to_the_best_step(runs: list[Path]) -> None:
    run = runs[0]
    tokens_of_one_rank = read_run(run).tokens
    finish(run, 100, 6.0, batches=400)
    assert read_run(run).tokens == 4 * tokens_of_one_rank
    finish(run, 100, 6.0, batches=400, best_step=50)
    assert read_run(run).tokens == 2 * tokens_of_one_rank
    rows = [{"step": step, "phase": "train", "batches": 3 * step} for step in (25, 50, 75)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert read_run(run).tokens == 1.5 * tokens_of_one_rank
    (run / "metrics.jsonl").unlink()
    finish(run, 100, 6.0)
    write_run(run, 8, 100, 6.0, training__accumulate=4)
    assert read_run(run).tokens == 4 * tokens_of_one_rank


def test_a_law_is_written_with_its_plot_and_replaced(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "law"
    report = scale(runs[::-1], out, compute=1e15)
    assert report.fitted.law.b == pytest.approx(LAW.b, rel=1e-3)
    assert report.prediction.loss == pytest.approx(float(LAW(1e15)), rel=1e-4)
    assert report.held_out is not None
    assert abs(report.held_out.error) < 1e-4
    scale([*runs, runs[0]], out)
    written = json.loads((out / "scaling.json").read_text())
    assert [row["run"] for row in written["runs"]] == ["w8", "w16", "w24", "w32", "w48"]
    assert written["b"] == pytest.approx(LAW.b, rel=1e-3)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DriveSimError, match="do not belong to a scaling law"):
        scale(runs, out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"store__content": "other"}, "store.content differs"),
        ({"store__tokenizer": "other"}, "store.tokenizer differs"),
        ({"data__validation_windows": 32}, "data.validation_windows differs"),
        ({"model__context_frames": 6}, "model.context_frames differs"),
        ({"init_from": "runs/w8"}, "init_from"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    runs: list[Path], changed: dict[str, Any], message: str
) -> None:
    write_run(runs[1], 16, 200, 5.9, **changed)
    with pytest.raises(DriveSimError, match=message):
        fit_runs([read_run(run) for run in runs])


def test_runs_with_other_validation_drives_cannot_be_compared(runs: list[Path]) -> None:
    text = (runs[3] / "config.json").read_text()
    (runs[3] / "config.json").write_text(text.replace('["a"]', '["b"]'))
    with pytest.raises(DriveSimError, match="validation drives differs"):
        fit_runs([read_run(run) for run in runs])
    (runs[3] / "config.json").write_text(text.replace('["a"]', "[]"))
    with pytest.raises(DriveSimError, match="trained on"):
        read_run(runs[3])


def damage(run: Path, name: str, text: str | None) -> str:
    """Replace or delete a file of a run, and return the error message of reading the run."""
    if text is None:
        (run / name).unlink()
    else:
        (run / name).write_text(text)
    with pytest.raises(DriveSimError) as caught:
        read_run(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_and_unfinished_runs_are_refused_in_one_line(runs: list[Path]) -> None:
    assert "unfinished" in damage(runs[0], "finished.json", None)
    nan = '{"best_score": NaN, "best_step": 1, "steps": 1}'
    assert "finished.json.best_score: must be a finite" in damage(runs[1], "finished.json", nan)
    assert "finished.json.steps is missing" in damage(
        runs[1], "finished.json", '{"best_score": 5.0, "best_step": 1}'
    )
    assert "not the run of a world model" in damage(runs[2], "config.yaml", "training: {}")
    assert "safetensors" in damage(runs[3], "model.safetensors", "nonsense")
    text = '{"config": {"grid": {"rows": "8", "cols": 16}, "validation_drives": ["a"]}}'
    message = damage(runs[4], "config.json", text)
    assert "config.grid.rows: must be a valid integer, found '8'" in message
    assert "not a training run" in damage(runs[4], "config.yaml", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "config.json",
            '{"config": {"grid": {"rows": 8, "cols": 16}, "validation_drives": 5}}',
            "list",
        ),
        ("finished.json", '{"best_score": 1e300, "best_step": 1, "steps": 1}', "best_score"),
        ("finished.json", '{"best_score": 5.0, "best_step": 0.5, "steps": 1}', "integer"),
        ("finished.json", f'{{"best_score": 5.0, "best_step": 1, "steps": {"9" * 5000}}}', "JSON"),
        (
            "finished.json",
            f'{{"best_score": 5.0, "best_step": 9, "steps": 9, "batches": {10**17}}}',
            "tokens",
        ),
    ],
)
def test_impossible_numbers_are_refused(
    runs: list[Path], name: str, text: str, message: str
) -> None:
    assert message in damage(runs[0], name, text)


def test_damaged_lines_of_the_log_are_ignored(runs: list[Path]) -> None:
    finish(runs[0], 100, 6.0, batches=400)
    before = read_run(runs[0]).tokens
    row = json.dumps({"step": 100, "phase": "train", "batches": 800}).encode()
    lines = [b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"5", row[:-9]]
    (runs[0] / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_run(runs[0]).tokens == before
    (runs[0] / "metrics.jsonl").write_bytes(b"\n".join([*lines, row]))
    assert read_run(runs[0]).tokens == 2 * before


def test_weights_of_other_shapes_are_refused_or_counted(runs: list[Path]) -> None:
    empty = {"output.codes": np.zeros((0, 8)), "blocks.0.attention.out.weight": np.zeros(0)}
    save_file(empty, runs[0] / "model.safetensors")
    with pytest.raises(DriveSimError, match="matrices are empty"):
        read_run(runs[0])
    save_file(empty | {"output.codes": np.zeros((4, 8))}, runs[0] / "model.safetensors")
    assert read_run(runs[0]).attention_share == 0


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((6.0, 5.0, 4.9, 4.9), "the exponent -2 is at the edge"),
        ((6.0, 5.99, 5.98, 5.97), "the exponent -0.02 is at the edge"),
        ((6.0, 5.9, 5.8, 5.7), "(c = 0)"),
    ],
)
def test_a_law_at_the_edge_of_the_search_has_a_note(
    losses: tuple[float, ...], message: str, tmp_path: Path
) -> None:
    runs = [
        read_run(write_run(tmp_path / f"run-{number}", 16, 100 * 2**number, loss))
        for number, loss in enumerate(losses)
    ]
    assert any(message in note for note in fit_runs(runs).notes())


def test_reasons_to_doubt_a_law_have_notes(runs: list[Path]) -> None:
    notes = fit_runs([read_run(run) for run in runs]).notes()
    assert not any("edge" in note or "c = 0" in note for note in notes)
    finish(runs[2], 400, 5.6, best_step=100)
    notes = fit_runs([read_run(run) for run in runs], compute=1e18).notes()
    assert any("w24" in note and "best long before their end" in note for note in notes)
    assert any("products of queries" in note for note in notes)
    assert any("times the compute" in note for note in notes)
    notes_of_three = fit_runs([read_run(run) for run in runs[::2]]).notes()
    assert any("a fourth" in note for note in notes_of_three)


def test_a_target_is_a_compute_or_both_parameters_and_tokens() -> None:
    assert target_compute(None, None, None) is None
    assert target_compute(1e20, None, None) == 1e20
    assert target_compute(None, 2e9, 3e10) == pytest.approx(6 * 2e9 * 3e10)
    wrong = ((None, 1e9, None), (1e20, 1e9, 1e9), (math.nan, None, None), (-1.0, None, None))
    for target in wrong:
        with pytest.raises(DriveSimError, match=r"`compute`|`parameters`"):
            target_compute(*target)


def test_the_command_reads_the_runs_of_real_trainings(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    write_store(tmp_path / "tokens", fingerprint=tokenizer.fingerprint)
    for width, steps in ((8, 2), (16, 4), (32, 8)):
        config = WorldModelRunConfig(
            model=TransformerConfig(layers=1, width=width, heads=2, kv_heads=1, context_frames=4),
            data=WorldModelDataConfig(batch_size=2, validation_windows=4, preview=False),
            training=TrainingConfig(
                steps=steps, learning_rate=0.01, ema_decay=0.0, workers=0, precision="fp32"
            ),
        )
        train_world_model(
            tmp_path / "tokens",
            config,
            tmp_path / f"w{width}",
            tokenizer=tmp_path / "tokenizer",
            device="cpu",
        )
        # The models learn nothing in so few steps, so write bits that fall with the width.
        finished = json.loads((tmp_path / f"w{width}" / "finished.json").read_text())
        finished["best_score"] = 3 + 1 / width
        (tmp_path / f"w{width}" / "finished.json").write_text(json.dumps(finished))
    folders = [str(tmp_path / f"w{width}") for width in (8, 16, 32)]
    assert read_run(tmp_path / "w16").tokens == 4 * 2 * 4 * 12
    out = tmp_path / "law"
    result = CliRunner().invoke(app, ["scaling", *folders, "--out", str(out)])
    assert result.exit_code == 0, result.output + result.stderr
    assert "bits per token = " in result.stdout
    too_few = CliRunner().invoke(app, ["scaling", *folders[:2], "--out", str(out)])
    assert too_few.exit_code == 1
    assert "error: the runs have 2 different amounts of compute" in too_few.stderr
    assert np.isfinite(json.loads((out / "scaling.json").read_text())["prediction"]["loss"])


def test_the_series_of_small_runs_spans_enough_compute() -> None:
    computes = [
        share * cost.Model(width=width, layers=layers, codes=1000, queries_per_key=2).counted
        for width, layers, share in scaling_runs.SIZES
    ]
    # One run is held out. Three of the others determine the law, and the fourth its error.
    assert len(computes) >= 5
    assert computes == sorted(computes)
    assert computes[-1] / computes[0] > 10**1.5


def test_an_interrupted_series_of_runs_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_runs, "SIZES", ((32, 1, 0.5), (64, 1, 1.0)))
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    write_store(tmp_path / "tokens", fingerprint=tokenizer.fingerprint)

    def train() -> list[Path]:
        return scaling_runs.train_all(
            tmp_path / "tokens", tmp_path / "tokenizer", tmp_path / "out", steps=4, device="cpu"
        )

    first, second = train()
    assert read_run(first).compute < read_run(second).compute
    (second / "finished.json").unlink()
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    assert train() == [first, second]
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert read_run(second).steps == 4
