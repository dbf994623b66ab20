"""Files that bits were lost from: each is refused by one line that says where, or means what it should.

What no decoder can know, as shares of 1,450 files of 0.7 s so changed, for each container:

- that samples were changed, where nothing checks them: 44 % of wav, 30 % of mp3, 8 % of wav of floats; none
  of flac, vorbis and opus, which bear checksums;
- without `duration`, that there was more, or at another rate: 25 % of mp3, 1 % of opus and flac, 0.1 % of
  wav. Cut at each percent of 20 s, wav, flac and mp3 are always refused; ogg and opus, at 91 and 93 places
  of 99, are taken for one that ends with its last whole page, of 1 s; aiff, au, w64 and rf64 are always
  taken. With `duration`, what lacks more than 0.1 s is refused.
"""

import faulthandler
import io
import json
import os
import resource
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from conftest import OK, lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dataset import make_examples

from dataset import Recordings
from errors import Refused
from manifest import read_audio, read_manifest

MEMORY = 500_000  # kB that no file of these may make the process grow by
SECONDS, RATE = 0.7, 16000
FIXED = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def watched():
    """Ends the process, with a traceback, if this takes 20 s; fails where memory grows, or on a warning."""
    faulthandler.dump_traceback_later(20, exit=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY


def is_told(refused: str, where: str) -> bool:
    return refused.startswith(f"{where}: ") and refused.isprintable()


# ---- what happens to bytes ----

NUMBERS = (0, 1, 999, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
FIELDS = [number.to_bytes(4, order) for number in NUMBERS for order in ("little", "big")]
FIELDS += [bytes(2), b"\xff\xff", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f"]
AT = st.integers(0, 63) | st.integers(0, 10**6)  # a header, or anywhere
FLIPPED = st.tuples(AT, st.just(1), st.binary(min_size=1, max_size=1))
SET = AT.flatmap(lambda at: st.sampled_from(FIELDS).map(lambda field: (at, len(field), field)))
SPLICED = st.tuples(AT, st.sampled_from([0, 1, 4, 100, 10**6]), st.binary(max_size=8))
REPEATED = st.tuples(AT, st.integers(1, 2000), st.none())
CHANGES = st.lists(FLIPPED | SET | SPLICED | REPEATED, min_size=1, max_size=3)


def changed(content: bytes, changes: list[tuple[int, int, bytes | None]]) -> bytes:
    """From `at` on, so many bytes are replaced, or where there is None, stand twice."""
    for at, size, new in changes:
        at %= len(content) + 1
        rest = content[at + size :]
        content = content[:at] + (content[at : at + size] * 2 if new is None else new) + rest
    return content


# ---- audio ----

CONTAINERS = {
    "wav": ("WAV", "PCM_16", 1),
    "wav of floats": ("WAV", "FLOAT", 2),
    "flac": ("FLAC", "PCM_16", 1),
    "vorbis": ("OGG", "VORBIS", 1),
    "opus": ("OGG", "OPUS", 2),
    "mp3": ("MP3", "MPEG_LAYER_III", 1),
}


def encoded(container: str) -> bytes:
    container, subtype, channels = CONTAINERS[container]
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(SECONDS * RATE), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=container, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    soundfile.write(folder / "ok.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    return folder


@pytest.mark.parametrize("container", CONTAINERS)
def test_changed_audio_is_refused_or_finite_and_as_long_as_stated(folder, container):
    whole, path = encoded(container), folder / "changed"

    @settings(max_examples=180, **FIXED)
    @given(CHANGES, st.booleans())
    def holds(changes, known):
        path.write_bytes(changed(whole, changes))
        record = {"wav": "changed", "txt": "a"} | ({"duration": SECONDS} if known else {})
        manifest = lines(folder, record, OK)
        with watched():
            utterances = read_manifest(str(manifest), to_train=False)
            utterance, where = utterances[0], f"{manifest}:1"
            try:
                waveform = read_audio(utterance)
            except Refused as refused:
                waveform = None
                assert is_told(refused.told, where)
            (parts, error) = make_examples(utterances, kind=Recordings)[0]
            example = make_examples(utterances)[0]

        if waveform is None or len(waveform) > 30 * 16000:
            assert example["where"] == f"{manifest}:2" and len(example["faults"]) == 1
            assert is_told(example["faults"][0], where)
        else:
            assert example["where"] == where and not example["faults"]
            assert abs(len(waveform) / 16000 - (SECONDS if known else utterance.seconds)) <= 0.1
        if waveform is None:
            assert not parts and is_told(error, where)
        else:
            assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
            assert parts and all(torch.isfinite(part["mel"]).all() for part in [*parts, example])

    holds()


# ---- manifests ----

RECORDS = [
    OK,
    OK | {"txt": "naïve 🎧 即便", "key": "a/b", "speaker": {"age": 7, "names": ["x", None]}},
    OK | {"start": 0.25, "duration": 0.5, "instruction": "Translate."},
    OK | {"target": "", "start": 0.5},
    {"wav": "./ok.wav", "target": "é\n"},
]
NAMES = st.sampled_from(["wav", "txt", "key", "instruction", "target", "start", "duration", "x"])
VALUES = [None, True, 0, -1, 0.5, 2, 1e9, 2**70, float("nan"), float("inf")]
VALUES += ["", " ", "ok.wav", "a\nb.wav", "\ud83d", "\0", [], {}, {"\ud83d": 1}]
LINE = st.builds(
    lambda record, more, ascii: json.dumps(record | more, ensure_ascii=ascii).encode(
        "utf-8", "surrogatepass"
    ),
    st.sampled_from(RECORDS),
    st.just({}) | st.dictionaries(NAMES, st.sampled_from(VALUES), max_size=1),
    st.booleans(),
)
TOKENS = '" \\ \\u \\ud83d { } [ ] : , 1e999 NaN - \n \r \r\n \ufeff \0 "wav":"ok.wav",'.split(" ")
TOKENS = [token.encode() for token in TOKENS] + [b" ", b"\xff", b"\xc0\x80", b"\xed\xa0\xbd"]
PUT = st.tuples(AT, st.sampled_from([0, 1]), st.sampled_from(TOKENS))


def named_once(pairs: list[tuple]) -> dict:
    for i, (name, _) in enumerate(pairs):
        if name in [other for other, _ in pairs[:i]]:
            raise ValueError(name)
    return dict(pairs)


def says(value) -> str:
    """All text of a value of JSON."""
    if isinstance(value, dict):
        return says([*value.keys(), *value.values()])
    return "".join(map(says, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def meaning(line: bytes, folder: str, to_train: bool) -> tuple | None:
    """What a line beside ok.wav, of 1 s, means: record, key, target, seconds; None if it is to be refused."""
    try:
        record = json.loads(str(line, "utf-8"), object_pairs_hook=named_once)
        says(record).encode()
    except ValueError:  # which an error of Unicode is, too
        return None
    if not isinstance(record, dict) or "wav" not in record:
        return None
    texts = [record[name] for name in ("wav", "txt", "key", "instruction", "target") if name in record]
    numbers = [record[name] for name in ("start", "duration") if name in record]
    if not all(isinstance(text, str) for text in texts):
        return None
    if any(isinstance(number, (bool, str, list, dict, type(None))) for number in numbers):
        return None
    if not all(0 <= number < 1e9 for number in numbers):
        return None
    name = os.path.normpath(os.path.join(folder, record["wav"]))
    there = name == os.path.join(folder, "ok.wav") and not record["wav"].endswith("/")
    seconds = record.get("duration", 1 - record.get("start", 0) if there else np.nan)
    if to_train and not (there and seconds > 0 and ("target" in record or record.get("txt", "").strip())):
        return None
    key = record.get("key", os.path.splitext(record["wav"].split("/")[-1])[0])
    return record, key, record.get("target", record.get("txt")), seconds


@settings(max_examples=1200, **FIXED)
@given(st.lists(LINE, min_size=1, max_size=4), st.lists(FLIPPED | SPLICED | REPEATED | PUT, max_size=2))
def test_a_changed_manifest_is_refused_by_line_or_means_what_it_says(folder, whole, changes):
    path = folder / "changed.jsonl"
    path.write_bytes(changed(b"\n".join(whole) + b"\n", changes))
    *found, last = path.read_bytes().split(b"\n")
    found += [last] if last else []
    for to_train in (False, True):
        meant = [meaning(line, str(folder), to_train) for line in found]
        with watched():
            try:
                read = list(read_manifest(str(path), to_train))
            except Refused as refused:
                where = f"{path}:{meant.index(None) + 1}" if meant else str(path)
                assert is_told(refused.told, where)
                continue
        assert meant and None not in meant
        assert [utterance.where for utterance in read] == [f"{path}:{i + 1}" for i in range(len(meant))]
        for utterance, (record, key, target, seconds) in zip(read, meant):
            assert json.dumps(utterance.record) == json.dumps(record)
            assert (utterance.key, utterance.target) == (key, target)
            np.testing.assert_allclose(utterance.seconds, seconds, atol=1e-4)
