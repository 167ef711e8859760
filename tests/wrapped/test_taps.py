"""A tap replaces a module's output for whoever is on the way, and for nobody else."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_dfs.wrapped.taps import Tap, Visit, is_tapped, last_called


def keep(exit_index, feature):
    return feature, None


def double(exit_index, feature):
    return 2 * feature, None


class Several(nn.Module):
    """Puts out a container of tensors and something that is none."""

    def __init__(self, container):
        super().__init__()
        self.container = container

    def forward(self, x):
        return self.container((x, x + 1, None))


@pytest.fixture
def visit():
    return Visit(keep)


def tapped(visit, module=None, element=0):
    module = module or nn.Identity()
    module.register_forward_hook(Tap(0, visit, element))
    return module


ONES = torch.ones(3, 2)


def test_without_a_visit_a_module_puts_out_its_own(visit):
    assert tapped(visit)(ONES) is ONES


def test_what_arrival_returns_goes_on(visit):
    module = tapped(visit)
    with visit.by(double):
        assert torch.equal(module(ONES), 2 * ONES)
    assert module(ONES) is ONES


def test_a_visit_that_fails_is_over(visit):
    with pytest.raises(ZeroDivisionError), visit.by(double):
        1 / 0  # noqa: B018
    assert visit.current is None


def test_a_visit_within_a_visit_comes_back(visit):
    with visit.by(double):
        with visit.by(keep):
            assert visit.current is keep
        assert visit.current is double


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("element", [0, 1, -2])
def test_of_several_outputs_one_is_replaced_and_all_tensors_shrink(visit, container, element):
    module = tapped(visit, Several(container), element)
    rows = torch.tensor([2, 0])
    with visit.by(lambda _, feature: (5 * feature[rows], rows)):
        output = module(ONES)
    assert type(output) is container and output[2] is None
    expected = [ONES[rows], ONES[rows] + 1]
    expected[element if element == 0 else 1] = 5 * expected[element if element == 0 else 1]
    assert all(torch.equal(mine, its) for mine, its in zip(output[:2], expected, strict=True))


def test_threads_do_not_see_each_other(visit):
    seen = []
    with visit.by(double):
        thread = threading.Thread(target=lambda: seen.append(visit.current))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_visit_of_its_own_with_nobody_on_the_way(visit, again):
    module = tapped(visit)
    with visit.by(double):
        other = again(module)
        assert torch.equal(other(ONES), ONES)
    (tap,) = other._forward_hooks.values()
    assert tap.visit is not visit


def test_two_taps_of_a_copy_share_one_visit(visit):
    other = copy.deepcopy(nn.Sequential(tapped(visit), tapped(visit)))
    first, second = (next(iter(module._forward_hooks.values())).visit for module in other)
    assert first is second is not visit


def test_what_is_recomputed_in_the_backward_pass_is_replayed():
    calls = []

    def replay(exit_index, feature):
        calls.append(exit_index)
        return 3 * feature, None

    visit = Visit(replay)
    module = nn.Sequential(tapped(visit), nn.Tanh())
    x = torch.ones(2, requires_grad=True)
    with visit.by(lambda _, feature: (3 * feature, None)):
        y = checkpoint(module, x, use_reentrant=False)
    assert not calls
    y.sum().backward()
    assert calls == [0]
    assert torch.allclose(x.grad, 3 * (1 - torch.tanh(torch.tensor(3.0)) ** 2))


def test_of_a_sequence_the_last_layer_is_tapped():
    inner = nn.Sequential(nn.ReLU(), nn.Tanh())
    assert last_called(nn.Sequential(nn.Linear(2, 2), inner)) is inner[1]
    empty = nn.Sequential()
    assert last_called(empty) is empty

    class Skipping(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    skipping = Skipping(nn.Tanh())
    assert last_called(skipping) is skipping


def test_a_tapped_module_is_known(visit):
    assert is_tapped(nn.Sequential(nn.ReLU(), tapped(visit)))
    assert not is_tapped(nn.Sequential(nn.ReLU()))
