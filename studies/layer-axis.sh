#!/usr/bin/env bash
# A trained model turned into CLA2, or into one whose sharing layers are chosen: what it starts from, and what uptraining makes
# of it; then DMS on top of the best.
#
#   studies/layer-axis.sh MODEL TRAIN VALID OUT [TOKENS] [BEST_TOKENS] [TASKS] [DEVICE] [PRECISION]
#
# MODEL: SmolLM2-135M or a model like it. TRAIN: text files to fit and train on, separated by commas. VALID: texts to measure
# on, TASKS: tasks or files of questions, likewise. PRECISION: `bfloat16` saves time on a CPU that multiplies it by itself.
# The three inits are uptrained on TOKENS tokens each (262144 unless told otherwise), distilled from MODEL and by the next
# token's loss alone; all weights, at one learning rate. The best is distilled on fewer and on BEST_TOKENS (1048576) as well.
# Beside them `chosen`: as many owners as CLA2 has, those that cost least, fitted. What weights were fitted on
# counts among their tokens. Every command goes on where it stopped, so some may be run by hand, two at a time.
# MODEL distilled from itself does not change: it is its own control. Trained by the next token's loss it does: `control-lm`.
# Beside them, at the same bytes: DMS on the unconverted MODEL, windows, and H2O.
set -euo pipefail

model=$1 out=$4 tokens=${5:-262144} best=${6:-1048576} tasks=${7:-} device=${8:-cpu} precision=${9:-auto}
fitting=24576
IFS=, read -r -a train <<<"$2"
IFS=, read -r -a valid <<<"$3"
data=() texts=() calibration=()
for file in "${train[@]}"; do data+=(--data "$file") calibration+=(--calibration "$file"); done
for file in "${valid[@]}"; do texts+=(--text "$file"); done
mkdir -p "$out"

convert() { # name, layers, init, further options
  [ -d "$out/$1" ] || kvfold convert "$model" "$out/$1" --layers "$2" --init "$3" "${@:4}" --device "$device"
}
fit=("${calibration[@]}" --tokens $fitting)
half=$(python -c 'import sys, kvfold; print((kvfold.plan(sys.argv[1]).layout.num_layers + 1) // 2)' "$model")
convert cla2-drop cla2 drop
convert cla2-mean cla2 mean
convert cla2-fitted cla2 fitted "${fit[@]}"
convert chosen-fitted "best:$half" fitted "${fit[@]}"
kvfold eval "$model" "${texts[@]}" --time full --compare "$out/cla2-drop" --compare "$out/cla2-mean" \
  --compare "$out/cla2-fitted" --compare "$out/chosen-fitted" --passkey --device "$device" --out "$out/results/cla2-start.json"

common=("${data[@]}" --device "$device" --full --learning-rate 5e-5 --set learning_rate_schedule=cosine --set warmup_steps=5
  --set global_batch_size=1 --set save_steps=50 --set "mixed_precision=$precision")
# What MODEL says of each sequence is worked out once.
distilled=(--kl forward --teacher "$model" --set teacher_states="$out/teacher")
rows=(--compare "$out/cla2-drop" --compare "$out/cla2-mean" --compare "$out/cla2-fitted" --compare "$out/chosen-fitted")
uptrain() { # name, source, tokens, further options
  kvfold retrofit "$2" "$out/$1" --tokens "$3" "${common[@]}" "${@:4}"
  rows+=(--compare "$out/$1")
}
uptrain chosen-fitted-distilled "$out/chosen-fitted" $((tokens - fitting)) "${distilled[@]}"
for init in fitted mean drop; do
  [ $init = fitted ] && seen=$((tokens - fitting)) || seen=$tokens
  uptrain "cla2-$init-distilled" "$out/cla2-$init" $seen "${distilled[@]}"
  uptrain "cla2-$init-lm" "$out/cla2-$init" $seen --kl none
done
uptrain control-lm "$model" "$tokens" --kl none
uptrain cla2-fitted-distilled-short "$out/cla2-fitted" $((tokens * 3 / 16)) "${distilled[@]}"
uptrain cla2-fitted-distilled-best "$out/cla2-fitted" $((best - fitting)) "${distilled[@]}"

# Layers x time: a DMS adapter on the uptrained model, and each of the two alone.
dms=(--recipe smollm2-dms-cpu --compression 2 "${data[@]}" --tokens $((tokens / 2)) --device "$device" --set "mixed_precision=$precision")
kvfold retrofit "$out/cla2-fitted-distilled-best" "$out/cla2-dms-2x" "${dms[@]}"
alone=dms-2x-$((tokens / 2000))k
kvfold retrofit "$model" "$out/$alone" "${dms[@]}"
rows+=(--compare "$out/$alone" --compare "$out/cla2-fitted-distilled-best,$out/cla2-dms-2x")

kvfold eval "$model" "${texts[@]}" --time window:508+4 --time window:252+4 --time h2o:128+128 "${rows[@]}" --passkey \
  ${tasks:+--tasks "$tasks" --limit 100} --device "$device" --out "$out/results/layer-axis.json"
