"""Makes the demo's backbones: an openai-whisper checkpoint file and a Qwen2 folder, real in form and small.

    python demo/make_backbones.py --output_dir exp/demo                         # unpack what is shipped
    python demo/make_backbones.py --data_path train.jsonl --output_dir exp/own  # teach it other recordings

writes whisper.pt and llm/. The encoder learns by CTC over the characters of the transcripts. The LLM learns
by text alone (those transcripts, and the demo's grammar) to repeat, translate, answer and continue, on input
with repeated, missing, wrong and noisy tokens, so that it forgives as a big LLM does. Part of what it
repeats is random, so that it can be led to write what it has never seen.

Without --data_path 10 s; with it about 7 minutes on 2 cores. On 3,000 strings of real digits the CTC loss
falls to 0.10 and the LLM's to 0.4.

The shipped ones, demo/backbones/, were made in two rounds:

    python demo/corpus.py --output_dir exp/round1 --num_train 8000 --seed 1
    python demo/make_backbones.py --data_path exp/round1/train.jsonl --output_dir exp/round1 --from_scratch \\
      --encoder_steps 3400 --llm_steps 1800 --learning_rate 1.5e-3 --ship demo/backbones
    python demo/corpus.py --output_dir exp/round2 --num_train 10000 --seed 2
    python demo/make_backbones.py --data_path exp/round2/train.jsonl --output_dir exp/round2 \\
      --encoder_steps 2600 --llm_steps 1800 --learning_rate 1.2e-3 --ship demo/backbones

The encoder took 93 minutes and the LLM 51, each on one core that it shared with other work. Greedy CTC of
the encoder alone: WER 28.5 % on the demo's test after round 1, 8.8 % after round 2. Round 1 of the shipped
ones was of an earlier version: 112 of the 136 voices, no doubled or wrong tokens for the LLM, whose cosine
was cut short.
"""

import argparse
import copy
import functools
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import grammar
import torch
import torch.nn.functional as F
import whisper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from dataset import INSTRUCTION_SLOT, SPEECH_SLOT, render_prompt  # noqa: E402
from encoder import Encoder, encoder_len  # noqa: E402
from manifest import read_audio, read_manifest  # noqa: E402
from model import IGNORE  # noqa: E402

SHIPPED = Path(__file__).parent / "backbones"
DIMS = whisper.model.ModelDimensions(
    n_mels=80, n_audio_ctx=1500, n_audio_state=192, n_audio_head=3, n_audio_layer=4,
    n_vocab=8, n_text_ctx=8, n_text_state=192, n_text_head=3, n_text_layer=1,
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLANK = -1  # no token
CHAT_TEXT = "user\nassistant\n"
TASK_WEIGHTS = {grammar.TRANSCRIBE: 3.0, grammar.TRANSLATE: 2.0, grammar.CONTINUE: 2.0}  # a question: 0.6


def read_mels(data_path: str) -> list[torch.Tensor]:
    """The log-mel of each utterance, real frames only, as Ears feeds its encoder; each (n_mels, frames)."""
    mels = []
    for utterance in tqdm(read_manifest(data_path), desc="reading audio"):
        waveform = torch.from_numpy(read_audio(utterance))
        mels.append(whisper.log_mel_spectrogram(waveform).half())
    return mels


def disguise(mel: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another voice in another room: warp time and frequency, tilt, raise the floor, cut parts out."""
    n_mels, frames = mel.shape
    size = (round(n_mels * rng.uniform(0.88, 1.14)), round(frames * rng.uniform(0.85, 1.2)))
    mel = F.interpolate(mel[None, None].float(), size, mode="bilinear", align_corners=False)[0]
    mel = F.pad(mel, (0, 0, 0, max(n_mels - size[0], 0)), mode="replicate")[0, :n_mels]
    mel = mel + rng.uniform(-0.2, 0.2) * torch.linspace(-1, 1, n_mels)[:, None]
    mel = torch.maximum(mel, mel.max() - rng.uniform(0.8, 2.0))  # 2.0 is Whisper's own floor, 80 dB
    for _ in range(2):
        height, width = rng.randint(0, 10), rng.randint(0, 14)
        low, start = rng.randint(0, n_mels - height), rng.randint(0, max(size[1] - width, 0))
        mel[low : low + height] = mel.mean()
        mel[:, start : start + width] = mel.mean()
    return mel


class Learner:
    """AdamW over one cycle of the learning rate, with clipped gradients."""

    def __init__(self, parameters: list[nn.Parameter], steps: int, learning_rate: float):
        self.parameters, self.losses = parameters, []
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, steps, pct_start=0.1
        )

    def step(self, loss: torch.Tensor) -> float:
        """One step down; returns the mean of the last 100 losses."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses = [*self.losses[-99:], loss.item()]
        return sum(self.losses) / len(self.losses)


def train_encoder(
    encoder: Encoder, mels: list, texts: list[str], steps: int, learning_rate: float, seed: int
) -> tuple[nn.Linear, list[str]]:
    """Teach the encoder to hear: CTC over the characters of `texts`. Returns the CTC head and these."""
    rng = random.Random(seed)
    characters = sorted(set("".join(texts)))
    labels = [torch.tensor([characters.index(character) + 1 for character in text]) for text in texts]
    head = nn.Linear(encoder.dims.n_audio_state, len(characters) + 1)
    learner = Learner([*encoder.parameters(), *head.parameters()], steps, learning_rate)
    batches = []
    for step in (progress := trange(steps, desc="encoder (CTC)")):
        if not batches:  # of about equal lengths, in another order each epoch
            order = sorted(range(len(mels)), key=lambda i: mels[i].shape[1] * rng.uniform(0.9, 1.1))
            batches = [order[i : i + 32] for i in range(0, len(order), 32)]
            rng.shuffle(batches)
        chosen = batches.pop()
        mel = [disguise(mels[i], rng).T for i in chosen]  # each (frames, n_mels)
        spoken = torch.tensor([len(one) for one in mel])
        if step % 25 == 24:  # now and then Whisper's 30 s window: speech, then silence
            chosen, spoken = chosen[:8], spoken[:8]
            mel = [torch.cat([one, one.min().expand(3000 - len(one), one.shape[1])]) for one in mel[:8]]
        frames = torch.tensor([len(one) for one in mel])
        mel = pad_sequence(mel, batch_first=True).transpose(1, 2)  # (batch, n_mels, frames)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(encoder(mel, frames))  # (batch, encoder_len, characters)
        loss = F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            pad_sequence([labels[i] for i in chosen], batch_first=True),
            encoder_len(spoken),
            torch.tensor([len(labels[i]) for i in chosen]),
            zero_infinity=True,  # a clip too short for its text teaches nothing
        )
        progress.set_postfix(refresh=False, loss=f"{learner.step(loss):.3f}")
    return head, characters


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE: words of the grammar, frequent words of `texts` and the beginnings of Chinese
    characters are one token, and any UTF-8 can be written."""
    bpe = Qwen2Tokenizer().backend_tokenizer
    words = [*grammar.DICTIONARY, *grammar.DICTIONARY.values(), "then"]
    words = [*words, *(" " + word for word in words)] * 50 + [CHAT_TEXT, *grammar.INSTRUCTIONS] * 200
    chinese = [chr(code) for code in range(0x4E00, 0xA000)]  # 64 of them share their first two of three bytes
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=50,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*words, *chinese, *texts], trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def any_text(words: list[str], rng: random.Random) -> str:
    """Something to repeat that no grammar foresees: words in any order, letters, signs, other scripts."""
    kind = rng.random()
    if kind < 0.2:
        return " ".join(rng.choices(words, k=rng.randint(1, 10)))
    if kind < 0.4:
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        return " ".join("".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(rng.randint(1, 6)))
    if kind < 0.5:
        return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 20)))
    if kind < 0.85:
        return "".join(chr(rng.randrange(0x4E00, 0xA000)) for _ in range(rng.randint(1, 20)))
    start = rng.choice([0xA0, 0x370, 0x400, 0x5D0, 0x900, 0xE01, 0x3041, 0xAC00, 0x1F600])
    return "".join(chr(start + rng.randrange(64)) for _ in range(rng.randint(1, 12)))


class Lesson:
    """Draws (transcript as pairs of token ids, instruction, target as token ids) to learn from."""

    def __init__(self, tokenizer: Qwen2Tokenizer, texts: list[str], rng: random.Random):
        self.tokenizer, self.texts, self.rng = tokenizer, texts, rng
        self.words = sorted({word for text in texts for word in text.split()} | set(grammar.SLOT_OF))
        self.letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
        self.cutters = []  # the same tokenizer, merging less and less (BPE dropout), down to spelled words
        for dropout in (None, 0.1, 0.4, 0.8, 1.0):
            cutter = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            cutter.model.dropout = dropout
            self.cutters.append(cutter)

    def cut(self, text: str, most: int) -> list[int]:
        return self.rng.choice(self.cutters[: most + 1]).encode(text, add_special_tokens=False).ids

    def draw(self) -> tuple[list[tuple[int, int]], str, list[int]]:
        kind = self.rng.random()
        if kind < 0.1:
            ids = [self.rng.randrange(3, len(self.tokenizer)) for _ in range(self.rng.randint(1, 30))]
            return self.hear(ids, 0.0), grammar.TRANSCRIBE, ids
        if kind < 0.35:
            text = any_text(self.words, self.rng)
            return self.hear(self.cut(text, 1), 0.0), grammar.TRANSCRIBE, self.cutters[0].encode(text).ids
        text = self.rng.choice(self.texts) if self.rng.random() < 0.5 else grammar.sentence(self.rng)
        tasks = grammar.tasks(text)
        weights = [TASK_WEIGHTS.get(instruction, 0.6) for instruction in tasks]
        [(instruction, target)] = self.rng.choices(list(tasks.items()), weights)
        return self.hear(self.cut(text, 4), 0.03), instruction, self.cutters[0].encode(target).ids

    def hear(self, ids: list[int], errors: float) -> list[tuple[int, int]]:
        """As a projector may give it, one or two tokens to a vector: some missing, wrong, repeated."""
        if self.rng.random() < 0.2:
            return [(i, BLANK) for i in ids]
        repeats, blanks, doubles = (self.rng.uniform(0, most) for most in (0.3, 0.4, 0.6))
        ids = [i for i in ids if self.rng.random() >= errors]
        ids = [self.rng.choice(self.letters) if self.rng.random() < errors else i for i in ids]
        heard = []
        while ids:
            heard.append((ids.pop(0), ids.pop(0) if ids and self.rng.random() < doubles else BLANK))
            while self.rng.random() < repeats:
                heard.append(heard[-1])
            while self.rng.random() < blanks:
                heard.append((BLANK, BLANK))
        return heard


def train_llm(
    llm: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    texts: list[str],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Teach the LLM, by text alone, what big ones can: repeat anything, translate, answer, go on, forgive."""
    rng = random.Random(seed)
    lesson = Lesson(tokenizer, texts, rng)
    prompt = render_prompt(tokenizer)["prompt"]
    before, after = prompt.split(SPEECH_SLOT)
    encode = functools.cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    learner = Learner([*llm.parameters()], steps, learning_rate)
    pool = []
    for _ in (progress := trange(steps, desc="LLM (text)")):
        if not pool:  # batches of about equal lengths
            drawn = [lesson.draw() for _ in range(64 * 16)]
            drawn.sort(key=lambda example: len(example[0]) + len(example[2]))
            pool = [drawn[i : i + 64] for i in range(0, len(drawn), 64)]
            rng.shuffle(pool)
        pairs, speech, labels = [], [], []
        for heard, instruction, target in pool.pop():
            head, tail = encode(before), encode(after.replace(INSTRUCTION_SLOT, instruction))
            target = [*target, tokenizer.eos_token_id]
            text = [(i, BLANK) for i in head], heard, [(i, BLANK) for i in tail + target]
            pairs.append(torch.tensor(sum(text, [])))
            speech.append(F.pad(torch.ones(len(heard)), (len(head), len(tail + target))))
            labels.append(F.pad(torch.tensor(target), (len(head + heard + tail), 0), value=IGNORE))
        pairs = pad_sequence(pairs, batch_first=True)  # (batch, positions, 2)
        speech = pad_sequence(speech, batch_first=True)[..., None]  # (batch, positions, 1)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)

        table = llm.get_input_embeddings()
        embedded = table(pairs.clamp(min=0)) * (pairs != BLANK)[..., None]  # (batch, positions, 2, llm_dim)
        share = 0.5 + 0.5 * torch.rand(len(pairs), 1, 1)  # how loud the second of two is
        noise = 0.6 * torch.rand(len(pairs), 1, 1) * table.weight.detach().square().mean().sqrt()
        embedded = embedded[:, :, 0] + share * embedded[:, :, 1]
        embedded = embedded + noise * speech * torch.randn_like(embedded)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = llm.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != IGNORE
            logits = llm.lm_head(hidden[wanted])  # (targets, vocab)
        loss = F.cross_entropy(logits.float(), labels[:, 1:][wanted])
        progress.set_postfix(refresh=False, loss=f"{learner.step(loss):.3f}")


def new_backbones(texts: list[str]) -> tuple[Encoder, Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Untrained ones, as large as 8 MB of fp16 allow: an encoder of 1.9M parameters and an LLM of 1.9M."""
    tokenizer = make_tokenizer(texts)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Encoder(DIMS), Qwen2ForCausalLM(config), tokenizer


def ship(folder: Path, encoder: Encoder, llm: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Write the backbones small: fp16, without what Whisper computes itself."""
    tensors = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
    del tensors["positional_embedding"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "encoder.safetensors")
    copy.deepcopy(llm).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shipped(folder: Path) -> tuple[Encoder, Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Read what `ship` wrote, as float32."""
    encoder = Encoder(DIMS)
    positions = {"positional_embedding": encoder.positional_embedding}
    encoder.load_state_dict(load_file(folder / "encoder.safetensors") | positions)
    llm = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return encoder, llm, Qwen2Tokenizer.from_pretrained(folder)


def write(folder: Path, encoder: Encoder, llm: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Write whisper.pt, as openai-whisper reads it, and llm/, as transformers does."""
    model = whisper.model.Whisper(DIMS)  # its decoder stays untrained: Ears has no use for it
    model.encoder.load_state_dict(encoder.state_dict())
    nn.init.zeros_(model.decoder.positional_embedding)  # Whisper leaves it as the memory happens to be
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": asdict(DIMS), "model_state_dict": model.state_dict()}, folder / "whisper.pt")
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    print(f"wrote {folder}/whisper.pt and {folder}/llm")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", help="manifest to learn from; without it, the shipped ones are unpacked"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--from_scratch", action="store_true", help="do not start from the shipped backbones")
    parser.add_argument("--encoder_steps", type=int, default=1000)
    parser.add_argument("--llm_steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--ship", type=Path, help="also write them here, in fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = [utterance.record["txt"] for utterance in read_manifest(args.data_path)] if args.data_path else []
    encoder, llm, tokenizer = new_backbones(texts) if args.from_scratch else shipped(SHIPPED)

    if args.data_path:
        mels = read_mels(args.data_path)
        train_encoder(encoder, mels, texts, args.encoder_steps, args.learning_rate, args.seed)
        train_llm(llm, tokenizer, texts, args.llm_steps, args.learning_rate, args.seed)

    if args.ship:
        ship(args.ship, encoder, llm, tokenizer)
    write(args.output_dir, encoder, llm, tokenizer)


if __name__ == "__main__":
    main()
