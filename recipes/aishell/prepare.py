"""AISHELL-1 (openslr.org/33): train.jsonl, dev.jsonl and test.jsonl of the folder data_aishell.

    python recipes/aishell/prepare.py --aishell data_aishell --output_dir exp/aishell

Prints what each holds; ends with 1 where the published corpus holds another number. 325 of its 141,925
recordings have no transcript: they are counted and left out. 20 s for as many files on 2 cores, once they
are in memory.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from errors import Refused, refusing  # noqa: E402
from manifest import check_to_train, read_record  # noqa: E402

UTTERANCES, UNSAID = {"train": 120098, "dev": 14326, "test": 7176}, 325


def read_speaker(folder: Path, said: list[tuple[str, str, str]], output_dir: Path) -> list[dict]:
    """The records of wav/split/speaker. said: key, text, where they stand. Raises Refused without audio."""
    wavs, records = folder.relative_to(output_dir) if folder.is_relative_to(output_dir) else folder, []
    for key, text, where in sorted(said):
        record = {"key": key, "wav": f"{wavs / key}.wav", "txt": text}
        utterance = read_record(record, where, str(output_dir))
        check_to_train(utterance)
        records.append(record | {"duration": round(utterance.seconds, 3), "speaker": folder.name})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aishell", required=True, help="data_aishell, which holds wav and transcript")
    parser.add_argument("--output_dir", default="exp/aishell")
    told = "joined (default): as Mandarin is written; as_is: with spaces between words"
    parser.add_argument("--text", choices=["joined", "as_is"], default="joined", help=told)
    args = parser.parse_args()
    corpus, output_dir = Path(os.path.abspath(args.aishell)), Path(os.path.abspath(args.output_dir))
    folders = [folder for split in UTTERANCES for folder in sorted((corpus / "wav" / split).glob("*/"))]
    unpacked = {folder.name + ".tar.gz" for folder in folders}
    packed = [path for path in sorted((corpus / "wav").glob("*.tar.gz")) if path.name not in unpacked]
    if packed:
        how = f"cd {corpus}/wav && for archive in *.tar.gz; do tar xzf $archive; done"
        raise Refused(f"{packed[0]}: {len(packed)} speakers are still packed: {how}")
    if not folders:
        raise Refused(f"--aishell {corpus}: no speakers in wav/train, wav/dev or wav/test of it")

    transcripts, said = corpus / "transcript/aishell_transcript_v0.8.txt", {}
    with refusing(f"{transcripts}", OSError, UnicodeDecodeError), open(transcripts, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            key, _, text = line.strip().partition(" ")
            text = "".join(text.split()) if args.text == "joined" else text
            said.setdefault(key[6:11], []).append((key, text, f"{transcripts}:{number}"))  # BAC009S0002W0122

    output_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda folder: read_speaker(folder, said.get(folder.name, []), output_dir), folders)
        parts = list(tqdm(read, total=len(folders), unit="speaker"))
    differ, unsaid = False, sum(len(list(folder.glob("*.wav"))) for folder in folders) - sum(map(len, parts))
    for split, expected in UTTERANCES.items():
        records = [one for folder, part in zip(folders, parts) if folder.parent.name == split for one in part]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (output_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        hours = sum(record["duration"] for record in records) / 3600
        wrong = f"; {expected} should be there" if len(records) != expected else ""
        print(f"{split}: {len(records)} utterances, {hours:.2f} h{wrong}")
        differ = differ or bool(wrong)
    wrong = f"; {UNSAID} should be there" if unsaid != UNSAID else ""
    print(f"without a transcript, left out: {unsaid} recordings{wrong}")
    sys.exit(differ or bool(wrong))


if __name__ == "__main__":
    main()
