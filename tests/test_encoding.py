"""Rows and batches of encoding.py against a second way to make them."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import Slow
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data import RELATIONS, NerExample, RelationExample, bio_labels
from encoding import IGNORE, MARKERS, collate, encode, length_batches, mark_entities, window
from parts.text_encoder import load_tokenizer

LABELS, MEMBER = bio_labels(("LOC", "MISC", "PER")), "/per/org/member_of"


def tokenizer_for(encoder_dir, task):
    """The tokenizer of a run on such a task."""
    tokenizer = load_tokenizer(encoder_dir)
    if task == "relation":
        tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


def byte_level(words):
    """A byte-level BPE tokenizer as RoBERTa's, with few merges."""
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer, special = level, ["<s>", "</s>"]
    options = {"initial_alphabet": level.alphabet(), "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator([" ".join(words)], trainers.BpeTrainer(vocab_size=300, **options))
    ends = list(zip(special, range(2), strict=True))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>")


def spans(length):
    return list(itertools.combinations(range(length + 1), 2))


def relation(words, head, tail):
    return RelationExample("", "", tuple(words), head, tail, MEMBER)


RNG = random.Random(0)
WORDS = [
    "Messi", "TODAYS", "@fan", "#messi", "don't", "😍", "x2", "\u00a0", "\u200b", "\ufe0f", "", "...", "good",
]  # fmt: skip
WORD_LISTS = [RNG.choices(WORDS, k=RNG.randint(1, 12)) for _ in range(60)]
RANDOM_POSTS = [NerExample("", "", tuple(w), tuple(RNG.choices(LABELS, k=len(w)))) for w in WORD_LISTS]
PAIRS = [relation(["Todays", "\u200b", "@fan", "good"], *pair)
         for pair in itertools.product(spans(4), repeat=2)]  # fmt: skip


def test_encode_by_hand(encoder_dir):
    words, labels = ("Messi", "\u200b", "Todays", "good", "day"), ("B-PER", "O", "I-PER", "B-LOC", "O")
    post = NerExample("1", "1", words, labels)
    tokenizer = load_tokenizer(encoder_dir)
    (encoded,), counts = encode(tokenizer, [post], LABELS, 6)
    tokens = tokenizer.convert_ids_to_tokens(encoded.pop("input_ids"))
    assert tokens == ["[CLS]", "messi", "today", "##s", "good", "[SEP]"]
    wanted = {"own": (1, 5), "cut_words": 1, "word_starts": [1, -1, 2, 4, -1]}
    assert encoded == wanted | {"labels": [5, IGNORE, 6, 1, IGNORE]}
    assert counts == {"cut_posts": 1, "cut_words": 1, "words_without_piece": 1}
    with pytest.raises(ValueError, match="--max-len 5 "):
        encode(tokenizer, [post], LABELS, 5)


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE"])
@pytest.mark.parametrize("max_len", [6, 12, 100])
def test_encode_equals_word_by_word(encoder_dir, kind, max_len):
    tokenizer = load_tokenizer(encoder_dir) if kind == "WordPiece" else byte_level(WORDS)
    rows, counts = encode(tokenizer, RANDOM_POSTS, LABELS, max_len)
    expected = {"cut_posts": 0, "cut_words": 0, "words_without_piece": 0}
    for post, encoded in zip(RANDOM_POSTS, rows, strict=True):
        ids, starts, cut = [tokenizer.cls_token_id], [], 0
        for word in post.words:
            pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
            starts.append(len(ids) if pieces and len(ids) < max_len - 1 else -1)
            cut += bool(pieces) and starts[-1] < 0
            expected["words_without_piece"] += not pieces
            ids += pieces
        expected["cut_words"] += cut
        expected["cut_posts"] += cut > 0
        labels = [LABELS.index(y) if s >= 0 else IGNORE for y, s in zip(post.labels, starts, strict=True)]
        ids = ids[: max_len - 1] + [tokenizer.sep_token_id]
        wanted = {"input_ids": ids, "own": (1, len(ids) - 1), "cut_words": cut}
        assert encoded == wanted | {"word_starts": starts, "labels": labels}
    assert counts == expected
    # As the posts are meant to be.
    assert (counts["cut_words"] > 0) == (max_len < 100) and counts["words_without_piece"]


OF_TASKS = [("ner", RANDOM_POSTS, LABELS), ("relation", PAIRS, RELATIONS)]


@pytest.mark.parametrize("task, examples, labels", OF_TASKS)
@pytest.mark.parametrize("max_len", [9, 100])
def test_slow_tokenizer_equals_fast(encoder_dir, task, examples, labels, max_len):
    fast = tokenizer_for(encoder_dir, task)
    assert encode(Slow(fast), examples, labels, max_len) == encode(fast, examples, labels, max_len)


def test_mark_entities():
    for head, tail in itertools.product(spans(5), repeat=2):
        marked, index = mark_entities(relation("abcde", head, tail))
        assert "".join(word for word in marked if word not in MARKERS) == "abcde", (head, tail)
        assert sorted(word for word in marked if word in MARKERS) == sorted(MARKERS), (head, tail)
        assert all(marked[at] == marker for marker, at in index.items()) and set(index) == set(MARKERS)
        for (start, end), first, last in ((head, "[E1]", "[/E1]"), (tail, "[E2]", "[/E2]")):
            inside = [word for word in marked[index[first] : index[last]] if word not in MARKERS]
            assert "".join(inside) == "abcde"[start:end], (head, tail)


def test_words_that_look_like_markers():
    _, index = mark_entities(relation(["[E2]", "[E1]", "x", "y"], (2, 3), (3, 4)))
    assert index == {"[E1]": 2, "[/E1]": 4, "[E2]": 5, "[/E2]": 7}


@pytest.mark.parametrize("max_len", [6, 9, 16, 200])
def test_encode_relations(encoder_dir, max_len):
    tokenizer, cases = tokenizer_for(encoder_dir, "relation"), random.Random(0).choices(spans(20), k=120)
    pairs = zip(cases[::2], cases[1::2], strict=True)
    examples = [relation(["Messi", "todays"] * 10, *pair) for pair in pairs]
    examples.append(relation(["good"] * 60, (58, 60), (0, 1)))
    rows, counts = encode(tokenizer, examples, ("None", MEMBER), max_len)
    for example, encoded in zip(examples, rows, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert len(tokens) <= max_len and (tokens[0], tokens[-1], encoded["labels"]) == ("[CLS]", "[SEP]", 1)
        assert (tokens[encoded["head_index"]], tokens[encoded["tail_index"]]) == ("[E1]", "[E2]")
        for name, end in (("head", "[/E1]"), ("tail", "[/E2]")):  # to its end, or as far as it is visible
            entity = tokens[encoded[f"{name}_index"] : encoded[f"{name}_stop"]]
            assert entity and (entity[-1] == end) == (end in tokens)
        if max_len == 200:
            assert encoded["input_ids"] == tokenizer(" ".join(mark_entities(example)[0]))["input_ids"]
    cut = counts["cut_posts"], counts["cut_words"] > 0
    assert cut == ((0, False) if max_len == 200 else (len(rows), True))


def test_window():
    """Both starts are always kept, both spans wherever there is room for that, and the room is used up."""
    for length, limit in itertools.product(range(1, 9), range(2, 10)):
        ranges = list(itertools.combinations_with_replacement(range(length), 2))
        for one, other in itertools.product(ranges, ranges):
            kept, case = window(length, (one, other), limit), (length, one, other, limit)
            assert kept == sorted(set(kept) & set(range(length))) and {one[0], other[0]} <= set(kept), case
            assert len(kept) == min(length, limit), case
            whole = {*range(one[0], one[1] + 1), *range(other[0], other[1] + 1)}
            if max(one[1], other[1]) - min(one[0], other[0]) < limit:
                assert whole <= set(kept) and kept[-1] - kept[0] == len(kept) - 1, case
            elif all(last - first < limit // 2 for first, last in (one, other)):
                assert whole <= set(kept), case


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_post_is_in_one_batch(seed, size):
    for n in (*range(26), *(50 * size * pools + d for pools in (1, 3) for d in (-1, 0, 1))):
        lengths = np.random.default_rng(n).integers(3, 60, n)
        batches = length_batches(lengths, size, None if seed is None else np.random.default_rng(seed))
        assert sorted(itertools.chain(*batches)) == list(range(n))
        assert len(batches) == math.ceil(n / size) and all(1 <= len(batch) <= size for batch in batches)
        if seed is None:
            assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_batches_are_random_and_pad_little():
    lengths = np.random.default_rng(0).gamma(6, 4, 3000).astype(int) + 5  # sub-tokens: 6 to 70, on average 28

    def efficiency(batches):
        return sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    generator = np.random.default_rng(1)
    one, two = length_batches(lengths, 8, generator), length_batches(lengths, 8, generator)
    assert one == length_batches(lengths, 8, np.random.default_rng(1))
    assert set(map(frozenset, one)).isdisjoint(map(frozenset, two))
    means = [np.mean(lengths[batch]) for batch in one]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # the sorted batches do not follow one another
    assert min(efficiency(one), efficiency(two)) >= 0.90
    assert efficiency(np.arange(3000).reshape(-1, 8)) < 0.75  # unsorted


def test_collate():
    words = [{"input_ids": [2, 7, 8, 3], "own": (1, 3), "word_starts": [1, -1, 2], "labels": [0, IGNORE, 4]},
             {"input_ids": [2, 9, 3], "own": (1, 2), "word_starts": [1], "labels": [1]}]  # fmt: skip
    pairs = [{"input_ids": [2, 3], "own": (1, 1), "head_index": 1, "head_stop": 2, "tail_index": 0,
              "tail_stop": 1, "labels": 5},
             {"input_ids": [2, 0, 0, 3], "own": (0, 4), "head_index": 2, "head_stop": 3, "tail_index": 3,
              "tail_stop": 4, "labels": 0}]  # fmt: skip
    batches = [collate(words, 99), collate(pairs, 99)]
    own = [batch.pop("own_mask").tolist() for batch in batches]
    assert own == [[[False, True, True, False], [False, True, False, False]], [[False] * 4, [True] * 4]]
    assert [{key: value.tolist() for key, value in batch.items()} for batch in batches] == [
        {"input_ids": [[2, 7, 8, 3], [2, 9, 3, 99]], "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
         "word_starts": [[1, -1, 2], [1, -1, -1]], "labels": [[0, IGNORE, 4], [1, IGNORE, IGNORE]]},
        {"input_ids": [[2, 3, 99, 99], [2, 0, 0, 3]], "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
         "head_index": [1, 2], "head_stop": [2, 3], "tail_index": [0, 3], "tail_stop": [1, 4],
         "labels": [5, 0]},
    ]  # fmt: skip
    assert {value.dtype for batch in batches for value in batch.values()} == {torch.int64}
