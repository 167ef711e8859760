"""The documented C++ program and web page predict as ``predict`` does; its Triton configuration is valid."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, settled, tiny_msdnet
from test_documented import snippet

import timm_dfs
from timm_dfs.export import export_onnx

pytest.importorskip("onnx", reason="needs the extra deploy")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra deploy")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*look untrained")]

POLICY = timm_dfs.ExitPolicy([0.93, 0.985, 0.0])
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE")
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)


@pytest.fixture(scope="module")
def expected():
    """A network and images (16, 3, 32, 32) of which some take each exit, and what ``predict`` makes of them."""
    torch.manual_seed(0)
    model = settled(tiny_msdnet())
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prediction = timm_dfs.predict(model, images, POLICY)
    assert set(prediction.exit_index.tolist()) == {0, 1, 2}
    return model, images, prediction


@pytest.fixture
def folder(expected, tmp_path):
    """A folder as both snippets expect it: the exported file and the images as raw float32."""
    model, images, _ = expected
    export_onnx(model, tmp_path / "exported", POLICY)
    (tmp_path / "images.bin").write_bytes(images.numpy().tobytes())
    return tmp_path


def assert_as_predicted(exits, logits, prediction):
    assert exits == prediction.exit_index.tolist()
    np.testing.assert_allclose(logits, prediction.logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither CXX nor c++")
@pytest.mark.skipif(HEADERS is None, reason="ONNXRUNTIME_INCLUDE names no folder with onnxruntime_c_api.h")
@pytest.mark.skipif(LIBRARY is None, reason="the installed onnxruntime has no separate libonnxruntime.so")
def test_the_cpp_snippet_compiles_without_warnings_and_predicts_as_the_package_does(expected, folder):
    (folder / "run.cpp").write_text(snippet("cpp"))
    (folder / "libonnxruntime.so.1").symlink_to(LIBRARY)  # its soname, which the loader looks for
    compile_it = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "run.cpp", "-isystem", HEADERS, "-o", "run"]
    subprocess.run([*compile_it, "libonnxruntime.so.1", "-Wl,-rpath,$ORIGIN"], cwd=folder, check=True)
    program = ["./run", "exported/model.onnx", "images.bin", "16"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    logits = np.array([row[1:] for row in rows], float)
    assert logits.shape == (16, CLASSES)
    assert_as_predicted([int(row[0]) for row in rows], logits, expected[-1])


def test_the_triton_configuration_is_valid_and_names_what_the_file_has(folder):
    for module in ("tritonclient", "rapidjson"):
        pytest.importorskip(module, reason="needs tritonclient[grpc], which defines the configuration's fields")
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

    config = text_format.Parse(snippet("protobuf"), ModelConfig())
    session = onnxruntime.InferenceSession(folder / "exported" / "model.onnx")
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for given, tensors in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(each.name, DataType.Name(each.data_type)) for each in given] == [
            (tensor.name, types[tensor.type]) for tensor in tensors
        ]
        for each, tensor in zip(given, tensors):
            shape = each.reshape.shape if each.HasField("reshape") else each.dims
            expected = [
                100 if size == CLASSES else size for size in tensor.shape[1:]
            ]  # the page's network has 100 classes
            assert isinstance(tensor.shape[0], str) and list(shape) == expected  # the first is the batch


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *args):
        pass


@pytest.fixture
def address(folder):
    """A server on the loopback interface, whose root is the folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, for onnxruntime-web")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_the_web_page_predicts_in_a_browser_as_the_package_does(expected, folder, address):
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-web@1.30"]
    subprocess.run(install, cwd=folder, capture_output=True, check=True)
    (folder / "index.html").write_text(snippet("html"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        troubles = []
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.goto(address)
        tab.wait_for_function("document.body?.textContent.startsWith('{')", timeout=60_000)
        shown = json.loads(tab.locator("body").inner_text())
        browser.close()
    assert troubles == []
    assert_as_predicted(shown["exits"], np.reshape(shown["logits"], (16, CLASSES)), expected[-1])
