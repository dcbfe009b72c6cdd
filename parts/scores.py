"""Predictions -> scores, with no model: the files of predictions, and what is counted in them.

Two families of scores, always both and always named. Token level: accuracy and weighted precision, recall and
F1 over all labels, `O` included. Entity level: precision, recall and F1 of whole spans. They differ by 0.1
and more, and published tables mix them. For relations: the same over rows, and micro scores without `None`.
"""

import functools
import hashlib
import json
import re
from collections import Counter

from data import NONE, check_label, check_scheme, conll_posts, label_scheme, read_lines, reading_notes, to_bio
from parts.files import is_span, is_text

# ----------------------------------------------------------------------------------------------------- scores


def entity_spans(labels, strict=False):
    """Entities of one BIO sequence as a set of (type, start, end), end exclusive.

    Lenient, as the CoNLL-2000 evaluation script and seqeval's default mode count: an entity is a run of one
    type that begins at B, or at an I that does not continue one. Strict IOB2: only B begins an entity; an
    orphan I is none.
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


def rate_text(scores, name):
    """A rate of `ratio_scores` as text; "-" where nothing was to be found, and its 0 says nothing."""
    nothing = scores.get("gold") == 0 and (name == "recall" or scores["predicted"] == 0)
    return "-" if nothing else f"{scores[name]:.4f}"


def mean_f1(types):
    """Macro F1: the mean of the F1 of the types that gold or predictions have, rare or not."""
    return sum(kind["f1"] for kind in types.values()) / max(1, len(types))


def span_scores(gold, predicted):
    """Micro scores of whole entities (sets of `entity_spans`, one a post), their macro F1, and by `types`."""
    counts = {"gold": Counter(), "predicted": Counter(), "correct": Counter()}
    for a, b in zip(gold, predicted, strict=True):
        for name, spans in (("gold", a), ("predicted", b), ("correct", a & b)):
            counts[name].update(kind for kind, _, _ in spans)
    per_type = {
        kind: ratio_scores(*(counts[name][kind] for name in ("correct", "predicted", "gold")))
        for kind in sorted(counts["gold"] | counts["predicted"])
    }
    micro = ratio_scores(*(counts[name].total() for name in ("correct", "predicted", "gold")))
    return micro | {"macro_f1": mean_f1(per_type), "types": per_type}


def entity_scores(gold, predicted, strict=False):
    """`span_scores` of label sequences, one a post."""
    return span_scores(*([entity_spans(labels, strict) for labels in side] for side in (gold, predicted)))


def mentions(examples):
    """Every entity of `examples`, as its words in lower case: what counts as seen. Relations have none."""
    posts = [example for example in examples if hasattr(example, "labels")]
    return frozenset(
        tuple(word.lower() for word in example.words[start:end])
        for example in posts for _, start, end in entity_spans(example.labels)
    )  # fmt: skip


@functools.lru_cache(4)
def longest_mention(known):
    """Words of the longest of `mentions`."""
    return max(map(len, known), default=0)


def seen_spans(words, known):
    """Spans [start, end) of `words` that are `mentions` of train, whatever their label."""
    words, longest = [word.lower() for word in words], longest_mention(known)
    spans = ((i, j) for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1))
    return [[i, j] for i, j in spans if tuple(words[i:j]) in known]


def seen_scores(records):
    """(scores of entities that are a mention of train, of all others), lenient, from records with `seen`."""
    sides = {True: ([], []), False: ([], [])}
    for record in records:
        places = set(map(tuple, record["seen"]))
        for side, key in enumerate(("gold", "predicted")):
            for part in sides:
                spans = {span for span in entity_spans(record[key]) if (span[1:] in places) == part}
                sides[part][side].append(spans)
    return span_scores(*sides[True]), span_scores(*sides[False])


def label_scores(gold, predicted):
    """Accuracy, weighted precision, recall and F1 over all labels, and macro F1.

    Weighted recall is accuracy, by definition.
    """
    from sklearn.metrics import precision_recall_fscore_support  # here: it takes 2 seconds to load

    weighted, macro = (precision_recall_fscore_support(gold, predicted, average=how, zero_division=0)
                       for how in ("weighted", "macro"))  # fmt: skip
    accuracy = sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)
    rates = dict(zip(("precision", "recall", "f1"), map(float, weighted[:3]), strict=True))
    return {"accuracy": accuracy} | rates | {"macro_f1": float(macro[2])}


def relation_scores(gold, predicted):
    """Micro scores without `None`, their macro F1, and `types`, the scores of each relation."""
    correct = Counter(a for a, b in zip(gold, predicted, strict=True) if a == b)
    counts = [correct, Counter(predicted), Counter(gold)]
    kinds = sorted((set(gold) | set(predicted)) - {NONE})
    micro = ratio_scores(*(sum(count[kind] for kind in kinds) for count in counts))
    types = {kind: ratio_scores(*(count[kind] for count in counts)) for kind in kinds}
    return micro | {"macro_f1": mean_f1(types), "types": types}


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
        if all("seen" in record for record in records):
            metrics["entity_seen"], metrics["entity_unseen"] = seen_scores(records)
    else:
        metrics["relation"] = relation_scores(gold, predicted)
    metrics["token" if ner else "row"] = label_scores(flat_gold, flat)
    constant = [[majority] * len(labels) for labels in gold] if ner else [majority] * len(gold)
    without = entity_scores(gold, constant) if ner else relation_scores(gold, constant)
    baseline = label_scores(flat_gold, [majority] * len(flat))
    metrics["baseline"] = baseline | {"label": majority, "main_f1": without["f1"]}
    metrics["posts_without_photo"] = sum(record.get("photo") is False for record in records)
    metrics["posts_without_note"] = sum(record.get("extra") is False for record in records)
    if ner:
        chances = (chance for record in records for chance in record.get("probability", []))
        metrics["words_answered_without_model"] = sum(chance is None for chance in chances)
    metrics["gold_fingerprint"] = gold_fingerprint(records)
    metrics["warnings"] = one_label_warnings(flat, metrics["entity" if ner else "relation"])
    return metrics


def one_label_warnings(predicted, main):
    """What to say of predictions that are (nearly) one label: such a run can look good in accuracy."""
    label, count = Counter(predicted).most_common(1)[0]
    share, answered = count / len(predicted), main["predicted"]
    if share >= 0.99 or answered < 0.1 * main["gold"]:
        answers = f"{answered} entities or relations were answered where gold has {main['gold']}"
        most = f"{share:.1%} of the answers are {label!r}"
        return [f"{most}, and {answers}: the accuracy measures the data set, not the model"]
    return []


def main_score(metrics):
    """The one number that chooses an epoch: entity F1, or micro-F1 without `None`."""
    return metrics["entity" if metrics["task"] == "ner" else "relation"]["f1"]


def gold_fingerprint(records):
    """Digits that prediction files share exactly when they hold the same posts with the same gold labels."""
    posts = sorted(json.dumps([r.get(key) for key in ("words", "head", "tail", "gold")]) for r in records)
    return hashlib.sha256("\n".join(posts).encode()).hexdigest()[:16]


def format_scores(metrics, title):
    """The scores as text: both families, per type, beside the majority baseline; warnings last."""
    ner = metrics["task"] == "ner"
    main, level = ("entity", "token") if ner else ("relation", "row")
    gold = metrics[main]["gold"]
    what = f"{metrics['posts']} rows, {gold} not {NONE}"
    if ner:
        what = f"{metrics['posts']} posts, {metrics['words']} words, {gold} entities"
    width = max([38, *(len(kind) + 4 for kind in metrics[main]["types"])])

    def line(name, scores, accuracy=None):
        precision, recall, f1 = (rate_text(scores, rate) for rate in ("precision", "recall", "f1"))
        macro = rate_text(scores, "macro_f1") if "macro_f1" in scores else ""
        count = f"{scores['gold']:8d}{scores['predicted']:11d}" if "gold" in scores else ""
        first = "" if accuracy is None else f"{accuracy:.4f}"
        return f"{name:<{width}}{first:>9}{precision:>11}{recall:>9}{f1:>9}{macro:>10}{count}".rstrip()

    base = metrics["baseline"]
    heads = " accuracy  precision   recall       F1  macro F1    gold  predicted"
    lines = [f"{title}: {what}", f"{'':<{width}}{heads}"]
    if ner:
        lines += [line("entity level, whole spans (micro)", metrics["entity"])]
        lines += [line(f"    {kind}", s) for kind, s in metrics["entity"]["types"].items()]
        for name in ("seen", "unseen") if "entity_seen" in metrics else ():
            lines += [line(f"    mentions {name} in train", metrics[f"entity_{name}"])]
        lines += [line("entity level, strict IOB2", metrics["entity_strict"])]
    else:
        lines += [line(f"relations, micro without {NONE}", metrics["relation"])]
        lines += [line(f"    {kind}", s) for kind, s in metrics["relation"]["types"].items()]
    all_labels = "token level, weighted, O included" if ner else f"all rows, weighted, {NONE} included"
    lines += [line(all_labels, metrics[level], metrics[level]["accuracy"])]
    always = f"always {base['label']!r} (its {main} F1: {base['main_f1']:.4f})"
    lines += [line(always, base, base["accuracy"])]
    counts = {
        "posts without a photo": "posts_without_photo", "posts without a note": "posts_without_note",
        "words cut off or without a sub-token, answered O": "words_answered_without_model",
    }  # fmt: skip
    lines += [f"{text}: {metrics[key]}" for text, key in counts.items() if metrics.get(key)]
    return "\n".join(lines + [f"WARNING: {warning}" for warning in metrics["warnings"]])


# ------------------------------------------------------------------------------------------------ predictions


def is_list(value, fits):
    """Whether a value is a list of what `fits`."""
    return isinstance(value, list) and all(map(fits, value))


def is_rate(value):
    """Whether a value is null or a number from 0 to 1; a CRF's marginals may come out a little above."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1.01)


# Per key beside id and labels: whether a value is right, given how many labels there are (None: one, of a
# relation), and what it has to be.
KEYS = {
    "image_id": (lambda value, count: value is None or type(value) in (int, str) or is_list(value, is_text),
                 "text, a list of it or null"),
    "words": (lambda value, count: is_list(value, is_text) and count in (None, len(value)),
              "a list of words, of named entities as long as gold"),
    "probability": (lambda value, count: is_rate(value) if count is None else
                    is_list(value, is_rate) and len(value) == count,
                    "a number from 0 to 1 or null, of named entities a list of them as long as gold"),
    "head": (lambda value, count: is_span(value), "a span [start, end)"),
    "tail": (lambda value, count: is_span(value), "a span [start, end)"),
    "relevance": (lambda value, count: is_rate(value), "a number from 0 to 1, or null"),
    "seen": (lambda value, count: is_list(value, is_span), "a list of spans [start, end)"),
}  # fmt: skip


def read_predictions(path, notes=None, task=None):
    """Records {id, words, gold, predicted, ...} from JSON lines as train.py writes them, or from plain CoNLL.

    CoNLL: `word ... gold predicted` a line, else as `read_ner` reads one's own files. Labels are lists for
    named entities, one string for relations; those of other schemes become BIO. `notes` is a list that is
    told of it. `task`: "ner" or "relation" if the file must be a run's on it, with all that a report shows.
    ValueError with file and line.
    """
    lines, notes = read_lines(path), [] if notes is None else notes
    first = next((line for _, line in lines if line.strip()), "")
    is_json = re.match(r'\s*\{\s*"[^\t]*$', first)  # CoNLL may begin with a brace, but not so and without tab
    if is_json or task:
        records, numbers, documents = json_records(path, lines, task)
    else:
        records, numbers, documents = conll_records(path, lines)
    if not any(record["gold"] for record in records):
        raise ValueError(f"{path}: no predictions in it")
    if isinstance(records[0]["gold"], str):
        return records
    schemes = {key: label_scheme([record[key] for record in records]) for key in ("gold", "predicted")}
    check_scheme(path, [(n, r["gold"]) for n, r in zip(numbers, records, strict=True)], schemes["gold"])
    if schemes["gold"] != "BIO" or schemes["predicted"] == "IOB1":  # a model's answers may look like any
        schemes["predicted"] = schemes["gold"]
    changed = 0
    for record in records:
        for key, scheme in schemes.items():
            labels, record[key] = record[key], to_bio(record[key], scheme)
            changed += sum(a != b for a, b in zip(labels, record[key], strict=True))
    notes += reading_notes(documents, schemes["predicted"], changed)
    return records


def json_records(path, lines, task):
    """As `conll_records`, of JSON lines; `task` as `read_predictions` has it."""
    records, numbers, ids = [], [], set()
    needed = {None: (), "ner": ("image_id", "words"), "relation": ("image_id", "words", "head", "tail")}[task]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            post_id, gold, predicted = record["id"], record["gold"], record["predicted"]
            if type(post_id) not in (int, str):
                raise TypeError("the id is no text and no whole number")
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"not a JSON object with id, gold and predicted ({error})"
            raise ValueError(f"{path}:{number}: {reason}") from None
        ner, where = isinstance(gold, list), f"{path}:{number}: post {post_id!r:.60}"
        if records and ner != isinstance(records[0]["gold"], list):
            raise ValueError(f"{where}: named entities and relations in one file; split them")
        if not isinstance(predicted, type(gold)) or (ner and len(predicted) != len(gold)):
            reason = "gold and predicted must be two label lists of one length, or two labels"
            raise ValueError(f"{where}: {reason}")
        labels = [*gold, *predicted] if ner else [gold, predicted]
        if not is_list(labels, is_text):
            raise ValueError(f"{where}: a label is not text, but {labels!r:.60}")
        for label in dict.fromkeys(labels) if ner else ():
            check_label(label, None, where)
        if task and (ner != (task == "ner") or not record.keys() >= set(needed)):
            message = f"not a post of a run on {task}, which has {', '.join(needed)}; restore the file"
            raise ValueError(f"{where}: {message}")
        ends = ("head", "tail") if "words" in record else ()
        for key, (fits, wanted) in KEYS.items():
            if key in record and not fits(record[key], len(gold) if ner else None):
                message = f"{key} must be {wanted}, not {record[key]!r:.60}; correct it or leave it out"
                raise ValueError(f"{where}: {message}")
        if any(key in record and record[key][1] > len(record["words"]) for key in ends):
            raise ValueError(f"{where}: head and tail must be spans of its {len(record['words'])} words")
        if str(post_id) in ids:
            raise ValueError(f"{where}: this id stands twice; each post is predicted once")
        ids.add(str(post_id))
        if isinstance(record.get("image_id"), list):  # as an example has several
            record["image_id"] = tuple(record["image_id"])
        records.append(record)
        numbers.append([number] * len(gold))
    return records, numbers, 0


def conll_records(path, lines):
    """(records, the line of each label of each, number of -DOCSTART- lines)."""
    posts, documents = conll_posts(path, lines, spaced=True)
    table = [row for _, _, rows in posts for row in rows]
    for number, fields in table:
        if len(fields) < 3:
            line = f"{lines[number - 1][1]!r:.80}"
            raise ValueError(f"{path}:{number}: expected 'word gold predicted', found {line}")
        for label in fields[-2:]:
            check_label(label, None, f"{path}:{number}")
    # The last two columns count, as in the CoNLL evaluation script. Before the word its number may stand.
    numbered = all(len(fields) > 3 and fields[0].isdigit() for _, fields in table)
    word, records, numbers = int(numbered), [], []
    for count, (_, image_id, rows) in enumerate(posts, 1):
        columns = zip(*((fields[word], *fields[-2:]) for _, fields in rows), strict=True)
        record = dict(zip(("words", "gold", "predicted"), map(list, columns), strict=True))
        records.append({"id": image_id or f"post {count}"} | record)
        numbers.append([number for number, _ in rows])
    return records, numbers, documents
