import math

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.evaluate.pictures.frechet import frechet_distance

Array = NDArray[np.float64]


def with_moments(mean: Array, covariance: Array, n: int, seed: int = 0) -> Array:
    """Return features [n, d] with exactly this mean and this unbiased covariance."""
    random = np.random.default_rng(seed).normal(size=(n, len(mean)))
    orthonormal, _ = np.linalg.qr(random - random.mean(axis=0))
    return mean + math.sqrt(n - 1) * orthonormal @ np.linalg.cholesky(covariance).T


def random_covariance(d: int, seed: int) -> Array:
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


def sets(n: int, m: int, d: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(n + m + d)
    return rng.normal(size=(n, d)), 1 + rng.normal(size=(m, d)) @ rng.normal(size=(d, d))


def test_diagonal_gaussians_have_the_closed_form() -> None:
    mean, other_mean = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    deviation, other_deviation = np.array([1.0, 2.0, 0.3]), np.array([0.5, 2.0, 1.7])
    distance = frechet_distance(
        with_moments(mean, np.diag(deviation**2), 9),
        with_moments(other_mean, np.diag(other_deviation**2), 30, seed=1),
    )
    expected = ((mean - other_mean) ** 2).sum() + ((deviation - other_deviation) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-12)


def test_full_covariances_in_two_dimensions_have_the_closed_form() -> None:
    """In two dimensions, by Cayley-Hamilton, tr sqrt(M) is sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    distance = frechet_distance(with_moments(zero, a, 5), with_moments(zero, b, 12, seed=1))
    assert distance == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross, rel=1e-12)


def test_full_covariances_have_the_closed_form() -> None:
    a, b = random_covariance(6, 0), random_covariance(6, 1)
    mean = np.arange(6.0)
    # S S' is similar to a positive definite matrix, so tr sqrt(S S') is the sum of the square roots
    # of its eigenvalues.
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = (mean**2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    distance = frechet_distance(with_moments(mean, a, 20), with_moments(0 * mean, b, 40, seed=1))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_many_samples_approach_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = random_covariance(4, 2), random_covariance(4, 3)
    features = rng.multivariate_normal(np.zeros(4), a, size=20_000)
    others = rng.multivariate_normal(np.ones(4), b, size=30_000)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = 4 + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(features, others) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (8, 8), (5, 40), (2, 40)])
def test_a_set_has_distance_0_from_itself(n: int, d: int) -> None:
    _, features = sets(n, n, d)
    assert 0 <= frechet_distance(features, features) < 1e-12 * np.square(features).sum()


@pytest.mark.parametrize(("n", "m", "d"), [(50, 30, 8), (5, 7, 40), (60, 3, 20)])
def test_the_distance_depends_on_neither_order_nor_axes(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    features, others = sets(n, m, d)
    distance = frechet_distance(features, others)
    assert frechet_distance(others, features) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(rng.permutation(features), others) == pytest.approx(distance, rel=1e-10)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    moved = frechet_distance(3 * features @ rotation + 7, 3 * others @ rotation + 7)
    assert moved == pytest.approx(9 * distance, rel=1e-10)


def test_the_distance_is_exact_with_fewer_clips_than_features() -> None:
    """Embedding three dimensions in 40 does not change the distance."""
    features, others = sets(10, 12, 3)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)))[0].T
    distance = frechet_distance(features @ rows, others @ rows)
    assert distance == pytest.approx(frechet_distance(features, others), rel=1e-10)


def test_sets_that_vary_in_different_directions_are_apart_by_their_total_variance() -> None:
    features, others = np.zeros((6, 40)), np.zeros((9, 40))
    features[:, :20], others[:, 20:] = sets(6, 9, 20)
    variances = features.var(axis=0, ddof=1).sum() + others.var(axis=0, ddof=1).sum()
    means = np.square(features.mean(axis=0) - others.mean(axis=0)).sum()
    assert frechet_distance(features, others) == pytest.approx(means + variances, rel=1e-10)


def test_float32_far_from_zero_is_measured_in_float64() -> None:
    # Multiples of 1/64 are exact in float32, even after the shift.
    features, others = (np.round(points * 64) / 64 for points in sets(50, 60, 8))
    far = [(points + 2**14).astype(np.float32) for points in (features, others)]
    assert frechet_distance(*far) == pytest.approx(frechet_distance(features, others), rel=1e-10)
