#!/usr/bin/env bash
# What sharing layers costs a trained model: 27, 25, 20 and 15 owners of 30, fitted, then distilled; and 25 owners made one group at
# a time, with training between.
#
#   studies/cla-curve.sh MODEL TRAIN VALID OUT [TOKENS] [FITTING] [PRECISION] [POINTS]
#
# MODEL: SmolLM2-135M. TRAIN: text files to fit and train on, separated by commas; VALID: texts to measure on. TOKENS (262144) are
# trained on, FITTING (102400) are fitted on, each by itself. Groups are the cheapest by the costs in
# results/runs/chosen-layers-trial-costs.json. Weights learn at 5e-5, falling to zero along a cosine; what is kept is their moving
# average. Every command goes on where it stopped. PRECISION: `bfloat16` saves time on a CPU that multiplies it by itself.
# POINTS: some of the four numbers of owners, as in "27 25"; 25 owners by groups come with all of them.
set -euo pipefail

model=$1 out=$4 tokens=${5:-262144} fitting=${6:-102400} precision=${7:-auto} points=${8:-27 25 20 15}
IFS=, read -r -a train <<<"$2"
IFS=, read -r -a valid <<<"$3"
data=() calibration=() texts=()
for file in "${train[@]}"; do data+=(--data "$file") calibration+=(--calibration "$file"); done
for file in "${valid[@]}"; do texts+=(--text "$file"); done
mkdir -p "$out"

head=0_1_2_3_4
tail29=25_25_27_28_29 tail=25_25_27_28_28
declare -A layers=(
  [27]=${head}_5_6_7_7_9_10_11_12_13_14_15_16_17_18_19_20_21_22_23_24_$tail
  [25]=${head}_5_5_7_7_9_9_11_12_13_14_15_16_17_18_19_20_21_22_23_24_$tail
  [20]=${head}_5_5_7_7_9_9_11_12_12_14_15_15_17_17_19_20_21_21_23_24_25_25_25_28_28
  [15]=0_1_2_3_4_4_4_4_8_8_10_10_12_12_14_14_16_16_18_18_18_21_21_23_23_25_25_25_28_28
)
convert() { # name, source, layers, tokens
  [ -d "$out/$1" ] || kvfold convert "$2" "$out/$1" --layers "$3" --init fitted "${calibration[@]}" --tokens "$4" --dtype float32
}
uptrain() { # name, source, tokens
  [ -e "$out/$1/config.json" ] || kvfold retrofit "$2" "$out/$1" --tokens "$3" "${data[@]}" --full --kl forward --teacher "$model" \
    --learning-rate 5e-5 --set learning_rate_schedule=cosine --set final_learning_rate=0 --set warmup_steps=5 --set beta2=0.99 \
    --set weight_average=0.98 --set global_batch_size=1 --set save_steps=32 --set "mixed_precision=$precision" \
    --set teacher_states="$out/teacher"
}
measure() { # name, checkpoints; a file for each point, so that they may come from several days
  local rows=() one
  for one in "${@:2}"; do rows+=(--compare "$out/$one"); done
  kvfold eval "$model" "${texts[@]}" --windows 16 --time full "${rows[@]}" --passkey --passkey-length 1024 --out "$out/curve-$1.json"
}
for owners in $points; do
  convert "fitted-$owners" "$model" "${layers[$owners]}" "$fitting"
  uptrain "distilled-$owners" "$out/fitted-$owners" "$tokens"
  measure "$owners" "fitted-$owners" "distilled-$owners"
done
[ "$points" = "27 25 20 15" ] || exit 0

# One group at a time, the cheapest first; in all as many tokens.
last=$model
middle=11_12_13_14_15_16_17_18_19_20_21_22_23_24
steps=("${head}_5_6_7_8_9_10_${middle}_$tail29" "${head}_5_6_7_8_9_10_${middle}_$tail" "${head}_5_6_7_7_9_10_${middle}_$tail"
  "${head}_5_5_7_7_9_10_${middle}_$tail" "${layers[25]}")
for index in 0 1 2 3 4; do
  part=$((tokens / 5 / 1024 * 1024))
  convert "one-fitted-$((29 - index))" "$last" "${steps[$index]}" $((fitting / 5))
  uptrain "one-distilled-$((29 - index))" "$out/one-fitted-$((29 - index))" $part
  last=$out/one-distilled-$((29 - index))
done
measure one-by-one one-distilled-25
