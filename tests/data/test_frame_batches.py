"""Batches depend only on (seed, n), and all frames are equally likely, cached or not."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from driving_sim.data.drive import Drive, SampledDrive, VideoFrames, sample
from driving_sim.data.frame_batches import FrameBatches
from driving_sim.data.video.file_facts import read_facts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from tests.fixtures.video_files import HEIGHT, WIDTH, damage, read_numbers, write_numbered

SIZE = FrameSize(height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> list[SampledDrive]:
    """Every second frame of two videos with 20 and 12 frames: only even numbers."""
    folder = tmp_path_factory.mktemp("drives")
    sampled = []
    for name, count in (("a", 20), ("b", 12)):
        facts = read_facts(write_numbered(folder / f"{name}.mp4", count=count))
        drive = Drive(
            id=name, source="video", timestamps=facts.timestamps, reader=VideoFrames(facts)
        )
        sampled.append(sample(drive, every=2))
    return sampled


def batches(
    drives: list[SampledDrive],
    *,
    seed: int = 0,
    mirror: bool = False,
    shift: int = 0,
    gain: float = 0.0,
    cutmix: float = 0.0,
    cached: bool = True,
    shared: bool = False,
) -> FrameBatches:
    return FrameBatches(
        drives,
        size=SIZE,
        batch_size=6,
        seed=seed,
        mirror=mirror,
        shift=shift,
        gain=gain,
        cutmix=cutmix,
        shared=shared,
        cache_bytes=10**9 if cached else 0,
    )


@pytest.mark.parametrize("cached", [True, False])
def test_batch_is_a_function_of_seed_and_number(drives: list[SampledDrive], cached: bool) -> None:
    first, again = batches(drives, cached=cached), batches(drives, cached=cached)
    frames = first[3]["frames"]
    assert frames.shape == (6, HEIGHT, WIDTH, 3)
    assert frames.dtype == torch.uint8
    assert torch.equal(again[3]["frames"], frames)
    assert not torch.equal(first[4]["frames"], frames)
    assert not torch.equal(batches(drives, seed=1, cached=cached)[3]["frames"], frames)


@pytest.mark.parametrize("cached", [True, False])
def test_all_chosen_frames_come_and_no_others(drives: list[SampledDrive], cached: bool) -> None:
    dataset = batches(drives, cached=cached)
    numbers = [number for n in range(40) for number in read_numbers(dataset[n]["frames"].numpy())]
    assert dataset.frame_count == 16
    assert set(numbers) == set(range(0, 20, 2))
    # Numbers below 12 are in both drives, so they come twice as often as larger ones.
    shared = np.mean([number < 12 for number in numbers])
    assert shared == pytest.approx(12 / 16, abs=0.1)


def test_mirror_flips_half_of_the_frames(drives: list[SampledDrive]) -> None:
    plain, mirrored = batches(drives), batches(drives, mirror=True)
    flips = []
    for n in range(20):
        for frame, other in zip(plain[n]["frames"], mirrored[n]["frames"], strict=True):
            same, flipped = torch.equal(frame, other), torch.equal(frame.flip(1), other)
            assert same or flipped
            flips.append(flipped)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.15)


def test_frames_are_moved_and_their_edges_reflected(drives: list[SampledDrive]) -> None:
    plain, moved = batches(drives), batches(drives, shift=2)
    seen = set()
    for n in range(20):
        for frame, other in zip(plain[n]["frames"], moved[n]["frames"], strict=True):
            padded = np.pad(frame.numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
            places = [
                (y, x)
                for y in range(5)
                for x in range(5)
                if np.array_equal(padded[y : y + HEIGHT, x : x + WIDTH], other)
            ]
            assert places
            seen.add(places[0])
    assert len(seen) > 15


def test_brightness_changes_by_colour_within_its_limit(drives: list[SampledDrive]) -> None:
    plain, changed = batches(drives), batches(drives, gain=0.2)
    for n in range(20):
        before, after = plain[n]["frames"].float(), changed[n]["frames"].float()
        assert ((after - before).abs() <= 0.2 * before + 1).all()
        assert not torch.equal(before, after)


def test_brightness_is_clipped_at_white(drives: list[SampledDrive]) -> None:
    plain, changed = batches(drives)[0]["frames"], batches(drives, gain=0.9)[0]["frames"]
    assert (changed == 255).any()
    for before, after in zip(plain, changed, strict=True):
        for channel in range(3):
            darkest_first = before[..., channel].flatten().argsort()
            assert (after[..., channel].flatten()[darkest_first].int().diff() >= 0).all()


def seams(drives: list[SampledDrive], share: float) -> list[int]:
    """Return the columns from which frames show the batch's next frame, if they are visible."""
    plain, mixed = batches(drives), batches(drives, cutmix=share)
    columns = []
    for n in range(40):
        before = plain[n]["frames"]
        following = before.roll(-1, dims=0)
        for frame, other, result in zip(before, following, mixed[n]["frames"], strict=True):
            if not torch.equal(frame, result):
                joined = [torch.cat([frame[:, :x], other[:, x:]], 1) for x in range(1, WIDTH)]
                columns.append([torch.equal(result, candidate) for candidate in joined].index(True))
    return columns


def test_cutmix_mixes_its_share_of_the_frames(drives: list[SampledDrive]) -> None:
    half, full = seams(drives, 0.5), seams(drives, 1.0)
    assert len(half) / len(full) == pytest.approx(0.5, abs=0.15)
    assert len(set(full)) > 10


def test_batches_do_not_write_into_the_cache(drives: list[SampledDrive]) -> None:
    dataset = batches(drives, shift=2, gain=0.2, cutmix=0.5)
    before = dataset[0]["frames"].clone()
    dataset[0]["frames"].zero_()
    assert torch.equal(dataset[0]["frames"], before)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_give_the_same_batches(drives: list[SampledDrive], start: str) -> None:
    dataset = batches(drives, mirror=True)
    loader = DataLoader(
        dataset, batch_size=None, sampler=range(5, 9), num_workers=2, multiprocessing_context=start
    )
    loaded = [batch["frames"] for batch in loader]
    assert all(
        torch.equal(frames, dataset[n]["frames"])
        for n, frames in zip(range(5, 9), loaded, strict=True)
    )


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_do_not_copy_the_cache(
    drives: list[SampledDrive], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers receive little data, because the frames are in shared memory."""
    monkeypatch.setattr("driving_sim.data.frame_batches._start_method", lambda: start)
    dataset = batches(drives, shared=True)
    cache: Any = dataset._cache
    assert cache.is_shared() == (start == "spawn")
    sent = ForkingPickler.dumps(dataset)
    assert cache.is_shared()
    assert len(sent) < cache.nbytes / 10


def test_too_little_shared_memory_is_an_error(
    drives: list[SampledDrive], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr("driving_sim.data.frame_batches._start_method", lambda: "spawn")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DriveSimError, match=r"do not fit in shared memory .*training.workers=0"):
        batches(drives, shared=True)
    batches(drives)  # Without workers the cache is not shared.


def test_cached_drives_are_not_read_again(
    drives: list[SampledDrive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = batches(drives)
    monkeypatch.setattr(Drive, "frames", None)
    monkeypatch.setattr(Drive, "stream", None)
    assert len(read_numbers(dataset[0]["frames"].numpy())) == 6


def test_no_frames_is_an_error() -> None:
    with pytest.raises(DriveSimError, match="no frames"):
        batches([])


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_is_not_larger_than_the_data(
    drives: list[SampledDrive], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drive, "stream", None)  # The error comes before anything is decoded.
    with pytest.raises(DriveSimError, match=r"data\.batch_size=6: there are only 5 frames .*lower"):
        batches([sample(drives[0].drive, every=4)], cached=cached)


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_frames_are_never_drawn(tmp_path: Path, cached: bool) -> None:
    """The decoder conceals the damage of keyframe 24, so only some readers notice it."""
    facts = read_facts(damage(write_numbered(tmp_path / "x.mp4", count=60), 24, 24))
    drive = Drive(id="x", source="video", timestamps=facts.timestamps, reader=VideoFrames(facts))
    lost = {number for number, frame in enumerate(drive.stream_with_losses()) if frame is None}
    assert set(range(24, 36)) <= lost
    dataset = batches([sample(drive)], cached=cached)
    drawn = {number for n in range(20) for number in read_numbers(dataset[n]["frames"].numpy())}
    assert drawn <= set(range(60)) - lost
    assert {*map(bool, (drawn & set(range(20)), drawn & set(range(36, 60))))} == {True}
