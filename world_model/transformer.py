"""A causal transformer over the wavefront order of tokens, conditioned on speed and steering.

The idea is GAIA-1's (arXiv 2309.17080); the blocks are today's plain ones: RMSNorm before each
branch, QK-norm, grouped-query attention, axial rotary positions, squared ReLU, no biases.

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
    """The tokenizer's side of a world model."""

    rows: _Side
    """Token rows per frame."""
    cols: _Side
    """Token columns per frame."""
    levels: Levels
    """FSQ levels per code channel."""

    def __post_init__(self) -> None:
        require(self, "levels", self.codebook_size <= 65536, "of at most 65536 codes together")

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)


@config
class TransformerConfig:
    """Size and shape of the world model."""

    layers: Annotated[int, Field(ge=1, le=1024)] = 6
    """Number of blocks."""
    width: Count = 256
    """Channels of the residual stream."""
    heads: Count = 8
    """Query heads."""
    kv_heads: Count = 2
    """Key and value heads; each serves heads / kv_heads query heads."""
    mlp_ratio: Count = 4
    """Hidden width of the MLP, in multiples of `width`."""
    context_frames: Annotated[int, Field(ge=2, le=4096)] = 12
    """Frames that attention reaches, the one being predicted included."""
    lag: Natural = 2
    """Waves between a row and the next; cols + 1 is raster order, 0 draws whole columns."""
    dropout: ShareBelowOne = 0.0
    """Share of activations dropped after the embedding and in each residual branch."""
    actions: ActionEmbeddingConfig = field(default_factory=ActionEmbeddingConfig)
    """How speed and steering are embedded."""
    previous_reach: Annotated[int, Field(ge=0, le=2)] = 1
    """Rows and columns around the position a slot predicts from which it is given the previous
    frame's tokens; 0 is that position alone. Near a moving car's token the next one is found."""
    action_everywhere: bool = True
    """Add a projection of the frame's action to all of its slots, not only to the rows' starts."""

    def __post_init__(self) -> None:
        fits = self.width % (2 * self.heads) == 0
        require(self, "width", fits, f"an even multiple of heads={self.heads}")
        divides = self.heads % self.kv_heads == 0
        require(self, "kv_heads", divides, f"a divisor of heads={self.heads}")


class Past(Protocol):
    """The keys and values of earlier passes: see `RingCache`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep keys and values too; return what their slots see of all of them, [B, n, D]."""
        ...


def code_digits(levels: Sequence[int]) -> Tensor:
    """Return the digits of every FSQ index, int64 [K, len(levels)], the first digit fastest."""
    base = torch.tensor([math.prod(levels[:place]) for place in range(len(levels))])
    return torch.arange(math.prod(levels))[:, None] // base % torch.tensor(levels)


class CodeEmbedding(nn.Module):
    """A vector per code: its own row of a table plus one row for each of its FSQ digits.

    A code that is rare in a small training set still starts from what its neighbours, which
    differ in one digit, have learned. Used for inputs and for the output projection alike.
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
    """torch's; on a CPU the compiled one, which under autocast gives what matrix products take."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., D] by its root mean square, times a gain."""
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
        """Mix x [B, n, D] over the slots before: those of x, or those that `past` has kept."""
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
        # Squared ReLU (arXiv 2109.08668): as good as a gated unit, and one matrix fewer.
        out: Tensor = x + self.dropout(self.down(squared_relu(self.up(self.mlp_norm(x)))))
        return out


@dataclass(frozen=True, slots=True)
class Tables:
    """The composed embeddings: made once per training step, or once for all of inference."""

    token: Tensor
    """[K + 1, D]; the last row, for slots that take no token, is zero."""
    previous: Tensor
    """[K + 1, D], or D / 4 with neighbours; the last row stands for "no frame", or outside it."""
    place: Tensor
    """Row and column embeddings of the slots, [S, D]."""
    output: Tensor
    """The projection to logits, [K, D]."""


class Transformer(nn.Module):
    """Tokens and actions in, logits of the same frames' tokens out."""

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
        # A neighbourhood is told apart by a few channels per token, mixed into the full width.
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
        """Start from a residual stream that the branches leave alone, and uniform logits."""
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
        """Compose the embeddings."""
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
        """Return what slots know before the frame's own tokens, [B, T, S, D].

        `previous` [B, T, P] is the frame before each, K where there is none; `actions` and `valid`
        [B, T, A] are the action that leads to each.
        """
        # Slots that predict nothing take what stands for no token.
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
        """Run summed inputs x [B, n, D] through the blocks.

        Slots see those before them; with a `mask` bool [n, n] what it says, and with a `past` what
        that has kept, which x becomes part of.
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
        """Return the last hidden states [B, T, P, D] of the slots that predict each token.

        What it takes is as in `forward`.
        """
        frames, none = tokens.shape[1], self.grid.codebook_size
        first = torch.where(has_previous[:, None, None], previous, none)
        seen = rearrange(torch.cat([first[:, None], tokens], dim=1), "b t r c -> b t (r c)")
        padded = F.pad(seen[:, 1:], (0, 1), value=none)
        x = self.frame_base(tables, seen[:, :-1], actions, action_valid)
        x = x + F.embedding(padded[..., self.source], tables.token)
        rotary = self.rotary(torch.arange(frames, device=tokens.device))
        hidden = self.hidden(
            rearrange(x, "b t s d -> b (t s) d"), rotary, mask=self._window_mask(frames)
        )
        hidden = rearrange(hidden, "b (t s) d -> b t s d", t=frames)
        return hidden[:, :, self.slot_of_token]

    def _window_mask(self, frames: int) -> Tensor | None:
        """What slots [n, n] of a sequence longer than the window see: frame t those of t-W+1..t."""
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
        """Return the logits [B, T, rows, cols, K] of every token given all before it.

        `tokens` int64 [B, T, rows, cols]; `previous` int64 [B, rows, cols], the frame before the
        window where `has_previous` [B]; `actions` [B, T, 2] (m/s, rad) and `action_valid`
        [B, T, 2]: the action that leads to each frame.
        """
        tables = self.tables()
        hidden = self.window_hidden(tables, tokens, previous, has_previous, actions, action_valid)
        logits = F.linear(hidden, tables.output)
        return rearrange(logits, "b t (r c) k -> b t r c k", r=self.grid.rows)
