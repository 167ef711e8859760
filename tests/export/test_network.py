"""What torch exports of a network with exits."""

import subprocess
import sys

import pytest
import torch
from helpers import images, twin

pytest.importorskip("onnx", reason="needs the extra deploy")


class UpTo(torch.nn.Module):
    def __init__(self, model, exits):
        super().__init__()
        self.model, self.exits = model, exits

    def forward(self, x):
        logits = []
        self.model.walk(x, lambda _, answer: logits.append(answer), self.exits)
        return tuple(logits)


@pytest.mark.parametrize("exits", [(1,), (0, 1), (0, 2)])
def test_a_walk_to_some_exits_of_a_twin_can_be_exported(exits):
    model = twin().eval()
    batch = images(2, 64)
    with torch.no_grad():
        program = torch.export.export(UpTo(model, exits).eval(), (batch,), strict=False)
        expected = [model.forward_exits(batch)[k] for k in exits]
        for found, wanted in zip(program.module()(batch), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)
    assert model.forward_state.at_exit is None


def test_importing_the_package_imports_no_part_of_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, timm_dfs.export, timm_dfs.cli; print(sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"'onnx'", "'onnxscript'", "'onnxruntime'"} & set(done.stdout.strip("[]\n").split(", "))
    assert "'torch'" in done.stdout
