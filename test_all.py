"""Tests in three parts: the paper once more, concept by concept in its order; the data; the scripts.

Every formula is compared with numpy or plain Python that says what it means. The scripts run at a tiny size in
temporary folders: as a user runs them where processes, signals and kills matter, else within the tests' process.
"""
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import augment
import datasets
import finetune
import metrics
import pretrain
import wav2vec2
from conformer import BatchNorm, ConformerBlock, DepthwiseConvolution, Dropout, SelfAttention
from datasets import InputError
from frontend import LOG_MELS, LogMel, padding_mask, resample
from metrics import accuracy, areas_under_roc, average_precisions, mean_over_classes
from pretrain import load_checkpoint
from wav2vec2 import Wav2Vec2

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")         # all runs here are on the CPU, one thread each
HERE = Path(__file__).parent
FORK = multiprocessing.get_context("fork")
SMALL = dict(dim=16, blocks=2, heads=2, ffn_dim=32, latent_dim=24)          # a model for tests
SMALL_OPTIONS = [x for name, value in SMALL.items() for x in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(autouse=True)
def same_start():
    """Each test has the same random numbers and one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def run(script, *options):
    """Run a script as its user does."""
    result = subprocess.run([sys.executable, HERE / script, *map(str, options)], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def fork(target, processes):
    """Call target(rank) in processes forked from this one. Returns how each ended: None for one that did not within a
    minute."""
    started = [FORK.Process(target=target, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    ended = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return ended


def run_forked(script, *options, processes=1):
    """Run a script in processes that join as torchrun's do, but are forked from this one: they need not import torch
    again, and where parts of the modules have been replaced, they are there too. Returns how each ended, see `fork`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          LOCAL_WORLD_SIZE=str(processes), MASTER_PORT=str(port))
        sys.argv = [script, *map(str, options)]
        datasets.run_script(sys.modules[script.removesuffix(".py")].main)

    return fork(start, processes)


@pytest.fixture
def call(monkeypatch, capsys):
    """Like `run`, but within this process, where parts of the modules may have been replaced."""
    def call(script, *options, code=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        ended = 0
        try:
            datasets.run_script(sys.modules[script.removesuffix(".py")].main)
        except SystemExit as end:
            ended = end.code
        printed = capsys.readouterr()
        assert ended == code, printed.out + printed.err
        return printed.out if code == 0 else printed.err
    return call


def spy(monkeypatch, owner, name):
    """Record the calls of a function: a list of (inputs, output)."""
    original, calls = getattr(owner, name), []

    def recorded(*inputs, **named):
        calls.append(((*inputs, *named.values()), original(*inputs, **named)))
        return calls[-1][1]
    monkeypatch.setattr(owner, name, recorded)
    return calls


def write_wav(path, seconds=1.0, rate=16_000, channels=1, frequency=440.0):
    """A tone with a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * frequency * t) + 0.01 * np.random.default_rng(0).normal(size=len(t))
    soundfile.write(path, np.stack([wave] * channels, 1), rate)


# ========================================================================= 1. the paper, in its order
# ------------------------------------------------------------------------- Sec. 2.2 Frontend


def hz_to_mel(f):
    return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)


def test_log_mel_is_the_definition():
    """One frame at a time: shift to mean 0, scale to RMS 1, window, Fourier sum, triangles, logarithm."""
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.5, 1.5, 3200)
    scaled = (wave - np.mean(wave)) / np.std(wave)
    padded = np.concatenate([np.zeros(512), scaled, np.zeros(512)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024)
    frequencies = [k * 16000 / 1024 for k in range(513)]
    edges = np.interp(np.linspace(0, hz_to_mel(8000), 66), [hz_to_mel(f) for f in np.linspace(0, 8000, 400_001)],
                      np.linspace(0, 8000, 400_001))
    expected = np.empty((10, 64))
    for t in range(10):
        power = abs(fourier @ (padded[320 * t:320 * t + 1024] * hann)) ** 2
        for m in range(64):
            low, mid, high = edges[m:m + 3]
            weights = [max(0, min((f - low) / (mid - low), (high - f) / (high - mid))) for f in frequencies]
            expected[t, m] = math.log(max(1e-10, power @ weights * 2 / (high - low)))
    got = LogMel()(torch.tensor(wave, dtype=torch.float32)[None])
    assert got.shape == (1, 10, 64)
    np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-3)


def test_log_mel_of_ten_seconds_and_of_short_waveforms():
    assert LogMel()(torch.zeros(2, 160_000)).shape == (2, 500, 64)
    assert LogMel()(torch.zeros(1, 1)).shape == (1, 1, 64)
    torch.testing.assert_close(LogMel()(torch.zeros(1, 320)), torch.full((1, 1, 64), math.log(1e-10)))


def test_log_mel_reads_int16_like_floats():
    wave = torch.randint(-32768, 32768, (2, 4000), dtype=torch.int16)
    assert torch.equal(LogMel()(wave), LogMel()(wave.float() / 32768))
    assert torch.equal(LogMel()(wave), LogMel()(wave.double() / 32768))     # what soundfile reads


def test_log_mel_does_not_depend_on_the_level():
    wave = torch.randn(1, 8000)
    torch.testing.assert_close(LogMel()(2e-4 * wave), LogMel()(wave), atol=1e-4, rtol=1e-4)
    quiet = 1e-6 * wave                                         # below -80 dB nothing is amplified further
    assert LogMel()(quiet).mean() < LogMel()(wave).mean() - 5


def test_log_mel_of_a_clip_is_the_same_padded():
    wave = torch.randn(1, 5000)
    alone = LogMel()(wave)
    padded = LogMel()(torch.nn.functional.pad(wave, (0, 3000)), torch.tensor([5000]))
    torch.testing.assert_close(padded[:, :alone.shape[1]], alone)


def test_padding_mask_marks_the_frames_behind_each_clip():
    mask = padding_mask(torch.tensor([3200, 1000, 5]), torch.zeros(3, 10, 64))
    assert mask.sum(1).tolist() == [0, 7, 9] and not mask[:, 0].any()
    assert padding_mask(torch.tensor([3200, 3300]), torch.zeros(2, 10, 64)) is None


def test_normalization_is_of_each_band_and_without_padding():
    front, wave = LogMel(), torch.randn(4, 16_000) * torch.tensor([[0.1], [1], [2], [3]])
    lengths = torch.tensor([16_000, 16_000, 8_000, 320])
    wave[torch.arange(16_000) >= lengths[:, None]] = 0
    raw = front(wave, lengths)
    kept = torch.cat([raw[i, :n // 320] for i, n in enumerate(lengths)])
    front.fit_normalization([(wave[:2], lengths[:2]), (wave[2:], lengths[2:])])
    torch.testing.assert_close(front.mean, kept.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(front.std, kept.std(0, correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(front(wave, lengths), (raw - front.mean) / front.std)


def test_normalization_of_silence_divides_by_no_zero():
    front = LogMel()
    front.fit_normalization([(torch.zeros(2, 16_000), torch.tensor([16_000, 16_000]))])
    assert front(torch.zeros(1, 16_000)).abs().max() < 1e-3


@pytest.mark.parametrize("source, target", [
    (44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (11_025, 16_000), (16_001, 16_000), (16_000, 44_100)])
def test_resample_is_the_definition(source, target):
    """Each output is the sum of all inputs, weighted by a windowed sinc that is centred on its own time."""
    wave, lower = torch.randn(700, dtype=torch.float64), min(1, target / source)
    outputs = -(-700 * target // source)
    time = np.arange(outputs)[:, None] * source / target - np.arange(700)           # (output, input), in input samples
    cutoff, end = lower * (1 - 72 / (2.285 * np.pi * 128) / 2), math.ceil(64 / lower) + 1
    beta = 0.1102 * (80 - 8.7)                          # Kaiser's formulas, for 80 dB
    window = np.i0(beta * np.sqrt((1 - (time / end) ** 2).clip(0))) / np.i0(beta) * (np.abs(time) < end)
    expected = cutoff * np.sinc(cutoff * time) * window @ wave.numpy()
    np.testing.assert_allclose(resample(wave, source, target), expected, atol=1e-12)


@pytest.mark.parametrize("source", [44_100, 48_000, 22_050])
def test_resample_lets_nothing_alias(source):
    for f in (8_010, 9_000, 0.49 * source):
        wave = torch.sin(2 * math.pi * f * torch.arange(source, dtype=torch.float64) / source)
        out = resample(wave, source, 16_000)[4_000:12_000]
        assert 20 * math.log10(out.square().mean().sqrt() / math.sqrt(0.5)) < -80


def test_resample_of_a_batch_and_of_odd_rates():
    wave = torch.randn(2, 3, 500)
    assert torch.equal(resample(wave, 16_000, 16_000), wave)
    torch.testing.assert_close(resample(wave, 3, 2)[1, 2], resample(wave[1, 2], 3, 2))
    assert resample(wave, 3, 2).shape == (2, 3, 334)            # 333.3, rounded up


# ------------------------------------------------------------------------- Sec. 2.2 Encoder, Fig. 1b


def test_block_is_the_definition():
    """The five steps of Fig. 1b for one clip, in numpy."""
    D, L, H, K = 8, 6, 2, 3
    block = ConformerBlock(D, H, 16, K, 0.1).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    w = {name: value.detach().double().numpy() for name, value in block.named_parameters()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def feed_forward(x, name):
        hidden = linear(layer_norm(x, f"{name}.norm"), f"{name}.up")
        return linear(hidden * sigmoid(hidden), f"{name}.down")

    def convolution(x):
        x = linear(layer_norm(x, "convolution.norm"), "convolution.pointwise1")
        x = x[:, :D] * sigmoid(x[:, D:])
        weight, out = w["convolution.depthwise.weight"], np.zeros((L, D))
        for t in range(L):
            for k in range(K):
                if 0 <= t + k - K // 2 < L:
                    out[t] += x[t + k - K // 2] * weight[:, 0, k]
        x = out + w["convolution.depthwise.bias"]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x * w["convolution.depthwise_norm.weight"] + w["convolution.depthwise_norm.bias"]
        return linear(x * sigmoid(x), "convolution.pointwise2")

    def attention(x):
        q, k, v = np.split(linear(layer_norm(x, "attention.norm"), "attention.query_key_value"), 3, 1)
        heads = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(D / H))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        return linear(np.concatenate(heads, 1), "attention.output")

    x = np.random.default_rng(0).normal(size=(L, D))
    y = x + 0.5 * feed_forward(x, "feed_forward1")
    y = y + convolution(y)
    y = y + attention(y)
    y = y + 0.5 * feed_forward(y, "feed_forward2")
    got = block(torch.tensor(x, dtype=torch.float32)[None])[0].detach().numpy()
    np.testing.assert_allclose(got, layer_norm(y, "norm"), atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_clip_is_the_same_alone_and_padded(norm):
    block = ConformerBlock(16, 4, 32, 7, 0.1, norm).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 20, 16)
    lengths = [20, 11, 3]
    padding = torch.arange(20) >= torch.tensor(lengths)[:, None]
    padded = block(x, padding)
    for i, n in enumerate(lengths):
        assert (padded[i, :n] - block(x[i:i + 1, :n])[0]).abs().max() < 1e-5


def test_batch_norm_learns_from_no_padding():
    norm, x = BatchNorm(4), torch.randn(2, 6, 4)
    padding = torch.arange(6) >= torch.tensor([6, 3])[:, None]
    norm(x, padding)
    torch.testing.assert_close(norm.running_mean, 0.1 * x[~padding].mean(0))


@pytest.mark.parametrize("way", ["cpu", "cuda", "compiled"])
def test_each_way_to_convolve_is_the_definition(way, monkeypatch):
    """To rounding, and so are the gradients."""
    layer, x = DepthwiseConvolution(6, 7).double(), torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    expected = layer.bias.repeat(2, 20, 1)
    for t in range(20):
        for k in range(7):
            if 0 <= t + k - 3 < 20:
                expected[:, t] += x[:, t + k - 3] * layer.weight[:, 0, k]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way == "compiled")
    found = torch.nn.Conv1d.forward(layer, x.mT).mT if way == "cuda" else layer(x)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    weights, inputs = torch.randn_like(found), [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("padding", [None, torch.arange(9) >= torch.tensor([9, 4])[:, None]])
def test_a_compiled_block_is_one_graph(padding):
    """In training, with dropout: each break would cost a pass over memory."""
    block, graphs = ConformerBlock(16, 4, 32, 7, 0.1), []
    block.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert block(torch.randn(2, 9, 16), padding).shape == (2, 9, 16) and len(graphs) == 1


@pytest.mark.parametrize("padding", [None, torch.arange(9) >= torch.tensor([9, 4])[:, None]])
def test_attention_in_training_is_that_of_evaluation_with_weights_dropped(padding):
    """On a CPU, training has code of its own."""
    attention, x, dropped = SelfAttention(16, 4, 1e-9), torch.randn(2, 9, 16), []
    valid = slice(None) if padding is None else ~padding
    torch.testing.assert_close(attention.train()(x, padding)[valid], attention.eval()(x, padding)[valid])
    attention.dropout = Dropout(0.5)
    attention.dropout.register_forward_hook(lambda module, inputs, output: dropped.append((inputs[0], output)))
    attention.train()(x, padding)
    weights, kept = dropped[0]
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 4, 9))
    assert (weights[1, :, :, 4:] == 0).all() == (padding is not None) and 0.3 < (kept[0] == 0).float().mean() < 0.7


def test_dropout_drops_its_share_in_training_only():
    x = torch.ones(1000, 300, requires_grad=True)
    y = Dropout(0.1)(x)
    assert abs((y == 0).float().mean().item() - 0.1) < 0.003
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.9))
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0) and torch.equal(Dropout(0.1).eval()(x), x)
    rows = (y == 0).float()                                     # no pattern from one row to the next
    assert abs(torch.corrcoef(torch.stack([rows[:-1].flatten(), rows[1:].flatten()]))[0, 1]) < 0.01
    torch.manual_seed(0)
    Dropout(0.1)(torch.ones(7))
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.empty(2, dtype=torch.int64).random_(-2**63, None)
    assert torch.rand(1) == after                               # a random number of 64 bits serves four values


def test_block_drops_in_training_and_not_in_evaluation():
    """Within and at the end of feed-forward networks, at the end of the convolution, in and after attention."""
    (block, x), dropped = (ConformerBlock(16, 4, 32, 7, 0.1), torch.randn(2, 9, 16)), []
    for module in block.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.1
            module.register_forward_hook(lambda module, inputs, output: dropped.append(output.shape[-1]))
    assert not torch.equal(block(x), block(x)) and dropped == [32, 16, 16, 9, 16, 32, 16] * 2
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("size, changes, count", [
    ("small", {}, 18_427_904 + 512), ("large", {}, 88_132_096 + 512),
    ("large", dict(blocks=8), 58_912_256 + 512), ("large", dict(blocks=20), 146_571_776 + 512)])
def test_parameter_counts_of_the_paper(size, changes, count):
    """18.4, 88.1, 58.9 and 146.6 million; 512 are those of the LayerNorm on the latents."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Wav2Vec2(size, **changes).parameters()) == count


def test_settings_are_the_papers_and_the_readmes():
    with torch.device("meta"):
        small, large = Wav2Vec2("small").settings, Wav2Vec2("large").settings
    for settings, dim, heads in ((small, 256, 8), (large, 768, 12)):
        assert settings == dict(
            dim=dim, blocks=12, heads=heads, ffn_dim=1024, first_kernel=31, kernel=15, dropout=0.1,
            norm="group", stack=4, latent_dim=256, mask_prob=0.3, mask_length=3, distractors=100, temperature=0.1)


def test_feature_encoder_stacks_four_frames_and_fills_the_last():
    encoder = wav2vec2.FeatureEncoder(4, 8)
    log_mel = torch.randn(1, 10, 64)
    z, _ = encoder(log_mel)
    stacked = torch.cat([log_mel[0, 8], log_mel[0, 9], torch.zeros(128)])
    torch.testing.assert_close(z[0, 2], encoder.norm(encoder.linear(stacked)))
    z_padded, padding = encoder(torch.cat([log_mel, torch.randn(1, 6, 64)], 1),
                                torch.arange(16)[None] >= 10)
    torch.testing.assert_close(z_padded[:, :3], z)
    assert padding.tolist() == [[False, False, False, True]]
    assert Wav2Vec2("tiny", **SMALL).rand_shape(2, 10) == (2, 3, 101)


# ------------------------------------------------------------------------- Sec. 2.2 Masking, Fig. 1c


def slow_span_mask(rand, mask_prob, mask_length, length):
    """Spans in the order of their random numbers until enough is masked, one step at a time."""
    number = min(max(round(mask_prob * length), mask_length + 1), length - 1) if length > mask_length + 1 else 0
    mask = [False] * len(rand)
    for start in sorted(range(length - mask_length + 1), key=lambda s: -rand[s]):
        for t in range(start, start + mask_length):
            if sum(mask) < number:
                mask[t] = True
    return mask


@pytest.mark.parametrize("mask_prob, mask_length", [(0.3, 3), (0.5, 1), (0.65, 10), (0.99, 3)])
def test_span_mask_is_the_definition(mask_prob, mask_length):
    lengths = [125, 60, 31, 5, 4, 2, 1]
    rand = torch.rand(7, 125)
    padding = torch.arange(125) >= torch.tensor(lengths)[:, None]
    mask = wav2vec2.span_mask(rand, mask_prob, mask_length, padding)
    for i, n in enumerate(lengths):
        assert mask[i].tolist() == slow_span_mask(rand[i].tolist(), mask_prob, mask_length, n)


def test_span_mask_masks_three_tenths_in_spans():
    mask = wav2vec2.span_mask(torch.rand(500, 125), 0.3, 3)
    assert (mask.sum(1) == 38).all()                            # 30% of 125, in every clip
    runs = [len(run) for row in mask for run in "".join("x" if m else " " for m in row).split()]
    assert sum(n >= 3 for n in runs) / len(runs) > 0.9          # one span a clip may be cut short


def test_some_of_a_clip_is_always_visible():
    """Clips of up to mask_length + 1 latents are left out of the loss, and counted."""
    model, log_mel = Wav2Vec2("tiny", **SMALL), torch.randn(3, 80, 64)
    lengths = torch.tensor([80, 20, 16])
    _, sums = model(log_mel, torch.arange(80) >= lengths[:, None])
    figures = wav2vec2.summarize(pretrain.fetch(sums))
    assert sums["counted"] == 6 + 4 and figures["too_short"] == 1       # 20 latents, 5 and 4
    loss, sums = model(log_mel[2:, :16])
    assert sums["counted"] == 0 and loss == 0


@pytest.mark.parametrize("mask_prob, mask_length", [(0.3, 3), (0.5, 1), (0.99, 3)])
def test_no_masked_step_is_lost(mask_prob, mask_length):
    for L in range(1, 130):
        mask = wav2vec2.span_mask(torch.rand(1, L), mask_prob, mask_length)
        steps, valid = wav2vec2.masked_steps(mask, mask_prob, mask_length)
        assert steps[valid].tolist() == mask[0].nonzero()[:, 0].tolist()


def test_distractors_are_other_masked_steps_of_the_clip():
    mask = torch.arange(40) < torch.tensor([30, 7, 2])[:, None]
    mask = mask[:, torch.randperm(40)]
    steps, valid = wav2vec2.masked_steps(mask, 0.75, 3)
    for row, step, ok in zip(mask, steps, valid, strict=True):
        assert step[ok].tolist() == row.nonzero()[:, 0].tolist()
    distractors = wav2vec2.sample_distractors(torch.rand(3, valid.shape[1], 2000), valid)
    for i, count in enumerate([30, 7, 2]):
        for m in range(count):
            drawn = distractors[i, m]
            assert m not in drawn and drawn.max() < count       # never itself, never padding
            frequency = torch.bincount(drawn, minlength=count) / 2000
            expected = torch.full((count,), 1 / (count - 1))
            expected[m] = 0
            assert (frequency - expected).abs().max() < 5 * math.sqrt(0.25 / 2000)


# ------------------------------------------------------------------------- Sec. 2.2 Contrastive loss, Eq. 1


def test_contrastive_loss_is_equation_1():
    B, M, C, K = 2, 5, 4, 7
    context, targets = torch.randn(B, M, C), torch.randn(B, M, C)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    distractors = wav2vec2.sample_distractors(torch.rand(B, M, K), valid)
    loss, at = wav2vec2.contrastive_loss(context, targets, distractors, valid, temperature=0.1)

    def sim(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    for b in range(B):
        for m in range(M):
            right = sim(context[b, m], targets[b, m]) / 0.1
            wrong = [sim(context[b, m], targets[b, j]) / 0.1 for j in distractors[b, m]]
            expected = -math.log(math.exp(right) / sum(map(math.exp, [right, *wrong])))
            assert loss[b, m].item() == pytest.approx(expected * bool(valid[b, m]), abs=1e-4)
            if valid[b, m]:
                assert at["correct"][b, m].item() == (right > max(wrong))
                assert at["chance"][b, m].item() == pytest.approx(
                    1 / (1 + len(set(distractors[b, m].tolist()))))


def test_equal_distractors_are_left_out_and_hopeless_steps_dropped():
    context, targets = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    targets[0, 1] = targets[0, 0]
    distractors = torch.tensor([[[1, 1], [0, 2], [0, 3], [0, 1]]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    loss, at = wav2vec2.contrastive_loss(context, targets, distractors, valid, 0.1)
    assert at["counted"].tolist() == [[False, True, True, True]]
    assert at["duplicates"].tolist() == [[1.0, 0.5, 0.0, 0.0]]
    only_2, _ = wav2vec2.contrastive_loss(context, targets, torch.tensor([[[1], [2], [0], [0]]]), valid, 0.1)
    assert loss[0, 0] == 0 and loss[0, 1].item() == pytest.approx(only_2[0, 1].item())
    valid = torch.tensor([[False, False, True, False]])
    _, alone = wav2vec2.contrastive_loss(context, targets, distractors, valid, 0.1)
    assert not alone["counted"].any()                            # one masked step has nothing to be told from


def test_collapsed_latents_give_no_reward():
    """Latents all but equal cost log(101), whatever the context; equal ones do not count at all."""
    context, valid = torch.randn(2, 10, 8), torch.ones(2, 10, dtype=torch.bool)
    distractors = wav2vec2.sample_distractors(torch.rand(2, 10, 100), valid)
    nearly = torch.ones(2, 10, 8) + 1e-4 * torch.randn(2, 10, 8)
    loss, _ = wav2vec2.contrastive_loss(context, nearly, distractors, valid, 0.1)
    torch.testing.assert_close(loss, torch.full((2, 10), math.log(101)), atol=2e-2, rtol=0)
    _, at = wav2vec2.contrastive_loss(context, torch.ones(2, 10, 8), distractors, valid, 0.1)
    assert not at["counted"].any() and (at["duplicates"] == 1).all()


def test_targets_are_the_unmasked_latents(monkeypatch):
    """And the loss reaches them: they are not detached."""
    model = Wav2Vec2("tiny", **SMALL).eval()
    log_mel, rand = torch.randn(1, 40, 64), torch.rand(1, 10, 101)
    seen = {}
    original = wav2vec2.contrastive_loss
    monkeypatch.setattr(wav2vec2, "contrastive_loss", lambda context, targets, *rest: (
        seen.update(targets=targets) or original(context, targets, *rest)))
    model(log_mel, rand=rand)
    mask = wav2vec2.span_mask(rand[:, :, 0], 0.3, 3)
    z, _ = model.features(log_mel)
    assert torch.equal(seen["targets"][0], z[mask]) and seen["targets"].requires_grad


def test_context_does_not_see_what_is_masked():
    model = Wav2Vec2("tiny", **SMALL).eval()
    log_mel, rand = torch.randn(1, 40, 64), torch.rand(1, 10, 101)
    mask = wav2vec2.span_mask(rand[:, :, 0], 0.3, 3)[0]
    changed = log_mel.clone()
    changed[0, mask.repeat_interleave(4)] = torch.randn(int(mask.sum()) * 4, 64)
    outputs = []
    inputs_seen = []
    model.input_proj.register_forward_hook(lambda module, inputs, output: inputs_seen.append(inputs[0]))
    model.output_proj.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    (first, _), (second, _) = model(log_mel, rand=rand), model(changed, rand=rand)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (inputs_seen[0][0, mask] == model.mask_embedding).all()
    assert first != second


def test_a_clip_gives_the_same_sums_padded():
    model = Wav2Vec2("tiny", **SMALL).eval()
    log_mel, rand = torch.randn(1, 80, 64), torch.rand(1, 30, 101)
    loss, sums = model(log_mel, rand=rand[:, :20])
    longer = torch.cat([log_mel, torch.randn(1, 40, 64)], 1)
    padded_loss, padded_sums = model(longer, torch.arange(120)[None] >= 80, rand)
    assert pretrain.fetch(padded_sums) == pytest.approx(pretrain.fetch(sums), abs=1e-4, rel=1e-4)
    torch.testing.assert_close(padded_loss, loss, atol=1e-5, rtol=1e-5)


def test_sums_of_parts_are_those_of_the_whole():
    model, log_mel, rand = Wav2Vec2("tiny", **SMALL).eval(), torch.randn(3, 80, 64), torch.rand(3, 20, 101)
    log_mel[2] = 0                                              # of which no step counts
    parts = [model(log_mel[part], None, rand[part]) for part in (slice(0, 1), slice(1, 3))]
    loss, sums = model(log_mel, None, rand)
    added = {name: sum(part[name].item() for _, part in parts) for name in sums}
    assert added == pytest.approx(pretrain.fetch(sums), abs=1e-4, rel=1e-4)
    assert loss.item() == pytest.approx(wav2vec2.summarize(pretrain.fetch(sums))["loss"])


def test_health_figures_are_the_definitions(monkeypatch):
    model, calls = Wav2Vec2("tiny", **SMALL).eval(), spy(monkeypatch, wav2vec2, "contrastive_loss")
    log_mel, rand = torch.randn(2, 80, 64), torch.rand(2, 20, 101)
    loss, sums = model(log_mel, rand=rand)
    (_, (_, at)), = calls
    figures = wav2vec2.summarize(pretrain.fetch(sums))
    mask = wav2vec2.span_mask(rand[:, :, 0], 0.3, 3)
    z, _ = model.features(log_mel)
    clips = [clip[m].detach().numpy() for clip, m in zip(z, mask, strict=True)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b)
               for clip in clips for i, a in enumerate(clip) for j, b in enumerate(clip) if i != j]
    assert figures["latent_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert figures["latent_std"] == pytest.approx(np.sqrt(np.mean([clip.var(0).mean() for clip in clips])), abs=1e-5)
    assert figures["masked"] == pytest.approx(6 / 20) and sums["counted"] == 12
    assert figures["dropped"] == figures["duplicates"] == figures["too_short"] == 0
    assert figures["loss"] == pytest.approx(loss.item())
    assert figures["accuracy"] == pytest.approx(at["correct"].sum().item() / 12)
    assert figures["chance"] == pytest.approx(at["chance"].sum().item() / 12) != figures["accuracy"]


def test_silence_is_reported_and_harmless():
    model = Wav2Vec2("tiny", **SMALL)
    loss, sums = model(torch.zeros(2, 40, 64))
    figures = wav2vec2.summarize(pretrain.fetch(sums))
    assert sums["counted"] == 0 and figures["dropped"] == 8
    assert figures["duplicates"] == 1 and figures["masked"] == 8 / 20
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    sounding, rand = torch.randn(1, 40, 64), torch.rand(2, 10, 101)
    both, _ = model.eval()(torch.cat([sounding, torch.zeros(1, 40, 64)]), None, rand)
    alone, _ = model(sounding, None, rand[:1])
    torch.testing.assert_close(both, alone)


def test_collapse_is_warned_of():
    healthy = dict(masked=0.3, latent_std=0.6, latent_cosine=0.6, duplicates=0.5, accuracy=0.13, chance=0.1)
    assert wav2vec2.collapse_warning(healthy) is None
    for change, share, word in ((dict(latent_std=0.009), 0, "collapsed"), (dict(latent_cosine=0.991), 0, "collapsed"),
                                (dict(duplicates=0.51), 0, "silence"), (dict(accuracy=0.11), 0.11, "guessing"),
                                (dict(masked=0, latent_std=0), 0, "long enough to mask")):
        assert word in wav2vec2.collapse_warning({**healthy, **change}, share)
    assert wav2vec2.collapse_warning({**healthy, "accuracy": 0.11}, 0.1) is None


@pytest.mark.parametrize("changes", [dict(mask_prob=0.5), dict(mask_length=1), dict(distractors=7),
                                     dict(temperature=1.0)])
def test_each_setting_of_the_task_acts(changes):
    """With the same weights and random numbers the loss is another one."""
    one, other = Wav2Vec2("tiny", **SMALL).eval(), Wav2Vec2("tiny", **SMALL, **changes).eval()
    other.load_state_dict(one.state_dict())
    log_mel, rand = torch.randn(2, 80, 64), torch.rand(2, 20, 101)
    loss, sums = one(log_mel, None, rand)
    other_loss, other_sums = other(log_mel, None, rand[:, :, :1 + other.settings["distractors"]])
    assert abs(loss - other_loss) > 1e-3, changes
    assert (other_sums["masked"] > sums["masked"]) == ("mask_prob" in changes)          # masked steps


def test_impossible_models_are_refused():
    for changes, word in ((dict(depth=3), "depth"), (dict(heads=5), "heads"), (dict(kernel=8), "odd")):
        with pytest.raises(ValueError, match=word):
            Wav2Vec2("tiny", **changes)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_bf16_is_close_to_float32(norm):
    model, log_mel = Wav2Vec2("tiny", **{**SMALL, "dim": 32, "norm": norm}).eval(), torch.randn(2, 40, 64)
    rand, padding = torch.rand(2, 10, 101), torch.arange(40) >= torch.tensor([40, 24])[:, None]
    exact, _ = model(log_mel, padding, rand)
    with pretrain.autocast(torch.device("cpu"), "bf16"):
        coarse, _ = model(log_mel, padding, rand)
        assert model.encode(log_mel, padding)[0].dtype == torch.float32     # the residual stream
    assert coarse.item() == pytest.approx(exact.item(), rel=0.03) and coarse != exact


def test_bf16_leaves_out_no_more_distractors_than_float32():
    """Latents that differ little, as those of a steady hum, would be equal in bf16."""
    model, log_mel = Wav2Vec2("tiny", **SMALL).eval(), torch.randn(64).expand(2, 40, 64) + 1e-4 * torch.randn(2, 40, 64)
    with pretrain.autocast(torch.device("cpu"), "bf16"):
        _, sums = model(log_mel)
    assert sums["duplicates"] == 0 and sums["counted"] == sums["masked"]


def test_pretraining_learns():
    """On tones that step regularly, what is masked can be told from what is heard."""
    model = Wav2Vec2("tiny", **{**SMALL, "dropout": 0.0}).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    bands = torch.arange(64)
    for _ in range(60):
        start, step = torch.randint(0, 8, (2, 16, 1))
        band = (start + (1 + step % 3) * (torch.arange(80) // 4)) % 16 * 4
        loss, sums = model((-(bands - band[:, :, None]).square() / 8.0).exp() * 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    figures = wav2vec2.summarize(pretrain.fetch(sums))
    assert figures["accuracy"] > 3 * figures["chance"]


# ------------------------------------------------------------------------- Sec. 2.3 and 4.3 Hyper-parameters


def test_learning_rates_are_the_papers():
    rates = [pretrain.learning_rate(u, 3e-4, 10_000, 300_000) for u in range(0, 300_001, 5_000)]
    assert pretrain.learning_rate(0, 1.0, 10, 100) == pytest.approx(0.1)
    assert rates[1] == pytest.approx(1.5e-4, rel=1e-3) and rates[2] == pytest.approx(3e-4)
    assert rates[31] == pytest.approx(1.5e-4) and rates[60] == 0
    stages = [finetune.three_stage_lr(u, 100, 1.0) for u in range(101)]
    assert stages[0] == pytest.approx(0.01) and stages[15] == pytest.approx(0.505)
    assert stages[30:60] == [1.0] * 30
    assert stages[80] == pytest.approx(math.sqrt(0.05)) and stages[100] == pytest.approx(0.05)


def test_defaults_are_the_papers():
    for size in ("small", "large"):
        args = pretrain.parse(["--size", size, "--out", "nowhere"])
        assert (args.updates, args.warmup, args.lr, args.weight_decay) == (300_000, 10_000, 3e-4, 0.01)
        assert (args.batch_size, args.seconds, args.checkpoint_every) == (256, 10, 5000)        # the README's
    args = finetune.parse(["--data", "audioset"])
    assert (args.batch_size, args.head, args.balance) == (640, "frames", True)
    assert (args.seconds, args.checkpoint_every) == (10, 500)
    assert set(args.augment) == {"jitter", "time_mask", "mixup"} and args.consistency == 2 and args.loss == "bce"
    assert finetune.parse(["--data", "magnatagatune"]).batch_size == 64
    for data, updates, seconds in (("synth", 1000, 5), ("esc10", 400, 3)):      # with which the README was measured
        args = finetune.parse(["--data", data])
        assert (args.updates, args.seconds, args.batch_size, args.lr) == (updates, seconds, 16, 1e-3)
        assert (args.head, args.augment, args.consistency, args.head_dropout) == ("stats", ["jitter"], 0, 0.1)


def test_help_tells_the_defaults(capsys):
    """--help and the tables of defaults are written apart."""
    tiny, large = (vars(pretrain.parse(["--size", size, "--out", "nowhere"])) for size in ("tiny", "large"))
    with pytest.raises(SystemExit):
        pretrain.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, change in (("seconds", str), ("batch_size", str), ("updates", str), ("lr", "{:.0e}".format)):
        option = f"--{name} {name.upper()} ".replace("_", "-", 1)
        before, after = (change(x[name]).replace("e-0", "e-").removesuffix(".0") for x in (tiny, large))
        assert re.search(rf"{option}[^()]*\(tiny: {before}, else {after}\)", shown), name
    for name, value in Wav2Vec2("tiny").settings.items():
        if name in wav2vec2.COMMON:
            assert re.search(rf"--{name.replace('_', '-')} \S+ [^()]*\({value}\)", shown), name


# ------------------------------------------------------------------------- Sec. 4 Fine-tuning


def test_linear_softmax_is_the_definition():
    logits = 3 * torch.randn(2, 5, 3)
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    pooled = finetune.linear_softmax(logits, padding).sigmoid()
    for b, n in ((0, 5), (1, 3)):
        for c in range(3):
            p = logits[b, :n, c].sigmoid().tolist()
            assert pooled[b, c].item() == pytest.approx(sum(v * v for v in p) / sum(p))


@pytest.mark.parametrize("level, label", [(-18.0, 1.0), (-40.0, 1.0), (17.0, 0.0), (40.0, 0.0)])
def test_linear_softmax_learns_from_any_logit(level, label):
    """A clip that is far from its label has a gradient towards it, and scores do not tie."""
    logits = torch.full((1, 6, 1), level, requires_grad=True)
    pooled = finetune.linear_softmax(logits)
    assert pooled.item() == pytest.approx(level)
    torch.nn.functional.binary_cross_entropy_with_logits(pooled, torch.tensor([[label]])).backward()
    assert (logits.grad * (1 - 2 * label) > 0.01).all()
    assert finetune.linear_softmax(logits + 0.01) > pooled


@pytest.mark.parametrize("head", [*finetune.POOLINGS, "frames"])
def test_classifier_gives_a_clip_the_same_answer_padded(head):
    model = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3, head).eval()
    log_mel = torch.randn(1, 22, 64)
    padded = model(torch.cat([log_mel, torch.randn(1, 9, 64)], 1), torch.arange(31)[None] >= 22)
    torch.testing.assert_close(padded, model(log_mel), atol=1e-5, rtol=1e-5)
    if head == "frames":
        frames = model.frame_logits(model.encoder.encode(log_mel)[0])
        torch.testing.assert_close(model(log_mel), finetune.linear_softmax(frames))


def test_stats_are_mean_and_deviation_of_each_clip():
    x, padding = torch.randn(2, 7, 3, requires_grad=True), torch.arange(7) >= torch.tensor([7, 1])[:, None]
    stats = finetune.stats_over_time(x, padding)
    torch.testing.assert_close(stats[0], torch.cat([x[0].mean(0), x[0].std(0, correction=0)]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stats[1], torch.cat([x[1, 0], torch.full((3,), 1e-3)]))      # a single step
    stats.sum().backward()
    assert x.grad.isfinite().all()


def test_stats_are_standardised():
    """However the embeddings are scaled and shifted, the linear layer sees mean 0 and variance 1 of each."""
    model, seen = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3, "stats", dropout=0.0).train(), []
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, 0]))
    padding = torch.arange(20) >= torch.tensor([20, 20, 15, 8])[:, None]
    model.clip_logits(100 + 3 * torch.randn(4, 20, 16), padding)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(32), atol=1e-2, rtol=0)
    assert (seen[0].var(0, correction=0) < 1.01).all() and (seen[0].var(0, correction=0) > 0.1).all()
    assert finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3).standardise is None


# ------------------------------------------------------------------------- Sec. 4.1 Augmentation and balancing


def test_jitter_shifts_by_up_to_200_samples():
    wave = torch.arange(1, 1001, dtype=torch.int16).repeat(3, 1)
    out = augment.jitter(wave, torch.tensor([0.0, 0.5, 0.9999]))
    assert torch.equal(out[0, :800], wave[0, 200:]) and (out[0, 800:] == 0).all()
    assert torch.equal(out[1], wave[1])
    assert torch.equal(out[2, 200:], wave[2, :800]) and (out[2, :200] == 0).all()


def test_time_mask_hides_one_interval_within_the_clip():
    rand = torch.rand(200, 2)
    padding = torch.arange(100) >= torch.full((200, 1), 50)
    for frames, mask in ((100, None), (50, padding)):
        hidden = (augment.time_mask(torch.ones(200, 100, 64), rand, mask) == 0)
        assert torch.equal(hidden.any(2), hidden.all(2))
        for row, (width, start) in zip(hidden[:, :, 0], rand, strict=True):
            inside = row.nonzero()[:, 0].tolist()
            assert abs(len(inside) - width * 0.2 * frames) <= 1
            assert inside == list(range(inside[0], inside[-1] + 1)) if inside else True
            assert all(t < frames for t in inside)
            if inside:
                assert abs(inside[0] - start * (frames - width * 0.2 * frames)) <= 1
    one = augment.time_mask(torch.ones(1, 8, 64), torch.tensor([[0.25, 0.5]]), share=0.5)       # from 3.5 to 4.5
    assert (one == 0).all(2).nonzero().tolist() == [[0, 3]]     # frames count by their middle, the beginning is within


def test_mixup_is_equation_2():
    x, partner, rand = torch.randn(4, 6, 64), torch.randn(4, 6, 64), torch.rand(4)
    out = augment.mixup(x, partner, rand, torch.tensor([6, 6, 4, 6]))
    for i in range(4):
        alpha = math.sin(math.pi * rand[i] / 2) ** 2
        alpha = max(alpha, 1 - alpha)
        expected = alpha * x[i] + (1 - alpha) * partner[i]
        if i == 2:                                              # the other has ended: x stays alone
            expected[4:] = x[i, 4:]
        torch.testing.assert_close(out[i], expected)


def test_mixup_draws_from_the_beta_distribution():
    ones = torch.ones(25_000, 1, 1)
    alpha = augment.mixup(ones, 0 * ones, torch.rand(25_000), torch.ones(25_000)).flatten().numpy()
    drawn = np.random.default_rng(0).beta(0.5, 0.5, 25_000)
    drawn = np.maximum(drawn, 1 - drawn)
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(alpha, quantiles), np.quantile(drawn, quantiles), atol=0.01)


@pytest.mark.parametrize("names", [[], ["jitter"], ["time_mask"], ["mixup"], ["mixup", "time_mask", "jitter"]])
def test_augmentations_that_were_chosen_are_applied_in_their_order(names, monkeypatch):
    called = []
    for name in ("jitter", "time_mask", "mixup"):
        original = getattr(augment, name)
        monkeypatch.setattr(augment, name, lambda *inputs, name=name, original=original: (
            called.append(name) or original(*inputs)))
    wave, lengths = torch.randn(4, 16_000), torch.tensor([16_000, 9_000, 16_000, 9_000])
    finetune.augment_batch(wave, lengths, LogMel(), finetune.parse(["--augment", *names]), torch.Generator())
    assert called == [name for name in ("jitter", "time_mask", "mixup") if name in names]


def test_mixup_gets_partners_and_their_lengths(monkeypatch):
    wave, lengths = torch.randn(4, 16_000), torch.tensor([16_000, 9_000, 12_000, 5_000])
    calls = spy(monkeypatch, augment, "mixup")
    args, generator = finetune.parse(["--augment", "mixup"]), torch.Generator().manual_seed(1)
    finetune.augment_batch(wave, lengths, LogMel(), args, generator)
    ((log_mel, partner, _, frames), _), = calls
    order = [next(j for j in range(4) if torch.equal(x, log_mel[j])) for x in partner]
    assert sorted(order) == [0, 1, 2, 3] != order and frames.tolist() == [lengths[j] // 320 for j in order]


def labelled_set(labels, classes=None, splits=None, groups=None):
    """A labelled set of clips that hold nothing but their own number."""
    splits, groups = splits or [str(i % 5 + 1) for i in range(len(labels))], groups or [""] * len(labels)
    clips = [datasets.Clip(str(i), tuple("abcdefg"[c] for c in own), split, group, samples=10,
                           audio=np.full(10, i, np.int16))
             for i, (own, split, group) in enumerate(zip(labels, splits, groups, strict=True))]
    return datasets.ClipSet(clips, "abcdefg"[:classes or 1 + max(c for own in labels for c in own)], "accuracy", 10.0)


def test_balanced_draws_each_class_equally_often_and_all_its_clips():
    data = labelled_set([(0,)] * 20 + [(1,)] * 3 + [(2,)], classes=4)       # nobody has class 3
    stream = datasets.ClipStream(data, 0, data.clips_by_class())
    counts = np.bincount(stream.numbers(range(6000)), minlength=24)
    np.testing.assert_allclose(counts[:20], 100, atol=40)
    np.testing.assert_allclose(counts[20:], [667, 667, 667, 2000], atol=100)


# ------------------------------------------------------------------------- Sec. 4.2 Consistency loss


def test_consistency_augments_each_clip_twice():
    wave, lengths = torch.randn(4, 16_000), torch.tensor([16_000, 9_000, 16_000, 9_000])
    (first, second), _ = finetune.augment_batch(wave, lengths, LogMel(), finetune.parse(
        ["--consistency", "2", "--augment", "time_mask"]), torch.Generator().manual_seed(0))
    hidden = [(version == 0).all(2) for version in (first, second)]
    assert not torch.equal(*hidden)                             # each has its own mask
    seen = ~hidden[0] & ~hidden[1]
    assert torch.equal(first[seen], second[seen])               # and the rest is the same clip


def test_consistency_is_the_symmetric_divergence():
    """Against torch's distributions; p = q gives 0."""
    from torch.distributions import Bernoulli, Categorical, kl_divergence
    logits, others = torch.randn(5, 3) * 4, torch.randn(5, 3) * 4
    for loss, kind in (("bce", Bernoulli), ("ce", Categorical)):
        p, q = kind(logits=logits), kind(logits=others)
        expected = (kl_divergence(p, q) + kl_divergence(q, p)).mean()
        torch.testing.assert_close(finetune.consistency(logits, others, loss), expected)
        assert finetune.consistency(logits, logits, loss) == 0


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_loss_of_two_versions_is_their_mean_and_the_consistency(loss):
    p, q, target = torch.randn(4, 3), torch.randn(4, 3), torch.eye(3)[[0, 1, 1, 2]]
    if loss == "bce":
        own = [-(target * v.sigmoid().log() + (1 - target) * (1 - v.sigmoid()).log()).mean() for v in (p, q)]
    else:
        own = [-v.softmax(1)[range(4), [0, 1, 1, 2]].log().mean() for v in (p, q)]
    args = finetune.parse(["--loss", loss, "--consistency", "2"])
    torch.testing.assert_close(finetune.compute_loss(torch.cat([p, q]), target, args),
                               sum(own) / 2 + 2 * finetune.consistency(p, q, loss))


# ------------------------------------------------------------------------- Tables 1 to 3: metrics


def slow_average_precision(scores, labels):
    """At each distinct score: precision among all that score as high, weighted by what it adds."""
    total, result = sum(labels), 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        here = sum(label for score, label in zip(scores, labels, strict=True)
                   if score == threshold)
        result += here / total * sum(above) / len(above)
    return result


def slow_area_under_roc(scores, labels):
    """The share of pairs (clip with the class, clip without) in which the former scores higher."""
    clips = list(zip(scores, labels, strict=True))
    pairs = [(a, b) for a, x in clips if x for b, y in clips if not y]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def slow_lwlrap(scores, labels):
    """For each label of each clip: go down the clip's classes to it, and count the labels among them."""
    shares = []
    for row, own in zip(scores, labels, strict=True):
        for c in np.flatnonzero(own):
            at_least = [k for k in range(len(row)) if row[k] >= row[c]]
            shares.append(sum(own[k] for k in at_least) / len(at_least))
    return sum(shares) / len(shares)


@pytest.fixture(params=["random", "tied", "constant"])
def scored(request):
    """Scores and labels of 60 clips: class 3 is nobody's, class 4 everybody's."""
    rng = np.random.default_rng(0)
    scores = {"random": rng.normal(size=(60, 5)), "tied": rng.integers(0, 4, (60, 5)),
              "constant": np.zeros((60, 5))}[request.param].astype(float)
    labels = rng.random((60, 5)) < 0.2
    labels[:, 3], labels[:, 4] = False, True
    return scores, labels


def test_mean_average_precision_is_the_definition(scored):
    scores, labels = scored
    expected = np.mean([slow_average_precision(scores[:, c], labels[:, c]) for c in (0, 1, 2, 4)])
    assert mean_over_classes(average_precisions(scores, labels)) == pytest.approx(expected)
    assert mean_over_classes(average_precisions(*map(torch.tensor, scored))) == pytest.approx(expected)


def test_mean_area_under_roc_is_the_definition(scored):
    scores, labels = scored
    expected = [slow_area_under_roc(scores[:, c], labels[:, c]) for c in (0, 1, 2)]
    assert mean_over_classes(areas_under_roc(scores, labels)) == pytest.approx(np.mean(expected))
    assert np.isnan(areas_under_roc(scores, labels)).tolist() == [False] * 3 + [True] * 2


def test_lwlrap_is_the_definition(scored):
    scores, labels = scored
    labels[:9] = False                                          # clips without labels do not count
    assert metrics.lwlrap(scores, labels) == pytest.approx(slow_lwlrap(scores, labels))


def test_saturated_probabilities_tie_but_logits_do_not():
    logits = torch.tensor([[30.0], [40.0], [2.0]])
    labels = [[0], [1], [0]]
    assert areas_under_roc(logits, labels) == 1 and areas_under_roc(logits.sigmoid(), labels) == 0.75
    impossible = torch.full((2, 1), -torch.inf)                         # two logarithms of 0 tie too
    for labels in ([[0], [1]], [[1], [0]]):
        assert areas_under_roc(impossible, labels) == average_precisions(impossible, labels) == 0.5


def test_accuracy_counts_right_answers():
    scores = [[0.1, 0.9, 0.0], [2.0, 1.0, -1.0], [0.0, 0.0, 5.0], [1.0, 0.5, 0.2]]
    assert accuracy(scores, np.eye(3)[[1, 0, 0, 0]]) == 0.75
    assert accuracy(torch.tensor(scores), torch.eye(3)[[1, 0, 0, 0]]) == 0.75
    assert accuracy([[0.1, 0.9, 0.0]], [[1, 1, 0]]) == 1        # any of a clip's classes will do


def test_metrics_refuse_what_has_no_answer():
    for metric, labels in ((average_precisions, np.zeros((3, 2))), (areas_under_roc, np.ones((3, 2)))):
        with pytest.raises(ValueError, match="no class"):
            mean_over_classes(metric(np.ones((3, 2)), labels))
    with pytest.raises(ValueError, match="no clip"):
        metrics.lwlrap(np.ones((3, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="not a number"):
        accuracy([[math.nan, 1.0]], [[1, 0]])


# ========================================================================= 2. data
# ------------------------------------------------------------------------- reading


def encoded(folder, suffix, seconds=5, rate=44_100, **options):
    """The bytes of a tone with noise in a format, written by soundfile."""
    write_wav(folder / "original.wav", seconds, rate)
    waveform, _ = soundfile.read(folder / "original.wav")
    waveform += 0.03 * np.random.default_rng(1).standard_normal(len(waveform)) * np.linspace(0, 1, len(waveform))
    soundfile.write(folder / f"original.{suffix}", waveform, rate, **options)
    return (folder / f"original.{suffix}").read_bytes()


def without_first_frame(mp3):
    """An MP3 without its Xing frame, that is, as old encoders wrote it."""
    return mp3[mp3.index(b"\xff\xfb", 4):]


def with_bytes(content, marker, value):
    """With other bytes behind a marker (or at a place)."""
    place = content.index(marker) + len(marker) if isinstance(marker, bytes) else marker
    return content[:place] + value + content[place + len(value):]


def little(number):
    """Four bytes, the smallest first."""
    return number.to_bytes(4, "little")


OPUS, CONSTANT, VARIABLE = (dict(format="OGG", subtype="OPUS"), dict(bitrate_mode="CONSTANT"),
                            dict(bitrate_mode="VARIABLE", compression_level=0.5))
REAL_FILES = {
    # name: (suffix, options of soundfile, what is done to the bytes, seconds that are read, note)
    "wav": ("wav", {}, bytes, 5, ""),
    "flac": ("flac", {}, bytes, 5, ""),
    "ogg": ("ogg", {}, bytes, 5, ""),
    "opus": ("opus", OPUS, bytes, 5, ""),
    "mp3": ("mp3", {}, bytes, 5, ""),
    "mp3 of constant rate without Xing": ("mp3", CONSTANT, without_first_frame, 5, ""),
    "mp3 of variable rate without Xing": ("mp3", VARIABLE, without_first_frame, 5, ""),
    "mp3 whose Xing frame tells no length": ("mp3", VARIABLE, lambda b: with_bytes(b, b"Xing", bytes(4)), 5, ""),
    "mp3 with a picture": ("mp3", VARIABLE, lambda b: b"ID3\3\0\0\0\6\5\3" + bytes((6 * 128 + 5) * 128 + 3)
                           + without_first_frame(b), 5, ""),
    "mp3 with the word Info in its tag": ("mp3", CONSTANT, lambda b: b"ID3\3\0\0\0\0\0\x0bInformation"
                                          + without_first_frame(b), 5, ""),
    "mp3 with a tag behind": ("mp3", CONSTANT, lambda b: without_first_frame(b) + b"TAG" + b"x" * 125, 5, ""),
    "flac of unknown length": ("flac", {}, lambda b: with_bytes(b, 22, bytes(4)), 5, ""),
    **{f"streamed wav, {size:x}": ("wav", {}, lambda b, size=size: with_bytes(b, b"data", little(size)), 5, "")
       for size in (0x7FFFF000, 2_000_000_000, 0xFFFFFFFF)},
    **{f"wav of a recorder that crashed, {riff}": ("wav", {}, lambda b, riff=riff: with_bytes(with_bytes(
        b, b"data", little(0)), 4, little(riff)), 5, "") for riff in (0, 8, 36, 441_036)},
    "wavex of a crashed recorder": ("wav", dict(format="WAVEX"), lambda b: with_bytes(b, b"data", bytes(4)), 5, ""),
    "wav with a header too large": ("wav", {}, lambda b: with_bytes(b, b"data", little(441_010)), 5, ""),
    "wav of over 4 GiB": ("wav", {}, lambda b: with_bytes(b, b"data", little(88_200)), 1, "ends after 1.0 s, 20% .*"),
    "two mp3s in one": ("mp3", {}, lambda b: b + b, 5, "ends after 5.0 s, 50% of the file"),
    "two oggs in one": ("ogg", {}, lambda b: b + b, 5, "ends after 5.0 s, 5.% of the file"),
    "cut wav": ("wav", {}, lambda b: b[:44 + 282_240], 3.2, "ends after 3.2 of 5.0 s"),
    "cut aiff": ("aiff", {}, lambda b: b[:54 + 282_240], 3.2, "ends after 3.2 of 5.0 s"),
    "cut au": ("au", {}, lambda b: b[:24 + 282_240], 3.2, "ends after 3.2 of 5.0 s"),
    "cut flac": ("flac", {}, lambda b: b[:len(b) // 2], 2.6, r"ends after 2\.\d of 5.0 s"),
    "cut mp3": ("mp3", CONSTANT, lambda b: b[:len(b) // 2], 2.5, r"ends after 2\.\d of 5.0 s"),
    "cut ogg": ("ogg", {}, lambda b: b[:len(b) // 2], 2.4, r"ends after 2\.\d s, .*"),
    "ogg that lacks a byte": ("ogg", {}, lambda b: b[:-1], 5, r"ends after 5\.0 s, 100% of the file"),
    "cut opus": ("opus", OPUS, lambda b: b[:len(b) // 2], 2.0, r"ends after 2\.0 s, .*"),
    "damaged flac": ("flac", {}, lambda b: with_bytes(b, len(b) // 2, bytes(300)), 2.5, r"ends after 2\.\d of 5.0 s"),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_what_decodes_is_used_and_listed(tmp_path, name, capfd):
    """The samples are those of the recording, as far as it decodes; a note tells where that is not all of it."""
    suffix, options, change, seconds, note = REAL_FILES[name]
    whole = encoded(tmp_path, suffix, rate=48_000 if suffix == "opus" else 44_100, **options)
    (tmp_path / f"a.{suffix}").write_bytes(change(whole))
    expected, _ = datasets.read_audio(tmp_path / f"original.{suffix}")
    capfd.readouterr()
    waveform, found = datasets.read_audio(tmp_path / f"a.{suffix}")
    assert capfd.readouterr() == ("", "") or note               # libmpg123 warns of what it doubts
    assert re.fullmatch(note, found)
    assert len(waveform) / 16_000 == pytest.approx(seconds, abs=0.25 if suffix in ("ogg", "opus", "flac") else 0.08)
    size = min(len(waveform), len(expected))
    likeness = np.fft.irfft(np.fft.rfft(waveform, 2 * size) * np.fft.rfft(expected[:size], 2 * size).conj())
    shift = likeness.argmax()           # the missing frame of an MP3 would have told how much the encoder put before it
    assert shift == 0 if suffix != "mp3" else 0 <= shift < 1000
    assert np.corrcoef(waveform[shift:size], expected[:size - shift])[0, 1] > 0.999


@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 44_100, 2), ("flac", 48_000, 6), ("ogg", 22_050, 1), ("mp3", 44_100, 2), ("wav", 8_000, 1)])
def test_any_format_rate_and_number_of_channels_is_read(tmp_path, suffix, rate, channels):
    """Two channels are averaged, of more the first is taken (the others are upside down here, so that an average would
    be near 0), the offset goes, and the loudest sample comes to full scale."""
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    shares = np.array({1: [1], 2: [0.5, 1.5], 6: [1, -1, 1, -1, 1, -0.9]}[channels])
    soundfile.write(tmp_path / f"a.{suffix}", 0.3 * tone[:, None] * shares + 0.1, rate)
    waveform, _ = datasets.read_audio(tmp_path / f"a.{suffix}")
    assert waveform.dtype == np.int16 and len(waveform) == pytest.approx(16_000, abs=100)
    expected = np.round(32767 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000))
    middle = slice(1000, 15_000)
    np.testing.assert_allclose(waveform[middle], expected[middle], atol=3000 if suffix in ("mp3", "ogg") else 300)


@pytest.mark.parametrize("level, offset", [(40, 0), (1e-5, 0), (0.05, 0.5)])
def test_level_and_offset_do_not_count(tmp_path, level, offset):
    """Of a float recording far beyond full scale, or hardly above zero, nothing is clipped or lost."""
    sound = np.random.default_rng(0).standard_normal(48_000) * np.sin(np.arange(48_000) / 3000)
    soundfile.write(tmp_path / "a.wav", level * sound + offset, 16_000, subtype="FLOAT")
    waveform, _ = datasets.read_audio(tmp_path / "a.wav")
    expected = sound - sound.mean()
    np.testing.assert_allclose(waveform, expected * 32767 / np.abs(expected).max(), atol=3)


def test_a_long_recording_is_resampled_as_a_whole(tmp_path):
    """Though a minute at a time."""
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, 44_100 * 125)
    soundfile.write(tmp_path / "a.wav", wave, 44_100, subtype="FLOAT")
    expected = resample(torch.from_numpy(wave - wave[:60 * 44_100].mean()).float(), 44_100, 16_000).numpy()
    assert np.abs(datasets.read_audio(tmp_path / "a.wav")[0] - expected * 32767 / np.abs(expected).max()).max() <= 1


def bad_files(folder):
    """One of each kind of file of which nothing can be used, and the word that its error has to hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "nothing.wav").write_bytes(b"")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "rate.wav", np.ones(100), 7)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    write_wav(folder / "cut.flac")
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:300])
    return {"text.wav": "not readable", "nothing.wav": "not readable", "empty.wav": "no sound", "nan.wav": "not finite",
            "rate.wav": "can't be right", "cut.flac": "no sound in it .*lost sync", "missing.wav": "No such file"}


def test_bad_files_are_named_with_their_fault(tmp_path, monkeypatch):
    words = {**bad_files(tmp_path), "a.raw": "not readable"}
    (tmp_path / "a.raw").write_bytes(bytes(100))
    for name, word in words.items():
        with pytest.raises(InputError, match=f"{name}.*{word}"):
            datasets.read_audio(tmp_path / name)
    write_wav(tmp_path / "long.wav", 2)
    monkeypatch.setattr(datasets, "LONGEST", 1 / 3600)
    with pytest.raises(InputError, match="longer than .* cut it"):
        datasets.read_audio(tmp_path / "long.wav")


def test_what_the_system_left_is_no_recording_and_other_kinds_are_counted(tmp_path, capsys):
    for name in ("dog/1.wav", "cat/2.wav", "__MACOSX/dog/1.wav", ".ipynb_checkpoints/1.wav", "dog/._1.wav",
                 ".Trash-0/3.wav", "__dog/__1.wav"):       # an id of YouTube may begin like this
        write_wav(tmp_path / "in" / name, frequency=300 + len(name))
    for name in ("0.m4a", "1.M4A", "a.webm"):
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")                 # links are followed once,
    (tmp_path / "in" / "9.wav").symlink_to(tmp_path / "nowhere")            # those to nowhere not at all
    assert [path.name for path in datasets.audio_files(tmp_path / "in")] == ["__1.wav", "2.wav", "1.wav"]
    assert "not used: .m4a 2, .webm 1 (if one is sound, ffmpeg" in capsys.readouterr().out
    write_wav(tmp_path / "real" / "1.wav")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "real")
    assert datasets.walk(tmp_path / "linked") == [tmp_path / "linked" / "a" / "1.wav"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no recordings in it"):
        datasets.audio_files(tmp_path / "nothing")
    with pytest.raises(InputError, match="can't be listed"):
        datasets.walk(tmp_path / "not there")


def test_a_file_system_without_inode_numbers_is_read(tmp_path, monkeypatch):
    """As WebDAV's: there all files seem to be one."""
    for name in ("a/1.wav", "a/b/2.wav", "c/3.wav"):
        write_wav(tmp_path / name)
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *inputs, **named: os.stat_result(
        (lambda found: (found[0], 0, 0, *found[3:]))(real(*inputs, **named))))
    assert [path.name for path in datasets.audio_files(tmp_path)] == ["1.wav", "2.wav", "3.wav"]


# ------------------------------------------------------------------------- packing


def whole(clip):
    """All samples of a clip."""
    waveform = np.empty(clip.samples, np.int16)
    clip.read(0, waveform)
    return waveform


def pack_tones(folder, *seconds):
    """Pack tones of these lengths: each of its own frequency."""
    for k, length in enumerate(seconds):
        write_wav(folder / "in" / f"{k}.wav", length, frequency=100 + 37 * k)
    clips = [datasets.Clip(path.name, path=path) for path in datasets.audio_files(folder / "in")]
    datasets.pack(clips, folder / "packed", dict(data=None))
    return str(folder / "packed")


def test_damaged_packs_are_refused(tmp_path):
    folder = Path(pack_tones(tmp_path, 3, 2))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(len(part) for part in datasets.open_unlabelled([folder], 1)) == 2

    audio, index = folder / "audio.int16", folder / "index.jsonl"
    for damage in (lambda: audio.write_bytes(whole[audio.name][:-2]), audio.unlink, lambda: index.write_text("x"),
                   lambda: index.write_bytes(whole[index.name].replace(b"48000", b"47999"))):
        damage()
        with pytest.raises(InputError, match="damaged|no such file"):
            datasets.open_unlabelled([folder], 1)
        for name, content in whole.items():
            (folder / name).write_bytes(content)


def test_pack_keeps_every_good_file_and_lists_the_bad(tmp_path, call):
    bad = bad_files(tmp_path / "in" / "bad")
    for i in range(5):
        write_wav(tmp_path / "in" / str(i % 2) / f"{i}.wav", 1 + i, frequency=200 * (i + 1))
    shutil.copy(tmp_path / "in" / "0" / "0.wav", tmp_path / "in" / "copy.wav")
    command = ["datasets.py", "pack", tmp_path / "in", tmp_path / "out"]
    printed = call(*command)
    assert "5 recordings" in printed and "7 skipped" in printed and "copy.wav: the same sound as 0/0.wav" in printed
    assert all(f"bad/{name}: " in printed for name in bad if name != "missing.wav")
    packed, _ = datasets.open_pack(tmp_path / "out")
    assert [clip.name for clip in packed] == ["0/0.wav", "0/2.wav", "0/4.wav", "1/1.wav", "1/3.wav"]
    for clip in packed:
        assert np.array_equal(whole(clip), datasets.read_audio(tmp_path / "in" / clip.name)[0])
    assert "exists already" in call(*command, code=2)           # whatever it holds
    assert "File exists" in call("datasets.py", "synth", tmp_path / "out", code=2)


class Killed(BaseException):
    """Stands for a process that is killed: no handler of ours catches it."""


def test_a_killed_pack_is_not_there_and_the_same_command_packs_anew(tmp_path, call, monkeypatch):
    for i in range(3):
        write_wav(tmp_path / "in" / f"{i}.wav", frequency=200 * (i + 1))
    command = ["datasets.py", "pack", tmp_path / "in", tmp_path / "out"]
    with monkeypatch.context() as patch:
        interrupt(patch, datasets, "read_audio", (2,))
        with pytest.raises(Killed):
            call(*command)
    assert not (tmp_path / "out").exists()
    command[3] = f"{tmp_path / 'out'}/"
    assert "3 recordings" in call(*command) and sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_crops_are_in_proportion_to_length(tmp_path):
    """Of crops of 2 s, a recording of 9 s gives five, one of 1.5 s one, one of half a second none."""
    folder = pack_tones(tmp_path, 9, 1.5, 0.5)
    source, held_out = datasets.open_unlabelled([folder], 2.0)
    assert names(source) == ["0.wav", "1.wav"] and not len(held_out)
    drawn = datasets.ClipStream(source, 0).numbers(np.arange(12)).tolist()
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [0] * 5 + [1]
    whole, starts = source.waveform(0).numpy(), set()
    windows = np.lib.stride_tricks.sliding_window_view(whole, 8)
    crops, lengths = source.batch([0] * 60, [np.random.default_rng(i) for i in range(60)])
    assert crops.shape == (60, 32_000) and (lengths == 32_000).all()
    for crop in crops.numpy():
        starts |= {s for s in np.flatnonzero((windows == crop[:8]).all(1)) if np.array_equal(whole[s:s + 32_000], crop)}
    assert min(starts) < 16_000 and max(starts) > 6 * 16_000    # from all over the recording
    last = types.SimpleNamespace(integers=lambda high: high - 1)
    crops, lengths = source.batch([0, 1], [last, last])
    assert np.array_equal(crops[0], whole[-32_000:]) and lengths.tolist() == [32_000, 24_000]
    assert np.array_equal(crops[1, :24_000], source.waveform(1)) and (crops[1, 24_000:] == 0).all()


def test_several_packs_are_one_source(tmp_path):
    folders = [pack_tones(tmp_path / "a", 2, 0.5, 3), pack_tones(tmp_path / "b", 4, 5)]
    source, _ = datasets.open_unlabelled(folders, 60.0)
    for clip, name in zip(source.clips, ("a/in/0", "a/in/2", "b/in/0", "b/in/1"), strict=True):
        assert np.array_equal(whole(clip), datasets.read_audio(tmp_path / f"{name}.wav")[0])
    for others in folders[:1], folders[::-1]:       # another order means other crops
        assert source.digest() != datasets.open_unlabelled(others, 60.0)[0].digest()


def names(data):
    """The names of a set's clips."""
    return [clip.name for clip in data.clips]


def units(data):
    """Their groups; of a clip without one its name."""
    return {clip.unit for clip in data.clips}


def test_held_out_recordings_are_never_trained_on(tmp_path, call):
    folder = pack_tones(tmp_path, *[1.0] * 90)
    trained, held_out = map(names, datasets.open_unlabelled([folder], 1.0))
    assert (len(trained), len(held_out)) == (74, 16) and not set(trained) & set(held_out)
    table = tmp_path / "in" / "groups.csv"
    table.write_text("file,labels,split,group\n" + "".join(f"{k}.wav,a,train,{k % 10}\n" for k in range(90)))
    call("datasets.py", "pack", table, tmp_path / "grouped", "--data", "csv")
    groups = [units(part) for part in datasets.open_unlabelled([str(tmp_path / "grouped")], 1.0)]
    assert [len(part) for part in groups] == [8, 2] and not groups[0] & groups[1]
    synth, others = datasets.open_unlabelled(["synth"], 1.0)
    assert not np.array_equal(synth.waveform(0), others.waveform(0))


# ------------------------------------------------------------------------- synth


def test_synth_clips_are_what_their_events_say():
    """And on average there is more power while an event sounds than outside all of them."""
    counts, ratios = dict.fromkeys(datasets.SOUND_CLASSES, 0), []
    for i in range(150):
        wave, events = datasets.synth_clip(i, "train")
        assert wave.dtype == np.int16 and len(wave) == 80_000 and 1 <= len(events) <= 3
        inside = np.zeros(len(wave), bool)
        for onset, offset, kind in events:
            assert 0 <= onset < offset <= 5
            counts[kind] += 1
            inside[int(onset * 16_000):int(offset * 16_000)] = True
        if not inside.all():
            power = wave.astype(float) ** 2
            ratios.append(np.log(power[inside].mean() / power[~inside].mean()))
    assert counts["footsteps"] > 2 * counts["siren"] > 0 and np.mean(ratios) > 0.5      # classes are unbalanced
    assert np.array_equal(wave, datasets.synth_clip(149, "train")[0])
    assert not np.array_equal(wave, datasets.synth_clip(149, "test")[0])


@pytest.mark.parametrize("sound, level, centre", [
    (0, 991.3323, 1708.537), (1, 121.0040, 1093.947), (2, 239.0541, 323.3583), (3, 1607.297, 1415.290),
    (12, 1529.394, 4450.005),
    ("footsteps", 0.045327237, 533.50647), ("wind", 0.46608966, 315.73253), ("bird", 0.17243949, 4086.4273),
    ("engine", 1.1089452, 333.16995), ("dog", 0.14805116, 1548.9104), ("rain", 1.1604875, 3443.3169),
    ("bell", 0.47556916, 852.37228), ("alarm", 0.37344443, 2293.6174), ("cricket", 0.12866165, 4729.9999),
    ("siren", 0.68953692, 1352.4129)])
def test_synth_sounds_as_it_did_when_it_was_measured(sound, level, centre):
    """Mean magnitude, and the centre of the spectrum in Hz, of clips and of each kind of sound by itself: else the
    README's figures would mean other sounds."""
    if isinstance(sound, int):
        waveform, seconds = datasets.synth_clip(sound)[0].astype(float), 5
    else:
        t, seconds = np.arange(64_000) / 16_000, 4
        waveform = datasets.SOUND_CLASSES[sound](np.random.default_rng(0), t, 1.1, 0.9)
    power = np.abs(np.fft.rfft(waveform)) ** 2
    found = np.abs(waveform).mean(), np.average(np.arange(len(power)) / seconds, weights=power)
    assert found == pytest.approx((level, centre), rel=1e-6)


def test_synth_writes_clips_and_their_events(tmp_path, call):
    call("datasets.py", "synth", tmp_path / "out", "--clips", 2)
    rows = [line.split("\t") for line in (tmp_path / "out" / "events.tsv").read_text().splitlines()]
    assert rows[0] == ["filename", "onset", "offset", "event_label"]
    clips = [datasets.synth_clip(i) for i in range(2)]
    assert rows[1:] == [[f"{i}.wav", f"{onset:.2f}", f"{offset:.2f}", name] for i, (_, events) in enumerate(clips)
                        for onset, offset, name in events]
    assert np.array_equal(soundfile.read(tmp_path / "out" / "1.wav", dtype="int16")[0], clips[1][0])


def test_synth_is_labelled_with_its_events():
    clips = datasets.synth_labelled(3, 2)
    assert [clip.split for clip in clips] == ["train"] * 3 + ["test"] * 2
    for clip in clips:
        _, split, i = clip.name.split("/")
        made, events = datasets.synth_clip(int(i), split)
        assert np.array_equal(made, clip.audio) and set(clip.labels) == {kind for _, _, kind in events}


# ------------------------------------------------------------------------- labelled sets, each in miniature

Miniature = namedtuple("Miniature", "there missing unreadable trained_on")      # numbers of clips


def lay_out(root, tables, sounds):
    """A data set in miniature: the lines of its tables, and tones as (path, seconds, frequency); at 0 Hz it is junk."""
    for path, lines in tables.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("\n".join(lines) + "\n")
    for path, seconds, frequency in sounds:
        write_wav(root / path, seconds, frequency=frequency)
        if frequency == 0:
            (root / path).write_bytes(b"RIFF")


def write_esc50(root):
    """ESC-50: 3 classes, 5 folds, 2 clips of each; 2 classes are ESC-10's."""
    clips = [(f"{fold}-{100 + k}-{take}-{k}.wav", fold, k, ("dog", "rain", "keys")[k], k < 2, 100 + k, take)
             for fold in range(1, 6) for k in range(3) for take in "AB"]
    lines = ["filename,fold,target,category,esc10,src_file,take", *(",".join(map(str, clip)) for clip in clips)]
    lay_out(root, {"meta/esc50.csv": lines},
            [(f"audio/{name}", 0.5 + 0.1 * fold, 300 * 3 ** k) for name, fold, k, *_ in clips])


def mini_esc50(root):
    write_esc50(root)
    (root / "audio" / "2-100-A-0.wav").unlink()
    (root / "audio" / "3-100-A-0.wav").write_bytes(b"RIFF")
    return Miniature(there=28, missing=1, unreadable=1, trained_on=22)


def mini_audioset(root):
    """Blanks after commas, ids that begin with - or Y, four ways to name a file, clips that are gone."""
    clips = [("-0RWZT-miF", "/m/09x0r,/t/dd00088", "{}.wav", 300), ("--4gqARaEJ", "/m/0dgw9r", "Y{}.wav", 600),
             ("Y0_abcdefg", "/m/09x0r", "{}_30.flac", 900), ("abcdefghij", "/m/09x0r,/t/dd00088", "{}_30000.ogg", 300),
             ("gone_gone_", "/m/0dgw9r", None, 0), ("-corrupt_-", "/m/09x0r", "{}.wav", 0)]
    lay_out(root, {"class_labels_indices.csv": ["index,mid,display_name", '0,/m/09x0r,"Speech"', '1,/t/dd00088,"Gush"',
                                                '2,/m/0dgw9r,"Male speech, man speaking"']}, [])
    for part in ("balanced_train", "unbalanced_train", "eval"):
        lines = ["# Segments csv created Sun Mar  5 10:54:25 2017", "# num_ytids=6, num_segs=6",
                 "# YTID, start_seconds, end_seconds, positive_labels",
                 *(f'{name}{part[0]}, 30.000, 40.000, "{mids}"' for name, mids, _, _ in clips)]
        lay_out(root, {f"{part}_segments.csv": lines},
                [(f"audio/{form}".format(name + part[0]), 1, frequency) for name, _, form, frequency in clips if form])
    return Miniature(there=12, missing=3, unreadable=3, trained_on=8)


def mini_audioset_balanced(root):
    mini_audioset(root)
    return Miniature(there=8, missing=2, unreadable=2, trained_on=4)


def mini_fsdkaggle2019(root):
    """Quoted lists of labels; Zenodo's folders and file names."""
    for part, usage in (("train_curated", ""), ("train_noisy", ""), ("test", ",usage")):
        clips = [(f"{part[6:10]}{i:04x}.wav", own) for i, own in enumerate(["Bark", '"Bark,Meow"', "Purr", "Meow"])]
        lay_out(root, {f"FSDKaggle2019.meta/{part}_post_competition.csv": [
            f"fname,labels{usage}", *(f"{name},{own}{usage}" for name, own in clips)]},
            [(f"FSDKaggle2019.audio_{part}/{name}", 0.4 + 0.3 * i, 200 * (i + 1)) for i, (name, _) in enumerate(clips)])
    return Miniature(there=12, missing=0, unreadable=0, trained_on=8)


def mini_fsdkaggle2019_curated(root):
    """Kaggle's own layout, but for the test labels, which came out later."""
    mini_fsdkaggle2019(root)
    (root / "FSDKaggle2019.meta" / "train_curated_post_competition.csv").rename(root / "train_curated.csv")
    (root / "FSDKaggle2019.audio_train_curated").rename(root / "train_curated")
    return Miniature(there=8, missing=0, unreadable=0, trained_on=4)


def mini_dcase2019(root):
    """Tabs."""
    for part in ("train", "evaluate"):
        clips = [(f"audio/{scene}-lisbon-{part}-{i}-a.wav", scene)
                 for i, scene in enumerate(["airport", "park", "metro_station", "park"])]
        lay_out(root, {f"evaluation_setup/fold1_{part}.csv": [
            "filename\tscene_label", *(f"{name}\t{scene}" for name, scene in clips)]},
            [(name, 1, 250 * len(scene)) for name, scene in clips])
    return Miniature(there=8, missing=0, unreadable=0, trained_on=4)


def mini_magnatagatune(root):
    """Tabs, quotes, mp3 in folders 0 to f, of which 3 has a clip without tags, and 6 one that is junk."""
    tags = {"3": (0, 0), "c": (0, 1)}
    clips = [(i, *tags.get(folder, (i % 2, 1 - i % 2)), f"{folder}/artist-album-{i:02}-track-0-29.mp3")
             for i, folder in enumerate("0123456789abcdef")]
    clips.append((16, 1, 0, "c/artist-album-16-track-0-29.mp3"))
    rows = [("clip_id", "no voice", "guitar", "mp3_path"), *clips]
    lay_out(root, {"annotations_final.csv": ["\t".join(f'"{value}"' for value in row) for row in rows]},
            [(path, 1.2, 0 if path[0] == "6" else 220 + 440 * (i % 2)) for i, _, _, path in clips])
    return Miniature(there=15, missing=0, unreadable=1, trained_on=10)


def mini_kinetics700(root):
    """Ids that begin with -, padded times in names, a test split whose labels are held out."""
    tables = {"test.csv": ["youtube_id,time_start,time_end,split", "-tes0__abcde,0,10,test"]}
    for split in ("train", "validate"):
        clips = [(label, f"-{split[:3]}{i}__abcde", i)
                 for i, label in enumerate(["playing guitar", "dancing", '"eating, slowly"', "dancing"])]
        tables[f"{split}.csv"] = ["label,youtube_id,time_start,time_end,split",
                                  *(f"{label},{name},{i},{i + 10},{split}" for label, name, i in clips)]
        lay_out(root, tables, [(f"{split}/{name}_{i:06}_{i + 10:06}.wav", 1, 200 * (1 + i)) for _, name, i in clips])
    (root / "train" / "-tra3__abcde_000003_000013.wav").unlink()
    return Miniature(there=7, missing=1, unreadable=0, trained_on=3)


def mini_folder(root):
    lay_out(root, {}, [(f"{'high' if i % 2 else 'low'}/sub/{i}.flac", 0.5 + i / 100, 1600 if i % 2 else 800)
                       for i in range(20)])
    soundfile.write(root / "low" / "sub" / "0.flac", np.zeros(8000), 16_000)     # a silent clip has its label too
    write_wav(root / "in no class.wav")
    return Miniature(there=20, missing=0, unreadable=0, trained_on=16)


def mini_csv(root):
    """Several labels, none, and a split; the file column counts from the table's folder. One is missing."""
    rows = ["0.wav,a; b,train", "1.wav,a,train", "2.wav,,train", "3.wav,b,valid", "4.wav,a,valid", "5.wav,b,test",
            "6.wav,a;b,test"]
    lay_out(root, {"mine.csv": ["file,labels,split", *(f"sounds/{row}" for row in rows)]},
            [(f"sounds/{i}.wav", 0.5, 300 + i) for i in (0, 1, 2, 3, 5, 6)])
    return Miniature(there=6, missing=1, unreadable=0, trained_on=3)


MINIATURES = {
    "audioset": mini_audioset, "audioset-balanced": mini_audioset_balanced, "esc50": mini_esc50,
    "fsdkaggle2019": mini_fsdkaggle2019, "fsdkaggle2019-curated": mini_fsdkaggle2019_curated,
    "dcase2019": mini_dcase2019, "magnatagatune": mini_magnatagatune, "kinetics700": mini_kinetics700,
    "folder": mini_folder, "csv": mini_csv}


@pytest.mark.parametrize("name", MINIATURES)
def test_each_data_set_is_trained_on_as_it_lies_on_disk(tmp_path, name, call):
    """And a pack of it holds the same clips with the same labels, and gives the same training."""
    expected = MINIATURES[name](tmp_path / "data")
    root = tmp_path / "data" / "mine.csv" if name == "csv" else tmp_path / "data"
    assert f"{expected.there} recordings" in call("datasets.py", "pack", root, tmp_path / "packed", "--data", name)
    for place, run in ((root, "in memory"), (tmp_path / "packed", "from pack")):
        printed = call("finetune.py", "--data", name, "--root", place, "--updates", 2, "--batch-size", 4, "--out",
                       tmp_path / run)
        assert f"{name}: {expected.there} clips" in printed
        assert f"{expected.missing} missing, {expected.unreadable} skipped" in printed
        assert f"trained on {expected.trained_on} clips" in printed
    one, two = (result(tmp_path / run) for run in ("in memory", "from pack"))
    assert all(one[key] == two[key] for key in ("score", "train", "test"))


@pytest.mark.parametrize("name, root, head, loss", [
    ("folder", "data", "stats", "ce"), ("folder", "data", "frames", "bce"), ("csv", "data/mine.csv", "stats", "bce")])
def test_own_sets_get_cross_entropy_where_a_clip_has_one_label(tmp_path, name, root, head, loss, call):
    MINIATURES[name](tmp_path / "data")
    options = ["finetune.py", "--data", name, "--root", tmp_path / root, "--head", head, "--updates", 1, "--batch-size",
               4, "--out", tmp_path / "run", "--resume"]
    assert ("in no sub-folder: in no class.wav" in call(*options)) == (name == "folder")
    assert result(tmp_path / "run")["args"]["loss"] == loss
    assert "as it was" in call(*options)
    (tmp_path / "run" / "checkpoint.pt").unlink()               # then nothing tells of what data the score is
    assert "as it was" not in call(*options)


def test_labels_of_the_data_sets(tmp_path):
    """What the tables say about single clips."""
    sets = {}
    for name, clip, labels, split in (
            ("esc50", "3-102-B-2.wav", "keys", "3"), ("esc10", "3-101-B-1.wav", "rain", "3"),
            ("audioset", "-0RWZT-miFb", "Speech;Gush", "train"), ("audioset", "Y0_abcdefge", "Speech", "test"),
            ("audioset", "--4gqARaEJu", "Male speech, man speaking", "train"),
            ("fsdkaggle2019-noisy", "nois0001.wav", "Bark;Meow", "train"),
            ("dcase2019", "audio/park-lisbon-train-3-a.wav", "park", "train"),
            *(("magnatagatune", f"{folder}/artist-album-{int(folder, 16):02}-track-0-29.mp3", tag, split)
              for folder, tag, split in (("0", "guitar", "train"), ("b", "no voice", "train"), ("c", "guitar", "valid"),
                                         ("d", "no voice", "test"), ("f", "no voice", "test"))),
            ("kinetics700", "-val2__abcde_000002_000012", "eating, slowly", "test"),
            ("csv", "sounds/0.wav", "a;b", "train"), ("csv", "sounds/2.wav", "", "train")):
        if name not in sets:
            MINIATURES.get(name, mini_fsdkaggle2019 if "fsd" in name else write_esc50)(tmp_path / name)
            sets[name] = datasets.load_labelled(name, tmp_path / name / ("mine.csv" if name == "csv" else ""))
        data = sets[name]
        i = names(data).index(clip)
        assert data.splits[i] == split and data.clips[i].labels == tuple(labels.split(";") if labels else ())
        assert [data.classes[c] for c in data.labels[i]] == list(data.clips[i].labels)
    assert len(sets["esc50"]) == 28 and len(sets["esc10"]) == 20 and sets["esc10"].classes == ["dog", "rain"]
    assert sets["audioset"].classes == ["Speech", "Gush", "Male speech, man speaking"] and sets["csv"].metric == "mAP"
    places = {f"{scene}-lisbon-train" for scene in ("airport", "park", "metro_station")}
    assert len(units(sets["dcase2019"]) - places) == 4     # the test clips, which need none
    assert not {name[0] for name in names(sets["magnatagatune"])} & {"3", "6"}
    clips, classes = datasets.magnatagatune(tmp_path / "magnatagatune", top=1)
    assert classes == ["no voice"] and len(clips) == 8          # of odd folders but 3, and one in c
    assert inspect.signature(datasets.magnatagatune).parameters["top"].default == 50       # Sec. 3.2


def test_metrics_of_the_data_sets_are_the_papers():
    named = {name: metric for name, (_, metric) in datasets.READERS.items() if metric}
    assert named == dict({name: "mAP" for name in ("synth", "audioset", "audioset-balanced")}, magnatagatune="MAUC",
                         **{name: "accuracy" for name in ("esc50", "esc10", "dcase2019", "kinetics700")},
                         **{f"fsdkaggle2019{part}": "lwlrap" for part in ("", "-curated", "-noisy")})


def write_table(folder, *rows, columns="file,labels,split"):
    """A table of tones; a row that names a file again is the same recording."""
    for row in rows:
        name = row.split(",")[0]
        write_wav(folder / name, 0.5, frequency=200 + 10 * int(re.sub(r"\D", "", name) or 0))
    (folder / "mine.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder / "mine.csv"


def test_a_fifth_of_each_class_is_held_out_of_a_table_without_splits(tmp_path):
    """Though no two clips have the same labels. Clips of a group stay together."""
    data = datasets.load_labelled("csv", write_table(tmp_path, *(f"{i}.wav,{'ab'[i % 2]};{i}" for i in range(20)),
                                           columns="file,labels"))
    assert sorted(int(clip.name[:-4]) % 2 for clip in data.clips if clip.split == "test") == [0, 0, 1, 1]
    data = datasets.load_labelled("csv", write_table(tmp_path, *(f"{i}.wav,a,{i // 4}" for i in range(40)),
                                           columns="file,labels,group"))
    groups = [{clip.group for clip in data.clips if clip.split == split} for split in ("train", "test")]
    assert [len(group) for group in groups] == [8, 2] and not groups[0] & groups[1]


SPLIT, GROUP = "file,labels,split\n", "file,labels,split,group\n"
REFUSED = [     # a table, and what is said of it
    (GROUP + "1.wav,a,train,\n./1.wav,a,test,", "1.wav is there twice, in different splits"),
    (GROUP + "1.wav,a,1,\ncopy1.wav,a,2,", "1.wav and copy1.wav are one sound in two splits"),
    (GROUP + "1.wav,a,train,\ncopy1.wav,b,train,", "1.wav and copy1.wav are one sound in two .*labels"),
    (GROUP + "1.wav,a,train,A\ncopy1.wav,a,train,B", "1.wav and copy1.wav are one sound in two .*groups"),
    (GROUP + "1.wav,a,train,x\n2.wav,a,test,x", "1.wav .train., 2.wav .test.: one group in two splits"),
    (SPLIT + "1.wav,,train\n2.wav,,test", "its clips have no labels"),
    (SPLIT + "1.wav,a,²\n2.wav,b,1", "split must be train"),
    (SPLIT + "1.wav,a,train\n2.wav,b,", "there are .none., train"),
    (SPLIT.replace(",", ";") + "1.wav;a;train", "no column file, labels among file;labels;split; .* commas"),
    ("file,labels\n1.wav,a\n2.wav,b", "no class has two recordings"),
    ("file,labels\n1.wav,\"['dog', 'x']\"", "looks like a printed list: separate labels by ;"),
    ("file,labels,labels\n1.wav,a,b", "the column labels is there twice"),
    ("file,labels,split,split\n1.wav,a,b,", "the column split is there twice"),
    ('file,labels\n\n1.wav,"a\nb"\n2.wav\n', "line 5 has too few columns"),     # counting blank lines and line breaks
    ("file,labels\n1.wav,a,b,c\n", "line 2 has too many columns"),
    ('file,labels\n1.wav,"a\n2.wav,b\n', "mine.csv: damaged, .*unexpected end of data"),
    ("file,labels\n" + "x" * 200_000 + ",a\n", "mine.csv: damaged"),
    ("file,labels\n\udcff\udcfe.wav,a\n", "mine.csv: damaged"),
    ("", "mine.csv: no column file, labels")]


@pytest.mark.parametrize("table, message", REFUSED)
def test_tables_that_can_not_be_right_are_refused(tmp_path, table, message):
    write_table(tmp_path, "1.wav", "2.wav", "copy1.wav").write_text(table, errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        datasets.load_labelled("csv", tmp_path / "mine.csv")


def test_every_label_that_two_recordings_have_is_tested(tmp_path):
    """13 of them, of which each recording has two: it counts for the rarer one."""
    rows = [f"{i}.wav,{'abcdefghijklm'[i % 13]};{'abcdefghijklm'[i * i % 13]}" for i in range(60)]
    data = datasets.load_labelled("csv", write_table(tmp_path, *rows, columns=" file , labels "))  # blanks do no harm
    tested = data.targets(np.flatnonzero(data.splits == "test")).sum(0)
    trained = data.targets(np.flatnonzero(data.splits == "train")).sum(0)
    assert len(data.classes) == 13 and (tested > 0).all() and (trained > 0).all()
    assert 12 <= (data.splits == "test").sum() <= 20


def test_a_class_of_one_group_is_trained_on(tmp_path):
    """Whichever of the two groups comes first: wind is in one of them only."""
    for first, second in ("xy", "yx"):
        rows = [f"{i}.wav,{'wind' if i == 1 else 'steps'},{first if i < 3 else second}" for i in range(6)]
        data = datasets.load_labelled("csv", write_table(tmp_path / first, *rows, columns="file,labels,group"))
        assert {clip.group for clip in data.clips if clip.split == "test"} == {second}


def test_one_recording_in_two_formats_is_not_on_both_sides(tmp_path):
    """Their samples may differ by a step, so that they are not the same sound."""
    for i in range(20):
        write_wav(tmp_path / "ab"[i % 2] / f"{i}.wav", 0.3, frequency=200 + 50 * i)
        write_wav(tmp_path / "ab"[i % 2] / f"{i}.mp3", 0.3, frequency=200 + 50 * i)
    data = datasets.load_labelled("folder", tmp_path)
    sides = {}
    for clip in data.clips:
        sides.setdefault(clip.name[:-4], set()).add(clip.split)
    assert len(data) == 40 and all(len(side) == 1 for side in sides.values())
    assert (data.splits == "test").sum() == 8


def test_a_copy_is_used_once(tmp_path, capsys):
    """And junk of equal content is unreadable, not a copy."""
    for i in range(6):
        write_wav(tmp_path / "ab"[i % 2] / f"{i}.wav", 0.3, frequency=200 + 50 * i)
    shutil.copy(tmp_path / "a" / "0.wav", tmp_path / "a" / "copy.wav")
    for name in ("a/x.mp3", "b/x.mp3"):                         # a page that says that the file was not found
        (tmp_path / name).write_text("<html>404</html>")
    assert len(datasets.load_labelled("folder", tmp_path)) == 6
    printed = capsys.readouterr().out
    assert "0 missing, 3 skipped" in printed and "a/copy.wav: the same sound as a/0.wav" in printed


def test_a_row_for_each_label_is_one_clip(tmp_path):
    rows = ["1.wav,a,train", "2.wav,a,test", "./1.wav,b,train", "1.wav,a,train"]
    data = datasets.load_labelled("csv", write_table(tmp_path, *rows))
    assert names(data) == ["1.wav", "2.wav"] and data.labels == [[0, 1], [0]] and data.metric == "mAP"
    write_esc50(tmp_path / "e")
    table = tmp_path / "e" / "meta" / "esc50.csv"
    table.write_text(table.read_text() + "1-100-A-0.wav,2,0,dog,True,100,A\n")         # the same clip in another fold
    with pytest.raises(InputError, match="1-100-A-0.wav is in two splits: 1 and 2"):
        datasets.load_labelled("esc50", tmp_path / "e")


@pytest.mark.parametrize("folders, refused", [
    ("train test", True), ("fold1 fold2 fold3", True), ("Training Validation dog", True),
    ("train dog", False), ("train_horn train_brakes", False)])
def test_folders_of_splits_are_no_classes(tmp_path, folders, refused):
    """They would be told from one another, with a fine accuracy. A single one may be a class."""
    for i, name in enumerate(3 * folders.split()):
        write_wav(tmp_path / name / "sub" / f"{i}.wav", frequency=200 + 50 * i)
    with pytest.raises(InputError, match="name the folder above") if refused else contextlib.nullcontext():
        assert datasets.load_labelled("folder", tmp_path).classes == sorted(folders.split())


def test_classes_are_printed_with_their_clips(tmp_path, capsys):
    """All of them, or the first and last few."""
    for i in range(12):
        name = "steps" if i < 5 else "dog" if i < 8 else f"{i}"
        write_wav(tmp_path / name / f"{i}.wav", 0.3, frequency=200 + 50 * i)
    datasets.load_labelled("folder", tmp_path)
    assert "6 classes: 10 1, 11 1, 8 1, 9 1, dog 3, steps 5\n" in capsys.readouterr().out
    for i in range(12, 18):
        write_wav(tmp_path / f"{i}" / f"{i}.wav", 0.3, frequency=200 + 50 * i)
    datasets.load_labelled("folder", tmp_path)
    assert "12 classes: 10 1, 11 1, 12 1, 13 1, 14 1, ..., 17 1, 8 1, 9 1, dog 3, steps 5\n" in capsys.readouterr().out


def test_tables_may_be_written_in_other_ways(tmp_path, capsys):
    """Columns that are not used are named."""
    rows = ["1.wav,a,Train,me", "2.wav,b,valid,", "3.wav,a,TEST,you"]
    table = write_table(tmp_path, *rows, columns="file,labels,split,recordist")
    table.write_text(table.read_text() + ",,,\n , ,,\n")         # as spreadsheets end
    assert datasets.load_labelled("csv", table).splits.tolist() == ["train", "valid", "test"]
    table = write_table(tmp_path, "1.wav,a,01", "2.wav,b,1", "3.wav,a,0")
    assert datasets.load_labelled("csv", table).splits.tolist() == ["1", "1", "0"]
    assert "not used: recordist\n" in capsys.readouterr().out


AUDIOSET_NAMES = ("{}_30.000_40.000", "{}_30_40", "{}_30000_40000", "{}_30.000", "{}_30", "{}_30000", "{}",
                  "{}_30.0-40.0")


@pytest.mark.parametrize("form", [prefix + name for prefix in ("", "Y") for name in AUDIOSET_NAMES])
def test_names_of_audioset_clips(tmp_path, form):
    mini_audioset(tmp_path)
    shutil.rmtree(tmp_path / "audio")
    write_wav(tmp_path / f"{form.format('-0RWZT-miFb')}.wav")
    if form not in ("{}", "Y{}"):
        write_wav(tmp_path / "whole videos" / "-0RWZT-miFb.wav", 2)
    table = tmp_path / "balanced_train_segments.csv"
    table.write_text("\ufeff" + table.read_text().replace("09x0r,/t", "09x0r, /t") + "\n\n")     # all that is harmless
    data = datasets.load_labelled("audioset-balanced", tmp_path)
    assert names(data) == ["-0RWZT-miFb"] and data.labels == [[0, 1]] and data.clips[0].samples == 16_000
    os.remove(tmp_path / f"{form.format('-0RWZT-miFb')}.wav")
    shutil.rmtree(tmp_path / "whole videos", ignore_errors=True)
    with pytest.raises(InputError, match="none of the 12 recordings is there, such as -0RWZT-miFb; ffmpeg"):
        datasets.load_labelled("audioset-balanced", tmp_path)


def test_kinetics_tables_may_be_named_otherwise(tmp_path):
    mini_kinetics700(tmp_path)
    for name, other in (("train", "kinetics_train"), ("validate", "kinetics_val")):         # as mmaction2 names them
        (tmp_path / f"{name}.csv").rename(tmp_path / f"{other}.csv")
    assert len(datasets.load_labelled("kinetics700", tmp_path)) == 7


def test_a_line_of_audioset_that_lost_its_quotes_is_named(tmp_path):
    mini_audioset(tmp_path)
    table = tmp_path / "eval_segments.csv"
    table.write_text(table.read_text().replace('"', ""))
    with pytest.raises(InputError, match="eval_segments.csv: damaged, or not what it should be .*too many values"):
        datasets.load_labelled("audioset", tmp_path)


def test_nothing_is_pre_trained_on_test_clips(tmp_path, call, capsys):
    mini_dcase2019(tmp_path / "in")
    call("datasets.py", "pack", tmp_path / "in", tmp_path / "out", "--data", "dcase2019")
    found = [name for part in datasets.open_unlabelled([tmp_path / "out"], 1.0) for name in names(part)]
    assert len(found) == 4 and all("-train-" in name for name in found)
    assert "4 of 8 recordings left out: shorter than a second, or test clips" in capsys.readouterr().out
    assert ", 4 recordings to train on" in call(
        "pretrain.py", "--data", tmp_path / "out", "--updates", 1, "--batch-size", 2, "--seconds", 1, "--out",
        tmp_path / "run")


def test_targets_and_members_say_the_same_as_the_labels():
    data = labelled_set([(0, 2), (1,), (), (2,)])
    assert data.targets([3, 0, 2]).tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert data.clips_by_class() == [[0], [1], [0, 3]]
    part = data.subset([3, 1])
    assert part.targets([0, 1]).tolist() == [[0, 0, 1], [0, 1, 0]] and part.waveform(0)[0] == 3


def test_fraction_keeps_all_classes_and_is_nested():
    data = labelled_set([(0,)] * 30 + [(1,)] * 9 + [(2,)])
    third, tenth = data.fraction(1 / 3, seed=1), data.fraction(0.1, seed=1)
    assert third.targets(range(len(third))).sum(0).tolist() == [10, 3, 1]
    assert tenth.targets(range(len(tenth))).sum(0).tolist() == [3, 1, 1]
    assert set(names(tenth)) < set(names(third))
    assert set(names(third)) != set(names(data.fraction(1 / 3, seed=2)))
    several = labelled_set([(0,), (), (1,), (), (0, 1, 2), ()])
    few = several.fraction(0.01, seed=0)
    assert (few.targets(range(len(few))).sum(0) > 0).all()


def test_fingerprint_tells_sets_apart():
    data = labelled_set([(0,), (1,), (1,), (0,)])
    assert labelled_set([(0,), (1,), (1,), (0,)]).fingerprint() == data.fingerprint()
    assert labelled_set([(0,), (1,), (0,), (0,)]).fingerprint() != data.fingerprint()
    assert data.subset([0, 1, 2]).fingerprint() != data.fingerprint()
    assert labelled_set([(0,), (1,), (1,), (0,)], groups=["", "x", "", ""]).fingerprint() != data.fingerprint()


def parts(data, fold, *options):
    """The training and test set of these options, after a look that they share no clip and no group."""
    training, test = finetune.split(data, fold, finetune.parse(options))
    assert not set(names(training)) & set(names(test)) and not units(training) & units(test)
    return training, test


def test_split_by_folds():
    """In the order of their numbers; with --validate the next one takes the place of that to test on."""
    data, tested = labelled_set([(0,), (1,)] * 24, splits=[str(i % 12 + 1) for i in range(48)]), []
    assert finetune.folds_of(data) == [str(i) for i in range(1, 13)]
    for fold in finetune.folds_of(data):
        training, test = parts(data, fold)
        assert len(training) == 44 and set(test.splits) == {fold}
        tested += names(test)
        training, valid = parts(data, fold, "--validate")
        assert len(training) == 40 and set(valid.splits) == {str(int(fold) % 12 + 1)} and fold not in training.splits
    assert len(set(tested)) == 48


def test_split_without_folds():
    data = labelled_set([(0,), (1,)] * 20, splits=["train"] * 30 + ["valid"] * 4 + ["test"] * 6)
    assert [len(part) for part in parts(data, None)] == [30, 6]
    training, valid = parts(data, None, "--validate")
    assert len(training) == 30 and set(valid.splits) == {"valid"}


def test_classes_that_are_not_trained_on_or_not_tested_are_said(capsys):
    parts(labelled_set([(0,), (1,), (1,), (2,)], splits=["train", "train", "test", "test"]), None)
    assert capsys.readouterr().out == "never trained on: c\nnever tested: a\n"


@pytest.mark.parametrize("classes, clips, clips_a_group, held_out", [
    (2, 60, 1, 12),         # a tenth
    (40, 5, 1, 40),         # one of each class, however few it has
    (2, 200, 10, 4 * 10),   # all clips of a tenth of the groups
    (3, 2, 1, 3)])
def test_a_tenth_of_each_class_is_for_validation(classes, clips, clips_a_group, held_out):
    """None of the test clips is touched."""
    count = classes * clips
    labels = [(i // clips_a_group % classes,) for i in range(count)]
    clips = [datasets.Clip(str(i), (str(own),), "train", str(i // clips_a_group), samples=10)
             for i, (own,) in enumerate(labels)]
    clips += [datasets.Clip(f"test{i}", ("0",), "test", samples=10) for i in range(5)]
    data = datasets.ClipSet(clips, [str(c) for c in range(classes)], "accuracy")
    training, valid = parts(data, None, "--validate")
    assert (len(valid), len(training)) == (held_out, count - held_out)
    assert {own[0] for own in valid.labels} == {own[0] for own in training.labels} == set(range(classes))


# ------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_batches_do_not_depend_on_threads_processes_or_history(workers):
    rng = np.random.default_rng(0)
    clips = [datasets.Clip(str(i), ("a",), samples=i + 1, audio=rng.integers(-9, 9, i + 1, np.int16))
             for i in range(10)]
    source = datasets.ClipSet(clips, ["a"], seconds=10.0)       # labelled, so that an epoch has each clip once
    whole = list(datasets.batches(source, 4, 5, seed=3, samples=12, workers=1))
    assert sorted(np.concatenate([numbers for _, _, numbers in whole])[:10].tolist()) == list(range(10))
    halves = [list(datasets.batches(source, 4, 5, 3, first=2, rank=r, world=2, samples=12, workers=workers))
              for r in range(2)]
    for u in range(3):
        for one, *two in zip(whole[u + 2], *(half[u] for half in halves), strict=True):
            assert np.array_equal(one, np.concatenate(two))
    waveform, lengths, numbers = whole[0]
    assert np.array_equal(lengths, numbers + 1)
    assert all((row[n:] == 0).all() for row, n in zip(waveform, lengths, strict=True))
    shorter = next(datasets.batches(source, 4, 5, seed=3, workers=workers))     # padded to its own longest crop
    assert shorter[0].shape[1] == lengths.max() < 12 and torch.equal(shorter[1], lengths)


def test_crops_are_those_with_which_the_readme_was_measured(tmp_path):
    """Of a pack, over several epochs and drawn by class: a hash of what three batches hold."""
    clips = [datasets.Clip(f"{i}", ("ab"[i % 2],), samples=n, audio=(np.arange(n) * (i + 7) % 60_000 - 30_000).astype(
        np.int16)) for i, n in enumerate([20_000, 70_000, 3_000, 160_000])]
    balanced = datasets.ClipSet(clips, "ab", seconds=1.0)
    for source, by_class, expected in ((datasets.ClipSet(clips, seconds=1.0), None, "db8c25d2998abd38"),
                                       (balanced, balanced.clips_by_class(), "51a81cb494a987a2")):
        digest = hashlib.sha256()
        for waveform, lengths, numbers in datasets.batches(source, 24, 3, 5, samples=16_000, clips_by_class=by_class):
            digest.update(waveform.numpy().tobytes() + bytes(lengths // 1000) + bytes(list(numbers)))
        assert digest.hexdigest()[:16] == expected


def test_threads_end_with_the_loop():
    """Whether it comes to its end, is left, or a result is an error, which comes in its place."""
    def work(n):
        if n == 7:
            raise InputError("seven")
        return n * n

    before = threading.active_count()
    assert list(datasets.in_threads(work, range(7), 3)) == [n * n for n in range(7)]
    found = []
    with pytest.raises(InputError, match="seven"):
        for value in datasets.in_threads(work, range(20), 3):
            found.append(value)
    assert found == [n * n for n in range(7)] and threading.active_count() == before
    results = datasets.in_threads(work, iter(range(6)), 2)
    next(results)
    results.close()
    assert threading.active_count() == before


# ========================================================================= 3. the scripts


@pytest.fixture
def esc50(tmp_path):
    """The options of a short fine-tuning on ESC-50 in miniature."""
    write_esc50(tmp_path / "data")
    return ["--data", "esc50", "--root", tmp_path / "data", "--batch-size", 6]


def result(run):
    """The score of a run, and what belongs to it."""
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of pretrain.py on a packed folder: its options and its folder."""
    folder = tmp_path_factory.mktemp("pretrained")
    for i in range(6):
        wave, _ = datasets.synth_clip(i, seconds=1 + i % 3)
        (folder / "in").mkdir(exist_ok=True)
        soundfile.write(folder / "in" / f"{i}.flac", wave, 16_000)
    run("datasets.py", "pack", folder / "in", folder / "packed")
    options = ["--data", folder / "packed", *SMALL_OPTIONS, "--seconds", 2, "--batch-size", 4,
               "--updates", 6, "--log-every", 2, "--checkpoint-every", 100]
    run("pretrain.py", *options, "--out", folder / "run")
    return options, folder / "run"


def read_log(run):
    """The lines of a log on the training, and those on held-out recordings."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line], [line for line in lines if "held_out_loss" in line]


def test_pretraining_writes_log_and_checkpoint(pretrained, tmp_path, monkeypatch, call):
    options, folder = pretrained
    log, held_out = read_log(folder)
    # A clock that goes on by 10 us whenever it is looked at: at the log's start, then for each line.
    monkeypatch.setattr(pretrain, "time", types.SimpleNamespace(perf_counter=itertools.count(0, 1e-5).__next__))
    printed = call("pretrain.py", *options, "--log-every", 1, "--out", tmp_path / "run")
    assert f"finetune.py --init {tmp_path / 'run'}\n" in printed
    for line, one, two in zip(log, *(read_log(tmp_path / "run")[0][i::2] for i in range(2)), strict=True):
        assert line["gradient_norm"] == pytest.approx((one["gradient_norm"] + two["gradient_norm"]) / 2)
        assert one["clips_per_second"] == pytest.approx(4 / 1e-5, abs=0.06)
    assert [line["update"] for line in log] == [2, 4, 6] and [line["update"] for line in held_out] == [6]
    assert {"loss", "accuracy", "chance", "latent_cosine", "gradient_norm", "clips_per_second"} <= set(log[0])
    assert all(math.isfinite(value) for line in log + held_out for value in line.values())
    for line in log:
        assert line["lr"] == pytest.approx(pretrain.learning_rate(line["update"] - 1, 1e-3, 0, 6))
        assert line["masked"] == pytest.approx(0.3, abs=0.05)
    checkpoint = load_checkpoint(folder)
    assert checkpoint["update"] == 6 and checkpoint["settings"]["dim"] == 16
    assert checkpoint["frontend"]["std"].mean() > 1             # fitted, not the initial ones
    group = checkpoint["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0.01          # the paper's


def test_held_out_loss_is_that_of_recordings_never_trained_on(pretrained, monkeypatch):
    """And the same, whatever was before: masks are always the same."""
    (_, folder, *_), out = pretrained
    checkpoint, source = load_checkpoint(out), datasets.open_unlabelled([folder], 2.0)[1]
    model, frontend = pretrain.load_encoder(checkpoint)
    args = types.SimpleNamespace(seconds=2.0, dtype=None)
    calls = spy(monkeypatch, datasets.ClipSet, "batch")
    figures = [pretrain.held_out_figures(model, frontend, source, args) for _ in range(2)]
    assert figures[0] == figures[1] and model.training
    assert figures[0]["held_out_loss"] == pytest.approx(read_log(out)[1][0]["held_out_loss"], rel=1e-5)
    assert {inputs[0] for inputs, _ in calls} == {source}
    heard = [i for inputs, _ in calls[:len(calls) // 2] for i in inputs[1]]
    assert heard == list(range(len(source)))                    # all of them, where they are few


# ------------------------------------------------------------------------- resuming


def content(path):
    """All that is in a checkpoint but for the options."""
    loaded = torch.load(path, weights_only=True)
    return [leaf for key in sorted(loaded.keys() - {"args", "lines"})
            for leaf in torch.utils._pytree.tree_leaves(loaded[key])]


def assert_same_run(one, other):
    """Two run folders hold the same weights, optimiser state and log, bit for bit."""
    for name in ("log.jsonl", "result.json"):
        logs = [[{key: value for key, value in json.loads(line).items()
                  if key not in ("clips_per_second", "args")}
                 for line in (folder / name).read_text().splitlines()]
                for folder in (one, other) if (folder / name).exists()]
        assert logs == [] or logs[0] == logs[1] and logs[0]
    assert list(one.glob("*.pt"))
    for path in one.glob("*.pt"):
        for a, b in zip(content(path), content(other / path.name), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def interrupt(monkeypatch, owner, name, counts, error=Killed):
    """Let the calls of these numbers, of all that come, of a function end in an error."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*inputs, **named):
        if next(calls) in counts:
            raise error
        return original(*inputs, **named)
    monkeypatch.setattr(owner, name, interrupted)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("script, owner, name, counts, error", [
    ("pretrain.py", pretrain, "learning_rate", (4, 13, 19), Killed),            # in updates 3, 8 and 13
    ("pretrain.py", os, "replace", (3, 4), Killed),         # writing the second checkpoint; the log for a resume
    ("pretrain.py", os, "fsync", (3,), FULL),
    ("finetune.py", finetune, "three_stage_lr", (4, 5, 12, 21), Killed),        # in several of the five folds
    ("finetune.py", finetune, "compute_logits", (1, 3), Killed)])               # trained, not yet tested
def test_an_interrupted_run_ends_as_if_it_had_not_been(pretrained, esc50, tmp_path, monkeypatch, call, script, owner,
                                                       name, counts, error):
    options = [script, *pretrained[0], "--updates", 15, "--checkpoint-every", 4, "--log-every", 3]
    if script == "finetune.py":
        options = [script, *esc50, "--init", pretrained[1], "--fold", "all", "--fraction", 0.5, "--updates", 5,
                   "--checkpoint-every", 3, "--validate"]
    call(*options, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, counts, error)
        for _ in counts:
            if error is Killed:
                with pytest.raises(Killed):
                    call(*options, "--out", tmp_path / "run", "--resume")
            else:
                assert "No space left on device" in call(*options, "--out", tmp_path / "run", code=2)
    if script == "pretrain.py":
        with open(tmp_path / "run" / "log.jsonl", "a", errors="surrogateescape") as log:
            log.write('\udcff}\n{"update": 2')                  # the last lines may be damaged, or incomplete
    call(*options, "--out", tmp_path / "run", "--resume")
    folders = {path.parent.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.pt")}
    assert len(folders) == (1 if script == "pretrain.py" else 5)
    for folder in folders:
        assert_same_run(tmp_path / "whole" / folder, tmp_path / "run" / folder)


def test_another_number_of_processes_resumes(pretrained, tmp_path, monkeypatch, call):
    """A run of two processes that was killed goes on in one: equal up to rounding."""
    options = [*pretrained[0], "--dropout", 0, "--checkpoint-every", 2]
    call("pretrain.py", *options, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, pretrain, "learning_rate", (4,))
        assert run_forked("pretrain.py", *options, "--out", tmp_path / "run", processes=2) == [1, 1]
    assert load_checkpoint(tmp_path / "run")["update"] == 2
    (tmp_path / "run" / "log.jsonl").unlink()                   # which nothing depends on
    call("pretrain.py", *options, "--out", tmp_path / "run", "--resume")
    one, other = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "run"))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_run_is_not_overwritten_nor_changed(pretrained, finetuned, tmp_path, call, monkeypatch):
    options, folder = pretrained
    message = call("pretrain.py", *options, "--out", folder, code=2)
    assert "--resume" in message and "--out" in message
    for change, word in ((["--dim", 32], "--dim was 16, not 32"), (["--seed", 1], "--seed was 0, not 1"),
                         (["--data", "synth"], "recordings")):
        assert word in call("pretrain.py", *options, "--out", folder, "--resume", *change, code=2)
    shutil.copytree(folder, tmp_path / "moved")                 # a run that was moved goes on where it is
    call("pretrain.py", *options, "--out", tmp_path / "moved", "--resume")
    args = result(finetuned)["args"]
    options = ["--data", "esc50", "--root", args["root"], "--init", args["init"], "--head", "frames", "--batch-size", 6,
               "--lr", 3e-3, "--augment", "--consistency", 0, "--out", finetuned, "--resume"]
    assert "--updates was 20, not 40" in call("finetune.py", *options, "--updates", 40, code=2)
    call("finetune.py", *options, "--updates", 20)
    table = Path(args["root"]) / "meta" / "esc50.csv"
    whole = table.read_text()
    table.write_text(whole.replace("1-100-A-0.wav,1", "1-100-A-0.wav,2"))
    assert "other recordings, labels or splits" in call("finetune.py", *options, "--updates", 20, code=2)
    table.write_text(whole)


def test_a_fine_tuning_goes_on_from_the_pretraining_it_began_with(pretrained, undropped, esc50, tmp_path, call):
    """Wherever that lies now, however it is written."""
    shutil.copytree(pretrained[1], tmp_path / "moved")
    options = ["finetune.py", *esc50, "--updates", 1, "--out", tmp_path / "run", "--resume", "--init"]
    call(*options, pretrained[1])
    assert "as it was" in call(*options, f"{tmp_path / 'moved'}/")
    assert "another --init" in call(*options, undropped, code=2)


def test_packs_and_checkpoints_of_another_frontend_are_refused(pretrained, tmp_path, monkeypatch, call):
    """As a fork has that changes the sample rate or the mel bands."""
    monkeypatch.setattr(datasets, "SAMPLE_RATE", 8000)
    assert "not at 8000 Hz; pack again" in call("pretrain.py", *pretrained[0], "--out", tmp_path / "run", code=2)
    monkeypatch.setattr(pretrain, "LOG_MELS", dict(LOG_MELS, mels=1))
    message = call("finetune.py", "--init", pretrained[1], "--out", tmp_path / "run", code=2)
    assert "'mels': 64" in message and "'mels': 1" in message


# ------------------------------------------------------------------------- what is not finite, what collapses


def test_updates_that_are_not_finite_are_skipped_and_counted(pretrained, tmp_path, monkeypatch, call):
    """Every second one: ten in all, but never ten in a row."""
    forward, calls = LogMel.forward, []

    def broken(self, waveform, lengths=None):
        calls.append(waveform)                      # the first 16 calls fit the normalisation
        return forward(self, waveform, lengths) * (math.nan if len(calls) > 16 and len(calls) % 2 else 1)
    monkeypatch.setattr(LogMel, "forward", broken)
    call("pretrain.py", *pretrained[0], "--updates", 24, "--out", tmp_path / "run", "--log-every", 1)
    log, _ = read_log(tmp_path / "run")
    assert [(line["update"], line["skipped"]) for line in log] == [(2 * n, n) for n in range(1, 13)]
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint["skipped"] == 12 and all(w.isfinite().all() for w in checkpoint["model"].values())


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_a_run_that_stays_not_finite_stops(pretrained, esc50, tmp_path, monkeypatch, call, script):
    options = pretrained[0] if script == "pretrain.py" else [*esc50, "--init", pretrained[1]]
    monkeypatch.setattr(LogMel, "forward",
                        lambda self, wave, lengths=None: torch.full((len(wave), 100, 64), math.nan))
    message = call(script, *options, "--updates", 30, "--out", tmp_path / "run", code=2)
    assert "ten updates in a row, now with" in message and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_collapse_is_warned_of_once(pretrained, tmp_path, monkeypatch, capsys, call):
    init = wav2vec2.FeatureEncoder.__init__
    monkeypatch.setattr(wav2vec2.FeatureEncoder, "__init__", lambda self, *settings: (
        init(self, *settings), torch.nn.init.zeros_(self.linear.weight))[0])
    monkeypatch.setattr(pretrain, "learning_rate", lambda *_: 0.0)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, pretrained[0]), "--out", str(tmp_path / "run")])
    pretrain.main()
    assert capsys.readouterr().err.count("collapsed") == 1
    last = read_log(tmp_path / "run")[0][-1]
    assert last["latent_cosine"] == pytest.approx(1) and last["duplicates"] == 1 and last["accuracy"] == 0


# ------------------------------------------------------------------------- micro-batches, processes, workers


def gradients(run):
    """Of a run of one update: Adam's first moment is then a tenth of the gradient."""
    states = load_checkpoint(run)["optimizer"]["state"].values()
    return torch.cat([state["exp_avg"].flatten() * 10 for state in states])


def test_gradients_do_not_depend_on_how_the_batch_is_split(pretrained, tmp_path, monkeypatch, call):
    """And are those of the mean loss over all masked steps, taken in one piece."""
    options = [*pretrained[0], "--dropout", 0, "--updates", 1]
    with monkeypatch.context() as patch:
        calls = spy(patch, Wav2Vec2, "forward")
        call("pretrain.py", *options, "--out", tmp_path / "whole")
    (_, *inputs), _ = calls[0]
    torch.manual_seed(0)
    model = Wav2Vec2("tiny", **SMALL, dropout=0.0)
    loss, _ = model(*inputs)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert expected.norm() > 1
    expected /= expected.norm()                                 # longer gradients are scaled down
    call("pretrain.py", *options, "--micro-batch", 1, "--out", tmp_path / "passes of one clip")
    for processes in (2, 4):
        assert run_forked("pretrain.py", *options, "--out", tmp_path / f"{processes} processes",
                          processes=processes) == [0] * processes
    logs = []
    for name in ("whole", "passes of one clip", "2 processes", "4 processes"):
        torch.testing.assert_close(gradients(tmp_path / name), expected, atol=1e-6, rtol=0)
        (log,), _ = read_log(tmp_path / name)
        logs.append({**log, "clips_per_second": 0})
    assert all(log == pytest.approx(logs[0], rel=1e-4, abs=1e-6) for log in logs)


def test_modules_of_a_block_can_be_left_out(pretrained, tmp_path, monkeypatch, call):
    """Their weights then have no gradient."""
    for name in ("convolution", "attention"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(sys.modules["conformer"], dict(convolution="Convolution", attention="SelfAttention")[
                name]), "forward", lambda self, x, padding_mask=None: torch.zeros_like(x))
            call("pretrain.py", *pretrained[0], "--updates", 2, "--out", tmp_path / name)


@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_recording_that_can_not_be_read_ends_the_run_in_a_line(pretrained, tmp_path, call, monkeypatch, fault):
    """Though a thread reads it, ahead of the update that needs it."""
    shutil.copytree(pretrained[0][1], tmp_path / "packed")
    audio = tmp_path / "packed" / "audio.int16"
    build = pretrain.build

    def damage(*inputs):
        model = build(*inputs)
        os.truncate(audio, 1000) if fault == "cut" else audio.unlink()
        return model
    monkeypatch.setattr(pretrain, "build", damage)
    message = call("pretrain.py", "--data", tmp_path / "packed", *pretrained[0][2:], "--workers", 2, "--out",
                   tmp_path / "run", code=2)
    fault = r"(, \d.flac: damaged.*not all of it is there.*|: no such file; )"
    assert re.search(rf"audio.int16{fault}pack it again\n", message)


@pytest.mark.parametrize("digest, updates, code", [("same", 6, 0), ("other", 6, 2), ("same", None, 2)])
def test_processes_that_found_another_checkpoint_or_other_data_are_refused(pretrained, tmp_path, digest, updates, code):
    """Machines that do not share --out: one would train the fold that another tests."""
    args = pretrain.parse([*map(str, pretrained[0]), "--resume"])
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        if updates or number == 0:
            torch.save(dict(update=6, script="pretrain.py", args={}, data="same", log_mels=LOG_MELS),
                       tmp_path / str(number) / "checkpoint.pt")

    def start(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        data = digest if rank else "same"
        datasets.run_script(lambda: pretrain.resume(args, tmp_path / str(rank), "pretrain.py", data)
                            and torch.distributed.barrier())
    assert fork(start, 2) == [code] * 2


def test_requirements_are_what_the_modules_import():
    own = {path.stem for path in HERE.glob("*.py")}
    lines = [line for path in HERE.glob("*.py") for line in path.read_text().splitlines()]
    imported = {re.match(r"(?:import|from) (\w+)", line)[1] for line in lines if re.match(r"(?:import|from) \w", line)}
    listed = {re.match(r"\w+", line)[0] for line in (HERE / "requirements.txt").read_text().splitlines()}
    assert imported - own - sys.stdlib_module_names == listed


def test_the_best_device_is_found_and_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert datasets.find_device() == torch.device("cuda", 0)            # without torchrun
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert datasets.find_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="this torch has none, or not for 3 processes"):
        datasets.find_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert datasets.find_device() == torch.device("cpu")                # a Mac's GPU is for one process
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert datasets.find_device() == torch.device("mps")
    assert not torch.backends.cuda.cudnn_sdp_enabled()                  # conformer.py says why


def test_compiled_blocks_are_evaluated_eagerly():
    """Clips come in many shapes, each of which would be compiled anew, up to a limit that is passed in silence."""
    model, compiled = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 1), []
    for block in model.encoder.conformer.blocks:
        block.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    data = labelled_set([(0,)] * 3)
    finetune.compute_logits(model, LogMel(), data, finetune.parse([]))
    assert not compiled
    model(torch.randn(2, 40, 64))
    assert compiled


@pytest.fixture
def undropped(tmp_path):
    """A pre-trained model without dropout, whose training is the same in one process or two."""
    encoder = Wav2Vec2("tiny", **SMALL, dropout=0.0)
    pretrain.save_checkpoint(tmp_path / "undropped.pt", encoder, LogMel(), settings=encoder.settings, args={},
                             script="pretrain.py", update=0, data="")
    return tmp_path / "undropped.pt"


def test_two_processes_fine_tune_as_one(tmp_path, esc50, undropped, call):
    """Same clips, same augmentations but for mixup's partners: the same change of the weights, up to the rounding of
    other paddings, which Adam enlarges where a gradient is nearly 0; and the same score."""
    options = [*esc50, "--updates", 3, "--head-dropout", 0, "--init", undropped, "--augment", "jitter", "time_mask"]
    call("finetune.py", *options, "--out", tmp_path / "run1")
    assert run_forked("finetune.py", *options, "--out", tmp_path / "run2", processes=2) == [0, 0]
    before = load_checkpoint(undropped)["model"]
    one, two = (torch.cat([(load_checkpoint(tmp_path / f"run{n}" / "model.pt")["model"][f"encoder.{name}"]
                            - weight).flatten() for name, weight in before.items()]) for n in (1, 2))
    assert torch.cosine_similarity(one, two, dim=0) > 0.999 and one.norm() > 0.05
    torch.testing.assert_close(one.norm(), two.norm(), rtol=1e-3, atol=0)
    one, two = (result(tmp_path / f"run{n}") for n in (1, 2))
    assert one["score"] == two["score"] and one["test"] == two["test"] and one["test"].startswith("6 clips")


def test_fine_tuning_in_parts_has_the_gradient_of_the_whole(tmp_path, esc50, undropped, monkeypatch, call):
    calls = spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    for extra in ([], ["--micro-batch", 2]):
        call("finetune.py", *esc50, "--updates", 3, "--head-dropout", 0, "--init", undropped, *extra, "--out",
             tmp_path / f"run{len(extra)}")
    norms = [norm for _, norm in calls]
    torch.testing.assert_close(norms[:3], norms[3:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_is_made_on_the_wrong_device(padded, monkeypatch):
    """On the device "meta", which has no data and is another than the CPU, as a GPU is: what mixes the two fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # it knows no "meta"
    meta = torch.device("meta")
    padding = torch.empty(4, 100, dtype=torch.bool, device=meta) if padded else None
    front = LogMel().to(meta)
    log_mel = front(torch.empty(4, 32_000, dtype=torch.int16, device=meta), torch.full((4,), 32_000))
    assert padding_mask(torch.tensor([32_000, 9_000, 9_000, 9_000]), log_mel).device == meta
    model = Wav2Vec2("tiny", **SMALL).to(meta).train()
    loss, sums = model(log_mel, padding, torch.empty(model.rand_shape(4, 100), device=meta))
    loss.backward()
    assert all(x.device == meta for x in sums.values()) and all(p.grad.device == meta for p in model.parameters())
    log_mel = augment.time_mask(log_mel, torch.empty(4, 2, device=meta), padding)
    log_mel = augment.mixup(log_mel, log_mel, torch.empty(4, device=meta), torch.empty(4, device=meta))
    assert augment.jitter(torch.empty(4, 3200, device=meta), torch.empty(4, device=meta)).device == meta
    for head in (*finetune.POOLINGS, "frames"):
        classifier = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3, head).to(meta).train()
        logits = classifier(log_mel, padding)
        finetune.compute_loss(logits, torch.empty(2, 3, device=meta), finetune.parse(["--consistency", "2"])).backward()
        assert classifier.linear.weight.grad.device == meta


# ------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_over_folds_from_a_checkpoint(pretrained, esc50, tmp_path, call):
    for number, options in enumerate((["--loss", "ce"], ["--head", "frames", "--consistency", 0])):
        out = tmp_path / f"run{number}"
        printed = call("finetune.py", *esc50, "--init", pretrained[1], "--fold", "all", "--fraction", 0.5, "--updates",
                       3, "--validate", "--out", out, *options)
        assert printed.count("mean accuracy over 5 folds") == 1 and printed.count(" on 6 validation clips") == 5
        found = [result(out / f"fold{fold}") for fold in range(1, 6)]
        assert [int(one["train"].split()[0]) for one in found] == [9] * 5 and found[0]["args"]["loss"] == (
            "bce" if number else "ce")
    after = torch.load(out / "fold5" / "model.pt", weights_only=True)
    assert torch.equal(after["frontend"]["mean"], load_checkpoint(pretrained[1])["frontend"]["mean"])


def test_fine_tuning_learns_tones(esc50, tmp_path, call):
    call("finetune.py", *esc50, "--updates", 20, "--lr", 3e-3, "--out", tmp_path / "run")
    assert result(tmp_path / "run")["score"] >= 4 / 6       # chance: 2 / 6


def test_balance_draws_by_class(tmp_path, esc50, undropped, monkeypatch, call):
    calls = spy(monkeypatch, finetune, "batches")
    for extra in (["--balance"], []):
        call("finetune.py", *esc50, "--updates", 1, "--init", undropped, *extra, "--out", tmp_path / f"run{len(extra)}")
    balanced, plain = (inputs[-1] for inputs, _ in calls)
    assert [len(clips) for clips in balanced] == [8, 8, 8] and plain is None


def test_logits_are_those_of_each_clip_alone_and_whole(monkeypatch):
    """In groups of similar length, padded to so many seconds at most; in training only crops would be heard."""
    calls = spy(monkeypatch, datasets.ClipSet, "batch")
    rng = np.random.default_rng(0)
    waveforms = [rng.integers(-9000, 9000, n).astype(np.int16) for n in (9_000, 16_000, 4_000, 16_000, 700)]
    clips = [datasets.Clip("", ("a",), samples=len(x), audio=x) for x in waveforms]
    data = datasets.ClipSet(clips, ["a", "b", "c"], "accuracy", seconds=0.5)
    model, front = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3), LogMel()
    logits = finetune.compute_logits(model, front, data, finetune.parse([]), batch_seconds=2)
    model.eval()
    assert [tuple(waveform.shape) for _, (waveform, _) in calls] == [(2, 16_000), (3, 9_000)]
    for waveform, found in zip(waveforms, logits, strict=True):
        with torch.no_grad():
            alone = model(front(torch.from_numpy(waveform)[None]))[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_a_long_recording_is_scored_as_it_is_predicted(tmp_path, monkeypatch):
    """In parts: as a whole it would take time that grows with the square of its length."""
    write_wav(tmp_path / "a.wav", 3)
    monkeypatch.setattr(finetune, "MINUTE", 1)
    waveform, _ = datasets.read_audio(tmp_path / "a.wav")
    data = datasets.ClipSet([datasets.Clip("", samples=len(waveform), audio=waveform)], list("abc"), "mAP")
    model, front = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3).eval(), LogMel()
    probabilities, _ = finetune.predict(tmp_path / "a.wav", model, front, "abc")
    scored = finetune.compute_logits(model, front, data, finetune.parse([]))[0].sigmoid()
    assert [probabilities[name] for name in "abc"] == pytest.approx(scored.tolist(), abs=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(front(torch.from_numpy(waveform)[None]))[0].sigmoid(), scored, atol=1e-4)


def test_a_frozen_encoder_stays_as_it_was(tmp_path, esc50, undropped, call):
    """And the head learns from it."""
    call("finetune.py", *esc50, "--updates", 2, "--init", undropped, "--freeze", "--out", tmp_path / "run")
    before, after = (load_checkpoint(path)["model"] for path in (undropped, tmp_path / "run" / "model.pt"))
    assert all(torch.equal(after[f"encoder.{name}"], weight) for name, weight in before.items())
    model = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3, freeze=True).train()
    assert model.training and not model.encoder.training and not model.encoder.conformer.blocks[0].training
    model(torch.randn(2, 40, 64)).sum().backward()
    assert model.linear.weight.grad is not None and model.encoder.input_proj.weight.grad is None


# ------------------------------------------------------------------------- using a model


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
    """A fine-tuned run with the head that gives frame probabilities."""
    folder = tmp_path_factory.mktemp("finetuned")
    write_esc50(folder / "data")
    run("finetune.py", "--data", "esc50", "--root", folder / "data", "--init", pretrained[1], "--head", "frames",
        "--updates", 20, "--batch-size", 6, "--lr", 3e-3, "--augment", "--consistency", 0, "--out", folder / "run")
    return folder / "run"


def test_runs_give_the_figures_they_gave_when_the_readme_was_measured(pretrained, tmp_path, monkeypatch, call):
    """Whoever changes what a run draws or computes, and means to, measures the README's results again. Without dropout
    of the head, which is torch's: other versions draw it in another way."""
    table = write_table(tmp_path, *(f"{i}.wav,{'ab'[i % 2]},train" for i in range(4)), "4.wav,a,test")
    fetched = spy(monkeypatch, finetune, "fetch")
    for loss in ("bce", "ce"):
        call("finetune.py", "--data", "csv", "--root", table, "--init", pretrained[1], "--updates", 3, "--batch-size",
             4, "--augment", "jitter", "time_mask", "mixup", "--consistency", 2, "--head-dropout", 0, "--loss", loss,
             "--out", tmp_path / loss)
    assert [figures["loss"] for _, figures in fetched] == pytest.approx(
        [0.94386, 0.83773, 0.95520, 1.34640, 0.78429, 1.20768], abs=2e-4)
    log, held_out = read_log(pretrained[1])
    assert [line["loss"] for line in log] == pytest.approx([5.22147, 5.13273, 5.08248], abs=2e-4)
    assert held_out[0]["held_out_loss"] == pytest.approx(5.88700, abs=2e-4)


@pytest.mark.parametrize("head", [*finetune.POOLINGS, "frames"])
def test_predict_says_what_the_model_says(tmp_path, monkeypatch, head):
    """Of a recording that is heard in parts: pooled as a whole, and events may go on from one part into the next."""
    write_wav(tmp_path / "a.wav", 3)
    monkeypatch.setattr(finetune, "MINUTE", 1)
    model, front, classes = finetune.Classifier(Wav2Vec2("tiny", **SMALL), 3, head).eval(), LogMel(), list("abc")
    waveform = torch.from_numpy(datasets.read_audio(tmp_path / "a.wav")[0])
    with torch.no_grad():
        x = torch.cat([model.encoder.encode(front(part[None]))[0] for part in waveform.split(13 * 1280)], 1)
        expected = model.clip_logits(x).sigmoid()[0]
        heard = model.frame_logits(x)[0].sigmoid() if head == "frames" else torch.tensor([0.5])
    threshold = heard.median().item()
    probabilities, events = finetune.predict(tmp_path / "a.wav", model, front, classes, threshold)
    assert [probabilities[name] for name in classes] == pytest.approx(expected.tolist(), abs=1e-4)
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)     # the most probable first
    model.single_label = True                                   # as `load_run` makes a model of --loss ce
    probabilities, _ = finetune.predict(tmp_path / "a.wav", model, front, classes)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)
    if head == "frames":
        rebuilt = torch.zeros(heard.shape, dtype=torch.bool)
        for onset, offset, name in events:
            rebuilt[round(onset / 0.08):round(offset / 0.08), classes.index(name)] = True
        assert torch.equal(rebuilt, heard > threshold) and events == sorted(events)
        assert any(on < 1.04 < off for on, off, _ in events)
        write_wav(tmp_path / "b.wav", 0.1)                      # the second of two latents is longer than the sound
        assert finetune.predict(tmp_path / "b.wav", model, front, classes, 0.0)[1] == [(0.0, 0.1, c) for c in classes]


def test_predictions_are_printed(finetuned, tmp_path, monkeypatch, call):
    """The five most probable classes of each recording, and when each is heard."""
    sounds = [tmp_path / "0.wav", tmp_path / "1.mp3"]
    for k, sound in enumerate(sounds):
        write_wav(sound, 1 + k, 22_050, frequency=900)
    predictions = [({f"class {n}": 0.9876 - n / 10 for n in range(6)}, [(0.5, 12.25, "class 0")]), ({"dog": 0.5}, None)]
    monkeypatch.setattr(finetune, "predict", lambda sound, *_: predictions[sounds.index(Path(sound))])
    assert call("finetune.py", "--predict", *sounds, "--init", finetuned / "model.pt").splitlines() == [
        str(sounds[0]), *(f"   0.{988 - 100 * n}  class {n}" for n in range(5)), "    0.50 to   12.25 s  class 0",
        str(sounds[1]), "   0.500  dog"]


def test_embeddings_of_any_run(finetuned, pretrained, tmp_path, monkeypatch, call):
    """Of the middle block, the first of two here; a long recording in equal parts."""
    monkeypatch.setattr(finetune, "MINUTE", 1)
    sounds = [tmp_path / "0.wav", tmp_path / "1.wav"]
    for k, sound in enumerate(sounds):
        write_wav(sound, 1 + k, frequency=300 + 400 * k)
    for start, name in ((finetuned, "tuned"), (pretrained[1], "pretrained")):
        out = tmp_path / "new" / f"{name}.npy"
        options = ["finetune.py", "--embed", *sounds, sounds[0], "--init", start, "--out", out]
        call(*options)
        assert "must not be there yet" in call(*options, code=2)
        rows = np.load(out)
        assert rows.shape == (3, 32) and np.array_equal(rows[0], rows[2])       # a row for each argument
        model, frontend, _ = finetune.load_run(start)
        encoder = getattr(model, "encoder", model)
        for row, sound in zip(rows, sounds, strict=False):
            waveform = torch.from_numpy(datasets.read_audio(sound)[0])[None]
            with torch.no_grad():
                x = torch.cat([encoder.encode(frontend(part), layer=1)[0][0] for part in waveform.split(13 * 1280, 1)])
            np.testing.assert_allclose(row, torch.cat([x.mean(0), x.std(0, correction=0)]), atol=1e-3)


def test_a_cut_recording_is_used_and_said_and_a_bad_one_does_not_cost_it(finetuned, tmp_path, call):
    write_wav(tmp_path / "cut.wav", 5)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:44 + 2 * 51_200])
    (tmp_path / "bad.wav").write_text("no audio")
    message = call("finetune.py", "--embed", tmp_path / "bad.wav", tmp_path / "cut.wav", "--init", finetuned,
                   "--out", tmp_path / "e.npy", code=2)
    assert "cut.wav: ends after 3.2 of 5.0 s\n" in message and "bad.wav: not readable" in message
    rows = np.load(tmp_path / "e.npy")
    assert rows.shape == (2, 32) and np.isnan(rows[0]).all() and np.isfinite(rows[1]).all() and rows.dtype == np.float32


# ------------------------------------------------------------------------- README and bad input


def test_what_the_readme_imports_and_every_option_it_names_is_there():
    text = (HERE / "README.md").read_text()
    for module, names in re.findall(r"^from (\w+) import (.*)$", text, re.M):
        if (HERE / f"{module}.py").exists():
            assert all(hasattr(sys.modules[module], name) for name in names.split(", ")), (module, names)
    scripts = "".join((HERE / f"{name}.py").read_text() for name in ("pretrain", "finetune", "datasets"))
    known = set(re.findall(r'"(--[a-z-]+)"', scripts))
    known |= {f"--{name.replace('_', '-')}" for name in Wav2Vec2("tiny").settings}
    of_others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts", "--rdzv_conf",
                 "--ipc", "--depth", "--logdir"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)) - known <= of_others


def test_the_readme_has_the_recipes_of_the_data_sets():
    """Updates, batch and learning rate, in the table of data sets."""
    rows, told = re.findall(r"^\| (`.*?) \| .* \| ([^|]*\d x \d[^|]*) \|$", (HERE / "README.md").read_text(), re.M), {}
    for names, recipes in rows:
        told.update(zip(re.findall("`(.+?)`", names), recipes.split("; "), strict=True))
    for name in finetune.RECIPES.keys() - {"synth", "folder", "csv"}:
        recipe = {**finetune.DEFAULTS, **finetune.RECIPES[name]}
        assert name in told, f"the README's table of data sets has no row for {name}"
        updates, batch_size, lr = told[name].replace(",", "").replace(" x", "").split()
        assert (int(updates), int(batch_size), float(lr)) == (recipe["updates"], recipe["batch_size"], recipe["lr"])


def test_the_readme_has_the_numbers_of_synthetic_clips():
    readme = " ".join((HERE / "README.md").read_text().split())
    unlabelled, held_out = datasets.open_unlabelled(["synth"], 5.0)
    train, test = (option.default for option in inspect.signature(datasets.synth_labelled).parameters.values())
    assert f"{train:,} labelled synthetic clips" in readme and f"{len(unlabelled):,} unlabelled" in readme
    assert f"on {test} clips" in readme and len(held_out) == 100


def test_the_readme_points_at_code_for_all_of_the_paper():
    """Its table names what exists, and leaves no section, equation, table or figure out."""
    rows = re.findall(r"^- ((?:Sec|Fig)\..*?): (`.*)$", (HERE / "README.md").read_text(), re.M)
    for _, places in rows:
        for module, path in re.findall(r"`(\w+)\.([\w.]+)`", places):
            found = sys.modules[module]
            for name in path.split("."):
                found = getattr(found, name)
    text = " ".join(place for place, _ in rows)
    for place in ("Sec. 2.1", "Sec. 2.2", "Sec. 2.3", "Sec. 3.1", "Sec. 3.2", "Sec. 4 ", "Sec. 4.1", "Sec. 4.2",
                  "Sec. 4.3", "Sec. 5.1.1", "Sec. 5.1.2", "Sec. 5.1.3", "Sec. 5.2", "Eq. 1", "Eq. 2", "Fig. 1a",
                  "Fig. 1b", "Fig. 1c", "Fig. 2a", "2b", "2c", "Table 1", "Table 2", "Table 3"):
        assert place in text, place


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return os.mkdir, ("code_ran",)


@pytest.mark.parametrize("script, options, word", [
    ("pretrain.py", "--data nowhere", "nowhere"),
    ("pretrain.py", "--data empty", "datasets.py pack"),
    ("pretrain.py", "--heads 7", "heads"),
    ("pretrain.py", "--blocks 1000000000", "--blocks: must be 1 to 16384"),
    ("pretrain.py", "--batch-size 1000000000", "--batch-size"),
    ("pretrain.py", "--batch-size 0", "--batch-size"),
    ("pretrain.py", "--batch-size many", "invalid int value"),
    ("pretrain.py", "--batch-size 6 --micro-batch 4", "is not a multiple"),
    ("pretrain.py", "--lr nan", "--lr"),
    ("pretrain.py", "--out text.pt", "is there already"),
    ("pretrain.py", "--kernel 4", "kernel"),
    ("pretrain.py", "--seconds 0.3", "--seconds"),
    ("pretrain.py", "--device nonsense", "nonsense"),
    ("finetune.py", "--init nowhere", "nowhere"),
    ("finetune.py", "--init text.pt", "damaged"),
    ("finetune.py", "--init evil.pt", "damaged"),
    ("finetune.py", "--init other.pt", "not from pretrain.py"),
    ("finetune.py", "--data esc50", "--root"),
    ("finetune.py", "--data audioset --root empty", "class_labels_indices.csv"),
    ("finetune.py", "--data folder --root empty", "no recordings"),
    ("finetune.py", "--data folder --root junk", "none of the 2 recordings can be read: a/1.wav: not readable"),
    ("finetune.py", "--data csv --root misspelt", "split"),
    ("finetune.py", "--data csv --root single", "all of one class"),
    ("finetune.py", "--data csv --root unlabelled", "of one class, or of none"),
    ("finetune.py", "--data csv --root one-trained", "all of one class"),
    ("finetune.py", "--data csv --root no-test", "2 clips to train on and 0 to test on"),
    ("finetune.py", "--data csv --root no-training", "0 clips to train on and 2 to test on"),
    ("finetune.py", "--data csv --root no-label", "no mAP on 1 clips to test"),        # before the first update
    ("finetune.py", "--data csv --root good --fold 2", "no folds"),
    ("finetune.py", "--data csv --root good --loss ce", "--loss ce"),
    ("finetune.py", "--predict a.wav --init empty", "no such file"),
    ("finetune.py", "--embed a.wav", "--out"),
    ("finetune.py", "--predict a.wav --embed b.wav --out e.npy", "not allowed with"),
    ("finetune.py", "--head stats --micro-batch 1", "--head stats"),
    ("finetune.py", "--data esc10 --loss ce --head frames", "--loss ce"),
    ("finetune.py", "--root good", "--root needs --data"),
    ("finetune.py", "--fraction 1.5", "--fraction"),
    ("datasets.py", "pack nowhere out", "nowhere"),
    ("datasets.py", "pack empty out", "no recordings")])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, call, script, options, word):
    (tmp_path / "empty").mkdir()
    lay_out(tmp_path, {"text.pt": ["no checkpoint"]}, [("junk/a/1.wav", 1, 0), ("junk/b/2.wav", 1, 0)])
    torch.save(dict(model=Evil()), tmp_path / "evil.pt")
    torch.save(dict(model={}, settings={}, script="finetune.py", log_mels=LOG_MELS), tmp_path / "other.pt")
    for name, *rows in (("good", "1.wav,a;b,train", "2.wav,b,test"), ("misspelt", "1.wav,a,train", "2.wav,b,tset"),
                        ("unlabelled", "1.wav,,train", "2.wav,a;b,test"),
                        ("single", "1.wav,a,train", "2.wav,a,test"), ("one-trained", "1.wav,a,train", "2.wav,b,test"),
                        ("no-test", "1.wav,a,train", "2.wav,b,train"), ("no-training", "1.wav,a,test", "2.wav,b,test"),
                        ("no-label", "1.wav,a;b,train", "2.wav,b,train", "3.wav,,test")):
        if name in options.split():
            write_table(tmp_path, *rows).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    message = call(script, *options.split(), code=2)
    assert word in message and message.count("\n") == 1, message
    assert not (tmp_path / "code_ran").exists()


def test_a_damaged_checkpoint_is_refused(pretrained, tmp_path):
    """Cut off anywhere, or other bytes altogether; of another version, or with settings that do not exist."""
    whole, random = (pretrained[1] / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    cut = [whole[:n] for n in np.linspace(0, len(whole) - 1, 20).astype(int)]
    for damage in [*cut, b"junk", *(random.bytes(n) for n in range(1, 100))]:
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(InputError, match="damaged, or not what it should be"):
            load_checkpoint(tmp_path)
    content = load_checkpoint(pretrained[1])
    for change in (dict(settings=dict(size="tiny", colour="red")), dict(settings=dict(size="huge")), dict(model={})):
        with pytest.raises(InputError, match="damaged, or not what it should be"):
            pretrain.load_encoder(dict(content, **change))


def test_interrupting_ends_in_a_line_whatever_threads_do(monkeypatch, capfd):
    """By Ctrl-C, and at once, though a thread is busy for ever."""
    def main():
        results = datasets.in_threads(lambda _: threading.Event().wait(), range(9), 2)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        next(iter(results))

    monkeypatch.setattr(pretrain, "main", main)
    signal.signal(signal.SIGINT, signal.default_int_handler)            # a background job ignores it
    assert run_forked("pretrain.py") == [130] and capfd.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "out of memory: give a smaller"), (torch.OutOfMemoryError(), "out of memory: give a smaller"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: give a smaller"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ...\nand more"),
     "--compile found no C++ compiler"),
    (RuntimeError("Cannot find a working triton installation\n"), "no Triton for the GPU")])
def test_what_is_missing_is_said_in_a_line(monkeypatch, call, error, message):
    def fail():
        raise error
    monkeypatch.setattr(pretrain, "main", fail)
    printed = call("pretrain.py", code=2)
    assert message in printed and printed.count("\n") == 1


def test_a_notebook_can_run_a_script(monkeypatch):
    """There stdout is no text file."""
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=len, flush=list))
    datasets.run_script(lambda: None)
