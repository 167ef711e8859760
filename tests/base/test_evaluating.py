"""Models and images that cannot be evaluated are refused, and unlikely ones give a warning."""

import warnings

import pytest
from helpers import images, tiny_vgg
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_dfs


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
