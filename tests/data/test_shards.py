"""Processes divide a data set so that every sample is evaluated exactly once, in the batches of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_vgg
from test_datasets import write_folder

from timm_dfs.cli.source import DataOptions
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.data.shards import Shard, launched_processes

SIZES = [(1, 1, 1), (10, 3, 2), (10, 3, 4), (7, 7, 1), (9, 2, 5), (100, 8, 3), (101, 10, 4)]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("samples, batch_size, processes", SIZES)
def test_shards_hold_every_sample_once_in_order(samples, batch_size, processes):
    shards = [Shard(rank, processes).indices(samples, batch_size) for rank in range(processes)]
    assert [i for shard in shards for i in shard] == list(range(samples))
    assert all(len(shard) > 0 and shard.start % batch_size == 0 for shard in shards)


@pytest.mark.parametrize("samples, batch_size, processes", SIZES)
def test_no_process_has_more_than_one_batch_more_than_another(samples, batch_size, processes):
    shards = [Shard(rank, processes).indices(samples, batch_size) for rank in range(processes)]
    batches = [-(-len(shard) // batch_size) for shard in shards]
    assert max(batches) - min(batches) <= 1


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(ValueError, match="10 samples make 2 batches of 8, fewer than the 3 processes"):
        Shard(0, 3).indices(10, 8)


@pytest.mark.parametrize("split", ["validation", "validation[3:]"])
def test_loaders_of_all_shards_give_the_batches_of_one_process(tmp_path, split):
    root = write_folder(tmp_path, ("train", "validation"))
    options = dict(dataset="", root=root, split=split, batch_size=3, workers=0)
    whole = list(dataset_loader(tiny_vgg(), **options))
    parts = [batch for rank in range(3) for batch in dataset_loader(tiny_vgg(), **options, shard=Shard(rank, 3))]
    assert len(parts) == len(whole)
    for (x, target), (expected, expected_target) in zip(parts, whole, strict=True):
        assert torch.equal(x, expected) and torch.equal(target, expected_target)


def test_a_stream_is_not_divided():
    with pytest.raises(ValueError, match="'wds/x' is a stream, which cannot be divided among 2 processes"):
        dataset_loader(tiny_vgg(), "wds/x", None, "validation", shard=Shard(0, 2))


def test_one_process_gathers_its_own():
    logits, targets = torch.randn(2, 3, 4), torch.arange(3)
    gathered = Shard().gather(logits, targets)
    assert gathered[0] is logits and gathered[1] is targets


def test_a_command_that_does_not_divide_its_data_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_processes() == 2
    with pytest.raises(ValueError, match="torchrun started 2 processes, but only timm-dfs eval"):
        DataOptions(dataset="hfds/x").where("dfs_vgg7_cifar100")


def launch(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    return ran


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_print_the_figures_of_one_once(tmp_path):
    root = write_folder(tmp_path / "images", ("train", "validation"))
    torch.save(tiny_vgg().state_dict(), tmp_path / "weights.pth")
    command = ("-m", "timm_dfs", "eval", "dfs_vgg7_cifar100", "--checkpoint", str(tmp_path / "weights.pth"))
    command += ("--model-kwargs", "depths=(1,2)", "widths=(6,8)", "num_classes=5", "--data-dir", root)
    command += ("--split", "validation[1:]", "--batch-size", "3", "--workers", "0", "--json")
    one = launch(*command)
    assert one.returncode == 0, one.stderr[-2000:]
    two = launch(*TORCHRUN, *command)
    assert two.returncode == 0, two.stderr[-2000:]
    assert json.loads(one.stdout)["samples"] == 19  # neither a multiple of the batches nor of the processes
    assert json.loads(two.stdout) == json.loads(one.stdout)


@pytest.mark.slow
def test_conflict_under_torchrun_is_refused_in_words(tmp_path):
    ran = launch(*TORCHRUN, "-m", "timm_dfs", "conflict", "dfs_vgg7_cifar100", "--data-dir", str(tmp_path))
    assert ran.returncode != 0
    assert "only timm-dfs eval divides a data set among processes" in ran.stderr
