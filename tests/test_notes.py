"""Notes: what a file may hold, the tokenizer's own form for two texts; what is the photo's goes with it."""

import copy
import json

import numpy as np
import pytest
import tables
import torch
from conftest import CONFIG
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, RobertaTokenizerFast

import evaluate
import predict
import train
from encoding import collate, encode
from parts.checks import image_check
from parts.datasets import load_dataset
from parts.notes import KEYS, Notes, Segments, pair_ends, read_notes, seen_with
from parts.opening import open_run, run_notes
from parts.posts import Posts, make_posts, predict_posts, shuffled_photos
from parts.scores import read_predictions, score
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder
from parts import notes as notes_module

FULL = {"id": "a", "about_post": "Kevin Durant (person)", "about_photo": "a hoop", "relevance": 0.5,
        "phrases": ["a hoop"], "with_photo": False}  # fmt: skip


def write(path, notes):
    lines = [note if isinstance(note, str) else json.dumps(note, ensure_ascii=False) for note in notes]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def notes_of(dataset):
    """A note of each post: its own name for the post, and for its photo."""
    return [{"id": e.id, "about_post": f"post {e.words[0]}", "about_photo": f"photo {e.image_id}"}
            for split in dataset.examples.values() for e in split]  # fmt: skip


@pytest.fixture(scope="module")
def noted(data_dir, tmp_path_factory):
    """(the demo data set, a file with notes of all its posts)."""
    dataset = load_dataset("demo", data_dir)
    return dataset, write(tmp_path_factory.mktemp("notes") / "notes.jsonl", notes_of(dataset))


def train_run(folder, data_dir, encoder_dir, cache_dir, *more):
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", cache_dir, "--img-size", 64,
             "--text-encoder", encoder_dir]  # fmt: skip
    flags += ["--epochs", 1, "--lr", 1e-3, "--device", "cpu", "--run-dir", folder, *more]
    return train.main([str(flag) for flag in flags])


# --------------------------------------------------------------------------------------------------- the file


def test_a_file_is_read_and_null_or_another_key_is_nothing(tmp_path):
    bare = {"id": "b@2", "about_post": None, "relevance": 1}
    path = write(tmp_path / "n.jsonl", [FULL | {"reason": 3}, "", bare])
    kept = {key: value for key, value in FULL.items() if key != "id"}
    assert read_notes(path) == {"a": kept, "b@2": {"relevance": 1}}


@pytest.mark.parametrize("line, said", [
    ("{", "not JSON"), ("[]", "an id that is text"), ({"about_post": "x"}, "an id that is text"),
    ({"id": 3}, "an id that is text"), ({"id": "a"}, "a second line for a"),
    ({"id": "b", "about_post": 1}, "about_post must be text, not 1"),
    ('{"id": "b", "about_photo": "\\ud83d"}', "about_photo must be text"),
    ({"id": "b", "relevance": 1.01}, "relevance must be a number"),
    *((f'{{"id": "b", "relevance": {value}}}', "relevance must be") for value in ("true", "NaN")),
    *(({"id": "b", "phrases": value}, "phrases must be a list") for value in ("x", ["x", 1])),
    ({"id": "b", "with_photo": 1}, "with_photo must be true or false"), ("[" * 200_000, "not JSON"),
    ('{"id": "b", "about_post": %s}' % ("[" * 900 + "]" * 900), "about_post must be text, not a list"),
    ({"id": "b", "about_post": {"x": "y" * 10**5}}, "about_post must be text, not an object"),
    ('{"id": "b", "relevance": 1%s}' % ("0" * 5000), "not JSON"),
    ({"id": "b" * 10**6}, "a second line for b{100}; keep one"), ("\\x00", "not JSON"),
])  # fmt: skip
def test_a_broken_line_is_named_with_file_and_line(tmp_path, line, said):
    path = write(tmp_path / "n.jsonl", [FULL, {"id": "b" * 10**6}, line])
    with pytest.raises(ValueError, match=said) as error:
        read_notes(path)
    message = str(error.value).removeprefix(f"{path}:3: ")
    assert message != str(error.value) and len(message) < 200 and "\n" not in message


def test_a_row_has_its_own_note_before_its_photos_and_its_splits_before_both(data_dir, encoder_dir, tmp_path):
    dataset = load_dataset("mnre", data_dir)
    (first, second), other = dataset.examples["train"][:2], dataset.examples["valid"][5]
    assert first.image_id == second.image_id
    ids = [first.image_id, second.id, f"valid/{other.id}", other.id]
    path = write(tmp_path / "n.jsonl", [{"id": i, "about_post": f"said {n}"} for n, i in enumerate(ids)])
    notes = Notes(path, AutoTokenizer.from_pretrained(encoder_dir), "post", 128)
    assert [notes.find(example, "train") for example in (first, second)] == ids[:2]
    assert [notes.find(other, split) for split in ("valid", "test")] == ids[2:]


def test_coverage_counts_every_key_and_ids_of_no_post(noted, encoder_dir, tmp_path):
    dataset, _ = noted
    said = notes_of(dataset)
    del said[0]["about_photo"]
    said[1] |= {"relevance": 0, "phrases": [], "with_photo": False}
    path = write(tmp_path / "n.jsonl", [*said, {"id": "nobody's", "about_post": "x"}, {"id": "no one's"}])
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    lines = Notes(path, tokenizer, "both", 128).coverage(dataset.examples)
    assert "42 notes, 2 of no post here" in lines[0]
    assert lines[1:] == [
        "train: about_post of 24, about_photo of 23, relevance of 1 of 24 posts",
        "valid: about_post of 8, about_photo of 8 of 8 posts",
        "test: about_post of 8, about_photo of 8 of 8 posts",
    ]  # fmt: skip
    path = write(tmp_path / "other.jsonl", [{"id": "nobody's", "about_post": "x"}])
    with pytest.raises(ValueError, match="no note is of any post .first id: nobody's."):
        Notes(path, tokenizer, "both", 128).coverage(dataset.examples)


# -------------------------------------------------------------------------------------------- second segments


@pytest.fixture(params=["bert", "roberta"])
def tokenizer(request, encoder_dir, tmp_path):
    """WordPiece with one separator between texts, and byte-level BPE with two."""
    if request.param == "bert":
        return AutoTokenizer.from_pretrained(encoder_dir)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    return RobertaTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[],
                                add_prefix_space=True)  # fmt: skip


def test_the_form_is_the_tokenizers_own_for_two_texts(tokenizer, data_dir):
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    segments = Segments(tokenizer, "post", 500)
    for row, example in zip(rows, dataset.examples["test"], strict=True):
        made = segments(row, {"about_post": "so good, so near"})
        assert made["input_ids"] == tokenizer(" ".join(example.words), "so good, so near")["input_ids"]
        assert all(made[key] == row[key] for key in ("word_starts", "labels")) and not made["note_cut"]
        alone = tokenizer(" ".join(example.words))["input_ids"]  # the post's own tokens, special ones too
        assert made["text_length"] == len(alone)
        assert made["input_ids"][: len(alone)] == alone == row["input_ids"]


def test_both_texts_are_separated_and_cut_to_the_length(tokenizer, data_dir):
    dataset = load_dataset("demo", data_dir)
    (row, *_), _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    middle, suffix = pair_ends(tokenizer)
    a, b = (tokenizer(said, add_special_tokens=False)["input_ids"] for said in ("so good", "today"))
    note = {"about_post": " so good ", "about_photo": "today"}
    whole = Segments(tokenizer, "both", 500)(row, note)["input_ids"]
    longest = len(a + middle + b)
    cuts = [Segments(tokenizer, "both", longest - less)(row, note)["note_cut"] for less in (0, 1)]
    assert cuts == [False, True]
    assert whole[len(row["input_ids"]) :][-len(a + middle + b + suffix) :] == a + middle + b + suffix
    for length in (1, 2, 3, len(a + middle)):
        segments = Segments(tokenizer, "both", length)
        cut = segments(row, note)
        made = cut["input_ids"]
        assert cut["note_cut"] and made == whole[: len(made) - len(suffix)] + suffix
        assert len(made) - len(row["input_ids"]) == segments.longest


def test_of_a_long_text_no_more_is_kept_or_split_than_can_be_read(tokenizer, noted, tmp_path, monkeypatch):
    """And what is read is what a tokenizer that was given all of it makes."""
    dataset, _ = noted
    (example, *_), long = dataset.examples["test"], "so good, " * 50_000
    path = write(tmp_path / "n.jsonl", [{"id": example.id, "about_post": long, "about_photo": "x"}])
    notes = Notes(path, tokenizer, "both", 12)
    segments, lengths = notes.segments, []
    split = type(tokenizer).__call__

    def counting(tokenizer, text, **options):
        lengths.append(len(text))
        return split(tokenizer, text, **options)

    rows, _ = encode(tokenizer, [example], dataset.labels, 128)
    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    of_post = notes.of([example], "test")
    for row in (of_post.shown(rows[0], 0, example.image_id), segments(rows[0], {"about_post": long})):
        start = len(row["input_ids"]) - 12 - len(segments.suffix)
        whole = split(tokenizer, long[:999], add_special_tokens=False)["input_ids"]
        assert row["note_cut"] and row["input_ids"][start:][:12] == whole[:12]
    assert max(lengths) < 5000 and len(notes.notes[example.id]["about_post"]) < 5000
    assert all(len(text) < 5000 and len(ids) < 14 for text, ids in segments.pieces.items())
    monkeypatch.setattr(notes_module, "MOST_KEPT", 99)
    for i in range(99):
        assert segments(rows[0], {"about_post": f"so {i}"})["text_length"]
        assert sum(map(len, segments.pieces)) < 99


@pytest.mark.parametrize("note", [{}, {"about_post": " \n"}, {"about_photo": "of no interest"}])
def test_without_anything_to_say_the_batch_is_what_it_was(tokenizer, data_dir, note):
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    segments = Segments(tokenizer, "post", 128)
    plain, noted = collate(rows, 1), collate([segments(row, note) for row in rows], 1)
    assert plain.keys() == noted.keys()
    assert all(torch.equal(plain[key], noted[key]) for key in plain)


def test_a_batch_masks_what_is_not_the_post(tokenizer, data_dir):
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    segments = Segments(tokenizer, "post", 128)
    noted = [segments(row, {"about_post": "so good"} if i % 2 else {}) for i, row in enumerate(rows)]
    batch = collate(noted, 1)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    assert torch.equal(batch["text_mask"].sum(1), lengths)
    assert torch.equal(batch["text_mask"].long().cummin(1).values, batch["text_mask"].long())
    assert (batch["attention_mask"].sum(1) > lengths).tolist() == [bool(i % 2) for i in range(len(rows))]
    assert batch["attention_mask"][batch["text_mask"]].all()


def test_fusion_and_head_read_no_token_of_the_second_segment(data_dir, encoder_dir):
    """With an encoder whose states are the embeddings of each token alone, a note changes nothing."""
    dataset = load_dataset("demo", data_dir)
    torch.manual_seed(0)
    encoder, tokenizer = load_text_encoder(str(encoder_dir), SYSTEMS["bert-resnet50"].checkpoint, "ner", 0.0)
    config = CONFIG | {"fusion": "bimodal", "heads": 8, "dropout": 0.0, "region_dim": 16}
    config |= {"task": "ner", "labels": dataset.labels}
    model = SYSTEMS["bert-resnet50"].model(encoder, config).eval()
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    segments = Segments(tokenizer, "post", 128)
    mask = torch.ones(len(rows), 4, dtype=torch.bool)
    photos = {"regions": torch.randn(len(rows), 4, 16), "region_mask": mask}
    plain = collate(rows, 0) | photos
    noted = collate([segments(row, {"about_post": "so good today"}) for row in rows], 0) | photos
    with torch.inference_mode():
        # Through the encoder it does.
        assert not torch.allclose(model(plain).logits, model(noted).logits, atol=1e-3)
        model.encoder.encoder.layer = torch.nn.ModuleList()
        assert torch.allclose(model(plain).logits, model(noted).logits, atol=1e-5)


# ------------------------------------------------------------------------------------ what is the photo's own


@pytest.mark.parametrize("with_photo", [False, True])
@pytest.mark.parametrize("extra", ["post", "photo", "both"])
def test_what_was_written_with_the_photo_in_view_moves_and_hides_with_it(
    noted, encoder_dir, tmp_path, with_photo, extra
):
    dataset, _ = noted
    path = write(tmp_path / "n.jsonl", [note | {"with_photo": with_photo} for note in notes_of(dataset)])
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    file, examples = Notes(path, tokenizer, extra, 128), dataset.examples["test"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    notes = file.of(examples, "test")
    said = {example.image_id: file.notes[example.id] for example in examples}
    swap = shuffled_photos(list(said), None, 0, notes)
    moves = with_photo or extra != "post"
    assert all(notes.has_photo(image_id) == moves for image_id in said)
    assert all(swap[i] != i and (swap[i] is not None) == moves for i in said)

    def ids(row, texts):
        return file.segments(row, dict(zip(("about_post", "about_photo"), texts, strict=True)))["input_ids"]

    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        own, other = said[example.image_id], said[swap[example.image_id] or example.image_id]
        post, photo = own["about_post"], own["about_photo"]
        assert notes.shown(row, i, example.image_id)["input_ids"] == ids(row, (post, photo))
        assert notes.shown(row, i, None)["input_ids"] == ids(row, ("" if with_photo else post, ""))
        shown = notes.shown(row, i, swap[example.image_id] or example.image_id)["input_ids"]
        assert shown == ids(row, (other["about_post"] if with_photo else post, other["about_photo"]))


def test_relevance_and_phrases_go_with_the_photo_too():
    own, other = FULL | {"about_post": "mine"}, {"relevance": 0.1, "about_photo": "a dog", "phrases": ["dog"]}
    assert seen_with(own, other) == {"id": "a", "about_post": "mine", "with_photo": False} | other
    assert seen_with(own, {}) == {"id": "a", "about_post": "mine", "with_photo": False}
    assert seen_with(own, own) == own
    assert set(KEYS) == set(FULL) - {"id"}


def test_shuffled_notes_are_one_cycle_and_leave_the_rest(noted, encoder_dir):
    dataset, path = noted
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    notes = Notes(path, tokenizer, "both", 128).of(dataset.examples["train"], "train")
    del notes.of_post[0]["about_post"]  # it neither takes nor gives
    for i, note in enumerate(notes.of_post[1:]):
        note["about_post"] = str(i)
    unchanged = copy.deepcopy(notes.of_post)
    shuffled = notes.shuffled(5)
    before, after = notes.of_post, shuffled.of_post
    assert before == unchanged and after[0] == before[0]
    order = {a["about_post"]: b["about_post"] for a, b in zip(before[1:], after[1:], strict=True)}
    place, seen = "0", set()
    while place not in seen:
        seen.add(place)
        place = order[place]
    assert len(seen) == len(before) - 1  # one cycle, so nobody keeps its own
    assert [note["about_photo"] for note in after] == [note["about_photo"] for note in before]
    assert all(shuffled.of_photo[photo] is note for photo, note in zip(notes.photos, after, strict=True))


def test_the_control_hides_as_much_as_the_run(noted, encoder_dir, tmp_path):
    """Half the notes had the photo in view: without it as many have a second segment, shuffled or not."""
    dataset, _ = noted
    halves = [note | {"with_photo": i % 2 > 0} for i, note in enumerate(notes_of(dataset))]
    path = write(tmp_path / "n.jsonl", halves)
    counts = []
    for shuffle in (False, True):
        tokenizer, examples = AutoTokenizer.from_pretrained(encoder_dir), dataset.examples["train"]
        config = {"labels": dataset.labels, "max_len": 128, "shuffle_notes": shuffle, "seed": 0}
        posts, _ = make_posts(config, tokenizer, examples, "train", notes=Notes(path, tokenizer, "post", 128))
        sides = [[posts.shown(i, hidden)[1] for i in range(24)] for hidden in (True, False)]
        counts.append([sum("text_length" in row for row in rows) for rows in sides])
        assert sum(posts.notes.has_photo(example.image_id) for example in examples) == 12
        assert len(posts.notes.with_text()) == 24
    assert counts == [[12, 24]] * 2


def test_of_rows_that_share_a_photo_the_first_that_tells_of_it_counts(data_dir, encoder_dir, tmp_path):
    first, second = load_dataset("mnre", data_dir).examples["train"][:2]  # of one photo
    lines = [{"id": first.id, "about_post": "x"}, {"id": second.id, "about_photo": "a hoop"}]
    file = Notes(write(tmp_path / "n.jsonl", lines), AutoTokenizer.from_pretrained(encoder_dir), "photo", 128)
    notes = file.of([first, second], "train")
    assert notes.has_photo(first.image_id) and notes.of_photo[first.image_id]["about_photo"] == "a hoop"


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(noted, data_dir, encoder_dir, cache_dir, tmp_path_factory):
    """{name: folder} of one run on the text and notes of post and photo, with a CRF, and one with film."""
    root, folders = tmp_path_factory.mktemp("runs"), (data_dir, encoder_dir, cache_dir)
    more = ("--notes", noted[1], "--extra", "both")
    return {"none": train_run(root / "none", *folders, *more, "--fusion", "none", "--decoder", "crf"),
            "film": train_run(root / "film", *folders, *more, "--fusion", "film")}  # fmt: skip


@pytest.mark.parametrize("fusion", ["none", "film"])
def test_a_run_reads_back_as_it_was_scored(runs, fusion):
    model, config, _, shown = open_run(runs[fusion], "test", "cpu")
    again = predict_posts(model, shown, config["labels"], 3, "cpu", "float32")
    recorded = read_predictions(runs[fusion] / "predictions-test.jsonl")
    assert [r["predicted"] for r in again] == [r["predicted"] for r in recorded]
    for a, b in zip(again, recorded, strict=True):
        assert a["extra"] and b["extra"]
        np.testing.assert_allclose(a["probability"], b["probability"], atol=1e-5)


def test_relations_read_the_notes_of_their_rows(data_dir, encoder_dir, cache_dir, tmp_path):
    dataset = load_dataset("mnre", data_dir)
    posts = [(split, example) for split, part in dataset.examples.items() for example in part]
    path = write(tmp_path / "n.jsonl", [
        {"id": f"{split}/{e.id}", "about_post": f"{split} {e.words[0]}", "about_photo": e.image_id}
        for split, e in posts
    ])  # fmt: skip
    more = ("--dataset", "mnre", "--fusion", "attention", "--notes", path, "--extra", "both")
    folder = train_run(tmp_path / "run", data_dir, encoder_dir, cache_dir, *more)
    model, config, dataset, shown = open_run(folder, "valid", "cpu")
    examples = shown.examples
    assert [note["about_post"] for note in shown.notes.of_post] == [f"valid {e.words[0]}" for e in examples]
    again = predict_posts(model, shown, config["labels"], 3, "cpu", "float32")
    recorded = read_predictions(folder / "predictions-valid.jsonl")
    assert [r["predicted"] for r in again] == [r["predicted"] for r in recorded]
    assert all(r["extra"] for r in recorded)
    post = {key: list(getattr(examples[0], key)) for key in ("words", "head", "tail")}
    post |= shown.notes.of_post[0] | {"image": str(data_dir / "demo" / "images" / "train_0000.jpg")}
    answer = predict.Predictor(folder, "cpu", "random")(post)
    assert answer["photo"] and "note" not in answer and answer["relation"] in dataset.labels


def test_empty_notes_train_the_run_without_them(noted, data_dir, encoder_dir, cache_dir, tmp_path):
    """Digit for digit."""
    dataset, _ = noted
    path = write(tmp_path / "n.jsonl", [{"id": dataset.examples["train"][0].id, "about_post": " "}])
    flags = (data_dir, encoder_dir, cache_dir, "--fusion", "film")
    plain = train_run(tmp_path / "plain", *flags)
    empty = train_run(tmp_path / "empty", *flags, "--notes", path, "--extra", "both")
    for name in ("log.jsonl", "model.safetensors"):
        assert (plain / name).read_bytes() == (empty / name).read_bytes(), name


def test_image_check_moves_notes_of_the_photo_where_no_region_is_looked_at(runs):
    check = image_check(runs["none"], "test", 2, "cpu")
    assert check["photos"] == 8
    model, config, _, shown = open_run(runs["none"], "test", "cpu")
    rows, notes, ids = shown.rows, shown.notes, [example.image_id for example in shown.examples]
    swaps = (shuffled_photos(ids, None, 1, notes), check["shuffled"][1]), (dict.fromkeys(ids), check["none"])
    for swap, found in swaps:
        changed = [notes.file.segments(row, seen_with(note, notes.of_photo.get(swap[photo], {})))
                   for row, note, photo in zip(rows, notes.of_post, ids, strict=True)]  # fmt: skip
        posts = Posts(shown.examples, changed, 0)
        again = predict_posts(model, posts, config["labels"], 12, "cpu", "float32")
        assert score(again)["token"] == pytest.approx(found["token"])


def test_the_image_check_knows_what_a_share_of_train_holds(noted, data_dir, encoder_dir, cache_dir, tmp_path):
    _, path = noted
    more = ("--fusion", "none", "--notes", path, "--extra", "photo", "--train-share", 0.1)
    folder = train_run(tmp_path / "run", data_dir, encoder_dir, cache_dir, *more)
    scored = json.loads((folder / "metrics-test.json").read_text())
    check = image_check(folder, "test", 1, "cpu")["true"]
    assert all(check[part] == scored[part] for part in ("entity_seen", "entity_unseen"))


def test_changed_notes_are_refused_and_moved_ones_found(runs, noted, tmp_path):
    _, path = noted
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    assert open_run(runs["film"], "test", "cpu", notes=moved)[-1].notes.file.path == moved
    moved.write_text(moved.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not the notes the run was trained with"):
        open_run(runs["film"], "test", "cpu", notes=moved)


def test_new_posts_bring_their_notes(runs, noted):
    dataset, path = noted
    known, predictor = read_notes(path), predict.Predictor(runs["none"], "cpu")
    given = [{"words": list(e.words)} | known[e.id] for e in dataset.examples["test"]]
    records = read_predictions(runs["none"] / "predictions-test.jsonl")
    for answer, record in zip(predictor(given), records, strict=True):
        found, wanted = answer["entities"], predict.entities(record, None, None)
        assert [(e["type"], e["words"]) for e in found] == [(e["type"], e["words"]) for e in wanted]
        chances = [e["probability"] for e in wanted]
        assert [e["probability"] for e in found] == pytest.approx(chances, abs=1e-5)
    bare, wrong = predictor([{"text": "so good"}, {"text": "so good", "about_post": 3}])
    assert bare["note"] == "no about_post and no about_photo given, which the run reads"
    assert wrong["error"].startswith("about_post must be text, not 3")
    (long, odd) = predictor([
        {"text": "so good", "about_post": "so " * 300, "about_photo": "x"},
        {"text": "so good", "about_post": "x", "about_photo": "y", "relevance": 17},
    ])  # fmt: skip
    assert long["note"] == "of its notes only the first 128 sub-tokens were read"
    assert "error" not in odd and "note" not in odd  # relevance is no key that the run reads


def test_the_control_is_trained_and_scored_on_the_notes_of_others(
    noted, data_dir, encoder_dir, cache_dir, tmp_path, capsys
):
    """The control trains on what `PostNotes.shuffled` says, and is scored so again."""
    _, path = noted
    more = ("--fusion", "none", "--notes", path, "--extra", "post")
    folders = data_dir, encoder_dir, cache_dir
    folder = train_run(tmp_path / "run-shuffled-notes-s1", *folders, *more, "--shuffle-notes")
    model, config, _, shown = open_run(folder, "test", "cpu")
    own = [shown.notes.file.notes[example.id]["about_post"] for example in shown.examples]
    moved = [note["about_post"] != text for note, text in zip(shown.notes.of_post, own, strict=True)]
    assert sum(moved) >= len(moved) - 2  # two posts may begin with one word
    again = predict_posts(model, shown, config["labels"], 12, "cpu", "float32")
    records = read_predictions(folder / "predictions-test.jsonl")
    assert [r["predicted"] for r in again] == [r["predicted"] for r in records]
    evaluate.main(["--run", str(folder), "--device", "cpu"])
    assert "TRAINED AND SCORED WITH OTHER POSTS' NOTES" in capsys.readouterr().out
    # A pattern of the true runs leaves the control out, whose name begins as theirs.
    train_run(tmp_path / "run-s1", data_dir, encoder_dir, cache_dir, *more)
    name, _ = evaluate.read_runs(str(tmp_path / "run-s*"), "test")
    assert name == "run-s1"
    (name, found) = evaluate.read_runs(str(tmp_path / "run-*"), "test")
    assert name == "run-s1" and len(found) == 1
    with pytest.raises(ValueError, match="--notes .*: the run read none; leave it out"):
        run_notes({"notes": None}, None, "n.jsonl")
    # Another text under the same name is another system to the tables.
    argv = [str(a) for a in (
        "--dataset", "demo", "--data-dir", data_dir, "--cache-dir", cache_dir, "--img-size", 64,
        "--text-encoder", encoder_dir, "--epochs", 1, "--lr", 1e-3, "--device", "cpu", *more,
        "--run-dir", tmp_path / "run-s1",
    )]  # fmt: skip
    assert tables.other_run(argv) == "" and tables.finished(argv)
    other = write(tmp_path / "other.jsonl", [{"id": next(iter(read_notes(path))), "about_post": "x"}])
    argv[argv.index(str(path))] = str(other)
    assert "notes_sha256" in tables.other_run(argv) and not tables.finished(argv)


@pytest.mark.parametrize("flags, said", [
    (("--extra", "post"), "--extra post: taken from notes; add --notes FILE"),
    (("--notes", "n.jsonl"), "--notes: nothing reads them"),
    (("--shuffle-notes",), "--shuffle-notes: it gives posts"),
    (("--notes", "n", "--extra", "photo", "--shuffle-notes"), "--shuffle-notes"),
    (("--model", "vilt", "--notes", "n", "--extra", "post"), "no room for it, 40 sub-tokens"),
    (("--model", "blip", "--notes", "n", "--extra", "post"), "would show each word of it the photo"),
    (("--dataset", "mnre", "--decoder", "crf"), "a relation is one label"),
    (("--fusion", "none", "--shuffle-photos"), "--fusion none is shown no photo"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(list(flags))
    assert said in capsys.readouterr().err


def test_mistakes_are_one_line(noted, data_dir, encoder_dir, cache_dir, tmp_path):
    _, path = noted
    given = (data_dir, encoder_dir, cache_dir, "--fusion", "none", "--extra", "post")
    with pytest.raises(FileNotFoundError, match="no notes file .*make it with write_notes.py"):
        train_run(tmp_path / "a", *given, "--notes", tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="--max-len 128 and --extra-len 5000: .* takes 512 in all"):
        train_run(tmp_path / "b", *given, "--notes", path, "--extra-len", 5000)
    alone = write(tmp_path / "one.jsonl", [{"id": next(iter(read_notes(path))), "about_post": "x"}])
    with pytest.raises(ValueError, match="--shuffle-notes: fewer than 2 posts of train have an about_post"):
        train_run(tmp_path / "d", *given, "--notes", alone, "--shuffle-notes")
    with pytest.raises(ValueError, match="--shuffle-photos: of no post of train there is a photo, or a n"):
        train_run(tmp_path / "c", *given, "--notes", path, "--shuffle-photos")
    assert not list(tmp_path.glob("[abcd]"))  # a mistake leaves no run folder behind
