"""The Fréchet distance between two sets of features."""

import numpy as np

from driving_sim.data.arrays import Floats, Reals


def frechet_distance(features: Reals, others: Reals) -> float:
    """Return the squared 2-Wasserstein distance between Gaussians fitted to two sets of features.

    The sets are `features` [n, d] and `others` [m, d]. The distance is
    |mean - mean'|^2 + tr(S + S' - 2 (S S')^1/2), with unbiased covariances S (Dowson & Landau 1982,
    doi 10.1016/0047-259X(82)90077-X). FID (Heusel et al. 2017, arXiv 1706.08500) and FVD
    (Unterthiner et al. 2018, arXiv 1812.01717) use the same distance. Both sets need two or more
    features. Small sets are biased upwards, so compare distances only if the sets have the same
    sizes.
    """
    mean, root = _gaussian(features)
    other_mean, other_root = _gaussian(others)
    # Write S = R^T R. Then the trace is the minimum of |R - U R'|^2 over orthogonal matrices U, and
    # the best U is the polar factor of R R'^T (orthogonal Procrustes). This avoids the square root
    # of S S', which is singular if n <= d. Also, the result cannot be negative.
    left, _, right = np.linalg.svd(root @ other_root.T)
    of_means = np.square(mean - other_mean).sum()
    of_covariances = np.square(root - left @ right @ other_root).sum()
    return float(of_means + of_covariances)


def _gaussian(features: Reals) -> tuple[Floats, Floats]:
    """Return the mean [d] of features [n, d], and R [d, d] such that R^T R is their covariance."""
    exact = features.astype(np.float64)
    mean = exact.mean(axis=0)
    rows = np.linalg.qr((exact - mean) / np.sqrt(len(exact) - 1), mode="r")
    root = np.zeros((exact.shape[1], exact.shape[1]))
    root[: len(rows)] = rows
    return mean, root
