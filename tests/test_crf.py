"""The CRF against enumeration of all label sequences, and against a softmax where it has learned nothing."""

import itertools
import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crf import NEVER, Crf

K = 3
WAYS = "by_words", "by_pairs"  # which a CPU takes, and a GPU


def random_crf(seed, labels=K, way="by_words"):
    torch.manual_seed(seed)
    crf = Crf(labels)
    crf.by_words = getattr(crf, way)  # what is tested here is on a CPU
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.normal_()
    return crf


def enumerated(crf, logits, mask, bias=None):
    """{label sequence: its score} of one post's words [W, K], added up word by word, holes left out."""
    words = [t for t in range(len(mask)) if mask[t]]
    between = (crf.transitions if bias is None else crf.transitions + bias).tolist()
    start, end, logits, scores = crf.start.tolist(), crf.end.tolist(), logits.tolist(), {}
    for labels in itertools.product(range(len(start)), repeat=len(words)):
        total = start[labels[0]] + end[labels[-1]] if labels else 0.0
        total += sum(logits[t][y] for t, y in zip(words, labels, strict=True))
        scores[labels] = total + sum(between[a][b] for a, b in itertools.pairwise(labels))
    return scores


def log_sum(scores):
    return math.log(math.fsum(math.exp(score) for score in scores))


@st.composite
def posts(draw):
    """(seed, mask [B, W]) with any holes, posts without words among them."""
    width = draw(st.integers(1, 6))
    rows = st.lists(st.booleans(), min_size=width, max_size=width)
    return draw(st.integers(0, 2**31)), torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)))


@settings(max_examples=25, deadline=None)
@given(posts(), st.booleans(), st.sampled_from(WAYS))
def test_partition_loss_path_and_marginals_are_those_of_enumeration(drawn, biased, way):
    seed, mask = drawn
    crf = random_crf(seed, way=way)
    logits, labels = torch.randn(*mask.shape, K), torch.randint(K, mask.shape)
    bias = torch.randn(len(mask), K, K) if biased else None
    # What stands in a hole is nobody's business.
    hidden = logits.masked_fill(~mask[..., None], math.nan).requires_grad_()
    loss = crf.loss(hidden, mask, labels.masked_fill(~mask, -100), bias)
    best, probability = crf.decode(hidden, mask, bias)
    marginals = crf.marginals(hidden, mask, bias)
    torch.testing.assert_close(marginals.sum(-1), mask.float())
    loss.sum().backward()
    gold = F.one_hot(labels, K) * mask[..., None]
    torch.testing.assert_close(hidden.grad, marginals - gold, rtol=1e-4, atol=1e-5)
    learns = crf.start.grad, crf.end.grad, *([crf.transitions.grad] if mask.sum(1).max() > 1 else [])
    assert all(gradient.isfinite().all() and gradient.any() == mask.any() for gradient in learns)
    for i, row in enumerate(mask):
        scores = enumerated(crf, logits[i], row, None if bias is None else bias[i])
        log_z = log_sum(scores.values())
        assert loss[i].item() == pytest.approx(log_z - scores[tuple(labels[i][row].tolist())], abs=1e-4)
        path = tuple(best[i][row].tolist())
        assert scores[path] == pytest.approx(max(scores.values()), abs=1e-4)
        for word, best_label in enumerate(path):
            for label in range(K):
                share = sum(math.exp(s - log_z) for y, s in scores.items() if y[word] == label)
                assert marginals[i][row][word, label].item() == pytest.approx(share, abs=1e-4)
            assert probability[i][row][word] == marginals[i][row][word, best_label]
        assert not best[i][~row].any() and not probability[i][~row].any()


@pytest.mark.parametrize("labels", [K, 103])  # from 101 labels on -100 would be one of them, from the end
def test_a_word_without_a_label_is_a_hole(labels):
    crf, mask = random_crf(1, labels), torch.rand(4, 7) < 0.8
    logits, gold = torch.randn(4, 7, labels), torch.randint(labels, mask.shape)
    known = torch.rand(4, 7) < 0.6
    known[0] = False  # a post without any label
    loss = crf.loss(logits, mask, gold.where(known, -100))
    assert torch.equal(loss, crf.loss(logits, mask & known, gold)) and loss[0] == 0
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        crf.loss(logits, mask, gold.where(known, labels))  # no label at all


def test_a_new_one_is_a_softmax_of_each_word():
    torch.manual_seed(2)
    crf, logits, mask, labels = Crf(5), torch.randn(4, 7, 5), torch.rand(4, 7) < 0.7, torch.randint(5, (4, 7))
    wanted = [F.cross_entropy(x[m], y[m], reduction="sum")
              for x, m, y in zip(logits, mask, labels, strict=True)]  # fmt: skip
    assert torch.allclose(crf.loss(logits, mask, labels), torch.stack(wanted), atol=1e-5)
    best, probability = crf.decode(logits, mask)
    softmax = logits.softmax(-1).max(-1)
    assert torch.equal(best[mask], softmax.indices[mask])
    assert torch.allclose(probability[mask], softmax.values[mask], atol=1e-6)


def test_a_batch_is_its_posts_one_by_one_at_any_padding_and_both_ways_are_one():
    torch.manual_seed(6)
    lengths, mask = (1, 2, 17, 33, 40), torch.zeros(5, 40, dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, :length] = torch.rand(length) < 0.9
    logits, labels, bias = torch.randn(5, 40, 9), torch.randint(9, (5, 40)), torch.randn(5, 9, 9)
    results = []
    for way in WAYS:
        crf, inputs = random_crf(3, 9, way), logits.clone().requires_grad_()
        loss, (best, probability) = crf.loss(inputs, mask, labels, bias), crf.decode(logits, mask, bias)
        loss.sum().backward()
        grads = [inputs.grad, *(parameter.grad for parameter in crf.parameters())]
        results.append([loss, best, probability, *grads])
        for i, length in enumerate(lengths):
            one = slice(i, i + 1)
            alone = logits[one, :length], mask[one, :length]
            assert torch.allclose(crf.loss(*alone, labels[one, :length], bias[one]), loss[i], atol=1e-4)
            path, chances = crf.decode(*alone, bias[one])
            assert torch.equal(path[0], best[i, :length])
            assert torch.allclose(chances[0], probability[i, :length], atol=1e-5)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_equal_scores_give_one_whole_path(way):
    """Only 0 1 0 1 ... and 1 0 1 0 ... are best and equal; a word of one and one of the other are neither."""
    crf = random_crf(0, 2, way)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.zero_()
        crf.transitions.fill_diagonal_(-5)
    best, probability = crf.decode(torch.zeros(1, 9, 2), torch.ones(1, 9, dtype=torch.bool))
    assert (best[0, 1:] != best[0, :-1]).all()
    assert torch.allclose(probability, torch.tensor(0.5), atol=1e-6)


@pytest.mark.parametrize("forbidden", [False, True])  # whoever copies the file may forbid a transition
@pytest.mark.parametrize("way", WAYS)
def test_long_and_extreme_posts_stay_finite(way, forbidden):
    crf = random_crf(4, way=way)
    with torch.no_grad():
        crf.transitions[0, 1] = NEVER if forbidden else 0
    logits = 1e4 * torch.randn(2, 300, K)
    mask, labels = torch.ones(2, 300, dtype=torch.bool), torch.randint(K, (2, 300))
    logits.requires_grad_()
    loss = crf.loss(logits, mask, labels)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss > 0).all() and logits.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in crf.parameters())
    best, probability = crf.decode(logits, mask)
    assert probability.isfinite().all() and forbidden != ((best[:, :-1] == 0) & (best[:, 1:] == 1)).any()


def test_float32_under_autocast_and_no_gradients_needed():
    crf, logits, mask, labels = (random_crf(5), torch.randn(2, 20, K), torch.ones(2, 20, dtype=torch.bool),
                                 torch.randint(K, (2, 20)))  # fmt: skip
    wanted, path = crf.loss(logits, mask, labels), crf.decode(logits, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crf.loss(logits, mask, labels), wanted)
    with torch.inference_mode():
        for a, b in zip(crf.decode(logits.clone(), mask.clone()), path, strict=True):
            assert torch.equal(a, b)


def test_many_labels_take_no_longer_than_a_small_encoder():
    """51 types: word by word a step takes some 10 ms on one core; by pairs it took 5 s and 2.7 GB."""
    crf, logits = random_crf(8, 103), torch.randn(8, 40, 103, requires_grad=True)
    mask, labels = torch.ones(8, 40, dtype=torch.bool), torch.zeros(8, 40, dtype=torch.long)
    before = time.process_time()
    crf.loss(logits, mask, labels).sum().backward()
    crf.decode(logits, mask)
    assert time.process_time() - before < 1.5


def test_in_pairs_steps_grow_with_the_logarithm_of_the_longest_post():
    """A GPU waits for kernels: a post of 64 words has at most twice those of 8, whatever the batch."""

    def kernels(posts, words):
        crf, logits = random_crf(9, way="by_pairs"), torch.randn(posts, words, K, requires_grad=True)
        mask, labels = torch.ones(posts, words, dtype=torch.bool), torch.zeros(posts, words, dtype=torch.long)
        with torch.profiler.profile() as seen:
            crf.loss(logits, mask, labels).sum().backward()
        return sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))

    assert kernels(2, 8) == kernels(16, 8)
    assert kernels(2, 64) < 2 * kernels(2, 8)
