"""How each kind of thing looks: trees are shaded balls and cones, the rest is boxes and panels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.drawing.brush import NEAREST_M, Brush
from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.palette import Palette
from driving_sim.data.synthetic.drawing.shapes import Canvas, Rgb, rgb
from driving_sim.data.synthetic.road import HALF_WIDTH
from driving_sim.data.synthetic.scenery import VISIBLE_M, Kind, Things

_FADE_M = 25.0
_LEAST_PX = 1.5
_WIDEST_M = 8.0

_WALLS = tuple(map(rgb, ((236, 226, 204), (214, 150, 116), (226, 200, 130), (196, 204, 214))))
_ROOFS = tuple(map(rgb, ((166, 66, 50), (120, 60, 48), (96, 86, 92), (150, 84, 52))))
_PAINTS = tuple(
    map(rgb, ((204, 44, 40), (38, 92, 186), (240, 240, 238), (244, 186, 40), (40, 44, 52)))
)
_SIGNS = tuple(map(rgb, ((30, 92, 180), (24, 128, 84))))
_WHITE, _RED, _STEEL = rgb((244, 244, 240)), rgb((216, 40, 36)), rgb((120, 126, 136))
_GLASS, _TYRE = rgb((52, 62, 74)), rgb((26, 26, 30))


def _pick(colours: Sequence[Rgb], tint: float) -> Rgb:
    return colours[min(int(tint * len(colours)), len(colours) - 1)]


def _post(brush: Brush, height: float) -> None:
    brush.upright(0.11, 0.0, height, _WHITE)
    brush.upright(0.11, 0.62 * height, 0.86 * height, _RED)


def _car(brush: Brush, heading: float, tint: float) -> None:
    paint = _pick(_PAINTS, tint)
    brush.box(heading, (-2.1, 2.1), 0.95, (0.0, 0.3), (_TYRE, _TYRE))
    brush.box(heading, (-2.15, 2.15), 0.95, (0.3, 0.9), (paint, paint * 1.1))
    brush.box(heading, (-1.45, 0.85), 0.8, (0.9, 1.5), (_GLASS, paint))


def _gantry(brush: Brush, heading: float, height: float, tint: float) -> None:
    edge = HALF_WIDTH + 1.6
    for side in (-edge, edge):
        brush.panel(heading, (side - 0.22, side + 0.22), (0.0, height), _STEEL)
    brush.panel(heading, (-edge, edge), (height - 0.5, height), _STEEL)
    for right, left in ((-3.4, -0.3), (0.3, 3.4)):
        brush.panel(heading, (right, left), (height - 1.9, height + 0.3), _WHITE)
        inner = (right + 0.12, left - 0.12)
        brush.panel(heading, inner, (height - 1.78, height + 0.18), _pick(_SIGNS, tint))


def _house(brush: Brush, heading: float, height: float, tint: float) -> None:
    half_length, half_width, eaves = 5.0, 4.0, 0.58 * height
    wall, roof = _pick(_WALLS, tint), _pick(_ROOFS, (tint * 7) % 1)
    brush.box(heading, (-half_length, half_length), half_width, (0.0, eaves), (wall, wall))
    along, across, above = brush.camera_place(heading)
    gable = ((-half_width, eaves), (half_width, eaves), (0.0, height))
    for end in (-half_length, half_length):
        if along * end > half_length**2:
            brush.face([brush.place(heading, end, *corner) for corner in gable], wall)
    for side in (-half_width, half_width):
        # The slope's plane reaches the camera's height this far out.
        if across * side > half_width**2 * (height - above) / (height - eaves):
            ends = (-half_length, half_length)
            slope = [brush.place(heading, end, side, eaves) for end in ends]
            slope += [brush.place(heading, end, 0.0, height) for end in ends[::-1]]
            brush.face(slope, roof)


class PropPainter:
    """Draws the things in view, the farthest first."""

    def __init__(self, camera: Camera, palette: Palette) -> None:
        self._camera = camera
        self._widest_slope = 0.5 * camera.width / camera.focal
        self._haze = rgb(palette.haze)
        self._crown = rgb(palette.crown)
        self._conifer = rgb(palette.conifer)
        self._trunk = rgb(palette.trunk)

    def paint(self, frame: NDArray[np.float32], things: Things, view: View) -> None:
        """Draw things on a frame [3, H, W]."""
        canvas = Canvas(frame)
        depth, left = view.depth_and_left(things.x, things.y)
        opacity = self._opacities(things, depth, left)
        half_width = np.where(things.kind <= Kind.POST, things.height, _WIDEST_M)
        seen = (opacity > 0) & (depth > -half_width)
        seen &= np.abs(left) < np.maximum(depth, 0) * self._widest_slope + half_width
        order = np.nonzero(seen)[0]
        order = order[np.argsort(-depth[order], kind="stable")]
        columns = (things.kind, depth, left, things.heading, things.height, things.tint, opacity)
        # Lists of plain numbers: NumPy's own scalars are slow one at a time.
        rows = zip(*(column[order].tolist() for column in columns), strict=True)
        for kind, ahead, aside, heading, height, tint, opaque in rows:
            brush = Brush(canvas, self._camera, self._haze, ahead, aside, opaque)
            if kind == Kind.HOUSE:
                _house(brush, heading - view.heading, height, tint)
            elif kind == Kind.GANTRY:
                _gantry(brush, heading - view.heading, height, tint)
            elif kind == Kind.CAR:
                _car(brush, heading - view.heading, tint)
            elif kind == Kind.POST:
                _post(brush, height)
            else:
                self._plant(brush, kind, height, tint)

    def _opacities(self, things: Things, depth: Any, left: Any) -> Any:
        """Return how solid each thing is: nothing appears or vanishes at once."""
        distance = np.hypot(depth, left)
        opacity = np.clip((VISIBLE_M - distance) / _FADE_M, 0, 1)
        ahead = np.maximum(depth, NEAREST_M)
        opacity *= np.clip(self._camera.focal * things.height / ahead - _LEAST_PX, 0, 1)
        # What the car drives through thins out rather than fill the picture; a house, whose inner
        # sides are not drawn, needs no such thing. A car beside the camera is out of its view.
        kinds = [things.kind < Kind.POST, things.kind == Kind.POST, things.kind == Kind.CAR]
        solidity = [(depth - 1.0) / 4.0, (depth - 1.0) / 0.5, (distance - 2.6) / 1.3]
        return opacity * np.clip(np.select(kinds, solidity, 1.0), 0, 1)

    def _plant(self, brush: Brush, kind: int, height: float, tint: float) -> None:
        if kind == Kind.CONIFER:
            brush.shadow(0.22 * height)
            brush.upright(0.03 * height, 0.0, 0.1 * height, self._trunk)
            for low, high, half_width, light in ((0.08, 0.55, 0.24, 0.7), (0.34, 1.0, 0.19, 0.95)):
                colour = self._conifer * (light + 0.35 * tint)
                brush.cone(half_width * height, low * height, high * height, colour)
        elif kind == Kind.TREE:
            half_width = height * (0.30 + 0.08 * tint)
            brush.shadow(0.8 * half_width)
            brush.upright(0.035 * height, 0.0, 0.5 * height, self._trunk)
            crown = self._crown * (0.85 + 0.4 * tint)
            brush.ball(0.64 * height, half_width, 0.37 * height, crown, 0.38)
        else:
            brush.shadow(0.9 * height)
            colour = self._crown * (0.8 + 0.5 * tint)
            brush.ball(0.42 * height, 0.8 * height, 0.5 * height, colour, 0.35)
