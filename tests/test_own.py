"""A fusion, loss, system and features of one's own, from outside: examples/own.py, as docs/OWN.md shows it.
"""

import json
import runpy
import shutil
import sys
from importlib.machinery import PathFinder

import numpy as np
import pytest
from conftest import json_lines, run
from forked import PROJECT, run_script

import evaluate
import predict
import report
from align import ALIGNMENTS
from features import write_features
from fusion import FUSIONS
from parts.datasets import load_dataset
from parts.scores import entity_spans
from parts.systems import PRESETS


def test_a_fusion_a_loss_and_a_system_of_ones_own(data_dir, cache_dir, tmp_path):
    """Copied into a folder of its own: trained, checked and looked at."""
    shutil.copy(PROJECT / "examples" / "own.py", tmp_path)
    shown = (PROJECT / "docs" / "OWN.md").read_text().split("```python\n")[1].split("```")[0].splitlines()
    lines = (tmp_path / "own.py").read_text().splitlines()
    assert {line.split("  # ")[0].removesuffix(" ...") for line in shown} <= {*lines}
    places = ["--data-dir", data_dir, "--cache-dir", cache_dir]
    encoder = ["--text-encoder", data_dir / "demo" / "encoder", "--img-size", "64", "--epochs", "1"]

    def mine(*arguments):
        run = run_script(tmp_path, tmp_path / "own.py", *arguments)
        assert run.returncode == 0, run.stderr
        return run.stdout

    said = mine("train", "--dataset", "demo", "--system", "mine", "--heads", "4", *places, *encoder)
    assert "fusion" in said and "align" in said and "--heads: --fusion add does not read it" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "demo-mine-encoder-epochs1-img64-s1337"
    config = json.loads((folder / "config.json").read_text())
    assert (config["fusion"], config["align"], config["decoder"]) == ("add", {"near": 0.1}, "crf")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss_near"] > 0
    checked = mine("evaluate", "--run", folder, "--image-check", "--shuffles", "1")
    assert "demo-mine-encoder-epochs1-img64-s1337" in checked and "true - shuffled" in checked
    assert "8 of 8 posts, 0 with attention" in mine("report", "--run", folder)


def test_a_data_py_of_ones_own_beside_it_is_not_taken_for_ours(tmp_path, monkeypatch):
    shutil.copy(PROJECT / "examples" / "own.py", tmp_path)
    for name in ("data.py", "mine.py"):
        (tmp_path / name).touch()
    for table, name in ((ALIGNMENTS, "near"), (FUSIONS, "add"), (PRESETS, "mine")):
        monkeypatch.setitem(table, name, None)  # taken out again
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(PROJECT)])  # as PYTHONPATH makes it
    runpy.run_path(str(tmp_path / "own.py"))
    places = [PathFinder.find_spec(name).origin for name in ("data", "mine")]
    assert places == [str(PROJECT / "data.py"), str(tmp_path / "mine.py")]


@pytest.fixture(scope="module")
def of_features(data_dir, flags, tmp_path_factory):
    """(run, feature file, its arrays) of a run on regions of one's own, one photo without."""
    folder, rng = tmp_path_factory.mktemp("mine"), np.random.default_rng(0)
    ids = load_dataset("demo", data_dir).image_ids()
    photos = {image_id: rng.standard_normal((1 + i % 4, 6)) for i, image_id in enumerate(ids)}
    photos["train_0003"] = None
    write_features(folder / "mine.h5", photos, "a model of mine")
    size = flags.index("--img-size")
    more = ["--model", "bert-vision", "--fusion", "attention", "--features", folder / "mine.h5"]
    return run(flags[:size] + flags[size + 2 :], folder / "run", *more), folder / "mine.h5", photos


def test_a_run_on_features_of_ones_own(of_features, capsys):
    """Trained, shown other photos, looked at: attention goes by the region's number."""
    folder, path, photos = of_features
    config = json.loads((folder / "config.json").read_text())
    assert (config["region_dim"], config["features_made"]["weights"]) == (6, "a model of mine")
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1"])
    assert json.loads((folder / "image-check-test.json").read_text())["photos"] == 8
    page = report.main(["--run", str(folder)]).read_text()
    assert "regions made elsewhere (a model of mine)" in page
    assert "8 of 8 posts, 8 with attention" in capsys.readouterr().out
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    for post in json.loads(data)["posts"]:
        count = len(photos[post["photo"]])
        assert post["phrases"] == [f"region {i + 1}" for i in range(count)] and post["boxes"] == []
        assert (post["maps"]["rows"], post["maps"]["columns"]) == (1, count)


def test_new_posts_of_such_a_run(of_features, tmp_path):
    """With their regions it answers as it did in training; without it says that it reads the text alone."""
    folder, path, _ = of_features
    records = json_lines(folder / "predictions-test.jsonl")
    posts = [{"words": record["words"], "image": f"a/{record['image_id']}"} for record in records]
    seeing, blind = predict.Predictor(folder, features=path), predict.Predictor(folder)
    for answer, record in zip(seeing(posts), records, strict=True):
        spans = [(entity["type"], *entity["words"]) for entity in answer["entities"]]
        assert sorted(spans) == sorted(entity_spans(record["predicted"])) and answer["photo"]
    answer = blind(posts[0])
    assert answer["note"] == f"{posts[0]['image']}: regions are made elsewhere; --features names their file"
    assert answer["entities"] == blind({"words": posts[0]["words"]})["entities"]
    assert seeing({"words": ["x"], "image": "other"})["note"] == f"other: not in {path}"
    for name, width, source in (("wide", 7, "a model of mine"), ("another", 6, "another")):
        write_features(tmp_path / name, {"x": np.ones((1, width))}, source)
        with pytest.raises(ValueError, match=f"{name}: regions made by {source}, {width} wide; the run's "):
            predict.Predictor(folder, features=tmp_path / name)
    with pytest.raises(ValueError, match="--weights x: the run's regions were made elsewhere"):
        predict.Predictor(folder, weights="x")


def test_a_photo_that_the_file_lacks_is_named(of_features, flags, tmp_path):
    write_features(tmp_path / "few.h5", {"a": np.ones((1, 2))})
    size = flags.index("--img-size")
    more = ["--model", "bert-vision", "--features", tmp_path / "few.h5"]
    with pytest.raises(ValueError, match="no row for 40 of demo's 40 photos .first: train_0000.; give "):
        run(flags[:size] + flags[size + 2 :], tmp_path / "run", *more)
