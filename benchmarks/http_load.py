"""A bounded load of HTTP requests on this machine: clients that each wait for a response before the next request.

python benchmarks/http_load.py http://127.0.0.1:8000/ FOLDER --clients 8 --requests 200

It posts the files of a folder in turn and prints JSON: seconds in all, the latency of each request in seconds, and each
response. ``benchmarks/serving.py`` runs it as a process of its own.
"""

import argparse
import asyncio
import itertools
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp


async def load(url, contents, clients, requests):
    latencies, responses = [], []
    turns = itertools.islice(itertools.cycle(contents), requests)

    async def client(session):
        for content in turns:  # shared: each client takes the next file
            before = time.perf_counter()
            async with session.post(url, data=content) as response:
                response.raise_for_status()
                responses.append(await response.json())
            latencies.append(time.perf_counter() - before)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return dict(seconds=time.perf_counter() - start, latencies=latencies, responses=responses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    args = parser.parse_args()
    if urlsplit(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"{args.url} is not on this machine; give an address on the loopback interface.")
    contents = [file.read_bytes() for file in sorted(args.folder.iterdir())]
    print(json.dumps(asyncio.run(load(args.url, contents, args.clients, args.requests))))


if __name__ == "__main__":
    main()
