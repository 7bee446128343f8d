"""A causal transformer over the wavefront order of tokens, conditioned on speed and steering.

The idea is GAIA-1's (arXiv 2309.17080). The blocks are standard ones: RMSNorm before each branch,
QK-norm, grouped-query attention, axial rotary positions, squared ReLU, no biases.

Axes: B batch, T frames, P = rows * cols tokens per frame, S = rows * (cols + 1) slots per frame,
N = T * S, D width, H query heads, G key heads, E channels of a head, K codes, A = 2 channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from driving_sim.engine.config import Count, Natural, ShareBelowOne, config, require
from driving_sim.tokenizer.fsq import Levels
from driving_sim.world_model.actions import (
    ActionEmbedding,
    ActionEmbeddingConfig,
    ActionStatistics,
)
from driving_sim.world_model.kernels.library import EPSILON
from driving_sim.world_model.kernels.operators import (
    causal_attention,
    rms_norm,
    split_heads,
    squared_relu,
)
from driving_sim.world_model.order import SlotOrder
from driving_sim.world_model.rotary import AxialRotary

_Side = Annotated[int, Field(ge=1, le=1024)]  # in tokens


@config
class TokenGrid:
    """The grid of a frame's tokens, and their codebook."""

    rows: _Side
    """Token rows per frame."""
    cols: _Side
    """Token columns per frame."""
    levels: Levels
    """Number of FSQ levels of each code channel."""

    def __post_init__(self) -> None:
        require(self, "levels", self.codebook_size <= 65536, "at most 65536 codes in total")

    @property
    def codebook_size(self) -> int:
        """Number of codes in the codebook."""
        return math.prod(self.levels)


@config
class TransformerConfig:
    """Size and shape of the world model."""

    layers: Annotated[int, Field(ge=1, le=1024)] = 6
    """Number of blocks."""
    width: Count = 256
    """Number of channels of the residual stream."""
    heads: Count = 8
    """Number of query heads."""
    kv_heads: Count = 2
    """Number of key and value heads; each serves heads / kv_heads query heads."""
    mlp_ratio: Count = 4
    """Hidden width of the MLP, in multiples of `width`."""
    context_frames: Annotated[int, Field(ge=2, le=4096)] = 12
    """Number of frames that attention reaches, including the one being predicted."""
    lag: Natural = 2
    """Number of waves by which each row lags behind the row above it.

    cols + 1 is raster order; 0 draws whole columns at once.
    """
    dropout: ShareBelowOne = 0.0
    """Share of activations that dropout zeroes after the embedding and in each residual branch."""
    actions: ActionEmbeddingConfig = field(default_factory=ActionEmbeddingConfig)
    """How speed and steering are embedded."""
    previous_reach: Annotated[int, Field(ge=0, le=2)] = 1
    """Reach, in rows and columns, of the previous frame's tokens that a slot gets as input.

    They surround the position that the slot predicts; 0 is that position alone. A larger reach
    helps to predict things that move.
    """
    action_everywhere: bool = True
    """Whether a frame's action is also added to all of its slots, not only to the rows' starts."""

    def __post_init__(self) -> None:
        fits = self.width % (2 * self.heads) == 0
        require(self, "width", fits, f"an even multiple of heads={self.heads}")
        divides = self.heads % self.kv_heads == 0
        require(self, "kv_heads", divides, f"a divisor of heads={self.heads}")


class Past(Protocol):
    """The keys and values of earlier passes, which slots can attend to; see `RingCache`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a pass's keys and values; return its slots' attention over all, [B, n, D]."""
        ...


def code_digits(levels: Sequence[int]) -> Tensor:
    """Return the FSQ digits of all codes, int64 [K, len(levels)].

    The first digit changes fastest from code to code.
    """
    base = torch.tensor([math.prod(levels[:place]) for place in range(len(levels))])
    return torch.arange(math.prod(levels))[:, None] // base % torch.tensor(levels)


class CodeEmbedding(nn.Module):
    """A vector for each code: its own row of a table plus one row for each of its FSQ digits.

    A code that is rare in the training data thus shares what codes with the same digits have
    learned. Both the inputs and the output projection use this embedding.
    """

    rows: Tensor

    def __init__(self, levels: Sequence[int], width: int) -> None:
        super().__init__()
        digits = code_digits(levels)
        offsets = torch.tensor([sum(levels[:place]) for place in range(len(levels))])
        self.codes = nn.Parameter(torch.randn(len(digits), width) * 0.02)
        self.digits = nn.Parameter(torch.randn(sum(levels), width) * 0.02)
        self.register_buffer("rows", digits + offsets, persistent=False)

    def table(self) -> Tensor:
        """Return the vectors of all codes, [K, D]."""
        return self.codes + self.digits[self.rows].sum(1)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed by `rms_norm`, which uses a compiled kernel on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., D] divided by its root mean square and multiplied by the gain."""
        return rms_norm(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm and rotary positions."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.heads
        channels = config.width // config.heads
        features = (config.heads + 2 * config.kv_heads) * channels
        self.qkv = nn.Linear(config.width, features, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(channels, eps=EPSILON)
        self.k_norm = nn.RMSNorm(channels, eps=EPSILON)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: Past | None,
    ) -> Tensor:
        """Mix x [B, n, D] by attention; each slot sees itself and earlier slots.

        A `mask` bool [n, n] says instead what each slot sees, and a `past` adds earlier passes.
        """
        projected = self.qkv(x), self.q_norm.weight, self.k_norm.weight, rotary
        if past is None:
            mixed = causal_attention(*projected, heads=self.heads, mask=mask)
        else:
            mixed = past.attend(self.layer, *split_heads(*projected, heads=self.heads))
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """Attention and an MLP, each on a normalised residual branch."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: Past | None,
    ) -> Tensor:
        """Return x [B, n, D] after both branches."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, past))
        # Squared ReLU (arXiv 2109.08668) is as good as a gated unit and needs one matrix fewer.
        out: Tensor = x + self.dropout(self.down(squared_relu(self.up(self.mlp_norm(x)))))
        return out


@dataclass(frozen=True, slots=True)
class Tables:
    """The composed embedding tables, computed once per training step, or once for inference."""

    token: Tensor
    """[K + 1, D]; the last row is zero, for slots that take no token."""
    previous: Tensor
    """[K + 1, D], or [K + 1, D / 4] with neighbours; the last row stands for a missing token."""
    place: Tensor
    """The sum of the row and column embeddings of each slot, [S, D]."""
    output: Tensor
    """The projection to logits, [K, D]."""


class Transformer(nn.Module):
    """The model: it takes the tokens and actions of frames and returns their tokens' logits."""

    row: Tensor
    col: Tensor
    source: Tensor
    target: Tensor
    slot_of_token: Tensor
    neighbours: Tensor

    def __init__(
        self, config: TransformerConfig, grid: TokenGrid, statistics: ActionStatistics
    ) -> None:
        super().__init__()
        self.config, self.grid, self.statistics = config, grid, statistics
        self.order = SlotOrder(rows=grid.rows, cols=grid.cols, lag=config.lag)
        for name in ("row", "col", "source", "target", "slot_of_token"):
            self.register_buffer(name, getattr(self.order, name), persistent=False)
        self.token = CodeEmbedding(grid.levels, config.width)
        neighbours = self.order.neighbours(config.previous_reach)
        self.register_buffer("neighbours", neighbours, persistent=False)
        # Each token of a neighbourhood gets few channels; `gather` maps them to the full width.
        narrow = config.width // 4 if config.previous_reach else config.width
        self.previous = CodeEmbedding(grid.levels, narrow)
        self.no_previous = nn.Parameter(torch.zeros(narrow))
        if config.previous_reach:
            self.gather = nn.Linear(narrow * neighbours.shape[1], config.width, bias=False)
        self.row_place = nn.Parameter(torch.randn(grid.rows, config.width) * 0.02)
        self.col_place = nn.Parameter(torch.randn(grid.cols + 1, config.width) * 0.02)
        self.action = ActionEmbedding(config.actions, config.width, statistics)
        if config.action_everywhere:
            self.spread = nn.Linear(config.width, config.width, bias=False)
        self.rotary = AxialRotary(self.row, self.col, config.width // config.heads)
        self.input_norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.output_norm = RMSNorm(config.width)
        self.output = CodeEmbedding(grid.levels, config.width)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise the weights so that residual branches output zero and all logits are equal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, Block):
                nn.init.zeros_(module.down.weight)
                nn.init.zeros_(module.attention.out.weight)
        if self.config.previous_reach:
            nn.init.normal_(self.gather.weight, std=0.5 * self.gather.in_features**-0.5)
        nn.init.normal_(self.action.out.weight, std=0.02 * self.action.out.in_features**-0.5)
        nn.init.zeros_(self.output.codes)
        nn.init.zeros_(self.output.digits)

    def tables(self) -> Tables:
        """Compute the embedding tables from their parameters."""
        token, none = self.token.table(), self.no_previous[None]
        return Tables(
            token=torch.cat([token, torch.zeros_like(token[:1])]),
            previous=torch.cat([self.previous.table(), none]),
            place=self.row_place[self.row] + self.col_place[self.col],
            output=self.output.table(),
        )

    def frame_base(
        self, tables: Tables, previous: Tensor, actions: Tensor, valid: Tensor
    ) -> Tensor:
        """Return the slots' inputs [B, T, S, D] without the frames' own tokens.

        `previous` [B, T, P] are the tokens of the frame before each frame, or K if there is none.
        `actions` [B, T, A] lead to each frame; `valid` [B, T, A] says which are known.
        """
        # Neighbours outside the frame have index P, so append K, which stands for a missing token.
        padded = F.pad(previous, (0, 1), value=self.grid.codebook_size)
        near = F.embedding(padded[..., self.neighbours], tables.previous)
        base: Tensor = rearrange(near, "b t s m d -> b t s (m d)")
        if self.config.previous_reach:
            base = self.gather(base)
        base = base + tables.place
        action_BT1D: Tensor = self.action(actions, valid).unsqueeze(-2)
        base = base + action_BT1D * (self.col == 0).to(base.dtype)[:, None]
        if self.config.action_everywhere:
            base = base + self.spread(action_BT1D)
        return base

    def hidden(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Run the summed inputs x [B, n, D] through the blocks and the output norm.

        Each slot sees itself and the slots before it, unless a `mask` bool [n, n] says what it
        sees. A `past` stores the keys and values of x, and slots see what it has stored.
        """
        x = self.dropout(self.input_norm(x))
        for block in self.blocks:
            x = block(x, rotary, mask, past)
        normed: Tensor = self.output_norm(x)
        return normed

    def window_hidden(
        self,
        tables: Tables,
        tokens: Tensor,
        previous: Tensor,
        has_previous: Tensor,
        actions: Tensor,
        action_valid: Tensor,
    ) -> Tensor:
        """Return the last hidden states [B, T, P, D], from which the logits of tokens follow.

        The arguments after `tables` are those of `forward`.
        """
        frames, none = tokens.shape[1], self.grid.codebook_size
        first = torch.where(has_previous[:, None, None], previous, none)
        all_frames = rearrange(torch.cat([first[:, None], tokens], dim=1), "b t r c -> b t (r c)")
        padded = F.pad(all_frames[:, 1:], (0, 1), value=none)
        x = self.frame_base(tables, all_frames[:, :-1], actions, action_valid)
        x = x + F.embedding(padded[..., self.source], tables.token)
        rotary = self.rotary(torch.arange(frames, device=tokens.device))
        hidden = self.hidden(
            rearrange(x, "b t s d -> b (t s) d"), rotary, mask=self._window_mask(frames)
        )
        hidden = rearrange(hidden, "b (t s) d -> b t s d", t=frames)
        return hidden[:, :, self.slot_of_token]

    def _window_mask(self, frames: int) -> Tensor | None:
        """Return a mask [n, n] in which frame t sees t-W+1..t, or None if all frames fit."""
        if frames <= self.config.context_frames:
            return None
        frame = torch.arange(frames, device=self.source.device).repeat_interleave(self.order.slots)
        near = frame[:, None] - frame < self.config.context_frames
        return near.tril()

    def forward(
        self,
        tokens: Tensor,
        previous: Tensor,
        has_previous: Tensor,
        actions: Tensor,
        action_valid: Tensor,
    ) -> Tensor:
        """Return the logits [B, T, rows, cols, K] of every token, given all tokens before it.

        `tokens` are int64 [B, T, rows, cols]. `previous` int64 [B, rows, cols] is the frame before
        the window, and is ignored unless `has_previous` [B]. `actions` [B, T, 2] (m/s, rad) lead to
        each frame, and `action_valid` [B, T, 2] says which are known.
        """
        tables = self.tables()
        hidden = self.window_hidden(tables, tokens, previous, has_previous, actions, action_valid)
        logits = F.linear(hidden, tables.output)
        return rearrange(logits, "b t (r c) k -> b t r c k", r=self.grid.rows)
