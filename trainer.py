"""The Trainer of transformers, made fit for a week alone: its checkpoints, and what ends it on all ranks."""

import functools
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from dataset import SpeechDataset
from errors import Refused, refusing
from evaluation import evaluate_hearing, in_words
from model import save_projector
from plot import plot
from sampler import LengthSampler, SecondsSampler


class Watch(TrainerCallback):
    """What one rank meets, all know before the optimizer's next step, so that they go on or stop as one."""

    def __init__(self, trainer: Trainer, max_bad_audio: float):
        self.trainer, self.max_bad_audio = trainer, max_bad_audio
        self.signalled = self.terminated = False
        self.met = []  # of each batch since the last step: where its utterances stand, faults, loss

    def on_sigterm(self, *_) -> None:
        self.signalled = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.bad = [entry["bad_audio"] for entry in state.log_history if "bad_audio" in entry]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, step, total = self.trainer, state.global_step + 1, len(self.trainer.train_dataset)
        if trainer.is_deepspeed_enabled:
            norm = trainer.deepspeed.get_global_grad_norm()
        else:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in trainer.model.parameters() if p.requires_grad]
            )
        terminated = self.signalled or signal.SIGTERM in signal.sigpending()
        finite = math.isfinite(norm)
        met = [(where, faults, loss.isfinite().item()) for where, faults, loss in self.met]
        ranks = gather_object([(terminated, finite, met)])  # takes 1 ms
        met, self.met = [batch for _, _, batches in ranks for batch in batches], []

        for fault in sorted({fault for _, faults, _ in met for fault in faults} - set(self.bad)):
            self.bad.append(fault)
            trainer.log({"bad_audio": fault})  # what is logged is in the checkpoints too
        if len(self.bad) > self.max_bad_audio * total:
            if state.is_world_process_zero:
                print(*self.bad, sep="\n", flush=True)
            over = f"more than --max_bad_audio {self.max_bad_audio}"
            raise Refused(f"step {step}: {len(self.bad)} of {total} utterances are bad, {over}: see above")
        if not all(finite and all(good for *_, good in batches) for _, finite, batches in ranks):
            lost = [batch for batch in met if not batch[2]] or met
            given = ", ".join(place for where, *_ in lost for place in where)
            raise Refused(f"step {step}: NaN or infinity in loss or gradient; not saved; given {given}")
        if any(terminated for terminated, *_ in ranks):
            self.terminated = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            try:
                plot(state.log_history, os.path.join(args.output_dir, "loss.png"))
            except OSError as error:  # a full disk is for what matters more to complain about
                print(f"no loss.png: {error}", flush=True)

    on_train_end = on_save


class ProjectorTrainer(Trainer):
    """The Trainer over batches by length, with checkpoints that hold no frozen weight."""

    frames = padded = waited = 0  # since the last log: mel frames, the same with padding, seconds
    since = math.inf

    def _get_train_sampler(self, train_dataset: SpeechDataset | None = None) -> torch.utils.data.Sampler:
        dataset, args = train_dataset or self.train_dataset, self.args
        if self.data_args.max_batch_seconds:
            return SecondsSampler(dataset, self.data_args.max_batch_seconds, args.seed)
        step = args.train_batch_size * args.world_size  # all ranks have like lengths in a step
        return LengthSampler(dataset, step, args.seed)

    def get_batch_samples(self, *args, **kwargs):
        start = time.monotonic()
        samples = super().get_batch_samples(*args, **kwargs)
        self.waited += time.monotonic() - start
        self.since = min(self.since, start)
        return samples

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss, frames = super().compute_loss(model, inputs, *args, **kwargs), inputs["frames"]
        if model.training:
            self.watch.met.append((inputs["where"], sum(inputs["faults"], []), loss.detach()))
            longest = inputs["mel"].shape[-1] if "mel" in inputs else frames.max()
            self.frames, self.padded = self.frames + frames.sum(), self.padded + len(frames) * longest
        return loss

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Adds this rank's speed, what of its speech was padding, what of its time it waited for data."""
        if "loss" in logs:
            took = time.monotonic() - self.since
            logs["times_real_time"] = round(float(self.frames) / 100 / took, 1)
            logs["padding"] = round(1 - float(self.frames / self.padded), 4)
            logs["data_wait"] = round(self.waited / took, 4)
            self.frames = self.padded = self.waited = 0
            self.since = math.inf
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """The loss of all; of --eval_utterances error rates too, and what others' audio does to the loss."""
        metrics, dataset = super().evaluate(eval_dataset, *args, **kwargs), eval_dataset or self.eval_dataset
        sizes = self.data_args.eval_utterances, self.args.per_device_eval_batch_size
        if hearing := evaluate_hearing(self.model, dataset, *sizes):
            self.log(hearing)
            if self.args.should_log:
                print(in_words(hearing), flush=True)
        return metrics | hearing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the projector, whole and in float32 under DeepSpeed too, and its config. For all ranks."""
        state_dict = self.model.state_dict()
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            named = self.model.state_dict(keep_vars=True)
            state_dict = {name: safe_get_full_fp32_param(parameter) for name, parameter in named.items()}
        if self.args.should_save:
            save_projector(output_dir or self.args.output_dir, state_dict, self.projector_config)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save and os.path.exists(state := os.path.join(folder, "trainer_state.json")):
            os.remove(state)  # of another run; what has one is complete
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.args.output_dir).free / 1e6  # torch does not say that it was full
            raise Refused(
                f"{folder}: not saved, what was saved stays; {free:.0f} MB are free; {error}"
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # transformers leaves frozen weights out for PEFT models only
            save = functools.partial(type(self.deepspeed).save_checkpoint, self.deepspeed)
            self.deepspeed.save_checkpoint = functools.partial(save, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what comes last, trainer_state.json, makes it complete


def newest_checkpoint(output_dir: str) -> str | None:
    """The complete checkpoint of most steps: trainer_state.json is what the Trainer writes last."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name))
    for folder in (os.path.join(output_dir, f"checkpoint-{step}") for step in reversed(steps)):
        try:
            with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
            return folder
        except (OSError, ValueError):
            print(f"{folder}: not complete, passed over", flush=True)
    return None


def probe(output_dir: str, size: int) -> None:
    """Raises Refused unless a checkpoint of `size` bytes can be written."""
    with refusing(f"--output_dir {output_dir}: no checkpoint of {size / 1e6:.1f} MB can be saved", OSError):
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(bytes(size))
