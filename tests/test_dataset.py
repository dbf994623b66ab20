"""dataset.py: broken lines are named, audio of any form is heard alike, labels are built, not repaired."""

import datetime
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whisper
from conftest import CHATML, OK, lines, make_manifest, make_tokenizer, refused
from tokenizers import processors

from dataset import (
    INSTRUCTION,
    INSTRUCTION_SLOT,
    SPEECH_SLOT,
    Recordings,
    SpeechDataset,
    collate,
    load_tokenizer,
    render_prompt,
)
from manifest import read_audio, read_manifest
from model import IGNORE
from sampler import LengthSampler, SecondsSampler, by_seconds

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


def make_examples(
    utterances=(), tokenizer=None, window="utterance", n_mels=80, prompt=None, kind=SpeechDataset, **kwargs
):
    """A SpeechDataset, or another kind, with a speech vector for every ten frames."""
    tokenizer = tokenizer or make_tokenizer()
    config = {"encoder_dims": {"n_mels": n_mels}, "encoder_window": window}
    config |= prompt or render_prompt(tokenizer)
    return kind(utterances, tokenizer, config, speech_len, **kwargs)


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
    ids = make_examples(utterances, tokenizer, kind=Recordings)[0][0][0]["input_ids"].tolist()
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
    to_train, to_generate = make_examples(utterances), make_examples(utterances, kind=Recordings)
    for i in range(len(TEXTS)):
        ((given,), error), prompt_len = to_generate[i], int((to_train[i]["labels"] == IGNORE).sum())
        assert torch.equal(given["input_ids"], to_train[i]["input_ids"][:prompt_len])
        assert torch.equal(given["speech_mask"], to_train[i]["speech_mask"][:prompt_len])
        assert given["attention_mask"].tolist() == [1] * prompt_len and error is None


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
    examples.most = max(positions)
    examples.check_positions()
    examples.most -= 1
    with refused(f"{spoken}:{longest + 1}: ", "--model_max_length"):
        examples.check_positions()


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
    examples = make_examples(read_manifest(str(spoken)), kind=SpeechDataset if with_target else Recordings)
    examples = [examples[i] if with_target else examples[i][0][0] for i in range(len(TEXTS))]
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


class Lengths(list):
    """Seconds of utterances, as a Manifest has them."""

    @property
    def seconds(self) -> np.ndarray:
        return np.array(self, np.float32)

    def seconds_of(self, which: np.ndarray) -> np.ndarray:
        return self.seconds[which]


def aishell_like(utterances: int, seed: int = 0) -> SimpleNamespace:
    """What the sampler sees of a data set with AISHELL's lengths."""
    seconds = np.random.default_rng(seed).normal(4.5, 1.4, utterances).clip(1, 15)
    return SimpleNamespace(utterances=Lengths(seconds), epoch=0)


def steps(dataset, step: int, seed: int = 0) -> list[list[int]]:
    order = list(LengthSampler(dataset, step, seed))
    return [order[i : i + step] for i in range(0, len(order), step)]


def padding_share(dataset, batches: list[list[int]]) -> float:
    """How much of what a GPU computes is padding, where each batch is as long as its longest."""
    seconds = dataset.utterances.seconds
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
    means = [dataset.utterances.seconds[step].mean() for step in steps(dataset, 8)[:-1]]
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


@pytest.mark.parametrize("utterances, most", [(1, 40), (1000, 40), (1000, 2), (997, 333.3)])
def test_batches_of_so_many_seconds(utterances, most):
    dataset = aishell_like(utterances)
    seconds, epochs = dataset.utterances.seconds, []
    for dataset.epoch in range(3):
        sampler = SecondsSampler(dataset, most, 0)
        epochs.append(list(sampler))
        assert epochs[-1] == list(sampler) and len(epochs[-1]) == len(sampler)
        assert sorted(sum(epochs[-1], [])) == list(range(utterances))
        assert all(len(batch) == 1 or seconds[batch].max() * len(batch) <= most for batch in epochs[-1])
    if utterances == 1000 and most == 40:
        assert padding_share(dataset, epochs[0]) < 0.05
        assert sum(map(len, epochs[0])) / len(epochs[0]) > 7  # of 8.9 that would be full
        companies = [{frozenset(batch) for batch in epoch} for epoch in epochs]
        assert len(companies[0] & companies[1]) < 0.1 * len(epochs[0])


def test_by_seconds_takes_the_longest_first():
    batches = by_seconds(np.array([3.0, 50.0, 0.0, 9.0, 9.5]), 20, 2)
    assert [batch.tolist() for batch in batches] == [[1], [4, 3], [0, 2]]
