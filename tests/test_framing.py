"""What an encoder sees of a photo: against transformers' and timm's own preprocessing, and where colours land."""

import json

import numpy as np
import pytest
from PIL import Image

from parts.backbones import load_backbone
from parts.framing import seen_part


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
    assert seen_part(400, 200, {"resizing": "bilinear to 224 x 224"}) == seen_part(400, 200, {}) == [0, 0, 1, 1]
    # Padded to 224: 112 rows of pixels are 3.5 of 7 places, so the fourth ends at 128.
    padded = {"fit": "pad", "img_size": 224, "places": 7}
    assert seen_part(400, 200, padded) == [0, 0, 1, 1.1429] and seen_part(200, 400, padded) == [0, 0, 1.1429, 1]
