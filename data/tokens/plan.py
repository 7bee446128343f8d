"""What a token store is to hold: fixed before the first token is made."""

import hashlib
import json
from typing import Any, NamedTuple

from driving_sim.data.inner_name import is_inner_name
from driving_sim.data.tokens.index import SCHEMA, StoreInfo, frame_bytes
from driving_sim.engine.config import Natural, config, require, to_dict

SHARD_BYTES = 512 * 2**20


@config
class PlannedDrive:
    """A drive that the store is to hold."""

    id: str
    """Its id, unique in the store."""
    frames: Natural
    """How many frames of it will be written; 0 for one known to be skipped."""
    source: str = ""
    """The kind of data source it comes from."""
    mirrored: bool = False
    """Whether the frames are flipped and the steering negated."""
    content: str = ""
    """Digest of what is known of it beforehand (frame choice, actions), so that a change shows."""

    def __post_init__(self) -> None:
        require(self, "id", is_inner_name(self.id), "a relative name, on one line")


class Piece(NamedTuple):
    """Frames [start, stop) of drive number `drive`, which lie in one shard."""

    drive: int
    start: int
    stop: int


@config
class StorePlan:
    """Everything that decides a store's bytes but the tokens and actions themselves."""

    info: StoreInfo
    """What is the same for every drive."""
    drives: tuple[PlannedDrive, ...]
    """The drives in the order they are stored."""
    shard_bytes: int = SHARD_BYTES
    """Most bytes of data in one shard: at least a frame's."""

    def __post_init__(self) -> None:
        ids = [drive.id for drive in self.drives]
        require(self, "drives", len(set(ids)) == len(ids), "of different ids")
        frame = frame_bytes(self.info.rows, self.info.cols)
        require(self, "shard_bytes", self.shard_bytes >= frame, f"{frame} or more, to hold a frame")

    @property
    def hash(self) -> str:
        """SHA-256 of the plan."""
        text = json.dumps({"schema": SCHEMA, **to_dict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self) -> list[list[Piece]]:
        """The pieces in each shard: drives in order, split only where no shard could hold one."""
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
        """The plan's hash and enough of the plan to say in what another one differs."""
        return {
            "hash": self.hash,
            **to_dict(self.info),
            "drives": len(self.drives),
            "shard_bytes": self.shard_bytes,
        }
