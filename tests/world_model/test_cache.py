import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from driving_sim.world_model.cache import RingCache
from driving_sim.world_model.sampling.draw_waves import FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import Transformer
from tests.fixtures.world_models import (
    CONFIG,
    GRID,
    cached_logits,
    random_inputs,
    random_model,
)


def new_cache(model: Transformer, batch: int) -> RingCache:
    return RingCache(model, model.tables(), batch)


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("by_wave", [False, True])
@torch.no_grad()
def test_cached_equals_uncached_over_three_windows(lag: int, by_wave: bool) -> None:
    model = random_model(replace(CONFIG, lag=lag))
    inputs = random_inputs(3 * CONFIG.context_frames + 1)
    cached = cached_logits(model, new_cache(model, 2), inputs, by_wave=by_wave)
    uncached = model(**inputs).flatten(2, 3)
    assert uncached.std() > 0.1
    assert (cached - uncached).abs().max() < 1e-4


@torch.no_grad()
def test_a_frame_that_left_the_cache_has_no_influence() -> None:
    """With one layer, frame W + 1 sees only frames 2 and later, and frame 2 gets only frame 1."""
    model = random_model(replace(CONFIG, layers=1))
    inputs = random_inputs(CONFIG.context_frames + 4)
    altered = {**inputs, "tokens": inputs["tokens"].clone()}
    altered["tokens"][:, 0] = (altered["tokens"][:, 0] + 1) % GRID.codebook_size
    first = cached_logits(model, new_cache(model, 2), inputs, by_wave=True)
    second = cached_logits(model, new_cache(model, 2), altered, by_wave=True)
    changed = (first - second).abs().amax(dim=(0, 2, 3))
    assert (changed[: CONFIG.context_frames + 1] > 1e-4).all()
    assert (changed[CONFIG.context_frames + 1 :] == 0).all()


@pytest.mark.parametrize("known", [1, 2, 4])
@torch.no_grad()
def test_a_branched_prefix_continues_like_the_sequence_itself(known: int) -> None:
    model = random_model()
    inputs = random_inputs(known + 4, batch=1)
    unbranched = cached_logits(model, new_cache(model, 1), inputs, by_wave=False)
    prefix = new_cache(model, 1)
    head = {name: inputs[name][:, :known] for name in ("tokens", "actions", "action_valid")}
    cached_logits(model, prefix, {**inputs, **head}, by_wave=False)
    tail = {name: inputs[name][:, known:].repeat_interleave(3, 0) for name in head}
    tail["previous"] = inputs["tokens"][:, known - 1].repeat_interleave(3, 0)
    kept = prefix.keys.clone()
    for _ in range(2):  # the second round uses the same prefix again
        branches = cached_logits(
            model, prefix.branch(torch.zeros(3, dtype=torch.int64)), tail, by_wave=True
        )
        for logits in branches:
            torch.testing.assert_close(logits, unbranched[0, known:], atol=1e-4, rtol=1e-4)
    assert torch.equal(prefix.keys, kept)


def live_bytes() -> int:
    """Return the memory of all live tensors; memory that tensors share counts once.

    Tests with torch.compile leave fake tensors behind, which have no memory.
    """
    gc.collect()
    kinds = (Tensor, nn.Parameter)
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def test_memory_does_not_grow() -> None:
    """After hundreds of windows, no tensor of an earlier window is left."""
    model = random_model(replace(CONFIG, layers=1, context_frames=2))
    cache, inputs = new_cache(model, 1), random_inputs(1, batch=1)
    cached_logits(model, cache, inputs, by_wave=False)
    last, action = inputs["tokens"][:, 0].flatten(1), torch.zeros(2, 2)
    sampler = FrameSampler(cache, last, samples=torch.arange(2), sampling=Sampling(guidance=2.0))
    sizes = []
    for frame in range(300):
        sampler.step(action, torch.ones(2, 2, dtype=torch.bool))
        if frame in (9, 299):
            sizes.append(live_bytes())
    assert sizes[0] == sizes[1]
