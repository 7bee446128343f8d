from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Clips = NDArray[np.uint8]
COUNT, FRAMES, HEIGHT, WIDTH = 24, 12, 64, 128

# torch deprecates TorchScript; the I3D of FVD comes as nothing else.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.s:DeprecationWarning")


class TinyI3D(nn.Module):
    """Called as the I3D file is; every flag changes what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 5, 3)

    def forward(
        self,
        x: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        if resize:
            x = F.interpolate(x, size=[x.size(2), 16, 16], mode="trilinear")
        if rescale:
            x = 2 * x / 255 - 1
        logits: Tensor = self.conv(x).relu().mean(dim=[2, 3, 4])
        return logits if return_features else logits.softmax(dim=1)


@pytest.fixture(scope="module")
def i3d() -> TinyI3D:
    torch.manual_seed(0)
    return TinyI3D().eval()


@pytest.fixture
def i3d_file(i3d: TinyI3D, tmp_path: Path) -> Path:
    path = tmp_path / "i3d_torchscript.pt"
    script: Any = torch.jit.script(i3d)
    script.save(str(path))
    return path


def noise(count: int, frames: int = FRAMES, height: int = 20, width: int = 24) -> Clips:
    shape = (count, frames, height, width, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def blurred(clips: Clips, sigma: float) -> Clips:
    """A Gaussian blur of this many pixels, where the picture goes on beyond its edges."""
    rows, columns = (np.fft.fftfreq(size) for size in clips.shape[2:4])
    window = np.exp(-2 * (np.pi * sigma * np.hypot(rows[:, None], columns)) ** 2)[..., None]
    smooth = np.fft.ifft2(np.fft.fft2(clips, axes=(2, 3)) * window, axes=(2, 3)).real
    return smooth.round().clip(0, 255).astype(np.uint8)


def moving(seed: int) -> Clips:
    """Clips of textures that move to the right by one to four pixels a frame."""
    rng = np.random.default_rng(seed)
    clips = []
    for _ in range(COUNT):
        scene = rng.integers(256, size=(1, 1, HEIGHT, WIDTH, 3), dtype=np.uint8)
        scene = blurred(scene, 1.0)[0, 0].astype(float)
        scene = (rng.uniform(60, 190) + 3 * (scene - scene.mean())).clip(0, 255).astype(np.uint8)
        speed = rng.integers(1, 5)
        clips.append([np.roll(scene, speed * t, axis=1) for t in range(FRAMES)])
    return np.array(clips)


def shuffled(clips: Clips) -> Clips:
    return np.random.default_rng(0).permuted(np.arange(FRAMES)[None].repeat(len(clips), 0), axis=1)
