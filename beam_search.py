"""Batches of speech -> text: the beam search of transformers, with a limit of its own for each utterance."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from dataset import Recordings, collate
from model import SpeechLLM


class EndAtLimit(LogitsProcessor):
    """Ends each utterance at its own limit of tokens, whatever the others in the batch need."""

    def __init__(self, limits: Tensor, end_id: int):
        self.limits, self.end_id = limits, end_id  # limits (batch,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (batch x beams, tokens so far), scores (batch x beams, vocabulary) -> scores."""
        over = self.limits.repeat_interleave(len(scores) // len(self.limits)) <= input_ids.shape[1]
        scores = scores.masked_fill(over[:, None], float("-inf"))
        scores[over, self.end_id] = 0.0
        return scores


@torch.no_grad()
def beam_search(
    model: SpeechLLM, batch: dict[str, Tensor], limits: list[int], end_ids: list[int], num_beams: int
) -> list[tuple[list[int], float, bool]]:
    """The best hypothesis of each utterance: tokens, their mean log-probability, whether the limit cut it.

    batch: as `collate` makes it, padded left; limits: the most tokens of each utterance; end_ids: tokens that
    end a hypothesis, counted in the mean. The text of an utterance does not depend on the others (float32).
    """
    limits = torch.tensor(limits, device=batch["frames"].device)
    config = GenerationConfig(
        num_beams=num_beams,
        max_new_tokens=int(limits.max()) + 1,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
    )
    attention_mask = batch["attention_mask"]
    embeddings = model.embed(**{name: batch[name] for name in batch if name != "attention_mask"})
    hyps = model.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        generation_config=config,
        logits_processor=[EndAtLimit(limits, end_ids[0])],
    )  # (batch, new tokens)

    # To score, generate would keep vocabulary x beams x steps; one more forward pass costs less.
    attention_mask = F.pad(attention_mask, (0, hyps.shape[1]), value=1)
    logits = model.llm(
        inputs_embeds=torch.cat([embeddings, model.llm.get_input_embeddings()(hyps)], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=hyps.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]  # (batch, new tokens, vocabulary)
    log_probs = -F.cross_entropy(logits.float().transpose(1, 2), hyps, reduction="none")
    lens = (torch.isin(hyps, torch.tensor(end_ids, device=hyps.device)).cumsum(1) == 0).sum(1)
    return [
        (hyp[:length].tolist(), log_prob[: length + 1].mean().item(), length == limit)
        for hyp, log_prob, length, limit in zip(hyps, log_probs, lens.tolist(), limits.tolist())
    ]


def transcribe(
    model: SpeechLLM,
    recordings: Recordings,
    items: list[tuple],
    num_beams=3,
    batch_size=16,
    max_new_tokens=None,
) -> list[dict]:
    """items of `recordings` -> {hyp, score, cut: whether a limit of tokens ended it} or {error} of each.

    The parts of all are decoded by length, `batch_size` at a time; score: mean log-probability per token.
    """
    device, tokenizer = next(model.parameters()).device, recordings.tokenizer
    end_ids = [recordings.end_of_turn_id]
    end_ids += {tokenizer.eos_token_id} - {None, *end_ids}
    examples = [example for parts, _ in items for example in parts]
    order = sorted(range(len(examples)), key=lambda k: -examples[k]["frames"])
    hyps = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[k] for k in chosen], side="left")
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        limits = [max_new_tokens or 64 + frames // 4 for frames in batch["frames"].tolist()]  # 25 a second
        hyps |= zip(chosen, beam_search(model, batch, limits, end_ids, num_beams))
    results, in_order = [], iter(range(len(examples)))
    for parts, error in items:
        if error is not None:
            results.append({"error": error})
            continue
        ids, scores, cut = zip(*(hyps[next(in_order)] for _ in parts))
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        counts = [len(part) + 1 for part in ids]  # with the end of turn
        score = sum(score * count for score, count in zip(scores, counts)) / sum(counts)
        # 4 digits do not depend on how many threads add them up
        results.append({"hyp": " ".join(filter(None, texts)), "score": round(score, 4), "cut": any(cut)})
    return results
