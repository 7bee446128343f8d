"""Parts of a training step on a CPU, compiled: `attention.cpp` under autograd.

Of a step of a small model torch spends some 60 % in causal attention and, in bf16, most of the rest
in small float32 operations. Each function computes in the format of the surrounding autocast; it
returns None where the compiled one does not apply, and its caller goes on with torch. There are no
second derivatives and no transforms of torch.func; DRIVESIM_NATIVE=0 brings torch's back.

Axes: B batch, N slots, H query heads, G key heads, E channels of a head, F = (H + 2 G) E, D width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from driving_sim.world_model.kernels.library import (
    LANES,
    PAIRS,
    function,
    is_bounded,
    library,
)

_BLOCK = 64
_NORM_PARTS = 64
_MOST_CHANNELS = 1024


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "slots", "heads", "kv_heads", "channels")),
        *((name, ctypes.c_void_p) for name in ("qkv", "q_gain", "k_gain", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("mixed", "weights", "mixed_grad", "qkv_grad")),
        *((name, ctypes.c_void_p) for name in ("q_gain_grad", "k_gain_grad")),
    )


def causal_attention(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rotary: tuple[Tensor, Tensor], heads: int
) -> Tensor | None:
    """Return what each slot sees of those before it and itself, [B, N, H E], of `qkv` [B, N, F].

    The projections are queries of H heads, then keys and values of G: the former two are normed
    with `q_gain` and `k_gain` [E] and turned by `rotary`, cosines and sines float32 [N, E / 2].
    """
    channels = len(q_gain)
    if (
        qkv.dtype is not _format(qkv)
        or channels % PAIRS
        or channels > _MOST_CHANNELS
        or not _are_float32(q_gain, k_gain, *rotary)
        or not is_bounded(q_gain, k_gain)
    ):
        return None
    mixed: Tensor = _CausalAttention.apply(qkv, q_gain, k_gain, *rotary, heads)  # type: ignore[no-untyped-call]
    return mixed


def normed(x: Tensor, gain: Tensor) -> Tensor | None:
    """Return x [..., D] by its root mean square, times `gain` [D]."""
    dtype = _format(x)
    if dtype is None or not _are_float32(x, gain) or len(gain) % LANES:
        return None
    found: Tensor = _Norm.apply(x, gain, dtype)  # type: ignore[no-untyped-call]
    return found


def squared_relu(x: Tensor) -> Tensor | None:
    """Return the square of what of x is above 0."""
    if x.dtype is not _format(x) or x.numel() % LANES:
        return None
    found: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
    return found


def _format(x: Tensor) -> torch.dtype | None:
    """The number format that the compiled functions compute in here; None where they do not."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or library() is None:
        return None
    low = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if low else torch.float32
    return dtype if dtype in (torch.bfloat16, torch.float32) else None


def _are_float32(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.float32 for tensor in tensors)


def _numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


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
        given = [each.contiguous() for each in (qkv, q_gain, k_gain, cos, sin)]
        batch, slots, features = qkv.shape
        channels = len(q_gain)
        ctx.sizes = batch, slots, heads, (features // channels - heads) // 2, channels
        mixed = qkv.new_empty(batch, slots, heads * channels)
        weights = q_gain.new_empty(batch, heads, -(-slots // _BLOCK) * _BLOCK)
        structure = _Attention(*ctx.sizes, *_pointers(*given, mixed, weights))
        function("attention", qkv.dtype)(ctypes.byref(structure))
        ctx.save_for_backward(*given, mixed, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed_grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        batch, _, heads, kv_heads, channels = ctx.sizes
        mixed_grad, qkv_grad = mixed_grad.contiguous(), torch.empty_like(kept[0])
        q_gain_grad = kept[1].new_empty(batch * heads, channels)
        k_gain_grad = kept[1].new_empty(batch * kv_heads, channels)
        grads = mixed_grad, qkv_grad, q_gain_grad, k_gain_grad
        structure = _Attention(*ctx.sizes, *_pointers(*kept, *grads))
        function("attention_grad", qkv_grad.dtype)(ctypes.byref(structure))
        return qkv_grad, q_gain_grad.sum(0), k_gain_grad.sum(0), None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        x, gain = x.contiguous(), gain.contiguous()
        found = torch.empty_like(x, dtype=dtype)
        size = _numbers(x.numel() // len(gain), len(gain))
        function("norm", dtype)(*size, *_pointers(x, gain, found))
        ctx.save_for_backward(x, gain)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        gain_grads = gain.new_empty(_NORM_PARTS, len(gain))
        size = _numbers(x.numel() // len(gain), len(gain))
        function("norm_grad", grad.dtype)(*size, *_pointers(x, gain, grad, x_grad, gain_grads))
        return x_grad, gain_grads.sum(0), None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        found = torch.empty_like(x)
        function("activation", x.dtype)(*_numbers(x.numel()), *_pointers(x, found))
        ctx.save_for_backward(x)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        function("activation_grad", x.dtype)(*_numbers(x.numel()), *_pointers(x, grad, x_grad))
        return x_grad
