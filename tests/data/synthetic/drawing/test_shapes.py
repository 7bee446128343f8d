import math

import numpy as np
import pytest

from driving_sim.data.synthetic.drawing.shapes import Canvas, rgb


class TestShapes:
    """A shape adds exactly its area to a black picture, wherever its edges lie."""

    @staticmethod
    def area(draw: str, *shape: object) -> float:
        frame = np.zeros((3, 30, 40), np.float32)
        getattr(Canvas(frame), draw)(*shape, rgb((1, 1, 1)), 1.0)
        return float(frame[0].sum())

    def test_rectangle(self) -> None:
        assert self.area("rectangle", (5.3, 4.6), (8.1, 9.9)) == pytest.approx(2.8 * 5.3, rel=1e-3)
        assert self.area("rectangle", (5.3, 4.0), (5.5, 9.0)) == pytest.approx(0.2 * 5.0, rel=1e-3)

    def test_polygon(self) -> None:
        slanted = [(5.2, 3.1), (17.7, 8.3), (15.0, 20.4), (4.4, 16.6)]
        xs, ys = np.array(slanted).T
        true = 0.5 * abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1)))
        assert self.area("polygon", slanted) == pytest.approx(true, rel=0.02)
        assert self.area("polygon", slanted[::-1]) == pytest.approx(true, rel=0.02)
        sliver = [(3.0, 5.1), (33.0, 5.1), (33.0, 5.3), (3.0, 5.3)]
        assert self.area("polygon", sliver) == pytest.approx(6.0, rel=0.05)

    def test_ellipse(self) -> None:
        big = self.area("ellipse", (20.3, 14.8), (11.0, 7.5))
        assert big == pytest.approx(math.pi * 11.0 * 7.5, rel=0.03)

    def test_cone(self) -> None:
        cone = self.area("cone", (20.3, 3.2), 24.7, 8.0)
        assert cone == pytest.approx(8.0 * 21.5, rel=0.03)

    def test_outside_the_picture_nothing_is_drawn(self) -> None:
        assert self.area("rectangle", (-9.0, 2.0), (-3.0, 9.0)) == 0
        assert self.area("ellipse", (60.0, 5.0), (5.0, 5.0)) == 0
        assert self.area("polygon", [(0.0, 40.0), (9.0, 40.0), (9.0, 50.0)]) == 0
        assert self.area("cone", (20.0, 40.0), 50.0, 5.0) == 0
