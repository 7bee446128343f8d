"""The synthetic world: moves a car through a landscape and renders what its camera sees."""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from einops import rearrange
from pydantic import Field

from driving_sim.data.arrays import Mask, Pixels
from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.ground import Ground
from driving_sim.data.synthetic.drawing.palette import PALETTES, varied
from driving_sim.data.synthetic.drawing.props import paint_props
from driving_sim.data.synthetic.drawing.sky import Sky
from driving_sim.data.synthetic.motion.traffic import Traffic
from driving_sim.data.synthetic.motion.vehicle import VehicleState, step_vehicle
from driving_sim.data.synthetic.road import LANE_OFFSET, Road
from driving_sim.data.synthetic.scenery import VISIBLE_M, WIDEST_M, Scenery, Things, ThingsNearby
from driving_sim.engine.config import Share, config, require


@config
class SyntheticConfig:
    """Settings of the synthetic world: camera, drivers, traffic and colours."""

    height: Annotated[int, Field(ge=16, le=4096)] = 128
    """Height of the picture in pixels."""
    width: Annotated[int, Field(ge=16, le=4096)] = 256
    """Width of the picture in pixels."""
    fps: Annotated[float, Field(ge=4, le=120)] = 10.0
    """Frames per second. At least 4, because actions more than 0.25 s apart count as a gap."""
    field_of_view_deg: Annotated[float, Field(ge=20, le=140)] = 84.0
    """Horizontal field of view of the camera, in degrees."""
    camera_height_m: Annotated[float, Field(ge=0.5, le=10)] = 1.9
    """Height of the camera above the ground, in metres."""
    horizon: Annotated[float, Field(ge=0.2, le=0.8)] = 0.42
    """Share of the picture that lies above the horizon."""
    stretch_m: Annotated[float, Field(ge=0, le=1e6)] = 3000.0
    """Length of the stretch of road on which drives start, in metres."""
    cruise_mps: tuple[float, float] = (6.0, 13.0)
    """Lowest and highest cruising speed of drivers, in m/s."""
    stops_s: tuple[float, float] = (0.5, 1.5)
    """Shortest and longest time for which drivers stand after a stop, in s."""
    swerves_rad: tuple[float, float] = (0.04, 0.15)
    """Smallest and largest road-wheel angle of swerves, in rad, at most 0.2."""
    lateral_mps2: Annotated[float, Field(gt=0, le=100)] = 4.5
    """Lateral acceleration in m/s² that drivers do not exceed."""
    traffic: Share = 0.75
    """Density of oncoming traffic; 1 means one car every 130 m."""
    palettes: tuple[str, ...] = PALETTES
    """Kinds of day. The seed of a world chooses one of them."""

    def __post_init__(self) -> None:
        slow, fast = self.cruise_mps
        require(self, "cruise_mps", 1 <= slow <= fast <= 40, "two ascending speeds within 1..40")
        short, long = self.stops_s
        require(self, "stops_s", 0 <= short <= long <= 60, "two ascending times within 0..60")
        small, large = self.swerves_rad
        in_range = 0 <= small <= large <= 0.2
        require(self, "swerves_rad", in_range, "two ascending angles within 0..0.2")
        known = bool(self.palettes) and set(self.palettes) <= set(PALETTES)
        require(self, "palettes", known, f"one or more of {', '.join(PALETTES)}")


class SyntheticWorld:
    """A road through a landscape, both generated from a seed.

    The world keeps no state between calls: a picture depends only on (seed, config, car state).
    Any future can therefore be replayed from any state.
    """

    def __init__(self, seed: int, config: SyntheticConfig | None = None) -> None:
        self.seed = seed
        self.config = config = config or SyntheticConfig()
        rng = np.random.default_rng(seed)
        self.road = Road(rng)
        self._palette = varied(config.palettes[rng.integers(len(config.palettes))], rng)
        above_ground_m = config.camera_height_m
        self._camera = Camera(
            config.height, config.width, config.field_of_view_deg, config.horizon, above_ground_m
        )
        self._sky = Sky(self._camera, self._palette, rng)
        self._ground = Ground(self._camera, self.road, self._palette, rng, seed)
        self._scenery: ThingsNearby = Scenery(self.road, seed)
        self._traffic = Traffic(self.road, seed, config.traffic)

    def seen_from(self, state: VehicleState, seed: int) -> "SyntheticWorld":
        """Return a world that looks the same from a state, but is another one elsewhere.

        The sky, the meadow and the things that the camera does not see from this state are drawn
        anew with `seed`. The road and the traffic stay. A model that has seen this view only can
        show the car's future no better than such a world does.
        """
        world, view = copy(self), View(state)
        rng = np.random.default_rng(seed)
        world._sky = self._sky.seen_from(view, Sky(self._camera, self._palette, rng))
        meadow = Ground(self._camera, self.road, self._palette, rng, seed)
        world._ground = self._ground.seen_from(view, self._camera, meadow)
        things = Scenery(self.road, seed)
        world._scenery = _SceneryOfTwo(self._scenery, things, partial(self._sees, view))
        return world

    def _sees(self, view: View, things: Things) -> Mask:
        depth, left = view.depth_and_left(things.x, things.y)
        near = np.hypot(depth, left) < VISIBLE_M
        return np.asarray(near & self._camera.sees(depth, left, WIDEST_M / 2))

    def reset(self, station_m: float = 0.0) -> VehicleState:
        """Return the state of a car in the middle of its lane.

        `station_m` is the x of the centre line beside the car, in metres.
        """
        x, y, heading = self.road.place(np.array([float(station_m)]), np.array([LANE_OFFSET]))
        return VehicleState(float(x[0]), float(y[0]), float(heading[0]), 0.0)

    def step(self, state: VehicleState, action: Any) -> VehicleState:
        """Return the state at the next frame, after driving with an action.

        The action is (speed in m/s, road-wheel angle in rad, left positive). Raises ValueError if
        the speed or the angle is not finite.
        """
        speed_mps, steering_rad = float(action[0]), float(action[1])
        if not (math.isfinite(speed_mps) and math.isfinite(steering_rad)):
            raise ValueError(f"action ({speed_mps}, {steering_rad}): both must be finite")
        return step_vehicle(state, speed_mps, steering_rad, 1 / self.config.fps)

    def render(self, state: VehicleState) -> Pixels:
        """Return the picture that the camera sees in a state: uint8 RGB [height, width, 3]."""
        frame = np.empty((3, self.config.height, self.config.width), np.float32)
        view = View(state)
        self._sky.paint(frame, view)
        self._ground.paint(frame, view)
        things = Things.joined([self._scenery.near(view.x, view.y), self._traffic.near(state)])
        paint_props(frame, things, view, self._camera, self._palette)
        picture: Pixels = rearrange(
            np.clip(frame + 0.5, 0, 255).astype(np.uint8), "rgb rows columns -> rows columns rgb"
        )
        return np.ascontiguousarray(picture)


@dataclass(frozen=True, slots=True)
class _SceneryOfTwo:
    """The things of one scenery where they are seen, and those of another one elsewhere."""

    own: ThingsNearby
    elsewhere: ThingsNearby
    sees: Callable[[Things], Mask]

    def near(self, x: float, y: float) -> Things:
        own, others = self.own.near(x, y), self.elsewhere.near(x, y)
        return Things.joined([own.chosen(self.sees(own)), others.chosen(~self.sees(others))])
