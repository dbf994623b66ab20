"""Recognises a manifest, or audio files, with a trained projector: batched beam search.

    python recognize.py --projector_model_path exp/asr --data_path test.jsonl --result_path result.jsonl
    python recognize.py --projector_model_path exp/asr hello.wav

A result has the manifest's lines in order, with `key`, `hyp`, `score` (mean log-probability per token) and
`seconds`; if named .txt, lines of key<TAB>hyp. `torchrun --nproc_per_node N recognize.py` shares the work.
"""

import argparse
import json
import os
import sys
from functools import partial

import torch
from torch import distributed
from tqdm import tqdm

from beam_search import beam_search
from dataset import SpeechDataset, collate, load_tokenizer, read_manifest, read_record
from model import Refused, SpeechLLM, load_config, load_encoder, load_llm, load_projector


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("audio", nargs="*", help="audio files in place of --data_path; their text is printed")
    add("--projector_model_path", required=True, help="model.safetensors, or the folder of it")
    add("--data_path", help="manifest (jsonl: wav)")
    add("--result_path", help="where its result goes: .jsonl, or .txt")
    add("--llm_model_name_or_path", help="default: as in config.json")
    add("--whisper_model_name_or_path", help="default: as in config.json")
    add("--instruction", help="what the LLM is asked; default: each line's own, else to transcribe")
    add("--num_beams", type=int, default=3, help="default: 3")
    add("--batch_size", type=int, default=16, help="utterances decoded together; default: 16")
    add("--max_new_tokens", type=int, help="default: 64, and 25 for each second of audio")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="default: the LLM's own")
    args = parser.parse_args()
    if bool(args.audio) == bool(args.data_path) or bool(args.data_path) != bool(args.result_path):
        parser.error("give either audio files, or --data_path and --result_path")
    if min(args.num_beams, args.batch_size, 1 if args.max_new_tokens is None else args.max_new_tokens) < 1:
        parser.error("--num_beams, --batch_size and --max_new_tokens must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    path, config = load_config(args.projector_model_path)
    if args.data_path:
        if not os.path.isdir(os.path.dirname(args.result_path) or "."):
            raise Refused(f"--result_path {args.result_path}: no such folder")
        utterances, seen = read_manifest(args.data_path, needs_target=False), {}
        for key, where in ((utterance.key, utterance.where) for utterance in utterances):
            if seen.setdefault(key, where) != where:
                raise Refused(f"{where}: the key {key!r} of {seen[key]} again; each result needs its own")
    else:
        utterances = [read_record({"wav": path}, path, "") for path in args.audio]

    encoder = load_encoder(args.whisper_model_name_or_path or config["whisper_model_name_or_path"])
    llm_name = args.llm_model_name_or_path or config["llm_model_name_or_path"]
    llm = load_llm(llm_name, args.dtype if args.dtype == "auto" else getattr(torch, args.dtype))
    model = SpeechLLM(encoder, llm, config).to(device)
    load_projector(model, path)
    tokenizer = load_tokenizer(llm_name)
    speech_len = model.projector.speech_len
    dataset = SpeechDataset(utterances, tokenizer, config, speech_len, args.instruction, with_target=False)
    end_ids = [dataset.end_of_turn_id, *({tokenizer.eos_token_id} - {None, dataset.end_of_turn_id})]

    seconds = [utterance.seconds for utterance in utterances]
    order = sorted(range(len(seconds)), key=lambda index: -seconds[index])  # the longest first
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)][rank::ranks]
    pad_left = partial(collate, side="left")
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=pad_left, num_workers=2)
    results, total = {}, sum(seconds[index] for indices in batches for index in indices)
    with tqdm(total=total, unit="s of audio", unit_scale=True) as progress:
        for indices, batch in zip(batches, loader):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            limits = [args.max_new_tokens or 64 + int(25 * seconds[index]) for index in indices]
            hyps = beam_search(model, batch, limits, end_ids, args.num_beams)
            for index, (ids, score, cut) in zip(indices, hyps):
                hyp = tokenizer.decode(ids, skip_special_tokens=True).strip()
                results[index] = {"hyp": hyp, "score": round(score, 6), "seconds": seconds[index]}
                if cut:
                    tqdm.write(f"{utterances[index].where}: cut at its limit of tokens", file=sys.stderr)
            progress.update(sum(seconds[index] for index in indices))

    if ranks > 1:
        distributed.init_process_group("gloo")
        shares = [None] * ranks
        distributed.all_gather_object(shares, results)
        distributed.destroy_process_group()
        results = {index: result for share in shares for index, result in share.items()}
    records = [{"key": u.key, **u.record, **results[index]} for index, u in enumerate(utterances)]
    names = [record["wav" if args.audio else "key"] for record in records]
    lines = [f"{name}\t{' '.join(record['hyp'].split())}" for name, record in zip(names, records)]
    if args.data_path and not args.result_path.endswith(".txt"):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if rank == 0 and args.audio:
        print("\n".join(lines) if len(lines) > 1 else records[0]["hyp"])
    elif rank == 0:
        with open(args.result_path, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
