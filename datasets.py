"""Sound, in the order it travels: read, packed, labelled or synthesised, and drawn into batches.

    python datasets.py pack FOLDER OUT                  decode recordings once, for fast training
    python datasets.py pack ROOT OUT --data audioset    the same for a labelled data set
    python datasets.py synth OUT                        write some synthetic clips, to listen to

All sound for training is a `ClipSet`: `open_unlabelled` gives two for pre-training, `load_labelled` one with labels, by
one of the READERS. `batches` draws from it. At the end stands what the three scripts have in common.
"""
import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from frontend import SAMPLE_RATE, LogMel, resample


class InputError(Exception):
    """The program can't go on with what the user gave. The message names it and the remedy, in one line."""


# ------------------------------------------------------------------------------- what a clip and a clip set are


class Clip(NamedTuple):
    """A recording, and what a data set's tables say about it."""
    name: str
    labels: tuple = ()                  # names of its classes
    split: str = ""                     # "train", "valid", "test", or the fold whose test clip it is
    group: str = ""                     # clips of one group, cut from one recording perhaps, stay in one split
    path: Path | None = None            # the recording, until it is decoded; None where it is missing
    # Once it is decoded:
    samples: int = 0                    # its length at 16 kHz
    note: str = ""                      # in what way its decoding was not as expected
    audio: object = None                # its samples, int16 (S,), a function that makes them, or a pack's file
    first: int = 0                      # the sample of that file with which it begins

    @property
    def unit(self):
        """What is never split: its group; a clip without one is a group by itself."""
        return self.group or self.name

    def read(self, start, row):
        """Fill `row`, int16, with its samples from `start` on. Raises InputError where they can't be read."""
        if isinstance(self.audio, str):
            with reading(f"{self.audio}, {self.name}", "pack it again"), open(self.audio, "rb", buffering=0) as file:
                file.seek(2 * (self.first + start))
                if file.readinto(row) < row.nbytes:             # a single read, straight into the row
                    raise EOFError("not all of it is there")
        else:
            waveform = self.audio() if callable(self.audio) else self.audio
            row[:] = waveform[start:start + len(row)]


class ClipSet:
    """Clips, labelled or not.

    clips: N of `Clip`, decoded; classes: C names; metric: what scores them; seconds: of the longest crop, for training.
    """

    def __init__(self, clips, classes=(), metric=None, seconds=None):
        self.clips, self.classes, self.metric, self.seconds = clips, classes, metric, seconds
        self.samples = np.array([clip.samples for clip in clips])
        self.splits = np.array([clip.split for clip in clips], str)
        number = {name: c for c, name in enumerate(classes)}
        self.labels = [[number[name] for name in clip.labels] for clip in clips] if classes else []

    def __len__(self):
        return len(self.clips)

    def subset(self, indices):
        """The same set with these clips only."""
        return ClipSet([self.clips[i] for i in indices], self.classes, self.metric, self.seconds)

    def batch(self, numbers, generators=None, samples=None):
        """These clips, padded with zeros: waveform (B, S) int16, and lengths (B,) in samples.

        With `generators`, a random one of numpy's for each, clips longer than `seconds` are cut to a random crop. S is
        `samples`, or the longest length. With a GPU the waveform lies in pinned memory, which is copied there faster.
        """
        lengths = self.samples[numbers]
        starts = np.zeros_like(lengths)
        if generators:
            lengths = np.minimum(lengths, round(self.seconds * SAMPLE_RATE))
            starts = [rng.integers(n) for rng, n in zip(generators, self.samples[numbers] - lengths + 1, strict=True)]
        shape = len(numbers), samples or lengths.max()
        if torch.cuda.is_available():
            waveform = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        else:
            waveform = torch.from_numpy(np.empty(shape, np.int16))      # numpy asks for large pages: twice as fast
        for row, i, start, length in zip(waveform.numpy(), numbers, starts, lengths, strict=True):
            self.clips[i].read(start, row[:length])
            row[length:] = 0
        return waveform, torch.from_numpy(lengths)

    def waveform(self, i):
        """Clip i, whole: int16 (S,)."""
        waveform, _ = self.batch([i])
        return waveform[0]

    def targets(self, numbers):
        """Labels of these clips as (n, C) of 0 and 1, float32."""
        dense = torch.zeros(len(numbers), len(self.classes))
        for row, i in zip(dense, numbers, strict=True):
            row[self.labels[i]] = 1
        return dense

    @property
    def single_label(self):
        """Whether each clip has one label."""
        return all(len(clip.labels) == 1 for clip in self.clips)

    def clips_by_class(self):
        """For each class, the numbers of the clips that have it: C lists."""
        clips = [[] for _ in self.classes]
        for i, own in enumerate(self.labels):
            for c in own:
                clips[c].append(i)
        return clips

    def missing_classes(self):
        """Names of the classes that no clip has."""
        return [name for name, clips in zip(self.classes, self.clips_by_class(), strict=True) if not clips]

    def fraction(self, fraction, seed):
        """A random part of the clips, drawn class by class so that no class is lost.

        A clip with several labels counts for the rarest. Smaller fractions of a seed are part of larger ones.
        """
        size = [len(clips) for clips in self.clips_by_class()]
        first = {}                                              # clip of each class
        counted_for = collections.defaultdict(list)             # clips of each class; None: of those without labels
        for i in np.argsort(np.random.default_rng(seed).permutation(len(self))):
            for c in self.labels[i]:
                first.setdefault(c, i)
            rarest = min(self.labels[i], key=size.__getitem__, default=None)
            counted_for[rarest].append(i)
        keep = set(first.values())
        for clips in counted_for.values():
            keep.update(clips[:round(fraction * len(clips))])
        return self.subset(sorted(keep))

    def digest(self):
        """A hash of the clips' names, splits, groups, labels and lengths and, as crops depend on it, their order."""
        digest = hashlib.sha256()
        for clip in self.clips:
            line = f"{clip.name} {clip.split} {clip.group} {sorted(clip.labels)} {clip.samples}\n"
            digest.update(line.encode(errors="backslashreplace"))
        return digest.hexdigest()

    def fingerprint(self):
        """What to compare when numbers differ: clips, the beginning of `digest`, mean and standard deviation of the
        log-mels (before normalisation) of 200 of them, of the first minute of each."""
        some = np.linspace(0, len(self) - 1, min(len(self), 200)).astype(int)
        frontend = LogMel()
        values = torch.cat([frontend(self.waveform(i)[None, :60 * SAMPLE_RATE])[0] for i in some])
        return f"{len(self)} clips {self.digest()[:8]} log-mel {values.mean():.3f} +- {values.std():.3f}"


# -------------------------------------------------------------------------------------- reading recordings

# Endings of what is read. (Others that libsndfile knows are rare, and have quirks.)
AUDIO = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf")
LONGEST = 12            # hours of a recording, which is in memory at 16 kHz while it is read: 230 MB an hour


def read_audio(path):
    """A recording of any rate, as far as it decodes: mono int16 (S,) at 16 kHz, without its offset (as heard in the
    first minute), the loudest sample at full scale, as level does not count (see `LogMel`): nothing is clipped or lost.
    And a note, "" where all is well. Raises InputError for what can't be decoded and for values that are not finite."""
    notes = []
    minutes = []
    before = nothing = np.zeros(0, np.float32)
    offset = None
    # A minute at a time, to save memory, each with a second of what is around it: further than the filter reaches.
    blocks = itertools.chain(decode(path, notes), [(nothing, None)])
    for (minute, rate), (following, _) in itertools.pairwise(blocks):
        offset = minute.mean() if offset is None else offset
        around = torch.from_numpy(np.concatenate([before, minute, following[:rate]]) - offset)
        start = len(before) * SAMPLE_RATE // rate
        stop = start + math.ceil(len(minute) * SAMPLE_RATE / rate)
        minutes.append(resample(around, rate, SAMPLE_RATE).numpy()[start:stop].copy())
        before = minute[-rate:]
    loudest = np.max([np.abs(minute).max() for minute in minutes])
    if not np.isfinite(loudest):
        raise InputError(f"{path}: holds values that are not finite")
    for k, minute in enumerate(minutes):
        minutes[k] = np.round(minute * (32767 / max(loudest, 1e-6))).astype(np.int16)
    return np.concatenate(minutes), "; ".join(notes)


def decode(path, notes):
    """A recording as far as it decodes, a minute at a time, the last one shorter: pairs of float32 (S,), mono, and the
    sample rate. Of two channels it is the mean; of more the first, as an average over an array of microphones cancels
    sounds by their direction. At the end `notes`, a list, gets a remark where that is less than the header promises, or
    more is in the file. Raises InputError where nothing decodes, and for what is no audio."""
    file, content, promised = open_audio(path)
    with content, file:
        rate = file.samplerate
        if not 1000 <= rate <= 768_000:                         # of a damaged header
            raise InputError(f"{path}: a sample rate of {rate} Hz can't be right")
        # Else soundfile seeks after each read, and an MP3's decoder loses bits that were kept in the frames before.
        file.seekable = lambda: False
        samples = 0
        damage = ""
        while not damage:
            minute, damage = read_minute(file)
            if len(minute) == 0:
                break
            samples += len(minute)
            if samples > LONGEST * 3600 * rate:
                raise InputError(f"{path}: is longer than {LONGEST} hours; cut it into parts")
            yield minute, rate
        if samples == 0:
            raise InputError(f"{path}: no sound in it ({damage or '0 samples'})")
        share = content.tell() / os.path.getsize(path)          # of the file that was read
        if promised and promised - samples > max(promised / 100, rate / 10):
            notes.append(f"ends after {samples / rate:.1f} of {promised / rate:.1f} s")
        elif damage or share < 0.9 or file.format == "OGG" and not has_end_mark(path):
            notes.append(f"ends after {samples / rate:.1f} s, {share:.0%} of the file")


def read_minute(file):
    """The next minute of an open file, mono float32 (S,), less at its end or damage, and libsndfile's words for it."""
    blocks = [np.zeros(0, np.float32)]      # of a tenth of a second: one that is damaged is lost, and all behind it
    missing = 60 * file.samplerate
    try:
        while len(block := file.read(min(file.samplerate // 10, missing), "float32", always_2d=True)):
            blocks.append(block.mean(axis=1) if file.channels <= 2 else block[:, 0])
            missing -= len(block)
    except soundfile.LibsndfileError as error:
        return np.concatenate(blocks), error.error_string
    return np.concatenate(blocks), ""


UNKNOWN = 2_000_000_000     # bytes: what is written to a pipe has such a size in its header, or more


def open_audio(path):
    """A recording opened by soundfile, the file it reads, the samples its header promises or None; or InputError."""
    try:
        content = open(path, "rb")                                              # noqa: SIM115
        file = soundfile.SoundFile(content)
        if file.frames == 0 and file.format in ("WAV", "WAVEX"):        # its recorder never wrote the length
            patched = bytearray(Path(path).read_bytes())
            patched[4:8] = bytes([8, 0, 0, 0])                          # then libsndfile goes by the size of the file
            content = io.BytesIO(patched)
            file = soundfile.SoundFile(content)
        if file.subtype.startswith("MPEG_LAYER") and not tells_length(path):
            content = Endless(path, "rb")
            return soundfile.SoundFile(content), content, None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (soundfile.LibsndfileError, TypeError) as error:         # TypeError: of a name that ends in .raw
        raise InputError(f"{path}: not readable as audio ({getattr(error, 'error_string', error)})") from None
    if file.frames > 2**40:
        return file, content, None
    # Of a file that is too short libsndfile logs both lengths.
    lengths = re.findall(r"(\d+) \(should be (\d+)", file.extra_info)
    shares = [int(length) / max(int(there), 1) for length, there in lengths if int(length) < UNKNOWN]
    return file, content, round(file.frames * max(shares, default=1))


def has_end_mark(path):
    """Whether an Ogg file's last page is whole and marked as the last. (27 bytes and sizes come first: RFC 3533.)"""
    tail = np.fromfile(path, np.uint8, offset=max(os.path.getsize(path) - 2**17, 0)).tobytes()
    page = tail[tail.rfind(b"OggS"):]
    return len(page) > 26 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])


def tells_length(path):
    """Whether an MP3, perhaps with a tag before it or in a WAV, begins with a frame that tells how many follow."""
    head = np.fromfile(path, np.uint8, count=10).tobytes()
    tag = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) if head[:3] == b"ID3" else 0
    start = np.fromfile(path, np.uint8, count=4096, offset=tag).tobytes()
    return bool(re.search(rb"(Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](?!\0{4})|VBRI", start))     # flag 1: a number


class Endless(io.FileIO):
    """A file that seems a hundred times as long, and zero there. libsndfile guesses the length of an MP3 without a Xing
    header from its size and its first frame, and reads no further."""

    def seek(self, offset, whence=os.SEEK_SET):
        if whence == os.SEEK_END:
            return super().seek(100 * os.path.getsize(self.name) + offset)
        return super().seek(offset, whence)

    def readinto(self, buffer):
        count = super().readinto(buffer)
        if count == 0 and self.tell() > os.path.getsize(self.name):         # looking for a tag
            buffer[:] = bytes(len(buffer))
            count = len(buffer)
        return count


def try_to_read(path):
    """What `read_audio` gives, or None and the reason."""
    try:
        return read_audio(path)
    except Exception as error:          # whatever it is, one damaged file must not cost the others
        return None, str(error).removeprefix(f"{path}: ") or type(error).__name__


def read_clips(clips, skipped, workers=None):
    """Decode clips in threads, with a bar: yields (clip, waveform) of those that can be read, in order; `skipped`, a
    list, gets a line for each other. Raises InputError where a file is in two splits, and where none can be read."""
    workers = torch.get_num_threads() if workers is None else workers
    results = in_threads(try_to_read, [clip.path for clip in clips], workers)
    results = progress(results, "decode", total=len(clips), unit=" files")
    splits = {}
    for clip, (waveform, note) in zip(clips, results, strict=True):
        if splits.setdefault(clip.path, clip.split) != clip.split:
            raise InputError(f"{clip.name} is in two splits: {splits[clip.path]} and {clip.split}")
        if waveform is None:
            skipped.append(f"{clip.name}: {note}")
        else:
            yield clip._replace(path=None, samples=len(waveform), note=note), waveform
    if len(skipped) == len(clips):
        raise InputError(f"none of the {len(clips)} recordings can be read: {skipped[0]}, ...")


def read_own(clips, skipped, workers=None):
    """The same for clips of one's own, where a sound may be there twice. One that decodes to the same samples is used
    once; files of one folder and one name (a.wav, a.mp3), whose samples may differ a little, are made one group. Raises
    InputError where two of the same sound differ in split, labels or group."""
    stems = collections.Counter(os.path.splitext(clip.name)[0] for clip in clips)
    first = {}                                                  # clip of each sound
    for clip, waveform in read_clips(clips, skipped, workers):
        other = first.setdefault(hashlib.sha256(waveform).digest(), clip)
        if (other.split, other.labels, other.group) != (clip.split, clip.labels, clip.group):
            raise InputError(f"{other.name} and {clip.name} are one sound in two splits, labels or groups: keep one")
        if other is not clip:
            skipped.append(f"{clip.name}: the same sound as {other.name}")
            continue
        stem = os.path.splitext(clip.name)[0]
        if stems[stem] > 1 and not clip.group:
            clip = clip._replace(group=stem)
        yield clip, waveform


def walk(folder):
    """All files below a folder, sorted; links are followed, each folder once. What begins with a dot
    (.ipynb_checkpoints, ._a.wav) and __MACOSX are left out. Raises InputError where a folder can't be listed."""
    def refuse(error):
        raise InputError(f"{error.filename}: can't be listed ({error.strerror})")

    seen, files = set(), []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file())


def audio_files(folder):
    """All recordings below a folder, sorted. Says how many files have other endings. Raises InputError if none is."""
    recordings, others = [], collections.Counter()
    for path in walk(folder):
        ending = path.suffix.lower()
        if ending in AUDIO:
            recordings.append(path)
        else:
            others[ending or "no ending"] += 1
    kinds = ", ".join(f"{ending} {count}" for ending, count in others.most_common(5))
    if not recordings:
        raise InputError(f"{folder}: no recordings in it; other files: {kinds or 'none'}")
    if others:
        say(f"{folder}: not used: {kinds} (if one is sound, ffmpeg makes .flac of it)")
    return recordings


# ------------------------------------------------------------------------- packing recordings for training


def pack(clips, out, header, workers=None):
    """Decode recordings once, into a folder from which training can read any part.

    audio.int16 holds the samples of all clips, end to end; index.jsonl a line of JSON with what is in `header` and what
    was skipped, then a line a clip. The folder is there once it is complete. Raises InputError where it was before.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; name a new folder")
    part = out.with_name(f"{out.name}.packing")
    shutil.rmtree(part, ignore_errors=True)         # of a packing that was interrupted
    part.mkdir(parents=True)
    packed, skipped = [], []
    read = read_own if header["data"] in (None, *OWN) else read_clips
    with open(part / "audio.int16", "wb") as audio:
        for clip, waveform in read(clips, skipped, workers):
            audio.write(waveform.astype("<i2"))
            packed.append(clip)
    if header["data"] in OWN:
        packed = settle_splits(packed)
    with open(part / "index.jsonl", "w") as index:
        print(json.dumps(dict(header, sample_rate=SAMPLE_RATE, skipped=skipped)), file=index)
        for clip in packed:
            print(json.dumps({name: getattr(clip, name) for name in PACKED}), file=index)
    part.rename(out)


PACKED = ("name", "labels", "split", "group", "samples", "note")        # what index.jsonl tells of a clip


def open_pack(folder):
    """What `pack` wrote: a list of `Clip`, and the header. Raises InputError if it is missing, damaged or of another
    sample rate."""
    audio = os.path.join(folder, "audio.int16")
    index = os.path.join(folder, "index.jsonl")
    clips = []
    first = 0
    with reading(folder, "pack its recordings (again) with `python datasets.py pack`"), open(index) as lines:
        header = json.loads(next(lines))
        if header.get("sample_rate") != SAMPLE_RATE:
            raise InputError(f"{folder}: was packed by another datasets.py, or not at {SAMPLE_RATE} Hz; pack again")
        for line in lines:
            clip = json.loads(line)
            clips.append(Clip(clip["name"], tuple(clip["labels"]), clip["split"], clip["group"], None, clip["samples"],
                              clip["note"], audio, first))
            first += clip["samples"]
        if 2 * first != os.path.getsize(audio):
            raise ValueError("audio.int16 is not as long as index.jsonl says")
    return clips, header


def open_unlabelled(data, seconds):
    """Clips for pre-training in crops of `seconds`, and others that are never trained on, to see how well it
    generalises: two of `ClipSet`. data is ["synth"] or a list of packed folders.

    A recording as long as n crops gives ceil(n) of them in an epoch; those shorter than a crop are given whole, those
    under a second not at all: too little to mask and to predict from. Nor are a labelled set's test clips; a set in
    folds, where each clip is tested once, is given whole. Held out is one group (a recording without one is its own) in
    a hundred by a hash of their names, at least 16 (of fewer than 80, a fifth). Raises InputError where there is none.
    """
    if data == ["synth"]:
        return (ClipSet(synth_unlabelled("unlabelled", 2000, seconds), seconds=seconds),
                ClipSet(synth_unlabelled("held_out", 100, seconds), seconds=seconds))
    packed = [clip for folder in data for clip in open_pack(folder)[0]]
    usable = [clip for clip in packed if clip.samples >= SAMPLE_RATE and clip.split != "test"]
    if not usable:
        raise InputError(f"{', '.join(data)}: no recording in it is a second long, or all are test clips")
    if len(usable) < len(packed):
        say(f"{len(packed) - len(usable)} of {len(packed)} recordings left out: shorter than a second, or test clips")
    hashes = [zlib.crc32(clip.unit.encode(errors="backslashreplace")) for clip in usable]
    groups = sorted(set(hashes))
    limit = groups[min(max(len(groups) // 100, 16), len(groups) // 5)]
    trained, held_out = [], []
    for clip, number in zip(usable, hashes, strict=True):
        (held_out if number < limit else trained).append(clip)
    return ClipSet(trained, seconds=seconds), ClipSet(held_out, seconds=seconds)


# ------------------------------------------------------------------- the six data sets, and sets of one's own

# A reader takes --root and returns all clips that its tables name, and the names of the classes in order, or None:
# those of the clips, sorted. It raises InputError for a table that is missing; whatever else it raises is said to be a
# malformed table.


class Files:
    """The files below a data set's root. Sets get unpacked, converted and moved in many ways: recordings are found by
    their name, whatever folder they are in and whatever format they have become."""

    def __init__(self, root):
        self.root, self.tables, self.recordings = root, {}, {}
        for path in walk(root):
            if path.suffix.lower() in AUDIO:
                self.recordings.setdefault(path.stem, path)
            else:
                self.tables.setdefault(path.name, path)

    def table(self, *names):
        """The path of the table that has one of these names. Raises InputError where there is none."""
        for name in names:
            if name in self.tables:
                return self.tables[name]
        raise InputError(f"{self.root}: no {' or '.join(names)} below it; is the data set's root right?")

    def find(self, name):
        """The path of the recording of this name, whatever its folder and ending, or None."""
        return self.recordings.get(Path(name).stem)


def read_table(path, columns, delimiter=",", optional=()):
    """Rows of a CSV file with a header line, as dictionaries. Raises InputError for columns missing or there twice."""
    with (reading(path, "is it a table in UTF-8, and is --data right?"),
          open(path, newline="", encoding="utf-8-sig") as file):
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ["none"]]
        if missing := [name for name in columns if name not in names]:
            raise InputError(f"{path}: no column {', '.join(missing)} among {', '.join(names)}; columns are separated "
                             f"by {'tabs' if delimiter != ',' else 'commas'}")
        if twice := [name for name in (*columns, *optional) if names.count(name) > 1]:
            raise InputError(f"{path}: the column {twice[0]} is there twice")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}: line {reader.line_num} has too {'many' if None in row else 'few'} columns")
            if any(value.strip() for value in row.values()):        # spreadsheets leave rows of commas
                rows.append(row)
    return rows


def audioset(root, parts):
    """AudioSet (Gemmeke et al. 2017). parts: which `<part>_segments.csv` to train on.

    Files are named ID or YID, perhaps with the clip's times behind: those count, as without it may be the whole video.
    """
    files = Files(root)
    by_id = {}
    for stem in sorted(files.recordings, key=len):
        by_id[stem[:11]] = by_id[stem.removeprefix("Y")[:11]] = files.recordings[stem]
    table = files.table("class_labels_indices.csv")
    classes = {row["mid"]: row["display_name"] for row in read_table(table, ("mid", "display_name"))}
    clips = []
    for part in (*parts, "eval"):
        table = files.table(f"{part}_segments.csv")
        with reading(table), open(table, newline="", encoding="utf-8-sig") as file:
            for row in csv.reader(file, skipinitialspace=True):
                if row and not row[0].startswith("#"):
                    name, _, _, mids = row
                    labels = tuple(classes[mid.strip()] for mid in mids.split(","))
                    clips.append(Clip(name, labels, "test" if part == "eval" else "train", path=by_id.get(name)))
    return clips, list(classes.values())


def esc50(root, esc10=False):
    """ESC-50 (Piczak 2015), 50 classes in five folds; or ESC-10, ten of them."""
    files = Files(root)
    clips = []
    for row in read_table(files.table("esc50.csv"), ("filename", "fold", "category", "esc10")):
        if not esc10 or row["esc10"].strip().lower() == "true":
            clips.append(Clip(row["filename"], (row["category"],), row["fold"], path=files.find(row["filename"])))
    return clips, None


def fsdkaggle2019(root, parts):
    """FSDKaggle2019 (Fonseca et al. 2019) as Zenodo has it; train_curated.csv and train_noisy.csv of
    Kaggle serve too, but the test labels only Zenodo has. parts: "curated", "noisy"."""
    files = Files(root)
    clips = []
    for part in (*(f"train_{part}" for part in parts), "test"):
        table = files.table(f"{part}_post_competition.csv", f"{part}.csv")
        for row in read_table(table, ("fname", "labels")):
            labels = tuple(row["labels"].split(","))
            clips.append(Clip(row["fname"], labels, part.split("_")[0], path=files.find(row["fname"])))
    return clips, None


def dcase2019(root):
    """DCASE 2019 task 1a: TAU Urban Acoustic Scenes 2019, development set (Mesaros et al. 2018).

    Minutes of one place are cut into clips, named scene-city-place-clip-device: --validate holds out whole places.
    """
    files = Files(root)
    clips = []
    for split, table in (("train", "fold1_train.csv"), ("test", "fold1_evaluate.csv")):
        for row in read_table(files.table(table), ("filename", "scene_label"), "\t"):
            name = row["filename"]
            # Test clips have no group: the official split is taken as it is, wherever its places lie.
            place = Path(name).stem.rsplit("-", 2)[0] if split == "train" else ""
            clips.append(Clip(name, (row["scene_label"],), split, place, files.find(name)))
    return clips, None


def magnatagatune(root, top=50):
    """MagnaTagATune (Law et al. 2009): its most frequent tags; folders 0 to b train, c valid, d to f
    test. Clips with none of these tags are left out."""
    files = Files(root)
    rows = read_table(files.table("annotations_final.csv"), ("clip_id", "mp3_path"), "\t")
    tags = [name for name in rows[0] if name not in ("clip_id", "mp3_path")]
    counts = {tag: sum(row[tag] == "1" for row in rows) for tag in tags}
    classes = sorted(tags, key=counts.get, reverse=True)[:top]
    clips = []
    for row in rows:
        name = row["mp3_path"]
        labels = tuple(tag for tag in classes if row[tag] == "1")
        split = {"c": "valid", "d": "test", "e": "test", "f": "test"}.get(name[:1], "train")
        if labels:
            clips.append(Clip(name, labels, split, path=files.find(name)))
    return clips, classes


def kinetics700(root):
    """Kinetics-700 (Carreira et al. 2019), its sound only, tested on its validation split: test labels are secret."""
    files = Files(root)
    clips = []
    for split, tables in (("train", ("train.csv", "kinetics700_train.csv", "kinetics_train.csv")),
                          ("test", ("validate.csv", "val.csv", "kinetics700_val.csv", "kinetics_val.csv"))):
        table = files.table(*tables)
        for row in read_table(table, ("label", "youtube_id", "time_start", "time_end")):
            start = int(float(row["time_start"]))
            end = int(float(row["time_end"]))
            name = f"{row['youtube_id']}_{start:06}_{end:06}"
            clips.append(Clip(name, (row["label"],), split, path=files.find(name) or files.find(row["youtube_id"])))
    return clips, None


def folder(root):
    """Your own sounds: a sub-folder a class."""
    files = [path.relative_to(root) for path in audio_files(root)]
    clips = [Clip(str(path), (path.parts[0],), path=Path(root, path)) for path in files if len(path.parts) > 1]
    classes = {clip.labels[0] for clip in clips}
    say_some("not used, as in no sub-folder", [path.name for path in files if len(path.parts) == 1], ", ")
    if not clips:
        raise InputError(f"{root}: no sub-folders with recordings, one a class, in it")
    splits = {"train", "training", "valid", "validation", "val", "test", "testing", "eval", "dev", "fold1", "fold2"}
    if len({name.lower() for name in classes} & splits) > 1:
        raise InputError(f"{root}: its folders {', '.join(sorted(classes)[:3])} look like splits, not classes: name "
                         "the folder above the classes, or write a table with a column split (--data csv)")
    return clips, None


def own_table(root):
    """Your own sounds in a table: columns file (its path from the table's folder), labels (separated by ;) and, if you
    like, split (train, valid, test, or the number of a fold) and group (see `Clip`). Rows of a file add up labels."""
    optional = ("split", "group")
    rows = read_table(root, ("file", "labels"), optional=optional)
    if unused := (rows and rows[0].keys() - {"file", "labels", *optional}):
        say(f"{root}: not used: {', '.join(sorted(unused))}")
    clips = {}
    for row in rows:
        name = row["file"].strip()
        path = Path(os.path.normpath(Path(root).parent / name))
        if row["labels"].strip().startswith("["):
            raise InputError(f"{root}: {row['labels']} looks like a printed list: separate labels by ;, as in dog;rain")
        labels = [label.strip() for label in row["labels"].split(";") if label.strip()]
        split = re.sub(r"^0+(?=\d)", "", row.get("split", "").strip().lower())         # fold 01 is fold 1
        clip = Clip(name, (), split, row.get("group", "").strip(), path if path.is_file() else None)
        other = clips.setdefault(path, clip)
        if (other.split, other.group) != (clip.split, clip.group):
            raise InputError(f"{root}: {name} is there twice, in different splits or groups")
        clips[path] = other._replace(labels=tuple(dict.fromkeys([*other.labels, *labels])))
    return list(clips.values()), None


def settle_splits(clips):
    """Clips of one's own, split: where none is, about a fifth is for testing, see `hold_out`. Raises InputError for a
    group that is in two splits, and where no class has two groups."""
    if any(clip.split for clip in clips):
        first = {}
        for clip in clips:
            other = first.setdefault(clip.unit, clip)
            if other.split != clip.split:
                raise InputError(f"{other.name} ({other.split}), {clip.name} ({clip.split}): one group in two splits")
        return clips
    tested = hold_out(clips, 5)
    if not tested:
        raise InputError("no class has two recordings (or groups of them), one to train on and one to test on")
    return [clip._replace(split="test" if clip.unit in tested else "train") for clip in clips]


def hold_out(clips, every):
    """Names of groups to test on, a set: of each class one in `every`, rounded up, in order of a hash of their names;
    each class keeps one group at least to train on.

    A group counts for its rarest label, of those that other groups have too. With one that none has it comes last.
    """
    labels = collections.defaultdict(set)                           # of each group
    for clip in clips:
        labels[clip.unit].update(clip.labels)
    size = collections.Counter()                                    # groups of each label
    for own in labels.values():
        size.update(own)

    def order(group):
        alone = any(size[label] == 1 for label in labels[group])
        return alone, hashlib.sha256(group.encode(errors="surrogateescape")).digest()

    left, count, held = size.copy(), collections.Counter(), collections.Counter()
    held_out = set()
    for group in sorted(labels, key=order):
        shared = [label for label in sorted(labels[group]) if size[label] > 1]
        if labels[group] and not shared:
            continue
        rarest = min(shared, key=size.get, default=None)
        count[rarest] += 1
        if held[rarest] < math.ceil(count[rarest] / every) and all(left[label] > 1 for label in shared):
            held_out.add(group)
            held[rarest] += 1
            left.subtract(labels[group])
    return held_out


# Name: (reader, metric). None for a metric: accuracy if all clips have one label, else mAP.
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
OWN = ("folder", "csv")     # sets of one's own; of the others, clips and splits are taken as they are


def read_tables(data, root):
    """A labelled set before its audio: (the clips that are there; a dictionary of data, classes, and how many clips
    are missing). Raises InputError where no clip is there."""
    reader, _ = READERS[data]
    if root is None:
        raise InputError(f"--data {data} needs --root, the {'table' if data == 'csv' else 'folder where it lies'}")
    with reading(root, "is it the data set's root, and are its tables whole?"):
        named, classes = reader(root)
    splits = {clip.split for clip in named}
    if not (splits <= {""} or splits <= {"train", "valid", "test"} or all(split.isdecimal() for split in splits)):
        raise InputError(f"{root}: split must be train, valid or test of all clips, or the number of a fold, or empty: "
                         f"there are {', '.join(split or '(none)' for split in sorted(splits))}")
    clips = [clip for clip in named if clip.path]
    if not clips:
        example = f", such as {named[0].name}" if named else ""
        raise InputError(f"{root}: none of the {len(named)} recordings is there{example}; ffmpeg makes .flac of videos")
    classes = classes or sorted(set().union(*[clip.labels for clip in named]))
    if not classes:
        raise InputError(f"{root}: its clips have no labels")
    say_some("missing", [clip.name for clip in named if not clip.path], ", ")
    return clips, dict(data=data, classes=classes, missing=len(named) - len(clips))


def load_labelled(data, root=None, workers=None):
    """The labelled set of this name in READERS, from its root or from where `pack --data` put it: a `ClipSet`.

    Says what is there and what is not. Raises InputError for what is missing or damaged.
    """
    skipped = []
    if data == "synth":
        clips = synth_labelled()
        header = dict(classes=list(SOUND_CLASSES), missing=0)
    elif root is not None and (Path(root) / "audio.int16").exists():
        clips, header = open_pack(root)
        skipped = header["skipped"]
        if header["data"] != data:
            raise InputError(f"{root}: holds packed {header['data'] or 'audio without labels'}, not {data}: name it "
                             f"with --data, or pack the data set with --data {data}")
    else:
        named, header = read_tables(data, root)
        read = read_own if data in OWN else read_clips
        clips = [clip._replace(audio=waveform) for clip, waveform in read(named, skipped, workers)]
        if data in OWN:
            clips = settle_splits(clips)
    _, metric = READERS[data]
    result = ClipSet(clips, header["classes"], metric)
    if metric is None:
        result.metric = "accuracy" if result.single_label else "mAP"
    hours = sum(clip.samples for clip in clips) / SAMPLE_RATE / 3600
    say(f"{data}: {len(result)} clips, {hours:.2f} hours; {header['missing']} missing, {len(skipped)} skipped; "
        f"scored by {result.metric}")
    counts = zip(result.classes, result.clips_by_class(), strict=True)
    say_some(f"{len(result.classes)} classes", [f"{name} {len(own)}" for name, own in counts], ", ")
    say_some("skipped", skipped)
    say_some("not as long as header or file say", [f"{clip.name}: {clip.note}" for clip in clips if clip.note])
    return result


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


@functools.cache
def synth_waveform(index, split, seconds):
    """The waveform of `synth_clip`, kept once it is made: 2,000 of 5 s take 320 MB."""
    return synth_clip(index, split, seconds)[0]


def synth_unlabelled(split, count, seconds):
    """Synthetic clips for pre-training, made when they are drawn: a list of `Clip`."""
    return [Clip(f"synth/{split}/{i}", samples=round(seconds * SAMPLE_RATE),
                 audio=functools.partial(synth_waveform, i, split, seconds)) for i in range(count)]


def synth_labelled(train=1000, test=500):
    """Synthetic clips, labelled with the classes of the events in them: a list of `Clip`."""
    clips = []
    for n in progress(range(train + test), "synth", unit=" clips"):
        split, i = ("train", n) if n < train else ("test", n - train)
        waveform, events = synth_clip(i, split)
        heard = {kind for _, _, kind in events}
        labels = tuple(kind for kind in SOUND_CLASSES if kind in heard)
        clips.append(Clip(f"synth/{split}/{i}", labels, split, samples=len(waveform), audio=waveform))
    return clips


# ---------------------------------------------------------------------------------------------- batches


@functools.lru_cache(2)         # kept for the draws that follow: two orders of all crops, of up to 200 MB each
def shuffled(count, *seed):
    """A random order of range(count), the same for the same seed."""
    return np.random.default_rng(seed).permutation(count)


def derive_seed(*numbers):
    """A 63-bit seed from several numbers, unrelated to the seeds of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class ClipStream:
    """An endless stream of shuffled epochs of random crops.

    In an epoch a labelled clip comes once, and of unlabelled sound all hours count the same: a recording as long as n
    crops comes ceil(n) times. With `clips_by_class` the stream is balanced instead (Sec. 4.1): first a class is drawn,
    then one of its clips. Clip and crop depend on the seed and their place n only, not on the process or earlier draws.
    """

    def __init__(self, source, seed, clips_by_class=None):
        self.source, self.seed = source, seed
        crops = np.ones(len(source), int)
        if not source.classes:
            crops = np.ceil(source.samples / round(source.seconds * SAMPLE_RATE)).astype(int)
        self.ends = np.cumsum(crops)                                # of each clip's crops in an epoch
        self.clips_by_class = clips_by_class and [clips for clips in clips_by_class if clips]

    def numbers(self, places):
        """Which clips come at these places, (B,) in order, of the stream: (B,)."""
        if self.clips_by_class:
            return np.array([self.balanced(n) for n in places])
        total = int(self.ends[-1])                                  # crops in an epoch
        epochs, crops = np.divmod(places, total)
        orders = [shuffled(total, self.seed, epoch)[crops[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.searchsorted(self.ends, np.concatenate(orders), "right")

    def balanced(self, n):
        """Which clip comes n-th where each class is equally frequent."""
        rng = np.random.default_rng([1, self.seed, n])
        clips = self.clips_by_class[rng.integers(len(self.clips_by_class))]
        return clips[rng.integers(len(clips))]

    def batch(self, first, count, samples):
        """The crops `first` and on: waveform (B, S) int16, lengths (B,), and the numbers (B,) of their clips."""
        places = np.arange(first, first + count)
        numbers = self.numbers(places)
        generators = [np.random.default_rng([self.seed, n]) for n in places]
        return *self.source.batch(numbers, generators, samples), numbers


def batches(source, batch_size, updates, seed, first=0, rank=0, world=1, workers=None, samples=None,
            clips_by_class=None):
    """Batches for updates `first` to `updates`: of each, the part of process `rank` of `world`. See `ClipStream.batch`.

    Update u draws crops u * batch_size and on of the `ClipStream`, whatever the number of processes. Clips are padded
    to `samples`, or to the longest of the batch. `workers` threads read ahead (None: two with a GPU, else one).
    """
    stream, local_batch = ClipStream(source, seed, clips_by_class), batch_size // world
    if workers is None:
        workers = 2 if torch.cuda.is_available() else 1
    starts = range(first * batch_size + rank * local_batch, updates * batch_size, batch_size)
    return in_threads(lambda start: stream.batch(start, local_batch, samples), starts, workers)


# ------------------------------------------------------------------- what the three scripts have in common


def in_threads(function, items, workers):
    """What a function gives for each item, in order, worked out ahead by so many threads.

    Threads, as what takes the time here, reading and decoding, releases Python's lock: nothing has to be handed from
    process to process. An error is raised where its result would come.
    """
    ahead = collections.deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # After Ctrl-C nobody waits for the end of a long recording.
        pool.shutdown(wait=sys.exc_info()[0] is not KeyboardInterrupt, cancel_futures=True)


def rank():
    """The number of this process among those that torchrun started; 0 writes files and prints."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def find_device(name=None):
    """The device of this name, or the best; of several GPUs, that of this process. Raises InputError where none is."""
    best = "cpu"
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available() and world_size() == 1:
        best = "mps"
    name = name or best
    number = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    if name not in ("cpu", best) or number and number >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this torch has none, or not for {world_size()} processes")
    return torch.device(name, number)


def say(text):
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def say_some(title, texts, separator="; ", most=10):
    """Print texts in a line: all, or the first and last few. Nothing where there are none."""
    if texts:
        shown = texts if len(texts) <= most else [*texts[:most // 2], "...", *texts[-(most // 2):]]
        say(f"{title}: {separator.join(shown)}")


def progress(steps, label, **options):
    """A bar for what comes before or between updates: gone at its end, and not there where stderr is no terminal."""
    return tqdm(steps, label, leave=False, disable=True if rank() else None, **options)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and a description that is printed as it is laid out."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; --help explains\n")


def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)                      # argparse says what is wrong with text that is no number
        if not low <= value <= high:            # written so that NaN is refused too
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def run_script(main):
    """Run a script's main function: what the user can mend ends in one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):                  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")   # file names may hold anything
    try:
        return main()
    except (InputError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            message = "out of memory: give a smaller --micro-batch or --size, or shorter recordings"
        elif re.search("[Nn]o working C.. compiler|working triton", str(error)):
            message = "--compile found no C++ compiler, or no Triton for the GPU: install it, or leave --compile out"
        else:
            raise
    except KeyboardInterrupt:
        tqdm.write("interrupted", sys.stderr)
        sys.stderr.flush()
        os._exit(130)           # without waiting for threads
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", sys.stderr)         # below a bar, not into it
    sys.exit(2)


@contextlib.contextmanager
def reading(path, remedy="get it again"):
    """Whatever goes wrong within, while a file is read, is an InputError in one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: no such file; {remedy}") from None
    except Exception as error:      # there is no telling what damaged content leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: damaged, or not what it should be ({reason}); {remedy}") from None


def write_whole(path, content):
    """Write bytes so that, even if the power fails, `path` is either the old file or the new one."""
    part = f"{path}.{os.getpid()}.part"             # another process, thought to be dead, may write too
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ----------------------------------------------------------------------------------------- command line


def main():
    """The command line: `pack` and `synth`."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="decode recordings into a folder, for fast training")
    command.add_argument("folder", help="recordings, in sub-folders too; with --data the root of the set, or the table")
    command.add_argument("out", help="folder to write, 115 MB an hour")
    command.add_argument("--data", choices=[name for name in READERS if name != "synth"], help="kind of labelled set")
    command.add_argument("--workers", type=in_range(int, 1, 1024), help="threads that decode (as many as torch has)")
    command = commands.add_parser("synth", help="write synthetic clips as .wav and what is in them")
    command.add_argument("out", help="folder to write")
    command.add_argument("--clips", type=in_range(int, 1, 10**6), default=10, help="how many (%(default)s)")
    args = parser.parse_args()
    if args.command == "pack":
        pack_folder(args)
    else:
        write_synth(args.out, args.clips)


def pack_folder(args):
    """`pack`, and what it says at the end."""
    if args.data:
        clips, header = read_tables(args.data, args.folder)
    else:
        files = audio_files(args.folder)
        clips = [Clip(str(path.relative_to(args.folder)), path=path) for path in files]
        header = dict(data=None)
    pack(clips, args.out, header, args.workers)
    packed, header = open_pack(args.out)
    hours = sum(clip.samples for clip in packed) / SAMPLE_RATE / 3600
    print(f"{len(packed)} recordings, {hours:.2f} hours, in {args.out}")
    say_some(f"{len(header['skipped'])} skipped", header["skipped"], "\n  ")
    say_some("not as long as header or file say", [f"{clip.name}: {clip.note}" for clip in packed if clip.note], "\n  ")


def write_synth(out, clips):
    """`synth`: clips, and a table of their events."""
    Path(out).mkdir(parents=True)
    lines = ["filename\tonset\toffset\tevent_label"]
    for i in progress(range(clips), "synth", unit=" clips"):
        waveform, events = synth_clip(i)
        soundfile.write(Path(out) / f"{i}.wav", waveform, SAMPLE_RATE)
        lines += [f"{i}.wav\t{onset:.2f}\t{offset:.2f}\t{kind}" for onset, offset, kind in events]
    (Path(out) / "events.tsv").write_text("\n".join(lines) + "\n")
    print(f"{clips} clips, and when each event in them sounds (events.tsv), in {out}")


if __name__ == "__main__":
    run_script(main)
