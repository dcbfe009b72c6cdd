"""Posts of no data set: read from JSON, cut into words as the run's data are, photos made into regions."""

import itertools
import json
import math
import numbers
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import NONE, NerExample, RelationExample
from features import ELSEWHERE, MISSING, OK, UNREADABLE, FeatureCache, Regions
from parts.backbones import DEFAULT_WEIGHTS, load_backbone
from parts.boxes import BoxedPhotos, with_boxes
from parts.captions import Captions
from parts.files import bounded_lines, is_span, is_text
from parts.notes import check_note
from parts.photos import WORDED, Photos
from parts.words import cut_words

LINE = 2**20  # bytes of a post's line, characters of its texts, and of all posts of a window, at most
WINDOW = 128  # posts answered together: sorted by length, little padding; what a kill costs
PHOTOS = 16  # that share a forward pass of the backbone
MOST_WORDS = 2000  # of a post: the model sees some 100, and memory grows with the longest
MOST_PHOTOS = 8  # of a post
TEXTS = ("id", "text", "words", "image", "caption", "phrases", "about_post", "about_photo", "boxes",
         "labels", "scores")  # that are read  # fmt: skip
OUTSIDE = "not in the folder that photos may come from"

# ------------------------------------------------------------------------------------------------------ posts


@dataclass
class NewPost:
    """A post to be answered.

    `given`: the dict that it came as; `example`: the same as a data set has it, its labels mean nothing;
    `offsets`: [(start, end)] of its words in its text, None where it came as words; `note`: what is said of
    it, of what the run reads; `photos`: {name: (what to call it, its path, opened image, caption or phrases)}
    of what the run looks at; `answer`: the dict that it gets.
    """

    given: dict
    example: NerExample | RelationExample
    offsets: list | None
    note: dict
    photos: dict
    answer: dict


def size_of(post):
    """Bytes of a post's line; of a dict the characters, words and phrases that are read."""
    values = [post.get(key) for key in TEXTS] if isinstance(post, dict) else [post]
    values += [word for value in values if isinstance(value, list | tuple) for word in value[:LINE]]
    return sum(len(value) for value in values if isinstance(value, str | bytes | list | tuple))


def numbered_lines(file, shard):
    """(number, line) of an open file, from 1 on, blank ones skipped; `shard` (i, n): every n-th from i on."""
    file.seek(0)
    file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)  # a byte order mark
    lines = enumerate(bounded_lines(file, LINE), 1)
    for number, line in itertools.islice(lines, shard[0] - 1, None, shard[1]):
        if line is None or line.strip():
            yield number, line and line.rstrip(b"\r\n")


def windows(lines):
    """Lists of numbered lines or posts, `WINDOW` at most, and no more than one over `LINE` bytes."""
    window, size = [], 0
    for number, line in lines:
        window.append((number, line))
        size += size_of(line)
        if len(window) == WINDOW or size > LINE:
            yield window
            window, size = [], 0
    if window:
        yield window


def load_post(post):
    """A post, given as a dict or as JSON on a line (bytes; None: a line that is too long), as a dict.

    What is NaN in it, as pandas writes what is not there, is left out. ValueError says what is wrong.
    """
    if post is None or size_of(post) > LINE:
        raise ValueError(f"longer than {LINE:,} bytes")
    if not isinstance(post, dict | bytes):
        raise ValueError("not a post: give a dict, {'text': ...}")
    if isinstance(post, bytes):
        if b"\0" in post:
            raise ValueError("not UTF-8 but UTF-16, it seems; iconv -f UTF-16 -t UTF-8 converts a file")
        try:
            post = json.loads(post.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            start = post[:40].decode(errors="replace")
            reason = f" ({error})" if start[:1] == "{" else f": it begins {start!r}"
            raise ValueError(f"not JSON{reason}") from None
        if not isinstance(post, dict):
            raise ValueError("not a JSON object")
    return {key: value for key, value in post.items() if not (isinstance(value, float) and math.isnan(value))}


def check_id(post_id):
    """The id of a post as it is, text, a number or None; else a ValueError."""
    whole = isinstance(post_id, numbers.Integral) and not isinstance(post_id, bool)
    if post_id is None or whole or (isinstance(post_id, float) and math.isfinite(post_id)):
        return post_id
    return check_text(post_id, "id")


def check_text(value, name):
    """The value if it is text; else a ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    if not is_text(value):
        raise ValueError(f"{name} holds half a character (a lone surrogate)")
    return value


def read_photos(post, source, folder=""):
    """[(what to call it, photo)] of what a run may look at of a post, a dict; else ValueError.

    `source`: "image", whose paths start at `folder` and which may be opened PIL images, one or a list of
    them; "caption"; or "phrases", a tuple of which is one photo, else its caption.
    """
    if source == "phrases":
        phrases = check_note(post, ("phrases",)).get("phrases")
        return read_photos(post, "caption") if phrases is None else [(tuple(phrases), tuple(phrases))]
    value, photos = post.get(source), []
    for photo in value if source == "image" and isinstance(value, list | tuple) else [value]:
        if source == "image" and isinstance(photo, Image.Image):
            photos.append(("opened image", photo))
        elif photo is not None:
            text = check_text(os.fspath(photo) if isinstance(photo, os.PathLike) else photo, source)
            photos.append((text, os.path.join(folder, text) if source == "image" else text))
    if len(photos) > MOST_PHOTOS:
        raise ValueError(f"more than {MOST_PHOTOS} photos")
    return photos


def read_post(post, task, rule):
    """(example, [(start, end)] of its words in its text or None) of a post, a dict; else ValueError.

    `rule`: of parts/words.py, which cuts its text into words; None: no text can be cut as the run's data are.
    The example has no photo, and its labels mean nothing.
    """
    text, words, offsets = post.get("text"), post.get("words"), None
    if (text is None) == (words is None):
        raise ValueError("needs either text or words")
    if words is None:
        unit, size = "characters", len(check_text(text, "text"))
    elif isinstance(words, list):
        unit, size = "words", len([check_text(word, "a word") for word in words])
    else:
        raise ValueError("words is not a list")
    spans = []
    for name in ("head", "tail") if task == "relation" else ():
        if not (is_span(span := post.get(name)) and span[1] <= size):
            raise ValueError(f"{name} is not a span [start, end) of its {size} {unit}")
        spans.append(tuple(span))
    if words is None and rule is None:
        raise ValueError("the words of the run's data follow no known rule, so no text can be cut as they"
                         " are; give the post its words, or train with --word-rule")  # fmt: skip
    if words is None:
        offsets = cut_words(text, rule, itertools.chain(*spans), MOST_WORDS + 1)
        words = [text[start:end] for start, end in offsets]
    if not words:
        raise ValueError("no words in it")
    if len(words) > MOST_WORDS:
        raise ValueError(f"more than {MOST_WORDS} words")
    if task == "ner":
        return NerExample("", None, tuple(words), ("O",) * len(words)), offsets
    if offsets:  # from characters to words: those that lie within
        inside = [[i for i, (a, b) in enumerate(offsets) if start <= a and b <= end] for start, end in spans]
        if not all(inside):
            raise ValueError("no words in head or tail")
        spans = [(indices[0], indices[-1] + 1) for indices in inside]
    return RelationExample("", None, tuple(words), *spans, NONE), offsets


def near(example, reach):
    """The example without words that are more than `reach` from where the model reads, and how many went.

    It reads from the first word on, and around the two entities of a relation.
    """
    relation, words = isinstance(example, RelationExample), example.words
    spans = [example.head, example.tail] if relation else [(0, 0)]
    places = [i for i in range(len(words)) if any(a - reach <= i < b + reach for a, b in spans)]
    changes = {"words": tuple(words[i] for i in places)}
    if relation:
        head, tail = ((places.index(a), places.index(b - 1) + 1) for a, b in spans)
        changes |= {"head": head, "tail": tail}
    else:
        changes["labels"] = example.labels[: len(places)]
    return replace(example, **changes), len(words) - len(places)


# ----------------------------------------------------------------------------------------------------- photos


def inside(path, root):
    """Where a path leads, links and all, if that is in the folder `root`, itself without links; else None."""
    if "\0" in path or "://" in path:
        return None
    real = os.path.realpath(path)
    return real if os.path.commonpath((real, root)) == root else None


class Given:
    """In the place of a backbone, where a feature file alone has the regions of photos, by their names.

    `provenance`: the `features_made` of the run, whose regions are `width` wide; `path`: the file of
    `write_features`, None where there is none, and so no regions.
    """

    same_size, dtype, parameters = True, np.float16, 0

    def __init__(self, provenance, width, path):
        self.regions, self.cache, self.shape = torch.nn.Identity(), None, (1, width)
        if path is None:
            return
        self.cache = FeatureCache(path)
        self.shape = self.cache.shape[2:]
        sides = (self.cache.attrs["backbone"], self.cache.attrs["weights"], self.shape[1])
        if sides != (ELSEWHERE, provenance["weights"], width):
            own = f"the run's by {provenance['weights']}, {width} wide; name others with --features"
            raise ValueError(f"{path}: regions made by {sides[1]}, {sides[2]} wide; {own}")

    def read(self, name):
        """(regions [1, n, D] or None, status, reason) of a photo by its name, a path or an opened image's."""
        if self.cache is None:
            return None, MISSING, "regions are made elsewhere; --features names their file"
        row = self.cache.rows.get(os.path.basename(name))
        if row is None:
            return None, MISSING, f"not in {self.cache.path}"
        batch, status = self.cache.read([self.cache.ids[row]]), int(self.cache.status[row])
        regions = batch["regions"][batch["region_mask"]][None].numpy()
        return regions if status == OK else None, status, self.cache.reasons[row]

    def look(self, views, device, each):
        return views

    def grid(self, views):
        return 0, 0


def run_backbone(provenance, weights=None, width=None, features=None):
    """The backbone that made a run's features, from what the run knows of them (`features_made`).

    `weights`: where they are, if the run knows them by their digits alone. `features`: of a run on regions
    `width` wide that were made elsewhere, the file of those of new photos. ValueError if what is needed is
    absent, or another.
    """
    if provenance["backbone"] == ELSEWHERE:
        if weights:
            raise ValueError(f"--weights {weights}: the run's regions were made elsewhere; leave it out")
        return Given(provenance, width, features)
    if features:
        raise ValueError(f"--features {features}: the run makes regions of photos itself; leave it out")
    published_names = {"IMAGENET1K_V1": "imagenet", "IMAGENET1K_V2": "imagenet-v2", "none": None}.get
    name = provenance["weights"]
    kind = name.split("-")[0]
    if weights is None and kind == "file":
        local = f"a local {provenance['backbone']} ({name})"
        raise ValueError(f"the run's features were made with {local}; name it with --weights")
    published = "random" if kind == "random" else published_names(name, name)
    own = {"random", "imagenet", "imagenet-v2"}  # to others folders, or names at the hub
    known = own if provenance["backbone"] == "resnet50" else DEFAULT_WEIGHTS - own
    if weights is None and published not in {None, *known}:
        rule = "a run's word loads nothing from a hub; name it with --weights"
        raise ValueError(f"the run's features were made with {published}, and {rule}")
    weights = weights or published
    framing = provenance.get("fit"), provenance.get("grid")
    size, seed = provenance["img_size"], provenance["seed"]
    backbone = load_backbone(provenance["backbone"], weights, size, seed, *framing)
    if "boxes_sha256" in provenance:
        backbone = with_boxes(backbone)
    here = backbone.settings | {"weights_sha256": backbone.weights_sha256}
    del here["weights"]  # a name; what counts is the hash
    pairs = [(key, provenance.get(key), value) for key, value in here.items()]
    differing = [f"{key} (run: {theirs}, here: {ours})" for key, theirs, ours in pairs if theirs != ours]
    if differing:
        reason = f"not what the run's features were made with: {'; '.join(differing)}"
        raise ValueError(f"--weights {weights or 'default'}: {reason}")
    return backbone


class NewPhotos(Regions):
    """The `Regions` of photos that no feature file holds, or of captions or phrases: one view, in memory.

    `sources`: {name: the photo's path or an opened PIL image, or its caption or phrases}; of a run on boxes a
    name is (the photo's, its `Boxes` or None). `root`: the folder, without links, that alone may be looked
    into, None for any.
    """

    def __init__(self, sources, provenance, backbone, device, pool, root=None):
        names = list(sources)
        count, held = len(sources), max(1, len(sources))  # `read` hides row 0 where a post has no photo
        self.rows, self.shape = {name: row for row, name in enumerate(names)}, (held, 1, *backbone.shape)
        self.regions, self.grid = np.zeros(self.shape, backbone.dtype), np.zeros((held, 2), int)
        self.status, self.num_regions, self.reasons = np.zeros(held, int), np.zeros(held, int), [""] * held
        if provenance["backbone"] in WORDED:
            placeholder = None if provenance["placeholder"] == "none" else provenance["placeholder"]
            load = Captions(names, sources, backbone, placeholder, provenance["backbone"]).read
        elif provenance["backbone"] == ELSEWHERE:
            load = lambda row: backbone.read(names[row])  # noqa: E731
        else:
            paths, reasons = dict(sources), {}
            for name, photo in sources.items():
                if isinstance(photo, str):
                    place = photo if root is None else inside(photo, root)
                    paths[name] = None if place is None else Path(place)
                    reasons |= {name: OUTSIDE} if place is None else {}
            photos = names, paths, backbone, 1, provenance["seed"], reasons, provenance.get("placeholder")
            if "boxes_sha256" in provenance:
                load = BoxedPhotos({name: name[1] for name in names}, *photos).read
            else:
                load = Photos(*photos).read
        waiting, together = [], PHOTOS if backbone.same_size else 1
        for row, (views, self.status[row], self.reasons[row], *_) in enumerate(pool.map(load, range(count))):
            waiting += [] if views is None else [(row, views)]
            if waiting and (len(waiting) == together or row == count - 1):
                with torch.inference_mode():
                    of_photos = backbone.look([views for _, views in waiting], device, 1)
                for (row, views), regions in zip(waiting, of_photos, strict=True):  # [1, n, D]
                    if np.isfinite(regions).all():
                        self.num_regions[row], self.grid[row] = regions.shape[1], backbone.grid(views)
                        self.regions[row, :, : self.num_regions[row]] = regions
                    else:
                        self.status[row], self.reasons[row] = UNREADABLE, "its features do not fit float16"
                waiting = []
