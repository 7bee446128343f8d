"""Features of video clips, whose Fréchet distance says how alike two sets of clips are.

Axes: n clips, T frames, H rows, W columns, d features.
"""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.data.arrays import Floats32, Ints, Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
"""Checksum of the one I3D file that is loaded. TorchScript is a program: of its pickles no Python
object is made, but its operators can write files (`aten::save`, `aten::from_file`), and what it
calls `__setstate__` runs on loading.
"""

_MOST_I3D_BYTES = 2**26  # the file has 51,235,320
_I3D_FLAGS = {"rescale": True, "resize": True, "return_features": True}
_SEEDED_SIZE = (128, 256)
_SEEDED_WIDTHS = (16, 24, 32, 48)
_KERNEL = 3


class VideoFeatures(Protocol):
    """What turns clips into features, the same ones for the same clips wherever it runs."""

    name: str
    """Key of the Fréchet distance of these features: no two kinds of features share one."""
    fingerprint: str
    """SHA-256, in hexadecimal, of all that the features depend on."""
    least_frames: int
    """Length of the shortest clip that has features."""

    def __call__(self, videos: Pixels) -> Floats32:
        """Return features [n, d] of clips uint8 RGB [n, T, H, W, 3], T at least `least_frames`."""


class I3DFeatures:
    """The features of FVD (Unterthiner et al. 2018, arXiv 1812.01717), from the user's file.

    It is the I3D of Kinetics-400 as TorchScript, d = 400, that StyleGAN-V (Skorokhodov et al. 2022,
    arXiv 2112.14683) and most later work measure FVD with. It scales 0..255 to -1..1, resizes to
    224 x 224 and returns what stands before the softmax.
    """

    name = "fvd_i3d"
    least_frames = 10

    def __init__(self, path: Path) -> None:
        """Load the network; DriveSimError where the file is not the I3D of FVD."""
        try:
            if not path.is_file():
                raise _not_i3d(path, "there is no such file")
            with path.open("rb") as file:
                content = file.read(_MOST_I3D_BYTES)
            self.fingerprint = hashlib.sha256(content).hexdigest()
            if self.fingerprint != I3D_SHA256:
                raise _not_i3d(path, "its checksum is another one's")
            with warnings.catch_warnings():
                # torch would have torch.export instead, but this file exists as TorchScript only.
                warnings.filterwarnings("ignore", "`torch.jit.load`", DeprecationWarning)
                # From memory: what runs is what the checksum was taken of.
                model: Any = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
            self._model = model.eval()
        except OSError as error:
            raise _not_i3d(path, one_line(error)) from error
        except (RuntimeError, AttributeError) as error:
            raise _not_i3d(path, f"this torch cannot load it: {one_line(error)}") from error

    @torch.inference_mode()
    def __call__(self, videos: Pixels) -> Floats32:
        """See `VideoFeatures`."""
        return np.asarray(self._model(_clips(videos), **_I3D_FLAGS).float())


class SeededFeatures:
    """The built-in features: a spatio-temporal convolutional network with fixed random weights.

    Random convolutions tell textures and motions apart without a file (Saxe et al. 2011, "On random
    weights and unsupervised feature learning"). Their distance grows with blur, noise, and frames
    that stand still, halt or come in the wrong order; a drive played backwards they hardly notice.
    It is not FVD and compares only with itself. Each layer's channels give their mean and deviation
    over a clip, d = 240; half of the first layer sees only what changes in time.
    """

    least_frames = 1 + (_KERNEL - 1) * len(_SEEDED_WIDTHS)

    def __init__(self, seed: int = 0) -> None:
        self.name = f"frechet_seeded_3d_{seed}"
        self._weights = _seeded_weights(seed)
        digest = hashlib.sha256(f"{_SEEDED_SIZE} relu, stride 2, mean and deviation".encode())
        for weight in self._weights:
            digest.update(f"{tuple(weight.shape)}".encode())
            digest.update(weight.numpy().astype("<f4").tobytes())
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, videos: Pixels) -> Floats32:
        """See `VideoFeatures`."""
        clips = _clips(videos)
        # To the network's size, whatever their aspect ratio.
        frames = rearrange(clips, "n c t h w -> (n t) c h w")
        frames = F.interpolate(frames, _SEEDED_SIZE, mode="bilinear", antialias=True)
        x = rearrange(frames, "(n t) c h w -> n c t h w", n=len(clips)) / 127.5 - 1
        pooled: list[Tensor] = []
        for weight in self._weights:
            # Nothing is padded: a border of zeros would look like an edge, and in time like motion.
            x = F.conv3d(x, weight, stride=(1, 2, 2)).relu()
            deviation, mean = torch.std_mean(x, dim=(2, 3, 4))
            pooled += [mean, deviation]
        return torch.cat(pooled, dim=1).numpy()


def _seeded_weights(seed: int) -> list[Tensor]:
    """Return kernels [out, in, 3, 3, 3] that a layer's variance outlives (He et al. 2015).

    Whole numbers until the last division: the weights are the same bits on every machine.
    """
    source = np.random.PCG64(seed)  # its raw stream is fixed, which those of numpy's draws are not
    weights: list[Tensor] = []
    for width, inputs in zip(_SEEDED_WIDTHS, (3, *_SEEDED_WIDTHS), strict=False):
        shape = (width, inputs, _KERNEL, _KERNEL, _KERNEL)
        raw = np.asarray(source.random_raw(int(np.prod(shape)))) >> np.uint64(48)
        kernels = (2 * raw.astype(np.int64) - (2**16 - 1)).reshape(shape)
        if not weights:
            kernels = _blind_to_constants(kernels)
        norm = np.sqrt(np.square(kernels).sum(axis=(1, 2, 3, 4), keepdims=True) / 2)
        weights.append(torch.from_numpy((kernels / norm).astype(np.float32)))
    return weights


def _blind_to_constants(kernels: Ints) -> Ints:
    """Make kernels sum to nothing: the first half over time at each place, the others over all."""
    moving, still = np.split(kernels, 2)
    moving = _KERNEL * moving - moving.sum(axis=2, keepdims=True)
    still = _KERNEL**3 * still - still.sum(axis=(2, 3, 4), keepdims=True)
    return np.concatenate([moving, still])


def _clips(videos: Pixels) -> Tensor:
    """Return float clips [n, 3, T, H, W] in 0..255."""
    return rearrange(torch.from_numpy(videos.astype(np.float32)), "n t h w c -> n c t h w")


def _not_i3d(path: Path, reason: str) -> DriveSimError:
    return DriveSimError(
        f"{path}: not the I3D that FVD is measured with ({reason}): name the TorchScript file "
        "i3d_torchscript.pt that https://github.com/universome/stylegan-v links to, or "
        "leave out `i3d`: the built-in seeded features need no file"
    )
