"""Connected digits, real recordings: strings of 3 to 6 digits of one speaker, joined from single takes.

    python recipes/digits/prepare.py --fsdd fsdd --output_dir exp/digits

`fsdd` holds train.jsonl and test.jsonl of the Free Spoken Digit Dataset (6 speakers, 8 kHz; test = takes 0 to
4), with wav, txt and speaker. Writes 3,000 training strings of training takes and 200 test strings of test
takes, with 0.05 to 0.2 s of silence between digits and up to 0.5 s at either end; and the test strings one
after the other, as one file of ten minutes (long.jsonl). 15 seconds.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import soundfile
from tqdm import trange


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdd", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("exp/digits"))
    args = parser.parse_args()

    (args.output_dir / "wav").mkdir(parents=True, exist_ok=True)
    for split, count in [("train", 3000), ("test", 200)]:
        rng = random.Random(split)
        takes = {}
        for line in (args.fsdd / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            take = json.loads(line)
            waveform, rate = soundfile.read(args.fsdd / take["wav"], dtype="int16")
            takes.setdefault(take["speaker"], []).append((take["txt"], waveform))

        strings, texts = [], []
        with open(args.output_dir / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
            for i in trange(count, desc=split):
                speaker = rng.choice(sorted(takes))
                digits = rng.choices(takes[speaker], k=rng.randint(3, 6))
                pauses = [
                    rng.uniform(0, 0.5),
                    *(rng.uniform(0.05, 0.2) for _ in digits[1:]),
                    rng.uniform(0, 0.5),
                ]
                silences = [np.zeros(int(pause * rate), dtype=np.int16) for pause in pauses]
                parts = [part for silence, (_, digit) in zip(silences, digits) for part in (silence, digit)]
                string = np.concatenate([*parts, silences[-1]])
                key = f"{split}-{i:04d}"
                soundfile.write(args.output_dir / f"wav/{key}.wav", string, rate)
                record = {"wav": f"wav/{key}.wav", "txt": " ".join(word for word, _ in digits), "key": key}
                record |= {"duration": round(len(string) / rate, 3), "speaker": speaker}
                manifest.write(json.dumps(record) + "\n")
                strings.append(string)
                texts.append(record["txt"])

    soundfile.write(args.output_dir / "wav/long.wav", np.concatenate(strings), rate)
    record = json.dumps({"wav": "wav/long.wav", "txt": " ".join(texts)})
    (args.output_dir / "long.jsonl").write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
