"""Futures as tokens in a safetensors file, written frame by frame.

Axes: F futures, N frames, T context frames, r c token rows and columns.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.data.safetensors_header import safetensors_header


class TokenFile:
    """Writes the tokens of every future beside their actions and the context; a context manager.

    The file holds `tokens` U16 [F, N, r, c], `actions` F32 and `action_valid` BOOL [F, N, 2], and
    `context_tokens` U16 [T, r, c]. Memory does not grow with N.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: Tensor,
        actions: NDArray[np.float32],
        valid: NDArray[np.bool_],
    ) -> None:
        self._path = path
        futures, self._frames, _ = actions.shape
        head = {
            "actions": ("F32", actions.astype("<f4")),
            "context_tokens": ("U16", context.cpu().numpy().astype("<u2")),
            "action_valid": ("BOOL", valid),
        }
        columns = {name: (code, array.shape) for name, (code, array) in head.items()}
        columns["tokens"] = ("U16", (futures, self._frames, *context.shape[1:]))
        data = [array.tobytes() for _, array in head.values()]
        self._head = b"".join([safetensors_header(columns), *data])

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        try:
            self._file.write(self._head)
        except OSError:
            self._file.close()
            raise
        return self

    def write(self, index: int, tokens: Tensor) -> None:
        """Write frame `index` of every future, int64 [F, r, c]."""
        for future, frame in enumerate(tokens.cpu().numpy().astype("<u2")):
            place = future * self._frames + index
            self._file.seek(len(self._head) + place * frame.nbytes)
            self._file.write(frame.tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
