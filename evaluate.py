"""Scores of a finished run or of a bare file of predictions, and the checks that tell whether to trust them.

    python evaluate.py --run runs/twitter2017-roberta-resnet50-film-s1337
    python evaluate.py --predictions theirs.txt
    python evaluate.py --run runs/demo-* --image-check
    python evaluate.py --compare 'runs/twitter2017-roberta-resnet50-film-s*' 'runs/twitter2017-roberta-resnet50-none-s*'
    python evaluate.py --leak-check mnre
    python evaluate.py --leak-check twitter2017 --notes notes.jsonl
"""

import argparse
import glob
import statistics
from pathlib import Path

import numpy as np
import torch

from checks import FEWEST, SCORES, leak_check, note_leaks, paired_bootstrap
from commands import bounded, check_device, command_line, default_device
from data import DATASETS, cut_train, dataset_name, load_dataset, read_ner
from encoding import collate, encode, length_batches, to_device
from features import FeatureCache
from model import autocast, differing, load_run, precision_on, read_config, system_settings
from notes import Notes, reads_relevance
from photos import find_photos, image_folders
from scores import format_scores, mentions, read_predictions, score, seen_spans, write_json

# -------------------------------------------------------------------------------------------------- predictions


def predict(
    model, rows, examples, labels, pad_id, batch_size, device, precision, cache=None, swap=None, known=(),
    notes=None, generated=None,
):  # fmt: skip
    """Predictions for encoded `rows` of `examples`, one record a post, in their order.

    `swap`: {image id: image id or None}, the photo to show in place of a post's own. `known`: the `mentions` of train.
    `notes`: the `Notes` that were attached to the rows, if any. `generated`: the `FeatureCache` of second
    pictures, if any; each post is shown its own, whatever `swap` says. A word the model has no state for (cut
    off, or no sub-token) is answered `O` with probability null.
    """
    model.eval()
    photos = [swap[example.image_id] if swap is not None else example.image_id for example in examples]
    if notes is not None:
        rows = [notes.shown(row, photo) for row, photo in zip(rows, photos, strict=True)]
    records = [None] * len(rows)
    for chosen in length_batches([len(row["input_ids"]) for row in rows], batch_size):
        batch = collate([rows[i] for i in chosen], pad_id, cache, [photos[i] for i in chosen])
        if generated is not None:
            batch |= generated.read_generated([examples[i].image_id for i in chosen])
        batch = to_device(batch, device)
        with torch.inference_mode(), autocast(device, precision):
            best, probability = model.answer(batch)
        for i, indices, values in zip(chosen, best.tolist(), probability.tolist(), strict=True):
            example = examples[i]
            record = {"id": example.id, "image_id": example.image_id, "words": list(example.words)}
            if cache is not None:
                record["photo"] = photos[i] is not None and cache.has_photo(photos[i])
            if generated is not None:
                record["generated"] = generated.has_photo(example.image_id)
            if notes is not None and notes.segments:
                record["extra"] = "text_length" in rows[i]
            if notes is not None and notes.relevance:
                record["relevance"] = rows[i].get("relevance")  # the one given, None where none is
            if "word_starts" in rows[i]:
                reached = [start >= 0 for start in rows[i]["word_starts"]]
                record["gold"] = list(example.labels)
                answers = list(zip(reached, indices, values, strict=False))  # the batch is as wide as its longest post
                record["predicted"] = [labels[k] if ok else "O" for ok, k, _ in answers]
                record["probability"] = [round(p, 6) if ok else None for ok, _, p in answers]
                record["seen"] = seen_spans(record["words"], known)
            else:
                record |= {"head": list(example.head), "tail": list(example.tail), "gold": example.label}
                record |= {"predicted": labels[indices], "probability": round(values, 6)}
            records[i] = record
    return records


# -------------------------------------------------------------------------------------------------- image check


def shuffled_photos(image_ids, cache, seed, notes=None):
    """{image id: another post's image id}: one random cycle through the photos, so none stays with its own post.

    Works on photos, not posts: rows that share a photo share the wrong one. A photo is what cache or notes have of one. An
    id without a photo keeps having none; a lone photo has no other to change with.
    """
    known = [source for source in (cache, notes) if source is not None]
    with_photo = [i for i in dict.fromkeys(image_ids) if any(source.has_photo(i) for source in known)]
    order = [with_photo[i] for i in np.random.default_rng(seed).permutation(len(with_photo))]
    return {image_id: None for image_id in image_ids} | dict(zip(order, order[1:] + order[:1], strict=True))


def dataset_now(config, data_dir=None):
    """(name, --data-dir) of a run's data set; `data_dir`: where it is now. Of the user's own, that is its parent folder, or
    itself under another name."""
    name = config["dataset"]
    if data_dir and name not in DATASETS:
        inside = Path(data_dir) / Path(name).name
        name = str(inside if inside.is_dir() else Path(data_dir))
    return name, data_dir or config["data_dir"]


def run_notes(config, tokenizer, rows, examples, split, path=None):
    """The `Notes` a run was trained with, attached to encoded `rows` of `examples` as they were; None if it read none.

    `path`: where they are now. ValueError if they have changed.
    """
    if config["notes"] is None:
        if path:
            raise ValueError(f"--notes {path}: the run read none; leave it out")
        return None
    more = config["extra"], config["extra_len"], reads_relevance(config)
    notes = Notes(path or config["notes"], tokenizer, *more)
    if notes.sha256 != config["notes_sha256"]:
        raise ValueError(f"{notes.path}: not the notes the run was trained with ({config['notes_sha256'][:16]}); restore them")
    notes.attach(rows, examples, split)
    if config["shuffle_notes"]:
        notes.shuffle(rows, config["seed"])
    return notes


def run_cache(run_dir, config, name, path, examples, dataset):
    """The `FeatureCache` that a run was trained on, of its option `name`, "features" or "generated".

    `path`: where it is now, if not where it was. ValueError if it has changed.
    """
    cache = FeatureCache(path or config[name])
    cache.require([example.image_id for example in examples], dataset)
    if cache.sha256 != config[f"{name}_made"]["sha256"]:
        raise ValueError(f"{cache.path}: not the features {run_dir} was trained on; restore them")
    return cache


def open_run(run_dir, split, device, data_dir=None, features=None, notes=None, generated=None):
    """A run and what it was scored on.

    (model, tokenizer, config, dataset, encoded rows of `split`, cache, `Notes`, cache of generated pictures):
    the last three are None where the run has none. `data_dir`, `features`, `notes`, `generated`: where they
    are now, if no longer where the run was trained. ValueError if they have changed.
    """
    model, tokenizer, config = load_run(run_dir, device)
    dataset = load_dataset(*dataset_now(config, data_dir))
    if config["train_share"] < 1:
        cut_train(dataset, config["train_share"], config["seed"])
    made = config["data"][split]
    if dataset.fingerprints().get(split, {}).get("sha256") != made["sha256"]:
        raise ValueError(f"{made['file']}: not the file of {run_dir} any more ({made['sha256'][:16]}); restore it")
    rows, _ = encode(tokenizer, dataset.examples[split], config["labels"], config["max_len"])
    cache = second = None
    examples = dataset.examples[split]
    if config["fusion"] != "none":
        cache = run_cache(run_dir, config, "features", features, examples, dataset.name)
    if generated and not config["generated"]:
        raise ValueError(f"--generated {generated}: the run read no second picture; leave it out")
    if config["generated"]:
        second = run_cache(run_dir, config, "generated", generated, examples, dataset.name)
    notes = run_notes(config, tokenizer, rows, examples, split, notes)
    return model, tokenizer, config, dataset, rows, cache, notes, second


def image_check(run_dir, split, shuffles, device, data_dir=None, features=None, notes=None, generated=None):
    """Scores of a run on `split` with true, shuffled (several seeds) and no photos, and how many `photos` there are.

    What notes say of a photo is shown with it; a picture generated from the text stays with its post. Returns
    a plain dict; its "bootstrap" is the `paired_bootstrap` of true against shuffled photos, None where there
    is no photo to show. See `open_run` for what it takes.
    """
    model, tokenizer, config, dataset, rows, cache, notes, second = open_run(
        run_dir, split, device, data_dir, features, notes, generated
    )
    examples, known = dataset.examples[split], mentions(dataset.examples["train"])
    ids = [example.image_id for example in examples]
    photos = sum(photo is not None for photo in shuffled_photos(ids, cache, 0, notes).values())

    def run(swap):
        return predict(
            model, rows, examples, config["labels"], tokenizer.pad_token_id, config["eval_batch_size"], device,
            precision_on(device, config), cache, swap, known, notes, second,
        )  # fmt: skip

    true = run(None)
    if not photos:  # all three are one
        same = score(true)
        return {"photos": 0, "true": same, "shuffled": [same] * shuffles, "none": same, "bootstrap": None}
    shuffled = [run(shuffled_photos(ids, cache, seed, notes)) for seed in range(shuffles)]
    return {
        "photos": photos,
        "true": score(true),
        "shuffled": [score(records) for records in shuffled],
        "none": score(run(dict.fromkeys(ids))),
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
    """What the image check says of a run, in words: whether the interval of true against shuffled photos holds 0."""
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
    return (f"{trained}true - shuffled {found['difference']:+.3f}, 95% interval {found['low']:+.3f} to {found['high']:+.3f}:"
            f" {said}")  # fmt: skip


def type_changes(check, fewest=20):
    """One line: how F1 changes from true to shuffled photos (mean), by type with at least `fewest` in gold, seen or not."""
    ner = check["true"]["task"] == "ner"

    def part(metrics, name):
        return metrics[name] if name in metrics else metrics["entity" if ner else "relation"]["types"].get(name, {"f1": 0})

    kinds = check["true"]["entity" if ner else "relation"]["types"]
    names = [kind for kind, counts in kinds.items() if counts["gold"] >= fewest]
    names += ["entity_seen", "entity_unseen"] if "entity_seen" in check["true"] else []
    changes = {
        name: statistics.mean(part(metrics, name)["f1"] for metrics in check["shuffled"]) - part(check["true"], name)["f1"]
        for name in names
    }  # fmt: skip
    shown = ", ".join(f"{name.removeprefix('entity_')} {change:+.3f}" for name, change in changes.items())
    return f"F1 with shuffled photos, by type: {shown}"


# --------------------------------------------------------------------------------------------------------- main


def read_runs(pattern, split):
    """(name, [records of a run]) of a run folder, or of all that a quoted pattern such as 'runs/x-s*' names.

    A pattern without "shuffled" in it leaves runs on shuffled photos or notes out: '-s*' begins their names too.
    ValueError if the runs differ in more than seed, paths and machine.
    """
    folders = [Path(pattern)] if Path(pattern).is_dir() else sorted(map(Path, glob.glob(pattern)))
    if len(folders) != 1 and "shuffled" not in Path(pattern).name:
        made = {folder: read_config(folder) for folder in folders}
        folders = [folder for folder, config in made.items() if not (config.get("shuffle_photos") or config["shuffle_notes"])]
    if not folders:
        raise FileNotFoundError(f"{pattern}: no such run folder")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        if other := differing(system_settings(configs[0]), system_settings(config)):
            raise ValueError(f"{pattern}: {folders[0].name} and {folder.name} differ in {', '.join(other.values())[:300]}; name runs of one kind")
    seeds = " ".join(str(config["seed"]) for config in configs)
    name = f"{Path(pattern).name} (seeds {seeds})" if len(folders) > 1 else folders[0].name
    return name, [read_predictions(predictions_file(folder, split)) for folder in folders]


def predictions_file(run, split):
    """The file of a run's predictions, of the test split where `split` is None and there is one."""
    read_config(run)
    split = split or ("test" if (run / "predictions-test.jsonl").exists() else "valid")
    path = run / f"predictions-{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; the run did not finish, or its data set has no {split} file")
    return path


def compare(pattern_a, pattern_b, split, name):
    """Print whether runs A are better than runs B on the score called `name`, and by how much."""
    (a, a_runs), (b, b_runs) = read_runs(pattern_a, split), read_runs(pattern_b, split)
    found = paired_bootstrap(a_runs, b_runs, name)
    relations = not isinstance(a_runs[0][0]["gold"], list)
    what = {"f1": "micro F1 without None" if relations else "entity F1, lenient", "strict-f1": "entity F1, strict IOB2",
            "accuracy": "row accuracy" if relations else "token accuracy",
            "weighted-f1": f"weighted F1 of {'rows' if relations else 'tokens'}"}[name]  # fmt: skip
    if len(a_runs) != len(b_runs):
        print(f"WARNING: {len(a_runs)} runs of A against {len(b_runs)} of B: the mean over more seeds is the steadier one")
    width = max(len(a), len(b))
    print(what)
    for side, name, value, seeds in (("A", a, found["a"], found["a_seeds"]), ("B", b, found["b"], found["b_seeds"])):
        spread = f" ± {statistics.stdev(seeds):.4f} (n = {len(seeds)})" if len(seeds) > 1 else ""
        print(f"  {side}  {name:<{width}}  {value:.4f}{spread}")
    print(
        f"  A - B  {found['difference']:+.4f}, 95% interval {found['low']:+.4f} to {found['high']:+.4f}, p = {found['p']:.4f}"
        f" (paired bootstrap over {found['units']} {'photos' if relations else 'posts'}, {found['resamples']} resamples)"
    )
    if found["low"] <= 0 <= found["high"]:
        print("  the interval holds 0: these posts do not tell A from B")
    if len(a_runs) == len(b_runs) == 1:
        print("  one seed against one seed: what another seed would change is in no part of this interval (a standard deviation of"
              " 0.005 to 0.010 on Twitter-2017); train three of each")  # fmt: skip
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
    print(f"  a language model may have seen these data: where a share is near 1, or higher on {split} than on"
          " train, scores with such notes tell nothing about a model that never saw them")  # fmt: skip


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
    print(f"{found} of {len(ids)} photos found" + ("" if found > len(ids) / 2 else ": the photos' column tells little or nothing"))
    leaks = leak_check(dataset, split, folders)
    if not leaks:
        print(f"nothing to tell: each type and relation has fewer than {FEWEST} posts with it, or without it, in train or {split}")
        return
    width = max([12, *map(len, leaks)])
    print(f"{dataset.name}: what metadata alone tells, learned on train, AUC on {split} with 95% interval; 0.5 = nothing")
    print(f"{'':<{width}} posts  photo's files    text length")
    for target, leak in leaks.items():
        photo, text = (f"{area:.3f} ±{half:.3f}" for area, half in (leak["photo"], leak["text"]))
        cells = f"{photo if found else '-':<12}   {text}"
        print(f"{target:<{width}} {leak['posts']:5d}   {cells}")
    for target, leak in leaks.items():
        if leak["photo"][0] - leak["photo"][1] > 0.55:
            print(f"WARNING: {target!r} can be told from the photo's files without looking at them: AUC {leak['photo'][0]:.3f},"
                  f" most by {leak['column'][0]}")  # fmt: skip


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", nargs="+", type=Path, help="run folders of train.py")
    what.add_argument("--predictions", type=Path, help="JSON lines as train.py writes, or CoNLL 'word gold predicted'")
    what.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="paired bootstrap; several seeds of each as a"
        " quoted pattern, 'runs/NAME-s*'")
    what.add_argument("--leak-check", type=dataset_name, metavar="DATASET", help="what metadata alone tells of its labels")
    add("--split", choices=("test", "valid"), help="default: test where there is one, else valid")
    add("--train", type=Path, help="for --predictions: the training file, to tell mentions seen in it from others")
    add("--score", choices=SCORES, help="for --compare: f1 (default) is entity F1, or micro F1 without None")
    add("--image-check", action="store_true", help="scores with true, shuffled and no photos (runs the model)")
    add("--shuffles", type=bounded(int, 1), help="for --image-check: how many seeded shuffles (default: 3)")
    add("--data-dir", help="for --image-check: where the data sets are now (default: where the run was trained), and for"
        " --leak-check (default: data)")
    add("--images", help="for --leak-check: folder of the photos, where it is not in a usual place under --data-dir")
    add("--features", help="for --image-check: where the run's feature file is now")
    add("--generated", help="for --image-check: where the run's feature file of second pictures is now")
    add("--notes", help="for --image-check: where the run's notes are now; for --leak-check: notes to look for labels in")
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
        records = read_predictions(args.predictions)
        if args.train:
            if not all("words" in record and isinstance(record["gold"], list) for record in records):
                raise ValueError(f"{args.predictions}: has no words or no entities, so --train cannot tell mentions apart")
            notes = []
            known = mentions(read_ner(args.train, None, notes))
            print(*(f"{args.train}: {note}\n" for note in notes), sep="", end="")
            records = [record | {"seen": seen_spans(record["words"], known)} for record in records]
        metrics = score(records)
        print(format_scores(metrics, f"{args.predictions} (gold {metrics['gold_fingerprint']})"))
        write_json(args.predictions.with_name(args.predictions.name + ".metrics.json"), metrics)
        return
    width = max(len(run.name) for run in args.run)
    if args.image_check:
        print(f"{'':<{width + 7}}   entity F1 (micro without None)   token (row) accuracy, weighted recall")
        print(f"{'photos shown':<{width + 7}}   true   shuffled      none    true   shuffled      none")
    for run in args.run:
        path, config = predictions_file(run, args.split), read_config(run)
        split = path.stem.removeprefix("predictions-")
        if args.image_check:
            moved = args.data_dir, args.features, args.notes, args.generated
            check = image_check(run, split, args.shuffles, args.device, *moved)
            write_json(run / f"image-check-{split}.json", check)
            print(check_row(f"{run.name:<{width}}  {split:<5}", check))
            print(f"    {verdict(config, check)}", flush=True)
            if check["photos"]:
                print(f"    {type_changes(check)}", flush=True)
            continue
        made = config["data"][split]
        metrics = score(read_predictions(path)) | {"data": made}
        shuffled = ", TRAINED AND SCORED WITH OTHER POSTS' PHOTOS" * bool(config.get("shuffle_photos"))
        shuffled += ", TRAINED AND SCORED WITH OTHER POSTS' NOTES" * config["shuffle_notes"]
        print(format_scores(metrics, f"{run.name} {split} ({made['variant']}, {made['sha256'][:16]}{shuffled})"))
        write_json(run / f"metrics-{split}.json", metrics)


if __name__ == "__main__":
    command_line(main)
