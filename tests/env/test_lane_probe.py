from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from driving_sim.data.arrays import Pixels
from driving_sim.data.synthetic.world import SyntheticWorld
from driving_sim.engine.errors import DriveSimError
from driving_sim.env import LaneProbe, train_lane_probe
from driving_sim.env.lane_probe import _Network, lane_views
from tests.fixtures.synthetic_worlds import SMALL

PLAIN = replace(SMALL, palettes=SMALL.palettes[:1])


class Unchanged:
    """A tokenizer that keeps the frames as they are."""

    def encode(self, frames: Pixels) -> Pixels:
        return frames

    def decode(self, tokens: Pixels) -> torch.Tensor:
        return torch.from_numpy(tokens)


TOKENIZER: Any = Unchanged()


@pytest.fixture(scope="module")
def probe() -> LaneProbe:
    return train_lane_probe(TOKENIZER, PLAIN, worlds=30, steps=90)


def test_it_reads_the_offset_left_positive(probe: LaneProbe) -> None:
    views = [lane_views(TOKENIZER, PLAIN, [5, n]) for n in range(8)]
    frames, places = (np.concatenate(parts) for parts in zip(*views, strict=True))
    offset, heading = probe.read(frames)
    constant = np.abs(places[:, 0] - np.median(places[:, 0])).mean()
    assert np.abs(offset - places[:, 0]).mean() < 0.5 * constant
    assert np.corrcoef(offset, places[:, 0])[0, 1] > 0.8
    assert np.corrcoef(heading, places[:, 1])[0, 1] > 0.5
    mirrored, _ = probe.read(frames[:, :, ::-1])  # the lane is then on the other side
    near = np.abs(places[:, 0]) < 1
    assert np.abs(mirrored - offset)[near].mean() > 1


def test_errors_are_measured_on_the_road(probe: LaneProbe) -> None:
    offset, heading = probe.errors(TOKENIZER, PLAIN, worlds=6)
    assert 0.02 < offset < 1.2
    assert 0.005 < heading < 0.2


def test_views_are_on_and_beside_the_lane_and_repeat() -> None:
    world = SyntheticWorld(0, PLAIN)
    frames, places = lane_views(TOKENIZER, PLAIN, 3, views=64)
    assert frames.shape == (64, *world.render(world.reset()).shape)
    assert places.shape == (64, 2)
    assert abs(places[:, 0]).min() < 0.3
    assert places[:, 0].max() > 4
    assert places[:, 0].min() < -2
    again, _ = lane_views(TOKENIZER, PLAIN, 3, views=64)
    assert np.array_equal(frames, again)


def test_it_is_saved_and_loaded(probe: LaneProbe, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    assert path.stat().st_size < 300_000
    frames, _ = lane_views(TOKENIZER, PLAIN, 1, views=70)
    for ours, theirs in zip(LaneProbe.load(path).read(frames), probe.read(frames), strict=True):
        assert ours.shape == (70,)
        assert np.array_equal(ours, theirs)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DriveSimError, match="not a lane probe's weights"):
        LaneProbe.load(path)


def test_training_depends_only_on_its_settings() -> None:
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 64, 3), dtype=np.uint8)
    trained = [train_lane_probe(TOKENIZER, PLAIN, worlds=2, steps=2, seed=s) for s in (1, 1, 2)]
    read = [probe.read(pictures)[0] for probe in trained]
    assert np.array_equal(read[0], read[1])
    assert not np.array_equal(read[0], read[2])
    counted: list[int] = []
    train_lane_probe(TOKENIZER, PLAIN, worlds=3, steps=2, advance=counted.append)
    assert sum(counted) == 5
    assert sum(value.numel() for value in _Network().parameters()) < 75_000
