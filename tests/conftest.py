"""Tiny random backbones of true form, and recordings of noise: offline, on a CPU, in seconds."""

import importlib.metadata
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions"))  # compiled once
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
torch.set_num_threads(1)  # such small tensors only wait for a second thread

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_whisper(path: Path, n_mels: int = 80, seed: int = 0, **sizes) -> Path:
    """A random openai-whisper checkpoint file: two layers of width 32 unless told otherwise."""
    torch.manual_seed(seed)
    dims = dict(n_mels=n_mels, n_audio_ctx=1500, n_audio_state=32, n_audio_head=2, n_audio_layer=2)
    dims |= dict(n_vocab=8, n_text_ctx=4, n_text_state=32, n_text_head=2, n_text_layer=1) | sizes
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    torch.nn.init.normal_(model.decoder.positional_embedding)
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, path)
    return path


def make_tokenizer(
    chat_template: str | None = CHATML,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
):
    """A byte-level tokenizer without merges: any text is one token a byte."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad or eos, bos_token=bos
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = chat_template
    return fast


def make_llm(folder: Path, model_type: str = "qwen2", tokenizer=None, seed: int = 0, **config) -> Path:
    """A random causal LLM's folder: two layers of width 32, grouped heads, tied embeddings by default."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer()
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    sizes |= dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | config)))
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_manifest(folder: Path, seconds: list[float], seed: int = 0) -> Path:
    """Recordings of noise at 16 kHz with short texts."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    words = "one two three four five six seven".split()
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for i, length in enumerate(seconds):
            soundfile.write(folder / f"{i}.wav", 0.1 * random.standard_normal(int(length * 16000)), 16000)
            text = " ".join(random.choice(words, size=1 + int(length * 2)))
            file.write(json.dumps({"wav": f"{i}.wav", "txt": text}) + "\n")
    return folder / "data.jsonl"


OK = {"wav": "ok.wav", "txt": "yes"}


def pytest_terminal_summary(terminalreporter) -> None:
    names = ("torch", "transformers", "deepspeed", "openai-whisper", "soundfile")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in names)
    terminalreporter.write_line(f"on Python {sys.version.split()[0]}, {', '.join(versions)}")


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with ok.wav (1 s) and files that are no audio, hold none, or too much."""
    folder = tmp_path_factory.mktemp("clips")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(folder / "ok.wav", noise, 16000)
    soundfile.write(folder / "long.wav", np.zeros(31 * 8000), 8000)
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16000)
    (folder / "garbage.wav").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.wav").write_bytes(b"")
    return folder


def lines(folder: Path, *records: dict | str | bytes) -> Path:
    """A manifest of these records; text and bytes stand in it as they are."""
    manifest = folder / "manifest.jsonl"
    with open(manifest, "wb") as file:
        for record in records:
            text = json.dumps(record) if isinstance(record, dict) else record
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return manifest


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with whisper.pt, llm/ and data.jsonl (12 utterances of 0.3 to 3 s)."""
    folder = tmp_path_factory.mktemp("toy")
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm")
    make_manifest(folder, [0.3, 3.0, 1.1, 0.7, 2.2, 1.6, 0.5, 2.7, 1.3, 0.9, 1.9, 0.4])
    return folder


def run(*command, ok: bool = True, **kwargs) -> str:
    """Runs a script of the repo from its root; returns what it printed. Another exit than expected fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    assert (done.returncode == 0) == ok, done.stdout[-4000:]
    return done.stdout


@contextmanager
def refused(*says: str):
    """What is done in here must be refused, in one line that says all of this."""
    from errors import Refused

    with pytest.raises(Refused) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message and all(said in message for said in says), message


def script(name: str, *args) -> None:
    """Runs a script of the repo as `python name args` would, but in this process, which has its imports."""
    argv, environ = sys.argv, dict(os.environ)
    sys.argv = [name, *map(str, args)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that one that is pending is forgotten
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environ)


class Run:
    """A script in several processes, with torchrun's environment (0: one without), but forked: a quick start.

    real: by torchrun itself (0: by python) instead. Each process has a group of its own.
    """

    def __init__(self, log: Path, processes: int, name: str, *args, real: bool = False):
        self.log, self.began = log, time.monotonic()
        log.write_text("")
        if real:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *(torchrun if processes else []), name, *map(str, args)]
            how = dict(cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
            with open(log, "w") as file:
                self.processes = [subprocess.Popen(command, stdout=file, stderr=file, **how)]
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(["train", "recognize", "deepspeed", "conftest"])
        args = [(rank, processes, port, log, name, args) for rank in range(processes or 1)]
        self.processes = [forkserver.Process(target=one_rank, args=each) for each in args]
        for process in self.processes:
            process.start()

    def send(self, signum: int, after: float = 0, whom: slice = slice(None)) -> str:
        """So many seconds after the start, to the groups of these processes -> what had been printed then."""
        time.sleep(max(0, self.began + after - time.monotonic()))
        told = self.log.read_text()
        for process in self.processes[whom]:
            with suppress(ProcessLookupError):  # where it has ended
                try:
                    os.killpg(process.pid, signum)
                except ProcessLookupError:  # it has not yet made a group
                    os.kill(process.pid, signum)
        return told

    def wait(self, whom: slice = slice(None), timeout: float = 60) -> list[int]:
        """Their exit codes. What takes longer is a deadlock."""
        until, codes = time.monotonic() + timeout, [None]
        while None in codes and time.monotonic() < until:
            time.sleep(0.01)
            codes = [p.poll() if hasattr(p, "poll") else p.exitcode for p in self.processes[whom]]
        if None in codes:
            self.send(signal.SIGKILL)
        assert None not in codes, f"deadlock, {codes}:\n{self.log.read_text()[-4000:]}"
        return codes

    def end(self, *allowed: int) -> float:
        """The seconds it took until all exited with one of these codes (default: 0)."""
        codes = self.wait(timeout=300)
        assert set(codes) <= set(allowed or [0]), f"{codes}:\n{self.log.read_text()[-4000:]}"
        return time.monotonic() - self.began


def ranks(processes: int, log: Path, name: str, *args, exitcode: int = 0) -> str:
    """What a script prints in that many processes."""
    Run(log, processes, name, *args).end(exitcode)
    return log.read_text()


def one_rank(rank: int, processes: int, port: str, log: Path, name: str, args: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers; inherited was forkserver
    os.setsid()  # so that it can be killed together with its loader's workers
    os.chdir(ROOT)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    if processes:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    script(name, *args)


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> Path:
    """A folder like toy's with 4 utterances, and in exp/ a projector that train.py made learn them by heart.

    The tokenizer pads with its eos. The random LLM is wide and untied, so that its input can steer it.
    """
    folder = tmp_path_factory.mktemp("learned")
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    make_manifest(folder, [1.0, 1.4, 0.6, 1.8])
    backbones = ["--llm_model_name_or_path", folder / "llm"]
    backbones += ["--whisper_model_name_or_path", folder / "whisper.pt"]
    flags = "--max_steps 150 --per_device_train_batch_size 4 --learning_rate 3e-3 --projector_hidden_dim 512"
    flags += " --lr_scheduler_type cosine --warmup_steps 10 --disable_tqdm True"
    data = ["--data_path", folder / "data.jsonl", "--output_dir", folder / "exp"]
    script("train.py", *backbones, *data, *flags.split())
    return folder
