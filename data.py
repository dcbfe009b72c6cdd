"""Files of posts -> examples: named entities as Twitter-2015 and Twitter-2017 have them, relations as MNRE.

    posts = read_ner("train.txt", None)     # any entity types; bio_labels(("LOC", "PER")): these alone
    rows = read_mnre("mnre_train.txt", RELATIONS)

Needs Python alone, nothing else of this project: copy the file and use it.
"""

import ast
import json
import re
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

NONE = "None"  # the relation that means "no relation"
RELATIONS = (
    NONE, "/loc/loc/contain", "/misc/loc/held_on", "/misc/misc/part_of", "/org/loc/locate_at",
    "/org/org/alternate_names", "/org/org/subsidiary", "/per/loc/place_of_birth",
    "/per/loc/place_of_residence", "/per/misc/awarded", "/per/misc/nationality", "/per/misc/present_in",
    "/per/misc/race", "/per/misc/religion", "/per/org/member_of", "/per/per/alternate_names",
    "/per/per/alumi", "/per/per/charges", "/per/per/couple", "/per/per/neighbor", "/per/per/parent",
    "/per/per/peer", "/per/per/siblings",
)  # fmt: skip


def bio_labels(types):
    """`O`, then `B-` and `I-` of every entity type."""
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


LARGEST_FILE = 2**29  # bytes
LONGEST_LINE = 10_000_000  # characters; to parse more as a Python literal can take all memory


# ------------------------------------------------------------------------------------------ files -> examples


@dataclass(frozen=True)
class NerExample:
    """A post with one BIO label a word; `id` is unique in its split, `image_id` names its photo or photos."""

    id: str
    image_id: str | tuple[str, ...] | None
    words: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class RelationExample:
    """A post with two marked entities, as word spans [start, end), and the relation from head to tail."""

    id: str
    image_id: str | tuple[str, ...] | None
    words: tuple[str, ...]
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str


def photo_names(image_id):
    """The names of an example's photos, by its `image_id`."""
    if image_id is None:
        return ()
    return image_id if isinstance(image_id, tuple) else (image_id,)


def text_file(path):
    """The Path of a file to read; ValueError for a pipe, which would be waited for, and for a huge file."""
    path = Path(path)
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # of folders the system speaks
        raise ValueError(f"{path}: no regular file; name another")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"{path}: {status.st_size:,} bytes; no file of posts has so many, correct it")
    return path


def read_lines(path):
    """[(line number, line)] of a UTF-8 file; ValueError names a line that is not UTF-8, or too long."""
    raw = text_file(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    # Only \n ends a line: str.splitlines would also break posts at U+0085, U+2028 and the like.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    for number, line in lines:
        if len(line) > LONGEST_LINE:
            message = f"a line of {len(line):,} characters; no post has one so long, correct the file"
            raise ValueError(f"{path}:{number}: {message}")
    return lines


def check_image_id(image_id, where):
    """The id if it can name a file inside the image folder; anything else (a path, a NUL) is refused."""
    if not image_id or image_id in (".", "..") or re.search("[/\\\\\x00-\x1f\ud800-\udfff]", image_id):
        raise ValueError(f"{where}: image id {image_id!r} is not a plain file name; correct it")
    return image_id


# A label of any scheme that is read. A type may hold spaces, where tabs separate.
LABEL = re.compile(r"O|[BIESLUMW]-\S+( \S+)*")


def check_label(label, allowed, where):
    """The label if it is one of `allowed`, one of any type where that is None; else a ValueError."""
    if allowed is None and not LABEL.fullmatch(label):
        raise ValueError(f"{where}: label {label!r:.80} is not O, B-TYPE or I-TYPE; convert the file to BIO")
    if allowed is not None and label not in allowed:
        raise ValueError(f"{where}: unknown label {label!r:.80}; expected one of: {' '.join(allowed)}")
    return label


def goes_on(before, label):
    """Whether a label goes on with the entity of the label before it, in all schemes alike."""
    return before[0] in "BIM" and label[0] in "IELM" and before[2:] == label[2:]


def label_scheme(posts):
    """The scheme of a file's labels, one list a post: BIO, IOB1, BIOES, BILOU, BMES or BMEWO.

    An I that begins an entity speaks for IOB1 only if each B in the file parts two touching entities of one
    type: Twitter-2015 has such I, and is BIO.
    """
    prefixes = {label[0] for labels in posts for label in labels}
    for letters, scheme in (("LU", "BILOU"), ("W", "BMEWO"), ("M", "BMES"), ("ES", "BIOES")):
        if prefixes & set(letters):
            return scheme
    pairs = [pair for labels in posts for pair in pairwise(["O", *labels])]
    begins = any(label[0] == "I" and not goes_on(before, label) for before, label in pairs)
    starts = [pair for pair in pairs if pair[1][0] == "B"]
    parts = all(before[0] in "BI" and before[2:] == label[2:] for before, label in starts)
    return "IOB1" if begins and parts else "BIO"


def check_scheme(path, posts, scheme):
    """ValueError unless entities end as `scheme` has it. `posts`: [(the line of each label, labels)]."""
    if scheme in ("BIO", "IOB1"):
        return
    for numbers, labels in posts:
        for number, (label, after) in zip(numbers, pairwise([*labels, "O"]), strict=True):
            if label[0] not in scheme + "O" or (label[0] in "BIM" and not goes_on(label, after)):
                odd = next(y for _, others in posts for y in others if y[0] in "ESLUMW")
                message = f"{label!r:.80} before {after!r:.80} is not {scheme}, and {odd!r:.80} elsewhere in"
                raise ValueError(f"{path}:{number}: {message} the file is not BIO; convert it to BIO labels")


def to_bio(labels, scheme):
    """BIO labels of the same entities as one post's in `scheme`."""
    if scheme == "BIO":
        return list(labels)
    return [y if y == "O" else ("I" if goes_on(x, y) else "B") + y[1:] for x, y in pairwise(["O", *labels])]


def bio_posts(path, posts):
    """(BIO labels of each post, the scheme of the file, how many change); `posts` as `check_scheme`."""
    scheme = label_scheme([labels for _, labels in posts])
    check_scheme(path, posts, scheme)
    bio = [to_bio(labels, scheme) for _, labels in posts]
    changed = sum(a != b for (_, labels), new in zip(posts, bio) for a, b in zip(labels, new))
    return bio, scheme, changed


def conll_posts(path, lines, spaced):
    """([(line it begins at, its photo's id, rows) of each post], number of -DOCSTART- lines) of CoNLL lines.

    rows: [(line, columns)], with tabs between columns or, if `spaced`, spaces where there is no tab. The id
    is None without an `IMGID:<id>` line. A post ends at the next, at a line of white space or at -DOCSTART-.
    ValueError with file and line for a post without words.
    """
    posts, documents, rows = [], 0, None
    for number, line in [*lines, (len(lines) + 1, "")]:  # the last post may end without a blank line
        tabbed = "\t" in line or not spaced
        fields = line.split("\t") if tabbed else re.split(" +", line.strip(" "))
        fields[1:] = [field.strip(" ") for field in fields[1:]]
        photo = list(fields) if line.startswith("IMGID:") else []
        while photo[1:] and photo[-1].strip() in ("", "O"):  # some files label the photo's line too
            photo.pop()
        # With another label it is a word. An id may hold spaces.
        starts_post = bool(photo) and not any(tabbed or LABEL.fullmatch(field) for field in photo[1:])
        starts_document = re.match(r"-DOCSTART-(\s|$)", line)
        if starts_post or starts_document or not line.strip():
            if rows == []:
                start, name, _ = posts[-1]
                message = f"post {name or 'without photo'} has no words; remove it or give it its words"
                raise ValueError(f"{path}:{start}: {message}")
            rows, documents = None, documents + bool(starts_document)
        else:
            if rows is None:
                rows = []
                posts.append((number, None, rows))
            rows.append((number, fields))
        if starts_post:
            rows = []
            posts.append((number, " ".join(photo)[len("IMGID:") :].strip(" "), rows))
    return posts, documents


def reading_notes(documents, scheme, changed):
    """What to say of a CoNLL file: its -DOCSTART- lines, and its labels in another scheme."""
    notes = [f"{documents} -DOCSTART- lines left out"] if documents else []
    return notes + ([f"{scheme} labels read as BIO, {changed} changed"] if scheme != "BIO" else [])


def read_ner(path, allowed, notes=None):
    """Posts of a Twitter-2015/2017 file: `IMGID:<id>`, `word<TAB>label` lines, then a blank line or the end.

    `allowed`: the labels that may occur. Only the tab separates: a word may be U+00A0 or empty to the eye.
    With None, for files of one's own, any type may, spaces separate where there is no tab, and a post without
    photo may stand after an empty `IMGID:` line or after none. A post whose id has occurred before gets its
    line number into its `id`. In a file without any IMGID line posts have no photo; labels of other schemes
    become BIO; what was read otherwise than it stands there is added to the list `notes`. Raises ValueError
    with file and line.
    """
    lines, notes = read_lines(path), [] if notes is None else notes
    posts, documents = conll_posts(path, lines, allowed is None)
    photoless = all(image_id is None for _, image_id, _ in posts)
    columns = {}  # id: (photo's id, words, labels, lines)
    for start, image_id, rows in posts:
        for number, fields in rows:
            where = f"{path}:{number}"
            if len(fields) != 2:
                count = f"{len(fields)} columns, " if fields[1:] else ""
                message = f"expected word<TAB>label, found {count}{str(fields)[1:-1]:.80}"
                raise ValueError(f"{where}: {message}; keep one word and one label, a tab between them")
            if not LABEL.fullmatch(fields[1]):
                check_label(fields[1], allowed, where)
        if allowed is not None and image_id is None and not photoless:
            message = "a word with no IMGID:<id> before it; each post starts with one"
            raise ValueError(f"{path}:{start}: {message}")
        if image_id or (allowed is not None and image_id is not None):
            check_image_id(image_id, f"{path}:{start}")
        post_id = image_id or f"line {start}"
        while post_id in columns:
            post_id += f"@{start}"
        numbers, pairs = zip(*rows, strict=True)
        columns[post_id] = image_id or None, *zip(*pairs, strict=True), numbers
    labelled = [(numbers, labels) for _, _, labels, numbers in columns.values()]
    (bio, scheme, changed), examples = bio_posts(path, labelled), []
    for (post_id, (image_id, words, _, numbers)), labels in zip(columns.items(), bio, strict=True):
        for number, label in zip(numbers, labels, strict=True):
            check_label(label, allowed, f"{path}:{number}")
        examples.append(NerExample(post_id, image_id, words, tuple(labels)))
    missing = [start for start, image_id, _ in posts if not image_id]
    if photoless and posts:
        notes.append(f"no IMGID line: {len(posts)} posts without photo")
    elif missing:
        notes.append(f"{len(missing)} of {len(posts)} posts name no photo, the first at line {missing[0]}")
    if posts and all(word.isdigit() for example in examples for word in example.words):
        notes.append("every word is a number: is the first column that of the words?")
    notes += reading_notes(documents, scheme, changed)
    return examples


def parse_row(text):
    """The value of one line: JSON, or else a Python literal (parsed as data, never run); else ValueError.

    JSON first: as a Python literal, its "\\/" and "\\ud83d\\ude00" would be other text.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        not_json = error
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if re.match(r'\{\s*"', text) and isinstance(not_json, json.JSONDecodeError):
            raise ValueError(f"not JSON: {not_json.msg} at character {not_json.colno}") from None
        # No address in memory.
        reason = re.sub("( on line 1)?(: <ast| [(]<unknown).*", "", str(error), flags=re.DOTALL)
        raise ValueError(f"{type(error).__name__}: {reason or 'not readable'}") from None


def read_rows(path):
    """(where, number, text or value) of each row of a file of one row a line, or of one JSON array."""
    lines = read_lines(path)
    text = "\n".join(line for _, line in lines)
    if not text.lstrip().startswith("["):
        yield from ((f"{path}:{number}", number, line.strip()) for number, line in lines if line.strip())
        return
    try:
        count = len(json.loads(text))
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", "too deep")
        message = f"not a JSON array of rows ({reason}); correct it, or write a row a line"
        raise ValueError(f"{path}:{line}: {message}") from None
    decoder, before, end, line = json.JSONDecoder(), 0, text.index("[") + 1, 1
    for number in range(1, count + 1):  # once more, for the lines they are on
        start = re.compile(r"[\s,]*").match(text, end).end()
        line, before = line + text.count("\n", before, start), start
        row, end = decoder.raw_decode(text, start)
        yield f"{path}:{line}: row {number}", number, row


def fold(name):
    """A name as it is compared: composed (macOS decomposes), in lower case, without outer space."""
    return unicodedata.normalize("NFC", name).strip().lower()


def relation_name(name, where):
    """The name of a relation, `NONE` for other names of no relation; ValueError if it is none."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: relation {name!r:.80} is no text; correct it")
    if not name.strip() or re.search("[\x00-\x1f\ud800-\udfff]", name):
        raise ValueError(f"{where}: relation {name!r} is no name; correct it")
    return NONE if name.lower() in ("none", "na", "no_relation") else name


def same_text(name, words):
    """Whether an entity's name is its words, spaces and case aside."""
    return fold("".join(str(name).split())) == fold("".join("".join(words).split()))


def none_notes(counts):
    """What to say of names that were read as `NONE`, {name: how often}."""
    return [f"{name!r} read as {NONE!r}, no relation ({n} rows)" for name, n in counts.items() if n]


def read_mnre(path, allowed, notes=None):
    """Rows of an MNRE file: one Python dict literal or JSON object a line, or one JSON array of rows.

    A row's `id` is `<image id>@<line>`: up to 21 rows share a photo. Where head and tail have a name, it must
    be their words. With `allowed` None, for files of one's own, any relation may occur, `NA` and
    `no_relation` become `None`, and rows may be without img_id, which is added to the list `notes`. Raises
    ValueError with file and line.
    """
    examples, notes, renamed = [], [] if notes is None else notes, Counter()
    for where, number, row in read_rows(path):
        try:
            row = parse_row(row) if isinstance(row, str) else row
            words, relation = row["token"], row["relation"]
            image_id = row["img_id"] if allowed is not None else row.get("img_id") or None
            spans = {end: (start, stop) for end in "ht" for start, stop in [row[end]["pos"]]}
            names = {end: row[end].get("name") for end in "ht"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            form = "{'token', 'h': {'pos'}, 't': {'pos'}, 'img_id', 'relation'}, pos = [start, end) in words"
            raise ValueError(f"{where}: not a row {form} ({reason[:120]}); correct it") from None
        if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
            raise ValueError(f"{where}: 'token' must be a list of words")
        # A str to Python, but no text.
        if half := [word for word in words if re.search("[\ud800-\udfff]", word)]:
            raise ValueError(f"{where}: the word {half[0]!r} holds half a character, a surrogate; correct it")
        for end, (start, stop) in spans.items():
            name = names[end]
            if not (type(start) is type(stop) is int and 0 <= start < stop <= len(words)):
                message = f"'{end}' pos is not a span [start, end) of its {len(words)} words"
                raise ValueError(f"{where}: {message}; the end is exclusive")
            if name not in (None, "") and not same_text(name, words[start:stop]):
                span = f"pos [{start}, {stop}] holds {' '.join(words[start:stop])!r}"
                advice = "correct one of them (the end is exclusive)"
                raise ValueError(f"{where}: '{end}' is named {name!r}, but {span}; {advice}")
        if image_id is not None or allowed is not None:
            if not isinstance(image_id, str):
                raise ValueError(f"{where}: 'img_id' must be text")
            check_image_id(image_id, where)
        name = relation_name(relation, where)
        if allowed is not None and relation not in allowed:
            message = "not of MNRE version 2; name a folder of your own for version 1 or your own relations"
            raise ValueError(f"{where}: unknown label {relation!r:.80}, {message} (--dataset path/to/folder)")
        renamed[relation] += name != relation
        row_id = f"{image_id}@{number}" if image_id else f"row {number}"
        examples.append(RelationExample(row_id, image_id, tuple(words), spans["h"], spans["t"], name))
    if blind := sum(example.image_id is None for example in examples):
        notes.append(f"{blind} of {len(examples)} rows name no photo (img_id)")
    notes += none_notes(renamed)
    return examples
