"""The tables of systems and of published ones, which arguments of train.py contradict, a run's name.

A system is one row of `SYSTEMS`: the text encoder it starts from, the backbone whose features it reads, its
class.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from features import ELSEWHERE
from fusion import FUSIONS, Fusion
from parts.blip_vilt import Blip, Vilt
from parts.model import TextRegions
from parts.notes import reads_relevance
from parts.photos import VISION, WORDED


@dataclass(frozen=True)
class System:
    text_encoder: str  # default of --text-encoder
    backbone: str  # of extract_features.py; "auto" = any vision encoder's
    img_size: int  # of its feature file, by default: pixels, sub-tokens of a caption, or phrases of a photo
    model: type
    max_len: int = 128  # sub-tokens a post, by default
    checkpoint: str = ""  # the model type its text encoder is a part of; "" = any plain text encoder


SYSTEMS = {
    "roberta-resnet50": System("roberta-base", "resnet50", 224, TextRegions),
    "bert-resnet50": System("bert-base-uncased", "resnet50", 224, TextRegions),
    "roberta-vision": System("roberta-base", "auto", 224, TextRegions),
    "bert-vision": System("bert-base-uncased", "auto", 224, TextRegions),
    "clip-bert": System("bert-base-uncased", "clip", 224, TextRegions),
    "blip": System("Salesforce/blip-itm-base-coco", "blip", 384, Blip, checkpoint="blip"),
    "roberta-caption": System("roberta-base", "caption", 64, TextRegions),
    "bert-caption": System("bert-base-uncased", "caption", 64, TextRegions),
    "roberta-phrases": System("roberta-base", "phrases", 32, TextRegions),
    "bert-phrases": System("bert-base-uncased", "phrases", 32, TextRegions),
    "vilt": System("dandelin/vilt-b32-mlm", "pixels", 384, Vilt, 40, checkpoint="vilt"),
}


def backbones_of(system):
    """The backbones whose feature files a system reads."""
    return (*VISION, ELSEWHERE) if system.backbone == "auto" else (system.backbone,)


# In the manner of these papers, of which no code can be run: benchmarks/RESULTS.md says what is known of
# each. A flag that is given wins.
PRESETS = {  # all read regions as they are: the papers do not standardise them
    "minige": {  # Kong, Liu et al., Neural Networks 2025
        "model": "bert-resnet50", "fusion": "saliency", "bottleneck": 0.1, "align": {"matching": 0.9},
        "decoder": "crf", "standardise": False,
    },
    "tia": {  # Zeng et al., Neurocomputing 2025
        "model": "bert-resnet50", "fusion": "cross-attention", "extra": "post", "relevance": "given",
        "align": {"supervised": 0.1}, "decoder": "crf", "standardise": False,
    },
    "icka": {  # Zeng et al., Expert Systems with Applications 2024
        "model": "bert-resnet50", "fusion": "prefix", "extra": "photo", "align": {"contrastive": 0.1},
        "decoder": "crf", "standardise": False,
    },
    "coatt": {  # co-attention of Zhang et al., AAAI 2018, over the phrases of a scene graph
        "model": "bert-phrases", "fusion": "co-attention", "relevance": "predicted",
        "align": {"contrastive": 0.1}, "decoder": "crf", "standardise": False,
    },
    "dha": {  # Wang et al., Applied Sciences 2025
        "model": "bert-resnet50", "fusion": "pyramid", "align": {"contrastive": 0.1, "local": 0.1},
        "decoder": "visual-crf", "batch_size": 16, "standardise": False,
    },
}  # fmt: skip


# What people sweep over, and how a run's name calls it.
SWEPT = {
    "epochs": "epochs", "batch_size": "batch", "lr": "lr", "fusion_lr": "fusion-lr", "dropout": "dropout",
    "weight_decay": "decay", "warmup_ratio": "warmup", "max_grad_norm": "norm", "heads": "heads",
    "photo_dropout": "photo-dropout", "img_size": "img", "max_len": "len", "extra_len": "extra-len",
}  # fmt: skip


def fusion_of(name):
    """The class of a --fusion; for None, of blip and vilt, `Fusion` itself, which takes and gives nothing."""
    return FUSIONS.get(name, Fusion)


def mistake(args, task, system, regions):
    """What of the arguments does not go together, in one line, or "".

    `regions`: whether the model reads cached regions through a fusion to choose.
    """
    reader = f"--fusion {args.fusion}" if args.fusion else args.model
    if args.system and task != "ner" and args.decoder != "softmax":
        return f"--system {args.system}: it labels words; for relations add --decoder softmax"
    if args.fusion and not regions:
        return f"{reader}: {args.model} has a fusion of its own and no other; leave it out"
    layer = fusion_of(args.fusion)
    behind = args.fusion not in (None, "none") and not layer.soft_tokens
    if args.img_size and args.features:
        return "--img-size and --features: either tells which feature file; leave one out"
    if system.backbone == "auto" and args.fusion != "none" and not args.features:
        maker = "extract_features.py --backbone auto --weights ENCODER makes it, or write_features"
        return f"--model {args.model}: name its feature file with --features ({maker})"
    if args.images and system.backbone in WORDED:
        kind = "captions" if system.backbone == "caption" else "phrases"
        return f"--images: {args.model} reads {kind}, no photo; leave it out"
    if args.shuffle_photos and args.fusion == args.extra == "none":
        return "--shuffle-photos: --fusion none is shown no photo; leave one of them out"
    if args.decoder != "softmax" and task != "ner":
        reason = "labels of words are decoded together, a relation is one label"
        return f"--decoder {args.decoder}: {reason}; leave it out"
    if args.decoder == "visual-crf" and (not regions or args.fusion == "none"):
        return f"--decoder visual-crf: {reader} has no cached regions to look at; take --decoder crf"
    if args.align and (not regions or args.fusion == "none"):
        return f"--align: {reader} has no cached regions to align; leave it out, or --align none"
    if args.bottleneck and not behind:
        return f"--bottleneck: {reader} takes no codes of regions; leave it out"
    if args.generated and "generated" not in layer.reads:
        fusions = [name for name, row in FUSIONS.items() if "generated" in row.reads]
        choice = f"choose --fusion {' or '.join(fusions)}, or leave it out"
        return f"--generated: {reader} reads no second picture; {choice}"
    if args.relevance != "none" and args.generated:
        reason = "relevance says how much of the photo is used, not of a second picture"
        return f"--relevance and --generated: {reason}; leave one out"
    if args.relevance != "none" and not behind:
        return f"--relevance: {reader} has no layer behind the encoder to weigh; leave it out"
    if args.relevance_loss is not None and (args.relevance == "none" or args.notes is None):
        return "--relevance-loss: it teaches what --notes give; add --notes FILE --relevance given"
    readers = {f"--extra {args.extra}": args.extra != "none", "--relevance given": args.relevance == "given",
               "--align supervised": "supervised" in args.align}  # fmt: skip
    if any(readers.values()) and args.notes is None:
        flags, maker = " and ".join(filter(readers.get, readers)), f"write_notes.py --dataset {args.dataset}"
        return f"{flags}: taken from notes; add --notes FILE ({maker} makes one)"
    if args.notes is not None and args.extra == "none" and not reads_relevance(vars(args)):
        return "--notes: nothing reads them; add --extra post, --relevance given or --align supervised=0.1"
    if args.shuffle_notes and args.extra not in ("post", "both"):
        return "--shuffle-notes: it gives posts others' notes on the post; add --notes FILE --extra post"
    if args.extra != "none" and system.checkpoint:
        reason = "would show each word of it the photo"
        if system.checkpoint == "vilt":
            reason = "has no room for it, 40 sub-tokens in all"
        return f"--extra {args.extra}: {args.model} {reason}; choose another --model"
    if args.resume and args.overwrite:
        return "--resume and --overwrite: one goes on with a run, the other begins it anew; leave one out"
    return ""


def system_name(run_dir):
    """The name of a run without its seed."""
    return re.sub(r"-s\d+$", "", Path(run_dir).absolute().name)


def run_name(args, defaults, dataset, system):
    """The run folder's name: model, encoder, fusion, and what else differs from the defaults.

    A published system's name stands for all that it sets, where that is as it sets it.
    """
    usual = args.text_encoder == system.text_encoder
    # A feature file's name says which vision encoder, and whether it is of boxes.
    features, vision = Path(args.features).stem, system.backbone == "auto" and args.fusion != "none"
    taught = ["notes"] if args.relevance == "predicted" and args.notes is not None else []
    if args.relevance_loss != 0.5:
        taught.append(f"loss{args.relevance_loss:g}")
    parts = {
        "model": args.model,
        "features": features.removeprefix(f"{dataset}-") if vision else "",
        "boxes": "boxes" if features.endswith("-boxes") and args.fusion != "none" and not vision else "",
        "text_encoder": "" if usual else Path(args.text_encoder).absolute().name,
        "fusion": args.fusion or "",
        "pooling": args.pooling if args.pooling != defaults["pooling"] else "",
        "word_rule": f"words-{args.word_rule}" if args.word_rule != "auto" else "",
        "init": f"from-{system_name(args.init)}" if args.init else "",
        "train_share": f"train{args.train_share:g}" if args.train_share < 1 else "",
        "align": "-".join(f"{name}{weight:g}" for name, weight in args.align.items()),
        "bottleneck": f"bottleneck{args.bottleneck:g}" if args.bottleneck else "",
        "generated": "generated" if args.generated else "",
        "relevance": f"relevance-{args.relevance}" if args.relevance != "none" else "",
        "relevance_loss": "-".join(taught),
        "decoder": args.decoder if args.decoder != "softmax" else "",
        "extra": f"extra-{args.extra}" if args.extra != "none" else "",
        **{key: f"{name}{getattr(args, key):g}" for key, name in SWEPT.items()
           if getattr(args, key) != defaults[key]},
        "keep": args.keep if args.keep != "auto" else "",
        "augment": "" if args.augment else "no-augment",
        "precision": args.precision if args.precision != "auto" else "",
        "standardise": "" if args.standardise or args.fusion in (None, "none") else "raw",
        "shuffle_photos": "shuffled" if args.shuffle_photos else "",
        "shuffle_notes": "shuffled-notes" if args.shuffle_notes else "",
    }  # fmt: skip
    preset = PRESETS.get(args.system, {})
    if preset and all(getattr(args, key) == value for key, value in preset.items()):
        parts = {"system": args.system} | {key: part for key, part in parts.items() if key not in preset}
    return "-".join(filter(None, [dataset, *parts.values(), f"s{args.seed}"]))
