#!/usr/bin/env bash
# What the calls of a loan do on the machine that is lent; gpu_plan.md says in which order.
#
#   loan.sh keep FOLDER              keep what was carried: pieces of the data, wheels, states and records of runs
#   loan.sh start RECIPE WORD...     unpack the data, take up the states that were carried, train; WORDs as run.py's
#   loan.sh wait SECONDS RECIPE [RUN...]
#                                    wait until training ends, or dies, or the seconds are over; then say what the log
#                                    ends with, and put the states of those runs (all) and all records into $OUT
#
# RECIPE is a file of benchmarks/gpu/recipes without its ending. Everything is kept in $WORK, by default ~/w.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
work=${WORK:-$HOME/w}
python=${PYTHON:-python3}
shopt -s nullglob

keep() {
    local wheels=("$1"/*.whl) files=("$1"/images-* "$1"/*-last.* "$1"/records*.tar)
    mkdir -p "$work/pieces"
    [ ${#wheels[@]} -eq 0 ] || "$python" -m pip install -q --no-index --no-deps --target "$work/site" "${wheels[@]}"
    [ ${#files[@]} -eq 0 ] || cp "${files[@]}" "$work/pieces"
}

start() {
    local recipe=$1 runs=$work/runs/$1 run pieces
    shift
    # A copy, because the next call replaces the checkout under a training that goes on.
    if [ "$checkout" != "$work/repo" ]; then
        rm -rf "$work/repo"
        cp -r "$checkout" "$work/repo"
    fi
    cd "$work/repo/benchmarks/gpu"
    [ -d "$work/data" ] || "$python" pack.py unpack "$work/pieces" --out "$work/data"
    mkdir -p "$runs"
    if [ ! -e "$runs/log" ]; then # the first start here
        [ ! -e "$work/pieces/records.tar" ] || tar -xf "$work/pieces/records.tar" -C "$runs"
        for pieces in "$work/pieces"/*-last.00-of-*; do
            run=$(basename "${pieces%-last.*}")
            "$python" state.py join "$work/pieces/$run"-last.* --to "$runs/$run/last.pth.tar"
        done
    fi
    # In a session of its own, which the end of the call does not end.
    setsid "$python" run.py -c "recipes/$recipe.yaml" --data "$work/data" --output "$runs" "$@" \
        >>"$runs/log" 2>&1 </dev/null &
    echo $! >"$runs/pid"
}

wait_for() {
    local end=$((SECONDS + $1)) runs=$work/runs/$2 run splits=()
    shift 2
    while training "$(cat "$runs/pid")" && [ "$SECONDS" -lt "$end" ]; do sleep 1; done
    tail -n 5 "$runs/log" | cut -c 1-250
    cd "$runs"
    tar -cf "$OUT/records.tar" log */args.yaml */exits.jsonl */summary.csv
    [ $# -gt 0 ] || set -- */last.pth.tar
    for run in "$@"; do
        "$python" "$work/repo/benchmarks/gpu/state.py" split "${run%%/*}/last.pth.tar" --out "$OUT" --half &
        splits+=($!)
    done
    for run in "${splits[@]}"; do wait "$run"; done
}

training() { grep -qs '^State:.[^Z]' "/proc/$1/status"; } # what has died unnoticed by its parent is there, as Z

export PYTHONPATH="$work/repo:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
case ${1:-} in
    keep) keep "$2" ;;
    start) start "${@:2}" ;;
    wait) wait_for "${@:2}" ;;
    *) sed -n '2,/^set/{/^#/p}' "$0"; exit 2 ;;
esac
