"""Early exit against the last exit alone behind a server: throughput and latency for several batch windows.

Both files are served by ``examples/serve_ray.py``, one replica each with one thread, and get the same images from
clients in another process on this machine. Rounds alternate between them; the table has medians over the rounds. It
needs ``pip install 'timm-dfs[deploy,data]' 'ray[serve]'``. Run it from the checkout:

    python benchmarks/serving.py dfs_msdnet_cifar100.joint --exports exports --dataset hfds/uoft-cs/cifar100
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import onnxruntime
import ray
import timm
from exports import export_once
from pages import SERVING, put
from ray import serve

import timm_dfs
from timm_dfs.evaluation.machine import processor
from timm_dfs.export.to_onnx import open_session

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from serve_ray import application, start  # noqa: E402

EARLY, LAST = "early", "last"
LOAD, MEASURED = ("largest batch", "wait, ms", "clients"), ("mean batch", "images/s", "p50, ms", "p95, ms")
COLUMNS = (*LOAD, "exit", *MEASURED, "ratio of speed")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dfs_* name with weights")
    parser.add_argument("--policy", default="accurate", help="preset of the file with early exit")
    parser.add_argument("--exports", type=Path, required=True, help="folder for the exported files, which are kept")
    parser.add_argument("--dataset", required=True, help="hfds/NAME, as in timm's train.py")
    parser.add_argument("--split", default="test")
    parser.add_argument("--input-key", default="img")
    parser.add_argument("--images", type=int, default=256, help="how many different images")
    parser.add_argument("--windows", nargs="+", default=["1:0", "8:0.002", "32:0.02"], help="MAX_BATCH_SIZE:SECONDS")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="requests at a time")
    parser.add_argument("--requests", type=int, default=512, help="in each round, after as many clients' first ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--write", action="store_true", help=f"also put the figures into docs/{SERVING.name}")
    return parser.parse_args()


def main():
    args = arguments()
    model = timm.create_model(args.model, pretrained=True).eval()
    policies = {EARLY: timm_dfs.ExitPolicy.from_preset(model.presets[args.policy]), LAST: None}
    files = {way: export_once(args.exports, model, policy) for way, policy in policies.items()}
    about = {way: open_session(file).get_modelmeta().custom_metadata_map for way, file in files.items()}
    macs = dict(zip(json.loads(about[EARLY]["exits"]), json.loads(about[EARLY]["exit_macs"])))
    macs[LAST] = int(about[LAST]["last_exit_macs"])
    start(port=args.port)
    name = args.dataset.rpartition("/")[2]
    lines = [
        f"`{args.model}`, preset `{args.policy}`, {args.images} images of {name}, {args.split}; "
        f"{processor()}, {os.cpu_count()} cores; onnxruntime {onnxruntime.__version__}, ray {ray.__version__}. "
        f"Medians of {args.rounds} interleaved rounds of {args.requests} requests.\n",
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}",
    ]
    print(*lines, sep="\n", flush=True)
    responses = []
    with tempfile.TemporaryDirectory() as folder:
        save_images(args, Path(folder))
        for window in args.windows:
            size, wait = window.split(":")
            for way, file in files.items():
                app = application(file, max_batch_size=int(size), batch_wait_timeout_s=float(wait))
                serve.run(app, name=way, route_prefix=f"/{way}")
            for clients in args.clients:
                rounds = [one_round(args, folder, clients, turn) for turn in range(args.rounds)]
                lines += rows(int(size), float(wait), clients, rounds)
                print(*lines[-2:], sep="\n", flush=True)
                responses += [response for each in rounds for response in each[EARLY]["responses"]]
    ratio = macs[LAST] / statistics.fmean(macs[response["exit"]] for response in responses)
    lines.append(f"\nThe ratio of multiply-adds is {ratio:.2f}.")
    print(lines[-1])
    if args.write:
        put(SERVING, "serving.py", lines)


def save_images(args, folder):
    """Write the first images of the data set as they are stored, each in a file."""
    data = datasets.load_dataset(args.dataset.removeprefix("hfds/"), split=args.split)
    data = data.select(range(args.images)).cast_column(args.input_key, datasets.Image(decode=False))
    for place, image in enumerate(data[args.input_key]):
        (folder / f"{place:06}.png").write_bytes(image["bytes"])


def one_round(args, folder, clients, turn):
    """The load on both, in an order that alternates; first a request from each client that is not counted."""
    results = {}
    for way in (EARLY, LAST)[:: 1 if turn % 2 else -1]:
        for requests in (clients, args.requests):
            program = [sys.executable, str(ROOT / "benchmarks" / "http_load.py"), f"http://127.0.0.1:{args.port}/{way}"]
            program += [folder, "--clients", str(clients), "--requests", str(requests)]
            results[way] = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    return results


def rows(size, wait, clients, rounds):
    """Table rows of both ways."""
    speed = statistics.median(each[LAST]["seconds"] / each[EARLY]["seconds"] for each in rounds)
    lines = []
    for way, ratio in ((EARLY, f"{speed:.2f}"), (LAST, "")):
        loads = [each[way] for each in rounds]
        cells = [
            statistics.median(statistics.fmean(response["batch"] for response in load["responses"]) for load in loads),
            statistics.median(len(load["latencies"]) / load["seconds"] for load in loads),
            statistics.median(percentile(load, 50) for load in loads),
            statistics.median(percentile(load, 95) for load in loads),
        ]
        row = (size, f"{1000 * wait:g}", clients, way, *(f"{cell:.1f}" for cell in cells), ratio)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return lines


def percentile(load, percent):
    """Percentile of the latencies, in milliseconds."""
    return 1000 * statistics.quantiles(load["latencies"], n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
