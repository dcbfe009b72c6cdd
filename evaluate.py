"""Scores of a finished run or of a bare file of predictions, and the checks that tell whether to trust them.

    python evaluate.py --run runs/twitter2017-roberta-resnet50-film-s1337
    python evaluate.py --predictions theirs.txt
    python evaluate.py --run runs/demo-* --image-check
    python evaluate.py --compare 'runs/demo-bert-resnet50-film-s*' 'runs/demo-bert-resnet50-none-s*'
    python evaluate.py --leak-check mnre
    python evaluate.py --leak-check twitter2017 --notes notes.jsonl
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import contextlib
import glob
import statistics
from pathlib import Path

from data import read_ner
from parts.checks import FEWEST, SCORES, check_row, image_check, leak_check, note_leaks, paired_bootstrap
from parts.checks import type_changes, verdict
from parts.console import bounded, command_line, dataset_name
from parts.datasets import load_dataset
from parts.files import check_output, write_json
from parts.notes import Notes
from parts.photos import find_photos, image_folders
from parts.processes import check_device, default_device
from parts.run_files import predictions_file, read_config, read_object
from parts.runs import differing, system_settings
from parts.scores import format_scores, mentions, read_predictions, score, seen_spans


def read_runs(pattern, split):
    """(name, [records of a run]) of a run folder, or of all that a quoted pattern such as 'runs/x-s*' names.

    A pattern without "shuffled" in it leaves runs on shuffled photos or notes out: '-s*' begins their names
    too. ValueError if the runs differ in more than seed, paths and machine.
    """
    folders = [Path(pattern)] if Path(pattern).is_dir() else sorted(map(Path, glob.glob(pattern)))
    if len(folders) != 1 and "shuffled" not in Path(pattern).name:
        made = {folder: read_config(folder) for folder in folders}
        folders = [
            folder
            for folder, config in made.items()
            if not (config["shuffle_photos"] or config["shuffle_notes"])
        ]
    if not folders:
        raise FileNotFoundError(f"{pattern}: no such run folder")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        if other := differing(system_settings(configs[0]), system_settings(config)):
            raise ValueError(
                f"{pattern}: {folders[0].name} and {folder.name} differ in {', '.join(other.values())[:300]};"
                " name runs of one kind"
            )
    seeds = " ".join(str(config["seed"]) for config in configs)
    name = f"{Path(pattern).name} (seeds {seeds})" if len(folders) > 1 else folders[0].name
    return name, [read_predictions(predictions_file(folder, split)) for folder in folders]


def compare(pattern_a, pattern_b, split, name):
    """Print whether runs A are better than runs B on the score called `name`, and by how much."""
    (a, a_runs), (b, b_runs) = read_runs(pattern_a, split), read_runs(pattern_b, split)
    found = paired_bootstrap(a_runs, b_runs, name)
    relations = not isinstance(a_runs[0][0]["gold"], list)
    what = {
        "f1": "micro F1 without None" if relations else "entity F1, micro",
        "strict-f1": "entity F1, strict IOB2",
        "accuracy": "row accuracy" if relations else "token accuracy",
        "weighted-f1": f"weighted F1 of {'rows' if relations else 'tokens'}",
    }[name]
    if len(a_runs) != len(b_runs):
        print(
            f"WARNING: {len(a_runs)} runs of A against {len(b_runs)} of B: the mean over more seeds is the"
            " steadier one"
        )
    width = max(len(a), len(b))
    print(what)
    for side, name in (("A", a), ("B", b)):
        value, seeds = found[side.lower()], found[f"{side.lower()}_seeds"]
        spread = f" ± {statistics.stdev(seeds):.4f} (n = {len(seeds)})" if len(seeds) > 1 else ""
        print(f"  {side}  {name:<{width}}  {value:.4f}{spread}")
    units = f"{found['units']} {'photos' if relations else 'posts'}, {found['resamples']} resamples"
    print(
        f"  A - B  {found['difference']:+.4f}, 95% interval {found['low']:+.4f} to {found['high']:+.4f},"
        f" p = {found['p']:.4f} (paired bootstrap over {units})"
    )
    if found["low"] <= 0 <= found["high"]:
        print("  the interval holds 0: these posts do not tell A from B")
    if len(a_runs) == len(b_runs) == 1:
        print("  one seed against one seed: what another seed would change is in no part of this interval (a"
              " standard deviation of 0.005 to 0.010 on Twitter-2017); train three of each")  # fmt: skip
    else:
        print("  seeds are averaged, not resampled: the interval is that of other posts, not of other seeds")


def print_note_leaks(dataset, split, path):
    """Print how much of the gold stands in the notes of a file."""
    notes = Notes(path)
    print(*notes.coverage(dataset.examples), sep="\n")
    leaks = note_leaks(dataset, split, notes)
    if not leaks:
        print("no about_post and no about_photo in it: nothing to look for labels in")
        return

    def share(counts):
        standing, count = counts
        return f"{standing} of {count}" + (f" ({standing / count:.1%})" if count else "")

    what = "gold mentions" if dataset.task == "ner" else "rows whose head and tail both"
    for key, counts in leaks.items():
        unseen = f", of those not in train {share(counts[split]['unseen'])}" * (dataset.task == "ner")
        train, scored = (share(counts[name]["gold"]) for name in ("train", split))
        print(f"{what} stand in {key}: train {train}; {split} {scored}{unseen}")
    print(f"  a language model may have seen these data: where a share is near 1, or higher on {split} than"
          " on train, scores with such notes tell nothing about a model that never saw them")  # fmt: skip


def print_leaks(name, split, data_dir, images, notes):
    """Print how much of the labels metadata alone gives away, and how much of the gold a file of `notes`."""
    dataset = load_dataset(name, data_dir)
    split = split or ("test" if "test" in dataset.examples else "valid")
    if split not in dataset.examples:
        raise ValueError(f"{name} has no {split} file")
    if notes:
        print_note_leaks(dataset, split, notes)
    try:
        folders = image_folders(name, data_dir, images)
    except FileNotFoundError as error:
        if images:
            raise
        print(f"no photos looked at: {error}")
        folders = []
    ids = dataset.image_ids()
    found = sum(path is not None for path in find_photos(ids, folders).values())
    little = "" if found > len(ids) / 2 else ": the photos' column tells little or nothing"
    print(f"{found} of {len(ids)} photos found{little}")
    leaks = leak_check(dataset, split, folders)
    if not leaks:
        print(
            f"nothing to tell: each type and relation has fewer than {FEWEST} posts with it, or without it,"
            f" in train or {split}"
        )
        return
    width = max([12, *map(len, leaks)])
    print(
        f"{dataset.name}: what metadata alone tells, learned on train, AUC on {split} with 95% interval; 0.5"
        " = nothing"
    )
    print(f"{'':<{width}} posts  photo's files    text length")
    for target, leak in leaks.items():
        photo, text = (f"{area:.3f} ±{half:.3f}" for area, half in (leak["photo"], leak["text"]))
        cells = f"{photo if found else '-':<12}   {text}"
        print(f"{target:<{width}} {leak['posts']:5d}   {cells}")
    for target, leak in leaks.items():
        if leak["photo"][0] - leak["photo"][1] > 0.55:
            print(f"WARNING: {target!r} can be told from the photo's files without looking at them: AUC"
                  f" {leak['photo'][0]:.3f}, most by {leak['column'][0]}")  # fmt: skip


def store(path, scores):
    """Write scores that are printed already; where that cannot be, in a read-only folder for one, say so."""

    def ours(path):
        with contextlib.suppress(ValueError):
            return not {"gold_fingerprint", "shuffled"}.isdisjoint(read_object(path))
        return False

    try:
        check_output(path, ours=ours)
        write_json(path, scores)
    except (OSError, ValueError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"    not stored: {reason}", flush=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", nargs="+", type=Path, help="run folders of train.py")
    what.add_argument("--predictions", type=Path, help="JSON lines as train.py writes, or CoNLL 'word gold"
                                                       " predicted'")
    what.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="paired bootstrap; several"
        " seeds of each as a quoted pattern, 'runs/NAME-s*'")
    what.add_argument("--leak-check", type=dataset_name, metavar="DATASET", help="what metadata alone tells"
        " of its labels")
    add("--split", choices=("test", "valid"), help="default: test where there is one, else valid")
    add("--train", type=Path, help="for --predictions: the training file, to tell mentions seen in it from"
                                   " others")
    add("--score", choices=SCORES, help="for --compare: f1 (default) is entity F1, or micro F1 without None")
    add("--image-check", action="store_true", help="scores with true, shuffled and no photos (runs the"
                                                   " model)")
    add("--shuffles", type=bounded(int, 1), help="for --image-check: how many seeded shuffles (default: 3)")
    add("--data-dir", help="for --image-check: where the data sets are now (default: where the run was"
                           " trained), and for --leak-check (default: data)")
    add("--images", help="for --leak-check: folder of the photos, where it is not in a usual place under"
                         " --data-dir")
    add("--features", help="for --image-check: where the run's feature file is now")
    add("--generated", help="for --image-check: where the run's feature file of second pictures is now")
    add("--notes", help="for --image-check: where the run's notes are now; for --leak-check: notes to look"
                        " for labels in")
    add("--device", default=default_device(), help="for --image-check")
    # fmt: on
    args = parser.parse_args(argv)
    for name, goes, use in (
        ("image_check", args.run, "--run: it shows the model other photos"),
        ("train", args.predictions, "--predictions: a run's own know what train holds"),
        ("split", not args.predictions, "runs and data sets: --predictions is one file"),
        ("score", args.compare, "--compare"), ("shuffles", args.image_check, "--image-check"),
        ("features", args.image_check, "--image-check"), ("generated", args.image_check, "--image-check"),
        ("images", args.leak_check, "--leak-check"),
        ("notes", args.image_check or args.leak_check, "--image-check or --leak-check"),
        ("data_dir", args.image_check or args.leak_check, "--image-check or --leak-check"),
    ):  # fmt: skip
        if getattr(args, name) and not goes:
            parser.error(f"--{name.replace('_', '-')} goes with {use}")
    args.score, args.shuffles = args.score or "f1", args.shuffles or 3
    return args


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    if args.compare:
        return compare(*args.compare, args.split, args.score)
    if args.leak_check:
        return print_leaks(args.leak_check, args.split, args.data_dir or "data", args.images, args.notes)
    if args.predictions:
        notes = []
        records = read_predictions(args.predictions, notes)
        print(*(f"{args.predictions}: {note}\n" for note in notes), sep="", end="")
        if args.train:
            if not all("words" in record and isinstance(record["gold"], list) for record in records):
                raise ValueError(
                    f"{args.predictions}: has no words or no entities, so --train cannot tell mentions apart"
                )
            notes = []
            known = mentions(read_ner(args.train, None, notes))
            print(*(f"{args.train}: {note}\n" for note in notes), sep="", end="")
            records = [record | {"seen": seen_spans(record["words"], known)} for record in records]
        metrics = score(records)
        print(format_scores(metrics, f"{args.predictions} (gold {metrics['gold_fingerprint']})"))
        return store(args.predictions.with_name(args.predictions.name + ".metrics.json"), metrics)
    width = max(len(run.name) for run in args.run)
    if args.image_check:
        print(f"{'':<{width + 7}}   entity F1 (micro without None)   token (row) accuracy, weighted recall")
        print(f"{'photos shown':<{width + 7}}   true   shuffled      none    true   shuffled      none")
    for run in args.run:
        path, config = predictions_file(run, args.split), read_config(run)
        split = path.stem.removeprefix("predictions-")
        if args.image_check:
            now = {key: getattr(args, key) for key in ("data_dir", "features", "notes", "generated")}
            check = image_check(run, split, args.shuffles, args.device, **now)
            print(check_row(f"{run.name:<{width}}  {split:<5}", check))
            print(f"    {verdict(config, check)}", flush=True)
            if check["photos"]:
                print(f"    {type_changes(check)}", flush=True)
            store(run / f"image-check-{split}.json", check)
            continue
        made = config["data"][split]
        metrics = score(read_predictions(path)) | {"data": made}
        shuffled = ", TRAINED AND SCORED WITH OTHER POSTS' PHOTOS" * bool(config["shuffle_photos"])
        shuffled += ", TRAINED AND SCORED WITH OTHER POSTS' NOTES" * config["shuffle_notes"]
        scored = f"{made['variant']}, {made['sha256'][:16]}{shuffled}"
        print(format_scores(metrics, f"{run.name} {split} ({scored})"))
        store(run / f"metrics-{split}.json", metrics)


if __name__ == "__main__":
    command_line(main)
