"""The exits' losses: their weights, the last exit as a teacher, equilibrium, heads only, and what the log says."""

import copy
import logging
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import CLASSES, TINY, images, module_modes, tiny_msdnet, tiny_resnet, tiny_vgg
from safetensors.torch import save_file
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import ModelEmaV3
from torch import nn

from timm_dfs import ExitsLoss, Objective
from timm_dfs.training.losses import LOG_INTERVAL

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
ONE_HOT = F.one_hot(LABELS, CLASSES).float()
SOFT = 0.8 * ONE_HOT + 0.04
MULTI_LABEL = (torch.arange(30).reshape(6, 5) % 3 == 0).float()

CRITERIA = {
    "cross_entropy": (nn.CrossEntropyLoss(), LABELS),
    "label_smoothing": (LabelSmoothingCrossEntropy(0.1), LABELS),
    "soft_target": (SoftTargetCrossEntropy(), SOFT),
    "binary": (BinaryCrossEntropy(), SOFT),
    "jsd": (JsdCrossEntropy(num_splits=3), LABELS),
    "multi_label": (nn.BCEWithLogitsLoss(), MULTI_LABEL),
    "function": (F.cross_entropy, LABELS),
}


@pytest.fixture(params=TINY)
def make(request):
    return TINY[request.param]


def exit_logits(exits=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, CLASSES, generator=generator).requires_grad_() for _ in range(exits)]


def test_a_loss_of_logits_refuses_an_aggregator_and_outputs_without_distances():
    with pytest.raises(ValueError, match="aggregator is 'UPGrad', which a loss of logits cannot apply"):
        ExitsLoss(F.cross_entropy, Objective(aggregator="UPGrad"))
    with pytest.raises(ValueError, match=r"distill_feature_weight is 0\.1, but .* no distances"):
        loss_of(dict(distill_feature_weight=0.1), exit_logits())


def loss_of(objective, logits, target=LABELS, criterion=F.cross_entropy):
    return ExitsLoss(criterion, Objective(**objective))(logits, target)


def task_of(model, criterion=None):
    return ClassificationTask(model, criterion or nn.CrossEntropyLoss(), verbose=False)


def gradients(loss, model):
    """Gradient of every parameter by name; zeros where the loss does not reach."""
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


# Weights.


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_weigh_every_exits_criterion(criterion):
    criterion, target = CRITERIA[criterion]
    logits = exit_logits()
    plain = [criterion(one, target) for one in logits]
    found = loss_of(dict(loss_weights=[0.5, 0, 2]), logits, target, criterion)
    assert torch.allclose(found, 0.5 * plain[0] + 2 * plain[2])
    assert torch.allclose(loss_of({}, logits, target, criterion), sum(plain))


def test_an_exit_of_weight_zero_gets_no_gradient():
    logits = exit_logits()
    loss_of(dict(loss_weights=[1, 0, 1]), logits).backward()
    assert [one.grad.any().item() for one in logits] == [True, False, True]


def test_weights_reach_training_through_the_model(make):
    model = make(drop_rate=0.0, loss_weights=[3, 2, 1]).train()
    result = task_of(model)(images(6), LABELS)
    expected = sum(w * F.cross_entropy(one, LABELS) for w, one in zip((3, 2, 1), result["output"]))
    assert torch.allclose(result["loss"], expected)


# The last exit's logits as a teacher.


def soft_cross_entropy(student, teacher, temperature):
    """By its definition, in float64, a sample at a time."""
    total = 0.0
    for ours, theirs in zip(student.detach().double(), teacher.detach().double()):
        wanted = [math.exp(v / temperature) for v in theirs]
        given = [math.exp(v / temperature) for v in ours]
        total -= sum(w / sum(wanted) * math.log(g / sum(given)) for w, g in zip(wanted, given))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1, 3.0, 0.5])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_distillation_takes_its_share_of_the_early_exits_losses(criterion, share, temperature):
    criterion, target = CRITERIA[criterion]
    logits = exit_logits()
    found = loss_of(dict(distill_weight=share, distill_temperature=temperature), logits, target, criterion)
    expected = criterion(logits[2], target).item()
    for early in logits[:2]:
        expected += (1 - share) * criterion(early, target).item()
        expected += share * soft_cross_entropy(early, logits[2], temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_weights_weigh_a_distilled_exit_as_a_whole():
    logits = exit_logits()
    each = ExitsLoss(F.cross_entropy, Objective(distill_weight=0.3)).of_each_exit(logits, LABELS)
    found = loss_of(dict(distill_weight=0.3, loss_weights=[3, 0.5, 2]), logits)
    assert torch.allclose(found, 3 * each[0] + 0.5 * each[1] + 2 * each[2])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_teacher_is_trained_by_the_target_alone(share):
    logits = exit_logits()
    loss_of(dict(distill_weight=share), logits).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[2], LABELS), logits[2])
    assert torch.equal(logits[2].grad, expected)


def test_a_fully_distilled_exit_does_not_use_the_target():
    logits = exit_logits()
    loss_of(dict(distill_weight=1.0), logits).backward()
    early = [one.grad.clone() for one in logits[:2]]
    again = exit_logits()
    loss_of(dict(distill_weight=1.0), again, LABELS.flip(0)).backward()
    assert all(torch.equal(one.grad, expected) for one, expected in zip(again, early))


def test_one_tensor_gets_the_plain_criterion_with_any_objective():
    logits = exit_logits(1)[0]
    objective = dict(loss_weights=[1, 2, 3], distill_weight=0.3, distill_feature_weight=0.1)
    assert torch.equal(loss_of(objective, logits), F.cross_entropy(logits, LABELS))


# The last exit's feature as a teacher.


def pooled_features(model):
    """Inputs of every head's classifier, filled by the next forward pass."""
    seen = {}
    for k, head in enumerate(model.heads):
        head.fc.register_forward_pre_hook(lambda _, inputs, k=k: seen.__setitem__(k, inputs[0]))
    return seen


def test_feature_distillation_adds_the_distance_between_pooled_features(make):
    model = make(drop_rate=0.0, distill_feature_weight=0.25).train()
    seen = pooled_features(model)
    result = task_of(model)(images(6), LABELS)
    *logits, distances = result["output"]
    expected = sum(F.cross_entropy(one, LABELS) for one in logits)
    for k, adapter in enumerate(model.adapters):
        adapted = seen[k] @ adapter.weight.T + adapter.bias
        distance = (adapted - seen[2]).square().sum().sqrt()
        assert torch.allclose(distances[k], distance)
        expected = expected + 0.25 * distance
    assert torch.allclose(result["loss"], expected)


def test_a_distance_trains_its_adapter_and_what_feeds_it_but_nothing_of_the_last_exits_own(make):
    model = make(drop_rate=0.0, distill_feature_weight=0.25, beta="joint").train()
    *_, distances = model(images(6))
    found = gradients(distances[0], model)
    reached = {name for name, gradient in found.items() if gradient.any()}
    assert {"adapters.0.weight", "adapters.0.bias"} <= reached
    assert any(not name.startswith(("adapters.", "heads.")) for name in reached)
    assert not any(name.startswith(("adapters.1.", "heads.1.", "heads.2.")) for name in reached)
    assert not any(name.startswith("heads.0.fc") for name in reached)


def test_the_last_exits_gradient_is_that_of_its_own_criterion(make):
    model = make(drop_rate=0.0, distill_feature_weight=0.25, distill_weight=0.3).train()
    result = task_of(model)(images(6), LABELS)
    found = gradients(result["loss"], model)
    expected = gradients(F.cross_entropy(result["output"][2], LABELS), model)
    for name in (name for name in found if name.startswith("heads.2.")):
        assert torch.allclose(found[name], expected[name]), name


def test_both_kinds_of_distillation_and_weights_add_up():
    model = tiny_vgg(
        distill_weight=0.3, distill_temperature=2, distill_feature_weight=0.25, loss_weights=[3, 2, 1]
    ).train()
    result = task_of(model)(images(6), LABELS)
    *logits, distances = result["output"]
    early = [
        0.7 * F.cross_entropy(logits[k], LABELS)
        + 0.3 * soft_cross_entropy(logits[k], logits[2], 2)
        + 0.25 * distances[k]
        for k in range(2)
    ]
    expected = 3 * early[0] + 2 * early[1] + F.cross_entropy(logits[2], LABELS)
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_are_trained_by_the_optimizer(make):
    model = make(drop_rate=0.0, distill_feature_weight=0.25).train()
    before = copy.deepcopy(model.adapters.state_dict())
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1)
    task_of(model)(images(6), LABELS)["loss"].backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.adapters.state_dict().items())


def test_adapters_take_every_exits_width_to_the_last_ones():
    model = tiny_vgg(widths=(6, 8), depths=(1, 2), distill_feature_weight=1)
    assert [(a.in_features, a.out_features) for a in model.adapters] == [(6, 8), (8, 8)]
    pooled = tiny_vgg(distill_feature_weight=1, global_pool="catavgmax")
    assert [(a.in_features, a.out_features) for a in pooled.adapters] == [(12, 16), (16, 16)]
    assert len(pooled.train()(images())) == 4


def test_in_eval_mode_adapters_are_not_used(make):
    model = make(distill_feature_weight=0.25).eval()
    assert model(images()).shape == (4, CLASSES)
    assert len(model.forward_exits(images())) == 3


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_with_adapters_loads_with_and_without_them(make, suffix, tmp_path):
    file = tmp_path / f"model.{suffix}"
    trained = make(distill_feature_weight=0.25)
    (torch.save if suffix == "pth" else save_file)(trained.state_dict(), file)
    overlay = dict(file=str(file), num_classes=CLASSES)
    for settings in ({}, dict(distill_feature_weight=0.25)):
        model = make(pretrained=True, pretrained_cfg_overlay=overlay, **settings)
        assert torch.equal(model.eval()(images()), trained.eval()(images()))


def test_a_checkpoint_without_adapters_loads_with_them(make, tmp_path):
    trained = make()
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    overlay = dict(file=str(tmp_path / "model.pth"), num_classes=CLASSES)
    model = make(pretrained=True, pretrained_cfg_overlay=overlay, distill_feature_weight=0.25)
    assert len(model.adapters) == 2
    assert torch.equal(model.eval()(images()), trained.eval()(images()))


def test_adapters_are_made_in_the_models_type():
    model = tiny_vgg(distill_feature_weight=0.25, dtype=torch.bfloat16).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    task_of(model)(images(6).bfloat16(), LABELS)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_distances_of_a_model_without_adapters_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="distill_feature_weight"):
        tiny_vgg().forward_distances(images())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_setting_works_with_every_criterion(criterion):
    criterion, target = CRITERIA[criterion]
    model = tiny_vgg(
        loss_weights=[1, 1, 2], distill_weight=0.3, distill_feature_weight=0.1, gradient_equilibrium=True
    ).train()
    kind = MultiLabelClassificationTask if target.ndim == 2 else ClassificationTask
    kind(model, criterion, verbose=False)(images(6), target)["loss"].backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("exit_index", range(3))
def test_a_loss_that_is_not_a_number_passes_through(exit_index):
    logits = exit_logits()
    with torch.no_grad():
        logits[exit_index][0, 0] = float("nan")
    for objective in ({}, dict(distill_weight=0.3), dict(loss_weights=[1, 2, 3])):
        assert loss_of(objective, logits).isnan()


def test_distillation_works_under_autocast():
    model = tiny_resnet(distill_weight=0.3, distill_feature_weight=0.25, gradient_equilibrium=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = task_of(model)(images(6), LABELS)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# The log.


@pytest.fixture
def lines(caplog):
    """The messages logged so far."""
    caplog.set_level(logging.INFO, "timm_dfs")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("timm_dfs")]


def test_the_first_batch_and_every_fiftieth_have_a_line(lines):
    loss = ExitsLoss(F.cross_entropy)
    counts = []
    for _ in range(2 * LOG_INTERVAL + 1):
        loss(exit_logits(), LABELS)
        counts.append(len(lines()))
    assert (LOG_INTERVAL, counts[0], counts[49], counts[50], counts[99], counts[100]) == (50, 1, 1, 2, 2, 3)


def test_a_line_names_every_exits_loss_and_accuracy(lines):
    right = 10 * ONE_HOT
    half = torch.cat((right[:3], right[3:].roll(1, -1)))
    ExitsLoss(nn.CrossEntropyLoss(reduction="sum"))([right.roll(1, -1), half, right], LABELS)
    (line,) = lines()
    losses = [F.cross_entropy(one, LABELS, reduction="sum") for one in (right.roll(1, -1), half, right)]
    assert line == f"Exits 0 to 2:  Loss: {' '.join(f'{value:#.3g}' for value in losses)}  Acc@1: 0.0 50.0 100.0"


def test_a_line_is_the_mean_since_the_last_one(lines):
    loss = ExitsLoss(F.cross_entropy)
    right = 10 * ONE_HOT
    for batch in range(51):
        loss([right if batch % 5 == 0 else right.roll(1, -1)], LABELS)
    assert [line.split("Acc@1: ")[1] for line in lines()] == ["100.0", "20.0"]


def test_a_line_tells_the_criterion_without_weights_and_distillation(lines):
    objective = dict(loss_weights=[7, 8, 9], distill_weight=1.0)
    loss_of(objective, exit_logits())
    loss_of({}, exit_logits())
    weighted, plain = lines()
    assert weighted == plain


@pytest.mark.parametrize(
    "target, accuracy",
    [(LABELS, "100.0"), (ONE_HOT, "100.0"), (SOFT, "100.0"), (SOFT.roll(1, -1), "0.0"), (MULTI_LABEL, "nan")],
    ids=["labels", "one_hot", "soft", "soft_elsewhere", "multi_label"],
)
def test_accuracy_is_of_the_likeliest_class_and_no_number_without_one(lines, target, accuracy):
    criterion = nn.CrossEntropyLoss() if target.ndim == 1 else nn.BCEWithLogitsLoss()
    ExitsLoss(criterion)([10 * ONE_HOT], target)
    assert lines()[0].endswith(f"Acc@1: {accuracy}")


def test_neither_eval_mode_nor_plain_models_are_logged(lines):
    task_of(tiny_vgg().eval())(images(6), LABELS)
    task_of(timm.create_model("test_resnet", num_classes=CLASSES))(images(6, size=32), LABELS)
    assert lines() == []


def test_a_loss_that_is_not_a_number_is_logged_as_such(lines):
    ExitsLoss(F.cross_entropy)([exit_logits()[0] * float("nan"), exit_logits()[0]], LABELS)
    assert "Loss: nan " in lines()[0]


def test_the_log_keeps_no_graph_and_no_more_than_fifty_batches():
    loss = ExitsLoss(F.cross_entropy)
    for _ in range(120):
        loss(exit_logits(), LABELS)
    assert len(loss._sums) <= LOG_INTERVAL
    assert not any(entry.requires_grad for entry in loss._sums)


# Gradient equilibrium.


def exit_gradients(model, x):
    """Plain gradients of every exit's loss."""
    return [gradients(F.cross_entropy(one, LABELS), model) for one in model(x)]


def balanced_pair(make, **settings):
    """A network without gradient equilibrium and its twin with it, in float64 for exact comparisons."""
    plain = make(drop_rate=0.0, **settings).double().train()
    balanced = make(drop_rate=0.0, gradient_equilibrium=True, **settings).double().train()
    balanced.load_state_dict(plain.state_dict())
    return plain, balanced


def tiny_chain_msdnet(**kwargs):
    """MSDNet of one scale. With more, what deeper exits send back past an exit point is not scaled there."""
    return tiny_msdnet(growth_factors=(1,), bottleneck_factors=(1,), **kwargs)


def exits_before(name):
    """How many exits come before a layer of the backbone."""
    part, index, *_ = name.split(".")
    return {"stages": int(index), "layers": max(0, int(index) - 2)}[part] if part in ("stages", "layers") else 0


CHAINS = {"msdnet_of_one_scale": tiny_chain_msdnet, "resnet": tiny_resnet, "vgg": tiny_vgg}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_without_partition_every_exit_counts_the_same_in_every_layer(make):
    plain, balanced = balanced_pair(make, beta="joint")
    each = exit_gradients(plain, images(6).double())
    found = gradients(task_of(balanced)(images(6).double(), LABELS)["loss"], balanced)
    for name, gradient in found.items():
        share = 1 if name.startswith("heads.") else 1 / (3 - exits_before(name))
        expected = share * sum(gradients[name] for gradients in each)
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("exit_index", range(3))
def test_without_partition_one_exits_contribution_to_the_stem_is_one_in_three(make, exit_index):
    plain, balanced = balanced_pair(make, beta="joint")
    wanted = exit_gradients(plain, images(6).double())[exit_index]
    found = exit_gradients(balanced, images(6).double())[exit_index]
    first = next(name for name, _ in plain.named_parameters())
    assert torch.allclose(found[first], wanted[first] / 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_with_partition_every_exit_that_trains_a_layer_counts_the_same_there(make, referencing, beta):
    """Scaling commutes with cutting channels off: the partitioned gradients are weighed as the plain ones."""
    plain, balanced = balanced_pair(make, beta=beta, referencing=referencing)
    each = exit_gradients(plain, images(6).double())
    found = exit_gradients(balanced, images(6).double())
    for name in found[0]:
        share = 1 if name.startswith("heads.") else 1 / (3 - exits_before(name))
        for ours, theirs in zip(found, each):
            assert torch.allclose(ours[name], share * theirs[name], rtol=1e-9, atol=1e-12), name


def test_vggs_partly_trained_features_are_balanced_too():
    model = tiny_vgg(gradient_equilibrium=True, beta=0.5)
    assert all(partition.in_parts for partition in model.partitions)  # else the test above missed that path


def test_exits_are_balanced_where_msdnets_coarsest_scale_is_read():
    """As in the official code for GE: what deeper exits send back through finer scales is not scaled."""
    plain, balanced = balanced_pair(tiny_msdnet, beta="joint")
    each = exit_gradients(plain, images(6).double())
    found = exit_gradients(balanced, images(6).double())
    for name in (name for name in found[0] if not name.startswith("heads.")):
        assert torch.allclose(found[0][name], each[0][name] / 3, rtol=1e-9, atol=1e-12), name
    finest = next(name for name, _ in plain.named_parameters())
    assert not torch.allclose(found[2][finest], each[2][finest] / 3, rtol=1e-3)


def test_heads_are_trained_as_without_equilibrium(make):
    plain, balanced = balanced_pair(make)
    each = exit_gradients(plain, images(6).double())
    found = gradients(task_of(balanced)(images(6).double(), LABELS)["loss"], balanced)
    for k in range(3):
        for name in (name for name in found if name.startswith(f"heads.{k}.")):
            assert torch.allclose(found[name], each[k][name], rtol=1e-9, atol=1e-12), name


def test_equilibrium_weighs_weighted_losses(make):
    plain, balanced = balanced_pair(make, beta="joint")
    weighted = make(drop_rate=0.0, gradient_equilibrium=True, loss_weights=[1, 2, 4], beta="joint").double().train()
    weighted.load_state_dict(plain.state_dict())
    each = exit_gradients(balanced, images(6).double())
    found = gradients(task_of(weighted)(images(6).double(), LABELS)["loss"], weighted)
    for name, gradient in found.items():
        expected = each[0][name] + 2 * each[1][name] + 4 * each[2][name]
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12), name


# Heads only.


def frozen_task(make, **settings):
    model = make(drop_rate=0.0, train_backbone=False, **settings).train()
    return model, task_of(model)


def of_heads(name):
    return name.startswith(("heads.", "adapters."))


@pytest.mark.parametrize("settings", [{}, dict(distill_weight=0.3, distill_feature_weight=0.1)], ids=["plain", "byot"])
def test_heads_only_trains_heads_and_adapters_and_nothing_else(make, settings):
    model, task = frozen_task(make, **settings)
    assert all(parameter.requires_grad == of_heads(name) for name, parameter in model.named_parameters())
    task(images(6), LABELS)["loss"].backward()
    assert all((parameter.grad is not None) == of_heads(name) for name, parameter in model.named_parameters())


def test_heads_only_moves_no_statistics_of_the_backbone(make):
    model, task = frozen_task(make)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    task(images(6), LABELS)
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("heads.")}


def test_heads_only_trains_heads_as_if_the_backbone_answered_in_eval_mode(make):
    model, task = frozen_task(make)
    plain = make(drop_rate=0.0)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    plain.heads.train()
    expected = gradients(sum(F.cross_entropy(one, LABELS) for one in plain.forward_exits(images(6))), plain)
    task(images(6), LABELS)["loss"].backward()
    for name, parameter in model.heads.named_parameters():
        assert torch.allclose(parameter.grad, expected[f"heads.{name}"], rtol=1e-4, atol=1e-6), name


def test_heads_only_survives_changes_of_mode_and_copies(make):
    model, _ = frozen_task(make, distill_feature_weight=0.1)
    training = module_modes(model)
    assert {name.split(".")[0] for name, mode in training.items() if mode and name} == {"heads", "adapters"}
    assert not any(module_modes(model.eval()).values())
    assert module_modes(model.train()) == training
    twin = copy.deepcopy(model)
    assert module_modes(twin.eval().train()) == training
    assert all(parameter.requires_grad == of_heads(name) for name, parameter in twin.named_parameters())


def test_heads_only_starts_in_the_mode_in_which_timm_creates_models(make):
    model = make(train_backbone=False)
    assert model.training == make().training
    assert model.heads.training == model.training


def test_heads_only_works_with_timms_average_of_weights(make):
    model, task = frozen_task(make)
    ema = task.setup_ema(decay=0.5)
    assert isinstance(ema, ModelEmaV3)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.5)
    before = copy.deepcopy(model.state_dict())
    task(images(6), LABELS)["loss"].backward()
    optimizer.step()
    task.update_ema()
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, (before[name] + model.state_dict()[name]) / 2, atol=1e-6), name


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_heads_only_gives_the_optimizer_nothing_of_the_backbone(make, weight_decay, layer_decay):
    model = make(train_backbone=False, distill_feature_weight=0.1)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=weight_decay, layer_decay=layer_decay)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in model.named_parameters() if of_heads(name)}


def test_heads_only_leaves_the_backbone_as_it_was_after_steps_with_weight_decay(make):
    model, task = frozen_task(make)
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        task(images(6), LABELS)["loss"].backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("heads.") for name in changed)


@pytest.mark.parametrize("without", [(2,), (0, 2), (1,)], ids=str)
def test_heads_only_leaves_exits_without_a_weight_as_they_were(make, without):
    weights = [0 if k in without else 1 for k in range(3)]
    model, task = frozen_task(make, loss_weights=weights, distill_weight=1.0)
    before = copy.deepcopy(model).eval().forward_exits(images(6))
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        task(images(6), LABELS)["loss"].backward()
        optimizer.step()
    after = model.eval().forward_exits(images(6))
    assert [torch.equal(old, new) for old, new in zip(before, after)] == [k in without for k in range(3)]


def test_labels_do_not_matter_to_early_exits_that_only_learn_from_the_last(make):
    model, task = frozen_task(make, loss_weights=[1, 1, 0], distill_weight=1.0)
    one = gradients(task(images(6), LABELS)["loss"], model)
    assert one
    for name, gradient in gradients(task(images(6), LABELS.flip(0))["loss"], model).items():
        assert torch.equal(gradient, one[name]), name


def test_a_frozen_last_exit_gets_no_new_classifier(make):
    model = make(train_backbone=False, loss_weights=[1, 1, 0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"a new classifier would stay random; first call train_for"):
        model.reset_classifier(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train_for(Objective())
    model.reset_classifier(7)
    assert model.num_classes == 7


def test_a_frozen_early_exit_gets_no_new_classifier_either(make):
    model = make(train_backbone=False, loss_weights=[0, 1, 1])
    with pytest.raises(ValueError, match=r"freeze exit 0, so a new classifier would stay random"):
        model.reset_classifier(7)


@pytest.mark.parametrize(("weights", "frozen"), [([1, 1, 0], 2), ([1, 0, 1], 1), ([1, 0, 0], 1)])
def test_an_exit_after_a_trained_one_that_is_chained_to_it_cannot_be_frozen(make, weights, frozen):
    with pytest.raises(ValueError, match=rf"freeze exit {frozen}, but exits are chained \(chain=0.5\).*give chain=0"):
        make(train_backbone=False, loss_weights=weights, chain=0.5)


def test_an_exit_before_all_trained_ones_may_be_frozen_in_a_chain(make):
    assert make(train_backbone=False, loss_weights=[0, 1, 1], chain=0.5).objective.frozen_exits == {0}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(loss_weights=[0, 0, 1], beta=0.5), "exits 0, 1 no weight, and with beta=0.5 no other loss"),
        (dict(loss_weights=[0, 1, 1], beta=[0.5, 1]), "exit 0 no weight"),
        (dict(loss_weights=[0, 0, 1], beta="joint"), None),
        (dict(loss_weights=[0, 1, 1], beta=[1, 0.5]), None),
        (dict(loss_weights=[1, 1, 1], beta=0.5), None),
        (dict(loss_weights=[1, 1, 0], beta=0.5, referencing="one_sided"), None),
        (dict(loss_weights=[1, 1, 0], beta=0.5, referencing="two_sided"), "no exit after exit 1 a weight, and with"),
        (dict(loss_weights=[1, 0, 0], beta=[0, 1], referencing="two_sided"), None),
        (dict(loss_weights=[0, 1, 1], beta=0.5, train_backbone=False), None),
    ],
)
def test_channels_that_no_loss_trains_are_warned_of(make, settings, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(**settings)
    assert [told in str(warning.message) for warning in caught] == [True] * (told is not None)


def test_adapters_are_trained_whatever_is_frozen(make):
    model = make()
    model.train_for(Objective(distill_feature_weight=0.1))
    model.train_for(Objective(distill_feature_weight=0.1, train_backbone=False, loss_weights=[1, 1, 0]))
    assert all(parameter.requires_grad for parameter in model.adapters.parameters())


def test_heads_of_exits_that_get_a_weight_again_are_trained(make):
    model = make(train_backbone=False, loss_weights=[1, 1, 0])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.train_for(Objective(train_backbone=False))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} < frozen
    assert all(parameter.requires_grad for k in range(3) for parameter in model.head_parameters(k))


def test_heads_only_keeps_fresh_classifiers_trainable(make):
    model, _ = frozen_task(make)
    model.reset_classifier(7)
    assert all(parameter.requires_grad == of_heads(name) for name, parameter in model.named_parameters())
    result = task_of(model)(images(6), LABELS)
    assert result["output"][0].shape == (6, 7)
    result["loss"].backward()


def test_heads_only_works_with_checkpointing_and_equilibrium(make):
    model, task = frozen_task(make, gradient_equilibrium=True)
    model.set_grad_checkpointing()
    task(images(6), LABELS)["loss"].backward()
    assert all(parameter.grad.any() for parameter in model.heads.parameters())


def test_a_frozen_backbone_loads_weights(make, tmp_path):
    trained = make()
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    overlay = dict(file=str(tmp_path / "model.pth"), num_classes=CLASSES)
    model = make(pretrained=True, pretrained_cfg_overlay=overlay, train_backbone=False)
    assert torch.equal(model.eval()(images()), trained.eval()(images()))
    assert all(parameter.requires_grad == of_heads(name) for name, parameter in model.named_parameters())


def test_the_backbone_is_trained_by_default(make):
    assert all(parameter.requires_grad for parameter in make().parameters())
    assert all(module_modes(make().train()).values())


# Changes after the model is made.


@pytest.mark.parametrize("global_pool", [None, "catavgmax", "max"])
def test_fresh_classifiers_with_another_pooling_have_adapters_that_fit(make, global_pool):
    model = make(distill_feature_weight=0.25)
    model.reset_classifier(7, global_pool)
    task_of(model.train())(images(6), LABELS)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_network_without_classes_may_have_adapters(make):
    model = make(num_classes=0, distill_feature_weight=0.25).train()
    assert len(model(images(6))) == 4


def test_another_objective_undoes_the_one_before(make):
    model = make(train_backbone=False, distill_feature_weight=0.25)
    model.train_for(Objective())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module_modes(model.train()).values())
    assert len(model(images(6))) == 3


def test_a_checkpoint_loaded_as_train_py_does_loses_its_adapters(make, tmp_path):
    """As timm's validate.py does, without the settings the checkpoint was trained with."""
    trained = make(distill_feature_weight=0.25)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / "last.pth.tar")
    model = make()
    timm.models.load_checkpoint(model, str(tmp_path / "last.pth.tar"))
    assert torch.equal(model.eval()(images()), trained.eval()(images()))


def test_an_empty_batch_of_soft_targets_is_a_loss_that_is_not_a_number():
    assert ExitsLoss(SoftTargetCrossEntropy())([torch.zeros(0, CLASSES)] * 2, torch.zeros(0, CLASSES)).isnan()
