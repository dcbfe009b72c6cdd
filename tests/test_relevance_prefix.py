"""Relevance and prefix against plain loops, in the model against the plain encoder; what changes nothing."""

import contextlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import build
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, RobertaTokenizerFast

import predict
import report
import train
from align import ALIGNMENTS
from encoding import PROBE, collate, encode
from fusion import FUSIONS, clean, unit_length
from parts.checks import image_check, verdict
from parts.datasets import load_dataset
from parts.files import write_json_lines
from parts.model import TextRegions
from parts.notes import Notes, Segments
from parts.posts import make_posts, predict_posts, shuffled_photos
from parts.run_files import load_run, read_config
from parts.runs import system_settings
from parts.scores import read_predictions, score
from parts.text_encoder import check_soft_tokens, load_text_encoder, load_tokenizer
from stages import Prefix, Relevance
from parts import opening

D, DV, HEADS = 24, 20, 4
HEAD_SLICES = [slice(start, start + D // HEADS) for start in range(0, D, D // HEADS)]
LABELS = ("O", "B-PER", "I-PER")
CONFIG = {
    "dropout": 0.1,
    "heads": HEADS,
    "region_dim": DV,
    "task": "ner",
    "labels": LABELS,
    "decoder": "softmax",
    "align": {},
}
GARBAGE = [1e4, 1e30, math.inf, math.nan]


def make(kind, **more):
    torch.manual_seed(0)
    return kind(D, DV, **more).eval()


def batch(seed=1):
    """Five ragged posts. The first token and, of the third, the last two are not its own; the fourth has no
    photo, the last no token of its own. The first has a masked region between real ones."""
    generator = torch.Generator().manual_seed(seed)
    text, regions = torch.randn(5, 6, D, generator=generator), torch.randn(5, 5, DV, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 4, 1])[:, None]
    own = mask & (torch.arange(6) > 0)
    own[2, 3:] = False
    region_mask = torch.arange(5) < torch.tensor([5, 1, 4, 0, 2])[:, None]
    region_mask[0, 1] = False
    return text, mask, own, regions, region_mask


def spoil(values, mask, scale):
    """`values` with `scale` times random signs and sizes where `mask` is False."""
    garbage = scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    return torch.where(mask[..., None], values, garbage)


def unit(region):
    centred = region - region.mean()
    return centred / centred.square().sum().sqrt()


def same(actual, expected):
    """Bit for bit, where NaN is the same as NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# -------------------------------------------------------------------------------------------------- relevance


def test_relevance_is_its_formula():
    part, (text, _, own, regions, region_mask) = make(Relevance), batch()
    logits = part(text, own, regions, region_mask)
    for i in (0, 1, 2):
        t = sum(text[i][own[i]]) / own[i].sum()
        v = part.image.linear.weight @ unit(sum(unit(region) for region in regions[i][region_mask[i]]))
        hidden = part.score[0](torch.cat((t, v, t * v)))
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        torch.testing.assert_close(logits[i], part.score[2](gelu)[0])
    assert logits.shape == (5,) and logits.unique().numel() == 5 and logits.isfinite().all()


@pytest.mark.parametrize("scale", GARBAGE)
def test_relevance_knows_own_tokens_and_real_regions_alone(scale):
    part, (text, _, own, regions, region_mask) = make(Relevance), batch()

    def answer(text, regions):
        text, regions = text.clone().requires_grad_(), regions.clone().requires_grad_()
        logits = part(text, own, regions, region_mask)
        return logits, *torch.autograd.grad(logits.sum(), [text, regions, *part.parameters()])

    wanted = answer(text, regions)
    assert wanted[1][own].any(1).all() and not wanted[1][~own].any()
    assert wanted[2][region_mask].any(1).all() and not wanted[2][~region_mask].any()
    for found, expected in zip(
        answer(spoil(text, own, scale), spoil(regions, region_mask, scale)), wanted, strict=True
    ):
        same(found, expected)


def test_relevance_knows_no_order_and_no_scale_of_regions_and_no_autocast():
    part, (text, _, own, regions, region_mask) = make(Relevance), batch()
    wanted, order = part(text, own, regions, region_mask), torch.tensor([3, 0, 4, 1, 2])
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(
            part(text, own, factor * regions, region_mask), wanted, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(
        part(text, own, regions[:, order], region_mask[:, order]), wanted, rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part(text, own, regions, region_mask), wanted)


@pytest.mark.parametrize("given", [0.0, 0.013, 0.5, 0.83, 1.0])
def test_the_loss_is_least_at_the_given_relevance(given):
    guesses = torch.arange(0.001, 1, 0.001)
    photo, given = torch.ones(len(guesses), 1, dtype=torch.bool), torch.full_like(guesses, given)
    losses = Relevance.loss(guesses.logit(), given, photo)
    torch.testing.assert_close(
        losses, -(given * guesses.log() + (1 - given) * (1 - guesses).log()), rtol=1e-3, atol=1e-5
    )
    assert (guesses[losses.argmin()] - given[0]).abs() <= 0.0011


def test_the_loss_is_of_posts_with_a_photo_and_a_given_relevance():
    logits = torch.zeros(4, requires_grad=True)
    photo = torch.tensor([True, False, True, True])[:, None]
    losses = Relevance.loss(logits, torch.tensor([1.0, 1.0, -1.0, 0.0]), photo)
    torch.testing.assert_close(losses, math.log(2) * torch.tensor([1.0, 0, 0, 1]))
    losses.sum().backward()
    assert logits.grad.tolist() == [-0.5, 0, 0, 0.5]


def test_relevance_learns_which_photos_belong_to_their_posts():
    """One word of a post names one of 8 things, its photo shows it or, in half of the posts, any."""
    torch.manual_seed(0)
    part, words, shapes, right = Relevance(64, 128), 2 * torch.randn(8, 64), torch.randn(8, 128), []
    optimizer = torch.optim.AdamW(
        part.parameters(), lr=1.1e-3, weight_decay=0.01
    )  # as train.py trains what is new
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


def reference(part, text, own, regions):
    """(soft tokens [count, D], weights [T, R]) of one post of real tokens and regions, by plain loops."""

    def attend(inner, queries, keys):
        of_query, of_key, of_value = zip(
            inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3), strict=True
        )
        k, v = ([w @ key + b for key in keys] for w, b in (of_key, of_value))
        made, weights = [], []
        for query in queries:
            q, heads, mean = of_query[0] @ query + of_query[1], [], 0
            for s in HEAD_SLICES:
                w = torch.stack([q[s] @ key[s] / math.sqrt(D / HEADS) for key in k]).softmax(0)
                heads.append(sum(a * value[s] for a, value in zip(w, v, strict=True)))
                mean = mean + w / HEADS
            made.append(inner.out_proj(torch.cat(heads)))
            weights.append(mean)
        return made, torch.stack(weights)

    def normal(x):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    seen, weights = attend(
        part.look, map(normal, text), [part.regions.linear.weight @ unit(region) for region in regions]
    )
    found, _ = attend(
        part.gather, part.queries, [normal(x) for x, mine in zip(seen, own, strict=True) if mine]
    )
    length, made = (
        sum(x.norm() for x in text[own]) / own.sum(),
        [q + normal(x) for q, x in zip(part.queries, found, strict=True)],
    )
    return torch.stack([length * p / p.norm() for p in made]), weights


@torch.no_grad()
def test_soft_tokens_are_their_formula_behind_the_last_token():
    part, (text, mask, own, regions, region_mask) = make(Prefix, heads=HEADS), batch()
    whole, whole_mask, weights = part(text, mask, own, regions, region_mask, return_weights=True)
    assert whole.shape == (5, 10, D) and whole_mask.shape == (5, 10) and weights.shape == (5, 6, 5)
    for i in range(5):
        end, shown = int(mask[i].sum()), i < 3  # the fourth has no photo, the last nothing of its own
        assert torch.equal(whole[i, :end], text[i, :end]) and not whole[i, end + 4 * shown :].any()
        assert whole_mask[i].tolist() == [True] * (end + 4 * shown) + [False] * (10 - end - 4 * shown)
        if shown:
            soft, seen = reference(part, text[i][mask[i]], own[i][mask[i]], regions[i][region_mask[i]])
            torch.testing.assert_close(whole[i, end : end + 4], soft, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[i][mask[i]][:, region_mask[i]], seen, rtol=1e-4, atol=1e-5)
    assert not weights.masked_select(~region_mask[:, None]).any() and not weights[3].any()


@pytest.mark.parametrize("scale", GARBAGE)
def test_soft_tokens_know_nothing_of_what_is_masked(scale):
    part, (text, mask, own, regions, region_mask) = make(Prefix, heads=HEADS), batch()

    def answer(text, regions):
        text, regions = text.clone().requires_grad_(), regions.clone().requires_grad_()
        whole, _, _ = part(text, mask, own, regions, region_mask)
        return whole, *torch.autograd.grad(whole.square().sum(), [text, regions, *part.parameters()])

    wanted = answer(text, regions)
    assert all(part.isfinite().all() for part in wanted)
    # A token that is not the post's own is copied, and says nothing to the soft tokens.
    torch.testing.assert_close(wanted[1][mask & ~own], 2 * text[mask & ~own], rtol=1e-4, atol=1e-4)
    for found, expected in zip(
        answer(spoil(text, mask, scale), spoil(regions, region_mask, scale)), wanted, strict=True
    ):
        same(found, expected)


@torch.no_grad()
def test_another_order_of_queries_is_another_order_of_soft_tokens_and_regions_have_none():
    part, (text, mask, own, regions, region_mask) = make(Prefix, heads=HEADS), batch()
    wanted, _, _ = part(text, mask, own, regions, region_mask)
    order = torch.tensor([3, 0, 4, 1, 2])
    for turned in (1e-3 * regions, 1e3 * regions, regions[:, order]):
        turned_mask = region_mask[:, order] if turned.equal(regions[:, order]) else region_mask
        torch.testing.assert_close(
            part(text, mask, own, turned, turned_mask)[0], wanted, rtol=1e-4, atol=1e-5
        )
    order = torch.tensor([2, 0, 3, 1])
    part.queries.copy_(part.queries[order])
    turned, _, _ = part(text, mask, own, regions, region_mask)
    for i, end in enumerate((6, 3, 5)):
        torch.testing.assert_close(
            turned[i, end : end + 4], wanted[i, end : end + 4][order], rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(turned[i], wanted[i], atol=1e-2)


def test_everything_of_a_prefix_learns():
    part, (text, mask, own, regions, region_mask) = make(Prefix, heads=HEADS), batch()
    whole, whole_mask, _ = part(text, mask, own, regions, region_mask)
    (whole * torch.randn_like(whole)).sum().backward()
    assert all(parameter.grad.any() for parameter in part.parameters())
    assert part(text, mask, own, regions, torch.zeros_like(region_mask))[1].equal(F.pad(mask, (0, 4)))


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_a_fresh_prefix_does_not_weigh_all_regions_alike(scale):
    """At real widths, and at the scale of a pretrained encoder's word embeddings."""
    torch.manual_seed(0)
    ones, regions = torch.ones(4, 6, dtype=torch.bool), torch.randn(4, 49, 2048)
    _, _, weights = Prefix(384, 2048).eval()(
        scale * torch.randn(4, 6, 384), ones, ones, regions, torch.ones(4, 49, dtype=torch.bool), True
    )
    entropy = -(weights * weights.log()).sum(-1) / math.log(49)  # [B, T]; 1 = uniform
    assert entropy.max() < 0.9999 and entropy.min() > 0.9


@torch.no_grad()
def test_the_soft_tokens_of_a_post_are_not_one():
    part, (text, mask, own, regions, region_mask) = make(Prefix, heads=HEADS), batch()
    whole, _, _ = part(text, mask, own, regions, region_mask)
    for i, end in enumerate((6, 3, 5)):
        soft = F.normalize(whole[i, end : end + 4], dim=-1)
        assert (soft @ soft.T - torch.eye(4)).max() < 0.95


def test_heads_have_to_divide_the_embeddings():
    with pytest.raises(ValueError, match="7 heads do not divide"):
        Prefix(D, DV, heads=7)


# -------------------------------------------------------------------------------------------------- the model


def tiny(kind, folder):
    """A folder with a tiny BERT or RoBERTa and a byte-level tokenizer of its form for two texts."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    tokenizer = RobertaTokenizerFast(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], add_prefix_space=True, model_max_length=64
    )
    size = {
        "vocab_size": len(pieces),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config, model = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}[kind]
    torch.manual_seed(0)
    model(config(**size, max_position_embeddings=64, pad_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: str(tiny(kind, root / kind)) for kind in ("bert", "roberta")}


def load(folders, kind="bert", **more):
    """(model in eval mode with noise on all new parameters, tokenizer) of `CONFIG` and more."""
    encoder, tokenizer = load_text_encoder(folders[kind], "", "ner", 0.1)
    torch.manual_seed(0)
    model = TextRegions(encoder, CONFIG | more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += 0.2 * torch.randn_like(parameter)
    return model, tokenizer


def posts(tokenizer, data_dir, notes=True, count=5):
    """A batch of ragged posts with a note each but the first, the second without a photo; and its rows."""
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"][:count], dataset.labels, 40)
    for row in rows:
        row["labels"] = [label % len(LABELS) if label >= 0 else label for label in row["labels"]]
    if notes:
        segments = Segments(tokenizer, "photo", 12)
        rows = [segments(row, {"about_photo": "so good " * i}) for i, row in enumerate(rows)]
    generator = torch.Generator().manual_seed(3)
    photos = {"regions": torch.randn(count, 5, DV, generator=generator), "photo_row": torch.arange(count)}
    photos["region_mask"] = torch.arange(5) < torch.tensor([5, 0, 3, 1, 4])[:count, None]
    photos["region_grid"] = torch.tensor([[1, 5], [0, 0], [3, 1], [1, 1], [2, 2]])[:count]
    return collate(rows, tokenizer.pad_token_id) | photos, rows


def real(logits, batch):
    """Those of words."""
    return logits[batch["word_starts"] >= 0]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in ("none", "prefix")])
def test_relevance_0_is_text_only_and_1_the_bare_fusion_bit_for_bit(folders, data_dir, fusion, precision):
    given, tokenizer = load(folders, fusion=fusion, relevance="given")
    bare, none = load(folders, fusion=fusion)[0], load(folders, fusion="none")[0]
    weights = given.state_dict()
    for other in (bare, none):
        other.load_state_dict({key: value for key, value in weights.items() if key in other.state_dict()})
    inputs, _ = posts(tokenizer, data_dir)

    def logits(model, *relevance):
        more = {"relevance": torch.tensor(relevance[0]).expand(5)} if relevance else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return real(model(inputs | more).logits, inputs)

    text, whole = logits(none), logits(bare)
    assert not torch.allclose(text, whole, atol=1e-2)
    assert torch.equal(logits(given, 0.0), text) and torch.equal(logits(given, 1.0), whole)
    if precision == "float32":  # the head is linear, and so is what lies between
        for share in (0.001, 0.3, 0.5, 0.501, 0.999):
            torch.testing.assert_close(
                logits(given, share), text + share * (whole - text), rtol=1e-4, atol=1e-4
            )
    # Each post by itself: the second has no photo, whatever is said of it, the fourth no given relevance.
    shares = torch.tensor([1.0, 0.7, 0.0, -1.0, 1.0])
    made, wanted = given(inputs | {"relevance": shares}).logits, (bare(inputs).logits, none(inputs).logits)
    if precision == "float32":
        for i, expected in ((0, wanted[0]), (1, wanted[1]), (2, wanted[1]), (4, wanted[0])):
            assert torch.equal(made[i], expected[i])
    logit = given.relevance(
        given.read(inputs, False)[0], inputs["own_mask"], inputs["regions"], inputs["region_mask"]
    )[3]
    between = torch.lerp(wanted[1][3], wanted[0][3], logit.sigmoid())
    torch.testing.assert_close(made[3], between, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_relevance_that_is_not_given_is_predicted_and_a_given_one_no_matter_where_all_are(
    folders, data_dir
):
    given, tokenizer = load(folders, fusion="film", relevance="given")
    predicted, _ = load(folders, fusion="film", relevance="predicted")
    inputs, _ = posts(tokenizer, data_dir)
    wanted = predicted(inputs).logits
    assert torch.equal(given(inputs).logits, wanted)  # as in a batch of which no post has one
    assert torch.equal(given(inputs | {"relevance": torch.full((5,), -1.0)}).logits, wanted)
    some = torch.tensor([-1, 0.9, 0.1, -1, 0.2])
    assert torch.equal(predicted(inputs | {"relevance": some}).logits, wanted)
    changed = (given(inputs | {"relevance": some}).logits != wanted).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, True]
    # Without a photo nothing is of relevance, predicted or given, and NaN in its place is nothing either.
    blind = inputs | {
        "region_mask": torch.zeros_like(inputs["region_mask"]),
        "regions": torch.full_like(inputs["regions"], math.nan),
    }
    text = load(folders, fusion="none")[0]
    text.load_state_dict(
        {key: value for key, value in given.state_dict().items() if key in text.state_dict()}
    )
    for model in (given, predicted):
        assert torch.equal(model(blind | {"relevance": some}).logits, text(blind).logits)


@pytest.mark.parametrize("more", [{}, {"notes": "n.jsonl", "relevance_loss": 0.5}])
@pytest.mark.parametrize("which", ["given", "predicted"])
def test_relevance_learns_from_what_is_given_or_as_a_gate(folders, data_dir, which, more):
    model, tokenizer = load(folders, fusion="attention", relevance=which, **more)
    assert model.loss_weights == {"labels": 1.0} | ({"relevance": 0.5} if more else {})
    inputs, _ = posts(tokenizer, data_dir)
    given = torch.tensor([0.8, 0.3, -1, 0, -1])
    for relevance, mask in ((given, inputs["region_mask"]), (given, torch.zeros_like(inputs["region_mask"])),
                            (torch.full((5,), -1.0), inputs["region_mask"])):  # fmt: skip
        model.zero_grad()
        losses = model(inputs | {"relevance": relevance, "region_mask": mask}, return_losses=True).losses
        assert losses.keys() == model.loss_weights.keys()
        model.total([loss.sum() for loss in losses.values()], 10, 5).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
        )
        known = (relevance >= 0) & mask.any(1)
        of_gate = mask.any() and (which == "predicted" or (relevance < 0).any())
        assert any(p.grad.any() for p in model.relevance.parameters()) == bool(
            of_gate or (more and known.any())
        )
        if more:
            logits = model.relevance(
                model.read(inputs, False)[0], inputs["own_mask"], inputs["regions"], mask
            )
            wanted = (
                F.binary_cross_entropy(logits.sigmoid(), relevance.clamp(min=0), reduction="none") * known
            )
            torch.testing.assert_close(losses["relevance"], wanted)


def test_supervised_alignment_is_of_posts_with_a_relevance_by_trains_median(folders, data_dir):
    model, tokenizer = load(
        folders, fusion="film", notes="n", align={"supervised": 0.1}, relevance_median=0.5
    )
    assert model.loss_weights == {"labels": 1.0, "supervised": 0.1}
    inputs, _ = posts(tokenizer, data_dir)
    relevance = torch.tensor([0.5, 0.9, 0.2, -1, 0.7])  # the second has no photo, the fourth no relevance
    losses = model(inputs | {"relevance": relevance}, return_losses=True).losses
    kept = torch.tensor([0, 2, 4])
    regions = unit_length(clean(inputs["regions"], inputs["region_mask"]))[kept]
    text, (own, seen, photos) = (
        model.read(inputs, False)[0][kept],
        (inputs[key][kept] for key in ("own_mask", "region_mask", "photo_row")),
    )
    alone = model.align["supervised"](text, own, regions, seen, photos, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(losses["supervised"][kept], alone)
    assert not losses["supervised"][[1, 3]].any() and alone[[0, 2]].all() and not alone[1]
    none = model(inputs, return_losses=True).losses
    assert not none["supervised"].any()
    none["supervised"].sum().backward()
    assert all(p.grad is not None for p in model.align.parameters())
    assert isinstance(model.align["supervised"], ALIGNMENTS["supervised"])


@torch.no_grad()
@pytest.mark.parametrize("garbage", [0.0, math.nan])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_prefix_without_photo_is_the_plain_encoder_of_text_and_knowledge(folders, data_dir, kind, garbage):
    model, tokenizer = load(folders, kind, fusion="prefix")
    plain, _ = load(folders, kind, fusion="none")
    plain.load_state_dict(
        {key: value for key, value in model.state_dict().items() if not key.startswith("prefix.")}
    )
    inputs, _ = posts(tokenizer, data_dir)
    wanted, shown = plain(inputs).logits, model(inputs).logits
    blind = inputs | {
        "region_mask": torch.zeros_like(inputs["region_mask"]),
        "regions": torch.full_like(inputs["regions"], garbage),
    }
    torch.testing.assert_close(real(model(blind).logits, inputs), real(wanted, inputs), rtol=1e-5, atol=1e-5)
    photo, words = inputs["region_mask"].any(1), inputs["word_starts"] >= 0
    torch.testing.assert_close(
        shown[~photo][words[~photo]], wanted[~photo][words[~photo]], rtol=1e-5, atol=1e-5
    )
    assert ((shown - wanted).abs().amax(-1) > 1e-4)[photo][
        words[photo]
    ].all()  # every word knows of the photo


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_with_a_prefix_batched_is_single_at_any_padding(folders, data_dir, kind):
    model, tokenizer = load(folders, kind, fusion="prefix")
    inputs, rows = posts(tokenizer, data_dir)
    wanted, weights, _ = model(inputs, return_weights=True)
    for i, row in enumerate(rows):
        count = max(1, int(inputs["region_mask"][i].sum()))
        photo = {key: inputs[key][i : i + 1] for key in ("regions", "region_mask", "photo_row")}
        for regions, more in ((count, 0), (5, 0), (5, 3), (5, 58 - inputs["input_ids"].shape[1])):
            alone = collate([row], tokenizer.pad_token_id) | photo
            alone |= {key: alone[key][:, :regions] for key in ("regions", "region_mask")}
            alone["input_ids"] = F.pad(alone["input_ids"], (0, more), value=tokenizer.pad_token_id)
            alone |= {
                key: F.pad(alone[key], (0, more))
                for key in ("attention_mask", "own_mask", "text_mask")
                if key in alone
            }
            made, seen, _ = model(alone, return_weights=True)
            words = row["word_starts"]
            torch.testing.assert_close(made[0], wanted[i, : len(words)], rtol=1e-5, atol=2e-6)
            length = len(row["input_ids"])
            torch.testing.assert_close(
                seen[0, :length], weights[i, :length, : seen.shape[2]], rtol=1e-5, atol=1e-6
            )
    photo = inputs["region_mask"].any(1).float()[:, None].expand(-1, weights.shape[1])
    torch.testing.assert_close(weights.sum(-1), photo)


def test_gradients_reach_queries_regions_and_word_embeddings(folders, data_dir):
    model, tokenizer = load(folders, "roberta", fusion="prefix", align={"contrastive": 0.1})
    inputs, _ = posts(tokenizer, data_dir)
    for mask in (inputs["region_mask"], torch.zeros_like(inputs["region_mask"])):
        model.zero_grad()
        losses = model(inputs | {"region_mask": mask}, return_losses=True).losses
        sum(loss.sum() for loss in losses.values()).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
        )
        assert all(bool(p.grad.any()) == bool(mask.any()) for p in model.prefix.parameters())
        assert model.encoder.get_input_embeddings().weight.grad.any()
    assert {"queries", "regions.linear.weight"} <= {name for name, _ in model.prefix.named_parameters()}
    # The soft tokens alone teach the word embeddings too: of the post's own tokens, not of its note.
    words = model.encoder.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    masks, length = (
        (inputs["attention_mask"].bool(), inputs["own_mask"]),
        int(inputs["attention_mask"][2].sum()),
    )
    whole, _, _ = model.prefix(words, *masks, inputs["regions"], inputs["region_mask"])
    torch.manual_seed(0)
    (whole[2, length : length + 4] * torch.randn(4, 32)).sum().backward()
    taught = words.grad.any(-1)
    assert torch.equal(taught[2], inputs["own_mask"][2]) and not taught[[0, 1, 3, 4]].any()


WORDS = [*"so excited about Paris today ! RT @fan : BBC again".split(), *PROBE]


@pytest.mark.parametrize("kind, reason", [
    ("convbert", "makes other states of embeddings, masked ones behind, than of ids"),  # its convolution
    ("ibert", "takes no embeddings in place of ids"),
    ("gpt2", "reads left to right, so no word would know of the photo"),
])  # fmt: skip
def test_an_encoder_that_cannot_read_soft_tokens_is_one_line(tmp_path, kind, reason):
    build(kind, tmp_path, WORDS)
    encoder, tokenizer = load_text_encoder(str(tmp_path), "", "ner", 0.1)
    with pytest.raises(
        ValueError, match=f"^--fusion prefix: here, a {kind}, {reason}.*; take another --text-encoder$"
    ) as error:
        check_soft_tokens(encoder, tokenizer, "here", 4)
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "albert", "xlnet"])
def test_other_kinds_read_soft_tokens_alike_in_any_batch(tmp_path, data_dir, kind):
    """Counted positions, relative ones, embeddings of another width than the states, no position_ids."""
    build(kind, tmp_path, WORDS)
    model, _ = load({kind: str(tmp_path)}, kind, fusion="prefix")
    tokenizer = load_tokenizer(tmp_path)
    check_soft_tokens(model.encoder, tokenizer, "here", 4)
    inputs, rows = posts(tokenizer, data_dir, notes=False)
    wanted = model(inputs).logits
    for i, row in enumerate(rows):
        alone = collate([row], tokenizer.pad_token_id) | {
            key: inputs[key][i : i + 1] for key in ("regions", "region_mask")
        }
        torch.testing.assert_close(
            model(alone).logits[0], wanted[i, : len(row["word_starts"])], rtol=1e-4, atol=1e-5
        )


# --------------------------------------------------------------------------- relevance is a note of the photo


def rated(dataset, but=0):
    """Notes of all posts; all but each fourth with a relevance: rising in train, high elsewhere."""
    notes = []
    for split, examples in dataset.examples.items():
        for i, example in enumerate(examples):
            relevance = {} if i % 4 == but else {"relevance": i / 32 if split == "train" else 0.9 + i / 100}
            notes.append({"id": example.id, "about_post": "so good", "about_photo": f"photo {i}"} | relevance)
    return notes


@pytest.fixture(scope="module")
def demo_notes(data_dir, tmp_path_factory):
    """(the demo data set, a file of its `rated` notes)."""
    dataset, path = load_dataset("demo", data_dir), tmp_path_factory.mktemp("notes") / "notes.jsonl"
    write_json_lines(path, rated(dataset))
    return dataset, path


@pytest.mark.parametrize("extra", ["none", "post"])
def test_relevance_moves_and_hides_with_the_photo(demo_notes, encoder_dir, extra):
    dataset, path = demo_notes
    tokenizer, examples = load_tokenizer(encoder_dir), dataset.examples["test"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    notes = Notes(path, tokenizer, extra, 128, relevance=True).of(examples, "test")
    said = [note.get("relevance") for note in notes.of_post]
    assert sum(r is None for r in said) == 2

    def shown(photos):
        shown = [notes.shown(row, i, photo) for i, (row, photo) in enumerate(zip(rows, photos, strict=True))]
        batch = collate(shown, 0)
        return batch["relevance"].tolist() if "relevance" in batch else None

    ids = [example.image_id for example in examples]
    wanted = torch.tensor([-1 if r is None else r for r in said])
    assert (
        shown(ids) == wanted.tolist()
        and collate([notes.shown(rows[1], 1, ids[1])], 0)["relevance"].dtype == torch.float32
    )
    assert shown(ids[3:] + ids[:3]) == wanted.roll(-3).tolist()
    assert shown([None] * 8) is None
    assert shown([None] * 4 + ids[4:]) == [-1] * 4 + wanted[4:].tolist()
    assert "relevance" not in collate([notes.shown(rows[0], 0, ids[0])], 0)  # of a post without one
    notes = Notes(path, tokenizer, "post", 128).of(examples, "test")
    assert shown(ids) is None
    # A relevance is nothing to be shown: of photos without features none is dealt out.
    assert not any(notes.has_photo(image_id) for image_id in ids)


def test_of_rows_that_share_a_photo_a_text_goes_before_a_relevance_and_that_before_nothing(
    data_dir, encoder_dir, tmp_path
):
    dataset, tokenizer = load_dataset("mnre", data_dir), load_tokenizer(encoder_dir)
    first, second = dataset.examples["train"][:2]
    assert first.image_id == second.image_id
    text, number, neither = {"about_photo": "a hoop"}, {"relevance": 0.5}, {"about_post": "x"}
    cases = [("photo", number, text, 1), ("photo", text, number, 0), ("none", neither, number, 1)]
    cases += [("none", number, neither, 0), ("none", number, {"relevance": 0.7}, 0)]
    for extra, one, other, kept in cases:
        path = tmp_path / "n.jsonl"
        write_json_lines(path, [{"id": first.id} | one, {"id": second.id} | other])
        notes = Notes(path, tokenizer, extra, 128, relevance=True).of([first, second], "train")
        assert notes.of_photo[first.image_id] is notes.of_post[kept]
        assert [notes.known(i, first.image_id).get("relevance") for i in range(2)] == [
            one.get("relevance"),
            other.get("relevance"),
        ]


# ------------------------------------------------------------------------------------------------- whole runs


def train_run(folder, data_dir, encoder_dir, cache_dir, *more):
    """(run folder, what was said) of one epoch on the demo posts."""
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", cache_dir, "--img-size", 64]
    flags += [
        "--text-encoder",
        encoder_dir,
        "--epochs",
        1,
        "--lr",
        1e-3,
        "--device",
        "cpu",
        "--run-dir",
        folder,
        *more,
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return train.main([str(flag) for flag in flags]), said.getvalue()


RUNS = {
    "given": (
        "--fusion",
        "cross-attention",
        "--relevance",
        "given",
        "--align",
        "supervised=0.1",
        "--extra",
        "post",
        "--decoder",
        "crf",
    ),
    "gate": ("--fusion", "film", "--relevance", "predicted"),
    "taught": ("--fusion", "film", "--relevance", "predicted", "--relevance-loss", 2),
    "prefix": ("--fusion", "prefix", "--extra", "photo", "--align", "contrastive=0.1"),
}


@pytest.fixture(scope="module")
def runs(demo_notes, data_dir, encoder_dir, cache_dir, tmp_path_factory):
    """{name: (folder, what was said)} of `RUNS`, all but "gate" with notes."""
    root, (_, path) = tmp_path_factory.mktemp("runs"), demo_notes
    places = (data_dir, encoder_dir, cache_dir)
    return {
        name: train_run(root / name, *places, *flags, *(("--notes", path) if name != "gate" else ()))
        for name, flags in RUNS.items()
    }


def test_the_median_is_trains_alone_and_what_is_given_is_counted(runs, demo_notes):
    """Of 24 posts of train 18 have one, of 8 of valid and test 6, all of these above each of train's."""
    dataset, _ = demo_notes
    of_train = [note["relevance"] for note in rated(dataset)[:24] if "relevance" in note]
    config, said = read_config(runs["given"][0]), runs["given"][1]
    assert config["relevance_median"] == np.median(of_train) < 0.9 and len(of_train) == 18
    for split, count, all_of in (("train", 18, 24), ("valid", 6, 8), ("test", 6, 8)):
        line = f"           {split}: relevance given of {count} of {all_of} posts with a photo, "
        line += "that of the others is predicted\n"
        assert line in said and line.replace("the others", "all") in runs["taught"][1]
    assert "relevance given of" not in runs["gate"][1] + runs["prefix"][1]
    assert [
        read_config(folder)["relevance_median"] for name, (folder, _) in runs.items() if name != "given"
    ] == [None] * 3
    # Another median under another seed, of the share of train that it draws, is the same system.
    assert system_settings(config) == system_settings(config | {"relevance_median": 0.1, "seed": 2})
    assert system_settings(config) != system_settings(config | {"relevance_loss": 1.0})


class Photos:
    """A feature cache that has all photos but some."""

    def __init__(self, absent):
        self.absent = absent

    def has_photo(self, image_id):
        return image_id not in self.absent


def median_of(dataset, notes_file, tokenizer, absent, *more):
    args = train.parse_args(["--dataset", "demo", "--notes", str(notes_file), *more])
    notes, config = (
        Notes(notes_file, tokenizer, args.extra, 128, relevance=True), vars(args) | {"labels": dataset.labels}
    )
    posts = {
        split: make_posts(config, tokenizer, examples, split, Photos(absent), notes)[0]
        for split, examples in dataset.examples.items()
    }
    return opening.median_relevance(args, posts)


def test_the_median_is_of_posts_with_a_photo(
    demo_notes, encoder_dir, tmp_path, capsys, monkeypatch, data_dir
):
    (dataset, path), tokenizer = demo_notes, load_tokenizer(encoder_dir)
    monkeypatch.setattr(train, "data_task", lambda *_: "ner")
    absent = [example.image_id for example in dataset.examples["train"][12:]]
    supervised = ("--align", "supervised=1")
    made = median_of(dataset, path, tokenizer, absent, *supervised)
    assert made == np.median([i / 32 for i in range(12) if i % 4])
    assert (
        "train: relevance given of 9 of 12 posts with a photo, the others take no part in supervised"
        in capsys.readouterr().out
    )
    assert median_of(dataset, path, tokenizer, [], "--relevance", "given") is None
    notes = [{key: value for key, value in note.items() if key != "relevance"} for note in rated(dataset)]
    write_json_lines(tmp_path / "bare.jsonl", notes)
    for more in (supervised, ("--relevance", "given", "--extra", "post"), ("--relevance", "predicted")):
        with pytest.raises(
            ValueError, match="bare.jsonl: no relevance of any post of train that has a photo"
        ):
            median_of(dataset, tmp_path / "bare.jsonl", tokenizer, [], *more)
    assert (
        median_of(
            dataset, tmp_path / "bare.jsonl", tokenizer, [], "--relevance", "predicted", "--extra", "post"
        )
        is None
    )
    write_json_lines(
        tmp_path / "low.jsonl", [note | {"relevance": 0.25 * (i == 0)} for i, note in enumerate(notes)]
    )
    with pytest.raises(
        ValueError,
        match="relevances below train's median and others, and none of .*low.jsonl is below it, 0$",
    ):
        median_of(dataset, tmp_path / "low.jsonl", tokenizer, [], *supervised)


def test_new_losses_are_logged_with_their_weights(runs):
    logs = {name: json.loads((folder / "log.jsonl").read_text()) for name, (folder, _) in runs.items()}
    losses = {name: {key for key in log if key.startswith("loss_")} for name, log in logs.items()}
    assert losses == {
        "given": {"loss_supervised", "loss_relevance"},
        "gate": set(),
        "taught": {"loss_relevance"},
        "prefix": {"loss_contrastive"},
    }
    assert all(logs[name][key] > 0 for name, keys in losses.items() for key in keys)
    loaded, _, _ = load_run(runs["taught"][0])
    assert loaded.loss_weights == {"labels": 1.0, "relevance": 2.0}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reads_back_and_its_image_check_moves_relevance(runs, name):
    folder, _ = runs[name]
    model, config, dataset, shown = opening.open_run(folder, "test", "cpu")
    recorded = read_predictions(folder / "predictions-test.jsonl")
    ids = [example.image_id for example in shown.examples]

    def answers(swap):
        return predict_posts(model, shown.showing(swap), config["labels"], 3, "cpu", "float32")

    again = answers(None)
    assert [r["predicted"] for r in again] == [r["predicted"] for r in recorded]
    for a, b in zip(again, recorded, strict=True):
        np.testing.assert_allclose(a["probability"], b["probability"], atol=1e-5)
    reads = name in ("given", "taught")
    own = [note.get("relevance") for note in rated(dataset)[-8:]]
    assert [r.get("relevance") for r in recorded] == (own if reads else [None] * 8)
    assert ["extra" in r for r in recorded] == [name in ("given", "prefix")] * 8
    swap = shuffled_photos(ids, shown.cache, 1, shown.notes)
    moved = [r.get("relevance") for r in answers(swap)]
    assert (
        moved == ([own[ids.index(swap[i])] for i in ids] if reads else [None] * 8)
        and (moved != own) == reads
        or not reads
    )
    blind = answers(dict.fromkeys(ids))
    assert all(r.get("relevance") is None and not r["photo"] for r in blind)
    check = image_check(folder, "test", 2, "cpu")
    assert check["photos"] == 8 and verdict(config, check).startswith("true - shuffled")
    assert check["none"]["token"] == pytest.approx(score(blind)["token"])


def test_notes_are_wanted_and_refused_as_with_a_second_segment(runs, demo_notes, tmp_path):
    _, path = demo_notes
    other = tmp_path / "other.jsonl"
    other.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="not the notes the run was trained with"):
        opening.open_run(runs["taught"][0], "test", "cpu", notes=other)
    for script in (
        opening.open_run,
        lambda folder, *_, notes: report.main(["--run", str(folder), "--notes", str(notes)]),
    ):
        with pytest.raises(ValueError, match="the run read none; leave it out"):
            script(runs["gate"][0], "test", "cpu", notes=path)


def test_shuffled_photos_bring_their_relevance(demo_notes, data_dir, encoder_dir, cache_dir, tmp_path):
    dataset, path = demo_notes
    more = ("--fusion", "film", "--relevance", "given", "--notes", path, "--shuffle-photos")
    folder, _ = train_run(tmp_path / "run", data_dir, encoder_dir, cache_dir, *more)
    own = {
        example.image_id: note.get("relevance")
        for example, note in zip(dataset.examples["test"], rated(dataset)[-8:], strict=True)
    }
    shown = opening.open_run(folder, "test", "cpu")[-1]
    swap = shuffled_photos(list(own), shown.cache, 1337, shown.notes)
    records = read_predictions(folder / "predictions-test.jsonl")
    assert [record["relevance"] for record in records] == [
        own[swap[record["image_id"]]] for record in records
    ]
    page = report.main(["--run", str(folder)]).read_text(encoding="utf-8")
    assert "nothing that was written with a photo in view" in page and '"relevance":"0.' not in page


def test_new_posts_bring_their_relevance(runs, demo_notes, data_dir, capsys):
    (dataset, _), (folder, _) = demo_notes, runs["given"]
    predictor = predict.Predictor(folder, "cpu", "random")
    given = []
    for example, note in zip(dataset.examples["test"], rated(dataset)[-8:], strict=True):
        image = data_dir / "demo" / "images" / f"{example.image_id}.jpg"
        given.append(
            {"words": list(example.words), "image": str(image)} | {k: v for k, v in note.items() if k != "id"}
        )
    for answer, post, record in zip(
        predictor(given), given, read_predictions(folder / "predictions-test.jsonl"), strict=True
    ):
        wanted = predict.entities(record, None, None)
        assert [(e["type"], e["words"]) for e in answer["entities"]] == [
            (e["type"], e["words"]) for e in wanted
        ]
        assert answer.get("note") == (None if "relevance" in post else "no relevance given: it was predicted")
    blind = {key: value for key, value in given[1].items() if key != "image"}
    assert "note" not in predictor(blind)  # without a photo there is nothing to predict
    irrelevant = predictor(given[1] | {"relevance": 0})
    assert irrelevant["photo"] and irrelevant["entities"] == predictor(blind | {"relevance": 0.3})["entities"]
    assert predictor(given[1] | {"relevance": 17})["error"].startswith(
        "relevance must be a number from 0 to 1, not 17"
    )
    flags = ["--text", "so good", "--about-post", "x", "--device", "cpu", "--weights", "random"]
    capsys.readouterr()
    predict.main(["--run", str(folder), *flags, "--image", given[1]["image"], "--relevance", "0.8", "--json"])
    out, err = capsys.readouterr()
    assert (
        json.loads(out)
        == predictor({"text": "so good", "about_post": "x", "image": given[1]["image"], "relevance": 0.8})
        and not err
    )
    predict.main(["--run", str(folder), *flags, "--image", given[1]["image"]])
    assert capsys.readouterr().err == "no relevance given: it was predicted\n"
    with pytest.raises(
        ValueError,
        match="--relevance does not go with .*taught, which finds entities in text and image; leave it out",
    ):
        predict.main(
            ["--run", str(runs["taught"][0]), "--text", "so good", "--relevance", "0.8", "--device", "cpu"]
        )
    assert predict.Predictor(runs["taught"][0], "cpu", "random")(
        {"text": "so good", "relevance": 17}
    ).keys() == {"id", "photo", "entities"}
    with pytest.raises(SystemExit):
        predict.parse_args(["--run", "r", "--text", "x", "--relevance", "1.5"])
    assert "1.5 is not from 0 to 1" in capsys.readouterr().err


def test_a_prefix_answers_new_posts_with_and_without_a_photo(runs, demo_notes, data_dir):
    (dataset, _), (folder, _) = demo_notes, runs["prefix"]
    predictor, example = predict.Predictor(folder, "cpu", "random"), dataset.examples["test"][0]
    post = {"words": list(example.words), "about_photo": "photo 0"}
    seen, blind = predictor(
        [post | {"image": str(data_dir / "demo" / "images" / f"{example.image_id}.jpg")}, post]
    )
    assert (seen["photo"], blind["photo"]) == (True, False) and "note" not in seen and "note" not in blind
    record = read_predictions(folder / "predictions-test.jsonl")[0]
    assert [(e["type"], e["words"]) for e in seen["entities"]] == [
        (e["type"], e["words"]) for e in predict.entities(record, None, None)
    ]


def page_of(folder, output):
    text = report.main(["--run", str(folder), "--output", str(output)]).read_text(encoding="utf-8")
    return json.loads(
        text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_page_shows_a_given_relevance_and_where_a_prefix_looked(runs, demo_notes, tmp_path, name):
    page, dataset = page_of(runs[name][0], tmp_path / "page.html"), demo_notes[0]
    posts, reads = {post["id"]: post for post in page["posts"]}, name in ("given", "taught")
    for example, note in zip(dataset.examples["test"], rated(dataset)[-8:], strict=True):
        said, post = {}, posts[example.id]
        said |= {"given": {"about_post": "so good"}, "prefix": {"about_photo": note["about_photo"]}}.get(
            name, {}
        )
        said |= {"relevance": f"{note['relevance']:.3f}"} if reads and "relevance" in note else {}
        assert post.get("said", {}) == said
        assert ("maps" in post) == (name in ("given", "prefix"))
        if name == "prefix":
            assert np.allclose(
                np.array(post["maps"]["places"])[np.array(post["maps"]["places"]) > 0], 1, atol=2e-3
            )
    sha = read_config(runs[name][0])["notes_sha256"]
    texts, relevance = (
        ": 8 of 8 posts with a note, 0 without",
        "relevance of the photo: of 6 of 8 posts given",
    )
    said = {
        "given": f"--extra post{texts}; {relevance}",
        "taught": relevance,
        "prefix": f"--extra photo{texts}",
    }
    assert page["facts"]["Notes"] == (
        "not used" if name == "gate" else f"notes.jsonl ({sha[:16]}), {said[name]}"
    )
    label = {
        "given": "Relevance of the photo, as given",
        "taught": "Relevance of the photo, as given; the run used its own",
    }
    assert page["said"].get("relevance") == label.get(name)


@pytest.mark.parametrize("flags, said", [
    (("--fusion", "none", "--relevance", "predicted"), "--relevance: --fusion none has no layer behind"),
    (("--fusion", "prefix", "--relevance", "predicted"), "--fusion prefix has no layer behind the encoder"),
    (("--model", "blip", "--relevance", "predicted"), "--relevance: blip has no layer"),
    (("--model", "vilt", "--relevance", "given", "--notes", "n"), "--relevance: vilt has no layer"),
    (("--relevance", "given"), "--relevance given: taken from notes; add --notes FILE"),
    (("--align", "supervised=1"), "--align supervised: taken from notes; add --notes FILE"),
    (("--align", "supervised=1", "--extra", "post"), "--extra post and --align supervised: taken from notes"),
    (("--relevance-loss", "1"), "--relevance-loss: it teaches what --notes give"),
    (("--relevance", "predicted", "--relevance-loss", "1"), "--relevance-loss: it teaches"),
    (("--relevance", "predicted", "--relevance-loss", "-1"), "-1 is not from 0"),
    (("--relevance", "often"), "invalid choice"),
    (("--notes", "n", "--align", "contrastive=1"), "--notes: nothing reads them; add --extra post, --"),
    (("--model", "blip", "--fusion", "prefix"), "--fusion prefix: blip has a fusion of its own"),
    (("--model", "vilt", "--fusion", "prefix"), "--fusion prefix: vilt has a fusion of its own"),
    (("--model", "blip", "--align", "supervised=1", "--notes", "n"), "--align: blip has no cached regions"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(list(flags))
    assert said in capsys.readouterr().err


def test_run_folders_tell_relevance_and_prefix():
    names = {
        ("--relevance", "predicted"): "film-relevance-predicted",
        ("--fusion", "prefix", "--heads", "4"): "prefix-heads4",
        ("--relevance", "predicted", "--notes", "n"): "film-relevance-predicted-notes",
        ("--relevance", "given", "--notes", "n", "--relevance-loss", "1"): "film-relevance-given-loss1",
        ("--align", "supervised=.1", "--notes", "n", "--extra", "post"): "film-supervised0.1-extra-post",
    }  # fmt: skip
    for flags, name in names.items():
        assert train.parse_args(list(flags)).run_dir == f"runs/twitter2017-roberta-resnet50-{name}-s1337"


@pytest.mark.parametrize("more, said", [
    (("--max-len", 510), "--max-len 510 and the 4 soft tokens of --fusion prefix: .* takes 512 in all"),
    (("--extra", "photo", "--extra-len", 380), "-len 128 and --extra-len 380 and the 4 soft .* takes 512"),
    (("--heads", 7), "7 heads do not divide token states of width 64"),
])  # fmt: skip
def test_what_has_no_room_is_one_line_before_anything_is_written(
    demo_notes, data_dir, encoder_dir, cache_dir, tmp_path, more, said
):
    more = (*more, "--notes", demo_notes[1]) if "--extra" in more else more
    with pytest.raises(ValueError, match=said):
        train_run(tmp_path / "run", data_dir, encoder_dir, cache_dir, "--fusion", "prefix", *more)
    assert not (tmp_path / "run").exists()


def test_the_longest_input_of_a_prefix_fits(folders, data_dir):
    """RoBERTa's kind spends two positions on padding: 62 are left, 58 beside the soft tokens."""
    model, tokenizer = load(folders, "roberta", fusion="prefix")
    example = replace(
        load_dataset("demo", data_dir).examples["test"][0], words=("good",) * 30, labels=("O",) * 30
    )
    (row,), _ = encode(tokenizer, [example], LABELS, 58)
    assert len(row["input_ids"]) == 58
    inputs = collate([row], 1) | {
        "regions": torch.randn(1, 2, DV),
        "region_mask": torch.ones(1, 2, dtype=torch.bool),
    }
    assert model(inputs).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="index 64 is out of bounds"):
        (row,), _ = encode(tokenizer, [example], LABELS, 59)
        model(collate([row], 1) | {key: inputs[key] for key in ("regions", "region_mask")})
