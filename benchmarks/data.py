"""Is the data path the brake, does the cost of an epoch grow linearly, and what is in the start-up?

    python benchmarks/data.py ljspeech/all.jsonl aishell3/all.jsonl librispeech/all.jsonl

Real recordings, repeated until they are 1,000, 10,000 and 100,000 lines of one manifest; train.py itself, on
the demo's backbones, where the model is so small that the data path is hardest to keep up with. Each size is
run --rounds times in turn, forwards and backwards, for --steps steps; the first fifth of them is not counted.
Prints speed, the share of time that the model waits, and the padding, as medians and spreads; then
seconds from the command to the end of the first step, and of what that consists of.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SIZES = (1_000, 10_000, 100_000)
IMPORTS = ("torch", "transformers.Trainer", "deepspeed", "whisper", "train")


def seconds_of(*command) -> float:
    """Of a Python command, from start to exit. Its output is shown only if it fails."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - start


def grow(manifests: list[str], size: int, path: Path) -> Path:
    """A manifest of `size` lines, of all of those in turn, each recording with its duration."""
    records = []
    for manifest in manifests:
        folder = Path(manifest).resolve().parent
        for line in Path(manifest).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kept = {name: record[name] for name in ("txt", "duration") if name in record}
            records.append(json.dumps({"wav": str(folder / record["wav"]), **kept}) + "\n")
    path.write_text("".join(islice(cycle(records), size)), encoding="utf-8")
    return path


def spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def means(logs: list[list[dict]], name: str) -> list[float]:
    return [sum(entry[name] for entry in log) / len(log) for log in logs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data_path", nargs="+", help="manifests (jsonl) of the recordings")
    parser.add_argument("--steps", type=int, default=150, help="of 8 utterances; default: 150")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader; default: 2")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")

    with tempfile.TemporaryDirectory() as folder:
        folder, every = Path(folder), args.steps // 5
        seconds_of("demo/make_backbones.py", "--output_dir", folder)

        def train(size: int, steps: int) -> tuple[float, list[dict]]:
            flags = f"--max_steps {steps} --logging_steps {max(1, min(every, steps))} --save_strategy no"
            took = seconds_of(
                *("train.py", "--llm_model_name_or_path", folder / "llm"),
                *("--whisper_model_name_or_path", folder / "whisper.pt", "--output_dir", folder / "out"),
                *("--data_path", folder / f"{size}.jsonl", "--dataloader_num_workers", args.workers),
                *("--dataloader_prefetch_factor", 8, *flags.split()),
            )
            state = json.loads((folder / "out/trainer_state.json").read_text(encoding="utf-8"))
            return took, [entry for entry in state["log_history"] if "loss" in entry]

        measured = {size: [] for size in SIZES}
        for size in SIZES:
            grow(args.data_path, size, folder / f"{size}.jsonl")
        for number in range(args.rounds):
            for size in SIZES[:: (-1) ** number]:
                measured[size].append(train(size, args.steps)[1][1:])
        print(f"{args.workers} workers, {args.rounds} rounds of {args.steps} steps of 8 utterances\n")
        print(
            "| lines | times real time | of that at 1,000 lines | data wait | padding |\n"
            + "| --- " * 5
            + "|"
        )
        for size, logs in measured.items():
            speeds, waits, paddings = (
                means(logs, name) for name in ("times_real_time", "data_wait", "padding")
            )
            first = means(measured[SIZES[0]], "times_real_time")
            ratios = [mine / other for mine, other in zip(speeds, first)]
            print(f"| {size:,} | {' | '.join(map(spread, [speeds, ratios, waits, paddings]))} |")

        print("\n| start-up | seconds |\n| --- | --- |")
        for name in IMPORTS:
            module, _, attribute = name.partition(".")
            code = f"from {module} import {attribute}" if attribute else f"import {module}"
            print(f"| {code} | {median([seconds_of('-c', code) for _ in range(3)]):.1f} |")
        print(f"| train.py --help | {median([seconds_of('train.py', '--help') for _ in range(3)]):.1f} |")
        for size in SIZES:
            first, again = train(size, 1)[0], train(size, 1)[0]
            print(f"| command to end of the first step, {size:,} lines | {first:.1f}; again {again:.1f} |")


if __name__ == "__main__":
    main()
