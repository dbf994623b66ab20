"""Trains the projector between a frozen Whisper encoder and a frozen LLM, with the Trainer of transformers.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
      --whisper_model_name_or_path tiny --data_path train.jsonl --bf16 True --output_dir exp/asr \
      --per_device_train_batch_size 8 --learning_rate 3e-4 --deepspeed ds_config_zero3.json

Plain `python train.py ...` does as well, or `python train.py config.yaml`, a file of flags and values. The
loss falls, stays on a plateau while the LLM does not hear yet, and drops. --output_dir gets model.safetensors
(the projector) and config.json. Run again, it resumes.
"""

import gc
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from dataset import SpeechDataset, collate, load_tokenizer, render_prompt
from encoder import load_encoder
from errors import refusing
from features import FeatureCache
from manifest import MAX_SECONDS, read_manifest
from model import SpeechLLM, fingerprint, load_llm
from sampler import by_seconds
from trainer import ProjectorTrainer, Watch, newest_checkpoint, probe


@dataclass
class ModelArguments:
    _argument_group_name = "model"
    llm_model_name_or_path: str = HfArg(help="Causal LLM of transformers: hub name or folder.")
    whisper_model_name_or_path: str = HfArg(help="openai-whisper model: name (tiny, large-v3) or file.")
    projector_type: str = HfArg(default="conv1d", help="conv1d (West) or blsp.")
    projector_stride: int = HfArg(default=5, help="Encoder vectors (50 a second) per speech vector.")
    projector_hidden_dim: int = HfArg(default=2048, help="Width between the two Linears of conv1d.")
    lora_rank: int = HfArg(default=0, help="Rank of LoRA in the LLM; 0: none, all of it stays frozen.")
    encoder_window: Literal["utterance", "30s"] = HfArg(default="utterance", help="What Whisper is given.")


@dataclass
class DataArguments:
    _argument_group_name = "data"
    data_path: str = HfArg(help="Manifest to train on (jsonl: wav, txt).")
    eval_data_path: str | None = HfArg(default=None, help="Manifest for the loss at each --eval_strategy.")
    eval_utterances: int = HfArg(default=100, help="How many of those are decoded too, for WER and CER.")
    feature_cache: str | None = HfArg(default=None, help="Folder for what the encoder hears, computed once.")
    model_max_length: int = HfArg(default=512, help="Most positions (prompt, speech, target) of an example.")
    max_batch_seconds: float | None = HfArg(default=None, help="Batches of this much audio, with padding.")
    max_bad_audio: float = HfArg(default=0.01, help="Stop if more of the utterances than this share are bad.")


@dataclass
class TrainArguments(TrainingArguments):
    _argument_group_name = "training, as the Trainer of transformers does it"
    """Those of transformers, West's names for two of them, and other defaults."""

    eval_strategy: str = HfArg(default="no", aliases="--evaluation_strategy", help="no, steps or epoch.")
    warmup_steps: float = HfArg(default=0, aliases="--warmup_ratio", help="Steps, or if below 1 their share.")
    remove_unused_columns: bool = HfArg(default=False, help="Stays False: all of a batch is used.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide NaN losses.")

    def __post_init__(self):
        if not torch.accelerator.is_available():  # else --bf16 is refused
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        device = super().device  # of a second rank on a CPU, cpu:0, which torch.load does not know
        return torch.device("cpu") if device.type == "cpu" else device


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments))
    argv = sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):  # flags; those behind it prevail
        with refusing(argv[0], OSError, ValueError, AttributeError, yaml.YAMLError), open(argv[0]) as file:
            argv = [f"--{name}={value}" for name, value in yaml.safe_load(file).items()] + argv[1:]
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    if args.deepspeed and args.use_cpu:  # accelerate does so on GPUs; ZeRO-3 shards the LLM while it loads
        import deepspeed

        deepspeed.init_distributed("gloo")

    encoder = load_encoder(model_args.whisper_model_name_or_path)
    llm = load_llm(model_args.llm_model_name_or_path)
    tokenizer = load_tokenizer(model_args.llm_model_name_or_path)
    config = {**vars(model_args), **fingerprint(encoder, llm), **render_prompt(tokenizer)}
    model = SpeechLLM(encoder, llm, config)

    if args.should_save:
        probe(args.output_dir, 12 * sum(map(torch.numel, model.state_dict().values())))  # with Adam's two
    left_out, cache = [], None
    if data_args.feature_cache:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        cache = FeatureCache(data_args.feature_cache, encoder, model_args.encoder_window, dtype)

    if data_args.max_batch_seconds:
        args.per_device_train_batch_size = 1  # list of indices, which is a batch

    def examples(path: str) -> SpeechDataset:
        with args.main_process_first():
            utterances = read_manifest(path)
        fits = utterances.seconds <= MAX_SECONDS
        left_out.extend(f"{path}:{line + 1}" for line in np.flatnonzero(~fits))
        utterances, most = utterances if fits.all() else utterances.keep(fits), data_args.model_max_length
        dataset = SpeechDataset(utterances, tokenizer, config, model.projector.speech_len, most)
        dataset.check_positions()
        if cache:
            most = data_args.max_batch_seconds or MAX_SECONDS * args.per_device_train_batch_size
            mine = by_seconds(utterances.seconds, most)[args.process_index :: args.world_size]
            cache.fill(model, dataset, mine, args.dataloader_num_workers, args.device)
        return dataset

    trainer = ProjectorTrainer(
        model=model,
        args=args,
        train_dataset=examples(data_args.data_path),
        eval_dataset=examples(data_args.eval_data_path) if data_args.eval_data_path else None,
        data_collator=collate,
    )
    trainer.projector_config, trainer.data_args = config, data_args
    trainer.watch = watch = Watch(trainer, data_args.max_bad_audio)
    trainer.add_callback(watch)
    checkpoint = args.resume_from_checkpoint or newest_checkpoint(args.output_dir)
    signal.signal(signal.SIGTERM, watch.on_sigterm)  # threads of gloo and OpenMP, begun before, get it too
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as the loader's workers, which inherit that
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:  # where that failed, Python would wait for ever for the loader's workers, deaf to SIGTERM too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    terminated = watch.terminated and trainer.state.global_step < trainer.state.max_steps
    if not terminated:
        trainer.save_model()
        trainer.save_state()
    if args.should_log:
        print(f"left out, over {MAX_SECONDS} s: {len(left_out)}", *left_out, sep="\n")
        print(f"replaced by the next utterance: {len(watch.bad)}", *watch.bad, sep="\n")
        if terminated:
            print(f"SIGTERM: saved at step {trainer.state.global_step}; the same command goes on from there")

    if torch.distributed.is_initialized():  # else two processes abort at exit in about 1 run of 4
        del trainer, watch, model, llm
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if terminated:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
