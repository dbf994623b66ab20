"""beam_search.py finds what `generate` of transformers finds.

BEAM_CASES=1000 pytest tests/test_beam_search.py compares 1,000 random cases, in a minute on one core.
"""

import os
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from beam_search import beam_search

CASES = range(int(os.environ.get("BEAM_CASES", 80)))


class EndAtLimit(LogitsProcessor):
    """Ends each utterance at its own limit of tokens, whatever the others in the batch need."""

    def __init__(self, limits: list[int], end_id: int):
        self.limits, self.end_id = torch.tensor(limits), end_id  # limits (batch,)

    def __call__(self, input_ids, scores):
        """input_ids (batch x beams, tokens so far), scores (batch x beams, vocabulary) -> scores."""
        over = self.limits.repeat_interleave(len(scores) // len(self.limits)) <= input_ids.shape[1]
        scores = scores.masked_fill(over[:, None], float("-inf"))
        scores[over, self.end_id] = 0.0
        return scores


@torch.no_grad()
def generate(model, batch, limits, end_ids, num_beams):
    """`beam_search` by transformers, with one more forward pass for the scores."""
    ends = dict(eos_token_id=end_ids, pad_token_id=end_ids[0])
    hyps = model.llm.generate(
        **batch,
        generation_config=GenerationConfig(num_beams=num_beams, max_new_tokens=max(limits) + 1, **ends),
        logits_processor=[EndAtLimit(limits, end_ids[0])],
    )  # (batch, new tokens)
    new = model.llm.get_input_embeddings()(hyps)
    attention_mask = F.pad(batch["attention_mask"], (0, hyps.shape[1]), value=1)
    logits = model.llm(
        inputs_embeds=torch.cat([batch["inputs_embeds"], new], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
    ).logits[:, -hyps.shape[1] - 1 : -1]  # (batch, new tokens, vocabulary)
    log_probs = -F.cross_entropy(logits.transpose(1, 2), hyps, reduction="none")
    lens = (torch.isin(hyps, torch.tensor(end_ids)).cumsum(1) == 0).sum(1).tolist()
    return [
        (hyp[:length].tolist(), log_prob[: length + 1].mean().item(), length == limit)
        for hyp, log_prob, length, limit in zip(hyps, log_probs, lens, limits)
    ]


def make_case(seed: int, **config) -> tuple:
    """What `beam_search` takes: a random LLM that is told vectors of noise, limits, end ids and beams."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, vocab_size=draw.randint(20, 60))
    sizes |= dict(word_embed_proj_dim=32, ffn_dim=64)  # OPT's
    sizes |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    sizes |= dict(model_type=draw.choice(["qwen2", "llama", "gpt2", "opt"]))
    sizes |= dict(tie_word_embeddings=draw.random() < 0.3, initializer_range=draw.choice([0.1, 0.2, 0.4]))
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(sizes | config))).eval()
    llm.generation_config = GenerationConfig()
    lens = torch.tensor([draw.randint(1, 20) for _ in range(draw.randint(1, 8))])
    mask = (torch.arange(int(lens.max())).flip(0) < lens[:, None]).long()  # padded left
    batch = {"inputs_embeds": torch.randn(*mask.shape, 32), "attention_mask": mask}
    end_ids = draw.sample(range(sizes["vocab_size"]), draw.randint(1, 3))
    limits = [draw.randint(1, 30) for _ in lens]
    model = SimpleNamespace(llm=llm, embed=lambda inputs_embeds: inputs_embeds)
    return model, batch, limits, end_ids, draw.randint(1, 5)


def assert_same(hyps, expected):
    assert [(ids, cut) for ids, _, cut in hyps] == [(ids, cut) for ids, _, cut in expected]
    assert [score for _, score, _ in hyps] == pytest.approx([score for _, score, _ in expected], abs=1e-5)


@pytest.mark.parametrize("seed", CASES)
def test_hypotheses_and_scores_are_those_of_generate(seed):
    case = make_case(seed)
    assert_same(beam_search(*case), generate(*case))


def test_beams_share_a_prompt_and_the_finished_leave():
    model, batch, *_ = make_case(1, model_type="qwen2", tie_word_embeddings=False)
    batch = {name: tensor[:1].repeat_interleave(3, 0) for name, tensor in batch.items()}
    end = torch.zeros(model.llm.config.vocab_size)
    end[0] = -100.0
    model.llm.lm_head.bias = torch.nn.Parameter(end)  # never ends by itself
    told, given = [], []
    model.llm.register_forward_pre_hook(
        lambda llm, _, inputs: told.append(tuple(inputs["position_ids"].shape)), with_kwargs=True
    )
    model.llm.register_forward_hook(lambda llm, _, output: given.append(tuple(output.logits.shape[:2])))
    hyps = beam_search(model, batch, [3, 9, 6], [0], num_beams=4)
    assert [(len(ids), cut) for ids, _, cut in hyps] == [(3, True), (9, True), (6, True)]
    rows = [3] * 3 + [2] * 3 + [1] * 3
    assert told == [(3, batch["inputs_embeds"].shape[1]), *((count, 4) for count in rows)]
    assert given == [(3, 1), *((count, 4) for count in rows)]


def test_a_window_changes_nothing_until_it_is_full():
    model, batch, limits, end_ids, _ = make_case(2, model_type="mistral", sliding_window=25)
    prompt = int(batch["attention_mask"].sum(1).max())
    fits = [25 - prompt] * len(limits)
    case = model, batch, fits, end_ids, 3
    assert_same(beam_search(*case), generate(*case))
    with refused("mistral", "to 25"):
        beam_search(model, batch, [30] * len(limits), [end_ids[0]], 3)


def test_an_llm_that_recurs_is_refused():
    with refused("qwen3_next"):
        beam_search(*make_case(0, model_type="qwen3_next", num_hidden_layers=4, num_experts=4, head_dim=8))
