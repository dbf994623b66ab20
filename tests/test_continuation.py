"""continuation.py: the LLM is asked what training will ask, no kill loses or doubles a line, servers too."""

import http.server
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import make_llm, make_manifest, make_tokenizer, make_whisper, one_rank, ranks, refused, script
from test_dataset import make_family

from dataset import SpeechDataset, load_tokenizer, render_prompt
from manifest import read_manifest
from model import load_llm

BLSP = "Continue the following text in a coherent and engaging style with less than 40 words."
SECONDS = [0.3, 3.0, 1.1, 0.7, 2.2, 1.6, 0.5, 2.7, 1.3, 0.9, 1.9, 0.4]  # of toy recordings, so of texts


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """llm/, which ends some of its texts, and data.jsonl, with absolute paths, so that it may move."""
    folder = tmp_path_factory.mktemp("continuation")
    end = make_tokenizer().eos_token_id
    make_llm(folder / "llm", hidden_size=64, initializer_range=0.3, eos_token_id=end)
    records = read(make_manifest(folder, SECONDS))
    write(folder / "data.jsonl", [record | {"wav": str(folder / record["wav"])} for record in records])
    return folder


def command(folder: Path, result: Path, *more) -> list:
    """Flags for folder's LLM and manifest, unless `more` says otherwise; the last of two counts."""
    paths = ["--llm_model_name_or_path", folder / "llm", "--data_path", folder / "data.jsonl"]
    return [*paths, "--result_path", result, "--max_new_tokens", 12, "--batch_size", 2, *more]


def continued(folder: Path, result: Path, *more) -> list[dict]:
    script("continuation.py", *command(folder, result, *more))
    return read(result)


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """The result of an uninterrupted run."""
    continued(folder, folder / "whole.jsonl")
    return (folder / "whole.jsonl").read_bytes()


# ---- what the LLM is asked, and what is kept of it ----


@pytest.mark.parametrize("family", ["chatml", "gemma", "mistral", "none"])
def test_the_llm_is_asked_what_training_asks_with_the_transcript_for_speech(folder, tmp_path, family):
    """Greedy by hand, one forward pass a token, behind the ids of SpeechDataset around the transcript's."""
    make_llm(tmp_path / "llm", tokenizer=make_family(family), hidden_size=64, initializer_range=0.3)
    flags = ["--llm_model_name_or_path", tmp_path / "llm", "--data_path", folder / "data.jsonl"]
    records = continued(folder, folder / f"{tmp_path.name}.jsonl", *flags, "--instruction", "Go on:")
    tokenizer, llm = load_tokenizer(str(tmp_path / "llm")), load_llm(str(tmp_path / "llm"))
    prompt = render_prompt(tokenizer)
    end_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(prompt["end_of_turn"])}
    utterances = read_manifest(str(folder / f"{tmp_path.name}.jsonl"))
    training = SpeechDataset(utterances, tokenizer, prompt, None)
    for utterance, record in zip(utterances, records, strict=True):
        before, after, target = training.text_ids(utterance)
        assert tokenizer.decode(after).lstrip().startswith("Go on:")
        ids, new = before + training.ids(record["txt"]) + after, []
        while len(new) < 12 and not end_ids & set(new):
            new.append(int(llm(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert record.get("cut", False) == (not end_ids & set(new))
        assert (
            tokenizer.decode([i for i in new if i not in end_ids], skip_special_tokens=True).strip()
            == (record["target"])
        )
        assert tokenizer.decode(target[:-1]) == record["target"]


def test_order_and_all_keys_of_the_manifest_are_kept(folder, whole):
    given, records = read(folder / "data.jsonl"), read(folder / "whole.jsonl")
    added = [{name: record.pop(name) for name in ("instruction", "target")} for record in records]
    cut = [record.pop("cut", False) for record in records]
    assert records == given and set(cut) == {True, False}
    assert {text["instruction"] for text in added} == {BLSP}
    assert len({text["target"] for text in added}) > 8


def test_a_result_in_another_folder_finds_its_recordings_and_train_py_takes_it(folder, tmp_path):
    records = [record | {"wav": f"{i}.wav"} for i, record in enumerate(read(folder / "data.jsonl")[:4])]
    records[1] |= {"wav": str(folder / "1.wav"), "speaker": {"age": 7}, "target": "old", "instruction": "old"}
    data = write(folder / "four.jsonl", records)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")  # `..` of it is real/, not tmp_path
    result = tmp_path / "link" / "blsp.jsonl"
    found = continued(folder, result, "--data_path", data)
    assert not os.path.isabs(found[0]["wav"]) and found[1]["wav"] == str(folder / "1.wav")
    assert (
        found[1]["speaker"] == {"age": 7} and found[1]["instruction"] == BLSP != found[1]["target"] != "old"
    )
    for utterance, name in zip(read_manifest(str(result)), ["0.wav", "1.wav", "2.wav", "3.wav"]):
        assert os.path.samefile(utterance.path, folder / name)

    make_whisper(tmp_path / "whisper.pt")
    flags = [
        "--llm_model_name_or_path",
        folder / "llm",
        "--whisper_model_name_or_path",
        tmp_path / "whisper.pt",
    ]
    flags += ["--data_path", result, "--output_dir", tmp_path / "exp", "--projector_type", "blsp"]
    script("train.py", *flags, "--max_steps", 1, "--disable_tqdm", True)
    assert json.loads((tmp_path / "exp" / "config.json").read_text())["projector_type"] == "blsp"


def test_batches_and_processes_change_nothing(folder, whole, tmp_path):
    for flags in (["--batch_size", 1], ["--batch_size", 5], ["--seed", 7]):
        result = tmp_path / f"{flags[0]}{flags[1]}.jsonl"
        continued(folder, result, *flags)
        assert result.read_bytes() == whole
    ranks(3, tmp_path / "log", "continuation.py", *command(folder, tmp_path / "ranks.jsonl"))
    assert (tmp_path / "ranks.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.glob("ranks.jsonl*")) == ["ranks.jsonl"]


def test_samples_differ_and_can_be_had_again(folder, tmp_path):
    first = continued(folder, tmp_path / "first.jsonl", "--sample", 3)
    keys = [Path(record["wav"]).stem for record in first]
    assert keys == [str(i) for i in range(12) for _ in range(3)]
    assert all(len({record["target"] for record in first[i : i + 3]}) == 3 for i in range(0, 36, 3))
    ranks(2, tmp_path / "log", "continuation.py", *command(folder, tmp_path / "2.jsonl", "--sample", 3))
    assert (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    assert continued(folder, tmp_path / "3.jsonl", "--sample", 3, "--seed", 1) != first


def test_an_instruction_and_a_limit_count(folder, whole, tmp_path):
    longer = continued(folder, tmp_path / "longer.jsonl", "--max_new_tokens", 30)
    for record, short in zip(longer, map(json.loads, whole.splitlines())):
        assert ("cut" in short) or record["target"] == short["target"]
    assert longer != read(folder / "whole.jsonl")
    other = continued(folder, tmp_path / "other.jsonl", "--instruction", "Repeat it.")
    assert {record["instruction"] for record in other} == {"Repeat it."}
    assert [r["target"] for r in other] != [r["target"] for r in read(folder / "whole.jsonl")]


# ---- kills ----


def killed(log: Path, name: str, processes: int, *args, when) -> None:
    """Runs a script in that many processes, and kills them all, at once, when `when()` says so."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["train", "recognize", "deepspeed", "conftest"])
    workers = [
        forkserver.Process(target=one_rank, args=(rank, processes, "0", log, name, args))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    while not when() and any(worker.is_alive() for worker in workers):
        time.sleep(0.001)
    for worker in workers:
        worker.kill()  # SIGKILL
    for worker in workers:
        worker.join()


def test_kills_change_no_byte(folder, whole, tmp_path, kills: int = 4):
    """Killed when a few lines more are done, with one to three processes; torn by hand besides."""
    result, draw = tmp_path / "blsp.jsonl", random.Random(0)

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("blsp.jsonl.partial-*"))

    for _ in range(kills):
        before, more = lines(), draw.randrange(3)
        processes = draw.randrange(1, 4)
        flags = command(folder, result)
        killed(
            tmp_path / "log", "continuation.py", processes, *flags, when=lambda n=before + more: lines() > n
        )
        if not result.exists():
            with open(tmp_path / f"blsp.jsonl.partial-{draw.randrange(3)}", "ab") as file:
                file.write(b'{"item": 3, "tar')  # torn
    assert 0 < lines() and not result.exists()  # so there is something to go on from
    continued(folder, result)
    assert result.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blsp.jsonl", "log"]


@pytest.mark.parametrize("step", ["replace", "remove"])
def test_a_kill_while_the_result_is_written_changes_nothing(folder, whole, tmp_path, monkeypatch, step):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, step, stop)
        continued(folder, tmp_path / "blsp.jsonl")
    assert (tmp_path / "blsp.jsonl").exists() == (step == "remove")
    continued(folder, tmp_path / "blsp.jsonl")
    assert (tmp_path / "blsp.jsonl").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["blsp.jsonl"]


@pytest.fixture
def half(folder, tmp_path) -> Path:
    """A folder with the partial file of a run that was killed."""
    partial = tmp_path / "blsp.jsonl.partial-0"
    flags = command(folder, tmp_path / "blsp.jsonl")
    enough = lambda: partial.exists() and partial.read_bytes().count(b"\n") > 4  # noqa: E731
    killed(tmp_path / "log", "continuation.py", 1, *flags, when=enough)
    assert not (tmp_path / "blsp.jsonl").exists()
    return tmp_path


def test_what_is_done_is_not_done_again(folder, half, whole):
    partial = half / "blsp.jsonl.partial-0"
    settings, first, *others = partial.read_text().splitlines()
    mine = json.loads(first) | {"target": "mine"}
    partial.write_text("\n".join([settings, json.dumps(mine), *others, ""]))
    expected = list(map(json.loads, whole.splitlines()))
    expected[mine["item"]]["target"] = "mine"
    assert continued(folder, half / "blsp.jsonl") == expected
    with refused("blsp.jsonl: is there already"):
        continued(folder, half / "blsp.jsonl")


@pytest.mark.parametrize(
    "name, value",
    [("instruction", "Go on."), ("max_new_tokens", "13"), ("sample", "2"), ("seed", "1")]
    + [("llm_model_name_or_path", "other"), ("data_path", "other.jsonl")],
)
def test_a_run_with_other_settings_is_refused(folder, half, name, value):
    if name == "data_path":
        value = write(half / value, read(folder / "data.jsonl")[:11])
        name = "sha256 of the manifest"
    flag = "data_path" if "manifest" in name else name
    with refused(str(half / "blsp.jsonl.partial-0"), name):
        continued(folder, half / "blsp.jsonl", f"--{flag}", value)


def test_what_cannot_be_continued_is_refused(folder, tmp_path):
    wav = str(folder / "0.wav")
    for txt in ({}, {"txt": ""}, {"txt": " "}, {"target": "yes"}):
        data = write(tmp_path / "data.jsonl", [{"wav": wav, "txt": "yes"}, {"wav": wav, **txt}])
        with refused(f"{data}:2: no txt"):
            continued(folder, tmp_path / "blsp.jsonl", "--data_path", data)
    with refused("--result_path", "no such folder"):
        continued(folder, tmp_path / "gone" / "blsp.jsonl")
    (tmp_path / "blsp.jsonl.partial-0").write_text("\0\0\n")
    with refused("blsp.jsonl.partial-0: damaged"):
        continued(folder, tmp_path / "blsp.jsonl")
    for flags in (["--batch_size", 0], ["--sample", -1], ["--max_new_tokens", 0], ["--api_model", "llm"]):
        with pytest.raises(SystemExit, match="2"):
            continued(folder, tmp_path / "blsp.jsonl", *flags)


# ---- servers ----


class Server(http.server.BaseHTTPRequestHandler):
    """Speaks as much of OpenAI's protocol as is needed; `answers` are what it says, by the transcript."""

    protocol_version = "HTTP/1.1"
    paths, answers, failures, asked = {"/v1/completions"}, {}, [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, choice = 200, {"index": 0, "finish_reason": "stop"}
        type(self).asked.append(body)
        said = body.get("prompt") or body["messages"][0]["content"]
        text = next((answer for txt, answer in self.answers.items() if txt in said), "and so on ")
        choice |= {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        if self.path not in self.paths:
            status = 404
        elif self.failures:
            status = type(self).failures.pop() or 200
        text = json.dumps({"id": "1", "object": "", "created": 1, "model": "m", "choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("retry-after-ms", "1")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Server, listening, and the flags to reach it."""
    handler = type("Handler", (Server,), {"asked": [], "failures": []})
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    handler.flags = ["--api_base", f"http://127.0.0.1:{listening.server_port}/v1", "--api_model", "m"]
    yield handler
    listening.shutdown()
    listening.server_close()


def test_what_is_empty_or_refused_is_set_apart(folder, server, tmp_path, capsys):
    wav = str(folder / "0.wav")
    texts = {"one": " and two ", "two": " ", "three": "I'm sorry, but I can't assist with that.", "four": ""}
    texts["i'm sorry but i can't assist"] = (
        "I'm sorry, but I can't assist, he said."  # as the transcript has it
    )
    data = write(tmp_path / "data.jsonl", [{"wav": wav, "txt": txt, "more": txt} for txt in texts])
    server.answers = texts
    records = continued(folder, tmp_path / "blsp.jsonl", "--data_path", data, *server.flags)
    first, _, _, _, last = ({"wav": wav, "txt": txt, "more": txt, "instruction": BLSP} for txt in texts)
    assert records == [first | {"target": "and two"}, last | {"target": list(texts.values())[-1]}]
    rejected = read(tmp_path / "blsp.jsonl.rejected.jsonl")
    assert [(record["txt"], record["rejected"]) for record in rejected] == [
        *[("two", "empty"), ("three", "refusal"), ("four", "empty")],
    ]
    assert [record["target"] for record in rejected] == ["", texts["three"], ""]
    assert "2 continuations, left out: 2 empty, 1 refusals; cut: 0" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_server_is_asked_the_same_and_again_where_it_fails(folder, server, tmp_path, capsys, path):
    server.paths, server.failures = {path}, [503, 429] * 3
    records = continued(folder, tmp_path / "blsp.jsonl", *server.flags, "--concurrency", 3)
    given = read(folder / "data.jsonl")
    assert records == [record | {"instruction": BLSP, "target": "and so on"} for record in given]
    before, after = render_prompt(load_tokenizer(str(folder / "llm")))["prompt"].split("<|speech|>")
    asked = {body["prompt"] if "prompt" in body else body["messages"][0]["content"] for body in server.asked}
    prompts = {before + record["txt"] + after.replace("<|instruction|>", BLSP) for record in given}
    messages = {f"{record['txt']}\n{BLSP}" for record in given}
    assert asked - prompts == (messages if "chat" in path else set())
    assert asked >= (messages if "chat" in path else prompts)
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in server.asked} == {
        ("m", 12, 0.0)
    }
    told = rf"12 continuations by /{path[4:]} in \d+\.\d s: \d+\.\d a second at concurrency 3"
    assert re.search(told, capsys.readouterr().out)


def test_a_server_that_refuses_is_one_error_and_what_it_gave_is_kept(folder, server, tmp_path):
    server.failures = [401, *[0] * 6]  # 0 is no failure
    with refused("--api_base http", "401"):
        continued(folder, tmp_path / "blsp.jsonl", *server.flags, "--concurrency", 1)
    assert len(server.asked) == 7  # the first is asked twice, to see whether the server has such a path
    server.asked.clear()
    assert len(continued(folder, tmp_path / "blsp.jsonl", *server.flags)) == 12
    assert len(server.asked) == 1 + 12 - 5
    server.paths = set()
    with refused("--api_base http", "404"):
        continued(folder, tmp_path / "another.jsonl", *server.flags)


def test_transformers_serve_writes_what_the_llm_here_writes(folder, tmp_path):
    """With a tokenizer that puts a BOS before any text by itself, as the rendered prompt does."""
    tokenizer = make_family("gemma")
    ends = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    sizes = {"hidden_size": 64, "initializer_range": 0.3, "eos_token_id": ends}
    llm = make_llm(tmp_path / "llm", tokenizer=tokenizer, **sizes)
    flags = ["--llm_model_name_or_path", llm, "--max_new_tokens", 60]
    here = continued(folder, tmp_path / "here.jsonl", *flags)
    assert {"cut" in record for record in here} == {True, False}

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["transformers.cli.transformers", "serve", llm, "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        serving = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log)
    try:
        while serving.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
            time.sleep(0.1)
        flags += ["--api_base", f"http://localhost:{port}/v1", "--api_model", llm]
        assert continued(folder, tmp_path / "there.jsonl", *flags) == here, (tmp_path / "log").read_text()
    finally:
        serving.kill()
        serving.wait()
