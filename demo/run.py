"""The whole of Ears on a laptop: make speech, teach a projector to let a small LLM hear it, recognise, score.

    python demo/run.py

About two minutes on 2 cores, no GPU, no download. You should see a loss that falls from 5 to 0.02, a WER
of about 2 % on sentences and voices that were never in training, and one above 100 % when each sentence is
given another's audio: the LLM knows the grammar, but writes what it hears. All of it lands in exp/demo/.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("exp/demo")
COMMANDS = {
    "speak": "demo/corpus.py --output_dir exp/demo/data",
    "unpack backbones": "demo/make_backbones.py --output_dir exp/demo",
    "train": "train.py --llm_model_name_or_path exp/demo/llm "
    "--whisper_model_name_or_path exp/demo/whisper.pt "
    "--data_path exp/demo/data/train.jsonl --output_dir exp/demo/asr --per_device_train_batch_size 16 "
    "--max_steps 400 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 10 "
    "--save_strategy no",
    "recognise": "recognize.py --projector_model_path exp/demo/asr/model.safetensors "
    "--data_path exp/demo/data/test.jsonl --result_path exp/demo/asr/result.jsonl",
    "score": "score.py --ref exp/demo/data/test.jsonl --hyp exp/demo/asr/result.jsonl "
    "--html exp/demo/asr/report.html",
    "recognise shuffled": "recognize.py --projector_model_path exp/demo/asr/model.safetensors "
    "--data_path exp/demo/data/test_shuffled.jsonl --result_path exp/demo/asr/result_shuffled.jsonl",
    "score shuffled": "score.py exp/demo/asr/result_shuffled.jsonl",
    "recognise noise": "recognize.py --projector_model_path exp/demo/asr/model.safetensors "
    "--data_path exp/demo/data/noise.jsonl --result_path exp/demo/asr/result_noise.jsonl",
}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(command: str) -> str:
    """Run a script of this repo, its command line first; scores are also returned."""
    print(f"\n$ python {command}", flush=True)
    scoring = command.startswith("score.py")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], stdout=subprocess.PIPE if scoring else None, text=True
    )
    if scoring:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"error: python {command} ended with code {done.returncode}")
    return done.stdout or ""


def shuffle_audio() -> None:
    """A test manifest in which every record has the audio of another."""
    records = read_jsonl(FOLDER / "data/test.jsonl")
    others = records[7:] + records[:7]
    lines = [json.dumps(record | {name: other[name] for name in ("wav", "duration", "speaker")}) + "\n"
             for record, other in zip(records, others, strict=True)]  # fmt: skip
    (FOLDER / "data/test_shuffled.jsonl").write_text("".join(lines), encoding="utf-8")


def main():
    shutil.rmtree(
        FOLDER / "asr", ignore_errors=True
    )  # or train.py would go on from the last demo's checkpoint
    seconds, rates = {}, {}
    for name, command in COMMANDS.items():
        if name == "recognise shuffled":
            shuffle_audio()
        start = time.perf_counter()
        printed = run(command)
        seconds[name] = time.perf_counter() - start
        if found := re.search(r"%WER (\S+)", printed):
            rates[name] = found[1]

    print("\nheard of said")
    for record in read_jsonl(FOLDER / "asr/result.jsonl")[:5]:
        print(f"  said  {record['txt']}\n  heard {record['hyp']}\n")
    for name, spent in seconds.items():
        print(f"{name:20} {spent / 60:5.2f} min")
    print(f"{'in all':20} {sum(seconds.values()) / 60:5.2f} min\n")
    print(
        f"WER                      {rates['score']:>7} %   sentences never seen, voices never heard, 3 beams"
    )
    print(f"WER with audio shuffled  {rates['score shuffled']:>7} %   what the LLM knows without hearing")
    noises = read_jsonl(FOLDER / "asr/result_noise.jsonl")
    heard = sum(record["hyp"] != "" for record in noises)
    print(f"text for mere noise      {heard:>3} of {len(noises)}   silence, hiss, hum, breaths")
    print(f"loss curve {FOLDER}/asr/loss.png, every utterance {FOLDER}/asr/report.html")


if __name__ == "__main__":
    main()
