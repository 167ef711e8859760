"""Costs per exit: the published convention, and what early exit executes."""

import json
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from helpers import BACKBONES, GOLDEN_DATA, TINY, module_modes, tiny_msdnet, tiny_vgg, twin, wrapped
from torch import nn

from timm_dfs import exit_flops
from timm_dfs.evaluation.flops import MORE_HANDLES, Costs, last_exit_flops

PUBLISHED = json.loads((GOLDEN_DATA / "published_results.json").read_text())


@pytest.fixture(scope="module")
def msdnet_flops():
    costs = Costs(timm.create_model("dfs_msdnet_cifar100"))
    return dict(published=costs.of_exits(), lazy=costs.of_exits(lazy=True), last=costs.of_last_exit_alone())


@pytest.fixture(scope="module", params=TINY)
def tiny_flops(request):
    costs = Costs(TINY[request.param](), (3, 16, 16))
    return dict(published=costs.of_exits(), lazy=costs.of_exits(lazy=True))


def test_msdnet_costs_what_was_published(msdnet_flops):
    published = [1e6 * flops for flops in PUBLISHED["cifar100_msdnet"]["flops_M"]]
    assert msdnet_flops["published"] == pytest.approx(published, rel=0.015)


def test_msdnet_executes_less_at_early_exits(msdnet_flops):
    lazy = [46.2e6, 88.9e6, 149.2e6, 191.0e6, 241.5e6, 299.1e6, 341.7e6]
    assert msdnet_flops["lazy"] == pytest.approx(lazy, abs=0.1e6)


def test_the_last_exit_alone_costs_the_292_million_of_the_network_without_early_exits(msdnet_flops):
    assert msdnet_flops["last"] == pytest.approx(292e6, abs=1e6)


def test_the_last_exit_alone_costs_all_exits_less_the_other_heads():
    model = tiny_vgg()
    heads = [16 * 16 * 6 + 6 * 5, 16 * 16 * 8 + 8 * 5]  # pooling and linear, of the two early exits
    assert last_exit_flops(model, (3, 16, 16)) == exit_flops(model, (3, 16, 16))[-1] - sum(heads)


def test_resnet_and_vgg_defer_nothing():
    for name in ("resnet", "vgg"):
        model = TINY[name]()
        assert exit_flops(model, (3, 16, 16)) == exit_flops(model, (3, 16, 16), lazy=True)


@pytest.mark.slow
def test_imagenet_msdnet_costs_what_was_published():
    flops = exit_flops(timm.create_model("dfs_msdnet_imagenet"))
    for ours, published in zip(flops, PUBLISHED["imagenet_msdnet"]["flops_G"], strict=True):
        assert abs(ours - 1e9 * published) <= 0.015 * 1e9 * published + 0.005e9  # published with two decimals


@pytest.mark.parametrize("convention", ["published", "lazy"])
def test_costs_rise_strictly_from_exit_to_exit(tiny_flops, convention):
    flops = tiny_flops[convention]
    assert all(isinstance(f, int) for f in flops)
    assert flops[0] > 0 and all(a < b for a, b in pairwise(flops))


def test_what_is_executed_never_costs_more_than_the_published_convention(tiny_flops):
    assert all(lazy <= published for lazy, published in zip(tiny_flops["lazy"], tiny_flops["published"]))


def test_both_conventions_agree_at_the_last_exit(tiny_flops):
    assert tiny_flops["lazy"][-1] == tiny_flops["published"][-1]


def test_both_conventions_agree_at_the_last_exit_where_layers_do_not_divide_into_scales():
    model = tiny_msdnet(exits=1, base=4)  # 4 layers, 3 scales
    assert exit_flops(model, (3, 16, 16)) == exit_flops(model, (3, 16, 16), lazy=True)


def test_msdnet_leaves_work_waiting_at_early_exits():
    model = tiny_msdnet()
    assert exit_flops(model, lazy=True)[0] < exit_flops(model)[0]


def test_the_count_is_the_convolutions_classifiers_and_norms_multiply_adds():
    model = tiny_vgg(depths=(1, 1), widths=(6, 8))
    norm = 2  # per element, as fvcore counts a batch norm in eval mode
    first = 32 * 32 * 6 * (3 * 9 + norm)
    heads = [32 * 32 * 6 + 6 * 5, 16 * 16 * 8 + 8 * 5]  # pooling and linear
    second = 32 * 32 * 8 * (6 * 9 + norm)
    assert exit_flops(model) == [first + heads[0], first + heads[0] + second + heads[1]]


def test_the_heads_of_all_exits_up_to_the_one_asked_about_are_counted():
    few, many = exit_flops(tiny_vgg(num_classes=5)), exit_flops(tiny_vgg(num_classes=7))
    widths = (6, 8, 8)
    assert [b - a for a, b in zip(few, many)] == [2 * sum(widths[: k + 1]) for k in range(3)]


# One trace of all exits counts what a trace of each exit alone would.


class UpTo(nn.Module):
    """The network up to one exit and nothing else, with every result of it as an output."""

    def __init__(self, model, exit_index, lazy, heads):
        super().__init__()
        self.model, self.exit_index, self.lazy = model, exit_index, lazy
        self.heads = [k for k in range(exit_index + 1) if k in heads or k == exit_index]

    def forward(self, x):
        logits = []
        state = self.model.walk(x, lambda _, of_exit: logits.append(of_exit), self.heads)
        return (*logits, *([] if self.lazy else self.model.settle(state, self.exit_index)))


def traced_alone(model, size, lazy, heads):
    """Costs of all exits, with one trace for each."""
    modules = [UpTo(model.eval(), k, lazy, heads) for k in range(model.num_exits)]
    with torch.no_grad():
        analyses = [FlopCountAnalysis(module, torch.zeros(1, *size)) for module in modules]
        for analysis in analyses:
            analysis.set_op_handle(**MORE_HANDLES).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return [analysis.total() for analysis in analyses]


@pytest.mark.parametrize("name", [*TINY, *BACKBONES])
def test_one_trace_counts_for_each_exit_what_a_trace_of_that_exit_alone_does(name):
    model, size = (TINY[name](), (3, 16, 16)) if name in TINY else (wrapped(name), (3, 64, 64))
    costs = Costs(model, size)
    # A wrapped backbone defers no work, so one convention is enough.
    for lazy, heads in ((False, range(3)), (True, (1,))) if name in TINY else ((False, (1,)),):
        assert costs.of_exits(lazy, heads) == traced_alone(model, size, lazy, heads)


class AddInPlace(nn.Module):
    """A body that writes into its input, of which it needs a part only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        x[:, :1] += self.conv(x)
        return x


class ChangePartInPlace(nn.Module):
    """A body that changes a part of its input in place; to the tracer, parts may share memory with anything."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        rest, part = self.conv(x), x.split(3, 1)[0]
        return torch.cat([part.add_(rest), x[:, 3:]], 1)


@pytest.mark.parametrize("body", [AddInPlace, ChangePartInPlace])
def test_what_is_written_in_place_counts_for_later_exits_and_not_for_earlier_ones(body):
    plain, model = tiny_vgg(depths=(1, 1)), tiny_vgg(depths=(1, 1))
    model.stages[1] = nn.Sequential(body(6), model.stages[1])
    extra = [a - b for a, b in zip(exit_flops(model, (3, 16, 16)), exit_flops(plain, (3, 16, 16)))]
    assert extra == [0, 16 * 16 * 6]


def test_the_network_is_traced_once(monkeypatch):
    trace, traces = torch.jit._get_trace_graph, []
    monkeypatch.setattr(torch.jit, "_get_trace_graph", lambda *args: traces.append(args) or trace(*args))
    costs = Costs(tiny_msdnet())
    assert costs.of_exits()[0] > costs.of_exits(lazy=True, heads=(0,))[0]
    costs.of_last_exit_alone()
    assert len(traces) == 1


def test_a_compiled_network_is_counted_as_the_network_is():
    model = tiny_msdnet()
    assert exit_flops(torch.compile(model)) == exit_flops(model)


@pytest.mark.parametrize("make", [tiny_msdnet, lambda: twin("NLC")], ids=["native", "twin"])
def test_autocast_does_not_change_the_count(make):
    model = make()
    with torch.autocast("cpu"):
        within = exit_flops(model), last_exit_flops(model)
    assert within == (exit_flops(model), last_exit_flops(model))


def test_position_embeddings_that_are_resized_for_another_size_count_one_for_each_value():
    fixed, dynamic = (twin("NLC", img_size=size, dynamic_img_size=size == 64) for size in (96, 64))
    assert dynamic.backbone.dynamic_img_size
    width = fixed.backbone.embed_dim
    extra = [a - b for a, b in zip(exit_flops(dynamic, (3, 96, 96)), exit_flops(fixed, (3, 96, 96)))]
    assert extra == [6 * 6 * width] * 3


class Extra(nn.Module):
    """A head's body that adds what ``operation`` makes of its feature, as a constant."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return x + self.operation(x).sum()


def with_body(operation):
    model = tiny_vgg()
    model.heads[1].body = Extra(operation)
    return model


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2]), "aten::baddbmm"),
        (lambda x: torch.fft.fft2(x).real, "aten::fft_fft2"),
        (lambda x: torch.cdist(x[:, 0], x[:, 1]), "aten::cdist"),
    ],
)
def test_an_operator_of_unknown_cost_is_refused_by_its_name(operation, name):
    with pytest.raises(ValueError, match=name):
        exit_flops(with_body(operation))


def test_attention_counts_both_of_its_products():
    def attend(x):
        return F.scaled_dot_product_attention(*(x[:, :6].flatten(2).transpose(1, 2)[:, None] for _ in range(3)))

    tokens = 16 * 16
    plain = exit_flops(with_body(torch.relu), (3, 16, 16))
    extra = [a - b for a, b in zip(exit_flops(with_body(attend), (3, 16, 16)), plain)]
    assert extra == [0, *[tokens * tokens * 6 * 2] * 2]


@pytest.mark.parametrize("size", [(), (32,), (32, 32), (1, 3, 32, 32), (3, 0, 32), (3, 32, -1)])
def test_an_input_size_that_is_no_image_is_refused_by_its_value(size):
    with pytest.raises(ValueError) as error:
        exit_flops(tiny_vgg(), size)
    assert str(size) in str(error.value)


def test_the_default_input_size_is_the_pretrained_configs():
    model = tiny_vgg()
    assert exit_flops(model) == exit_flops(model, (3, 32, 32)) != exit_flops(model, (3, 16, 16))


def test_counting_leaves_every_module_in_its_mode_and_no_trace_on_batch_norm():
    model = tiny_vgg().train()
    model.stages[0].eval()
    modes, state = module_modes(model), {key: value.clone() for key, value in model.state_dict().items()}
    exit_flops(model, (3, 8, 8))
    assert module_modes(model) == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_mode_and_the_partition_do_not_change_the_count():
    base = exit_flops(tiny_vgg(), (3, 8, 8))
    assert exit_flops(tiny_vgg().eval(), (3, 8, 8)) == base
    assert exit_flops(tiny_vgg(beta="joint"), (3, 8, 8)) == base
    assert exit_flops(tiny_vgg(referencing="one_sided"), (3, 8, 8)) == base
    assert exit_flops(tiny_vgg(referencing="off"), (3, 8, 8)) == base


def test_a_grey_network_is_counted_on_grey_images():
    grey, colour = tiny_vgg(in_chans=1), tiny_vgg()
    assert exit_flops(grey)[0] < exit_flops(colour)[0]
    with pytest.raises(ValueError, match="1 channels"):
        exit_flops(grey, (3, 32, 32))


def test_a_network_without_exits_is_refused_by_its_class():
    with pytest.raises(ValueError, match="ResNet has no exits"):
        exit_flops(timm.create_model("test_resnet"))


def test_heads_of_exits_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"heads names \[99\]; the exits are 0 to 2"):
        exit_flops(tiny_vgg(), heads=[0, 99])
