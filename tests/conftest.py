"""Every test starts from the same random state, and hypothesis from the same examples."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("timm_dfs", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("timm_dfs")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
