"""Batches of speech -> text: the beam search of transformers, with a limit of its own for each utterance."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

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
