"""Notes in-process: tiny random chat models, a local server of every mood, and files cut anywhere."""

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
import socket
import stat
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import Qwen2_5_VLProcessor, Qwen2Config, Qwen2ForCausalLM, Qwen2VLImageProcessor
from transformers import Qwen2VLVideoProcessor

import write_notes
from parts.chat import Endpoint, Local
from parts.datasets import DATASETS, load_dataset
from write_notes import AGAIN, ASKED, DIGITS, fill_prompt, read_answer
from parts import chat

GOOD = {"about_post": "Jordan (person)", "about_photo": "a face", "relevance": 0.5, "phrases": ["man", "hat"]}
END, PAD, *REST = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                   "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TEMPLATE = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# ------------------------------------------------------------------------------------------------ models, dat


def build_tokenizer():
    """Bytes, what the prompts are made of, and Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([write_notes.PROMPT, write_notes.PHOTO, AGAIN], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=REST
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


SAMPLING = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 1.9, "no_repeat_ngram_size": 2}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Tiny random chat models: vision/ (Qwen2.5-VL) and text/ (Qwen2). Their own settings sample."""
    root, tokenizer = tmp_path_factory.mktemp("chats"), build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (END, PAD, *REST)}
    size = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "bos_token_id": None,
        "eos_token_id": ids[END], "pad_token_id": ids[PAD],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    seen = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    vision = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=size | {"rope_parameters": rope}, tie_word_embeddings=True,
        vision_config=seen | {"fullatt_block_indexes": [0], "initializer_range": 0.3},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    ))  # fmt: skip
    small = {"shortest_edge": 56 * 56, "longest_edge": 2 * 56 * 56}
    images = Qwen2VLImageProcessor(size=small)
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    for name, model, reader in (
        ("vision", vision, processor), ("text", Qwen2ForCausalLM(Qwen2Config(**size)), tokenizer)
    ):  # fmt: skip
        model.save_pretrained(root / name)
        reader.save_pretrained(root / name)
        change_json(root / name / "generation_config.json", SAMPLING)
    return root


def change_json(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")


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


# ---------------------------------------------------------------------------------------------------- a serve


class Server:
    """An OpenAI-compatible server; `reply(number of the request from 0 on, its body)`: an answer's text, or
    (status, headers, bytes), a function that is given the handler, or None to hang up. Keeps `requests`:
    (path, headers, body)."""

    def __init__(self, reply):
        self.requests, self.reply, mutex = [], reply, threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with mutex:
                    number = len(owner.requests)
                    owner.requests.append((self.path, self.headers, body))
                said = owner.reply(number, body)
                if said is None:
                    return self.connection.close()
                if callable(said):
                    return said(self)
                if isinstance(said, str):
                    said = 200, {}, json.dumps({"choices": [{"message": {"content": said}}]}).encode()
                status, headers, content = said
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                owner.requests.append((self.path, self.headers, "GET"))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that gave up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve():
    """A function (reply) -> `Server`."""
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


class Waits(list):
    """In place of the event that an `Endpoint` waits for: remembers the seconds and does not wait."""

    def wait(self, seconds):
        self.append(seconds)

    def set(self):
        pass


def asker(server, retries=3, timeout=5.0):
    ask = Endpoint(server.url, "m", 7, retries, timeout)
    ask.stopped = Waits()
    return ask


def asked_text(body, turn=-1):
    """The text of a request's last message."""
    content = body["messages"][turn]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def about(text):
    """A good answer that depends on the post alone."""
    return json.dumps(GOOD | {"about_post": re.search("Post: (.*)", text)[1]})


# ----------------------------------------------------------------------------------------- prompts and answer


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
    ('{"about_post": "a", "phrases": ["b,]",],}', {"about_post": "a", "phrases": ["b,]"]}),
    ("It's {'about_post': 'O\\'Neil \"so\"', 'x': None, 'y': [True,]}",
     {"about_post": "O'Neil \"so\"", "x": None, "y": [True]}),
    ('{"about_post": "a\nb\tc"}', {"about_post": "a\nb\tc"}),
    ("{'about_post': 'a\nb'}", {"about_post": "a\nb"}),
    ("{'about_post': __import__('os').getpid()}", None), ("{'about_post'}", None),
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


# ------------------------------------------------------------------------------------------------ local model


def reference(ask, texts, photo, most):
    """An answer token by token: the likeliest after a whole forward pass; no cache, batch or generate."""
    roles = ("user", "assistant", "user")[: len(texts)]
    contents = [[{"type": "text", "text": text}] for text in texts]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    if ask.sees:
        turns[0]["content"][:0] = [{"type": "image"}] * (photo is not None)
        text = ask.reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        images = {} if photo is None else {"images": [photo]}
        inputs = dict(ask.reader(text=[text], return_tensors="pt", **images))
    else:
        turns = [turn | {"content": turn["content"][0]["text"]} for turn in turns]
        inputs = dict(ask.reader.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt"))
    made, end = [], ask.tokenizer.convert_tokens_to_ids(END)
    while len(made) < most and end not in made:
        with torch.inference_mode():
            made.append(ask.model(**inputs, use_cache=False).logits[0, -1].argmax().item())
        for key, value in inputs.items():
            if value.ndim == 2 and key in ("input_ids", "attention_mask", "mm_token_type_ids"):
                last = {"input_ids": made[-1], "attention_mask": 1, "mm_token_type_ids": 0}[key]
                inputs[key] = torch.cat([value, torch.tensor([[last]])], 1)
    return ask.tokenizer.decode(made, skip_special_tokens=True)


def some_chats(kind):
    noise = [Image.effect_noise((60 + 30 * i, 99), 90).convert("RGB") for i in range(3)]
    photos = [noise[0], None, noise[1], noise[2], None] if kind == "vision" else [None] * 5
    return [["Who?"], ["Where is it then?", "no", "Again."], ["a longer post, " * 4], ["é😍"], ["x"]], photos


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
    whole = ask.reader.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert seen[0].tolist() == whole["input_ids"].tolist()
    assert (seen[0] == tokenizer.pad_token_id).sum() == bos


def test_the_default_is_a_model_of_the_kind_tried_here():
    args = write_notes.parse_args([])
    assert args.model == "Qwen/Qwen2.5-VL-3B-Instruct" and args.photos and args.endpoint is None


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
    examples = [e for part in load_dataset(str(folder)).examples.values() for e in part]
    for note, example in zip(notes[1:], examples[1:], strict=True):
        path = next(iter((folder / "images").glob(f"{example.image_id}.*"))) if note["with_photo"] else None
        photo = path and write_notes.thumbnail(path, 1024)
        prompt = fill_prompt(example, note["with_photo"]).replace("<|image_pad|>", "< |image_pad|>")
        first = reference(ask, [prompt], photo, 5)
        again = [prompt, first, AGAIN] if first.strip() else [f"{prompt}\n\n{AGAIN}"]
        assert note["raw"] == reference(ask, again, photo, 5)


# --------------------------------------------------------------------------------------------------- endpoint


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


def test_without_photos_none_is_sent_nor_asked_about(serve, data_dir, tmp_path):
    server = serve(lambda number, body: about(asked_text(body)))
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--endpoint", server.url, "--no-photos"]
    notes = lines(run(*flags, "--output", tmp_path / "n.jsonl", "--limit", 9))
    assert len(notes) == len(server.requests) == 9 and not any(note["with_photo"] for note in notes)
    assert all(isinstance(body["messages"][0]["content"], str) for _, _, body in server.requests)
    assert all(note.keys() & set(ASKED) == {"about_post"} for note in notes)


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


OK = (200, {}, json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode())
BAD = [
    None, (500, {}, b""), (503, {}, b"busy"), (429, {}, b"{}"), (200, {"Content-Length": "999"}, b"{}"),
    *((200, {}, body) for body in (b"<html>", b"{}", b"[]", b"\xff", b"[" * 10**5, b'{"choices": []}')),
    *((200, {}, b'{"choices": [{"message": %s}]}' % said) for said in (b"null", b"1")),
]  # fmt: skip


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


def test_retry_after_is_honoured_as_a_number_and_as_a_date(serve):
    later, before = formatdate(time.time() + 90, usegmt=True), formatdate(time.time() - 90, usegmt=True)
    cases = (("7", 7, 7), (later, 80, 91), *((no, 0.5, 1) for no in ("0", before, "soon", "-3", "1e9")))
    for asked, low, high in cases:
        limited = 429, {"Retry-After": asked}, b""
        ask = asker(serve(lambda number, body, limited=limited: OK if number else limited))
        assert ask([["hi"]], [None]) == ["fine"]
        assert len(ask.stopped) == 1 and low <= ask.stopped[0] <= high, asked
    server = serve(lambda number, body: (429, {"Retry-After": "86400"}, b'{"error": {"message": "quota"}}'))
    with pytest.raises(ValueError, match="429 Too Many Requests: quota, asks to wait 86400 seconds"):
        asker(server)([["hi"]], [None])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status, content, message", [
    (401, b'{"error": {"message": "wrong key sk-secret", "code": 1}}', "401 Unauthorized: wrong key <key>"),
    (404, b'{"object": "error", "message": "no model m"}', "404 Not Found: no model m"),
    (400, b'{"detail":"too\nlong"}', '400 Bad Request: {"detail":"too long"}'), (403, b"", "403 Forbidden"),
])  # fmt: skip
def test_what_the_server_refuses_is_said_at_once_in_its_words(serve, monkeypatch, status, content, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda number, body: (status, {}, content))
    ask = asker(server)
    with pytest.raises(ValueError) as caught:
        ask([["hi"]], [None])
    assert str(caught.value) == f"{server.url}/chat/completions: {message}"
    # Of 400 it asks whether it is the post.
    assert len(server.requests) == 1 + (status == 400) and ask.stopped == []


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("place", [0, 3])
def test_a_post_that_the_server_refuses_is_kept_raw_and_the_others_go_on(
    serve, data_dir, tmp_path, place, status, capsys
):
    """Whichever post it is, the first too, of which only another question can tell that it is at fault."""
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


def say(content, **more):
    """A reply whose message has such a content."""
    return 200, {}, json.dumps({"choices": [{"message": {"content": content} | more}]}).encode()


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


def test_of_a_content_of_parts_the_text_is_taken(serve):
    parts = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "fi"}
    server = serve(lambda number, body: say([*parts, {"type": "text", "text": "ne"}]))
    assert asker(server)([["hi"]], [None]) == ["fine"]


@pytest.mark.parametrize("reply, message, requests", [
    ((200, {}, b'{"error": {"message": "no model m", "code": 404}}'), "text: no model m", 1),
    ((200, {}, b'{"error": {"message": "try later", "code": 503}}'), "text: try later, tried 4 times", 4),
    ((200, {}, b"<html><title>Web UI</title>"), "text: <html><title>Web UI</title>, tried 4 times", 4),
    ((429, {}, b'{"error": {"message": "no money", "code": "insufficient_quota"}}'), "Requests: no money", 1),
])  # fmt: skip
def test_a_failure_is_said_in_the_servers_words(serve, reply, message, requests):
    server = serve(lambda number, body: reply)
    with pytest.raises(ValueError, match=f"{message}$") as caught:
        asker(server)([["hi"]], [None])
    assert len(server.requests) == requests
    assert isinstance(caught.value, chat.Refused) == ("later" not in message)


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


def test_an_answer_without_content_is_an_empty_one(serve):
    empty = 200, {}, b'{"choices": [{"message": {"content": null}}]}'
    server = serve(lambda number, body: empty)
    assert asker(server)([["hi"]], [None]) == [""] and len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed_with_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = serve(lambda number, body: OK)
    server = serve(lambda number, body: (status, {"Location": other.url}, b""))
    with pytest.raises(ValueError, match=f": {status} "):
        asker(server)([["hi"]], [None])
    assert other.requests == [] and len(server.requests) == 1


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


@pytest.mark.parametrize("where", [
    "words", "body", "escaped", "quoted", "address", "page", "content", "status", "line",
])  # fmt: skip
def test_the_key_that_a_server_repeats_is_in_no_message_and_no_note(
    serve, data_dir, tmp_path, monkeypatch, capsys, where
):
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


def test_a_word_in_place_of_a_key_is_left_where_it_stands(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert asker(serve(lambda number, body: "EMPTY"))([["hi"]], [None]) == ["EMPTY"]


def test_secrets_of_addresses_are_not_printed(serve, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        write_notes.parse_args(["--endpoint", "http://user:sk-secret@127.0.0.1/v1"])
    server = serve(lambda number, body: (401, {}, server.requests[-1][0].encode()))
    with pytest.raises(ValueError, match="/v1/chat/completions: 401 .*[?]v=1&api-key=<key>$"):
        Endpoint(f"{server.url}?v=1&api-key=sk-secret", "m", 1, 0)([["hi"]], [None])
    assert server.requests[0][0] == "/v1/chat/completions?v=1&api-key=sk-secret"
    for proxy in ("http://user:sk-secret@127.0.0.1:9", "user:sk-secret@127.0.0.1:9"):
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
    assert str(caught.value) == (
        f"post {examples[6].id}: {server.url}/chat/completions: 403 Forbidden: too long; what was written"
        " stays"
    )
    assert [note["id"] for note in lines(tmp_path / "n.jsonl")] == [e.id for e in examples[:6]]
    broken[0] = False
    server = serve(reply)  # the other one's last requests may still come in
    run(*flags, "--endpoint", server.url, "--workers", 3)
    assert len(server.requests) == 34  # no note is made twice
    assert [note["id"] for note in lines(tmp_path / "n.jsonl")] == [e.id for e in examples]


# --------------------------------------------------------------------------------------------- files of notes


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
    whole = run(*flags, "--output", tmp_path / "whole.jsonl").read_bytes()
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


@pytest.mark.parametrize("kind", ["device", "folder", "pipe", "link", "dangling", "empty"])
def test_an_output_that_is_not_its_own_is_left_as_it_is(data_dir, tmp_path, kind):
    out, target = tmp_path / "out.jsonl", tmp_path / "target"
    target.write_bytes(b"" if kind == "empty" else b"mine")
    make = {
        "device": lambda: os.mknod(out, stat.S_IFCHR | 0o666, os.makedev(1, 3)), "folder": out.mkdir,
        "pipe": lambda: os.mkfifo(out), "link": lambda: out.symlink_to(target), "empty": out.touch,
        "dangling": lambda: out.symlink_to(tmp_path / "nothing"),
    }  # fmt: skip
    try:
        make[kind]()
    except PermissionError:  # only root makes devices; a socket is no file either
        with socket.socket(socket.AF_UNIX) as place:
            place.bind(str(out))
    before = out.lstat()
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--retries", 0, "--output", out]
    with pytest.raises(ValueError, match="refused" if kind == "empty" else "out.jsonl: is .*--output"):
        run(*flags, "--endpoint", "http://127.0.0.1:9/v1")
    after = out.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "target"]


def test_one_process_an_output(data_dir, tmp_path):
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--no-photos", "--output", tmp_path / "out.jsonl"]
    with open(tmp_path / "out.jsonl", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out.jsonl: another process is writing it"):
            run(*flags)


def test_a_note_a_row_of_relations(serve, data_dir, tmp_path):
    server = serve(lambda number, body: about(asked_text(body)))
    flags = ["--dataset", "mnre", "--data-dir", data_dir, "--endpoint", server.url, "--workers", 1]
    notes = lines(run(*flags, "--output", tmp_path / "sub" / "n.jsonl"))
    parts = load_dataset("mnre", data_dir).examples
    times = Counter(e.id for part in parts.values() for e in part)
    ids = [e.id if times[e.id] == 1 else f"{split}/{e.id}" for split, part in parts.items() for e in part]
    assert [note["id"] for note in notes] == ids and len(set(ids)) == 32 and "train/train_0000.jpg@1" in ids
    examples = [e for part in parts.values() for e in part]
    for (_, _, body), example in zip(server.requests, examples, strict=True):
        names = [" ".join(example.words[a:b]) for a, b in (example.head, example.tail)]
        assert f'It names "{names[0]}" and "{names[1]}"' in asked_text(body)


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
