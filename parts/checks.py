"""Whether to believe a score: is a difference more than chance, do metadata or notes tell labels, does the
photo count?

Only the last, `image_check`, needs a model.
"""

import re
import statistics
from collections import Counter

import numpy as np
from PIL import Image

from data import NONE, photo_names
from parts.notes import EXTRAS, note_text
from parts.opening import open_run
from parts.photos import find_photos, open_picture
from parts.posts import label_probabilities, predict_posts, record_of, shuffled_photos
from parts.processes import fit_threads, precision_on
from parts.scores import entity_spans, gold_fingerprint, mentions, score

# --------------------------------------------------------------------------------------------- comparing runs


def f1_of(counts):
    """F1 from correct, predicted, gold [..., 3]; 0 where there is nothing."""
    correct, predicted, gold = np.moveaxis(counts, -1, 0)
    return 2 * correct / np.maximum(predicted + gold, 1)


def accuracy_of(counts):
    """Accuracy from correct, all [..., 2]."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def weighted_f1_of(counts):
    """Weighted F1 over labels, from each one's correct, predicted, gold, [..., 3 * labels]."""
    by_label = counts.reshape(*counts.shape[:-1], -1, 3)
    gold = by_label[..., 2]
    return (f1_of(by_label) * gold).sum(-1) / np.maximum(gold.sum(-1), 1)


SCORES = {"f1": f1_of, "strict-f1": f1_of, "accuracy": accuracy_of, "weighted-f1": weighted_f1_of}


def post_counts(records, name, labels):
    """What adds up over posts to the score `name`: [posts, K], as its function of `SCORES` takes it.

    f1: of entities, lenient, or micro without `None`; strict-f1: of entities, strict IOB2; accuracy and
    weighted-f1: of tokens, or rows, over all `labels`.
    """
    rows = []
    for record in records:
        gold, predicted = record["gold"], record["predicted"]
        ner = isinstance(gold, list)
        if name == "strict-f1" and not ner:
            raise ValueError("strict-f1 is of named entities; relations have f1, accuracy and weighted-f1")
        if ner and name in ("f1", "strict-f1"):
            a, b = (entity_spans(side, name == "strict-f1") for side in (gold, predicted))
            rows.append([len(a & b), len(b), len(a)])
        elif name == "f1":
            rows.append([gold == predicted != NONE, predicted != NONE, gold != NONE])
        else:
            pairs = list(zip(gold, predicted, strict=True)) if ner else [(gold, predicted)]
            correct = Counter(a for a, b in pairs if a == b)
            if name == "accuracy":
                rows.append([correct.total(), len(pairs)])
            else:
                counts = correct, Counter(b for _, b in pairs), Counter(a for a, _ in pairs)
                rows.append([count[label] for label in labels for count in counts])
    return np.array(rows, float)


def score_of(records, name):
    """The score `name` of one list of predictions."""
    ner = isinstance(records[0]["gold"], list)
    sides = [record[key] for record in records for key in ("gold", "predicted")]
    labels = sorted({label for side in sides for label in (side if ner else [side])})
    return float(SCORES[name](post_counts(records, name, labels).sum(0)))


def score_title(name, relations):
    """The score `name` in words."""
    return {
        "f1": "micro F1 without None" if relations else "entity F1, micro",
        "strict-f1": "entity F1, strict IOB2",
        "accuracy": "row accuracy" if relations else "token accuracy",
        "weighted-f1": f"weighted F1 of {'rows' if relations else 'tokens'}",
    }[name]


def paired_bootstrap(a_runs, b_runs, name="f1", resamples=10_000, seed=0):
    """Is system A better than B on the same posts?

    Paired bootstrap (Efron & Tibshirani 1993; Koehn, EMNLP 2004).

    `a_runs`, `b_runs`: the records of each seed's run; a system's score is the mean over its seeds, all of
    them scored on the same resampled posts (photos for relations, since rows that share a photo are not
    independent). Returns a dict: a, b, difference, low and high (95% percentile interval of a - b), p
    (two-sided: twice the smaller share of resamples on either side of 0), units, resamples, and a_seeds,
    b_seeds, the score of each seed. What differs between seeds is averaged, not resampled.
    ValueError if the runs were not scored on the same posts with the same gold.
    """
    order = [record["id"] for record in a_runs[0]]
    everything = [{record["id"]: record for record in run} for run in (*a_runs, *b_runs)]
    gold = gold_fingerprint(a_runs[0])
    for run in everything:
        if run.keys() != everything[0].keys() or gold_fingerprint(run.values()) != gold:
            raise ValueError("the runs were scored on other posts or other gold; compare runs of one split")
    relations = not isinstance(a_runs[0][0]["gold"], list)
    keys = [record.get("image_id") or record["id"] if relations else record["id"] for record in a_runs[0]]
    unit = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    labels = sorted({y for run in everything for r in run.values() for side in (r["gold"], r["predicted"])
                     for y in ([side] if relations else side)})  # fmt: skip
    counts = []  # [units, K] a run
    for run in everything:
        rows = post_counts([run[i] for i in order], name, labels)
        counts.append(np.zeros((len(unit), rows.shape[1])))
        np.add.at(counts[-1], [unit[key] for key in keys], rows)

    def both(drawn):
        """Scores of the runs of a and of b from how often each unit was drawn [n, units]: [runs, n] each."""
        values = np.stack([SCORES[name](drawn @ count) for count in counts])
        return values[: len(a_runs)], values[len(a_runs) :]

    a_seeds, b_seeds = (side[:, 0].tolist() for side in both(np.ones((1, len(unit)))))
    a, b = np.mean(a_seeds).item(), np.mean(b_seeds).item()
    rng, differences = np.random.default_rng(seed), []
    for start in range(0, resamples, 500):  # a slice at a time: [500, units] in memory
        size = min(500, resamples - start)
        sides = both(rng.multinomial(len(unit), np.full(len(unit), 1 / len(unit)), size))
        differences.append(sides[0].mean(0) - sides[1].mean(0))
    differences = np.concatenate(differences)
    low, high = np.percentile(differences, (2.5, 97.5))
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return {
        "score": name, "a": a, "b": b, "a_seeds": a_seeds, "b_seeds": b_seeds,
        "difference": a - b, "low": float(low), "high": float(high),
        "p": min(1.0, 2 * float(tail + 1) / (resamples + 1)), "units": len(unit), "resamples": resamples,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- metadata

PHOTO_COLUMNS = ("has a photo", "width", "height", "bytes", "files named after it")
FEWEST = 20  # positives in train and in the split scored, below which an AUC says little


def files_named_after(image_ids, folders):
    """{image id: how many files, in the folders and below, have it as the start or the end of their name}.

    Object crops are named so, and how many an annotator's detector found can tell the label.
    """
    stems = {image_id.rpartition(".")[0] or image_id: image_id for image_id in image_ids}
    counts = Counter()
    for path in {path for folder in folders for path in folder.rglob("*")}:
        name = path.name.rpartition(".")[0] or path.name
        cuts = [match.start() for match in re.finditer("[^0-9A-Za-z]", name)]
        parts = {name} | {name[:cut] for cut in cuts} | {name[cut + 1 :] for cut in cuts}
        counts.update(stems[part] for part in parts & stems.keys())
    return counts


def metadata(examples, paths, *counts):
    """What is known of posts without a word or a pixel: [posts, columns], -1 where there is no photo.

    `counts`: {image id: number} each, one column more of the photo.
    """
    rows, sizes = [], {}
    for example in examples:
        name = next(iter(photo_names(example.image_id)), None)  # of several the first
        path = paths.get(name)
        if path is not None and path not in sizes:
            try:
                with open_picture(path) as photo:
                    sizes[path] = (*photo.size, path.stat().st_size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # not a picture: no size
                sizes[path] = (-1,) * 3
        size = sizes[path] if path is not None else (-1,) * 3
        text = (len(example.words), sum(map(len, example.words)))
        numbers = (of_photo.get(name, 0) for of_photo in counts)
        rows.append((path is not None, *size, *numbers, *text))
    return np.array(rows, float)


def leak_targets(examples):
    """{what could be given away: [posts] of bool}: a relation, or whether a post has an entity of a type."""
    if not hasattr(examples[0], "labels"):
        labels = [{example.label} for example in examples]
    else:
        labels = [{kind for kind, _, _ in entity_spans(example.labels)} for example in examples]
        labels = [kinds | ({"any entity"} if kinds else set()) for kinds in labels]
    return {name: np.array([name in present for present in labels]) for name in sorted(set().union(*labels))}


def leak_check(dataset, split, folders, boxes=None):
    """How well labels are predicted from metadata alone: {target: {"posts", "photo", "text", "column"}}.

    "photo" and "text" are (AUC, half of its 95% interval) on `split` of boosted trees trained on train, from
    what is known of the photo's files and from the text's length; 0.5 is chance. "column": the photo column
    with the highest AUC by itself, and that. Targets with fewer than `FEWEST` posts of either kind are left
    out. `boxes`: {image id: how many a detector found}, one more that is known of the photo.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    ids = dataset.image_ids()
    paths = find_photos(ids, folders) if folders else dict.fromkeys(ids)
    counts, photo_columns = [files_named_after(ids, folders)], PHOTO_COLUMNS
    if boxes is not None:
        counts, photo_columns = [*counts, boxes], (*PHOTO_COLUMNS, "number of boxes")
    tables = {name: metadata(dataset.examples[name], paths, *counts) for name in ("train", split)}
    goals = {name: leak_targets(dataset.examples[name]) for name in ("train", split)}
    photo = len(photo_columns)
    leaks = {}
    for target, gold in goals[split].items():
        trained = goals["train"].get(target, np.zeros(1, bool))
        if min(trained.sum(), (~trained).sum(), gold.sum(), (~gold).sum()) < FEWEST:
            continue
        leaks[target] = {"posts": int(gold.sum())}
        for name, columns in (("photo", slice(photo)), ("text", slice(photo, None))):
            trees = GradientBoostingClassifier(n_estimators=50, random_state=0)
            trees.fit(tables["train"][:, columns], trained)
            leaks[target][name] = auc(gold, trees.predict_proba(tables[split][:, columns])[:, 1])
        alone = [auc(gold, column)[0] for column in tables[split][:, :photo].T]
        best = int(np.argmax(np.abs(np.array(alone) - 0.5)))
        leaks[target]["column"] = (photo_columns[best], max(alone[best], 1 - alone[best]))
    return leaks


def auc(gold, scores):
    """(area under the ROC curve, half of its 95% interval by Hanley & McNeil, 1982)."""
    from sklearn.metrics import roc_auc_score

    area, positive = float(roc_auc_score(gold, scores)), int(gold.sum())
    negative, a, b = len(gold) - positive, area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positive - 1) * (a - area**2) + (negative - 1) * (b - area**2)
    return area, 1.96 * (max(variance, 0) / (positive * negative)) ** 0.5


# ------------------------------------------------------------------------------------------------------ notes


def stands_in(words, text):
    """Whether the runs of letters and digits of `words` stand in a text, next to each other, in any case.

    Words that are signs alone never do, nor a name inside a run of letters of a script without spaces.
    """
    name, there = (re.findall(r"\w+", side.lower()) for side in (" ".join(words), text))
    return bool(name) and f" {' '.join(name)} " in f" {' '.join(there)} "


def note_leaks(dataset, split, notes):
    """How much of the gold of train and of `split` stands in what `notes`, a `Notes`, say of its posts.

    {"about_post" or "about_photo", where a post has it: {"train" or `split`: {"gold" or "unseen": (standing,
    all)}}}. gold: every entity, or every row of relations, and then head and tail must both stand there;
    unseen: the entities that are no `mentions` of train, none for relations. Nothing is said of a post
    without a note.
    """
    known, leaks = mentions(dataset.examples["train"]), {}
    for key in EXTRAS["both"]:
        counts, has_text = {}, False
        for name in ("train", split):
            gold, unseen = [], []  # whether it stands there, one each
            for example in dataset.examples[name]:
                text = note_text(notes.notes.get(notes.find(example, name), {}), key)
                has_text = has_text or bool(text)
                if not hasattr(example, "labels"):
                    ends = (example.words[start:end] for start, end in (example.head, example.tail))
                    gold.append(all(stands_in(words, text) for words in ends))
                    continue
                for _, start, end in entity_spans(example.labels):
                    words = example.words[start:end]
                    gold.append(stands_in(words, text))
                    if tuple(word.lower() for word in words) not in known:
                        unseen.append(gold[-1])
            counts[name] = {"gold": (sum(gold), len(gold)), "unseen": (sum(unseen), len(unseen))}
        if has_text:
            leaks[key] = counts
    return leaks


# --------------------------------------------------------------------------------------------------- ensemble


def ensemble(run_dirs, split, device, **now):
    """Records of `split` by the mean of the probabilities of several runs of one system, loaded in turn.

    Of a CRF these are marginals, so that each word has the label most probable by itself. `now`: as
    `open_run` takes it.
    """
    sums, known = None, frozenset()
    for run_dir in run_dirs:
        model, config, dataset, posts = open_run(run_dir, split, device, **now)
        fit_threads(model)
        settings = config["eval_batch_size"], device, precision_on(device, config)
        of_run = label_probabilities(model, posts, *settings, f"{run_dir.name}")
        sums = of_run if sums is None else [a + b for a, b in zip(sums, of_run, strict=True)]
        known |= mentions(dataset.examples["train"])
    records = []
    for i, total in enumerate(sums):
        chance, best = (total / len(run_dirs)).max(-1)
        records.append(record_of(posts, i, best.tolist(), chance.tolist(), config["labels"], known))
    return records


# ----------------------------------------------------------------------------------------------------- photos


def image_check(run_dir, split, shuffles, device, **now):
    """What a run does on `split` with true, shuffled (several seeds) and no photos: `checked_photos`.

    What notes say of a photo is shown with it; a picture generated from the text stays with its post. `now`:
    where things lie, as `open_run` takes it.
    """
    model, config, dataset, posts = open_run(run_dir, split, device, **now)
    fit_threads(model)
    known = mentions(dataset.examples["train"])
    ids = [example.image_id for example in posts.examples]
    swaps = [shuffled_photos(ids, posts.cache, seed, posts.notes) for seed in range(shuffles)]
    photos = sum(photo is not None for photo in swaps[0].values())

    def run(swap, name):
        settings = config["labels"], config["eval_batch_size"], device, precision_on(device, config)
        return predict_posts(model, posts.showing(swap), *settings, known, f"{run_dir.name}, {name} photos")

    true = run(None, "true")
    if not photos:  # all three are one
        return checked_photos(true, [true] * shuffles, true, photos)
    shuffled = [run(swap, f"shuffled ({seed + 1} of {shuffles})") for seed, swap in enumerate(swaps)]
    return checked_photos(true, shuffled, run(dict.fromkeys(ids), "no"), photos)


def checked_photos(true, shuffled, none, photos):
    """The image check of one model's records: with true photos, with others' (a list a shuffle), with none.

    `photos`: how many there are. Returns a plain dict of scores; its "bootstrap" is the `paired_bootstrap` of
    true against shuffled photos, None where there is no photo to show.
    """
    return {
        "photos": photos,
        "true": score(true),
        "shuffled": [score(records) for records in shuffled],
        "none": score(none),
        "bootstrap": paired_bootstrap([true], shuffled) if photos else None,
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
    """What the image check says of a run, in words."""
    if config["fusion"] == "none" and not check["photos"]:
        return "text only" if config["extra"] == "none" else "text and notes on the post only"
    words = photo_verdict(check)
    if check["photos"] > 1:
        for kind in ("notes", "photos"):
            if config[f"shuffle_{kind}"]:
                words = f"trained on shuffled {kind}; {words}"
    return words


def photo_verdict(check):
    """What the image check says, in words: does the interval of true against shuffled photos hold 0?"""
    if check["photos"] < 2:
        return "fewer than 2 photos: cannot tell"
    result = check["bootstrap"]
    if result["low"] > 0:
        words = "depends on its photos"
    elif result["high"] < 0:
        words = "wrong photos do better"
    else:
        words = "wrong photos do as well, as far as these posts can tell"
    return (f"true - shuffled {result['difference']:+.3f}, 95% interval {result['low']:+.3f} to"
            f" {result['high']:+.3f}: {words}")  # fmt: skip


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
    text = ", ".join(f"{name.removeprefix('entity_')} {change:+.3f}" for name, change in changes.items())
    return f"F1 with shuffled photos, by type: {text}"
