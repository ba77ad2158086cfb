"""Sound, in the order it travels: read, packed, synthesised, labelled, and drawn into batches.

    python datasets.py pack FOLDER OUT                  decode recordings once, for fast training
    python datasets.py pack ROOT OUT --data audioset    the same for a labelled data set
    python datasets.py synth OUT                        write some synthetic clips, to listen to

All sound for training is a `ClipSet`: `open_unlabelled` gives two for pre-training, `load_labelled` reads the labelled
sets in their official layout, with one of the READERS. `batches` draws from it. At the end stands what the three
scripts have in common.
"""
import argparse
import collections
import contextlib
import csv
import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import soundfile
import torch
from tqdm import tqdm

from frontend import SAMPLE_RATE, LogMel, resample

# Endings of what libsndfile reads.
AUDIO = (".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mpga", ".aif",
         ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc", ".sph", ".nist", ".avr", ".iff", ".8svx", ".svx", ".ircam")


class InputError(Exception):
    """The program can't go on with what the user gave. The message names it and the remedy, in one line."""


class Clip(NamedTuple):
    """A recording, and what a data set's tables say about it."""
    name: str               # unique in the data set
    labels: tuple           # names, later numbers, of its classes
    split: str              # "train", "valid", "test", or the fold whose test clip it is; "": not split yet
    path: Path | None       # the file; None where it is missing
    group: str = ""         # clips of one group, cut from one recording perhaps, stay on one side of a split
    samples: int = 0        # at 16 kHz, once it is decoded
    note: str = ""          # in what way its decoding was not as expected


# -------------------------------------------------------------------------------------- reading recordings


# What decodes is used as far as it goes; where that is less than a header promises, or more is in the file, a note says
# so. Of a file that is too short libsndfile logs both lengths; sizes near 2 or 4 GiB stand for "unknown".
PROMISED = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)")
UNKNOWN = 2_000_000_000


class Endless:
    """An open file that seems a hundred times as long, but for its last 128 bytes, where MP3s have tags: libsndfile
    guesses the length of an MP3 without a Xing header from its size and its first frame, and reads no further."""

    def __init__(self, file):
        self.file, self.position, self.real_size = file, 0, os.path.getsize(file.name)
        self.size = 100 * self.real_size

    def seek(self, offset, whence=os.SEEK_SET):
        """As of any file."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]

    def tell(self):
        """As of any file."""
        return self.position

    def read(self, count):
        """As of any file."""
        self.file.seek(self.position - (self.size - self.real_size) * (self.position >= self.size - 128))
        content = self.file.read(count)
        self.position += len(content)
        return content


@contextlib.contextmanager
def open_audio(path):
    """A recording: opened with soundfile, the file below that, and how many samples the header promises or None.
    Raises InputError for what is not audio."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is a folder or no regular file")
    with contextlib.ExitStack() as stack:
        try:
            content = stack.enter_context(open(path, "rb"))
            file = stack.enter_context(soundfile.SoundFile(content))
            if file.frames == 0 and file.format in ("WAV", "WAVEX"):        # its recorder never wrote the length
                patched = stack.enter_context(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_COPY))
                patched[4:8] = bytes([8, 0, 0, 0])              # a sign for that which libsndfile knows
                content, file = patched, stack.enter_context(soundfile.SoundFile(patched))
            promised = file.frames if file.frames < 2**40 else None
            for promise, there in PROMISED.findall(file.extra_info):
                if int(promise) < UNKNOWN:
                    promised = file.frames * int(promise) // max(int(there), 1)
            if file.subtype.startswith("MPEG_LAYER") and not tells_length(path):
                content, promised = stack.enter_context(open(path, "rb")), None
                file = stack.enter_context(soundfile.SoundFile(Endless(content)))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except soundfile.LibsndfileError as error:
            raise InputError(f"{path}: not readable as audio ({error.error_string})") from None
        if not 1000 <= file.samplerate <= 768_000:
            raise InputError(f"{path}: a sample rate of {file.samplerate} Hz can't be right")
        if file.format == "W64" and "PCM" in file.subtype and re.search("IEEE float|[au]-?law", file.extra_info):
            raise InputError(f"{path}: libsndfile takes its samples for whole numbers; make a .wav of it by ffmpeg")
        yield file, content, promised


def tells_length(path):
    """Whether an MP3, perhaps with a tag before it or in a WAV, begins with a frame that tells how many follow."""
    with open(path, "rb") as file:
        head = file.read(10)
        file.seek(10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) if head[:3] == b"ID3" else 0)
        start = file.read(4096)
    return any(name in start for name in (b"Xing", b"Info", b"VBRI"))


def decode_blocks(path, seconds, notes):
    """A recording in blocks of so many seconds at its own rate, channels averaged, as far as it decodes: (float32 (S,),
    rate). At the end `notes` gets a remark if the file is not as long as it says. Raises InputError as `open_audio`."""
    with open_audio(path) as (file, content, promised):
        rate, samples, damage = file.samplerate, 0, ""
        if file.subtype.startswith("MPEG_LAYER"):       # soundfile seeks after each read: an MP3's decoder then lacks
            file.seekable = lambda: False               # bits that were kept in the frames before
        while not damage:
            block = np.full((min(round(seconds * rate), file.frames + 1), file.channels), np.nan, np.float32)
            try:
                count = len(file.read(out=block))
            except soundfile.LibsndfileError as error:          # what came before is in the block
                count, damage = int(np.isnan(np.append(block[:, 0], np.nan)).argmax()), error.error_string
            if count == 0:
                break
            samples += count
            yield block[:count].mean(axis=1, dtype=np.float64).astype(np.float32), rate
        if samples == 0:
            raise InputError(f"{path}: no sound in it ({damage or '0 samples'})")
        if promised and promised - samples > max(promised / 100, rate / 10):
            notes.append(f"ends after {samples / rate:.1f} of {promised / rate:.1f} s")
        elif rest := what_is_left(content, os.path.getsize(path), file.format):
            notes.append(f"ends after {samples / rate:.1f} s, {rest}")


def what_is_left(content, size, kind):
    """What an open file of that size holds behind the sound that was read, or lacks: words, or "" if all is well."""
    position = content.tell()
    if kind == "OGG":           # a chain of pages (RFC 3533), each with 27 bytes and the sizes of its segments first
        content.seek(0)
        pages = content.read()
        page = pages[pages.rfind(b"OggS"):]
        sizes = page[27:27 + page[26]] if len(page) > 26 else b""
        if pages.count(b"OggS\0\2") > 1:
            return "its first part: more is in the file"
        whole = sizes and page[5] & 4 and len(page) >= 27 + len(sizes) + sum(sizes)
        return "" if whole else "without an end mark"
    following = content.read(4)
    if size - position < max(size / 10, 10_000) or re.fullmatch(rb"[\w ]{4}", following):
        return ""               # little, or a chunk that is no sound
    return f"{position / size:.0%} of the file: more is in it"


def read_blocks(path, seconds=60, notes=None):
    """A recording of any length and rate in blocks of so many seconds, the last as long as it is: mono float32 (S,) at
    16 kHz, together as if it were resampled at once. Its offset, as heard in the first block, is taken out.

    `notes`, a list, gets a remark where the file is not as long as it says. Raises InputError for what can't be decoded
    and for values that are not finite.
    """
    blocks = decode_blocks(path, seconds, [] if notes is None else notes)
    block, rate = next(blocks)
    before, offset = block[:0], block.mean(dtype=np.float64)
    while block is not None:
        following, _ = next(blocks, (None, None))
        after = block[:0] if following is None else following[:rate]        # a second: further than the filter reaches
        around = np.concatenate([before, block, after]) - offset
        if not np.isfinite(around).all():
            raise InputError(f"{path}: holds values that are not finite")
        waveform = resample(torch.from_numpy(around.astype(np.float32)), rate, SAMPLE_RATE).numpy()
        start = len(before) * SAMPLE_RATE // rate
        yield waveform[start:] if following is None else waveform[start:start + round(seconds * SAMPLE_RATE)]
        before, block = block[-rate:], following


def to_int16(waveform):
    """Waveform to int16, its loudest sample at full scale, as level does not count (see `LogMel`): nothing is clipped
    or lost. Returns the level of that sample too."""
    loudest = float(np.abs(waveform).max())
    return np.round(waveform * (32767 / max(loudest, 1e-6))).astype(np.int16), loudest


def read_int16(path, notes):
    """A whole recording in int16, and the level of its loudest sample. As `read_blocks`."""
    blocks = [to_int16(block) for block in read_blocks(path, notes=notes)]
    loudest = max(level for _, level in blocks)
    return np.concatenate([block if level == loudest else np.round(block * (level / loudest)).astype(np.int16)
                           for block, level in blocks]), loudest


def walk(folder):
    """All files below a folder, sorted; links are followed, each folder once, and those to nowhere named. What begins
    with a dot (.ipynb_checkpoints, ._a.wav) and __MACOSX are left out. Raises InputError where a folder can't be
    listed."""
    def refuse(error):
        raise InputError(f"{error.filename}: can't be listed ({error.strerror})")

    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    seen, files = set(), []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        if identity(parent) in seen:
            folders.clear()
            continue
        seen.add(identity(parent))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    broken = {path for path in files if not os.path.exists(path)}
    say_some(f"{len(broken)} links to nowhere", sorted(map(str, broken)), ", ")
    return sorted(set(files) - broken)


def identity(path):
    """The same for all names and links of a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def audio_files(folder):
    """All recordings below a folder, sorted. Says how many files have other endings. Raises InputError where there are
    no recordings."""
    recordings, others = [], collections.Counter()
    for path in walk(folder):
        if path.suffix.lower() in AUDIO:
            recordings.append(path)
        else:
            others[path.suffix.lower() or "no ending"] += 1
    kinds = ", ".join(f"{ending} {count}" for ending, count in others.most_common(5)) + ", ..." * (len(others) > 5)
    kinds = f"{others.total()} files of other kinds: {kinds} (ffmpeg makes .flac of what is sound)" * bool(others)
    if not recordings:
        raise InputError(f"{folder}: no recordings in it; {kinds or 'it is empty'}")
    if others:
        say(f"{folder}: {kinds}")
    return recordings


class Recordings(torch.utils.data.Dataset):
    """Recordings, decoded when asked for: what `read_int16` gives, and its notes; or (None, 0, the reason)."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, notes = self.files[i], []
        try:
            return *read_int16(path, notes), "; ".join(notes)
        except Exception as error:          # whatever it is, one damaged file must not cost the others
            return None, 0.0, str(error).removeprefix(f"{path}: ") or type(error).__name__


def decode(files, workers=None, done=0):
    """Decode recordings on all cores, with a progress bar: yields what is in `Recordings`, in order. `done` is how many
    were decoded before these."""
    size = sum(os.path.getsize(path) for path in files if os.path.exists(path))
    workers = cores() if workers is None else workers
    workers = min(workers, len(files), size // 2**22)                   # for a few megabytes none is worth its start
    loader = torch.utils.data.DataLoader(Recordings(files), batch_size=None, num_workers=workers, collate_fn=tuple,
                                         worker_init_fn=init_worker)
    yield from progress(loader, "decode", total=done + len(files), initial=done, unit=" files")


def init_worker(_):
    """In a process that reads data: whether Ctrl-C and SIGTERM end it is for its parent to decide; it ends with it."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


# --------------------------------------------------------------------- packing recordings for training

SILENCE = 1e-3      # level of the loudest sample of a recording that counts as silent: -60 dB
COMMIT = 2**26      # bytes (64 MB, half an hour) that a killed packing loses at most


def stamp(path):
    """What changes when a file does; None where it is gone."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]


def pack(clips, out, header=None, workers=None, keep_silent=False):
    """Decode recordings once, into a folder from which training can read any part; returns it as a `Pack`.

    audio.int16 holds the samples of all clips, end to end; index.jsonl a line of JSON with the number of clips and
    what is in `header`, then a line for each clip, with its samples or the reason why it was left out. Where this was
    interrupted, the same call continues. Raises InputError where `out` holds something else or no clip is usable.
    """
    out, files = Path(out), [clip.path for clip in clips]
    expected = [dict(header or {}, clips=len(clips), keep_silent=keep_silent)]
    expected += [dict(name=clip.name, labels=list(clip.labels), split=clip.split, group=clip.group,
                      stamp=stamp(clip.path)) for clip in clips]
    with claim(out):
        names = {path.name for path in out.iterdir() if not path.name.startswith(".")}      # .lock, .DS_Store
        if names - {"audio.int16", "index.jsonl", "index.jsonl.part"}:
            raise InputError(f"{out}: holds other files; name a new folder")
        lines = []
        with reading(out, "delete it and pack again"):
            if (out / "index.jsonl").exists():      # whose last line may be incomplete
                lines = [json.loads(line) for line in (out / "index.jsonl").read_bytes().split(b"\n")[:-1]]
        if not all(a.items() <= b.items() for a, b in zip(expected, lines)):                # noqa: B905
            raise InputError(f"{out}: holds other recordings, or the same before they changed; delete it "
                             "or name another folder")
        lines = lines or expected[:1]
        done, end = len(lines) - 1, 2 * sum(line.get("samples", 0) for line in lines)
        write_whole(out / "index.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        with open(out / "audio.int16", "ab") as audio, open(out / "index.jsonl", "ab") as index:
            if os.path.getsize(audio.name) < end:
                raise InputError(f"{out}: audio.int16 is shorter than index.jsonl says; delete it and pack again")
            audio.truncate(end)
            lines = []
            for n, (waveform, loudest, note) in enumerate(decode(files[done:], workers, done), done + 1):
                if waveform is None and not os.access(files[n - 1], os.R_OK):
                    raise InputError(f"{files[n - 1]}: is gone, or can't be read any more; once it can, the same "
                                     "command continues")
                if waveform is not None and loudest < SILENCE and not keep_silent:
                    waveform, note = None, "silent (--keep-silent packs it all the same)"
                if waveform is None:
                    lines.append(dict(expected[n], skipped=note))
                else:
                    audio.write(waveform.astype("<i2").tobytes())
                    lines.append(dict(expected[n], samples=len(waveform), **({"note": note} if note else {})))
                if audio.tell() > end + COMMIT or n == len(clips):     # samples first, then the lines that count them
                    for file, content in (audio, b""), (index, "".join(json.dumps(x) + "\n" for x in lines).encode()):
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    end, lines = audio.tell(), []
    packed = Pack(out)
    if not packed.clips:
        raise InputError(f"{out}: none of the {len(clips)} files is usable: {packed.skipped[0]}, ...")
    return packed


class Pack:
    """What `pack` wrote into one or more folders, like a list of int16 waveforms, which are read when they are looked
    at: `clips`, with their number of samples; `skipped`, a line for each recording that was left out; `header`, of the
    last folder.

    Raises InputError where a part is missing or damaged.
    """

    def __init__(self, *folders):
        self.folders, self.places, self.clips, self.skipped = folders, [], [], []
        for part, folder in enumerate(map(Path, folders)):
            if (folder / "index.npy").exists():
                raise InputError(f"{folder}: was packed by an earlier version of datasets.py; pack again")
            if not (folder / "index.jsonl").exists():
                raise InputError(f"{folder}: holds no packed audio: `python datasets.py pack` packs a folder of "
                                 "recordings")
            with reading(folder, "delete it and pack again"):
                header, *lines = (folder / "index.jsonl").read_bytes().split(b"\n")
                self.header, end = json.loads(header), 0
                if len(lines) <= self.header["clips"]:
                    raise InputError(f"{folder}: does not hold all of it yet: `python datasets.py pack` continues "
                                     "where it was interrupted")
                for line in map(json.loads, lines[:-1]):
                    if "skipped" in line:
                        self.skipped.append(f"{line['name']}: {line['skipped']}")
                        continue
                    self.clips.append(Clip(line["name"], tuple(line["labels"]), line["split"], None, line["group"],
                                           line["samples"], line.get("note", "")))
                    self.places.append((part, end, end + line["samples"]))
                    end += line["samples"]
                if 2 * end != os.path.getsize(folder / "audio.int16"):
                    raise ValueError("audio.int16 is not as long as index.jsonl says")

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        part, start, end = self.places[i]
        return np.memmap(Path(self.folders[part]) / "audio.int16", "<i2", "r", 2 * start, (end - start,))


def open_unlabelled(data, seconds):
    """Clips for pre-training in crops of `seconds`, and others that are never trained on, to see how well it
    generalises: two of `ClipSet`. data is ["synth"] or a list of packed folders.

    A recording as long as n crops gives ceil(n) of them in an epoch; those shorter than a crop are given whole, those
    under a second not at all: too little to mask and to predict from. Nor are a labelled set's test clips; a set in
    folds, where each clip is tested once, is given whole. Held out is one group (a recording without one is its own) in
    a hundred by a hash of their names, at least 16 (of fewer than 80, a fifth). Raises InputError where there is none.
    """
    if data == ["synth"]:
        return [ClipSet([Clip(f"synth/{split}/{i}", (), split, None, samples=round(seconds * SAMPLE_RATE))
                         for i in range(count)], SynthWaveforms(split, seconds), seconds=seconds)
                for split, count in (("unlabelled", 2000), ("held_out", 100))]
    packed = Pack(*data)
    source = ClipSet([clip._replace(labels=()) for clip in packed.clips], packed, seconds=seconds)
    source.crops = -(-source.lengths // round(seconds * SAMPLE_RATE))
    usable = np.flatnonzero((source.lengths >= SAMPLE_RATE) & (source.splits != "test"))
    if len(usable) == 0:
        raise InputError(f"{', '.join(map(str, data))}: no recording in it is a second long, or all are test clips")
    if len(usable) < len(source):
        say(f"{len(source) - len(usable)} of {len(source)} recordings are left out: shorter than a second, or test "
            "clips")
    hashes = np.array([zlib.crc32(group.encode(errors="backslashreplace")) for group in source.groups[usable]])
    distinct = np.unique(hashes)
    held_out = hashes < distinct[min(max(len(distinct) // 100, 16), len(distinct) // 5)]
    return source.subset(usable[~held_out]), source.subset(usable[held_out])


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
    since, _ = _strokes(rng, t, 2.0 * speed, 0.4)
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
    Returns the int16 waveform (S,) and the events: a list of (onset, offset, class), in seconds.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    n = round(seconds * SAMPLE_RATE)
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
        events.append((onset / SAMPLE_RATE, (onset + length) / SAMPLE_RATE, str(kind)))
    size = -(-n // 4000) * 4000 + 4000
    tail = np.arange(4000) / SAMPLE_RATE
    room = rng.standard_normal(4000) * np.exp(-tail * rng.uniform(15, 60)) * rng.uniform(0, 0.06)
    room[0] = 1
    microphone = np.interp(np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) + 50),
                           np.linspace(5.6, 13, 7), rng.normal(0, 5, 7))        # dB
    response = np.fft.rfft(room, size) * 10 ** (microphone / 20)
    waveform = np.fft.irfft(np.fft.rfft(waveform, size) * response, size)[:n]
    level = 10 ** (rng.uniform(-25, -1) / 20)
    return np.round(waveform / np.abs(waveform).max() * level * 32768).astype(np.int16), events


class SynthWaveforms:
    """Like a list of synthetic waveforms, each made when it is first asked for and then kept: 2,000 of 5 s take 320 MB,
    in each process that reads."""

    def __init__(self, split, seconds):
        self.split, self.seconds, self.made = split, seconds, {}

    def __getitem__(self, i):
        if i not in self.made:
            self.made[i] = synth_clip(i, self.split, self.seconds)[0]
        return self.made[i]


# ---------------------------------------------------------------------------------------- labelled sets


class FileIndex:
    """A data set's root and the files below it. Sets get unpacked, converted and moved in many ways: recordings are
    found by their name, whatever folder they are in and whatever format they have become."""

    def __init__(self, root):
        self.root, self.tried = root, ()        # names under which a recording was not found

    @functools.cached_property
    def files(self):
        """Tables by their names, and recordings by theirs without ending: two dictionaries of paths."""
        tables, recordings = {}, {}
        for path in walk(self.root):
            if path.suffix.lower() in AUDIO:
                recordings.setdefault(path.stem, path)
            else:
                tables.setdefault(path.name, path)
        return tables, recordings

    def table(self, *names):
        """The path of the table that has one of these names. Raises InputError where there is none."""
        for name in names:
            if name in self.files[0]:
                return self.files[0][name]
        raise InputError(f"{self.root}: no {' or '.join(names)} below it; is the data set's root right?")

    def find(self, *names):
        """The path of the recording that has one of these names, without folder and ending, or None."""
        path = next((self.files[1][name] for name in names if name in self.files[1]), None)
        self.tried = self.tried or (() if path else names)
        return path


def read_table(path, columns, delimiter=",", optional=None):
    """Rows of a CSV file with a header line, as dictionaries. With `optional`, columns that may be missing, says which
    others are not used. Raises InputError for a missing file or column."""
    with reading(path, "is it a table, and is --data right?"), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        names = reader.fieldnames or []
        if missing := [name for name in columns if name not in names]:
            raise InputError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names or ['none'])}, "
                             f"separated by {'tabs' if delimiter != ',' else 'commas'}")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}: line {reader.line_num} has too {'many' if None in row else 'few'} columns")
            if any(row.values()):           # spreadsheets leave rows of commas
                rows.append(row)
    if optional is not None and (unused := [name for name in names if name not in (*columns, *optional)]):
        say(f"{path}: not used: {', '.join(unused)}")
    return rows


def audioset(index, parts):
    """AudioSet (Gemmeke et al. 2017). parts: which `<part>_segments.csv` to train on."""
    table = index.table("class_labels_indices.csv")
    classes = {row["mid"]: row["display_name"] for row in read_table(table, ("mid", "display_name"))}
    clips = []
    for part in (*parts, "eval"):
        table = index.table(f"{part}_segments.csv")
        with reading(table), open(table, newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                row = next(csv.reader([line], skipinitialspace=True), [])
                if not row or row[0].startswith("#"):
                    continue
                try:
                    name, start, end, mids = row
                    labels = tuple(classes[mid.strip()] for mid in mids.split(","))
                    start, end = float(start), float(end)
                except (ValueError, KeyError):
                    raise InputError(f"{table}: can't read line {number}: {line.strip()}") from None
                times = [[form.format(at) for at in (start, end)] for form in ("{:.3f}", "{}", "{:.0f}", "{:06.0f}")]
                times.append([f"{1000 * at:.0f}" for at in (start, end)])
                # What is named without times may be the whole video, beside the clip.
                path = index.find(*(f"{prefix}{name}{ending}" for ending in (
                    *(f"_{a}{c}{b}" for a, b in times for c in "_-"), *(f"_{a}" for a, _ in times), "")
                    for prefix in ("", "Y")))
                clips.append(Clip(name, labels, "test" if part == "eval" else "train", path))
    return clips, list(classes.values())


def esc50(index, esc10=False):
    """ESC-50 (Piczak 2015), 50 classes in five folds; or ESC-10, ten of them."""
    table = index.table("esc50.csv")
    rows = read_table(table, ("filename", "fold", "category", "esc10"))
    if odd := {row["fold"] for row in rows} - set("12345"):
        raise InputError(f"{table}: a fold must be 1 to 5, not '{odd.pop()}'")
    return [Clip(row["filename"], (row["category"],), row["fold"], index.find(Path(row["filename"]).stem))
            for row in rows if not esc10 or row["esc10"].strip().lower() == "true"], None


def fsdkaggle2019(index, parts):
    """FSDKaggle2019 (Fonseca et al. 2019) as Zenodo has it; train_curated.csv and train_noisy.csv of
    Kaggle serve too, but the test labels only Zenodo has. parts: "curated", "noisy"."""
    clips = []
    for part in (*(f"train_{part}" for part in parts), "test"):
        for row in read_table(index.table(f"{part}_post_competition.csv", f"{part}.csv"),
                              ("fname", "labels")):
            clips.append(Clip(row["fname"], tuple(row["labels"].split(",")), part.split("_")[0],
                              index.find(Path(row["fname"]).stem)))
    return clips, None


def dcase2019(index):
    """DCASE 2019 task 1a: TAU Urban Acoustic Scenes 2019, development set (Mesaros et al. 2018).

    Minutes of one place are cut into clips, named scene-city-place-clip-device: --validate holds out whole places."""
    clips = []
    for split, table in (("train", "fold1_train.csv"), ("test", "fold1_evaluate.csv")):
        for row in read_table(index.table(table), ("filename", "scene_label"), "\t"):
            name = Path(row["filename"]).stem
            # Test clips have no group: the official split is taken as it is, wherever its places lie.
            place = name.rsplit("-", 2)[0] if split == "train" else ""
            clips.append(Clip(row["filename"], (row["scene_label"],), split, index.find(name), place))
    return clips, None


def magnatagatune(index, top=50):
    """MagnaTagATune (Law et al. 2009): its most frequent tags; folders 0 to b train, c valid, d to f
    test. Clips with none of these tags are left out."""
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


def kinetics700(index):
    """Kinetics-700 (Carreira et al. 2019), its sound only. Its test labels were held out: the
    validation split is what is tested on."""
    clips = []
    for split, tables in (("train", ("train.csv", "kinetics700_train.csv", "kinetics_train.csv")),
                          ("test", ("validate.csv", "val.csv", "kinetics700_val.csv", "kinetics_val.csv"))):
        table = index.table(*tables)
        for row in read_table(table, ("label", "youtube_id", "time_start", "time_end")):
            video, start, end = row["youtube_id"], row["time_start"], row["time_end"]
            try:
                padded = f"{video}_{int(float(start)):06}_{int(float(end)):06}"
            except (ValueError, OverflowError):
                raise InputError(f"{table}: '{start}' and '{end}' are not times") from None
            clips.append(Clip(padded, (row["label"],), split, index.find(padded, f"{video}_{start}_{end}", video)))
    return clips, None


SPLITS_OF_OTHERS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev",
                    "development", "holdout", "fold"}


def folder(index):
    """Your own sounds: a sub-folder a class."""
    root = Path(index.root)
    files = [path.relative_to(root) for path in audio_files(root)]
    clips = [Clip(str(path), (path.parts[0],), "", root / path) for path in files if len(path.parts) > 1]
    classes = {clip.labels[0]: set(re.findall("[a-z]+", clip.labels[0].lower())) for clip in clips}
    if not clips:
        raise InputError(f"{root}: no sub-folders with recordings, one a class, in it")
    exact = [name for name, words in classes.items() if words and words <= SPLITS_OF_OTHERS]
    named = set.union(*classes.values()) & SPLITS_OF_OTHERS                 # train_horn and train_brakes may be classes
    if len(exact) > 1 or all(words & SPLITS_OF_OTHERS for words in classes.values()) and (exact or named != {"train"}):
        raise InputError(f"{root}: its folders {', '.join(sorted(classes)[:3])} look like splits, not classes: name "
                         "the folder above the classes, or write a table with a column split (--data csv)")
    if len(files) > len(clips):
        say(f"{root}: {len(files) - len(clips)} recordings outside of its sub-folders are not used")
    return clips, None


def own_table(index):
    """Your own sounds in a table: columns file (its path from the table's folder), labels (separated by ;) and,
    if you like, split or fold (train, valid, test, or the number of a fold) and group (see `Clip`)."""
    path, clips = Path(index.root), []
    rows = read_table(path, ("file", "labels"), optional=("split", "fold", "group"))
    if any(row.get("split") and row.get("fold") for row in rows):
        say(f"{path}: not used: fold, where there is a split")
    for row in rows:
        recording, labels = path.parent / row["file"], [name.strip() for name in row["labels"].split(";")]
        split = (row.get("split") or row.get("fold") or "").strip().lower()
        split = str(int(split)) if split.isdecimal() else {"val": "valid", "validation": "valid"}.get(split, split)
        clips.append(Clip(row["file"], tuple(filter(None, labels)), split, recording if recording.is_file() else None,
                          (row.get("group") or "").strip()))
    return clips, None


def is_audio(path):
    """Whether a file opens as a recording that is not empty."""
    try:
        with open_audio(path) as (file, _, _):
            return bool(file.frames)
    except InputError:
        return False


def group_copies(clips):
    """Files with the same bytes become a group: what was learned from one is not tested on another. Raises InputError
    where their labels or groups differ."""
    sizes, copies = [os.path.getsize(clip.path) for clip in clips], collections.defaultdict(list)
    clips_of_size = collections.Counter(sizes)
    for n, (clip, size) in enumerate(zip(clips, sizes, strict=True)):
        if clips_of_size[size] > 1 and is_audio(clip.path):     # what can't be read is left out later
            copies[hashlib.sha256(clip.path.read_bytes()).hexdigest()].append(n)
    for digest, numbers in copies.items():
        groups = {clips[n].group for n in numbers} - {""}
        files = {(identity(clips[n].path), *sorted(clips[n].labels)): clips[n].name for n in numbers}
        recordings, labels = {key[0] for key in files}, {key[1:] for key in files}
        if len(groups) > 1 or len(recordings) > 1 and len(labels) > 1:
            raise InputError(f"{', '.join(sorted(set(files.values()))[:3])} are the same content, with different "
                             f"{'groups' if len(groups) > 1 else 'labels'}: keep one of them")
        for n in numbers:
            clips[n] = clips[n]._replace(group=max(groups, default=digest))
    return clips


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


def merge_duplicates(clips):
    """One clip for each recording: rows for the same file are merged, their labels put together. Raises InputError
    where the same file or the same group is in two splits."""
    seen, merged = {}, {}
    for clip in clips:
        file = identity(clip.path)
        for kind, key in (("file", file), ("group or content", clip.group or clip.path)):
            other = seen.setdefault((kind, key), clip)
            if other.split != clip.split:
                raise InputError(f"{other.name} ({other.split}) and {clip.name} ({clip.split}) are the same {kind}, "
                                 "but in different splits: delete one, or put both into one split")
        first = merged.get(file, clip)
        merged[file] = first._replace(labels=tuple(dict.fromkeys(first.labels + clip.labels)))
    return list(merged.values())


# Name: (reader, metric). A reader takes a `FileIndex` and returns all clips that its tables name, a list of Clip, and
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


class ClipSet:
    """Clips, labelled or not.

    clips: N of `Clip`, their labels class numbers; waveforms: like a list of int16 arrays at 16 kHz, such as a `Pack`,
    and `rows`, the place of each clip in it; classes: C names; metric: its name; seconds: of the longest crop. In an
    epoch of training each clip gives so many random crops as `crops` says, one at first.
    """

    def __init__(self, clips, waveforms, classes=(), metric=None, seconds=10.0, rows=None, crops=None):
        self.clips, self.waveforms, self.classes, self.metric, self.seconds = clips, waveforms, classes, metric, seconds
        self.rows = np.arange(len(clips)) if rows is None else rows
        self.crops = np.ones(len(clips), np.int64) if crops is None else crops
        self.names, self.labels = [clip.name for clip in clips], [clip.labels for clip in clips]
        self.splits, self.lengths = np.array([clip.split for clip in clips]), np.array([clip.samples for clip in clips])

    def __len__(self):
        return len(self.clips)

    def subset(self, indices):
        """The same set with these clips only. Waveforms are not copied."""
        return ClipSet([self.clips[i] for i in indices], self.waveforms, self.classes, self.metric, self.seconds,
                       self.rows[indices], self.crops[indices])

    @functools.cached_property
    def groups(self):
        """The group of each clip, which is its name where it has none: (N,)."""
        return np.array([clip.group or clip.name for clip in self.clips])

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
        order = np.random.default_rng(seed).permutation(len(self))          # of the clips, within each class
        none = len(by_class)                                # in place of a class, for clips without labels
        rarest = np.array([min(own, key=lambda c: len(by_class[c]), default=none) for own in self.labels])
        keep = set()
        for c, clips in enumerate([*by_class, np.flatnonzero(rarest == none)]):
            clips = clips[np.argsort(order[clips])]
            own = clips[rarest[clips] == c]
            keep.update(own[:round(fraction * len(own))])
            if c != none:
                keep.update(clips[:1])
        return self.subset(np.array(sorted(keep)))

    def digest(self, in_order=True):
        """A hash of the clips' names, labels and lengths and, as crops depend on it, their order."""
        lines = [f"{x.name} {sorted(self.classes[c] for c in x.labels)} {x.samples}" for x in self.clips]
        lines = lines if in_order else sorted(lines)
        return hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).hexdigest()

    def fingerprint(self):
        """What to compare when numbers differ: clips, a hash of their names, labels and lengths, mean and standard
        deviation of the log-mels (before normalisation) of 200 of them."""
        some = np.argsort(self.names)[np.linspace(0, len(self) - 1, min(len(self), 200)).astype(int)]
        frontend = LogMel()
        values = torch.cat([frontend(torch.from_numpy(np.array(self.waveform(i)))[None])[0] for i in some])
        return f"{len(self)} clips {self.digest(in_order=False)[:8]} log-mel {values.mean():.3f} +- {values.std():.3f}"


def synth(train=1000, test=500):
    """Synthetic clips, labelled with the classes of the events in them: a list of `Clip`, and their waveforms."""
    classes, clips, waveforms = list(SOUND_CLASSES), [], []
    for split, i in progress([("train", i) for i in range(train)] + [("test", i) for i in range(test)], "synth",
                             unit=" clips"):
        waveform, events = synth_clip(i, split)
        labels = tuple({classes.index(kind) for _, _, kind in events})
        clips.append(Clip(f"synth/{split}/{i}", labels, split, None, samples=len(waveform)))
        waveforms.append(waveform)
    return clips, waveforms


def read_tables(data, root):
    """A labelled set before its audio: (the clips that are there, their labels as class numbers; a dictionary of data,
    classes, metric, and how many clips are missing). Raises InputError where no clip is there."""
    reader, metric = READERS[data]
    if root is None:
        place = "table" if data == "csv" else "folder where it lies"
        raise InputError(f"--data {data} needs --root, the {place}")
    index = FileIndex(root)
    named, classes = reader(index)
    splits = {clip.split for clip in named}
    if not (splits <= {""} or splits <= {"train", "valid", "test"} or all(split.isdecimal() for split in splits)):
        raise InputError(f"{root}: split must be train, valid or test, or the number of a fold, of all clips, "
                         f"not {', '.join(sorted(splits))}")
    classes = classes or sorted({label for clip in named for label in clip.labels})
    number = {name: c for c, name in enumerate(classes)}
    clips = [clip._replace(labels=tuple(number[label] for label in clip.labels)) for clip in named
             if clip.path]
    if not clips:
        raise InputError(f"{root}: none of the {len(named)} recordings of {data} is there, such as {named[0].name}"
                         + f" (looked for {', '.join(index.tried[:4])} and the like, with any ending of audio; "
                         "ffmpeg makes .flac of videos and .m4a)" * bool(index.tried)
                         if named else f"{root}: its tables name no clips")
    if not classes:
        raise InputError(f"{root}: its clips have no labels")
    there = {clip.name for clip in clips}
    say_some("missing", [clip.name for clip in named if clip.name not in there], ", ")
    missing = len(named) - len(clips)
    if data in ("folder", "csv"):
        clips = group_copies(clips)
        if not any(clip.split for clip in clips):
            clips = split_train_test(clips)
    clips = merge_duplicates(clips)
    if metric is None:
        metric = "accuracy" if all(len(clip.labels) == 1 for clip in clips) else "mAP"
    return clips, dict(data=data, classes=classes, metric=metric, missing=missing)


def load_labelled(data, root=None, workers=None):
    """The labelled set of this name in READERS, from its root or from where `pack --data` put it.

    Says what is there and what is not. Raises InputError for what is missing or damaged.
    """
    skipped = []
    if data == "synth":
        (clips, waveforms), header = synth(), dict(classes=list(SOUND_CLASSES), metric="mAP", missing=0)
    elif root is not None and any(
            (Path(root) / name).exists() for name in ("audio.int16", "index.npy")):
        waveforms = Pack(root)
        clips, header, skipped = waveforms.clips, waveforms.header, waveforms.skipped
        if header.get("data") != data:
            raise InputError(f"{root}: holds packed {header.get('data', 'audio without labels')}, not {data}: name it "
                             f"with --data, or pack the data set with --data {data}")
        with reading(root, "delete it and pack again"):
            assert {c for clip in clips for c in clip.labels} <= set(range(len(header["classes"]))), "no such class"
    else:
        named, header = read_tables(data, root)
        clips, waveforms, samples = [], [], 0
        for clip, (waveform, _, note) in zip(named, decode([clip.path for clip in named], workers), strict=True):
            if waveform is None:
                skipped.append(f"{clip.name}: {note}")
                continue
            waveforms.append(waveform)
            clips.append(clip._replace(samples=len(waveform), note=note))
            samples += len(waveform)
            if samples > IN_MEMORY * 3600 * SAMPLE_RATE:
                raise InputError(f"{root}: more than {IN_MEMORY} hours, too much to decode in each run: "
                                 f"first python datasets.py pack {root} OUT --data {data}, then --root OUT")
        if not clips:
            raise InputError(f"{root}: none of the {len(named)} recordings can be read: {skipped[0]}, ...")
    result = ClipSet(clips, waveforms, header["classes"], header["metric"])
    hours = result.lengths.sum() / SAMPLE_RATE / 3600
    say(f"{data}: {len(result)} clips, {hours:.2f} hours; {header['missing']} missing, {len(skipped)} unreadable; "
        f"scored by {result.metric}")
    say_some(f"{len(result.classes)} classes", [f"{name} {len(own)}" for name, own in
                                                zip(result.classes, result.clips_by_class(), strict=True)], ", ")
    say_some("unreadable", skipped)
    say_some("not as long as they say", [f"{clip.name}: {clip.note}" for clip in clips if clip.note])
    if header["missing"] + len(skipped) > len(clips):
        say(f"warning: more than half of {data} is missing or unreadable; is all of it below {root}?")
    return result


# ---------------------------------------------------------------------------------------------- batches


def shuffled(count, *seed):
    """A random order of range(count), the same for the same seed."""
    return np.random.default_rng(seed).permutation(count)


# Kept for the draws that follow: two orders of all crops, of up to 200 MB each, and many of a class's clips.
epoch_order, class_order = functools.lru_cache(2)(shuffled), functools.lru_cache(1024)(shuffled)


def derive_seed(*numbers):
    """A 63-bit seed from several numbers, unrelated to the seeds of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class ClipStream(torch.utils.data.Dataset):
    """Crop n of an endless stream of shuffled epochs: (int16 waveform, the number of its clip).

    With `clips_by_class` the stream is balanced (Sec. 4.1): in every round of C draws each of the C classes comes
    once, and all clips of a class come before one is repeated.
    Clip and crop depend on (seed, n) only, not on which process draws them or what was drawn before.
    """

    def __init__(self, source, seed, clips_by_class=None):
        self.source, self.seed, self.ends = source, seed, np.cumsum(source.crops)
        self.clips_by_class = clips_by_class and [clips for clips in clips_by_class if len(clips)]

    def number(self, n):
        """Which clip comes n-th in the stream."""
        if self.clips_by_class is None:
            epoch, position = divmod(n, int(self.ends[-1]))
            return int(np.searchsorted(self.ends, epoch_order(int(self.ends[-1]), self.seed, epoch)[position], "right"))
        turn, position = divmod(n, len(self.clips_by_class))
        c = class_order(len(self.clips_by_class), self.seed, turn)[position]
        epoch, position = divmod(turn, len(self.clips_by_class[c]))
        return int(self.clips_by_class[c][class_order(len(self.clips_by_class[c]), self.seed, c, epoch)[position]])

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
    """Batches for updates `first` to `updates`: the part of process `rank`, of `world`, of each global batch.

    Update u draws crops u * batch_size and on of the `ClipStream`, whatever the number of processes. Each
    batch is as `collate` gives it, padded to `samples` or to its longest clip. `workers` processes read ahead
    (None: with a GPU one a core, up to 8; without, none, as the training takes the cores).
    """
    local_batch = batch_size // world
    if workers is None:
        workers = min(8, cores()) if torch.cuda.is_available() else 0
    starts = range(first * batch_size + rank * local_batch, updates * batch_size, batch_size)
    return torch.utils.data.DataLoader(
        ClipStream(source, seed, clips_by_class), batch_sampler=(range(n, n + local_batch) for n in starts),
        num_workers=workers, collate_fn=functools.partial(collate, samples=samples), worker_init_fn=init_worker,
        pin_memory=torch.cuda.is_available())


# ------------------------------------------------------------------- what the three scripts have in common


def rank():
    """The number of this process among those that torchrun started; 0 writes files and prints."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def say_some(title, texts, separator="; ", most=10):
    """Print texts in a line: all, or the first and last few. Nothing where there are none."""
    if texts:
        shown = texts if len(texts) <= most else [*texts[:most // 2], "...", *texts[-(most // 2):]]
        say(f"{title}: {separator.join(shown)}")


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


def file_path(text):
    """An argparse type: a path, in which ~ is the home folder."""
    return os.path.expanduser(text)


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


# A bar for what comes before or between updates: gone at its end, and not there where stderr is no terminal.
progress = functools.partial(tqdm, leave=False, disable=None)


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


def find_device(name=None):
    """The device of this name, or the best there is; of several GPUs, the one of this process. Raises InputError where
    there is none, or not for so many processes."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available() and world_size() == 1
    name = name or ("cuda" if cuda else "mps" if mps else "cpu")
    if not {"cuda": cuda, "mps": mps, "cpu": True}[name]:
        raise InputError(f"--device {name}: this torch has none" + ", or not for several processes" * (world_size() > 1)
                         + "; leave --device out")
    number = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    if number and number >= torch.cuda.device_count():
        raise InputError(f"there are only {torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node")
    return torch.device(name, number)


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


@contextlib.contextmanager
def claim(folder):
    """Make a folder and lock it for writing, within a `with`. Raises InputError where another process has it."""
    if Path(folder).is_file():
        raise InputError(f"{folder}: is a file; name a folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is writing there; wait for it, or name another folder") from None


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


# ----------------------------------------------------------------------------------------- command line


def main():
    """The command line: `pack` and `synth`."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="decode a folder of recordings into one file")
    command.add_argument("folder", type=file_path, help="recordings, in sub-folders too, or the root of a labelled set")
    command.add_argument("out", type=file_path, help="folder to write, 115 MB an hour; continues what was interrupted")
    command.add_argument("--data", choices=[name for name in READERS if name != "synth"],
                         help="pack this labelled data set, with its labels, for finetune.py")
    command.add_argument("--workers", type=in_range(int, 1, 1024), help="processes that decode (as many as cores)")
    command.add_argument("--keep-silent", action="store_true", help="pack recordings too that are never louder than "
                         "-60 dB, from which pre-training learns nothing (those of labelled sets always are)")
    command = commands.add_parser("synth", help="write synthetic clips as .wav and what is in them")
    command.add_argument("out", type=file_path, help="folder to write")
    command.add_argument("--clips", type=in_range(int, 1, 10**6), default=10, help="(%(default)s)")
    args = parser.parse_args()
    if args.command == "synth":
        if Path(args.out).exists():
            raise InputError(f"{args.out}: exists already; name a new folder")
        Path(args.out).mkdir(parents=True)
        rows = []
        for i in progress(range(args.clips), "synth", unit=" clips"):
            waveform, events = synth_clip(i)
            soundfile.write(Path(args.out) / f"{i}.wav", waveform, SAMPLE_RATE)
            rows += [(f"{i}.wav", *event) for event in events]
        write_events(Path(args.out) / "events.tsv", rows)
        print(f"{args.clips} clips, and when what sounds in them (events.tsv), in {args.out}")
        return
    began = time.time()
    if args.data:
        clips, header = read_tables(args.data, args.folder)
    else:
        files = {identity(path): path for path in reversed(audio_files(args.folder))}       # of two names the first
        files = sorted(files.values())
        clips, header = [Clip(str(path.relative_to(args.folder)), (), "", path) for path in files], {}
    packed = pack(clips, args.out, header, args.workers, args.keep_silent or bool(args.data))
    hours, minutes = sum(clip.samples for clip in packed.clips) / SAMPLE_RATE / 3600, (time.time() - began) / 60
    print(f"{len(packed)} recordings, {hours:.2f} hours, in {args.out}; {minutes:.1f} min")
    silent = sum(": silent" in line for line in packed.skipped)
    say_some(f"{len(packed.skipped)} skipped, {silent} of them silent", packed.skipped, "\n  ")
    say_some("not as long as they say", [f"{x.name}: {x.note}" for x in packed.clips if x.note], "\n  ")


if __name__ == "__main__":
    run_script(main)
