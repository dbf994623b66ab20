"""Kills training and recognition at random moments, and checks that nothing but time is lost.

    python benchmarks/kill.py train --times 100       # SIGKILL to a run; the same command again
    python benchmarks/kill.py sigterm --times 20      # SIGTERM to one or both of two processes, or to torchrun
    python benchmarks/kill.py clean --times 20        # two processes under torchrun end with exit code 0
    python benchmarks/kill.py recognize --times 30    # 1 to 3 processes, one or all killed; another number again

Toy models, on a CPU. Runs are forked with their imports done, and start in 1 s in place of 7, but for some.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import ROOT, fork, make_llm, make_manifest, make_whisper
from test_train import FLAGS, data

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Run:
    """A script's processes: forked, or `real`, by python or by torchrun. Each in a group of its own."""

    def __init__(self, log: Path, processes: int, name: str, *args, real: bool = False):
        self.log, self.began = log, time.monotonic()
        log.write_text("")
        if real:
            command = [sys.executable, *(TORCHRUN if processes else []), name, *map(str, args)]
            how = dict(cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
            with open(log, "w") as file:
                self.processes = [subprocess.Popen(command, stdout=file, stderr=file, **how)]
        else:
            self.processes = fork(processes, log, name, *args)

    def send(self, signum: int, after: float, whom: slice = slice(None)) -> str:
        """So many seconds after the start, to the groups of these processes -> what had been printed then."""
        time.sleep(max(0, self.began + after - time.monotonic()))
        told = self.log.read_text()
        for process in self.processes[whom]:
            with suppress(ProcessLookupError):
                try:
                    os.killpg(process.pid, signum)
                except ProcessLookupError:  # it has not yet made a group
                    os.kill(process.pid, signum)
        return told

    def wait(self, whom: slice = slice(None), timeout: float = 60) -> list[int]:
        """Their exit codes. What takes longer is a deadlock."""
        until, codes = time.monotonic() + timeout, [None]
        while None in codes and time.monotonic() < until:
            time.sleep(0.01)
            codes = [p.poll() if hasattr(p, "poll") else p.exitcode for p in self.processes[whom]]
        if None in codes:
            self.send(signal.SIGKILL, 0)
            raise AssertionError(f"deadlock, {codes}:\n{self.log.read_text()[-4000:]}")
        return codes

    def end(self, *allowed: int) -> float:
        """The seconds it took until all exited with one of the codes (default: 0)."""
        codes = self.wait(timeout=600)
        assert set(codes) <= set(allowed or [0]), f"{codes}:\n{self.log.read_text()[-4000:]}"
        return time.monotonic() - self.began


def toy(folder: Path) -> Path:
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm")
    make_manifest(folder, [0.3 + 0.1 * (i % 7) for i in range(48)])
    return folder


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


def train(times: int, folder: Path, steps_each: int = 40, reals: int = 10) -> str:
    """reals: every which run is started by python itself."""
    log, flags = folder / "log", "--per_device_train_batch_size 2 --logging_steps 10 --save_steps 1"
    flags += " --save_total_limit 2 --projector_hidden_dim 4096"  # so that saving takes as long as a step
    flags = [*FLAGS, *flags.split(), "--max_steps", steps_each * times]
    Run(log, 0, "train.py", *data(folder, folder / "one"), *FLAGS, "--max_steps", 1).end()
    startup = Run(log, 0, "train.py", *data(folder, folder / "one"), *FLAGS, "--max_steps", 1).end()
    Run(log, 0, "train.py", *data(folder, folder / "whole"), *flags).end()
    out, newest, halves, in_saving, in_training, named = folder / "exp", 0, set(), 0, 0, 0
    for number in range(1, times + 1):
        real = number % reals == 0
        run = Run(log, 0, "train.py", *data(folder, out), *flags, real=real)
        run.send(signal.SIGKILL, random.uniform(0, (7 if real else startup) + 1.5))
        assert run.wait() == [-signal.SIGKILL], run.log.read_text()
        before, (newest, now) = (newest, halves), checkpoints(out)
        told = run.log.read_text()
        assert newest >= before[0], f"checkpoint-{before[0]} is lost"
        if newest > before[0]:  # it went on, and has named what it passed over
            assert all(f"checkpoint-{n}: not complete, passed" in told for n, _ in before[1] if n > before[0])
        in_training += newest > before[0] or bool(now - before[1])
        in_saving, named, halves = in_saving + bool(now - before[1]), named + told.count("passed over"), now
    Run(log, 0, "train.py", *data(folder, out), *flags).end()
    assert (out / "model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()
    told = f"{times} SIGKILLs, {in_training} in training, {in_saving} of them left a half-written checkpoint"
    return f"{told} (passed over {named} times), at step {newest} by then; the same bytes in the end"


def sigterm(times: int, folder: Path, reals: int = 4) -> str:
    """reals: every which run is by torchrun."""
    log, flags = folder / "log", "--per_device_train_batch_size 2 --save_steps 25 --max_steps 60"
    flags, counts = [*FLAGS, *flags.split()], dict.fromkeys(("saved", "in start-up", "too late"), 0)
    takes = [Run(log, 2, "train.py", *data(folder, folder / "whole"), *flags).end() for _ in range(2)][1]
    whole = (folder / "whole/model.safetensors").read_bytes()
    for number in range(1, times + 1):
        real, out = number % reals == 0, folder / f"exp-{number}"
        flags_now = [*data(folder, out), *flags, "--dataloader_num_workers", random.choice([0, 2])]
        run, whom = Run(log, 2, "train.py", *flags_now, real=real), slice(None)
        if not real:
            whom = random.choice([slice(None), slice(None), slice(0, 1), slice(1, 2)])
        told = run.send(signal.SIGTERM, random.uniform(0, takes + 8 * real), whom)
        codes = run.wait(whom)
        saved = f"SIGTERM: saved at step {checkpoints(out)[0]};" in run.log.read_text()
        if saved:  # torchrun itself exits with 1 after any signal
            assert run.wait() == ([1] if real else [143, 143]), codes
        elif (out / "model.safetensors").exists():
            run.end(0, 1 if real else 0)
        else:
            assert "'loss'" not in told and set(codes) <= {1, -15}, f"{codes}:\n{run.log.read_text()}"
            run.send(signal.SIGKILL, 0)  # of the other, as torchrun does
            run.wait()
        counts[
            "saved" if saved else "too late" if (out / "model.safetensors").exists() else "in start-up"
        ] += 1
        if saved:
            Run(log, 2, "train.py", *flags_now).end()
            assert (out / "model.safetensors").read_bytes() == whole
    return f"{times} SIGTERMs, {times // reals} to torchrun: " + ", ".join(
        f"{n} {k}" for k, n in counts.items()
    )


def clean(times: int, folder: Path) -> str:
    for number in range(times):
        out = folder / f"exp-{number}"
        workers = 2 * (number % 2)
        flags = [*data(folder, out), *FLAGS, "--max_steps", 6, "--dataloader_num_workers", workers]
        Run(folder / "log", 2, "train.py", *flags, real=True).end()
    return f"{times} of {times} runs of two processes ended with 0"


def recognize(times: int, folder: Path) -> str:
    log, beside, result = folder / "log", folder / "beside", folder / "beside" / "r.jsonl"
    Run(log, 0, "train.py", *data(folder, folder / "exp"), *FLAGS, "--max_steps", 1).end()
    beside.mkdir()
    paths = ["--projector_model_path", folder / "exp", "--data_path", folder / "data.jsonl"]
    flags = [*paths, "--result_path", result, "--num_beams", 1, "--batch_size", 2, "--max_new_tokens", 20]
    takes = [Run(log, 0, "recognize.py", *flags).end() for _ in range(2)][1]
    whole, kills, results, resumed = result.read_bytes(), 0, 0, 0
    result.unlink()
    while kills < times or os.listdir(beside):
        processes = random.choice([0, 2, 3])
        first = random.randrange(processes or 1)
        whom = random.choice([slice(None), slice(first, first + 1)])
        resumed += bool(os.listdir(beside))
        run = Run(log, processes, "recognize.py", *flags)
        if kills < times:
            run.send(signal.SIGKILL, random.uniform(0, takes), whom)
        codes = run.wait()
        assert set(codes) <= {0, -signal.SIGKILL}, log.read_text()
        kills += -signal.SIGKILL in codes
        if result.exists():
            assert result.read_bytes() == whole  # no line lost or doubled
        if set(codes) == {0} or os.listdir(beside) == [result.name]:
            assert os.listdir(beside) == [result.name], (os.listdir(beside), codes)
            results += 1
            result.unlink()
    return f"{kills} SIGKILLs of some or all processes, {resumed} times resumed, {results} results of the same bytes"


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
