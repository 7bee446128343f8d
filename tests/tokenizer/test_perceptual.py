import builtins
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from driving_sim.engine.errors import DriveSimError
from driving_sim.tokenizer import perceptual
from driving_sim.tokenizer.perceptual import PerceptualLoss, vgg16_weights
from tests.fixtures.vgg16 import NUMBERS, random_vgg16


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss(random_vgg16())


def test_it_is_lpips_on_the_given_backbone(loss: PerceptualLoss) -> None:
    loaded = loss.network.net.state_dict()
    backbone = random_vgg16()
    assert len(loaded) == 2 * len(NUMBERS)
    assert all(
        torch.equal(v, backbone[f"features.{k.partition('.')[2]}"]) for k, v in loaded.items()
    )
    # The weights of the channels are the published ones, which are not negative.
    assert loss.network.lin0.model[1].weight.min() >= 0


def test_distance_grows_with_the_difference(loss: PerceptualLoss) -> None:
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, 2, 3, 32, 32, generator=generator).clamp(-1, 1)
    distances = [float(loss(images, images + share * noise).mean()) for share in (0, 0.1, 0.5)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_pictures_get_gradients_and_weights_do_not(loss: PerceptualLoss) -> None:
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(images, torch.ones(1, 3, 32, 32)).mean(), images)
    assert gradient.any()
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_it_stays_in_eval_mode(loss: PerceptualLoss) -> None:
    loss.train()
    assert not any(module.training for module in loss.modules())


def test_missing_weights_name_the_setting_that_trains_without_lpips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **options: Any) -> Mapping[str, Tensor]:
        raise URLError("no\nnetwork")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(DriveSimError, match=r"`objective\.lpips_weight=0`") as caught:
        vgg16_weights()
    assert "no network" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_weights_file_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    name = "vgg16-397923af.pth"
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / name
    # Save in the old format of the published file.
    torch.save({"w": torch.ones(9999)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:kept])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DriveSimError, match=name) as caught:
        vgg16_weights()
    assert "\n" not in str(caught.value)


def test_weights_with_another_checksum_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    torch.save(random_vgg16(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DriveSimError, match="checksum differs"):
        vgg16_weights()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "VGG16_SHA256", digest)
    assert vgg16_weights().keys() == random_vgg16().keys()


@pytest.mark.parametrize("is_right", [True, False])
def test_a_download_is_compared_with_the_whole_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    content = io.BytesIO()
    torch.save({"w": torch.ones(3)}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    # The digits in the file name are right in both cases. Torch by itself compares only those.
    published = tmp_path / f"vgg16-{digest[:8]}.pth"
    published.write_bytes(content.getvalue())
    expected = digest if is_right else digest[:8] + "0" * 56
    monkeypatch.setattr(perceptual, "VGG16_URL", published.as_uri())
    monkeypatch.setattr(perceptual, "VGG16_SHA256", expected)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    if is_right:
        assert vgg16_weights()["w"].tolist() == [1, 1, 1]
    else:
        with pytest.raises(DriveSimError, match="invalid hash value"):
            vgg16_weights()
    kept = [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()]
    assert kept == [published.name] * is_right


@pytest.mark.parametrize("message", ["out of memory", "operator torchvision::roi does not exist"])
def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    original = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name == "lpips":
            raise RuntimeError(message)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(RuntimeError, match=message):
        perceptual.import_lpips()
