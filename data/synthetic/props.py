"""How each kind of thing looks: trees are shaded balls and cones, the rest is boxes."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.camera import Camera
from driving_sim.data.synthetic.palette import Palette
from driving_sim.data.synthetic.road import HALF_WIDTH
from driving_sim.data.synthetic.scenery import Kind
from driving_sim.data.synthetic.shapes import Canvas, Point

Rgb = NDArray[np.float32]
Corner = tuple[float, float, float]
"""Depth, metres to the left, metres above the ground: all as seen from the camera."""

_NEAREST_M = 0.4
_HAZE_M = 260.0
_WALLS = ((236, 226, 204), (214, 150, 116), (226, 200, 130), (196, 204, 214))
_ROOFS = ((166, 66, 50), (120, 60, 48), (96, 86, 92), (150, 84, 52))
_CARS = ((204, 44, 40), (38, 92, 186), (240, 240, 238), (244, 186, 40), (40, 44, 52))
_SIGNS = ((30, 92, 180), (24, 128, 84))


def _pick(colours: Sequence[tuple[int, int, int]], tint: float) -> Rgb:
    return np.array(colours[min(int(tint * len(colours)), len(colours) - 1)], np.float32)


def _clipped(corners: Sequence[Corner]) -> list[Corner]:
    """Return the part of a polygon in front of the camera (Sutherland and Hodgman 1974)."""
    kept: list[Corner] = []
    for (d0, l0, h0), (d1, l1, h1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if d0 >= _NEAREST_M:
            kept.append((d0, l0, h0))
        if (d0 >= _NEAREST_M) != (d1 >= _NEAREST_M):
            part = (_NEAREST_M - d0) / (d1 - d0)
            kept.append((_NEAREST_M, l0 + part * (l1 - l0), h0 + part * (h1 - h0)))
    return kept


class PropPainter:
    """Draws one thing at a time, the farthest first."""

    def __init__(self, camera: Camera, palette: Palette) -> None:
        self._camera = camera
        self._haze_colour = np.array(palette.haze, np.float32)
        self._crown = np.array(palette.crown, np.float32)
        self._conifer = np.array(palette.conifer, np.float32)
        self._trunk = np.array(palette.trunk, np.float32)
        self._black = np.zeros(3, np.float32)

    def paint(
        self,
        canvas: Canvas,
        kind: int,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        """Draw a thing of a height (metres) at `place`: depth, left and heading from the camera."""
        if kind == Kind.POST:
            self._post(canvas, place, height, opacity)
        elif kind == Kind.HOUSE:
            self._house(canvas, place, height, tint, opacity)
        elif kind == Kind.GANTRY:
            self._gantry(canvas, place, height, tint, opacity)
        elif kind == Kind.CAR:
            self._car(canvas, place, tint, opacity)
        elif place[0] > _NEAREST_M:
            # A plant that the car drives through thins out rather than fill the picture.
            opacity *= min(max((place[0] - 1.5) / 4.0, 0.0), 1.0)
            if kind == Kind.CONIFER:
                self._conifer_tree(canvas, place, height, tint, opacity)
            elif kind == Kind.TREE:
                self._tree(canvas, place, height, tint, opacity)
            else:
                self._bush(canvas, place, height, tint, opacity)

    def _hazy(self, colour: Rgb, depth: float) -> Rgb:
        share = np.float32(1 - math.exp(-max(depth, 0.0) / _HAZE_M))
        return colour + share * (self._haze_colour - colour)

    def _point(self, corner: Corner) -> Point:
        depth, left, above = corner
        return self._camera.column_of(depth, left), self._camera.row_of(depth, above)

    def _face(self, canvas: Canvas, corners: Sequence[Corner], colour: Rgb, opacity: float) -> None:
        visible = _clipped(corners)
        if len(visible) >= 3:
            canvas.polygon([self._point(c) for c in visible], colour, opacity=opacity)

    def _shadow(
        self, canvas: Canvas, place: tuple[float, float, float], radius: float, opacity: float
    ) -> None:
        depth, left, _ = place
        scale = self._camera.focal / depth
        flat = scale * radius * self._camera.above_ground_m / depth
        canvas.ellipse(
            self._point((depth, left, 0.0)),
            (scale * radius, max(flat, 0.3)),
            self._black,
            opacity=0.4 * opacity,
        )

    def _tree(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        depth, left, _ = place
        radius = height * (0.30 + 0.08 * tint)
        self._shadow(canvas, place, 0.8 * radius, opacity)
        trunk = self._hazy(self._trunk, depth)
        x, half = left, 0.035 * height
        stem = [(depth, x - half, 0.0), (depth, x + half, 0.0)]
        stem += [(depth, x + half, 0.5 * height), (depth, x - half, 0.5 * height)]
        self._face(canvas, stem, trunk, opacity)
        crown = self._hazy(self._crown * np.float32(0.85 + 0.4 * tint), depth)
        scale = self._camera.focal / depth
        centre = self._point((depth, left, 0.64 * height))
        radii = (scale * radius, scale * 0.37 * height)
        canvas.ellipse(centre, radii, crown, opacity=opacity, light=0.38)

    def _bush(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        depth, left, _ = place
        self._shadow(canvas, place, 0.9 * height, opacity)
        scale = self._camera.focal / depth
        colour = self._hazy(self._crown * np.float32(0.8 + 0.5 * tint), depth)
        centre = self._point((depth, left, 0.42 * height))
        radii = (scale * 0.8 * height, scale * 0.5 * height)
        canvas.ellipse(centre, radii, colour, opacity=opacity, light=0.35)

    def _conifer_tree(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        depth, left, _ = place
        self._shadow(canvas, place, 0.22 * height, opacity)
        base = self._conifer * np.float32(0.8 + 0.4 * tint)
        for low, high, half, light in ((0.08, 0.55, 0.24, 0.85), (0.34, 1.0, 0.19, 1.1)):
            colour = self._hazy(base * np.float32(light), depth)
            half *= height
            corners = [(depth, left - half, low * height), (depth, left + half, low * height)]
            self._face(canvas, [*corners, (depth, left, high * height)], colour, opacity)

    def _post(
        self, canvas: Canvas, place: tuple[float, float, float], height: float, opacity: float
    ) -> None:
        depth, left, _ = place
        for low, high, colour in ((0.0, 1.0, (244, 244, 240)), (0.62, 0.86, (216, 40, 36))):
            corners = [
                (depth, left + half, above * height)
                for half, above in ((-0.11, low), (0.11, low), (0.11, high), (-0.11, high))
            ]
            hazy = self._hazy(np.array(colour, np.float32), depth)
            self._face(canvas, corners, hazy, opacity)

    def _box(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        size: tuple[float, float, float, float],
        colours: tuple[Rgb, Rgb],
        opacity: float,
        middle: float = 0.0,
    ) -> None:
        """Draw the visible sides and top of a box.

        `size` is its length, width, underside and top; `middle` moves it along its heading;
        `colours` are those of its sides and its top.
        """
        depth, left, heading = place
        length, width, low, high = size
        cos, sin = math.cos(heading), math.sin(heading)
        depth, left = depth + middle * cos, left + middle * sin
        corners = [
            (
                depth + 0.5 * (a * length * cos - b * width * sin),
                left + 0.5 * (a * length * sin + b * width * cos),
            )
            for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))
        ]
        side, top = (self._hazy(colour, depth) for colour in colours)
        if high < self._camera.above_ground_m:
            self._face(canvas, [(d, left_, high) for d, left_ in corners], top, opacity)
        for i, light in enumerate((0.92, 0.72, 0.92, 1.0)):
            (d0, l0), (d1, l1) = corners[i], corners[(i + 1) % 4]
            # Seen from outside the corners run anticlockwise: the far sides turn away.
            if d0 * l1 - d1 * l0 > 0:
                continue
            face = [(d0, l0, low), (d1, l1, low), (d1, l1, high), (d0, l0, high)]
            self._face(canvas, face, side * np.float32(light), opacity)

    def _car(
        self, canvas: Canvas, place: tuple[float, float, float], tint: float, opacity: float
    ) -> None:
        paint = _pick(_CARS, tint)
        glass = np.array((52, 62, 74), np.float32)
        dark = np.array((26, 26, 30), np.float32)
        self._box(canvas, place, (4.2, 1.9, 0.0, 0.3), (dark, dark), opacity)
        self._box(canvas, place, (4.3, 1.9, 0.3, 0.9), (paint, paint * np.float32(1.1)), opacity)
        self._box(canvas, place, (2.3, 1.6, 0.9, 1.5), (glass, paint), opacity, middle=-0.3)

    def _gantry(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        depth, left, heading = place
        cos, sin = math.cos(heading), math.sin(heading)
        steel = np.array((120, 126, 136), np.float32)
        white = np.array((246, 246, 246), np.float32)

        def panel(near: float, far: float, low: float, high: float, colour: Rgb) -> None:
            ends = [(depth - side * sin, left + side * cos) for side in (near, far)]
            (d0, l0), (d1, l1) = ends
            corners = [(d0, l0, low), (d1, l1, low), (d1, l1, high), (d0, l0, high)]
            self._face(canvas, corners, self._hazy(colour, max(depth, 0.0)), opacity)

        edge = HALF_WIDTH + 1.6
        for side in (-edge, edge):
            panel(side - 0.22, side + 0.22, 0.0, height, steel)
        panel(-edge, edge, height - 0.5, height, steel)
        for near, far in ((-3.4, -0.3), (0.3, 3.4)):
            panel(near, far, height - 1.9, height + 0.3, white)
            panel(near + 0.12, far - 0.12, height - 1.78, height + 0.18, _pick(_SIGNS, tint))

    def _house(
        self,
        canvas: Canvas,
        place: tuple[float, float, float],
        height: float,
        tint: float,
        opacity: float,
    ) -> None:
        depth, left, heading = place
        cos, sin = math.cos(heading), math.sin(heading)
        half_length, half_width, eaves = 5.0, 4.0, 0.58 * height
        wall = self._hazy(_pick(_WALLS, tint), depth)
        roof = self._hazy(_pick(_ROOFS, (tint * 7) % 1), depth)

        def corner(along: float, across: float, above: float) -> Corner:
            return depth + along * cos - across * sin, left + along * sin + across * cos, above

        faces: list[tuple[list[Corner], Rgb]] = []
        for end in (-half_length, half_length):
            gable = [corner(end, -half_width, 0), corner(end, half_width, 0)]
            gable += [corner(end, half_width, eaves), corner(end, 0, height)]
            faces.append(([*gable, corner(end, -half_width, eaves)], wall))
        for side in (-half_width, half_width):
            long_wall = [corner(-half_length, side, 0), corner(half_length, side, 0)]
            long_wall += [corner(half_length, side, eaves), corner(-half_length, side, eaves)]
            faces.append((long_wall, wall * np.float32(0.84)))
            slope = [corner(-half_length, side, eaves), corner(half_length, side, eaves)]
            slope += [corner(half_length, 0, height), corner(-half_length, 0, height)]
            faces.append((slope, roof))
        faces.sort(key=lambda face: -sum(math.hypot(*c[:2]) for c in face[0]) / len(face[0]))
        for corners, colour in faces:
            self._face(canvas, corners, colour, opacity)
