"""Pictures of rollouts: captioned frames side by side, and contact sheets."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from driving_sim.data.arrays import Floats32, Mask, Pixels
from driving_sim.world_model.action_plan import ActionPlan

_STRIP = 32
_MINIMUM_WIDTH = 256
_INK, _DIM, _PAPER = (240, 240, 240), (110, 110, 116), (24, 24, 28)
_LEFT_INK, _RIGHT_INK = (255, 176, 64), (88, 176, 255)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_panel(
    frame: Pixels,
    title: str,
    action: Floats32,
    valid: Mask,
    steering_range: float,
) -> Pixels:
    """Draw a frame under a caption strip; a small frame is enlarged by an integer factor.

    The caption shows the title and the `action` [2], which is speed in m/s and steering. Values
    that are not `valid` [2] are shown as "-". Steering is also drawn as a bar. A |steering| of
    `steering_range` fills one half of the bar.
    """
    speed, steering = (
        float(value) if known else None for value, known in zip(action, valid, strict=True)
    )
    scale = max(1, math.ceil(_MINIMUM_WIDTH / frame.shape[1]))
    large = _enlarged(frame, scale)
    strip = _draw_strip(large.shape[1], title, speed, steering, steering_range)
    return np.concatenate([strip, large])


def _enlarged(frame: Pixels, scale: int) -> Pixels:
    # Use np.repeat, because it takes half the time of einops.repeat.
    return frame.repeat(scale, axis=1).repeat(scale, axis=0)


@lru_cache(maxsize=64)  # actions often repeat; sharing the array is safe because it is read-only
def _draw_strip(
    width: int, title: str, speed: float | None, steering: float | None, steering_range: float
) -> Pixels:
    """Draw the title and the speed, and below them the steering as a bar and as a number."""
    image = Image.new("RGB", (width, _STRIP), _PAPER)
    draw = ImageDraw.Draw(image)
    font = _font(12)
    speed_text = "- m/s" if speed is None else f"{speed:.1f} m/s"
    draw.text((width - 6, 2), speed_text, fill=_INK, font=font, anchor="ra")
    room = width - 20 - draw.textlength(speed_text, font)
    title = title[: width // 2]  # no letter is narrower than 2 pixels
    while title and draw.textlength(title, font) > room:
        title = title[:-1]
    draw.text((6, 2), title, fill=_INK, font=font)
    share = max(-1.0, min(1.0, (steering or 0.0) / steering_range))
    _draw_bar(draw, (6, int(width * 0.8)), share)
    steering_text = "-" if steering is None else f"{steering:+.3f}"
    draw.text((width - 6, 16), steering_text, fill=_INK, font=font, anchor="ra")
    return np.asarray(image)


def _draw_bar(draw: ImageDraw.ImageDraw, ends: tuple[int, int], share: float) -> None:
    """Draw a steering bar between the x coordinates `ends`.

    |share|, from 0 to 1, is the part of one half that is filled. A positive `share` fills the left
    half from the middle, and a negative `share` the right half.
    """
    left, right = ends
    middle = (left + right) // 2
    draw.rectangle((left, 19, right, 27), outline=_DIM)
    if share != 0:
        tip = middle - round(share * (right - left) / 2)
        ink = _LEFT_INK if share > 0 else _RIGHT_INK
        draw.rectangle((min(middle, tip), 20, max(middle, tip), 26), fill=ink)
    draw.line((middle, 17, middle, 29), fill=_INK)


def draw_moment(
    plans: Sequence[ActionPlan],
    frames: Sequence[Pixels],
    index: int,
    steering_range: float,
    *,
    columns: int | None = None,
) -> Pixels:
    """Draw one frame of every future in a grid, each captioned with action `index` of its plan."""
    panels = [
        draw_panel(frame, plan.label, plan.actions[index], plan.valid[index], steering_range)
        for plan, frame in zip(plans, frames, strict=True)
    ]
    return side_by_side(panels, columns=columns)


def side_by_side(panels: Sequence[Pixels], *, columns: int | None = None) -> Pixels:
    """Arrange panels of one size in a grid.

    If `columns` is None, the number of columns is chosen so that the grid is closest to 16:9.
    """
    height, width = panels[0].shape[:2]

    def distance(columns: int) -> float:
        ratio = columns * width / (math.ceil(len(panels) / columns) * height)
        return abs(math.log(ratio / (16 / 9)))

    columns = columns or min(range(1, len(panels) + 1), key=distance)
    missing = -len(panels) % columns
    filled = [*panels, *[np.full_like(panels[0], _PAPER[0])] * missing]
    return rearrange(np.stack(filled), "(r c) h w k -> (r h) (c w) k", c=columns)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Pixels]]], headings: Sequence[str]) -> Pixels:
    """Draw a table of frames: a row for each (title, frames), a column for each heading."""
    height, width = rows[0][1][0].shape[:2]
    scale = max(1, round(256 / width))
    height, width = height * scale, width * scale
    image = Image.new("RGB", (len(headings) * width, 22 + len(rows) * (height + 22)), _PAPER)
    draw = ImageDraw.Draw(image)
    for column, heading in enumerate(headings):
        draw.text((column * width + 6, 4), heading, fill=_DIM, font=_font(13))
    for row, (title, frames) in enumerate(rows):
        top = 22 + row * (height + 22)
        draw.text((6, top + 3), title, fill=_INK, font=_font(13))
        for column, frame in enumerate(frames):
            large = _enlarged(frame, scale)
            image.paste(Image.fromarray(large), (column * width, top + 22))
    return np.asarray(image)
