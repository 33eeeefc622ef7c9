#!/usr/bin/env bash
# CLA's design space in miniature: heads x layers from scratch, learning rates tuned for the models that decide.
#
#   studies/design-space.sh TRAIN VALID OUT [JOBS] [DEVICE]
#
# TRAIN and VALID: text files, separated by commas. JOBS models are trained at a time (2), a thread each. A model takes
# six to fifteen minutes on one core; all of them two to six hours on two. Every run goes on where it stopped, and one that
# is done is left alone, so this script can be stopped and started at any time. Five rates are tried for each model that
# decides, and higher ones as long as the highest is the best.
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
rates=(0.001 0.0015 0.00225 0.003375 0.0050625)
others=(
  mini-h128-mha mini-h128-gqa4 mini-h128-gqa2 mini-h512-mqa-cla2 mini-h256-mqa-cla2 mini-h64-mqa-cla2 mini-h256-gqa4-cla2
  mini-h128-gqa4-cla2 mini-h128-gqa2-cla2 mini-h128-mqa-cla3 mini-h128-mqa-cla4 mini-h128-mqa-cla2-keep-ends
  mini-h128-mqa-cla2-dense-front mini-h128-mqa-cla2-dense-back mini-h128-gqa8 mini-h128-mha-cla2 mini-h128-mqa-4-layers
  mini-h128-mqa-4-layers-wide mini-h128-mqa-sandwich
)
# Where few layers share, at equal bytes: which ones should? With two seeds, at the rate of their family.
layouts=(mini-h128-mqa-cla2-dense-front mini-h128-mqa-cla2-dense-back mini-h128-mqa-sandwich)

# Lines of "recipe rate seed", `jobs` at a time.
train_all() {
  xargs -r -P "$jobs" -L 1 bash -c '
    out=$1 device=$2 recipe=${@: -3:1} rate=${@: -2:1} seed=${@: -1}
    data=("${@:3:$#-5}") run=$out/$recipe-lr$rate-seed$seed
    [ ! -f "$run.diverged" ] || exit 0
    kvfold train "$recipe" --learning-rate "$rate" --seed "$seed" "${data[@]}" --device "$device" --out "$run" \
      >/dev/null 2>"$run.log" && exit 0
    # One that diverges is noted, and the others go on; whatever else goes wrong ends it all.
    grep -q "lower learning rate" "$run.log" || { tail -3 "$run.log" >&2; exit 255; }
    touch "$run.diverged"
  ' train "$out" "$device" "${data[@]}"
}

# Of the learning rates at which a recipe was tried with the first seed: the best, or with `highest` the highest.
rate_of() {
  python - "$out" "$1" "$2" <<'PYTHON'
import json, pathlib, sys
out, which, recipe = sys.argv[1:]
tried = {}
for run in pathlib.Path(out).glob(f"{recipe}-lr*-seed0*"):
    rate = float(run.name.removeprefix(f"{recipe}-lr").removesuffix(".log").removesuffix(".diverged").removesuffix("-seed0"))
    result = run / "results" / "pretraining.json"
    if result.is_file():
        tried[rate] = json.loads(result.read_text())["rows"][0]["validation_perplexity"]
    else:
        tried.setdefault(rate, float("inf"))
print(f"{max(tried) if which == 'highest' else min(tried, key=tried.get):g}")
PYTHON
}

for recipe in "${headline[@]}"; do for rate in "${rates[@]}"; do echo "$recipe $rate 0"; done; done | train_all
for _ in 1 2 3; do
  for recipe in "${headline[@]}"; do
    highest=$(rate_of highest "$recipe")
    [ "$(rate_of best "$recipe")" != "$highest" ] ||
      python -c 'import sys; print(sys.argv[1], f"{1.5 * float(sys.argv[2]):g}", 0)' "$recipe" "$highest"
  done | train_all
done
for recipe in "${headline[@]}"; do for seed in 1 2 3 4; do echo "$recipe $(rate_of best "$recipe") $seed"; done; done | train_all
# A row takes the best rate of its family: with shared layers, or without.
others_lines() {
  for recipe in "${others[@]}"; do
    case $recipe in *cla* | *sandwich) like=mini-h128-mqa-cla2 ;; *) like=mini-h128-mqa ;; esac
    echo "$recipe $(rate_of best "$like") 0"
  done
}
others_lines | train_all
for recipe in "${layouts[@]}"; do echo "$recipe $(rate_of best mini-h128-mqa-cla2) 1"; done | train_all

mkdir -p "$out/results"
for run in "$out"/*/results/pretraining.json; do
  cp "$run" "$out/results/$(basename "$(dirname "$(dirname "$run")")").json"
done
# Each model beside MQA on the same windows, and whether it finds passkeys, which models so small are not expected to.
texts=() rows=()
for file in "${valid[@]}"; do texts+=(--text "$file"); done
for recipe in mini-h128-mqa-cla2 mini-h64-mqa; do rows+=(--compare "$out/$recipe-lr$(rate_of best "$recipe")-seed0"); done
while read -r recipe rate seed; do rows+=(--compare "$out/$recipe-lr$rate-seed$seed"); done < <(others_lines)
mqa=$out/mini-h128-mqa-lr$(rate_of best mini-h128-mqa)-seed0
kvfold eval "$mqa" "${texts[@]}" --context 512 --time full "${rows[@]}" --passkey --passkey-length 256 \
  --device "$device" --out "$out/results/beside-mqa.json"
# How much of what differs a model so small uses at all: how far back it looks, and what dropped layers cost it untrained.
for layers in cla2 cla4; do
  [ -d "$out/dropped-$layers" ] || kvfold convert "$mqa" "$out/dropped-$layers" --layers $layers --init drop --device "$device"
done
kvfold eval "$mqa" "${texts[@]}" --context 512 --time full --time window:60+4 --time window:12+4 --time window:3+1 \
  --compare "$out/dropped-cla2" --compare "$out/dropped-cla4" --device "$device" --out "$out/mini-reach.json"
kvfold report "$out/results" --out "$out/design-space.html"
