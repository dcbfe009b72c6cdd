"""The arguments of train.py: what they mean, which go together, which published systems are a set of them."""

import argparse
from pathlib import Path

from align import ALIGNMENTS
from data import DATASETS, data_task, locate
from fusion import FUSIONS
from parts.console import bounded, dataset_name, default_device
from parts.model import SYSTEMS, WORDED, TextRegions
from parts.notes import EXTRAS, reads_relevance

# In the manner of these papers, of which no code can be run: benchmarks/RESULTS.md says what is known of
# each. A flag that is given wins.
PRESETS = {
    "minige": {  # Kong, Liu et al., Neural Networks 2025
        "model": "bert-resnet50", "fusion": "saliency", "bottleneck": 0.1, "align": {"matching": 0.9},
        "decoder": "crf",
    },
    "tia": {  # Zeng et al., Neurocomputing 2025
        "model": "bert-resnet50", "fusion": "cross-attention", "extra": "post", "relevance": "given",
        "align": {"supervised": 0.1}, "decoder": "crf",
    },
    "icka": {  # Zeng et al., Expert Systems with Applications 2024
        "model": "bert-resnet50", "fusion": "prefix", "extra": "photo", "align": {"contrastive": 0.1},
        "decoder": "crf",
    },
    "coatt": {  # co-attention of Zhang et al., AAAI 2018, over the phrases of a scene graph
        "model": "bert-phrases", "fusion": "co-attention", "relevance": "predicted",
        "align": {"contrastive": 0.1}, "decoder": "crf",
    },
    "dha": {  # Wang et al., Applied Sciences 2025
        "model": "bert-resnet50", "fusion": "pyramid", "align": {"contrastive": 0.1, "local": 0.1},
        "decoder": "visual-crf", "batch_size": 16,
    },
}  # fmt: skip


# What people sweep over, and how a run's name calls it.
SWEPT = {
    "epochs": "epochs", "batch_size": "batch", "lr": "lr", "fusion_lr": "fusion-lr", "dropout": "dropout",
    "weight_decay": "decay", "warmup_ratio": "warmup", "max_grad_norm": "norm", "heads": "heads",
    "photo_dropout": "photo-dropout", "img_size": "img", "max_len": "len", "extra_len": "extra-len",
}  # fmt: skip


def alignment(text):
    """argparse type: NAME=WEIGHT of an alignment loss, or none, to take those of a --system away."""
    name, _, weight = text.partition("=")
    if text == "none":
        return text, 0.0
    if name not in ALIGNMENTS:
        raise argparse.ArgumentTypeError(f"{text}: NAME is one of {', '.join(ALIGNMENTS)}")
    return name, bounded(float, 0)(weight)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults there are; "None" would be none."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def make_parser(description):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]", description=description, formatter_class=Defaults
    )
    # fmt: off
    add = parser.add_argument_group("what is trained").add_argument
    add("--dataset", type=dataset_name, default="twitter2017",
        help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--system", choices=PRESETS,
        help="a published system: sets the flags it is made of, those given excepted")
    add("--model", choices=SYSTEMS,
        help="default: roberta-resnet50 for named entities, bert-resnet50 for relations")
    add("--text-encoder", help="hub name or local folder; default: the model's own")
    add("--max-len", type=bounded(int, 1),
        help="sub-tokens a post, special ones included; default: 128, 40 for vilt")
    add("--decoder", choices=("softmax", "crf", "visual-crf"), default="softmax", help="what decides on the"
        " labels of a post's words: each by itself, all together (crf.py), or all and the photo (stages.py)")
    add("--train-share", type=bounded(float, 1e-9, 1), default=1.0,
        help="train on this share of its posts, drawn with --seed")

    add = parser.add_argument_group("the photo").add_argument
    add("--fusion", choices=[*FUSIONS, "prefix"], help="none = text only; prefix: soft tokens of the photo"
        " that the text encoder reads; default: film. blip and vilt bring their own")
    add("--heads", type=bounded(int, 1),
        help="of cross-attention, bimodal, pyramid, prefix and --bottleneck; default: 8")
    add("--photo-dropout", type=bounded(float, 0, 1), default=0.1,
        help="share of training posts shown no photo")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="train on all views of a photo")
    add("--shuffle-photos", action="store_true", help="show each post another's photo, the same one always:"
        " the control that tells what the photos are worth")
    add("--align", type=alignment, nargs="+", default=[], metavar="NAME=WEIGHT", help="losses beside the"
        " labels' that pull text and photo of a post together (align.py): contrastive, local, matching, and,"
        " by the relevance in --notes, supervised; or none")
    add("--relevance", choices=("none", "given", "predicted"), default="none", help="give a post the fusion"
        " as far as its photo belongs to it: by --notes, where they say, or always as the model sees it")
    add("--relevance-loss", type=bounded(float, 0),
        help="weight of the loss that teaches the model the relevance in --notes; default: 0.5")
    add("--bottleneck", type=bounded(float, 0), default=0.0, metavar="WEIGHT", help="a noisy code of text and"
        " photo in place of both, before --align and --fusion (stages.py); what it says of them is a loss of"
        " this weight; 0 = none")
    add("--generated", metavar="FEATURES",
        help="feature file of second pictures, generated from the texts; for --fusion saliency")

    add = parser.add_argument_group("what others say of a post").add_argument
    add("--notes", help="JSON lines of what others said of each post (notes.py, write_notes.py)")
    add("--extra", choices=EXTRAS, default="none", help="what of --notes the text encoder reads after the"
        " post: what was said of the post, of the photo, or both")
    add("--extra-len", type=bounded(int, 1), default=128, help="sub-tokens of that, at most")
    add("--shuffle-notes", action="store_true", help="give each post what was said of another: the control"
        " that tells what --extra post is worth")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--seed", type=bounded(int, 0, 2**32), default=1337)
    add("--epochs", type=bounded(int, 1), default=5)
    add("--batch-size", type=bounded(int, 1), default=8, help="posts a step, over all processes")
    add("--eval-batch-size", type=bounded(int, 1), default=12)
    add("--lr", type=bounded(float, 0), default=3e-5, help="of the pretrained text encoder")
    add("--fusion-lr", type=bounded(float, 0), default=1.1e-3,
        help="of what starts from scratch: fusion, head")
    add("--weight-decay", type=bounded(float, 0), default=0.01)
    add("--warmup-ratio", type=bounded(float, 0, 1), default=0.1,
        help="share of the steps, then linear decay to 0")
    add("--max-grad-norm", type=bounded(float, 1e-9), default=1.0, help="of gradients, clipped; inf = never")
    add("--dropout", type=bounded(float, 0, 1), default=0.1)
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on NVIDIA's GPUs from Ampere on, float32 elsewhere, on Apple's mps too")
    add("--device", default=default_device())

    add = parser.add_argument_group("where things are").add_argument
    add("--data-dir", default="data")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir: they are"
        " compared, by name and size, with those the features were made of")
    add("--cache-dir", default="features", help="where feature files are")
    add("--img-size", type=bounded(int, 1), help="which feature file: the size its photos were resized to;"
        " default: 224, 384 for blip and vilt")
    add("--features", help="feature file, where it is not the usual one in --cache-dir")
    add("--run-dir", help="default: runs/<dataset>-<system>[-<encoder>][...]-s<seed>, or, without --system or"
        " with flags of its own changed, runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>")
    add("--overwrite", action="store_true", help="put the new run in the place of the one in the run folder,"
        " when its first epoch is over; files of your own there stay")
    add("--resume", action="store_true",
        help="go on with the run in the run folder where it was stopped, if it was")
    add("--save-every", type=bounded(float, 0), default=600,
        help="seconds from one state to resume from to the next; the first comes after a minute, and one"
        " more at each epoch's end")
    # fmt: on
    return parser


def parse_args(argv, description=None):
    """The arguments of train.py, defaults and presets filled in; exits with one line if some do not fit."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.system:
        parser.set_defaults(**PRESETS[args.system])
        args = parser.parse_args(argv)
    task, (dataset, _) = data_task(args.dataset, args.data_dir), locate(args.dataset, args.data_dir)
    args.model = args.model or ("roberta-resnet50" if task == "ner" else "bert-resnet50")
    system = SYSTEMS[args.model]
    regions = issubclass(system.model, TextRegions)
    if regions:
        args.fusion = args.fusion or "film"
    args.align, asked = dict(args.align), len(args.align)
    if len(args.align) < asked:
        parser.error("--align: one loss is named twice; leave one out")
    args.align = {name: weight for name, weight in args.align.items() if weight}
    if wrong := mistake(args, task, system, regions):
        parser.error(wrong)
    args.heads = args.heads or 8
    args.relevance_loss = 0.5 if args.relevance_loss is None else args.relevance_loss
    args.img_size, args.max_len = args.img_size or system.img_size, args.max_len or system.max_len
    args.text_encoder = args.text_encoder or system.text_encoder
    args.features = args.features or f"{args.cache_dir}/{dataset}-{system.backbone}-{args.img_size}.h5"
    defaults = vars(parser.parse_args([])) | {"heads": 8, "img_size": system.img_size, "max_len": system.max_len}
    args.run_dir = args.run_dir or f"runs/{run_name(args, defaults, dataset, system)}"
    return args


def mistake(args, task, system, regions):
    """What of the arguments does not go together, in one line, or "".

    `regions`: whether the model reads cached regions through a fusion to choose.
    """
    named = f"--fusion {args.fusion}" if args.fusion else args.model
    if args.system and task != "ner" and args.decoder != "softmax":
        return f"--system {args.system}: it labels words; for relations add --decoder softmax"
    if args.fusion and not regions:
        return f"{named}: {args.model} has a fusion of its own and no other; leave it out"
    headless = args.fusion in (None, "none", "film", "attention", "co-attention", "saliency")
    if args.heads and headless and not args.bottleneck:
        return f"--heads: {args.fusion or args.model} has none to choose; leave it out"
    if args.img_size and args.features:
        return "--img-size and --features: either tells which feature file; leave one out"
    if args.fusion == "none" and (args.images or args.features):
        return "--images and --features: --fusion none is shown no photo; leave them out"
    if args.images and system.backbone in WORDED:
        said = "captions" if system.backbone == "caption" else "phrases"
        return f"--images: {args.model} reads {said}, no photo; leave it out"
    if args.shuffle_photos and args.fusion == args.extra == "none":
        return "--shuffle-photos: --fusion none is shown no photo; leave one of them out"
    if args.decoder != "softmax" and task != "ner":
        said = "labels of words are decoded together, a relation is one label"
        return f"--decoder {args.decoder}: {said}; leave it out"
    if args.decoder == "visual-crf" and (not regions or args.fusion == "none"):
        return f"--decoder visual-crf: {named} has no cached regions to look at; take --decoder crf"
    if args.align and (not regions or args.fusion == "none"):
        return f"--align: {named} has no cached regions to align; leave it out, or --align none"
    if args.bottleneck and args.fusion in (None, "none", "prefix"):
        return f"--bottleneck: {named} takes no codes of regions; leave it out"
    readers = [name for name, layer in FUSIONS.items() if "generated" in layer.reads]
    if args.generated and args.fusion not in readers:
        choice = f"choose --fusion {' or '.join(readers)}, or leave it out"
        return f"--generated: {named} reads no second picture; {choice}"
    if args.relevance != "none" and args.generated:
        said = "it says how much of the photo is used, not of a second picture"
        return f"--relevance and --generated: {said}; leave one out"
    if args.relevance != "none" and args.fusion in (None, "none", "prefix"):
        return f"--relevance: {named} has no layer behind the encoder to weigh; leave it out"
    if args.relevance_loss is not None and (args.relevance == "none" or args.notes is None):
        return "--relevance-loss: it teaches what --notes give; add --notes FILE --relevance given"
    needs = [f"--extra {args.extra}"] * (args.extra != "none")
    needs += ["--relevance given"] * (args.relevance == "given")
    needs += ["--align supervised"] * ("supervised" in args.align)
    if needs and args.notes is None:
        made = f"write_notes.py --dataset {args.dataset} makes one"
        return f"{' and '.join(needs)}: taken from notes; add --notes FILE ({made})"
    if args.notes is not None and args.extra == "none" and not reads_relevance(vars(args)):
        return "--notes: nothing reads them; add --extra post, --relevance given or --align supervised=0.1"
    if args.shuffle_notes and args.extra not in ("post", "both"):
        return "--shuffle-notes: it gives posts others' notes on the post; add --notes FILE --extra post"
    if args.extra != "none" and system.checkpoint:
        full = "has no room for it, 40 sub-tokens in all"
        why = full if system.checkpoint == "vilt" else "would show each word of it the photo"
        return f"--extra {args.extra}: {args.model} {why}; choose another --model"
    if args.resume and args.overwrite:
        return "--resume and --overwrite: one goes on with a run, the other begins it anew; leave one out"
    return ""


def run_name(args, defaults, dataset, system):
    """The run folder's name: model, encoder, fusion, and what else differs from the defaults.

    A published system's name stands for all that it sets, where that is as it sets it.
    """
    usual = args.text_encoder == system.text_encoder
    taught = ["notes"] * (args.relevance == "predicted" and args.notes is not None)
    taught += [f"loss{args.relevance_loss:g}"] * (args.relevance_loss != 0.5)
    parts = {
        "model": args.model,
        "text_encoder": "" if usual else Path(args.text_encoder).absolute().name,
        "fusion": args.fusion or "",
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
        "augment": "" if args.augment else "no-augment",
        "precision": args.precision if args.precision != "auto" else "",
        "shuffle_photos": "shuffled" if args.shuffle_photos else "",
        "shuffle_notes": "shuffled-notes" if args.shuffle_notes else "",
    }  # fmt: skip
    preset = PRESETS.get(args.system, {})
    if preset and all(getattr(args, key) == value for key, value in preset.items()):
        parts = {"system": args.system} | {key: part for key, part in parts.items() if key not in preset}
    return "-".join(filter(None, [dataset, *parts.values(), f"s{args.seed}"]))
