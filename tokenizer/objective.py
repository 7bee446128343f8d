"""The training objective of the tokenizer: L1, squared error, LPIPS and a hinge PatchGAN.

The losses are those of VQGAN (Esser et al. 2020, arXiv 2012.09841) without its codebook losses,
which FSQ does not need. `forward` itself computes the gradients of the losses with respect to the
reconstructed pixels, and adds them up with their weights. The training loop then makes a single
backward pass. It propagates this sum through the autoencoder, and the gradient of the hinge loss
through the discriminator.

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
"""Share of the training run in which the discriminator's weight rises from 0 to its full value."""


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
    """How strongly the discriminator acts on the autoencoder, compared with the other losses.

    The norm of the discriminator's gradient is this many times the norm of the other losses'
    gradient, both taken at the decoder's last layer. With 0, training uses no discriminator.
    """
    gan_start: Share = 0.5
    """Share of the training run that passes before the discriminator is used."""
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
    """The autoencoder, its losses and its discriminator, as one `Trainable`."""

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
        # Share of the discriminator's full weight that the last step used: 0 before `gan_start`,
        # then rising to 1.
        self.register_buffer("gan_share", torch.zeros(()))

    def ema_module(self) -> nn.Module:
        """Return the autoencoder, whose weights are averaged (EMA) and saved as the tokenizer."""
        return self.autoencoder

    def blocks(self) -> Iterable[nn.Module]:
        """Return the autoencoder's residual and transformer blocks."""
        kinds = ResidualBlock, AttentionBlock
        return (module for module in self.autoencoder.modules() if isinstance(module, kinds))

    def players(self) -> list[Player]:
        """Return the autoencoder and the discriminator, whose gradients are clipped separately."""
        players = [Player("autoencoder", self.autoencoder)]
        if self.discriminator is not None:
            scale = self.config.discriminator_lr_scale
            # Train the discriminator without Muon. Otherwise it learns so fast that the autoencoder
            # learns nothing from it.
            players.append(Player("discriminator", self.discriminator, scale, muon=False))
        return players

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a batch's loss, a scalar, and its metrics by name.

        The batch consists of `frames`, uint8 [B, H, W, 3], and `progress`, the finished share of
        the run (0..1).
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
        # Add a term of value 0 whose gradient with respect to the reconstruction is `pull`.
        product = (reconstruction * pull).sum()
        return loss + (product - product.detach()), metrics

    def fidelity(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction loss of pictures [B, 3, H, W], and its terms by name."""
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
        """Return the weight w for which |w push| is `gan_weight` times |pull|.

        `pull` is the gradient of the reconstruction loss, and `push` the gradient of the
        adversarial loss, both with respect to the reconstruction. They are propagated to the
        decoder's last layer before the norms are taken.
        """
        layer = self.autoencoder.last_layer
        norms = []
        for gradient in (pull, push):
            (at_layer,) = torch.autograd.grad(
                reconstruction, layer, grad_outputs=gradient, retain_graph=True
            )
            # Average over all ranks before taking the norm. The result is then the same as for one
            # large batch on one rank.
            norms.append(mean_over_ranks(at_layer).norm())
        ratio: Tensor = norms[0] / norms[1].clamp(min=1e-8)
        return self.config.gan_weight * ratio
