"""`python -m benchmarks.training.speed [tiny|base|tokenizer]`: optimiser steps against a peer's.

Ours are whole steps of the training loop: losses, metrics, clipping, Muon, averaged weights. The
peers' are forward, backward, clipping and a fused AdamW. `tiny`, `base`: a world model against a
GPT-2 with as many parameters on as many tokens. `tokenizer`: the base preset's autoencoder at
256x512 against diffusers' VQModel with as many parameters, both trained for L1 only.
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
    tried,
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
    """A step of our training loop on one batch, again and again."""
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
    given: Tensor,
    settings: Settings,
) -> Work:
    """A usual step on one batch, as quick as torch alone makes it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = precision(settings)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(given.device, dtype):
            loss = loss_of(model, given)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def world_model_batch(shape: Shape, size: int) -> Batch:
    """Random windows, as `TokenWindows` makes them."""
    grid, lead = shape.grid, (size, shape.model.context_frames)
    return {
        "tokens": torch.randint(grid.codebook_size, (*lead, grid.rows, grid.cols)),
        "previous": torch.randint(grid.codebook_size, (size, grid.rows, grid.cols)),
        "has_previous": torch.ones(size, dtype=torch.bool),
        "actions": torch.randn(*lead, 2),
        "action_valid": torch.ones(*lead, 2, dtype=torch.bool),
    }


def world_model_step(shape: Shape, size: int, settings: Settings) -> Work:
    """A step of the world model's training, as its default objective asks for."""
    model = WorldModelObjective(InputNoiseConfig(), transformer(shape))
    return own_step(model, world_model_batch(shape, size), settings)


def _nearest_gpt2(shape: Shape, count: int) -> nn.Module:
    """The GPT-2 of the shape's width whose depth makes its parameters come nearest to `count`."""
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


def world_model(name: str, settings: Settings) -> list[Claim]:
    """Tokens a second of a step of the world model."""
    shape = shape_of(name, settings)
    size = _BATCHES[name] * (_LARGER_ON_CUDA if settings.device.type == "cuda" else 1)
    own, count = world_model_step(shape, size, settings), parameters(transformer(shape))
    peer = _nearest_gpt2(shape, count).to(settings.device)
    window = (size, shape.model.context_frames * shape.tokens)
    tokens = torch.randint(shape.grid.codebook_size, window, device=settings.device)
    theirs = peer_step(peer, gpt2_loss, tokens, settings)
    found = alternate({"own": own, "peer": theirs}, settings)
    what = f"{_step(settings)}, world model {shape}, {count / 1e6:.2f} M parameters"
    against = f"GPT-2, {peer.config.n_layer} layers, {parameters(peer) / 1e6:.2f} M"  # type: ignore[union-attr]
    details = _rates(found, own, theirs, tokens.numel(), tokens.numel(), "tokens", settings)
    figure = times_faster(found["peer"], found["own"])
    return [Claim(what=what, against=against, figure=figure, bar=1.2, details=details)]


def _step(settings: Settings) -> str:
    return f"training step in {name_of(precision(settings))}"


def _rates(
    found: dict[str, list[float]],
    own: Work,
    peer: Work,
    own_work: int,
    peer_work: int,
    unit: str,
    settings: Settings,
) -> tuple[str, ...]:
    """The rates of both, and how near they come to the machine's limit."""
    lines = []
    both = ("drivesim", "own", own, own_work), ("peer", "peer", peer, peer_work)
    for name, key, act, work in both:
        taken = float(np.median(found[key]))
        reached = limits(settings, precision(settings)).reached(taken, flops=flops_of(act))
        lines.append(f"{name}: {work / taken:.4g} {unit}/s, a step {taken:.3g} s, {reached}")
    return tuple(lines)


def _l1(model: nn.Module, images: Tensor) -> Tensor:
    return (vq_reconstruction(model, images) - images).abs().mean()


def tokenizer(settings: Settings) -> list[Claim]:
    """Frames a second of a step of the tokenizer, without LPIPS and discriminator on both sides."""
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

    # One after the other: there is one model, and its optimiser is large.
    times = {
        name: fastest({name: prepared(form)}, settings)[1][name] for name, form in layouts.items()
    }
    best = min(times, key=lambda name: times[name])
    theirs = prepared(layouts[best])
    found = alternate({"own": own, "peer": theirs}, settings)
    details = _rates(found, own, theirs, batch, peer_batch, "frames", settings)
    return [
        Claim(
            what=f"{_step(settings)}, tokenizer base {size.height}x{size.width}, L1 only, "
            f"{count / 1e6:.1f} M parameters, batch {batch}",
            against=f"VQModel f16, {peers / 1e6:.1f} M parameters, batch {peer_batch}",
            figure=times_faster(found["peer"], found["own"], work=peer_batch / batch),
            bar=3,
            details=(*details, f"VQModel: {tried(times)}"),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "tiny": partial(world_model, "tiny"),
    "base": partial(world_model, "base"),
    "tokenizer": tokenizer,
}


if __name__ == "__main__":
    run_command(__doc__, "training", BENCHMARKS, sys.argv[1:])
