from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.tokens.store import TokenStore
from driving_sim.world_model.training.baselines import _STRENGTHS, CopyLast, TimeBigram, Unigram
from driving_sim.world_model.training.bits import FullWindows
from tests.fixtures.token_drives import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("baselines") / "tokens", (60, 50), gap_at=20)


def test_unigram_is_the_frequency_of_each_code(store: TokenStore) -> None:
    unigram = Unigram.fit(store.drives)
    counts = np.bincount(
        np.concatenate([drive.tokens.ravel() for drive in store.drives]), minlength=9
    )
    assert np.allclose(unigram.probabilities, counts / counts.sum(), atol=1e-3)
    assert unigram.probabilities.sum() == pytest.approx(1)
    windows = FullWindows(store.drives, frames=3)
    measured = unigram.bits_per_token(windows)
    assert len(measured.bits) == len(windows)
    first = store.drives[0].tokens[windows.frame[0]]
    assert measured.bits[0] == pytest.approx(-np.log2(unigram.probabilities[first]).mean())


def test_copy_last_takes_the_most_likely_share_of_changes(store: TokenStore) -> None:
    fitted = CopyLast.fit(store.drives)
    windows = FullWindows(store.drives, frames=2)  # all pairs of adjacent frames
    best = fitted.bits_per_token(windows).mean
    for change in np.linspace(0.01, 0.99, 25):
        assert CopyLast(fitted.unigram, change).bits_per_token(windows).mean >= best - 1e-9
    assert 0 < fitted.change < 1


def test_copy_last_mixes_the_frame_before_with_the_unigram(store: TokenStore) -> None:
    unigram = Unigram.fit(store.drives)
    windows = FullWindows(store.drives, frames=4)
    measured = CopyLast(unigram, 0.3).bits_per_token(windows)
    n = 7
    drive, frame = store.drives[windows.drive[n]], windows.frame[n]
    now, last = drive.tokens[frame], drive.tokens[frame - 1]
    expected = -np.log2(0.3 * unigram.probabilities[now] + 0.7 * (now == last)).mean()
    assert measured.bits[n] == pytest.approx(expected)
    assert measured.accuracy[n] == pytest.approx((now == last).mean())
    everything_new = CopyLast(unigram, 1.0).bits_per_token(windows).bits
    assert np.allclose(everything_new, unigram.bits_per_token(windows).bits)


def pair_counts(store: TokenStore) -> NDArray[np.float64]:
    """Return how often each code was followed by each code, [9, 9]."""
    counts = np.zeros((9, 9))
    for drive in store.drives:
        for begin, stop in drive.entry.segments:
            tokens = drive.tokens[begin:stop]
            np.add.at(counts, (tokens[:-1].ravel(), tokens[1:].ravel()), 1)
    return counts


def test_bigram_counts_what_followed_each_code(store: TokenStore) -> None:
    fitted = TimeBigram.fit(store.drives)
    counts = pair_counts(store)
    prior = fitted.strength * fitted.unigram.probabilities
    table = (counts + prior) / (counts.sum(1, keepdims=True) + fitted.strength)
    assert np.allclose(table.sum(1), 1)
    windows = FullWindows(store.drives, frames=3)
    measured = fitted.bits_per_token(windows)
    now, last = windows.last_frames()
    assert np.allclose(measured.bits, -np.log2(table[last, now]).mean(1))
    assert np.allclose(measured.accuracy, (table.argmax(1)[last] == now).mean(1))


def test_bigram_has_the_strength_that_best_predicts_each_pair_from_the_others(
    store: TokenStore,
) -> None:
    """Each pair is left out of the counts; otherwise the smallest strength would always be best."""
    fitted = TimeBigram.fit(store.drives)
    counts = pair_counts(store)
    likelihood = {}
    for strength in _STRENGTHS:
        likelihood[strength] = 0.0
        for before, after in np.argwhere(counts):
            others = counts.copy()
            others[before, after] -= 1
            prior = strength * fitted.unigram.probabilities[after]
            predicted = (others[before, after] + prior) / (others[before].sum() + strength)
            likelihood[strength] += counts[before, after] * np.log(predicted)
        left_out = replace(fitted, strength=strength)._left_out_likelihood()
        assert left_out == pytest.approx(likelihood[strength])
    assert fitted.strength == max(likelihood, key=likelihood.__getitem__) > min(_STRENGTHS)


def test_bigram_learns_a_rule_that_copying_cannot(tmp_path: Path) -> None:
    """Every code c is followed by code c + 1."""
    store = write_store(tmp_path / "tokens", (30,))
    drive = store.drives[0]
    counting = (drive.tokens[:1] + np.arange(30)[:, None, None]) % 9

    class Counting:
        info, entry, tokens = drive.info, drive.entry, counting

        def __len__(self) -> int:
            return 30

    fitted = TimeBigram.fit([Counting()])  # type: ignore[list-item]
    size = len(fitted.totals)
    after = np.arange(size)
    assert np.allclose(fitted._probability(after, (after + 1) % size, 0), 1, atol=0.05)
    assert (fitted._most_probable() == (after + 1) % size).all()


def test_copying_a_still_world_costs_almost_no_bits(tmp_path: Path) -> None:
    store = write_store(tmp_path / "tokens", (30,))
    still = store.drives[0]
    frozen = np.repeat(still.tokens[:1], 30, axis=0)

    class Still:
        info, entry, tokens = still.info, still.entry, frozen

        def __len__(self) -> int:
            return 30

    drives = [Still()]
    fitted = CopyLast.fit(drives)  # type: ignore[arg-type]
    assert 0 < fitted.change < 1e-6
