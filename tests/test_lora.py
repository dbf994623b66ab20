"""--lora_rank: a few trained ranks in the LLM, saved and loaded with the projector; without it, nothing."""

import json
import sys

import pytest
import torch
from conftest import ranks, refused, script
from safetensors.torch import load_file, save_file
from test_train import (
    FLAGS,
    ZERO3,
    assert_close,
    config,
    data,
    digests,
    logged,
    needs_compiler,
    train_here,
    weights,
)

LORA = ("--lora_rank", "2")


def lora_of(out) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights(out).items() if name.startswith("llm.")}


def test_lora_and_projector_train_and_nothing_else_does(toy, tmp_path):
    before = digests(toy)
    one = train_here(toy, tmp_path / "one", *LORA, "--max_steps", "1")
    all_ = train_here(toy, tmp_path / "all", *LORA)
    plain = train_here(toy, tmp_path / "plain")
    assert digests(toy) == before
    assert config(all_)["lora_rank"] == 2 and config(plain)["lora_rank"] == 0 and not lora_of(plain)
    assert logged(one, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-5)  # starts as nothing
    assert logged(all_, "loss")[-1] != pytest.approx(logged(plain, "loss")[-1], rel=1e-3)
    assert {name.split(".")[-3] for name in lora_of(all_)} == {"lora_A", "lora_B"}
    assert not any("lm_head" in name or "embed" in name for name in lora_of(all_))
    for name, weight in lora_of(all_).items():
        assert weight.dtype == torch.float32 and 2 in weight.shape
        assert not torch.equal(weight, lora_of(one)[name])


def test_recognition_uses_it(learned, tmp_path):
    flags = "--max_steps 150 --per_device_train_batch_size 4 --learning_rate 3e-3 --projector_hidden_dim 512"
    flags += " --lr_scheduler_type cosine --warmup_steps 10 --disable_tqdm True"
    script("train.py", *data(learned, tmp_path / "exp"), *flags.split(), *LORA)

    def hyps(name: str) -> list[str]:
        result = tmp_path / f"{name}.jsonl"
        flags = "--projector_model_path", tmp_path / name, "--data_path", learned / "data.jsonl"
        script("recognize.py", *flags, "--result_path", result)
        return [json.loads(line)["hyp"] for line in result.read_text().splitlines()]

    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    assert hyps("exp") == texts
    tensors = load_file(tmp_path / "exp/model.safetensors")
    (tmp_path / "less").mkdir()
    (tmp_path / "less/config.json").write_bytes((tmp_path / "exp/config.json").read_bytes())
    none = {name: 0 * weight if "lora_B" in name else weight for name, weight in tensors.items()}
    save_file(none, tmp_path / "less/model.safetensors")
    assert hyps("less") != texts
    save_file(
        {name: weight for name, weight in tensors.items() if "lora_B" not in name},
        tmp_path / "less/model.safetensors",
    )
    with refused("not what its config.json says"):
        hyps("less")


def test_resume_equals_uninterrupted(toy, tmp_path):
    whole, folder = train_here(toy, tmp_path / "whole", *LORA), tmp_path / "stopped"
    steps = (*LORA, "--save_steps", "6")
    train_here(toy, folder, *steps)
    (folder / "checkpoint-12/trainer_state.json").unlink()
    (folder / "model.safetensors").unlink()
    train_here(toy, folder, *steps)  # from step 6
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(folder)[name])


@needs_compiler
def test_zero3_trains_and_saves_the_same(toy, tmp_path):
    plain = train_here(toy, tmp_path / "plain", *LORA)
    flags = [*data(toy, tmp_path / "zero3"), *FLAGS, *LORA, *ZERO3, "--save_steps", "6"]
    ranks(1, tmp_path / "log.txt", "train.py", *flags)
    assert_close(tmp_path / "zero3", plain)
    (tmp_path / "zero3/checkpoint-12/trainer_state.json").unlink()
    (tmp_path / "zero3/model.safetensors").unlink()
    ranks(1, tmp_path / "log.txt", "train.py", *flags)
    assert_close(tmp_path / "zero3", plain)


def test_without_it_peft_is_not_needed(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # not to be imported
    train_here(toy, tmp_path / "plain", "--max_steps", "1")
    with pytest.raises(ImportError):
        train_here(toy, tmp_path / "lora", *LORA, "--max_steps", "1")
