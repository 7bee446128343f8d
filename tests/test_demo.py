import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from driving_sim import demo
from driving_sim.data.synthetic.true_future import replay
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.tokens.store import TokenStore
from driving_sim.demo import (
    ACTIONS,
    DemoConfig,
    _find_start,
    _judged_frames,
    _psnr_matrix,
    run_demo,
)
from driving_sim.engine.config import load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model.action_plan import ActionPlan
from tests.fixtures.small_files import small_files
from tests.fixtures.synthetic_worlds import SMALL_DEMO


def test_the_whole_demo_runs_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    summary = run_demo(out, seed=1, config=SMALL_DEMO)
    saved = json.loads((out / "summary.json").read_text())
    matrix = np.array(saved["psnr_db"])
    assert matrix.shape == (4, 4)
    own = int((matrix.argmax(axis=1) == np.arange(4)).sum())
    assert saved["nearest_to_own_action"] == own
    assert f"{own} of 4" in summary
    assert TokenStore(out / "tokens").info.precision == "fp32"
    for run in ("tokenizer", "world-model"):
        assert load_yaml(out / run / "config.yaml")["training"]["precision"] == "fp32"
    with av.open(str(out / "demo.mp4")) as video:
        frames = sum(1 for _ in video.decode(video=0))
    assert frames == round(SMALL_DEMO.seconds * SMALL_DEMO.world.fps)
    assert (out / "demo.png").stat().st_size > 1000
    with Image.open(out / "demo.webp") as animation:
        assert animation.n_frames == frames  # type: ignore[attr-defined]
    assert [path.stem for path in (out / "heldout").glob("*.mp4")] == ["drive_003"]
    with pytest.raises(DriveSimError, match="finished demo"):
        run_demo(out, seed=1, config=SMALL_DEMO)
    # Restore the state of a demo that was killed in its last stage. Running the demo again must
    # give the same results.
    for name in ("summary.json", "demo.mp4"):
        (out / name).unlink()
    for seed, config in ((2, SMALL_DEMO), (1, replace(SMALL_DEMO, seconds=1.5))):
        with pytest.raises(DriveSimError, match="a demo made with other settings"):
            run_demo(out, seed=seed, config=config)
    run_demo(out, seed=1, config=SMALL_DEMO)
    assert json.loads((out / "summary.json").read_text()) == saved


@pytest.mark.parametrize("judged_seconds", [0.5, 3.0])
def test_the_judged_second_lies_within_the_futures(judged_seconds: float) -> None:
    with pytest.raises(ValueError, match="judged_seconds: must be from 1 to seconds=2"):
        DemoConfig(seconds=2.0, judged_seconds=judged_seconds)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(DriveSimError, match="other files"):
        run_demo(tmp_path, config=SMALL_DEMO)
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]


def test_a_full_disk_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write_video", "write_animation"):
        monkeypatch.setattr(demo, name, lambda *_, **__: None)
    noise = np.random.default_rng(0).integers(256, size=(5, 64, 128, 3), dtype=np.uint8)
    plan = ActionPlan(
        label="left", actions=np.zeros((5, 2), np.float32), valid=np.ones((5, 2), np.bool_)
    )
    with small_files(), pytest.raises(DriveSimError, match=r"cannot write .*demo\.png"):
        demo._write_pictures(tmp_path, [plan], [noise], [noise], fps=5.0, steering_range=0.2)
    assert list(tmp_path.iterdir()) == []


def test_each_true_future_is_closest_to_itself() -> None:
    config = DemoConfig(world=SyntheticConfig(height=32, width=64, fps=8))
    driven, start = _find_start(config, 0, 6)
    actions = {
        "straight": (6.0, 0.0),
        "left": (6.0, 0.15),
        "right": (6.0, -0.15),
        "brake": (1.0, 0),
    }
    truths = [
        replay(
            driven.world,
            driven.states[start],
            np.tile(np.array(actions[name], np.float32), (24, 1)),
        )
        for name in ACTIONS
    ]
    # Noise outside the judged second changes nothing.
    noise = np.random.default_rng(0).integers(256, size=truths[0].shape, dtype=np.uint8)
    predicted = [np.concatenate([noise[:8], truth[8:16], noise[16:]]) for truth in truths]
    matrix = _psnr_matrix(predicted, truths, _judged_frames(config))
    assert (matrix.argmax(axis=1) == np.arange(4)).all()
    assert (np.diag(matrix) > 40).all()
    assert matrix[~np.eye(4, dtype=bool)].max() < 25
