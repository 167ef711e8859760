"""The serving examples need no torch, prepare images as the package does, and give the predictions of ``predict``."""

import ast
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, settled, tiny_msdnet
from PIL import Image

import timm_dfs
from timm_dfs.data.images import labels_of, prepare
from timm_dfs.export import export_onnx

pytest.importorskip("onnxruntime", reason="needs the extra deploy")
onnx = pytest.importorskip("onnx", reason="needs the extra deploy")

EXAMPLES = ROOT / "examples"
POLICY = timm_dfs.ExitPolicy([0.6, 0.6, 0.0])

sys.path.insert(0, str(EXAMPLES))
from exported_graph import ExportedGraph  # noqa: E402


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    """A network whose images are resized to 36 and cropped to 32."""
    torch.manual_seed(0)
    model = settled(tiny_msdnet())
    model.pretrained_cfg.update(crop_pct=32 / 36, label_names=("ant", "bee", "cat", "dog", "eel"))
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "graph"
    export_onnx(model, folder, POLICY)
    return folder / "model.onnx"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_imports_neither_torch_nor_this_package(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in names}
    assert "numpy" in roots and not roots & {"torch", "torchvision", "timm", "timm_dfs"}


@pytest.mark.filterwarnings("ignore:.*look untrained")
@pytest.mark.parametrize(
    "content",
    [
        encoded(noise(32, 32)),
        encoded(noise(61, 47)),
        encoded(noise(20, 33)),
        encoded(noise(50, 40).convert("L")),
        encoded(noise(50, 40).quantize(16)),
        encoded(noise(50, 40), "JPEG", exif=Image.Exif()),
    ],
    ids=["of its size", "landscape", "small portrait", "grey", "palette", "jpeg"],
)
def test_an_image_is_prepared_as_the_package_prepares_it(model, exported, content, tmp_path):
    (tmp_path / "image").write_bytes(content)
    expected = prepare(model, [timm_dfs.open_image(tmp_path / "image")])[0]
    got = ExportedGraph(exported).prepare(content)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_a_photograph_is_turned_upright(exported):
    upright = noise(50, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    graph = ExportedGraph(exported)
    np.testing.assert_array_equal(graph.prepare(turned), graph.prepare(encoded(upright)))


@pytest.mark.filterwarnings("ignore:.*look untrained")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "not an image"),
        (encoded(noise(50, 40))[:400], "damaged"),
        (encoded(noise(50, 40).convert("RGBA")), "without transparency"),
        (encoded(Image.new("I;16", (40, 40))), "I;16"),
    ],
)
def test_an_image_that_cannot_be_prepared_is_refused(exported, content, message):
    with pytest.raises(ValueError, match=message):
        ExportedGraph(exported).prepare(content)


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_a_network_whose_images_need_another_crop_is_refused(exported, tmp_path):
    network = onnx.load(exported)
    next(fact for fact in network.metadata_props if fact.key == "crop_mode").value = "squash"
    onnx.save(network, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="squash"):
        ExportedGraph(tmp_path / "model.onnx")


def predictions(model, contents, folder):
    """What the package predicts for image files: (label, exit) of each."""
    images = []
    for content in contents:
        (folder / "probe").write_bytes(content)
        images.append(timm_dfs.open_image(folder / "probe"))
    logits, exits = timm_dfs.predict(model, prepare(model, images), POLICY)
    return [(labels_of(model)[k], exit_index) for k, exit_index in zip(logits.argmax(1).tolist(), exits.tolist())]


@pytest.fixture(scope="module")
def contents():
    return [encoded(noise(40 + seed, 40, seed)) for seed in range(12)]


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_labels_and_exits_are_those_of_predict(model, exported, contents, tmp_path):
    graph = ExportedGraph(exported)
    labels, exits = graph.predict(np.stack([graph.prepare(content) for content in contents]))
    expected = predictions(model, contents, tmp_path)
    assert list(zip(labels, exits.tolist())) == expected
    assert len({exit_index for _, exit_index in expected}) > 1


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_a_file_without_early_exits_gives_classes_and_no_exit(model, contents, tmp_path):
    export_onnx(model, tmp_path / "last", layout="last")
    graph = ExportedGraph(tmp_path / "last" / "model.onnx")
    images = np.stack([graph.prepare(content) for content in contents])
    labels, exits = graph.predict(images)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).argmax(1).tolist()
    assert labels == [labels_of(model)[k] for k in expected] and set(exits.tolist()) == {-1}


# With Ray.

ENVIRONMENT = dict(os.environ, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_images_of_a_folder_and_its_subfolders_are_scored(model, exported, contents, tmp_path):
    pytest.importorskip("ray.data", reason="needs ray[data]")
    (tmp_path / "images" / "more").mkdir(parents=True)
    for place, content in enumerate(contents):
        (tmp_path / "images" / ("more" if place % 2 else "") / f"{place}.png").write_bytes(content)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    command = [sys.executable, EXAMPLES / "score_ray.py", exported, "images", "--output", "scores", "--cpus", "2"]
    subprocess.run([*command, "--batch-size", "5"], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=300)
    rows = [row for file in (tmp_path / "scores").glob("*.csv") for row in csv.DictReader(file.open())]
    rows.sort(key=lambda row: int(os.path.basename(row["path"]).partition(".")[0]))
    assert [(row["label"], int(row["exit"])) for row in rows] == predictions(model, contents, tmp_path)


@pytest.fixture
def server(exported):
    """Address of the serving example, in a process of its own."""
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, EXAMPLES / "serve_ray.py", exported, "--port", str(port), "--cpus", "2"]
    process = subprocess.Popen([*command, "--replicas", "1", "--batch-wait-timeout-s", "0.3"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 180
        address = f"http://127.0.0.1:{port}/"
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(address):
    try:
        urllib.request.urlopen(f"{address}-/healthz", timeout=5).close()
        return post(address, b"")[0] == 400
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def post(address, content):
    """Status and body of a response."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, content), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_the_server_predicts_as_the_package_does_and_refuses_what_is_no_image(model, server, contents, tmp_path):
    sent = [*contents, b"no image"]
    with ThreadPoolExecutor(len(sent)) as clients:  # at once: some share a batch
        *responses, (status, refusal) = clients.map(post, [server] * len(sent), sent)
    assert [status for status, _ in responses] == [200] * len(contents)
    assert [(body["label"], body["exit"]) for _, body in responses] == predictions(model, contents, tmp_path)
    assert max(body["batch"] for _, body in responses) > 1
    assert status == 400 and "not an image" in refusal
