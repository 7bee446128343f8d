"""Training a tokenizer on drives: the run's options, its validation, the folder it leaves.

Axes: N validation frames, B frames of a batch, H W pixels, K codes in the codebook.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from driving_sim.data.arrays import Pixels
from driving_sim.data.drive import SampledDrive
from driving_sim.data.frame_batches import FrameBatches
from driving_sim.data.split import split_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.config import (
    Count,
    InnerShare,
    NonNegative,
    Share,
    ShareBelowOne,
    config,
    to_dict,
)
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress, say
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import check_run
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.loop import TrainingResult, train
from driving_sim.engine.training.trainable import Validation
from driving_sim.tokenizer.autoencoder import STRIDE, Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.objective import TokenizerObjective, TokenizerObjectiveConfig
from driving_sim.tokenizer.perceptual import vgg16_weights
from driving_sim.tokenizer.tokenizer import Tokenizer, frames_from_images, images_from_frames

_GRID_FRAMES = 8
_BATCH = 16


@config
class TokenizerDataConfig:
    """Which frames train and which validate."""

    batch_size: Count = 16
    """Frames of a batch, on each device."""
    mirror: bool = True
    """Whether half of the training frames are flipped left to right."""
    shift: Annotated[int, Field(ge=0, lt=STRIDE * 2)] = 0
    """Most pixels that training frames are moved by in each direction; edges are reflected."""
    gain: ShareBelowOne = 0.0
    """Most that the brightness of each colour of a training frame is changed by, as a share."""
    cutmix: Share = 0.0
    """Share of the training frames whose right part comes from another frame of the batch."""
    validation: tuple[str, ...] | None = None
    """Ids of the validation drives; none: a share of the drives, drawn by their ids."""
    validation_fraction: InnerShare = 0.1
    """That share."""
    validation_frames: Count = 128
    """Most frames to validate on, spread evenly over the validation drives."""
    cache_gigabytes: NonNegative = 4.0
    """Training frames that fit are decoded once and kept in memory."""


@config
class TokenizerRunConfig:
    """All options of a tokenizer's training run."""

    training: TrainingConfig
    """How it is trained."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """The autoencoder."""
    objective: TokenizerObjectiveConfig = field(default_factory=TokenizerObjectiveConfig)
    """What it is trained for."""
    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    """What it is trained on."""


def train_tokenizer(
    drives: Sequence[SampledDrive],
    config: TokenizerRunConfig,
    run: Path,
    *,
    init_from: Path | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    device: torch.device | str = "auto",
) -> TrainingResult:
    """Train a tokenizer on the frames of `drives` and leave the best one in the folder `run`.

    Validates on whole drives that it does not train on. `init_from` is the run of a tokenizer of
    the same shape to start from. With `skip_bad`, drives that cannot be decoded to their end are
    named and left out, which takes one more pass over all frames. Raises `DriveSimError` where
    there are no drives, or without `skip_bad` a bad one, `run` or `init_from` cannot be used, or
    LPIPS is on and its backbone's weights cannot be had.
    """
    if not drives:
        raise DriveSimError("no drives to train a tokenizer on")
    run_config = to_dict(config) | {
        "init_from": None if init_from is None else str(init_from),
        "drives": _described(drives),
        "skip_bad": skip_bad,
    }
    check_run(run, run_config, resume)
    vgg16 = vgg16_weights() if config.objective.lpips_weight > 0 else None
    if vgg16 is None:
        say("training without the perceptual loss LPIPS, as objective.lpips_weight is 0")
    size, data = config.model.frame_size, config.data
    if skip_bad:
        drives = _decodable(drives, size, device)
    by_id = {drive.drive.id: drive for drive in drives}
    train_ids, validation_ids = split_drives(
        list(by_id), validation=data.validation, fraction=data.validation_fraction
    )
    held_out = [by_id[name] for name in validation_ids or train_ids]
    dataset = FrameBatches(
        [by_id[name] for name in train_ids],
        size=size,
        batch_size=data.batch_size,
        seed=config.training.seed,
        mirror=data.mirror,
        shift=data.shift,
        gain=data.gain,
        cutmix=data.cutmix,
        cache_bytes=int(data.cache_gigabytes * 1e9),
        shared=config.training.workers > 0,
    )
    validate = Validator(validation_frames(held_out, size, data.validation_frames))
    torch.manual_seed(config.training.seed)
    objective = TokenizerObjective(config.model, config.objective, vgg16)
    if init_from is not None:
        source = Tokenizer.from_run(init_from, "cpu", "fp32")
        if source.config != config.model:
            raise DriveSimError(
                f"`init_from` {init_from}: its configuration differs from this run's "
                f"({source.config} and {config.model})"
            )
        objective.autoencoder.load_state_dict(source.autoencoder.state_dict())
    return train(
        objective,
        dataset=dataset,
        config=config.training,
        run=run,
        validate=validate,
        export=_export,
        run_config=run_config,
        resume=resume,
        device=device,
    )


class Validator:
    """Measures an objective's autoencoder on fixed frames, uint8 [N, H, W, 3]."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames

    def __call__(self, model: nn.Module) -> Validation:
        """Return losses, PSNR, SSIM, use of the codebook and a grid of reconstructions.

        The score is the loss without the discriminator. A discriminator trades some of it for
        texture, so it is provisional before that has its full say.
        """
        assert isinstance(model, TokenizerObjective)
        # What is kept works in float32, whatever it is trained in.
        with torch.autocast(model.gan_share.device.type, enabled=False):
            batches = [_measure(model, frames) for frames in torch.split(self.frames, _BATCH)]
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        tokens, rebuilt = columns.pop("tokens"), columns.pop("rebuilt")
        counts = torch.bincount(tokens, minlength=model.autoencoder.quantiser.codebook_size)
        metrics = {name: float(values.mean()) for name, values in columns.items()}
        metrics |= {f"codebook/{name}": value for name, value in codebook_use(counts).items()}
        shown = torch.linspace(0, len(rebuilt) - 1, min(_GRID_FRAMES, len(rebuilt))).round().long()
        waiting = model.discriminator is not None and float(model.gan_share) < 1
        return Validation(
            score=metrics["loss"],
            provisional=waiting,
            metrics=metrics,
            images={"reconstructions": reconstruction_grid(self.frames[shown], rebuilt[shown])},
        )


def _measure(model: TokenizerObjective, frames: Tensor) -> dict[str, Tensor]:
    """Return per-frame measurements [B] by name, the rebuilt frames and all tokens."""
    frames = frames.to(model.gan_share.device)
    images = images_from_frames(frames, model.autoencoder.config.frame_size)
    reconstruction = model.autoencoder(images)
    loss, parts = model.fidelity(reconstruction.images, images)
    rebuilt = frames_from_images(reconstruction.images)
    return {
        **{name: part.repeat(len(frames)) for name, part in {"loss": loss, **parts}.items()},
        "psnr": psnr(rebuilt, frames),
        "ssim": ssim(rebuilt, frames),
        "tokens": reconstruction.tokens.flatten(),
        "rebuilt": rebuilt.cpu(),
    }


def reconstruction_grid(originals: Tensor, rebuilt: Tensor) -> Pixels:
    """Return one picture of frames [N, H, W, 3]: each original beside its reconstruction."""
    pairs = torch.stack([originals, rebuilt], dim=1)
    in_a_row = 1 if len(pairs) % 2 else 2
    return rearrange(pairs, "(n k) two h w c -> (n h) (k two w) c", k=in_a_row).numpy()


def validation_frames(drives: Sequence[SampledDrive], size: FrameSize, most: int) -> Tensor:
    """Decode at most `most` frames, uint8 [N, H, W, 3], spread evenly over the drives."""
    ends = np.cumsum([len(drive.indices) for drive in drives])
    places = np.linspace(0, ends[-1] - 1, min(most, ends[-1])).round().astype(np.int64)
    frames: list[Pixels] = []
    for drive, end in zip(drives, ends, strict=True):
        own = np.unique(places - end) + len(drive.indices)
        own = own[(own >= 0) & (own < len(drive.indices))]
        frames.extend(drive.drive.stream(size, drive.indices[own]))
    return torch.from_numpy(np.stack(frames))


def _described(drives: Sequence[SampledDrive]) -> dict[str, int | str]:
    """What tells these frames from others, so that a run is resumed on its own."""
    digest = hashlib.sha256()
    for drive in sorted(drives, key=lambda each: each.drive.id):
        video = drive.drive.video
        size = None if video is None else video.path.stat().st_size
        digest.update(json.dumps([drive.drive.id, size, drive.indices.tolist()]).encode())
        digest.update(drive.timestamps.tobytes())
    return {
        "count": len(drives),
        "frames": sum(len(drive.indices) for drive in drives),
        "sha256": digest.hexdigest(),
    }


def _decodable(
    drives: Sequence[SampledDrive], size: FrameSize, device: torch.device | str
) -> list[SampledDrive]:
    """The drives whose frames can all be decoded; names the others.

    Before anything is drawn: so the split and every batch are functions of the drives kept. Of
    several ranks, the main one decides for all.
    """
    total = sum(len(each.indices) for each in drives)

    def good() -> list[int]:
        found = []
        with progress(total, "check", "frames") as shown:
            for number, each in enumerate(drives):
                try:
                    for _ in each.drive.stream(size, each.indices):
                        shown.advance(1)
                    found.append(number)
                except DriveSimError as error:
                    shown.say(f"skipped {each.drive.id}: {error}")
        return found

    with process_group(resolve_device(device)) as (ranks, _):
        kept = [drives[number] for number in ranks.from_main(good)]
    if not kept:
        raise DriveSimError("every drive was skipped: nothing is left to train on")
    return kept


def _export(module: nn.Module, run: Path) -> None:
    assert isinstance(module, Autoencoder)
    # A copy: a Tokenizer freezes the module that it is given.
    Tokenizer(copy.deepcopy(module)).save(run)
