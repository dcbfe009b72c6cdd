"""The model against transformers' own classes and its own parts: photos, relevance, codes, soft tokens."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, PARTS
from encoders import SIZE, build
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoImageProcessor, BertConfig, BertForTokenClassification, BertModel
from transformers import BlipForImageTextRetrieval, RobertaConfig, RobertaModel, RobertaTokenizerFast
from transformers import ViltForTokenClassification

from encoding import MARKERS, PROBE, collate, encode
from features import FeatureCache
from fusion import FUSIONS, clean, unit_length
from parts.blip_vilt import Vilt
from parts.datasets import load_dataset
from parts.model import PICTURES, TextRegions
from parts.notes import Segments
from parts.systems import SYSTEMS
from parts.text_encoder import check_soft_tokens, load_text_encoder, longest_input

BEHIND = [name for name, layer in FUSIONS.items() if name != "none" and not layer.soft_tokens]
WORDS = [*"so excited about Paris today ! RT @fan : BBC again".split(), *PROBE]
LABELS = ("O", "B-PER", "I-PER")


def add_noise(model, size=0.2):
    """The model in eval mode, with noise on all parameters that are not its encoder's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += size * torch.randn_like(parameter)
    return model.eval()


def make(encoder_dir, dataset, fusion=None, system="bert-resnet50", cache=None, **options):
    """(model with noise on all new parameters, in eval mode; tokenizer)."""
    torch.manual_seed(0)
    encoder, tokenizer = load_text_encoder(str(encoder_dir), SYSTEMS[system].checkpoint, dataset.task, 0.1)
    config = {"fusion": fusion, "task": dataset.task, "labels": dataset.labels, "heads": 8, "dropout": 0.1,
              "text_encoder": str(encoder_dir), "region_dim": cache.region_dim if cache else 2048,
              "features_made": cache.attrs if cache else None}  # fmt: skip
    return add_noise(SYSTEMS[system].model(encoder, CONFIG | config | options)), tokenizer


def make_system(system, data_dir, cache_dir, dataset, **options):
    """(model, tokenizer, cache) of one of `PARTS`."""
    backbone, size, _, text = PARTS[system]
    cache = FeatureCache(cache_dir / f"{dataset.name}-{backbone}-{size}.h5")
    fusion = "cross-attention" if system in ("clip-bert", "bert-caption") else None
    return *make(data_dir / "demo" / text, dataset, fusion, system, cache, **options), cache


@pytest.fixture(params=["demo", "mnre"])
def dataset(request, data_dir):
    return load_dataset(request.param, data_dir)


def test_text_only_is_transformers_token_classifier(encoder_dir, data_dir):
    dataset = load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    reference = BertForTokenClassification.from_pretrained(encoder_dir, num_labels=len(dataset.labels)).eval()
    reference.classifier.load_state_dict(model.head.linear.state_dict())
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    with torch.no_grad():
        logits = model(collate(rows, tokenizer.pad_token_id)).logits
        for i, example in enumerate(dataset.examples["test"]):
            given = tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
            expected = reference(**given).logits[0]
            for word in range(len(example.words)):
                torch.testing.assert_close(logits[i, word], expected[given.word_to_tokens(word).start],
                                           rtol=1e-4, atol=1e-5)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["start", "mean"])
def test_relations_are_read_by_their_start_markers_or_by_means(encoder_dir, data_dir, pooling):
    """In a batch, against slices of the encoder's states of each post alone."""
    dataset = load_dataset("mnre", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none", pooling=pooling)
    rows, _ = encode(tokenizer, dataset.examples["valid"], dataset.labels, 128)
    logits = model(collate(rows, tokenizer.pad_token_id)).logits
    assert logits.shape == (8, len(dataset.labels))
    for row, answer in zip(rows, logits, strict=True):
        ids = row["input_ids"]
        states = model.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        places = [ids.index(tokenizer.convert_tokens_to_ids(marker)) for marker in MARKERS]
        head, tail = slice(places[0], places[1] + 1), slice(places[2], places[3] + 1)
        parts = [states[head.start], states[tail.start]]
        if pooling == "mean":  # of the post without [CLS] and [SEP]
            parts = [states[part].mean(0) for part in (head, tail, slice(1, -1))]
        torch.testing.assert_close(answer, model.head.linear(torch.cat(parts)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", *BEHIND, *PARTS])
def test_batched_equals_single_and_the_photo_counts(data_dir, encoder_dir, dataset, cache_dir, name):
    if name in PARTS:
        model, tokenizer, cache = make_system(name, data_dir, cache_dir, dataset)
    else:
        model, tokenizer = make(encoder_dir, dataset, name)
        cache = FeatureCache(cache_dir / f"{dataset.name}-resnet50-64.h5")
    examples, pad = dataset.examples["valid"], tokenizer.pad_token_id
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    photos = [None if i % 3 == 2 else example.image_id for i, example in enumerate(examples)]
    logits, weights, _ = model(collate(rows, pad) | cache.read(photos), return_weights=True)
    for i, row in enumerate(rows):
        alone = model(collate([row], pad) | cache.read(photos[i : i + 1])).logits[0]
        together = logits[i, : len(alone)] if dataset.task == "ner" else logits[i]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        if weights is not None:
            real = weights[i, : len(row["input_ids"])]
            photo = cache.read(photos[i : i + 1])["region_mask"][0]
            assert not real[:, ~photo].any()
            if name in ("vilt", "pyramid"):  # the rest went to words, or to coarser levels
                assert (real.sum(1) < 1).all() and (real[:, photo] > 0).all()
            else:
                torch.testing.assert_close(real.sum(1), torch.full((len(real),), float(photo.any())))
    without = model(collate(rows, pad) | cache.read([None] * len(rows))).logits
    real = collate(rows, pad)["labels"] >= 0
    assert (name == "none") == torch.equal(logits[real], without[real])
    if name not in PARTS:  # no photo is exactly text only
        text_only, _ = make(encoder_dir, dataset, "none")
        text_only.head.load_state_dict(model.head.state_dict())
        torch.testing.assert_close(without, text_only(collate(rows, pad)).logits, rtol=0, atol=0)


def test_a_word_without_a_piece_has_no_say(encoder_dir, data_dir):
    """What stands in the place of a word with no sub-token neither trains nor is answered."""
    dataset = load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    example = dataset.examples["test"][0]
    odd = type(example)(example.id, example.image_id, (*example.words, "\u200b"), (*example.labels, "B-PER"))
    (row,), counts = encode(tokenizer, [odd], dataset.labels, 128)
    assert counts["words_without_piece"] == 1 and row["word_starts"][-1] == -1 and row["labels"][-1] == -100
    with torch.no_grad():
        logits = model(collate([row], tokenizer.pad_token_id)).logits
    assert logits.shape[1] == len(odd.words) and logits.isfinite().all()


# ----------------------------------------------------------------------------------- CLIP+BERT, BLIP and ViLT


def open_photo(data_dir, image_id):
    return Image.open(data_dir / "demo" / "images" / f"{image_id.removesuffix('.jpg')}.jpg").convert("RGB")


def close(found, expected):
    """Equal but for the regions' float16, whose half unit in the last place is 2 ** -11."""
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@torch.no_grad()
def test_blip_is_transformers_image_text_encoder(data_dir, cache_dir, dataset):
    """The states under the head are BlipForImageTextRetrieval's, given the photo itself, a post at a time."""
    model, tokenizer, cache = make_system("blip", data_dir, cache_dir, dataset)
    folder, examples = data_dir / "demo" / "blip", dataset.examples["valid"]
    reference, processor = (BlipForImageTextRetrieval.from_pretrained(folder).eval(),
                            AutoImageProcessor.from_pretrained(folder))  # fmt: skip
    reference.text_encoder.resize_token_embeddings(len(tokenizer))
    # The markers' new rows.
    reference.text_encoder.embeddings.load_state_dict(model.encoder.embeddings.state_dict())
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    logits = model(collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])).logits
    for row, example, found in zip(rows, examples, logits, strict=True):
        pixels = processor(open_photo(data_dir, example.image_id), return_tensors="pt")["pixel_values"]
        states = reference(input_ids=torch.tensor([row["input_ids"]]), pixel_values=pixels).question_embeds
        expected = model.head(states, collate([row], 0))[0]
        close(found[: len(expected)] if dataset.task == "ner" else found, expected)


@torch.no_grad()
def test_vilt_is_transformers_token_classifier(data_dir, cache_dir, dataset):
    """Cached pixels give what its processor's give ViltForTokenClassification, for photos of any shape."""
    model, tokenizer, cache = make_system("vilt", data_dir, cache_dir, dataset, pooling="start")
    folder, examples = (data_dir / "demo" / "vilt",
                        dataset.examples["valid"] + dataset.examples.get("test", []))  # fmt: skip
    reference = ViltForTokenClassification.from_pretrained(folder, num_labels=len(dataset.labels)).eval()
    reference.resize_token_embeddings(len(tokenizer))
    reference.vilt.load_state_dict(model.encoder.state_dict(), strict=False)  # the markers' new rows
    reference.classifier = model.head.linear if dataset.task == "ner" else torch.nn.Identity()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    batch = collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])
    logits = model(batch).logits
    # All at once, padded as transformers pads words and pixels; then each post alone.
    photos = processor([open_photo(data_dir, e.image_id) for e in examples], return_tensors="pt")
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    states = reference(**text, **photos).logits
    assert len(set(map(tuple, batch["region_grid"].tolist()))) > 1 or dataset.task == "relation"
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        photo = processor(open_photo(data_dir, example.image_id), return_tensors="pt")
        alone = reference(input_ids=torch.tensor([row["input_ids"]]), **photo).logits[0]
        if dataset.task == "ner":
            for word, start in enumerate(row["word_starts"]):
                for expected in (states[i, start], alone[start]):
                    torch.testing.assert_close(logits[i, word], expected, rtol=1e-4, atol=1e-4)
        else:
            for expected in (states[i], alone):
                pair = torch.cat((expected[row["head_index"]], expected[row["tail_index"]]))
                torch.testing.assert_close(logits[i], model.head.linear(pair), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 6), (6, 10), (10, 6), (1, 7), (7, 1), (1, 1), (2, 3)])
def test_vilts_places_are_interpolated_as_transformers_does(data_dir, cache_dir, grid):
    model, _, cache = make_system("vilt", data_dir, cache_dir, load_dataset("demo", data_dir))
    assert isinstance(model, Vilt)
    h, w = grid
    torch.manual_seed(0)
    pixels = torch.randint(256, (1, 3, 16 * h, 16 * w), dtype=torch.uint8)
    patches = (
        pixels.unflatten(3, (w, 16)).unflatten(2, (h, 16)).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w, 768)
    )
    regions, mask = torch.zeros(1, 60, 768, dtype=torch.uint8), torch.zeros(1, 60, dtype=torch.bool)
    regions[:, : h * w], mask[:, : h * w] = patches, True
    found = model.embed(regions, mask, torch.tensor([grid]))
    values, ones = pixels / 255 * 2 - 1, torch.ones(1, 16 * h, 16 * w, dtype=torch.long)
    expected, _, _ = model.encoder.embeddings.visual_embed(values, ones, max_image_length=-1)
    # Where all patches are real transformers gives them in a random order: match each with its nearest.
    nearest = torch.cdist(found[0, : h * w + 1], expected[0]).argmin(1)
    assert sorted(nearest.tolist()) == list(range(h * w + 1)) and nearest[0] == 0
    torch.testing.assert_close(found[0, : h * w + 1], expected[0, nearest], rtol=1e-4, atol=1e-4)
    assert not found[:, h * w + 1 :].any()


@pytest.mark.parametrize("system", PARTS)
def test_a_post_without_photo_depends_on_no_image_state(data_dir, cache_dir, dataset, system):
    """Whatever stands in its place, NaN included, and it has no gradient; with a photo both are otherwise."""
    model, tokenizer, cache = make_system(system, data_dir, cache_dir, dataset)
    examples = dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    batch = collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])
    real = batch["labels"] >= 0
    shown = model(batch).logits[real]
    batch["region_mask"] = torch.zeros_like(batch["region_mask"])
    batch["region_grid"] = torch.zeros_like(batch["region_grid"])
    expected = model(batch).logits[real]
    assert expected.isfinite().all() and (shown != expected).any(-1).all()
    torch.manual_seed(0)
    if system == "vilt":
        batch["regions"] = torch.randint_like(batch["regions"], 256)
    else:
        batch["regions"] = torch.full_like(batch["regions"], float("nan"))
    assert torch.equal(model(batch).logits[real], expected)
    batch["regions"] = batch["regions"].float().nan_to_num(1).requires_grad_()
    model(batch).logits[real].sum().backward()
    assert not batch["regions"].grad.any()


@pytest.mark.parametrize("system, message", [
    ("blip", "attends to image states of width 64, the feature file has 2048"),
    ("vilt", "takes patches of 768 values, the feature file has 2048"),
])  # fmt: skip
def test_features_of_another_width_are_refused(data_dir, cache_dir, system, message):
    dataset, cache = load_dataset("demo", data_dir), FeatureCache(cache_dir / "demo-resnet50-64.h5")
    with pytest.raises(ValueError, match=message):
        make(data_dir / "demo" / system, dataset, None, system, cache)


# ------------------------------------------------------------- relevance, codes and soft tokens in the model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a tiny encoder of 64 positions, its byte-level tokenizer of a form for two texts}."""
    root = tmp_path_factory.mktemp("encoders")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[], add_prefix_space=True, model_max_length=64)
    size = SIZE | {"vocab_size": len(pieces), "max_position_embeddings": 64, "pad_token_id": 1}
    for kind, config, model in (("bert", BertConfig, BertModel), ("roberta", RobertaConfig, RobertaModel)):
        torch.manual_seed(0)
        model(config(**size)).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in ("bert", "roberta")}


def load(folder, fusion, **more):
    """(a model of regions [B, R, 20], tokenizer)."""
    torch.manual_seed(0)
    encoder, tokenizer = load_text_encoder(str(folder), "", "ner", 0.1)
    config = {"dropout": 0.1, "heads": 4, "region_dim": 20, "task": "ner", "labels": LABELS, "fusion": fusion}
    return add_noise(TextRegions(encoder, CONFIG | config | more)), tokenizer


def with_weights_of(model, *others):
    for other in others:
        weights = {key: value for key, value in model.state_dict().items() if key in other.state_dict()}
        other.load_state_dict(weights)


def posts(tokenizer, data_dir, notes=True):
    """(a batch of five ragged posts, its rows); the second has no photo, and the first no note."""
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"][:5], dataset.labels, 40)
    for row in rows:
        row["labels"] = [label % len(LABELS) if label >= 0 else label for label in row["labels"]]
    if notes:
        segments = Segments(tokenizer, "photo", 12)
        rows = [segments(row, {"about_photo": "so good " * i}) for i, row in enumerate(rows)]
    photos = {"regions": torch.randn(5, 5, 20, generator=torch.Generator().manual_seed(3)),
              "region_mask": torch.arange(5) < torch.tensor([5, 0, 3, 1, 4])[:, None],
              "region_grid": torch.tensor([[1, 5], [0, 0], [3, 1], [1, 1], [2, 2]]),
              "photo_row": torch.arange(5)}  # fmt: skip
    return collate(rows, tokenizer.pad_token_id) | photos, rows


def blind(inputs, garbage=math.nan):
    """The batch without any picture."""
    pictures = [(name, mask) for name, (mask, _) in PICTURES.items() if name in inputs]
    hidden = {mask: torch.zeros_like(inputs[mask]) for _, mask in pictures}
    return inputs | hidden | {name: torch.full_like(inputs[name], garbage) for name, _ in pictures}


def real(logits, batch):
    """Those of words."""
    return logits[batch["word_starts"] >= 0]


def gradients(model, losses):
    """{name: gradient} of all that trains, of the total of a model's losses; each is there and finite."""
    model.zero_grad()
    model.total([losses[name].sum() for name in model.loss_weights], 10, 5).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return found


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fusion", BEHIND)
def test_relevance_0_is_text_only_and_1_the_bare_fusion_bit_for_bit(folders, data_dir, fusion, precision):
    given, tokenizer = load(folders["bert"], fusion, relevance="given")
    bare, none = load(folders["bert"], fusion)[0], load(folders["bert"], "none")[0]
    with_weights_of(given, bare, none)
    inputs, _ = posts(tokenizer, data_dir)

    def logits(model, *relevance):
        more = {"relevance": torch.tensor(relevance[0]).expand(5)} if relevance else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return real(model(inputs | more).logits, inputs)

    text, whole = logits(none), logits(bare)
    assert not torch.allclose(text, whole, atol=1e-2)
    assert torch.equal(logits(given, 0.0), text) and torch.equal(logits(given, 1.0), whole)
    if precision == "bfloat16":
        return
    for share in (0.001, 0.3, 0.5, 0.501, 0.999):  # the head is linear, and so is what lies between
        torch.testing.assert_close(logits(given, share), text + share * (whole - text), rtol=1e-4, atol=1e-4)
    # Each post by itself: the second has no photo, whatever is said of it, the fourth no given relevance.
    made = given(inputs | {"relevance": torch.tensor([1.0, 0.7, 0.0, -1.0, 1.0])}).logits
    fused, text = bare(inputs).logits, none(inputs).logits
    for i, expected in ((0, fused), (1, text), (2, text), (4, fused)):
        assert torch.equal(made[i], expected[i])
    of_photo = inputs["own_mask"], inputs["regions"], inputs["region_mask"]
    share = given.relevance(given.read(inputs, False)[0], *of_photo)[3].sigmoid()
    torch.testing.assert_close(made[3], torch.lerp(text[3], fused[3], share), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_relevance_that_is_not_given_is_predicted_and_a_given_one_no_matter_where_all_are(
    folders, data_dir
):
    given, tokenizer = load(folders["bert"], "film", relevance="given")
    predicted, _ = load(folders["bert"], "film", relevance="predicted")
    text, _ = load(folders["bert"], "none")
    with_weights_of(given, text)
    inputs, _ = posts(tokenizer, data_dir)
    wanted = predicted(inputs).logits
    assert torch.equal(given(inputs).logits, wanted)  # as in a batch of which no post has one
    assert torch.equal(given(inputs | {"relevance": torch.full((5,), -1.0)}).logits, wanted)
    some = {"relevance": torch.tensor([-1, 0.9, 0.1, -1, 0.2])}
    assert torch.equal(predicted(inputs | some).logits, wanted)
    changed = (given(inputs | some).logits != wanted).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, True]
    for model in (given, predicted):  # without a photo nothing is of relevance, predicted or given
        assert torch.equal(model(blind(inputs) | some).logits, text(blind(inputs)).logits)


@pytest.mark.parametrize("more", [{}, {"notes": "n.jsonl", "relevance_loss": 0.5}])
@pytest.mark.parametrize("which", ["given", "predicted"])
def test_relevance_learns_from_what_is_given_or_as_a_gate(folders, data_dir, which, more):
    model, tokenizer = load(folders["bert"], "attention", relevance=which, **more)
    assert model.loss_weights == {"labels": 1.0} | ({"relevance": 0.5} if more else {})
    inputs, _ = posts(tokenizer, data_dir)
    given, shown = torch.tensor([0.8, 0.3, -1, 0, -1]), inputs["region_mask"]
    for relevance, mask in ((given, shown), (given, shown & False), (0 * given - 1, shown)):
        losses = model(inputs | {"relevance": relevance, "region_mask": mask}, return_losses=True).losses
        assert losses.keys() == model.loss_weights.keys()
        found, known = gradients(model, losses), (relevance >= 0) & mask.any(1)
        of_gate = mask.any() and (which == "predicted" or (relevance < 0).any())
        learns = any(gradient.any() for name, gradient in found.items() if name.startswith("relevance."))
        assert learns == bool(of_gate or (more and known.any()))
        if more:
            text = model.read(inputs, False)[0]
            share = model.relevance(text, inputs["own_mask"], inputs["regions"], mask).sigmoid()
            wanted = F.binary_cross_entropy(share, relevance.clamp(min=0), reduction="none") * known
            torch.testing.assert_close(losses["relevance"], wanted)


def test_supervised_alignment_is_of_posts_with_a_relevance_by_trains_median(folders, data_dir):
    more = {"notes": "n", "align": {"supervised": 0.1}, "relevance_median": 0.5}
    model, tokenizer = load(folders["bert"], "film", **more)
    assert model.loss_weights == {"labels": 1.0, "supervised": 0.1}
    inputs, _ = posts(tokenizer, data_dir)
    relevance = torch.tensor([0.5, 0.9, 0.2, -1, 0.7])  # the second has no photo, the fourth no relevance
    losses = model(inputs | {"relevance": relevance}, return_losses=True).losses
    kept = torch.tensor([0, 2, 4])
    text, own, regions, mask, photos = (
        values[kept] for values in (model.read(inputs, False)[0], inputs["own_mask"], inputs["regions"],
                                    inputs["region_mask"], inputs["photo_row"])
    )  # fmt: skip
    regions = unit_length(clean(regions, mask))
    alone = model.align["supervised"](text, own, regions, mask, photos, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(losses["supervised"][kept], alone)
    assert not losses["supervised"][[1, 3]].any() and alone[[0, 2]].all() and not alone[1]
    losses = model(inputs, return_losses=True).losses
    assert not losses["supervised"].any() and gradients(model, losses)


@pytest.mark.parametrize("fusion", BEHIND)
def test_any_fusion_reads_codes_and_the_divergence_is_a_loss(folders, data_dir, fusion):
    model, tokenizer = load(folders["bert"], fusion, bottleneck=0.1)
    inputs, _ = posts(tokenizer, data_dir)
    assert model.loss_weights == {"labels": 1.0, "bottleneck": 0.1}
    if fusion != "film":
        assert model.fusion.regions.linear.in_features == 32  # of the codes, not of the photo
    logits, _, losses = model(inputs, return_losses=True)
    mask, seen = inputs["text_mask"], inputs["region_mask"]
    text, (codes,), kl = model.bottleneck(model.read(inputs, False)[0], mask, (inputs["regions"], seen))
    torch.testing.assert_close(losses["bottleneck"], kl)
    more = {key: inputs[key] for key in model.fusion.reads if key in inputs}
    torch.testing.assert_close(logits, model.head(model.fusion(text, mask, codes, seen, **more), inputs))


@pytest.fixture(scope="module")
def two_pictures(folders, data_dir):
    """(a model with a bottleneck over two pictures, a batch with both)."""
    more = {"bottleneck": 0.1, "align": {"matching": 0.9}, "decoder": "crf", "generated": "x.h5"}
    model, tokenizer = load(folders["bert"], "saliency", dropout=0.0, **more)
    inputs, _ = posts(tokenizer, data_dir)
    second = {"generated": torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(4)),
              "generated_mask": torch.arange(3) < torch.tensor([3, 1, 0, 2, 3])[:, None],
              "generated_row": torch.tensor([4, 3, 2, 1, 0])}  # fmt: skip
    return model, inputs | second


def test_alignment_reads_codes_of_both_pictures(two_pictures):
    model, inputs = two_pictures
    losses = model(inputs, return_losses=True).losses
    pictures = [(inputs["regions"], inputs["region_mask"]), (inputs["generated"], inputs["generated_mask"])]
    text, codes, _ = model.bottleneck(model.read(inputs, False)[0], inputs["text_mask"], *pictures)
    of_pictures = [
        model.align["matching"](text, inputs["own_mask"], unit_length(states), mask, inputs[rows])
        for states, (_, mask), rows in zip(codes, pictures, ("photo_row", "generated_row"), strict=True)
    ]
    torch.testing.assert_close(losses["matching"], sum(of_pictures) / 2)  # the mean over both
    assert all((loss > 0.1).sum() >= 3 for loss in of_pictures)
    assert codes[0][inputs["region_mask"]].std(0).min() > 0  # posts differ


def test_without_any_picture_the_answer_depends_on_none(two_pictures):
    model, inputs = two_pictures
    expected = real(model(blind(inputs, 0.0)).logits, inputs)
    assert torch.equal(real(model(blind(inputs)).logits, inputs), expected) and expected.isfinite().all()
    owner = (inputs["word_starts"] >= 0).nonzero()[:, 0]  # the post of each word
    for hidden, shown in (("region_mask", "generated_mask"), ("generated_mask", "region_mask")):
        made = real(model(inputs | {hidden: torch.zeros_like(inputs[hidden])}).logits, inputs)
        assert ((made - expected).abs().amax(-1) > 1e-4).equal(inputs[shown].any(1)[owner])


MASKS = ("region_mask", "generated_mask")


@pytest.mark.parametrize("hidden", [(), MASKS[:1], MASKS[1:], MASKS])
def test_every_parameter_gets_a_gradient_whatever_is_shown(two_pictures, hidden):
    """Zeros will do where a picture is nowhere; with both shown, none has only zeros."""
    model, inputs = two_pictures
    shown = inputs | {key: torch.zeros_like(inputs[key]) for key in hidden}
    found = gradients(model, model.train()(shown, return_losses=True).losses)
    model.eval()
    new = [gradient for name, gradient in found.items() if not name.startswith("encoder.")]
    assert hidden or all(gradient.any() for gradient in new)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_prefix_without_photo_is_the_plain_encoder_of_text_and_knowledge(folders, data_dir, kind):
    model, tokenizer = load(folders[kind], "prefix")
    plain, _ = load(folders[kind], "none")
    with_weights_of(model, plain)
    inputs, _ = posts(tokenizer, data_dir)
    wanted, shown = plain(inputs).logits, model(inputs).logits
    for garbage in (0.0, math.nan):
        made = model(blind(inputs, garbage)).logits
        torch.testing.assert_close(real(made, inputs), real(wanted, inputs), rtol=1e-5, atol=1e-5)
    photo, words = inputs["region_mask"].any(1), inputs["word_starts"] >= 0
    alone = ~photo[:, None] & words
    torch.testing.assert_close(shown[alone], wanted[alone], rtol=1e-5, atol=1e-5)
    assert ((shown - wanted).abs().amax(-1) > 1e-4)[photo[:, None] & words].all()  # every word knows of it


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "deberta-v2", "albert", "xlnet"])
def test_with_a_prefix_batched_is_single_at_any_padding(folders, tmp_path, data_dir, kind):
    """Counted positions, relative ones, embeddings of another width than the states, no position_ids."""
    common = kind in folders
    if not common:
        build(kind, tmp_path, WORDS)
    model, tokenizer = load(folders.get(kind, tmp_path), "prefix")
    check_soft_tokens(model.encoder, tokenizer, "here", 4)
    inputs, rows = posts(tokenizer, data_dir, notes=common)
    wanted, weights, _ = model(inputs, return_weights=True)
    for i, row in enumerate(rows):
        count = max(1, int(inputs["region_mask"][i].sum()))
        cases = (count, 0), (5, 0), (5, 3), (5, 58 - inputs["input_ids"].shape[1])
        for regions, more in cases if common else cases[:1]:
            alone = collate([row], tokenizer.pad_token_id)
            alone |= {key: inputs[key][i : i + 1, :regions] for key in ("regions", "region_mask")}
            alone["input_ids"] = F.pad(alone["input_ids"], (0, more), value=tokenizer.pad_token_id)
            masks = [key for key in ("attention_mask", "own_mask", "text_mask") if key in alone]
            alone |= {key: F.pad(alone[key], (0, more)) for key in masks}
            made, seen, _ = model(alone, return_weights=True)
            expected, length = wanted[i, : len(row["word_starts"])], len(row["input_ids"])
            torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen[0, :length], weights[i, :length, : seen.shape[2]], rtol=1e-4,
                                       atol=1e-5)  # fmt: skip
    photo = inputs["region_mask"].any(1).float()[:, None].expand(-1, weights.shape[1])
    torch.testing.assert_close(weights.sum(-1), photo)


def test_gradients_reach_the_prefix_and_word_embeddings(folders, data_dir):
    model, tokenizer = load(folders["roberta"], "prefix", align={"contrastive": 0.1})
    inputs, _ = posts(tokenizer, data_dir)
    assert {"queries", "regions.linear.weight"} <= {name for name, _ in model.prefix.named_parameters()}
    for mask in (inputs["region_mask"], torch.zeros_like(inputs["region_mask"])):
        found = gradients(model, model(inputs | {"region_mask": mask}, return_losses=True).losses)
        of_prefix = [gradient for name, gradient in found.items() if name.startswith("prefix.")]
        assert of_prefix and all(bool(gradient.any()) == bool(mask.any()) for gradient in of_prefix)
        assert model.encoder.get_input_embeddings().weight.grad.any()
    # The soft tokens alone teach the word embeddings too: of the post's own tokens, not of its note.
    words = model.encoder.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    mask, own = inputs["attention_mask"].bool(), inputs["own_mask"]
    whole, _, _ = model.prefix(words, mask, own, inputs["regions"], inputs["region_mask"])
    length = int(mask[2].sum())
    (whole[2, length : length + 4] * torch.randn(4, 32)).sum().backward()
    taught = words.grad.any(-1)
    assert torch.equal(taught[2], own[2]) and not taught[[0, 1, 3, 4]].any()


def test_the_longest_input_of_a_prefix_fits(folders, data_dir):
    """RoBERTa's kind spends two positions on padding: 62 are left, 58 beside the soft tokens."""
    model, tokenizer = load(folders["roberta"], "prefix")
    example = load_dataset("demo", data_dir).examples["test"][0]
    example = replace(example, words=("good",) * 30, labels=("O",) * 30)
    photo = {"regions": torch.randn(1, 2, 20), "region_mask": torch.ones(1, 2, dtype=torch.bool)}
    (row,), _ = encode(tokenizer, [example], LABELS, 58)
    assert len(row["input_ids"]) == 58 and longest_input(model.encoder, tokenizer) == 62
    assert model(collate([row], 1) | photo).logits.isfinite().all()
    (row,), _ = encode(tokenizer, [example], LABELS, 59)
    with pytest.raises(RuntimeError, match="index 64 is out of bounds"):
        model(collate([row], 1) | photo)
