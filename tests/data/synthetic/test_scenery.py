import numpy as np

from driving_sim.data.synthetic.road import Road
from driving_sim.data.synthetic.scenery import VISIBLE_M, Scenery


def test_things_are_the_same_seen_from_different_places() -> None:
    scenery = Scenery(Road(np.random.default_rng(3)), 3)

    def around(x: float, y: float) -> set[tuple[float, ...]]:
        """Return the things near (100, 20) among those that are listed for (x, y)."""
        things = scenery.near(x, y)
        near = np.hypot(things.x - 100.0, things.y - 20.0) < 0.5 * VISIBLE_M
        columns = (things.kind, things.x, things.y, things.height, things.tint)
        return set(zip(*(c[near].tolist() for c in columns), strict=True))

    here = around(100.0, 20.0)
    assert len(here) > 20
    assert around(145.0, 50.0) == here
    assert around(60.0, -10.0) == here
