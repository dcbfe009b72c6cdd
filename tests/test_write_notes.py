"""Notes in-process: prompts and answers, models and servers asked, files cut anywhere."""

import base64
import fcntl
import hashlib
import html
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from chats import GOOD, about, asked_text, reference, say
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import write_notes
from parts.chat import Endpoint, Local
from parts.datasets import DATASETS, load_dataset
from write_notes import AGAIN, ASKED, DIGITS, fill_prompt, read_answer


@pytest.fixture
def folder(tmp_path):
    """A data set; photos: a wide and to be turned, b missing, c no picture, d good. a is in it thrice."""
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    posts = ("a", "{so}"), ("b", "<|image_pad|>"), ("c", "%s"), ("a", "again")
    (own / "train.txt").write_text("".join(f"IMGID:{i}\nJordan\tB-PER\n{word}\tO\n\n" for i, word in posts))
    (own / "valid.txt").write_text("IMGID:a\nfirst\tO\n\nIMGID:d\nlast\tO\n\n")
    wide = Image.new("RGB", (2400, 800), "red")
    wide.paste("blue", (0, 0, 1200, 800))
    turned = Image.Exif()
    turned[0x112] = 6  # to be turned right by 90 degrees: blue comes to be above
    wide.save(own / "images" / "a.jpg", exif=turned)
    (own / "images" / "c.jpg").write_text("no picture")
    Image.new("RGBA", (40, 20), "green").save(own / "images" / "d.png")
    return own


def lines(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def run(*flags):
    return write_notes.main([str(flag) for flag in flags])


def test_the_prompt_asks_for_exactly_the_keys_and_for_no_label(data_dir):
    ner = load_dataset("demo", data_dir).examples["train"][0]
    row = load_dataset("mnre", data_dir).examples["train"][0]
    for example in (ner, row):
        for photo, keys in ((True, list(ASKED)), (False, ["about_post"])):
            text = fill_prompt(example, photo)
            assert re.findall(r'^"(\w+)":', text, re.MULTILINE) == keys
            assert f"Post: {' '.join(example.words)}\n" in text
    (a, b), (c, d) = row.head, row.tail
    assert f'"{" ".join(row.words[a:b])}" and "{" ".join(row.words[c:d])}"' in fill_prompt(row, False)
    template = write_notes.PROMPT + write_notes.PHOTO + write_notes.ENTITIES + AGAIN
    labels = {label for _, labels in DATASETS.values() for label in labels} - {"O", "None"}
    for label in {label.split("-")[-1] for label in labels}:
        assert not re.search(rf"(?<!\w){re.escape(label)}(?!\w)", template), label


@given(st.text().filter(lambda text: "{" not in text), st.dictionaries(st.text(), st.integers()), st.text())
@settings(deadline=None)
def test_the_last_complete_object_is_taken_whatever_stands_around_it(before, more, after):
    wanted = more | {"about_post": "x"}
    plain, after = json.dumps(wanted), after.replace("{", "").replace("<", "")
    for text in (plain, f"```json\n{json.dumps(wanted, indent=1)}\n```", f'{{so}} {{"phrases": []}} {plain}'):
        assert read_answer(f"{before}{text}{after}", ["about_post", "phrases"]) == wanted


@pytest.mark.parametrize("answer, found", [
    ("", None), ("{}", None), ("I do not know.", None), ('{"about_post": "a", "phra', None),
    ("[" * 10**5, None), ('{"a":' * 2000, None), ('["about_post"]', None), ('{"kind": 1}', None),
    ('{"about_post": 1' + "0" * 5000 + "}", None),  # more digits than Python reads
    ('{"answer": {"about_post": "a"}}', {"about_post": "a"}),  # in a wrapper
    ('{"about_post": "a"} {"about_post": "b"}', {"about_post": "b"}),
    ('{"about_post": "a"} so {"x": 1} {so}', {"about_post": "a"}),
    ('{"about_post": "a", "why": {"about_post": "b"}}', {"about_post": "a", "why": {"about_post": "b"}}),
    ('{"x": 1} {"about_post": "b"}', {"about_post": "b"}), ('{"about_post": "a"}}}', {"about_post": "a"}),
    ('<think>{"about_post": "a"}</think> {"about_post": "b"}', {"about_post": "b"}),
    ('{"about_post": "a"}, no.</think>\n{"about_post": "b"}', {"about_post": "b"}),
    ('<think>{"about_post": "a"}</think>', None), (' <think>So {"about_post": "a"} or', None),
    ('{"about_post": "<think> (tag)"}', {"about_post": "<think> (tag)"}),
    ('{"about_post": "a\nb\tc"}', {"about_post": "a\nb\tc"}), ("{'about_post': __import__('os')}", None),
])  # fmt: skip
def test_what_counts_as_an_answer(answer, found):
    assert read_answer(answer, ["about_post", "phrases"]) == found


@pytest.mark.parametrize("part", ['{"a":', "{'a':[", "{'\\\"", "{,", "\n<think>\n", "{\"a", ",  "])
def test_no_answer_takes_long_to_read(part):
    start = time.monotonic()
    assert read_answer(part * 10**5 + "}" * 10**5, ["about_post"]) is None
    assert time.monotonic() - start < 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2), max_leaves=5,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*ASKED, "reason", "id", "model"]), VALUES), st.booleans())
@settings(deadline=None, max_examples=200)
def test_no_value_of_the_wrong_kind_is_written_and_each_is_counted(tmp_path_factory, said, seen):
    path = tmp_path_factory.getbasetemp() / "photo.png"
    if not path.exists():
        Image.new("RGB", (9, 9)).save(path)
    example = SimpleNamespace(words=("a",))
    stamp = {"model": "m", "prompt": "p", "check": "c"}
    post = write_notes.Post("1", example, path if seen else None, None, stamp)
    said["about_post"] = said.get("about_post", "x")
    answer = json.dumps(said)
    [(note, counted, reasons)] = write_notes.make_notes(lambda asked, _: [answer] * len(asked), [post])
    asked = [key for key in ASKED if key in said and (seen or key == "about_post")]

    def right(key, value):  # the reader's rules, said another way
        if key == "relevance":
            return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1
        if key == "phrases":
            return isinstance(value, list) and all(right("about_post", text) for text in value)
        return isinstance(value, str) and "\ud83d" not in value

    if right("phrases", said["about_post"]):
        said["about_post"] = "; ".join(said["about_post"])
    kept = {key: said[key] for key in asked if right(key, said[key])}
    assert note == {"id": "1", **kept, "with_photo": seen, **stamp}
    left = Counter(key if key in asked else "other keys" for key in said if key not in kept)
    assert Counter(counted) == left + Counter({"photo": int(seen)}) and reasons == {}


def test_a_random_models_answers_are_kept_raw(chats, folder, monkeypatch, capsys):
    """The whole way: words and photos in, its nonsense out, asked for twice; one answer is good."""
    answer = Local.__call__

    def answer_one(ask, asked, photos):
        pairs = zip(asked, answer(ask, asked, photos), strict=True)
        return [json.dumps(GOOD) if "{so}" in texts[0] else nonsense for texts, nonsense in pairs]

    monkeypatch.setattr(Local, "__call__", answer_one)
    output = run("--dataset", folder, "--model", chats / "vision", "--max-new-tokens", 5, "--batch-size", 2)
    assert output == folder / "notes.jsonl"
    notes = lines(output)
    assert [note["id"] for note in notes] == ["train/a", "b", "c", "a@13", "valid/a", "d"]
    assert [note["with_photo"] for note in notes] == [True, False, False, True, True, True]
    stamp = {"id", "with_photo", "model", "prompt", "check"}
    assert [note.keys() - stamp for note in notes] == [GOOD.keys(), *[{"raw"}] * 5]
    assert {(note["model"], note["prompt"]) for note in notes} == {(str(chats / "vision"), DIGITS)}
    assert re.fullmatch("[0-9a-f]{16}", DIGITS)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{output}: 6 posts, 4 with photo; 5 answers were no JSON and asked again, 5 kept raw; values left"
        " out: none; 1 photos missing (first: b: no such file); 1 photos unreadable (first: c: cannot"
        f" identify image file {str(folder / 'images' / 'c.jpg')!r})"
    )
    ask = Local(str(chats / "vision"), True, 5, "cpu")
    example, photo = load_dataset(str(folder)).examples["valid"][1], folder / "images" / "d.png"
    prompt, photo = fill_prompt(example, True), write_notes.thumbnail(photo, 1024)
    first = reference(ask, [prompt], photo, 5)
    again = [prompt, first, AGAIN] if first.strip() else [f"{prompt}\n\n{AGAIN}"]
    assert notes[-1]["raw"] == reference(ask, again, photo, 5)


def test_what_is_asked_of_an_endpoint(serve, folder, capsys):
    server = serve(lambda number, body: about(asked_text(body)))
    flags = ["--dataset", folder, "--endpoint", server.url + "/", "--model", "some/model", "--workers", 1]
    notes = lines(run(*flags, "--max-new-tokens", 99))
    examples = [e for part in load_dataset(str(folder)).examples.values() for e in part]
    for (path, headers, body), example, note in zip(server.requests, examples, notes, strict=True):
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 99)
        [message], seen = body["messages"], note["with_photo"]
        assert message["role"] == "user" and asked_text(body) == fill_prompt(example, seen)
        assert isinstance(message["content"], list) == seen
        said = GOOD | {"about_post": " ".join(example.words)}
        kept = said if seen else {"about_post": said["about_post"]}
        assert note == kept | {key: note[key] for key in ("id", "with_photo", "model", "prompt", "check")}
    picture = server.requests[0][2]["messages"][0]["content"][0]
    assert picture["type"] == "image_url"
    start, _, coded = picture["image_url"]["url"].partition(",")
    photo = Image.open(io.BytesIO(base64.b64decode(coded)))
    assert start == "data:image/jpeg;base64"
    assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (341, 1024))
    above, below = photo.getpixel((170, 100)), photo.getpixel((170, 900))
    assert above[2] > 200 > 50 > above[0] and below[0] > 200 > 50 > below[2]  # upright
    said = capsys.readouterr().err
    assert "0 answers were no JSON and asked again, 0 kept raw; values left out: 6 other keys;" in said


def test_answers_of_every_kind(serve, folder, capsys):
    again = {  # the last word of a post: what is answered, first and second
        "{so}": ["```json\n" + json.dumps(GOOD) + "\n```"],
        "<|image_pad|>": ["Sure!", '{"about_post": "two"}'],
        "%s": ['{"about_post": "cut', '{"about_post": "cut\ud83d'],
        "again": [json.dumps(GOOD | {"relevance": float("nan"), "phrases": "man"})],
        "first": ["", 'Here: {"about_post": 1, "relevance": true, "about_photo": null, "more": 2} so'],
        "last": ['{"relevance": 1}'],
    }
    asked = {word: [] for word in again}

    def reply(number, body):
        word = re.search(r"Post: .*?(\S+)\n", asked_text(body, 0))[1]
        asked[word].append(body["messages"])
        return again[word][len(asked[word]) - 1]

    output = run("--dataset", folder, "--endpoint", serve(reply).url, "--model", "m")
    notes = {note["id"]: note for note in lines(output)}
    kept = {i: {key: note[key] for key in (*ASKED, "raw") if key in note} for i, note in notes.items()}
    assert kept == {
        "train/a": GOOD, "b": {"about_post": "two"}, "c": {"raw": again["%s"][1]}, "valid/a": {},
        "a@13": {"about_post": "Jordan (person)", "about_photo": "a face"}, "d": {"relevance": 1},
    }  # fmt: skip
    assert {word: len(turns) for word, turns in asked.items()} == {w: len(a) for w, a in again.items()}
    first, second = asked["<|image_pad|>"]
    assert second == [*first, {"role": "assistant", "content": "Sure!"}, {"role": "user", "content": AGAIN}]
    (first,), (second,) = asked["first"]  # an empty answer is not sent back
    assert second["content"][0] == first["content"][0]  # the photo
    assert second["content"][1]["text"] == first["content"][1]["text"] + "\n\n" + AGAIN
    said = capsys.readouterr().err.splitlines()[-1]
    assert "6 posts, 4 with photo; 3 answers were no JSON and asked again, 1 kept raw; values left" in said
    assert "left out: 1 about_post, 1 about_photo, 2 relevance, 1 phrases, 1 other keys; 1 photos" in said


@pytest.mark.parametrize("status, place", [(400, 0), (400, 3), (413, 0), (422, 3)])
def test_a_post_that_the_server_refuses_is_kept_raw(serve, data_dir, tmp_path, place, status, capsys):
    """And others go on. The first too, of which only another question can tell that it is at fault."""
    out = tmp_path / "n.jsonl"
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--model", "m", "--output", out,
             "--limit", 5]  # fmt: skip
    examples = load_dataset("demo", data_dir).examples["train"][:5]
    barred = f"Post: {' '.join(examples[place].words)}\n"
    refuses = [barred in fill_prompt(example, False) for example in examples]

    def reply(number, body):
        if any(barred in message["content"] for message in body["messages"]):
            return status, {}, b'{"error": {"message": "content filter"}}'
        return about(asked_text(body)) if "Post: " in asked_text(body) else "{}"

    run(*flags, "--endpoint", serve(reply).url, "--workers", 2)
    notes = lines(out)
    assert [note["id"] for note in notes] == [example.id for example in examples]
    assert ["content filter" in note.get("raw", "") for note in notes] == refuses and refuses[place]
    assert f"{sum(refuses)} kept raw" in capsys.readouterr().err


@pytest.mark.parametrize("reply, message", [
    ((400, {}, b'{"message": "At most 0 image(s)"}'), "refused: 400 Bad Request: At most 0 image(s)"),
    (say("<think>Let me see. " * 99), "<think>Let me see. <think>Let me see."),
    (say(None, reasoning="so"), '{"choices": [{"message": {"content": null, "reasoning": "so"}}]}'),
    (say('{"about_post": 3}'), "values of other kinds"),
])  # fmt: skip
def test_first_posts_that_all_get_no_note_end_it_and_none_is_kept(serve, data_dir, tmp_path, reply, message):
    server = serve(lambda number, body: reply if "Post: " in asked_text(body, 0) else "{}")
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--endpoint", server.url, "--workers", 2]
    for limit, count in ((40, 8), (3, 3)):
        with pytest.raises(ValueError, match=f"no note of the first {count} posts can be used") as caught:
            run(*flags, "--output", tmp_path / "n.jsonl", "--limit", limit)
        assert f"; the last answer: {message}" in str(caught.value) and "goes on" not in str(caught.value)
        assert not (tmp_path / "n.jsonl").exists() and len(server.requests) < 40


def test_a_note_among_the_first_keeps_those_before_it(serve, data_dir, tmp_path):
    post = load_dataset("demo", data_dir).examples["train"][6]
    prompt = fill_prompt(post, False)
    server = serve(lambda number, body: json.dumps(GOOD) if asked_text(body) == prompt else "{}")
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--endpoint", server.url, "--no-photos"]
    notes = lines(run(*flags, "--output", tmp_path / "n.jsonl", "--limit", 9))
    assert ["raw" in note for note in notes] == [True] * 6 + [False] + [True] * 2
    assert notes[6].keys() & set(ASKED) == {"about_post"} and not any(note["with_photo"] for note in notes)
    assert all(isinstance(body["messages"][0]["content"], str) for _, _, body in server.requests)


def test_an_interrupt_waits_for_no_answer(serve, data_dir, tmp_path):
    release, before = threading.Event(), set(threading.enumerate())

    def reply(number, body):
        if number == 7:  # all eight wait
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return "late" if release.wait(9) else "never"

    flags = ["--dataset", "demo", "--data-dir", data_dir, "--endpoint", serve(reply).url, "--no-photos"]
    start = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--output", tmp_path / "n.jsonl")
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 5 and not (tmp_path / "n.jsonl").exists()
    # Python waits at its end for threads that are no daemons.
    workers = [thread for thread in set(threading.enumerate()) - before if "work_on" in thread.name]
    assert len(workers) == 8 and all(thread.daemon for thread in workers)
    release.set()


def test_the_key_is_sent_and_never_seen(serve, folder, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    server = serve(lambda number, body: about(asked_text(body)))
    output = run("--dataset", folder, "--endpoint", server.url, "--model", "m")
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-secret"}
    assert b"sk-secret" not in output.read_bytes() and "sk-secret" not in "".join(capsys.readouterr())
    assert not any("sk-secret" in json.dumps(body) for _, _, body in server.requests)
    for key in ("sk-se\ncret", "sk-sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="OPENAI_API_KEY: holds a character") as caught:
            Endpoint(server.url, "m", 1, 1)
        assert "cret" not in str(caught.value)


KEY = "sk-/se+cret\"12345"
PLACES = ["words", "body", "escaped", "quoted", "address", "page", "content", "status", "line"]


def echo(part, where):
    """A reply that repeats `part` of a request's headers."""
    said = f"{'x' * 280} {part}"
    return {
        "words": (400, {}, json.dumps({"message": said}).encode()), "body": (400, {}, said.encode()),
        "escaped": (403, {}, json.dumps({"message": said}).replace("/", "\\/").encode()),
        "quoted": (400, {}, json.dumps({"headers": part}).encode()),
        "address": (400, {}, quote(part).lower().encode()), "page": (400, {}, html.escape(part).encode()),
        "content": say(f"{{'about_post': '{part}'}}"),
        "status": lambda handler: handler.wfile.write(f"HTTP/1.0 500 {part}\r\n\r\n".encode()),
        "line": lambda handler: handler.wfile.write(f"{part}\r\n\r\n".encode()),
    }[where]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_the_key_that_a_server_repeats_is_nowhere(serve, data_dir, tmp_path, monkeypatch, capsys, where):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    posts = load_dataset("demo", data_dir).examples["train"]

    def reply(number, body):
        if fill_prompt(posts[1], False) in asked_text(body, 0):
            return echo(server.requests[number][1]["Authorization"].removeprefix("Bearer "), where)
        return json.dumps(GOOD)

    server = serve(reply)
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--endpoint", server.url, "--no-photos"]
    try:
        run(*flags, "--retries", 0, "--output", tmp_path / "n.jsonl", "--limit", 3)
    except ValueError as error:
        assert "<key>" in str(error) or where == "line"
        assert "cret" not in str(error) and "sk-" not in str(error)
    else:
        assert "<ke" in (tmp_path / "n.jsonl").read_text()
    assert not re.search("cret|sk-", "".join(capsys.readouterr()) + (tmp_path / "n.jsonl").read_text())


def test_several_workers_keep_the_order_and_stay_near(serve, data_dir, tmp_path):
    examples = [e for part in load_dataset("demo", data_dir).examples.values() for e in part]
    busy, most, mutex, four_at_once = [0], [0], threading.Lock(), threading.Barrier(4)

    def reply(number, body, together=False):
        with mutex:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        if together and number < 4:
            four_at_once.wait(10)
        time.sleep(0.02 if together and number % 4 == 0 else 0)
        with mutex:
            busy[0] -= 1
        return about(asked_text(body))

    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--model", "m"]
    one = run(*flags, "--endpoint", serve(reply).url, "--workers", 1, "--output", tmp_path / "1.jsonl")
    assert most == [1]
    server = serve(lambda number, body: reply(number, body, together=True))
    four = run(*flags, "--endpoint", server.url, "--workers", 4, "--output", tmp_path / "4.jsonl")
    assert most == [4] and one.read_bytes() == four.read_bytes() and len(lines(four)) == 40
    expected = [(e.id, " ".join(e.words)) for e in examples]
    assert [(note["id"], note["about_post"]) for note in lines(four)] == expected

    release = threading.Event()

    def hold_first(number, body):
        if asked_text(body) == fill_prompt(examples[0], False):
            release.wait(10)
        return about(asked_text(body))

    server = serve(hold_first)
    command = [*flags, "--endpoint", server.url, "--workers", 2, "--output", tmp_path / "2.jsonl"]
    thread = threading.Thread(target=run, args=command)
    thread.start()
    end = time.monotonic() + 10
    while len(server.requests) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(server.requests) == 5  # twice the workers ahead of the one waited for
    release.set()
    thread.join()
    assert (tmp_path / "2.jsonl").read_bytes() == one.read_bytes()


def test_a_failure_keeps_what_was_written_and_others_do_not_wait(serve, data_dir, tmp_path):
    out = tmp_path / "n.jsonl"
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--model", "m", "--output", out]
    examples = [e for part in load_dataset("demo", data_dir).examples.values() for e in part]
    failing, broken = f"Post: {' '.join(examples[6].words)}\n", [True]

    def reply(number, body):
        if broken[0] and failing in asked_text(body):
            return 403, {}, b'{"message": "too long"}'
        later = any(f"Post: {' '.join(e.words)}\n" in asked_text(body) for e in examples[7:9])
        return (503, {"Retry-After": "300"}, b"") if broken[0] and later else about(asked_text(body))

    server = serve(reply)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        run(*flags, "--endpoint", server.url, "--workers", 3)
    assert time.monotonic() - start < 5
    message = f"{server.url}/chat/completions: 403 Forbidden: too long; what was written stays"
    assert str(caught.value) == f"post {examples[6].id}: {message}"
    assert [note["id"] for note in lines(tmp_path / "n.jsonl")] == [e.id for e in examples[:6]]
    broken[0] = False
    server = serve(reply)  # the other one's last requests may still come in
    run(*flags, "--endpoint", server.url, "--workers", 3)
    assert len(server.requests) == 34  # no note is made twice
    assert [note["id"] for note in lines(tmp_path / "n.jsonl")] == [e.id for e in examples]


def cuts(whole):
    """Sizes to cut a file to: nothing, within the first key, at a line's end, before one, and anywhere."""
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    anywhere = range(37, len(whole), len(whole) // 5)
    return [0, 1, 8, ends[0], ends[0] + 3, ends[1] - 1, ends[3], ends[-2], ends[-1] - 1, *anywhere]


def test_wherever_it_was_stopped_a_local_model_goes_on(data_dir, tmp_path, monkeypatch, capsys):
    """An answer of this model depends on all that it is asked about together."""
    loads = []
    monkeypatch.setattr(write_notes, "Local", lambda *_: loads.append(1) or counting)
    asked = []

    first = fill_prompt(load_dataset("demo", data_dir).examples["train"][0], True)

    def counting(texts, photos):
        asked.extend(text[0] for text in texts)
        nonsense = hashlib.sha256(repr(texts).encode()).hexdigest()
        return [json.dumps(GOOD) if text[0] == first else f"{nonsense} {i}" for i, text in enumerate(texts)]

    flags = ["--dataset", "demo", "--data-dir", data_dir, "--max-new-tokens", 3, "--batch-size", 3]
    flags += ["--limit", 8]
    whole = run(*flags, "--output", tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    for size in cuts(whole):
        out.write_bytes(whole[:size])
        asked.clear()
        run(*flags, "--output", out)
        assert out.read_bytes() == whole, size
        done = whole[:size].count(b"\n")
        # Whole batches, none that was done, each post twice but the first.
        assert len(asked) == 2 * (8 - done // 3 * 3) - (done < 3)
    loads.clear()
    capsys.readouterr()
    run(*flags, "--output", out)
    assert capsys.readouterr().err == f"{out}: it is finished, 8 posts have their notes\n" and loads == []
    assert out.read_bytes() == whole
    run(*flags[:-1], 10, "--output", out)  # more of them go on too
    assert out.read_bytes().startswith(whole) and len(lines(out)) == 10


def test_wherever_it_was_stopped_an_endpoint_goes_on(serve, data_dir, tmp_path):
    server = serve(lambda number, body: about(asked_text(body)))
    flags = ["--dataset", "mnre", "--data-dir", data_dir, "--endpoint", server.url, "--limit", 8]
    whole = run(*flags, "--output", tmp_path / "sub" / "whole.jsonl").read_bytes()
    rows = load_dataset("mnre", data_dir).examples["train"][:8]
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"train/{row.id}" for row in rows]
    for size in cuts(whole):
        (tmp_path / "out.jsonl").write_bytes(whole[:size])
        before = len(server.requests)
        run(*flags, "--output", tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == whole, size
        assert len(server.requests) - before == 8 - whole[:size].count(b"\n")  # no note is made twice
    *_, last = whole.splitlines(keepends=True)  # what was torn may have been longer than what now comes
    (tmp_path / "out.jsonl").write_bytes(whole[: -len(last)] + last[:60] + b"a" * 9999)
    run(*flags, "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_of_anything_else_is_left_alone(serve, data_dir, tmp_path, monkeypatch):
    server, out = serve(lambda number, body: about(asked_text(body))), tmp_path / "out.jsonl"
    flags = ["--data-dir", data_dir, "--limit", 4, "--endpoint", server.url, "--output", out]
    demo = [*flags, "--dataset", "demo", "--model", "m"]
    made = run(*demo).read_bytes()
    one, two, *_ = made.splitlines(keepends=True)
    changed = two.replace(b'"check": "', b'"check": "f')
    asked = len(server.requests)
    for content, command, line, message in [
        (made, [*flags, "--dataset", "mnre", "--model", "m"], 1, "(id train_0000, here train/train_0000.jp"),
        (made, [*demo[:-1], "n"], 1, "(model m, here n)"), (made, [*demo, "--no-photos"], 1, "(check "),
        (made, [*demo, "--max-new-tokens", 9], 1, "(check "), (one + changed, demo, 2, "(check f"),
        (two + one, demo, 1, "(id train_0001, here train_0000)"),
        (one + one, demo, 2, "(id train_0000, here train_0001)"),
        (made, [*demo, "--limit", 3], 4, "(id train_0003, here no post)"), (made + b"{", demo, 5, "(no line"),
        *((one + bad, demo, 2, "(no line of this script)") for bad in (b"\n", b"[]\n", b"thesis", b"\xff\n")),
        (b'{"id": "train_0000"}\n', demo, 1, "(no line"), (one[:-1] + b" " + two, demo, 1, "(no line"),
    ]:  # fmt: skip
        out.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            run(*command)
        said = str(caught.value)
        assert said.startswith(f"{out}:{line}: not what this command writes there {message}"), said
        assert said.endswith("name another --output") and "\n" not in said
        assert out.read_bytes() == content
    out.write_bytes(made)
    monkeypatch.setattr(write_notes, "DIGITS", "0" * 16)
    with pytest.raises(ValueError, match=f":1: not what this .* there .prompt {DIGITS}, here 0000"):
        run(*demo)
    assert len(server.requests) == asked


def test_one_process_an_output_and_an_empty_one_stays_without_a_server(data_dir, tmp_path):
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--output", tmp_path / "out.jsonl"]
    with open(tmp_path / "out.jsonl", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out.jsonl: another process is writing it"):
            run(*flags)
    with pytest.raises(ValueError, match="refused"):
        run(*flags, "--retries", 0, "--endpoint", "http://127.0.0.1:9/v1")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_photos_that_are_not_there(serve, folder, tmp_path, capsys):
    server = serve(lambda number, body: about(asked_text(body)))
    (tmp_path / "none").mkdir()
    flags = ["--dataset", folder, "--endpoint", server.url, "--model", "m"]
    for more, message in (
        (["--images", tmp_path / "none"], f"no photo of 4 is in {tmp_path / 'none'}; add --images or --no"),
        (["--images", tmp_path / "absent"], "no image folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            run(*flags, *more)
    assert server.requests == [] and not (folder / "notes.jsonl").exists()
    os.mkfifo(folder / "images" / "b.jpg")
    run(*flags, "--limit", 2)
    assert "2 posts, 1 with photo; " in (said := capsys.readouterr().err)
    assert said.endswith("0 photos missing; 1 photos unreadable (first: b: not a file)\n")
    shutil.copy(folder / "images" / "d.png", tmp_path / "none")
    run(*flags, "--images", tmp_path / "none", "--output", tmp_path / "n.jsonl")
    assert "6 posts, 1 with photo; " in (said := capsys.readouterr().err)
    assert said.endswith("; 5 photos missing (first: train/a: no such file); 0 photos unreadable\n")
    lone = tmp_path / "lone"
    lone.mkdir()
    for split in ("train", "valid"):
        (lone / f"{split}.txt").write_text("word\tO\n\n")
    flags = ["--dataset", lone, "--endpoint", server.url, "--model", "m"]
    with pytest.raises(FileNotFoundError, match="no photo of 0 is in any folder; add --images or --no-ph"):
        run(*flags)
    notes = lines(run(*flags, "--no-photos"))
    assert [note["id"] for note in notes] == ["train/line 1", "valid/line 1"]


@pytest.mark.parametrize("flags, message", [
    (["--workers", "3"], "--workers is for an --endpoint only"),
    (["--retries", "3"], "--retries is for an --endpoint only"),
    (["--endpoint", "http://a", "--batch-size", "3"], "--batch-size is for a local model only"),
    (["--endpoint", "http://a", "--device", "cuda:7"], "--device is for a local model only"),
    (["--endpoint", "localhost:8000"], "--endpoint 'localhost:8000': no address such as http"),
    (["--endpoint", "http://a:b/v1"], "no address"), (["--endpoint", "http://u:p@a"], "--endpoint: no add"),
    (["--endpoint", "file:///etc/hosts"], "no address such as"), (["--endpoint", "http://a b"], "no address"),
    (["--images", "x", "--no-photos"], "--images does not go with --no-photos"),
    (["--max-new-tokens", "0"], "0 is not from 1"), (["--limit", "0"], "0 is not from 1"),
])  # fmt: skip
def test_arguments_that_contradict_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        write_notes.parse_args(flags)
    assert message in capsys.readouterr().err

