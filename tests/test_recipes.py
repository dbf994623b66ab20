"""recipes/librispeech and recipes/aishell, on miniatures of the official folders."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, refused, script

from errors import Refused
from manifest import read_manifest

REAL = Path(os.environ.get("EARS_DATA", ROOT.parent / "shared" / "data"))
LIBRISPEECH = {  # where each is put
    "2412-153948-0000": "train-clean-100",
    "1089-134686-0000": "test-clean",
    "1089-134686-0001": "test-clean",
    "1089-134691-0000": "test-clean",
    "1089-134691-0001": "test-other",
    "1995-1837-0001": "train-other-500",
    "61-70968-0000": "train-clean-360",
}
AISHELL = {"train": ["S0002", "S0003", "S0004"], "dev": ["S0724"], "test": ["S0764", "S0765"]}  # speakers


def recordings(corpus: str, text: str) -> list[tuple[np.ndarray, int, str]]:
    """Waveform, rate and text of each real one; else of noise, as long as so much text takes."""
    if (REAL / corpus / "all.jsonl").is_file():
        records = map(json.loads, (REAL / corpus / "all.jsonl").read_text(encoding="utf-8").splitlines())
        return [(*soundfile.read(REAL / corpus / one["wav"]), one["txt"]) for one in records]
    random, made = np.random.default_rng(0), []
    for count in range(1, 13):
        words = " ".join([text] * count) if text.isascii() else text * count
        made.append((0.1 * random.standard_normal(len(words) * 1200), 16000, words))
    return made


def published(recipe: str):
    """Its prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / recipe / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(recipe: str, *args, **counts) -> int:
    """Runs its prepare.py, with these counts for the published ones; returns its exit code."""
    module = published(recipe)
    vars(module).update(counts)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        module.main()
    if isinstance(end.value, Refused):
        raise end.value
    return end.value.code


def read(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def librispeech(tmp_path) -> Path:
    """LibriSpeech/test-clean/1089/134691/1089-134691-0000.flac, 1089-134691.trans.txt and the like."""
    corpus, made = tmp_path / "corpora" / "LibriSpeech", recordings("librispeech", "SO HE WAITED")
    for (key, split), (waveform, rate, text) in zip(LIBRISPEECH.items(), made):
        speaker, chapter, _ = key.split("-")
        folder = corpus / split / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{key}.flac", waveform, rate)
        with open(folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as file:
            file.write(f"{key} {text}\n")
    return corpus


@pytest.fixture
def aishell(tmp_path) -> Path:
    """data_aishell/wav/train/S0002/BAC009S0002W0122.wav, transcript/, and one recording that has none."""
    corpus, made = tmp_path / "corpora" / "data_aishell", iter(recordings("aishell3", "而对楼市成交"))
    (corpus / "transcript").mkdir(parents=True)
    with open(corpus / "transcript" / "aishell_transcript_v0.8.txt", "w", encoding="utf-8") as file:
        for split, speakers in AISHELL.items():
            for speaker in speakers:
                folder = corpus / "wav" / split / speaker
                folder.mkdir(parents=True)
                for number in (122, 123):
                    waveform, rate, text = next(made)
                    soundfile.write(folder / f"BAC009{speaker}W0{number}.wav", waveform, rate)
                    file.write(f"BAC009{speaker}W0{number} {text[:2]} {text[2:]}\n")
                if speaker == "S0003":
                    soundfile.write(folder / f"BAC009{speaker}W0124.wav", waveform, rate)
    return corpus


def assert_usable(manifest: Path) -> None:
    """It trains, its durations are those of its recordings, and dataset.py finds no problem."""
    assert len(read_manifest(str(manifest))) == len(read(manifest))
    for record in read(manifest):
        assert set(record) == {"key", "wav", "txt", "duration", "speaker"}
        seconds = soundfile.info(manifest.parent / record["wav"]).duration
        assert record["duration"] == pytest.approx(seconds, abs=1e-3)
    with pytest.raises(SystemExit) as end:
        script("dataset.py", manifest)
    assert end.value.code == 0


def test_librispeech(librispeech, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("librispeech", "--librispeech", librispeech, "--output_dir", out) == 1
    told = capsys.readouterr().out
    assert re.search(r"^test-clean: 3 utterances, 0\.\d\d h; 2620 should be there$", told, re.M)
    assert re.search(r"^train-other-500: 1 utterances, 0\.\d\d h; 148688 should be there$", told, re.M)
    records = read(out / "test-clean.jsonl")
    keys = [key for key, split in LIBRISPEECH.items() if split == "test-clean"]
    assert [record["key"] for record in records] == keys
    assert all(record["txt"] == record["txt"].lower() and record["speaker"] == "1089" for record in records)
    assert records[0]["wav"] == f"{librispeech}/test-clean/1089/134686/1089-134686-0000.flac"
    assert {path.stem for path in out.iterdir()} == {*LIBRISPEECH.values(), "train-960"}
    parts = [read(out / f"train-{part}.jsonl") for part in ("clean-100", "clean-360", "other-500")]
    assert read(out / "train-960.jsonl") == sum(parts, [])
    assert_usable(out / "test-clean.jsonl")


def test_aishell(aishell, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("aishell", "--aishell", aishell, "--output_dir", out) == 1
    told = capsys.readouterr().out
    assert re.search(r"^test: 4 utterances, 0\.\d\d h; 7176 should be there$", told, re.M)
    assert "without a transcript, left out: 1 recordings; 325 should be there\n" in told
    for split, speakers in AISHELL.items():
        keys = [f"BAC009{speaker}W0{number}" for speaker in speakers for number in (122, 123)]
        assert [record["key"] for record in read(out / f"{split}.jsonl")] == keys
    assert not any(" " in record["txt"] for record in read(out / "train.jsonl"))
    assert read(out / "dev.jsonl")[0]["speaker"] == "S0724"
    assert_usable(out / "train.jsonl")


def test_text_as_is(librispeech, aishell, tmp_path):
    prepare("librispeech", "--librispeech", librispeech, "--output_dir", tmp_path, "--text", "as_is")
    assert all(record["txt"].isupper() for record in read(tmp_path / "test-clean.jsonl"))
    prepare("aishell", "--aishell", aishell, "--output_dir", tmp_path, "--text", "as_is")
    assert all(record["txt"][2] == " " for record in read(tmp_path / "test.jsonl"))


def test_manifest_moves_with_the_corpus_under_it(librispeech, aishell):
    folder = librispeech.parent
    prepare("librispeech", "--librispeech", librispeech, "--output_dir", folder)
    prepare("aishell", "--aishell", aishell, "--output_dir", folder)
    folder.rename(folder.with_name("moved"))
    for name in ("train-960", "test-clean", "train", "dev", "test"):
        assert len(read_manifest(str(folder.with_name("moved") / f"{name}.jsonl")))


def test_complete_corpus_ends_with_0(librispeech, aishell, tmp_path, capsys):
    counts = Counter(LIBRISPEECH.values())
    args = ["--librispeech", librispeech, "--output_dir", tmp_path]
    assert prepare("librispeech", *args, UTTERANCES=counts) == 0
    counts = {split: 2 * len(speakers) for split, speakers in AISHELL.items()}
    args = ["--aishell", aishell, "--output_dir", tmp_path]
    assert prepare("aishell", *args, UTTERANCES=counts, UNSAID=1) == 0
    told = capsys.readouterr().out
    assert "should" not in told and "left out: 1 recordings\n" in told


def test_published_counts_add_up():
    assert sum(published("librispeech").TRAINING.values()) == 281241
    assert sum(published("aishell").UTTERANCES.values()) + published("aishell").UNSAID == 141925


SPOILED = [  # a corpus, a file of it, what stands in it then (None: it is not there), what is said
    ("librispeech", "61-70968.trans.txt", None, "61-70968.trans.txt: FileNotFoundError: "),
    ("librispeech", "61-70968.trans.txt", b"\xff", "61-70968.trans.txt: UnicodeDecodeError: "),
    ("librispeech", "61-70968.trans.txt", b"61-70968-0000\n", "61-70968.trans.txt:1: no txt"),
    ("librispeech", "1089-134686-0001.flac", None, "1089-134686.trans.txt:2: no such audio file: "),
    ("librispeech", "1995-1837-0001.flac", b"garbage", "1995-1837-0001.flac: no audio that can be read"),
    ("aishell", "aishell_transcript_v0.8.txt", None, "transcript_v0.8.txt: FileNotFoundError: "),
    ("aishell", "BAC009S0765W0122.wav", None, "aishell_transcript_v0.8.txt:11: no such audio file: "),
]


@pytest.mark.parametrize("recipe, name, content, says", SPOILED)
def test_what_is_missing_is_refused_with_its_path(recipe, name, content, says, request, tmp_path):
    corpus = request.getfixturevalue(recipe)
    (path,) = corpus.rglob(name)
    path.unlink() if content is None else path.write_bytes(content)
    with refused(str(path) if says.endswith(": ") else name, says):
        prepare(recipe, f"--{recipe}", corpus, "--output_dir", tmp_path)


def test_another_folder_is_refused(tmp_path):
    with refused(f"--librispeech {tmp_path}: none of train-clean-100, "):
        prepare("librispeech", "--librispeech", tmp_path)
    with refused(f"--aishell {tmp_path}: no speakers in wav/train"):
        prepare("aishell", "--aishell", tmp_path)


def test_packed_speakers_are_refused_with_the_command_that_unpacks_them(aishell, tmp_path):
    for speaker in ("S0002", "S0005"):  # the first is there unpacked, too
        (aishell / "wav" / f"{speaker}.tar.gz").touch()
    with refused(f"{aishell}/wav/S0005.tar.gz: 1 speakers are still packed: cd {aishell}/wav && for "):
        prepare("aishell", "--aishell", aishell, "--output_dir", tmp_path)


def commands(recipe: str, corpus: Path, folder: Path) -> list[list[str]]:
    """What its run.sh runs, as [script, *arguments]: python and torchrun only write that down here."""
    folder.mkdir()
    for name in ("python", "torchrun"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >>{folder}/log; echo >>{folder}/log\n')
        (folder / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["sh", f"recipes/{recipe}/run.sh", str(corpus)], cwd=ROOT, env=environ, check=True)
    ran = [line.split("\t")[:-1] for line in (folder / "log").read_text().splitlines()]
    return [words[next(i for i, word in enumerate(words) if word.endswith(".py")) :] for words in ran]


@pytest.mark.parametrize("recipe, rows, rate", [("librispeech", 3, "%WER"), ("aishell", 5, "%CER")])
def test_commands_of_run_sh_work(recipe, rows, rate, toy, tmp_path, request, capsys):
    (name, *args), *ran = commands(recipe, request.getfixturevalue(recipe), tmp_path / "bin")
    assert name == f"recipes/{recipe}/prepare.py"
    assert [name for name, *_ in ran].count("train.py") == rows
    there, here = f"exp/{recipe}", str(tmp_path / "out")
    assert prepare(recipe, *(word.replace(there, here) for word in args)) == 1  # it is no whole corpus

    toys = {"--llm_model_name_or_path": toy / "llm", "--whisper_model_name_or_path": toy / "whisper.pt"}
    quick = {"train.py": "--max_steps 2 --dataloader_num_workers 0", "recognize.py": "--max_new_tokens 4"}
    for name, *args in ran[: len(ran) // rows]:
        args = [toys.get(before, word) for before, word in zip(["", *args], args)]
        args = [str(word).replace(there, here) for word in args]
        with nullcontext() if name in quick else pytest.raises(SystemExit, match="0"):
            script(name, *args, *quick.get(name, "").split())
    assert capsys.readouterr().out.count(rate) >= 2
