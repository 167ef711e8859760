"""Tensors made before samples exited are reduced to the active samples; features are restored to the whole batch."""

import torch

from timm_dfs.wrapped.active_samples import ActiveSamples


def after_two_exits():
    """Of six samples, 0, 2, 3 and 5 stayed active at the first exit, then 2 and 5."""
    active = ActiveSamples()
    active.keep(6, torch.tensor([0, 2, 3, 5]))
    active.keep(4, torch.tensor([1, 3]))
    return active


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float)[:, None]


def test_tensors_made_before_any_exit_are_reduced_to_the_active_samples():
    active = after_two_exits()
    for made in (rows(0, 1, 2, 3, 4, 5), rows(0, 2, 3, 5), rows(2, 5)):
        assert torch.equal(active.select(made), rows(2, 5))


def test_nested_tensors_are_reduced_and_what_is_not_a_batch_stays():
    table, scalar, other = torch.ones(9, 2), torch.tensor(1.0), "cell"
    found = after_two_exits().select(([rows(0, 1, 2, 3, 4, 5), table], dict(a=(scalar, other, None))))
    assert torch.equal(found[0][0], rows(2, 5))
    assert found[0][1] is table and found[1] == dict(a=(scalar, other, None)) and isinstance(found[0], list)


def test_a_restored_feature_has_every_sample_in_its_row():
    assert torch.equal(after_two_exits().restore(rows(2, 5)), rows(0, 0, 2, 0, 0, 5))


def test_before_any_sample_exits_nothing_changes():
    active, made = ActiveSamples(), rows(0, 1)
    assert active.select(made) is made and active.restore(made) is made


def test_a_restored_feature_can_be_reduced_again():
    active = after_two_exits()
    assert torch.equal(active.select(active.restore(rows(2, 5))), rows(2, 5))
