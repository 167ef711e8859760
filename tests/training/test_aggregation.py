"""An aggregator combines the exits' gradients into one, which backward() adds to .grad as usual."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TINY, images, same_weights, tiny_vgg
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn

from timm_dfs import Objective
from timm_dfs.base.objective import AGGREGATORS
from timm_dfs.training.aggregation import AggregatedExitsLoss

aggregation = pytest.importorskip("torchjd.aggregation", reason="aggregation needs torchjd, which is not installed")

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
SOLVERS = {
    "PCGrad": lambda losses: aggregation.PCGrad(),
    "CAGrad": lambda losses: aggregation.CAGrad(c=0.4),
    "NashMTL": lambda losses: aggregation.NashMTL(n_tasks=losses),
    "MGDA": lambda losses: aggregation.MGDA(),
    "AlignedMTL": lambda losses: aggregation.AlignedMTL(),
    "UPGrad": lambda losses: aggregation.UPGrad(),
}
SEED = 7  # PCGrad projects in a random order

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy, of NashMTL's


@pytest.fixture(params=TINY)
def make(request):
    return TINY[request.param]


@pytest.fixture(params=AGGREGATORS)
def aggregator(request):
    return request.param


def task_of(model, criterion=None):
    return ClassificationTask(model, criterion or nn.CrossEntropyLoss(), verbose=False)


def pair(make, aggregator, **settings):
    """A network whose gradients are summed and its twin whose gradients are aggregated in float32, both in float64."""
    plain = make(drop_rate=0.0, **settings).double().train()
    return plain, same_weights(plain, make(drop_rate=0.0, aggregator=aggregator, **settings).double())


def rows_of(losses, model):
    """Each loss's gradient of each trained parameter by name; absent where the loss does not train it."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        rows.append({name: g for name, g in zip(named, gradients) if g is not None and g.any()})
    return rows


def aggregated(rows, model, aggregator):
    """Gradient by name: the shared parameters' aggregate, the others' as they are."""
    parameters = dict(model.named_parameters())
    shared = [name for name in parameters if sum(name in row for row in rows) > 1]
    expected = {name: gradient for row in rows for name, gradient in row.items() if name not in shared}
    if shared:
        jacobian = torch.stack(
            [
                torch.cat([row.get(name, torch.zeros_like(parameters[name])).flatten() for name in shared])
                for row in rows
            ]
        )
        torch.manual_seed(SEED)
        parts = SOLVERS[aggregator](len(rows))(jacobian.float()).split([parameters[name].numel() for name in shared])
        expected |= {name: part.view_as(parameters[name]).to(jacobian) for name, part in zip(shared, parts)}
    return expected


def backward(task, x, target=LABELS, scale=None):
    torch.manual_seed(SEED)
    result = task(x, target)
    (result["loss"] if scale is None else scale * result["loss"]).backward()
    return result


def assert_gradients(model, expected, rtol=1e-4, atol=1e-6):
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=rtol, atol=atol), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def exit_losses(model, x, target=LABELS):
    return [F.cross_entropy(logits, target) for logits in model(x)]


# By hand.


@pytest.mark.parametrize(
    "aggregator, expected",
    [
        ("PCGrad", [0.5, 1.5]),  # each row less its projection on the other: (0.5, 0.5) and (0, 1)
        ("MGDA", [0.2, 0.4]),  # the shortest vector between the rows
        ("UPGrad", [0.25, 0.75]),  # half of PCGrad's, with two rows
    ],
)
def test_two_conflicting_exits_get_the_gradient_computed_by_hand(aggregator, expected):
    weight = nn.Parameter(torch.zeros(2))
    outputs = [(weight * torch.tensor(row)).sum().view(1, 1) for row in ([1.0, 0.0], [-1.0, 1.0])]
    objective = Objective(aggregator=aggregator)
    loss = AggregatedExitsLoss(lambda logits, _: logits.sum(), objective, lambda: [weight], 2)(
        outputs, torch.zeros(1).long()
    )
    loss.backward()
    assert torch.allclose(weight.grad, torch.tensor(expected), atol=1e-3)


# By torch.autograd and torchjd themselves.


@pytest.mark.parametrize("beta", ["joint", 0.5, 0.0])
def test_shared_parameters_get_the_aggregate_and_others_their_plain_gradient(make, aggregator, beta):
    plain, model = pair(make, aggregator, beta=beta)
    losses = exit_losses(plain, images(6).double())
    rows = rows_of(losses, plain)
    expected = aggregated(rows, plain, aggregator)
    result = backward(task_of(model), images(6).double())
    assert torch.allclose(result["loss"], sum(losses))
    assert_gradients(model, expected)
    heads = {name for name in expected if name.startswith("heads.")}
    assert heads == {name for name, _ in plain.named_parameters() if name.startswith("heads.")}


@pytest.mark.parametrize("aggregator", ["MGDA", "UPGrad"])
def test_the_aggregate_is_not_the_sum(make, aggregator):
    plain, model = pair(make, aggregator)
    backward(task_of(plain), images(6).double())
    backward(task_of(model), images(6).double())
    first = next(name for name, _ in plain.named_parameters())
    assert not torch.allclose(model.get_parameter(first).grad, plain.get_parameter(first).grad, rtol=0.01)


def test_every_parameter_has_a_gradient_of_its_own_shape_and_type(make, aggregator):
    model = make(aggregator=aggregator).train()
    backward(task_of(model), images(6))
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in model.parameters())


def test_weights_and_distillation_scale_the_aggregated_gradients(aggregator):
    settings = dict(loss_weights=[1, 2, 0.5], distill_weight=0.3, distill_temperature=2.0)
    plain, model = pair(tiny_vgg, aggregator, **settings)
    logits = plain(images(6).double())
    losses = task_of(plain).criterion.of_each_exit(logits, LABELS)
    expected = aggregated(rows_of(losses, plain), plain, aggregator)
    result = backward(task_of(model), images(6).double())
    assert torch.allclose(result["loss"], sum(losses))
    assert_gradients(model, expected)


def test_equilibrium_scales_the_aggregated_gradients(make):
    plain, model = pair(make, "UPGrad", gradient_equilibrium=True)
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "UPGrad")
    backward(task_of(model), images(6).double())
    assert_gradients(model, expected)


@pytest.mark.parametrize("weights, counting", [([1, 0, 2], [0, 2]), ([0, 1, 1], [1, 2]), ([1, 1, 0], [0, 1])])
def test_an_exit_of_weight_zero_is_not_aggregated(aggregator, weights, counting):
    plain, model = pair(tiny_vgg, aggregator, loss_weights=weights)
    losses = exit_losses(plain, images(6).double())
    rows = rows_of([weights[k] * losses[k] for k in counting], plain)
    result = backward(task_of(model), images(6).double())
    assert torch.allclose(result["loss"], sum(weights[k] * losses[k] for k in counting))
    assert_gradients(model, aggregated(rows, plain, aggregator))


@pytest.mark.parametrize("only", range(3))
def test_the_only_exit_with_a_weight_gets_its_plain_gradient(make, only):
    weights = [float(k == only) for k in range(3)]
    plain, model = pair(make, "NashMTL", loss_weights=weights)
    (row,) = rows_of([exit_losses(plain, images(6).double())[only]], plain)
    backward(task_of(model), images(6).double())
    assert_gradients(model, row)


def test_with_a_frozen_backbone_nothing_is_shared_and_gradients_are_plain(make):
    plain, model = pair(make, "AlignedMTL", train_backbone=False)
    backward(task_of(plain), images(6).double())
    backward(task_of(model), images(6).double())
    assert_gradients(model, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


def test_checkpointing_changes_no_gradient(make):
    plain, model = pair(make, "UPGrad")
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "UPGrad")
    model.set_grad_checkpointing()
    backward(task_of(model), images(6).double())
    assert_gradients(model, expected)


def test_checkpointing_changes_no_statistics(make):
    """Every exit's backward pass computes the forward pass again, which counts batches for batch norm again."""
    plain, model = pair(make, "UPGrad")
    model.set_grad_checkpointing()
    for network in (plain, model):
        backward(task_of(network), images(6).double())
    for (name, one), (_, other) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_adapters_share_nothing_with_other_exits(make):
    settings = dict(distill_feature_weight=0.25, loss_weights=[1, 2, 0.5])
    plain, model = pair(make, "UPGrad", **settings)
    losses = task_of(plain).criterion.of_each_exit(plain(images(6).double()), LABELS)
    expected = aggregated(rows_of(losses, plain), plain, "UPGrad")
    result = backward(task_of(model), images(6).double())
    assert torch.allclose(result["loss"], sum(losses))
    assert_gradients(model, expected)


def test_soft_targets_work(aggregator):
    soft = 0.8 * F.one_hot(LABELS, CLASSES) + 0.04
    plain, model = pair(tiny_vgg, aggregator)
    rows = rows_of([SoftTargetCrossEntropy()(logits, soft) for logits in plain(images(6).double())], plain)
    backward(task_of(model, SoftTargetCrossEntropy()), images(6).double(), soft)
    assert_gradients(model, aggregated(rows, plain, aggregator))


# As timm's train.py deals with losses.


@pytest.mark.parametrize("scale", [0.5, 1024.0])
def test_scaling_the_loss_scales_the_gradient(aggregator, scale):
    plain, model = pair(tiny_vgg, aggregator)
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, aggregator)
    backward(task_of(model), images(6).double(), scale=scale)
    assert_gradients(model, {name: scale * gradient for name, gradient in expected.items()}, atol=scale * 1e-6)


def test_under_autocast_the_aggregator_computes_in_float32(aggregator):
    plain = tiny_vgg(drop_rate=0.0).train()
    model = same_weights(plain, tiny_vgg(drop_rate=0.0, aggregator=aggregator))
    with torch.autocast("cpu", torch.bfloat16):
        losses = exit_losses(plain, images(6))
    expected = aggregated(rows_of(losses, plain), plain, aggregator)
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task_of(model)(images(6), LABELS)["loss"]
    loss.backward()
    assert_gradients(model, expected, rtol=1e-3, atol=1e-5)


def test_networks_in_half_precision_are_aggregated_too(aggregator):
    model = tiny_vgg(aggregator=aggregator, dtype=torch.bfloat16).train()
    backward(task_of(model), images(6).bfloat16())
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("early", [True, False], ids=["before_the_task", "by_the_task"])
def test_a_compiled_network_is_refused_with_the_remedy_or_aggregated_exactly(backend, early):
    torch._dynamo.reset()
    plain, model = pair(tiny_vgg, "MGDA", depths=(1, 1))
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "MGDA")
    try:
        if early:
            task = task_of(torch.compile(model, backend=backend))
        else:
            task = task_of(model)
            task.compile(backend=backend)
        backward(task, images(6).double())
    except ValueError as error:
        assert "aggregator='MGDA'" in str(error) and "--torchcompile" in str(error)
    else:
        assert_gradients(model, expected)


def test_a_loss_that_is_nan_gives_gradients_that_are_nan(aggregator):
    model = tiny_vgg(aggregator=aggregator).train()
    result = backward(task_of(model), images(6) * float("nan"))
    assert result["loss"].isnan()
    assert all(parameter.grad.isnan().any() for parameter in model.parameters())


def test_a_batch_after_a_loss_that_is_nan_is_aggregated_as_usual():
    plain, model = pair(tiny_vgg, "NashMTL")  # which keeps a state
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "NashMTL")
    task = task_of(model)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    backward(task, images(6).double() * float("nan"))
    model.load_state_dict(statistics, strict=False)
    model.zero_grad()
    backward(task, images(6).double())
    assert_gradients(model, expected)


def test_accumulating_gradients_is_refused_with_the_remedy(aggregator):
    task = task_of(tiny_vgg(aggregator=aggregator).train())
    backward(task, images(6))
    with pytest.raises(ValueError, match=f"aggregator='{aggregator}' .*--grad-accum-steps"):
        backward(task, images(6))


def test_gradients_may_be_set_to_zero_after_the_forward_pass():
    task = task_of(tiny_vgg(aggregator="UPGrad").train())
    for _ in range(2):
        loss = task(images(6), LABELS)["loss"]
        task.zero_grad()
        loss.backward()


def test_another_loss_may_be_differentiated_between_the_two_passes():
    model = tiny_vgg(aggregator="UPGrad").train()
    loss = task_of(model)(images(6), LABELS)["loss"]
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    loss.backward()


def test_parameters_that_were_replaced_after_the_task_was_made_are_trained():
    model = tiny_vgg(aggregator="UPGrad").train()
    task = task_of(model)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    model.reset_classifier(CLASSES)
    backward(task, images(6))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_exits_that_reach_frozen_layers_alone_count_for_nothing():
    model = tiny_vgg(aggregator="UPGrad", train_backbone=True, beta="joint").train()
    for parameter in [*model.stages[0].parameters(), *model.heads[0].parameters()]:
        parameter.requires_grad_(False)
    backward(task_of(model), images(6))
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_second_derivatives_are_refused():
    loss = task_of(tiny_vgg(beta="joint", aggregator="UPGrad").train())(images(6), LABELS)["loss"]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_set_to_zero_are_not_taken_for_accumulated_ones(set_to_none):
    plain, model = pair(tiny_vgg, "MGDA")
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "MGDA")
    task = task_of(model)
    backward(task, images(6, seed=3).double())
    model.zero_grad(set_to_none=set_to_none)
    backward(task, images(6).double())
    assert_gradients(model, expected)


def test_without_gradients_the_loss_is_the_sum(make):
    model = make(drop_rate=0.0, aggregator="MGDA").train()
    with torch.no_grad():
        result = task_of(model)(images(6), LABELS)
    assert torch.allclose(result["loss"], sum(F.cross_entropy(logits, LABELS) for logits in result["output"]))
    assert not result["loss"].requires_grad


def test_in_eval_mode_the_loss_is_the_last_exits(make):
    model = make(aggregator="MGDA").eval()
    result = task_of(model)(images(6), LABELS)
    assert torch.equal(result["loss"], F.cross_entropy(model(images(6)), LABELS))


def test_optimizer_steps_train_every_exit(aggregator):
    model = tiny_vgg(aggregator=aggregator).train()
    task = task_of(model)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append([F.cross_entropy(o, LABELS).item() for o in backward(task, images(6))["output"]])
        optimizer.step()
    assert all(last < first for first, last in zip(losses[0], losses[-1]))


def test_the_loss_adds_nothing_to_what_is_trained_or_saved(aggregator):
    task = task_of(tiny_vgg(aggregator=aggregator))
    assert list(task.criterion.parameters()) == []
    assert task.criterion.state_dict() == {}
    assert task.get_checkpoint_state()["state_dict"].keys() == tiny_vgg().state_dict().keys()


# What is missing.


@pytest.mark.parametrize("missing", ["torchjd", "torchjd.aggregation"])
def test_without_torchjd_the_task_says_how_to_get_it(aggregator, missing, monkeypatch):
    model = tiny_vgg(aggregator=aggregator)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "torchjd.aggregation":
        monkeypatch.delattr("torchjd.aggregation")
    with pytest.raises(ModuleNotFoundError, match=r"timm-dfs\[aggregation\]"):
        task_of(model)


def test_every_named_aggregator_is_torchjds(aggregator):
    assert issubclass(getattr(aggregation, aggregator), aggregation.Aggregator)
    assert aggregator in SOLVERS


def test_layers_can_be_frozen_and_unfrozen_after_the_task_was_created():
    plain, model = pair(tiny_vgg, "UPGrad", train_backbone=False)
    task = task_of(model)
    for network in (plain, model):
        network.requires_grad_(True)
        network.stages[0].requires_grad_(False)
    expected = aggregated(rows_of(exit_losses(plain, images(6).double()), plain), plain, "UPGrad")
    backward(task, images(6).double())
    assert_gradients(model, expected)


def test_a_batch_whose_gradients_are_zero_leaves_zeros(aggregator):
    model = tiny_vgg(aggregator=aggregator, num_classes=1).train()  # cross-entropy of one class is 0
    backward(task_of(model), images(6), torch.zeros(6, dtype=torch.long))
    assert not any(parameter.grad.any() for parameter in model.parameters())
