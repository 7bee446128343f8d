from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats
from driving_sim.evaluate.actions import fidelity
from driving_sim.evaluate.actions.fidelity import compare_actions
from driving_sim.evaluate.footage import Clip, Footage
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.world_models import new_world

FRAMES = 12


class PixelProbe:
    """A probe that reads speed and steering from the first two pixels of a frame."""

    look_back = 2

    def estimate(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        pixels = frames[1:, 0, :2, 0].astype(np.float64)
        return np.stack([pixels[:, 0] / 20, (pixels[:, 1] - 128) / 100], axis=1)


def painted(actions: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return frames [N, 48, 64, 3] in which `PixelProbe` reads these actions."""
    frames = np.zeros((len(actions), 48, 64, 3), np.uint8)
    frames[:, 0, 0] = (20 * actions[:, SPEED, None]).round()
    frames[:, 0, 1] = (100 * actions[:, STEERING, None] + 128).round()
    return frames


@pytest.fixture(scope="module")
def world() -> WorldModel:
    plain = new_world()
    statistics = ActionStatistics(mean=(6.0, 0.05), steering_p95=0.3, steering_p99=0.3)
    model = Transformer(plain.config.model, plain.config.grid, statistics)
    return WorldModel(model, plain.tokenizer, fps=FPS, steering_kind="road_wheel")


@pytest.fixture(scope="module")
def clips(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("fidelity") / "tokens"
    store = write_store(folder, [80], fingerprint=world.tokenizer.fingerprint)
    footage = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    starts = range(5, 60, 9)
    return [Clip(footage=footage, start=n, context_frames=4, frames=FRAMES) for n in starts]


def measured(world: WorldModel, clips: list[Clip], change: Any) -> dict[str, Any]:
    """Return the metrics for rollouts whose realised actions are `change` of the commanded ones."""
    return dict(section_of(world, clips, change).metrics)


def section_of(world: WorldModel, clips: list[Clip], change: Any, error: float = 0.0) -> Section:
    """Return the section whose metrics `measured` returns; `error` is the probe's steering RMSE."""
    floor = {"steering": {"rmse": error}}
    probe: Any = PixelProbe()
    realised: dict[str, list[Floats]] = {"recorded": [], "model": []}
    for clip in clips:
        actions, _ = clip.actions
        done = change(actions.copy(), clip.context_frames - 1)
        for source, frames in (("recorded", clip.truth), ("model", painted(done))):
            realised[source].append(fidelity.read(probe, clip.context, frames))
    return compare_actions(world, clips, realised, floor)


def test_obedience_is_perfect(world: WorldModel, clips: list[Clip]) -> None:
    metrics = measured(world, clips, lambda actions, future: actions[future:])
    for channel in ("speed", "steering"):
        assert metrics[channel]["model"]["correlation"]["mean"] == pytest.approx(1, abs=1e-3)
        assert metrics[channel]["model"]["gain"] == pytest.approx(1, abs=0.02)
        assert metrics[channel]["model"]["delay_frames"] == 0
    assert metrics["steering"]["model"]["sign_accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    # A constant always turns to the same side, so it is right for exactly one of the sides.
    assert metrics["steering"]["constant"]["sign_accuracy"]["mean"] == 0.5
    assert metrics["speed"]["constant"]["correlation"] is None


def test_commands_that_vary_less_than_the_probes_error_are_not_judged(
    world: WorldModel, clips: list[Clip]
) -> None:
    for error, is_judged in ((1e-6, True), (10.0, False)):
        section = section_of(world, clips, lambda actions, future: actions[future:], error)
        steering = section.metrics["steering"]["model"]
        assert (steering["correlation"] is not None) == is_judged
        assert (steering["gain"] is not None) == is_judged
        assert (steering["gain_interval"] is not None) == is_judged
        assert section.metrics["speed"]["model"]["gain"] == pytest.approx(1, abs=0.01)


def test_a_planted_sign_flip_is_found(world: WorldModel, clips: list[Clip]) -> None:
    metrics = measured(world, clips, lambda actions, future: actions[future:] * [1, -1])
    assert metrics["steering"]["model"]["correlation"]["mean"] == pytest.approx(-1, abs=1e-3)
    assert metrics["steering"]["model"]["sign_accuracy"]["mean"] == 0.0
    assert metrics["speed"]["model"]["correlation"]["mean"] == pytest.approx(1, abs=1e-3)


def test_a_planted_lag_is_found(world: WorldModel, clips: list[Clip]) -> None:
    """Let the picture follow the action of the frame before: an off-by-one error."""
    metrics = measured(world, clips, lambda actions, future: actions[future - 1 : -1])
    assert metrics["steering"]["model"]["delay_frames"] == 1
    assert metrics["speed"]["model"]["delay_frames"] == 1


def test_the_recorded_frames_are_read_as_well(
    world: WorldModel, clips: list[Clip], tmp_path: Path
) -> None:
    metrics = measured(world, clips, lambda actions, future: actions[future:])
    truth = np.stack(
        [PixelProbe().estimate(np.concatenate([c.context[-1:], c.truth])) for c in clips]
    )
    commanded = np.stack([clip.actions[0][3:] for clip in clips])
    expected = np.abs(truth - commanded).mean(axis=(0, 1))
    assert metrics["speed"]["recorded"]["mean_absolute_error"] == pytest.approx(expected[SPEED])
    assert metrics["steering"]["recorded"]["mean_absolute_error"] == pytest.approx(
        expected[STEERING]
    )


def test_a_clip_and_its_mirror_image_are_one_unit(world: WorldModel, clips: list[Clip]) -> None:
    def noisy(actions: NDArray[np.float32], future: int) -> NDArray[np.float64]:
        rng = np.random.default_rng(round(1000 * float(actions[0, SPEED])))
        return actions[future:].astype(np.float64) + rng.normal(0, [0.5, 0.2], (FRAMES, 2))

    # The copies are not marked as mirrored here, so that they are exactly the same evidence.
    alone, twice = (measured(world, chosen, noisy) for chosen in (clips, [*clips, *clips]))
    assert (alone["clips"], alone["independent_clips"]) == (len(clips), len(clips))
    assert (twice["clips"], twice["independent_clips"]) == (2 * len(clips), len(clips))
    for channel, name in (("speed", "correlation"), ("steering", "sign_accuracy")):
        expected = alone[channel]["model"][name]
        assert expected["low"] < expected["mean"] < expected["high"]
        assert twice[channel]["model"][name] == pytest.approx(expected)
    lone = measured(world, [clips[0], replace(clips[0], mirrored=True)], noisy)
    assert lone["independent_clips"] == 1
    assert lone["speed"]["model"]["correlation"]["low"] is None


def test_the_steering_of_a_standing_car_is_not_judged(
    world: WorldModel, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the probe read a steering of 0 from every slow frame; these frames must not count."""
    speeds = np.concatenate([clip.actions[0][3:, SPEED] for clip in clips])
    monkeypatch.setattr(fidelity, "STANDING_MPS", 5.0)  # the drive's speeds are 3 to 9 m/s
    slow = (speeds < 5.0).sum()
    assert 0 < slow < len(speeds)

    def stands(actions: NDArray[np.float32], future: int) -> NDArray[np.float32]:
        done = actions[future:].copy()
        done[done[:, SPEED] < 5.0, STEERING] = 0
        return done

    metrics = measured(world, clips, stands)
    assert metrics["steering"]["model"]["transitions"] == len(speeds) - slow
    assert metrics["steering"]["model"]["sign_accuracy"]["mean"] == 1
    assert metrics["speed"]["model"]["transitions"] == len(speeds)


def test_the_report_names_its_source_and_shows_intervals(
    world: WorldModel, clips: list[Clip]
) -> None:
    section = section_of(world, clips, lambda actions, future: actions[future:])
    assert section.metrics["recorded"] is False
    assert "the probe reads the tokenizer's reconstructions" in section.text.replace("\n", " ")
    _, table = (part for part in section.parts if isinstance(part, Table))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    model = rows["steering, model"]
    assert model["sign accuracy"] == section.metrics["steering"]["model"]["sign_accuracy"]
    assert model["correlation"] == section.metrics["steering"]["model"]["correlation"]
