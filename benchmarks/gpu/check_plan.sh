#!/usr/bin/env bash
# gpu_plan.md from beginning to end with a tiny network on any machine: pack, carry, unpack, compare ways, train, be
# interrupted, bring the state out, carry it to another machine, go on, end, evaluate.
#
#   benchmarks/gpu/check_plan.sh cifar100/*.parquet
set -euo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$kit/../..${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tiny="exits=3 base=2 step=1 stem_width=4 growth_rate=4 head_width=8"
small="device=cpu amp=False batch_size=100 workers=2 epochs=2 val_interval=1 train_split='train[:300]' val_split='test[:100]'"
runs="--run joint $tiny beta=joint --run dfs $tiny beta=0.5"

echo "== pack, carry in two calls, unpack"
"$python" "$kit/pack.py" pack "$@" --out "$work/data" --pieces 2
mkdir "$work/pieces"
cp "$work"/data/*-0-of-2* "$work/pieces"
cp "$work"/data/*-1-of-2* "$work/pieces"
"$python" "$kit/pack.py" unpack "$work/pieces" --out "$work/cifar100"

echo "== compare ways"
recipe="$kit/recipes/autoaugment.yaml"
# shellcheck disable=SC2086
"$python" "$kit/speed.py" -c "$recipe" --data "$work/cifar100" --set $small $runs --output "$work/speed.jsonl"

for recipe in autoaugment plain randaugment; do
    echo "== $recipe: train, be interrupted"
    train="$python $kit/run.py -c $kit/recipes/$recipe.yaml --data $work/cifar100 --set $small $runs"
    $train --minutes 0 --output "$work/first/$recipe" 2>"$work/log" || { cat "$work/log"; exit 1; }
    echo "== $recipe: bring the state out, go on elsewhere, end"
    for run in joint dfs; do
        "$python" "$kit/state.py" split "$work/first/$recipe/$run/last.pth.tar" --out "$work/out/$recipe" --half
        "$python" "$kit/state.py" join "$work/out/$recipe/$run"-last.* --to "$work/second/$recipe/$run/last.pth.tar"
    done
    $train --output "$work/second/$recipe" 2>"$work/log" || { cat "$work/log"; exit 1; }
    tail -n 1 "$work/second/$recipe/dfs/exits.jsonl"
done

echo "== evaluate: the same accuracy as the run's own, above"
data=$(cd "$(dirname "$1")" && pwd)
tail -n 1 "$work/second/plain/dfs/exits.jsonl"
"$python" -m timm_dfs.cli eval "$work/second/plain/dfs/last.pth.tar" --dataset "hfds/$data" --split 'test[:100]' --json
echo "The plan runs from beginning to end."
