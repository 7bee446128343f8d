"""A probe that reads the car's place in its lane off one picture.

It is a small convolutional network. It learns from the synthetic world, where the road gives the
exact answer, on pictures that went through a tokenizer, because environments show such pictures.

Axes: N pictures, B pictures of a batch, H W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from driving_sim.data.arrays import Floats, Floats32, Pixels
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.road import HALF_WIDTH, LANE_OFFSET
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.training.schedule import learning_rate_factor, position_by_steps
from driving_sim.engine.weights import load_weights, save_weights
from driving_sim.tokenizer.tokenizer import Tokenizer

PROBE_FILE = "lane-probe.safetensors"
"""Name of the probe's file in the run folder of a world model."""

_SIZE = (64, 128)
_WIDTHS = (16, 24, 32, 32)
_HIDDEN = 32
_SCALE = (2.0, 0.15)
"""Offset in m and heading in rad for an output of 1."""
_NEAR_M, _LEFT_M, _RIGHT_M = 0.8, 7.5, -4.5
_HEADING_RAD, _TURNED_RAD = 0.06, 0.35
_VIEWS = 16
_SEEN, _UNSEEN = 1, 2  # part of the seeds of worlds to train and to measure on
_BATCH = 64
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 50
_WEIGHT_DECAY = 0.02
_AT_ONCE = 64


class LaneProbe:
    """Reads the distance from the middle of the lane, and the direction, off single pictures."""

    def __init__(self, network: "_Network") -> None:
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a probe that `save` wrote. Raises DriveSimError for any other file."""
        network = _Network()
        load_weights(network, path, of="a lane probe")
        return cls(network)

    def save(self, path: Path) -> None:
        """Write the probe as a safetensors file, under 300 KB. A run's is named `PROBE_FILE`."""
        save_weights(self._network, path, {"kind": "lane probe"})

    @torch.inference_mode()
    def read(self, frames: Pixels) -> tuple[Floats, Floats]:
        """Return offsets in m and headings in rad, both [N], for pictures uint8 [N, H, W, 3].

        The offset is the distance from the middle of the driver's lane, and the heading is the
        direction of the car against that of the road. Left is positive. Pictures may have any size.
        """
        parts = [
            self._network(_small(frames[at : at + _AT_ONCE]))
            for at in range(0, len(frames), _AT_ONCE)
        ]
        offset, heading = torch.cat(parts).double().numpy().T * np.array(_SCALE)[:, None]
        return offset, heading

    def errors(
        self, tokenizer: Tokenizer, config: SyntheticConfig, *, worlds: int = 30, seed: int = 0
    ) -> tuple[float, float]:
        """Return the mean absolute errors of offset in m and heading in rad, on the road.

        They are measured in synthetic worlds that no probe is trained on.
        """
        off = []
        for number in range(worlds):
            frames, places = lane_views(tokenizer, config, [seed, _UNSEEN, number])
            on_road = np.abs(places[:, 0] + LANE_OFFSET) < HALF_WIDTH
            off.append(np.abs(np.stack(self.read(frames), axis=1) - places)[on_road])
        offset, heading = np.concatenate(off).mean(axis=0)
        return float(offset), float(heading)


class _Network(nn.Module):
    """Estimates offset and heading, in units of `_SCALE`, from small pictures."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *_WIDTHS)
        layers: list[nn.Module] = []
        for before, after in zip(widths, _WIDTHS, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(4, after),
                nn.GELU(),
            ]
        self.picture = nn.Sequential(*layers)
        cells = _SIZE[0] * _SIZE[1] // 4 ** len(_WIDTHS)
        self.head = nn.Sequential(
            nn.Linear(_WIDTHS[-1] * cells, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, len(_SCALE))
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Return outputs [B, 2] for pictures [B, 3, 64, 128] in [-1, 1]."""
        outputs: Tensor = self.head(self.picture(pictures).flatten(1))
        return outputs


def train_lane_probe(
    tokenizer: Tokenizer,
    config: SyntheticConfig,
    *,
    worlds: int = 400,
    steps: int = 1500,
    seed: int = 0,
    advance: Callable[[int], object] = lambda steps: None,
) -> LaneProbe:
    """Train a probe on pictures of `worlds` synthetic worlds, as the tokenizer shows them.

    The pictures depend only on `tokenizer`, `config`, `worlds` and `seed`. `advance` is called with
    1 after each world and after each of the training `steps`.
    """
    pictures, answers = [], []
    for number in range(worlds):
        frames, places = lane_views(tokenizer, config, [seed, _SEEN, number])
        pictures.append((_small(frames) * 127).to(torch.int8))
        answers.append(places)
        advance(1)
    targets = torch.from_numpy(np.concatenate(answers) / np.array(_SCALE, np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network()
        _fit(network, torch.cat(pictures), targets, steps, advance)
    return LaneProbe(network)


def lane_views(
    tokenizer: Tokenizer, config: SyntheticConfig, seed: int | list[int], views: int = _VIEWS
) -> tuple[Pixels, Floats32]:
    """Look at a synthetic world from random places on and beside its road.

    Returns the pictures as the tokenizer shows them, uint8 [N, H, W, 3], and the offset in m and
    the heading in rad of each [N, 2], as `LaneProbe.read` estimates them. Half of the places are
    near the middle of the lane.
    """
    rng = np.random.default_rng(seed)
    world = SyntheticWorld(int(rng.integers(2**31)), config)
    near = rng.random(views) < 0.5
    offsets = np.where(near, rng.normal(0, _NEAR_M, views), rng.uniform(_RIGHT_M, _LEFT_M, views))
    turned = rng.uniform(-_TURNED_RAD, _TURNED_RAD, views)
    headings = np.where(rng.random(views) < 0.6, rng.normal(0, _HEADING_RAD, views), turned)
    stations = rng.uniform(0.0, config.stretch_m, views)
    places = world.road.place(stations, offsets + LANE_OFFSET)
    frames = [
        world.render(VehicleState(float(x), float(y), float(road + heading), float(time)))
        for x, y, road, heading, time in zip(
            *places, headings, rng.uniform(0, 60, views), strict=True
        )
    ]
    shown = tokenizer.decode(tokenizer.encode(np.stack(frames))).numpy()
    return shown, np.stack([offsets, headings], axis=1).astype(np.float32)


def _fit(
    network: _Network,
    pictures: Tensor,
    targets: Tensor,
    steps: int,
    advance: Callable[[int], object],
) -> None:
    """Train a network on pictures int8 [N, 3, 64, 128] and their targets [N, 2]."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    for step in range(steps):
        factor = learning_rate_factor(
            step, position_by_steps(step, steps), warmup_steps=_WARMUP_STEPS, floor=0.02
        )
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * factor
        chosen = torch.randint(len(pictures), (_BATCH,))
        outputs = network(_varied(pictures[chosen].float() / 127))
        loss = functional.smooth_l1_loss(outputs, targets[chosen], beta=0.25)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance(1)


def _varied(pictures: Tensor) -> Tensor:
    """Vary brightness and contrast, because generated pictures drift in both."""
    shape = (len(pictures), 1, 1, 1)
    contrast, light = torch.empty(2, *shape).uniform_(-0.15, 0.15)
    varied: Tensor = pictures * (1 + contrast) + light
    return varied


def _small(frames: Pixels) -> Tensor:
    """Return pictures [N, 3, 64, 128] in [-1, 1] of frames uint8 [N, H, W, 3]."""
    images = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "n h w c -> n c h w")
    small: Tensor = functional.interpolate(images.float(), _SIZE, mode="area")
    return small / 127.5 - 1
