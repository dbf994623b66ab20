"""Manifests and their recordings: a jsonl opened by an index of its lines, audio read, checked and cut.

A manifest is jsonl in UTF-8: `wav` (absolute, or relative to the manifest's folder) and `txt`; optional
`key`, `start` and `duration` in seconds, `instruction`, `target` (what the LLM must write; default `txt`).
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from errors import Refused, refusing

SAMPLE_RATE, MAX_SECONDS = 16_000, 30  # what Whisper hears
MIN_SAMPLES = 201  # its mel reflects half a window of 400 samples at either end
SILENT, ABSURD = 1e-3, 1e6  # peaks, of 1: 60 dB under full scale; 120 dB over it, as misread floats are
QUIET = SAMPLE_RATE // 5  # a cut is made in the middle of 0.2 s
TEXTS, NUMBERS = ("wav", "txt", "key", "instruction", "target"), ("start", "duration")  # in a record
CHUNK = 1 << 20  # bytes of a manifest that a process reads at a time
LINE = np.dtype([("offset", "<i8"), ("seconds", "<f4")])  # of an index
CHECKED = np.dtype([("key", "<u8"), ("seconds", "<f4"), ("rate", "<f4")])  # rate: characters per second
AUDIO_ERRORS = (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError, MemoryError)


class Utterance(NamedTuple):
    """One line of a manifest, checked as far as that goes without its audio."""

    record: dict  # as it stood there
    where: str  # as train.jsonl:17, for messages
    path: str
    seconds: float  # nan where neither the record nor the file's header tells
    key: str
    target: str | None


def once(pairs: list[tuple]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return record


decode = json.JSONDecoder(object_pairs_hook=once).decode


def read_line(line: bytes, where: str) -> dict:
    """The JSON of a line. Raises Refused with `where`."""
    with refusing(f"{where}: not a line of JSON in UTF-8", ValueError, RecursionError):
        try:
            record = decode(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} at character {error.pos + 1}") from error  # of line 1, it says
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    return record


def read_record(record: dict, where: str, folder: str, seconds: float | None = None) -> Utterance:
    """A record, whose `wav` is relative to `folder` -> its utterance. Raises Refused with `where`.

    seconds: in place of those in the file's header, if they are known already.
    """
    if not isinstance(record, dict) or "wav" not in record:
        raise Refused(f"{where}: a JSON object with wav and txt is needed")
    for name in TEXTS:
        if name in record and not isinstance(record[name], str):
            raise Refused(f"{where}: {name} must be a string, not {record[name]!r:.60}")
    for name in NUMBERS:
        if name in record and not (type(record[name]) in (int, float) and 0 <= record[name] < 1e9):
            raise Refused(f"{where}: {name} must be a number of seconds, not {record[name]!r:.60}")
    path = os.path.join(folder, record["wav"])
    seconds = record.get("duration", seconds)
    if seconds is None:
        seconds = math.nan
        with suppress(*AUDIO_ERRORS):
            if os.path.isfile(path):  # opening a pipe would wait for ever
                seconds = soundfile.info(os.path.join(os.curdir, path)).duration - record.get("start", 0)
    key = record.get("key", os.path.splitext(os.path.basename(path))[0])
    return Utterance(record, where, path, float(seconds), key, record.get("target", record.get("txt")))


def check_to_train(utterance: Utterance) -> None:
    """Raises Refused unless there is a text to learn, and audio as far as its header tells."""
    where, path = utterance.where, utterance.path
    if "target" not in utterance.record and not (utterance.target or "").strip():
        raise Refused(f"{where}: no txt to learn (for silence give an empty target)")
    if not os.path.isfile(path):
        raise Refused(f"{where}: no such audio file: {path}")
    if not utterance.seconds > 0:
        after = f" from {utterance.record['start']} s on" if "start" in utterance.record else ""
        raise Refused(f"{where}: {path}: no audio that can be read{after}")


def read_audio(utterance: Utterance) -> np.ndarray:
    """Mono float32 samples at 16 kHz, of any length. Raises Refused if the file holds less, or garbage."""
    record, where = utterance.record, f"{utterance.where}: {utterance.path}"
    if not os.path.isfile(utterance.path):
        raise Refused(f"{utterance.where}: no such audio file: {utterance.path}")
    path = os.path.join(os.curdir, utterance.path)  # to libsndfile "-" is stdin, which would wait for ever
    with refusing(where, *AUDIO_ERRORS), soundfile.SoundFile(path) as file:
        rate, wav = file.samplerate, re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
        if wav and int(wav[2]) < int(wav[1]) < 2**31 - 1:  # what streams has a length of 2^31 - 1 or 2^32 - 1
            raise ValueError(f"cut short, {wav[2]} of {wav[1]} bytes are there")
        if not 1000 <= rate <= 768_000:
            raise ValueError(f"a sampling rate of {rate} Hz")
        file.seek(round(record.get("start", 0) * rate))
        # duration without start cuts nothing: it is the known length, and the file must bear it out
        samples = round(record["duration"] * rate) if {"start", "duration"} <= record.keys() else -1
        waveform = file.read(samples, dtype="float32", always_2d=True)
        if not np.abs(waveform).max(initial=0) < ABSURD:  # not so if that is nan; a mel of 1e17 would be
            raise ValueError(f"NaN, infinite, or over {ABSURD:g} times full scale")
        waveform = soxr.resample(waveform.mean(axis=1), rate, SAMPLE_RATE)
    seconds = len(waveform) / SAMPLE_RATE
    if abs(seconds - utterance.seconds) > 0.1:  # not so if that is nan
        raise Refused(f"{where}: {seconds:.2f} s where {utterance.seconds:.2f} s should be; is it cut short?")
    if len(waveform) < MIN_SAMPLES:
        raise Refused(f"{where}: under {MIN_SAMPLES} samples at 16 kHz")
    return waveform


def cut(waveform: np.ndarray, seconds: float = MAX_SECONDS) -> list[np.ndarray]:
    """Parts of at most `seconds` that make up the waveform, cut where the second half of each is quietest."""
    parts, longest = [], round(seconds * SAMPLE_RATE)
    while len(waveform) > longest:
        first, last = longest // 2, min(longest, len(waveform) - QUIET)
        power = np.square(waveform[first - QUIET // 2 : last + QUIET // 2], dtype=np.float64).cumsum()
        at = first + int(np.argmin(power[QUIET:] - power[:-QUIET]))
        parts.append(waveform[:at])
        waveform = waveform[at:]
    return [*parts, waveform]


def lines_of(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at `start` <= offset < `stop`, with their offsets in bytes."""
    with open(path, "rb") as file:
        file.seek(max(start - 1, 0))
        offset = file.tell() + (len(file.readline()) if start else 0)
        while offset < stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def in_chunks(work: Callable, path: str, told: str, chunk: int) -> Iterator:
    """work((path, start, stop)) for each `chunk` bytes of a manifest, in order; where many, in parallel."""
    size = os.path.getsize(path)
    spans = [(path, start, min(start + chunk, size)) for start in range(0, size, chunk)]
    if len(spans) < 2:
        yield from map(work, spans)
        return
    pool = ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(spans)))
    try:  # a Pool would wait for ever for a process that was killed
        with (
            refusing(f"{path}: {told} failed", BrokenProcessPool),
            tqdm(total=size, unit="B", unit_scale=True, desc=told, disable=None) as progress,
        ):
            for (_, start, stop), result in zip(spans, pool.map(work, spans)):
                progress.update(stop - start)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def index_chunk(to_train: bool, span: tuple[str, int, int]) -> tuple[np.ndarray, bool, bytes | None]:
    """The index of a chunk; whether all of it bear duration; a line that is refused, where it ends."""
    path, lines, known, folder = span[0], [], True, os.path.dirname(span[0])
    for offset, line in lines_of(*span):
        try:
            utterance = read_record(read_line(line, path), path, folder)
            if to_train:
                check_to_train(utterance)
        except Refused:
            return np.array(lines, LINE), known, line
        known = known and "duration" in utterance.record
        lines.append((offset, utterance.seconds))
    return np.array(lines, LINE), known, None


class Manifest:
    """The utterances of a manifest, read when asked for: 12 bytes a line, in a file that processes share.

    index: of LINE, or where it is kept; lines: which of them, if not all.
    """

    def __init__(self, path: str, index: np.ndarray | str, lines: np.ndarray | None = None):
        self.path, self.index, self.lines, self.file = path, index, lines, None
        if isinstance(index, str):
            self.index = np.memmap(index, LINE, mode="r")

    def __len__(self) -> int:
        return len(self.index if self.lines is None else self.lines)

    def __reduce__(self) -> tuple:  # each process opens its own files
        return Manifest, (self.path, getattr(self.index, "filename", None) or self.index, self.lines)

    @property
    def seconds(self) -> np.ndarray:
        """float32 (utterances,), nan where unknown."""
        return self.seconds_of(slice(None))

    def seconds_of(self, which: np.ndarray | slice) -> np.ndarray:
        return self.index["seconds"][which if self.lines is None else self.lines[which]]

    def __getitem__(self, i: int) -> Utterance:
        if not 0 <= i < len(self):
            raise IndexError(i)
        line = int(i if self.lines is None else self.lines[i])
        self.file = self.file or open(self.path, "rb")
        start = int(self.index["offset"][line])
        after = self.index["offset"][line + 1] if line + 1 < len(self.index) else os.path.getsize(self.path)
        content, where = os.pread(self.file.fileno(), int(after) - start, start), f"{self.path}:{line + 1}"
        seconds = round(float(self.index["seconds"][line]), 4)
        return read_record(read_line(content, where), where, os.path.dirname(self.path), seconds)

    def keep(self, kept: np.ndarray) -> "Manifest":
        """Only the lines where `kept`, of all of them, is True."""
        return Manifest(self.path, self.index, np.arange(len(kept), dtype=np.int32)[kept])


def look_at(path: str) -> os.stat_result:
    """Raises Refused unless it is a file with something in it."""
    with refusing(f"--data_path {path}", OSError), open(path, "rb") as file:
        if not file.read(1):  # raises if it is a folder
            raise Refused(f"{path}: empty; a manifest has one JSON object per line, with wav and txt")
        return os.fstat(file.fileno())


def read_manifest(path: str, to_train: bool = True) -> Manifest:
    """Checks every line as far as that goes without decoding audio. Raises Refused with file:line.

    to_train: its text and its audio must be there. Recognition tells in its result what it cannot read. If
    there is over 1 MB, and all lines bear `duration`, the index is kept in XDG_CACHE_HOME for the next time.
    """
    stat = look_at(path)
    # a manifest of another size or time of change has an index of another name
    known = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns} {to_train} {LINE.descr}"
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ears")
    kept_at = os.path.join(folder, hashlib.sha256(known.encode()).hexdigest()[:32])
    if os.path.exists(kept_at):
        return Manifest(path, kept_at)

    index, keep = bytearray(), stat.st_size > CHUNK
    for lines, bear_duration, refused in in_chunks(partial(index_chunk, to_train), path, "opening", CHUNK):
        index += lines.tobytes()
        keep = keep and bear_duration
        if refused is not None:
            where = f"{path}:{len(index) // LINE.itemsize + 1}"
            check_to_train(read_record(read_line(refused, where), where, os.path.dirname(path)))
            raise Refused(f"{where}: it was changed while it was read")
    if keep:
        with suppress(OSError):  # no home to write to: the next time will take as long
            os.makedirs(folder, exist_ok=True)
            with open(f"{kept_at}.{os.getpid()}", "wb") as file:
                file.write(index)
            os.replace(file.name, kept_at)
            return Manifest(path, kept_at)
    return Manifest(path, np.frombuffer(index, LINE))


def check_chunk(span: tuple[str, int, int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """CHECKED of each line of a chunk, its audio decoded, and its problems: (line of the chunk, what)."""
    path, checked, problems = span[0], [], []
    for _, line in lines_of(*span):
        row = (0, math.nan, math.nan)
        try:
            utterance = read_record(read_line(line, ""), "", os.path.dirname(path))
            key = hashlib.blake2b(utterance.key.encode(errors="surrogatepass"), digest_size=8).digest()
            row = (int.from_bytes(key), math.nan, math.nan)
            check_to_train(utterance)
            waveform = read_audio(utterance)
            seconds, text = len(waveform) / SAMPLE_RATE, (utterance.record.get("txt") or "").strip()
            row = (row[0], seconds, len(text) / seconds if text else math.nan)
            if seconds > MAX_SECONDS:
                raise Refused(f": {seconds:.1f} s: training leaves out what is over {MAX_SECONDS} s")
            if (utterance.target or "").strip() and np.abs(waveform).max() < SILENT:
                raise Refused(f": {utterance.path}: silent, but has a text")
        except Refused as refused:
            problems.append((len(checked), refused.told.removeprefix(": ")))
        checked.append(row)
    return np.array(checked, CHECKED), problems


def histogram(values: np.ndarray, edges: list[float]) -> str:
    """A line with a bar for each two edges; the last is open."""
    counts, _ = np.histogram(values, [*edges, math.inf])
    spans = [*(f"{a:g} to {b:g}" for a, b in pairwise(edges)), f"over {edges[-1]:g}"]
    rows = [
        f"{span:>10} {count:>10} {'#' * math.ceil(50 * count / max(1, counts.max()))}".rstrip()
        for span, count in zip(spans, counts)
    ]
    return "\n".join(rows[: 1 + max([0, *np.flatnonzero(counts)])])


def check(path: str) -> int:
    """Prints every problem of a manifest and its audio as file:line, then counts; returns how many."""
    chunk = min(CHUNK, 1 + look_at(path).st_size // (8 * os.cpu_count()))
    checked, problems, count = [], 0, 0
    for rows, found in in_chunks(check_chunk, path, "checking", chunk):
        for line, what in found:
            tqdm.write(f"{path}:{count + line + 1}: {what}")
        checked.append(rows)
        count, problems = count + len(rows), problems + len(found)
    rows = np.concatenate(checked)
    lines = np.flatnonzero(rows["key"])
    _, first, which = np.unique(rows["key"][lines], return_index=True, return_inverse=True)
    for line, before in zip(lines, lines[first[which]]):
        if line != before:
            print(f"{path}:{line + 1}: the key of line {before + 1} again")
            problems += 1
    seconds, rates = (rows[name][~np.isnan(rows[name])] for name in ("seconds", "rate"))
    if len(rates):
        usual = np.median(np.log(rates))
        away, lines = np.abs(np.log(rates) - usual), np.flatnonzero(~np.isnan(rows["rate"]))
        # a factor of two, or five standard deviations, which a median tells in spite of outliers
        for line in lines[away > max(math.log(2), 5 * 1.4826 * np.median(away))]:
            told = f"{rows['rate'][line]:.1f} characters a second where {math.exp(usual):.1f} are usual"
            print(f"{path}:{line + 1}: {told}: is the text another's?")
            problems += 1
    print(f"\nlines: {count}   problems: {problems}   hours: {seconds.sum(dtype=float) / 3600:.2f}")
    print(f"\n   seconds utterances\n{histogram(seconds, [0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30])}")
    print(f"\n   chars/s utterances\n{histogram(rates, [0, 2, 4, 6, 8, 10, 12, 15, 20, 30, 50])}")
    return problems
