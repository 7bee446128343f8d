"""Compute features of video clips.

The Fréchet distance between their features shows how different two sets of clips are.

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
"""SHA-256 of the I3D file. Any other file is refused, because it could do harm when it is loaded.

A TorchScript file is a program. Loading unpickles no Python objects, but it runs the program's
`__setstate__`. The program's operators can write files (`aten::save`, `aten::from_file`).
"""

_MOST_I3D_BYTES = 2**26  # the right file has 51,235,320 bytes
_I3D_FLAGS = {"rescale": True, "resize": True, "return_features": True}
_SEEDED_SIZE = (128, 256)
_SEEDED_WIDTHS = (16, 24, 32, 48)
_KERNEL = 3


class VideoFeatures(Protocol):
    """A function that extracts features from clips, with the same result on any machine."""

    name: str
    """Name of the features. It is also the key of their Fréchet distance in the metrics."""
    fingerprint: str
    """SHA-256 (hex) of everything that the features depend on."""
    least_frames: int
    """Minimum number of frames in a clip."""

    def __call__(self, videos: Pixels) -> Floats32:
        """Return features [n, d] of clips, uint8 RGB [n, T, H, W, 3], with T >= `least_frames`."""


class I3DFeatures:
    """The I3D features of FVD (Unterthiner et al. 2018, arXiv 1812.01717), from a file.

    The user provides the file: an I3D network trained on Kinetics-400, as TorchScript. StyleGAN-V
    (Skorokhodov et al. 2022, arXiv 2112.14683) and most later work measure FVD with this file. The
    network scales 0..255 to -1..1, resizes frames to 224 x 224 and returns the 400 logits.
    """

    name = "fvd_i3d"
    least_frames = 10

    def __init__(self, path: Path) -> None:
        """Load the network. Raises DriveSimError if the file is not the I3D of FVD."""
        try:
            if not path.is_file():
                raise _not_i3d(path, "there is no such file")
            with path.open("rb") as file:
                content = file.read(_MOST_I3D_BYTES)
            self.fingerprint = hashlib.sha256(content).hexdigest()
            if self.fingerprint != I3D_SHA256:
                raise _not_i3d(path, "its checksum differs")
            with warnings.catch_warnings():
                # torch recommends torch.export, but this file exists only as TorchScript.
                warnings.filterwarnings("ignore", "`torch.jit.load`", DeprecationWarning)
                # Load the checked bytes, because the file could have changed since it was read.
                model: Any = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
            self._model = model.eval()
        except OSError as error:
            raise _not_i3d(path, one_line(error)) from error
        except (RuntimeError, AttributeError) as error:
            raise _not_i3d(path, f"this torch cannot load it: {one_line(error)}") from error

    @torch.inference_mode()
    def __call__(self, videos: Pixels) -> Floats32:
        """Return the logits [n, 400] of clips, uint8 RGB [n, T, H, W, 3]."""
        return np.asarray(self._model(_clips(videos), **_I3D_FLAGS).float())


class SeededFeatures:
    """The built-in features: a spatio-temporal convolutional network with fixed random weights.

    Random convolutions distinguish textures and motions without any training (Saxe et al. 2011, "On
    random weights and unsupervised feature learning"). The Fréchet distance of these features grows
    with blur, with noise, and with frames that freeze, stutter or come in the wrong order. It
    hardly changes if a drive is played backwards. It is not FVD and cannot be compared with FVD.
    The features are the mean and the standard deviation of each layer's channels over a clip,
    d = 240. Half of the first layer's channels respond only to changes in time.
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
        """Return features [n, 240] of clips, uint8 RGB [n, T, H, W, 3]."""
        clips = _clips(videos)
        # Resize to the network's size, ignoring the aspect ratio.
        frames = rearrange(clips, "n c t h w -> (n t) c h w")
        frames = F.interpolate(frames, _SEEDED_SIZE, mode="bilinear", antialias=True)
        x = rearrange(frames, "(n t) c h w -> n c t h w", n=len(clips)) / 127.5 - 1
        pooled: list[Tensor] = []
        for weight in self._weights:
            # Do not pad: a border of zeros would look like an edge in space or like motion in time.
            x = F.conv3d(x, weight, stride=(1, 2, 2)).relu()
            deviation, mean = torch.std_mean(x, dim=(2, 3, 4))
            pooled += [mean, deviation]
        return torch.cat(pooled, dim=1).numpy()


def _seeded_weights(seed: int) -> list[Tensor]:
    """Return random kernels [out, in, 3, 3, 3] of each layer, scaled as in He et al. 2015.

    The scaling keeps the variance the same from layer to layer. All steps but the last division use
    integers, so the weights are bit-identical on every machine.
    """
    # NumPy guarantees that the raw numbers of PCG64 never change. Its distributions may change.
    source = np.random.PCG64(seed)
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
    """Make the kernels sum to 0, so that they give 0 for constant input.

    Each kernel in the first half sums to 0 over time at every place, so it also gives 0 for a still
    picture. Each kernel in the second half sums to 0 only over time and space together. To stay
    integers, the kernels are scaled by a whole number before their mean is subtracted.
    """
    moving, still = np.split(kernels, 2)
    moving = _KERNEL * moving - moving.sum(axis=2, keepdims=True)
    still = _KERNEL**3 * still - still.sum(axis=(2, 3, 4), keepdims=True)
    return np.concatenate([moving, still])


def _clips(videos: Pixels) -> Tensor:
    """Convert videos [n, T, H, W, 3] to float clips [n, 3, T, H, W] in 0..255."""
    return rearrange(torch.from_numpy(videos.astype(np.float32)), "n t h w c -> n c t h w")


def _not_i3d(path: Path, reason: str) -> DriveSimError:
    return DriveSimError(
        f"{path}: not the I3D that FVD is measured with ({reason}); name the TorchScript file "
        "i3d_torchscript.pt that https://github.com/universome/stylegan-v links to, or "
        "leave out `i3d` to use the built-in features, which need no file"
    )
