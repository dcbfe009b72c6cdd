"""Promises of data.py: files by hand and what is read of them, batches against a second way to make them."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import unicodedata
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import Slow
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import data
import encoding
from data import RELATIONS, NerExample, RelationExample, read_mnre
from encoding import IGNORE, MARKERS, encode
from parts.photos import find_photos
from parts.text_encoder import load_tokenizer
from parts import photos

LABELS = data.bio_labels(("LOC", "MISC", "PER"))
POST = "IMGID:1\na\tO\nb\tB-PER\n\n"
PLAIN = f"{POST}IMGID:2\nc\tI-PER\n\n"
POSTS = [NerExample("1", "1", ("a", "b"), ("O", "B-PER")), NerExample("2", "2", ("c",), ("I-PER",))]
PATHS = ["../../etc/passwd", "/etc/passwd", "", ".", "..", "a\\b", "a\0b"]
TOKENS, MEMBER = ["Messi", "joins", "Miami", "today"], "/per/org/member_of"
ROW = {"token": TOKENS, "h": {"pos": [0, 1]}, "t": {"pos": [2, 3]}, "img_id": "1.jpg", "relation": MEMBER}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def row(**changes):
    return f"{ROW | changes}\n"


def read_ner(path, content):
    return data.read_ner(write(path / "x", content), LABELS)


def refused(path, line, reason):
    """Expect a ValueError of one line that starts with file and line."""
    return pytest.raises(ValueError, match=rf"\A{re.escape(str(path))}:{line}: .*{reason}.*\Z")


@pytest.mark.parametrize("content", [
    PLAIN, PLAIN[:-1], PLAIN[:-2], PLAIN.replace("\n", "\r\n"), "\ufeff" + PLAIN, PLAIN.replace("\n\n", "\n"),
    PLAIN.replace("\n\n", "\n\n\n"), PLAIN.replace("\n\n", "\n  \n"), "\n" + PLAIN,
    *(PLAIN.replace("\n\n", f"\n{blank}\n")
        for blank in ("\t", " \t\t ", "\u00a0", "\t\r", "-DOCSTART-\tO", "-DOCSTART- -X- O")),
    *(re.sub(r"(IMGID:.)", rf"\1{end}", PLAIN) for end in ("\t", " \t ", "\tO", "\tO\r")),
    "-DOCSTART-\n\n" + PLAIN,
])  # fmt: skip
def test_ner_file(tmp_path, content):
    assert read_ner(tmp_path, content) == POSTS


@pytest.mark.parametrize("blank", ["\n", "\t\n", " \n\n", "-DOCSTART- O\n"])
def test_ner_file_without_photos(tmp_path, blank):
    notes, path = [], write(tmp_path / "x", f"a\tO\nb\tB-PER\n{blank}c\tI-PER\n{blank}")
    posts, second = data.read_ner(path, LABELS, notes), 3 + blank.count("\n")
    assert posts == [
        NerExample("line 1", None, ("a", "b"), ("O", "B-PER")),
        NerExample(f"line {second}", None, ("c",), ("I-PER",)),
    ]
    assert notes == (
        ["no IMGID line: 2 posts without photo"] + ["2 -DOCSTART- lines left out"] * ("DOC" in blank)
    )


def test_a_photo_line_with_a_label_starts_a_post_too(tmp_path):
    posts = read_ner(tmp_path, "IMGID:1\tO\na\tO\nIMGID:2\tO\nb\tB-PER\n")
    assert [(post.image_id, post.words) for post in posts] == [("1", ("a",)), ("2", ("b",))]


def in_scheme(entities, length, scheme):
    """Labels of (type, start, end) entities, in order, as the scheme has them."""
    labels, end_before, kind_before = ["O"] * length, None, None
    single, last = {"IOBES": "SE", "BILOU": "UL"}.get(scheme, "BI")
    for kind, start, end in entities:
        touches = end_before == start and kind_before == kind
        first = "I" if scheme == "IOB1" and not touches else "B"
        labels[start:end] = [f"{first}-{kind}", *[f"I-{kind}"] * (end - start - 1)]
        if scheme in ("IOBES", "BILOU"):
            labels[end - 1] = f"{last if end - start > 1 else single}-{kind}"
        end_before, kind_before = end, kind
    return labels


# The last two, usual for Chinese, are BIOES in other letters.
@pytest.mark.parametrize("scheme, letters", [
    (IOB1, {}), (IOB2, {}), (IOBES, {}), (BILOU, {}), (IOBES, {"I": "M"}), (IOBES, {"I": "M", "S": "W"}),
])  # fmt: skip
@pytest.mark.parametrize("seed", range(8))
def test_label_schemes(tmp_path, scheme, letters, seed):
    rng, posts = random.Random(seed), []
    for _ in range(30):
        cuts = sorted(rng.sample(range(13), rng.randint(2, 7)))
        parts = [(rng.choice(["LOC", "PER", "creative-work"]), *span) for span in itertools.pairwise(cuts)]
        posts.append(in_scheme([part for part in parts if rng.random() < 0.7], 12, scheme.__name__))
    posts.append(in_scheme([("PER", 0, 1), ("PER", 1, 3), ("LOC", 4, 6)], 12, scheme.__name__))
    written = [[letters.get(y[0], y[0]) + y[1:] for y in labels] for labels in posts]
    text, notes = "\n".join("IMGID:1\n" + "".join(f"w\t{y}\n" for y in labels) for labels in written), []
    read = data.read_ner(write(tmp_path / "x", text), None, notes)

    def strict(sequences, kind):
        return [[entity.to_tuple()[1:] for entity in post] for post in Entities(sequences, kind).entities]

    made = [list(post.labels) for post in read]
    assert strict(made, IOB2) == strict(posts, scheme) and any(strict(made, IOB2))
    changed = sum(a != b for pair in zip(written, made, strict=True) for a, b in zip(*pair, strict=True))
    names = {0: {"IOBES": "BIOES"}.get(scheme.__name__, scheme.__name__), 1: "BMES", 2: "BMEWO"}
    name = names[len(letters)]
    assert (
        notes == ([] if scheme is IOB2 else [f"{name} labels read as BIO, {changed} changed"])
        and (made == posts) == (scheme is IOB2)
    )


def test_orphans_in_a_bio_file_stay(tmp_path):
    notes, labels = [], ["I-PER", "O", "B-LOC", "O", "B-PER", "I-LOC", "B-LOC", "B-LOC"]
    (post,) = data.read_ner(
        write(tmp_path / "x", "IMGID:1\n" + "".join(f"w\t{y}\n" for y in labels)), LABELS, notes
    )
    assert (list(post.labels), notes) == (labels, [])


@pytest.mark.parametrize("labels, line, said", [
    (["B-PER", "E-PER", "B-LOC", "O"], 4,
        "'B-LOC' before 'O' is not BIOES, and 'E-PER' elsewhere in the file is not BIO"),
    (["S-PER", "B-LOC", "E-PER"], 3, "'B-LOC' before 'E-PER' is not BIOES"),
    (["B-LOC", "L-LOC", "I-PER"], 4, "'I-PER' before 'O' is not BILOU"),
    (["U-LOC", "O", "E-PER"], 4, "'E-PER' before 'O' is not BILOU"),
    (["B-LOC", "M-LOC", "O"], 3, "'M-LOC' before 'O' is not BMES"),
    (["W-LOC", "B-LOC", "I-LOC", "E-LOC"], 4, "'I-LOC' before 'E-LOC' is not BMEWO"),
])  # fmt: skip
def test_labels_of_no_one_scheme_are_refused(tmp_path, labels, line, said):
    path = write(tmp_path / "x", "IMGID:1\n" + "".join(f"w\t{y}\n" for y in labels))
    for allowed in (None, LABELS):
        with refused(path, line, re.escape(said)):
            data.read_ner(path, allowed)


# What strip, split and splitlines take for a space or for the end of a line is a part of the word.
@pytest.mark.parametrize("word", [
    "", "IMGID:1", *"\u00a0\u200b\ufe0f\ufeff ", *map("a{}b".format, " \u2028\x85\f\r"),
    "\N{WOMAN}\u200d\N{ROCKET}", "\u200f\u05e9\u05dc\u05d5\u05dd",
])  # fmt: skip
def test_ner_odd_words_survive(tmp_path, word):
    (post,) = read_ner(tmp_path, f"IMGID:1\na\tO\n{word}\tB-PER\nc\tI-PER\n\n")
    assert (post.words, post.labels) == (("a", word, "c"), ("O", "B-PER", "I-PER"))


# In the latter a photo is named as a later post.
@pytest.mark.parametrize("ids", [["1", "2", "1", "1"], ["a@7", "a", "a"]])
def test_ner_repeated_ids(tmp_path, ids):
    posts = read_ner(tmp_path, "".join(f"IMGID:{image_id}\nw\tO\n\n" for image_id in ids))
    assert [post.image_id for post in posts] == ids
    assert posts[0].id == ids[0] and len({post.id for post in posts}) == len(posts)


@pytest.mark.parametrize("content, line, reason", [
    ("IMGID:1\na O\n", 2, "word<TAB>label, found 'a O'"), (POST + "2\n", 5, "word<TAB>label, found '2'"),
    ("IMGID:1\na\tX\tO\n", 2,
        "word<TAB>label, found 3 columns, 'a', 'X', 'O'; keep columns 1 and 3, .*, as cut -f1,3 does"),
    ("IMGID:1\na\tB-PER\tB-PER\nb\tO\tB-LOC\n", 2, "'B-PER'; keep one word and one label, a tab"),
    ("IMGID:1\na\tS-ORG\n", 2, "unknown label 'B-ORG'"),
    ("IMGID:1\na\tO\nb\tB-ORG\n", 3, "unknown label 'B-ORG'"), ("IMGID:1\na\t\n", 2, "unknown label ''"),
    ("IMGID:1\na\tb-Per\n", 2, "unknown label 'b-Per'"), ("IMGID:1\na\to\n", 2, "unknown label 'o'"),
    (POST + "c\tO\n", 5, "no IMGID"), ("c\tO\n\n" + POST, 1, "no IMGID"),
    (b"IMGID:1\na\tO\nb\xff\tO\n", 3, "not UTF-8"), (b"IMGID:1\na\tO\n\xc3", 3, "not UTF-8"),
    (b"\xef\xbb\xbfIMGID:1\na\tO\n\xff\tO\n", 3, "not UTF-8"),  # the byte order mark must not shift the count
    (POST + "IMGID:2\n\nIMGID:3\na\tO\n", 5, "post 2 has no words"),
    (POST + "IMGID:2", 5, "post 2 has no words"), ("IMGID:2\nIMGID:3\na\tO\n", 1, "post 2 has no words"),
    *((f"{POST}IMGID:{image_id}\na\tO\n", 5, "not a plain file name") for image_id in PATHS),
])  # fmt: skip
def test_ner_errors(tmp_path, content, line, reason):
    with refused(tmp_path / "x", line, reason):
        read_ner(tmp_path, content)


@pytest.mark.parametrize(
    "head, tail", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((1, 2), (1, 2)), ((3, 4), (0, 4))]
)
def test_mnre_spans(tmp_path, head, tail):
    path = write(tmp_path / "x", row(h={"name": "", "pos": list(head)}, t={"pos": list(tail)}))
    assert read_mnre(path, RELATIONS) == [
        RelationExample("1.jpg@1", "1.jpg", tuple(TOKENS), head, tail, MEMBER)
    ]


@pytest.mark.parametrize("start, end", [("", "\n"), ("", "\r\n"), ("\ufeff", "\n")])
def test_mnre_rows_that_share_a_photo(tmp_path, start, end):
    path = write(
        tmp_path / "x", (start + row() + row(relation="None") + "\n" + row()[:-1]).replace("\n", end)
    )
    found = [(example.id, example.image_id, example.label) for example in read_mnre(path, RELATIONS)]
    assert found == [("1.jpg@1", "1.jpg", MEMBER), ("1.jpg@2", "1.jpg", "None"), ("1.jpg@4", "1.jpg", MEMBER)]


@pytest.mark.parametrize("allowed", [RELATIONS, None])
@pytest.mark.parametrize("form", [
    lambda rows: "".join(f"{r}\n" for r in rows),
    lambda rows: "".join(json.dumps(r) + "\n" for r in rows),
    lambda rows: "".join(json.dumps(r, ensure_ascii=False).replace("/", "\\/") + "\r\n" for r in rows),
    lambda rows: "".join(f"{json.dumps(r) if i % 2 else r}\n" for i, r in enumerate(rows)),
    json.dumps, lambda rows: "\ufeff\n" + json.dumps(rows, indent=2),
    lambda rows: f" [\n{json.dumps(rows[0])}\n,\n{json.dumps(rows[1])}\n]\n\n",
])  # fmt: skip
def test_mnre_rows_of_any_form(tmp_path, form, allowed):
    words = ["\N{GRINNING FACE}", "a\\/b", '"', "it's", "\\u0041", "\u00a0", "\u2028", "Ann", "Lee"]
    rows = [
        ROW | {"token": words, "h": {"name": "Ann Lee", "pos": [7, 9]},
               "t": {"name": name, "pos": [0, 1]}, "more": more}
        for name, more in (("\N{GRINNING FACE}", None), ("", [True, {"x": 1.5}]))
    ]  # fmt: skip
    found = read_mnre(write(tmp_path / "x", form(rows)), allowed)
    assert [(e.words, e.head, e.tail, e.label, e.image_id) for e in found] == [
        (tuple(words), (7, 9), (0, 1), MEMBER, "1.jpg")
    ] * 2
    assert [e.id for e in found] == ["1.jpg@1", "1.jpg@2"]


@pytest.mark.parametrize("content, line, reason", [
    (json.dumps(ROW)[:-1], 1, r"not a row .*\(not JSON: Expecting ',' delimiter at character 1"),
    (json.dumps(ROW).replace("null", "nul").replace('"h"', "h"), 1, "not JSON: Expecting property name"),
    (f"{ROW}"[:-1] + ", 'x': null}", 1, r"\(ValueError: malformed node or string\)"),
    (row() + "[1, 2]", 2, "not a row .*TypeError"),
    (json.dumps(ROW | {"token": ["\ud83d", *TOKENS]}), 1, r"'\\ud83d' holds half a character"),
    (f"[\n{row()}]", 2, "not a JSON array of rows .Expecting property name"),
    ("[\n1]", 2, "row 1: not a row"),
    (json.dumps([ROW, ROW | {"relation": "x"}], indent=1), 24, "row 2: unknown label 'x'"),
    ("[" * 100_000, 1, "too deep"), (json.dumps([ROW]) + "\n{}", 2, "Extra data"),
])  # fmt: skip
def test_mnre_errors_say_why(tmp_path, content, line, reason):
    path = write(tmp_path / "x", content)
    with refused(path, line, reason):
        read_mnre(path, RELATIONS)


@pytest.mark.parametrize("end", ["h", "t"])
@pytest.mark.parametrize("pos, name, said", [
    ([0, 1], "Messi joins",
        r"'{}' is named 'Messi joins', but pos \[0, 1\] holds 'Messi'; is the end inclusive\? .* \[0, 2\]"),
    ([2, 2], "Miami",
        r"'{}' pos is not a span \[start, end\) of its 4 words; is the end inclusive\? .* \[2, 3\]"),
    ([2, 2], "today", r"'{}' pos is not a span \[start, end\) of its 4 words$"),
    ([1, 3], "Miami", r"'{}' is named 'Miami', but pos \[1, 3\] holds 'joins Miami'; correct one of them"),
    ([3, 4], "x\ny", r"'{}' is named 'x\\ny', but pos \[3, 4\] holds 'today'; correct one of them"),
])  # fmt: skip
def test_mnre_names_are_the_words_of_their_span(tmp_path, end, pos, name, said):
    path = write(tmp_path / "x", row() + row(**{end: {"name": name, "pos": pos}}))
    for allowed in (RELATIONS, None):
        with refused(path, 2, said.format(end)):
            read_mnre(path, allowed)


@pytest.mark.parametrize("name", ["Messi joins", "messi  joins", "Messijoins", "", None])
def test_mnre_names_that_fit(tmp_path, name):
    (example,) = read_mnre(write(tmp_path / "x", row(h={"name": name, "pos": [0, 2]})), RELATIONS)
    assert example.head == (0, 2)


@pytest.mark.parametrize("place", ["{}", "{{'token': {}}}", "[{} for _ in (1,)]", "{{'token': f'{{{}}}'}}"])
def test_mnre_code_is_never_run(tmp_path, place):
    line, proof = place.format(f'__import__("os").system("touch {tmp_path}/proof")'), tmp_path / "proof"
    path = write(tmp_path / "x", row() + line)
    with refused(path, 2, "not a row"):
        read_mnre(path, RELATIONS)
    assert not proof.exists()
    eval(line)  # what the reader must not do, to know that it would have shown
    assert proof.exists()


SPANS = [[0, 5], [5, 6], [1, 1], [2, 1], [-1, 1], ["0", "1"], [0.0, 1.0], [False, True], [0, True], [None, 1]]
HUGE = row().replace("[2, 3]", f"[0x{'f' * 5000}, 3]")  # Python does not print it in decimal


@pytest.mark.parametrize("line, reason", [
    *((row(**{end: {"pos": pos}}), f"'{end}' pos") for end in "ht" for pos in SPANS), (HUGE, ""),
    *((row(t=t), "not a row") for t in ({"pos": [1]}, {"pos": 3}, {"pos": None}, [0, 1], {})),
    *((str({k: v for k, v in ROW.items() if k != key}), f"not a row .*{key}") for key in ROW),
    *((row(token=words), "list of words") for words in ([], "Messi joins", [1, 2, 3, 4], None)),
    (row(relation="/per/per/foe"), "unknown label '/per/per/foe'"), (row(relation=[]), "text"),
    (row(img_id=1), "text"),
    *((row(img_id=image_id), "not a plain file name") for image_id in PATHS), (b"\xff", "not UTF-8"),
    *((line, "not a row")
        for line in ("{", "x y", "null", "[]", "1", "'a'", "\0", "[" * 100_000, "-" * 100_000 + "1")),
])  # fmt: skip
def test_mnre_errors(tmp_path, line, reason):
    path = write(tmp_path / "x", row().encode() + (line if isinstance(line, bytes) else line.encode()))
    with refused(path, 2, reason):
        read_mnre(path, RELATIONS)


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
    monkeypatch.setitem(data.VARIANTS, digests[0][:16], "known")
    dataset = data.load_dataset(name, tmp_path)
    assert dataset.files == files  # and no test file
    assert [len(dataset.examples[split]) for split in files] == [1, 2]
    assert dataset.image_ids() == (["1.jpg", "2.jpg"] if name == "mnre" else ["1", "2"])
    assert dataset.fingerprints() == {
        "train": {"file": str(files["train"]), "sha256": digests[0], "variant": "known"},
        "valid": {
            "file": str(files["valid"]),
            "sha256": digests[1],
            "variant": "not a file of a known release",
        },
    }


@pytest.mark.parametrize("name, folder", [
    ("twitter2017", "twitter2017/images"), ("twitter2017", "twitter2017_images"), ("mnre", "mnre_image"),
    *(("mnre", f"{parent}img_org/{split}") for parent in ("", "mnre/") for split in ("train", "val", "test")),
])  # fmt: skip
def test_image_layouts(tmp_path, name, folder):
    photo, other = write(tmp_path / folder / "1.jpg", ""), write(tmp_path / "elsewhere" / "1.jpg", "")
    assert find_photos(["1"], photos.image_folders(name, tmp_path)) == {"1": photo}
    assert find_photos(["1"], photos.image_folders(name, tmp_path, other.parent)) == {"1": other}
    for images, sought in ((None, Path("no", name, "images")), ("none", "none")):
        with pytest.raises(
            FileNotFoundError, match=f"no image folder {sought}: put the photos there .* --images"
        ):
            photos.image_folders(name, "no", images)


def types(*names):
    return "".join(f"IMGID:1\nw\tB-{name}\nw\tI-{name}\n\n" for name in names)


@pytest.mark.parametrize("name, train, valid, labels, said", [
    ("twitter2017", types("PER"), types("ORG"), data.bio_labels(("LOC", "MISC", "ORG", "PER")),
     "train never shows 7 of the 9 labels: O B-LOC I-LOC B-MISC I-MISC B-ORG I-ORG"),
    ("twitter2015", types("PER", "LOC", "ORG", "MISC") + POST, POST,
     data.bio_labels(("LOC", "MISC", "ORG", "PER")), None),
    ("twitter2015", types("PER", "LOC", "ORG", "OTHER") + POST, POST,
     data.bio_labels(("LOC", "ORG", "OTHER", "PER")), None),
    ("twitter2015", POST, types("MISC"), data.bio_labels(("LOC", "MISC", "ORG", "PER")),
     "train never shows 7 of the 9 labels: B-LOC I-LOC B-MISC I-MISC B-ORG I-ORG I-PER"),
    ("twitter2015", types("PER", "LOC", "ORG") + POST, POST, data.bio_labels(("LOC", "ORG", "OTHER", "PER")),
     "neither OTHER nor MISC occurs: taken for the original release, which says OTHER"),
    ("mnre", "".join(row(relation=relation) for relation in RELATIONS), row(), RELATIONS, None),
    ("mnre", "".join(row(relation=relation) for relation in RELATIONS[2:]), row(relation=RELATIONS[1]),
     RELATIONS, "train never shows 2 of the 23 labels: None /loc/loc/contain"),
])  # fmt: skip
def test_labels_are_those_of_the_release(tmp_path, name, train, valid, labels, said):
    write(tmp_path / name / "train.txt", train)
    write(tmp_path / name / "valid.txt", valid)
    dataset = data.load_dataset(name, tmp_path)
    assert dataset.labels == labels
    assert dataset.notes[:1] == ((said,) if said else ())
    with refused(
        write(tmp_path / name / "test.txt", row(relation="x") if name == "mnre" else types("x")),
        "[12]",
        "unknown label",
    ):
        data.load_dataset(name, tmp_path)


@pytest.mark.parametrize("train, other", [("MISC", "OTHER"), ("OTHER", "MISC")])
def test_two_releases_of_twitter2015_are_refused(tmp_path, train, other):
    paths = [
        write(tmp_path / "twitter2015" / f"{split}.txt", types(kind))
        for split, kind in (("train", train), ("valid", other))
    ]
    misc, other = paths if train == "MISC" else paths[::-1]
    with pytest.raises(
        ValueError, match=re.escape(f"{misc}: says MISC as the relabelled release does, {other} says OTHER")
    ):
        data.load_dataset("twitter2015", tmp_path)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_empty_and_absent_splits(tmp_path, split):
    paths = {name: write(tmp_path / "twitter2017" / f"{name}.txt", PLAIN) for name in ("train", "valid")}
    with pytest.raises(ValueError, match=f"{re.escape(str(write(paths[split], chr(10))))}: no posts"):
        data.load_dataset("twitter2017", tmp_path)
    paths[split].unlink()
    with pytest.raises(FileNotFoundError, match=f"no {split} file .* at {re.escape(str(paths[split]))} "):
        data.load_dataset("twitter2017", tmp_path)


@pytest.mark.parametrize("image_id, expected", [
    ("1", "a/1.jpg"), ("1.jpg", "a/1.jpg"), ("2", "a/2.PNG"), ("2.png", "a/2.PNG"),
    ("train_3", "b/TRAIN_3.JPEG"), ("4", "a/4"),
    ("Y", "b/Y.jpg"), ("y", "b/y.jpg"),  # the last two are two photos
    *((image_id, None)
        for image_id in ("5", "6", "outside", "../outside", "../outside.jpg", "../b/Y", ".", "..", "")),
])  # fmt: skip
def test_find_photos(tmp_path, image_id, expected):
    for name in "a/1.jpg a/2.PNG a/4 a/5.txt b/1.jpg b/TRAIN_3.JPEG b/Y.jpg b/y.jpg outside.jpg".split():
        write(tmp_path / name, "")
    absolute, folders = str(tmp_path / "outside.jpg"), [tmp_path / "a", tmp_path / "b"]
    expected = tmp_path / expected if expected else None
    assert find_photos([image_id, absolute], folders) == {image_id: expected, absolute: None}


NFD = unicodedata.normalize("NFD", "rev\u00e9")
NFC = unicodedata.normalize("NFC", NFD)


@pytest.mark.parametrize("image_id, names, expected", [
    *(("x", f"x{ending}", f"x{ending}") for ending in (*photos.ENDINGS, ".JPG", ".Tiff")),
    *(("x", f"x.jpg{more}", f"x.jpg{more}")
        for more in ("_large", ":large", ":orig", "?name=large", ".jpg", ".1", ".12", " ")),
    ("x", "x.png:900x900", "x.png:900x900"), ("x", "x?format=jpg&name=large", "x?format=jpg&name=large"),
    ("x", "X.JPG_LARGE", "X.JPG_LARGE"), (NFC, f"{NFD}.jpg", f"{NFD}.jpg"), (NFD, f"{NFC}.jpg", f"{NFC}.jpg"),
    (NFC.upper(), f"{NFD}.jpg.1", f"{NFD}.jpg.1"), ("x.jpg", "x.png", "x.png"), ("x.jpg", "x", "x"),
    ("x.jpg", "x.jpg.jpg", "x.jpg.jpg"), ("copy (1)", "copy (1).jpg|copy.jpg", "copy (1).jpg"),
    ("copy", "copy (1).jpg", None), ("x", "._x.jpg", None), ("x", "._x", None), ("._x", "._x.jpg", None),
    ("x", "x.mp4|x.txt|x.jpg.part|xy.jpg|y_x.jpg|x_large|x.1", None), ("1", "01.jpg|11.jpg|1 (1).jpg", None),
    # Of several: the exact name, then a fixed order of endings, and only then a like name.
    ("x", "x.png|x.jpg|X.jpg", "x.jpg"), ("x.png", "x.jpg|x.png|x.png.jpg", "x.png"),
    ("x.png", "x.jpg|x.png.jpg", "x.png.jpg"), ("x", "x.webp|x.gif|x.tif", "x.webp"),
    ("x", "x.jpg.1|x.heic", "x.heic"), ("x", "x.jpg.1|X.avif", "X.avif"),
    ("x", "x.png_large|x.jpg.1|x.jpg.jpg.1", "x.jpg.1"), ("x.jpg", "x.bmp|x.gif", "x.gif"),
])  # fmt: skip
def test_names_of_photos(tmp_path, image_id, names, expected):
    for order in itertools.permutations(names.split("|")[:3]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in [*order, *names.split("|")[3:], "other.jpg"]:
            write(folder / name, "")
        assert find_photos([image_id, "other"], [folder]) == {
            image_id: expected and folder / expected,
            "other": folder / "other.jpg",
        }
    names = {name: name for name in ["other.jpg", *names.split("|")] if not name.startswith("._")}
    assert photos.by_name([image_id], names) == {image_id: expected}  # as captions are found


def test_why_a_photo_is_missing(tmp_path):
    for name in (
        "a.mp4", "B.jpg.part", "._c.jpg", "d.png", "sub/e.jpg", "train/f.jpg", "sub/g.JPG_large", "g.txt",
        "k/._k.jpg",
    ):  # fmt: skip
        write(tmp_path / "images" / name, "")
    (tmp_path / "images" / "closed").mkdir(mode=0)
    folders, reasons = photos.image_folders("x", images=tmp_path / "images"), {}
    found = find_photos([*"abcefgk", "d.jpg", "../images/d", "absent"], folders, reasons)
    assert (
        {image_id: path.name for image_id, path in found.items() if path} == {"f": "f.jpg", "d.jpg": "d.png"}
    )
    assert reasons == {
        "a": "no such file; 'a.mp4' lies there", "b": "no such file; 'B.jpg.part' lies there",
        "d.jpg": "taken from 'd.png'", "e": "no such file; 'sub/e.jpg' lies there",
        "g": "no such file; 'g.txt' lies there",
    }  # fmt: skip


def test_all_usual_places_are_searched(tmp_path):
    (tmp_path / "mnre" / "images").mkdir(parents=True)
    first, second = (
        write(tmp_path / "mnre" / "img_org" / "train" / "1.jpg", ""),
        write(tmp_path / "mnre_image" / "2.jpg", ""),
    )
    write(tmp_path / "img_org" / "val" / "1.jpg", "")
    assert find_photos(["1", "2"], photos.image_folders("mnre", tmp_path)) == {"1": first, "2": second}
    only = photos.image_folders("mnre", tmp_path, tmp_path / "mnre" / "img_org")
    assert (
        only == [first.parent.parent, first.parent]
        and find_photos(["1", "2"], only) == {"1": first, "2": None}
    )


def test_a_data_sets_own_folder_comes_first_and_mnres_is_no_others(tmp_path):
    own, mnre = (
        write(tmp_path / "twitter2017" / "images" / "16.png", ""),
        write(tmp_path / "img_org" / "train" / "16.jpg", ""),
    )
    second = write(tmp_path / "twitter2017_images" / "16.jpg", "")
    folders = photos.image_folders("twitter2017", tmp_path)
    assert (
        folders == [own.parent, second.parent]
        and find_photos(["16", "17"], folders) == {"16": own, "17": None}
    )
    assert find_photos(["16"], photos.image_folders("mnre", tmp_path)) == {"16": mnre}


def tokenizer_for(encoder_dir, task):
    """The tokenizer of a run on such a task."""
    tokenizer = load_tokenizer(encoder_dir)
    if task == "relation":
        tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


def byte_level(words):
    """A byte-level BPE tokenizer as RoBERTa's, with few merges."""
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer, special = level, ["<s>", "</s>"]
    options = {"initial_alphabet": level.alphabet(), "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator([" ".join(words)], trainers.BpeTrainer(vocab_size=300, **options))
    ends = list(zip(special, range(2), strict=True))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>")


def spans(length):
    return list(itertools.combinations(range(length + 1), 2))


def relation(words, head, tail):
    return RelationExample("", "", tuple(words), head, tail, MEMBER)


RNG = random.Random(0)
WORDS = [
    "Messi", "TODAYS", "@fan", "#messi", "don't", "😍", "x2", "\u00a0", "\u200b", "\ufe0f", "", "...", "good",
]  # fmt: skip
WORD_LISTS = [RNG.choices(WORDS, k=RNG.randint(1, 12)) for _ in range(60)]
RANDOM_POSTS = [
    NerExample("", "", tuple(words), tuple(RNG.choices(LABELS, k=len(words)))) for words in WORD_LISTS
]
PAIRS = [
    relation(["Todays", "\u200b", "@fan", "good"], *pair) for pair in itertools.product(spans(4), repeat=2)
]


def test_encode_by_hand(encoder_dir):
    post = NerExample(
        "1", "1", ("Messi", "\u200b", "Todays", "good", "day"), ("B-PER", "O", "I-PER", "B-LOC", "O")
    )
    tokenizer = load_tokenizer(encoder_dir)
    (encoded,), counts = encode(tokenizer, [post], LABELS, 6)
    tokens = tokenizer.convert_ids_to_tokens(encoded.pop("input_ids"))
    assert tokens == ["[CLS]", "messi", "today", "##s", "good", "[SEP]"]
    wanted = {"own": (1, 5), "cut_words": 1, "word_starts": [1, -1, 2, 4, -1]}
    assert encoded == wanted | {"labels": [5, IGNORE, 6, 1, IGNORE]}
    assert counts == {"cut_posts": 1, "cut_words": 1, "words_without_piece": 1}
    with pytest.raises(ValueError, match="--max-len 5 "):
        encode(tokenizer, [post], LABELS, 5)


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE"])
@pytest.mark.parametrize("max_len", [6, 12, 100])
def test_encode_equals_word_by_word(encoder_dir, kind, max_len):
    tokenizer = load_tokenizer(encoder_dir) if kind == "WordPiece" else byte_level(WORDS)
    rows, counts = encode(tokenizer, RANDOM_POSTS, LABELS, max_len)
    expected = {"cut_posts": 0, "cut_words": 0, "words_without_piece": 0}
    for post, encoded in zip(RANDOM_POSTS, rows, strict=True):
        ids, starts, cut = [tokenizer.cls_token_id], [], 0
        for word in post.words:
            pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
            starts.append(len(ids) if pieces and len(ids) < max_len - 1 else -1)
            cut += bool(pieces) and starts[-1] < 0
            expected["words_without_piece"] += not pieces
            ids += pieces
        expected["cut_words"] += cut
        expected["cut_posts"] += cut > 0
        labels = [LABELS.index(y) if s >= 0 else IGNORE for y, s in zip(post.labels, starts, strict=True)]
        ids = ids[: max_len - 1] + [tokenizer.sep_token_id]
        wanted = {"input_ids": ids, "own": (1, len(ids) - 1), "cut_words": cut}
        assert encoded == wanted | {"word_starts": starts, "labels": labels}
    assert counts == expected
    # As the posts are meant to be.
    assert (counts["cut_words"] > 0) == (max_len < 100) and counts["words_without_piece"]


@pytest.mark.parametrize(
    "task, examples, labels", [("ner", RANDOM_POSTS, LABELS), ("relation", PAIRS, RELATIONS)]
)
@pytest.mark.parametrize("max_len", [9, 100])
def test_slow_tokenizer_equals_fast(encoder_dir, task, examples, labels, max_len):
    fast = tokenizer_for(encoder_dir, task)
    assert encode(Slow(fast), examples, labels, max_len) == encode(fast, examples, labels, max_len)


def test_mark_entities():
    for head, tail in itertools.product(spans(5), repeat=2):
        marked, index = encoding.mark_entities(relation("abcde", head, tail))
        assert "".join(word for word in marked if word not in MARKERS) == "abcde", (head, tail)
        assert sorted(word for word in marked if word in MARKERS) == sorted(MARKERS), (head, tail)
        assert all(marked[at] == marker for marker, at in index.items()) and set(index) == set(MARKERS)
        for (start, end), first, last in ((head, "[E1]", "[/E1]"), (tail, "[E2]", "[/E2]")):
            inside = [word for word in marked[index[first] : index[last]] if word not in MARKERS]
            assert "".join(inside) == "abcde"[start:end], (head, tail)


def test_words_that_look_like_markers():
    _, index = encoding.mark_entities(relation(["[E2]", "[E1]", "x", "y"], (2, 3), (3, 4)))
    assert index == {"[E1]": 2, "[/E1]": 4, "[E2]": 5, "[/E2]": 7}


@pytest.mark.parametrize("max_len", [6, 9, 16, 200])
def test_encode_relations(encoder_dir, max_len):
    tokenizer, cases = tokenizer_for(encoder_dir, "relation"), random.Random(0).choices(spans(20), k=120)
    examples = [
        relation(["Messi", "todays"] * 10, *pair) for pair in zip(cases[::2], cases[1::2], strict=True)
    ]
    examples.append(relation(["good"] * 60, (58, 60), (0, 1)))
    rows, counts = encode(tokenizer, examples, ("None", MEMBER), max_len)
    for example, encoded in zip(examples, rows, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert len(tokens) <= max_len and (tokens[0], tokens[-1], encoded["labels"]) == ("[CLS]", "[SEP]", 1)
        assert (tokens[encoded["head_index"]], tokens[encoded["tail_index"]]) == ("[E1]", "[E2]")
        if max_len == 200:
            assert (
                encoded["input_ids"] == tokenizer(" ".join(encoding.mark_entities(example)[0]))["input_ids"]
            )
    assert (counts["cut_posts"], counts["cut_words"] > 0) == (
        (0, False) if max_len == 200 else (len(rows), True)
    )


def test_window():
    """Both starts are always kept, both spans wherever there is room for that, and the room is used up."""
    for length, limit in itertools.product(range(1, 9), range(2, 10)):
        ranges = list(itertools.combinations_with_replacement(range(length), 2))
        for one, other in itertools.product(ranges, ranges):
            kept, case = encoding.window(length, (one, other), limit), (length, one, other, limit)
            assert kept == sorted(set(kept) & set(range(length))) and {one[0], other[0]} <= set(kept), case
            assert len(kept) == min(length, limit), case
            whole = {*range(one[0], one[1] + 1), *range(other[0], other[1] + 1)}
            if max(one[1], other[1]) - min(one[0], other[0]) < limit:
                assert whole <= set(kept) and kept[-1] - kept[0] == len(kept) - 1, case
            elif all(last - first < limit // 2 for first, last in (one, other)):
                assert whole <= set(kept), case


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_post_is_in_one_batch(seed, size):
    for n in (*range(26), *(50 * size * pools + d for pools in (1, 3) for d in (-1, 0, 1))):
        lengths = np.random.default_rng(n).integers(3, 60, n)
        batches = encoding.length_batches(
            lengths, size, None if seed is None else np.random.default_rng(seed)
        )
        assert sorted(itertools.chain(*batches)) == list(range(n))
        assert len(batches) == math.ceil(n / size) and all(1 <= len(batch) <= size for batch in batches)
        if seed is None:
            assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_batches_are_random_and_pad_little():
    lengths = np.random.default_rng(0).gamma(6, 4, 3000).astype(int) + 5  # sub-tokens: 6 to 70, on average 28

    def efficiency(batches):
        return sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    generator = np.random.default_rng(1)
    one, two = encoding.length_batches(lengths, 8, generator), encoding.length_batches(lengths, 8, generator)
    assert one == encoding.length_batches(lengths, 8, np.random.default_rng(1))
    assert set(map(frozenset, one)).isdisjoint(map(frozenset, two))
    means = [np.mean(lengths[batch]) for batch in one]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # the sorted batches do not follow one another
    assert min(efficiency(one), efficiency(two)) >= 0.90
    assert efficiency(np.arange(3000).reshape(-1, 8)) < 0.75  # unsorted


def test_collate():
    words = [{"input_ids": [2, 7, 8, 3], "own": (1, 3), "word_starts": [1, -1, 2], "labels": [0, IGNORE, 4]},
             {"input_ids": [2, 9, 3], "own": (1, 2), "word_starts": [1], "labels": [1]}]  # fmt: skip
    pairs = [{"input_ids": [2, 3], "own": (1, 1), "head_index": 1, "tail_index": 0, "labels": 5},
             {"input_ids": [2, 0, 0, 3], "own": (0, 4), "head_index": 2, "tail_index": 3,
              "labels": 0}]  # fmt: skip
    batches = [encoding.collate(words, 99), encoding.collate(pairs, 99)]
    own = [batch.pop("own_mask").tolist() for batch in batches]
    assert own == [[[False, True, True, False], [False, True, False, False]], [[False] * 4, [True] * 4]]
    assert [{key: value.tolist() for key, value in batch.items()} for batch in batches] == [
        {"input_ids": [[2, 7, 8, 3], [2, 9, 3, 99]], "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
         "word_starts": [[1, -1, 2], [1, -1, -1]], "labels": [[0, IGNORE, 4], [1, IGNORE, IGNORE]]},
        {"input_ids": [[2, 3, 99, 99], [2, 0, 0, 3]], "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
         "head_index": [1, 2], "tail_index": [0, 3], "labels": [5, 0]},
    ]  # fmt: skip
    assert {value.dtype for batch in batches for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    "reader, kind", [(r, k) for r in ("read_ner", "read_mnre") for k in faults.CONTENTS[r]]
)
def test_fuzz(reader, kind):
    counts = faults.fuzz(reader, kind, 150)
    assert counts["inputs"] == 150 and counts["read"] + counts["refused"] == 150
    assert counts["read"] and (kind == "words" or counts["refused"])  # with any words a file is valid


# ---------------------------------------------------------------------------------------------- your own data


@pytest.fixture
def own(tmp_path):
    """A folder in the CoNLL-with-IMGID form with labels of its own; returns a function to write a split."""
    folder = tmp_path / "mine"
    folder.mkdir()

    def write(split, *posts, separator=" "):
        text = "\n".join(
            f"IMGID:{split}{i}\n" + "".join(f"{w}{separator}{y}\n" for w, y in post)
            for i, post in enumerate(posts)
        )
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        return str(folder)

    write("train", [("東京", "B-地名"), ("が", "O")], [("Ада", "B-персона"), ("Лавлейс", "I-персона")])
    write("valid", [("x", "O")])
    return write


@pytest.mark.parametrize("separator", [" ", "\t", "   "])
def test_own_folder_has_labels_of_its_own(own, separator):
    folder = own("test", [("東京", "I-地名"), ("/", "O")], separator=separator)
    dataset = data.load_dataset(folder, "no such folder")
    assert (dataset.name, dataset.task) == ("mine", "ner")
    assert dataset.labels == ("O", "B-персона", "I-персона", "B-地名", "I-地名")  # in the order of their names
    assert (
        dataset.examples["test"][0].words == ("東京", "/") and dataset.examples["test"][0].image_id == "test0"
    )
    assert all(
        variant["variant"] == "not a file of a known release" for variant in dataset.fingerprints().values()
    )
    Path(folder, "images").mkdir()
    assert photos.image_folders(folder)[0] == Path(folder, "images")


def test_labels_that_train_does_not_have_are_named(own):
    folder = own("test", [("a", "B-新"), ("b", "I-他"), ("c", "B-地名")])
    with pytest.raises(ValueError, match="test.txt: labels that train does not have: B-新 I-他; correct them"):
        data.load_dataset(folder)


@pytest.mark.parametrize("label", ["b-PER", "PER", "B-", "", "B- a", "B-a  b", "X-地名", "Bx地名"])
def test_labels_that_are_not_bio_are_refused(own, label):
    folder = own("test", [("a", "O"), ("b", label)], separator="\t")
    with pytest.raises(ValueError, match="test.txt:3: label .* is not O, B-TYPE or I-TYPE"):
        data.load_dataset(folder)


def test_types_may_hold_spaces_where_tabs_separate(own):
    own("train", [("Ann", "B-Public Person"), ("Lee", "I-Public Person"), ("in", "O")], separator="\t")
    dataset = data.load_dataset(own("valid", [("[", "S-Public Person")], separator="\t"))
    assert dataset.labels == ("O", "B-Public Person", "I-Public Person")
    assert dataset.examples["valid"][0].labels == ("B-Public Person",)
    own("train", [("[", "B-Public Person")], separator="\t")
    assert data.data_task(own("valid", [("a", "O")])) == "ner"


def test_posts_with_and_without_photo_in_one_file(tmp_path):
    text, notes = "IMGID:\na\tO\n\nIMGID:1\nb\tO\n\nIMGID:\tO\nc\tO\n\nd\tO\n", []
    path = write(tmp_path / "x", text)
    posts = data.read_ner(path, None, notes)
    assert [(post.id, post.image_id, post.words) for post in posts] == [
        ("line 1", None, ("a",)), ("1", "1", ("b",)), ("line 7", None, ("c",)), ("line 10", None, ("d",)),
    ]  # fmt: skip
    assert notes == ["3 of 4 posts name no photo, the first at line 1"]
    with refused(write(path, "IMGID:1\nb\tO\n\nIMGID:\n\n"), 4, "post without photo has no words"):
        data.read_ner(path, None)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_advice_for_columns_keeps_words_and_labels_or_names_none(tmp_path, separator, seed):
    rng = random.Random(seed)
    empty = "" if separator == "\t" else "_"
    others = {  # what may stand beside words and labels, of the n-th word of post p
        "index": lambda p, n: str(n + 1), "id": lambda p, n: f"{p}-{n}", "document": lambda p, n: f"doc{p}",
        "score": lambda p, n: f"{rng.random():.4f}", "empty": lambda p, n: empty,
    }  # fmt: skip
    before, after = ([rng.choice(list(others)) for _ in range(rng.randint(0, 2))] for _ in range(2))
    between = [lambda p, n: rng.choice(["NNP", "VBZ"]), lambda p, n: rng.choice(["O", "B-NP"])]
    middle = between[: rng.randint(not (before or after), 2)]
    posts = [[(rng.choice(["Ann", "東京", "2", "!"]) + "x" * n, rng.choice(["O", "B-PER"])) for n in range(4)]
             for _ in range(5)]  # fmt: skip
    lines = []
    for p, post in enumerate(posts):
        lines.append(f"IMGID:{p}")
        for n, (word, label) in enumerate(post):
            sides = [[others[name](p, n) for name in names] for names in (before, after)]
            fields = [*sides[0], word, *(make(p, n) for make in middle), label, *sides[1]]
            lines.append(separator.join(fields))
        lines.append("")
    path = write(tmp_path / "x", "\n".join(lines))
    advice = f"keep columns {len(before) + 1} and {len(before + middle) + 2}, "
    with pytest.raises(ValueError, match=advice) as error:
        data.read_ner(path, None)
    cut = re.search(r"as (cut .*) does$", str(error.value))
    assert bool(cut) == (separator != "  ")
    if cut:
        made = subprocess.run(f"{cut[1]} {path}", shell=True, capture_output=True, check=True).stdout
        read = data.read_ner(write(tmp_path / "y", made), None)
        assert [list(zip(post.words, post.labels, strict=True)) for post in read] == posts
        assert [post.image_id for post in read] == ["0", "1", "2", "3", "4"]


def test_a_file_without_a_word_is_pointed_out(tmp_path):
    notes = []
    data.read_ner(write(tmp_path / "x", "1 B-PER\n2 I-PER\n3 O\n"), None, notes)
    assert notes[1:] == ["every word is a number: is the first column that of the words?"]


@pytest.mark.parametrize("row, said", [
    ({"tokens": ["Ann"], "ner_tags": [1]},
        "named entities in JSON ('tokens', 'ner_tags') are not read; write word<TAB>label lines"),
    ({"id": 1, "text": "Ann", "label": [[0, 3, "PER"]]}, "in JSON ('id', 'text', 'label') are not"),
    ({"text": "Ann", "spans": [{"start": 0}]}, "named entities in JSON ('text', 'spans') are not read"),
    ({"text": "Ann Lee", "h": {"pos": [0, 7]}, "t": {"pos": [3, 4]}, "relation": "x"},
        "(no key 'token') but 'text', 'h', 't', 'relation'; 'pos' is to be [start, end) in words"),
    ({"token": ["Ann"], "subj_start": 0, "subj_end": 0, "relation": "x"},
        "(no key 'h') but 'token', 'subj_start', 'subj_end', 'relation'; 'pos' is to be"),
    ({"text": "Ann Lee", "head": "Ann", "tail": "Lee", "relation": "x"}, "but 'text', 'head', 'tail', 'rel"),
])  # fmt: skip
def test_rows_in_another_layout_are_named(tmp_path, row, said):
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.txt", json.dumps(row) + "\n")
    with refused(tmp_path / "train.txt", 1, re.escape(said)):
        data.load_dataset(str(tmp_path))


def test_mnre_version_1_is_named_and_read_as_ones_own(tmp_path):
    path = write(tmp_path / "mnre" / "train.txt", row(relation="none") + row(relation="/per/misc/creat"))
    with refused(path, 1, "unknown label 'none', not of MNRE version 2; .* for version 1 .*--dataset path"):
        read_mnre(path, RELATIONS)
    assert [example.label for example in read_mnre(path, None)] == ["None", "/per/misc/creat"]


def test_conversions_are_said_once_a_file(own):
    folder = own("test", [("a", "O"), ("b", "S-地名")])
    dataset = data.load_dataset(folder)
    assert dataset.examples["test"][0].labels == ("O", "B-地名")
    assert dataset.notes == ("test: BIOES labels read as BIO, 1 changed",)


@pytest.mark.parametrize("line, columns", [  # the first is a word with a space in a file of two columns
    ("a b O", "3 columns, 'a', 'b', 'O'; keep one word and one label, a tab between them$"), ("a", "'a'$"),
])  # fmt: skip
def test_a_word_and_label_too_few_or_many(own, line, columns):
    folder = own("test", [("x", "O")])
    with open(Path(folder, "test.txt"), "a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(ValueError, match=f"test.txt:3: expected word<TAB>label, found {columns}"):
        data.load_dataset(folder)


@pytest.mark.parametrize(
    "other", ["Персона", "персона\u200b", "персо\u00adна", "\ufeffперсона", unicodedata.normalize("NFD", "й")]
)
def test_types_that_look_alike_are_pointed_out(own, other):
    posts = [("a", "B-персона")], [("b", f"B-{other}")], [("c", "B-место")]
    folder = own("train", *posts, [("d", "B-й")])
    pair = sorted([other, "й" if len(other) == 2 else "персона"])
    said = f"{pair[0]!r} and {pair[1]!r} differ in case or in what cannot be seen; are they one?"
    assert data.load_dataset(folder).notes == (said,)
    own("train", posts[0], posts[2], [("d", "B-й")])
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{folder}/test.txt: labels that train does not have: B-{other}; correct them; {said}"
        ),
    ):
        data.load_dataset(own("test", posts[1]))


def test_own_folder_of_relations(tmp_path):
    def lines(*relations, **changes):
        return "".join(json.dumps(ROW | {"relation": relation} | changes) + "\n" for relation in relations)

    folder = tmp_path / "own"
    write(folder / "train.txt", "\n" + lines("worksFor", "NA", "Other", "no_relation", "NA"))
    write(folder / "dev.txt", lines("None", "Other", img_id=None) + lines("na"))
    dataset = data.load_dataset(str(folder))
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
                           (3, "test.txt:1: 'img_id' and 'relation' must be text")):  # fmt: skip
        write(folder / "test.txt", lines(relation))
        with pytest.raises(ValueError, match=said):
            data.load_dataset(str(folder))


@pytest.mark.parametrize("content, task", [
    (row(), "relation"), ("\ufeff\n \n" + json.dumps(ROW), "relation"), ("[\n{", "relation"),
    (f"[{row()}]", "relation"), ("{", "relation"),
    (PLAIN, "ner"), ("[\tO\n", "ner"), ("{ B-x\n", "ner"), ("[ NN O\n", "ner"), ("", "ner"), (None, "ner"),
])  # fmt: skip
def test_train_tells_the_task_of_an_own_folder(tmp_path, content, task):
    (tmp_path / "twitter2017").mkdir()
    if content is not None:
        write(tmp_path / "twitter2017" / "train.txt", content)
    assert data.data_task(str(tmp_path / "twitter2017")) == task
    assert (data.data_task("twitter2017", tmp_path), data.data_task("mnre", tmp_path)) == ("ner", "relation")


def test_read_captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeff1.jpg :a dog : brown\r\n\n2.PNG\ta\u00a0cat :x\n3.jpg :\n".encode())
    captions = photos.read_captions(path)
    assert captions == {"1.jpg": "a dog : brown", "2.PNG": "a\u00a0cat :x", "3.jpg": ""}
    assert photos.by_name(["1", "2", "3.jpg", "4"], captions) == {
        "1": "a dog : brown", "2": "a\u00a0cat :x", "3.jpg": "", "4": None}  # fmt: skip
    for text, message in (
        ("x", ":1: expected '<photo> :<caption>'"), ("a :b\na :c", ":2: a has a caption already")
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            photos.read_captions(path)


@pytest.mark.parametrize("kind", ["pipe", "huge"])
@pytest.mark.parametrize("read", [data.read_lines, lambda path: data.data_task(path.parent)])
def test_a_pipe_is_not_waited_for_and_a_huge_file_not_read(tmp_path, kind, read):
    path = tmp_path / "train.txt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 2**29 + 1)
    message = {"pipe": "no regular file", "huge": "536,870,913 bytes; no file of posts"}[kind]
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read(path)


@pytest.mark.parametrize(
    "read, allowed", [(read_mnre, RELATIONS), (data.read_ner, LABELS), (data.read_ner, None)]
)
def test_a_line_of_100_megabytes_is_one_clear_error(tmp_path, read, allowed):
    path = tmp_path / "long.txt"
    with open(path, "wb") as file:
        file.write(b"IMGID:1\n" if read is not read_mnre else b"")
        file.write(b"[1," * 33_000_000 + b"\n")
    with pytest.raises(
        ValueError, match=r"long.txt:\d: a line of 99,000,000 characters; no post has one so long"
    ) as error:
        read(path, allowed)
    assert len(str(error.value)) < 300
