"""What batch fits into a GPU, and how long do 1,000 hours of speech take? From sizes alone, in seconds.

    python benchmarks/plan.py --llm Qwen/Qwen2-7B-Instruct --whisper large-v3 --gpu_memory 24
    python benchmarks/plan.py --check      # the model of memory against what a CPU takes, in about a minute

--llm and --whisper: a known name, or the folder of a config.json and a whisper .pt file. Memory is that of
`train.py --bf16 True`: the LLM in bfloat16, encoder, projector and Adam in float32. 5 % of the GPU's memory
and 1 GiB more are left to the allocator's gaps and to CUDA itself. ZeRO-3 shards all weights, and by its
defaults holds 1.05e9 of them at a time. None of this was measured on a GPU; what activations are kept was
measured on a CPU, in float32: --check.
"""

import argparse
import os

import harness
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from whisper.model import ModelDimensions

from errors import Refused
from model import IGNORE, SpeechLLM

GIB, SETTINGS = 2**30, {  # of --check: encoder and LLM; batch, seconds
    "toy, 30 s": ("toy", (256, 768, 6, 4, 2, 4000, False), 8, 30),
    "toy, 5 s": ("toy", (256, 768, 6, 4, 2, 4000, False), 32, 5),
    "large vocabulary": ("toy", (256, 768, 2, 4, 4, 50000, True), 8, 15),
    "medium": ("tiny", (512, 2048, 8, 8, 2, 16000, True), 8, 12),
    "small": ("toy", (128, 512, 4, 4, 2, 1000, False), 24, 20),
    "long encoder": ("base", (128, 256, 2, 2, 1, 1000, False), 16, 30),
}  # fmt: skip


def known_llm(name: str) -> PreTrainedConfig:
    """The config of a folder, or of a name in LLMS, with or without its owner, -Instruct or Meta-."""
    if os.path.isdir(name):
        return AutoConfig.from_pretrained(name).get_text_config()
    short = name.split("/")[-1].replace("-Instruct", "").replace("Meta-", "").replace("-3.1-8B", "-3-8B")
    for known in harness.LLMS:
        if short in (known, known.replace("Qwen2-", "Qwen2.5-")):
            return harness.llm_config(known)
    raise Refused(f"--llm {name}: neither a folder nor one of {', '.join(harness.LLMS)}")


def known_whisper(name: str) -> ModelDimensions:
    """The sizes of a checkpoint file, or of a name in WHISPERS."""
    if os.path.isfile(name):
        return ModelDimensions(**torch.load(name, weights_only=True, mmap=True)["dims"])
    alias = {"large-v3": "large", "turbo": "large", "large-v3-turbo": "large", "large-v1": "large-v2"}
    short = alias.get(name, name.removesuffix(".en"))
    if short not in harness.WHISPERS:
        raise Refused(f"--whisper {name}: neither a file nor one of {', '.join([*harness.WHISPERS, *alias])}")
    return harness.whisper_dims(short)


def lens(model: SpeechLLM, seconds: float) -> tuple[int, int, int, int]:
    """Frames, vectors of speech, positions with a label, positions."""
    frames, labels = round(100 * seconds), round(harness.TOKENS_A_SECOND * seconds) + 1
    vectors = model.projector.speech_len(frames)
    return frames, vectors, labels, harness.BEFORE + vectors + harness.AFTER + labels


def weight_bytes(model: SpeechLLM, llm_size: int, gpus: int = 1) -> float:
    """Of weights, gradients and Adam's two moments; llm_size: bytes of an element. gpus: of ZeRO-3."""
    llm, encoder, projector = (
        sum(map(torch.numel, part.parameters())) for part in (model.llm, model.encoder, model.projector)
    )
    if gpus == 1:
        return llm_size * llm + 4 * encoder + 16 * projector
    return (2 * llm + 2 * encoder + 16 * projector) / gpus + 2 * min(llm + encoder, 1.05e9)


def activation_bytes(model: SpeechLLM, size: int, batch: int, seconds: float, again: bool) -> float:
    """What a step takes beyond the weights, in elements of `size` bytes; again: activation checkpointing.

    The encoder, without gradients, is at its highest in an MLP: four times its width twice, its input, the
    residual. Behind it a frozen LLM keeps, for the gradients of its inputs: both norms' inputs in float32;
    query, key, value and output of the attention; and three of the MLP's width. None of its Linears' inputs.
    """
    config, encoder_dim = model.llm.config, model.encoder.dims.n_audio_state
    width, between, (query, key) = config.hidden_size, config.intermediate_size, harness.key_width(config)
    frames, vectors, labels, positions = lens(model, seconds)
    encoder = (frames + 1) // 2 * encoder_dim * (40 if size == 4 else 22)

    layer = 8 * width + size * (2 * query + 2 * key + 3 * between) + 4 * config.num_attention_heads
    working = size * (3 * between + 3 * width)  # gradients at hand in the first MLP of the backward pass
    logits = 12 * config.vocab_size * labels  # log-softmax, its gradient, that of the logits: all float32
    projector = 4 * vectors * (6 * encoder_dim + model.projector.linear1.out_features)
    kept = config.num_hidden_layers * (size * width if again else layer)
    working += layer if again else 0  # of the layer that is computed again
    llm = kept * positions + max(logits, working * positions)
    return batch * max(encoder, projector + (4 + size) * width * positions + llm)


def step(whisper: str, sizes: tuple, batch: int, seconds: float, again: bool) -> None:
    """Two steps of random utterances, all of that length."""
    model = make_model(whisper, sizes, "cpu")
    frames, vectors, labels, positions = lens(model, seconds)
    optimizer = torch.optim.AdamW(model.projector.parameters())
    if again:
        model.gradient_checkpointing_enable()
    model.train()
    speech_mask = torch.zeros(batch, positions, dtype=torch.bool)
    speech_mask[:, harness.BEFORE : harness.BEFORE + vectors] = True
    targets = torch.randint(1000, (batch, positions)).index_fill_(1, torch.arange(positions - labels), IGNORE)
    inputs: dict[str, Tensor] = dict(frames=torch.full((batch,), frames), speech_mask=speech_mask)
    inputs |= dict(mel=torch.randn(batch, model.encoder.dims.n_mels, frames), labels=targets)
    for _ in range(2):
        model(input_ids=torch.zeros(batch, positions, dtype=torch.long), **inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def make_model(whisper: str, sizes: tuple, device: str) -> SpeechLLM:
    return harness.build(SpeechLLM, harness.whisper_dims(whisper), harness.llm_config("toy", sizes), device)


def told_and_took(name: str, again: bool) -> tuple[float, float]:
    """Bytes of a setting by this model of memory, and on this CPU."""
    whisper, sizes, batch, seconds = SETTINGS[name]
    model = make_model(whisper, sizes, "meta")
    told = weight_bytes(model, 4) + activation_bytes(model, 4, batch, seconds, again)
    return told, harness.peak("cpu", step, whisper, sizes, batch, seconds, again)


def check() -> float:
    """Prints the model of memory beside what this CPU takes; returns the largest relative difference."""
    worst = 0.0
    print("| setting | checkpointing | model MB | measured MB | model / measured |\n" + "| --- " * 5 + "|")
    for name in SETTINGS:
        for again in (False, True):
            told, took = told_and_took(name, again)
            row = name, str(again), f"{told / 1e6:.0f}", f"{took / 1e6:.0f}", f"{told / took:.2f}"
            print(f"| {' | '.join(row)} |", flush=True)
            worst = max(worst, abs(told / took - 1))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--llm", default="Qwen/Qwen2-7B-Instruct")
    add("--whisper", default="large-v3")
    add("--gpu_memory", type=float, default=24, help="GiB of one GPU; default: 24")
    add("--gpus", type=int, default=1, help="default: 1")
    add("--seconds", type=float, default=30, help="of every utterance; default: 30, the worst there is")
    add("--lengths", choices=harness.LENGTHS, help="in place of --seconds: those of a corpus")
    add("--peak_tflops", type=float, default=150, help="of one GPU in bfloat16; default: 150")
    add("--share_of_peak", type=float, default=0.4, help="reached in training; default: 0.4")
    add("--check", action="store_true", help="only compare the model of memory with this CPU")
    args = parser.parse_args()
    if args.check:
        raise SystemExit(check() > 0.15)

    mean = most = args.seconds
    if args.lengths:
        mean, _, _, most = harness.LENGTHS[args.lengths]
    dims, config = known_whisper(args.whisper), known_llm(args.llm)
    model = harness.build(SpeechLLM, dims, config, "meta")
    frames, vectors, labels, positions = lens(model, mean)
    print(f"{args.whisper} + {args.llm}, {args.gpus} GPUs of {args.gpu_memory:g} GiB, up to {most:g} s\n")
    print("| weights | activations | weights GiB | GiB per utterance | batch fits | 1,000 hours take |")
    print("| --- " * 6 + "|")
    room, best = args.gpu_memory * GIB * 0.95 - GIB, None
    for gpus in sorted({1, args.gpus}):
        for again in (False, True):
            weights = weight_bytes(model, 2, gpus)
            one = activation_bytes(model, 2, 1, most, again)
            batch = max(0, int((room - weights) // one))
            flop = harness.step_flop(model, frames, vectors, positions, labels, again) * 3.6e6 / mean
            hours = flop / (args.peak_tflops * 1e12 * args.share_of_peak * args.gpus) / 3600
            names = "whole" if gpus == 1 else f"ZeRO-3 over {gpus}", "computed again" if again else "kept"
            took = f"{hours:.1f} h" if batch else "-"
            print(f"| {' | '.join(names)} | {weights / GIB:.1f} | {one / GIB:.2f} | {batch} | {took} |")
            if batch and (best is None or hours < best[0]):
                best = hours, names, batch
    if best is None:
        print("\nNothing fits: take a smaller LLM, a larger GPU, or ZeRO-3 over more --gpus.")
        return
    hours, (held, activations), batch = best
    print(f"\nIt fits: batches of {batch} utterances of {most:g} s on each GPU, weights {held}, activations")
    print(
        f"{activations}. At {args.share_of_peak:.0%} of {args.peak_tflops:g} TFLOP/s, 1,000 hours of speech"
    )
    print(f"in utterances of {mean:g} s take {hours:.1f} hours an epoch on {args.gpus} GPU(s).")


if __name__ == "__main__":
    main()
