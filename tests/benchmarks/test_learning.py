import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.rollouts import lag
from benchmarks.training import learning
from benchmarks.training.learning import PANELS, curve
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.run_log import METRICS


def test_a_curve_shows_the_best_validation_so_far_over_minutes_of_training(tmp_path: Path) -> None:
    tokenizer, world_model = PANELS
    rows = [
        {"step": 10, "phase": "train", "training_seconds": 60.0},
        {"step": 20, "phase": "train", "training_seconds": 180.0},
        *(
            {"step": step, "phase": "validation", tokenizer.metric: a, world_model.metric: b}
            for step, a, b in ((10, 20.0, 6.0), (15, 19.0, 7.0), (20, 21.0, 5.5))
        ),
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    minutes, psnr = curve(tmp_path, tokenizer).T
    assert minutes == pytest.approx([1, 2, 3])
    assert np.array_equal(psnr, [20, 20, 21])
    assert np.array_equal(curve(tmp_path, world_model)[:, 1], [6, 6, 5.5])


@pytest.mark.parametrize("command", [learning, lag])
def test_plotting_without_runs_is_refused(command: ModuleType, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    options = argparse.Namespace(out=tmp_path, picture=picture, seeds=[0], rounds=1)
    with pytest.raises(DriveSimError, match=r"contains no .*; run `train"):
        command.plot(options)
    assert not picture.exists()


def test_a_run_without_its_peer_is_not_plotted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / METRICS).touch()
    with pytest.raises(DriveSimError, match="no pair"):
        learning.plot(argparse.Namespace(out=tmp_path, picture=tmp_path / "plot.png"))
