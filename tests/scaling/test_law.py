"""Tests that a fit recovers known scaling laws and that its intervals reflect the noise."""

import numpy as np
import pytest

from driving_sim.engine.errors import TooLittleDataError
from driving_sim.scaling.law import FittedLaw, ScalingLaw, hold_out_largest

COMPUTE = np.geomspace(1e13, 1e15, 6)


def noisy(law: ScalingLaw, noise: float, seed: int = 0, runs: int = 6) -> np.ndarray:
    compute = np.geomspace(COMPUTE[0], COMPUTE[-1], runs)
    deviations = np.random.default_rng(seed).standard_normal(runs)
    return law(compute) * np.exp(noise * deviations)


def width(fitted: FittedLaw, at: float) -> float:
    prediction = fitted.predict(at)
    assert prediction.low is not None
    assert prediction.high is not None
    return prediction.high - prediction.low


@pytest.mark.parametrize("law", [(4.8, 2e12, -0.25), (0.0, 1e40, -0.05), (5.5, 3e13, -0.9)])
def test_a_fit_recovers_a_known_law(law: tuple[float, float, float]) -> None:
    known = ScalingLaw(c=law[0], a=law[1], b=law[2])
    fitted = FittedLaw(COMPUTE, known(COMPUTE))
    assert fitted.law.c == pytest.approx(known.c, abs=1e-4)
    assert fitted.law.b == pytest.approx(known.b, rel=1e-4)
    assert fitted.predict(1e17).loss == pytest.approx(float(known(1e17)), rel=1e-6)
    assert width(fitted, 1e17) < 1e-4


def test_the_irreducible_loss_is_never_below_zero() -> None:
    straight = ScalingLaw(c=0.0, a=1e40, b=-0.05)
    bent_down = straight(COMPUTE) * (1 - 0.01 * np.linspace(-1, 1, 6) ** 2)
    fitted = FittedLaw(COMPUTE, bent_down)
    assert fitted.law.c == 0.0
    assert fitted.predict(1e30).loss > 0


def test_noise_widens_the_interval() -> None:
    law = ScalingLaw(c=4.8, a=2e12, b=-0.25)
    noises = (0.0005, 0.002, 0.008)
    widths = [width(FittedLaw(COMPUTE, noisy(law, noise)), 1e16) for noise in noises]
    assert widths[0] < widths[1] / 2 < widths[2] / 4
    near, far = (width(FittedLaw(COMPUTE, noisy(law, 0.002)), at) for at in (1e15, 1e18))
    assert near < far


def test_the_interval_contains_the_loss_of_a_new_run() -> None:
    law, at, contained = ScalingLaw(c=4.8, a=2e12, b=-0.25), 1e16, 0
    for seed in range(25):
        prediction = FittedLaw(COMPUTE[:5], noisy(law, 0.003, seed)[:5]).predict(at)
        new = float(law(at)) * np.exp(0.003 * np.random.default_rng(1000 + seed).standard_normal())
        assert prediction.low is not None
        assert prediction.high is not None
        contained += prediction.low <= new <= prediction.high
    assert contained >= 21  # About 24 are expected.


def test_the_largest_run_is_predicted_from_the_smaller_runs_alone() -> None:
    law = ScalingLaw(c=4.8, a=2e12, b=-0.25)
    loss = law(COMPUTE)
    loss[-1] *= 1.05
    shuffled = np.random.default_rng(0).permutation(6)
    held_out = hold_out_largest(COMPUTE[shuffled], loss[shuffled])
    assert held_out is not None
    assert held_out.error == pytest.approx(1 / 1.05 - 1, rel=1e-6)
    assert held_out.measured == loss[-1]


def test_three_runs_determine_a_law_but_no_interval() -> None:
    law = ScalingLaw(c=4.8, a=2e12, b=-0.25)
    fitted = FittedLaw(COMPUTE[::2], law(COMPUTE[::2]))
    assert fitted.law.b == pytest.approx(-0.25, rel=1e-4)
    assert fitted.predict(1e17).low is None
    assert hold_out_largest(COMPUTE[::2], law(COMPUTE[::2])) is None


def test_runs_that_no_law_fits_are_refused() -> None:
    with pytest.raises(TooLittleDataError, match="2 different amounts of compute"):
        FittedLaw([1e13, 1e13, 2e13], [6.0, 6.0, 5.5])
    with pytest.raises(TooLittleDataError, match="does not fall with compute"):
        FittedLaw(COMPUTE, np.linspace(5, 6, 6))
