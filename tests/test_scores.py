"""The scores against seqeval, scikit-learn and hand-computed values; its readers against bad files."""

import itertools
import json
import random

import faults
import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from conftest import CONFIG
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

from data import NerExample, RelationExample
from evaluate import main
from parts.checks import check_row, type_changes, verdict
from parts.files import write_json_lines
from parts.posts import shuffled_photos
from parts.scores import entity_scores, entity_spans, format_scores, gold_fingerprint, label_scores, mentions
from parts.scores import one_label_warnings, rate_text, read_predictions, relation_scores, score, seen_scores
from parts.scores import seen_spans

# B-I: a type like a label.
LABELS = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("PER", "LOC", "B-I"))]
RATES = ("accuracy", "precision", "recall", "f1")
TASKS = [("ner", "entity", "token"), ("relation", "relation", "row")]
every_task = pytest.mark.parametrize("task", ["ner", "relation"])


def make_labels(seed, posts, kept=0.7):
    """Gold and predicted labels: any after any, half `O`; posts of 0 to 12 words, every fifth of one."""
    rng, often = random.Random(seed), ["O"] * 5 + LABELS
    gold = [rng.choices(often, k=rng.randint(0, 12) if i % 5 else 1) for i in range(posts)]
    return gold, [[y if rng.random() < kept else rng.choice(LABELS) for y in labels] for labels in gold]


def make_records(task, seed=0, posts=40):
    rng, kinds = random.Random(seed), ("None", "None", "/per/per/peer", "/per/org/member_of")
    pairs = zip(*make_labels(seed, posts), strict=True)
    if task == "relation":
        pairs = [(rng.choice(kinds), rng.choice(kinds)) for _ in range(posts)]
    words = ("Messi", "\u00a0", "#", '{"', "½", "b c", "\u2028", "#IMGID:7")
    return [
        {"id": str(i), "words": rng.choices(words, k=len(y) if task == "ner" else 9), "gold": y,
         "predicted": predicted}
        for i, (y, predicted) in enumerate(pairs) if y  # a CoNLL file has no empty posts
    ]  # fmt: skip


def flat(tree, path=()):
    """{path: number or text}: pytest.approx takes neither nested dicts nor lists in them."""
    if isinstance(tree, dict):
        return {key: value for name in tree for key, value in flat(tree[name], (*path, name)).items()}
    return {path: str(tree) if isinstance(tree, list) else tree}


def ratios(precision, recall, f1, gold, predicted, correct):
    return dict(precision=precision, recall=recall, f1=f1, gold=gold, predicted=predicted, correct=correct)


def check_report(scores, report):
    """Micro scores and those of each type are those of a report by seqeval or scikit-learn."""
    ours = {("micro avg", *key) if key[0] != "types" else key[1:]: n for key, n in flat(scores).items()}
    assert {kind for kind, _ in ours} == report.keys() - {"macro avg", "weighted avg"}
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "gold": "support"}
    theirs = {(kind, name): report[kind][names[name]] for kind, name in ours if name in names}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
    assert scores["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])


def test_entity_spans_are_those_of_seqeval():
    for labels in itertools.chain(*make_labels(0, posts=2000)):
        theirs = {(kind, start, last + 1) for kind, start, last in get_entities(labels)}
        assert entity_spans(labels) == theirs, labels


# Of few posts: one that differs is not drowned.
@pytest.mark.parametrize("batches, posts", [(6, 600), (200, 2)])
@pytest.mark.parametrize("how", [{}, {"mode": "strict", "scheme": IOB2}], ids=["lenient", "strict"])
def test_entity_scores_are_those_of_seqeval(how, batches, posts):
    for seed in range(batches):
        # No report without an entity.
        gold, predicted = ([["B-PER"], *side] for side in make_labels(seed, posts))
        options = {"output_dict": True, "zero_division": 0} | how
        report = seqeval.metrics.classification_report(gold, predicted, **options)
        check_report(entity_scores(gold, predicted, strict=bool(how)), report)


def test_seen_and_unseen_mentions_share_out_all_spans():
    """Against a search through every mention of train, word for word; the two parts add up to all spans."""
    rng, words = random.Random(0), ["Jordan", "jordan", "New", "York", "x"]
    for _ in range(50):
        train = [NerExample("", "", tuple(rng.choices(words, k=len(y))), tuple(y))
                 for y in make_labels(rng.random(), 6)[0]]  # fmt: skip
        known = {" ".join(e.words[s:t]).lower() for e in train for _, s, t in entity_spans(e.labels)}
        assert {" ".join(mention) for mention in mentions(train)} == known
        gold, predicted = make_labels(rng.random(), 8)
        records = [{"words": rng.choices(words, k=len(a)), "gold": a, "predicted": b}
                   for a, b in zip(gold, predicted, strict=True)]  # fmt: skip
        for record in records:
            n, record["seen"] = len(record["words"]), seen_spans(record["words"], mentions(train))
            assert record["seen"] == [[i, j] for i in range(n) for j in range(i + 1, n + 1)
                                      if " ".join(record["words"][i:j]).lower() in known]  # fmt: skip
        for part, scores in zip((True, False), seen_scores(records), strict=True):
            kept = [
                [{s for s in entity_spans(r[side])
                  if (" ".join(r["words"][s[1] : s[2]]).lower() in known) == part} for r in records]
                for side in ("gold", "predicted")
            ]  # fmt: skip
            assert scores["gold"] == sum(map(len, kept[0])) and scores["predicted"] == sum(map(len, kept[1]))
            assert scores["correct"] == sum(len(a & b) for a, b in zip(*kept, strict=True))
        both, whole = seen_scores(records), entity_scores(gold, predicted)
        for name in ("gold", "predicted", "correct"):
            assert both[0][name] + both[1][name] == whole[name]
    assert mentions([RelationExample("", "", ("a", "b"), (0, 1), (1, 2), "x")]) == set()


def test_a_training_file_splits_foreign_predictions(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("IMGID:1\nJordan\tB-PER\nwon\tO\n")
    (tmp_path / "theirs.txt").write_text("JORDAN B-ORG B-ORG\nin O O\nParis B-LOC O\n")
    main(["--predictions", str(tmp_path / "theirs.txt"), "--train", str(tmp_path / "train.txt")])
    out = capsys.readouterr().out
    metrics = json.loads((tmp_path / "theirs.txt.metrics.json").read_text())
    assert (metrics["entity_seen"]["f1"], metrics["entity_unseen"]["f1"]) == (1, 0)
    assert "mentions seen in train" in out and "mentions unseen in train" in out
    write_json_lines(tmp_path / "bare.jsonl", [{"id": 1, "gold": ["O"], "predicted": ["O"]}])
    with pytest.raises(ValueError, match="has no words or no entities, so --train cannot tell"):
        main(["--predictions", str(tmp_path / "bare.jsonl"), "--train", str(tmp_path / "train.txt")])
    with pytest.raises(SystemExit):
        main(["--run", str(tmp_path), "--train", str(tmp_path / "train.txt")])


def test_label_scores_are_those_of_sklearn():
    for seed in range(100):
        sides = make_labels(seed, posts=1 + seed % 20, kept=seed % 10 / 10)
        gold, predicted = (sum(side, []) for side in sides)
        report = sklearn.metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
        macro, report = report["macro avg"], report["weighted avg"]
        expected = {"precision": report["precision"], "f1": report["f1-score"], "macro_f1": macro["f1-score"]}
        expected |= dict.fromkeys(("accuracy", "recall"), sklearn.metrics.accuracy_score(gold, predicted))
        assert label_scores(gold, predicted) == pytest.approx(expected)


def test_relation_scores_are_those_of_sklearn():
    for seed in range(100):
        records = [{"gold": y, "predicted": y} for y in ("None", "x")]
        records += make_records("relation", seed, seed % 20)
        gold, predicted = ([record[key] for record in records] for key in ("gold", "predicted"))
        how = {"labels": sorted({*gold, *predicted} - {"None"}), "output_dict": True, "zero_division": 0}
        report = sklearn.metrics.classification_report(gold, predicted, **how)
        check_report(relation_scores(gold, predicted), report)


NER = [
    {"id": 1, "gold": "B-PER I-PER O B-LOC".split(), "predicted": "B-PER I-PER O B-ORG".split(),
     "photo": True, "probability": [0.9, 0.8, None, 0.7], "extra": False},
    {"id": 2, "gold": ["O", "B-ORG", "O"], "predicted": ["O", "I-ORG", "O"],  # right, unless strict
     "photo": False, "extra": True},
    {"id": 3, "gold": ["O"], "predicted": ["O"], "photo": False, "probability": [None]},
    {"id": 4, "gold": ["B-LOC", "I-LOC"], "predicted": ["B-LOC", "O"]},
]  # fmt: skip
LENIENT = {
    "LOC": ratios(0, 0, 0, 2, 1, 0),
    "ORG": ratios(1 / 2, 1, 2 / 3, 1, 2, 1),
    "PER": ratios(1, 1, 1, 1, 1, 1),
}
NER_SCORES = {
    "task": "ner", "posts": 4, "words": 10, "posts_without_photo": 2, "posts_without_note": 1,
    "words_answered_without_model": 2, "warnings": [],
    "entity": ratios(1 / 2, 1 / 2, 1 / 2, 4, 4, 2) | {"macro_f1": 5 / 9, "types": LENIENT},
    "entity_strict": ratios(1 / 3, 1 / 4, 2 / 7, 4, 3, 1)
    | {"macro_f1": 1 / 3, "types": LENIENT | {"ORG": ratios(0, 0, 0, 1, 1, 0)}},
    # Precision: O 4/5, B-PER, I-PER, B-LOC 1. F1: O 8/9, B-PER, I-PER 1, B-LOC 2/3.
    # O weighs 4 of 10, B-LOC 2. 7 labels.
    "token": {"accuracy": 0.7, "precision": 0.72, "recall": 0.7, "f1": 31 / 45, "macro_f1": 32 / 63},
    "baseline": {"label": "O", "accuracy": 0.4, "precision": 0.16, "recall": 0.4, "f1": 8 / 35,
                 "macro_f1": 2 / 21, "main_f1": 0},
}  # fmt: skip
NER_TEXT = """: 4 posts, 10 words, 4 entities|accuracy precision recall F1 macro F1 gold predicted
entity level, whole spans (micro) 0.5000 0.5000 0.5000 0.5556 4 4|LOC 0.0000 0.0000 0.0000 2 1\
|ORG 0.5000 1.0000 0.6667 1 2
PER 1.0000 1.0000 1.0000 1 1|entity level, strict IOB2 0.3333 0.2500 0.2857 0.3333 4 3
token level, weighted, O included 0.7000 0.7200 0.7000 0.6889 0.5079
always 'O' (its entity F1: 0.0000) 0.4000 0.1600 0.4000 0.2286 0.0952
posts without a photo: 2|posts without a note: 1|words cut off or without a sub-token, answered O: 2"""


@pytest.mark.parametrize("predicted, texts", [
    ("O", ("-", "-", "-")), ("B-PER", ("0.0000", "-", "0.0000")),  # of two posts without an entity
])  # fmt: skip
def test_a_rate_of_nothing_is_no_number(predicted, texts):
    scores = entity_scores([["O"], ["O"]], [["O"], [predicted]])
    assert tuple(rate_text(scores, rate) for rate in ("precision", "recall", "f1")) == texts
    assert rate_text(scores, "macro_f1") == texts[0]
    assert [rate_text(side, "f1") for side in (scores | {"gold": 2}, {"f1": 0.0})] == ["0.0000"] * 2


PAIRS = ["a a", "a None", "b b", "None a", "a a"]
ROWS = [{"id": i, "gold": pair.split()[0], "predicted": pair.split()[1]} for i, pair in enumerate(PAIRS)]
ROW_SCORES = {
    "task": "relation", "posts": 5, "posts_without_photo": 0, "posts_without_note": 0, "warnings": [],
    "relation": ratios(3 / 4, 3 / 4, 3 / 4, 4, 4, 3)
    | {"macro_f1": 5 / 6,
       "types": {"a": ratios(2 / 3, 2 / 3, 2 / 3, 3, 3, 2), "b": ratios(1, 1, 1, 1, 1, 1)}},
    "row": dict.fromkeys(RATES, 0.6) | {"macro_f1": 5 / 9},  # all three: a 2/3, b 1, None 0
    "baseline": {"label": "a", "accuracy": 0.6, "precision": 0.36, "recall": 0.6, "f1": 0.45,
                 "macro_f1": 0.25, "main_f1": 2 / 3},
}  # fmt: skip
ROW_TEXT = """: 5 rows, 4 not None|accuracy precision recall F1 macro F1 gold predicted
relations, micro without None 0.7500 0.7500 0.7500 0.8333 4 4|a 0.6667 0.6667 0.6667 3 3\
|b 1.0000 1.0000 1.0000 1 1
all rows, weighted, None included 0.6000 0.6000 0.6000 0.6000 0.5556
always 'a' (its relation F1: 0.6667) 0.6000 0.3600 0.6000 0.4500 0.2500"""


BY_HAND = [(NER, NER_SCORES, NER_TEXT), (ROWS, ROW_SCORES, ROW_TEXT)]


@pytest.mark.parametrize("records, expected, text", BY_HAND)
def test_by_hand(records, expected, text, tmp_path, capsys):
    path = tmp_path / "theirs.jsonl"
    write_json_lines(path, records)
    main(["--predictions", str(path)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    fingerprint = gold_fingerprint(records)
    assert lines == (f"{path} (gold {fingerprint})" + text).replace("\n", "|").split("|")
    assert flat(score(records)) == pytest.approx(flat(expected | {"gold_fingerprint": fingerprint}))
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.metrics.json"}
    written = json.loads((tmp_path / f"{path.name}.metrics.json").read_text(encoding="utf-8"))
    assert written == score(records)


@every_task
def test_perfect_predictions_in_any_order(task):
    records = make_records(task)
    assert flat(score(records[::-1])) == pytest.approx(flat(score(records)))
    metrics = score([record | {"predicted": record["gold"]} for record in records])
    numbers = {key: n for key, n in flat(metrics).items() if key[0] != "baseline" and key[-1] in RATES}
    assert len(numbers) > 8 and set(numbers.values()) == {1.0} and metrics["warnings"] == []


@pytest.mark.parametrize("task, main, level", TASKS)
def test_one_answer_for_all_warns(task, main, level):
    records, answer = make_records(task), "O" if task == "ner" else "None"
    answers = [[answer] * len(record["gold"]) if task == "ner" else answer for record in records]
    metrics = score([record | {"predicted": y} for record, y in zip(records, answers, strict=True)])
    assert metrics[main]["f1"] == metrics[main]["predicted"] == 0 < metrics[main]["gold"]
    assert metrics["baseline"] == metrics[level] | {"label": answer, "main_f1": 0}
    (warning,) = metrics["warnings"]
    assert f"100.0% of the answers are {answer!r}" in warning
    assert f"gold has {metrics[main]['gold']}:" in warning
    assert format_scores(metrics, "").endswith(f"\nWARNING: {warning}")


@pytest.mark.parametrize("answers, gold, found, warns", [
    ("O" * 99 + "x", 1, 1, True), ("O" * 98 + "xx", 2, 2, False), ("xx", 2, 2, True),  # (nearly) one label
    ("Ox", 11, 1, True), ("Ox", 10, 1, False), ("Ox", 0, 0, False),  # hardly anything found
])  # fmt: skip
def test_when_to_warn(answers, gold, found, warns):
    assert len(one_label_warnings(list(answers), {"gold": gold, "predicted": found})) == warns


@pytest.mark.parametrize("bom, newline, end", [("", "\n", "\n"), ("\ufeff", "\r\n", "\r\n" * 3)])
@pytest.mark.parametrize("separator, ids", [("\t", True), ("\t", False), (" ", True), ("json", True)])
def test_every_form_says_the_same(separator, ids, bom, newline, end, tmp_path):
    path, records = tmp_path / "a", make_records("ner")
    if separator == " ":  # where spaces separate, no word can hold one
        records = [r | {"words": [word.replace(" ", "-") for word in r["words"]]} for r in records]
    write_json_lines(path, records)
    if separator != "json":
        posts = [[f"IMGID:{record['id']}"] * ids for record in records]
        for post, r in zip(posts, records, strict=True):
            post += [separator.join(row) for row in zip(r["words"], r["gold"], r["predicted"], strict=True)]
        path.write_text("\n\n".join(map("\n".join, posts)), encoding="utf-8")
    text = path.read_text(encoding="utf-8").strip("\n").replace("\n", newline)
    path.write_bytes((bom + text + end).encode())
    read = read_predictions(path)
    assert read == (records if ids else [r | {"id": f"post {i}"} for i, r in enumerate(records, 1)])
    assert score(read) == score(records) and gold_fingerprint(read) == gold_fingerprint(records)
    assert format_scores(score(read), "x") == format_scores(score(records), "x")


POST, ROW = '{"id": 1, "gold": ["O"], "predicted": ["O"]}', '{"id": 2, "gold": "None", "predicted": "None"}'
NO_LABELS = ['"X-PER"', '"B"', '"B-"', '"o"', '""', '"O "', '"B-PER\\n"', '"PER"']
BAD = [
    *((f"{POST}\n\n{line}", 3, "not a JSON object")
      for line in ("{'id': 2}", POST[:-1], "[1]", '"id"', '{"id":' * 200_000)),
    *((POST.replace(key, "other"), 1, f"'{key}'") for key in ("id", "gold", "predicted")),
    *((POST.replace('["O"]', other, 1), 1, "of one length") for other in ('["O", "O"]', '"O"', "null", "[]")),
    *((POST.replace('"O"', label, 1), 1, "is not O, B-TYPE or I-TYPE") for label in NO_LABELS),
    (ROW.replace('"None"', "1"), 1, "a label is not text, but [1, 1]"),
    (ROW.replace('"None"', "[]", 1), 1, "of one length"),
    *((POST.replace('"O"', label, 1), 1, "a label is not text") for label in ("null", "1", "[]", "{}")),
    *((POST.replace("1", post_id), 1, "the id is no") for post_id in ("null", "[1]", "true", "1.5")),
    *((f'{line[:-1]}, "{key}": {value}}}', 1, f"{key} must be a") for line, key, values in (
        (POST, "words", ('["a", "b"]', "null", "[1]", '"a"', "{}")), (ROW, "words", ('"a"', "[null]", "2")),
        (POST, "probability", ("0.5", "[true]", '["1"]', "[NaN]", "[1.5]", "[-1e999]", "[0, 0]", "[[0.5]]")),
        (ROW, "probability", ("[0.5]", '"0.5"', "2", "NaN")), (ROW, "relevance", ("[]", "-1", '"high"')),
        (POST, "seen", ("null", "[0, 1]", "[[1]]", "[[0, 1, 2]]", "[[0.0, 1]]", "[[[], 1]]", "[[-1, 1]]")),
        (ROW, "head", ('"Ann"', "null", "[1, 1]", "[2]", "[true, 2]")), (ROW, "tail", ("{}", "[0, []]")),
    ) for value in values),
    *((f'{ROW[:-1]}, "image_id": {value}}}', 1, "image_id must be text, a list of it or null")
      for value in ("[1]", "1.5")),
    (ROW[:-1] + ', "words": ["a", "b"], "head": [0, 1], "tail": [1, 3]}', 1, "must be spans of its 2 words"),
    (POST.replace('"O"', '"B-\\ud800"', 1), 1, "surrogates not allowed"),
    (POST.replace("{", " { ", 1)[:-1], 1, "not a JSON"),
    (f"{POST}\n{POST}", 2, "post 1: this id stands twice"),
    (POST + "\n" + POST.replace("1", '"1"'), 2, "post '1': this id stands twice"),
    (f"{POST}\n{ROW}", 2, "split them"), (f"{ROW}\n{POST}", 2, "split them"),
    ("IMGID:1\na\tO\tO\n\nb\tO\n", 4, "expected 'word gold predicted'"), ("a\tO\tO\tp", 1, "label 'p'"),
    ("a O O\nb O", 2, "expected 'word"), ("a O O\nb", 2, "expected 'word"), ("a O O 0.9", 1, "label '0.9'"),
    ("a O O\r\n\r\nb O B\r\n", 3, "label 'B'"), ("a\tX-PER\tO", 1, "label 'X-PER'"),
    ("a  O  o", 1, "label 'o'"),
    *((text, None, "no predictions") for text in ("", "\ufeff\r\n \n", POST.replace('"O"', ""))),
    ("IMGID:1\n\nIMGID:2\n", 1, "post 1 has no words"),
    ("[" * 200_000, 1, "expected 'word"),
    ("a B-PER O\nb O O\n\nc S-PER O\n", 1, "'B-PER' before 'O' is not BIOES"),
    (b"a O O\n\xff O O\n", 2, "not UTF-8"), ("a O O".encode("utf-16"), 1, "not UTF-8"),
    (POST.encode() + b"\xe4", 1, "not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("text, line, said", BAD, ids=range(len(BAD)))
def test_bad_predictions(text, line, said, tmp_path):
    path = tmp_path / "theirs.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        main(["--predictions", str(path)])
    assert caught.type is ValueError and said in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.txt"]


@pytest.mark.parametrize("scheme", ["BIOES", "BIOLU", "BMOES", "BMOEW"])
@pytest.mark.parametrize("line", ["{} {} {}", "{}\t{}\t{}", "7 {} {} {}", "JSON"])
def test_predictions_are_read_as_training_files_are(scheme, line, tmp_path, capsys):
    """What a model answers need not be whole: it counts as in the CoNLL evaluation script."""
    first, middle, _, last, single = scheme
    words = [["x", "Ann", "Bob"], ["New", "York", "City"]]
    gold = [["O", f"{single}-PER", f"{single}-PER"], [f"{first}-LOC", f"{middle}-LOC", f"{last}-LOC"]]
    answers = [["O", f"{single}-PER", "O"], [f"{first}-LOC", f"{last}-LOC", f"{last}-LOC"]]
    records = [{"id": str(i), "words": words[i], "gold": gold[i], "predicted": answers[i]} for i in range(2)]
    path = tmp_path / "theirs.txt"
    write_json_lines(path, records)
    if line != "JSON":
        posts = [["-DOCSTART- O O", "", "IMGID:0\tO\tO"], ["IMGID:1"]]
        for post, *columns in zip(posts, words, gold, answers, strict=True):
            post += [line.format(*fields) for fields in zip(*columns, strict=True)]
        path.write_text("\n\n".join(map("\n".join, posts)))
    bio = [
        {"gold": ["O", "B-PER", "B-PER"], "predicted": ["O", "B-PER", "O"]},
        {"gold": ["B-LOC", "I-LOC", "I-LOC"], "predicted": ["B-LOC", "I-LOC", "B-LOC"]},
    ]
    assert read_predictions(path) == [record | labels for record, labels in zip(records, bio, strict=True)]
    main(["--predictions", str(path)])
    notes = [text for text in capsys.readouterr().out.splitlines() if text.startswith(f"{path}: ")]
    name = {"BIOLU": "BILOU", "BMOES": "BMES", "BMOEW": "BMEWO"}.get(scheme, scheme)
    count = sum(a != b for pair in zip(records, bio, strict=True) for key in bio[0]
                for a, b in zip(*(side[key] for side in pair), strict=True))  # fmt: skip
    wanted = ["1 -DOCSTART- lines left out"] if line != "JSON" else []
    wanted += [f"{name} labels read as BIO, {count} changed"]
    assert notes == [f"{path}: {note}" for note in wanted]


@pytest.mark.parametrize("task, line, needed", [
    ("ner", POST, ("image_id", "words")), ("relation", ROW, ("image_id", "words", "head", "tail")),
])  # fmt: skip
def test_what_a_report_shows_must_be_there(task, line, needed, tmp_path):
    path, values = tmp_path / "p", {"image_id": None, "words": ["a"], "head": [0, 1], "tail": [0, 1]}
    record = json.loads(line) | {key: values[key] for key in needed}
    write_json_lines(path, [record])
    assert read_predictions(path, task=task) == [record]
    with pytest.raises(ValueError, match="p:1: post .: not a post of a run on "):
        read_predictions(path, task="relation" if task == "ner" else "ner")
    for key in needed:
        write_json_lines(path, [{name: value for name, value in record.items() if name != key}])
        with pytest.raises(ValueError, match=f"p:1: .*not a post of a run on {task}, which has .*{key}"):
            read_predictions(path, task=task)


def test_nothing_to_score(tmp_path):
    with pytest.raises(FileNotFoundError, match="theirs.txt"):
        main(["--predictions", str(tmp_path / "theirs.txt")])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no words"):
        score([{"gold": [], "predicted": []}])


@pytest.mark.parametrize("kind", faults.CONTENTS["read_predictions"])
def test_any_content_is_read_or_refused(kind):
    counts = faults.fuzz("read_predictions", kind, 200)
    assert counts["inputs"] == 200 and counts["read"] + counts["refused"] == 200
    assert kind != "words" or counts["read"] == 200  # with any words a file is valid


@every_task
def test_gold_fingerprint(task):
    records = make_records(task)
    fingerprint = gold_fingerprint(records)
    others = [r | {"predicted": None, "id": "x", "photo": False} for r in records[::-1]]
    assert gold_fingerprint(others) == fingerprint
    for i, record in enumerate(records):
        changed = record | {"gold": [*record["gold"][:-1], "I-new"] if task == "ner" else "/new"}
        assert gold_fingerprint([*records[:i], changed, *records[i + 1 :]]) != fingerprint


class Photos(set):
    has_photo = set.__contains__  # all that shuffled_photos asks of a FeatureCache


@pytest.mark.parametrize("count", [0, 2, 3, 10])
def test_shuffled_photos(count):
    photos = Photos(f"{i}.jpg" for i in range(count))
    ids = [f"{i // 2}.jpg" for i in range(2 * count + 4)]  # each twice, the last two without photo
    swaps = [shuffled_photos(ids, photos, seed) for seed in range(20)]
    for seed, swap in enumerate(swaps):
        assert swap.keys() == set(ids) and {swap[i] for i in swap if i not in photos} == {None}
        assert {swap[i] for i in photos} == photos and all(swap[i] != i for i in photos)
        np.random.seed(0)  # must not matter
        assert shuffled_photos(ids, photos, seed) == swap
    assert count < 10 or all(a != b for a, b in itertools.combinations(swaps, 2))


@pytest.mark.parametrize("shuffled, mean", [([0.7, 0.8], "0.750 ±0.071"), ([0.7], "0.700")])
@pytest.mark.parametrize("task, main, level", TASKS)
def test_check_row(task, main, level, shuffled, mean):
    f1s = 0.9, 0.6, *shuffled
    true, none, *others = [{"task": task, main: {"f1": f1}, level: {"accuracy": 0.5}} for f1 in f1s]
    row = check_row("run", {"true": true, "none": none, "shuffled": others})
    spread = " ±0.000" if len(shuffled) > 1 else ""
    assert " ".join(row.split()) == f"run 0.900 {mean} 0.600 0.500 0.500{spread} 0.500"


@pytest.mark.parametrize("low, high, said", [
    (0.01, 0.09, "depends on its photos"),
    (-0.01, 0.03, "wrong photos do as well, as far as these posts can tell"),
    (0.0, 0.0, "wrong photos do as well, as far as these posts can tell"),
    (-0.03, -0.01, "wrong photos do better"),
])  # fmt: skip
def test_the_verdict_follows_from_the_interval(low, high, said):
    check = {"photos": 9, "bootstrap": {"difference": (low + high) / 2, "low": low, "high": high}}
    words = f"true - shuffled {(low + high) / 2:+.3f}, 95% interval {low:+.3f} to {high:+.3f}: {said}"
    film, text = CONFIG | {"fusion": "film"}, CONFIG | {"fusion": "none"}
    assert verdict(film, check) == words
    assert verdict(film | {"shuffle_photos": True}, check) == f"trained on shuffled photos; {words}"
    none = {"photos": 0, "bootstrap": None}
    assert verdict(text, none) == "text only"
    assert verdict(text | {"extra": "post"}, none) == "text and notes on the post only"
    assert verdict(text | {"extra": "photo"}, check) == words  # what was said of photos was shown
    assert verdict(film, check | {"photos": 1}) == "fewer than 2 photos: cannot tell"


def test_type_changes_by_hand():
    def metrics(per, org, seen):
        types = {"PER": {"f1": per, "gold": 20}, "ORG": {"f1": org, "gold": 30}, "LOC": {"f1": 1, "gold": 19}}
        return {"task": "ner", "entity": {"types": types}, "entity_seen": {"f1": seen},
                "entity_unseen": {"f1": 0.5}}  # fmt: skip

    check = {"true": metrics(0.9, 0.8, 0.7), "shuffled": [metrics(0.5, 0.8, 0.6), metrics(0.6, 0.9, 0.6)]}
    del check["shuffled"][0]["entity"]["types"]["ORG"]  # never answered nor gold there: F1 0
    assert type_changes(check).split(": ")[1] == "PER -0.350, ORG -0.350, seen -0.100, unseen +0.000"
