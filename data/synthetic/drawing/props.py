"""Draws the things in the world: plants, posts, houses, gantries and cars."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from driving_sim.data.arrays import Floats32
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


def _tree(brush: Brush, height: float, tint: float) -> None:
    half_width = height * (0.30 + 0.08 * tint)
    brush.shadow(0.8 * half_width)
    brush.upright(0.035 * height, 0.0, 0.5 * height, brush.palette["trunk"])
    crown = brush.palette["crown"] * (0.85 + 0.4 * tint)
    brush.ball(0.64 * height, half_width, 0.37 * height, crown, 0.38)


def _conifer(brush: Brush, height: float, tint: float) -> None:
    brush.shadow(0.22 * height)
    brush.upright(0.03 * height, 0.0, 0.1 * height, brush.palette["trunk"])
    for low, high, half_width, light in ((0.08, 0.55, 0.24, 0.7), (0.34, 1.0, 0.19, 0.95)):
        colour = brush.palette["conifer"] * (light + 0.35 * tint)
        brush.cone(half_width * height, low * height, high * height, colour)


def _bush(brush: Brush, height: float, tint: float) -> None:
    brush.shadow(0.9 * height)
    colour = brush.palette["crown"] * (0.8 + 0.5 * tint)
    brush.ball(0.42 * height, 0.8 * height, 0.5 * height, colour, 0.35)


def _post(brush: Brush, height: float, _: float) -> None:
    brush.upright(0.11, 0.0, height, _WHITE)
    brush.upright(0.11, 0.62 * height, 0.86 * height, _RED)


def _house(brush: Brush, height: float, tint: float) -> None:
    half_length, half_width, eaves = 5.0, 4.0, 0.58 * height
    wall, roof = _pick(_WALLS, tint), _pick(_ROOFS, (tint * 7) % 1)
    brush.box((-half_length, half_length), half_width, (0.0, eaves), (wall, wall))
    along, across, above = brush.camera_place()
    gable = ((-half_width, eaves), (half_width, eaves), (0.0, height))
    for end in (-half_length, half_length):
        if along * end > half_length**2:
            brush.face([brush.place(end, *corner) for corner in gable], wall)
    for side in (-half_width, half_width):
        # Draw this side of the roof only if the camera is above the plane of this side.
        if across * side > half_width**2 * (height - above) / (height - eaves):
            ends = (-half_length, half_length)
            slope = [brush.place(end, side, eaves) for end in ends]
            slope += [brush.place(end, 0.0, height) for end in ends[::-1]]
            brush.face(slope, roof)


def _gantry(brush: Brush, height: float, tint: float) -> None:
    edge = HALF_WIDTH + 1.6
    for side in (-edge, edge):
        brush.panel(side - 0.22, side + 0.22, 0.0, height, _STEEL)
    brush.panel(-edge, edge, height - 0.5, height, _STEEL)
    for right, left in ((-3.4, -0.3), (0.3, 3.4)):
        brush.panel(right, left, height - 1.9, height + 0.3, _WHITE)
        sign = _pick(_SIGNS, tint)
        brush.panel(right + 0.12, left - 0.12, height - 1.78, height + 0.18, sign)


def _car(brush: Brush, _: float, tint: float) -> None:
    paint = _pick(_PAINTS, tint)
    brush.box((-2.1, 2.1), 0.95, (0.0, 0.3), (_TYRE, _TYRE))
    brush.box((-2.15, 2.15), 0.95, (0.3, 0.9), (paint, paint * 1.1))
    brush.box((-1.45, 0.85), 0.8, (0.9, 1.5), (_GLASS, paint))


# Drawing functions in the order of `Kind`; their arguments are brush, height and tint.
_DRAW = (_tree, _conifer, _bush, _post, _house, _gantry, _car)


def paint_props(
    frame: Floats32, things: Things, view: View, camera: Camera, palette: Palette
) -> None:
    """Draw the visible things on a frame [3, H, W], the farthest first."""
    canvas = Canvas(frame)
    depth, left = view.depth_and_left(things.x, things.y)
    opacity = _opacities(things, depth, left, camera)
    half_width = np.where(things.kind <= Kind.POST, things.height, _WIDEST_M)
    seen = (opacity > 0) & (depth > -half_width)
    widest_slope = 0.5 * camera.width / camera.focal
    seen &= np.abs(left) < np.maximum(depth, 0) * widest_slope + half_width
    order = np.nonzero(seen)[0]
    order = order[np.argsort(-depth[order], kind="stable")]
    heading = things.heading - view.heading
    columns = (things.kind, things.height, things.tint, depth, left, heading, opacity)
    # Convert to Python numbers, because a loop over NumPy scalars is slow.
    for kind, height, tint, *place in zip(*(c[order].tolist() for c in columns), strict=True):
        _DRAW[kind](Brush(canvas, camera, palette, *place), height, tint)


def _opacities(things: Things, depth: Any, left: Any, camera: Camera) -> Any:
    """Return each thing's opacity, which changes gradually so that nothing appears suddenly."""
    distance = np.hypot(depth, left)
    opacity = np.clip((VISIBLE_M - distance) / _FADE_M, 0, 1)
    ahead = np.maximum(depth, NEAREST_M)
    opacity *= np.clip(camera.focal * things.height / ahead - _LEAST_PX, 0, 1)
    # Plants and posts fade out when the camera comes close. Otherwise they would fill the picture
    # when the car drives through them. Houses need no fading, because their inner sides are not
    # drawn. Cars fade by distance, not by depth, because they usually pass beside the camera.
    kinds = [things.kind < Kind.POST, things.kind == Kind.POST, things.kind == Kind.CAR]
    solidity = [(depth - 1.0) / 4.0, (depth - 1.0) / 0.5, (distance - 2.6) / 1.3]
    return opacity * np.clip(np.select(kinds, solidity, 1.0), 0, 1)
