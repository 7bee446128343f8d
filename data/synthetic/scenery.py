"""What stands beside the road and in the meadow: where each thing is, by seed and place."""

import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.hashing import uniform
from driving_sim.data.synthetic.road import Floats, Road

VISIBLE_M = 125.0
_BLOCK_M = 40.0
_REACH_M = VISIBLE_M + _BLOCK_M
_MEADOW_CELL_M = 24.0


class Kind(enum.IntEnum):
    """The kinds of thing."""

    TREE = 0
    CONIFER = 1
    BUSH = 2
    POST = 3
    HOUSE = 4
    GANTRY = 5
    CAR = 6


@dataclass(frozen=True, slots=True)
class Things:
    """Parallel arrays [N] of things that stand on the ground."""

    kind: NDArray[np.int64]
    x: Floats
    y: Floats
    heading: Floats
    height: Floats
    """In metres."""
    tint: Floats
    """In 0..1: which of its kind's colours and proportions it has."""

    @classmethod
    def joined(cls, parts: "list[Things]") -> "Things":
        """Return all things of several groups as one."""
        names = cls.__dataclass_fields__
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

    def chosen(self, which: NDArray[Any]) -> "Things":
        """Return the things that a mask or indices name, in that order."""
        return Things(**{n: getattr(self, n)[which] for n in self.__dataclass_fields__})


class Scenery:
    """Gives the things near a place; the same ones whatever the way there."""

    def __init__(self, road: Road, seed: int) -> None:
        self._road = road
        self._seed = seed
        self._blocks: dict[tuple[int, int], Things] = {}

    def near(self, x: float, y: float) -> Things:
        """Return at least everything within `VISIBLE_M` of a point."""
        block = math.floor(x / _BLOCK_M), math.floor(y / _BLOCK_M)
        if block not in self._blocks:
            if len(self._blocks) > 64:
                self._blocks.clear()
            centre_x, centre_y = ((b + 0.5) * _BLOCK_M for b in block)
            things = Things.joined(
                [
                    self._row(centre_x, Kind.POST, 24.0),
                    self._row(centre_x, Kind.TREE, 15.0),
                    self._row(centre_x, Kind.HOUSE, 64.0),
                    self._row(centre_x, Kind.GANTRY, 110.0),
                    self._meadow(centre_x, centre_y),
                ]
            )
            near = np.maximum(abs(things.x - centre_x), abs(things.y - centre_y)) < _REACH_M
            self._blocks[block] = things.chosen(near)
        return self._blocks[block]

    def _row(self, centre_x: float, kind: Kind, spacing_m: float) -> Things:
        """Return the things of a kind along both sides of the road (a gantry stands across it)."""
        # Offsets of up to 25 m on a slope of 0.74 move a thing up to 15 m along x.
        reach = _REACH_M + 20
        first, last = (math.floor((centre_x + side * reach) / spacing_m) for side in (-1, 1))
        index = np.repeat(np.arange(first, last + 1), 2)
        side = np.tile([-1.0, 1.0], last + 1 - first)
        chance, aside, tall, tint, along = (
            uniform(self._seed, int(kind), index, (side > 0).astype(np.int64), draw)
            for draw in range(5)
        )
        station = index * spacing_m
        if kind is Kind.POST:
            present, offset, height = chance < 2, 4.6 * side, np.full_like(side, 1.2)
        elif kind is Kind.TREE:
            # Whole stretches are wooded or open, each side for itself.
            wooded = uniform(self._seed, 100, index // 5, (side > 0).astype(np.int64))
            present = chance < np.where(wooded < 0.6, 0.85, 0.2)
            offset, height = side * (8.0 + 6.0 * aside), 6.0 + 5.0 * tall
            station = station + 6.0 * along
        elif kind is Kind.HOUSE:
            present, offset = chance < 0.4, side * (17.0 + 5.0 * aside)
            height = 5.5 + 2.0 * tall
        else:
            present, offset = (chance < 0.8) & (side > 0), 0.0 * side
            height = np.full_like(side, 6.2)
            station = station + 30.0 * along
        x, y, heading = self._road.place(station, offset)
        kinds = np.full(len(side), int(kind))
        if kind is Kind.TREE:
            kinds[tint > 0.75] = int(Kind.CONIFER)
        return Things(kinds, x, y, heading, height, tint).chosen(present)

    def _meadow(self, centre_x: float, centre_y: float) -> Things:
        """Return what grows out in the meadow, away from the road."""
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
