"""The things beside the road and in the meadow, placed at random with a seed."""

import enum
import math
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Ints, Reals
from driving_sim.data.hashing import uniform
from driving_sim.data.synthetic.road import Road

VISIBLE_M = 125.0
WIDEST_M = 16.0
_BLOCK_M = 40.0
_REACH_M = VISIBLE_M + _BLOCK_M
_MEADOW_CELL_M = 24.0


class Kind(enum.IntEnum):
    """Kinds of things in the world."""

    TREE = 0
    CONIFER = 1
    BUSH = 2
    POST = 3
    HOUSE = 4
    GANTRY = 5
    CAR = 6


class Things(NamedTuple):
    """Things that stand on the ground, as parallel arrays [N]."""

    kind: Ints
    x: Reals
    y: Reals
    heading: Reals
    height: Reals
    """Height in metres."""
    tint: Reals
    """Number in 0..1 that determines the colours and proportions of a thing of its kind."""

    @classmethod
    def joined(cls, parts: "list[Things]") -> "Things":
        """Return the things of several groups as one group."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def chosen(self, which: NDArray[Any]) -> "Things":
        """Return the things selected by a mask, or by indices in the order of the indices."""
        return Things(*(column[which] for column in self))


# Things along both sides of the road. All lengths are in metres. The values for each kind are:
# - the spacing along the road,
# - the maximum random shift along the road,
# - the minimum distance from the centre line, and the maximum random addition to it,
# - the minimum height, and the maximum random addition to it,
# - the share of places that get a thing.
_BESIDE_THE_ROAD = {
    Kind.POST: (24.0, 0.0, (4.6, 0.0), (1.2, 0.0), 1.0),
    Kind.TREE: (15.0, 6.0, (8.0, 6.0), (6.0, 5.0), 0.85),
    Kind.HOUSE: (64.0, 0.0, (17.0, 5.0), (5.5, 2.0), 0.4),
    Kind.GANTRY: (110.0, 30.0, (0.0, 0.0), (6.2, 0.0), 0.8),
}


class ThingsNearby(Protocol):
    """Finds the things near a point."""

    def near(self, x: float, y: float) -> Things:
        """Return all things within `VISIBLE_M` of a point, and some that are farther away."""
        ...


class Scenery:
    """Finds the things near a point. All things depend only on the road and the seed."""

    def __init__(self, road: Road, seed: int) -> None:
        self._road = road
        self._seed = seed
        self._block = lru_cache(64)(self._find_block)

    def near(self, x: float, y: float) -> Things:
        """Return all things within `VISIBLE_M` of a point, and some that are farther away."""
        return self._block(math.floor(x / _BLOCK_M), math.floor(y / _BLOCK_M))

    def _find_block(self, column: int, row: int) -> Things:
        x, y = (column + 0.5) * _BLOCK_M, (row + 0.5) * _BLOCK_M
        rows = [self._row(x, kind) for kind in _BESIDE_THE_ROAD]
        things = Things.joined([*rows, self._meadow(x, y)])
        return things.chosen(np.maximum(abs(things.x - x), abs(things.y - y)) < _REACH_M)

    def _row(self, centre_x: float, kind: Kind) -> Things:
        """Return the things of a kind on both sides of the road, or the gantries over the road."""
        spacing, shift, (aside, more_aside), (height, more_height), share = _BESIDE_THE_ROAD[kind]
        # Search 20 m beyond `_REACH_M`. The search looks only at the x of the road, and a thing
        # beside the road can have an x that differs by up to 15 m (at a slope of 0.74 and an offset
        # of 25 m).
        reach = _REACH_M + 20
        first, last = (math.floor((centre_x + side * reach) / spacing) for side in (-1, 1))
        index = np.repeat(np.arange(first, last + 1), 2)
        left = np.tile([0, 1], last + 1 - first)
        side = 2.0 * left - 1.0
        chance, out, tall, tint, along = (
            uniform(self._seed, int(kind), index, left, draw) for draw in range(5)
        )
        x, y, heading = self._road.place(
            index * spacing + shift * along, side * (aside + more_aside * out)
        )
        present = chance < share
        kinds = np.full(len(side), int(kind))
        if kind is Kind.GANTRY:
            present &= left == 1
        if kind is Kind.TREE:
            # On each side of the road, wooded stretches alternate with open ones, at random.
            wooded = uniform(self._seed, 100, index // 5, left) < 0.6
            present &= wooded | (chance < 0.2)
            kinds[tint > 0.75] = int(Kind.CONIFER)
        return Things(kinds, x, y, heading, height + more_height * tall, tint).chosen(present)

    def _meadow(self, centre_x: float, centre_y: float) -> Things:
        """Return the plants in the meadow, away from the road."""
        columns, rows = (
            np.arange(
                math.floor((centre - _REACH_M) / _MEADOW_CELL_M),
                math.floor((centre + _REACH_M) / _MEADOW_CELL_M) + 1,
            )
            for centre in (centre_x, centre_y)
        )
        column, row = (axis.ravel() for axis in np.meshgrid(columns, rows))
        chance, along, across, tall, tint = (
            uniform(self._seed, 200, column, row, draw) for draw in range(5)
        )
        x = (column + 0.1 + 0.8 * along) * _MEADOW_CELL_M
        y = (row + 0.1 + 0.8 * across) * _MEADOW_CELL_M
        kind = np.where(chance < 0.2, Kind.TREE, np.where(chance < 0.32, Kind.CONIFER, Kind.BUSH))
        height = np.where(kind == Kind.BUSH, 1.2 + 1.2 * tall, 6.0 + 6.0 * tall)
        _, offset, _ = self._road.project(x, y)
        present = (chance < 0.4) & (np.abs(offset) > 16.0)
        return Things(kind, x, y, np.zeros_like(x), height, tint).chosen(present)
