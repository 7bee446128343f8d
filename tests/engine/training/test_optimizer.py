from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.optimizer import Optimizers, Player, orthogonalise


def build(model: nn.Module, *players: Player, **options: Any) -> Optimizers:
    settings: dict[str, Any] = {
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "betas": (0.9, 0.99),
    } | options
    players = players or (Player("net", model),)
    return Optimizers(model, players, TrainingConfig(steps=1, **settings))


def test_only_matrices_and_kernels_decay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    optimizers = build(model)
    decay = {id(p): g["weight_decay"] for g in optimizers.groups for p in g["params"]}
    assert [decay[id(parameter)] for parameter in model.parameters()] == [0.5, 0.0, 0.0, 0.0]


def test_players_hold_each_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = Player("first", model[0])
    with pytest.raises(ValueError, match=r"no player has the parameters 1\.bias, 1\.weight"):
        build(model, first)
    with pytest.raises(ValueError, match="more than one parameter group"):
        build(model, first, Player("all", model))
    model[1].requires_grad_(False)
    assert len(build(model, first).groups) == 2


def test_rates_are_scaled_by_player() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = build(model, Player("one", model[0]), Player("slow", model[1], lr_scale=0.1))
    optimizers.set_learning_rate(2.0)
    assert [group["lr"] for group in optimizers.groups] == [2.0, 2.0, 0.2, 0.2]


def test_players_are_clipped_separately() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(3)])
    generator, discriminator = nn.ModuleList([model[0], model[1]]), model[2]
    optimizers = build(
        model, Player("generator", generator), Player("discriminator", discriminator)
    )
    for layer, size in zip(model, (4.0, 3.0, 0.1), strict=True):
        layer.weight.grad = torch.zeros(3, 3)
        layer.weight.grad[0, 0] = size
    norms = optimizers.clip_gradients(1.0)
    assert {name: round(float(norm), 4) for name, norm in norms.items()} == {
        "generator": 5.0,
        "discriminator": 0.1,
    }
    clipped = [float(cast(Tensor, layer.weight.grad).norm()) for layer in model]
    assert clipped == pytest.approx([0.8, 0.6, 0.1], rel=1e-4)


def test_without_a_limit_gradients_are_not_clipped() -> None:
    model = nn.Linear(3, 3)
    optimizers = build(model)
    model.weight.grad = torch.full((3, 3), 1e4)
    assert float(optimizers.clip_gradients(float("inf"))["net"]) == pytest.approx(3e4)
    assert (model.weight.grad == 1e4).all()


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonalised_matrix_has_the_same_directions_with_similar_strengths(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    strengths = torch.logspace(0, -1.5, min(shape))
    directions = u.T @ orthogonalise(5 * u @ torch.diag(strengths) @ v) @ v.T
    # The range of singular values shrinks from a factor of 32 to at most 10. More iterations would
    # cost more than they gain.
    assert directions.diagonal().min() > 0.18
    assert directions.diagonal().max() < 1.9
    torch.testing.assert_close(directions, torch.diag(directions.diagonal()), atol=1e-3, rtol=0)


def test_bfloat16_products_give_nearly_the_same_step() -> None:
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    exact = orthogonalise(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        low = orthogonalise(matrix)
    assert low.dtype is torch.bfloat16
    assert float((low - exact).norm() / exact.norm()) < 0.05


def test_muon_updates_wide_kernels_only() -> None:
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 3, 1),
        nn.Linear(3, 64),
        nn.Linear(64, 32),
        nn.Embedding(64, 64),
    )
    kinds = {id(p): kind for kind, ps in Player("net", model).parts().items() for p in ps}
    uses_muon = [kinds[id(layer.weight)] == "matrices" for layer in model]
    assert uses_muon == [True, False, False, False, True, False]
    assert Player("net", model, muon=False).parts()["matrices"] == []


def step_of(model: nn.Module, muon: bool) -> Tensor:
    weight = cast("nn.Linear", model).weight
    before = weight.detach().clone()
    kind = "muon" if muon else "adamw"
    optimizers = build(model, weight_decay=0.0, optimizer=kind)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizers.step()
    return weight.detach() - before


def test_a_convolution_steps_like_the_linear_map_of_its_patches() -> None:
    conv, linear = nn.Conv2d(32, 48, 3, bias=False), nn.Linear(32 * 9, 48, bias=False)
    torch.testing.assert_close(step_of(conv, True).flatten(1), step_of(linear, True))


def test_muon_and_adamw_take_steps_of_about_the_same_size() -> None:
    # By Moonlight (arXiv 2502.16982), AdamW's updates usually have a root mean square of 0.2.
    step = step_of(nn.Linear(64, 64, bias=False), True)
    assert float(step.square().mean().sqrt()) == pytest.approx(0.02, rel=0.3)


def after_muon(start: Tensor, *gradients: Tensor, weight_decay: float = 0.0) -> Tensor:
    layer = nn.Linear(start.shape[1], start.shape[0], bias=False)
    layer.weight.data.copy_(start)
    optimizers = build(layer, weight_decay=weight_decay)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizers.step()
    return layer.weight.detach()


def test_muon_applies_weight_decay() -> None:
    start, nothing = torch.ones(64, 64), torch.zeros(64, 64)
    torch.testing.assert_close(after_muon(start, nothing, weight_decay=0.5), start * 0.95)


@pytest.mark.parametrize("shape", [(256, 32), (32, 256)])
def test_muon_steps_have_the_same_size_for_every_matrix_shape(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    step = after_muon(torch.zeros(shape), gradient)
    assert float(step.square().mean().sqrt()) == pytest.approx(0.02, rel=0.3)


def test_muon_uses_nesterov_momentum() -> None:
    """Muon follows the momentum after it added the newest gradient a second time."""
    generator, start = torch.Generator().manual_seed(0), torch.zeros(64, 64)
    first, second = (torch.randn(64, 64, generator=generator) for _ in range(2))
    momentum = (0.05 * first).lerp(second, 0.05)
    ahead = momentum.lerp(second, 0.05)
    step = after_muon(start, first, second) - after_muon(start, first)
    torch.testing.assert_close(step, after_muon(start, ahead), atol=1e-5, rtol=1e-4)


def test_adamw_alone_equals_torch_adamw() -> None:
    model = nn.Linear(64, 64, bias=False)
    reference = nn.Linear(64, 64, bias=False)
    reference.load_state_dict(model.state_dict())
    before = reference.weight.detach().clone()
    reference.weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.0, betas=(0.9, 0.99)).step()
    torch.testing.assert_close(step_of(model, False), reference.weight.detach() - before)


@pytest.mark.parametrize("by_device", [True, False])
def test_a_skipped_step_does_not_change_weights_and_moments(by_device: bool) -> None:
    """The gradients of a skipped step are NaN, and the next step is as if it had not happened."""

    def trained(*skipped: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.Conv2d(3, 4, 1))  # one for Muon, one for AdamW
        optimizers = build(model)
        for skip in skipped:
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.grad = gradient * torch.nan if skip else gradient
            if by_device:
                for optimizer in optimizers._all:
                    optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
                    optimizer.step()
            else:
                optimizers.step(torch.tensor(float(skip)))
        return [p.detach() for p in model.parameters()], optimizers.tensors()

    weights, moments = trained(False, False)
    skipping_weights, skipping_moments = trained(False, True, True, False)
    assert all(map(torch.equal, weights, skipping_weights))
    assert moments.keys() == skipping_moments.keys()
    assert all(torch.equal(moments[name], skipping_moments[name]) for name in moments)
