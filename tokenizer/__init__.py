"""Converts frames to tokens and back: the tokenizer, its training, and token stores."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driving_sim.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    # Import the tokenizer here, because it imports torch. That takes seconds, and
    # `drivesim --help` must not wait for it.
    if name == "Tokenizer":
        from driving_sim.tokenizer.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
