"""What is said of a photo as its regions: token states of captions; phrases, of notes and of captions."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import evaluate
import extract_features
import predict
import report
import train
from encoding import collate, encode
from features import MISSING, OK, UNREADABLE, FeatureCache
from parts.backbones import load_backbone
from parts.captions import Captions, phrases_of
from parts.datasets import load_dataset
from parts.files import write_json_lines
from parts.notes import said_of_photos
from parts.photos import read_captions
from parts.run_files import load_run
from parts.scores import entity_spans, read_predictions
from predict import Predictor
from parts import report_data


def test_cached_captions_are_the_encoders_states(data_dir, cache_dir):
    """Those of transformers' own forward pass over each caption alone, without [CLS] and [SEP]."""
    cache, folder = FeatureCache(cache_dir / "demo-caption-64.h5"), data_dir / "demo" / "encoder"
    captions, encoder = read_captions(folder.with_name("captions.txt")), AutoModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert cache.shape == (40, 1, 64, 64) and not cache.grid.any()
    assert len(set(cache.num_regions.tolist())) > 1
    for image_id in cache.rows:
        given = tokenizer(captions[f"{image_id}.jpg"], return_tensors="pt")
        with torch.no_grad():
            expected = encoder.eval()(**given).last_hidden_state[0, 1:-1]
        regions, mask, _, _ = (value[0] for value in cache.read([image_id]).values())
        assert mask.sum() == len(expected) and not regions[~mask].any()
        np.testing.assert_allclose(regions[mask], expected, rtol=2**-10, atol=1e-3 * expected.abs().max())


def test_captions_that_say_nothing(data_dir):
    backbone = load_backbone("caption", str(data_dir / "demo" / "encoder"), 4)
    captions = {"a": "green hills", "b": "a shop with a white sign", "c": "", "d": None, "e": "no picture"}
    read = Captions(list(captions), captions, backbone, placeholder="no picture")[range(5)]
    assert [(None if views is None else tuple(views.shape), status) for views, status, _ in read] == [
        ((1, 2), OK), ((1, 4), OK), (None, UNREADABLE), (None, MISSING), (None, MISSING)]  # fmt: skip
    assert [reason for _, _, reason in read] == [
        "", "cut: 6 sub-tokens", "empty caption", "no caption", "caption of a placeholder picture",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="takes captions of 510 sub-tokens at most"):
        load_backbone("caption", str(data_dir / "demo" / "encoder"), 511)


def words_of(caption):
    """Phrases of a demo caption, by hand: none has a sign, and these are all the function words there are."""
    parts = re.split(r"\b(?:in front of|a|an|the|in|of|on|under|with)\b", caption)
    return [part.strip() for part in parts if part.strip()]


@pytest.fixture(scope="module")
def backbone(encoder_dir):
    return load_backbone("phrases", str(encoder_dir))


def extract(data_dir, folder, captions, *more):
    given = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", folder, "--backbone", "phrases",
             "--captions", captions, "--weights", data_dir / "demo" / "encoder", *more]  # fmt: skip
    return extract_features.main([str(arg) for arg in given])


@pytest.fixture(scope="module")
def notes(data_dir, tmp_path_factory):
    """Notes on the demo's posts by image id, one by split and id; one has an empty list, one none."""
    lines = []
    for name, caption in read_captions(data_dir / "demo" / "captions.txt").items():
        image_id = name.removesuffix(".jpg")
        phrases = [*words_of(caption), "good morning"]
        lines.append({"id": image_id, "phrases": phrases, "about_post": "so good"})
    lines[1]["id"] = "train/train_0001"
    lines[2]["phrases"] = []
    del lines[3]["phrases"]
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    write_json_lines(path, lines)
    return path


def train_run(data_dir, encoder_dir, folder):
    """A run on the demo's captions, cut."""
    extract(data_dir, folder, data_dir / "demo" / "captions.txt")
    flags = ["--data-dir", data_dir, "--cache-dir", folder, "--text-encoder", encoder_dir, "--dataset",
             "demo", "--epochs", 2, "--lr", 1e-3, "--model", "bert-phrases", "--fusion", "cross-attention",
             "--run-dir", folder / "run"]  # fmt: skip
    return train.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def run(data_dir, encoder_dir, tmp_path_factory):
    return train_run(data_dir, encoder_dir, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("caption, phrases", [
    ("two men in suits and ties standing next to a court", "two men|suits|ties standing|court"),
    ("A red t-shirt, size 3.5 (new): the women's; ON THE roof!", "red t-shirt|size 3.5|new|women's|roof"),
    ("a man, a man and another man in front of an on-line shop", "man|another man|on-line shop"),
    ("will.i.am is the u.s.a's  best", "will.i.am|u.s.a's best"),
    ("zwei Männer auf dem Dach, ein Hund", "zwei Männer auf dem Dach|ein Hund"),
    ("of the", ""), (" \n", ""), ("rooftop", "rooftop"),
])  # fmt: skip
def test_captions_are_cut_at_function_words_and_signs(caption, phrases):
    assert phrases_of(caption) == [phrase for phrase in phrases.split("|") if phrase]
    assert phrases_of(phrases.split("|")) == phrases_of(caption)  # a list stays, order and repeats too
    assert phrases_of(("man", " ", "a man on a roof ", "man")) == ["man", "a man on a roof", "man"]


def test_a_region_is_the_mean_of_the_caption_states_of_its_phrase_alone(backbone, encoder_dir):
    """Whatever the others and their order, to the last bit."""
    states = load_backbone("caption", str(encoder_dir))
    phrases = ["green hills", "a shop with a white sign", "sun", "two spotlights on a stage"]
    alone = {}
    for phrase in phrases:
        ids, _ = states.prepare(phrase)
        alone[phrase] = states.regions(ids[None])[0].float().mean(0).half()
    for chosen in (phrases, phrases[::-1], phrases[1:3], phrases[:1], [phrases[0]] * 3):
        ids, cut = backbone.prepare(chosen)
        with torch.inference_mode():
            regions = backbone.regions(ids[None])
        assert regions.shape == (1, len(chosen), 64) and cut == ""
        assert torch.equal(regions[0], torch.stack([alone[phrase] for phrase in chosen]))


def test_what_is_missing_empty_or_cut_is_said(encoder_dir):
    backbone = load_backbone("phrases", str(encoder_dir), 2)
    said = {"a": ("green hills", "sun"), "b": (), "c": None, "d": (" ", ""), "e": "a shop on a hill",
            "f": "no picture", "g": ("sun", "sign", "wall"), "h": ("\u200b", "sun"), "i": ("so " * 600,),
            "j": ""}  # fmt: skip
    read = Captions(list(said), said, backbone, "no picture", "phrases")[range(10)]
    assert [(None if views is None else tuple(views.shape[:2]), status) for views, status, _ in read] == [
        ((1, 2), OK), (None, MISSING), (None, MISSING), (None, UNREADABLE), ((1, 2), OK), (None, MISSING),
        ((1, 2), OK), ((1, 1), OK), ((1, 1), OK), (None, MISSING)]  # fmt: skip
    assert [reason for _, _, reason in read] == [
        "", "no phrases", "no phrases", "empty phrases", "", "caption of a placeholder picture",
        "cut: 3 phrases", "left out: 1 of the phrases, without a sub-token",
        "cut: 1 of the phrases to 510 sub-tokens", "no phrases"]  # fmt: skip
    assert read[8][0].shape == (1, 1, 510) and load_backbone("phrases", str(encoder_dir)).shape == (32, 64)


def test_notes_and_captions_are_told_apart_and_found(data_dir, notes, tmp_path):
    dataset = load_dataset("demo", data_dir)
    said = said_of_photos(notes, dataset)
    captions = read_captions(data_dir / "demo" / "captions.txt")
    assert list(said) == dataset.image_ids()
    for image_id, phrases in said.items():
        lacks = image_id in ("train_0002", "train_0003")
        assert phrases == (None if lacks else (*words_of(captions[f"{image_id}.jpg"]), "good morning"))
    of_captions = said_of_photos(data_dir / "demo" / "captions.txt", dataset)
    assert of_captions == {image_id: captions[f"{image_id}.jpg"] for image_id in said}
    # Rows that share a photo: the first that has phrases.
    rows = load_dataset("mnre", data_dir)
    first, second = rows.examples["train"][:2]
    said = {first.id: [], second.id: ["sun"], rows.examples["valid"][0].image_id: ["hill"]}
    lines = [{"id": key, "phrases": phrases} for key, phrases in said.items()]
    write_json_lines(tmp_path / "n.jsonl", lines)
    assert first.image_id == second.image_id == rows.examples["valid"][0].image_id
    assert said_of_photos(tmp_path / "n.jsonl", rows)[first.image_id] == ("sun",)


def test_extraction_from_notes_and_from_captions(data_dir, notes, encoder_dir, tmp_path, capsys):
    cache = FeatureCache(extract(data_dir, tmp_path, notes))
    out = capsys.readouterr().out
    assert cache.path.name == "demo-phrases-32.h5" and "demo: 40 photos, 38 with phrases, x 1 views" in out
    assert "38 ok, 2 missing" in out
    assert "missing: train_0002 (no phrases)" in out and "missing: train_0003 (no phrases)" in out
    assert cache.shape == (40, 1, 32, 64) and not cache.grid.any()
    states = load_backbone("caption", str(encoder_dir))
    path = data_dir / "demo" / "captions.txt"
    captions = read_captions(path)
    placeholder = captions["test_0000.jpg"]
    cut = FeatureCache(extract(data_dir, tmp_path / "cut", path, "--placeholder", placeholder))
    assert "caption of a placeholder picture" in capsys.readouterr().out
    for image_id, row in cache.rows.items():
        phrases = [*words_of(captions[f"{image_id}.jpg"]), "good morning"]
        with torch.inference_mode():
            ids = [states.prepare(phrase)[0] for phrase in phrases]
            wanted = torch.stack([states.regions(each[None])[0].float().mean(0) for each in ids])
        wanted = wanted.half().numpy()
        if cache.has_photo(image_id):
            assert cache.num_regions[row] == len(phrases)
            assert np.array_equal(cache.regions[row, 0, : len(phrases)], wanted)
        assert cut.has_photo(image_id) == (captions[f"{image_id}.jpg"] != placeholder)
        if cut.has_photo(image_id):
            assert np.array_equal(cut.regions[row, 0, : cut.num_regions[row]], wanted[:-1])
    few = FeatureCache(extract(data_dir, tmp_path, notes, "--img-size", 2))
    assert few.num_regions.max() == 2 and "cut: 3 phrases" in few.reasons
    with pytest.raises(ValueError, match="made with other settings: captions_sha256"):
        extract(data_dir, tmp_path, data_dir / "demo" / "captions.txt")


def test_files_that_cannot_be_used(data_dir, notes, tmp_path, capsys):
    path = tmp_path / "n.jsonl"
    path.write_text('{"id": "train_0000", "about_photo": "sun"}')
    with pytest.raises(FileNotFoundError, match="none of the 40 photos is in .*n.jsonl"):
        extract(data_dir, tmp_path, path)
    with pytest.raises(ValueError, match="no caption is that; copy it as it stands"):
        extract(data_dir, tmp_path, notes, "--placeholder", "sun")
    with pytest.raises(ValueError, match="expected '<photo> :<caption>'"):  # a caption is no list of phrases
        extract(data_dir, tmp_path, notes, "--backbone", "caption")
    for more in (["--backbone", "phrases"], ["--backbone", "phrases", "--captions", "x", "--images", "y"]):
        with pytest.raises(SystemExit):
            extract_features.main(more)
        assert "phrases" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "bert-phrases", "--images", "x"])
    assert "--images: bert-phrases reads phrases, no photo" in capsys.readouterr().err


def test_defaults_of_a_run_on_phrases():
    args = train.parse_args(["--model", "roberta-phrases", "--seed", "1"])
    assert args.features == "features/twitter2017-phrases-32.h5"
    assert args.run_dir == "runs/twitter2017-roberta-phrases-film-s1"


def test_a_run_on_phrases_is_checked_and_answers_new_posts(run, data_dir, tmp_path, capsys):
    evaluate.main(["--run", str(run), "--image-check", "--shuffles", "1"])
    assert json.loads((run / "image-check-test.json").read_text())["photos"] == 8
    records = read_predictions(run / "predictions-test.jsonl")
    captions = read_captions(data_dir / "demo" / "captions.txt")
    predictor = Predictor(run, weights=str(data_dir / "demo" / "encoder"))
    posts = [{"words": record["words"], "caption": captions[f"{record['id']}.jpg"]} for record in records]
    listed = [{"words": post["words"], "phrases": words_of(post["caption"])} for post in posts]
    for answer, same, record in zip(predictor(posts), predictor(listed), records, strict=True):
        assert answer == same and answer["photo"] is True and "note" not in answer
        spans = sorted(entity_spans(record["predicted"]), key=lambda span: span[1])
        wanted = [(kind, pytest.approx(min(record["probability"][a:b]), abs=1e-4)) for kind, a, b in spans]
        assert [(e["type"], e["probability"]) for e in answer["entities"]] == wanted
    words = {"words": ["Jordan", "today"]}
    plain, none, blank, image, wrong, many = predictor([
        words, words | {"phrases": []}, words | {"caption": "of the"}, words | {"image": "x.jpg"},
        words | {"phrases": "sun"}, words | {"phrases": ["sun"] * 40},
    ])  # fmt: skip
    assert [answer.get("note") for answer in (plain, none, blank, image, many)] == [
        None, "phrases: no phrases", "phrases: empty phrases",
        "the run looks at phrases, not at images; give the post its phrases", "phrases: cut: 40 phrases",
    ]  # fmt: skip
    assert wrong["error"].startswith("phrases must be a list of text")
    assert plain["entities"] == none["entities"] == blank["entities"] and many["photo"]
    capsys.readouterr()
    weights = ["--weights", str(data_dir / "demo" / "encoder")]
    for more in (["--phrases", "green hills", "sun"], ["--caption", "green hills under the sun"]):
        predict.main(["--run", str(run), "--text", "Jordan", *more, "--json", *weights])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and json.loads(first)["photo"]
    with pytest.raises(ValueError, match="finds entities in text and phrases; leave it out"):
        predict.main(["--run", str(run), "--text", "Jordan", "--image", "x.jpg", *weights])


def embedded(path):
    return json.loads(path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_the_page_shows_phrases_where_others_show_places(run, data_dir, tmp_path):
    page = embedded(report.main(["--run", str(run), "--output", str(tmp_path / "page.html")]))
    captions = read_captions(data_dir / "demo" / "captions.txt")
    model, tokenizer, config = load_run(run)
    cache, examples = FeatureCache(config["features"]), load_dataset("demo", data_dir).examples["test"]
    rows, _ = encode(tokenizer, examples, config["labels"], 128)
    posts = {post["id"]: post for post in page["posts"]}
    for example, row in zip(examples, rows, strict=True):
        post, phrases = posts[example.id], words_of(captions[f"{example.image_id}.jpg"])
        assert post["phrases"] == phrases
        assert (post["maps"]["rows"], post["maps"]["columns"]) == (1, len(phrases))
        with torch.inference_mode():
            weights = model(collate([row], 0) | cache.read([example.image_id]), return_weights=True).weights
        values = np.frombuffer(base64.b64decode(post["maps"]["bytes"]), np.uint8)
        values = values.reshape(-1, len(phrases)) / 255
        for k, start in enumerate(row["word_starts"]):
            real = weights[0, start, : len(phrases)].numpy()
            assert np.allclose(values[k] / values[k].sum() * post["maps"]["places"][k], real, atol=5e-3)
    assert page["facts"]["Photos"].startswith("phrases features, size 32") and not page["warnings"][1:]


def test_phrases_that_are_not_as_many_as_the_regions_are_not_shown(run, data_dir, tmp_path, monkeypatch):
    captions = read_captions(data_dir / "demo" / "captions.txt")
    odd = captions["test_0000.jpg"]
    monkeypatch.setattr(report_data, "phrases_of", lambda said: phrases_of(said)[said == odd :])
    page = embedded(report.main(["--run", str(run), "--output", str(tmp_path / "page.html")]))
    lacking = 0
    for post in page["posts"]:
        whole = captions[f"{post['photo']}.jpg"] != odd
        lacking += not whole
        assert ("phrases" in post) == ("maps" in post) == whole
    said = f"Of {lacking} posts the phrases are not shown, nor attention: one has no sub-token."
    assert 0 < lacking < 8 and said in page["warnings"]


def test_phrases_that_are_not_here_are_said_and_moved_ones_found(run, data_dir, tmp_path):
    folder, captions = tmp_path / "moved", data_dir / "demo" / "captions.txt"
    shutil.copytree(run, folder)
    config = json.loads((run / "config.json").read_text())
    gone = config | {"features_made": config["features_made"] | {"made_from": "gone.txt"}}
    (folder / "config.json").write_text(json.dumps(gone))
    flags = ["--run", str(folder), "--output", str(tmp_path / "page.html")]
    page = embedded(report.main(flags))
    said = "Phrases not shown, nor attention: no file gone.txt, of which the run's phrases are; name it"
    said += " with --captions."
    assert said in page["warnings"] and not any({"maps", "phrases"} & post.keys() for post in page["posts"])
    page = embedded(report.main([*flags, "--captions", str(captions)]))
    assert said not in page["warnings"] and all("phrases" in post for post in page["posts"])
    (tmp_path / "other.txt").write_text(captions.read_text() + "\n")
    with pytest.raises(ValueError, match="other.txt: not what the run's phrases were made of .*; restore it"):
        report.main([*flags, "--captions", str(tmp_path / "other.txt")])
    with pytest.raises(FileNotFoundError, match="no file absent"):
        report.main([*flags, "--captions", "absent"])
    gone["features_made"]["backbone"] = "resnet50"
    (folder / "config.json").write_text(json.dumps(gone))
    with pytest.raises(ValueError, match="--captions x: the run read no phrases; leave it out"):
        report.main([*flags, "--captions", "x"])

