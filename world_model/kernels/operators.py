"""The transformer's basic operations on any device; each function chooses its own backend.

On a CPU, the backend is `attention.cpp` if it supports the inputs. Otherwise it is torch. Compiled
functions help because torch spends some 60 % of a small model's training step on causal attention
and, in bf16, most of the rest on small float32 operations. The compiled functions support autograd
and compute in the number format of autocast. They support neither second derivatives nor
torch.func; for these, set DRIVESIM_NATIVE=0.

Axes: B batch, N slots, H query heads, G key heads, E channels of a head, F = (H + 2 G) E, D width.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from driving_sim.engine.progress import say
from driving_sim.world_model.kernels.library import EPSILON, LANES, PAIRS, Structure, call, library
from driving_sim.world_model.rotary import rotate

_BLOCK = 64  # slots in a block, as in `attention.cpp`
# The gradient of an RMSNorm's gain is a sum over all rows. Threads share the work: the rows are
# divided into this many parts, each part is summed separately, and the results are added up. The
# number is fixed so that results do not depend on the number of threads.
_NORM_PARTS = 64
_MOST_CHANNELS = 1024
LARGEST_SCORE = 70.0
"""Upper bound of attention scores. With larger scores, sums of exponentials may overflow."""


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Return x [..., D] divided by its root mean square and multiplied by `gain` [D].

    Under autocast, the compiled function returns autocast's number format. torch returns float32.
    """
    dtype = _format(x)
    if dtype is None or not _are_float32(x, gain) or len(gain) % LANES:
        return F.rms_norm(x, gain.shape, gain, EPSILON)
    normed: Tensor = _Norm.apply(x, gain, dtype)  # type: ignore[no-untyped-call]
    return normed


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) squared (arXiv 2109.08668)."""
    if x.dtype is not _format(x) or x.numel() % LANES:
        return F.relu(x).square()
    activated: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
    return activated


def causal_attention(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend from each slot to itself and the slots before it; return [B, N, H E].

    For `qkv` [B, N, F] and the other arguments, see `split_heads`. A `mask` bool [N, N], if given,
    replaces the causal mask: row i says which slots slot i attends to.
    """
    if (
        mask is None
        and qkv.dtype is _format(qkv)
        and len(q_gain) % PAIRS == 0
        and len(q_gain) <= _MOST_CHANNELS
        and _are_float32(q_gain, k_gain, *rotary)
        and is_bounded(q_gain, k_gain)
    ):
        compiled: Tensor = _CausalAttention.apply(qkv, q_gain, k_gain, *rotary, heads)  # type: ignore[no-untyped-call]
        return compiled
    q, k, v = split_heads(qkv, q_gain, k_gain, rotary, heads=heads)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return rearrange(mixed, "b h n e -> b n (h e)")


def split_heads(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rotary: tuple[Tensor, Tensor], *, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split projections `qkv` [B, N, F] into queries [B, H, N, E], keys and values [B, G, N, E].

    Along F, the queries of H heads come first, then the keys of G heads, then the values of G
    heads. Queries and keys are normalised with the gains `q_gain` and `k_gain` [E], and then
    rotated by the angles whose cosines and sines, float32 [N, E / 2], are `rotary`.
    """
    parts = rearrange(qkv, "b n (h e) -> b h n e", e=len(q_gain))
    kv_heads = (parts.shape[1] - heads) // 2
    q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    # Normalise in float32: for bfloat16 with a float32 gain, torch has no fused kernel and warns.
    q, k = (
        rotate(F.rms_norm(x.float(), gain.shape, gain, EPSILON), *rotary)
        for x, gain in ((q, q_gain), (k, k_gain))
    )
    return q.to(v.dtype), k.to(v.dtype), v


@torch.no_grad()
def is_bounded(q_gain: Tensor, k_gain: Tensor) -> bool:
    """Return whether attention scores stay below LARGEST_SCORE with these gains [E].

    Prints a notice if not. Before their gains, queries and keys have the norm sqrt(E). A gain
    stretches each pair of channels that is rotated together by at most the larger of its two, and
    a score is the sum over the pairs, divided by sqrt(E).
    """
    q, k = (torch.stack(gain.abs().chunk(2)).amax(dim=0) for gain in (q_gain, k_gain))
    if float((q * k).max()) * math.sqrt(len(q_gain)) < LARGEST_SCORE:
        return True
    _say_unbounded()
    return False


@cache
def _say_unbounded() -> None:
    say("an attention gain is too large for the compiled code; torch takes over, which is slower")


def _format(x: Tensor) -> torch.dtype | None:
    """Return the number format in which compiled functions compute x, or None to use torch."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or library() is None:
        return None
    low = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if low else torch.float32
    return dtype if dtype in (torch.bfloat16, torch.float32) else None


def _are_float32(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.float32 for tensor in tensors)


def _attention(heads: int, *tensors: Tensor) -> dict[str, Any]:
    """Return the fields of an `Attention` structure by name.

    `tensors` are the values of its pointer fields, in the order in which these are declared.
    """
    qkv, q_gain = tensors[:2]
    batch, slots, features = qkv.shape
    names = ("qkv", "q_gain", "k_gain", "cos", "sin", "mixed", "weights")
    return {
        "batch": batch,
        "slots": slots,
        "heads": heads,
        "kv_heads": (features // len(q_gain) - heads) // 2,
        "channels": len(q_gain),
        **dict(zip(names, tensors, strict=True)),
    }


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_gain: Tensor,
        k_gain: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
    ) -> Tensor:
        inputs = [tensor.contiguous() for tensor in (qkv, q_gain, k_gain, cos, sin)]
        batch, slots, _ = qkv.shape
        mixed = qkv.new_empty(batch, slots, heads * len(q_gain))
        weights = q_gain.new_empty(batch, heads, -(-slots // _BLOCK) * _BLOCK)
        call("attention", qkv.dtype, **_attention(heads, *inputs, mixed, weights))
        ctx.heads = heads
        ctx.save_for_backward(*inputs, mixed, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed_grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_gain, k_gain, *_ = saved = ctx.saved_tensors
        forward = Structure("Attention", qkv.dtype, **_attention(ctx.heads, *saved))
        heads, channels = qkv.shape[2] // len(q_gain), len(q_gain)
        qkv_grad = torch.empty_like(qkv)
        q_gain_grad = q_gain.new_empty(len(qkv) * ctx.heads, channels)
        k_gain_grad = k_gain.new_empty(len(qkv) * (heads - ctx.heads) // 2, channels)
        call(
            "attention_grad",
            qkv.dtype,
            forward=forward,
            mixed_grad=mixed_grad.contiguous(),
            qkv_grad=qkv_grad,
            q_gain_grad=q_gain_grad,
            k_gain_grad=k_gain_grad,
        )
        return qkv_grad, q_gain_grad.sum(0), k_gain_grad.sum(0), None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.sizes = {"rows": x.numel() // len(gain), "width": len(gain)}
        x, gain = x.contiguous(), gain.contiguous()
        normed = torch.empty_like(x, dtype=dtype)
        call("norm", dtype, **ctx.sizes, x=x, gain=gain, normed=normed)
        ctx.save_for_backward(x, gain)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        gains = gain.new_empty(_NORM_PARTS, len(gain))
        fields = {**ctx.sizes, "parts": _NORM_PARTS, "x": x, "gain": gain, "grad": grad}
        call("norm_grad", grad.dtype, **fields, x_grad=x_grad, gain_grads=gains)
        return x_grad, gains.sum(0), None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        activated = torch.empty_like(x)
        call("activation", x.dtype, count=x.numel(), x=x, activated=activated)
        ctx.save_for_backward(x)
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        call("activation_grad", x.dtype, count=x.numel(), x=x, grad=grad, x_grad=x_grad)
        return x_grad
