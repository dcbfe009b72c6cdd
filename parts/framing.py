"""How a photo is framed for a vision encoder: squashed, padded, or as the encoder's own image processor does.

    framing = read_framing("facebook/dinov2-base")
    pixels = framing.prepare(photo)  # uint8 [3, H, W], not yet normalised

What transformers' image processors and timm's data configurations do is recorded in the feature file, and
`seen_part` tells from that what an encoder saw of a photo.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import transformers
from PIL import Image
from torchvision import transforms as T

from parts.console import first_line
from parts.processes import out_of_memory
from parts.text_encoder import UNUSABLE, as_data

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as PIL numbers them
# What of an image processor's configuration decides which part of a photo is where.
RESIZING = ("size", "resample", "do_center_crop", "crop_size", "size_divisor")


@dataclass(frozen=True)
class Framing:
    prepare: object  # PIL photo -> uint8 [3, H, W]: a square, or with --fit pad what fits into it
    resample: int  # the interpolation of `prepare`, as PIL numbers them
    settings: dict  # img_size (pixels, of the square), resizing, mean, std


class Fitted:
    """PIL photo -> uint8 [3, H, W]: `fit` "squash" a square; "pad" what fits into one, in proportion.

    The encoder pads the latter, so that places of padding alone can be left out. `finish`: PIL photo -> uint8
    [3, H, W].
    """

    def __init__(self, fit, side, resample, finish):
        self.fit, self.side, self.resample, self.finish = fit, side, resample, finish

    def __call__(self, photo):
        size = (self.side, self.side) if self.fit == "squash" else padded_size(*photo.size, self.side)
        return self.finish(photo.resize(size, self.resample))


class Processed:
    """PIL photo -> uint8 [3, H, W] as an image processor of transformers makes it, not yet normalised."""

    def __init__(self, processor, **changes):
        self.processor, self.changes = processor, changes

    def __call__(self, photo):
        plain = {"do_rescale": False, "do_normalize": False, "do_pad": False, "return_tensors": "pt"}
        return self.processor(photo, **plain, **self.changes)["pixel_values"][0]


def padded_size(width, height, side):
    """The size [W, H] of a photo whose longer side becomes `side` pixels."""
    return [max(1, round(side * length / max(width, height))) for length in (width, height)]


def fit_to(fit, side, resample, mean, std, finish=T.PILToTensor()):
    """The `Framing` of --fit squash or pad."""
    how = f"{INTERPOLATIONS[resample]} {'to' if fit == 'squash' else 'into'} {side} x {side}"
    settings = {"img_size": side, "resizing": how, "mean": mean, "std": std}
    return Framing(Fitted(fit, side, resample, finish), resample, settings)


def crop_to(scaled, side, resample, mean, std):
    """The `Framing` of photos resized to `scaled`, [H, W] or the shorter side, then cropped to the centre."""
    resize = T.Resize(scaled, T.InterpolationMode(INTERPOLATIONS[resample]))
    resizing = json.dumps(crop_config(scaled, side) | {"resample": resample})
    settings = {"img_size": side, "resizing": resizing, "mean": mean, "std": std}
    return Framing(T.Compose([resize, T.CenterCrop(side), T.PILToTensor()]), resample, settings)


def crop_config(scaled, side):
    """What `crop_to` does, in the words of transformers' image processors."""
    size = {"shortest_edge": scaled}
    if not isinstance(scaled, int):
        size = {"height": scaled[0], "width": scaled[1]}
    return {"size": size, "do_center_crop": True, "crop_size": {"height": side, "width": side}}


def resizing_of(config):
    """What of an image processor's configuration is recorded, as JSON."""
    return json.dumps({name: config[name] for name in RESIZING if config.get(name) is not None})


def open_processor(source):
    """The image processor at `source`, a hub's model or a folder; ValueError if there is none."""
    try:
        # Always this one of its two implementations: the other makes other last bits.
        kind = transformers.AutoImageProcessor
        return kind.from_pretrained(source, backend="torchvision", **as_data(source))
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = f"no image processor ({first_line(error)})"
        hint = "name a hub's model or a local folder with a preprocessor_config.json"
        raise ValueError(f"--weights {source}: {reason}; {hint}") from None


def timm_framing(data, img_size, fit):
    """The `Framing` that a timm model's data configuration asks for."""
    side, resample = img_size or data["input_size"][-1], INTERPOLATIONS.index(data["interpolation"])
    colours = list(data["mean"]), list(data["std"])
    if fit != "processor":
        return fit_to(fit, side, resample, *colours)
    scaled = math.floor(side / data["crop_pct"])
    scaled = {"center": scaled, "squash": (scaled, scaled)}.get(data["crop_mode"])
    if scaled is None:
        raise ValueError(f"crop mode {data['crop_mode']} is not known here: add --fit squash or pad")
    return crop_to(scaled, side, resample, *colours)


def processor_framing(processor, img_size, fit):
    """The `Framing` of an image processor of transformers, all its sizes scaled to `img_size`.

    ValueError if it does more to a photo than is recorded.
    """
    config, changes = json.loads(processor.to_json_string()), {}
    own = Processed(processor)(Image.new("RGB", (512, 512))).shape[-1]
    side = img_size or own
    for name in ("size", "crop_size"):
        if side != own and config.get(name):
            changes[name] = {key: value and round(value * side / own) for key, value in config[name].items()}
    colours = [0.0] * 3, [1.0] * 3
    if config.get("do_normalize"):
        colours = config["image_mean"], config["image_std"]
    prepare = Processed(processor, **changes)
    pixels = prepare(RAMPS)
    if pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"its image processor makes {tuple(pixels.shape)} of a photo, not one picture")
    whole = processor(RAMPS, do_pad=False, return_tensors="pt", **changes)["pixel_values"][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in colours)
    # Two grey levels: some resize after they have normalised, which rounds otherwise.
    if pixels.dtype != torch.uint8 or (pixels - 255 * (whole * std + mean)).abs().max() > 2:
        raise ValueError("its image processor does more than resize, crop and normalise")
    if fit != "processor":
        finish = Processed(processor, do_resize=False, do_center_crop=False)
        return fit_to(fit, side, config["resample"], *colours, finish)
    config |= changes
    if (share := config.get("crop_pct")) and (config.get("do_center_crop") or side < 384):  # ConvNeXt's rule
        config |= crop_config(int(side / share), side)
    settings = {"img_size": side, "resizing": resizing_of(config), "mean": colours[0], "std": colours[1]}
    return Framing(prepare, config["resample"], settings)


# A picture whose red and blue are the place across and whose green is the place down.
ACROSS, DOWN = np.meshgrid((np.arange(300) + 0.5) * 255 / 300, (np.arange(200) + 0.5) * 255 / 200)
RAMPS = Image.fromarray(np.stack((ACROSS, DOWN, ACROSS), -1).round().astype(np.uint8))


def check_framing(framing, fit):
    """ValueError unless a photo gets the size that is recorded, and `seen_part` tells what is seen of it."""
    side, pixels = framing.settings["img_size"], framing.prepare(RAMPS)
    width, height = padded_size(*RAMPS.size, side) if fit == "pad" else (side, side)
    if pixels.shape != (3, height, width):
        size = f"a photo of 300 x 200 becomes {pixels.shape[2]} x {pixels.shape[1]}"
        raise ValueError(f"{size}, not {width} x {height}: add --fit squash or pad")
    if fit == "processor":
        left, top, across, down = seen_part(*RAMPS.size, framing.settings)
        places = (torch.arange(side) + 0.5) / side
        off = pixels[0] - 255 * (left + across * places), pixels[1] - 255 * (top + down * places)[:, None]
        if max(channel[2:-2, 2:-2].abs().max() for channel in off) > 5:  # edges are blurred
            raise ValueError("which part of a photo it sees is not clear: add --fit squash or pad")


def read_framing(source, img_size=None, fit="processor"):
    """The `Framing` of the model at `source`, a hub's name or a folder; ValueError if it is not clear."""
    processor = open_processor(source)
    try:
        if hasattr(processor, "data_config"):
            framing = timm_framing(processor.data_config, img_size, fit)
        else:
            framing = processor_framing(processor, img_size, fit)
        check_framing(framing, fit)
    except UNUSABLE as error:
        if out_of_memory(error):
            raise
        reason = f"no {error} is said" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"--weights {source}: photos cannot be prepared for it ({reason})") from None
    return framing


def seen_part(width, height, provenance):
    """[left, top, width, height] of what an encoder saw of a photo, in shares of the photo.

    `provenance`: what the feature file says of it. All of the photo, unless the centre was cropped;
    with --fit pad the last places may end behind the photo.
    """
    if provenance.get("fit") == "pad":
        side, places = provenance["img_size"], provenance["places"]
        lengths = padded_size(width, height, side)
        ends = [math.ceil(Fraction(length * places, side)) * side / places for length in lengths]
        return [0, 0, *(round(end / length, 4) for end, length in zip(ends, lengths, strict=True))]
    resizing = provenance.get("resizing", "")
    config = json.loads(resizing) if resizing.startswith("{") else {}
    if not config.get("do_center_crop"):
        return [0, 0, 1, 1]
    size, crop = config["size"], config["crop_size"]
    if short := size.get("shortest_edge"):
        scaled = width * short / min(width, height), height * short / min(width, height)
    else:
        scaled = size["width"], size["height"]
    across, down = crop["width"] / scaled[0], crop["height"] / scaled[1]
    return [round(share, 4) for share in ((1 - across) / 2, (1 - down) / 2, across, down)]
