#!/usr/bin/env bash
# One table at equal kept bytes: DMS, DMC, fewer KV heads, both together, and the methods that need no training.
#
#   studies/time-axis.sh MODEL TRAIN VALID OUT [TOKENS] [DEVICE]
#
# MODEL: SmolLM2-135M or a model like it. TRAIN: text files to train on, separated by commas. VALID: texts to measure on,
# likewise. Every command goes on where it stopped, so this script can be stopped at any time and started again.
# The trained rows all see TOKENS tokens (262144 unless told otherwise) of the same text in the same order and are distilled from
# MODEL; a frozen base with an adapter, and weights distilled from themselves, are their own control. What was trained at 4x is
# shown at 2x and 3x with its gates shifted (`kvfold calibrate`), which trains nothing.
# Merged heads start from the published mean, at two learning rates, and from heads that were fitted.
set -euo pipefail

model=$1 out=$4 tokens=${5:-262144} device=${6:-cpu}
IFS=, read -r -a train <<<"$2"
IFS=, read -r -a valid <<<"$3"

data=() texts=() calibration=()
for file in "${train[@]}"; do data+=(--data "$file") calibration+=(--calibration "$file"); done
for file in "${valid[@]}"; do texts+=(--text "$file"); done
# What MODEL says of each sequence is worked out once.
common=("${data[@]}" --tokens "$tokens" --device "$device" --set teacher_states="$out/teacher" --set micro_batch_size=2 --set save_steps=10)
mkdir -p "$out"

kvfold retrofit "$model" "$out/dms-4x" --recipe smollm2-dms-cpu "${common[@]}"
kvfold retrofit "$model" "$out/dms-4x-cold" --recipe smollm2-dms-cpu --no-warm-start --set ramp_steps=48 --set tail_steps=16 \
  "${common[@]}"
# DMC came out better with steps of one sequence than with steps of four and as many tokens; what it is held against gets the same.
small=(--set global_batch_size=1 --set micro_batch_size=1)
kvfold retrofit "$model" "$out/dmc-4x" --recipe smollm2-dmc-lora-cpu --compression 4 "${common[@]}" "${small[@]}"

[ -d "$out/gqa" ] || kvfold convert "$model" "$out/gqa" --heads 1 --device "$device"
[ -d "$out/gqa-fitted" ] ||
  kvfold convert "$model" "$out/gqa-fitted" --heads 1 --init fitted "${calibration[@]}" --tokens 24k --device "$device"
lora=(--lora 64 --kl reverse --teacher "$model" --set learning_rate_schedule=cosine "${common[@]}")
for rate in 3e-4 2e-3; do
  kvfold retrofit "$out/gqa" "$out/gqa-3x-lr$rate" "${lora[@]}" --learning-rate $rate
done
kvfold retrofit "$out/gqa-fitted" "$out/gqa-fitted-3x" "${lora[@]}" "${small[@]}" --learning-rate 1e-3
kvfold retrofit "$out/gqa-fitted" "$out/gqa-fitted-dms-4x" --time dms:128 --compression 1.3333 --warm-start "${lora[@]}" \
  "${small[@]}" --learning-rate 1e-3

for method in dms dmc; do
  for compression in 2 3; do
    [ -d "$out/$method-${compression}x" ] ||
      kvfold calibrate "$model" "$out/$method-4x" "$out/$method-${compression}x" --compression $compression \
        "${data[@]}" --device "$device"
  done
done

rows=()
for name in dms-2x dms-3x dms-4x dms-4x-cold dmc-2x dmc-3x dmc-4x; do rows+=(--compare "$out/$name"); done
# Of the two rates the one that did better, by its card.
rows+=(--compare "$out/gqa,$out/gqa-3x-lr2e-3")
for name in gqa-fitted-3x gqa-fitted-dms-4x; do rows+=(--compare "$out/gqa-fitted,$out/$name"); done
times=()
for kept in 512 341 256; do
  times+=(--time "window:$((kept - 4))+4" --time "h2o:$((kept / 2))+$((kept - kept / 2))" --time "tova:$kept")
done
lengths=(--passkey --passkey-length 512 --passkey-length 1024 --passkey-length 2048)
kvfold eval "$model" "${texts[@]}" "${times[@]}" "${rows[@]}" "${lengths[@]}" --device "$device" --out "$out/results/time-axis.json"
