"""Futures as tokens in a safetensors file, written frame by frame.

Axes: F futures, N frames, T context frames, r c token rows and columns.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.engine.weights import write_safetensors

WriteTokens = Callable[[int, Tensor], None]
"""Writes frame n of every future, int64 [F, r, c]."""


@contextmanager
def token_file(
    path: Path, *, context: Tensor, actions: NDArray[np.float32], valid: NDArray[np.bool_]
) -> Iterator[WriteTokens]:
    """Yield what writes the futures' tokens to `path`, beside their actions and the context.

    The file holds `tokens` U16 [F, N, r, c], `actions` F32 and `action_valid` BOOL [F, N, 2], and
    `context_tokens` U16 [T, r, c]. Memory does not grow with N.
    """
    futures, frames, _ = actions.shape
    head = {
        "actions": ("F32", actions.astype("<f4")),
        "context_tokens": ("U16", context.cpu().numpy().astype("<u2")),
        "action_valid": ("BOOL", valid),
    }
    columns = {name: (code, array.shape) for name, (code, array) in head.items()}
    columns["tokens"] = ("U16", (futures, frames, *context.shape[1:]))
    arrays = (array for _, array in head.values())
    write_safetensors(path, columns, arrays, metadata={})
    with path.open("r+b") as file:
        start = file.seek(0, os.SEEK_END)

        def write(index: int, tokens: Tensor) -> None:
            for future, frame in enumerate(tokens.cpu().numpy().astype("<u2")):
                file.seek(start + (future * frames + index) * frame.nbytes)
                file.write(frame.tobytes())

        yield write
