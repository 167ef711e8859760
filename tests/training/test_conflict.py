"""Gradient conflict is the cosine between the exits' gradients, layer by layer, and measuring it changes nothing."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import CLASSES, TINY, images, module_modes, settled, tiny_resnet, tiny_vgg
from torch import nn

from timm_dfs import MultiExitModel, gradient_conflict
from timm_dfs.base.heads import ExitHead

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
BATCHES = [(images(6), LABELS), (images(6, seed=1), LABELS.flip(0))]


@pytest.fixture(params=TINY)
def make(request):
    return TINY[request.param]


class Toy(MultiExitModel):
    """One convolution of four channels, and exits that all read its output."""

    def __init__(self, classifiers, beta="joint"):
        super().__init__(2, 3, 0.0, beta, "two_sided", None)
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.feature_info = [dict(num_chs=4, reduction=1, module="conv") for _ in classifiers]
        self.attach_exits([ExitHead(4, 2, bias=False) for _ in classifiers])
        for head, weight in zip(self.heads, classifiers):
            head.fc.weight.data = weight.clone()

    def start(self, x):
        return [self.conv(x)]

    def advance(self, state, exit_index):
        return state


ROW = torch.tensor([1.0, -2.0, 3.0, 0.5])
FOR = torch.stack((ROW, -ROW))
AGAINST = torch.stack((-ROW, ROW))
ONE = [(images(1), torch.tensor([0]))]


# By hand.


def test_identical_exits_have_cosine_1():
    conflict = gradient_conflict(Toy([FOR, FOR]), [(images(6), LABELS % 2)])
    assert conflict.layers == ("conv",)
    assert torch.allclose(conflict.cosine, torch.ones(1, 2, 2))
    assert conflict.conflicting == 0.0


def test_opposite_exits_have_cosine_minus_1():
    conflict = gradient_conflict(Toy([FOR, AGAINST]), ONE)
    assert torch.allclose(conflict.cosine[0], torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert conflict.conflicting == 1.0


def test_exits_that_read_different_channels_have_cosine_0_and_do_not_conflict():
    halves = [FOR * torch.tensor([1.0, 1, 0, 0]), FOR * torch.tensor([0.0, 0, 1, 1])]
    conflict = gradient_conflict(Toy(halves), ONE)
    assert torch.allclose(conflict.cosine[0], torch.eye(2), atol=1e-6)
    assert conflict.conflicting == 0.0


def test_a_partition_gives_conflicting_exits_cosine_0():
    conflict = gradient_conflict(Toy([FOR, AGAINST], beta=0.5), ONE)
    assert torch.equal(conflict.cosine[0, 0, 1], torch.tensor(0.0))
    assert conflict.conflicting == 0.0


def test_conflicting_is_a_share_of_the_pairs():
    conflict = gradient_conflict(Toy([FOR, FOR, AGAINST]), ONE)
    assert conflict.conflicting == pytest.approx(2 / 3)
    assert conflict.cosine[0].sign().tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]


def test_cosines_are_the_mean_over_batches():
    alike = (torch.zeros(1, 3, 4, 4), torch.tensor([0]))
    alike[0][:, 0] = 1
    model = Toy([FOR, FOR.flip(1)])
    first, second = gradient_conflict(model, ONE), gradient_conflict(model, [alike])
    both = gradient_conflict(model, [*ONE, alike])
    assert torch.allclose(both.cosine, (first.cosine + second.cosine) / 2)
    assert both.conflicting == (first.conflicting + second.conflicting) / 2


# By torch.autograd.


def expected_cosines(model, x, target):
    """By layer and pair of exits, where both train the layer."""
    layers = {}
    for name, parameter in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    found = {}
    losses = [F.cross_entropy(logits, target) for logits in model.forward_exits(x)]
    for layer, parameters in layers.items():
        vectors = []
        for loss in losses:
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            vectors.append(
                torch.cat([(p.new_zeros(p.shape) if g is None else g).flatten() for p, g in zip(parameters, parts)])
            )
        for i, first in enumerate(vectors):
            for j, second in enumerate(vectors):
                if first.any() and second.any():
                    found[layer, i, j] = (first @ second / (first.norm() * second.norm())).item()
    return found


@pytest.mark.parametrize("beta", ["joint", 0.5, 0.2])
def test_cosines_are_those_of_separate_backward_passes(make, beta):
    model = settled(make(beta=beta)).double()
    conflict = gradient_conflict(model, [(images(6).double(), LABELS)])
    expected = expected_cosines(model, images(6).double(), LABELS)
    shared = {layer for layer, i, j in expected if i != j}
    assert set(conflict.layers) == shared
    for layer, cosine in zip(conflict.layers, conflict.cosine):
        for i in range(3):
            for j in range(3):
                assert cosine[i, j].item() == pytest.approx(
                    expected.get((layer, i, j), float("nan")), abs=1e-5, nan_ok=True
                )
    pairs = [value for (layer, i, j), value in expected.items() if i < j]
    assert conflict.conflicting == pytest.approx(sum(value < -1e-12 for value in pairs) / len(pairs))


def test_layers_come_in_the_networks_order_and_are_shared(make):
    model = settled(make(beta="joint"))
    conflict = gradient_conflict(model, BATCHES)
    names = [name for name, _ in model.named_modules()]
    assert [name for name in names if name in conflict.layers] == list(conflict.layers)
    assert not any(name.startswith("heads.") for name in conflict.layers)
    assert conflict.cosine.shape == (len(conflict.layers), 3, 3)
    assert torch.allclose(conflict.cosine, conflict.cosine.mT, equal_nan=True)
    assert conflict.cosine[~conflict.cosine.isnan()].abs().max() <= 1 + 1e-6


def test_an_exit_that_does_not_train_a_layer_has_no_cosine_there():
    conflict = gradient_conflict(settled(tiny_vgg(beta="joint")), BATCHES)
    cosine = dict(zip(conflict.layers, conflict.cosine))
    assert not cosine["stages.0.conv"].isnan().any()
    assert cosine["stages.1.conv"][0].isnan().all() and not cosine["stages.1.conv"][1:, 1:].isnan().any()
    assert "stages.2.conv" not in cosine


@pytest.mark.parametrize("make", [tiny_vgg, tiny_resnet], ids=["vgg", "resnet"])
def test_a_two_sided_partition_gives_an_exit_and_deeper_ones_cosine_0_in_its_last_layer(make):
    """Deeper exits train the shared channels of the exit's feature and it trains the others: cosine 0."""
    conflict = gradient_conflict(settled(make(beta=0.25)), BATCHES)
    cosine = dict(zip(conflict.layers, conflict.cosine))
    last = [name for name in cosine if name.startswith("stages.0.")][-1]
    assert cosine[last][0, 1:].tolist() == [0.0, 0.0]
    assert cosine[last][1, 2].abs() > 0


@pytest.mark.parametrize("settings", [{}, dict(gradient_equilibrium=True), dict(loss_weights=[1, 0, 5])], ids=str)
def test_the_objective_does_not_change_the_conflict(settings):
    plain = settled(tiny_vgg())
    model = tiny_vgg(**settings)
    model.load_state_dict(plain.state_dict())
    expected, found = gradient_conflict(plain, BATCHES), gradient_conflict(model, BATCHES)
    assert torch.allclose(found.cosine, expected.cosine, atol=1e-5, equal_nan=True)


def test_of_a_layer_that_an_exit_reaches_in_part_the_rest_counts_as_zero():
    """CaiT's position embedding is early, its class token late; both are the network's own parameters."""
    model = timm.create_model("dfs_cait_xxs24_224", num_classes=5, exits=3, beta="joint", img_size=32)
    found = gradient_conflict(model, [(images(2, size=32), torch.tensor([0, 1]))])
    own = found.layers.index("backbone")
    assert found.cosine[own].isfinite().all()


def test_adapters_and_checkpointing_do_not_change_the_conflict(make):
    plain = settled(make())
    model = make(distill_feature_weight=0.1)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.set_grad_checkpointing()
    expected, found = gradient_conflict(plain, BATCHES), gradient_conflict(model, BATCHES)
    assert found.layers == expected.layers
    assert torch.allclose(found.cosine, expected.cosine, atol=1e-4, equal_nan=True)


# What it leaves alone.


def test_neither_gradients_nor_statistics_nor_modes_change(make):
    model = make().train()
    model.heads[1].eval()
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, k) if k % 2 else None
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [None if gradient is None else gradient.clone() for gradient in gradients]
    state, modes = copy.deepcopy(model.state_dict()), module_modes(model)
    gradient_conflict(model, BATCHES)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients))
    assert all(g is None or torch.equal(g, before) for g, before in zip(gradients, copies))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert module_modes(model) == modes


def test_modes_are_restored_after_an_error(make):
    model = make().train()
    modes = module_modes(model)
    with pytest.raises(ValueError):
        gradient_conflict(model, [(images(6)[:, :1], LABELS)])
    assert module_modes(model) == modes


def test_the_mode_it_is_called_in_does_not_matter(make):
    model = settled(make())
    expected = gradient_conflict(model, BATCHES)
    with torch.no_grad():
        found = gradient_conflict(model.train(), iter(BATCHES))
    assert torch.equal(found.cosine.nan_to_num(), expected.cosine.nan_to_num())


# What it refuses.


def test_no_batches_are_refused(make):
    with pytest.raises(ValueError, match="no batches"):
        gradient_conflict(make(), [])


def test_a_model_without_exits_is_refused():
    with pytest.raises(ValueError, match="ResNet has no exits"):
        gradient_conflict(timm.create_model("test_resnet", num_classes=CLASSES), BATCHES)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_vgg(beta=0.0),
        lambda: tiny_resnet(beta=0.0),
        lambda: tiny_vgg(beta="joint", train_backbone=False),
        lambda: tiny_vgg(beta="joint", train_backbone=False, loss_weights=(1, 1, 0)),
        lambda: tiny_vgg(depths=(1,), widths=(6,)),
    ],
    ids=["beta 0", "beta 0 in stages", "frozen", "frozen with the last exit", "one exit"],
)
def test_a_model_without_shared_layers_is_refused(model):
    with pytest.raises(ValueError, match="No layer is trained by two exits"):
        gradient_conflict(settled(model()), BATCHES)


@pytest.mark.parametrize("where", ["weights", "images"])
def test_gradients_that_are_not_finite_are_refused(where):
    model, x = settled(tiny_vgg()), images(6)
    with torch.no_grad():
        (model.stages[0].conv.weight if where == "weights" else x)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gradient_conflict(model, [(x, LABELS)])


@pytest.mark.parametrize(
    "x", [images(6)[:, :1], images(6)[0], images(6).byte(), images(6).tolist()], ids=["grey", "one", "bytes", "list"]
)
def test_a_batch_that_is_not_of_images_is_refused(x):
    with pytest.raises(ValueError, match=r"^x "):
        gradient_conflict(tiny_vgg(), [(x, LABELS)])


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="All parameters are frozen"):
        gradient_conflict(tiny_vgg().requires_grad_(False), BATCHES)


def test_tiny_gradients_have_directions():
    conflict = gradient_conflict(Toy([1e-16 * FOR, -1e-16 * FOR]), ONE)
    assert torch.allclose(conflict.cosine[0], torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
