"""Sound, from files and from formulas.

Three sources of unlabelled clips for pre-training, each with `len` (clips in an epoch) and
`clip(i, rng)` (an int16 waveform at 16 kHz): `Synth`, `Packed`, `Folder`; `open_source` picks one.
Labelled sets for fine-tuning are `Labelled`: `synth`, `esc50`, `esc10`. `batches` serves either.

    python datasets.py pack FOLDER OUT      decode a folder of recordings once, for fast training
    python datasets.py synth OUT            write some synthetic clips as .wav, to listen to
"""
import argparse
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from frontend import SAMPLE_RATE, resample

AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")


class InputError(Exception):
    """A run can't go on with what the user gave. The message names it and the remedy, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help explains\n")


def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:            # so written, NaN is refused too
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not {text}")
        return value
    return parse


# ------------------------------------------------------------------------------ reading recordings


# What libsndfile notes in its log about a file that ends early: by format, the size that the header
# promises, or Ogg's missing last page. A size of 2 or 4 GiB stands for "unknown" in streamed files.
PROMISED = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be")
NO_END = "lacks an end-of-stream bit"


def open_audio(path):
    """A recording, opened with soundfile. Raises InputError for what is missing or no audio."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: not readable as audio ({error.error_string})") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not valid UTF-8; rename it") from None
    if file.frames == 0:
        raise InputError(f"{path}: no sound in it (0 samples)")
    if not 1000 <= file.samplerate <= 768_000:
        raise InputError(f"{path}: a sample rate of {file.samplerate} Hz can't be right")
    return file


def read_audio(path, start=0.0, seconds=None):
    """Decode a recording, or `seconds` of it from `start` on: mono float32 (S,) at 16 kHz.

    Channels are averaged. Raises InputError for what is missing, no audio, empty, cut off (as far
    as the format tells) or not finite.
    """
    with open_audio(path) as file:
        rate, endless = file.samplerate, file.frames > 2**40    # a streamed FLAC: length unknown
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
        promised = [int(size) for size in PROMISED.findall(file.extra_info)]
        if (left > 0 and not endless or NO_END in file.extra_info
                or any(size < 2**31 - 1 for size in promised)):
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


def audio_files(folder):
    """All recordings below a folder, sorted, as paths. Raises InputError where there are none."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    files = sorted(path for path in Path(folder).rglob("*")
                   if path.suffix.lower() in AUDIO and not path.is_dir())
    if not files:
        raise InputError(f"{folder}: no recordings in it ({' '.join(AUDIO)})")
    return files


# ------------------------------------------------------------------- packing recordings for training

INDEX = np.dtype([("shard", np.int32), ("start", np.int64), ("length", np.int64)])   # in samples


def _decode(path):
    """Worker of `pack`: int16 waveform, or the reason why there is none."""
    try:
        waveform = to_int16(read_audio(path))
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    except Exception as error:          # one damaged file must not cost the others
        return f"not readable ({type(error).__name__}: {error})"
    return waveform if waveform.any() else "digital silence"


def pack(folder, out, shard_hours=5.0, workers=None):
    """Decode all recordings below `folder` into int16 shards that training can map into memory.

    Writes in `out`: `shard_00000.int16` and on, plain samples end to end; `index.npy`, where in
    which shard each recording lies; `names.txt`, a line each; `skipped.txt`, each file left out and
    why. The index comes last, so that a folder with an index is whole. Returns (kept, skipped).
    """
    out = Path(out)
    if (out / "index.npy").exists():
        raise InputError(f"{out}: holds packed audio already; delete it or name another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder")
    files = audio_files(folder)
    out.mkdir(parents=True, exist_ok=True)
    limit = int(shard_hours * 3600 * SAMPLE_RATE)
    index, names, skipped = [], [], []
    shard, position, file = 0, 0, None
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        decoded = pool.map(_decode, files, chunksize=4)
        for path, waveform in zip(files, tqdm(decoded, "pack", len(files), unit=" files")):
            name = str(path.relative_to(folder)).replace("\n", "\\n").replace("\r", "\\r")
            if isinstance(waveform, str):
                skipped.append(f"{name}: {waveform}")
                continue
            if file is None or position >= limit:
                if file is not None:
                    file.close()
                    shard += 1
                file, position = open(out / f"shard_{shard:05}.int16", "wb"), 0
            file.write(waveform.astype("<i2").tobytes())
            index.append((shard, position, len(waveform)))
            names.append(name)
            position += len(waveform)
    if not index:
        raise InputError(f"{folder}: none of the {len(files)} files is usable: {skipped[0]}, ...")
    file.close()
    for name, lines in (("names.txt", names), ("skipped.txt", skipped)):
        (out / name).write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
    np.save(out / "index.part.npy", np.array(index, INDEX))
    os.replace(out / "index.part.npy", out / "index.npy")
    return len(index), skipped


@functools.lru_cache(maxsize=None)
def _memory_map(path):
    """A shard's samples, mapped into memory once a process."""
    return np.memmap(path, "<i2", "r")


class Packed:
    """Random crops of `seconds` from what `pack` wrote, one of each recording in an epoch.

    Shorter recordings are given whole, those under a second not at all: too little in it to mask
    and to guess from.
    """

    def __init__(self, folder, seconds):
        self.folder, self.samples = Path(folder), round(seconds * SAMPLE_RATE)
        try:
            index = np.load(self.folder / "index.npy")
            ends = index["start"] + index["length"]
            whole = index["start"].min() >= 0 and all(
                2 * ends[index["shard"] == shard].max() <= os.path.getsize(self.shard(shard))
                for shard in np.unique(index["shard"]))
        except (ValueError, IndexError, EOFError, OSError):
            whole = False
        if not whole:
            raise InputError(f"{folder}: its packed audio is damaged; delete it and pack again")
        self.index = index[index["length"] >= SAMPLE_RATE]
        if len(self.index) == 0:
            raise InputError(f"{folder}: no recording in it is a second long")

    def __len__(self):
        return len(self.index)

    def clip(self, i, rng):
        shard, start, length = self.index[i]
        start += rng.integers(max(length - self.samples, 0) + 1)
        waveform = _memory_map(self.shard(shard))
        return np.array(waveform[start:start + min(length, self.samples)])

    def shard(self, number):
        return self.folder / f"shard_{number:05}.int16"


class Folder:
    """The same from the recordings below a folder, decoded each time anew."""

    def __init__(self, folder, seconds):
        self.seconds, self.recordings = seconds, []
        for path in tqdm(audio_files(folder), "look through", unit=" files", leave=False):
            try:
                with open_audio(path) as file:
                    duration = file.frames / file.samplerate
                    if file.frames > 2**40:
                        raise InputError(f"{path}: does not say how long it is")
            except InputError as error:
                raise InputError(f"{error}; `python datasets.py pack` leaves such files out") from None
            if duration >= 1:
                self.recordings.append((path, duration))
        if not self.recordings:
            raise InputError(f"{folder}: no recording in it is a second long")

    def __len__(self):
        return len(self.recordings)

    def clip(self, i, rng):
        path, duration = self.recordings[i]
        start = rng.uniform(0, max(duration - self.seconds, 0))
        return to_int16(read_audio(path, start, self.seconds))[:round(self.seconds * SAMPLE_RATE)]


# ---------------------------------------------------------------------- synth: sounds from formulas


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
    since, which = _strokes(rng, t, 0.8 * speed, 0.3)
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
    group, which = _strokes(rng, t, 2.2 * speed, 0.1)
    pulse = np.clip(np.sin(2 * np.pi * 28 * speed * group), 0, 1)
    return _tone(np.full(len(t), 4300 * pitch)) * pulse * (group * 2.2 * speed < 0.6)


def _wind(rng, t, pitch, speed):
    gust = np.interp(t * speed, np.arange(0, 20, 0.4), rng.uniform(0.1, 1, 50))
    low, high = _noise(rng, len(t), 60, 500 * pitch), _noise(rng, len(t), 300, 1200 * pitch)
    return low * gust + 0.3 * high * gust ** 2


# In the order of how often they occur.
KINDS = dict(footsteps=_footsteps, wind=_wind, bird=_bird, engine=_engine, dog=_dog, rain=_rain,
             bell=_bell, alarm=_alarm, cricket=_cricket, siren=_siren)
SPLITS = ("unlabelled", "train", "test")


def synth_clip(index, split="unlabelled", seconds=5.0):
    """One synthetic clip, the same for the same (index, split), made without any file.

    One to three events of different kinds, the later in KINDS the rarer, at random pitch, speed,
    loudness and onset, over a background of noise, in a random room, through a random microphone.
    Returns the int16 waveform (S,) and the events: a list of (kind, onset, offset) in seconds.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    n = int(seconds * SAMPLE_RATE)
    waveform, events = _noise(rng, n, slope=rng.uniform(-2, 0)), []
    weights = 1 / np.arange(2, len(KINDS) + 2)
    for kind in rng.choice(list(KINDS), rng.integers(1, 4), replace=False, p=weights / weights.sum()):
        length = int(rng.uniform(0.12, 0.5) * n)
        onset = int(rng.integers(n - length))
        t = np.arange(length) / SAMPLE_RATE
        sound = KINDS[kind](rng, t, 2 ** rng.uniform(-0.7, 0.7), 2 ** rng.uniform(-0.6, 0.6))
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
    """Synthetic clips without labels; an epoch has 2,000, each made once and then kept: 320 MB at
    5 s, in each process that reads."""

    def __init__(self, seconds):
        self.seconds, self.made = seconds, {}

    def __len__(self):
        return 2000

    def clip(self, i, rng):
        if i not in self.made:
            self.made[i] = synth_clip(i, "unlabelled", self.seconds)[0]
        return self.made[i]


def open_source(data, seconds):
    """Unlabelled clips of `seconds` for pre-training: "synth", a packed folder, or a folder."""
    if data == "synth":
        return Synth(seconds)
    return (Packed if (Path(data) / "index.npy").exists() else Folder)(data, seconds)


# ------------------------------------------------------------------------------------ labelled sets


class Labelled:
    """Clips in memory with their labels.

    waveforms: N int16 arrays at 16 kHz; labels (N, C) of 0 and 1; classes: C names; names: N
    names; folds (N,): clips of fold k are the test set of fold k and not trained on then (0:
    always trained on); metric: "mAP" (several labels a clip) or "accuracy" (one).
    """

    def __init__(self, waveforms, labels, classes, names, folds, metric):
        self.waveforms, self.classes, self.names, self.metric = waveforms, classes, names, metric
        self.labels, self.folds = np.asarray(labels, np.float32), np.asarray(folds)
        self.seconds = 10.0         # of the longest crop that `clip` gives

    def __len__(self):
        return len(self.waveforms)

    def subset(self, indices):
        """The same set with these clips only."""
        return Labelled([self.waveforms[i] for i in indices], self.labels[indices], self.classes,
                        [self.names[i] for i in indices], self.folds[indices], self.metric)

    def clip(self, i, rng):
        """Waveform i for training: a random crop of what is longer than `seconds`."""
        waveform, samples = self.waveforms[i], round(self.seconds * SAMPLE_RATE)
        start = rng.integers(max(len(waveform) - samples, 0) + 1)
        return waveform[start:start + samples]

    def fraction(self, fraction, seed):
        """A random part of the clips, drawn class by class so that no class is lost.

        A clip with several labels counts for the rarest of them. Smaller fractions of the same
        seed are part of larger ones.
        """
        totals = self.labels.sum(0)
        rarest = np.where(self.labels > 0, totals, np.inf).argmin(1)
        order, keep = np.random.default_rng(seed).permutation(len(self)), set()
        for c in range(len(self.classes)):
            members = order[rarest[order] == c]
            keep.update(members[:round(fraction * len(members))])
            keep.update(order[self.labels[order, c] > 0][:1])
        return self.subset(np.array(sorted(keep)))


def synth(root=None, train=1000, test=500):
    """Synthetic clips with the kinds of event in them as labels: fold 1 is the test set."""
    waveforms, labels, names = [], [], []
    kinds = list(KINDS)
    jobs = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
    for split, i in tqdm(jobs, "synth", unit=" clips", leave=False):
        waveform, events = synth_clip(i, split)
        waveforms.append(waveform)
        labels.append([kind in {event[0] for event in events} for kind in kinds])
        names.append(f"synth/{split}/{i}")
    return Labelled(waveforms, labels, kinds, names, [0] * train + [1] * test, "mAP")


def read_table(path, columns, delimiter=","):
    """Rows of a CSV file with a header line, as dictionaries. Raises InputError for a missing file
    or column."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; is the data set's root right?")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
            raise InputError(f"{path}: no column {', '.join(missing)}; "
                             f"it has {', '.join(reader.fieldnames or ['none'])}")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        if any(row[column] is None for column in columns):
            raise InputError(f"{path}: line {number} is short of columns")
    return rows


def esc50(root, esc10=False):
    """ESC-50 (Piczak 2015) in its official layout, 2,000 clips of 50 classes in five folds;
    or ESC-10, its 400 clips of ten classes."""
    table = Path(root) / "meta" / "esc50.csv"
    rows = read_table(table, ("filename", "fold", "category", "esc10"))
    rows = [row for row in rows if row["esc10"].strip().lower() == "true" or not esc10]
    if not rows:
        raise InputError(f"{table}: no {'ESC-10 ' * esc10}clips listed in it")
    if odd := {row["fold"] for row in rows} - set("12345"):
        raise InputError(f"{table}: a fold must be 1 to 5, not '{odd.pop()}'")
    waveforms = [to_int16(read_audio(Path(root) / "audio" / row["filename"]))
                 for row in tqdm(rows, "decode", unit=" clips", leave=False)]
    classes = sorted({row["category"] for row in rows})
    labels = [[row["category"] == name for name in classes] for row in rows]
    return Labelled(waveforms, labels, classes, [row["filename"] for row in rows],
                    [int(row["fold"]) for row in rows], "accuracy")


LABELLED = {"synth": synth, "esc50": esc50, "esc10": functools.partial(esc50, esc10=True)}


# ------------------------------------------------------------------------------------------ batches


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


class Drawn(torch.utils.data.Dataset):
    """Clip n of an endless stream of shuffled epochs: (int16 waveform, its number in the source).

    Crop and all depend on (seed, n) only, not on who draws it or what was drawn before.
    """

    def __init__(self, source, seed):
        self.source, self.seed = source, seed

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.source))
        i = shuffled(position, len(self.source), f"{self.seed} {epoch}")
        return self.source.clip(i, np.random.default_rng([self.seed, n])), i


def collate(clips, samples=None):
    """Pad (waveform, number) pairs with zeros: waveform (B, S) int16, lengths (B,), numbers (B,).

    S is `samples`, or the length of the longest.
    """
    lengths = torch.tensor([len(waveform) for waveform, _ in clips])
    waveform = torch.zeros(len(clips), samples or int(lengths.max()), dtype=torch.int16)
    for row, (clip, _) in zip(waveform, clips):
        row[:len(clip)] = torch.from_numpy(clip)
    return waveform, lengths, torch.tensor([number for _, number in clips])


def batches(source, batch_size, updates, seed, first=0, rank=0, world=1, workers=0, samples=None):
    """Batches for updates `first` to `updates`: this process's share of each global batch.

    Update u draws clips u * batch_size and on of the stream `Drawn`, whatever the number of
    processes. Each batch is as `collate` gives it, padded to `samples` or to its longest clip.
    """
    share = batch_size // world
    numbers = [range(u * batch_size + rank * share, u * batch_size + (rank + 1) * share)
               for u in range(first, updates)]
    return torch.utils.data.DataLoader(
        Drawn(source, seed), batch_sampler=numbers, num_workers=workers,
        collate_fn=functools.partial(collate, samples=samples),
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="decode a folder of recordings into int16 shards")
    command.add_argument("folder", help="recordings, in sub-folders too (links to folders are "
                         "not followed): " + " ".join(AUDIO))
    command.add_argument("out", help="folder to write; 115 MB an hour")
    command.add_argument("--shard-hours", type=in_range(float, 1e-3, 100), default=5.0,
                         help="hours in a file (%(default)s)")
    command.add_argument("--workers", type=in_range(int, 1, 1024),
                         help="processes that decode (as many as cores)")
    command = commands.add_parser("synth", help="write synthetic clips as .wav and what is in them")
    command.add_argument("out", help="folder to write")
    command.add_argument("--clips", type=in_range(int, 1, 10**6), default=10, help="(%(default)s)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")       # file names hold anything
    try:
        if args.command == "pack":
            kept, skipped = pack(args.folder, args.out, args.shard_hours, args.workers)
            seconds = np.load(Path(args.out) / "index.npy")["length"].sum() / SAMPLE_RATE
            print(f"{kept} recordings, {seconds / 3600:.2f} hours, in {args.out}")
            if skipped:
                print(f"{len(skipped)} skipped, listed in {Path(args.out) / 'skipped.txt'}:",
                      *skipped[:10], *["..."] * (len(skipped) > 10), sep="\n  ")
        else:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            for i in range(args.clips):
                waveform, events = synth_clip(i)
                soundfile.write(Path(args.out) / f"{i}.wav", waveform, SAMPLE_RATE)
                print(f"{i}.wav", json.dumps(events))
    except (InputError, OSError) as error:
        parser.exit(2, f"datasets.py: {error}\n")


if __name__ == "__main__":
    main()
