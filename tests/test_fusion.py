"""Promises of fusion.py, for layers as they start and with noise; formulas against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

import fusion as layers
from fusion import FUSIONS, Fusion, pyramid_levels

D, DV, HEADS = 24, 20, 4
HEAD_SLICES = [slice(start, start + D // HEADS) for start in range(0, D, D // HEADS)]
NAMES = [name for name, layer in FUSIONS.items() if not layer.soft_tokens]
TRAINED = [name for name in NAMES if name != "none"]
HEADED = ["cross-attention", "bimodal", "pyramid"]
WEIGHTED = ["attention", "cross-attention", "bimodal", "co-attention", "pyramid", "saliency"]
ORDERED = ["pyramid"]  # these read where a region lies, so its order says something
GARBAGE = [1, 1e4, 1e30, math.inf, math.nan]  # 1e30 is finite in float32, its square is not

# A fresh film is text only, a fresh bias often zero: noise on the parameters shows what the start would hide.
CASES = [(name, noise) for name in NAMES for noise in (0, 0.3) if name in TRAINED or not noise]
every_case = pytest.mark.parametrize("name, noise", CASES)


class Careless(Fusion):
    """A layer of one's own that knows of no mask; it answers in another type, and weighs all alike."""

    weighs = True

    def __init__(self, text_dim, region_dim):
        super().__init__()
        self.linear = torch.nn.Linear(region_dim, text_dim)

    def fuse(self, words, text_mask, regions, region_mask, need_weights):
        states = words + words.sum(1, keepdim=True) + self.linear(regions.sum(1))[:, None]
        return states.double(), torch.ones(*words.shape[:2], regions.shape[1])


every_case_and_ones_own = pytest.mark.parametrize("name, noise", [*CASES, ("careless", 0)])


def grid_of(region_mask):
    """A region_grid [B, 2] for posts of so many real regions: as square as can be, the rest before it."""
    count = region_mask.sum(-1)
    rows = count.sqrt().long().clamp(min=1)
    return torch.stack((rows, count // rows), -1)


def build(name, *args, **more):
    """A layer that takes the four arguments of all; one that reads a grid is given `grid_of` the mask."""
    torch.manual_seed(0)
    fusion = (FUSIONS | {"careless": Careless})[name](*args, **more)

    def add_grid(_, args, more):
        return args, {"region_grid": grid_of(layers.as_mask(args[3], args[2]))} | more

    if "region_grid" in fusion.reads:
        fusion.register_forward_pre_hook(add_grid, with_kwargs=True)
    return fusion


def make(name, noise=0.3):
    more = {"heads": HEADS} if name in HEADED else {}
    fusion = build(name, D, DV, **more).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += noise * torch.randn_like(parameter)
    return fusion


def batch(seed=1):
    """Four ragged posts, the last without photo. The first has a masked region between real ones."""
    generator = torch.Generator().manual_seed(seed)
    text, regions = torch.randn(4, 6, D, generator=generator), torch.randn(4, 5, DV, generator=generator)
    text_mask = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    region_mask = torch.arange(5) < torch.tensor([5, 1, 4, 0])[:, None]
    region_mask[0, 1] = False
    return text, text_mask, regions, region_mask


def spoil(values, mask, scale):
    """`values` with `scale` times random signs and sizes where `mask` is False."""
    garbage = scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    return torch.where(mask[..., None], values, garbage.to(values.dtype))


def gradients(fusion, text, text_mask, regions, region_mask):
    """Of a loss on the real tokens, for text, regions and each parameter; zeros where it does not reach."""
    text, regions = text.clone().requires_grad_(), regions.clone().requires_grad_()
    loss = fusion(text, text_mask, regions, region_mask)[text_mask].square().sum()
    return torch.autograd.grad(loss, [text, regions, *fusion.parameters()], materialize_grads=True)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(actual, expected):
    """Bit for bit, where NaN is the same as NaN and None as None."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@every_case_and_ones_own
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scale", GARBAGE)
def test_what_is_masked_changes_nothing_and_padding_stays(name, noise, dtype, scale):
    """Zero times NaN is NaN: a forward pass that hides what is masked may still let it into the gradients."""
    fusion, (text, text_mask, regions, region_mask) = make(name, noise), batch()
    regions = regions.to(dtype)
    spoilt = spoil(text, text_mask, scale), text_mask, spoil(regions, region_mask, scale), region_mask
    expected, expected_weights = fusion(text, text_mask, regions, region_mask, return_weights=True)
    fused, weights = fusion(*spoilt, return_weights=True)
    same(fused, torch.where(text_mask[..., None], expected, spoilt[0]))
    if weights is not None:
        assert torch.equal(weights[text_mask], expected_weights[text_mask])
    same(gradients(fusion, *spoilt), gradients(fusion, text, text_mask, regions, region_mask))


@every_case
def test_order_and_scale_of_regions_and_asking_for_weights_change_nothing(name, noise):
    fusion, (text, text_mask, regions, region_mask) = make(name, noise), batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    expected, expected_weights = fusion(text, text_mask, regions, region_mask, return_weights=True)
    assert (expected_weights is None) == (name not in WEIGHTED)
    close(fusion(text, text_mask, regions, region_mask), expected)
    for scale in (1e-3, 1e3):
        close(fusion(text, text_mask, scale * regions, region_mask), expected, 1e-4)
    if name not in ORDERED:
        turned = regions[:, order], region_mask[:, order]
        fused, weights = fusion(text, text_mask, *turned, return_weights=True)
        close(fused, expected)
        assert weights is None or torch.allclose(weights, expected_weights[..., order], 1e-5, 1e-5)


@every_case_and_ones_own
@pytest.mark.parametrize("training", [False, True])
def test_no_photo_leaves_text_as_it_came_and_gradients_finite(name, noise, training):
    fusion, (text, text_mask, regions, region_mask) = make(name, noise).train(training), batch()
    assert all(found.isfinite().all() for found in gradients(fusion, text, text_mask, regions, region_mask))
    regions, nothing = spoil(regions, region_mask, math.nan), torch.zeros_like(region_mask)
    assert torch.equal(fusion(text, text_mask, regions, region_mask)[3], text[3])
    assert torch.equal(fusion(text[3:], text_mask[3:], regions[3:], region_mask[3:]), text[3:])
    assert torch.equal(fusion(text, text_mask, regions, nothing), text)
    # Where no post has a photo, the loss is of the text alone.
    of_text, *others = gradients(fusion, text, text_mask, regions, nothing)
    assert torch.equal(of_text, 2 * text * text_mask[..., None])
    assert not any(gradient.any() for gradient in others)  # NaN counts as any


@every_case_and_ones_own
def test_masks_may_be_numbers_and_none_means_all_are_real(name, noise):
    fusion, (text, text_mask, regions, region_mask) = make(name, noise), batch()
    expected = fusion(text, text_mask, regions, region_mask, return_weights=True)
    same(fusion(text, text_mask.long(), regions, 7 * region_mask.int(), return_weights=True), expected)
    ones = torch.ones_like(text_mask), torch.ones_like(region_mask)
    expected = fusion(text, ones[0], regions, ones[1], return_weights=True)
    same(fusion(text, None, regions, None, return_weights=True), expected)


@every_case
def test_batched_equals_one_by_one(name, noise):
    fusion, (text, text_mask, regions, region_mask) = make(name, noise), batch()
    fused, weights = fusion(text, text_mask, regions, region_mask, return_weights=True)
    for i in range(len(text)):
        # No photo: one masked region.
        t, r = text_mask[i], region_mask[i] if region_mask[i].any() else slice(0, 1)
        alone, alone_weights = fusion(text[i, t][None], text_mask[i, t][None], regions[i, r][None],
                                      region_mask[i, r][None], return_weights=True)  # fmt: skip
        close(fused[i, t], alone[0])
        if name in WEIGHTED:
            close(weights[i, t][:, r], alone_weights[0])


@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_reaches_every_parameter_of_a_fresh_layer_within_three_steps(name):
    """What starts at zero hides what lies before it from the first gradient, and must not do so for long."""
    _, _, *of_parameters = gradients(make(name), *batch())
    assert of_parameters and all(gradient.any() for gradient in of_parameters)
    fusion, inputs = make(name, noise=0), batch()
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-3)
    for _ in range(3):
        for parameter, gradient in zip(fusion.parameters(), gradients(fusion, *inputs)[2:], strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert all(gradient.any() for gradient in gradients(fusion, *inputs)[2:])


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights(name):
    fusion, (text, text_mask, regions, region_mask) = make(name), batch()
    _, weights = fusion(text, text_mask, regions, region_mask, return_weights=True)
    assert weights.shape == (4, 6, 5)
    assert (weights >= 0).all() and not weights.masked_select(~region_mask[:, None]).any()
    photo = region_mask.any(1, keepdim=True).float().expand(-1, 6)
    if name == "pyramid":  # the rest went to coarser levels, where a place has no weight of its own
        assert (weights.sum(-1) < 0.99).all() and torch.equal(weights.sum(-1) > 0.01, photo > 0)
        return
    close(weights.sum(-1)[text_mask], photo[text_mask])
    assert torch.pdist(weights[0]).min() > 1e-3  # each token of the first post has weights of its own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_layer_is_text_only(name, training):
    text, text_mask, regions, region_mask = batch()
    fresh = make(name, noise=0).train(training)
    assert torch.equal(fresh(text, text_mask, regions, region_mask), text)
    assert name != "none" or torch.equal(fresh(text, text_mask, None, None), text)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_fresh_layer_does_not_weigh_all_regions_alike(name):
    """At real widths: unit-length regions of 2048 channels must still make keys that differ."""
    fusion = build(name, 384, 2048).eval()
    text, regions = torch.randn(4, 6, 384), torch.randn(4, 49, 2048)
    masks = torch.ones(4, 6).bool(), torch.ones(4, 49).bool()
    _, weights = fusion(text, masks[0], regions, masks[1], return_weights=True)
    weights = weights / weights.sum(-1, keepdim=True)  # of the pyramid's last level
    entropy = -(weights * weights.log()).sum(-1) / math.log(49)  # [B, T]; 1 = uniform
    assert entropy.max() < 0.9999 and entropy.min() > 0.9


def find_asked_region(name, steps, width, region_dim=128, size=32, things=8):
    """Accuracy by step of a layer and a linear head that learn to read the one region a token asks for.

    A photo has 49 regions, each showing one of 8 things in one of 4 colours; a token names the thing that a
    single region shows, and the answer is that region's colour: chance is 0.25.
    """
    torch.manual_seed(0)
    shapes, colours = torch.randn(things, region_dim), torch.randn(4, region_dim)
    asks = torch.randn(things, width)
    layer, head = build(name, width, region_dim, dropout=0.0), torch.nn.Linear(width, 4)
    parameters, rows, correct = [*layer.parameters(), *head.parameters()], torch.arange(size), []
    optimizer = torch.optim.AdamW(parameters, lr=1.1e-3, weight_decay=0.01)  # as train.py trains a fusion
    for _ in range(steps):
        asked, place = torch.randint(things, (size,)), torch.randint(49, (size,))
        shown = (asked[:, None] + torch.randint(1, things, (size, 49))) % things  # anything but what is asked
        shown[rows, place] = asked
        colour = torch.randint(4, (size, 49))
        masks = torch.ones(size, 1).bool(), torch.ones(size, 49).bool()
        logits = head(layer(asks[asked][:, None], masks[0], shapes[shown] + colours[colour], masks[1]))[:, 0]
        correct.append((logits.argmax(-1) == colour[rows, place]).float().mean())
        F.cross_entropy(logits, colour[rows, place]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(correct)


@pytest.mark.parametrize("name, width, steps", [
    ("attention", 128, 300), ("cross-attention", 64, 300), ("bimodal", 64, 300), ("co-attention", 64, 400),
    ("pyramid", 64, 300),
])  # fmt: skip
def test_finds_the_region_that_the_token_asks_for(name, width, steps):
    assert find_asked_region(name, steps, width)[-100:].mean() >= 0.95


def unit(region):
    centred = region - region.mean()
    return centred / centred.square().sum().sqrt()


def softmax(scores):
    exponentials = torch.stack(scores).exp()
    return exponentials / exponentials.sum()


def mix(weights, values):
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def film_reference(layer, tokens, regions):
    delta, beta = layer.generator(unit(regions.mean(0))).chunk(2)
    return [(1 + delta) * token + beta for token in tokens], None


def attention_reference(layer, tokens, regions):
    regions, fused, weights = [layer.regions.linear.weight @ unit(region) for region in regions], [], []
    for h in tokens:
        scores = [layer.score(torch.tanh(layer.token(h) + layer.region(v)))[0] for v in regions]
        weights.append(softmax(scores))
        c = mix(weights[-1], [layer.context(v) for v in regions])
        fused.append(h + torch.sigmoid(layer.gate(torch.cat((h, c)))) * c)
    return fused, weights


def multi_head_reference(inner, h, states):
    """(context [D], weights of the states) of one token."""
    of_query, of_key, of_value = zip(inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3), strict=True)
    keys, values = ([weight @ v + bias for v in states] for weight, bias in (of_key, of_value))
    query = of_query[0] @ h + of_query[1]
    heads = [softmax([query[s] @ key[s] / math.sqrt(D / HEADS) for key in keys]) for s in HEAD_SLICES]
    mixed = [mix(w, [value[s] for value in values]) for w, s in zip(heads, HEAD_SLICES, strict=True)]
    return inner.out_proj(torch.cat(mixed)), sum(heads) / HEADS


def cross_attention_reference(layer, tokens, regions):
    regions, fused, weights = [layer.regions.linear.weight @ unit(region) for region in regions], [], []
    for h in tokens:
        context, attended = multi_head_reference(layer.attention, h, regions)
        x = h + context
        hidden = layer.feed_forward[0](layer.norm(x))
        fused.append(x + layer.feed_forward[3](hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2))  # GELU
        weights.append(attended)
    return fused, weights


def bimodal_reference(layer, tokens, regions):
    regions = [layer.regions.linear.weight @ unit(region) for region in regions]
    contexts, weights = [[] for _ in tokens], [0] * len(tokens)
    for s in HEAD_SLICES:
        affinity = [[layer.query(h)[s] @ layer.key(v)[s] / math.sqrt(D / HEADS) for v in regions]
                    for h in tokens]  # fmt: skip
        enriched = []
        for r, v in enumerate(regions):
            said = mix(softmax([row[r] for row in affinity]), [layer.token_value(h)[s] for h in tokens])
            enriched.append(layer.region_value(v)[s] + said)
        for t, row in enumerate(affinity):
            contexts[t].append(mix(softmax(row), enriched))
            weights[t] = weights[t] + softmax(row) / HEADS
    fused = []
    for h, context in zip(tokens, map(torch.cat, contexts), strict=True):
        z = torch.sigmoid(layer.gate(torch.cat((context, h))))
        of_image, of_text = torch.tanh(layer.image_unit(context)), torch.tanh(layer.token_unit(h))
        fused.append(h + z * of_image + (1 - z) * of_text)
    return fused, weights


def co_attention_reference(layer, tokens, regions):
    regions, fused, weights = [layer.regions.linear.weight @ unit(region) for region in regions], [], []
    for h in tokens:
        scores = [layer.score(torch.tanh(layer.token(h) + layer.region(v)))[0] for v in regions]
        weights.append(softmax(scores))
        seen = mix(weights[-1], [layer.region_value.weight @ v for v in regions])
        back = [layer.back_score(torch.tanh(layer.back_token(j) + layer.back_seen(seen)))[0] for j in tokens]
        said = mix(softmax(back), tokens)
        of_image, of_text = torch.tanh(layer.image_unit(seen)), torch.tanh(layer.token_unit(said))
        gate = torch.sigmoid(layer.gate(torch.cat((of_image, of_text))))
        mixed = gate * of_image + (1 - gate) * of_text
        kept = torch.sigmoid(layer.filter(torch.cat((h, mixed))))
        fused.append(h + layer.output.weight @ (kept * torch.tanh(layer.memory(mixed))))
    return fused, weights


def pyramid_reference(layer, tokens, regions):
    rows, columns = grid_of(torch.ones(len(regions), dtype=torch.bool)).tolist()
    before = len(regions) - rows * columns
    cells = F.adaptive_avg_pool2d(regions[before:].T.view(1, DV, rows, columns), 3).view(DV, 9).T
    levels = [regions.mean(0)[None], cells, regions[before:]]
    levels = [[layer.regions.linear.weight @ unit(v) for v in level] for level in levels]
    fused, weights = [], []
    for h in tokens:
        of_cells, _ = multi_head_reference(layer.cells, h, levels[1])
        of_places, attended = multi_head_reference(layer.places, h, levels[2])
        contexts = [layer.whole(levels[0][0]), of_cells, of_places]
        alpha = softmax([layer.score(torch.tanh(layer.token(h) + layer.level(c)))[0] for c in contexts])
        c = mix(alpha, contexts)
        fused.append(h + torch.sigmoid(layer.gate(torch.cat((h, c)))) * c)
        weights.append(torch.cat((torch.zeros(before), alpha[2] * attended)))
    return fused, weights


def saliency_reference(layer, tokens, regions):
    regions, fused, weights = [layer.regions.linear.weight @ unit(region) for region in regions], [], []
    of_salience, _, to_salience = layer.salient
    salience = [torch.sigmoid(to_salience(torch.tanh(of_salience(v))))[0] for v in regions]
    scores = [[layer.query(h) @ v / math.sqrt(D) for v in regions] for h in tokens]
    mean = [sum(column) / len(tokens) for column in zip(*scores, strict=True)]
    for h, row in zip(tokens, scores, strict=True):
        weights.append(softmax([(1 - q) * s + q * m for q, s, m in zip(salience, row, mean, strict=True)]))
        c = mix(weights[-1], regions) + h
        gate = layer.gates[0](torch.cat((c, h)))
        added = torch.where(gate > 0, gate, 0.01 * gate) * layer.shares[0](c)
        fused.append(h + added * min(1.0, (layer.bound * h.norm() / added.norm()).item()))
    return fused, weights


REFERENCES = {
    "film": film_reference, "attention": attention_reference, "cross-attention": cross_attention_reference,
    "bimodal": bimodal_reference, "co-attention": co_attention_reference, "pyramid": pyramid_reference,
    "saliency": saliency_reference,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINED)
def test_formula(name):
    layer, (text, text_mask, regions, region_mask) = make(name), batch()
    fused, weights = layer(text, text_mask, regions, region_mask, return_weights=True)
    for i in range(3):  # the posts with a photo
        t, r = text_mask[i], region_mask[i]
        expected, expected_weights = REFERENCES[name](layer, text[i, t], regions[i, r])
        close(fused[i, t], torch.stack(expected))
        if name in WEIGHTED:
            close(weights[i, t][:, r], torch.stack(expected_weights))


GRIDS = torch.tensor([[7, 7], [8, 8], [12, 12], [1, 1], [2, 5], [9, 16], [0, 0], [3, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pyramid_levels_are_torchs_adaptive_pooling(dtype):
    """Of grids of all sizes in one batch, class states before them, holes among them; one has no photo."""
    generator = torch.Generator().manual_seed(0)
    before, real = torch.tensor([0, 1, 0, 0, 2, 1, 3, 0]), torch.zeros(8, 160, dtype=torch.bool)
    for i, count in enumerate((before + GRIDS.prod(1))[:7]):
        real[i, torch.randperm(160, generator=generator)[:count]] = True
    regions = spoil(torch.randn(8, 160, DV, generator=generator).to(dtype), real, math.nan)
    (mean, photo), (cells, cell_mask), (places, place_mask) = pyramid_levels(regions, real, GRIDS)
    assert {level.dtype for level in (mean, cells, places)} == {torch.float32}
    assert torch.equal(photo, real.any(1, keepdim=True)) and torch.equal(cell_mask.any(1), cell_mask.all(1))
    for i, (rows, columns) in enumerate(GRIDS.tolist()):
        mine = regions[i, real[i]].float()
        if i == 7:
            assert not cell_mask[i].any() and not place_mask[i].any() and not mean[i].any()
            continue
        close(mean[i, 0], mine.mean(0))
        assert torch.equal(places[i, place_mask[i]], mine[before[i] :])
        assert torch.equal(cell_mask[i].all(), place_mask[i].any()) and place_mask[i].any() == (rows > 0)
        if rows:
            pooled = F.adaptive_avg_pool2d(mine[before[i] :].T.view(1, DV, rows, columns), 3)
            close(cells[i], pooled.view(DV, 9).T)


@torch.no_grad()
def test_pyramid_weighs_the_levels_there_are(monkeypatch):
    layer, (text, text_mask, regions, region_mask), seen = make("pyramid"), batch(), []
    softmax_of = layers.masked_softmax
    monkeypatch.setattr(layers, "masked_softmax", lambda *args: seen.append(softmax_of(*args)) or seen[-1])
    grid = grid_of(region_mask)
    grid[1] = 0  # one region, of the photo as a whole, and no place
    fused, weights = layer(text, text_mask, regions, region_mask, return_weights=True, region_grid=grid)
    (alpha,) = seen  # [B, T, 3]
    close(alpha.sum(-1), region_mask.any(1, keepdim=True).float().expand(-1, 6))
    assert (alpha[[0, 2]] > 0.01).all() and torch.equal(alpha[1], torch.tensor([1.0, 0, 0]).expand(6, -1))
    close(weights.sum(-1)[[0, 2]], alpha[[0, 2], :, 2])
    assert not weights[1].any()
    h, c = text[1, 0], layer.whole(layer.regions.linear.weight @ unit(regions[1, 0]))
    close(fused[1, 0], h + torch.sigmoid(layer.gate(torch.cat((h, c)))) * c)


def test_pyramid_sees_where_a_region_lies_and_needs_to_be_told():
    fusion, (text, text_mask, regions, region_mask) = make("pyramid"), batch()
    region_mask = torch.ones_like(region_mask)
    given = fusion(text, text_mask, regions, region_mask)
    assert (given - fusion(text, text_mask, regions.flip(1), region_mask)).abs().max() > 1e-2
    alone = FUSIONS["pyramid"](D, DV, heads=HEADS)
    with pytest.raises(ValueError, match=r"the pyramid pools places and needs region_grid \[B, 2\]"):
        alone(text, text_mask, regions, region_mask)


# ---------------------------------------------------------------------------- saliency and its second picture


def two_pictures(noise=0.3, **more):
    """(a saliency layer for two pictures, a batch: both, the photo alone, the second alone, and neither)."""
    torch.manual_seed(0)
    fusion = FUSIONS["saliency"](D, DV, pictures=2, **more).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += noise * torch.randn_like(parameter)
    text, text_mask, regions, region_mask = batch()
    region_mask[2] = False
    second = torch.randn(4, 3, DV, generator=torch.Generator().manual_seed(4))
    second_mask = torch.arange(3) < torch.tensor([2, 0, 3, 0])[:, None]
    given = {"text": text, "text_mask": text_mask, "regions": regions, "region_mask": region_mask}
    return fusion, given | {"generated": second, "generated_mask": second_mask}


def test_every_layer_says_what_it_reads_takes_and_gives():
    read = {name: layer.reads for name, layer in FUSIONS.items() if layer.reads}
    assert read == {"saliency": ("generated", "generated_mask"), "pyramid": ("region_grid",)}
    assert [name for name in NAMES if FUSIONS[name].has_heads] == HEADED
    assert [name for name in NAMES if FUSIONS[name].weighs] == WEIGHTED


@pytest.mark.parametrize("bound", [0, 0.1, 0.5])
def test_saliency_moves_no_token_by_more_than_its_bound(bound):
    fusion, given = two_pictures(noise=1.0, bound=bound)
    moved, own = (fusion(**given) - given["text"]).norm(dim=-1), given["text"].norm(dim=-1)
    assert (moved <= bound * own + 1e-5).all()
    assert bound == 0 or (moved > 0.99 * bound * own)[given["text_mask"]].any()  # and it is reached
    small = two_pictures(noise=0.01, bound=0.5)[0]
    free = two_pictures(noise=0.01, bound=1e9)[0]
    assert torch.equal(small(**given), free(**given))  # what is small passes whole


def test_a_missing_pictures_share_is_nothing():
    fusion, given = two_pictures()
    fused, weights = fusion(**given, return_weights=True)
    one = FUSIONS["saliency"](D, DV).eval()
    of_second = ("gates.1", "shares.1")
    one.load_state_dict({k: v for k, v in fusion.state_dict().items() if not k.startswith(of_second)})
    photo = {key: given[key] for key in ("text", "text_mask", "regions", "region_mask")}
    close(fused[1], one(**photo)[1])  # the post without second picture: as if there were none
    assert torch.equal(fused[3], given["text"][3]) and not weights[2:].any()
    close(fusion(**photo), one(**photo))
    for layer in (one.gates[0], one.shares[0]):  # the second alone, read with maps of its own
        which = "gates.1" if layer is one.gates[0] else "shares.1"
        layer.load_state_dict({name: fusion.state_dict()[f"{which}.{name}"] for name in ("weight", "bias")})
    close(fused[2], one(given["text"], given["text_mask"], given["generated"], given["generated_mask"])[2])
    # Without either picture everything is as it came; what is hidden may hold anything.
    none = given | {key: torch.zeros_like(given[key]) for key in ("region_mask", "generated_mask")}
    spoilt = none | {key: torch.full_like(given[key], math.nan) for key in ("regions", "generated")}
    assert torch.equal(fusion(**none), given["text"]) and torch.equal(fusion(**spoilt), given["text"])


@pytest.mark.parametrize("scale", GARBAGE)
def test_masked_content_of_a_second_picture_changes_nothing(scale):
    fusion, given = two_pictures()
    expected = fusion(**given, return_weights=True)
    spoilt = {kind: spoil(given[kind], given[mask], scale)
              for kind, mask in (("regions", "region_mask"), ("generated", "generated_mask"))}  # fmt: skip
    same(fusion(**given | spoilt, return_weights=True), expected)
    same(fusion(**given | {"generated_mask": given["generated_mask"].long()}, return_weights=True), expected)
    order = torch.tensor([2, 0, 1])
    turned = {key: given[key][:, order] for key in ("generated", "generated_mask")}
    close(fusion(**given | turned), expected[0])
    close(fusion(**given | {"generated": 1e3 * given["generated"]}), expected[0], 1e-4)


def test_two_pictures_batched_as_one_by_one_and_learnt_by_all_parameters():
    fusion, given = two_pictures()
    whole = fusion(**given)
    for i in range(4):
        close(fusion(**{key: value[i : i + 1] for key, value in given.items()})[0], whole[i])
    whole[given["text_mask"]].square().sum().backward()
    assert all(parameter.grad.any() for parameter in fusion.parameters())
    assert torch.equal(two_pictures(noise=0)[0](**given), given["text"])
    with pytest.raises(ValueError, match="for one picture was given two; make it with pictures=2"):
        make("saliency")(**given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, dtype):
    fusion, (text, text_mask, regions, region_mask) = make(name), batch()
    expected = fusion(text, text_mask, regions, region_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(text.to(dtype), text_mask, regions, region_mask)
    assert fused.dtype == dtype
    assert (fused - expected).abs().max() < 3e-2 * expected.abs().max()
