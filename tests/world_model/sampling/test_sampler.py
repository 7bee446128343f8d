import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.sampling.sampler import (
    FrameSample,
    FrameSampler,
    Sampling,
    draw,
    truncated_log_probs,
    uniforms,
)
from driving_sim.world_model.transformer import Transformer
from tests.fixtures.world_models import CONFIG, GRID, random_inputs, random_model


def prefix_of(model: Transformer, inputs: dict[str, Tensor], frames: int) -> RingCache:
    """A cache of the first frames of the first sequence."""
    cache = RingCache(model, model.tables(), 1)
    previous = inputs["previous"][:1].flatten(1)
    with torch.inference_mode():
        for t in range(frames):
            tokens = inputs["tokens"][:1, t].flatten(1)
            now = inputs["actions"][:1, t], inputs["action_valid"][:1, t]
            encode_frame(cache, tokens, previous, *now)
            previous = tokens
    return cache


def roll(
    model: Transformer,
    sampling: Sampling,
    *,
    samples: list[int],
    frames: int = 5,
    known: int = 2,
    actions: Tensor | None = None,
) -> list[FrameSample]:
    inputs = random_inputs(known + frames)
    if actions is None:
        actions = inputs["actions"][:1, known:].expand(len(samples), -1, -1)
    sampler = FrameSampler(
        prefix_of(model, inputs, known),
        inputs["tokens"][:1, known - 1].flatten(1),
        samples=torch.tensor(samples),
        sampling=sampling,
    )
    valid = torch.ones(len(samples), 2, dtype=torch.bool)
    return [sampler.step(actions[:, t], valid) for t in range(frames)]


def stacked(frames: list[FrameSample]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.stack([frame.tokens for frame in frames], dim=1),
        torch.stack([frame.log_probs for frame in frames], dim=1),
        torch.stack([frame.sampling_log_probs for frame in frames], dim=1),
    )


def teacher_forced(model: Transformer, tokens: Tensor, known: int, *, null: bool) -> Tensor:
    """Uncached logits [B, N, r, c, K] of rolled-out tokens after the `known` true frames."""
    inputs = random_inputs(known + tokens.shape[1])
    batch = len(tokens)
    past = inputs["tokens"][:1, :known].expand(batch, -1, -1, -1)
    valid = inputs["action_valid"][:1].repeat(batch, 1, 1)
    if null:
        valid[:, known:] = False
    with torch.no_grad():
        logits: Tensor = model(
            torch.cat([past, tokens], dim=1),
            inputs["previous"][:1].expand(batch, -1, -1),
            inputs["has_previous"][:1].expand(batch),
            inputs["actions"][:1].expand(batch, -1, -1),
            valid,
        )
    return logits[:, known:]


SAMPLINGS = [
    Sampling(seed=3),
    Sampling(temperature=0.7, top_k=4, seed=4),
    Sampling(top_p=0.6, guidance=2.5, seed=5),
    Sampling(temperature=0.0, guidance=3.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_log_probs_of_a_rollout_equal_teacher_forced_ones(sampling: Sampling, lag: int) -> None:
    model = random_model(replace(CONFIG, lag=lag))
    frames = 3 * CONFIG.context_frames
    tokens, log_probs, sampling_log_probs = stacked(
        roll(model, sampling, samples=[0, 1, 7], frames=frames)
    )
    plain = teacher_forced(model, tokens, 2, null=False)
    null = teacher_forced(model, tokens, 2, null=True)
    drawn_from = truncated_log_probs(null + sampling.guidance * (plain - null), sampling)
    index = tokens.unsqueeze(-1)
    expected = plain.log_softmax(-1).gather(-1, index).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
    expected = drawn_from.gather(-1, index).squeeze(-1)
    torch.testing.assert_close(sampling_log_probs, expected, atol=1e-4, rtol=0)


def test_the_tokens_are_the_inverse_cdf_of_teacher_forced_probabilities() -> None:
    model = random_model()
    sampling = Sampling(temperature=1.3, top_k=5, seed=11)
    tokens, _, _ = stacked(roll(model, sampling, samples=[4, 2]))
    log_probs = truncated_log_probs(teacher_forced(model, tokens, 2, null=False), sampling)
    for t in range(tokens.shape[1]):
        uniform = uniforms(11, torch.tensor([4, 2]), t, GRID.rows, GRID.cols)
        assert torch.equal(draw(log_probs[:, t], uniform), tokens[:, t])


def test_guidance_one_is_the_plain_model() -> None:
    model = random_model()
    plain = stacked(roll(model, Sampling(), samples=[0, 1]))
    nearly = stacked(roll(model, Sampling(guidance=1 + 1e-7), samples=[0, 1]))
    assert torch.equal(plain[0], nearly[0])
    torch.testing.assert_close(plain[1], nearly[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(plain[1], plain[2], atol=1e-5, rtol=0)
    strong = stacked(roll(model, Sampling(guidance=4.0), samples=[0, 1]))
    assert not torch.equal(plain[0], strong[0])


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_draws_do_not_depend_on_the_batch(sampling: Sampling) -> None:
    model = random_model()
    together, _, _ = stacked(roll(model, sampling, samples=[0, 1, 2, 3]))
    for sample in range(4):
        alone, _, _ = stacked(roll(model, sampling, samples=[sample]))
        assert torch.equal(alone[0], together[sample])
    assert not torch.equal(together[0], together[1])


def test_draws_do_not_depend_on_the_lag() -> None:
    """A model whose logits ignore everything: only the uniform numbers are left."""
    drawn = []
    for lag in (1, 2, GRID.cols + 1):
        model = random_model(replace(CONFIG, lag=lag))
        model.output_norm.weight.data.zero_()
        drawn.append(stacked(roll(model, Sampling(seed=9), samples=[0, 1]))[0])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_branches_share_their_draws() -> None:
    """Same sample number, same actions: the same future whatever the other branches do."""
    model = random_model()
    actions = torch.zeros(4, 5, 2)
    actions[2:] = torch.tensor([5.0, 0.2])
    tokens, _, _ = stacked(roll(model, Sampling(), samples=[0, 1, 0, 1], actions=actions))
    first, _, _ = stacked(roll(model, Sampling(), samples=[0, 1], actions=actions[:2]))
    assert torch.equal(tokens[:2], first)
    assert not torch.equal(tokens[:2], tokens[2:])


def test_uniforms_are_fixed_uniform_and_independent() -> None:
    numbers = uniforms(0, torch.arange(64), 0, 8, 16)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.flatten().tolist())) > 0.999 * numbers.numel()
    flat = numbers.double().flatten()
    n = len(flat)
    assert abs(flat.mean() - 0.5) < 4 / math.sqrt(12 * n)
    counts = torch.histc(flat, 50, 0, 1)
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 90  # chi-square with 49 degrees of freedom
    neighbours = [
        uniforms(1, torch.arange(64), 0, 8, 16),
        uniforms(0, torch.arange(1, 65), 0, 8, 16),
        uniforms(0, torch.arange(64), 1, 8, 16),
        numbers.roll(1, 1),
        numbers.roll(1, 2),
    ]
    for other in neighbours:
        pair = torch.stack([flat, other.double().flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(n)
    assert torch.equal(uniforms(0, torch.tensor([5]), 0, 8, 16)[0], numbers[5])
    assert torch.equal(uniforms(0, torch.tensor([5]), 0, 2, 3)[0], numbers[5, :2, :3])
    assert uniforms(-1, torch.tensor([0]), 0, 1, 1) == uniforms(
        2**64 - 1, torch.tensor([0]), 0, 1, 1
    )


def test_splitmix64_matches_the_published_sequence() -> None:
    """The first output of SplitMix64 seeded with 1234567 (Rosetta Code) is 6457827717110365317."""
    from driving_sim.world_model.sampling.sampler import _mixed, _signed

    state = torch.tensor(1234567) + _signed(0x9E3779B97F4A7C15)
    assert int(_mixed(state)) % 2**64 == 6457827717110365317


def test_draw_follows_the_distribution_and_its_edges() -> None:
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    uniform = torch.tensor([0.0, 0.24, 0.26, 1 - 2**-24])
    tokens = draw(log_probs.expand(4, 5), uniform)
    assert tokens.tolist() == [1, 1, 3, 3]
    torch.manual_seed(0)
    log_probs = torch.randn(4, 1000).mul(3).log_softmax(-1)
    edge = draw(log_probs, torch.full((4,), 1 - 2**-24))
    assert (log_probs.gather(-1, edge[:, None]) > -torch.inf).all()
    drawn = draw(log_probs[:1].expand(20_000, -1), torch.rand(20_000))
    share = torch.bincount(drawn, minlength=1000) / 20_000
    assert (share - log_probs[0].exp()).abs().max() < 0.02
    assert (draw(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.5])) < 5).all()


def test_truncation_keeps_the_most_probable() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probs.log()

    def kept(**settings: float) -> list[float]:
        chosen = truncated_log_probs(logits, Sampling(**settings))  # type: ignore[arg-type]
        assert chosen.exp().sum() == pytest.approx(1)
        return [round(value, 4) for value in chosen.exp().tolist()]

    assert kept(top_k=2) == [0, 0.5714, 0, 0.4286]
    assert kept(top_p=0.39) == [0, 1, 0, 0]
    assert kept(top_p=0.41) == [0, 0.5714, 0, 0.4286]
    assert kept(top_p=1.0) == kept(top_k=9) == [0.1, 0.4, 0.2, 0.3]
    assert kept(temperature=0.0) == kept(top_k=1) == [0, 1, 0, 0]
    assert kept(temperature=0.5) == [0.0333, 0.5333, 0.1333, 0.3]


@pytest.mark.parametrize(
    ("probs", "settings", "kept"),
    [
        ([1, 1, 1], {"top_k": 1}, [0]),
        ([1, 3, 1, 3, 1], {"top_k": 3}, [0, 1, 3]),
        ([1, 1, 1, 1], {"top_p": 0.49}, [0, 1]),
        ([1, 1, 1, 1], {"top_p": 0.51}, [0, 1, 2]),
        ([1, 4, 1, 1, 1], {"top_p": 0.6}, [0, 1]),
        ([1, 1, 1, 1], {"top_k": 3, "top_p": 0.49}, [0, 1]),
        ([1, 1, 1, 1], {"temperature": 0.0}, [0]),
    ],
)
def test_of_equal_tokens_the_lowest_stay_and_no_more_than_are_asked_for(
    probs: list[float], settings: dict[str, Any], kept: list[int]
) -> None:
    chosen = truncated_log_probs(torch.tensor(probs).log(), Sampling(**settings))
    assert chosen.isfinite().nonzero().flatten().tolist() == kept
    assert chosen.exp().sum() == pytest.approx(1)


def test_truncation_keeps_exactly_k_and_the_smallest_set_that_reaches_p() -> None:
    """Of logits with many ties, as bf16 makes them."""
    torch.manual_seed(0)
    logits = torch.randn(200, 64).bfloat16().float().round(decimals=1)
    probs = logits.double().softmax(-1)
    by_k = truncated_log_probs(logits, Sampling(top_k=7)).isfinite()
    by_p = truncated_log_probs(logits, Sampling(top_p=0.77)).isfinite()
    assert (by_k.sum(-1) == 7).all()
    for kept in (by_k, by_p):
        least = probs.where(kept, torch.inf).min(-1, keepdim=True).values
        assert (probs.where(~kept, 0.0) <= least).all()
        highest_tie = (kept & (probs == least)).int().cumsum(-1).argmax(-1, keepdim=True)
        lower = torch.arange(64) < highest_tie
        assert kept[lower & (probs == least)].all()
    mass = probs.where(by_p, 0.0)
    assert (mass.sum(-1) >= 0.77).all()
    assert (mass.sum(-1) - probs.where(by_p, torch.inf).min(-1).values < 0.77).all()


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("guidance", -0.5)]
)
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(Sampling(), **{field: value})  # type: ignore[arg-type]
