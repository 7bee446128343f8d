from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.synthetic import SyntheticConfig, SyntheticWorld, drive
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.inverse_dynamics import InverseDynamics, ProbeClip

CONFIG = SyntheticConfig(height=48, width=96, fps=5.0, stretch_m=200.0, palettes=("noon",))


def clip(seed: int, seconds: float = 14.0) -> ProbeClip:
    driven = drive(SyntheticWorld(3, CONFIG), seconds, seed)
    frames = driven.frames
    return ProbeClip(
        frames=frames,
        actions=driven.actions,
        action_valid=np.ones((len(frames), 2), np.bool_),
        segments=[(0, len(frames))],
    )


@pytest.fixture(scope="module")
def held() -> ProbeClip:
    return clip(100)


@pytest.fixture(scope="module")
def probe(held: ProbeClip) -> InverseDynamics:
    return InverseDynamics.fit([clip(seed) for seed in range(6)], [held], steps=120)


def test_it_learns_to_read_speed_and_steering(probe: InverseDynamics) -> None:
    errors = probe.errors([clip(101)])
    for channel in ("speed", "steering"):
        found, constant = (errors[channel][name] for name in ("rmse", "constant_rmse"))
        assert found is not None
        assert constant is not None
        assert found < 0.7 * constant, channel
    assert (errors["steering"]["correlation"] or 0) > 0.7
    assert errors["speed"]["sign_accuracy"] is None


def test_a_mirror_image_has_the_same_speed_and_the_opposite_steering(
    probe: InverseDynamics, held: ProbeClip
) -> None:
    plain = probe.estimate(held.frames[:20])
    mirrored = probe.estimate(np.ascontiguousarray(held.frames[:20, :, ::-1]))
    np.testing.assert_allclose(mirrored[:, SPEED], plain[:, SPEED], atol=1e-4)
    np.testing.assert_allclose(mirrored[:, STEERING], -plain[:, STEERING], atol=1e-5)
    assert np.abs(plain[:, STEERING]).max() > 1e-3


def test_every_transition_has_an_estimate_and_a_gap_has_none(
    probe: InverseDynamics, held: ProbeClip
) -> None:
    frames = held.frames[:12]
    whole = probe.estimate(frames)
    assert whole.shape == (11, 2)
    assert np.isfinite(whole).all()
    parts = probe.estimate(frames, [(0, 5), (5, 12)])
    assert np.isnan(parts[4]).all()
    # A run alone is read as it is within others.
    np.testing.assert_allclose(parts[5:], probe.estimate(frames[5:]), atol=1e-5)
    np.testing.assert_allclose(parts[:4], probe.estimate(frames[:5]), atol=1e-5)


def test_a_saved_probe_is_the_same_and_another_file_is_none(
    probe: InverseDynamics, held: ProbeClip, tmp_path: Path
) -> None:
    (tmp_path / "probe").write_bytes(probe.to_bytes())
    loaded = InverseDynamics.load(tmp_path / "probe")
    assert loaded.fingerprint == probe.fingerprint
    assert np.array_equal(loaded.estimate(held.frames[:6]), probe.estimate(held.frames[:6]))
    (tmp_path / "other").write_bytes(b"no probe")
    with pytest.raises(DriveSimError, match="not an inverse-dynamics probe"):
        InverseDynamics.load(tmp_path / "other")


def test_channels_that_no_drive_has_are_not_estimated(held: ProbeClip) -> None:
    speed_only = ProbeClip(
        frames=held.frames[:20],
        actions=held.actions[:20],
        action_valid=np.tile([True, False], (20, 1)),
        segments=[(0, 20)],
    )
    probe = InverseDynamics.fit([speed_only], [speed_only], steps=2)
    estimated = probe.estimate(held.frames[:6])
    assert np.isfinite(estimated[:, SPEED]).all()
    assert np.isnan(estimated[:, STEERING]).all()
    assert probe.errors([held])["steering"]["rmse"] is None
    nothing = ProbeClip(
        frames=held.frames[:4],
        actions=held.actions[:4],
        action_valid=np.zeros((4, 2), np.bool_),
        segments=[(0, 4)],
    )
    with pytest.raises(DriveSimError, match="no two neighbouring frames"):
        InverseDynamics.fit([nothing], [speed_only], steps=2)


def test_clips_whose_parts_do_not_fit_are_refused(held: ProbeClip) -> None:
    with pytest.raises(ValueError, match="actions is"):
        ProbeClip(
            frames=held.frames[:4],
            actions=held.actions[:3],
            action_valid=held.action_valid[:4],
            segments=[(0, 4)],
        )
