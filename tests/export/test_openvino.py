"""OpenVINO reads the exported files and predicts as ``predict`` does, alone and in a batch that shrinks."""

import re
import time

import numpy as np
import pytest
import torch
from helpers import images, settled, tiny_msdnet, twin
from test_documented import PAGE

from timm_dfs import ExitPolicy, predict
from timm_dfs.export import export_onnx
from timm_dfs.export.router import Router
from timm_dfs.export.verify import mixed

onnx = pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy, with which the export verifies")
openvino = pytest.importorskip("openvino", reason="openvino is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*looks? untrained")]

SIZE = 16
"""Of images."""

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


@pytest.fixture(scope="module")
def msdnet():
    torch.manual_seed(0)
    return settled(tiny_msdnet())


@pytest.fixture(scope="module")
def batch():
    return images(12, SIZE, seed=3)


def spread(model, batch, *settings, never=()):
    """A policy with which images of the batch leave at every exit, except those in ``never``."""
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(batch))
    return mixed(ExitPolicy([None if k in never else 0.0 for k in range(model.num_exits)], *settings), logits)


def compiled(file):
    return openvino.Core().compile_model(file, "CPU", FLOAT32)


def run(network, batch):
    outputs = network({"images": batch.numpy()})
    return outputs["logits"].copy(), outputs["exit_index"].copy()


def assert_same(found, expected):
    logits, exit_index = found
    assert exit_index.tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=1e-4)


SETTINGS = pytest.mark.parametrize(
    ("settings", "never"),
    [(("max_prob", [0.5, 2.0, 1.5]), ()), (("entropy",), (0,)), (("patience",), ()), (("margin", None, "mean"), ())],
    ids=["temperatures", "an exit left out", "patience", "ensemble"],
)


@SETTINGS
def test_the_graph_gives_the_exits_of_predict_alone_and_in_a_batch(msdnet, batch, tmp_path, settings, never):
    policy = spread(msdnet, batch, *settings, never=never)
    expected = predict(msdnet, batch, policy)
    assert len(set(expected.exit_index.tolist())) > 1
    export_onnx(msdnet, tmp_path / "out", policy, images=batch)
    network = compiled(tmp_path / "out" / "model.onnx")
    assert_same(run(network, batch), expected)
    for row in range(len(batch)):
        alone = run(network, batch[[row]])
        assert_same(alone, type(expected)(expected.logits[[row]], expected.exit_index[[row]]))


def test_the_graph_of_a_twin_gives_the_exits_of_predict(tmp_path):
    torch.manual_seed(0)
    model, batch = twin().eval(), images(6, 64, seed=3)
    policy = spread(model, batch)
    export_onnx(model, tmp_path / "out", policy, images=batch)
    assert_same(run(compiled(tmp_path / "out" / "model.onnx"), batch), predict(model, batch, policy))


def test_thresholds_are_the_policys_and_giving_others_is_an_error(msdnet, batch, tmp_path):
    export_onnx(msdnet, tmp_path / "out", spread(msdnet, batch), images=batch)
    network = compiled(tmp_path / "out" / "model.onnx")
    assert [port.get_any_name() for port in network.inputs] == ["images"]
    with pytest.raises(RuntimeError, match="Port for tensor name thresholds was not found"):
        network({"images": batch.numpy(), "thresholds": np.float32([1.0, 1.0, 0.0])})


def test_deeper_stages_run_only_where_an_image_needs_them(msdnet, batch, tmp_path):
    policy = spread(msdnet, batch)
    expected = predict(msdnet, batch, policy)
    exits = expected.exit_index
    export_onnx(msdnet, tmp_path / "out", policy, images=batch)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    burden_beyond_first_exit(model.graph)
    onnx.save(model, tmp_path / "burdened.onnx")
    network = compiled(tmp_path / "burdened.onnx")
    assert_same(run(network, batch), expected)
    deeper, first = [], []
    for _ in range(5):
        for rows, seconds in ((exits > 0, deeper), (exits == 0, first)):
            start = time.perf_counter()
            run(network, batch[rows])
            seconds.append(time.perf_counter() - start)
    assert np.median(first) < np.median(deeper) / 4


def burden_beyond_first_exit(graph):
    """Put products of large matrices into the branch behind the first exit, which take far longer than the network."""
    (condition,) = [node for node in graph.node if node.op_type == "If"]
    (branch,) = [attribute.g for attribute in condition.attribute if attribute.name == "then_branch"]
    logits = branch.output[0].name
    noise = np.random.default_rng(0).random((1500, 1500), np.float32) / 1500
    for name, value in (("noise", noise), ("tiny", np.float32(1e-20))):
        branch.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    for kind, inputs, output in (
        ("ReduceMax", [logits], "largest"),
        ("Add", ["noise", "largest"], "product 0"),
        *(("MatMul", [f"product {i}", "noise"], f"product {i + 1}") for i in range(4)),
        ("ReduceMax", ["product 4"], "burden"),
        ("Mul", ["burden", "tiny"], "nothing"),
        ("Add", [logits, "nothing"], "burdened"),
    ):
        settings = dict(keepdims=0) if kind == "ReduceMax" else {}
        branch.node.append(onnx.helper.make_node(kind, inputs, [output], **settings))
    branch.output[0].name = "burdened"


class Stage:
    """A stage in OpenVINO, with the ``run`` of onnxruntime's sessions."""

    def __init__(self, file):
        self.network = compiled(file)
        self.sizes = []

    def run(self, names, inputs):
        self.sizes.append(len(next(iter(inputs.values()))))
        return [value.copy() for value in self.network(inputs).values()]


class OpenVinoRouter(Router):
    def open(self, file, threads):
        return Stage(file)


@SETTINGS
def test_the_stages_give_the_exits_of_predict_and_the_batch_shrinks(msdnet, batch, tmp_path, settings, never):
    policy = spread(msdnet, batch, *settings, never=never)
    expected = predict(msdnet, batch, policy)
    export_onnx(msdnet, tmp_path / "out", policy, "stages", images=batch)
    router = OpenVinoRouter(tmp_path / "out")
    assert_same(router(batch.numpy()), expected)
    exits = expected.exit_index
    sizes = [len(batch), *(int((exits > k).sum()) for k in policy.answering[:-1])]
    assert [stage.sizes for _, stage in router.stages] == [[size] for size in sizes if size]


def test_the_documented_snippet_predicts_as_the_package_does(msdnet, batch, tmp_path, monkeypatch):
    policy = spread(msdnet, batch)
    export_onnx(msdnet, tmp_path / "exported", policy, images=batch)
    monkeypatch.chdir(tmp_path)
    names = {"images": batch.numpy()}
    exec(re.search(r"<!-- snippet: openvino -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    assert_same((names["logits"], names["exit_index"]), predict(msdnet, batch, policy))
