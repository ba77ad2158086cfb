"""Pre-train a conformer on unlabelled sound (Sec. 2).

On a laptop, under three minutes of the tiny model on synthetic sounds:
    python pretrain.py
Your own recordings, decoded once, then trained on:
    python datasets.py pack /my/sounds packed
    python pretrain.py --data packed --out runs/mine --updates 10000
One GPU; the GPUs of one machine; of four machines (the same on each, with its own node_rank):
    torchrun pretrain.py --size large --data packed
    torchrun --nproc_per_node=8 pretrain.py --size large --data packed
    torchrun --nproc_per_node=8 --nnodes=4 --node_rank=0 --master_addr=HOST pretrain.py ...
Then `python finetune.py --init`. What is in the run's folder: checkpoint.pt, all that is needed to
go on (--resume) or to fine-tune; log.jsonl, a line of JSON every few updates.

Which clips, crops, masks and distractors an update sees depends on (seed, update, place in the batch)
only, and for masks and distractors on the kind of device: not on the number of processes, nor on what was
before. So a run that is killed and resumed goes on with what would have come: on a CPU to the same bits, on
GPUs, which add in any order, up to rounding. Only dropout is drawn by each process for itself.
"""
import argparse
import functools
import itertools
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from datasets import InputError, Parser, batches, in_range, open_source, write_whole
from frontend import SAMPLE_RATE, LogMel, frame_count
from wav2vec2 import COMMON, SIZES, Pretraining, Wav2Vec2, diagnosis, span_mask

# What --updates, --warmup, --lr, --batch-size and --seconds are when not given. The paper's are
# those of small and large (Sec. 2.3); it does not state batch size and seconds.
SCHEDULES = {
    "tiny": dict(updates=400, warmup=40, lr=1e-3, batch_size=32, seconds=5.0),
    "small": dict(updates=300_000, warmup=10_000, lr=3e-4, batch_size=256, seconds=10.0),
    "large": dict(updates=300_000, warmup=10_000, lr=3e-4, batch_size=256, seconds=10.0),
}

SETTINGS = (*SIZES["tiny"], *COMMON)        # names of a model's settings, the same in every size

# What a run can't change halfway without becoming another one.
SAME_ON_RESUME = ("size", *SETTINGS, "data", "seed", "seconds", "batch_size", "updates", "warmup",
                  "lr", "weight_decay", "clip")

PATIENCE = 10       # updates in a row that may be skipped because loss or gradient are not finite

# --------------------------------------------------------- shared with finetune.py: processes, files


def start(device=None):
    """Join the processes that torchrun started, if it did: returns (device, rank, world size).

    device: cuda, mps or cpu; None: the first of these that there is. Raises InputError for one that is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        device = "cuda" if cuda else "mps" if mps and world == 1 else "cpu"
    if not {"cuda": cuda, "mps": mps, "cpu": True}[device]:
        raise InputError(f"--device {device}: this torch finds none; leave --device out")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), rank, world


def cores():
    """How many of this machine's cores are this process's; 0 where it has more processes than cores."""
    return os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def run_options(group, checkpoint_every):
    """Add the options that pretrain.py and finetune.py share to a group of argparse."""
    count = in_range(int, 1, 10**9)
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, on any "
                       "number of processes; where there is none yet, start")
    group.add_argument("--checkpoint-every", type=count, default=checkpoint_every, help="updates between two "
                       "checkpoints: what a killed run loses at most (%(default)s)")
    group.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="another seed draws other "
                       "clips, crops, masks and starting weights (%(default)s)")
    group.add_argument("--device", choices=["cpu", "cuda", "mps"], help="(the best there is)")
    group.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 halves memory and time where the "
                       "processor has it (bf16 on CUDA, else fp32)")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile, for "
                       "GPUs; takes minutes at first, needs a C++ compiler, and gains nothing on a CPU")
    group.add_argument("--benchmark", nargs="?", type=count, const=10, metavar="N",
                       help="train nothing: time N updates (%(const)s) and print where the time goes")
    group.add_argument("--micro-batch", type=count, help="clips that go through the model at once in a "
                       "process; fewer need less memory and take longer, with the same result but for dropout (all)")
    group.add_argument("--weight-decay", type=in_range(float, 0, 1e6), default=0.01, help="pulls weights to "
                       "0; more of it regularises more (%(default)s)")


def batch_parts(args, world):
    """How many clips of a batch are a process's, and how many of these go through the model at once.

    Raises InputError where the batch can't be shared out so, or parts of it were to be timed.
    """
    share = args.batch_size // world
    micro = min(args.micro_batch or share, share)
    if args.benchmark and (world > 1 or args.micro_batch):
        raise InputError("--benchmark is for one process and whole batches: leave torchrun and --micro-batch out")
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} does not divide by {world} processes")
    if share % micro:
        raise InputError(f"--micro-batch {args.micro_batch} does not divide the {share} clips of a batch "
                         "that are a process's")
    return share, micro


def same_options(out, before, args, names):
    """Raise InputError where a run that goes on got other options than before."""
    for name in names:
        if before.get(name) != getattr(args, name):
            raise InputError(f"{out} was trained with --{name.replace('_', '-')} {before.get(name)}, "
                             f"not {getattr(args, name)}: give the same options to --resume, or name "
                             "another --out")


class Signals:
    """Ctrl-C and SIGTERM end a run after the update in progress; a second one at once.

    `received` is the number of the signal, 0 before.
    """

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _):
        """What Python calls when a signal comes: its number, and where the program stood."""
        if self.received:
            sys.exit(128 + number)
        self.received = number


def stop(signals, bar, path, world):
    """Say how to go on after a signal, perhaps to another process, and exit as a shell reports it."""
    received = signals.received or signal.SIGTERM
    if world > 1:
        dist.barrier()          # the process that writes the checkpoint has done so
    shown = not bar.disable     # in one process only
    bar.close()
    if shown:
        sys.stderr.write(f"stopped by signal {int(received)}; {path} is written: --resume goes on from there\n")
    sys.exit(128 + received)


def add_up(values, device, world):
    """Sums over all processes of a list of numbers (floats or scalar tensors), as floats."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if world > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def save_checkpoint(path, **content):
    """Write a checkpoint so that, whenever the power fails, `path` is the old one or the new one.

    Raises InputError where it can't be written.
    """
    try:
        write_whole(path, functools.partial(torch.save, content))
    except (OSError, RuntimeError) as error:        # torch's writer hides the error of the system
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise InputError(f"{path}: can't be written ({reason}); what was there before still is: make "
                         "room, then go on with --resume") from None


def load_checkpoint(run, script="pretrain.py", keys=("settings", "frontend")):
    """The checkpoint in a run's folder (or the file itself) of a script, on the CPU.

    Runs no code that may be hidden in it. Raises InputError where it is missing or something else.
    """
    path = Path(run)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint there; is the run's folder right?")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # there is no telling what reading other bytes as a pickle stumbles over
        raise InputError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}); use another") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"model", "args", *keys}:
        raise InputError(f"{path}: not from {script}; name the folder of such a run")
    return checkpoint


def load_encoder(checkpoint):
    """The model of a checkpoint, with new weights. Raises InputError for settings that don't exist here."""
    try:
        return Wav2Vec2(**checkpoint["settings"])       # which are all there are, so no size counts
    except (TypeError, ValueError) as error:
        raise InputError(f"the checkpoint is of another version, or damaged ({error}): use another") from None


def load_model(checkpoint, model, frontend):
    """Put a checkpoint's weights into a model and a frontend.

    Raises InputError where they don't fit.
    """
    try:
        model.load_state_dict(checkpoint["model"])
        frontend.load_state_dict(checkpoint["frontend"])
    except RuntimeError:
        raise InputError("the checkpoint's weights do not fit the model; it is of another version "
                         "or damaged: use another") from None


def run_so_far(out, args, script, keys):
    """The checkpoint that --resume goes on from, or None to start.

    Raises InputError where `out` holds a run that --resume was not given for.
    """
    if not (out / "checkpoint.pt").exists():
        return None
    if args.resume:
        return load_checkpoint(out, script, keys)
    if not args.benchmark:
        raise InputError(f"{out} holds a run already: go on with --resume, or name another --out")


def check_same_start(out, numbers, device, world):
    """Raise InputError where not all processes start from the same place, which `numbers` say."""
    if add_up(numbers, device, world) != [number * world for number in numbers]:
        raise InputError(f"{out}: not all processes find the same checkpoint there; machines must share "
                         "--out")


def adam(parameters, args, device):
    """The optimizer of Sec. 2.3: Adam with decoupled weight decay."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=args.weight_decay,
                             fused=device.type != "mps")


def seed_of(*numbers):
    """One 63-bit seed from several numbers, far from the seeds of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def padding_of(lengths, log_mel):
    """Padding mask (B, T) of log-mels (B, T, 64) of waveforms with these lengths (B,) in samples; None if none."""
    frames = frame_count(lengths)
    if frames.min() >= log_mel.shape[1]:
        return None
    steps = torch.arange(log_mel.shape[1], device=log_mel.device)
    return steps >= frames.to(log_mel.device)[:, None]


def in_bf16(device, dtype):
    """Whether to compute in bfloat16: by --dtype, else on CUDA only."""
    return (dtype or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"


def autocast(device, dtype):
    """Context for the model's forward pass, by `in_bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, dtype))


def peak_memory():
    """Most bytes of memory that this process ever had; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds that the phases of an update take."""

    def __init__(self, device):
        self.device, self.laps, self.last = device, {}, None

    def lap(self, name=None):
        """Note the time since the last call under this name, if there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()        # a GPU is only told what to do, not waited for
        elif self.device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        if name:
            self.laps.setdefault(name, []).append(now - self.last)
        self.last = now

    def medians(self):
        """{name: median of its times}, in seconds."""
        return {name: float(np.median(laps)) for name, laps in self.laps.items()}


def benchmark(model, optimizer, prepare, loss_of, source, samples, args, device):
    """Time updates, phase by phase, and print a table: medians of args.benchmark updates after four
    that don't count. prepare(waveform, lengths) gives the arguments of loss_of; `samples` are in a clip."""
    dtype = torch.bfloat16 if in_bf16(device, args.dtype) else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    square, watch = torch.randn(size, size, device=device, dtype=dtype), Stopwatch(device)
    for repeat in range(8):
        watch.lap()
        square @ square
        watch.lap("product" if repeat > 2 else None)        # the first ones warm up
    peak = 2 * size**3 / watch.medians()["product"]
    print(torch.cuda.get_device_name() if device.type == "cuda" else
          f"{device.type}, {torch.get_num_threads()} threads", dtype,
          f"compile {'on' if args.compile else 'off'}", f"torch {torch.__version__}", f"Python {sys.version.split()[0]}",
          f"a matrix product of {size} reaches {peak / 1e12:.3f} TFLOP/s", sep="; ")
    B, rows = args.batch_size, []
    random = torch.randint(-9000, 9000, (B, samples), dtype=torch.int16, device=device)
    resident = itertools.repeat((random, torch.full((B,), samples), None), args.benchmark + 4)
    real = batches(source, B, args.benchmark + 4, args.seed, workers=args.workers, samples=samples)
    for kind, loader in (("resident data", resident), ("real input", real)):
        watch = Stopwatch(device)
        watch.lap()
        for repeat, (waveform, lengths, _) in enumerate(loader):
            watch.lap("waiting for data")
            waveform = waveform.to(device, non_blocking=True)
            inputs = prepare(waveform, lengths)
            watch.lap("frontend")
            if repeat == 0:                                     # counted once; compiled code can't be
                with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
                    loss_of(*inputs).backward()
                flops = counter.get_total_flops()
            else:
                loss = loss_of(*inputs)
                watch.lap("forward")
                loss.backward()
                watch.lap("backward")
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                watch.lap("optimiser")
            if repeat == 3:
                watch.laps.clear()
        phases = watch.medians()
        update = sum(phases.values())
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
        rows.append({"": kind, "clips/s": f"{B / update:.1f}",
                     "hours/hour": f"{B * samples / SAMPLE_RATE / update:.0f}",
                     "TFLOP/s": f"{flops / update / 1e12:.3f}",
                     "of the product's": f"{flops / update / peak:.0%}",
                     **{f"{name}, ms": f"{value * 1000:.1f}" for name, value in phases.items()},
                     "memory, GB": f"{memory / 1e9:.2f}"})
    for name in rows[0]:
        print(f"{name:20}", *(f"{row[name]:>16}" for row in rows))


# ------------------------------------------------------------------------------------- pre-training


def learning_rate(update, peak, warmup, updates):
    """Sec. 2.3: linear to the peak over `warmup` updates (peak / warmup in the first), then linear to
    0 at `updates`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (updates - update) / max(updates - warmup, 1)


def parse(argv=None):
    """The options of a run, with what its size leaves open filled in. Raises InputError for what can't be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, positive = in_range(int, 1, 10**9), in_range(float, 1e-12, 1e6)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="runs/pretrain", help="folder of this run (%(default)s)")
    run_options(group, checkpoint_every=1000)
    group.add_argument("--workers", type=in_range(int, 0, 1024), help="processes that read data (one a core, "
                       "up to 8, with a GPU; none without: the training takes the cores)")
    group.add_argument("--log-every", type=count, default=10, help="updates between two lines of the log "
                       "(%(default)s)")
    group.add_argument("--tensorboard", action="store_true", help="write the log's figures for TensorBoard "
                       "too, into --out")

    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", default=["synth"], help="'synth' (made on the fly); folders "
                       "that `datasets.py pack` wrote, perhaps on several disks; or any folder of "
                       "recordings (synth)")
    group.add_argument("--seconds", type=in_range(float, 0.1, 3600), help="length of a clip (tiny: 5, else "
                       "10); longer gives more context and more distractors, and costs more")
    group.add_argument("--batch-size", type=count, help="clips in an update, over all processes "
                       "together (tiny: 32, else 256)")

    group = parser.add_argument_group("model", "Settings of the size that can be changed.")
    group.add_argument("--size", choices=SIZES, default="tiny", help="tiny for a laptop, small and "
                       "large as in the paper (%(default)s)")
    for name, default, text in (
            ("width", count, "D, of the conformer"), ("blocks", count, "conformer blocks (Fig. 2b)"),
            ("heads", count, "attention heads (Fig. 2c)"),
            ("ffn", count, "units in feed-forward networks"),
            ("first-kernel", count, "steps of the first block's convolution (31)"),
            ("kernel", count, "steps of the other blocks' (15)"),
            ("dropout", float, "share of activations dropped (0.1)"),
            ("norm", str, "in the convolution: group (default) or batch"),
            ("stack", count, "R, log-mel frames in a latent (4)"),
            ("latent", count, "C, width of a latent (256)"),
            ("mask", float, "share of latents masked (0.3); more makes the task harder"),
            ("span", count, "latents masked in a row (3); shorter ones are easier to guess"),
            ("distractors", count, "K (100)"),
            ("temperature", positive, "divides similarities (0.1); larger blurs the choice")):
        choices = ["group", "batch"] if name == "norm" else None
        group.add_argument(f"--{name}", type=default, choices=choices, help=text)

    group = parser.add_argument_group("optimisation (Sec. 2.3)")
    group.add_argument("--updates", type=count, help="of the whole run (tiny: 400, else 300000)")
    group.add_argument("--warmup", type=in_range(int, 0, 10**9), help="updates to the peak (tiny: a tenth, "
                       "else a thirtieth of all)")
    group.add_argument("--lr", type=positive, help="peak learning rate (tiny: 1e-3, else 3e-4)")
    group.add_argument("--clip", type=positive, default=1.0, help="largest gradient norm; a longer "
                       "gradient is scaled down to it (%(default)s)")
    args = parser.parse_args(argv)
    schedule = dict(SCHEDULES[args.size])
    if args.updates is not None:            # a warm-up that was not given keeps its share
        schedule["warmup"] = args.updates * schedule["warmup"] // schedule["updates"]
    for name, value in schedule.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.changes = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.warmup > args.updates:
        raise InputError(f"--warmup {args.warmup} must be 0 to --updates {args.updates}")
    return args


def open_log(path, first):
    """The log of a run, to write on after update `first`: what was logged later comes again, and a
    killed run's last line may be torn."""
    lines = path.read_text().splitlines(True) if first and path.exists() else []
    write_whole(path, "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= first))
    return open(path, "a", buffering=1)


def tensorboard(out):
    """A writer of curves for TensorBoard. Raises InputError where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package more: pip install tensorboard") from None
    return SummaryWriter(out)


def weight(name, count, dropped):
    """What a part's figure of `Pretraining` counts for when parts are put together: means, for their
    number of masked steps (those of the loss, for those that count); numbers of steps are sums.
    So the share that is masked, and the latents' spread and cosine, are means of the parts'."""
    if name in ("count", "dropped"):
        return 1
    return count if name in ("loss", "accuracy", "chance") else count + dropped


def total(results):
    """Of several parts of a batch: sums of the weighted figures, in the order of `Pretraining`."""
    return [sum(getattr(result, name) * weight(name, result.count, result.dropped) for result in results)
            for name in Pretraining._fields]


def means(sums):
    """Back from `total`, of one or all processes, to figures: a dictionary."""
    sums = dict(zip(Pretraining._fields, sums))
    return {name: value / max(weight(name, sums["count"], sums["dropped"]), 1) for name, value in sums.items()}


def offenders(model, frontend, waveform, lengths, noise, names):
    """Those of a batch's clips whose loss is not finite, in words: waveform (B, S), lengths (B,) in samples,
    noise as `Wav2Vec2` takes it, B names."""
    bad = []
    with torch.no_grad():
        for i, name in enumerate(names):
            log_mel = frontend(waveform[i:i + 1])
            if not model(log_mel, padding_of(lengths[i:i + 1], log_mel), noise[i:i + 1]).loss.isfinite():
                bad.append(name)
    return "all clips" if len(bad) == len(names) else ", ".join(bad) or "no clip by itself"


def main(args):
    """One run, or this process's part of it. Raises InputError where it can't start or go on."""
    device, rank, world = start(args.device)
    signals = Signals()
    share, micro = batch_parts(args, world)
    out = Path(args.out)
    checkpoint = run_so_far(out, args, "pretrain.py", ("settings", "frontend", "optimizer", "logged"))
    if args.workers is None:
        args.workers = min(8, cores()) if device.type == "cuda" else 0

    torch.manual_seed(args.seed)
    try:
        model = Wav2Vec2(args.size, **args.changes).to(device)
    except ValueError as error:
        raise InputError(str(error)) from None
    frontend = LogMel().to(device)
    optimizer = adam(model.parameters(), args, device)
    samples = round(args.seconds * SAMPLE_RATE)
    latents = model.noise_shape(1, frame_count(samples))[1]
    if span_mask(torch.rand(1, latents), model.settings["mask"], model.settings["span"]).all():
        raise InputError(f"--seconds {args.seconds:g} gives {latents} latents, which would all be "
                         "masked: make it longer, or --span, --mask or --stack smaller")
    source = open_source(args.data, args.seconds)
    first, skipped, in_a_row, logged = 0, 0, 0, dict(updates=0)
    if args.compile:
        model.compile()         # in place: the names of the weights stay the same
    if args.benchmark:
        def prepare(waveform, lengths):
            log_mel = frontend(waveform)
            return log_mel, padding_of(lengths, log_mel)

        def loss_of(log_mel, padding_mask):
            with autocast(device, args.dtype):
                return model(log_mel, padding_mask).loss

        return benchmark(model.train(), optimizer, prepare, loss_of, source, samples, args, device)
    if checkpoint:
        same_options(out, checkpoint["args"], args, SAME_ON_RESUME)
        load_model(checkpoint, model, frontend)
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, skipped, logged = checkpoint["update"], checkpoint["skipped"], checkpoint["logged"]
    else:
        sample = batches(source, 32, 16, args.seed, samples=samples)
        frontend.measure((waveform.to(device), lengths) for waveform, lengths, _ in
                         tqdm(sample, "mean and deviation", leave=False, disable=True if rank else None))
    check_same_start(out, [first], device, world)
    wrapped = model if world == 1 else DistributedDataParallel(model)
    wrapped.train()
    parameters = list(model.parameters())

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(out / "log.jsonl", first)
        board = tensorboard(out) if args.tensorboard else None
        count = sum(p.numel() for p in parameters)
        print(f"{args.size}, {count / 1e6:.1f} M parameters, on {device} x {world}; {' '.join(args.data)}, "
              f"{len(source)} clips of {args.seconds:g} s in an epoch; "
              + (f"goes on after update {first}" if checkpoint else
                 f"no checkpoint in {out} yet: from the start" if args.resume else
                 "chance is what a blind guess gets"))
    bar = tqdm(total=args.updates, initial=first, disable=rank > 0, unit=" updates", smoothing=0.05)
    began = last_time = time.time()
    last_done, warned = first, False
    loader = batches(source, args.batch_size, args.updates, args.seed, first, rank, world,
                     args.workers, samples)
    # waveform (B, S) int16 and lengths (B,) in samples, on the CPU; numbers (B,) of the clips in the source.
    for update, (waveform, lengths, numbers) in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, args.lr, args.warmup, args.updates)
        # Masks and distractors are drawn for the whole batch, whatever part of it is ours.
        generator = torch.Generator(device).manual_seed(seed_of(1, args.seed, update))
        noise = torch.rand(model.noise_shape(args.batch_size, frame_count(waveform.shape[1])), device=device,
                           generator=generator)[rank * share:(rank + 1) * share]
        torch.manual_seed(seed_of(2, args.seed, update, rank))          # dropout
        results = []
        for i in range(0, share, micro):
            part = slice(i, i + micro)
            log_mel = frontend(waveform[part].to(device, non_blocking=True))        # (B, T, 64)
            # Several processes add up their gradients in the last backward pass of an update.
            with nullcontext() if world == 1 or i + micro == share else wrapped.no_sync():
                with autocast(device, args.dtype):
                    result = wrapped(log_mel, padding_of(lengths[part], log_mel), noise[part])
                (result.loss * result.count * world).backward()     # DDP takes the mean over processes
            results.append(result)
        # Means over all masked steps of the batch, of all parts and processes.
        sums = add_up([signals.received, *total(results)], device, world)
        received, figures = sums[0] > 0, means(sums[1:])
        for parameter in parameters:
            parameter.grad /= max(figures["count"], 1)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if np.isfinite([norm, figures["loss"]]).all():
            optimizer.step()
            in_a_row = 0
            logged = {name: logged.get(name, 0) + value for name, value in dict(
                figures, gradient_norm=norm, updates=1).items()}
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad()

        done = update + 1
        bar.update()
        if in_a_row == PATIENCE:
            bar.close()
            bad = offenders(model, frontend, waveform.to(device), lengths, noise,
                            [source.name(int(n)) for n in numbers])
            raise InputError(f"loss or gradient are not finite, now {PATIENCE} updates in a row, at update "
                             f"{done}; of its batch, {bad}: look at these, or lower --lr. The last good "
                             f"checkpoint, if there was one, is in {out}")
        if done % args.log_every == 0 or done == args.updates:
            now = time.time()
            speed, last_time, last_done = (done - last_done) * args.batch_size / (now - last_time), now, done
            averaged = logged.pop("updates")
            shown, logged = {name: value / averaged for name, value in logged.items()}, dict(updates=0)
            if rank == 0 and shown:
                line = dict(update=done, lr=optimizer.param_groups[0]["lr"], clips_per_second=round(speed, 1),
                            skipped=skipped, **shown)
                log.write(json.dumps(line) + "\n")
                if board:
                    for name, value in line.items():
                        board.add_scalar(name, value, done)
                    board.flush()           # it keeps lines in memory, which a run that is stopped would lose
                bar.set_postfix_str(f"loss {shown['loss']:.2f} accuracy {shown['accuracy']:.2f} "
                                    f"(chance {shown['chance']:.2f}) lr {line['lr']:.1e} {speed:.0f} clips/s")
                if (warning := diagnosis(shown)) and not warned:
                    bar.write(f"update {done}: {warning}", sys.stderr)
                warned = bool(warning)
        if done % args.checkpoint_every == 0 or done == args.updates or received:
            if not all(p.isfinite().all() for p in parameters):
                bar.close()
                raise InputError(f"weights are not finite at update {done}: lower --lr. What {out} holds is "
                                 "from before")
            if rank == 0:
                save_checkpoint(out / "checkpoint.pt", model=model.state_dict(), update=done,
                                frontend=frontend.state_dict(), optimizer=optimizer.state_dict(),
                                skipped=skipped, logged=logged, settings=model.settings, args=vars(args))
            if received and done < args.updates:
                stop(signals, bar, out / "checkpoint.pt", world)
    bar.close()
    if rank == 0:
        minutes = (time.time() - began) / 60
        print(f"{args.updates - first} updates in {minutes:.1f} min: {out / 'checkpoint.pt'}; now "
              f"python finetune.py --init" + f" {out}" * (args.out != "runs/pretrain"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # file names hold anything
    try:
        main(parse())
    except (InputError, OSError) as error:
        sys.stderr.write(f"pretrain.py: {error}\n")
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.stderr.write("pretrain.py: out of GPU memory: give a smaller --micro-batch\n")
        sys.exit(2)
