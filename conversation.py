"""Conversations in speech and text: the prompt by the LLM's chat template, its next turn token by token."""

import math
import threading
from collections.abc import Iterator, Sequence
from itertools import chain, cycle

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dataset import INSTRUCTION_SLOT, SPEECH_SLOT, Recordings, collate
from errors import Refused
from manifest import MAX_SECONDS, read_audio, read_record
from model import SpeechLLM

SPOKEN = f"{SPEECH_SLOT}\n{INSTRUCTION_SLOT}"  # a user's turn


def render(tokenizer: PreTrainedTokenizerBase, turns: list[str]) -> str:
    """Turns, the user's and the LLM's by turns, in its chat template; behind a user's the next is opened.

    Of one turn it gives what `render_prompt` does. Without a template it is `USER: ... ASSISTANT:`, and an
    eos token behind what the LLM wrote.
    """
    if tokenizer.chat_template:
        messages = [
            {"role": role, "content": turn} for role, turn in zip(cycle(("user", "assistant")), turns)
        ]
        options = dict(add_generation_prompt=len(turns) % 2 == 1, enable_thinking=False)
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    has_bos = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    said = "USER: {}\nASSISTANT:", f"{{}}{tokenizer.eos_token}"
    return (tokenizer.bos_token if has_bos else "") + "".join(map(str.format, cycle(said), turns))


class Conversation:
    """turns: the user's and the LLM's by turns; heard: (speech_len, llm_dim) for each SPEECH_SLOT there."""

    def __init__(self, turns: Sequence[str] = (), heard: Sequence[Tensor] = ()):
        self.turns, self.heard = list(turns), list(heard)
        self.fed, self.cache = [], None  # embeddings (1, positions, llm_dim) whose keys and values are cached

    def ask(self, text: str, heard: Tensor | None = None) -> None:
        """Adds the user's turn: a text, or the instruction for a speech."""
        self.turns.append(text if heard is None else SPOKEN.replace(INSTRUCTION_SLOT, text))
        self.heard += [] if heard is None else [heard]

    def roll_back(self, embeddings: Tensor, config) -> int:
        """Keeps of the cache what `embeddings` begin with, but for their last -> how many positions."""
        if self.fed:
            fed, size = torch.cat(self.fed, dim=1), embeddings.shape[1] - 1
            same = (fed[0, :size] == embeddings[0, :size][: fed.shape[1]]).all(-1)
            kept = int(same.cumprod(0).sum())
            if kept == fed.shape[1]:
                return kept
            if all(type(layer) is DynamicLayer for layer in self.cache.layers):  # others have forgotten
                self.cache.crop(kept - fed.shape[1])
                self.fed = [fed[:, :kept]]
                return kept
        self.fed, self.cache = [], DynamicCache(config=config)
        return 0


class Listener:
    """A model that hears and writes, a step of one conversation at a time. Raises Refused if the tokenizer's
    chat template is not that of training.
    """

    def __init__(self, model: SpeechLLM, recordings: Recordings):
        self.model, self.recordings, self.lock = model, recordings, threading.Lock()
        self.device, tokenizer = next(model.parameters()).device, recordings.tokenizer
        self.end_ids = {recordings.end_of_turn_id, tokenizer.eos_token_id}
        self.positions = getattr(model.llm.config.get_text_config(), "max_position_embeddings", math.inf)
        self.before, _, after = render(tokenizer, [SPOKEN]).partition(SPEECH_SLOT)
        if after != recordings.after or not render(tokenizer, [SPOKEN] * 3).startswith(self.before):
            told = f"{self.before + SPEECH_SLOT + after!r} now, {recordings.config['prompt']!r} in training"
            raise Refused(f"{tokenizer.name_or_path}: the chat template gives {told}")

    def prompt(self, turns: list[str]) -> str:
        """As the chat template has these turns; what precedes them, a date perhaps, as in training."""
        return self.recordings.before + render(self.recordings.tokenizer, turns).removeprefix(self.before)

    @torch.no_grad()
    def hear(self, path: str) -> tuple[Tensor, int]:
        """An audio file -> speech (speech_len, llm_dim) and its mel frames. Raises Refused."""
        utterance = read_record({"wav": path}, "", "")
        if utterance.seconds > MAX_SECONDS:  # as its header says, before all of it is decoded
            raise Refused(f"{path}: {utterance.seconds:.0f} s; a turn has at most {MAX_SECONDS} s")
        batch = collate([self.recordings.hear(utterance, read_audio(utterance))])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        size = 1, int(self.recordings.speech_len(batch["frames"]))
        speech = torch.ones(size, dtype=torch.bool, device=self.device)
        with self.lock:
            return self.model.embed(speech.long(), speech, **batch)[0], int(batch["frames"])

    def embed(self, conversation: Conversation) -> Tensor:
        """The LLM's input, (1, positions, llm_dim)."""
        texts, heard = self.prompt(conversation.turns).split(SPEECH_SLOT), conversation.heard
        if len(texts) != len(heard) + 1:
            raise Refused(f"{SPEECH_SLOT} stands for speech; no text can hold it")
        ids = (torch.tensor(self.recordings.ids(text), device=self.device) for text in texts)
        parts = map(self.model.llm.get_input_embeddings(), ids)  # one more than there is speech
        return torch.cat([next(parts), *chain.from_iterable(zip(heard, parts))])[None]

    @torch.no_grad()
    def write(self, conversation: Conversation, most: int) -> Iterator[bool]:
        """Adds the LLM's turn, greedy; yields as it begins, and after each token, whether that was the last
        of the `most` that it may have. Raises Refused before it begins if the conversation is too long.
        """
        llm = self.model.llm
        with self.lock:
            embeddings = self.embed(conversation)
            most = min(most, self.positions - embeddings.shape[1])
            if most < 1:
                told = f"takes {embeddings.shape[1]} positions of the LLM's {self.positions}"
                raise Refused(f"this conversation {told}; begin a new one")
            embeddings = embeddings[:, conversation.roll_back(embeddings, llm.config) :]
        ids, turn = [], len(conversation.turns)
        conversation.turns.append("")
        yield False
        while len(ids) < most:
            with self.lock:  # for each token, so that a page that was closed cannot keep it
                inputs = dict(inputs_embeds=embeddings, past_key_values=conversation.cache)
                logits = llm(**inputs, use_cache=True, logits_to_keep=1).logits  # (1, 1, vocabulary)
                conversation.fed.append(embeddings)
            ids.append(int(logits.argmax()))
            if ids[-1] in self.end_ids:
                return
            embeddings = llm.get_input_embeddings()(torch.tensor([ids[-1:]], device=self.device))
            text = self.recordings.tokenizer.decode(ids, skip_special_tokens=True)
            conversation.turns[turn] = text.strip()
            yield len(ids) == most
