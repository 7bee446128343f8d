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
    both = evaluate_tokenizer(world.tokenizer, drives).metrics
    apart = [evaluate_tokenizer(world.tokenizer, [drive]).metrics for drive in drives]
    assert both["frames"] == sum(each["frames"] for each in apart)
    assert both["psnr_db"]["mean"] == pytest.approx(
        np.mean([each["psnr_db"]["mean"] for each in apart])
    )
    frames = drives[0].drive.frames(drives[0].indices)
    tokens = world.tokenizer.encode(frames)
    rebuilt = world.tokenizer.decode(tokens).numpy()
    errors = np.square(rebuilt.astype(float) - frames).mean(axis=(1, 2, 3))
    expected = (10 * np.log10(255**2 / errors)).mean()
    assert apart[0]["psnr_db"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert both["drives"][drives[0].drive.id]["psnr_db"] == pytest.approx(expected, abs=1e-3)
    # In batches as in one piece: no pair of frames is lost between two of them.
    whole = flicker(tokens.numpy(), frames)
    assert whole["cells"] == 12 * (len(frames) - 1)
    assert apart[0]["flicker"] == flicker_shares(whole)


def test_what_a_frame_costs_is_its_tokens_and_codes(world: WorldModel, videos: Path) -> None:
    found = evaluate_tokenizer(world.tokenizer, [sample(find_drives([videos]).drives[0])]).metrics
    assert found["bits_per_frame"] == pytest.approx(12 * np.log2(9))
    assert found["compression_factor"] == pytest.approx(48 * 64 * 24 / (12 * np.log2(9)))


def test_the_worst_frames_are_shown_of_every_moment_one(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    section = evaluate_tokenizer(world.tokenizer, drives)
    captions = [part.caption for part in section.parts[2:]]
    assert 4 <= len(captions) <= 6
    shown = [float(caption.split(": ")[1].split(" dB")[0]) for caption in captions]
    assert shown == sorted(shown)
    places = [caption.split(" s:")[0].split(" at ") for caption in captions]
    for name in {name for name, _ in places}:
        times = sorted(float(time) for drive, time in places if drive == name)
        assert (np.diff(times) >= 2 - 0.1).all()  # they are rounded
    frames = drives[0].drive.frames(drives[0].indices)
    rebuilt = world.tokenizer.decode(world.tokenizer.encode(frames))
    values = psnr(rebuilt, torch.from_numpy(frames)).numpy()
    worst = drives[0].timestamps[values.argmin()]
    of_first = [float(time) for drive, time in places if drive == drives[0].drive.id]
    assert of_first[0] == pytest.approx(worst, abs=0.06)


def test_blocks_of_neighbours_are_the_units_and_count_by_their_frames(
    world: WorldModel, videos: Path
) -> None:
    """Of one block, 3 s, nothing is known but itself; the drives here have two blocks each."""
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    section = evaluate_tokenizer(world.tokenizer, drives)
    found = section.metrics["psnr_db"]
    assert found["low"] < found["mean"] < found["high"]
    assert section.parts[0].rows[0] == ("psnr_db", found)  # type: ignore[union-attr]
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
