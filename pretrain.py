"""Pre-train a conformer on unlabelled sound (Sec. 2).

On a laptop, ten minutes of the tiny model on synthetic sounds:
    python pretrain.py
Your own recordings, decoded once, then trained on:
    python datasets.py pack /my/sounds packed
    python pretrain.py --data packed --out runs/mine --updates 10000
One GPU, or eight of them:
    torchrun pretrain.py --size large --data packed --compile --out runs/large
    torchrun --nproc_per_node=8 pretrain.py --size large --data packed --compile --out runs/large
Then `python finetune.py --init`. The run's folder has checkpoint.pt, all that is needed to resume (--resume) or
to fine-tune, and log.jsonl, a line of JSON every few updates.

Which crops, masks and distractors an update sees depends only on (seed, update, place in the batch) and, for masks
and distractors, on the kind of device: not on the number of processes, nor on what was before. So a run that is
killed and resumed ends as if it had not been: on one CPU process to the same bits, on GPUs, which add in any order,
up to rounding. Only dropout is drawn by each process for itself, and --norm batch looks at a process's own clips.
"""
import collections
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from conformer import NORMS
from datasets import (InputError, Parser, batches, derive_seed, find_device, in_range, open_unlabelled,
                      progress, rank, reading, run_script, say, world_size, write_whole)
from frontend import LOG_MELS, SAMPLE_RATE, LogMel, frame_count, padding_mask
from wav2vec2 import COMMON, SIZES, Wav2Vec2, collapse_warning, summarize

# Defaults of these options. The paper states updates, warm-up and learning rate of small and large (Sec. 2.3). A
# checkpoint of large has 1 GB: every 500 updates, eight GPUs would spend half their time on writing it.
LONG = dict(updates=300_000, warmup=10_000, lr=3e-4, batch_size=256, seconds=10.0, checkpoint_every=5000)
SCHEDULES = dict(tiny=dict(updates=1000, warmup=100, lr=1e-3, batch_size=32, seconds=5.0, checkpoint_every=100),
                 small=LONG, large=LONG)


# ------------------------------------------------------------------------------------------------ pre-training


def learning_rate(update, peak, warmup, updates):
    """Sec. 2.3: linear to the peak over `warmup` updates (peak / warmup in the first), linear to 0 at `updates`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (updates - update) / (updates - warmup)


def main():
    """One run, or this process's part of it. Raises InputError where it can't start or continue."""
    args = parse()
    device = init_distributed(args)
    source, held_out = open_unlabelled(args.data, args.seconds)
    digest = source.digest()
    checkpoint = resume(args, Path(args.out), "pretrain.py", digest)
    model, frontend = build(args, checkpoint, source, device)
    say(f"{args.size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on {device} x "
        f"{world_size()}; {' '.join(args.data)}, {len(source)} recordings to train on; "
        + (f"resumed after update {checkpoint['update']}" if checkpoint else "from scratch"))
    train(model, frontend, source, held_out, args, digest, checkpoint)
    say(f"{args.out}/checkpoint.pt; now python finetune.py --init {args.out}")
    leave()


def train(model, frontend, source, held_out, args, digest, checkpoint):
    """Pre-train in place, from the beginning or from `checkpoint`; new ones keep `digest`. See `step_if_finite`."""
    device, world = frontend.mean.device, world_size()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Adam with decoupled weight decay, as in fairseq (Sec. 2.3).
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                                  fused=device.type != "mps")
    done, skipped, skipped_in_a_row = 0, 0, 0       # updates, and those left out as they were not finite
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        done = checkpoint["update"]
        skipped = checkpoint["skipped"]
    wrapped = model if world == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    samples = round(args.seconds * SAMPLE_RATE)
    local_batch = args.batch_size // world
    own_clips = slice(rank() * local_batch, (rank() + 1) * local_batch)
    loader = batches(source, args.batch_size, args.updates, args.seed, first=done, rank=rank(), world=world,
                     workers=args.workers, samples=samples)
    log = Log(args, done)

    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the source.
    for update, (waveform, lengths, numbers) in enumerate(loader, done):
        lr = learning_rate(update, args.lr, args.warmup, args.updates)
        optimizer.param_groups[0]["lr"] = lr
        # Masks and distractors are drawn for the whole batch, so that they do not depend on the number of processes.
        generator = torch.Generator(device).manual_seed(derive_seed(1, args.seed, update))
        rand = torch.rand(model.rand_shape(args.batch_size, frame_count(samples)), device=device, generator=generator)
        torch.manual_seed(derive_seed(2, args.seed, update, rank()))                    # dropout

        sums = backward(wrapped, frontend, waveform, lengths, rand[own_clips], args)
        gradients = [p.grad for p in parameters if p.grad is not None]
        # From the sum over masked steps to the mean; DDP has divided by the number of processes.
        torch._foreach_mul_(gradients, world / sums["counted"].clamp(min=1))
        sums["gradient_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        sums = fetch(sums)                                                              # waits for the device, once
        skipped_in_a_row = step_if_finite(optimizer, sums, skipped_in_a_row, source.clips[numbers[0]])
        skipped += bool(skipped_in_a_row)

        done = update + 1
        checkpoint_due = done % args.checkpoint_every == 0 or done == args.updates
        log.update(done, sums if skipped_in_a_row == 0 else None, lr, skipped, checkpoint_due)
        if checkpoint_due and len(held_out):
            log.write(done, **held_out_figures(model, frontend, held_out, args))
        if checkpoint_due:
            save_checkpoint(Path(args.out) / "checkpoint.pt", model, frontend, update=done, skipped=skipped,
                            optimizer=optimizer.state_dict(), settings=model.settings, args=vars(args), data=digest,
                            script="pretrain.py")
    log.bar.close()


def backward(model, frontend, waveform, lengths, rand, args):
    """Gradients of the loss, summed over the masked steps of a batch (DDP: of all processes, divided by their number).
    Returns the sums of `Wav2Vec2.forward`, added up over micro-batches and processes."""
    device = frontend.mean.device
    micro_batch = args.micro_batch or len(waveform)
    sums = collections.Counter()                    # adds up
    for i in range(0, len(waveform), micro_batch):
        part = slice(i, i + micro_batch)
        log_mel = frontend(waveform[part].to(device, non_blocking=True), lengths[part])         # (B, T, 64)
        model.require_backward_grad_sync = i + micro_batch == len(waveform)     # DDP: adds up in the last part only
        with autocast(device, args.dtype):
            loss, sums_of_part = model(log_mel, padding_mask(lengths[part], log_mel), rand[part])
        (loss * sums_of_part["counted"]).backward()                 # the sum over masked steps, not their mean
        sums.update(sums_of_part)
    return all_reduce(sums)


def build(args, checkpoint, source, device):
    """Model and frontend, new or of a checkpoint. Raises InputError for settings that are impossible."""
    torch.manual_seed(args.seed)
    if checkpoint:
        model, frontend = load_encoder(checkpoint)
    else:
        names = (*SIZES[args.size], *COMMON)
        changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        try:
            model, frontend = Wav2Vec2(args.size, **changes), LogMel()
        except ValueError as error:
            raise InputError(str(error)) from None
        sample = batches(source, batch_size=32, updates=16, seed=args.seed, workers=args.workers)
        frontend.fit_normalization((waveform, lengths) for waveform, lengths, _ in
                                   progress(sample, "mean and deviation"))
    if args.compile:
        compile_blocks(model)
    return model.to(device).train(), frontend.to(device)


@torch.no_grad()
def held_out_figures(model, frontend, source, args):
    """Loss and accuracy on crops of recordings that are never trained on, with the same masks each time."""
    device = frontend.mean.device
    numbers = np.linspace(0, len(source) - 1, min(len(source), 128)).astype(int)
    sums = collections.Counter()
    model.eval()
    for i in range(0, len(numbers), 16):
        part = numbers[i:i + 16]
        generators = [np.random.default_rng(n) for n in part]
        waveform, lengths = source.batch(part, generators, round(args.seconds * SAMPLE_RATE))
        log_mel = frontend(waveform.to(device), lengths)
        rand = torch.rand(model.rand_shape(*log_mel.shape[:2]), generator=torch.Generator().manual_seed(i)).to(device)
        with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):        # other shapes
            _, sums_of_part = model(log_mel, padding_mask(lengths, log_mel), rand)
        sums.update(fetch(sums_of_part))            # a Counter adds up
    model.train()
    figures = summarize(sums)
    return {f"held_out_{name}": figures[name] for name in ("loss", "accuracy")}


class Log:
    """A run's progress, in the first process: the bar and log.jsonl. Continues after `done` updates: later lines, and
    one that a killed run left incomplete, are dropped."""

    def __init__(self, args, done):
        self.args = args
        self.path = Path(args.out) / "log.jsonl"
        self.bar = training_bar(args.updates, done, "pre-train")
        self.sums = collections.Counter()           # over the updates since the last line
        self.last_update, self.last_time = done, time.perf_counter()
        self.warned = False
        if rank() == 0:
            lines = self.path.read_text(errors="replace").splitlines(True) if done and self.path.exists() else []
            whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["update"] <= done]
            write_whole(self.path, "".join(kept).encode())

    def write(self, update, **figures):
        """A line of log.jsonl."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(update=update, **figures)) + "\n")

    def update(self, done, sums, lr, skipped, due):
        """Count in the `done`-th update (sums None: skipped); write a line if `due`, or every --log-every updates."""
        self.bar.update()
        if sums:
            self.sums.update(sums, updates=1)
        due = due or done % self.args.log_every == 0
        if not (due and self.sums):
            return
        now = time.perf_counter()
        speed = (done - self.last_update) * self.args.batch_size / (now - self.last_time)            # clips a second
        figures = dict(lr=lr, skipped=skipped, gradient_norm=self.sums["gradient_norm"] / self.sums["updates"],
                       clips_per_second=round(speed, 1), **summarize(self.sums))
        self.write(done, **figures)
        self.bar.set_postfix_str(f"loss {figures['loss']:.2f} accuracy {figures['accuracy']:.2f} (chance "
                                 f"{figures['chance']:.2f}) lr {lr:.1e} {speed:.0f} clips/s")
        warning = collapse_warning(figures, done / self.args.updates)
        if warning and not self.warned and rank() == 0:
            self.bar.write(f"update {done}: {warning}", sys.stderr)
        self.warned = bool(warning)
        self.last_update, self.last_time = done, now
        self.sums.clear()


def parse(argv=None):
    """The options of a run, with what its size leaves open filled in."""
    parser = Parser(prog="pretrain.py", description=__doc__)
    count = in_range(int, 1, 10**9)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["synth"], help="'synth', or folders that `datasets.py pack` wrote (synth)")
    add("--seconds", type=in_range(float, 1, 3600), help="length of a crop, and so of context (tiny: 5, else 10)")
    add("--batch-size", type=in_range(int, 1, 10**6), help="crops in an update, of all processes (tiny: 32, else 256)")
    add("--out", default="runs/pretrain", help="folder of this run (%(default)s)")
    add("--log-every", type=count, default=10, help="updates between two lines of the log (%(default)s)")

    add = parser.add_argument_group("model", "--size sets all of these; each can be changed by itself.").add_argument
    add("--size", choices=SIZES, default="tiny", help="small and large are the paper's (%(default)s)")
    for name, text in (
            ("dim", "D, width of the conformer"), ("blocks", "conformer blocks (Fig. 2b)"),
            ("heads", "attention heads (Fig. 2c)"), ("ffn-dim", "units in feed-forward networks"),
            ("first-kernel", "steps of the first block's convolution (31)"), ("kernel", "steps of the others' (15)"),
            ("stack", "R, log-mel frames in a latent (4)"), ("latent-dim", "width of a latent (256)"),
            ("mask-length", "latents in a masked span (3); shorter ones are easier to predict"),
            ("distractors", "K (100)")):
        add(f"--{name}", type=in_range(int, 1, 16_384), help=text)
    add("--mask-prob", type=in_range(float, 0.01, 0.99), help="share of latents masked (0.3); more is harder")
    add("--temperature", type=in_range(float, 1e-6, 1e6), help="divides similarities (0.1); larger blurs the choice")
    add("--dropout", type=in_range(float, 0, 0.99), help="share of activations dropped (0.1)")
    add("--norm", choices=NORMS, help="in the convolution (group)")

    add = parser.add_argument_group("optimisation (Sec. 2.3)").add_argument
    add("--updates", type=count, help="of the whole run (tiny: 1000, else 300000)")
    add("--warmup", type=in_range(int, 0, 10**9), help="updates to the peak (tiny: a tenth, else a thirtieth of all)")
    add("--lr", type=in_range(float, 1e-12, 1e6), help="peak learning rate (tiny: 1e-3, else 3e-4)")
    add_running_options(parser)

    args = parser.parse_args(argv)
    schedule = dict(SCHEDULES[args.size])
    if args.updates is not None:                # a warm-up that was not given keeps its share
        schedule["warmup"] = args.updates * schedule["warmup"] // schedule["updates"]
    for name, value in schedule.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# -------------------------------------------- running: options, processes, checkpoints (finetune.py uses them too)

# Options that may differ when a run is resumed. (Data and --init are compared by a digest instead.)
MAY_CHANGE = {"resume", "out", "init", "data", "root", "device", "workers", "micro_batch", "checkpoint_every",
              "log_every", "compile"}


def add_running_options(parser):
    """The options that pre-training and fine-tuning have in common."""
    add, count = parser.add_argument_group("running").add_argument, in_range(int, 1, 10**9)
    add("--resume", action="store_true", help="continue from the checkpoint in --out; start where there is none yet")
    add("--checkpoint-every", type=count, help="updates between checkpoints (500; to pre-train tiny 100, else 5000)")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of all that is random (%(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], help="where to compute (the best there is)")
    add("--dtype", choices=["fp32", "bf16"], help="bf16 halves memory and time where supported (CUDA: bf16, else fp32)")
    add("--compile", action="store_true", help="torch.compile the blocks: on a GPU large is 1.6 times as fast")
    add("--workers", type=in_range(int, 1, 1024), help="threads that read batches (with a GPU 2, else 1), or decode")
    add("--micro-batch", type=count, help="clips that go through the model at once: fewer need less memory (all)")
    add("--weight-decay", type=in_range(float, 0, 1e6), default=0.01, help="more regularises more (%(default)s)")


def resume(args, out, script, data):
    """The checkpoint in a run's folder, from which --resume continues, or None where there is none yet; makes the
    folder. `data` is the digest of the clips. Raises InputError for options that the run was not started with, for
    other data, and where processes disagree on all that."""
    checkpoint = load_checkpoint(out, script) if (out / "checkpoint.pt").exists() else None
    if world_size() > 1:
        facts = [None] * world_size()
        dist.all_gather_object(facts, (data, checkpoint and checkpoint["update"]))
        if any(fact != facts[0] for fact in facts):
            raise InputError(f"{out}: not all processes find the same checkpoint there, or the same data: machines "
                             "must share --out, and have the same recordings")
    if checkpoint:
        if checkpoint["data"] != data:
            raise InputError(f"{out} began with another --init, other recordings, labels or splits, or another order")
        for name, before in checkpoint["args"].items():
            if name not in MAY_CHANGE and getattr(args, name, before) != before:
                option = f"--{name.replace('_', '-')} was {before}, not {getattr(args, name)}"
                raise InputError(f"{out} was started otherwise ({option}): do as then, or name another --out")
    out.mkdir(parents=True, exist_ok=True)          # now that all have looked
    return checkpoint


def init_distributed(args):
    """Join the processes that torchrun started, if it did, and return this one's device. Raises InputError where --out
    is there already and --resume not given, for a device that is not there, and a batch that can't be divided."""
    if Path(args.out).exists() and not args.resume:         # before the first process may make it
        raise InputError(f"{args.out} is there already: continue with --resume, or name another --out")
    device, world = find_device(args.device), world_size()
    local_batch = args.batch_size // world
    if args.batch_size % world or local_batch % (args.micro_batch or local_batch):
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of {world} processes times --micro-batch")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return device


def training_bar(updates, done, label):
    """A bar in the first process; in a log, where stderr is no terminal, it is written once a minute."""
    return tqdm(total=updates, initial=done, desc=label, unit=" updates", smoothing=0.05, disable=rank() > 0,
                mininterval=0.1 if sys.stderr.isatty() else 60)


def compile_blocks(model):
    """Compile each block, in place, so that the names of the weights stay the same."""
    torch._dynamo.config.optimize_ddp = False       # else DDP's buckets, smaller than a block, would cut each in two
    for block in model.conformer.blocks:
        block.compile()


def autocast(device, dtype):
    """Context for the model's forward pass: bfloat16 if --dtype says so or, without it, on CUDA."""
    bf16 = dtype == "bf16" or dtype is None and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def save_checkpoint(path, model, frontend, **content):
    """Write a checkpoint, in the first process, so that, even if the power fails, `path` is the old one or the new."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(dict(content, model=model.state_dict(), frontend=frontend.state_dict(), log_mels=LOG_MELS), buffer)
        write_whole(path, buffer.getbuffer())


def load_checkpoint(run, script=None):
    """The checkpoint in a run's folder (or the file itself), on the CPU. It must be from `script`, if given.

    Runs no code that may be hidden in it. Raises InputError where it is missing or something else.
    """
    path = Path(run)
    path = path / "checkpoint.pt" if path.is_dir() else path
    with reading(path, "name the folder of a run (after --fold all, of a fold)"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
        log_mels = checkpoint.get("log_mels")
    checkpoint["path"] = str(path)
    if log_mels != LOG_MELS:
        raise InputError(f"{path}: has log-mels of {log_mels or 'an earlier version'}, not {LOG_MELS}: train anew")
    if script not in (None, written_by):
        raise InputError(f"{path}: is from {written_by}, not from {script}; name the folder of such a run")
    return checkpoint


def load_encoder(checkpoint):
    """The model of a checkpoint of pretrain.py, and its frontend. Raises InputError for one of another version."""
    with reading(checkpoint["path"], "use another, or the version of this code that wrote it"):
        model, frontend = Wav2Vec2(**checkpoint["settings"]), LogMel()      # settings are complete, so no size counts
        model.load_state_dict(checkpoint["model"])
        frontend.load_state_dict(checkpoint["frontend"])
    return model, frontend


def step_if_finite(optimizer, figures, skipped_in_a_row, clip):
    """A step of the optimiser, skipped where a figure of the update is not finite. Returns how many in a row are now
    skipped; `skipped_in_a_row` were before. Raises InputError at ten, naming a clip of the batch."""
    finite = all(map(math.isfinite, figures.values()))
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    if not finite and skipped_in_a_row == 9:
        raise InputError(f"ten updates in a row, now with {clip.name}, ..., are not finite: lower --lr, check the data")
    return 0 if finite else skipped_in_a_row + 1


def all_reduce(sums):
    """Add up numbers with names, a dictionary of scalar tensors, over all processes in one message."""
    vector = torch.stack(list(sums.values()))
    if world_size() > 1:
        dist.all_reduce(vector)
    return dict(zip(sums, vector, strict=True))


def fetch(numbers):
    """Scalar tensors with names -> Python's numbers, waiting for the device once."""
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def leave():
    """Leave the other processes, when all have come so far."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
