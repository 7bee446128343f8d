"""Pack what a driver sees into messages: pictures as PNG, entropy as bytes."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from driving_sim.data.arrays import Pixels
from driving_sim.play.drive import BRANCHES, Possibility, Sight
from driving_sim.play.replay import nullable
from driving_sim.play.serving.protocol import binary
from driving_sim.world_model.world_model import WorldModel


def png(pixels: Pixels) -> bytes:
    """Return a picture, uint8 [H, W, 3], as PNG: without loss, and packed fast."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def most_bits(world: WorldModel) -> float:
    """Return the highest possible entropy of a token in bits."""
    return math.log2(world.config.grid.codebook_size)


def packed_sight(world: WorldModel, sight: Sight, header: dict[str, Any]) -> bytes:
    """Return a `frame` message: the entropy of the tokens, and the picture."""
    entropy = b""
    if sight.entropy is not None:
        scaled = sight.entropy * (255 / (most_bits(world) * math.log(2)))
        entropy = np.clip(scaled, 0, 255).astype(np.uint8).tobytes()
    ((speed, steering),) = nullable(sight.car.action[None])
    facts = {
        "frame": sight.frame,
        "time_s": round(sight.frame / world.fps, 3),
        "speed": speed,
        "steering": steering,
    }
    return binary("frame", facts | header, [entropy, png(sight.pixels)])


def packed_possibility(world: WorldModel, shown: Possibility) -> bytes:
    """Return a `what_if` message: the pictures of the futures, and then the true ones."""
    truths = [] if shown.truths is None else list(shown.truths)
    header = {
        "step": shown.step,
        "steps": shown.steps,
        "time_s": round(shown.step / world.fps, 3),
        "branches": BRANCHES,
        "actions": nullable(shown.actions),
        "psnr_db": shown.psnr_db,
    }
    return binary("what_if", header, [png(picture) for picture in [*shown.pixels, *truths]])
