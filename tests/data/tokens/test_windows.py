import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.tokens.index import frame_bytes
from driving_sim.data.tokens.plan import PlannedDrive, StorePlan
from driving_sim.data.tokens.store import StoreInfo, TokenStore
from driving_sim.data.tokens.windows import (
    TokenWindows,
    WindowIndex,
    sequential_windows,
)
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.data.video.frame_rate import choose_frames
from driving_sim.engine.errors import DriveSimError

LENGTHS = {"a": 9, "long": 30, "gap": 12, "short": 2}
GAP_AT = 5
SPLIT_AT = 20


def label(drive: int, frame: int) -> int:
    return 100 * drive + frame


def write_store(out: Path, first: int = 0) -> TokenStore:
    """Write drives whose tokens and actions encode the number of drive and frame.

    Drives are numbered from `first` on.
    """
    info = StoreInfo(tokenizer_fingerprint="f00d", rows=1, cols=2, codebook_size=800, fps=10.0)
    plan = StorePlan(
        info=info,
        drives=tuple(PlannedDrive(id=name, frames=n) for name, n in LENGTHS.items()),
        shard_bytes=SPLIT_AT * frame_bytes(1, 2),
    )
    with TokenStoreWriter(out, plan) as writer:
        for drive, (name, n) in enumerate(LENGTHS.items(), first):
            labels = label(drive, 0) + np.arange(n)
            times = np.arange(n) / 10
            times[GAP_AT:] += 0.1 if name == "gap" else 0.0
            actions = np.stack([labels, -labels], 1)
            valid = np.stack([labels >= 0, labels % 3 > 0], 1)
            tokens = np.tile(labels[:, None, None], (1, 1, 2))
            writer.add(name, tokens, actions, valid, times, choose_frames(times).segments)
        writer.finish()
    return TokenStore(out)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("store") / "tokens")


def check(batch: dict[str, torch.Tensor], frames: int) -> None:
    """Check that frames are consecutive, with the actions that lead from one to the next."""
    for b in range(len(batch["tokens"])):
        first = int(batch["tokens"][b, 0, 0, 0])
        expected = torch.arange(first, first + frames)
        assert (batch["tokens"][b] == expected[:, None, None]).all()
        came_from = expected - 1
        begin = 0 if batch["has_previous"][b] else 1
        valid = torch.stack([came_from >= 0, came_from % 3 > 0], 1)
        assert (batch["action_valid"][b, begin:] == valid[begin:]).all()
        values = torch.where(valid, torch.stack([came_from, -came_from], 1), 0).float()
        assert (batch["actions"][b, begin:] == values[begin:]).all()
        if batch["has_previous"][b]:
            assert (batch["previous"][b] == first - 1).all()
        else:
            assert not batch["action_valid"][b, 0].any()
            assert not batch["actions"][b, 0].any()
            assert not batch["previous"][b].any()


@pytest.mark.parametrize("frames", [1, 3, 9])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_index_has_all_windows_that_cross_neither_a_drive_nor_a_gap(
    store: TokenStore, frames: int, stride: int
) -> None:
    runs = [(0, 0, 9), (1, 0, 20), (1, 21, 30), (2, 0, 5), (2, 5, 12), (3, 0, 2)]
    expected = [
        label(drive, start)
        for drive, begin, stop in runs
        for start in range(begin, stop - frames + 1, stride)
    ]
    index = WindowIndex(store.drives, frames=frames, stride=stride)
    batch = index.load(np.arange(len(index)))
    assert batch["tokens"][:, 0, 0, 0].tolist() == expected
    check(batch, frames)
    # Frame 120 is not expected: the drive is split there, and frame 121 has a frame before it.
    without_previous = {first for first in expected if first in (0, 100, 200, 205, 300)}
    assert set(batch["tokens"][~batch["has_previous"], 0, 0, 0].tolist()) == without_previous
    for outside in (-1, len(index)):
        with pytest.raises(IndexError):
            index.load(np.array([outside]))


def test_a_batch_is_a_function_of_seed_and_number_alone(store: TokenStore) -> None:
    def windows(seed: int) -> TokenWindows:
        return TokenWindows(store.drives, frames=4, batch_size=3, seed=seed)

    first = windows(1)
    expected = [first[n] for n in range(6)]
    again = windows(1)
    for n in (5, 0, 3):
        for name, value in again[n].items():
            assert value.equal(expected[n][name]), name
    assert not windows(2)[0]["tokens"].equal(expected[0]["tokens"])
    assert not expected[1]["tokens"].equal(expected[0]["tokens"])


def test_random_batches_reach_every_window(store: TokenStore) -> None:
    windows = TokenWindows(store.drives, frames=4, batch_size=16)
    seen: set[int] = set()
    for n in range(40):
        batch = windows[n]
        check(batch, 4)
        seen.update(batch["tokens"][:, 0, 0, 0].tolist())
    assert len(seen) == len(windows.index)


def test_windows_of_several_stores_make_one_batch(store: TokenStore, tmp_path: Path) -> None:
    second = write_store(tmp_path / "tokens", first=4)
    index = WindowIndex([store.drives[0], second.drives[3], second.drives[0]], frames=2)
    batch = index.load(np.array([0, 12, 25, 8, 3]))
    check(batch, 2)
    assert batch["tokens"][:, 0, 0, 0].tolist() == [0, 605, 407, 600, 3]


def test_another_process_loads_the_same_batches(store: TokenStore) -> None:
    windows = TokenWindows(store.drives, frames=4, batch_size=3)
    expected = windows[2]
    travelled = pickle.loads(pickle.dumps(windows))
    assert all(value.equal(expected[name]) for name, value in travelled[2].items())


def test_a_batch_has_the_documented_types_and_shapes(store: TokenStore) -> None:
    batch = TokenWindows(store.drives, frames=4, batch_size=3)[0]
    forms = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    assert forms == {
        "tokens": (torch.int64, (3, 4, 1, 2)),
        "previous": (torch.int64, (3, 1, 2)),
        "has_previous": (torch.bool, (3,)),
        "actions": (torch.float32, (3, 4, 2)),
        "action_valid": (torch.bool, (3, 4, 2)),
    }
    assert all(value.is_contiguous() for value in batch.values())


def test_sequential_windows_lie_side_by_side(store: TokenStore) -> None:
    batches = list(sequential_windows(store.drives, frames=4, batch_size=5))
    assert [len(batch["tokens"]) for batch in batches] == [5, 5, 1]
    firsts = torch.cat([batch["tokens"][:, 0, 0, 0] for batch in batches]).tolist()
    assert firsts == [0, 4, *range(100, 120, 4), 121, 125, 200, 205]
    for batch in batches:
        check(batch, 4)


def test_a_limit_spreads_the_sequential_windows(store: TokenStore) -> None:
    (batch,) = sequential_windows(store.drives, frames=4, batch_size=5, limit=3)
    assert batch["tokens"][:, 0, 0, 0].tolist() == [0, 104, 121]
    everything = list(sequential_windows(store.drives, frames=4, batch_size=50, limit=1000))
    assert sum(len(batch["tokens"]) for batch in everything) == 11


def test_only_the_selected_drives_are_used(store: TokenStore) -> None:
    (batch,) = sequential_windows(store.select(["gap"]), frames=5, batch_size=9)
    assert batch["tokens"][:, 0, 0, 0].tolist() == [200, 205]


def test_a_window_longer_than_every_drive_is_an_error(store: TokenStore) -> None:
    with pytest.raises(DriveSimError, match="at most 20 frames follow one another"):
        TokenWindows(store.drives, frames=21, batch_size=1)
    with pytest.raises(DriveSimError, match="no window of 21 frames in "):
        sequential_windows(
            store.drives, frames=21, batch_size=1
        )  # the call raises, not the iterator
    with pytest.raises(ValueError, match="at least 1"):
        WindowIndex(store.drives, frames=0)


def test_a_batch_is_not_larger_than_the_data(store: TokenStore) -> None:
    count = len(WindowIndex(store.drives, frames=4))
    TokenWindows(store.drives, frames=4, batch_size=count)
    message = rf"data\.batch_size={count + 1}: there are only {count} windows of 4 frames .*lower"
    with pytest.raises(DriveSimError, match=message):
        TokenWindows(store.drives, frames=4, batch_size=count + 1)


def test_a_token_outside_the_codebook_is_an_error(store: TokenStore) -> None:
    columns = store.shard(0)
    tokens = columns["tokens"]
    columns["tokens"] = np.full_like(tokens, 800)
    try:
        with pytest.raises(DriveSimError, match="token 800"):
            next(sequential_windows(store.drives, frames=4, batch_size=1))
    finally:
        columns["tokens"] = tokens
