"""`python -m benchmarks.rollouts.speed [tiny|base]`: the speed of sampling tokens, against GPT-2.

Times frames that are sampled when the model's window is full. GPT-2 has the same depth, width,
number of codes and window, and uses its own cache. It draws only as many tokens as fit into its
window, so it never has to encode a window again.

Three others are timed for comparison. The first is GPT-2 as transformers runs it on a CPU; only
this comparison has a bar (a goal). The second is GPT-2 compiled by torch, which takes half a
minute. It is left out if torch cannot compile GPT-2. The third, "slot by slot", is drivesim itself
with the same weights and kernels, but in raster order (lag = cols + 1).
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
    Figure,
    Settings,
    Work,
    alternate,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import Gpt2Decoder, fastest, gpt2, gpt2_decoders, times_text
from benchmarks.measuring.shapes import Shape, shape_of, world_model
from driving_sim.engine.precision import name_of
from driving_sim.world_model.sampling.draw_waves import FrameSample
from driving_sim.world_model.world_model import WorldModel

_MANY = 100_000
_PEER_TOKENS = {"tiny": 128, "base": 64}
"""Maximum number of tokens that GPT-2 draws per timing. They lie in the middle of a frame."""
_FRAMES = {"tiny": 4, "base": 1}
"""Number of frames that drivesim samples per timing."""
_BARS = {"tiny": 10, "base": 15}
"""How many times as fast as GPT-2 drivesim should be."""


def endless(world: WorldModel, *, context: int, samples: int = 1) -> Iterator[FrameSample]:
    """Yield the frames of a rollout that continues random frames and practically never ends."""
    grid = world.transformer.grid
    generator = torch.Generator().manual_seed(0)
    shape = (context, grid.rows, grid.cols)
    tokens = torch.randint(grid.codebook_size, shape, generator=generator)
    prefix = world.encode_prefix(tokens, np.full((context - 1, 2), (8.0, 0.1)))
    return world.generate(prefix, np.full((_MANY, 2), (8.0, 0.1), np.float32), samples=samples)


def pass_flops(world: WorldModel) -> float:
    """Return the number of operations that sampling one frame takes if the cache is full.

    Counts only matrix products and attention.
    """
    model, config = world.transformer, world.transformer.config
    layers = (module for module in model.blocks.modules() if isinstance(module, nn.Linear))
    linear = sum(layer.weight.numel() for layer in layers)
    slots, width = model.order.slots, config.width
    seen = (config.context_frames - 0.5) * slots
    attention = 4 * config.layers * width * seen
    return slots * (2 * linear + attention) + 2 * model.order.tokens * width * (
        model.grid.codebook_size
    )


def pass_bytes(world: WorldModel) -> float:
    """Return the number of bytes that sampling one frame reads from memory.

    A frame is sampled in waves, which are groups of tokens. The network runs once for each wave,
    and each time reads all weights, keys and values.
    """
    model, config = world.transformer, world.transformer.config
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    weights += model.grid.codebook_size * config.width
    keys = config.layers * config.kv_heads * config.width // config.heads
    kept = 2 * keys * config.context_frames * model.order.slots
    return len(model.order.waves) * (weights + kept) * world.dtype.itemsize


def _peers(shape: Shape, settings: Settings, count: int) -> tuple[dict[str, Gpt2Decoder], str]:
    """Return the fastest plain GPT-2 and, if torch can compile it, the fastest compiled GPT-2.

    The keys are "peer" and "compiled". Also returns a line with the times of all forms.
    """
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
    draws = {name: partial(decoder.draw, count) for name, decoder in decoders.items()}
    times = fastest(draws, settings)[1]
    kinds = {name: "compiled" if decoder.compiled else "peer" for name, decoder in decoders.items()}
    best: dict[str, str] = {}
    for name in sorted(times, key=lambda name: times[name]):
        best.setdefault(kinds[name], name)
    chosen = " and ".join(best.values())
    forms = f"GPT-2: {chosen}; times for {count} tokens: {times_text(times)}"
    return {kind: decoders[name] for kind, name in best.items()}, forms


def measure(name: str, settings: Settings) -> list[Claim]:
    """Time rollouts of the shape `name` and GPT-2, and return the claims."""
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
        **{kind: partial(decoder.draw, count) for kind, decoder in peers.items()},
        "raster": lambda: next(raster_frames),
    }
    if world.dtype is not torch.float32:
        exact_frames = endless(world_model(shape, settings, precision="fp32"), context=context)
        works["fp32"] = lambda: [next(exact_frames) for _ in range(frames)]
    times = alternate(works, settings)
    share = count / shape.tokens
    own, exact = (
        float(np.median(times.get(kind, times["own"]))) / frames for kind in ("own", "fp32")
    )
    used = limits(settings, precision(settings)).share(
        own, flops=pass_flops(world), read=pass_bytes(world)
    )
    what = f"rollout as tokens, {name}-sized"
    passes = len(world.transformer.order.waves)
    details = (
        f"{shape}, {name_of(world.dtype)}: {passes} passes a frame, {1e3 * own / passes:.2f} ms a "
        f"pass; in fp32 {rounded(1 / exact)} frames/s",
        forms,
    )
    against = {"peer": "GPT-2", "compiled": "GPT-2, compiled"}
    return [
        *(
            Claim(
                what=what,
                against=against[kind],
                figure=times_faster(times[kind], times["own"], work=share / frames),
                bar=_BARS[name] if kind == "peer" else None,
                own=f"{rounded(1 / own)} frames/s",
                peer=f"{rounded(share / float(np.median(times[kind])))} frames/s",
                limits=used if kind == "peer" else "",
                details=details if kind == "peer" else (),
            )
            for kind in sorted(peers, reverse=True)
        ),
        Claim(
            what=f"{what}, slot by slot",
            figure=Figure.of([1 / taken for taken in times["raster"]]),
            unit="frames/s",
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "tiny": lambda settings: measure("tiny", settings),
    "base": lambda settings: measure("base", settings),
}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.speed", BENCHMARKS, sys.argv[1:])
