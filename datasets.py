"""Sound, in the order it travels: read, packed, synthesised, labelled, and drawn into batches.

    python datasets.py pack FOLDER OUT                  decode recordings once, for fast training
    python datasets.py pack ROOT OUT --data audioset    the same for a labelled data set
    python datasets.py synth OUT                        write some synthetic clips, to listen to

Unlabelled sound for pre-training is a source: `Synth` or `Packed`. It has `len` (crops in an epoch), `crop(i,
rng)` (int16 waveform at 16 kHz), `name(i)` and `fingerprint()`; `open_source` picks one. Labelled sets for
fine-tuning are a `LabelledSet`, which `load_labelled` reads from its official layout with one of the READERS.
`batches` serves both.
"""
import argparse
import collections
import contextlib
import copy
import csv
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import soundfile
import torch
from tqdm import tqdm

from frontend import SAMPLE_RATE, LogMel, resample

AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")

# ------------------------------------------------------------------- what the three scripts have in common


class InputError(Exception):
    """The program can't go on with what the user gave. The message names it and the remedy, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; the docstring is the description."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; --help explains\n")


def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' * (kind is int)}number") from None
        if not low <= value <= high:            # written so that NaN is refused too
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not {text}")
        return value
    return parse


def run_script(main):
    """Run a script's main function: what the user can mend ends in one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")       # file names may hold anything
    code = 2
    try:
        return main()
    except (InputError, OSError) as error:
        message = str(error).strip().split("\n")[-1]        # those of data workers come with their traceback
        if getattr(error, "errno", None) == errno.ENOSPC:
            message = f"{error.filename or 'the disk'}: no space left; make room, then continue with the same command"
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            message = "a process that reads data was killed (out of memory?): --resume continues, with fewer --workers"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            message = "out of memory: give a smaller --micro-batch or --size, or shorter recordings"
        else:
            raise
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    finally:
        # Data workers ignore SIGTERM, with which Python would end them, and wait for that for ever.
        if (workers := multiprocessing.active_children()) and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would report their end as an error
            for worker in workers:
                worker.kill()
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", sys.stderr)         # below a bar, not into it
    sys.exit(code)


class Bar(tqdm):
    """A run's progress: a bar where stderr is a terminal, else a line every minute; neither if `silent`."""

    def __init__(self, total, initial, label, silent=False):
        super().__init__(total=total, initial=initial, desc=label, unit=" updates", smoothing=0.05,
                         disable=True if silent else None)
        self.label, self.silent, self.printed = label, silent, time.time()

    def show(self, done, text):
        """`done` updates are done; `text` says how it goes."""
        self.update(done - self.n)
        self.set_postfix_str(text, refresh=False)
        if self.disable and not self.silent and time.time() - self.printed > 60:
            sys.stderr.write(f"{self.label}: update {done} of {self.total}: {text}\n")
            self.printed = time.time()


def cores():
    """How many of the machine's cores this process may use, shared with the others that torchrun started."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def find_device(name=None, world=1):
    """The device of this name, or the best there is; of several GPUs, the one of this process. Raises InputError where
    there is none, or not for `world` processes."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available() and world == 1
    name = name or ("cuda" if cuda else "mps" if mps else "cpu")
    if not {"cuda": cuda, "mps": mps, "cpu": True}[name]:
        raise InputError(f"--device {name}: this torch has none" + ", or not for several processes" * (world > 1)
                         + "; leave --device out")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


@contextlib.contextmanager
def reading(path, remedy="get it again"):
    """Whatever goes wrong within, while a file is read, is an InputError in one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:      # there is no telling what damaged content leads to
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(f"{path}: damaged, or not what it should be ({reason}); {remedy}") from None


def claim(folder):
    """Make a folder and lock it for writing, until the lock that is returned is gone or the process has ended.

    Raises InputError where another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is writing there; wait for it, or name another folder") from None
    return lock


def write_whole(path, content):
    """Write a file so that, even if the power fails, `path` is either the old one or the new one.

    content is text, or a function that writes into the open binary file.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        part.unlink(missing_ok=True)        # on a full disk it would only be in the way
        raise
    os.replace(part, path)


def write_events(path, events):
    """A table of events (file name, onset, offset in seconds, class) in DCASE's format; blanks for tabs in names."""
    rows = [("filename", "onset", "offset", "event_label")]
    rows += [(name, f"{onset:.2f}", f"{offset:.2f}", label) for name, onset, offset, label in events]
    write_whole(path, "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows))


# -------------------------------------------------------------------------------------- reading recordings


# What libsndfile notes in its log about a file that is shorter than its header promises. A size of 2 or 4 GiB stands
# for "unknown" in streamed files. (`check_ogg` tells of Ogg files.)
PROMISED = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be")


def open_audio(path):
    """A recording, opened with soundfile. Raises InputError if it is missing, not audio, empty or, as far as
    its header tells, cut off (Ogg's does not, see `check_ogg`)."""
    for wrong, fault in ((not os.path.lexists(path), "no such file"), (os.path.isdir(path), "is a folder"),
                         (not os.path.isfile(path), "is no regular file, or a link to nowhere"),
                         (not os.access(path, os.R_OK), "no permission to read it")):
        if wrong:
            raise InputError(f"{path}: {fault}")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: not readable as audio ({error.error_string})") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not valid UTF-8; rename it") from None
    if file.frames == 0:
        raise InputError(f"{path}: no sound in it (0 samples)")
    if any(int(size) < 2**31 - 1 for size in PROMISED.findall(file.extra_info)):
        raise InputError(f"{path}: cut off before its end; get it again")
    if file.frames > 2**40:
        raise InputError(f"{path}: does not say how long it is; convert it to .wav first")
    if not 1000 <= file.samplerate <= 768_000:
        raise InputError(f"{path}: a sample rate of {file.samplerate} Hz can't be right")
    return file


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_ogg(path):
    """Raise InputError where an Ogg file (Vorbis, Opus) is damaged or cut off, which its decoders pass over.

    The format (RFC 3533) is a chain of pages, each with a checksum and a number, the last with an end mark. Its CRC
    is that of zlib with the bits of each byte and of the result in reverse order, and without inversions.
    """
    content, at, number, ended = Path(path).read_bytes(), 0, 0, False
    while at < len(content):
        segments = content[at + 27:at + 27 + content[at + 26]] if at + 26 < len(content) else b""
        size = 27 + len(segments) + sum(segments)
        if ended:
            raise InputError(f"{path}: goes on after its end: another stream, or junk; only the first would be read")
        if at + size > len(content):
            break
        page = content[at:at + 22] + bytes(4) + content[at + 26:at + size]
        crc = zlib.crc32(page.translate(REVERSED), 2**32 - 1) ^ (2**32 - 1)
        if int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little") != content[at + 22:at + 26] or (
                number != int.from_bytes(content[at + 18:at + 22], "little")):
            raise InputError(f"{path}: damaged (page {number} of its Ogg stream); get it again")
        at, number, ended = at + size, number + 1, bool(content[at + 5] & 4)
    if not ended:
        raise InputError(f"{path}: cut off before its end; get it again")


def read_audio(path, start=0.0, seconds=None):
    """Decode a recording, or `seconds` of it from `start` on: mono float32 (S,) at 16 kHz.

    Channels are averaged. Raises InputError as `open_audio` does, for damaged Ogg files, and for samples that are
    not finite.
    """
    with open_audio(path) as file:
        if file.format == "OGG" and start == 0:
            check_ogg(path)
        rate = file.samplerate
        parts, left = [], file.frames
        try:
            if start > 0:
                left -= file.seek(min(int(start * rate), file.frames))
            left = left if seconds is None else min(left, int(seconds * rate))
            while left > 0 and len(part := file.read(min(left, 2**22), "float32", always_2d=True)):
                parts.append(part.mean(axis=1, dtype=np.float64).astype(np.float32))
                left -= len(part)
        except soundfile.LibsndfileError as error:
            raise InputError(f"{path}: not readable as audio ({error.error_string})") from None
    if left > 0:
        raise InputError(f"{path}: cut off before its end; get it again")
    if not parts:
        raise InputError(f"{path}: no sound in it (0 samples)")
    waveform = np.concatenate(parts)
    if not np.abs(waveform).max() < 100:        # full scale is 1
        raise InputError(f"{path}: holds values that are not finite, or far too large")
    return resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()


def to_int16(waveform):
    """Waveform in [-1, 1] to int16; what is louder is clipped."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)


def read_blocks(path, seconds=600):
    """A recording of any length as int16 blocks of ten minutes, which together are what `read_audio` gives.

    Each is read with a second more on either side, further than the filter of `resample` reaches.
    """
    with open_audio(path) as file:
        blocks = max(1, -(-file.frames // (file.samplerate * seconds)))
    for start in range(0, blocks * seconds, seconds):
        before, last = min(start, 1), start == (blocks - 1) * seconds
        waveform = read_audio(path, start - before, None if last else before + seconds + 1)[before * SAMPLE_RATE:]
        yield to_int16(waveform if last else waveform[:seconds * SAMPLE_RATE])


def walk(folder):
    """All files below a folder as (path, ending in lower case), sorted; links are followed, each folder once.

    Raises InputError where the folder or one below it can't be listed.
    """
    def refuse(error):
        raise InputError(f"{error.filename}: can't be listed ({error.strerror})")

    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    seen, files = set(), []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if identity(parent) in seen:
            folders.clear()
            continue
        seen.add(identity(parent))
        files += [(Path(parent, name), os.path.splitext(name)[1].lower()) for name in names]
    return sorted(files)


def identity(path):
    """The same for all names and links of a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def audio_files(folder):
    """All recordings below a folder, sorted, as paths. Raises InputError where there are none."""
    files = [path for path, ending in walk(folder) if ending in AUDIO]
    if not files:
        raise InputError(f"{folder}: no recordings in it ({' '.join(AUDIO)})")
    return files


class Recordings(torch.utils.data.Dataset):
    """Recordings, decoded when asked for: (path, int16 waveform or the reason why there is none). Of those of more
    than LONG seconds, which could fill the memory, the waveform is left to `read_blocks`: it is None."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.files[i]
        try:
            with open_audio(path) as file:
                long = file.frames > LONG * file.samplerate
            return path, None if long else to_int16(read_audio(path))
        except InputError as error:
            return path, str(error).removeprefix(f"{path}: ")
        except Exception as error:          # one damaged file must not cost the others
            return path, f"not readable ({type(error).__name__}: {error})"


def decode(files, workers=None, done=0):
    """Decode recordings on all cores, with a progress bar: yields what is in `Recordings`, in order.

    `done` is how many were decoded before these.
    """
    workers = min(workers or cores(), len(files) // 16)             # for a few files none is worth its start
    loader = torch.utils.data.DataLoader(Recordings(files), batch_size=None, num_workers=workers, collate_fn=tuple,
                                         worker_init_fn=init_worker)
    yield from tqdm(loader, "decode", total=done + len(files), initial=done, unit=" files", leave=False, disable=None)


def init_worker(_):
    """In a process that reads data: whether Ctrl-C and SIGTERM end it is for its parent to decide; it ends with it."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


# --------------------------------------------------------------------- packing recordings for training

INDEX = np.dtype([("shard", np.int32), ("start", np.int64), ("length", np.int64)])   # in samples
LONG = 3600         # seconds of a recording that are decoded at once
SILENCE = 33        # largest absolute sample of a recording that counts as silent: -60 dB


def append_recording(audio, path, waveform, keep_silent):
    """Append a recording, as `decode` gives it, to the open file of a shard. Returns the reason why it can't be used,
    which leaves the file as it was, or None."""
    if isinstance(waveform, str):
        return waveform
    start, loudest, reason = audio.tell(), 0, None
    try:
        for block in read_blocks(path) if waveform is None else (waveform,):
            audio.write(block.astype("<i2").tobytes())
            loudest = max(loudest, int(block.max()), -int(block.min()))
        if loudest < SILENCE and not keep_silent:
            reason = "silent (--keep-silent packs it all the same)"
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
    if reason:
        audio.seek(start)
        audio.truncate()
    return reason


def pack(files, names, out, shard_hours=5.0, workers=None, keep_silent=False):
    """Decode recordings into int16 shards that training can read from anywhere.

    files and names: N paths and what to call them. Writes in `out`: `shard_00000.int16` and on, plain
    samples end to end, each with a .json of what is in it; at the end `index.npy`, where in which
    shard each recording lies, `names.txt`, a line each, and `skipped.txt`, each file left out and why.
    A folder with an index is complete. Without, it was interrupted, and the same call continues after its
    last complete shard. Returns the numbers (into `names`) of those kept, and the lines of skipped.txt.
    Raises InputError where `out` holds something else or no file is usable.
    """
    out = Path(out)
    if out.is_file():
        raise InputError(f"{out}: is a file; name a folder")
    lock = claim(out)       # noqa: F841, held until the end
    names = [name.replace("\n", "\\n").replace("\r", "\\r") for name in names]
    stamp = hashlib.sha256(f"{shard_hours} {keep_silent}".encode())
    for path, name in zip(files, names, strict=True):
        with contextlib.suppress(OSError):      # a link to nowhere: its decoding says so
            status = os.stat(path)
            name += f" {status.st_size} {status.st_mtime_ns}"
        stamp.update(f"{name}\n".encode(errors="backslashreplace"))
    source = out / "source.txt"
    if source.exists() and source.read_text() != stamp.hexdigest():
        raise InputError(f"{out}: holds other recordings, or the same before they changed; delete it "
                         "or name another folder")
    if not source.exists() and {path.name for path in out.iterdir()} - {".lock", "source.txt.part"}:
        raise InputError(f"{out}: holds other files; name a new folder")
    write_whole(source, stamp.hexdigest())
    shards = []
    with reading(out, "delete it and pack again"):
        while (out / f"shard_{len(shards):05}.json").exists():
            shards.append(json.loads((out / f"shard_{len(shards):05}.json").read_text()))
        done = shards[-1]["end"] if shards else 0
    limit, audio = int(shard_hours * 3600 * SAMPLE_RATE), None
    for number, (path, waveform) in enumerate(decode(files[done:], workers, done), done):
        if isinstance(waveform, str) and not os.access(path, os.R_OK):
            raise InputError(f"{path}: is gone, or can't be read any more; once it can, the same command continues")
        if audio is None:
            shard = dict(kept=[], lengths=[], skipped=[])
            audio = open(out / f"shard_{len(shards):05}.int16", "wb")       # noqa: SIM115
        start, reason = audio.tell(), append_recording(audio, path, waveform, keep_silent)
        if reason:
            shard["skipped"].append(f"{names[number]}: {reason}")
        else:
            shard["kept"].append(number)
            shard["lengths"].append((audio.tell() - start) // 2)
        if audio.tell() >= 2 * limit or number == len(files) - 1:
            audio.flush()
            os.fsync(audio.fileno())
            audio.close()
            write_whole(out / f"shard_{len(shards):05}.json", json.dumps({**shard, "end": number + 1}))
            shards.append(shard)
            audio = None
    kept = [number for shard in shards for number in shard["kept"]]
    skipped = [line for shard in shards for line in shard["skipped"]]
    if not kept:
        raise InputError(f"{out}: none of the {len(files)} files is usable: {skipped[0]}, ...")
    index = [(n, end - length, length) for n, shard in enumerate(shards)
             for length, end in zip(shard["lengths"], np.cumsum(shard["lengths"]), strict=True)]
    write_whole(out / "names.txt", "".join(f"{names[number]}\n" for number in kept))
    write_whole(out / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    write_whole(out / "index.npy", lambda file: np.save(file, np.array(index, INDEX)))
    return kept, skipped


class Shards:
    """What `pack` wrote, like a list of int16 waveforms; `lengths` (N,) holds theirs, in samples.

    Nothing is read before it is asked for. Raises InputError where a part is missing or cut off.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "index.npy").exists():
            raise InputError(f"{folder}: holds no packed audio, or not all of it yet: `python datasets.py pack` "
                             "packs a folder of recordings, or continues where it was interrupted")
        with reading(folder, "delete it and pack again"):
            self.index = np.load(self.folder / "index.npy", mmap_mode="r")
            self.lengths = self.index["length"]
            order = np.lexsort((self.index["start"], self.index["shard"]))
            shard, start, length = (self.index[name][order] for name in ("shard", "start", "length"))
            first = np.diff(shard, prepend=-1) > 0                          # of its shard
            ends = (start + length)[np.append(first[1:], True)]
            if (length < 1).any() or (start != np.where(first, 0, np.roll(start + length, 1))).any() or any(
                    2 * end != os.path.getsize(self.path(n)) for n, end in zip(shard[first], ends, strict=True)):
                raise ValueError("recordings overlap, or lie outside of their shard")

    def __reduce__(self):
        return Shards, (self.folder,)       # a worker process opens the folder itself

    @functools.cached_property
    def names(self):
        """What the recordings are called: a list."""
        names = (self.folder / "names.txt").read_text("utf-8").split("\n")[:-1]
        if len(names) != len(self):
            raise InputError(f"{self.folder}: names.txt is not of these recordings; delete the folder and pack again")
        return names

    def path(self, shard):
        """The file of this number."""
        return self.folder / f"shard_{shard:05}.int16"

    def __len__(self):
        return len(self.index)

    def read(self, i, start, samples):
        """Recording i from sample `start` on, at most `samples`: int16 (S,)."""
        shard, first, length = self.index[i].item()
        waveform = np.empty(min(samples, length - start), "<i2")
        with open(self.path(shard), "rb") as file:
            file.seek(2 * (first + start))
            file.readinto(waveform)
        return waveform

    def __getitem__(self, i):
        return self.read(i, 0, self.lengths[i])


class Packed:
    """Random crops of `seconds` from what `pack` wrote, in proportion to length: a recording as long as n crops
    gives ceil(n) of them in an epoch, each at a random place.

    Recordings shorter than a crop are given whole, those under a second not at all: too little to mask and to
    predict from. `held_out`: the source of recordings that are never trained on, one in a hundred by a hash of
    their names, at least 16 (of fewer than 80 recordings, a fifth), or that of all others. Raises InputError
    where there is none.
    """

    def __init__(self, folders, seconds, held_out=False):
        self.options = folders, seconds, held_out
        self.parts, self.samples = [Shards(folder) for folder in folders], round(seconds * SAMPLE_RATE)
        self.offsets = np.cumsum([0, *map(len, self.parts)])
        lengths = np.concatenate([part.lengths for part in self.parts])
        usable = np.flatnonzero(lengths >= SAMPLE_RATE)
        if len(usable) == 0:
            raise InputError(f"{', '.join(map(str, folders))}: no recording in it is a second long")
        hashes = np.array([zlib.crc32(name.encode()) for part in self.parts for name in part.names])
        by_hash = usable[np.argsort(hashes[usable], kind="stable")]
        count = min(max(len(usable) // 100, 16), len(usable) // 5)
        self.recordings = np.sort(by_hash[:count] if held_out else by_hash[count:])
        self.lengths = lengths[self.recordings]
        self.ends = np.cumsum(-(-self.lengths // self.samples))
        self.hash = hashlib.sha256(np.stack([hashes[self.recordings], self.lengths]).tobytes()).hexdigest()

    def __reduce__(self):
        return Packed, self.options

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, i):
        """Where crop i comes from: which folder, and the number of the recording there."""
        recording = self.recordings[np.searchsorted(self.ends, i, side="right")]
        part = int(np.searchsorted(self.offsets, recording, side="right")) - 1
        return self.parts[part], recording - self.offsets[part]

    def crop(self, i, rng):
        """Crop i of an epoch, at a random place: int16 (S,)."""
        part, number = self.place(i)
        start = rng.integers(max(part.lengths[number] - self.samples, 0) + 1)
        return part.read(number, int(start), self.samples)

    def name(self, i):
        """The recording that crop i comes from."""
        part, number = self.place(i)
        return str(part.folder / part.names[number])

    def fingerprint(self):
        """A hash of the names and lengths of the recordings."""
        return self.hash


# -------------------------------------------------------------------------- synth: sounds from formulas


def _noise(rng, n, low=0.0, high=8000.0, slope=0.0):
    """n samples of noise between two frequencies in Hz, its power proportional to f ** slope."""
    size = -(-n // 4000) * 4000                     # no large prime in it: fast Fourier transform
    f = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).clip(20)
    gain = f ** (slope / 2) / ((1 + (low / f) ** 6) * (1 + (f / high) ** 6))
    spectrum = rng.standard_normal((len(f), 2)).view(complex)[:, 0]
    x = np.fft.irfft(spectrum * gain, size)[:n]
    return x / (x.std() + 1e-9)


def _tone(frequency, harmonics=(1.0,)):
    """Harmonics of a frequency in Hz that moves over time: one period, read at a moving speed."""
    period = np.arange(4096) * 2 * np.pi / 4096
    period = sum(a * np.sin((k + 1) * period) for k, a in enumerate(harmonics))
    return period[(np.cumsum(frequency) * (4096 / SAMPLE_RATE)).astype(np.int64) % 4096]


def _strokes(rng, t, rate, spread):
    """Time since the last stroke and its number, for strokes about `rate` times a second."""
    times = np.cumsum(rng.uniform(1 - spread, 1 + spread, int(t[-1] * rate / (1 - spread)) + 2) / rate)
    times = np.concatenate([[0], times])
    which = np.searchsorted(times, t, side="right") - 1
    return t - times[which], which


def _siren(rng, t, pitch, speed):
    wail = np.sin(2 * np.pi * rng.choice([0.4, 4.0]) * speed * t + rng.uniform(0, 6))
    return _tone(900 * pitch * 2 ** (0.6 * wail), (1, 0.5, 0.25, 0.1))


def _bell(rng, t, pitch, speed):
    since, _ = _strokes(rng, t, 0.8 * speed, 0.3)
    ratios = np.array([0.5, 1, 1.19, 1.56, 2, 2.74, 3.76]) * rng.normal(1, 0.01, 7)
    return sum(np.exp(-since * r * 2.5) * np.sin(2 * np.pi * 600 * pitch * r * since) for r in ratios)


def _engine(rng, t, pitch, speed):
    drift = np.interp(t, np.linspace(0, t[-1], 5), rng.uniform(0.8, 1.25, 5))
    pulses = _tone(45 * pitch * drift, rng.uniform(0.2, 1, 24) / np.arange(1, 25) ** 0.5)
    return pulses + 0.7 * _noise(rng, len(t), 40, 900) * (1.2 + np.tanh(pulses))


def _rain(rng, t, pitch, speed):
    drops = (rng.random(len(t)) < 0.004 * speed) * rng.exponential(20, len(t))
    splash = np.exp(-np.arange(160) / 30) * np.sin(np.arange(160) * 1.2 * pitch)
    return _noise(rng, len(t), 900 * pitch, 7000) + np.convolve(drops, splash)[:len(t)] * 0.4


def _footsteps(rng, t, pitch, speed):
    since, which = _strokes(rng, t, 1.9 * speed, 0.08)
    heel, toe = np.exp(-since * 45), np.exp(-np.abs(since - 0.09) * 70) * 0.5
    return _noise(rng, len(t), 80, 900 * pitch) * (heel + toe) * (0.8 + 0.2 * (which % 2))


def _bird(rng, t, pitch, speed):
    since, which = _strokes(rng, t, 4.5 * speed, 0.35)
    shape = rng.uniform(-9, 9, 3)[which % 3]
    sounding = np.clip(np.sin(np.pi * (since / 0.13).clip(0, 1)), 0, 1) * (which % 5 < 4)
    return _tone(3600 * pitch * 2 ** (shape * (since.clip(0, 0.13) - 0.06))) * sounding


def _dog(rng, t, pitch, speed):
    since, which = _strokes(rng, t, 2.0 * speed, 0.4)
    bark = (since / 0.03).clip(0, 1) * np.exp(-(since - 0.03).clip(0) * 16)
    voice = _tone(480 * pitch * (0.7 + 0.6 * np.exp(-since * 12)), (0.6, 1, 0.9, 0.6, 0.4, 0.3, 0.2))
    return bark * (voice + 0.6 * _noise(rng, len(t), 400, 3000))


def _alarm(rng, t, pitch, speed):
    since, which = _strokes(rng, t, 2.5 * speed, 0.0)
    high = np.where(which % 2, 1.0, rng.choice([1.0, 1.25]))
    return _tone(1500 * pitch * high, (1, 0, 0.4, 0, 0.2)) * (since * 2.5 * speed < 0.5)


def _cricket(rng, t, pitch, speed):
    group, _ = _strokes(rng, t, 2.2 * speed, 0.1)
    pulse = np.clip(np.sin(2 * np.pi * 28 * speed * group), 0, 1)
    return _tone(np.full(len(t), 4300 * pitch)) * pulse * (group * 2.2 * speed < 0.6)


def _wind(rng, t, pitch, speed):
    gust = np.interp(t * speed, np.arange(0, 20, 0.4), rng.uniform(0.1, 1, 50))
    low, high = _noise(rng, len(t), 60, 500 * pitch), _noise(rng, len(t), 300, 1200 * pitch)
    return low * gust + 0.3 * high * gust ** 2


# In the order of how often they occur.
SOUND_CLASSES = dict(footsteps=_footsteps, wind=_wind, bird=_bird, engine=_engine, dog=_dog, rain=_rain,
                     bell=_bell, alarm=_alarm, cricket=_cricket, siren=_siren)
SPLITS = ("unlabelled", "train", "test", "held_out")


def synth_clip(index, split="unlabelled", seconds=5.0):
    """One synthetic clip, the same for the same (index, split), made without any file.

    One to three events of different classes, those later in SOUND_CLASSES rarer, at random pitch, speed,
    loudness and onset, over a background of noise, in a random room, through a random microphone.
    Returns the int16 waveform (S,) and the events: a list of (class, onset, offset) in seconds.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    n = int(seconds * SAMPLE_RATE)
    waveform, events = _noise(rng, n, slope=rng.uniform(-2, 0)), []
    weights = 1 / np.arange(2, len(SOUND_CLASSES) + 2)
    for kind in rng.choice(list(SOUND_CLASSES), rng.integers(1, 4), replace=False, p=weights / weights.sum()):
        length = int(rng.uniform(0.12, 0.5) * n)
        onset = int(rng.integers(n - length))
        t = np.arange(length) / SAMPLE_RATE
        sound = SOUND_CLASSES[kind](rng, t, 2 ** rng.uniform(-0.7, 0.7), 2 ** rng.uniform(-0.6, 0.6))
        sound = sound * np.minimum(np.minimum(t, t[::-1]) / 0.02, 1)            # fade in and out
        level = 10 ** (rng.uniform(-8, 14) / 20)                                # -8 to 14 dB
        waveform[onset:onset + length] += sound / (sound.std() + 1e-9) * level
        events.append((str(kind), onset / SAMPLE_RATE, (onset + length) / SAMPLE_RATE))
    size = -(-n // 4000) * 4000 + 4000
    tail = np.arange(4000) / SAMPLE_RATE
    room = rng.standard_normal(4000) * np.exp(-tail * rng.uniform(15, 60)) * rng.uniform(0, 0.06)
    room[0] = 1
    microphone = np.interp(np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) + 50),
                           np.linspace(5.6, 13, 7), rng.normal(0, 5, 7))        # dB
    response = np.fft.rfft(room, size) * 10 ** (microphone / 20)
    waveform = np.fft.irfft(np.fft.rfft(waveform, size) * response, size)[:n]
    return to_int16(waveform / np.abs(waveform).max() * 10 ** (rng.uniform(-25, -1) / 20)), events


class Synth:
    """Synthetic clips without labels; an epoch has 2,000, each made once and then kept: 320 MB at 5 s, in each
    process that reads. `held_out`: others, 100 of them, that are never trained on."""

    def __init__(self, seconds, held_out=False):
        self.seconds, self.split, self.made = seconds, "held_out" if held_out else "unlabelled", {}

    def __len__(self):
        return 100 if self.split == "held_out" else 2000

    def crop(self, i, rng):
        """Clip i, the same each time: int16 (S,)."""
        if i not in self.made:
            self.made[i] = synth_clip(i, self.split, self.seconds)[0]
        return self.made[i]

    def name(self, i):
        """What clip i is called."""
        return f"synth/{self.split}/{i}"

    def fingerprint(self):
        """What makes these clips what they are."""
        return f"synth {self.seconds}"


def open_source(data, seconds, held_out=False):
    """Unlabelled crops of `seconds` for pre-training: data is ["synth"] or a list of packed folders. `held_out`:
    those that are kept apart, to see how well the training generalises. Raises InputError where there are none."""
    return Synth(seconds, held_out) if data == ["synth"] else Packed(data, seconds, held_out)


# ---------------------------------------------------------------------------------------- labelled sets


class Clip(NamedTuple):
    """A clip as a data set's tables have it."""
    name: str               # unique in the data set
    labels: tuple           # names of its classes
    split: str              # "train", "valid" or "test", or the number of the fold whose test clip it is
    path: Path | None       # its recording; None where that is missing
    group: str = ""         # clips of one group, cut from one recording perhaps, stay on one side of a split


class FileIndex:
    """All files below a folder. Data sets get unpacked, converted and moved in many ways: recordings
    are found by their name, whatever folder they are in and whatever format they have become."""

    def __init__(self, root):
        self.root, self.tables, self.recordings = root, {}, {}
        for path, ending in walk(root):
            if ending in AUDIO:
                self.recordings.setdefault(path.stem, path)
            else:
                self.tables.setdefault(path.name, path)

    def table(self, *names):
        """The path of the table that has one of these names. Raises InputError where there is none."""
        for name in names:
            if name in self.tables:
                return self.tables[name]
        raise InputError(f"{self.root}: no {' or '.join(names)} below it; is the data set's root right?")

    def find(self, *names):
        """The path of the recording that has one of these names, without folder and ending, or None."""
        return next((self.recordings[name] for name in names if name in self.recordings), None)


def read_table(path, columns, delimiter=","):
    """Rows of a CSV file with a header line, as dictionaries. Raises InputError for a missing file or column."""
    with reading(path, "is it a table, and is --data right?"), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
            raise InputError(f"{path}: no column {', '.join(missing)}; "
                             f"it has {', '.join(reader.fieldnames or ['none'])}")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path}: line {number} has too {'many' if None in row else 'few'} columns")
    return rows


def audioset(root, parts):
    """AudioSet (Gemmeke et al. 2017). parts: which `<part>_segments.csv` to train on."""
    index = FileIndex(root)
    table = index.table("class_labels_indices.csv")
    classes = {row["mid"]: row["display_name"] for row in read_table(table, ("mid", "display_name"))}
    clips = []
    for part in (*parts, "eval"):
        table = index.table(f"{part}_segments.csv")
        with reading(table), open(table, newline="", encoding="utf-8") as file:
            rows = csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True)
            for row in rows:
                try:
                    name, start, mids = row[0], float(row[1]), row[3].split(",")
                    labels = tuple(classes[mid] for mid in mids)
                except (IndexError, ValueError, KeyError):
                    raise InputError(f"{table}: can't read the line {','.join(row)}") from None
                path = index.find(name, f"Y{name}", *(f"{prefix}{name}_{at}" for prefix in ("", "Y") for at in (
                    f"{start:.3f}", f"{start:.0f}", f"{1000 * start:.0f}", f"{start:06.0f}")))
                clips.append(Clip(name, labels, "test" if part == "eval" else "train", path))
    return clips, list(classes.values())


def esc50(root, esc10=False):
    """ESC-50 (Piczak 2015), 50 classes in five folds; or ESC-10, ten of them."""
    index = FileIndex(root)
    table = index.table("esc50.csv")
    rows = read_table(table, ("filename", "fold", "category", "esc10"))
    if odd := {row["fold"] for row in rows} - set("12345"):
        raise InputError(f"{table}: a fold must be 1 to 5, not '{odd.pop()}'")
    return [Clip(row["filename"], (row["category"],), row["fold"], index.find(Path(row["filename"]).stem))
            for row in rows if not esc10 or row["esc10"].strip().lower() == "true"], None


def fsdkaggle2019(root, parts):
    """FSDKaggle2019 (Fonseca et al. 2019) as Zenodo has it; train_curated.csv and train_noisy.csv of
    Kaggle serve too, but the test labels only Zenodo has. parts: "curated", "noisy"."""
    index, clips = FileIndex(root), []
    for part in (*(f"train_{part}" for part in parts), "test"):
        for row in read_table(index.table(f"{part}_post_competition.csv", f"{part}.csv"),
                              ("fname", "labels")):
            clips.append(Clip(row["fname"], tuple(row["labels"].split(",")), part.split("_")[0],
                              index.find(Path(row["fname"]).stem)))
    return clips, None


def dcase2019(root):
    """DCASE 2019 task 1a: TAU Urban Acoustic Scenes 2019, development set (Mesaros et al. 2018)."""
    index = FileIndex(root)
    return [Clip(row["filename"], (row["scene_label"],), split, index.find(Path(row["filename"]).stem))
            for split, table in (("train", "fold1_train.csv"), ("test", "fold1_evaluate.csv"))
            for row in read_table(index.table(table), ("filename", "scene_label"), "\t")], None


def magnatagatune(root, top=50):
    """MagnaTagATune (Law et al. 2009): its most frequent tags; folders 0 to b train, c valid, d to f
    test. Clips with none of these tags are left out."""
    index = FileIndex(root)
    table = index.table("annotations_final.csv")
    rows = read_table(table, ("clip_id", "mp3_path"), "\t")
    tags = [name for name in rows[0] if name not in ("clip_id", "mp3_path")] if rows else []
    counts = {tag: sum(row[tag] == "1" for row in rows) for tag in tags}
    classes = sorted(tags, key=counts.get, reverse=True)[:top]
    clips = []
    for row in rows:
        labels = tuple(tag for tag in classes if row[tag] == "1")
        split = {"c": "valid", **dict.fromkeys("def", "test")}.get(row["mp3_path"][:1], "train")
        if labels:
            clips.append(Clip(row["mp3_path"], labels, split, index.find(Path(row["mp3_path"]).stem)))
    return clips, classes


def kinetics700(root):
    """Kinetics-700 (Carreira et al. 2019), its sound only. Its test labels were held out: the
    validation split is what is tested on."""
    index, clips = FileIndex(root), []
    for split, tables in (("train", ("train.csv", "kinetics700_train.csv")),
                          ("test", ("validate.csv", "val.csv", "kinetics700_val.csv"))):
        table = index.table(*tables)
        for row in read_table(table, ("label", "youtube_id", "time_start", "time_end")):
            video, start, end = row["youtube_id"], row["time_start"], row["time_end"]
            try:
                padded = f"{video}_{int(float(start)):06}_{int(float(end)):06}"
            except (ValueError, OverflowError):
                raise InputError(f"{table}: '{start}' and '{end}' are not times") from None
            clips.append(Clip(padded, (row["label"],), split, index.find(padded, f"{video}_{start}_{end}", video)))
    return clips, None


def folder(root):
    """Your own sounds: a sub-folder a class."""
    clips = [Clip(str(path.relative_to(root)), (path.relative_to(root).parts[0],), "", path)
             for path in audio_files(root) if path.parent != Path(root)]
    if not clips:
        raise InputError(f"{root}: no sub-folders with recordings, one a class, in it")
    return split_train_test(clips), None


def own_table(path):
    """Your own sounds in a table: columns file (its path from the table's folder), labels (separated by ;) and,
    if you like, split (train, valid, test, or the number of a fold) and group (see `Clip`)."""
    clips = []
    for row in read_table(path, ("file", "labels")):
        recording, labels = Path(path).parent / row["file"], [name.strip() for name in row["labels"].split(";")]
        clips.append(Clip(row["file"], tuple(filter(None, labels)), (row.get("split") or "").strip(),
                          recording if recording.is_file() else None, (row.get("group") or "").strip()))
    splits = {clip.split for clip in clips}
    if splits == {""}:
        return split_train_test(clips), None
    if not (splits <= {"train", "valid", "test"} or all(split.isdigit() for split in splits)):
        raise InputError(f"{path}: split must be train, valid or test, or the number of a fold, in all "
                         f"lines, not {', '.join(sorted(splits))}")
    return clips, None


def split_train_test(clips):
    """Clips without splits: of each (first) class every fifth group, in order of a hash of their names, is for
    testing; a clip without a group is one."""
    def hashed(clip):
        return hashlib.sha256((clip.group or clip.name).encode(errors="surrogateescape")).digest()

    sides, met = {}, collections.Counter()
    for clip in sorted(clips, key=hashed):
        if hashed(clip) not in sides:
            met[clip.labels[:1]] += 1
            sides[hashed(clip)] = "test" if met[clip.labels[:1]] % 5 == 2 else "train"
    return [clip._replace(split=sides[hashed(clip)]) for clip in clips]


def merge_duplicates(clips, by_content):
    """One clip for each recording: rows for the same file are merged, their labels put together.

    Raises InputError where the same file, the same bytes (if by_content) or the same group is in two splits.
    """
    sizes = collections.Counter(os.path.getsize(path) for path in {clip.path for clip in clips}) if by_content else {}
    seen, merged = {}, {}
    for clip in clips:
        file = ("file", identity(clip.path))
        keys = [file, ("group", clip.group or clip.path)]
        if by_content and sizes[os.path.getsize(clip.path)] > 1:
            keys.append(("content", hashlib.sha256(clip.path.read_bytes()).digest()))
        for key in keys:
            other = seen.setdefault(key, clip)
            if other.split != clip.split:
                raise InputError(f"{other.name} ({other.split}) and {clip.name} ({clip.split}) are the same {key[0]}, "
                                 "but in different splits: delete one, or put both into one split")
        first = merged.get(file, clip)
        merged[file] = first._replace(labels=tuple(dict.fromkeys(first.labels + clip.labels)))
    return list(merged.values())


# Name: (reader, metric). A reader takes the set's root and returns all clips that its tables name, a list of Clip, and
# the names of the classes in order, or None: those of the clips, sorted. It raises InputError for a table that is
# missing or malformed. None for a metric: accuracy if all clips have one label, else mAP.
READERS = {
    "synth": (None, "mAP"),
    "audioset": (functools.partial(audioset, parts=("balanced_train", "unbalanced_train")), "mAP"),
    "audioset-balanced": (functools.partial(audioset, parts=("balanced_train",)), "mAP"),
    "esc50": (esc50, "accuracy"),
    "esc10": (functools.partial(esc50, esc10=True), "accuracy"),
    "fsdkaggle2019": (functools.partial(fsdkaggle2019, parts=("curated", "noisy")), "lwlrap"),
    "fsdkaggle2019-curated": (functools.partial(fsdkaggle2019, parts=("curated",)), "lwlrap"),
    "fsdkaggle2019-noisy": (functools.partial(fsdkaggle2019, parts=("noisy",)), "lwlrap"),
    "dcase2019": (dcase2019, "accuracy"),
    "magnatagatune": (magnatagatune, "MAUC"),
    "kinetics700": (kinetics700, "accuracy"),
    "folder": (folder, None),
    "csv": (own_table, None),
}
IN_MEMORY = 24      # hours of labelled clips that are decoded into memory, 115 MB each; more: `pack`


class LabelledSet:
    """Clips with their labels.

    waveforms: N int16 arrays at 16 kHz, or `Shards`; labels: N tuples of class numbers; classes: C names;
    names: N names; splits and groups (N,): see `Clip`; metric: its name. `lengths` (N,) are in samples.
    """

    def __init__(self, waveforms, labels, classes, names, splits, groups, metric):
        self.waveforms, self.labels, self.classes, self.names, self.metric = waveforms, labels, classes, names, metric
        packed = isinstance(waveforms, Shards)
        self.lengths = waveforms.lengths if packed else np.array([len(waveform) for waveform in waveforms])
        self.splits, self.rows = np.asarray(splits, "U10"), np.arange(len(labels))
        self.groups = np.array([group or name for group, name in zip(groups, names, strict=True)])
        self.seconds = 10.0         # of the longest crop that `crop` gives

    def __len__(self):
        return len(self.rows)

    def subset(self, indices):
        """The same set with these clips only. Waveforms are not copied."""
        part = copy.copy(self)
        part.rows, part.lengths, part.splits, part.groups = (
            x[indices] for x in (self.rows, self.lengths, self.splits, self.groups))
        part.labels, part.names = [self.labels[i] for i in indices], [self.names[i] for i in indices]
        return part

    def waveform(self, i):
        """Clip i, whole: int16 (S,)."""
        return self.waveforms[self.rows[i]]

    def crop(self, i, rng):
        """Clip i for training, a random crop of what is longer than `seconds`: int16 (S,)."""
        waveform, samples = self.waveform(i), round(self.seconds * SAMPLE_RATE)
        start = rng.integers(max(len(waveform) - samples, 0) + 1)
        return waveform[start:start + samples]

    def targets(self, numbers):
        """Labels of these clips as (n, C) of 0 and 1, float32."""
        dense = np.zeros((len(numbers), len(self.classes)), np.float32)
        for row, i in zip(dense, numbers, strict=True):
            row[list(self.labels[i])] = 1
        return dense

    def clips_by_class(self):
        """For each class, the numbers of the clips that have it: C arrays."""
        clip = np.repeat(np.arange(len(self)), [len(own) for own in self.labels])
        label = np.fromiter((c for own in self.labels for c in own), np.int64, len(clip))
        clip = clip[np.argsort(label, kind="stable")]
        return np.split(clip, np.cumsum(np.bincount(label, minlength=len(self.classes)))[:-1])

    def fraction(self, fraction, seed):
        """A random part of the clips, drawn class by class so that no class is lost.

        A clip with several labels counts for the rarest of them. Smaller fractions of the same
        seed are part of larger ones.
        """
        by_class = self.clips_by_class()
        priority = np.random.default_rng(seed).permutation(len(self))       # of each clip
        none = len(by_class)                                # in place of a class, for clips without labels
        rarest = np.array([min(own, key=lambda c: len(by_class[c]), default=none) for own in self.labels])
        keep = set()
        for c, clips in enumerate([*by_class, np.flatnonzero(rarest == none)]):
            clips = clips[np.argsort(priority[clips])]
            own = clips[rarest[clips] == c]
            keep.update(own[:round(fraction * len(own))])
            if c != none:
                keep.update(clips[:1])
        return self.subset(np.array(sorted(keep)))

    def fingerprint(self):
        """What to compare when numbers differ: clips, a hash of their names and labels, mean and
        standard deviation of the log-mels (before normalisation) of 200 of them."""
        text = "\n".join(f"{name} {';'.join(sorted(self.classes[c] for c in own))}"
                         for name, own in sorted(zip(self.names, self.labels, strict=True)))
        digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]
        some = np.argsort(self.names)[np.linspace(0, len(self) - 1, min(len(self), 200)).astype(int)]
        frontend = LogMel()
        values = torch.cat([frontend(torch.from_numpy(self.waveform(i))[None])[0] for i in some])
        return f"{len(self)} clips {digest} log-mel {values.mean():.3f} +- {values.std():.3f}"


def synth(train=1000, test=500):
    """Synthetic clips, labelled with the classes of the events in them."""
    classes = list(SOUND_CLASSES)
    jobs = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
    made = [synth_clip(i, split) for split, i in
            tqdm(jobs, "synth", unit=" clips", leave=False, disable=None)]
    labels = [tuple({classes.index(event[0]) for event in events}) for _, events in made]
    return LabelledSet([waveform for waveform, _ in made], labels, classes,
                       [f"synth/{split}/{i}" for split, i in jobs], [split for split, _ in jobs], [""] * len(jobs),
                       "mAP")


def read_tables(data, root):
    """A labelled set before its audio: (the clips that are there, their labels as class numbers; how many are
    missing; classes; metric). Raises InputError where no clip is there."""
    reader, metric = READERS[data]
    if root is None:
        place = "table" if data == "csv" else "folder where it lies"
        raise InputError(f"--data {data} needs --root, the {place}")
    named, classes = reader(root)
    classes = classes or sorted({label for clip in named for label in clip.labels})
    number = {name: c for c, name in enumerate(classes)}
    clips = [clip._replace(labels=tuple(number[label] for label in clip.labels)) for clip in named if clip.path]
    if not clips:
        raise InputError(f"{root}: none of the {len(named)} recordings of {data} is there, such as {named[0].name}"
                         if named else f"{root}: its tables name no clips")
    missing, clips = len(named) - len(clips), merge_duplicates(clips, by_content=data in ("folder", "csv"))
    if metric is None:
        metric = "accuracy" if all(len(clip.labels) == 1 for clip in clips) else "mAP"
    return clips, missing, classes, metric


def load_labelled(data, root=None, workers=None, say=print):
    """The labelled set of this name in READERS, from its root or from where `pack --data` put it.

    Says in a line what is there and what is not. Raises InputError for what is missing or damaged.
    """
    if data == "synth":
        result, missing, reasons = synth(), 0, []
    elif root is not None and (Path(root) / "source.txt").exists():
        if not (Path(root) / "labels.json").exists():
            raise InputError(f"{root}: was packed without labels; pack the data set with --data {data}")
        with reading(f"{root}/labels.json", "delete the folder and pack again"):
            content, shards = json.loads((Path(root) / "labels.json").read_text()), Shards(root)
            if content["data"] != data:
                raise InputError(f"{root}: holds packed {content['data']}, not {data}: name it with --data")
            result = LabelledSet(shards, [tuple(own) for own in content["labels"]], content["classes"], shards.names,
                                 content["splits"], content["groups"], content["metric"])
            result.targets(range(len(shards)))          # an error where the lists don't fit
            missing = content["missing"]
            reasons = (Path(root) / "skipped.txt").read_text("utf-8").split("\n")[:-1]
    else:
        clips, missing, classes, metric = read_tables(data, root)
        waveforms, kept, reasons, samples = [], [], [], 0
        for clip, (path, waveform) in zip(clips, decode([clip.path for clip in clips], workers), strict=True):
            if isinstance(waveform, str):
                reasons.append(f"{path}: {waveform}")
                continue
            waveforms.append(np.concatenate(list(read_blocks(path))) if waveform is None else waveform)
            kept.append(clip)
            samples += len(waveforms[-1])
            if samples > IN_MEMORY * 3600 * SAMPLE_RATE:
                raise InputError(f"{root}: more than {IN_MEMORY} hours, too much to decode in each run: "
                                 f"first python datasets.py pack {root} OUT --data {data}, then --root OUT")
        if not kept:
            raise InputError(f"{root}: none of the {len(clips)} recordings can be read: {reasons[0]}, ...")
        result = LabelledSet(waveforms, [clip.labels for clip in kept], classes, [clip.name for clip in kept],
                             [clip.split for clip in kept], [clip.group for clip in kept], metric)
    if missing + len(reasons) > len(result):
        say(f"warning: more than half of {data} is missing or unreadable; is all of it below {root}?")
    say(f"{data}: {len(result)} clips, {len(result.classes)} classes, "
        f"{result.lengths.sum() / SAMPLE_RATE / 3600:.2f} hours; {missing} missing, {len(reasons)} unreadable"
        + f" ({'; '.join(reasons[:3])}{'; ...' * (len(reasons) > 3)})" * bool(reasons))
    return result


def pack_labelled(data, root, out, **options):
    """`pack` for a labelled set: its labels go into `labels.json`. Silent clips stay. As `pack`."""
    clips, missing, classes, metric = read_tables(data, root)
    kept, skipped = pack([clip.path for clip in clips], [clip.name for clip in clips], out, keep_silent=True, **options)
    write_whole(Path(out) / "labels.json", json.dumps(dict(
        data=data, classes=classes, metric=metric, missing=missing,
        labels=[clips[i].labels for i in kept], splits=[clips[i].split for i in kept],
        groups=[clips[i].group for i in kept])))
    return kept, skipped


# ESC-50 by its author. The checksum is of meta/esc50.csv, as GitHub sometimes regenerates the zip.
ESC50_URL = "https://github.com/karolpiczak/ESC-50/archive/refs/heads/master.zip"
ESC50_MD5 = "54a0d0055a10bb7df84ad340a148722e"


def download_esc50(root):
    """Put ESC-50 (600 MB) below `root`, where it isn't yet. Raises InputError where it can't be had."""
    root, part = Path(root), Path(root) / "ESC-50.part"
    if any(part not in table.parents for table in root.rglob("esc50.csv")):
        return
    part.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(ESC50_URL, part / "ESC-50.zip")
        with zipfile.ZipFile(part / "ESC-50.zip") as archive:
            archive.extractall(part)
        md5 = hashlib.md5(FileIndex(part).table("esc50.csv").read_bytes()).hexdigest()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{ESC50_URL}: {error}; run the same command again") from None
    if md5 != ESC50_MD5:
        raise InputError(f"{ESC50_URL}: its table is not the official one (its MD5 is {md5}, not {ESC50_MD5})")
    (part / "ESC-50.zip").unlink()
    part.rename(root / "ESC-50")


# ---------------------------------------------------------------------------------------------- batches


def shuffled(position, count, seed):
    """Where `position` goes in a random order of range(count), without writing the order down.

    A Feistel network, a cipher, permutes the next power of four; what falls outside the range is
    sent through again until it falls inside. So any update of a run knows its clips at once.
    """
    half = (max(count - 1, 1).bit_length() + 1) // 2        # bits in half a position
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for turn in range(4):
            digest = hashlib.blake2b(f"{seed} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        position = (left << half) | right
        if position < count:
            return position


def derive_seed(*numbers):
    """A 63-bit seed from several numbers, unrelated to the seeds of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class ClipStream(torch.utils.data.Dataset):
    """Crop n of an endless stream of shuffled epochs: (int16 waveform, its number in the source).

    With `clips_by_class` the stream is balanced (Sec. 4.1): in every round of C draws each of the C classes comes
    once, and all clips of a class come before one is repeated.
    Clip and crop depend on (seed, n) only, not on which process draws them or what was drawn before.
    """

    def __init__(self, source, seed, clips_by_class=None):
        self.source, self.seed = source, seed
        self.clips_by_class = clips_by_class and [clips for clips in clips_by_class if len(clips)]

    def number(self, n):
        """Which crop of the source comes n-th in the stream."""
        if self.clips_by_class is None:
            epoch, position = divmod(n, len(self.source))
            return shuffled(position, len(self.source), f"{self.seed} {epoch}")
        turn, position = divmod(n, len(self.clips_by_class))
        c = shuffled(position, len(self.clips_by_class), f"{self.seed} classes {turn}")
        epoch, position = divmod(turn, len(self.clips_by_class[c]))
        return int(self.clips_by_class[c][shuffled(position, len(self.clips_by_class[c]), f"{self.seed} {c} {epoch}")])

    def __getitem__(self, n):
        i = self.number(n)
        return self.source.crop(i, np.random.default_rng([self.seed, n])), i


def collate(clips, samples=None):
    """Pad (waveform (S,) int16, number) pairs with zeros: waveform (B, S), lengths (B,), numbers (B,).

    S is `samples`, or the length of the longest.
    """
    lengths = torch.tensor([len(waveform) for waveform, _ in clips])
    waveform = np.zeros((len(clips), samples or int(lengths.max())), np.int16)
    for row, (clip, _) in zip(waveform, clips, strict=True):
        row[:len(clip)] = clip
    return torch.from_numpy(waveform), lengths, torch.tensor([number for _, number in clips])


def batches(source, batch_size, updates, seed, first=0, rank=0, world=1, workers=None, samples=None,
            clips_by_class=None):
    """Batches for updates `first` to `updates`: this process's part of each global batch.

    Update u draws crops u * batch_size and on of the `ClipStream`, whatever the number of processes. Each
    batch is as `collate` gives it, padded to `samples` or to its longest clip. `workers` processes read ahead
    (None: with a GPU one a core, up to 8; without, none, as the training takes the cores).
    """
    local_batch = batch_size // world
    if workers is None:
        workers = min(8, cores()) if torch.cuda.is_available() else 0
    numbers = (range(u * batch_size + rank * local_batch, u * batch_size + (rank + 1) * local_batch)
               for u in range(first, updates))
    return torch.utils.data.DataLoader(
        ClipStream(source, seed, clips_by_class), batch_sampler=numbers, num_workers=workers,
        collate_fn=functools.partial(collate, samples=samples),
        worker_init_fn=init_worker, pin_memory=torch.cuda.is_available())


# ----------------------------------------------------------------------------------------- command line


def main():
    """The command line: `pack` and `synth`."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="decode a folder of recordings into int16 shards")
    command.add_argument("folder", help="recordings, in sub-folders too: " + " ".join(AUDIO))
    command.add_argument("out", help="folder to write; 115 MB an hour. If it was interrupted, it continues there")
    command.add_argument("--data", choices=[name for name in READERS if name != "synth"],
                         help="pack this labelled data set, with its labels, for finetune.py")
    command.add_argument("--shard-hours", type=in_range(float, 1e-3, 100), default=5.0,
                         help="hours in a file (%(default)s)")
    command.add_argument("--workers", type=in_range(int, 1, 1024),
                         help="processes that decode (as many as cores)")
    command.add_argument("--keep-silent", action="store_true", help="pack recordings too that are "
                         "never louder than -60 dB; their latents are all alike, so pre-training learns "
                         "nothing from them (labelled sets keep them anyway)")
    command = commands.add_parser("synth", help="write synthetic clips as .wav and what is in them")
    command.add_argument("out", help="folder to write")
    command.add_argument("--clips", type=in_range(int, 1, 10**6), default=10, help="(%(default)s)")
    args = parser.parse_args()
    if args.command == "synth":
        if Path(args.out).exists():
            raise InputError(f"{args.out}: exists already; name a new folder")
        Path(args.out).mkdir(parents=True)
        rows = []
        for i in tqdm(range(args.clips), "synth", unit=" clips", leave=False, disable=None):
            waveform, events = synth_clip(i)
            soundfile.write(Path(args.out) / f"{i}.wav", waveform, SAMPLE_RATE)
            rows += [(f"{i}.wav", onset, offset, name) for name, onset, offset in events]
        write_events(Path(args.out) / "events.tsv", rows)
        print(f"{args.clips} clips, and when what sounds in them (events.tsv), in {args.out}")
        return
    began, options = time.time(), dict(shard_hours=args.shard_hours, workers=args.workers)
    if args.data:
        kept, skipped = pack_labelled(args.data, args.folder, args.out, **options)
    else:
        files = [path for path in audio_files(args.folder) if path.exists()]        # some may be links to nowhere
        files = sorted({identity(path): path for path in reversed(files)}.values())     # of two names the first
        names = [str(path.relative_to(args.folder)) for path in files]
        kept, skipped = pack(files, names, args.out, keep_silent=args.keep_silent, **options)
    hours, minutes = Shards(args.out).lengths.sum() / SAMPLE_RATE / 3600, (time.time() - began) / 60
    print(f"{len(kept)} recordings, {hours:.2f} hours, in {args.out}; {minutes:.1f} min, "
          f"{hours / minutes:.1f} hours a minute")
    if skipped:
        silent = sum(": silent" in line for line in skipped)
        print(f"{len(skipped)} skipped, {silent} of them silent; listed in {Path(args.out) / 'skipped.txt'}:",
              *skipped[:10], *["..."] * (len(skipped) > 10), sep="\n  ")


if __name__ == "__main__":
    run_script(main)
