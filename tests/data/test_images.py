"""Any image a person may have gives the right pixels or a clear error."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dfs  # noqa: F401  registers the models
from timm_dfs.data.images import open_image, prepare

GREY = np.linspace(0, 255, 48 * 40).reshape(48, 40).astype(np.uint8)


def saved(folder, array, name="image.png", **kwargs):
    Image.fromarray(array).save(folder / name, **kwargs)
    return folder / name


def test_grey_becomes_three_equal_channels(tmp_path):
    pixels = np.asarray(open_image(saved(tmp_path, GREY)))
    assert pixels.shape == (48, 40, 3)
    assert (pixels == GREY[..., None]).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    pixels = np.asarray(open_image(saved(tmp_path, GREY.astype(np.uint16) * 257)))
    assert (pixels == GREY[..., None]).all()


def test_transparency_is_laid_over_white_whatever_colour_it_hides(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255
    pixels = np.asarray(open_image(saved(tmp_path, rgba)))
    assert (pixels[:4] == 0).all() and (pixels[4:] == 255).all()


def test_a_transparent_palette_is_laid_over_white_too(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    image.save(tmp_path / "palette.png", transparency=0)
    assert (np.asarray(open_image(tmp_path / "palette.png")) == 255).all()


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    assert open_image(saved(tmp_path, GREY, "photo.jpg", exif=exif)).size == (48, 40)


def test_one_pixel_is_an_image(tmp_path):
    model = timm.create_model("dfs_vgg7_cifar100")
    x = prepare(model, [open_image(saved(tmp_path, GREY[:1, :1]))])
    assert x.shape == (1, 3, 32, 32) and x.isfinite().all()


def test_a_truncated_image_is_refused_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path, noise, "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is damaged"):
        open_image(tmp_path / "cut.png")


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.png is not an image"):
        open_image(tmp_path / "notes.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        open_image(tmp_path / "absent.png")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        open_image(tmp_path / "float.tiff")


def test_pixels_are_normalised_as_the_pretrained_config_says():
    model = timm.create_model("dfs_vgg7_cifar100")
    white = prepare(model, [Image.new("RGB", (50, 60), "white")])
    cfg = model.pretrained_cfg
    expected = (1 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    assert torch.allclose(white, expected[None, :, None, None].expand_as(white), atol=1e-4)


def test_a_one_channel_model_gets_one_channel():
    model = timm.create_model("dfs_vgg7_cifar100", in_chans=1)
    model.pretrained_cfg["input_size"] = (1, 32, 32)
    model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = (0.5,), (0.25,)
    assert prepare(model, [Image.new("RGB", (32, 32))]).shape == (1, 1, 32, 32)


def test_a_model_of_four_channels_gets_no_picture():
    model = timm.create_model("dfs_vgg7_cifar100", in_chans=4)
    with pytest.raises(ValueError, match="takes 4 channels; only RGB and grey"):
        prepare(model, [Image.new("RGB", (32, 32))])
