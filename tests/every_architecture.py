"""Check of every timm architecture with exits, on shapes without data; writes ``docs/coverage.md``.

    python tests/every_architecture.py docs/coverage.md

takes one to two hours on one core. An interrupted run resumes from ``coverage.jsonl`` in the same folder, which is
removed at the end.
"""

import ast
import hashlib
import inspect
import json
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_dfs.base.evaluating import BATCH, without_data
from timm_dfs.models.dfs_twins import BASES
from timm_dfs.wrapped import exit_points, families, feature_heads, with_classifier

CLASSES = 1000

MOST_OF_HEAD = 0.15
"""Largest share that an early exit's head may have in the multiply-adds up to its exit."""


def examine(base):
    """Exits of an architecture's twin, and their costs.

    Costs are counted by torch's ``FlopCounterMode`` (convolutions, matrix products, attention), as fractions of the
    last exit's, earlier heads included.
    """
    model = timm.create_model(f"dfs_{base}", num_classes=CLASSES, device="meta").eval().requires_grad_(False)
    size = (model.in_chans, *model.pretrained_cfg["input_size"][1:])
    costs, heads, shapes = [], [], []

    def read(k, feature):
        before = counter.get_total_flops()
        logits = model.answer(k, feature)
        heads.append(counter.get_total_flops() - before)
        return logits

    def visit(k, logits):
        costs.append(counter.get_total_flops())
        shapes.append(tuple(logits.shape))

    with FlopCounterMode(display=False) as counter, without_data(model, size) as images:
        model.walk(images, visit, read=read)
    with without_data(model, size) as images:
        plain = tuple(model(images).shape)
    return dict(
        architecture=base,
        exits=[point.removeprefix("backbone.") for point in model.exit_points],
        costs=[cost / costs[-1] for cost in costs],
        heads=[head / cost for head, cost in zip(heads[:-1], costs)],
        outputs=[*shapes, plain],
        shrinks=model.shrinks,
    )


def faults(found):
    """Faults of an architecture in what :func:`examine` found."""
    costs = found["costs"]
    wrong = []
    if len(costs) < 2 or len(costs) != len(found["exits"]) + 1:
        wrong.append(f"{len(costs)} outputs for {len(found['exits'])} early exits")
    if any(tuple(shape) != (BATCH, CLASSES) for shape in found["outputs"]):
        wrong.append(f"outputs of shapes {found['outputs']}")
    if not all(0 < early < late for early, late in pairwise(costs)):
        wrong.append(f"costs that do not rise: {costs}")
    if max(found["heads"]) > MOST_OF_HEAD:
        wrong.append(f"heads with a share of {[round(share, 3) for share in found['heads']]}")
    if not found["shrinks"]:
        wrong.append("a batch that cannot shrink")
    return wrong


def digest():
    """Hash of the code that determines exit points and their heads."""
    sources = map(inspect.getsource, (families, exit_points, feature_heads, with_classifier))
    return hashlib.sha256("".join(map(_statements, sources)).encode()).hexdigest()[:16]


def _statements(source):
    """The code's statements, without imports, docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [part for part in node.body if not _has_no_effect(part)]
    return _dump(tree)


def _dump(node):
    """The tree as text: unlike ``ast.dump``'s, the same for every Python that supports the code."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    given = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in given)})"


def _has_no_effect(node):
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, (ast.Import, ast.ImportFrom))


def stamp():
    return f"<!-- exit points {digest()}, timm {timm.__version__} -->"


def table(rows):
    """The page, from the findings or the error of each architecture."""
    good = [row for row in rows if "error" not in row and not faults(row)]
    bad = [row for row in rows if row not in good]
    lines = [
        "# Every architecture with exits",
        stamp(),
        f"Made by `tests/every_architecture.py` with timm {timm.__version__}, torch {torch.__version__}, without data"
        " or weights: a twin of each architecture is built and run on shapes. Of"
        f" {len(rows)} architectures, {len(good)} have logits at every exit, a batch that shrinks as samples exit,"
        " costs that rise from exit to exit, and"
        f" heads with at most {MOST_OF_HEAD:.0%} of the multiply-adds up to them.",
        "Cost: multiply-adds up to each exit, earlier heads included, as a share of the last exit's, counted by torch"
        " (convolutions, matrix products, attention).",
    ]
    if bad:
        lines += ["## Faults", "| architecture | fault |\n|---|---|"]
        lines[-1] += "".join(
            f"\n| {row['architecture']} | {row.get('error') or '; '.join(faults(row))} |" for row in bad
        )
    lines += ["## All", "| architecture | early exits after | cost at each exit |\n|---|---|---|"]
    for row in rows:
        if "error" not in row:
            costs = " ".join(f"{cost:.2f}" for cost in row["costs"])
            lines[-1] += f"\n| {row['architecture']} | {' '.join(row['exits'])} | {costs} |"
    return "\n\n".join(lines) + "\n"


def main(page):
    warnings.simplefilter("ignore")
    page = Path(page)
    notes = page.with_suffix(".jsonl")
    known = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    rows = {row["architecture"]: row for row in known if row["stamp"] == stamp()}
    with notes.open("a") as file:
        for base in BASES:
            if base in rows:
                continue
            try:
                row = examine(base)
            except Exception as error:
                row = dict(architecture=base, error=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
            rows[base] = row
            print(base, row.get("error") or "; ".join(faults(row)) or "good", flush=True)
            file.write(json.dumps(dict(row, stamp=stamp())) + "\n")
            file.flush()
    page.write_text(table([rows[name] for name in timm.list_models() if name in rows]))
    notes.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
