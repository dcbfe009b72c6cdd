"""Tables of many runs, against scores and the bootstrap taken by hand; on runs of made-up predictions."""

import csv
import statistics

import numpy as np
import pytest
from conftest import CONFIG
from PIL import Image
from test_checks import make_runs

import evaluate
from parts.checks import paired_bootstrap, score_of
from parts.files import write_json, write_json_lines
from parts.run_table import FACTS, run_table, seeds_of
from parts.scores import main_score, score

DATA = {"valid": {"file": "v"}, "test": {"file": "t"}}


def write_run(folder, splits, **changed):
    """A run folder with predictions, {split: records}, and a configuration."""
    folder.mkdir()
    write_json(folder / "config.json", CONFIG | {"dataset": "d", "data": DATA, "fusion_lr": 1e-3} | changed)
    for split, records in splits.items():
        write_json_lines(folder / f"predictions-{split}.jsonl", records)
    return folder


def predictions(*kept, task="ner"):
    """{split: records}: a share `kept` of the labels of each split is right."""
    names = ("valid", "test")[: len(kept)]
    return {name: make_runs(task, (round(100 * share),), kept=share)[0]
            for name, share in zip(names, kept, strict=True)}  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """{name: {split: records}}: text only, and FiLM at three rates; the best on test is not that on valid."""
    made = {}
    for name, seed, shares, changed in (
        ("none-s1", 1, (0.50, 0.51), {"fusion": "none"}), ("none-s2", 2, (0.52, 0.53), {"fusion": "none"}),
        ("slow-s1", 1, (0.60, 0.99), {"fusion_lr": 1e-4}),
        ("film-s1", 1, (0.80, 0.70), {}), ("film-s2", 2, (0.81, 0.72), {}), ("film-s3", 3, (0.82, 0.71), {}),
        ("film-shuffled-s1", 1, (0.98, 0.52), {"shuffle_photos": True}),
        ("fast-s1", 1, (0.61, 0.60), {"fusion_lr": 1e-2}),
    ):  # fmt: skip
        made[name] = predictions(*shares)
        write_run(tmp_path / name, made[name], seed=seed, **changed)
    return made


def main_scores(runs, names, split):
    return [main_score(score(runs[name][split])) for name in names]


FILM = ("film-s1", "film-s2", "film-s3")


def test_a_row_is_the_mean_of_its_seeds_and_valid_chooses(runs, tmp_path):
    table = run_table([tmp_path / "*"], baseline=str(tmp_path / "none-s*"))
    assert table.keys == ["fusion", "fusion_lr", "shuffle_photos"] and table.splits == ["valid", "test"]
    order = [tuple(row.settings[key] for key in table.keys) for row in table.rows]
    rates = [(1e-4, False), (1e-3, False), (1e-3, True), (1e-2, False)]
    assert order == [*(("film", *rate) for rate in rates), ("none", 1e-3, False)]
    assert [row.chosen for row in table.rows] == [False, True, False, False, False]
    film, none = table.rows[1], table.rows[4]
    for split in ("valid", "test"):
        assert list(film.scores[split].values()) == main_scores(runs, FILM, split)
    by_hand = paired_bootstrap([runs[name]["test"] for name in FILM[:2]],
                               [runs[f"none-s{seed}"]["test"] for seed in (1, 2)])  # fmt: skip
    assert film.gain == by_hand | {"shared": 2} and none.gain is None
    assert table.rows[0].gain["shared"] == 1

    header, body = table.cells()
    assert header == ["", "fusion", "fusion-lr", "shuffle-photos", "seeds", "valid", "test",
                      "gain [95% interval]"]  # fmt: skip
    valid, test = (main_scores(runs, FILM, split) for split in ("valid", "test"))
    means = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in (valid, test)]
    gain = f"{by_hand['difference']:+.4f} [{by_hand['low']:+.4f}, {by_hand['high']:+.4f}] n=2"
    assert body[1] == ["*", "film", "0.001", "no", "3", *means, gain]
    (alone,) = main_scores(runs, ["fast-s1"], "test")
    assert body[3][4] == "one seed" and body[3][6] == f"{alone:.4f}"
    assert "some rows have fewer seeds" in " ".join(table.notes) and "over none-s* on test" in table.notes[-1]


def test_the_best_of_what_was_swept_is_marked_for_each_of_the_others(runs, tmp_path):
    for name, share, changed in (("a", 0.9, {}), ("b", 0.6, {"fusion_lr": 1e-2})):
        write_run(tmp_path / name, predictions(share, share), fusion="attention", **changed)
    table = run_table([tmp_path / "*"], by=["fusion-lr"])
    assert table.keys == ["fusion", "fusion_lr", "shuffle_photos"]
    chosen = [(row.settings["fusion"], row.settings["fusion_lr"]) for row in table.rows if row.chosen]
    assert chosen == [("attention", 1e-3), ("film", 1e-3)]  # text only has one rate, so no choice
    for by, message in (("rate", "no setting of these runs"), ("model", "the same in all of these runs")):
        with pytest.raises(ValueError, match=f"--by {by}: {message}; they differ in fusion, fusion_lr"):
            run_table([tmp_path / "*"], by=[by])


def test_what_files_hold_is_shown_where_no_option_tells_runs_apart(tmp_path):
    made = {"backbone": "resnet50", "weights": "w", "sha256": "0", "img_size": 9, "seed": 1}
    write_run(tmp_path / "a", predictions(0.5, 0.5), features_made=made, region_dim=4)
    write_run(tmp_path / "b", predictions(0.6, 0.6), fusion="none")
    assert run_table([tmp_path / "*"]).keys == ["fusion"]
    write_run(tmp_path / "c", predictions(0.7, 0.7), features_made=made | {"weights": "x"}, region_dim=4)
    weights = "features_made.weights"
    assert run_table([tmp_path / "[ab]"], by=[weights]).keys == ["fusion", weights]
    keys = run_table([tmp_path / "*"]).keys
    assert weights in keys and {key.partition(".")[0] for key in keys} <= {"fusion", *FACTS}


def test_what_is_no_row_is_said_or_refused(tmp_path):
    write_run(tmp_path / "run-s1", predictions(0.5, 0.5))
    write_run(tmp_path / "run-s2", predictions(0.5), seed=2)  # its test is still to come
    (tmp_path / "run-notes").mkdir()
    (tmp_path / "run.txt").touch()
    table = run_table([tmp_path / "run*"])
    left_out = f"{tmp_path / 'run-notes'} (no run), {tmp_path / 'run-s2'} (not finished)"
    assert len(table.rows) == 1 and table.notes[-1] == f"left out: {left_out}"
    assert not table.rows[0].chosen and table.cells()[0] == ["", "seeds", "valid", "test"]
    with pytest.raises(ValueError, match="no finished run; .*run-s2 .not finished"):
        run_table([tmp_path / "run-s2"])
    with pytest.raises(FileNotFoundError, match="none.: no such run folder"):
        run_table([tmp_path / "none*"])
    write_run(tmp_path / "run-copy", predictions(0.6, 0.6))
    for ask in (lambda: run_table([tmp_path / "run*"]), lambda: seeds_of(tmp_path / "run-[cs]*")):
        with pytest.raises(ValueError, match="run-copy and .*run-s1: one system and one seed"):
            ask()
    splits = predictions(0.5, 0.5)
    write_run(tmp_path / "other", splits | {"test": splits["test"][1:]}, fusion="none")
    with pytest.raises(ValueError, match="other: scored on other posts or gold labels of test"):
        run_table([tmp_path / "run-s1", tmp_path / "other"])


def test_without_a_test_file_valid_is_all_there_is(tmp_path):
    for seed, share in ((1, 0.5), (2, 0.6)):
        valid = predictions(share, task="relation")
        write_run(tmp_path / f"a-s{seed}", valid, seed=seed, data={"valid": {"file": "v"}}, task="relation")
    table = run_table([tmp_path / "a-s*"], name="accuracy")
    assert table.splits == ["valid"] and table.title.startswith("row accuracy")
    assert any(note.startswith("no test file: valid chose the epoch") for note in table.notes)
    records = predictions(0.5, task="relation")["valid"]
    assert table.rows[0].scores["valid"][1] == score_of(records, "accuracy")
    assert score_of(records, "accuracy") == score(records)["row"]["accuracy"]


def test_tables_on_the_command_line(runs, tmp_path, capsys):
    pattern, figure = str(tmp_path / "*"), tmp_path / "figure.png"
    table = run_table([pattern], baseline=str(tmp_path / "none-s*"))
    flags = ["--table", pattern, "--baseline", str(tmp_path / "none-s*")]
    evaluate.main(flags)
    assert capsys.readouterr().out.splitlines() == table.lines()
    evaluate.main([*flags, "--csv"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    for row, line in zip(table.rows, rows, strict=True):
        assert float(line["test"]) == pytest.approx(statistics.mean(row.scores["test"].values()))
        assert (line["chosen"] == "1") == row.chosen and int(line["seeds"]) == len(row.folders)
        assert (line["test_deviation"] == "") == (len(row.folders) == 1)
        assert line["gain_low"] == ("" if row.gain is None else str(row.gain["low"]))
    evaluate.main([*flags, "--tex"])
    tex = capsys.readouterr().out
    assert tex.count(r" \\") == len(table.rows) + 1 and r"$\pm$" in tex and "±" not in tex and "95\\%" in tex
    for _ in range(2):  # its own picture is replaced
        evaluate.main(["--table", pattern, "--by", "fusion_lr", "--png", str(figure)])
        blue = (np.asarray(Image.open(figure)) == (28, 92, 170)).all(-1)
        assert blue.sum() > 20 * len(table.rows)  # of a filled point there are more
    Image.new("RGB", (9, 9)).save(figure)
    before = figure.read_bytes()
    with pytest.raises(ValueError, match="figure.png: .*; name another --png"):
        evaluate.main(["--table", pattern, "--png", str(figure)])
    assert figure.read_bytes() == before
    for more in (["--by", "x"], ["--baseline", "x"], ["--csv"], ["--tex"], ["--png", "x"]):
        with pytest.raises(SystemExit):
            evaluate.main(["--run", "x", *more])
        assert f"{more[0]} goes with --table" in capsys.readouterr().err
