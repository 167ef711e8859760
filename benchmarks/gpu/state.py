"""A checkpoint as files of limited size, and as a checkpoint again.

    python benchmarks/gpu/state.py split runs/dfs/last.pth.tar --out out             # exact
    python benchmarks/gpu/state.py split runs/dfs/last.pth.tar --out out --half      # half the size
    python benchmarks/gpu/state.py join out/dfs-last.* --to runs/dfs/last.pth.tar

Halved, weights and moving averages of them are float16 and momentum is bfloat16, which has its range; vectors
(biases, norms and their statistics) stay as they are. At each interruption that rounds a weight by at most 1 part in
2,000: a run so resumed is a good run, but not bit for bit the uninterrupted one.
"""

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any

import torch

LARGEST = 15 * 1024**2
"""Bytes of a piece, unless told otherwise."""


def halved(state: Any, dtype: torch.dtype = torch.float16) -> Any:
    """A checkpoint's content with its matrices in 16 bits.

    Args:
        state: Tensors in dictionaries, lists and tuples, as deep as may be; anything else stays.
        dtype: Of the matrices; what belongs to an optimizer becomes bfloat16 in any case.
    """
    if isinstance(state, dict):
        return type(state)(
            (key, halved(value, torch.bfloat16 if key == "optimizer" else dtype)) for key, value in state.items()
        )
    if isinstance(state, (list, tuple)):
        return type(state)(halved(value, dtype) for value in state)
    if isinstance(state, torch.Tensor) and state.dtype == torch.float32 and state.ndim > 1:
        return state.to(dtype)
    return state


def split(checkpoint: Path, out: Path, half: bool = False, largest: int = LARGEST) -> list[Path]:
    """Write ``<run>-last.<k>-of-<n>-<sum>`` for the checkpoint of a run, named as its folder is.

    Args:
        checkpoint: File of ``CheckpointSaver``'s.
        out: Folder for the pieces.
        half: Halve it first.
        largest: Bytes in a piece at most.

    Raises:
        ValueError: If ``largest`` is not positive.
    """
    if largest < 1:
        raise ValueError(f"A piece of {largest} bytes holds nothing; give at least 1.")
    content = checkpoint.read_bytes()
    if half:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save(halved(state), buffer)
        content = buffer.getvalue()
    parts = [content[first : first + largest] for first in range(0, len(content), largest)]
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).hexdigest()[:12]
    name = f"{checkpoint.parent.name}-{checkpoint.name.partition('.')[0]}"
    files = [out / f"{name}.{k:02}-of-{len(parts):02}-{digest}" for k in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(part)
    return files


def join(pieces: list[Path], checkpoint: Path) -> None:
    """Write the checkpoint that ``pieces``, in any order, are all of.

    Raises:
        ValueError: If one is missing, is another checkpoint's, or has changed.
    """
    names = sorted(file.name for file in pieces)
    stem, _, rest = names[0].rpartition(".") if names else ("", "", "")
    _, _, last = rest.partition("-of-")
    count, _, digest = last.partition("-")
    wanted = [f"{stem}.{k:02}-of-{count}-{digest}" for k in range(int(count or 0))]
    if not wanted or names != wanted:
        raise ValueError(
            f"The pieces are {', '.join(names) or 'none'}; give {', '.join(wanted) or 'those of one split'}."
        )
    content = b"".join(file.read_bytes() for file in sorted(pieces, key=lambda file: file.name))
    if hashlib.sha256(content).hexdigest()[:12] != digest:
        raise ValueError(f"The pieces of {stem} have changed since they were written; fetch them again.")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    splitting = commands.add_parser("split")
    splitting.add_argument("checkpoint", type=Path)
    splitting.add_argument("--out", type=Path, required=True)
    splitting.add_argument("--half", action="store_true")
    splitting.add_argument("--largest", type=int, default=LARGEST, help="bytes in a piece")
    joining = commands.add_parser("join")
    joining.add_argument("pieces", nargs="+", type=Path)
    joining.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "split":
        for file in split(args.checkpoint, args.out, args.half, args.largest):
            print(f"{file}: {file.stat().st_size / 1024**2:.1f} MiB")
    else:
        join(args.pieces, args.to)


if __name__ == "__main__":
    main()
