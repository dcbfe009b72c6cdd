"""Boxes: their file, and regions of them against crops that are extracted as photos of their own."""

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_extract_features import stop_after
from test_report import embedded

import evaluate
import features
import report
import train
from encoding import collate, encode
from extract_features import main
from features import MISSING, FeatureCache
from parts.boxes import LABEL_WIDTH, MOST, Boxes, check_boxes, clip
from parts.datasets import load_dataset
from parts.files import read_by_id, write_json_lines
from parts.run_files import load_run
from parts.scores import read_predictions
from predict import Predictor, main as predict

FRAME = [10, 20, 60, 50]


@pytest.mark.parametrize("line, reason", [
    ("{", "not JSON"), ("[]", "not a JSON object with 'image'"), ('{"boxes": []}', "with 'image'"),
    ('{"image": "a"}', "boxes is not a list"), ('{"image": "a", "boxes": 1}', "boxes is not a list"),
    ('{"image": "a", "boxes": [[1, 2, 3]]}', "is not a box"),
    ('{"image": "a", "boxes": [[1, 2, 3, "4"]]}', "is not a box"),
    ('{"image": "a", "boxes": [[1, 2, 3, true]]}', "is not a box"),
    ('{"image": "a", "boxes": [[1, 2, 3, NaN]]}', "is not a box"),
    ('{"image": "a", "boxes": [[1, 2, 3, 1e999]]}', "is not a box"),
    ('{"image": "a", "boxes": [[9, 2, 3, 4]]}', "not x, y, width, height"),
    ('{"image": "a", "boxes": [[0.1, 0.2, 0.9, 1]]}', "shares of the photo"),
    ('{"image": "a", "boxes": [[1, 2, 3, 4]], "labels": []}', "labels is not a list with text for each of"),
    ('{"image": "a", "boxes": [[1, 2, 3, 4]], "labels": [7]}', "labels is not"),
    ('{"image": "a", "boxes": [[1, 2, 3, 4]], "scores": ["7"]}', "scores is not a list with a number"),
    ('{"image": "b", "boxes": []}', "a second line for b; keep one"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, reason):
    path = tmp_path / "boxes.jsonl"
    path.write_text(f'{{"image": "b", "boxes": []}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"boxes.jsonl:3: .*{reason}"):
        read_by_id(path, "image", check_boxes)


def test_the_best_scores_are_kept_in_their_order():
    rng = np.random.default_rng(0)
    corners = [[0, 0, 10 + i, 10] for i in range(MOST + 5)]
    scores = rng.permutation(len(corners)).tolist()
    best = sorted(zip(scores, corners, strict=True), reverse=True)[:MOST]
    entry = {"boxes": corners, "scores": scores, "labels": [str(box) for box in corners], "more": 1}
    boxes = check_boxes(entry)
    assert boxes.corners == tuple(tuple(box) for _, box in best) and boxes.left_out == 5
    assert boxes.labels == tuple(str(box) for _, box in best)
    unscored = check_boxes({"boxes": corners})
    assert unscored.corners == tuple(map(tuple, corners[:MOST])) and unscored.labels == ("",) * MOST
    assert check_boxes({"boxes": []}) == Boxes((), ())


@pytest.mark.parametrize("box, kept, cut", [
    ((10, 20, 60, 50), (10, 20, 60, 50), 0), ((10.4, 20.6, 59.1, 49.9), (10, 20, 60, 50), 0),
    ((-0.5, -0.5, 100.5, 80.5), (0, 0, 100, 80), 0), ((-9, 5, 20, 20), (0, 5, 20, 20), 1),
    ((90, 5, 120, 20), (90, 5, 100, 20), 1), ((5, 70, 20, 200), (5, 70, 20, 80), 1),
    ((200, 5, 220, 20), None, 0), ((-20, -20, -5, -5), None, 0), ((5, 5, 5, 20), None, 0),
    ((0, 5, 100, 6), None, 0), ((0, 5, 99, 6), (0, 5, 99, 6), 0),
])  # fmt: skip
def test_boxes_end_where_their_photo_does(box, kept, cut):
    corners, labels, reason = clip(Boxes((box,), ("x",)), 100, 80)
    assert (corners, labels) == (([kept], ["x"]) if kept else ([], []))
    empty = int(kept is None)
    assert reason == (f"of its boxes {cut} cut to the photo, {empty} empty" if cut or empty else "")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a data set of six photos, sizes between 70 and 130, and their boxes.jsonl.

    a has 3 boxes, b is turned by its EXIF data and has one, c has 20, d none, e is missing, and f's reach
    out of it or are empty.
    """
    folder, rng = tmp_path_factory.mktemp("boxes") / "posts", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split in ("train", "valid"):
        posts = "".join(f"IMGID:{name}\nBBC\tB-ORG\nso\tO\n\n" for name in "abcdef")
        (folder / f"{split}.txt").write_text(posts)
    for name in "abcdf":
        pixels = rng.integers(0, 255, (int(rng.integers(7, 13)), int(rng.integers(7, 13)), 3), np.uint8)
        photo = Image.fromarray(pixels).resize((10 * pixels.shape[1], 10 * pixels.shape[0]))
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "b" else 1
        photo.save(folder / "images" / f"{name}.png", exif=exif)
    corners = rng.uniform(0, 40, (20, 2, 2)).cumsum(1).reshape(20, 4).tolist()
    write_json_lines(folder / "boxes.jsonl", [
        {"image": "a", "boxes": [[0, 0, 30, 30], FRAME, [5.5, 5.5, 40, 60]], "scores": [0.1, 0.9, 0.5],
         "labels": ["person", "é" * 30, ""]},
        {"image": "b.png", "boxes": [FRAME]},
        {"image": "c", "boxes": corners},
        {"image": "f", "boxes": [[-50, -50, 30, 30], [500, 500, 600, 600], FRAME]},
        {"image": "of no post", "boxes": [FRAME]},
    ])  # fmt: skip
    return folder


@pytest.fixture
def extract(places, tmp_path):
    """Extract the data set's boxes into tmp_path, two views of each; more arguments override."""

    def run(*args, boxes="boxes.jsonl"):
        fixed = ["--dataset", places, "--cache-dir", tmp_path, "--weights", "random", "--img-size", 64,
                 "--views", 2, "--workers", 0, "--boxes", places / boxes]  # fmt: skip
        return main([str(arg) for arg in [*fixed, *args]])

    return run


def upright(path):
    """The photo as Pillow turns it: 6 is a quarter to the right."""
    photo = Image.open(path)
    return photo.transpose(Image.Transpose.ROTATE_270) if path.stem == "b" else photo


@pytest.mark.parametrize("backbone, whole", [("resnet50", 0), ("clip", 0), ("blip", 1), ("auto", 1)])
def test_a_region_is_the_mean_of_the_places_of_its_crop(extract, places, data_dir, tmp_path, backbone, whole):
    """Each crop, cut here and extracted as a photo, without boxes; `whole`: regions that are no places."""
    flags = ["--views", 1]
    if backbone != "resnet50":
        weights = data_dir / "demo" / ("clip" if backbone == "auto" else backbone)
        flags += ["--backbone", backbone, "--weights", weights, "--img-size", 96]
    cache = FeatureCache(extract(*flags))
    crops = tmp_path / "crops"
    (crops / "images").mkdir(parents=True)
    for name, row in cache.rows.items():
        for i in range(cache.num_regions[row]):
            photo = upright(places / "images" / f"{name}.png")
            box = np.rint(cache.boxes[0][row, i] * (photo.size * 2)).astype(int).tolist()
            photo.crop(box).save(crops / "images" / f"{name}{i}.png")
    ids = sorted(path.stem for path in (crops / "images").iterdir())
    for split in ("train", "valid"):
        (crops / f"{split}.txt").write_text("".join(f"IMGID:{name}\nso\tO\n\n" for name in ids))
    fixed = ["--dataset", crops, "--cache-dir", tmp_path / "of crops", "--weights", "random", "--img-size",
             64, "--workers", 0, *flags]  # fmt: skip
    alone = FeatureCache(main([str(arg) for arg in fixed]))
    assert len(ids) == 4 + 2 + (1 + MOST) + 1 + 3 and cache.shape == (6, 1, 1 + MOST, alone.region_dim)
    for name in ids:
        region = cache.regions[cache.rows[name[0]], 0, int(name[1:])]
        mean = alone.regions[alone.rows[name], 0, whole:].astype(np.float32).mean(0)
        np.testing.assert_allclose(region, mean, rtol=2**-8, atol=1e-3 * float(abs(mean).max()))


def test_what_the_file_says_of_its_boxes(extract, places, capsys):
    path = extract("--views", 1)
    out, cache = capsys.readouterr().out, FeatureCache(path)
    assert path.name == "posts-resnet50-64-boxes.h5"
    assert "boxes.jsonl: 23 boxes of 4 photos; 2 photos have none, and one region, the whole" in out
    assert "; 4 boxes left out, over the best 16 of their photo" in out
    assert "ok, but: f (of its boxes 1 cut to the photo, 1 empty)" in out
    assert "22 boxes of 4 photos: 1 reached out of theirs and were cut, 1 more were empty" in out
    assert cache.num_regions.tolist() == [4, 2, 17, 1, 0, 3] and cache.status[4] == MISSING
    assert not cache.grid.any() and cache.read(["c", "a"])["region_mask"].sum(1).tolist() == [17, 4]
    boxes, labels = cache.boxes
    width, height = Image.open(places / "images" / "a.png").size
    np.testing.assert_allclose(boxes[0, :2], [[0, 0, 1, 1], np.divide(FRAME, [width, height] * 2)], rtol=1e-6)
    long = ("é" * (LABEL_WIDTH // 2)).encode()
    assert labels[0, :5].tolist() == [b"whole photo", long, b"", b"person", b""]
    height, width = Image.open(places / "images" / "b.png").size  # turned
    np.testing.assert_allclose(boxes[1, 1], np.divide(FRAME, [width, height] * 2), rtol=1e-6)
    assert extract("--views", 1) == path and "22 boxes" in capsys.readouterr().out  # of a finished file, too
    extract("--views", 1, "--verify")


def test_regions_stay_with_their_boxes_whatever_the_order(extract, places):
    """In all views: what is random in one depends on the box, not on its number."""
    first = FeatureCache(extract())
    lines = [json.loads(line) for line in (places / "boxes.jsonl").read_text().splitlines()[:2]]
    lines[0] = {"image": "a", "boxes": lines[0]["boxes"][::-1], "scores": [0.1, 0.5, 0.9]}
    write_json_lines(places / "turned.jsonl", lines)
    turned = FeatureCache(extract("--overwrite", boxes="turned.jsonl"))
    assert turned.boxes[0][0, :4].tolist() == first.boxes[0][0, [0, 3, 1, 2]].tolist()
    np.testing.assert_array_equal(turned.regions[0, :, :4], first.regions[0][:, [0, 3, 1, 2]])
    assert not np.array_equal(first.regions[0, 0], first.regions[0, 1])


def test_interrupted_extraction_ends_in_the_same_bytes(extract, places, monkeypatch):
    whole = (path := extract()).read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        extract()
    assert not path.exists()
    write_json_lines(places / "other.jsonl", [{"image": "a", "boxes": [FRAME]}])
    with pytest.raises(ValueError, match="made with other settings: boxes_sha256"):
        extract(boxes="other.jsonl")
    assert extract("--batch-size", 100, "--workers", 1).read_bytes() == whole


def test_boxes_of_other_photos_and_backbones_without_pictures_are_refused(extract, places, capsys):
    write_json_lines(places / "none.jsonl", [{"image": "x", "boxes": [FRAME]}, {"image": "a", "boxes": []}])
    with pytest.raises(ValueError, match="none.jsonl: boxes of none of the 6 photos .first image: x."):
        extract(boxes="none.jsonl")
    with pytest.raises(SystemExit):
        extract("--backbone", "pixels")
    assert "--boxes: --backbone pixels makes no region of a picture" in capsys.readouterr().err


def test_a_change_of_a_box_or_label_is_found(extract, monkeypatch):
    """And a box that is no part of a photo, whatever its checksum."""
    cache = FeatureCache(extract("--limit", 1, "--views", 1))
    for column, value in zip(cache.boxes, (0.5, b"cat"), strict=True):
        before = column[0, 1].copy()
        column[0, 1] = value
        assert not cache.whole(0)
        column[0, 1] = before
        assert cache.whole(0)
    monkeypatch.setattr(features, "row_crc32", lambda *_: cache.crc32[0].tolist())
    for value in (np.nan, np.inf, -0.1, 1.5):
        assert cache.whole(0)
        before, cache.boxes[0][0, 1, 2] = cache.boxes[0][0, 1, 2], value
        assert not cache.whole(0)
        cache.boxes[0][0, 1, 2] = before


@pytest.fixture(scope="module")
def run(places, encoder_dir, tmp_path_factory):
    """The folder of a run on boxes: cross-attention, two epochs."""
    folder = tmp_path_factory.mktemp("run")
    fixed = ["--dataset", places, "--seed", 1]
    path = main([str(arg) for arg in [
        *fixed, "--cache-dir", folder, "--weights", "random", "--img-size", 64, "--views", 1, "--workers", 0,
        "--boxes", places / "boxes.jsonl",
    ]])  # fmt: skip
    train.main([str(arg) for arg in [
        *fixed, "--model", "bert-resnet50", "--text-encoder", encoder_dir, "--fusion", "cross-attention",
        "--no-standardise", "--keep", "best", "--features", path, "--epochs", 2, "--fusion-lr", 0.1,
        "--run-dir", folder / "run",
    ]])  # fmt: skip
    return folder / "run"


def test_new_posts_with_boxes_are_answered_as_those_of_the_data_set(run, places, tmp_path, capsys):
    """By their boxes, which may be others' for the same photo; without boxes by the whole photo, and said."""
    boxes = {name: entry for name, entry in lines_by_photo(places / "boxes.jsonl").items() if name in "abcf"}
    records = {record["image_id"]: record for record in read_predictions(run / "predictions-valid.jsonl")}
    posts = [{"words": ["BBC", "so"], "image": f"{name}.png", "id": name} | boxes[name] for name in "abcf"]
    predictor = Predictor(run, "cpu")
    answers = predictor(posts, places / "images")

    def chances(answers):
        return [answer["entities"][-1]["probability"] for answer in answers]

    assert all(records[name]["predicted"] == ["B-ORG", "B-ORG"] for name in "abcf")
    expected = [records[name]["probability"][-1] for name in "abcf"]
    np.testing.assert_allclose(chances(answers), expected, atol=1e-4)
    assert len(set(expected)) == 4
    assert [answer.get("note") for answer in answers] == [
        None, None, None, "f.png: of its boxes 1 cut to the photo, 1 empty",
    ]  # fmt: skip
    opened = [post | {"image": Image.open(places / "images" / post["image"])} for post in posts]
    np.testing.assert_allclose(chances(predictor(opened)), chances(answers), atol=1e-6)

    bare = {"words": ["BBC", "so"], "image": "a.png", "id": 7}
    others = predictor([posts[0], bare, posts[0] | {"boxes": [FRAME] * 3}, bare | {"boxes": [[1, 2]]},
                        bare | {"boxes": []}], places / "images")  # fmt: skip
    assert chances(others[:1]) == pytest.approx(chances(answers[:1]), abs=1e-6)
    assert len({round(p, 6) for p in chances(others[:3])}) == 3
    assert others[1]["note"] == "no boxes given: the whole photo alone was looked at"
    assert others[3]["error"].startswith("[1, 2] is not a box")
    assert "note" not in others[4] and chances(others[4:]) == pytest.approx(chances(others[1:2]), abs=1e-6)

    write_json_lines(tmp_path / "posts.jsonl", [*posts, bare])
    predict(["--run", str(run), "--input", str(tmp_path / "posts.jsonl"), "--output",
             str(tmp_path / "answers.jsonl"), "--images", str(places / "images")])  # fmt: skip
    assert "5 with image, 1 without boxes, the whole photo alone, 2 with a note" in capsys.readouterr().err


def lines_by_photo(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {entry.pop("image").removesuffix(".png"): entry for entry in entries}


def test_layers_that_need_a_grid_refuse_boxes(run, places, encoder_dir):
    path = json.loads((run / "config.json").read_text())["features"]
    assert train.parse_args(["--features", path]).run_dir.endswith("-resnet50-boxes-film-s1337")
    with pytest.raises(ValueError, match="--fusion pyramid: .* are no places in a photo"):
        train.main([str(arg) for arg in ["--dataset", places, "--model", "bert-resnet50", "--text-encoder",
                    encoder_dir, "--fusion", "pyramid", "--features", path]])  # fmt: skip


def test_the_page_draws_the_boxes_with_their_attention(run, places, tmp_path):
    output = str(tmp_path / "page.html")
    page = embedded(report.main(["--run", str(run), "--split", "valid", "--output", output]))
    model, tokenizer, config = load_run(run)
    cache, examples = FeatureCache(config["features"]), load_dataset(str(places)).examples["valid"]
    rows, _ = encode(tokenizer, examples, config["labels"], 128)
    posts = {post["id"]: post for post in page["posts"]}
    assert "maps" not in posts["e"] and "boxes" not in posts["e"]  # its photo is missing
    assert posts["a"]["phrases"] == ["whole photo", "1 " + "é" * 20, "2", "3 person"]
    for name, row in zip("abcdf", [rows["abcdef".index(name)] for name in "abcdf"], strict=True):
        post, count = posts[name], cache.num_regions[cache.rows[name]]
        left, top, width, height = np.array(post["boxes"]).T
        corners = cache.boxes[0][cache.rows[name], :count]
        np.testing.assert_allclose(np.stack((left, top, left + width, top + height), 1), corners, atol=2e-4)
        with torch.inference_mode():
            weights = model(collate([row], 0) | cache.read([name]), return_weights=True).weights
        values = np.frombuffer(base64.b64decode(post["maps"]["bytes"]), np.uint8).reshape(-1, count) / 255
        for k, start in enumerate(row["word_starts"]):
            shares = values[k] / values[k].sum() * post["maps"]["places"][k]
            np.testing.assert_allclose(shares, weights[0, start, :count], atol=5e-3)


def test_the_leak_check_knows_the_number_of_boxes(tmp_path, capsys):
    """More than are looked at, too; boxes that say nothing give nothing away."""
    rng, rows, told, chance = np.random.default_rng(0), {}, [], []
    for split in ("train", "valid"):
        rows[split] = ""
        for i in range(200):
            person = i % 3 == 0
            rows[split] += f"IMGID:{split}{i}\nw\t{'B-PER' if person else 'O'}\n\n"
            for lines, count in ((told, 17 + person), (chance, int(rng.integers(3)))):
                lines.append({"image": f"{split}{i}", "boxes": [FRAME] * count})
        (tmp_path / f"{split}.txt").write_text(rows[split])
    for name, lines in (("told", told), ("chance", chance)):
        write_json_lines(tmp_path / f"{name}.jsonl", lines)
        evaluate.main(["--leak-check", str(tmp_path), "--boxes", str(tmp_path / f"{name}.jsonl")])
        out = capsys.readouterr().out
        warning = "'PER' can be told from the photo's files and boxes without looking at them: AUC 1.000"
        assert (f"WARNING: {warning}, most by number of boxes" in out) == (name == "told")
        assert "0 of 400 photos found" in out and "AUC on valid" in out
