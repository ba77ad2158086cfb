"""Fine-tune a pre-trained conformer on labelled sound (Sec. 4), or train one from scratch.

The labels of the synthetic sounds, from what `python pretrain.py` learned, and without:
    python finetune.py --init
    python finetune.py
ESC-50 or ESC-10, all five folds, from your own pre-training, with all labels and a third:
    python finetune.py --data esc50 --root /my/ESC-50 --init runs/mine --fold all
    python finetune.py --data esc10 --root /my/ESC-50 --init runs/mine --fold all --fraction 0.333
Several GPUs: `torchrun --nproc_per_node=8 finetune.py ...`. Then use it:
    python finetune.py --predict dog.wav rain.mp3 --init runs/finetune
    python finetune.py --embed dog.wav rain.mp3 --init runs/finetune --out embeddings.npy
In the run's folder: a checkpoint for each fold and fraction, and a line of JSON in results.jsonl.

Shapes: B clips, S samples, T frames, L latents in time, D width, C classes (in wav2vec2.py, C is the width
of a latent).
"""
import argparse
import copy
import functools
import json
import sys
import time
from contextlib import nullcontext
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
from conformer import Dropout
from datasets import (LABELLED, InputError, Parser, batches, collate, download_esc50, in_range,
                      labelled, open_audio, read_audio)
from frontend import HOP, SAMPLE_RATE, LogMel, frame_count
from pretrain import (PATIENCE, Signals, adam, add_up, autocast, batch_parts, benchmark, check_same_start,
                      cores, load_checkpoint, load_encoder, load_model, padding_of, run_options,
                      run_so_far, same_options, save_checkpoint, seed_of, start, stop)
from wav2vec2 import SIZES, Wav2Vec2

# Of each metric its value, or its values for all classes, of which it is the mean.
METRICS = dict(accuracy=metrics.accuracy, mAP=metrics.average_precisions, MAUC=metrics.areas_under_roc,
               lwlrap=metrics.lwlrap)

# What the options of the same names are when not given: DEFAULTS, but for what a data set's line says.
# The paper names the batches of 640 and 64, the heads, AudioSet's balancing, the augmentations and the
# weight of 2 (Sec. 4); the rest it found by sweeps that it does not print. ESC-10 and synth were tried
# here, the others not.
DEFAULTS = dict(updates=2000, batch_size=32, lr=5e-4, seconds=10.0, head="mean", head_dropout=0.1,
                balance=False, augment=["jitter", "time_mask", "mixup"], consistency=2.0)
RECIPES = {
    "synth": dict(updates=250, lr=1e-3, augment=[], consistency=0.0),       # augmented: mAP 0.60, not 0.68
    "esc10": dict(updates=1300, batch_size=16, lr=1e-3, seconds=3.0, consistency=0.0),
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

# What may be another when a run goes on.
MAY_CHANGE = ("resume", "out", "root", "download", "device", "workers", "micro_batch", "checkpoint_every")


def linear_softmax(probabilities, padding_mask=None):
    """Pool frame probabilities into clip probabilities (Sec. 4; TALNet, Wang et al. 2019).

    A mean in which each frame has its own probability for weight: sum of p^2 / sum of p over time.
    (B, L, C), padding_mask (B, L) or None -> (B, C), in [1e-7, 1 - 1e-7].
    """
    p = probabilities.float().clamp(1e-7, 1 - 1e-7)
    if padding_mask is not None:
        p = p.masked_fill(padding_mask[:, :, None], 0)
    return (p.square().sum(1) / p.sum(1)).clamp(1e-7, 1 - 1e-7)         # the quotient may round to 1


def mean_over_time(x, padding_mask=None):
    """Mean of (B, L, D) over the steps that are not padding: (B, D)."""
    if padding_mask is None:
        return x.mean(1)
    valid = ~padding_mask[:, :, None]
    return (x * valid).sum(1) / valid.sum(1)


class Classifier(nn.Module):
    """A pre-trained encoder and one of the paper's two heads (Sec. 4): log-mels to logits (B, C).

    head "frames" is AudioSet's: a linear layer and a sigmoid at each step, then linear softmax
    pooling. head "mean" is that of all other tasks: embeddings averaged over time, then a linear
    layer. With `freeze` the encoder stays as it is: only the head learns (a linear probe).
    """

    def __init__(self, encoder, classes, head="mean", dropout=0.1, freeze=False):
        super().__init__()
        self.encoder, self.head, self.freeze = encoder, head, freeze
        self.exclusive = False      # `load` sets it for what --loss ce trained: softmax, not sigmoids
        encoder.requires_grad_(not freeze)
        encoder.output.requires_grad_(False)            # only pre-training needs these two, and
        encoder.mask_embedding.requires_grad_(False)    # several processes refuse unused parameters
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(encoder.settings["width"], classes)

    def train(self, mode=True):
        """Training mode, or evaluation mode; a frozen encoder stays in the latter, without dropout."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def classify(self, x):
        """The linear layer: embeddings (..., D) -> logits (..., C), in float32: bf16 would make many tie."""
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(self.dropout(x.float()))

    def pool(self, x, padding_mask=None):
        """The head: embeddings (B, L, D) and their padding mask (B, L) or None -> logits (B, C)."""
        if self.head == "frames":
            return torch.logit(linear_softmax(self.classify(x).sigmoid(), padding_mask))
        return self.classify(mean_over_time(x.float(), padding_mask))

    def forward(self, log_mel, padding_mask=None):
        """log_mel (B, T, 64), padding_mask (B, T) or None -> logits (B, C), float32."""
        return self.pool(*self.encoder.encode(log_mel, padding_mask))


def three_stages(update, updates, peak, shares=(0.3, 0.3, 0.4)):
    """Learning rate of Sec. 4.3: a linear warm-up from a hundredth of the peak, a hold, and an
    exponential decay to a twentieth (start and end as wav2vec 2.0 is fine-tuned in fairseq)."""
    warmup, hold, decay = (share * updates for share in shares)
    if update < warmup:
        return peak * (0.01 + 0.99 * update / warmup)
    if update < warmup + hold or decay == 0:
        return peak
    return peak * 0.05 ** ((update - warmup - hold) / decay)


def consistency(logits, others, loss="bce"):
    """Symmetric KL divergence KL(p || q) + KL(q || p) of two predictions for the same clips (Sec. 4.2).

    logits and others (B, C) -> scalar. For loss "bce" between the Bernoulli distributions of each
    class, mean over classes and clips; for "ce" between the two softmaxes, mean over clips. Written
    out, the four terms of a class are (p - q) (logit p - logit q), and (p - q) (log p - log q) for
    softmaxes: nothing in it can overflow.
    """
    if loss == "ce":
        difference = logits.softmax(1) - others.softmax(1)
        return (difference * (logits.log_softmax(1) - others.log_softmax(1))).sum(1).mean()
    return ((logits.sigmoid() - others.sigmoid()) * (logits - others)).mean()


def parse(argv=None):
    """The options of a run, with what its data set leaves open filled in. Raises InputError for what can't be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Defaults of several data sets differ (RECIPES in finetune.py).")
    share = in_range(float, 0, 1)
    group = parser.add_argument_group("run")
    group.add_argument("--init", nargs="?", const="runs/pretrain", metavar="RUN", help="start from "
                       "this pre-training run (no name: runs/pretrain); without it, from scratch")
    group.add_argument("--out", help="folder of this run (runs/finetune; from scratch runs/scratch)")
    run_options(group, checkpoint_every=500)
    group.add_argument("--workers", type=in_range(int, 0, 1024), default=0,
                       help="processes that read the clips: from memory or, of packed sets, from disk, "
                       "which a GPU may be too fast for (%(default)s)")

    group = parser.add_argument_group("use a fine-tuned model")
    group.add_argument("--predict", nargs="+", metavar="SOUND", help="print what is heard in recordings of any "
                       "length by the model --init (a run's folder, or a .pt in it): the five most probable "
                       "classes and, for models with the head 'frames', when each is heard")
    group.add_argument("--embed", nargs="+", metavar="SOUND", help="write embeddings by --init, which may be "
                       "pre-trained only, to --out: .npy with a row for each recording")
    group.add_argument("--frames", action="store_true", help="with --embed: a row for each 80 ms; --out is .npz")
    group.add_argument("--threshold", type=in_range(float, 0, 1), default=0.5, help="with --predict: of frame "
                       "probabilities; a lower one finds more events, and more that are none (%(default)s)")
    group.add_argument("--json", action="store_true", help="with --predict: a line of JSON for each recording, "
                       "with all classes")

    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=LABELLED, default="synth", help="the labelled set: synth is made "
                       "on the fly; 'folder' are your own sounds, a sub-folder a class; 'csv' is a table of "
                       "your own with the columns file, labels (separated by ;) and perhaps split: train, "
                       "valid, test or the number of a fold (%(default)s)")
    group.add_argument("--root", help="where the data set lies, in its official layout, or packed by "
                       "`datasets.py pack --data`; for csv the table")
    group.add_argument("--download", action="store_true", help="esc50 and esc10: fetch ESC-50 (600 MB) "
                       "into --root first, if it isn't there")
    group.add_argument("--fold", help="for sets that come in folds, the one to test on, or 'all', one "
                       "after the other (1)")
    group.add_argument("--fraction", type=in_range(float, 1e-6, 1), nargs="+", default=[1.0], help="of the "
                       "training clips, class by class; several are tried one after the other (%(default)s)")
    group.add_argument("--balance", action=argparse.BooleanOptionalAction, help="draw all classes equally "
                       "often (Sec. 4.1); rare classes learn more, and their few clips are seen again and "
                       "again (for audioset)")
    group.add_argument("--seconds", type=in_range(float, 0.1, 3600), help="longest clip in training: of "
                       "longer ones a random crop each time, which also works against over-fitting; clips "
                       "are tested whole (10; esc10 3)")
    group.add_argument("--validate", action="store_true", help="where a set has no validation clips, hold "
                       "out a tenth of the training clips, or the next fold. With validation clips, the "
                       "weights that do best on them, tried twenty times, are those that are tested; "
                       "without, the last")
    group.add_argument("--no-test", action="store_true", help="leave the test set alone and report on the "
                       "validation clips: for choosing options")

    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=SIZES, help="from scratch (tiny); with --init the size is "
                       "that of the run")
    group.add_argument("--head", choices=["mean", "frames"], help="'mean': average "
                       "the embeddings, then a linear layer; 'frames': probabilities at each step, then "
                       "linear softmax pooling, which also tells when (mean; audioset frames)")
    group.add_argument("--freeze", action="store_true", help="train the head only (linear probe)")
    group.add_argument("--head-dropout", type=in_range(float, 0, 0.99), help="before the output layer; "
                       "more helps against over-fitting with few labels (0.1 to 0.3)")

    group = parser.add_argument_group("optimisation (Sec. 4)")
    group.add_argument("--updates", type=in_range(int, 1, 10**9), help="(by data set)")
    group.add_argument("--batch-size", type=in_range(int, 1, 10**6), help="clips in an update, over all "
                       "processes; large sets like larger ones (16 to 640)")
    group.add_argument("--lr", type=in_range(float, 1e-12, 1e6), help="peak learning rate (3e-4 to 1e-3)")
    group.add_argument("--stages", type=share, nargs=3, default=[0.3, 0.3, 0.4],
                       metavar=("WARMUP", "HOLD", "DECAY"), help="shares of the updates (%(default)s)")
    group.add_argument("--loss", choices=["bce", "ce"], default="bce", help="binary cross-entropy, "
                       "as in the paper, or, where a clip has one label, cross-entropy (%(default)s)")
    group.add_argument("--augment", nargs="*", choices=["jitter", "time_mask", "mixup"], metavar="NAME",
                       help="which of jitter, time_mask and mixup (Sec. 4.1) to apply; --augment alone: "
                       "none (all; synth, whose runs are short, none)")
    group.add_argument("--consistency", type=in_range(float, 0, 1e6), help="weight of the consistency loss "
                       "(Sec. 4.2): augment each clip twice and pull the two predictions together; 0 "
                       "switches it off and halves the time (2; synth and esc10 0)")
    args = parser.parse_args(argv)
    if args.embed and not args.out:
        raise InputError("--embed needs --out, the .npy file to write")
    args.out = args.out or ("runs/finetune" if args.init is not None else "runs/scratch")
    for name, value in {**DEFAULTS, **RECIPES.get(args.data, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if abs(sum(args.stages) - 1) > 1e-3:
        raise InputError(f"--stages {args.stages} must be three shares that sum to 1")
    if args.size is not None and args.init is not None:
        raise InputError("--size is for training from scratch: with --init it is that of the run")
    if args.download and (args.data not in ("esc50", "esc10") or args.root is None):
        raise InputError("--download is for --data esc50 or esc10, and needs --root, where to put it")
    return args


def build(args, classes, checkpoint):
    """A new classifier, and the frontend: of the checkpoint if there is one, else from scratch."""
    torch.manual_seed(args.seed)
    frontend = LogMel()
    if checkpoint:
        encoder = load_encoder(checkpoint)
        load_model(checkpoint, encoder, frontend)
    else:
        encoder = Wav2Vec2(args.size or "tiny")
    return Classifier(encoder, classes, args.head, args.head_dropout, args.freeze), frontend


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
        training = np.setdiff1d(training, valid)
    if len(training) == 0 or len(test) == 0 and not args.no_test:
        raise InputError(f"{args.data}: {f'fold {fold}' if fold else 'its splits'} give {len(training)} "
                         f"clips to train on and {len(test)} to test on; is the set's table whole?")
    if args.validate and len(valid) == 0:
        raise InputError(f"--validate: {args.data} has too few clips of a class to hold out a tenth")
    training = data.subset(training)
    if fraction < 1:
        training = training.fraction(fraction, args.seed)
    return training, data.subset(valid), data.subset(test)


def gather(x, world):
    """The parts of a batch that all processes hold, one after the other: (B / world, ...) -> (B, ...)."""
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def augmented(waveform, lengths, frontend, args, generator, rank=0, world=1):
    """The versions of a batch that are trained on, each after the augmentations of Sec. 4.1: a list of
    log-mels (B, T, 64), and their padding mask. With the consistency loss there are two versions.

    waveform (B, S) is this process's share of a batch. The random numbers are drawn for the whole
    batch, whatever share of it is ours, and mixup's partners come from all of it.
    """
    B, versions = len(waveform), []
    mine = slice(rank * B, (rank + 1) * B)
    for _ in range(2 if args.consistency else 1):
        noise = torch.rand(world * B, 4, generator=generator)[mine].to(waveform.device)
        order = torch.randperm(world * B, generator=generator)[mine].to(waveform.device)
        version = augment.jitter(waveform, noise[:, 0]) if "jitter" in args.augment else waveform
        log_mel = frontend(version)
        padding_mask = padding_of(lengths, log_mel)
        if "time_mask" in args.augment:
            log_mel = augment.time_mask(log_mel, noise[:, 1:3], padding_mask)
        if "mixup" in args.augment:
            frames = frame_count(gather(lengths.to(waveform.device), world))[order]
            log_mel = augment.mixup(log_mel, gather(log_mel, world)[order], noise[:, 3], frames)
        versions.append(log_mel)
    return versions, padding_mask


@torch.no_grad()
def predict(model, frontend, data, args, device, rank=0, world=1, batch_seconds=320):
    """Logits (N, C) for all clips of a labelled set, each whole; of all processes together.

    Clips of like length go together, so that little is padded, and fewer of the longer ones. No clip is
    scored twice. Raises InputError for predictions that are not finite.
    """
    model.eval()
    scores = torch.zeros(len(data), len(data.classes))
    by_length, groups = np.argsort(-data.lengths, kind="stable")[rank::world], []
    while len(by_length):
        fit = max(1, min(256, int(batch_seconds * SAMPLE_RATE / data.lengths[by_length[0]])))
        groups.append(by_length[:fit])
        by_length = by_length[fit:]
    for group in tqdm(groups, "evaluate", leave=False, disable=True if rank else None):
        waveform, lengths, numbers = collate([(data.waveform(n), n) for n in group])
        log_mel = frontend(waveform.to(device))
        with autocast(device, args.dtype):
            scores[numbers] = model(log_mel, padding_of(lengths, log_mel)).float().cpu()
    if not scores.isfinite().all():
        raise InputError("the model's predictions are not finite: lower --lr")
    if world > 1:               # each clip is 0 everywhere but in one process
        scores = scores.to(device)
        dist.all_reduce(scores)
    return scores.cpu()


def evaluate(model, frontend, data, args, device, rank, world):
    """The data set's metric, and how many classes it is the mean of (None: it is of clips).

    Raises InputError where the metric has no answer.
    """
    logits = predict(model, frontend, data, args, device, rank, world)
    targets = data.targets(range(len(data)))
    try:
        value = METRICS[data.metric](logits, targets)
        if np.ndim(value) == 0:
            return value, None
        return metrics.mean_over_classes(value), int(np.isfinite(value).sum())
    except ValueError as error:
        raise InputError(f"no {data.metric} on these {len(data)} clips: {error}") from None


def loss_of(logits, target, args):
    """The loss of V versions of the same clips (Sec. 4.2): logits (V B, C), target (B, C) -> scalar."""
    targets = target.repeat(len(logits) // len(target), 1)
    if args.loss == "ce":
        loss = F.cross_entropy(logits, targets.argmax(1))
    else:
        loss = F.binary_cross_entropy_with_logits(logits, targets)
    if args.consistency:
        loss = loss + args.consistency * consistency(*logits.chunk(2), args.loss)
    return loss


def train(model, frontend, data, valid, args, device, rank, world, label, signals, save, state=None):
    """Fine-tune in place on a labelled set; `label` names the run in the progress bar.

    With validation clips the model ends with the weights that did best on them; returns their score.
    `save(**content)` writes a checkpoint; `state`, one of these, is gone on from. Raises InputError after
    PATIENCE updates in a row that are not finite.
    """
    frontend.to(device)
    model.to(device).train()
    wrapped = model if world == 1 else DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adam(parameters, args, device)
    first, best, best_weights, in_a_row = 0, None, None, 0
    if state:
        load_model(state, model, frontend)
        optimizer.load_state_dict(state["optimizer"])
        first, best, best_weights = state["update"], state["best"], state["best_weights"]
    share, micro = batch_parts(args, world)
    loader = batches(data, args.batch_size, args.updates, args.seed, first, rank, world, args.workers,
                     data.longest(), data.members() if args.balance else None)
    bar = tqdm(total=args.updates, initial=first, desc=label, disable=rank > 0, unit=" updates", leave=False)
    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the set.
    for update, (waveform, lengths, numbers) in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = three_stages(update, args.updates, args.lr, args.stages)
        generator = torch.Generator().manual_seed(seed_of(1, args.seed, update))
        torch.manual_seed(seed_of(2, args.seed, update, rank))          # dropout
        with torch.no_grad():
            versions, padding_mask = augmented(waveform.to(device, non_blocking=True), lengths, frontend, args,
                                               generator, rank, world)
        target, losses = torch.from_numpy(data.targets(numbers)).to(device), []
        for i in range(0, share, micro):
            part = slice(i, i + micro)
            mask = None if padding_mask is None else padding_mask[part].repeat(len(versions), 1)
            with nullcontext() if world == 1 or i + micro == share else wrapped.no_sync():
                with autocast(device, args.dtype):              # (V B, C): both versions in one pass
                    logits = wrapped(torch.cat([version[part] for version in versions]), mask)
                loss = loss_of(logits, target[part], args) * micro / share
                loss.backward()
            losses.append(loss.detach())
        received, loss = add_up([signals.received, sum(losses) / world], device, world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if np.isfinite([norm, loss]).all():
            optimizer.step()
            in_a_row = 0
        else:
            in_a_row += 1
        optimizer.zero_grad()
        done = update + 1
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}" + f" best {best or 0:.3f}" * (len(valid) > 0), refresh=False)
        if in_a_row == PATIENCE:
            bar.close()
            raise InputError(f"the loss is not finite, now {PATIENCE} updates in a row, at update {done}, in "
                             f"{', '.join(data.names[n] for n in numbers[:3])} ...: lower --lr")
        if len(valid) and (done == args.updates or done % max(1, args.updates // 20) == 0):
            score, _ = evaluate(model, frontend, valid, args, device, rank, world)
            model.train()
            if best is None or score > best:
                best, best_weights = score, copy.deepcopy(model.state_dict())
        if done < args.updates and (received or done % args.checkpoint_every == 0):
            if rank == 0:
                save(model=model.state_dict(), frontend=frontend.state_dict(), update=done,
                     optimizer=optimizer.state_dict(), best=best, best_weights=best_weights)
            if received:
                stop(signals, bar, Path(args.out) / "checkpoint.pt", world)
    bar.close()
    if best_weights:
        model.load_state_dict(best_weights)
    return best


def load(run, device="cpu"):
    """A fine-tuned model to use: (Classifier in evaluation mode, frontend, names of the classes).

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
    content = load_checkpoint(path, "finetune.py or pretrain.py", ("settings", "frontend"))
    classes, frontend = content.get("classes", []), LogMel()
    encoder = load_encoder(content)
    model = Classifier(encoder, len(classes), content["head"]) if classes else encoder
    load_model(content, model, frontend)
    model.exclusive = content["args"].get("loss") == "ce"
    return model.to(device).eval(), frontend.to(device), classes


@torch.no_grad()
def listen(path, model, frontend, window=60.0):
    """Hear a recording of any length and rate, a minute at a time: yields the embeddings (L, D) of each window.

    Raises InputError for what `read_audio` can't read; so do `embed` and `tag`.
    """
    with open_audio(path) as file:
        seconds = file.frames / file.samplerate
    encoder, device = getattr(model, "encoder", model), frontend.mean.device
    starts = np.arange(0, max(seconds - 0.05, 0.01), window)        # no last window of next to nothing
    for start in tqdm(starts, Path(path).name, unit=" min", leave=False,
                      disable=None if len(starts) > 2 else True):
        last = start == starts[-1]
        waveform = torch.from_numpy(read_audio(path, start, None if last else window)).to(device)
        yield encoder.encode(frontend(waveform[None]))[0][0]


def embed(path, model, frontend, frames=False):
    """Embeddings of a recording: their mean over time (D,), or all (L, D), 12.5 a second at R = 4."""
    x = torch.cat(list(listen(path, model, frontend)))
    return (x if frames else x.mean(0)).cpu().numpy()


@torch.no_grad()
def tag(path, model, frontend, classes, threshold=0.5):
    """What is heard in a recording: {class: probability}, the most probable first, and, if the head gives
    frame probabilities, the events: (onset, offset, class) in seconds, where they exceed `threshold`."""
    x = torch.cat(list(listen(path, model, frontend)))[None]
    logits, events = model.pool(x), None
    if model.head == "frames":
        frames, events = model.classify(x).sigmoid(), []
        step = model.encoder.settings["stack"] * HOP / SAMPLE_RATE          # seconds of a latent
        sounding = F.pad((frames[0] > threshold).int(), (0, 0, 1, 1)).diff(dim=0).cpu()   # (L + 1, C)
        for c, name in enumerate(classes):
            onsets, offsets = (sounding[:, c] == 1).nonzero(), (sounding[:, c] == -1).nonzero()
            events += [(round(int(on) * step, 2), round(int(off) * step, 2), name)
                       for on, off in zip(onsets, offsets)]
        events.sort()
    probabilities = (logits.softmax(1) if model.exclusive else logits.sigmoid())[0]
    order = probabilities.argsort(descending=True).tolist()
    return {classes[c]: round(probabilities[c].item(), 4) for c in order}, events


def use(args):
    """--predict and --embed."""
    device, _, _ = start(args.device)
    model, frontend, classes = load(args.init or "runs/finetune", device)
    if args.embed:
        arrays = {sound: embed(sound, model, frontend, args.frames) for sound in args.embed}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "wb") as file:
            if args.frames:
                np.savez(file, **arrays)
            else:
                np.save(file, np.stack(list(arrays.values())))
        print(f"{args.out}: {'(L, D)' if args.frames else 'a row'} for each of {len(arrays)} sounds")
        return
    if not classes:
        raise InputError(f"{args.init}: is pre-trained only and knows no classes: fine-tune it first")
    for sound in args.predict:
        probabilities, events = tag(sound, model, frontend, classes, args.threshold)
        if args.json:
            print(json.dumps(dict(file=sound, probabilities=probabilities, events=events)), flush=True)
            continue
        print(sound, *(f"{value:8.3f}  {name}" for name, value in list(probabilities.items())[:5]), sep="\n")
        for onset, offset, name in events or ():
            print(f"{onset:8.2f} to {offset:7.2f} s  {name}")


def time_updates(model, frontend, data, args, device):
    """`benchmark` of fine-tuning, with the augmentations and both versions of each clip."""
    frontend.to(device)
    optimizer = adam([p for p in model.to(device).train().parameters() if p.requires_grad], args, device)
    target = torch.randint(2, (args.batch_size, len(data.classes)), device=device).float()

    def prepare(waveform, lengths):
        generator = torch.Generator().manual_seed(0)
        versions, padding_mask = augmented(waveform, lengths, frontend, args, generator)
        return torch.cat(versions), None if padding_mask is None else padding_mask.repeat(len(versions), 1)

    def loss(log_mel, padding_mask):
        with autocast(device, args.dtype):
            logits = model(log_mel, padding_mask)
        return loss_of(logits, target, args)

    benchmark(model, optimizer, prepare, loss, data, data.longest(), args, device)


def main(args):
    """Train and test on each fraction and fold. Raises InputError where it can't start or go on."""
    device, rank, world = start(args.device)
    signals = Signals()
    batch_parts(args, world)        # may complain: before the data are read
    init = load_checkpoint(args.init) if args.init is not None else None
    out = Path(args.out)
    state = run_so_far(out, args, "finetune.py", ("job", "lines"))
    if state:
        same_options(out, state["args"], args, [name for name in vars(args) if name not in MAY_CHANGE])
    else:
        state = dict(job=0, lines=[], update=0)
    check_same_start(out, [state["job"], state["update"]], device, world)
    if args.download:
        if rank == 0:
            download_esc50(args.root)
        if world > 1:
            dist.barrier()
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
    data = labelled(args.data, args.root, max(1, cores()), say)
    if args.loss == "ce" and any(len(own) != 1 for own in data.labels):
        raise InputError(f"--loss ce is for one label a clip; in {args.data} some have more or none: use bce")
    folds = sorted(set(data.splits.tolist()))
    if not all(name.isdigit() for name in folds):
        folds = [None]          # train, valid and test
    if args.fold is not None and args.fold != "all":
        if args.fold not in folds:
            raise InputError(f"--fold {args.fold}: {args.data} has " + (
                f"{', '.join(folds)}, all" if folds != [None] else "no folds; leave it out"))
        folds = [args.fold]
    elif args.fold is None:
        folds = folds[:1]
    if args.no_test and not args.validate and not (data.splits == "valid").any():
        raise InputError("--no-test needs validation clips: give --validate too")
    say(f"on {device} x {world}; " + (f"from {args.init}" if args.init else
                                      f"{args.size or 'tiny'} from scratch"))
    lines = state["lines"]
    if rank == 0 and not args.benchmark:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs = [(fraction, fold) for fraction in args.fraction for fold in folds]
    for job, (fraction, fold) in enumerate(jobs):
        if job < state["job"]:
            continue
        name = f"fold{fold}" if fold else "model"
        training, valid, test = split(data, fold, fraction, args)
        training.seconds = args.seconds
        model, frontend = build(args, len(data.classes), init)
        if not init:
            some = np.linspace(0, len(training) - 1, min(len(training), 512)).astype(int)
            frontend.measure(collate([(training.waveform(i), 0)])[:2] for i in some)
        if args.compile:
            model.compile()         # in place: the names of the weights stay the same
        if args.benchmark:
            return time_updates(model, frontend, training, args, device)
        save = functools.partial(save_checkpoint, out / "checkpoint.pt", args=vars(args), lines=lines)
        began = time.time()
        best = train(model, frontend, training, valid, args, device, rank, world, name, signals,
                     functools.partial(save, job=job), state if state["update"] else None)
        state = dict(job=job, update=0)
        if args.no_test:
            tested, score, counted = valid, best, None
        else:
            tested = test
            score, counted = evaluate(model, frontend, test, args, device, rank, world)
        line = dict(fold=fold, fraction=fraction, metric=data.metric, score=score, valid=best,
                    classes=counted, train=training.fingerprint(), test=tested.fingerprint(),
                    minutes=round((time.time() - began) / 60, 2), args=vars(args))
        lines.append(line)
        say(f"{name}: {'validation ' * args.no_test}{data.metric} {score:.3f} on {len(tested)} clips"
            + f" over {counted} classes" * (counted is not None) + f", after {len(training)} clips x "
            f"{args.updates * args.batch_size / len(training):.0f} epochs, {line['minutes']:.1f} min\n"
            f"    trained on {line['train']}\n    tested on {line['test']}")
        if rank == 0:
            save_checkpoint(out / f"{name}_fraction{fraction:g}.pt", model=model.state_dict(),
                            frontend=frontend.state_dict(), settings=model.encoder.settings,
                            classes=data.classes, head=args.head, args=vars(args))
            with open(out / "results.jsonl", "a") as results:
                results.write(json.dumps(line) + "\n")
            save(job=job + 1, update=0, model={})
        if fold == folds[-1] and len(folds) > 1:
            scores = [line["score"] for line in lines[-len(folds):]]
            say(f"fraction {fraction:g}: mean {data.metric} over {len(folds)} folds "
                f"{np.mean(scores):.3f} (standard deviation {np.std(scores):.3f})")
    say(f"done: {out / 'results.jsonl'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # file names hold anything
    try:
        args = parse()
        use(args) if args.predict or args.embed else main(args)
    except (InputError, OSError) as error:
        sys.stderr.write(f"finetune.py: {error}\n")
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.stderr.write("finetune.py: out of GPU memory: give a smaller --micro-batch\n")
        sys.exit(2)
