"""All backbones by name: what turns a photo, or what is said of it, into region features.

    backbone = load_backbone("auto", "facebook/dinov2-base")  # or resnet50, clip, blip, pixels ...
"""

from parts.captions import load_caption, load_phrases
from parts.photos import VISION
from parts.vision_encoder import load_blip, load_clip, load_encoder, load_pixels, load_resnet50

BACKBONES = {  # name: (loader, default of --weights)
    "resnet50": (load_resnet50, "imagenet"),
    "auto": (load_encoder, None),
    "clip": (load_clip, "openai/clip-vit-base-patch32"),
    "blip": (load_blip, "Salesforce/blip-itm-base-coco"),
    "pixels": (load_pixels, "dandelin/vilt-b32-mlm"),
    "caption": (load_caption, "bert-base-uncased"),
    "phrases": (load_phrases, "bert-base-uncased"),
}
DEFAULT_WEIGHTS = {default for _, default in BACKBONES.values() if default}


def load_backbone(name, weights=None, img_size=None, seed=1337, fit=None, grid=None):
    """A row of `BACKBONES`: `weights`, `img_size` and `fit` default to its own; `seed`: of random weights.

    `weights`: what `load_resnet50` says; for the others a hub's name or a local folder. `fit` (of `FITS`) and
    `grid` are for those in `VISION`. ValueError says what is wrong.
    """
    load, default = BACKBONES[name]
    framing = {key: value for key, value in (("fit", fit), ("grid", grid)) if value is not None}
    if framing and name not in VISION:
        raise ValueError(f"--{next(iter(framing))}: {name} has no choice of it; leave it out")
    if not (weights or default):
        raise ValueError("--backbone auto: name its encoder with --weights, a hub's model or a local folder")
    return load(weights or default, img_size, seed, **framing)
