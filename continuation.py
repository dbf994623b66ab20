"""BLSP, step 1: the LLM continues the transcripts of a manifest. Step 2 is train.py on the result, unchanged.

    python continuation.py --llm_model_name_or_path Qwen2-7B-Instruct --data_path train.jsonl \
      --result_path blsp.jsonl
    python continuation.py ... --api_base http://localhost:8000/v1 --api_model Qwen2-7B-Instruct

The result has the manifest's lines in order, each with `instruction` (what the LLM was asked) and `target`
(what it wrote). Its prompt is that of training, with the transcript where speech will stand. Greedy; with
--sample, drawn from the LLM's own distribution. `torchrun --nproc_per_node N continuation.py ...` shares the
work.

Each process appends whole batches to <result_path>.partial-<rank>. Run again, with any number of processes,
it goes on there; with other settings it refuses. Whoever finds all done writes the result and removes them.

Empty texts and refusals stand, with `rejected`, in <result_path>.rejected.jsonl instead. What is cut by
--max_new_tokens is kept, as in BLSP, whose loss puts an end of turn behind it too, and bears `"cut": true`.

A server (`vllm serve --generation-config vllm`, `transformers serve`, ...) is sent the same text at
/completions; if it has no such path, the same message at /chat/completions, for its own template. Where a
turn ends, and how --sample draws besides a temperature of 1, is up to the server's generation config.
"""

import argparse
import asyncio
import glob
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from dataset import INSTRUCTION_SLOT, SPEECH_SLOT, load_tokenizer, render_prompt
from errors import Refused, refusing
from hallucination import refuses
from manifest import read_manifest
from model import load_llm

BLSP = "Continue the following text in a coherent and engaging style with less than 40 words."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--llm_model_name_or_path", required=True, help="LLM; with --api_base only its tokenizer is loaded")
    add("--data_path", required=True, help="manifest (jsonl: wav, txt)")
    add("--result_path", required=True, help="where the manifest for train.py goes")
    add("--instruction", default=BLSP, help=f"default: {BLSP}")
    add("--max_new_tokens", type=int, default=64, help="default: 64")
    add("--sample", type=int, default=0, help="draw so many for each transcript; default: one, greedy")
    add("--seed", type=int, default=0, help="of --sample; default: 0")
    add("--batch_size", type=int, default=32, help="prompts continued together; default: 32")
    add("--api_base", help="ask this server, http://localhost:8000/v1 for one (key: OPENAI_API_KEY)")
    add("--api_model", help="the LLM's name there")
    add("--concurrency", type=int, default=64, help="requests at a time; default: 64")
    args = parser.parse_args()
    if bool(args.api_base) != bool(args.api_model):
        parser.error("--api_base and --api_model go together")
    if min(args.max_new_tokens, args.batch_size, args.concurrency, args.sample + 1) < 1:
        parser.error("--max_new_tokens, --batch_size and --concurrency must be above 0, --sample not below")
    return args


def find_done(result_path: str, settings: dict, items: int) -> tuple[np.ndarray, dict[str, int]]:
    """Where each item's line stands: (items, 2), file and offset, or -1; and the whole lines' bytes per file.

    Raises Refused if a file was begun with other settings; its first line tells.
    """
    done, ends = np.full((items, 2), -1), {}
    for path in glob.glob(glob.escape(result_path) + ".partial-*"):
        with suppress(FileNotFoundError), open(path, "rb") as file:  # removed by who has just finished
            number, ends[path] = len(ends), 0
            for line in file:
                if not line.endswith(b"\n"):  # torn by a kill, or being written
                    break
                with refusing(f"{path}: damaged; remove it", json.JSONDecodeError):
                    content = json.loads(line)
                if ends[path]:
                    done[content["item"]] = number, ends[path]
                elif content != settings:
                    name = next(name for name in settings if content.get(name) != settings[name])
                    told = f"begun with {name} {content.get(name)!r}, not {settings[name]!r}"
                    raise Refused(f"{path}: {told}; remove it to begin anew")
                ends[path] += len(line)
    return done, ends


def ask_llm(args, tokenizer, end_of_turn: str, prompt: Callable, batches: list, keep: Callable) -> None:
    """Batches of items -> `keep(items, [(text, cut), ...])`, by the LLM in this process."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    llm = load_llm(args.llm_model_name_or_path).to(device)
    llm.generation_config = GenerationConfig()  # its own may bring a repetition penalty
    tokenizer.pad_token, tokenizer.padding_side = end_of_turn, "left"
    end_ids = list({tokenizer.pad_token_id, tokenizer.eos_token_id} - {None})
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, pad_token_id=end_ids[0], eos_token_id=end_ids
    )
    config.update(**{"do_sample": True, "top_k": 0} if args.sample else {})
    for items in batches:
        inputs = tokenizer([*map(prompt, items)], add_special_tokens=False, padding=True, return_tensors="pt")
        input_ids, mask = inputs.input_ids.to(device), inputs.attention_mask.to(device)
        torch.manual_seed(args.seed + items[0])  # whatever was drawn before
        new = llm.generate(input_ids, attention_mask=mask, generation_config=config)[:, input_ids.shape[1] :]
        lens = (torch.isin(new, torch.tensor(end_ids, device=device)).cumsum(1) == 0).sum(1)
        texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(new, lens)]
        keep(items, zip(texts, (lens == new.shape[1]).tolist()))


async def ask_server(args, tokenizer, prompt: Callable, items: list[int], keep: Callable) -> None:
    """Items -> `keep([item], [(text, cut)])`, --concurrency at a time, then the rate. Raises Refused."""
    with refusing("--api_base needs `pip install openai`", ImportError):
        import openai
    bos = tokenizer.bos_token  # where the server's tokenizer will put it
    bos = bos if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.AsyncOpenAI(base_url=args.api_base, api_key=key, max_retries=8)
    # A frequency penalty of 0 also takes off the LLM's own repetition penalty, at `transformers serve`
    options = {"model": args.api_model, "max_tokens": args.max_new_tokens, "frequency_penalty": 0.0}
    options["temperature"] = float(args.sample > 0)

    async def ask(item: int, chat: bool) -> tuple[str, bool]:
        endpoint, said = client.completions, {"prompt": prompt(item).removeprefix(bos)}
        if chat:
            user = {"role": "user", "content": prompt(item, f"{SPEECH_SLOT}\n{INSTRUCTION_SLOT}")}
            endpoint, said = client.chat.completions, {"messages": [user]}
        (choice,) = (await endpoint.create(**said, **options, seed=args.seed + item)).choices
        return (choice.message.content or "") if chat else choice.text, choice.finish_reason == "length"

    async def work(chat: bool) -> None:
        for item in rest:  # all draw from it
            keep([item], [await ask(item, chat)])

    rest, chat, start = iter(items), False, time.monotonic()
    with refusing(f"--api_base {args.api_base}", openai.OpenAIError):
        try:
            await ask(items[0], chat)
        except openai.NotFoundError:
            chat = True
        await asyncio.gather(*(work(chat) for _ in range(args.concurrency)))
    seconds, path = time.monotonic() - start, "chat/completions" if chat else "completions"
    rate = f"{len(items) / seconds:.1f} a second at concurrency {args.concurrency}"
    print(f"{len(items)} continuations by /{path} in {seconds:.1f} s: {rate}")


def write_result(args, utterances, done: np.ndarray, paths: list[str]) -> None:
    """The lines that `done` points to in `paths` -> the result, in the manifest's order; removes `paths`."""
    here, there = (os.path.realpath(os.path.dirname(path)) for path in (args.result_path, args.data_path))
    names, new = [f"{args.result_path}.rejected.jsonl", args.result_path], f".new-{os.environ.get('RANK', 0)}"
    counts = Counter()
    with ExitStack() as stack:
        partials = [stack.enter_context(open(path, "rb")) for path in paths]
        files = [stack.enter_context(open(name + new, "w", encoding="utf-8")) for name in names]
        for item, (number, offset) in enumerate(done.tolist()):
            record = dict(utterances[item // max(args.sample, 1)].record)
            if here != there:
                record["wav"] = os.path.join(os.path.relpath(there, here), record["wav"])
            partials[number].seek(offset)
            line = json.loads(partials[number].readline())
            del line["item"]
            record |= {"instruction": args.instruction, **line}
            files["rejected" not in line].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts.update([line.get("rejected", "kept"), *line])
    for name in names:
        os.replace(name + new, name)
    for path in [*names[: not counts["rejected"]], *paths]:
        os.remove(path)
    left_out = f"left out: {counts['empty']} empty, {counts['refusal']} refusals"
    print(f"{args.result_path}: {counts['kept']} continuations, {left_out}; cut: {counts['cut']}")


def main() -> None:
    args = parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not os.path.isdir(os.path.dirname(args.result_path) or "."):
        raise Refused(f"--result_path {args.result_path}: no such folder")
    utterances, copies = read_manifest(args.data_path, to_train=False), max(args.sample, 1)
    for utterance in utterances:
        if not utterance.record.get("txt", "").strip():
            raise Refused(f"{utterance.where}: no txt to continue")
    names = ("llm_model_name_or_path", "api_model", "instruction", "max_new_tokens", "sample", "seed")
    settings = {name: getattr(args, name) for name in names}
    with open(args.data_path, "rb") as file:
        settings["sha256 of the manifest"] = hashlib.file_digest(file, "sha256").hexdigest()

    lens = np.repeat([len(utterance.record["txt"]) for utterance in utterances], copies)
    order, size = np.argsort(-lens, kind="stable").tolist(), 1 if args.api_base else args.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)][rank::ranks]  # the longest first
    done, ends = find_done(args.result_path, settings, len(order))
    batches = [items for items in batches if (done[items] < 0).any()]
    if batches and os.path.exists(args.result_path):
        raise Refused(f"--result_path {args.result_path}: is there already; remove it to begin anew")

    tokenizer = load_tokenizer(args.llm_model_name_or_path)
    rendered, partial_path = render_prompt(tokenizer), f"{args.result_path}.partial-{rank}"

    def transcript(item: int) -> str:
        return utterances[item // copies].record["txt"]

    def prompt(item: int, template: str = rendered["prompt"]) -> str:
        template = template.replace(INSTRUCTION_SLOT, args.instruction)  # behind the speech
        return template.replace(SPEECH_SLOT, transcript(item), 1)

    def keep(items: list[int], texts: Iterable[tuple[str, bool]]) -> None:
        lines = ""
        for item, (text, cut) in zip(items, texts):
            line = {"item": item, "target": text.strip()} | ({"cut": True} if cut else {})
            refused = refuses(f"{transcript(item)} {args.instruction}", text)
            if refused or not line["target"]:
                line["rejected"] = "refusal" if refused else "empty"
            lines += json.dumps(line) + "\n"
        file.write(lines.encode())
        file.flush()
        progress.update(len(items))

    if batches:
        total, whole = sum(map(len, batches)), ends.get(partial_path, 0)
        with open(partial_path, "ab") as file, tqdm(total=total, unit="text") as progress:
            file.truncate(whole)  # what a kill has torn
            file.write(b"" if whole else json.dumps(settings).encode() + b"\n")
            if args.api_base:
                asyncio.run(ask_server(args, tokenizer, prompt, [item for (item,) in batches], keep))
            else:
                ask_llm(args, tokenizer, rendered["end_of_turn"], prompt, batches, keep)

    done, ends = find_done(args.result_path, settings, len(order))
    if (done >= 0).all():
        with suppress(FileNotFoundError):  # another process has found all done too
            write_result(args, utterances, done, list(ends))


if __name__ == "__main__":
    main()
