from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate import action_information
from driving_sim.evaluate.action_information import (
    _block_permutation,
    _bootstrap,
    evaluate_action_information,
)
from driving_sim.world_model.bits import (
    streamed_bits,
)
from driving_sim.world_model.world_model import WorldModel
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_tokens_of_another_tokenizer_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40])
    with pytest.raises(DriveSimError, match="another tokenizer"):
        evaluate_action_information(world, heldout)


def test_tokens_of_another_rate_or_steering_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=world.tokenizer.fingerprint)
    for change, message in (
        ({"fps": FPS * 1.5}, "--fps 12"),
        ({"steering_kind": "steering_wheel"}, "its steering is road_wheel"),
    ):
        options = {"fps": FPS, "steering_kind": "road_wheel"} | change
        other = WorldModel(world.transformer, world.tokenizer, **options)  # type: ignore[arg-type]
        with pytest.raises(DriveSimError, match=message):
            evaluate_action_information(other, heldout)


def test_constant_actions_carry_no_information(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffling what is the same everywhere changes nothing; shuffling what varies does."""
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    gains = evaluate_action_information(world, heldout, shuffles=2)["gain_bits_per_frame"]
    assert gains["steering"]["mean"] != 0.0
    drive = heldout.drives[0]
    constant = np.ones_like(drive.actions)
    monkeypatch.setattr(type(drive), "actions", property(lambda self: constant))
    gains = evaluate_action_information(world, heldout, shuffles=2)["gain_bits_per_frame"]
    assert abs(gains["both"]["mean"]) < 1e-4


def test_an_unknown_action_is_shuffled_as_unknown(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shuffle holds the same known actions as the drive, whatever stands where none is."""
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    drive = heldout.drives[0]
    known = np.arange(60) % 7 < 4
    monkeypatch.setattr(
        type(drive), "action_valid", property(lambda self: np.stack([known, known], axis=1))
    )
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[3:])
        return streamed_bits(*arguments)

    monkeypatch.setattr(action_information, "streamed_bits", watched)
    evaluate_action_information(world, heldout, shuffles=2)
    assert len(seen) == 3
    for actions, valid in seen:
        for variant, mask in zip(actions, valid, strict=True):
            for channel in range(2):
                found = np.sort(variant[mask[:, channel], channel])
                assert np.array_equal(found, np.sort(drive.actions[known, channel]))
    moved = [[(mask != valid[0]).any(axis=0).tolist() for mask in valid[1:]] for _, valid in seen]
    assert moved == [[[True, False]] * 2, [[False, True]] * 2, [[True, True]] * 2]


def test_block_permutation_moves_whole_blocks() -> None:
    order = _block_permutation(23, 5, np.random.default_rng(0))
    assert sorted(order) == list(range(23))
    assert order[20:].tolist() == [20, 21, 22]
    assert all(np.diff(block).tolist() == [1] * 4 for block in order[:20].reshape(4, 5))


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_data() -> None:
    rng = np.random.default_rng(0)
    few, many = (_bootstrap(rng.normal(1.0, 1.0, n), rng) for n in (20, 2000))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 3
