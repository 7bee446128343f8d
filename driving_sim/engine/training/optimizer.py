"""Muon for wide kernels and AdamW for the rest, over a model's parameter groups."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from driving_sim.engine.ranks.sharding import placed_like, whole
from driving_sim.engine.training.config import TrainingConfig

ParameterGroup = dict[str, Any]
"""`params`; optionally `weight_decay` and `lr_scale` (multipliers of the config's values, 1 by
default), `clip` (the family whose gradients are clipped together) and `muon` (whether the
parameters are matrices for Muon)."""

_SMALLEST_MATRIX = 32
_MOMENTUM = 0.95
# The first steps of Polar Express (arXiv 2505.16932), the leading ones damped for safety.
_POLAR_EXPRESS = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
]


def decay_groups(
    module: nn.Module, *, clip: str = "model", lr_scale: float = 1.0, muon: bool = True
) -> list[ParameterGroup]:
    """The module's trainable parameters: matrices, other weights, and gains, which do not decay.

    With `muon`, the kernels of linear maps and convolutions with at least 32 channels on both sides
    are left to Muon.
    """
    matrices = {
        layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and min(layer.weight.shape[:2]) >= _SMALLEST_MATRIX
    }
    parts: dict[str, list[nn.Parameter]] = {"matrices": [], "weights": [], "gains": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 else "gains"
            parts["matrices" if muon and parameter in matrices else kind].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": float(kind != "gains"),
            "muon": kind == "matrices",
            "clip": clip,
            "lr_scale": lr_scale,
        }
        for kind, parameters in parts.items()
    ]


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon), of the size of AdamW's steps.

    It steps along the momentum with all its singular values made nearly equal, scaled to the size
    of an AdamW step (arXiv 2502.16982), so that one learning rate serves both. `torch.optim.Muon`
    takes no convolutions and always multiplies in bfloat16, which many CPUs have to emulate; here
    it is bfloat16 under autocast.
    """

    found_inf: Tensor | None = None
    """Where it is 1 a step changes nothing, as with torch's fused optimisers."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; the gradients are in the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, group["lr"], group["weight_decay"])

    def _step_matrix(self, parameter: nn.Parameter, rate: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        # A gradient that is the momentum leaves the momentum as it is.
        gradient = self._unless_skipped(gradient, momentum)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        # Of a sharded parameter every rank makes the whole step and takes its part of it.
        matrix = whole(gradient.lerp(momentum, _MOMENTUM)).flatten(1)
        step = orthogonalise(matrix).reshape(parameter.shape)
        stepped = parameter * (1 - rate * weight_decay)
        stepped.add_(placed_like(step, parameter), alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))
        parameter.copy_(self._unless_skipped(stepped, parameter))

    def _unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf == 1, old, new)


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


class Optimizers:
    """What steps a model's parameters: Muon and AdamW, or AdamW alone.

    Raises `ValueError` unless `groups` hold each trainable parameter once.
    """

    def __init__(
        self, model: nn.Module, groups: Iterable[ParameterGroup], config: TrainingConfig
    ) -> None:
        self._parameters = dict(model.named_parameters())
        complete = [
            {
                "lr_scale": 1.0,
                "clip": "model",
                **group,
                "weight_decay": config.weight_decay * group.get("weight_decay", 1.0),
            }
            for group in groups
            if group["params"]
        ]
        self._check_cover(complete)
        by_muon = config.optimizer == "muon"
        matrices = [group for group in complete if by_muon and group.get("muon")]
        others = [group for group in complete if not (by_muon and group.get("muon"))]
        # Fused kernels take the step in one pass over memory, and can leave it out without a wait
        # for the device; MPS has them only in newer releases.
        self._fused = next(iter(self._parameters.values())).device.type in ("cpu", "cuda")
        self._all: list[torch.optim.Optimizer] = []
        if matrices:
            self._all.append(Muon(matrices, {"lr": config.learning_rate}))
        if others:
            rate, betas = config.learning_rate, config.betas
            self._all.append(torch.optim.AdamW(others, rate, betas, fused=self._fused))
        self._owners = {
            parameter: optimizer
            for optimizer in self._all
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def groups(self) -> list[ParameterGroup]:
        """The parameter groups of all of them; those of matrices first."""
        return [group for optimizer in self._all for group in optimizer.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give each group the rate times its own scale."""
        for group in self.groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def clip_gradients(self, limit: float) -> dict[str, Tensor]:
        """Clip each family's gradients to a common L2 norm; return the norms before, by family."""
        families: dict[str, list[Tensor]] = {}
        for group in self.groups:
            families.setdefault(group["clip"], []).extend(group["params"])
        return {
            family: whole(nn.utils.clip_grad_norm_(parameters, limit)).to(parameters[0].device)
            for family, parameters in families.items()
        }

    def step(self, skipped: Tensor | None = None) -> None:
        """Take one step; the gradients are in the parameters.

        Where `skipped`, a float32 scalar, is 1, weights, moments and counts stay as they are. Only
        without fused kernels is that read here, which waits for the device.
        """
        if skipped is not None and not self._fused:
            if skipped.item():
                return
            skipped = None
        for optimizer in self._all:
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/quantity` tensors."""
        return {
            f"{name}/{quantity}": value
            for name, parameter in self._parameters.items()
            if parameter in self._owners
            for quantity, value in self._owners[parameter].state.get(parameter, {}).items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave; `KeyError` for a parameter that the model lacks."""
        for key, tensor in tensors.items():
            name, _, quantity = key.rpartition("/")
            parameter = self._parameters[name]
            if quantity == "step":  # a count, which only fused kernels read on the device
                count = tensor.reshape(())
                value = count.to(parameter.device) if self._fused else count
            else:  # in the parameter's own memory format: fused kernels pair elements by address
                value = torch.empty_like(parameter, dtype=tensor.dtype)
                value.copy_(placed_like(tensor, parameter))
            self._owners[parameter].state[parameter][quantity] = value

    def _check_cover(self, groups: list[ParameterGroup]) -> None:
        grouped = [parameter for group in groups for parameter in group["params"]]
        if len(set(grouped)) < len(grouped):
            raise ValueError("parameter_groups holds a parameter twice")
        trainable = {p: name for name, p in self._parameters.items() if p.requires_grad}
        if missing := trainable.keys() - set(grouped):
            names = ", ".join(sorted(trainable[parameter] for parameter in missing))
            raise ValueError(f"parameter_groups lacks {names}")
