"""Posts as JSON: each form that people, hubs, editors and predict.py write, and what is wrong in one."""

import json
import re
import shutil
from pathlib import Path

import faults
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import refused, write

import predict
import report
import train
from data import NerExample, RelationExample
from parts.checks import image_check
from parts.datasets import load_dataset
from parts.scores import entity_spans, read_predictions
from parts.words import RULES, cut_words
from predict import Predictor, entities

TEXT, NAMES = "Ann Lee, in #Rome!", ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WORDS = ("Ann", "Lee", ",", "in", "#", "Rome", "!")
LABELS = ("B-PER", "I-PER", "O", "O", "O", "B-LOC", "O")
DOCCANO = [{"id": 7, "start_offset": 0, "end_offset": 7, "label": "PER"},
           {"id": 9, "start_offset": 13, "end_offset": 17, "label": "LOC"}]  # fmt: skip
LIVES = {"from_id": 7, "to_id": 9, "type": "lives_in"}
CHARS = [{"start": 0, "end": 7, "label": "PER"}, {"start": 13, "end": 17, "label": "LOC"}]
SPANS = {"head": [0, 7], "tail": [13, 17], "relation": "lives_in"}


def save(folder, *rows, split="train", form="lines"):
    """Rows as a file of a split, and a valid file beside; returns its path."""
    text = {"lines": "".join(json.dumps(row) + "\n" for row in rows), "array": json.dumps(rows, indent=1),
            "literal": "".join(f"{row}\n" for row in rows)}[form]  # fmt: skip
    if split == "train":
        write(folder / "valid.jsonl", text)
    return write(folder / f"{split}.jsonl", text)


def load(folder, *rows, **more):
    save(folder, *rows, **more)
    return load_dataset(str(folder))


@pytest.mark.parametrize("form", ["lines", "array", "literal"])
@pytest.mark.parametrize("row", [
    {"text": TEXT, "entities": CHARS}, {"text": TEXT, "entities": CHARS[::-1]},
    {"text": TEXT, "label": [[0, 7, "PER"], [13, 17, "LOC"]]},  # doccano, sequence labelling
    {"id": 3, "text": TEXT, "labels": [[0, 7, "PER"], [13, 17, "LOC"]], "words": None},
    {"text": TEXT, "entities": DOCCANO, "relations": [], "Comments": []},  # doccano, with relations
    {"text": TEXT, "entities": [{"type": "PER", "text": "Ann Lee", "words": [0, 2], "chars": [0, 7]},
                                {"type": "LOC", "text": "Rome", "words": [5, 6], "chars": [13, 17]}]},
    {"words": WORDS, "entities": [{"type": "PER", "text": "Ann Lee", "words": [0, 2], "probability": 0.9},
                                  {"type": "LOC", "text": "Rome", "words": [5, 6], "probability": 0.9}]},
    {"tokens": WORDS, "ner_tags": [NAMES.index(label) for label in LABELS], "names": NAMES},
    {"tokens": WORDS, "ner_tags": LABELS}, {"words": WORDS, "labels": LABELS},
    {"words": WORDS, "tags": LABELS}, {"tokens": WORDS, "text": TEXT, "ner_tags": LABELS},
    {"words": WORDS, "labels": ["B-PER", "E-PER", "O", "O", "O", "S-LOC", "O"]},  # BIOES
    {"id": 5302, "text": WORDS, "images": ["2_0.jpg", "2_1.jpg"], "label": LABELS, "url": ""},  # MNER-MI
])  # fmt: skip
def test_each_form_of_named_entities(tmp_path, row, form):
    row = json.loads(json.dumps(row))  # lists
    dataset = load(tmp_path, row, form=form)
    (post,) = dataset.examples["train"]
    assert (post.words, post.labels) == (WORDS, LABELS)
    assert dataset.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER") and dataset.task == "ner"
    assert dataset.word_rule == ("twitter" if row.get("text") == TEXT and "tokens" not in row else None)


@pytest.mark.parametrize("row", [
    {"text": TEXT, **SPANS},
    {"text": TEXT, "head": {"start": 0, "end": 7}, "tail": {"start": 13, "end": 17}, "relation": "lives_in"},
    {"words": WORDS, "head": [0, 2], "tail": [5, 6], "relation": "lives_in", "probability": 0.7},
    {"text": TEXT, "entities": DOCCANO, "relations": [LIVES]},
    {"token": WORDS, "h": {"pos": [0, 2]}, "t": {"pos": [5, 6]}, "relation": "lives_in", "img_id": None},
])  # fmt: skip
def test_each_form_of_relations(tmp_path, row):
    dataset = load(tmp_path, json.loads(json.dumps(row)))
    assert dataset.examples["train"] == [RelationExample("row 1", None, WORDS, (0, 2), (5, 6), "lives_in")]
    assert (dataset.task, dataset.labels) == ("relation", ("None", "lives_in"))


def test_a_row_may_hold_several_relations_or_none(tmp_path):
    back = LIVES | {"from_id": 9, "to_id": 7, "type": "NA"}
    rows = [{"id": "a", "text": TEXT, "entities": DOCCANO, "relations": relations}
            for relations in ([LIVES, back], [], [LIVES])]  # fmt: skip
    dataset = load(tmp_path, *rows)
    posts = [(e.id, e.head, e.tail, e.label) for e in dataset.examples["train"]]
    assert posts == [("a.1", (0, 2), (5, 6), "lives_in"), ("a.2", (5, 6), (0, 2), "None"),
                     ("a", (0, 2), (5, 6), "lives_in")]  # fmt: skip
    assert "train: 1 posts left out, which hold no relation" in dataset.notes
    assert "train: 'NA' read as 'None', no relation (1 rows)" in dataset.notes


@pytest.mark.parametrize("image, expected", [
    ("1.jpg", "1.jpg"), ("images/1.jpg", "1.jpg"), ("C:\\x\\1.jpg", "1.jpg"), (None, None), ("", None),
    ([], None),
    ({"bytes": None, "path": "/home/x/1.jpg"}, "1.jpg"),  # as `datasets` writes an image
    (["1.jpg"], "1.jpg"), (["a/1.jpg", "b/2.jpg"], ("1.jpg", "2.jpg")), (["1.jpg", None, "1.jpg"], "1.jpg"),
])  # fmt: skip
@pytest.mark.parametrize("key", ["image", "images", "img_id", "image_id"])
def test_a_post_names_its_photo_or_several(tmp_path, key, image, expected):
    dataset = load(tmp_path, {"text": TEXT, "entities": CHARS, key: image}, {"text": "x", "entities": []})
    posts = dataset.examples["train"]
    assert [post.image_id for post in posts] == [expected, None]
    names = expected if isinstance(expected, tuple) else (expected,) if expected else ()
    assert dataset.image_ids() == [*names] and posts[0].id == (" ".join(names) or "row 1")
    assert f"train: {2 - bool(names)} of 2 posts name no photo" in dataset.notes


def test_ids_are_kept_and_told_apart(tmp_path):
    known = {"id": 5}, {"id": "5"}, {"image": "5"}, {"id": None, "image": "x.jpg"}, {"image": "x.jpg"}, {}
    posts = load(tmp_path, *({"text": "a", "entities": []} | more for more in known)).examples["train"]
    assert [post.id for post in posts] == ["5", "5@2", "5@3", "x.jpg", "x.jpg@5", "row 6"]


def test_names_of_numbers_may_stand_in_a_file(tmp_path):
    write(tmp_path / "names.txt", "\n".join(NAMES) + "\n\n")
    rows = [{"tokens": WORDS, "ner_tags": [NAMES.index(label) for label in LABELS]},
            {"tokens": ["x"], "ner_tags": [1], "names": ["O", "B-X"]}]  # fmt: skip
    posts = load(tmp_path, *rows).examples["train"]
    assert [post.labels for post in posts] == [LABELS, ("B-X",)]


def test_answers_that_hold_an_error_are_counted(tmp_path):
    rows = [{"line": 1, "id": "a", "text": "x", "error": "no words in it"}, {"text": TEXT, "entities": CHARS}]
    dataset = load(tmp_path, *rows)
    assert [post.words for post in dataset.examples["train"]] == [WORDS]
    assert "train: 1 rows left out, which have an error for an answer" in dataset.notes


@pytest.mark.parametrize("row, said", [
    ({"text": TEXT, "entities": [{"start": 0, "end": 5, "label": "PER"}]},
        "the span [0, 5), 'Ann L', ends inside the word 'Lee'; correct it or see --word-rule"),
    ({"text": TEXT, "entities": [{"start": 1, "end": 3, "label": "PER"}]}, "'nn', ends inside the word"),
    ({"text": TEXT, "entities": [{"start": 8, "end": 9, "label": "PER"}]}, "[8, 9), ' ', holds no word"),
    *(({"text": TEXT, "entities": [{"start": start, "end": end, "label": "PER"}]},
       f"[{json.dumps(start).replace('null', 'None')}, {end}] is not a span [start, end) of its 18 ch")
      for start, end in ((0, 19), (3, 3), (5, 3), (-1, 3), (None, 3), (0.0, 3))),
    ({"text": TEXT, "label": [[0, 3]]}, "[0, 3] is no entity with start, end and label"),
    ({"text": TEXT, "entities": [{"start": 0, "end": 3}]}, "the label of an entity is None, no text"),
    ({"text": TEXT, "entities": [{"start": 0, "end": 3, "label": "a  b"}]}, "label 'B-a  b' is not O, B-T"),
    ({"text": TEXT, "entities": [CHARS[0], {"start": 4, "end": 7, "label": "PER"}]},
        "entities [0, 7] and [4, 7] share a word; keep one of them"),
    ({"text": TEXT, "entities": [CHARS[0] | {"text": "Bob"}]},
        "an entity is named 'Bob', but [0, 7] holds 'Ann Lee'; correct one of them"),
    ({"words": WORDS, "entities": [{"words": [0, 2], "type": "PER", "text": "Ann"}]},
        "entity is named 'Ann', but [0, 2] holds 'Ann Lee'"),
    ({"text": TEXT}, "no 'entities' and no labels in it; an empty list says that there are none"),
    ({"text": TEXT, "entities": {}}, "no 'entities' and no labels"),
    ({"entities": []}, "no 'text' and no 'words'"),
    ({"text": " ", "entities": []}, "no 'text' and no 'words' in it, but 'text', 'entities'; give it one"),
    ({"words": [1], "labels": ["O"]}, "its words are no list of text"),
    ({"words": "a b", "labels": ["O"]}, "its words are no list of text"),
    ({"words": ["a", "b"], "labels": ["O"]}, "1 labels for 2 words; give each word one"),
    ({"words": ["a"], "labels": "O"}, "no list of labels for 1 words"),
    ({"words": ["a"], "labels": [1]}, "labels are numbers (1); give their names in order: in names.txt bes"),
    ({"words": ["a"], "labels": [2], "names": ["O", "B-x"]}, "labels from 2 to 2, but 2 names"),
    ({"words": ["a"], "labels": [-1], "names": ["O", "B-x"]}, "labels from -1 to -1, but 2 names"),
    ({"words": ["a"], "labels": [0], "names": [0]}, "'names' is no list of text"),
    ({"words": ["a"], "labels": [1.0]}, "label 1.0 is neither text nor a number"),
    ({"words": ["a"], "labels": ["PER"]}, "label 'PER' is not O, B-TYPE or I-TYPE"),
    ({"words": ["\ud83d"], "labels": ["O"]}, r"'\ud83d' holds half a character"),
    ({"text": "a \ud83d", "entities": []}, "holds half a character"),
    ({"text": "a", "entities": [], "image": {"bytes": "x", "path": None}}, "an image without a file's name"),
    ({"text": "a", "entities": [], "image": 3}, "an image without a file's name; save it as a file"),
    ({"text": "a", "entities": [], "image": "x/"}, "image id '' is not a plain file name"),
    ([1], "not a JSON object; a post is one a line"),
])  # fmt: skip
def test_what_is_wrong_with_a_post_is_named_with_its_line(tmp_path, row, said):
    path = save(tmp_path, {"text": "fine", "entities": []}, row)
    with refused(path, 2, re.escape(said)):
        load_dataset(str(tmp_path), word_rule="twitter")


@pytest.mark.parametrize("row, said", [
    ({"text": TEXT} | SPANS | {"head": [0, 5]}, "the span [0, 5), 'Ann L', ends inside the word 'Lee'"),
    ({"text": TEXT} | SPANS | {"tail": None}, "None is not a span [start, end) of its 18 characters"),
    ({"words": WORDS} | SPANS, "[13, 17] is not a span [start, end) of its 7 words"),
    ({"text": TEXT} | SPANS | {"relation": 3}, "relation 3 is no text"),
    ({"text": TEXT, "entities": DOCCANO, "relations": [LIVES | {"to_id": 8}]}, "from 7 to 8: no ids of"),
    ({"text": TEXT, "entities": DOCCANO, "relations": [3]}, "from None to None: no ids"),
])  # fmt: skip
def test_what_is_wrong_with_a_relation_is_named_with_its_line(tmp_path, row, said):
    path = save(tmp_path, {"text": TEXT} | SPANS, row)
    with refused(path, 2, re.escape(said)):
        load_dataset(str(tmp_path), word_rule="twitter")


@pytest.mark.parametrize("content, line, said", [
    ('{"text": "a", "entities": []}\n{"text": ', 2, "not JSON: Expecting value .*; a post is one JSON"),
    ('[{"text": "a", "entities": []},\n{"x" 1}]', 2, "not a JSON array of rows"),
    (b'{"text": "a", "entities": []}\n\xff', 2, "not UTF-8"),
    ('{"text": "a", "entities": []}\n{"text": __import__("os").getpid()}', 2, "not JSON"),
])  # fmt: skip
def test_what_is_no_json_is_named_with_its_line(tmp_path, content, line, said):
    write(tmp_path / "valid.jsonl", '{"text": "a", "entities": []}')
    with refused(write(tmp_path / "train.jsonl", content), line, said):
        load_dataset(str(tmp_path))


@given(faults.mutated(b"".join(json.dumps(row).encode() + b"\n" for row in (
    {"text": TEXT, "entities": CHARS, "image": ["a/1.jpg", "2.jpg"]}, {"tokens": WORDS, "ner_tags": LABELS},
    {"text": TEXT, "entities": DOCCANO, "relations": [LIVES]}, {"text": TEXT} | SPANS))))  # fmt: skip
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    for split in ("train", "valid"):
        write(folder / f"{split}.jsonl", raw)
    try:
        examples = load_dataset(str(folder)).examples["train"]
    except ValueError as error:
        assert re.fullmatch(f"{re.escape(str(folder))}/train.jsonl:.*", str(error))
    else:
        assert examples and len({example.id for example in examples}) == len(examples)


def test_one_name_is_one_photo_in_all_splits(tmp_path):
    save(tmp_path, {"text": "a", "entities": [], "image": "a/1.jpg"})
    path = save(tmp_path, {"text": "a", "entities": [], "image": "b/1.jpg"}, split="test")
    with refused(path, 1, "'b/1.jpg' and 'a/1.jpg' have one name; rename one of the photos"):
        load_dataset(str(tmp_path))


DOCUMENT = (Path(__file__).parents[1] / "docs" / "DATA.md").read_text(encoding="utf-8")
FORMS = re.findall(r"(?:^    .*\n)+", DOCUMENT.partition("## The public data sets")[0], re.MULTILINE)


@pytest.mark.parametrize("block", FORMS)
def test_the_posts_that_the_document_shows_are_read(tmp_path, block):
    text = re.sub("^    ", "", block, flags=re.MULTILINE)
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.txt", text)
    dataset = load_dataset(str(tmp_path))
    assert len(dataset.examples["train"]) == (text.count("\n") if text[0] == "{" else 1)
    assert dataset.labels != ("O",) or "MNER" in text and dataset.image_ids()


# ------------------------------------------------------------------------------------------- texts and rules


@given(st.lists(st.text("ab1.'@#é東😀", min_size=1, max_size=5), min_size=1, max_size=8),
       st.sampled_from([*RULES]), st.data())  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_labels_are_of_the_words_in_the_span(tmp_path_factory, parts, rule, data):
    """An entity of any run of parts, between which spaces stand."""
    text, folder = " ".join(parts), tmp_path_factory.getbasetemp() / "spans"
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, len(parts) - 1))
    start = len(" ".join([*parts[:first], ""]))
    end = start + len(" ".join(parts[first : last + 1]))
    save(folder, {"text": text, "entities": [{"start": start, "end": end, "label": "X"}]})
    (post,) = load_dataset(str(folder), word_rule=rule).examples["train"]
    offsets = cut_words(text, rule)
    assert post.words == tuple(text[a:b] for a, b in offsets)
    ((kind, a, b),) = entity_spans(post.labels)
    assert (kind, offsets[a][0], offsets[b - 1][1]) == ("X", start, end)


@pytest.mark.parametrize("rule, text, span", [
    ("twitter", "so #Rome-based", "Rome"), ("punctuation", "我在北京大学", "北京"),
    ("characters", "กรุงเทพ", "กรุง"),
])  # fmt: skip
def test_the_rule_that_spans_end_at_is_chosen_and_said(tmp_path, rule, text, span):
    start = text.index(span)
    entity = {"start": start, "end": start + len(span), "label": "LOC"}
    dataset = load(tmp_path, {"text": text, "entities": [entity]}, {"text": "x", "entities": []})
    note = f"texts are cut by the rule {rule}; in 100% of train's posts no span ends inside a word"
    assert (dataset.word_rule, dataset.notes[0]) == (rule, note)
    cut = [text[a:b] for a, b in cut_words(text, rule)]
    assert dataset.examples["train"][0].words == tuple(cut) and span in "".join(cut)


def test_with_a_tenth_of_bad_spans_the_rule_stays_and_the_first_is_named(tmp_path):
    rows = [{"text": TEXT, "entities": CHARS}] * 19 + [{"text": TEXT, "entities": [CHARS[0] | {"end": 6}]}]
    with refused(save(tmp_path, *rows), 20, "ends inside the word 'Lee'"):
        load_dataset(str(tmp_path))


def test_files_of_several_kinds_make_one_data_set(tmp_path):
    save(tmp_path, {"text": TEXT, "entities": CHARS}, {"tokens": ["Bob"], "ner_tags": ["B-PER"]})
    (tmp_path / "valid.jsonl").unlink()
    write(tmp_path / "validation.json", json.dumps([{"text": "Bob", "entities": []}]))
    write(tmp_path / "test.txt", "IMGID:1\nBob\tB-PER\n\n")
    dataset = load_dataset(str(tmp_path))
    assert {split: path.name for split, path in dataset.files.items()} == {
        "train": "train.jsonl", "valid": "validation.json", "test": "test.txt"}  # fmt: skip
    assert dataset.examples["test"] == [NerExample("1", "1", ("Bob",), ("B-PER",))]
    assert [len(posts) for posts in dataset.examples.values()] == [2, 1, 1]


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def two_photos(data_dir, cache_dir, tmp_path_factory):
    """(run, data set) on the demo's posts as text, each with its own photo and another's."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    for split, posts in load_dataset("demo", data_dir).examples.items():
        rows = []
        for i, post in enumerate(posts):
            starts = [len(" ".join([*post.words[:n], ""])) for n in range(len(post.words))]
            entities = [{"start": starts[a], "end": starts[b - 1] + len(post.words[b - 1]), "label": kind}
                        for kind, a, b in entity_spans(post.labels)]  # fmt: skip
            images = [post.image_id, posts[i - 1].image_id]
            rows.append({"id": post.id, "text": " ".join(post.words), "entities": entities, "image": images})
        save(folder, *rows, split=split)
    shutil.copytree(data_dir / "demo" / "images", folder / "images")
    flags = ["--dataset", folder, "--model", "clip-bert", "--text-encoder", data_dir / "demo" / "encoder"]
    flags += ["--features", cache_dir / "demo-clip-96.h5", "--run-dir", folder.parent / "run"]
    flags += ["--device", "cpu", "--fusion", "attention", "--epochs", 8, "--lr", 3e-3, "--batch-size", 4]
    return train.main([str(flag) for flag in flags]), load_dataset(str(folder))


def test_a_run_looks_at_several_photos_of_a_post(two_photos, data_dir, tmp_path):
    run, dataset = two_photos
    records = read_predictions(run / "predictions-test.jsonl")
    assert [r["image_id"] for r in records] == [post.image_id for post in dataset.examples["test"]]
    assert all(r["photo"] and len(r["image_id"]) == 2 for r in records)
    predictor = Predictor(run, "cpu", weights=str(data_dir / "demo" / "clip"))
    folder = data_dir / "demo" / "images"
    posts = [{"words": r["words"], "image": [f"{name}.jpg" for name in r["image_id"]]} for r in records]
    for answer, record in zip(predictor(posts, folder), records, strict=True):
        assert answer["photo"] and "note" not in answer
        wanted = entities(record, None, None)
        for entity, other in zip(answer["entities"], wanted, strict=True):
            assert (entity["type"], entity["words"]) == (other["type"], other["words"])
            assert entity["probability"] == pytest.approx(other["probability"], abs=1e-3)
    one, half, many = predictor([posts[0] | {"image": images} for images in (
        posts[0]["image"][0], [posts[0]["image"][0], "none.jpg"], ["none.jpg"] * 9)], folder)  # fmt: skip
    assert half.pop("note").startswith("none.jpg: ") and many["error"] == "more than 8 photos"
    assert [e["words"] for e in half["entities"]] == [e["words"] for e in one["entities"]]
    assert image_check(run, "test", 1, "cpu")["photos"] == 8
    report.main(["--run", str(run), "--device", "cpu", "--output", str(tmp_path / "page.html")])
    assert all(r["image_id"][0] in (tmp_path / "page.html").read_text() for r in records)


def test_what_predict_writes_is_data_to_train_on(two_photos, data_dir, tmp_path):
    run, dataset = two_photos
    rows = [{"id": post.id, "text": " ".join(post.words), "image": [f"{name}.jpg" for name in post.image_id]}
            for post in dataset.examples["train"]]  # fmt: skip
    rows[1]["words"] = rows[1].pop("text").split()
    lines = [json.dumps(row) + "\n" for row in [*rows, {"id": "no text"}]]
    source, own = write(tmp_path / "posts.jsonl", "".join(lines)), tmp_path / "own"
    own.mkdir()
    flags = ["--run", run, "--input", source, "--output", own / "train.jsonl", "--device", "cpu"]
    flags += ["--images", data_dir / "demo" / "images", "--weights", data_dir / "demo" / "clip"]
    predict.main([str(flag) for flag in flags])
    shutil.copy(own / "train.jsonl", own / "valid.jsonl")
    back, predictor = load_dataset(str(own)), Predictor(run, "cpu", str(data_dir / "demo" / "clip"))
    answers = predictor(rows, data_dir / "demo" / "images")
    assert "train: 1 rows left out, which have an error for an answer" in back.notes
    for post, row, answer in zip(back.examples["train"], rows, answers, strict=True):
        assert post.id == row["id"] and post.image_id == tuple(row["image"])
        found = [(kind, " ".join(post.words[a:b])) for kind, a, b in entity_spans(post.labels)]
        assert sorted(found) == sorted((e["type"], e["text"]) for e in answer["entities"])
    assert any(answer["entities"] for answer in answers)


def test_vilt_reads_one_photo(two_photos, data_dir, cache_dir, tmp_path):
    flags = ["--dataset", two_photos[1].files["train"].parent, "--model", "vilt", "--device", "cpu"]
    flags += ["--text-encoder", data_dir / "demo" / "vilt", "--features", cache_dir / "demo-pixels-96.h5"]
    with pytest.raises(ValueError, match="--model vilt reads one photo a post, 40 posts have several"):
        train.main([str(flag) for flag in [*flags, "--run-dir", tmp_path / "run"]])
    assert not (tmp_path / "run").exists()
