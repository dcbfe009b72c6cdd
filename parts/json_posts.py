"""Posts of one's own as JSON: an object a line, or one array; as people, hubs and predict.py write it.

Named entities (docs/DATA.md shows each form):
    {"text": "Ann in Rome", "image": "1.jpg", "entities": [{"start": 0, "end": 3, "label": "PER"}]}
    {"text": "Ann in Rome", "label": [[0, 3, "PER"]]}
    {"tokens": ["Ann", "in", "Rome"], "ner_tags": [1, 0, 2], "names": ["O", "B-PER", "B-LOC"]}
Relations, one a row, or as many as a row has between its entities:
    {"text": "Ann in Rome", "head": [0, 3], "tail": [7, 11], "relation": "lives_in"}
    {"text": ..., "entities": [{"id": 7, ...}, ...], "relations": [{"from_id": 7, "to_id": 8, "type": ...}]}
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from data import NerExample, RelationExample, bio_posts, check_image_id, check_label, none_notes, parse_row
from data import photo_names, read_rows, reading_notes, relation_name, same_text
from parts.files import is_span
from parts.words import RULES, cut_words

# The keys that are read; of several the first.
WORDS = ("words", "tokens", "token")
LABELS = ("labels", "ner_tags", "tags", "label")  # one a word; of a text, doccano's [start, end, label]
IMAGES = ("image", "images", "img_id", "image_id")


def first_of(row, keys):
    """The first value of a row under one of `keys`; null, and NaN as pandas writes it, are no value."""
    values = (row.get(key) for key in keys)
    return next((value for value in values if value is not None and value == value), None)  # NaN != NaN


def words_of(row):
    """The words of a row, None if it came as text, whose characters its spans then count."""
    words = first_of(row, WORDS)
    return row["text"] if words is None and isinstance(row.get("text"), list) else words  # MNER-MI's `text`


@dataclass
class Post:
    """A row of a file: where it stands, what it holds, its words, and their places where it came as text."""

    where: str
    number: int
    row: dict
    words: list
    offsets: list | None = None  # [(start, end)] of each word in the row's text

    @property
    def is_text(self):
        return words_of(self.row) is None

    def cut(self, rule):
        """The post with its text cut into words; itself if it came as words."""
        if not self.is_text:
            return self
        text, offsets = self.row["text"], cut_words(self.row["text"], rule)
        return replace(self, words=[text[start:end] for start, end in offsets], offsets=offsets)

    def refuse(self, message):
        """The error that something in the row is wrong."""
        return ValueError(f"{self.where}: {message}")

    def word_span(self, span):
        """A span [start, end) of words, from one of characters where the post came as text."""
        size, unit = (len(self.row["text"]), "characters") if self.is_text else (len(self.words), "words")
        if not (is_span(span) and span[1] <= size):
            raise self.refuse(f"{span!r:.40} is not a span [start, end) of its {size} {unit}; correct it")
        if not self.is_text:
            return tuple(span)
        start, end = span
        shown = f"the span [{start}, {end}), {self.row['text'][start:end]!r:.60},"
        if word := crossed(self.offsets, span):
            word = self.row["text"][slice(*word)]
            raise self.refuse(f"{shown} ends inside the word {word!r:.60}; correct it or see --word-rule")
        inside = [i for i, (a, b) in enumerate(self.offsets) if start <= a and b <= end]
        if not inside:
            raise self.refuse(f"{shown} holds no word; correct it")
        return inside[0], inside[-1] + 1

    def held(self, span):
        """What stands in a span, as text."""
        return self.row["text"][slice(*span)] if self.is_text else " ".join(self.words[slice(*span)])

    def id(self, image):
        """The post's own id, else its photo's, else where it stands."""
        own = first_of(self.row, ("id",))
        if own is not None:
            return str(own)
        return " ".join(photo_names(image)) or f"row {self.number}"


def crossed(offsets, span):
    """The word, [start, end), that a span begins or ends inside of, or None."""
    return next((word for word in offsets for edge in span if word[0] < edge < word[1]), None)


def json_posts(path):
    """(the `Post`s of a file, texts not yet cut; what to say of it); ValueError with file and line.

    Rows in which predict.py wrote an error in place of an answer are left out.
    """
    posts, unanswered = [], 0
    for where, number, row in read_rows(path):
        try:
            row = parse_row(row) if isinstance(row, str) else row
        except ValueError as error:
            raise ValueError(f"{where}: {error}; a post is one JSON object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object; a post is one a line")
        if "error" in row and not row.keys() & {"entities", "relation", *LABELS}:
            unanswered += 1
            continue
        post = Post(where, number, row, words_of(row) or [])
        if not (isinstance(post.words, list) and all(isinstance(word, str) for word in post.words)):
            raise post.refuse("its words are no list of text; correct it")
        text = row.get("text")
        if not post.words and not (isinstance(text, str) and text.strip()):
            raise post.refuse(f"no 'text' and no 'words' in it, but {str([*row])[1:-1]:.80}; give it one")
        # A str to Python, but no text.
        if bad := next((part for part in post.words or [text] if re.search("[\ud800-\udfff]", part)), None):
            raise post.refuse(f"{bad!r:.80} holds half a character, a surrogate; correct it")
        posts.append(post)
    return posts, [f"{unanswered} rows left out, which have an error for an answer"] if unanswered else []


# ----------------------------------------------------------------------------------- entities and relations


def entity_spans(post):
    """[([start, end], type, its text or None)] of a post's entities; ValueError if it has no list of them."""
    entities = first_of(post.row, ("entities", *LABELS))
    if not isinstance(entities, list):
        raise post.refuse("no 'entities' and no labels in it; an empty list says that there are none")
    spans = []
    for entity in entities:
        if isinstance(entity, list) and len(entity) == 3:
            entity = dict(zip(("start", "end", "label"), entity, strict=True))
        if not isinstance(entity, dict):
            raise post.refuse(f"{entity!r:.80} is no entity with start, end and label; correct it")
        kind = first_of(entity, ("label", "type"))
        if not isinstance(kind, str):
            raise post.refuse(f"the label of an entity is {kind!r:.60}, no text; correct it")
        check_label(f"B-{kind}", None, post.where)
        spans.append((span_of(post, entity), kind, entity.get("text")))
    return spans


def span_of(post, entity):
    """The span of an entity, a dict: `start` and `end`, doccano's offsets, or the lists of predict.py."""
    if span := entity.get("chars" if post.is_text else "words"):
        return span
    return [first_of(entity, (key, f"{key}_offset")) for key in ("start", "end")]


def relation_spans(post):
    """[(head's [start, end], tail's, the relation)] of a post."""
    row = post.row
    if not row.keys() & {"head", "tail", "relations"}:
        raise post.refuse(f"no 'head' and 'tail' in it, but {str([*row])[1:-1]:.80}; give it both")
    if "relations" not in row:
        ends = [row.get("head"), row.get("tail")]
        ends = [span_of(post, end) if isinstance(end, dict) else end for end in ends]
        return [(*ends, row.get("relation"))]
    entities = [entity for entity in row.get("entities") or () if isinstance(entity, dict)]
    places = {str(entity.get("id")): span_of(post, entity) for entity in entities}
    pairs = []
    for relation in row["relations"] or ():
        relation = relation if isinstance(relation, dict) else {}
        ends = [str(relation.get(key)) for key in ("from_id", "to_id")]
        if not places.keys() >= {*ends}:
            raise post.refuse(f"a relation from {ends[0]} to {ends[1]}: no ids of its entities; correct it")
        pairs.append((*(places[end] for end in ends), first_of(relation, ("type", "label"))))
    return pairs


def text_rule(posts, task, name="auto"):
    """(rule that cuts the texts of posts, what to say of it); (None, None) if none came as text.

    `name`: the rule asked for, or "auto": the one inside whose words the spans of the fewest posts end. None
    ends inside a word of `characters`: that rule is taken where each of the others fits under nine tenths.
    """
    cases = []
    for post in posts:
        if post.is_text:
            values = relation_spans(post) if task == "relation" else entity_spans(post)
            spans = [value for one in values for value in one if is_span(value)]
            cases.append((post.row["text"], spans))
    if not cases:
        return None, None
    shares = {}
    for rule in RULES if name == "auto" else (name,):
        words = (cut_words(text, rule) for text, _ in cases)
        pairs = zip(words, cases, strict=True)
        fits = (not any(crossed(cut, span) for span in spans) for cut, (_, spans) in pairs)
        shares[rule] = sum(fits) / len(cases)
    rule = max((rule for rule in shares if rule != "characters"), key=shares.get, default=name)
    if name == "auto" and shares[rule] < 0.9:
        rule = "characters"
    share = f"{shares[rule]:.0%} of train's posts"
    return rule, f"texts are cut by the rule {rule}; in {share} no span ends inside a word"


# -------------------------------------------------------------------------------------------------- examples


@dataclass
class Reader:
    """Posts -> examples. One reader reads all splits, so that one name is one photo in all of them.

    `rule`: of parts/words.py, cuts texts; `names`: of labels that are numbers, where a row has no `names`.
    """

    rule: str | None
    names: list = field(default_factory=list)
    photos: dict = field(default_factory=dict)  # {name: the path that it was read from}

    def read(self, path, task, posts):
        """(examples, notes) of the `json_posts` of a file; ValueError with file and line."""
        read = self.relations if task == "relation" else self.entities
        examples, notes = read(path, [post.cut(self.rule) for post in posts])
        if count := sum(example.image_id is None for example in examples):
            notes.append(f"{count} of {len(examples)} posts name no photo")
        ids = set()
        for i, example in enumerate(examples):
            post_id = example.id
            while post_id in ids:
                post_id += f"@{i + 1}"
            ids.add(post_id)
            examples[i] = replace(example, id=post_id)
        return examples, notes

    def photo(self, post):
        """The name of a post's photo, a tuple of the names of several, or None."""
        images, names = first_of(post.row, IMAGES), []
        for path in images if isinstance(images, list) else [images or None]:
            if path is None:
                continue
            path = path.get("path") if isinstance(path, dict) else path  # as `datasets` writes an image
            if not isinstance(path, str):
                raise post.refuse("an image without a file's name; save it as a file, and name that")
            name = check_image_id(re.split(r"[/\\]", path)[-1], post.where)
            if self.photos.setdefault(name, path) != path:
                other = self.photos[name]
                raise post.refuse(f"{path!r:.80} and {other!r:.80} have one name; rename one of the photos")
            names.append(name)
        names = tuple(dict.fromkeys(names))
        return names if len(names) > 1 else next(iter(names), None)

    def entities(self, path, posts):
        """(examples, notes) of posts with named entities."""
        columns = []  # a post's lines and labels, as `bio_posts` takes them
        for post in posts:
            of_words = not post.is_text and first_of(post.row, LABELS) is not None
            labels = self.labels_of_words(post) if of_words else labels_of_spans(post)
            columns.append(([post.number] * len(labels), labels))
        (bio, scheme, changed), examples = bio_posts(path, columns), []
        for post, labels in zip(posts, bio, strict=True):
            image = self.photo(post)
            examples.append(NerExample(post.id(image), image, tuple(post.words), tuple(labels)))
        return examples, reading_notes(0, scheme, changed)

    def labels_of_words(self, post):
        """The labels of a post that has one a word; numbers are places in its `names`, or the reader's."""
        labels, names = first_of(post.row, LABELS), post.row.get("names") or self.names
        if not isinstance(labels, list) or len(labels) != len(post.words):
            count = len(labels) if isinstance(labels, list) else "no list of"
            raise post.refuse(f"{count} labels for {len(post.words)} words; give each word one")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise post.refuse("'names' is no list of text; correct it")
        if all(type(label) is int for label in labels):
            if not names:
                raise post.refuse(f"labels are numbers ({labels[0]}); give their names in order: in names.txt"
                                  " beside the file, one a line, or under the key 'names'")  # fmt: skip
            low, high = min(labels), max(labels)
            if not 0 <= low <= high < len(names):
                raise post.refuse(f"labels from {low} to {high}, but {len(names)} names; correct it")
            labels = [names[label] for label in labels]
        if bad := [label for label in labels if not isinstance(label, str)]:
            raise post.refuse(f"label {bad[0]!r:.80} is neither text nor a number; correct it")
        return [check_label(label, None, post.where) for label in labels]

    def relations(self, path, posts):
        """(examples, notes) of posts with a relation from head to tail, or with any number of them."""
        examples, names, empty = [], Counter(), 0
        for post in posts:
            image, pairs = self.photo(post), relation_spans(post)
            empty += not pairs
            for number, (head, tail, relation) in enumerate(pairs, 1):
                post_id = f"{post.id(image)}.{number}" if len(pairs) > 1 else post.id(image)
                spans, name = map(post.word_span, (head, tail)), relation_name(relation, post.where)
                names[relation] += name != relation
                examples.append(RelationExample(post_id, image, tuple(post.words), *spans, name))
        notes = none_notes(names)
        return examples, notes + ([f"{empty} posts left out, which hold no relation"] if empty else [])


def labels_of_spans(post):
    """The BIO labels of a post's words from its entities; ValueError for two that share a word."""
    labels, taken = ["O"] * len(post.words), {}
    for span, kind, text in entity_spans(post):
        start, end = post.word_span(span)
        if text is not None and not same_text(text, post.held(span)):
            message = f"an entity is named {text!r:.60}, but {span} holds {post.held(span)!r:.60}"
            raise post.refuse(f"{message}; correct one of them")
        if other := taken.keys() & {*range(start, end)}:
            raise post.refuse(f"entities {taken[min(other)]} and {span} share a word; keep one of them")
        taken |= dict.fromkeys(range(start, end), span)
        labels[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return labels
