"""Training settings are arguments of a model; an invalid value is refused by its name."""

import copy
from fractions import Fraction

import pytest
import timm
import torch
from helpers import TINY, images, same_weights, tiny_msdnet, tiny_resnet, tiny_vgg
from timm.task import ClassificationTask
from torch import nn

from timm_dfs import Objective
from timm_dfs.base.objective import AGGREGATORS, SETTINGS

NAN, INF = float("nan"), float("inf")

BAD = {
    "loss_weights": [
        [1, -0.5, 1],
        [0, 0, 0],
        [],
        "111",
        "1,1,1",
        1.0,
        True,
        [True, 1, 1],
        [1, "1", 1],
        [1, None, 1],
        [1, NAN, 1],
        [1, INF, 1],
        [[1, 1, 1]],
        {0: 1, 1: 1, 2: 1},
        torch.ones(3),
        (weight for weight in (1, 1, 1)),
    ],
    "distill_weight": [-0.1, 1.1, NAN, INF, True, False, "0.3", [0.3], torch.tensor(0.3), 1j],
    "distill_temperature": [0, 0.0, -1.0, NAN, INF, True, "3", [3.0], torch.tensor(3.0)],
    "distill_feature_weight": [-1e-9, -1, NAN, INF, True, False, "0.1", [0.1], torch.tensor(0.1)],
    "gradient_equilibrium": [0, 1, "True", "", 1.0, [True]],
    "train_backbone": [0, 1, "False", "", 0.0, [False]],
    "teacher_loss": ["KL", "", True, 1, ["dkd"]],
    "teacher_size": [0, -96, 96.0, True, "96", (96, 96)],
    "aggregator": ["pcgrad", "PCGRAD", "Mean", "sum", "", " PCGrad", True, False, 0, 1, ["PCGrad"], ("PCGrad",)],
}
EVERY_BAD = [pytest.param(name, value, id=f"{name}={value!r:.20}") for name in BAD for value in BAD[name]]

GOOD = [
    dict(loss_weights=[1, 2, 3]),
    dict(loss_weights=(0, 0, 0.5)),
    dict(distill_weight=0.3),
    dict(distill_weight=1),
    dict(distill_weight=0.5, distill_temperature=1),
    dict(distill_feature_weight=0.1),
    dict(gradient_equilibrium=True),
    dict(train_backbone=False),
    dict(loss_weights=[1, 2, 3], distill_weight=0.3, gradient_equilibrium=True, train_backbone=False),
]


def named(settings):
    return ",".join(f"{name}={value}" for name, value in settings.items())


@pytest.mark.parametrize("name, value", EVERY_BAD)
def test_a_bad_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        Objective(**{name: value})
    assert str(error.value).startswith(f"{name} is {value!r}; ")


@pytest.mark.parametrize("name, value", EVERY_BAD)
def test_a_bad_value_is_refused_through_timm_too(name, value):
    with pytest.raises(ValueError) as error:
        timm.create_model("dfs_vgg7_cifar100", depths=(1, 2), widths=(6, 8), **{name: value})
    assert f"{name} is {value!r}" in str(error.value)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weights_for_other_exits_are_refused_with_both_numbers(make, count):
    with pytest.raises(ValueError, match=f"loss_weights has {count} entries.* 3 exits"):
        make(loss_weights=[1.0] * count)


@pytest.mark.parametrize(
    "settings",
    [
        dict(distill_temperature=1.0),
        dict(loss_weights=(0, 0, 1), distill_weight=0.5),
        dict(loss_weights=(0, 0, 1), distill_feature_weight=0.5),
    ],
    ids=named,
)
def test_a_setting_that_would_change_nothing_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"^{[*settings][-1]} is "):
        Objective(**settings)


def test_an_unknown_aggregator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        tiny_vgg(aggregator="pcgrad")
    assert all(repr(name) in str(error.value) for name in AGGREGATORS)


@pytest.mark.parametrize(
    "make, one",
    [
        (tiny_msdnet, dict(exits=1)),
        (tiny_resnet, dict(layers=(2,), channels=(8,))),
        (tiny_vgg, dict(depths=(1,), widths=(6,))),
    ],
    ids=TINY,
)
class TestANetworkWithOneExit:
    @pytest.mark.parametrize(
        "settings",
        [
            dict(distill_weight=0.3),
            dict(distill_feature_weight=0.1),
            dict(gradient_equilibrium=True),
            dict(aggregator="PCGrad"),
        ],
        ids=named,
    )
    def test_refuses_settings_that_need_two_exits(self, make, one, settings):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} needs at least two exits"):
            make(**one, **settings)

    @pytest.mark.parametrize("settings", [dict(loss_weights=[2.0]), dict(train_backbone=False), {}], ids=named)
    def test_accepts_the_other_settings(self, make, one, settings):
        assert len(make(**one, **settings).train()(images())) == 1


def test_the_exits_are_counted_before_weights_are_looked_for():
    with pytest.raises(ValueError, match="loss_weights has 2 entries"):
        tiny_vgg(pretrained=True, pretrained_cfg_overlay=dict(file="/nowhere.pth"), loss_weights=[1, 1])


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_an_unknown_keyword_stays_a_type_error(make):
    with pytest.raises(TypeError, match="distil_weight"):
        make(distil_weight=0.3)


@pytest.mark.parametrize("settings", GOOD, ids=named)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_settings_reach_the_model(make, settings):
    assert make(**settings).objective == Objective(**settings)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", GOOD[:-2], ids=named)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_logits_are_the_same_with_any_setting(make, settings, mode):
    plain = make(drop_rate=0.0).train(mode)
    model = make(drop_rate=0.0, **settings).train(mode)
    model.load_state_dict(plain.state_dict())  # adapters start as they are
    expected = plain(images()) if mode else [plain(images())]
    found = model(images()) if mode else [model(images())]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_with_a_frozen_backbone_logits_in_eval_mode_are_the_same(make):
    plain = make().eval()
    frozen = same_weights(plain, make(train_backbone=False))
    assert torch.equal(frozen(images()), plain(images()))


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_without_settings_training_is_the_plain_sum(make):
    assert make().objective == Objective()
    assert (Objective().loss_weights, Objective().aggregator, Objective().train_backbone) == (None, None, True)
    assert make().adapters is None


def test_an_objective_cannot_be_changed_past_its_checks():
    with pytest.raises(AttributeError):
        Objective().distill_weight = 2.0


def test_settings_survive_a_copy_and_a_fresh_classifier():
    model = copy.deepcopy(tiny_vgg(loss_weights=[1, 2, 3], distill_weight=0.3))
    model.reset_classifier(7)
    assert model.objective == Objective(loss_weights=[1, 2, 3], distill_weight=0.3)


@pytest.mark.parametrize("settings", [*GOOD, dict(aggregator="PCGrad")], ids=named)
@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_settings_stay_out_of_the_models_config(make, settings):
    args = make(**settings)._model_args
    assert not set(args) & set(SETTINGS)
    assert args == make()._model_args


@pytest.mark.parametrize(
    "name, value",
    [
        ("loss_weights", b"abc"),
        ("loss_weights", [10**400, 1, 1]),
        ("distill_weight", 10**400),
        ("distill_temperature", 10**400),
        ("distill_feature_weight", 10**400),
    ],
    ids=["bytes", *(f"huge {i}" for i in range(4))],
)
def test_a_number_that_no_float_can_hold_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Objective(**{name: value})


def test_weights_are_a_copy_of_the_callers_list():
    weights = [1, 2, 3]
    objective = Objective(loss_weights=weights)
    weights[0] = -1
    assert list(objective.loss_weights) == [1, 2, 3]


def test_fractions_are_numbers():
    model = tiny_vgg(loss_weights=[Fraction(1, 2)] * 3, distill_weight=Fraction(1, 3)).train()
    loss = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)(images(), torch.tensor([0, 3, 1, 4]))["loss"]
    assert loss.isfinite()
