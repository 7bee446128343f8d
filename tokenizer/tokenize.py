"""Drives to a token store: every chosen frame encoded, with the actions that go with it.

Axes: T frames of a drive, B of a batch, H W their pixels, r c token rows and columns.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.actions.action_file import STEERING
from driving_sim.data.arrays import Pixels, digest
from driving_sim.data.drive import Drive, DriveSet, SampledDrive, sample
from driving_sim.data.split import MIRROR_SUFFIX
from driving_sim.data.tokens.index import StoreIndex, StoreInfo
from driving_sim.data.tokens.plan import SHARD_BYTES, PlannedDrive, StorePlan
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.data.video.frame_size import FrameSize, transform_description
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import progress
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.tokenizer.tokenizer import Tokenizer

_HOW_ON = "repair or remove it"


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
    """Encode drives at a rate (or a stride, or every frame) into the token store `out`.

    With `mirror`, each drive is also there as `ID~mirror`: frames flipped, steering negated. A run
    that was stopped continues after its last whole drive, given the same drives and settings. On
    several ranks (`process_group`), which all call this alike, each encodes a share of the drives.

    Raises:
        DriveSimError: a drive is bad and `skip_bad` is not given (the drives before it are kept);
            steering kinds are mixed; `out` holds something else; the disk is full.
    """
    if not skip_bad:
        drives.require_all()
    usable, bad = _survey(drives.drives, fps=fps, every=every)
    if bad and not skip_bad:
        raise BadDriveError(f"{next(iter(bad.values()))}; {_HOW_ON}")
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
    planned = [_planned(each, flip) for each in usable for flip in flips]
    planned += [PlannedDrive(id=name, frames=0) for name in bad]
    plan = StorePlan(info=info, drives=tuple(planned), shard_bytes=shard_bytes)
    ranks = ranks or Ranks()
    with TokenStoreWriter(out, plan, ranks) as writer:
        if ranks.is_main:
            for name, reason in bad.items():
                writer.skip(name, reason)
        ranks.barrier()
        # What the store lacks, as the main rank finds it: the others may already add to it.
        done = ranks.from_main(
            lambda: [all(writer.done(_name(each.drive, flip)) for flip in flips) for each in usable]
        )
        left = [each for each, is_done in zip(usable, done, strict=True) if not is_done]
        _encode(_share(left, ranks), flips, tokenizer, writer, skip_bad, batch_size, ranks)
        return writer.finish()


_Part = tuple[SampledDrive, Pixels | DriveSimError]
"""A batch of a drive, or why there are no more of them."""


def _share(drives: Sequence[SampledDrive], ranks: Ranks) -> list[SampledDrive]:
    """This rank's part: dealt out by length, so that all ranks end at about one time."""
    longest_first = sorted(range(len(drives)), key=lambda number: -len(drives[number].indices))
    return [drives[number] for number in sorted(longest_first[ranks.rank :: ranks.size])]


def _name(drive: Drive, flip: bool) -> str:
    return drive.id + MIRROR_SUFFIX if flip else drive.id


def _survey(
    drives: Sequence[Drive], *, fps: float | None, every: int | None
) -> tuple[list[SampledDrive], dict[str, str]]:
    """The drives sampled as asked, and why the others cannot be: reasons by drive id."""
    sampled, bad = [], {}
    for drive in drives:
        try:
            one = sample(drive, fps=fps, every=every)
        except DriveSimError as error:
            bad[drive.id] = str(error)
            continue
        if len(one.indices) < 2:
            bad[drive.id] = f"{drive.id}: {len(one.indices)} frame at this rate, at least 2 needed"
        elif one.fps == 0:
            bad[drive.id] = f"{drive.id}: a gap in the video between any two frames at this rate"
        else:
            sampled.append(one)
    usual = _usual_rate(sampled)
    for one in sampled:
        if abs(one.fps / usual - 1) > RATE_TOLERANCE:
            bad[one.drive.id] = (
                f"{one.drive.id}: {one.fps:.3g} frames a second, the other drives have "
                f"{usual:.3g}: choose a rate that all have with `fps`"
            )
    return [one for one in sampled if one.drive.id not in bad], bad


def _usual_rate(sampled: Sequence[SampledDrive]) -> float:
    # The low median is some drive's own rate: of two that differ, one is not to blame.
    return median_low([one.fps for one in sampled]) if sampled else 0.0


def _planned(sampled: SampledDrive, flip: bool) -> PlannedDrive:
    known = sampled.indices, sampled.timestamps, sampled.actions, sampled.action_valid
    return PlannedDrive(
        id=_name(sampled.drive, flip),
        frames=len(sampled.indices),
        source=sampled.drive.source,
        mirrored=flip,
        content=digest(*known),
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
    """Add the tokens [T, r, c] of each drive to the store as soon as its last batch is encoded."""
    frames = sum(len(each.indices) for each in drives)
    label = "tokenize" if ranks.size == 1 else f"tokenize, rank {ranks.rank} of {ranks.size}"
    parts = _ahead(_decoded(drives, tokenizer.frame_size, batch_size, skip_bad))
    encoded: dict[bool, list[NDArray[np.uint16]]] = {False: [], True: []}
    done = 0
    with progress(frames, label, "frames") as shown, closing(parts):
        shown.say(f"{label}: {len(drives)} drives, {frames:,} frames -> {writer.out}")
        for sampled, frames_BHWC in parts:
            if not done:  # the drive's first batch
                forms = {flip: _name(sampled.drive, flip) for flip in flips}
                left = {flip: name for flip, name in forms.items() if not writer.done(name)}
            if isinstance(frames_BHWC, DriveSimError):
                if not skip_bad:
                    raise BadDriveError(f"{frames_BHWC}; {_HOW_ON}") from frames_BHWC
                shown.say(f"skipped {sampled.drive.id}: {frames_BHWC}", by_any_rank=True)
                for name in left.values():
                    writer.skip(name, str(frames_BHWC))
                encoded, done = {False: [], True: []}, 0
                continue
            for flip in left:
                seen = np.ascontiguousarray(frames_BHWC[:, :, ::-1] if flip else frames_BHWC)
                tokens_Brc = tokenizer.encode(seen, batch_size=len(seen))
                encoded[flip].append(tokens_Brc.numpy().astype(np.uint16))
            shown.advance(len(frames_BHWC))
            done += len(frames_BHWC)
            if done < len(sampled.indices):
                continue
            for flip, name in left.items():
                actions = sampled.actions.copy()
                if flip:
                    actions[:, STEERING] = 0 - actions[:, STEERING]
                writer.add(
                    name,
                    np.concatenate(encoded[flip]),
                    actions,
                    sampled.action_valid,
                    sampled.timestamps,
                    sampled.segments,
                )
            encoded, done = {False: [], True: []}, 0


def _decoded(
    drives: Sequence[SampledDrive], size: FrameSize, batch_size: int, skip_bad: bool
) -> Generator[_Part, None, None]:
    """The batches of one drive after the other; without `skip_bad`, up to the first bad one."""
    for each in drives:
        wanted, found = len(each.indices), 0
        try:
            for frames_BHWC in each.batches(size, batch_size):
                found += len(frames_BHWC)
                yield each, frames_BHWC
            if found != wanted:
                raise DriveSimError(
                    f"{each.drive.id}: only {found} of {wanted} frames could be decoded"
                )
        except DriveSimError as error:
            yield each, error
            if not skip_bad:
                return


def _ahead(parts: Generator[_Part, None, None]) -> Generator[_Part, None, None]:
    """The same parts, each made in a thread while the one before it is in use."""
    with closing(parts), ThreadPoolExecutor(1, "decode") as thread:
        coming = thread.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = thread.submit(next, parts, None)
            yield part
