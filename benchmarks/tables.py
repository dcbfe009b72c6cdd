"""Run the rows of the reference tables and write what came out beside what was published.

    python benchmarks/tables.py --dry-run                   # the commands, row by row
    python benchmarks/tables.py --only fusion/              # all rows of the first table, three seeds each
    python benchmarks/tables.py --only systems/ --text-encoder models/mine --lr 1e-4

Run it where data/, features/ and runs/ are. A finished run is not run again, so a table that was stopped goes
on where it stopped. All tables are written each time, from all runs there are: RESULTS.md, results.csv and
results.tex. A row that results.csv has of more seeds than there are runs here stays as it is there: runs may
be deleted, or lie on another machine.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import train  # noqa: E402
from features import FeatureCache  # noqa: E402
from parts.checks import paired_bootstrap  # noqa: E402
from parts.console import command_line  # noqa: E402
from parts.datasets import DATASETS, load_dataset  # noqa: E402
from parts.files import write_text  # noqa: E402
from parts.run_files import predictions_file, read_config  # noqa: E402
from parts.runs import RUN_FORMAT, differing, system_settings  # noqa: E402
from parts.scores import main_score, read_predictions  # noqa: E402

PLACES = {"--data-dir": "data", "--cache-dir": "features"}  # the defaults of train.py too
DRAWN = ("demo", "demo-notes")  # tables of tiny models of their own: --text-encoder and --lr are not for them
NOTES_FILE = "twitter2017/notes.jsonl"  # under --data-dir
METRICS = ("accuracy", "precision", "recall", "f1")
# Accuracy on test of answering the most frequent label always: `O`, or `None`.
MAJORITY = {"twitter2015": 0.8461, "twitter2017": 0.8020, "mnre": 0.6035}
FUSION = {  # accuracy
    "film": {"twitter2015": 0.9538, "twitter2017": 0.9718, "mnre": 0.7538},
    "attention": {"twitter2015": 0.8461, "twitter2017": 0.8739, "mnre": 0.7053},
    "cross-attention": {"twitter2015": 0.8934, "twitter2017": 0.9145, "mnre": 0.7386},
    "bimodal": {"twitter2015": 0.9528, "twitter2017": 0.9698, "mnre": 0.7462},
}
SETTINGS = {  # (epochs, batch size, learning rate, image size): accuracy, precision, recall, F1
    (5, 12, 0.0011, 224): {
        "twitter2015": (0.9538, 0.9540, 0.9538, 0.9538), "twitter2017": (0.9733, 0.9738, 0.9733, 0.9734),
        "mnre": (0.7501, 0.7553, 0.7422, 0.7487),
    },
    (3, 8, 0.0005, 224): {
        "twitter2015": (0.9487, 0.9523, 0.9502, 0.9512), "twitter2017": (0.9710, 0.9730, 0.9709, 0.9719),
        "mnre": (0.7400, 0.7455, 0.7350, 0.7402),
    },
    (7, 16, 0.0020, 256): {
        "twitter2015": (0.9552, 0.9561, 0.9548, 0.9554), "twitter2017": (0.9756, 0.9760, 0.9754, 0.9757),
        "mnre": (0.7600, 0.7650, 0.7580, 0.7615),
    },
    (10, 10, 0.0010, 224): {
        "twitter2015": (0.9501, 0.9510, 0.9495, 0.9502), "twitter2017": (0.9715, 0.9720, 0.9712, 0.9716),
        "mnre": (0.7450, 0.7480, 0.7400, 0.7440),
    },
}  # fmt: skip
SYSTEMS = {  # accuracy, precision, recall, F1
    "resnet50": {
        "twitter2015": (0.9538, 0.9540, 0.9538, 0.9538), "twitter2017": (0.9733, 0.9738, 0.9733, 0.9734),
        "mnre": (0.7501, 0.7553, 0.7422, 0.7487),
    },
    "clip-bert": {
        "twitter2015": (0.9445, 0.9425, 0.9445, 0.9431), "twitter2017": (0.9639, 0.9641, 0.9639, 0.9639),
        "mnre": (0.7302, 0.7416, 0.7312, 0.7363),
    },
    "blip": {
        "twitter2015": (0.8574, 0.7924, 0.8574, 0.8166), "twitter2017": (0.8935, 0.8552, 0.8935, 0.8732),
        "mnre": (0.6003, 0.6114, 0.6021, 0.6067),
    },
    "vilt": {
        "twitter2015": (0.8632, 0.8318, 0.8632, 0.8260), "twitter2017": (0.8807, 0.8661, 0.8807, 0.8693),
        "mnre": (),
    },
}  # fmt: skip
# train.py --system: what it is after, its entity F1 on Twitter-2015 and Twitter-2017, what of ours is in its
# public sources ("certain") and what is our reading ("inferred"), and what is otherwise in the row of this
# table.
PUBLISHED = {
    "minige": ("MINIGE-MNER (Kong, Liu et al. 2025)", 0.7645, 0.8867,
               "certain: bottleneck, matching, saliency, gates and CRF with their weights (code of an"
               " earlier state); inferred: masks of the bottleneck; ours: a bilinear match, a learned"
               " query, bound .5 for .1, frozen regions; here a caption's tokens as regions and no"
               " generated picture"),
    "tia": ("Text-Image Alignment (Zeng et al. 2025)", 0.7532, 0.8665,
            "certain: a score by a language model sets the share of the photo, key entities join the text,"
            " pairs are contrasted by score; inferred: every formula, the CRF; here a caption's tokens as"
            " regions, scores of a ViLT-like estimator, ChatGPT's entities"),
    "icka": ("ICKA (Zeng et al. 2024)", 0.7542, 0.8712,
             "certain: cross-modal attention, a vision-language model's knowledge, an instruction of both"
             " before the language model; inferred: everything with a shape; here BLIP-2's caption is the"
             " knowledge and its tokens are regions"),
    "coatt": ("CoAtt-NER (2024; no paper of that name found)", 0.7625, 0.8731,
              "certain: adaptive co-attention (Zhang et al. 2018); inferred: that the row means it over a"
              " scene graph, with a similarity as gate; here phrases cut out of captions"),
    "dha": ("Dual-Enhanced Hierarchical Alignment (Wang et al. 2025)", 0.7742, 0.8879,
            "certain: a pyramid of three levels, whole and local contrast, gated levels, a CRF that the"
            " photo constrains; unknown: every equation; here regions of a random ResNet50 of unrelated"
            " photos: only that it trains"),
}  # fmt: skip
TITLES = {
    "fusion": "Fusion layers, accuracy",
    "settings": "Settings: epochs, batch size, learning rate, image size",
    "systems": "Systems",
    "published": "Published systems, entity-level F1",
    "captions": "Captions in place of photos",
    "notes": "What a language model says of the post",
    "base": "The same, with a base-size encoder",
    "few-shot": "The same, with a part of the training posts",
    "relations": "Relations, photos of nothing",
    "demo": "Demo data set",
    "demo-notes": "Demo data set with notes and wrong photos",
}
NOTES = {
    "fusion": "With the defaults of `train.py`.",
    "settings": "The learning rate is `--fusion-lr`, the encoder keeps 3e-5, and the fusion is FiLM, the"
    " best of the first table: all three are our reading, the tables published name one rate and no fusion.",
    "systems": "With the defaults of `train.py`; FiLM, the best of the first table, where a system has a"
    " fusion to choose.",
    "published": "Five published systems, none with code that can be run: `train.py --system` builds each in"
    " the manner of its paper, from what is certain of it and what we infer. The published entity F1 is of"
    " base-size encoders with the real photos on Twitter-2015 / Twitter-2017; ours has all-MiniLM-L6-v2"
    " (22M) and the inputs that the last column names. Not a reproduction.",
    "captions": "The regions of a photo are the token states of its caption under the frozen text encoder"
    " (`extract_features.py --backbone caption`): what a captioner knows of the real photo, with no pixel."
    " The placeholder picture's caption counts as missing. Text encoder all-MiniLM-L6-v2, at the rate chosen"
    " on valid with text only.",
    "notes": "`--notes` are what ChatGPT said of each post (`post`: its list of key entities) and a caption"
    " of its photo (`photo`), a second segment of the text; `both`: one after the other; `post and"
    " captions`: the list as a second segment, the captions as regions of a fusion. No pixel is looked at."
    " What is gained over `post` and stays when others' captions are shown is not the captions' doing: seed"
    " 1337 of `post` is its worst of three."
    " The control of `post` and `both` trains on the lists of other posts, of the others on the captions of"
    " other photos. Whether ChatGPT has seen the data set, nobody here can know.",
    "base": "Text encoder all-mpnet-base-v2 (110M parameters) at the rate of 3e-5, trained and scored in"
    " bfloat16; the CRF is the better decoder on valid with the smaller encoder. No other rate was tried.",
    "few-shot": "The posts are drawn with the run's seed, so a seed's rows share them.",
    "relations": "The features are a random ResNet50's of photos that have nothing to do with the posts:"
    " what a fusion layer adds here is capacity and noise. 3 epochs of batch 16, text encoder"
    " all-MiniLM-L6-v2.",
    "demo": "Posts, photos and captions that `demo.py` draws, tiny models with random weights: what is shown"
    " is that the photo is used where it decides, not how good a system is.",
    "demo-notes": "Posts of `demo.py` where a fifth of the photos are another post's, and the notes know it;"
    " beside a wrong photo a name of several types is of its usual one. Some names are made up for one post"
    " (all mentions unseen in train): its photo tells them, or the notes on it. A tiny model with random"
    " weights: what is shown is what a part is for, not how good a system is. `relevance`: `--relevance"
    " given`; `post`, `photo`: `--extra`. Features: `extract_features.py --dataset demo-notes --img-size 96"
    " --weights random --views 2`, the same with `--images data/demo-notes/generated --cache-dir"
    " features/generated`, and `--backbone phrases --captions data/demo-notes/notes.jsonl --weights"
    " data/demo-notes/encoder`.",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: what was published, if anything, and the flags of train.py that run it."""

    table: str
    name: str
    dataset: str
    flags: tuple = ()
    reference: tuple = ()  # as `METRICS`, or accuracy alone
    control: str = "--shuffle-photos"  # what trains the row's control; "" if there is nothing to shuffle
    over: tuple = ("none",)  # rows it is compared with beside its control, of the same table or as TABLE/NAME

    @property
    def key(self):
        return f"{self.table}/{self.name}/{self.dataset}"


def all_rows():
    """Every row of every table that is run, in the order they are shown."""
    rows, real = [], ("twitter2015", "twitter2017", "mnre")
    for fusion, values in FUSION.items():
        rows += [Row("fusion", fusion, d, ("--fusion", fusion), (values[d],)) for d in real]
    for dataset in real:
        for (epochs, batch, rate, size), values in SETTINGS.items():
            flags = ("--epochs", epochs, "--batch-size", batch, "--fusion-lr", rate, "--img-size", size)
            name = f"{epochs}/{batch}/{rate:.4f}/{size}"
            rows.append(Row("settings", name, dataset, flags, values[dataset]))
    for dataset in real:
        for system, values in SYSTEMS.items():
            text = "bert" if dataset == "mnre" else "roberta"
            model = f"{text}-resnet50" if system == "resnet50" else system
            rows.append(Row("systems", model, dataset, ("--model", model), values[dataset]))
    small = ("--text-encoder", "models/all-MiniLM-L6-v2", "--lr", 1e-4, "--fusion-lr", 1e-3)
    photos = "--shuffle-photos"
    for fusion in ("none", *FUSION):
        flags = (*small, "--model", "bert-caption", "--fusion", fusion)
        rows.append(Row("captions", fusion, "twitter2017", flags, control=photos * (fusion != "none")))
    extras = "post", "photo", "both"
    notes = {"none": ()} | {extra: ("--notes", NOTES_FILE, "--extra", extra) for extra in extras}
    controls = {"none": "", "post": "--shuffle-notes", "photo": photos, "both": "--shuffle-notes"}
    text_only = ("--model", "bert-caption", "--fusion", "none")
    for extra, more in notes.items():
        for decoder in ("softmax", "crf"):
            name = extra if decoder == "softmax" else f"{extra}, crf"
            flags = (*small, *text_only, "--decoder", decoder, *more)
            rows.append(Row("notes", name, "twitter2017", flags, control=controls[extra]))
    for fusion in FUSION:
        flags = (*small, "--model", "bert-caption", "--fusion", fusion, *notes["post"])
        name = f"post and captions, {fusion}"
        rows.append(Row("notes", name, "twitter2017", flags, control=photos, over=("post",)))
    base = ("--text-encoder", "models/all-mpnet-base-v2", "--lr", 3e-5, "--fusion-lr", 1e-3)
    for extra in ("none", "post"):
        flags = (*base, *text_only, "--decoder", "crf", "--precision", "bfloat16", *notes[extra])
        over = ("none, crf",)
        rows.append(Row("base", f"{extra}, crf", "twitter2017", flags, control=controls[extra], over=over))
    for share in (0.1, 0.3):
        for extra in ("none", "post"):
            flags = (*small, *text_only, "--train-share", share, *notes[extra])
            name = f"{extra}, {share:.0%}"
            rows.append(Row("few-shot", name, "twitter2017", flags, control="", over=(f"none, {share:.0%}",)))
    for fusion in ("none", *FUSION):
        flags = (*small, "--model", "bert-resnet50", "--fusion", fusion, "--batch-size", 16, "--epochs", 3)
        rows.append(Row("relations", fusion, "mnre", flags, control=""))
    rates = ("--lr", 1e-3, "--fusion-lr", 1e-3)
    for name, model, encoder, size in (
        *((fusion, "roberta-resnet50", "encoder", 96) for fusion in ("none", *FUSION)),
        ("captions, film", "bert-caption", "encoder", 64), ("clip-bert, film", "clip-bert", "encoder", 96),
        ("blip", "blip", "blip", 96), ("vilt", "vilt", "vilt", 96),
    ):  # fmt: skip
        flags = ("--model", model, "--img-size", size)
        flags += ("--text-encoder", f"data/demo/{encoder}", "--epochs", 15)
        fusion = () if model in ("blip", "vilt") else ("--fusion", name.split(", ")[-1])
        rows.append(Row("demo", name, "demo", flags + rates + fusion, control=photos * (name != "none")))
    tiny = ("--img-size", 96, "--text-encoder", "data/demo-notes/encoder", "--epochs", 15, *rates)
    told, plain = ("--notes", "demo-notes/notes.jsonl"), ("--model", "bert-resnet50")
    drawn = ("--generated", "generated/demo-notes-resnet50-96.h5")
    for name, more, control, over in (
        ("none", (*plain, "--fusion", "none"), "", ()),
        ("none, crf", (*plain, "--fusion", "none", "--decoder", "crf"), "", ("none",)),
        ("post", (*plain, "--fusion", "none", *told, "--extra", "post"), "--shuffle-notes", ("none",)),
        ("post, crf", (*plain, "--fusion", "none", *told, "--extra", "post", "--decoder", "crf"), "",
         ("none, crf",)),
        ("photo, crf", (*plain, "--fusion", "none", *told, "--extra", "photo", "--decoder", "crf"), photos,
         ("none, crf",)),
        ("cross-attention", (*plain, "--fusion", "cross-attention"), photos, ("none",)),
        ("cross-attention, relevance", (*plain, "--fusion", "cross-attention", *told, "--relevance", "given"),
         photos, ("cross-attention",)),
        ("minige", ("--system", "minige", *drawn), photos, ("none, crf",)),
        ("tia", ("--system", "tia", *told), photos, ("post, crf", "tia, no relevance")),
        ("tia, no relevance", ("--system", "tia", *told, "--relevance", "none"), "", ("post, crf",)),
        ("icka", ("--system", "icka", *told), photos, ("photo, crf",)),
        ("coatt", ("--system", "coatt", "--img-size", 32), photos, ("none, crf",)),
        ("dha", ("--system", "dha"), photos, ("none, crf",)),
    ):  # fmt: skip
        rows.append(Row("demo-notes", name, "demo-notes", tiny + more, control=control, over=over))
    captions = {"minige": (), "tia": ("--notes", NOTES_FILE), "icka": ("--notes", NOTES_FILE)}
    texts = {"tia": "notes/post, crf", "icka": "notes/photo, crf"}  # the same text, and no fusion
    for name in PUBLISHED:
        model = ("--model", "bert-caption", *captions[name]) if name in captions else ()
        over = ("notes/none, crf", *([texts[name]] if name in texts else []))
        flags = (*small, "--system", name, *model)
        rows.append(Row("published", name, "twitter2017", flags, control=photos, over=over))
    return rows


def argument_list(row, seed, args, shuffled=False):
    """What to give train.py for one run of a row; --text-encoder and --lr win, but not in the demo."""
    places = {"--data-dir": args.data_dir, "--cache-dir": args.cache_dir}
    given = {"--dataset": row.dataset}
    given |= {flag: place for flag, place in places.items() if place != PLACES[flag]}
    given |= dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    for flag, place in (("--notes", args.data_dir), ("--generated", args.cache_dir)):
        if flag in given:
            given[flag] = f"{place}/{given[flag]}"
    for flag, value in (("--text-encoder", args.text_encoder), ("--lr", args.lr)):
        if value is not None and row.table not in DRAWN:
            given[flag] = value
    argv = [str(part) for pair in (given | {"--seed": seed}).items() for part in pair]
    argv += [row.control] * shuffled
    folder = Path(train.parse_args(argv).run_dir).name
    return [*argv, "--run-dir", f"{args.runs}/{folder}"]


def run_folder(argv):
    return Path(argv[-1])


def other_run(argv):
    """In what the run in the folder of these arguments differs from them, as text; "" if it does not."""
    folder = run_folder(argv)
    if not (folder / "config.json").exists():
        return ""
    asked = vars(train.parse_args(argv)) | {"run_format": RUN_FORMAT}
    if asked["notes"] and Path(asked["notes"]).is_file():
        asked["notes_sha256"] = hashlib.sha256(Path(asked["notes"]).read_bytes()).hexdigest()
    made, asked = (system_settings(config) for config in (read_config(folder), asked))
    made = {key: made.get(key) for key in asked}
    made |= {"precision": asked["precision"]}  # auto: it follows the machine
    other = differing(made, asked, ("its", "this row's"))
    return f"{folder} is another run, {', '.join(other.values())}" if other else ""


def finished(argv):
    """Whether the run of these arguments stands in its folder whole."""
    folder = run_folder(argv)
    if not (folder / "config.json").exists() or (folder / "state.pt").exists() or other_run(argv):
        return False
    # Test is scored last, where there is a test file.
    splits = json.loads((folder / "config.json").read_text())["data"]
    return (folder / f"metrics-{'test' if 'test' in splits else 'valid'}.json").exists()


@functools.cache
def splits(dataset, data_dir):
    """The splits a data set has; raises what `load_dataset` raises."""
    return tuple(load_dataset(dataset, data_dir).examples)


def lacks(row, argv):
    """What a row cannot be run without, in a few words, or ""."""
    asked = train.parse_args(argv)
    try:
        found = splits(row.dataset, asked.data_dir)
        for features in (asked.features if asked.fusion != "none" else None, asked.generated):
            if features:
                FeatureCache(features)
    except (FileNotFoundError, ValueError) as error:
        return str(error).split(";")[0].split(":")[0]
    if asked.notes and not Path(asked.notes).is_file():
        return f"no notes file {asked.notes}"
    if "test" not in found and row.reference:
        return f"no test file of {row.dataset}"
    return ""


def run_row(row, args):
    """Run what of a row is not finished. Returns why it was not run, or ""."""
    runs = [argument_list(row, seed, args) for seed in args.seeds]
    if args.controls and row.control:
        runs += [argument_list(row, seed, args, shuffled=True) for seed in args.seeds]
    print(f"{row.key}\n  {shown_command(runs[0])}")
    for argv in runs:
        if differs := other_run(argv):
            raise ValueError(f"{differs}; name another folder with --runs")
    todo = [argv for argv in runs if not finished(argv)]
    if args.dry_run:
        print(f"  {len(runs) - len(todo)} of {len(runs)} runs are finished")
        return ""
    if todo and (reason := lacks(row, todo[0])):
        print(f"  left out: {reason}")
        return reason
    for argv in todo:
        print(f"  {run_folder(argv)}", flush=True)
        command = [sys.executable, str(PROJECT / "train.py"), *argv, "--resume"]  # a stopped run goes on
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            print(f"  FAILED: {reason}")
            return reason
    plain = [argv for argv in runs if row.control == "--shuffle-photos" and row.control not in argv]
    checked = [run_folder(argv) for argv in plain]
    if checked := [folder for folder in checked if not list(folder.glob("image-check-*.json"))]:
        command = [sys.executable, str(PROJECT / "evaluate.py"), "--image-check", "--run", *map(str, checked)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ""


def shown_command(argv):
    return shlex.join(["python", "train.py", *argv])


# ---------------------------------------------------------------------------------------------------- results


def spread(values):
    """Mean ± standard deviation, as text; "" of nothing."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def read_metrics(folders):
    """[(split, metrics, config)] of run folders."""
    found = []
    for folder in folders:
        path = predictions_file(folder, None)
        split = path.stem.removeprefix("predictions-")
        metrics = json.loads((folder / f"metrics-{split}.json").read_text())
        found.append((split, metrics, json.loads((folder / "config.json").read_text())))
    return found


def done_folders(row, args, shuffled=False):
    runs = (argument_list(row, seed, args, shuffled) for seed in args.seeds)
    return [run_folder(argv) for argv in runs if finished(argv)]


def judged(row):
    """What is to be said of a row's reference values."""
    if not row.reference:
        return []
    notes = []
    if row.reference[0] == MAJORITY[row.dataset]:
        notes.append("the reference equals always answering the majority label")
    elif row.reference[0] < MAJORITY[row.dataset]:
        notes.append("the reference lies below always answering the majority label")
    if len(row.reference) == 4 and row.reference[0] != row.reference[2]:
        notes.append("the reference is no weighted token score: its recall is not its accuracy")
    return notes


def gain(a, b):
    """How much better runs in `a` are than `b`'s of the same seeds, by paired bootstrap; "" of nothing."""
    sides = [{folder.name.rpartition("-s")[2]: folder for folder in side} for side in (a, b)]
    both = [seed for seed in sides[0] if seed in sides[1]]
    if not both:
        return ""
    files = [[predictions_file(side[seed], None) for seed in both] for side in sides]
    found = paired_bootstrap(*([read_predictions(path) for path in paths] for paths in files))
    fewer = f" ({len(both)} seed{'s' * (len(both) > 1)})" * (len(both) < len(a))
    return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{fewer}"


def cells(row, args, rows):
    """{column: text} of one row, with `seeds` and `made with`; {} where no run of it is finished.

    `rows`: all, by key.
    """
    true, wrong = done_folders(row, args), done_folders(row, args, shuffled=True) if row.control else []
    if not true:
        return {}
    runs, notes, made = read_metrics(true), judged(row), {"row": row.name, "data": row.dataset}
    if row.table == "published":
        paper, *published, differs = PUBLISHED[row.name]
        made |= {"paper": paper, "published": " / ".join(f"{value:.4f}" for value in published)}
        notes.append(differs)
    made["seeds"] = f"{len(true)} + {len(wrong)}" if wrong else f"{len(true)}"
    if row.reference:
        made["reference"] = " ".join(f"{value:.4f}" for value in row.reference)
    level = "row" if DATASETS[row.dataset][0] == "relation" else "token"
    columns = METRICS[: len(row.reference) or 1]
    made["ours"] = "; ".join(spread([m[level][metric] for _, m, _ in runs]) for metric in columns)
    made["main F1"] = spread([main_score(m) for _, m, _ in runs])
    if row.table in ("published", "notes", "base", "few-shot", "demo-notes"):
        for part in ("seen", "unseen"):
            made[f"F1, mentions {part}"] = spread([m[f"entity_{part}"]["f1"] for _, m, _ in runs])
    for over in row.over:
        other = rows.get(f"{over}/{row.dataset}") or rows.get(f"{row.table}/{over}/{row.dataset}")
        if other and other != row:
            made[f"over {other.name}"] = gain(true, done_folders(other, args))
    made["over its control"] = gain(true, wrong)
    made["main F1, trained on shuffled"] = spread([main_score(m) for _, m, _ in read_metrics(wrong)])
    shown = [json.loads(path.read_text()) for folder in true for path in folder.glob("image-check-*.json")]
    made["main F1, shown shuffled"] = spread([statistics.mean(map(main_score, c["shuffled"])) for c in shown])
    made["main F1, shown none"] = spread([main_score(c["none"]) for c in shown])
    split, metrics, config = runs[0]
    made["majority"] = f"{metrics['baseline']['accuracy']:.4f}"
    if split == "valid":
        notes.append("scored on valid, which also chose the epoch: no test file")
    features, versions = config["features_made"], config["versions"]
    photos = f", {features['backbone']} features of weights {features['weights']}" if features else ""
    encoder = Path(config["text_encoder"]).name
    notes.append(f"{config['data'][split]['variant']}, text encoder {encoder}{photos}")
    made["notes"] = "; ".join(notes)
    made["made with"] = (
        f"torch {versions['torch']}, transformers {versions['transformers']}, {config['threads']} thread(s)"
        f" of {config['device']}, {config['precision']}"
    )
    made["flags"] = flags(row, args)
    return {key: text for key, text in made.items() if text}


def flags(row, args):
    """What makes a row's runs, as text: what results.csv has of other flags is not of this row."""
    given = (args.text_encoder, args.lr) if row.table not in DRAWN else ()
    return shlex.join(map(str, [*row.flags, *(value for value in given if value is not None)]))


def seeds(made):
    """How many runs the cells of a row are made of."""
    return sum(map(int, made["seeds"].split(" + "))) if made else 0


def read_results(path):
    """{(table, row, data set): {column: text}} of a results.csv; {} if there is none."""
    found = {}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                row = line["table"], line["row"], line["data set"]
                found.setdefault(row, {})[line["column"]] = line["value"]
    return found


def latex(title, header, body):
    """A table as lines of LaTeX."""
    escaped = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$"}

    def line(parts):
        return " & ".join("".join(escaped.get(c, c) for c in part) for part in parts) + r" \\"

    columns = "l" * len(header)
    return [
        r"\begin{table}", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}", r"\hline",
        line(header), r"\hline", *map(line, body), r"\hline", r"\end{tabular}", r"\end{table}", "",
    ]  # fmt: skip


def write_results(rows, reasons, args):
    """Write RESULTS.md, results.csv (one value a line) and results.tex from all finished runs.

    Returns {(table, row): cells}.
    """
    earlier, by_key = read_results(args.output / "results.csv"), {row.key: row for row in rows}
    kept = {row: earlier.get((row.table, row.name, row.dataset), {}) for row in rows}
    kept = {row: cell if cell.get("flags") == flags(row, args) else {} for row, cell in kept.items()}
    made = {row: max(cells(row, args, by_key), kept[row], key=seeds) for row in rows}  # of equals the first
    text, tex, values = [], [], [["table", "row", "data set", "column", "value"]]
    for table, title in TITLES.items():
        mine = [row for row in rows if row.table == table]
        ran, missing = [row for row in mine if made[row]], [row for row in mine if not made[row]]
        text.append(f"\n## {title}\n\n{NOTES[table]}")
        if ran:
            last = ("majority", "notes", "made with", "flags")
            keys = [*dict.fromkeys(key for row in ran for key in made[row] if key not in last), *last[:2]]
            header = [HEADINGS.get(key, key) for key in keys]
            body = [[made[row].get(key, "") for key in keys] for row in ran]
            text += ["", markdown(header), "|" + " --- |" * len(header), *map(markdown, body)]
            tex += latex(title, header, body)
            commands = (shown_command(argument_list(row, args.seeds[0], args)) for row in ran)
            text += ["\nCommands, first seed:\n", *dict.fromkeys(f"    {command}" for command in commands)]
        if table == "published" and missing:
            header = [HEADINGS[key] for key in ("row", "paper", "published", "notes")]
            papers = [(row.name, *PUBLISHED[row.name]) for row in missing]
            body = [[name, paper, f"{a:.4f} / {b:.4f}", said] for name, paper, a, b, said in papers]
            text += ["", markdown(header), "|" + " --- |" * len(header), *map(markdown, body)]
        if missing:
            why = {row: reasons.get(row.key) or other_run(argv) or lacks(row, argv) for row in missing
                   for argv in [argument_list(row, args.seeds[0], args)]}  # fmt: skip
            said = f": {'; '.join(filter(None, dict.fromkeys(why.values())))}" if any(why.values()) else ""
            names = ", ".join(dict.fromkeys(row.name for row in missing))
            text.append(
                f"\nNot run, {len(missing)} of {len(mine)} rows ({names}){said}. `python benchmarks/tables.py"
                f" --only {table}/`"
            )
        for row in ran:
            values += [[table, row.name, row.dataset, key, value] for key, value in made[row].items()]
    ways = sorted({cell["made with"] for cell in made.values() if "made with" in cell})
    with_what = "; ".join(ways) or "no finished runs"
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "RESULTS.md", "\n".join([INTRO.format(with_what), *text]) + "\n")
    write_text(args.output / "results.tex", "\n".join(tex) + "\n")
    rows_of_csv = io.StringIO(newline="")
    csv.writer(rows_of_csv, lineterminator="\n").writerows(values)
    write_text(args.output / "results.csv", rows_of_csv.getvalue())
    print(f"{args.output}: RESULTS.md, results.csv, results.tex")
    return {(row.table, row.name): cell for row, cell in made.items()}


def plot_few_shot(made, output):
    """few-shot.png: entity F1 on test, mean and deviation, over the share of train, with notes or none.

    `made`: what `write_results` gives.
    """
    curves = {}
    for extra in ("none", "post"):
        few = [(share, ("few-shot", f"{extra}, {share}%")) for share in (10, 30)]
        curves[extra] = [(n, made.get(row, {}).get("main F1")) for n, row in [*few, (100, ("notes", extra))]]
    if not all(text for curve in curves.values() for _, text in curve):
        return
    import matplotlib  # a requirement of this part alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for extra, label in (("none", "text only"), ("post", "and notes on the post")):
        shares, texts = zip(*curves[extra], strict=True)
        values = ([float(part) for part in f"{text} ± 0".split(" ± ")[:2]] for text in texts)
        means, spreads = zip(*values, strict=True)
        axes.errorbar(shares, means, spreads, fmt="o-", capsize=3, label=label)
    axes.set(xscale="log", xlabel="training posts of Twitter-2017, %", ylabel="test entity F1")
    axes.set(xticks=(10, 30, 100), xticklabels=("10", "30", "100"))
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(output / "few-shot.png", dpi=120)


def markdown(parts):
    return "| " + " | ".join(parts) + " |"


HEADINGS = {
    "row": "row", "notes": "notes",
    "data": "data set", "paper": "in the manner of", "published": "published entity F1, 2015 / 2017",
    "seeds": "seeds (+ of its control)", "reference": "reference: accuracy [precision recall F1]",
    "ours": "accuracy [precision recall F1] of tokens or rows",
    "main F1": "entity F1 (relations: micro F1 without None)",
    "F1, mentions seen": "of mentions that train has", "F1, mentions unseen": "of those it has not",
    "over none": "over text only", "over none, crf": "over text only, crf",
    "main F1, trained on shuffled": "F1 of its control",
    "main F1, shown shuffled": "F1 shown others' photos", "main F1, shown none": "F1 shown no photo",
    "majority": "accuracy of always answering the majority label",
}  # fmt: skip
INTRO = """# Results

Written by `benchmarks/tables.py` from finished runs; mean ± standard deviation over seeds. Token and row
scores include `O` and `None` and stand beside the accuracy of always answering the majority label; the F1
that tells systems apart is the one of whole entities, or of relations without `None`. The best epoch is
chosen on valid, test is scored once.

A row's control is the same run trained on other posts' photos, or notes. Gains, "over", are differences of
that F1 with the 95% interval of a paired bootstrap over test posts (photos for relations; 10,000 resamples,
the same seeds on both sides): it holds what other posts could have changed, not what other seeds could have.
An interval that holds 0 tells nothing apart.

Made with {}."""


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    add("--only", nargs="+", default=[""], help="rows of which a part of TABLE/NAME/DATASET begins so")
    add("--dry-run", action="store_true",
        help="show the commands and what is finished; run and write nothing")
    add("--controls", action=argparse.BooleanOptionalAction, default=True,
        help="train on shuffled photos too")
    add("--text-encoder", help="in place of each row's own, the demo's excepted")
    add("--lr", type=float, help="of the text encoder, for another one")
    add("--data-dir", default=PLACES["--data-dir"])
    add("--cache-dir", default=PLACES["--cache-dir"])
    add("--runs", default="runs", help="where runs go, and finished ones are looked for")
    add("--output", type=Path, default=Path("benchmarks"))
    # fmt: on
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    rows, reasons = all_rows(), {}
    # From the beginning of a part on: notes/ are not the rows of demo-notes/.
    chosen = [row for row in rows if any(f"/{text}" in f"/{row.key}" for text in args.only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(args.only)}: no such row; --dry-run shows all")
    for row in chosen:
        reasons[row.key] = run_row(row, args)
    if not args.dry_run:
        plot_few_shot(write_results(rows, reasons, args), args.output)


if __name__ == "__main__":
    command_line(main)
