"""A tap replaces a module's output during a forward pass of its model in its thread, and never otherwise."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_dfs.wrapped.taps import ForwardState, Tap, is_tapped, last_called


def keep(exit_index, feature):
    return feature, None


def double(exit_index, feature):
    return 2 * feature, None


class Several(nn.Module):
    """Returns a container of two tensors and None."""

    def __init__(self, container):
        super().__init__()
        self.container = container

    def forward(self, x):
        return self.container((x, x + 1, None))


@pytest.fixture
def state():
    return ForwardState(keep)


def tapped(state, module=None, element=0):
    module = module or nn.Identity()
    module.register_forward_hook(Tap(0, state, element))
    return module


ONES = torch.ones(3, 2)


def test_outside_a_forward_pass_a_module_returns_its_own_output(state):
    assert tapped(state)(ONES) is ONES


def test_the_output_is_replaced_by_what_the_handler_returns(state):
    module = tapped(state)
    with state.running(double):
        assert torch.equal(module(ONES), 2 * ONES)
    assert module(ONES) is ONES


def test_a_forward_pass_that_fails_leaves_no_handler(state):
    with pytest.raises(ZeroDivisionError), state.running(double):
        1 / 0  # noqa: B018
    assert state.at_exit is None


def test_after_a_nested_forward_pass_the_outer_handler_is_back(state):
    with state.running(double):
        with state.running(keep):
            assert state.at_exit is keep
        assert state.at_exit is double


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("element", [0, 1, -2])
def test_of_several_outputs_one_is_replaced_and_all_tensors_shrink(state, container, element):
    module = tapped(state, Several(container), element)
    rows = torch.tensor([2, 0])
    with state.running(lambda _, feature: (5 * feature[rows], rows)):
        output = module(ONES)
    assert type(output) is container and output[2] is None
    expected = [ONES[rows], ONES[rows] + 1]
    expected[element if element == 0 else 1] = 5 * expected[element if element == 0 else 1]
    assert all(torch.equal(mine, its) for mine, its in zip(output[:2], expected, strict=True))


def test_threads_have_their_own_handlers(state):
    seen = []
    with state.running(double):
        thread = threading.Thread(target=lambda: seen.append(state.at_exit))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_state_of_its_own_without_a_handler(state, again):
    module = tapped(state)
    with state.running(double):
        other = again(module)
        assert torch.equal(other(ONES), ONES)
    (tap,) = other._forward_hooks.values()
    assert tap.state is not state


def test_two_taps_of_a_copy_share_one_state(state):
    other = copy.deepcopy(nn.Sequential(tapped(state), tapped(state)))
    first, second = (next(iter(module._forward_hooks.values())).state for module in other)
    assert first is second is not state


def test_what_is_recomputed_in_the_backward_pass_is_replayed():
    calls = []

    def replay(exit_index, feature):
        calls.append(exit_index)
        return 3 * feature, None

    state = ForwardState(replay)
    module = nn.Sequential(tapped(state), nn.Tanh())
    x = torch.ones(2, requires_grad=True)
    with state.running(lambda _, feature: (3 * feature, None)):
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


def test_a_tapped_module_is_known(state):
    assert is_tapped(nn.Sequential(nn.ReLU(), tapped(state)))
    assert not is_tapped(nn.Sequential(nn.ReLU()))
