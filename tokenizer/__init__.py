"""Frames <-> tokens: FSQ, autoencoder, training, the frozen tokenizer, tokenize."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driving_sim.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; whoever only wants `drivesim --help` must not pay for it.
    if name == "Tokenizer":
        from driving_sim.tokenizer.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
