"""Recognises a manifest, or audio files, with a trained projector: batched beam search.

    python recognize.py --projector_model_path exp/asr --data_path test.jsonl --result_path result.jsonl
    python recognize.py --projector_model_path exp/asr hello.wav

A result has the manifest's lines in order, with `key`, `hyp`, `score` (mean log-probability per token) and
`seconds`; if named .txt, lines of key<TAB>hyp. A recording that cannot be read gets an `error` in place of
`hyp`, and the exit code is 1. What is over 30 s is cut where it is quiet, and its texts are joined.
`torchrun --nproc_per_node N recognize.py` shares the work. Run again, it goes on where it was stopped.
"""

import argparse
import hashlib
import json
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from beam_search import transcribe
from dataset import Recordings, load_tokenizer
from encoder import load_encoder
from errors import Refused
from manifest import MAX_SECONDS, Utterance, read_manifest, read_record
from model import SpeechLLM, load_config, load_llm, load_projector
from resumable import Parts
from sampler import by_seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("audio", nargs="*", help="audio files in place of --data_path; their text is printed")
    told = "model.safetensors, or the folder of it; given several times, they are averaged"
    add("--projector_model_path", required=True, action="append", help=told)
    add("--data_path", help="manifest (jsonl: wav)")
    add("--result_path", help="where its result goes: .jsonl, or .txt")
    add("--llm_model_name_or_path", help="default: as in config.json")
    add("--whisper_model_name_or_path", help="default: as in config.json")
    add("--instruction", help="what the LLM is asked; default: each line's own, else to transcribe")
    add("--part_seconds", type=float, default=30, help="cut what is longer; at least 1, default and most: 30")
    add("--num_beams", type=int, default=3, help="default: 3")
    add("--batch_size", type=int, default=16, help="utterances decoded together; default: 16")
    add("--batch_seconds", type=float, help="fill batches with this much audio, padding included, instead")
    add("--max_new_tokens", type=int, help="default: 64, and 25 for each second of audio")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="default: the LLM's own")
    args = parser.parse_args()
    if bool(args.audio) == bool(args.data_path) or bool(args.data_path) != bool(args.result_path):
        parser.error("give either audio files, or --data_path and --result_path")
    if args.audio and "RANK" in os.environ:
        parser.error("several processes share a --data_path, not audio files")
    if min(args.num_beams, args.batch_size, 1 if args.max_new_tokens is None else args.max_new_tokens) < 1:
        parser.error("--num_beams, --batch_size and --max_new_tokens must be at least 1")
    if not 1 <= args.part_seconds <= MAX_SECONDS:
        parser.error(f"--part_seconds must be from 1 to {MAX_SECONDS}")
    return args


def as_line(utterance: Utterance, result: dict, txt: bool) -> str:
    """A line of the result: of .txt, or of .jsonl."""
    if txt:
        return f"{utterance.key}\t{' '.join(result.get('hyp', '').split())}"
    record = {"key": utterance.key, **utterance.record, **result}
    for name in ("error",) if "hyp" in result else ("hyp", "score"):
        record.pop(name, None)  # of a manifest that was a result
    return json.dumps(record, ensure_ascii=False)


def main() -> None:
    args = parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    paths, configs = zip(*map(load_config, args.projector_model_path))
    config = configs[0]
    for other in (other for other in range(1, len(paths)) if configs[other] != config):
        raise Refused(f"{paths[other]}: not of the same config.json as {paths[0]}, so not to be averaged")
    llm_name = args.llm_model_name_or_path or config["llm_model_name_or_path"]
    whisper_name = args.whisper_model_name_or_path or config["whisper_model_name_or_path"]
    if args.data_path:
        if not os.path.isdir(os.path.dirname(args.result_path) or "."):
            raise Refused(f"--result_path {args.result_path}: no such folder")
        utterances, seen = read_manifest(args.data_path, to_train=False), {}
        for key, where in ((utterance.key, utterance.where) for utterance in utterances):
            if seen.setdefault(key, where) != where:
                raise Refused(f"{where}: the key {key!r} of {seen[key]} again; each result needs its own")
    else:
        utterances = [read_record({"wav": path}, path, "") for path in args.audio]
    seconds = np.nan_to_num([utterance.seconds for utterance in utterances])
    limits = args.batch_size * MAX_SECONDS, args.batch_size
    if args.batch_seconds:
        limits = args.batch_seconds, None
    batches = by_seconds(seconds, *limits)
    settings = {**vars(args), "llm": llm_name, "whisper": whisper_name, "config": config}
    settings["digests"] = []
    for path in (*paths, args.data_path or paths[0]):
        with open(path, "rb") as content:
            settings["digests"].append(hashlib.file_digest(content, "sha256").hexdigest())
    parts = Parts(args.result_path, settings, rank) if args.data_path else None
    done = parts.read() if parts else {}

    encoder = load_encoder(whisper_name)
    llm = load_llm(llm_name, args.dtype if args.dtype == "auto" else getattr(torch, args.dtype))
    model = SpeechLLM(encoder, llm, config).to(device)
    load_projector(model, *paths)
    speech_len, tokenizer = model.projector.speech_len, load_tokenizer(llm_name)
    recordings = Recordings(utterances, tokenizer, config, speech_len, instruction=args.instruction)
    recordings.part_seconds = args.part_seconds

    mine = [number for number in range(rank, len(batches), ranks) if number not in done]
    sampler = [batches[number] for number in mine]
    loader = torch.utils.data.DataLoader(recordings, batch_sampler=sampler, collate_fn=list, num_workers=2)
    total = sum(seconds[index] for indices in sampler for index in indices)
    with tqdm(total=total, unit="s of audio", unit_scale=True) as progress:
        for number, items in zip(mine, loader):
            done[number] = transcribe(model, recordings, items, args.num_beams, *limits, args.max_new_tokens)
            for index, result in zip(batches[number], done[number]):
                if result.pop("cut", False):
                    tqdm.write(f"{utterances[index].where}: cut at its limit of tokens", file=sys.stderr)
                if "hyp" in result:
                    result["seconds"] = utterances[index].seconds
            if parts:
                parts.append(number, done[number])
            progress.update(sum(seconds[index] for index in batches[number]))

    done = parts.read() if parts else done
    if len(done) < len(batches):
        return  # the process that is the last to finish writes the result
    by_index = {index: result for number in done for index, result in zip(batches[number], done[number])}
    results = [by_index[index] for index in range(len(utterances))]
    if parts:
        txt = args.result_path.endswith(".txt")
        parts.finish([as_line(*told, txt) for told in zip(utterances, results, strict=True)])
    for utterance, result in zip(utterances, results) if args.audio else ():
        text = result.get("hyp", "")
        print(f"{utterance.path}\t{' '.join(text.split())}" if len(results) > 1 else text)
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        raise Refused(f"{len(failed)} of {len(results)} could not be recognised, the first: {failed[0]}")


if __name__ == "__main__":
    main()
