"""The demo data sets as `python demo.py` writes them: the first as it was, and what the second is for."""

import hashlib
import json
import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

import demo
from encoding import encode
from parts.datasets import load_dataset
from parts.notes import Notes
from parts.photos import find_photos, image_folders
from parts.scores import entity_spans

SCRIPT = Path(__file__).parents[1] / "demo.py"
COUNTS = {"train": 480, "valid": 160, "test": 320}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --data-dir as the command leaves it when it is run for the second time."""
    folder = tmp_path_factory.mktemp("data")
    for left in ("demo/images", "demo-notes/images", "demo-notes/generated"):
        (folder / left).mkdir(parents=True)
        (folder / left / "test_9999.jpg").touch()  # of an earlier, larger one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "--data-dir", str(folder)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


@pytest.fixture(scope="module")
def posts(root):
    """[(example, note, [(name, type)], the photo's scene, the generated picture's)] of demo-notes."""
    notes = [json.loads(line) for line in (root / "demo-notes" / "notes.jsonl").read_text().splitlines()]
    examples = [example for split in load_dataset("demo-notes", root).examples.values() for example in split]
    rows = []
    for example, note in zip(examples, notes, strict=True):
        assert note["id"] == example.image_id
        spans = sorted(entity_spans(example.labels), key=lambda span: span[1])
        names = [(" ".join(example.words[start:end]), kind) for kind, start, end in spans]
        scenes = [scene(root / "demo-notes" / kind / f"{example.image_id}.jpg")
                  for kind in ("images", "generated")]  # fmt: skip
        rows.append((example, note, names, *scenes))
    return rows


def scene(path):
    """The type that a drawn picture stands for: the background nearest to its corner."""
    corner = Image.open(path).convert("RGB").getpixel((2, 2))
    apart = {kind: sum((a - b) ** 2 for a, b in zip(colour, corner, strict=True))
             for kind, colour in demo.BACKGROUNDS.items()}  # fmt: skip
    return min(apart, key=apart.get)


@pytest.mark.parametrize("name, more, digest", [
    ("demo", "captions.txt", "8bfd825e1d24adc0"), ("demo-notes", "notes.jsonl", "866ac6ad5550715a"),
])  # fmt: skip
def test_the_sets_are_what_they_were(root, name, more, digest):
    """Every published figure on them is of these posts."""
    files = ("train.txt", "valid.txt", "test.txt", more)
    texts = b"".join((root / name / file).read_bytes() for file in files)
    assert hashlib.sha256(texts).hexdigest()[:16] == digest


def test_captions_are_of_the_photos(root):
    captions = (root / "demo" / "captions.txt").read_text().splitlines()
    assert len(captions) == len(list((root / "demo" / "images").iterdir())) == 560
    for line in captions[::7]:
        name, _, caption = line.partition(" :")
        assert caption in demo.CAPTIONS[scene(root / "demo" / "images" / name)]


@pytest.mark.parametrize("name", ["demo", "demo-notes"])
def test_a_data_set_of_ones_own_stays(tmp_path, name):
    """Called as the demo is called: nothing of it is deleted or replaced, nothing is written beside it."""
    (tmp_path / name / "images").mkdir(parents=True)
    files = {"train.txt": "IMGID:1\nAnn\tB-PER\n\n", "captions.txt": "mine", "images/test_0001.jpg": "mine"}
    for kept in (["captions.txt"], list(files)):
        for file in kept:
            (tmp_path / name / file).write_text(files[file])
        with pytest.raises(ValueError, match=f"{name}: holds files of your own; give the demo another"):
            demo.main(["--data-dir", str(tmp_path)])
        left = {str(path.relative_to(tmp_path / name)) for path in tmp_path.rglob("*") if path.is_file()}
        assert left == set(kept) and all((tmp_path / name / file).read_text() == files[file] for file in kept)


def test_the_second_set_is_read_without_a_remark(root):
    dataset = load_dataset("demo-notes", root)
    assert dataset.notes == () and {split: len(posts) for split, posts in dataset.examples.items()} == COUNTS
    ids = dataset.image_ids()
    for folders in (image_folders("demo-notes", root), [root / "demo-notes" / "generated"]):
        remarks = {}
        assert None not in find_photos(ids, folders, remarks).values() and not remarks
        assert len(list(folders[0].iterdir())) == len(ids) == 960
    said = Notes(root / "demo-notes" / "notes.jsonl").coverage(dataset.examples)
    assert said[0].split(": ")[1].startswith("960 notes, 0 of no post here")
    for line, (split, count) in zip(said[1:], COUNTS.items(), strict=True):
        keys = ", ".join(f"{key} of {count}" for key in ("about_post", "about_photo", "relevance", "phrases"))
        assert line == f"{split}: {keys} of {count} posts"


def test_a_fifth_of_the_photos_are_another_posts_and_said_as_they_are(root, posts):
    wrong = Counter(note["id"].split("_")[0] for _, note, *_ in posts if not note["relevance"])
    assert wrong == {split: n // 5 for split, n in COUNTS.items()}
    own = set()
    for example, note, names, shown, _ in posts:
        assert note["relevance"] in (0, 1) and (shown == names[0][1]) == note["relevance"]
        assert note["about_photo"] in demo.CAPTIONS[shown]
        if note["relevance"]:
            own.add((root / "demo-notes" / "images" / f"{example.image_id}.jpg").read_bytes())
    assert len(own) == 960 - 192


def test_who_knows_which_photos_are_wrong_can_be_right(posts):
    """A rule that reads name, photo and relevance makes no mistake; one of name and photo makes some."""
    misled, kinds = 0, defaultdict(Counter)
    for _, note, names, shown, _ in posts:
        name, kind = names[0]
        if name in demo.AMBIGUOUS:
            usual = demo.AMBIGUOUS[name][0]
            assert kind == (shown if note["relevance"] else usual)
            misled += (shown if shown in demo.AMBIGUOUS[name] else usual) != kind
            kinds[name][kind] += note["relevance"]
    assert 0.02 * len(posts) < misled < 0.06 * len(posts)
    assert {name: set(count) for name, count in kinds.items()} == {
        name: set(of) for name, of in demo.AMBIGUOUS.items()
    }
    assert all(min(count.values()) >= 3 for count in kinds.values())


def test_no_model_has_a_piece_for_made_up_names(root, posts):
    known = {name for names in demo.PLAIN.values() for name in names} | set(demo.AMBIGUOUS)
    tokenizer = AutoTokenizer.from_pretrained(root / "demo-notes" / "encoder")
    for example, note, names, *_ in posts:
        unknown = [name for name, _ in names if name not in known]
        for text in (" ".join(example.words), note["about_post"]):
            assert tokenizer.tokenize(text).count("[UNK]") == len(unknown)
        for text in (note["about_photo"], *note["phrases"]):
            assert "[UNK]" not in tokenizer.tokenize(text) and "##" not in " ".join(tokenizer.tokenize(text))
    dataset = load_dataset("demo-notes", root)
    assert not any(encode(tokenizer, dataset.examples["train"], dataset.labels, 40)[1].values())


def test_generated_pictures_are_of_the_text_alone(root, posts):
    drawn = defaultdict(set)
    for example, _, names, _, picture in posts:
        name, kind = names[0]
        assert picture == (demo.AMBIGUOUS[name][0] if name in demo.AMBIGUOUS else kind)
        drawn[example.words].add((root / "demo-notes" / "generated" / f"{example.image_id}.jpg").read_bytes())
    assert all(len(pictures) == 1 for pictures in drawn.values())
    assert len(set.union(*drawn.values())) == len(drawn)
