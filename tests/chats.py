"""What the tests of chat models share: tiny random ones, and a local server of every mood."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import Qwen2_5_VLProcessor, Qwen2Config, Qwen2ForCausalLM, Qwen2VLImageProcessor
from transformers import Qwen2VLVideoProcessor

import write_notes
from parts.chat import Endpoint

GOOD = {"about_post": "Jordan (person)", "about_photo": "a face", "relevance": 0.5, "phrases": ["man", "hat"]}
END, PAD, *REST = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                   "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TEMPLATE = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer():
    """Bytes, what the prompts are made of, and Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([write_notes.PROMPT, write_notes.PHOTO, write_notes.AGAIN], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=REST
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


SAMPLING = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 1.9, "no_repeat_ngram_size": 2}


def save_models(root):
    """Tiny random chat models: vision/ (Qwen2.5-VL) and text/ (Qwen2). Their own settings sample."""
    tokenizer = build_tokenizer()
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


def change_json(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


def say(content, **more):
    """A reply whose message has such a content."""
    return 200, {}, json.dumps({"choices": [{"message": {"content": content} | more}]}).encode()
