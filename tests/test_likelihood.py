from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.likelihood import Calibration, evaluate_likelihood
from driving_sim.world_model.baselines import CopyLast, TimeBigram
from driving_sim.world_model.bits import (
    FullWindows,
    TokenBits,
    bits_per_token,
    streamed_bits_per_token,
)
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store


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
    assert bits["copy_last"]["mean"] == copied.bits_per_token(windows).mean
    assert bits["unigram"]["mean"] == copied.unigram.bits_per_token(windows).mean
    everywhere = CopyLast.fit(training.drives).bits_per_token(windows).mean
    assert bits["copy_last"]["mean"] != everywhere
    bigram = TimeBigram.fit(training.select(["1", "2"])).bits_per_token(windows)
    assert bits["time_bigram"]["mean"] == bigram.mean
    for each in bits.values():
        assert each["low"] <= each["mean"] <= each["high"]


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


def test_drives_that_were_trained_on_are_refused(world: WorldModel, tmp_path: Path) -> None:
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", fingerprint=fingerprint)
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=fingerprint)
    with pytest.raises(DriveSimError, match="held out"):
        evaluate_likelihood(world, heldout, training)


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
