"""What notes say of a photo's relevance, and soft tokens, in whole runs: trained, checked, shown, used."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from conftest import run
from test_report import page_of

import predict
import report
import train
from encoding import collate, encode
from parts.checks import image_check, verdict
from parts.datasets import load_dataset
from parts.files import write_json_lines
from parts.notes import Notes
from parts.posts import make_posts, predict_posts, shuffled_photos
from parts.run_files import load_run, read_config
from parts.runs import system_settings
from parts.scores import read_predictions, score
from parts.text_encoder import load_tokenizer
from parts import opening


def rated(dataset):
    """Notes of all posts; all but each fourth with a relevance: rising in train, high elsewhere."""
    notes = []
    for split, examples in dataset.examples.items():
        for i, example in enumerate(examples):
            relevance = {} if i % 4 == 0 else {"relevance": i / 32 if split == "train" else 0.9 + i / 100}
            notes.append({"id": example.id, "about_post": "so good", "about_photo": f"photo {i}"} | relevance)
    return notes


@pytest.fixture(scope="module")
def demo_notes(data_dir, tmp_path_factory):
    """(the demo data set, a file of its `rated` notes)."""
    dataset, path = load_dataset("demo", data_dir), tmp_path_factory.mktemp("notes") / "notes.jsonl"
    write_json_lines(path, rated(dataset))
    return dataset, path


@pytest.mark.parametrize("extra", ["none", "post"])
def test_relevance_moves_and_hides_with_the_photo(demo_notes, encoder_dir, extra):
    dataset, path = demo_notes
    tokenizer, examples = load_tokenizer(encoder_dir), dataset.examples["test"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    notes = Notes(path, tokenizer, extra, 128, relevance=True).of(examples, "test")
    given = [note.get("relevance", -1) for note in rated(dataset)[-8:]]
    assert given.count(-1) == 2

    def shown(notes, photos):
        shown = [notes.shown(row, i, photo) for i, (row, photo) in enumerate(zip(rows, photos, strict=True))]
        return collate(shown, 0).get("relevance")

    ids = [example.image_id for example in examples]
    wanted = torch.tensor(given)
    assert shown(notes, ids).equal(wanted) and shown(notes, ids).dtype == torch.float32
    assert shown(notes, ids[3:] + ids[:3]).equal(wanted.roll(-3))
    assert shown(notes, [None] * 8) is None
    assert shown(notes, [None] * 4 + ids[4:]).tolist() == [-1] * 4 + wanted[4:].tolist()
    assert "relevance" not in collate([notes.shown(rows[0], 0, ids[0])], 0)  # of a post without one
    # A relevance is nothing to be shown: of photos without features none is dealt out.
    assert not any(notes.has_photo(image_id) for image_id in ids)
    assert shown(Notes(path, tokenizer, "post", 128).of(examples, "test"), ids) is None


def test_of_rows_that_share_a_photo_a_text_goes_before_a_relevance_and_that_before_nothing(
    data_dir, encoder_dir, tmp_path
):
    dataset, tokenizer = load_dataset("mnre", data_dir), load_tokenizer(encoder_dir)
    first, second = dataset.examples["train"][:2]
    assert first.image_id == second.image_id
    text, number, neither = {"about_photo": "a hoop"}, {"relevance": 0.5}, {"about_post": "x"}
    cases = [("photo", number, text, 1), ("photo", text, number, 0), ("none", neither, number, 1)]
    cases += [("none", number, neither, 0), ("none", number, {"relevance": 0.7}, 0)]
    for extra, one, other, kept in cases:
        path = tmp_path / "n.jsonl"
        write_json_lines(path, [{"id": first.id} | one, {"id": second.id} | other])
        notes = Notes(path, tokenizer, extra, 128, relevance=True).of([first, second], "train")
        assert notes.of_photo[first.image_id] is notes.of_post[kept]
        known = [notes.known(i, first.image_id).get("relevance") for i in range(2)]
        assert known == [one.get("relevance"), other.get("relevance")]


# ------------------------------------------------------------------------------------------------- whole runs


def train_run(flags, folder, *more):
    """(run folder, what was said) of one epoch on the demo posts."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return run([*flags, "--epochs", 1, "--device", "cpu"], folder, *more), out.getvalue()


RUNS = {
    "given": ("--fusion", "cross-attention", "--relevance", "given", "--align", "supervised=0.1",
              "--extra", "post", "--decoder", "crf"),
    "gate": ("--fusion", "film", "--relevance", "predicted"),
    "taught": ("--fusion", "film", "--relevance", "predicted", "--relevance-loss", 2),
    "prefix": ("--fusion", "prefix", "--extra", "photo", "--align", "contrastive=0.1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(demo_notes, flags, tmp_path_factory):
    """{name: (folder, what was said)} of `RUNS`, all but "gate" with notes."""
    root, (_, path) = tmp_path_factory.mktemp("runs"), demo_notes
    return {name: train_run(flags, root / name, *more, *(() if name == "gate" else ("--notes", path)))
            for name, more in RUNS.items()}  # fmt: skip


def test_the_median_is_trains_alone_and_what_is_given_is_counted(runs, demo_notes):
    """Of 24 posts of train 18 have one, of 8 of valid and test 6, all of these above each of train's."""
    of_train = [note["relevance"] for note in rated(demo_notes[0])[:24] if "relevance" in note]
    config, said = read_config(runs["given"][0]), runs["given"][1]
    assert config["relevance_median"] == np.median(of_train) < 0.9 and len(of_train) == 18
    for split, count, all_of in (("train", 18, 24), ("valid", 6, 8), ("test", 6, 8)):
        line = f"           {split}: relevance given of {count} of {all_of} posts with a photo, "
        line += "that of the others is predicted\n"
        assert line in said and line.replace("the others", "all") in runs["taught"][1]
    assert "relevance given of" not in runs["gate"][1] + runs["prefix"][1]
    others = [folder for name, (folder, _) in runs.items() if name != "given"]
    assert [read_config(folder)["relevance_median"] for folder in others] == [None] * 3
    # Another median under another seed, of the share of train that it draws, is the same system.
    assert system_settings(config) == system_settings(config | {"relevance_median": 0.1, "seed": 2})
    assert system_settings(config) != system_settings(config | {"relevance_loss": 1.0})


class Photos:
    """A feature cache that has all photos but some."""

    def __init__(self, absent):
        self.absent = absent

    def has_photo(self, image_id):
        return image_id not in self.absent


def test_the_median_is_of_posts_with_a_photo(demo_notes, data_dir, encoder_dir, tmp_path, capsys):
    (dataset, path), tokenizer = demo_notes, load_tokenizer(encoder_dir)

    def median(path, absent, *more):
        flags = ["--dataset", "demo", "--data-dir", str(data_dir), "--notes", str(path)]
        args = train.parse_args([*flags, *more])
        notes, config = Notes(path, tokenizer, args.extra, 128, relevance=True), vars(args)
        config, posts = config | {"labels": dataset.labels}, {}
        for split, examples in dataset.examples.items():
            posts[split], _ = make_posts(config, tokenizer, examples, split, Photos(absent), notes)
        return opening.median_relevance(args, posts)

    absent, supervised = [e.image_id for e in dataset.examples["train"][12:]], ("--align", "supervised=1")
    assert median(path, absent, *supervised) == np.median([i / 32 for i in range(12) if i % 4])
    line = "train: relevance given of 9 of 12 posts with a photo, the others take no part in supervised"
    assert line in capsys.readouterr().out
    assert median(path, [], "--relevance", "given") is None
    notes = [{key: value for key, value in note.items() if key != "relevance"} for note in rated(dataset)]
    bare, low = tmp_path / "bare.jsonl", tmp_path / "low.jsonl"
    write_json_lines(bare, notes)
    for more in (supervised, ("--relevance", "given", "--extra", "post"), ("--relevance", "predicted")):
        with pytest.raises(ValueError, match="bare.jsonl: no relevance of any post of train that has a"):
            median(bare, [], *more)
    assert median(bare, [], "--relevance", "predicted", "--extra", "post") is None
    write_json_lines(low, [note | {"relevance": 0.25 * (i == 0)} for i, note in enumerate(notes)])
    message = "relevances below train's median and others, and none of .*low.jsonl is below it, 0$"
    with pytest.raises(ValueError, match=message):
        median(low, [], *supervised)


def test_new_losses_are_logged_with_their_weights(runs):
    logs = {name: json.loads((folder / "log.jsonl").read_text()) for name, (folder, _) in runs.items()}
    losses = {name: {key[5:] for key in log if key.startswith("loss_")} for name, log in logs.items()}
    assert losses == {"given": {"supervised", "relevance"}, "gate": set(), "taught": {"relevance"},
                      "prefix": {"contrastive"}}  # fmt: skip
    assert all(logs[name][f"loss_{key}"] > 0 for name, keys in losses.items() for key in keys)
    assert load_run(runs["taught"][0])[0].loss_weights == {"labels": 1.0, "relevance": 2.0}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reads_back_and_its_image_check_moves_relevance(runs, demo_notes, name):
    folder, _ = runs[name]
    model, config, dataset, shown = opening.open_run(folder, "test", "cpu")
    recorded = read_predictions(folder / "predictions-test.jsonl")
    ids = [example.image_id for example in shown.examples]

    def answers(swap):
        return predict_posts(model, shown.showing(swap), config["labels"], 3, "cpu", "float32")

    again = answers(None)
    assert [r["predicted"] for r in again] == [r["predicted"] for r in recorded]
    for a, b in zip(again, recorded, strict=True):
        np.testing.assert_allclose(a["probability"], b["probability"], atol=1e-5)
    assert ["extra" in r for r in recorded] == [name in ("given", "prefix")] * 8
    swap, blind = shuffled_photos(ids, shown.cache, 1, shown.notes), answers(dict.fromkeys(ids))
    own = dict(zip(ids, (note.get("relevance") for note in rated(dataset)[-8:]), strict=True))
    if name not in ("given", "taught"):  # these read none
        own = dict.fromkeys(own)
    assert [r.get("relevance") for r in recorded] == [own[i] for i in ids]
    assert [r.get("relevance") for r in answers(swap)] == [own[swap[i]] for i in ids]
    assert all(r.get("relevance") is None and not r["photo"] for r in blind)
    check = image_check(folder, "test", 2, "cpu")
    assert check["photos"] == 8 and verdict(config, check).startswith("true - shuffled")
    assert check["none"]["token"] == pytest.approx(score(blind)["token"])


def test_shuffled_photos_bring_their_relevance(demo_notes, flags, tmp_path):
    dataset, path = demo_notes
    more = ("--fusion", "film", "--relevance", "given", "--notes", path, "--shuffle-photos")
    folder, _ = train_run(flags, tmp_path / "run", *more)
    ids = [example.image_id for example in dataset.examples["test"]]
    own = dict(zip(ids, (note.get("relevance") for note in rated(dataset)[-8:]), strict=True))
    shown = opening.open_run(folder, "test", "cpu")[-1]
    swap = shuffled_photos(ids, shown.cache, 1337, shown.notes)
    records = read_predictions(folder / "predictions-test.jsonl")
    assert [record["relevance"] for record in records] == [own[swap[r["image_id"]]] for r in records]
    page = report.main(["--run", str(folder)]).read_text(encoding="utf-8")
    assert "nothing that was written with a photo in view" in page and '"relevance":"0.' not in page


def found(answer):
    return [(entity["type"], entity["words"]) for entity in answer["entities"]]


def test_new_posts_bring_their_relevance(runs, demo_notes, data_dir, capsys):
    (dataset, _), (folder, _) = demo_notes, runs["given"]
    predictor, taught = predict.Predictor(folder, "cpu", "random"), runs["taught"][0]
    given = []
    for example, note in zip(dataset.examples["test"], rated(dataset)[-8:], strict=True):
        image = data_dir / "demo" / "images" / f"{example.image_id}.jpg"
        note.pop("id")
        given.append({"words": list(example.words), "image": str(image)} | note)
    records = read_predictions(folder / "predictions-test.jsonl")
    for answer, post, record in zip(predictor(given), given, records, strict=True):
        assert found(answer) == found({"entities": predict.entities(record, None, None)})
        assert answer.get("note") == (None if "relevance" in post else "no relevance given: it was predicted")
    blind = {key: value for key, value in given[1].items() if key != "image"}
    assert "note" not in predictor(blind)  # without a photo there is nothing to predict
    irrelevant = predictor(given[1] | {"relevance": 0})
    assert irrelevant["photo"] and irrelevant["entities"] == predictor(blind | {"relevance": 0.3})["entities"]
    wrong = predictor(given[1] | {"relevance": 17})["error"]
    assert wrong.startswith("relevance must be a number from 0 to 1, not 17")
    post = {"text": "so good", "about_post": "x", "image": given[1]["image"]}
    flags = ["--run", str(folder), "--text", "so good", "--about-post", "x", "--image", given[1]["image"]]
    flags += ["--device", "cpu", "--weights", "random"]
    capsys.readouterr()
    predict.main([*flags, "--relevance", "0.8", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out) == predictor(post | {"relevance": 0.8}) and not err
    predict.main(flags)
    assert capsys.readouterr().err == "no relevance given: it was predicted\n"
    message = "--relevance does not go with .*taught, which finds entities in text and image; leave it out"
    with pytest.raises(ValueError, match=message):
        predict.main(["--run", str(taught), "--text", "so good", "--relevance", "0.8", "--device", "cpu"])
    answer = predict.Predictor(taught, "cpu", "random")({"text": "so good", "relevance": 17})
    assert answer.keys() == {"id", "photo", "entities"}
    with pytest.raises(SystemExit):
        predict.parse_args(["--run", "r", "--text", "x", "--relevance", "1.5"])
    assert "1.5 is not from 0 to 1" in capsys.readouterr().err


def test_a_prefix_answers_new_posts_with_and_without_a_photo(runs, demo_notes, data_dir):
    (dataset, _), (folder, _) = demo_notes, runs["prefix"]
    predictor, example = predict.Predictor(folder, "cpu", "random"), dataset.examples["test"][0]
    post = {"words": list(example.words), "about_photo": "photo 0"}
    image = data_dir / "demo" / "images" / f"{example.image_id}.jpg"
    seen, blind = predictor([post | {"image": str(image)}, post])
    assert (seen["photo"], blind["photo"]) == (True, False) and "note" not in seen and "note" not in blind
    record = read_predictions(folder / "predictions-test.jsonl")[0]
    assert found(seen) == found({"entities": predict.entities(record, None, None)})


@pytest.mark.parametrize("name", RUNS)
def test_the_page_shows_a_given_relevance_and_where_a_prefix_looked(runs, demo_notes, tmp_path, name):
    dataset, _ = demo_notes
    page = page_of(runs[name][0], tmp_path / "page.html")
    posts, reads = {post["id"]: post for post in page["posts"]}, name in ("given", "taught")
    for example, note in zip(dataset.examples["test"], rated(dataset)[-8:], strict=True):
        said, post = {}, posts[example.id]
        if name in ("given", "prefix"):
            key = {"given": "about_post", "prefix": "about_photo"}[name]
            said[key] = note[key]
        if reads and "relevance" in note:
            said["relevance"] = f"{note['relevance']:.3f}"
        assert post.get("said", {}) == said
        assert ("maps" in post) == (name in ("given", "prefix"))
        if name == "prefix":
            places = np.array(post["maps"]["places"])
            assert np.allclose(places[places > 0], 1, atol=2e-3)
    texts, given = ": 8 of 8 posts with a note, 0 without", "relevance of the photo: of 6 of 8 posts given"
    said = {"given": f"--extra post{texts}; {given}", "taught": given, "prefix": f"--extra photo{texts}"}
    file = f"notes.jsonl ({str(read_config(runs[name][0])['notes_sha256'])[:16]})"
    assert page["facts"]["Notes"] == ("not used" if name == "gate" else f"{file}, {said[name]}")
    label = {"given": "Relevance of the photo, as given",
             "taught": "Relevance of the photo, as given; the run used its own"}  # fmt: skip
    assert page["said"].get("relevance") == label.get(name)


@pytest.mark.parametrize("more, said", [
    (("--max-len", 510), "--max-len 510 and the 4 soft tokens of --fusion prefix: .* takes 512 in all"),
    (("--extra", "photo", "--extra-len", 380), "-len 128 and --extra-len 380 and the 4 soft .* takes 512"),
    (("--heads", 7), "7 heads do not divide token states of width 64"),
])  # fmt: skip
def test_what_has_no_room_is_one_line_before_anything_is_written(demo_notes, flags, tmp_path, more, said):
    more = (*more, "--notes", demo_notes[1]) if "--extra" in more else more
    with pytest.raises(ValueError, match=said):
        train_run(flags, tmp_path / "run", "--fusion", "prefix", *more)
    assert not (tmp_path / "run").exists()
