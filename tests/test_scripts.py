"""Data of one's own in every script, a full disk, a folder that takes nothing."""

import json
import random
import shutil

import pytest
from conftest import json_lines, run
from forked import run_script
from test_opening import extract

import evaluate
import extract_features
import predict
import report
import train
from features import FeatureCache


def look_at(folder, own):
    """Every command on a run, trained on data of one's own."""
    for command in (["--run", folder], ["--run", folder, "--image-check"], ["--leak-check", own],
                    ["--compare", folder, folder]):  # fmt: skip
        evaluate.main([str(part) for part in command])
    report.main(["--run", str(folder)])


def limited(folder, megabytes, *command):
    """Run a script where no file may grow past a size, as on a full disk: the one line of its error."""
    result = run_script(folder, *command, limit=int(megabytes * 1e6))
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    return errors[0]


def test_a_full_disk_is_one_clear_line_and_earlier_results_stay(flags, tmp_path, data_dir):
    """Writing stops in weights, in a state, in features; nothing half-written gets a finished name."""
    flags, folder = [*flags, "--fusion", "none", "--epochs", 1], tmp_path / "run"
    command = ["train.py", *flags, "--dataset", "demo", "--run-dir", folder]
    limited(tmp_path, 0.2, *command)
    assert not [*folder.glob("*.safetensors*"), *folder.glob("state.pt*"), *folder.glob("predictions*")]
    limited(tmp_path, 0.6, *command, "--resume", "--save-every", 0)
    assert not list(folder.glob("state.pt*"))
    run(flags, folder, "--resume")  # with room again
    assert (folder / "metrics-test.json").exists()
    places = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", tmp_path, "--img-size", 64]
    more = ("--weights", "random", "--workers", 0, "--views", 1)
    limited(tmp_path, 0.3, "extract_features.py", *places, *more)
    assert not list(tmp_path.glob("*.h5"))
    assert all(map(FeatureCache(extract(*places)).whole, range(40)))


def test_a_folder_that_cannot_be_written_is_one_clear_line(data_dir):
    """/sys takes no new folder, from root neither."""
    places = ["--dataset", "demo", "--data-dir", data_dir]
    for command in (
        ["train.py", *places, "--fusion", "none", "--text-encoder", data_dir / "demo" / "encoder",
         "--run-dir", "/sys/run"],
        ["extract_features.py", *places, "--weights", "random", "--img-size", 64,
         "--cache-dir", "/sys/features"],
    ):  # fmt: skip
        assert "/sys/" in limited("/", 100, *command)


def test_your_own_data_in_every_script(flags, tmp_path, data_dir, capsys):
    """A folder with labels of its own, space separated, in several scripts, a post longer than --max-len."""
    own, photos = tmp_path / "own", data_dir / "demo" / "images"
    (own / "images").mkdir(parents=True)
    posts = {"train": ["東 京 が 好き", "Ада пишет"] * 8, "valid": ["Ада в 東"] * 3,
             "test": ["مرحبا Ада", "東 " * 60, "x"]}  # fmt: skip
    for split, texts in posts.items():
        lines = []
        for i, text in enumerate(texts):
            shutil.copy(photos / "train_0000.jpg", own / "images" / f"{split}{i}.jpg")
            kinds = {"東": "B-地名", "Ада": "B-имя"}
            lines += [f"IMGID:{split}{i}", *(f"{word} {kinds.get(word, 'O')}" for word in text.split()), ""]
        (own / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    path = extract(*places, "--img-size", 32)
    assert path.name == "own-resnet50-32.h5"
    folder = run(flags, tmp_path / "run", *places, "--img-size", 32, "--max-len", 32)
    out = capsys.readouterr().out
    assert "test: 1 cut posts, 30 cut words" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["labels"] == ["O", "B-имя", "I-имя", "B-地名", "I-地名"]
    metrics = json.loads((folder / "metrics-test.json").read_text())
    assert metrics["entity"]["gold"] == 61 and metrics["words"] == 63  # gold is counted from the data set
    look_at(folder, own)
    predict.main(["--run", str(folder), "--text", "Ада в 東京", "--image", str(photos / "train_0000.jpg")])
    (tmp_path / "moved").mkdir()
    own.rename(tmp_path / "moved" / "own")
    with pytest.raises(FileNotFoundError, match="no train file of own"):
        evaluate.main(["--run", str(folder), "--image-check"])
    evaluate.main(["--run", str(folder), "--image-check", "--data-dir", str(tmp_path / "moved")])
    assert (folder / "report-test.html").exists() and "runs" not in {p.name for p in tmp_path.iterdir()}


def test_your_own_relations_in_every_script(flags, tmp_path, data_dir, capsys):
    """A folder of rows with relations of its own, most with a photo; the system follows from train.txt."""
    own, rng = tmp_path / "own", random.Random(0)
    for split, count in (("train", 24), ("dev", 6), ("test", 7)):
        (own / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            words = rng.choices(["Messi", "joins", "BBC", "today"], k=4)
            rows.append({
                "token": words, "h": {"name": words[0], "pos": [0, 1]},
                "t": {"name": words[3], "pos": [3, 4]}, "img_id": f"{split}{i}.jpg" if i else None,
                "relation": ("worksFor", "NA", "bornIn")[i % 3],
            })  # fmt: skip
            shutil.copy(data_dir / "demo" / "images" / "train_0000.jpg", own / "images" / f"{split}{i}.png")
        (own / f"{split}.txt").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    assert train.parse_args(places).model == "bert-resnet50"
    path = extract(*places, "--img-size", 32)
    out = capsys.readouterr().out
    for line in (f"{path}: 34 photos, 34 ok, 0 missing", "train: 1 of 24 rows name no photo",
                 "ok, but: train1.jpg (taken from 'train1.png')"):  # fmt: skip
        assert line in out
    folder = run(flags, tmp_path / "run", *places, "--img-size", 32, "--fusion", "bimodal")
    out = capsys.readouterr().out
    assert "           train: 'NA' read as 'None', no relation (8 rows)\n" in out
    assert "train: 23 of 24 posts have a photo" in out
    config = json.loads((folder / "config.json").read_text())
    assert (config["task"], config["labels"]) == ("relation", ["None", "bornIn", "worksFor"])
    assert json.loads((folder / "metrics-test.json").read_text())["relation"]["gold"] == 5
    records = json_lines(folder / "predictions-test.jsonl")
    assert (records[0]["id"], records[0]["image_id"], records[0]["photo"]) == ("row 1", None, False)
    assert (records[1]["id"], records[1]["gold"], records[1]["photo"]) == ("test1.jpg@2", "None", True)
    look_at(folder, own)
    spans = ["--head", "0", "1", "--tail", "2", "3"]
    predict.main(["--run", str(folder), *spans, "--words", "Messi", "joins", "BBC"])
    assert any(label in capsys.readouterr().out for label in config["labels"])


def test_posts_without_photo_in_every_script(flags, tmp_path, capsys):
    """Files without IMGID lines, in IOB1, split by lines of a tab."""
    own = tmp_path / "own"
    own.mkdir()
    for split in ("train", "valid", "test"):
        (own / f"{split}.txt").write_text("Messi\tI-PER\njoins\tO\n\t\nBBC\tI-ORG\n\t\n" * 4)
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    folder = run(flags, tmp_path / "run", *places, "--fusion", "none")
    out = capsys.readouterr().out
    for line in ("no IMGID line: 8 posts without photo", "IOB1 labels read as BIO, 8 changed"):
        assert out.count(f"train: {line}\n") == 1
    records = json_lines(folder / "predictions-test.jsonl")
    assert [(r["id"], r["image_id"], r["gold"]) for r in records[:2]] == [
        ("line 1", None, ["B-PER", "O"]), ("line 4", None, ["B-ORG"]),
    ]  # fmt: skip
    look_at(folder, own)
    assert "0 photos;" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no post of own names a photo; --fusion none trains on the text"):
        run(flags, tmp_path / "film", *places, "--fusion", "film")
    with pytest.raises(ValueError, match="no post of .*own names a photo: there is nothing to extract"):
        extract_features.main(places)
