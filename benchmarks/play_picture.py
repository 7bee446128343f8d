"""`python -m benchmarks.play_picture OUT.webp`: film a drive on the page of `drivesim play`.

Needs Chromium. Drives in the packaged model: straight on, left, right, and then "what if".
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from benchmarks.measuring.browser import opened
from benchmarks.play import serving
from driving_sim.data.arrays import Pixels
from driving_sim.data.video.writer import write_animation

FPS = 5.0
_WIDTH = 640  # of the film in pixels
_KEYS = (
    ("ArrowUp", 1.0),
    ("ArrowLeft", 0.4),
    ("ArrowUp", 1.4),
    ("ArrowRight", 0.6),
    ("ArrowUp", 1.4),
    ("ArrowLeft", 0.6),
)
"""Keys that are held one after the other, and for how long, in s."""


def film(start: str) -> list[Pixels]:
    """Drive from a start, and return pictures of the page, uint8 [H, W, 3]."""
    shots: list[Pixels] = []
    with serving() as (port, _), opened(port) as page:
        page.click(f"#starts [data-start={start}]")
        for key, seconds in _KEYS:
            page.keyboard.down(key)
            _shoot(page, seconds, shots)
            page.keyboard.up(key)
        page.keyboard.press("q")
        _shoot(page, 4.0, shots)
    return shots


def _shoot(page: Page, seconds: float, shots: list[Pixels]) -> None:
    """Take pictures for some seconds."""
    began = time.monotonic()
    for number in range(round(seconds * FPS)):
        page.wait_for_timeout(max(0.0, 1000 * (began + number / FPS - time.monotonic())))
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        size = (_WIDTH, round(_WIDTH * image.height / image.width))
        shots.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))


def main() -> None:
    """Parse the options and write the film."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.play_picture")
    parser.add_argument("out", type=Path, help="animated WebP to write")
    parser.add_argument("--start", default="noon", help="context to start from; default: noon")
    options = parser.parse_args()
    shots = film(options.start)
    write_animation(options.out, shots, FPS)
    print(f"{len(shots)} pictures, {options.out.stat().st_size / 1e3:.0f} kB -> {options.out}")


if __name__ == "__main__":
    main()
