#!/usr/bin/env bash
# CLA's design space in miniature: heads x layers from scratch, learning rates tuned for the models that decide.
#
#   studies/design-space.sh TRAIN VALID OUT [JOBS] [DEVICE]
#
# TRAIN and VALID: text files, separated by commas. JOBS models are trained at a time (2), a thread each. A model takes a
# quarter of an hour on one core; all of them about five hours on two. Every run goes on where it stopped, and one that
# is done is left alone, so this script can be stopped and started at any time.
# Figures: OUT/results/*.json, a file a run, of which `kvfold report` makes the page OUT/design-space.html.
set -euo pipefail

out=$3 jobs=${4:-2} device=${5:-cpu}
IFS=, read -r -a train <<<"$1"
IFS=, read -r -a valid <<<"$2"
data=() 
for file in "${train[@]}"; do data+=(--data "$file"); done
for file in "${valid[@]}"; do data+=(--valid "$file"); done
export OMP_NUM_THREADS=1
mkdir -p "$out"

headline=(mini-h128-mqa mini-h128-mqa-cla2 mini-h64-mqa)
rates=(1e-3 1.5e-3 2.25e-3 3.375e-3 5.0625e-3)
others=(
  mini-h128-mha mini-h128-gqa4 mini-h128-gqa2 mini-h512-mqa-cla2 mini-h256-mqa-cla2 mini-h64-mqa-cla2 mini-h256-gqa4-cla2
  mini-h128-gqa4-cla2 mini-h128-gqa2-cla2 mini-h128-mqa-cla3 mini-h128-mqa-cla4 mini-h128-mqa-cla2-keep-ends
  mini-h128-mqa-cla2-dense-front mini-h128-mqa-cla2-dense-back mini-h128-gqa8 mini-h128-mha-cla2 mini-h128-mqa-4-layers
  mini-h128-mqa-4-layers-wide
)

# Lines of "recipe rate seed", `jobs` at a time.
train_all() {
  xargs -P "$jobs" -L 1 bash -c '
    out=$1 device=$2 recipe=${@: -3:1} rate=${@: -2:1} seed=${@: -1}
    data=("${@:3:$#-5}")
    # One that diverges is told of, and the others go on.
    kvfold train "$recipe" --learning-rate "$rate" --seed "$seed" "${data[@]}" --device "$device" \
      --out "$out/$recipe-lr$rate-seed$seed" >/dev/null || echo "$recipe at $rate, seed $seed: came to nothing" >&2
  ' train "$out" "$device" "${data[@]}"
}

# The learning rate at which a recipe's first seed did best.
best_rate() {
  for rate in "${rates[@]}"; do
    found=$out/$1-lr$rate-seed0/results/pretraining.json
    [ ! -f "$found" ] ||
      python -c 'import json, sys; print(json.load(open(sys.argv[1]))["rows"][0]["validation_perplexity"], sys.argv[2])' \
        "$found" "$rate"
  done | sort -g | head -1 | cut -d" " -f2
}

for recipe in "${headline[@]}"; do for rate in "${rates[@]}"; do echo "$recipe $rate 0"; done; done | train_all
for recipe in "${headline[@]}"; do for seed in 1 2; do echo "$recipe $(best_rate "$recipe") $seed"; done; done | train_all
# A row takes the best rate of its family: with shared layers, or without.
for recipe in "${others[@]}"; do
  case $recipe in *cla*) like=mini-h128-mqa-cla2 ;; *) like=mini-h128-mqa ;; esac
  echo "$recipe $(best_rate "$like") 0"
done | train_all

mkdir -p "$out/results"
for run in "$out"/*/results/pretraining.json; do
  cp "$run" "$out/results/$(basename "$(dirname "$(dirname "$run")")").json"
done
kvfold report "$out/results" --out "$out/design-space.html"
