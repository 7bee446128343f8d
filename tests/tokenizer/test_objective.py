from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.optimizer import Optimizers
from driving_sim.tokenizer import objective as module
from driving_sim.tokenizer.autoencoder import AutoencoderConfig
from driving_sim.tokenizer.discriminator import Discriminator, DiscriminatorConfig, hinge_loss
from driving_sim.tokenizer.objective import TokenizerObjective, TokenizerObjectiveConfig
from driving_sim.tokenizer.tokenizer import images_from_frames

MODEL = AutoencoderConfig(
    height=32, width=32, widths=(16, 16, 16), blocks=(1, 0, 0), attention_blocks=0, head_size=16
)


def objective(**changes: Any) -> TokenizerObjective:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "lpips_weight": 0.0,
        "gan_weight": 0.2,
        "gan_start": 0.5,
        "discriminator": DiscriminatorConfig(width=16),
    }
    return TokenizerObjective(MODEL, TokenizerObjectiveConfig(**(values | changes)))


def batch(progress: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return {"frames": frames, "progress": torch.tensor(progress), "step": torch.tensor(7)}


def images() -> Tensor:
    return images_from_frames(batch(0)["frames"], MODEL.frame_size)


def gradients(loss: Tensor, player: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(player.parameters()), retain_graph=True))


def discriminator_of(model: TokenizerObjective) -> Discriminator:
    assert model.discriminator is not None
    return model.discriminator


def test_without_a_discriminator_it_is_plain_reconstruction() -> None:
    model = objective(gan_weight=0.0, mse_weight=0.5)
    loss, metrics = model(batch(0.9))
    difference = model.autoencoder(images()).images - images()
    expected = difference.abs().mean() + 0.5 * difference.square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients(loss, model.autoencoder), gradients(expected, model.autoencoder)
    )
    assert metrics["l1"] == difference.abs().mean()
    assert model.discriminator is None


def test_the_discriminator_waits_for_its_start() -> None:
    model = objective()
    loss, metrics = model(batch(0.49))
    torch.autograd.backward(loss)
    assert all(p.grad is None for p in discriminator_of(model).parameters())
    assert not any(name.startswith("gan/") for name in metrics)
    assert float(model.gan_share) == 0


def test_one_backward_pass_serves_both_players() -> None:
    """Separate backward passes for the two losses give the same gradients."""
    model = objective()
    discriminator = discriminator_of(model)
    loss, metrics = model(batch(0.9))

    reconstruction = model.autoencoder(images()).images
    fidelity = (reconstruction - images()).abs().mean()
    adversarial = -discriminator(reconstruction).mean()
    last = model.autoencoder.last_layer
    norms = [
        torch.autograd.grad(part, last, retain_graph=True)[0].norm()
        for part in (fidelity, adversarial)
    ]
    weight = 0.2 * norms[0] / norms[1]
    opposing = hinge_loss(discriminator(images()), discriminator(reconstruction.detach()))

    torch.testing.assert_close(metrics["gan/weight"], weight)
    torch.testing.assert_close(loss, fidelity + weight * adversarial + opposing)
    torch.testing.assert_close(
        gradients(loss, model.autoencoder),
        gradients(fidelity + weight.detach() * adversarial, model.autoencoder),
    )
    torch.testing.assert_close(gradients(loss, discriminator), gradients(opposing, discriminator))


def test_the_discriminators_pull_is_bounded_and_ramps_up() -> None:
    model = objective()
    last = [model.autoencoder.last_layer]
    alone, *rest = (
        torch.autograd.grad(model(batch(progress))[0], last)[0]
        for progress in (0.0, 0.5, 0.55, 0.8)
    )
    pulls = [float((gradient - alone).norm() / alone.norm()) for gradient in rest]
    assert pulls == pytest.approx([0.0, 0.1, 0.2], abs=1e-4)


def test_the_weight_of_the_discriminator_is_part_of_a_checkpoint() -> None:
    model = objective()
    model(batch(0.55))
    loaded = objective()
    loaded.load_state_dict(model.state_dict())
    assert float(loaded.gan_share) == pytest.approx(0.5, abs=1e-5)


def test_an_optimizer_takes_each_players_parameters_once() -> None:
    model = objective()
    optimizers = Optimizers(model, model.players(), TrainingConfig(steps=1))
    players = {group["player"] for group in optimizers.groups}
    assert players == {"autoencoder", "discriminator"}
    assert model.ema_module() is model.autoencoder


class Distance(nn.Module):
    def __init__(self, backbone: dict[str, Tensor]) -> None:
        super().__init__()
        self.factor = backbone["factor"]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.factor * (a - b).square().mean()


def test_lpips_is_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PerceptualLoss", Distance)
    config = TokenizerObjectiveConfig(l1_weight=0.0, lpips_weight=3.0, gan_weight=0.0)
    model = TokenizerObjective(MODEL, config, {"factor": torch.tensor(2.0)})
    loss, metrics = model(batch(0.1))
    expected = 2 * (model.autoencoder(images()).images - images()).square().mean()
    torch.testing.assert_close(metrics["lpips"], expected.detach())
    torch.testing.assert_close(loss, 3 * expected)
    torch.testing.assert_close(
        gradients(loss, model.autoencoder), gradients(3 * expected, model.autoencoder)
    )


def test_lpips_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="lpips_weight=1"):
        objective(lpips_weight=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1_weight": -1.0}, "l1_weight: must .* 0, found -1"),
        ({"l1_weight": 0.0}, "l1_weight: must be above 0"),
        ({"gan_start": 1.5}, "gan_start: must .*, found 1.5"),
        ({"gan_start": 0.95}, "gan_start: must be at most 0.9.*, found 0.95"),
        (
            {"discriminator_lr_scale": 0.0},
            "discriminator_lr_scale: must be greater than 0, found 0",
        ),
    ],
)
def test_a_bad_config_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**changes)
