import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from einops import rearrange, reduce
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from driving_sim.data.synthetic.drives import drive
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.pictures.stability import (
    Appearance,
    RealFootage,
    StabilityConfig,
    drift_floor,
    jensen_shannon,
    loop_period,
    repetition,
    sharpness,
    time_to_collapse,
    token_drift,
)

FPS = 5.0
SECONDS = 40
COUNT = round(FPS * SECONDS)
BEGIN = 75  # first frame of the planted faults, after 15 s
CONFIG = StabilityConfig()
Frames = NDArray[np.uint8]
Tokens = NDArray[np.int64]


def tokens_of(frames: Frames) -> Tokens:
    """Tokenize frames with 512 codes: the coarse mean colour of every 8 x 8 cell."""
    mean = reduce(frames.astype(float), "n (r h) (c w) rgb -> n r c rgb", "mean", h=8, w=8)
    codes: Tokens = (mean / 32).astype(np.int64) @ np.array([64, 8, 1])
    return codes


def driven(driver_seed: int) -> Frames:
    """Return 40 s of driving; frames below 3 m/s are cut out."""
    world = SyntheticWorld(0, SyntheticConfig(height=48, width=96, fps=FPS))
    synthetic = drive(world, 2 * SECONDS, driver_seed)
    fast = np.flatnonzero(synthetic.actions[:-1, 0] >= 3.0)[:COUNT]
    return np.stack([world.render(synthetic.states[step + 1]) for step in fast])


@pytest.fixture(scope="module")
def real() -> Frames:
    return driven(1)


@pytest.fixture(scope="module")
def bounds(real: Frames) -> RealFootage:
    return RealFootage([Appearance.measure(tokens_of(real), [real])], FPS, CONFIG)


@pytest.fixture(scope="module")
def rollout() -> Frames:
    return driven(2)


def judged(frames: Frames, bounds: RealFootage, moving: Any = None) -> dict[str, Any]:
    return bounds.judge(Appearance.measure(tokens_of(frames), [frames], moving))


def scattered(rollout: Frames) -> Frames:
    """Shuffle all cells from 15 s on: this is noise, but with the same token histogram."""
    cells = rearrange(rollout[BEGIN:], "n (r h) (c w) rgb -> (n r c) h w rgb", h=8, w=8)
    np.random.default_rng(0).shuffle(cells)
    noise = rearrange(cells, "(n r c) h w rgb -> n (r h) (c w) rgb", r=6, c=12)
    return np.concatenate([rollout[:BEGIN], noise])


class TestDrive:
    def test_a_real_drive_has_no_fault(self, rollout: Frames, bounds: RealFootage) -> None:
        result = judged(rollout, bounds)
        assert result["collapse_s"] is None
        assert result["collapsed_by"] == []
        assert set(result["fault_shares"].values()) == {0.0}
        assert result["loops"]["found"] is False
        assert result["loops"]["first_s"] is None

    def test_the_report_is_json(self, rollout: Frames, bounds: RealFootage) -> None:
        result = judged(rollout, bounds)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert len(result["sharpness"]["ratio"]) == len(result["freeze"]["change"]) == COUNT
        assert result["drift"]["time_s"] == list(np.arange(5.0, SECONDS + 1))

    def test_appearance_does_not_depend_on_the_chunks(self, rollout: Frames) -> None:
        tokens = tokens_of(rollout)
        of_chunks = Appearance.measure(tokens, np.array_split(rollout, [1, 2, 80, 199]))
        of_one_piece = Appearance.measure(tokens, [rollout])
        assert np.array_equal(of_chunks.sharpness, of_one_piece.sharpness)
        np.testing.assert_allclose(of_chunks.change, of_one_piece.change, rtol=1e-5)


class TestFreeze:
    def test_a_freeze_is_found_and_timed(self, rollout: Frames, bounds: RealFootage) -> None:
        frames = rollout.copy()
        frames[BEGIN : BEGIN + 20] = frames[BEGIN - 1]
        result = judged(frames, bounds)
        assert result["freeze"]["longest_s"] == 4.0
        assert result["freeze"]["share"] == 20 / COUNT
        assert result["collapse_s"] == BEGIN / FPS
        assert result["collapsed_by"] == ["frozen"]
        assert result["loops"]["found"] is False

    def test_a_short_freeze_is_no_collapse(self, rollout: Frames, bounds: RealFootage) -> None:
        frames = rollout.copy()
        frames[BEGIN : BEGIN + 9] = frames[BEGIN - 1]
        result = judged(frames, bounds)
        assert result["freeze"]["longest_s"] == 1.8
        assert result["collapse_s"] is None

    def test_a_car_that_is_commanded_to_stand_is_not_frozen(
        self, rollout: Frames, bounds: RealFootage
    ) -> None:
        frames, moving = rollout.copy(), np.ones(COUNT, np.bool_)
        frames[BEGIN : BEGIN + 30] = frames[BEGIN - 1]
        moving[BEGIN : BEGIN + 30] = False
        result = judged(frames, bounds, moving)
        assert result["freeze"]["share"] == 0
        assert result["loops"]["found"] is False
        assert result["collapse_s"] is None


class TestLoop:
    @pytest.mark.parametrize("period", [7, 15, 40])
    def test_a_loop_is_found_with_its_period(
        self, rollout: Frames, bounds: RealFootage, period: int
    ) -> None:
        order = np.arange(COUNT)
        order[BEGIN:] = BEGIN - period + np.arange(COUNT - BEGIN) % period
        result = judged(rollout[order], bounds)
        assert result["loops"]["found"] is True
        assert result["loops"]["period_s"] == period / FPS
        # A loop shorter than 2 s, the shortest lag, is noticed only after 2 s.
        first = BEGIN if period >= 10 else BEGIN - period + 14
        assert result["loops"]["first_s"] == first / FPS
        assert result["collapse_s"] == first / FPS
        assert "loop" in result["collapsed_by"]
        assert result["freeze"]["share"] == 0

    def test_noise_does_not_hide_a_loop(self, rollout: Frames, bounds: RealFootage) -> None:
        order = np.arange(COUNT)
        order[BEGIN:] = BEGIN - 15 + np.arange(COUNT - BEGIN) % 15
        footage = Appearance.measure(tokens_of(rollout[order]), [rollout[order]])
        tokens, rng = footage.tokens.copy(), np.random.default_rng(0)
        wrong = rng.random(tokens.shape) < 0.05
        tokens[wrong] = rng.permutation(tokens[wrong])
        loops = bounds.judge(replace(footage, tokens=tokens))["loops"]
        assert loops["period_s"] == 3.0
        assert loops["first_s"] == BEGIN / FPS

    def test_constant_tokens_are_a_loop_without_a_period(
        self, rollout: Frames, bounds: RealFootage
    ) -> None:
        footage = Appearance.measure(tokens_of(rollout), [rollout])
        tokens = footage.tokens.copy()
        tokens[BEGIN:] = tokens[BEGIN]
        loops = bounds.judge(replace(footage, tokens=tokens))["loops"]
        assert loops["found"] is True
        assert loops["period_s"] is None

    def test_a_short_repetition_is_no_loop(self, rollout: Frames, bounds: RealFootage) -> None:
        frames = rollout.copy()
        frames[BEGIN : BEGIN + 4] = frames[BEGIN - 20 : BEGIN - 16]
        assert judged(frames, bounds)["loops"]["found"] is False

    def test_the_period_is_the_first_lag_at_which_frames_repeat(self) -> None:
        tokens = np.tile(np.arange(6), 4)[:, None, None]
        looping = np.arange(24) >= 6
        assert loop_period(tokens, looping, 0.5, longest=20) == 6
        assert loop_period(tokens, looping, 0.5, longest=5) is None
        assert loop_period(tokens, ~looping, 0.5, longest=20) is None

    def test_repetition_is_the_least_agreement_of_the_best_lag(self) -> None:
        # Frames 4 to 6 have 3, 2 and 3 of the 4 tokens of frames 0 to 2.
        tokens = np.arange(40).reshape(10, 2, 2)
        tokens[4:7] = tokens[:3]
        tokens[4:7, 0, 0] = tokens[5, 1, 1] = 99
        footage = Appearance(tokens, np.zeros(10), np.ones(10), np.ones(10, np.bool_))
        curve = repetition(footage, np.zeros(10, np.bool_), range(3, 9), window=3)
        assert curve.tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
        curve = repetition(footage, np.zeros(10, np.bool_), range(3, 9), window=1)
        assert curve.tolist() == [0, 0, 0, 0, 0.75, 0.5, 0.75, 0, 0, 0]
        assert not repetition(footage, np.ones(10, np.bool_), range(3, 9), window=3).any()
        assert not repetition(footage, np.zeros(10, np.bool_), range(5, 9), window=3).any()


class TestDrift:
    def test_the_divergence_is_jensen_shannons(self) -> None:
        counts = np.array([3, 1, 0, 4])
        assert jensen_shannon(counts, 5 * counts) == pytest.approx(0, abs=1e-12)
        assert jensen_shannon(np.array([2, 1, 0, 0]), np.array([0, 0, 7, 7])) == pytest.approx(1)
        # For (1, 0) and (1/2, 1/2) it is the entropy of (3/4, 1/4) minus half a bit.
        expected = -0.75 * np.log2(0.75) - 0.25 * np.log2(0.25) - 0.5
        assert jensen_shannon(np.array([1, 0]), np.array([1, 1])) == pytest.approx(expected)

    def test_the_same_tokens_have_no_drift(self) -> None:
        tokens = np.random.default_rng(0).integers(0, 50, (20, 4, 4))
        counts = np.bincount(tokens.ravel())
        assert token_drift(tokens, counts, block=20, hop=5) == pytest.approx([0], abs=1e-12)
        unseen = np.full_like(tokens, 1000)
        assert token_drift(unseen, counts, block=10, hop=5) == pytest.approx([1, 1, 1])

    def test_the_floor_is_the_divergence_of_small_samples_without_drift(self) -> None:
        rng = np.random.default_rng(0)
        real, same = rng.integers(0, 1000, (2, 200, 8, 16))
        floor = drift_floor([real[:90], real[90:]], block=20, hop=20)
        drift = token_drift(same, np.bincount(real.ravel()), block=20, hop=20)
        assert len(floor) == 4 + 5
        assert floor.min() > 0.05
        np.testing.assert_allclose(drift, floor.mean(), rtol=0.1)

    def test_the_floor_compares_a_block_with_all_others(self) -> None:
        tokens = np.repeat([0, 1, 1], 4)[:, None, None]
        floor = drift_floor([tokens], block=4, hop=4)
        assert floor[0] == pytest.approx(1)
        assert (
            floor[1]
            == floor[2]
            == pytest.approx(jensen_shannon(np.array([0, 4]), np.array([4, 4])))
        )

    def test_a_collapsed_histogram_is_found(self, rollout: Frames, bounds: RealFootage) -> None:
        footage = Appearance.measure(tokens_of(rollout), [rollout])
        tokens = footage.tokens.copy()
        few = np.random.default_rng(0).integers(0, 3, tokens[BEGIN:].shape)
        tokens[BEGIN:] = few
        result = bounds.judge(replace(footage, tokens=tokens))
        drift = np.array(result["drift"]["bits"])
        assert drift[-1] > result["drift"]["threshold_bits"] > result["drift"]["highest_floor_bits"]
        assert result["collapsed_by"] == ["drift"]
        # Drift is noticed late, when enough of a block has drifted.
        assert BEGIN / FPS <= result["collapse_s"] < BEGIN / FPS + CONFIG.block_s


class TestSharpness:
    def test_a_chequerboard_has_eight_times_its_amplitude(self) -> None:
        board = 100 + 10 * (np.indices((8, 8)).sum(axis=0) % 2 * 2 - 1)
        frames = np.stack([board, np.full((8, 8), 7)]).astype(np.uint8)
        assert sharpness(frames[..., None].repeat(3, axis=3)).tolist() == [80, 0]

    def test_blur_and_noise_are_found_when_they_set_in(
        self, rollout: Frames, bounds: RealFootage
    ) -> None:
        soft, hard = rollout.copy(), rollout.copy()
        soft[BEGIN:] = gaussian_filter(rollout[BEGIN:].astype(float), (0, 2, 2, 0))
        hard[BEGIN:] += np.random.default_rng(0).integers(0, 90, hard[BEGIN:].shape, np.uint8)
        for frames in (soft, hard):
            footage = Appearance.measure(tokens_of(rollout), [frames])
            result = bounds.judge(footage)
            assert result["collapse_s"] == BEGIN / FPS
            assert "sharpness" in result["collapsed_by"]
            ratio = np.array(result["sharpness"]["ratio"])
            assert (ratio[BEGIN:] < 1).all() == (frames is soft)
        thresholds = result["sharpness"]["thresholds"]
        assert thresholds["low"] < 1 < thresholds["high"]

    def test_recorded_frames_are_the_reference_and_leave_the_faults_as_they_are(
        self, real: Frames, rollout: Frames, bounds: RealFootage
    ) -> None:
        footage = Appearance.measure(tokens_of(real), [real])
        recorded = replace(footage, recorded_sharpness=2 * footage.sharpness)
        soft = rollout.copy()
        soft[BEGIN:] = gaussian_filter(rollout[BEGIN:].astype(float), (0, 2, 2, 0))
        before, after = (
            reference.judge(Appearance.measure(tokens_of(rollout), [soft]))
            for reference in (bounds, RealFootage([recorded], FPS, CONFIG))
        )
        assert after["sharpness"]["floor_ratio"] == pytest.approx(0.5)
        np.testing.assert_allclose(
            after["sharpness"]["ratio"], np.array(before["sharpness"]["ratio"]) / 2, atol=1e-4
        )
        assert after["fault_shares"] == before["fault_shares"]
        assert before["fault_shares"]["sharpness"] > 0


def test_noise_of_the_right_histogram_is_restless(rollout: Frames, bounds: RealFootage) -> None:
    result = judged(scattered(rollout), bounds)
    assert "restless" in result["collapsed_by"]
    assert result["collapse_s"] == BEGIN / FPS
    assert result["fault_shares"]["drift"] == 0
    assert result["fault_shares"]["restless"] == (COUNT - BEGIN) / COUNT


def test_noise_is_restless_from_its_first_frame_to_its_last(
    rollout: Frames, bounds: RealFootage
) -> None:
    footage = Appearance.measure(tokens_of(rollout), [rollout])
    tokens = footage.tokens.copy()
    tokens[BEGIN:150] = np.random.default_rng(0).integers(0, 10**6, tokens[BEGIN:150].shape)
    result = bounds.judge(replace(footage, tokens=tokens))
    # The first frame after the noise has nothing in common with the noise, so it counts as well.
    assert result["fault_shares"]["restless"] == (150 - BEGIN + 1) / COUNT
    assert result["collapse_s"] == BEGIN / FPS


class TestCollapse:
    def test_a_collapse_is_the_first_fault_that_lasts(self) -> None:
        no_fault = np.zeros(40, np.bool_)
        assert time_to_collapse({"a": no_fault, "b": no_fault}, FPS, 10) == (None, [])
        short, long = no_fault.copy(), no_fault.copy()
        short[3:12] = True
        assert time_to_collapse({"a": short, "b": no_fault}, FPS, 10) == (None, [])
        assert time_to_collapse({"a": short, "b": no_fault}, FPS, 9) == (0.6, ["a"])
        long[25:] = True
        assert time_to_collapse({"a": short, "b": long}, FPS, 10) == (5.0, ["b"])

    def test_two_short_faults_in_turn_are_a_collapse(self) -> None:
        first, second = np.zeros((2, 40), np.bool_)
        first[10:16], second[16:20] = True, True
        assert time_to_collapse({"a": first, "b": second}, FPS, 10) == (2.0, ["a"])


class TestMistakes:
    def test_too_short_footage_is_refused(self, real: Frames, bounds: RealFootage) -> None:
        footage = Appearance.measure(tokens_of(real[:49]), [real[:49]])
        with pytest.raises(DriveSimError, match=r"^9\.8 s of real .*at least 10\.0 s together"):
            RealFootage([footage], FPS, CONFIG)
        with pytest.raises(DriveSimError, match=r"rollout of 4\.8 s is too short"):
            judged(real[:24], bounds)

    def test_drives_shorter_than_a_block_are_ignored(
        self, real: Frames, rollout: Frames, bounds: RealFootage
    ) -> None:
        long, single, short = (
            Appearance.measure(tokens_of(frames), [frames])
            for frames in (real, rollout[:1], rollout[:24])
        )
        with_short_drives = RealFootage([single, long, short], FPS, CONFIG)
        assert judged(rollout, with_short_drives) == judged(rollout, bounds)

    def test_real_footage_at_a_standstill_is_refused(self, real: Frames) -> None:
        standing = Appearance.measure(tokens_of(real), [real], np.zeros(COUNT, np.bool_))
        with pytest.raises(DriveSimError, match="never moves"):
            RealFootage([standing], FPS, CONFIG)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"block_s": 0.0},
            {"hop_s": 6.0},
            {"min_lag_s": 31.0},
            {"drift_margin": 1.0},
            {"hold_s": float("nan")},
        ],
    )
    def test_impossible_settings_are_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StabilityConfig(**wrong)
