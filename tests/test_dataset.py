"""dataset.py: broken lines are named, audio of any form is heard alike, labels are built, not repaired."""

import datetime
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import CHATML, ROOT, make_manifest, make_tokenizer, refused
from tokenizers import processors

from dataset import (
    INSTRUCTION,
    INSTRUCTION_SLOT,
    SPEECH_SLOT,
    LengthSampler,
    SpeechDataset,
    collate,
    load_tokenizer,
    read_audio,
    read_manifest,
    render_prompt,
)
from model import IGNORE

# ---- manifest ----


@pytest.fixture(scope="module")
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


OK = {"wav": "ok.wav", "txt": "yes"}
HUGE = "1" + "0" * 400  # a legal JSON number, and more than a float holds
BROKEN_LINES = {
    "no JSON": '{"wav": "ok.wav", ',
    "blank": "",
    "not UTF-8": b'{"wav": "ok.wav", "txt": "\xff\xfe"}',
    "half a surrogate pair": r'{"wav": "ok.wav", "txt": "\ud83d"}',
    "a list": "[1, 2]",
    "a string": '"ok.wav"',
    "no wav": {"txt": "yes"},
    "wav is null": {"wav": None, "txt": "yes"},
    "wav is a number": {"wav": 7, "txt": "yes"},
    "wav is missing": {"wav": "gone.wav", "txt": "yes"},
    "wav is missing, its length known": {"wav": "gone.wav", "txt": "yes", "duration": 1},
    "wav is the folder": {"wav": "", "txt": "yes", "duration": 1},
    "wav is garbage": {"wav": "garbage.wav", "txt": "yes"},
    "wav is empty": {"wav": "empty.wav", "txt": "yes"},
    "wav has no samples": {"wav": "no_samples.wav", "txt": "yes"},
    "31 s": {"wav": "long.wav", "txt": "yes"},
    "31 s, as it says": {"wav": "long.wav", "txt": "yes", "duration": 31},
    "no txt": {"wav": "ok.wav"},
    "txt is empty": {"wav": "ok.wav", "txt": ""},
    "txt is blank": {"wav": "ok.wav", "txt": " \t"},
    "txt is null": {"wav": "ok.wav", "txt": None},
    "txt is a list": {"wav": "ok.wav", "txt": ["yes"]},
    "key is a number": OK | {"key": 7},
    "instruction is a number": OK | {"instruction": 7},
    "target is null": OK | {"target": None},
    "starts after the end": OK | {"start": 2},
    **{
        f"{name} is {value!r}": OK | {"start": 0, "duration": 0.5} | {name: value}
        for name in ("start", "duration")
        for value in (-1, float("nan"), float("inf"), "1", True, None, [1])
    },
    "duration is 0": OK | {"duration": 0},
    "start is huge": f'{{"wav": "ok.wav", "txt": "yes", "start": {HUGE}}}',
    "duration is huge": f'{{"wav": "ok.wav", "txt": "yes", "duration": {HUGE}}}',
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_is_refused_by_file_and_line(clips, line):
    manifest = lines(clips, OK, line, OK)
    with refused(f"{manifest}:2: "):
        read_manifest(str(manifest))


@pytest.mark.parametrize("content", [None, b"", "folder"])
def test_a_manifest_that_is_missing_empty_or_a_folder_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with refused(str(path)):
        read_manifest(str(path))


def test_wav_is_relative_to_its_manifest_or_absolute(clips, tmp_path, monkeypatch):
    manifest = lines(clips, OK, OK | {"wav": str(clips / "ok.wav")})
    monkeypatch.chdir(tmp_path)
    for path in (str(manifest), os.path.relpath(manifest)):
        assert [os.path.samefile(u.path, clips / "ok.wav") for u in read_manifest(path)] == [True, True]


def test_a_record_is_carried_as_it_stands_and_only_its_defaults_are_filled_in(clips):
    full = OK | {"key": "a/b", "target": "oui", "speaker": {"age": 7}, "start": 0.25, "duration": 0.5}
    silence = OK | {"target": ""}
    first, second, third = read_manifest(str(lines(clips, OK, full, silence)))
    assert [u.record for u in (first, second, third)] == [OK, full, silence]
    assert [u.key for u in (first, second, third)] == ["ok", "a/b", "ok"]
    assert [u.target for u in (first, second, third)] == ["yes", "oui", ""]
    assert [u.seconds for u in (first, second, third)] == [1.0, 0.5, 1.0]


def test_recognition_needs_no_txt(clips):
    (utterance,) = read_manifest(str(lines(clips, {"wav": "ok.wav"})), needs_target=False)
    assert utterance.key == "ok"


# ---- audio ----


def heard(path: Path, **record) -> np.ndarray:
    """The waveform of a record of this file."""
    manifest = path.parent / "one.jsonl"
    manifest.write_text(json.dumps({"wav": path.name, "txt": "a", **record}))
    return read_audio(*read_manifest(str(manifest)))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("container", ["wav", "flac", "ogg", "mp3"])
def test_any_container_rate_and_channels_give_the_same_waveform(tmp_path, container, rate, channels):
    tone, seconds = 1000.0, 1.5
    sine = np.sin(2 * np.pi * tone * np.arange(int(seconds * rate)) / rate)
    samples = np.stack([0.4 * sine, 0.2 * sine], axis=1) if channels == 2 else 0.3 * sine
    soundfile.write(tmp_path / f"a.{container}", samples, rate)

    waveform = heard(tmp_path / f"a.{container}")
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - seconds * 16000) <= 1600  # the 0.1 s that a known duration may be off
    middle = waveform[4000:20000]  # one second, so that a bin of the spectrum is 1 Hz
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() == tone
    assert abs(20 * np.log10(np.sqrt(2 * (middle**2).mean()) / 0.3)) < 1  # dB
    if container in ("wav", "flac"):  # lossless: in phase with a sine that was never resampled
        expected = 0.3 * np.sin(2 * np.pi * tone * np.arange(4000, 20000) / 16000)
        np.testing.assert_allclose(middle, expected, atol=1e-3)


@pytest.mark.parametrize("start, duration", [(0, 0.5), (0.25, 0.5), (0.123, 1.877), (1.5, None), (0, None)])
def test_start_and_duration_cut_to_the_sample(tmp_path, start, duration):
    samples = np.random.default_rng(0).uniform(-1, 1, 2 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    record = {"start": start} if duration is None else {"start": start, "duration": duration}
    first = round(start * 16000)
    last = len(samples) if duration is None else first + round(duration * 16000)
    np.testing.assert_array_equal(heard(tmp_path / "a.wav", **record), samples[first:last])


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_a_part_is_what_the_whole_holds_there(tmp_path, rate):
    time = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * (200 + 400 * time) * time), rate)
    whole, part = heard(tmp_path / "a.wav"), heard(tmp_path / "a.wav", start=0.5, duration=1)
    assert len(part) == 16000
    np.testing.assert_allclose(part[800:-800], whole[8000 + 800 : 24000 - 800], atol=1e-2)


def broken_audio(path: Path, how: str) -> dict:
    """Writes a file that soundfile opens, and yet must not be trained on; returns what its record knows."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(3 * 16000)
    if how in ("NaN", "infinite"):
        samples[20000] = float("nan" if how == "NaN" else "inf")
    if how == "short":
        samples = samples[:200]  # one fewer than log_mel_spectrogram can reflect at its ends
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {
        "truncated": {"duration": 3.0},
        "longer than said": {"duration": 2.5},
        "a part past the end": {"start": 2, "duration": 2},
        "start past the end": {"start": 4, "duration": 2},
    }.get(how, {})


@pytest.mark.parametrize(
    "how",
    [
        "NaN",
        "infinite",
        "short",
        "truncated",
        "longer than said",
        "a part past the end",
        "start past the end",
        "vanished",
    ],
)
def test_audio_that_is_not_what_it_should_be_is_refused_by_line_and_file(tmp_path, how):
    path = tmp_path / "a.wav"
    record = broken_audio(path, how)
    (utterance,) = read_manifest(str(lines(tmp_path, {"wav": path.name, "txt": "a", **record})))
    if how == "vanished":
        path.unlink()
    with refused("manifest.jsonl:1: ", str(path)):
        read_audio(utterance)


def test_a_worker_refuses_in_one_line_too(tmp_path):
    broken_audio(tmp_path / "a.wav", "NaN")
    examples = make_examples(read_manifest(str(lines(tmp_path, {"wav": "a.wav", "txt": "a"}))))
    with refused("manifest.jsonl:1: "):
        next(iter(torch.utils.data.DataLoader(examples, num_workers=1)))


def test_the_shortest_audio_that_whisper_takes_is_201_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(201, 0.1), 16000)
    waveform = heard(tmp_path / "a.wav")
    assert whisper.log_mel_spectrogram(torch.from_numpy(waveform)).shape == (80, 1)


@pytest.mark.parametrize("window", ["utterance", "30s"])
def test_audio_of_30_s_is_whole_and_what_is_longer_than_whisper_hears_is_refused(tmp_path, window):
    """A known duration may be off by 0.1 s: that must not carry a file over Whisper's 1500 positions."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(482000)
    soundfile.write(tmp_path / "whole.wav", noise[:480000], 16000)
    soundfile.write(tmp_path / "over.wav", noise[:480800], 16000)
    records = [{"wav": name, "txt": "a", "duration": 30} for name in ("whole.wav", "over.wav")]
    examples = make_examples(read_manifest(str(lines(tmp_path, *records))), window=window)
    assert examples[0]["mel"].shape == (80, 3000) and examples[0]["frames"] == 3000
    with refused("manifest.jsonl:2: "):
        examples[1]


# ---- prompt ----

LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# template, bos, eos, other special tokens; what opens the user's turn and the answer, what ends a turn
FAMILIES = {
    "chatml": (
        CHATML,
        None,
        "<|endoftext|>",
        [],
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": (QWEN3, None, "<|im_end|>", [], "user\n", "assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        "<bos>",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        "<start_of_turn>user\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], "[INST] ", " [/INST]", "</s>"),
    "phi3": (PHI3, "<s>", "<|endoftext|>", ["<|end|>"], "<|user|>\n", "<|assistant|>\n", "<|end|>"),
    "none": (None, None, "</s>", [], "USER: ", "ASSISTANT:", "</s>"),
    "none, bos is eos": (None, "</s>", "</s>", [], "USER: ", "ASSISTANT:", "</s>"),
}


def make_family(family: str, adds_bos: bool = True):
    """A tokenizer of this family; like most that have a BOS, it puts it before any text by itself."""
    template, bos, eos, special, *_ = FAMILIES[family]
    tokenizer = make_tokenizer(template, bos=bos, eos=eos)
    tokenizer.add_tokens(special, special_tokens=True)
    if bos and adds_bos:
        ids = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=ids
        )
    return tokenizer


def make_examples(utterances=(), tokenizer=None, window="utterance", n_mels=80, prompt=None, **kwargs):
    """A SpeechDataset with a speech vector for every ten frames."""
    tokenizer = tokenizer or make_tokenizer()
    config = {"encoder_dims": {"n_mels": n_mels}, "encoder_window": window}
    config |= prompt or render_prompt(tokenizer)
    return SpeechDataset(list(utterances), tokenizer, config, speech_len, **kwargs)


def speech_len(frames: int) -> int:
    return -(-frames // 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_speech_stands_in_the_users_turn_before_the_instruction(family):
    *_, user, answer, end_of_turn = FAMILIES[family]
    rendered = render_prompt(make_family(family))
    before, between, after = rendered["prompt"].replace(INSTRUCTION_SLOT, SPEECH_SLOT).split(SPEECH_SLOT)
    assert rendered["prompt"].index(SPEECH_SLOT) < rendered["prompt"].index(INSTRUCTION_SLOT)
    assert before.endswith(user)
    assert between == "\n"
    assert after.endswith(answer)
    assert rendered["end_of_turn"] == end_of_turn


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_hold_one_bos_at_most_and_where_the_llm_expects_one(clips, family, adds_bos):
    tokenizer = make_family(family, adds_bos)
    bos = FAMILIES[family][1]
    utterances = read_manifest(str(lines(clips, OK)))
    ids = make_examples(utterances, tokenizer, with_target=False)[0]["input_ids"].tolist()
    wanted = bos is not None and (
        adds_bos or FAMILIES[family][0] is not None and "bos_token" in FAMILIES[family][0]
    )
    if family == "phi3":  # a template that leaves BOS out means it
        wanted = False
    assert ids.count(tokenizer.bos_token_id) == wanted
    if wanted:
        assert ids[0] == tokenizer.bos_token_id


def test_the_prompt_is_rendered_once_and_used_as_it_was_stored(clips):
    tokenizer = make_family("llama3")
    rendered = render_prompt(tokenizer)
    assert datetime.date.today().strftime("%d %b %Y") in rendered["prompt"]
    stored = {**rendered, "prompt": rendered["prompt"].replace("Today Date: ", "Today Date: not ")}
    examples = make_examples(read_manifest(str(lines(clips, OK))), tokenizer, prompt=stored)
    assert "Today Date: not " in tokenizer.decode(examples[0]["input_ids"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{{ m['content'] | upper }}",
        "{{ m['content'] }}{{ m['content'] }}",
        "{{ m['content'].split('\n')[0] }}",
    ],
    ids=["drops", "changes", "repeats", "cuts"],
)
def test_a_template_that_does_not_say_what_the_user_says_is_refused(content):
    with refused("template"):
        render_prompt(make_tokenizer(CHATML.replace("{{ m['content'] }}", content)))


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"])
def test_an_llm_that_could_never_stop_is_refused(template):
    tokenizer = make_tokenizer(template, eos=None, pad="<pad>")
    assert tokenizer.eos_token is None
    with refused("eos"):
        render_prompt(tokenizer)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with refused(str(tmp_path / "gone")):
        load_tokenizer(str(tmp_path / "gone"))


# ---- examples ----

TEXTS = ["yes", "YES, it is.", "", "即便是高价低廉的别墅", "naïve 🎧👂🏽 Ω", "<|endoftext|> 2 < 3"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """One recording for each of TEXTS, of 0.4 to 1.4 s."""
    folder = tmp_path_factory.mktemp("spoken")
    records = [json.loads(line) for line in make_manifest(folder, [0.4, 1.2, 0.6, 1.4, 0.8, 1.0]).open()]
    return lines(folder, *(record | {"target": text} for record, text in zip(records, TEXTS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_input_is_prompt_speech_and_target_and_labels_are_the_target_and_its_end(spoken, family):
    tokenizer = make_family(family)
    rendered = render_prompt(tokenizer)
    prompt = rendered["prompt"].replace(INSTRUCTION_SLOT, INSTRUCTION)
    examples = make_examples(read_manifest(str(spoken)), tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token  # the case in which masking by id never learns to stop
    for i, text in enumerate(TEXTS):
        example = examples[i]
        speech, ids, labels = example["speech_mask"], example["input_ids"], example["labels"]
        assert speech.sum() == speech_len(example["frames"])
        (where,) = speech.nonzero(as_tuple=True)
        assert where[-1] - where[0] + 1 == len(where)  # in one piece
        said = tokenizer.decode(ids[: where[0]]) + SPEECH_SLOT + tokenizer.decode(ids[where[-1] + 1 :])
        assert said == prompt + text + rendered["end_of_turn"]

        (taught,) = (labels != IGNORE).nonzero(as_tuple=True)
        assert taught.tolist() == list(range(taught[0], len(labels)))  # to the very end
        assert tokenizer.decode(labels[taught]) == text + rendered["end_of_turn"]
        assert labels[-1] == tokenizer.convert_tokens_to_ids(rendered["end_of_turn"])
        assert torch.equal(labels[taught], ids[taught])


def test_generation_is_given_the_prompt_alone(spoken):
    utterances = read_manifest(str(spoken))
    to_train, to_generate = make_examples(utterances), make_examples(utterances, with_target=False)
    for i in range(len(TEXTS)):
        given, prompt_len = to_generate[i], int((to_train[i]["labels"] == IGNORE).sum())
        assert torch.equal(given["input_ids"], to_train[i]["input_ids"][:prompt_len])
        assert torch.equal(given["speech_mask"], to_train[i]["speech_mask"][:prompt_len])
        assert given["attention_mask"].tolist() == [1] * prompt_len


@pytest.mark.parametrize("own", [None, "Translate into French."])
@pytest.mark.parametrize("override", [None, "Answer the question."])
def test_the_instruction_is_the_overriding_one_else_the_records_else_to_transcribe(clips, own, override):
    record = OK | ({} if own is None else {"instruction": own})
    examples = make_examples(read_manifest(str(lines(clips, record))), instruction=override)
    text = examples.tokenizer.decode(examples[0]["input_ids"])
    assert f"\n{override or own or INSTRUCTION}<|im_end|>" in text
    assert INSTRUCTION_SLOT not in text and SPEECH_SLOT not in text


def test_an_example_may_take_all_positions_and_not_one_more(spoken):
    examples = make_examples(read_manifest(str(spoken)))
    positions = [len(examples[i]["input_ids"]) for i in range(len(TEXTS))]
    longest = positions.index(max(positions))
    examples.check_positions(max(positions))
    with refused(f"{spoken}:{longest + 1}: ", "--model_max_length"):
        examples.check_positions(max(positions) - 1)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("window", ["utterance", "30s"])
def test_mel_is_whispers_own_of_each_utterance_alone(spoken, window, n_mels):
    utterances = read_manifest(str(spoken))
    batch = collate([make_examples(utterances, window=window, n_mels=n_mels)[i] for i in range(3)])
    for i in range(3):
        waveform = torch.from_numpy(read_audio(utterances[i]))
        frames = len(waveform) // 160
        if window == "30s":
            waveform = whisper.pad_or_trim(waveform)
        mel = whisper.log_mel_spectrogram(waveform, n_mels)
        assert batch["frames"][i] == frames
        assert torch.equal(batch["mel"][i, :, : mel.shape[1]], mel)
        assert not batch["mel"][i, :, mel.shape[1] :].any()
        assert mel.shape[1] == (3000 if window == "30s" else frames)


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_text_at_the_side_asked_for_and_changes_nothing_else(spoken, side, with_target):
    examples = make_examples(read_manifest(str(spoken)), with_target=with_target)
    examples = [examples[i] for i in range(len(TEXTS))]
    batch = collate(examples, side=side)
    padding = {"input_ids": 0, "speech_mask": 0, "labels": IGNORE, "attention_mask": 0}
    assert set(batch) == set(examples[0])
    for name in padding.keys() & batch.keys():
        size = max(len(example[name]) for example in examples)
        assert batch[name].shape == (len(examples), size) and batch[name].dtype == examples[0][name].dtype
        for row, example in zip(batch[name].tolist(), examples):
            pads, own = [padding[name]] * (size - len(example[name])), example[name].tolist()
            assert row == (own + pads if side == "right" else pads + own)


def test_examples_travel_to_workers_of_any_start_method(spoken):
    examples = make_examples(read_manifest(str(spoken)))
    copy = pickle.loads(pickle.dumps(examples))
    assert torch.equal(copy[3]["labels"], examples[3]["labels"])


# ---- batches by length ----


def aishell_like(utterances: int, seed: int = 0) -> SimpleNamespace:
    """What the sampler sees of a data set with AISHELL's lengths."""
    seconds = np.random.default_rng(seed).normal(4.5, 1.4, utterances).clip(1, 15)
    return SimpleNamespace(utterances=[SimpleNamespace(seconds=length) for length in seconds], epoch=0)


def steps(dataset, step: int, seed: int = 0) -> list[list[int]]:
    order = list(LengthSampler(dataset, step, seed))
    return [order[i : i + step] for i in range(0, len(order), step)]


def padding_share(dataset, batches: list[list[int]]) -> float:
    """How much of what a GPU computes is padding, where each batch is as long as its longest."""
    seconds = np.array([utterance.seconds for utterance in dataset.utterances])
    return 1 - seconds.sum() / sum(seconds[batch].max() * len(batch) for batch in batches)


@pytest.mark.parametrize(
    "utterances, step", [(1, 8), (7, 8), (8, 8), (9, 8), (400, 8), (401, 8), (1000, 1), (997, 32)]
)
def test_each_utterance_comes_once_an_epoch(utterances, step):
    dataset = aishell_like(utterances)
    for dataset.epoch in range(3):
        sampler = LengthSampler(dataset, step, 0)
        assert sorted(sampler) == list(range(utterances)) and len(sampler) == utterances


def test_order_is_set_by_seed_and_epoch_alone():
    dataset = aishell_like(1000)
    orders = {}
    for seed in (0, 1):
        for dataset.epoch in (0, 1):
            orders[seed, dataset.epoch] = steps(dataset, 8, seed)
            assert steps(dataset, 8, seed) == orders[seed, dataset.epoch]
    batches = {key: {frozenset(step) for step in order} for key, order in orders.items()}
    for one in orders:
        for other in orders:
            if one != other:  # neither the order alone nor the company alone stays
                assert orders[one] != orders[other] and len(batches[one] & batches[other]) < 10


def test_set_epoch_reaches_the_sampler(spoken):
    examples = make_examples(read_manifest(str(spoken)))
    sampler = LengthSampler(examples, 1, 0)
    orders = []
    for epoch in range(5):
        examples.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_padding_is_under_5_percent_within_a_step_of_all_ranks(ranks):
    dataset = aishell_like(5000)
    batches = steps(dataset, 8 * ranks)
    shuffled = np.array_split(np.random.default_rng(0).permutation(5000), len(batches))
    assert padding_share(dataset, batches) < 0.05
    assert padding_share(dataset, shuffled) > 0.25  # so the bound above says something


def test_long_and_short_steps_are_mixed():
    dataset = aishell_like(5000)
    means = [np.mean([dataset.utterances[i].seconds for i in step]) for step in steps(dataset, 8)[:-1]]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # sorted, it is near 1


def test_only_the_last_step_is_not_full():
    for utterances in (5003, 801, 15):
        lens = [len(step) for step in steps(aishell_like(utterances), 8)]
        assert lens == [8] * (utterances // 8) + [utterances % 8]
        # and it is no step that the sampler put somewhere else: it changes with the epoch like the others
    dataset = aishell_like(5003)
    lasts = set()
    for dataset.epoch in range(3):
        lasts.add(tuple(steps(dataset, 8)[-1]))
    assert len(lasts) == 3


# ---- real recordings ----

SHARED = Path(os.environ.get("EARS_DATA", ROOT.parent / "shared" / "data"))
REAL = ["fsdd/test", "fsdd/train", "an4/all", "librispeech/all", "ljspeech/all", "aishell3/all"]


@pytest.mark.parametrize("name", REAL)
def test_real_recordings_are_heard_whole(name):
    manifest = SHARED / f"{name}.jsonl"
    if not manifest.is_file():
        pytest.skip(f"no recordings at {manifest}; set EARS_DATA to their folder")
    utterances = read_manifest(str(manifest))
    with open(manifest, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert [utterance.record for utterance in utterances] == records
    for utterance, record in zip(utterances, records):
        waveform = read_audio(utterance)
        assert np.isfinite(waveform).all() and np.abs(waveform).max() > 0.001
        assert abs(len(waveform) / 16000 - record["duration"]) <= 0.1
