"""The colours of a world: one palette for each kind of day, varied a little by the seed."""

import numpy as np

from driving_sim.data.synthetic.drawing.shapes import Rgb, rgb

PALETTES = ("noon", "evening", "autumn", "overcast")
"""Names of the kinds of day."""

# RGB in 0..255 for each kind of day, in the order of `PALETTES`.
_COLOURS = {
    "zenith": ((74, 140, 222), (104, 122, 204), (112, 158, 200), (146, 160, 178)),
    "horizon": ((196, 224, 244), (255, 206, 140), (228, 226, 212), (208, 214, 218)),
    "sun": ((255, 250, 225), (255, 226, 150), (255, 244, 214), (226, 228, 228)),
    "cloud": ((252, 252, 252), (255, 198, 172), (248, 246, 240), (190, 198, 206)),
    "far_hills": ((132, 164, 196), (142, 118, 152), (156, 160, 172), (142, 156, 168)),
    "near_hills": ((82, 128, 112), (98, 82, 108), (132, 118, 86), (96, 118, 114)),
    "meadow": ((104, 168, 66), (116, 128, 58), (140, 150, 66), (92, 142, 78)),
    "field": ((186, 186, 84), (196, 152, 74), (206, 166, 92), (150, 162, 92)),
    "verge": ((196, 176, 130), (178, 138, 98), (184, 156, 112), (164, 156, 132)),
    "asphalt": ((92, 94, 102), (84, 76, 88), (96, 92, 94), (78, 84, 92)),
    "marking": ((248, 246, 236), (252, 228, 190), (248, 242, 226), (238, 240, 238)),
    "crown": ((52, 122, 48), (84, 92, 40), (204, 108, 36), (48, 100, 58)),
    "conifer": ((30, 86, 62), (50, 64, 58), (58, 92, 56), (32, 76, 64)),
    "trunk": ((96, 68, 46), (82, 54, 42), (88, 62, 46), (80, 64, 50)),
}

Palette = dict[str, Rgb]
"""Colours by name: those of `_COLOURS`, and `haze`, the colour that distant things fade to."""


def varied(day: str, rng: np.random.Generator) -> Palette:
    """Return a day's palette, with brightness and tints varied by a few per cent."""
    brightness = rng.uniform(0.95, 1.05)
    colours = {}
    for name, by_day in _COLOURS.items():
        tint = rng.uniform(0.97, 1.03, 3) * brightness
        colours[name] = np.clip(np.array(by_day[PALETTES.index(day)]) * tint, 0, 255)
    colours["haze"] = 0.35 * colours["horizon"] + 0.65 * colours["far_hills"]
    return {name: rgb(colour) for name, colour in colours.items()}
