"""Does it hear yet? Error rates by decoding, and the loss beside that with the audio of others."""

import copy
import math

import jiwer
import numpy as np
import torch

from beam_search import transcribe
from dataset import SpeechDataset, collate
from errors import Refused
from model import IGNORE, SpeechLLM

HINT = """It does not hear yet: with others' audio the loss is the same. That is normal for 1,500 to 4,000
steps of full-size models. After that look at the learning rate (1e-4 to 1e-3), at the data (do the texts
belong to the audio? `python dataset.py train.jsonl`), and whether encoder and LLM know the language."""


@torch.no_grad()
def evaluate_hearing(model: SpeechLLM, dataset: SpeechDataset, count: int, batch_size: int) -> dict:
    """{eval_wer, eval_cer (%), eval_loss_heard, eval_loss_shuffled} of `count` utterances, evenly spread.

    Greedy decoding, texts as they are; loss in nats per token. {} where fewer than two have a text.
    """
    device, utterances, speeches = next(model.parameters()).device, [], []
    dataset = copy.copy(dataset)
    dataset.most = math.inf  # a long text with another's long audio is no fault here
    for i in np.unique(np.linspace(0, len(dataset) - 1, count, dtype=int)):
        try:
            utterance = dataset.utterances[i]
            speech = dataset.speech(utterance)
        except Refused:  # the evaluation of the loss has replaced it too
            continue
        if utterance.target:
            utterances.append(utterance)
            speeches.append(speech)
    if len(utterances) < 2:
        return {}

    def loss(speeches: list[dict]) -> float:
        total = tokens = 0
        for start in range(0, len(utterances), batch_size):
            pairs = zip(utterances[start : start + batch_size], speeches[start : start + batch_size])
            batch = collate([heard | write(utterance, heard, True) for utterance, heard in pairs])
            tokens += int((batch["labels"] != IGNORE).sum())
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            total += float(model(**batch, num_items_in_batch=1)["loss"])
        return total / tokens

    def write(utterance, speech: dict, with_target: bool) -> dict:
        return dataset.write(utterance, int(speech["frames"]), with_target)

    half = len(speeches) // 2
    losses = {"loss_heard": loss(speeches), "loss_shuffled": loss(speeches[half:] + speeches[:half])}
    pairs = zip(utterances, speeches)
    items = [([heard | write(utterance, heard, False)], None) for utterance, heard in pairs]
    hyps = [result["hyp"] for result in transcribe(model, dataset, items, num_beams=1, batch_size=batch_size)]
    refs = [utterance.target for utterance in utterances]
    rates = {"wer": 100 * jiwer.wer(refs, hyps), "cer": 100 * jiwer.cer(refs, hyps)}
    return {f"eval_{name}": round(value, 4) for name, value in (rates | losses).items()}


def in_words(hearing: dict[str, float]) -> str:
    """Whether it hears: whether the right audio takes a tenth off the loss."""
    if hearing["eval_loss_heard"] > 0.9 * hearing["eval_loss_shuffled"]:
        return HINT
    rates, losses = (
        "WER {eval_wer:.2f} %, CER {eval_cer:.2f} %",
        "{eval_loss_heard:.3f}, {eval_loss_shuffled:.3f}",
    )
    return f"It hears: {rates}, loss {losses} with others' audio".format(**hearing)
