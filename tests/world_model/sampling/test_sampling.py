import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from driving_sim.world_model.sampling.sampling import (
    Sampling,
    draw,
    truncated_log_probs,
    uniforms,
)

FIRST = torch.tensor([0])


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
    assert kept(min_p=0.49) == [0, 0.4444, 0.2222, 0.3333]
    assert kept(min_p=1.0) == [0, 1, 0, 0]
    assert kept(temperature=0.5, min_p=0.2) == [0, 0.5517, 0.1379, 0.3103]
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
def test_of_equally_probable_tokens_those_with_the_lowest_index_stay(
    probs: list[float], settings: dict[str, Any], kept: list[int]
) -> None:
    chosen = truncated_log_probs(torch.tensor(probs).log(), Sampling(**settings))
    assert chosen.isfinite().nonzero().flatten().tolist() == kept
    assert chosen.exp().sum() == pytest.approx(1)


def test_truncation_keeps_exactly_k_and_the_smallest_set_that_reaches_p() -> None:
    """The logits have many ties, as in bf16."""
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
    ("field", "value"),
    [("temperature", -1.0), ("min_p", 1.1), ("top_k", 0), ("top_p", 0.0), ("guidance", -0.5)],
)
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(Sampling(), **{field: value})  # type: ignore[arg-type]


def test_uniforms_are_fixed_uniform_and_independent() -> None:
    numbers = uniforms(0, torch.arange(64), FIRST, 8, 16)
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
        uniforms(1, torch.arange(64), FIRST, 8, 16),
        uniforms(0, torch.arange(1, 65), FIRST, 8, 16),
        uniforms(0, torch.arange(64), FIRST + 1, 8, 16),
        numbers.roll(1, 1),
        numbers.roll(1, 2),
    ]
    for neighbour in neighbours:
        pair = torch.stack([flat, neighbour.double().flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(n)
    assert torch.equal(uniforms(0, torch.tensor([5]), FIRST, 8, 16)[0], numbers[5])
    assert torch.equal(uniforms(0, torch.tensor([5]), FIRST, 2, 3)[0], numbers[5, :2, :3])
    assert uniforms(-1, torch.tensor([0]), FIRST, 1, 1) == uniforms(
        2**64 - 1, torch.tensor([0]), FIRST, 1, 1
    )


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
