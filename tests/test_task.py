"""timm's classification tasks train every exit of a network with exits, and leave other networks alone."""

import importlib

import pytest
import timm
import torch
from helpers import CLASSES, TINY, images, tiny_vgg
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, MultiLabelClassificationTask
from torch import nn

import timm_dfs
from timm_dfs import ExitsLoss

LABELS = torch.tensor([0, 3, 1, 4])
SOFT = torch.nn.functional.one_hot(LABELS, CLASSES).float() * 0.8 + 0.04

CRITERIA = {
    "cross_entropy": (nn.CrossEntropyLoss, LABELS),
    "label_smoothing": (lambda: LabelSmoothingCrossEntropy(0.1), LABELS),
    "soft_target": (SoftTargetCrossEntropy, SOFT),
    "binary": (BinaryCrossEntropy, SOFT),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", TINY)
def test_the_loss_is_the_sum_over_exits_and_trains_every_parameter(name, criterion):
    make_criterion, target = CRITERIA[criterion]
    model = TINY[name](drop_rate=0.0).train()
    result = ClassificationTask(model, make_criterion(), verbose=False)(images(), target)
    assert len(result["output"]) == model.num_exits
    expected = sum(make_criterion()(logits, target) for logits in result["output"])
    assert torch.equal(result["loss"], expected)
    result["loss"].backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_task_that_makes_its_own_criterion_trains_every_exit_too():
    model = tiny_vgg().train()
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    result = task(images(), LABELS)
    expected = sum(LabelSmoothingCrossEntropy(0.1)(logits, LABELS) for logits in result["output"])
    assert torch.allclose(result["loss"], expected)


def test_multi_label_tasks_train_every_exit_too():
    model = tiny_vgg().train()
    result = MultiLabelClassificationTask(model, BinaryCrossEntropy(), verbose=False)(images(), SOFT.round())
    assert torch.equal(result["loss"], sum(BinaryCrossEntropy()(logits, SOFT.round()) for logits in result["output"]))
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_in_eval_mode_the_loss_is_the_last_exits():
    model = tiny_vgg().eval()
    result = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)(images(), LABELS)
    assert torch.equal(result["output"], model(images()))
    assert torch.equal(result["loss"], nn.CrossEntropyLoss()(model(images()), LABELS))


@pytest.mark.parametrize("task_class", [ClassificationTask, MultiLabelClassificationTask])
def test_a_plain_timm_model_keeps_its_plain_criterion(task_class):
    model = timm.create_model("test_resnet", num_classes=CLASSES).train()
    criterion = BinaryCrossEntropy()
    task = task_class(model, criterion, verbose=False)
    assert task.criterion is criterion
    result = task(images(size=32), SOFT)
    assert torch.equal(result["loss"], criterion(result["output"], SOFT))


def test_importing_and_installing_again_wraps_once():
    wrapped = ClassificationTask.__init__
    for _ in range(2):
        timm_dfs.task.install()
        importlib.reload(timm_dfs)
    assert ClassificationTask.__init__ is wrapped
    criterion = nn.CrossEntropyLoss()
    task = ClassificationTask(tiny_vgg(), criterion, verbose=False)
    assert task.criterion.criterion is criterion


def test_a_task_is_trained_by_an_optimizer_step():
    model = tiny_vgg().train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = task(images(), LABELS)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_exits_loss_of_one_tensor_is_the_criterion():
    logits = torch.randn(4, CLASSES)
    assert torch.equal(ExitsLoss(nn.CrossEntropyLoss())(logits, LABELS), nn.CrossEntropyLoss()(logits, LABELS))


def test_exits_loss_of_lists_and_tuples_is_the_sum():
    logits = torch.randn(3, 4, CLASSES)
    expected = sum(nn.CrossEntropyLoss()(exit_logits, LABELS) for exit_logits in logits)
    for exits in (list(logits), tuple(logits)):
        assert torch.equal(ExitsLoss(nn.CrossEntropyLoss())(exits, LABELS), expected)
