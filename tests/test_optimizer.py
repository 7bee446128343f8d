from typing import cast

import pytest
import torch
from torch import Tensor, nn

from driving_sim.engine.optimizer import (
    ParameterGroup,
    build_optimizer,
    clip_gradients,
    decay_groups,
    set_learning_rate,
)


def build(model: nn.Module, groups: list[ParameterGroup]) -> torch.optim.AdamW:
    return build_optimizer(model, groups, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.99))


def test_only_matrices_and_kernels_decay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    optimizer = build(model, decay_groups(model, name="net"))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(parameter)] for parameter in model.parameters()] == [0.5, 0.0, 0.0, 0.0]


def test_groups_hold_each_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = decay_groups(model[0], name="first")
    with pytest.raises(ValueError, match=r"lacks 1\.bias, 1\.weight"):
        build(model, first)
    with pytest.raises(ValueError, match="twice"):
        build(model, [*first, *decay_groups(model, name="all")])
    model[1].requires_grad_(False)
    assert len(build(model, first).param_groups) == 2


def test_rates_are_scaled_by_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [
        *decay_groups(model[0], name="one"),
        *decay_groups(model[1], name="slow", lr_scale=0.1),
    ]
    optimizer = build(model, groups)
    set_learning_rate(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0, 0.2, 0.2]


def test_families_are_clipped_apart() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(3)])
    groups = [
        {"params": [model[0].weight], "name": "a", "clip": "generator"},
        {"params": [model[1].weight], "name": "b", "clip": "generator"},
        {"params": [model[2].weight], "name": "c", "clip": "discriminator"},
    ]
    optimizer = build(model, groups)
    for layer, size in zip(model, (4.0, 3.0, 0.1), strict=True):
        layer.weight.grad = torch.zeros(3, 3)
        layer.weight.grad[0, 0] = size
    norms = clip_gradients(optimizer, 1.0)
    assert {name: round(float(norm), 4) for name, norm in norms.items()} == {
        "generator": 5.0,
        "discriminator": 0.1,
    }
    clipped = [float(cast(Tensor, layer.weight.grad).norm()) for layer in model]
    assert clipped == pytest.approx([0.8, 0.6, 0.1], rel=1e-4)


def test_no_limit_leaves_gradients_alone() -> None:
    model = nn.Linear(3, 3)
    optimizer = build(model, decay_groups(model, name="net"))
    model.weight.grad = torch.full((3, 3), 1e4)
    assert float(clip_gradients(optimizer, float("inf"))["model"]) == pytest.approx(3e4)
    assert (model.weight.grad == 1e4).all()
