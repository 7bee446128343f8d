"""Compress a drive's tokens with a world model, to check the model's claimed bits per token.

A range coder (constriction, arXiv 2201.01741) encodes the tokens with the model's probabilities,
rounded to integer frequencies. Decoding needs the same logits, bit for bit, as encoding. So both
pass the tokens through the model in the same order and with the same cache. On another machine, or
with another number format or compiler, the logits may differ slightly. Decoding then returns wrong
tokens.

A wave is a group of tokens that the model predicts together. A run is a stretch of a drive without
a time gap.

Axes: T frames, P = r * c tokens of a frame, n tokens of a wave, K codes.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from constriction import stream
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.data.arrays import Floats32, Ints
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.engine.progress import progress
from driving_sim.evaluate.footage import first_frames
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.world_model.sampling.draw_waves import WavePasses
from driving_sim.world_model.training.bits import streamed_bits_per_token
from driving_sim.world_model.world_model import WorldModel

Words = NDArray[np.uint32]
"""The compressed data: 32-bit words from the range coder."""

_HEADER_BYTES = 24
"""Size in bytes of the fixed part of the header that a compressed file would need.

No file is written, but the reported size includes a header. The fixed part would consist of a
format marker (4 bytes), a checksum (4), the model's fingerprint (8), a checksum of the tokens (4)
and the number of runs (4). The lengths of the runs follow it.
"""
_RUN_BYTES = 4
"""Number of bytes that the header needs to store the length of one run."""
_TOTAL = 2**24
"""Sum of the integer frequencies of all codes; constriction requires this value."""
_FAMILY = stream.model.Categorical(perfect=False)

_CLAIM = 0.01
"""Maximum difference between coded and claimed size, as a share of the claimed size.

The coded size is without the header here.
"""


def evaluate_coding(world: WorldModel, drive: DriveTokens, *, seconds: float) -> Section:
    """Compress the first `seconds` of a drive with the model, decode them, and check the size.

    The metric `exact` is true if decoding returned the same tokens. The metric `proved` is true if,
    in addition, the size without the header is within 1 % of the size that the model claims.
    """
    beginning = first_frames(drive, max(1, round(seconds * world.fps)))
    with progress(2 * len(beginning), "arithmetic coding", "frames") as bar:
        words, model_bits = compress(world, beginning, advance=bar.advance)
        decoded = decompress(world, beginning, words, advance=bar.advance)
    exact = np.array_equal(decoded, beginning.tokens)
    header_bits = 8 * (_HEADER_BYTES + _RUN_BYTES * len(beginning.entry.segments))
    coded_bits, count = header_bits + 8 * words.nbytes, beginning.tokens.size
    claimed = streamed_bits_per_token(world.transformer, [beginning]).mean
    ratio = coded_bits / count / claimed
    # The check ignores the header, which does not depend on the model and is large in short files.
    header = header_bits / count / claimed
    metrics = {
        "per_tokenizer": True,
        "frames": len(beginning),
        "tokens": count,
        "header_bits": header_bits,
        "coded_bits_per_token": coded_bits / count,
        "model_bits_per_token": model_bits / count,
        "raw_bits_per_token": math.log2(world.transformer.grid.codebook_size),
        "ratio": coded_bits / model_bits,
        "exact": exact,
        "claimed_bits_per_token": claimed,
        "ratio_to_claimed": ratio,
        "proved": exact and abs(ratio - header - 1) <= _CLAIM,
    }
    rows = [(label, metrics[name]) for name, label in _ROWS.items()]
    caption = f"Drive {drive.id}, the first {len(beginning):,} of its {len(drive):,} frames"
    return Section(
        "coding",
        f"Compression check: {'passed' if metrics['proved'] else 'failed'}",
        f"{_TEXT}\n\n{_verdict(exact, ratio, header)}",
        metrics,
        (Table(caption, ("", "value"), rows),),
    )


_TEXT = """Are the bits per token real? The beginning of a held-out drive is compressed with the
model's probabilities and decoded again. A model that claims a low cost must also produce a small
file. The check passes if the decoded tokens equal the originals, and if the size of the file
without its header is within 1 % of the size that the model claims. The claimed size is computed
separately, in float32, for the same beginning of the drive. "Claimed while coding" is the cost
computed in the passes that coded the file.

The check confirms that the likelihood was computed correctly. It does not say whether the model is
good: a bad model passes too, with a larger file."""
_ROWS = {
    "frames": "frames",
    "tokens": "tokens",
    "raw_bits_per_token": "without compression, bits per token",
    "claimed_bits_per_token": "claimed by the model, bits per token",
    "model_bits_per_token": "claimed while coding, bits per token",
    "coded_bits_per_token": "file with header, bits per token",
    "header_bits": "header, bits",
    "ratio_to_claimed": "file / claimed",
    "ratio": "file / claimed while coding",
    "exact": "decoded tokens equal the originals",
    "proved": "check passed",
}
"""Label of each row of the table, by the name of its metric."""


def _verdict(exact: bool, ratio: float, header: float) -> str:
    """Return the outcome of the check as a sentence."""
    faults = []
    if not exact:
        faults.append("the decoded tokens differ from the originals")
    comparison = "larger" if ratio >= 1 else "smaller"
    size = (
        f"{abs(ratio - 1):.2%} {comparison} than claimed; the header takes {header:.2%} of the "
        "claimed size"
    )
    if abs(ratio - header - 1) > _CLAIM:
        faults.append(f"the file is {size}")
    if faults:
        return f"The check failed: {', and '.join(faults)}."
    return f"The check passed: the decoded tokens equal the originals, and the file is {size}."


def compress(
    world: WorldModel, drive: DriveTokens, *, advance: Callable[[int], object]
) -> tuple[Words, float]:
    """Compress a drive's tokens.

    The model also sees the drive's actions. After a time gap it starts without context.

    Returns the compressed words and the model's cost in bits, which is the sum of -log2 p over the
    tokens in the same passes. `advance` is called with the number of frames coded since its last
    call.
    """
    tokens = rearrange(drive.tokens.astype(np.int32), "t r c -> t (r c)")
    encoder, model_bits = stream.queue.RangeEncoder(), 0.0

    def put(t: int, logits: Tensor, target: Tensor) -> Tensor:
        nonlocal model_bits
        true = tokens[t, target.cpu().numpy()]
        encoder.encode(true, _FAMILY, coder_weights(logits[0]))
        indices = torch.from_numpy(true).long().to(logits.device)[None]
        log_probs = logits.log_softmax(-1).gather(-1, indices.unsqueeze(-1))
        model_bits -= float(log_probs.double().sum()) / math.log(2)
        return indices

    _pass_through(world, drive, put, advance)
    return encoder.get_compressed(), model_bits


def decompress(
    world: WorldModel, drive: DriveTokens, words: Words, *, advance: Callable[[int], object]
) -> Ints:
    """Decode the words of `compress` and return the tokens [T, r, c].

    The tokens of `drive` are not read, only its actions and the lengths of its runs. The words, the
    model, the actions and the arithmetic must be the same as in `compress`. Otherwise the returned
    tokens are wrong, or the result has no frames (T = 0). `advance` is called with the number of
    frames decoded since its last call.
    """
    decoder = stream.queue.RangeDecoder(words)

    def get(t: int, logits: Tensor, target: Tensor) -> Tensor:
        read = decoder.decode(_FAMILY, coder_weights(logits[0]))
        return torch.from_numpy(read).long().to(logits.device)[None]

    try:
        decoded = _pass_through(world, drive, get, advance)
    except AssertionError:  # constriction raises this for words that no encoder writes.
        return np.zeros((0, *drive.tokens.shape[1:]), np.int64)
    return rearrange(decoded, "t (r c) -> t r c", r=world.transformer.grid.rows)


def coder_weights(logits: Tensor) -> Floats32:
    """Return the softmax of `logits` [n, K], scaled to whole numbers that sum to 2^24 - K per row.

    constriction turns these weights into integer frequencies that sum to 2^24. It gives every code
    a frequency of 1, and splits the remaining 2^24 - K in proportion to the weights. The weights
    already sum to 2^24 - K, so constriction multiplies them by exactly 1. They are whole numbers
    with a sum below 2^24, so float32 adds them without rounding.
    """
    rest = _TOTAL - logits.shape[-1]
    probs = logits.cpu().double().softmax(-1).numpy()
    edges = np.floor(probs.cumsum(-1) * rest)
    edges[:, -1] = rest
    shares: Floats32 = np.diff(edges, prepend=0).astype(np.float32)
    return shares


def _pass_through(
    world: WorldModel,
    drive: DriveTokens,
    choose: Callable[[int, Tensor, Tensor], Tensor],
    advance: Callable[[int], object],
) -> Ints:
    """Pass a drive's frames through the model and return the tokens [T, P] that `choose` returns.

    If there is a gap in the drive, the model starts again without context. `choose` is called with
    the index of the frame, followed by the arguments of the sampler's `Choose`. `advance` is called
    with the number of frames that are done.
    """
    frames, device = [], world.device
    for begin, stop in drive.entry.segments:
        empty = world.no_prefix()
        passes = WavePasses(empty.cache, empty.last)
        # No action leads to the first frame of a segment.
        led = torch.zeros(1, 2, device=device)
        known = torch.zeros(1, 2, dtype=torch.bool, device=device)
        for t in range(begin, stop):
            frames.append(passes.step(led, known, partial(choose, t))[0].cpu().numpy())
            action = drive.actions[t : t + 1], drive.action_valid[t : t + 1]
            led, known = (torch.tensor(array, device=device) for array in action)
            advance(1)
    return np.stack(frames)
