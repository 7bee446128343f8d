"""A rollout that keeps the picture shows the same road; one that shows another place does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from driving_sim.engine.errors import TooLittleDataError
from driving_sim.evaluate.footage import Footage
from driving_sim.evaluate.pictures.standing import choose_standing_start, evaluate_standing
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS
from tests.fixtures.world_models import new_world

CONTEXT = 4
SPEEDS = [8.0] * 40 + [0.0] * 10 + [8.0] * 40
"""Speed from each frame to the next. So the car is at the same place in frames 40 to 50."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> WorldModel:
    """A model whose tokens are decoded to grey levels: token 8 gives a level of 240."""

    def decode(tokens: Any) -> torch.Tensor:
        grey = (torch.as_tensor(np.asarray(tokens)) * 30).to(torch.uint8)
        return (
            grey.repeat_interleave(16, 1).repeat_interleave(16, 2)[..., None].expand(-1, -1, -1, 3)
        )

    world = new_world()
    monkeypatch.setattr(world.tokenizer, "decode", decode)
    return world


def footage(world: WorldModel, speeds: list[float], name: str = "drive", **changes: Any) -> Footage:
    """Return a drive whose tokens are 0, but 4 at every place but that of frame 40."""
    count = len(speeds)
    travelled = np.concatenate([[0.0], np.cumsum(speeds)[:-1]])
    at = min(40, count - 1)
    tokens = np.where(travelled == travelled[at], 0, 4)[:, None, None]
    fixed: dict[str, Any] = {
        "id": name,
        "tokens": np.broadcast_to(tokens, (count, ROWS, COLS)).astype(np.uint16),
        "actions": np.stack([speeds, np.full(count, 0.25)], 1).astype(np.float32),
        "action_valid": np.ones((count, 2), np.bool_),
        "timestamps": np.arange(count) / FPS,
        "entry": SimpleNamespace(start=0, segments=((0, count),)),
        "info": SimpleNamespace(fps=FPS),
    }
    drive: Any = SimpleNamespace(**(fixed | changes))
    return Footage(drive=drive, tokenizer=world.tokenizer)


def test_the_start_is_the_first_whose_whole_context_stands(world: WorldModel) -> None:
    start = choose_standing_start([footage(world, [8.0] * 60), footage(world, SPEEDS)], CONTEXT)
    # Frames 40 to 43 are the first four at the place where the car stands.
    assert start.clip.start - 1 == 43
    assert start.speed_mps == 0
    assert start.stands
    assert list(start.same) == [40, 41, 42, 44, 45, 46, 47, 48, 49, 50]
    # At 1 m a frame, a place 20 m away is 20 frames away.
    assert start.elsewhere.min() == 0
    assert start.elsewhere.max() == 89
    assert len(start.elsewhere) == 16
    assert not any(20 < frame < 70 for frame in start.elsewhere)


def test_without_a_standing_car_the_slowest_start_is_chosen(world: WorldModel) -> None:
    slow = [*SPEEDS[:40], *[2.0] * 10, *SPEEDS[50:]]
    start = choose_standing_start([footage(world, slow)], CONTEXT)
    assert start.speed_mps == 2
    assert not start.stands
    assert list(start.same) == [start.clip.start - 2]  # The frame before the start.


def test_a_start_needs_known_speeds_and_another_place(world: WorldModel) -> None:
    known = np.ones((90, 2), np.bool_)
    known[40:48, 0] = False
    (late,) = [choose_standing_start([footage(world, SPEEDS, action_valid=known)], CONTEXT)]
    assert late.clip.start - 1 != 43
    assert late.speed_mps == 8  # No four frames in a row with a speed of 0 are known.
    for bad in (
        footage(world, SPEEDS, action_valid=np.zeros((90, 2), np.bool_)),
        footage(world, [0.0] * 90),
        footage(world, [0.0, 0.0]),
    ):
        with pytest.raises(TooLittleDataError, match="4 frames in a row with known speeds"):
            choose_standing_start([bad], CONTEXT)
    with pytest.raises(TooLittleDataError, match="no held-out drive"):
        choose_standing_start([footage(world, SPEEDS)], 1)


@pytest.fixture
def stand(world: WorldModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Section]:
    """Function that measures a rollout whose frame n is filled with the token `shown(n)`."""

    def measured(shown: Callable[[int], int], seconds: float = 4.0) -> Section:
        def generate(
            prefix: object, actions: np.ndarray, valid: np.ndarray, *, sampling: Sampling
        ) -> Iterator[SimpleNamespace]:
            assert actions.shape == (1, round(seconds * FPS), 2)
            assert (actions[..., 0] == 0).all()
            np.testing.assert_allclose(actions[..., 1], 0.25)
            assert valid.all()
            for n in range(actions.shape[1]):
                yield SimpleNamespace(tokens=torch.full((1, ROWS, COLS), shown(n)))

        monkeypatch.setattr(world, "generate", generate)
        start = choose_standing_start([footage(world, SPEEDS)], CONTEXT)
        return evaluate_standing(world, start, seconds=seconds, sampling=Sampling())

    return measured


def test_a_rollout_that_keeps_the_picture_shows_the_same_road(
    stand: Callable[..., Section],
) -> None:
    section = stand(lambda n: 0)
    metrics = section.metrics
    assert metrics["same_road"] is True
    elsewhere = 20 * np.log10(255 / 120)
    assert metrics["psnr_db"] == pytest.approx(
        {"model": 40, "floor": 40, "elsewhere": elsewhere, "bound": (40 + elsewhere) / 2}
    )
    assert metrics["equal_tokens"] == {"model": 1, "floor": 1, "elsewhere": 0}
    assert metrics["start"] == "drive at 5.4 s"
    (table,) = (part for part in section.parts if isinstance(part, Table))
    assert "Verdict: the same road" in table.caption
    assert "other real frames within 0.1 m" in section.text


def test_only_the_last_second_counts_and_a_passing_car_does_not_decide(
    stand: Callable[..., Section],
) -> None:
    assert stand(lambda n: 4 if n < 24 else 0).metrics["same_road"] is True
    assert stand(lambda n: 4 if n in {27, 28, 29} else 0).metrics["same_road"] is True
    moved = stand(lambda n: 0 if n < 24 else 4)
    assert moved.metrics["same_road"] is False
    assert moved.metrics["psnr_db"]["model"] == moved.metrics["psnr_db"]["elsewhere"]
    assert "not the same road" in moved.parts[0].caption


def test_a_model_that_learned_no_speed_cannot_stand(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = choose_standing_start([footage(world, SPEEDS)], CONTEXT)
    monkeypatch.setattr(world, "known_channels", (False, True))
    with pytest.raises(TooLittleDataError, match="learned no speed"):
        evaluate_standing(world, start, seconds=1.0, sampling=Sampling())


def test_the_seed_decides_the_rollout_and_unknown_steering_stays_unknown(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, generate = [], world.generate

    def watched(prefix: Any, actions: Any, valid: Any, **options: Any) -> Any:
        known.append(valid.mean(axis=(0, 1)).tolist())
        return generate(prefix, actions, valid, **options)

    monkeypatch.setattr(world, "generate", watched)
    valid = np.ones((90, 2), np.bool_)
    valid[:, 1] = False
    start = choose_standing_start([footage(world, SPEEDS, action_valid=valid)], CONTEXT)
    sections = [
        evaluate_standing(world, start, seconds=1.0, sampling=replace(Sampling(), seed=seed))
        for seed in (0, 0, 1)
    ]
    assert known == [[1, 0]] * 3
    assert sections[0].metrics == sections[1].metrics
    assert sections[0].metrics != sections[2].metrics
