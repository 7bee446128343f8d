from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from driving_sim.data.arrays import Pixels
from driving_sim.evaluate.pictures import feature_distance
from driving_sim.evaluate.pictures.efficientnet import EfficientNetLite0, find_weights
from driving_sim.evaluate.pictures.feature_distance import FeatureDistance
from driving_sim.tokenizer.metrics import psnr

needs_weights = pytest.mark.skipif(
    find_weights() is None, reason="drivesim[perceptual] is not installed"
)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as file:
        return file.resize((128, 160))


def frames(*pictures: Image.Image | Pixels) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def shifted(picture: Image.Image, pixels: int) -> Pixels:
    return np.roll(np.asarray(picture), pixels, axis=1)


def noisy(picture: Image.Image, deviation: float) -> Pixels:
    noise = np.random.default_rng(0).normal(0, deviation, np.asarray(picture).shape)
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


@needs_weights
def test_the_distance_grows_with_blur_noise_and_shift(picture: Image.Image) -> None:
    distance = FeatureDistance.if_installed()
    assert distance is not None
    for changed in (
        frames(*(blurred(picture, radius) for radius in (0, 1, 2, 4))),
        frames(*(noisy(picture, deviation) for deviation in (0, 4, 16, 40))),
        frames(*(shifted(picture, pixels) for pixels in (0, 2, 6, 16))),
    ):
        distances = distance(changed, frames(picture))[:, 0].tolist()
        assert distances[0] == pytest.approx(0, abs=1e-5)
        assert all(b > a + 0.01 for a, b in pairwise(distances))


@needs_weights
def test_blur_costs_more_than_in_psnr(picture: Image.Image) -> None:
    """PSNR prefers a blurred picture to one that is a little shifted. The distance does not."""
    distance = FeatureDistance.if_installed()
    assert distance is not None
    changed, truth = frames(blurred(picture, 2), shifted(picture, 2)), frames(picture)
    blur_db, shift_db = psnr(changed, truth.expand_as(changed)).tolist()
    blur, shift = distance(changed, truth)[:, 0].tolist()
    assert blur_db > shift_db
    assert blur > 1.5 * shift


def test_every_picture_is_compared_with_every_other() -> None:
    torch.manual_seed(0)
    distance = FeatureDistance(EfficientNetLite0().eval())
    pictures = torch.randint(256, (5, 48, 64, 3), dtype=torch.uint8)
    distances = distance(pictures[:2], pictures)
    assert distances.shape == (2, 5)
    torch.testing.assert_close(distances[0, 1], distance(pictures[1:2], pictures[:1])[0, 0])
    torch.testing.assert_close(distances.diagonal(), torch.zeros(2), atol=1e-5, rtol=0)
    assert (distances[:, 2:] > 0.001).all()


def test_without_the_weights_there_is_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_distance, "find_weights", lambda: None)
    assert FeatureDistance.if_installed() is None
