"""A small data set of images as a few files of limited size, and as arrays again on the machine that trains.

    python benchmarks/gpu/pack.py pack cifar100/*.parquet --out .gpu/data --pieces 2
    python benchmarks/gpu/pack.py unpack .gpu/data --out ~/cifar100          # where the pieces were taken

Images travel as they are stored (lossless WebP takes 0.6 of the pixels' bytes) and are decoded once, on arrival.
Unpacking needs pillow and safetensors only, and compares the pixels with what was packed.
"""

import argparse
import hashlib
import io
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

SPLITS = ("train", "test")


def pack(files: list[Path], out: Path, pieces: int, image: str = "img", label: str = "fine_label") -> list[Path]:
    """Write the images of parquet files into ``pieces`` files of about the same size.

    Args:
        files: Parquet files; each one's name begins with its split's, as on the Hub.
        out: Folder for the pieces.
        pieces: How many.
        image: Column of the images.
        label: Column of the labels.

    Raises:
        ValueError: If a file's name begins with no split's, or there are no pieces to make.
    """
    from pyarrow import parquet

    if pieces < 1 or not files:
        raise ValueError(f"{pieces} pieces of {len(files)} files cannot be made; give at least one of each.")
    encoded: list[bytes] = []
    labels: list[int] = []
    splits: list[int] = []
    for file in sorted(files, key=lambda file: file.name):
        (split,) = [i for i, name in enumerate(SPLITS) if file.name.startswith(name)] or [None]
        if split is None:
            raise ValueError(f"{file} is of no known split; its name must begin with {' or '.join(SPLITS)}.")
        table = parquet.read_table(file, columns=[image, label])
        encoded += [picture["bytes"] for picture in table[image].to_pylist()]
        labels += table[label].to_pylist()
        splits += [split] * len(table)
    pixels = _decode_all(encoded)
    sums = {name: _digest(pixels[np.array(splits) == i]) for i, name in enumerate(SPLITS)}
    ends = np.cumsum([len(data) for data in encoded])
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * k / pieces)) for k in range(1, pieces)), len(encoded)]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for k, (first, last) in enumerate(pairwise(cuts)):
        written.append(out / f"images-{k}-of-{pieces}.safetensors")
        tensors = dict(
            data=np.frombuffer(b"".join(encoded[first:last]), np.uint8),
            ends=np.cumsum([len(data) for data in encoded[first:last]]),
            labels=np.array(labels[first:last]),
            splits=np.array(splits[first:last]),
        )
        save_file(tensors, written[-1], metadata=dict(sha256=json.dumps(sums)))
    return written


def unpack(folder: Path, out: Path) -> dict[str, int]:
    """Write ``<split>_images.npy`` (N, C, H, W), bytes, and ``<split>_labels.npy`` (N,) from all pieces.

    Returns:
        Number of images by split.

    Raises:
        ValueError: If pieces are missing, or the pixels are not those that were packed.
    """
    files = sorted(folder.glob("images-*-of-*.safetensors"))
    missing = _missing(files)
    if missing:
        raise ValueError(f"{folder} lacks {missing}; carry all pieces there before unpacking.")
    encoded, labels, splits, sums = [], [], [], {}
    for file in files:
        with safe_open(file, "numpy") as piece:
            sums = json.loads(piece.metadata()["sha256"])
            data, ends = piece.get_tensor("data").tobytes(), piece.get_tensor("ends")
            encoded += [data[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
            labels.append(piece.get_tensor("labels"))
            splits.append(piece.get_tensor("splits"))
    pixels, labels, splits = _decode_all(encoded), np.concatenate(labels), np.concatenate(splits)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for i, name in enumerate(SPLITS):
        chosen = splits == i
        if _digest(pixels[chosen]) != sums[name]:
            raise ValueError(f"The pixels of {name} are not those that were packed; another decoder, or mixed pieces.")
        np.save(out / f"{name}_images.npy", pixels[chosen])
        np.save(out / f"{name}_labels.npy", labels[chosen])
        counts[name] = int(chosen.sum())
    return counts


def write_folders(folder: Path, out: Path) -> None:
    """Write an unpacked data set as ``<split>/<label>/<number>.png``, which train.py reads without more packages.

    Args:
        folder: Where :func:`unpack` wrote it.
        out: Folder for the splits'.
    """
    for name in SPLITS:
        images, labels = read_split(folder, name)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = out / name / f"{label:03}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(file, compress_level=0)  # quick to read


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W), bytes, and labels (N,) of a split of an unpacked data set.

    Args:
        folder: Where :func:`unpack` wrote them.
        split: A name, or part of it in the words of Hugging Face: ``train[:45000]``, ``train[45000:]``.

    Raises:
        ValueError: If there is no such split.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if match is None or not (folder / f"{match[1]}_images.npy").is_file():
        raise ValueError(f"{folder} has no split {split!r}; give train or test, or part of it as in 'train[:45000]'.")
    part = slice(*(int(number) if number else None for number in match.groups()[1:]))
    images, labels = (np.load(folder / f"{match[1]}_{kind}.npy")[part] for kind in ("images", "labels"))
    return images, labels


def _missing(files: list[Path]) -> str:
    """Names of the pieces that there should be, if they are not there."""
    if not files:
        return "every piece (images-*-of-*.safetensors)"
    pieces = int(files[0].stem.rpartition("-")[2])
    names = {f"images-{k}-of-{pieces}.safetensors" for k in range(pieces)}
    return " ".join(sorted(names ^ {file.name for file in files}))


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


def _decode_all(encoded: list[bytes]) -> np.ndarray:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(_decode, encoded, chunksize=512)))


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack")
    packing.add_argument("files", nargs="+", type=Path)
    packing.add_argument("--pieces", type=int, default=2)
    packing.add_argument("--image", default="img")
    packing.add_argument("--label", default="fine_label")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("--folders", type=Path, help="and write train.py's folders of images there")
    for command in (packing, unpacking):
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "pack":
        for file in pack(args.files, args.out, args.pieces, args.image, args.label):
            print(f"{file}: {file.stat().st_size / 1024**2:.1f} MiB")
    else:
        print(" ".join(f"{count} {name}" for name, count in unpack(args.folder, args.out).items()))
        if args.folders is not None:
            write_folders(args.out, args.folders)


if __name__ == "__main__":
    main()
