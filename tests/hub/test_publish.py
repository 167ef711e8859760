"""Publishing changes a repository in one commit or not at all, whatever fails, and never reveals the token."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback

import huggingface_hub
import pytest
import timm
import torch
from helpers import PRESETS, ROOT, published, settled, tiny_resnet, tiny_vgg
from hub_server import FAULTS, TOKEN, Fault, Repository, hub_server, use
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from timm_dfs.cli import app
from timm_dfs.hub import folder as hub
from timm_dfs.hub.publish import FILES, check_folder, publish

REPO = "someone/tiny"
SHIPPED = ROOT / "hub" / "dfs_msdnet_cifar100"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    return published(tmp_path_factory.mktemp("published") / "dfs_vgg7_cifar100")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may change."""
    copy = tmp_path / whole.name
    copy.mkdir()
    for file in FILES:
        (copy / file).write_bytes((whole / file).read_bytes())
    return copy


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server() as server:
        server.waits = use(server, tmp_path, monkeypatch)
        yield server


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def remote(server, branch="main"):
    """The files of the repository, or None."""
    if REPO not in server.repositories:
        return None
    files = dict(server.repositories[REPO].at(branch).files)
    del files[".gitattributes"]
    return files


def test_a_published_folder_is_what_the_repository_holds_and_what_others_load(whole, server):
    lines = []
    done = publish(whole, REPO, report=lines.append)
    assert done.changed and remote(server) == contents(whole)
    assert len(server.repositories[REPO].history()) == 2  # the repository's own first commit, and one
    assert len(lines) == 3
    model, again = (timm.create_model(name, pretrained=True) for name in (f"local-dir:{whole}", f"hf-hub:{REPO}"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.presets == model.presets == PRESETS


def test_the_store_of_large_files_is_not_told_the_token(whole, server):
    publish(whole, REPO)
    assert {"lfs-upload", "lfs-download"} <= set(server.seen) and server.told == []


def test_publishing_again_makes_no_commit(whole, server):
    first = publish(whole, REPO)
    server.seen.clear()
    second = publish(whole, REPO)
    assert (second.commit, second.changed) == (first.commit, False)
    assert "commit" not in server.seen and "lfs-upload" not in server.seen


def test_a_change_is_one_commit_with_what_changed(folder, server):
    publish(folder, REPO)
    (folder / hub.RESULTS_FILE).write_text((folder / hub.RESULTS_FILE).read_text().replace("10.0", "11.0"))
    assert CliRunner().invoke(app, ["card", str(folder)]).exit_code == 0
    server.seen.clear()
    assert publish(folder, REPO).changed
    assert remote(server) == contents(folder) and len(server.repositories[REPO].history()) == 3
    assert "lfs-upload" not in server.seen  # the weights are the same


def test_a_revision_is_a_branch_of_its_own(whole, server):
    for changed in (True, False):
        assert publish(whole, REPO, revision="try").changed == changed
    assert remote(server, "try") == contents(whole) and remote(server) == {}


def test_private_means_private(whole, server):
    publish(whole, REPO, private=True)
    assert server.repositories[REPO].private
    server.repositories[REPO].private = False
    with pytest.raises(ValueError, match="is public"):
        publish(whole, REPO, private=True)


def test_a_repository_of_another_network_is_not_overwritten(whole, server):
    other = server.repositories[REPO] = Repository(False)
    other.commit("main", {"config.json": json.dumps(dict(architecture="resnet18")).encode()}, "theirs")
    with pytest.raises(ValueError, match="holds a resnet18, not a dfs_vgg7_cifar100"):
        publish(whole, REPO)
    assert len(other.history()) == 2


def test_files_that_are_not_the_folders_are_left_alone_and_named(whole, server):
    server.repositories[REPO] = Repository(False)
    server.repositories[REPO].commit("main", {".gitattributes": b"", "notes.txt": b"mine"}, "theirs")
    assert publish(whole, REPO).others == ("notes.txt",)
    assert remote(server)["notes.txt"] == b"mine"


def test_a_commit_made_in_between_is_not_overwritten(whole, server, monkeypatch):
    publish(whole, REPO)
    route = server.RequestHandlerClass.validate_yaml

    def commit_first(handler):
        server.repositories[REPO].commit("main", {".gitattributes": b"", "README.md": b"theirs"}, "theirs")
        return route(handler)

    monkeypatch.setattr(server.RequestHandlerClass, "validate_yaml", commit_first)
    with pytest.raises(OSError, match="newer commit"):
        publish(whole, REPO)
    assert remote(server) == {"README.md": b"theirs"}


# Folders that are not uploaded.


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without(file):
    return lambda folder: (folder / file).unlink()


def another_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["heads.0.fc.weight"] += 1
    save_file(weights, folder / "model.safetensors")


def of_config(change):
    return lambda folder: edit(folder / "config.json", change)


def preset(**changes):
    return of_config(lambda config: config["model_args"]["presets"]["fast"].update(changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("model.safetensors"), "no model.safetensors"),
        (without("curve.svg"), "no curve.svg"),
        (lambda folder: (folder / "README.md").write_text("all new"), "README.md in .* do not match its results"),
        (another_tensor, "golden logits"),
        (of_config(lambda config: config.update(architecture="dfs_resnet18_cifar100")), "dfs_resnet18_cifar100"),
        (of_config(lambda config: config["model_args"].update(depths=[1, 1])), "2 exits"),
        (preset(thresholds=[0.5, 0.0]), "2 thresholds"),
        (preset(thresholds=[0.5, 1.5, 0.0]), r"threshold 1\.5"),
        (preset(thresholds=[0.5, -0.5, 0.0]), r"threshold -0\.5"),
        (of_config(lambda config: config["model_args"].update(checkpoint_path="/x.pth")), "only the caller"),
    ],
)
def test_a_folder_that_disagrees_with_itself_is_refused_before_anything_is_sent(spoil, words, folder, server):
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        publish(folder, REPO)
    assert server.seen == []


def test_a_dry_run_checks_and_sends_nothing(folder, server):
    run = CliRunner().invoke(app, ["publish", str(folder), "--repo", REPO, "--dry-run"])
    assert run.exit_code == 0 and all(file in run.stdout for file in FILES)
    (folder / "README.md").write_text("all new")
    run = CliRunner().invoke(app, ["publish", str(folder), "--repo", REPO, "--dry-run"])
    assert run.exit_code == 2 and len(run.stderr.strip().splitlines()) == 1
    assert server.seen == []


def test_metadata_that_the_hub_refuses_changes_nothing(whole, server, monkeypatch):
    refused = 400, dict(errors=[dict(message="license is unknown")], warnings=[])
    monkeypatch.setattr(server.RequestHandlerClass, "validate_yaml", lambda handler: refused)
    with pytest.raises(ValueError, match="license is unknown"):
        publish(whole, REPO)
    assert remote(server) == {}


@pytest.mark.skipif(
    int(huggingface_hub.__version__.partition(".")[0]) < 2,
    reason="before 2.0 the validator asks the Hub itself",
)
def test_a_cards_metadata_passes_huggingface_hubs_validator_and_a_spoilt_one_does_not(server):
    card = ModelCard.load(SHIPPED / "README.md", ignore_metadata_errors=False)
    card.validate()
    assert server.seen == ["validate-yaml"]
    spoilt = ModelCard(card.content)
    for good, bad in (("license: apache-2.0", "license: [1]"), ("value: ", "value: x")):
        spoilt.content = card.content.replace(good, bad)
        with pytest.raises(ValueError, match=r"license is|value is"):
            spoilt.validate()


# Faults. Each lasts for a whole run; then it is removed and publishing is repeated.

PUBLISHING = {**FAULTS, "500 after": Fault(status=500, after=True)}
REQUESTS = (
    "create branch info validate-yaml preupload lfs-batch lfs-upload lfs-verify commit head download lfs-download"
).split()
WITHOUT_ANSWER = {"branch", "head", "lfs-upload"}  # no body whose half, or a bit, would be missed
MEANINGLESS = (
    {(fault, kind) for fault in ("truncated", "trickle") for kind in WITHOUT_ANSWER}
    | {("checksum", kind) for kind in REQUESTS if kind not in ("info", "lfs-upload", "download", "lfs-download")}
    | {("reset", "head")}
)
HARMLESS = {("truncated", "lfs-verify")}  # nobody reads that answer's body
CASES = [(fault, kind) for kind in REQUESTS for fault in PUBLISHING if (fault, kind) not in MEANINGLESS]


@pytest.mark.parametrize(("fault", "kind"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_whatever_fails_leaves_the_old_or_the_new_state_and_a_second_run_finishes(
    fault, kind, whole, server, caplog, capfd, record_property
):
    caplog.set_level(logging.DEBUG)
    before = contents(whole)
    server.faults[kind] = Fault(**vars(PUBLISHING[fault]))
    try:
        publish(whole, REPO, revision="next")
        outcome = "done"
    except (OSError, ValueError) as error:
        outcome = f"{type(error).__name__}: {error}"
        assert TOKEN not in "".join(traceback.format_exception(error))
        assert len(str(error).splitlines()) == 1
    branches = server.repositories[REPO].branches if REPO in server.repositories else {}
    history = server.repositories[REPO].history("next") if "next" in branches else []
    state = "new" if len(history) == 2 else "old"
    record_property("outcome", f"{outcome} [{state}]")
    assert contents(whole) == before
    assert len(history) <= 2
    if state == "new":
        assert remote(server, "next") == before
    if history:
        assert remote(server, "next") in ({}, before)
    assert (outcome == "done") == (fault == "trickle" or (fault, kind) in HARMLESS), outcome
    server.faults.clear()
    assert publish(whole, REPO, revision="next").changed == (state == "old")
    assert remote(server, "next") == before and len(server.repositories[REPO].history("next")) == 2
    printed = capfd.readouterr()
    assert TOKEN not in caplog.text + printed.out + printed.err


@pytest.mark.parametrize("kind", ["preupload", "lfs-batch", "lfs-upload", "lfs-verify"])
@pytest.mark.parametrize("fault", ["429", "500", "reset"])
def test_a_fault_that_passes_is_waited_out_during_the_upload(fault, kind, whole, server):
    server.faults[kind] = Fault(**{**vars(PUBLISHING[fault]), "times": 1})
    assert publish(whole, REPO).changed
    assert server.waits == ([8.0] if fault == "429" else [1])  # Retry-After and a second more, or the first back-off


def test_the_token_is_in_no_file(whole, server, tmp_path):
    server.faults["commit"] = Fault(status=401)
    with pytest.raises(OSError, match="hf auth login"):
        publish(whole, REPO)
    server.faults.clear()
    publish(whole, REPO)
    files = [file for file in [*tmp_path.rglob("*"), *whole.rglob("*")] if file.is_file()]
    assert files and not any(TOKEN.encode() in file.read_bytes() for file in files)
    assert not any(TOKEN.encode() in data for data in remote(server).values())


def test_a_mistake_is_one_line_on_the_command_line_without_the_token(whole, server):
    server.faults["create"] = Fault(status=401)
    run = CliRunner().invoke(app, ["publish", str(whole), "--repo", REPO])
    assert run.exit_code == 2 and len(run.stderr.strip().splitlines()) == 1
    assert "401" in run.stderr and TOKEN not in run.output


def test_a_repository_name_that_cannot_be_is_refused(whole, server):
    with pytest.raises(ValueError, match="some one/x"):
        publish(whole, "some one/x")


def test_another_network_gets_other_golden_logits_and_is_whole_too(tmp_path):
    check_folder(published(tmp_path, settled(tiny_resnet())))
    joint = settled(tiny_vgg(beta="joint", presets={"all": dict(thresholds=[0.2, 0.2, 0.0])}))
    assert check_folder(published(tmp_path / "joint", joint)).beta == "joint"
    chained = settled(tiny_vgg(chain=0.3))
    assert check_folder(published(tmp_path / "chained", chained)).chain == 0.3
    for name, is_chained in dict(joint=False, chained=True).items():
        card = (tmp_path / name / "README.md").read_text()
        assert ("the last exit needs all heads." in card) == is_chained
        assert ("without the other heads" in card) == (not is_chained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["preupload", "lfs-upload", "commit", "lfs-download"])
def test_a_process_that_is_killed_leaves_the_old_or_the_new_state_and_a_second_one_finishes(kind, whole, tmp_path):
    with hub_server() as server:
        env = dict(os.environ, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path), HF_TOKEN=TOKEN)
        command = [sys.executable, "-m", "timm_dfs.cli", "publish", str(whole), "--repo", REPO]
        server.faults[kind] = Fault(trickle=2)  # the answer takes long enough to die in it
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while kind not in server.seen and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        server.faults.clear()
        assert remote(server) in ({}, contents(whole))
        again = subprocess.run(command, env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert remote(server) == contents(whole) and len(server.repositories[REPO].history()) == 2


@pytest.mark.slow
def test_the_commands_work_in_processes_of_their_own(whole, tmp_path):
    with hub_server() as server:
        env = dict(os.environ, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path), HF_TOKEN=TOKEN)

        def run(*args, **more):
            command = [sys.executable, "-m", "timm_dfs.cli", *map(str, args)]
            return subprocess.run(command, env={**env, **more}, capture_output=True, text=True)

        for words in ("reading", "nothing has changed"):
            done = run("publish", whole, "--repo", REPO)
            assert done.returncode == 0 and words in done.stdout, done.stderr
        assert remote(server) == contents(whole)
        assert "fast" in run("info", f"hf-hub:{REPO}").stdout
        assert run("info", f"hf-hub:{REPO}", HF_HUB_OFFLINE="1").returncode == 0  # the cache is warm
        cold = run("info", f"hf-hub:{REPO}", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cold"))
        assert cold.returncode == 2 and "TIMM_DFS_HUB" in cold.stderr and len(cold.stderr.strip().splitlines()) == 1
