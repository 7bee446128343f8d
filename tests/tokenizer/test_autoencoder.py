from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from driving_sim.tokenizer import autoencoder as module
from driving_sim.tokenizer.autoencoder import (
    AttentionBlock,
    Autoencoder,
    AutoencoderConfig,
    Patching,
    ResidualBlock,
)


def tiny(**changes: Any) -> AutoencoderConfig:
    values: dict[str, Any] = {
        "height": 32,
        "width": 64,
        "widths": (16, 16, 32),
        "blocks": (1, 1, 1),
        "attention_blocks": 1,
        "head_size": 16,
    }
    return AutoencoderConfig(**(values | changes))


def randomised(config: AutoencoderConfig) -> Autoencoder:
    """Return an autoencoder whose blocks depend on their input; new blocks do not."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    for parameter in autoencoder.parameters():
        if parameter.ndim == 4 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return autoencoder


@pytest.mark.parametrize("kind", ["haar", "unshuffle"])
def test_patching_is_invertible_and_keeps_lengths(kind: Literal["haar", "unshuffle"]) -> None:
    patching = Patching(kind)
    images = torch.randn(2, 3, 16, 32)
    patches = patching(images)
    assert patches.shape == (2, 48, 4, 8)
    torch.testing.assert_close(patching.inverse(patches), images)
    torch.testing.assert_close(patches.norm(), images.norm())


def test_unshuffle_equals_torchs_pixel_unshuffle() -> None:
    images = torch.randn(2, 3, 16, 32)
    torch.testing.assert_close(Patching("unshuffle")(images), F.pixel_unshuffle(images, 4))


def test_haar_separates_flat_patches_from_details() -> None:
    images = torch.randn(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    patches = Patching("haar")(images)
    torch.testing.assert_close(patches[:, 0], 4 * images[:, 0, ::4, ::4])
    torch.testing.assert_close(patches[:, 1:], torch.zeros(1, 15, 2, 2), atol=1e-6, rtol=0)


def test_pixels_keep_float32_under_autocast() -> None:
    patching = Patching("haar")
    images = torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt = patching.inverse(patching(images))
    torch.testing.assert_close(rebuilt, images)


def test_tokens_decode_to_the_reconstruction() -> None:
    autoencoder = randomised(tiny())
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        reconstruction = autoencoder(images)
        codes = autoencoder.quantiser.indices_to_codes(reconstruction.tokens)
        assert reconstruction.tokens.shape == (2, 2, 4)
        assert reconstruction.images.shape == images.shape
        torch.testing.assert_close(autoencoder.decode(codes), reconstruction.images)


def test_a_picture_does_not_see_the_rest_of_its_batch() -> None:
    autoencoder = randomised(tiny()).train()
    images = torch.rand(3, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        together, alone = autoencoder(images).images[:1], autoencoder(images[:1]).images
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_attention_sees_the_whole_picture_and_keeps_positions() -> None:
    config = tiny(height=64, width=128, blocks=(0, 0, 0), attention_blocks=1)
    blocks = randomised(config).decoder.modules()
    attention = next(block for block in blocks if isinstance(block, AttentionBlock))
    features = torch.randn(1, 32, 4, 8, requires_grad=True)
    out = attention(features)
    (gradient,) = torch.autograd.grad(out[0, :, 0, 0].square().sum(), features)
    assert (gradient[0].abs().sum(0) > 0).all()
    turned = attention(features.flip(2, 3)).flip(2, 3)
    torch.testing.assert_close(turned, out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads_together", [0, 1, 4, 8])
def test_attention_in_bf16_agrees_with_float32(
    heads_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SCORES", heads_together * 32**2)
    torch.manual_seed(0)
    # Scores are as large as 10, so that some weights are nearly 1 and most are nearly 0.
    qkv = torch.randn(3, 3, 2, 32, 16) * torch.tensor([3.0, 1.0, 1.0]).view(3, 1, 1, 1, 1)
    grad = torch.randn(3, 2, 32, 16)

    def results(
        attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        leaf = qkv.bfloat16().to(dtype).requires_grad_()
        out = attend(*leaf)
        out.backward(grad.to(dtype))  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    truths = results(F.scaled_dot_product_attention, torch.float32)
    for result, truth in zip(results(module._attention, torch.bfloat16), truths, strict=True):
        assert (result - truth).norm() / truth.norm() < 0.01


def test_inference_mode_gives_the_same_pictures() -> None:
    autoencoder = randomised(tiny())
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    learning = autoencoder(images)
    with torch.inference_mode():
        frozen = autoencoder(images)
    torch.testing.assert_close(frozen.images, learning.images, atol=0, rtol=0)


@pytest.mark.parametrize("block", [ResidualBlock(16), AttentionBlock(16, head_size=16)])
def test_a_block_does_not_change_its_input(block: torch.nn.Module) -> None:
    features = torch.randn(1, 16, 4, 4)
    block_input = features.clone()
    with torch.inference_mode():
        block(block_input)
    torch.testing.assert_close(block_input, features, atol=0, rtol=0)


def test_every_parameter_learns() -> None:
    autoencoder = randomised(tiny())
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    (autoencoder(images).images - images).square().mean().backward()
    still = [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_the_last_layer_is_the_one_before_the_pixels() -> None:
    autoencoder = randomised(tiny())
    with torch.no_grad():
        autoencoder.last_layer.zero_()
        images = autoencoder(torch.rand(1, 3, 32, 64)).images
    torch.testing.assert_close(images[..., :4, :4], images[..., 4:8, 4:8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height: must be a multiple of 16, found 100"),
        ({"width": 0}, "width: must .*, found 0"),
        ({"levels": (8, 1)}, "levels"),
        ({"levels": (64, 64, 64)}, "65536"),
        ({"widths": (16, 20, 32)}, "widths"),
        ({"blocks": (1, -1, 1)}, "blocks"),
        ({"attention_blocks": -1}, "attention_blocks"),
        ({"blocks": (1, 1, 10**9)}, "blocks.*1024"),
        ({"head_size": 24}, "head_size: must be a divisor.*, found 24"),
    ],
)
def test_a_bad_config_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
