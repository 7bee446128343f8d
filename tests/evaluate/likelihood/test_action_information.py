from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.likelihood import action_information
from driving_sim.evaluate.likelihood.action_information import (
    _displaced_blocks,
    evaluate_action_information,
)
from driving_sim.world_model.training.bits import TokenBits, streamed_token_bits
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.world_models import new_world

OVER_SHUFFLED = "gain_over_shuffled_bits_per_frame"


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_tokens_of_another_tokenizer_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40])
    with pytest.raises(DriveSimError, match="not made by the model's tokenizer"):
        evaluate_action_information(world, heldout)


def test_tokens_of_another_rate_or_steering_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=world.tokenizer.fingerprint)
    for change, message in (
        ({"fps": FPS * 1.5}, "`fps=12`"),
        ({"steering_kind": "steering_wheel"}, "its steering is road_wheel"),
    ):
        options = {"fps": FPS, "steering_kind": "road_wheel"} | change
        changed = WorldModel(world.transformer, world.tokenizer, **options)  # type: ignore[arg-type]
        with pytest.raises(DriveSimError, match=message):
            evaluate_action_information(changed, heldout)


def test_constant_actions_carry_no_information(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffling constant actions changes nothing, and shuffling varying actions does."""
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
    """Every shuffle holds the known actions of the drive, in another order, and no others."""
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    drive = heldout.drives[0]
    known = np.arange(60) % 7 < 4
    monkeypatch.setattr(
        type(drive), "action_valid", property(lambda self: np.stack([known, known], axis=1))
    )
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[2:])
        return streamed_token_bits(*arguments)

    monkeypatch.setattr(action_information, "streamed_token_bits", watched)
    monkeypatch.setattr(action_information, "_AT_ONCE", 4)
    evaluate_action_information(world, heldout, shuffles=2)
    assert [len(actions) for actions, _ in seen] == [4, 4, 2]
    actions, valid = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    changed = [(mask != valid[0]).any(axis=0).tolist() for mask in valid]
    channels = [[True, False], [False, True], [True, True]]
    assert changed == [[False, False], *(channel for channel in channels for _ in range(3))]
    # Each channel has three variants: two shuffles, which keep all its known actions, and one that
    # marks it as unknown.
    for number, (variant, mask) in enumerate(zip(actions, valid, strict=True)):
        for channel in np.flatnonzero(changed[number] if number % 3 == 0 else [False, False]):
            assert not mask[:, channel].any()
        for channel in np.flatnonzero(mask.any(axis=0)):
            shuffled = np.sort(variant[mask[:, channel], channel])
            assert np.array_equal(shuffled, np.sort(drive.actions[known, channel]))


def test_actions_have_no_gain_for_a_model_that_ignores_them(tmp_path: Path) -> None:
    world = new_world()
    with torch.no_grad():
        world.transformer.action.out.weight.zero_()
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    metrics = evaluate_action_information(world, heldout, shuffles=2).metrics
    for over in ("shuffled", "null"):
        for gain in metrics[f"gain_over_{over}_bits_per_frame"].values():
            assert abs(gain["mean"]) < 1e-4


def test_all_whole_blocks_are_displaced() -> None:
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(200):
        order = _displaced_blocks(23, 5, rng)
        assert sorted(order) == list(range(23))
        assert order[20:].tolist() == [20, 21, 22]
        blocks = order[:20].reshape(4, 5)
        assert (np.diff(blocks) == 1).all()
        assert (blocks[:, 0] // 5 != np.arange(4)).all()
        seen.append(tuple(blocks[:, 0]))
    # Four blocks have nine permutations that leave no block in place.
    assert len(set(seen)) == 9


def token_bits(bits: NDArray[Any]) -> list[TokenBits]:
    """Return N frames of one token, which costs `bits` [V, N] under each variant."""
    costs = torch.from_numpy(bits.T[..., None].astype(np.float64))
    return [TokenBits(cost, cost > 0, cost) for cost in costs]


def test_a_few_blocks_are_enough_to_measure_the_full_gain(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every token costs one bit more without its true action, the gain is one bit per token.

    A block is 3 s, or 24 frames. The runs shorter than two blocks are left out, and frames after
    the last whole block do not count.
    """
    heldout = write_store(
        tmp_path / "heldout", [130, 60], gap_at=30, fingerprint=world.tokenizer.fingerprint
    )
    distinct = np.stack([np.arange(130), -np.arange(130)], axis=1).astype(np.float32)
    kind = type(heldout.drives[0])
    monkeypatch.setattr(kind, "actions", property(lambda self: distinct[: len(self)]))
    judged = []

    def misled(
        model: Any, tokens: Any, actions: NDArray[Any], valid: NDArray[Any]
    ) -> list[TokenBits]:
        judged.append(tokens)
        wrong = (actions != distinct[30:]).any(axis=-1) | ~valid.all(axis=-1)
        return token_bits(wrong)

    monkeypatch.setattr(action_information, "streamed_token_bits", misled)
    metrics = evaluate_action_information(world, heldout, shuffles=3).metrics
    for tokens in judged:
        assert np.array_equal(tokens, heldout.drives[0].tokens[30:])
    assert metrics["block_frames"] == 24
    assert metrics["blocks"] == 4
    for over in ("shuffled", "null"):
        for gain in metrics[f"gain_over_{over}_bits_per_frame"].values():
            assert gain == {"mean": 12.0, "low": 12.0, "high": 12.0}


def test_frames_without_a_full_window_behind_them_do_not_count(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)

    def early(*arguments: Any) -> list[TokenBits]:
        """Wrong actions cost bits only before a full window and after the last whole block."""
        bits = np.zeros(arguments[2].shape[:2])
        bits[1:, : world.context_frames] = bits[1:, 48:] = 1.0
        return token_bits(bits)

    monkeypatch.setattr(action_information, "streamed_token_bits", early)
    metrics = evaluate_action_information(world, heldout, shuffles=1).metrics
    assert metrics[OVER_SHUFFLED]["both"]["mean"] == 0.0
    assert metrics["blocks"] == 2


def test_drives_too_short_to_shuffle_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [47], fingerprint=world.tokenizer.fingerprint)
    with pytest.raises(DriveSimError, match="no stretch of 48 frames without a gap in 1"):
        evaluate_action_information(world, heldout)


def test_an_unknown_channel_has_no_gain(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    drive = type(heldout.drives[0])
    valid = np.stack([np.ones(60, np.bool_), np.zeros(60, np.bool_)], axis=1)
    monkeypatch.setattr(drive, "action_valid", property(lambda self: valid))
    section = evaluate_action_information(world, heldout, shuffles=1)
    for over in ("shuffled", "null"):
        gains = section.metrics[f"gain_over_{over}_bits_per_frame"]
        assert gains["speed"] is not None
        assert gains["steering"] is None
        assert gains["both"] is None
    monkeypatch.setattr(drive, "action_valid", property(lambda self: valid & False))
    with pytest.raises(DriveSimError, match="no known action of a kind that the model learned"):
        evaluate_action_information(world, heldout, shuffles=1)
