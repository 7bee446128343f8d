import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from driving_sim.engine.precision import autocast
from driving_sim.world_model.kernels import operators
from driving_sim.world_model.kernels.library import call
from driving_sim.world_model.kernels.operators import (
    causal_attention,
    is_bounded,
    rms_norm,
    squared_relu,
)
from driving_sim.world_model.rotary import rotate
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective
from tests.fixtures.rank_training import STEPS, rank_train
from tests.fixtures.ranks import assert_same_losses, exported, launch
from tests.fixtures.world_models import (
    WIDE,
    in_each_format,
    needs_compiler,
    random_inputs,
    random_model,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions, in the order in which they are called."""
    names: list[str] = []

    def watched(name: str, dtype: torch.dtype, **values: Any) -> None:
        names.append(name)
        call(name, dtype, **values)

    monkeypatch.setattr(operators, "call", watched)
    return names


def compute(dtype: torch.dtype) -> AbstractContextManager[object]:
    return autocast(torch.device("cpu"), dtype)


def step_of(dtype: torch.dtype) -> float:
    """An upper bound of the relative rounding error of a number format."""
    return 0.004 if dtype is torch.bfloat16 else 1e-6


def distance(tensor: Tensor, exact: Tensor) -> float:
    return float((tensor.float() - exact).norm() / exact.norm())


def results(act: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return what `act` returns for `inputs`, and the gradients of these."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = act(*leaves)
    out.backward(grad.to(out.dtype))  # type: ignore[no-untyped-call]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@needs_compiler
@pytest.mark.parametrize("slots", [5, 64, 150])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(4, 2, 32), (3, 3, 64), (2, 1, 96)])
@in_each_format
@pytest.mark.usefixtures("processor")
def test_compiled_attention_and_its_gradients_equal_torchs(
    slots: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype, calls: list[str]
) -> None:
    torch.manual_seed(0)
    sizes = [heads * channels, kv_heads * channels, kv_heads * channels]
    angle = torch.randn(slots, channels // 2)
    rotary = angle.cos(), angle.sin()
    qkv = torch.randn(2, slots, sum(sizes)).to(dtype)
    gains = [1 + 0.3 * torch.randn(channels) for _ in range(2)]
    grad = torch.randn(2, slots, heads * channels).to(dtype)

    def exact(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part, "b n (h e) -> b h n e", e=channels)
            for part in torch.split(qkv, sizes, -1)
        )
        q = rotate(F.rms_norm(q, (channels,), q_gain, 1e-6), *rotary)
        k = rotate(F.rms_norm(k, (channels,), k_gain, 1e-6), *rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return rearrange(mixed, "b h n e -> b n (h e)")

    def compiled(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        with compute(dtype):
            return causal_attention(qkv, q_gain, k_gain, rotary, heads=heads)

    expected = results(exact, [qkv.float(), *gains], grad)
    for result, truth in zip(results(compiled, [qkv, *gains], grad), expected, strict=True):
        assert distance(result, truth) < (0.01 if dtype is torch.bfloat16 else 2e-6)
    assert calls == ["attention", "attention_grad"]


def test_scores_are_bounded_by_channels_that_are_rotated_together() -> None:
    q, k = torch.ones(2, 32)
    q[3], k[4] = 12, 12
    assert is_bounded(q, k)  # 12 * sqrt(32) = 68
    k[19] = 2
    assert not is_bounded(q, k)  # channel 19 turns into channel 3


@needs_compiler
@in_each_format
@pytest.mark.usefixtures("processor")
def test_a_key_with_negligible_weights_gets_no_gradient(
    dtype: torch.dtype, calls: list[str]
) -> None:
    """Its weight, e^-134, is too small for float32 and must not turn into a wrong number."""
    slots, channels = 70, 32
    q, k, v = torch.ones(slots, channels), torch.ones(slots, channels), torch.ones(slots, channels)
    k[0] = -1
    qkv = torch.cat([q, k, v], dim=1)[None].to(dtype).requires_grad_()
    gain = torch.full((channels,), 3.45)
    rotary = torch.ones(slots, channels // 2), torch.zeros(slots, channels // 2)
    grad = torch.randn(1, slots, channels, generator=torch.Generator().manual_seed(0))
    grad[:, 0] = 0  # the first query sees only this key
    with compute(dtype):
        mixed = causal_attention(qkv, gain, gain, rotary, heads=1)
    assert calls == ["attention"]
    mixed.backward(grad.to(dtype))  # type: ignore[no-untyped-call]
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()
    assert qkv.grad[0, 0].abs().max() < 1e-30
    assert qkv.grad[0, 1:, 2 * channels :].abs().max() > 0.01


@needs_compiler
@in_each_format
@pytest.mark.usefixtures("processor")
def test_compiled_norm_and_its_gradients_equal_torchs(dtype: torch.dtype, calls: list[str]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 50, 48), torch.randn(48)]
    grad = torch.randn(3, 50, 48).bfloat16().float()

    def compiled(x: Tensor, gain: Tensor) -> Tensor:
        with compute(dtype):
            return rms_norm(x, gain)

    expected = results(lambda x, gain: F.rms_norm(x, (48,), gain, 1e-6), inputs, grad)
    actual = results(compiled, inputs, grad)
    assert actual[0].dtype is dtype
    assert distance(actual[0], expected[0]) < step_of(dtype)
    assert distance(actual[1], expected[1]) < 1e-5
    assert distance(actual[2], expected[2]) < 1e-5
    assert calls == ["norm", "norm_grad"]


@needs_compiler
@in_each_format
@pytest.mark.usefixtures("processor")
def test_compiled_activation_and_its_gradient_equal_torchs(
    dtype: torch.dtype, calls: list[str]
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 40, 16).to(dtype)]
    grad = torch.randn(2, 40, 16).to(dtype)

    def compiled(x: Tensor) -> Tensor:
        with compute(dtype):
            return squared_relu(x)

    expected = results(lambda x: F.relu(x).square(), [inputs[0].float()], grad)
    for result, truth in zip(results(compiled, inputs, grad), expected, strict=True):
        assert distance(result, truth) < step_of(dtype)
    assert calls == ["activation", "activation_grad"]


def gradients(dtype: torch.dtype, threads: int = 2) -> dict[str, Tensor]:
    """Return the gradients of a small world model's loss, by parameter name."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = WorldModelObjective(InputNoiseConfig(token_noise=0.0), random_model(WIDE)).eval()
        grid, frames = model.transformer.grid, WIDE.context_frames
        torch.manual_seed(1)
        batch = {
            "tokens": torch.randint(grid.codebook_size, (2, frames, grid.rows, grid.cols)),
            "previous": torch.randint(grid.codebook_size, (2, grid.rows, grid.cols)),
            "has_previous": torch.ones(2, dtype=torch.bool),
            "actions": torch.randn(2, frames, 2),
            "action_valid": torch.ones(2, frames, 2, dtype=torch.bool),
        }
        with compute(dtype):
            loss, _ = model(batch)
        loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    finally:
        torch.set_num_threads(before)


@needs_compiler
@in_each_format
def test_a_models_gradients_equal_those_of_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = gradients(dtype)
    monkeypatch.setenv("DRIVESIM_NATIVE", "0")
    expected = gradients(dtype)
    near = 0.1 if dtype is torch.bfloat16 else 1e-5  # both backends round intermediate results
    assert compiled.keys() == expected.keys()
    for name, truth in expected.items():
        assert (compiled[name] - truth).norm() <= near * truth.norm(), name
    assert any(not torch.equal(compiled[name], truth) for name, truth in expected.items())


@needs_compiler
def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    model = random_model(WIDE)
    inputs = random_inputs(WIDE.context_frames)

    def gradients_of(recompute: bool) -> list[Tensor]:
        model.zero_grad()
        with compute(torch.bfloat16):
            if recompute:
                logits = checkpoint(model, *inputs.values(), use_reentrant=False)
            else:
                logits = model(*inputs.values())
        logits.float().square().sum().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    for kept, again in zip(gradients_of(False), gradients_of(True), strict=True):
        assert torch.equal(kept, again)


@needs_compiler
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_train_as_one_does(tmp_path: Path, shard: bool) -> None:
    model, one_rank, two_ranks = "compiled_world_model", tmp_path / "one", tmp_path / "two"
    assert launch(2, model, two_ranks, precision="bf16", shard=shard) == [0, 0]
    rank_train(model, one_rank, precision="bf16", accumulate=2)
    # A tiny difference in float32 can become one step of bf16, and then grows from step to step.
    assert_same_losses(
        one_rank, two_ranks, rel=1e-3, loose={"accuracy": 0.5, "grad_norm/model": 0.1}
    )


@needs_compiler
def test_a_resumed_training_is_the_same(tmp_path: Path, calls: list[str]) -> None:
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    for folder in (uninterrupted, run):
        rank_train("compiled_world_model", folder, precision="bf16")
    assert {"attention", "attention_grad"} <= {*calls}
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "finished.json").unlink()
    rank_train("compiled_world_model", run, precision="bf16", resume=True)
    for name, tensor in exported(uninterrupted).items():
        assert torch.equal(exported(run)[name], tensor), name


@needs_compiler
@in_each_format
def test_nan_stays_nan(dtype: torch.dtype, calls: list[str]) -> None:
    """Training skips steps with a NaN loss, so a NaN must not get lost on the way."""
    bad = torch.full((1, 4, 128), torch.nan)
    gain, rotary = torch.ones(32), (torch.ones(4, 16), torch.zeros(4, 16))
    with compute(dtype):
        for result in (
            causal_attention(bad.to(dtype), gain, gain, rotary, heads=2),
            rms_norm(bad, torch.ones(128)),
            squared_relu(bad.to(dtype)),
        ):
            assert result.isnan().all()
    assert calls == ["attention", "norm", "activation"]


@needs_compiler
def test_gradients_do_not_depend_on_threads() -> None:
    single, double = (gradients(torch.bfloat16, threads=threads) for threads in (1, 2))
    for name in ("transformer.blocks.0.attention.qkv.weight", "transformer.blocks.1.up.weight"):
        assert torch.equal(single[name], double[name])


@needs_compiler
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch warns about a norm of bf16
def test_unsupported_inputs_are_left_to_torch(calls: list[str]) -> None:
    x, gain = torch.randn(2, 5, 128).bfloat16(), torch.ones(32)
    rotary = torch.ones(5, 16), torch.zeros(5, 16)
    causal_attention(x, gain, gain, rotary, heads=2)  # not in autocast
    squared_relu(x)
    squared_relu(torch.ones(3))
    rms_norm(torch.ones(2, 128).double(), torch.ones(128).double())
    with compute(torch.bfloat16):
        steep = 4 * gain  # scores can reach sqrt(32) * 16, which is too large
        causal_attention(x, steep, steep, rotary, heads=2)
        causal_attention(x.float(), gain, gain, rotary, heads=2)
        causal_attention(x, gain, gain, rotary, heads=2, mask=torch.ones(5, 5, dtype=torch.bool))
        rms_norm(x, torch.ones(128))
        squared_relu(torch.ones(3).bfloat16())
        assert not calls
        causal_attention(x, gain, gain, rotary, heads=2)
        assert calls == ["attention"]


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.ones(16, dtype=torch.float64)},
        {"x": torch.ones(16, 2)[:, 0]},
        {"x": [torch.ones(16)]},
        {"activated": torch.ones(16).bfloat16()},
        {"count": 16.0},
        {"number": 3},
    ],
    ids=str,
)
def test_wrong_arguments_of_a_compiled_function_are_an_error(wrong: dict[str, Any]) -> None:
    fields = {"count": 16, "x": torch.ones(16), "activated": torch.ones(16)}
    call("activation", torch.float32, **fields)
    with pytest.raises(TypeError):
        call("activation", torch.float32, **fields | wrong)
    with pytest.raises(TypeError, match="fields"):
        call("activation", torch.float32, x=torch.ones(16))
