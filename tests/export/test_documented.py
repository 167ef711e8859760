"""The snippets of the documentation run without torch and give the exits of ``predict``."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, settled, tiny_msdnet
from PIL import Image

import timm_dfs
from timm_dfs.data.images import labels_of
from timm_dfs.export import export_onnx

pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy")

PAGE = "".join((ROOT / "docs" / name).read_text() for name in ("runtimes.md", "serving.md"))


def snippet(language):
    return re.search(rf"<!-- snippet: {language} -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settled(tiny_msdnet())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    export_onnx(model, folder / "exported", timm_dfs.ExitPolicy([0.6, 0.6, 0.0]))
    return folder


@pytest.mark.filterwarnings("ignore:.*looks? untrained")
def test_the_python_snippet_predicts_as_the_package_does(model, folder):
    without = "import sys; sys.modules.update(torch=None, timm=None, timm_dfs=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", without + snippet("python")], cwd=folder, capture_output=True, text=True, check=True
    )
    image = timm_dfs.data.images.open_image(folder / "image.png")
    logits, exit_index = timm_dfs.predict(
        model, timm_dfs.data.images.prepare(model, [image]), timm_dfs.ExitPolicy([0.6, 0.6, 0.0])
    )
    assert done.stdout.split() == [labels_of(model)[logits.argmax()], str(exit_index.item())]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node and its npm")
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_javascript_snippet_gives_the_same_exits(model, folder, tmp_path, package):
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"{package}@1.30"]
    subprocess.run(install, cwd=tmp_path, capture_output=True, check=True)
    batch = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (tmp_path / "images.bin").write_bytes(batch.numpy().tobytes())
    shutil.copytree(folder / "exported", tmp_path / "exported")
    before = 'import * as fs from "node:fs"; const batch = 8; const bytes = fs.readFileSync("images.bin");\n'
    before += "const pixels = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);\n"
    script = snippet("javascript").replace('"onnxruntime-node"', f'"{package}"')
    if package == "onnxruntime-web":
        script = script.replace("import ort", "import * as ort")
        script = script.replace('create("exported/model.onnx")', 'create(fs.readFileSync("exported/model.onnx"))')
    after = '\nconsole.log("exits " + Array.from(exit_index.data, Number).join(" "));\n'
    (tmp_path / "run.mjs").write_text(before + script + after)
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = timm_dfs.predict(model, batch, timm_dfs.ExitPolicy([0.6, 0.6, 0.0])).exit_index
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("exits")]
    assert line == "exits " + " ".join(map(str, expected.tolist()))
