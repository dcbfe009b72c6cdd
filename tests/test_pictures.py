"""Runs with --generated and --bottleneck: trained, scored, checked, asked and shown, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import evaluate
import extract_features
import predict
import report
import train
from features import FeatureCache
from parts import posts
from parts.opening import open_run
from parts.posts import predict_posts
from parts.run_files import load_run
from parts.runs import system_settings
from parts.scores import main_score, read_predictions

ABSENT = ("train_0003", "test_0002")  # have no second picture


def extract(data_dir, folder, *more):
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", folder, "--weights", "random",
             "--workers", 0]  # fmt: skip
    return extract_features.main([str(flag) for flag in [*flags, *more]])


@pytest.fixture(scope="module")
def generated(data_dir, tmp_path_factory):
    """A feature file of second pictures: the photos upside down, two missing; 3 views."""
    root = tmp_path_factory.mktemp("generated")
    shutil.copytree(data_dir / "demo" / "images", root / "images")
    for path in (root / "images").iterdir():
        if path.stem in ABSENT:
            path.unlink()
        else:
            ImageOps.flip(Image.open(path)).save(path)
    return extract(data_dir, root, "--images", root / "images", "--img-size", 64, "--views", 3)


@pytest.fixture(scope="module")
def flags(data_dir, cache_dir, encoder_dir, generated):
    """Arguments of a quick run with second pictures."""
    return ["--data-dir", data_dir, "--cache-dir", cache_dir, "--text-encoder", encoder_dir, "--img-size", 64,
            "--dataset", "demo", "--model", "bert-resnet50", "--fusion", "saliency", "--epochs", 1,
            "--lr", 1e-3, "--generated", generated]  # fmt: skip


def start(flags, run_dir, *more):
    return train.main([str(flag) for flag in [*flags, "--run-dir", run_dir, *more]])


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """A run of all that MINIGE has here."""
    more = ("--bottleneck", 0.1, "--align", "matching=0.9", "--decoder", "crf", "--heads", 4, "--epochs", 2)
    return start(flags, tmp_path_factory.mktemp("runs") / "run", *more)


def test_the_run_is_told_scored_and_loaded(run, generated, capsys):
    config = json.loads((run / "config.json").read_text())
    cache = FeatureCache(generated)
    assert config["generated_made"] == cache.attrs | {"sha256": cache.sha256} and config["bottleneck"] == 0.1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [[line[key] for key in ("loss", "loss_bottleneck", "loss_matching")] for line in log]
    assert np.isfinite(losses).all()
    # Three codes with mu of variance 1 and log-variances about -4: (1 + e^-4 - 1 + 4) / 2 each, of the
    # pictures there are.
    assert 4.5 < log[0]["loss_bottleneck"] < 6.2
    model, config, _, shown = open_run(run, "test", "cpu")
    assert model.loss_weights == {"labels": 1.0, "bottleneck": 0.1, "matching": 0.9}
    records, examples = read_predictions(run / "predictions-test.jsonl"), shown.examples
    assert [r["generated"] for r in records] == [example.image_id not in ABSENT for example in examples]
    again = predict_posts(model, shown, config["labels"], 3, "cpu", "float32")
    blind = predict_posts(model, replace(shown, generated=None), config["labels"], 3, "cpu", "float32")
    for record, same, other in zip(records, again, blind, strict=True):
        assert record["probability"] == pytest.approx(same["probability"], abs=1e-4)
        alike = record["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert alike == (record["id"] in ABSENT)


def test_training_says_what_it_found(flags, tmp_path, generated, cache_dir, capsys):
    folder = start(flags, tmp_path / "plain")
    out = capsys.readouterr().out
    assert f"generated  {generated}: 3 views, made from {generated.parent / 'images'}" in out
    assert "train: 23 of 24 posts have one, 1 none" in out and "the photos themselves" not in out
    weights = load_run(folder)[0].fusion.shares
    assert len(weights) == 2 and all(share.weight.abs().max() > 0 for share in weights)
    start(flags, tmp_path / "same", "--generated", cache_dir / "demo-resnet50-64.h5")
    assert "WARNING    these are the photos themselves" in capsys.readouterr().out
    start(flags[:-2], tmp_path / "one")
    said = "generated  no second pictures (--generated): saliency reads the photo alone"
    assert said in capsys.readouterr().out and len(load_run(tmp_path / "one")[0].fusion.shares) == 1
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "one")]
    two, one = map(system_settings, configs)
    assert {"generated_made", "generated_made.backbone"} <= two.keys() ^ one.keys()


def test_a_second_picture_stays_with_its_post(flags, tmp_path, monkeypatch):
    """Whatever photo is hidden, shuffled or dropped: in training, in scoring and in the image check."""
    read, seen = posts.read_generated, []

    def watched(cache, photos, views=None):
        seen.append((list(photos), None if views is None else list(views)))
        return read(cache, photos, views)

    monkeypatch.setattr(posts, "read_generated", watched)
    folder = start(flags, tmp_path / "run", "--shuffle-photos", "--photo-dropout", 0.9, "--epochs", 3)
    shown = [pair for photos, views in seen if views for pair in zip(photos, views, strict=True)]
    assert sorted(photo for photo, _ in shown) == sorted(3 * [f"train_{i:04d}" for i in range(24)])
    assert {view for _, view in shown} == {0, 1, 2}
    seen.clear()
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "2"])
    names = sorted(photo for photos, _ in seen for photo in photos)
    assert names == sorted(4 * [f"test_{i:04d}" for i in range(8)])
    # What it stays for: with every photo hidden, the post's own second picture still tells posts apart.
    model, _, _, shown = open_run(folder, "test", "cpu")
    ids, second = [example.image_id for example in shown.examples], shown.generated
    batch = replace(shown, generated=None).batch(range(8), hidden=[True] * 8)
    with torch.inference_mode():
        parts = {}, read(second, ids), read(second, ids[::-1])
        plain, own, other = (model(batch | part).logits for part in parts)
    here = torch.tensor([i not in ABSENT for i in ids])
    first = batch["word_starts"][:, :1] >= 0
    assert first.all() and torch.equal(plain[~here], own[~here])
    assert (plain - own)[here, 0].abs().amax(-1).min() > 1e-6
    assert (own - other)[:, 0].abs().amax(-1).max() > 1e-6


def test_image_check_where_the_second_file_is_now(run, tmp_path, generated, cache_dir, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = json.loads((run / "config.json").read_text()) | {"generated": "gone.h5"}
    (moved / "config.json").write_text(json.dumps(config))
    check = ["--run", str(moved), "--image-check", "--shuffles", "1"]
    with pytest.raises(FileNotFoundError, match="no feature file gone.h5"):
        evaluate.main(check)
    evaluate.main([*check, "--generated", str(generated)])
    made = json.loads((moved / "image-check-test.json").read_text())
    assert main_score(made["true"]) == main_score(json.loads((run / "metrics-test.json").read_text()))
    assert made["photos"] == 8
    with pytest.raises(ValueError, match="not the features .* was trained on; restore them"):
        evaluate.main([*check, "--generated", str(cache_dir / "demo-resnet50-64.h5")])
    with pytest.raises(SystemExit):
        evaluate.main(["--run", str(moved), "--generated", str(generated)])
    assert "--generated goes with --image-check" in capsys.readouterr().err


def test_new_posts_are_answered_without_and_that_is_said_once(run, tmp_path, data_dir, capsys):
    posts = [{"words": ["Jordan", "today"], "image": f"test_{i:04d}.jpg"} for i in range(3)]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    files = ["--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    predict.main(["--run", str(run), *files, "--images", str(data_dir / "demo" / "images")])
    said = "trained with a second picture of each post, generated from its text; here it answers without"
    assert capsys.readouterr().err.count(said) == 1
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3
    assert all(answer["photo"] and "entities" in answer and "note" not in answer for answer in answers)


def test_the_page_names_what_was_read_and_shows_attention(run, tmp_path, generated):
    path = report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    text = path.read_text(encoding="utf-8")
    page = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert page["facts"]["Generated pictures"] == (
        f"{generated.name} ({FeatureCache(generated).sha256[:16]}): 7 of 8 posts with one; not shown here"
    )
    assert "bottleneck 0.1, decoder crf" in page["facts"]["System"]
    assert all("maps" in post for post in page["posts"])


def test_a_stopped_run_goes_on_and_ends_the_same(flags, tmp_path, monkeypatch):
    """Draws of the code and of the second picture's views are drawn again as they were."""
    more = ("--bottleneck", 0.1, "--epochs", 2, "--save-every", 0, "--align", "contrastive=0.1")
    whole, steps = start(flags, tmp_path / "whole", *more), 0
    save = train.save_state

    class Stop(BaseException):
        pass

    def stopping(*args):
        nonlocal steps
        save(*args)
        steps += 1
        if steps == 2:
            raise Stop

    monkeypatch.setattr(train, "save_state", stopping)
    with pytest.raises(Stop):
        start(flags, tmp_path / "stopped", *more)
    start(flags, tmp_path / "stopped", *more, "--resume")
    for name in ("log.jsonl", "predictions-test.jsonl", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes(), name


def test_run_folders_tell():
    args = "--fusion saliency --model bert-resnet50 --align matching=.9 --decoder crf --seed 1".split()
    name = "runs/twitter2017-bert-resnet50-saliency-matching0.9"
    assert train.parse_args(args).run_dir == f"{name}-crf-s1"
    args += ["--bottleneck", ".1", "--generated", "g.h5"]
    assert train.parse_args(args).run_dir == f"{name}-bottleneck0.1-generated-crf-s1"


@pytest.mark.parametrize("more, said", [
    (["--bottleneck", ".1", "--fusion", "none"], "--bottleneck: --fusion none takes no codes of regions"),
    (["--bottleneck", ".1", "--model", "vilt"], "--bottleneck: vilt takes no codes"),
    (["--bottleneck", "-1"], "not from 0"),
    (["--generated", "x.h5"], "--generated: --fusion film reads no second picture; choose --fusion saliency"),
    (["--generated", "x.h5", "--model", "blip"], "--generated: blip reads no second picture"),
    (["--generated", "x.h5", "--fusion", "none"], "--generated: --fusion none reads no second"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(more, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(more)
    assert said in capsys.readouterr().err


def test_an_option_that_nothing_reads_is_said_and_left_out(capsys):
    train.parse_args(["--fusion", "saliency", "--heads", "4"])
    assert "--heads: --fusion saliency does not read it" in capsys.readouterr().out


def test_files_that_do_not_go_together_are_one_line(flags, tmp_path, data_dir, cache_dir):
    other = extract(data_dir, tmp_path, "--img-size", 32, "--views", 1)
    seed = extract(data_dir, tmp_path / "seed", "--img-size", 64, "--views", 1, "--seed", 1)
    for path, message in (
        ("absent.h5", "--generated absent.h5: no such feature file; extract_features.py makes one"),
        (cache_dir / "mnre-resnet50-64.h5", "no row for .*; it was made for mnre"),
        (cache_dir / "demo-clip-96.h5", "made with backbone clip, .*demo-resnet50-64.h5 with resnet50; one"),
        (other, "made with img size 32, .* with 64; one map"),
        (seed, "made with weights sha256 .* with .*; one map"),
        (__file__, "not a readable HDF5 file"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            start(flags, tmp_path / "run", "--generated", path)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="5 heads do not divide token states of width 64"):
        start(flags, tmp_path / "run", "--bottleneck", 0.1, "--heads", 5)

