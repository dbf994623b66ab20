"""Trains the projector between a frozen Whisper encoder and a frozen LLM, with the Trainer of transformers.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
      --whisper_model_name_or_path tiny --data_path train.jsonl --bf16 True --output_dir exp/asr \
      --per_device_train_batch_size 8 --learning_rate 3e-4 --deepspeed ds_config_zero3.json

Plain `python train.py ...` does as well. The loss falls, stays on a plateau while the LLM does not hear yet,
and drops. --output_dir gets model.safetensors (the projector) and config.json. Run again, it resumes.
"""

import functools
import gc
import glob
import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from dataset import LengthSampler, SpeechDataset, collate, load_tokenizer, read_manifest, render_prompt
from model import SpeechLLM, fingerprint, load_encoder, load_llm, save_projector


@dataclass
class ModelArguments:
    llm_model_name_or_path: str = HfArg(help="Causal LLM of transformers: hub name or folder.")
    whisper_model_name_or_path: str = HfArg(help="openai-whisper model: name (tiny, large-v3) or file.")
    projector_type: str = HfArg(default="conv1d", help="conv1d is West's.")
    projector_stride: int = HfArg(default=5, help="Encoder vectors (50 a second) per speech vector.")
    projector_hidden_dim: int = HfArg(default=2048, help="Width between the two Linears of conv1d.")
    encoder_window: Literal["utterance", "30s"] = HfArg(default="utterance", help="What Whisper is given.")


@dataclass
class DataArguments:
    data_path: str = HfArg(help="Manifest to train on (jsonl: wav, txt).")
    eval_data_path: str | None = HfArg(default=None, help="Manifest for the loss at each --eval_strategy.")
    model_max_length: int = HfArg(default=512, help="Most positions (prompt, speech, target) of an example.")


@dataclass
class TrainArguments(TrainingArguments):
    """Those of transformers, West's names for two of them, and other defaults."""

    eval_strategy: str = HfArg(default="no", aliases="--evaluation_strategy", help="no, steps or epoch.")
    warmup_steps: float = HfArg(default=0, aliases="--warmup_ratio", help="Steps, or if below 1 their share.")
    remove_unused_columns: bool = HfArg(default=False, help="Stays False: all of a batch is used.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide NaN losses.")

    def __post_init__(self):
        if not torch.accelerator.is_available():  # else --bf16 is refused
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()


class ProjectorTrainer(Trainer):
    """The Trainer over batches by length, with checkpoints that hold no frozen weight."""

    def _get_train_sampler(self, train_dataset: SpeechDataset | None = None) -> LengthSampler:
        step = self.args.train_batch_size * self.args.world_size  # all ranks have like lengths in a step
        return LengthSampler(train_dataset or self.train_dataset, step, self.args.seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the projector, whole and in float32 under DeepSpeed too, and its config. For all ranks."""
        state_dict = self.model.state_dict()
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            named = self.model.projector.named_parameters()
            state_dict = {name: safe_get_full_fp32_param(parameter) for name, parameter in named}
        if self.args.should_save:
            save_projector(output_dir or self.args.output_dir, state_dict, self.projector_config)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # transformers leaves frozen weights out for PEFT models only
            save = functools.partial(type(self.deepspeed).save_checkpoint, self.deepspeed)
            self.deepspeed.save_checkpoint = functools.partial(save, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)


def newest_checkpoint(output_dir: str) -> str | None:
    """The complete checkpoint of most steps; trainer_state.json is what the Trainer writes last."""
    states = glob.glob(os.path.join(glob.escape(output_dir), "checkpoint-*", "trainer_state.json"))
    complete = [path for path in map(os.path.dirname, states) if path.split("-")[-1].isdigit()]
    return max(complete, key=lambda path: int(path.split("-")[-1]), default=None)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    if args.deepspeed and args.use_cpu:  # accelerate does so on GPUs; ZeRO-3 shards the LLM while it loads
        import deepspeed

        deepspeed.init_distributed("gloo")

    encoder = load_encoder(model_args.whisper_model_name_or_path)
    llm = load_llm(model_args.llm_model_name_or_path)
    tokenizer = load_tokenizer(model_args.llm_model_name_or_path)
    config = {**vars(model_args), **fingerprint(encoder, llm), **render_prompt(tokenizer)}
    model = SpeechLLM(encoder, llm, config)

    def examples(path: str) -> SpeechDataset:
        dataset = SpeechDataset(read_manifest(path), tokenizer, config, model.projector.speech_len)
        dataset.check_positions(data_args.model_max_length)
        return dataset

    trainer = ProjectorTrainer(
        model=model,
        args=args,
        train_dataset=examples(data_args.data_path),
        eval_dataset=examples(data_args.eval_data_path) if data_args.eval_data_path else None,
        data_collator=collate,
    )
    trainer.projector_config = config
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or newest_checkpoint(args.output_dir))
    trainer.save_model()
    trainer.save_state()

    if torch.distributed.is_initialized():  # else two processes abort at exit in about 1 run of 4
        del trainer, model, llm
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
