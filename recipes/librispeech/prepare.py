"""LibriSpeech (openslr.org/12): manifests of the folder that its archives unpack into.

    python recipes/librispeech/prepare.py --librispeech LibriSpeech --output_dir exp/librispeech

Writes one for each split that is there, as test-clean.jsonl, and train-960.jsonl where all three of training
are. Prints what each holds; ends with 1 where the published corpus holds another number. 40 s for as many
files on 2 cores, once they are in memory.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from errors import Refused, refusing  # noqa: E402
from manifest import check_to_train, read_record  # noqa: E402

TRAINING = {"train-clean-100": 28539, "train-clean-360": 104014, "train-other-500": 148688}
UTTERANCES = TRAINING | {"dev-clean": 2703, "dev-other": 2864, "test-clean": 2620, "test-other": 2939}


def read_chapter(folder: Path, output_dir: Path, text: str) -> list[dict]:
    """The records of split/speaker/chapter. Raises Refused without its transcripts, or the audio of one."""
    speaker, chapter = folder.parts[-2:]
    wavs = folder.relative_to(output_dir) if folder.is_relative_to(output_dir) else folder
    transcripts, records = folder / f"{speaker}-{chapter}.trans.txt", []
    with refusing(f"{transcripts}", OSError, UnicodeDecodeError):
        lines = transcripts.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        key, _, words = line.partition(" ")
        record = {"key": key, "wav": f"{wavs / key}.flac", "txt": words.lower() if text == "lower" else words}
        utterance = read_record(record, f"{transcripts}:{number}", str(output_dir))
        check_to_train(utterance)
        records.append(record | {"duration": round(utterance.seconds, 3), "speaker": speaker})
    return sorted(records, key=lambda record: record["key"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--librispeech", required=True, help="the folder that holds test-clean and others")
    parser.add_argument("--output_dir", default="exp/librispeech")
    told = "lower (default): as an LLM has mostly read words; as_is: upper case. Neither has punctuation"
    parser.add_argument("--text", choices=["lower", "as_is"], default="lower", help=told)
    args = parser.parse_args()
    corpus, output_dir = Path(os.path.abspath(args.librispeech)), Path(os.path.abspath(args.output_dir))
    splits = [split for split in UTTERANCES if (corpus / split).is_dir()]
    if not splits:
        raise Refused(f"--librispeech {corpus}: none of {', '.join(UTTERANCES)} is in it")

    output_dir.mkdir(parents=True, exist_ok=True)
    read, differ = partial(read_chapter, output_dir=output_dir, text=args.text), False
    for split in splits:
        chapters = sorted((corpus / split).glob("*/*/"))
        with ThreadPoolExecutor() as pool:
            parts = tqdm(pool.map(read, chapters), desc=split, total=len(chapters), unit="chapter")
            records = [record for part in parts for record in part]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (output_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        hours, expected = sum(record["duration"] for record in records) / 3600, UTTERANCES[split]
        wrong = f"; {expected} should be there" if len(records) != expected else ""
        print(f"{split}: {len(records)} utterances, {hours:.2f} h{wrong}")
        differ = differ or bool(wrong)

    if TRAINING.keys() <= set(splits):
        texts = [(output_dir / f"{split}.jsonl").read_text(encoding="utf-8") for split in TRAINING]
        (output_dir / "train-960.jsonl").write_text("".join(texts), encoding="utf-8")
    sys.exit(differ)


if __name__ == "__main__":
    main()
