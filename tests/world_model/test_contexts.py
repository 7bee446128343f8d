from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.true_future import load_synthetic_drive
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine import run_folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model import WorldModel
from driving_sim.world_model.contexts import contexts_of, load_context
from tests.fixtures.synthetic_worlds import SMALL, psnr
from tests.fixtures.token_drives import COLS, FPS, ROWS
from tests.fixtures.world_models import new_world

SECONDS = 1.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with two contexts of 13 frames."""
    place = tmp_path_factory.mktemp("place")
    config = replace(SMALL, fps=FPS, height=16 * ROWS, width=16 * COLS)
    (video,) = write_synthetic_drives(place / "drives", drives=1, seconds=4.0, config=config)
    drive, run = video.with_suffix(".json"), place / "run"
    write_contexts(run / "contexts", {"b": (drive, 0.0), "a": (drive, 2.0)}, seconds=SECONDS)
    (run / "contexts" / ".c.1.partial.mp4").touch()
    (run / "config.json").touch()
    return run


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_contexts_are_listed_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: run / "contexts" / f"{name}.mp4" for name in ("a", "b")}
    assert list(contexts_of(run).items()) == list(expected.items())
    assert contexts_of(tmp_path) == {}
    monkeypatch.setattr(run_folder, "MODELS", run.parent)
    assert contexts_of("run") == expected


def test_a_context_starts_futures_from_its_last_frame(world: WorldModel, run: Path) -> None:
    video = contexts_of(run)["a"]
    context = load_context(world, video)
    driven = load_synthetic_drive(video.with_suffix(".json"))
    assert context.label == "a"
    assert context.start_s == pytest.approx(SECONDS)
    assert len(context.tokens) == world.context_frames + 1
    assert psnr(context.frames[-1], driven.world.render(driven.states[-1])) > 28
    past = len(context.tokens) - 1
    np.testing.assert_allclose(context.actions, driven.actions[-1 - past : -1], atol=1e-4)
    assert not context.has_future
    assert next(context.future, None) is None


def test_a_context_can_start_futures_earlier(world: WorldModel, run: Path) -> None:
    context = load_context(world, contexts_of(run)["a"], 1.0)
    assert context.start_s == pytest.approx(1.0)
    assert context.has_future
    assert len(list(context.future)) == 4
    with pytest.raises(DriveSimError, match=r"`start_s` 9: a goes from 0 to 1\.5 s"):
        load_context(world, contexts_of(run)["a"], 9.0)


def test_a_context_of_another_steering_kind_is_refused(world: WorldModel, run: Path) -> None:
    curved = WorldModel(world.transformer, world.tokenizer, fps=FPS, steering_kind="curvature")
    with pytest.raises(DriveSimError, match="curvature"):
        load_context(curved, contexts_of(run)["a"])
