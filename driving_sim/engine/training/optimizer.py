"""Muon for wide kernels and AdamW for the rest, over a model's parameter groups."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from driving_sim.engine.ranks.sharding import placed_like, whole

ParameterGroup = dict[str, Any]
"""`params` and `name`; optionally `weight_decay` and `lr_scale` (multipliers of the config's
values, 1 by default), `clip` (the family whose gradients are clipped together) and `muon` (whether
the parameters are matrices for Muon)."""

_SMALLEST_MATRIX = 32
_MOMENTUM = 0.95
# The first steps of Polar Express (arXiv 2505.16932), the leading ones damped for safety.
_POLAR_EXPRESS = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
]


def decay_groups(
    module: nn.Module, *, name: str, clip: str = "model", lr_scale: float = 1.0, muon: bool = True
) -> list[ParameterGroup]:
    """The module's trainable parameters: matrices, other weights, and gains, which do not decay.

    With `muon`, the kernels of linear maps and convolutions with at least 32 channels on both sides
    are left to Muon.
    """
    matrices = _matrices(module) if muon else set()
    parts: dict[str, list[nn.Parameter]] = {"matrices": [], "weights": [], "gains": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 else "gains"
            parts["matrices" if id(parameter) in matrices else kind].append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{name}.{kind}",
            "weight_decay": float(kind != "gains"),
            "muon": kind == "matrices",
            "clip": clip,
            "lr_scale": lr_scale,
        }
        for kind, parameters in parts.items()
    ]


def _matrices(module: nn.Module) -> set[int]:
    return {
        id(layer.weight)
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and min(layer.weight.shape[:2]) >= _SMALLEST_MATRIX
    }


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `muon`, AdamW for the others.

    Muon (https://kellerjordan.github.io/posts/muon) steps along the momentum with all its singular
    values made nearly equal, scaled to the size of an AdamW step (arXiv 2502.16982), so that one
    learning rate serves both. `torch.optim.Muon` takes no convolutions and always multiplies in
    bfloat16, which many CPUs have to emulate; here it is bfloat16 under autocast.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; the gradients are in the parameters."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
            # Of a sharded parameter every rank makes the whole step and takes its part of it.
            matrix = whole(parameter.grad.lerp(state["momentum"], _MOMENTUM)).flatten(1)
            scale = 0.2 * math.sqrt(max(matrix.shape))
            step = orthogonalise(matrix).reshape(parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(placed_like(step, parameter), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return `matrix` [M, N] with its larger singular values brought to 0.2 to 1.9.

    Three iterations, on the smaller of its two Gram matrices.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (1.01 * wide.norm() + 1e-7)
    gram = wide @ wide.T
    first, *others = _POLAR_EXPRESS
    factor = product = _factor(gram, *first)
    for coefficients in others:
        gram = factor @ gram @ factor
        factor = _factor(gram, *coefficients)
        product = factor @ product
    orthogonal: Tensor = product @ wide
    return orthogonal.T if matrix.shape[0] > matrix.shape[1] else orthogonal


def _factor(gram: Tensor, linear: float, cubic: float, quintic: float) -> Tensor:
    """What one iteration multiplies by: linear + cubic G + quintic G^2."""
    factor = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
    factor.diagonal().add_(linear)
    return factor


def build_optimizer(
    model: nn.Module,
    groups: Iterable[ParameterGroup],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    muon: bool = True,
) -> torch.optim.AdamW:
    """Muon, or AdamW alone; `ValueError` unless the groups hold each trainable parameter once."""
    complete = [
        {
            "lr_scale": 1.0,
            "clip": "model",
            **group,
            "muon": muon and group.get("muon", False),
            "weight_decay": weight_decay * group.get("weight_decay", 1.0),
        }
        for group in groups
        if group["params"]
    ]
    _check_cover(model, complete)
    # Fused kernels take the step in one pass over memory; MPS has them only in newer releases.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return Muon(complete, lr=learning_rate, betas=betas, fused=fused)


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
        family: whole(nn.utils.clip_grad_norm_(parameters, limit)).to(parameters[0].device)
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
            count = tensor.reshape(())
            value = count.to(parameter.device) if optimizer.defaults["fused"] else count
        else:  # in the parameter's own memory format: fused kernels pair elements by address
            value = torch.empty_like(parameter, dtype=tensor.dtype)
            value.copy_(placed_like(tensor, parameter))
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
