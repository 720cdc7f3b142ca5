#!/bin/bash
# Base and tuned model on benchmarks: bash run.sh [MERGED [TASK:SHOTS ...]]
# The base is the one that MERGED was made of, at the commit it had then; BASE=FOLDER names one that was a local folder.
set -euo pipefail
merged=${1:-dpo_run/merged} tasks=("${@:2}")
if [ $# -lt 2 ]; then
  tasks=(ifeval:0 arc_challenge:25 hellaswag:10 mmlu:5 truthfulqa_mc2:0 winogrande:5 gsm8k:5)
fi
made_of='import json, sys; made = json.load(open(sys.argv[1]))["parameters"]; print(made["base_model"], made["base_revision"])'
read -r base revision < <(python -c "$made_of" "$merged/run.json")
for model in "pretrained=${BASE:-$base},revision=$revision" "pretrained=$merged"; do
  for task in "${tasks[@]}"; do
    lm_eval --model hf --model_args "$model,tokenizer=$merged,dtype=float16" --apply_chat_template \
      --tasks "${task%:*}" --num_fewshot "${task##*:}" --batch_size auto --output_path "$(dirname "$merged")/evaluation"
  done
done
