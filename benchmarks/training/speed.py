"""`python -m benchmarks.training.speed [tiny|base|tokenizer]`: the speed of training steps.

drivesim's steps are those of its training loop, with losses, metrics, gradient clipping, Muon and
averaging of weights. A peer's step is a forward pass, a backward pass, gradient clipping and a
fused AdamW update. `tiny` and `base` compare a world model with a GPT-2 that has about as many
parameters, on as many tokens. `tokenizer` compares the base preset's autoencoder at 256x512 with a
VQModel from diffusers that has about as many parameters. Both train on L1 only.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring.machine import flops_of, limits, precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Settings,
    Work,
    alternate,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import (
    VQ_WIDTHS,
    fastest,
    gpt2,
    gpt2_loss,
    nearest,
    parameters,
    times_text,
    vq_model,
    vq_reconstruction,
)
from benchmarks.measuring.shapes import Shape, shape_of, transformer
from driving_sim.engine.precision import autocast, name_of
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.step import Stepper
from driving_sim.engine.training.trainable import Batch, Trainable
from driving_sim.tokenizer.objective import TokenizerObjective, TokenizerObjectiveConfig
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective

_BATCHES = {"tiny": 2, "base": 1, "tokenizer": 4}
_LARGER_ON_CUDA = 8


def own_step(model: Trainable, batch: Batch, settings: Settings) -> Work:
    """Return a function that does one step of drivesim's training loop, always on `batch`."""
    stepper = Stepper(model, TrainingConfig(steps=1_000_000), Ranks(), settings.device)
    stepper.dtype = precision(settings)

    def batches() -> Iterator[tuple[int, Batch]]:
        number = 0
        while True:
            yield number, dict(batch)
            number += 1

    source = batches()
    return lambda: stepper.step(source, 500, 0.1)


def peer_step(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    inputs: Tensor,
    settings: Settings,
) -> Work:
    """Return a function that does one plain torch step on `inputs`, with a fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = precision(settings)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(inputs.device, dtype):
            loss = loss_of(model, inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def world_model_batch(shape: Shape, size: int) -> Batch:
    """Return a batch of random windows in the format of `TokenWindows`."""
    grid, lead = shape.grid, (size, shape.model.context_frames)
    return {
        "tokens": torch.randint(grid.codebook_size, (*lead, grid.rows, grid.cols)),
        "previous": torch.randint(grid.codebook_size, (size, grid.rows, grid.cols)),
        "has_previous": torch.ones(size, dtype=torch.bool),
        "actions": torch.randn(*lead, 2),
        "action_valid": torch.ones(*lead, 2, dtype=torch.bool),
    }


def world_model_step(shape: Shape, size: int, settings: Settings) -> Work:
    """Return a function that does one step of the world model's training."""
    model = WorldModelObjective(InputNoiseConfig(), transformer(shape))
    return own_step(model, world_model_batch(shape, size), settings)


def _nearest_gpt2(shape: Shape, count: int) -> nn.Module:
    """Build a GPT-2 of the shape's width. Choose the depth that gives about `count` parameters."""
    model = shape.model

    def build(layers: int) -> nn.Module:
        return gpt2(
            layers=layers,
            width=model.width,
            heads=model.heads,
            codes=shape.grid.codebook_size,
            positions=model.context_frames * shape.tokens,
        )

    return nearest(build, range(1, model.layers + 3), count)


def _timed(
    steps: dict[str, Work], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Time training steps in turns.

    Returns for each step its seconds in all rounds, their median, and as text which share of the
    machine's limits the step reaches.
    """
    times = alternate(steps, settings)
    seconds = {name: float(np.median(taken)) for name, taken in times.items()}
    used = {
        name: limits(settings, precision(settings)).share(seconds[name], flops=flops_of(act))
        for name, act in steps.items()
    }
    return times, seconds, used


def world_model(name: str, settings: Settings) -> list[Claim]:
    """Compare the training speed of the world model with GPT-2's."""
    shape = shape_of(name, settings)
    size = _BATCHES[name] * (_LARGER_ON_CUDA if settings.device.type == "cuda" else 1)
    own, count = world_model_step(shape, size, settings), parameters(transformer(shape))
    peer = _nearest_gpt2(shape, count).to(settings.device)
    window = (size, shape.model.context_frames * shape.tokens)
    tokens = torch.randint(shape.grid.codebook_size, window, device=settings.device)
    theirs = peer_step(peer, gpt2_loss, tokens, settings)
    times, seconds, used = _timed({"own": own, "peer": theirs}, settings)
    return [
        Claim(
            what=f"training step, world model, {name}-sized",
            against="GPT-2",
            figure=times_faster(times["peer"], times["own"]),
            bar=1.2,
            own=f"{rounded(tokens.numel() / seconds['own'])} tokens/s",
            peer=f"{rounded(tokens.numel() / seconds['peer'])} tokens/s",
            limits=used["own"],
            details=(
                f"{shape}, {count / 1e6:.2f} M parameters, {name_of(precision(settings))}",
                f"GPT-2: {peer.config.n_layer} layers, {parameters(peer) / 1e6:.2f} M parameters, "  # type: ignore[union-attr]
                f"{used['peer']}",
            ),
        )
    ]


def _l1(model: nn.Module, images: Tensor) -> Tensor:
    return (vq_reconstruction(model, images) - images).abs().mean()


def tokenizer(settings: Settings) -> list[Claim]:
    """Compare the training speed of the tokenizer with VQModel's, both without LPIPS and GAN."""
    size = shape_of("base", settings).frames
    large = _LARGER_ON_CUDA if settings.device.type == "cuda" else 1
    batch, peer_batch = _BATCHES["tokenizer"] * large, large
    model = TokenizerObjective(size, TokenizerObjectiveConfig(lpips_weight=0.0, gan_weight=0.0))
    count = parameters(model)
    frames = torch.randint(256, (batch, size.height, size.width, 3), dtype=torch.uint8)
    own = own_step(model, {"frames": frames}, settings)
    peer = nearest(lambda width: vq_model(width=width, groups=8, channels=64), VQ_WIDTHS, count)
    peer.to(settings.device)
    peers = parameters(peer)
    images = torch.rand(peer_batch, 3, size.height, size.width, device=settings.device) * 2 - 1
    layouts = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}

    def prepared(layout: torch.memory_format) -> Work:
        peer.to(memory_format=layout)  # type: ignore[call-overload]
        return peer_step(peer, _l1, images.contiguous(memory_format=layout), settings)

    # Time the layouts one after the other, not in turns: they share one model, whose layout is
    # changed in between. A second model with its optimiser state would take much memory.
    tried = {
        name: fastest({name: prepared(form)}, settings)[1][name] for name, form in layouts.items()
    }
    best = min(tried, key=lambda name: tried[name])
    theirs = prepared(layouts[best])
    times, seconds, used = _timed({"own": own, "peer": theirs}, settings)
    return [
        Claim(
            what="training step, tokenizer, base-sized",
            against="VQModel",
            figure=times_faster(times["peer"], times["own"], work=peer_batch / batch),
            bar=3,
            own=f"{rounded(batch / seconds['own'])} frames/s",
            peer=f"{rounded(peer_batch / seconds['peer'])} frames/s",
            limits=used["own"],
            details=(
                f"{size.height}x{size.width}, L1 only, {count / 1e6:.1f} M parameters, "
                f"batches of {batch}, {name_of(precision(settings))}",
                f"VQModel: {peers / 1e6:.1f} M parameters, batches of {peer_batch}, "
                f"{used['peer']}; forms: {times_text(tried)}",
            ),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "tiny": partial(world_model, "tiny"),
    "base": partial(world_model, "base"),
    "tokenizer": tokenizer,
}


if __name__ == "__main__":
    run_command(__doc__, "training.speed", BENCHMARKS, sys.argv[1:])
