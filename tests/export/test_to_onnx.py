"""Exported files predict as ``predict`` does, in ONNX Runtime, and nothing is written otherwise."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from helpers import CLASSES, images, routed_in_a_shell, settled, tiny_msdnet, tiny_resnet, tiny_vgg, twin

import timm_dfs
from timm_dfs import ExitPolicy, predict
from timm_dfs.export import export_onnx, network, to_onnx
from timm_dfs.export.to_onnx import runner
from timm_dfs.export.verify import mixed, near_threshold
from timm_dfs.inference.confidence import CONFIDENCES, PATIENCE, max_prob

onnx = pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy")

SIZE = 16
"""Of images."""


@pytest.fixture(scope="module")
def traced():
    """Networks by model, each traced once: that is most of an export's time."""
    return {}


@pytest.fixture(autouse=True)
def trace_once(traced, monkeypatch):
    original = network.trace

    def trace(model, input_size, opset):
        weights = sum(p.double().sum().item() for p in model.parameters())
        key = type(model).__name__, input_size, opset, weights, model.chain
        if key not in traced:
            traced[key] = original(model, input_size, opset)
        return traced[key]

    monkeypatch.setattr(to_onnx, "trace", trace)


def with_biases(model):
    """The model, its early exits told from fresh ones."""
    with torch.no_grad():
        for head in model.heads:
            if head.fc.bias is not None:
                head.fc.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def msdnet():
    torch.manual_seed(0)
    return with_biases(settled(tiny_msdnet(presets=dict(half=dict(thresholds=[0.6, 0.7, 0.0])))))


@pytest.fixture(scope="module")
def batch():
    return images(12, SIZE, seed=3)


def spread(model, batch, confidence="max_prob", temperatures=None, never=(), ensemble=None):
    """A policy with which images of the batch leave at every exit, except those in ``never``."""
    thresholds = [None if k in never else 0.0 for k in range(model.num_exits)]
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(batch))
    return mixed(ExitPolicy(thresholds, confidence, temperatures, ensemble), logits)


def exported(model, folder, policy, layout="graph", **kwargs):
    batch_size = kwargs.get("batch_size") or 4
    export_onnx(model, folder, policy, layout, images=images(2 * batch_size, SIZE, seed=5), **kwargs)
    return runner(folder, layout, model.num_exits, threads=1)


def floats(policy):
    return np.asarray(policy.thresholds, np.float32)


def assert_same(found, expected):
    assert found[1].dtype == np.int64
    assert found[1].tolist() == expected.exit_index.tolist()
    assert np.allclose(found[0], expected.logits.numpy(), atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", ["graph", "stages"])
@pytest.mark.parametrize("confidence", [*CONFIDENCES, PATIENCE])
def test_every_confidence_gives_the_exits_of_predict_alone_and_in_a_batch(msdnet, batch, tmp_path, confidence, layout):
    temperatures = None if confidence == PATIENCE else [0.5, 2.0, 1.5]
    policy = spread(msdnet, batch, confidence, temperatures)
    expected = predict(msdnet, batch, policy)
    assert len(set(expected.exit_index.tolist())) > 1
    run = exported(msdnet, tmp_path / "out", policy, layout)
    assert_same(run(batch.numpy(), floats(policy)), expected)
    for row in range(3):
        alone = run(batch[row : row + 1].numpy(), floats(policy))
        assert_same(alone, timm_dfs.Prediction(expected.logits[[row]], expected.exit_index[[row]]))


@pytest.mark.parametrize("layout", ["graph", "stages"])
@pytest.mark.parametrize("ensemble", ["mean", [[1.0], [1.0, 3.0], [1.0, 0.0, 2.0]]], ids=["mean", "weights"])
@pytest.mark.parametrize("confidence", ["max_prob", PATIENCE])
def test_exits_predict_together_in_the_file_as_they_do_in_predict(
    msdnet, batch, tmp_path, confidence, ensemble, layout
):
    temperatures = None if confidence == PATIENCE else [0.5, 2.0, 1.5]
    for never in ((), (0,)):
        policy = spread(msdnet, batch, confidence, temperatures, never, ensemble)
        expected = predict(msdnet, batch, policy)
        assert len(set(expected.exit_index.tolist())) > 1 or confidence == PATIENCE
        run = exported(msdnet, tmp_path / f"without_{len(never)}", policy, layout)
        assert_same(run(batch.numpy(), floats(policy)), expected)
        alone = run(batch[:1].numpy(), floats(policy))
        assert_same(alone, timm_dfs.Prediction(expected.logits[[0]], expected.exit_index[[0]]))


@pytest.mark.parametrize("layout", ["graph", "stages"])
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vgg, twin], ids=["resnet", "vgg", "twin"])
def test_other_networks_are_exported_as_well(make, layout, tmp_path):
    torch.manual_seed(0)
    model = with_biases(settled(make()) if make is not twin else make().eval())
    size = 16 if make is not twin else 64
    batch = images(6, size, seed=3)
    policy = spread(model, batch)
    export_onnx(model, tmp_path / "out", policy, layout, images=batch)
    assert_same(
        runner(tmp_path / "out", layout, model.num_exits)(batch.numpy(), floats(policy)), predict(model, batch, policy)
    )


@pytest.mark.parametrize("never", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("layout", ["graph", "stages", "last"])
@pytest.mark.parametrize("make", [tiny_msdnet, tiny_resnet, twin], ids=["msdnet", "resnet", "twin"])
def test_chained_exits_predict_in_the_file_as_they_do_in_predict(make, layout, never, tmp_path):
    torch.manual_seed(0)
    model = with_biases(settled(make(chain=0.5)) if make is not twin else make(chain=0.5).eval())
    batch = images(8, 16 if make is not twin else 64, seed=3)
    policy = spread(model, batch, never=never) if layout != "last" else ExitPolicy([None, None, 0.0])
    export_onnx(model, tmp_path / "out", None if layout == "last" else policy, layout, images=batch)
    run = runner(tmp_path / "out", layout, model.num_exits, threads=1)
    expected = predict(model, batch, policy)
    assert layout == "last" or len(set(expected.exit_index.tolist())) > 1
    assert_same(run(batch.numpy(), floats(policy)), expected)
    for row in range(3):
        alone = run(batch[row : row + 1].numpy(), floats(policy))
        assert_same(alone, timm_dfs.Prediction(expected.logits[[row]], expected.exit_index[[row]]))


@pytest.mark.parametrize("layout", ["graph", "stages"])
@pytest.mark.parametrize("confidence", ["max_prob", PATIENCE])
def test_a_row_with_nan_goes_to_the_last_exit(msdnet, batch, tmp_path, layout, confidence):
    policy = ExitPolicy([0.0, 0.0, 0.0], confidence)
    run = exported(msdnet, tmp_path / "out", policy, layout)
    spoilt = batch[:4].clone()
    spoilt[2, 0, 3, 3] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        expected = predict(msdnet, spoilt, policy)
    assert expected.exit_index.tolist() == [0, 0, 2, 0]
    assert_same(run(spoilt.numpy(), floats(policy)), expected)


@pytest.mark.parametrize("layout", ["graph", "stages"])
def test_an_empty_batch_gives_an_empty_prediction(msdnet, tmp_path, layout):
    policy = ExitPolicy([0.5, 0.5, 0.0])
    run = exported(msdnet, tmp_path / "out", policy, layout)
    logits, exit_index = run(np.zeros((0, 3, SIZE, SIZE), np.float32), floats(policy))
    assert logits.shape == (0, CLASSES) and exit_index.shape == (0,)


@pytest.mark.parametrize("layout", ["graph", "stages"])
def test_thresholds_can_be_moved_without_a_new_export(msdnet, batch, tmp_path, layout):
    run = exported(msdnet, tmp_path / "out", ExitPolicy([0.9, 0.9, 0.0]), layout)
    for thresholds in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]):
        assert_same(run(batch.numpy(), np.float32(thresholds)), predict(msdnet, batch, ExitPolicy(thresholds)))


def test_the_graphs_default_thresholds_are_the_policys(msdnet, batch, tmp_path):
    policy = spread(msdnet, batch)
    exported(msdnet, tmp_path / "out", policy)
    found = to_onnx.open_session(tmp_path / "out" / "model.onnx").run(None, {"images": batch.numpy()})
    assert_same(found, predict(msdnet, batch, policy))


@pytest.mark.parametrize("layout", ["graph", "stages"])
def test_an_exit_that_never_answers_is_left_out_and_cannot_be_switched_on_silently(msdnet, batch, tmp_path, layout):
    policy = spread(msdnet, batch, never=[0])
    run = exported(msdnet, tmp_path / "out", policy, layout)
    assert_same(run(batch.numpy(), floats(policy)), predict(msdnet, batch, policy))
    with pytest.raises(Exception, match=r"exits 0 are not in this file|only exits \[1, 2\]"):
        run(batch.numpy(), np.float32([0.5, 0.5, 0.0]))


@pytest.mark.filterwarnings("ignore:No sample reaches")
@pytest.mark.parametrize("layout", ["graph", "stages"])
def test_a_threshold_just_beyond_patience_switches_an_exit_off_in_the_file_too(msdnet, batch, tmp_path, layout):
    policy = ExitPolicy([2, 1, 0], "patience")
    assert policy.answering == (1, 2)
    run = exported(msdnet, tmp_path / "out", policy, layout)
    assert_same(run(batch.numpy(), floats(policy)), predict(msdnet, batch, policy))
    with pytest.raises(Exception, match=r"exits 0 are not in this file|only exits \[1, 2\]"):
        run(batch.numpy(), np.float32([1, 1, 0]))


def test_the_head_of_an_exit_that_never_answers_is_not_in_the_file(msdnet, tmp_path):
    with_all = export_onnx(msdnet, tmp_path / "a", ExitPolicy([0.5, 0.5, 0.0]), images=images(4, SIZE))
    without = export_onnx(msdnet, tmp_path / "b", ExitPolicy([None, 0.5, 0.0]), images=images(4, SIZE))
    head = sum(4 * parameter.numel() for parameter in msdnet.heads[0].parameters())
    assert with_all.files["model.onnx"] - without.files["model.onnx"] >= head
    assert without.exits == (1, 2)


def test_probabilities_are_those_of_the_exits_own_temperature(msdnet, batch, tmp_path):
    policy = spread(msdnet, batch, temperatures=[0.5, 2.0, 1.5])
    run = exported(msdnet, tmp_path / "out", policy, softmax=True)
    found, _ = run(batch.numpy(), floats(policy))
    expected = predict(msdnet, batch, policy)
    temperatures = torch.tensor(policy.temperatures)[expected.exit_index][:, None]
    assert np.allclose(found, (expected.logits / temperatures).softmax(-1), atol=1e-5)
    session = to_onnx.open_session(tmp_path / "out" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["probabilities", "exit_index"]


def test_the_last_layout_is_the_network_without_early_exits(msdnet, batch, tmp_path):
    run = exported(msdnet, tmp_path / "out", None, "last")
    with torch.no_grad():
        assert np.allclose(run(batch.numpy(), None)[0], msdnet(batch), atol=1e-4)
    session = to_onnx.open_session(tmp_path / "out" / "model.onnx")
    assert [node.name for node in session.get_inputs()] == ["images"]
    assert [node.name for node in session.get_outputs()] == ["logits"]


def test_deeper_stages_run_on_fewer_rows(msdnet, batch, tmp_path):
    policy = spread(msdnet, batch)
    exits = predict(msdnet, batch, policy).exit_index
    run = exported(msdnet, tmp_path / "out", policy, "stages")
    sizes = []

    class Counting:
        def __init__(self, session):
            self.session = session

        def run(self, names, feed):
            sizes.append(len(next(iter(feed.values()))))
            return self.session.run(names, feed)

    run.stages = [(stage, Counting(session)) for stage, session in run.stages]
    run(batch.numpy(), floats(policy))
    assert sizes == [len(batch), int((exits > 0).sum()), int((exits > 1).sum())]


@pytest.mark.parametrize("thresholds", [[0.5, 0.0], [0.5, 0.5, 0.0, 2.0]])
def test_the_router_takes_one_threshold_for_each_exit(msdnet, batch, tmp_path, thresholds):
    run = exported(msdnet, tmp_path / "out", "half", "stages")
    with pytest.raises(ValueError, match=rf"There are {len(thresholds)} thresholds for 3 exits"):
        run(batch.numpy(), thresholds)


def test_the_router_runs_without_torch_and_without_this_package(msdnet, batch, tmp_path):
    policy = spread(msdnet, batch)
    exported(msdnet, tmp_path / "out", policy, "stages")
    found = routed_in_a_shell(tmp_path / "out", batch, without=("torch", "timm", "timm_dfs"))
    expected = predict(msdnet, batch, policy)
    assert found == list(zip(expected.logits.argmax(1).tolist(), expected.exit_index.tolist()))


def test_weights_lie_in_the_branches_that_read_them(msdnet, tmp_path):
    exported(msdnet, tmp_path / "out", ExitPolicy([0.5, 0.5, 0.0]))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    scopes = list(nested(graph))
    for scope in scopes:
        held = {tensor.name for tensor in scope.initializer}
        for node in scope.node:
            if node.op_type in ("Conv", "Gemm"):
                assert set(node.input[1:]) <= held
    assert sum(any(node.op_type == "Conv" for node in scope.node) for scope in scopes) == 3


def nested(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nested(attribute.g)


def test_the_file_says_how_to_use_it_and_nothing_of_this_machine(msdnet, tmp_path):
    exported(msdnet, tmp_path / "out", "half")
    file = tmp_path / "out" / "model.onnx"
    assert str(to_onnx.__file__).rpartition("/")[0].encode() not in file.read_bytes()
    assert b'File "' not in file.read_bytes()
    facts = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert facts["preset"] == "half" and json.loads(facts["thresholds"]) == [0.6, 0.7, 0.0]
    assert json.loads(facts["mean"]) == list(msdnet.pretrained_cfg["mean"])
    assert json.loads(facts["input_size"]) == [3, SIZE, SIZE]
    assert len(json.loads(facts["label_names"])) >= CLASSES
    assert json.loads(facts["exit_macs"]) == timm_dfs.exit_flops(msdnet, (3, SIZE, SIZE), lazy=True)
    assert {"timm_dfs", "torch", "timm", "onnx"} <= json.loads(facts["versions"]).keys()
    assert {"interpolation", "crop_pct", "std", "last_exit_macs"} <= facts.keys()


@pytest.mark.parametrize("layout", ["graph", "stages"])
def test_thresholds_that_all_images_reach_are_valid_json_in_the_file(msdnet, batch, tmp_path, layout):
    """``find_thresholds`` ends with minus infinity, which JSON has no word for."""
    policy = ExitPolicy([-1.0, 0.7, float("-inf")])
    run = exported(msdnet, tmp_path / "out", policy, layout)
    facts = {prop.key: prop.value for prop in onnx.load(next((tmp_path / "out").glob("*.onnx"))).metadata_props}
    texts = [facts["thresholds"]]
    if layout == "stages":
        texts.append(json.dumps(json.loads((tmp_path / "out" / "router.json").read_text())["thresholds"]))
    assert texts == ["[0.0, 0.7, 0.0]"] * len(texts)
    assert_same(run(batch.numpy(), floats(policy)), predict(msdnet, batch, policy))


def test_with_fewer_images_than_exits_the_deepest_exits_are_verified():
    logits = torch.randn(5, 2, CLASSES, generator=torch.Generator().manual_seed(0))
    exits = mixed(ExitPolicy([0.5] * 5), logits).exit_index(logits)
    assert sorted(exits.tolist()) == [3, 4]


def test_exits_that_no_image_could_be_compared_at_are_named(msdnet, batch, tmp_path):
    policy = ExitPolicy([0.5] * msdnet.num_exits)
    with pytest.warns(UserWarning, match="No image that was verified with leaves at exits 0"):
        export_onnx(msdnet, tmp_path / "alike", policy, images=batch[:1].repeat(8, 1, 1, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No image that was verified with")
        export_onnx(msdnet, tmp_path / "different", policy, images=batch)


@pytest.mark.parametrize(("batch_size", "verified"), [(None, 3), (2, 4)])
def test_there_are_at_least_as_many_images_of_noise_as_exits(msdnet, tmp_path, monkeypatch, batch_size, verified):
    monkeypatch.setattr(to_onnx, "VERIFIED", 1)
    result = export_onnx(msdnet, tmp_path / "out", "half", batch_size=batch_size)
    assert {sum(check.exit_counts) for check in result.checks} == {verified}
    assert all(next(check.exit_counts for check in result.checks if check.thresholds == "mixed"))


def test_the_preparation_in_the_file_is_that_of_the_networks_channels(tmp_path):
    torch.manual_seed(0)
    model = with_biases(settled(tiny_msdnet(in_chans=1)))
    export_onnx(model, tmp_path / "out", ExitPolicy([0.5, 0.5, 0.0]), images=images(4, SIZE, channels=1))
    facts = {prop.key: prop.value for prop in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(facts["input_size"]) == [1, SIZE, SIZE]
    for key in ("mean", "std"):
        assert json.loads(facts[key]) == pytest.approx([sum(model.pretrained_cfg[key]) / 3])


def test_a_fixed_batch_takes_no_other(msdnet, tmp_path):
    policy = ExitPolicy([0.5, 0.5, 0.0])
    run = exported(msdnet, tmp_path / "out", policy, batch_size=2)
    assert len(run(images(2, SIZE).numpy(), floats(policy))[0]) == 2
    with pytest.raises(Exception, match="Expected: 2"):
        run(images(3, SIZE).numpy(), floats(policy))


def test_the_router_of_a_fixed_batch_takes_images_in_such_batches(msdnet, batch, tmp_path):
    policy = ExitPolicy([0.5, 0.5, 0.0])
    run = exported(msdnet, tmp_path / "out", policy, "stages", batch_size=4)
    printed = routed_in_a_shell(tmp_path / "out", batch[:6], ())
    assert [exit_index for _, exit_index in printed] == predict(msdnet, batch[:6], policy).exit_index.tolist()
    with pytest.raises(ValueError, match="There are 3 images; these stages take 4 at a time"):
        run(batch[:3].numpy(), floats(policy))


def test_a_network_whose_batch_cannot_shrink_is_computed_on_and_predicts_the_same(msdnet, batch, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_dfs.export.conditional.shrinks", lambda *_: False)
    monkeypatch.setattr("timm_dfs.export.stages.shrinks", lambda *_: False)
    for confidence in ("max_prob", PATIENCE):
        policy = spread(msdnet, batch, confidence)
        for layout in ("graph", "stages"):
            run = exported(msdnet, tmp_path / f"{confidence}-{layout}", policy, layout)
            assert_same(run(batch.numpy(), floats(policy)), predict(msdnet, batch, policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(policy=ExitPolicy([0.5, 0.0])), "2 thresholds, but there are 3 exits"),
        (dict(policy="fast"), "no preset 'fast'"),
        (dict(policy=None), "needs a policy"),
        (dict(policy=ExitPolicy([None, None, 0.0])), "No early exit can be reached"),
        (dict(policy="half", layout="last"), "leave the policy out"),
        (dict(layout="onnx"), "layout is 'onnx'"),
        (dict(opset=17), "opset is 17"),
        (dict(opset=99), "opset is 99"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=3), "multiple of 3"),
        (dict(layout="stages", softmax=True), "leave softmax out"),
        (dict(images=torch.zeros(2, 1, 8, 8)), "give a batch of images"),
        (dict(images=torch.zeros(0, 3, 8, 8)), "There are 0 images"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(msdnet, tmp_path, change, message):
    arguments = dict(dict(policy="half", images=images(4, SIZE)), **change)
    with pytest.raises(ValueError, match=message):
        export_onnx(msdnet, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(msdnet, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_onnx(msdnet, tmp_path, "half")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(msdnet, tmp_path):
    (tmp_path / "out").mkdir()
    exported(msdnet, tmp_path / "out", "half")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_is_filled_and_remains(msdnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_onnx(msdnet, ".", "half", images=images(4, SIZE))
    assert os.listdir() == ["model.onnx"]  # of the directory itself, not of another in its place


def test_a_failed_verification_leaves_no_file(msdnet, tmp_path, monkeypatch):
    def other_runner(folder, layout, num_exits):
        run = runner(folder, layout, num_exits)
        return lambda images, thresholds: (run(images, thresholds)[0] + 0.01, run(images, thresholds)[1])

    monkeypatch.setattr(to_onnx, "runner", other_runner)
    with pytest.raises(ValueError, match="Verification failed"):
        exported(msdnet, tmp_path / "out", "half")
    assert not list(tmp_path.iterdir())


def test_other_exits_than_predicts_fail_the_verification(msdnet, tmp_path, monkeypatch):
    def other_runner(folder, layout, num_exits):
        run = runner(folder, layout, num_exits)
        return lambda images, thresholds: (run(images, thresholds)[0], 0 * run(images, thresholds)[1])

    monkeypatch.setattr(to_onnx, "runner", other_runner)
    with pytest.raises(ValueError, match="leaves at exit 0"):
        exported(msdnet, tmp_path / "out", "half")


def test_a_full_disk_leaves_no_file(msdnet, tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        exported(msdnet, tmp_path / "out", "half")
    assert not list(tmp_path.iterdir())


def test_untrained_exits_are_warned_of(tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="exits 0, 1 look untrained"):
        exported(settled(tiny_msdnet()), tmp_path / "out", ExitPolicy([0.5, 0.5, 0.0]))


def test_a_network_without_biases_that_has_seen_no_image_is_warned_of(tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"looks untrained: \d+ batch norms"):
        exported(tiny_vgg().eval(), tmp_path / "out", ExitPolicy([0.5, *[0.0] * (tiny_vgg().num_exits - 1)]))


def test_trained_exits_are_not(msdnet, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untrained")
        exported(msdnet, tmp_path / "out", "half")


def test_the_model_is_left_as_it_was(msdnet, tmp_path):
    before = {name: value.clone() for name, value in msdnet.state_dict().items()}
    msdnet.train()
    exported(msdnet, tmp_path / "out", "half")
    assert msdnet.training and all(torch.equal(value, before[name]) for name, value in msdnet.state_dict().items())
    msdnet.eval()


def test_images_near_a_threshold_are_told_apart():
    logits = torch.tensor([[[0.0, 1.0], [0.0, 3.0]], [[0.0, 1.0], [0.0, 3.0]]])
    confidence = logits[0].softmax(-1).amax(-1)
    policy = ExitPolicy([confidence[0].item() + 5e-6, 0.0])
    assert near_threshold(policy, logits).tolist() == [True, False]


def test_without_the_extra_the_error_names_it(msdnet, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(network.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'timm-dfs\[deploy\]'"):
        export_onnx(msdnet, tmp_path / "out", "half")


def test_a_confidence_without_a_form_in_onnx_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIDENCES, "new", max_prob)
    model = tiny_vgg()
    with pytest.raises(ValueError, match=r"'new' has no ONNX form"):
        export_onnx(model, tmp_path / "out", ExitPolicy([0.5, 0.5, 0.0], "new"), images=images(4))
    assert not list(tmp_path.iterdir())
