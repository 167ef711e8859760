"""Upload of a model's folder to its Hub repository: checked before, in one commit, read back and compared."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..base.model import MultiExitModel
from ..pretrained.checks import check_config
from ..pretrained.downloads import fetch, without_token
from ..pretrained.packaged import CONFIG_FILE, WEIGHTS_FILE
from .card import stale
from .folder import BASE_LICENSE_FILE, CARD_FILE, CURVE_FILE, RESULTS_FILE, golden_logits, load

FILES = (WEIGHTS_FILE, CONFIG_FILE, RESULTS_FILE, CARD_FILE, CURVE_FILE)
"""The files of a repository."""

_REMEDIES = {
    401: "Log in with 'hf auth login', using a token with write access.",
    403: "Your token has no write access there; check its permissions, or give another --repo.",
    404: "There is no such repository or revision, or your token has no access to it.",
    409: "The repository is being changed at the same time; run this again.",
    412: "There is a newer commit; look at it, and run this again.",
    429: "The Hub limits the rate of requests; run this again later.",
}


@dataclass(frozen=True)
class Published:
    """Result of :func:`publish`.

    Attributes:
        repo: The repository.
        commit: The commit that holds the folder's files.
        changed: Whether :func:`publish` made that commit.
        others: Other files in the repository, which were left unchanged.
    """

    repo: str
    commit: str
    changed: bool
    others: tuple[str, ...]


def files_of(folder: Path) -> tuple[str, ...]:
    """The files of a folder's repository: :data:`FILES`, and the licence of its base weights if it has one."""
    return (*FILES, BASE_LICENSE_FILE) if (folder / BASE_LICENSE_FILE).is_file() else FILES


def check_folder(folder: Path) -> MultiExitModel:
    """Load a folder's model after all checks that need no network.

    Raises:
        ValueError: If a file is missing, the config is not that of the model or does not fit the weights, a generated
            file does not match the results, or the model's logits are not those that were recorded.
    """
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}; 'timm-dfs export-hub' and 'timm-dfs card' make them.")
    config, results = (json.loads((folder / file).read_text()) for file in (CONFIG_FILE, RESULTS_FILE))
    name = results["model"]
    check_config(config, name, lambda _: len(results["flops"]), str(folder))
    model = load(f"local-dir:{folder}")
    if model.num_exits != len(results["flops"]):
        raise ValueError(f"{folder}'s network has {model.num_exits} exits, its results {len(results['flops'])}.")
    if "base_weights" in results and BASE_LICENSE_FILE not in files_of(folder):
        raise ValueError(f"{folder} has no {BASE_LICENSE_FILE}, the licence of the weights that training started from.")
    if old := stale(folder):
        raise ValueError(f"{' and '.join(old)} in {folder} do not match its results; run 'timm-dfs card {folder}'.")
    found, recorded = (torch.tensor(logits) for logits in (golden_logits(model), results["golden_logits"]))
    if found.shape != recorded.shape or not torch.allclose(found, recorded, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The network in {folder} does not give the golden logits of its {RESULTS_FILE}: the weights are not those "
            "that were measured. Measure them again with 'timm-dfs export-hub'."
        )
    return model


def publish(
    folder: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Published:
    """Upload a folder to a Hub repository, and read it back.

    The repository changes in one commit or not at all: after an interruption it is unchanged or complete, and
    publishing again does the rest.

    Args:
        folder: A model's folder.
        repo: ``user/name``; created if it does not exist.
        private: Whether only its owner can see it.
        revision: Branch; created if it does not exist. By default the main one.
        report: Called with a line for each step.

    Raises:
        ValueError: If a check of the folder or the repository fails; nothing is uploaded.
        OSError: If the Hub refuses or the connection breaks.
    """
    report(f"checking {folder}")
    model = check_folder(folder)
    api = HfApi(library_name="timm-dfs")
    with _in_words(f"Creating {repo}"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.repo_info(repo, revision=revision)
    if private and not before.private:
        raise ValueError(f"{repo} exists and is public; make it private on the Hub first, or leave out --private.")
    remote = {file.rfilename for file in before.siblings or ()}
    files = files_of(folder)
    name = json.loads((folder / CONFIG_FILE).read_text())["architecture"]
    with tempfile.TemporaryDirectory() as cache:
        if CONFIG_FILE in remote:
            with _in_words(f"Looking at what {repo} holds"):
                config = json.loads(fetch(f"{repo}@{before.sha}", CONFIG_FILE, cache).read_text())
            if config.get("architecture") != name:
                raise ValueError(f"{repo} holds a {config.get('architecture')}, not a {name}; give another --repo.")
    report(f"uploading to {repo}")
    with _in_words(f"Uploading to {repo}"):
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(file, folder / file) for file in files],
            commit_message=f"Publish {name}",
            revision=revision,
            parent_commit=before.sha,
        ).oid
    changed = commit != before.sha
    report(f"reading {repo} back" if changed else f"nothing has changed; reading {repo} back")
    try:
        _compare(model, f"hf-hub:{repo}@{commit}")
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{repo} is at commit {commit}, but reading it back failed: {error} Run this again."
        ) from None
    others = sorted(remote - {*files, ".gitattributes"})
    return Published(repo, commit, changed, tuple(others))


def _compare(model: MultiExitModel, name: str) -> None:
    """Raise ``ValueError`` unless the model loaded by that name, with an empty cache, equals ``model``."""
    with tempfile.TemporaryDirectory() as cache, _in_words("Downloading"):
        again = load(name, cache_dir=cache)
    ours, theirs = model.state_dict(), again.state_dict()
    different = [key for key in ours.keys() | theirs.keys() if not _same(ours.get(key), theirs.get(key))]
    if different:
        raise ValueError(f"{len(different)} tensors differ, {min(different)} among them.")
    if again.presets != model.presets:
        raise ValueError(f"the presets are {again.presets}, not {model.presets}.")


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is not None and theirs is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@contextmanager
def _in_words(doing: str) -> Iterator[None]:
    """Turn any error of the Hub's client into one of a single line, with a remedy and without the token."""
    try:
        yield
    except (HTTPError, RuntimeError, KeyError, ValueError, OSError) as error:
        cause: BaseException = error  # an upload's error is wrapped in a RuntimeError
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            what = f"the Hub answered {status}"
            remedy = _REMEDIES.get(status, "Run this again later." if status >= 500 else cause.server_message or "")
        elif isinstance(cause, HTTPError):
            what, remedy = f"the connection broke ({cause})", "Run this again."
        elif isinstance(cause, (KeyError, json.JSONDecodeError)):
            what, remedy = "the Hub's answer was not understood", "Run this again later."
        else:
            what, remedy = " ".join(str(cause).split()), ""
        # The client's exceptions are not chained: they hold requests, which hold the token.
        broken = isinstance(cause, (OSError, json.JSONDecodeError))
        kind = ValueError if isinstance(cause, ValueError) and not broken else OSError
        raise kind(without_token(f"{doing} failed: {what}. {remedy}".strip())) from None
