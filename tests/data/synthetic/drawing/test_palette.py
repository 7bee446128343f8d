from driving_sim.data.synthetic.drawing.palette import PALETTES
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld


def test_palettes_can_be_chosen() -> None:
    def warmth(seed: int, palette: str) -> float:
        config = SyntheticConfig(height=16, width=32, palettes=(palette,))
        world = SyntheticWorld(seed, config)
        red, _, blue = world.render(world.reset())[:6].astype(float).mean((0, 1))
        return float(red - blue)

    for seed in range(4):
        assert warmth(seed, "evening") > warmth(seed, "noon") + 25
    assert set(SyntheticConfig().palettes) == set(PALETTES)
