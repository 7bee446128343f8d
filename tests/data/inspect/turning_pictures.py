"""Pictures of a scene that turns by given shifts."""

import numpy as np
import numpy.typing as npt

from tests.fixtures.video_files import smooth_noise

HEIGHT, WIDTH = 128, 256
Frames = npt.NDArray[np.uint8]


def turning(shifts: npt.NDArray[np.float64], seed: int = 0) -> Frames:
    """Draw a far scene that moves right by `shifts` picture widths from frame to frame.

    The road below it changes at random, and the bonnet stays.
    """
    random = np.random.default_rng(seed)
    margin = 2 * WIDTH
    scene = smooth_noise(random, HEIGHT, WIDTH + 2 * margin)
    places = margin - WIDTH * np.concatenate([[0], np.cumsum(shifts)])
    frames = np.empty((len(places), HEIGHT, WIDTH, 3))
    for number, place in enumerate(places):
        column, part = int(place), place % 1
        left, right = (scene[:, start : start + WIDTH] for start in (column, column + 1))
        frames[number] = (left * (1 - part) + right * part)[:, :, None]
        frames[number, 75:115] = smooth_noise(random, 40, WIDTH)[:, :, None]
    frames[:, 115:] = smooth_noise(random, HEIGHT - 115, WIDTH)[:, :, None]
    return frames.astype(np.uint8)
