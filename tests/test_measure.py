"""The evaluation commands' functions, from a run and videos to a report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.compare import compare_reports
from driving_sim.evaluate.inverse_dynamics import InverseDynamics, ProbeClip
from driving_sim.evaluate.stability import StabilityConfig
from driving_sim.evaluate.world_model import HEADLINE, EvaluationConfig
from driving_sim.measure import TOKENIZER_HEADLINE, measure_tokenizer, measure_world_model
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.transformer import TokenGrid, Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.test_transformer import CONFIG
from tests.token_drives import COLS, FPS, LEVELS, ROWS, tiny_tokenizer

SMALL = EvaluationConfig(
    stride=4,
    shuffles=1,
    coded_frames=3,
    clips=2,
    seconds=1.5,
    sweeps=1,
    long_rollouts=1,
    long_seconds=4.0,
    probe_steps=2,
    stability=StabilityConfig(block_s=1.0, hop_s=0.5, min_lag_s=0.5, max_lag_s=2.0, loop_s=0.5),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic drives, two to train on and one held out, and an untrained model of them."""
    folder = tmp_path_factory.mktemp("measure")
    config = SyntheticConfig(height=16 * ROWS, width=16 * COLS, fps=FPS)
    write_synthetic_drives(folder / "videos", drives=3, seconds=6, config=config)
    found = find_drives(sorted((folder / "videos").glob("*.mp4"))[:2])
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenize(found, tokenizer, folder / "tokens")
    grid = TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS)
    statistics = ActionStatistics(
        mean=(8.0, 0.0), std=(2.0, 0.1), steering_p95=0.2, steering_p99=0.3
    )
    world = WorldModel(
        Transformer(CONFIG, grid, statistics), tokenizer, fps=FPS, steering_kind="road_wheel"
    )
    world.save(folder / "world-model")
    return folder


def measure(place: Path, out: Path, config: EvaluationConfig = SMALL, **options: object) -> None:
    measure_world_model(
        place / "world-model",
        [place / "videos" / "drive_002.mp4"],
        out,
        training_tokens=place / "tokens",
        config=config,
        device="cpu",
        precision="fp32",
        **options,  # type: ignore[arg-type]
    )


def test_a_world_model_is_measured_whole_and_the_same_again(place: Path, tmp_path: Path) -> None:
    measure(place, tmp_path / "a", training_videos=[place / "videos"])
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    sections = {"likelihood", "coding", "action_information", "quality", "fidelity", "sweep"}
    assert sections | {"stability"} <= set(metrics)
    assert metrics["likelihood"]["bits_per_token"]["model"]["mean"] == pytest.approx(
        np.log2(9), abs=1e-4
    )
    assert metrics["coding"]["exact"] is True
    assert metrics["fidelity"]["clips"] == 4  # two, and their mirror images
    assert metrics["sweep"]["truth"] is not None  # the drive is a synthetic one
    # A key figure whose metric is not there is left out: none of ours may be misspelt.
    assert list(metrics["headline"]) == [figure.label for figure in HEADLINE]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Action fidelity" in page
    # Once more, with the probe of the first: the same protocol, the same numbers.
    measure(place, tmp_path / "b", probe=tmp_path / "a")
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    for name in sections:
        assert again[name] == metrics[name], name
    assert "same protocol" in compare_reports(tmp_path / "a", tmp_path / "b", tmp_path / "c.html")
    measure(place, tmp_path / "d", replace(SMALL, clips=1), probe=tmp_path / "a")
    with pytest.raises(DriveSimError, match=r"settings\.clips: 2 / 1"):
        compare_reports(tmp_path / "a", tmp_path / "d", tmp_path / "e.html")


def test_a_tokenizer_is_measured_and_a_report_is_not_written_over(
    place: Path, tmp_path: Path
) -> None:
    videos = [place / "videos" / "drive_002.mp4"]
    figures = measure_tokenizer(place / "tokenizer", videos, tmp_path / "report", every=1)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["reconstruction"]["frames"] == 48
    assert list(figures) == [figure.label for figure in TOKENIZER_HEADLINE]
    with pytest.raises(DriveSimError, match="already holds a report"):
        measure_tokenizer(place / "tokenizer", videos, tmp_path / "report", every=1)


def test_a_store_beside_videos_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="is a token store: name it alone"):
        measure_world_model(
            place / "world-model",
            [place / "tokens", place / "videos"],
            tmp_path / "report",
            training_tokens=place / "tokens",
            config=SMALL,
            device="cpu",
        )


def test_the_probe_never_learns_from_a_held_out_drive(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the held-out drive is named as a video, nor where it comes as tokens."""
    held = place / "videos" / "drive_002.mp4"
    tokenize(find_drives([held]), tiny_tokenizer(), tmp_path / "heldout")
    fit, seen = InverseDynamics.fit, []

    def watched(learned: list[ProbeClip], validation: list[ProbeClip], **options: Any) -> Any:
        seen.append([*learned, *validation])
        return fit(learned, validation, **options)

    monkeypatch.setattr(InverseDynamics, "fit", watched)
    for number, data in enumerate((held, tmp_path / "heldout")):
        measure_world_model(
            place / "world-model",
            [data],
            tmp_path / str(number),
            training_tokens=place / "tokens",
            training_videos=[place / "videos"],
            config=SMALL,
            device="cpu",
            precision="fp32",
        )
    frames = np.stack(list(find_drives([held]).drives[0].stream()))
    for clips in seen:
        assert len(clips) == 2
        assert not any(np.array_equal(clip.frames, frames) for clip in clips)
