"""A run travels: the README.md of its folder, of which what is its user's stays; and runs of a hub."""

import json
from pathlib import Path

import pytest
from conftest import run

import evaluate
import predict
import report
from parts import run_files
from parts.model_card import photos_line
from parts.run_files import find_run
from parts.runs import CARD


@pytest.fixture(scope="module")
def seeing(flags, tmp_path_factory):
    return run(flags, tmp_path_factory.mktemp("card") / "film", "--epochs", 1)


def test_the_image_check_is_put_in_and_what_a_user_wrote_stays(seeing):
    card = seeing / "README.md"
    mine = card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "Mine.\n"
    card.write_text(mine)
    evaluate.main(["--run", str(seeing), "--image-check", "--shuffles", "1"])
    changed = [pair for pair in zip(mine.split("\n"), card.read_text().split("\n"), strict=True)
               if pair[0] != pair[1]]  # fmt: skip
    ((before, after),) = changed
    check = json.loads((seeing / "image-check-test.json").read_text())
    assert before.startswith("Image check, test: not done")
    true = f"{check['true']['entity']['f1']:.3f}"
    assert after.startswith(f"Image check, test: entity F1 {true} with each post's own photo, ")


def test_a_readme_of_ones_own_is_left_alone(seeing, flags, capsys):
    """And a card goes with its run."""
    card = seeing / "README.md"
    card.write_text("Mine.")
    run(flags, seeing, "--epochs", 1, "--fusion", "none", "--overwrite")
    assert "README.md: not a model card of train.py" in capsys.readouterr().out
    evaluate.main(["--run", str(seeing), "--image-check", "--shuffles", "1"])
    assert card.read_text() == "Mine."
    card.unlink()
    for fusion, checks in (("film", 1), ("none", 0)):
        run(flags, seeing, "--epochs", 1, "--fusion", fusion, "--overwrite")
        assert CARD in card.read_text() and card.read_text().count("Image check, ") == checks
    assert "- Photos: none: text only\n" in card.read_text()


@pytest.mark.parametrize("made, line", [
    ({"backbone": "elsewhere", "weights": "mine"}, "regions made elsewhere (mine); features 0123456789abc"),
    ({"backbone": "auto", "encoder": "dinov2", "weights": "x", "img_size": 224, "fit": "pad", "grid": 7,
      "boxes_sha256": "1"}, "dinov2, weights x, size 224, fit pad, grid 7, a region for each box; features"),
    ({"backbone": "clip", "weights": "x", "img_size": 96, "shuffled": 1},
     "clip, weights x, size 96; **a control: other posts' photos were shown**; features"),
])  # fmt: skip
def test_how_photos_were_looked_at_is_said(made, line):
    of_file = made | {"sha256": "0123456789abcdef1"}
    assert photos_line({"shuffle_photos": "shuffled" in made, "features_made": of_file}).startswith(line)


@pytest.fixture
def hub(seeing, tmp_path, monkeypatch):
    """A hub that has one run, "me/mine", as huggingface_hub's cache lays it: links. What it was asked for."""
    snapshot, asked = tmp_path / "snapshots" / "0123", []
    for path in [path for path in seeing.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(seeing)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "me/mine":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str(snapshot)

    monkeypatch.setattr(run_files, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_run_of_a_hub_is_answered_with_scored_and_shown(seeing, hub, capsys):
    post = {"words": ["Jordan", "in", "Paris"]}
    assert predict.Predictor("me/mine")(post) == predict.Predictor(seeing)(post)
    predict.main(["--run", "me/mine", "--text", "Jordan"])
    capsys.readouterr()
    evaluate.main(["--run", "me/mine"])
    of_hub = capsys.readouterr().out.split("\n", 1)[1].partition("    not stored: ")[0]
    evaluate.main(["--run", str(seeing)])
    assert of_hub and of_hub == capsys.readouterr().out.split("\n", 1)[1]
    assert report.main(["--run", "me/mine", "--output", "page.html"]) == Path("page.html")
    names, patterns = zip(*hub, strict=True)
    assert names == ("me/mine",) * 4
    assert {*patterns[0]} == {"config.json", "model.safetensors", "encoder/*", "log.jsonl",
                              "predictions-*.jsonl", "metrics-*.json", "image-check-*.json"}  # fmt: skip


def test_a_name_that_is_no_run_is_one_line_and_a_folder_asks_no_hub(seeing, hub):
    with pytest.raises(FileNotFoundError) as error:
        find_run("you/none")
    assert str(error.value) == ("you/none: no such folder, and the hub does not give it (404 Client Error.);"
                                " name a folder under runs/, or a run there")  # fmt: skip
    hub.clear()
    Path("runs").mkdir()
    for name in ("runs/typo", "mine", str(seeing), "../x", "a/b/c"):
        assert find_run(name) == Path(name)
    assert not hub
