"""`python -m benchmarks.training.learning train|plot`: how fast drivesim and its peers learn.

    python -m benchmarks.training.learning train tokenizer VIDEOS... [--minutes 30] [--threads 1]
    python -m benchmarks.training.learning train tokenizer-peer VIDEOS...
    python -m benchmarks.training.learning train world-model TOKENS --tokenizer RUN
    python -m benchmarks.training.learning train world-model-peer TOKENS
    python -m benchmarks.training.learning plot

`train` writes a run into the folder --out/NAME. After an interruption, the same command resumes the
run. drivesim trains its `tiny` presets. The peers train on the same drives, with the same batch
size, training loop, number format, learning-rate schedule and averaging of weights, but with AdamW.
The tokenizer's peer is diffusers' VQModel (the VQGAN of taming-transformers) with about as many
parameters. It trains on L1 and the codebook's losses, and mirroring is its only augmentation. The
world model's peer is transformers' GPT-2 of the same depth and width. It trains on the same
windows, in raster order.

`plot` draws how the best validation result improves with the time spent on training, and prints it
for some of these times. Time spent on validation does not count. It is best to train drivesim and
its peer at the same time, on one core each.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.measuring.peers import VQ_WIDTHS, gpt2, nearest, parameters, vq_model
from benchmarks.training.scaling_runs import as_command
from driving_sim.data.drive import SampledDrive, sample
from driving_sim.data.frame_batches import FrameBatches
from driving_sim.data.split import split_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.tokens.windows import TokenWindows, sequential_windows
from driving_sim.engine.config import to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.run_folder import CONFIG, check_run
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.loop import train
from driving_sim.engine.training.optimizer import Player
from driving_sim.engine.training.run_log import METRICS
from driving_sim.engine.training.trainable import Batch, Trainable, Validation
from driving_sim.pipeline import find_frames
from driving_sim.tokenizer.autoencoder import Autoencoder
from driving_sim.tokenizer.metrics import psnr
from driving_sim.tokenizer.presets import TINY as TOKENIZER
from driving_sim.tokenizer.tokenizer import frames_from_images, images_from_frames
from driving_sim.tokenizer.training import train_tokenizer, validation_frames
from driving_sim.world_model.training.presets import TINY as WORLD_MODEL
from driving_sim.world_model.training.train import train_world_model

_TOKENIZER_PEER_RATE = 3e-4
_WORLD_MODEL_PEER_RATE = 1e-3
_BETAS = {"tokenizer": (0.5, 0.9), "world-model": (0.9, 0.95)}  # the values of VQGAN and nanoGPT


class Peer(Trainable):
    """Base class that makes a peer's model a `Trainable`. `forward` returns loss and metrics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def players(self) -> list[Player]:
        """Return the whole peer as one player.

        A player is a part of a model whose gradients are clipped together.
        """
        return [Player("model", self.model, muon=False)]

    def ema_module(self) -> nn.Module:
        """Return the module whose weights are averaged, which is the whole peer."""
        return self.model

    def blocks(self) -> Iterable[nn.Module]:
        """Return no blocks, because nothing is sharded or compiled."""
        return ()


class PeerTokenizer(Peer):
    """VQModel, trained on L1 and the loss of its codebook."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of a batch of frames, uint8 [B, H, W, 3]."""
        images = self.images(batch["frames"])
        out = self.model(images)
        l1 = (out.sample - images).abs().mean()
        return l1 + out.commit_loss.mean(), {"l1": l1.detach()}

    def images(self, frames: Tensor) -> Tensor:
        """Return frames as images: floats in [-1, 1], in the channels-last memory format."""
        images = images_from_frames(frames, TOKENIZER.model.frame_size)
        return images.contiguous(memory_format=torch.channels_last)


class PeerWorldModel(Peer):
    """GPT-2 on windows of tokens in raster order."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of a batch of tokens [B, T, R, C]."""
        nats = self.nats(batch["tokens"])
        return nats.mean(), {"bits_per_token": nats.mean().detach() / math.log(2)}

    def nats(self, tokens: Tensor) -> Tensor:
        """Return the cross-entropy in nats of every token except the first, [B, T R C - 1]."""
        flat = rearrange(tokens, "b t r c -> b (t r c)")
        logits = self.model(input_ids=flat, use_cache=False).logits
        return F.cross_entropy(
            rearrange(logits[:, :-1], "b n k -> b k n").float(), flat[:, 1:], reduction="none"
        )


def _peer_config(config: TrainingConfig, kind: str, rate: float, minutes: float) -> TrainingConfig:
    return replace(
        config, optimizer="adamw", learning_rate=rate, betas=_BETAS[kind], minutes=minutes,
        steps=None, patience=None,
    )  # fmt: skip


def _drives(videos: Sequence[Path]) -> list[SampledDrive]:
    """Return the drives in the videos, with every second frame."""
    return [sample(drive, every=2) for drive in find_frames(videos, skip_bad=False).drives]


def train_tokenizer_peer(videos: Sequence[Path], run: Path, options: argparse.Namespace) -> None:
    """Train VQModel on the frames that drivesim's tokenizer trains on."""
    by_id = {drive.drive.id: drive for drive in _drives(videos)}
    training, validation = split_drives(list(by_id))
    size, data = TOKENIZER.model.frame_size, TOKENIZER.data

    def build(width: int) -> nn.Module:
        return vq_model(width=width, groups=8, codes=1000, channels=64)

    torch.manual_seed(0)
    peer = PeerTokenizer(nearest(build, VQ_WIDTHS, parameters(Autoencoder(TOKENIZER.model))))
    peer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frames = validation_frames([by_id[name] for name in validation], size, data.validation_frames)

    def validate(model: nn.Module) -> Validation:
        assert isinstance(model, PeerTokenizer)
        with torch.autocast("cpu", enabled=False):
            rebuilt = [
                frames_from_images(model.model(model.images(some)).sample)
                for some in torch.split(frames, 16)
            ]
        decibels = float(psnr(torch.cat(rebuilt), frames).mean())
        return Validation(score=-decibels, metrics={"psnr": decibels})

    config = _peer_config(
        TOKENIZER.training, "tokenizer", options.rate or _TOKENIZER_PEER_RATE, options.minutes
    )
    dataset = FrameBatches(
        [by_id[name] for name in training],
        size=size,
        batch_size=data.batch_size,
        seed=0,
        mirror=True,
        cache_bytes=2**32,
    )
    _train_peer(peer, dataset, config, run, validate, options)


def train_world_model_peer(tokens: Path, run: Path, options: argparse.Namespace) -> None:
    """Train GPT-2 on the windows that drivesim's world model trains on."""
    store, model, data = TokenStore(tokens), WORLD_MODEL.model, WORLD_MODEL.data
    training, validation = split_drives(store.drive_ids)
    frames, a_frame = model.context_frames, store.info.rows * store.info.cols

    def build(layers: int) -> nn.Module:
        return gpt2(
            layers=layers,
            width=model.width,
            heads=model.heads,
            codes=store.info.codebook_size,
            positions=frames * a_frame,
            dropout=model.dropout,
        )

    torch.manual_seed(0)
    peer = PeerWorldModel(build(model.layers))
    windows = list(
        sequential_windows(
            store.select(validation), frames=frames, batch_size=8, limit=data.validation_windows
        )
    )

    def validate(model: nn.Module) -> Validation:
        assert isinstance(model, PeerWorldModel)
        bits = torch.cat([model.nats(batch["tokens"]) for batch in windows]) / math.log(2)
        last = float(bits[:, -a_frame:].mean())
        return Validation(score=float(bits.mean()), metrics={"full_window/bits_per_token": last})

    config = _peer_config(
        WORLD_MODEL.training, "world-model", options.rate or _WORLD_MODEL_PEER_RATE, options.minutes
    )
    dataset = TokenWindows(store.select(training), frames=frames, batch_size=data.batch_size)
    _train_peer(peer, dataset, config, run, validate, options)


def _train_peer(
    peer: Peer,
    dataset: Any,
    config: TrainingConfig,
    run: Path,
    validate: Any,
    options: argparse.Namespace,
) -> None:
    config = replace(config, threads=options.threads, validate_every=options.validate_every)
    settings = {"training": to_dict(config), "parameters": parameters(peer)}
    resume = (run / CONFIG).exists()
    check_run(run, settings, resume)
    train(
        peer,
        dataset=dataset,
        config=config,
        run=run,
        validate=validate,
        export=lambda module, folder: None,
        run_config=settings,
        resume=resume,
        device="cpu",
    )


def train_one(options: argparse.Namespace) -> None:
    """Start or resume the training that the options name."""
    run = options.out / options.what
    ours = {
        "minutes": options.minutes, "steps": None, "patience": None, "threads": options.threads,
        "validate_every": options.validate_every,
    }  # fmt: skip
    resume = (run / CONFIG).exists()
    if options.what == "tokenizer":
        config = replace(TOKENIZER, training=replace(TOKENIZER.training, **ours))
        train_tokenizer(_drives(options.data), config, run, resume=resume, device="cpu")
    elif options.what == "tokenizer-peer":
        train_tokenizer_peer(options.data, run, options)
    elif options.what == "world-model":
        data = replace(WORLD_MODEL.data, preview=False)
        world = replace(WORLD_MODEL, training=replace(WORLD_MODEL.training, **ours), data=data)
        train_world_model(
            options.data[0], world, run, tokenizer=options.tokenizer, resume=resume, device="cpu"
        )
    else:
        train_world_model_peer(options.data[0], run, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One plot: a metric of drivesim's run and of the peer's run."""

    ours: str
    """Name of drivesim's run."""
    peer: str
    """Name of the peer in the legend."""
    metric: str
    """Key of the metric in the validation rows of metrics.jsonl."""
    unit: str
    """Label of the vertical axis."""
    more_is_better: bool
    """Whether higher values of the metric are better."""


PANELS = (
    Panel(ours="tokenizer", peer="VQModel", metric="psnr", unit="PSNR, dB", more_is_better=True),
    Panel(
        ours="world-model",
        peer="GPT-2",
        metric="full_window/bits_per_token",
        unit="bits per token, after a full window",
        more_is_better=False,
    ),
)


def curve(run: Path, panel: Panel) -> NDArray[np.float64]:
    """Return an array [n, 2]: minutes of training, and the best validation result until then."""
    seconds, points = {}, []
    for line in (run / METRICS).read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["phase"] == "train":
            seconds[row["step"]] = row["training_seconds"]
        elif row[panel.metric] is not None:
            points.append((row["step"], row[panel.metric]))
    steps = np.array(sorted(seconds))
    minutes = np.interp([step for step, _ in points], steps, [seconds[n] / 60 for n in steps])
    best = np.maximum if panel.more_is_better else np.minimum
    return np.stack([minutes, best.accumulate([value for _, value in points])], axis=1)


def plot(options: argparse.Namespace) -> None:
    """Draw and print drivesim's runs beside their peers' runs.

    Leaves out a comparison if one of its two runs does not exist.
    """
    panels = [
        panel
        for panel in PANELS
        if all((options.out / f"{panel.ours}{end}" / METRICS).exists() for end in ("", "-peer"))
    ]
    if not panels:
        raise DriveSimError(
            f"{options.out} contains no pair of runs (drivesim's and its peer's); run `train "
            "tokenizer` and `train tokenizer-peer` first, or `train world-model` and `train "
            "world-model-peer`"
        )
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        curves = {
            "drivesim": curve(options.out / panel.ours, panel),
            panel.peer: curve(options.out / f"{panel.ours}-peer", panel),
        }
        for (name, points), colour in zip(curves.items(), ("#2a5db0", "#b4541a"), strict=True):
            axes.plot(*points.T, label=name, color=colour)
        axes.set(xlabel="minutes of training", ylabel=panel.unit, title=panel.ours)
        axes.legend()
        print(f"{panel.ours}: {panel.unit}")
        for minute in (2, 5, 10, 15, 20, 25, 30):
            known = {name: points[points[:, 0] <= minute + 0.05] for name, points in curves.items()}
            print(
                f"  after {minute} min: "
                + ", ".join(f"{name} {p[-1, 1]:.2f}" for name, p in known.items() if len(p))
            )
    with atomic_file(options.picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    """Parse the options, then train or plot."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m benchmarks.training.learning",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/learning"), help="folder of the runs"
    )
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    names = [name for panel in PANELS for name in (panel.ours, f"{panel.ours}-peer")]
    training.add_argument("what", choices=names, help="model to train")
    training.add_argument("data", type=Path, nargs="+", help="videos, or a token store")
    training.add_argument(
        "--tokenizer", type=Path, help="run of the tokenizer that made the token store"
    )
    training.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    training.add_argument("--threads", type=int, default=1, help="torch's threads; default: 1")
    training.add_argument(
        "--validate-every", type=int, default=100, help="steps between validations; default: 100"
    )
    training.add_argument("--rate", type=float, help="peak learning rate of the peer")
    training.set_defaults(act=train_one)
    drawing = commands.add_parser("plot")
    drawing.add_argument(
        "--picture", type=Path, default=Path("docs/learning.png"), help="default: docs/learning.png"
    )
    drawing.set_defaults(act=plot)
    options = parser.parse_args()
    with as_command(parser):
        options.act(options)


if __name__ == "__main__":
    main()
