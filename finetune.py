"""Fine-tune a pre-trained conformer on labelled sound (Sec. 4), or train one from scratch.

The labels of the synthetic sounds, from what `python pretrain.py` learned, and without:
    python finetune.py --init
    python finetune.py
ESC-50 or ESC-10, all five folds, from your own pre-training, with all labels and a third:
    python finetune.py --data esc50 --root /my/ESC-50 --init runs/mine --fold all
    python finetune.py --data esc10 --root /my/ESC-50 --init runs/mine --fold all --fraction 0.333
Several GPUs: `torchrun --nproc_per_node=8 finetune.py ...`.
In the run's folder: a checkpoint for each fold and fraction, and a line of JSON in results.jsonl.
"""
import argparse
import json
import sys
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
from conformer import Dropout
from datasets import LABELLED, InputError, Parser, batches, collate, in_range
from frontend import LogMel
from pretrain import (autocast, load_checkpoint, load_model, padding_of, save_checkpoint, seed_of,
                      start)
from wav2vec2 import SIZES, Wav2Vec2

METRICS = {"accuracy": metrics.accuracy, "mAP": metrics.mean_average_precision}

# What --updates, --batch-size, --lr, --seconds and --head-dropout are when not given.
RECIPES = {
    "synth": dict(updates=250, batch_size=32, lr=1e-3, seconds=10.0, head_dropout=0.1),
    "esc10": dict(updates=500, batch_size=16, lr=5e-4, seconds=10.0, head_dropout=0.1),
    "esc50": dict(updates=2000, batch_size=32, lr=5e-4, seconds=10.0, head_dropout=0.1),
}


def linear_softmax(probabilities, padding_mask=None):
    """Pool frame probabilities into clip probabilities (Sec. 4; TALNet, Wang et al. 2019).

    A mean in which each frame has its own probability for weight: sum of p^2 / sum of p over time.
    (B, L, C), padding_mask (B, L) or None -> (B, C), in [1e-7, 1 - 1e-7].
    """
    p = probabilities.float().clamp(1e-7, 1 - 1e-7)
    if padding_mask is not None:
        p = p.masked_fill(padding_mask[:, :, None], 0)
    return p.square().sum(1) / p.sum(1)


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
        encoder.requires_grad_(not freeze)
        encoder.output.requires_grad_(False)            # only pre-training needs these two, and
        encoder.mask_embedding.requires_grad_(False)    # several processes refuse unused parameters
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(encoder.settings["width"], classes)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def frame_logits(self, log_mel, padding_mask=None):
        """Logits at each step (B, L, C), whatever the head, and their padding mask (B, L)."""
        x, padding_mask = self.encoder.encode(log_mel, padding_mask)
        return self.linear(self.dropout(x)), padding_mask

    def forward(self, log_mel, padding_mask=None):
        """log_mel (B, T, 64), padding_mask (B, T) or None -> logits (B, C), float32."""
        if self.head == "frames":
            logits, padding_mask = self.frame_logits(log_mel, padding_mask)
            return torch.logit(linear_softmax(logits.float().sigmoid(), padding_mask))
        x, padding_mask = self.encoder.encode(log_mel, padding_mask)
        return self.linear(self.dropout(mean_over_time(x, padding_mask))).float()


def three_stages(update, updates, peak, shares=(0.3, 0.3, 0.4)):
    """Learning rate of Sec. 4.3: a linear warm-up from a hundredth of the peak, a hold, and an
    exponential decay to a twentieth (start and end as in fairseq's tri-stage schedule)."""
    warmup, hold, decay = (share * updates for share in shares)
    if update < warmup:
        return peak * (0.01 + 0.99 * update / warmup)
    if update < warmup + hold or decay == 0:
        return peak
    return peak * 0.05 ** ((update - warmup - hold) / decay)


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    share = in_range(float, 0, 1)
    group = parser.add_argument_group("run")
    group.add_argument("--init", nargs="?", const="runs/pretrain", metavar="RUN", help="start from "
                       "this pre-training run (no name: runs/pretrain); without it, from scratch")
    group.add_argument("--out", default="runs/finetune", help="folder of this run (%(default)s)")
    group.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0,
                       help="another seed starts "
                       "from another head, draws other clips (%(default)s)")
    group.add_argument("--device", choices=["cpu", "cuda", "mps"], help="(the best there is)")
    group.add_argument("--dtype", choices=["fp32", "bf16"], help="(bf16 on CUDA, else fp32)")
    group.add_argument("--workers", type=in_range(int, 0, 1024), default=0,
                       help="processes that read data "
                       "(%(default)s: the clips are in memory)")

    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=LABELLED, default="synth",
                       help="the labelled set; synth is "
                       "made on the fly (%(default)s)")
    group.add_argument("--root", help="where the data set lies, in its official layout")
    group.add_argument("--fold", default="1", help="the fold to test on, or 'all', one after the "
                       "other (%(default)s)")
    group.add_argument("--fraction", type=in_range(float, 1e-6, 1), nargs="+", default=[1.0],
                       help="of the training "
                       "clips, class by class; several are tried one after the other (%(default)s)")
    group.add_argument("--seconds", type=in_range(float, 0.1, 3600),
                       help="longest clip in training: of longer ones a random crop each time, which "
                       "also works against over-fitting; clips are tested whole (10)")
    group.add_argument("--validate", action="store_true", help="leave the test set alone: hold out "
                       "the next fold (or a fifth) of the training clips and report on these. For "
                       "choosing options")

    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=SIZES, help="from scratch (tiny); with --init the size is "
                       "that of the run")
    group.add_argument("--head", choices=["mean", "frames"], default="mean", help="'mean': average "
                       "the embeddings, then a linear layer; 'frames': probabilities at each step, "
                       "then linear softmax pooling (%(default)s)")
    group.add_argument("--freeze", action="store_true", help="train the head only (linear probe)")
    group.add_argument("--head-dropout", type=in_range(float, 0, 0.99),
                       help="before the output layer; more helps "
                       "against over-fitting with few labels (0.1)")

    group = parser.add_argument_group("optimisation (Sec. 4)")
    group.add_argument("--updates", type=in_range(int, 1, 10**9),
                       help="(synth 250, esc10 500, esc50 2000)")
    group.add_argument("--batch-size", type=in_range(int, 1, 10**6),
                       help="clips in an update, over all processes "
                       "(esc10 16, else 32)")
    group.add_argument("--lr", type=in_range(float, 1e-12, 1e6),
                       help="peak learning rate (synth 1e-3, else 5e-4)")
    group.add_argument("--stages", type=share, nargs=3, default=(0.3, 0.3, 0.4),
                       metavar=("WARMUP", "HOLD", "DECAY"), help="shares of the updates (%(default)s)")
    group.add_argument("--weight-decay", type=in_range(float, 0, 1e6), default=0.01, help="pulls "
                       "weights to 0; more of it regularises more (%(default)s)")
    group.add_argument("--loss", choices=["bce", "ce"], default="bce", help="binary cross-entropy, "
                       "as in the paper, or, where a clip has one label, cross-entropy (%(default)s)")
    group.add_argument("--augment", nargs="*", choices=["jitter", "time_mask", "mixup"], default=[],
                       help="augmentations of Sec. 4.1 to apply (none)")
    args = parser.parse_args(argv)
    for name, value in RECIPES[args.data].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if abs(sum(args.stages) - 1) > 1e-3:
        raise InputError(f"--stages {args.stages} must be three shares that sum to 1")
    if args.size is not None and args.init is not None:
        raise InputError("--size is for training from scratch: with --init it is that of the run")
    if args.data != "synth" and args.root is None:
        raise InputError(f"--data {args.data} needs --root, the folder where it lies")
    return args


def build(args, classes, checkpoint):
    """A new classifier, and the frontend: of the checkpoint if there is one, else from scratch."""
    torch.manual_seed(args.seed)
    frontend = LogMel()
    if checkpoint:
        encoder = Wav2Vec2(**checkpoint["settings"])    # which are all there are, so no size counts
        load_model(checkpoint, encoder, frontend)
    else:
        encoder = Wav2Vec2(args.size or "tiny")
    return Classifier(encoder, classes, args.head, args.head_dropout, args.freeze), frontend


def split(data, fold, fraction, args):
    """Training and test set of a fold; see --fraction and --validate."""
    training, test = np.flatnonzero(data.folds != fold), np.flatnonzero(data.folds == fold)
    if args.validate:
        others = sorted(set(data.folds[training]) - {0})
        if others:
            held_out = data.folds[training] == next((k for k in others if k > fold), others[0])
        else:
            held_out = np.arange(len(training)) % 5 == 0
        training, test = training[~held_out], training[held_out]
    if len(training) == 0 or len(test) == 0:
        raise InputError(f"{args.data}: fold {fold} leaves {len(training)} clips to train on and "
                         f"{len(test)} to test on; is the table of the data set whole?")
    training = data.subset(training)
    if fraction < 1:
        training = training.fraction(fraction, args.seed)
    return training, data.subset(test)


def augmented(waveform, lengths, frontend, args, generator):
    """Log-mels (B, T, 64) and padding mask of a batch, after the augmentations of Sec. 4.1."""
    noise = torch.rand(len(waveform), 4, generator=generator).to(waveform.device)
    order = torch.randperm(len(waveform), generator=generator).to(waveform.device)
    if "jitter" in args.augment:
        waveform = augment.jitter(waveform, noise[:, 0])
    log_mel = frontend(waveform)
    padding_mask = padding_of(lengths, log_mel)
    if "time_mask" in args.augment:
        log_mel = augment.time_mask(log_mel, noise[:, 1:3], padding_mask)
    if "mixup" in args.augment:
        log_mel = augment.mixup(log_mel, noise[:, 3], order, padding_mask)
    return log_mel, padding_mask


@torch.no_grad()
def predict(model, frontend, data, args, device, rank=0, world=1, batch_size=32):
    """Logits (N, C) for all clips of a labelled set, each whole; of all processes together."""
    model.eval()
    scores = torch.zeros(len(data), len(data.classes))
    by_length = np.argsort([len(waveform) for waveform in data.waveforms], kind="stable")[rank::world]
    for i in range(0, len(by_length), batch_size):
        clips = [(data.waveforms[n], n) for n in by_length[i:i + batch_size]]
        waveform, lengths, numbers = collate(clips)
        log_mel = frontend(waveform.to(device))
        with autocast(device, args.dtype):
            scores[numbers] = model(log_mel, padding_of(lengths, log_mel)).float().cpu()
    if not scores.isfinite().all():
        raise InputError("the model's predictions are not finite: lower --lr")
    if world > 1:               # each clip is 0 everywhere but in one process
        scores = scores.to(device)
        dist.all_reduce(scores)
    return scores.cpu()


def train(model, frontend, data, args, device, rank, world, label):
    """Fine-tune in place on a labelled set; `label` names the run in the progress bar."""
    frontend.to(device)
    model.to(device).train()
    wrapped = model if world == 1 else DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                                  fused=device.type != "mps")
    labels = torch.from_numpy(data.labels)
    loader = batches(data, args.batch_size, args.updates, args.seed, 0, rank, world, args.workers)
    bar = tqdm(loader, label, disable=rank > 0, unit=" updates", leave=False)
    for update, (waveform, lengths, numbers) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = three_stages(update, args.updates, args.lr, args.stages)
        generator = torch.Generator().manual_seed(seed_of(1, args.seed, update, rank))
        torch.manual_seed(seed_of(2, args.seed, update, rank))          # dropout
        with torch.no_grad():
            log_mel, padding_mask = augmented(waveform.to(device), lengths, frontend, args, generator)
        with autocast(device, args.dtype):
            logits = wrapped(log_mel, padding_mask)
        target = labels[numbers].to(device)
        if args.loss == "ce":
            loss = F.cross_entropy(logits, target.argmax(1))
        else:
            loss = F.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % 10 == 0 or update == args.updates - 1:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            if not np.isfinite(loss.item()):
                bar.close()
                raise InputError(f"the loss is not finite at update {update}: lower --lr")


def main(args):
    device, rank, world = start(args.device)
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} does not divide by {world} processes")
    checkpoint = load_checkpoint(args.init) if args.init is not None else None
    data = LABELLED[args.data](args.root)
    if args.loss == "ce" and data.metric != "accuracy":
        raise InputError(f"--loss ce is for one label a clip; {args.data} has several: use bce")
    folds = sorted(set(data.folds.tolist()) - {0})
    if args.fold != "all":
        if args.fold not in map(str, folds):
            raise InputError(f"--fold {args.fold}: {args.data} has {', '.join(map(str, folds))}, all")
        folds = [int(args.fold)]
    if rank == 0:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        results = open(out / "results.jsonl", "a", buffering=1)
        print(f"{args.data}: {len(data)} clips, {len(data.classes)} classes, on {device} x {world}; "
              + (f"from {args.init}" if args.init else f"{args.size or 'tiny'} from scratch"))
    for fraction in args.fraction:
        scores = []
        for fold in folds:
            training, test = split(data, fold, fraction, args)
            training.seconds = args.seconds
            model, frontend = build(args, len(data.classes), checkpoint)
            if not checkpoint:
                frontend.measure(collate([(w, 0)])[:2] for w in training.waveforms)
            began = time.time()
            train(model, frontend, training, args, device, rank, world, f"fold {fold}")
            logits = predict(model, frontend, test, args, device, rank, world)
            scores.append(METRICS[data.metric](logits, test.labels))
            if rank == 0:
                line = dict(fold=fold, fraction=fraction, train=len(training), test=len(test),
                            metric=data.metric, score=scores[-1],
                            minutes=round((time.time() - began) / 60, 2), args=vars(args))
                results.write(json.dumps(line) + "\n")
                print(f"fold {fold}: {'validation ' * args.validate}{data.metric} {scores[-1]:.3f} "
                      f"on {len(test)} clips, after {len(training)} clips x "
                      f"{args.updates * args.batch_size / len(training):.0f} epochs, "
                      f"{line['minutes']:.1f} min", flush=True)
                save_checkpoint(out / f"fold{fold}_fraction{fraction:g}.pt", model=model.state_dict(),
                                frontend=frontend.state_dict(), settings=model.encoder.settings,
                                classes=data.classes, head=args.head, args=vars(args))
        if rank == 0 and len(folds) > 1:
            print(f"fraction {fraction:g}: mean {data.metric} over {len(folds)} folds "
                  f"{np.mean(scores):.3f} (standard deviation {np.std(scores):.3f})", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse())
    except (InputError, OSError) as error:
        sys.stderr.write(f"finetune.py: {error}\n")
        sys.exit(2)
