"""A finished run on new posts: words, photos, answers, and files of posts that survive what is in them."""

import fcntl
import importlib
import io
import itertools
import json
import os
import random
import re
import signal
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import PARTS, run as train, system_flags
from forked import Script, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import predict
from data import NONE, NerExample, RelationExample
from encoding import MARKERS, encode
from features import FeatureCache
from parts.datasets import load_dataset
from parts.scores import entity_spans, read_predictions
from parts.text_encoder import load_tokenizer
from parts.words import cut_words
from predict import Predictor, with_post
from parts import new_posts, text_encoder


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(flags, data_dir, tmp_path_factory):
    """A function (system or fusion, data set) -> (run folder, --weights or None), trained on first call."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def get(system="film", dataset="demo"):
        name, weights, more = f"{dataset}-{system}", None, ["--fusion", system]
        if system in PARTS:
            weights, more = str(data_dir / "demo" / PARTS[system][2]), system_flags(system, data_dir)
        if name not in folders:
            folders[name] = train(flags, root / name, "--dataset", dataset, *more, "--max-len", 40,
                                  "--keep", "best")  # fmt: skip
        return folders[name], weights

    return get


@pytest.fixture(scope="session")
def tokenizer(encoder_dir):
    tokenizer = load_tokenizer(encoder_dir)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def film(runs):
    return Predictor(runs()[0])


@pytest.fixture(scope="module")
def clip(runs):
    """A quicker one: the demo's CLIP has two small layers."""
    run, weights = runs("clip-bert")
    return Predictor(run, weights=weights)


def posts_of(data_dir, split="test"):
    """The demo's posts as `predict` takes them."""
    lines = (data_dir / "demo" / "captions.txt").read_text().splitlines()
    captions, images = dict(line.split(" :") for line in lines), data_dir / "demo" / "images"
    posts = []
    for example in load_dataset("demo", data_dir).examples[split]:
        name = f"{example.image_id}.jpg"
        post = {"id": example.id, "words": list(example.words), "image": str(images / name),
                "caption": captions[name]}  # fmt: skip
        posts.append(post)
    return posts


def expected(record):
    """What an answer must say of a record of predictions-test.jsonl."""
    words, probability = record["words"], record["probability"]
    spans = sorted(entity_spans(record["predicted"]), key=lambda span: span[1])
    return [
        {"type": kind, "text": " ".join(words[a:b]), "words": [a, b], "probability": min(probability[a:b])}
        for kind, a, b in spans
    ]


def about(entities):
    return [entity | {"probability": pytest.approx(entity["probability"], abs=1e-4)} for entity in entities]


@pytest.mark.parametrize("system", ["film", "none", *PARTS])
def test_new_posts_get_the_answers_that_training_wrote(runs, data_dir, system):
    run, weights = runs(system)
    answers = Predictor(run, weights=weights)(posts_of(data_dir))
    records = read_predictions(run / "predictions-test.jsonl")
    assert [a["id"] for a in answers] == [r["id"] for r in records] and any(a["entities"] for a in answers)
    for answer, record in zip(answers, records, strict=True):
        assert answer["photo"] is (system != "none") and "note" not in answer
        assert answer["entities"] == about(expected(record))


@pytest.mark.parametrize("system", ["film", *PARTS])
def test_regions_are_those_of_the_feature_file(runs, data_dir, cache_dir, system):
    run, weights = runs(system)
    predictor, posts = Predictor(run, weights=weights), posts_of(data_dir)
    sources = [post[predictor.source] for post in posts]
    cache = FeatureCache(predictor.config["features"])
    there = cache.read([post["id"] for post in posts])
    named = {source: source for source in sources}
    made = predictor.provenance, predictor.backbone, "cpu", predictor.pool
    here = new_posts.NewPhotos(named, *made).read(sources)
    assert all(torch.equal(here[name], there[name]) for name in ("region_mask", "region_grid"))
    assert here["regions"].dtype == there["regions"].dtype and here["regions"].any()
    torch.testing.assert_close(here["regions"], there["regions"], rtol=2e-3, atol=2e-3)


def test_relations_by_words_and_by_characters(runs, data_dir):
    run, weights = runs("clip-bert", "mnre")
    predictor, examples = Predictor(run, weights=weights), load_dataset("mnre", data_dir).examples["valid"]
    posts, typed = [], []
    for e in examples:
        image = str(data_dir / "mnre" / "images" / e.image_id)
        posts.append({"words": list(e.words), "head": list(e.head), "tail": list(e.tail), "image": image})
        starts = [len(" ".join([*e.words[:i], ""])) for i in range(len(e.words))]
        ends = [start + len(word) for start, word in zip(starts, e.words, strict=True)]
        head, tail = ([starts[a], ends[b - 1]] for a, b in (e.head, e.tail))
        typed.append({"text": " ".join(e.words), "image": image, "head": head, "tail": tail})
    for answer, record in zip(
        predictor(posts), read_predictions(run / "predictions-valid.jsonl"), strict=True
    ):
        assert answer == {"id": None, "photo": True, "relation": record["predicted"],
                          "probability": pytest.approx(record["probability"], abs=1e-4)}  # fmt: skip
    assert predictor(typed) == predictor(posts)
    # A span within a word is a word of its own, and spaces do not count.
    inside = new_posts.read_post({"text": "AntiMessi  of  BBC", "head": [4, 10], "tail": [10, 18]},
                                 "relation", "mnre")  # fmt: skip
    assert (inside[0].words == ("Anti", "Messi", "of", "BBC")
            and (inside[0].head, inside[0].tail) == ((1, 2), (2, 4)))  # fmt: skip


def test_entities_of_typed_text_have_their_characters(clip, data_dir):
    for post in posts_of(data_dir):
        text = "  " + " ".join(post["words"]).replace("@ ", "@").replace(" !", "!") + " \n"
        words = [text[start:end] for start, end in cut_words(text, clip.config["word_rule"])]
        answer, by_words = clip([post | {"text": text, "words": None}, post | {"words": words}])
        assert [e["probability"] for e in answer["entities"]] == [
            e["probability"] for e in by_words["entities"]
        ]
        for entity, other in zip(answer["entities"], by_words["entities"], strict=True):
            start, end = entity["chars"]
            assert entity["text"] == text[start:end] and "chars" not in other
            assert words[slice(*entity["words"])] == entity["text"].split()


def test_a_photo_that_cannot_be_read_is_no_photo(film, tmp_path, data_dir):
    """And no picture in its place: all of these are answered exactly as a post that names none."""
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    whole = Path(posts_of(data_dir)[0]["image"])
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    Image.open(whole).save(tmp_path / "png.jpg", "png")
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "grey.jpg")
    words = next(post["words"] for post in posts_of(data_dir)
                 if film([post | {"image": None}])[0]["entities"])  # fmt: skip
    names = ["none.jpg", "text.jpg", "empty.jpg", "folder.jpg", "pipe.jpg", "cut.jpg", "x" * 5000, "a\0b", ""]
    names.append("https://example.org/1.jpg")
    plain, *answers = film([{"words": words}, *({"words": words, "image": name} for name in names)], tmp_path)
    assert plain["photo"] is False and "note" not in plain
    assert "a link, and nothing is downloaded here: download it first" in answers[-1]["note"]
    for name, answer in zip(names, answers, strict=True):
        assert answer.pop("note").startswith(f"{name}: ") and answer["photo"] is False
        assert answer["entities"] == about(plain["entities"])
    images = ("png.jpg", tmp_path / "png.jpg", "grey.jpg")
    good, as_path, grey = film([{"words": words, "image": image} for image in images], tmp_path)
    assert good["photo"] and as_path == good and grey["photo"]
    assert good["entities"] != plain["entities"] != grey["entities"]


def test_photos_come_from_the_root_alone(runs, data_dir, tmp_path):
    """And what is said of another does not tell whether there is one."""
    photo = Path(posts_of(data_dir)[0]["image"]).read_bytes()
    root = tmp_path / "root"
    for name in ("root/sub/in.jpg", "out/out.jpg", "rootless/out.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(photo)
    (root / "link.jpg").symlink_to("sub/in.jpg")
    (root / "away.jpg").symlink_to(tmp_path / "out" / "out.jpg")
    (root / "lost.jpg").symlink_to(tmp_path / "out" / "none.jpg")
    (root / "far").symlink_to(tmp_path / "out")
    (tmp_path / "alias").symlink_to(root)
    predictor = Predictor(runs()[0], "cpu", root=tmp_path / "alias")
    post = {"text": "Jordan today"}
    inner = ["sub/in.jpg", "link.jpg", "sub/../sub/in.jpg", str(root / "sub/in.jpg"), root / "sub/in.jpg"]
    assert all(answer["photo"] for answer in predictor([post | {"image": name} for name in inner]))
    outer = [
        "../out/out.jpg", "../out/none.jpg", "../rootless/out.jpg", "sub/../../out/out.jpg", "away.jpg",
        "lost.jpg", "far/out.jpg", "far/none.jpg", str(tmp_path / "out/out.jpg"), "/etc/passwd", "/none",
        "..", "a\0b", "/proc/self/cwd/out.jpg", "/proc/self/root/etc/passwd",
        "https://example.org/1.jpg", "file:///etc/passwd",
    ]  # fmt: skip
    answers = predictor([post | {"image": name} for name in outer])
    assert [a["note"] for a in answers] == [f"{name}: {new_posts.OUTSIDE}" for name in outer]
    assert not any(a["photo"] for a in answers)
    assert predictor(post | {"image": "none.jpg"})["note"] == "none.jpg: no such file"
    assert predictor(post | {"image": "in.jpg"}, root / "sub")["photo"]
    assert not predictor(post | {"image": "out.jpg"}, tmp_path / "out")["photo"]
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        Predictor(runs()[0], "cpu", root=tmp_path / "none")


def test_one_post_an_opened_image_and_many_are_answered_alike(film, data_dir):
    post = posts_of(data_dir)[0]
    with Image.open(post["image"]) as photo:
        before = photo.copy()
        opened = post | {"image": photo}
        assert film(post) == film([post])[0] == film(opened) == film([opened])[0]
        assert film([opened, post, opened | {"image": Image.new("RGB", (64, 64))}])[:2] == film([post, post])
        assert photo.size == before.size and photo.tobytes() == before.tobytes()
    assert film("Jordan")["error"].startswith("not a post") and "error" in film(["Jordan", post])[0]
    assert film(each for each in [post] * 2) == film([post, post])


def test_one_opened_image_in_several_posts(clip, data_dir, tmp_path):
    """Decoded by one thread: opened, not read yet, and large enough for two to meet in it."""
    words = {"words": posts_of(data_dir)[0]["words"]}
    path, noise = tmp_path / "large.jpg", np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
    Image.fromarray(noise).save(path)
    with Image.open(path) as photo:
        answers = clip([words | {"image": photo}] * 8)
    assert answers == clip([words | {"image": str(path)}] * 8) and all(a["photo"] for a in answers)
    broken = Image.open(io.BytesIO(path.read_bytes()[:9000]))
    note = clip(words | {"image": broken})["note"]
    assert note.startswith("opened image: OSError: image file is truncated")


@pytest.mark.parametrize("system, args, message", [
    ("film", ["--head", "0", "1"], "--head does not go with .* finds entities in text and image"),
    ("film", ["--caption", "x"], "--caption does not go with"),
    ("none", ["--image", "x.jpg"], "--image .* entities in text; "),
    ("bert-caption", ["--image", "x.jpg"], "finds entities in text and caption; leave it out"),
])  # fmt: skip
def test_options_that_do_not_go_with_the_run_are_refused(runs, system, args, message):
    run, weights = runs(system)
    with pytest.raises(ValueError, match=message):
        predict.main(
            ["--run", str(run), "--text", "Jordan", *args, *(["--weights", weights] if weights else [])]
        )


def test_a_forked_child_answers_too(runs, data_dir):
    """Of a process that forks no thread is in the child, neither ours nor OpenMP's."""
    run, posts, threads = runs()[0], posts_of(data_dir), torch.get_num_threads()
    torch.set_num_threads(2)
    predictor = Predictor(run, "cpu")
    predictor(posts)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if all(answer["photo"] for answer in predictor(posts)) else 1)
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


def test_its_host_stays_as_it_was(runs, data_dir):
    def state():
        return {
            "torch": torch.get_rng_state().tolist(), "random": random.getstate(),
            "numpy": repr(np.random.get_state()), "threads": torch.get_num_threads(),
            "TF32": (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision),
            "pictures": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
            "said": (warnings.filters[:], transformers.logging.get_verbosity()),
        }  # fmt: skip

    run, posts = runs()[0], posts_of(data_dir)
    torch.manual_seed(42)
    transformers.logging.set_verbosity_info()
    try:
        before = state()
        importlib.reload(text_encoder)
        predictor = Predictor(run, "cpu")
        for _ in range(5):  # warnings were switched off for good when threads met
            predictor(posts)
        assert state() == before
    finally:
        transformers.logging.set_verbosity_error()


def test_features_that_do_not_fit_are_no_photo(runs, data_dir, monkeypatch):
    predictor, (post, *_) = Predictor(runs()[0]), posts_of(data_dir)
    endless = torch.full((1, 4, 2048), torch.inf).half()
    monkeypatch.setattr(predictor.backbone.regions, "forward", lambda photos: endless)
    answer, plain = predictor([post, post | {"image": None}])
    assert answer["note"] == f"{post['image']}: its features do not fit float16" and answer["photo"] is False
    assert answer["entities"] == about(plain["entities"])


def test_captions_stand_for_photos(runs):
    run, weights = runs("bert-caption")
    predictor = Predictor(run, weights=weights)
    predictor.provenance = predictor.provenance | {"placeholder": "an error page"}
    words = {"words": ["Jordan", "today"]}
    plain, *rest = predictor([
        words, words | {"caption": "a portrait of someone"}, words | {"caption": "an error page"},
        words | {"caption": ""}, words | {"caption": "hills " * 99}, words | {"image": "x.jpg"},
    ])  # fmt: skip
    assert [answer["photo"] for answer in rest] == [True, False, False, True, False]
    assert [answer.get("note") for answer in rest] == [
        None, "caption: caption of a placeholder picture", "caption: empty caption",
        "caption: cut: 99 sub-tokens",
        "the run looks at captions, not at images; give the post its caption",
    ]  # fmt: skip
    assert all(answer["entities"] == about(plain["entities"]) for answer in rest if not answer["photo"])
    assert plain == {"id": None, "photo": False, "entities": plain["entities"]}


def test_words_that_were_cut_off_or_have_no_piece(film):
    long, bare = film([{"words": ["Jordan", "!"] * 60}, {"text": "\ufe0f \u200d"}])
    assert long["cut_words"] == 120 - 38 and max(e["words"][1] for e in long["entities"]) <= 38
    assert bare == {"id": None, "photo": False, "entities": []}


@pytest.mark.parametrize("system, weights, changed, message", [
    ("clip-bert", None, {}, "were made with a local clip .file-[0-9a-f]{12}.; name it with --weights"),
    ("clip-bert", "other", {},
        "--weights .*other: not what the run's features were made with: weights_sha256 .run: "),
    ("vilt", "vilt", {"mean": [0.0, 0.0, 0.0]}, "made with: mean .run: .0.0, 0.0, 0.0., here: "),
    ("vilt", "vilt", {"resizing": "other"}, "made with: resizing .run: other, here: "),
    ("film", None, {"seed": 1}, "--weights random: not what .* weights_sha256 "),
    ("film", "absent.pth", {}, "--weights absent.pth: no such file"),
])  # fmt: skip
def test_another_backbone_is_refused(runs, data_dir, tmp_path, system, weights, changed, message):
    made = json.loads((runs(system)[0] / "config.json").read_text())["features_made"] | changed
    if weights == "other":
        (tmp_path / "other").mkdir()
        for file in (data_dir / "demo" / "clip").iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        raw = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
        raw[-3] ^= 1
        (tmp_path / "other" / "model.safetensors").write_bytes(raw)
        weights = str(tmp_path / "other")
    elif weights == "vilt":
        weights = str(data_dir / "demo" / "vilt")
    with pytest.raises(ValueError, match=message) as error:
        new_posts.run_backbone(made, weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, recorded, asked", [
    ("resnet50", "IMAGENET1K_V1", "imagenet"), ("resnet50", "IMAGENET1K_V2", "imagenet-v2"),
    ("resnet50", "random-0123456789ab", "random"), ("resnet50", "none", None),
    ("clip", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    *(("clip", name, "nothing") for name in ("somebody/clip", "/etc", "../weights", "imagenet", "random")),
])  # fmt: skip
def test_only_published_weights_are_loaded_by_the_name_that_a_run_has(monkeypatch, kind, recorded, asked):
    calls = []

    def load(*args):
        calls.append(args[:4])
        raise ValueError("enough")

    monkeypatch.setattr(new_posts, "load_backbone", load)
    message = f"made with {recorded}, .*; name it with" if asked == "nothing" else "enough"
    with pytest.raises(ValueError, match=message):
        new_posts.run_backbone({"backbone": kind, "weights": recorded, "img_size": 224, "seed": 5})
    assert calls == ([] if asked == "nothing" else [(kind, asked, 224, 5)])


# --------------------------------------------------------------------------------------------- files of posts

BROKEN = [
    (b"{", "not JSON"), (b'{"words": ' + b"[" * 10**5, "not JSON"), (b"[1]", "not a JSON object"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
    (b'{"text": "' + b"a" * 2**20, "longer than 1,048,576 bytes"),
    (b'{"image": "a.jpg"}', "needs either text or words"),
    (b'{"text": "a", "words": ["a"]}', "needs either text or"),
    (b'{"text": 3}', "text is not text"), (b'{"text": "\\ud83d"}', "text holds half a character"),
    (b'{"text": " "}', "no words in it"), (b'{"words": []}', "no words in it"),
    (b'{"words": "a"}', "words is not a list"), (b'{"words": ["a", 3]}', "a word is not text"),
    (b'{"text": "a", "image": 3}', "image is not text"), (b'{"text": "a", "id": [1]}', "id is not text"),
    (b'{"text": "a", "id": "\\udc00"}', "id holds half a character"),
    (b'{"text": "a", "id": true}', "id is not text"),
    (b'{"text": "' + b"a " * 2001 + b'"}', "more than 2000 words"),
]  # fmt: skip
SPANS = [
    (None, "head"), ([0], "head"), ([0, 0], "head"), ([2, 1], "head"), ([-1, 1], "head"), ([0, 6], "head"),
    (["0", 1], "head"), ([False, True], "head"), ("01", "head"), ([1, 2], "no words in head or tail"),
]  # fmt: skip


def jsonl(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


@pytest.fixture
def posts_file(tmp_path, data_dir):
    """A function (number of posts) -> JSONL file, every seventh broken, photos beside it by relative name."""
    (tmp_path / "photos").symlink_to(data_dir / "demo" / "images")

    def make(count, name="posts.jsonl"):
        rng, posts = random.Random(count), posts_of(data_dir, "train")
        lines = []
        for i in range(count):
            post = rng.choice(posts)
            text, image = " ".join(post["words"] * rng.randint(1, 3)), f"photos/{Path(post['image']).name}"
            lines.append(json.dumps({"id": f"p{i}", "text": text, "image": image})
                         if i % 7 else '{"id": "broken"}')  # fmt: skip
        (tmp_path / name).write_text("\n".join(lines) + "\n" * (count % 2))
        return tmp_path / name

    return make


def command(run, path, out, *more):
    run, weights = run
    flags = ["--run", run, "--input", path, "--output", out, "--device", "cpu", *more]
    return [str(arg) for arg in [*flags, *(["--weights", weights] if weights else [])]]


def answer(run, path, out, *more):
    predict.main(command(run, path, out, *more))
    return out


def test_a_broken_post_is_an_error_in_its_place(runs, tmp_path, capsys):
    good = b'{"id": 7, "text": "Jordan today"}'
    lines = [good + b"\r\n" + line + b"\n" for line, _ in BROKEN]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines) + good)
    answers = jsonl(answer(runs("clip-bert"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    assert [a["line"] for a in answers] == list(range(1, 2 * len(BROKEN) + 2))
    assert all(a["id"] == 7 and a["entities"] == about(answers[0]["entities"]) for a in answers[::2])
    for a, (line, message) in zip(answers[1::2], BROKEN, strict=True):
        assert a["error"].startswith(message) and a["id"] is None, line[:50]
        assert a.keys() == {"line", "id", "error", "check"}
    assert f"{len(BROKEN)} broken (first: line 2: not JSON" in capsys.readouterr().err


def test_posts_as_pandas_and_editors_write_them(runs, tmp_path):
    """An id that became 17.0 comes back as it is, NaN is nothing, and blank lines are no posts."""
    lines = ['{"id": 17.0, "text": "Jordan", "words": NaN}', '{"id": NaN, "text": "Jordan", "image": NaN}',
             '{"id": Infinity, "text": "Jordan"}']  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n" + "\n  \n\r\n".join(lines) + "\n\n")
    first, second, third = jsonl(answer(runs("none"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    assert [post["line"] for post in (first, second, third)] == [2, 5, 8]
    assert (first["id"], type(first["id"]), second["id"]) == (17.0, float, None)
    assert "error" not in first | second and third["error"] == "id is not text"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("content, message", [
    (b"id,text\n1,Jordan\n", r"2 posts can be .* it begins 'id,text'\); pandas writes posts with to_json"),
    ('{"text": "Jordan"}\n'.encode("utf-16"), "line 1: not UTF-8 but UTF-16, it seems; iconv"),
    (b'[{"text": "Jordan"},\n{"text": "Paris"}]', "not JSON: it begins '.{"),
    (b'{"txt": "Jordan"}', r"none of its 1 posts can be answered \(first: line 1: needs either .*words\)$"),
], ids=["CSV", "UTF-16", "list", "keys"])  # fmt: skip
def test_a_file_of_no_post_is_an_error_and_nothing_finished(runs, tmp_path, content, message, before):
    (tmp_path / "in").write_bytes(content)
    if before:  # an empty file of the user's
        (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=message) as error:
        answer(runs("none"), tmp_path / "in", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'in'}: none of its") and "\n" not in str(error.value)
    assert (tmp_path / "out").read_bytes() == b"" if before else not (tmp_path / "out").exists()


def test_one_bound_for_posts_of_all_kinds(film, monkeypatch):
    """None that is longer is tokenised, nor words that the model cannot reach."""
    given = []

    def spy(tokenizer, examples, *rest):
        given.extend(examples)
        return encode(tokenizer, examples, *rest)

    monkeypatch.setattr(predict, "encode", spy)
    much, many = "a" * (new_posts.LINE + 1), ["a"] * new_posts.LINE
    posts = [{"text": much}, {"words": [much]}, {"words": many}, {"text": "a", "about_post": much},
             {"text": "a", "phrases": many}, {"text": "a", "id": much}, b'"%s"' % much.encode()]  # fmt: skip
    assert [a["error"] for a in film(posts)] == ["longer than 1,048,576 bytes"] * len(posts) and not given
    (answer,) = film([{"words": ["Jordan"] * 2000, "other": much}])
    assert answer["cut_words"] == 2000 - 38 and [len(e.words) for e in given] == [2 * 40]
    several = [{"text": much[1:]}] * 3 + [{"text": "a"}] * 9
    assert [len(window) for window in predict.windows(enumerate(several))] == [2, 2, 8]


@settings(deadline=None)
@given(st.integers(5, 300), st.lists(st.integers(0, 300), min_size=4, max_size=4),
       st.sampled_from(["ner", "relation"]))  # fmt: skip
def test_words_that_are_left_out_change_no_row(tokenizer, count, ends, task):
    words = tuple("Jordan today Paris".split()[i % 3] for i in range(count))
    if task == "ner":
        example = NerExample("", None, words, ("O",) * count)
    else:
        spans = [sorted((a % count, b % count)) for a, b in (ends[:2], ends[2:])]
        example = RelationExample("", None, words, *((a, b + 1) for a, b in spans), NONE)
    (kept, gone), labels = new_posts.near(example, 32), ("O", NONE)
    (whole,), (row,) = (encode(tokenizer, [e], labels, 32)[0] for e in (example, kept))
    assert gone + row.pop("cut_words") == whole.pop("cut_words")
    if task == "ner":
        assert whole["word_starts"][len(kept.words) :] == [-1] * gone
        whole |= {key: whole[key][: len(kept.words)] for key in ("word_starts", "labels")}
    assert row == whole


@pytest.mark.parametrize("span, message", SPANS)
def test_a_broken_span_is_an_error(runs, span, message):
    with pytest.raises(ValueError, match=message):
        new_posts.read_post({"text": "a b c", "head": span, "tail": [0, 1]}, "relation", "mnre")


def test_a_file_is_answered_as_its_posts_are(runs, posts_file, clip, tmp_path, capsys):
    path = posts_file(300)
    answers = jsonl(answer(runs("clip-bert"), path, tmp_path / "out.jsonl"))
    posts = [json.loads(line) for line in path.read_text().split("\n")]
    pairs = zip(posts, clip(posts, tmp_path), strict=True)
    direct = [with_post(one, json.dumps(post).encode()) for post, one in pairs]
    assert [{k: v for k, v in a.items() if k not in ("line", "check")} for a in answers] == direct
    for post, one in zip(posts, answers, strict=True):
        keys = () if "error" in one else ("text", "words", "image")
        asked = {key: post[key] for key in keys if key in post}
        assert {key: one[key] for key in one.keys() & {"text", "words", "image"}} == asked
    assert sum(a.get("photo", False) for a in answers) == 300 - 43
    err = capsys.readouterr().err
    assert "300 posts answered, 257 with image, 43 broken (first: line 1: needs either text or words)" in err
    answer(runs("clip-bert"), path, tmp_path / "other.jsonl", "--images", tmp_path / "nowhere")
    assert "0 with image, 257 with a note (first: line 2: photos/" in capsys.readouterr().err


def test_wherever_it_was_stopped_it_goes_on(runs, posts_file, tmp_path, capsys):
    path = posts_file(301)
    whole = answer(runs("clip-bert"), path, tmp_path / "whole.jsonl").read_bytes()
    rng, out = random.Random(1), tmp_path / "out.jsonl"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in [0, 5, ends[0], ends[127], ends[130], ends[-1] - 1, *rng.sample(range(len(whole)), 3)]:
        out.write_bytes(whole[:size])
        answer(runs("clip-bert"), path, out)
        assert out.read_bytes() == whole, size
    capsys.readouterr()
    answer(runs("clip-bert"), path, out)
    assert "it is finished, 301 posts are answered" in capsys.readouterr().err and out.read_bytes() == whole


def test_bfloat16_only_where_asked_for(runs, posts_file, tmp_path):
    """Other last digits, the same answers where the labels are far apart; a file is of one precision."""
    path, (run, weights) = posts_file(40), runs("clip-bert")
    exact, short = (jsonl(answer((run, weights), path, tmp_path / f"{more}.jsonl", *more))
                    for more in ([], ["--precision", "bfloat16"]))  # fmt: skip
    pairs = [pair for a, b in zip(exact, short, strict=True)
             for pair in zip(a.get("entities", []), b.get("entities", []), strict=False)]  # fmt: skip
    same = [(a["probability"], b["probability"]) for a, b in pairs if a["words"] == b["words"]]
    assert len(same) > len(pairs) / 2 and any(a != b for a, b in same)
    assert all(a == pytest.approx(b, abs=0.05) for a, b in same)
    with pytest.raises(ValueError, match="not what this command writes there .*: the run, --input"):
        answer((run, weights), path, tmp_path / "[].jsonl", "--precision", "bfloat16")


def test_what_is_not_its_own_output_is_left_alone(runs, posts_file, tmp_path):
    path, other, out = posts_file(20), posts_file(21, "other.jsonl"), tmp_path / "out.jsonl"
    answer(runs("clip-bert"), path, out, "--shard", "1/2")
    made = out.read_bytes()
    first, second, all_of_it = ["--shard", "1/2"], ["--shard", "2/2"], []
    for content, source, run, more in [
        (made, other, "clip-bert", first), (made, path, "clip-bert", second),
        (made, path, "clip-bert", all_of_it), (made, path, "none", first),
        (made + made, path, "clip-bert", first), (b"thesis", path, "clip-bert", first),
        (b"thesis\n", path, "clip-bert", first), (b'{"line": 2', path, "clip-bert", first),
        (b"[]\n", path, "clip-bert", first), (made + b"{", path, "clip-bert", first),
    ]:  # fmt: skip
        out.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"out.jsonl:\d+: not what this command writes there"
        ):
            answer(runs(run), source, out, *more)
        assert out.read_bytes() == content
    (tmp_path / "link").symlink_to(out)
    before = path.read_bytes(), out.read_bytes()
    for place, reason in ((path, "it is the --input"), (tmp_path / "link", "is a link, and nothing .*")):
        with pytest.raises(ValueError, match=f"{place}: {reason}; name another --output"):
            answer(runs("clip-bert"), path, place)
    assert (path.read_bytes(), out.read_bytes()) == before


def test_shards_are_the_whole(runs, posts_file, tmp_path):
    path, run = posts_file(150), runs("clip-bert")
    whole = jsonl(answer(run, path, tmp_path / "whole.jsonl"))
    parts = [jsonl(answer(run, path, tmp_path / f"{i}.jsonl", "--shard", f"{i}/4")) for i in (1, 2, 3, 4)]
    assert ([len(part) for part in parts] == [38, 38, 37, 37]
            and [a["line"] for a in parts[1][:3]] == [2, 6, 10])  # fmt: skip
    for a, b in zip(whole, sorted(itertools.chain(*parts), key=lambda a: a["line"]), strict=True):
        assert b == a | ({"entities": about(a["entities"])} if "entities" in a else {})


def test_one_process_an_output(runs, posts_file, tmp_path):
    with open(tmp_path / "out.jsonl", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match="out.jsonl: another process is writing it; wait for it or stop it"
        ):
            answer(runs("clip-bert"), posts_file(3), tmp_path / "out.jsonl")


def test_on_a_full_disk_the_answers_so_far_are_kept(runs, posts_file, tmp_path):
    run, path, out = runs("none"), posts_file(400), tmp_path / "out.jsonl"
    whole = answer(run, path, tmp_path / "whole.jsonl").read_bytes()
    done = run_script(tmp_path, "predict.py", *command(run, path, out), limit=len(whole) * 2 // 3)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        f"predict.py: error: {out}: File too large; the answers so far are kept: make room, and the same"
        " command goes on"
    )
    assert whole.startswith(out.read_bytes()) and out.stat().st_size > len(whole) / 3
    assert answer(run, path, out).read_bytes() == whole


def test_killed_anywhere_no_finished_line_is_lost(runs, posts_file, tmp_path):
    run, path, out, rng = runs("clip-bert"), posts_file(900), tmp_path / "out.jsonl", random.Random(3)
    whole = answer(run, path, tmp_path / "whole.jsonl").read_bytes()
    killed, kept = 0, b""
    for _ in range(5):
        process = Script(tmp_path, "predict.py", *command(run, path, out))
        goal = len(kept) + rng.randint(1, len(whole) // 7)
        while process.poll() is None and (not out.exists() or out.stat().st_size < goal):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.kill()
        killed += process.wait() == -9
        now = out.read_bytes()
        assert whole.startswith(now) and now.startswith(kept)
        kept = now[: now.rfind(b"\n") + 1]
    assert killed >= 3
    assert answer(run, path, out).read_bytes() == whole


def test_nothing_grows(clip, posts_file, tmp_path):
    """Neither open files and threads nor memory: four times the posts take no more of it."""
    few, many, peaks, held = posts_file(140, "few.jsonl"), posts_file(560, "many.jsonl"), [], []
    for path in (few, few, many):  # the first warms up
        tracemalloc.start()
        predict.answer_file(clip, b"run", str(path), tmp_path / f"{len(peaks)}.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        open_files = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
        held.append((threading.active_count(), len(open_files)))
    assert held[0] == held[1] == held[2] and len(jsonl(tmp_path / "2.jsonl")) == 560
    assert peaks[2] < 1.2 * peaks[1] + 2**19, peaks


def test_windows_hold_no_more_than_their_bounds():
    lines = [(i, b"x" * np.random.default_rng(i).integers(0, 2**18)) for i in range(400)]
    made = list(predict.windows(iter(lines)))
    assert list(itertools.chain(*made)) == lines and max(map(len, made)) <= new_posts.WINDOW
    assert all(sum(len(line) for _, line in window) <= new_posts.LINE + 2**18 for window in made)


# ----------------------------------------------------------------------------------------------- command line


def test_one_post_on_the_command_line(runs, data_dir, clip, capsys):
    (run, weights), (post, *_) = runs("clip-bert"), posts_of(data_dir)
    text, flags = " ".join(post["words"]), ["--weights", weights, "--device", "cpu"]
    capsys.readouterr()
    predict.main(["--run", str(run), "--text", text, "--image", post["image"], "--json", *flags])
    out, err = capsys.readouterr()
    assert json.loads(out) == clip([{"text": text, "image": post["image"]}])[0] and err == ""
    predict.main(["--run", str(run), "--words", *post["words"], "--image", "absent.jpg", *flags])
    out, err = capsys.readouterr()
    entities = clip([{"words": post["words"]}])[0]["entities"]
    assert err == "absent.jpg: no such file\n"
    lines = [f"{e['probability']:.3f}  {e['type']:<5} {e['text']}\n" for e in entities]
    assert out == ("".join(lines) or "no entities\n")
    with pytest.raises(ValueError, match="the post: no words in it"):
        predict.main(["--run", str(run), "--text", " ", *flags])
    run, _ = runs("clip-bert", "mnre")
    predict.main(
        ["--run", str(run), "--text", "Messi at BBC", "--head", "0", "5", "--tail", "9", "12", *flags]
    )
    assert re.fullmatch(r"0\.\d{3}  (None|/per/.*)", capsys.readouterr().out.splitlines()[-1])


def test_a_text_only_run_says_once_that_it_looks_at_no_image(runs, posts_file, tmp_path, capsys):
    run = runs("none")
    capsys.readouterr()
    answers = jsonl(answer(run, posts_file(30), tmp_path / "out.jsonl"))
    err = capsys.readouterr().err
    assert err.count("text only; no image is looked at") == 1 and "with image" not in err
    assert all(not a.get("photo") and "note" not in a for a in answers)


@pytest.mark.parametrize("more, message", [
    ([], "one of the arguments --text --words --input is required"),
    (["--text", "a", "--input", "b"], "not allowed with"),
    (["--input", "a"], "--input and --output go together"),
    (["--text", "a", "--output", "b"], "--input and --output go together"),
    (["--input", "a", "--output", "b", "--image", "c"], "--image does not go with --input"),
    (["--text", "a", "--images", "b"], "--images does not go with --text or --words"),
    *((["--input", "a", "--output", "b", "--shard", s], f"{s} is not i/n")
        for s in ("0/2", "3/2", "1", "a/b", "²/3")),
])  # fmt: skip
def test_arguments_that_contradict_are_refused(more, message, capsys):
    with pytest.raises(SystemExit):
        predict.parse_args(["--run", "r", *more])
    assert message in capsys.readouterr().err
