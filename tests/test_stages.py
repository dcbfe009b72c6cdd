"""Parts between batch and head: against plain loops, torch.distributions, enumeration; what changes none."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from test_crf import enumerated, log_sum
from test_fusion import DV, GARBAGE, HEADED, HEADS, D, close, multi_head_reference, same, spoil, unit
from torch.distributions import Normal, kl_divergence

from crf import Crf
from fusion import FUSIONS
from parts.model import Head
from stages import Bottleneck, Code, PhotoBias, Prefix, Relevance, Standardise

K = 3
ORDER = torch.tensor([3, 0, 4, 1, 2])
KINDS = {
    "relevance": (Relevance, D, DV), "prefix": (Prefix, D, DV, HEADS), "bias": (PhotoBias, DV, K, 8),
    "bottleneck": (Bottleneck, D, DV, HEADS, 0.1), "no dropout": (Bottleneck, D, DV, HEADS, 0.0),
    "code": (Code, D, HEADS, 0.0),
}  # fmt: skip


def make(kind, noise=0.3):
    """One of `KINDS` in eval mode, with noise on its parameters: a fresh one may say nothing."""
    torch.manual_seed(0)
    kind, *sizes = KINDS[kind]
    part = kind(*sizes).eval()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += noise * torch.randn_like(parameter)
    return part


def batch(seed=1):
    """(text, mask, own mask, regions, region mask) of five ragged posts.

    The first token and, of the third, the last two are not its own; the fourth has no photo, the last no
    token of its own. The first has a masked region between real ones.
    """
    generator = torch.Generator().manual_seed(seed)
    text, regions = torch.randn(5, 6, D, generator=generator), torch.randn(5, 5, DV, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 4, 1])[:, None]
    own = mask & (torch.arange(6) > 0)
    own[2, 3:] = False
    region_mask = torch.arange(5) < torch.tensor([5, 1, 4, 0, 2])[:, None]
    region_mask[0, 1] = False
    return text, mask, own, regions, region_mask


def answers(kind, part, text, mask, own, regions, region_mask):
    """What a part says of a batch, as a list; a bottleneck reads a second picture, with fewer regions."""
    if kind == "relevance":
        return [part(text, own, regions, region_mask)]
    if kind == "bias":
        return [part(regions, region_mask)]
    if kind == "prefix":
        return [part(text, mask, own, regions, region_mask)[0]]
    codes, pictures, kl = part(text, mask, (regions, region_mask), (regions[:, :3], region_mask[:, :3]))
    return [codes[mask], kl, *pictures]


every_kind = pytest.mark.parametrize("kind", ["relevance", "prefix", "bias", "bottleneck"])


@every_kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", GARBAGE)
def test_what_is_masked_changes_nothing_and_all_else_learns(kind, scale, training):
    part, (text, mask, own, regions, region_mask) = make(kind).train(training), batch()
    real = own if kind == "relevance" else mask

    def run(text, regions):
        torch.manual_seed(5)
        text, regions = text.clone().requires_grad_(), regions.clone().requires_grad_()
        values = answers(kind, part, text, mask, own, regions, region_mask)
        total = sum((value * value.detach().sin()).sum() for value in values)
        inputs = [text, regions, *part.parameters()]
        return values, torch.autograd.grad(total, inputs, materialize_grads=True)

    values, (of_text, of_regions, *of_parameters) = expected = run(text, regions)
    same(run(spoil(text, real, scale), spoil(regions, region_mask, scale)), expected)
    assert all(tensor.isfinite().all() for tensor in (*values, of_text, of_regions, *of_parameters))
    assert all(gradient.any() for gradient in of_parameters)
    assert not of_text[~real].any() and not of_regions[~region_mask].any()
    assert kind == "bias" or of_text[real].any(1).all()
    reached = region_mask & own.any(1, keepdim=True) if kind == "prefix" else region_mask
    assert of_regions[reached].any(1).all()


@every_kind
def test_scale_and_order_of_regions_change_nothing(kind):
    part, (text, mask, own, regions, region_mask) = make(kind), batch()
    expected = answers(kind, part, text, mask, own, regions, region_mask)
    for size in (1e-3, 1e3):
        close(answers(kind, part, text, mask, own, size * regions, region_mask), expected, 1e-4)
    turned = regions[:, ORDER], region_mask[:, ORDER]
    if kind == "bottleneck":
        _, (states,), kl = part(text, mask, turned)
        close(states, expected[2][:, ORDER])
        close(kl, part(text, mask, (regions, region_mask))[2])
    else:
        close(answers(kind, part, text, mask, own, *turned), expected)


@pytest.mark.parametrize("kind", [Prefix, Bottleneck, *map(FUSIONS.get, HEADED)])
def test_heads_have_to_divide_the_states(kind):
    with pytest.raises(ValueError, match="7 heads do not divide token states of width 24"):
        kind(D, DV, heads=7)


# -------------------------------------------------------------------------------------------------- relevance


def test_relevance_is_its_formula_and_knows_no_autocast():
    part, (text, _, own, regions, region_mask) = make("relevance"), batch()
    logits = part(text, own, regions, region_mask)
    for i in (0, 1, 2):
        t = sum(text[i][own[i]]) / own[i].sum()
        v = part.image.linear.weight @ unit(sum(unit(region) for region in regions[i][region_mask[i]]))
        hidden = part.score[0](torch.cat((t, v, t * v)))
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        close(logits[i], part.score[2](gelu)[0])
    assert logits.shape == (5,) and logits.unique().numel() == 5 and logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part(text, own, regions, region_mask), logits)


def test_the_loss_is_of_posts_with_a_photo_and_a_given_relevance():
    logits = torch.zeros(4, requires_grad=True)
    photo = torch.tensor([True, False, True, True])[:, None]
    losses = Relevance.loss(logits, torch.tensor([1.0, 1.0, -1.0, 0.0]), photo)
    close(losses, math.log(2) * torch.tensor([1.0, 0, 0, 1]))
    losses.sum().backward()
    assert logits.grad.tolist() == [-0.5, 0, 0, 0.5]


def test_relevance_learns_which_photos_belong_to_their_posts():
    """One word of a post names one of 8 things, its photo shows it or, in half of the posts, any."""
    torch.manual_seed(0)
    part, words, shapes, right = Relevance(64, 128), 2 * torch.randn(8, 64), torch.randn(8, 128), []
    optimizer = torch.optim.AdamW(part.parameters(), lr=1.1e-3, weight_decay=0.01)  # as train.py
    own, region_mask = torch.ones(32, 6, dtype=torch.bool), torch.ones(32, 9, dtype=torch.bool)
    for _ in range(200):
        named, text = torch.randint(8, (32,)), torch.randn(32, 6, 64)
        shown = torch.where(torch.rand(32) < 0.5, named, torch.randint(8, (32,)))
        text[:, 2] = words[named]
        logits = part(text, own, shapes[shown][:, None] + torch.randn(32, 9, 128) / 2, region_mask)
        right.append(((logits > 0) == (named == shown)).float().mean())
        part.loss(logits, (named == shown).float(), region_mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.stack(right)[150:].mean() > 0.95


# ----------------------------------------------------------------------------------------------------- prefix


def prefix_reference(part, text, own, regions):
    """(soft tokens [4, D], weights [T, R]) of one post of real tokens and regions, by plain loops."""

    def normal(x):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    image = [part.regions.linear.weight @ unit(region) for region in regions]
    seen, weights = zip(*(multi_head_reference(part.look, normal(x), image) for x in text), strict=True)
    heard = [normal(x) for x, mine in zip(seen, own, strict=True) if mine]
    tokens = [q + normal(multi_head_reference(part.gather, q, heard)[0]) for q in part.queries]
    length = sum(x.norm() for x in text[own]) / own.sum()
    return torch.stack([length * token / token.norm() for token in tokens]), torch.stack(weights)


@torch.no_grad()
def test_soft_tokens_are_their_formula_behind_the_last_token():
    part, (text, mask, own, regions, region_mask) = make("prefix", noise=0), batch()
    whole, whole_mask, weights = part(text, mask, own, regions, region_mask, return_weights=True)
    assert whole.shape == (5, 10, D) and whole_mask.shape == (5, 10) and weights.shape == (5, 6, 5)
    for i in range(5):
        end, shown = int(mask[i].sum()), i < 3  # the fourth has no photo, the last nothing of its own
        assert torch.equal(whole[i, :end], text[i, :end]) and not whole[i, end + 4 * shown :].any()
        assert whole_mask[i].tolist() == [True] * (end + 4 * shown) + [False] * (10 - end - 4 * shown)
        if shown:
            soft, seen = prefix_reference(part, text[i][mask[i]], own[i][mask[i]], regions[i][region_mask[i]])
            close(whole[i, end : end + 4], soft, 1e-4)
            close(weights[i][mask[i]][:, region_mask[i]], seen, 1e-4)
            apart = F.normalize(soft, dim=-1)  # the soft tokens of a post are not one and the same
            assert (apart @ apart.T - torch.eye(4)).max() < 0.95
    assert not weights.masked_select(~region_mask[:, None]).any() and not weights[3].any()
    blind = part(text, mask, own, regions, torch.zeros_like(region_mask))
    assert blind[1].equal(F.pad(mask, (0, 4)))


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_a_fresh_prefix_does_not_weigh_all_regions_alike(scale):
    """At real widths, and at the scale of a pretrained encoder's word embeddings."""
    torch.manual_seed(0)
    ones, regions = torch.ones(4, 6, dtype=torch.bool), torch.randn(4, 49, 2048)
    _, _, weights = Prefix(384, 2048).eval()(scale * torch.randn(4, 6, 384), ones, ones, regions,
                                             torch.ones(4, 49, dtype=torch.bool), True)  # fmt: skip
    entropy = -(weights * weights.log()).sum(-1) / math.log(49)  # [B, T]; 1 = uniform
    assert entropy.max() < 0.9999 and entropy.min() > 0.9


# ------------------------------------------------------------------------------------------- the photo's bias


def labelled():
    """(logits, mask, labels) of five posts with holes; the second has no word."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    return torch.randn(5, 4, K, generator=generator), mask, torch.randint(K, (5, 4), generator=generator)


def head(decoder):
    torch.manual_seed(0)
    config = {"dropout": 0.0, "task": "ner", "labels": list(range(K)), "decoder": decoder, "region_dim": DV}
    layer = Head(12, config).eval()
    with torch.no_grad():
        for parameter in layer.crf.parameters():
            parameter.normal_()
    return layer


@torch.no_grad()
def test_a_photo_biases_by_the_mean_of_its_regions():
    bias, (_, _, _, regions, region_mask) = make("bias"), batch()
    values = bias(regions, region_mask)
    assert values.shape == (5, K, K) and torch.equal(values[3], torch.zeros(K, K))  # no photo
    for i in (0, 1, 2, 4):
        mean = unit(regions[i, region_mask[i]].mean(0))
        close(values[i].flatten(), bias.transitions.weight @ torch.tanh(bias.image.linear.weight @ mean))
    assert torch.pdist(values[:3].flatten(1)).min() > 0.1
    assert not make("bias", noise=0)(regions, region_mask).any()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = bias(regions, region_mask)
    assert rounded.dtype == torch.float32
    close(rounded, values, 0.1)


def test_a_fresh_bias_learns_from_the_second_step_on():
    bias, (_, _, _, regions, region_mask) = make("bias", noise=0), batch()
    (logits, mask, labels), losses = labelled(), []
    optimizer = torch.optim.AdamW(bias.parameters(), lr=1e-2)
    for _ in range(60):
        loss = Crf(K).loss(logits, mask, labels, bias(regions, region_mask)).sum()
        loss.backward()
        optimizer.step()
        assert [bool(parameter.grad.any()) for parameter in bias.parameters()] == [bool(losses), True]
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_chain_with_a_photo_is_that_of_enumeration():
    visual, (logits, mask, labels), (_, _, _, regions, region_mask) = head("visual-crf"), labelled(), batch()
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


def test_untrained_or_without_photo_the_chain_is_the_plain_one():
    plain, visual, (logits, mask, labels) = head("crf"), head("visual-crf"), labelled()
    visual.crf.load_state_dict(plain.crf.state_dict())
    _, _, _, regions, region_mask = batch()
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


# ------------------------------------------------------------------------------------------------- bottleneck


def test_divergence_is_torchs_over_real_positions_and_channels():
    code, (x, mask, *_) = make("code"), batch()
    x = x.masked_fill(~mask[..., None], 0)
    z, kl = code(x, mask)
    mu, sigma = code.mean(x, mask), ((code.log_variance(x, mask) - 4) / 2).exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0))
    for i in range(5):
        close(kl[i], expected[i, mask[i]].mean())
        close(z[i, mask[i]], mu[i, mask[i]])
    assert not z[~mask].any()
    # It is zero for the standard normal alone.
    with torch.no_grad():
        for block in (code.mean, code.log_variance):
            block.norms[1].weight.zero_()
        biases = code.mean.norms[1].bias, code.log_variance.norms[1].bias
        biases[0].fill_(0), biases[1].fill_(4)
        assert not code(x, mask)[1].any()
        for bias in biases:
            bias += 0.1
            assert (code(x, mask)[1] > 1e-3).all()
            bias -= 0.1


def test_evaluation_draws_nothing_and_training_around_it():
    bottleneck, (text, mask, _, *photo) = make("no dropout"), batch()
    with torch.no_grad():
        first, again = bottleneck(text, mask, photo), bottleneck(text, mask, photo)
        same(first, again)
        torch.manual_seed(0)
        drawn, _, kl = bottleneck.train()(text.repeat(2000, 1, 1), mask.repeat(2000, 1))
        close(kl[:5], bottleneck.eval()(text, mask)[2])  # it is of the distribution, not of the draw
        x = text.masked_fill(~mask[..., None], 0)
        sigma = ((bottleneck.text.log_variance(x, mask) - 4) / 2).exp()[mask]
        drawn = drawn.unflatten(0, (2000, 5))[:, mask]
        assert ((drawn.mean(0) - first[0][mask]).abs() < 5 * sigma / math.sqrt(2000)).all()
        assert ((drawn.std(0) / sigma - 1).abs() < 0.1).all()


def test_a_fresh_code_is_the_normed_state_under_little_noise():
    code, (x, mask, *_) = make("code", noise=0), batch()
    x = x.masked_fill(~mask[..., None], 0)
    z, _ = code(x, mask)
    close(z[mask], F.layer_norm(x, (D,))[mask], 1e-3)
    assert 0.05 < (code.train()(x, mask)[0] - z)[mask].std() < 0.3


def test_codes_of_a_batch_are_those_of_its_posts_and_padding_stays():
    bottleneck, (text, mask, _, regions, region_mask) = make("bottleneck"), batch()
    text = text.masked_fill(~mask[..., None], math.nan)
    codes, (states,), kl = bottleneck(text, mask, (regions, region_mask))
    same(codes[~mask], text[~mask])
    assert not states[~region_mask].any()
    for i in range(5):
        t, r = mask[i], region_mask[i] if region_mask[i].any() else slice(0, 1)
        photo = regions[i, r][None], region_mask[i, r][None]
        alone, (picture,), divergence = bottleneck(text[i, t][None], mask[i, t][None], photo)
        close((alone[0], picture[0], divergence[0]), (codes[i, t], states[i, r], kl[i]))


def test_text_depends_on_no_picture_and_both_pictures_are_read_alike():
    bottleneck, (text, mask, _, regions, region_mask) = make("bottleneck"), batch()
    photo, second = (regions, region_mask), (regions[:, :3].flip(1), region_mask[:, :3].flip(1))
    coded, _, of_text = bottleneck(text, mask)
    both, (a, b), of_all = bottleneck(text, mask, photo, second)
    _, (c, d), turned = bottleneck(text, mask, second, photo)
    assert torch.equal(coded, both) and torch.equal(of_text[3], of_all[3]) and (of_text < of_all)[:3].all()
    assert (coded - text)[mask].abs().amax(-1).min() > 1e-2
    assert torch.equal(a, d) and torch.equal(b, c)
    close(turned, of_all)


def test_codes_under_autocast():
    bottleneck, (text, mask, _, *photo) = make("bottleneck"), batch()
    codes, _, kl = bottleneck(text, mask, photo)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _, divergence = bottleneck(text.bfloat16(), mask, photo)
    assert rounded.dtype == torch.bfloat16 and divergence.dtype == torch.float32
    assert (rounded[mask] - codes[mask]).abs().max() < 0.1 and (divergence / kl - 1).abs().max() < 0.05


def test_standardised_regions_against_scikit_learn():
    torch.manual_seed(0)
    means, regions = 3 + 2 * torch.randn(50, 6), torch.randn(2, 4, 6)
    means[:, 5], mask = 7.0, torch.tensor([[1, 1, 0, 1], [0] * 4])  # the last channel says nothing
    part = Standardise(6)
    assert torch.equal(part(regions, mask.bool()), regions * mask[..., None])  # not yet fitted
    part.fit(means)
    spoiled = regions.masked_fill(~mask.bool()[..., None], math.nan)
    out = part(spoiled.half(), mask.bool())
    wanted = StandardScaler().fit(means.numpy()).transform(regions[0].half().numpy())
    for row in (0, 1, 3):
        assert np.allclose(out[0, row, :5], wanted[row, :5], rtol=5e-3, atol=5e-3)
    assert out.isfinite().all() and not out[1].any() and not out[0, 2].any()
    part.fit(means[:1])  # one photo: nothing varies
    assert part(means[None, :1], torch.ones(1, 1, dtype=bool)).abs().max() == 0
