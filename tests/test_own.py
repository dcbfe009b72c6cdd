"""A fusion, loss and system of one's own, from outside: examples/own.py, as docs/OWN.md shows it."""

import json
import runpy
import shutil
import sys
from importlib.machinery import PathFinder

from forked import PROJECT, run_script

from align import ALIGNMENTS
from fusion import FUSIONS
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
