"""AdamW over a model's parameter groups, and its state by parameter name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ParameterGroup = dict[str, Any]
"""`params` and `name`; optionally `weight_decay` and `lr_scale` (multipliers of the config's
values, 1 by default) and `clip` (the family whose gradients are clipped together)."""


def decay_groups(
    module: nn.Module, *, name: str, clip: str = "model", lr_scale: float = 1.0
) -> list[ParameterGroup]:
    """The module's trainable parameters as two groups: weights decay, biases and gains do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shared = {"clip": clip, "lr_scale": lr_scale}
    return [
        {
            "params": [parameter for parameter in trainable if (parameter.ndim >= 2) == decays],
            "name": f"{name}.{'weights' if decays else 'gains'}",
            "weight_decay": float(decays),
            **shared,
        }
        for decays in (True, False)
    ]


def build_optimizer(
    model: nn.Module,
    groups: Iterable[ParameterGroup],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    """AdamW over the groups; `ValueError` unless they hold each trainable parameter once."""
    complete = [
        {
            "lr_scale": 1.0,
            "clip": "model",
            **group,
            "weight_decay": weight_decay * group.get("weight_decay", 1.0),
        }
        for group in groups
        if group["params"]
    ]
    _check_cover(model, complete)
    # Fused kernels take the step in one pass over memory; MPS has them only in newer releases.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(complete, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group the rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> dict[str, Tensor]:
    """Clip each family's gradients to a common L2 norm; return the norms before, by family."""
    families: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        families.setdefault(group["clip"], []).extend(group["params"])
    return {
        family: nn.utils.clip_grad_norm_(parameters, limit).to(parameters[0].device)
        for family, parameters in families.items()
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `parameter name/quantity` tensors."""
    return {
        f"{name}/{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Take up what `optimizer_tensors` gave; `KeyError` for a parameter that the model lacks."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters[name]
        if quantity == "step":  # a count, which only fused kernels read on the device
            value = tensor.to(parameter.device) if optimizer.defaults["fused"] else tensor
        else:  # in the parameter's own memory format: fused kernels pair elements by address
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        optimizer.state[parameter][quantity] = value


def _check_cover(model: nn.Module, groups: list[ParameterGroup]) -> None:
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if len({id(p) for p in grouped}) < len(grouped):
        raise ValueError("parameter_groups holds a parameter twice")
    missing = trainable.keys() - {id(p) for p in grouped}
    if missing:
        names = ", ".join(sorted(trainable[key] for key in missing))
        raise ValueError(f"parameter_groups lacks {names}")
