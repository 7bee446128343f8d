"""Prepare a model for several ranks, gradient checkpointing and compilation."""

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
"""Minimum number of parameters of a large model. Its backward pass on a CPU may take seconds, so
the model gets hooks that let Python handle signals during the pass."""


def parallel(
    model: Trainable, config: TrainingConfig, ranks: Ranks, device: torch.device
) -> nn.Module:
    """Apply the settings for ranks, gradient checkpointing and compilation to `model`.

    Return the module to call for a forward pass, which is `model` or a wrapper around it.
    Raises `DriveSimError` if this machine does not support a setting.
    """
    blocks = list(model.blocks())
    if config.gradient_checkpointing:
        for block in blocks:
            # Use a partial, not a lambda. A deep copy of the model also copies the partial, so the
            # copied model runs its own weights.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        _require_compiler(device)
        # All kinds of blocks share one counter of recompilations. By default, torch stops compiling
        # when the counter reaches 8.
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
                "`shard` splits a model over several ranks, but there is only one: start the run "
                "with torchrun --nproc-per-node=N, or leave out `shard`"
            )
        shard(model, blocks, device)
    elif ranks.size > 1:
        # The generator and the discriminator of a GAN start to train at different steps, so some
        # parameters may get no gradient.
        return DistributedDataParallel(
            model,
            find_unused_parameters=len(model.players()) > 1,
            broadcast_buffers=False,  # the buffers are already equal on all ranks
        )
    return model


def _let_signals_in(_module: nn.Module, _inputs: object, output: object) -> None:
    """Add a Python hook to the backward pass. Without hooks it runs in C++ and blocks signals."""
    if isinstance(output, Tensor) and output.grad_fn is not None:
        output.register_hook(_pass)  # type: ignore[no-untyped-call]


def _pass(_gradient: Tensor) -> None:
    """Do nothing. Python handles pending signals when it calls this function."""


def _require_compiler(device: torch.device) -> None:
    # For GPUs, Triton needs a C compiler to build its launchers.
    variable, *names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")
    names += ["cl", os.environ.get(variable, "")]
    if not any(shutil.which(name) for name in names if name):
        raise DriveSimError(
            f"training.compile needs a compiler ({names[0]} or {names[1]}), but there is none: "
            "install one, or turn training.compile off"
        )
