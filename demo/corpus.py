"""The demo's speech: sentences of a small grammar, spoken by espeak-ng in many English voices.

    python demo/corpus.py --output_dir exp/demo/data

writes train.jsonl (2,000 utterances in 136 voices, and 200 of silence and noise, whose target is empty),
test.jsonl (240 utterances, 10 voices), noise.jsonl (60 other silences and noises) and wav/ (16 kHz). No test
sentence and no test voice occurs in training. The same command gives the same bytes. 10 seconds on 2 cores.
"""

import argparse
import ctypes
import json
import multiprocessing
import random
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr
from grammar import sentence
from tqdm import tqdm

# Left out: whispering and robots, and f2 f3 f5 Alicia sandro victor, which do not give the same bytes twice.
ACCENTS = "en en-us en-gb-scotland en-gb-x-rp en-us-nyc en-029 en-gb-x-gbclan en-gb-x-gbcwmd".split()
TRAIN_VARIANTS = (
    "adam Alex Andrea anika announcer antonio aunty belinda benjamin boris caleb david Denis Diogo edward "
    "edward2 f1 f4 Gene Gene2 grandma grandpa gustave Henrique Hugo ian iven iven2 iven3 iven4 Jacky john "
    "kaukovalta klatt klatt2 klatt3 klatt5 klatt6 Lee m1 m2 m4 m5 m6 m7 m8 marcelo Marco Mario Michael "
    "michel miguel Mike mike2 Nguyen norbert pablo paul pedro Reed RicishayMax rob robert shelby steph2 "
    "Storm travis Tweaky"
).split()
TEST_VOICES = (
    "en+zac en-us+m3 en-gb-scotland+linda en-us+quincy en-gb-x-rp+Andy en-us+Annie en-gb-x-rp+max "
    "en-us+steph en+ed en-029+klatt4"
).split()


class Espeak:
    """espeak-ng through ctypes: text in, float waveform at 22.05 kHz out."""

    def __init__(self):
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.chunks = []
        samples_type = ctypes.POINTER(ctypes.c_short)
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, samples_type, ctypes.c_int, ctypes.c_void_p)
        self.callback = callback_type(self.receive)  # kept, or it is garbage-collected under espeak's feet
        synchronous = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, not to a loudspeaker
        data_path = espeakng_loader.get_data_path().encode()
        self.sampling_rate = self.library.espeak_Initialize(synchronous, 0, data_path, 0)
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """rate in words per minute, pitch from 0 to 100."""
        self.chunks.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice}")
        self.library.espeak_SetParameter(1, rate, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        encoded = text.encode()
        self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, 1, None, None)  # 1: UTF-8
        self.library.espeak_Synchronize()
        return np.concatenate(self.chunks).astype(np.float32) / 32768


def speak(job: dict) -> dict:
    """One utterance: speak it, cut the silence at its ends to 0.1 s, write the wav, return its record."""
    global espeak
    if "espeak" not in globals():  # once per process
        espeak = Espeak()
    waveform = espeak.speak(job["txt"], job["speaker"], job["rate"], job["pitch"])
    waveform = soxr.resample(waveform, espeak.sampling_rate, 16000)
    waveform *= job["peak"] / max(abs(waveform).max(), 1e-3)
    loud = np.flatnonzero(abs(waveform) > 0.01 * job["peak"])
    waveform = waveform[max(loud[0] - 1600, 0) : loud[-1] + 1600]
    soundfile.write(job["folder"] / f"wav/{job['key']}.wav", waveform, 16000, subtype="PCM_16")
    record = {"wav": f"wav/{job['key']}.wav", "txt": job["txt"], "key": job["key"]}
    return {**record, "duration": round(len(waveform) / 16000, 3), "speaker": job["speaker"]}


def noise(rng: np.random.Generator) -> np.ndarray:
    """0.2 to 6 s of silence, or of noise of any colour that comes and goes, hummed over or not, at 16 kHz."""
    samples = int(16000 * 0.2 * 30 ** rng.random())
    if rng.random() < 0.1:
        return np.zeros(samples)
    frequencies = np.fft.rfftfreq(samples, 1 / 16000).clip(20)
    spectrum = np.fft.rfft(rng.standard_normal(samples)) / frequencies ** rng.uniform(0, 1)
    for _ in range(rng.integers(4)):  # what a mouth or a room lets through best
        centre, width = 100 * 70 ** rng.random(), rng.uniform(0.05, 0.5)
        spectrum *= 1 + rng.uniform(0, 20) * np.exp(-(np.log(frequencies / centre) ** 2) / width)
    waveform = np.fft.irfft(spectrum, samples)
    knots = rng.uniform(-rng.uniform(0, 4), 0, 2 + samples // 1600)  # a breath, a step, a click
    waveform *= np.exp(np.interp(np.linspace(0, 1, samples), np.linspace(0, 1, len(knots)), knots))
    waveform /= abs(waveform).max()
    if rng.random() < 0.3:
        harmonics = rng.choice([50, 60]) * np.arange(1, 8)[:, None] * np.arange(samples) / 16000
        waveform += (rng.uniform(0, 0.3, (7, 1)) * np.sin(2 * np.pi * harmonics)).sum(0)
    return waveform / abs(waveform).max() * 10 ** rng.uniform(-4, -0.5)


def write_noises(folder: Path, split: str, count: int, seed: int) -> list[dict]:
    records = []
    for i in range(count):
        waveform, wav = noise(np.random.default_rng((seed, i))), f"wav/{split}{seed}-noise-{i:03d}.wav"
        soundfile.write(folder / wav, waveform, 16000, subtype="PCM_16")
        records.append({"wav": wav, "txt": "", "target": "", "duration": round(len(waveform) / 16000, 3)})
    return records


def jobs(folder: Path, split: str, count: int, seed: int) -> list[dict]:
    """What is to be said, by whom and how; drawn here, so that it does not matter which process speaks it."""
    rng = random.Random(f"{split} {seed}")
    texts = {}
    while len(texts) < count:
        texts[sentence(rng, test=split == "test")] = None
    # Each training variant speaks with two of the accents, so that neither can be told from the other.
    train_voices = [f"{ACCENTS[(i + j) % 8]}+{name}" for i, name in enumerate(TRAIN_VARIANTS) for j in (0, 3)]
    voices = TEST_VOICES if split == "test" else train_voices
    return [
        {"key": f"{split}{seed}-{i:05d}", "txt": text, "speaker": voices[i % len(voices)], "folder": folder}
        | {"rate": rng.randint(135, 180), "pitch": rng.randint(25, 75), "peak": rng.uniform(0.1, 0.9)}
        for i, text in enumerate(texts)
    ]


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("exp/demo/data"))
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_test", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0, help="of the training sentences")
    args = parser.parse_args()

    (args.output_dir / "wav").mkdir(parents=True, exist_ok=True)
    # espeak-ng carries some state from one utterance to the next; a fresh process for every 32 fixes which.
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        for split, count, seed in [("train", args.num_train, args.seed), ("test", args.num_test, 0)]:
            todo = jobs(args.output_dir, split, count, seed)
            records = list(tqdm(pool.imap(speak, todo, chunksize=32), total=count, desc=f"speaking {split}"))
            noises = write_noises(
                args.output_dir, split, *((150, 1 + args.seed) if split == "train" else (60, 0))
            )
            write(args.output_dir / f"{split}.jsonl", records + (noises if split == "train" else []))
            write(args.output_dir / "noise.jsonl", noises)  # those of the test stay
            hours = sum(record["duration"] for record in records) / 3600
            voices = len({record.get("speaker") for record in records} - {None})
            print(f"{split}.jsonl: {len(records)} utterances, {hours:.2f} h, {voices} voices")


if __name__ == "__main__":
    main()
