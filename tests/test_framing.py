"""What an encoder sees of a photo: transformers' and timm's own preprocessing, and where colours land."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from parts.backbones import load_backbone
from parts.framing import Fitted, processor_framing, read_framing, seen_part, timm_framing


def ramps(width, height):
    """A photo whose red is the place across and whose green is the place down, from 0 to 255."""
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([255 * across, 255 * down, 255 * across], -1).round().astype(np.uint8))


def check_seen(pixels, part):
    """Whether pixels [3, H, W] of `ramps` show the part [left, top, width, height] of the photo."""
    red, green = pixels[0].float().mean(0) / 255, pixels[1].float().mean(1) / 255
    for found, start, share in ((red, part[0], part[2]), (green, part[1], part[3])):
        half = share / len(found) / 2  # colours are those of the pixels' centres
        assert found[0].item() == pytest.approx(start + half, abs=0.02)
        assert found[-1].item() == pytest.approx(start + share - half, abs=0.02)


@pytest.mark.parametrize("size", [(300, 100), (64, 200), (120, 120)])
@pytest.mark.parametrize("name, folder, crops", [
    ("clip", "clip", True), ("blip", "blip", False), ("pixels", "vilt", False),
])  # fmt: skip
def test_the_part_seen_is_what_the_processor_keeps(data_dir, size, name, folder, crops):
    backbone = load_backbone(name, str(data_dir / "demo" / folder))
    part = seen_part(*size, backbone.settings)
    check_seen(backbone.prepare(ramps(*size)), part)
    assert (part == [0, 0, 1, 1]) == (not crops or size[0] == size[1])


def test_the_part_seen_in_numbers():
    def part(width, height, size, crops=True):
        crop = {"do_center_crop": crops, "crop_size": {"height": 224, "width": 224}, "size": size}
        return seen_part(width, height, {"resizing": json.dumps(crop)})

    assert part(400, 200, {"shortest_edge": 224}) == [0.25, 0, 0.5, 1]
    assert part(100, 400, {"shortest_edge": 256}) == [0.0625, 0.3906, 0.875, 0.2188]
    assert part(400, 200, {"height": 256, "width": 256}) == [0.0625, 0.0625, 0.875, 0.875]
    assert part(400, 200, {"shortest_edge": 224}, crops=False) == [0, 0, 1, 1]
    squashed = {"resizing": "bilinear to 224 x 224"}
    assert seen_part(400, 200, squashed) == seen_part(400, 200, {}) == [0, 0, 1, 1]
    # Padded to 224: 112 rows of pixels are 3.5 of 7 places, so the fourth ends at 128.
    padded = {"fit": "pad", "img_size": 224, "places": 7}
    assert seen_part(400, 200, padded) == [0, 0, 1, 1.1429]
    assert seen_part(200, 400, padded) == [0, 0, 1.1429, 1]


def processor(kind, **settings):
    return getattr(transformers, f"{kind}ImageProcessor")(**settings)


@pytest.mark.parametrize("kind, settings", [
    ("ViT", {"size": {"height": 64, "width": 64}}),
    ("DeiT", {"size": {"height": 72, "width": 72}, "crop_size": {"height": 64, "width": 64}}),
    ("Bit", {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),  # DINOv2's
    ("ConvNext", {"size": {"shortest_edge": 64}}), ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("DINOv3ViT", {"size": {"height": 64, "width": 64}}), ("Siglip", {"size": {"height": 64, "width": 64}}),
    ("MobileNetV2", {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),
])  # fmt: skip
def test_what_a_processor_of_transformers_sees_is_told(kind, settings):
    """At its own size and at another; its own last step of normalising is what mean and std say."""
    for img_size in (None, 96):
        own = processor(kind, **settings)
        framing = processor_framing(own, img_size, "processor")
        side = framing.settings["img_size"]
        assert side == (img_size or max(settings.get("crop_size", settings["size"]).values()))
        for size in ((300, 100), (64, 200)):
            pixels = framing.prepare(ramps(*size))
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, side, side)
            check_seen(pixels, seen_part(*size, framing.settings))
        if img_size is None:
            mean, std = (torch.tensor(framing.settings[key])[:, None, None] for key in ("mean", "std"))
            whole = own(ramps(64, 200), return_tensors="pt")["pixel_values"][0]
            assert ((pixels / 255 - mean) / std - whole).abs().max() < 0.02  # a grey level, where it rounds


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timms_framing_is_its_own_transform(crop_mode):
    data = timm.data.resolve_data_config({
        "input_size": (3, 64, 64), "crop_pct": 0.875, "crop_mode": crop_mode, "interpolation": "bicubic",
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
    })  # fmt: skip
    framing = timm_framing(data, None, "processor")
    mean, std = (torch.tensor(framing.settings[key])[:, None, None] for key in ("mean", "std"))
    for size in ((300, 100), (64, 200)):
        photo, pixels = ramps(*size), framing.prepare(ramps(*size))
        torch.testing.assert_close((pixels / 255 - mean) / std, timm.data.create_transform(**data)(photo))
        check_seen(pixels, seen_part(*size, framing.settings))
    assert timm_framing(data, 32, "processor").prepare(photo).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="crop mode border is not known here: add --fit squash or pad"):
        timm_framing(data | {"crop_mode": "border"}, None, "processor")


def test_squashed_and_padded_photos_are_pils():
    photo = ramps(300, 100)
    squashed, padded = (Fitted(fit, 60, 3, np.asarray)(photo) for fit in ("squash", "pad"))
    assert np.array_equal(squashed, photo.resize((60, 60), Image.Resampling.BICUBIC))
    assert np.array_equal(padded, photo.resize((60, 20), Image.Resampling.BICUBIC))
    assert Fitted("pad", 60, 3, np.asarray)(ramps(2, 900)).shape == (60, 1, 3)
    # A processor's other steps are kept: MobileViT's colours come in another order.
    framing = processor_framing(processor("MobileViT"), 64, "squash")
    assert framing.prepare(Image.new("RGB", (9, 9), "red"))[:, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind, message", [
    ("Detr", r"a photo of 300 x 200 becomes 1200 x 800, not 800 x 800: add --fit squash or pad"),
    ("Levit", "which part of a photo it sees is not clear: add --fit squash or pad"),
    ("VideoMAE", r"its image processor makes \(1, 3, 224, 224\) of a photo, not one picture"),
    ("Siglip2", r"its image processor makes \(256, 768\) of a photo, not one picture"),
    ("PPLCNet", "its image processor does more than resize, crop and normalise"),
    ("Swin2SR", "no 'resample' is said"),
])  # fmt: skip
def test_what_cannot_be_told_is_refused(tmp_path, kind, message):
    processor(kind).save_pretrained(tmp_path)
    refused = f"--weights .*: photos cannot be prepared for it .{message}"
    with pytest.raises(ValueError, match=refused) as error:
        read_framing(str(tmp_path))
    assert "\n" not in str(error.value)
    if "--fit" in message:
        assert read_framing(str(tmp_path), 64, "squash").prepare(ramps(300, 200)).shape == (3, 64, 64)
        assert read_framing(str(tmp_path), 60, "pad").prepare(ramps(300, 200)).shape == (3, 40, 60)
