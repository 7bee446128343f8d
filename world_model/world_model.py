"""The frozen world model: a folder of weights, config and tokenizer, loaded to imagine futures.

Axes: C contexts, T frames of each, N future frames, F = branches * samples futures, r c token rows
and columns, H W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from driving_sim.data.actions.action_file import SteeringKind
from driving_sim.data.arrays import Pixels
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.engine.config import config, from_dict, load_json, save_json, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import autocast, name_of
from driving_sim.engine.threads import adjust_threads
from driving_sim.engine.weights import build_with_weights, fingerprint, save_weights
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.cache import Cache, encode_frame
from driving_sim.world_model.kernels.decode import FrozenPasses
from driving_sim.world_model.sampling.draw_waves import FrameSample, FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer"
_MOST_CONFIG_BYTES = 2**26  # it names the validation drives, which may be many
_MOST_FPS = 1000


@config
class WorldModelConfig:
    """What a world model's `config.json` says."""

    model: TransformerConfig
    """Size and shape."""
    grid: TokenGrid
    """The tokenizer's tokens."""
    actions: ActionStatistics
    """The training data's actions."""
    fps: Annotated[float, Field(gt=0, le=_MOST_FPS)]
    """Frames per second of the training data, and so of what is generated."""
    steering_kind: SteeringKind | None
    """What the steering channel means; None where no drive had actions."""
    validation_drives: tuple[str, ...]
    """Ids of the drives that were kept from training, to choose the best weights by."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Contexts, encoded once; any number of futures can start from them."""

    cache: Cache
    last: Tensor
    """Tokens of each context's last frame, [C, r * c]."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Futures as frames and as tokens."""

    frames: Pixels
    """[F, N, H, W, 3]."""
    tokens: Tensor
    """int64 [F, N, r, c]."""
    log_probs: Tensor
    """[F, N, r, c], nats: under the plain model."""
    sampling_log_probs: Tensor
    """[F, N, r, c], nats: under the distribution that was drawn from."""


class WorldModel:
    """Futures of tokens from a context and actions, with fixed weights: no gradients, no dropout.

    `precision` is the passes' number format (auto, fp32 or bf16; auto: bf16 where it is faster,
    which on a CPU it is wherever passes are compiled: they have half as much to read). Passes are
    compiled for weights in float32.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        *,
        fps: float,
        steering_kind: SteeringKind | None,
        validation_drives: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.transformer = transformer.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        self.config = WorldModelConfig(
            model=transformer.config,
            grid=transformer.grid,
            actions=transformer.statistics,
            fps=fps,
            steering_kind=steering_kind,
            validation_drives=tuple(validation_drives),
        )
        """Everything but the weights."""
        self.fps, self.steering_kind = fps, steering_kind
        self.validation_drives = self.config.validation_drives
        self.statistics = transformer.statistics
        """Mean, spread and percentiles of the training data's actions."""
        # Statistics of a channel that was never there keep their defaults.
        has_speed = (self.statistics.mean[0], self.statistics.std[0]) != (0.0, 1.0)
        self.known_channels = (has_speed, steering_kind is not None)
        """Whether the training data had any speed, and any steering."""
        self.context_frames = transformer.config.context_frames
        """Frames that the model sees, the one being predicted included."""
        self._precision = precision
        self._passes = FrozenPasses(self.transformer, precision)
        self.dtype = self._passes.dtype
        self.precisions = {
            "tokenizer": name_of(tokenizer.dtype),
            "world_model": name_of(self.dtype),
        }
        """The number formats, fp32 or bf16, of the tokenizer and of the world model's passes."""
        identity = {"config": to_dict(self.config), "tokenizer": tokenizer.fingerprint}
        self.fingerprint = fingerprint(identity, transformer)
        """SHA-256 of weights, config and tokenizer."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is rebuilt from the weights: compiled passes hold memory addresses."""
        facts = {
            name: getattr(self, name) for name in ("fps", "steering_kind", "validation_drives")
        }
        # auto may be another format where a pickle is loaded
        make = partial(type(self), **facts, device=self.device, precision=self._precision)
        return make, (self.transformer, self.tokenizer)

    @classmethod
    def from_run(cls, path: Path | str, device: str = "auto", precision: str = "auto") -> Self:
        """Load the run folder `path`; raise `DriveSimError` where it is not an intact one."""
        folder = Path(path)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise DriveSimError(
                    f"{folder} holds no world model ({name} is missing): "
                    "train one with `drivesim train-world-model`, or name its folder"
                )
        saved = load_json(folder / _CONFIG, most_bytes=_MOST_CONFIG_BYTES)
        config = from_dict(WorldModelConfig, saved.get("config", {}), str(folder / _CONFIG))
        tokenizer = Tokenizer.from_run(folder / _TOKENIZER, device, precision)
        transformer, written = build_with_weights(
            lambda: Transformer(config.model, config.grid, config.actions),
            folder / _WEIGHTS,
            of="this world model",
        )
        world = cls(
            transformer,
            tokenizer,
            fps=config.fps,
            steering_kind=config.steering_kind,
            validation_drives=config.validation_drives,
            device=resolve_device(device),
            precision=precision,
        )
        grid = TokenGrid(rows=tokenizer.rows, cols=tokenizer.cols, levels=tuple(tokenizer.levels))
        if written.get("tokenizer") != tokenizer.fingerprint or config.grid != grid:
            raise DriveSimError(
                f"{folder / _TOKENIZER} is not the tokenizer that this world model was trained "
                "with; copy the whole run folder again"
            )
        if written.get("fingerprint") != world.fingerprint:
            raise DriveSimError(
                f"{folder}: config and weights do not belong together (their fingerprint is not "
                "the one written); copy the folder again"
            )
        return world

    def save(self, path: Path | str) -> None:
        """Write weights, config and tokenizer into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / _TOKENIZER)
        save_json(folder / _CONFIG, {"kind": "world-model", "config": to_dict(self.config)})
        # The fingerprints stand in the same file as the weights: all are replaced in one move.
        prints = {"tokenizer": self.tokenizer.fingerprint, "fingerprint": self.fingerprint}
        save_weights(self.transformer, folder / _WEIGHTS, prints)

    def check_store(self, store: TokenStore) -> None:
        """Raise `DriveSimError` unless a store's tokens, steering and frame rate fit the model."""
        if store.info.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise DriveSimError(
                f"{store.path} was made by another tokenizer than the model's: tokenize the videos "
                "with the tokenizer in the model's run folder"
            )
        kind, fps = store.info.steering_kind, store.info.fps
        if kind and self.steering_kind and kind != self.steering_kind:
            raise DriveSimError(
                f"{store.path}: its steering is {kind}, the model's is {self.steering_kind}: "
                "tokenize drives whose steering is of that kind"
            )
        if abs(fps / self.fps - 1) > RATE_TOLERANCE:
            raise DriveSimError(
                f"{store.path} has {fps:.3g} frames/s, the model was trained on {self.fps:.3g}: "
                f"tokenize the videos with `fps={self.fps:.3g}`"
            )

    def format_notice(self, store: TokenStore) -> str | None:
        """One line where a store's tokens are of another number format than this model encodes in.

        That is no error, for it changes about one token in a hundred.
        """
        made, own = store.info.precision, name_of(self.tokenizer.dtype)
        if made == own:
            return None
        return (
            f"{store.path}: its tokens were made in {made}, this model encodes in {own}, so about "
            f"1 token in 100 differs; `precision={made}` computes all of it in {made}"
        )

    def encode_prefix(
        self, tokens: ArrayLike | Tensor, past_actions: ArrayLike, valid: ArrayLike | None = None
    ) -> Prefix:
        """Encode a context: tokens int64 [T, r, c] and the actions [T - 1, 2] (m/s, rad) in it.

        Or C contexts at once, tokens [C, T, r, c] and actions [C, T - 1, 2]. `valid`, shaped like
        the actions, says which are known (by default all that are not NaN). Only the last W - 1
        frames, and what led to them, are used: with the next frame they fill the model's window.
        Raises `DriveSimError` for tokens of another size than the model's and infinite actions.
        """
        tokens_CTP = self._checked_tokens(tokens).to(self.device)
        contexts, count, _ = tokens_CTP.shape
        actions, known = _with_validity("past_actions", past_actions, valid)
        if actions.shape != (*torch.as_tensor(tokens).shape[:-3], count - 1, 2):
            raise ValueError(
                f"past_actions of shape {tuple(actions.shape)}: {count} context frames have "
                f"{count - 1} actions between them, [{count - 1}, 2]"
            )
        start = self.no_prefix(contexts)
        before = torch.cat([start.last[:, None], tokens_CTP[:, :-1]], dim=1)
        # Nothing leads to the first frame.
        pads = (0, 0, 1, 0)
        led = [F.pad(each.view(contexts, -1, 2), pads).to(self.device) for each in (actions, known)]
        with torch.inference_mode(), autocast(start.cache.device, start.cache.dtype):
            for t in range(max(0, count - self.context_frames + 1), count):
                frame = [each[:, t] for each in (tokens_CTP, before, *led)]
                encode_frame(start.cache, *frame, judge=False)
        return Prefix(start.cache, tokens_CTP[:, -1])

    def no_prefix(self, contexts: int = 1) -> Prefix:
        """What a drive's first frame comes after: nothing."""
        none = self.transformer.grid.codebook_size
        last = torch.full((contexts, self.transformer.order.tokens), none, device=self.device)
        return Prefix(self._passes.new_cache(contexts), last)

    def _checked_tokens(self, tokens: ArrayLike | Tensor) -> Tensor:
        """As int64 [C, T, r * c]."""
        grid = self.transformer.grid
        whole = torch.as_tensor(tokens).long()
        if whole.ndim not in (3, 4) or whole.shape[-2:] != (grid.rows, grid.cols):
            raise DriveSimError(
                f"tokens of shape {list(whole.shape)}: this world model takes "
                f"[T, {grid.rows}, {grid.cols}]; encode frames with its own tokenizer"
            )
        if not whole.numel():
            raise DriveSimError("an empty context: a future starts from at least one frame")
        if whole.min() < 0 or whole.max() >= grid.codebook_size:
            raise DriveSimError(
                f"tokens from {whole.min()} to {whole.max()}: this world model's are "
                f"below {grid.codebook_size}; encode frames with its own tokenizer"
            )
        tokens_CTrc = whole[None] if whole.ndim == 3 else whole
        return rearrange(tokens_CTrc, "k t r c -> k t (r c)")

    def branch(
        self,
        prefix: Prefix,
        *,
        branches: int = 1,
        samples: int = 1,
        sampling: Sampling | None = None,
        first_draw: int = 0,
    ) -> FrameSampler:
        """Start branches * samples futures, to be continued action by action with `step`.

        Futures are numbered branch * samples + sample. All branches go on from the prefix's one
        context, and then sample s of each has the same draws, so that they differ by their actions
        alone; or each goes on from its own of as many, with draws of its own. Draws are numbered
        from `first_draw` on: contexts that come in batches are numbered through with it.
        """
        contexts = len(prefix.last)
        if contexts not in (1, branches):
            raise ValueError(f"{branches} branches of {contexts} contexts: give one for each")
        own = torch.arange(branches) if contexts > 1 else torch.zeros(branches, dtype=torch.int64)
        draws = own[:, None] * samples + torch.arange(samples)
        return FrameSampler(
            prefix.cache,
            prefix.last,
            samples=first_draw + rearrange(draws, "b s -> (b s)"),
            sampling=sampling or Sampling(),
            contexts=own.repeat_interleave(samples),
        )

    def generate(
        self,
        prefix: Prefix,
        actions: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        samples: int = 1,
        sampling: Sampling | None = None,
        first_draw: int = 0,
    ) -> Iterator[FrameSample]:
        """Yield frame after frame of F = branches * samples futures, tokens [F, r, c].

        `actions` [branches, N, 2] or, for one branch, [N, 2] (m/s, rad): the first leads from the
        last context frame to the first new one. Branches share one context or have one each.
        `valid` of the same shape says which are known (by default all that are not NaN); infinite
        ones raise `DriveSimError`. How draws are numbered: see `branch`. Memory does not grow with
        N.

        With compiled passes a future is the same alone and among others, to the last bit. torch's
        passes round differently with the batch: the draws stay the same, but a token whose draw
        falls on a boundary can change, and the future from there on.
        """
        actions_BNA, valid_BNA = _with_validity("actions", actions, valid)
        if actions_BNA.ndim == 2:
            actions_BNA, valid_BNA = actions_BNA[None], valid_BNA[None]
        if actions_BNA.ndim != 3 or actions_BNA.shape[2] != 2:
            raise ValueError(
                f"actions of shape {tuple(actions_BNA.shape)}: must be [branches, N, 2] or [N, 2]"
            )
        sampler = self.branch(
            prefix,
            branches=len(actions_BNA),
            samples=samples,
            sampling=sampling,
            first_draw=first_draw,
        )
        pairs = [
            repeat(values, "b n a -> n (b s) a", s=samples).to(self.device)
            for values in (actions_BNA, valid_BNA)
        ]
        for action, known in zip(*pairs, strict=True):
            adjust_threads(self.device)
            yield sampler.step(action, known)

    def rollout(
        self,
        frames: Pixels | Tensor,
        past_actions: ArrayLike,
        actions: ArrayLike,
        *,
        samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
    ) -> Rollout:
        """Imagine what follows `frames` uint8 [T, height, width, 3] under `actions`, in pixels.

        `past_actions` [T - 1, 2] and `actions` [N, 2] or [branches, N, 2] are in m/s and rad; NaN
        is unknown. Everything is kept in memory: for long futures, `generate` and decode.
        """
        sampling = Sampling(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance
        )
        prefix = self.encode_prefix(self.tokenizer.encode(frames), past_actions)
        steps = list(self.generate(prefix, actions, samples=samples, sampling=sampling))
        tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
        decoded = self.tokenizer.decode(rearrange(tokens, "f n r c -> (f n) r c"))
        return Rollout(
            rearrange(decoded, "(f n) h w c -> f n h w c", f=len(tokens)).numpy(),
            tokens,
            torch.stack([step.log_probs for step in steps], dim=1).cpu(),
            torch.stack([step.sampling_log_probs for step in steps], dim=1).cpu(),
        )


def _with_validity(name: str, actions: ArrayLike, valid: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """As float32 and bool tensors of the same shape; raises DriveSimError for infinite ones.

    Values that are not `valid` become 0. NaN stays, and is unknown to the action embedding.
    """
    values = torch.from_numpy(np.array(actions, np.float32))
    known = np.ones(values.shape) if valid is None else np.broadcast_to(valid, values.shape)
    mask = torch.from_numpy(known.astype(np.bool_))
    values = torch.where(mask, values, 0.0)
    infinite = values.isinf().nonzero().tolist()
    if infinite:
        raise DriveSimError(
            f"{name}{infinite[0]} is {values[tuple(infinite[0])]}: give finite values, in m/s and "
            "rad, or NaN where unknown"
        )
    return values, mask
