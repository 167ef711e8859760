#!/usr/bin/env bash
# gpu_plan.md from beginning to end with a tiny network on any machine: pack, carry, compare ways, train, be
# interrupted, bring the state out, carry it to another machine, go on, end, bring it home, ship; and a training that dies.
#
#   benchmarks/gpu/check_plan.sh cifar100/*.parquet
set -euo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$(dirname "$1")" && pwd)
export PYTHON=${PYTHON:-python} HF_HUB_OFFLINE=1
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# A checkout whose recipes are small.
home=$temporary/home
mkdir -p "$home/benchmarks"
cp -r "$kit" "$home/benchmarks"
cp -r "$kit/../../recipes" "$kit/../../timm_dfs" "$home"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - "$home"/benchmarks/gpu/recipes/*.yaml <<'PYTHON'
import sys
from pathlib import Path

import yaml

network = dict(exits=3, base=2, step=1, stem_width=4, growth_rate=4, head_width=8, beta=0.5)
small = dict(device="cpu", amp=False, batch_size=100, workers=2, epochs=3, val_interval=1)
small |= dict(train_split="train[:300]", val_split="test[:100]", model_kwargs=network)
for file in map(Path, sys.argv[1:]):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | small))
PYTHON
runs=(--run joint beta=joint --run dfs beta=0.5)

on() { # a call on a machine: its name, the words of loan.sh
    mkdir -p "$temporary/$1/out"
    OUT=$temporary/$1/out WORK=$temporary/$1 "$home/benchmarks/gpu/loan.sh" "${@:2}"
}

echo "== pack, carry in two calls"
"$PYTHON" "$kit/pack.py" pack "$@" --out "$temporary/carried" --pieces 2
for piece in 0 1; do
    mkdir "$temporary/carried/$piece"
    mv "$temporary/carried"/images-$piece-of-2* "$temporary/carried/$piece"
    on first keep "$temporary/carried/$piece"
done

for recipe in autoaugment plain randaugment; do
    echo "== $recipe: train, be interrupted, bring the state out"
    on first start "$recipe" "${runs[@]}" --minutes 0
    on first wait 300 "$recipe"
    mkdir -p "$temporary/carried/$recipe"
    mv "$temporary"/first/out/* "$temporary/carried/$recipe"
    ls -1 "$temporary/carried/$recipe"

    echo "== $recipe: go on elsewhere, end, bring it home"
    rm -rf "$temporary/second"
    for piece in 0 1 "$recipe"; do on second keep "$temporary/carried/$piece"; done
    on second start "$recipe" "${runs[@]}"
    on second wait 300 "$recipe"
    mkdir -p "$home/runs/$recipe"
    tar -xf "$temporary/second/out/records.tar" -C "$home/runs/$recipe"
    for run in joint dfs; do
        "$PYTHON" "$kit/state.py" join "$temporary/second/out/$run"-last.* --to "$home/runs/$recipe/$run/last.pth.tar"
        echo "a machine" >"$home/runs/$recipe/$run/hardware.txt"
    done
    [ "$(wc -l <"$home/runs/$recipe/dfs/exits.jsonl")" -eq 3 ]
done

echo "== compare ways"
"$PYTHON" "$kit/speed.py" -c "$home/benchmarks/gpu/recipes/autoaugment.yaml" --data "$temporary/second/data" "${runs[@]}" \
    --output "$temporary/speed.jsonl"

echo "== a training that dies does not keep the call waiting"
on second start plain --run other beta=2
began=$SECONDS
on second wait 300 plain 2>/dev/null | grep "beta is 2"
[ $((SECONDS - began)) -lt 120 ]

echo "== ship; evaluation shows the same accuracy as the run's own, above"
tail -n 1 "$home/runs/autoaugment/joint/exits.jsonl"
"$PYTHON" -m timm_dfs eval "$home/runs/autoaugment/joint/last.pth.tar" --dataset "hfds/$data" --split 'test[:100]' --json
(
    cd "$kit" # a checkout with a commit
    "$PYTHON" "$home/recipes/ship.py" "$home/runs/autoaugment/joint" --recipe "$home/benchmarks/gpu/recipes/autoaugment.yaml" \
        --tag joint --held-out 'test[:100]' --test 'test[100:200]' --budgets 2e6 --dataset "hfds/$data"
)
ls "$home/hub"/*
echo "The plan runs from beginning to end."
