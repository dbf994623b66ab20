"""train.py: West's command, what a checkpoint holds, what training leaves alone, how it goes on."""

import hashlib
import json
import math
import re
import resource
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, make_llm, make_manifest, make_tokenizer, make_whisper, ranks, refused, run, script
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import dataset
import encoder
import model
import train
from manifest import read_manifest
from trainer import Watch, newest_checkpoint

WEST = """
    torchrun --standalone --nnodes=1 --nproc_per_node=8 train.py \
      --llm_model_name_or_path Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \
      --data_path train.jsonl --bf16 True --output_dir Qwen-1.5B-Instruct-whisper-tiny \
      --num_train_epochs 5 --per_device_train_batch_size 8 --per_device_eval_batch_size 1 \
      --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 100 \
      --save_total_limit 10 --learning_rate 3e-4 --weight_decay 0.01 --adam_beta2 0.95 --warmup_ratio 0.01 \
      --lr_scheduler_type "cosine" --logging_steps 1 --report_to "none" --model_max_length 512 \
      --gradient_checkpointing --dataloader_num_workers 4 --dataloader_prefetch_factor 10 \
      --deepspeed ds_config_zero3.json
"""
FLAGS = "--projector_hidden_dim 64 --learning_rate 1e-3 --lr_scheduler_type cosine --logging_steps 1"
FLAGS = (FLAGS + " --per_device_train_batch_size 4 --num_train_epochs 4 --disable_tqdm True").split()
ZERO3 = ("--deepspeed", "ds_config_zero3.json")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its collective for CPUs with g++"
)


def data(folder: Path, out: Path) -> list:
    backbones = ["--llm_model_name_or_path", folder / "llm"]
    backbones += ["--whisper_model_name_or_path", folder / "whisper.pt"]
    return [*backbones, "--data_path", folder / "data.jsonl", "--output_dir", out]


def train_here(folder: Path, out: Path, *flags) -> Path:
    """A run of 12 steps (3 an epoch) on toy's 12 utterances, unless flags say otherwise -> its output_dir."""
    script("train.py", *data(folder, out), *FLAGS, *flags)
    return out


def logged(out: Path, name: str) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def config(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def assert_close(out: Path, other: Path) -> None:
    """Same losses and weights, but for rounding: on average a thousandth of what a step moves a weight.

    Adam makes steps of any gradient, so that single weights, whose gradient is mere rounding, may go astray.
    """
    assert logged(out, "loss") == pytest.approx(logged(other, "loss"), rel=1e-4)
    mine, theirs = weights(out), weights(other)
    for name in mine.keys() | theirs.keys():
        assert (mine[name] - theirs[name]).abs().mean() < 1e-3 * 1e-3, name  # learning rate


def cosine(peak: float, warmup: int, steps: int) -> list[float]:
    """The learning rate of each step: up in a straight line for `warmup` steps, then half a cosine."""
    return [
        peak * step / warmup
        if step < warmup
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for step in range(steps)
    ]


# West's command, and what a checkpoint holds


@pytest.fixture(scope="module")
def wide(toy, tmp_path_factory) -> Path:
    """toy with backbones so wide that ZeRO-3 does partition them, and weigh more than a checkpoint may."""
    folder = tmp_path_factory.mktemp("wide")
    make_whisper(folder / "whisper.pt", n_audio_state=192)
    make_llm(folder / "llm", hidden_size=64, intermediate_size=8192, vocab_size=2048)
    shutil.copytree(toy, folder, dirs_exist_ok=True, ignore=lambda *_: ["whisper.pt", "llm", "exp"])
    return folder


@pytest.fixture(scope="module", params=["plain", "zero3", pytest.param("zero3-2", marks=needs_compiler)])
def west(request, wide, tmp_path_factory) -> Path:
    """The output_dir of West's command, word for word, by 1 or 2 processes, or without torchrun, ZeRO-3."""
    out, processes = tmp_path_factory.mktemp("west") / "exp", 2 if request.param == "zero3-2" else 1
    names = {
        "Qwen2-1.5B-Instruct": wide / "llm",
        "tiny": wide / "whisper.pt",
        "train.jsonl": wide / "data.jsonl",
        "Qwen-1.5B-Instruct-whisper-tiny": out,
        "--nproc_per_node=8": f"--nproc_per_node={processes}",
    }
    command = [names.pop(word, word) for word in shlex.split(WEST)]
    assert not names
    if request.param == "plain":
        script(*command[command.index("train.py") : command.index("--deepspeed")])
    else:
        run("-m", "torch.distributed.run", *command[1:])
    return out


def test_wests_learning_rate_warms_up_and_follows_the_cosine(west):
    steps = 5  # one an epoch: 12 utterances are fewer than 8 x 8
    assert logged(west, "learning_rate") == pytest.approx(cosine(3e-4, math.ceil(0.01 * steps), steps))


def test_wests_loss_falls(west):
    loss = logged(west, "loss")
    assert len(loss) == 5 and all(map(math.isfinite, loss)) and loss[-1] < loss[0]


def test_a_checkpoint_is_the_projector_its_config_and_the_trainers_state(west):
    checkpoint = west / "checkpoint-5"
    projector = model.make_projector("conv1d", 192, 64).state_dict()
    saved = weights(checkpoint)
    assert saved.keys() == projector.keys()
    assert all(saved[name].shape == projector[name].shape for name in saved)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved.values())
    assert any(
        (tensor != tensor.bfloat16()).any() for tensor in saved.values()
    )  # not just --bf16 made longer
    assert config(checkpoint)["projector_type"] == "conv1d"
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    assert {"trainer_state.json", "scheduler.pt"} <= {file.name for file in files}
    projector_bytes = sum(4 * tensor.numel() for tensor in saved.values())
    assert sum(file.stat().st_size for file in files) < 5 * projector_bytes


def test_the_output_dir_itself_holds_the_final_projector_and_its_config(west):
    for name in ("model.safetensors", "config.json"):
        assert (west / name).read_bytes() == (west / "checkpoint-5" / name).read_bytes()


@pytest.mark.parametrize("warmup", [("--warmup_ratio", "0.25"), ("--warmup_steps", "3")])
def test_warmup_is_a_share_or_a_number_of_steps(toy, tmp_path, warmup):
    out = train_here(toy, tmp_path, *warmup)
    assert logged(out, "learning_rate") == pytest.approx(cosine(1e-3, 3, 12))


def test_deepspeed_brings_no_optimizer_and_no_scheduler():
    settings = json.loads((ROOT / "ds_config_zero3.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert not {"optimizer", "scheduler"} & settings.keys()


# Resuming, and one run in several forms

HOW = {
    "plain": (1, "--dataloader_num_workers", "2"),
    "2": (2, "--per_device_train_batch_size", "2", "--dataloader_num_workers", "2"),
    "zero3": (1, *ZERO3),
    "zero3-2": (2, "--per_device_train_batch_size", "2", *ZERO3),
}
several = pytest.mark.parametrize("how", ["2", "zero3", pytest.param("zero3-2", marks=needs_compiler)])
every = pytest.mark.parametrize("how", ["plain", "2", "zero3", pytest.param("zero3-2", marks=needs_compiler)])


def start(how: str, folder: Path, out: Path) -> Path:
    processes, *flags = HOW[how]
    flags = [*data(folder, out), *FLAGS, *flags, "--save_steps", "7"]  # of 12, within the third epoch
    out.mkdir(exist_ok=True)
    if how == "plain":
        script("train.py", *flags)
    else:
        ranks(processes, out / "log.txt", "train.py", *flags)
    return out


@pytest.fixture(scope="module")
def uninterrupted(wide, tmp_path_factory) -> Iterator:
    """how -> the output_dir of that run, which is made once."""
    folder = tmp_path_factory.mktemp("runs")
    yield lambda how: folder / how if (folder / how).exists() else start(how, wide, folder / how)


@several
def test_processes_and_deepspeed_train_the_same_projector(uninterrupted, how):
    assert_close(uninterrupted(how), uninterrupted("plain"))


@every
def test_resume_equals_uninterrupted(uninterrupted, wide, tmp_path, how):
    whole, stopped = uninterrupted(how), tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-7", stopped / "checkpoint-7")
    (stopped / "checkpoint-9").mkdir()  # half written: trainer_state.json comes last
    (stopped / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    before = (stopped / "checkpoint-7" / "trainer_state.json").stat().st_mtime_ns
    start(how, wide, stopped)
    assert (stopped / "checkpoint-7" / "trainer_state.json").stat().st_mtime_ns == before  # went on from it
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(stopped, "loss") == logged(whole, "loss")


def test_resume_takes_the_complete_checkpoint_of_most_steps_and_names_others(tmp_path, capsys):
    assert newest_checkpoint(str(tmp_path / "none")) is None
    for steps, state in ((5, "{}"), (10, '{"epoch": 1}'), (15, '{"epoch": '), (20, None)):
        (tmp_path / f"checkpoint-{steps}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{steps}" / "trainer_state.json").write_text(state)
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-30-good")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    told = [f"{tmp_path}/checkpoint-{steps}: not complete, passed over\n" for steps in (20, 15)]
    assert capsys.readouterr().out == "".join(told)


def test_a_finished_run_run_again_changes_nothing(uninterrupted, wide, tmp_path):
    shutil.copytree(uninterrupted("plain"), tmp_path / "again")
    start("plain", wide, tmp_path / "again")
    whole = uninterrupted("plain") / "model.safetensors"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == whole.read_bytes()


def test_resume_from_checkpoint_takes_the_one_named(uninterrupted, wide, tmp_path):
    whole = uninterrupted("plain")
    train_here(wide, tmp_path, "--resume_from_checkpoint", whole / "checkpoint-7", "--max_steps", "8")
    assert logged(tmp_path, "loss")[:7] == logged(whole, "loss")[:7] and len(logged(tmp_path, "loss")) == 8


# What training learns from, and what it leaves alone


def test_accumulating_four_batches_of_two_equals_a_batch_of_eight(toy, tmp_path):
    make_manifest(tmp_path, [0.3, 3.0, 1.1, 0.7, 2.2, 1.6, 0.5, 2.7])
    lines = [json.loads(line) for line in open(tmp_path / "data.jsonl")]
    assert len({len(line["txt"]) for line in lines}) > 4
    flags = ("--data_path", tmp_path / "data.jsonl", "--per_device_train_batch_size")
    whole = train_here(toy, tmp_path / "whole", *flags, 8)
    parts = train_here(toy, tmp_path / "parts", *flags, 2, "--gradient_accumulation_steps", 4)
    assert len(logged(whole, "loss")) == 4
    assert_close(parts, whole)


def test_eos_is_learned_where_pad_is_eos(learned, tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(learned / "llm")
    assert tokenizer.pad_token == tokenizer.eos_token
    texts = [json.loads(line)["txt"] for line in open(learned / "data.jsonl")]
    paths = "--projector_model_path", learned / "exp", "--data_path", learned / "data.jsonl"
    for beams in (1, 3):
        result = tmp_path / f"{beams}.jsonl"
        script("recognize.py", *paths, "--result_path", result, "--num_beams", beams, "--max_new_tokens", 200)
        assert [json.loads(line)["hyp"] for line in open(result)] == texts
    assert "limit" not in capfd.readouterr().err  # each stopped by itself


def digests(folder: Path) -> dict[Path, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_frozen_weights_do_not_move(toy, tmp_path, monkeypatch):
    used, load_llm, load_encoder = [], model.load_llm, encoder.load_encoder
    monkeypatch.setattr(model, "load_llm", lambda name: used.append(load_llm(name)) or used[-1])
    monkeypatch.setattr(encoder, "load_encoder", lambda name: used.append(load_encoder(name)) or used[-1])
    before = digests(toy)
    train_here(toy, tmp_path, "--weight_decay", "0.1", "--gradient_checkpointing")
    assert digests(toy) == before
    fresh = load_encoder(str(toy / "whisper.pt")), load_llm(str(toy / "llm"))
    assert len(used) == 2
    for part, same in zip(used, fresh):
        assert all(parameter.grad is None for parameter in part.parameters())
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, same.state_dict()[name]), name


def test_the_projector_does_move(toy, tmp_path):
    first, last = (weights(train_here(toy, tmp_path / steps, "--max_steps", steps)) for steps in ("1", "12"))
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing",)])
def test_the_frozen_llm_does_not_drop_out(toy, tmp_path, flags):
    dropping = tmp_path / "dropping"
    make_llm(dropping / "llm", attention_dropout=0.5)
    shutil.copy(toy / "whisper.pt", dropping)
    flags += ("--data_path", toy / "data.jsonl", "--max_steps", "2")
    assert_close(train_here(dropping, tmp_path / "a", *flags), train_here(toy, tmp_path / "b", *flags))


# What must not happen in silence


def write_nan(path: Path) -> None:
    samples = torch.zeros(8000)
    samples[4000] = float("nan")
    soundfile.write(path, samples.numpy(), 16000, subtype="FLOAT")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def poisoned(toy, tmp_path_factory) -> Path:
    """toy with an LLM for which the letter z is NaN, and with a z in line 6 alone."""
    folder = tmp_path_factory.mktemp("poisoned")
    make_llm(folder / "llm", tie_word_embeddings=False)
    tensors = load_file(folder / "llm" / "model.safetensors")
    tensors["model.embed_tokens.weight"][make_tokenizer()("z").input_ids] = float("nan")
    save_file(tensors, folder / "llm" / "model.safetensors", {"format": "pt"})
    shutil.copy(toy / "whisper.pt", folder)
    manifest = make_manifest(folder, [0.5] * 12)
    lines = manifest.read_text().splitlines()
    lines[5] = json.dumps({"wav": "5.wav", "txt": "a z a"})
    manifest.write_text("\n".join(lines))
    return folder


def stopped(how: str, folder: Path, out: Path, *flags) -> str:
    """What a run that must fail says last."""
    flags = [*data(folder, out), *FLAGS, *flags]
    if how == "plain":
        with refused() as caught:
            script("train.py", *flags)
        return str(caught.value)
    processes, zero3 = int(how[-1]), ZERO3 if how.startswith("zero3") else ()
    told = ranks(processes, out.parent / "log.txt", "train.py", *flags, *zero3, exitcode=1)
    return [line for line in told.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.parametrize("how", ["plain", "zero3-1", pytest.param("ddp-2", marks=needs_compiler)])
def test_nan_stops_the_run_at_its_step_and_names_the_utterances(poisoned, tmp_path, how):
    out = tmp_path / "exp"
    flags = ("--per_device_train_batch_size", 1, "--num_train_epochs", 1, "--save_steps", 1)
    told = stopped(how, poisoned, out, *flags)
    step = int(re.search(r"step (\d+): NaN or infinity in loss or gradient; ", told)[1])
    assert re.findall(r"data.jsonl:\d+", told) == ["data.jsonl:6"]
    last = str(out / f"checkpoint-{step - 1}")
    assert newest_checkpoint(str(out)) == (last if step > 1 else None)
    before = contents(out)
    if how == "plain":  # the next run comes to the same step, and to the same end
        assert stopped(how, poisoned, out, *flags) == told
    assert contents(out) == before
    assert not (out / "model.safetensors").exists()
    for path in out.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize("how", ["plain", pytest.param("ddp-2", marks=needs_compiler)])
def test_an_infinite_gradient_under_a_good_loss_stops_the_run_too(toy, tmp_path, monkeypatch, how):
    """The norm of the LLM is so big that the gradient overflows float32, and the loss does not."""
    shutil.copytree(toy / "llm", tmp_path / "llm")
    tensors = load_file(toy / "llm" / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] *= 1e12
    save_file(tensors, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    flags = ("--llm_model_name_or_path", tmp_path / "llm")
    assert "step 1: NaN or infinity" in stopped(how, toy, tmp_path / "exp", *flags)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_audio_is_replaced_named_once_and_counted(toy, tmp_path, capfd, workers):
    manifest = make_manifest(tmp_path, [0.5] * 8)
    write_nan(tmp_path / "1.wav")
    (tmp_path / "6.wav").write_bytes((tmp_path / "6.wav").read_bytes()[:9000])
    flags = ("--data_path", manifest, "--dataloader_num_workers", workers, "--num_train_epochs", 3)
    out = train_here(toy, tmp_path / "exp", *flags, "--max_bad_audio", 0.25)
    told = capfd.readouterr().out
    for line, name in ((2, "1.wav"), (7, "6.wav")):
        assert told.count(f"'bad_audio': '{manifest}:{line}: {tmp_path / name}: ") == 1
        assert told.partition("replaced by the next utterance: 2\n")[2].count(f"{manifest}:{line}: ") == 1
    assert len(logged(out, "loss")) == 6  # as many steps as without them

    good = [json.loads(line) for line in manifest.read_text().splitlines()]
    good = "".join(json.dumps(good[i]) + "\n" for i in (0, 2, 2, 3, 4, 5, 7, 7))
    (tmp_path / "good.jsonl").write_text(good)
    assert logged(
        train_here(toy, tmp_path / "b", *flags, "--data_path", tmp_path / "good.jsonl"), "loss"
    ) == (logged(out, "loss"))


@pytest.mark.parametrize("how", ["plain", pytest.param("2", marks=needs_compiler)])
def test_more_bad_audio_than_allowed_stops_the_run_with_the_list(toy, tmp_path, capfd, how):
    manifest = make_manifest(tmp_path, [0.5] * 8)
    for i in (1, 6):
        write_nan(tmp_path / f"{i}.wav")
    flags = [*data(toy, tmp_path / "exp"), *FLAGS, "--data_path", manifest, "--max_bad_audio", 0.2]
    if how == "plain":
        with refused("2 of 8 utterances are bad", "--max_bad_audio 0.2"):
            script("train.py", *flags)
        told = capfd.readouterr().out
    else:
        told = ranks(2, tmp_path / "log.txt", "train.py", *flags, exitcode=1)
    told = [line for line in told.splitlines() if not line.startswith("{")]
    assert {f"{manifest}:{line}" for line in (2, 7)} <= {line[: len(f"{manifest}:2")] for line in told}


def test_what_was_bad_before_a_resume_is_in_the_summary_after_it(toy, tmp_path, capfd):
    manifest = make_manifest(tmp_path, [0.5] * 8)
    write_nan(tmp_path / "1.wav")
    flags = ("--data_path", manifest, "--max_bad_audio", 0.2, "--save_steps", 1, "--num_train_epochs", 1)
    out = train_here(toy, tmp_path / "exp", *flags)
    capfd.readouterr()
    train_here(toy, out, *flags)  # there is no step left to do
    assert f"replaced by the next utterance: 1\n{manifest}:2: " in capfd.readouterr().out


def test_what_is_over_30_s_is_left_out_counted_and_named(toy, tmp_path, capfd):
    manifest = make_manifest(tmp_path, [0.5, 31, 0.6, 30])
    out = train_here(toy, tmp_path / "exp", "--data_path", manifest, "--model_max_length", 700)
    assert f"left out, over 30 s: 1\n{manifest}:2\n" in capfd.readouterr().out
    assert len(logged(out, "loss")) == 4  # epochs, of three utterances


def test_a_run_that_could_not_save_is_refused_before_its_first_step(toy, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/ears")):
        with refused(f"--output_dir {folder}: no checkpoint of "):
            train_here(toy, folder)


def limit_file_size(size: int) -> None:
    """As a disk that gets full: writing more than that into a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_found_before_the_first_step(toy, tmp_path):
    flags = [*data(toy, tmp_path / "exp"), *FLAGS]
    told = run("train.py", *flags, ok=False, preexec_fn=lambda: limit_file_size(20_000))
    assert told.splitlines()[-1].startswith(f"error: --output_dir {tmp_path / 'exp'}: no checkpoint of ")
    assert "Traceback" not in told and "'loss'" not in told


@pytest.mark.parametrize("size", [20_000, 60_000], ids=["in the projector", "in the optimizer"])
def test_a_disk_that_gets_full_leaves_the_last_checkpoint(toy, tmp_path, monkeypatch, size):
    check = Watch.on_pre_optimizer_step

    def fill(self, args, state, *rest, **kwargs):
        check(self, args, state, *rest, **kwargs)
        if state.global_step == 2:
            limit_file_size(size)

    monkeypatch.setattr(Watch, "on_pre_optimizer_step", fill)
    try:
        with refused(f"{tmp_path / 'checkpoint-3'}: not saved", "MB are free"):
            train_here(toy, tmp_path, "--save_steps", 1)
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    monkeypatch.undo()
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    whole = train_here(toy, tmp_path / "whole")
    assert_close(train_here(toy, tmp_path, "--save_steps", 1), whole)  # it goes on from step 2


# Flags


@pytest.fixture(scope="module")
def one_step(toy, tmp_path_factory) -> Path:
    return train_here(toy, tmp_path_factory.mktemp("one"), "--max_steps", "1")


def test_projector_type(toy, tmp_path, one_step):
    assert config(one_step)["projector_type"] == "conv1d"
    with refused("--projector_type none-such"):
        train_here(toy, tmp_path, "--projector_type", "none-such")


def test_projector_stride_and_hidden_dim(toy, tmp_path):
    out = train_here(
        toy, tmp_path, "--projector_stride", "3", "--projector_hidden_dim", "48", "--max_steps", "1"
    )
    expected = model.make_projector("conv1d", 32, 32, stride=3, hidden_dim=48).state_dict()
    assert {name: tensor.shape for name, tensor in weights(out).items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert (config(out)["projector_stride"], config(out)["projector_hidden_dim"]) == (3, 48)


def test_encoder_window(toy, tmp_path, one_step):
    out = train_here(toy, tmp_path, "--encoder_window", "30s", "--max_steps", "1")
    assert logged(out, "loss") != logged(one_step, "loss")
    assert (config(one_step)["encoder_window"], config(out)["encoder_window"]) == ("utterance", "30s")
    with pytest.raises(SystemExit):
        train_here(toy, tmp_path, "--encoder_window", "30")  # not taken for one of the two in silence


def test_seed(toy, tmp_path, one_step):
    same = train_here(toy, tmp_path / "same", "--seed", "42", "--max_steps", "1")
    assert (same / "model.safetensors").read_bytes() == (one_step / "model.safetensors").read_bytes()
    other = train_here(toy, tmp_path / "other", "--seed", "43", "--max_steps", "1")
    assert logged(other, "loss") != logged(one_step, "loss")


def test_eval_data_path_is_what_eval_loss_is_of(toy, tmp_path):
    manifest = make_manifest(tmp_path, [0.5, 1.5])
    flags = ("--eval_data_path", manifest, "--evaluation_strategy", "epoch", "--learning_rate", "0")
    same = train_here(toy, tmp_path / "same", "--data_path", manifest, *flags)
    assert len(logged(same, "eval_loss")) == 4  # epochs
    assert logged(same, "eval_loss") == pytest.approx(logged(same, "loss"), rel=1e-5)
    other = train_here(toy, tmp_path / "other", *flags)  # trained on other data, without learning
    assert logged(other, "eval_loss") == pytest.approx(logged(same, "eval_loss"), rel=1e-5)


def test_gradient_checkpointing_computes_the_same_loss_twice(toy, tmp_path, one_step, monkeypatch):
    calls, forward = [], Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda *args: calls.append(1) or forward(*args))
    out = train_here(toy, tmp_path, "--gradient_checkpointing", "--max_steps", "1")
    assert len(calls) == 2 * 2  # each of two layers, forward and again in the backward pass
    assert_close(out, one_step)


def test_bf16_leaves_the_projector_in_float32(toy, tmp_path, one_step):
    out = train_here(toy, tmp_path, "--bf16", "True", "--max_steps", "1")
    assert logged(out, "loss") != logged(one_step, "loss")
    assert logged(out, "loss") == pytest.approx(logged(one_step, "loss"), rel=0.02)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


def test_help_lists_every_flag_of_ours(capsys):
    with pytest.raises(SystemExit) as caught:
        script("train.py", "--help")
    assert caught.value.code == 0
    told = capsys.readouterr().out
    ours = [
        field.name for arguments in (train.ModelArguments, train.DataArguments) for field in fields(arguments)
    ]
    for name in [*ours, "evaluation_strategy", "warmup_ratio"]:
        assert f"--{name} " in told or f"--{name}," in told, name


# What is wrong is refused, in one line that names it


def test_model_max_length_refuses_longer_examples(toy, tmp_path):
    flags = ("--data_path", make_manifest(tmp_path, [1.0]), "--max_steps", "1", "--model_max_length")
    with pytest.raises(SystemExit) as caught:
        train_here(toy, tmp_path / "exp", *flags, 20)
    positions = int(re.search(r"data.jsonl:1: .*\b(\d+) positions", str(caught.value))[1])
    assert positions > 10 + len(json.loads((tmp_path / "data.jsonl").read_text())["txt"])  # speech and target
    with refused("data.jsonl:1", f"--model_max_length is {positions - 1}"):
        train_here(toy, tmp_path / "exp", *flags, positions - 1)
    train_here(toy, tmp_path / "exp", *flags, positions)


@pytest.mark.parametrize("flag", ["--llm_model_name_or_path", "--whisper_model_name_or_path", "--data_path"])
def test_a_wrong_path_is_refused(toy, tmp_path, flag):
    with refused(f"{flag} {tmp_path / 'nowhere'}"):
        train_here(toy, tmp_path, flag, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"wav": "0.wav", "txt": "one"', "JSON"),
        ('{"wav": "0.wav"}', "txt"),
        ('{"wav": "missing.wav", "txt": "one"}', "missing.wav"),
    ],
)
def test_a_wrong_line_of_a_manifest_is_refused(toy, tmp_path, line, says):
    manifest = make_manifest(tmp_path, [0.5, 0.6])
    manifest.write_text(manifest.read_text() + line + "\n")
    with refused(f"{manifest}:3", says):
        train_here(toy, tmp_path / "exp", "--data_path", manifest)


def test_a_refused_run_ends_with_one_line_and_an_exit_code(toy, tmp_path):
    whisper = make_whisper(tmp_path / "whisper.pt")
    whisper.write_bytes(whisper.read_bytes()[:100])
    told = run("train.py", *data(toy, tmp_path), "--whisper_model_name_or_path", whisper, ok=False)
    assert told.splitlines()[-1].startswith(f"error: --whisper_model_name_or_path {whisper}: ")
    assert "Traceback" not in told


def test_batches_of_so_many_seconds_train_on_each_utterance_once_an_epoch(toy, tmp_path, monkeypatch):
    sizes, seen, collated = [], [], dataset.collate

    def collate(examples):
        batch = collated(examples)
        sizes.append(len(batch["where"]) * batch["mel"].shape[-1] / 100)
        seen.extend(batch["where"])
        return batch

    monkeypatch.setattr(dataset, "collate", collate)
    out = train_here(toy, tmp_path, "--max_batch_seconds", "5", "--num_train_epochs", "2")
    assert (
        max(sizes) <= max(5, read_manifest(str(toy / "data.jsonl")).seconds.max())
        and len(set(map(int, sizes))) > 1
    )
    assert sorted(seen) == sorted(2 * [f"{toy / 'data.jsonl'}:{line}" for line in range(1, 13)])
    assert len(logged(out, "loss")) == len(sizes)


def test_padding_and_waiting_are_logged(toy, tmp_path):
    out = train_here(toy, tmp_path, "--logging_steps", "3", "--num_train_epochs", "1")
    by_length, (wait,) = logged(out, "padding"), logged(out, "data_wait")
    assert 0 < by_length[0] < 0.5 and 0 < wait < 1
    alone = train_here(toy, tmp_path / "1", "--per_device_train_batch_size", "1", "--max_steps", "2")
    assert logged(alone, "padding") == [0, 0]
    window = ("--encoder_window", "30s", "--max_steps", "1", "--per_device_train_batch_size", "1")
    assert logged(train_here(toy, tmp_path / "30", *window), "padding")[0] > 0.5


def test_a_yaml_file_holds_flags_and_those_behind_it_prevail(toy, tmp_path):
    out, flags = tmp_path / "out", "disable_tqdm: true\nlearning_rate: 3e-4\nmax_steps: 2\nlogging_steps: 1\n"
    names = data(toy, out)[::2], map(str, data(toy, out)[1::2])
    paths = "".join(f"{name[2:]}: {value}\n" for name, value in zip(*names))
    (tmp_path / "config.yaml").write_text(flags + paths)
    script("train.py", tmp_path / "config.yaml", "--max_steps", "1")
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["max_steps"] == 1 and logged(out, "learning_rate") == [3e-4]


@pytest.mark.parametrize(
    "text, says", [("a: [", "config.yaml"), ("- a", "config.yaml"), (None, "No such file")]
)
def test_a_yaml_file_that_is_none_is_one_error(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with refused(says):
        script("train.py", tmp_path / "config.yaml")
