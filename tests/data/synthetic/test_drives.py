import numpy as np

from driving_sim.data.synthetic.drives import drive
from driving_sim.data.synthetic.world import SyntheticWorld
from tests.fixtures.synthetic_worlds import TINY


def test_a_drive_is_a_function_of_its_seeds() -> None:
    first, again, another = (drive(SyntheticWorld(3, TINY), 20.0, seed) for seed in (8, 8, 9))
    assert first.states == again.states
    np.testing.assert_array_equal(first.actions, again.actions)
    assert np.abs(first.actions - another.actions).max() > 0.5
