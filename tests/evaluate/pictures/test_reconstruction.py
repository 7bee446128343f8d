from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.evaluate.pictures.flicker import flicker, flicker_shares
from driving_sim.evaluate.pictures.reconstruction import evaluate_tokenizer
from driving_sim.tokenizer.metrics import psnr
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.world_models import new_world


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_means_are_those_of_all_frames(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    of_all = evaluate_tokenizer(world.tokenizer, drives).metrics
    by_drive = [evaluate_tokenizer(world.tokenizer, [drive]).metrics for drive in drives]
    assert of_all["frames"] == sum(metrics["frames"] for metrics in by_drive)
    assert of_all["psnr_db"]["mean"] == pytest.approx(
        np.mean([metrics["psnr_db"]["mean"] for metrics in by_drive])
    )
    frames = drives[0].drive.frames(drives[0].indices)
    tokens = world.tokenizer.encode(frames)
    rebuilt = world.tokenizer.decode(tokens).numpy()
    errors = np.square(rebuilt.astype(float) - frames).mean(axis=(1, 2, 3))
    expected = (10 * np.log10(255**2 / errors)).mean()
    assert by_drive[0]["psnr_db"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert of_all["drives"][drives[0].drive.id]["psnr_db"] == pytest.approx(expected, abs=1e-3)
    # The evaluation works in batches, but it must not lose the pairs between two batches.
    counts = flicker(tokens.numpy(), frames)
    assert counts["cells"] == 12 * (len(frames) - 1)
    assert by_drive[0]["flicker"] == flicker_shares(counts)


def test_bits_per_frame_follow_from_tokens_and_codes(world: WorldModel, videos: Path) -> None:
    drive = sample(find_drives([videos]).drives[0])
    metrics = evaluate_tokenizer(world.tokenizer, [drive]).metrics
    assert metrics["bits_per_frame"] == pytest.approx(12 * np.log2(9))
    assert metrics["compression_factor"] == pytest.approx(48 * 64 * 24 / (12 * np.log2(9)))


def test_the_worst_frames_are_shown_once_for_every_moment(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    section = evaluate_tokenizer(world.tokenizer, drives)
    captions = [part.caption for part in section.parts[2:]]
    assert 4 <= len(captions) <= 6
    psnrs = [float(caption.split(": ")[1].split(" dB")[0]) for caption in captions]
    assert psnrs == sorted(psnrs)
    places = [caption.split(" s:")[0].split(" at ") for caption in captions]
    for name in {name for name, _ in places}:
        times = sorted(float(time) for drive, time in places if drive == name)
        assert (np.diff(times) >= 2 - 0.1).all()  # the times are rounded to 0.1 s
    frames = drives[0].drive.frames(drives[0].indices)
    rebuilt = world.tokenizer.decode(world.tokenizer.encode(frames))
    values = psnr(rebuilt, torch.from_numpy(frames)).numpy()
    worst = drives[0].timestamps[values.argmin()]
    of_first = [float(time) for drive, time in places if drive == drives[0].drive.id]
    assert of_first[0] == pytest.approx(worst, abs=0.06)


def test_intervals_are_over_blocks_of_frames(world: WorldModel, videos: Path) -> None:
    """A single block of 3 s has no interval. The drives here have two blocks each."""
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    section = evaluate_tokenizer(world.tokenizer, drives)
    estimate = section.metrics["psnr_db"]
    assert estimate["low"] < estimate["mean"] < estimate["high"]
    assert section.parts[0].rows[0] == ("PSNR, dB", estimate)  # type: ignore[union-attr]
    short = sample(drives[0].drive)
    cut = replace(
        short,
        indices=short.indices[:20],
        timestamps=short.timestamps[:20],
        actions=short.actions[:20],
        action_valid=short.action_valid[:20],
        segments=[(0, 20)],
    )
    alone = evaluate_tokenizer(world.tokenizer, [cut])
    assert alone.metrics["psnr_db"]["low"] is None
    assert alone.metrics["psnr_db"]["mean"] is not None
