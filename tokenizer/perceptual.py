"""The perceptual loss: LPIPS (Zhang et al. 2018, arXiv 1801.03924) from the `lpips` package.

The package carries LPIPS's own weights; those of its VGG-16 backbone (ImageNet) are downloaded on
first use, half a gigabyte, and kept in torch's hub cache.
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
"""The option that trains without LPIPS."""

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
# A library's declarations live as long as the object does.
_declarations: list[torch.library.Library] = []


class PerceptualLoss(nn.Module):
    """LPIPS on VGG-16 features with frozen weights; `vgg16_weights` fetches the backbone's."""

    def __init__(self, backbone: Mapping[str, Tensor]) -> None:
        super().__init__()
        lpips: Any = import_lpips()
        with warnings.catch_warnings():
            # lpips still asks torchvision for `pretrained=False`, by a deprecated name.
            warnings.filterwarnings("ignore", message="(The parameter|Arguments other)")
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # Torchvision's names are `features.N.*`; lpips' slices keep the numbers N.
        net = self.network.net
        numbered = {name: name.partition(".")[2] for name in net.state_dict()}
        net.load_state_dict({name: backbone[f"features.{n}"] for name, n in numbered.items()})
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in eval mode: the package's dropout is for training LPIPS itself."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distances [B] between pictures [B, 3, H, W] in [-1, 1]."""
        distance: Tensor = self.network(images, others)
        return distance.float().flatten(1).mean(1)

    @torch.inference_mode()
    def frame_distances(self, frames: Tensor, others: Tensor) -> Tensor:
        """Return the distances [B] between uint8 frames [B, H, W, 3] of one size."""
        size = FrameSize(height=frames.shape[1], width=frames.shape[2])
        distances: Tensor = self(*(images_from_frames(each, size) for each in (frames, others)))
        return distances


def has_vgg16_weights() -> bool:
    """Whether the VGG-16 weights are in torch's hub cache already."""
    return _cached().is_file()


def vgg16_weights() -> dict[str, Tensor]:
    """Return the ImageNet VGG-16 weights, downloaded or from torch's hub cache.

    The file is a pickle: its checksum is compared first, whether it is downloaded or was there, and
    then torch makes only tensors of it.
    Raises DriveSimError where it cannot be had: it names the file and the option to do without.
    """
    path = _cached()
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of what `load_state_dict_from_url` downloads it compares 8 digits, those in the name.
            torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix=VGG16_SHA256)
        if sha256_of(path) != VGG16_SHA256:
            raise DriveSimError(
                f"{path}: the weights of LPIPS's backbone are damaged, or others (their checksum "
                f"differs): remove that file, or train without LPIPS: {WITHOUT}"
            )
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        raise DriveSimError(
            f"the weights of LPIPS's backbone cannot be had from {VGG16_URL} ({one_line(error)}): "
            f"put that file into {path.parent}, or train without LPIPS: {WITHOUT}"
        ) from error
    return weights


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_URL).name


def import_lpips() -> ModuleType:
    """Import `lpips`, with operators declared that a torchvision built without them still needs.

    LPIPS calls neither; torchvision only has to register shapes for them as it is imported.
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
