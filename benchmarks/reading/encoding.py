"""`python -m benchmarks.reading.encoding [encoder|tokenize]`: the speed of encoding frames.

`encoder` times `Tokenizer.encode` on 256x512 frames, from uint8 pixels to tokens. Its peer is the
VQGAN of taming-transformers (diffusers' VQModel, stride 16, width 128). It encodes pictures to
codebook indices in the number format, memory format and batch size in which it is fastest.
`tokenize` times everything that `drivesim tokenize` does after it has loaded its tokenizer. The
input is mp4 files whose frames are twice as high and wide. The comparison is the encoder alone, on
the same number of frames in memory.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.machine import flops_of, limits, number_formats
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Settings,
    Work,
    alternate,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import fastest, times_text, vq_encode, vq_model
from benchmarks.measuring.shapes import FPS, shape_of, tokenizer
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine.precision import name_of
from driving_sim.engine.threads import usable_cores
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import images_from_frames

_BATCH = 8


def _frames(count: int, settings: Settings) -> Tensor:
    """Return `count` frames of noise, uint8 [count, H, W, 3].

    Encoding time does not depend on the content of frames.
    """
    size = shape_of("base", settings).frames
    return torch.randint(256, (count, size.height, size.width, 3), dtype=torch.uint8)


def _peer_forms(frames: Tensor, settings: Settings) -> dict[str, Work]:
    """Return functions that encode the frames with VQModel, by number format and memory format."""
    size = shape_of("base", settings).frames.frame_size
    images = images_from_frames(frames.to(settings.device), size)
    forms: dict[str, Work] = {}
    for dtype in number_formats(settings):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model = vq_model(width=32 if settings.toy else 128).eval()
            model.to(settings.device, dtype, memory_format=layout)  # type: ignore[call-overload]
            model.quantize.float()
            inputs = images.to(dtype, memory_format=layout)
            name = "channels last" if layout is torch.channels_last else "channels first"
            act: Callable[[], Tensor] = partial(vq_encode, model, inputs)
            forms[f"{name_of(dtype)} {name}"] = torch.inference_mode()(act)
    return forms


def encoder(settings: Settings) -> list[Claim]:
    """Compare the speed of drivesim's encoder with VQModel's."""
    own = tokenizer(shape_of("base", settings), settings)
    frames = _frames(_BATCH, settings)
    large = 16 if settings.device.type == "cuda" else 4
    form, times = fastest(_peer_forms(frames[:1], settings), settings)
    batches = {
        1: _peer_forms(frames[:1], settings)[form],
        large: _peer_forms(frames[:large], settings)[form],
    }
    a_frame = {count: fastest({"": act}, settings)[1][""] / count for count, act in batches.items()}
    batch = min(a_frame, key=lambda count: a_frame[count])
    taken = alternate(
        {"own": lambda: own.encode(frames, batch_size=_BATCH), "peer": batches[batch]}, settings
    )
    seconds = float(np.median(taken["own"])) / _BATCH
    theirs = float(np.median(taken["peer"])) / batch
    flops = flops_of(lambda: own.encode(frames[:1]))
    peer_flops = flops_of(_peer_forms(frames[:1], settings)[form])
    dtype = torch.bfloat16 if "bf16" in form else torch.float32
    return [
        Claim(
            what="tokenizer's encoder, base-sized",
            against="VQModel",
            figure=times_faster(taken["peer"], taken["own"], work=batch / _BATCH),
            bar=10,
            own=f"{rounded(1 / seconds)} frames/s",
            peer=f"{rounded(1 / theirs)} frames/s",
            limits=limits(settings, own.dtype).share(seconds, flops=flops),
            details=(
                f"{own.height}x{own.width}; drivesim: {name_of(own.dtype)}, batches of {_BATCH}, "
                f"{flops / 1e9:.1f} GFLOP a frame",
                f"VQModel: {form}, batches of {batch}, {peer_flops / 1e9:.0f} GFLOP a frame, "
                f"{limits(settings, dtype).share(theirs, flops=peer_flops)}",
                f"VQModel's forms: {times_text(times)}; the fastest in batches of {large}: "
                f"{1e3 * a_frame[large]:.4g} ms a frame",
            ),
        )
    ]


def end_to_end(settings: Settings) -> list[Claim]:
    """Compare the speed of the whole `tokenize` command with that of the encoder alone."""
    own = tokenizer(shape_of("base", settings), settings)
    seconds, count = (1.0, 1) if settings.toy else (8.0, 2)
    size = SyntheticConfig(height=2 * own.height, width=2 * own.width, fps=FPS)
    with tempfile.TemporaryDirectory() as name:
        videos, out = Path(name) / "videos", Path(name) / "tokens"
        write_synthetic_drives(
            videos, drives=count, seconds=seconds, config=size, workers=min(count, usable_cores())
        )
        frames = _frames(round(seconds * FPS) * count, settings)

        def tokenize_files() -> None:
            shutil.rmtree(out, ignore_errors=True)
            tokenize(find_drives([videos]), own, out)

        taken = alternate(
            {"encoder": lambda: own.encode(frames), "tokenize": tokenize_files}, settings
        )
    rates = {name: len(frames) / float(np.median(times)) for name, times in taken.items()}
    return [
        Claim(
            what="`tokenize`, base-sized",
            against="its encoder alone",
            figure=times_faster(taken["encoder"], taken["tokenize"]),
            bar=0.9,
            own=f"{rounded(rates['tokenize'])} frames/s",
            peer=f"{rounded(rates['encoder'])} frames/s",
            details=(f"{len(frames)} frames from {count} mp4 files of {size.height}x{size.width}",),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {"encoder": encoder, "tokenize": end_to_end}


if __name__ == "__main__":
    run_command(__doc__, "reading.encoding", BENCHMARKS, sys.argv[1:])
