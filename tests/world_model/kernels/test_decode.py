import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from driving_sim.world_model import WorldModel
from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.kernels import decode as native
from driving_sim.world_model.kernels import library as native_library
from driving_sim.world_model.kernels.decode import NativeCache, NativeModel, is_supported
from driving_sim.world_model.kernels.library import call
from driving_sim.world_model.sampling.draw_waves import FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from tests.fixtures.token_drives import COLS, FPS, LEVELS, ROWS, tiny_tokenizer, turning_drive
from tests.fixtures.world_models import (
    GRID,
    WIDE,
    cached_logits,
    in_each_format,
    needs_compiler,
    random_inputs,
    random_model,
    wave_by_wave,
)


def native_cache(model: Transformer, batch: int, dtype: torch.dtype) -> NativeCache:
    tables = model.tables()
    return NativeCache(model, tables, batch, NativeModel(model, tables, dtype))


@needs_compiler
@pytest.mark.parametrize(
    ("config", "frames"),
    [
        (WIDE, 10),
        (replace(WIDE, width=192, heads=3, kv_heads=1, lag=1), 10),
        (replace(WIDE, layers=1, kv_heads=1, context_frames=60), 70),  # parts of 256 keys
    ],
)
@pytest.mark.parametrize("by_wave", [False, True])
@in_each_format
@pytest.mark.usefixtures("processor")
@torch.no_grad()
def test_compiled_passes_equal_torchs_beyond_a_window(
    config: TransformerConfig, frames: int, by_wave: bool, dtype: torch.dtype
) -> None:
    # 40 codes are one full group of columns, and a part of another.
    grid = replace(GRID, levels=(8, 5))
    model = random_model(config, grid)
    inputs = random_inputs(frames, grid=grid)
    exact = cached_logits(model, RingCache(model, model.tables(), 2), inputs, by_wave=False)
    compiled = cached_logits(model, native_cache(model, 2, dtype), inputs, by_wave=by_wave)
    # In bf16, products round their inputs to 8 bits. In float32, only the order of sums differs.
    mean, largest = (0.02, 0.15) if dtype is torch.bfloat16 else (2e-6, 2e-5)
    assert (compiled - exact).abs().mean() < mean * exact.std()
    assert (compiled - exact).abs().max() < largest * exact.std()


@needs_compiler
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.bfloat16)],
)
def test_a_world_model_on_a_cpu_uses_compiled_passes(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is bf16 even if torch would emulate it: compiled passes then read half as many bytes."""
    monkeypatch.setattr("driving_sim.engine.precision._bf16_is_faster_on_cpu", lambda: False)
    model = random_model(WIDE, TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS))
    options: dict[str, Any] = {"fps": FPS, "steering_kind": "road_wheel", "precision": precision}
    world = WorldModel(model, tiny_tokenizer(), **options)
    cache = world.no_prefix().cache
    assert isinstance(cache, NativeCache)
    assert world.dtype is cache.native.dtype is cache.keys.dtype is dtype
    assert cache.dtype is torch.float32
    as_double = WorldModel(copy.deepcopy(model).double(), tiny_tokenizer(), **options)
    assert not isinstance(as_double.no_prefix().cache, NativeCache)


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda world: pickle.loads(pickle.dumps(world))],
    ids=["deep", "pickle"],
)
def test_a_copy_generates_the_same(
    copied: Callable[[WorldModel], WorldModel], precision: str
) -> None:
    transformer = random_model(WIDE, TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS))
    world = WorldModel(
        transformer, tiny_tokenizer(), fps=FPS, steering_kind="road_wheel", precision=precision
    )
    again = copied(world)
    assert again.fingerprint == world.fingerprint
    assert again.config == world.config
    assert again.dtype is world.dtype
    tokens, actions, _ = turning_drive(8, 0)
    rolls = []
    for model in (world, again):
        prefix = model.encode_prefix(tokens[:4], actions[:3])
        assert isinstance(prefix.cache, NativeCache)
        assert prefix.cache.model is model.transformer
        rolls.append(list(model.generate(prefix, actions[3:], samples=2)))
    for original, copied_frame in zip(*rolls, strict=True):
        assert torch.equal(copied_frame.tokens, original.tokens)
        assert torch.equal(copied_frame.log_probs, original.log_probs)


def test_auto_does_not_emulate_bf16_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("driving_sim.engine.precision._bf16_is_faster_on_cpu", lambda: False)
    monkeypatch.setenv("DRIVESIM_NATIVE", "0")
    model = random_model(WIDE, TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS))
    world = WorldModel(model, tiny_tokenizer(), fps=FPS, steering_kind=None, precision="auto")
    assert world.dtype is world.no_prefix().cache.dtype is torch.float32


@needs_compiler
def test_inputs_of_the_passes_are_the_same_in_every_format() -> None:
    model = random_model(WIDE)
    tokens, known = torch.zeros(1, model.order.tokens, dtype=torch.int64), torch.ones(1, 2)
    bases = [
        native_cache(model, 1, dtype).begin_frame(tokens, known, known.bool())[0]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert torch.equal(*bases)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("limit", [{"top_p": 0.95}, {"min_p": 0.1}, {}], ids=str)
def test_sampled_tokens_are_those_of_torch_in_float32(limit: dict[str, float]) -> None:
    model = random_model(WIDE)
    rolls = []
    for ring in (RingCache(model, model.tables(), 1), native_cache(model, 1, torch.float32)):
        sampler = FrameSampler(
            ring,
            torch.zeros(1, model.order.tokens, dtype=torch.int64),
            samples=torch.arange(4),
            sampling=Sampling(seed=3, temperature=0.9, guidance=1.5, **limit),  # type: ignore[arg-type]
        )
        action = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bool)
        rolls.append([sampler.step(*action) for _ in range(3 * WIDE.context_frames)])
    for expected, compiled in zip(*rolls, strict=True):
        assert torch.equal(compiled.tokens, expected.tokens)
        torch.testing.assert_close(compiled.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize(("temperature", "min_p"), [(0.0, 0.0), (0.8, 0.1), (1.0, 0.0)])
@in_each_format
@pytest.mark.usefixtures("processor")
@torch.no_grad()
def test_compiled_draws_equal_torchs(
    dtype: torch.dtype,
    temperature: float,
    min_p: float,
    guidance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For five futures of two contexts; the 40 codes do not fill their last vector."""
    calls = []

    def watched(name: str, dtype: torch.dtype, **values: Any) -> None:
        calls.append(name)
        call(name, dtype, **values)

    monkeypatch.setattr(native, "call", watched)
    grid = replace(GRID, levels=(8, 5))
    model = random_model(WIDE, grid)
    last, contexts = random_inputs(1, grid=grid)["tokens"][:, 0].flatten(1), [0, 0, 1, 1, 0]
    rolls = []
    for top_k in (None, grid.codebook_size):  # top-k with all codes cuts none, but torch draws
        sampler = FrameSampler(
            native_cache(model, 2, dtype),
            last,
            samples=torch.arange(5),
            sampling=Sampling(
                seed=3, temperature=temperature, min_p=min_p, top_k=top_k, guidance=guidance
            ),
            contexts=torch.tensor(contexts),
        )
        action = torch.linspace(-2, 2, 10).view(5, 2), torch.ones(5, 2, dtype=torch.bool)
        calls.clear()
        rolls.append([sampler.step(*action) for _ in range(2 * WIDE.context_frames)])
        assert set(calls) == ({"frame"} if top_k is None else {"pass"})
    for compiled, expected in zip(*rolls, strict=True):
        assert torch.equal(compiled.tokens, expected.tokens)
        torch.testing.assert_close(compiled.log_probs, expected.log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            compiled.sampling_log_probs, expected.sampling_log_probs, rtol=0, atol=1e-5
        )


@needs_compiler
@pytest.mark.parametrize("sampling", [Sampling(seed=3, guidance=1.7), Sampling(top_p=0.9)], ids=str)
@in_each_format
@pytest.mark.usefixtures("processor")
@torch.no_grad()
def test_a_future_does_not_depend_on_the_rest_of_the_batch(
    dtype: torch.dtype, sampling: Sampling
) -> None:
    """It is the same to the last bit, including the encoding of its context."""
    model, inputs = random_model(WIDE), random_inputs(2)
    last, contexts = inputs["tokens"][:, -1].flatten(1), torch.tensor([0, 1, 1, 0, 1])
    actions = torch.linspace(-2, 2, 10).view(5, 2)

    def roll(futures: list[int], sequences: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cache = native_cache(model, len(sequences), dtype)
        names = ("previous", "tokens", "actions", "action_valid")
        own = {name: inputs[name][sequences] for name in names}
        now = own["actions"][:, 0], own["action_valid"][:, 0]
        encode_frame(cache, own["tokens"][:, 0].flatten(1), own["previous"].flatten(1), *now)
        sampler = FrameSampler(
            cache,
            last[sequences],
            samples=torch.tensor(futures),
            sampling=sampling,
            contexts=torch.tensor([sequences.index(int(contexts[future])) for future in futures]),
        )
        known = torch.ones(len(futures), 2, dtype=torch.bool)
        frames = [sampler.step(actions[futures], known) for _ in range(2 * WIDE.context_frames)]
        return (
            torch.stack([frame.tokens for frame in frames], dim=1),
            torch.stack([frame.log_probs for frame in frames], dim=1),
        )

    tokens, log_probs = roll(list(range(5)), [0, 1])
    for future in range(5):
        alone, own_log_probs = roll([future], [int(contexts[future])])
        assert torch.equal(alone[0], tokens[future])
        assert torch.equal(own_log_probs[0], log_probs[future])


@needs_compiler
def test_a_draw_from_nan_logits_is_a_valid_code() -> None:
    model = random_model(WIDE)
    model.output_norm.weight.data.fill_(torch.nan)
    last = torch.zeros(1, model.order.tokens, dtype=torch.int64)
    sampler = FrameSampler(
        native_cache(model, 1, torch.float32), last, samples=torch.arange(2), sampling=Sampling()
    )
    sample = sampler.step(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert sample.tokens.max() < model.grid.codebook_size
    assert sample.log_probs.isnan().all()


@needs_compiler
@in_each_format
@torch.no_grad()
def test_branches_continue_their_own_sequence(dtype: torch.dtype) -> None:
    model, inputs = random_model(WIDE), random_inputs(5)
    cache = native_cache(model, 2, dtype)
    before = cached_logits(model, cache, inputs, by_wave=True)
    assert (before[0] - before[1]).abs().max() > 0.1
    tokens, previous = inputs["tokens"][:, 0].flatten(1), inputs["tokens"][:, -1].flatten(1)
    now = inputs["actions"][:, 0], inputs["action_valid"][:, 0]
    rows = torch.tensor([1, 0, 1])
    branch = cache.branch(rows)
    originals = encode_frame(cache, tokens, previous, *now)
    branches = wave_by_wave(branch, tokens[rows], previous[rows], *(x[rows] for x in now))
    near = 0.05 if dtype is torch.bfloat16 else 1e-5
    assert (branches - originals[rows]).abs().max() < near * originals.std()


@needs_compiler
@pytest.mark.parametrize("past", [1, 7, 20, 33])
@in_each_format
@torch.no_grad()
def test_branches_equal_caches_of_their_own(past: int, dtype: torch.dtype) -> None:
    """Over two windows of a ring of 10 blocks, starting from full and partly filled rings."""
    config = replace(WIDE, context_frames=20)
    model = random_model(config)
    inputs = random_inputs(past + 2 * config.context_frames)
    first = {name: inputs[name][:, :past] for name in ("tokens", "actions", "action_valid")}
    cache = native_cache(model, 2, dtype)
    cached_logits(model, cache, inputs | first, by_wave=False)
    rows = torch.tensor([1, 0, 1])
    branch, alone = cache.branch(rows), native_cache(model, 3, dtype)
    alone.keys, alone.values = cache.keys[:, rows], cache.values[:, rows]
    alone.frame = cache.frame
    again, near = None, 0.02 if dtype is torch.bfloat16 else 1e-5
    for frame in range(past, past + 2 * config.context_frames):
        tokens, previous = (
            inputs["tokens"][rows, number].flatten(1) for number in (frame, frame - 1)
        )
        now = inputs["actions"][rows, frame], inputs["action_valid"][rows, frame]
        expected = wave_by_wave(alone, tokens, previous, *now)
        branched = wave_by_wave(branch, tokens, previous, *now)
        assert (branched - expected).abs().max() < near * expected.std()
        if again is not None:
            two = wave_by_wave(again, tokens[:2], previous[:2], now[0][:2], now[1][:2])
            assert (two - expected[:2]).abs().max() < near * expected.std()
        elif frame == past + 3:
            again = branch.branch(torch.tensor([0, 1]))
        own_frames = frame - past + 1
        assert branch._trunk is not None or own_frames >= config.context_frames - 3
        assert branch._trunk is None or own_frames <= config.context_frames


@needs_compiler
@torch.no_grad()
def test_keys_and_values_are_rounded_to_the_nearest_bf16() -> None:
    """If they were truncated, they would be too small by a quarter of a percent on average."""
    model, inputs = random_model(WIDE), random_inputs(WIDE.context_frames)
    rounded, exact = (native_cache(model, 2, dtype) for dtype in (torch.bfloat16, torch.float32))
    for ring in (rounded, exact):
        cached_logits(model, ring, inputs, by_wave=False)
    # In the first layer, only the products have rounded anything before.
    pairs = (rounded.keys[0], exact.keys[0]), (rounded.values[0], exact.values[0])
    for kept, true in pairs:
        assert kept.float().abs().sum() / true.abs().sum() == pytest.approx(1, abs=5e-4)


@needs_compiler
@torch.no_grad()
def test_branches_keep_the_shared_ring_when_the_original_cache_continues() -> None:
    model, inputs = random_model(WIDE), random_inputs(5)
    cache = native_cache(model, 2, torch.bfloat16)
    cached_logits(model, cache, inputs, by_wave=True)
    tokens, previous = inputs["tokens"][:, 0].flatten(1), inputs["tokens"][:, -1].flatten(1)
    now = inputs["actions"][:, 0], inputs["action_valid"][:, 0]
    branch = cache.branch(torch.tensor([0, 1]))
    expected = encode_frame(cache.branch(torch.tensor([0, 1])), tokens, previous, *now)
    for _ in range(3):
        encode_frame(cache, previous, tokens, *now)
    assert torch.equal(encode_frame(branch, tokens, previous, *now), expected)


@needs_compiler
@in_each_format
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    def roll(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model = random_model(WIDE)
            sampler = FrameSampler(
                native_cache(model, 1, dtype),
                torch.zeros(1, model.order.tokens, dtype=torch.int64),
                samples=torch.arange(3),
                sampling=Sampling(),
            )
            action = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
            return torch.stack([sampler.step(*action).log_probs for _ in range(5)])
        finally:
            torch.set_num_threads(before)

    assert torch.equal(roll(1), roll(2))


@needs_compiler
@torch.no_grad()
def test_scores_that_could_overflow_are_left_to_torch() -> None:
    model = random_model(WIDE)
    attention = native._blocks(model)[1].attention
    # Channels 3 and 19 are rotated together, and sqrt(32) * 16 is above 70.
    attention.q_norm.weight[3], attention.k_norm.weight[19] = -4.0, 4.0
    assert not is_supported(model)


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "no C++ compiler"), ("false", "could not be compiled")],
)
def test_without_a_working_compiler_torch_computes_the_passes(
    compiler: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(native_library, "_library", cache(native_library._library.__wrapped__))
    monkeypatch.setenv("CXX", compiler)
    assert not is_supported(random_model(WIDE))
    assert said in "".join(capsys.readouterr())
