"""Manifest -> examples -> batches: checks the lines, reads the audio, makes mel, prompt and labels, pads.

A manifest is jsonl: `wav` (absolute, or relative to the manifest's folder) and `txt`; optional `key`, `start`
and `duration` in seconds, `instruction`, `target` (what the LLM must write; default `txt`), and any others.
"""

import json
import math
import os
from functools import partial
from json import JSONDecodeError
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import IGNORE, Refused, refusing

SAMPLE_RATE, MAX_SECONDS = whisper.audio.SAMPLE_RATE, whisper.audio.CHUNK_LENGTH  # 16 kHz, 30 s
MIN_SAMPLES = whisper.audio.N_FFT // 2 + 1  # log_mel_spectrogram reflects half a window at either end
INSTRUCTION = "Transcribe the speech."
SPEECH_SLOT, INSTRUCTION_SLOT = "<|speech|>", "<|instruction|>"  # in a rendered prompt
TEXTS, NUMBERS = ("wav", "txt", "key", "instruction", "target"), ("start", "duration")  # in a record
PADDING = {"input_ids": 0, "speech_mask": False, "labels": IGNORE, "attention_mask": 0}


class Utterance(NamedTuple):
    """One line of a manifest, checked."""

    record: dict  # as it stood there
    where: str  # as train.jsonl:17, for messages
    path: str
    seconds: float
    key: str
    target: str | None


def read_manifest(path: str, needs_target: bool = True) -> list[Utterance]:
    """All lines, checked as far as that goes without decoding audio. Raises Refused with file:line."""
    with refusing(f"--data_path {path}", OSError), open(path, "rb") as file:
        lines = file.read().splitlines()
    utterances = []
    for number, line in enumerate(lines, start=1):
        with refusing(f"{path}:{number}: not a line of JSON in UTF-8", UnicodeError, JSONDecodeError):
            record = json.loads(line.decode("utf-8"))
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        utterances.append(read_record(record, f"{path}:{number}", os.path.dirname(path)))
        if needs_target and "target" not in record and not (utterances[-1].target or "").strip():
            raise Refused(f"{path}:{number}: no txt to learn (for silence give an empty target)")
    if not utterances:
        raise Refused(f"{path}: empty; a manifest has one JSON object per line, with wav and txt")
    return utterances


def read_record(record: dict, where: str, folder: str) -> Utterance:
    """A record, whose `wav` is relative to `folder` -> its utterance. Raises Refused with `where`."""
    if not isinstance(record, dict) or "wav" not in record:
        raise Refused(f"{where}: a JSON object with wav and txt is needed")
    for name, value in record.items():
        if name in TEXTS and not isinstance(value, str):
            raise Refused(f"{where}: {name} must be a string, not {value!r}")
        if name in NUMBERS and (type(value) not in (int, float) or not 0 <= value < 1e9):
            raise Refused(f"{where}: {name} must be a number of seconds, not {value!r}")
    path, start, seconds = os.path.join(folder, record["wav"]), record.get("start", 0), record.get("duration")
    if not os.path.isfile(path):
        raise Refused(f"{where}: no such audio file: {path}")
    if seconds is None:
        with refusing(f"{where}: no audio that can be read", soundfile.SoundFileError):
            seconds = soundfile.info(path).duration - start
    if not 0 < seconds <= MAX_SECONDS:
        span = f"{seconds} s of audio from {start} s on"
        raise Refused(f"{where}: {span}; Whisper hears up to {MAX_SECONDS} s: cut with start and duration")
    key = record.get("key", os.path.splitext(os.path.basename(path))[0])
    return Utterance(record, where, path, float(seconds), key, record.get("target", record.get("txt")))


def read_audio(utterance: Utterance) -> np.ndarray:
    """Mono float32 samples at 16 kHz. Raises Refused if the file does not hold what it should."""
    start, where = utterance.record.get("start"), f"{utterance.where}: {utterance.path}"
    with refusing(where, soundfile.SoundFileError), soundfile.SoundFile(utterance.path) as file:
        file.seek(round((start or 0) * file.samplerate))
        # duration without start cuts nothing: it is the known length, and the file must bear it out
        samples = -1 if start is None else round(utterance.seconds * file.samplerate)
        waveform = file.read(samples, dtype="float32", always_2d=True).mean(axis=1)
        waveform = soxr.resample(waveform, file.samplerate, SAMPLE_RATE)
    seconds = len(waveform) / SAMPLE_RATE
    if seconds > MAX_SECONDS or abs(seconds - utterance.seconds) > 0.1:
        told = f"{seconds:.2f} s where {utterance.seconds:.2f} s should be"
        raise Refused(f"{where}: {told}; the file is cut short, or a part of it needs start")
    if len(waveform) < MIN_SAMPLES or not np.isfinite(waveform).all():
        raise Refused(f"{where}: NaN, infinite, or under {MIN_SAMPLES} samples at 16 kHz")
    return waveform


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer. Raises Refused."""
    with refusing(f"--llm_model_name_or_path {name}: no tokenizer", OSError, ValueError):
        return AutoTokenizer.from_pretrained(name)


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
    """Utterances -> examples, to train on, or to generate from where not `with_target`.

    config: what config.json holds; speech_len: the projector's; instruction: in place of each record's.
    """

    def __init__(self, utterances, tokenizer, config, speech_len, instruction=None, with_target=True):
        self.utterances, self.tokenizer, self.config = utterances, tokenizer, config
        self.speech_len, self.instruction, self.with_target = speech_len, instruction, with_target
        self.before, self.after = config["prompt"].split(SPEECH_SLOT)
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(config["end_of_turn"])
        self.epoch = 0  # which of its orders LengthSampler takes

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
        target = self.ids(utterance.target) + [self.end_of_turn_id] if self.with_target else []
        return self.ids(self.before), self.ids(after), target

    def check_positions(self, most: int) -> None:
        """Raises Refused at the first utterance that takes more than `most` positions in the LLM's input."""
        for utterance in self.utterances:
            positions = self.speech_len(math.ceil(utterance.seconds * 100))
            positions += sum(map(len, self.text_ids(utterance)))
            if positions > most:
                raise Refused(f"{utterance.where}: {positions} positions; --model_max_length is {most}")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """mel (n_mels, frames), frames (), input_ids, speech_mask, labels or attention_mask (positions)."""
        utterance = self.utterances[index]
        waveform = torch.from_numpy(read_audio(utterance))
        frames = len(waveform) // whisper.audio.HOP_LENGTH
        if self.config["encoder_window"] == "30s":
            waveform = whisper.pad_or_trim(waveform)
        before, after, target = self.text_ids(utterance)
        speech_len = self.speech_len(frames)
        prompt_len = len(before) + speech_len + len(after)
        example = {
            "mel": whisper.log_mel_spectrogram(waveform, self.config["encoder_dims"]["n_mels"]),
            "frames": torch.tensor(frames),
            "input_ids": torch.tensor(before + [0] * speech_len + after + target),
            "speech_mask": torch.zeros(prompt_len + len(target), dtype=torch.bool),
        }
        example["speech_mask"][len(before) : len(before) + speech_len] = True
        if self.with_target:
            return {**example, "labels": torch.tensor([IGNORE] * prompt_len + target)}
        return {**example, "attention_mask": torch.ones(prompt_len, dtype=torch.long)}


def collate(examples: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    """Examples -> a batch. Text is padded at `side`: right to train, left to generate; mel always right."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    batch = {"frames": torch.stack(columns.pop("frames"))}
    batch["mel"] = pad_sequence([mel.T for mel in columns.pop("mel")], batch_first=True).transpose(1, 2)
    for name, column in columns.items():
        batch[name] = pad_sequence(column, True, PADDING[name], padding_side=side)
    return batch


class LengthSampler(torch.utils.data.Sampler):
    """Indices, each `step` of them of utterances of like length, in an order set by seed and epoch.

    Shuffled, cut into pools of 50 steps, sorted within a pool, cut into steps, and the steps shuffled.
    """

    def __init__(self, dataset: SpeechDataset, step: int, seed: int):
        self.dataset, self.step, self.seed = dataset, step, seed
        self.seconds = np.array([utterance.seconds for utterance in dataset.utterances])

    def __len__(self) -> int:
        return len(self.seconds)

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.dataset.epoch))
        order = random.permutation(len(self))
        pools = np.split(order, range(50 * self.step, len(self), 50 * self.step))
        order = np.concatenate([pool[np.argsort(self.seconds[pool], kind="stable")] for pool in pools])
        whole = len(self) // self.step  # a last step that is not full stays last
        for i in [*random.permutation(whole), whole]:
            yield from order[i * self.step : (i + 1) * self.step].tolist()
