"""Read tubs of donkeycar, which are recordings of model cars. Each session is a drive.

The steering is from -1 to 1, and right positive in the tub. There is no speed: the throttle stands
in for it. `records.py` says how the files are laid out.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import ActionLog, Channel
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.drive import Drive
from driving_sim.data.sources.donkeycar.records import (
    RECORD_V1,
    Record,
    Tub,
    read_tub_v1,
    read_tub_v2,
    sessions,
)
from driving_sim.data.sources.pictures.files import (
    about_sizes,
    check_picture_times,
    find_pictures,
    unused_rate,
)
from driving_sim.data.sources.source import Contents, Folder, Found, refused
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

FULL_THROTTLE_MPS = 5.0
"""Speed that full throttle stands for."""
_USUAL_RATE = 20.0  # frames/s, donkeycar's default
# No car is driven backwards for so large a share of its records. In a real tub of a car that drives
# forwards, the throttle is negative in 96 % of them.
_REVERSED_SHARE = 0.8


def _is_v1(folder: Folder) -> bool:
    return "meta.json" in folder.files and any(map(RECORD_V1.fullmatch, folder.files))


def _is_catalog(name: str) -> bool:
    return name.startswith("catalog_") and name.endswith((".catalog", ".catalog_manifest"))


def _is_v2(folder: Folder) -> bool:
    return "manifest.json" in folder.files and any(map(_is_catalog, folder.files))


def detect(folder: Folder) -> bool:
    """Return whether a folder is a tub of version 1 or 2."""
    return _is_v1(folder) or _is_v2(folder)


def drives(folder: Folder) -> Contents:
    """Return a drive for each session of a tub."""
    own: set[str]
    if _is_v2(folder):
        own = {"manifest.json", "images", *filter(_is_catalog, folder.files)}
    else:
        own = {"meta.json", *(name for name in folder.files if RECORD_V1.fullmatch(name))}
    try:
        tub = read_tub_v2(folder) if _is_v2(folder) else read_tub_v1(folder)
        kept = _sessions(tub)
    except DriveSimError as error:
        return Contents(drives=(Found(path=folder.path, load=refused(error)),), own=frozenset(own))
    own |= {record.image for record in tub.records} & {*folder.files}
    width = len(str(len(kept)))
    found = [
        Found(
            path=folder.path,
            load=partial(_load, session, tub),
            part=f"session_{number:0{width}}" if len(kept) > 1 else "",
        )
        for number, session in enumerate(kept, 1)
    ]
    return Contents(drives=tuple(found), own=frozenset(own))


def _sessions(tub: Tub) -> list[list[Record]]:
    """Return the sessions with at least 2 records that are not deleted, and say what is left out.

    Raises DriveSimError if there is none.
    """
    found = sessions(tub)
    usable = [
        session
        for session in found
        if sum(record.number not in tub.deleted for record in session) > 1
    ]
    if not usable:
        where = f"{tub.records[0].where}: the tub" if tub.records else "the tub"
        raise DriveSimError(f"{where} has fewer than 2 records that are not deleted")
    if len(found) > 1:
        tub.notices.append(
            f"the tub contains {len(found)} sessions, because the session's id changes, or the "
            "times of its records go back or jump by more than 10 s; each is a drive"
        )
    if len(usable) < len(found):
        tub.notices.append(
            f"{len(found) - len(usable)} of the sessions have fewer than 2 records that are not "
            "deleted, and are left out"
        )
    return usable


def _load(
    session: list[Record],
    tub: Tub,
    path: Path,
    drive_id: str,
    reading: Reading,
    actions: bool,
) -> Drive:
    """Load a session. Raises DriveSimError if fewer than 2 of its pictures are there."""
    records = [record for record in session if record.number not in tub.deleted]
    notices = [*tub.notices]
    if deleted := len(session) - len(records):
        notices.append(
            f"{deleted} of {len(session)} records are marked as deleted; they are left out, which "
            "leaves gaps"
        )

    def bad_name(index: int, error: object) -> DriveSimError:
        return DriveSimError(f"{records[index].where}: {one_line(error)}; correct it")

    kept, pictures, lines = find_pictures(path, [record.image for record in records], bad_name)
    notices += lines
    if len(kept) < 2:
        raise DriveSimError(
            f"{one_line(path)}: only {len(kept)} of {len(records)} pictures are there (the first "
            f"is {one_line(records[0].image)}); copy the tub again"
        )
    records = [records[index] for index in kept]
    clock = _clock(records, reading, notices)
    distinct = np.append(True, np.diff(clock) > 0)
    if repeated := int((~distinct).sum()):
        notices.append(f"{repeated} records repeat the time of another and are left out")
    chosen = np.flatnonzero(distinct)
    times = check_picture_times(one_line(path), clock[chosen])
    pictures = replace(pictures, paths=tuple(pictures.files(chosen)))
    log = None
    if actions:
        reading.check_kind(f"{one_line(path)}: a tub's steering", "normalised")
        clock = times + reading.time_offset
        log = _log([records[index] for index in chosen], path, clock, _reversed_share(tub))
    return Drive(
        id=drive_id,
        source="donkeycar",
        timestamps=times,
        reader=pictures,
        log=log,
        assumptions=(*notices, *about_sizes(pictures)),
    )


def _clock(records: list[Record], reading: Reading, notices: list[str]) -> Floats:
    """Return the time of each record in seconds."""
    seconds = np.array([record.seconds for record in records])
    if not np.isnan(seconds).any():
        notices += unused_rate(reading)
        return seconds
    rate = reading.video_fps or _USUAL_RATE
    taken = (
        f"{rate:g} records/s are taken, as `video_fps` says"
        if reading.video_fps is not None
        else f"{rate:g} records/s, which is usual, are assumed (set it with `video_fps`)"
    )
    notices.append(f"the records have no times; {taken}")
    indices: Ints = np.array([record.number for record in records])
    return indices / rate


def _reversed_share(tub: Tub) -> float:
    """Return the share of the records with a negative throttle among those that have any."""
    throttles = np.array([record.throttle for record in tub.records if record.throttle])
    known = throttles[~np.isnan(throttles)]
    return float((known < 0).mean()) if len(known) else 0.0


def _log(
    records: list[Record], path: Path, clock: Floats, reversed_share: float
) -> ActionLog | None:
    """Return the steering and the throttle of the records at their times, or None."""
    notices = []
    values = np.array([(record.throttle, -record.angle) for record in records])
    unknown = int(np.isnan(values).any(axis=1).sum())
    if unknown:
        notices.append(
            f"{unknown} of {len(records)} records do not contain the throttle or the steering that "
            "drove the car (such as that of an autopilot); there, it is unknown"
        )
    if beyond := int((abs(values) > 1).any(axis=1).sum()):
        notices.append(f"{beyond} records have values beyond ±1, which are taken as ±1")
    speed, steering = (_channel(clock, column) for column in values.clip(-1, 1).T)
    if speed is None and steering is None:
        return None
    if speed is not None:
        is_reversed = reversed_share > _REVERSED_SHARE
        scale = np.float32(-FULL_THROTTLE_MPS if is_reversed else FULL_THROTTLE_MPS)
        speed = replace(speed, values=speed.values * scale)
        notices.append(
            "the tub has no speed: the throttle stands in for it, with full throttle as "
            f"{FULL_THROTTLE_MPS:g} m/s"
        )
        if is_reversed:
            notices.append(
                f"the throttle is negative in {reversed_share:.0%} of the tub's records, so "
                "negative is taken to mean forwards"
            )
    return ActionLog(
        speed=speed,
        steering=steering,
        steering_kind="normalised" if steering is not None else None,
        notices=tuple(notices),
        origin=one_line(path),
    )


def _channel(clock: Floats, values: Floats) -> Channel | None:
    known = ~np.isnan(values)
    if known.sum() < 2:
        return None
    return Channel(times=clock[known], values=values[known].astype(np.float32))
