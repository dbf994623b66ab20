"""How long does a manifest of 10^7 lines take to open, and how much memory to train from?

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/large_manifest.py --folder /tmp/many

Writes 100 clips of noise and a manifest that names them again and again, 1.5 GB. Memory is that of the main
process and of a loader's 4 workers (PSS: what they share counts once), less that of a small manifest.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import soundfile
import torch

from dataset import SpeechDataset, collate
from manifest import MAX_SECONDS, read_manifest
from sampler import LengthSampler

CONFIG = {"prompt": "<|speech|><|instruction|>", "end_of_turn": "", "encoder_window": "utterance"}
CONFIG |= {"encoder_dims": {"n_mels": 80}}


class Bytes:  # a tokenizer that takes no memory
    convert_tokens_to_ids = {"": 0}.get

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))


def write(folder: str, lines: int) -> str:
    path, clips = os.path.join(folder, f"{lines}.jsonl"), []
    for i in range(100):
        seconds, text = (
            31 if i == 99 else 0.2 + i / 100,
            "and it was told to them that there was nothing to be heard",
        )
        soundfile.write(f"{folder}/{i:02}.wav", 0.1 * np.random.randn(round(seconds * 16e3)), 16000)
        clips.append(json.dumps({"wav": f"{i:02}.wav", "duration": seconds, "txt": text})[1:] + "\n")
    with open(path, "w") as file:
        file.writelines(f'{{"key": "speaker-chapter-{i:08}", {clips[i % 100]}' for i in range(lines))
    return path


def train(path: str, batches: int) -> tuple[float, float, float]:
    """Seconds to open a manifest, and to take half an epoch's order; MB after so many batches."""
    times = [time.perf_counter()]
    utterances = read_manifest(path)
    times.append(time.perf_counter())
    utterances = utterances.keep(utterances.seconds <= MAX_SECONDS)  # as train.py does
    sampler = LengthSampler(SpeechDataset(utterances, Bytes(), CONFIG, lambda frames: frames // 10), 8, 0)
    loader = torch.utils.data.DataLoader(
        sampler.dataset, 8, False, sampler, num_workers=4, collate_fn=collate
    )
    running, total = iter(loader), 0
    for _ in range(batches):
        next(running)
    for pid in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1000
    times.append(time.perf_counter())
    for _ in zip(range(len(sampler) // 2), sampler):
        pass
    return times[1] - times[0], time.perf_counter() - times[2], total


parser = argparse.ArgumentParser()
parser.add_argument("--folder", required=True, help="where 1.5 GB go, and stay")
parser.add_argument("--lines", type=int, default=10_000_000)
parser.add_argument("--batches", type=int, default=400)

if __name__ == "__main__":
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = args.folder
    told = []
    for path in (write(args.folder, 10 * args.batches), many := write(args.folder, args.lines), many):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fresh:
            told.append(fresh.submit(train, path, args.batches).result())
    print("| manifest | opened in | half an epoch's order in | memory |\n|---|---|---|---|")
    for name, (opened, ordered, total) in zip(("small", f"{args.lines} lines", "again"), told):
        print(f"| {name} | {opened:.2f} s | {ordered:.1f} s | {total - told[0][2]:+.0f} MB |")
