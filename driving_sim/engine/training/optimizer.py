"""Muon for large matrices and convolution kernels, and AdamW for all other parameters."""

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
# Coefficients of the first iterations of Polar Express (arXiv 2505.16932), one row for each. All
# rows except the last are damped by a factor of 1.01 for numerical stability.
_POLAR_EXPRESS = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
]


@dataclass(frozen=True, slots=True)
class Player:
    """A part of a model whose gradients are clipped together, such as the generator of a GAN."""

    name: str
    module: nn.Module
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    muon: bool = True
    """Whether Muon may update the weights of linear layers and convolutions with at least 32 input
    and 32 output channels."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return three lists of trainable parameters: "matrices", "weights" and "gains".

        Muon may update the matrices. Gains are parameters with fewer than two axes, such as biases.
        Weights are all other parameters.
        """
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
    """The optimiser Muon (https://kellerjordan.github.io/posts/muon).

    In each step, the momentum of a parameter is turned into a matrix with nearly equal singular
    values. This matrix is scaled to the size of an AdamW step (arXiv 2502.16982), so both
    optimisers can use the same learning rate. Then it is subtracted from the parameter.

    `torch.optim.Muon` is not used, because it does not support convolutions, and always multiplies
    matrices in bfloat16, which many CPUs have to emulate. This class uses bfloat16 only under
    autocast.
    """

    found_inf: Tensor | None = None
    """Scalar tensor. If it is 1, a step changes nothing, as in the fused optimisers of torch."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients stored in the parameters."""
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
            # To skip the step, use the momentum as the gradient. The momentum then stays the same.
            gradient = torch.where(self.found_inf == 1, momentum, gradient)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        # If the parameter is sharded, every rank computes the complete step, and applies its share.
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
    """Make the singular values of `matrix` [M, N] nearly equal, and return the new matrix.

    Three iterations move the larger singular values into the range 0.2 to 1.9. To save time, they
    work on the smaller of the two Gram matrices of `matrix`, not on `matrix` itself.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (1.01 * wide.norm() + 1e-7)
    gram = wide @ wide.T
    first, *rest = _POLAR_EXPRESS
    factor = product = _factor(gram, *first)
    for coefficients in rest:
        gram = factor @ gram @ factor
        factor = _factor(gram, *coefficients)
        product = factor @ product
    orthogonal: Tensor = product @ wide
    return orthogonal.T if matrix.shape[0] > matrix.shape[1] else orthogonal


def _factor(gram: Tensor, linear: float, cubic: float, quintic: float) -> Tensor:
    """Return the matrix factor of one iteration: linear I + cubic G + quintic G^2, G = `gram`."""
    factor = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
    factor.diagonal().add_(linear)
    return factor


class Optimizers:
    """The optimisers of a model: Muon and AdamW, or only AdamW.

    Gains (see `Player.parts`) have no weight decay. Raises ValueError unless each trainable
    parameter belongs to exactly one of the `players`.
    """

    def __init__(self, model: nn.Module, players: Iterable[Player], config: TrainingConfig) -> None:
        self._parameters = dict(model.named_parameters())
        # Fused kernels update all parameters in one pass over memory, and can skip the step if a
        # scalar on the device is 1. MPS has them only in newer releases of torch.
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
                uses_muon = kind == "matrices" and config.optimizer == "muon"
                if parameters:
                    (by_muon if uses_muon else by_adamw).append(group)
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
            raise ValueError("two players have the same parameter")
        if missing := [
            name
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and parameter not in self._owners
        ]:
            raise ValueError(f"no player has the parameters {', '.join(sorted(missing))}")

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of Muon, followed by those of AdamW."""
        return [group for optimizer in self._all for group in optimizer.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of each parameter group to `learning_rate` times `lr_scale`."""
        for group in self.groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def clip_gradients(self, limit: float) -> dict[str, Tensor]:
        """Clip the gradients of each player to the L2 norm `limit`.

        Return the norm of each player's gradients before clipping, by the player's name.
        """
        players: dict[str, list[Tensor]] = {}
        for group in self.groups:
            players.setdefault(group["player"], []).extend(group["params"])
        return {
            player: whole(nn.utils.clip_grad_norm_(parameters, limit)).to(parameters[0].device)
            for player, parameters in players.items()
        }

    def step(self, skipped: Tensor | None = None) -> None:
        """Take one step with the gradients stored in the parameters.

        If `skipped`, a float32 scalar, is 1, then weights, moments and step counts do not change.
        If `skipped` is on a GPU, the CPU does not wait for its value.
        """
        if skipped is not None and skipped.device.type == "cpu":
            if skipped:
                return
            skipped = None
        for optimizer in self._all:
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimisers as tensors named `PARAMETER/QUANTITY`."""
        return {
            f"{name}/{quantity}": value
            for name, parameter in self._parameters.items()
            if parameter in self._owners
            for quantity, value in self._owners[parameter].state.get(parameter, {}).items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned.

        Raises KeyError if a name in `tensors` is not that of a parameter of the model.
        """
        for key, tensor in tensors.items():
            name, _, quantity = key.rpartition("/")
            parameter = self._parameters[name]
            if quantity == "step":  # only fused kernels need the step count on the device
                count = tensor.reshape(())
                value = count.to(parameter.device) if self._fused else count
            else:  # fused kernels require the memory format of the parameter
                value = torch.empty_like(parameter, dtype=tensor.dtype)
                value.copy_(placed_like(tensor, parameter))
            self._owners[parameter].state[parameter][quantity] = value
