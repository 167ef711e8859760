"""int8 files keep early exit, and their thresholds suit the quantized network."""

import pytest
import torch
from helpers import CLASSES, images, settled, tiny_msdnet

from timm_dfs import ExitPolicy
from timm_dfs.export import export_onnx, network, to_onnx
from timm_dfs.export.verify import leaving_at, mixed

pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = settled(tiny_msdnet())
    with torch.no_grad():
        for head in model.heads:
            head.fc.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def calibration(model):
    batch = images(40, 16, seed=4)
    with torch.no_grad():
        return batch, model(batch).argmax(1)


@pytest.fixture(scope="module")
def policy(model, calibration):
    with torch.no_grad():
        return mixed(ExitPolicy([0.0] * 3), torch.stack(model.forward_exits(calibration[0])))


@pytest.fixture(scope="module")
def traced(model):
    return network.trace(network.plain(model), (3, 16, 16), 18)


@pytest.fixture(autouse=True)
def trace_once(traced, monkeypatch):
    monkeypatch.setattr(to_onnx, "trace", lambda *_: traced)


@pytest.mark.parametrize("layout", ["graph", "stages", "last"])
def test_int8_files_predict_as_the_quantized_network(model, calibration, policy, tmp_path, layout):
    given = None if layout == "last" else policy
    plain = export_onnx(model, tmp_path / "float32", given, layout, images=images(8, 16))
    int8 = export_onnx(model, tmp_path / "int8", given, layout, images=images(8, 16), calibration=calibration)
    found = int8.quantization
    assert plain.quantization is None and found.samples == 40
    assert found.last_exit_accuracy[0] == 100 and found.last_exit_accuracy[1] > 50
    assert found.exit_counts[0] == found.exit_counts[1]
    assert all(int8.shrinks)


def test_the_convolutions_are_quantized_in_every_branch(model, calibration, policy, tmp_path):
    onnx = pytest.importorskip("onnx")
    export_onnx(model, tmp_path / "int8", policy, images=images(8, 16), calibration=calibration)
    scopes = list(nested(onnx.load(tmp_path / "int8" / "model.onnx").graph))
    for scope in scopes:
        maker = {output: node.op_type for node in scope.node for output in node.output}
        for node in scope.node:
            if node.op_type == "Conv":
                assert {maker[name] for name in node.input} == {"DequantizeLinear"}
    assert sum(any(node.op_type == "Conv" for node in scope.node) for scope in scopes) == 3


def nested(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nested(attribute.g)


def test_thresholds_let_as_many_images_leave_as_asked():
    logits = torch.randn(3, 50, CLASSES, generator=torch.Generator().manual_seed(0))
    for confidence in ("max_prob", "margin", "entropy"):
        policy = leaving_at(ExitPolicy([0.1, 0.1, 0.0], confidence, [2.0, 1.0, 1.0]), logits, [20, 13, 17])
        assert torch.bincount(policy.exit_index(logits)).tolist() == [20, 13, 17]


def test_calibration_images_need_classes(model, policy, tmp_path):
    with pytest.raises(ValueError, match="calibration has 40 samples but targets of shape"):
        export_onnx(
            model, tmp_path / "out", policy, images=images(8, 16), calibration=(images(40, 16), torch.zeros(3).long())
        )
    assert not list(tmp_path.iterdir())
