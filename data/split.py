"""Split drives into training and validation drives; no drive is divided between the two."""

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say

MIRROR_SUFFIX = "~mirror"
"""Suffix of the id of a mirrored drive. The drive stays in the part of its original."""
_NAMED = 10
"""Largest number of drives that a message names."""


def original_id(drive_id: str) -> str:
    """Return the id without the suffix of a mirrored drive."""
    return drive_id.removesuffix(MIRROR_SUFFIX)


def _chosen(originals: list[str], validation: Sequence[str]) -> set[str]:
    chosen = {original_id(drive_id) for drive_id in validation}
    for unknown in sorted(chosen - set(originals)):
        nearest = get_close_matches(unknown, originals, n=1, cutoff=0.0)
        raise DriveSimError(
            f"validation drive {unknown!r} is not among the {len(originals)} drives; "
            f"the most similar id is {nearest[0] if nearest else 'none'!r}"
        )
    if chosen == set(originals):
        raise DriveSimError(
            "every drive is named for validation, and none is left to train on; name fewer drives"
        )
    return chosen


def split_drives(
    ids: Sequence[str],
    *,
    validation: Sequence[str] | None = None,
    fraction: float = 0.1,
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    """Split drive ids into (train, validation), each in the order given.

    `validation` names the validation drives. Without it, a `fraction` of the drives is drawn by a
    hash of `seed` and id, independently of their order: at least one drive, but never all. If there
    is only one drive, it is used for training. `X~mirror` stays in the same part as `X`.

    Prints which drives validate. Raises DriveSimError if `validation` names an unknown drive or all
    drives.
    """
    originals = sorted({original_id(drive_id) for drive_id in ids})
    if validation is not None:
        chosen = _chosen(originals, validation)
    else:
        count = min(max(1, round(fraction * len(originals))), len(originals) - 1)
        hashes = {hashlib.sha256(f"{seed}:{name}".encode()).digest(): name for name in originals}
        chosen = {hashes[digest] for digest in sorted(hashes)[: max(count, 0)]}
    train = [drive_id for drive_id in ids if original_id(drive_id) not in chosen]
    held_out = [drive_id for drive_id in ids if original_id(drive_id) in chosen]
    if held_out:
        more = f" and {len(held_out) - _NAMED} more" if len(held_out) > _NAMED else ""
        named = ", ".join(held_out[:_NAMED])
        say(f"training on {len(train)} drives, validating on {named}{more}")
    elif train:
        say(f"there is only one drive, {train[0]}: validating on its training frames")
    return train, held_out
