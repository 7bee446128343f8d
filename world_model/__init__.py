"""The world model: a transformer that predicts the next frame's tokens from tokens and actions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driving_sim.world_model.world_model import WorldModel

__all__ = ["WorldModel"]


def __getattr__(name: str) -> Any:
    # Import here: importing torch takes seconds, and `drivesim --help` must not wait for it.
    if name == "WorldModel":
        from driving_sim.world_model.world_model import WorldModel

        return WorldModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
