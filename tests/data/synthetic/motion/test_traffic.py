import numpy as np

from driving_sim.data.synthetic.motion.traffic import Traffic
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.road import LANE_OFFSET, Road


def test_oncoming_cars_give_way_on_the_road() -> None:
    road = Road(np.random.default_rng(5))
    traffic = Traffic(road, 5, 0.75)
    met = 0
    for time in np.arange(0.0, 300.0, 0.5):
        x, y, _ = road.place(np.array([9.0 * time]), np.array([-LANE_OFFSET]))
        cars = traffic.near(VehicleState(float(x[0]), float(y[0]), 0.0, float(time)))
        nearest = np.hypot(cars.x - x, cars.y - y).min(initial=np.inf)
        met += nearest < 8
        assert nearest > 2.2
    assert met > 5
