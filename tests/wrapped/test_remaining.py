"""What was made before samples left a batch is brought up to date, and what was made after can be made whole."""

import torch

from timm_dfs.wrapped.remaining import Remaining


def after_two_departures():
    """Of six images, 0, 2, 3 and 5 went on, then 2 and 5."""
    remaining = Remaining()
    remaining.leave(6, torch.tensor([0, 2, 3, 5]))
    remaining.leave(4, torch.tensor([1, 3]))
    return remaining


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float)[:, None]


def test_tensors_of_any_age_catch_up():
    remaining = after_two_departures()
    for made in (rows(0, 1, 2, 3, 4, 5), rows(0, 2, 3, 5), rows(2, 5)):
        assert torch.equal(remaining.catch_up(made), rows(2, 5))


def test_what_is_nested_catches_up_and_what_is_no_batch_stays():
    table, scalar, other = torch.ones(9, 2), torch.tensor(1.0), "cell"
    found = after_two_departures().catch_up(([rows(0, 1, 2, 3, 4, 5), table], dict(a=(scalar, other, None))))
    assert torch.equal(found[0][0], rows(2, 5))
    assert found[0][1] is table and found[1] == dict(a=(scalar, other, None)) and isinstance(found[0], list)


def test_made_whole_every_image_is_in_its_row():
    assert torch.equal(after_two_departures().whole(rows(2, 5)), rows(0, 0, 2, 0, 0, 5))


def test_before_anyone_leaves_nothing_changes():
    remaining, made = Remaining(), rows(0, 1)
    assert remaining.catch_up(made) is made and remaining.whole(made) is made


def test_a_whole_feature_catches_up_again():
    remaining = after_two_departures()
    assert torch.equal(remaining.catch_up(remaining.whole(rows(2, 5))), rows(2, 5))
