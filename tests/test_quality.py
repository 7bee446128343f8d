import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.footage import Clip, Footage
from driving_sim.evaluate.quality import QualityMeter
from driving_sim.evaluate.rollouts import Imagined
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.world_model import WorldModel
from tests.test_perceptual import random_vgg16
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store


class MeanColour:
    """Features that a test can follow."""

    name, fingerprint, least_frames = "mean_colour", "", 2

    def __call__(self, videos: NDArray[np.uint8]) -> NDArray[np.float32]:
        means: NDArray[np.float32] = videos.astype(np.float32).mean(axis=(1, 2, 3))
        return means


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def clips(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("quality") / "tokens"
    store = write_store(folder, [60], fingerprint=world.tokenizer.fingerprint)
    footage = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    return [
        Clip(footage=footage, start=start, context_frames=4, frames=10) for start in (5, 20, 40)
    ]


def imagined(clip: Clip, tokens: torch.Tensor) -> Imagined:
    frames = clip.footage.tokenizer.decode(tokens).numpy()
    return Imagined(clip=clip, tokens=tokens, frames=frames)


def test_a_model_that_knows_the_future_reaches_the_floor(clips: list[Clip]) -> None:
    meter = QualityMeter(FPS, MeanColour())
    for clip in clips:
        meter.add(imagined(clip, clip.true_tokens))
    metrics = meter.section().metrics
    for name in ("psnr_db", "ssim"):
        assert metrics[name]["model"] == metrics[name]["floor"]
        assert metrics[name]["copy_last"]["mean"] < metrics[name]["floor"]["mean"]
    assert metrics["token_accuracy"]["model"]["mean"] == 1.0
    assert metrics["mean_colour"]["model"] == pytest.approx(0, abs=1e-6)
    assert metrics["mean_colour"]["copy_last"] > 0.01
    assert len(metrics["psnr_db_by_frame"]["model"]) == 10


def test_a_model_that_copies_is_the_baseline(clips: list[Clip]) -> None:
    meter = QualityMeter(FPS, MeanColour())
    for clip in clips:
        meter.add(imagined(clip, clip.context_tokens[-1:].repeat(10, 1, 1)))
    metrics = meter.section().metrics
    for name in ("psnr_db", "ssim", "token_accuracy"):
        assert metrics[name]["model"] == metrics[name]["copy_last"]
    assert metrics["mean_colour"]["model"] == pytest.approx(metrics["mean_colour"]["copy_last"])
    expected = np.mean(
        [
            [(clip.context_tokens[-1] == true).float().mean() for true in clip.true_tokens]
            for clip in clips
        ],
        axis=0,
    )
    assert metrics["token_accuracy_by_frame"]["model"] == pytest.approx(expected)


def test_quality_is_lost_where_it_goes_wrong(clips: list[Clip]) -> None:
    """The first five frames are right, the others are not."""
    meter = QualityMeter(FPS, MeanColour())
    for clip in clips:
        tokens = clip.true_tokens.clone()
        tokens[5:] = (tokens[5:] + 1) % 9
        meter.add(imagined(clip, tokens))
    accuracy = meter.section().metrics["token_accuracy_by_frame"]["model"]
    assert accuracy == [1.0] * 5 + [0.0] * 5


def test_lpips_is_measured_where_its_weights_are(clips: list[Clip]) -> None:
    meter = QualityMeter(FPS, MeanColour(), PerceptualLoss(random_vgg16()))
    meter.add(imagined(clips[0], clips[0].true_tokens))
    metrics = meter.section().metrics
    assert metrics["lpips"]["model"]["mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["lpips"]["copy_last"]["mean"] > 0
    # One clip has no distribution.
    assert metrics["mean_colour"] is None
