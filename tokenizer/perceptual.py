"""The perceptual loss: LPIPS (Zhang et al. 2018, arXiv 1801.03924) from the `lpips` package.

The package contains LPIPS's own weights. The weights of its VGG-16 backbone (ImageNet, half a
gigabyte) are downloaded on first use and kept in torch's hub cache.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import sha256_of
from driving_sim.engine.parsing import one_line
from driving_sim.tokenizer.tokenizer import images_from_frames

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
WITHOUT = "`objective.lpips_weight=0`"
"""Setting for training without LPIPS, as written in error messages."""

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
# Keep the library object, because torch drops its declarations when the object is deleted.
_declarations: list[torch.library.Library] = []


class PerceptualLoss(nn.Module):
    """LPIPS with frozen weights. `backbone` is the result of `vgg16_weights`."""

    def __init__(self, backbone: Mapping[str, Tensor]) -> None:
        super().__init__()
        lpips: Any = import_lpips()
        with warnings.catch_warnings():
            # Hide the warnings about the deprecated argument `pretrained`, which lpips passes to
            # torchvision.
            warnings.filterwarnings("ignore", message="(The parameter|Arguments other)")
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The weight `features.N.weight` of torchvision is called `sliceM.N.weight` in lpips, with
        # the same number N.
        net = self.network.net
        numbered = {name: name.partition(".")[2] for name in net.state_dict()}
        net.load_state_dict({name: backbone[f"features.{n}"] for name, n in numbered.items()})
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in eval mode, because LPIPS needs dropout only while LPIPS itself is trained."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the LPIPS distance [B] of each pair of pictures [B, 3, H, W] in [-1, 1]."""
        distance: Tensor = self.network(images, others)
        return distance.float().flatten(1).mean(1)

    @torch.inference_mode()
    def frame_distances(self, frames: Tensor, others: Tensor) -> Tensor:
        """Return the LPIPS distance [B] of each pair of uint8 frames [B, H, W, 3]."""
        size = FrameSize(height=frames.shape[1], width=frames.shape[2])
        distances: Tensor = self(*(images_from_frames(batch, size) for batch in (frames, others)))
        return distances


def has_vgg16_weights() -> bool:
    """Return whether the VGG-16 weights are already in torch's hub cache."""
    return _cached().is_file()


def vgg16_weights() -> dict[str, Tensor]:
    """Return the ImageNet VGG-16 weights. Download them if torch's hub cache does not have them.

    The file is a pickle. Its checksum is always compared before the file is opened, and torch loads
    only tensors from it. Raises DriveSimError if the weights cannot be loaded.
    """
    path = _cached()
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Do not use `load_state_dict_from_url`, which compares only 8 digits of the checksum.
            torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix=VGG16_SHA256)
        if sha256_of(path) != VGG16_SHA256:
            raise DriveSimError(
                f"{path}: wrong or damaged weights of LPIPS's backbone (their checksum differs); "
                f"delete the file to download it again, or train without LPIPS ({WITHOUT})"
            )
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        raise DriveSimError(
            f"{VGG16_URL}: cannot load the weights of LPIPS's backbone ({one_line(error)}); "
            f"put the file into {path.parent}, or train without LPIPS ({WITHOUT})"
        ) from error
    return weights


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_URL).name


def import_lpips() -> ModuleType:
    """Import `lpips`, even if torchvision was built without its CPU operators.

    LPIPS never calls these operators, but torchvision refers to two of them when it is imported.
    If they are missing, declare them and import `lpips` again.
    """
    try:
        import lpips
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.append(library)
        import lpips
    return lpips  # type: ignore[no-any-return]
