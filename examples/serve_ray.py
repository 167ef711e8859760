"""Serve an exported graph over HTTP: Ray Serve gathers requests into batches and starts replicas as load grows.

pip install onnxruntime pillow 'ray[serve]'
python examples/serve_ray.py exported/model.onnx
curl --data-binary @image.png http://127.0.0.1:8000/
"""

import argparse
import asyncio
from pathlib import Path

import numpy as np
import ray
from exported_graph import ExportedGraph
from ray import serve
from starlette.responses import JSONResponse


@serve.deployment
class Classifier:
    def __init__(self, file):
        self.graph = ExportedGraph(file)

    def reconfigure(self, window):
        """Set the batch window; Ray Serve calls it at the start and whenever ``user_config`` changes."""
        self.predict.set_max_batch_size(window["max_batch_size"])
        self.predict.set_batch_wait_timeout_s(window["batch_wait_timeout_s"])

    @serve.batch
    async def predict(self, images):
        names, exits = await asyncio.to_thread(self.graph.predict, np.stack(images))  # meanwhile, requests are read
        return [dict(label=name, exit=int(k), batch=len(images)) for name, k in zip(names, exits)]

    async def __call__(self, request):
        try:
            image = self.graph.prepare(await request.body())
        except ValueError as error:  # before it joins a batch, which would fail as a whole
            return JSONResponse(dict(error=str(error)), 400)
        return await self.predict(image)


def application(file, replicas=1, max_batch_size=16, batch_wait_timeout_s=0.002):
    """The application, with one core for each replica; replicas are added when each has more requests than a batch."""
    return Classifier.options(
        ray_actor_options=dict(num_cpus=1),
        autoscaling_config=dict(min_replicas=1, max_replicas=replicas, target_ongoing_requests=max_batch_size),
        max_ongoing_requests=max(64, 2 * max_batch_size),  # Ray's default of 5 would bound the batch, too
        user_config=dict(max_batch_size=max_batch_size, batch_wait_timeout_s=batch_wait_timeout_s),
    ).bind(str(Path(file).resolve()))


def start(cpus=None, port=8000):
    """Ray on this machine, and Ray Serve listening on the loopback interface."""
    code = dict(working_dir=str(Path(__file__).parent))
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env=code)
    serve.start(http_options=dict(host="127.0.0.1", port=port))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="model.onnx of timm-dfs export")
    parser.add_argument("--replicas", type=int, default=2, help="at most")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--batch-wait-timeout-s", type=float, default=0.002)
    parser.add_argument("--cpus", type=int, help="cores that Ray may plan with; by default all")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    start(args.cpus, args.port)
    window = args.max_batch_size, args.batch_wait_timeout_s
    serve.run(application(args.file, args.replicas, *window), blocking=True)
