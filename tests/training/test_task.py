"""timm's classification tasks train every exit of a network with exits, and leave other networks alone."""

import importlib

import pytest
import timm
import torch
from helpers import CLASSES, TINY, images, same_weights, tiny_msdnet, tiny_resnet, tiny_vgg
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
)
from timm.utils import dispatch_clip_grad
from torch import nn

import timm_dfs
from timm_dfs import ExitsLoss
from timm_dfs.training.teacher import decoupled as parts_of_dkd
from timm_dfs.training.teacher import seen_by_teacher

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
        timm_dfs.training.task.install()
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


CHANGED_SETTINGS = [
    dict(loss_weights=[0, 1, 2]),
    dict(distill_weight=0.5),
    dict(distill_feature_weight=0.1),
    dict(aggregator="PCGrad"),
]


@pytest.mark.parametrize("settings", [dict(teacher_loss="dkd"), dict(teacher_size=64)], ids=str)
def test_settings_of_a_teacher_that_come_later_are_refused_too_where_there_is_none(settings):
    model = tiny_vgg()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    model.train_for(timm_dfs.Objective(**settings))
    with pytest.raises(ValueError, match="and there is no teacher"):
        task(images(size=32), LABELS)


@pytest.mark.parametrize("settings", CHANGED_SETTINGS, ids=str)
@pytest.mark.parametrize("taught", [False, True], ids=["alone", "taught"])
def test_a_task_follows_settings_that_change_after_it_was_made(taught, settings):
    def make_task(model):
        if taught:
            return LogitDistillationTask(model, outside, nn.CrossEntropyLoss(), verbose=False)
        return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)

    def train_for_settings(model):
        torch.manual_seed(0)  # adapters start at random
        model.train_for(timm_dfs.Objective(**settings))

    changed, outside = tiny_vgg(drop_rate=0.0), teacher()
    fresh = same_weights(changed, tiny_vgg(drop_rate=0.0))
    task = make_task(changed)
    train_for_settings(changed)
    train_for_settings(fresh)
    task(images(size=32), LABELS)["loss"].backward()
    make_task(fresh)(images(size=32), LABELS)["loss"].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(changed.parameters(), fresh.parameters(), strict=True))


def test_exits_loss_of_one_tensor_is_the_criterion():
    logits = torch.randn(4, CLASSES)
    assert torch.equal(ExitsLoss(nn.CrossEntropyLoss())(logits, LABELS), nn.CrossEntropyLoss()(logits, LABELS))


def test_exits_loss_of_lists_and_tuples_is_the_sum():
    logits = torch.randn(3, 4, CLASSES)
    expected = sum(nn.CrossEntropyLoss()(exit_logits, LABELS) for exit_logits in logits)
    for exits in (list(logits), tuple(logits)):
        assert torch.equal(ExitsLoss(nn.CrossEntropyLoss())(exits, LABELS), expected)


WRAPPERS = {"plain": lambda model: model, "compiled": lambda model: torch.compile(model, backend="eager")}


# Gradient clipping.


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_clipping_without_the_head_leaves_every_classifier_out(make, wrap):
    model = make()
    task = ClassificationTask(wrap(model), nn.CrossEntropyLoss(), verbose=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    clipped = {names[id(parameter)] for parameter in task.get_clip_parameters(exclude_head=True)}
    classifiers = {f"heads.{k}.fc.{part}" for k in range(3) for part in ("weight", "bias")}
    assert set(names.values()) - clipped == classifiers & set(names.values())
    assert {names[id(parameter)] for parameter in task.get_clip_parameters()} == set(names.values())


@pytest.mark.parametrize("task_class", [ClassificationTask, MultiLabelClassificationTask])
def test_clipping_a_plain_timm_model_is_unchanged(task_class):
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    task = task_class(model, BinaryCrossEntropy(), verbose=False)
    for exclude_head in (False, True):
        expected = task_class.get_clip_parameters.__wrapped__(task, exclude_head)
        assert [*map(id, task.get_clip_parameters(exclude_head=exclude_head))] == [*map(id, expected)]
    assert len(task.get_clip_parameters(exclude_head=True)) == len(list(model.parameters())) - 2


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_timms_ways_to_clip_clip(make, mode):
    model = make(drop_rate=0.0).train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    (1000 * task(images(), LABELS)["loss"]).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    dispatch_clip_grad(task.get_clip_parameters(exclude_head="agc" in mode), 0.01, mode=mode)
    changed = {
        name for (name, parameter), old in zip(model.named_parameters(), before) if not torch.equal(parameter.grad, old)
    }
    assert len(changed) > len(before) // 2
    assert mode != "agc" or not any(".fc." in name for name in changed)


# timm's knowledge distillation.


def teacher(**kwargs):
    torch.manual_seed(1)
    return timm.create_model("test_resnet", **{"num_classes": CLASSES, **kwargs}).eval()


KNOWLEDGE = {
    "logit": lambda student: LogitDistillationTask(student, timm.create_model("test_resnet", num_classes=CLASSES)),
    "feature": lambda student: FeatureDistillationTask(student, timm.create_model("test_resnet", num_classes=CLASSES)),
    "token": lambda student: TokenDistillationTask(student, timm.create_model("test_resnet", num_classes=CLASSES)),
    "by keyword": lambda student: LogitDistillationTask(
        teacher_model=timm.create_model("test_resnet", num_classes=CLASSES), student_model=student, verbose=False
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", ["feature", "token"])
def test_distillation_that_would_teach_one_exit_is_refused_with_the_remedy(kind, wrap):
    with pytest.raises(ValueError, match=r"3 exits.*--kd-distill-type logit.*--kd-model-name.*distill_weight"):
        KNOWLEDGE[kind](wrap(tiny_vgg()))


def taught_loss(logits, own, of_teacher, task_weight, weight, temperature):
    """One exit's loss by its definition: Hinton et al., arXiv 1503.02531, with timm's weights."""
    log_ours, its = (logits / temperature).log_softmax(-1), (of_teacher / temperature).softmax(-1)
    divergence = (its * (its.log() - log_ours)).sum(-1).mean()
    return task_weight * own + weight * temperature**2 * divergence


WEIGHTS = {  # timm's flags, and the weights of task and distillation that they mean
    "neither": (dict(), 1.0, 1.0),
    "task": (dict(task_loss_weight=0.3), 0.3, 0.7),
    "distillation": (dict(distill_loss_weight=2.0), 1.0, 2.0),
    "both": (dict(task_loss_weight=0.5, distill_loss_weight=2.0), 0.5, 2.0),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_another_network_teaches_every_exit(weights, wrap):
    flags, of_task, of_teacher = WEIGHTS[weights]
    model, outside = tiny_vgg(loss_weights=[1, 2, 0.5], chain=0.5).train(), teacher()
    task = LogitDistillationTask(wrap(model), outside, nn.CrossEntropyLoss(), temperature=3.0, verbose=False, **flags)
    result = task(images(size=32), LABELS)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    its_mean, its_std = (torch.tensor(outside.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = outside((images(size=32) * std + mean - its_mean) / its_std).detach()
    losses = [
        taught_loss(logits, nn.functional.cross_entropy(logits, LABELS), expected, of_task, of_teacher, 3.0)
        for logits in result["output"]
    ]
    assert len(losses) == 3
    assert torch.allclose(result["loss"], losses[0] + 2 * losses[1] + 0.5 * losses[2], rtol=1e-4)
    result["loss"].backward()
    assert all(head.fc.weight.grad.any() for head in model.heads)
    assert all(parameter.grad is None for parameter in outside.parameters())


def decoupled(logits, of_teacher, labels, temperature):
    """Decoupled knowledge distillation by its definition (Zhao et al., arXiv 2203.08679, section 3), image by image."""
    found = []
    for row, its, label in zip(logits.detach().double(), of_teacher.double(), labels):
        ours, its = (row / temperature).softmax(-1), (its / temperature).softmax(-1)
        others = [k for k in range(len(row)) if k != label]
        binary = [torch.stack([p[label], 1 - p[label]]) for p in (its, ours)]
        among = [p[others] / (1 - p[label]) for p in (its, ours)]
        of_target, of_others = ((a * (a / b).log()).sum() for a, b in (binary, among))
        found.append(of_target + 8 * of_others)
    return temperature**2 * torch.stack(found).mean().float()


def test_decoupled_distillation_is_that_of_its_paper_at_every_exit():
    model, outside = tiny_vgg(teacher_loss="dkd").train(), teacher()
    task = LogitDistillationTask(
        model, outside, nn.CrossEntropyLoss(), temperature=4.0, verbose=False, distill_loss_weight=0.5
    )
    result = task(images(size=32), LABELS)
    its = outside(task.teacher.normalize_input(images(size=32), task.student_mean, task.student_std)).detach()
    expected = sum(
        nn.functional.cross_entropy(logits, LABELS) + 0.5 * decoupled(logits, its, LABELS, 4.0)
        for logits in result["output"]
    )
    assert torch.allclose(result["loss"], expected, rtol=1e-4)
    result["loss"].backward()
    assert all(head.fc.weight.grad.any() for head in model.heads)


@given(st.integers(3, 8), st.integers(0, 2**31), st.sampled_from([1.0, 30.0]))
def test_the_two_parts_make_up_the_divergence(classes, seed, scale):
    torch.manual_seed(seed)
    ours, its = (scale * torch.randn(2, 4, classes, dtype=torch.float64)).log_softmax(-1)
    target = torch.randint(classes, (4,))
    of_target, of_others = parts_of_dkd(ours, its, target)
    rest = 1 - its.gather(-1, target[:, None])[:, 0].exp()
    whole = nn.functional.kl_div(ours, its, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(of_target + rest * of_others, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [torch.rand(4, CLASSES), torch.rand(4), torch.zeros(3, dtype=torch.long)])
def test_decoupled_distillation_refuses_targets_that_are_no_classes(target):
    model = tiny_vgg(teacher_loss="dkd").train()
    task = LogitDistillationTask(model, teacher(), lambda logits, target: logits.sum(), verbose=False)
    with pytest.raises(ValueError, match="without mixup, cutmix and soft targets, or take teacher_loss='kl'"):
        task(images(size=32), target)


@pytest.mark.parametrize("settings", [dict(teacher_loss="dkd"), dict(teacher_size=96)], ids=str)
def test_settings_of_a_teacher_are_refused_where_there_is_none(settings):
    with pytest.raises(ValueError, match="there is no teacher; give --kd-model-name, or leave it out"):
        ClassificationTask(tiny_vgg(**settings), nn.CrossEntropyLoss(), verbose=False)


def test_images_in_half_precision_are_enlarged_for_the_teacher():
    seen = seen_by_teacher(images(2, 16).bfloat16(), 24, tiny_vgg())
    assert seen.shape[-1] == 24 and seen.dtype == torch.bfloat16


def test_the_teacher_sees_images_at_its_own_size():
    shapes, outside = [], teacher()
    outside.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    task = LogitDistillationTask(tiny_vgg(teacher_size=48).train(), outside, verbose=False)
    result = task(images(size=32), LABELS)
    assert shapes == [(4, 3, 48, 48)] and result["output"][0].shape == (4, CLASSES)
    outside.pretrained_cfg["input_size"] = (3, 160, 160)
    with pytest.warns(UserWarning, match="trained at 160 pixels and sees 32; --model-kwargs teacher_size=160"):
        LogitDistillationTask(tiny_vgg().train(), outside, verbose=False)(images(size=32), LABELS)
    assert shapes[-1] == (4, 3, 32, 32)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_a_teacher_and_the_last_exit_can_teach_together(make):
    model = make(drop_rate=0.0, distill_weight=0.3, distill_feature_weight=0.1).train()
    task = LogitDistillationTask(model, outside := teacher(), nn.CrossEntropyLoss(), temperature=2.0, verbose=False)
    result = task(images(size=32), LABELS)
    own = ExitsLoss(nn.CrossEntropyLoss(), model.objective).of_each_exit(result["output"], LABELS)
    its = outside(task.teacher.normalize_input(images(size=32), task.student_mean, task.student_std)).detach()
    expected = sum(taught_loss(logits, loss, its, 1.0, 1.0, 2.0) for logits, loss in zip(result["output"], own))
    assert torch.allclose(result["loss"], expected, rtol=1e-4)


def test_an_aggregator_gets_the_gradients_of_the_taught_losses():
    pytest.importorskip("torchjd", reason="needs the extra aggregation")
    plain = tiny_vgg().train()
    model = same_weights(plain, tiny_vgg(aggregator="UPGrad"))
    for network in (plain, model):
        LogitDistillationTask(network, teacher(), verbose=False)(images(size=32), LABELS)["loss"].backward()
    for head, other in zip(plain.heads, model.heads):  # one exit trains each: no aggregate
        assert torch.allclose(head.fc.weight.grad, other.fc.weight.grad, atol=1e-6)


def test_in_eval_mode_the_last_exit_is_compared_with_the_teacher():
    model = tiny_vgg().eval()
    task = LogitDistillationTask(model, outside := teacher(), nn.CrossEntropyLoss(), temperature=1.0, verbose=False)
    result = task(images(size=32), LABELS)
    its = outside(task.teacher.normalize_input(images(size=32), task.student_mean, task.student_std)).detach()
    logits = model(images(size=32))
    own = nn.functional.cross_entropy(logits, LABELS)
    assert torch.allclose(result["loss"], taught_loss(logits, own, its, 1.0, 1.0, 1.0), rtol=1e-4)


def test_a_teacher_of_other_classes_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"trained on 7 classes, and this network has 5; give a teacher"):
        LogitDistillationTask(tiny_vgg(), teacher(num_classes=7), verbose=False)


@pytest.mark.parametrize("named", ["a network of timm's", "a network with exits"])
def test_a_teacher_from_a_folder_keeps_its_classes_or_is_refused(named, tmp_path):
    outside = teacher() if named == "a network of timm's" else tiny_vgg().eval()
    outside.pretrained_cfg["num_classes"] = CLASSES
    save_for_hf(outside, tmp_path, model_args={} if outside.num_features > 8 else dict(depths=[1, 2], widths=[6, 8]))
    task = LogitDistillationTask(tiny_vgg(), f"local-dir:{tmp_path}", temperature=2.0, verbose=False)
    assert torch.allclose(task.teacher(images(size=32)), outside(images(size=32)), atol=1e-5)
    with pytest.raises(ValueError, match=r"trained on 5 classes, and this network has 6; give a teacher"):
        LogitDistillationTask(tiny_vgg(num_classes=6), f"local-dir:{tmp_path}", verbose=False)


class Anonymous(nn.Module):
    """A network that does not say how many classes it has."""

    def forward(self, x):
        return x.new_zeros(len(x), 1)


def test_teachers_logits_of_another_shape_are_refused_when_they_are_seen():
    task = LogitDistillationTask(tiny_vgg().train(), Anonymous(), verbose=False)
    with pytest.raises(ValueError, match=r"teacher's logits have shape \(4, 1\), the network's \(4, 5\)"):
        task(images(size=32), LABELS)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature of the distillation is"):
        LogitDistillationTask(tiny_vgg(), teacher(), temperature=temperature, verbose=False)


@pytest.mark.parametrize(
    "kind, student",
    [
        ("logit", lambda: timm.create_model("test_resnet", num_classes=CLASSES)),
        ("by keyword", lambda: timm.create_model("test_resnet", num_classes=CLASSES)),
        ("feature", lambda: timm.create_model("test_resnet", num_classes=CLASSES)),
        (
            "token",
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=CLASSES),
        ),
    ],
)
def test_plain_timm_models_are_distilled_as_before(kind, student):
    task = KNOWLEDGE[kind](student().train())
    loss = task(images(size=32), LABELS)["loss"]
    loss.backward()
    assert loss.isfinite()


def test_a_network_with_exits_can_be_the_teacher():
    student = timm.create_model("test_resnet", num_classes=CLASSES).train()
    task = LogitDistillationTask(student, tiny_vgg(), verbose=False)
    task(images(size=32), LABELS)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


# What train.py does to the classifier.


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_scaling_the_classifier_scales_every_exits(make):
    model, before = make(), make()
    same_weights(model, before)
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.5)
        model.get_classifier().bias.mul_(0.5)
    for head, old in zip(model.heads, before.heads):
        assert torch.equal(head.fc.weight, 0.5 * old.fc.weight)


@pytest.mark.parametrize("make", [tiny_msdnet, tiny_resnet], ids=["msdnet", "resnet"])
def test_setting_the_classifiers_bias_sets_every_exits(make):
    model = make()
    nn.init.constant_(model.get_classifier().bias, 1.0)
    assert all((head.fc.bias == 1.0).all() and head.fc.bias.requires_grad for head in model.heads)
    with torch.no_grad():
        model.get_classifier().bias.mul_(-3)
    assert all((head.fc.bias == -3.0).all() for head in model.heads)


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "levit_128s", "repvit_m0_9"])
def test_classifiers_of_several_layers_are_scaled_and_set_too(name):
    model = timm.create_model(f"dfs_{name}", num_classes=CLASSES)
    classifiers = model.get_classifier()
    last = [part for part in classifiers[-1].modules() if isinstance(part, nn.Linear)]
    before = [layer.weight.clone() for layer in last]
    with torch.no_grad():
        classifiers.weight.mul_(0.5)
    nn.init.constant_(classifiers.bias, 0.25)
    assert before and all(torch.equal(layer.weight, 0.5 * old) for layer, old in zip(last, before))
    assert all((layer.bias == 0.25).all() for layer in last)


def test_setting_an_absent_bias_is_refused():
    with pytest.raises(ValueError, match="no bias"):
        nn.init.constant_(tiny_vgg().get_classifier().bias, 1.0)


@pytest.mark.parametrize("name", ["shape", "data", "sum", "__add__"])
def test_other_operations_on_all_classifiers_are_an_attribute_error(name):
    with pytest.raises(AttributeError, match="one weight for each exit"):
        getattr(tiny_vgg().get_classifier().weight, name)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_the_classifier_is_a_tuple_of_modules(make):
    classifier = make().get_classifier()
    assert isinstance(classifier, tuple)
    assert [type(one) for one in classifier] == [nn.Linear] * 3


# Gradient checkpointing.


@pytest.fixture
def reentrant():
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(before)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_reentrant_checkpointing_is_refused_where_it_would_be_used(make, reentrant):
    model = make().train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task(images(), LABELS)  # no checkpointing at all
    model.set_grad_checkpointing()
    with torch.no_grad():
        task(images(), LABELS)  # nothing to recompute
    with pytest.raises(ValueError, match="set_reentrant_ckpt"):
        task(images(), LABELS)


SETTINGS = [{}, dict(distill_feature_weight=0.1), dict(gradient_equilibrium=True), dict(train_backbone=False)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_checkpointing_keeps_the_gradients_of_every_exit(make, settings):
    plain = make(drop_rate=0.0, **settings).double().train()
    checkpointed = same_weights(plain, make(drop_rate=0.0, **settings).double())
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)(images().double(), LABELS)["loss"].backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9), name


# Layer decay.


@pytest.mark.parametrize("settings", [{}, dict(distill_feature_weight=0.1)], ids=str)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_layer_decay_has_a_group_for_every_parameter_and_spares_the_heads(make, settings):
    model = make(**settings)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    scale = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert set(scale) == {id(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        assert (scale[id(parameter)] == 1.0) == name.startswith(("heads.", "adapters.")), name
