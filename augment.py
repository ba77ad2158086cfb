"""The three augmentations of fine-tuning, in the order they are applied (Sec. 4.1).

Each takes its random numbers as an argument, uniform in [0, 1), and does nothing random itself: the
same numbers give the same result on any device, and a whole batch is done at once.
"""
import math

import torch
from torch.nn import functional as F


def jitter(waveform, rand, limit=200):
    """Temporal jittering: shift each waveform by -limit to limit samples, zeros moving in.

    waveform (B, S), rand (B,) -> (B, S). The paper calls 200 samples half the frame length, which is
    neither half a window (512) nor half a hop (160) of Sec. 2.2; its number is kept.
    """
    shift = (rand * (2 * limit + 1)).long() - limit                                # (B,)
    shifted = F.pad(waveform, (limit, limit)).unfold(1, waveform.shape[1], 1)       # (B, 2 limit + 1, S), a view
    return shifted[torch.arange(len(waveform), device=waveform.device), limit - shift]


def time_mask(log_mel, rand, padding_mask=None, share=0.2):
    """SpecAugment, along time only: set one interval of up to `share` of each clip to 0, the mean.

    Up to 2 s of 10 s (the paper's) is a share of 0.2. log_mel (B, T, 64), rand (B, 2) for width
    and start, padding_mask (B, T) or None -> (B, T, 64).
    """
    B, T, _ = log_mel.shape
    frames = log_mel.new_full((B,), T) if padding_mask is None else (~padding_mask).sum(1)
    width = rand[:, 0] * share * frames
    start = rand[:, 1] * (frames - width)
    t = torch.arange(T, device=log_mel.device) + 0.5
    hidden = (t >= start[:, None]) & (t < (start + width)[:, None])              # (B, T)
    return log_mel.masked_fill(hidden[:, :, None], 0)


def mixup(log_mel, partner, rand, partner_frames):
    """Eq. 2: mix each clip x with another one x', the label staying that of x.

    log_mel x and partner x' (B, T, 64); rand (B,) gives alpha by the inverse of the distribution
    function of B(0.5, 0.5), sin^2(pi rand / 2), and alpha >= 1 - alpha; partner_frames (B,): behind these
    x' is padding, and x stays as it is. Returns (B, T, 64).
    """
    alpha = torch.sin(math.pi / 2 * rand).square()
    alpha = torch.maximum(alpha, 1 - alpha)[:, None, None]
    sounding = torch.arange(log_mel.shape[1], device=log_mel.device) < partner_frames[:, None]      # (B, T)
    return torch.where(sounding[:, :, None], alpha * log_mel + (1 - alpha) * partner, log_mel)
