"""The Fréchet distance between two sets of features: how far apart their Gaussians are."""

import numpy as np

from driving_sim.data.arrays import Floats, Reals


def frechet_distance(features: Reals, others: Reals) -> float:
    """Return the squared 2-Wasserstein distance of the Gaussians fitted to [n, d] and [m, d].

    |mean - mean'|^2 + tr(S + S' - 2 (S S')^1/2) with the covariances S over n - 1 (Dowson & Landau
    1982, doi 10.1016/0047-259X(82)90077-X), as FID (Heusel et al. 2017, arXiv 1706.08500) and FVD
    (Unterthiner et al. 2018, arXiv 1812.01717) have it. Sets of any size from two up will do, but
    small ones are biased upward: compare distances only between sets of the same sizes.
    """
    mean, root = _gaussian(features)
    other_mean, other_root = _gaussian(others)
    # With S = R^T R the trace is the least |R - U R'|^2 over rotations U, and the best U is the
    # polar factor of R R'^T (orthogonal Procrustes). No square root of S S' is taken, which is
    # singular where n <= d, and a sum of squares is not negative.
    left, _, right = np.linalg.svd(root @ other_root.T)
    apart = np.square(mean - other_mean).sum() + np.square(root - left @ right @ other_root).sum()
    return float(apart)


def _gaussian(features: Reals) -> tuple[Floats, Floats]:
    """Mean [d] of features [n, d], and a root R [d, d] of their covariance R^T R."""
    exact = features.astype(np.float64)
    mean = exact.mean(axis=0)
    rows = np.linalg.qr((exact - mean) / np.sqrt(len(exact) - 1), mode="r")
    root = np.zeros((exact.shape[1], exact.shape[1]))
    root[: len(rows)] = rows
    return mean, root
