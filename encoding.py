"""Examples -> tokenised rows -> batches, for any tokenizer of transformers.

    rows, counts = encode(tokenizer, examples, labels, max_len=128)
    batch = collate(rows[:8], tokenizer.pad_token_id)
    # input_ids, attention_mask [B, T], word_starts, labels [B, W]

Needs torch and numpy only, and nothing else of this project: copy the file and use it.
"""

import numpy as np
import torch

MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")  # around head and tail of a relation
IGNORE = -100  # label of what the loss leaves out: padding and words that have no sub-token

# Words that tell whether a tokenizer gives a list of words the pieces that they have in a sentence.
PROBE = (
    "Kevin DURANT 's 30pts @ Oracle 😍 #WarriorsWin2016 , don't café ... they’re 2-0 ( x2 )"
    " http://t.co/Ab1 GO!!"
).split()


def word_pieces(tokenizer, sentences):
    """[(ids, word of each id)] of word lists, each word tokenised as if it stood alone."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            sentences, is_split_into_words=True, add_special_tokens=False, truncation=False,
            split_special_tokens=True,
        )  # fmt: skip
        return [(encoded["input_ids"][i], encoded.word_ids(i)) for i in range(len(sentences))]
    rows = []
    for words in sentences:
        pieces = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in words]
        rows.append(([i for ids in pieces for i in ids], [w for w, ids in enumerate(pieces) for _ in ids]))
    return rows


def sentence_pieces(tokenizer, words, before=""):
    """(ids, word of each id) of words joined by spaces, after `before`, each piece mapped by its place.

    One that begins with the space belongs to the word after it.
    """
    text = before + " ".join(words)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True,
            split_special_tokens=True,
        )  # fmt: skip
        # Each character's word, a space being of the word after it; one more, for a piece of no length.
        owner = [w for w, word in enumerate(words) for _ in f" {word}"][1 - len(before) :] + [len(words) - 1]
        return encoded["input_ids"], [owner[start] for start, _ in encoded["offset_mapping"]]
    # No offsets: a word ends where the pieces of the sentence up to it do.
    texts = (before + " ".join(words[:end]) for end in range(1, len(words) + 1))
    ends = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, np.searchsorted(ends, np.arange(len(ids)), side="right").tolist()


def takes_words(tokenizer):
    """Whether words one by one have the pieces of the sentence; others (ModernBERT's, Qwen's) lose spaces."""
    sentence = tokenizer(" ".join(PROBE), add_special_tokens=False)["input_ids"]
    return word_pieces(tokenizer, [PROBE])[0][0] == sentence


def control_ids(tokenizer):
    """The ids that no text stands for, such as those of [SEP] and </s>."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def split_pieces(tokenizer, sentences, marks=None):
    """[(ids, word of each id)] of word lists, as in a sentence, without the tokenizer's special tokens.

    The ids are those of the words joined by spaces. `marks`: for each sentence {place: id} of its words that
    are none but one id each. Any other word is text, one that spells "</s>" too: where the tokenizer knows no
    better (SentencePiece's kind, slow ones) its characters are read one by one.
    """
    marks = [{}] * len(sentences) if marks is None else marks
    if takes_words(tokenizer):
        rows = word_pieces(tokenizer, sentences)
    else:
        rows = []
        for words, mark in zip(sentences, marks, strict=True):
            ids, word_of, start = [], [], 0
            for end in (*sorted(mark), len(words)):
                if start < end:
                    piece_ids, owners = sentence_pieces(tokenizer, words[start:end], " " if start else "")
                    ids, word_of = ids + piece_ids, word_of + [start + word for word in owners]
                start = end + 1
            rows.append((ids, word_of))
    control = control_ids(tokenizer)
    return [
        row if not mark and control.isdisjoint(row[0]) else respell(tokenizer, words, *row, mark, control)
        for words, row, mark in zip(sentences, rows, marks, strict=True)
    ]


def respell(tokenizer, words, ids, word_of, mark, control):
    """A row of `split_pieces` with the ids of `mark`, and the characters of words that have `control` ids."""
    pieces = [[] for _ in words]
    for piece, word in zip(ids, word_of, strict=True):
        pieces[word].append(piece)
    for place, word in enumerate(words):
        if place in mark:
            pieces[place] = [mark[place]]
        elif not control.isdisjoint(pieces[place]):
            pieces[place] = word_pieces(tokenizer, [[*word]])[0][0]
    return [i for own in pieces for i in own], [word for word, own in enumerate(pieces) for _ in own]


def text_pieces(tokenizer, text):
    """The ids of a running text, without special tokens, whatever it spells."""
    more = {"split_special_tokens": True} if getattr(tokenizer, "is_fast", False) else {}
    ids = tokenizer(text, add_special_tokens=False, **more)["input_ids"]
    return ids if control_ids(tokenizer).isdisjoint(ids) else split_pieces(tokenizer, [text.split()])[0][0]


def special_ends(tokenizer):
    """The ids the tokenizer puts before and after a sentence, such as ([CLS], [SEP]); empty lists if none."""
    bare, full = (tokenizer("a", add_special_tokens=on)["input_ids"] for on in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if start is None:
        raise ValueError("the tokenizer's special tokens change the pieces of a sentence")
    return full[:start], full[start + len(bare) :]


def mark_entities(example):
    """(words with the four `MARKERS` around head and tail, {marker: its index}). Spans may overlap."""
    (head, head_end), (tail, tail_end) = example.head, example.tail
    # Closing markers first, so that neighbours do not nest.
    places = ((head_end, "[/E1]"), (tail_end, "[/E2]"), (head, "[E1]"), (tail, "[E2]"))
    words, index = [], {}
    for position in range(len(example.words) + 1):
        for place, marker in places:
            if place == position:
                index[marker] = len(words)
                words.append(marker)
        words += example.words[position : position + 1]
    return words, index


def window(length, spans, limit):
    """Which of `length` pieces to keep, at most `limit`, around two `spans` (first, last piece).

    One run around both where that fits; else half of the room from the start of each on, so that both starts
    are kept, and both spans whole unless one is longer than that.
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
    """Tokenise examples once: (a row for each, counts over all of what the model will not see).

    A row is a dict:
        input_ids                the post's sub-tokens and the tokenizer's special ones, at most `max_len`
        own                      [start, end) of the post's own among them
        word_starts, labels      named entities: each word's first sub-token, -1 for a word that has none or
                                 was cut off; its label's number, IGNORE there
        head_index, tail_index   relations: the start markers,
        head_stop, tail_stop     one past the last visible sub-token of each entity, its end marker included,
        labels                   and the number of the label
        cut_words                words that `max_len` cuts off; a relation keeps a `window` of both entities
    Counts: `cut_posts`, `cut_words`, `words_without_piece`.
    """
    prefix, suffix = special_ends(tokenizer)
    room = max_len - len(prefix) - len(suffix)
    if room < 4:
        raise ValueError(f"--max-len {max_len} leaves {room} sub-tokens for the text; use 16 or more")
    label_id = {label: i for i, label in enumerate(labels)}
    relations = hasattr(examples[0], "head")
    sentences = [mark_entities(example) if relations else (list(example.words), {}) for example in examples]
    marker_id = dict(zip(MARKERS, tokenizer.convert_tokens_to_ids(list(MARKERS)), strict=True))
    marks = [{place: marker_id[name] for name, place in marker.items()} for _, marker in sentences]
    pieces = split_pieces(tokenizer, [words for words, _ in sentences], marks)
    rows, counts = [], {"cut_posts": 0, "cut_words": 0, "words_without_piece": 0}
    for example, (words, marker), (ids, word_of) in zip(examples, sentences, pieces, strict=True):
        first_piece = {}
        for piece, word in enumerate(word_of):
            first_piece.setdefault(word, piece)
        if relations:
            pairs = ("[E1]", "[/E1]"), ("[E2]", "[/E2]")
            spans = [tuple(first_piece[marker[m]] for m in pair) for pair in pairs]
            visible = window(len(ids), spans, room)
        else:
            visible = range(min(len(ids), room))
        place = {piece: len(prefix) + i for i, piece in enumerate(visible)}
        starts = [place.get(first_piece.get(word), -1) for word in range(len(words))]
        rest = [word for word in first_piece if starts[word] < 0 and word not in marker.values()]
        counts["cut_words"] += len(rest)
        counts["cut_posts"] += bool(rest)
        counts["words_without_piece"] += len(words) - len(first_piece)
        row = {"input_ids": prefix + [ids[i] for i in visible] + suffix}
        row |= {"own": (len(prefix), len(prefix) + len(visible)), "cut_words": len(rest)}
        if relations:
            for name, (first, last) in zip(("head", "tail"), spans, strict=True):
                shown = [place[piece] for piece in range(first, last + 1) if piece in place]
                row |= {f"{name}_index": shown[0], f"{name}_stop": shown[-1] + 1}
            row["labels"] = label_id[example.label]
        else:
            row["word_starts"] = starts
            labelled = zip(example.labels, starts, strict=True)
            row["labels"] = [label_id[label] if start >= 0 else IGNORE for label, start in labelled]
        rows.append(row)
    return rows, counts


def length_batches(lengths, batch_size, rng=None):
    """Lists of indices, at most `batch_size` each, of posts of similar length; each post once.

    With a numpy Generator the order is random: posts are shuffled, sorted by length within pools of 50
    batches, and the batches shuffled. Without, longest first, so that running out of memory shows at once.
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


def collate(rows, pad_id):
    """A batch of CPU tensors, padded to its longest post, from rows of `encode`.

    input_ids, attention_mask, own_mask [B, T] (True = `own`); word_starts, labels [B, W] or head_index,
    head_stop, tail_index, tail_stop, labels [B]. Where a row has a second segment, and so a `text_length`,
    also text_mask [B, T], True = before that segment; where one has a `relevance`, that of its photo, 0 to 1,
    also relevance [B], float32, -1 = none is given.
    """

    def pad(key, value):
        width = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {"input_ids": pad("input_ids", pad_id)}
    place = torch.arange(batch["input_ids"].shape[1])
    batch["attention_mask"] = (place < lengths[:, None]).long()
    start, stop = torch.tensor([row["own"] for row in rows]).T[..., None]
    batch["own_mask"] = (place >= start) & (place < stop)
    if any("text_length" in row for row in rows):
        texts = torch.tensor([row.get("text_length", len(row["input_ids"])) for row in rows])
        batch["text_mask"] = place < texts[:, None]
    if any("relevance" in row for row in rows):
        batch["relevance"] = torch.tensor([float(row.get("relevance", -1)) for row in rows])
    if "word_starts" in rows[0]:
        batch |= {"word_starts": pad("word_starts", -1), "labels": pad("labels", IGNORE)}
    else:
        keys = "head_index", "head_stop", "tail_index", "tail_stop", "labels"
        batch |= {key: torch.tensor([row[key] for row in rows]) for key in keys}
    return batch


def to_device(batch, device):
    """Copy a batch, to CUDA without making the host wait; regions are still float16: half the bytes."""
    cuda = torch.device(device).type == "cuda"
    if cuda:  # from memory that is not pinned, the copy would wait
        batch = {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}
    # Elsewhere it waits: on mps a source may be freed before it is read (pytorch's issue 139550).
    return {key: value.to(device, non_blocking=cuda) for key, value in batch.items()}
