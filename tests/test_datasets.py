"""Data sets found where releases and people put them; their labels; folders of one's own."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

import pytest
from test_data import PLAIN, POST, ROW, refused, row, write

from data import RELATIONS, bio_labels
from parts.datasets import VARIANTS, data_task, load_dataset
from parts.photos import image_folders


@pytest.mark.parametrize("name, train, valid", [
    ("twitter2017", "twitter2017/train.txt", "twitter2017/valid.txt"),
    ("twitter2015", "twitter2015_txt/train.txt", "twitter2015_txt/val.txt"),
    ("mnre", "mnre_txt/mnre_train.txt", "mnre_txt/mnre_val.txt"),
    ("mnre", "mnre/mnre_txt/mnre_train.txt", "mnre/mnre_txt/mnre_val .txt"),
    ("mnre", "mnre/txt/ours_train.txt", "mnre/txt/ours_val.txt"),
    ("mnre", "mnre/mnre_train.txt", "mnre/mnre_dev.txt"),
    ("twitter2017", "twitter2017/train.txt", "twitter2017/dev.txt"),
])  # fmt: skip
def test_text_layouts(tmp_path, monkeypatch, name, train, valid):
    one, two = (row(), row(img_id="2.jpg") + row()) if name == "mnre" else (POST, PLAIN)
    files = {"train": write(tmp_path / train, one), "valid": write(tmp_path / valid, two)}
    digests = [hashlib.sha256(content.encode()).hexdigest() for content in (one, two)]
    monkeypatch.setitem(VARIANTS, digests[0][:16], "known")
    dataset = load_dataset(name, tmp_path)
    assert dataset.files == files  # and no test file
    assert [len(dataset.examples[split]) for split in files] == [1, 2]
    assert dataset.image_ids() == (["1.jpg", "2.jpg"] if name == "mnre" else ["1", "2"])
    variants = zip(files, digests, ("known", "not a file of a known release"), strict=True)
    prints = {s: {"file": str(files[s]), "sha256": digest, "variant": kind} for s, digest, kind in variants}
    assert dataset.fingerprints() == prints


def types(*names):
    return "".join(f"IMGID:1\nw\tB-{name}\nw\tI-{name}\n\n" for name in names)


@pytest.mark.parametrize("name, train, valid, labels, said", [
    ("twitter2017", types("PER"), types("ORG"), bio_labels(("LOC", "MISC", "ORG", "PER")),
     "train never shows 7 of the 9 labels: O B-LOC I-LOC B-MISC I-MISC B-ORG I-ORG"),
    ("twitter2015", types("PER", "LOC", "ORG", "MISC") + POST, POST,
     bio_labels(("LOC", "MISC", "ORG", "PER")), None),
    ("twitter2015", types("PER", "LOC", "ORG", "OTHER") + POST, POST,
     bio_labels(("LOC", "ORG", "OTHER", "PER")), None),
    ("twitter2015", POST, types("MISC"), bio_labels(("LOC", "MISC", "ORG", "PER")),
     "train never shows 7 of the 9 labels: B-LOC I-LOC B-MISC I-MISC B-ORG I-ORG I-PER"),
    ("twitter2015", types("PER", "LOC", "ORG") + POST, POST, bio_labels(("LOC", "ORG", "OTHER", "PER")),
     "neither OTHER nor MISC occurs: taken for the original release, which says OTHER"),
    ("mnre", "".join(row(relation=relation) for relation in RELATIONS), row(), RELATIONS, None),
    ("mnre", "".join(row(relation=relation) for relation in RELATIONS[2:]), row(relation=RELATIONS[1]),
     RELATIONS, "train never shows 2 of the 23 labels: None /loc/loc/contain"),
])  # fmt: skip
def test_labels_are_those_of_the_release(tmp_path, name, train, valid, labels, said):
    write(tmp_path / name / "train.txt", train)
    write(tmp_path / name / "valid.txt", valid)
    dataset = load_dataset(name, tmp_path)
    assert dataset.labels == labels
    assert dataset.notes[:1] == ((said,) if said else ())
    path = write(tmp_path / name / "test.txt", row(relation="x") if name == "mnre" else types("x"))
    with refused(path, "[12]", "unknown label"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("train, other", [("MISC", "OTHER"), ("OTHER", "MISC")])
def test_two_releases_of_twitter2015_are_refused(tmp_path, train, other):
    paths = [write(tmp_path / "twitter2015" / f"{split}.txt", types(kind))
             for split, kind in (("train", train), ("valid", other))]  # fmt: skip
    misc, other = paths if train == "MISC" else paths[::-1]
    message = re.escape(f"{misc}: says MISC as the relabelled release does, {other} says OTHER")
    with pytest.raises(ValueError, match=message):
        load_dataset("twitter2015", tmp_path)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_empty_and_absent_splits(tmp_path, split):
    paths = {name: write(tmp_path / "twitter2017" / f"{name}.txt", PLAIN) for name in ("train", "valid")}
    with pytest.raises(ValueError, match=f"{re.escape(str(write(paths[split], chr(10))))}: no posts"):
        load_dataset("twitter2017", tmp_path)
    paths[split].unlink()
    with pytest.raises(FileNotFoundError, match=f"no {split} file .* at {re.escape(str(paths[split]))} "):
        load_dataset("twitter2017", tmp_path)


@pytest.mark.parametrize("names, lies", [
    (["train.csv"], "train.csv"), (["train.tsv", "train.parquet"], "train.parquet, train.tsv"), ([], None),
])  # fmt: skip
def test_a_file_that_is_not_read_in_place_of_train_is_named(tmp_path, names, lies):
    write(tmp_path / "own" / "valid.txt", PLAIN)
    for name in names:
        write(tmp_path / "own" / name, "words,labels\n")
    with pytest.raises(FileNotFoundError) as error:
        load_dataset(str(tmp_path / "own"))
    where = f", where {lies} is not read (write JSON lines)" if lies else ""
    assert str(error.value).startswith(
        f"no train file of own under {tmp_path}/{where}; put it at {tmp_path / 'own' / 'train'}.txt or .jsonl"
    )


# ---------------------------------------------------------------------------------------------- your own data


@pytest.fixture
def own(tmp_path):
    """A folder in the CoNLL-with-IMGID form with labels of its own; returns a function to write a split."""
    folder = tmp_path / "mine"
    folder.mkdir()

    def write(split, *posts, separator=" "):
        text = "\n".join(f"IMGID:{split}{i}\n" + "".join(f"{w}{separator}{y}\n" for w, y in post)
                         for i, post in enumerate(posts))  # fmt: skip
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        return str(folder)

    write("train", [("東京", "B-地名"), ("が", "O")], [("Ада", "B-персона"), ("Лавлейс", "I-персона")])
    write("valid", [("x", "O")])
    return write


@pytest.mark.parametrize("separator", [" ", "\t", "   "])
def test_own_folder_has_labels_of_its_own(own, separator):
    folder = own("test", [("東京", "I-地名"), ("/", "O")], separator=separator)
    dataset = load_dataset(folder, "no such folder")
    assert (dataset.name, dataset.task) == ("mine", "ner")
    assert dataset.labels == ("O", "B-персона", "I-персона", "B-地名", "I-地名")
    post = dataset.examples["test"][0]
    assert (post.words, post.image_id) == (("東京", "/"), "test0")
    Path(folder, "images").mkdir()
    assert image_folders(folder)[0] == Path(folder, "images")


@pytest.mark.parametrize("label", ["b-PER", "PER", "B-", "", "B- a", "B-a  b", "X-地名", "Bx地名"])
def test_labels_that_are_not_bio_are_refused(own, label):
    folder = own("test", [("a", "O"), ("b", label)], separator="\t")
    with pytest.raises(ValueError, match="test.txt:3: label .* is not O, B-TYPE or I-TYPE"):
        load_dataset(folder)
    with pytest.raises(ValueError, match="test.txt:3: expected word<TAB>label, found 3 columns, 'a', 'b'"):
        load_dataset(own("test", [("x", "O"), ("a b", "O")]))  # a word with a space


def test_types_may_hold_spaces_where_tabs_separate(own):
    own("train", [("Ann", "B-Public Person"), ("Lee", "I-Public Person"), ("in", "O")], separator="\t")
    dataset = load_dataset(own("valid", [("[", "S-Public Person")], separator="\t"))
    assert dataset.labels == ("O", "B-Public Person", "I-Public Person")
    assert dataset.examples["valid"][0].labels == ("B-Public Person",)
    own("train", [("[", "B-Public Person")], separator="\t")
    assert data_task(own("valid", [("a", "O")])) == "ner"


@pytest.mark.parametrize("row, said", [
    ({"text": "Ann", "spans": [{"start": 0}]}, "no 'entities' and no labels in it; an empty list says that"),
    ({"text": "Ann Lee", "h": {"pos": [0, 7]}, "t": {"pos": [3, 4]}, "relation": "x"},
        "not a row {'token', 'h': {'pos'}, 't': {'pos'}, 'img_id', 'relation'}, pos = [start, end) in words"),
    ({"token": ["Ann"], "subj_start": 0, "subj_end": 0, "relation": "x"},
        "no 'head' and 'tail' in it, but 'token', 'subj_start', 'subj_end', 'relation'; give it both"),
    ({"text": "Ann Lee", "head": "Ann", "tail": "Lee", "relation": "x"}, "'Ann' is not a span [start, end)"),
])  # fmt: skip
def test_rows_in_another_layout_are_named(tmp_path, row, said):
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.txt", json.dumps(row) + "\n")
    with refused(tmp_path / "train.txt", 1, re.escape(said)):
        load_dataset(str(tmp_path))


ALIKE = ["Персона", "персона\u200b", "персо\u00adна", "\ufeffперсона", unicodedata.normalize("NFD", "й")]


@pytest.mark.parametrize("other", ALIKE)
def test_types_that_look_alike_are_pointed_out(own, other):
    posts = [("a", "B-персона")], [("b", f"B-{other}")], [("c", "B-место")]
    folder = own("train", *posts, [("d", "B-й")])
    pair = sorted([other, "й" if len(other) == 2 else "персона"])
    said = f"{pair[0]!r} and {pair[1]!r} differ in case or in what cannot be seen; are they one?"
    assert load_dataset(folder).notes == (said,)
    own("train", posts[0], posts[2], [("d", "B-й")])
    message = f"{folder}/test.txt: labels that train does not have: B-{other}; correct them; {said}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(own("test", posts[1]))


def test_own_folder_of_relations(tmp_path):
    def lines(*relations, **changes):
        return "".join(json.dumps(ROW | {"relation": relation} | changes) + "\n" for relation in relations)

    folder = tmp_path / "own"
    write(folder / "train.txt", "\n" + lines("worksFor", "NA", "Other", "no_relation", "NA"))
    write(folder / "dev.txt", lines("None", "Other", img_id=None) + lines("na"))
    dataset = load_dataset(str(folder))
    assert (dataset.task, dataset.name, dataset.labels) == ("relation", "own", ("None", "Other", "worksFor"))
    assert [example.label for example in dataset.examples["train"]] == [
        "worksFor", "None", "Other", "None", "None",
    ]  # fmt: skip
    assert [(e.id, e.image_id) for e in dataset.examples["valid"]] == [
        ("row 1", None), ("row 2", None), ("1.jpg@3", "1.jpg"),
    ]  # fmt: skip
    assert dataset.image_ids() == ["1.jpg"]
    assert dataset.notes == (
        "train: 'NA' read as 'None', no relation (2 rows)",
        "train: 'no_relation' read as 'None', no relation (1 rows)",
        "valid: 2 of 3 rows name no photo (img_id)", "valid: 'na' read as 'None', no relation (1 rows)",
    )  # fmt: skip
    for relation, said in (("bornIn", "test.txt: labels that train does not have: bornIn; correct them"),
                           (" ", "test.txt:1: relation ' ' is no name"),
                           ("a\nb", r"test.txt:1: relation 'a\\nb' is no name"),
                           (3, "test.txt:1: relation 3 is no text")):  # fmt: skip
        write(folder / "test.txt", lines(relation))
        with pytest.raises(ValueError, match=said):
            load_dataset(str(folder))


@pytest.mark.parametrize("content, task", [
    (row(), "relation"), ("\ufeff\n \n" + json.dumps(ROW), "relation"), (f"[\n{row()}]", "relation"),
    ('{"text": "a", "head": [0, 1], "tail": [0, 1], "relation": "x"}', "relation"),
    ('{"text": "a", "entities": [], "relations": []}\n{"relations": [{"id": 1}]}', "relation"),
    ('{"text": "a", "entities": [], "relations": []}\n', "ner"), ("[\n{", "ner"), ("{", "ner"),
    (PLAIN, "ner"), ("[\tO\n", "ner"), ("{ B-x\n", "ner"), ("[ NN O\n", "ner"), ("", "ner"), (None, "ner"),
])  # fmt: skip
def test_train_tells_the_task_of_an_own_folder(tmp_path, content, task):
    (tmp_path / "twitter2017").mkdir()
    if content is not None:
        write(tmp_path / "twitter2017" / "train.txt", content)
    assert data_task(str(tmp_path / "twitter2017")) == task
    assert (data_task("twitter2017", tmp_path), data_task("mnre", tmp_path)) == ("ner", "relation")
