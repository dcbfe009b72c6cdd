"""Predictions -> scores. Scores a finished run, or a bare file of predictions with no model at all.

    python evaluate.py --run runs/twitter2017-roberta-resnet50-film-s1337
    python evaluate.py --predictions theirs.txt
    python evaluate.py --run runs/demo-* --image-check

Two families of scores, always both and always named. Token level: accuracy and weighted precision, recall and F1 over
all labels, `O` included. Entity level: precision, recall and F1 of whole spans. They differ by 0.1 and more, and
published tables mix them. For relations: the same over rows, and micro scores without `None`.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support

from data import NONE, FeatureCache, check_device, collate, command_line, default_device, encode, length_batches
from data import load_dataset, bounded, read_lines
from model import autocast, load_run, read_config, to_device

# ------------------------------------------------------------------------------------------------------- scores


def entity_spans(labels, strict=False):
    """Entities of one BIO sequence as a set of (type, start, end), end exclusive.

    Lenient, as the CoNLL-2000 evaluation script and seqeval's default mode count: an entity is a run of one type that
    begins at B, or at an I that does not continue one. Strict IOB2: only B begins an entity; an orphan I is none.
    """
    spans, kind, start = set(), None, 0
    for i, label in enumerate([*labels, "O"]):
        prefix, _, next_kind = label.partition("-")
        if kind is not None and (prefix != "I" or next_kind != kind):
            spans.add((kind, start, i))
            kind = None
        if kind is None and (prefix == "B" or (prefix == "I" and not strict)):
            kind, start = next_kind, i
    return spans


def ratio_scores(correct, predicted, gold):
    """Precision, recall and F1 from counts; 0 where the denominator is 0."""
    return {
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / gold if gold else 0.0,
        "f1": 2 * correct / (predicted + gold) if predicted + gold else 0.0,
        "gold": gold,
        "predicted": predicted,
        "correct": correct,
    }


def entity_scores(gold, predicted, strict=False):
    """Micro scores of whole entities over posts (lists of label sequences), and `types`, the same for each type."""
    counts = {"gold": Counter(), "predicted": Counter(), "correct": Counter()}
    for gold_labels, predicted_labels in zip(gold, predicted, strict=True):
        a, b = entity_spans(gold_labels, strict), entity_spans(predicted_labels, strict)
        for name, spans in (("gold", a), ("predicted", b), ("correct", a & b)):
            counts[name].update(kind for kind, _, _ in spans)
    per_type = {
        kind: ratio_scores(*(counts[name][kind] for name in ("correct", "predicted", "gold")))
        for kind in sorted(counts["gold"] | counts["predicted"])
    }
    return ratio_scores(*(counts[name].total() for name in ("correct", "predicted", "gold"))) | {"types": per_type}


def label_scores(gold, predicted):
    """Accuracy and weighted precision, recall, F1 over all labels. Weighted recall is accuracy, by definition."""
    precision, recall, f1, _ = precision_recall_fscore_support(gold, predicted, average="weighted", zero_division=0)
    accuracy = sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)
    return {"accuracy": accuracy, "precision": float(precision), "recall": float(recall), "f1": float(f1)}


def relation_scores(gold, predicted):
    """Micro scores without `None`, and `types`, the same for each relation."""
    correct = Counter(a for a, b in zip(gold, predicted, strict=True) if a == b)
    counts = [correct, Counter(predicted), Counter(gold)]
    kinds = sorted((set(gold) | set(predicted)) - {NONE})
    micro = ratio_scores(*(sum(count[kind] for kind in kinds) for count in counts))
    return micro | {"types": {kind: ratio_scores(*(count[kind] for count in counts)) for kind in kinds}}


def score(records):
    """All scores of a list of predictions (see `read_predictions`): a plain dict, ready for JSON."""
    ner = isinstance(records[0]["gold"], list)
    gold, predicted = [r["gold"] for r in records], [r["predicted"] for r in records]
    flat_gold, flat = ([y for labels in side for y in labels] if ner else side for side in (gold, predicted))
    if not flat_gold:
        raise ValueError("no words to score: every post is empty")
    majority, _ = Counter(flat_gold).most_common(1)[0]
    metrics = {"task": "ner" if ner else "relation", "posts": len(records)}
    if ner:
        metrics |= {"words": len(flat), "entity": entity_scores(gold, predicted)}
        metrics |= {"entity_strict": entity_scores(gold, predicted, strict=True)}
    else:
        metrics["relation"] = relation_scores(gold, predicted)
    metrics["token" if ner else "row"] = label_scores(flat_gold, flat)
    constant = [[majority] * len(labels) for labels in gold] if ner else [majority] * len(gold)
    without = entity_scores(gold, constant) if ner else relation_scores(gold, constant)
    metrics["baseline"] = label_scores(flat_gold, [majority] * len(flat)) | {
        "label": majority,
        "main_f1": without["f1"],
    }
    metrics["posts_without_photo"] = sum(record.get("photo") is False for record in records)
    if ner:
        metrics["words_answered_without_model"] = sum(
            p is None for record in records for p in record.get("probability", [])
        )
    metrics["gold_fingerprint"] = gold_fingerprint(records)
    metrics["warnings"] = one_label_warnings(flat, metrics["entity" if ner else "relation"])
    return metrics


def one_label_warnings(predicted, main):
    """What to say of predictions that are (nearly) one label: such a run can look good in accuracy."""
    label, count = Counter(predicted).most_common(1)[0]
    share, found = count / len(predicted), main["predicted"]
    if share >= 0.99 or found < 0.1 * main["gold"]:
        return [
            f"{share:.1%} of the answers are {label!r}, and {found} entities or relations were answered where gold has"
            f" {main['gold']}: the accuracy measures the data set, not the model"
        ]
    return []


def main_score(metrics):
    """The one number that chooses an epoch: entity F1, or micro-F1 without `None`."""
    return metrics["entity" if metrics["task"] == "ner" else "relation"]["f1"]


# -------------------------------------------------------------------------------------------------- predictions


def write_text(path, text):
    """A UTF-8 file in place of what was there, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path, records):
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_predictions(path):
    """Records {id, words, gold, predicted, ...} from JSON lines as train.py writes them, or from plain CoNLL.

    CoNLL: `word ... gold predicted` a line, tab or spaces between, a blank line between posts, an `IMGID:<id>` line
    where there is one. Labels are lists for named entities, one string for relations. ValueError with file and line.
    """
    lines = read_lines(path)
    first = next((line for _, line in lines if line.strip()), "")
    is_json = re.match(r'\s*\{\s*"[^\t]*$', first)  # CoNLL may begin with a brace too, but not so and without a tab
    records = (json_records if is_json else conll_records)(path, lines)
    if not records:
        raise ValueError(f"{path}: no predictions in it")
    return records


def json_records(path, lines):
    records, ids = [], set()
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            post_id, gold, predicted = record["id"], record["gold"], record["predicted"]
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text, and cannot be written
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object with id, gold and predicted ({error})") from None
        ner, where = isinstance(gold, list), f"{path}:{number}: post {post_id!r}"
        if records and ner != isinstance(records[0]["gold"], list):
            raise ValueError(f"{where}: named entities and relations in one file; split them")
        if not isinstance(predicted, type(gold)) or (ner and len(predicted) != len(gold)):
            raise ValueError(f"{where}: gold and predicted must be two label lists of one length, or two labels")
        for key in ("words", "probability") if ner else ():
            if key in record and not (isinstance(record[key], list) and len(record[key]) == len(gold)):
                raise ValueError(f"{where}: {key} must be a list as long as gold")
        for label in [*gold, *predicted] if ner else [gold, predicted]:
            check_form(label, ner, where)
        if str(post_id) in ids:
            raise ValueError(f"{where}: this id stands twice; each post is predicted once")
        ids.add(str(post_id))
        records.append(record)
    return records


def conll_records(path, lines):
    records, post_id, words = [], None, []
    for number, line in [*lines, (len(lines) + 1, "")]:
        if re.fullmatch(r"IMGID:[^\t ]*", line) or not line.strip(" \t"):
            if words:
                names = ("words", "gold", "predicted")
                columns = dict(zip(names, map(list, zip(*words, strict=True)), strict=True))
                records.append({"id": post_id or f"post {len(records) + 1}", **columns})
            post_id, words = line[len("IMGID:") :] or None, []
            continue
        # The last two columns count, as in the CoNLL evaluation script.
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if len(fields) < 3:
            raise ValueError(f"{path}:{number}: expected 'word gold predicted', found {line[:80]!r}")
        for label in fields[-2:]:
            check_form(label, True, f"{path}:{number}")
        words.append([fields[0], *fields[-2:]])
    return records


def check_form(label, ner, where):
    """ValueError unless `label` is text and, for named entities, O, B-TYPE or I-TYPE."""
    if not isinstance(label, str) or (ner and not re.fullmatch(r"O|[BI]-.+", label)):
        raise ValueError(f"{where}: label {label!r} is not {'O, B-TYPE or I-TYPE' if ner else 'text'}")


def predict(model, rows, examples, labels, pad_id, batch_size, device, precision, cache=None, swap=None):
    """Predictions for encoded `rows` of `examples`, one record a post, in their order.

    `swap`: {image id: image id or None}, the photo to show in place of a post's own. A word the model has no state for
    (cut off, or no sub-token) is answered `O` with probability null.
    """
    model.eval()
    records = [None] * len(rows)
    for chosen in length_batches([len(row["input_ids"]) for row in rows], batch_size):
        own = [examples[i].image_id for i in chosen]
        photos = [swap[photo] for photo in own] if swap is not None else own
        batch = to_device(collate([rows[i] for i in chosen], pad_id, cache, photos), device)
        with torch.inference_mode(), autocast(device, precision):
            best = model(batch).float().softmax(-1).max(-1)
        for i, photo, values, indices in zip(chosen, photos, best.values.tolist(), best.indices.tolist(), strict=True):
            example = examples[i]
            record = {"id": example.id, "image_id": example.image_id, "words": list(example.words)}
            if cache is not None:
                record["photo"] = photo is not None and cache.has_photo(photo)
            if "word_starts" in rows[i]:
                known = [start >= 0 for start in rows[i]["word_starts"]]
                record["gold"] = list(example.labels)
                answers = list(zip(known, indices, values, strict=False))  # the batch is as wide as its longest post
                record["predicted"] = [labels[k] if ok else "O" for ok, k, _ in answers]
                record["probability"] = [round(p, 6) if ok else None for ok, _, p in answers]
            else:
                record |= {"head": list(example.head), "tail": list(example.tail), "gold": example.label}
                record |= {"predicted": labels[indices], "probability": round(values, 6)}
            records[i] = record
    return records


# -------------------------------------------------------------------------------------------------- image check


def shuffled_photos(image_ids, cache, seed):
    """{image id: another post's image id}: one random cycle through the photos, so none stays with its own post.

    Works on photos, not posts: rows that share a photo share the wrong one. An id without a photo keeps having none;
    a lone photo has no other to change with.
    """
    with_photo = [image_id for image_id in dict.fromkeys(image_ids) if cache.has_photo(image_id)]
    order = [with_photo[i] for i in np.random.default_rng(seed).permutation(len(with_photo))]
    return {image_id: None for image_id in image_ids} | dict(zip(order, order[1:] + order[:1], strict=True))


def image_check(run_dir, split, shuffles, device, data_dir=None, features=None):
    """Scores of a run on `split` with true, shuffled (several seeds) and no photos, and how many `photos` there are.

    `data_dir`, `features`: where they are now, if no longer where the run was trained. Returns a plain dict.
    """
    model, tokenizer, config = load_run(run_dir, device)
    dataset = load_dataset(config["dataset"], data_dir or config["data_dir"])
    made = config["data"][split]
    if dataset.fingerprints().get(split, {}).get("sha256") != made["sha256"]:
        raise ValueError(f"{made['file']}: not the file of {run_dir} any more ({made['sha256'][:16]}); restore it")
    examples = dataset.examples[split]
    rows, _ = encode(tokenizer, examples, config["labels"], config["max_len"])
    ids = [example.image_id for example in examples]
    cache = None
    if config["fusion"] != "none":
        cache = FeatureCache(features or config["features"])
        cache.require(ids, config["dataset"])
        if cache.sha256 != config["features_made"]["sha256"]:
            raise ValueError(f"{cache.path}: not the features {run_dir} was trained on; restore them")

    def run(swap):
        records = predict(
            model, rows, examples, config["labels"], tokenizer.pad_token_id, config["eval_batch_size"], device,
            config["precision"], cache, swap,
        )  # fmt: skip
        return score(records)

    true = run(None)
    if cache is None:  # without a photo to show, all three are one
        return {"photos": 0, "true": true, "shuffled": [true] * shuffles, "none": true}
    return {
        "photos": sum(cache.has_photo(image_id) for image_id in set(ids)),
        "true": true,
        "shuffled": [run(shuffled_photos(ids, cache, seed)) for seed in range(shuffles)],
        "none": run(dict.fromkeys(ids)),
    }


def check_row(name, fusion, check):
    """One line of the image check's table, ending in what it means. `name` is padded by the caller."""
    ner = check["true"]["task"] == "ner"

    def cells(level, key):
        values = [metrics[level][key] for metrics in check["shuffled"]]
        spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else " " * 6
        true, none = check["true"][level][key], check["none"][level][key]
        return f"{true:.3f}  {statistics.mean(values):.3f} {spread}  {none:.3f}"

    drop = main_score(check["true"]) - statistics.mean(main_score(metrics) for metrics in check["shuffled"])
    if fusion == "none":
        said = "text only"
    elif check["photos"] < 2:
        said = "fewer than 2 photos: cannot tell"
    else:
        said = "wrong photos do as well" if drop < 0.005 else ""
    f1, accuracy = cells("entity" if ner else "relation", "f1"), cells("token" if ner else "row", "accuracy")
    return f"{name}   {f1}   {accuracy}   {said}".rstrip()


# --------------------------------------------------------------------------------------------------------- main


def format_scores(metrics, title):
    """The scores as text: both families, per type, beside the majority baseline; warnings last."""
    ner = metrics["task"] == "ner"
    main, level = ("entity", "token") if ner else ("relation", "row")
    what = f"{metrics['posts']} posts, {metrics['words']} words, {metrics['entity']['gold']} entities" if ner else (
        f"{metrics['posts']} rows, {metrics['relation']['gold']} not {NONE}")  # fmt: skip
    width = max([38, *(len(kind) + 4 for kind in metrics[main]["types"])])

    def line(name, s, accuracy=None):
        shown = f"{accuracy:9.4f}" if accuracy is not None else " " * 9
        count = f"{s['gold']:8d}{s['predicted']:11d}" if "gold" in s else ""
        return f"{name:<{width}}{shown}{s['precision']:11.4f}{s['recall']:9.4f}{s['f1']:9.4f}{count}".rstrip()

    base = metrics["baseline"]
    lines = [f"{title}: {what}", f"{'':<{width}} accuracy  precision   recall       F1    gold  predicted"]
    if ner:
        lines += [line("entity level, whole spans (lenient)", metrics["entity"])]
        lines += [line(f"    {kind}", s) for kind, s in metrics["entity"]["types"].items()]
        lines += [line("entity level, strict IOB2", metrics["entity_strict"])]
    else:
        lines += [line(f"relations, micro without {NONE}", metrics["relation"])]
        lines += [line(f"    {kind}", s) for kind, s in metrics["relation"]["types"].items()]
    lines += [line("token level, weighted, O included" if ner else f"all rows, weighted, {NONE} included",
                   metrics[level], metrics[level]["accuracy"])]  # fmt: skip
    lines += [line(f"always {base['label']!r} (its {main} F1: {base['main_f1']:.4f})", base, base["accuracy"])]
    if metrics["posts_without_photo"]:
        lines += [f"posts without a photo: {metrics['posts_without_photo']}"]
    if metrics.get("words_answered_without_model"):
        lines += [f"words cut off or without a sub-token, answered O: {metrics['words_answered_without_model']}"]
    return "\n".join(lines + [f"WARNING: {warning}" for warning in metrics["warnings"]])


def gold_fingerprint(records):
    """Digits that two prediction files share exactly when they hold the same posts with the same gold labels."""
    posts = sorted(json.dumps([r.get(key) for key in ("words", "head", "tail", "gold")]) for r in records)
    return hashlib.sha256("\n".join(posts).encode()).hexdigest()[:16]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", nargs="+", type=Path, help="run folders of train.py")
    what.add_argument("--predictions", type=Path, help="JSON lines as train.py writes, or CoNLL 'word gold predicted'")
    add("--split", choices=("test", "valid"), help="of a run; default test where there is one, else valid")
    add("--image-check", action="store_true", help="scores with true, shuffled and no photos (runs the model)")
    add("--shuffles", type=bounded(int, 1), default=3, help="seeded shuffles of the image check")
    add("--data-dir", help="for --image-check: where the data sets are now; default: where the run was trained")
    add("--features", help="for --image-check: where the run's feature file is now")
    add("--device", default=default_device(), help="for --image-check")
    # fmt: on
    args = parser.parse_args(argv)
    if args.image_check and not args.run:
        parser.error("--image-check needs --run: it shows the model other photos")
    return args


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    if args.predictions:
        records = read_predictions(args.predictions)
        metrics = score(records)
        print(format_scores(metrics, f"{args.predictions} (gold {metrics['gold_fingerprint']})"))
        write_json(args.predictions.with_name(args.predictions.name + ".metrics.json"), metrics)
        return
    width = max(len(run.name) for run in args.run)
    if args.image_check:
        print(f"{'':<{width + 7}}   entity F1 (micro without None)   token (row) accuracy, weighted recall")
        print(f"{'photos shown':<{width + 7}}   true   shuffled      none    true   shuffled      none")
    for run in args.run:
        config = read_config(run)
        split = args.split or ("test" if (run / "predictions-test.jsonl").exists() else "valid")
        path = run / f"predictions-{split}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path}: not there; the run did not finish, or its data set has no {split} file")
        if args.image_check:
            check = image_check(run, split, args.shuffles, args.device, args.data_dir, args.features)
            write_json(run / f"image-check-{split}.json", check)
            print(check_row(f"{run.name:<{width}}  {split:<5}", config["fusion"], check), flush=True)
            continue
        made = config["data"][split]
        metrics = score(read_predictions(path)) | {"data": made}
        print(format_scores(metrics, f"{run.name} {split} ({made['variant']}, {made['sha256'][:16]})"))
        write_json(run / f"metrics-{split}.json", metrics)


if __name__ == "__main__":
    command_line(main)
