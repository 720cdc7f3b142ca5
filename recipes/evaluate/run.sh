#!/bin/bash
# Base and tuned model on benchmarks: bash run.sh [BASE [MERGED [TASK:SHOTS ...]]]
set -euo pipefail
base=${1:-teknium/OpenHermes-2.5-Mistral-7B} merged=${2:-dpo_run/merged} tasks=("${@:3}")
if [ $# -lt 3 ]; then
  tasks=(arc_challenge:25 hellaswag:10 mmlu:5 truthfulqa_mc2:0 winogrande:5 gsm8k:5)
fi
for model in "$base" "$merged"; do
  for task in "${tasks[@]}"; do
    lm_eval --model hf --model_args "pretrained=$model,tokenizer=$merged,dtype=float16" \
      --tasks "${task%:*}" --num_fewshot "${task##*:}" --batch_size auto --output_path "$(dirname "$merged")/evaluation"
  done
done
