#!/usr/bin/env bash
# One model for many layouts: a small one is trained on while its layers draw, step by step, whether they share, and is then
# measured under several layouts, beside models that were trained as long for one layout each.
#
#   studies/drawn-layers.sh MODEL TRAIN VALID OUT [TOKENS] [DEVICE]
#
# MODEL: whose layers don't share, as `kvfold train mini-h128-mqa` makes it. TRAIN, VALID: text files, separated by commas.
# Every run goes on where it stopped. Figures: OUT/results/drawn-layers.json.
set -euo pipefail

model=$1 out=$4 tokens=${5:-524288} device=${6:-cpu}
IFS=, read -r -a train <<<"$2"
IFS=, read -r -a valid <<<"$3"
data=() texts=() rows=()
for file in "${train[@]}"; do data+=(--data "$file"); done
for file in "${valid[@]}"; do texts+=(--text "$file"); done
mkdir -p "$out"

retrofit() { # source, name, further options
  kvfold retrofit "$1" "$out/$2" --full --kl none --tokens "$tokens" "${data[@]}" --device "$device" --learning-rate 1e-3 \
    --set learning_rate_schedule=cosine --set warmup_steps=8 --set seq_len=512 --set global_batch_size=8 \
    --set micro_batch_size=8 "${@:3}"
}
convert() { # source, name, layers
  [ -d "$out/$2" ] || kvfold convert "$1" "$out/$2" --layers "$3" --init drop --device "$device"
  rows+=(--compare "$out/$2")
}
retrofit "$model" plain
retrofit "$model" drawn --set drawn_layers=cla4
rows+=(--compare "$out/drawn")
for layers in cla2 cla4; do
  convert "$out/drawn" "drawn-$layers" $layers
  convert "$out/plain" "plain-$layers" $layers
  convert "$model" "start-$layers" $layers
  retrofit "$out/start-$layers" "trained-$layers"
  rows+=(--compare "$out/trained-$layers")
done
kvfold eval "$out/plain" "${texts[@]}" --context 512 --time full "${rows[@]}" --device "$device" --out "$out/results/drawn-layers.json"
