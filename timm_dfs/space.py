"""Web page that shows every exit's prediction for an image, and the exit taken at an operating point with its cost."""

import html
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .base.evaluating import evaluating
from .base.model import MultiExitModel
from .data.images import labels_of, open_image, prepare
from .demo import photographs
from .evaluation.flops import Costs
from .inference.policy import ExitPolicy
from .inference.prediction import resolve_policy

ONE_THRESHOLD = "one threshold for all exits"
"""Name of the operating point that the slider sets."""

_STYLE = """
.dfs-bar {background: #8883; border-radius: 6px; height: 28px; position: relative; overflow: hidden; margin: 8px 0}
.dfs-bar div {background: #2ca02c; height: 100%}
.dfs-bar .dfs-more {background: #e0873e}
.dfs-bar span {position: absolute; left: 10px; top: 4px; font-size: 14px}
.dfs-exits {width: 100%; border-collapse: collapse; font-size: 14px}
.dfs-exits td, .dfs-exits th {padding: 4px 8px; text-align: left; border-bottom: 1px solid #8884}
.dfs-exits tr.dfs-taken {background: #2ca02c33; font-weight: bold}
.dfs-exits tr.dfs-unused {opacity: .45}
"""


def all_logits(model: MultiExitModel, file: str) -> torch.Tensor:
    """Logits (E, 1, C) of every exit for an image file."""
    with evaluating(model), torch.inference_mode():
        return torch.stack(model.forward_exits(prepare(model, [open_image(file)]))).float().cpu()


def describe(logits: torch.Tensor, policy: ExitPolicy, labels: tuple[str, ...], costs: list[int], whole: int) -> str:
    """HTML of one image's prediction: class, exit taken, cost, and the top five classes of each exit.

    Args:
        logits: All exits' logits (E, 1, C).
        policy: Policy that chooses the exit.
        labels: Names of the classes.
        costs: Multiply-adds up to each exit.
        whole: Multiply-adds of the last exit alone.
    """
    k = int(policy.exit_index(logits)[0])
    probabilities = policy.probabilities(logits)[:, 0]
    share = costs[k] / whole
    best = html.escape(labels[int(probabilities[k].argmax())])
    rows = []
    for j, row in enumerate(probabilities):
        top = row.topk(min(5, len(row)))
        named = ", ".join(
            f"{html.escape(labels[i])} {p:.0%}" for p, i in zip(top.values.tolist(), top.indices.tolist())
        )
        threshold = policy.thresholds[j] if j < len(policy.thresholds) - 1 else 0.0
        answers = j in policy.answering
        kind = "dfs-taken" if j == k else "dfs-unused" if j > k or not answers else ""
        rows.append(
            f'<tr class="{kind}"><td>{j}</td><td>{named}</td>'
            f"<td>{f'{threshold:.2f}' if answers else 'never'}</td><td>{costs[j] / 1e6:.1f} M</td></tr>"
        )
    return (
        f"<style>{_STYLE}</style>"
        f'<h2 class="dfs-prediction">{best}</h2><p>Exit {k} of exits 0 to {len(costs) - 1} was taken.</p>'
        f'<div class="dfs-bar"><div class="{"dfs-more" if share > 1 else ""}" style="width: {min(share, 1):.0%}"></div>'
        f"<span>{costs[k] / 1e6:.1f} M multiply-adds, {share:.0%} of the last exit alone</span></div>"
        '<table class="dfs-exits"><tr><th>exit</th><th>top five</th><th>threshold</th><th>cost up to here</th></tr>'
        f"{''.join(rows)}</table><p>Grey: exits that early exit does not compute, shown for comparison.</p>"
    )


def page(model: MultiExitModel, name: str) -> Any:
    """Page for a model, a ``gradio.Blocks``.

    Raises:
        ModuleNotFoundError: If gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page works without a network
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The page needs the space extra: pip install 'timm-dfs[space]'.") from error
    labels = labels_of(model)
    counted = Costs(model)
    whole = counted.of_last_exit_alone()

    def policy_of(point: str, threshold: float) -> ExitPolicy:
        if point == ONE_THRESHOLD:
            return ExitPolicy([threshold] * (model.num_exits - 1) + [0.0])
        return resolve_policy(model, point)

    def show(logits: torch.Tensor | None, point: str, threshold: float) -> str:
        if logits is None:
            return "Drop an image, or choose one of the examples."
        policy = policy_of(point, threshold)
        return describe(logits, policy, labels, counted.of_exits(lazy=True, heads=policy.answering), whole)

    def look(file: str | None, point: str, threshold: float) -> tuple[torch.Tensor | None, str]:
        if file is None:
            return None, show(None, point, threshold)
        try:
            logits = all_logits(model, file)
        except (ValueError, OSError) as error:
            reason = str(error).replace(str(file), f"'{Path(file).name}'")
            return None, f'<p class="dfs-error">{html.escape(reason)}</p>'
        return logits, show(logits, point, threshold)

    def slide(logits: torch.Tensor | None, threshold: float) -> tuple[str, str]:
        return ONE_THRESHOLD, show(logits, ONE_THRESHOLD, threshold)

    with gradio.Blocks(title=f"timm-dfs: {name}", analytics_enabled=False) as blocks:
        gradio.Markdown(
            f"# Early exit, live\n`{name}` has {model.num_exits} exits. An image takes the first exit whose confidence "
            "reaches its threshold; deeper layers are not computed. The network predicts one of its own classes for "
            "any image, so images of anything else get a wrong class, perhaps with high confidence."
        )
        logits = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=2):
                file = gradio.File(label="An image: drop it here", type="filepath", elem_id="image")
                preview = gradio.Image(label="Your image", interactive=False, height=220)
                points = [*model.presets, ONE_THRESHOLD]
                point = gradio.Dropdown(points, value=points[0], label="Operating point", elem_id="point")
                threshold = gradio.Slider(
                    0, 1, value=0.5, step=0.01, label="Threshold, for all exits", elem_id="threshold"
                )
            with gradio.Column(scale=3):
                shown = gradio.HTML(show(None, points[0], 0.5), elem_id="prediction")
        inputs = [file, point, threshold]
        file.change(look, inputs, [logits, shown]).then(_preview, file, preview)
        point.input(show, [logits, point, threshold], shown)
        threshold.input(slide, [logits, threshold], [point, shown], show_progress="hidden", trigger_mode="always_last")
        if examples := _examples():
            gradio.Examples(examples, file, label="Photographs that come with scikit-image")
    return blocks


def _preview(file: str | None) -> Any:
    try:
        return open_image(file) if file else None
    except (ValueError, OSError):
        return None


def _examples() -> list[str]:
    """Paths of the demo's photographs, stored as files; none if scikit-image is not installed."""
    try:
        images = photographs()
    except ModuleNotFoundError:
        return []
    folder = Path(tempfile.mkdtemp(prefix="timm-dfs-"))
    files = []
    for name, image in images.items():
        image.thumbnail((400, 400))
        image.save(folder / f"{name}.png")
        files.append(str(folder / f"{name}.png"))
    return files


def launch(blocks: Any, port: int | None = None, wait: bool = True) -> str:
    """Serve the page on this machine and return its address.

    Args:
        blocks: The page.
        port: Port; by default the first free one from 7860 on.
        wait: Whether to return only when interrupted.
    """
    import gradio

    fonts = ["system-ui", "sans-serif"]  # a font of the theme's would come from the network
    _, address, _ = blocks.launch(
        server_port=port,
        prevent_thread_lock=not wait,
        quiet=not wait,
        share=False,
        ssr_mode=False,
        theme=gradio.themes.Base(font=fonts, font_mono=["monospace"]),
        footer_links=[],
    )
    return address
