"""Measures how close reconstructions are (PSNR, SSIM) and how much of the codebook they use.

Axes: B frames, H W pixels, K codes in the codebook.
"""

import torch
from einops import rearrange
from torch import Tensor

_SIGMA = 1.5
_RADIUS = 5  # half the window size: 3.5 sigma, rounded, as in scikit-image


def psnr(frames: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB [B] of each pair of uint8 frames [B, H, W, 3]."""
    difference = frames.float() - others.float()
    mse = difference.square().flatten(1).mean(1)
    # The PSNR of equal frames would be infinite. Instead, return the PSNR of frames that
    # differ by 1 in a single value.
    return 10 * torch.log10(255**2 / mse.clamp(min=1 / difference[0].numel()))


def ssim(frames: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity [B] of each pair of uint8 frames [B, H, W, 3].

    Frames must have at least 11 x 11 pixels. As in Wang et al. 2004
    (https://doi.org/10.1109/TIP.2003.819861), windows are Gaussian with sigma 1.5, and variances
    have no n / (n - 1) correction. The result is the mean over the channels and over all positions
    of the window inside the frame.
    """
    # Subtract mid-grey. Otherwise float32 loses precision in the differences of squares below.
    x, y = (rearrange(f, "b h w c -> (b c) h w").float() - 127.5 for f in (frames, others))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    per_channel = (luminance * structure).flatten(1).mean(1)
    return rearrange(per_channel, "(b c) -> b c", b=frames.shape[0]).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Filter pictures [N, H, W] with the Gaussian window, without padding."""
    # On a CPU, products with banded matrices are four times as fast as one-channel convolutions.
    down, across = (_windows(length, x) for length in x.shape[-2:])
    return down @ x @ across.T


def _windows(length: int, like: Tensor) -> Tensor:
    """Return the banded matrix that filters `length` pixels with a Gaussian window.

    Each row is the window at one position. `like` gives the number format and the device.
    """
    offsets = torch.arange(length, dtype=like.dtype, device=like.device)
    centres = offsets[_RADIUS : length - _RADIUS, None]
    window = torch.exp(-0.5 * ((offsets - centres) / _SIGMA) ** 2)
    window = window * ((offsets - centres).abs() <= _RADIUS)
    return window / window.sum(dim=1, keepdim=True)


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Return measures of codebook use. `counts` [K] says how often each code occurred.

    At least one code must have occurred. `used` is the share of codes that occurred.
    `entropy_bits` is the entropy of the code frequencies in bits per token. `perplexity` is the
    number of equally frequent codes that would have the same entropy.
    """
    frequencies = counts.double() / counts.sum()
    entropy = -torch.xlogy(frequencies, frequencies).sum()
    return {
        "used": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp()),
        "entropy_bits": float(entropy / torch.log(torch.tensor(2.0, dtype=torch.float64))),
    }
