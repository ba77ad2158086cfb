"""Waveform to log-mel spectrogram, the model's input (Sec. 2.2, "Frontend").

A microphone's 16,000 numbers a second are too many and too fine to learn from. `LogMel` cuts them
into overlapping windows of 64 ms, one every 20 ms, measures the power at each frequency, sums it
into 64 bands that are spaced as the ear hears, and takes the logarithm: 500 frames of 64 numbers
for ten seconds. `resample` brings a recording of any other rate to 16 kHz first.
"""
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

SAMPLE_RATE = 16_000  # Hz. The paper names none; WINDOW and HOP are for this rate
WINDOW = 1024         # samples: 64 ms
HOP = 320             # samples: 20 ms
MELS = 64
LOG_MELS = dict(sample_rate=SAMPLE_RATE, window=WINDOW, hop=HOP, mels=MELS)        # what a checkpoint is tied to
FLOOR = 1e-10         # power below which all is silence; keeps the logarithm finite
SILENT_LEVEL = 1e-4   # root mean square (-80 dB of full scale) below which a waveform is not amplified further


def mel_to_hz(mel):
    """Frequency in Hz of a (tensor) position on Slaney's mel scale (Auditory Toolbox, 1998).

    Linear up to 1 kHz (15 mel), then 27 mel for each factor of 6.4.
    """
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def mel_filters():
    """Weights (WINDOW / 2 + 1, MELS) that sum the bins of a power spectrum into mel bands.

    Triangles, their centres evenly spaced in mel between 0 Hz and half the sample rate, each reaching
    from its left neighbour's centre to its right neighbour's. Slaney's normalisation divides by the
    width in Hz, so that white noise has the same level in all bands.
    """
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    edges = mel_to_hz(torch.linspace(0, top, MELS + 2, dtype=torch.float64))
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = torch.arange(WINDOW // 2 + 1, dtype=torch.float64)[:, None] * SAMPLE_RATE / WINDOW
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


def frame_count(samples):
    """Number of frames T of a waveform of `samples` samples (an int or an integer tensor).

    One frame for each whole hop, at least one: 160,000 samples (10 s) give 500.
    """
    frames = samples // HOP
    return frames.clamp(min=1) if torch.is_tensor(frames) else max(frames, 1)


def padding_mask(lengths, log_mel):
    """Padding mask (B, T), True at padding, of log-mels (B, T, 64) of waveforms of `lengths` (B,) samples.

    None where there is no padding.
    """
    frames = frame_count(lengths)
    if frames.min() >= log_mel.shape[1]:
        return None
    frames = frames[:, None].to(log_mel.device, non_blocking=True)
    return torch.arange(log_mel.shape[1], device=log_mel.device) >= frames


class LogMel(nn.Module):
    """Normalised log-mel spectrogram.

    waveform (B, S), float in [-1, 1] or int16; lengths (B,), its samples before padding by zeros, at least 1 (None:
    all)  ->  log-mels (B, T, 64), float32, T = max(S // 320, 1).

    Each waveform is first shifted to a mean of 0 and scaled to a root mean square of 1 (as in fairseq's wav2vec 2.0
    "large"): the offset of a sound card and how loud a recording is say little about what is in it, yet loudness would
    make up most of the variance between clips. Frame t is centred on sample 320 t; beyond the ends the waveform counts
    as zeros, so that a clip's frames are the same alone and zero-padded in a batch. Each band is shifted and scaled by
    the mean and standard deviation of the pre-training corpus, see `fit_normalization`. They are buffers: they travel
    in every checkpoint, so that no later use can normalise differently.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)
        self.register_buffer("mean", torch.zeros(MELS))
        self.register_buffer("std", torch.ones(MELS))

    def forward(self, waveform, lengths=None):
        waveform = waveform.float() / 32768 if waveform.dtype == torch.int16 else waveform.float()
        S = waveform.shape[1]
        lengths = torch.full((len(waveform),), S) if lengths is None else lengths
        samples = lengths[:, None].to(waveform.device, non_blocking=True)                           # (B, 1)
        real = torch.arange(S, device=waveform.device) < samples
        waveform = waveform * real
        waveform = (waveform - waveform.sum(1, keepdim=True) / samples) * real                      # padding stays 0
        level = (waveform.square().sum(1, keepdim=True) / samples).sqrt()
        waveform = waveform / level.clamp(min=SILENT_LEVEL)
        frames = F.pad(waveform, (WINDOW // 2, WINDOW // 2)).unfold(1, WINDOW, HOP)
        frames = frames[:, :frame_count(S)]                         # (B, T, WINDOW)
        spectrum = torch.fft.rfft(frames * self.window)             # (B, T, WINDOW / 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        log_mel = (power @ self.filters).clamp(min=FLOOR).log()     # (B, T, 64)
        return (log_mel - self.mean) / self.std

    @torch.no_grad()
    def fit_normalization(self, batches):
        """Set mean and standard deviation, per band, from an iterable of (waveform, lengths).

        waveform (B, S) as in `forward`; lengths (B,) in samples: what lies behind is padding.
        """
        self.mean.zero_()
        self.std.fill_(1)
        count = total = squares = 0
        for waveform, lengths in batches:
            log_mel = self(waveform, lengths)
            padding = padding_mask(lengths, log_mel)
            frames = (log_mel.flatten(0, 1) if padding is None else log_mel[~padding]).cpu().double()
            count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
        mean = total / count
        self.mean.copy_(mean)
        # The floor keeps a band that is constant (all silence) from being blown up.
        self.std.copy_((squares / count - mean.square()).clamp(min=1e-4).sqrt())


def resample(waveform, from_rate, to_rate):
    """Change the sample rate by band-limited interpolation; nothing is shifted in time.

    waveform (..., S) float at `from_rate` Hz -> (..., ceil(S * to_rate / from_rate)) at `to_rate`. An output sample is
    the input convolved with a low-pass filter that is centred on the sample's own time, see `low_pass`. The
    offsets of outputs from inputs repeat with a cycle of to_rate / gcd outputs, so that few filters serve a whole
    recording (polyphase): a matrix product of windows of input and filters. Rates are whole numbers.
    """
    if from_rate == to_rate or waveform.shape[-1] == 0:
        return waveform
    divisor = math.gcd(from_rate, to_rate)
    step, phases = from_rate // divisor, to_rate // divisor

    # A cycle takes `step` input samples to `phases` outputs. Short cycles are repeated to at least 64
    # outputs, long ones cut into pieces of 128, so that each matrix product is large enough to be fast.
    joined = math.ceil(64 / phases)
    step, phases = step * joined, phases * joined
    count = math.ceil(waveform.shape[-1] * phases / step)
    cycles = math.ceil(count / phases)
    reach = math.ceil(ZERO_CROSSINGS * max(1, step / phases))           # of a filter, in input samples
    padded = F.pad(waveform, (reach, reach + cycles * step + 1))
    output = waveform.new_empty(*waveform.shape[:-1], cycles, phases)
    for start in range(0, phases, 128):
        first, filters = low_pass(step, phases, start, reach)
        windows = padded[..., first:].unfold(-1, len(filters), step)[..., :cycles, :]
        output[..., start:start + 128] = windows @ filters.to(waveform)
    return output.flatten(-2)[..., :count]


ZERO_CROSSINGS = 64     # of a filter, on either side
ATTENUATION = 80.0      # dB, of what would alias


@functools.lru_cache(64)        # recordings of one rate share their filters
def low_pass(step, phases, start, reach):
    """The filters for outputs `start` to `start + 128` of a cycle that takes `step` inputs to `phases` outputs: a sinc
    of 64 zero crossings on either side under a Kaiser window (Kaiser 1974), which damps what would alias by 80 dB; its
    transition is 8% of the lower rate's Nyquist frequency. Returns where in `padded` they begin, and (taps, 128)."""
    lower = min(1.0, phases / step)                                     # the lower of the rates, over from_rate
    transition = (ATTENUATION - 8) / (2.285 * math.pi * 2 * ZERO_CROSSINGS)
    cutoff = lower * (1 - transition / 2)
    beta = torch.tensor(0.1102 * (ATTENUATION - 8.7), dtype=torch.float64)
    n = torch.arange(start, min(start + 128, phases))
    first, last = int(n[0]) * step // phases, int(n[-1]) * step // phases
    taps = torch.arange(first - reach, last + reach + 2)
    time = taps[:, None] - n.double() * step / phases                   # (taps, n), in input samples
    window = torch.i0(beta * (1 - (time / (reach + 1)).square()).clamp(min=0).sqrt())
    filters = cutoff * torch.sinc(cutoff * time) * window / torch.i0(beta)
    filters[time.abs() >= reach + 1] = 0
    return first, filters
