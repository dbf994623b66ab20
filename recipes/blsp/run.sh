#!/bin/sh
# BLSP in its authors' setting: Whisper small in its 30 s window, a chat LLM of 7B, one epoch in batches of
# 8 x 8 x 12 = 768. They had LibriSpeech, GigaSpeech and Common Voice 2.0, and a Llama 2 7B tuned on Alpaca.
#
#     LLM=meta-llama/Llama-2-7b-chat-hf sh recipes/blsp/run.sh train.jsonl test.jsonl
#
# Not run here. The training took its authors 2.5 days on 8 A100. train.jsonl: all corpora in one manifest, so with
# absolute paths; test.jsonl: as for recognition, and for BLEU with the German translation as `target`.
# Killed, run it again: both steps go on where they were.
set -eu
llm=${LLM:-meta-llama/Llama-2-7b-chat-hf}
out=exp/blsp
mkdir -p $out

if [ ! -e $out/train.jsonl ]; then
  torchrun --standalone --nproc_per_node 8 continuation.py --llm_model_name_or_path $llm --data_path "$1" \
    --result_path $out/train.jsonl --max_new_tokens 64 --batch_size 64
fi
torchrun --standalone --nproc_per_node 8 train.py --llm_model_name_or_path $llm --whisper_model_name_or_path small \
  --data_path $out/train.jsonl --output_dir $out --projector_type blsp --encoder_window 30s --bf16 True \
  --num_train_epochs 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 12 --learning_rate 5e-5 \
  --weight_decay 0.05 --warmup_steps 1000 --dataloader_num_workers 4 --logging_steps 20 --save_steps 200 \
  --save_total_limit 2
torchrun --standalone --nproc_per_node 8 recognize.py --projector_model_path $out --data_path "$2" \
  --result_path $out/german.jsonl --instruction "Please translate the following audio into German text."
python score.py $out/german.jsonl --metric bleu
