"""What a chat or vision-language model says of each post of a data set: notes for `train.py --notes FILE`.

    python write_notes.py --dataset twitter2017    # Qwen/Qwen2.5-VL-3B-Instruct, words and photo
    python write_notes.py --dataset twitter2017 --no-photos --model Qwen/Qwen2.5-3B-Instruct
    python write_notes.py --dataset twitter2017 --endpoint http://localhost:8000/v1 --model MODEL

A note is a JSON line with these keys:
    id                   the post's; `<split>/<id>` where several posts have one id
    about_post, ...      those of the keys asked for below whose value is of the right kind
    raw                  in their place, the second answer, if neither of two held such a JSON object
    with_photo           whether a photo was in view
    model, prompt, check the model; digits of the prompts; digits of the post and the settings

Where the first posts all get no note, none is kept, and the last answer is shown. The same command goes on
where it was stopped. No note depends on where that was: a local model's batches are cut at fixed places, and
a batch that lacks a line is answered whole. (Another --batch-size rounds otherwise, and may change a word.)
An endpoint is asked for the missing posts alone, with the key in the environment variable OPENAI_API_KEY.
"""
# ruff: noqa: E402 (the prompts stand first)

PROMPT = """Here is a post from social media.

Post: {post}
{entities}
Answer with one JSON object and nothing else. It has exactly these keys:
"about_post": the key entities of the post, each with its kind in brackets, such as \
"Kevin Durant (person); Oakland (place)"; "" if it has none"""
PHOTO = """
"about_photo": one sentence that says what the photo of the post shows
"relevance": a number from 0, the photo has nothing to do with the post, to 1, it shows what the post is about
"phrases": a list of short phrases for what the photo shows: things, things with a property, and two things \
and what joins them, such as ["man", "orange ball", "man holding ball"]"""
ENTITIES = """It names "{head}" and "{tail}"; begin with these two.
"""
AGAIN = "Answer with the JSON object alone."

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import contextlib
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import RelationExample, photo_names
from parts.chat import Endpoint, Local, Refused, split_url
from parts.console import Defaults, bounded, command_line, dataset_name, first_line, progress_bar
from parts.datasets import DATASETS, load_dataset, locate
from parts.files import resume_lines
from parts.notes import KEYS, OF_PHOTO
from parts.photos import find_photos, image_folders, thumbnail
from parts.processes import default_device, open_output

DIGITS = hashlib.sha256("\n".join((PROMPT, PHOTO, ENTITIES, AGAIN)).encode()).hexdigest()[:16]
SIDE = 1024  # pixels of a photo's longer side, at most
LINE = 2**27  # bytes of a note, at most
FIRST = 8  # posts, of which one at least must get a note
READ = 2**16  # characters of an answer that are looked at, and kept of one that is no note
ASKED = ("about_post", *OF_PHOTO)

# ------------------------------------------------------------------------------------------------------ posts


@dataclass(frozen=True)
class Post:
    """An example to be written about; if it names a photo, its `path` or the `reason` why it is missing."""

    id: str
    example: object
    path: Path | None
    reason: str | None
    stamp: dict  # what its note ends with


def fill_prompt(example, photo):
    """What a model is asked about an example, with its photo in view or without."""
    entities = ""
    if isinstance(example, RelationExample):
        head, tail = (" ".join(example.words[slice(*span)]) for span in (example.head, example.tail))
        entities = ENTITIES.format(head=head, tail=tail)
    prompt = PROMPT.format(post=" ".join(example.words), entities=entities)
    return prompt + PHOTO if photo else prompt


def list_posts(dataset, args):
    """The first --limit posts, in the data set's order; FileNotFoundError if not one photo is there."""
    examples = [(split, example) for split, part in dataset.examples.items() for example in part]
    times, paths, reasons, posts = Counter(example.id for _, example in examples), {}, {}, []
    if args.photos:
        names = dataset.image_ids()
        folders = image_folders(args.dataset, args.data_dir, args.images) if names else []
        paths = find_photos(names, folders, reasons)
        if not any(paths.values()):
            places = ", ".join(map(str, folders)) or "any folder"
            raise FileNotFoundError(f"no photo of {len(names)} is in {places}; add --images or --no-photos")
    for split, example in examples[: args.limit]:
        name = next(iter(photo_names(example.image_id)), None)  # of several the first is shown
        settings = repr((fill_prompt(example, args.photos), args.max_new_tokens))
        reason = reasons.get(name, "no such file") if name in paths and paths[name] is None else None
        check = hashlib.sha256(settings.encode()).hexdigest()[:12]
        stamp = {"model": args.model, "prompt": DIGITS, "check": check}
        post_id = example.id if times[example.id] == 1 else f"{split}/{example.id}"
        posts.append(Post(post_id, example, paths.get(name), reason, stamp))
    return posts


def look(post):
    """(photo of a post or None, "missing" or "unreadable" or None, why)."""
    if post.path is None:
        return None, post.reason and "missing", post.reason
    try:
        if not post.path.is_file():  # to open a pipe would be to wait for ever
            raise ValueError("not a file")
        return thumbnail(post.path, SIDE), None, None
    except Exception as error:  # decoders meet files of any kind and raise of any kind; the reason is said
        return None, "unreadable", first_line(error)


# ------------------------------------------------------------------------------------------------------ notes


# What opens and closes what a model thought. An answer may be cut before it closes, or begin after it opens.
THOUGHT = re.compile(r"^[ \t]*<(?:think|thinking|thought|reasoning)>", re.MULTILINE)
THOUGHT_END = re.compile("</(?:think|thinking|thought|reasoning)>")


def read_answer(answer, keys):
    """The last JSON object in an answer that has one of the keys asked for, or None.

    What was thought is no answer. Strings may hold raw line breaks.
    """
    answer = THOUGHT.split(THOUGHT_END.split(answer)[-1])[0][-READ:]
    decoder, last, end = json.JSONDecoder(strict=False), None, 0
    for start in [match.start() for match in re.finditer("{", answer)][-300:]:
        if start < end:  # inside of one
            continue
        with contextlib.suppress(ValueError, RecursionError):
            value, stop = decoder.raw_decode(answer, start)
            if value.keys() & set(keys):
                last, end = value, stop
    return last


def make_notes(ask, posts):
    """Posts, asked about together -> [(note, names of what is counted of it, {name: the first reason})]."""
    looks = [look(post) for post in posts]
    photos = [photo for photo, _, _ in looks]
    keys = [["about_post"] if photo is None else list(ASKED) for photo in photos]
    chats = [[fill_prompt(posts[i].example, photo is not None)] for i, photo in enumerate(photos)]
    answers = ask(chats, photos)
    objects = [read_answer(*each) for each in zip(answers, keys, strict=True)]
    again = [i for i, values in enumerate(objects) if values is None]
    more = [[*chats[i], answers[i], AGAIN] for i in again]
    # Not every server takes an empty text.
    more = [chat if chat[1].strip() else [f"{chat[0]}\n\n{AGAIN}"] for chat in more]
    for i, answer in zip(again, ask(more, [photos[i] for i in again]), strict=True):
        answers[i], objects[i] = answer, read_answer(answer, keys[i])
    notes = []
    for i, (post, (photo, failing, why)) in enumerate(zip(posts, looks, strict=True)):
        values = objects[i] or {}
        if KEYS["phrases"][0](names := values.get("about_post")):  # a list of text
            values["about_post"] = "; ".join(names)
        note = {key: values[key] for key in keys[i] if key in values and KEYS[key][0](values[key])}
        counts = [key if key in keys[i] else "other keys" for key in values if key not in note]
        if photo is not None:
            counts.append("photo")
        if i in again:
            counts.append("again")
        if objects[i] is None:
            note["raw"] = answers[i][:READ]
            counts.append("raw")
        reasons = {failing: f"{post.id}: {why}"} if failing else {}
        note = {"id": post.id} | note | {"with_photo": photo is not None} | post.stamp
        notes.append((note, [*counts, *reasons], reasons))
    return notes


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Defaults)
    # fmt: off
    add = parser.add_argument
    known = f"{', '.join(DATASETS)} or a folder of your own"
    add("--dataset", type=dataset_name, default="twitter2017", help=known)
    add("--data-dir", default="data", help="folder that holds the data sets")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir")
    add("--output", type=Path, help="default: notes.jsonl in the data set's folder")
    add("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="of a hub, a folder, or one the endpoint has")
    add("--photos", action=argparse.BooleanOptionalAction, default=True, help="whether the model sees them")
    add("--max-new-tokens", type=bounded(int, 1), default=256, help="of an answer, at most")
    add("--limit", type=bounded(int, 1), help="only the first so many posts")
    add("--batch-size", type=bounded(int, 1), default=8, help="posts a local model answers together")
    add("--device", default=default_device(), help="of a local model")
    add("--endpoint", help="an OpenAI-compatible server to ask instead, such as http://localhost:8000/v1")
    add("--workers", type=bounded(int, 1, 1000), default=8, help="requests to the endpoint at a time")
    add("--retries", type=bounded(int, 0), default=5, help="of a request to the endpoint that failed")
    # fmt: on
    args = parser.parse_args(argv)
    if args.endpoint is not None:
        try:
            split_url(args.endpoint)
        except ValueError as error:
            parser.error(str(error))
    if args.images and not args.photos:
        parser.error("--images does not go with --no-photos")
    for name in ("workers", "retries") if args.endpoint is None else ("batch_size", "device"):
        if getattr(args, name) != parser.get_default(name):
            only = "an --endpoint" if args.endpoint is None else "a local model"
            parser.error(f"--{name.replace('_', '-')} is for {only} only; leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    dataset = load_dataset(args.dataset, args.data_dir)
    for note in dataset.notes:
        print(note)
    posts, (name, folder) = list_posts(dataset, args), locate(args.dataset, args.data_dir)
    output = args.output or Path(folder) / name / "notes.jsonl"
    counts, first = Counter(), {}
    with open_output(output) as out:
        expected = ({"id": post.id} | post.stamp for post in posts)
        settings = "the data set, prompt, model, photos or --max-new-tokens"
        before = done = resume_lines(out, output, LINE, expected, settings)
        if done == len(posts):
            print(f"{output}: it is finished, {done} posts have their notes", file=sys.stderr)
            return output
        size = 1 if args.endpoint else args.batch_size
        batches = [posts[i : i + size] for i in range(0, len(posts), size)][done // size :]
        if args.endpoint:
            ask = Endpoint(args.endpoint, args.model, args.max_new_tokens, args.retries)
            notes = ask.in_turn(lambda batch: make_notes(ask, batch), batches, args.workers)
        else:
            ask = Local(args.model, args.photos, args.max_new_tokens, args.device)
            notes = (make_notes(ask, batch) for batch in batches)
        bar = progress_bar(len(posts), "post", initial=done)
        lines, usable = [], before > 0  # lines that wait for the first note that can be used
        with contextlib.closing(notes), bar as progress:
            try:
                for batch in notes:
                    for note, names, reasons in batch[done % size :]:
                        # Half a surrogate pair, in a raw answer, becomes the escape that JSON has for it.
                        line = json.dumps(note, ensure_ascii=False).encode(errors="backslashreplace")
                        lines.append(line + b"\n")
                        usable = usable or not note.keys().isdisjoint(ASKED)
                        counts.update(names)
                        first = reasons | first
                    if usable:
                        out.write(b"".join(lines))
                        out.flush()
                        done += len(lines)
                        progress.update(len(lines))
                        lines = []
                    elif len(lines) >= FIRST:
                        break
            except ValueError as error:
                goes_on = "" if isinstance(error, Refused) else ", and the same command goes on"
                where = f"post {posts[done + len(lines)].id}"
                stays = "; what was written stays" if done else ""
                raise ValueError(f"{where}: {error}{stays}{goes_on}") from None
        if not usable:
            answer = " ".join(note.get("raw", "values of other kinds").split()) or ask.instead or "no text"
            raise ValueError(
                f"no note of the first {len(lines)} posts can be used, so none is kept; the last answer:"
                f" {answer[:300]}; name another --model, --no-photos if it takes none, or a larger"
                " --max-new-tokens if it thinks first"
            )
    wrong = ", ".join(f"{counts[key]} {key}" for key in (*ASKED, "other keys") if counts[key])
    message = f"{output}: {done - before} posts{f' after {before} before' if before else ''},"
    message += f" {counts['photo']} with photo; {counts['again']} answers were no JSON and asked again,"
    message += f" {counts['raw']} kept raw; values left out: {wrong or 'none'}"
    for kind in ("missing", "unreadable"):
        message += f"; {counts[kind]} photos {kind}"
        if counts[kind]:
            message += f" (first: {first.get(kind)})"
    print(message, file=sys.stderr)
    return output


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size")
