"""A chat model behind one call, of transformers or at an endpoint: chats and photos in, answers out.

    ask = Local("Qwen/Qwen2.5-VL-3B-Instruct", photos=True, most=256, device="cuda")
    ask = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-3B-Instruct", most=256, retries=5)
    answers = ask([["Who is it?"], ["Who is it?", "Kevin", "And where?"]], [photo, None])

A chat is a list of texts, the user's and the model's in turn; its photo, a PIL image or None, stands before
the first. Both answer greedily, in at most `most` tokens.
"""

import base64
import contextlib
import io
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.error import HTTPError

import torch
import transformers

from commands import check_device, first_line
from text_encoder import load_pretrained

PROBE = "Answer with {}."
TIMEOUT = 600  # seconds that an endpoint may be silent, or ask to wait


def messages(texts, image, listed):
    """A chat as models take it; `image`: the part that is its photo, if any; `listed`: contents are lists."""
    turns = []
    for i, text in enumerate(texts):
        parts = [image] * (i == 0 and image is not None) + [{"type": "text", "text": text}]
        content = parts if listed or parts[1:] else text
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    return turns


class Local:
    """A chat model of transformers at `source`, a hub's name or a local folder; `photos`: if it sees any.

    bfloat16 on CUDA, else float32. Of its own generation settings only those that end an answer count.
    ValueError if it cannot be loaded, reads no photos, or has no chat template.
    """

    def __init__(self, source, photos, most, device):
        check_device(device)
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            self.sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            kind = transformers.AutoProcessor if self.sees else transformers.AutoTokenizer
            self.reader = kind.from_pretrained(source)
        except (OSError, ValueError, ImportError, KeyError) as error:
            said = f"cannot be loaded ({first_line(error)}); name a chat model of the hub or a local folder"
            raise ValueError(f"--model {source}: {said}") from None
        if photos and not hasattr(self.reader, "image_processor"):
            raise ValueError(f"--model {source}: reads no photos; add --no-photos, or name a model that does")
        if not self.reader.chat_template:
            raise ValueError(f"--model {source}: no chat template; name a chat model (often -Instruct)")
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
        return self.reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

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
            read = self.reader(text=prompts, padding=True, return_tensors="pt", **more)
            for key, part in read.items():
                dtype = self.model.dtype if part.is_floating_point() else part.dtype
                read[key] = part.to(self.model.device, dtype)
            made = self.model.generate(**read)[:, read["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
        return answers


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go with it."""

    def redirect_request(self, *_):
        return None


def server_says(error):
    """What a server says of an HTTP error, on one line."""
    try:
        with error:
            body = error.read(10_000).decode(errors="replace")
    except (OSError, HTTPException):
        body = ""
    message = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)+)"', body)
    said = " ".join((message[1] if message else body).split())[:300]
    return f"{error.code} {error.reason}" + f": {said}" * bool(said)


def retry_after(error):
    """Seconds that a server asks to wait, which it may give as a number or a date; 0 if it does not."""
    asked = error.headers.get("Retry-After", "0")
    try:
        return float(asked) if asked.isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0


class Endpoint:
    """A `model` at an OpenAI-compatible server; several threads may call it at once. Photos go as JPEG.

    The key is that in the environment variable OPENAI_API_KEY, if it is set. ValueError at once for what the
    server refuses (4xx but for 408 and 429), and for any other failure once `retries` more requests failed
    too. A chat that it refuses for what stands in it (400, 413, 422: a filter, a length), while it answers
    another, is answered "refused: " and what it says; an answer without content (null: a refusal too) is "".
    """

    def __init__(self, url, model, most, retries, timeout=TIMEOUT):
        self.url, self.model, self.most = url.rstrip("/") + "/chat/completions", model, most
        self.retries, self.timeout, self.stopped = retries, timeout, threading.Event()
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.key):  # the error for such a header would print it
            raise ValueError("OPENAI_API_KEY: holds a character that no key has; set it anew")
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.open = urllib.request.build_opener(Stay).open
        self.answers, self.mutex = False, threading.Lock()  # whether it has answered anything

    def __call__(self, chats, photos):
        return [self.ask(*each) for each in zip(chats, photos, strict=True)]

    def ask(self, texts, photo):
        """One answer."""
        image, buffer = None, io.BytesIO()
        if photo is not None:
            photo.save(buffer, "JPEG", quality=90)
            url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            image = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": self.model, "messages": messages(texts, image, False), "temperature": 0}
        body = json.dumps(body | {"max_tokens": self.most}).encode()
        for attempt in range(1, self.retries + 2):
            final, pause = False, min(60, 2 ** (attempt - 1)) * random.uniform(0.5, 1)  # seconds
            try:
                request = urllib.request.Request(self.url, body, self.headers)
                with self.open(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())["choices"][0]["message"]["content"]
                if isinstance(answer, str | None):
                    self.answers = True
                    return answer or ""
                said = "an answer whose content is no text"
            except HTTPError as error:
                said, pause = server_says(error), max(pause, retry_after(error))
                final = (error.code < 500 and error.code not in (408, 429)) or pause > TIMEOUT
                if error.code in (400, 413, 422) and self.answers_others(texts):
                    return f"refused: {said}"
            except (OSError, HTTPException) as error:  # timeouts and connections
                said = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError, RecursionError):
                said = "an answer that is no JSON with choices, message and content"
            if final or attempt > self.retries or self.stopped.wait(pause):
                break
        said = said.replace(self.key, "<key>") if self.key else said  # a server may repeat it
        said += f", tried {attempt} times" * (attempt > 1)
        raise ValueError(f"{self.url}: {said}" + f", asks to wait {pause:.0f} seconds" * (pause > TIMEOUT))

    def answers_others(self, texts):
        """Whether the server answers at all: a question of no content, if need be, tells."""
        if texts != [PROBE]:
            with self.mutex, contextlib.suppress(ValueError):
                if not self.answers:
                    self.ask([PROBE], None)
        return self.answers

    def in_turn(self, work, batches, workers):
        """work(batch) of each batch, in order, by so many threads, never far ahead of what is waited for."""
        with ThreadPoolExecutor(workers) as pool:
            ahead = deque()
            try:
                for batch in batches:
                    ahead.append(pool.submit(work, batch))
                    if len(ahead) > 2 * workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                self.stopped.set()  # those that wait to try again need not
                pool.shutdown(wait=False, cancel_futures=True)
