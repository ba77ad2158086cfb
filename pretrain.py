"""Pre-train a conformer on unlabelled sound (Sec. 2).

On a laptop, a few minutes of the tiny model on synthetic sounds:
    python pretrain.py
Your own recordings, decoded once, then trained on:
    python datasets.py pack /my/sounds packed
    python pretrain.py --data packed --out runs/mine --updates 10000
One GPU; the GPUs of one machine; of N machines (the same on each):
    torchrun pretrain.py --size large --data packed
    torchrun --nproc_per_node=8 pretrain.py --size large --data packed
    torchrun --nproc_per_node=8 --nnodes=N --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 pretrain.py ...
Then `python finetune.py --init`. The run's folder has checkpoint.pt, all that is needed to resume (--resume) or
to fine-tune, and log.jsonl, a line of JSON every few updates.

Which crops, masks and distractors an update sees depends only on (seed, update, place in the batch) and, for masks
and distractors, on the kind of device: not on the number of processes, nor on what was before. So a run that is
killed and resumed ends as if it had not been: on one CPU process to the same bits, on GPUs, which add in any order,
up to rounding. Only dropout is drawn by each process for itself, and --norm batch looks at a process's own clips.
"""
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets import (Bar, InputError, Parser, batches, claim, collate, derive_seed, find_device, in_range, open_source,
                      run_script, write_whole)
from frontend import SAMPLE_RATE, LogMel, frame_count, padding_mask
from wav2vec2 import (COMMON, SIZES, SUMS, Wav2Vec2, collapse_warning, load_checkpoint, load_weights, span_mask,
                      summarize)

# Defaults of these options. The paper states those of small and large (Sec. 2.3) but for batch size and seconds.
PAPER = dict(updates=300_000, warmup=10_000, lr=3e-4, batch_size=256, seconds=10.0)
SCHEDULES = dict(tiny=dict(updates=400, warmup=40, lr=1e-3, batch_size=32, seconds=5.0), small=PAPER, large=PAPER)
SETTINGS = (*SIZES["tiny"], *COMMON)        # names of a model's settings, the same in every size
MAX_CONSECUTIVE_SKIPS = 10                  # updates in a row that may be skipped because they are not finite

# Options that hold for one start only, which a resumed run does not take over; and options that may differ when a run
# is resumed (the data are compared by their fingerprint instead).
OF_ONE_START = ("resume", "download", "tensorboard", "profile", "compile")
MAY_CHANGE = ("out", "data", "root", "device", "workers", "micro_batch", "checkpoint_every", "log_every")

# -------------------------------------------- running: options, processes, checkpoints (finetune.py uses them too)


def parse_run(parser, argv, complete):
    """Parse the options of a run: those in `parser` and these. complete(args) fills in what depends on others.

    Returns the options and, with --resume, the checkpoint to resume from, or None. A resumed run keeps the options it
    was started with. Raises InputError for one on the command line that differs, and where --out holds a run
    that --resume was not given for.
    """
    count = in_range(int, 1, 10**9)
    group = parser.add_argument_group("running")
    group.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, on any number of "
                       "processes; start where there is none yet")
    group.add_argument("--checkpoint-every", type=count, default=500, help="updates between two checkpoints: what a "
                       "killed run loses at most (%(default)s)")
    group.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="another seed draws other clips, "
                       "crops, masks and initial weights (%(default)s)")
    group.add_argument("--device", choices=["cpu", "cuda", "mps"], help="(the best there is)")
    group.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 halves memory and time where the processor has "
                       "it (bf16 on CUDA, else fp32)")
    group.add_argument("--compile", action="store_true", help="compile the conformer blocks for training, with "
                       "torch.compile: for GPUs; takes a minute or more at first and needs a C++ compiler")
    group.add_argument("--workers", type=in_range(int, 0, 1024), help="processes that read data (with a GPU one a "
                       "core, up to 8; none without: the training takes the cores)")
    group.add_argument("--micro-batch", type=count, help="clips that go through the model at once in a process; fewer "
                       "need less memory and take longer, with the same result but for dropout and BatchNorm (all)")
    group.add_argument("--weight-decay", type=in_range(float, 0, 1e6), default=0.01, help="pulls weights to 0; more of "
                       "it regularises more (%(default)s)")
    args = complete(parser.parse_args(argv))
    if args.out and Path(args.out).is_file() and not getattr(args, "embed", None):
        raise InputError(f"--out {args.out} is a file: name a folder")
    if args.out is None or not (Path(args.out) / "checkpoint.pt").exists():
        return args, None
    if not args.resume:
        raise InputError(f"{args.out} holds a run already: continue it with --resume, or name another --out")
    checkpoint = load_checkpoint(args.out, parser.prog)
    saved = {name: value for name, value in checkpoint["args"].items() if name not in OF_ONE_START}
    parser.set_defaults(**saved)
    args = complete(parser.parse_args(argv))
    for name, before in saved.items():
        if name not in MAY_CHANGE and getattr(args, name, None) != before:
            raise InputError(f"{args.out} was started with --{name.replace('_', '-')} {before}: leave the option out, "
                             "or name another --out")
    return args, checkpoint


def init_distributed(args, checkpoint=None):
    """Join the processes that torchrun started, if it did: returns (device, rank, world size, signals).

    SIGINT (Ctrl-C) and SIGTERM end a run after the update in progress, a second one at once: `signals` is a list that
    grows when one comes. Raises InputError for a device that is not there, a batch that can't be divided,
    and where not all processes found the same checkpoint.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(args.device, world)
    local_batch = args.batch_size // world
    if args.batch_size % world or local_batch % (args.micro_batch or local_batch):
        raise InputError(f"--batch-size {args.batch_size} does not divide by {world} processes x --micro-batch "
                         f"{args.micro_batch or local_batch}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # On Hopper, torch 2.11 and later prefer cuDNN's attention, which rounds the share that dropout drops
        # (pytorch#174245) and plans anew for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    signals = []

    def handle(number, _):
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
        start = checkpoint["update"] if checkpoint else 0
        extremes = torch.tensor([start, -start], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes.sum() != 0:
            raise InputError(f"{args.out}: not all processes find the same checkpoint there; machines must share --out")
    return device, rank, world, signals


def autocast(device, dtype):
    """Context for the model's forward pass: bfloat16 if --dtype says so or, without it, on CUDA."""
    bf16 = dtype == "bf16" or dtype is None and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def save_checkpoint(path, model, **content):
    """Write a checkpoint so that, even if the power fails, `path` is either the old one or the new one.

    Raises InputError where it can't be written, or where weights are not finite.
    """
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"weights are not finite: lower --lr. {path}, if it exists, is from before")
    try:
        write_whole(path, functools.partial(torch.save, dict(content, model=weights)))
    except (OSError, RuntimeError) as error:        # torch's writer hides the system's error
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise InputError(f"{path}: can't be written ({reason}); the one before is still there: make room, then "
                         "continue with --resume") from None


def finish(args, rank, world, signals, stopped):
    """Leave the other processes and, if a signal stopped the run, exit with the shell's code for it: 128 + number."""
    if world > 1:
        dist.barrier()          # the first process has written the checkpoint
        dist.destroy_process_group()
    if stopped:
        if rank == 0:
            tqdm.write(f"stopped by a signal; {args.out} has a checkpoint: --resume continues from there", sys.stderr)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])        # the signal may have gone to another process


# ------------------------------------------------------------------------------------------------ pre-training


def learning_rate(update, peak, warmup, updates):
    """Sec. 2.3: linear to the peak over `warmup` updates (peak / warmup in the first), then linear to 0 at
    `updates`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (updates - update) / max(updates - warmup, 1)


def parse(argv=None):
    """The options of a run, with what its size leaves open filled in, and the checkpoint to resume from or None.
    Raises InputError for impossible options."""
    parser = Parser(prog="pretrain.py", description=__doc__)
    count, size, positive = in_range(int, 1, 10**9), in_range(int, 1, 16_384), in_range(float, 1e-12, 1e6)
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", default=["synth"], help="'synth' (made on the fly), or folders that "
                       "`datasets.py pack` wrote, perhaps on several disks (synth)")
    group.add_argument("--seconds", type=in_range(float, 0.1, 3600), help="length of a crop (tiny: 5, else 10); longer "
                       "gives more context and more distractors, and costs more")
    group.add_argument("--batch-size", type=in_range(int, 1, 10**6), help="crops in an update, over all processes "
                       "together (tiny: 32, else 256)")
    group.add_argument("--out", default="runs/pretrain", help="folder of this run (%(default)s)")
    group.add_argument("--log-every", type=count, default=10, help="updates between two lines of the log (%(default)s)")
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too, into --out")
    group.add_argument("--profile", action="store_true", help="stop after 10 updates and print where their time went; "
                       "trace.json, for chrome://tracing, goes into --out")

    group = parser.add_argument_group("model", "Settings of the size that can be changed.")
    group.add_argument("--size", choices=SIZES, default="tiny", help="tiny for a laptop, small and large as in the "
                       "paper (%(default)s)")
    for name, kind, text in (
            ("dim", size, "D, width of the conformer"), ("blocks", size, "conformer blocks (Fig. 2b)"),
            ("heads", size, "attention heads (Fig. 2c)"), ("ffn-dim", size, "units in feed-forward networks"),
            ("first-kernel", size, "steps of the first block's convolution (31)"),
            ("kernel", size, "steps of the other blocks' (15)"),
            ("dropout", in_range(float, 0, 0.99), "share of activations dropped (0.1)"),
            ("stack", size, "R, log-mel frames in a latent (4)"), ("latent-dim", size, "width of a latent (256)"),
            ("mask-prob", in_range(float, 0, 1), "share of latents masked (0.3); more makes the task harder"),
            ("mask-length", size, "latents in a masked span (3); shorter ones are easier to predict"),
            ("distractors", size, "K (100)"),
            ("temperature", positive, "divides similarities (0.1); larger blurs the choice")):
        group.add_argument(f"--{name}", type=kind, help=text)
    group.add_argument("--norm", choices=["group", "batch"], help="in the convolution (group)")

    group = parser.add_argument_group("optimisation (Sec. 2.3)")
    group.add_argument("--updates", type=count, help="of the whole run (tiny: 400, else 300000)")
    group.add_argument("--warmup", type=in_range(int, 0, 10**9), help="updates to the peak (tiny: a tenth, else a "
                       "thirtieth of all)")
    group.add_argument("--lr", type=positive, help="peak learning rate (tiny: 1e-3, else 3e-4)")
    group.add_argument("--max-grad-norm", type=positive, default=1.0, help="longer gradients are scaled down to this "
                       "norm (%(default)s)")

    def complete(args):
        schedule = dict(SCHEDULES[args.size])
        if args.updates is not None:            # a warm-up that was not given keeps its share
            schedule["warmup"] = args.updates * schedule["warmup"] // schedule["updates"]
        for name, value in schedule.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.warmup > args.updates:
            raise InputError(f"--warmup {args.warmup} must be 0 to --updates {args.updates}")
        return args

    return parse_run(parser, argv, complete)


class Log:
    """A run's progress: the bar, log.jsonl and, if wanted, TensorBoard's curves. Continues after `done` updates: later
    lines, and one that a killed run left incomplete, are dropped. `flops` are those of a clip. Raises InputError
    without tensorboard."""

    def __init__(self, out, done, args, flops):
        self.lock, path = claim(out), out / "log.jsonl"
        lines = path.read_text().splitlines(True) if done and path.exists() else []
        write_whole(path, "".join(
            line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= done))
        self.file, self.board = open(path, "a", buffering=1), None      # noqa: SIM115
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs another package: pip install tensorboard") from None
            self.board = SummaryWriter(out)
        self.bar = Bar(args.updates, done, "pre-train")
        self.batch_size, self.flops = args.batch_size, flops
        self.warned, self.last_time, self.last_update = False, time.time(), done

    def write(self, update, **figures):
        """A line of log.jsonl, and a point of each curve."""
        self.file.write(json.dumps(dict(update=update, **figures)) + "\n")
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, update)
            self.board.flush()          # it keeps lines in memory, which a run that is stopped would lose

    def write_held_out(self, update, model, frontend, source, args, device):
        """Log what `held_out_figures` finds, with TensorBoard's pictures."""
        self.write(update, **held_out_figures(model, frontend, source, args, device))
        if self.board:
            draw(self.board, update, model, frontend, source, device)

    def write_training(self, update, sums, **figures):
        """Log the updates since the last line: sums of 1, gradient norm and SUMS. Warns when the latents collapse."""
        now, (updates, norms, *sums) = time.time(), sums
        speed = (update - self.last_update) * self.batch_size / (now - self.last_time)
        self.last_time, self.last_update = now, update
        figures.update(gradient_norm=norms / updates, clips_per_second=round(speed, 1),
                       tflops=round(speed * self.flops / 1e12, 3), **summarize(sums))
        self.write(update, **figures)
        self.bar.show(update, f"loss {figures['loss']:.2f} accuracy {figures['accuracy']:.2f} (chance "
                      f"{figures['chance']:.2f}) lr {figures['lr']:.1e} {speed:.0f} clips/s")
        warning = collapse_warning(figures)
        if warning and not self.warned:
            self.bar.write(f"update {update}: {warning}", sys.stderr)
        self.warned = bool(warning)


def profiled(loader, out, rank):
    """The first ten batches of a loader. Then prints where the time of their updates went, and writes a trace."""
    with torch.profiler.profile() as profiler:
        yield from itertools.islice(loader, 10)
    if rank > 0:
        return
    print(profiler.key_averages().table(row_limit=20, sort_by=(
        "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total")))
    profiler.export_chrome_trace(str(out / "trace.json"))


@torch.no_grad()
def draw(board, update, model, frontend, source, device):
    """TensorBoard's pictures of one held-out crop: its log-mels, masked spans in blue; and the cosine of each context
    (a row) with each masked latent (a column): the right answers lie on the diagonal."""
    crop = max((source.crop(i, np.random.default_rng(i)) for i in range(min(len(source), 16))), key=len)
    log_mel = frontend(torch.from_numpy(crop)[None].to(device))
    rand = torch.rand(model.rand_shape(*log_mel.shape[:2])[:2], generator=torch.Generator().manual_seed(0)).to(device)
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


@torch.no_grad()
def held_out_figures(model, frontend, source, args, device):
    """Loss and accuracy on crops of recordings that are never trained on, with the same masks each time."""
    numbers, sums = np.linspace(0, len(source) - 1, min(len(source), 128)).astype(int), torch.zeros(len(SUMS))
    model.eval()
    for i in range(0, len(numbers), 16):
        crops = [(source.crop(n, np.random.default_rng(n)), n) for n in numbers[i:i + 16]]
        waveform, lengths, _ = collate(crops, round(args.seconds * SAMPLE_RATE))
        log_mel = frontend(waveform.to(device), lengths)
        rand = torch.rand(model.rand_shape(*log_mel.shape[:2]), generator=torch.Generator().manual_seed(i)).to(device)
        with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):        # other shapes
            sums += model(log_mel, padding_mask(lengths, log_mel), rand).sums.cpu()
    model.train()
    figures = summarize(sums.tolist())
    return {f"held_out_{name}": figures[name] for name in ("loss", "accuracy")}


def build(args, checkpoint, source, device):
    """Model and frontend, new or of a checkpoint. Raises InputError for settings that are impossible, and for a
    checkpoint of other recordings than those in `source`."""
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
        if checkpoint["data"] != source.fingerprint():
            raise InputError(f"{args.out} was trained on other recordings than {' '.join(args.data)}: name those")
    else:
        sample = batches(source, 32, 16, args.seed, workers=args.workers)
        frontend.fit_normalization((waveform.to(device), lengths) for waveform, lengths, _ in
                                   tqdm(sample, "mean and deviation", leave=False, disable=None))
    if args.compile:
        for block in model.conformer.blocks:
            block.compile()             # in place: the names of the weights stay the same
    return model, frontend


def main():
    """One run, or this process's part of it. Raises InputError where it can't start or continue."""
    args, checkpoint = parse()
    device, rank, world, signals = init_distributed(args, checkpoint)
    out, samples, local_batch = Path(args.out), round(args.seconds * SAMPLE_RATE), args.batch_size // world
    micro_batch, mine = args.micro_batch or local_batch, slice(rank * local_batch, (rank + 1) * local_batch)
    source, held_out = open_source(args.data, args.seconds), open_source(args.data, args.seconds, held_out=True)
    model, frontend = build(args, checkpoint, source, device)
    parameters, frames = list(model.parameters()), frame_count(samples)
    # Adam with decoupled weight decay, as in fairseq (Sec. 2.3).
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                                  fused=device.type != "mps")
    # Updates done before; skipped ones; and, since the last line of the log, the sums of 1, gradient norm and SUMS.
    start, skipped, skips_in_a_row, window = 0, 0, 0, [0.0] * (2 + len(SUMS))
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, skipped, window = checkpoint["update"], checkpoint["skipped"], checkpoint["window"]
    wrapped = model if world == 1 else DistributedDataParallel(model)
    loader = batches(source, args.batch_size, args.updates, args.seed, start, rank, world, args.workers, samples)
    loader = profiled(loader, out, rank) if args.profile else loader
    if rank == 0:
        log = Log(out, start, args, model.flops(frames))
        print(f"{args.size}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, on {device} x {world}; "
              f"{' '.join(args.data)}, {len(source)} crops of {args.seconds:g} s in an epoch; "
              + (f"resumed after update {start}" if checkpoint else "chance is the accuracy of a blind guess"))
    began, done, stopping = time.time(), start, 0

    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the crops in the source.
    for update, (waveform, lengths, numbers) in enumerate(loader, start):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(update, args.lr, args.warmup, args.updates)
        # Masks and distractors are drawn for the whole batch, so that they do not depend on the number of processes.
        generator = torch.Generator(device).manual_seed(derive_seed(1, args.seed, update))
        rand = torch.rand(model.rand_shape(args.batch_size, frames), device=device, generator=generator)[mine]
        torch.manual_seed(derive_seed(2, args.seed, update, rank))                      # dropout

        # Summed over micro-batches and processes: signals, so that all stop at the same update, and SUMS.
        sums = torch.zeros(1 + len(SUMS), device=device)
        sums[0] = len(signals)
        for i in range(0, local_batch, micro_batch):
            part = slice(i, i + micro_batch)
            log_mel = frontend(waveform[part].to(device, non_blocking=True), lengths[part])         # (B, T, 64)
            wrapped.require_backward_grad_sync = i + micro_batch == local_batch         # DDP: in the last part only
            with autocast(device, args.dtype):
                result = wrapped(log_mel, padding_mask(lengths[part], log_mel), rand[part])
            (result.loss * result.count).backward()                                     # the sum over masked steps
            sums[1:] += result.sums
        if world > 1:
            dist.all_reduce(sums)
        # From the sum to the mean: sums[1] counts the masked steps, and DDP divided by the number of processes.
        torch._foreach_mul_([p.grad for p in parameters], world / sums[1].clamp(min=1))
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        stopping, *totals, norm = torch.cat([sums, norm[None]]).tolist()                # waits for the device, once
        if all(map(math.isfinite, (norm, *totals))):
            optimizer.step()
            window, skips_in_a_row = [a + b for a, b in zip(window, (1, norm, *totals), strict=True)], 0
        else:
            skipped, skips_in_a_row = skipped + 1, skips_in_a_row + 1
        optimizer.zero_grad()
        if skips_in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise InputError(f"loss or gradient not finite in {skips_in_a_row} updates in a row, now at {update + 1} "
                             f"with {source.name(int(numbers[0]))}, ...: lower --lr, or look at the recordings")

        done = update + 1
        due = done % args.checkpoint_every == 0 or done == args.updates
        if rank == 0:
            log.bar.update()
            if (done % args.log_every == 0 or done == args.updates) and window[0]:
                log.write_training(done, window, lr=lr, skipped=skipped)
                window = [0.0] * len(window)
            if due and len(held_out):
                log.write_held_out(done, model, frontend, held_out, args, device)
            if due or stopping:
                save_checkpoint(out / "checkpoint.pt", model, update=done, frontend=frontend.state_dict(),
                                optimizer=optimizer.state_dict(), skipped=skipped, window=window, script="pretrain.py",
                                settings=model.settings, data=source.fingerprint(), args=vars(args))
        if stopping:
            break

    if rank == 0:
        log.bar.close()
        if done == args.updates:
            print(f"{done - start} updates in {(time.time() - began) / 60:.1f} min: {out / 'checkpoint.pt'}; now "
                  f"python finetune.py --init" + f" {out}" * (args.out != "runs/pretrain"))
    finish(args, rank, world, signals, stopping and done < args.updates)


if __name__ == "__main__":
    run_script(main)
