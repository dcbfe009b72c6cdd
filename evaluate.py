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
import json
import statistics
from pathlib import Path

import torch

from data import load_dataset, read_ner
from encoding import length_batches, to_device
from parts.checks import FEWEST, SCORES, leak_check, note_leaks, paired_bootstrap
from parts.console import autocast, bounded, check_device, command_line, dataset_name, default_device, fit_threads
from parts.console import precision_on
from parts.console import progress_bar
from parts.files import check_output, write_json
from parts.notes import Notes
from parts.opening import open_run, shuffled_photos
from parts.photos import find_photos, image_folders
from parts.runs import differing, read_config, system_settings
from parts.scores import format_scores, mentions, read_predictions, score, seen_spans

# ------------------------------------------------------------------------------------------------ predictions


def predict(model, posts, labels, batch_size, device, precision, known=(), name=""):
    """Predictions for `Posts`, one record a post, in their order.

    `known`: the `mentions` of train. `name`: what a progress bar over the posts is called; none without. A
    word the model has no state for (cut off, or no sub-token) is answered `O` with probability null.
    """
    model.eval()
    records = [None] * len(posts)
    bar = progress_bar(len(posts), "post", True, desc=name, disable=not name)
    with bar, torch.inference_mode(), autocast(device, precision):
        for chosen in length_batches(posts.lengths(), batch_size):
            best, probability = model.answer(to_device(posts.batch(chosen), device))
            for i, answer, chance in zip(chosen, best.tolist(), probability.tolist(), strict=True):
                records[i] = record_of(posts, i, answer, chance, labels, known)
            bar.update(len(chosen))
    return records


def record_of(posts, i, answer, chance, labels, known):
    """What is kept of the prediction for post `i`.

    `answer`: label indices of its words, or one index; `chance`: their probabilities.
    """
    example, (photo, row) = posts.examples[i], posts.shown(i)
    record = {"id": example.id, "image_id": example.image_id, "words": list(example.words)}
    if posts.cache is not None:
        record["photo"] = photo is not None and posts.cache.has_photo(photo)
    if posts.generated is not None:
        record["generated"] = posts.generated.has_photo(example.image_id)
    if posts.notes is not None and posts.notes.segments:
        record["extra"] = "text_length" in row
    if posts.notes is not None and posts.notes.relevance:
        record["relevance"] = row.get("relevance")  # the one given, None where none is
    if "word_starts" not in row:
        record |= {"head": list(example.head), "tail": list(example.tail), "gold": example.label}
        return record | {"predicted": labels[answer], "probability": round(chance, 6)}
    reached = [start >= 0 for start in row["word_starts"]]
    words = list(zip(reached, answer, chance, strict=False))  # the batch is as wide as its longest post
    record["gold"] = list(example.labels)
    record["predicted"] = [labels[k] if ok else "O" for ok, k, _ in words]
    record["probability"] = [round(p, 6) if ok else None for ok, _, p in words]
    return record | {"seen": seen_spans(record["words"], known)}


# ------------------------------------------------------------------------------------------------ image check


def image_check(run_dir, split, shuffles, device, **now):
    """Scores of a run on `split` with true, shuffled (several seeds) and no photos, and how many there are.

    What notes say of a photo is shown with it; a picture generated from the text stays with its post. Returns
    a plain dict; its "bootstrap" is the `paired_bootstrap` of true against shuffled photos, None where there
    is no photo to show. `now`: where things lie, as `open_run` takes it.
    """
    model, config, dataset, posts = open_run(run_dir, split, device, **now)
    fit_threads(model)
    known = mentions(dataset.examples["train"])
    ids = [example.image_id for example in posts.examples]
    swaps = [shuffled_photos(ids, posts.cache, seed, posts.notes) for seed in range(shuffles)]
    photos = sum(photo is not None for photo in swaps[0].values())

    def run(swap, name):
        settings = config["labels"], config["eval_batch_size"], device, precision_on(device, config)
        return predict(model, posts.showing(swap), *settings, known, f"{run_dir.name}, {name} photos")

    true = run(None, "true")
    if not photos:  # all three are one
        same = score(true)
        return {"photos": 0, "true": same, "shuffled": [same] * shuffles, "none": same, "bootstrap": None}
    shuffled = [run(swap, f"shuffled ({seed + 1} of {shuffles})") for seed, swap in enumerate(swaps)]
    return {
        "photos": photos,
        "true": score(true),
        "shuffled": [score(records) for records in shuffled],
        "none": score(run(dict.fromkeys(ids), "no")),
        "bootstrap": paired_bootstrap([true], shuffled),
    }


def check_row(name, check):
    """One line of the image check's table. `name` is padded by the caller."""
    ner = check["true"]["task"] == "ner"

    def cells(level, key):
        values = [metrics[level][key] for metrics in check["shuffled"]]
        spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else " " * 6
        true, none = check["true"][level][key], check["none"][level][key]
        return f"{true:.3f}  {statistics.mean(values):.3f} {spread}  {none:.3f}"

    f1, accuracy = cells("entity" if ner else "relation", "f1"), cells("token" if ner else "row", "accuracy")
    return f"{name}   {f1}   {accuracy}"


def verdict(config, check):
    """What the image check says, in words: does the interval of true against shuffled photos hold 0?"""
    if config["fusion"] == "none" and not check["photos"]:
        return "text only" if config.get("extra", "none") == "none" else "text and notes on the post only"
    if check["photos"] < 2:
        return "fewer than 2 photos: cannot tell"
    found = check["bootstrap"]
    said = (
        "depends on its photos" if found["low"] > 0 else "wrong photos do better" if found["high"] < 0 else
        "wrong photos do as well, as far as these posts can tell"
    )  # fmt: skip
    trained = "trained on shuffled photos; " * bool(config.get("shuffle_photos"))
    trained += "trained on shuffled notes; " * bool(config.get("shuffle_notes"))
    return (f"{trained}true - shuffled {found['difference']:+.3f}, 95% interval {found['low']:+.3f} to"
            f" {found['high']:+.3f}: {said}")  # fmt: skip


def type_changes(check, fewest=20):
    """One line: how F1 changes from true to shuffled photos (mean), by type of `fewest` or more in gold."""
    ner = check["true"]["task"] == "ner"

    def part(metrics, name):
        types = metrics["entity" if ner else "relation"]["types"]
        return metrics[name] if name in metrics else types.get(name, {"f1": 0})

    kinds = check["true"]["entity" if ner else "relation"]["types"]
    names = [kind for kind, counts in kinds.items() if counts["gold"] >= fewest]
    names += ["entity_seen", "entity_unseen"] if "entity_seen" in check["true"] else []
    changes = {
        name: statistics.mean(part(m, name)["f1"] for m in check["shuffled"])
        - part(check["true"], name)["f1"]
        for name in names
    }  # fmt: skip
    shown = ", ".join(f"{name.removeprefix('entity_')} {change:+.3f}" for name, change in changes.items())
    return f"F1 with shuffled photos, by type: {shown}"


# ------------------------------------------------------------------------------------------------------- main


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
            if not (config.get("shuffle_photos") or config["shuffle_notes"])
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


def predictions_file(run, split):
    """The file of a run's predictions, of the test split where `split` is None and there is one."""
    read_config(run)
    split = split or ("test" if (run / "predictions-test.jsonl").exists() else "valid")
    path = run / f"predictions-{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not there; the run did not finish, or its data set has no {split} file"
        )
    return path


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
        with contextlib.suppress(ValueError, RecursionError):
            stored = json.loads(path.read_bytes())
            return isinstance(stored, dict) and not {"gold_fingerprint", "shuffled"}.isdisjoint(stored)
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
        shuffled = ", TRAINED AND SCORED WITH OTHER POSTS' PHOTOS" * bool(config.get("shuffle_photos"))
        shuffled += ", TRAINED AND SCORED WITH OTHER POSTS' NOTES" * config["shuffle_notes"]
        scored = f"{made['variant']}, {made['sha256'][:16]}{shuffled}"
        print(format_scores(metrics, f"{run.name} {split} ({scored})"))
        store(run / f"metrics-{split}.json", metrics)


if __name__ == "__main__":
    command_line(main)
