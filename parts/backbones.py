"""All backbones by name: what turns a photo, or what is said of it, into region features.

    backbone = load_backbone("clip")  # or resnet50, blip, pixels
"""

from parts.captions import load_caption, load_phrases
from parts.vision_encoder import load_blip, load_clip, load_pixels, load_resnet50

BACKBONES = {  # name: (loader, default of --weights)
    "resnet50": (load_resnet50, "imagenet"),
    "clip": (load_clip, "openai/clip-vit-base-patch32"),
    "blip": (load_blip, "Salesforce/blip-itm-base-coco"),
    "pixels": (load_pixels, "dandelin/vilt-b32-mlm"),
    "caption": (load_caption, "bert-base-uncased"),
    "phrases": (load_phrases, "bert-base-uncased"),
}
DEFAULT_WEIGHTS = {default for _, default in BACKBONES.values()}


def load_backbone(name, weights=None, img_size=None, seed=1337):
    """A row of `BACKBONES`: `weights` and `img_size` default to its own; `seed` is that of random weights.

    `weights`: what `load_resnet50` says; for the others a hub's name or a local folder. ValueError says what
    is wrong.
    """
    load, default = BACKBONES[name]
    return load(weights or default, img_size, seed)
