"""Frozen vision encoders: a photo -> the pixels of its views -> region features.

    backbone = load_backbone("clip")  # backbones.py
    photos = Photos(["1"], {"1": Path("1.jpg")}, backbone, views=1, seed=0)  # photos.py
    views, status, reason = photos.read(0)  # uint8 [V, 3, H, W]
    regions = backbone.regions(views)  # [V, n, D]

A backbone is one loader and one row of `BACKBONES`. How a transformers model wants its photos resized,
cropped and normalised is read from its own image processor's configuration.
"""

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import transforms as T
from transformers import AutoConfig

from parts.console import first_line
from parts.processes import out_of_memory
from parts.text_encoder import as_data, load_pretrained

EXACT = threading.Lock()  # of a setting that is the whole process's


@contextlib.contextmanager
def exact_convolutions(device):
    """Context without TF32, whose rounding on CUDA would show in float16; what was set before comes back."""
    if torch.device(device).type != "cuda":
        yield
        return
    settings = torch.backends.cudnn.conv
    with EXACT:
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


@dataclass(frozen=True)
class Backbone:
    """A frozen model and how it wants its photos: all that decides what becomes of a photo.

    `regions` maps uint8 photos of one size [B, 3, H, W] to [B, n, D]: what it keeps of the photo as a whole
    (a class token), if anything, then the photo's places, row by row. Of captions, it maps ids [B, n] to
    [B, n, D]; of phrases ids [1, P, n] to [1, P, D].
    """

    regions: nn.Module
    # PIL photo -> its plain view, uint8 [3, H, W]; caption -> ids [n], phrases -> ids [P, n], and what is cut
    prepare: object
    resample: int  # the interpolation of `prepare`, as PIL numbers them
    stride: int  # pixels from place to place: ceil(H / stride) rows of ceil(W / stride); 0 = no places
    shape: tuple  # (most regions of a photo, D)
    same_size: bool  # whether all photos come out in one size, so that several can share a forward pass
    settings: dict  # what else the features depend on: weights, img_size, resizing, mean, std
    dtype: str = "float16"  # of the regions
    weights_sha256: str = "none"
    parameters: int = 0

    def look(self, photos, device, views):
        """The views of each of some photos, or ids, as `regions` takes them -> the regions [V, n, D] of each.

        Numpy arrays; of boxes a view is several pictures, and n the regions of all of them.
        """
        with exact_convolutions(device):
            regions = self.regions(torch.cat(photos).to(device)).cpu().numpy()
        ends = np.cumsum([len(pictures) for pictures in photos])[:-1]
        return [part.reshape(views, -1, part.shape[-1]) for part in np.split(regions, ends)]

    def grid(self, views):
        """(rows, columns) of the places in views [V, 3, H, W]; (0, 0) where there are none."""
        return [-(-side // self.stride) for side in views.shape[2:]] if self.stride else [0, 0]


class Frozen(nn.Module):
    """uint8 photos [B, 3, H, W], normalised -> regions [B, n, D] float16: `states` of a vision model."""

    def __init__(self, model, states, mean, std):
        super().__init__()
        self.model, self.states = model, states
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, photos):
        pixels = photos.float().div_(255).sub_(self.mean).div_(self.std)
        return self.states(self.model, pixels.contiguous(memory_format=torch.channels_last)).half()


def fold_batch_norms(module):
    """Multiply each batch norm of a module in eval mode into the convolution right before it, for good."""
    for parent in list(module.modules()):
        for (name, first), (norm, second) in pairwise(list(parent.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, norm, nn.Identity())


def state_hash(module):
    """SHA-256 over a module's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def frozen_backbone(model, states, weights, prepare, resample, stride, shape, settings):
    """The `Backbone` of a model; `weights`: their name, "file" and "random" get digits of their SHA-256."""
    digest, parameters = state_hash(model), sum(p.numel() for p in model.parameters())
    weights = f"{weights}-{digest[:12]}" if weights in ("file", "random") else weights
    regions = Frozen(model.eval(), states, settings["mean"], settings["std"])
    settings = {"weights": weights, **settings}
    return Backbone(regions, prepare, resample, stride, shape, True, settings, "float16", digest, parameters)


def read_state_dict(path):
    """The tensors of a .safetensors or torch.save file, read as data alone: no pickled code is run."""
    try:
        safe = path.endswith(".safetensors")
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"--weights {path}: no such file; give imagenet, imagenet-v2, random or a path"
        ) from None
    except Exception as error:  # a broken file raises whatever the reader stumbles over
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:150]}"
        raise ValueError(f"--weights {path}: not a state dict that loads as data alone ({reason})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_resnet50(weights, img_size, seed):
    """ResNet50 (He et al. 2016): the places of its last convolutional map.

    `weights`: imagenet (torchvision's IMAGENET1K_V1), imagenet-v2, random, or a state dict's .pth or
    .safetensors file.
    """
    size, stride = img_size or 224, 32
    if size < stride:
        raise ValueError(f"--img-size {size}: resnet50 needs at least {stride}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs', too
        # A plainly random ResNet50 maps all pictures to nearly one direction. With the last norm of every
        # residual branch at zero the blocks start as identities, and pictures stay apart.
        model = torchvision.models.resnet50(zero_init_residual=True)
    published = {"imagenet": "IMAGENET1K_V1", "imagenet-v2": "IMAGENET1K_V2"}.get(weights)
    if published:
        source = torchvision.models.ResNet50_Weights[published]
        try:
            state = source.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot download {published} ({error}); give a local file with --weights PATH"
            ) from None
    else:
        state = model.state_dict() if weights == "random" else read_state_dict(weights)
    unlike = f"--weights {weights}: not ResNet50's"
    try:
        body = {key: value for key, value in state.items() if not key.startswith("fc.")}
        missing, more = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{unlike} ({str(error).splitlines()[-1].strip()})") from None
    missing = [key for key in missing if not key.startswith("fc.")]
    if missing or more:  # a deeper ResNet has all of ResNet50's; a key or a prefix before them is the first
        counts = [f"{len(keys)} tensors {what} (first: {keys[0]})"
                  for what, keys in (("missing", missing), ("more", more)) if keys]  # fmt: skip
        raise ValueError(f"{unlike}: {', '.join(counts)}; give the state dict of torchvision's resnet50")
    settings = {"img_size": size, "resizing": f"bilinear to {size} x {size}"}
    settings |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    backbone = frozen_backbone(
        nn.Sequential(*list(model.children())[:-2]),  # without the average pool and the classifier
        lambda body, pixels: body(pixels).flatten(2).transpose(1, 2),
        published or ("random" if weights == "random" else "file"),
        T.Compose([T.Resize((size, size)), T.PILToTensor()]),
        Image.Resampling.BILINEAR.value,
        stride,
        ((-(-size // stride)) ** 2, 2048),
        settings,
    )
    fold_batch_norms(backbone.regions)
    return backbone


class ProcessorResize:
    """PIL photo -> uint8 [3, H, W], resized and cropped as an image processor does, not yet normalised."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, photo):
        made = self.processor(photo, do_rescale=False, do_normalize=False, do_pad=False, return_tensors="pt")
        return made["pixel_values"][0]


def load_processor(source, img_size):
    """A model's own image processor as a `Backbone`'s (prepare, resample, settings less weights)."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source, **as_data(source))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"--weights {source}: no image processor ({first_line(error)}); name a hub's model or a local"
            " folder with a preprocessor_config.json"
        ) from None
    config = json.loads(processor.to_json_string())
    size = config["size"].get("shortest_edge") or config["size"]["height"]
    if img_size not in (None, size):
        raise ValueError(f"--img-size {img_size}: {source} takes photos of {size}; leave the option out")
    names = ("size", "resample", "do_center_crop", "crop_size", "size_divisor")
    resizing = {name: config[name] for name in names if config.get(name) is not None}
    settings = {"img_size": size, "resizing": json.dumps(resizing)}
    settings |= {"mean": config["image_mean"], "std": config["image_std"]}
    return ProcessorResize(processor), config["resample"], settings


def vision_transformer(model, states, class_token, source, img_size):
    """The `Backbone` of a vision model that keeps `class_token` (0 or 1) states besides its patches'."""
    resize, resample, settings = load_processor(source, img_size)
    size, patch = model.config.image_size, model.config.patch_size
    made = tuple(resize(Image.new("RGB", (size, size))).shape[1:])
    if made != (size, size):
        raise ValueError(
            f"--weights {source}: its processor makes {made} pixels, the model takes {size} x {size}"
        )
    weights = "file" if os.path.isdir(source) else source
    shape = (size // patch) ** 2 + class_token, model.config.hidden_size
    return frozen_backbone(model, states, weights, resize, resample, patch, shape, settings)


def check_kind(source, kinds):
    """ValueError unless the model at `source` is of one of the `kinds`, as transformers calls them."""
    try:
        kind = AutoConfig.from_pretrained(source, **as_data(source)).model_type
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        reason = f"cannot be loaded ({first_line(error)}); name a local folder or a hub's model"
        raise ValueError(f"--weights {source}: {reason}") from None
    if kind not in kinds:
        raise ValueError(f"--weights {source}: it is a {kind}, not a {kinds[0]}; name one that is")


def load_clip(weights, img_size, seed):
    """CLIP's vision tower (Radford et al. 2021): the last states of its patches."""
    check_kind(weights, ("clip", "clip_vision_model"))
    model = load_pretrained(transformers.CLIPVisionModel, weights, "--weights")

    def states(model, pixels):
        return model(pixel_values=pixels).last_hidden_state[:, 1:]

    return vision_transformer(model, states, 0, weights, img_size)


def load_blip(weights, img_size, seed):
    """BLIP's vision model (Li et al. 2022): all states its text encoder reads, the class token's first."""
    check_kind(weights, ("blip",))
    # BlipVisionModel.from_pretrained would find none of its weights under their names in this checkpoint.
    model = load_pretrained(transformers.BlipForImageTextRetrieval, weights, "--weights", part="vision_model")
    return vision_transformer(model, lambda m, x: m(pixel_values=x).last_hidden_state, 1, weights, img_size)


class Patches(nn.Module):
    """uint8 photos [B, 3, H, W] -> patches [B, H / side * W / side, 3 * side * side], channels first."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, photos):
        grid = photos.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))  # [B, 3, h, side, w, side]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def load_pixels(weights, img_size, seed):
    """No model, but the pixels as ViLT's processor resizes them (Kim et al. 2021), cut into ViLT's patches.

    It keeps the aspect ratio, so photos differ in how many patches they have. Of `weights` only the processor
    counts.
    """
    resize, resample, settings = load_processor(weights, img_size)
    side, short = getattr(resize.processor, "size_divisor", None), settings["img_size"]
    if not side:
        raise ValueError(f"--weights {weights}: its image processor is not ViLT's: it has no size_divisor")
    most = (short // side) * (int(1333 / 800 * short) // side)  # 1333 : 800: the longest the processor makes
    settings = {"weights": "none", **settings}
    return Backbone(Patches(side), resize, resample, side, (most, 3 * side**2), False, settings, "uint8")


