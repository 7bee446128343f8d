"""`python -m benchmarks.rollouts.speed [tiny|base]`: tokens against GPT-2 and slot by slot.

A frame at a full window: W - 1 frames behind it. GPT-2 has the same depth, width, codes and window
and its own cache; it is only asked for tokens that still fit its window, so it never has to encode
a window anew, as it would from then on. "Slot by slot" is our own model with the same weights and
kernels in raster order (lag = cols + 1). The bar is against GPT-2 as transformers runs it on a CPU;
where torch can compile it, which takes half a minute, that is a comparison of its own.
"""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.measuring.machine import limits, precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Settings,
    Work,
    alternate,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import Gpt2Decoder, fastest, gpt2, gpt2_decoders, tried
from benchmarks.measuring.shapes import Shape, shape_of, world_model
from driving_sim.engine.precision import name_of
from driving_sim.world_model.sampling.draw_waves import FrameSample
from driving_sim.world_model.world_model import WorldModel

_MANY = 100_000
_PEER_TOKENS = {"tiny": 128, "base": 64}
"""The peer's time is that of at most so many tokens, in the middle of a frame."""
_FRAMES = {"tiny": 4, "base": 1}
"""Frames of ours that are timed together."""
_BARS = {"tiny": (10, 3), "base": (15, 5)}
"""Against GPT-2, and against slot by slot."""


def endless(world: WorldModel, *, context: int, samples: int = 1) -> Iterator[FrameSample]:
    """Frame after frame of a rollout that goes on from random frames."""
    grid = world.transformer.grid
    generator = torch.Generator().manual_seed(0)
    shape = (context, grid.rows, grid.cols)
    tokens = torch.randint(grid.codebook_size, shape, generator=generator)
    prefix = world.encode_prefix(tokens, np.full((context - 1, 2), (8.0, 0.1)))
    return world.generate(prefix, np.full((_MANY, 2), (8.0, 0.1), np.float32), samples=samples)


def pass_flops(world: WorldModel) -> float:
    """Operations of a frame's passes over a full ring: matrix products and attention."""
    model, config = world.transformer, world.transformer.config
    maps = (each for each in model.blocks.modules() if isinstance(each, nn.Linear))
    linear = sum(each.weight.numel() for each in maps)
    slots, width = model.order.slots, config.width
    seen = (config.context_frames - 0.5) * slots
    attention = 4 * config.layers * width * seen
    return slots * (2 * linear + attention) + 2 * model.order.tokens * width * (
        model.grid.codebook_size
    )


def pass_bytes(world: WorldModel) -> float:
    """Bytes that a frame's passes read: weights and keys and values, once in each pass."""
    model, config = world.transformer, world.transformer.config
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    weights += model.grid.codebook_size * config.width
    keys = config.layers * config.kv_heads * config.width // config.heads
    kept = 2 * keys * config.context_frames * model.order.slots
    return len(model.order.waves) * (weights + kept) * world.dtype.itemsize


def _peers(shape: Shape, settings: Settings, count: int) -> tuple[dict[str, Gpt2Decoder], str]:
    """GPT-2 in its fastest form, and compiled in its fastest; what all take for `count` tokens."""
    model, positions = shape.model, shape.model.context_frames * shape.tokens
    decoders = gpt2_decoders(
        lambda: gpt2(
            layers=model.layers,
            width=model.width,
            heads=model.heads,
            codes=shape.grid.codebook_size,
            positions=positions,
        ),
        positions=positions,
        context=positions - (shape.tokens + count) // 2,
        codes=shape.grid.codebook_size,
        settings=settings,
    )
    draws = {name: partial(each.draw, count) for name, each in decoders.items()}
    times = fastest(draws, settings)[1]
    kinds = {name: "compiled" if each.compiled else "peer" for name, each in decoders.items()}
    best: dict[str, str] = {}
    for name in sorted(times, key=lambda name: times[name]):
        best.setdefault(kinds[name], name)
    chosen = " and ".join(best.values())
    forms = f"GPT-2: {chosen}; for {count} tokens: {tried(times)}"
    return {kind: decoders[name] for kind, name in best.items()}, forms


def measure(name: str, settings: Settings) -> list[Claim]:
    """The claims of a shape."""
    shape = shape_of(name, settings)
    count, frames = min(shape.tokens, _PEER_TOKENS[name]), _FRAMES[name]
    peers, forms = _peers(shape, settings, count)
    world = world_model(shape, settings)
    raster = world_model(shape, settings, lag=shape.frames.cols + 1)
    context = shape.model.context_frames
    own_frames = endless(world, context=context)
    raster_frames = endless(raster, context=context)
    works: dict[str, Work] = {
        "own": lambda: [next(own_frames) for _ in range(frames)],
        **{kind: partial(each.draw, count) for kind, each in peers.items()},
        "raster": lambda: next(raster_frames),
    }
    if world.dtype is not torch.float32:
        exact_frames = endless(world_model(shape, settings, precision="fp32"), context=context)
        works["fp32"] = lambda: [next(exact_frames) for _ in range(frames)]
    found = alternate(works, settings)
    share = count / shape.tokens
    both = found["own"], found.get("fp32", found["own"])
    own, exact = (float(np.median(times)) / frames for times in both)
    slow = float(np.median(found["raster"]))
    theirs = float(np.median(found["peer"])) / share
    reached = limits(settings, precision(settings)).reached(
        own, flops=pass_flops(world), read=pass_bytes(world)
    )
    what = f"rollout, tokens only, {shape}, {name_of(world.dtype)}"
    passes = len(world.transformer.order.waves)
    rates = (
        f"drivesim {1 / own:.3g} frames/s ({1e3 * own / passes:.2f} ms a pass, {passes} passes), "
        f"in fp32 {1 / exact:.3g}, GPT-2 {1 / theirs:.3g}, "
        f"slot by slot {1 / slow:.3g}"
    )
    claims = [
        Claim(
            what=what,
            against="GPT-2 of the same depth, width and window, with its cache",
            figure=times_faster(found["peer"], found["own"], work=share / frames),
            bar=_BARS[name][0],
            details=(rates, forms, reached),
        ),
        Claim(
            what=what,
            against="the same weights slot by slot",
            figure=times_faster(found["raster"], found["own"], work=1 / frames),
            bar=_BARS[name][1],
        ),
    ]
    if "compiled" in found:
        compiled = times_faster(found["compiled"], found["own"], work=share / frames)
        against = "that GPT-2 with its preallocated cache, compiled by torch"
        claims.append(Claim(what=what, against=against, figure=compiled))
    return claims


BENCHMARKS: dict[str, Benchmark] = {
    "tiny": lambda settings: measure("tiny", settings),
    "base": lambda settings: measure("base", settings),
}


if __name__ == "__main__":
    run_command(__doc__, "rollout", BENCHMARKS, sys.argv[1:])
