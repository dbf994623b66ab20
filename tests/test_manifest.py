"""manifest.py: lines refused, or opened by their index; audio as it is heard, cut, or found wrong."""

import io
import json
import multiprocessing
import operator
import os
import pickle
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import OK, ROOT, lines, make_manifest, refused, script

import manifest as manifest_module
from manifest import Manifest, check, cut, in_chunks, lines_of, read_audio, read_manifest

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


# ---- index ----


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where indices are kept, of manifests that are over 1000 bytes; these are read in parallel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest_module, "CHUNK", 1000)
    return tmp_path / "cache" / "ears"


def many(clips: Path, count: int = 100, end: str = "\n", last: str = "\n", **changed) -> Path:
    """A manifest of so many lines of many lengths; `changed`: line_7 in place of the seventh."""
    random = np.random.default_rng(0)
    records = [OK | {"key": str(i), "txt": "é" * random.integers(1, 40)} for i in range(count)]
    records = [record | {"duration": 0.5 + i / 1000} for i, record in enumerate(records)]
    for name, record in changed.items():
        records[int(name[5:]) - 1] = record
    path = clips / "many.jsonl"
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records) + last
    path.write_bytes(text.encode())
    return path


def never(*args):
    raise AssertionError("lines are read")


def test_every_line_begins_in_one_chunk_wherever_the_borders_are(tmp_path):
    for content in (b"a\n\nbcd\r\nef\n", b"abc", b"\n", b"\n\n", b"ab\ncd"):
        (tmp_path / "a").write_bytes(content)
        whole, size = content.splitlines(keepends=True), len(content)
        for chunk in range(1, size + 2):
            found = [
                pair for at in range(0, size, chunk) for pair in lines_of(tmp_path / "a", at, at + chunk)
            ]
            assert [line for _, line in found] == whole
            assert all(content.startswith(line, offset) for offset, line in found)


@pytest.mark.parametrize("end, last", [("\n", "\n"), ("\n", ""), ("\r\n", "\r\n")])
@pytest.mark.parametrize("chunk", [50, 997, 4096])
def test_chunks_read_in_parallel_equal_one_piece(clips, cache, monkeypatch, chunk, end, last):
    path = str(many(clips, 60, end, last))
    monkeypatch.setattr(manifest_module, "CHUNK", 10**6)
    whole = list(read_manifest(path))
    monkeypatch.setattr(manifest_module, "CHUNK", chunk)
    assert list(read_manifest(path)) == whole and len(whole) == 60
    assert whole[59] == read_manifest(path)[59]
    with pytest.raises(IndexError):
        read_manifest(path)[60]


@pytest.mark.parametrize("line", [1, 55, 100])
@pytest.mark.parametrize("broken", [{"txt": "a"}, OK | {"wav": "gone.wav"}])
def test_a_refusal_in_a_late_chunk_names_its_line(clips, cache, line, broken):
    with refused(f"many.jsonl:{line}: "):
        read_manifest(str(many(clips, **{f"line_{line}": broken})))


def test_an_index_is_kept_and_opened_again_without_reading_lines(clips, cache, monkeypatch):
    path = str(many(clips))
    first = read_manifest(path)
    assert len(os.listdir(cache)) == 1
    monkeypatch.setattr(manifest_module, "in_chunks", never)
    again = read_manifest(path)
    assert list(again) == list(first) and isinstance(again.index, np.memmap)
    np.testing.assert_array_equal(again.seconds, first.seconds)


def test_no_index_is_kept_if_a_line_bears_no_duration_or_is_refused_or_there_are_few(clips, cache):
    read_manifest(str(many(clips, line_70=OK)))
    with refused(":70: "):
        read_manifest(str(many(clips, line_70=OK | {"wav": "gone.wav", "duration": 1})))
    read_manifest(str(many(clips, 5)))
    assert not cache.exists()


def test_a_changed_manifest_is_not_taken_for_the_old_one(clips, cache):
    path = many(clips)
    read_manifest(str(path))
    stat, old = path.stat(), path.read_bytes()
    path.write_bytes(old.replace(b'"key": "7"', b'"kez": "7"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # of the same size
    assert read_manifest(str(path))[7].key == "ok"
    path.write_bytes(old + json.dumps(OK | {"duration": 1}).encode())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same time
    assert len(read_manifest(str(path))) == 101


def test_recognitions_index_which_saw_no_audio_is_not_taken_for_trainings(clips, cache):
    path = str(many(clips, line_70=OK | {"wav": "gone.wav", "duration": 1}))
    assert len(read_manifest(path, to_train=False)) == 100 and len(os.listdir(cache)) == 1
    with refused(":70: ", "no such audio"):
        read_manifest(path)


def test_where_no_cache_can_be_written_all_is_read_each_time(clips, cache):
    cache.parent.write_text("a file where a folder should be")
    path = str(many(clips))
    assert list(read_manifest(path)) == list(read_manifest(path))


def test_keep_leaves_lines_out_and_the_others_know_where_they_stood(clips, cache):
    whole = read_manifest(str(many(clips)))
    kept = whole.keep(whole.seconds > 0.55)
    assert list(kept) == [utterance for utterance in whole if utterance.seconds > 0.55]
    assert kept[0].where.endswith(f":{len(whole) - len(kept) + 1}")
    np.testing.assert_array_equal(kept.seconds, whole.seconds[whole.seconds > 0.55])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_a_manifest_and_share_its_index(clips, cache, method):
    manifest = read_manifest(str(many(clips)))
    manifest = manifest.keep(manifest.seconds > 0.51)
    utterances, shuffled = list(manifest), np.random.default_rng(0).permutation(len(manifest)).tolist()
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as processes:
        found = list(processes.map(operator.getitem, [manifest] * len(shuffled), shuffled))
    assert found == [utterances[i] for i in shuffled]
    whole = Manifest(manifest.path, manifest.index)
    assert len(pickle.dumps(whole)) < 500  # not the index, of 1200 bytes here and 120 MB at 10^7 lines


def test_workers_that_were_forked_with_the_file_open_do_not_disturb_each_other(clips, cache):
    manifest = read_manifest(str(many(clips)))
    utterances = list(manifest)  # which opens it
    loader = torch.utils.data.DataLoader(manifest, 5, num_workers=2, collate_fn=list)
    assert [utterance for batch in loader for utterance in batch] == utterances


def die(span: tuple) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_it_and_does_not_hang(clips):
    with refused("many.jsonl", "opening"):
        list(in_chunks(die, str(many(clips)), "opening", 1000))


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


# ---- long recordings ----


@pytest.mark.parametrize("length", [0.1, 30, 30 + 1 / 16000, 30.15, 44.9, 60 + 1 / 16000, 90.05, 600])
@pytest.mark.parametrize("kind", ["noise", "zeros", "silent at its end"])
def test_parts_make_up_the_waveform_and_none_is_too_long_or_too_short(length, kind):
    waveform = np.random.default_rng(0).standard_normal(round(length * 16000)).astype(np.float32)
    waveform[{"noise": len(waveform), "zeros": 0, "silent at its end": len(waveform) // 2}[kind] :] = 0
    parts = cut(waveform)
    np.testing.assert_array_equal(np.concatenate(parts), waveform)
    assert all(0.1 * 16000 <= len(part) <= 30 * 16000 for part in parts)
    assert all(len(part) >= 15 * 16000 for part in parts[:-1])
    assert len(parts) == 1 or length > 30


@pytest.mark.parametrize("seed", range(3))
def test_cuts_lie_in_the_quiet_places(seed):
    random = np.random.default_rng(seed)
    waveform = random.standard_normal(600 * 16000).astype(np.float32)
    gaps = np.cumsum(random.uniform(4, 12, 100))
    gaps = (gaps[gaps < 599] * 16000).astype(int)
    for gap in gaps:
        waveform[gap : gap + 6400] *= 1e-3  # 0.4 s
    borders = np.cumsum([len(part) for part in cut(waveform)])[:-1]
    assert len(borders) >= 20
    for border in borders:
        assert np.any((gaps + 1600 <= border) & (border <= gaps + 4800))  # half of 0.2 s from its ends


# ---- check ----

PROBLEMS = {  # what stands at a line -> what is said of it
    "no JSON": "not a line of JSON",
    "not UTF-8": "not a line of JSON",
    "name twice": "twice",
    "no wav": "wav and txt is needed",
    "mistyped": "txt must be a string, not 7",
    "missing": "no such audio file",
    "empty": "no audio that can be read",
    "garbage": "no audio that can be read",
    "truncated.wav": "cut short",
    "truncated, known.wav": "cut short",
    "truncated.flac": "",
    "truncated, known.mp3": "cut short",
    "nan": "NaN",
    "silent": "silent",
    "short": "under 201 samples",
    "long": "31.0 s: training leaves out",
    "no text": "no txt to learn",
    "key again": "the key of line 1 again",
    "outlier": "characters a second",
}


def problem(folder: Path, kind: str, i: int) -> tuple[dict | str | bytes, float]:
    """A line with this problem, whose recording it writes; the seconds that can be heard all the same."""
    name, record = f"p{i}{Path(kind).suffix or '.wav'}", {"txt": "twelve chars and so on"}
    samples = 0.1 * np.random.default_rng(i).standard_normal(32000)
    samples = {"nan": samples * np.nan, "silent": samples * 1e-3, "short": samples[:200]}.get(kind, samples)
    if kind == "long":
        samples, record["txt"] = np.tile(samples, 16)[: 31 * 16000], "twelve chars" * 31
    if kind != "missing":
        soundfile.write(folder / name, samples, 16000, subtype="FLOAT" if kind == "nan" else None)
    content = (folder / name).read_bytes() if kind != "missing" else b""
    if kind in ("empty", "garbage") or kind.startswith("truncated"):
        left = {"empty": b"", "garbage": bytes(range(256)) * 20}.get(kind, content[: len(content) // 2])
        (folder / name).write_bytes(left)
    if "known" in kind:
        record["duration"] = 2
    record = {
        "no text": {"txt": " "},
        "mistyped": {"txt": 7},
        "key again": record | {"key": "0"},
        "outlier": {"txt": "x" * 99},
    }.get(kind, record)
    record = record if kind == "no wav" else {"wav": name} | record
    broken = {
        "no JSON": '{"wav": ',
        "not UTF-8": b'{"wav": "\xff"}',
        "name twice": '{"wav": "a", "wav": "b"}',
    }
    heard = {"silent": 2, "long": 31, "key again": 2, "outlier": 2}
    return broken.get(kind, record), heard.get(kind, 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, list[dict], list[float]]:
    """A folder with recordings of 1.0 to 2.9 s, their records of 13 characters a second, their seconds."""
    seconds = [1 + i / 10 for i in range(20)]
    folder = make_manifest(tmp_path_factory.mktemp("good"), seconds).parent
    return (
        folder,
        [{"wav": f"{i}.wav", "txt": "x" * round(13 * s)} for i, s in enumerate(seconds)],
        seconds,
    )


def bars(printed: str) -> list[int]:
    """The counts of all histograms, one after the other."""
    return [int(count) for count in re.findall(r"^ *(?:\S+ to|over) \S+ +(\d+)", printed, re.M)]


def test_check_finds_each_problem_once_by_its_line_and_counts(good, capsys):
    folder, records, seconds = good
    told, everything = {}, list(records)
    for i, (kind, said) in enumerate(PROBLEMS.items()):
        line, heard = problem(folder, kind, i)
        everything.insert(2 * i + 1, line)
        told[2 * i + 2], seconds = said, [*seconds, heard]
    path = lines(folder, *everything)
    with pytest.raises(SystemExit) as ended:
        script("dataset.py", path)
    assert ended.value.code == 1

    printed = capsys.readouterr().out
    found = re.findall(r"^(.*?):(\d+): (.*)", printed, re.M)
    assert sorted(int(line) for _, line, _ in found) == sorted(told)
    assert all(name == str(path) and told[int(line)] in what for name, line, what in found), printed
    seconds = [length for length in seconds if length]
    counts = f"lines: {len(everything)}   problems: {len(told)}   hours: {sum(seconds) / 3600:.2f}"
    assert f"\n{counts}\n" in printed
    by_second = [0, 10, 13, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bars(printed)[: len(by_second)] == by_second and sum(bars(printed)) == 2 * len(seconds)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_check_says_nothing_but_counts_of_good_data_and_shows_how_far_it_is(good, capsys, monkeypatch):
    folder, records, seconds = good
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(SystemExit) as ended:
        script("dataset.py", lines(folder, *records))
    assert not ended.value.code
    assert re.search(r"checking: 100%.*B/s", sys.stderr.getvalue())
    printed = capsys.readouterr().out
    assert printed.startswith(f"\nlines: 20   problems: 0   hours: {sum(seconds) / 3600:.2f}\n")
    assert bars(printed) == [0, 10, 10] + [0, 0, 0, 0, 0, 0, 20]  # 12 to 15 characters a second
    assert all(line == line.rstrip() for line in printed.splitlines())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("line", [{"wav": "gone.wav", "txt": "a"}, "", OK, OK | {"target": ""}])
def test_check_copes_with_one_line(clips, capsys, line):
    assert check(str(lines(clips, line))) == (line in ("", {"wav": "gone.wav", "txt": "a"}))
    assert "lines: 1 " in capsys.readouterr().out


def test_check_refuses_what_is_no_manifest(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.jsonl", "gone.jsonl", ""):
        with refused(str(tmp_path / name)):
            check(str(tmp_path / name))


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
