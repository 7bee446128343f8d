import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.futures.nearest import (
    DISTANCE,
    EARLY,
    LATE,
    PSNR,
    Futures,
    judge,
    pairwise_psnr,
    score,
    windows,
)
from driving_sim.tokenizer.metrics import psnr

NAMES = ["brake", "left", "right"]
Frames = NDArray[np.uint8]


def futures(model: list[int], truths: Frames, action_free: Frames | None = None) -> Futures:
    """Return futures whose rollout k shows the true future `model[k]`."""
    return Futures(
        recorded=truths,
        reconstructed=truths,
        model=truths[model],
        action_free=truths[0] if action_free is None else action_free,
    )


@pytest.fixture
def truths() -> Frames:
    return np.random.default_rng(0).integers(256, size=(3, 20, 16, 16, 3), dtype=np.uint8)


def scores_of(all_futures: list[Futures], source: str, window: str = EARLY) -> NDArray[np.float64]:
    judged = windows(10.0, 20)
    return np.stack([score(of, judged, None)[PSNR][window][source] for of in all_futures])


def test_the_windows_are_the_second_around_one_and_the_last_one() -> None:
    assert windows(10.0, 30) == {EARLY: slice(5, 15), LATE: slice(20, 30)}
    assert windows(8.0, 12) == {EARLY: slice(4, 12), LATE: slice(4, 12)}
    assert windows(0.7, 2)[LATE] == slice(1, 2)


def test_a_perfect_model_is_always_nearest_and_swapped_actions_are_found(truths: Frames) -> None:
    perfect = [futures([0, 1, 2], truths)] * 4
    judged = judge(scores_of(perfect, "model"), NAMES, higher_is_nearer=True)
    assert judged["nearest_count"] == 12
    assert judged["nearest"] == {"mean": 1, "low": 1, "high": 1}
    assert {pair["mean"] for pair in judged["pairs"].values()} == {1}
    swapped = [futures([0, 2, 1], truths)] * 4
    judged = judge(scores_of(swapped, "model"), NAMES, higher_is_nearer=True)
    assert judged["nearest_count"] == 4
    assert judged["pairs"]["left/right"] == {"mean": 0, "low": 0, "high": 0}
    assert list(judged["pairs"]) == ["brake/left", "brake/right", "left/right"]
    assert judged["table"]["left"]["right"] > judged["table"]["left"]["left"]


def test_a_model_that_ignores_its_actions_is_like_one_without(truths: Frames) -> None:
    """A single rollout for all futures of a start is nearest to one of them."""
    ignoring = [futures([n, n, n], truths, action_free=truths[n]) for n in (0, 1, 1, 2)]
    for source in ("model", "action_free"):
        judged = judge(scores_of(ignoring, source), NAMES, higher_is_nearer=True)
        assert judged["nearest_count"] == 4
        assert {pair["mean"] for pair in judged["pairs"].values()} == {0.5}
        assert judged["own"]["mean"] == pytest.approx(judged["other"]["mean"])


def test_true_futures_that_are_alike_cannot_be_told_apart(truths: Frames) -> None:
    truths[2] = truths[1]
    judged = judge(
        scores_of([futures([0, 1, 2], truths)], "reconstructed"), NAMES, higher_is_nearer=True
    )
    assert judged["nearest_count"] == 1
    assert judged["pairs"]["left/right"]["mean"] == 0
    assert judged["nearest"] == {"mean": 1 / 3, "low": None, "high": None}
    json.dumps(judged, allow_nan=False)


def test_only_the_frames_of_the_window_count(truths: Frames) -> None:
    """This model obeys for a second and a half, and then swaps left and right."""
    changing = futures([0, 1, 2], truths)
    changing.model[1:, 10:] = truths[[2, 1], 10:]
    late = scores_of([changing], "model", LATE)
    assert judge(late, NAMES, higher_is_nearer=True)["nearest_count"] == 1
    changing.model[1:, 10:15] = truths[1:, 10:15]
    early = scores_of([changing], "model", EARLY)
    assert judge(early, NAMES, higher_is_nearer=True)["nearest_count"] == 3


def test_a_distance_is_nearer_if_lower_and_compares_with_the_recorded_frames(
    truths: Frames,
) -> None:
    def distance(frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return -pairwise_psnr(frames, others)

    noisy = np.clip(truths.astype(np.int16) + 9, 0, 255).astype(np.uint8)
    perfect = Futures(recorded=truths, reconstructed=noisy, model=truths, action_free=truths[0])
    scores = score(perfect, windows(10.0, 20), distance)
    own = {
        (measure, source): scores[measure][EARLY][source].diagonal().mean()
        for measure in (PSNR, DISTANCE)
        for source in ("model", "reconstructed")
    }
    assert own[DISTANCE, "model"] < own[DISTANCE, "reconstructed"]
    assert own[PSNR, "reconstructed"] > own[PSNR, "model"]
    table = scores[DISTANCE][EARLY]["model"][None]
    assert judge(table, NAMES, higher_is_nearer=False)["nearest_count"] == 3
    assert judge(table, NAMES, higher_is_nearer=True)["nearest_count"] == 0


def test_pairs_of_frames_have_the_psnr_of_each_pair(truths: Frames) -> None:
    frames = torch.from_numpy(truths[0])
    pairs = pairwise_psnr(frames[:2], frames[2:5])
    assert pairs.shape == (2, 3)
    assert pairs[1, 2] == psnr(frames[1:2], frames[4:5])
