"""The colours of a world: a few kinds of day, each varied a little by the seed."""

from dataclasses import dataclass, fields, replace

import numpy as np

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """RGB colours in 0..255."""

    zenith: Colour
    horizon: Colour
    sun: Colour
    cloud: Colour
    far_hills: Colour
    near_hills: Colour
    meadow: Colour
    field: Colour
    verge: Colour
    asphalt: Colour
    marking: Colour
    crown: Colour
    conifer: Colour
    trunk: Colour

    @property
    def haze(self) -> Colour:
        """What distance turns everything into."""
        r, g, b = (0.35 * h + 0.65 * f for h, f in zip(self.horizon, self.far_hills, strict=True))
        return r, g, b


PALETTES: dict[str, Palette] = {
    "noon": Palette(
        zenith=(74, 140, 222),
        horizon=(196, 224, 244),
        sun=(255, 250, 225),
        cloud=(252, 252, 252),
        far_hills=(132, 164, 196),
        near_hills=(82, 128, 112),
        meadow=(104, 168, 66),
        field=(186, 186, 84),
        verge=(196, 176, 130),
        asphalt=(92, 94, 102),
        marking=(248, 246, 236),
        crown=(52, 122, 48),
        conifer=(30, 86, 62),
        trunk=(96, 68, 46),
    ),
    "evening": Palette(
        zenith=(104, 122, 204),
        horizon=(255, 206, 140),
        sun=(255, 226, 150),
        cloud=(255, 198, 172),
        far_hills=(142, 118, 152),
        near_hills=(98, 82, 108),
        meadow=(116, 128, 58),
        field=(196, 152, 74),
        verge=(178, 138, 98),
        asphalt=(84, 76, 88),
        marking=(252, 228, 190),
        crown=(84, 92, 40),
        conifer=(50, 64, 58),
        trunk=(82, 54, 42),
    ),
    "autumn": Palette(
        zenith=(112, 158, 200),
        horizon=(228, 226, 212),
        sun=(255, 244, 214),
        cloud=(248, 246, 240),
        far_hills=(156, 160, 172),
        near_hills=(132, 118, 86),
        meadow=(140, 150, 66),
        field=(206, 166, 92),
        verge=(184, 156, 112),
        asphalt=(96, 92, 94),
        marking=(248, 242, 226),
        crown=(204, 108, 36),
        conifer=(58, 92, 56),
        trunk=(88, 62, 46),
    ),
    "overcast": Palette(
        zenith=(146, 160, 178),
        horizon=(208, 214, 218),
        sun=(226, 228, 228),
        cloud=(190, 198, 206),
        far_hills=(142, 156, 168),
        near_hills=(96, 118, 114),
        meadow=(92, 142, 78),
        field=(150, 162, 92),
        verge=(164, 156, 132),
        asphalt=(78, 84, 92),
        marking=(238, 240, 238),
        crown=(48, 100, 58),
        conifer=(32, 76, 64),
        trunk=(80, 64, 50),
    ),
}


def varied(palette: Palette, rng: np.random.Generator) -> Palette:
    """Return the palette with its brightness and each colour's tint changed by a few per cent."""
    brightness = rng.uniform(0.95, 1.05)
    changes: dict[str, Colour] = {}
    for field in fields(palette):
        tint = rng.uniform(0.97, 1.03, 3) * brightness
        r, g, b = np.clip(np.array(getattr(palette, field.name)) * tint, 0, 255).tolist()
        changes[field.name] = (r, g, b)
    return replace(palette, **changes)
