import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from driving_sim.data.actions.action_log import STEERING
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.futures.measure import measure_futures
from driving_sim.evaluate.futures.nearest import pairwise_psnr
from driving_sim.evaluate.futures.section import evaluate_futures, roll_out
from driving_sim.evaluate.futures.starts import Start, find_starts, read
from driving_sim.evaluate.pictures.feature_distance import FeatureDistance
from driving_sim.evaluate.report.compare import compare_reports
from driving_sim.evaluate.report.section import Media
from driving_sim.world_model.sampling.draw_waves import FrameSample
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.synthetic_worlds import write_futures
from tests.fixtures.token_drives import FPS
from tests.fixtures.world_models import new_world

COMMANDS = {"left": (9.0, 0.08), "right": (9.0, -0.08), "straight": (9.0, 0.0)}


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("futures") / "futures"
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_futures(folder, COMMANDS, starts=2, config=config)
    return folder


def knows_the_truth(
    world: WorldModel,
    starts: Sequence[Start],
    monkeypatch: pytest.MonkeyPatch,
    turns: int = 1,
) -> None:
    """Let the model predict what truly follows; with `turns=-1` it steers the wrong way."""
    tokens = [
        {
            round(COMMANDS[name][1] * turns, 2): world.tokenizer.encode(read(world, future)[1:])
            for name, future in start.futures.items()
        }
        for start in starts
    ]

    def generate(
        prefix: Any, actions: Any, valid: Any, *, sampling: Sampling, first_draw: int
    ) -> Iterator[FrameSample]:
        assert valid[:-1].all()
        assert not valid[-1].any()
        true = tokens[first_draw]
        futures = torch.stack([true[round(float(s), 2)] for s in actions[:, 0, STEERING]])
        for frame in futures.unbind(1):
            yield FrameSample(frame, *[frame.float()] * 3)

    monkeypatch.setattr(world, "generate", generate)


@pytest.mark.parametrize(("turns", "nearest", "told_apart"), [(1, 6, 1), (-1, 2, 0)])
def test_a_model_that_knows_the_truth_is_told_from_one_that_steers_the_wrong_way(
    world: WorldModel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    turns: int,
    nearest: int,
    told_apart: int,
) -> None:
    starts = find_starts(world, folder)
    knows_the_truth(world, starts, monkeypatch, turns)
    section = evaluate_futures(world, starts, sampling=Sampling(), distance=None)
    assert section.metrics["rollouts"] == 6
    for window in ("early", "late"):
        judged = section.metrics["psnr_db"][window]
        assert judged["model"]["nearest_count"] == nearest
        assert judged["model"]["pairs"]["left/right"]["mean"] == told_apart
        assert judged["reconstructed"]["nearest_count"] == 6
        assert judged["reconstructed"]["own"] is None
        assert judged["action_free"]["nearest_count"] == 2
        assert judged["action_free"]["pairs"]["left/right"]["mean"] == 0.5
    picture = section.parts[-1]
    assert isinstance(picture, Media)
    assert picture.data.startswith(b"\x89PNG")


def test_rollouts_follow_the_actions_of_their_futures(world: WorldModel, folder: Path) -> None:
    """The last rollout has no actions. The others equal those of `WorldModel.rollout`."""
    start = find_starts(world, folder)[1]
    now, futures = roll_out(world, start, Sampling(seed=3))
    context = read(world, start.context)
    assert np.array_equal(now, context[-1])
    actions = np.concatenate([start.actions[0], np.full((1, 16, 2), np.nan, np.float32)])
    expected = world.rollout(context, start.context.actions[:-1], actions, seed=3)
    assert np.array_equal(np.stack([*futures.model, futures.action_free]), expected.frames)
    other = roll_out(world, start, Sampling(seed=3), first_draw=1)[1]
    assert not np.array_equal(other.model, futures.model)


class _Distance:
    fingerprint = "f00d"

    def __call__(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return -pairwise_psnr(frames, others)


@pytest.fixture
def run(world: WorldModel, tmp_path: Path) -> Path:
    world.save(tmp_path / "run")
    return tmp_path / "run"


def measured(run: Path, folder: Path, out: Path, **options: Any) -> dict[str, str]:
    sampling = options.pop("sampling", Sampling())
    return measure_futures(run, folder, out, sampling=sampling, device="cpu", precision="fp32")


def test_the_report_has_both_measures_and_can_be_compared(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureDistance, "if_installed", lambda device: _Distance())
    figures = measured(run, folder, tmp_path / "a")
    assert figures["nearest to their own future, PSNR, last second"].endswith(" of 6")
    assert "left and right told apart (share), feature distance, 0.5 to 1.5 s" in figures
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())["futures"]
    assert metrics["psnr_db"]["per_tokenizer"] is True
    table = metrics["feature_distance"]["late"]["model"]["table"]
    assert [[*row] for row in table.values()] == [["left", "right", "straight"]] * 3
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Mean score of the true futures after the tokenizer (rows)" in page
    with Image.open(tmp_path / "a" / "futures.png") as sheet:
        assert sheet.width > sheet.height / 2
    assert measured(run, folder, tmp_path / "b") == figures
    text = compare_reports(tmp_path / "a", tmp_path / "b", tmp_path / "ab.html")
    assert "nearest to their own future, PSNR, last second" in text
    measured(run, folder, tmp_path / "c", sampling=Sampling(temperature=0.5))
    with pytest.raises(DriveSimError, match=r"sampling\.temperature: 1\.0 / 0\.5"):
        compare_reports(tmp_path / "a", tmp_path / "c", tmp_path / "ac.html")


def test_without_the_network_the_rest_is_measured_and_a_line_says_so(
    run: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FeatureDistance, "if_installed", lambda device: None)
    figures = measured(run, folder, tmp_path / "report")
    assert len(figures) == 4
    assert "pip install 'drivesim[perceptual]'" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())["futures"]
    assert "feature_distance" not in metrics
    assert "is not in this report" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(DriveSimError, match="already holds a report"):
        measured(run, folder, tmp_path / "report")
