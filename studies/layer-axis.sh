#!/usr/bin/env bash
# A trained model turned into CLA2: what it starts from, and what uptraining makes of it; then DMS on top of the best.
#
#   studies/layer-axis.sh MODEL TRAIN VALID OUT [TOKENS] [BEST_TOKENS] [DEVICE]
#
# MODEL: SmolLM2-135M or a model like it. TRAIN: text files to fit and train on, separated by commas. VALID: texts to measure
# on, likewise. The three inits are uptrained on TOKENS tokens each (262144 unless told otherwise), `fitted` once more on
# BEST_TOKENS (1048576); all weights, distilled from MODEL. Every command goes on where it stopped.
# MODEL distilled from itself does not change: it is its own control.
set -euo pipefail

model=$1 out=$4 tokens=${5:-262144} best=${6:-1048576} device=${7:-cpu}
IFS=, read -r -a train <<<"$2"
IFS=, read -r -a valid <<<"$3"
data=() texts=() calibration=()
for file in "${train[@]}"; do data+=(--data "$file") calibration+=(--calibration "$file"); done
for file in "${valid[@]}"; do texts+=(--text "$file"); done
mkdir -p "$out"

for init in drop mean fitted; do
  [ "$init" = fitted ] && more=("${calibration[@]}" --tokens 24k) || more=()
  [ -d "$out/cla2-$init" ] ||
    kvfold convert "$model" "$out/cla2-$init" --layers cla2 --init "$init" "${more[@]}" --device "$device"
done
kvfold eval "$model" "${texts[@]}" --time full --beside "$out/cla2-drop" --beside "$out/cla2-mean" \
  --beside "$out/cla2-fitted" --passkey --device "$device" --out "$out/results/cla2-start.json"

# What MODEL says of each sequence is worked out once.
full=(--full --kl forward --teacher "$model" --set teacher_states="$out/teacher" --set sequences_at_once=4 --learning-rate 2e-4 --set learning_rate_schedule=cosine --set warmup_steps=5
  "${data[@]}" --device "$device")
rows=()
for init in drop mean fitted; do
  kvfold retrofit "$out/cla2-$init" "$out/$init-$tokens" "${full[@]}" --tokens "$tokens"
  rows+=(--beside "$out/$init-$tokens")
done
kvfold retrofit "$out/cla2-fitted" "$out/fitted-$best" "${full[@]}" --tokens "$best"
# Without the original to distil from: the next token's loss.
kvfold retrofit "$out/cla2-fitted" "$out/fitted-lm-$tokens" --full --kl none --learning-rate 2e-4 \
  --set learning_rate_schedule=cosine --set warmup_steps=5 "${data[@]}" --device "$device" --tokens "$tokens"
# Layers x time: a DMS adapter on the uptrained model.
kvfold retrofit "$out/fitted-$best" "$out/cla2-dms-2x" --recipe smollm2-dms-cpu --compression 2 "${data[@]}" \
  --tokens "$tokens" --device "$device"

rows+=(--beside "$out/fitted-$best" --beside "$out/fitted-lm-$tokens" --beside "$out/fitted-$best,$out/cla2-dms-2x")
kvfold eval "$model" "${texts[@]}" --time full "${rows[@]}" --passkey --device "$device" --out "$out/results/layer-axis.json"
