"""The benchmark counts what is computed and compares times; how long something takes is not tested."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, images, recorded_heads, settled, wrapped

from timm_dfs import ExitPolicy, exit_flops, predict
from timm_dfs.evaluation.bench import LAST_EXIT, Way, _percentile, exits_logits, halving_policy, measure
from timm_dfs.evaluation.flops import Costs, last_exit_flops
from timm_dfs.evaluation.machine import describe_machine


@pytest.fixture(scope="module")
def model():
    return settled(TINY["msdnet"]())


def timed(model, policies, batch_sizes=(2,), count=8, size=16):
    return measure(model, images(count, size=size), policies, batch_sizes, seconds=0, least_rounds=2)


def test_every_way_is_timed_at_every_batch_size(model):
    timings = timed(model, dict(never=ExitPolicy([None, None, 0.0])), (1, 4))
    ways = [LAST_EXIT, "exit 0 alone", "exit 1 alone", "never"]
    assert [(t.batch_size, t.way) for t in timings] == [(size, way) for size in (1, 4) for way in ways]
    for t in timings:
        assert t.images_per_second > 0 and t.p50 > 0 and t.rounds == 2
        assert math.isclose(t.achieved * t.cost_ratio, t.speedup)


def test_the_last_exit_alone_is_measured_against_itself(model):
    first = timed(model, {})[0]
    assert (first.way, first.speedup, first.cost_ratio, first.achieved) == (LAST_EXIT, 1, 1, 1)


def test_a_policys_cost_is_of_the_heads_that_it_computes(model):
    full, size = last_exit_flops(model, (3, 16, 16)), (3, 16, 16)
    ratios = {t.way: t.cost_ratio for t in timed(model, dict(
        never=ExitPolicy([None, None, 0.0]), first=ExitPolicy([0.0, None, 0.0]), second=ExitPolicy([None, 0.0, 0.0]),
    ))}  # fmt: skip
    assert ratios["never"] == 1
    assert ratios["first"] == pytest.approx(full / exit_flops(model, size, lazy=True)[0])
    assert ratios["second"] == pytest.approx(full / exit_flops(model, size, lazy=True, heads=(1,))[1])
    assert ratios["second"] == ratios["exit 1 alone"] and ratios["first"] == ratios["exit 0 alone"]


def let_pass(monkeypatch, *rounds):
    """Make the benchmark's clock say that the ways took these seconds in each round."""

    def readings():
        now = 0.0
        yield now
        for seconds in itertools.chain(*rounds):
            yield now
            now += seconds
            yield now
        yield from itertools.repeat(now)

    clock = readings()
    monkeypatch.setattr(
        "timm_dfs.evaluation.bench.time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=lambda _: None)
    )


def test_time_and_cost_are_compared_on_the_same_images(model, monkeypatch):
    batch = images(8, size=16)
    confidence = exits_logits(model, batch)[0].softmax(-1).amax(-1)
    batch = batch[confidence.argsort(descending=True)]  # so that the first two of four batches leave at the first exit
    policy = ExitPolicy([confidence.sort(descending=True).values[3:5].mean().item(), None, 0.0])
    full = last_exit_flops(model, (3, 16, 16))
    early, _, late = exit_flops(model, (3, 16, 16), lazy=True, heads=policy.answering)
    for rounds, cost in ((2, early), (3, (2 * early + late) / 3), (4, (early + late) / 2)):
        let_pass(monkeypatch, *[[1.0] * 4] * rounds)
        timing = measure(model, batch, dict(half=policy), (2,), seconds=0, least_rounds=rounds)[-1]
        assert timing.cost_ratio == pytest.approx(full / cost)


def test_a_round_in_which_the_machine_did_something_else_is_left_out_for_every_way(model, monkeypatch):
    usual = [2.0, 0.5, 1.5, 1.0]
    let_pass(monkeypatch, *[usual] * 4, [2.0, 0.5, 1.5, 50.0], *[usual] * 5)
    policy = ExitPolicy([0.0, None, 0.0])
    last, _, _, early = measure(model, images(8, size=16), dict(early=policy), (8,), seconds=0, least_rounds=10)
    assert (last.way, early.way, early.rounds) == (LAST_EXIT, "early", 10)
    assert early.speedup == pytest.approx(2) and early.images_per_second == pytest.approx(8)


def test_ways_of_another_runtime_are_timed_on_their_images_and_the_fastest_whole_one_is_the_baseline(
    model, monkeypatch
):
    seen = []
    cost = torch.full((8,), 1.0)
    further = {
        "elsewhere": Way(seen.append, torch.arange(8), cost, is_whole=True, pool="other"),
        "early elsewhere": Way(seen.append, torch.arange(8), cost / 4, pool="other"),
    }
    let_pass(monkeypatch, *[[4.0, 1.0, 1.0, 2.0, 1.0]] * 2)
    timings = measure(model, images(8, size=16), {}, (4,), seconds=0, least_rounds=2, further=further)
    assert {t.baseline for t in timings} == {"elsewhere"}
    by_way = {t.way: t for t in timings}
    assert by_way[LAST_EXIT].speedup == 0.5 and by_way["elsewhere"].speedup == 1
    assert (by_way["early elsewhere"].speedup, by_way["early elsewhere"].cost_ratio) == (2, 4)
    # After another runtime, a batch is run once more, not timed.
    assert [batch.tolist() for batch in seen[2:]] == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3


@pytest.mark.parametrize(("rounds", "p95", "p99"), [(19, None, None), (20, 19, None), (99, 95, None), (200, 190, 198)])
def test_percentiles_need_a_batch_beyond_them(rounds, p95, p99):
    times = [float(t) for t in torch.randperm(rounds) + 1]
    assert (_percentile(times, 95), _percentile(times, 99)) == (p95, p99)


def test_under_autocast_times_are_taken_and_costs_are_the_same(model):
    policy = dict(early=ExitPolicy([0.0, None, 0.0]))
    with torch.autocast("cpu"):
        within = timed(model, policy)
    assert [t.cost_ratio for t in within] == [t.cost_ratio for t in timed(model, policy)]


def test_heads_that_are_not_computed_cost_nothing(model):
    costs = Costs(model, (3, 16, 16))
    for lazy in (False, True):
        every, alone = (costs.of_exits(lazy, heads) for heads in (None, ()))
        assert every[0] == alone[0] and all(a < e for a, e in zip(alone[1:], every[1:]))
        assert costs.of_exits(lazy, range(3)) == every
    assert alone[-1] == last_exit_flops(model, (3, 16, 16))


@pytest.mark.parametrize("exits", [None, (0,), (0, 1)])  # exit 1 alone costs more than half
def test_the_halving_policy_halves_the_cost(exits):
    model, batch = settled(wrapped("NLC", exits=4)), images(64, size=64)
    policy = halving_policy(model, exits_logits(model, batch), (3, 64, 64), exits)
    active = (0, 1, 2, 3) if exits is None else (*exits, 3)
    assert set(policy.answering) <= set(active)
    costs = torch.tensor(exit_flops(model, (3, 64, 64), lazy=True, heads=policy.answering)).double()
    share = costs[predict(model, batch, policy).exit_index].mean().item() / last_exit_flops(model, (3, 64, 64))
    assert share == pytest.approx(0.5, abs=0.1)
    with recorded_heads(model) as calls:
        predict(model, batch, policy)
    assert set(calls) <= set(active)


@pytest.mark.parametrize("sizes", [(), (0,), (9,)])
def test_batches_that_the_images_do_not_fill_are_refused(model, sizes):
    with pytest.raises(ValueError, match="batch_sizes is"):
        timed(model, {}, sizes)


def test_a_policy_of_another_network_is_refused(model):
    with pytest.raises(ValueError, match="2 thresholds"):
        timed(model, dict(wrong=ExitPolicy([0.5, 0.0])))


@pytest.mark.parametrize(("count", "words"), [(1, ", 1 thread, "), (2, ", 2 threads, ")])
def test_the_machine_has_its_threads_and_versions(monkeypatch, count, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert f"torch {torch.__version__}" in describe_machine() and words in describe_machine()
