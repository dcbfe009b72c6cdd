"""Scores of finished runs or of bare files of predictions, and the checks that tell whether to trust them.

    python evaluate.py --run runs/twitter2017-roberta-resnet50-film-s1337
    python evaluate.py --run runs/demo-* --image-check
    python evaluate.py --compare 'runs/demo-film-s*' 'runs/demo-none-s*'
    python evaluate.py --table 'runs/mine-*' --by fusion_lr --baseline 'runs/mine-none-s*'
    python evaluate.py --ensemble 'runs/demo-film-s*'
    python evaluate.py --predictions theirs.txt
    python evaluate.py --image-check --predictions true.jsonl --shuffled a.jsonl b.jsonl --none none.jsonl
    python evaluate.py --leak-check twitter2017 --notes notes.jsonl
    python evaluate.py --photo-probe twitter2017 --features FILE
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import contextlib
import csv
import statistics
import sys
from pathlib import Path

from data import read_ner
from features import FeatureCache
from parts.boxes import boxes_of
from parts.checks import FEWEST, SCORES, check_row, checked_photos, ensemble, image_check, leak_check
from parts.checks import note_leaks, paired_bootstrap, photo_verdict, score_title, type_changes, verdict
from parts.console import bounded, command_line, dataset_name
from parts.datasets import load_dataset
from parts.feature_photos import require_photos
from parts.files import check_output, write_json
from parts.model_card import add_check
from parts.notes import Notes
from parts.photos import find_photos, image_folders
from parts.processes import check_device, default_device
from parts.report_data import image_check_line
from parts.run_files import find_run, predictions_file, read_config, read_object
from parts.run_table import latex, run_table, seeds_of, write_figure
from parts.scores import format_scores, gold_fingerprint, main_score, mentions, read_predictions, score
from parts.scores import seen_spans

# ---------------------------------------------------------------------------------------------- several runs


def read_runs(pattern, split):
    """(name, [records of a run]) of the runs of one system, as `seeds_of` takes it."""
    folders = seeds_of(pattern)
    name = next(iter(folders.values())).name
    if len(folders) > 1:
        name = f"{Path(pattern).name} (seeds {' '.join(map(str, folders))})"
    return name, [read_predictions(predictions_file(folder, split)) for folder in folders.values()]


def compare(pattern_a, pattern_b, split, score_name):
    """Print whether runs A are better than runs B on a score, and by how much."""
    (a, a_runs), (b, b_runs) = read_runs(pattern_a, split), read_runs(pattern_b, split)
    result = paired_bootstrap(a_runs, b_runs, score_name)
    relations = not isinstance(a_runs[0][0]["gold"], list)
    if len(a_runs) != len(b_runs):
        print(f"WARNING: {len(a_runs)} runs of A against {len(b_runs)} of B: the mean over more seeds is the"
              " steadier one")  # fmt: skip
    width = max(len(a), len(b))
    print(score_title(score_name, relations))
    for side, name in (("A", a), ("B", b)):
        value, seeds = result[side.lower()], result[f"{side.lower()}_seeds"]
        spread = f" ± {statistics.stdev(seeds):.4f} (n = {len(seeds)})" if len(seeds) > 1 else ""
        print(f"  {side}  {name:<{width}}  {value:.4f}{spread}")
    units = f"{result['units']} {'photos' if relations else 'posts'}, {result['resamples']} resamples"
    print(f"  A - B  {shown_difference(result)}, p = {result['p']:.4f} (paired bootstrap over {units})")
    if result["low"] <= 0 <= result["high"]:
        print("  the interval holds 0: these posts do not tell A from B")
    if len(a_runs) == len(b_runs) == 1:
        print("  one seed against one seed: what another seed would change is in no part of this interval (a"
              " standard deviation of 0.005 to 0.010 on Twitter-2017); train three of each")  # fmt: skip
    else:
        print("  seeds are averaged, not resampled: the interval is that of other posts, not of other seeds")


def shown_difference(result):
    """A difference of `paired_bootstrap` and its interval, as text."""
    return f"{result['difference']:+.4f}, 95% interval {result['low']:+.4f} to {result['high']:+.4f}"


def print_table(args):
    """Print the table of many runs, as text, CSV or LaTeX, and draw it where --png asks for a picture."""
    table = run_table(args.table, args.by or (), args.score, args.baseline)
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(table.csv_rows())
    elif args.tex:
        print(*latex(table.title, *table.cells()), *(f"% {note}" for note in table.notes), sep="\n")
    else:
        print(*table.lines(), sep="\n")
    if args.png:
        write_figure(table, args.png)
        print(f"{args.png}: written", file=sys.stderr)


def print_ensemble(args):
    """Print the scores of the mean of several runs' probabilities, beside those of each run."""
    folders = seeds_of(args.ensemble)
    if len(folders) < 2:
        raise ValueError(f"{args.ensemble}: one run; an ensemble is of two or more, as 'runs/NAME-s*'")
    paths = {seed: predictions_file(folder, args.split) for seed, folder in folders.items()}
    split = next(iter(paths.values())).stem.removeprefix("predictions-")
    alone = [read_predictions(path) for path in paths.values()]
    records = ensemble(list(folders.values()), split, args.device, **places(args))
    metrics = score(records)
    seeds = f"{args.ensemble}, seeds {' '.join(map(str, folders))}"
    print(format_scores(metrics, f"ensemble of {len(folders)} runs, {split} ({seeds})"))
    values = [main_score(score(run)) for run in alone]
    print(f"each alone: {' '.join(f'{value:.4f}' for value in values)}, mean {statistics.mean(values):.4f}"
          f" ± {statistics.stdev(values):.4f}")  # fmt: skip
    result = paired_bootstrap([records], alone)
    print(f"ensemble - mean of each alone {shown_difference(result)} (paired bootstrap)")
    print("one ensemble: what other seeds would change is not in that interval; its use of photos was not"
          " checked, --image-check is of single runs")  # fmt: skip


# ------------------------------------------------------------------------------------------------------ leaks


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
        train, scored = (share(counts[name]["gold"]) for name in ("train", split))
        unseen = f", of those not in train {share(counts[split]['unseen'])}" if dataset.task == "ner" else ""
        print(f"{what} stand in {key}: train {train}; {split} {scored}{unseen}")
    print(f"  a language model may have seen these data: where a share is near 1, or higher on {split} than"
          " on train, scores with such notes tell nothing about a model that never saw them")  # fmt: skip


def print_leaks(args):
    """Print how much of the labels metadata alone gives away, and how much of the gold a file of notes."""
    data_dir = args.data_dir or "data"
    dataset = load_dataset(args.leak_check, data_dir)
    split = args.split or ("test" if "test" in dataset.examples else "valid")
    if split not in dataset.examples:
        raise ValueError(f"{args.leak_check} has no {split} file")
    if args.notes:
        print_note_leaks(dataset, split, args.notes)
    try:
        folders = image_folders(args.leak_check, data_dir, args.images)
    except FileNotFoundError as error:
        if args.images:
            raise
        print(f"no photos looked at: {error}")
        folders = []
    ids = dataset.image_ids()
    count = sum(path is not None for path in find_photos(ids, folders).values())
    little = "" if count > len(ids) / 2 else ": the photos' column tells little or nothing"
    print(f"{count} of {len(ids)} photos found{little}")
    boxes = None
    if args.boxes:
        boxes = {name: found.count if found else 0 for name, found in boxes_of(args.boxes, ids).items()}
    leaks = leak_check(dataset, split, folders, boxes)
    if not leaks:
        print(f"nothing to tell: each type and relation has fewer than {FEWEST} posts with it, or without"
              f" it, in train or {split}")  # fmt: skip
        return
    width = max([12, *map(len, leaks)])
    print(f"{dataset.name}: what metadata alone tells, learned on train, AUC on {split} with 95% interval;"
          " 0.5 = nothing")  # fmt: skip
    print(f"{'':<{width}} posts  photo's files    text length")
    for target, leak in leaks.items():
        photo, text = (f"{area:.3f} ±{half:.3f}" for area, half in (leak["photo"], leak["text"]))
        cells = f"{photo if count or boxes else '-':<12}   {text}"
        print(f"{target:<{width}} {leak['posts']:5d}   {cells}")
    for target, leak in leaks.items():
        if leak["photo"][0] - leak["photo"][1] > 0.55:
            known = "files and boxes" if boxes else "files"
            print(f"WARNING: {target!r} can be told from the photo's {known} without looking at them: AUC"
                  f" {leak['photo'][0]:.3f}, most by {leak['column'][0]}")  # fmt: skip


# ------------------------------------------------------------------------------------------------ photo probe


def print_probe(args):
    """Print what linear models on frozen states answer from the text, the photo and both."""
    from parts.probe import photo_probe, probe_verdict  # scikit-learn takes a second to load

    dataset, cache = load_dataset(args.photo_probe, args.data_dir or "data"), FeatureCache(args.features)
    split = args.split or ("test" if "test" in dataset.examples else "valid")
    require_photos(cache, dataset.image_ids(), dataset.name)
    source = args.text_encoder or "bert-base-uncased"
    result = photo_probe(dataset, cache, source, split, args.device)
    what = "gold mentions, their types" if dataset.task == "ner" else "pairs, their relations"
    print(f"{dataset.name} {split}: {result['units']} {what}; {result['photos']} with a photo;"
          f" {result['lost']} left out, beyond what {source} reads")  # fmt: skip
    print(f"accuracy of a linear model on frozen states, its penalty chosen on valid ({cache.path})")
    print(f"  always train's most frequent answer  {result['majority']:.4f}")
    titles = {"photo": "photo", "text": "text", "both": "text and photo"}
    titles["control"] = "text and another's photo"
    for name, title in titles.items():
        print(f"  {title:<36} {result[name]:.4f}")
    for name, title in (("gain", "photo over text"), ("control_gain", "another's photo over text")):
        print(f"  {title:<26} {shown_difference(result[name])}")
    print(f"  {probe_verdict(result)}")


# ------------------------------------------------------------------------------------------- runs and files


def store(path, scores):
    """Write scores that are printed already; where that cannot be, in a read-only folder for one, say so.

    Returns whether they were written.
    """

    def ours(path):
        with contextlib.suppress(ValueError):
            return not {"gold_fingerprint", "shuffled"}.isdisjoint(read_object(path))
        return False

    try:
        check_output(path, ours=ours)
        write_json(path, scores)
        return True
    except (OSError, ValueError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"    not stored: {reason}", flush=True)
    return False


def places(args):
    """Where the files of a run are now, as `open_run` takes it."""
    return {key: getattr(args, key) for key in ("data_dir", "features", "notes", "generated")}


def score_run(run, split):
    """Print and store the scores of a run."""
    path, config = predictions_file(run, split), read_config(run)
    split = path.stem.removeprefix("predictions-")
    data = config["data"][split]
    about = [data["variant"], data["sha256"][:16]]
    for kind in ("photos", "notes"):
        if config[f"shuffle_{kind}"]:
            about.append(f"TRAINED AND SCORED WITH OTHER POSTS' {kind.upper()}")
    metrics = score(read_predictions(path)) | {"data": data}
    print(format_scores(metrics, f"{run.name} {split} ({', '.join(about)})"))
    store(run / f"metrics-{split}.json", metrics)


def check_heading(width):
    """Print the two lines above `check_row`."""
    print(f"{'':<{width}}   entity F1 (micro without None)   token (row) accuracy, weighted recall")
    print(f"{'photos shown':<{width}}   true   shuffled      none    true   shuffled      none")


def check_runs(args):
    """Print and store what runs do with true, others' and no photos."""
    width = max(len(run.name) for run in args.run)
    check_heading(width + 7)
    for run in args.run:
        path, config = predictions_file(run, args.split), read_config(run)
        split = path.stem.removeprefix("predictions-")
        check = image_check(run, split, args.shuffles, args.device, **places(args))
        print(check_row(f"{run.name:<{width}}  {split:<5}", check))
        print(f"    {verdict(config, check)}", flush=True)
        if check["photos"]:
            print(f"    {type_changes(check)}", flush=True)
        if store(run / f"image-check-{split}.json", check):
            add_check(run, split, image_check_line(config, check))


def read_file(path):
    """The records of a file of predictions; what was changed on reading is printed."""
    notes = []
    records = read_predictions(path, notes)
    for note in notes:
        print(f"{path}: {note}")
    return records


def check_files(true_path, shuffled_paths, none_path):
    """Print and store what anybody's model does with true, others' and no photos, from its predictions."""
    true, none, *shuffled = (read_file(path) for path in (true_path, none_path, *shuffled_paths))
    answers, gold = {record["id"]: record["predicted"] for record in true}, gold_fingerprint(true)
    for path, records in zip((none_path, *shuffled_paths), (none, *shuffled), strict=True):
        others = {record["id"]: record["predicted"] for record in records}
        if others.keys() != answers.keys() or gold_fingerprint(records) != gold:
            raise ValueError(f"{path}: not the posts and gold labels of {true_path}; predict the same split")
        if others == answers:
            print(f"WARNING: {path}: each answer is that of {true_path}; was the model shown other photos?")
    photos = len({record.get("image_id") or record["id"] for record in true})
    check = checked_photos(true, shuffled, none, photos)
    check_heading(len(true_path.name))
    print(check_row(true_path.name.ljust(12), check))
    print(f"    {photo_verdict(check)}")
    print(f"    {type_changes(check)}")
    store(true_path.with_name(true_path.name + ".image-check.json"), check)


def score_file(path, train):
    """Print and store the scores of a file of predictions; `train`: its training file, or None."""
    records = read_file(path)
    if train:
        if not all("words" in record and isinstance(record["gold"], list) for record in records):
            raise ValueError(f"{path}: has no words or no entities, so --train cannot tell mentions apart")
        notes = []
        known = mentions(read_ner(train, None, notes))
        for note in notes:
            print(f"{train}: {note}")
        records = [record | {"seen": seen_spans(record["words"], known)} for record in records]
    metrics = score(records)
    print(format_scores(metrics, f"{path} (gold {metrics['gold_fingerprint']})"))
    store(path.with_name(path.name + ".metrics.json"), metrics)


# ------------------------------------------------------------------------------------------------------- main


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    what = parser.add_mutually_exclusive_group(required=True)
    add = what.add_argument
    add("--run", nargs="+", type=find_run, help="scores of runs of train.py: folders, or USER/NAME at a hub")
    add("--predictions", type=Path, metavar="FILE", help="of a file: JSON lines, or 'word gold predicted'")
    add("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="paired bootstrap; of seeds 'runs/NAME-s*'")
    add("--table", nargs="+", metavar="RUNS", help="many runs: seeds averaged, the best on valid marked")
    add("--ensemble", metavar="RUNS", help="the mean of the probabilities of 'runs/NAME-s*'")
    add("--leak-check", type=dataset_name, metavar="DATASET", help="what metadata alone tells of its labels")
    add("--photo-probe", type=dataset_name, metavar="DATASET",
        help="whether photos tell more than the text, before any training (minutes)")
    add = parser.add_argument
    add("--split", choices=("test", "valid"), help="of runs and data sets (default: test if there is one)")
    add("--score", choices=SCORES, help="of --compare, --table (default: f1, of entities or without None)")
    add("--train", type=Path, metavar="FILE", help="of --predictions: to tell mentions seen in it apart"
        " (default: none)")
    add("--text-encoder", help="of --photo-probe: hub name or local folder (default: bert-base-uncased)")
    add = parser.add_argument_group("image check").add_argument
    add("--image-check", action="store_true", help="--run or --predictions with true, others', no photos")
    add("--shuffles", type=bounded(int, 1), metavar="N", help="of --run: seeded shuffles (default: 3)")
    add("--shuffled", nargs="+", type=Path, metavar="FILE", help="of --predictions: made with others' photos"
        " (default: none)")
    add("--none", type=Path, metavar="FILE", help="of --predictions: made without (default: none)")
    add = parser.add_argument_group("table").add_argument
    add("--by", nargs="+", metavar="SETTING", help="swept: mark its best for each of the others"
        " (default: all)")
    add("--baseline", metavar="RUNS", help="the gain over these runs, with its interval (default: none)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--csv", action="store_true", help="of --table: print CSV (default: text)")
    look.add_argument("--tex", action="store_true", help="of --table: print LaTeX (default: text)")
    look.add_argument("--png", type=Path, metavar="FILE", help="of --table: a picture too (default: none)")
    add = parser.add_argument_group("where things are (default: where the run was trained)").add_argument
    add("--data-dir", metavar="DIR", help="of the data sets (default for --leak-check: data)")
    add("--features", metavar="FILE", help="the run's features")
    add("--generated", metavar="FILE", help="the run's features of second pictures")
    add("--notes", metavar="FILE", help="the run's notes; of --leak-check: notes to look for labels in")
    add("--boxes", metavar="FILE", help="of --leak-check: boxes, as extract_features.py takes them")
    add("--images", metavar="DIR", help="of --leak-check: the photos (default: as docs/DATA.md says)")
    add("--device", default=default_device(), help="that runs the model (default: %(default)s here)")
    # fmt: on
    args = parser.parse_args(argv)
    runs_model = (args.run and args.image_check) or args.ensemble
    files = args.predictions and args.image_check
    models = "--image-check of a run, --ensemble"
    for name, goes, use in (
        ("image_check", args.run or args.predictions, "--run or --predictions"),
        ("train", args.predictions and not args.image_check, "--predictions: runs know what train holds"),
        ("split", not args.predictions and not args.table, "one split of runs and data sets"),
        ("score", args.compare or args.table, "--compare or --table"),
        ("shuffles", args.run and args.image_check, "--run and --image-check"),
        ("shuffled", files, "--image-check --predictions"), ("none", files, "--image-check --predictions"),
        ("by", args.table, "--table"), ("baseline", args.table, "--table"),
        ("csv", args.table, "--table"), ("tex", args.table, "--table"), ("png", args.table, "--table"),
        ("features", runs_model or args.photo_probe, f"{models} or --photo-probe"),
        ("generated", runs_model, models), ("text_encoder", args.photo_probe, "--photo-probe"),
        ("images", args.leak_check, "--leak-check"), ("boxes", args.leak_check, "--leak-check"),
        ("notes", runs_model or args.leak_check, f"{models} or --leak-check"),
        ("data_dir", runs_model or args.leak_check or args.photo_probe,
         f"{models}, --leak-check or --photo-probe"),
    ):  # fmt: skip
        if getattr(args, name) and not goes:
            parser.error(f"--{name.replace('_', '-')} goes with {use}")
    if files and not (args.shuffled and args.none):
        parser.error("--image-check --predictions FILE needs --shuffled FILE ... and --none FILE")
    if args.photo_probe and not args.features:
        parser.error("--photo-probe needs --features FILE, of extract_features.py")
    args.score, args.shuffles = args.score or "f1", args.shuffles or 3
    return args


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    if args.compare:
        compare(*args.compare, args.split, args.score)
    elif args.table:
        print_table(args)
    elif args.ensemble:
        print_ensemble(args)
    elif args.leak_check:
        print_leaks(args)
    elif args.photo_probe:
        print_probe(args)
    elif args.predictions and args.image_check:
        check_files(args.predictions, args.shuffled, args.none)
    elif args.predictions:
        score_file(args.predictions, args.train)
    elif args.image_check:
        check_runs(args)
    else:
        for run in args.run:
            score_run(run, args.split)


if __name__ == "__main__":
    command_line(main)
