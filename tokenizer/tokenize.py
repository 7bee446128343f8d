"""Encodes drives into a token store: the tokens of their frames, and their actions.

Axes: T frames of a drive, B frames of a batch, H W pixels, r c token rows and columns.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path, PurePath
from statistics import median_low
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.actions.action_log import STEERING
from driving_sim.data.arrays import Mask, Pixels, digest
from driving_sim.data.drive import Drive, DriveSet, SampledDrive, grouped, sample
from driving_sim.data.split import MIRROR_SUFFIX
from driving_sim.data.tokens.index import StoreIndex, StoreInfo
from driving_sim.data.tokens.plan import SHARD_BYTES, PlannedDrive, StorePlan
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.data.video.frame_size import FrameSize, transform_description
from driving_sim.data.video.segments import isolated
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import progress, say
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.tokenizer.tokenizer import Tokenizer

_REMEDY = "repair or remove it"


def tokenize(
    drives: DriveSet,
    tokenizer: Tokenizer,
    out: Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    mirror: bool = False,
    skip_bad: bool = False,
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
    ranks: Ranks | None = None,
) -> StoreIndex:
    """Encode the frames of drives into the token store `out`, and return the store's index.

    If `fps` is given, only frames at this rate are encoded. If `every` is n, only every n-th frame
    is encoded. With `mirror`, each drive is stored again as `ID~mirror`, with flipped frames and
    negated steering.

    After an interruption, the same call continues after the last complete drive. With several ranks
    (`process_group`), all ranks make the same call, and each rank encodes a share of the drives.

    Raises:
        DriveSimError: a drive is bad and `skip_bad` is false (the drives before it stay encoded);
            the drives have different kinds of steering; `out` holds other files or another token
            store; the disk is full.
    """
    if not skip_bad:
        drives.require_all()
    usable, bad = _survey(drives.drives, fps=fps, every=every)
    for line in grouped((sampled.drive.id, sampled.notices) for sampled in usable):
        say(line)
    if bad and not skip_bad:
        raise BadDriveError(f"{next(iter(bad.values()))}; {_REMEDY}")
    bad |= {skipped.id: skipped.reason for skipped in drives.skipped}
    if not usable:
        reason = next(iter(bad.values()), "no drives were found")
        raise DriveSimError(f"nothing to tokenize: {reason}")
    info = StoreInfo(
        tokenizer_fingerprint=tokenizer.fingerprint,
        rows=tokenizer.rows,
        cols=tokenizer.cols,
        codebook_size=tokenizer.codebook_size,
        fps=round(_usual_rate(usable), 6),
        steering_kind=drives.steering_kind,
        levels=tuple(tokenizer.levels),
        height=tokenizer.height,
        width=tokenizer.width,
        requested_fps=fps,
        every=every,
        transform=transform_description(tokenizer.frame_size),
        precision=name_of(tokenizer.dtype),
    )
    flips = [False, True] if mirror else [False]
    planned = [_planned(sampled, flip) for sampled in usable for flip in flips]
    planned += [PlannedDrive(id=name, frames=0) for name in bad]
    plan = StorePlan(
        info=info,
        drives=tuple(planned),
        shard_bytes=shard_bytes,
        passed_over=tuple(map(_without_parents, drives.passed_over)),
    )
    ranks = ranks or Ranks()
    with TokenStoreWriter(out, plan, ranks) as writer:
        if ranks.is_main:
            for name, reason in bad.items():
                writer.skip(name, reason)
        ranks.barrier()
        # Only the main rank checks which drives are done, because other ranks may already be adding
        # drives. All ranks need the same list.
        done = ranks.from_main(
            lambda: [
                all(writer.done(_name(sampled.drive, flip)) for flip in flips) for sampled in usable
            ]
        )
        missing = [sampled for sampled, is_done in zip(usable, done, strict=True) if not is_done]
        _encode(_share(missing, ranks), flips, tokenizer, writer, skip_bad, batch_size, ranks)
        return writer.finish()


def _without_parents(line: str) -> str:
    """Shorten the path with which a line begins to the name of the folder.

    An index must not depend on where the folder lies.
    """
    folder, _, text = line.partition(": ")
    return f"{PurePath(folder).name}: {text}"


class _Part(NamedTuple):
    """A batch of a drive's frames, or the error that ended the drive's decoding."""

    drive: SampledDrive
    frames: Pixels | DriveSimError
    """[B, H, W, 3] Frames. Those that are lost to damage are black."""
    lost: Mask
    """[B] Which of the frames are lost to damage."""


def _share(drives: Sequence[SampledDrive], ranks: Ranks) -> list[SampledDrive]:
    """Return the drives that this rank encodes. All ranks get about equally many frames."""
    longest_first = sorted(range(len(drives)), key=lambda number: -len(drives[number].indices))
    return [drives[number] for number in sorted(longest_first[ranks.rank :: ranks.size])]


def _name(drive: Drive, flip: bool) -> str:
    return drive.id + MIRROR_SUFFIX if flip else drive.id


def _survey(
    drives: Sequence[Drive], *, fps: float | None, every: int | None
) -> tuple[list[SampledDrive], dict[str, str]]:
    """Choose the frames of each drive.

    Returns the usable drives, and a dictionary of the other drives: from a drive's id to the reason
    why it is unusable.
    """
    sampled, bad = [], {}
    for drive in drives:
        try:
            chosen = sample(drive, fps=fps, every=every)
        except DriveSimError as error:
            bad[drive.id] = str(error)
            continue
        if len(chosen.indices) < 2:
            count = f"{len(chosen.indices)} frame at this rate"
            bad[drive.id] = f"{drive.id}: {count}, but at least 2 are needed"
        elif chosen.fps == 0:
            bad[drive.id] = f"{drive.id}: at this rate, there is a gap in time after every frame"
        else:
            sampled.append(chosen)
    usual = _usual_rate(sampled)
    if fps is not None and sampled:
        usual = min(fps, max(chosen.fps for chosen in sampled))
    for chosen in sampled:
        if abs(chosen.fps / usual - 1) > RATE_TOLERANCE:
            bad[chosen.drive.id] = (
                f"{chosen.drive.id}: has {chosen.fps:.3g} frames per second, but the other drives "
                f"have {usual:.3g} (set a common rate with `fps`)"
            )
    return [chosen for chosen in sampled if chosen.drive.id not in bad], bad


def _usual_rate(sampled: Sequence[SampledDrive]) -> float:
    # Use the low median, because it is the rate of one of the drives. An average of two different
    # rates would make both drives unusable.
    return median_low([drive.fps for drive in sampled]) if sampled else 0.0


def _planned(sampled: SampledDrive, flip: bool) -> PlannedDrive:
    known = sampled.indices, sampled.timestamps, sampled.actions, sampled.action_valid
    return PlannedDrive(
        id=_name(sampled.drive, flip),
        frames=len(sampled.indices),
        source=sampled.drive.source,
        mirrored=flip,
        content=digest(*known),
        notices=(*sampled.drive.notices, *sampled.notices),
    )


def _encode(
    drives: Sequence[SampledDrive],
    flips: Sequence[bool],
    tokenizer: Tokenizer,
    writer: TokenStoreWriter,
    skip_bad: bool,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Encode drives. After a drive's last batch, add its tokens [T, r, c] to the store."""
    frames = sum(len(drive.indices) for drive in drives)
    label = "tokenize" if ranks.size == 1 else f"tokenize, rank {ranks.rank} of {ranks.size}"
    parts = _ahead(_decoded(drives, tokenizer.frame_size, batch_size, skip_bad))
    encoded: dict[bool, list[NDArray[np.uint16]]] = {False: [], True: []}
    losses: list[Mask] = []
    done = 0
    with progress(frames, label, "frames") as display, closing(parts):
        display.say(f"{label}: {len(drives)} drives, {frames:,} frames -> {writer.out}")
        for sampled, frames_BHWC, lost_B in parts:
            if not done:  # this is the drive's first batch
                names = {flip: _name(sampled.drive, flip) for flip in flips}
                missing = {flip: name for flip, name in names.items() if not writer.done(name)}
            if isinstance(frames_BHWC, DriveSimError):
                if not skip_bad:
                    raise BadDriveError(f"{frames_BHWC}; {_REMEDY}") from frames_BHWC
                display.say(f"skipped {sampled.drive.id}: {frames_BHWC}", by_any_rank=True)
                for name in missing.values():
                    writer.skip(name, str(frames_BHWC))
                encoded, losses, done = {False: [], True: []}, [], 0
                continue
            for flip in missing:
                batch = np.ascontiguousarray(frames_BHWC[:, :, ::-1] if flip else frames_BHWC)
                tokens_Brc = tokenizer.encode(batch, batch_size=len(batch))
                encoded[flip].append(tokens_Brc.numpy().astype(np.uint16))
            display.advance(len(frames_BHWC))
            losses.append(lost_B)
            done += len(frames_BHWC)
            if done < len(sampled.indices):
                continue
            lost_T = np.concatenate(losses)
            notices = sampled.about_losses(lost_T)
            for line in grouped([(sampled.drive.id, notices)]):
                display.say(line, by_any_rank=True)
            for flip, name in missing.items():
                actions = sampled.actions.copy()
                if flip:
                    actions[:, STEERING] = 0 - actions[:, STEERING]
                writer.add(
                    name,
                    np.concatenate(encoded[flip]),
                    actions,
                    sampled.action_valid,
                    sampled.timestamps,
                    isolated(sampled.segments, lost_T) if lost_T.any() else sampled.segments,
                    notices,
                )
            encoded, losses, done = {False: [], True: []}, [], 0


def _decoded(
    drives: Sequence[SampledDrive], size: FrameSize, batch_size: int, skip_bad: bool
) -> Generator[_Part, None, None]:
    """Yield the batches of all drives in order.

    If a drive is bad, yield its error. Then stop, or with `skip_bad` go on with the next drive.
    """
    black_HWC = np.zeros((size.height, size.width, 3), np.uint8)
    for sampled in drives:
        total, decoded, intact = len(sampled.indices), 0, 0
        try:
            frames = sampled.drive.stream_with_losses(size, sampled.indices)
            while batch := list(islice(frames, batch_size)):
                lost_B = np.array([frame is None for frame in batch])
                decoded, intact = decoded + len(batch), intact + int((~lost_B).sum())
                if decoded == total and intact < 2:
                    raise DriveSimError(
                        f"{sampled.drive.id}: all but {intact} of its {total} frames are damaged"
                    )
                pictures = [black_HWC if frame is None else frame for frame in batch]
                yield _Part(sampled, np.stack(pictures), lost_B)
            if decoded != total:
                raise DriveSimError(
                    f"{sampled.drive.id}: only {decoded} of {total} frames could be decoded"
                )
        except DriveSimError as error:
            yield _Part(sampled, error, np.zeros(0, np.bool_))
            if not skip_bad:
                return


def _ahead(parts: Generator[_Part, None, None]) -> Generator[_Part, None, None]:
    """Yield the items of `parts`. While the caller uses an item, a thread makes the next one."""
    with closing(parts), ThreadPoolExecutor(1, "decode") as thread:
        coming = thread.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = thread.submit(next, parts, None)
            yield part
