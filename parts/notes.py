"""Notes: what others, a language model for one, said of each post, as the text encoder's second segment.

Their `relevance` goes to what weighs the photo.

A notes file has one JSON object a line, such as write_notes.py makes:

    {"id": "17_06_4705", "about_post": "Kevin Durant (person); Oakland (place)",
     "about_photo": "two players under a hoop", "relevance": 0.83, "phrases": ["man", "ball"],
     "with_photo": false}

`id` is a post's or row's own (`<image id>@<line>` for relations) or its photo's, the first of which wins;
`<split>/<id>` where one id is several posts'. All else may be missing. `with_photo`: the whole note was
written with the photo in view. Other keys are left alone. What was written with the photo in view,
`about_photo`, `relevance`, `phrases` and with `with_photo` also `about_post`, is the photo's: it moves and
hides with it, or "no photo" would not be without.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import photo_names, read_lines
from encoding import special_ends, text_pieces
from parts.files import is_text, read_by_id
from parts.photos import by_name, read_captions


# What is taken of a note: the values of train.py --extra.
EXTRAS = {
    "none": (), "post": ("about_post",), "photo": ("about_photo",), "both": ("about_post", "about_photo"),
}  # fmt: skip
MOST_KEPT = 2**25  # characters of texts whose sub-tokens are remembered: a data set's, some of a stream's
OF_PHOTO = ("about_photo", "relevance", "phrases")
# Per key of a note, beside its id: whether a value is one, and what it has to be.
KEYS = {
    "about_post": (is_text, "text"),
    "about_photo": (is_text, "text"),
    "relevance": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "phrases": (lambda value: isinstance(value, list) and all(map(is_text, value)), "a list of text"),
    "with_photo": (lambda value: isinstance(value, bool), "true or false"),
}


def reads_relevance(config):
    """Whether a run, by its arguments or configuration, makes something of the `relevance` in its notes."""
    return config["notes"] is not None and (config["relevance"] != "none" or "supervised" in config["align"])


def check_note(note, keys=tuple(KEYS)):
    """{key: value} of those of `keys` a note has, null is nothing; ValueError for one of a wrong kind."""
    values = {key: note[key] for key in keys if note.get(key) is not None}
    for key, value in values.items():
        fits, rule = KEYS[key]
        if not fits(value):
            kind = {list: "a list", dict: "an object"}.get(type(value)) or f"{value!r:.60}"
            raise ValueError(f"{key} must be {rule}, not {kind}; correct it or leave it out")
    return values


def read_notes(path):
    """{id: note} of a notes file; ValueError with file and line."""
    return read_by_id(path, "id", check_note)


class Notes:
    """A notes file, read as a run reads it.

    `extra`: one of `EXTRAS`, which texts become second segments; `length`: sub-tokens of them, at most, the
    rest is cut; `relevance`: whether posts get that of their photo. Without a tokenizer notes can be found
    and counted, and no segment made. FileNotFoundError or ValueError if the file cannot be read.
    """

    def __init__(self, path, tokenizer=None, extra="none", length=0, relevance=False):
        self.path, self.relevance, self.segments = Path(path), relevance, None
        if not self.path.is_file():
            hint = "make it with write_notes.py, or name another with --notes"
            raise FileNotFoundError(f"no notes file {path}; {hint}")
        self.notes, self.sha256 = read_notes(path), hashlib.sha256(self.path.read_bytes()).hexdigest()
        if tokenizer is not None and extra != "none":
            self.segments = Segments(tokenizer, extra, length)
            for note in self.notes.values():
                for key in EXTRAS["both"]:
                    if key in note:  # one character more tells that a text is cut
                        note[key] = note_text(note, key)[: self.segments.readable + 1]

    def find(self, example, split):
        """The id of the note of an example, None if there is none."""
        keys = f"{split}/{example.id}", example.id, example.image_id
        return next((key for key in keys if key in self.notes), None)

    def of(self, examples, split):
        """The `PostNotes` of the examples of a split."""
        photos = [example.image_id for example in examples]
        of_post = [self.notes.get(self.find(example, split), {}) for example in examples]
        return PostNotes(self, photos, of_post, self.of_photos(photos, of_post))

    def of_photos(self, photos, of_post):
        """{image id: its note}: of posts that share it the first that `tells` most."""
        of_photo = {}
        for photo, note in zip(photos, of_post, strict=True):
            before = of_photo.get(photo, {})
            if photo is not None and (not before or self.tells(note) > self.tells(before)):
                of_photo[photo] = note
        return of_photo

    def tells(self, note):
        """(whether second segments read what was written with the photo in view, whether rows' relevance)."""
        keys = self.segments.keys if self.segments else ()
        text = any(note_text(note, key) and (key in OF_PHOTO or note.get("with_photo")) for key in keys)
        return text, self.relevance and "relevance" in note

    def coverage(self, examples):
        """Lines that say what the notes tell of each split, {split: examples}; ValueError if of no post."""
        ids = {split: [self.find(example, split) for example in posts] for split, posts in examples.items()}
        used = {note_id for of_split in ids.values() for note_id in of_split} - {None}
        if not used:
            first = next(iter(self.notes), "none")
            reason = f"no note is of any post (first id: {first}); is it another data set's?"
            raise ValueError(f"{self.path}: {reason}")
        unused = len(self.notes) - len(used)
        lines = [f"{self.path}: {len(self.notes)} notes, {unused} of no post here ({self.sha256[:16]})"]
        for split, of_split in ids.items():
            items = [item for note_id in of_split if note_id for item in self.notes[note_id].items()]
            keys = (key for key, value in items if value not in ("", [], False) or key == "relevance")
            counts = Counter(keys)
            texts = ", ".join(f"{key} of {counts[key]}" for key in KEYS if counts[key])
            lines.append(f"{split}: {texts} of {len(of_split)} posts")
        return lines


@dataclass(frozen=True)
class PostNotes:
    """The notes of some posts, in their order, and what of them a post is shown: it goes by the photo.

    `file`: the `Notes` they are from; `photos`: the posts' own image ids; `of_post`: a note each, {} for
    none; `of_photo` {image id: note}, of all photos that a post may be shown.
    """

    file: Notes
    photos: list
    of_post: list
    of_photo: dict

    def has_photo(self, image_id):
        """Whether the second segments say anything that was written with this photo in view.

        A relevance alone is nothing to be shown: it says how much of a photo's regions is used, if there are
        any.
        """
        return self.file.tells(self.of_photo.get(image_id, {}))[0]

    def known(self, i, photo):
        """The note of post `i`, where it is shown `photo`, an image id or None for no photo."""
        of_photo = {}
        if photo is not None:
            of_photo = self.of_post[i] if photo == self.photos[i] else self.of_photo[photo]
        return seen_with(self.of_post[i], of_photo)

    def shown(self, row, i, photo):
        """The row of `encode` of post `i`, with what is `known` of it where it is shown `photo`.

        A second segment has the tokenizer's own form for two texts, [CLS] post [SEP] note [SEP] and the like.
        """
        note = self.known(i, photo)
        if self.file.relevance and "relevance" in note:
            row = row | {"relevance": note["relevance"]}
        return self.file.segments(row, note) if self.file.segments else row

    def part(self, chosen):
        """Those of some of the posts, by their numbers."""
        photos, of_post = ([side[i] for i in chosen] for side in (self.photos, self.of_post))
        return replace(self, photos=photos, of_post=of_post)

    def with_text(self):
        """The numbers of the posts that have an `about_post`."""
        return [i for i, note in enumerate(self.of_post) if note_text(note, "about_post")]

    def shuffled(self, seed):
        """Each post that has an `about_post` gets another's, by one random cycle: a control.

        One that was written with a photo in view stays with the photo of the post it comes to.
        """
        givers, of_post = self.with_text(), list(self.of_post)
        order = [givers[i] for i in np.random.default_rng(seed).permutation(len(givers))]
        for taker, giver in zip(order, order[1:] + order[:1], strict=True):
            of_post[taker] = of_post[taker] | {"about_post": self.of_post[giver]["about_post"]}
        return replace(self, of_post=of_post, of_photo=self.file.of_photos(self.photos, of_post))


def said_of_photos(path, dataset):
    """{image id: phrases, a tuple, or None} of a notes file; {image id: caption or None} of one of captions.

    Of posts that share a photo the first note with `phrases` counts; none, or an empty list, is None.
    """
    first = next((line.strip() for _, line in read_lines(path) if line.strip()), "")
    if not first.startswith("{"):
        return by_name(dataset.image_ids(), read_captions(path))
    notes, phrases = Notes(path), dict.fromkeys(dataset.image_ids())
    for split, examples in dataset.examples.items():
        for example in examples:
            of_post = notes.notes.get(notes.find(example, split), {}).get("phrases")
            for photo in photo_names(example.image_id)[:1] if of_post else ():  # of several the first
                phrases[photo] = phrases[photo] or tuple(of_post)
    return phrases


def note_text(note, key):
    """A text of a note without outer space; "" where there is none."""
    return note.get(key, "").strip()


def seen_with(note, of_photo):
    """What is known of a post that is shown a photo: its own note, of the photo's what needed the photo."""
    own = {key: value for key, value in note.items() if key not in OF_PHOTO}
    if own.get("with_photo"):
        own["about_post"] = note_text(of_photo, "about_post")
    return own | {key: of_photo[key] for key in OF_PHOTO if key in of_photo}


class Segments:
    """Rows of `encode` with the texts of a note as a second segment; see `Notes`.

    `readable`: characters of a text that are looked at, many more than `length` sub-tokens of a language are.
    """

    def __init__(self, tokenizer, extra, length):
        self.tokenizer, self.keys, self.length = tokenizer, EXTRAS[extra], length
        self.readable = 4096 + 64 * length
        self.pieces, self.size = {}, 0  # {text: its sub-tokens}, characters of these texts
        self.end = len(special_ends(tokenizer)[1])
        self.middle, self.suffix = pair_ends(tokenizer)

    @property
    def longest(self):
        """How many sub-tokens a row can grow by."""
        return len(self.middle) + self.length + len(self.suffix) - self.end

    def split(self, text):
        """The sub-tokens of a text, one more than `length` at most."""
        ids = self.pieces.get(text)
        if ids is None:
            if self.size + len(text) > MOST_KEPT:
                self.pieces, self.size = {}, 0
            ids = self.pieces[text] = text_pieces(self.tokenizer, text)[: self.length + 1]
            self.size += len(text)
        return ids

    def __call__(self, row, note):
        """The row with a second segment; itself if the note has no text.

        `text_length`: how much of it is the post's; `note_cut`: whether the note was longer than `length`.
        """
        ids, texts = [], [text for key in self.keys if (text := note_text(note, key))]
        for text in texts:
            ids = ids + (self.middle if ids else []) + self.split(text[: self.readable])
        if not ids:
            return row
        post = row["input_ids"][: len(row["input_ids"]) - self.end]
        length = min(len(row["input_ids"]), len(post) + len(self.middle))
        cut = len(ids) > self.length or any(len(text) > self.readable for text in texts)
        input_ids = post + self.middle + ids[: self.length] + self.suffix
        return row | {"text_length": length, "note_cut": cut, "input_ids": input_ids}


def pair_ends(tokenizer):
    """The ids that the tokenizer puts between and after two texts, such as ([SEP], [SEP]).

    ValueError if it does not put the first one as it puts it alone.
    """
    (prefix, _), bare = special_ends(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"]
    pair = tokenizer("a", "a")["input_ids"]
    rest = pair[len(prefix) + len(bare) :]
    start = next((i for i in range(len(rest)) if rest[i : i + len(bare)] == bare), None)
    if pair[: len(prefix) + len(bare)] != prefix + bare or not start:
        raise ValueError(
            "the tokenizer of this --text-encoder has no form for two texts; leave --notes and --extra out"
        )
    return rest[:start], rest[start + len(bare) :]
