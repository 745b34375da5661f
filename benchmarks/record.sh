#!/usr/bin/env bash
# Run a recipe and keep its figures in a folder next to this file.
#   benchmarks/record.sh demo --recipe scenes
#   RUN=HEADS benchmarks/record.sh heads --recipe heads --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
#   benchmarks/record.sh lit --recipe benchmarks/lit/arguments.yaml --dataset FLICKR8K --model_name_or_path HEADS/export
# The run's folder is deleted, unless RUN names one. Features of frozen towers are computed again, so that the time is
# that of a first run. Only drawn scenes are kept as pictures: photographs belong to their owners.
set -euo pipefail
name=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run=${RUN:-$scratch/run}
facts=$(PYTHONPATH=$here/.. "$python" "$here/machine.py")  # before the run: its files change the checkout
start=$(date +%s.%N)
"$python" "$here/../train_miniclip.py" "$@" --output_dir "$run" --feature_cache_dir "$scratch/features"
end=$(date +%s.%N)
mkdir -p "$here/$name"
cp "$run/metrics.jsonl" "$run/curves.png" "$here/$name/"
# Paths of this machine are left out; the rest is compared with the recipe by the tests.
awk '/^[a-z]/ {path = /^(dataset|vision_model|text_model|model_name_or_path|output_dir|feature_cache_dir):/} !path' \
    "$run/arguments.yaml" > "$here/$name/arguments.yaml"
if [ "$name" = demo ]; then cp "$run/retrieval.png" "$here/$name/"; fi
echo "{\"seconds\": $(echo "$end - $start" | bc), ${facts#\{}" > "$here/$name/time.json"
