"""The paired bootstrap against a direct computation; the leak check on data with and without leaks."""

import random
import statistics

import numpy as np
import pytest
from conftest import CONFIG
from PIL import Image

import evaluate
from data import NerExample, RelationExample
from parts.checks import FEWEST, SCORES, auc, files_named_after, leak_check, note_leaks, paired_bootstrap
from parts.checks import stands_in
from parts.datasets import Dataset, load_dataset
from parts.files import write_json, write_json_lines
from parts.notes import Notes
from parts.runs import system_settings
from parts.scores import entity_scores, label_scores, relation_scores

LABELS = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
RELATIONS = ["None", "None", "/a", "/b"]


def make_runs(task, seeds, posts=30, kept=0.6):
    """Predictions of several runs on the same posts; photos are shared by up to three rows of a relation."""
    rng = random.Random(1)
    gold = [rng.choices(LABELS, k=rng.randint(1, 9)) if task == "ner" else rng.choice(RELATIONS)
            for _ in range(posts)]  # fmt: skip
    runs = []
    for seed in seeds:
        rng = random.Random(seed)
        noisy = [[y if rng.random() < kept else rng.choice(LABELS) for y in labels] if task == "ner" else
                 (labels if rng.random() < kept else rng.choice(RELATIONS)) for labels in gold]  # fmt: skip
        runs.append([{"id": str(i), "image_id": str(i // 3), "gold": a, "predicted": b}
                     for i, (a, b) in enumerate(zip(gold, noisy, strict=True))])  # fmt: skip
    return runs


def direct_score(records, name):
    """The score called `name` of records, by the functions that score a run."""
    gold, predicted = [r["gold"] for r in records], [r["predicted"] for r in records]
    if name == "strict-f1":
        return entity_scores(gold, predicted, strict=True)["f1"]
    if name == "f1":
        return (entity_scores if isinstance(gold[0], list) else relation_scores)(gold, predicted)["f1"]
    flat = [sum(side, []) if isinstance(gold[0], list) else side for side in (gold, predicted)]
    return label_scores(*flat)["accuracy" if name == "accuracy" else "f1"]


@pytest.mark.parametrize("task, name", [(task, name) for task in ("ner", "relation") for name in SCORES
                                        if (task, name) != ("relation", "strict-f1")])  # fmt: skip
def test_bootstrap_is_what_resampling_posts_one_by_one_gives(task, name):
    a_runs, b_runs = make_runs(task, (2, 3), kept=0.7), make_runs(task, (4, 5, 6), kept=0.6)
    resamples = 60
    found = paired_bootstrap(a_runs, [list(reversed(run)) for run in b_runs], name, resamples, seed=9)
    posts = a_runs[0]
    unit_of = [r["id"] if task == "ner" else r["image_id"] for r in posts]
    units = list(dict.fromkeys(unit_of))
    rng, differences = np.random.default_rng(9), []

    def mean_score(runs, times):
        drawn = [[r for r, unit in zip(run, unit_of) for _ in range(times[unit])] for run in runs]
        return np.mean([direct_score(records, name) for records in drawn])

    for draw in rng.multinomial(len(units), np.full(len(units), 1 / len(units)), resamples):
        times = dict(zip(units, draw, strict=True))
        differences.append(mean_score(a_runs, times) - mean_score(b_runs, times))
    once = dict.fromkeys(units, 1)
    assert found["a_seeds"] == pytest.approx([mean_score([run], once) for run in a_runs])
    assert found["b_seeds"] == pytest.approx([mean_score([run], once) for run in b_runs])
    assert found["a"] == pytest.approx(mean_score(a_runs, once))
    assert found["b"] == pytest.approx(mean_score(b_runs, once))
    assert found["difference"] == pytest.approx(found["a"] - found["b"]) and found["units"] == len(units)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(differences, (2.5, 97.5))))
    smaller = min(sum(d <= 1e-12 for d in differences), sum(d >= -1e-12 for d in differences))
    assert found["p"] == pytest.approx(min(1, 2 * (smaller + 1) / (resamples + 1)))
    assert len(units) == (30 if task == "ner" else 10)


def test_bootstrap_at_its_ends():
    run, = make_runs("ner", (1,))
    same = paired_bootstrap([run], [run], resamples=500)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    perfect = [record | {"predicted": record["gold"]} for record in run]
    clear = paired_bootstrap([perfect], [run], resamples=999)
    assert clear["a"] == 1 and clear["low"] > 0 and clear["p"] == pytest.approx(2 / 1000)
    back = paired_bootstrap([run], [perfect], resamples=999)
    assert (back["low"], back["high"]) == pytest.approx((-clear["high"], -clear["low"]))
    assert back["p"] == clear["p"]


def test_bootstrap_refuses_other_posts_and_other_gold():
    (run,), (other,) = make_runs("ner", (1,)), make_runs("ner", (2,))
    first, *rest = other
    for changed in (rest, [first | {"id": "x"}, *rest], [first | {"gold": ["O"], "predicted": ["O"]}, *rest]):
        with pytest.raises(ValueError, match="other posts or other gold"):
            paired_bootstrap([run], [changed])
    with pytest.raises(ValueError, match="strict-f1 is of named entities"):
        paired_bootstrap(*[make_runs("relation", (1,))] * 2, "strict-f1")


def test_auc_interval_is_about_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    gold = rng.random(400) < 0.3
    scores = gold + rng.normal(size=400)
    area, half = auc(gold, scores)
    draws = [rng.integers(400, size=400) for _ in range(2000)]
    right = scores[gold][:, None] > scores[~gold]
    times = np.array([np.bincount(d, minlength=400) for d in draws])  # that each post was drawn
    of_pairs = (times[:, gold] @ right * times[:, ~gold]).sum(1)
    areas = of_pairs / times[:, gold].sum(1) / times[:, ~gold].sum(1)
    assert area == pytest.approx(right.mean())  # the share of pairs in the right order
    assert areas[:9] == pytest.approx([auc(gold[d], scores[d])[0] for d in draws[:9]])
    assert half == pytest.approx(1.96 * np.std(areas), rel=0.2)


def make_dataset(folder, leak, task="relation", posts=300):
    """Posts with a photo each; with `leak`, rows not None have crops beside them, those with PER are wide."""
    rng, examples = random.Random(0), {"train": [], "valid": []}
    for split in examples:
        for i in range(posts):
            photo, some, words = f"{split}_{i}.jpg", rng.random() < 0.5, ("w",) * rng.randint(2, 20)
            size = (40, 20) if (leak and task == "ner" and some) else rng.choice([(20, 20), (40, 20)])
            Image.new("RGB", size).save(folder / photo)
            if task == "relation":
                crops = rng.randint(1, 3) if leak and some else 0
                for crop in range(crops):
                    (folder / f"{split}_{i}_crop{crop}.jpg").touch()
                relation = "/a" if some else "None"
                examples[split].append(RelationExample(str(i), photo, words, (0, 1), (1, 2), relation))
            else:
                labels = ("B-PER" if some else "O",) + ("O",) * (len(words) - 1)
                examples[split].append(NerExample(str(i), photo.removesuffix(".jpg"), words, labels))
    return Dataset("made", task, {}, examples, ())


@pytest.mark.parametrize("task, target", [("relation", "None"), ("ner", "PER")])
def test_leaks_are_found_where_they_are_and_only_there(tmp_path, task, target):
    for leak in (True, False):
        folder = tmp_path / str(leak)
        folder.mkdir()
        found = leak_check(make_dataset(folder, leak, task), "valid", [folder])[target]
        photo, text = found["photo"], found["text"]
        assert (photo[0] - photo[1] > 0.55) == leak and (not leak or photo[0] > 0.7)
        assert text[0] - text[1] < 0.55 and found["posts"] > FEWEST
        if leak:
            assert found["column"][0] in ("files named after it", "width", "bytes")
    bare = leak_check(make_dataset(tmp_path / "True", True, task), "valid", [])[target]
    assert bare["photo"] == pytest.approx((0.5, bare["photo"][1]))  # no folder, nothing to tell by


def test_files_are_counted_once_and_by_whole_names(tmp_path):
    (tmp_path / "crops").mkdir()
    for name in ("1.jpg", "12.jpg", "crops/1_0.jpg", "crops/crop-1.png", "crops/12_1x.jpg", "crops/21.jpg"):
        (tmp_path / name).touch()
    counts = files_named_after(["1.jpg", "12.jpg", "3"], [tmp_path, tmp_path / "crops"])
    assert counts == {"1.jpg": 3, "12.jpg": 2}


def test_compare_and_leak_check_on_the_command_line(tmp_path, capsys):
    runs = make_runs("ner", (1, 2, 3))
    made = {"x-s1": (1, runs[0]), "x-s2": (2, runs[1]), "y-s1": (1, runs[2]), "x-shuffled-s1": (1, runs[2])}
    for name, (seed, records) in made.items():
        (tmp_path / name).mkdir()
        config = CONFIG | {"fusion": name[0], "seed": seed, "shuffle_photos": "shuffled" in name}
        write_json(tmp_path / name / "config.json", config)
        write_json_lines(tmp_path / name / "predictions-test.jsonl", records)
    evaluate.main(["--compare", str(tmp_path / "x-s*"), str(tmp_path / "y-s1"), "--score", "accuracy"])
    out, found = capsys.readouterr().out, paired_bootstrap(runs[:2], runs[2:], "accuracy")
    assert "token accuracy" in out and "x-s* (seeds 1 2)" in out and f"{found['difference']:+.4f}" in out
    assert f"p = {found['p']:.4f} (paired bootstrap over 30 posts, 10000 resamples)" in out
    assert "WARNING: 2 runs of A against 1 of B" in out and "seeds are averaged, not resampled" in out
    assert f"{found['a']:.4f} ± {statistics.stdev(found['a_seeds']):.4f} (n = 2)" in out
    evaluate.main(["--compare", str(tmp_path / "x-shuffled-s*"), str(tmp_path / "y-s1")])  # asked for by name
    out = capsys.readouterr().out
    assert "+0.0000" in out and "one seed against one seed" in out
    with pytest.raises(ValueError, match=r"x-s1 and y-s1 differ in fusion \(one: x, other: y\); name"):
        evaluate.main(["--compare", str(tmp_path / "*-s*"), str(tmp_path / "y-s1")])
    for pattern in ("z-s*", "z"):
        with pytest.raises(FileNotFoundError, match="no such run folder"):
            evaluate.main(["--compare", str(tmp_path / pattern), str(tmp_path / "y-s1")])


def test_what_counts_as_another_seed_of_the_same_system():
    """Seed, paths and machine; every other setting makes another system."""
    config = CONFIG | {
        "dataset": "twitter2017", "threads": 1, "processes": 1, "versions": {"torch": "2.15"},
        "encoder_parameters": 5,
        "data": {"train": {"file": "data/train.txt", "sha256": "a", "variant": "v"}},
        "features_made": {"weights": "w", "views": 4, "seed": 1, "sha256": "b", "engine": "eager",
                          "version_torch": "2.15"},
    }  # fmt: skip
    free = {"seed", "data_dir", "images", "cache_dir", "features", "notes", "run_dir", "device", "overwrite",
            "resume", "save_every", "system", "generated", "relevance_median", "eval_batch_size", "threads",
            "processes", "versions", "config", "track"}  # fmt: skip
    known = system_settings(config)
    of_seeds = [system_settings(config | {"init": f"runs/x-s{seed}"}) for seed in (1, 2)]  # each from its own
    assert of_seeds[0] == of_seeds[1] != known
    for key in config.keys() - {"data", "features_made", "generated_made", "text_encoder"}:
        assert (system_settings(config | {key: "other"}) == known) == (key in free), key
    for part, inner, same in (
        ("data", {"train": {"file": "elsewhere", "sha256": "a", "variant": "v"}}, True),
        ("data", {"train": {"file": "data/train.txt", "sha256": "other", "variant": "v"}}, False),
        ("features_made",
            config["features_made"] | {"sha256": "last bits", "engine": "inductor", "version_torch": "2.11"},
            True),
        ("features_made", config["features_made"] | {"views": 1}, False),
        ("features_made", config["features_made"] | {"weights": "x"}, False),
        ("features_made", None, False),
        ("dataset", "/moved/twitter2017", True), ("run_format", 1, False),
        ("text_encoder", f"models/{config['text_encoder']}", True), ("text_encoder", "another", False),
    ):  # fmt: skip
        assert (system_settings(config | {part: inner}) == known) == same, (part, inner)


def test_leak_check_of_a_folder_on_the_command_line(tmp_path, capsys):
    images = tmp_path / "mine" / "images"
    images.mkdir(parents=True)
    dataset = make_dataset(images, leak=True, task="ner")
    for split, examples in dataset.examples.items():
        lines = []
        for e in examples:
            lines += [f"IMGID:{e.image_id}", *map(" ".join, zip(e.words, e.labels, strict=True)), ""]
        (tmp_path / "mine" / f"{split}.txt").write_text("\n".join(lines))
    evaluate.main(["--leak-check", str(tmp_path / "mine")])
    out = capsys.readouterr().out
    assert "600 of 600 photos found" in out and "AUC on valid" in out
    assert "WARNING: 'PER' can be told from the photo's files" in out
    with pytest.raises(ValueError, match="has no test file"):
        evaluate.main(["--leak-check", str(tmp_path / "mine"), "--split", "test"])
    with pytest.raises(SystemExit):
        evaluate.main(["--leak-check", str(tmp_path / "absent")])
    assert "is neither a folder nor one of twitter2015" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ notes


@pytest.mark.parametrize("words, text, stands", [
    ("Kevin Durant", "1. kevin DURANT (person)", True), ("Kevin Durant", "Durant, Kevin", False),
    ("Kevin Durant", "Kevin-Durant!", True), ("Kevin Durant", "Kevin and Durant", False),
    ("Ada", "ada", True), ("Ada", "Nevada", False), ("@ NBA", "the #NBA", True),
    ("York 's", "New York's", True), ("É", "é", True), ("New York", "new", False), ("! 😀", "! 😀", False),
    ("! 😀", "", False), ("x", "", False),
])  # fmt: skip
def test_a_mention_stands_in_a_text_by_whole_words(words, text, stands):
    assert stands_in(words.split(), text) == stands


def test_words_stand_where_a_search_for_lists_finds_them():
    rng, pieces = random.Random(0), ["a", "B", "ab", "b", "-", "a's", "1"]
    answers = []
    for _ in range(2000):
        words, text = (rng.choices(pieces, k=rng.randint(0, longest)) for longest in (3, 8))
        name, said = ([c.lower() if c.isalnum() else " " for c in " ".join(side)] for side in (words, text))
        name, said = "".join(name).split(), "".join(said).split()
        windows = [said[i : i + len(name)] for i in range(len(said) - len(name) + 1)]
        assert stands_in(words, " ".join(text)) == (name != [] and name in windows)
        answers.append(name != [] and name in windows)
    assert 200 < sum(answers) < 1800


def notes_file(path, said):
    """A notes file of {id: note}."""
    write_json_lines(path, [{"id": key} | note for key, note in said.items()])
    return path


def ner_example(name, text, photo=None):
    words, labels = zip(*(pair.rsplit("/", 1) for pair in text.split()), strict=True)
    return NerExample(name, photo, words, labels)


@pytest.fixture
def noted(tmp_path):
    """A data set of named entities, and notes on it, counted by hand below."""
    train = [ner_example("a", "Jordan/B-PER in/O Paris/B-LOC"), ner_example("b", "NASA/B-ORG")]
    valid = [
        ner_example("a", "JORDAN/B-LOC met/O Kevin/B-PER Durant/I-PER"),  # seen, as another type; unseen
        ner_example("c", "Oscar/I-MISC so/O Paris/B-LOC"), ner_example("d", "so/O"),
        ner_example("e", "Rome/B-LOC"),
    ]  # fmt: skip
    path = notes_file(tmp_path / "n.jsonl", {
        "a": {"about_post": "Jordan (person)"}, "c": {"about_post": "oscar"},
        "valid/a": {"about_post": "jordan; Kevin  Durant; Paris", "about_photo": "Durant"},
        "d": {"about_post": "Rome, Paris, NASA"}, "nobody": {"about_photo": "Rome"},
    })  # fmt: skip
    return Dataset("made", "ner", {}, {"train": train, "valid": valid}, ()), path


def test_gold_in_notes_by_hand(noted):
    dataset, path = noted
    found = note_leaks(dataset, "valid", Notes(path))
    assert found.keys() == {"about_post", "about_photo"}
    counts = ("about_post", (1, 3), (3, 5), (2, 3)), ("about_photo", (0, 3), (0, 5), (0, 3))
    for key, of_train, valid, unseen in counts:
        of_valid = {"gold": valid, "unseen": unseen}
        assert found[key] == {"train": {"gold": of_train, "unseen": (0, 0)}, "valid": of_valid}


def test_only_what_notes_say_of_posts_looked_at_is_counted(noted, tmp_path):
    dataset, _ = noted
    said = {"a": {"about_photo": "Paris by night", "about_post": " "}, "x": {"about_post": "Jordan"}}
    path = notes_file(tmp_path / "m.jsonl", said)
    found = note_leaks(dataset, "valid", Notes(path))
    assert found.keys() == {"about_photo"} and found["about_photo"]["train"]["gold"] == (1, 3)
    path = notes_file(tmp_path / "o.jsonl", {"a": {"relevance": 1}})
    assert note_leaks(dataset, "valid", Notes(path)) == {}


def test_relations_need_both_names_in_the_note(tmp_path):
    """A row's own note before its photo's; half a pair is none."""
    words = ("Messi", "of", "FC", "Barcelona")
    relations = enumerate(["None", "/a", "/a"])
    rows = [RelationExample(f"p@{i}", "p", words, (0, 1), (2, 4), y) for i, y in relations]
    said = {"p": {"about_post": "fc barcelona's Messi"}, "p@1": {"about_post": "Messi, Barcelona"}}
    path = notes_file(tmp_path / "n.jsonl", said)
    dataset = Dataset("made", "relation", {}, {"train": rows[:1], "test": rows}, ())
    train, test = {"gold": (1, 1), "unseen": (0, 0)}, {"gold": (2, 3), "unseen": (0, 0)}
    assert note_leaks(dataset, "test", Notes(path)) == {"about_post": {"train": train, "test": test}}


def test_notes_are_looked_into_on_the_command_line(data_dir, tmp_path, capsys):
    """On the demo: notes that repeat their posts hold every mention, those of other posts do not."""
    dataset = load_dataset("demo", data_dir)
    said = {e.id: {"about_post": " ".join(e.words)} for posts in dataset.examples.values() for e in posts}
    path = notes_file(tmp_path / "n.jsonl", said)
    flags = ["--leak-check", "demo", "--data-dir", str(data_dir), "--notes"]
    evaluate.main([*flags, str(path)])
    out, (found,) = capsys.readouterr().out, note_leaks(dataset, "test", Notes(path)).values()
    train_count, count = (sum(y[0] == "B" for e in dataset.examples[split] for y in e.labels)
                          for split in ("train", "test"))  # fmt: skip
    unseen, of = found["test"]["unseen"]
    assert found["train"] == {"gold": (train_count, train_count), "unseen": (0, 0)}
    assert found["test"]["gold"] == (count, count) and 0 < unseen == of < count
    whole = f"train {train_count} of {train_count} (100.0%); test {count} of {count} (100.0%)"
    whole += f", of those not in train {unseen} of {unseen} (100.0%)\n"
    assert f"gold mentions stand in about_post: {whole}" in out and "about_photo" not in out
    assert "40 notes, 0 of no post here" in out and "may have seen these data" in out
    assert "photos found" in out  # and the check of metadata
    evaluate.main([*flags, str(path), "--split", "valid"])
    assert "; valid " in capsys.readouterr().out
    path = notes_file(tmp_path / "r", {"train_0000.jpg": {"about_post": "x"}})
    evaluate.main(["--leak-check", "mnre", "--data-dir", str(data_dir), "--notes", str(path)])
    out = capsys.readouterr().out
    shares = "train 0 of 24 (0.0%); valid 0 of 8 (0.0%)"
    assert f"rows whose head and tail both stand in about_post: {shares}\n" in out
    path = notes_file(tmp_path / "s", {"train_0000": {"relevance": 1}, "test/test_0001": {"phrases": ["x"]}})
    evaluate.main([*flags, str(path)])
    assert "no about_post and no about_photo in it" in capsys.readouterr().out


def test_notes_that_cannot_be_looked_into_are_one_line(data_dir, tmp_path, capsys):
    other = notes_file(tmp_path / "o.jsonl", {"other": {"about_post": "x"}})
    with pytest.raises(ValueError, match="no note is of any post .first id: other.; is it another"):
        evaluate.main(["--leak-check", "demo", "--data-dir", str(data_dir), "--notes", str(other)])
    for more in (["--run", "x"], ["--predictions", "x"], ["--compare", "x", "y"]):
        with pytest.raises(SystemExit):
            evaluate.main([*more, "--notes", "n.jsonl"])
        assert "--notes goes with --image-check of a run, --ensemble or --" in capsys.readouterr().err
