"""A chat model behind one call, of transformers or at an endpoint: chats and photos in, answers out.

    ask = Local("Qwen/Qwen2.5-VL-3B-Instruct", photos=True, most=256, device="cuda")
    ask = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-3B-Instruct", most=256, retries=5)
    answers = ask([["Who is it?"], ["Who is it?", "Kevin", "And where?"]], [photo, None])

A chat is a list of texts, the user's and the model's in turn; its photo, a PIL image or None, stands before
the first. Both answer greedily, in at most `most` tokens.
"""

import base64
import contextlib
import html
import io
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import Future
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError
from urllib.parse import parse_qsl, quote, urlsplit

import torch
import transformers
from tqdm import tqdm

from parts.console import first_line
from parts.processes import check_device
from parts.text_encoder import as_data, load_pretrained

PROBE = "Answer with {}."
TIMEOUT = 600  # seconds that an endpoint may take for an answer, or ask to wait
LONGEST = 2**23  # bytes of an endpoint's answer, at most
SECRETS = "key|token|secret|sig|auth|pass|code"  # in the names of an address's query
# A refusal of the temperature, as servers put it.
NO_TEMPERATURE = re.compile(
    "temperature[^.]{0,60}(support|deprecat|allow|permit|only)"
    "|(unsupported|unknown|unrecognized|unexpected)[^.]{0,60}temperature", re.IGNORECASE,
)  # fmt: skip


def messages(texts, image, listed):
    """A chat as models take it; `image`: the part that is its photo, if any; `listed`: contents are lists."""
    turns = []
    for i, text in enumerate(texts):
        parts = [{"type": "text", "text": text}]
        if i == 0 and image is not None:
            parts = [image, *parts]
        content = parts if listed or parts[1:] else text
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    return turns


class Local:
    """A chat model of transformers at `source`, a hub's name or a local folder; `photos`: if it sees any.

    bfloat16 on CUDA, else float32. Of its own generation settings only those that end an answer count, and it
    does not think first, where its template knows how to say so.
    ValueError if it cannot be loaded, reads no photos, or has no chat template.
    """

    def __init__(self, source, photos, most, device):
        check_device(device)
        self.instead = ""  # as of an `Endpoint`
        try:
            config = transformers.AutoConfig.from_pretrained(source, **as_data(source))
            self.sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            kind = transformers.AutoProcessor if self.sees else transformers.AutoTokenizer
            self.reader = kind.from_pretrained(source, **as_data(source))
        except (OSError, ValueError, ImportError, KeyError) as error:
            message = f"cannot be loaded ({first_line(error)}); name a chat model of a hub, or a folder"
            raise ValueError(f"--model {source}: {message}") from None
        if photos and not hasattr(self.reader, "image_processor"):
            raise ValueError(f"--model {source}: reads no photos; add --no-photos, or name a model that does")
        if not self.reader.chat_template:
            raise ValueError(f"--model {source}: no chat template; name a chat model (often -Instruct)")
        self.template = {"tokenize": False, "add_generation_prompt": True}
        if "enable_thinking" in str(self.reader.chat_template):
            self.template["enable_thinking"] = False
        self.tokenizer = getattr(self.reader, "tokenizer", self.reader)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.control = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        kind = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = load_pretrained(kind, source, "--model", dtype=dtype).eval().to(device)
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
        )  # fmt: skip

    def prompt(self, texts, photo):
        """The text that the model goes on with."""
        for token in self.control:  # a post may spell one: with a space in it, it is words
            texts = [text.replace(token, f"{token[0]} {token[1:]}") for text in texts]
        turns = messages(texts, None if photo is None else {"type": "image"}, self.sees)
        return self.reader.apply_chat_template(turns, **self.template)

    @torch.inference_mode()
    def __call__(self, chats, photos):
        answers, bos = [None] * len(chats), self.tokenizer.bos_token
        for blind in (False, True):  # apart: not every processor takes chats of both kinds at once
            rows = [i for i, photo in enumerate(photos) if (photo is None) == blind]
            if not rows:
                continue
            prompts = [self.prompt(chats[i], photos[i]) for i in rows]
            more = {} if blind else {"images": [[photos[i]] for i in rows]}
            more["add_special_tokens"] = self.sees and not (bos and prompts[0].startswith(bos))
            inputs = self.reader(text=prompts, padding=True, return_tensors="pt", **more)
            for key, part in inputs.items():
                dtype = self.model.dtype if part.is_floating_point() else part.dtype
                inputs[key] = part.to(self.model.device, dtype)
            tokens = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
        return answers


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go with it."""

    def redirect_request(self, *_):
        return None


class Reply(HTTPResponse):
    """A reply that must be there, headers and all, before its connection's timeout has passed once."""

    def __init__(self, sock, *args, **options):
        super().__init__(sock, *args, **options)
        end, readinto = time.monotonic() + sock.gettimeout(), self.fp.raw.readinto

        def read_in_time(buffer):
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError("timed out")
            sock.settimeout(left)
            return readinto(buffer)

        self.fp.raw.readinto = read_in_time


class Deadline(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens addresses so that what comes back is a `Reply`."""

    def do_open(self, kind, request, **options):
        def connect(*args, **more):
            connection = kind(*args, **more)
            connection.response_class = Reply
            return connection

        return super().do_open(connect, request, **options)


class Refused(ValueError):
    """What a server would refuse again: a wrong key, an empty account, a model that it does not have."""


def split_url(url):
    """The parts of an endpoint's address; ValueError, which repeats no secret, unless it is a plain one."""
    try:
        parts = urlsplit(url)
        plain = re.fullmatch("https?://[!-~]+", url) and parts.hostname and "@" not in parts.netloc
        plain = plain and parts.port != 0
    except ValueError:  # a port that is no number
        plain = False
    if not plain:
        harmless = "" if re.search("[@?]", url) else f" {url!r}"
        raise ValueError(
            f"--endpoint{harmless}: no address such as http://localhost:8000/v1; user and password do not"
            " belong there, a key goes into the environment variable OPENAI_API_KEY"
        )
    return parts


def spellings(secret):
    """A secret as servers may repeat it; none of a word too short to be one, such as vLLM's EMPTY."""
    if len(secret) < (8 if secret.isalpha() else 6):
        return set()
    quoted = {quote(secret), quote(secret, safe="")}
    quoted |= {re.sub("%..", lambda match: match[0].lower(), spelling) for spelling in quoted}
    return {secret, json.dumps(secret)[1:-1], secret.replace("/", "\\/"), html.escape(secret), *quoted}


def read_content(body):
    """The text of an answer, "" where its content is null; None for a body of another kind."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
        if isinstance(content, list):  # of parts; what was thought is of another type than text
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return (content or "") if isinstance(content, str | None) else None


class Endpoint:
    """A `model` at an OpenAI-compatible server; several threads may call it at once. Photos go as JPEG.

    The key is that in the environment variable OPENAI_API_KEY, if it is set; it is taken out of all that the
    server says. What it refuses of `settings` it is asked without, from then on. `Refused` at once for what
    the server refuses (4xx but for 408 and 429, an empty account), ValueError for any other failure once
    `retries` more requests failed too. A chat that it refuses for what stands in it (400, 413, 422: a filter,
    a length), while it answers another, is answered "refused: " and what it says; an answer without content
    (null: a refusal too) is "". `instead`: what came in its place.
    """

    def __init__(self, url, model, most, retries, timeout=TIMEOUT):
        parts = split_url(url)
        parts = parts._replace(path=parts.path.rstrip("/") + "/chat/completions", fragment="")
        self.url, self.place, self.model = parts.geturl(), parts._replace(query="").geturl(), model
        self.retries, self.timeout, self.stopped = retries, timeout, threading.Event()
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", key):  # the error for such a header would print it
            raise ValueError("OPENAI_API_KEY: holds a character that no key has; set it anew")
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        query = parse_qsl(parts.query)
        secrets = [key, *(value for name, value in query if re.search(SECRETS, name, re.IGNORECASE))]
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.netloc):  # a password may stand before its "@"
            self.place += f" through the proxy {proxy.rpartition('@')[2].strip('/').rpartition('/')[2]}"
        secrets = {spelling for secret in secrets for spelling in spellings(secret)}
        self.secrets = sorted(secrets, key=len, reverse=True)  # one may stand in another
        if parts.scheme == "http" and not re.fullmatch(r"localhost|127(\.\d+){3}|::1", parts.hostname):
            what = "the posts and the key" if key else "the posts"
            warning = f"anybody on the way to http://{parts.netloc} can read {what}; use https if it has that"
            print(f"WARNING: {warning}", file=sys.stderr)
        self.open = urllib.request.build_opener(Stay, Deadline).open
        self.settings = {"temperature": 0, "max_tokens": most}
        self.answers, self.instead, self.mutex = False, "", threading.Lock()  # whether it answered anything

    def __call__(self, chats, photos):
        return [self.ask(*each) for each in zip(chats, photos, strict=True)]

    def clean(self, text):
        """What a server says, without the secrets it may repeat."""
        for secret in self.secrets:
            text = text.replace(secret, "<key>")
        return text

    def words(self, body):
        """What a server says in a body that is no answer, on one line."""
        text = self.clean(body.decode(errors="replace"))[:10_000]
        if match := re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)+)"', text):
            text = match[1]
            with contextlib.suppress(ValueError):
                text = self.clean(json.loads(f'"{text}"', strict=False))
        return " ".join(text.split())

    def learn(self, words, settings):
        """Whether a server's words refuse one of a request's settings; from now on it is asked without."""
        if "max_tokens" in settings and "max_completion_tokens" in words:
            name, other = "max_tokens", {"max_completion_tokens": settings["max_tokens"]}
        elif "temperature" in settings and NO_TEMPERATURE.search(words):
            name, other = "temperature", {}
            if name in self.settings:
                warning = "takes no temperature, so that other answers may come another time"
                tqdm.write(f"WARNING: {self.place} {warning}", file=sys.stderr)  # above a bar
        else:
            return False
        self.settings = {key: value for key, value in self.settings.items() if key != name} | other
        return True

    def send(self, chat):
        """(status, its name, headers, body) of what a server replies."""
        request = urllib.request.Request(self.url, json.dumps(chat).encode(), self.headers)
        try:
            reply = self.open(request, timeout=self.timeout)
        except HTTPError as error:
            reply = error
        with reply:
            body = reply.read(LONGEST + 1)
        if len(body) > LONGEST:
            raise OSError(f"an answer of over {LONGEST:,} bytes")
        return reply.status, reply.reason, reply.headers, body

    def ask(self, texts, photo):
        """One answer."""
        image, buffer, attempt = None, io.BytesIO(), 1
        if photo is not None:
            photo.save(buffer, "JPEG", quality=90, comment=b"")  # not what its maker wrote into the file
            url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            image = {"type": "image_url", "image_url": {"url": url}}
        chat = {"model": self.model, "messages": messages(texts, image, False)}
        while True:
            final = lasts = False  # whether to try again is of no use now, and later
            pause = min(60, 2 ** (attempt - 1)) * random.uniform(0.5, 1)  # seconds
            try:
                settings = self.settings  # another thread may change them meanwhile
                status, name, headers, body = self.send(chat | settings)
            except (OSError, HTTPException, ValueError) as error:  # timeouts and connections
                failure = " ".join(self.clean(str(getattr(error, "reason", error))).split())[:300]
                failure = failure or type(error).__name__
            else:
                words, failure = self.words(body), f"{status} {self.clean(name)[:100]}"
                if status < 300:
                    answer = read_content(body)
                    if answer is not None:
                        self.answers, self.instead = True, self.instead if answer else words[:300]
                        return self.clean(answer)
                    failure = "an answer that is no JSON with choices, message and content that is text"
                    inner = re.search(rb'"code"\s*:\s*"?([45]\d\d)\b', body[:10_000])  # gateways wrap others'
                    status = int(inner[1]) if inner else 200
                elif status in (400, 422) and self.learn(words, settings):
                    continue
                failure = f"{failure}: {words[:300]}" if words else failure
                wait = headers.get("Retry-After", "0")
                pause = max(pause, float(wait) if wait.isdecimal() else 0)  # a date counts as none
                lasts = (status < 500 and status not in (408, 429)) or b"insufficient_quota" in body
                final = lasts and status != 200
                if status in (400, 413, 422) and self.answers_others(texts):
                    return f"refused: {failure}"
            if final or pause > TIMEOUT or attempt > self.retries or self.stopped.wait(pause):
                break
            attempt += 1
        failure += f", tried {attempt} times" if attempt > 1 else ""
        failure += f", asks to wait {pause:.0f} seconds" if pause > TIMEOUT else ""
        raise (Refused if lasts else ValueError)(f"{self.place}: {failure}")

    def answers_others(self, texts):
        """Whether the server answers at all: a question of no content, if need be, tells."""
        if texts != [PROBE]:
            with self.mutex, contextlib.suppress(ValueError):
                if not self.answers:
                    self.ask([PROBE], None)
        return self.answers

    def in_turn(self, work, batches, workers):
        """work(batch) of each batch, in order, by so many threads, never far ahead of what is waited for.

        They are daemons: whoever interrupts the program does not wait for what a server takes to answer.
        """
        tasks, ahead = queue.SimpleQueue(), deque()

        def work_on():
            while (task := tasks.get()) and not self.stopped.is_set():
                future, batch = task
                try:
                    future.set_result(work(batch))
                except BaseException as error:  # it is raised where the result is waited for
                    future.set_exception(error)

        try:
            for _ in range(workers):
                threading.Thread(target=work_on, daemon=True).start()
            for batch in batches:
                ahead.append(Future())
                tasks.put((ahead[-1], batch))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            self.stopped.set()  # those that wait to try again need not
            for _ in range(workers):
                tasks.put(None)
