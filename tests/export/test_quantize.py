"""int8 files keep early exit, and their thresholds suit the quantized network."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from helpers import CLASSES, images, settled, tiny_msdnet

from timm_dfs import ExitPolicy
from timm_dfs.export import export_onnx, network, to_onnx
from timm_dfs.export.quantize import refit
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


def of_confidences(*exits):
    """Logits (E, N, 2) whose largest probabilities, above 0.5, are those given for each exit."""
    odds = torch.tensor(exits, dtype=torch.float64).logit()
    return torch.stack([odds, torch.zeros_like(odds)], -1).float()


def refitted(before, after, images=64):
    """Thresholds 0.9 and 0.8, refitted on copies of images whose confidences are given, without the warning of few."""
    before, after = (of_confidences(*exits).repeat(1, images, 1) for exits in (before, after))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Few calibration images")
        found = refit(ExitPolicy([0.9, 0.8, 0.0]), before, after, torch.zeros(before.shape[1]).long())
    assert found.exit_counts[0] == found.exit_counts[1]
    return found.thresholds


@pytest.mark.parametrize(
    ("before", "after", "thresholds"),
    [
        (([0.95], [0.6], [0.6]), ([0.93], [0.6], [0.6]), (0.9, 0.8)),
        (([0.95], [0.6], [0.6]), ([0.85], [0.6], [0.6]), (0.85, 0.8)),
        (([0.7], [0.7], [0.6]), ([0.8], [0.75], [0.6]), (0.9, 0.8)),
        (([0.7], [0.7], [0.6]), ([0.92], [0.85], [0.6]), (0.92, 0.85)),
        (([0.95, 0.7], [0.6, 0.85], [0.6, 0.6]), ([0.95, 0.75], [0.6, 0.9], [0.6, 0.6]), (0.85, 0.8)),
    ],
    ids=["all leave", "all leave, less confident", "none leaves", "none leaves, more confident", "all leave at exit 1"],
)
def test_an_exit_where_all_or_no_images_leave_keeps_its_threshold_as_far_as_they_let_it(before, after, thresholds):
    assert refitted(before, after)[:2] == pytest.approx(thresholds, abs=2e-5)


def test_an_exit_whose_images_are_certain_stays_in_use_though_none_is_to_leave():
    policy = leaving_at(ExitPolicy([0.9, 0.8, 0.0]), of_confidences([1 - 1e-9], [0.7], [0.7]), [0, 1, 0])
    assert policy.answering == (0, 1, 2)


def test_thresholds_that_few_images_decide_cause_a_warning():
    logits = of_confidences([0.95] * 50 + [0.7] * 12, [0.85] * 62, [0.7] * 62)
    targets = torch.zeros(62).long()
    with pytest.warns(UserWarning, match=r"Few calibration images reach exit 1 \(12\);"):
        refit(ExitPolicy([0.9, 0.8, 0.0]), logits, logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refit(ExitPolicy([0.9, 0.0, 0.0]), logits, logits, targets)
        refit(ExitPolicy([0.0, 0.8, 0.0]), logits, logits, targets)
        refit(ExitPolicy([1, 1, 0], "patience"), logits, logits, targets)


def test_an_accuracy_that_falls_far_causes_a_warning():
    logits = of_confidences([0.95] * 30 + [0.7] * 32, [0.85] * 62, [0.7] * 62)
    policy, targets = ExitPolicy([0.9, 0.8, 0.0]), logits[0].argmax(-1)
    with pytest.warns(UserWarning, match="In int8 the accuracy of the last exit is 0.0 % instead of 100.0 %"):
        refit(policy, logits, logits.flip(-1), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refit(policy, logits, logits, targets)


def test_calibration_images_of_another_size_than_the_files_are_refused(model, calibration, policy, tmp_path):
    with pytest.raises(ValueError, match="calibration images are 24 x 24 pixels, but the file takes 16 x 16"):
        given = images(40, 24), calibration[1]
        export_onnx(model, tmp_path / "out", policy, images=images(8, 16), calibration=given)
    assert not list(tmp_path.iterdir())


def test_calibration_images_need_classes(model, policy, tmp_path):
    with pytest.raises(ValueError, match="calibration has 40 samples but targets of shape"):
        export_onnx(
            model, tmp_path / "out", policy, images=images(8, 16), calibration=(images(40, 16), torch.zeros(3).long())
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["graph", "last"])
def test_what_int8_changed_is_json_where_an_exit_is_switched_off(model, calibration, tmp_path, layout):
    policy = None if layout == "last" else ExitPolicy([0.5, None, float("-inf")])
    found = export_onnx(model, tmp_path / "out", policy, layout, images=images(8, 16), calibration=calibration)
    assert found.quantization.thresholds[1:] == (None, 0.0)
    json.dumps(asdict(found.quantization), allow_nan=False)
