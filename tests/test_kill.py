"""Runs that are killed: nothing but time is lost. benchmarks/kill.py does it more often."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Run, refused, script
from test_train import FLAGS, data, logged
from transformers import TrainerState

sys.path.insert(0, str(ROOT / "benchmarks"))
import kill
from kill import checkpoints

from resumable import Parts

STEPS = [*FLAGS, "--per_device_train_batch_size", 2, "--max_steps", 24]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return kill.toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(toy) -> dict[int, bytes]:
    """The projector of an uninterrupted run of 24 steps, by one process and by two."""
    for processes in (0, 2):
        Run(toy / "log", processes, "train.py", *data(toy, toy / f"whole-{processes}"), *STEPS).end()
    return {processes: (toy / f"whole-{processes}/model.safetensors").read_bytes() for processes in (0, 2)}


def until(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


# Training, SIGKILL


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_state(self, path: str) -> None:
    Path(path).write_text(json.dumps({"global_step": 3, "log_history": []})[:20])
    die()


def die_in_rmtree(path: str, **kwargs) -> None:
    os.remove(os.path.join(path, "optimizer.pt"))
    die()


def train_and_die(args: list, module: str, name: str, call: int, instead) -> None:
    """A run that, at this call of a function, does something else instead."""
    owner = TrainerState if module == "TrainerState" else __import__(module)
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        return (instead if len(calls) == call else function)(*args, **kwargs)

    setattr(owner, name, counted)
    script("train.py", *args)


MOMENTS = [  # two calls of os.replace and three of torch.save in each saving; from step 3 on one is removed
    ("os", "replace", 2, die),  # config.json is new, model.safetensors is not there
    ("torch", "save", 4, die),  # at step 2, no optimizer
    ("torch", "save", 3, die),
    ("TrainerState", "save_to_json", 1, die_in_state),
    ("shutil", "rmtree", 1, die_in_rmtree),
]


def test_training_killed_while_it_saves_goes_on_from_the_checkpoint_before(toy, whole, tmp_path):
    args = [*data(toy, tmp_path), *STEPS, "--save_steps", 1, "--save_total_limit", 2]
    fork, seen = multiprocessing.get_context("forkserver"), []
    for moment in MOMENTS:
        process = fork.Process(target=train_and_die, args=(args, *moment))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        newest, halves = checkpoints(tmp_path)
        seen.append((newest, [steps for steps, _ in halves]))
    assert seen == [(0, [1]), (1, [2]), (1, [2]), (1, [2]), (3, [])]
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()  # it was being removed
    (tmp_path / "checkpoint-4").mkdir()
    told = Run(toy / "log", 0, "train.py", *args)
    told.end()
    assert f"{tmp_path}/checkpoint-4: not complete, passed over" in told.log.read_text()
    assert (tmp_path / "model.safetensors").read_bytes() == whole[0]
    assert logged(tmp_path, "loss") == logged(toy / "whole-0", "loss")


def test_training_killed_at_random_moments(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy", ignore=shutil.ignore_patterns("whole-*"))
    assert "the same bytes" in kill.train(2, tmp_path / "toy", steps_each=60)


# Training, SIGTERM


@pytest.mark.parametrize("processes, workers, whom", [(0, 2, slice(None)), (2, 0, slice(1, 2))])
def test_sigterm_saves_the_present_step_on_all_ranks(toy, whole, tmp_path, processes, workers, whom):
    args = [*data(toy, tmp_path / "exp"), *STEPS, "--dataloader_num_workers", workers]
    run = Run(tmp_path / "log", processes, "train.py", *args)
    until(lambda: run.log.read_text().count("'loss'") > 2)
    run.send(signal.SIGTERM, 0, whom)  # to the loader's workers too
    run.end(143)
    saved, halves = checkpoints(tmp_path / "exp")
    assert 2 < saved < 24 and not halves and not (tmp_path / "exp" / "model.safetensors").exists()
    assert f"SIGTERM: saved at step {saved}; the same command goes on" in run.log.read_text()
    Run(tmp_path / "log", processes, "train.py", *args).end()
    assert (tmp_path / "exp" / "model.safetensors").read_bytes() == whole[processes]


# Recognition


def test_recognition_killed_goes_on_with_any_number_of_processes(toy, whole, tmp_path):
    paths = ["--projector_model_path", toy / "whole-0", "--data_path", toy / "data.jsonl"]
    flags = [*paths, "--num_beams", 1, "--batch_size", 2, "--max_new_tokens", 20, "--result_path"]
    Run(toy / "log", 0, "recognize.py", *flags, tmp_path / "whole.jsonl").end()
    (tmp_path / "r").mkdir()
    result, kept = tmp_path / "r" / "r.jsonl", []

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in result.parent.glob("*.part-*"))

    for processes, whom in ((2, slice(0, 1)), (3, slice(None)), (0, slice(None))):
        enough = lines() + 2
        run = Run(toy / "log", processes, "recognize.py", *flags, result)
        until(lambda enough=enough: lines() >= enough)
        run.send(signal.SIGKILL, 0, whom)
        assert -signal.SIGKILL in run.wait() and not result.exists()
        kept.append(lines())
    assert kept == sorted(kept)
    with open(f"{result}.part-0", "ab") as file:
        file.write(b'[0, [{"hyp": "tor')
    Run(toy / "log", 2, "recognize.py", *flags, result).end()
    assert result.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert os.listdir(result.parent) == ["r.jsonl"]


SETTINGS = {"projector": "0a", "data": "1b", "num_beams": 3, "batch_size": 16, "instruction": None}


@pytest.fixture
def parts(tmp_path):
    return lambda rank=0, **other: Parts(str(tmp_path / "r.jsonl"), SETTINGS | other, rank)


def test_parts_keep_whole_batches_of_any_process(parts):
    for number in range(4):
        parts(number % 2).append(number, [{"hyp": f"{number}\n\u2028é", "score": -0.1 / 3}])
    assert parts(7).read() == {i: [{"hyp": f"{i}\n\u2028é", "score": -0.1 / 3}] for i in range(4)}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_parts_drop_what_was_not_written_to_its_end(parts, tmp_path, kept):
    path = tmp_path / "r.jsonl.part-0"
    one = parts()
    one.append(0, ["a"])
    one.append(1, ["b"])
    content = path.read_bytes().splitlines(keepends=True)
    for torn in range(len(content[kept])):
        path.write_bytes(b"".join(content[:kept]) + content[kept][:torn])
        assert parts().read() == ({0: ["a"]} if kept == 2 else {})
        parts().append(5, ["c"])
        assert parts().read() == ({0: ["a"], 5: ["c"]} if kept == 2 else {5: ["c"]})
        assert len(path.read_bytes().splitlines()) == max(kept, 1) + 1


@pytest.mark.parametrize("name", [*SETTINGS, "new"])
def test_parts_of_other_settings_are_refused_and_named(parts, tmp_path, name):
    parts().append(0, ["a"])
    with refused(f"{tmp_path / 'r.jsonl.part-0'}: begun with other {name}; "):
        parts(**{name: "other"}).read()


GARBAGE = [b"garbage\n", b"\xff\xfe\n", b"[1, 2]\n", b"1\n", b"\n", json.dumps(SETTINGS).encode() + b"\n7\n"]


@pytest.mark.parametrize("content", [*GARBAGE, GARBAGE[-1][:-2] + b'{"a": 1}\n', GARBAGE[-1][:-2] + b"[1]\n"])
def test_parts_that_are_garbage_are_refused(parts, tmp_path, content):
    path = tmp_path / "r.jsonl.part-3"
    path.write_bytes(content)
    with refused(f"{path}: not what was kept of a run; remove it"):
        parts().read()


@pytest.mark.parametrize("after", ["write", "replace"])
def test_two_may_finish_at_once(parts, tmp_path, monkeypatch, after):
    """The other finishes before or after the first one has put the result in its place."""
    parts(0).append(0, ["a"])
    parts(1).append(1, ["b"])
    replace, calls = os.replace, []

    def both(*args):
        calls.append(args)
        if after == "replace":
            replace(*args)
        if len(calls) == 1:
            parts(1).finish(["a", "b"])
        if after == "write":
            replace(*args)

    monkeypatch.setattr(os, "replace", both)
    parts(0).finish(["a", "b"])
    assert len(calls) == 2
    assert (tmp_path / "r.jsonl").read_text() == "a\nb\n" and os.listdir(tmp_path) == ["r.jsonl"]


def test_what_a_finish_that_was_killed_left_is_removed_by_the_next(parts, tmp_path, monkeypatch):
    parts(1).append(0, ["a"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        parts(1).finish(["a"])
    assert parts(0).read() == {0: ["a"]}
    parts(0).finish(["a"])
    assert os.listdir(tmp_path) == ["r.jsonl"]
