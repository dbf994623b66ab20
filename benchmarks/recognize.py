"""How much faster than `generate` of transformers, at batch 1 and on the same batches, is recognition?

    OMP_NUM_THREADS=2 python benchmarks/recognize.py                          # AISHELL's lengths
    OMP_NUM_THREADS=2 python benchmarks/recognize.py --lengths librispeech

Random weights and mel. Every utterance gets 3.5 tokens a second, as its limit: the end is never produced.
Ours is beam_search.py on batches of like length. `generate` gets the same utterances, heard by the same
encoder and projector, one at a time or in the same batches, each as long as its longest utterance needs.
Both are first seen to write the same. All arms run in turn, forwards and backwards, and are compared with
batch 1 of the same round and beam. On cuda in bfloat16: not yet run on one.
"""

import argparse
from statistics import median

import harness
import numpy as np
import torch
from torch.nn.functional import pad

from beam_search import beam_search
from dataset import collate
from model import SpeechLLM

END, ARMS = 0, ("batch 1", "same batches", "ours")


def make_model(shape: str, device: str) -> SpeechLLM:
    """Random weights that never produce END, and whose beams do not tie."""
    model = harness.of_shape(SpeechLLM, shape, device)
    bias = -100.0 * (torch.arange(model.llm.config.vocab_size, device=device) == END)
    model.llm.lm_head.bias = torch.nn.Parameter(bias.to(model.llm.dtype), requires_grad=False)
    return model


def make_example(model: SpeechLLM, seconds: float) -> dict[str, torch.Tensor]:
    """An example as Recordings makes it, of noise."""
    random, frames = torch.Generator().manual_seed(int(1e6 * seconds)), round(100 * seconds)
    vectors = model.projector.speech_len(frames)
    return {
        "mel": torch.randn(model.encoder.dims.n_mels, frames, generator=random),
        "frames": torch.tensor(frames),
        "input_ids": torch.zeros(harness.BEFORE + vectors + harness.AFTER, dtype=torch.long),
        "speech_mask": pad(torch.ones(vectors, dtype=torch.bool), (harness.BEFORE, harness.AFTER)),
        "attention_mask": torch.ones(harness.BEFORE + vectors + harness.AFTER, dtype=torch.long),
    }


@torch.no_grad()
def recognize(
    model: SpeechLLM, arm: str, beams: int, batches: list[np.ndarray], device: str
) -> list[list[int]]:
    """The tokens of each utterance."""
    if arm == "batch 1":
        batches = [seconds[i : i + 1] for seconds in batches for i in range(len(seconds))]
    hyps = []
    for seconds in batches:
        batch = collate([make_example(model, length) for length in seconds], side="left")
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        limits = [round(harness.TOKENS_A_SECOND * length) for length in seconds]
        if arm == "ours":
            hyps += [ids for ids, _, _ in beam_search(model, batch, limits, [END], beams)]
        else:
            mask = batch.pop("attention_mask")
            ends = dict(num_beams=beams, max_new_tokens=max(limits), eos_token_id=END, pad_token_id=END)
            found = model.llm.generate(inputs_embeds=model.embed(**batch), attention_mask=mask, **ends)
            hyps += [ids[:limit] for ids, limit in zip(found.tolist(), limits)]
    return hyps


def longest(shape: str, arm: str, beams: int, seconds: np.ndarray, device: str) -> None:
    recognize(make_model(shape, device), arm, beams, [seconds], device)


def flop(model: SpeechLLM, arm: str, beams: int, seconds: np.ndarray) -> tuple[float, float]:
    """Of a batch, and the share of padding in its prompts, which `generate` reads once for each beam."""
    if arm == "batch 1":
        return sum(
            flop(model, "same batches", beams, seconds[i : i + 1])[0] for i in range(len(seconds))
        ), 0.0
    config, frames = model.llm.config, np.round(100 * seconds)
    prompts = harness.BEFORE + np.ceil(frames / 10) + harness.AFTER
    prompt, steps = prompts.max(), np.round(harness.TOKENS_A_SECOND * seconds)
    steps = steps if arm == "ours" else np.full_like(steps, steps.max())
    read = harness.llm_flop(config, prompt) * (1 if arm == "ours" else beams)
    texts = [harness.llm_flop(config, count, prompt + count / 2) for count in steps]
    texts += [harness.head_flop(config, count) for count in steps]
    total = len(seconds) * (harness.encoder_flop(model.encoder.dims, int(frames.max())) + read)
    return total + beams * sum(texts), 1 - prompts.mean() / prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    harness.add_flags(parser, batch_size=16)
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 4], help="default: 1 4")
    args = parser.parse_args()
    device, pool = args.device, harness.draw(args.lengths, 50 * args.batch_size)
    batches = [np.sort(pool[chosen])[::-1] for chosen in harness.by_length(pool, args.batch_size, args.steps)]
    most = np.sort(pool)[: -args.batch_size - 1 : -1]
    arms = [(arm, beams) for beams in args.beams for arm in ARMS]
    peaks = [harness.peak(device, longest, args.shape, arm, beams, most, device) for arm, beams in arms]

    model = make_model(args.shape, device)
    if device == "cpu":  # in bfloat16 hypotheses depend on the batch
        for beams in args.beams:
            few = [batches[0][:2]]
            assert recognize(model, "ours", beams, few, device) == recognize(
                model, "batch 1", beams, few, device
            )
    runs = [lambda pair=pair: recognize(model, *pair, batches, device) for pair in arms]
    took = harness.rounds(dict(zip(arms, runs)), args.pairs, device)

    limit, rows, audio = harness.matrix_peak(device), [], float(np.sum(batches))
    utterances = args.steps * args.batch_size
    for (arm, beams), bytes_ in zip(arms, peaks):
        speed, base = 1 / median(took[arm, beams]), took["batch 1", beams]
        work, padding = np.sum([flop(model, arm, beams, seconds) for seconds in batches], axis=0).tolist()
        rows.append({
            "arm": arm, "beams": beams, "utterances/s": utterances * speed,
            "times real time": audio * speed, "times batch 1": harness.ratio(base, took[arm, beams]),
            "times same batches": harness.ratio(took["same batches", beams], took[arm, beams]),
            "padding": padding / len(batches), "TFLOP/utterance": work / 1e12 / utterances,
            "share of matrix peak": work * speed / limit, "peak MB": bytes_ / 1e6,
        })  # fmt: skip
    harness.report(args, "Recognition", limit, rows)


if __name__ == "__main__":
    main()
