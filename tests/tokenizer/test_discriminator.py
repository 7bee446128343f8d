import pytest
import torch

from driving_sim.tokenizer.discriminator import Discriminator, DiscriminatorConfig, hinge_loss


@pytest.mark.parametrize(("halvings", "stride"), [(0, 4), (1, 8), (2, 16)])
def test_scores_cover_the_picture(halvings: int, stride: int) -> None:
    discriminator = Discriminator(DiscriminatorConfig(width=16, halvings=halvings))
    scores = discriminator(torch.randn(2, 3, 32, 64))
    assert scores.shape == (2, 1, 32 // stride, 64 // stride)


def test_a_picture_does_not_see_the_rest_of_its_batch() -> None:
    discriminator = Discriminator(DiscriminatorConfig(width=16, halvings=2)).train()
    images = torch.randn(3, 3, 32, 64)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


def test_hinge_loss() -> None:
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert hinge_loss(real, fake) == 0
    assert hinge_loss(fake, real) == 0.5 * ((2.0 + 3.0) / 2 + (2.0 + 4.0) / 2)


def test_it_learns_to_tell_smooth_from_rough() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(width=16))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    for _ in range(20):
        rough = torch.randn(4, 3, 16, 16)
        smooth = rough.mean((2, 3), keepdim=True).expand_as(rough) * 16
        loss = hinge_loss(discriminator(rough), discriminator(smooth))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize(("name", "value"), [("width", 8), ("width", 40), ("halvings", 3)])
def test_a_bad_config_names_its_field(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: must .*, found {value}"):
        DiscriminatorConfig(**{name: value})
