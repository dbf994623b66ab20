"""manifest.py: lines refused, or opened by their index; audio as it is heard, cut, or found wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import OK, ROOT, lines, refused

from manifest import read_audio, read_manifest

# ---- manifest ----


HUGE = "1" + "0" * 400  # a legal JSON number, and more than a float holds
BROKEN_LINES = {
    "no JSON": '{"wav": "ok.wav", ',
    "blank": "",
    "not UTF-8": b'{"wav": "ok.wav", "txt": "\xff\xfe"}',
    "half a surrogate pair": r'{"wav": "ok.wav", "txt": "\ud83d"}',
    "a list": "[1, 2]",
    "a string": '"ok.wav"',
    "no wav": {"txt": "yes"},
    "wav is null": {"wav": None, "txt": "yes"},
    "wav is a number": {"wav": 7, "txt": "yes"},
    "wav is missing": {"wav": "gone.wav", "txt": "yes"},
    "wav is missing, its length known": {"wav": "gone.wav", "txt": "yes", "duration": 1},
    "wav is the folder": {"wav": "", "txt": "yes", "duration": 1},
    "wav is garbage": {"wav": "garbage.wav", "txt": "yes"},
    "wav is empty": {"wav": "empty.wav", "txt": "yes"},
    "wav has no samples": {"wav": "no_samples.wav", "txt": "yes"},
    "a name twice": '{"wav": "ok.wav", "txt": "yes", "txt": "no"}',
    "brackets without end": "[" * 100_000,
    "too many digits": '{"wav": "ok.wav", "txt": "yes", "x": 1' + "0" * 5000 + "}",
    "no txt": {"wav": "ok.wav"},
    "txt is empty": {"wav": "ok.wav", "txt": ""},
    "txt is blank": {"wav": "ok.wav", "txt": " \t"},
    "txt is null": {"wav": "ok.wav", "txt": None},
    "txt is a list": {"wav": "ok.wav", "txt": ["yes"]},
    "key is a number": OK | {"key": 7},
    "instruction is a number": OK | {"instruction": 7},
    "target is null": OK | {"target": None},
    "starts after the end": OK | {"start": 2},
    **{
        f"{name} is {value!r}": OK | {"start": 0, "duration": 0.5} | {name: value}
        for name in ("start", "duration")
        for value in (-1, float("nan"), float("inf"), "1", True, None, [1])
    },
    "duration is 0": OK | {"duration": 0},
    "start is huge": f'{{"wav": "ok.wav", "txt": "yes", "start": {HUGE}}}',
    "duration is huge": f'{{"wav": "ok.wav", "txt": "yes", "duration": {HUGE}}}',
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_is_refused_by_file_and_line(clips, line):
    manifest = lines(clips, OK, line, OK)
    with refused(f"{manifest}:2: "):
        read_manifest(str(manifest))


@pytest.mark.parametrize("content", [None, b"", "folder"])
def test_a_manifest_that_is_missing_empty_or_a_folder_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with refused(str(path)):
        read_manifest(str(path))


def test_wav_is_relative_to_its_manifest_or_absolute(clips, tmp_path, monkeypatch):
    manifest = lines(clips, OK, OK | {"wav": str(clips / "ok.wav")})
    monkeypatch.chdir(tmp_path)
    for path in (str(manifest), os.path.relpath(manifest)):
        assert [os.path.samefile(u.path, clips / "ok.wav") for u in read_manifest(path)] == [True, True]


def test_a_record_is_carried_as_it_stands_and_only_its_defaults_are_filled_in(clips):
    full = OK | {"key": "a/b", "target": "oui", "speaker": {"age": 7}, "start": 0.25, "duration": 0.5}
    silence = OK | {"target": ""}
    first, second, third = read_manifest(str(lines(clips, OK, full, silence)))
    assert [u.record for u in (first, second, third)] == [OK, full, silence]
    assert [u.key for u in (first, second, third)] == ["ok", "a/b", "ok"]
    assert [u.target for u in (first, second, third)] == ["yes", "oui", ""]
    assert [u.seconds for u in (first, second, third)] == [1.0, 0.5, 1.0]


def test_recognition_needs_no_txt(clips):
    (utterance,) = read_manifest(str(lines(clips, {"wav": "ok.wav"})), to_train=False)
    assert utterance.key == "ok"


# ---- audio ----


def heard(path: Path, **record) -> np.ndarray:
    """The waveform of a record of this file."""
    manifest = path.parent / "one.jsonl"
    manifest.write_text(json.dumps({"wav": path.name, "txt": "a", **record}))
    return read_audio(*read_manifest(str(manifest)))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("container", ["wav", "flac", "ogg", "mp3"])
def test_any_container_rate_and_channels_give_the_same_waveform(tmp_path, container, rate, channels):
    tone, seconds = 1000.0, 1.5
    sine = np.sin(2 * np.pi * tone * np.arange(int(seconds * rate)) / rate)
    samples = np.stack([0.4 * sine, 0.2 * sine], axis=1) if channels == 2 else 0.3 * sine
    soundfile.write(tmp_path / f"a.{container}", samples, rate)

    waveform = heard(tmp_path / f"a.{container}")
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - seconds * 16000) <= 1600  # the 0.1 s that a known duration may be off
    middle = waveform[4000:20000]  # one second, so that a bin of the spectrum is 1 Hz
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() == tone
    assert abs(20 * np.log10(np.sqrt(2 * (middle**2).mean()) / 0.3)) < 1  # dB
    if container in ("wav", "flac"):  # lossless: in phase with a sine that was never resampled
        expected = 0.3 * np.sin(2 * np.pi * tone * np.arange(4000, 20000) / 16000)
        np.testing.assert_allclose(middle, expected, atol=1e-3)


@pytest.mark.parametrize("start, duration", [(0, 0.5), (0.25, 0.5), (0.123, 1.877), (1.5, None), (0, None)])
def test_start_and_duration_cut_to_the_sample(tmp_path, start, duration):
    samples = np.random.default_rng(0).uniform(-1, 1, 2 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    record = {"start": start} if duration is None else {"start": start, "duration": duration}
    first = round(start * 16000)
    last = len(samples) if duration is None else first + round(duration * 16000)
    np.testing.assert_array_equal(heard(tmp_path / "a.wav", **record), samples[first:last])


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_a_part_is_what_the_whole_holds_there(tmp_path, rate):
    time = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * (200 + 400 * time) * time), rate)
    whole, part = heard(tmp_path / "a.wav"), heard(tmp_path / "a.wav", start=0.5, duration=1)
    assert len(part) == 16000
    np.testing.assert_allclose(part[800:-800], whole[8000 + 800 : 24000 - 800], atol=1e-2)


def broken_audio(path: Path, how: str) -> dict:
    """Writes a file that soundfile opens, and yet must not be trained on; returns what its record knows."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(3 * 16000)
    if how in ("NaN", "infinite"):
        samples[20000] = float("nan" if how == "NaN" else "inf")
    if how == "short":
        samples = samples[:200]  # one fewer than log_mel_spectrogram can reflect at its ends
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {
        "truncated": {"duration": 3.0},
        "longer than said": {"duration": 2.5},
        "a part past the end": {"start": 2, "duration": 2},
        "start past the end": {"start": 4, "duration": 2},
    }.get(how, {})


@pytest.mark.parametrize(
    "how",
    [
        "NaN",
        "infinite",
        "short",
        "truncated",
        "longer than said",
        "a part past the end",
        "start past the end",
        "vanished",
    ],
)
def test_audio_that_is_not_what_it_should_be_is_refused_by_line_and_file(tmp_path, how):
    path = tmp_path / "a.wav"
    record = broken_audio(path, how)
    (utterance,) = read_manifest(str(lines(tmp_path, {"wav": path.name, "txt": "a", **record})))
    if how == "vanished":
        path.unlink()
    with refused("manifest.jsonl:1: ", str(path)):
        read_audio(utterance)


def test_the_shortest_audio_that_whisper_takes_is_201_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(201, 0.1), 16000)
    waveform = heard(tmp_path / "a.wav")
    assert whisper.log_mel_spectrogram(torch.from_numpy(waveform)).shape == (80, 1)


# ---- real recordings ----

SHARED = Path(os.environ.get("EARS_DATA", ROOT.parent / "shared" / "data"))
REAL = ["fsdd/test", "fsdd/train", "an4/all", "librispeech/all", "ljspeech/all", "aishell3/all"]


@pytest.mark.parametrize("name", REAL)
def test_real_recordings_are_heard_whole(name):
    manifest = SHARED / f"{name}.jsonl"
    if not manifest.is_file():
        pytest.skip(f"no recordings at {manifest}; set EARS_DATA to their folder")
    utterances = read_manifest(str(manifest))
    with open(manifest, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert [utterance.record for utterance in utterances] == records
    for utterance, record in zip(utterances, records):
        waveform = read_audio(utterance)
        assert np.isfinite(waveform).all() and np.abs(waveform).max() > 0.001
        assert abs(len(waveform) / 16000 - record["duration"]) <= 0.1
