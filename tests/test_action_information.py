from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate import action_information
from driving_sim.evaluate.action_information import (
    _block_permutation,
    evaluate_action_information,
)
from driving_sim.world_model.bits import (
    streamed_bits,
)
from driving_sim.world_model.world_model import WorldModel
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store

OVER_SHUFFLED = "gain_over_shuffled_bits_per_frame"


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
    gains = evaluate_action_information(world, heldout, shuffles=2).metrics[OVER_SHUFFLED]
    assert gains["steering"]["mean"] != 0.0
    drive = heldout.drives[0]
    constant = np.ones_like(drive.actions)
    monkeypatch.setattr(type(drive), "actions", property(lambda self: constant))
    gains = evaluate_action_information(world, heldout, shuffles=2).metrics[OVER_SHUFFLED]
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
        for variant, mask in zip(actions[:-1], valid[:-1], strict=True):
            for channel in range(2):
                found = np.sort(variant[mask[:, channel], channel])
                assert np.array_equal(found, np.sort(drive.actions[known, channel]))
    moved = [[(mask != valid[0]).any(axis=0).tolist() for mask in valid[1:-1]] for _, valid in seen]
    assert moved == [[[True, False]] * 2, [[False, True]] * 2, [[True, True]] * 2]
    # The last variant knows nothing of the channels in question, and all of the others.
    hidden = [[not valid[-1, :, c].any() for c in range(2)] for _, valid in seen]
    assert hidden == [[True, False], [False, True], [True, True]]


def test_actions_say_nothing_to_a_model_without_conditioning(tmp_path: Path) -> None:
    deaf = new_world()
    with torch.no_grad():
        deaf.transformer.action.out.weight.zero_()
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=deaf.tokenizer.fingerprint)
    metrics = evaluate_action_information(deaf, heldout, shuffles=2).metrics
    for over in ("shuffled", "null"):
        for gain in metrics[f"gain_over_{over}_bits_per_frame"].values():
            assert abs(gain["mean"]) < 1e-4


def test_block_permutation_moves_whole_blocks() -> None:
    order = _block_permutation(23, 5, np.random.default_rng(0))
    assert sorted(order) == list(range(23))
    assert order[20:].tolist() == [20, 21, 22]
    assert all(np.diff(block).tolist() == [1] * 4 for block in order[:20].reshape(4, 5))
