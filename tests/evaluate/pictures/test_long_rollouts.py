import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.evaluate.footage import Clip, Footage, footage_of
from driving_sim.evaluate.pictures import long_rollouts
from driving_sim.evaluate.pictures.long_rollouts import (
    _onward,
    evaluate_stability,
    mean_stability,
)
from driving_sim.evaluate.pictures.stability import (
    Appearance,
    RealFootage,
    StabilityConfig,
    sharpness,
)
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.world_models import new_world

QUICK = StabilityConfig(block_s=1.0, hop_s=0.5, min_lag_s=0.5, max_lag_s=2.0, loop_s=0.5)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_actions_continue_to_the_end_of_the_segment_and_start_again(
    world: WorldModel, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "tokens", [40], gap_at=15)
    footage = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    clip = Clip(footage=footage, start=20, context_frames=4, frames=1)
    actions, valid = _onward(clip, 50)
    recorded = store.drives[0].actions
    # Frames 15 to 39 are one segment. Its last action leads to no frame.
    assert np.array_equal(actions[:20], recorded[19:39])
    assert np.array_equal(actions[20:44], recorded[15:39])
    assert np.array_equal(actions[44:], recorded[15:21])
    assert valid.all()


def test_one_rollout_from_every_start_is_judged(world: WorldModel, tmp_path: Path) -> None:
    store = write_store(tmp_path / "tokens", (60, 60), fingerprint=world.tokenizer.fingerprint)
    footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
    starts = [Clip(footage=drive, start=10, context_frames=4, frames=1) for drive in footage]
    section = evaluate_stability(
        world, starts, footage, seconds=6.0, sampling=Sampling(), config=QUICK
    )
    metrics = section.metrics
    assert metrics["rollouts"] == 2
    assert metrics["collapsed"] + metrics["lasted"] == 2
    assert metrics["seconds"] == 6.0
    assert list(metrics["starts"]) == [clip.name for clip in starts]
    greedy = evaluate_stability(
        world, starts, footage, seconds=6.0, sampling=Sampling(temperature=0), config=QUICK
    ).metrics
    # With random weights, the most likely tokens repeat over and over, so the histogram drifts.
    assert greedy["drift_bits"] > metrics["drift_bits"]
    assert len(section.parts) == 3
    assert metrics["sharpness_reference"] == "reconstructed"
    assert metrics["sharpness_floor_ratio"] is None
    assert "sharpness, relative to real frames after the tokenizer" in labels(section)
    first = next(iter(metrics["starts"].values()))
    assert pytest.approx(len(first["sharpness"]["ratio"])) == FPS * 6


def test_the_recorded_frames_are_the_reference_of_sharpness(
    world: WorldModel, videos: Path, tmp_path: Path
) -> None:
    drive_set = find_drives([videos])
    sampled = [sample(drive, fps=FPS) for drive in drive_set.drives]
    tokenize(drive_set, world.tokenizer, tmp_path / "tokens", fps=FPS, every=None)
    store = TokenStore(tmp_path / "tokens")
    footage = footage_of(store.drives, sampled, world.tokenizer)
    starts = [Clip(footage=footage[0], start=10, context_frames=4, frames=1)]
    section = evaluate_stability(
        world, starts, footage, seconds=2.0, sampling=Sampling(), config=QUICK
    )
    recorded = sharpness(np.concatenate([drive.frames(0, len(drive.drive)) for drive in footage]))
    tokens = np.concatenate([drive.tokens for drive in store.drives])
    decoded = sharpness(world.tokenizer.decode(tokens).numpy())
    metrics = section.metrics
    assert metrics["sharpness_reference"] == "recorded"
    floor = np.median(decoded) / np.median(recorded)
    assert metrics["sharpness_floor_ratio"] == pytest.approx(floor)
    judged = metrics["starts"][starts[0].name]["sharpness"]
    assert judged["reference_grey_levels"] == pytest.approx(np.median(recorded))
    assert judged["thresholds"]["low"] < floor < judged["thresholds"]["high"]
    assert "sharpness, relative to recorded frames" in labels(section)


def labels(section: Section) -> list[object]:
    return [row[0] for part in section.parts if isinstance(part, Table) for row in part.rows]


def test_the_futures_do_not_depend_on_how_many_are_generated_together(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "tokens", (60, 60, 60), fingerprint=world.tokenizer.fingerprint)
    footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
    starts = [Clip(footage=drive, start=10, context_frames=4, frames=1) for drive in footage]
    actions, valid = map(np.stack, zip(*(_onward(clip, 8) for clip in starts), strict=True))
    together = long_rollouts._roll_out(world, starts, actions, valid, Sampling())
    monkeypatch.setattr(long_rollouts, "BATCH", 2)
    apart = long_rollouts._roll_out(world, starts, actions, valid, Sampling())
    assert together.shape[:2] == (3, 8)
    assert np.array_equal(together, apart)


def test_the_mean_over_rollouts() -> None:
    """The first rollout is as good as the real footage. The second freezes after 15 s."""
    rng = np.random.default_rng(0)

    def appearance(seed: int, frozen_from: int) -> Appearance:
        tokens = np.random.default_rng(seed).integers(9, size=(320, 3, 4))
        change: NDArray[np.float64] = rng.uniform(0.1, 0.2, 320)
        change[frozen_from:] = 0.0
        return Appearance(tokens, np.ones(320), change, np.ones(320, np.bool_))

    bounds = RealFootage([appearance(0, 320)], FPS, QUICK)
    mean = mean_stability([bounds.judge(appearance(1, 320)), bounds.judge(appearance(2, 120))])
    assert mean["rollouts"] == 2
    assert mean["collapsed"] == mean["lasted"] == mean["froze"] == 1
    assert mean["mean_lasted_s"] == (40 + 15) / 2
    assert mean["mean_lasted_s_interval"] == {"low": 15, "high": 40}
    assert mean["frozen_share"] == mean["fault_shares"]["frozen"] == 200 / 320 / 2
    assert mean["longest_freeze_s"] == 25
    assert mean["looped"] == 0
    blink = appearance(3, 320)
    blink.change[50:60] = 0.0  # Shorter than `hold_s`, so it does not count as a freeze.
    assert mean_stability([bounds.judge(blink)])["froze"] == 0
    json.dumps(mean, allow_nan=False)
