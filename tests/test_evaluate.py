"""evaluate.py stores scores where it may, and prints them all the same where it may not."""

import argparse
import errno
import json
import os
import re
import shutil

import pytest
import torch
from conftest import contents, run
from test_checks import make_runs

import evaluate
import predict
import report
from parts.checks import ensemble, paired_bootstrap
from parts.files import write_json, write_json_lines
from parts.opening import open_run
from parts.scores import read_predictions, score


@pytest.fixture(scope="module")
def finished(data_dir, encoder_dir, tmp_path_factory):
    flags = ["--data-dir", data_dir, "--text-encoder", encoder_dir, "--fusion", "none", "--epochs", 1]
    return run(flags, tmp_path_factory.mktemp("runs") / "finished")


@pytest.mark.parametrize("command", [evaluate, predict, report])
def test_help_says_what_each_option_is_and_its_default(command, monkeypatch, capsys):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: parsers.append(parser))
    with pytest.raises(AttributeError):  # it goes on with the arguments
        command.parse_args([]).run
    (parser,) = parsers
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help and len(action.help) < 80, action.dest
        if action.default not in (None, False, argparse.SUPPRESS, (1, 1)):
            assert re.search(rf"{action.option_strings[0]}.*?default: {action.default}", text), action.dest


@pytest.mark.parametrize("dataset, split", [("demo", "test"), ("mnre", "valid")])
def test_an_ensemble_answers_by_the_mean_of_its_runs(data_dir, encoder_dir, tmp_path, capsys, dataset, split):
    """Against each post by itself, unpadded, through every model; of two alike it is what either answers."""
    flags = ["--data-dir", data_dir, "--text-encoder", encoder_dir, "--fusion", "none", "--epochs", 1]
    more = ["--dataset", dataset, "--lr", 1e-3, "--max-len", 8]
    folders = [run(flags, tmp_path / f"run-s{seed}", *more, "--seed", seed) for seed in (1, 2)]
    parts = [open_run(folder, split, "cpu") for folder in folders]
    records, labels = ensemble(folders, split, "cpu"), parts[0][1]["labels"]
    for i, record in enumerate(records):
        with torch.no_grad():
            sides = [model.probabilities(posts.batch([i]))[0] for model, _, _, posts in parts]
        chance, best = (sum(sides) / 2).max(-1)
        if dataset == "mnre":
            assert record["predicted"] == labels[best]
            assert record["probability"] == pytest.approx(chance.item(), abs=1e-5)
            continue
        for label, p, k, mean in zip(record["predicted"], record["probability"], best, chance, strict=False):
            assert label == ("O" if p is None else labels[k])
            assert p is None or p == pytest.approx(mean.item(), abs=1e-5)
    alone = [read_predictions(folder / f"predictions-{split}.jsonl") for folder in folders]
    assert dataset == "mnre" or any(None in record["probability"] for record in records)  # cut off
    free = {"predicted": 0, "probability": 0}
    assert [record | free for record in records] == [record | free for record in alone[0]]
    capsys.readouterr()
    evaluate.main(["--ensemble", str(tmp_path / "run-s*"), "--split", split])
    out, metrics = capsys.readouterr().out, score(records)
    assert out.startswith(f"ensemble of 2 runs, {split} ({tmp_path / 'run-s*'}, seeds 1 2): ")
    result = paired_bootstrap([records], alone)
    assert f"{metrics['token' if dataset == 'demo' else 'row']['accuracy']:.4f}" in out
    assert f"ensemble - mean of each alone {result['difference']:+.4f}, 95% interval" in out
    assert "its use of photos was not checked" in out

    twin = shutil.copytree(folders[0], tmp_path / "twin-s3")
    write_json(twin / "config.json", json.loads((twin / "config.json").read_text()) | {"seed": 3})
    assert [r["predicted"] for r in ensemble([folders[0], twin], split, "cpu")] == [
        r["predicted"] for r in alone[0]
    ]
    with pytest.raises(ValueError, match="twin-s3: one run; an ensemble is of two or more"):
        evaluate.main(["--ensemble", str(twin)])


def test_anybodys_predictions_are_checked_as_a_run_is(tmp_path, capsys):
    runs = make_runs("ner", (1, 2, 3, 4), posts=60)
    files = [tmp_path / name for name in ("true.jsonl", "a.jsonl", "b.jsonl", "none.txt")]
    for path, records in zip(files, runs, strict=True):
        write_json_lines(path, records)
    true, *shuffled, none = map(str, files)
    evaluate.main(["--image-check", "--predictions", true, "--shuffled", *shuffled, "--none", none])
    out = capsys.readouterr().out
    result = paired_bootstrap(runs[:1], runs[1:3])
    check = json.loads((tmp_path / "true.jsonl.image-check.json").read_text())
    assert check == {"photos": 20, "true": score(runs[0]), "none": score(runs[3]), "bootstrap": result,
                     "shuffled": [score(runs[1]), score(runs[2])]}  # fmt: skip
    assert f"true - shuffled {result['difference']:+.3f}, 95% interval {result['low']:+.3f} to" in out
    assert "F1 with shuffled photos, by type: LOC" in out and "WARNING" not in out

    flags = ["--image-check", "--predictions", true, "--none", none, "--shuffled"]
    evaluate.main([*flags, str(files[0])])
    out = capsys.readouterr().out
    assert f"WARNING: {files[0]}: each answer is that of" in out and "wrong photos do as well" in out
    write_json_lines(files[2], runs[2][1:])
    with pytest.raises(ValueError, match="b.jsonl: not the posts and gold labels of .*true.jsonl"):
        evaluate.main([*flags, str(files[2])])


@pytest.mark.parametrize("check", [(), ("--image-check",)])
def test_scores_are_printed_where_none_can_be_stored(finished, tmp_path, capsys, monkeypatch, check):
    """Folders of a colleague: read-only for us."""
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("a", "b")]
    evaluate.main(["--run", *map(str, runs), *check])
    stored, before = capsys.readouterr().out, [contents(folder) for folder in runs]
    assert check or before[0] == contents(finished)  # scored again as train.py has
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


@pytest.mark.parametrize("content", ["mine", '{"task": "mine"}', "[" * 100_000])
def test_scores_of_a_file_replace_no_file_of_ones_own(tmp_path, capsys, content):
    predictions, other = tmp_path / "theirs.txt", tmp_path / "theirs.txt.metrics.json"
    predictions.write_text("Ann B-PER B-PER\nis O O\n")
    other.write_text(content)
    evaluate.main(["--predictions", str(predictions)])
    out = capsys.readouterr().out
    assert "token level" in out and f"not stored: {other}: " in out and other.read_text() == content


def test_scores_of_a_file_replace_those_of_before(tmp_path, capsys):
    predictions = tmp_path / "theirs.txt"
    for predicted, f1 in (("B-PER", 1.0), ("O", 0.0)):
        predictions.write_text(f"Ann B-PER {predicted}\nis O O\n")
        evaluate.main(["--predictions", str(predictions)])
        assert json.loads((tmp_path / "theirs.txt.metrics.json").read_text())["entity"]["f1"] == f1
    assert "not stored" not in capsys.readouterr().out


@pytest.mark.parametrize("args, message", [
    ("--run r --score f1", "--score goes with --compare"), ("--run r --shuffles 2", "--shuffles goes with"),
    ("--predictions p --split test", "--split goes with"), ("--run r --images i", "--images goes with"),
    ("--compare a b --data-dir d", "--data-dir goes with"), ("--run r --features f", "--features goes with"),
    ("--image-check --predictions p --none n", "needs --shuffled FILE ... and --none FILE"),
    ("--run r --none n", "--none goes with --image-check --predictions"),
    ("--image-check --predictions p --none n --shuffled s --shuffles 2", "--shuffles goes with --run and"),
    ("--image-check --predictions p --none n --shuffled s --features f", "--features goes with --image"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(args.split())
    assert message in capsys.readouterr().err
