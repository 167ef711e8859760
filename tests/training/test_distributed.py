"""Two processes with half a batch each get the gradients of one process with the whole batch."""

import logging
from datetime import timedelta

import pytest
import torch
from helpers import images, tiny_msdnet, tiny_resnet, tiny_vgg
from timm.task import ClassificationTask
from torch import distributed, multiprocessing, nn

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="this torch has no gloo"
)

WORLD, BATCH, STEPS = 2, 4, 2
LABELS = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1])
JOINT = dict(beta="joint")

# With batch norm out of the way, everything here is a mean over the batch and so the same in parts.
CASES = {
    "sum": (tiny_vgg, {}),
    "sum of msdnet": (tiny_msdnet, {}),
    "sum of resnet": (tiny_resnet, {}),
    "weights and distillation": (tiny_vgg, dict(loss_weights=[1, 0, 2], distill_weight=0.3)),
    "equilibrium": (tiny_vgg, dict(gradient_equilibrium=True)),
    "heads only": (tiny_vgg, dict(train_backbone=False)),
    "MGDA": (tiny_vgg, dict(aggregator="MGDA")),
    "UPGrad": (tiny_vgg, dict(aggregator="UPGrad", **JOINT)),
    "UPGrad of msdnet": (tiny_msdnet, dict(aggregator="UPGrad")),
    "MGDA with an exit of weight 0": (tiny_vgg, dict(aggregator="MGDA", loss_weights=[1, 0, 2])),
    "MGDA without the last exit": (tiny_vgg, dict(aggregator="MGDA", loss_weights=[1, 1, 0])),
    "MGDA of heads only": (tiny_vgg, dict(aggregator="MGDA", train_backbone=False)),
    "UPGrad with equilibrium": (tiny_vgg, dict(aggregator="UPGrad", gradient_equilibrium=True)),
    "accumulated": (tiny_vgg, {}),
    "accumulated with distillation": (tiny_msdnet, dict(distill_weight=0.3)),
}
# What depends on more than means over samples, or on chance, is the same on all processes only.
ALIKE_ONLY = {
    "PCGrad": (tiny_vgg, dict(aggregator="PCGrad", **JOINT)),
    "features": (tiny_vgg, dict(distill_feature_weight=0.1)),
}


def task_of(make, settings):
    torch.manual_seed(0)
    model = make(drop_rate=0.0, **settings).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model, ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def gradients_of(model, task, batches, accumulate):
    """After the last of a few steps, of which each but the first starts from zero."""
    for step in range(STEPS):
        model.zero_grad()
        x, target = batches[step]
        if accumulate:
            with task.no_sync():
                (task(x[::2], target[::2])["loss"] / 2).backward()
            (task(x[1::2], target[1::2])["loss"] / 2).backward()
        else:
            task(x, target)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def batches_of(rank=None):
    samples = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    return [(images(WORLD * BATCH, seed=step).double()[samples], LABELS[samples]) for step in range(STEPS)]


def work(rank, folder):
    """One process's part of every case: the gradients that it ends with, and the lines that it logs."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(minutes=5)
    )
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("timm_dfs")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return cases_of(rank), lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        distributed.destroy_process_group()


def cases_of(rank):
    """One process's gradients of every case, by its name."""
    found = {}
    for name, (make, settings) in (CASES | ALIKE_ONLY).items():
        model, task = task_of(make, settings)
        task.prepare_distributed()
        torch.manual_seed(rank)  # as train.py does
        found[name] = gradients_of(model, task, batches_of(rank), "accumulated" in name)
    model, task = task_of(tiny_vgg, dict(aggregator="MGDA"))
    task.prepare_distributed()
    try:
        gradients_of(model, task, batches_of(rank), accumulate=True)
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def save_work(_, rank, folder):
    torch.set_num_threads(1)
    torch.save(work(rank, folder), f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process found and logged. This process is the first: starting another takes longer than all cases."""
    folder = str(tmp_path_factory.mktemp("processes"))
    others = [multiprocessing.spawn(save_work, (rank, folder), join=False, daemon=True) for rank in range(1, WORLD)]
    first = work(0, folder)
    for other in others:
        while not other.join():
            pass
    return [first, *(torch.load(f"{folder}/{rank}.pth") for rank in range(1, WORLD))]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_get_the_gradients_of_one(case, processes):
    make, settings = CASES[case]
    expected = gradients_of(*task_of(make, settings), batches_of(), accumulate=False)
    for found, _ in processes:
        for name, gradient in expected.items():
            if gradient is None:
                assert found[case][name] is None or not found[case][name].any(), name
            else:
                close = dict(rtol=1e-4, atol=1e-6) if "aggregator" in settings else dict(rtol=1e-6, atol=1e-9)
                assert torch.allclose(found[case][name], gradient, **close), name


@pytest.mark.parametrize("case", CASES | ALIKE_ONLY)
def test_all_processes_end_with_the_same_gradients(case, processes):
    first, second = (found[case] for found, _ in processes)
    for name, gradient in first.items():
        assert gradient is second[name] is None or torch.equal(gradient, second[name]), name
    assert any(gradient is not None and gradient.any() for gradient in first.values())


def test_accumulating_before_aggregating_is_refused_on_every_process(processes):
    assert all("--grad-accum-steps" in found["refusal"] for found, _ in processes)


def test_the_first_process_alone_writes_the_log(processes):
    (_, first), (_, second) = processes
    assert len(first) >= len(CASES)
    assert second == []
