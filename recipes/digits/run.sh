#!/bin/sh
# Real connected digits, from the folder of the Free Spoken Digit Dataset to a WER:
#
#     sh recipes/digits/run.sh fsdd
#
# 8 minutes on 2 cores, no GPU: WER 1.94 and 2.15 % on the 200 test strings (2 runs).
set -eu
python=${PYTHON:-.venv/bin/python} # as make demo sets it up
out=exp/digits

$python recipes/digits/prepare.py --fsdd "$1" --output_dir $out
$python demo/make_backbones.py --data_path $out/train.jsonl --output_dir $out
rm -rf $out/asr # or train.py would go on from there
$python train.py --llm_model_name_or_path $out/llm --whisper_model_name_or_path $out/whisper.pt \
  --data_path $out/train.jsonl --output_dir $out/asr --per_device_train_batch_size 16 --max_steps 400 \
  --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 10 --save_strategy no
$python recognize.py --projector_model_path $out/asr/model.safetensors --data_path $out/test.jsonl --result_path $out/asr/result.jsonl
$python score.py --ref $out/test.jsonl --hyp $out/asr/result.jsonl --html $out/asr/report.html
# the same strings as one file of ten minutes, cut into parts of the lengths that were trained on
$python recognize.py --projector_model_path $out/asr/model.safetensors --data_path $out/long.jsonl \
  --part_seconds 4 --result_path $out/asr/result_long.jsonl
$python score.py $out/asr/result_long.jsonl
