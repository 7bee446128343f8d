"""Futures as tokens in a safetensors file, written frame by frame.

Axes: F futures, N frames, T context frames, r c token rows and columns.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from driving_sim.data.arrays import Floats32, Mask
from driving_sim.engine.weights import write_safetensors


@contextmanager
def token_file(
    path: Path, *, context: Tensor, actions: Floats32, valid: Mask
) -> Iterator[Callable[[int, Tensor], None]]:
    """Yield what writes the futures' tokens to `path`, beside their actions and the context.

    It takes a frame's number and that frame of every future, int64 [F, r, c]. The file holds
    `tokens` U16 [F, N, r, c], `actions` F32 and `action_valid` BOOL [F, N, 2], and `context_tokens`
    U16 [T, r, c]. Memory does not grow with N.
    """
    futures, frames, _ = actions.shape
    arrays = {
        "actions": ("F32", actions.astype("<f4")),
        "context_tokens": ("U16", context.cpu().numpy().astype("<u2")),
        "action_valid": ("BOOL", valid),
    }
    forms = {name: (code, array.shape) for name, (code, array) in arrays.items()}
    forms["tokens"] = ("U16", (futures, frames, *context.shape[1:]))
    write_safetensors(path, forms, (array for _, array in arrays.values()), metadata={})
    with path.open("r+b") as file:
        start = file.seek(0, os.SEEK_END)

        def write(index: int, tokens: Tensor) -> None:
            for future, frame in enumerate(tokens.cpu().numpy().astype("<u2")):
                file.seek(start + (future * frames + index) * frame.nbytes)
                file.write(frame.tobytes())

        yield write
