"""Run the rows of the reference tables and write what came out beside what was published.

    python benchmarks/tables.py --dry-run                   # the commands, row by row
    python benchmarks/tables.py --only fusion/              # all rows of the first table, three seeds each
    python benchmarks/tables.py --only systems/ --text-encoder models/mine --lr 1e-4

Run it where data/, features/ and runs/ are. A finished run is not run again, so a table that was stopped goes on where
it stopped. Rows that lack data, features or weights stay empty and say what they lack. All tables are written each
time, from all runs there are: RESULTS.md, results.csv and results.tex.
"""

import argparse
import csv
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
from checks import paired_bootstrap  # noqa: E402
from commands import command_line  # noqa: E402
from data import DATASETS, load_dataset  # noqa: E402
from evaluate import predictions_file  # noqa: E402
from features import FeatureCache  # noqa: E402
from model import RUN_FORMAT, differing, read_config, system_settings  # noqa: E402
from scores import main_score, read_predictions, write_text  # noqa: E402

PLACES = {"--data-dir": "data", "--cache-dir": "features"}  # the defaults of train.py too
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
        "twitter2015": (0.8632, 0.8318, 0.8632, 0.8260), "twitter2017": (0.8807, 0.8661, 0.8807, 0.8693), "mnre": (),
    },
}  # fmt: skip
PUBLISHED = {  # entity F1
    "MINIGE-MNER (Kong et al. 2025)": {"twitter2015": 0.7645, "twitter2017": 0.8867},
    "Text-Image Alignment (Zeng et al. 2025)": {"twitter2015": 0.7532, "twitter2017": 0.8665},
    "ICKA (Zeng et al. 2024)": {"twitter2015": 0.7542, "twitter2017": 0.8712},
    "CoAtt-NER (Scene Graph, 2024)": {"twitter2015": 0.7625, "twitter2017": 0.8731},
    "Dual-Enhanced Hierarchical Alignment (Wang et al. 2025)": {"twitter2015": 0.7742, "twitter2017": 0.8879},
}
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
    "settings": "The learning rate is `--fusion-lr`, the encoder keeps 3e-5, and the fusion is FiLM, the best of the first"
    " table: all three are our reading, the tables published name one rate and no fusion.",
    "systems": "With the defaults of `train.py`; FiLM, the best of the first table, where a system has a fusion to choose.",
    "published": "These are entity-level, and stand beside our entity-level F1 (mean over seeds), never beside token scores.",
    "captions": "The regions of a photo are the token states of its caption under the frozen text encoder"
    " (`extract_features.py --backbone caption`): what a captioner knows of the real photo, with no pixel. The placeholder"
    " picture's caption counts as missing. Text encoder all-MiniLM-L6-v2, at the rate chosen on valid with text only.",
    "notes": "`--notes` are what ChatGPT said of each post (`post`: its list of key entities) and a caption of its photo (`photo`),"
    " a second segment of the text; `both`: one after the other; `post and captions`: the list as a second segment, the captions as"
    " regions of a fusion. No pixel is looked at. The control of `post` and `both` trains on the lists of other posts, of the"
    " others on the captions of other photos. Whether ChatGPT has seen the data set, nobody here can know.",
    "base": "Text encoder all-mpnet-base-v2 (110M parameters) at the rate of 3e-5; no other rate and no CRF was tried yet.",
    "few-shot": "The posts are drawn with the run's seed, so a seed's rows share them.",
    "relations": "The features are a random ResNet50's of photos that have nothing to do with the posts: what a fusion layer adds"
    " here is capacity and noise. 3 epochs of batch 16, text encoder all-MiniLM-L6-v2.",
    "demo": "Posts, photos and captions that `demo.py` draws, tiny models with random weights: what is shown is that the"
    " photo is used where it decides, not how good a system is.",
    "demo-notes": "Posts of `demo.py` where a fifth of the photos are another post's, and the notes know it; beside a"
    " wrong photo a name of several types is of its usual one. Some names are made up for one post (all mentions"
    " unseen in train): its photo tells them, or the notes on it. A tiny model with random weights: what is shown is"
    " what a part is for, not how good a system is. `relevance`: `--relevance given`. Features: `extract_features.py"
    " --dataset demo-notes --weights random --views 2 --img-size 96`.",
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
    text_only: str = "none"  # the row of the same table without photo that it is compared with

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
            rows.append(Row("settings", f"{epochs}/{batch}/{rate:.4f}/{size}", dataset, flags, values[dataset]))
    for dataset in real:
        for system, values in SYSTEMS.items():
            model = f"{'bert' if dataset == 'mnre' else 'roberta'}-resnet50" if system == "resnet50" else system
            rows.append(Row("systems", model, dataset, ("--model", model), values[dataset]))
    small = ("--text-encoder", "models/all-MiniLM-L6-v2", "--lr", 1e-4, "--fusion-lr", 1e-3)
    photos = "--shuffle-photos"
    for fusion in ("none", *FUSION):
        flags = (*small, "--model", "bert-caption", "--fusion", fusion)
        rows.append(Row("captions", fusion, "twitter2017", flags, control=photos * (fusion != "none")))
    notes = {"none": ()} | {extra: ("--notes", NOTES_FILE, "--extra", extra) for extra in ("post", "photo", "both")}
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
        rows.append(Row("notes", name, "twitter2017", flags, control=photos, text_only="post"))
    base = ("--text-encoder", "models/all-mpnet-base-v2", "--lr", 3e-5, "--fusion-lr", 1e-3)
    for extra in ("none", "post"):
        rows.append(Row("base", extra, "twitter2017", (*base, *text_only, *notes[extra]), control=controls[extra]))
    for share in (0.1, 0.3):
        for extra in ("none", "post"):
            flags = (*small, *text_only, "--train-share", share, *notes[extra])
            name = f"{extra}, {share:.0%}"
            rows.append(Row("few-shot", name, "twitter2017", flags, control="", text_only=f"none, {share:.0%}"))
    for fusion in ("none", *FUSION):
        flags = (*small, "--model", "bert-resnet50", "--fusion", fusion, "--batch-size", 16, "--epochs", 3)
        rows.append(Row("relations", fusion, "mnre", flags, control=""))
    rates = ("--lr", 1e-3, "--fusion-lr", 1e-3)
    for name, model, encoder, size in (
        *((fusion, "roberta-resnet50", "encoder", 96) for fusion in ("none", *FUSION)),
        ("captions, film", "bert-caption", "encoder", 64), ("clip-bert, film", "clip-bert", "encoder", 96),
        ("blip", "blip", "blip", 96), ("vilt", "vilt", "vilt", 96),
    ):  # fmt: skip
        flags = ("--model", model, "--img-size", size, "--text-encoder", f"data/demo/{encoder}", "--epochs", 15)
        fusion = () if model in ("blip", "vilt") else ("--fusion", name.split(", ")[-1])
        rows.append(Row("demo", name, "demo", flags + rates + fusion, control=photos * (name != "none")))
    tiny = ("--model", "bert-resnet50", "--img-size", 96, "--text-encoder", "data/demo-notes/encoder", "--epochs", 15)
    told = ("--notes", "demo-notes/notes.jsonl")
    for name, more, control, without in (
        ("none", ("--fusion", "none"), "", "none"),
        ("post", ("--fusion", "none", *told, "--extra", "post"), "--shuffle-notes", "none"),
        ("cross-attention", ("--fusion", "cross-attention"), photos, "none"),
        ("cross-attention, relevance", ("--fusion", "cross-attention", *told, "--relevance", "given"), photos,
         "cross-attention"),
    ):  # fmt: skip
        rows.append(Row("demo-notes", name, "demo-notes", tiny + rates + more, control=control, text_only=without))
    return rows


def argument_list(row, seed, args, shuffled=False):
    """What to give train.py for one run of a row; --text-encoder and --lr given for all rows win, but not in the demo."""
    places = {"--data-dir": args.data_dir, "--cache-dir": args.cache_dir}
    given = {"--dataset": row.dataset} | {flag: place for flag, place in places.items() if place != PLACES[flag]}
    given |= dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    if "--notes" in given:
        given["--notes"] = f"{args.data_dir}/{given['--notes']}"
    for flag, value in (("--text-encoder", args.text_encoder), ("--lr", args.lr)):
        if value is not None and row.table not in ("demo", "demo-notes"):
            given[flag] = value
    argv = [str(part) for pair in (given | {"--seed": seed}).items() for part in pair]
    argv += [row.control] * shuffled
    folder = Path(train.parse_args(argv).run_dir).name
    if row.table == "settings":
        folder = folder.replace(f"-s{seed}", f"-{row.name.replace('/', '-')}-s{seed}")
    return [*argv, "--run-dir", f"{args.runs}/{folder}"]


def run_folder(argv):
    return Path(argv[-1])


def other_run(argv):
    """In what a run that stands in the folder of these arguments differs from them, as text; "" if it does not."""
    folder = run_folder(argv)
    if not (folder / "config.json").exists():
        return ""
    asked = vars(train.parse_args(argv)) | {"run_format": RUN_FORMAT}
    if asked["notes"] and Path(asked["notes"]).is_file():
        asked["notes_sha256"] = hashlib.sha256(Path(asked["notes"]).read_bytes()).hexdigest()
    made, asked = (system_settings(config) for config in (read_config(folder), asked))
    made = {key: made.get(key) for key in asked} | {"precision": asked["precision"]}  # auto: it follows the machine
    return f"{folder} is another run, {', '.join(other.values())}" if (other := differing(made, asked, ("its", "this row's"))) else ""


def finished(argv):
    """Whether the run of these arguments stands in its folder whole."""
    folder = run_folder(argv)
    if not (folder / "config.json").exists() or (folder / "state.pt").exists() or other_run(argv):
        return False
    # Test is scored last, where there is a test file.
    splits = json.loads((folder / "config.json").read_text())["data"]
    return (folder / f"metrics-{'test' if 'test' in splits else 'valid'}.json").exists()


def lacks(row, argv):
    """What a row cannot be run without, in a few words, or ""."""
    asked = train.parse_args(argv)
    try:
        splits = load_dataset(row.dataset, asked.data_dir).examples
        if asked.fusion != "none":
            FeatureCache(asked.features)
    except (FileNotFoundError, ValueError) as error:
        return str(error).split(";")[0].split(":")[0]
    if asked.notes and not Path(asked.notes).is_file():
        return f"no notes file {asked.notes}"
    if "test" not in splits and row.reference:
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
    checked = [run_folder(argv) for argv in runs if row.control == "--shuffle-photos" and row.control not in argv]
    if checked := [folder for folder in checked if not list(folder.glob("image-check-*.json"))]:
        command = [sys.executable, str(PROJECT / "evaluate.py"), "--image-check", "--run", *map(str, checked)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ""


def shown_command(argv):
    return shlex.join(["python", "train.py", *argv])


# ------------------------------------------------------------------------------------------------------- results


def spread(values):
    """Mean ± standard deviation and n, as text; "" of nothing."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation} (n = {len(values)})"


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


def cells(row, args, reason):
    """{column: text} of one row."""
    true, wrong = done_folders(row, args), done_folders(row, args, shuffled=True) if row.control else []
    runs, notes = read_metrics(true), []
    made = {"row": row.name, "data": row.dataset}
    if row.reference:
        made["reference"] = " ".join(f"{value:.4f}" for value in row.reference)
        if row.reference[0] == MAJORITY[row.dataset]:
            notes.append("the reference equals always answering the majority label")
        elif row.reference[0] < MAJORITY[row.dataset]:
            notes.append("the reference lies below always answering the majority label")
        if len(row.reference) == 4 and row.reference[0] != row.reference[2]:
            notes.append("the reference is no weighted token score: its recall is not its accuracy")
    level = "row" if DATASETS[row.dataset][0] == "relation" else "token"
    count = len(row.reference) or 1
    made["ours"] = "; ".join(spread([m[level][metric] for _, m, _ in runs]) for metric in METRICS[:count]) if runs else ""
    made["main F1"] = spread([main_score(m) for _, m, _ in runs])
    if row.table in ("notes", "base", "few-shot", "demo-notes"):
        for part in ("seen", "unseen"):
            made[f"F1, mentions {part}"] = spread([m[f"entity_{part}"]["f1"] for _, m, _ in runs])
    made["main F1, trained on shuffled"] = spread([main_score(m) for _, m, _ in read_metrics(wrong)])
    shown = [json.loads(path.read_text()) for folder in true for path in folder.glob("image-check-*.json")]
    made["main F1, shown shuffled"] = spread([statistics.mean(map(main_score, c["shuffled"])) for c in shown])
    made["main F1, shown none"] = spread([main_score(c["none"]) for c in shown])
    majority = runs[0][1]["baseline"]["accuracy"] if runs else MAJORITY.get(row.dataset)
    made["majority"] = f"{majority:.4f}" if majority else ""
    if runs and runs[0][0] == "valid":
        notes.append("scored on valid, which also chose the epoch: no test file")
    if runs:
        _, _, config = runs[0]
        features = config["features_made"]
        photos = f", {features['backbone']} features of weights {features['weights']}" if features else ""
        notes.append(f"{config['data'][runs[0][0]]['variant']}, text encoder {Path(config['text_encoder']).name}{photos}")
    else:
        reason = reason or other_run(argument_list(row, args.seeds[0], args)) or "no finished run"
        notes.append(f"not run: {reason}")
    made["notes"] = "; ".join(notes)
    return made


def comparisons(rows, args):
    """Table cells that say, by paired bootstrap, what each row's photos or notes are worth: against wrong ones and without."""
    lines, by_name = [], {row.name: row for row in rows}  # of one table
    for row in rows:
        a = done_folders(row, args)
        others = {"trained on shuffled": done_folders(row, args, shuffled=True)} if row.control else {}
        if row.text_only in by_name and row.name != row.text_only:
            others["text only" if row.text_only.startswith("none") else row.text_only] = done_folders(by_name[row.text_only], args)
        for name, b in others.items():
            by_seed = [{folder.name.rpartition("-s")[2]: folder for folder in side} for side in (a, b)]
            both = [seed for seed in by_seed[0] if seed in by_seed[1]]
            if not both:
                continue
            sides = [[read_predictions(predictions_file(side[seed], None)) for seed in both] for side in by_seed]
            found = paired_bootstrap(*sides)
            cells = [f"{found[key]:.4f}" for key in ("a", "b")] + [f"{found['difference']:+.4f}"]
            interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
            lines.append([f"{row.name}, {row.dataset}", name, str(len(both)), *cells, interval, f"{found['p']:.4f}"])
    return lines


def made_with(rows, args):
    """What the finished runs were made with, each combination once."""
    said = set()
    for row in rows:
        for _, _, config in read_metrics(done_folders(row, args)):
            versions = config["versions"]
            said.add(f"torch {versions['torch']}, transformers {versions['transformers']}, {config['threads']} thread(s)"
                     f" of {config['device']}, {config['precision']}")  # fmt: skip
    return "; ".join(sorted(said)) or "no finished runs"


def latex(title, header, body):
    """A table as lines of LaTeX."""
    escaped = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$"}

    def line(parts):
        return " & ".join("".join(escaped.get(c, c) for c in part) for part in parts) + r" \\"

    columns = "l" * len(header)
    return [
        r"\begin{table}", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", line(header), r"\hline",
        *map(line, body), r"\hline", r"\end{tabular}", r"\end{table}", "",
    ]  # fmt: skip


def write_results(rows, reasons, args):
    """RESULTS.md, results.csv (one value a line) and results.tex from all finished runs."""
    text, tex, values = [INTRO.format(made_with(rows, args))], [], [["table", "row", "data set", "column", "value"]]
    for table, title in TITLES.items():
        mine = [row for row in rows if row.table == table]
        if table == "published":
            ours = {row.dataset: cells(row, args, "")["main F1"] for row in rows
                    if row.table == "fusion" and row.name == "film"}  # fmt: skip
            cited = {**PUBLISHED, "ours: roberta-resnet50, film": ours}
            made = [{"row": name} | {d: at.get(d) or "not run" for d in ("twitter2015", "twitter2017")}
                    for name, at in cited.items()]  # fmt: skip
        else:
            made = [cells(row, args, reasons.get(row.key, "")) for row in mine]
        keys = {key: None for cell in made for key in cell if any(cell.get(key) for cell in made)}
        header = [HEADINGS.get(key, key) for key in keys]
        body = [[str(cell.get(key, "")) for key in keys] for cell in made]
        text += [f"\n## {title}\n\n{NOTES[table]}\n", markdown(header), "|" + " --- |" * len(header), *map(markdown, body)]
        tex += latex(title, header, body)
        values += [[table, cell["row"], cell.get("data", ""), key, cell[key]] for cell in made for key in keys if cell.get(key)]
        if lines := comparisons(mine, args):
            header = ["A", "B", "seeds", "F1 of A", "F1 of B", "A - B", "95% interval", "p"]
            text += [f"\n{BOOTSTRAP}\n", markdown(header), "|" + " --- |" * len(header), *map(markdown, lines)]
        if mine:
            commands = dict.fromkeys(shown_command(argument_list(row, args.seeds[0], args)) for row in mine)
            text += ["\nCommands, first seed:\n", *(f"    {command}" for command in commands)]
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "RESULTS.md", "\n".join(text) + "\n")
    write_text(args.output / "results.tex", "\n".join(tex) + "\n")
    rows_of_csv = io.StringIO(newline="")
    csv.writer(rows_of_csv, lineterminator="\n").writerows(values)
    write_text(args.output / "results.csv", rows_of_csv.getvalue())
    print(f"{args.output}: RESULTS.md, results.csv, results.tex")


def plot_few_shot(rows, args):
    """few-shot.png: entity F1 on test, mean and deviation, over the share of the training posts, with notes and without."""
    runs = {(row.table, row.name): read_metrics(done_folders(row, args)) for row in rows if row.table in ("few-shot", "notes")}
    points = {extra: [(share, runs.get((table, name))) for share, table, name in
                      ((10, "few-shot", f"{extra}, 10%"), (30, "few-shot", f"{extra}, 30%"), (100, "notes", extra))]
              for extra in ("none", "post")}  # fmt: skip
    if not all(made for curve in points.values() for _, made in curve):
        return
    import matplotlib  # a requirement of this part alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for extra, label in (("none", "text only"), ("post", "and notes on the post")):
        scores = [[main_score(metrics) for _, metrics, _ in made] for _, made in points[extra]]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0 for values in scores]
        axes.errorbar([share for share, _ in points[extra]], list(map(statistics.mean, scores)), spreads, fmt="o-", capsize=3, label=label)
    axes.set(xscale="log", xlabel="training posts of Twitter-2017, %", ylabel="test entity F1", xticks=(10, 30, 100), xticklabels=("10", "30", "100"))
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(args.output / "few-shot.png", dpi=120)


def markdown(parts):
    return "| " + " | ".join(parts) + " |"


HEADINGS = {
    "data": "data set", "reference": "reference: accuracy [precision recall F1]", "ours": "ours: accuracy [precision recall F1] of tokens or rows",
    "main F1": "ours: entity F1 (relations: micro F1 without None)",
    "F1, mentions seen": "of mentions that train has", "F1, mentions unseen": "of those it has not",
    "main F1, trained on shuffled": "entity F1 (relations: micro), trained on others' photos or notes",
    "main F1, shown shuffled": "the same, only shown others' photos", "main F1, shown none": "the same, shown no photo",
    "majority": "accuracy of always answering the majority label", "twitter2015": "Twitter-2015", "twitter2017": "Twitter-2017",
}  # fmt: skip
BOOTSTRAP = (
    "Paired bootstrap over test posts (photos for relations), 10,000 resamples, entity F1 (relations: micro F1 without"
    " None), the same seeds on both sides:"
)
INTRO = """# Results

Written by `benchmarks/tables.py` from finished runs; mean ± standard deviation over seeds. Token and row scores include
`O` and `None` and stand beside the accuracy of always answering the majority label; the F1 that tells systems apart is
the one of whole entities, or of relations without `None`. The best epoch is chosen on valid, test is scored once.

Made with {}."""


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    add("--only", nargs="+", default=[""], help="rows of which a part of TABLE/NAME/DATASET begins so")
    add("--dry-run", action="store_true", help="show the commands and what is finished; run and write nothing")
    add("--controls", action=argparse.BooleanOptionalAction, default=True, help="train on shuffled photos too")
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
        plot_few_shot(rows, args)


if __name__ == "__main__":
    command_line(main)
