"""ExecuTorch's programs predict as ``predict`` does, one image at a time, and nothing is written otherwise."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import (
    BACKBONES,
    CLASSES,
    TINY,
    images,
    routed_in_a_shell,
    settled,
    tiny_msdnet,
    tiny_resnet,
    tiny_vgg,
    twin,
)
from typer.testing import CliRunner

from timm_dfs import ExitPolicy, predict
from timm_dfs.cli import app
from timm_dfs.export import export_executorch, to_executorch
from timm_dfs.export.network import plain
from timm_dfs.export.program import cut_program
from timm_dfs.export.router import Router
from timm_dfs.export.verify import mixed

pytestmark = pytest.mark.filterwarnings("ignore:.*looks? untrained")

SIZE = 16
"""Of images."""


def needs_executorch(test):
    missing = importlib.util.find_spec("executorch") is None
    return pytest.mark.slow(pytest.mark.skipif(missing, reason="needs the extra executorch")(test))


@pytest.fixture(scope="module")
def msdnet():
    torch.manual_seed(0)
    return settled(tiny_msdnet(presets=dict(half=dict(thresholds=[0.6, 0.7, 0.0]))))


def spread(model, batch, *settings, never=()):
    """A policy with which images of the batch leave at every exit, except those in ``never``."""
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(batch))
    return mixed(ExitPolicy([None if k in never else 0.0 for k in range(model.num_exits)], *settings), logits)


def assert_same(router, batch, expected):
    for row, image in enumerate(batch.split(1)):
        logits, exit_index = router(image.numpy())
        assert exit_index.tolist() == [expected.exit_index[row]]
        assert np.allclose(logits[0], expected.logits[row], atol=1e-4, rtol=0, equal_nan=True)


def computed(stages, batch):
    """Logits of each stage, from the states that the stages before put out."""
    values, logits = {"images": batch}, []
    for stage in stages:
        own, *states = stage.module(*(values[name] for name in stage.inputs))
        values.update(zip(stage.outputs, states, strict=True))
        logits.append(own)
    return logits


@pytest.mark.parametrize("exits", [(0, 1, 2), (1, 2), (0, 2), (2,)])
@pytest.mark.parametrize(
    ("make", "size"),
    [(tiny_msdnet, 16), (tiny_resnet, 16), (tiny_vgg, 16), (twin, 64), (lambda: twin("pair"), 64)],
    ids=["msdnet", "resnet", "vgg", "twin", "twin of pairs"],
)
def test_stages_cut_from_a_program_give_every_exits_logits(make, size, exits):
    torch.manual_seed(0)
    model = plain(make())
    batch = images(2, size)
    with torch.no_grad():
        stages = cut_program(model, batch, exits)
        expected = model.forward_exits(batch)
        assert [stage.exit_index for stage in stages] == list(exits)
        for k, found in zip(exits, computed(stages, batch), strict=True):
            assert torch.allclose(found, expected[k], atol=1e-5)


def test_no_convolution_is_in_two_stages_and_a_left_out_head_is_in_none(msdnet):
    def convolutions(exits):
        stages = cut_program(plain(msdnet), images(1, SIZE), exits)
        nodes = [node for stage in stages for node in stage.module.graph.nodes if node.op == "call_function"]
        return [node.args[1].target for node in nodes if "conv" in str(node.target)]

    every, fewer = convolutions((0, 1, 2)), convolutions((1, 2))
    assert len(set(every)) == len(every) and len(set(fewer)) == len(fewer)
    assert set(fewer) < set(every)
    assert all("heads.0." in name for name in set(every) - set(fewer))


@needs_executorch
@pytest.mark.parametrize(
    ("settings", "never"),
    [
        (("max_prob", [0.5, 2.0, 1.5]), ()),
        (("entropy",), (0,)),
        (("patience",), ()),
        (("margin", None, "mean"), ()),
    ],
    ids=["temperatures", "an exit left out", "patience", "ensemble"],
)
def test_programs_give_the_exits_of_predict(msdnet, tmp_path, settings, never):
    batch = images(12, SIZE, seed=3)
    policy = spread(msdnet, batch, *settings, never=never)
    expected = predict(msdnet, batch, policy)
    assert len(set(expected.exit_index.tolist())) > 1
    result = export_executorch(msdnet, tmp_path / "out", policy, images=images(4, SIZE, seed=5))
    assert {check.batch_size for check in result.checks} == {1}
    assert set(result.files) == {file.name for file in (tmp_path / "out").iterdir()}
    assert_same(Router(tmp_path / "out"), batch, expected)


@needs_executorch
@pytest.mark.parametrize("name", ["resnet", "vgg", "test_convnext", *BACKBONES])
def test_other_networks_are_exported_as_well(name, tmp_path):
    torch.manual_seed(0)
    if name in TINY:
        model = settled(TINY[name]())
    elif name in BACKBONES:
        model = twin(name).eval()
    else:
        model = timm.create_model(f"dfs_{name}", exits=3, num_classes=CLASSES).eval()
    batch = images(6, 16 if name in TINY else 64, seed=3)
    policy = spread(model, batch)
    export_executorch(model, tmp_path / "out", policy, images=batch)
    assert_same(Router(tmp_path / "out"), batch, predict(model, batch, policy))


@needs_executorch
def test_a_row_with_nan_goes_to_the_last_exit_and_only_one_image_is_taken(msdnet, tmp_path):
    policy = ExitPolicy([0.0, 0.0, 0.0])
    export_executorch(msdnet, tmp_path / "out", policy, images=images(2, SIZE))
    spoilt = images(2, SIZE)
    spoilt[1, 0, 3, 3] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        expected = predict(msdnet, spoilt, policy)
    assert expected.exit_index.tolist() == [0, 2]
    router = Router(tmp_path / "out")
    assert_same(router, spoilt, expected)
    with pytest.raises(ValueError, match="2 images; these stages take 1 at a time"):
        router(spoilt.numpy())


@needs_executorch
def test_the_copied_router_runs_without_this_package(msdnet, tmp_path):
    batch = images(6, SIZE, seed=3)
    policy = spread(msdnet, batch)
    export_executorch(msdnet, tmp_path / "out", policy, images=batch)
    found = routed_in_a_shell(tmp_path / "out", batch, without=("onnxruntime", "timm", "timm_dfs"))
    expected = predict(msdnet, batch, policy)
    assert found == list(zip(expected.logits.argmax(1).tolist(), expected.exit_index.tolist()))


@needs_executorch
def test_a_failed_verification_leaves_no_file(msdnet, tmp_path, monkeypatch):
    def other_runner(folder, layout, num_exits):
        router = Router(folder)
        return lambda images, thresholds: (router(images, thresholds)[0] + 0.01, router(images, thresholds)[1])

    monkeypatch.setattr(to_executorch, "runner", other_runner)
    with pytest.raises(ValueError, match=r"Verification failed: .* logits differ"):
        export_executorch(msdnet, tmp_path / "out", "half", images=images(2, SIZE))
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_programs_that_executorch_cannot_run_are_not_kept(msdnet, tmp_path, monkeypatch):
    def broken(folder, layout, num_exits):
        (folder / "stage_1.pte").write_bytes(b"")
        return Router(folder)

    monkeypatch.setattr(to_executorch, "runner", broken)
    with pytest.raises(ValueError, match=r"ExecuTorch cannot run the stages: .* Nothing was written"):
        export_executorch(msdnet, tmp_path / "out", "half", images=images(2, SIZE))
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_the_command_writes_programs_and_names_the_runtime(tmp_path):
    options = ["--model-kwargs", "depths=(1, 1)", "--model-kwargs", "widths=(6, 8)", "--model-kwargs", "num_classes=2"]
    options += ["--thresholds", "0.5,0", "--layout", "stages", "--format", "executorch"]
    result = CliRunner().invoke(app, ["export", "dfs_vgg7_cifar100", *options, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "Verified with ExecuTorch" in " ".join(result.stdout.split())
    about = json.loads((tmp_path / "out" / "router.json").read_text())
    assert [stage["file"] for stage in about["stages"]] == ["stage_0.pte", "stage_1.pte"]
    assert about["versions"]["executorch"] and about["batch_size"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "writes stages, not 'graph'; give --layout stages"),
        (("--layout", "stages", "--batch-size", "4", "--softmax"), "leave --batch-size, --softmax out"),
        (("--layout", "stages", "--opset", "20"), "leave --opset out"),
    ],
)
def test_the_command_refuses_what_the_programs_have_not(tmp_path, options, message):
    arguments = ["export", "dfs_vgg7_cifar100", "--format", "executorch", *options, "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("timm-dfs: ")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path):
    result = CliRunner().invoke(
        app, ["export", "dfs_vgg7_cifar100", "--format", "pte", "--output", str(tmp_path / "a")]
    )
    assert result.exit_code == 2 and "choose one of onnx, executorch" in result.stderr


def test_without_executorch_the_error_names_the_extra(msdnet, tmp_path, monkeypatch):
    for name in ("executorch", "executorch.exir"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'timm-dfs\[executorch\]'"):
        export_executorch(msdnet, tmp_path / "out", "half", images=images(2, SIZE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("policy", "batch", "message"),
    [
        (None, images(2, SIZE), "needs a policy"),
        (ExitPolicy([None, None, 0.0]), images(2, SIZE), "No early exit can be reached"),
        ("half", images(2, SIZE)[:0], "There are 0 images"),
    ],
)
def test_wrong_arguments_are_refused(msdnet, tmp_path, monkeypatch, policy, batch, message):
    monkeypatch.setattr(to_executorch, "require", lambda module, extra: None)  # it is not reached
    with pytest.raises(ValueError, match=message):
        export_executorch(msdnet, tmp_path / "out", policy, images=batch)
    assert not list(tmp_path.iterdir())
