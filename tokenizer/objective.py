"""The training objective of the tokenizer: L1, squared error, LPIPS and a hinge PatchGAN.

The losses are those of VQGAN (Esser et al. 2020, arXiv 2012.09841) without its codebook losses,
which FSQ does not need. The gradient of each loss with respect to the reconstructed pixels is
computed once. A single backward pass then takes the weighted sum of these gradients through the
autoencoder, and trains the discriminator as well.

Axes: B batch, H W pixels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import field

import torch
from torch import Tensor, nn

from driving_sim.engine.config import NonNegative, Positive, Share, config, require
from driving_sim.engine.ranks.distributed import mean_over_ranks
from driving_sim.engine.training.optimizer import Player
from driving_sim.engine.training.trainable import Batch, Trainable
from driving_sim.tokenizer.autoencoder import (
    AttentionBlock,
    Autoencoder,
    AutoencoderConfig,
    ResidualBlock,
)
from driving_sim.tokenizer.discriminator import Discriminator, DiscriminatorConfig, hinge_loss
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.tokenizer.tokenizer import images_from_frames

_GAN_RAMP = 0.1
"""Share of the run over which the discriminator's weight rises from 0 to its full value."""


@config
class TokenizerObjectiveConfig:
    """Weights of the losses, for pictures in [-1, 1]."""

    l1_weight: NonNegative = 1.0
    """Weight of the mean absolute error."""
    mse_weight: NonNegative = 0.0
    """Weight of the mean squared error."""
    lpips_weight: NonNegative = 1.0
    """Weight of LPIPS; with 0, training needs no VGG-16 weights."""
    gan_weight: NonNegative = 0.1
    """Norm of the discriminator's gradient at the last layer, relative to the other losses.

    With 0, training uses no discriminator.
    """
    gan_start: Share = 0.5
    """Share of the run after which the discriminator starts."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Size of the discriminator."""
    discriminator_lr_scale: Positive = 1.0
    """Learning rate of the discriminator, as a multiple of the autoencoder's."""

    def __post_init__(self) -> None:
        has_loss = self.l1_weight + self.mse_weight + self.lpips_weight > 0
        require(self, "l1_weight", has_loss, "above 0, because mse_weight and lpips_weight are 0")
        ramp_ends = self.gan_weight == 0 or self.gan_start <= 1 - _GAN_RAMP
        allowed = f"at most {1 - _GAN_RAMP:g}, so that the discriminator reaches its full weight"
        require(self, "gan_start", ramp_ends, f"{allowed} (or gan_weight=0 to train without it)")


class TokenizerObjective(Trainable):
    """The autoencoder with its losses and its discriminator, as the training loop expects it."""

    gan_share: Tensor

    def __init__(
        self,
        model: AutoencoderConfig,
        config: TokenizerObjectiveConfig,
        vgg16: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build the models. LPIPS needs `vgg16`, the weights of its backbone."""
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(model)
        self.perceptual: PerceptualLoss | None = None
        if config.lpips_weight > 0:
            if vgg16 is None:
                raise ValueError(f"lpips_weight={config.lpips_weight}: needs the VGG-16 weights")
            self.perceptual = PerceptualLoss(vgg16)
        self.discriminator = Discriminator(config.discriminator) if config.gan_weight > 0 else None
        # Weight of the discriminator at the last step: 0 before it starts, 1 after the ramp.
        self.register_buffer("gan_share", torch.zeros(()))

    def ema_module(self) -> nn.Module:
        """Return the autoencoder, the part that is averaged and kept."""
        return self.autoencoder

    def blocks(self) -> Iterable[nn.Module]:
        """Return the autoencoder's residual and transformer blocks."""
        kinds = ResidualBlock, AttentionBlock
        return (module for module in self.autoencoder.modules() if isinstance(module, kinds))

    def players(self) -> list[Player]:
        """Return autoencoder and discriminator, whose gradients are clipped separately."""
        players = [Player("autoencoder", self.autoencoder)]
        if self.discriminator is not None:
            scale = self.config.discriminator_lr_scale
            # No Muon: the autoencoder learns nothing from a discriminator that learns too fast.
            players.append(Player("discriminator", self.discriminator, scale, muon=False))
        return players

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of a batch.

        The batch holds `frames`, uint8 [B, H, W, 3], and `progress`, the share of the run that is
        over (0..1).
        """
        images = images_from_frames(batch["frames"], self.autoencoder.config.frame_size)
        reconstruction = self.autoencoder(images).images
        pixels = reconstruction.detach().requires_grad_()
        loss, metrics = self.fidelity(pixels, images)
        (pull,) = torch.autograd.grad(loss, pixels)
        loss = loss.detach()

        progress = float(batch["progress"])
        if self.discriminator is not None and progress >= self.config.gan_start:
            self.gan_share.fill_(min(1.0, (progress - self.config.gan_start) / _GAN_RAMP))
            fake_scores = self.discriminator(pixels)
            real_scores = self.discriminator(images)
            adversarial = -fake_scores.mean()
            (push,) = torch.autograd.grad(adversarial, pixels, retain_graph=True)
            weight = self.gan_share * self._adaptive_weight(reconstruction, pull, push)
            pull = pull + weight * push
            opposing = hinge_loss(real_scores, fake_scores)
            loss = loss + weight * adversarial.detach() + opposing
            metrics |= {
                "gan/generator_loss": adversarial.detach(),
                "gan/discriminator_loss": opposing.detach(),
                "gan/weight": weight,
            }
        # Add a term that is 0 but whose gradient with respect to the reconstruction is `pull`.
        product = (reconstruction * pull).sum()
        return loss + (product - product.detach()), metrics

    def fidelity(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of pictures [B, 3, H, W] without the discriminator, and its parts."""
        config = self.config
        difference = images - target
        l1 = difference.abs().mean()
        mse = difference.square().mean()
        loss = config.l1_weight * l1 + config.mse_weight * mse
        metrics = {"l1": l1.detach(), "mse": mse.detach()}
        if self.perceptual is not None:
            lpips = self.perceptual(images, target).mean()
            loss = loss + config.lpips_weight * lpips
            metrics["lpips"] = lpips.detach()
        return loss, metrics

    def _adaptive_weight(self, reconstruction: Tensor, pull: Tensor, push: Tensor) -> Tensor:
        """Return the weight for `push` that makes its norm `gan_weight` times that of `pull`.

        `pull` and `push` are gradients with respect to the reconstruction. Their norms are compared
        after propagation to the last layer.
        """
        layer = self.autoencoder.last_layer
        norms = []
        for gradient in (pull, push):
            (at_layer,) = torch.autograd.grad(
                reconstruction, layer, grad_outputs=gradient, retain_graph=True
            )
            # Average over all ranks before taking the norm, as for one large batch on one rank.
            norms.append(mean_over_ranks(at_layer).norm())
        ratio: Tensor = norms[0] / norms[1].clamp(min=1e-8)
        return self.config.gan_weight * ratio
