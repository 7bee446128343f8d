"""The frozen tokenizer: loads weights and config from a folder, converts frames to tokens and back.

Axes: T frames, H W pixels of input frames, h w pixels of decoded frames, r c token rows and
columns.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.data.arrays import Pixels
from driving_sim.data.video.frame_size import FrameSize, fit, transform_description
from driving_sim.engine.config import from_dict, load_json, save_json, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import autocast, name_of, resolve_precision
from driving_sim.engine.run_folder import check_complete, find_run, kind_of
from driving_sim.engine.threads import adjust_threads
from driving_sim.engine.weights import (
    build_with_weights,
    fingerprint,
    round_to_bf16,
    save_weights,
)
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.fsq import RULE

Frames = Tensor | Pixels

WEIGHTS = "model.safetensors"
"""Name of the weights file in a tokenizer's folder. `save` writes this file last."""
TOKENIZER = "tokenizer"
"""Name of the folder, inside the run folder of a world model, that contains its tokenizer."""
_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 2**16


class Tokenizer:
    """Converts frames to tokens and back, with fixed weights: eval mode, no gradients.

    `precision` is fp32, bf16, or auto: bf16 if bf16 is faster on the device, otherwise fp32. With
    bf16, about 1 % of the tokens change to a neighbouring code, and pixels change by 1 or 2 grey
    levels.
    """

    def __init__(
        self, autoencoder: Autoencoder, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> None:
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.autoencoder = autoencoder.eval().requires_grad_(False).to(self.device)
        self.config = autoencoder.config
        """Configuration of the autoencoder."""
        self.frame_size = self.config.frame_size
        """Size of decoded frames. Frames are scaled and cropped to this size before encoding."""
        self.height, self.width = self.config.height, self.config.width
        """Height and width of decoded frames in pixels."""
        self.rows, self.cols = self.config.rows, self.config.cols
        """Numbers of token rows and columns per frame."""
        self.levels = self.config.levels
        """Number of FSQ levels of each code channel."""
        self.codebook_size = autoencoder.quantiser.codebook_size
        """Number of different tokens."""
        self.fingerprint = fingerprint(_identity(self.config), autoencoder)
        """SHA-256 of weights, config, frame transform and quantiser. Token stores record it."""

    @classmethod
    def from_run(
        cls, path: Path | str, device: torch.device | str = "auto", precision: str = "auto"
    ) -> Self:
        """Load the tokenizer in the folder `path`, or that of the packaged model named `path`.

        Raises `DriveSimError` if it is missing or damaged, or if the folder holds a world model.
        """
        folder = find_run(path, part=TOKENIZER)
        if kind_of(folder) == "world-model":
            raise DriveSimError(
                f"{folder} is a world model, not a tokenizer; its tokenizer is {folder / TOKENIZER}"
            )
        check_complete(folder, (_CONFIG, WEIGHTS), "tokenizer")
        saved = load_json(folder / _CONFIG, most_bytes=_MOST_CONFIG_BYTES)
        config = from_dict(AutoencoderConfig, saved.get("model", {}), f"{folder / _CONFIG}: model")
        own = _identity(config)
        for part, action in (("frames", "prepares frames"), ("quantiser", "rounds to codes")):
            if saved.get(part) != own[part]:
                raise DriveSimError(
                    f"{folder}: this version of drivesim {action} differently from the version "
                    "that trained the tokenizer; use that version, or train the tokenizer again"
                )
        autoencoder, metadata = build_with_weights(
            lambda: Autoencoder(config), folder / WEIGHTS, of="this tokenizer"
        )
        tokenizer = cls(autoencoder, resolve_device(device), precision)
        if tokenizer.fingerprint != metadata.get("fingerprint"):
            raise DriveSimError(
                f"{folder}: config and weights do not belong together (their fingerprint differs "
                f"from the one in {WEIGHTS}); copy the folder again"
            )
        return tokenizer

    def rounded(self) -> Self:
        """Return a copy whose weights are rounded to bf16, so that `save` can write them in bf16.

        The copy has another fingerprint, so token stores of this tokenizer do not fit the copy.
        """
        autoencoder = copy.deepcopy(self.autoencoder)
        round_to_bf16(autoencoder)
        return type(self)(autoencoder, self.device, name_of(self.dtype))

    def save(self, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Save the tokenizer to the folder `path`, as `model.safetensors` and `config.json`.

        With `dtype=torch.bfloat16`, the file of weights takes half the space. Raises ValueError if
        the weights are not `rounded`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / _CONFIG, _identity(self.config))
        # Store the fingerprint in the weights file, so that weights and fingerprint always match.
        save_weights(self.autoencoder, folder / WEIGHTS, {"fingerprint": self.fingerprint}, dtype)

    @torch.inference_mode()
    def encode(self, frames: Frames, *, batch_size: int = 8) -> Tensor:
        """Return the tokens, int64 [T, r, c] on the CPU, of uint8 RGB frames [T, H, W, 3].

        Frames that do not have the size `frame_size` are scaled to cover it and cropped at the
        centre. Raises ValueError for arrays of another shape or number format.
        """
        if not isinstance(frames, Tensor):
            frames = torch.from_numpy(np.ascontiguousarray(frames))
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
            raise ValueError(
                f"frames of shape {tuple(frames.shape)} and {frames.dtype}: "
                "must be uint8 [T, H, W, 3]"
            )

        def tokens_of(batch: Tensor) -> Tensor:
            codes = self.autoencoder.encode(images_from_frames(batch, self.frame_size))
            return self.autoencoder.quantiser.codes_to_indices(codes)

        return self._in_batches(tokens_of, frames, batch_size)

    @torch.inference_mode()
    def decode(self, tokens: Tensor | NDArray[Any], *, batch_size: int = 8) -> Tensor:
        """Return the frames, uint8 RGB [T, h, w, 3] on the CPU, of tokens [T, r, c].

        Raises ValueError for tokens of another shape or outside the codebook.
        """
        if not isinstance(tokens, Tensor):
            tokens = torch.from_numpy(tokens.astype(np.int64))
        tokens_Trc = tokens.long()
        if tokens_Trc.ndim != 3 or tuple(tokens_Trc.shape[1:]) != (self.rows, self.cols):
            raise ValueError(
                f"tokens of shape {tuple(tokens_Trc.shape)}: must be [T, {self.rows}, {self.cols}]"
            )
        if ((tokens_Trc < 0) | (tokens_Trc >= self.codebook_size)).any():
            raise ValueError(f"tokens: must all be within 0..{self.codebook_size - 1}")

        def frames_of(batch: Tensor) -> Tensor:
            codes = self.autoencoder.quantiser.indices_to_codes(batch)
            return frames_from_images(self.autoencoder.decode(codes))

        return self._in_batches(frames_of, tokens_Trc, batch_size)

    def _in_batches(
        self, function: Callable[[Tensor], Tensor], values: Tensor, batch_size: int
    ) -> Tensor:
        adjust_threads(self.device)
        with autocast(self.device, self.dtype):
            batches = torch.split(values, batch_size)
            return torch.cat([function(batch.to(self.device)).cpu() for batch in batches])


def images_from_frames(frames: Tensor, size: FrameSize) -> Tensor:
    """Convert uint8 frames [T, H, W, 3] to pictures [T, 3, h, w] in [-1, 1] of the given size.

    Frames are scaled and cropped by the same rule as in the video readers
    (`data.video.frame_size.fit`).
    """
    images = rearrange(frames, "t h w c -> t c h w").to(torch.float32, copy=True)
    if images.shape[2:] != (size.height, size.width):
        geometry = fit(images.shape[2], images.shape[3], size)
        scaled = (geometry.height, geometry.width)
        images = F.interpolate(images, scaled, mode="bilinear", antialias=True)
        images = images[:, :, geometry.rows, geometry.columns]
    return images.div_(127.5).sub_(1)


def frames_from_images(images: Tensor) -> Tensor:
    """Convert pictures [T, 3, h, w] in [-1, 1] to uint8 frames [T, h, w, 3]."""
    # Work in place, because allocating memory takes longer than the arithmetic.
    levels = (images.float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return rearrange(levels.to(torch.uint8), "t c h w -> t h w c")


def _identity(config: AutoencoderConfig) -> dict[str, Any]:
    frames = transform_description(config.frame_size)
    return {"kind": "tokenizer", "model": to_dict(config), "frames": frames, "quantiser": RULE}
