import numpy as np

from driving_sim.data.synthetic.road import Road
from tests.fixtures.synthetic_worlds import curvature


def test_project_undoes_place() -> None:
    rng = np.random.default_rng(0)
    road = Road(rng)
    station, offset = rng.uniform(-3000, 3000, 2000), rng.uniform(-8, 8, 2000)
    x, y, heading = road.place(station, offset)
    projected_station, projected_offset, slope = road.project(x, y)
    np.testing.assert_allclose(projected_station, station, atol=0.05)
    np.testing.assert_allclose(projected_offset, offset, atol=0.01)
    np.testing.assert_allclose(np.arctan(slope), heading, atol=0.01)


def test_no_road_appears_where_there_is_none() -> None:
    rng = np.random.default_rng(1)
    road = Road(rng)
    x, y = rng.uniform(-500, 500, (2, 1000))
    centre_x, centre_y, _ = road.place(np.arange(-700, 700, 0.25), np.zeros(5600))
    true = np.hypot(x[:, None] - centre_x, y[:, None] - centre_y).min(axis=1)
    _, offset, _ = road.project(x, y)
    assert (np.abs(offset) > true - 0.05).all()


def test_it_bends_both_ways_and_never_too_sharply() -> None:
    bends = curvature(Road(np.random.default_rng(2)), np.arange(0.0, 2000.0, 0.5))
    assert bends.max() > 0.008
    assert bends.min() < -0.008
    assert np.abs(bends).max() < 1 / 30
    assert np.abs(np.diff(bends)).max() < 2e-3
