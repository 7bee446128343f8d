"""How near a reconstruction is (PSNR, SSIM) and how much of the codebook it uses.

Axes: B frames, H W pixels, K codes in the codebook.
"""

import torch
from einops import rearrange
from torch import Tensor

_SIGMA = 1.5
_RADIUS = 5  # scikit-image's: 3.5 sigma, rounded


def psnr(frames: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB [B] of uint8 frames [B, H, W, 3]."""
    difference = frames.float() - others.float()
    mse = difference.square().flatten(1).mean(1)
    # One grey level in the whole frame is the least that two different frames can differ by.
    return 10 * torch.log10(255**2 / mse.clamp(min=1 / difference[0].numel()))


def ssim(frames: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity [B] of uint8 frames [B, H, W, 3], at least 11 x 11 pixels.

    Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861): Gaussian windows of sigma 1.5 and
    population covariances, averaged over channels and over the positions whose window lies inside
    the frame.
    """
    # Around mid-grey, where float32 loses nothing in the differences of squares.
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
    """Filter [N, H, W] with the Gaussian window, where it lies inside; axis by axis."""
    # As products with banded matrices: four times as fast on a CPU as convolutions of one channel.
    down, across = (_windows(length, x) for length in x.shape[-2:])
    return down @ x @ across.T


def _windows(length: int, like: Tensor) -> Tensor:
    """Return the window at each place where it lies inside so many pixels, [places, length]."""
    offsets = torch.arange(length, dtype=like.dtype, device=like.device)
    centres = offsets[_RADIUS : length - _RADIUS, None]
    window = torch.exp(-0.5 * ((offsets - centres) / _SIGMA) ** 2)
    window = window * ((offsets - centres).abs() <= _RADIUS)
    return window / window.sum(dim=1, keepdim=True)


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Measure the codebook's use from how often each code occurred [K], at least one once.

    `used` is the share of the codes that occur, `entropy_bits` the entropy of the codes'
    frequencies in bits per token, `perplexity` its exponential: how many equally frequent codes
    would carry as much.
    """
    frequencies = counts.double() / counts.sum()
    entropy = -torch.xlogy(frequencies, frequencies).sum()
    return {
        "used": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp()),
        "entropy_bits": float(entropy / torch.log(torch.tensor(2.0, dtype=torch.float64))),
    }
