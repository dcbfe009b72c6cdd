"""The bottleneck against torch.distributions, what must change nothing, and its place in the model."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from align import masked_mean
from encoding import collate, encode
from features import FeatureCache
from fusion import FUSIONS, clean, unit_length
from parts.datasets import load_dataset
from parts.model import LEFT_OUT
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder
from stages import Bottleneck, Code

D, DV, HEADS = 24, 20, 4


def make(noise=0.3, dropout=0.0, kind=Bottleneck, sizes=(D, DV)):
    torch.manual_seed(0)
    made = kind(*sizes, HEADS, dropout).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * torch.randn_like(parameter)
    return made


def batch(seed=1):
    """Four ragged posts; the second has no second picture, the last no picture at all."""
    generator = torch.Generator().manual_seed(seed)
    text, photo, second = (torch.randn(4, n, d, generator=generator) for n, d in ((6, D), (5, DV), (3, DV)))
    text_mask = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    photo_mask = torch.arange(5) < torch.tensor([5, 1, 4, 0])[:, None]
    second_mask = torch.arange(3) < torch.tensor([3, 0, 2, 0])[:, None]
    photo_mask[0, 1] = False
    return text, text_mask, (photo, photo_mask), (second, second_mask)


def flat(made):
    """[text, states of each picture ..., divergences] of what a bottleneck returns."""
    text, pictures, kl = made
    return [text, *pictures, kl]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_divergence_is_torchs_over_real_positions_and_channels():
    code, (x, mask, _, _) = make(kind=Code, sizes=(D,)), batch()
    x = clean(x, mask)
    z, kl = code(x, mask)
    mu, sigma = code.mean(x, mask), ((code.log_variance(x, mask) - 4) / 2).exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0))
    for i in range(4):
        close(kl[i], expected[i, mask[i]].mean())
        close(z[i, mask[i]], mu[i, mask[i]])
    assert not z[~mask].any()


def test_divergence_is_zero_for_the_standard_normal_alone():
    code, (x, mask, _, _) = make(kind=Code, sizes=(D,)), batch()
    with torch.no_grad():
        for block in (code.mean, code.log_variance):
            block.norms[1].weight.zero_()
        code.mean.norms[1].bias.fill_(0)
        code.log_variance.norms[1].bias.fill_(4)
        assert not code(clean(x, mask), mask)[1].any()
        for bias in (code.mean.norms[1].bias, code.log_variance.norms[1].bias):
            bias += 0.1
            assert (code(clean(x, mask), mask)[1] > 1e-3).all()
            bias -= 0.1


def test_evaluation_draws_nothing_and_training_around_it():
    bottleneck, given = make(), batch()
    with torch.no_grad():
        first, second = flat(bottleneck(*given)), flat(bottleneck(*given))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        text, text_mask = given[:2]
        torch.manual_seed(0)
        drawn, _, kl = bottleneck.train()(text.repeat(2000, 1, 1), text_mask.repeat(2000, 1))
        close(kl[:4], bottleneck.eval()(text, text_mask)[2])  # it is of the distribution, not of the draw
        x = clean(text, text_mask)
        sigma = ((bottleneck.text.log_variance(x, text_mask) - 4) / 2).exp()[text_mask]
        drawn = drawn.unflatten(0, (2000, 4))[:, text_mask]
        assert ((drawn.mean(0) - first[0][text_mask]).abs() < 5 * sigma / math.sqrt(2000)).all()
        assert ((drawn.std(0) / sigma - 1).abs() < 0.1).all()


def test_a_fresh_code_is_the_normed_state_under_little_noise():
    code, (x, mask, _, _) = make(noise=0, kind=Code, sizes=(D,)), batch()
    z, _ = code(x, mask)
    normed = torch.nn.functional.layer_norm(x, (D,))
    close(z[mask], normed[mask], 1e-3)
    noise = code.train()(x, mask)[0] - z
    assert 0.05 < noise[mask].std() < 0.3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_what_is_masked_changes_nothing(garbage, training):
    bottleneck, (text, text_mask, *pictures) = make(dropout=0.1).train(training), batch()

    def run(text, *pictures):
        torch.manual_seed(5)
        made = flat(bottleneck(text, text_mask, *pictures))
        loss = sum(
            part[mask].square().sum()
            for part, mask in zip(made, (text_mask, *(m for _, m in pictures)), strict=False)
        )
        return made, torch.autograd.grad(loss + made[-1].sum(), list(bottleneck.parameters()))

    spoilt = [(states.masked_fill(~mask[..., None], garbage), mask) for states, mask in pictures]
    expected, wanted = run(text, *pictures)
    found, gradients = run(text.masked_fill(~text_mask[..., None], garbage), *spoilt)
    torch.testing.assert_close(
        found[0][~text_mask], torch.full_like(found[0][~text_mask], garbage), equal_nan=True
    )
    assert torch.equal(found[0][text_mask], expected[0][text_mask])
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(gradients, wanted, strict=True))
    assert all(not states[~mask].any() for states, (_, mask) in zip(found[1:], pictures, strict=False))


def test_batched_equals_one_by_one():
    bottleneck, given = make(), batch()
    together = flat(bottleneck(*given))
    text, text_mask, *pictures = given
    for i in range(4):
        kept = [mask[i] if mask[i].any() else slice(0, 1) for _, mask in pictures]
        own = [
            (states[i, k][None], mask[i, k][None]) for (states, mask), k in zip(pictures, kept, strict=True)
        ]
        alone = flat(bottleneck(text[i, text_mask[i]][None], text_mask[i, text_mask[i]][None], *own))
        for found, whole, k in zip(alone, together, (text_mask[i], *kept), strict=False):
            close(found[0], whole[i, k])
        close(alone[-1][0], together[-1][i])


def test_text_depends_on_no_picture_and_changes_without():
    bottleneck, (text, text_mask, photo, second) = make(), batch()
    coded, _, of_text = bottleneck(text, text_mask)
    with_both, _, of_all = bottleneck(text, text_mask, photo, second)
    assert (
        torch.equal(coded, with_both) and torch.equal(of_text[3], of_all[3]) and (of_text < of_all)[:3].all()
    )
    assert (coded - text)[text_mask].abs().amax(-1).min() > 1e-2


def test_both_pictures_are_read_alike_and_regions_have_no_order():
    bottleneck, (text, text_mask, photo, second) = make(), batch()
    _, (a, b), kl = bottleneck(text, text_mask, photo, second)
    _, (c, d), same = bottleneck(text, text_mask, second, photo)
    assert torch.equal(a, d) and torch.equal(b, c)
    close(kl, same)
    order = torch.tensor([3, 0, 4, 1, 2])
    _, (turned, _), same = bottleneck(text, text_mask, (photo[0][:, order], photo[1][:, order]), second)
    close(turned, a[:, order])
    close(same, kl)
    scaled = bottleneck(text, text_mask, (1e3 * photo[0], photo[1]), second)
    close(scaled[1][0], a, 1e-4)


def test_every_parameter_learns():
    bottleneck, given = make().train(), batch()
    text, pictures, kl = bottleneck(*given)
    (text[given[1]].square().sum() + sum(states.square().sum() for states in pictures) + kl.sum()).backward()
    assert all(parameter.grad.any() for parameter in bottleneck.parameters())


def test_autocast():
    bottleneck, given = make(), batch()
    expected = flat(bottleneck(*given))
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(bottleneck(given[0].bfloat16(), *given[1:]))
    assert found[0].dtype == torch.bfloat16 and found[-1].dtype == torch.float32
    mask = given[1]
    assert (found[0][mask] - expected[0][mask]).abs().max() < 0.1 and (
        found[-1] / expected[-1] - 1
    ).abs().max() < 0.05


def test_heads_must_divide():
    with pytest.raises(ValueError, match="5 heads do not divide token states of width 24"):
        Bottleneck(D, DV, heads=5)


# ------------------------------------------------------------------------------------------- in the model


@pytest.fixture(scope="module")
def parts(data_dir, cache_dir, encoder_dir):
    """(function that makes a model, a batch of valid with two pictures a post: two views of its photo)."""
    dataset, cache = load_dataset("demo", data_dir), FeatureCache(cache_dir / "demo-resnet50-64.h5")

    def build(fusion="saliency", generated="x.h5", **more):
        torch.manual_seed(0)
        encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.0)
        config = {
            "fusion": fusion,
            "task": "ner",
            "labels": dataset.labels,
            "heads": 4,
            "dropout": 0.0,
            "region_dim": 2048,
        }
        model = SYSTEMS["bert-resnet50"].model(
            encoder, LEFT_OUT | config | {"bottleneck": 0.1, "generated": generated} | more
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.2 * torch.randn_like(parameter) * (not name.startswith("encoder."))
        return model.eval(), tokenizer

    examples = dataset.examples["valid"]
    tokenizer = build()[1]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    photos = [example.image_id for example in examples]
    given = collate(rows, tokenizer.pad_token_id) | cache.read(photos) | cache.read_generated(
        photos, [1] * len(photos)
    )
    return build, given


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in ("none", "prefix")])
def test_any_fusion_reads_codes_and_the_divergence_is_a_loss(parts, fusion):
    build, given = parts
    model, _ = build(fusion, None)
    given = {key: value for key, value in given.items() if "generated" not in key}
    assert model.loss_weights == {"labels": 1.0, "bottleneck": 0.1}
    if "regions" in dict(model.fusion.named_children()):
        assert model.fusion.regions.linear.in_features == 64  # of the codes, not of the photo
    logits, _, losses = model(given, return_losses=True)
    text = model.encoder(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"]
    ).last_hidden_state
    photo = given["regions"], given["region_mask"]
    mask = given["attention_mask"].bool()
    text, (codes,), kl = model.bottleneck(text, mask, photo)
    close(losses["bottleneck"], kl)
    more = {key: given[key] for key in model.fusion.reads if key in given}
    fused = model.fusion(text, mask, codes, photo[1], **more)
    close(logits, model.head(fused, given))


def test_alignment_reads_codes_of_both_pictures(parts):
    build, given = parts
    model, _ = build(align={"matching": 0.9})
    losses = model(given, return_losses=True).losses
    mask = given["attention_mask"].bool()
    both = [(given["regions"], given["region_mask"]), (given["generated"], given["generated_mask"])]
    text = model.encoder(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
    text, codes, _ = model.bottleneck(text, mask, *both)
    matching, expected = model.align["matching"], 0
    for states, (_, seen), rows in zip(
        codes, both, (given["photo_row"], given["generated_row"]), strict=True
    ):
        expected = expected + matching(text, given["own_mask"], unit_length(states), seen, rows)
    close(losses["matching"], expected / 2)  # the mean over both
    alone = matching(text, given["own_mask"], unit_length(codes[0]), both[0][1], given["photo_row"])
    assert (2 * losses["matching"] - alone > 0.1).all()
    assert masked_mean(codes[0], both[0][1]).std(0).min() > 0  # posts differ


def test_without_any_picture_the_answer_depends_on_none(parts):
    build, given = parts
    model, _ = build()
    hidden = given | {key: torch.zeros_like(given[key]) for key in ("region_mask", "generated_mask")}
    expected, real = model(hidden).logits, given["word_starts"] >= 0
    for key in ("regions", "generated"):
        hidden[key] = torch.full_like(given[key], math.nan)
    assert torch.equal(model(hidden).logits[real], expected[real]) and expected[real].isfinite().all()
    for shown in ("region_mask", "generated_mask"):  # either of them tells
        made = model(given | {shown: torch.zeros_like(given[shown])}).logits
        assert (made - expected)[real].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize(
    "hidden", [(), ("region_mask",), ("generated_mask",), ("region_mask", "generated_mask")]
)
def test_every_parameter_gets_a_gradient_whatever_is_shown(parts, hidden):
    """Zeros will do where a picture is nowhere; with both shown, none has only zeros."""
    build, given = parts
    model, _ = build(align={"matching": 0.9}, decoder="crf")
    shown = given | {key: torch.zeros_like(given[key]) for key in hidden}
    losses = model.train()(shown, return_losses=True).losses
    model.total([losses[name].sum() for name in model.loss_weights], 30, 8).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    idle = [
        name for name, gradient in gradients.items() if not gradient.any() and not name.startswith("encoder.")
    ]
    assert hidden or not idle
