"""parts/chat.py: tiny random models against a whole forward pass; a local server of every mood."""

import base64
import json
import shutil
import threading
import time

import pytest
import torch
import transformers
from chats import END, PAD, TEMPLATE, asker, build_tokenizer, change_json, reference, say, some_chats
from PIL import Image
from tokenizers import processors

import write_notes
from parts import chat
from parts.chat import Endpoint, Local

@pytest.fixture(scope="module")
def local(chats):
    """A function (name, tokens at most) -> `Local` on CPU; each is loaded once."""
    made = {}

    def get(name, most):
        if name not in made:
            made[name] = Local(str(chats / name), name == "vision", most, "cpu")
        made[name].model.generation_config.max_new_tokens = most
        return made[name]

    return get


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_batched_answers_are_the_single_ones_and_greedy(local, kind):
    texts, photos = some_chats(kind)
    ask = local(kind, 10)
    batched = ask(texts, photos)
    assert batched == [ask([text], [photo])[0] for text, photo in zip(texts, photos, strict=True)]
    assert batched == [reference(ask, text, photo, 10) for text, photo in zip(texts, photos, strict=True)]
    assert len(set(batched)) == 5
    if kind == "vision":
        assert ask(texts[:1], [None]) != batched[:1] != ask(texts[:1], photos[2:3])  # it looks at the photo
    assert ask([], []) == []


@pytest.mark.parametrize("most", [1, 6])
def test_no_more_than_max_new_tokens_are_generated(local, monkeypatch, most):
    ask, lengths = local("vision", most), []
    generate = ask.model.generate

    def counting(**inputs):
        made = generate(**inputs)
        lengths.append(made.shape[1] - inputs["input_ids"].shape[1])
        return made

    monkeypatch.setattr(ask.model, "generate", counting)
    ask(*some_chats("vision"))
    assert lengths == [most, most]


def test_an_answer_ends_where_the_model_ends_it(local, chats, tmp_path):
    texts, photos = some_chats("text")
    ask = local("text", 10)
    prompt = ask.tokenizer(ask.prompt(texts[0], None), return_tensors="pt")
    with torch.inference_mode():
        tokens = ask.model.generate(**prompt)[0, prompt["input_ids"].shape[1] :].tolist()
    shutil.copytree(chats / "text", tmp_path / "ends")
    change_json(tmp_path / "ends" / "generation_config.json", {"eos_token_id": [5, tokens[4]]})
    ending = Local(str(tmp_path / "ends"), False, 10, "cpu")
    ended = tokens[: tokens.index(tokens[4]) + 1]
    assert len(ended) < 10
    assert ending(texts, photos)[0] == ask.tokenizer.decode(ended, skip_special_tokens=True)


def test_a_post_that_spells_a_control_token_holds_words(local):
    ask, photo = local("vision", 4), Image.new("RGB", (56, 56))
    ids = ask.tokenizer.convert_tokens_to_ids([END, "<|image_pad|>"])
    for text in ("nothing", "<|image_pad|><|im_end|>"):
        read = ask.reader(text=[ask.prompt([text], photo)], images=[[photo]], return_tensors="pt")
        assert [(read["input_ids"] == i).sum().item() for i in ids] == [1, 4]
    assert ask([["<|image_pad|>"]], [photo]) != ask([["nothing"]], [photo])


@pytest.mark.parametrize("kind, begins, bos", [
    ("vision", PAD, 1), ("vision", "", 1), ("text", PAD, 1), ("text", "", 0),
])  # fmt: skip
def test_special_tokens_are_those_of_transformers_own_way(chats, tmp_path, kind, begins, bos):
    """The tokenizer puts a bos before any text: it comes once, in text models only if the template has it."""
    shutil.copytree(chats / kind, tmp_path / kind)
    tokenizer, template = build_tokenizer(), begins + TEMPLATE
    put = processors.TemplateProcessing(f"{PAD} $A", special_tokens=[(PAD, tokenizer.pad_token_id)])
    tokenizer.backend_tokenizer.post_processor = put
    tokenizer.bos_token, tokenizer.chat_template = PAD, template
    tokenizer.save_pretrained(tmp_path / kind)
    ask, seen = Local(str(tmp_path / kind), False, 2, "cpu"), []
    ask.model.generate = lambda **inputs: seen.append(inputs["input_ids"]) or inputs["input_ids"]
    ask([["hello"]], [None])
    turns = [{"role": "user", "content": [{"type": "text", "text": "hello"}] if ask.sees else "hello"}]
    whole = ask.reader.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")  # fmt: skip
    assert seen[0].tolist() == whole["input_ids"].tolist()
    assert (seen[0] == tokenizer.pad_token_id).sum() == bos


def test_weights_are_bfloat16_on_cuda(chats, monkeypatch):
    asked = []

    class Model:
        generation_config = transformers.GenerationConfig(eos_token_id=3)

        def eval(self):
            return self

        def to(self, device):
            asked.append(device)
            return self

    monkeypatch.setattr(chat, "check_device", lambda device: None)
    monkeypatch.setattr(chat, "load_pretrained", lambda *_, dtype: asked.append(dtype) or Model())
    for device in ("cuda", "cuda:1", "cpu"):
        Local(str(chats / "text"), False, 3, device)
    assert asked == [torch.bfloat16, "cuda", torch.bfloat16, "cuda:1", torch.float32, "cpu"]


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_a_model_whose_template_knows_of_thinking_does_not_think(chats, tmp_path, kind):
    shutil.copytree(chats / kind, tmp_path / kind)
    more = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"
    (tmp_path / kind / "chat_template.jinja").write_text(TEMPLATE + more)
    plain, ask = (Local(str(root / kind), False, 2, "cpu") for root in (chats, tmp_path))
    assert ask.prompt(["hi"], None) == plain.prompt(["hi"], None) + "<think>\n\n</think>"


def test_no_code_of_a_models_folder_is_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "own", "auto_map": {"AutoConfig": "own.Own"},
    }))  # fmt: skip
    (tmp_path / "own.py").write_text(f"""open({str(tmp_path / "ran")!r}, "w")
from transformers import PretrainedConfig
class Own(PretrainedConfig):
    model_type = "own"
""")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Local(str(tmp_path), False, 4, "cpu")
    assert not (tmp_path / "ran").exists()


def test_models_that_cannot_be_used_are_one_line(chats, data_dir, tmp_path):
    shutil.copytree(chats / "vision", tmp_path / "untold")
    (tmp_path / "untold" / "chat_template.jinja").unlink()
    (tmp_path / "empty").mkdir()
    for source, photos, message in (
        (chats / "text", True, "text: reads no photos; add --no-photos"),
        (data_dir / "demo" / "encoder", False, "encoder: no chat template; name a chat model"),
        (tmp_path / "untold", True, "untold: no chat template; name a chat model"),
        (tmp_path / "empty", True, "empty: cannot be loaded"), ("no/such", True, "no/such: cannot be loaded"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            Local(str(source), photos, 4, "cpu")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("--model ")
    with pytest.raises(ValueError, match="--device nowhere: cannot be used here"):
        Local(str(chats / "text"), False, 4, "nowhere")


OK = (200, {}, json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode())
BAD = [
    None, (500, {}, b""), (503, {}, b"busy"), (429, {}, b"{}"), (200, {"Content-Length": "999"}, b"{}"),
    *((200, {}, body) for body in (b"<html>", b"{}", b"[]", b"\xff", b"[" * 10**5, b'{"choices": []}')),
    *((200, {}, b'{"choices": [{"message": %s}]}' % said) for said in (b"null", b"1")),
]  # fmt: skip
NO_TEXT = "an answer that is no JSON with choices, message and content that is text"


@pytest.mark.parametrize("bad", BAD)
def test_what_may_pass_is_tried_again_with_growing_pauses(serve, bad):
    server = serve(lambda number, body: OK if number == 2 else bad)
    ask = asker(server)
    assert ask([["hi"]], [None]) == ["fine"] and len(server.requests) == 3
    assert len(ask.stopped) == 2 and all(2**i / 2 <= s <= 2**i for i, s in enumerate(ask.stopped))
    server = serve(lambda number, body: bad)
    ask = asker(server)
    with pytest.raises(ValueError, match="/v1/chat/completions: .*, tried 4 times$") as caught:
        ask([["hi"]], [None])
    assert len(server.requests) == 4 and len(ask.stopped) == 3 and "\n" not in str(caught.value)


def test_pauses_stay_under_a_minute_and_differ(serve):
    asks = [asker(serve(lambda number, body: (500, {}, b"")), retries=12) for _ in range(2)]
    for ask in asks:
        with pytest.raises(ValueError, match="500 Internal Server Error, tried 13 times"):
            ask([["hi"]], [None])
        assert all(min(60, 2**i) / 2 <= seconds <= min(60, 2**i) for i, seconds in enumerate(ask.stopped))
    assert asks[0].stopped != asks[1].stopped


def test_a_slow_server_and_one_that_is_not_there_are_tried_again(serve):
    release = threading.Event()
    server = serve(lambda number, body: "late" if release.wait(5) else "never")
    ask = asker(server, retries=2, timeout=0.05)
    with pytest.raises(ValueError, match="timed out, tried 3 times"):
        ask([["hi"]], [None])
    assert len(server.requests) == 3
    release.set()
    assert asker(server)([["hi"]], [None]) == ["late"]
    server.http.shutdown()
    server.http.server_close()
    ask = asker(server, retries=2)
    with pytest.raises(ValueError, match="refused, tried 3 times"):
        ask([["hi"]], [None])
    assert len(ask.stopped) == 2


def test_retry_after_is_honoured(serve):
    for asked, low, high in (("7", 7, 7), *((no, 0.5, 1) for no in ("0", "soon", "-3", "1e9"))):
        limited = 429, {"Retry-After": asked}, b""
        ask = asker(serve(lambda number, body, limited=limited: OK if number else limited))
        assert ask([["hi"]], [None]) == ["fine"]
        assert len(ask.stopped) == 1 and low <= ask.stopped[0] <= high, asked
    server = serve(lambda number, body: (429, {"Retry-After": "86400"}, b'{"error": {"message": "quota"}}'))
    with pytest.raises(ValueError, match="429 Too Many Requests: quota, asks to wait 86400 seconds"):
        asker(server)([["hi"]], [None])
    assert len(server.requests) == 1


@pytest.mark.parametrize("reply, message, requests", [
    ((401, {}, b'{"error": {"message": "wrong key sk-secret", "code": 1}}'),
     "401 Unauthorized: wrong key <key>", 1),
    ((404, {}, b'{"object": "error", "message": "no model m"}'), "404 Not Found: no model m", 1),
    ((400, {}, b'{"detail":"too\nlong"}'), '400 Bad Request: {"detail":"too long"}', 2),  # is it the post?
    ((403, {}, b""), "403 Forbidden", 1),
    ((200, {}, b'{"error": {"message": "no model m", "code": 404}}'), f"{NO_TEXT}: no model m", 1),
    ((200, {}, b'{"error": {"message": "try later", "code": 503}}'),
     f"{NO_TEXT}: try later, tried 4 times", 4),
    ((200, {}, b"<html><title>Web UI</title>"), f"{NO_TEXT}: <html><title>Web UI</title>, tried 4 times", 4),
    ((429, {}, b'{"error": {"message": "no money", "code": "insufficient_quota"}}'),
     "429 Too Many Requests: no money", 1),
])  # fmt: skip
def test_a_failure_is_said_in_the_servers_words(serve, monkeypatch, reply, message, requests):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda number, body: reply)
    ask = asker(server)
    with pytest.raises(ValueError) as caught:
        ask([["hi"]], [None])
    assert str(caught.value) == f"{server.url}/chat/completions: {message}"
    assert len(server.requests) == requests and len(ask.stopped) == (3 if requests == 4 else 0)
    assert isinstance(caught.value, chat.Refused) == ("later" not in message)


def test_a_server_is_asked_as_it_wants_from_its_first_refusals_on(serve, capsys):
    def reply(number, body):
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {}, json.dumps({"error": {"message": said}}).encode()
        if "temperature" in body:
            return 400, {}, b'{"error": {"message": "\'temperature\' does not support 0 with this model."}}'
        return OK

    server = serve(reply)
    ask = asker(server)
    assert ask([["hi"], ["so"]], [None, None]) == ["fine", "fine"] and ask.stopped == []
    *_, third, fourth = (body for _, _, body in server.requests)
    assert len(server.requests) == 4 and third["max_completion_tokens"] == 7
    assert third.keys() == fourth.keys() == {"model", "messages", "max_completion_tokens"}
    assert capsys.readouterr().err.count("takes no temperature") == 1
    server = serve(lambda number, body: (400, {}, b"max_completion_tokens, and temperature: only 1"))
    with pytest.raises(ValueError, match="400 Bad Request: max_completion_tokens, and"):
        asker(server)([["hi"]], [None])  # and it does not ask for ever


@pytest.mark.parametrize("content, answer", [
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "fi"},
      {"type": "text", "text": "ne"}], "fine"),
    (None, ""), ("EMPTY", "EMPTY"),  # the last: a word that stands in place of a key
])  # fmt: skip
def test_what_of_a_content_is_the_answer(serve, monkeypatch, content, answer):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server = serve(lambda number, body: say(content))
    assert asker(server)([["hi"]], [None]) == [answer] and len(server.requests) == 1


TRICKLED = {
    "status": b"HTTP/1.1 200 OK and so on, for ever, and never to its end",
    "headers": b"HTTP/1.0 200 OK\r\nSo: on, for ever, and never to its end",
    "body": b"HTTP/1.0 200 OK\r\n\r\nand so on, for ever, and never to its end",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
}


@pytest.mark.parametrize("part", TRICKLED)
def test_an_answer_that_never_ends_is_given_up(serve, part):
    def trickle(handler):
        head, tail = TRICKLED[part][:20], TRICKLED[part][20:]
        handler.wfile.write(head)
        for _ in range(40):
            for byte in tail:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.02)

    ask, start = asker(serve(lambda number, body: trickle), 0, 0.3), time.monotonic()
    with pytest.raises(ValueError, match="timed out"):
        ask([["hi"]], [None])
    assert time.monotonic() - start < 2


def test_no_more_than_8_mb_of_an_answer_are_read(serve):
    sent = []

    def flood(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        for _ in range(64):
            sent.append(handler.wfile.write(b" " * 2**20))

    with pytest.raises(ValueError, match="an answer of over 8,388,608 bytes"):
        asker(serve(lambda number, body: flood), 0)([["hi"]], [None])
    assert sum(sent) < 2**25


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed_with_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = serve(lambda number, body: OK)
    server = serve(lambda number, body: (status, {"Location": other.url}, b""))
    with pytest.raises(ValueError, match=f": {status} "):
        asker(server)([["hi"]], [None])
    assert other.requests == [] and len(server.requests) == 1


def test_secrets_of_addresses_are_not_printed(serve, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        write_notes.parse_args(["--endpoint", "http://user:sk-secret@127.0.0.1/v1"])
    server = serve(lambda number, body: (401, {}, server.requests[-1][0].encode()))
    with pytest.raises(ValueError, match="/v1/chat/completions: 401 .*[?]v=1&api-key=<key>$"):
        Endpoint(f"{server.url}?v=1&api-key=sk-secret", "m", 1, 0)([["hi"]], [None])
    assert server.requests[0][0] == "/v1/chat/completions?v=1&api-key=sk-secret"
    for proxy in ("http://user:sk-secret@127.0.0.1:9/", "user:sk-secret@127.0.0.1:9"):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(ValueError, match=" through the proxy 127.0.0.1:9: .*refused") as caught:
            Endpoint(server.url, "m", 1, 0)([["hi"]], [None])
        assert "secret" not in str(caught.value)
    assert "secret" not in "".join(capsys.readouterr())


def test_plain_http_to_another_host_is_warned_of(monkeypatch, capsys):
    for url in ("http://localhost:1/v1", "http://127.0.0.2", "http://[::1]:1", "https://192.0.2.1/v1"):
        Endpoint(url, "m", 1, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    Endpoint("http://192.0.2.1:1/v1", "m", 1, 0)
    said = capsys.readouterr().err
    assert said.startswith("WARNING: anybody on the way to http://192.0.2.1:1 can read the posts and the key")
    assert said.count("\n") == 1


def test_what_a_photos_maker_wrote_into_it_is_not_sent(serve, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg", comment=b"my address")
    server = serve(lambda number, body: "fine")
    asker(server)([["hi"]], [write_notes.thumbnail(tmp_path / "a.jpg", 1024)])
    sent = server.requests[0][2]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert b"my address" in (tmp_path / "a.jpg").read_bytes() and b"my address" not in base64.b64decode(sent)
