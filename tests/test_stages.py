"""What stands between batch and head: the CRF that a photo biases against enumeration and a plain one."""

import math

import pytest
import torch
from test_crf import enumerated, log_sum
from test_fusion import batch, close, same, spoil, unit

from crf import Crf
from parts.model import Head
from stages import PhotoBias

DV, K = 20, 3


def make(noise=0.3):
    """A PhotoBias in eval mode, with noise on its parameters: a fresh one says nothing."""
    torch.manual_seed(0)
    bias = PhotoBias(DV, K, width=8)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter += noise * torch.randn_like(parameter)
    return bias


def posts(seed=0):
    """(logits, mask, labels) of four posts with holes; the second has no word."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    return torch.randn(4, 4, K, generator=generator), mask, torch.randint(K, (4, 4), generator=generator)


def head(decoder, seed=0):
    torch.manual_seed(seed)
    config = {"dropout": 0.0, "task": "ner", "labels": list(range(K)), "decoder": decoder, "region_dim": DV}
    made = Head(12, config).eval()
    with torch.no_grad():
        for parameter in made.crf.parameters():
            parameter.normal_()
    return made


@torch.no_grad()
def test_a_photo_biases_by_the_mean_of_its_regions():
    bias, (_, _, regions, region_mask) = make(), batch()
    made = bias(regions, region_mask)
    assert made.shape == (4, K, K) and torch.equal(made[3], torch.zeros(K, K))  # no photo
    for i in range(3):
        mean = unit(regions[i, region_mask[i]].mean(0))
        close(made[i].flatten(), bias.transitions.weight @ torch.tanh(bias.image.linear.weight @ mean))
    assert torch.pdist(made[:3].flatten(1)).min() > 0.1
    assert not make(noise=0)(regions, region_mask).any()


@pytest.mark.parametrize("scale", [1, 1e30, math.inf, math.nan])
def test_masked_regions_order_and_scale_change_nothing(scale):
    bias, (_, _, regions, region_mask) = make(), batch()
    expected = bias(regions, region_mask)
    spoilt = spoil(regions, region_mask, scale).requires_grad_()
    made = bias(spoilt, region_mask)
    same(made, expected)
    made.square().sum().backward()
    assert spoilt.grad.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in bias.parameters())
    order = torch.tensor([3, 0, 4, 1, 2])
    close(bias(regions[:, order], region_mask[:, order]), expected)
    for size in (1e-3, 1e3):
        close(bias(size * regions, region_mask), expected, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        made = bias(regions, region_mask)
    assert made.dtype == torch.float32
    close(made, expected, 0.1)


def test_a_fresh_bias_learns_from_the_second_step_on():
    bias, (_, _, regions, region_mask) = make(noise=0), batch()
    logits, mask, labels = posts()
    optimizer = torch.optim.AdamW(bias.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = Crf(K).loss(logits, mask, labels, bias(regions, region_mask)).sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in bias.parameters())
        optimizer.step()
        reached = [bool(parameter.grad.any()) for parameter in bias.parameters()]
        assert reached == [bool(losses), True]
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_chain_with_a_photo_is_that_of_enumeration():
    visual, (logits, mask, labels) = head("visual-crf"), posts()
    _, _, regions, region_mask = batch()
    with torch.no_grad():
        visual.photo_bias.transitions.weight.normal_()
    given = {"regions": regions, "region_mask": region_mask, "labels": labels, "word_starts": mask.long() - 1}
    loss, (best, probability) = visual.loss(logits, given), visual.answer(logits, given)
    bias = visual.photo_bias(regions, region_mask)
    assert bias[:3].abs().max() > 1
    for i, row in enumerate(mask):
        scores = enumerated(visual.crf, logits[i], row, bias[i].detach())
        log_z, gold = log_sum(scores.values()), tuple(labels[i][row].tolist())
        assert loss[i].item() == pytest.approx(log_z - scores[gold], abs=1e-4)
        path = tuple(best[i][row].tolist())
        assert scores[path] == pytest.approx(max(scores.values()), abs=1e-4)
        for word, label in enumerate(path):
            share = sum(math.exp(s - log_z) for y, s in scores.items() if y[word] == label)
            assert probability[i][row][word].item() == pytest.approx(share, abs=1e-4)


def test_untrained_or_without_photo_it_is_the_plain_one():
    plain, visual, (logits, mask, labels) = head("crf"), head("visual-crf"), posts()
    visual.crf.load_state_dict(plain.crf.state_dict())
    _, _, regions, region_mask = batch()
    given = {"regions": regions, "region_mask": region_mask, "labels": labels, "word_starts": mask.long() - 1}
    blind = given | {"regions": math.nan * regions, "region_mask": torch.zeros_like(region_mask)}

    def says(one, shown):
        return one.loss(logits, shown), *one.answer(logits, shown)

    same(says(visual, given), says(plain, given))
    with torch.no_grad():
        visual.photo_bias.transitions.weight.normal_()
    same(says(visual, blind), says(plain, blind))
    trained, before = says(visual, given), says(plain, given)
    same([part[3] for part in trained], [part[3] for part in before])  # the one post without photo
    assert (trained[0] - before[0])[[0, 2]].abs().min() > 1e-2
