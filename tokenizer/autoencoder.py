"""The convolutional autoencoder around FSQ: stride 16, one code per 16x16 pixels.

A VQGAN (arXiv 2012.09841) spends most of its time in convolutions at full resolution. This encoder
replaces them with 4x4 patching, which is invertible and has no weights. Residual blocks follow at
strides 4, 8 and 16, and attention at stride 16 only. The decoder mirrors the encoder.

Axes: B batch, C channels, H W pixels, r c token rows and columns, D channels of a code,
N = r * c positions, h heads, d channels of a head.
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.config import Count, config, require
from driving_sim.tokenizer.fsq import FSQ, Levels

STRIDE = 16
_PATCH = 4
_MOST_PIXELS = 16384
GROUP_CHANNELS = 16
"""Number of channels that are normalised together as one group."""
# Maximum number of attention scores computed at once. In bf16, the scores take 4 MiB, and their
# softmax takes another 4 MiB.
_MOST_SCORES = 2**21


_Side = Annotated[int, Field(ge=STRIDE, le=_MOST_PIXELS, multiple_of=STRIDE)]
_Blocks = Annotated[int, Field(ge=0, le=1024)]
_Width = Annotated[Count, Field(multiple_of=GROUP_CHANNELS)]


@config
class AutoencoderConfig:
    """Picture size, codebook and network size of an autoencoder."""

    height: _Side = 256
    """Picture height in pixels, a multiple of 16."""
    width: _Side = 512
    """Picture width in pixels, a multiple of 16."""
    levels: Levels = (8, 5, 5, 5)
    """Number of FSQ levels of each code channel; their product is the codebook size."""
    patching: Literal["haar", "unshuffle"] = "haar"
    """Transform of 4x4 patches: two-level Haar wavelets, or none (`unshuffle` keeps the pixels)."""
    widths: tuple[_Width, _Width, _Width] = (64, 128, 256)
    """Numbers of channels at strides 4, 8 and 16, all multiples of 16."""
    blocks: tuple[_Blocks, _Blocks, _Blocks] = (1, 2, 2)
    """Numbers of residual blocks at strides 4, 8 and 16, in the encoder and in the decoder."""
    attention_blocks: _Blocks = 2
    """Number of transformer blocks at stride 16, in the encoder and in the decoder."""
    head_size: Count = 64
    """Channels per attention head; must divide the number of channels at stride 16."""

    def __post_init__(self) -> None:
        codes = math.prod(self.levels)
        require(self, "levels", codes <= 65536, "at most 65536 codes, to fit uint16 tokens")
        divides = self.widths[2] % self.head_size == 0
        require(self, "head_size", divides, f"a divisor of widths[2]={self.widths[2]}")

    @property
    def frame_size(self) -> FrameSize:
        """Height and width of the pictures."""
        return FrameSize(height=self.height, width=self.width)

    @property
    def rows(self) -> int:
        """Number of token rows per frame."""
        return self.height // STRIDE

    @property
    def cols(self) -> int:
        """Number of token columns per frame."""
        return self.width // STRIDE


class Patching(nn.Module):
    """Moves each block of 4x4 pixels into channels, and applies an orthonormal transform."""

    basis: Tensor

    def __init__(self, kind: Literal["haar", "unshuffle"]) -> None:
        super().__init__()
        basis = torch.eye(_PATCH**2) if kind == "unshuffle" else _haar_basis()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the coefficients [B, 16 C, H/4, W/4] of pictures [B, C, H, W]."""
        blocks = rearrange(x, "b c (h p) (w q) -> b h w c (p q)", p=_PATCH, q=_PATCH)
        return rearrange(self._multiply(blocks, self.basis.T), "b h w c k -> b (c k) h w")

    def inverse(self, y: Tensor) -> Tensor:
        """Convert coefficients [B, 16 C, H, W] back to pictures [B, C, 4 H, 4 W]."""
        coefficients = rearrange(y, "b (c k) h w -> b h w c k", k=_PATCH**2)
        blocks = self._multiply(coefficients, self.basis)
        return rearrange(blocks, "b h w c (p q) -> b c (h p) (w q)", p=_PATCH, q=_PATCH)

    @staticmethod
    def _multiply(x: Tensor, basis: Tensor) -> Tensor:
        # Compute in float32 even under autocast, because bfloat16 cannot represent 256 grey levels.
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ basis


def _haar_basis() -> Tensor:
    """Return the matrix [16, 16] of the two-level Haar transform. Its rows are orthonormal."""
    root = math.sqrt(0.5)
    line = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [root, -root, 0, 0], [0, 0, root, -root]]
    )
    return torch.kron(line, line)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation layer with 16 channels per group."""
    return nn.GroupNorm(channels // GROUP_CHANNELS, channels)


class _SiLU(nn.Module):
    """Computes x * sigmoid(x). Works in place if x needs no gradient, which is faster."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


class ResidualBlock(nn.Module):
    """Computes x + conv(silu(conv(silu(norm(x))))).

    The last convolution starts with zero weights, so the block at first adds only a constant.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.silu = _SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped like its input."""
        y: Tensor = self.conv2(self.silu(self.conv1(self.silu(self.norm(x)))))
        return x + y


class AttentionBlock(nn.Module):
    """A pre-norm transformer block over the positions of a feature map.

    Its output layers start with zero weights, so the block at first adds only a constant.
    """

    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.heads = channels // head_size
        self.norm1 = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.norm2 = group_norm(channels)
        self.up = nn.Conv2d(channels, 4 * channels, 1)
        self.silu = _SiLU()
        self.down = nn.Conv2d(4 * channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped like its input."""
        x = x + self.out(self._attend(self.norm1(x)))
        y: Tensor = self.down(self.silu(self.up(self.norm2(x))))
        return x + y

    def _attend(self, x: Tensor) -> Tensor:
        pattern = "b (n h d) r c -> n b h (r c) d"
        q, k, v = rearrange(self.qkv(x), pattern, n=3, h=self.heads)
        y_BrcC = rearrange(_attention(q, k, v), "b h (r c) d -> b r c (h d)", c=x.shape[3])
        # This view is in channels-last memory format, like the output of a convolution.
        return rearrange(y_BrcC, "b r c e -> b e r c")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(d)) v for queries, keys and values [B, h, N, d].

    In bf16 on a CPU, two matrix products and a softmax are faster than torch's attention kernel if
    the scores fit into the cache. In that case, this function processes a few heads at a time, with
    at most `_MOST_SCORES` scores together, and rounds the scores to bf16.
    """
    scores_per_head = q.shape[2] ** 2
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or scores_per_head > _MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    group = _MOST_SCORES // scores_per_head
    heads = (rearrange(x, "b h n d -> (b h) n d") for x in (q * q.shape[3] ** -0.5, k, v))
    parts = (x_hNd.split(group) for x_hNd in heads)
    mixed = [torch.softmax(a @ b.mT, -1) @ c for a, b, c in zip(*parts, strict=True)]
    y_BhNd: Tensor = rearrange(torch.cat(mixed), "(b h) n d -> b h n d", h=q.shape[1])
    return y_BhNd


class Bottleneck(nn.Sequential):
    """The blocks at stride 16: learned positions, then residual blocks, then transformer blocks."""

    def __init__(self, config: AutoencoderConfig) -> None:
        channels = config.widths[2]
        super().__init__(
            _Positions(channels, config.rows, config.cols),
            *(ResidualBlock(channels) for _ in range(config.blocks[2])),
            *(AttentionBlock(channels, config.head_size) for _ in range(config.attention_blocks)),
        )


class _Positions(nn.Module):
    """Adds a learned vector at each position, because sky and road have fixed places in a frame."""

    def __init__(self, channels: int, rows: int, cols: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(channels, rows, cols) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


class Encoder(nn.Sequential):
    """Maps patches [B, 48, H/4, W/4] to unquantised codes [B, D, r, c]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        fine, middle, coarse = config.widths
        super().__init__(
            nn.Conv2d(3 * _PATCH**2, fine, 3, padding=1),
            *(ResidualBlock(fine) for _ in range(config.blocks[0])),
            nn.Conv2d(fine, middle, 2, stride=2),
            *(ResidualBlock(middle) for _ in range(config.blocks[1])),
            nn.Conv2d(middle, coarse, 2, stride=2),
            Bottleneck(config),
            group_norm(coarse),
            nn.Conv2d(coarse, len(config.levels), 1),
        )


class Decoder(nn.Sequential):
    """Maps codes [B, D, r, c] to patches [B, 48, H/4, W/4]. Mirrors the encoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        fine, middle, coarse = config.widths
        super().__init__(
            nn.Conv2d(len(config.levels), coarse, 1),
            Bottleneck(config),
            nn.Conv2d(coarse, 4 * middle, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(middle) for _ in range(config.blocks[1])),
            nn.Conv2d(middle, 4 * fine, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(fine) for _ in range(config.blocks[0])),
            group_norm(fine),
            _SiLU(),
            nn.Conv2d(fine, 3 * _PATCH**2, 3, padding=1),
        )


class Reconstruction(NamedTuple):
    """Result of one pass through the autoencoder."""

    images: Tensor
    """Reconstructed pictures [B, 3, H, W], nominally in [-1, 1], not clamped."""
    tokens: Tensor
    """Tokens (indices of the codes), int64 [B, r, c]."""


class Autoencoder(nn.Module):
    """Encodes pictures as a grid of tokens, and decodes the tokens to pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patching = Patching(config.patching)
        self.encoder = Encoder(config)
        self.quantiser = FSQ(config.levels)
        self.decoder = Decoder(config)
        # oneDNN and cuDNN convolve fastest in channels-last memory format.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, at which the objective compares gradients."""
        layer = self.decoder[-1]
        assert isinstance(layer, nn.Conv2d)
        return layer.weight

    def encode(self, images: Tensor) -> Tensor:
        """Return the quantised codes [B, r, c, D] of pictures [B, 3, H, W] in [-1, 1]."""
        patches = self.patching(images).contiguous(memory_format=torch.channels_last)
        z_BDrc = self.encoder(patches)
        codes: Tensor = self.quantiser(rearrange(z_BDrc, "b d r c -> b r c d"))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W], nominally in [-1, 1], from codes [B, r, c, D]."""
        codes_BDrc = rearrange(codes, "b r c d -> b d r c")
        patches = self.decoder(codes_BDrc.contiguous(memory_format=torch.channels_last))
        return self.patching.inverse(patches)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantise and decode pictures [B, 3, H, W] in [-1, 1]."""
        codes = self.encode(images)
        return Reconstruction(self.decode(codes), self.quantiser.codes_to_indices(codes))
