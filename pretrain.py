"""Pre-train a conformer on unlabelled sound (Sec. 2).

On a laptop, a few minutes of the tiny model on synthetic sounds:
    python pretrain.py
Your own recordings, decoded once, then trained on:
    python datasets.py pack /my/sounds packed
    python pretrain.py --data packed --out runs/mine --updates 10000
One GPU; the GPUs of one machine; of N machines (the same on each):
    torchrun pretrain.py --size large --data packed --compile --out runs/large
    torchrun --nproc_per_node=8 pretrain.py --size large --data packed --compile --out runs/large
    torchrun --nproc_per_node=8 --nnodes=N --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 pretrain.py ...
Then `python finetune.py --init`. The run's folder has checkpoint.pt, all that is needed to resume (--resume) or
to fine-tune, and log.jsonl, a line of JSON every few updates.

Which crops, masks and distractors an update sees depends only on (seed, update, place in the batch) and, for masks
and distractors, on the kind of device: not on the number of processes, nor on what was before. So a run that is
killed and resumed ends as if it had not been: on one CPU process to the same bits, on GPUs, which add in any order,
up to rounding. Only dropout is drawn by each process for itself, and --norm batch looks at a process's own clips.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from conformer import NORMS
from datasets import (Bar, InputError, Parser, batches, claim, collate, derive_seed, file_path, find_device, in_range,
                      open_unlabelled, progress, rank, reading, run_script, say, world_size, write_whole)
from frontend import SAMPLE_RATE, LogMel, frame_count, padding_mask
from wav2vec2 import COMMON, SIZES, Wav2Vec2, collapse_warning, span_mask, summarize

# Defaults of these options. The paper states updates, warm-up and learning rate of small and large (Sec. 2.3). A
# checkpoint of large has 1 GB: every 500 updates, eight GPUs would spend half their time on writing it.
LONG = dict(updates=300_000, warmup=10_000, lr=3e-4, batch_size=256, seconds=10.0, checkpoint_every=5000)
SCHEDULES = dict(tiny=dict(updates=400, warmup=40, lr=1e-3, batch_size=32, seconds=5.0, checkpoint_every=500),
                 small=LONG, large=LONG)
SETTINGS = {**SIZES["tiny"], **COMMON}      # a model's settings: names and types are the same in every size
MAX_CONSECUTIVE_SKIPS = 10                  # updates in a row that may be skipped because they are not finite

# Options that hold for one start only, which a resumed run does not take over; and options that may differ when a run
# is resumed (the data are compared by their digest instead).
OF_ONE_START = {"resume", "tensorboard", "profile", "compile"}
MAY_CHANGE = {"out", "data", "root", "device", "workers", "micro_batch", "checkpoint_every", "log_every"}
SIGNALS = []        # that have come: after the update in progress the run ends

# ------------------------------------------------------------------------------------------------ pre-training


def learning_rate(update, peak, warmup, updates):
    """Sec. 2.3: linear to the peak over `warmup` updates (peak / warmup in the first), then linear to 0 at
    `updates`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (updates - update) / max(updates - warmup, 1)


def main():
    """One run, or this process's part of it. Raises InputError where it can't start or continue."""
    args, checkpoint = parse()
    device, world, local_batch = init_distributed(args), world_size(), args.batch_size // world_size()
    micro_batch, own_clips = args.micro_batch or local_batch, slice(rank() * local_batch, (rank() + 1) * local_batch)
    source, held_out = open_unlabelled(args.data, args.seconds)
    digest = source.digest()
    model, frontend = build(args, checkpoint, source, device)
    if checkpoint and checkpoint["data"] != digest:
        raise InputError(f"{args.out} was trained on other recordings than {' '.join(args.data)}, or in another "
                         "order: name those")
    agree(args, checkpoint and checkpoint["update"], digest)
    parameters, samples = list(model.parameters()), round(args.seconds * SAMPLE_RATE)
    # Adam with decoupled weight decay, as in fairseq (Sec. 2.3).
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                                  fused=device.type != "mps")
    done, skipped, skips_in_a_row = 0, 0, 0         # updates; of these skipped; of these the latest in a row
    since_log = collections.Counter()               # sums over the others since the last log line
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        done, skipped = checkpoint["update"], checkpoint["skipped"]
        since_log.update(checkpoint["since_log"])
    wrapped = model if world == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    loader = batches(source, args.batch_size, args.updates, args.seed, done, rank(), world, args.workers, samples)
    loader = profiled(loader, args.out) if args.profile else loader
    say(f"{args.size}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, on {device} x {world}; "
        f"{' '.join(args.data)}, {source.crops.sum()} crops of {args.seconds:g} s in an epoch; "
        + (f"resumed after update {done}" if checkpoint else "chance is the accuracy of a blind guess"))
    log = Log(args, done, model.flops(frame_count(samples))) if rank() == 0 else None
    start, began, stopping = done, time.time(), False

    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the source.
    for update, (waveform, lengths, numbers) in enumerate(loader, start):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(update, args.lr, args.warmup, args.updates)
        # Masks and distractors are drawn for the whole batch, so that they do not depend on the number of processes.
        generator = torch.Generator(device).manual_seed(derive_seed(1, args.seed, update))
        rand = torch.rand(model.rand_shape(args.batch_size, frame_count(samples)), device=device, generator=generator)
        rand = rand[own_clips]
        torch.manual_seed(derive_seed(2, args.seed, update, rank()))                    # dropout

        sums = collections.Counter()                    # adds up, over micro-batches
        for i in range(0, local_batch, micro_batch):
            part = slice(i, i + micro_batch)
            log_mel = frontend(waveform[part].to(device, non_blocking=True), lengths[part])         # (B, T, 64)
            wrapped.require_backward_grad_sync = i + micro_batch == local_batch         # DDP: in the last part only
            with autocast(device, args.dtype):
                result = wrapped(log_mel, padding_mask(lengths[part], log_mel), rand[part])
            (result.loss * result.sums["counted"]).backward()                           # the sum over masked steps
            sums.update(result.sums)
        sums["signals"] = torch.full((), float(len(SIGNALS)), device=device)            # so that all processes stop
        sums = all_reduce(sums)
        # From the sum over masked steps to the mean; DDP has divided by the number of processes.
        torch._foreach_mul_([p.grad for p in parameters], world / sums["counted"].clamp(min=1))
        sums["gradient_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        sums = fetch(sums)                                                              # waits for the device, once
        if all(map(math.isfinite, sums.values())):
            optimizer.step()
            since_log.update(sums, updates=1)
            skips_in_a_row = 0
        else:
            skipped, skips_in_a_row = skipped + 1, skips_in_a_row + 1
        optimizer.zero_grad()
        if skips_in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise InputError(f"loss or gradient not finite in {skips_in_a_row} updates in a row, now at {update + 1} "
                             f"with {source.names[numbers[0]]}, ...: lower --lr, or look at the recordings")

        done, stopping = update + 1, sums["signals"] > 0
        checkpoint_due = done % args.checkpoint_every == 0 or done == args.updates
        if rank() == 0:
            log.bar.update()
            if since_log and (done % args.log_every == 0 or done == args.updates):
                log.write_training(done, since_log, lr, skipped)
                since_log = collections.Counter()
            if checkpoint_due and len(held_out):
                log.write_held_out(done, model, frontend, held_out, args)
            if checkpoint_due or stopping:
                save_checkpoint(Path(args.out) / "checkpoint.pt", model, update=done, frontend=frontend.state_dict(),
                                optimizer=optimizer.state_dict(), skipped=skipped, since_log=dict(since_log),
                                script="pretrain.py", settings=model.settings, data=digest, args=vars(args))
        if stopping:
            break

    if rank() == 0:
        log.close()
        if done == args.updates:
            print(f"{done - start} updates in {(time.time() - began) / 60:.1f} min: {args.out}/checkpoint.pt; "
                  "now python finetune.py --init" + f" {args.out}" * (args.out != "runs/pretrain"))
    finish(args, stopped=stopping and done < args.updates)


def build(args, checkpoint, source, device):
    """Model and frontend, new or of a checkpoint. Raises InputError for settings that are impossible."""
    torch.manual_seed(args.seed)
    changes = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    try:
        model, frontend = Wav2Vec2(args.size, **changes).to(device).train(), LogMel().to(device)
    except ValueError as error:
        raise InputError(str(error)) from None
    latents = model.latent_count(frame_count(round(args.seconds * SAMPLE_RATE)))
    if not span_mask(torch.rand(1, latents), model.settings["mask_prob"], model.settings["mask_length"]).any():
        raise InputError(f"--seconds {args.seconds:g} gives {latents} latents, too few to mask some and see others: "
                         "make it longer, or --mask-length or --stack smaller")
    if checkpoint:
        load_weights(checkpoint, model, frontend)
    else:
        sample = batches(source, 32, 16, args.seed, workers=args.workers)
        frontend.fit_normalization((waveform.to(device), lengths) for waveform, lengths, _ in
                                   progress(sample, "mean and deviation"))
    if args.compile:
        compile_blocks(model)
    return model, frontend


@torch.no_grad()
def held_out_figures(model, frontend, source, args):
    """Loss and accuracy on crops of recordings that are never trained on, with the same masks each time."""
    device = frontend.mean.device
    numbers, sums = np.linspace(0, len(source) - 1, min(len(source), 128)).astype(int), collections.Counter()
    model.eval()
    for i in range(0, len(numbers), 16):
        crops = [(source.crop(n, np.random.default_rng(n)), n) for n in numbers[i:i + 16]]
        waveform, lengths, _ = collate(crops, round(args.seconds * SAMPLE_RATE))
        log_mel = frontend(waveform.to(device), lengths)
        rand = torch.rand(model.rand_shape(*log_mel.shape[:2]), generator=torch.Generator().manual_seed(i)).to(device)
        with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):        # other shapes
            sums.update(fetch(model(log_mel, padding_mask(lengths, log_mel), rand).sums))       # a Counter adds up
    model.train()
    figures = summarize(sums)
    return {f"held_out_{name}": figures[name] for name in ("loss", "accuracy")}


class Log:
    """A run's progress: the bar, log.jsonl and, if wanted, TensorBoard's curves. Continues after `done` updates: later
    lines, and one that a killed run left incomplete, are dropped. `flops` are those of a clip. Raises InputError
    without tensorboard, and where another process writes there."""

    def __init__(self, args, done, flops):
        self.resources, path = contextlib.ExitStack(), Path(args.out) / "log.jsonl"      # what `close` gives back
        self.resources.enter_context(claim(args.out))
        lines = path.read_text().splitlines(True) if done and path.exists() else []
        write_whole(path, "".join(
            line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= done))
        self.file, self.board = self.resources.enter_context(open(path, "a", buffering=1)), None      # noqa: SIM115
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs another package: pip install tensorboard") from None
            self.board = SummaryWriter(args.out, purge_step=done + 1)       # of a killed run's later points
            self.resources.callback(self.board.close)
        self.bar = Bar(args.updates, done, "pre-train")
        self.batch_size, self.flops, self.warned = args.batch_size, flops, False
        self.last_update, self.last_time = done, time.time()

    def close(self):
        """End the bar, close the files, and let others write there."""
        self.bar.close()
        self.resources.close()

    def write(self, update, **figures):
        """A line of log.jsonl, and a point of each curve."""
        self.file.write(json.dumps(dict(update=update, **figures)) + "\n")
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, update)
            self.board.flush()          # it keeps lines in memory, which a run that is stopped would lose

    def write_held_out(self, update, model, frontend, source, args):
        """Log what `held_out_figures` finds, with TensorBoard's pictures."""
        self.write(update, **held_out_figures(model, frontend, source, args))
        if self.board:
            draw(self.board, update, model, frontend, source)

    def write_training(self, update, sums, lr, skipped):
        """Log sums over the updates since the last line. Warns when the latents collapse."""
        now, updates = time.time(), sums["updates"]
        speed = (update - self.last_update) * self.batch_size / (now - self.last_time)          # clips a second
        figures = dict(lr=lr, skipped=skipped, gradient_norm=sums["gradient_norm"] / updates,
                       clips_per_second=round(speed, 1), tflops=round(speed * self.flops / 1e12, 3), **summarize(sums))
        self.write(update, **figures)
        self.bar.show(update, f"loss {figures['loss']:.2f} accuracy {figures['accuracy']:.2f} (chance "
                      f"{figures['chance']:.2f}) lr {lr:.1e} {speed:.0f} clips/s")
        warning = collapse_warning(figures)
        if warning and not self.warned:
            self.bar.write(f"update {update}: {warning}", sys.stderr)
        self.last_update, self.last_time, self.warned = update, now, bool(warning)


def profiled(loader, out):
    """The first ten batches of a loader. Then prints where the time of their updates went, and writes a trace."""
    with torch.profiler.profile() as profiler:
        yield from itertools.islice(loader, 10)
    if rank() > 0:
        return
    print(profiler.key_averages().table(row_limit=20, sort_by=(
        "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total")))
    profiler.export_chrome_trace(f"{out}/trace.json")


@torch.no_grad()
def draw(board, update, model, frontend, source):
    """TensorBoard's pictures of one held-out crop: its log-mels, masked spans in blue; and the cosine of each context
    (a row) with each masked latent (a column): the right answers lie on the diagonal."""
    device = frontend.mean.device
    crop = max((source.crop(i, np.random.default_rng(i)) for i in range(min(len(source), 16))), key=len)
    log_mel = frontend(torch.from_numpy(np.array(crop))[None].to(device))
    rand = torch.rand(model.rand_shape(*log_mel.shape[:2])[:2], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.compiler.set_stance("force_eager"):
        mask, _, context, targets, valid = model.eval().predict_masked(log_mel, None, rand)
    model.train()
    if not mask.any():
        return                  # they are all too short
    hidden = mask[0].repeat_interleave(model.settings["stack"])[:log_mel.shape[1]]
    grey = (log_mel[0].T.flip(0) / 6 + 0.5).clamp(0, 1)                     # (64, T), black at 3 deviations below
    cosine = F.normalize(context[0, valid[0]], dim=1) @ F.normalize(targets[0, valid[0]], dim=1).T          # (M, M)
    for name, image in (("masked log-mels", torch.stack([grey, grey, torch.where(hidden, 1, grey)])),
                        ("context against latents", (cosine + 1)[None] / 2)):
        board.add_image(name, image.repeat_interleave(4, 1).repeat_interleave(4, 2), update)


def parse(argv=None):
    """The options of a run, with what its size leaves open filled in, and the checkpoint to resume from or None.
    Raises InputError for impossible options."""
    parser = Parser(prog="pretrain.py", description=__doc__)
    count, positive = in_range(int, 1, 10**9), in_range(float, 1e-12, 1e6)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["synth"], help="'synth' (made on the fly), or folders that `datasets.py pack` "
        "wrote", type=file_path)
    add("--seconds", type=in_range(float, 0.1, 3600), help="length of a crop: more gives more context and distractors, "
        "and costs more (tiny: 5, else 10)")
    add("--batch-size", type=in_range(int, 1, 10**6), help="crops in an update, of all processes (tiny: 32, else 256)")
    add("--out", default="runs/pretrain", type=file_path, help="folder of this run (%(default)s)")
    add("--log-every", type=count, default=10, help="updates between two lines of the log (%(default)s)")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard too, into --out")
    add("--profile", action="store_true", help="stop after 10 updates and print where their time went; trace.json, for "
        "chrome://tracing, goes into --out")

    add = parser.add_argument_group("model", "Settings of the size that can be changed.").add_argument
    add("--size", choices=SIZES, default="tiny", help="tiny for a laptop, small and large are the paper's "
        "(%(default)s)")
    for name, text in (
            ("dim", "D, width of the conformer"), ("blocks", "conformer blocks (Fig. 2b)"),
            ("heads", "attention heads (Fig. 2c)"), ("ffn-dim", "units in feed-forward networks"),
            ("first-kernel", "steps of the first block's convolution (31)"), ("kernel", "steps of the others' (15)"),
            ("dropout", "share of activations dropped (0.1)"), ("stack", "R, log-mel frames in a latent (4)"),
            ("latent-dim", "width of a latent (256)"),
            ("mask-prob", "share of latents masked (0.3); more makes the task harder"),
            ("mask-length", "latents in a masked span (3); shorter ones are easier to predict"),
            ("distractors", "K (100)"), ("temperature", "divides similarities (0.1); larger blurs the choice"),
            ("norm", f"in the convolution: {' or '.join(NORMS)} (group)")):
        add(f"--{name}", type=type(SETTINGS[name.replace("-", "_")]), help=text)

    add = parser.add_argument_group("optimisation (Sec. 2.3)").add_argument
    add("--updates", type=count, help="of the whole run (tiny: 400, else 300000)")
    add("--warmup", type=in_range(int, 0, 10**9), help="updates to the peak (tiny: a tenth, else a thirtieth of all)")
    add("--lr", type=positive, help="peak learning rate (tiny: 1e-3, else 3e-4)")
    add("--max-grad-norm", type=positive, default=1.0, help="longer gradients are scaled down to it (%(default)s)")
    add_running_options(parser)

    args = parser.parse_args(argv)
    schedule = dict(SCHEDULES[args.size])
    if args.updates is not None:                # a warm-up that was not given keeps its share
        schedule["warmup"] = args.updates * schedule["warmup"] // schedule["updates"]
    for name, value in schedule.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args, checkpoint = resume(parser, args, argv)
    if args.warmup > args.updates:
        raise InputError(f"--warmup {args.warmup} must be 0 to --updates {args.updates}")
    return args, checkpoint


# -------------------------------------------- running: options, processes, checkpoints (finetune.py uses them too)


def add_running_options(parser):
    """The options that pre-training and fine-tuning have in common."""
    add, count = parser.add_argument_group("running").add_argument, in_range(int, 1, 10**9)
    add("--resume", action="store_true", help="continue from the checkpoint in --out; start where there is none yet")
    add("--checkpoint-every", type=count, help="updates that a killed run loses at most (500; to pre-train small or "
        "large 5000)")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the draw of clips, crops, masks and first "
        "weights (%(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], help="(the best there is)")
    add("--dtype", choices=["fp32", "bf16"], help="bf16 halves memory and time where there is hardware for it "
        "(CUDA: bf16, else fp32)")
    add("--compile", action="store_true", help="torch.compile the blocks: on a GPU large is 1.6 times as fast; needs a "
        "C++ compiler and a minute, more where lengths vary")
    add("--workers", type=in_range(int, 0, 1024), help="processes that read data (with a GPU one a core, up to 8; "
        "else 0)")
    add("--micro-batch", type=count, help="clips that go through the model at once in a process: fewer need less "
        "memory (all)")
    add("--weight-decay", type=in_range(float, 0, 1e6), default=0.01, help="more regularises more (%(default)s)")


def resume(parser, args, argv):
    """With --resume, options and checkpoint of the run in --out, which those in `argv` must not contradict; where there
    is none, `args` and None. Raises InputError where --out holds a run that --resume was not given for."""
    if Path(args.out).is_file():
        raise InputError(f"--out {args.out} is a file: name a folder")
    if not (Path(args.out) / "checkpoint.pt").exists():
        return args, None
    if not args.resume:
        raise InputError(f"{args.out} holds a run already: continue it with --resume, or name another --out")
    checkpoint = load_checkpoint(args.out, parser.prog)
    saved = {name: value for name, value in checkpoint["args"].items() if name not in OF_ONE_START}
    saved["out"] = args.out                                             # the folder may have been moved
    args = parser.parse_args(argv, argparse.Namespace(**saved))         # what is not in argv stays as it is
    for name in sorted(vars(args).keys() - MAY_CHANGE - OF_ONE_START):
        if getattr(args, name) != (before := saved.get(name, parser.get_default(name))):
            raise InputError(f"{args.out} was started with --{name.replace('_', '-')} {before}: leave the option out, "
                             "or name another --out")
    return args, checkpoint


def init_distributed(args):
    """Join the processes that torchrun started, if it did, and return this one's device.

    SIGINT (Ctrl-C) and SIGTERM, collected in SIGNALS, end a run after the update in progress, a second one at once.
    Raises InputError for a device that is not there, and a batch that can't be divided.
    """
    device, world = find_device(args.device), world_size()
    local_batch = args.batch_size // world
    if args.batch_size % world or local_batch % (args.micro_batch or local_batch):
        raise InputError(f"--batch-size {args.batch_size} does not divide by {world} processes x --micro-batch "
                         f"{args.micro_batch or local_batch}")
    SIGNALS.clear()

    def handle(number, _):
        if SIGNALS:
            sys.exit(128 + number)
        SIGNALS.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return device


def agree(args, *facts):
    """Raise InputError unless all processes have the same facts: how far the run is, and of what data."""
    if world_size() > 1:
        digest = int(hashlib.sha256(repr(facts).encode()).hexdigest()[:15], 16)
        extremes = torch.tensor([digest, -digest], device=find_device(args.device))
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes.sum() != 0:
            raise InputError(f"{args.out}: not all processes find the same checkpoint there, or the same data: "
                             "machines must share --out, and have the same recordings")


def compile_blocks(model):
    """Compile each block, in place, so that the names of the weights stay the same."""
    torch._dynamo.config.optimize_ddp = False       # else DDP's buckets, smaller than a block, would cut each in two
    for block in model.conformer.blocks:
        block.compile()


def autocast(device, dtype):
    """Context for the model's forward pass: bfloat16 if --dtype says so or, without it, on CUDA."""
    bf16 = dtype == "bf16" or dtype is None and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def save_checkpoint(path, model, **content):
    """Write a checkpoint, in the first process, so that, even if the power fails, `path` is the old one or the new one.

    Raises InputError where it can't be written, or where weights are not finite.
    """
    if rank() > 0:
        return
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"weights are not finite: lower --lr. {path}, if it exists, is from before")
    try:
        write_whole(path, functools.partial(torch.save, dict(content, model=weights)))
    except (OSError, RuntimeError) as error:        # torch's writer hides the system's error
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise InputError(f"{path}: can't be written ({reason}); the one before is still there: make room, then "
                         "continue with --resume") from None


def load_checkpoint(run, script=None):
    """The checkpoint in a run's folder (or the file itself), on the CPU; `script` wrote it, if given.

    Runs no code that may be hidden in it. Raises InputError where it is missing or something else.
    """
    path = Path(run)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint there; is the run's folder right?")
    with reading(path, "use another checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
        if not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
            raise ValueError("weights that are not finite")
    if script not in (None, written_by):
        raise InputError(f"{path}: is from {written_by}, not from {script}; name the folder of such a run")
    return checkpoint


def load_weights(checkpoint, model, frontend):
    """Put a checkpoint's weights into a model and a frontend. Raises InputError where they don't fit."""
    try:
        model.load_state_dict(checkpoint["model"])
        frontend.load_state_dict(checkpoint["frontend"])
    except (RuntimeError, KeyError):
        raise InputError("the checkpoint's weights do not fit the model: it is of another version, or damaged; "
                         "use another") from None


def load_encoder(checkpoint):
    """The model of a checkpoint and its frontend, without its weights, for which see `load_weights`.

    Raises InputError for settings that don't exist here.
    """
    try:
        return Wav2Vec2(**checkpoint["settings"]), LogMel()     # the settings are complete, so no size counts
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the checkpoint is of another version, or damaged ({error}): use another") from None


def all_reduce(sums):
    """Add up numbers with names, a dictionary of scalar tensors, over all processes in one message."""
    vector = torch.stack(list(sums.values()))
    if world_size() > 1:
        dist.all_reduce(vector)
    return dict(zip(sums, vector, strict=True))


def fetch(numbers):
    """Scalar tensors with names -> Python's numbers, waiting for the device once."""
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def finish(args, stopped=False):
    """Leave the other processes and, if a signal stopped the run, exit with the shell's code for it: 128 + number."""
    if world_size() > 1:
        dist.barrier()          # the first process has written the checkpoint
        dist.destroy_process_group()
    if stopped:
        if rank() == 0:
            tqdm.write(f"stopped by a signal; {args.out} has a checkpoint: --resume continues from there", sys.stderr)
        sys.exit(128 + (SIGNALS or [signal.SIGTERM])[0])        # the signal may have gone to another process


if __name__ == "__main__":
    run_script(main)
