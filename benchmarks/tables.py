"""Run the rows of the reference tables and write what came out beside what was published.

    python benchmarks/tables.py --dry-run                   # the commands, row by row
    python benchmarks/tables.py --only fusion/              # all rows of the first table, three seeds each
    python benchmarks/tables.py --only systems/ --text-encoder models/mine --lr 1e-4

Run it where data/, features/ and runs/ are. A finished run is not run again, so a table that was stopped goes
on where it stopped. results.csv keeps what was measured, a value a line; RESULTS.md is written from it and
all runs there are. A row that results.csv has of more seeds than there are runs here stays as it is there:
runs may be deleted, or lie on another machine. Tables of runs of your own: `evaluate.py --table`.
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
from parts.console import command_line  # noqa: E402
from parts.datasets import DATASETS, load_dataset  # noqa: E402
from parts.files import write_text  # noqa: E402
from parts.run_files import predictions_file, read_config  # noqa: E402
from parts.run_table import gain_over, shown_gain, spread  # noqa: E402
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
    " (22M) and the inputs that are named below the table. Not a reproduction.",
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
        rows.append(Row("captions", fusion, "twitter2017", flags, control=photos if fusion != "none" else ""))
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
        control = photos if name != "none" else ""
        rows.append(Row("demo", name, "demo", flags + rates + fusion, control=control))
    tiny = ("--img-size", 96, "--text-encoder", "data/demo-notes/encoder", "--epochs", 15, *rates)
    noted, plain = ("--notes", "demo-notes/notes.jsonl"), ("--model", "bert-resnet50")
    drawn = ("--generated", "generated/demo-notes-resnet50-96.h5")
    for name, more, control, over in (
        ("none", (*plain, "--fusion", "none"), "", ()),
        ("none, crf", (*plain, "--fusion", "none", "--decoder", "crf"), "", ("none",)),
        ("post", (*plain, "--fusion", "none", *noted, "--extra", "post"), "--shuffle-notes", ("none",)),
        ("post, crf", (*plain, "--fusion", "none", *noted, "--extra", "post", "--decoder", "crf"), "",
         ("none, crf",)),
        ("photo, crf", (*plain, "--fusion", "none", *noted, "--extra", "photo", "--decoder", "crf"), photos,
         ("none, crf",)),
        ("cross-attention", (*plain, "--fusion", "cross-attention"), photos, ("none",)),
        ("cross-attention, relevance", (*plain, "--fusion", "cross-attention", *noted, "--relevance",
                                        "given"), photos, ("cross-attention",)),
        ("minige", ("--system", "minige", *drawn), photos, ("none, crf",)),
        ("tia", ("--system", "tia", *noted), photos, ("post, crf", "tia, no relevance")),
        ("tia, no relevance", ("--system", "tia", *noted, "--relevance", "none"), "", ("post, crf",)),
        ("icka", ("--system", "icka", *noted), photos, ("photo, crf",)),
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
    options = {"--dataset": row.dataset}
    options |= {flag: place for flag, place in places.items() if place != PLACES[flag]}
    options |= dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    for flag, place in (("--notes", args.data_dir), ("--generated", args.cache_dir)):
        if flag in options:
            options[flag] = f"{place}/{options[flag]}"
    for flag, value in (("--text-encoder", args.text_encoder), ("--lr", args.lr)):
        if value is not None and row.table not in DRAWN:
            options[flag] = value
    argv = [str(part) for pair in (options | {"--seed": seed}).items() for part in pair]
    argv += [row.control] if shuffled else []
    folder = Path(train.parse_args(argv).run_dir).name
    return [*argv, "--run-dir", f"{args.runs}/{folder}"]


def run_folder(argv):
    return Path(argv[-1])


def other_run(argv):
    """In what the run in the folder of these arguments differs from them, as text; "" if it does not."""
    folder = run_folder(argv)
    if not (folder / "config.json").exists():
        return ""
    unknown = {"features_made": None, "generated_made": None}  # before features are opened
    wanted = vars(train.parse_args(argv)) | unknown | {"run_format": RUN_FORMAT}
    if wanted["notes"] and Path(wanted["notes"]).is_file():
        wanted["notes_sha256"] = hashlib.sha256(Path(wanted["notes"]).read_bytes()).hexdigest()
    theirs, wanted = (system_settings(config) for config in (read_config(folder), wanted))
    theirs = {key: theirs.get(key) for key in wanted}
    theirs |= {key: "auto" for key, value in wanted.items() if value == "auto"}  # left to machine or data
    other = differing(theirs, wanted, ("its", "this row's"))
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
    wanted = train.parse_args(argv)
    try:
        names = splits(row.dataset, wanted.data_dir)
        for features in (wanted.features if wanted.fusion != "none" else None, wanted.generated):
            if features:
                FeatureCache(features)
    except (FileNotFoundError, ValueError) as error:
        return str(error).split(";")[0].split(":")[0]
    if wanted.notes and not Path(wanted.notes).is_file():
        return f"no notes file {wanted.notes}"
    if "test" not in names and row.reference:
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


def finished_runs(row, args, shuffled=False):
    """{seed: run folder} of the runs of a row that are finished."""
    runs = {seed: argument_list(row, seed, args, shuffled) for seed in args.seeds}
    return {seed: run_folder(argv) for seed, argv in runs.items() if finished(argv)}


def read_metrics(folders):
    """[(split, metrics, config)] of run folders, in order."""
    metrics = []
    for folder in folders.values():
        split = predictions_file(folder, None).stem.removeprefix("predictions-")
        scores = json.loads((folder / f"metrics-{split}.json").read_text())
        metrics.append((split, scores, json.loads((folder / "config.json").read_text())))
    return metrics


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


def gain(folders, others):
    """How much better runs are than others of the same seeds, as text; "" of nothing."""
    sides = [
        {seed: read_predictions(predictions_file(folder, None)) for seed, folder in side.items()}
        for side in (folders, others)
    ]
    return shown_gain(gain_over(*sides), len(folders))


def measured(row, args, rows):
    """{column: text} of one row, with `seeds` and `made with`; {} where no run of it is finished.

    `rows`: all, by key.
    """
    true = finished_runs(row, args)
    wrong = finished_runs(row, args, shuffled=True) if row.control else {}
    if not true:
        return {}
    runs, notes, cells = read_metrics(true), judged(row), {"row": row.name, "data": row.dataset}
    if row.table == "published":
        paper, *published, differs = PUBLISHED[row.name]
        cells |= {"paper": paper, "published": " / ".join(f"{value:.4f}" for value in published)}
        notes.append(differs)
    cells["seeds"] = f"{len(true)} + {len(wrong)}" if wrong else f"{len(true)}"
    if row.reference:
        cells["reference"] = " ".join(f"{value:.4f}" for value in row.reference)
    level = "row" if DATASETS[row.dataset][0] == "relation" else "token"
    columns = METRICS[: len(row.reference) or 1]
    cells["ours"] = "; ".join(spread([m[level][metric] for _, m, _ in runs]) for metric in columns)
    cells["main F1"] = spread([main_score(m) for _, m, _ in runs])
    if row.table in ("published", "notes", "base", "few-shot", "demo-notes"):
        for part in ("seen", "unseen"):
            cells[f"F1, mentions {part}"] = spread([m[f"entity_{part}"]["f1"] for _, m, _ in runs])
    for over in row.over:
        other = rows.get(f"{over}/{row.dataset}") or rows.get(f"{row.table}/{over}/{row.dataset}")
        if other and other != row:
            cells[f"over {other.name}"] = gain(true, finished_runs(other, args))
    cells["over its control"] = gain(true, wrong)
    cells["main F1, trained on shuffled"] = spread([main_score(m) for _, m, _ in read_metrics(wrong)])
    paths = [path for folder in true.values() for path in folder.glob("image-check-*.json")]
    checks = [json.loads(path.read_text()) for path in paths]
    cells["main F1, shown shuffled"] = spread(
        [statistics.mean(map(main_score, check["shuffled"])) for check in checks]
    )
    cells["main F1, shown none"] = spread([main_score(check["none"]) for check in checks])
    split, metrics, config = runs[0]
    cells["majority"] = f"{metrics['baseline']['accuracy']:.4f}"
    if split == "valid":
        notes.append("scored on valid, which also chose the epoch: no test file")
    features, versions = config["features_made"], config["versions"]
    photos = f", {features['backbone']} features of weights {features['weights']}" if features else ""
    encoder = Path(config["text_encoder"]).name
    notes.append(f"{config['data'][split]['variant']}, text encoder {encoder}{photos}")
    cells["notes"] = "; ".join(notes)
    cells["made with"] = (
        f"torch {versions['torch']}, transformers {versions['transformers']}, {config['threads']} thread(s)"
        f" of {config['device']}, {config['precision']}"
    )
    cells["flags"] = flags(row, args)
    return {key: text for key, text in cells.items() if text}


def flags(row, args):
    """What makes a row's runs, as text: what results.csv has of other flags is not of this row."""
    more = (args.text_encoder, args.lr) if row.table not in DRAWN else ()
    return shlex.join(map(str, [*row.flags, *(value for value in more if value is not None)]))


def count_runs(cells):
    """How many runs the cells of a row are made of."""
    return sum(map(int, cells["seeds"].split(" + "))) if cells else 0


def read_results(path):
    """{(table, row, data set): {column: text}} of a results.csv; {} if there is none."""
    results = {}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                row = line["table"], line["row"], line["data set"]
                results.setdefault(row, {})[line["column"]] = line["value"]
    return results


def table_lines(rows, cells):
    """A table of Markdown of the cells of some rows, and below it what all or some of them share."""
    shown = {row: shown_cells(cells[row]) for row in rows}
    one_data_set = len({row.dataset for row in rows}) == 1
    keys = [key for key in HEADINGS if any(key in cell for cell in shown.values())]
    keys = [key for key in keys if key != "data" or not one_data_set]
    body = [[cell.get(key, "") for key in keys] for cell in shown.values()]
    header = [HEADINGS[key] for key in keys], ["---"] * len(keys)
    lines = ["", *(f"| {' | '.join(line)} |" for line in (*header, *body)), ""]
    majorities = dict.fromkeys((row.dataset, cells[row]["majority"]) for row in rows)
    always = ", ".join(f"{accuracy} ({dataset})" for dataset, accuracy in majorities)
    lines.append(f"- Accuracy of always answering the majority label: {always}.")
    return lines + row_notes({row: cells[row]["notes"] for row in rows})


def row_notes(notes):
    """Lines of a list of what is said of rows, {row: text}; rows of one text share a line."""
    names = {}
    for row, text in notes.items():
        names.setdefault(text, []).append(row.name)
    return [
        f"- {'All rows' if len(names) == 1 and len(notes) > 1 else '; '.join(dict.fromkeys(rows))}: {text}."
        for text, rows in names.items()
    ]


def shown_cells(cells):
    """The cells of a row as RESULTS.md has them: the gains over other rows in one."""
    names = {"none": "text only", "none, crf": "text only, crf"}
    overs = [key.removeprefix("over ") for key in cells if key.startswith("over ")]
    gains = [f"{names.get(name, name)}: {cells[f'over {name}']}" for name in overs if name != "its control"]
    return cells | ({"gain": "; ".join(gains)} if gains else {})


def write_results(rows, reasons, args):
    """Write results.csv (one value a line) from all finished runs and what it has already, and RESULTS.md."""
    earlier, by_key = read_results(args.output / "results.csv"), {row.key: row for row in rows}
    kept = {row: earlier.get((row.table, row.name, row.dataset), {}) for row in rows}
    kept = {row: cell if cell.get("flags") == flags(row, args) else {} for row, cell in kept.items()}
    # Of equals the first.
    cells = {row: max(measured(row, args, by_key), kept[row], key=count_runs) for row in rows}
    text, values = [], [["table", "row", "data set", "column", "value"]]
    for table, title in TITLES.items():
        mine = [row for row in rows if row.table == table]
        ran, missing = [row for row in mine if cells[row]], [row for row in mine if not cells[row]]
        command = f"`python benchmarks/tables.py --only {table}/`"
        text.append(f"\n## {title}\n\n{NOTES[table]}")
        if ran:
            text += [*table_lines(ran, cells), f"- Commands: {command[:-1]} --dry-run`."]
        if missing:
            why = [reasons.get(row.key) or other_run(argv) or lacks(row, argv) for row in missing
                   for argv in [argument_list(row, args.seeds[0], args)]]  # fmt: skip
            why = [reason for reason in dict.fromkeys(why) if reason]
            more = f" (and {len(why) - 1} more)" if len(why) > 1 else ""
            reason = f": {why[0]}{more}" if why else ""
            names = "; ".join(dict.fromkeys(row.name for row in missing))
            text.append(f"\nNot run, {len(missing)} of {len(mine)} rows ({names}){reason}. {command}")
        for row in ran:
            values += [[table, row.name, row.dataset, key, value] for key, value in cells[row].items()]
    ways = sorted({cell["made with"] for cell in cells.values() if "made with" in cell})
    args.output.mkdir(parents=True, exist_ok=True)
    intro = INTRO.format("; ".join(ways) or "no finished runs")
    write_text(args.output / "RESULTS.md", "\n".join([intro, *text]) + "\n")
    rows_of_csv = io.StringIO(newline="")
    csv.writer(rows_of_csv, lineterminator="\n").writerows(values)
    write_text(args.output / "results.csv", rows_of_csv.getvalue())
    print(f"{args.output}: RESULTS.md, results.csv")


HEADINGS = {  # in the order of the columns
    "row": "row", "data": "data set", "paper": "in the manner of",
    "published": "published entity F1, 2015 / 2017", "seeds": "seeds (+ of its control)",
    "reference": "reference", "ours": "accuracy", "main F1": "F1",
    "F1, mentions seen": "F1, seen in train", "F1, mentions unseen": "F1, unseen", "gain": "gain over",
    "over its control": "gain over its control", "main F1, trained on shuffled": "F1 of its control",
    "main F1, shown shuffled": "F1, others' photos", "main F1, shown none": "F1, no photo",
}  # fmt: skip
INTRO = """# Results

Mean ± standard deviation over seeds. Of one seed there is no deviation.

- **F1** is of whole entities, or of relations without `None`. It tells systems apart.
- **Accuracy** is of tokens, or of rows, `O` and `None` included. Some references have precision, recall and
  F1 of the same kind behind it.
- **Seen in train**: F1 of mentions that the training posts have, too; unseen: of the others.
- **Control**: the same run, trained on other posts' photos or notes.
- **Gain**: a difference of that F1 with the 95% interval of a paired bootstrap over test posts (photos for
  relations; 10,000 resamples; the same seeds on both sides, n = how many where they are fewer). It holds what
  other posts could have changed, not what other seeds could have. An interval that holds 0 tells nothing
  apart.
- **Others' photos, no photo**: the same model, shown those.

The best epoch is chosen on valid, test is scored once. The rows here are older than three defaults: they were
made as with `--no-standardise --pooling start --keep best`, and `film` at the head's learning rate. Real
photos of products: [docs/PHOTO.md](../docs/PHOTO.md). Written by `benchmarks/tables.py`, whose
source is [results.csv](results.csv).

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
        write_results(rows, reasons, args)


if __name__ == "__main__":
    command_line(main)
