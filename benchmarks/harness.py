"""What the benchmarks share: known sizes, models of random weights, lengths, pairs of runs, peaks, tables."""

import argparse
import ctypes
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch._dynamo
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models import llama, qwen2
from whisper.model import ModelDimensions

sys.path.insert(0, str(Path(__file__).parents[1]))
from encoder import Encoder  # noqa: E402
from model import SpeechLLM, fingerprint  # noqa: E402

OF_SIZE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
LLMS = {  # those sizes, and whether the LM head is the embedding table
    "toy": (256, 768, 6, 4, 2, 4000, False),  # LM head / body 0.22 in FLOPs; of Qwen2-1.5B 0.18
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256, False),
}
WHISPERS = {  # n_mels, width, heads, layers
    "toy": (80, 256, 4, 6),
    "tiny": (80, 384, 6, 4),
    "base": (80, 512, 8, 6),
    "small": (80, 768, 12, 12),
    "medium": (80, 1024, 16, 24),
    "large": (128, 1280, 20, 32),  # large-v3 and turbo
    "large-v2": (80, 1280, 20, 32),  # and large-v1
}
SHAPES = {
    "toy": ("toy", "toy"),
    "tiny-0.5b": ("tiny", "Qwen2-0.5B"),
    "large-1.5b": ("large", "Qwen2-1.5B"),
}
LENGTHS = {"aishell": (4.5, 1.4, 1, 15), "librispeech": (12.3, 3.8, 1.5, 30)}  # seconds: mean, sd, from, to
TOKENS_A_SECOND, BEFORE, AFTER = 3.5, 14, 10  # ids of Qwen2's chat template before and after the speech


warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
_ = llama.LlamaForCausalLM, qwen2.Qwen2ForCausalLM, torch._dynamo  # now, so that they count in no peak


def llm_config(name: str, sizes: tuple | None = None) -> PreTrainedConfig:
    """The config of a name in LLMS, or of such sizes."""
    *sizes, tied = sizes or LLMS[name]
    model_type = "llama" if name.startswith("Llama") else "qwen2"
    return AutoConfig.for_model(model_type, **dict(zip(OF_SIZE.split(), sizes)), tie_word_embeddings=tied)


def whisper_dims(name: str) -> ModelDimensions:
    """The encoder's sizes of a name in WHISPERS."""
    n_mels, width, heads, layers = WHISPERS[name]
    return ModelDimensions(n_mels, 1500, width, heads, layers, 8, 4, width, heads, 1)


def build(cls: type[SpeechLLM], dims: ModelDimensions, llm: PreTrainedConfig, device: str) -> SpeechLLM:
    """Random weights of those sizes; on cuda the LLM is in bfloat16. The rest is as the scripts load it."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder = Encoder(dims)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        llm = AutoModelForCausalLM.from_config(llm, dtype=dtype)
    config = dict(projector_type="conv1d", projector_stride=5, projector_hidden_dim=2048)
    config |= {**fingerprint(encoder, llm), "encoder_window": "utterance"}
    return cls(encoder, llm, config).to(device)


def of_shape(cls: type[SpeechLLM], shape: str, device: str) -> SpeechLLM:
    """As `build`, of a name in SHAPES."""
    whisper, llm = SHAPES[shape]
    return build(cls, whisper_dims(whisper), llm_config(llm), device)


def draw(lengths: str, count: int, seed: int = 0) -> np.ndarray:
    """Durations (count,) in seconds, normal and clipped, as of a corpus."""
    mean, deviation, shortest, longest = LENGTHS[lengths]
    return np.random.default_rng(seed).normal(mean, deviation, count).clip(shortest, longest)


def by_length(seconds: np.ndarray, batch_size: int, steps: int) -> list[np.ndarray]:
    """Indices of `steps` of all the batches that `seconds`, sorted, make: evenly spread over the lengths."""
    batches = np.argsort(seconds, kind="stable").reshape(-1, batch_size)
    every = len(batches) / steps
    return [batches[int((step + 0.5) * every)] for step in range(steps)]


def wait(device: str) -> float:
    """The time, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds(arms: dict[str, Callable[[], None]], count: int, device: str) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one to warm up; every second runs backwards: A B, B A."""
    took = {arm: [] for arm in arms}
    for number in range(count + 1):
        for arm in list(arms)[:: (-1) ** number]:
            start = wait(device)
            arms[arm]()
            took[arm].append(wait(device) - start)
    return {arm: seconds[1:] for arm, seconds in took.items()}


def ratio(base: list[float], seconds: list[float]) -> list[float]:
    """How many times as fast as `base`, pair by pair: median, smallest, largest."""
    ratios = [first / second for first, second in zip(base, seconds, strict=True)]
    return [median(ratios), min(ratios), max(ratios)]


def peak(device: str, work: Callable, *args) -> int:
    """Bytes that work(*args) takes at its peak, weights included, in a process of its own.

    On a CPU resident memory over what a micro step had taken, so call it before torch starts threads.
    """
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    receiver, sender = context.Pipe(duplex=False)
    ctypes.CDLL(None).malloc_trim(0)  # else what is free here would be free there
    process = context.Process(target=_peak, args=(sender, device, work, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__}{args}: ended without telling its peak") from None
    finally:
        process.join()


def _peak(sender, device: str, work: Callable, *args) -> None:
    if device == "cuda":
        work(*args)
        return sender.send(torch.cuda.max_memory_allocated())
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back at once
    _micro_step()  # else 45 MB of libtorch's code, read for the first time, would count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(*args)
    sender.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def _micro_step() -> None:
    config = llm_config("toy", (16, 16, 1, 2, 2, 50, False))
    model = build(SpeechLLM, ModelDimensions(80, 1500, 16, 2, 1, 8, 4, 16, 2, 1), config, "cpu")
    inputs = dict(frames=torch.tensor([20]), input_ids=torch.zeros(1, 6, dtype=torch.long))
    inputs["speech_mask"] = torch.arange(6)[None] < model.projector.speech_len(20)
    model(mel=torch.randn(1, 80, 20), labels=torch.ones(1, 6, dtype=torch.long), **inputs)["loss"].backward()
    torch.optim.AdamW(model.projector.parameters()).step()


def matrix_peak(device: str) -> float:
    """FLOP a second of a big product of matrices: bfloat16 on a GPU, else float32."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    took = rounds({"product": lambda: [left @ right for _ in range(5)]}, 5, device)["product"]
    return 5 * 2 * size**3 / min(took)


def key_width(config: PreTrainedConfig) -> tuple[int, int]:
    """Of all query heads, and of all key heads."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head


def encoder_flop(dims: ModelDimensions, frames: int) -> float:
    """Of a forward pass over mel frames: two convolutions, and layers of attention and an MLP of width 4."""
    width, encoder_len = dims.n_audio_state, (frames + 1) // 2
    convs = 6 * width * (dims.n_mels * frames + width * encoder_len)
    return convs + dims.n_audio_layer * (24 * width**2 * encoder_len + 4 * width * encoder_len**2)


def llm_flop(config: PreTrainedConfig, positions: float, keys: float | None = None) -> float:
    """Of a forward pass of the layers, without head; each position attends to `keys`, or those before it."""
    query, key = key_width(config)
    weights = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_hidden_layers * positions * (2 * weights + 4 * query * (keys or positions / 2))


def head_flop(config: PreTrainedConfig, positions: float) -> float:
    return 2 * config.hidden_size * config.vocab_size * positions


def step_flop(model: SpeechLLM, frames: int, vectors: int, positions: int, logits: int, again: bool) -> float:
    """Of a training step, an utterance: a frozen LLM costs forward and the gradients of its inputs."""
    config, projector = model.llm.config, sum(map(torch.numel, model.projector.parameters()))
    llm = llm_flop(config, positions) * (3 if again else 2) + head_flop(config, logits) * 2
    return encoder_flop(model.encoder.dims, frames) + 6 * projector * vectors + llm


def add_flags(parser: argparse.ArgumentParser, batch_size: int) -> None:
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: bfloat16; not yet run on one")
    add("--shape", default="toy", choices=SHAPES)
    add("--lengths", default="aishell", choices=LENGTHS)
    add("--batch_size", type=int, default=batch_size, help=f"default: {batch_size}")
    add("--steps", type=int, default=4, help="batches in each run of an arm; default: 4")
    add("--pairs", type=int, default=7, help="runs of each arm; default: 7")
    add("--json", help="also write the rows here")


def report(args: argparse.Namespace, what: str, limit: float, rows: list[dict]) -> None:
    """Prints rows of {column: text, number, or median and spread} in markdown; --json gets them too."""

    def cell(value) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return "{:.3g} ({:.3g} to {:.3g})".format(*value)
        return f"{value:.0f}" if isinstance(value, float) and value >= 100 else f"{value:.3g}"

    where = f"{args.shape} on {args.device}, {torch.get_num_threads()} threads, batches of {args.batch_size}"
    peak_told = f"{args.pairs} pairs; the matrix peak is {limit / 1e12:.3g} TFLOP/s"
    title = f"{what} at {args.lengths}'s lengths: {where}, {peak_told}"
    print(f"\n{title}\n")
    for row in [{name: name for name in rows[0]}, {name: "---" for name in rows[0]}, *rows]:
        print(f"| {' | '.join(map(cell, row.values()))} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"title": title, "flags": vars(args), "rows": rows}, indent=1))
