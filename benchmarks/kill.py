"""Kills training and recognition at random moments, and checks that nothing but time is lost.

    python benchmarks/kill.py train --times 100       # SIGKILL to a run; the same command again
    python benchmarks/kill.py sigterm --times 20      # SIGTERM to one or two processes, or torchrun
    python benchmarks/kill.py clean --times 20        # two processes under torchrun end with exit code 0
    python benchmarks/kill.py recognize --times 30    # 1 to 3 processes, one or all killed; again

Toy models, on a CPU. Runs are forked with their imports done, and start in 1 s in place of 7, but for some.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import Run, make_llm, make_manifest, make_whisper
from test_train import FLAGS, data


def toy(folder: Path) -> Path:
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm")
    make_manifest(folder, [0.3 + 0.1 * (i % 7) for i in range(48)])
    return folder


def projector(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def checkpoints(out: Path) -> tuple[int, set]:
    """The steps of the newest complete checkpoint, and the others: (steps, time of change)."""
    newest, halves = 0, set()
    for folder in out.glob("checkpoint-*"):
        steps = int(folder.name[11:])
        try:
            json.loads((folder / "trainer_state.json").read_text())
            newest = max(newest, steps)
        except (OSError, ValueError):
            halves.add((steps, folder.stat().st_mtime_ns))
    return newest, halves


def train(times: int, folder: Path, steps_each: int = 40) -> str:
    log, flags = folder / "log", "--per_device_train_batch_size 2 --logging_steps 10 --save_steps 1"
    flags += " --save_total_limit 2 --projector_hidden_dim 4096"  # so that saving takes as long as a step
    flags = [*FLAGS, *flags.split(), "--max_steps", steps_each * times]
    Run(log, 0, "train.py", *data(folder, folder / "whole"), *flags).end()
    startup = Run(log, 0, "train.py", *data(folder, folder / "whole"), *flags).end()  # it has ended
    newest, halves, in_saving, in_training, named = 0, set(), 0, 0, 0
    for number in range(1, times + 1):
        real = number % 10 == 0
        run = Run(log, 0, "train.py", *data(folder, folder / "exp"), *flags, real=real)
        run.send(signal.SIGKILL, random.uniform(0, (7 if real else startup) + 1.5))
        assert run.wait() == [-signal.SIGKILL], run.log.read_text()
        last, before, (newest, halves), told = newest, halves, checkpoints(folder / "exp"), log.read_text()
        assert newest >= last, f"checkpoint-{last} is lost"
        if newest > last:  # it went on, and has named what it passed over
            assert all(f"checkpoint-{n}: not complete, passed" in told for n, _ in before if n > last)
        in_training += newest > last or bool(halves - before)
        in_saving += bool(halves - before)
        named += told.count("passed over")
    Run(log, 0, "train.py", *data(folder, folder / "exp"), *flags).end()
    assert projector(folder / "exp") == projector(folder / "whole")
    told = f"{times} SIGKILLs, {in_training} in training, {in_saving} of them left a half-written checkpoint"
    return f"{told} (passed over {named} times), at step {newest} by then; the same bytes in the end"


def sigterm(times: int, folder: Path) -> str:
    log, flags = folder / "log", "--per_device_train_batch_size 2 --save_steps 25 --max_steps 60"
    flags, counts = [*FLAGS, *flags.split()], dict.fromkeys(("saved", "in start-up", "too late"), 0)
    for name in ("first", "whole"):  # the first is slow
        takes = Run(log, 2, "train.py", *data(folder, folder / name), *flags).end()
    for number in range(1, times + 1):
        real, out = number % 4 == 0, folder / f"exp-{number}"
        args = [*data(folder, out), *flags, "--dataloader_num_workers", random.choice([0, 2])]
        run = Run(log, 2, "train.py", *args, real=real)
        whom = random.choice([slice(0, 2), slice(0, 2), slice(0, 1), slice(1, 2)][: 1 if real else 4])
        told = run.send(signal.SIGTERM, random.uniform(0.1, takes + 8 * real), whom)
        codes = run.wait(whom)
        if f"SIGTERM: saved at step {checkpoints(out)[0]};" in log.read_text():
            counts["saved"] += 1
            run.end(1 if real else 143)  # torchrun itself exits with 1 after any signal
            Run(log, 2, "train.py", *args).end()
            assert projector(out) == projector(folder / "whole")
        elif (out / "model.safetensors").exists():
            counts["too late"] += 1
            run.end(0, real)
        else:
            counts["in start-up"] += 1
            assert "'loss'" not in told and set(codes) <= {1, -15}, f"{codes}:\n{log.read_text()}"
            run.send(signal.SIGKILL)  # to the other, as torchrun does
            run.wait()
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{times} SIGTERMs, {times // 4} of them to torchrun: {told}; the same bytes after a resume"


def clean(times: int, folder: Path) -> str:
    for number in range(times):
        flags = ["--max_steps", 6, "--dataloader_num_workers", 2 * (number % 2)]
        args = [*data(folder, folder / f"exp-{number}"), *FLAGS, *flags]
        Run(folder / "log", 2, "train.py", *args, real=True).end()
    return f"{times} of {times} runs of two processes ended with 0"


def recognize(times: int, folder: Path) -> str:
    log, beside, result = folder / "log", folder / "beside", folder / "beside" / "r.jsonl"
    Run(log, 0, "train.py", *data(folder, folder / "exp"), *FLAGS, "--max_steps", 1).end()
    beside.mkdir()
    flags = ["--projector_model_path", folder / "exp", "--data_path", folder / "data.jsonl", "--num_beams", 1]
    flags += ["--result_path", result, "--batch_size", 2, "--max_new_tokens", 20]
    for _ in range(2):  # the first is slow
        takes = Run(log, 0, "recognize.py", *flags).end()
    whole, kills, results, resumed = result.read_bytes(), 0, 0, 0
    result.unlink()
    while kills < times or os.listdir(beside):
        resumed += bool(os.listdir(beside))
        processes = random.choice([0, 2, 3])
        one = random.randrange(processes or 1)
        run = Run(log, processes, "recognize.py", *flags)
        if kills < times:
            whom = random.choice([slice(0, 3), slice(one, one + 1)])
            run.send(signal.SIGKILL, random.uniform(0.1, takes), whom)
        codes = run.wait()
        assert set(codes) <= {0, -signal.SIGKILL}, log.read_text()
        kills += -signal.SIGKILL in codes
        assert not result.exists() or result.read_bytes() == whole  # no line is lost or doubled
        if set(codes) == {0} or os.listdir(beside) == [result.name]:
            assert os.listdir(beside) == [result.name], os.listdir(beside)
            results += 1
            result.unlink()
    told = f"{kills} SIGKILLs of some or all processes, {resumed} times resumed"
    return f"{told}, {results} results of the same bytes"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", choices=["train", "sigterm", "clean", "recognize"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        told = globals()[args.mode](args.times, toy(Path(name)))
    print(f"{args.mode}: {told}; {(time.monotonic() - began) / 60:.1f} minutes")
