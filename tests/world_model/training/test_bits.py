import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model.training.bits import (
    FullWindows,
    TokenBits,
    bits_per_token,
    streamed_bits_per_token,
    streamed_token_bits,
)
from tests.fixtures.token_drives import write_store
from tests.fixtures.world_models import CONFIG, random_model

W = CONFIG.context_frames


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("bits") / "tokens", (11, 8), gap_at=6)


def by_place(measured: object) -> dict[tuple[int, int], float]:
    return {
        (int(d), int(f)): float(b)
        for d, f, b in zip(measured.drive, measured.frame, measured.bits, strict=True)  # type: ignore[attr-defined]
    }


def test_every_frame_with_a_full_window_is_judged_once(store: TokenStore) -> None:
    windows = FullWindows(store.drives, frames=W)
    measured = bits_per_token(random_model(), windows)
    expected = {(0, f) for f in [2, 3, 4, 5, 8, 9, 10]} | {(1, f) for f in [2, 3, 4, 5]}
    assert set(by_place(measured)) == expected
    assert len(measured.bits) == len(windows) == len(expected)


def test_bits_are_those_of_the_window_alone(store: TokenStore) -> None:
    model = random_model()
    windows = FullWindows(store.drives, frames=W)
    measured = bits_per_token(model, windows, batch_size=3)
    for n in range(len(windows)):
        batch = windows.load(np.array([n]))
        with torch.no_grad():
            log_probs = model(**batch)[0, -1].log_softmax(-1)
        bits = -log_probs.gather(-1, batch["tokens"][0, -1].unsqueeze(-1)).mean() / math.log(2)
        assert measured.bits[n] == pytest.approx(bits.item(), abs=1e-5)
    assert measured.mean == pytest.approx(measured.bits.mean())


def test_streamed_bits_equal_recomputed_ones_until_a_frame_has_left(store: TokenStore) -> None:
    model = random_model()
    streamed = by_place(streamed_bits_per_token(model, store.drives))
    assert len(streamed) == sum(len(drive) for drive in store.drives)
    windows = by_place(bits_per_token(model, FullWindows(store.drives, frames=W)))
    for place in [(0, W - 1), (0, 6 + W - 1), (1, W - 1)]:
        assert streamed[place] == pytest.approx(windows[place], abs=1e-4)
    assert streamed[(0, W)] != pytest.approx(windows[(0, W)], abs=1e-5)


def test_streaming_part_of_each_run_gives_the_same_bits(store: TokenStore) -> None:
    model = random_model()
    all_bits = by_place(streamed_bits_per_token(model, store.drives))
    part = by_place(streamed_bits_per_token(model, store.drives, first=4, stop=5))
    assert part == {place: all_bits[place] for place in [(0, 4), (0, 10), (1, 4)]}
    # `stop` has no effect on runs that are shorter.
    assert by_place(streamed_bits_per_token(model, store.drives, stop=7)) == all_bits
    assert not len(streamed_bits_per_token(model, store.drives, first=6).bits)


def test_streamed_variants_of_the_actions_have_their_own_bits(store: TokenStore) -> None:
    model = random_model()
    drive = store.drives[1]
    own = drive.actions[:6]
    variants = np.stack([own, own * np.array([1, -1], np.float32), own, own])
    variants[2, 3] += 1.0  # leads to frame 4
    valid = np.repeat(drive.action_valid[None, :6], 4, axis=0)
    valid[3, 3] = False
    run = streamed_token_bits(model, drive.tokens[:6], variants, valid)
    bits = np.stack([frame.means()[0] for frame in run], axis=1)
    frames = streamed_bits_per_token(model, [drive])
    assert bits[0] == pytest.approx(frames.bits[:6], abs=1e-5)
    assert (bits[1, 1:] != bits[0, 1:]).any()
    for variant in (2, 3):
        assert bits[variant, :4] == pytest.approx(bits[0, :4], abs=1e-5)
        assert bits[variant, 4] != pytest.approx(bits[0, 4], abs=1e-5)


def test_token_bits_follow_from_the_models_probabilities(store: TokenStore) -> None:
    """Both when streamed and in windows."""
    model, drive = random_model(), store.drives[1]
    actions, valid = drive.actions[None, :W], drive.action_valid[None, :W]
    *_, streamed = streamed_token_bits(model, drive.tokens[:W], actions, valid)
    watched: list[TokenBits] = []
    windows = FullWindows([drive], frames=W)
    frame_bits = bits_per_token(model, windows, batch_size=3, watch=watched.append)
    batch = windows.load(np.array([0]))
    with torch.no_grad():
        chances = rearrange(model(**batch)[0, -1].softmax(-1), "r c k -> (r c) k").numpy()
    tokens = drive.tokens[W - 1].ravel()
    for judged in (streamed, watched[0]):
        cost = -np.log2(chances[np.arange(len(tokens)), tokens])
        assert judged.bits[0].numpy() == pytest.approx(cost, abs=1e-4)
        assert judged.right[0].tolist() == (chances.argmax(-1) == tokens).tolist()
        assert judged.confidence[0].numpy() == pytest.approx(chances.max(-1), abs=1e-5)
    means = np.concatenate([judged.means() for judged in watched], axis=1)
    assert np.array_equal(means, [frame_bits.bits, frame_bits.accuracy])


def test_streaming_reads_tokens_one_frame_at_a_time(store: TokenStore) -> None:
    model, drive = random_model(), store.drives[1]
    taken = []

    def frames() -> Iterator[torch.Tensor]:
        for frame in drive.tokens:
            taken.append(frame)
            yield torch.from_numpy(frame.astype(np.int64))

    actions, valid = drive.actions[None], drive.action_valid[None]
    for number, _ in enumerate(streamed_token_bits(model, frames(), actions, valid), 1):
        assert len(taken) == number
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad
    with pytest.raises(ValueError, match="zip"):
        list(streamed_token_bits(model, drive.tokens[:4], actions, valid))


def test_drives_shorter_than_a_window_are_an_error(tmp_path: Path) -> None:
    drives = write_store(tmp_path / "tokens", (2, 2)).drives
    with pytest.raises(DriveSimError, match="no window of 3 frames"):
        FullWindows(drives, frames=W)
