"""Models of the sizes that the benchmarks measure; random weights do not change their speed."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from benchmarks.measuring.paired import Settings
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.presets import PRESETS as TOKENIZERS
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODELS
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from driving_sim.world_model.world_model import WorldModel

FPS = 10.0

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Size of a tokenizer and its world model."""

    name: str
    frames: AutoencoderConfig
    model: TransformerConfig

    @property
    def grid(self) -> TokenGrid:
        """Token grid of a frame, in the form that the world model needs."""
        frames = self.frames
        return TokenGrid(rows=frames.rows, cols=frames.cols, levels=frames.levels)

    @property
    def tokens(self) -> int:
        """Number of tokens in a frame."""
        return self.frames.rows * self.frames.cols

    def __str__(self) -> str:
        model, frames = self.model, self.frames
        return (
            f"{self.name}: {model.layers} layers, width {model.width}, "
            f"{frames.rows}x{frames.cols} tokens, {model.context_frames} frames of context"
        )


_SHAPES = {
    # Do not take this size from a preset: it must stay the same in all versions of drivesim.
    "tiny": Shape(
        name="tiny",
        frames=TOKENIZERS["tiny"].model,
        model=TransformerConfig(layers=8, width=256, heads=8, kv_heads=2, context_frames=16),
    ),
    "base": Shape(
        name="base",
        frames=TOKENIZERS["base"].model,
        model=replace(WORLD_MODELS["base"].model, dropout=0.0),
    ),
}
_TOY = Shape(
    name="toy",
    frames=AutoencoderConfig(
        height=32, width=64, widths=(16, 16, 64), blocks=(1, 1, 1), attention_blocks=1
    ),
    model=TransformerConfig(layers=2, width=32, heads=2, kv_heads=1, context_frames=3),
)


def shape_of(name: str, settings: Settings) -> Shape:
    """Return the shape called `name`, or the toy shape if the settings ask for it."""
    return _TOY if settings.toy else _SHAPES[name]


def tokenizer(shape: Shape, settings: Settings, precision: str = "auto") -> Tokenizer:
    """Return a frozen tokenizer with random weights."""
    torch.manual_seed(0)
    return Tokenizer(filled(Autoencoder(shape.frames)), settings.device, precision)


def transformer(shape: Shape) -> Transformer:
    """Return a world model's network with random weights and plausible action statistics."""
    torch.manual_seed(0)
    statistics = ActionStatistics(mean=(8.0, 0.0), std=(2.0, 0.1), steering_p95=0.2)
    return filled(Transformer(shape.model, shape.grid, statistics))


def world_model(
    shape: Shape, settings: Settings, *, precision: str = "auto", lag: int | None = None
) -> WorldModel:
    """Return a world model with random weights, which are the same for every precision and `lag`.

    If `lag` is None, the shape's own lag is used.
    """
    model = shape.model if lag is None else replace(shape.model, lag=lag)
    return WorldModel(
        transformer(replace(shape, model=model)),
        tokenizer(shape, settings, precision),
        fps=FPS,
        steering_kind="road_wheel",
        device=settings.device,
        precision=precision,
    )


@torch.no_grad()
def filled(module: Module) -> Module:
    """Replace the values of parameters that are all zero with noise.

    A trained model has no such parameters, because training changes them from the first step on.
    """
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module
