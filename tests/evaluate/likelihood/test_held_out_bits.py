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


def test_likelihood_of_an_untrained_model_is_that_of_its_codebook(
    world: WorldModel, tmp_path: Path
) -> None:
    """Every code is as likely as any other; the baselines know the drives that were trained on."""
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
    # Its drive has the id of one of the training drives, but is another.
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=fingerprint)
    found = evaluate_likelihood(untrained, heldout, training).metrics
    frames, bits = untrained.context_frames, found["bits_per_token"]
    assert found["frames"] == 40 - frames + 1
    assert bits["model"]["mean"] == pytest.approx(np.log2(9), abs=1e-5)
    assert found["by_position"] == pytest.approx([np.log2(9)] * frames, abs=1e-5)
    windows = FullWindows(heldout.drives, frames=frames)
    copied = CopyLast.fit(training.select(["1", "2"]))
    assert bits["copy_last"]["mean"] == pytest.approx(copied.bits_per_token(windows).mean)
    assert bits["unigram"]["mean"] == pytest.approx(copied.unigram.bits_per_token(windows).mean)
    everywhere = CopyLast.fit(training.drives).bits_per_token(windows).mean
    assert bits["copy_last"]["mean"] != pytest.approx(everywhere, rel=1e-6)
    bigram = TimeBigram.fit(training.select(["1", "2"])).bits_per_token(windows)
    assert bits["time_bigram"]["mean"] == pytest.approx(bigram.mean)
    for name, each in bits.items():
        assert each["low"] <= each["mean"] <= each["high"]
        per_frame = {end: ROWS * COLS * value for end, value in each.items()}
        assert found["bits_per_frame"][name] == pytest.approx(per_frame)


def test_every_place_of_a_window_is_judged_as_its_last_is(
    world: WorldModel, tmp_path: Path
) -> None:
    """A window of W frames is one of the full ones: the curve's end is their mean."""
    fingerprint, frames = world.tokenizer.fingerprint, world.context_frames
    heldout = write_store(tmp_path / "heldout", [4 * frames], fingerprint=fingerprint)
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    found = evaluate_likelihood(world, heldout, training, stride=frames).metrics
    assert found["frames"] == 4
    assert found["by_position"][-1] == pytest.approx(found["bits_per_token"]["model"]["mean"])


def test_intervals_are_over_blocks_that_last_three_seconds(
    world: WorldModel, tmp_path: Path
) -> None:
    fingerprint, frames = world.tokenizer.fingerprint, world.context_frames
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    heldout = write_store(tmp_path / "heldout", [90], fingerprint=fingerprint)
    found = evaluate_likelihood(world, heldout, training).metrics
    assert found["block_frames"] == 3 * FPS > frames
    # Windows of 3 frames, 8 to a block.
    bits = _bits_of_windows(world, heldout.drives)
    assert bits.shape == (30, 3)
    ends = found["by_position_interval"]
    assert found["by_position"] == pytest.approx(bits.mean(axis=0))
    # By the first 24 windows alone, which are whole blocks, as of as many means.
    whole = evaluate_likelihood(
        world, write_store(tmp_path / "whole", [72], fingerprint=fingerprint), training
    ).metrics
    means = _bits_of_windows(world, TokenStore(tmp_path / "whole").drives).reshape(3, 8, 3).mean(1)
    expected = [interval(place) for place in means.T]
    for end in ("low", "high"):
        assert whole["by_position_interval"][end] == pytest.approx([e[end] for e in expected])
    assert all(low < high for low, high in zip(ends["low"], ends["high"], strict=True))
    # Of a single block nothing is known but itself.
    short = write_store(tmp_path / "short", [20], fingerprint=fingerprint)
    found = evaluate_likelihood(world, short, training).metrics
    assert found["bits_per_token"]["model"]["low"] is None
    assert found["by_position_interval"] == {end: [None] * frames for end in ("low", "high")}


def test_a_block_counts_by_its_frames() -> None:
    """15 blocks of 24 cheap frames, and 15 of a single dear one: the mean is a cheap one."""
    lengths = [24, 1] * 15
    drive = np.repeat(np.arange(30), lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    bits = np.repeat([1.0, 9.0] * 15, lengths)
    found = _interval(FrameBits(drive, frame, bits, bits), 24)
    assert found["mean"] == pytest.approx((24 * 1.0 + 9.0) / 25)
    low, high = found["low"], found["high"]
    assert low is not None
    assert high is not None
    assert 1 < low < (24 * 1.0 + 9.0) / 25 < high < 2


def test_a_model_that_draws_from_its_own_probabilities_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 50, 9, generator=generator)
    drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator)
    tokens = drawn.view(200, 50)
    calibration, sure, off = Calibration(), Calibration(), Calibration()
    for part in range(0, 200, 50):  # in batches, as they come
        chosen = slice(part, part + 50)
        calibration.add(TokenBits.judge(logits[chosen], tokens[chosen]))
        sure.add(TokenBits.judge(3 * logits[chosen], tokens[chosen]))
        off.add(TokenBits.judge(-logits[chosen], tokens[chosen]))
    found = calibration.metrics()
    assert found["expected_error"] < 0.02
    assert sum(found["share"]) == pytest.approx(1)
    bins = zip(found["confidence"], found["accuracy"], found["share"], strict=True)
    for confidence, accuracy, share in bins:
        if share > 0.02:
            assert accuracy == pytest.approx(confidence, abs=0.06)
    assert sure.metrics()["expected_error"] > 0.1
    assert off.metrics()["expected_error"] > 0.1


def test_drives_that_chose_the_weights_taught_nothing(world: WorldModel, tmp_path: Path) -> None:
    training = write_store(tmp_path / "training", fingerprint=world.tokenizer.fingerprint)
    fixed = (world.transformer, world.tokenizer)
    options = {"fps": FPS, "steering_kind": "road_wheel"}
    one = WorldModel(*fixed, **options, validation_drives=("1",))  # type: ignore[arg-type]
    assert [drive.id for drive in learned_drives(one, training)] == ["0", "2"]
    every = WorldModel(*fixed, **options, validation_drives=("0", "1", "2"))  # type: ignore[arg-type]
    with pytest.raises(DriveSimError, match="only drives that the model was validated on"):
        learned_drives(every, training)


def test_streamed_bits_are_compared_on_frames_that_the_cache_outlived(
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
