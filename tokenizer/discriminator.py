"""The patch discriminator (PatchGAN, Isola et al. 2016, arXiv 1611.07004) with group norm.

It judges overlapping patches instead of whole pictures. As in the autoencoder, a fixed 4x4 patching
comes first, so that no convolution runs at full resolution.

Axes: B batch, H W pixels, p q rows and columns of the judged patches.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from driving_sim.engine.config import Count, config
from driving_sim.tokenizer.autoencoder import GROUP_CHANNELS, Patching, group_norm

_SLOPE = 0.2


@config
class DiscriminatorConfig:
    """Size of the patch discriminator."""

    width: Annotated[Count, Field(multiple_of=GROUP_CHANNELS)] = 64
    """Number of channels at stride 4, a multiple of 16. It doubles with each of the `halvings`."""
    halvings: Annotated[int, Field(ge=0, le=2)] = 1
    """How often the resolution is halved after stride 4: 0, 1 or 2 times.

    The judged patches are then 20, 40 or 80 pixels wide and high.
    """


class Discriminator(nn.Module):
    """Scores each patch of a picture; a high score means that the patch looks real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.patching = Patching("unshuffle")
        layers: list[nn.Module] = [nn.Conv2d(48, config.width, 3, padding=1)]
        width = config.width
        for _ in range(config.halvings):
            layers += [nn.LeakyReLU(_SLOPE), nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)]
            width *= 2
            layers += [group_norm(width)]
        layers += [nn.LeakyReLU(_SLOPE), nn.Conv2d(width, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores [B, 1, p, q] of pictures [B, 3, H, W] in [-1, 1]."""
        patches = self.patching(images).contiguous(memory_format=torch.channels_last)
        scores: Tensor = self.layers(patches)
        return scores.float()


def hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim and Ye 2017, arXiv 1705.02894), a scalar."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())
