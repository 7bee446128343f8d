"""Split a set of drives into training drives and validation drives."""

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say

MIRROR_SUFFIX = "~mirror"
"""Suffix that is added to a drive's id for its mirrored copy.

A copy is on the same side of the split as its original."""
_NAMED = 10
"""Maximum number of drives that a message names."""


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
            "every drive is a validation drive, so none is left to train on; "
            "name fewer validation drives"
        )
    return chosen


def split_drives(
    ids: Sequence[str],
    *,
    validation: Sequence[str] | None = None,
    fraction: float = 0.1,
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    """Split drive ids into (training, validation), each in the order of `ids`.

    `validation` is the list of validation drives. Without it, a `fraction` of the drives is drawn
    by a hash of `seed` and the drive's id: at least one drive, but never all. The order of the ids
    does not matter. If there is only one drive, it is used for training. A mirrored drive
    `X~mirror` is on the same side of the split as `X`.

    Prints the ids of the validation drives. Raises DriveSimError if `validation` names an unknown
    drive, or if it names all drives.
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
        say(f"there is only one drive, {train[0]}: using it for training and for validation")
    return train, held_out
