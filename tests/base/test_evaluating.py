"""Models and images that cannot be evaluated are refused, unlikely ones give a warning, and shapes need no data."""

import threading
import warnings

import pytest
import torch
from helpers import images, tiny_vgg
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_dfs
from timm_dfs.base.evaluating import BATCH, evaluating, on_shapes


@pytest.mark.parametrize("wrapper", [nn.DataParallel, ModelEmaV3, AveragedModel])
@pytest.mark.parametrize(
    "evaluate",
    [
        lambda model: timm_dfs.predict(model, images(), "fast"),
        timm_dfs.exit_flops,
        lambda model: timm_dfs.collect_logits(model, []),
    ],
    ids=["predict", "exit_flops", "collect_logits"],
)
def test_of_a_wrapper_the_model_inside_is_asked_for(wrapper, evaluate):
    with pytest.raises(ValueError, match=rf"{wrapper.__name__} only wraps a model with exits; give its \.module"):
        evaluate(wrapper(tiny_vgg()))


def test_a_model_and_its_compiled_self_are_evaluated_one_after_the_other_and_other_models_meanwhile():
    model, other, entered = tiny_vgg().train(), tiny_vgg().train(), {}

    def evaluate(name, network):
        with evaluating(network):
            entered[name].set()

    def started(name, network):
        entered[name] = threading.Event()
        thread = threading.Thread(target=evaluate, args=(name, network))
        thread.start()
        return thread

    with evaluating(model):
        threads = [started("compiled", torch.compile(model)), started("other", other)]
        assert entered["other"].wait(10) and not entered["compiled"].wait(0.2)
        assert not any(module.training for module in model.modules())
    for thread in threads:
        thread.join()
    assert all(module.training for module in model.modules())


def test_a_wrapper_of_a_model_without_exits_has_no_exits():
    with pytest.raises(ValueError, match="DataParallel has no exits"):
        timm_dfs.exit_flops(nn.DataParallel(nn.Linear(1, 1)))


@pytest.mark.parametrize("size", [224, 8])
def test_images_of_an_unlikely_size_give_one_warning_for_each_model(size):
    policy = timm_dfs.ExitPolicy([0, 0, 0])
    for _ in range(2):
        model = tiny_vgg()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                timm_dfs.predict(model, images(1, size=size), policy)
        (warning,) = caught
        assert f"{size} x {size} pixels, but this model was built for 32 x 32" in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.parametrize("size", [16, 32, 64, 96])
def test_images_of_a_similar_size_give_no_warning(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dfs.predict(tiny_vgg(), images(1, size=size), timm_dfs.ExitPolicy([0, 0, 0]))


def test_values_from_0_to_255_give_one_warning_for_each_model():
    policy = timm_dfs.ExitPolicy([0, 0, 0])
    photographs = (images(2).sigmoid() * 255).round()
    for _ in range(2):
        model = tiny_vgg()
        with pytest.warns(UserWarning, match=r"An image has the value 2\d\d, where white is 2.\d+: divide") as caught:
            for _ in range(2):
                timm_dfs.predict(model, photographs, policy)
        assert len(caught) == 1 and caught[0].filename == __file__


def test_normalised_images_and_noise_give_no_warning():
    model = tiny_vgg()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    for batch in (images(64), (images(4).sigmoid().round() - mean) / std, 3 * images(4), images(4)[:0]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            timm_dfs.predict(model, batch, timm_dfs.ExitPolicy([0, 0, 0]))


class Mixing(nn.Module):
    """A layer that keeps a tensor from its last forward pass, and adds one that is always on the CPU."""

    def __init__(self, constant):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(1))
        self.table = torch.ones(3)
        self.constant = constant

    def forward(self, x):
        self.last = x
        x = x * (self.weight * self.scale * self.table)[:, None, None]
        return x + torch.zeros(3, 1, 1, device="cpu") if self.constant else x


@pytest.mark.parametrize("constant", [False, True], ids=["no constant", "constant on the cpu"])
def test_shapes_are_computed_without_data_and_the_model_stays_as_it_was(constant):
    model = Mixing(constant).train()
    before = dict(model.__dict__, **model.state_dict(keep_vars=True))
    devices = []

    def shape_of(images):
        devices.append(images.device.type)
        return model(images).shape

    assert on_shapes(model, (3, 8, 6), shape_of) == (BATCH, 3, 8, 6)
    assert devices == (["meta", "cpu"] if constant else ["meta"])
    after = dict(model.__dict__, **model.state_dict(keep_vars=True))
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())
    assert model.training and model.weight.device.type == "cpu"


def test_an_error_in_a_pass_without_data_is_raised_and_the_model_stays_as_it_was():
    model = Mixing(False)
    with pytest.raises(ZeroDivisionError):
        on_shapes(model, (3, 8, 6), lambda images: 1 / 0)
    assert model.weight.device.type == model.scale.device.type == model.table.device.type == "cpu" and model.training
