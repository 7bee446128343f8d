from pathlib import Path

import numpy as np
import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.likelihood import evaluate_likelihood
from driving_sim.world_model.baselines import CopyLast
from driving_sim.world_model.bits import (
    FullWindows,
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
    found = evaluate_likelihood(untrained, heldout, training)
    frames = untrained.context_frames
    assert found["frames"] == 40 - frames + 1
    assert found["bits_per_token"] == pytest.approx(np.log2(9), abs=1e-5)
    windows = FullWindows(heldout.drives, frames=frames)
    copied = CopyLast.fit(training.select(["1", "2"]))
    assert found["copy_last_bits_per_token"] == copied.bits_per_token(windows).mean
    assert found["unigram_bits_per_token"] == copied.unigram.bits_per_token(windows).mean
    everywhere = CopyLast.fit(training.drives).bits_per_token(windows).mean
    assert found["copy_last_bits_per_token"] != everywhere


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
        share = evaluate_likelihood(world, heldout, training)["streamed_over_recomputed"]
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
