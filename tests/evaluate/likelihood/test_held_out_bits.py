from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.likelihood.held_out_bits import (
    Calibration,
    _bits_of_windows,
    _interval,
    evaluate_likelihood,
    learned_drives,
)
from driving_sim.evaluate.report.intervals import interval
from driving_sim.world_model.training.baselines import CopyLast, TimeBigram
from driving_sim.world_model.training.bits import (
    FrameBits,
    FullWindows,
    TokenBits,
    bits_per_token,
    streamed_bits_per_token,
)
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS, write_store
from tests.fixtures.world_models import new_world


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_an_untrained_model_costs_the_bits_of_a_uniform_guess(
    world: WorldModel, tmp_path: Path
) -> None:
    """An untrained model finds all codes equally likely. The baselines know the learned drives."""
    plain = Transformer(world.config.model, world.config.grid, world.statistics)
    untrained = WorldModel(
        plain,
        world.tokenizer,
        fps=FPS,
        steering_kind="road_wheel",
        validation_drives=("0", "3"),
    )
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", (41, 40, 40, 40), fingerprint=fingerprint)
    # The held-out drive has the id of a training drive, but is another drive.
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=fingerprint)
    metrics = evaluate_likelihood(untrained, heldout, training).metrics
    frames, bits = untrained.context_frames, metrics["bits_per_token"]
    assert metrics["frames"] == 40 - frames + 1
    assert bits["model"]["mean"] == pytest.approx(np.log2(9), abs=1e-5)
    assert metrics["by_position"] == pytest.approx([np.log2(9)] * frames, abs=1e-5)
    windows = FullWindows(heldout.drives, frames=frames)
    copied = CopyLast.fit(training.select(["1", "2"]))
    assert bits["copy_last"]["mean"] == pytest.approx(copied.bits_per_token(windows).mean)
    assert bits["unigram"]["mean"] == pytest.approx(copied.unigram.bits_per_token(windows).mean)
    with_validation = CopyLast.fit(training.drives).bits_per_token(windows).mean
    assert bits["copy_last"]["mean"] != pytest.approx(with_validation, rel=1e-6)
    bigram = TimeBigram.fit(training.select(["1", "2"])).bits_per_token(windows)
    assert bits["time_bigram"]["mean"] == pytest.approx(bigram.mean)
    for name, estimate in bits.items():
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]
        per_frame = {end: ROWS * COLS * value for end, value in estimate.items()}
        assert metrics["bits_per_frame"][name] == pytest.approx(per_frame)


def test_the_last_place_of_the_curve_is_the_mean_over_full_windows(
    world: WorldModel, tmp_path: Path
) -> None:
    """Both judge the last frame of the same windows."""
    fingerprint, frames = world.tokenizer.fingerprint, world.context_frames
    heldout = write_store(tmp_path / "heldout", [4 * frames], fingerprint=fingerprint)
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    metrics = evaluate_likelihood(world, heldout, training, stride=frames).metrics
    assert metrics["frames"] == 4
    assert metrics["by_position"][-1] == pytest.approx(metrics["bits_per_token"]["model"]["mean"])


def test_intervals_are_over_blocks_that_last_three_seconds(
    world: WorldModel, tmp_path: Path
) -> None:
    fingerprint, frames = world.tokenizer.fingerprint, world.context_frames
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    heldout = write_store(tmp_path / "heldout", [90], fingerprint=fingerprint)
    metrics = evaluate_likelihood(world, heldout, training).metrics
    assert metrics["block_frames"] == 3 * FPS > frames
    # A block holds 8 windows of 3 frames.
    bits = _bits_of_windows(world, heldout.drives)
    assert bits.shape == (30, 3)
    ends = metrics["by_position_interval"]
    assert metrics["by_position"] == pytest.approx(bits.mean(axis=0))
    # The first 24 windows make 3 whole blocks, so the interval is that of the 3 means.
    three_blocks = evaluate_likelihood(
        world, write_store(tmp_path / "three", [72], fingerprint=fingerprint), training
    ).metrics
    means = _bits_of_windows(world, TokenStore(tmp_path / "three").drives).reshape(3, 8, 3).mean(1)
    expected = [interval(place) for place in means.T]
    for end in ("low", "high"):
        bounds = [estimate[end] for estimate in expected]
        assert three_blocks["by_position_interval"][end] == pytest.approx(bounds)
    assert all(low < high for low, high in zip(ends["low"], ends["high"], strict=True))
    # A single block has no interval.
    short = write_store(tmp_path / "short", [20], fingerprint=fingerprint)
    metrics = evaluate_likelihood(world, short, training).metrics
    assert metrics["bits_per_token"]["model"]["low"] is None
    assert metrics["by_position_interval"] == {end: [None] * frames for end in ("low", "high")}


def test_a_block_is_weighted_by_its_number_of_frames() -> None:
    """15 blocks hold 24 frames of 1 bit, and 15 blocks hold one frame of 9 bits."""
    lengths = [24, 1] * 15
    drive = np.repeat(np.arange(30), lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    bits = np.repeat([1.0, 9.0] * 15, lengths)
    estimate = _interval(FrameBits(drive, frame, bits, bits), 24)
    assert estimate["mean"] == pytest.approx((24 * 1.0 + 9.0) / 25)
    low, high = estimate["low"], estimate["high"]
    assert low is not None
    assert high is not None
    assert 1 < low < (24 * 1.0 + 9.0) / 25 < high < 2


def test_tokens_drawn_from_the_model_itself_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 50, 9, generator=generator)
    drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator)
    tokens = drawn.view(200, 50)
    calibrated, overconfident, wrong = Calibration(), Calibration(), Calibration()
    for start in range(0, 200, 50):
        batch = slice(start, start + 50)
        calibrated.add(TokenBits.judge(logits[batch], tokens[batch]))
        overconfident.add(TokenBits.judge(3 * logits[batch], tokens[batch]))
        wrong.add(TokenBits.judge(-logits[batch], tokens[batch]))
    metrics = calibrated.metrics()
    assert metrics["expected_error"] < 0.02
    assert sum(metrics["share"]) == pytest.approx(1)
    bins = zip(metrics["confidence"], metrics["accuracy"], metrics["share"], strict=True)
    for confidence, accuracy, share in bins:
        if share > 0.02:
            assert accuracy == pytest.approx(confidence, abs=0.06)
    assert overconfident.metrics()["expected_error"] > 0.1
    assert wrong.metrics()["expected_error"] > 0.1


def test_validation_drives_are_not_learned_drives(world: WorldModel, tmp_path: Path) -> None:
    training = write_store(tmp_path / "training", fingerprint=world.tokenizer.fingerprint)
    fixed = (world.transformer, world.tokenizer)
    options = {"fps": FPS, "steering_kind": "road_wheel"}
    validated_on_one = WorldModel(*fixed, **options, validation_drives=("1",))  # type: ignore[arg-type]
    assert [drive.id for drive in learned_drives(validated_on_one, training)] == ["0", "2"]
    validated_on_all = WorldModel(
        *fixed,
        **options,  # type: ignore[arg-type]
        validation_drives=("0", "1", "2"),
    )
    with pytest.raises(DriveSimError, match="only validation drives of the model"):
        learned_drives(validated_on_all, training)


def test_streamed_and_recomputed_bits_are_compared_from_frame_2w_on(
    world: WorldModel, tmp_path: Path
) -> None:
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    frames = world.context_frames
    for length in (2 * frames, 5 * frames):
        heldout = write_store(tmp_path / str(length), [length], fingerprint=fingerprint)
        share = evaluate_likelihood(world, heldout, training).metrics["streamed_over_recomputed"]
        if length == 2 * frames:
            assert share is None
            continue
        windows = FullWindows(heldout.drives, frames=frames)
        recomputed = bits_per_token(world.transformer, windows)
        judged = (recomputed.frame >= 2 * frames) & (recomputed.frame < 4 * frames)
        streamed = streamed_bits_per_token(world.transformer, heldout.drives)
        expected = streamed.bits[2 * frames : 4 * frames].mean() / recomputed.bits[judged].mean()
        assert share == pytest.approx(expected, abs=1e-6)
        assert share != 1.0
