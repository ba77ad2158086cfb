"""Fine-tune a pre-trained conformer on labelled sound (Sec. 4), or train one from scratch.

The labels of the synthetic sounds, starting from what `python pretrain.py` learned, and without:
    python finetune.py --init
    python finetune.py
ESC-50 or ESC-10, all five folds, from your own pre-training, with all labels and a third:
    python finetune.py --data esc50 --root /my/ESC-50 --init runs/mine --fold all
    python finetune.py --data esc10 --root /my/ESC-50 --init runs/mine --fold all --fraction 0.333
Several GPUs: `torchrun --nproc_per_node=8 finetune.py ...`. Then use the result:
    python finetune.py --predict dog.wav rain.mp3 --init runs/finetune
    python finetune.py --embed dog.wav rain.mp3 --init runs/finetune --out embeddings.npy
    python finetune.py --predict dog.wav --init runs/finetune --plot dog.png --tsv events.tsv
The run's folder has a model for each fold and fraction, and a line of JSON for each in results.jsonl.

Shapes: B clips, S samples, T frames, L latents in time, D width, C classes.
"""
import copy
import functools
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import metrics
from conformer import BatchNorm, Dropout
from datasets import (READERS, Bar, InputError, Parser, batches, claim, collate, derive_seed, download_esc50,
                      find_device, in_range, load_labelled, open_audio, read_audio, reading, run_script, write_events)
from frontend import HOP, MELS, SAMPLE_RATE, LogMel, frame_count, mean_and_variance, padding_mask
from pretrain import MAX_CONSECUTIVE_SKIPS, autocast, finish, init_distributed, parse_run, save_checkpoint
from wav2vec2 import SIZES, Wav2Vec2, load_checkpoint, load_encoder, load_weights

# Each metric's function returns its value, or one for each class, to be averaged.
METRICS = dict(accuracy=metrics.accuracy, mAP=metrics.average_precisions, MAUC=metrics.areas_under_roc,
               lwlrap=metrics.lwlrap)

# Defaults of these options, overridden by the data set's line in RECIPES. The paper names the batches of 640 and 64,
# the heads, AudioSet's balancing, the augmentations and the weight of 2 (Sec. 4); the rest it found by sweeps that it
# does not print. ESC-10 and synth were tried here, the others not; sets of one's own, often as small, get ESC-10's.
DEFAULTS = dict(updates=2000, batch_size=32, lr=5e-4, seconds=10.0, head="mean", head_dropout=0.1,
                balance=False, augment=["jitter", "time_mask", "mixup"], consistency=2.0, loss="bce", encoder_lr=1.0,
                layer="last")
FEW_LABELS = dict(updates=1000, batch_size=16, lr=1e-3, head="stats", augment=["jitter"], consistency=0.0,
                  encoder_lr=0.1, layer="middle")
RECIPES = {
    "synth": dict(updates=250, lr=1e-3, augment=[], consistency=0.0),
    "folder": FEW_LABELS,
    "csv": FEW_LABELS,
    "esc10": dict(FEW_LABELS, updates=400, seconds=3.0, loss="ce"),
    "esc50": dict(updates=4000),
    "audioset": dict(updates=60_000, batch_size=640, lr=3e-4, head="frames", balance=True),
    "audioset-balanced": dict(updates=20_000, batch_size=64, lr=3e-4, head="frames"),
    "fsdkaggle2019": dict(updates=12_000, batch_size=64, lr=3e-4, head_dropout=0.3),
    "fsdkaggle2019-curated": dict(updates=6000, batch_size=64, lr=3e-4, head_dropout=0.3),
    "fsdkaggle2019-noisy": dict(updates=8000, batch_size=64, lr=3e-4, head_dropout=0.3),
    "dcase2019": dict(updates=5000, batch_size=64, lr=3e-4, head_dropout=0.3),
    "magnatagatune": dict(updates=10_000, batch_size=64, lr=3e-4, head_dropout=0.3),
    "kinetics700": dict(updates=60_000, batch_size=256, lr=3e-4),
}
FREEZE_LR = 1e-2        # a linear layer on standardised embeddings takes a larger learning rate


def linear_softmax(logits, padding_mask=None):
    """Pool frame probabilities p into clip probabilities (Sec. 4; TALNet, Wang et al. 2019), all as logits.

    A mean in which each frame has its own probability as weight: sum of p^2 / sum of p over time. Its logit is
    log(sum of p^2) - log(sum of p (1 - p)), which has gradients however large the logits are.
    (B, L, C), padding_mask (B, L) or None -> (B, C).
    """
    squares, rest = linear_softmax_sums(logits, padding_mask)
    return squares - rest


def linear_softmax_sums(logits, padding_mask=None):
    """log(sum of p^2) and log(sum of p (1 - p)) over time: (B, L, C), padding_mask (B, L) or None -> two (B, C)."""
    log_p, log_not_p = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
    if padding_mask is not None:
        log_p = log_p.masked_fill(padding_mask[:, :, None], -torch.inf)
    return (2 * log_p).logsumexp(1), (log_p + log_not_p).logsumexp(1)


def mean_over_time(x, padding_mask=None):
    """Mean of (B, L, D) over the steps that are not padding: (B, D)."""
    if padding_mask is None:
        return x.mean(1)
    valid = ~padding_mask[:, :, None]
    return (x * valid).sum(1) / valid.sum(1)


def stats_over_time(x, padding_mask=None):
    """Mean and standard deviation of (B, L, D) over the steps that are not padding: (B, 2 D)."""
    mean = mean_over_time(x, padding_mask)
    variance = mean_over_time((x - mean[:, None]).square(), padding_mask)
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)       # without it, sqrt has no gradient at 0


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, with its gradient, which `dist.all_reduce` by itself does not have."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)      # the losses of all processes depend on the sum


class Standardise(BatchNorm):
    """Each component to mean 0 and variance 1 over a batch's steps that are not padding, those of all processes: one
    alone may have very few. (B, L, D), padding_mask (B, L) or None -> (B, L, D)."""

    def __init__(self, dim):
        super().__init__(dim, affine=False)

    def forward(self, x, padding_mask=None):
        if not (self.training and dist.is_initialized()):
            return super().forward(x, padding_mask)
        valid = x.flatten(0, 1) if padding_mask is None else x[~padding_mask]       # (N, D)
        add = SumOverProcesses.apply
        count = add(valid.new_tensor(len(valid)))
        mean = add(valid.sum(0)) / count
        variance = add((valid - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps)


class Classifier(nn.Module):
    """A pre-trained encoder, up to block `layer` (see `Wav2Vec2.block_number`, which may raise InputError), and one of
    the paper's two heads (Sec. 4), or a third: log-mels to logits (B, C).

    head "frames" is AudioSet's: a linear layer at each step, then linear softmax pooling. head "mean" is that of
    all other tasks: embeddings averaged over time, then a linear layer. head "stats", not the paper's, sees their
    standard deviation over time too (Snyder et al. 2017), which with few labels is worth much. With `freeze` the
    encoder stays as it is. Then, and for "stats", the linear layer gets its input standardised, as in MAE's linear
    probe (He et al. 2022).
    """

    def __init__(self, encoder, classes, head="mean", dropout=0.1, freeze=False, layer="last"):
        super().__init__()
        if head not in ("mean", "stats", "frames"):
            raise ValueError(f"no head '{head}'")
        self.encoder, self.head, self.freeze = encoder, head, freeze
        self.single_label = False       # `load` sets it for what --loss ce trained: softmax, not sigmoids
        encoder.requires_grad_(not freeze)
        encoder.output_proj.requires_grad_(False)       # only pre-training needs these two, and
        encoder.mask_embedding.requires_grad_(False)    # DDP refuses unused parameters
        self.layer = encoder.block_number(layer)
        encoder.conformer.blocks[self.layer:].requires_grad_(False)
        dim = encoder.settings["dim"] * (2 if head == "stats" else 1)
        self.standardise = Standardise(dim) if freeze or head == "stats" else None
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(dim, classes)

    def train(self, mode=True):
        """Training mode, or evaluation mode; a frozen encoder stays in the latter, without dropout."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def classify(self, x, padding_mask=None):
        """Embeddings (B, L, D), padding_mask (B, L) or None -> logits (B, L, C), float32: in bf16 many would tie."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.standardise is not None:
                x = self.standardise(x, padding_mask)
            return self.linear(self.dropout(x))

    def pool(self, x, padding_mask=None):
        """The head: embeddings (B, L, D) and their padding mask (B, L) or None -> logits (B, C)."""
        if self.head == "frames":
            return linear_softmax(self.classify(x, padding_mask), padding_mask)
        pool = stats_over_time if self.head == "stats" else mean_over_time
        return self.classify(pool(x.float(), padding_mask)[:, None])[:, 0]

    def forward(self, log_mel, padding_mask=None):
        """log_mel (B, T, 64), padding_mask (B, T) or None -> logits (B, C), float32."""
        return self.pool(*self.encoder.encode(log_mel, padding_mask, self.layer))

    def probabilities(self, logits):
        """Logits (B, C) -> probabilities (B, C)."""
        return logits.softmax(1) if self.single_label else logits.sigmoid()


def three_stage_lr(update, updates, peak, shares=(0.3, 0.3, 0.4)):
    """Learning rate of Sec. 4.3: a linear warm-up from a hundredth of the peak, a hold, and an exponential decay to
    a twentieth (start and end as wav2vec 2.0 is fine-tuned in fairseq)."""
    warmup, hold, decay = (share * updates for share in shares)
    if update < warmup:
        return peak * (0.01 + 0.99 * update / warmup)
    if update < warmup + hold or decay == 0:
        return peak
    return peak * 0.05 ** ((update - warmup - hold) / decay)


def consistency(logits, others, loss="bce"):
    """Symmetric KL divergence KL(p || q) + KL(q || p) of two predictions for the same clips (Sec. 4.2).

    logits and others (B, C) -> scalar. For loss "bce" between the Bernoulli distributions of each class, mean over
    classes and clips; for "ce" between the two softmaxes, mean over clips. The sum of the two divergences simplifies
    to (p - q) (logit p - logit q) and, for softmaxes, (p - q) (log p - log q): nothing in it can overflow.
    """
    if loss == "ce":
        difference = logits.softmax(1) - others.softmax(1)
        return (difference * (logits.log_softmax(1) - others.log_softmax(1))).sum(1).mean()
    return ((logits.sigmoid() - others.sigmoid()) * (logits - others)).mean()


def compute_loss(logits, target, args):
    """The loss of V versions of the same clips (Sec. 4.2): logits (V B, C), target (B, C) -> scalar."""
    targets = target.repeat(len(logits) // len(target), 1)
    if args.loss == "ce":
        loss = F.cross_entropy(logits, targets.argmax(1))
    else:
        loss = F.binary_cross_entropy_with_logits(logits, targets)
    if args.consistency:
        loss = loss + args.consistency * consistency(*logits.chunk(2), args.loss)
    return loss


def gather(x, world):
    """Concatenate a tensor over all processes: (B / world, ...) -> (B, ...), padded to the longest."""
    if world == 1:
        return x
    if x.dim() > 1:
        longest = torch.tensor(x.shape[1], device=x.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        x = F.pad(x, (0, 0, 0, int(longest) - x.shape[1]))
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


@torch.no_grad()
def augment_batch(waveform, lengths, frontend, args, generator, rank=0, world=1):
    """The versions of a batch that are trained on, each after the augmentations of Sec. 4.1: a list of log-mels
    (B, T, 64), and their padding mask. With the consistency loss there are two versions.

    waveform (B, S) is this process's part of a batch. The random numbers are drawn for the whole batch, whichever
    part this process has, and mixup's partners come from all of it.
    """
    B, versions = len(waveform), []
    mine = slice(rank * B, (rank + 1) * B)
    for _ in range(2 if args.consistency else 1):
        rand = torch.rand(world * B, 4, generator=generator)[mine].to(waveform.device)
        order = torch.randperm(world * B, generator=generator)[mine].to(waveform.device)
        version = augment.jitter(waveform, rand[:, 0]) if "jitter" in args.augment else waveform
        log_mel = frontend(version, lengths)
        padding = padding_mask(lengths, log_mel)
        if "time_mask" in args.augment:
            log_mel = augment.time_mask(log_mel, rand[:, 1:3], padding)
        if "mixup" in args.augment:
            frames = frame_count(gather(lengths.to(waveform.device), world))[order]
            partner = gather(log_mel, world)[order, :log_mel.shape[1]]
            log_mel = augment.mixup(log_mel, partner, rand[:, 3], frames)
        versions.append(log_mel)
    return versions, padding


# ------------------------------------------------------------------------------------------ training and testing


def parse(argv=None):
    """The options, with what the data set leaves open filled in, and the checkpoint to resume from or None. Raises
    InputError for impossible options."""
    parser = Parser(prog="finetune.py", description=__doc__,
                    epilog="Some defaults depend on the data set (RECIPES in finetune.py).")
    share = in_range(float, 0, 1)

    def block(text):
        return text if text in ("middle", "last") else in_range(int, 1, 1000)(text)

    group = parser.add_argument_group("run")
    group.add_argument("--init", nargs="?", const="runs/pretrain", metavar="RUN", help="start from this pre-training "
                       "run (no name: runs/pretrain); without it, from scratch")
    group.add_argument("--out", help="folder of this run (runs/finetune; from scratch runs/scratch)")

    group = parser.add_argument_group("use a model")
    group.add_argument("--predict", nargs="+", metavar="SOUND", help="print what is heard in recordings of any length "
                       "by the model --init (a run's folder, or a .pt in it): the five most probable classes and, for "
                       "models with the head 'frames', when each is heard")
    group.add_argument("--embed", nargs="+", metavar="SOUND", help="write embeddings by --init, which may be "
                       "pre-trained only, to --out: .npy with a row for each recording, mean and standard deviation "
                       "over time")
    group.add_argument("--frames", action="store_true", help="with --embed: a row for each 80 ms; --out is .npz")
    group.add_argument("--layer", type=block, help="the conformer block whose output is used: a number, 'last', or "
                       "'middle', which did best on ESC-10 (--embed, esc10, folder, csv: middle, else last)")
    group.add_argument("--threshold", type=share, default=0.5, help="with --predict: of frame probabilities; a lower "
                       "one finds more events, and more that are none (%(default)s)")
    group.add_argument("--json", action="store_true", help="with --predict: a line of JSON for each recording, with "
                       "all classes")
    group.add_argument("--tsv", metavar="FILE", help="with --predict: write the events of all recordings as DCASE has "
                       "them, tab-separated: filename (without folder), onset, offset (in seconds), event_label")
    group.add_argument("--plot", metavar="FILE", help="with --predict of one recording: a picture (.png, .svg, .pdf) "
                       "of its log-mels, and of when the five most probable classes are heard")

    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=READERS, default="synth", help="the labelled set: synth is made on the fly; "
                       "'folder' are your own sounds, a sub-folder a class; 'csv' is a table of your own with the "
                       "columns file, labels (separated by ;) and perhaps split (train, valid, test or the number of a "
                       "fold) and group (of clips that stay together) (%(default)s)")
    group.add_argument("--root", help="where the data set lies, in its official layout, or packed by `datasets.py pack "
                       "--data`; for csv the table")
    group.add_argument("--download", action="store_true", help="esc50 and esc10: fetch ESC-50 (600 MB) into --root "
                       "first, if it isn't there")
    group.add_argument("--fold", help="for sets that come in folds, the one to test on, or 'all', one after the other "
                       "(1)")
    group.add_argument("--fraction", type=in_range(float, 1e-6, 1), nargs="+", default=[1.0], help="of the training "
                       "clips, class by class; several are tried one after the other (%(default)s)")
    group.add_argument("--balance", action="store_true", default=None, help="draw all classes equally often (Sec. "
                       "4.1); rare classes learn more, and their few clips are seen again and again (for audioset)")
    group.add_argument("--seconds", type=in_range(float, 0.1, 3600), help="longest clip in training: of longer ones a "
                       "random crop each time, which also works against overfitting; clips are tested whole (10; "
                       "esc10 3)")
    group.add_argument("--validate", action="store_true", help="where a set has no validation clips, hold out a tenth "
                       "of the training clips, or the next fold. With validation clips, the weights that do best on "
                       "them, tried about twenty times, are those that are tested; without, the last")
    group.add_argument("--no-test", action="store_true", help="leave the test set alone and report the last weights' "
                       "score on the validation clips: for choosing options")

    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=SIZES, help="from scratch (tiny); with --init the size is that of the run")
    group.add_argument("--head", choices=["mean", "stats", "frames"], help="'mean': average the embeddings, then a "
                       "linear layer; 'stats': average and standard deviation, better with few labels; 'frames': "
                       "probabilities at each step, then linear softmax pooling, which also tells when (mean; "
                       "audioset frames; esc10, folder, csv stats)")
    group.add_argument("--freeze", action="store_true", help="train the head only, on standardised embeddings (linear "
                       "probe)")
    group.add_argument("--head-dropout", type=in_range(float, 0, 0.99), help="before the output layer; more helps "
                       "against overfitting with few labels (0.1 to 0.3)")

    group = parser.add_argument_group("optimisation (Sec. 4)")
    group.add_argument("--updates", type=in_range(int, 1, 10**9), help="(by data set: from 250 for synth to 60000 for "
                       "audioset; folder and csv 1000, for some hundred clips)")
    group.add_argument("--batch-size", type=in_range(int, 1, 10**6), help="clips in an update, over all processes; "
                       "large sets like larger ones (16 to 640)")
    group.add_argument("--lr", type=in_range(float, 1e-12, 1e6), help="peak learning rate (3e-4 to 1e-3; frozen 1e-2)")
    group.add_argument("--encoder-lr", type=share, help="learning rate of a pre-trained encoder, as a share of --lr; "
                       "less changes it less (1; esc10, folder, csv 0.1)")
    group.add_argument("--stages", type=share, nargs=3, default=[0.3, 0.3, 0.4], metavar=("WARMUP", "HOLD", "DECAY"),
                       help="shares of the updates (%(default)s)")
    group.add_argument("--loss", choices=["bce", "ce"], help="binary cross-entropy, as in the paper, or, where a clip "
                       "has one label, cross-entropy (bce; esc10 ce)")
    group.add_argument("--augment", nargs="*", choices=["jitter", "time_mask", "mixup"], metavar="NAME", help="which "
                       "of jitter, time_mask and mixup (Sec. 4.1) to apply; --augment alone: none (all; esc10, folder, "
                       "csv jitter; synth none)")
    group.add_argument("--consistency", type=in_range(float, 0, 1e6), help="weight of the consistency loss (Sec. 4.2): "
                       "augment each clip twice and pull the two predictions together; 0 switches it off and halves "
                       "the time (2; synth, esc10, folder, csv 0)")

    def complete(args):
        if (args.tsv or args.plot) and not args.predict or args.frames and not args.embed:
            raise InputError("--tsv and --plot are for --predict, --frames is for --embed")
        if args.predict or args.embed:
            if args.predict and args.embed:
                raise InputError("--predict or --embed: one of them at a time")
            if args.embed and not args.out:
                raise InputError("--embed needs --out, the .npy file to write")
            if args.plot and (len(args.predict) != 1 or Path(args.plot).suffix not in (".png", ".svg", ".pdf")):
                raise InputError("--plot draws one recording, which --predict names, into a .png, .svg or .pdf")
            args.init, args.batch_size = args.init or "runs/finetune", 1
            return args
        if args.resume and not args.out:
            raise InputError("--resume needs --out, the folder of the run")
        args.out = args.out or ("runs/finetune" if args.init else "runs/scratch")
        recipe = {**DEFAULTS, **RECIPES.get(args.data, {}), **({"lr": FREEZE_LR} if args.freeze else {})}
        if not args.init:
            recipe.update(encoder_lr=1.0, layer="last")         # those are for pre-trained encoders
        for name, value in recipe.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if abs(sum(args.stages) - 1) > 1e-3:
            raise InputError(f"--stages {args.stages} must be three shares that sum to 1")
        if args.loss == "ce" and args.head == "frames":
            raise InputError("--loss ce is for --head mean or stats: it leaves frame probabilities without a scale")
        if (args.freeze or args.head == "stats") and 1 in (args.batch_size, args.micro_batch):
            raise InputError("--freeze and --head stats standardise over a batch, which needs two clips at least: "
                             "raise --batch-size or --micro-batch, or use --head mean without --freeze")
        if args.size is not None and args.init is not None:
            raise InputError("--size is for training from scratch: with --init it is that of the run")
        if args.download and (args.data not in ("esc50", "esc10") or args.root is None):
            raise InputError("--download is for --data esc50 or esc10, and needs --root, where to put it")
        return args

    return parse_run(parser, argv, complete)


def plan(data, args):
    """What is trained one after the other: a list of (fraction, fold), the fold None for sets without folds.

    Raises InputError for options that don't fit the data.
    """
    if args.loss == "ce" and any(len(own) != 1 for own in data.labels):
        raise InputError(f"--loss ce is for one label a clip; in {args.data} some have more or none: use bce")
    if args.no_test and not args.validate and not (data.splits == "valid").any():
        raise InputError("--no-test needs validation clips: give --validate too")
    folds = sorted(set(data.splits.tolist()))
    if not all(name.isdigit() for name in folds):
        folds = [None]          # train, valid and test
    if args.fold not in (None, "all", *folds):
        raise InputError(f"--fold {args.fold}: {args.data} has " + (
            f"{', '.join(folds)}, all" if folds != [None] else "no folds; leave it out"))
    folds = folds if args.fold == "all" else folds[:1] if args.fold is None else [args.fold]
    return [(fraction, fold) for fraction in args.fraction for fold in folds]


def split(data, fold, fraction, args):
    """Training, validation and test set; see --fraction and --validate. fold: None for sets without.

    Raises InputError where there are too few folds or clips for that.
    """
    splits = data.splits
    if fold is None:
        training, valid, test = (np.flatnonzero(splits == name) for name in ("train", "valid", "test"))
    else:
        training, test = np.flatnonzero(splits != fold), np.flatnonzero(splits == fold)
        valid = training[:0]
    if args.validate and len(valid) == 0:
        if fold is None:
            valid = np.setdiff1d(training, data.subset(training).fraction(0.9, args.seed).rows)
        else:
            others = sorted(set(splits[training].tolist()))
            if len(others) < 2:
                raise InputError("--validate needs three folds at least: to train, to validate, to test")
            following = next((other for other in others if other > fold), others[0])
            valid = np.flatnonzero(splits == following)
        training = training[~np.isin(data.groups[training], data.groups[valid])]
    if len(training) == 0 or len(test) == 0 and not args.no_test:
        raise InputError(f"{args.data}: {f'fold {fold}' if fold else 'its splits'} give {len(training)} "
                         f"clips to train on and {len(test)} to test on; is the set's table whole?")
    if args.validate and len(valid) == 0:
        raise InputError(f"--validate: {args.data} has too few clips of a class to hold out a tenth")
    training = data.subset(training)
    if fraction < 1:
        training = training.fraction(fraction, args.seed)
    training.seconds = args.seconds
    return training, data.subset(valid), data.subset(test)


def build(args, training, init, device):
    """A new classifier, and the frontend: from the pre-training checkpoint `init` or, if it is None, from scratch."""
    torch.manual_seed(args.seed)
    if init:
        encoder, frontend = load_encoder(init)
        load_weights(init, encoder, frontend)
    else:
        encoder, frontend = Wav2Vec2(args.size or "tiny"), LogMel()
        some = np.linspace(0, len(training) - 1, min(len(training), 512)).astype(int)
        frontend.fit_normalization(collate([(training.waveform(i), 0)])[:2] for i in some)
    if args.compile:
        for block in encoder.conformer.blocks:
            block.compile()             # in place: the names of the weights stay the same
    model = Classifier(encoder, len(training.classes), args.head, args.head_dropout, args.freeze, args.layer)
    return model.to(device).train(), frontend.to(device)        # `train` also keeps a frozen encoder in evaluation mode


@torch.no_grad()
def compute_logits(model, frontend, data, args, device, rank=0, world=1, batch_seconds=320):
    """Logits (N, C) for all clips of a labelled set, each whole; of all processes together.

    Clips of similar length go together, so that little is padded, and fewer of the longer ones. No clip is scored
    twice. Raises InputError for logits that are not finite.
    """
    model.eval()
    logits = torch.zeros(len(data), len(data.classes))
    by_length, parts = np.argsort(-data.lengths, kind="stable")[rank::world], []
    while len(by_length):
        fit = max(1, min(256, int(batch_seconds * SAMPLE_RATE / data.lengths[by_length[0]])))
        parts.append(by_length[:fit])
        by_length = by_length[fit:]
    for part in tqdm(parts, "evaluate", leave=False, disable=True if rank else None):
        waveform, lengths, numbers = collate([(data.waveform(n), n) for n in part])
        log_mel = frontend(waveform.to(device), lengths)
        with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):        # so many shapes
            logits[numbers] = model(log_mel, padding_mask(lengths, log_mel)).float().cpu()
    if not logits.isfinite().all():
        raise InputError("the model's predictions are not finite: lower --lr")
    if world > 1:               # each clip is 0 everywhere but in one process
        logits = logits.to(device)
        dist.all_reduce(logits)
    return logits.cpu()


def evaluate(model, frontend, data, args, device, rank, world):
    """The data set's metric, and how many classes it is the mean of (None: it is of clips).

    Leaves the model in training mode. Raises InputError where the metric has no answer.
    """
    logits = compute_logits(model, frontend, data, args, device, rank, world)
    model.train()
    targets = data.targets(range(len(data)))
    try:
        value = METRICS[data.metric](logits, targets)
        if np.ndim(value) == 0:
            return value, None
        return metrics.mean_over_classes(value), int(np.isfinite(value).sum())
    except ValueError as error:
        raise InputError(f"no {data.metric} on these {len(data)} clips: {error}") from None


def add_gradients(wrapped, versions, padding, target, args):
    """Forward and backward pass of a batch, in parts of --micro-batch clips: V versions (B, T, 64), their padding mask,
    (B, T) or None, target (B, C) -> the mean loss, without gradient."""
    B, total = len(target), torch.zeros((), device=target.device)
    micro_batch = args.micro_batch or B
    for i in range(0, B, micro_batch):
        part = slice(i, i + micro_batch)
        mask = None if padding is None else padding[part].repeat(len(versions), 1)
        wrapped.require_backward_grad_sync = i + micro_batch == B           # between processes: once
        with autocast(target.device, args.dtype):                           # (V B, C): all versions in one pass
            logits = wrapped(torch.cat([version[part] for version in versions]), mask)
        loss = compute_loss(logits, target[part], args) * micro_batch / B
        loss.backward()
        total += loss.detach()
    return total


def train(model, frontend, training, valid, args, processes, label, save, state):
    """Fine-tune in place; with validation clips the model ends with the weights that did best on them. Returns the
    validation scores, dict(best=, last=), None without validation clips. `save(model, **content)` writes a checkpoint;
    `state` is the content of one, or has update=0. Raises InputError after MAX_CONSECUTIVE_SKIPS updates in a row that
    are not finite."""
    device, rank, world, signals = processes
    wrapped = model if world == 1 else DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=model.linear.parameters(), lr_share=1.0),
              dict(params=[p for p in model.encoder.parameters() if p.requires_grad], lr_share=args.encoder_lr)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=device.type != "mps")
    first, scores, best_weights, skips_in_a_row = 0, dict(best=None, last=None), None, 0
    if state["update"]:
        load_weights(state, model, frontend)
        optimizer.load_state_dict(state["optimizer"])
        first, scores, best_weights = state["update"], state["scores"], state["best_weights"]
    loader = batches(training, args.batch_size, args.updates, args.seed, first, rank, world, args.workers,
                     clips_by_class=training.clips_by_class() if args.balance else None)
    bar, validate_every = Bar(args.updates, first, label, silent=rank > 0), max(1, args.updates // 20)
    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the set.
    for update, (waveform, lengths, numbers) in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_share"] * three_stage_lr(update, args.updates, args.lr, args.stages)
        generator = torch.Generator().manual_seed(derive_seed(1, args.seed, update))    # the same on any device
        torch.manual_seed(derive_seed(2, args.seed, update, rank))                      # dropout
        versions, padding = augment_batch(waveform.to(device, non_blocking=True), lengths, frontend, args, generator,
                                          rank, world)
        target = torch.from_numpy(training.targets(numbers)).to(device)
        loss = add_gradients(wrapped, versions, padding, target, args) / world          # our share of the mean
        sums = torch.stack([loss, loss.new_tensor(len(signals))])
        if world > 1:
            dist.all_reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)                          # as in pre-training
        loss, stopping, norm = torch.cat([sums, norm[None]]).tolist()                   # waits for the device, once
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimizer.step()
        skips_in_a_row = 0 if finite else skips_in_a_row + 1
        optimizer.zero_grad()
        if skips_in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise InputError(f"loss or gradient not finite in {skips_in_a_row} updates in a row, now at {update + 1} "
                             f"with {', '.join(training.names[n] for n in numbers[:3])}, ...: lower --lr")

        done = update + 1
        bar.show(done, f"loss {loss:.3f}" + (f" best {scores['best']:.3f}" if scores["best"] is not None else ""))
        if len(valid) and (done == args.updates or done % validate_every == 0):
            scores["last"], _ = evaluate(model, frontend, valid, args, device, rank, world)
            if scores["best"] is None or scores["last"] > scores["best"]:
                scores["best"], best_weights = scores["last"], copy.deepcopy(model.state_dict())
        if done < args.updates and (stopping or done % args.checkpoint_every == 0):
            if rank == 0:
                save(model, update=done, frontend=frontend.state_dict(), optimizer=optimizer.state_dict(),
                     scores=scores, best_weights=best_weights)
            if stopping:
                finish(args, rank, world, signals, stopped=True)        # exits
    bar.close()
    if best_weights:
        model.load_state_dict(best_weights)
    return scores


def run_job(job, fraction, fold, data, init, args, processes, save, state, say):
    """Train and test one fold with a fraction of the labels. Returns its line of results.jsonl."""
    device, rank, world, _ = processes
    training, valid, test = split(data, fold, fraction, args)
    name, began = f"fold{fold}" if fold else "model", time.time()
    model, frontend = build(args, training, init, device)
    scores = train(model, frontend, training, valid, args, processes, name, functools.partial(save, job=job), state)
    tested, score, classes = valid, scores["last"], None
    if not args.no_test:
        tested, (score, classes) = test, evaluate(model, frontend, test, args, device, rank, world)
    line = dict(fold=fold, fraction=fraction, metric=data.metric, score=score, valid_best=scores["best"],
                valid_last=scores["last"], classes=classes, train=training.fingerprint(), test=tested.fingerprint(),
                minutes=round((time.time() - began) / 60, 2), args=vars(args))
    say(f"{name}: {'validation ' * args.no_test}{data.metric} {score:.3f} on {len(tested)} clips"
        + f" over {classes} classes" * (classes is not None)
        + (f" (validation: last {scores['last']:.3f}, best of about twenty {scores['best']:.3f})" if len(valid) else "")
        + f", after {len(training)} clips x {args.updates * args.batch_size / len(training):.0f} epochs, "
        f"{line['minutes']:.1f} min\n    trained on {line['train']}\n    tested on {line['test']}")
    if rank == 0:
        save_checkpoint(Path(args.out) / f"{name}_fraction{fraction:g}.pt", model, frontend=frontend.state_dict(),
                        settings=model.encoder.settings, classes=data.classes, head=args.head, freeze=args.freeze,
                        layer=model.layer, script="finetune.py", args=vars(args))
    return model, line


def main():
    """Train and test on each fraction and fold, or use a model. Raises InputError where it can't start or continue."""
    args, state = parse()
    if args.predict or args.embed:
        return run_inference(args)
    if args.download and int(os.environ.get("RANK", 0)) == 0:
        download_esc50(args.root)       # before the processes join: the others wait ten minutes at most after that
    device, rank, world, signals = processes = init_distributed(args, state)
    init, out = load_checkpoint(args.init, "pretrain.py") if args.init else None, Path(args.out)
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
    data = load_labelled(args.data, args.root, say=say)
    jobs = plan(data, args)
    # No two pre-trainings end with the same mask embedding.
    start = init["model"]["mask_embedding"].numpy().tobytes() if init else b""
    fingerprint = hashlib.sha256(f"{data.fingerprint()} {' '.join(data.splits)} ".encode() + start).hexdigest()
    if state and state["data"] != fingerprint:
        raise InputError(f"{out} was started with other clips, labels, splits or another --init: name the same again")
    state = state or dict(job=0, update=0, lines=[])
    lines = state["lines"]
    say(f"on {device} x {world}; " + (f"from {args.init}" if init else f"{args.size or 'tiny'} from scratch"))
    if rank == 0:
        lock = claim(out)       # noqa: F841, held until the end
        (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save = functools.partial(save_checkpoint, out / "checkpoint.pt", args=vars(args), lines=lines, data=fingerprint,
                             script="finetune.py")
    for job, (fraction, fold) in enumerate(jobs):
        if job < state["job"]:
            continue
        model, line = run_job(job, fraction, fold, data, init, args, processes, save, state, say)
        lines.append(line)
        state = dict(job=job + 1, update=0)
        if rank == 0:
            with open(out / "results.jsonl", "a") as results:
                results.write(json.dumps(line) + "\n")
            save(model, **state)
        if fold and fold == jobs[-1][1] and args.fold == "all":
            scores = [line["score"] for line in lines if line["fraction"] == fraction]
            say(f"fraction {fraction:g}: mean {data.metric} over {len(scores)} folds {np.mean(scores):.3f} "
                f"(standard deviation {np.std(scores):.3f})")
    say(f"done: {out / 'results.jsonl'}")
    finish(args, rank, world, signals, stopped=False)


# ----------------------------------------------------------------------------------------------- using a model


def load(run, device="cpu"):
    """A model to use: (Classifier in evaluation mode, frontend, names of the classes).

    run: the folder of a run of finetune.py, or one of the .pt files in it. Of a run of pretrain.py it gives
    (Wav2Vec2, frontend, []), good for embeddings. Raises InputError where it is none of these.
    """
    path = Path(run)
    if path.is_dir() and not (path / "log.jsonl").exists():
        models = sorted(path.glob("*_fraction*.pt"))
        if len(models) != 1:
            raise InputError(f"{run}: holds {len(models)} fine-tuned models"
                             + f"; name one: {', '.join(map(str, models))}" * bool(models))
        path = models[0]
    content = load_checkpoint(path)
    if "settings" not in content:
        raise InputError(f"{path}: is what --resume needs of a run; name the run's folder, or a model in it")
    classes, (model, frontend) = content.get("classes", []), load_encoder(content)
    if classes:
        with reading(path, "use another model"):
            model = Classifier(model, len(classes), content["head"], 0.0, content["freeze"],
                               content.get("layer", "last"))
    load_weights(content, model, frontend)
    model.single_label = content["args"].get("loss") == "ce"
    return model.to(device).eval(), frontend.to(device), classes


@torch.no_grad()
def embed_windows(path, model, frontend, layer=None):
    """A recording of any length and rate, a minute at a time: its log-mels (T, 64) and embeddings (L, D) by block
    `layer` (None: the one that a classifier reads). Raises InputError for what `read_audio` can't read; so do `embed`
    and `tag`."""
    with open_audio(path) as file:
        seconds = file.frames / file.samplerate
    encoder, device = getattr(model, "encoder", model), frontend.mean.device
    stack = encoder.settings["stack"]
    window = 3000 // stack * stack * HOP / SAMPLE_RATE              # so that latents stay evenly spaced
    starts = np.arange(0, max(seconds - 0.05, 0.01), window)        # no last window of next to nothing
    for start in tqdm(starts, Path(path).name, unit=" min", leave=False,
                      disable=None if len(starts) > 2 else True):
        last = start == starts[-1]
        log_mel = frontend(torch.from_numpy(read_audio(path, start, None if last else window))[None].to(device))
        yield log_mel[0], encoder.encode(log_mel, layer=layer or getattr(model, "layer", None))[0][0]


def stats_of_windows(windows):
    """Mean and standard deviation over time (2 D,) of embeddings (L, D), of which only one is in memory at a time."""
    mean, variance = mean_and_variance(windows)
    return torch.cat([mean, variance.clamp(min=0).sqrt()]).float()


def embed(path, model, frontend, layer=None, frames=False):
    """The embedding of a recording by conformer block `layer` ("middle", or None, is the middle one): its mean and
    standard deviation over time (2 D,), or with `frames` all of it (L, D), 12.5 a second at R = 4."""
    layer = getattr(model, "encoder", model).block_number(layer or "middle")
    windows = (x for _, x in embed_windows(path, model, frontend, layer))
    return (torch.cat(list(windows)).cpu() if frames else stats_of_windows(windows)).numpy()


@torch.no_grad()
def tag(path, model, frontend, classes, threshold=0.5):
    """What is heard in a recording: {class: probability}, the most probable first, and, if the head gives
    frame probabilities, the events: (onset, offset, class) in seconds, where they exceed `threshold`."""
    windows, events = embed_windows(path, model, frontend), None
    if model.head == "frames":
        sums, heard, seconds = [], [], 0
        for log_mel, x in windows:
            frames = model.classify(x[None])                                    # (1, L, C)
            sums.append(torch.stack(linear_softmax_sums(frames)))
            heard.append(frames[0].sigmoid().cpu() > threshold)
            seconds += len(log_mel) * HOP / SAMPLE_RATE
        squares, rest = torch.stack(sums).logsumexp(0)                          # (1, C) each
        logits, step = squares - rest, model.encoder.settings["stack"] * HOP / SAMPLE_RATE
        silence = torch.zeros_like(heard[0][:1])
        changes = torch.cat([silence, *heard, silence]).int().diff(dim=0).T     # (C, L + 1): 1 onset, -1 offset
        onsets, offsets = ((changes == sign).nonzero().tolist() for sign in (1, -1))
        events = sorted((round(on * step, 2), round(min(off * step, seconds), 2), classes[c])
                        for (c, on), (_, off) in zip(onsets, offsets, strict=True))
    else:
        stats = stats_of_windows(x for _, x in windows).to(frontend.mean.device)
        logits = model.classify(stats[None, None, :model.linear.in_features])[0]        # head "mean": the first half
    probabilities = model.probabilities(logits)[0]
    order = probabilities.argsort(descending=True).tolist()
    return {classes[c]: round(probabilities[c].item(), 4) for c in order}, events


def print_prediction(sound, probabilities, events, as_json):
    """What `tag` returns, for a person or for a program."""
    if as_json:
        return print(json.dumps(dict(file=sound, probabilities=probabilities, events=events)), flush=True)
    print(sound, *(f"{value:8.3f}  {name}" for name, value in list(probabilities.items())[:5]), sep="\n")
    for onset, offset, name in events or ():
        print(f"{onset:8.2f} to {offset:7.2f} s  {name}")


@torch.no_grad()
def plot_prediction(out, sound, model, frontend, classes, probabilities, events):
    """Draw what `tag` returns: log-mels, below them the probabilities of the five most probable classes over time (of
    each step or, for heads without, about each second), boxes around events. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs another package: pip install matplotlib") from None
    log_mel, x = map(torch.cat, zip(*embed_windows(sound, model, frontend), strict=True))
    steps = 1 if model.head == "frames" else min(len(x), 12)        # that make a column
    columns = model.probabilities(model.pool(x[:len(x) // steps * steps].unflatten(0, (-1, steps)))).cpu().numpy()
    seconds, top = len(log_mel) * HOP / SAMPLE_RATE, list(probabilities)[:5]
    end = len(columns) * steps * model.encoder.settings["stack"] * HOP / SAMPLE_RATE
    figure = Figure((9, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.imshow(log_mel.T.cpu().numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, MELS), cmap="magma",
                 vmin=-3, vmax=3)
    above.set_title(Path(sound).name, parse_math=False)
    above.set_ylabel("mel band")
    image = below.imshow(columns[:, [classes.index(name) for name in top]].T, aspect="auto", vmin=0, vmax=1,
                         cmap="Blues", interpolation="nearest", extent=(0, end, len(top) - 0.5, -0.5))
    below.set(xlabel="seconds", xlim=(0, seconds))
    below.set_yticks(range(len(top)), [f"{name}  {probabilities[name]:.2f}" for name in top], parse_math=False)
    figure.colorbar(image, ax=below, label="probability")
    for onset, offset, name in events or ():
        if name in top:
            below.broken_barh([(onset, offset - onset)], (top.index(name) - 0.45, 0.9), fc="none", ec="tab:red", lw=0.8)
    figure.savefig(out, dpi=120)


def run_inference(args):
    """--predict and --embed. Raises InputError at the end for recordings that can't be read."""
    device = find_device(args.device)
    if args.frames and not args.out.endswith(".npz"):
        raise InputError(f"--frames writes an .npz file: --out {args.out} is none")
    model, frontend, classes = load(args.init, device)
    if args.predict and not classes:
        raise InputError(f"{args.init}: is pre-trained only and knows no classes: fine-tune it first")
    for file in filter(None, (args.out if args.embed else None, args.tsv, args.plot)):
        if Path(file).exists() or file == args.tsv == args.plot:
            raise InputError(f"{file}: exists already; name a new file")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    layer = getattr(model, "encoder", model).block_number(args.layer or "middle") if args.embed else None
    if args.tsv and model.head != "frames":
        raise InputError(f"--tsv: {args.init} tells no events; fine-tune with --head frames")
    if args.tsv and len({Path(sound).name for sound in args.predict}) < len(args.predict):
        raise InputError("--tsv has file names without folders: two of these sounds have the same")
    embeddings, errors, rows = {}, [], []
    for n, sound in enumerate(args.predict or args.embed):
        try:
            if args.predict:
                probabilities, events = tag(sound, model, frontend, classes, args.threshold)
                print_prediction(sound, probabilities, events, args.json)
                rows += [(Path(sound).name, *event) for event in events or ()]
                if args.plot:
                    plot_prediction(args.plot, sound, model, frontend, classes, probabilities, events)
            else:
                embeddings[n, sound] = embed(sound, model, frontend, layer, args.frames)
        except InputError as error:
            errors.append(str(error))
    if args.tsv and len(errors) < len(args.predict):
        write_events(args.tsv, rows)
    if embeddings:
        with open(args.out, "wb") as file:
            if args.frames:
                np.savez(file, **{sound: x for (_, sound), x in embeddings.items()})
            else:
                np.save(file, np.stack(list(embeddings.values())))
        print(f"{args.out}: {'(L, D)' if args.frames else 'a row'} for each of {len(embeddings)} sounds")
    if errors:
        raise InputError("; ".join(errors))


# ------------------------------------------------------------------- the HEAR 2021 interface (neuralaudio.ai/hear2021)


def load_model(model_file_path="runs/pretrain"):
    """HEAR: the encoder of a run, see `load`, and what HEAR must know of it. Raises InputError as `load`."""
    model, frontend, _ = load(model_file_path)
    model = getattr(model, "encoder", model)
    model.frontend, model.sample_rate = frontend, SAMPLE_RATE
    model.timestamp_embedding_size, model.scene_embedding_size = model.settings["dim"], 2 * model.settings["dim"]
    return model


@torch.no_grad()
def get_timestamp_embeddings(audio, model):
    """HEAR: audio (B, S) in [-1, 1] -> embeddings (B, L, D) by the middle block, and the time of each in ms (B, L)."""
    x, _ = model.encode(model.frontend(audio), layer=model.block_number("middle"))
    stack, end = model.settings["stack"], 1000 * audio.shape[1] / SAMPLE_RATE
    frames = torch.arange(x.shape[1], device=x.device) * stack + (stack - 1) / 2        # frame t is centred on t hops
    return x, (frames * (1000 * HOP / SAMPLE_RATE)).clamp(max=end).expand(len(x), -1)


def get_scene_embeddings(audio, model):
    """HEAR: audio (B, S) -> mean and standard deviation of these over time (B, 2 D); as --embed, up to a minute."""
    return stats_over_time(get_timestamp_embeddings(audio, model)[0])


if __name__ == "__main__":
    run_script(main)
