"""The peers that drivesim is compared with: GPT-2 from `transformers`, VQModel from `diffusers`.

A peer can run in several forms, such as number formats or kinds of cache. The forms that its
documentation recommends for speed are timed, and the fastest one is the peer. GPT-2 compiled by
torch is a peer of its own.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.machine import number_formats
from benchmarks.measuring.paired import Settings, Work, seconds
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import say
from driving_sim.tokenizer.perceptual import import_lpips

VQ_WIDTHS = range(16, 136, 8)
"""Widths from which a VQModel's is chosen, up to the published 128.

They are multiples of 8, because its norms divide the channels into 8 groups.
"""
_GPT2_FORMS = (
    ("dynamic cache", False, False),
    ("static cache", True, False),
    ("static cache, compiled", True, True),
)
"""Forms of GPT-2: name, whether the cache is static, whether the step for one token is compiled."""


def package(name: str) -> Any:
    """Import a peer's package. If it is not installed, exit with the command that installs it."""
    try:
        if name == "webdataset":
            return importlib.import_module(name)
        # transformers and diffusers import torchvision. Some builds of torchvision lack operators
        # and fail at import. import_lpips declares the missing operators.
        import_lpips()
        importlib.import_module(f"{name}.utils.logging").set_verbosity_error()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{name} is not installed; run pip install 'drivesim[bench]'") from error


def fastest(forms: Mapping[str, Work], settings: Settings) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest form of a peer, and the seconds of all forms.

    Each form runs once before it is timed.
    """
    times = {}
    for name, act in forms.items():
        seconds(act, settings.device)
        times[name] = min(seconds(act, settings.device) for _ in range(2))
    return min(times, key=lambda name: times[name]), times


def times_text(times: Mapping[str, float]) -> str:
    """Return the names and times of a peer's forms as text in ms; `times` are in seconds."""
    return ", ".join(f"{name} {1e3 * taken:.4g} ms" for name, taken in times.items())


def gpt2(
    *, layers: int, width: int, heads: int, codes: int, positions: int, dropout: float = 0.0
) -> nn.Module:
    """Build a GPT-2 with random weights and torch's fused attention.

    The attention has no dropout, because torch's fused attention does not support it on a CPU.
    """
    transformers = package("transformers")
    config = transformers.GPT2Config(
        vocab_size=codes,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def gpt2_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss that GPT-2 itself computes from tokens [B, N]."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


class Gpt2Decoder:
    """Sample tokens from GPT-2 one by one, with a key-value cache from `transformers`."""

    def __init__(
        self, model: nn.Module, *, positions: int, static: bool, compiled: bool, settings: Settings
    ) -> None:
        """Use a preallocated cache of `positions` tokens if `static`, otherwise a growing cache."""
        self.model: Any = model
        self.compiled = compiled
        backend = "eager" if settings.toy else "inductor"
        self.step: Any = (
            torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        )
        self.device = settings.device
        caches, config = package("transformers"), self.model.config
        self.cache = (
            caches.StaticCache(config, positions) if static else caches.DynamicCache(config=config)
        )

    @torch.inference_mode()
    def fill(self, tokens: Tensor) -> None:
        """Put a context [1, N] into the cache."""
        self._logits(self.model, tokens)

    @torch.inference_mode()
    def draw(self, count: int) -> Tensor:
        """Draw `count` tokens, and remove them from the cache again.

        This way, every call continues the same context.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        drawn = []
        for _ in range(count):
            token = torch.multinomial(self._logits(self.step, token).float().softmax(-1), 1)
            drawn.append(token)
        self.cache.crop(-count)
        return torch.cat(drawn, dim=1)

    def _logits(self, model: Any, tokens: Tensor) -> Tensor:
        """Return the logits [1, K] of the token that follows the cache and `tokens` [1, n]."""
        output = model(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def gpt2_decoders(
    build: Callable[[], nn.Module], *, positions: int, context: int, codes: int, settings: Settings
) -> dict[str, Gpt2Decoder]:
    """Return GPT-2 in all forms and number formats, each with `context` tokens in its cache.

    Leaves out the forms that torch cannot compile on this machine, and prints a line for each of
    them.
    """
    tokens = torch.randint(codes, (1, context), device=settings.device)
    decoders = {}
    for dtype in number_formats(settings):
        for name, static, compiled in _GPT2_FORMS:
            model = build().eval().to(settings.device, dtype)
            decoder = Gpt2Decoder(
                model, positions=positions, static=static, compiled=compiled, settings=settings
            )
            decoder.fill(tokens)
            try:
                decoder.draw(1)
            except torch._dynamo.exc.TorchDynamoException as error:
                say(f"torch cannot compile GPT-2 here: {str(error).strip().splitlines()[0]}")
                continue
            decoders[f"{name_of(dtype)} {name}"] = decoder
    return decoders


def vq_model(*, width: int, groups: int = 32, codes: int = 1024, channels: int = 256) -> nn.Module:
    """Build the VQGAN of taming-transformers with stride 16.

    `width` is the number of channels at full resolution.
    """
    widths = tuple(factor * width for factor in (1, 1, 2, 2, 4))
    model: nn.Module = package("diffusers").VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        vq_embed_dim=channels,
        num_vq_embeddings=codes,
        norm_num_groups=groups,
    )
    return model


def vq_encode(model: nn.Module, images: Tensor) -> Tensor:
    """Return the tokens of pictures [B, 3, H, W] in [-1, 1]."""
    peer: Any = model
    tokens: Tensor = peer.quantize(peer.encode(images).latents.float())[2][2]
    return tokens


def vq_reconstruction(model: nn.Module, images: Tensor) -> Tensor:
    """Encode, quantise and decode pictures [B, 3, H, W]."""
    reconstructed: Tensor = model(images).sample
    return reconstructed


def parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def nearest(build: Callable[[int], nn.Module], sizes: Iterable[int], count: int) -> nn.Module:
    """Build a model with about `count` parameters.

    Of all `sizes`, takes the one that comes nearest to this number.
    """
    with torch.device("meta"):
        counts = {size: parameters(build(size)) for size in sizes}
    return build(min(counts, key=lambda size: abs(counts[size] - count)))
