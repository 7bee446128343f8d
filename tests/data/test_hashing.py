import math

import numpy as np

from driving_sim.data.hashing import mixed, uniform


def test_a_number_does_not_depend_on_the_keys_around_it() -> None:
    cells = np.arange(-50, 50)
    numbers = uniform(7, cells[:, None], cells[None, :])
    assert numbers[3, 90] == uniform(7, -47, 40)[0]
    assert len(np.unique(numbers)) == numbers.size
    assert not np.isin(uniform(8, cells[:, None], cells[None, :]), numbers).any()


def test_the_numbers_are_uniform() -> None:
    counts, _ = np.histogram(uniform(1, np.arange(20_000)), bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_splitmix64_matches_the_published_sequence() -> None:
    """The first output of SplitMix64 seeded with 1234567 (Rosetta Code) is 6457827717110365317."""
    state = np.array([1234567 + 0x9E3779B97F4A7C15], np.uint64)
    assert mixed(state) == 6457827717110365317
