import math
from typing import Any

import pytest
import torch
from skimage import metrics as skimage_metrics

from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim

reference: Any = skimage_metrics


def frames(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 24, 40, 3), dtype=torch.uint8, generator=generator)


def noisy(clean: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(-9, 10, clean.shape, generator=torch.Generator().manual_seed(1))
    return (clean.int() + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_agrees_with_scikit_image() -> None:
    a, b = frames(0), noisy(frames(0))
    expected = [
        reference.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255)
        for x, y in zip(a, b, strict=True)
    ]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr_of_equal_frames_is_finite_and_the_highest() -> None:
    a, nearly = frames(0), frames(0)
    nearly[:, 0, 0, 0] ^= 1
    assert psnr(a, a).isfinite().all()
    assert (psnr(a, a) >= psnr(a, nearly)).all()


@pytest.mark.parametrize("rough", [True, False])
def test_ssim_agrees_with_scikit_image(rough: bool) -> None:
    a, b = frames(0), noisy(frames(0)) if rough else frames(1)
    expected = [
        reference.structural_similarity(
            x.numpy(),
            y.numpy(),
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3)


def test_codebook_use_of_even_and_single_codes() -> None:
    even = codebook_use(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert even["used"] == 0.5
    assert even["perplexity"] == pytest.approx(4)
    assert even["entropy_bits"] == pytest.approx(2)
    assert codebook_use(torch.tensor([0, 9]))["perplexity"] == 1


def test_entropy_of_uneven_codes() -> None:
    use = codebook_use(torch.tensor([3, 1]))
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert use["entropy_bits"] == pytest.approx(bits)
    assert use["perplexity"] == pytest.approx(2**bits)
