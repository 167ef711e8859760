"""The same random state for every test, the same examples for hypothesis, and torch's threads for parallel runs.

With ``-n``, test processes divide the cores; by default, torch would use all of them in each process.
"""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("timm_dfs", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("timm_dfs")

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    share = max(1, (os.cpu_count() or 1) // int(processes))
    torch.set_num_threads(share)
    os.environ["OMP_NUM_THREADS"] = str(share)  # for the processes that tests start


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
