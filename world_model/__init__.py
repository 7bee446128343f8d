"""Tokens + actions -> next tokens: transformer, cache, sampling, training, rollout."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driving_sim.world_model.world_model import WorldModel

__all__ = ["WorldModel"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; whoever only wants `drivesim --help` must not pay for it.
    if name == "WorldModel":
        from driving_sim.world_model.world_model import WorldModel

        return WorldModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
