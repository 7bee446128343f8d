"""Muon for wide kernels and AdamW for the rest of a model's parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from driving_sim.engine.ranks.sharding import placed_like, whole
from driving_sim.engine.training.config import TrainingConfig

_SMALLEST_MATRIX = 32
_MOMENTUM = 0.95
# The first steps of Polar Express (arXiv 2505.16932), the leading ones damped for safety.
_POLAR_EXPRESS = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
]


@dataclass(frozen=True, slots=True)
class Player:
    """A part of a model that is stepped alike, and whose gradients are clipped together."""

    name: str
    module: nn.Module
    lr_scale: float = 1.0
    """Multiplier of the learning rate."""
    muon: bool = True
    """Whether the kernels of its linear maps and convolutions with at least 32 channels on both
    sides are left to Muon."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters: matrices for Muon, other weights, and gains."""
        matrices = {
            layer.weight
            for layer in self.module.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            and min(layer.weight.shape[:2]) >= _SMALLEST_MATRIX
        }
        parts: dict[str, list[nn.Parameter]] = {"matrices": [], "weights": [], "gains": []}
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                kind = "weights" if parameter.ndim >= 2 else "gains"
                parts["matrices" if self.muon and parameter in matrices else kind].append(parameter)
        return parts


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
        momentum, decay = state["momentum"], 1 - rate * weight_decay
        if self.found_inf is not None:
            # A gradient that is the momentum leaves the momentum as it is.
            gradient = torch.where(self.found_inf == 1, momentum, gradient)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        # Of a sharded parameter every rank makes the whole step and takes its part of it.
        matrix = whole(gradient.lerp(momentum, _MOMENTUM)).flatten(1)
        step = orthogonalise(matrix).reshape(parameter.shape)
        if self.found_inf is not None:
            step.mul_(1 - self.found_inf)
            parameter.mul_(torch.where(self.found_inf == 1, 1.0, decay))
        else:
            parameter.mul_(decay)
        scale = 0.2 * math.sqrt(max(matrix.shape))
        parameter.add_(placed_like(step, parameter), alpha=-rate * scale)


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

    Gains do not decay. Raises `ValueError` unless `players` hold each trainable parameter once.
    """

    def __init__(self, model: nn.Module, players: Iterable[Player], config: TrainingConfig) -> None:
        self._parameters = dict(model.named_parameters())
        # Fused kernels take the step in one pass over memory, and leave it out where a number on
        # the device says so; MPS has them only in newer releases.
        self._fused = next(iter(self._parameters.values())).device.type in ("cpu", "cuda")
        by_muon: list[dict[str, Any]] = []
        by_adamw: list[dict[str, Any]] = []
        for player in players:
            for kind, parameters in player.parts().items():
                group = {
                    "params": parameters,
                    "player": player.name,
                    "lr_scale": player.lr_scale,
                    "weight_decay": 0.0 if kind == "gains" else config.weight_decay,
                }
                is_muons = kind == "matrices" and config.optimizer == "muon"
                if parameters:
                    (by_muon if is_muons else by_adamw).append(group)
        rate, betas = config.learning_rate, config.betas
        self._all: list[torch.optim.Optimizer] = []
        if by_muon:
            self._all.append(Muon(by_muon, {"lr": rate}))
        if by_adamw:
            self._all.append(torch.optim.AdamW(by_adamw, rate, betas, fused=self._fused))
        self._owners = {
            parameter: optimizer
            for optimizer in self._all
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if len(self._owners) < sum(len(group["params"]) for group in self.groups):
            raise ValueError("two players hold the same parameter")
        if missing := [
            name
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and parameter not in self._owners
        ]:
            raise ValueError(f"the players lack {', '.join(sorted(missing))}")

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all of them; those of matrices first."""
        return [group for optimizer in self._all for group in optimizer.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give each group the rate times its own scale."""
        for group in self.groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def clip_gradients(self, limit: float) -> dict[str, Tensor]:
        """Clip each player's gradients to a common L2 norm; return the norms before, by player."""
        players: dict[str, list[Tensor]] = {}
        for group in self.groups:
            players.setdefault(group["player"], []).extend(group["params"])
        return {
            player: whole(nn.utils.clip_grad_norm_(parameters, limit)).to(parameters[0].device)
            for player, parameters in players.items()
        }

    def step(self, skipped: Tensor | None = None) -> None:
        """Take one step; the gradients are in the parameters.

        Where `skipped`, a float32 scalar, is 1, weights, moments and counts stay as they are: the
        device decides it, without a wait, unless the scalar lies on the CPU.
        """
        if skipped is not None and skipped.device.type == "cpu":
            if skipped:
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
