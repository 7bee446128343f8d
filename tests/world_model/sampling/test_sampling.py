from dataclasses import replace
from typing import Any

import pytest
import torch

from driving_sim.world_model.sampling.sampling import Sampling, truncated_log_probs


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
