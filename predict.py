"""Entities or relations of new posts, by a finished run.

    python predict.py --run runs/demo-bert-resnet50-film-s1337 --text "Kevin Durant in Oakland" --image kd.jpg
    python predict.py --run runs/demo-bert-resnet50-film-s1337 --input posts.jsonl --output answers.jsonl

A post is a JSON object: `text` as it was typed, cut into words as the run's data are (docs/DATA.md), or
`words`, a list; `image`, the file of its photo, its path from the folder of posts.jsonl on, or a list of up
to 8 (for runs on captions, `caption` instead, for those on phrases `phrases`, a list of text, or a `caption`
to be cut into some; for runs on boxes `boxes` beside it, as in parts/boxes.py); for relations `head` and
`tail`, spans [start, end) of the text's characters or of the words; `id`, text or a number, comes back; for
runs with --extra `about_post` and `about_photo`, for runs with --relevance given `relevance`, as in their
notes. Other keys are ignored, and so is NaN. One post has 1 MB at most.

An answer has `id`; `photo`, whether one was looked at; a `note` where the one named was not, or its caption
was cut; `cut_words`, how many words the run's --max-len cut off, if any; and `entities`, each with its type,
text, words [start, end), chars [start, end) if the post came as text, and probability, that of the least
probable of its words' labels; or one `relation` and its probability. A broken post has an `error` instead.
With --input also `line`, the post's in its file, counted from 1, what was asked (`text` or `words`, `image`,
`head`, `tail`), and `check`, digits by which a restart knows run and post: such a file is data to train on.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import errno
import hashlib
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from PIL import Image

from encoding import encode
from parts.boxes import check_boxes
from parts.console import bounded, command_line, progress_bar, shard
from parts.files import resume_lines
from parts.new_posts import LINE, NewPhotos, NewPost, check_id, load_post, near, numbered_lines
from parts.new_posts import read_photos, read_post, run_backbone, windows
from parts.notes import EXTRAS, Segments, check_note, note_text
from parts.photos import WORDED
from parts.posts import Posts, predict_posts
from parts.processes import check_device, default_device, fit_threads, open_output, precision_on
from parts.run_files import find_run, load_run, run_digits
from parts.scores import entity_spans

NO_BOXES = "no boxes given: the whole photo alone was looked at"
ASKED = ("text", "words", "image", "head", "tail")
BESIDE_TEXT = ("image", "caption", "phrases", "about_post", "about_photo", "relevance", "head", "tail")

# ---------------------------------------------------------------------------------------------------- answers


class Predictor:
    """A finished run, ready for new posts.

        from predict import Predictor
        predictor = Predictor("runs/twitter2017-roberta-resnet50-film-s1337")
        predictor([{"text": "Kevin Durant in Oakland", "image": "kd.jpg"}])

    `device`: by default cuda where there is one. `weights`: of the backbone, as extract_features.py takes
    them; needed only if they were a local file. `precision`: "float32" or "bfloat16", by default the run's
    own on a GPU and float32 on a CPU. `root`: the folder that photos may come from, for posts of strangers;
    what leads out of it is no photo, and no note tells what lies there. `features`: of a run whose regions
    were made elsewhere, a file of `write_features` with those of the photos, by their names. ValueError if
    the weights are not those the run's features were made with. A run with --generated answers as it does a
    post without a second picture. In a child forked after it was made (gunicorn --preload) it computes with
    one thread; on a GPU make it there. It leaves seeds and settings of the program that uses it alone.
    On cores that others use too, set GOMP_SPINCOUNT=1000 (KMP_BLOCKTIME=0 on macOS) before torch is imported.
    """

    def __init__(self, run_dir, device=None, weights=None, precision=None, root=None, features=None):
        if root is not None and not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder; name as root the one that photos may come from")
        self.root = None if root is None else os.path.realpath(root)
        self.device = device or default_device()
        with torch.random.fork_rng(devices=[]):  # models are begun at random: with no number of the host's
            self.model, self.tokenizer, self.config = load_run(find_run(run_dir), self.device)
            self.provenance = self.config["features_made"]
            self.source = self.backbone = None  # text only
            if self.provenance:
                backbone = self.provenance["backbone"]
                self.source = backbone if backbone in WORDED else "image"
                self.backbone = run_backbone(self.provenance, weights, self.config["region_dim"], features)
                self.backbone.regions.to(self.device, memory_format=torch.channels_last)
        self.boxed = bool(self.provenance) and "boxes_sha256" in self.provenance
        self.precision = precision or precision_on(self.device, self.config)
        extra, length = self.config["extra"], self.config["extra_len"]
        self.segments = Segments(self.tokenizer, extra, length) if extra != "none" else None
        self.keys = EXTRAS[extra]  # of notes, that it reads
        if self.config["relevance"] == "given":
            self.keys += ("relevance",)
        self.pool, self.process = self.make_pool(), os.getpid()

    def make_pool(self):
        """Threads that decode photos; one for words, for a tokenizer is not for several at once.

        And one for boxes: one opened image may be read for several posts, with other boxes each.
        """
        alone = self.source in WORDED or self.boxed
        return ThreadPoolExecutor(1 if alone else min(4, os.cpu_count() or 1))

    def __call__(self, posts, folder=None):
        """Posts (dicts, or their JSON as bytes) -> answers (dicts), in order; one post -> its answer.

        Paths of photos start at `folder`, by default at `root`, or here without one.
        """
        folder = folder if folder is not None else self.root or "."
        if isinstance(posts, dict | bytes | str):
            return self.answer([posts], folder)[0]
        parts = ([post for _, post in window] for window in windows(enumerate(posts)))
        return [answer for part in parts for answer in self.answer(part, folder)]

    def answer(self, posts, folder):
        """`__call__` for one window of posts."""
        if os.getpid() != self.process:  # forked: threads are not, and would be waited for, torch's too
            torch.set_num_threads(1)
            self.pool = self.make_pool()
            self.process = os.getpid()
        answers, queries = [], []
        for post in posts:
            answers.append(answer := {"id": None})
            try:
                post = load_post(post)
                answer["id"] = check_id(post.get("id"))
                queries.append(self.read(post, folder, answer))
            except ValueError as error:
                answer["error"] = str(error)
        if not queries:
            return answers
        rows, photos = self.rows(queries), None
        if self.source:
            sources = {name: source for post in queries for name, (_, source) in post.photos.items()}
            photos = NewPhotos(sources, self.provenance, self.backbone, self.device, self.pool, self.root)
        inputs = Posts([post.example for post in queries], rows, self.tokenizer.pad_token_id, photos)
        settings = self.config["labels"], self.config["eval_batch_size"], self.device, self.precision
        records = predict_posts(self.model, inputs, *settings)
        for post, record in zip(queries, records, strict=True):
            self.say_what_was_seen(post, record, photos)
            if self.config["task"] == "relation":
                post.answer |= {"relation": record["predicted"], "probability": record["probability"]}
            else:
                post.answer["entities"] = entities(record, post.offsets, post.given.get("text"))
        return answers

    def read(self, post, folder, answer):
        """A `NewPost` of a post, a dict; ValueError says what is wrong with it."""
        example, offsets = read_post(post, self.config["task"], self.config["word_rule"])
        photos, boxes = {}, None
        sources = read_photos(post, self.source, folder) if self.source else []
        if len(sources) > 1 and (self.config["model"] == "vilt" or post.get("boxes") is not None):
            raise ValueError("several photos, where vilt and boxes are for one; name one of them")
        if self.boxed and sources and post.get("boxes") is not None:
            boxes = check_boxes(post)
        for label, source in sources:
            # Images cannot be keys, so each gets a name that no file can have. One image in several posts
            # has one name and is decoded once: two threads would get in each other's way.
            name = f"\0{id(source)}" if isinstance(source, Image.Image) else source
            photos[(name, boxes) if self.boxed else name] = label, source  # with other boxes it is another
        image_id = tuple(photos) if len(photos) > 1 else next(iter(photos), None)
        note = check_note(post, self.keys)
        return NewPost(post, replace(example, image_id=image_id), offsets, note, photos, answer)

    def rows(self, queries):
        """The rows of `encode` of posts, with their notes; answers say what of both is not read."""
        reach = 2 * self.config["max_len"]  # twice: some words, parts of emojis, have no piece
        examples, cuts = zip(*(near(post.example, reach) for post in queries), strict=True)
        rows, _ = encode(self.tokenizer, examples, self.config["labels"], self.config["max_len"])
        for i, (row, post, count) in enumerate(zip(rows, queries, cuts, strict=True)):
            post.answer["photo"] = False
            if cut_words := row["cut_words"] + count:
                post.answer["cut_words"] = cut_words
            if self.segments:
                rows[i] = row = self.segments(row, post.note)
                if lacking := [key for key in self.segments.keys if not note_text(post.note, key)]:
                    remark(post.answer, f"no {' and no '.join(lacking)} given, which the run reads")
                if row.get("note_cut"):
                    length = self.segments.length
                    remark(post.answer, f"of its notes only the first {length} sub-tokens were read")
            if "relevance" in post.note:
                rows[i] = row | {"relevance": post.note["relevance"]}
        return rows

    def say_what_was_seen(self, post, record, photos):
        """Whether a photo was looked at goes into the answer, and why not if the post has one."""
        source = self.source
        if post.photos:
            post.answer["photo"] = record["photo"]
            for name, (label, _) in post.photos.items():
                reason = photos.reasons[photos.rows[name]]
                if reason and not self.root and re.match("https?://", str(label)):
                    reason = "a link, and nothing is downloaded here: download it first and name the file"
                if reason:
                    remark(post.answer, f"{source if source in WORDED else label}: {reason}")
            if record["photo"] and self.boxed and post.given.get("boxes") is None:
                remark(post.answer, NO_BOXES)
            if record["photo"] and "relevance" in self.keys and "relevance" not in post.note:
                remark(post.answer, "no relevance given: it was predicted")
        elif source in WORDED and post.given.get("image") is not None:
            kind = "captions" if source == "caption" else "phrases"
            remark(post.answer, f"the run looks at {kind}, not at images; give the post its {source}")


def remark(answer, text):
    """Add a text to the `note` of an answer."""
    answer["note"] = f"{answer['note']}; {text}" if "note" in answer else text


def entities(record, offsets, text):
    """The entities of one record of `predict`, in order; `offsets` of the words in `text`, if it had one."""
    answers = []
    for kind, start, end in sorted(entity_spans(record["predicted"]), key=lambda span: span[1]):
        entity = {"type": kind, "text": " ".join(record["words"][start:end]), "words": [start, end]}
        if offsets:
            first, last = offsets[start][0], offsets[end - 1][1]
            entity |= {"text": text[first:last], "chars": [first, last]}
        answers.append(entity | {"probability": min(record["probability"][start:end])})
    return answers


# -------------------------------------------------------------------------------------------- a file of posts


def with_post(answer, line):
    """An answer with what was asked, so that a file of answers is data to train on; `line`: the post's."""
    post = {} if "error" in answer else load_post(line)
    return {key: post[key] for key in ASKED if post.get(key) is not None} | answer


def check_digits(run, line):
    return hashlib.sha256(run + (line or b"")).hexdigest()[:12]


def resume(out, path, lines, run):
    """How many of the numbered `lines` this run has answered in the open file `out`, by `resume_lines`."""
    expected = ({"line": number, "check": check_digits(run, line)} for number, line in lines)
    return resume_lines(out, path, 100 * LINE, expected, "the run, --input or --shard")


def answer_file(predictor, run, path, output, shard=(1, 1), folder=None):
    """Answer the posts of a JSONL file into another, a window at a time; an earlier call's answers stay.

    `run`: its `run_digits`. Windows are the same however often it is stopped, and so are answers, to the last
    digit.
    """
    run += (folder or "").encode()  # other photos are other answers
    folder = os.path.dirname(path) if folder is None else folder
    counts, first, passed = Counter(), {}, 0
    with open(path, "rb") as source, open_output(output) as out:
        if os.path.samestat(os.fstat(source.fileno()), os.fstat(out.fileno())):
            raise ValueError(f"{output}: it is the --input; name another --output")
        total = sum(1 for _ in numbered_lines(source, shard))
        done = resume(out, output, numbered_lines(source, shard), run)
        if done == total:
            print(f"{output}: it is finished, {total} posts are answered", file=sys.stderr)
            return
        with progress_bar(total, "post", initial=done) as progress:
            for window in windows(numbered_lines(source, shard)):
                passed += len(window)
                if passed <= done:
                    continue
                answers, rows = predictor([line for _, line in window], folder), []
                for (number, line), answer in list(zip(window, answers, strict=True))[-(passed - done) :]:
                    record = {"line": number} | with_post(answer, line) | {"check": check_digits(run, line)}
                    rows.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    counts["photo"] += answer.get("photo", False)
                    counts["cut"] += "cut_words" in answer
                    counts["whole"] += NO_BOXES in answer.get("note", "")
                    for kind in {"error", "note"} & answer.keys():
                        counts[kind] += 1
                        first.setdefault(kind, f"line {number}: {answer[kind]}")
                out.write(b"".join(rows))
                out.flush()
                progress.update(len(rows))
        if counts["error"] == total - done:
            out.seek(0)
            if all("error" in json.loads(line) for line in out):
                out.truncate(0)
                reason = f"none of its {total} posts can be answered (first: {first['error']})"
                if "JSON" in reason:
                    reason += "; pandas writes posts with to_json(orient='records', lines=True)"
                raise ValueError(f"{path}: {reason}")
        os.fsync(out.fileno())
    parts = [f"{output}: {total - done} posts answered{f' after {done} before' if done else ''}"]
    if predictor.source:
        parts.append(f"{counts['photo']} with {predictor.source}")
    for kind, name in (("whole", "without boxes, the whole photo alone"), ("note", "with a note"),
                       ("cut", "longer than the run's --max-len and cut"), ("error", "broken")):  # fmt: skip
        if counts[kind]:
            parts.append(f"{counts[kind]} {name}{f' (first: {first[kind]})' if kind in first else ''}")
    print(", ".join(parts), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- main


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("--run", type=find_run, required=True, help="run folder of train.py, or USER/NAME at a hub")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="one post, as it was typed")
    what.add_argument("--words", nargs="+", metavar="WORD", help="one post, as words")
    what.add_argument("--input", metavar="FILE", help="many posts: JSON lines with text or words, image, id")
    add("--weights", metavar="FILE", help="of the backbone (default: what the run knows of them)")
    add("--features", metavar="FILE", help="of photos, for runs on regions made elsewhere (default: none)")
    add("--precision", choices=("float32", "bfloat16"), help="default: the run's on a GPU, float32 on a CPU")
    add("--device", default=default_device(), help="that runs the model (default: %(default)s here)")
    add = parser.add_argument_group("beside --text or --words (default: none)").add_argument
    add("--image", metavar="FILE", help="its photo")
    add("--caption", metavar="TEXT", help="of its photo, for runs on captions or on phrases")
    add("--phrases", nargs="+", metavar="TEXT", help="said of its photo, one each, for runs on phrases")
    add("--about-post", metavar="TEXT", help="said of it, for runs with --extra post or both")
    add("--about-photo", metavar="TEXT", help="said of its photo, for runs with --extra photo or both")
    add("--relevance", type=bounded(float, 0, 1), metavar="X", help="of its photo (default: predicted)")
    add("--head", nargs=2, type=int, metavar=("START", "END"), help="of a relation: characters, or words")
    add("--tail", nargs=2, type=int, metavar=("START", "END"), help="likewise")
    add("--json", action="store_true", help="print the answer as JSON (default: as text)")
    add = parser.add_argument_group("beside --input").add_argument
    add("--output", metavar="FILE", help="a JSON line a post; the same command goes on where it stopped"
        " (default: none)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th post from the I-th on"
        " (default: 1/1)")
    add("--images", metavar="DIR", help="where relative paths of photos start (default: the input's folder)")
    # fmt: on
    args = parser.parse_args(argv)
    many = args.input is not None
    if many != (args.output is not None):
        parser.error("--input and --output go together")
    for name in (*BESIDE_TEXT, "images"):
        if getattr(args, name) is not None and many != (name == "images"):
            what = "--input" if many else "--text or --words"
            parser.error(f"--{name.replace('_', '-')} does not go with {what}")
    return args


def format_answer(answer):
    """One post's answer, for people."""
    if "relation" in answer:
        return f"{answer['probability']:.3f}  {answer['relation']}"
    lines = [f"{e['probability']:.3f}  {e['type']:<5} {e['text']}" for e in answer["entities"]]
    return "\n".join(lines or ["no entities"])


def check_options(args, predictor):
    """ValueError if an option does not go with the run; what of it is left aside is said on the console."""
    relations, source, keys = predictor.config["task"] == "relation", predictor.source, predictor.keys
    uses = {"image": source == "image", "caption": source in WORDED, "phrases": source == "phrases"}
    uses |= {name: name in keys for name in ("about_post", "about_photo", "relevance")}
    uses |= dict.fromkeys(("head", "tail"), relations)
    uses |= dict.fromkeys(("images", "weights", "features"), source is not None)
    for name, use in uses.items():
        if getattr(args, name) is not None and not use:
            inputs, option = " and ".join(filter(None, ("text", source, *keys))), name.replace("_", "-")
            task = f"{'relations' if relations else 'entities'} in {inputs}"
            raise ValueError(f"--{option} does not go with {args.run}, which finds {task}; leave it out")
    if source is None and args.input:
        print(f"{args.run}: text only; no image is looked at", file=sys.stderr)
    if predictor.config["generated"]:
        print(f"{args.run}: trained with a second picture of each post, generated from its text; here it"
              " answers without", file=sys.stderr)  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    predictor = Predictor(args.run, args.device, args.weights, args.precision, features=args.features)
    fit_threads(predictor.model, predictor.backbone.parameters if predictor.backbone else 0)
    check_options(args, predictor)
    if args.input is not None:
        run = run_digits(args.run, args.precision)
        run += predictor.backbone.cache.sha256.encode() if args.features else b""
        try:
            return answer_file(predictor, run, args.input, args.output, args.shard, args.images)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            full = f"{args.output}: {error.strerror}; the answers so far are kept"
            raise OSError(f"{full}: make room, and the same command goes on") from None
    values = {name: getattr(args, name) for name in ("text", "words", *BESIDE_TEXT)}
    answer = predictor({name: value for name, value in values.items() if value is not None})
    if "error" in answer:
        raise ValueError(f"the post: {answer['error']}")
    if "note" in answer:
        print(answer["note"], file=sys.stderr)
    if "cut_words" in answer:
        print(f"the last {answer['cut_words']} words were cut off, by the run's --max-len", file=sys.stderr)
    print(json.dumps(answer, ensure_ascii=False) if args.json else format_answer(answer))


if __name__ == "__main__":
    command_line(main)
