"""Bootstrap intervals: how far a mean could have come out otherwise, on other drives or windows."""

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


def interval(values: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap interval (Efron 1979, 10.1214/aos/1176344552) of [n].

    One value of each independent unit (a clip, a block of frames, a drive). Of a single one
    nothing is known but itself.
    """
    array = np.asarray(values, np.float64)
    if not len(array):
        raise ValueError("no values to find a mean of")
    rng = np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}
