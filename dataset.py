"""Manifest -> examples -> batches: prompt, speech and labels, mel, padding, batches by length.

python dataset.py train.jsonl   # checks every line and recording; ends with 1 if there is a problem
"""

import math
import sys
from functools import partial

import numpy as np
import torch
import whisper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from errors import Refused, refusing
from manifest import MAX_SECONDS, SAMPLE_RATE, Utterance, check, cut, read_audio
from model import IGNORE

INSTRUCTION = "Transcribe the speech."
SPEECH_SLOT, INSTRUCTION_SLOT = "<|speech|>", "<|instruction|>"  # in a rendered prompt
PADDING = {"input_ids": 0, "speech_mask": False, "labels": IGNORE, "attention_mask": 0}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer. Raises Refused."""
    with refusing(f"--llm_model_name_or_path {name}: no tokenizer", OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # None would ask


def render_prompt(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """{prompt, end_of_turn}: a user's turn by the LLM's chat template, with slots, and what ends a turn.

    Rendered once and kept in config.json: some templates insert the date. Without a template it is
    `USER: ... ASSISTANT:`. Raises Refused if the template changes what the user says, or nothing ends a turn.
    """
    user, end_of_turn = {"role": "user", "content": f"{SPEECH_SLOT}\n{INSTRUCTION_SLOT}"}, tokenizer.eos_token
    if tokenizer.chat_template:
        # Qwen3 would think before it writes; a template that knows no thinking ignores the word
        render = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        prompt = render([user], add_generation_prompt=True)
        tail = render([user, {"role": "assistant", "content": "ANSWER"}]).rpartition("ANSWER")[2]
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        ends = [str(tokenizer.added_tokens_decoder[i]) for i in ids if i in tokenizer.added_tokens_decoder]
        end_of_turn = ends[0] if ends else end_of_turn
    else:
        has_bos = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        prompt = f"{tokenizer.bos_token if has_bos else ''}USER: {user['content']}\nASSISTANT:"
    if end_of_turn is None or prompt.count(SPEECH_SLOT) != 1 or prompt.count(INSTRUCTION_SLOT) != 1:
        told = f"needs an eos token, {end_of_turn}, and to say the user's text once as it is, {prompt!r}"
        raise Refused(f"{tokenizer.name_or_path}: the chat template {told}")
    return {"prompt": prompt, "end_of_turn": end_of_turn}


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances -> examples to train on; in place of one that cannot be used stands the next that can.

    config: what config.json holds; speech_len: the projector's; most: positions in the LLM's input;
    instruction: in place of each record's.
    """

    def __init__(self, utterances, tokenizer, config, speech_len, most=math.inf, instruction=None):
        self.utterances, self.tokenizer, self.config = utterances, tokenizer, config
        self.speech_len, self.most, self.instruction = speech_len, most, instruction
        self.before, self.after = config["prompt"].split(SPEECH_SLOT)
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(config["end_of_turn"])
        self.features = None  # a FeatureCache, if audio is not to be encoded again
        self.epoch = 0  # which of its orders a sampler takes

    def __len__(self) -> int:
        return len(self.utterances)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader, which reaches any data set, but not a sampler wrapped twice."""
        self.epoch = epoch

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids  # a rendered prompt holds its BOS

    def text_ids(self, utterance: Utterance) -> tuple[list[int], list[int], list[int]]:
        """Ids before the speech, between speech and target, and of the target with its end of turn."""
        instruction = self.instruction or utterance.record.get("instruction", INSTRUCTION)
        after = self.after.replace(INSTRUCTION_SLOT, instruction)
        target = self.ids(utterance.target or "") + [self.end_of_turn_id]
        return self.ids(self.before), self.ids(after), target

    def check_positions(self) -> None:
        """Raises Refused if one of 1,000 utterances, evenly spread, takes more than `most` positions."""
        for i in np.unique(np.linspace(0, len(self) - 1, 1000, dtype=int)):
            utterance = self.utterances[i]
            self.fit(utterance, self.speech_len(round(utterance.seconds * 100)), *self.text_ids(utterance))

    def fit(self, utterance: Utterance, speech_len: int, *texts: list[int]) -> None:
        positions = speech_len + sum(map(len, texts))
        if positions > self.most:
            raise Refused(f"{utterance.where}: {positions} positions; --model_max_length is {self.most}")

    def hear(self, utterance: Utterance, waveform: np.ndarray) -> dict[str, Tensor]:
        """mel (n_mels, frames), frames () of up to 30 s of speech."""
        if len(waveform) > MAX_SECONDS * SAMPLE_RATE:
            raise Refused(f"{utterance.where}: {utterance.path}: over {MAX_SECONDS} s")
        waveform = torch.from_numpy(waveform)
        frames = torch.tensor(len(waveform) // whisper.audio.HOP_LENGTH)
        if self.config["encoder_window"] == "30s":
            waveform = whisper.pad_or_trim(waveform)
        mel = whisper.log_mel_spectrogram(waveform, self.config["encoder_dims"]["n_mels"])
        return {"mel": mel, "frames": frames}

    def speech(self, utterance: Utterance) -> dict[str, Tensor]:
        """mel, or encoded where that is known, and frames."""
        return self.features.load(utterance) if self.features else self.hear(utterance, read_audio(utterance))

    def write(self, utterance: Utterance, frames: int, with_target: bool) -> dict[str, Tensor]:
        """input_ids, speech_mask, and labels or attention_mask (positions)."""
        before, after, target = self.text_ids(utterance)
        speech_len, target = self.speech_len(frames), target if with_target else []
        self.fit(utterance, speech_len, before, after, target)
        prompt_len = len(before) + speech_len + len(after)
        input_ids = torch.tensor(before + [0] * speech_len + after + target)
        speech_mask = torch.zeros(len(input_ids), dtype=torch.bool)
        speech_mask[len(before) : len(before) + speech_len] = True
        text = {"input_ids": input_ids, "speech_mask": speech_mask}
        if with_target:
            return {**text, "labels": torch.tensor([IGNORE] * prompt_len + target)}
        return {**text, "attention_mask": torch.ones(prompt_len, dtype=torch.long)}

    def __getitem__(self, index: int | list[int]) -> dict | list[dict]:
        """Speech, text and target; `where` they stand; the `faults` of those that they replace."""
        if isinstance(index, list):  # a batch of SecondsSampler
            return [self[i] for i in index]
        faults = []
        for i in range(index, index + 100):
            try:
                utterance = self.utterances[i % len(self)]
                speech = self.speech(utterance)
                text = self.write(utterance, int(speech["frames"]), with_target=True)
                return {**speech, **text, "where": utterance.where, "faults": faults}
            except Refused as refused:
                faults.append(refused.told)
        raise Refused(f"100 utterances in a row cannot be used: {faults[0]}, ...")


class Recordings(SpeechDataset):
    """Utterances -> what the LLM is given to recognise each, in parts of at most `part_seconds`."""

    part_seconds: float = MAX_SECONDS

    def __getitem__(self, index: int) -> tuple[list[dict[str, Tensor]], str | None]:
        """Examples without target, or why there are none."""
        try:
            utterance = self.utterances[index]
            parts = [self.hear(utterance, part) for part in cut(read_audio(utterance), self.part_seconds)]
            texts = [self.write(utterance, int(part["frames"]), with_target=False) for part in parts]
            return [part | text for part, text in zip(parts, texts)], None
        except Refused as refused:
            return [], refused.told


def collate(examples: list[dict], side: str = "right") -> dict:
    """Examples -> a batch. Text is padded at `side`, right to train, left to generate; speech at right."""
    examples = examples[0] if isinstance(examples[0], list) else examples
    batch = {name: [example[name] for example in examples] for name in examples[0]}
    batch["frames"] = torch.stack(batch["frames"])
    if "mel" in batch:
        batch["mel"] = pad_sequence([mel.T for mel in batch["mel"]], batch_first=True).transpose(1, 2)
    if "encoded" in batch:
        batch["encoded"] = pad_sequence(batch["encoded"], batch_first=True)
    for name in PADDING.keys() & batch.keys():
        batch[name] = pad_sequence(batch[name], True, PADDING[name], padding_side=side)
    return batch


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python dataset.py train.jsonl")
    sys.exit(check(sys.argv[1]) > 0)
