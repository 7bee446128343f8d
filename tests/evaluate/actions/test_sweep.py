"""A model that shows the true futures gets the best scores; a model with a fault does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.drive import sample
from driving_sim.data.inspect.motion import picture_change, yaw_motion
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.true_future import replay
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.evaluate.actions import sweep
from driving_sim.evaluate.actions.sweep import _commands, _nearest, _truths, evaluate_sweep
from driving_sim.evaluate.footage import Clip, Footage, footage_of
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.world_models import new_world

Frames = NDArray[np.uint8]
Actions = NDArray[np.float32]
START, CONTEXT, FUTURE = 10, 4, 8
LEFT_FOR_RIGHT = np.array([1, -1], np.float32)


class MotionProbe:
    """A probe that takes the picture's turn for steering and the road's change for speed."""

    look_back = 2

    def estimate(self, frames: Frames) -> NDArray[np.float32]:
        return np.stack([picture_change(frames), yaw_motion(frames)], axis=1)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    plain = new_world()
    statistics = ActionStatistics(mean=(6.0, 0.0), steering_p95=0.15, steering_p99=0.15)
    model = Transformer(plain.config.model, plain.config.grid, statistics)
    return WorldModel(model, plain.tokenizer, fps=FPS, steering_kind="road_wheel")


@pytest.fixture(scope="module")
def footage(
    world: WorldModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[float], Footage]:
    """Return a function that makes a synthetic drive at any rate, sampled at the model's rate."""
    by_fps: dict[float, Footage] = {}

    def at(fps: float) -> Footage:
        if fps not in by_fps:
            folder = tmp_path_factory.mktemp("sweep")
            config = SyntheticConfig(height=48, width=64, fps=fps, traffic=0.0, palettes=("noon",))
            write_synthetic_drives(folder / "videos", drives=1, seconds=3, config=config)
            drives = find_drives([folder / "videos"])
            tokenize(drives, world.tokenizer, folder / "tokens", fps=FPS)
            tokens = TokenStore(folder / "tokens").drives
            sampled = [sample(drive, fps=FPS) for drive in drives.drives]
            by_fps[fps] = footage_of(tokens, sampled, world.tokenizer)[0]
        return by_fps[fps]

    return at


def clip_of(footage: Footage) -> Clip:
    return Clip(footage=footage, start=START, context_frames=CONTEXT, frames=FUTURE)


def fake_rollouts(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch, drawn: Callable[..., Any]
) -> None:
    """Let the model's rollouts show the frames [N, H, W, 3] that `drawn` returns for actions."""
    futures: list[Frames] = []

    def generate(
        prefix: object, actions: Actions, valid: object, *, sampling: Sampling
    ) -> Iterator[SimpleNamespace]:
        futures[:] = [drawn(branch) for branch in actions]
        tokens = torch.arange(len(actions))[:, None, None].expand(-1, 3, 4)
        return iter([SimpleNamespace(tokens=tokens)] * actions.shape[1])

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(futures[int(tokens[0, 0, 0])])

    monkeypatch.setattr(world, "generate", generate)
    monkeypatch.setattr(world.tokenizer, "decode", decode)


def swept(
    world: WorldModel,
    clip: Clip,
    monkeypatch: pytest.MonkeyPatch,
    *,
    change: Callable[[Actions], Actions] = lambda actions: actions,
    late: int = 0,
) -> dict[str, Any]:
    """Return the metrics of a model that shows the true future of `change` of its commands.

    The future begins `late` frames too late.
    """
    synthetic = clip.footage.synthetic
    assert synthetic is not None
    stride = round(synthetic.world.config.fps / FPS)
    state = synthetic.states[stride * (START - 1 + late)]

    def drawn(actions: Actions) -> Frames:
        frames = replay(synthetic.world, state, change(actions).repeat(stride, axis=0))
        return frames[stride - 1 :: stride]

    fake_rollouts(world, monkeypatch, drawn)
    section = evaluate_sweep(world, MotionProbe(), [clip], Sampling())  # type: ignore[arg-type]
    return dict(section.metrics)


@pytest.mark.parametrize("fps", [FPS, 2 * FPS])
def test_the_truth_gets_the_best_scores_at_any_multiple_of_the_models_rate(
    world: WorldModel,
    footage: Callable[[float], Footage],
    monkeypatch: pytest.MonkeyPatch,
    fps: float,
) -> None:
    metrics = swept(world, clip_of(footage(fps)), monkeypatch)
    for channel in ("steering", "speed"):
        assert metrics["model"][channel] == {"rank_correlation": 1.0, "in_order": 1.0}
    assert metrics["truth"] == metrics["model"]
    assert metrics["nearest"] == 1.0
    assert metrics["nearest_by_chance"] < metrics["nearest_by_sight"] <= 1.0
    assert metrics["nearest_by_chance"] == pytest.approx(1 / 21)
    assert metrics["starts"] == metrics["starts_with_truth"] == 1


def test_swapping_left_and_right_is_noticed(
    world: WorldModel, footage: Callable[[float], Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(footage(FPS))
    metrics = swept(world, clip, monkeypatch, change=lambda actions: actions * LEFT_FOR_RIGHT)
    assert metrics["model"]["steering"] == {"rank_correlation": -1.0, "in_order": 0.0}
    assert metrics["model"]["speed"] == {"rank_correlation": 1.0, "in_order": 1.0}
    assert metrics["truth"]["steering"]["rank_correlation"] == 1.0
    assert metrics["nearest"] == pytest.approx(3 / 21)  # only the three straight rollouts


def test_swapping_slow_and_fast_is_noticed(
    world: WorldModel, footage: Callable[[float], Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(footage(FPS))
    fastest = _commands(world, clip)[..., SPEED].max()
    slowest = _commands(world, clip)[..., SPEED].min()

    def swapped(actions: Actions) -> Actions:
        return np.stack([slowest + fastest - actions[:, SPEED], actions[:, STEERING]], axis=1)

    metrics = swept(world, clip, monkeypatch, change=swapped)
    assert metrics["model"]["speed"] == {"rank_correlation": -1.0, "in_order": 0.0}
    assert metrics["model"]["steering"]["rank_correlation"] == 1.0
    assert metrics["nearest"] == pytest.approx(7 / 21)


@pytest.mark.parametrize("late", [-1, 1])
def test_a_future_one_frame_late_or_early_is_not_the_truth(
    world: WorldModel,
    footage: Callable[[float], Footage],
    monkeypatch: pytest.MonkeyPatch,
    late: int,
) -> None:
    metrics = swept(world, clip_of(footage(FPS)), monkeypatch, late=late)
    assert metrics["nearest"] < 1


def test_the_true_future_of_the_recorded_actions_is_the_recording(
    footage: Callable[[float], Footage],
) -> None:
    clip = clip_of(footage(FPS))
    synthetic = clip.footage.synthetic
    assert synthetic is not None
    driven = synthetic.actions[START - 1 : START - 1 + FUTURE]
    truths = _truths(clip, driven[None, None])
    assert truths is not None
    expected = [synthetic.world.render(state) for state in synthetic.states[START:][:FUTURE]]
    assert np.array_equal(truths[0, 0], np.stack(expected))


def test_clips_with_uneven_strides_and_mirrored_clips_have_no_truth(
    world: WorldModel, footage: Callable[[float], Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    for clip in (clip_of(footage(1.5 * FPS)), replace(clip_of(footage(FPS)), mirrored=True)):
        assert _truths(clip, _commands(world, clip)) is None


def test_the_share_of_nearest_rollouts_has_an_interval_over_the_starts(
    world: WorldModel, footage: Callable[[float], Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(footage(FPS))
    assert swept(world, clip, monkeypatch)["nearest_interval"] == {"low": None, "high": None}
    shares = iter([1.0, 0.9, 0.25, 0.7])  # of the model and by sight, in turns
    monkeypatch.setattr(sweep, "_nearest", lambda *_: next(shares))
    section = evaluate_sweep(world, MotionProbe(), [clip, clip], Sampling())  # type: ignore[arg-type]
    assert section.metrics["nearest"] == 0.625
    assert section.metrics["nearest_interval"] == {"low": 0.25, "high": 1.0}


def test_without_a_synthetic_world_only_the_model_is_measured(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let every rollout show its command as grey levels, which the probe reads."""
    store = write_store(tmp_path / "tokens", [40], fingerprint=world.tokenizer.fingerprint)

    class PixelProbe:
        look_back = 2

        def estimate(self, frames: Frames) -> NDArray[np.float64]:
            return frames[1:, 0, 0, :2].astype(np.float64)

    def drawn(actions: Actions) -> Frames:
        frames = np.zeros((FUTURE, 48, 64, 3), np.uint8)
        frames[..., 0] = rearrange(10 * actions[:, SPEED], "n -> n 1 1")
        frames[..., 1] = rearrange(128 + 400 * actions[:, STEERING], "n -> n 1 1")
        return frames

    clip = clip_of(Footage(drive=store.drives[0], tokenizer=world.tokenizer))
    unread = np.zeros((CONTEXT, 48, 64, 3), np.uint8)
    monkeypatch.setattr(Clip, "context", property(lambda self: unread))
    fake_rollouts(world, monkeypatch, drawn)
    section = evaluate_sweep(world, PixelProbe(), [clip, clip], Sampling())  # type: ignore[arg-type]
    assert set(section.metrics) == {"starts", "starts_with_truth", "model"}
    assert section.metrics["starts"] == 2
    assert section.metrics["starts_with_truth"] == 0
    for channel in ("steering", "speed"):
        assert section.metrics["model"][channel] == {"rank_correlation": 1.0, "in_order": 1.0}


def test_commands_go_from_left_to_right_around_the_speed_at_the_start(
    world: WorldModel, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "tokens", [40])  # every frame has a different speed
    clip = clip_of(Footage(drive=store.drives[0], tokenizer=world.tokenizer))
    commands = _commands(world, clip)
    assert commands.shape == (3, 7, FUTURE, 2)
    assert (np.diff(commands, axis=2) == 0).all()
    np.testing.assert_allclose(commands[0, :, 0, STEERING], np.linspace(0.15, -0.15, 7), atol=1e-6)
    speed_at_start = clip.footage.drive.actions[START - 2, SPEED]
    expected = speed_at_start * np.array([0.6, 1, 1.4])
    np.testing.assert_allclose(commands[:, 0, 0, SPEED], expected, rtol=1e-6)


def test_only_the_last_second_decides_which_truth_is_nearest(
    footage: Callable[[float], Footage],
) -> None:
    clip = replace(clip_of(footage(FPS)), frames=12)
    shape = (2, 2, 12, 16, 16, 3)
    truths = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    futures = truths // 2 + 64  # like its own truth, but paler
    futures[:, :, :4] = truths[::-1, :, :4]
    assert _nearest(futures, truths, clip) == 1.0
    futures[1, 1] = truths[1, 0]
    assert _nearest(futures, truths, clip) == 0.75
