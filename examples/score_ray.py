"""Predict the classes of all images in a folder with an exported graph, in parallel, by Ray Data.

pip install onnxruntime pillow 'ray[data]'
python examples/score_ray.py exported/model.onnx photographs --output predictions
"""

import argparse
from pathlib import Path

import numpy as np
import ray
from exported_graph import ExportedGraph


class Scorer:
    """One process with the network; Ray Data keeps it for all its batches."""

    def __init__(self, file):
        self.graph = ExportedGraph(file)

    def __call__(self, batch):
        names, exits = self.graph.predict(np.stack(list(map(self.read, batch["path"], batch["bytes"]))))
        return dict(path=batch["path"], label=np.array(names), exit=exits)

    def read(self, path, content):
        try:
            return self.graph.prepare(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def score(file, folder, replicas, batch_size):
    """Data set with the columns path, label and exit, computed when it is read or written."""
    files = ray.data.read_binary_files(
        str(Path(folder).resolve()), include_paths=True, file_extensions=["png", "jpg", "jpeg", "webp", "bmp"]
    )
    return files.map_batches(
        Scorer,
        fn_constructor_args=[str(Path(file).resolve())],
        batch_size=batch_size,  # large: no caller waits for a single image, and batches shrink inside the graph
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=replicas),
        num_cpus=1,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="model.onnx of timm-dfs export")
    parser.add_argument("folder", help="images, also in subfolders")
    parser.add_argument("--output", required=True, help="folder for the CSV files")
    parser.add_argument("--replicas", type=int, default=2, help="at most")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--cpus", type=int, help="cores that Ray may plan with; by default all")
    args = parser.parse_args()
    code = dict(working_dir=str(Path(__file__).parent))
    ray.init(num_cpus=args.cpus, include_dashboard=False, object_store_memory=256 * 2**20, runtime_env=code)
    score(args.file, args.folder, args.replicas, args.batch_size).write_csv(str(Path(args.output).resolve()))
