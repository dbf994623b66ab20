"""features.py: what the cache holds is what the encoder says, bit for bit; it refuses what is another's."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_whisper, ranks, refused, script
from safetensors.torch import load_file
from test_train import FLAGS, data, logged, train_here, weights

import features
from dataset import SpeechDataset, collate, load_tokenizer, render_prompt
from encoder import load_encoder
from errors import Refused
from features import FeatureCache
from manifest import read_audio, read_manifest
from model import SpeechLLM, fingerprint, load_llm
from sampler import by_seconds


@pytest.fixture
def parts(toy) -> tuple[SpeechLLM, SpeechDataset]:
    whisper, llm = load_encoder(str(toy / "whisper.pt")), load_llm(str(toy / "llm"))
    tokenizer = load_tokenizer(str(toy / "llm"))
    config = {
        "projector_type": "conv1d",
        "projector_stride": 5,
        "projector_hidden_dim": 64,
        "encoder_window": "real",
        **fingerprint(whisper, llm),
        **render_prompt(tokenizer),
    }
    model = SpeechLLM(whisper, llm, config)
    utterances = read_manifest(str(toy / "data.jsonl"), to_train=True)
    return model, SpeechDataset(utterances, tokenizer, config, model.projector.speech_len, 512)


def filled(folder: Path, model: SpeechLLM, dataset: SpeechDataset) -> FeatureCache:
    cache = FeatureCache(str(folder), model.encoder, "real", torch.float32)
    cache.fill(model, dataset, by_seconds(dataset.utterances.seconds, 1e9, 4), workers=0)
    return cache


def test_cached_is_uncached_bit_for_bit(parts, tmp_path):
    model, dataset = parts
    cache = filled(tmp_path, model, dataset)
    order = dataset.utterances.seconds.argsort(kind="stable")[::-1]
    for first in range(0, len(dataset), 4):
        utterances = [dataset.utterances[i] for i in order[first : first + 4]]
        batch = collate([dataset.hear(utterance, read_audio(utterance)) for utterance in utterances])
        cached = collate([cache.load(utterance) for utterance in utterances])
        assert torch.equal(cached["encoded"], model.encode(batch["mel"], batch["frames"]))
        assert torch.equal(cached["frames"], batch["frames"])


def test_the_loss_of_a_cached_batch_is_that_of_its_audio(parts, tmp_path):
    model, dataset = parts
    batch = collate([dataset[i] for i in range(4)])
    dataset.features = filled(tmp_path, model, dataset)
    cached = collate([dataset[i] for i in range(4)])
    assert "mel" not in cached and "encoded" not in batch
    for loose in (batch, cached):
        loose.pop("where"), loose.pop("faults")
    torch.testing.assert_close(model(**cached)["loss"], model(**batch)["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("flags", [(), ("--encoder_window", "30s")])
def test_training_never_hears_again_what_is_cached(toy, tmp_path, monkeypatch, flags):
    plain = train_here(toy, tmp_path / "plain", *flags)
    cached = ("--feature_cache", tmp_path / "cache", *flags)
    first = train_here(toy, tmp_path / "first", *cached)
    monkeypatch.setattr(features.SpeechLLM, "encode", None)  # not callable
    monkeypatch.setattr(SpeechDataset, "hear", None)
    second = train_here(toy, tmp_path / "second", *cached)
    assert logged(first, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert logged(second, "loss") == logged(first, "loss")
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name])


def test_two_processes_fill_one_cache(toy, tmp_path):
    cache = ("--feature_cache", tmp_path / "cache", "--max_steps", "2")
    ranks(2, tmp_path / "log", "train.py", *data(toy, tmp_path / "two"), *FLAGS, *cache)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 12
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_file()] == ["cache.json"]


def test_a_stale_file_is_not_used(parts, toy, tmp_path):
    model, dataset = parts
    cache = filled(tmp_path / "cache", model, dataset)
    utterance = dataset.utterances[0]
    before = cache.path(utterance)
    shutil.copy(utterance.path, tmp_path / "kept.wav")
    try:
        os.utime(utterance.path, ns=(0, 0))  # the recording was written again
        assert cache.path(utterance) != before
        with refused_here("No such file"):
            cache.load(utterance)
        cache = filled(tmp_path / "cache", model, dataset)
        torch.testing.assert_close(cache.load(utterance)["encoded"], load_file(before)["encoded"])
    finally:
        shutil.copystat(tmp_path / "kept.wav", utterance.path)


def refused_here(says: str):
    return pytest.raises(Refused, match=says)


@pytest.mark.parametrize("other", ["encoder", "window", "dtype"])
def test_another_encoders_cache_is_refused(parts, tmp_path, other):
    model, _ = parts
    FeatureCache(str(tmp_path), model.encoder, "real", torch.float32)
    settings = {"encoder": model.encoder, "window": "real", "dtype": torch.float32}
    weights = load_encoder(str(make_whisper(tmp_path / "whisper.pt", seed=1)))  # of the same sizes
    settings[other] = {"encoder": weights, "window": "30s", "dtype": torch.bfloat16}[other]
    with refused_here(f"made with another {other}"):
        FeatureCache(str(tmp_path), *settings.values())


def test_a_cache_of_nothing_known_is_refused(parts, tmp_path):
    (tmp_path / "cache.json").write_text("{")
    with refused_here("--feature_cache"):
        FeatureCache(str(tmp_path), parts[0].encoder, "real", torch.float32)
    (tmp_path / "cache.json").write_text(json.dumps([]))
    with refused_here("--feature_cache"):
        FeatureCache(str(tmp_path), parts[0].encoder, "real", torch.float32)


def test_a_killed_write_leaves_nothing_wrong(parts, tmp_path, monkeypatch):
    model, dataset = parts
    whole, written = features.save_file, []

    def killed(tensors, path):
        whole(tensors, path)
        written.append(path)
        if len(written) == 6:
            os.truncate(path, 100)
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "killed", model, dataset)
    monkeypatch.setattr(features, "save_file", whole)
    killed, other = filled(tmp_path / "killed", model, dataset), filled(tmp_path / "other", model, dataset)
    for utterance in dataset.utterances:
        torch.testing.assert_close(killed.load(utterance), other.load(utterance))


def test_a_damaged_file_is_named_and_replaced_in_training(parts, tmp_path):
    model, dataset = parts
    dataset.features = filled(tmp_path, model, dataset)
    path = dataset.features.path(dataset.utterances[0])
    os.truncate(path, 100)
    example = dataset[0]
    assert example["where"] == dataset.utterances[1].where
    assert path in example["faults"][0] and "data.jsonl:1" in example["faults"][0]


def test_a_folder_that_cannot_be_is_one_clear_error(toy, tmp_path):
    (tmp_path / "cache").write_text("")  # not a folder
    with refused("--feature_cache"):
        script("train.py", *data(toy, tmp_path / "out"), *FLAGS, "--feature_cache", tmp_path / "cache")
