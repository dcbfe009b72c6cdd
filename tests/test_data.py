"""Promises of data.py: files by hand and what is read of them, refusals with file and line, random files."""

import itertools
import json
import os
import random
import re

import faults
import pytest
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities

import data
from data import RELATIONS, NerExample, RelationExample, read_mnre
from parts.datasets import data_task

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
    documents = ["2 -DOCSTART- lines left out"] if "DOC" in blank else []
    assert notes == ["no IMGID line: 2 posts without photo", *documents]
    numbers = []
    data.read_ner(write(tmp_path / "x", "1 B-PER\n2 I-PER\n"), None, numbers)
    assert numbers[1:] == ["every word is a number: is the first column that of the words?"]


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
    told = [] if scheme is IOB2 else [f"{names[len(letters)]} labels read as BIO, {changed} changed"]
    assert notes == told and (made == posts) == (scheme is IOB2)


def test_orphans_in_a_bio_file_stay(tmp_path):
    notes, labels = [], ["I-PER", "O", "B-LOC", "O", "B-PER", "I-LOC", "B-LOC", "B-LOC"]
    path = write(tmp_path / "x", "IMGID:1\n" + "".join(f"w\t{y}\n" for y in labels))
    (post,) = data.read_ner(path, LABELS, notes)
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
    ("IMGID:1\na\tX\tO\n", 2, "found 3 columns, 'a', 'X', 'O'; keep one word and one label, a tab"),
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


SPAN_PAIRS = [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((1, 2), (1, 2)), ((3, 4), (0, 4))]


@pytest.mark.parametrize("head, tail", SPAN_PAIRS)
def test_mnre_spans(tmp_path, head, tail):
    path = write(tmp_path / "x", row(h={"name": "", "pos": list(head)}, t={"pos": list(tail)}))
    row_of_path = RelationExample("1.jpg@1", "1.jpg", tuple(TOKENS), head, tail, MEMBER)
    assert read_mnre(path, RELATIONS) == [row_of_path]


@pytest.mark.parametrize("start, end", [("", "\n"), ("", "\r\n"), ("\ufeff", "\n")])
def test_mnre_rows_that_share_a_photo(tmp_path, start, end):
    text = start + row() + row(relation="None") + "\n" + row()[:-1]
    path = write(tmp_path / "x", text.replace("\n", end))
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


@pytest.mark.parametrize("end", ["h", "t"])
@pytest.mark.parametrize("pos, name, said", [
    ([2, 2], "Miami", r"'{}' pos is not a span \[start, end\) of its 4 words; the end is exclusive"),
    ([1, 3], "Miami", r"'{}' is named 'Miami', but pos \[1, 3\] holds 'joins Miami'; correct one of them"),
    ([3, 4], "x\ny", r"'{}' is named 'x\\ny', but pos \[3, 4\] holds 'today'; correct one of them"),
])  # fmt: skip
def test_mnre_names_are_the_words_of_their_span(tmp_path, end, pos, name, said):
    path = write(tmp_path / "x", row() + row(**{end: {"name": name, "pos": pos}}))
    for allowed in (RELATIONS, None):
        with refused(path, 2, said.format(end)):
            read_mnre(path, allowed)
    for fits in ("Messi joins", "messi  joins", "Messijoins", "", None):
        (example,) = read_mnre(write(tmp_path / "x", row(h={"name": fits, "pos": [0, 2]})), RELATIONS)
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
    (json.dumps(ROW)[:-1], r"not a row .*\(not JSON: Expecting ',' delimiter at character 1"),
    (json.dumps(ROW).replace('"h"', "h"), "not JSON: Expecting property name"),
    (f"{ROW}"[:-1] + ", 'x': null}", r"\(ValueError: malformed node or string\)"),
    (json.dumps(ROW | {"token": ["\ud83d", *TOKENS]}), r"'\\ud83d' holds half a character"),
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


@pytest.mark.parametrize("content, line, reason", [
    (f"[\n{row()}]", 2, "not a JSON array of rows .Expecting"), ("[\n1]", 2, "row 1: not a row"),
    (json.dumps([ROW, ROW | {"relation": "x"}], indent=1), 24, "row 2: unknown label 'x'"),
    ("[" * 100_000, 1, "too deep"), (json.dumps([ROW]) + "\n{}", 2, "Extra data"),
])  # fmt: skip
def test_mnre_arrays_with_a_mistake(tmp_path, content, line, reason):
    path = write(tmp_path / "x", content)
    with refused(path, line, reason):
        read_mnre(path, RELATIONS)


@pytest.mark.parametrize("reader", ["read_ner", "read_mnre"])
@pytest.mark.parametrize("kind", faults.CONTENTS["read_ner"])
def test_fuzz(reader, kind):
    counts = faults.fuzz(reader, kind, 80)
    assert counts["inputs"] == 80 and counts["read"] + counts["refused"] == 80
    assert counts["read"] and (kind == "words" or counts["refused"])  # with any words a file is valid


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


def test_mnre_version_1_is_named_and_read_as_ones_own(tmp_path):
    path = write(tmp_path / "mnre" / "train.txt", row(relation="none") + row(relation="/per/misc/creat"))
    with refused(path, 1, "unknown label 'none', not of MNRE version 2; .* for version 1 .*--dataset path"):
        read_mnre(path, RELATIONS)
    assert [example.label for example in read_mnre(path, None)] == ["None", "/per/misc/creat"]


@pytest.mark.parametrize("read", [data.read_lines, lambda path: data_task(path.parent)])
def test_a_pipe_is_not_waited_for_and_a_huge_file_not_read(tmp_path, read):
    path = tmp_path / "train.txt"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"^{path}: no regular file"):
        read(path)
    path.unlink()
    path.touch()
    os.truncate(path, 2**29 + 1)
    with pytest.raises(ValueError, match=f"^{path}: 536,870,913 bytes; no file of posts"):
        read(path)


def test_a_line_of_100_megabytes_is_one_clear_error(tmp_path):
    path = write(tmp_path / "x", b"IMGID:1\n" + b"[1," * 33_000_000)
    with refused(path, 2, "a line of 99,000,000 characters; no post has one so long, correct the file"):
        data.read_lines(path)

