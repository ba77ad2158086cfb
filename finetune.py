"""Fine-tune a pre-trained conformer on labelled sound (Sec. 4), or train one from scratch.

The labels of the synthetic sounds, starting from what `python pretrain.py` learned, and without:
    python finetune.py --init
    python finetune.py
ESC-50, and ESC-10 with a third of its labels, all five folds, from your own pre-training:
    python finetune.py --data esc50 --root /my/ESC-50 --init runs/mine --fold all --out runs/esc50
    python finetune.py --data esc10 --root /my/ESC-50 --init runs/mine --fold all --fraction 0.333 --out runs/esc10
Several GPUs: `torchrun --nproc_per_node=8 finetune.py ...`. Then use the result:
    python finetune.py --predict dog.wav rain.mp3 --init runs/finetune
    python finetune.py --embed dog.wav rain.mp3 --init runs/finetune --out embeddings.npy
    python finetune.py --predict dog.wav --init runs/finetune --plot dog.png
The run's folder has a model for each fold and fraction, and a line of JSON for each in results.jsonl.

Shapes: B clips, S samples, T frames, L latents in time, D width, C classes. A layer is a conformer block, counted from
1; what heads and options call frames are the steps of 80 ms that latents have.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import augment
import metrics
from conformer import BatchNorm
from datasets import (READERS, Bar, InputError, Parser, batches, claim, collate, derive_seed, file_path, find_device,
                      in_range, load_labelled, open_audio, progress, rank, read_blocks, reading, run_script, say,
                      to_int16, world_size, write_events, write_whole)
from frontend import HOP, MELS, SAMPLE_RATE, LogMel, frame_count, padding_mask
from pretrain import (MAX_CONSECUTIVE_SKIPS, SIGNALS, add_running_options, agree, all_reduce, autocast, compile_blocks,
                      fetch, finish, init_distributed, load_checkpoint, load_encoder, load_weights, resume,
                      save_checkpoint)
from wav2vec2 import SIZES, Wav2Vec2


def linear_softmax(logits, padding_mask=None):
    """Pool frame probabilities p into clip probabilities (Sec. 4; TALNet, Wang et al. 2019), all as logits.

    A mean in which each frame has its own probability as weight: sum of p^2 / sum of p over time. Its logit is
    log(sum of p^2) - log(sum of p (1 - p)), which has gradients however large the logits are.
    (B, L, C), padding_mask (B, L) or None -> (B, C).
    """
    log_p, log_not_p = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
    if padding_mask is not None:
        log_p = log_p.masked_fill(padding_mask[:, :, None], -torch.inf)
    return (2 * log_p).logsumexp(1) - (log_p + log_not_p).logsumexp(1)


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
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)       # at 0 the gradient of sqrt is infinite


# How a clip's embeddings become one vector: name of the head, function, width of its result over D.
POOLINGS = dict(mean=(mean_over_time, 1), stats=(stats_over_time, 2))


class SumOverProcesses(torch.autograd.Function):
    """A tensor added up over all processes. So is its gradient, as each process's loss depends on the sum."""

    @staticmethod
    def forward(ctx, x):
        """Any shape."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        """Any shape."""
        return SumOverProcesses.forward(ctx, gradient)


class Standardise(BatchNorm):
    """Each component to mean 0 and variance 1 over a batch's steps that are not padding, those of all processes: one
    alone may have very few. (B, L, D), padding_mask (B, L) or None -> (B, L, D)."""

    def __init__(self, dim):
        super().__init__(dim, affine=False)

    def forward(self, x, padding_mask=None):
        if not self.training or world_size() == 1:
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


def block_number(encoder, layer):
    """The number of a block, from 1 on: of "last", or of "middle", which --embed and HEAR read. Raises InputError where
    there are fewer."""
    blocks = encoder.settings["blocks"]
    number = {"middle": (blocks + 1) // 2, "last": blocks}.get(layer, layer)
    if number > blocks:
        raise InputError(f"--layer {layer}: the model has only {blocks} conformer blocks")
    return number


class Classifier(nn.Module):
    """A pre-trained encoder, up to block `layer` (see `block_number`, which may raise InputError), and one of
    the paper's two heads (Sec. 4), or a third: log-mels to logits (B, C).

    head "frames" is AudioSet's: a linear layer at each step, then linear softmax pooling. head "mean" is that of
    all other tasks: embeddings averaged over time, then a linear layer. head "stats", not the paper's, sees their
    standard deviation over time too (Snyder et al. 2017), which with few labels is worth much. With `freeze` the
    encoder stays as it is. Then, and for "stats", the linear layer gets its input standardised, as in MAE's linear
    probe (He et al. 2022).
    """

    def __init__(self, encoder, classes, head="mean", dropout=0.1, freeze=False, layer="last"):
        super().__init__()
        if head not in (*POOLINGS, "frames"):
            raise ValueError(f"no head '{head}'")
        self.encoder, self.head, self.freeze = encoder, head, freeze
        self.single_label = False       # `load_run` sets it for what --loss ce trained: softmax, not sigmoids
        encoder.requires_grad_(not freeze)
        encoder.output_proj.requires_grad_(False)       # only pre-training needs these two, and
        encoder.mask_embedding.requires_grad_(False)    # DDP refuses unused parameters
        self.layer = block_number(encoder, layer)
        encoder.conformer.blocks[self.layer:].requires_grad_(False)
        dim = encoder.settings["dim"] * (1 if head == "frames" else POOLINGS[head][1])
        self.standardise = Standardise(dim) if freeze or head == "stats" else None
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, classes)

    def train(self, mode=True):
        """Training mode, or evaluation mode; a frozen encoder stays in the latter, without dropout."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def frame_logits(self, x, padding_mask=None):
        """Embeddings (B, L, D), padding_mask (B, L) or None -> logits (B, L, C)."""
        if self.standardise is not None:
            x = self.standardise(x, padding_mask)
        return self.linear(self.dropout(x))

    def clip_logits(self, x, padding_mask=None):
        """The head: embeddings (B, L, D) and their padding mask (B, L) or None -> logits (B, C)."""
        if self.head == "frames":
            return linear_softmax(self.frame_logits(x, padding_mask), padding_mask)
        pooling, _ = POOLINGS[self.head]
        return self.frame_logits(pooling(x, padding_mask)[:, None])[:, 0]           # a clip as a single step

    def forward(self, log_mel, padding_mask=None):
        """log_mel (B, T, 64), padding_mask (B, T) or None -> logits (B, C), float32."""
        x, padding_mask = self.encoder.encode(log_mel, padding_mask, self.layer)
        with torch.autocast(x.device.type, enabled=False):          # in bf16 many logits would tie
            return self.clip_logits(x.float(), padding_mask)

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


def gather(x):
    """Concatenate a tensor over all processes: (B / world,) -> (B,), or (B / world, T, 64) -> (B, T, 64), padded to
    the longest."""
    if world_size() == 1:
        return x
    if x.dim() == 3:
        longest = torch.tensor(x.shape[1], device=x.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        x = F.pad(x, (0, 0, 0, int(longest) - x.shape[1]))
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


@torch.no_grad()
def augment_batch(waveform, lengths, frontend, args, generator):
    """The versions of a batch that are trained on, each after the augmentations of Sec. 4.1: a list of log-mels
    (B, T, 64), and their padding mask. With the consistency loss there are two versions.

    waveform (B, S) is this process's part of a batch. The random numbers are drawn for the whole batch, whichever
    part this process has, and mixup's partners come from all of it.
    """
    B, versions = len(waveform), []
    all_clips, own_clips = B * world_size(), slice(rank() * B, (rank() + 1) * B)
    for _ in range(2 if args.consistency else 1):
        rand = torch.rand(all_clips, 4, generator=generator)[own_clips].to(waveform.device)
        order = torch.randperm(all_clips, generator=generator)[own_clips].to(waveform.device)
        version = augment.jitter(waveform, rand[:, 0]) if "jitter" in args.augment else waveform
        log_mel = frontend(version, lengths)
        padding = padding_mask(lengths, log_mel)
        if "time_mask" in args.augment:
            log_mel = augment.time_mask(log_mel, rand[:, 1:3], padding)
        if "mixup" in args.augment:
            frames = frame_count(gather(lengths.to(waveform.device)))[order]
            partner = gather(log_mel)[order, :log_mel.shape[1]]
            log_mel = augment.mixup(log_mel, partner, rand[:, 3], frames)
        versions.append(log_mel)
    return versions, padding


# ------------------------------------------------------------------------------------------------- training and testing


def main():
    """Train and test on each fraction and fold, or use a model. Raises InputError where it can't start or continue."""
    args, state = parse()
    if args.predict or args.embed:
        return run_inference(args)
    device, out = init_distributed(args), Path(args.out)
    init = load_checkpoint(args.init, "pretrain.py") if args.init else None
    data = load_labelled(args.data, args.root, args.workers)
    if args.loss is None:       # the recipe leaves it to the labels; accuracy is the metric where each clip has one
        args.loss = "ce" if data.metric == "accuracy" and args.head != "frames" else "bce"
    jobs = plan(data, args)
    # No two pre-trainings end with the same mask embedding.
    start = init["model"]["mask_embedding"].numpy().tobytes() if init else b""
    digest = hashlib.sha256(f"{data.digest()} {' '.join(data.splits)} ".encode() + start).hexdigest()
    if state and state["data"] != digest:
        raise InputError(f"{out} was started with other clips, labels, splits or another --init: name the same again")
    agree(args, state and (state["job"], state["update"]), digest)
    state = state or dict(job=0, update=0, lines=[])
    lines, first = state["lines"], state["job"]
    say(f"on {device} x {world_size()}; " + (f"from {args.init}" if init else f"{args.size or 'tiny'} from scratch"))
    with claim(out) if rank() == 0 else contextlib.nullcontext():
        for job, (name, fraction, fold, training, valid, test) in enumerate(jobs[first:], first):
            began = time.time()
            model, frontend = build(args, training, init, device)
            save = functools.partial(save_checkpoint, out / "checkpoint.pt", model, script="finetune.py",
                                     args=vars(args), data=digest, lines=lines)
            scores = train(model, frontend, training, valid, args, name, functools.partial(save, job=job), state)
            save_checkpoint(out / f"{name}_fraction{fraction:g}.pt", model, frontend=frontend.state_dict(),
                            settings=model.encoder.settings, classes=data.classes, head=args.head, freeze=args.freeze,
                            layer=model.layer, script="finetune.py", args=vars(args))
            score, classes = (scores["last"], None) if args.no_test else evaluate(model, frontend, test, args)
            minutes = round((time.time() - began) / 60, 2)
            lines.append(dict(fold=fold, fraction=fraction, metric=data.metric, score=score, valid_best=scores["best"],
                              valid_last=scores["last"], classes=classes, train=training.fingerprint(),
                              test=test.fingerprint(), minutes=minutes, args=vars(args)))
            if rank() == 0:
                write_whole(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            state = dict(job=job + 1, update=0)
            save(**state)
            metric, epochs = "validation " * args.no_test + data.metric, args.updates * args.batch_size / len(training)
            say(f"{name}: {metric} {score:.3f} on {len(test)} clips"
                + f" over {classes} classes" * (classes is not None)
                + (f" (validation: last {scores['last']:.3f}, best of up to twenty {scores['best']:.3f})" if len(valid)
                   else "") + f", after {len(training)} clips x {epochs:.0f} epochs, {minutes:.1f} min\n    "
                f"trained on {lines[-1]['train']}\n    scored on {lines[-1]['test']}")
            if args.fold == "all" and fold is not None and fold == jobs[-1][2]:
                of_folds = [line["score"] for line in lines if line["fraction"] == fraction]
                say(f"fraction {fraction:g}: mean {metric} over {len(of_folds)} folds {np.mean(of_folds):.3f} "
                    f"(standard deviation {np.std(of_folds):.3f})")
        say(f"done: {out / 'results.jsonl'}")
        finish(args)


def plan(data, args):
    """What is trained one after the other: a list of (name, fraction, fold, training, validation and test set). The
    fold is None for sets without; with --no-test the validation set is the test set too.

    Raises InputError for options that don't fit the data, and where the metric would have no answer.
    """
    if args.loss == "ce" and any(len(own) != 1 for own in data.labels):
        raise InputError(f"--loss ce is for one label a clip; in {args.data} some have more or none: use bce")
    if data.metric == "accuracy" and len(data.classes) < 2:
        raise InputError(f"{args.data} has one class only, nothing to tell it from; is --root the folder above the "
                         "classes?")
    if args.no_test and not args.validate and not (data.splits == "valid").any():
        raise InputError("--no-test needs validation clips: give --validate too")
    folds = set(data.splits.tolist())
    folds = sorted(folds, key=int) if all(fold.isdigit() for fold in folds) else [None]     # train, valid and test
    if args.fold not in (None, "all", *folds):
        raise InputError(f"--fold {args.fold}: {args.data} has " + (
            f"{', '.join(folds)}, all" if folds != [None] else "no folds; leave it out"))
    chosen = folds if args.fold == "all" else folds[:1] if args.fold is None else [args.fold]
    jobs = [(f"fold{fold}" if fold else "model", fraction, fold, *split(data, folds, fold, fraction, args))
            for fraction in args.fraction for fold in chosen]
    for *_, valid, test in jobs:
        for part in (valid, test):
            if len(part):
                measure(data.metric, torch.zeros(len(part), len(data.classes)), part.targets(range(len(part))))
    return jobs


def split(data, folds, fold, fraction, args):
    """Training, validation and test set; see --fraction and --validate. fold: one of `folds`, None for sets without.

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
            groups = data.groups[training]
            first = training[np.sort(np.unique(groups, return_index=True)[1])]                  # clip of each group
            held_out = np.setdiff1d(first, data.subset(first).fraction(0.9, args.seed).rows)    # rows of `data`
            valid = training[np.isin(groups, data.groups[held_out])]
        else:
            if len(folds) < 3:
                raise InputError("--validate needs three folds at least: to train, to validate, to test")
            valid = np.flatnonzero(splits == folds[(folds.index(fold) + 1) % len(folds)])
        training = training[~np.isin(data.groups[training], data.groups[valid])]
    if len(training) == 0 or len(test) == 0 and not args.no_test:
        raise InputError(f"{args.data}: {f'fold {fold}' if fold else 'its splits'} give {len(training)} "
                         f"clips to train on and {len(test)} to test on; is the set's table whole?")
    if args.validate and len(valid) == 0:
        raise InputError(f"--validate: {args.data} has too few clips or groups of a class to hold out a tenth")
    training = data.subset(training)
    if fraction < 1:
        training = training.fraction(fraction, args.seed)
    training.seconds = args.seconds
    return training, data.subset(valid), data.subset(valid if args.no_test else test)


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
    model = Classifier(encoder, len(training.classes), args.head, args.head_dropout, args.freeze, args.layer)
    if args.compile:
        compile_blocks(encoder)
    return model.to(device).train(), frontend.to(device)        # `train` also keeps a frozen encoder in evaluation mode


def train(model, frontend, training, valid, args, label, save, state):
    """Fine-tune in place; with validation clips the model ends with the weights that did best on them. Returns the
    validation scores, dict(best=, last=), both None without validation clips. `save(**content)` writes a checkpoint;
    `state` is what one holds of this job, or has update=0. Raises InputError after MAX_CONSECUTIVE_SKIPS updates in a
    row that are not finite."""
    device = frontend.mean.device
    wrapped = model if world_size() == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [dict(params=head, lr_share=1.0), dict(params=encoder, lr_share=args.encoder_lr)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=device.type != "mps")
    done, scores, best_weights, skips_in_a_row = state["update"], dict(best=None, last=None), None, 0
    if done:
        load_weights(state, model, frontend)
        optimizer.load_state_dict(state["optimizer"])
        scores, best_weights = state["scores"], state["best_weights"]
    loader = batches(training, args.batch_size, args.updates, args.seed, done, rank(), world_size(), args.workers,
                     clips_by_class=training.clips_by_class() if args.balance else None)
    bar, validate_every = Bar(args.updates, done, label, silent=rank() > 0), -(-args.updates // 20)
    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the set.
    for update, (waveform, lengths, numbers) in enumerate(loader, done):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_share"] * three_stage_lr(update, args.updates, args.lr, args.stages)
        # Random numbers for augmentation (1), the same on any device, and for dropout (2).
        generator = torch.Generator().manual_seed(derive_seed(1, args.seed, update))
        torch.manual_seed(derive_seed(2, args.seed, update, rank()))
        versions, padding = augment_batch(waveform.to(device, non_blocking=True), lengths, frontend, args, generator)
        target = torch.from_numpy(training.targets(numbers)).to(device)
        loss = add_gradients(wrapped, versions, padding, target, args)
        sums = all_reduce(dict(loss=loss / world_size(), signals=torch.full_like(loss, len(SIGNALS))))
        norm = torch.nn.utils.clip_grad_norm_(encoder + head, 1.0)                      # pretrain.py's --max-grad-norm
        figures = fetch(dict(sums, norm=norm))
        finite = all(map(math.isfinite, figures.values()))
        if finite:
            optimizer.step()
        skips_in_a_row = 0 if finite else skips_in_a_row + 1
        optimizer.zero_grad()
        if skips_in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise InputError(f"loss or gradient not finite in {skips_in_a_row} updates in a row, now at {update + 1} "
                             f"with {', '.join(training.names[n] for n in numbers[:3])}, ...: lower --lr")

        done, stopping = update + 1, figures["signals"] > 0
        best = "" if scores["best"] is None else f" best {scores['best']:.3f}"
        bar.show(done, f"loss {figures['loss']:.3f}{best}")
        if len(valid) and (done == args.updates or done % validate_every == 0):
            scores["last"], _ = evaluate(model, frontend, valid, args)
            if scores["best"] is None or scores["last"] > scores["best"]:
                scores["best"], best_weights = scores["last"], copy.deepcopy(model.state_dict())
        if stopping or done == args.updates or done % args.checkpoint_every == 0:
            save(update=done, frontend=frontend.state_dict(), optimizer=optimizer.state_dict(), scores=scores,
                 best_weights=best_weights)
        if stopping:
            finish(args, stopped=True)      # exits
    bar.close()
    if best_weights:
        model.load_state_dict(best_weights)
    return scores


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


# Each metric's function returns its value, or one for each class, to be averaged.
METRICS = dict(accuracy=metrics.accuracy, mAP=metrics.average_precisions, MAUC=metrics.areas_under_roc,
               lwlrap=metrics.lwlrap)


def measure(metric, logits, targets):
    """A metric, and how many classes it is the mean of (None: it is of clips): logits and targets (N, C). Raises
    InputError where it has no answer."""
    try:
        value = METRICS[metric](logits, targets)
        if np.ndim(value) == 0:
            return value, None
        return metrics.mean_over_classes(value), int(np.isfinite(value).sum())
    except ValueError as error:
        raise InputError(f"no {metric} on {len(targets)} clips to test or validate on: {error}") from None


def evaluate(model, frontend, data, args):
    """The metric of a labelled set, see `measure`. Leaves the model in training mode."""
    logits = compute_logits(model, frontend, data, args)
    model.train()
    return measure(data.metric, logits, data.targets(range(len(data))))


@torch.no_grad()
def compute_logits(model, frontend, data, args, batch_seconds=320):
    """Logits (N, C) for all clips of a labelled set, each whole; of all processes together.

    Clips of similar length go together, so that little is padded, and fewer of the longer ones. No clip is scored
    twice. Raises InputError for logits that are not finite.
    """
    model.eval()
    if world_size() > 1:        # BatchNorm's averages are of a process's own clips: those of the first are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    device, logits = frontend.mean.device, torch.zeros(len(data), len(data.classes))
    by_length, parts = np.argsort(-data.lengths, kind="stable")[rank()::world_size()], []
    while len(by_length):
        fit = max(1, min(256, int(batch_seconds * SAMPLE_RATE / data.lengths[by_length[0]])))
        parts.append(by_length[:fit])
        by_length = by_length[fit:]
    for part in progress(parts, "evaluate", disable=True if rank() else None):
        waveform, lengths, numbers = collate([(data.waveform(n), n) for n in part])
        log_mel = frontend(waveform.to(device), lengths)
        with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):        # so many shapes
            logits[numbers] = model(log_mel, padding_mask(lengths, log_mel)).float().cpu()
    if not logits.isfinite().all():
        raise InputError("the model's predictions are not finite: lower --lr")
    if world_size() > 1:        # each clip is 0 everywhere but in one process
        logits = logits.to(device)
        dist.all_reduce(logits)
    return logits.cpu()


# -------------------------------------------------------------------------------------------------------- using a model


LONGEST = 12            # hours of a recording that --predict and --embed take: 2.2 GB in `large`


def run_inference(args):
    """--predict and --embed. Raises InputError at the end for recordings that can't be read."""
    device, sounds = find_device(args.device), args.predict or args.embed
    outputs = [file for file in (args.out if args.embed else None, args.tsv, args.plot) if file]
    for wrong, message in (
            (args.predict and args.out, "--predict prints: --out is for --embed and for training"),
            (args.embed and not args.out, "--embed needs --out, the .npy file to write"),
            (args.frames and not (args.out or "").endswith(".npz"), "--frames writes an .npz file: name it by --out"),
            (args.plot and (len(sounds) != 1 or Path(args.plot).suffix not in (".png", ".svg", ".pdf")),
             "--plot draws one recording, which --predict names, into a .png, .svg or .pdf"),
            (args.plot and importlib.util.find_spec("matplotlib") is None,
             "--plot needs another package: pip install matplotlib"),
            (args.tsv and len({Path(sound).name for sound in sounds}) < len(sounds),
             "--tsv has file names without folders: two of these sounds have the same"),
            (args.tsv and args.tsv == args.plot, "--tsv and --plot name the same file"),
            *((Path(file).exists(), f"{file}: exists already; name a new file") for file in outputs)):
        if wrong:
            raise InputError(message)
    model, frontend, classes = load_run(args.init, device)
    if args.predict and not classes:
        raise InputError(f"{args.init}: is pre-trained only and knows no classes: fine-tune it first")
    if args.tsv and model.head != "frames":
        raise InputError(f"--tsv: {args.init} tells no events; fine-tune with --head frames")
    if args.embed:
        block_number(getattr(model, "encoder", model), args.layer or "middle")
    for file in outputs:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    embeddings, errors, events_of_all = [], [], []
    for sound in sounds:
        notes = []
        try:
            if args.embed:
                embeddings.append((sound, embed(sound, model, frontend, args.layer, args.frames, notes)))
            else:
                probabilities, events = predict(sound, model, frontend, classes, args.threshold, notes)
                print_prediction(sound, probabilities, events, args.json)
                events_of_all += [(Path(sound).name, *event) for event in events or ()]
                if args.plot:
                    plot_prediction(args.plot, sound, model, frontend, classes, probabilities, events)
            for note in notes:
                print(f"{sound}: {note}", file=sys.stderr)
        except InputError as error:
            errors.append(str(error))
    if args.tsv and len(errors) < len(sounds):
        write_events(args.tsv, events_of_all)
    if embeddings:
        names, arrays = zip(*embeddings, strict=True)
        with open(args.out, "wb") as file:
            if args.frames:
                np.savez(file, *arrays, sounds=np.array(names))
            else:
                np.save(file, np.stack(arrays))
        print(f"{args.out}: {'(L, D)' if args.frames else 'a row'} for each of {len(embeddings)} sounds")
    if errors:
        raise InputError("; ".join(errors))


def load_run(run, device="cpu"):
    """A model to use: (Classifier in evaluation mode, frontend, names of the classes).

    run: the folder of a run of finetune.py, or one of the .pt files in it. Of a run of pretrain.py it gives
    (Wav2Vec2, frontend, []), good for embeddings. Raises InputError where it is none of these.
    """
    path = Path(run)
    if path.is_dir() and not (path / "log.jsonl").exists():         # which pretrain.py writes
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
            model = Classifier(model, len(classes), content["head"], 0.0, content["freeze"], content["layer"])
    load_weights(content, model, frontend)
    model.single_label = content["args"].get("loss") == "ce"
    return model.to(device).eval(), frontend.to(device), classes


@torch.no_grad()
def encode_recording(path, model, frontend, layer=None, notes=None):
    """A recording of any length and rate, in equal parts of up to a minute, each by itself: its log-mels (T, 64) and
    embeddings (L, D) by block `layer` (None: the one that a classifier reads). Raises InputError for what `read_blocks`
    can't read, and more than LONGEST hours; so do `embed` and `predict`."""
    with open_audio(path) as (file, _, promised):
        seconds = promised / file.samplerate if promised else 60
    encoder, device = getattr(model, "encoder", model), frontend.mean.device
    # A part is as many seconds as make whole latents: 2, 4, ..., for the usual stack of 4 frames.
    multiple = math.lcm(encoder.settings["stack"] * HOP, SAMPLE_RATE) // SAMPLE_RATE
    parts = math.ceil(seconds / 60)
    window = multiple * math.ceil(seconds / parts / multiple)
    log_mels, embeddings = [], []
    for block in progress(read_blocks(path, window, notes), Path(path).name, unit=" parts"):
        if max(seconds, sum(map(len, log_mels)) * HOP / SAMPLE_RATE) > LONGEST * 3600:
            raise InputError(f"{path}: is longer than {LONGEST} hours; cut it into parts")
        if len(block) < HOP and log_mels:
            break               # next to nothing is left
        log_mel = frontend(torch.from_numpy(to_int16(block)[0])[None].to(device))
        log_mels.append(log_mel[0])
        embeddings.append(encoder.encode(log_mel, layer=layer or getattr(model, "layer", None))[0][0])
    return torch.cat(log_mels), torch.cat(embeddings)


def embed(path, model, frontend, layer=None, frames=False, notes=None):
    """The embedding of a recording by conformer block `layer` ("middle", or None, is the middle one): its mean and
    standard deviation over time (2 D,), or with `frames` all of it (L, D), 12.5 a second at R = 4. `notes`, a list,
    gets a remark where the recording is not as long as it says."""
    layer = block_number(getattr(model, "encoder", model), layer or "middle")
    _, x = encode_recording(path, model, frontend, layer, notes)
    return (x if frames else stats_over_time(x[None])[0]).cpu().numpy()


@torch.no_grad()
def predict(path, model, frontend, classes, threshold=0.5, notes=None):
    """What is heard in a recording: {class: probability}, the most probable first, and, if the head gives
    frame probabilities, the events: (onset, offset, class) in seconds, where they exceed `threshold`. As `embed`."""
    log_mel, x = encode_recording(path, model, frontend, notes=notes)
    probabilities, events = model.probabilities(model.clip_logits(x[None]))[0], None
    if model.head == "frames":
        heard = model.frame_logits(x[None])[0].sigmoid() > threshold                        # (L, C)
        changes = F.pad(heard.int(), (0, 0, 1, 1)).diff(dim=0).T                            # (C, L + 1)
        onsets, offsets = ((changes == sign).nonzero().tolist() for sign in (1, -1))
        step, end = model.encoder.settings["stack"] * HOP / SAMPLE_RATE, len(log_mel) * HOP / SAMPLE_RATE
        events = sorted((round(on * step, 2), round(min(off * step, end), 2), classes[c])
                        for (c, on), (_, off) in zip(onsets, offsets, strict=True))
    order = probabilities.argsort(descending=True).tolist()
    return {classes[c]: round(probabilities[c].item(), 4) for c in order}, events


def print_prediction(sound, probabilities, events, as_json):
    """What `predict` returns, for a person or for a program."""
    if as_json:
        return print(json.dumps(dict(file=sound, probabilities=probabilities, events=events)), flush=True)
    print(sound, *(f"{value:8.3f}  {name}" for name, value in list(probabilities.items())[:5]), sep="\n")
    for onset, offset, name in events or ():
        print(f"{onset:8.2f} to {offset:7.2f} s  {name}")


@torch.no_grad()
def plot_prediction(out, sound, model, frontend, classes, probabilities, events):
    """Draw what `predict` returns: log-mels, below them the probabilities of the five most probable classes over time
    (of each step or, for heads without, about each second), boxes around events. Needs matplotlib."""
    from matplotlib.figure import Figure

    log_mel, x = encode_recording(sound, model, frontend)
    steps = 1 if model.head == "frames" else min(len(x), 12)        # that make a column
    parts = x[:len(x) // steps * steps].unflatten(0, (-1, steps))
    columns = model.probabilities(model.clip_logits(parts)).cpu().numpy()
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


# -------------------------------------------------------------------------- the HEAR 2021 interface (hearbenchmark.com)


def load_model(model_file_path="runs/pretrain"):
    """HEAR: the encoder of a run, and what HEAR must know of it. Raises InputError as `load_run`."""
    model, frontend, _ = load_run(model_file_path)
    model = getattr(model, "encoder", model)
    model.frontend, model.sample_rate = frontend, SAMPLE_RATE
    model.timestamp_embedding_size, model.scene_embedding_size = model.settings["dim"], 2 * model.settings["dim"]
    return model


@torch.no_grad()
def get_timestamp_embeddings(audio, model):
    """HEAR: audio (B, S) in [-1, 1] -> embeddings (B, L, D) by the middle block, and the time of each in ms (B, L)."""
    x, _ = model.encode(model.frontend(audio), layer=block_number(model, "middle"))
    stack, end = model.settings["stack"], 1000 * audio.shape[1] / SAMPLE_RATE
    frames = torch.arange(x.shape[1], device=x.device) * stack + (stack - 1) / 2        # frame t is centred on t hops
    return x, (frames * (1000 * HOP / SAMPLE_RATE)).clamp(max=end).expand(len(x), -1)


def get_scene_embeddings(audio, model):
    """HEAR: audio (B, S) -> mean and standard deviation of these over time (B, 2 D); as --embed, up to a minute."""
    return stats_over_time(get_timestamp_embeddings(audio, model)[0])


# -------------------------------------------------------------------------------------------------------------- options


# Defaults of these options, overridden by the data set's line in RECIPES. The paper names AudioSet's batch of 640 and
# balancing, MagnaTagATune's batch of 64, the heads, the augmentations and the weight of 2 (Sec. 4); the rest it found
# by sweeps that it does not print. ESC-10 and synth were tried here, the others not; sets of one's own, often as
# small, get the same.
DEFAULTS = dict(updates=2000, batch_size=32, lr=5e-4, seconds=10.0, head="mean", head_dropout=0.1,
                balance=False, augment=["jitter", "time_mask", "mixup"], consistency=2.0, loss="bce", encoder_lr=1.0,
                layer="last", checkpoint_every=500)
FEW_LABELS = dict(updates=1000, batch_size=16, lr=1e-3, seconds=5.0, head="stats", augment=["jitter"], consistency=0.0,
                  loss=None)            # see `main`
RECIPES = {
    "synth": FEW_LABELS,
    "folder": FEW_LABELS,
    "csv": FEW_LABELS,
    "esc10": dict(FEW_LABELS, updates=400, seconds=3.0),
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


def parse(argv=None):
    """The options, with what the data set leaves open filled in, and the checkpoint to resume from or None. Raises
    InputError for impossible options."""
    parser = Parser(prog="finetune.py", description=__doc__,
                    epilog="Some defaults depend on the data set (RECIPES in finetune.py).")
    share = in_range(float, 0, 1)

    def block(text):
        return text if text in ("middle", "last") else in_range(int, 1, 1000)(text)

    add = parser.add_argument_group("run").add_argument
    add("--init", nargs="?", const="runs/pretrain", type=file_path, metavar="RUN", help="start from this pre-training "
        "run (no name: runs/pretrain); without it, from scratch")
    add("--out", type=file_path, help="folder of this run (runs/finetune; from scratch runs/scratch)")

    group = parser.add_argument_group("use a model, --init", "The folder of a run, or a .pt file in it.")
    add, use = group.add_argument, group.add_mutually_exclusive_group().add_argument
    use("--predict", nargs="+", type=file_path, metavar="SOUND", help="print the five most probable classes of each "
        "recording and, for models with the head 'frames', when each is heard")
    use("--embed", nargs="+", type=file_path, metavar="SOUND", help="write a row for each recording into --out (.npy): "
        "mean and standard deviation over time; --init may be pre-trained only")
    add("--frames", action="store_true", help="with --embed: an array for each recording, a row for each 80 ms, into "
        "--out (.npz)")
    add("--threshold", type=share, default=0.5, help="with --predict: of frame probabilities (%(default)s)")
    add("--json", action="store_true", help="with --predict: a line of JSON for each recording, with all classes")
    add("--tsv", type=file_path, metavar="FILE", help="with --predict: write the events, as in DCASE")
    add("--plot", type=file_path, metavar="FILE", help="with --predict of one recording: draw its log-mels, and when "
        "the five most probable classes are heard (.png, .svg, .pdf)")

    add = parser.add_argument_group("data").add_argument
    add("--data", choices=READERS, default="synth", help="'synth' is made on the fly; 'folder' are your own sounds, a "
        "sub-folder a class; 'csv' your own table with the columns file, labels (separated by ;) and perhaps split "
        "(train, valid, test or the number of a fold) and group (of clips that stay together) (%(default)s)")
    add("--root", type=file_path, help="where the set lies, in its official layout or packed; for csv the table")
    add("--fold", help="of sets with folds, the one to test on, or 'all', one after the other (1)")
    add("--fraction", type=in_range(float, 1e-6, 1), nargs="+", default=[1.0], help="of the training clips, class by "
        "class; several are tried one after the other (%(default)s)")
    add("--balance", action=argparse.BooleanOptionalAction, help="draw all classes equally often (Sec. 4.1; audioset)")
    add("--seconds", type=in_range(float, 0.1, 3600), help="of longer clips, train on random crops (10; synth, folder, "
        "csv 5, esc10 3)")
    add("--validate", action="store_true", help="hold out validation clips where a set has none: a tenth of the "
        "training clips, or the next fold. With such clips, the weights that do best on them are tested")
    add("--no-test", action="store_true", help="report the last weights' score on the validation clips instead: for "
        "choosing options")

    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, help="from scratch (tiny); with --init the size is that of the run")
    add("--layer", type=block, help="the conformer block that is read: a number, 'middle' or 'last' (last; "
        "--embed: middle)")
    add("--head", choices=[*POOLINGS, "frames"], help="average the embeddings, then a linear layer; 'stats': "
        "average and deviation, better with few labels; 'frames': probabilities at each step, then linear softmax "
        "pooling, which also tells when (mean; audioset frames; synth, esc10, folder, csv stats)")
    add("--freeze", action="store_true", help="train the head only, on standardised embeddings (linear probe)")
    add("--head-dropout", type=in_range(float, 0, 0.99), help="more works against overfitting (by data set, "
        "0.1 to 0.3)")

    add = parser.add_argument_group("optimisation (Sec. 4)").add_argument
    add("--updates", type=in_range(int, 1, 10**9), help="(esc10 400, synth, folder, csv 1000, ..., audioset 60000)")
    add("--batch-size", type=in_range(int, 1, 10**6), help="clips in an update, over all processes (by data set, "
        "16 to 640)")
    add("--lr", type=in_range(float, 1e-12, 1e6), help="peak learning rate (by data set, 3e-4 to 1e-3; frozen "
        "1e-2)")
    add("--encoder-lr", type=share, help="the encoder's, as a share of --lr (1)")
    add("--stages", type=share, nargs=3, default=[0.3, 0.3, 0.4], metavar=("WARMUP", "HOLD", "DECAY"),
        help="shares of the updates (%(default)s)")
    add("--loss", choices=["bce", "ce"], help="binary cross-entropy or, for one label a clip, cross-entropy (bce; "
        "esc10, folder, csv ce where each clip has one and --head is not frames)")
    add("--augment", nargs="*", choices=["jitter", "time_mask", "mixup"], metavar="NAME", help="those of jitter, "
        "time_mask and mixup to apply; no name: none (all; synth, esc10, folder, csv jitter)")
    add("--consistency", type=in_range(float, 0, 1e6), help="weight of the consistency loss (Sec. 4.2); 0 halves the "
        "time (2; synth, esc10, folder, csv 0)")
    add_running_options(parser)

    args = parser.parse_args(argv)
    if (args.tsv or args.plot) and not args.predict or args.frames and not args.embed:
        raise InputError("--tsv and --plot are for --predict, --frames is for --embed")
    if args.predict or args.embed:
        args.init = args.init or "runs/finetune"
        return args, None
    args.out = args.out or ("runs/finetune" if args.init else "runs/scratch")
    recipe = {**DEFAULTS, **RECIPES[args.data], **({"lr": FREEZE_LR} if args.freeze else {})}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args, checkpoint = resume(parser, args, argv)
    for wrong, message in (
            (abs(sum(args.stages) - 1) > 1e-3, f"--stages {args.stages} must be three shares that sum to 1"),
            (args.loss == "ce" and args.head == "frames",
             "--loss ce is for --head mean or stats: it leaves frame probabilities without a scale"),
            ((args.head == "stats" or args.freeze and args.head == "mean") and world_size() == 1
             and 1 in (args.batch_size, args.micro_batch),
             "--freeze and --head stats standardise over a batch, which needs two clips at least: raise --batch-size "
             "or --micro-batch, or use --head mean without --freeze"),
            (args.data == "synth" and args.root, "--root needs --data, the kind of set that lies there"),
            (args.size and args.init, "--size is for training from scratch: with --init it is that of the run"),
            (len({f"{x:g}" for x in args.fraction}) < len(args.fraction), "--fraction: one is there twice")):
        if wrong:
            raise InputError(message)
    return args, checkpoint


if __name__ == "__main__":
    run_script(main)
