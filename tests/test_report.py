"""The page of a run, in-process on tiny data: what is embedded in it against the run's own files."""

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import PARTS, run as train, system_flags
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from seqeval.metrics.sequence_labeling import get_entities

import report
from encoding import collate, encode
from features import FeatureCache
from parts.datasets import DATASETS, load_dataset
from parts.files import write_json, write_json_lines
from parts.notes import EXTRAS, Segments, read_notes
from parts.photos import thumbnail
from parts.report_data import place_maps
from parts.run_files import load_run
from parts.scores import entity_scores, entity_spans, score
from parts.text_encoder import load_tokenizer
from report import compare_spans, relation_kind, score_tables
from parts import opening

RUNS = {  # name: (data set, what to add to a quick run's arguments)
    "film": ("demo", ["--fusion", "film"]),
    "none": ("demo", ["--fusion", "none"]),
    "cross-attention": ("demo", ["--fusion", "cross-attention", "--epochs", 2]),
    "clip-bert": ("demo", ["--fusion", "attention"]),
    "blip": ("demo", []),
    "vilt": ("demo", []),
    "bert-caption": ("demo", ["--fusion", "bimodal"]),
    "mnre": ("mnre", ["--fusion", "cross-attention"]),
    "mnre-none": ("mnre", ["--fusion", "none"]),
    "notes": (
        "demo", ["--fusion", "cross-attention", "--extra", "both", "--extra-len", 12, "--decoder", "crf"]
    ),
    "notes-none": ("demo", ["--fusion", "none", "--extra", "post"]),
    "mnre-notes": ("mnre", ["--fusion", "cross-attention", "--extra", "photo"]),
}
WITH_NOTES = [name for name in RUNS if "notes" in name]
WITH_MAPS = ("cross-attention", "clip-bert", "blip", "vilt", "mnre", "notes", "mnre-notes")
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "\u2028",
           "&lt;b&gt;"]  # fmt: skip


def write_notes(path, dataset, data_dir):
    """Notes on three photos in four: with it in view, too long, on nothing but it; all of them hostile."""
    posts = [example for posts in load_dataset(dataset, data_dir).examples.values() for example in posts]
    notes = []
    for i, image_id in enumerate(dict.fromkeys(example.image_id for example in posts)):
        post, photo = f" so {HOSTILE[i % 5]} {image_id} ", f"so {HOSTILE[(i + 1) % 5]}\n{image_id}"
        long, blank = post + 9 * "so good ", " \n"
        of_post = ({"about_post": post, "with_photo": True}, {"about_post": long}, {"about_post": blank})
        notes += [{"id": image_id, "about_photo": photo} | said for said in of_post[i % 4 : i % 4 + 1]]
    write_json_lines(path, notes)
    return path


def train_run(name, folder, flags, data_dir):
    """A quick run of `RUNS`; returns its folder."""
    dataset, more = RUNS[name]
    if name in PARTS:
        more = [*system_flags(name, data_dir), *more]
    if name in WITH_NOTES:
        more = [*more, "--notes", write_notes(folder.with_suffix(".jsonl"), dataset, data_dir)]
    return train([*flags, "--epochs", 1], folder, "--dataset", dataset, "--max-len", 40, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, flags, data_dir):
    """{name: run folder} of `RUNS`."""
    root = tmp_path_factory.mktemp("runs")
    return {name: train_run(name, root / name, flags, data_dir) for name in RUNS}


def embedded(path):
    """The JSON in a report, photos in the place of their numbers: [JPEG in base64, what was seen of it]."""
    text = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    blocks = dict(re.findall(r'<script type="text/plain" id="photo-(\d+)">(.*?)</script>', text))
    page = json.loads(data)
    for photo in page["photos"].values():
        if isinstance(photo, list):
            photo[0] = blocks.pop(str(photo[0]))
    assert not blocks
    return page


def page_of(run, output, *more):
    return embedded(report.main([str(arg) for arg in ["--run", run, "--output", output, *more]]))


def predictions(run):
    """(split, records) of the split that a report is of by default."""
    split = "test" if (run / "predictions-test.jsonl").exists() else "valid"
    lines = (run / f"predictions-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return split, [json.loads(line) for line in lines]


def copy_run(run, folder, records):
    """A run folder with other predictions: enough for a page without attention."""
    folder.mkdir()
    for name in ("config.json", "log.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    write_json_lines(folder / "predictions-test.jsonl", records)
    return folder


def copy_whole(run, folder, **changed):
    """A run folder with all that is in it and another configuration."""
    shutil.copytree(run, folder)
    write_json(folder / "config.json", json.loads((run / "config.json").read_text()) | changed)
    return folder


# ------------------------------------------------------------------------------------------------- comparison


labels = st.sampled_from(DATASETS["demo"][1])


@given(st.integers(0, 12).flatmap(lambda n: st.tuples(*2 * [st.lists(labels, min_size=n, max_size=n)])))
def test_every_span_has_one_kind(pair):
    gold, predicted = (entity_spans(side) for side in pair)
    compared = compare_spans(gold, predicted)
    assert [row[:2] for row in compared] == sorted({span[1:] for span in gold | predicted})
    for spans, column, alone in ((gold, 2, "missed"), (predicted, 3, "spurious")):
        assert {(row[column], *row[:2]) for row in compared if row[column] is not None} == spans
        other = predicted if spans is gold else gold
        covered = {i for _, start, end in other for i in range(start, end)}  # word by word, not by ends
        for row in compared:
            if row[column] is not None:
                meets = not covered.isdisjoint(range(*row[:2]))
                assert (row[4] == alone) == (not meets)
                assert (row[4] == "correct") == ((row[column], *row[:2]) in other)
                both = row[2] is not None and row[3] is not None
                assert (row[4] == "wrong type") == (both and row[2] != row[3])
                assert row[4] in ("correct", "wrong type", alone, "wrong boundary")
    if gold | predicted:
        correct = entity_scores([pair[0]], [pair[1]])["correct"]
        assert sum(row[4] == "correct" for row in compared) == correct
    swap = {"missed": "spurious", "spurious": "missed"}
    mirrored = [(start, end, b, a, swap.get(kind, kind)) for start, end, a, b, kind in compared]
    assert mirrored == compare_spans(predicted, gold)


def test_kinds_of_relations():
    cases = {("None", "None"): "correct", ("x", "x"): "correct", ("x", "y"): "wrong type",
             ("x", "None"): "missed", ("None", "x"): "spurious"}  # fmt: skip
    assert {pair: relation_kind(*pair) for pair in cases} == cases


# --------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("name", RUNS)
def test_the_page_holds_the_run(runs, tmp_path, name, capsys):
    page, (split, records) = page_of(runs[name], tmp_path / "page.html"), predictions(runs[name])
    out = capsys.readouterr().out
    posts = {post["id"]: post for post in page["posts"]}
    assert len(posts) == len(page["posts"]) == len(records) and page["title"] == f"{name}, {split}"
    assert f"{len(records)} {'posts' if page['ner'] else 'rows'}" in out and " MB\n" in out
    wrong = [sum(span[4] != "correct" for span in post["spans"]) for post in page["posts"]]
    assert wrong == sorted(wrong, reverse=True)
    pairs = Counter()
    for record in records:
        post = posts[record["id"]]
        assert post["words"] == record["words"] and post["photo"] == record["image_id"] in page["photos"]
        if page["ner"]:  # seqeval's chunker, its ends inclusive
            sides = (get_entities(record[key]) for key in ("gold", "predicted"))
            gold, predicted = ({(start, end + 1): kind for kind, start, end in side} for side in sides)
            for span in post["spans"]:
                chances = [p for p in record["probability"][span[0] : span[1]] if p is not None]
                assert span[5] == (min(chances) if chances and span[3] else None)
        else:
            gold, predicted = {(0, 0): record["gold"]}, {(0, 0): record["predicted"]}
            assert (post["ends"] == [record["head"], record["tail"]]
                    and post["spans"][0][5] == record["probability"])  # fmt: skip
        assert [tuple(span[:2]) for span in post["spans"]] == sorted(gold | predicted)
        for start, end, a, b, _, _ in post["spans"]:
            assert (a, b) == (gold.get((start, end)), predicted.get((start, end)))
            pairs[a or "(none)", b or "(none)"] += 1
    matrix = page["confusion"]
    assert {(a, b): n for a, row in zip(matrix["labels"], matrix["counts"], strict=True)
            for b, n in zip(matrix["labels"], row, strict=True) if n} == pairs  # fmt: skip
    assert matrix["labels"][-1] == "(none)" if page["ner"] else matrix["labels"][0] == "None"

    metrics = json.loads((runs[name] / f"metrics-{split}.json").read_text())
    main = metrics["entity" if page["ner"] else "relation"]
    assert sum(n for (a, b), n in pairs.items() if a == b != "None") == main["correct"]
    first, second, types = page["tables"]
    baseline = metrics["baseline"]
    assert first["rows"][0] == [f"baseline: always {baseline['label']}", "", "", f"{baseline['main_f1']:.4f}",
                                "", "", ""]  # fmt: skip
    assert first["rows"][1][1:] == (
        [f"{main[key]:.4f}" for key in ("precision", "recall", "f1", "macro_f1")]
        + [str(main["gold"]), str(main["predicted"])]
    )
    assert [row[1] for row in second["rows"]] == [
        f"{baseline['accuracy']:.4f}",
        f"{metrics['token' if page['ner'] else 'row']['accuracy']:.4f}",
    ]
    assert {row[0]: row[3] for row in types["rows"]} == {
        kind: f"{s['f1']:.4f}" for kind, s in main["types"].items()
    }
    assert set(metrics["warnings"]) <= set(page["warnings"])
    assert page["log"] == [json.loads(line) for line in (runs[name] / "log.jsonl").read_text().splitlines()]
    assert ("wrong boundary" in page["kinds"]) == page["ner"]
    assert all("maps" in post for post in posts.values()) if name in WITH_MAPS else "maps" not in str(posts)
    assert len(page["photos"]) == len({record["image_id"] for record in records})  # shared ones once
    if name not in WITH_NOTES:
        assert page["facts"]["Notes"] == "not used" and not any("said" in post for post in posts.values())


@pytest.mark.parametrize("name", WITH_MAPS)
def test_maps_are_what_a_word_weighs(runs, tmp_path, name, data_dir):
    """Against each post alone, unpadded, with its own example from the data set and the note on its photo."""
    page, (split, _) = page_of(runs[name], tmp_path / "page.html"), predictions(runs[name])
    posts = {post["id"]: post for post in page["posts"]}
    model, tokenizer, config = load_run(runs[name])
    cache = FeatureCache(config["features"])
    examples = load_dataset(config["dataset"], data_dir).examples[split]
    rows, _ = encode(tokenizer, examples, config["labels"], config["max_len"])
    if name in WITH_NOTES:
        notes = read_notes(config["notes"])
        segments = Segments(tokenizer, config["extra"], config["extra_len"])
        rows = [segments(row, notes.get(e.image_id, {})) for row, e in zip(rows, examples, strict=True)]
        assert 0 < sum("text_length" in row for row in rows) < len(rows)
    for example, row in zip(examples, rows, strict=True):
        maps = posts[example.id]["maps"]
        height, width = cache.grid[cache.rows[example.image_id]].tolist()
        with torch.inference_mode():
            weights = model(collate([row], 0) | cache.read([example.image_id]), return_weights=True).weights
        starts = row["word_starts"] if "word_starts" in row else [row["head_index"], row["tail_index"]]
        values = np.frombuffer(base64.b64decode(maps["bytes"]), np.uint8).reshape(len(starts), height, width)
        assert (maps["rows"], maps["columns"]) == (height, width)  # small grids are not averaged
        for k, start in enumerate(starts):
            real = weights[0, start, : cache.num_regions[cache.rows[example.image_id]]].numpy() * (start >= 0)
            before, places = np.split(real, [len(real) - height * width])
            places = places.reshape(height, width)
            assert np.allclose([maps["places"][k], maps["whole"][k]], [places.sum(), before.sum()], atol=1e-3)
            assert np.allclose(values[k] / 255 * places.max(), places, atol=places.max() / 255)
        if name == "blip":
            assert max(maps["whole"]) > 0 and np.allclose(np.add(maps["places"], maps["whole"]), 1, atol=2e-3)
        assert name != "vilt" or max(maps["places"]) < 1


@pytest.mark.parametrize("name", sorted({*WITH_MAPS} & {*WITH_NOTES}))
def test_attention_is_looked_at_in_the_rows_that_the_run_answered(runs, tmp_path, name, monkeypatch):
    """With second segments: those change the tiny models' attention too little for `test_maps` to see."""
    looked_at = []

    def look(rows, *more):
        looked_at.extend(rows)
        return collate(rows, *more)

    monkeypatch.setattr("parts.posts.collate", look)
    page_of(runs[name], tmp_path / "page.html")
    split, records = predictions(runs[name])
    posts = opening.open_run(runs[name], split, "cpu")[-1]
    answered = [posts.shown(i)[1] for i in range(len(posts))]
    assert ["text_length" in row for row in answered] == [record["extra"] for record in records]
    kept = ("input_ids", "text_length", "word_starts", "head_index", "tail_index")
    looked_at, answered = (sorted([row.get(key) for key in kept] for row in side)
                           for side in (looked_at, answered))  # fmt: skip
    assert looked_at == answered


def test_fine_grids_are_averaged_down():
    weights = torch.zeros(2, 1 + 24 * 24)
    weights[:, 0] = 0.25  # the class token
    weights[0, 1 + 24 * 5 + 7] = 0.75  # row 5, column 7 -> row 2, column 3 of 12 x 12
    weights[1, 1:] = 0.75 / 576
    maps, places, whole = place_maps(weights, [24, 24])
    assert maps.shape == (2, 12, 12) and maps.dtype == torch.uint8
    assert maps[0, 2, 3] == 255 == maps[0].sum() and (maps[1] == 255).all()
    assert torch.allclose(places, torch.tensor(0.75)) and torch.allclose(whole, torch.tensor(0.25))
    assert place_maps(torch.rand(1, 240), [12, 20])[0].shape == (1, 12, 20)  # ViLT's largest
    assert place_maps(torch.rand(1, 1 + 25 * 31), [25, 31])[0].shape == (1, 13, 16)
    assert not place_maps(torch.zeros(1, 9), [3, 3])[0].any()


# ------------------------------------------------------------------------------------------------------ notes


@pytest.mark.parametrize("name", WITH_NOTES)
def test_what_the_run_read_of_notes_is_shown_with_the_post(runs, tmp_path, name, capsys):
    page, (_, records) = page_of(runs[name], tmp_path / "page.html"), predictions(runs[name])
    config = json.loads((runs[name] / "config.json").read_text())
    posts = {post["id"]: post for post in page["posts"]}
    tokenizer, notes = load_tokenizer(runs[name] / "encoder"), read_notes(config["notes"])
    cut = 0
    for record in records:
        note, post = notes.get(record["image_id"], {}), posts[record["id"]]
        texts = {key: note.get(key, "").strip() for key in EXTRAS[config["extra"]]}
        said = {key: text for key, text in texts.items() if text}
        assert ("said" in post) == record["extra"] == bool(said) and post.get("said", {}) == said
        length = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said.values())
        length += len(said) == 2  # a separator between them
        assert post.get("cut", False) == (length > config["extra_len"])
        cut += post.get("cut", False)
    assert (cut > 0) == (name == "notes")
    given = sum(record["extra"] for record in records)
    assert 0 < given < len(records)
    unit = "posts" if page["ner"] else "rows"
    assert page["facts"]["Notes"] == (
        f"{name}.jsonl ({config['notes_sha256'][:16]}), --extra {config['extra']}:"
        f" {given} of {len(records)} {unit} with a note, {len(records) - given} without"
    )
    assert f"decoder {'crf' if name == 'notes' else 'softmax'}," in page["facts"]["System"]
    assert page["said"] == {"about_post": "Said of the post", "about_photo": "Said of the photo"}
    assert f" {given} with notes;" in capsys.readouterr().out


@pytest.mark.parametrize("name", WITH_NOTES)
def test_notes_that_are_not_here_are_said_and_moved_ones_found(runs, tmp_path, name):
    output, there = tmp_path / "page.html", runs[name].with_suffix(".jsonl")
    whole = page_of(runs[name], output)
    moved = copy_whole(runs[name], tmp_path / name, notes="gone.jsonl")
    page, nor = page_of(moved, output), ", nor attention" if name in WITH_MAPS else ""
    why = "no notes file gone.jsonl; make it with write_notes.py, or name another with --notes."
    assert f"Notes not shown{nor}: {why}" in page["warnings"]
    assert not any({"said", "maps"} & post.keys() for post in page["posts"])
    assert page["facts"]["Notes"] == whole["facts"]["Notes"].replace(f"{name}.jsonl", "gone.jsonl")
    assert page["tables"] == whole["tables"] and page["photos"] == whole["photos"]
    found = page_of(moved, output, "--notes", there)
    assert found == whole | {"facts": page["facts"], "title": page["title"]}
    output.unlink()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(there.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no notes file .*absent"):
        page_of(moved, output, "--notes", tmp_path / "absent")
    with pytest.raises(ValueError, match="changed.jsonl: not the notes the run was trained .*; restore them"):
        page_of(moved, output, "--notes", changed)
    assert not output.exists()


def test_a_run_on_notes_of_others_shows_those(runs, tmp_path):
    plain = page_of(runs["notes"], tmp_path / "plain.html")
    page = page_of(copy_whole(runs["notes"], tmp_path / "run", shuffle_notes=True), tmp_path / "page.html")
    own, other = ({post["id"]: post.get("said", {}) for post in side["posts"]} for side in (plain, page))
    assert {i: said.keys() for i, said in own.items()} == {i: said.keys() for i, said in other.items()}
    named = [i for i in own if "about_post" in own[i]]
    assert len(named) == 4 and all(own[i]["about_post"] != other[i]["about_post"] for i in named)
    assert sorted(own[i]["about_post"] for i in named) == sorted(other[i]["about_post"] for i in named)
    assert all(own[i].get("about_photo") == other[i].get("about_photo") for i in own)
    assert page["said"] == {"about_post": "Said of another post", "about_photo": "Said of the photo"}
    shuffled = "; SHUFFLED: each post was given what was said of another"
    assert page["facts"]["Notes"] == plain["facts"]["Notes"] + shuffled
    assert any("what was said of other posts (--shuffle-notes)" in warning for warning in page["warnings"])


def test_a_run_on_shuffled_photos_shows_nothing_said_of_them(runs, tmp_path):
    page = page_of(copy_whole(runs["notes"], tmp_path / "run", shuffle_photos=True), tmp_path / "page.html")
    notes = read_notes(runs["notes"].with_suffix(".jsonl"))
    for post in page["posts"]:
        note = notes.get(post["photo"], {})
        alone = note.get("about_post", "").strip() if not note.get("with_photo") else ""
        assert post.get("said", {}) == ({"about_post": alone} if alone else {}) and "maps" not in post
    assert sum("said" in post for post in page["posts"]) == 2
    said = "so there is no attention to show, and of notes nothing that was written with a photo in view."
    assert any(warning.endswith(said) for warning in page["warnings"])


# ----------------------------------------------------------------------------------------------------- photos


def test_thumbnails(tmp_path):
    turned = Image.new("RGB", (600, 300), "red")
    turned.paste("blue", (0, 0, 300, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right: the left half is the upper one
    turned.save(tmp_path / "a.jpg", exif=exif, comment=b"my street", icc_profile=b"my monitor")
    photo = thumbnail(tmp_path / "a.jpg")
    photo.save(buffer := io.BytesIO(), "JPEG")
    assert b"my " not in buffer.getvalue() and not photo.getexif()
    assert (photo.size == (120, 240) and photo.getpixel((60, 40))[2] > 200
            and photo.getpixel((60, 200))[0] > 200)  # fmt: skip
    Image.new("RGBA", (50, 30), (0, 255, 0, 0)).save(tmp_path / "b.png")
    assert thumbnail(tmp_path / "b.png").size == (50, 30)  # small ones are not blown up
    Image.fromarray(np.full((40, 40), 128 * 256, np.uint16)).save(tmp_path / "c.png")
    assert thumbnail(tmp_path / "c.png").getpixel((9, 9)) == (128, 128, 128)


def test_photos_that_are_not_here_are_said_and_counted(runs, tmp_path, data_dir, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("test_0001", "test_0002"):
        (images / f"{name}.jpg").write_bytes((data_dir / "demo" / "images" / f"{name}.jpg").read_bytes())
    (images / "test_0003.jpg").write_bytes(b"no picture")
    (images / "test_0004.txt").touch()
    page = page_of(runs["cross-attention"], tmp_path / "page.html", "--images", images)
    assert "8 photos, 5 missing, 1 unreadable;" in capsys.readouterr().out
    assert "5 missing and 1 unreadable of 8 photos: their posts say 'no photo here'." in page["warnings"]
    assert page["photos"]["test_0000"] == "no such file"
    assert page["photos"]["test_0004"] == "no such file; 'test_0004.txt' lies there"
    assert page["photos"]["test_0003"] == "cannot be read (UnidentifiedImageError)"
    shown = {post["photo"] for post in page["posts"] if "maps" in post}
    assert shown == {"test_0001", "test_0002"} == {
        i for i, photo in page["photos"].items() if isinstance(photo, list)
    }
    page = page_of(runs["film"], tmp_path / "page.html", "--data-dir", tmp_path)
    assert set(page["photos"].values()) == {"no such file"}
    assert any(warning.startswith("Photos not shown: no image folder") for warning in page["warnings"])
    with pytest.raises(FileNotFoundError, match="no image folder .*absent"):
        page_of(runs["film"], tmp_path / "page.html", "--images", tmp_path / "absent")


# --------------------------------------------------------------------------------------------------- the file


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_posts_are_data_and_nothing_is_fetched(runs, tmp_path):
    _, records = predictions(runs["film"])
    outside = ["O"] * len(HOSTILE)
    hostile = {"id": HOSTILE[0], "image_id": HOSTILE[1], "words": HOSTILE, "gold": outside,
               "predicted": outside}  # fmt: skip
    plain = page_of(copy_run(runs["film"], tmp_path / "plain", records), tmp_path / "plain.html")
    page = page_of(copy_run(runs["film"], tmp_path / "hostile", [*records, hostile]),
                   tmp_path / "hostile.html")  # fmt: skip
    post = next(post for post in page["posts"] if post["words"] == HOSTILE)
    assert (post["id"], post["photo"]) == tuple(HOSTILE[:2]) and len(plain["posts"]) + 1 == len(page["posts"])
    found = []
    noted = page_of(runs["notes"], tmp_path / "notes.html")
    said = "".join(text for post in noted["posts"] for text in post.get("said", {}).values())
    assert all(mark in said for mark in HOSTILE)
    for name in ("plain", "notes", "hostile"):
        parser, text = Tags(), (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        parser.feed(text)
        found.append(parser.found)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)",
                             text.replace(json.dumps(page["posts"]), ""))  # fmt: skip
    assert found[0] == found[1] == found[2]  # no tag more
    scripts = [attrs for tag, attrs in found[0] if tag == "script"]
    assert sum(attrs.get("type") != "text/plain" for attrs in scripts) == 2  # the others are photos
    for _, attrs in found[0]:
        for name in ("src", "href"):
            assert re.match(r"#|data:", attrs.get(name, "#"))
    policy = next(attrs["content"] for _, attrs in found[0] if "http-equiv" in attrs)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_where_it_is_written(runs, tmp_path):
    report.main(["--run", str(runs["film"]), "--split", "valid"])
    report.main(["--run", str(runs["film"])])
    valid, test = (embedded(runs["film"] / f"report-{split}.html") for split in ("valid", "test"))
    assert valid["posts"][0]["id"].startswith("valid") and test["posts"][0]["id"].startswith("test")


def test_of_several_runs_the_best_on_valid_is_shown(runs, tmp_path, capsys):
    _, records = predictions(runs["film"])
    shown = []
    for name, score_on_valid, changed in (
        ("low", 0.25, {}), ("high", 0.75, {}), ("control", 1.0, {"shuffle_photos": True})
    ):
        shown.append(copy_run(runs["film"], tmp_path / name, records))
        config = json.loads((runs["film"] / "config.json").read_text()) | changed
        write_json(shown[-1] / "config.json", config)
        line = json.loads(LINE) | {"valid_main_f1": score_on_valid}
        write_json_lines(shown[-1] / "log.jsonl", [line, line | {"epoch": 2, "valid_main_f1": 0}])
    output = report.main(["--run", *map(str, shown)])
    assert output == tmp_path / "high" / "report-test.html" and embedded(output)["title"] == "high, test"
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'high'}: the best on valid of 2 runs\n")


def test_scores_that_are_there_are_shown(runs, tmp_path):
    """The image check where it was made, scores of seen and unseen mentions where predictions tell them."""
    _, records = predictions(runs["film"])
    folder, metrics = copy_run(runs["film"], tmp_path / "run", records), score(records)
    assert "Image check" not in page_of(folder, tmp_path / "page.html")["facts"]
    shuffled = [metrics | {"entity": {"f1": f1}} for f1 in (0.25, 0.75)]
    check = {"photos": 8, "true": metrics, "shuffled": shuffled, "none": metrics | {"entity": {"f1": 0.125}}}
    write_json(folder / "image-check-test.json", check)
    with pytest.raises(ValueError, match="image-check-test.json: not what evaluate.py --image-check writes"):
        page_of(folder, tmp_path / "page.html")
    check["bootstrap"] = {"difference": 0.25, "low": 0.125, "high": 0.375}
    write_json(folder / "image-check-test.json", check)
    said = page_of(folder, tmp_path / "page.html")["facts"]["Image check"]
    own = f"{metrics['entity']['f1']:.3f} with each post's own photo"
    assert f"{own}, 0.500 ± 0.354 with another's (n = 2), 0.125 with none; true - shuffled +0.250" in said
    assert said.endswith("95% interval +0.125 to +0.375: depends on its photos")
    plain = {key: value for key, value in metrics.items() if key not in ("entity_seen", "entity_unseen")}
    more = plain | {"entity_seen": metrics["entity"] | {"f1": 0.0625}, "entity_unseen": metrics["entity"]}
    names = [[row[0] for row in score_tables(m)[0]["rows"]] for m in (plain, more)]
    assert names[1] == [*names[0], "mentions seen in train", "mentions not seen in train"]
    assert score_tables(more)[0]["rows"][-2][3] == "0.0625"


def test_one_answer_for_all_is_called_out(runs, tmp_path):
    _, records = predictions(runs["film"])
    records = [record | {"predicted": ["O"] * len(record["gold"]), "photo": False} for record in records]
    warnings = page_of(copy_run(runs["film"], tmp_path / "run", records), tmp_path / "page.html")["warnings"]
    assert "the accuracy measures the data set, not the model" in warnings[0]
    assert "8 posts were answered without a photo" in warnings[1]


def test_what_cannot_be_shown_is_one_clear_line(runs, tmp_path, cache_dir):
    run, output = runs["cross-attention"], tmp_path / "page.html"
    other = copy_run(run, tmp_path / "other", predictions(run)[1])
    config = json.loads((run / "config.json").read_text())
    write_json(other / "config.json", config | {"features_made": config["features_made"] | {"sha256": "0"}})
    for folder, more, message in (
        (tmp_path, [], "no config.json, so no run of train.py"),
        (runs["mnre"], ["--split", "test"], "predictions-test.jsonl: not there"),
        (run, ["--features", tmp_path / "absent.h5"], "no feature file"),
        (run, ["--features", cache_dir / "mnre-resnet50-64.h5"], "no row for .*; it was made for mnre"),
        (other, [], "not the features .*other was trained on; restore them"),
        (run, ["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (run, ["--notes", runs["notes"].with_suffix(".jsonl")], "--notes .*: the run read none; leave"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            page_of(folder, output, *more)
        assert "\n" not in str(error.value)
    assert not output.exists()


@pytest.mark.parametrize("content", ["{}", "<!doctype html><title>Report</title>", ""])
def test_only_a_page_of_ours_is_replaced(runs, tmp_path, content):
    output = tmp_path / "page.html"
    output.write_text(content)
    with pytest.raises(ValueError, match=f"{output}: .*; name another --output$"):
        page_of(runs["film"], output)
    assert output.read_text() == content
    output.unlink()
    assert page_of(runs["film"], output) == page_of(runs["film"], output)


def test_a_page_that_cannot_be_stored_is_one_line(runs, tmp_path, monkeypatch):
    def refused(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{path}.tmp")

    monkeypatch.setattr(report, "replacing", refused)  # as in a folder of a colleague's
    output = tmp_path / "page.html"
    with pytest.raises(OSError) as error:
        page_of(runs["film"], output)
    reason = "the page cannot be stored there (Read-only file system); name another place with --output"
    assert str(error.value) == f"{output}: {reason}"


@pytest.mark.parametrize("name", ["clip-bert", "notes"])
def test_a_part_of_the_posts_is_those_with_most_errors(runs, tmp_path, name):
    """They are shown as the whole page shows them; scores and confusions stay those of all."""
    whole, part = (page_of(runs[name], tmp_path / "page.html", "--posts", n) for n in ("all", 3))
    _, records = predictions(runs[name])
    assert part["posts"] == whole["posts"][:3] and len(whole["posts"]) == len(records) == 8
    errors = [sum(span[4] != "correct" for span in post["spans"]) for post in whole["posts"]]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    assert part["confusion"] == whole["confusion"] and part["tables"] == whole["tables"]
    assert ("5 are left out (--posts all shows them)" in part["facts"]["Shown"]
            and "Shown" not in whole["facts"])  # fmt: skip
    assert part["photos"] == {post["photo"]: whole["photos"][post["photo"]] for post in part["posts"]}
    assert page_of(runs[name], tmp_path / "page.html") == whole  # 1,000 by default
    with pytest.raises(SystemExit):
        page_of(runs[name], tmp_path / "page.html", "--posts", 0)


LINE = '{"epoch": 1, "loss": 0.5, "valid_main_f1": 0, "valid_accuracy": 0.5, "best_epoch": 1}\n'


@pytest.mark.parametrize("name, content", [
    ("log.jsonl", ""), ("log.jsonl", "{"), ("log.jsonl", "[]\n"), ("log.jsonl", "[" * 200_000),
    ("log.jsonl", '{"epoch": 1}\n'), ("log.jsonl", LINE.replace("0.5", "NaN")),
    ("log.jsonl", LINE.replace("0.5", '"0.5"')), ("log.jsonl", LINE.replace(": 1}", ": 0}")),
    ("image-check-test.json", "{"), ("image-check-test.json", "[]"), ("image-check-test.json", "[" * 200_000),
    ("image-check-test.json", '{"true": {"task": "ner", "entity": {"f1": 1e400}}}'),
])  # fmt: skip
def test_a_strangers_log_and_check_are_looked_at(runs, tmp_path, name, content):
    folder = copy_run(runs["film"], tmp_path / "run", predictions(runs["film"])[1])
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*(restore it|run that again)"):
        page_of(folder, tmp_path / "page.html")


def test_a_run_shows_no_pictures_of_a_folder_that_it_merely_names(runs, tmp_path, data_dir):
    """A stranger's configuration may name any folder here; a page with its pictures might be sent back."""
    _, records = predictions(runs["film"])
    folder = copy_run(runs["film"], tmp_path / "run", records)
    private = tmp_path / "private"
    shutil.copytree(data_dir / "demo", private)
    (private / "test.txt").write_text("IMGID:test_0000\nmine\tO\n\n")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"dataset": str(private)})
    page = page_of(folder, tmp_path / "page.html")
    assert not any(isinstance(photo, list) for photo in page["photos"].values())
    assert any("has not the posts of this run" in line for line in page["warnings"])
    shown = page_of(folder, tmp_path / "page.html", "--images", str(private / "images"))["photos"]
    assert any(isinstance(photo, list) for photo in shown.values())
