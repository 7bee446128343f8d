"""How a model's passes are run: on several ranks, recomputed, compiled."""

import os
import shutil
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.ranks.sharding import shard
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.trainable import Trainable

LARGE = 20_000_000
"""Parameters from which on a backward pass on a CPU may take seconds, and lets signals in."""


def parallel(
    model: Trainable, config: TrainingConfig, ranks: Ranks, device: torch.device
) -> nn.Module:
    """What is to be called in place of `model`, whose blocks may change.

    Raises `DriveSimError` where an option cannot be had here.
    """
    blocks = list(model.blocks())
    if config.gradient_checkpointing:
        for block in blocks:
            # A partial, not a function, so that a deep copy runs its own weights.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        _require_compiler(device)
        # The kinds of blocks share what torch counts them by; beyond 8 it would interpret them.
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.compile()
    is_slow = device.type == "cpu" and sum(p.numel() for p in model.parameters()) >= LARGE
    if is_slow and ranks.size == 1 and not config.compile:
        for module in model.modules():
            if not [*module.children()]:
                module.register_forward_hook(_let_signals_in)
    if config.shard:
        if ranks.size == 1:
            raise DriveSimError(
                "`shard` spreads a model over several ranks, and this is the only one: start it "
                "with torchrun --nproc-per-node=N, or leave `shard` out"
            )
        shard(model, blocks, device)
    elif ranks.size > 1:
        # The players of an adversarial loss start apart: then not every parameter has a gradient.
        return DistributedDataParallel(
            model,
            find_unused_parameters=len(model.players()) > 1,
            broadcast_buffers=False,  # all ranks compute the same ones
        )
    return model


def _let_signals_in(_module: nn.Module, _inputs: object, output: object) -> None:
    """Have backward run a little Python: it is C++ else, in which Python answers no signals."""
    if isinstance(output, Tensor) and output.grad_fn is not None:
        output.register_hook(_pass)  # type: ignore[no-untyped-call]


def _pass(_gradient: Tensor) -> None:
    """Change nothing."""


def _require_compiler(device: torch.device) -> None:
    # On a GPU, Triton builds its launchers in C.
    variable, *names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")
    names += ["cl", os.environ.get(variable, "")]
    if not any(shutil.which(name) for name in names if name):
        raise DriveSimError(
            f"training.compile needs a compiler ({names[0]} or {names[1]}), and there is none: "
            "install one, or leave the option out"
        )
