"""Every architecture of timm has a twin with exits, which loads its own and its base's weights."""

import json
import warnings

import pytest
import timm
import torch
from helpers import BACKBONES, CLASSES, backbone, images, settled, twin
from timm.models import save_for_hf
from torch import nn

import timm_dfs
from timm_dfs import MultiExit, Objective, exit_flops
from timm_dfs.evaluation.flops import Costs

BASES = [name for name in timm.list_models() if not name.startswith("dfs_")]


def x(batch=3, size=64, **kwargs):
    return images(batch, size=size, **kwargs)


def assert_same_logits(ours, theirs, batch=None):
    batch = x() if batch is None else batch
    for mine, its in zip(ours.eval().forward_exits(batch), theirs.eval().forward_exits(batch), strict=True):
        assert torch.equal(mine, its)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Names.


def test_every_architecture_has_a_twin():
    names = set(timm.list_models("dfs_*"))
    assert len(BASES) > 1300 and {f"dfs_{name}" for name in BASES} <= names


def test_only_what_has_trained_exits_is_listed_as_pretrained():
    from_hub = {name.partition(".")[0] for name in timm.list_pretrained("dfs_*")}
    assert "dfs_msdnet_cifar100" in from_hub
    assert all(not timm.get_pretrained_cfg(name).hf_hub_id for name in ("dfs_resnet50", "dfs_vit_base_patch16_224"))
    assert "dfs_resnet50" not in from_hub


def test_timms_lists_work_with_the_twins():
    assert {"resnet50", "dfs_resnet50"} <= set(timm.list_models("*resnet50"))
    assert timm.list_models("dfs_resnet18*")[0] == "dfs_resnet18"
    assert "dfs_twins" in timm.list_modules()
    assert timm.is_model("dfs_resnet50") and "dfs_resnet50" in timm.list_models(module="dfs_twins")
    assert set(timm.list_models(module="resnet")) == {n for n in timm.list_models(module="resnet") if "dfs" not in n}


def test_a_twin_takes_the_same_images_as_its_base():
    for name in ("resnet50", "vit_base_patch16_224.augreg2_in21k_ft_in1k", "beit_base_patch16_224"):
        ours, theirs = timm.get_pretrained_cfg(f"dfs_{name}"), timm.get_pretrained_cfg(name)
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "num_classes"):
            assert getattr(ours, key) == getattr(theirs, key), key


# Arguments.


def test_by_default_a_twin_is_half_partitioned_and_two_sided_with_four_exits():
    model = timm.create_model("dfs_test_resnet")
    assert isinstance(model, MultiExit)
    assert (model.num_exits, model.beta, model.referencing) == (4, 0.5, "two_sided")


def test_a_twin_of_three_stages_has_three_exits():
    assert timm.create_model("dfs_levit_128s", device="meta").num_exits == 3


def test_joint_training_reaches_a_twin():
    assert twin(beta="joint").beta == "joint"
    assert twin(beta=None).beta == 0.5  # as timm has it, the default


def test_arguments_about_exits_reach_the_exits_and_the_others_the_base():
    model = twin("NLC", exits=("blocks.1",), beta=0.25, referencing="off", drop_path_rate=0.2, global_pool="avg")
    assert (model.num_exits, model.beta, model.referencing) == (2, 0.25, "off")
    assert model.backbone.global_pool == "avg" and not model.heads[0].body[-1].first
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    grey = twin(in_chans=1)
    assert grey.in_chans == 1 and grey(x(channels=1))[0].shape == (3, CLASSES)


def test_a_twins_config_has_the_image_size_that_it_was_built_for():
    model = twin("NLC", img_size=96)
    assert model.pretrained_cfg["input_size"] == (3, 96, 96)
    assert exit_flops(model) == exit_flops(model, (3, 96, 96))
    levit = timm.create_model("dfs_levit_128s", img_size=64, device="meta")  # nowhere keeps the size
    assert levit.pretrained_cfg["input_size"] == (3, 64, 64)


def test_dropout_is_the_bases_unless_given_for_the_exits():
    assert [head.drop.p for head in twin(drop_rate=0.2).heads] == [0.2, 0.2]
    model = twin(drop_rate=0.2, exit_drop_rate=0.4)
    assert [head.drop.p for head in model.heads] == [0.4, 0.4] and model.backbone.drop_rate == 0.2


def test_settings_of_training_reach_the_objective():
    model = twin(loss_weights=[1, 1, 2], distill_weight=0.3, train_backbone=False)
    assert model.objective == Objective(loss_weights=(1, 1, 2), distill_weight=0.3, train_backbone=False)
    with pytest.raises(ValueError, match="loss_weights has 2 entries"):
        twin(loss_weights=[1, 2])


def test_an_argument_that_neither_takes_is_refused():
    with pytest.raises(TypeError, match="foo"):
        twin(foo=1)


@pytest.mark.parametrize("exits", [0, 1, 9, (), ("nowhere",)])
def test_exits_that_do_not_exist_are_refused(exits):
    with pytest.raises(ValueError, match=r"exits|no module"):
        twin(exits=exits)


def test_features_only_gives_the_bases_features():
    ours = timm.create_model("dfs_test_resnet", features_only=True, exits=3, beta=0.5)
    assert ours.feature_info.channels() == timm.create_model("test_resnet", features_only=True).feature_info.channels()


def test_a_twin_made_on_no_data_has_no_data():
    assert all(parameter.is_meta for parameter in timm.create_model("dfs_test_vit", device="meta").parameters())


# Weights.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A twin with trained exits, and a file with its weights."""
    model = settled(twin())
    file = tmp_path_factory.mktemp("twin") / "twin.pth"
    torch.save(model.state_dict(), file)
    return model, file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain timm network, and a file with its weights."""
    model = backbone().eval()
    file = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(model.state_dict(), file)
    return model, file


def loaded(source, **kwargs):
    overlay = source if isinstance(source, dict) else dict(file=str(source))
    return twin(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def test_a_twins_weights_come_back(trained, silent):
    model, file = trained
    assert_same_logits(loaded(file), model)
    assert_same_logits(loaded(dict(state_dict=model.state_dict())), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_may_have_the_prefixes_of_wrappers(prefix, trained, base):
    of_twin, of_base = (
        {prefix + key: value for key, value in model.state_dict().items()} for model in (trained[0], base[0])
    )
    assert_same_logits(loaded(dict(state_dict=of_twin)), trained[0])
    with pytest.warns(UserWarning, match="untrained"):
        assert torch.equal(loaded(dict(state_dict=of_base))(x()), base[0](x()))


FROZEN_LAST = dict(train_backbone=False, loss_weights=[1, 1, 0], distill_weight=1.0)
FOR_NEW_CLASSES = dict(num_classes=-1)  # train.py's --pretrained-path


def test_a_frozen_last_exit_keeps_its_classifier(base):
    plain, file = base
    overlay = dict(file=str(file), **FOR_NEW_CLASSES)
    with pytest.warns(UserWarning, match="exits are untrained"):
        model = loaded(overlay, num_classes=CLASSES, **FROZEN_LAST)
    assert torch.equal(model(x()), plain(x()))
    with pytest.warns(UserWarning, match="exits are untrained"):
        model = loaded(overlay, num_classes=CLASSES)
    assert not torch.equal(model(x()), plain(x()))


def test_a_last_exit_whose_classifier_would_be_new_cannot_be_frozen(base, trained):
    for _, file in (base, trained):
        with pytest.raises(ValueError, match=r"freeze the last exit.*num_classes is 9"):
            loaded(file, num_classes=9, **FROZEN_LAST)
    assert_same_logits(loaded(trained[1], **FROZEN_LAST), trained[0])
    assert_same_logits(loaded(dict(file=str(trained[1]), **FOR_NEW_CLASSES), **FROZEN_LAST), trained[0])


def test_a_frozen_last_exit_keeps_both_classifiers_of_a_distilled_base(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    torch.save(plain.state_dict(), tmp_path / "base.pth")
    settings = dict(FROZEN_LAST, loss_weights=[1, 0], exits=2, num_classes=CLASSES)
    overlay = dict(file=str(tmp_path / "base.pth"), **FOR_NEW_CLASSES)
    with pytest.warns(UserWarning, match="exits are untrained"):
        model = timm.create_model(f"dfs_{name}", pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    image = torch.zeros(1, 3, 224, 224)
    assert torch.equal(model.eval()(image), plain(image))
    frozen = {parameter_name for parameter_name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {f"backbone.{head}.weight" for head in ("head", "head_dist")} <= frozen


def test_a_twins_weights_fit_any_partition(trained):
    model, file = trained
    other = loaded(file, beta="joint", referencing="one_sided")
    assert_same_logits(other, model)


def test_a_twins_weights_get_other_classes_at_every_exit(trained):
    model, file = trained
    other = loaded(file, num_classes=9)
    assert [answer.shape[1] for answer in other.forward_exits(x())] == [9, 9, 9]
    for name, value in other.state_dict().items():
        if name.endswith(("fc.weight", "fc.bias")):
            continue
        assert torch.equal(value, model.state_dict()[name]), name


def test_without_classes_a_twins_weights_load(trained):
    model, file = trained
    other = loaded(file, num_classes=0)
    assert torch.equal(other(x()), model.forward_head(model.forward_features(x()), pre_logits=True))


def test_grey_images_take_the_sum_of_the_colour_filters(trained):
    model, file = trained
    first = loaded(file, in_chans=1).backbone.conv1[0].weight
    assert torch.allclose(first, model.backbone.conv1[0].weight.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("layout, settings", [("NLC", {}), ("NHWC", dict(window_size=3))])
@pytest.mark.parametrize("classes", [CLASSES, 9])
def test_a_twins_weights_are_fitted_to_another_image_size_as_timm_fits_the_bases(layout, settings, classes, tmp_path):
    model = settled(twin(layout))
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    save_for_hf(model, tmp_path, model_args=dict(img_size=(64, 64), exits=3))
    changes = dict(settings, img_size=96, num_classes=classes)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changes).eval()
    name, own = BACKBONES[layout][0], dict(BACKBONES[layout][1])
    overlay = dict(state_dict=model.backbone.state_dict(), num_classes=CLASSES, input_size=(3, 64, 64))
    plain = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**own, **changes}).eval()
    assert torch.equal(again.forward_features(x(size=96)), plain.forward_features(x(size=96)))
    assert torch.equal(again.backbone.get_classifier().weight, model.backbone.get_classifier().weight) is (
        classes == CLASSES
    )
    for name, value in model.heads[0].body.state_dict().items():
        assert torch.equal(again.heads[0].body.state_dict()[name], value)


def test_weights_that_timm_cannot_fit_to_another_image_size_are_refused_with_the_remedy():
    cait = dict(depth=4, embed_dim=32, num_classes=CLASSES, exits=2)
    model = timm.create_model("dfs_cait_xxs24_224", img_size=64, **cait)
    overlay = dict(state_dict=model.state_dict(), input_size=(3, 64, 64))
    with pytest.raises(ValueError, match=r"images of 96x96 pixels \(backbone.pos_embed.*, and timm cannot resize"):
        timm.create_model("dfs_cait_xxs24_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96, **cait)


def test_weights_for_another_image_size_are_not_resized_unless_one_is_asked_for():
    model = settled(twin("NLC", img_size=96))
    overlay = dict(state_dict=model.state_dict())
    settings = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES, exits=3, depth=4)
    with pytest.raises(ValueError, match=r"images of 160x160 pixels \(backbone.pos_embed.*, img_size among"):
        timm.create_model("dfs_test_vit", **settings)
    assert_same_logits(timm.create_model("dfs_test_vit", img_size=96, **settings), model, x(size=96))


@pytest.mark.parametrize("exits", [2, 4])
def test_a_twins_weights_for_other_exits_are_refused_with_the_remedy(trained, exits):
    with pytest.raises(ValueError, match="Give the exits"):
        loaded(trained[1], exits=exits)


def test_the_bases_weights_get_fresh_exits_and_one_warning(base):
    model, file = base
    with pytest.warns(UserWarning, match="2 early exits are untrained") as warned:
        other = loaded(file)
    assert len(warned) == 1
    assert torch.equal(other(x()), model(x()))
    with pytest.warns(UserWarning, match="untrained"):
        other = loaded(dict(state_dict=model.state_dict()))
    assert torch.equal(other(x()), model(x()))


@pytest.mark.filterwarnings("ignore:dfs_test_resnet has the weights")
def test_a_whole_config_may_name_the_file_of_the_bases_weights(base):
    model, file = base
    config = dict(twin().pretrained_cfg, file=str(file), num_classes=CLASSES, classifier="fc", first_conv="conv1.0")
    assert torch.equal(twin(pretrained=True, pretrained_cfg=config).eval()(x()), model(x()))


@pytest.mark.filterwarnings("ignore:dfs_test_resnet has the weights")
def test_the_bases_weights_get_other_classes(base):
    model, file = base
    other = loaded(file, num_classes=9)
    assert [answer.shape[1] for answer in other.forward_exits(x())] == [9, 9, 9]
    assert torch.equal(other.forward_features(x()), model.forward_features(x()))


def test_a_train_scripts_checkpoint_path_takes_both(trained, base):
    other = timm.create_model("dfs_test_resnet", num_classes=CLASSES, exits=3, checkpoint_path=str(trained[1]))
    assert_same_logits(other, trained[0])


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"foo.weight": torch.ones(1)}, tmp_path / "foo.pth")
    with pytest.raises(ValueError, match=r"foo.pth are neither dfs_test_resnet's nor test_resnet's"):
        loaded(tmp_path / "foo.pth")
    with pytest.raises(FileNotFoundError, match=r"There is no weights file .*absent.pth"):
        loaded(tmp_path / "absent.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    for name in ("cut.safetensors", "pickled.pth"):
        with pytest.raises(ValueError, match=rf"Cannot load .*{name} into dfs_test_resnet: .*safetensors file or"):
            loaded(tmp_path / name)


def test_the_config_names_what_timm_adapts():
    model = twin()
    assert model.pretrained_cfg["classifier"] == ("heads.0.fc", "heads.1.fc", "backbone.fc")
    assert model.pretrained_cfg["first_conv"] == ("backbone.conv1.0",)
    for name in (*model.pretrained_cfg["classifier"], *model.pretrained_cfg["first_conv"]):
        assert isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d))


def test_a_config_that_is_given_reaches_the_twin():
    model = twin(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), crop_pct=0.5))
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and model.pretrained_cfg["crop_pct"] == 0.5


# Publishing.


@pytest.mark.parametrize("layout", BACKBONES)
def test_what_is_saved_for_the_hub_comes_back_bit_for_bit(layout, tmp_path):
    settings = dict(beta="joint", referencing="one_sided", exits=3)
    settings.update({key: value for key, value in BACKBONES[layout][1].items()})
    model = settled(twin(layout, **settings))
    model.presets = {"fast": dict(thresholds=[0.9, 0.8, 0.0], confidence="max_prob")}
    save_for_hf(model, tmp_path, model_args=dict(settings))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.num_exits, again.beta, again.referencing) == (3, "joint", "one_sided")
    assert again.presets == model.presets and again.exit_points == model.exit_points
    assert_same_logits(again, model)
    for key in ("input_size", "mean", "std"):
        assert tuple(again.pretrained_cfg[key]) == tuple(model.pretrained_cfg[key]), key
    assert again.pretrained_cfg["num_classes"] == CLASSES


def test_model_args_are_those_that_rebuild_the_model(tmp_path):
    model = twin(exits=("layer2", "layer3"), beta=0.25)
    save_for_hf(model, tmp_path, model_args=dict(exits=["layer2", "layer3"]))
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert args["beta"] == 0.25 and args["referencing"] == "two_sided" and args["exits"] == ["layer2", "layer3"]


def test_a_twin_loaded_again_has_the_beta_of_each_exit(tmp_path):
    save_for_hf(twin(beta=[0.25, 0.9]), tmp_path, model_args=dict(exits=3))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.beta == (0.25, 0.9) and [partition.beta for partition in again.partitions] == [0.25, 0.9]


def test_a_model_loaded_with_other_classes_drops_its_presets(tmp_path):
    model = twin()
    model.presets = {"fast": dict(thresholds=[0.9, 0.8, 0.0], confidence="max_prob")}
    save_for_hf(model, tmp_path, model_args=dict(exits=3))
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert again.presets == {} and again.num_classes == 7


def test_a_twin_for_images_of_any_size_is_saved_with_the_size_that_its_positions_are_for(tmp_path):
    model = settled(twin("NLC", img_size=96, dynamic_img_size=True, in_chans=1))
    timm_dfs.write_presets(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert_same_logits(again, model, x(size=96, channels=1))
    assert_same_logits(again, model, x(size=64, channels=1))


@pytest.mark.parametrize(("layout", "pooling"), [("NCHW", "max"), ("NHWC", "max"), ("NLC", "avg"), ("NLC", "token")])
def test_another_pooling_is_saved(layout, pooling, tmp_path):
    model = twin(layout)
    model.reset_classifier(CLASSES, pooling)
    settled(model)
    timm_dfs.write_presets(model, tmp_path / "saved")
    assert_same_logits(timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True), model)


SWIN = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), num_classes=CLASSES, exits=3)

RESIZED = {
    "ViT": ("dfs_test_vit", dict(num_classes=CLASSES, exits=3), dict(img_size=96, patch_size=8)),
    "Swin": ("dfs_swin_tiny_patch4_window7_224", SWIN, dict(img_size=256)),
    "SwinV2": ("dfs_swinv2_tiny_window8_256", dict(SWIN, img_size=64, window_size=4), dict(window_size=2)),
}


@pytest.mark.parametrize(("name", "arguments", "size"), RESIZED.values(), ids=RESIZED)
def test_another_input_size_is_saved_with_what_timm_changes_for_it(name, arguments, size, tmp_path):
    model = settled(timm.create_model(name, **arguments))
    model.presets = dict(fast=dict(thresholds=[0.5] * 3))
    with pytest.warns(UserWarning, match="Dropped the presets fast: the input size"):
        model.set_input_size(**size)
    timm_dfs.write_presets(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert again.pretrained_cfg["input_size"] == model.pretrained_cfg["input_size"]
    assert_same_logits(again, model, x(size=model.pretrained_cfg["input_size"][1]))


def test_the_input_size_that_a_network_has_can_be_set_without_losing_presets(recwarn):
    model = twin("NLC", img_size=64)
    model.presets = dict(fast=dict(thresholds=[0.5] * model.num_exits))
    model.set_input_size(img_size=64)
    assert model.presets and not [warning for warning in recwarn if "presets" in str(warning.message)]


@pytest.mark.parametrize("same", [dict(device="cpu"), dict(dtype=torch.float32), dict(img_size=64)], ids=str)
def test_arguments_that_change_no_logits_keep_the_presets(same, tmp_path, recwarn):
    model = settled(twin("NLC", img_size=(64, 64)))
    model.presets = dict(fast=dict(thresholds=[0.5] * model.num_exits))
    timm_dfs.write_presets(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, **same)
    assert again.presets == model.presets and not [w for w in recwarn if "presets" in str(w.message)]


def test_presets_of_weights_that_are_not_loaded_are_dropped(tmp_path):
    model = settled(twin("NCHW"))
    model.presets = dict(fast=dict(thresholds=[0.5] * model.num_exits))
    timm_dfs.write_presets(model, tmp_path / "saved")
    with pytest.warns(UserWarning, match="Dropped the presets fast: .* not loaded; give pretrained=True"):
        assert timm.create_model(f"local-dir:{tmp_path / 'saved'}").presets == {}


def test_a_file_of_the_bases_weights_loads_under_a_tag_of_ours(tmp_path):
    base = timm.create_model("tf_efficientnet_lite0", num_classes=100)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    overlay = dict(file=str(tmp_path / "base.pth"))
    with pytest.warns(UserWarning, match="early exits are untrained"):
        model = timm.create_model(
            "dfs_tf_efficientnet_lite0.cifar100", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=100
        )
    assert torch.equal(model.backbone.classifier.weight, base.classifier.weight)


@pytest.mark.parametrize("changes", [{}, dict(num_classes=7)], ids=str)
@pytest.mark.filterwarnings("ignore:Dropped the presets")
def test_a_twin_with_packaged_weights_is_saved_with_the_arguments_of_its_weights(changes, tmp_path):
    model = timm.create_model("dfs_tf_efficientnet_lite0.cifar100_112", pretrained=True, **changes)
    timm_dfs.write_presets(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert (again.exit_points, again.presets) == (model.exit_points, model.presets)
    assert_same_logits(again, model, x(size=112))


# Cost of the heads.


@pytest.mark.parametrize(
    "name",
    ["resnet50", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_100", "swin_tiny_patch4_window7_224"],
)
def test_a_head_costs_little_of_what_leads_to_it(name):
    costs = Costs(timm.create_model(f"dfs_{name}"))
    alone = costs.of_exits(lazy=True, heads=())
    for k in range(costs.num_exits - 1):
        head = costs.of_exits(lazy=True, heads=(k,))[k + 1] - alone[k + 1]
        assert 0 < head < 0.15 * alone[k], (k, head / alone[k])


def test_the_package_names_it():
    assert timm_dfs.MultiExit is MultiExit and "MultiExit" in timm_dfs.__all__


def test_packaged_weights_of_a_twin_state_their_own_classes_and_images():
    cfg = timm.get_pretrained_cfg("dfs_tf_efficientnet_lite0.cifar100")
    model = timm.create_model("dfs_tf_efficientnet_lite0.cifar100", pretrained=True)
    assert cfg.num_classes == model.num_classes == 100 == len(cfg.label_names)
    assert tuple(cfg.input_size) == tuple(model.pretrained_cfg["input_size"]) == (3, 96, 96)
    assert timm.get_pretrained_cfg("dfs_tf_efficientnet_lite0").num_classes == 1000
