"""Backbones against transformers' own processors and models, and the ways their weights can fail to load."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PARTS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BlipForImageTextRetrieval
from transformers import CLIPVisionModel

from features import MISSING, OK, UNREADABLE, FeatureCache
from parts.backbones import BACKBONES, load_backbone
from parts.captions import Captions
from parts.photos import Photos, read_captions
from parts.vision_encoder import exact_convolutions


def reference_states(name, folder, photo):
    """What transformers itself makes of one photo, [R, D]: its own processor, its own forward pass."""
    given = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")
    with torch.no_grad():
        if name == "clip":
            return CLIPVisionModel.from_pretrained(folder).eval()(**given).last_hidden_state[0, 1:]
        return (
            BlipForImageTextRetrieval.from_pretrained(folder).eval()
            .vision_model(**given).last_hidden_state[0]
        )


@pytest.mark.parametrize("name, regions, grid", [("clip", 36, [6, 6]), ("blip", 37, [6, 6])])
def test_cached_regions_are_the_models_own_states(data_dir, cache_dir, name, regions, grid):
    cache = FeatureCache(cache_dir / f"demo-{name}-96.h5")
    assert (
        cache.shape == (40, 2, regions, 64)
        and (cache.grid == grid).all()
        and (cache.num_regions == regions).all()
    )
    for image_id in ("train_0000", "train_0001", "valid_0003", "test_0001"):  # upright, wide
        photo = Image.open(data_dir / "demo" / "images" / f"{image_id}.jpg").convert("RGB")
        expected = reference_states(name, data_dir / "demo" / name, photo)
        found = cache.read([image_id])["regions"][0]
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-3 * expected.abs().max())


def test_cached_pixels_are_all_that_vilts_processor_makes(data_dir, cache_dir):
    """Patches back in place, normalised as the file says, are the processor's pixel_values and mask."""
    cache = FeatureCache(cache_dir / "demo-pixels-96.h5")
    processor = AutoImageProcessor.from_pretrained(data_dir / "demo" / "vilt")
    grids = set()
    for image_id in cache.rows:
        photo = Image.open(data_dir / "demo" / "images" / f"{image_id}.jpg").convert("RGB")
        given = processor(photo, return_tensors="pt")
        regions, mask, grid, _ = (value[0] for value in cache.read([image_id]).values())
        rows, columns = grid.tolist()
        patches = regions[mask].unflatten(0, (rows, columns)).unflatten(-1, (3, 16, 16))  # [h, w, 3, 16, 16]
        pixels = patches.permute(2, 0, 3, 1, 4).reshape(3, rows * 16, columns * 16)
        assert regions.dtype == torch.uint8 and not regions[~mask].any() and given["pixel_mask"].all()
        assert given["pixel_values"].shape[1:] == pixels.shape
        mean, std = (torch.tensor(cache.attrs[key])[:, None, None] for key in ("mean", "std"))
        torch.testing.assert_close(
            (pixels / 255 - mean) / std, given["pixel_values"][0], rtol=1e-5, atol=1e-5
        )
        grids.add((rows, columns))
    assert len(grids) > 2 and len({rows * columns for rows, columns in grids}) > 2
    assert cache.shape[2] >= max(cache.num_regions) and cache.attrs["parameters"] == 0


def test_cached_captions_are_the_encoders_states(data_dir, cache_dir):
    """Those of transformers' own forward pass over each caption alone, without [CLS] and [SEP]."""
    cache, folder = FeatureCache(cache_dir / "demo-caption-64.h5"), data_dir / "demo" / "encoder"
    captions, encoder = (
        read_captions(data_dir / "demo" / "captions.txt"), AutoModel.from_pretrained(folder).eval()
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        cache.shape == (40, 1, 64, 64) and not cache.grid.any() and len(set(cache.num_regions.tolist())) > 1
    )
    for image_id in cache.rows:
        given = tokenizer(captions[f"{image_id}.jpg"], return_tensors="pt")
        with torch.no_grad():
            expected = encoder(**given).last_hidden_state[0, 1:-1]
        regions, mask, _, _ = (value[0] for value in cache.read([image_id]).values())
        assert mask.sum() == len(expected) and not regions[~mask].any()
        np.testing.assert_allclose(regions[mask], expected, rtol=2**-10, atol=1e-3 * expected.abs().max())


def test_captions_that_say_nothing(data_dir):
    backbone = load_backbone("caption", str(data_dir / "demo" / "encoder"), 4)
    captions = {"a": "green hills", "b": "a shop with a white sign", "c": "", "d": None, "e": "no picture"}
    read = Captions(list(captions), captions, backbone, placeholder="no picture")[range(5)]
    assert [(None if views is None else tuple(views.shape), status) for views, status, _ in read] == [
        ((1, 2), OK), ((1, 4), OK), (None, UNREADABLE), (None, MISSING), (None, MISSING)]  # fmt: skip
    assert [reason for _, _, reason in read] == [
        "", "cut: 6 sub-tokens", "empty caption", "no caption", "caption of a placeholder picture",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="takes captions of 510 sub-tokens at most"):
        load_backbone("caption", str(data_dir / "demo" / "encoder"), 511)


@pytest.mark.parametrize("size", [96, 160, 384])
def test_no_photo_has_more_patches_than_the_file_has_room_for(data_dir, tmp_path, size):
    processor = AutoImageProcessor.from_pretrained(data_dir / "demo" / "vilt")
    processor.size, processor.size_divisor = {"shortest_edge": size}, 32
    processor.save_pretrained(tmp_path)
    backbone = load_backbone("pixels", str(tmp_path))
    shapes = [(1000, 1000 + 20 * i) for i in range(60)]
    counts = [backbone.regions(backbone.prepare(Image.new("RGB", shape))[None]).shape[1] for shape in shapes]
    assert max(counts) <= backbone.shape[0] <= 1.2 * max(counts)


def test_a_strip_of_a_photo_is_recorded_and_not_guessed(data_dir, tmp_path):
    Image.new("RGB", (3000, 9)).save(tmp_path / "strip.png")
    backbone = load_backbone("pixels", str(data_dir / "demo" / "vilt"))
    views, status, reason = Photos(["a"], {"a": tmp_path / "strip.png"}, backbone, 1, 0).read(0)
    assert (views, status) == (None, UNREADABLE) and reason


def test_augmented_views_have_the_plain_ones_size_and_keep_its_aspect(data_dir):
    """A crop of a wide photo is wide before it is resized: a centred square stays about square."""
    photo = Image.new("RGB", (300, 200))
    photo.paste((255, 255, 255), (100, 50, 200, 150))
    backbone = load_backbone("pixels", str(data_dir / "demo" / "vilt"))
    maker = Photos([], {}, backbone, 40, 0)
    views = maker.all_views(photo, "a")
    assert views.shape == (40, 3, 96, 144)
    whole = [
        view for view in views.float().mean(1)
        if not max(*view[[0, -1]].max(1).values, *view[:, [0, -1]].max(0).values) > 99
    ]
    sides = [((view > 99).any(0).sum() / (view > 99).any(1).sum()).item() for view in whole]
    assert (
        len(sides) > 10
        and 0.9 < np.exp(np.mean(np.log(sides))) < 1.1
        and all(0.6 < side < 1.7 for side in sides)
    )


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_a_missing_vision_weight_is_an_error(data_dir, tmp_path, name):
    shutil.copytree(data_dir / "demo" / name, tmp_path / name)
    weights = load_file(tmp_path / name / "model.safetensors")
    lost = next(key for key in weights if "text" not in key and "self_attn" in key)
    save_file(
        {k: v for k, v in weights.items() if k != lost},
        tmp_path / name / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="--weights .*: 1 weights missing .first: .*self_attn"):
        load_backbone(name, str(tmp_path / name))


@pytest.mark.parametrize(
    "name", [name for name in BACKBONES if name not in ("resnet50", "auto", "caption", "phrases")]
)
def test_what_is_no_such_model_is_one_clear_line(data_dir, name, tmp_path):
    folder = data_dir / "demo" / next(part[2] for part in PARTS.values() if part[0] == name)
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for args, message in (
        (("absent/folder",), "--weights absent/folder: "),
        ((str(data_dir / "demo" / "encoder"),), "--weights .*encoder: "),
        ((str(tmp_path / "bare"),), "--weights .*bare: no image processor"),
        ((str(folder), 224), "--img-size 224: .* takes photos of 96; leave the option out"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(name, *args)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_a_model_of_another_kind_is_said_to_be_one(data_dir, tmp_path, name):
    shutil.copytree(data_dir / "demo" / name, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match=f"--weights .*other: it is a siglip, not a {name}; name"):
        load_backbone(name, str(tmp_path / "other"))


def test_a_processor_that_does_not_fit_its_model_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir / "demo" / "blip", tmp_path / "blip")
    path = tmp_path / "blip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 64}}))
    with pytest.raises(ValueError, match="a blip gives no regions of a photo .it takes 96 pixels.*64"):
        load_backbone("blip", str(tmp_path / "blip"))
    with pytest.raises(ValueError, match="its image processor is not ViLT's"):
        load_backbone("pixels", str(tmp_path / "blip"))


def test_defaults_are_the_published_models():
    assert {name: default for name, (_, default) in BACKBONES.items()} == {
        "resnet50": "imagenet", "auto": None, "clip": "openai/clip-vit-base-patch32",
        "blip": "Salesforce/blip-itm-base-coco", "pixels": "dandelin/vilt-b32-mlm",
        "caption": "bert-base-uncased", "phrases": "bert-base-uncased",
    }  # fmt: skip


def test_tf32_is_off_while_a_backbone_looks_and_then_as_it_was():
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        with pytest.raises(KeyError), exact_convolutions("cuda:0"):
            assert setting.fp32_precision == "ieee"
            raise KeyError
        assert setting.fp32_precision == "tf32"
        with exact_convolutions("cpu"):
            assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
