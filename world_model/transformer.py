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
    LARGEST_SCORE,
    causal_attention,
    rms_norm,
    split_heads,
    squared_relu,
)
from driving_sim.world_model.order import SlotOrder
from driving_sim.world_model.rotary import AxialRotary

_Side = Annotated[int, Field(ge=1, le=1024)]  # height or width of the grid, in tokens


@config
class TokenGrid:
    """The size of a frame's grid of tokens, and their codebook."""

    rows: _Side
    """Token rows per frame."""
    cols: _Side
    """Token columns per frame."""
    levels: Levels
    """Number of levels of each FSQ channel; their product is the number of codes."""

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
    """Number of key heads, and of value heads; the query heads are divided evenly among them."""
    mlp_ratio: Count = 4
    """Hidden width of the MLP, in multiples of `width`."""
    context_frames: Annotated[int, Field(ge=2, le=4096)] = 12
    """Number of frames that a token can attend to, including its own frame."""
    lag: Natural = 2
    """Number of waves by which each row lags behind the row above it.

    With cols + 1, tokens are drawn one by one in raster order. With 0, whole columns are drawn at
    once.
    """
    dropout: ShareBelowOne = 0.0
    """Share of activations that dropout zeroes after the embedding and in each residual branch."""
    actions: ActionEmbeddingConfig = field(default_factory=ActionEmbeddingConfig)
    """How speed and steering are embedded."""
    previous_reach: Annotated[int, Field(ge=0, le=2)] = 1
    """How far a slot sees in the previous frame, in rows and columns.

    A slot gets as input the previous frame's tokens up to this far from the position that it
    predicts. With 0, it gets only the token at that position. A larger reach helps to predict
    moving things.
    """
    action_everywhere: bool = True
    """Whether a frame's action is added to all of its slots, or only to the first slot of a row."""

    def __post_init__(self) -> None:
        fits = self.width % (2 * self.heads) == 0
        require(self, "width", fits, f"an even multiple of heads={self.heads}")
        divides = self.heads % self.kv_heads == 0
        require(self, "kv_heads", divides, f"a divisor of heads={self.heads}")


class Past(Protocol):
    """The keys and values of earlier passes, for slots to attend to. `RingCache` implements it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a pass's keys and values; return its attention to all that is stored, [B, n, D]."""
        ...


def code_digits(levels: Sequence[int]) -> Tensor:
    """Return the FSQ digits of all codes, int64 [K, len(levels)], least significant digit first."""
    base = torch.tensor([math.prod(levels[:place]) for place in range(len(levels))])
    return torch.arange(math.prod(levels))[:, None] // base % torch.tensor(levels)


class CodeEmbedding(nn.Module):
    """A vector for each code: the sum of its own row and of one row for each of its FSQ digits.

    Codes share the rows of their common digits, so even codes that are rare in the training data
    get good vectors. The input embeddings and the output projection both use such vectors.
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
    """torch's RMSNorm, but computed by `rms_norm`, which uses a compiled kernel on a CPU."""

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

    @torch.no_grad()
    def limit_gains(self) -> None:
        """Clip the gains of queries and keys, so that `is_bounded` holds even in bf16.

        Gains grow as training goes on.
        """
        largest = math.sqrt(0.97 * LARGEST_SCORE / math.sqrt(len(self.q_norm.weight)))
        for norm in (self.q_norm, self.k_norm):
            norm.weight.clamp_(-largest, largest)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: Past | None,
    ) -> Tensor:
        """Return the attention of the slots x [B, n, D] to themselves and to earlier slots.

        A `mask` bool [n, n], if given, replaces the causal mask: row i says which slots slot i
        sees. With a `past`, slots also see the slots of earlier passes.
        """
        projected = self.qkv(x), self.q_norm.weight, self.k_norm.weight, rotary
        if past is None:
            mixed = causal_attention(*projected, heads=self.heads, mask=mask)
        else:
            mixed = past.attend(self.layer, *split_heads(*projected, heads=self.heads))
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """Two residual branches, attention and an MLP, each with an RMSNorm of its input."""

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
        """Return x [B, n, D] plus the outputs of both branches."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, past))
        # Squared ReLU (arXiv 2109.08668) is as good as a gated unit and needs one matrix fewer.
        out: Tensor = x + self.dropout(self.down(squared_relu(self.up(self.mlp_norm(x)))))
        return out


@dataclass(frozen=True, slots=True)
class Tables:
    """The embedding tables. They are computed once per training step, or once for inference."""

    token: Tensor
    """Embedding of a slot's input token, [K + 1, D]. Row K, for slots without a token, is zero."""
    previous: Tensor
    """Embedding of a token of the previous frame; row K is the learned vector for no token.

    [K + 1, D], or [K + 1, D / 4] if `previous_reach` is above 0.
    """
    place: Tensor
    """The sum of the row and column embeddings of each slot, [S, D]."""
    output: Tensor
    """The projection to logits, [K, D]."""


class Transformer(nn.Module):
    """The world model's network, from the tokens and actions of frames to the tokens' logits."""

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
        # If a slot gets several tokens of the previous frame, embed each with few channels.
        # `gather` then maps all of them together to `width` channels.
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

    def limit_gains(self) -> None:
        """Clip the gains of all attention layers (see `Attention.limit_gains`)."""
        for block in self.blocks:
            if isinstance(block, Block):
                block.attention.limit_gains()

    def tables(self) -> Tables:
        """Compute the embedding tables from the parameters."""
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
        """Return the slots' inputs [B, T, S, D], except the embeddings of the frames' own tokens.

        `previous` [B, T, P] are the tokens of the frame before each frame, or K if there is no such
        frame. `actions` [B, T, A] lead to each frame; `valid` [B, T, A] says which are known.
        """
        # Neighbours outside the frame have index P, one past the last token. Append the code K,
        # which stands for no token, at that index.
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
        """Run the slots' summed inputs x [B, n, D] through the blocks and the output norm.

        Each slot sees itself and the slots before it. A `mask` bool [n, n], if given, replaces this
        rule: row i says which slots slot i sees. A `past` stores the keys and values of these
        slots, and the slots see everything that it has stored.
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
        """Return hidden states [B, T, P, D]; `tables.output` projects them to the tokens' logits.

        For the arguments after `tables`, see `forward`.
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
        """Return a causal mask [N, N] in which the slots of frame t see only frames t-W+1..t.

        W is `context_frames`. Returns None if there are at most W `frames`.
        """
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

        `tokens` are int64 [B, T, rows, cols]. `previous` int64 [B, rows, cols] are the tokens of
        the frame before the window. They are ignored if `has_previous` [B] is false. `actions`
        [B, T, 2] (m/s, rad) lead to each frame, and `action_valid` [B, T, 2] says which are known.
        """
        tables = self.tables()
        hidden = self.window_hidden(tables, tokens, previous, has_previous, actions, action_valid)
        logits = F.linear(hidden, tables.output)
        return rearrange(logits, "b t (r c) k -> b t r c k", r=self.grid.rows)
