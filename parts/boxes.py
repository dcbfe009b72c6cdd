"""Objects as regions: a file of boxes, and photos that are read with the crop of each of their boxes.

    {"image": "17_06_4705", "boxes": [[12, 30.5, 200, 310]], "labels": ["person"], "scores": [0.97]}

One JSON object a line and photo, from any detector. A box is [x0, y0, x1, y1] in pixels of the photo turned
as its EXIF data say, from the top left corner on. Labels and scores may be missing, other keys are ignored.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from PIL import Image
from torch import nn

from features import LABEL_WIDTH
from parts.files import is_text, read_by_id
from parts.photos import Photos, by_name

MOST = 16  # boxes of a photo that are looked at, best scores first
TOGETHER = 16  # pictures in a forward pass, whatever their photos: another number changes the last bits
THIN = 100  # a box that is so many times as long as wide is a line, and no picture
WHOLE = b"whole photo"  # the label of the first region
NO_BOXES = np.zeros((0, 4)), [], ""  # of a photo that is not there
REMARK = re.compile(r"of its boxes (\d+) cut to the photo, (\d+) empty")


@dataclass(frozen=True)
class Boxes:
    """The boxes of a photo that are looked at, best scores first, and how many are left out after `MOST`."""

    corners: tuple  # of (x0, y0, x1, y1) in pixels
    labels: tuple
    left_out: int = 0

    @property
    def count(self):
        return len(self.corners) + self.left_out


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e9  # False of NaN, too


def check_boxes(entry):
    """The `Boxes` of a dict with `boxes` and perhaps `labels` and `scores`; else a ValueError."""
    boxes = entry.get("boxes")
    if not isinstance(boxes, list | tuple):
        raise ValueError("boxes is not a list of [x0, y0, x1, y1]")
    for box in boxes:
        numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(is_number, box))
        if not (numbers and box[0] <= box[2] and box[1] <= box[3]):
            shape = "four numbers x0, y0, x1, y1 in pixels, x0 <= x1, y0 <= y1"
            raise ValueError(f"{box!r:.100} is not a box: {shape} (and not x, y, width, height)")
    if boxes and max(map(max, boxes)) <= 1:
        raise ValueError("its boxes end at pixel 1: shares of the photo, it seems; multiply by its size")
    lists = {"labels": (is_text, "text"), "scores": (is_number, "a number")}
    for key, (fits, wanted) in lists.items():
        values = entry.get(key)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != len(boxes) or not all(map(fits, values)):
            raise ValueError(f"{key} is not a list with {wanted} for each of the {len(boxes)} boxes")
    scores, labels = entry.get("scores"), entry.get("labels") or [""] * len(boxes)
    order = range(len(boxes)) if scores is None else sorted(range(len(boxes)), key=lambda i: -scores[i])
    best = order[:MOST]
    return Boxes(tuple(tuple(boxes[i]) for i in best), tuple(labels[i] for i in best), len(boxes) - len(best))


def boxes_of(path, image_ids):
    """{image id: its `Boxes` in the file at `path`, or None}; what is there is said on the console.

    ValueError if the file has boxes of none of the photos.
    """
    in_file = read_by_id(path, "image", check_boxes)
    of_photos = by_name(image_ids, in_file)
    boxed = [boxes for boxes in of_photos.values() if boxes is not None and boxes.corners]
    if not boxed:
        reason = f"boxes of none of the {len(of_photos)} photos (first image: {next(iter(in_file), 'none')})"
        raise ValueError(f"{path}: {reason}; name the file of this data set")
    count, more = sum(len(boxes.corners) for boxes in boxed), sum(boxes.left_out for boxes in boxed)
    bare = len(of_photos) - len(boxed)
    print(f"{path}: {count} boxes of {len(boxed)} photos; {bare} photos have none, and one region, the whole;"
          f" {more} boxes left out, over the best {MOST} of their photo")  # fmt: skip
    return of_photos


def clip(boxes, width, height):
    """([(left, top, right, bottom)] in whole pixels within the photo, their labels, what is said of it).

    Boxes that are empty there, or no more than a line, are left out.
    """
    corners, labels, cut = [], [], 0
    for (x0, y0, x1, y1), label in zip(boxes.corners, boxes.labels, strict=True):
        left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
        right, bottom = min(width, math.ceil(x1)), min(height, math.ceil(y1))
        sides = max(0, right - left), max(0, bottom - top)
        if max(sides) >= THIN * min(sides) or x0 == x1 or y0 == y1:
            continue
        corners.append((left, top, right, bottom))
        labels.append(label)
        # Detectors end boxes a fraction of a pixel outside.
        cut += min(x0, y0) <= -1 or x1 >= width + 1 or y1 >= height + 1
    empty = len(boxes.corners) - len(corners)
    return corners, labels, f"of its boxes {cut} cut to the photo, {empty} empty" if cut or empty else ""


class BoxedPhotos(Photos):
    """`Photos` with boxes, {image id: its `Boxes` or None}: item -> list of (views, status, reason, boxes).

    views: uint8 [V * (1 + n), 3, H, W], of each view first that of the photo, then those of its n boxes;
    boxes: ([1 + n, 4] in shares of the photo, their 1 + n labels as bytes).
    """

    def __init__(self, boxes, *photos):
        super().__init__(*photos)
        self.boxes = boxes
        self.seen = {}  # by photo: what `all_views` cut out of it, until `read` tells it

    def all_views(self, photo, image_id):
        corners, labels, remark = clip(self.boxes.get(image_id) or Boxes((), ()), *photo.size)
        shares = np.array([(0, 0, *photo.size), *corners]) / (photo.size * 2)
        self.seen[image_id] = shares, [WHOLE, *(cut_label(label) for label in labels)], remark
        views = [super().all_views(photo, image_id)]
        views += [super(BoxedPhotos, self).all_views(photo.crop(box), f"{image_id}/{box}") for box in corners]
        return torch.stack(views, 1).flatten(0, 1)

    def read(self, row):
        views, status, reason = super().read(row)
        shares, labels, remark = self.seen.pop(self.image_ids[row], NO_BOXES)
        if views is None:
            shares, labels, remark = NO_BOXES
        return views, status, "; ".join(filter(None, [reason, remark])), (shares, labels)


def cut_label(label):
    """A label as UTF-8, at most `LABEL_WIDTH` bytes."""
    return label.encode()[:LABEL_WIDTH].decode(errors="ignore").encode()


class PlaceMeans(nn.Module):
    """uint8 pictures [B, 3, H, W] -> the mean of the places of each, [B, 1, D] float16.

    `regions`: those of a `Backbone`; `places`: how many of its last regions are places.
    """

    def __init__(self, regions, places):
        super().__init__()
        self.regions, self.places = regions, places

    def forward(self, pictures):
        parts = [self.regions(part)[:, -self.places :] for part in pictures.split(TOGETHER)]
        return torch.cat([part.float().mean(1, keepdim=True) for part in parts]).half()


def with_boxes(backbone):
    """The `Backbone` that makes one region of the photo and one of each box: no places in a grid."""
    views = backbone.prepare(Image.new("RGB", (64, 64)))[None]
    means = PlaceMeans(backbone.regions, math.prod(backbone.grid(views)))
    settings = backbone.settings | {"most_boxes": MOST}
    return replace(backbone, regions=means, stride=0, shape=(1 + MOST, backbone.shape[1]), settings=settings)


def tell_boxes(cache):
    """Say how many boxes a finished feature file has, and what became of them."""
    regions, remarks = cache.num_regions[cache.num_regions > 0], Counter()
    for reason in cache.reasons:
        if remark := REMARK.search(reason):
            remarks += Counter(cut=int(remark[1]), empty=int(remark[2]))
    print(f"  {regions.sum() - len(regions)} boxes of {(regions > 1).sum()} photos: {remarks['cut']} reached"
          f" out of theirs and were cut, {remarks['empty']} more were empty or a line and left out;"
          f" {(regions == 1).sum()} photos have none")  # fmt: skip
