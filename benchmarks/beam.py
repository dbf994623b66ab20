"""How much faster is beam_search.py than `generate` of transformers, on the same batches?

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/beam.py

A toy LLM (width 256, 6 layers, vocabulary 4000) and 3 batches of 16: prompts of 54 to 60, 99 to 110 and 144
to 160 vectors; 20, 40 and 60 new tokens, forced. Here `generate` gives no scores. 90 s on 2 cores.
"""

import argparse
import resource
import time
from statistics import median
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from beam_search import beam_search

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--peak", choices=["ours", "theirs"], help="only tell the process's peak at beam 4")
args = parser.parse_args()

torch.manual_seed(0)
sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, vocab_size=4000, initializer_range=0.1)  # at 0.02 beams would tie
llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes)).eval()
llm.lm_head.bias = torch.nn.Parameter(-100.0 * (torch.arange(4000) == 0))  # 0, the end, never comes
model = SimpleNamespace(llm=llm.to(args.device), embed=lambda inputs_embeds: inputs_embeds)
batches = []
for longest, new in ((60, 20), (110, 40), (160, 60)):
    mask = torch.arange(longest).flip(0) < torch.randint(longest * 9 // 10, longest + 1, (16, 1))  # left
    batch = {"inputs_embeds": 0.02 * torch.randn(16, longest, 256), "attention_mask": mask.long()}
    batches.append(({name: tensor.to(args.device) for name, tensor in batch.items()}, new))


def run(arm: str, beams: int) -> tuple[list[list[list[int]]], float]:
    """The tokens of each utterance of each batch, by `ours` or `theirs`, and the seconds it took."""
    start, ends = time.perf_counter(), dict(num_beams=beams, eos_token_id=0, pad_token_id=0)
    if arm == "ours":
        found = [beam_search(model, batch, [new] * 16, [0], beams) for batch, new in batches]
        hyps = [[ids for ids, _, _ in utterances] for utterances in found]
    else:
        hyps = [llm.generate(**batch, max_new_tokens=new, **ends).tolist() for batch, new in batches]
    return hyps, time.perf_counter() - start


if args.peak:
    run(args.peak, 4)
    raise SystemExit(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
for beams in (1, 4):
    assert run("ours", beams)[0] == run("theirs", beams)[0]  # also the warm-up
    ratios = []
    for order in [("ours", "theirs"), ("theirs", "ours")] * 4:
        took = {arm: run(arm, beams)[1] for arm in order}
        ratios.append(took["theirs"] / took["ours"])
    print(f"beam {beams}: {median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) in 8 pairs")
