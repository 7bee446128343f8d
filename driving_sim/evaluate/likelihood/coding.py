"""A drive's tokens in as few bytes as a world model can tell them: its bits per token, proved.

Range coding (constriction, arXiv 2201.01741) under the plain model's probabilities as integer
frequencies. Both directions run the same cached passes, wave by wave, and meet the same logits to
the last bit. On another machine, in another number format, with another compiler or without one,
logits may differ: a checksum tells.

Axes: T frames, P = r * c tokens of a frame, n tokens of a wave, K codes.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from constriction import stream
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.data.tokens.store import DriveTokens
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.footage import first_frames
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.world_model.training.bits import streamed_bits_per_token
from driving_sim.world_model.world_model import WorldModel

_MAGIC = b"dst1"
_CHECKSUM = struct.Struct("<I")
_HEADER = struct.Struct("<8sII")  # the model's fingerprint, checksum of the tokens, number of runs
_TOTAL = 2**24  # of a token's frequencies: what constriction works with
_FAMILY = stream.model.Categorical(perfect=False)

_CLAIM = 0.01
"""How far the coded size may be off the claimed one, as a share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """The tokens of a drive as a world model tells them."""

    data: bytes
    """All that `decompress` needs beside the model and the actions."""
    header_bits: int
    """How much of it says what it is, not what the tokens are."""
    model_bits: float
    """Sum over the tokens of -log2 p under the plain model, from the passes that coded them."""

    @property
    def coded_bits(self) -> int:
        """Size of the data, header included."""
        return 8 * len(self.data)


def evaluate_coding(world: WorldModel, drive: DriveTokens, *, seconds: float) -> Section:
    """Prove the bits: compress the first `seconds` of a drive with the model and decode them.

    `ratio` is the coded size, header included, over the bits that the model claims; `exact` says
    whether what came back were the same tokens.
    """
    beginning = first_frames(drive, max(1, round(seconds * world.fps)))
    actions, valid, count = beginning.actions, beginning.action_valid, beginning.tokens.size
    with progress(2 * len(beginning), "arithmetic coding", "frames") as bar:
        coded = compress(world, beginning, advance=bar.advance)
        try:
            decoded = decompress(world, coded.data, actions, valid, advance=bar.advance)
            exact = np.array_equal(decoded, beginning.tokens)
        except DriveSimError:
            exact = False
    claimed = streamed_bits_per_token(world.transformer, [beginning]).mean
    bits_per_token = coded.coded_bits / count
    ratio = bits_per_token / claimed
    # In a short file the header alone is over 1 %; it says nothing about the model.
    header = coded.header_bits / count / claimed
    metrics = {
        "per_tokenizer": True,
        "frames": len(beginning),
        "tokens": count,
        "header_bits": coded.header_bits,
        "coded_bits_per_token": bits_per_token,
        "model_bits_per_token": coded.model_bits / count,
        "raw_bits_per_token": math.log2(world.transformer.grid.codebook_size),
        "ratio": coded.coded_bits / coded.model_bits,
        "exact": exact,
        "claimed_bits_per_token": claimed,
        "ratio_to_claimed": ratio,
        "proved": exact and abs(ratio - header - 1) <= _CLAIM,
    }
    rows = [(name.replace("_", " "), value) for name, value in metrics.items()][1:]
    caption = f"Drive {drive.id}, {len(beginning):,} of its {len(drive):,} frames"
    return Section(
        name="coding",
        title="The bits, proved" if metrics["proved"] else "The bits, not proved",
        text=f"{_TEXT}\n\n{_verdict(exact, ratio, header)}",
        metrics=metrics,
        parts=(Table(caption, ("", "value"), rows),),
    )


_TEXT = """The tokens of a held-out drive's beginning are compressed by range coding under the
model's probabilities, wave by wave through the cache as in a rollout, and decoded again. The file
must be as large as the likelihood claims (streamed from the drive's start, float32) to within 1 %,
its header aside, and what comes back must be the same tokens."""


def _verdict(exact: bool, ratio: float, header: float) -> str:
    """What came of it, in words."""
    faults = []
    if not exact:
        faults.append("the tokens that came back are not those that went in")
    off = f"{ratio - 1:+.2%} off the claimed size, {header:.2%} of it the header"
    if abs(ratio - header - 1) > _CLAIM:
        faults.append(f"the file is {off}")
    if faults:
        return f"It does not hold: {', and '.join(faults)}."
    return f"It holds: the tokens are the same, and the file is {off}."


def compress(
    world: WorldModel,
    drive: DriveTokens,
    *,
    advance: Callable[[int], object] = lambda frames: None,
) -> Compressed:
    """Compress a drive's tokens, given its actions.

    Each run without a gap starts afresh. `advance` is called with the number of frames coded since.
    Raises `DriveSimError` for tokens of another tokenizer than the model's.
    """
    if drive.info.tokenizer_fingerprint != world.tokenizer.fingerprint:
        raise DriveSimError(
            f"drive {drive.id!r} was tokenized by another tokenizer than the model's: tokenize the "
            "video with the tokenizer in the model's run folder"
        )
    runs = [stop - begin for begin, stop in drive.entry.segments]
    tokens = rearrange(drive.tokens.astype(np.int32), "t r c -> t (r c)")
    encoder, model_bits = stream.queue.RangeEncoder(), 0.0

    def put(t: int, logits: Tensor, target: Tensor) -> Tensor:
        nonlocal model_bits
        known = tokens[t, target.cpu().numpy()]
        encoder.encode(known, _FAMILY, _weights(logits[0]))
        chosen = torch.from_numpy(known).long().to(logits.device)[None]
        log_probs = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1))
        model_bits -= float(log_probs.double().sum()) / math.log(2)
        return chosen

    for _ in _passes(world, runs, drive.actions, drive.action_valid, put):
        advance(1)
    words = encoder.get_compressed().astype("<u4").tobytes()
    header = _HEADER.pack(_identity(world), _tokens_checksum(tokens), len(runs))
    body = header + struct.pack(f"<{len(runs)}I", *runs) + words
    data = _MAGIC + _CHECKSUM.pack(zlib.crc32(body)) + body
    header_bits = 8 * (len(data) - len(words))
    return Compressed(data=data, header_bits=header_bits, model_bits=model_bits)


def decompress(
    world: WorldModel,
    data: bytes,
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
    *,
    advance: Callable[[int], object] = lambda frames: None,
) -> NDArray[np.int64]:
    """Return the tokens [T, r, c] in what `compress` made.

    `actions` [N, 2] (m/s, rad) and `valid` [N, 2] are the drive's, N at least T. `advance` is
    called with the number of frames decoded since. Raises `DriveSimError` where the data is
    damaged, or the model, the actions or the arithmetic are not those it was compressed with.
    """
    checksum, runs, words = _unpacked(world, data)
    if len(actions) < sum(runs):
        raise DriveSimError(
            f"compressed tokens of {sum(runs)} frames, but actions of {len(actions)}: give those "
            "of the whole drive"
        )
    decoder, decoded = stream.queue.RangeDecoder(words), []

    def get(t: int, logits: Tensor, target: Tensor) -> Tensor:
        read = decoder.decode(_FAMILY, _weights(logits[0]))
        return torch.from_numpy(read).long().to(logits.device)[None]

    try:
        for frame in _passes(world, runs, actions, valid, get):
            decoded.append(frame.cpu().numpy())
            advance(1)
    except AssertionError:  # constriction's, for data that no token could have made
        decoded = []
    if not decoded or _tokens_checksum(np.stack(decoded)) != checksum:
        raise DriveSimError(
            "the compressed tokens do not come out as they went in: give the same actions, on the "
            "same machine, with the same drivesim and compiler, in the same number format"
        )
    return rearrange(np.stack(decoded), "t (r c) -> t r c", r=world.transformer.grid.rows)


def frequencies(logits: Tensor) -> NDArray[np.int64]:
    """Return a softmax [n, K] in integers: every code has at least 1, every row sums to 2^24."""
    free = _TOTAL - logits.shape[-1]
    probs = logits.cpu().double().softmax(-1).numpy()
    edges = np.floor(probs.cumsum(-1) * free)
    edges[:, -1] = free
    counts: NDArray[np.int64] = np.diff(edges, prepend=0).astype(np.int64) + 1
    return counts


def _weights(logits: Tensor) -> NDArray[np.float32]:
    """What makes constriction's frequencies those of `frequencies`.

    It gives every code 1 and shares out the rest in proportion to the weights. These are whole
    numbers that sum to that rest, below 2^24: float32 adds them up and scales them exactly.
    """
    return (frequencies(logits) - 1).astype(np.float32)


def _passes(
    world: WorldModel,
    runs: Sequence[int],
    actions: NDArray[np.float32],
    valid: NDArray[np.bool_],
    choose: Callable[[int, Tensor, Tensor], Tensor],
) -> Iterator[Tensor]:
    """Yield frame after frame [P] of runs of so many frames, each from nothing before it.

    `choose` is as the sampler's `Choose`, with the frame's number before.
    """
    device, begin = world.device, 0
    for count in runs:
        passes = world.branch(world.no_prefix()).passes
        # Nothing leads to the first frame.
        led = torch.zeros(1, 2, device=device)
        known = torch.zeros(1, 2, dtype=torch.bool, device=device)
        for t in range(begin, begin + count):
            yield passes.step(led, known, partial(choose, t))[0]
            led, known = (torch.tensor(each[t : t + 1], device=device) for each in (actions, valid))
        begin += count


def _unpacked(world: WorldModel, data: bytes) -> tuple[int, tuple[int, ...], NDArray[np.uint32]]:
    """Return the tokens' checksum, the runs' lengths and the coder's words."""
    start = len(_MAGIC) + _CHECKSUM.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start + _HEADER.size:
        raise DriveSimError("this is not a drive's compressed tokens: give what `compress` made")
    body = data[start:]
    if _CHECKSUM.unpack_from(data, len(_MAGIC)) != (zlib.crc32(body),):
        raise DriveSimError("damaged compressed tokens (their checksum differs): compress again")
    identity, checksum, count = _HEADER.unpack_from(body)
    if identity != _identity(world):
        raise DriveSimError("compressed with another world model: give the one it was made with")
    runs = struct.unpack_from(f"<{count}I", body, _HEADER.size)
    words = np.frombuffer(body, "<u4", offset=_HEADER.size + 4 * count)
    return checksum, runs, words.astype(np.uint32)


def _identity(world: WorldModel) -> bytes:
    return bytes.fromhex(world.fingerprint)[:8]


def _tokens_checksum(tokens: NDArray[Any]) -> int:
    return zlib.crc32(tokens.astype("<u4").tobytes())
