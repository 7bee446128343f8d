"""`python -m benchmarks.reading.encoding [encoder|tokenize]`: frames to tokens.

`encoder`: our `Tokenizer.encode` of 256x512 frames, uint8 in and tokens out, against the VQGAN of
taming-transformers (diffusers' VQModel, stride 16, width 128), pictures in and codebook indices
out, in the number format, memory format and batch that suit it best. `tokenize`: the whole of
`drivesim tokenize` on mp4 files twice as high and wide, once its tokenizer is loaded, against the
encoder alone on as many frames in memory.
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
    Figure,
    Settings,
    Work,
    alternate,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import fastest, tried, vq_encode, vq_model
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
    """Noise, uint8 [count, H, W, 3]: what is in a frame does not change its time."""
    size = shape_of("base", settings).frames
    return torch.randint(256, (count, size.height, size.width, 3), dtype=torch.uint8)


def _peer_forms(frames: Tensor, settings: Settings) -> dict[str, Work]:
    """VQModel encoding the first frame of some, in either number and memory format."""
    size = shape_of("base", settings).frames.frame_size
    images = images_from_frames(frames.to(settings.device), size)
    forms: dict[str, Work] = {}
    for dtype in number_formats(settings):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model = vq_model(width=32 if settings.toy else 128).eval()
            model.to(settings.device, dtype, memory_format=layout)  # type: ignore[call-overload]
            model.quantize.float()
            given = images.to(dtype, memory_format=layout)
            name = "channels last" if layout is torch.channels_last else "channels first"
            act: Callable[[], Tensor] = partial(vq_encode, model, given)
            forms[f"{name_of(dtype)} {name}"] = torch.inference_mode()(act)
    return forms


def encoder(settings: Settings) -> list[Claim]:
    """Frames a second of the two encoders."""
    own = tokenizer(shape_of("base", settings), settings)
    frames = _frames(_BATCH, settings)
    large = 16 if settings.device.type == "cuda" else 4
    form, times = fastest(_peer_forms(frames[:1], settings), settings)
    batches = {
        1: _peer_forms(frames[:1], settings)[form],
        large: _peer_forms(frames[:large], settings)[form],
    }
    each = {count: fastest({"": act}, settings)[1][""] / count for count, act in batches.items()}
    batch = min(each, key=lambda count: each[count])
    found = alternate(
        {"own": lambda: own.encode(frames, batch_size=_BATCH), "peer": batches[batch]}, settings
    )
    seconds = float(np.median(found["own"])) / _BATCH
    theirs = float(np.median(found["peer"])) / batch
    flops = flops_of(lambda: own.encode(frames[:1]))
    peer_flops = flops_of(_peer_forms(frames[:1], settings)[form])
    dtype = torch.bfloat16 if "bf16" in form else torch.float32
    return [
        Claim(
            what=f"tokenizer encode, {own.height}x{own.width}, base, batches of {_BATCH}",
            against=f"VQModel f16, width 128, batches of {batch}",
            figure=times_faster(found["peer"], found["own"], work=batch / _BATCH),
            bar=10,
            details=(
                f"drivesim in {name_of(own.dtype)} {1 / seconds:.3g} frames/s "
                f"at {flops / 1e9:.1f} GFLOP a frame, "
                f"VQModel {1 / theirs:.3g} at {peer_flops / 1e9:.0f}",
                f"VQModel: {tried(times)}; {form}: {each[1]:.3g} s a frame one by one, "
                f"{each[large]:.3g} s {large} at once",
                f"drivesim {limits(settings, own.dtype).reached(seconds, flops=flops)}, "
                f"VQModel {limits(settings, dtype).reached(theirs, flops=peer_flops)}",
            ),
        )
    ]


def end_to_end(settings: Settings) -> list[Claim]:
    """The share of the encoder's speed that is left once files are read and stores written."""
    own = tokenizer(shape_of("base", settings), settings)
    seconds, count = (1.0, 1) if settings.toy else (8.0, 2)
    size = SyntheticConfig(height=2 * own.height, width=2 * own.width, fps=FPS)
    with tempfile.TemporaryDirectory() as name:
        videos, out = Path(name) / "videos", Path(name) / "tokens"
        write_synthetic_drives(
            videos, drives=count, seconds=seconds, config=size, workers=min(count, usable_cores())
        )
        frames = _frames(round(seconds * FPS) * count, settings)

        def whole() -> None:
            shutil.rmtree(out, ignore_errors=True)
            tokenize(find_drives([videos]), own, out)

        found = alternate({"alone": lambda: own.encode(frames), "whole": whole}, settings)
    shares = [a / b for a, b in zip(found["alone"], found["whole"], strict=True)]
    rate = len(frames) / float(np.median(found["whole"]))
    return [
        Claim(
            what=f"tokenize, base, from {count} mp4 files of {size.height}x{size.width}",
            against="the encoder alone",
            figure=Figure.of(shares),
            bar=0.9,
            details=(f"{len(frames)} frames, {rate:.3g} frames/s end to end",),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {"encoder": encoder, "tokenize": end_to_end}


if __name__ == "__main__":
    run_command(__doc__, "encoding", BENCHMARKS, sys.argv[1:])
