"""Frozen vision encoders: a photo -> the pixels of its views -> region features.

    backbone = load_backbone("auto", "facebook/dinov2-base")  # backbones.py
    photos = Photos(["1"], {"1": Path("1.jpg")}, backbone, views=1, seed=0)  # photos.py
    views, status, reason = photos.read(0)  # uint8 [V, 3, H, W]
    regions = backbone.look(views, "cpu")  # [V, n, D]

`load_encoder` takes any image model of transformers or timm: it runs the model once on a random picture and
sees what comes out. What it was tried with: benchmarks/VISION.md.
"""

import contextlib
import hashlib
import json
import math
import os
import threading
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from transformers import AutoConfig, AutoModel

from parts.console import first_line
from parts.framing import INTERPOLATIONS, Processed, crop_to, fit_to, open_processor, read_framing
from parts.framing import resizing_of
from parts.processes import out_of_memory
from parts.text_encoder import UNUSABLE, as_data, load_pretrained

EXACT = threading.Lock()  # of a setting that is the whole process's
MOST_BEFORE = 16  # tokens before a photo's places: RADIO has 10


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
    stride: object  # pixels from place to place, int or Fraction: ceil(H / stride) rows; 0 = no places
    shape: tuple  # (most regions of a photo, D)
    same_size: bool  # whether all photos come out in one size, so that several can share a forward pass
    settings: dict  # what else the features depend on: weights, img_size, resizing, mean, std ...
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
        """[rows, columns] of the places in views [V, 3, H, W]; zeros where there are none."""
        if not self.stride:
            return [0, 0]
        most = self.settings.get("grid") or math.inf
        return [min(most, math.ceil(side / self.stride)) for side in views.shape[2:]]


class Frozen(nn.Module):
    """uint8 photos [B, 3, H, W], normalised -> regions [B, n, D] float16: `states` of a vision model.

    `states`: (model, pixels of a square of `side`) -> [B, n, D], its `rows` x `rows` places at the end. A
    photo that is smaller is padded with the mean colour, and places of padding alone are left out. `grid`:
    places are averaged to so many rows and columns at most; None: they stay as they are.
    """

    def __init__(self, model, states, side, rows, mean, std, grid=None):
        super().__init__()
        self.model, self.states, self.side, self.rows, self.grid = model, states, side, rows, grid
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, photos):
        pixels, (height, width) = photos.float().div_(255).sub_(self.mean).div_(self.std), photos.shape[2:]
        pixels = F.pad(pixels, (0, self.side - width, 0, self.side - height))
        states = self.states(self.model, pixels.contiguous(memory_format=torch.channels_last))
        if self.grid or min(height, width) < self.side:
            whole, places = states.split([states.shape[1] - self.rows**2, self.rows**2], 1)
            rows, columns = (math.ceil(Fraction(side * self.rows, self.side)) for side in (height, width))
            places = places.unflatten(1, (self.rows, self.rows))[:, :rows, :columns].permute(0, 3, 1, 2)
            most = self.grid or self.rows
            places = F.adaptive_avg_pool2d(places, (min(rows, most), min(columns, most)))
            states = torch.cat((whole, places.flatten(2).transpose(1, 2)), 1)
        return states.half()


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


def frozen_backbone(model, states, weights, framing, layout, settings):
    """The `Backbone` of a model.

    `weights`: their name; "file" and "random" get digits of their SHA-256. `layout`: (regions of the photo as
    a whole, rows of its places, D). `settings`: those beside the framing's, None for what is as usual.
    """
    digest, parameters = state_hash(model), sum(p.numel() for p in model.parameters())
    weights = f"{weights}-{digest[:12]}" if weights in ("file", "random") else weights
    (whole, rows, width), side = layout, framing.settings["img_size"]
    padded, grid = settings.get("fit") == "pad", settings.get("grid")
    settings = {"weights": weights, **framing.settings, **settings, "places": rows if padded else None}
    regions = Frozen(model.eval(), states, side, rows, settings["mean"], settings["std"], grid)
    shape = whole + min(rows, grid or rows) ** 2, width
    return Backbone(
        regions, framing.prepare, framing.resample, Fraction(side, rows), shape, not padded, settings,
        "float16", digest, parameters,
    )  # fmt: skip


def read_state_dict(path):
    """The tensors of a .safetensors or torch.save file, read as data alone: no pickled code is run."""
    try:
        safe = path.endswith(".safetensors")
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        message = f"--weights {path}: no such file; give imagenet, imagenet-v2, random or a path"
        raise ValueError(message) from None
    except Exception as error:  # a broken file raises whatever the reader stumbles over
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:150]}"
        raise ValueError(f"--weights {path}: not a state dict that loads as data alone ({reason})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_resnet50(weights, img_size, seed, fit="squash", grid=None):
    """ResNet50 (He et al. 2016): the places of its last convolutional map.

    `weights`: imagenet (torchvision's IMAGENET1K_V1), imagenet-v2, random, or a state dict's .pth or
    .safetensors file. `fit` "processor": as torchvision evaluates these weights, the centre of each photo.
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
            message = f"cannot download {published} ({error}); give a local file with --weights PATH"
            raise ValueError(message) from None
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
        counts = f"{len(missing)} tensors missing, {len(more)} more (first: {[*more, *missing][0]})"
        raise ValueError(f"{unlike}: {counts}; give the state dict of torchvision's resnet50")
    colours, bilinear = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), INTERPOLATIONS.index("bilinear")
    if fit == "processor":
        shorter = 232 if published == "IMAGENET1K_V2" else 256  # of photos of 224
        framing = crop_to(round(size * shorter / 224), size, bilinear, *colours)
    else:
        framing = fit_to(fit, size, bilinear, *colours)
    backbone = frozen_backbone(
        nn.Sequential(*list(model.children())[:-2]),  # without the average pool and the classifier
        lambda body, pixels: body(pixels).flatten(2).transpose(1, 2),
        published or ("random" if weights == "random" else "file"),
        framing,
        (0, -(-size // stride), 2048),
        {"fit": None if fit == "squash" else fit, "grid": grid},
    )
    fold_batch_norms(backbone.regions)
    return backbone


def check_kind(source, kinds):
    """The kind of the model at `source`, as transformers calls it; ValueError unless it is one of `kinds`."""
    try:
        config = AutoConfig.from_pretrained(source, **as_data(source))
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        reason = f"cannot be loaded ({first_line(error)}); name a local folder or a hub's model"
        if isinstance(error, ImportError) and "timm" in str(error):
            reason = "a model of timm, which is not installed; pip install timm"
        raise ValueError(f"--weights {source}: {reason}") from None
    if kinds and config.model_type not in kinds:
        kind = config.model_type
        raise ValueError(f"--weights {source}: it is a {kind}, not a {kinds[0]}; name one that is")
    return f"timm {config.architecture}" if config.model_type == "timm_wrapper" else config.model_type


def last_states(model, pixels):
    """The last states of an image model: [B, h, w, D] of a map, [B, n, D] of tokens; ValueError if none."""
    output = model(pixel_values=pixels)
    states = getattr(output, "last_hidden_state", None)
    if not torch.is_tensor(states) or getattr(output, "encoder_last_hidden_state", None) is not None:
        raise ValueError("its last states are not those of a photo's places")
    channels_last = states.ndim == 4 and states.shape[1] == states.shape[2] != states.shape[3]
    if states.ndim == 4 and not channels_last:
        states = states.permute(0, 2, 3, 1)
    if states.ndim not in (3, 4) or (states.ndim == 4 and states.shape[1] != states.shape[2]):
        raise ValueError(f"states of shape {tuple(states.shape)} are no square of places")
    return states


def regions_of(model, pixels, whole, before):
    """States [B, n, D]: all of a map; of tokens the first `whole`, and all but the first `before`."""
    states = last_states(model, pixels)
    if states.ndim == 4:
        return states.flatten(1, 2)
    return torch.cat((states[:, :whole], states[:, before:]), 1)


def patch_size(model):
    """Pixels along a patch of a model, None if it does not say."""
    source = getattr(getattr(model, "timm_model", None), "patch_embed", model.config)
    patch = getattr(source, "patch_size", None)
    return patch[-1] if isinstance(patch, list | tuple) else patch


def find_places(count, side, patch):
    """(tokens before the places, rows of places) of `count` tokens; the largest square that fits.

    That is (side / patch)^2, or a power of 4 less where stages merge places. Before it come a class token and
    registers. `patch`: pixels, None if not known. ValueError if nothing fits.
    """
    for before in range(MOST_BEFORE + 1 if patch else 2):
        rows = math.isqrt(max(0, count - before))
        strides = [patch * 2**stage for stage in range(6)] if patch else []
        fits = not patch or any(rows in (side // stride, -(-side // stride)) for stride in strides)
        if rows and rows**2 == count - before and fits:
            return before, rows
    raise ValueError(f"its {count} states of a photo of {side} pixels are no square of places")


@torch.inference_mode()
def try_out(model, side):
    """(class tokens, tokens before the places, rows of places, D) of a model in eval mode, as it turns out.

    ValueError if it does not give a photo, shown twice, the same finite states.
    """
    if "blip" in model.config.model_type and side != model.config.image_size:
        # Others refuse or adapt; BLIP's kind gives places the positions of other ones, and says nothing.
        raise ValueError(f"it takes {model.config.image_size} pixels, its image processor makes {side}")
    pixels = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        states = last_states(model, pixels)
    if not states.isfinite().all():
        raise ValueError("its states are no finite numbers")
    if len(states) != 2 or not torch.allclose(*states, 1e-3, 1e-3 * states.abs().max().item()):
        raise ValueError("it answers the same photo twice in two ways")
    if states.ndim == 4:
        return 0, 0, states.shape[1], states.shape[3]
    before, rows = find_places(states.shape[1], side, patch_size(model))
    of_timm = getattr(model, "timm_model", None)
    registers_alone = of_timm is not None and getattr(of_timm, "cls_token", None) is None
    return int(before > 0 and not registers_alone), before, rows, states.shape[2]


def load_encoder(source, img_size, seed, fit="processor", grid=None,
                 kinds=(), model_class=AutoModel, whole=True):  # fmt: skip
    """Any image model of transformers, timm's among them: its last states, of two towers the image's.

    `source`: a hub's name or a folder. `kinds`: those that are wanted, any by default. `whole`: keep a class
    token, which is of the photo as a whole; registers never are kept. ValueError, one line, for what is no
    such model, or gives no places.
    """
    kind = check_kind(source, kinds)
    model = load_pretrained(model_class, source, "--weights", part="image").eval()
    framing = read_framing(source, img_size, fit)
    side = framing.settings["img_size"]
    try:
        classes, before, rows, width = try_out(model, side)
    except UNUSABLE as error:
        if out_of_memory(error):
            raise
        message = f"--weights {source}: a {kind} gives no regions of a photo ({first_line(error)})"
        if img_size:
            with contextlib.suppress(*UNUSABLE):
                own = read_framing(source).settings["img_size"]
                try_out(model, own)
                message = f"--img-size {side}: {source} takes photos of {own}; leave the option out"
        raise ValueError(message) from None
    classes = classes if whole else 0
    settings = {"fit": None if fit == "processor" else fit, "grid": grid, "encoder": None if kinds else kind}
    states = partial(regions_of, whole=classes, before=before)
    weights = "file" if os.path.isdir(source) else source
    return frozen_backbone(model, states, weights, framing, (classes, rows, width), settings)


# CLIP's vision tower (Radford et al. 2021): the last states of its patches. BLIP's vision model (Li et al.
# 2022): all states that its text encoder reads, the class token's first.
load_clip = partial(
    load_encoder, kinds=("clip", "clip_vision_model"), model_class=transformers.CLIPVisionModel, whole=False
)
# AutoModel would find none of the text weights under their names in BLIP's checkpoints.
load_blip = partial(load_encoder, kinds=("blip",), model_class=transformers.BlipForImageTextRetrieval)


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
    processor = open_processor(weights)
    config = json.loads(processor.to_json_string())
    size = config["size"].get("shortest_edge") or config["size"]["height"]
    if img_size not in (None, size):
        raise ValueError(f"--img-size {img_size}: {weights} takes photos of {size}; leave the option out")
    settings = {"img_size": size, "resizing": resizing_of(config)}
    settings |= {"mean": config["image_mean"], "std": config["image_std"]}
    side = config.get("size_divisor")
    if not side:
        raise ValueError(f"--weights {weights}: its image processor is not ViLT's: it has no size_divisor")
    most = (size // side) * (int(1333 / 800 * size) // side)  # 1333 : 800: the longest the processor makes
    settings, shape = {"weights": "none", **settings}, (most, 3 * side**2)
    prepare = Processed(processor)
    return Backbone(Patches(side), prepare, config["resample"], side, shape, False, settings, "uint8")


