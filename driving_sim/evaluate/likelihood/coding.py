"""A drive's tokens in as few bytes as a world model can tell them: its bits per token, proved.

Range coding (constriction, arXiv 2201.01741) under the plain model's probabilities as integer
frequencies. Both directions run the same cached passes, wave by wave, and meet the same logits to
the last bit. On another machine, in another number format, with another compiler or without one,
logits may differ: then other tokens come back.

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
from driving_sim.world_model.training.bits import streamed_bits_per_token
from driving_sim.world_model.world_model import WorldModel

Words = NDArray[np.uint32]
"""What the range coder writes."""

_HEADER_BYTES = 24
"""What a file would say before its words: that it is one, a checksum, the model's fingerprint (8),
a checksum of the tokens and the number of runs. Their lengths take another `_RUN_BYTES` each."""
_RUN_BYTES = 4
_TOTAL = 2**24  # of a token's frequencies: what constriction works with
_FAMILY = stream.model.Categorical(perfect=False)

_CLAIM = 0.01
"""How far the coded size may be off the claimed one, as a share of it."""


def evaluate_coding(world: WorldModel, drive: DriveTokens, *, seconds: float) -> Section:
    """Prove the bits: compress the first `seconds` of a drive with the model and decode them.

    `ratio` is the coded size, header included, over the bits that the model claims; `exact` says
    whether what came back were the same tokens.
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
    # In a short file the header alone is over 1 %; it says nothing about the model.
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
    rows = [(name.replace("_", " "), value) for name, value in metrics.items()][1:]
    caption = f"Drive {drive.id}, {len(beginning):,} of its {len(drive):,} frames"
    return Section(
        "coding",
        "The bits, proved" if metrics["proved"] else "The bits, not proved",
        f"{_TEXT}\n\n{_verdict(exact, ratio, header)}",
        metrics,
        (Table(caption, ("", "value"), rows),),
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
    world: WorldModel, drive: DriveTokens, *, advance: Callable[[int], object]
) -> tuple[Words, float]:
    """Compress a drive's tokens, given its actions; each run without a gap starts afresh.

    Returns the words, and the sum over the tokens of -log2 p under the plain model, from the passes
    that coded them. `advance` is called with the number of frames coded since.
    """
    tokens = rearrange(drive.tokens.astype(np.int32), "t r c -> t (r c)")
    encoder, model_bits = stream.queue.RangeEncoder(), 0.0

    def put(t: int, logits: Tensor, target: Tensor) -> Tensor:
        nonlocal model_bits
        known = tokens[t, target.cpu().numpy()]
        encoder.encode(known, _FAMILY, coder_weights(logits[0]))
        chosen = torch.from_numpy(known).long().to(logits.device)[None]
        log_probs = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1))
        model_bits -= float(log_probs.double().sum()) / math.log(2)
        return chosen

    _pass_through(world, drive, put, advance)
    return encoder.get_compressed(), model_bits


def decompress(
    world: WorldModel, drive: DriveTokens, words: Words, *, advance: Callable[[int], object]
) -> Ints:
    """Return the tokens [T, r, c] in the words of `compress`; of the drive, see but the actions.

    Other tokens come back, or none, where the words, the model, the actions or the arithmetic are
    not those of `compress`. `advance` is called with the number of frames decoded since.
    """
    decoder = stream.queue.RangeDecoder(words)

    def get(t: int, logits: Tensor, target: Tensor) -> Tensor:
        read = decoder.decode(_FAMILY, coder_weights(logits[0]))
        return torch.from_numpy(read).long().to(logits.device)[None]

    try:
        decoded = _pass_through(world, drive, get, advance)
    except AssertionError:  # constriction's, for words that no token could have made
        return np.zeros((0, *drive.tokens.shape[1:]), np.int64)
    return rearrange(decoded, "t (r c) -> t r c", r=world.transformer.grid.rows)


def coder_weights(logits: Tensor) -> Floats32:
    """Return a softmax [n, K] as the coder's weights: whole numbers that sum to 2^24 - K in a row.

    constriction gives every code a frequency of 1 and shares out the rest of 2^24 in proportion to
    the weights. These sum to that rest, below 2^24, so float32 adds and scales them exactly.
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
    """Return the tokens [T, P] that `choose` gives for a drive's frames, run by run from nothing.

    `choose` is as the sampler's `Choose`, with the frame's number before.
    """
    frames, device = [], world.device
    for begin, stop in drive.entry.segments:
        passes = world.branch(world.no_prefix()).passes
        # Nothing leads to the first frame.
        led = torch.zeros(1, 2, device=device)
        known = torch.zeros(1, 2, dtype=torch.bool, device=device)
        for t in range(begin, stop):
            frames.append(passes.step(led, known, partial(choose, t))[0].cpu().numpy())
            action = drive.actions[t : t + 1], drive.action_valid[t : t + 1]
            led, known = (torch.tensor(each, device=device) for each in action)
            advance(1)
    return np.stack(frames)
