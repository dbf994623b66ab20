"""How much faster than the 2024 way is a training step, and which technique brings how much?

    OMP_NUM_THREADS=2 python benchmarks/train.py                          # AISHELL's lengths
    OMP_NUM_THREADS=2 python benchmarks/train.py --lengths librispeech

Random weights, mel and texts, with 3.5 tokens a second. A step is forward, backward and AdamW of the
projector. "2024": 30 s to the encoder, 300 vectors of speech and 512 positions, the LLM's activations
computed again, logits at all positions, random batches. "no ...", "with ...": ours, with one technique
switched off. "cached": ours with the encoder's features at hand, as in later epochs. All arms run in turn,
forwards and backwards, and are compared with the 2024 way of the same round. Peaks hold the weights, and are
of the longest batch of 50. On cuda in bfloat16 as under --bf16: not yet run on one.
"""

import argparse
from statistics import median

import harness
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from whisper.model import AudioEncoder

from dataset import collate
from model import IGNORE, SpeechLLM

WINDOW, POSITIONS = 3000, 512  # of the 2024 way: mel frames, and the LLM's positions
ARMS = {  # what of ours is switched off
    "2024": {"encoder", "positions", "memory", "head", "batches"},
    "ours": set(),
    "no real lengths in the encoder": {"encoder"},
    "no real lengths in the LLM": {"positions"},
    "with checkpointing": {"memory"},
    "no label-only head": {"head"},
    "no batches by length": {"batches"},
    "cached features": {"cache"},
}


class Arm(SpeechLLM):
    """SpeechLLM, as it is where nothing is `off`."""

    def switch(self, off: set[str]) -> None:
        self.off, self.window = off, "30s" if "encoder" in off else "utterance"
        again = "memory" in off
        if again != self.llm.is_gradient_checkpointing:
            self.gradient_checkpointing_enable() if again else self.llm.gradient_checkpointing_disable()
        self.train()

    @torch.no_grad()
    def encode(self, mel, frames):
        if self.off >= {"encoder", "positions"}:  # as openai-whisper does, without a mask
            return AudioEncoder.forward(self.encoder, mel)
        encoded = super().encode(mel, frames)
        return (
            F.pad(encoded, (0, 0, 0, WINDOW // 2 - encoded.shape[1])) if "positions" in self.off else encoded
        )

    def embed(self, input_ids, speech_mask, frames, **speech):
        if "positions" not in self.off:
            return super().embed(input_ids, speech_mask, frames, **speech)
        speech = self.projector(self.encode(speech["mel"], frames), torch.full_like(frames, WINDOW))
        embeddings = self.llm.get_input_embeddings()(input_ids).clone()
        embeddings[speech_mask] = speech.flatten(0, 1).to(embeddings.dtype)
        return embeddings

    def forward(self, labels, **speech_and_text):
        if "head" not in self.off:
            return super().forward(labels, **speech_and_text)
        return self.llm(inputs_embeds=self.embed(**speech_and_text), labels=labels, use_cache=False)


def make_example(model: SpeechLLM, seconds: float, off: set[str], seed: int) -> dict[str, torch.Tensor]:
    """An example as SpeechDataset makes it: noise, and random ids."""
    random, frames = torch.Generator().manual_seed(seed), round(100 * seconds)
    count, vocab_size = round(harness.TOKENS_A_SECOND * seconds) + 1, model.llm.config.vocab_size
    vectors = model.projector.speech_len(WINDOW if "positions" in off else frames)
    prompt, target = (
        harness.BEFORE + vectors + harness.AFTER,
        torch.randint(vocab_size, (count,), generator=random),
    )
    room = POSITIONS - prompt - count if "positions" in off else 0
    mel = torch.randn(model.encoder.dims.n_mels, frames, generator=random)
    around = harness.BEFORE, harness.AFTER + count + room
    return {
        "mel": F.pad(mel, (0, WINDOW - frames)) if "encoder" in off else mel,
        "frames": torch.tensor(frames),
        "input_ids": F.pad(target, (prompt, room)),
        "speech_mask": F.pad(torch.ones(vectors, dtype=torch.bool), around),
        "labels": F.pad(target, (prompt, room), value=IGNORE),
    }


def make_batch(model: Arm, seconds: np.ndarray, off: set[str], device: str) -> dict[str, torch.Tensor]:
    """The same utterances for every arm, if of the same seconds."""
    batch = collate([make_example(model, length, off, int(1e6 * length)) for length in seconds])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if "cache" in off:
        features = [
            SpeechLLM.encode(model, mel[None, :, :length], length[None])[0]
            for mel, length in zip(batch.pop("mel"), batch["frames"])
        ]
        batch["encoded"] = pad_sequence(features, batch_first=True)
    return batch


def make_model(shape: str, device: str) -> tuple[Arm, torch.optim.Optimizer]:
    model = harness.of_shape(Arm, shape, device)
    return model, torch.optim.AdamW(model.projector.parameters())


def train(
    model: Arm, optimizer: torch.optim.Optimizer, batches: list[dict], off: set[str], device: str
) -> None:
    """A step for each batch."""
    model.switch(off)
    for batch in batches:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def longest(shape: str, device: str, off: set[str], seconds: np.ndarray) -> None:
    """Two steps of the longest batch: what takes the most memory."""
    model, optimizer = make_model(shape, device)
    if "cache" in off:  # made elsewhere
        frames, width = np.round(100 * seconds).astype(int), model.encoder.dims.n_audio_state
        batch = make_batch(model, seconds, off - {"cache"}, device)
        del batch["mel"]
        batch["encoded"] = torch.randn(len(seconds), (max(frames) + 1) // 2, width, device=device)
    else:
        batch = make_batch(model, seconds, off, device)
    train(model, optimizer, [batch] * 2, off, device)


def flop(model: SpeechLLM, batch: dict, off: set[str]) -> float:
    """Of a step, padding included."""
    rows, positions = batch["input_ids"].shape
    logits = positions if "head" in off else int((batch["labels"] != IGNORE).any(0).sum())
    vectors, frames = int(batch["speech_mask"].sum(1).max()), 0 if "cache" in off else batch["mel"].shape[-1]
    return rows * harness.step_flop(model, frames, vectors, positions, logits, "memory" in off)


def padding(batch: dict, seconds: np.ndarray, off: set[str]) -> tuple[float, float]:
    """Shares of padding in the encoder and in the LLM."""
    frames = 100 * np.asarray(seconds)
    heard = 0.0 if "cache" in off else 1 - frames.sum() / (len(frames) * batch["mel"].shape[-1])
    needed = harness.BEFORE + frames / 10 + harness.AFTER + harness.TOKENS_A_SECOND * frames / 100 + 1
    return heard, 1 - needed.sum() / batch["input_ids"].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    harness.add_flags(parser, batch_size=8)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS, help="only these, and 2024")
    args = parser.parse_args()
    device, arms = args.device, {arm: ARMS[arm] for arm in ["2024", *args.arms]}
    pool = harness.draw(args.lengths, 50 * args.batch_size)  # as many as LengthSampler sorts at once
    most = np.sort(pool)[-args.batch_size :]
    peaks = {arm: harness.peak(device, longest, args.shape, device, off, most) for arm, off in arms.items()}

    model, optimizer = make_model(args.shape, device)
    random, batches, runs = np.random.default_rng(1), {}, {}
    in_order = harness.by_length(pool, args.batch_size, args.steps)
    for arm, off in arms.items():
        drawn = [in_order] * (args.pairs + 1)
        if "batches" in off:  # others in each round
            drawn = random.choice(len(pool), (len(drawn), args.steps, args.batch_size))
        model.switch(off)
        seconds = [
            [pool[chosen] for chosen in chosens] for chosens in (drawn if "batches" in off else drawn[:1])
        ]
        batches[arm] = [
            [(make_batch(model, lengths, off, device), lengths) for lengths in steps] for steps in seconds
        ]
        turns = iter([[batch for batch, _ in steps] for steps in batches[arm]] * len(drawn))
        runs[arm] = lambda turns=turns, off=off: train(model, optimizer, next(turns), off, device)
    took = harness.rounds(runs, args.pairs, device)

    limit, rows = harness.matrix_peak(device), []
    for arm, off in arms.items():
        ran = [step for steps in batches[arm] for step in steps]
        utterances, share = args.steps * args.batch_size, len(ran) // args.steps
        audio = sum(sum(lengths) for _, lengths in ran) / share
        work = sum(flop(model, batch, off) for batch, _ in ran) / share
        speed = 1 / median(took[arm])
        heard, told = np.mean([padding(*step, off) for step in ran], axis=0).tolist()
        rows.append({
            "arm": arm, "utterances/s": utterances * speed, "hours/hour": audio * speed,
            "times 2024": harness.ratio(took["2024"], took[arm]),
            "padding, encoder": heard, "padding, LLM": told,
            "TFLOP/utterance": work / utterances / 1e12, "share of matrix peak": work * speed / limit,
            "peak MB": peaks[arm] / 1e6, "of 2024's": peaks[arm] / peaks["2024"],
        })  # fmt: skip
    harness.report(args, "Training", limit, rows)


if __name__ == "__main__":
    main()
