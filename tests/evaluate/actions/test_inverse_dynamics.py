from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.synthetic.drives import drive
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.actions.inverse_dynamics import (
    STANDING_MPS,
    InverseDynamics,
    ProbeClip,
    ProbeSource,
)

WORLD = SyntheticConfig(
    height=48,
    width=96,
    fps=5.0,
    stretch_m=60.0,
    cruise_mps=(2.0, 8.0),
    traffic=0.0,
    palettes=("noon",),
)
SOURCE = ProbeSource(fps=WORLD.fps, steering_kind="road_wheel", drives=("c0ffee", "f00d"))


def driven(seed: int, seconds: float = 24.0) -> ProbeClip:
    synthetic = drive(SyntheticWorld(3, WORLD), seconds, seed)
    return ProbeClip(
        frames=synthetic.frames,
        actions=synthetic.actions,
        action_valid=np.ones_like(synthetic.actions, np.bool_),
        segments=[(0, len(synthetic.states))],
    )


def beginning(clip: ProbeClip, frames: int) -> ProbeClip:
    return ProbeClip(
        frames=clip.frames[:frames],
        actions=clip.actions[:frames],
        action_valid=clip.action_valid[:frames],
        segments=[(0, frames)],
    )


@pytest.fixture(scope="module")
def training() -> list[ProbeClip]:
    return [driven(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def held_out() -> ProbeClip:
    return driven(100)


@pytest.fixture(scope="module")
def probe(training: list[ProbeClip], held_out: ProbeClip) -> InverseDynamics:
    return InverseDynamics.fit(training, [held_out], source=SOURCE, steps=120)


def test_a_probe_is_much_better_than_the_mean(probe: InverseDynamics) -> None:
    errors = probe.errors([driven(101)])
    for name, least in (("speed", 0.8), ("steering", 0.9)):
        of_channel = errors[name]
        error = of_channel["mean_absolute_error"]
        constant = of_channel["constant_mean_absolute_error"]
        assert error is not None
        assert constant is not None
        assert error < 0.6 * constant
        assert (of_channel["correlation"] or 0) > least
    assert (errors["steering"]["sign_accuracy"] or 0) > 0.95
    assert errors["speed"]["sign_accuracy"] is None


def test_errors_are_those_of_the_estimates(
    probe: InverseDynamics, training: list[ProbeClip], held_out: ProbeClip
) -> None:
    errors = probe.errors([held_out])["speed"]
    speeds = held_out.actions[:-1, SPEED].astype(np.float64)
    error = probe.estimate(held_out.frames)[:, SPEED] - speeds
    assert errors["transitions"] == len(speeds)
    assert errors["mean_absolute_error"] == pytest.approx(np.abs(error).mean(), rel=1e-2)
    assert errors["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-2)
    mean = np.concatenate([clip.actions[:-1, SPEED] for clip in training]).mean()
    assert errors["constant_mean_absolute_error"] == pytest.approx(
        np.abs(speeds - mean).mean(), rel=1e-4
    )
    moves = held_out.actions[:-1, SPEED] >= STANDING_MPS
    assert 0 < moves.sum() < len(moves)
    assert probe.errors([held_out])["steering"]["transitions"] == moves.sum()


def test_a_planted_sign_flip_and_a_planted_delay_show(
    probe: InverseDynamics, held_out: ProbeClip
) -> None:
    def correlation(actions: np.ndarray) -> float:
        return probe.errors([replace(held_out, actions=actions)])["steering"]["correlation"] or 0.0

    right = correlation(held_out.actions)
    assert correlation(held_out.actions * np.array([1, -1], np.float32)) == pytest.approx(-right)
    for shift in (-3, 3):
        late = held_out.actions.copy()
        late[:, STEERING] = np.roll(late[:, STEERING], shift)
        assert correlation(late) < right - 0.1


def test_a_mirror_image_has_the_same_speed_and_the_opposite_steering(
    probe: InverseDynamics, held_out: ProbeClip
) -> None:
    plain = probe.estimate(held_out.frames)
    mirrored = probe.estimate(held_out.frames[:, :, ::-1])
    np.testing.assert_allclose(mirrored[:, SPEED], plain[:, SPEED], atol=1e-3)
    np.testing.assert_allclose(mirrored[:, STEERING], -plain[:, STEERING], atol=1e-4)
    assert np.abs(plain[:, STEERING]).max() > 0.05


def test_a_still_picture_shows_no_steering_however_the_road_bends(
    probe: InverseDynamics, held_out: ProbeClip
) -> None:
    for frame in held_out.frames[::30]:
        actions = probe.estimate(np.stack([frame] * 4))
        np.testing.assert_allclose(actions[:, STEERING], 0, atol=1e-4)
        assert (actions[:, SPEED] < held_out.actions[:, SPEED].mean()).all()


def test_every_transition_has_an_estimate_from_its_neighbours_alone(
    probe: InverseDynamics, held_out: ProbeClip
) -> None:
    frames = held_out.frames[:12]
    estimates = probe.estimate(frames)
    assert estimates.shape == (11, 2)
    assert np.isfinite(estimates).all()
    # An estimate sees `look_back` frames before the frame it leads to, and one frame after it.
    of_first_frames = probe.estimate(frames[:9])
    np.testing.assert_allclose(of_first_frames[:-1], estimates[:7], atol=1e-3)
    back = probe.look_back
    of_last_frames = probe.estimate(frames[6 - back :])
    np.testing.assert_allclose(of_last_frames[back - 1 :], estimates[5:], atol=1e-3)
    assert probe.estimate(frames[:1]).shape == (0, 2)


def test_segments_are_clips_of_their_own(probe: InverseDynamics, held_out: ProbeClip) -> None:
    clip = beginning(held_out, 12)
    parts = [
        ProbeClip(
            frames=held_out.frames[begin:stop],
            actions=held_out.actions[begin:stop],
            action_valid=held_out.action_valid[begin:stop],
            segments=[(0, stop - begin)],
        )
        for begin, stop in ((0, 5), (5, 6), (6, 12))
    ]
    of_clips, of_segments = (
        probe.errors(clips)["speed"]
        for clips in (parts, [replace(clip, segments=[(0, 5), (5, 6), (6, 12)])])
    )
    assert of_segments["transitions"] == 4 + 5
    for name in ("rmse", "correlation"):
        assert of_segments[name] == pytest.approx(of_clips[name], rel=1e-3)
    assert probe.errors([clip])["speed"]["transitions"] == 11


def test_training_is_a_function_of_clips_steps_and_seed(
    training: list[ProbeClip], held_out: ProbeClip
) -> None:
    state = torch.get_rng_state()
    counted: list[int] = []
    clips, held_out = [beginning(training[0], 20)], beginning(held_out, 20)
    fits = [
        InverseDynamics.fit(
            clips, [held_out], source=SOURCE, steps=4, seed=seed, advance=counted.append
        )
        for seed in (1, 1, 2)
    ]
    assert fits[0].fingerprint == fits[1].fingerprint != fits[2].fingerprint
    assert sum(counted) == 12
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_on_the_validation_clips_is_kept(training: list[ProbeClip]) -> None:
    """Validate on negated steering, so that the weights that learned least are the best."""
    clip = beginning(training[0], 60)
    flipped = replace(clip, actions=clip.actions * np.array([1, -1], np.float32))
    right, wrong = (
        InverseDynamics.fit([clip], [validation], source=SOURCE, steps=40).errors([clip])[
            "steering"
        ]["rmse"]
        or 0.0
        for validation in (clip, flipped)
    )
    assert right < 0.8 * wrong


def test_a_probe_survives_saving_and_other_files_are_refused(
    probe: InverseDynamics, held_out: ProbeClip, tmp_path: Path
) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(probe.to_bytes())
    loaded = InverseDynamics.load(path)
    assert loaded.fingerprint == probe.fingerprint
    assert loaded.source == SOURCE
    assert loaded.to_bytes() == path.read_bytes()
    np.testing.assert_array_equal(loaded.estimate(held_out.frames), probe.estimate(held_out.frames))
    path.write_bytes(b"no")
    for wrong in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(DriveSimError, match="not an inverse-dynamics probe"):
            InverseDynamics.load(wrong)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "does not name the data"),
        ({"other": "{}"}, "does not name the data"),
        ({"source": "no"}, "Expecting value"),
        ({"source": '{"fps": 5.0, "drives": []}'}, "source.steering_kind is missing"),
        (
            {"source": '{"fps": 0, "steering_kind": null, "drives": []}'},
            "source.fps: must be greater than 0",
        ),
    ],
)
def test_a_probe_of_unknown_origin_is_refused(
    probe: InverseDynamics, tmp_path: Path, metadata: dict[str, str] | None, reason: str
) -> None:
    """A probe must say its frame rate, steering kind and drives: the checks need them."""
    path = tmp_path / "probe.safetensors"
    path.write_bytes(probe.to_bytes())
    save_file(load_file(path), path, metadata)
    with pytest.raises(DriveSimError, match=reason) as caught:
        InverseDynamics.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channel", [SPEED, STEERING])
def test_a_channel_that_no_clip_has_is_left_out(
    training: list[ProbeClip], held_out: ProbeClip, channel: int
) -> None:
    valid = np.tile(np.arange(2) == 1 - channel, (20, 1))
    learned, validation = (
        replace(beginning(clip, 20), action_valid=valid) for clip in (training[0], held_out)
    )
    probe = InverseDynamics.fit([learned], [validation], source=SOURCE, steps=4)
    actions = probe.estimate(held_out.frames)
    assert np.isnan(actions[:, channel]).all()
    assert np.isfinite(actions[:, 1 - channel]).all()
    names = ("speed", "steering")
    errors = probe.errors([held_out])
    assert all(value is None for value in errors[names[channel]].values())
    assert errors[names[1 - channel]]["rmse"] is not None


def test_nothing_to_learn_from_is_refused(training: list[ProbeClip], held_out: ProbeClip) -> None:
    held_out, known = (beginning(clip, 12) for clip in (held_out, training[0]))
    unknown = replace(held_out, action_valid=np.zeros_like(held_out.action_valid))
    apart = replace(held_out, segments=[(n, n + 1) for n in range(12)])
    for clips in ([unknown], [apart]):
        with pytest.raises(DriveSimError, match="the probe's training drives"):
            InverseDynamics.fit(clips, [held_out], source=SOURCE)
        with pytest.raises(DriveSimError, match="the probe's validation drives"):
            InverseDynamics.fit([known], clips, source=SOURCE)
