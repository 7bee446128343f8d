"""The feature distance: how different two pictures look to a network that knows ImageNet.

It is drivesim's own measure. It is made like LPIPS (Zhang et al. 2018, arXiv 1801.03924), but with
another network and without weights fitted to people's judgements, so its values are not LPIPS's.

Axes: B C pictures, H W pixels, c channels, h w places.
"""

from typing import Self

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from driving_sim.evaluate.pictures.efficientnet import (
    WEIGHTS_SHA256,
    EfficientNetLite0,
    find_weights,
)


class FeatureDistance:
    """Distances between pictures, from 0 (equal) to about 1 (nothing in common).

    EfficientNet-Lite0 has features at five depths. At each place of each depth, the distance of two
    pictures is 1 minus the cosine of the angle between their vectors of channels. These are
    averaged over the places, and then over the depths. So blur counts, which PSNR forgives.

    Pictures are taken as they are, without resizing, so only distances of pictures of one size can
    be compared.
    """

    fingerprint = WEIGHTS_SHA256
    """SHA-256 (hex) of the network's weights."""

    def __init__(self, network: EfficientNetLite0, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self.device = device

    @classmethod
    def if_installed(cls, device: torch.device | str = "cpu") -> Self | None:
        """Return the measure, or None if the package with the network's weights is missing."""
        weights = find_weights()
        return None if weights is None else cls(EfficientNetLite0.load(weights), device)

    @torch.inference_mode()
    def __call__(self, frames: Tensor, others: Tensor) -> Tensor:
        """Return the distances [B, C] of uint8 frames [B, H, W, 3] from others [C, H, W, 3]."""
        both = torch.cat([frames, others]).to(self.device)
        distances = torch.zeros(len(frames), len(others))
        depths = self.network.features(both)
        for features in depths:
            a, b = torch.tensor_split(F.normalize(features, dim=1), [len(frames)])
            cosines = einsum(a, b, "b c h w, o c h w -> b o") / features[0, 0].numel()
            distances += (1 - cosines).cpu() / len(depths)
        return distances.clamp(min=0)
