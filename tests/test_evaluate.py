"""evaluate.py stores scores where it may, and prints them all the same where it may not."""

import errno
import json
import os
import shutil

import pytest
from test_runs import contents
from test_train import run

import evaluate


@pytest.fixture(scope="module")
def finished(data_dir, encoder_dir, tmp_path_factory):
    flags = ["--data-dir", data_dir, "--text-encoder", encoder_dir, "--fusion", "none", "--epochs", 1]
    return run(flags, tmp_path_factory.mktemp("runs") / "finished")


@pytest.mark.parametrize("check", [(), ("--image-check",)])
def test_scores_are_printed_where_none_can_be_stored(finished, tmp_path, capsys, monkeypatch, check):
    """Folders of a colleague: read-only for us."""
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("a", "b")]
    evaluate.main(["--run", *map(str, runs), *check])
    stored = capsys.readouterr().out
    before = [contents(folder) for folder in runs]
    real = os.open

    def read_only(path, flags, *mode, **more):
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", read_only)
    evaluate.main(["--run", *map(str, runs), *check])
    lines = capsys.readouterr().out.splitlines()
    name = "image-check-test.json" if check else "metrics-test.json"
    refused = [f"    not stored: {folder / name}: Read-only file system" for folder in runs]
    assert [line for line in lines if line not in refused] == stored.splitlines()
    assert [line for line in lines if line in refused] == refused
    assert [contents(folder) for folder in runs] == before


@pytest.mark.parametrize("content", ["mine", '{"task": "mine"}', "[" * 100_000, "link", "folder"])
def test_scores_of_a_file_replace_no_file_of_ones_own(tmp_path, capsys, content):
    predictions, other = tmp_path / "theirs.txt", tmp_path / "theirs.txt.metrics.json"
    predictions.write_text("Ann B-PER B-PER\nis O O\n")
    if content == "folder":
        other.mkdir()
    elif content == "link":
        (tmp_path / "mine").write_text("mine")
        other.symlink_to(tmp_path / "mine")
    else:
        other.write_text(content)
    mode = other.lstat()
    evaluate.main(["--predictions", str(predictions)])
    out = capsys.readouterr().out
    assert "token level" in out and f"not stored: {other}: " in out
    assert other.lstat().st_ino == mode.st_ino
    assert content == "folder" or other.read_text() == ("mine" if content == "link" else content)


def test_scores_of_a_file_replace_those_of_before(tmp_path, capsys):
    predictions = tmp_path / "theirs.txt"
    for predicted, f1 in (("B-PER", 1.0), ("O", 0.0)):
        predictions.write_text(f"Ann B-PER {predicted}\nis O O\n")
        evaluate.main(["--predictions", str(predictions)])
        assert json.loads((tmp_path / "theirs.txt.metrics.json").read_text())["entity"]["f1"] == f1
    assert "not stored" not in capsys.readouterr().out
