"""No file that is given makes Ears run what is in it: weights, tokenizers, names of recordings."""

import json
import os
import pickle
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, lines, make_llm, make_whisper, refused, script
from safetensors.torch import load_file

from dataset import load_tokenizer
from encoder import load_encoder
from manifest import check, read_audio, read_manifest
from model import load_llm

STARTED, WATCHING = [], []  # an audit hook cannot be taken away again
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}


def hear(event: str, args: tuple) -> None:
    if WATCHING and (event in STARTS or event.startswith(("socket.connect", "urllib."))):
        STARTED.append((event, args))


sys.addaudithook(hear)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """Fails if a process is started, a connection opened, or `ran` written; stdin says yes to all."""
    read, write = os.pipe()
    os.write(write, b"y\n" * 100)
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        STARTED.clear()
        WATCHING.append(True)
        yield tmp_path / "ran"
        WATCHING.clear()
        assert stdin.read() == "y\n" * 100  # nobody asked
    assert not STARTED and not (tmp_path / "ran").exists()


class Malice:
    """A pickle that makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_whisper_file_that_is_a_malicious_pickle_is_refused(tmp_path, nothing_runs, form):
    path = make_whisper(tmp_path / "whisper.pt")
    content = torch.load(path, weights_only=True) | {"more": Malice(nothing_runs)}
    if form == "bare":
        path.write_bytes(pickle.dumps(content["more"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with refused("not a Whisper model"):
        load_encoder(str(path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_an_llm_whose_weights_are_a_malicious_pickle_is_refused(tmp_path, nothing_runs, name):
    folder = make_llm(tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"more": Malice(nothing_runs)}, folder / name)
    with refused("not a causal LLM"):
        load_llm(str(folder))


CODE = """open({ran!r}, "w")
from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model, PreTrainedTokenizerFast as Own
"""
AUTO = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": ["own.Own", "own.Own"],
}


@pytest.mark.parametrize("model_type", ["qwen2", "unheard_of"])
def test_code_in_an_llms_folder_never_runs_and_nobody_is_asked(tmp_path, nothing_runs, model_type):
    folder = make_llm(tmp_path / "llm")
    (folder / "own.py").write_text(CODE.format(ran=str(nothing_runs)))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {"auto_map": AUTO}
        content |= {"model_type": model_type, "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(content))
    for load, told in ((load_llm, "not a causal LLM"), (load_tokenizer, "no tokenizer")):
        if model_type == "unheard_of":
            with refused(told):
                load(str(folder))
        else:  # of a form that transformers has itself, which is then taken
            assert type(load(str(folder))).__module__.startswith("transformers.")


NEEDED = {
    "train.py": ["llm_model_name_or_path", "whisper_model_name_or_path", "data_path", "output_dir"],
    "recognize.py": ["projector_model_path", "data_path", "result_path"],
    "continuation.py": ["llm_model_name_or_path", "data_path", "result_path"],
}


@pytest.mark.parametrize("name, needed", NEEDED.items())
def test_no_flag_lets_foreign_code_run(capsys, name, needed):
    with pytest.raises(SystemExit):
        script(name, "--help")
    assert not re.search("trust|remote_code", capsys.readouterr().out)
    needed = [word for flag in needed for word in (f"--{flag}", "gone")]
    for flag in (["--trust_remote_code"], ["--trust_remote_code", "True"]):
        with pytest.raises((SystemExit, ValueError)) as refused:
            script(name, *needed, *flag)
        assert "--trust_remote_code" in f"{refused.value}{capsys.readouterr().err}"


def test_every_loader_of_transformers_is_told_not_to_trust():
    for path in ROOT.glob("*.py"):
        for call in re.findall(r"\.from_pretrained\(.*", path.read_text(encoding="utf-8")):
            assert "trust_remote_code=False" in call, (path, call)


NAMES = ["$(touch ran).wav", "`touch ran`", "; touch ran ;", "| touch ran", "touch ran |", "a\nb.wav", "-"]
NAMES += ["-o.wav", "~", "$HOME", "*", "file:a.wav", "http:a.wav", "\\", "%s%n", "'\"", " "]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_recordings_are_taken_as_they_stand(
    tmp_path, monkeypatch, nothing_runs, capsys, name, there
):
    monkeypatch.chdir(tmp_path)
    if there:
        with open(tmp_path / name, "wb") as file:
            soundfile.write(file, np.full(8000, 0.1), 16000, format="WAV")
    lines(tmp_path, {"wav": name, "txt": "six ch"})
    if not there:
        with refused("manifest.jsonl:1: no such audio file"):
            read_manifest("manifest.jsonl")
    else:
        assert len(read_audio(read_manifest("manifest.jsonl")[0])) == 8000
    assert check("manifest.jsonl") == (not there)
    assert len(re.findall("manifest.jsonl:", capsys.readouterr().out)) == (not there)


@pytest.mark.parametrize(
    "name", ["a\0.wav", "http://127.0.0.1:9/a.wav", "file:///dev/zero", "/dev/zero", "fifo"]
)
def test_names_that_cannot_be_recordings_are_refused_and_nothing_waits(tmp_path, nothing_runs, name):
    os.mkfifo(tmp_path / "fifo")
    for known in ({}, {"duration": 1}):
        manifest = str(lines(tmp_path, {"wav": name, "txt": "a"} | known))
        with refused("manifest.jsonl:1: no such audio file"):
            read_manifest(manifest)
        with refused("manifest.jsonl:1: no such audio file"):
            read_audio(read_manifest(manifest, to_train=False)[0])
