"""What photos tell beyond the text: states against transformers, the probe on photos that tell and do not."""

import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

import evaluate
from data import NerExample, RelationExample
from features import FeatureCache
from parts import probe
from parts.datasets import Dataset, load_dataset
from parts.posts import mean_regions
from parts.text_encoder import load_text_encoder

KINDS = ("PER", "LOC", "ORG")


class Pictures:
    """A feature cache of one vector a photo; of one in ten there is none."""

    path = "pictures.h5"

    def __init__(self, vectors):
        self.vectors = vectors

    def photos_of(self, image_id):
        return [] if image_id is None else [image_id]

    def has_photo(self, image_id):
        return image_id in self.vectors

    def read(self, photos, views=None):
        vector = self.vectors.get(photos[0])
        regions = torch.zeros(1, 2, 8) if vector is None else torch.tensor(vector)[None]
        return {"regions": regions, "region_mask": torch.full((1, 2), vector is not None)}


def posts_of(count, told, task="ner"):
    """A data set whose text tells half of the answers, and pictures that tell all, or nothing."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    examples, vectors = {}, {}
    for split, size in (("train", count), ("valid", count // 2), ("test", count // 2)):
        examples[split] = []
        for i in range(size):
            kind, image_id = rng.randrange(3), f"{split}_{i}"
            word = ("Messi", "Tokyo", "BBC")[kind] if rng.random() < 0.5 else "today"
            vector = noise.normal(size=(2, 8)).astype(np.float32)
            vector[:, :3] += 3 * told * np.eye(3, dtype=np.float32)[kind]
            if i % 10:
                vectors[image_id] = vector
            words, post = ("so", word, "good"), (f"{split}:{i}", image_id)
            if task == "ner":
                examples[split].append(NerExample(*post, words, ("O", f"B-{KINDS[kind]}", "O")))
            else:
                examples[split].append(RelationExample(*post, words, (1, 2), (2, 3), KINDS[kind]))
    return Dataset("mine", task, {}, examples, KINDS), Pictures(vectors)


@pytest.mark.parametrize("task", ["ner", "relation"])
def test_photos_that_tell_gain_and_others_do_not(encoder_dir, task):
    dataset, pictures = posts_of(200, 1.0, task)
    result = probe.photo_probe(dataset, pictures, str(encoder_dir), "test", "cpu")
    assert result["units"] == 100 and result["photos"] == 90 and result["lost"] == 0
    assert result["both"] > result["text"] + 0.2 and result["photo"] > result["majority"] + 0.3
    assert result["gain"]["low"] > 0.1 > result["control_gain"]["high"]
    assert result["gain"]["difference"] == pytest.approx(result["both"] - result["text"])
    assert "should gain" in probe.probe_verdict(result)


def test_photos_that_tell_nothing(encoder_dir):
    dataset, pictures = posts_of(200, 0.0)
    result = probe.photo_probe(dataset, pictures, str(encoder_dir), "test", "cpu")
    assert result["gain"]["low"] <= 0 and abs(result["photo"] - result["majority"]) < 0.15
    assert "gains nothing sure" in probe.probe_verdict(result)


def test_a_gain_of_others_photos_too_is_none_of_the_photos():
    gain = {"difference": 0.1, "low": 0.05}
    assert "others' photos gain as much" in probe.probe_verdict({"gain": gain, "control_gain": gain})


@pytest.mark.parametrize("name", ["demo", "mnre"])
def test_states_are_those_of_transformers_one_post_at_a_time(data_dir, encoder_dir, name):
    examples = load_dataset(name, str(data_dir)).examples["train"]
    asked = probe.questions(examples)
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.0)
    states = probe.text_states(encoder.eval(), tokenizer, examples, asked, "cpu", batch_size=5)
    model, plain = AutoModel.from_pretrained(encoder_dir).eval(), AutoTokenizer.from_pretrained(encoder_dir)
    assert len(states) == len(asked) > 20
    for state, (i, spans, _) in zip(states, asked, strict=True):
        pieces = plain(list(examples[i].words), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**pieces).last_hidden_state[0]
        first = [pieces.word_ids().index(word) for word in range(len(examples[i].words))]
        parts = [output[first[start:end]].mean(0) for start, end in (*spans, (0, len(first)))]
        assert torch.allclose(torch.from_numpy(state), torch.cat(parts), atol=1e-5)


def test_questions_are_the_gold_mentions_and_the_pairs():
    post = NerExample("1", None, tuple("abcd"), ("B-PER", "I-PER", "O", "B-LOC"))
    assert probe.questions([post]) == [(0, ((3, 4),), "LOC"), (0, ((0, 2),), "PER")]
    pair = RelationExample("1", None, tuple("abcd"), (0, 2), (3, 4), "knows")
    assert probe.questions([pair]) == [(0, ((0, 2), (3, 4)), "knows")]


def test_a_span_that_the_encoder_cannot_reach_is_nan(encoder_dir):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.0)
    post = NerExample("1", None, ("so",) * 600, ("B-PER", *["O"] * 598, "B-LOC"))
    asked = [(0, ((0, 1),), "PER"), (0, ((599, 600),), "LOC")]
    near, far = probe.text_states(encoder.eval(), tokenizer, [post], asked, "cpu")
    assert np.isfinite(near).all() and np.isnan(far).all()


def test_photos_are_the_mean_of_their_regions(data_dir, cache_dir):
    cache = FeatureCache(cache_dir / "demo-resnet50-64.h5")
    ids = [*list(cache.ids)[:5], None]
    means, real = mean_regions(cache, ids)
    assert real.tolist() == [True] * 5 + [False] and not means[5].any()
    for mean, row in zip(means, range(5), strict=False):
        regions = cache.regions[row, 0, : cache.num_regions[row]].astype(np.float32)
        assert np.allclose(mean, regions.mean(0), rtol=1e-3)


def test_standardised_against_scikit_learn_and_zero_without_photo():
    rng = np.random.default_rng(0)
    states = {"train": rng.normal(3, 2, (40, 6)), "test": rng.normal(3, 2, (9, 6))}
    real = {"train": np.arange(40) > 4, "test": np.arange(9) > 2}
    out = probe.standardised(states, real)
    scaler = StandardScaler().fit(states["train"][5:])
    assert np.allclose(out["test"][3:] * 6**0.5, scaler.transform(states["test"][3:]))
    assert not out["test"][:3].any() and not out["train"][:5].any()


def test_the_penalty_is_chosen_on_valid_alone():
    rng = np.random.default_rng(0)
    states = {name: rng.normal(size=(60, 5)) for name in ("train", "valid", "test")}
    gold = {name: ["b" if x[0] + rng.normal() > 0 else "a" for x in part] for name, part in states.items()}
    models = [LogisticRegression(C=c, max_iter=300).fit(states["train"], gold["train"])
              for c in probe.PENALTIES]  # fmt: skip
    best = max(models, key=lambda model: model.score(states["valid"], gold["valid"]))
    assert probe.fit([states], gold, "test") == best.predict(states["test"]).tolist()


def test_the_command(data_dir, cache_dir, encoder_dir, capsys):
    place = ["--data-dir", str(data_dir), "--text-encoder", str(encoder_dir)]
    evaluate.main(["--photo-probe", "demo", "--features", str(cache_dir / "demo-resnet50-64.h5"), *place])
    out = capsys.readouterr().out
    assert "demo test:" in out and "text and another's photo" in out and "photo over text" in out
    with pytest.raises(SystemExit):
        evaluate.main(["--photo-probe", "demo", *place])
    assert "--photo-probe needs --features" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no row for"):
        evaluate.main(["--photo-probe", "demo", "--features", str(cache_dir / "mnre-resnet50-64.h5"), *place])
