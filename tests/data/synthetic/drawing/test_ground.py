import numpy as np

from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.ground import DASH_M, DASH_PERIOD_M
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld


def test_markings_lie_where_the_road_is() -> None:
    config = SyntheticConfig(height=192, width=384)
    camera = Camera(192, 384, config.field_of_view_deg, config.horizon, config.camera_height_m)
    contrasts = []
    for seed in range(4):
        world = SyntheticWorld(seed, config)
        state = world.reset(30.0)
        picture = world.render(state).astype(float).mean(axis=2)
        station = np.array([DASH_PERIOD_M * 4 + DASH_M / 2, DASH_PERIOD_M * 4 + 9.0])
        x, y, _ = world.road.place(station, np.zeros(2))
        depth, left = View(state).depth_and_left(x, y)
        rows = camera.row_of(depth, 0.0).astype(int)
        columns = camera.column_of(depth, left).astype(int)
        dash, gap = picture[rows, columns]
        contrasts.append(dash - gap)
    assert min(contrasts) > 60
