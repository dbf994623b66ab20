"""Batches of speech -> text: a beam search whose beams share one key/value cache.

The beams of an utterance are positions of one row, not rows: a tree grows behind the prompt, and a mask shows
each beam its own branch. So nothing in the cache is copied for each beam, or reordered. In float32 it finds
what `generate` of transformers does (length_penalty=1, early_stopping=False), token for token.

Legend: batch (utterances still searched), beams (1 at the root, then num_beams), cached (keys in the cache).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dataset import Recordings, collate
from errors import Refused
from model import SpeechLLM
from sampler import by_seconds


class Search:
    """One utterance: the tokens of each beam; finished hypotheses (rank, mean log-probability, tokens)."""

    def __init__(self, num_beams: int):
        self.num_beams, self.beams, self.finished = num_beams, [[]], []

    def step(
        self, candidates: list[tuple[float, float, int, int]], going: list[int], end_ids: list[int]
    ) -> bool:
        """Whether the search goes on. The beams become those candidates that are `going`, the best first.

        candidates: sum of log-probabilities to rank by, the true one, beam, token; the best first. Only the
        best num_beams of them may end. It is over once that many have and the best beam, by its present mean,
        is no better than the worst of those; with one beam, once that ends.
        """
        length = len(self.beams[0]) + 1
        for rank, true, beam, token in candidates[: self.num_beams]:
            if token in end_ids:
                self.finished.append((rank / length, true / length, self.beams[beam]))
        self.finished = sorted(self.finished, key=lambda hyp: -hyp[0])[: self.num_beams]
        self.beams = [self.beams[candidates[place][2]] + [candidates[place][3]] for place in going]
        if not going or len(self.finished) < self.num_beams:
            return bool(going)
        return self.num_beams > 1 and candidates[going[0]][0] / length > self.finished[-1][0]


@torch.no_grad()
def beam_search(
    model: SpeechLLM, batch: dict[str, Tensor], limits: list[int], end_ids: list[int], num_beams: int
) -> list[tuple[list[int], float, bool]]:
    """The best hypothesis of each utterance: tokens, their mean log-probability, whether the limit cut it.

    batch: as `collate` makes it, padded left; limits: the most tokens of each utterance; end_ids: tokens that
    end a hypothesis, counted in the mean. The text of an utterance does not depend on the others (float32).
    Raises Refused once a layer of the LLM cannot attend to all positions: it recurs, or its window is full.
    """
    llm, attention_mask = model.llm, batch["attention_mask"]
    embeddings = model.embed(**{name: batch[name] for name in batch if name != "attention_mask"})
    device, dtype = embeddings.device, embeddings.dtype
    layers = DynamicCache(config=llm.config).layers
    windows = [getattr(layer, "sliding_window", 0) for layer in layers if type(layer) is not DynamicLayer]
    window, longest = min(windows, default=math.inf), int(attention_mask.sum(1).max())

    unseen = torch.finfo(dtype).min  # is added to attention; finite, for no softmax to be NaN
    siblings = torch.full((num_beams, num_beams), unseen, dtype=dtype, device=device).fill_diagonal_(0)
    mask = torch.zeros_like(attention_mask, dtype=dtype).masked_fill(attention_mask == 0, unseen)
    mask = mask[:, None]  # (batch, beams, cached)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (batch, prompt positions)
    inputs = dict(inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=positions)
    inputs["logits_to_keep"] = 1
    ends = torch.tensor(end_ids, device=device)
    scores = torch.zeros(len(limits), 1, device=device)  # (batch, beams), sums of log-probabilities
    searches, active, cache = [Search(num_beams) for _ in limits], list(range(len(limits))), DynamicCache()
    for step in range(max(limits) + 1):
        if longest + step > window:
            needed = f"the beam search attends to {longest + step} positions, a layer of this LLM to {window}"
            raise Refused(f"{llm.config.model_type}: {needed}")
        logits = llm(**inputs, past_key_values=cache, use_cache=True).logits
        log_probs = logits.float().log_softmax(-1).add_(scores[..., None])  # (batch, beams, vocabulary)
        before, ended = scores.tolist(), log_probs[..., end_ids[0]].tolist()
        wanted = num_beams * (1 + len(end_ids))  # at the root there may be fewer
        candidates = F.pad(log_probs.flatten(1), (0, max(0, wanted - log_probs[0].numel())), value=-math.inf)
        scores, places = candidates.topk(wanted)  # (batch, candidates)
        parents = (places // logits.shape[-1]).clamp(max=log_probs.shape[1] - 1)
        tokens = places % logits.shape[-1]

        picked = scores.masked_fill(torch.isin(tokens, ends), -math.inf)
        picked = picked.topk(num_beams).indices  # (batch, beams); once more topk, as `generate` breaks ties

        kept = []
        columns = zip(scores.tolist(), scores.tolist(), parents.tolist(), tokens.tolist())
        for row, (index, going, table) in enumerate(zip(active, picked.tolist(), columns)):
            candidates = list(zip(*table))
            if step == limits[index]:  # all beams end: for nothing in rank, but not in the mean
                sums = zip(before[row], ended[row])
                candidates = [(rank, true, beam, end_ids[0]) for beam, (rank, true) in enumerate(sums)]
                going = []
            if searches[index].step(candidates, going, end_ids):
                kept.append(row)
        if not kept:
            break

        rows = torch.tensor(kept, device=device)
        if len(kept) < len(active):
            cache.batch_select_indices(rows)
        active = [active[row] for row in kept]
        scores, parents, tokens = (column.gather(1, picked)[rows] for column in (scores, parents, tokens))
        mask = torch.cat([mask[rows[:, None], parents], siblings.expand(len(kept), -1, -1)], dim=2)
        positions = positions[rows, -1:] + 1  # (batch, 1)
        inputs = dict(input_ids=tokens, attention_mask=mask[:, None])
        inputs["position_ids"] = positions.expand(-1, num_beams)

    hyps = [search.finished[0] for search in searches]
    return [(ids, score, len(ids) == limit) for (_, score, ids), limit in zip(hyps, limits)]


def transcribe(
    model: SpeechLLM,
    recordings: Recordings,
    items: list[tuple],
    num_beams=3,
    batch_seconds=480.0,
    batch_size=16,
    max_new_tokens=None,
) -> list[dict]:
    """items of `recordings` -> {hyp, score, cut: whether a limit of tokens ended it} or {error} of each.

    The parts of all are decoded in batches `by_seconds`; score: mean log-probability per token.
    """
    device, tokenizer = next(model.parameters()).device, recordings.tokenizer
    end_ids = [recordings.end_of_turn_id]
    end_ids += {tokenizer.eos_token_id} - {None, *end_ids}
    examples = [example for parts, _ in items for example in parts]
    seconds, hyps = np.array([int(example["frames"]) / 100 for example in examples]), {}
    for chosen in by_seconds(seconds, batch_seconds, batch_size):
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
