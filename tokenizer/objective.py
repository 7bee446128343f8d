"""What the tokenizer is trained for: L1, squared error, LPIPS and a hinge PatchGAN.

The recipe of VQGAN (Esser et al. 2020, arXiv 2012.09841) without the codebook's own losses, which
FSQ does not need. All losses meet in the reconstruction's pixels: each is differentiated down to
there once, and one backward pass through the autoencoder carries their weighted sum, together with
the discriminator's own loss.

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
"""Share of the run over which a fresh discriminator gains its say."""


@config
class TokenizerObjectiveConfig:
    """The weights of the losses; pictures are in [-1, 1]."""

    l1_weight: NonNegative = 1.0
    """Weight of the mean absolute error."""
    mse_weight: NonNegative = 0.0
    """Weight of the mean squared error."""
    lpips_weight: NonNegative = 1.0
    """Weight of LPIPS; 0 trains without it and needs no VGG weights."""
    gan_weight: NonNegative = 0.1
    """The discriminator's gradient at the last layer as a share of the other losses'; 0: none."""
    gan_start: Share = 0.5
    """Share of the run after which the discriminator starts."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator's size."""
    discriminator_lr_scale: Positive = 1.0
    """The discriminator's learning rate as a multiple of the autoencoder's."""

    def __post_init__(self) -> None:
        any_left = self.l1_weight + self.mse_weight + self.lpips_weight > 0
        require(self, "l1_weight", any_left, "above 0, as mse_weight and lpips_weight are 0")
        gains = self.gan_weight == 0 or self.gan_start <= 1 - _GAN_RAMP
        allowed = f"at most {1 - _GAN_RAMP:g}, so that the discriminator gains its full say"
        require(self, "gan_start", gains, f"{allowed}; gan_weight=0 trains without it")


class TokenizerObjective(Trainable):
    """The autoencoder with its losses and its opponent: a model the training loop can train."""

    gan_share: Tensor

    def __init__(
        self,
        model: AutoencoderConfig,
        config: TokenizerObjectiveConfig,
        vgg16: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`vgg16` are the weights of LPIPS's backbone, needed where `lpips_weight` is not 0."""
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(model)
        self.perceptual: PerceptualLoss | None = None
        if config.lpips_weight > 0:
            if vgg16 is None:
                raise ValueError(f"lpips_weight={config.lpips_weight}: needs the VGG-16 weights")
            self.perceptual = PerceptualLoss(vgg16)
        self.discriminator = Discriminator(config.discriminator) if config.gan_weight > 0 else None
        # How far the discriminator has gained its say, 0 to 1, at the last training step.
        self.register_buffer("gan_share", torch.zeros(()))

    def ema_module(self) -> nn.Module:
        """The part that is averaged and kept."""
        return self.autoencoder

    def blocks(self) -> Iterable[nn.Module]:
        """The autoencoder's residual and transformer blocks; the discriminator is small."""
        kinds = ResidualBlock, AttentionBlock
        return (module for module in self.autoencoder.modules() if isinstance(module, kinds))

    def players(self) -> list[Player]:
        """Both players, whose gradients are clipped apart."""
        players = [Player("autoencoder", self.autoencoder)]
        if self.discriminator is not None:
            scale = self.config.discriminator_lr_scale
            # No Muon: an opponent that is too quick teaches nothing.
            players.append(Player("discriminator", self.discriminator, scale, muon=False))
        return players

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of {"frames": uint8 [B, H, W, 3], "progress": 0..1}."""
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
        # A zero whose gradient with respect to the reconstruction is `pull`.
        product = (reconstruction * pull).sum()
        return loss + (product - product.detach()), metrics

    def fidelity(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss without the discriminator, and its parts, of pictures [B, 3, H, W]."""
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
        """Return the weight that makes `push` at the last layer `gan_weight` times `pull`."""
        layer = self.autoencoder.last_layer
        norms = []
        for gradient in (pull, push):
            (at_layer,) = torch.autograd.grad(
                reconstruction, layer, grad_outputs=gradient, retain_graph=True
            )
            # Of the whole batch's gradients, as one rank would have them.
            norms.append(mean_over_ranks(at_layer).norm())
        ratio: Tensor = norms[0] / norms[1].clamp(min=1e-8)
        return self.config.gan_weight * ratio
