"""The options of train.py: their defaults, and what presets, another run's config.json and the user set.

    args = parse_args(["--fusion", "film", "--seed", "1"])
    args.run_dir     # runs/twitter2017-roberta-resnet50-film-s1
"""

import argparse
import shlex
from pathlib import Path

from align import ALIGNMENTS
from fusion import FUSIONS
from parts.console import Defaults, bounded, dataset_name
from parts.datasets import DATASETS, data_task, locate
from parts.model import TextRegions
from parts.notes import EXTRAS
from parts.processes import default_device, pick_precision
from parts.run_files import check_known, read_config_file
from parts.systems import PRESETS, SYSTEMS, fusion_of, mistake, run_name
from parts.words import RULES

ENOUGH = 300  # posts of valid: of 100, chance alone moves a share of .5 by .05, and so the choice of an epoch

# What --config never takes from another run: where and how that one was written; code is the user's to name.
OF_ONE_RUN = {"run_dir", "overwrite", "resume", "device", "track", "config"}


def alignment(text):
    """argparse type: NAME=WEIGHT of an alignment loss, or none, to take those of a --system away."""
    name, _, weight = text.partition("=")
    if text == "none":
        return text, 0.0
    if name not in ALIGNMENTS:
        raise argparse.ArgumentTypeError(f"{text}: NAME is one of {', '.join(ALIGNMENTS)}")
    return name, bounded(float, 0)(weight)


def make_parser(description=None, **more):
    parser = argparse.ArgumentParser(usage="%(prog)s [--option value ...]", description=description,
                                     formatter_class=Defaults, **more)  # fmt: skip
    add_model(parser)
    add_training(parser)
    return parser


# fmt: off
def add_model(parser):
    """The options that say what is trained, and on what."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--dataset", type=dataset_name, default="twitter2017",
        help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--system", choices=PRESETS,
        help="a published system: sets the flags it is made of, those given excepted")
    add("--model", choices=SYSTEMS, help="text encoder and features of the photos (README.md has a table);"
        " default: roberta-resnet50 for named entities, bert-resnet50 for relations")
    add("--text-encoder", help="hub name or local folder; default: the model's own")
    add("--max-len", type=bounded(int, 1),
        help="sub-tokens a post, special ones included; default: 128, 40 for vilt")
    add("--decoder", choices=("softmax", "crf", "visual-crf"), default="softmax", help="what decides on the"
        " labels of a post's words: each by itself, all together (crf.py), or all and the photo (stages.py)")
    add("--pooling", choices=("start", "mean"), default="mean", help="relations: the head reads the two"
        " start markers, or the mean state of each entity and of the post")
    add("--word-rule", choices=("auto", *RULES), default="auto", help="how predict.py cuts a text into words"
        " (docs/DATA.md); auto: as train's words are cut")
    add("--train-share", type=bounded(float, 1e-9, 1), default=1.0,
        help="train on this share of its posts, drawn with --seed")
    add("--init", metavar="RUN", help="start from the weights of a finished run, with the same labels and"
        " text encoder; default: from the published text encoder")
    add("--config", metavar="FILE", help="a run's config.json: its settings are the defaults, and flags that"
        " are given win")

    add = parser.add_argument_group("the photo").add_argument
    add("--fusion", choices=FUSIONS, help="none = text only; prefix: soft tokens of the photo"
        " that the text encoder reads; default: film. blip and vilt bring their own")
    add("--heads", type=bounded(int, 1),
        help=f"of {', '.join(name for name, layer in FUSIONS.items() if layer.has_heads)} and --bottleneck;"
        " default: 8")
    add("--photo-dropout", type=bounded(float, 0, 1), default=0.1,
        help="share of training posts shown no photo")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="train on all views of a photo")
    add("--standardise", action=argparse.BooleanOptionalAction, default=True, help="regions by the mean and"
        " deviation of train's photos, channel by channel; what it brought: docs/PHOTO.md")
    add("--shuffle-photos", action="store_true", help="show each post another's photo, the same one always:"
        " the control that tells what the photos are worth")
    add("--align", type=alignment, nargs="+", default=[], metavar="NAME=WEIGHT", help="losses beside the"
        " labels' that pull text and photo of a post together (align.py): contrastive, local, matching, and,"
        " by the relevance in --notes, supervised; or none; default: none")
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


def add_training(parser):
    """The options that say how it is trained, and where things are."""
    add = parser.add_argument_group("how it is trained").add_argument
    add("--seed", type=bounded(int, 0, 2**32), default=1337, help="of all that is drawn")
    add("--epochs", type=bounded(int, 1), default=5, help="how often train is gone through")
    add("--keep", choices=("auto", "best", "last"), default="auto", help="the weights of the best epoch on"
        f" valid or of the last; auto: the best, if valid has {ENOUGH} posts to tell it by")
    add("--batch-size", type=bounded(int, 1), default=8, help="posts a step, over all processes")
    add("--eval-batch-size", type=bounded(int, 1), default=12, help="posts scored together")
    add("--lr", type=bounded(float, 0), default=3e-5, help="of the pretrained text encoder")
    add("--fusion-lr", type=bounded(float, 0), default=1.1e-3,
        help="of what starts from scratch: fusion, head")
    add("--weight-decay", type=bounded(float, 0), default=0.01, help="of AdamW; none of biases and norms")
    add("--warmup-ratio", type=bounded(float, 0, 1), default=0.1,
        help="share of the steps, then linear decay to 0")
    add("--max-grad-norm", type=bounded(float, 1e-9), default=1.0, help="of gradients, clipped; inf = never")
    add("--dropout", type=bounded(float, 0, 1), default=0.1, help="in the text encoder, fusion and head")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on NVIDIA's GPUs from Ampere on, float32 elsewhere, on Apple's mps too")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps ...")

    add = parser.add_argument_group("where things are").add_argument
    add("--data-dir", default="data", help="parent folder of the public data sets (docs/DATA.md)")
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
        " more when an epoch's steps are done")
    add("--track", metavar="MODULE", help="send losses, rates and scores to a module with init, log and"
        " finish, as wandb, trackio and swanlab have them")
# fmt: on


def stored_settings(path, flags):
    """{option: value} of the run whose config.json lies at `path`; not of the `flags` that are typed.

    What was left to a default then is left to it again. Each value has to be one that may be typed.
    ValueError or FileNotFoundError if the file is none of a run, or a value is none of its option.
    """
    config = read_config_file(path)
    check_known(config, path)
    system, dataset = SYSTEMS[config["model"]], Path(config["dataset"]).name
    features = f"{config['cache_dir']}/{dataset}-{system.backbone}-{config['img_size']}.h5"
    usual = {
        "text_encoder": system.text_encoder, "max_len": system.max_len, "img_size": system.img_size,
        "features": features, "heads": 8, "relevance_loss": 0.5,
        "precision": pick_precision("auto", default_device()),
    }  # fmt: skip
    left_out = OF_ONE_RUN | flags | {key for key, value in usual.items() if config[key] == value}
    if config["word_rule_auto"]:
        left_out.add("word_rule")
    if "img_size" in flags:  # either of them tells which feature file
        left_out.add("features")
    elif "features" in flags or "features" not in left_out:
        left_out.add("img_size")
    parser, words = make_parser(exit_on_error=False), flags_of(config, left_out)
    try:
        settings = vars(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"--config {path}: {error}; correct it, or give that option") from None
    return {key: settings[key] for key in settings.keys() & config.keys() - left_out}


def flags_of(config, left_out=()):
    """The options of a configuration as they are typed, but for those left out."""
    words = []
    for key in vars(make_parser().parse_args([])):
        if key not in config or key in left_out:
            continue
        flag, value = f"--{key.replace('_', '-')}", config[key]
        if key == "align":
            words += [flag, *(f"{name}={weight}" for name, weight in value.items())] if value else []
        elif value is True:
            words.append(flag)
        elif value is False:
            words += [f"--no-{key}"] if key in ("augment", "standardise") else []
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def command_of(path):
    """The command that trains the run whose config.json lies at `path` again."""
    settings, defaults = stored_settings(path, set()), vars(make_parser().parse_args([]))
    config = {key: value for key, value in read_config_file(path).items() if key in settings}
    usual = {key for key, value in settings.items() if value == defaults[key]}
    return shlex.join(["python", "train.py", *flags_of(config, usual)])


def parse_args(argv, description=None):
    """The arguments of train.py, defaults filled in; exits with one line if some do not fit.

    What is given wins over what a --system sets, and that over what a --config has.
    """
    parser = make_parser(description)
    args, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    if args.config:
        absent = object()
        namespace = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent)))
        flags = {key for key, value in vars(namespace).items() if value is not absent}
        parser.set_defaults(**stored_settings(args.config, flags))
    parser.set_defaults(**PRESETS.get(args.system, {}))
    args = parser.parse_args(argv)
    task, (dataset, _) = data_task(args.dataset, args.data_dir), locate(args.dataset, args.data_dir)
    args.model = args.model or ("roberta-resnet50" if task == "ner" else "bert-resnet50")
    system = SYSTEMS[args.model]
    regions = issubclass(system.model, TextRegions)
    if regions:
        args.fusion = args.fusion or "film"
    count = len(args.align)
    args.align = dict(args.align)
    if len(args.align) < count:
        parser.error("--align: one loss is named twice; leave one out")
    args.align = {name: weight for name, weight in args.align.items() if weight}
    for option in unread_options(args):
        reader = f"--fusion {args.fusion}" if args.fusion else args.model
        print(f"--{option}: {reader} does not read it")
        setattr(args, option, None)
    if message := mistake(args, task, system, regions):
        parser.error(message)
    args.heads = args.heads or 8
    args.relevance_loss = 0.5 if args.relevance_loss is None else args.relevance_loss
    args.img_size, args.max_len = args.img_size or system.img_size, args.max_len or system.max_len
    args.text_encoder = args.text_encoder or system.text_encoder
    args.features = args.features or f"{args.cache_dir}/{dataset}-{system.backbone}-{args.img_size}.h5"
    defaults |= PRESETS.get(args.system, {})
    defaults |= {"heads": 8, "img_size": system.img_size, "max_len": system.max_len}
    args.run_dir = args.run_dir or f"runs/{run_name(args, defaults, dataset, system)}"
    return args


def unread_options(args):
    """Options that are given and that the fusion does not read: people keep them in a loop over fusions."""
    options = ["images", "features"] if args.fusion == "none" else []
    if not fusion_of(args.fusion).has_heads and not args.bottleneck:
        options.append("heads")
    return [option for option in options if getattr(args, option) is not None]
