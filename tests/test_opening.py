"""The inputs of a run: what is missing is counted, what does not fit is refused before anything is there."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import json_lines, run, system_flags
from forked import run_script
from PIL import Image

import evaluate
import extract_features
from parts.scores import read_predictions


def extract(*more):
    """Features of random weights, one view unless told otherwise."""
    flags = ["--weights", "random", "--views", 1, "--workers", 0, *more]
    return extract_features.main([str(flag) for flag in flags])


def test_photos_that_are_missing_are_counted(flags, tmp_path, data_dir, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("train_0000.jpg", "valid_0001.jpg"):
        (images / name).symlink_to(data_dir / "demo" / "images" / name)
    places = ("--data-dir", data_dir, "--cache-dir", tmp_path, "--images", images)
    extract("--dataset", "demo", "--img-size", 64, *places)
    capsys.readouterr()
    folder = run(flags, tmp_path / "run", "--cache-dir", tmp_path, "--epochs", 1)
    out = capsys.readouterr().out
    assert "train: 1 of 24 posts have a photo" in out and "test: 0 of 8 posts have a photo" in out
    assert "no post of test has a photo" in out and out.count("one view only: no augmentation") == 1
    assert json.loads((folder / "metrics-valid.json").read_text())["posts_without_photo"] == 7
    records = read_predictions(folder / "predictions-valid.jsonl")
    assert [record["photo"] for record in records] == [i == 1 for i in range(8)]


@pytest.mark.parametrize("train_posts, valid_posts, kinds", [
    (["a B-PER"], ["a B-PER"], 3),  # one post of one word
    (["a O", "b O"], ["a O"], 1),  # nothing but O: one label to choose from
    (["\u200b B-PER"] * 9, ["\u200b O", "a B-PER"], 3),  # no word has a sub-token: the loss is over nothing
    (["a B-PER b O"] * 9, ["a B-PER " + "b O " * 10_000], 3),  # a post of 10,001 words
])  # fmt: skip
def test_odd_data_sets_train_and_are_scored(flags, tmp_path, train_posts, valid_posts, kinds, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for split, posts in (("train", train_posts), ("valid", valid_posts), ("test", valid_posts)):
        texts = [re.sub(r"(\S+ \S+) ", r"\1\n", post) for post in posts]
        text = "\n\n".join(f"IMGID:{i}\n{text}" for i, text in enumerate(texts))
        (own / f"{split}.txt").write_text(text, encoding="utf-8")
    folder = run(flags, tmp_path / "run", "--dataset", own, "--fusion", "none", "--epochs", 1)
    metrics = json.loads((folder / "metrics-test.json").read_text())
    assert metrics["words"] == sum(len(post.split()) // 2 for post in valid_posts)
    assert len(json.loads((folder / "config.json").read_text())["labels"]) == kinds
    assert 0 <= metrics["token"]["accuracy"] <= 1 and np.isfinite(json_lines(folder / "log.jsonl")[0]["loss"])


def own_folder(folder, colour, photos=6):
    """A folder of one's own: posts whose photos have one colour, and a size that differs with it."""
    (folder / "images").mkdir(parents=True)
    text = "".join(f"IMGID:{i}\nAnn\tB-PER\nsaw\tO\n\n" for i in range(photos))
    for split in ("train", "valid"):
        (folder / f"{split}.txt").write_text(text)
    for i in range(photos):
        Image.new("RGB", (40 + i, 40 + colour), (colour, i, 0)).save(folder / "images" / f"{i}.png")
    return str(folder)


def test_features_of_another_folder_of_the_same_name_are_not_taken(flags, tmp_path, encoder_dir, capsys):
    """Also not after photos were replaced; a data set that was only renamed goes on with its features."""
    a, b = (own_folder(tmp_path / name / "data", colour) for name, colour in (("a", 10), ("b", 90)))
    places, renamed = ("--cache-dir", tmp_path, "--img-size", 32), tmp_path / "renamed"
    path = extract(*places, "--dataset", a)
    flags = ["--cache-dir", tmp_path, "--text-encoder", encoder_dir, "--epochs", 1]
    run([*flags, "--img-size", 32], tmp_path / "run-a", "--dataset", a)
    assert f"made from {a}/images" in capsys.readouterr().out
    other = f"made of other photos than those here: .*made from {a}/images"
    with pytest.raises(ValueError, match=other):
        run([*flags, "--img-size", 32], tmp_path / "run-b", "--dataset", b)
    with pytest.raises(ValueError, match=other):
        extract(*places, "--dataset", b)
    shutil.copytree(a, renamed)
    flags += ["--features", path]
    run(flags, tmp_path / "run-c", "--dataset", renamed)
    shutil.rmtree(renamed / "images")
    capsys.readouterr()
    run(flags, tmp_path / "run-d", "--dataset", renamed)
    assert "6 of its photos are not here (--images names their folder)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=other):
        run(flags, tmp_path / "run-e", "--dataset", renamed, "--images", f"{b}/images")
    with pytest.raises(FileNotFoundError, match="no image folder .*imagse"):
        run(flags, tmp_path / "run-g", "--dataset", renamed, "--images", f"{a}/imagse")
    evaluate.main(["--run", str(tmp_path / "run-a"), "--image-check", "--data-dir", str(renamed)])
    Image.new("RGB", (9, 9)).save(Path(a) / "images" / "3.png")
    with pytest.raises(ValueError, match=other):
        run(flags, tmp_path / "run-f", "--dataset", a)


@pytest.mark.parametrize("more, message", [
    (["--img-size", 224], "no feature file .*demo-resnet50-224.h5; make it with extract_features.py"),
    (["--features", "mnre-resnet50-64.h5"], "no row for .*; it was made for mnre. "),
    (["--features", "demo-clip-96.h5"], "made with --backbone clip, roberta-resnet50 needs resnet50"),
    (["--model", "vilt", "--features", "demo-pixels-96.h5"], "it is a bert, not a vilt"),
    (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
    (["--device", "meta"], "--device meta: cannot be used here"),
    (["--data-dir", "absent"], "no train file of demo under absent/"),
    (["--text-encoder", "absent/encoder"], "--text-encoder absent/encoder: cannot be loaded"),
    (["--max-len", 600], "--max-len 600: .* takes 512"),
    (["--max-len", 5], "--max-len 5 leaves 3 sub-tokens"),
    (["--heads", 7, "--fusion", "bimodal"], "7 heads do not divide token states of width 64"),
    (["bert-caption", "--fusion", "pyramid"],
        r"\A--fusion pyramid: the regions of \S+ are no places in a photo; .*\Z"),
    (["--init", "nowhere"], "nowhere: no config.json, so no run of train.py"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    flags, tmp_path, data_dir, cache_dir, more, message
):
    if more[0] == "bert-caption":
        more = [*system_flags("bert-caption", data_dir), *more[1:]]
    more = [cache_dir / arg if str(arg).endswith(".h5") else arg for arg in more]
    flags = flags[:6] + flags[8:] if "--features" in more else flags  # without --img-size
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(flags, tmp_path / "run", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_users_mistake_is_one_line_and_no_traceback(data_dir, tmp_path):
    shutil.copytree(data_dir / "demo", tmp_path / "demo")
    valid = tmp_path / "demo" / "valid.txt"
    with open(valid, "a", encoding="utf-8") as file:
        file.write("IMGID:x\nword B-PER\n")
    line = valid.read_text(encoding="utf-8").count("\n")
    result = run_script(tmp_path, "train.py", "--dataset", "demo", "--data-dir", tmp_path)
    found = "found 'word B-PER'; keep one word and one label, a tab between them"
    expected = f"train.py: error: {valid}:{line}: expected word<TAB>label, {found}\n"
    assert (result.returncode, result.stderr, result.stdout) == (1, expected, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def test_a_finished_run_is_checked_on_its_own_data_and_features_wherever_they_are(
    flags, tmp_path, data_dir, cache_dir
):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    config = json.loads((folder / "config.json").read_text())
    for part, key, message in (
        ("data", "test", "not the file of"), ("features_made", "sha256", "not the features")
    ):
        changed = json.loads(json.dumps(config))
        changed[part][key] = {"sha256": "0", "file": "f"} if part == "data" else "0"
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            evaluate.main(["--run", str(folder), "--image-check"])
    (folder / "config.json").write_text(json.dumps(config | {"data_dir": "gone", "features": "gone.h5"}))
    with pytest.raises(FileNotFoundError, match="under gone/"):
        evaluate.main(["--run", str(folder), "--image-check"])
    now = ["--data-dir", str(data_dir), "--features", str(cache_dir / "demo-resnet50-64.h5")]
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1", *now])
    check = json.loads((folder / "image-check-test.json").read_text())
    assert check["photos"] == 8 and len(check["shuffled"]) == 1
    metrics = json.loads((folder / "metrics-test.json").read_text())
    assert check["true"] | {"data": metrics["data"]} == metrics
