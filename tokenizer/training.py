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
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

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
from driving_sim.engine.training.loop import (
    TrainingConfig,
    TrainingResult,
    Validation,
    check_run,
    train,
)
from driving_sim.tokenizer.autoencoder import STRIDE, Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.objective import ObjectiveConfig, TokenizerObjective
from driving_sim.tokenizer.perceptual import vgg16_weights
from driving_sim.tokenizer.tokenizer import Tokenizer, frames_from_images, images_from_frames

_GRID_FRAMES = 8
_BATCH = 16
_BEFORE_GAN = 100.0
"""Added to the score of a model that the discriminator has not fully acted on yet."""


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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
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
    size = config.model.frame_size
    if skip_bad:
        drives = _decodable(drives, size, device)
    training, validation = _split(drives, config.data)
    dataset = FrameBatches(
        training,
        size=size,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
        mirror=config.data.mirror,
        shift=config.data.shift,
        gain=config.data.gain,
        cutmix=config.data.cutmix,
        cache_bytes=int(config.data.cache_gigabytes * 1e9),
        shared=config.training.workers > 0,
    )
    validate = Validator(validation_frames(validation, size, config.data.validation_frames))
    torch.manual_seed(config.training.seed)
    objective = TokenizerObjective(config.model, config.objective, vgg16)
    if init_from is not None:
        _start_from(objective.autoencoder, init_from)
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
        texture, so models from before it has full say rank behind all later ones.
        """
        assert isinstance(model, TokenizerObjective)
        # What is kept works in float32, whatever it is trained in.
        with torch.autocast(model.gan_share.device.type, enabled=False):
            batches = [self._measure(model, frames) for frames in torch.split(self.frames, _BATCH)]
            grid = self._grid(model.autoencoder)
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        tokens = columns.pop("tokens")
        counts = torch.bincount(tokens, minlength=model.autoencoder.quantiser.codebook_size)
        metrics = {name: float(values.mean()) for name, values in columns.items()}
        use = codebook_use(counts)
        metrics |= {f"codebook/{name}": value for name, value in use._asdict().items()}
        waiting = model.discriminator is not None and float(model.gan_share) < 1
        return Validation(
            score=metrics["loss"] + (_BEFORE_GAN if waiting else 0.0),
            metrics=metrics,
            images={"reconstructions": grid},
        )

    def _measure(self, model: TokenizerObjective, frames: Tensor) -> dict[str, Tensor]:
        """Return per-frame measurements [B] by name, and all tokens."""
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
        }

    def _grid(self, autoencoder: Autoencoder) -> NDArray[np.uint8]:
        chosen = np.linspace(0, len(self.frames) - 1, min(_GRID_FRAMES, len(self.frames)))
        frames = self.frames[chosen.round().astype(np.int64)]
        device = autoencoder.last_layer.device
        images = images_from_frames(frames.to(device), autoencoder.config.frame_size)
        rebuilt = frames_from_images(autoencoder(images).images)
        return reconstruction_grid(frames, rebuilt.cpu())


def reconstruction_grid(originals: Tensor, rebuilt: Tensor) -> NDArray[np.uint8]:
    """Return one picture of frames [N, H, W, 3]: each original beside its reconstruction."""
    pairs = torch.stack([originals, rebuilt], dim=1)
    if len(pairs) % 2 == 0:
        grid = rearrange(pairs, "(n k) two h w c -> (n h) (k two w) c", k=2)
    else:
        grid = rearrange(pairs, "n two h w c -> (n h) (two w) c")
    return grid.numpy()


def validation_frames(drives: Sequence[SampledDrive], size: FrameSize, most: int) -> Tensor:
    """Decode at most `most` frames, uint8 [N, H, W, 3], spread evenly over the drives."""
    total = sum(len(drive.indices) for drive in drives)
    places = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
    frames: list[NDArray[np.uint8]] = []
    start = 0
    for drive in drives:
        stop = start + len(drive.indices)
        own = places[(start <= places) & (places < stop)] - start
        frames.extend(drive.drive.stream(size, drive.indices[own]))
        start = stop
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
    with process_group(resolve_device(device)) as (ranks, _):
        good = _try_all(drives, size) if ranks.is_main else [False] * len(drives)
        chosen = ranks.from_main([float(each) for each in good])
    kept = [drive for drive, each in zip(drives, chosen, strict=True) if each]
    if not kept:
        raise DriveSimError("every drive was skipped: nothing is left to train on")
    return kept


def _try_all(drives: Sequence[SampledDrive], size: FrameSize) -> list[bool]:
    good = []
    with progress(sum(len(each.indices) for each in drives), "check", "frames") as shown:
        for each in drives:
            try:
                for _ in each.drive.stream(size, each.indices):
                    shown.advance(1)
            except DriveSimError as error:
                shown.say(f"skipped {each.drive.id}: {error}")
                good.append(False)
            else:
                good.append(True)
    return good


def _start_from(autoencoder: Autoencoder, run: Path) -> None:
    source = Tokenizer.from_run(run, "cpu", "fp32")
    if source.config != autoencoder.config:
        raise DriveSimError(
            f"--init-from {run}: its configuration differs from this run's "
            f"({source.config} and {autoencoder.config})"
        )
    autoencoder.load_state_dict(source.autoencoder.state_dict())


def _split(
    drives: Sequence[SampledDrive], config: TokenizerDataConfig
) -> tuple[list[SampledDrive], list[SampledDrive]]:
    by_id = {drive.drive.id: drive for drive in drives}
    training, validation = split_drives(
        list(by_id), validation=config.validation, fraction=config.validation_fraction
    )
    if not validation:
        return list(drives), list(drives)
    return [by_id[name] for name in training], [by_id[name] for name in validation]


def _export(module: nn.Module, run: Path) -> None:
    assert isinstance(module, Autoencoder)
    # A copy: a Tokenizer freezes the module that it is given.
    Tokenizer(copy.deepcopy(module)).save(run)
