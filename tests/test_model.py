"""model.py and beam_search.py: what the LLM is given, is taught and writes, and what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import whisper
from conftest import make_llm, make_manifest, make_tokenizer, make_whisper, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config

from beam_search import beam_search
from dataset import Recordings, SpeechDataset, collate, load_tokenizer, render_prompt
from encoder import encoder_len, load_encoder
from manifest import read_audio, read_manifest
from model import (
    IGNORE,
    Encoder,
    SpeechLLM,
    fingerprint,
    load_config,
    load_llm,
    load_projector,
    save_projector,
)
from projector import Conv1dProjector, make_projector

LENGTHS = [1, 2, 3, 10, 11, 58, 151, 300]  # mel frames of eight utterances, odd and even
equal = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # what float32 leaves of an equality

# model_type, how its tokenizer is made, how its config differs
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5}
GPT2 = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
FAMILIES = {
    "qwen2": ("qwen2", {}, {}),
    "qwen2, untied": ("qwen2", {"pad": "<pad>"}, {"tie_word_embeddings": False}),
    "llama": ("llama", {"chat_template": LLAMA, "bos": "<s>", "eos": "</s>"}, {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"chat_template": None, "bos": "<|endoftext|>", "eos": "<|endoftext|>"}, GPT2),
    "gpt_neox": ("gpt_neox", {"chat_template": None}, {"tie_word_embeddings": False}),
    "opt": ("opt", {"chat_template": None, "bos": "</s>", "eos": "</s>"}, OPT),
    "gemma2": ("gemma2", {"bos": "<bos>"}, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": ("cohere", {"bos": "<bos>"}, {"logit_scale": 0.25}),
    "granite": ("granite", {}, {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
}


def make_random_whisper(path: Path, **kwargs) -> Path:
    """Like make_whisper, with norms and biases at random too, so that none can be left out unnoticed."""
    checkpoint = torch.load(make_whisper(path, **kwargs), weights_only=True)
    for name, weight in checkpoint["model_state_dict"].items():
        if name != "encoder.positional_embedding":
            weight += 0.1 * torch.randn_like(weight)
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """whisper.pt, 128.pt and data.jsonl: recordings of LENGTHS and a bit."""
    folder = tmp_path_factory.mktemp("model")
    make_random_whisper(folder / "whisper.pt")
    make_random_whisper(folder / "128.pt", n_mels=128)
    make_manifest(folder, [(frames + 0.5) / 100 for frames in LENGTHS])
    return folder


@pytest.fixture(scope="module", params=["conv1d", "blsp"])
def build(folder, request):
    """build(family) -> a SpeechLLM of random backbones, and eight examples to train on or generate from.

    Whatever is tested with it holds for either projector.
    """

    def build(family: str = "qwen2", window: str = "utterance", whisper_file: str = "whisper.pt", **dtype):
        model_type, tokenizer, config = FAMILIES[family]
        if not (folder / family).is_dir():
            make_llm(folder / family, model_type, make_tokenizer(**tokenizer), **config)
        encoder, llm = load_encoder(str(folder / whisper_file)), load_llm(str(folder / family), **dtype)
        tokenizer = load_tokenizer(str(folder / family))
        config = make_config(encoder, llm, request.param, window) | render_prompt(tokenizer)
        torch.manual_seed(5)
        model = SpeechLLM(encoder, llm, config)
        utterances, speech_len = read_manifest(str(folder / "data.jsonl")), model.projector.speech_len
        to_train = SpeechDataset(utterances, tokenizer, config, speech_len)
        to_generate = Recordings(utterances, tokenizer, config, speech_len)
        return model, [to_train[i] for i in range(8)], [to_generate[i][0][0] for i in range(8)]

    return build


def make_config(encoder, llm, projector_type: str, window: str = "utterance") -> dict:
    hidden_dim = 64 if projector_type == "conv1d" else 2048  # blsp takes no other
    sizes = {"projector_type": projector_type, "projector_stride": 5, "projector_hidden_dim": hidden_dim}
    return {**sizes, "encoder_window": window, **fingerprint(encoder, llm)}


def config_of(model: SpeechLLM) -> dict:
    projector_type = "conv1d" if isinstance(model.projector, Conv1dProjector) else "blsp"
    return make_config(model.encoder, model.llm, projector_type)


def embed(model: SpeechLLM, example: dict) -> torch.Tensor:
    """One utterance's input for the LLM, (1, positions, llm_dim), put together: text, speech, text."""
    frames = example["frames"][None]
    speech = model.projector(model.encode(example["mel"][None], frames), frames)[0]
    first = int(example["speech_mask"].nonzero()[0])
    text = model.llm.get_input_embeddings()(example["input_ids"])
    return torch.cat([text[:first], speech, text[first + len(speech) :]])[None]


def loss_sum(model: SpeechLLM, examples: list[dict]) -> torch.Tensor:
    return model(**collate(examples), num_items_in_batch=1)["loss"]


# ---- projector ----

PUBLISHED = {  # (Whisper dim, LLM dim): parameters in units of 2^20
    **{(1280, 896): 12.07, (1280, 1536): 13.32, (1280, 3584): 17.32, (1280, 4096): 18.32},
    **{(384, 1536): 4.46, (384, 4096): 9.46, (768, 1536): 7.32, (768, 4096): 12.32},
}


@pytest.mark.parametrize("dims, published", PUBLISHED.items())
def test_projectors_have_the_published_parameter_counts(dims, published):
    with torch.device("meta"):
        projector = make_projector("conv1d", *dims)
    count, (encoder_dim, llm_dim) = sum(weight.numel() for weight in projector.parameters()), dims
    assert round(count / 2**20, 2) == published
    # Conv1d of kernel 5, Linear, Linear: each with a bias, which the two decimals above do not show
    assert count == (5 * encoder_dim + 1) * encoder_dim + (encoder_dim + 1) * 2048 + (2048 + 1) * llm_dim


def test_the_blsp_projector_has_the_47_47_million_parameters_of_its_authors():
    with torch.device("meta"):
        projector = make_projector("blsp", 768, 4096)
    count = sum(weight.numel() for weight in projector.parameters())
    convs = 2 * (5 * 768 + 1) * 2 * 768 + (5 * 768 + 1) * 2 * 4096  # each with a bias
    assert count == convs + 2 * 4096 * 512 + 2 * 4096 and round(count / 1e6, 2) == 47.47


def test_speech_len_is_what_comes_out_of_1_to_3000_frames():
    dims = whisper.model.ModelDimensions(
        1, 1500, 4, 1, 0, 8, 4, 4, 1, 1
    )  # the smallest that has its two convs
    encoder = Encoder(dims)
    projectors = [make_projector("conv1d", 4, 3, stride=stride, hidden_dim=2) for stride in (5, 1, 4)]
    projectors += [make_projector("blsp", 4, 3)]
    lens = torch.arange(1, 3001)
    with torch.no_grad():
        for frames in lens.tolist():
            encoded = encoder(torch.zeros(1, 1, frames), torch.tensor([frames]))
            assert encoded.shape == (1, encoder_len(frames), 4)
            for projector in projectors:
                speech = projector(encoded, torch.tensor([frames]))
                assert speech.shape == (1, projector.speech_len(frames), 3)
    for projector in projectors:
        assert projector.speech_len(lens).tolist() == list(map(projector.speech_len, lens.tolist()))
    assert [projector.speech_len(3000) for projector in projectors] == [300, 1500, 375, 188]  # of 30 s


@pytest.mark.parametrize(
    "sizes",
    [
        *[("conv2d", 5, 2048), ("conv1d", 0, 2048), ("conv1d", 5, 0), ("conv1d", -1, 8)],
        *[("blsp", 4, 2048), ("blsp", 5, 512), ("blsp", 0, 2048)],
    ],
)
def test_a_projector_that_cannot_be_is_refused(sizes):
    with refused(*map(str, sizes)):
        make_projector(sizes[0], 4, 4, *sizes[1:])


# ---- encoder ----


@pytest.mark.parametrize("whisper_file, n_mels", [("whisper.pt", 80), ("128.pt", 128)])
def test_at_3000_frames_the_encoder_equals_openai_whispers(folder, whisper_file, n_mels):
    mel = torch.randn(2, n_mels, 3000, generator=torch.Generator().manual_seed(0))
    theirs = whisper.load_model(str(folder / whisper_file), device="cpu").encoder
    ours = load_encoder(str(folder / whisper_file))
    with torch.no_grad():
        equal(ours(mel, torch.tensor([3000, 3000])), theirs(mel))


def test_the_encoder_runs_in_bfloat16(folder):
    encoder = load_encoder(str(folder / "whisper.pt"))
    mel, frames = torch.randn(2, 80, 300), torch.tensor([300, 111])
    with torch.no_grad():
        exact, encoded = encoder(mel, frames), encoder.bfloat16()(mel.bfloat16(), frames)
    assert encoded.dtype == torch.bfloat16
    assert torch.cosine_similarity(exact.flatten(), encoded.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("whisper_file", ["whisper.pt", "128.pt"])
def test_of_a_30s_window_the_real_frames_go_on_as_openai_whisper_hears_them(folder, build, whisper_file):
    model, examples, _ = build(window="30s", whisper_file=whisper_file)
    batch = collate(examples)
    theirs = whisper.load_model(str(folder / whisper_file), device="cpu").encoder
    n_mels = model.encoder.dims.n_mels
    encoded = model.encode(batch["mel"], batch["frames"])
    assert encoded.shape[1] == encoder_len(max(LENGTHS))
    for i, utterance in enumerate(read_manifest(str(folder / "data.jsonl"))):
        waveform = whisper.pad_or_trim(torch.from_numpy(read_audio(utterance)))
        with torch.no_grad():
            whole = theirs(whisper.log_mel_spectrogram(waveform, n_mels)[None])[0]
        size = encoder_len(LENGTHS[i])
        equal(encoded[i, :size], whole[:size])
        assert not encoded[i, size:].any()


@pytest.mark.parametrize("window", ["utterance", "30s"])
def test_features_and_speech_of_eight_equal_eight_singles(build, window):
    model, examples, _ = build(window=window)
    batch = collate(examples)
    assert batch["frames"].tolist() == LENGTHS
    encoded = model.encode(batch["mel"], batch["frames"])
    batch = {name: batch[name] for name in ("mel", "frames", "input_ids", "speech_mask")}
    speech, embeddings = model.projector(encoded, batch["frames"]), model.embed(**batch)
    for i, example in enumerate(examples):
        alone = model.encode(example["mel"][None], example["frames"][None])[0]
        equal(encoded[i, : len(alone)], alone)
        assert not encoded[i, len(alone) :].any()  # what the projector's last stride sees
        spoken = model.projector(alone[None], example["frames"][None])[0]
        equal(speech[i, : len(spoken)], spoken)
        equal(embeddings[i, : len(example["input_ids"])], embed(model, example)[0])


def test_what_pads_the_mel_never_matters(build):
    model, examples, _ = build()
    batch = collate(examples)
    past = torch.arange(batch["mel"].shape[-1]) >= batch["frames"][:, None]  # (batch, frames)
    with torch.no_grad():
        clean = model.encoder(batch["mel"], batch["frames"])
        equal(model.encoder(batch["mel"].masked_fill(past[:, None], 1e3), batch["frames"]), clean)
    for encoded, frames in zip(clean, LENGTHS):
        assert encoded[: encoder_len(frames)].all() and not encoded[encoder_len(frames) :].any()


def test_the_blsp_projector_hears_nothing_of_the_padding_at_any_length():
    """One batch of all lengths to 70, what pads them filled with noise: each is as if it were alone."""
    torch.manual_seed(0)
    projector, frames = make_projector("blsp", 4, 6), torch.arange(1, 71)
    encoded = torch.randn(70, encoder_len(70), 4)
    with torch.no_grad():
        speech = projector(encoded, frames)
        for i, length in enumerate(frames.tolist()):
            alone = projector(encoded[i : i + 1, : encoder_len(length)], frames[i : i + 1])[0]
            equal(speech[i, : projector.speech_len(length)], alone)


def test_the_blsp_projector_is_the_published_layers():
    """Of one utterance without padding, by hand."""
    torch.manual_seed(0)
    projector, encoded = make_projector("blsp", 4, 6), torch.randn(1, 13, 4)
    weights, hidden = projector.state_dict(), encoded.mT
    for i in range(3):
        weight, bias = weights[f"convs.{i}.weight"], weights[f"convs.{i}.bias"]
        assert weight.shape == (2 * [4, 4, 6][i], 4, 5)
        values, gates = torch.conv1d(hidden, weight, bias, stride=2, padding=2).chunk(2, dim=1)
        hidden = values * gates.sigmoid()
    narrow = torch.nn.functional.gelu(hidden.mT @ weights["down.weight"].T)
    assert narrow.shape == (1, 2, 512)
    wide = hidden.mT + narrow @ weights["up.weight"].T
    wide = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    equal(projector(encoded, torch.tensor([25])), wide)  # of a new LayerNorm the weight is 1, the bias 0


# ---- loss ----


def test_nothing_is_learned_where_speech_stands(build):
    """BLSP once made its labels from a bool mask, in which -100 is True, so 1."""
    model, examples, _ = build()
    batch = collate(examples)
    labels, speech = batch["labels"].clone(), batch["speech_mask"]
    assert labels.dtype == torch.int64 and speech.dtype == torch.bool
    assert (labels[speech] == IGNORE).all() and not (labels == 1).any()
    learned = labels != IGNORE
    assert torch.equal(labels[learned], batch["input_ids"][learned])
    model(**batch)["loss"].backward()
    assert torch.equal(batch["labels"], labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_full_loss_of_transformers_one_utterance_at_a_time(build, family):
    """All logits, labels shifted, attention mask: each utterance alone, weighted by its tokens."""
    model, examples, _ = build(family)
    theirs, tokens = 0.0, 0
    for example in examples:
        inputs, labels = embed(model, example), example["labels"][None]
        count = int((labels != IGNORE).sum())
        loss = model.llm(inputs_embeds=inputs, labels=labels, attention_mask=torch.ones_like(labels)).loss
        theirs, tokens = theirs + loss.item() * count, tokens + count
    ours = model(**collate(examples))["loss"]
    assert ours.item() == pytest.approx(theirs / tokens, rel=1e-6)
    assert loss_sum(model, examples).item() == pytest.approx(theirs, rel=1e-6)
    assert model(**collate(examples), num_items_in_batch=torch.tensor(7))["loss"].item() == pytest.approx(
        theirs / 7, rel=1e-6
    )


@pytest.mark.parametrize("window", ["utterance", "30s"])
def test_loss_and_gradients_of_eight_equal_the_sum_of_eight_singles(build, window):
    model, examples, _ = build(window=window)
    loss = loss_sum(model, examples)
    loss.backward()
    together = [weight.grad.clone() for weight in model.projector.parameters()]
    model.zero_grad()
    singles = [loss_sum(model, [example]) for example in examples]
    sum(singles).backward()
    assert loss.item() == pytest.approx(sum(single.item() for single in singles), rel=1e-6)
    for one, other in zip(together, model.projector.parameters()):
        assert (one - other.grad).norm() < 1e-5 * one.norm()


def test_no_logits_of_the_prompt_are_computed(build):
    model, examples, _ = build()
    seen = []
    model.llm.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape)
    )
    for batch in ([examples[0]], [examples[6]], examples):
        labels = collate(batch)["labels"]
        model(**collate(batch))
        assert seen.pop()[:2] == (len(batch), (labels != IGNORE).any(0).sum())


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_end_of_turn_is_learned_though_it_pads_too(build, family):
    """With pad = eos, labels masked by token id never teach to stop."""
    model, examples, _ = build(family)
    end = examples[0]["labels"][-1]
    assert all(example["labels"][-1] == end for example in examples)
    batch = collate(examples)
    taught = loss_sum(model, examples)
    batch["labels"][batch["labels"] == end] = IGNORE
    untaught = model(**batch, num_items_in_batch=1)["loss"]
    ends = 0.0
    for example in examples:
        logits = model.llm(inputs_embeds=embed(model, example)).logits[0, -2]
        ends -= logits.log_softmax(-1)[end].item()
    assert (taught - untaught).item() == pytest.approx(ends, rel=1e-4)


# ---- what trains, and what does not ----


def test_gradients_reach_all_of_the_projector_and_nothing_frozen(build):
    model, examples, _ = build()
    model.train()
    model(**collate(examples))["loss"].backward()
    for name, weight in model.named_parameters():
        trains = name.startswith("projector.")
        assert weight.requires_grad == trains
        assert (weight.grad is not None and bool(weight.grad.any())) == trains, name


def test_only_the_projector_is_in_the_state_dict(build):
    model, *_ = build()
    names = {name.removeprefix("projector.") for name in model.state_dict()}
    assert names == set(model.projector.state_dict())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_nothing_frozen_drops_out_while_the_projector_trains(build, family, recompute):
    model, examples, _ = build(family)
    batch = collate(examples)
    loss = model(**batch)["loss"].item()
    model.llm.train()
    assert model(**batch)["loss"].item() != loss  # so this LLM would drop out, were it let
    if recompute:
        model.gradient_checkpointing_enable()
    model.train()
    assert model.training and model.projector.training
    assert not any(part.training for part in model.encoder.modules())
    assert recompute or not any(part.training for part in model.llm.modules())
    assert [model(**batch)["loss"].item() for _ in range(2)] == [pytest.approx(loss, rel=1e-6)] * 2
    model.eval()
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_recomputes_the_llm_and_only_the_llm(build, kwargs):
    """A frozen LLM is in eval mode, where transformers would recompute nothing."""
    model, examples, _ = build()
    passes = {"llm": 0, "encoder": 0}
    for name, block in [("llm", model.llm.model.layers[0]), ("encoder", model.encoder.blocks[0])]:
        block.mlp.register_forward_pre_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))

    def gradients(expected: dict) -> list[torch.Tensor]:
        passes.update(llm=0, encoder=0)
        model.zero_grad()
        model(**collate(examples))["loss"].backward()
        assert passes == expected
        return [weight.grad for weight in model.projector.parameters()]

    model.train()
    plain = gradients({"llm": 1, "encoder": 1})
    name = "activation" if hasattr(model.llm, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})
    model.train()
    recomputed = gradients({"llm": 2, "encoder": 1})
    for one, other in zip(plain, recomputed):
        equal(one, other)
    passes.update(llm=0)
    model.eval()
    model(**collate(examples))
    assert passes["llm"] == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_llm_trains_a_float32_projector(build, autocast):
    exact, examples, _ = build()
    model, *_ = build(dtype=torch.bfloat16)
    assert model.llm.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**collate(examples))["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(**collate(examples))["loss"].item(), rel=0.05)
    for weight in model.projector.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


# ---- generation ----

LIMITS = [12, 12, 5, 12, 7, 12, 12, 12]  # most tokens of each utterance


def search(model, examples, limits, end_ids, num_beams=1):
    return beam_search(model, collate(examples, side="left"), limits, end_ids, num_beams)


def likely_ends(model: SpeechLLM, examples: list[dict]) -> list[int]:
    """Two tokens that a random LLM writes, but not at once: as ends of turn they end some of the texts."""
    texts = [ids for ids, *_ in search(model, examples, [12] * 8, [model.llm.config.vocab_size - 1], 3)]
    seen = [token for ids in texts for token in ids[3:]]
    return sorted(set(seen), key=lambda token: (-seen.count(token), token))[:2]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_eight_equals_eight_singles(build, family, num_beams):
    model, _, examples = build(family)
    ends = likely_ends(model, examples)[:1] + [0]
    together = search(model, examples, LIMITS, ends, num_beams)
    for i, example in enumerate(examples):
        (alone,) = search(model, [example], LIMITS[i : i + 1], ends, num_beams)
        assert together[i][0] == alone[0] and together[i][2] == alone[2]
        assert together[i][1] == pytest.approx(alone[1], abs=1e-5)
    assert len({len(ids) for ids, *_ in together}) > 1  # so some waited for others


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_the_mean_log_probability_of_the_text_and_its_end(build, family, num_beams):
    model, _, examples = build(family)
    end = likely_ends(model, examples)[0]
    for i, (ids, score, _) in enumerate(search(model, examples, LIMITS, [end], num_beams)[::3]):
        inputs, log_probs = embed(model, examples[3 * i]), []
        for token in ids + [end]:  # one forward pass a token: no cache, no padding, no batch
            log_probs.append(model.llm(inputs_embeds=inputs).logits[0, -1].log_softmax(-1)[token].item())
            inputs = torch.cat([inputs, model.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
        assert score == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-5)


def test_greedy_text_is_the_likeliest_token_at_each_step_up_to_the_end_of_turn(build):
    model, _, examples = build()
    end, lens = likely_ends(model, examples)[0], []
    for example, (ids, _, cut) in zip(examples, search(model, examples, LIMITS, [end])):
        inputs, expected, limit = embed(model, example), [], LIMITS[len(lens)]
        while len(expected) < limit:
            token = int(model.llm(inputs_embeds=inputs).logits[0, -1].argmax())
            if token == end:
                break
            expected.append(token)
            inputs = torch.cat([inputs, model.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
        assert ids == expected
        assert cut == (len(ids) == limit)
        lens.append(len(ids))
    assert any(n == limit for n, limit in zip(lens, LIMITS)) and any(
        n < limit for n, limit in zip(lens, LIMITS)
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_any_of_the_end_tokens_ends_a_text(build, num_beams):
    """The template's end of turn, and the LLM's own eos: whichever is written first."""
    model, _, examples = build()
    ends = likely_ends(model, examples)
    one, other = (search(model, examples, [40] * 8, order, num_beams) for order in (ends, ends[::-1]))
    assert [ids for ids, *_ in one] == [ids for ids, *_ in other]
    assert not any(set(ends) & set(ids) for ids, *_ in one)


def test_with_room_for_all_beams_find_the_likeliest_of_all_texts(build):
    """Of two tokens: all 258 x 258 are tried by hand. The end of turn is one that is unlikely here."""
    model, _, examples = build()
    end = model.llm.config.vocab_size - 1
    found, greedy = (search(model, examples, [2] * 8, [end], num_beams) for num_beams in (260, 1))
    for example, (ids, *_) in zip(examples, found):
        inputs, tokens = embed(model, example), torch.arange(end)
        first = model.llm(inputs_embeds=inputs).logits[0, -1].log_softmax(-1)[:end]
        inputs = inputs.expand(end, -1, -1), model.llm.get_input_embeddings()(tokens)[:, None]
        second = model.llm(inputs_embeds=torch.cat(inputs, dim=1)).logits[:, -1].log_softmax(-1)[:, :end]
        assert ids == list(divmod(int((first[:, None] + second).argmax()), end))
    assert [ids for ids, *_ in found] != [ids for ids, *_ in greedy]  # so it says something


OWN = {  # a generation_config.json, as LLMs bring them, or might
    "qwen": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5},
    "sampling": {"do_sample": True, "temperature": 5.0},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_length": {"min_length": 10},
    "min_new_tokens": {"min_new_tokens": 10},
    "suppress_tokens": {"suppress_tokens": list(range(100))},
    "length_penalty": {"length_penalty": 20.0},
    "max_length": {"max_length": 3},
    "forced_eos": {"forced_bos_token_id": 5, "eos_token_id": 7},
    "several": {"num_beams": 4, "num_return_sequences": 3},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_the_llms_own_generation_config_changes_nothing(build, folder, own):
    model, _, examples = build()
    ends = likely_ends(model, examples)[:1]
    try:
        (folder / "qwen2" / "generation_config.json").rename(folder / "own.json")
        (folder / "qwen2" / "generation_config.json").write_text(json.dumps(own))
        with_its_own, *_ = build()
    finally:
        (folder / "own.json").rename(folder / "qwen2" / "generation_config.json")
    for num_beams in (1, 3):
        expected = search(model, examples, LIMITS, ends, num_beams)
        assert search(with_its_own, examples, LIMITS, ends, num_beams) == expected


# ---- checkpoint ----


@pytest.mark.parametrize("name", ["", "model.safetensors"], ids=["folder", "file"])
def test_a_saved_projector_is_the_one_that_is_loaded(build, folder, tmp_path, name):
    model, examples, _ = build()
    config = config_of(model) | {
        "prompt": "日本語 <|speech|>",
        "whisper_model_name_or_path": "tiny",
    }
    save_projector(str(tmp_path), model.state_dict(), config)
    path, loaded = load_config(str(tmp_path / name))
    assert {key: loaded[key] for key in config} == config
    assert Path(path) == tmp_path / "model.safetensors"
    torch.manual_seed(2)
    other = SpeechLLM(model.encoder, model.llm, loaded)
    batch = collate(examples)
    assert other(**batch)["loss"] != model(**batch)["loss"]
    load_projector(other, path)
    assert torch.equal(other(**batch)["loss"], model(**batch)["loss"])
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * 4 * sum(
        weight.numel() for weight in model.projector.parameters()
    )


def broken_checkpoint(folder: Path, how: str) -> None:
    """Makes a good checkpoint into one that must not be used."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    name, other = sorted(tensors)[0], "blsp" if config["projector_type"] == "conv1d" else "conv1d"
    if how == "no model":
        file.unlink()
    elif how == "no config":
        config_file.unlink()
    elif how == "config cut":
        config_file.write_text(config_file.read_text()[:-5])
    elif how == "config is a list":
        config_file.write_text("[1]")
    elif how == "garbage":
        file.write_bytes(bytes(range(256)) * 20)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "tensor missing":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    elif how == "tensor surplus":
        save_file(tensors | {"llm.lm_head.weight": torch.zeros(2)}, file)
    elif how == "all tensors of another name":
        save_file({f"module.{key}": tensor for key, tensor in tensors.items()}, file)
    elif how == "tensor of another shape":
        save_file(tensors | {name: torch.zeros(3, 3)}, file)
    else:
        change = {
            "older format": {"format_version": 0},
            "newer format": {"format_version": 99},
            "no format": {"format_version": None},
            "config without encoder dims": {"encoder_dims": None},
            "config without LLM dims": {"llm_dims": None},
            "unknown projector type": {"projector_type": "blasp"},
            "another projector type": {"projector_type": other, "projector_hidden_dim": 2048},
            "another stride": {"projector_stride": 4},
            "another hidden dim": {"projector_hidden_dim": 32},
        }[how]
        config = {key: value for key, value in (config | change).items() if value is not None}
        config_file.write_text(json.dumps(config))


BROKEN_CHECKPOINTS = [
    *("no model", "no config", "config cut", "config is a list", "older format", "newer format", "no format"),
    *("config without encoder dims", "config without LLM dims", "unknown projector type"),
    *("another projector type", "another stride"),
    *("another hidden dim", "garbage", "empty", "cut", "tensor missing", "tensor surplus"),
    *("all tensors of another name", "tensor of another shape"),
]


@pytest.mark.parametrize("how", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(build, tmp_path, how):
    model, *_ = build()
    save_projector(str(tmp_path), model.state_dict(), config_of(model))
    broken_checkpoint(tmp_path, how)
    with refused():
        path, config = load_config(str(tmp_path))
        load_projector(SpeechLLM(model.encoder, model.llm, config), path)


@pytest.mark.parametrize("which", ["another encoder", "another LLM", "an LLM of the same width"])
def test_another_backbone_than_in_training_is_refused(build, folder, which):
    model, *_ = build()
    config = config_of(model)
    encoder, llm = model.encoder, model.llm
    if which == "another encoder":
        encoder = load_encoder(str(folder / "128.pt"))
    else:
        llm = build("llama" if which == "an LLM of the same width" else "opt")[0].llm
    with refused("encoder_dims" if which == "another encoder" else "llm_dims"):
        SpeechLLM(encoder, llm, config)


def test_load_state_dict_misses_no_weight_of_the_projector_even_if_not_strict(build):
    model, *_ = build()
    weights = model.state_dict()
    model.load_state_dict(weights, strict=False)
    for name in weights:
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(
                {key: weight for key, weight in weights.items() if key != name}, strict=False
            )


# ---- backbones that are none ----


class Evil:
    """Unpickled, it writes a file: what could be any command."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def no_whisper(path: Path, how: str) -> None:
    if how == "garbage":
        path.write_bytes(bytes(range(256)) * 20)
    elif how == "another torch file":
        torch.save({"weight": torch.zeros(3)}, path)
    elif how == "another tensor file":
        save_file({"weight": torch.zeros(3)}, path)
    elif how == "weights missing":
        checkpoint = torch.load(make_whisper(path), weights_only=True)
        del checkpoint["model_state_dict"]["encoder.conv1.weight"]
        torch.save(checkpoint, path)
    elif how == "malicious":
        torch.save({"dims": {}, "model_state_dict": Evil(path.with_suffix(".marker"))}, path)


@pytest.mark.parametrize(
    "how", ["missing", "garbage", "another torch file", "another tensor file", "weights missing", "malicious"]
)
def test_what_is_no_whisper_checkpoint_is_refused_and_never_executed(tmp_path, how):
    path = tmp_path / "whisper.pt"
    no_whisper(path, how)
    with refused("--whisper_model_name_or_path", str(path)):
        load_encoder(str(path))
    assert not path.with_suffix(".marker").exists()


def no_llm(path: Path, how: str) -> None:
    if how != "missing":
        path.mkdir()
    if how == "encoder and decoder":
        config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=16)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(path)
    elif how == "unknown type":
        (path / "config.json").write_text('{"model_type": "abacus"}')
    elif how in ("weights missing", "weights garbage"):
        make_llm(path)
        (path / "model.safetensors").unlink()
        if how == "weights garbage":
            (path / "model.safetensors").write_bytes(bytes(range(256)) * 20)


@pytest.mark.parametrize(
    "how", ["missing", "empty", "encoder and decoder", "unknown type", "weights missing", "weights garbage"]
)
def test_what_is_no_causal_llm_is_refused(tmp_path, how):
    no_llm(tmp_path / "llm", how)
    with refused("--llm_model_name_or_path", str(tmp_path / "llm")):
        load_llm(str(tmp_path / "llm"))
