"""benchmarks/tables.py as run by a user on tiny data: what it would run, wrote, and does not run again."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import tables
from conftest import backbone_flags
from forked import run_script

import extract_features
import train
from parts.checks import paired_bootstrap
from parts.scores import main_score, read_predictions

DEMO = "epochs15-lr0.001-fusion-lr0.001-img96"  # what tables.py sets for the demo, in a run's name


@pytest.fixture(scope="module")
def place(data_dir, tmp_path_factory):
    """A folder with data/ and features/, as a user has them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").symlink_to(data_dir)
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", folder / "features", "--workers", 0]
    kind = next(kind for kind in backbone_flags(data_dir) if "random" in kind)
    extract_features.main([str(arg) for arg in [*flags, *kind, "--img-size", 96]])
    return folder


def test_every_reference_row_is_there_and_its_command_is_a_run(tmp_path):
    rows = tables.all_rows()
    counts = {table: sum(row.table == table for row in rows) for table in tables.TITLES}
    assert counts == {"fusion": 12, "settings": 12, "systems": 12, "published": 5, "captions": 5, "notes": 12,
                      "base": 2, "few-shot": 4, "relations": 5, "demo": 9, "demo-notes": 13}  # fmt: skip
    assert len({row.key for row in rows}) == len(rows)
    args, folders = tables.parse_args(["--runs", str(tmp_path)]), {}
    for row in rows:
        for shuffled in {False, bool(row.control)}:
            argv = tables.argument_list(row, 1338, args, shuffled)
            made = vars(train.parse_args(argv))
            made.pop("features")
            assert made["seed"] == 1338 and made["shuffle_photos"] == (
                shuffled and row.control == "--shuffle-photos"
            )
            assert made["shuffle_notes"] == (shuffled and row.control == "--shuffle-notes")
            assert folders.setdefault(made["run_dir"], made) == made  # one folder, one set of settings
    # The defaults of train.py where a table names none; FiLM; the rate of the settings is that of the fusion.
    settings = tables.argument_list(next(row for row in rows if row.key == "settings/7/16/0.0020/256/mnre"),
                                    1337, args)  # fmt: skip
    made, plain = train.parse_args(settings), train.parse_args(["--dataset", "mnre"])
    assert (made.epochs, made.batch_size, made.fusion_lr, made.img_size, made.fusion) == (
        7, 16, 0.002, 256, "film",
    )  # fmt: skip
    assert made.lr == plain.lr == 3e-5 and made.model == "bert-resnet50"
    other = tables.parse_args(["--text-encoder", "mine", "--lr", "1e-4", "--runs", "r"])
    made = train.parse_args(tables.argument_list(rows[1], 1337, other))
    assert (made.text_encoder, made.lr, made.fusion_lr) == ("mine", 1e-4, 1.1e-3)


def test_references_are_judged():
    """Published values that are no better than one answer for all, and those that are no weighted scores."""
    notes = {row.key: "; ".join(tables.judged(row)) for row in tables.all_rows() if row.reference}
    assert [key for key, note in notes.items() if "equals always" in note] == ["fusion/attention/twitter2015"]
    assert [key for key, note in notes.items() if "below always" in note] == ["systems/blip/mnre"]
    unweighted = {key for key, note in notes.items() if "no weighted token score" in note}
    first = "settings/5/12/0.0011/224/"
    assert unweighted == {
        key for key in notes
        if (key.startswith("settings") and key not in (f"{first}twitter2015", f"{first}twitter2017"))
        or (key.startswith("systems") and key.endswith("mnre"))
    }  # fmt: skip


def test_dry_run_shows_commands_and_writes_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    tables.main(["--dry-run", "--only", "demo/", "fusion/film/mnre"])
    out = capsys.readouterr().out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  python train.py ")]
    assert (
        len(commands) == 10
        and out.count("of 6 runs are finished") == 9
        and out.count("of 3 runs are finished") == 1
    )
    for command in commands:
        train.parse_args(command[2:])
    assert sorted(place.rglob("*")) == before
    tables.main(["--dry-run", "--only", "notes/none", "demo-notes"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
    assert shown == ["notes/none/twitter2017", "notes/none, crf/twitter2017",
                     *(row.key for row in tables.all_rows() if row.table == "demo-notes")]  # fmt: skip
    with pytest.raises(ValueError, match="--only nothing: no such row"):
        tables.main(["--only", "nothing"])


def forked(command, **streams):
    """subprocess.run of a script, with its imports done."""
    done = run_script(Path.cwd(), *command[1:])
    assert not streams.get("check") or done.returncode == 0, done.stderr
    return done


def test_rows_are_run_once_and_written_twice(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(tables.subprocess, "run", forked)
    tables.main(["--only", "demo/film", "fusion/film/mnre", "--seeds", "1"])
    out, results = capsys.readouterr().out, place / "benchmarks" / "RESULTS.md"
    assert "left out: no feature file features/mnre-resnet50-224.h5" in out
    true, wrong = (place / "runs" / f"demo-roberta-resnet50-encoder-film-{DEMO}{part}-s1"
                   for part in ("", "-shuffled"))  # fmt: skip
    metrics = [json.loads((folder / "metrics-test.json").read_text()) for folder in (true, wrong)]
    check = json.loads((true / "image-check-test.json").read_text())
    text = results.read_text()
    cells = [cell.strip() for cell in re.search(r"\n\| film \| (.*) \|\n", text)[1].split("|")]
    gain = paired_bootstrap(
        *([read_predictions(folder / "predictions-test.jsonl")] for folder in (true, wrong))
    )
    shuffled = sum(map(main_score, check["shuffled"])) / 3
    gain = f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
    rates = [metrics[0]["token"]["accuracy"], main_score(metrics[0]), main_score(metrics[1]), shuffled]
    accuracy, *scores = (f"{value:.4f}" for value in (*rates, main_score(check["none"])))
    assert cells == ["1 + 1", accuracy, scores[0], gain, *scores[1:]]
    assert f"majority label: {metrics[0]['baseline']['accuracy']:.4f} (demo)." in text
    assert "text encoder encoder, resnet50 features of weights random-" in text and str(place) not in text
    of_fusion = text.split("## Fusion layers")[1].split("\n## ")[0]
    assert "Not run, 12 of 12 rows (film; attention; cross-attention; bimodal): " in of_fusion
    assert "tables.py --only fusion/`" in of_fusion and "| film" not in of_fusion
    values = list(csv.DictReader(open(place / "benchmarks" / "results.csv", encoding="utf-8", newline="")))
    of_row = {"table": "demo", "row": "film", "data set": "demo"}
    assert of_row | {"column": "main F1", "value": cells[2]} in values
    assert all(value.items() >= of_row.items() for value in values)  # of what was not run there are none

    def never(*args, **kwargs):
        raise AssertionError("run again")

    monkeypatch.setattr(tables.subprocess, "run", never)
    tables.main(["--only", "demo/film", "--seeds", "1"])
    assert results.read_text() == text
    (wrong / "metrics-test.json").rename(wrong / "kept")  # as a kill before the end leaves it
    with pytest.raises(AssertionError, match="run again"):
        tables.main(["--only", "demo/film", "--seeds", "1"])
    (wrong / "kept").rename(wrong / "metrics-test.json")
    config = json.loads((true / "config.json").read_text())
    (true / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    with pytest.raises(
        ValueError, match=f"{DEMO}-s1 is another run, lr .its: 0.5, this row.s: 0.001.; name another folder"
    ):
        tables.main(["--only", "demo/film", "--seeds", "1"])
    # A row that is not asked for does not stop the others.
    here = ["--only", "fusion/film/mnre", "--seeds", "1", "--output"]
    tables.main([*here, "elsewhere"])
    assert f"film-{DEMO}-s1 is another run, lr" in (place / "elsewhere" / "RESULTS.md").read_text()
    tables.main([*here, "benchmarks"])  # what was measured stays, though its run is not here any more
    assert results.read_text() == text
    (true / "config.json").write_text(json.dumps(config))


def test_every_figure_stands_in_the_page_and_no_cell_is_long():
    """Of the results that come with the project."""
    folder = Path(tables.__file__).parent
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    for (table, row, _), columns in tables.read_results(folder / "results.csv").items():
        section = text.split(f"\n## {tables.TITLES[table]}\n")[1].split("\n## ")[0]
        (line,) = (line for line in section.splitlines() if line.startswith(f"| {row} |"))
        for column, value in columns.items():
            if column in ("notes", "majority"):
                assert value in section, (table, row, column)
            elif column not in ("data", "made with", "flags"):
                assert value in line, (table, row, column)
    cells = [cell for line in text.splitlines() if line.startswith("| ") for cell in line.split("|")]
    assert len(cells) > 500 and max(len(cell.split()) for cell in cells) <= 12


def test_a_run_that_fails_says_why_and_the_others_go_on(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(tables.subprocess, "run", forked)
    flags = ("--fusion", "none", "--epochs", 1)
    rows = [
        tables.Row("demo", name, "demo", (*flags, "--model", model, "--text-encoder", encoder), control="")
        for name, model, encoder in (
            ("broken", "bert-resnet50", "absent/encoder"), ("none", "roberta-resnet50", "data/demo/encoder")
        )
    ]
    monkeypatch.setattr(tables, "all_rows", lambda: rows)
    tables.main(["--seeds", "1", "--output", "out", "--runs", "others"])
    assert (
        "FAILED: train.py: error: --text-encoder absent/encoder: cannot be loaded" in capsys.readouterr().out
    )
    text = (place / "out" / "RESULTS.md").read_text()
    assert "Not run, 1 of 2 rows (broken): train.py: error: --text-encoder absent/encoder" in text
    assert "\n| none | 1 | 0." in text and "| broken |" not in text
