"""The plan of a token store, which is fixed before the first frame is encoded."""

import hashlib
import json
from typing import Any, NamedTuple

from driving_sim.data.inner_name import is_inner_name
from driving_sim.data.tokens.index import SCHEMA, StoreInfo, frame_bytes
from driving_sim.engine.config import Natural, config, require, to_dict

SHARD_BYTES = 512 * 2**20


@config
class PlannedDrive:
    """A drive that the store will hold."""

    id: str
    """Id of the drive, unique in the store."""
    frames: Natural
    """Number of frames that will be stored; 0 for a drive that will be skipped."""
    source: str = ""
    """Kind of data source that the drive comes from."""
    mirrored: bool = False
    """Whether the frames are flipped left to right and the steering is negated."""
    content: str = ""
    """Digest of the chosen frames and their actions. If they change, the plan's hash changes."""
    notices: tuple[str, ...] = ()
    """What was assumed, left out, resampled or guessed about the drive, one line each."""

    def __post_init__(self) -> None:
        require(self, "id", is_inner_name(self.id), "a relative path without '..', on one line")


class Piece(NamedTuple):
    """Part of a drive that lies in one shard: the frames [start, stop) of drive number `drive`."""

    drive: int
    start: int
    stop: int


@config
class StorePlan:
    """Everything that determines the files of a store, except the tokens and actions."""

    info: StoreInfo
    """Facts that are the same for all drives."""
    drives: tuple[PlannedDrive, ...]
    """Drives in the order in which they are stored."""
    shard_bytes: int = SHARD_BYTES
    """Maximum number of data bytes in one shard; at least the size of one frame."""
    passed_over: tuple[str, ...] = ()
    """What was left out of the searched folders, one line each."""

    def __post_init__(self) -> None:
        ids = [drive.id for drive in self.drives]
        require(self, "drives", len(set(ids)) == len(ids), "drives with different ids")
        frame = frame_bytes(self.info.rows, self.info.cols)
        require(self, "shard_bytes", self.shard_bytes >= frame, f"{frame} (one frame) or more")

    @property
    def hash(self) -> str:
        """SHA-256 of the plan, in hexadecimal."""
        fields = to_dict(self)
        del fields["passed_over"]  # other notices do not make another plan
        for drive in fields["drives"]:
            del drive["notices"]
        text = json.dumps({"schema": SCHEMA, **fields}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self) -> list[list[Piece]]:
        """Return a list with one entry per shard: the list of the shard's pieces.

        Drives stay in order. Only a drive that is too long for one shard is split.
        """
        capacity = self.shard_bytes // frame_bytes(self.info.rows, self.info.cols)
        shards: list[list[Piece]] = []
        free = 0
        for number, drive in enumerate(self.drives):
            for start in range(0, drive.frames, capacity):
                stop = min(start + capacity, drive.frames)
                if stop - start > free:
                    shards.append([])
                    free = capacity
                shards[-1].append(Piece(number, start, stop))
                free -= stop - start
        return shards

    def summary(self) -> dict[str, Any]:
        """Return the plan's hash and main settings, to compare them with those of a later plan."""
        return {
            "hash": self.hash,
            **to_dict(self.info),
            "drives": len(self.drives),
            "shard_bytes": self.shard_bytes,
        }
