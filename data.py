"""Data set files -> examples -> batches, and `FeatureCache`, the read side of the feature file.

Reads Twitter-2015 and Twitter-2017 (named entities) and MNRE (relations) in the layouts their public releases unpack
to, and a folder of your own named-entity data. Needs torch, numpy and h5py only, and nothing else of this project: copy
the file and use it.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

NONE = "None"  # the relation that means "no relation"
RELATIONS = (
    NONE, "/loc/loc/contain", "/misc/loc/held_on", "/misc/misc/part_of", "/org/loc/locate_at",
    "/org/org/alternate_names", "/org/org/subsidiary", "/per/loc/place_of_birth", "/per/loc/place_of_residence",
    "/per/misc/awarded", "/per/misc/nationality", "/per/misc/present_in", "/per/misc/race", "/per/misc/religion",
    "/per/org/member_of", "/per/per/alternate_names", "/per/per/alumi", "/per/per/charges", "/per/per/couple",
    "/per/per/neighbor", "/per/per/parent", "/per/per/peer", "/per/per/siblings",
)  # fmt: skip


def bio_labels(types):
    """`O`, then `B-` and `I-` of every entity type."""
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


# Per data set: its task and every label a release of it may hold. The original Twitter-2015 says OTHER, the
# relabelled one MISC; which of them a run predicts is read from its training file.
DATASETS = {
    "twitter2015": ("ner", bio_labels(("LOC", "MISC", "ORG", "OTHER", "PER"))),
    "twitter2017": ("ner", bio_labels(("LOC", "MISC", "ORG", "PER"))),
    "mnre": ("relation", RELATIONS),
    "demo": ("ner", bio_labels(("LOC", "MISC", "ORG", "PER"))),
}

OWN_DATA = ("ner", None)  # a folder of the user's own: any BIO label

# Where the public releases put things, {d} = data set, {s} = split. One release really has "mnre_val .txt".
TEXT_PLACES = [
    f"{folder}/{name}"
    for folder in ("{d}", "{d}/{d}_txt", "{d}_txt", "{d}/txt")
    for name in ("{s}.txt", "{d}_{s}.txt", "{d}_{s} .txt", "ours_{s}.txt")
]
IMAGE_PLACES = (
    "{d}/images", "{d}_images", "{d}/{d}_images", "{d}/{d}_image", "{d}_image", "{d}/img_org", "{d}_img_org", "img_org",
)  # fmt: skip
SPLITS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}  # ours -> the names files use

# SHA-256 (first 16 digits) of the files as released: scores on two variants of one data set are not comparable.
VARIANTS = {
    "a6246e37aa1c8acd": "Twitter-2015 train, UMT release",
    "9dcc7f9df7331de3": "Twitter-2015 valid, UMT release",
    "edb2665b89bfe58b": "Twitter-2015 test, UMT release",
    "66c1336f27fe8545": "Twitter-2015 train, relabelled release",
    "51e003ec71c202d7": "Twitter-2015 valid, relabelled release",
    "a4ef7f191a456021": "Twitter-2015 test, relabelled release",
    "801e149e8635b19d": "Twitter-2017 train, UMT release",
    "41b5db90cb32059c": "Twitter-2017 valid, UMT release",
    "a7d9e172ae85bd3e": "Twitter-2017 test, UMT release",
    "1cc34438a00e2a2d": "MNRE train, v2",
    "c76865179b567816": "MNRE valid, v2",
    "f53c2f9b7739bea7": "MNRE test, v2",
}

# Pieces that mark the head and the tail entity of a relation (entity markers, Baldini Soares et al. 2019).
MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")
LONGEST_LINE = 10_000_000  # characters; to parse more as a Python literal can take all memory
IGNORE = -100  # label of what the loss leaves out: padding and words that have no sub-token


# ---------------------------------------------------------------------------------------------- files -> examples


@dataclass(frozen=True)
class NerExample:
    """A post with one BIO label a word. `id` is unique within its split; `image_id` names the photo."""

    id: str
    image_id: str
    words: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class RelationExample:
    """A post with two marked entities, as word spans [start, end), and the relation from head to tail."""

    id: str
    image_id: str
    words: tuple[str, ...]
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str


def read_lines(path):
    """[(line number, line)] of a UTF-8 file, without line ends; ValueError names a line that is not UTF-8, or too long."""
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    # Only \n ends a line: str.splitlines would also break posts at U+0085, U+2028 and the like.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    for number, line in lines:
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{path}:{number}: a line of {len(line):,} characters; no post has one so long, correct the file")
    return lines


def check_image_id(image_id, where):
    """The id if it can name a file inside the image folder; anything else (a path, a NUL) is refused."""
    if not image_id or image_id in (".", "..") or re.search("[/\\\\\x00-\x1f\ud800-\udfff]", image_id):
        raise ValueError(f"{where}: image id {image_id!r} is not a plain file name; correct it")
    return image_id


def check_label(label, allowed, where):
    """The label if it is one of `allowed`, or any BIO label where that is None; else a ValueError that shows what is."""
    if allowed is None and not re.fullmatch(r"O|[BI]-\S+", label):
        raise ValueError(f"{where}: label {label!r} is not O, B-TYPE or I-TYPE; convert the file to BIO labels")
    if allowed is not None and label not in allowed:
        raise ValueError(f"{where}: unknown label {label!r}; expected one of: {' '.join(allowed)}")
    return label


def read_ner(path, allowed):
    """Posts of a Twitter-2015/2017 file: `IMGID:<id>`, then `word<TAB>label` lines, then a blank line or the end.

    `allowed`: the labels that may occur. Only the tab separates: a word may be U+00A0 or empty to the eye. With None,
    for files of one's own, any BIO label may, and spaces separate where there is no tab. A post whose id has occurred
    before gets its line number into its `id`. Raises ValueError with file and line.
    """
    examples, ids = [], set()
    image_id, opened, words, labels = None, 0, [], []
    lines = read_lines(path)
    for number, line in [*lines, (len(lines) + 1, "")]:  # the last post may end without a blank line
        where = f"{path}:{number}"
        starts_post = line.startswith("IMGID:") and "\t" not in line
        if (starts_post or not line.strip(" ")) and image_id is not None:
            if not words:
                raise ValueError(f"{path}:{opened}: post {image_id} has no words; remove it or give it its words")
            post_id = image_id
            while post_id in ids:
                post_id += f"@{opened}"
            ids.add(post_id)
            examples.append(NerExample(post_id, image_id, tuple(words), tuple(labels)))
            image_id, words, labels = None, [], []
        if starts_post:
            image_id, opened = check_image_id(line[len("IMGID:") :].strip(" "), where), number
        elif line.strip(" "):
            spaced = allowed is None and "\t" not in line
            fields = re.split(" +", line.strip(" ")) if spaced else line.split("\t")
            fields[1:] = [field.strip(" ") if allowed is None else field for field in fields[1:]]
            if len(fields) != 2:
                raise ValueError(f"{where}: expected word<TAB>label, found {line[:80]!r}")
            if image_id is None:
                raise ValueError(f"{where}: a word with no IMGID:<id> line before it; each post starts with one")
            words.append(fields[0])
            labels.append(check_label(fields[1], allowed, where))
    return examples


def read_mnre(path, allowed):
    """Rows of an MNRE file: one Python dict literal a line (parsed as data, never run).

    A row's `id` is `<image id>@<line>`: up to 21 rows share a photo. Raises ValueError with file and line.
    """
    examples = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = ast.literal_eval(line.strip())
            words, image_id, relation = row["token"], row["img_id"], row["relation"]
            spans = {end: (start, stop) for end in "ht" for start, stop in [row[end]["pos"]]}
        except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError, RecursionError) as error:
            said = str(error).splitlines()[0].split(": <ast.")[0] if str(error) else "not readable"  # less an address in memory
            reason = f"{type(error).__name__}: {said}"
            raise ValueError(
                f"{where}: not a row {{'token', 'h': {{'pos'}}, 't': {{'pos'}}, 'img_id', 'relation'}} ({reason[:120]})"
            ) from None
        # Half a surrogate pair is a str to Python, but no text: no tokenizer takes it.
        if not (isinstance(words, list) and words and all(
            isinstance(word, str) and not re.search("[\ud800-\udfff]", word) for word in words)):  # fmt: skip
            raise ValueError(f"{where}: 'token' must be a list of words")
        for end, span in spans.items():
            if not (all(type(i) is int for i in span) and 0 <= span[0] < span[1] <= len(words)):
                raise ValueError(f"{where}: '{end}' pos is not a span [start, end) of its {len(words)} words")
        if not (isinstance(image_id, str) and isinstance(relation, str)):
            raise ValueError(f"{where}: 'img_id' and 'relation' must be text")
        check_image_id(image_id, where)
        check_label(relation, allowed, where)
        examples.append(
            RelationExample(f"{image_id}@{number}", image_id, tuple(words), spans["h"], spans["t"], relation)
        )
    return examples


@dataclass(frozen=True)
class Dataset:
    """A data set as read: `files` and `examples` by split (train, valid and, where there is one, test)."""

    name: str  # one of `DATASETS`, or the name of the user's own folder
    task: str  # "ner" or "relation"
    files: dict
    examples: dict
    labels: tuple[str, ...]  # what a model may answer, the "nothing here" label first

    def image_ids(self):
        """Every photo the posts name, once, in order of first use."""
        return list(dict.fromkeys(example.image_id for split in self.examples.values() for example in split))

    def fingerprints(self):
        """{split: {"file", "sha256", "variant"}}: which release of the data set this is."""
        prints = {}
        for split, path in self.files.items():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            variant = VARIANTS.get(digest[:16], "not a file of a known release")
            prints[split] = {"file": str(path), "sha256": digest, "variant": variant}
        return prints


def dataset_name(text):
    """argparse type: one of `DATASETS`, or a folder of the user's own data."""
    if text not in DATASETS and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(DATASETS)}")
    return text if text in DATASETS else str(Path(text).resolve())


def locate(name, data_dir):
    """(name, parent folder) of a data set: one of `DATASETS` under `data_dir`, or the user's own folder `name`."""
    path = Path(name).resolve()
    return (name, data_dir) if name in DATASETS else (path.name, path.parent)


def first_existing(places, name, data_dir, split_names=("",)):
    """The first of `places` that exists under `data_dir`, or None."""
    tried = [Path(data_dir) / place.format(d=name, s=split) for place in places for split in split_names]
    return next((path for path in tried if path.exists()), None)


def load_dataset(name, data_dir="data"):
    """Read all splits of a data set, one of `DATASETS` under `data_dir` or a folder of the user's own.

    Train and valid must be there; FileNotFoundError says where they were sought. ValueError for what cannot be read, and
    for labels of one's own that train does not have.
    """
    task, known = DATASETS.get(name, OWN_DATA)
    name, data_dir = locate(name, data_dir)
    files = {split: first_existing(TEXT_PLACES, name, data_dir, names) for split, names in SPLITS.items()}
    for split in ("train", "valid"):
        if files[split] is None:
            plain = Path(data_dir) / name / f"{split}.txt"
            raise FileNotFoundError(
                f"no {split} file of {name} under {data_dir}/: put it at {plain} (README, 'Data', lists the other"
                " layouts read) or point --data-dir at its parent folder"
            )
    files = {split: path for split, path in files.items() if path is not None}
    read = read_ner if task == "ner" else read_mnre
    examples = {"train": read(files["train"], known)}
    if task == "ner":
        present = {label[2:] for example in examples["train"] for label in example.labels if label != "O"}
        labels = tuple(y for y in known or bio_labels(sorted(present)) if y == "O" or y[2:] in present)
    else:
        present = {example.label for example in examples["train"]}
        labels = tuple(label for label in known if label == NONE or label in present)
    for split in files:
        if split != "train":
            examples[split] = read(files[split], known and labels)
        if not examples[split]:
            raise ValueError(f"{files[split]}: no posts in it; the {split} split cannot be empty")
        if known is None and (new := {y for example in examples[split] for y in example.labels} - set(labels)):
            raise ValueError(f"{files[split]}: labels that train does not have: {' '.join(sorted(new))}; correct them")
    return Dataset(name, task, files, examples, labels)


def image_folders(name, data_dir="data", images=None):
    """Folders that hold the photos: `images` if given, else the first place a release uses, with its split folders."""
    name, data_dir = locate(name, data_dir)
    root = Path(images) if images else first_existing(IMAGE_PLACES, name, data_dir)
    if root is None or not root.is_dir():
        plain = Path(data_dir) / name / "images"
        raise FileNotFoundError(f"no image folder {root or plain}: put the photos there or name theirs with --images")
    return [root, *(root / split for names in SPLITS.values() for split in names if (root / split).is_dir())]


def find_photos(image_ids, folders):
    """{image id: path, or None where there is no photo}.

    Looks ids up `by_name` among the names in the folders, so that no id can lead anywhere else.
    """
    names = {}
    for folder in folders:
        for entry in sorted(os.listdir(folder)):
            names.setdefault(entry, Path(folder) / entry)
    return by_name(image_ids, names)


def by_name(image_ids, names):
    """{image id: what `names` has for it, or None}: as `<id>` or `<id>.jpg` and such, exactly so or in another case."""
    names = {name.lower(): value for name, value in reversed(names.items())} | names  # the first of equals
    endings = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
    candidates = {i: [stem + end for stem in (i, i.lower()) for end in endings] for i in image_ids}
    return {i: next((names[key] for key in keys if key in names), None) for i, keys in candidates.items()}


def read_captions(path):
    """{photo's name: caption} of a UTF-8 file with `<name> :<caption>` or `<name><TAB><caption>` lines.

    Raises ValueError with file and line; a photo captioned twice is one.
    """
    captions = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        name, separator, caption = line.partition("\t" if "\t" in line else " :")
        if not separator:
            raise ValueError(f"{path}:{number}: expected '<photo> :<caption>', found {line[:80]!r}")
        if name in captions:
            raise ValueError(f"{path}:{number}: {name} has a caption already; keep one")
        captions[name] = caption.strip()
    return captions


# ------------------------------------------------------------------------------------------------ examples -> batches


# Words that tell whether a tokenizer gives a list of words the pieces that they have in a sentence.
PROBE = (
    "Kevin DURANT 's 30pts @ Oracle 😍 #WarriorsWin2016 , don't café ... they’re 2-0 ( x2 ) http://t.co/Ab1 GO!!".split()
)


def word_pieces(tokenizer, sentences):
    """What `split_pieces` gives, each word tokenised as if it stood alone."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, truncation=False)
        return [(encoded["input_ids"][i], encoded.word_ids(i)) for i in range(len(sentences))]
    rows = []
    for words in sentences:
        pieces = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in words]
        rows.append(([i for ids in pieces for i in ids], [w for w, ids in enumerate(pieces) for _ in ids]))
    return rows


def takes_words(tokenizer):
    """Whether words one by one have the pieces of the sentence; others (ModernBERT's, Qwen's) lose the spaces between."""
    return word_pieces(tokenizer, [PROBE])[0][0] == tokenizer(" ".join(PROBE), add_special_tokens=False)["input_ids"]


def split_pieces(tokenizer, sentences):
    """[(ids, word of each id)] of word lists, without the tokenizer's own special tokens.

    The ids are those of the words joined by spaces. Where words one by one do not give them, pieces are mapped to words by
    their place in the sentence; one that begins with the space belongs to the word after it.
    """
    if takes_words(tokenizer):
        return word_pieces(tokenizer, sentences)
    rows = []
    for words in sentences:
        if getattr(tokenizer, "is_fast", False):
            encoded = tokenizer(" ".join(words), add_special_tokens=False, truncation=False, return_offsets_mapping=True)
            owner = [w for w, word in enumerate(words) for _ in f" {word}"][1:] + [len(words) - 1]  # of each character
            word_of = [owner[start] for start, _ in encoded["offset_mapping"]]
        else:  # no offsets: a word ends where the pieces of the sentence up to it do
            texts = (" ".join(words[:end]) for end in range(1, len(words) + 1))
            ends = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            encoded = tokenizer(" ".join(words), add_special_tokens=False)
            word_of = np.searchsorted(ends, np.arange(len(encoded["input_ids"])), side="right").tolist()
        rows.append((encoded["input_ids"], word_of))
    return rows


def special_ends(tokenizer):
    """The ids that the tokenizer puts before and after a sentence, such as ([CLS], [SEP]); two empty lists if none."""
    bare, full = (tokenizer("a", add_special_tokens=on)["input_ids"] for on in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if start is None:
        raise ValueError("the tokenizer's special tokens change the pieces of a sentence")
    return full[:start], full[start + len(bare) :]


def mark_entities(example):
    """(words with the four `MARKERS` around head and tail, {marker: its index}). Spans may overlap."""
    (head, head_end), (tail, tail_end) = example.head, example.tail
    places = zip((head_end, tail_end, head, tail), ("[/E1]", "[/E2]", "[E1]", "[E2]"), strict=True)
    places, words, index = list(places), [], {}  # closing markers first, so that neighbours do not nest
    for position in range(len(example.words) + 1):
        for place, marker in places:
            if place == position:
                index[marker] = len(words)
                words.append(marker)
        words += example.words[position : position + 1]
    return words, index


def window(length, spans, limit):
    """Which of `length` pieces to keep, at most `limit`, for the sake of two `spans` (first, last piece) of them.

    One run around both spans where that fits; else half of the room from the start of each on, so that both starts are
    kept, and both spans whole unless one is longer than that.
    """
    (first, first_end), (second, second_end) = sorted(spans)
    last, half = max(first_end, second_end), limit // 2
    if length <= limit:
        return list(range(length))
    if last - first < limit:
        start = min(max(0, (first + last + 1 - limit) // 2), length - limit)
        return list(range(start, start + limit))
    if second - first < limit - half:
        return list(range(first, first + limit))
    tail = min(half, length - second)
    return [*range(first, first + limit - tail), *range(second, second + tail)]


def encode(tokenizer, examples, labels, max_len):
    """Tokenise once. Returns a list of dicts, one an example, and counts of what the model will not see.

    `input_ids` [T], T <= max_len; named entities: `word_starts` [W] (index of each word's first sub-token, -1 for a
    word that has none or was cut off) and `labels` [W] (IGNORE where there is no sub-token); relations: `head_index`,
    `tail_index` (index of the start markers) and `labels`, one number. A relation too long for max_len keeps a `window`
    with both entities. Counts: `cut_words` (and `cut_posts`), `words_without_piece`.
    """
    prefix, suffix = special_ends(tokenizer)
    room = max_len - len(prefix) - len(suffix)
    if room < 4:
        raise ValueError(f"--max-len {max_len} leaves {room} sub-tokens for the text; use 16 or more")
    label_id = {label: i for i, label in enumerate(labels)}
    relations = isinstance(examples[0], RelationExample)
    marked = [mark_entities(example) if relations else (list(example.words), {}) for example in examples]
    rows, counts = [], {"cut_posts": 0, "cut_words": 0, "words_without_piece": 0}
    for example, (words, marker), (ids, word_of) in zip(
        examples, marked, split_pieces(tokenizer, [m[0] for m in marked]), strict=True
    ):
        first_piece = {}
        for piece, word in enumerate(word_of):
            first_piece.setdefault(word, piece)
        if relations:
            spans = [tuple(first_piece[marker[m]] for m in pair) for pair in (("[E1]", "[/E1]"), ("[E2]", "[/E2]"))]
            kept = window(len(ids), spans, room)
        else:
            kept = range(min(len(ids), room))
        place = {piece: len(prefix) + i for i, piece in enumerate(kept)}
        starts = [place.get(first_piece.get(word), -1) for word in range(len(words))]
        cut = [word for word in first_piece if starts[word] < 0 and not (relations and words[word] in MARKERS)]
        counts["cut_words"] += len(cut)
        counts["cut_posts"] += bool(cut)
        counts["words_without_piece"] += len(words) - len(first_piece)
        row = {"input_ids": prefix + [ids[i] for i in kept] + suffix}
        if relations:
            row |= {"head_index": starts[marker["[E1]"]], "tail_index": starts[marker["[E2]"]]}
            row["labels"] = label_id[example.label]
        else:
            row["word_starts"] = starts
            row["labels"] = [label_id[y] if s >= 0 else IGNORE for y, s in zip(example.labels, starts, strict=True)]
        rows.append(row)
    return rows, counts


def length_batches(lengths, batch_size, rng=None):
    """Lists of indices, at most `batch_size` each, of posts of similar length; each post once.

    With a numpy Generator the order is random: posts are shuffled, sorted by length within pools of 50 batches, and
    the batches shuffled. Without, longest first, so that running out of memory shows at once.
    """
    lengths = np.asarray(lengths)
    if rng is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    order, batches = rng.permutation(len(lengths)), []
    for pool in np.array_split(order, range(50 * batch_size, len(order), 50 * batch_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(rows, pad_id, cache=None, photos=None, views=None):
    """A batch of CPU tensors, padded to its longest post, from rows of `encode`.

    input_ids, attention_mask [B, T]; word_starts, labels [B, W] or head_index, tail_index, labels [B]. With a cache
    also what `FeatureCache.read` gives for `photos`, the image id of each row or None for no photo, and `views`.
    """

    def pad(key, value):
        width = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {"input_ids": pad("input_ids", pad_id)}
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if "word_starts" in rows[0]:
        batch |= {"word_starts": pad("word_starts", -1), "labels": pad("labels", IGNORE)}
    else:
        batch |= {key: torch.tensor([row[key] for row in rows]) for key in ("head_index", "tail_index", "labels")}
    if cache is not None:
        batch |= cache.read(photos, views)
    return batch


def to_device(batch, device):
    """Copy a batch without making the host wait; regions are still float16 here, half the bytes to move."""
    if torch.device(device).type == "cuda":  # from memory that is not pinned, the copy would wait
        batch = {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# ---------------------------------------------------------------------------------------------------- feature file

FORMAT = 4  # version of the feature file's layout
OK, MISSING, UNREADABLE = 1, 2, 3  # `status`; 0 = not done
COLUMNS = ("regions", "num_regions", "grid", "image_id", "status", "reason", "crc32")


def read_attrs(file):
    """How an open feature file was made: {name: str, int or list}. Text is stored as fixed-length UTF-8 bytes."""
    values = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in file.attrs.items()}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}


def row_crc32(regions, image_id, num_regions, grid, status, reason):
    """[V] checksums of a row of a feature file, a view each, over its regions [V, R, D] and all its other columns."""
    about = zlib.crc32(json.dumps([image_id, int(num_regions), *map(int, grid), int(status), reason]).encode())
    return [zlib.crc32(np.ascontiguousarray(view).view(np.uint8), about) for view in regions]


def attrs_crc32(attrs):
    """Checksum of how a feature file was made, itself left out."""
    return zlib.crc32(json.dumps({k: v for k, v in attrs.items() if k != "attrs_crc32"}, sort_keys=True).encode())


def photos_digest(paths):
    """SHA-256 over the names and sizes of the photos at `paths`, {image id: path or None}: which photos they are."""
    sizes = [[image_id, os.path.getsize(p) if os.path.isfile(p) else 0] for image_id, p in paths.items() if p is not None]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


class FeatureCache:
    """Read side of a feature file made by extract_features.py.

    The regions are contiguous in the file, so they are mapped into memory at their offset: nothing is copied before
    it is asked for, the pages are shared by all processes, and reading is safe under fork and spawn alike. A view is
    compared with its checksum when it is first read.

    Attributes: `attrs` (how the file was made), `shape` (N, V, R, D), `rows` {image id: row}, `status` [N],
    `num_regions` [N] and `grid` [N, 2], the rows and columns of places that the last regions of a photo stand for, row
    by row; regions before them (BLIP's class token) are of the photo as a whole.
    Raises FileNotFoundError or ValueError when the file is absent, unfinished, truncated or no feature file.
    """

    resident = None  # all regions on a device, from `keep_on` on

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            hint = " (an unfinished one is there: run the same command again to resume it)"
            unfinished = self.path.with_name(self.path.name + ".partial").exists()
            raise FileNotFoundError(
                f"no feature file {path}{hint if unfinished else ''}; make it with extract_features.py,"
                " name another with --features, or train without photos: --fusion none"
            )
        try:
            with h5py.File(self.path, "r", locking=False) as file:  # network drives may know no locks
                self.attrs = read_attrs(file)
                columns = [file.get(name) for name in COLUMNS]
                if self.attrs.get("format") != FORMAT or not all(isinstance(c, h5py.Dataset) for c in columns):
                    found = self.attrs.get("format", "none")
                    raise ValueError(
                        f"{path}: format {found}, expected {FORMAT}; make it anew with extract_features.py"
                    )
                self.status, self.num_regions = file["status"][:], file["num_regions"][:]
                self.grid, self.crc32 = file["grid"][:], file["crc32"][:]
                ids = [name.decode() for name in file["image_id"][:]]
                self.reasons = [reason.decode() for reason in file["reason"][:]]
                regions = file["regions"]
                self.shape, offset, dtype = regions.shape, regions.id.get_offset(), regions.dtype
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a readable HDF5 file ({reason}); make it anew") from None
        if (self.status == 0).any():
            raise ValueError(
                f"{path}: {(self.status == 0).sum()} photos not done; make it anew with extract_features.py --overwrite"
            )
        # Mapping past the end of a file is a bus error at first touch, not an exception: compare the lengths first.
        if offset is None:
            raise ValueError(f"{path}: its regions are not one contiguous block; make it anew with extract_features.py")
        if self.path.stat().st_size < offset + int(np.prod(self.shape)) * dtype.itemsize:
            raise ValueError(f"{path}: shorter than its {self.shape} regions need; it was cut off, make it anew")
        if self.attrs.get("attrs_crc32") != attrs_crc32(self.attrs):
            raise ValueError(f"{path}: what it says of itself is damaged; make it anew with extract_features.py --overwrite")
        self.ids = ids
        self.rows = {image_id: row for row, image_id in enumerate(ids)}
        self.checked = np.zeros(self.shape[:2], bool)
        self.regions = np.memmap(self.path, dtype, mode="r", offset=offset, shape=self.shape)

    @property
    def sha256(self):
        """Of the checksums of all rows: two files share it exactly when they hold the same features."""
        return hashlib.sha256(self.crc32.tobytes()).hexdigest()

    def __reduce__(self):
        return FeatureCache, (self.path,)  # a pickled map would carry all its bytes; a worker opens the file itself

    @property
    def views(self):
        return self.shape[1]

    @property
    def region_dim(self):
        return self.shape[3]

    def has_photo(self, image_id):
        """Whether the photo was there and readable."""
        return bool(self.status[self.rows[image_id]] == OK)

    def whole(self, row, views=slice(None)):
        """Whether the bytes of a row are those that were written."""
        about = self.ids[row], self.num_regions[row], self.grid[row], self.status[row], self.reasons[row]
        return row_crc32(self.regions[row, views], *about) == self.crc32[row, views].tolist()

    def damaged(self, photo, view):
        """The error for bytes that are not those that were written."""
        return ValueError(
            f"{self.path}: the features of photo {photo} are damaged ({view}); extract_features.py"
            " --verify finds all such rows, and the same command without it then repairs them"
        )

    def keep_on(self, device):
        """Copy all regions to a device, every row checked; `read` then takes them there, where they stay."""
        with ThreadPoolExecutor() as pool:
            whole = np.array(list(pool.map(self.whole, range(len(self.ids)))))
        if not whole.all():
            raise self.damaged(self.ids[np.flatnonzero(~whole)[0]], "some view")
        self.checked[:] = True
        kind = torch.from_numpy(self.regions[:0].copy()).dtype
        self.resident = torch.empty(self.shape, dtype=kind, device=device)
        for row in range(len(self.ids)):
            self.resident[row] = torch.from_numpy(self.regions[row].copy())

    def require(self, image_ids, dataset):
        """ValueError if the file lacks photos of a data set: it was made for another, or for a part of this one."""
        absent = [image_id for image_id in image_ids if image_id not in self.rows]
        if absent:
            raise ValueError(
                f"{self.path}: no row for {len(absent)} of {dataset}'s {len(image_ids)} photos (first: {absent[0]}); it was"
                f" made for {self.attrs.get('dataset')}. Was the text another, or --limit set? Name {dataset}'s own file, or"
                f" make it: extract_features.py --dataset {dataset}"
            )

    def compare_photos(self, paths):
        """How many of the photos the file was made of are not among `paths`, {image id: path or None}.

        ValueError if all are, but are others, by name and size: of another folder, or replaced since.
        """
        readable = [image_id for image_id, status in zip(self.ids, self.status, strict=True) if status != MISSING]
        absent = sum(paths.get(image_id) is None for image_id in readable)
        if not absent and photos_digest({image_id: paths[image_id] for image_id in readable}) != self.attrs["photos_sha256"]:
            raise ValueError(
                f"{self.path}: made of other photos than those here (names or sizes differ; it was made from"
                f" {self.attrs.get('made_from', 'an unknown folder')}); make it anew with extract_features.py --overwrite, or"
                " name the right one with --features, the right photos with --images"
            )
        return absent

    def read(self, photos, views=None):
        """What a batch holds of its photos, given as image ids or None for no photo; `views`: which to read, default 0.

        regions [B, R, D] in the file's type, region_mask [B, R] (True = real), region_grid [B, 2] (rows, columns).
        """
        rows = np.array([0 if photo is None else self.rows[photo] for photo in photos])  # a row for None, hidden below
        views = np.zeros(len(photos), int) if views is None else np.asarray(views)
        shown = np.array([photo is not None for photo in photos])
        for i in np.flatnonzero(shown & ~self.checked[rows, views]):  # of missing photos too: their status may be damaged
            if not self.whole(rows[i], slice(views[i], views[i] + 1)):
                raise self.damaged(photos[i], f"view {views[i]}")
            self.checked[rows[i], views[i]] = True
        real = shown & (self.status[rows] == OK)
        mask = real[:, None] & (np.arange(self.shape[2]) < self.num_regions[rows, None])
        grid = np.where(real[:, None], self.grid[rows], 0).astype(np.int64)
        about = {"region_mask": torch.from_numpy(mask), "region_grid": torch.from_numpy(grid)}
        if self.resident is None:
            flat = np.asarray(self.regions).reshape(-1, *self.shape[2:])  # [N * V, R, D]: numpy's fastest way to copy rows
            values = flat.take(rows * self.views + views, 0)
            values[~real] = 0
            return {"regions": torch.from_numpy(values)} | about
        places = {"rows": torch.from_numpy(rows), "views": torch.from_numpy(views), "real": torch.from_numpy(real)}
        about, places = (to_device(batch, self.resident.device) for batch in (about, places))
        values = self.resident[places["rows"], places["views"]]
        return {"regions": values.masked_fill(~places["real"][:, None, None], 0)} | about
