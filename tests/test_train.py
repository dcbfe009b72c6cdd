"""Training as a user runs it, on tiny data: what is learned and logged, and what lands in a run folder."""

import json
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, PARTS, backbone_flags, json_lines, run, system_flags
from safetensors.torch import load_file
from test_report import embedded

import demo
import evaluate
import extract_features
import predict as predictor
import report
import train
from encoding import collate, encode
from features import FeatureCache
from fusion import FUSIONS, clean, unit_length
from parts.datasets import load_dataset
from parts.opening import open_run
from parts.options import OF_ONE_RUN, parse_args
from parts.posts import predict_posts, shuffled_photos
from parts.run_files import load_run
from parts.scores import entity_spans, main_score, read_predictions, score
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder
from parts import model, opening


@pytest.mark.parametrize("fusion", [*FUSIONS, *PARTS])
@pytest.mark.parametrize("dataset", ["demo", "mnre"])
def test_a_run_folder_tells_the_whole_run(flags, tmp_path, dataset, fusion, data_dir, capsys):
    more = system_flags(fusion, data_dir) if fusion in PARTS else ["--fusion", fusion]
    folder = run([*flags, *more], tmp_path / "run", "--dataset", dataset, "--max-len", 40)
    out = capsys.readouterr().out
    examples = load_dataset(dataset, data_dir).examples
    scored = [split for split in ("valid", "test") if split in examples]
    names = {"README.md", "config.json", "encoder", "model.safetensors", "log.jsonl", "timing.jsonl"}
    assert {path.name for path in folder.iterdir()} == names | {
        f"{kind}-{split}.json{'l' * (kind == 'predictions')}"
        for kind in ("metrics", "predictions") for split in scored
    }
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    level = "token" if dataset == "demo" else "row"
    command = next(line for line in card.splitlines() if line.startswith("    python train.py "))
    again, chosen = vars(parse_args(shlex.split(command)[2:])), OF_ONE_RUN | {"precision", "word_rule"}
    assert [(key, config[key]) for key in again if key not in chosen] == [
        (key, again[key]) for key in again if key not in chosen
    ]
    assert ("mnre has no test file" in out) == ("test" not in examples)
    assert ("posts have a photo" in out) == (fusion not in ("none", "bert-caption"))
    assert ("posts have a caption" in out) == (fusion == "bert-caption")
    for split in scored:
        records = read_predictions(folder / f"predictions-{split}.jsonl")
        assert [r["id"] for r in records] == [example.id for example in examples[split]]
        for record, example in zip(records, examples[split], strict=True):
            gold = list(example.labels) if dataset == "demo" else example.label
            assert (record["words"], record["gold"]) == (list(example.words), gold)
            for key in ("predicted", "probability") if dataset == "demo" else ():
                assert len(record[key]) == len(example.words)
        metrics = json.loads((folder / f"metrics-{split}.json").read_text())
        data, main, base = metrics.pop("data"), main_score(metrics), metrics["baseline"]
        assert data["sha256"] in card and f"| {main:.4f} | {metrics[level]['accuracy']:.4f} |" in card
        assert f"| always `{base['label']}` | {base['main_f1']:.4f} | {base['accuracy']:.4f} |" in card
        assert metrics == score(records) and data["sha256"] in (folder / "config.json").read_text()
    log = json_lines(folder / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2] and all(np.isfinite(line["loss"]) for line in log)
    # A run loads from its folder alone and answers the same.
    model, config, _, posts = open_run(folder, "valid", "cpu")
    again = predict_posts(model, posts, config["labels"], 3, "cpu", "float32")
    records = read_predictions(folder / "predictions-valid.jsonl")
    assert [r["predicted"] for r in again] == [r["predicted"] for r in records]


def test_same_seed_same_run_digit_for_digit(flags, tmp_path):
    first, second, other = (run(flags, tmp_path / str(i), "--seed", seed) for i, seed in enumerate((1, 1, 2)))
    for name in ("log.jsonl", "predictions-valid.jsonl", "predictions-test.jsonl", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "log.jsonl").read_bytes() != (other / "log.jsonl").read_bytes()


def test_the_loop_trains_and_logs_whatever_losses_a_system_has(flags, tmp_path, monkeypatch, capsys):
    """A second loss, half of each post's squared first logit, counts by post beside the labels' by word."""

    class More(model.TextRegions):
        loss_weights = {"labels": 1.0, "small": 0.5}
        seen, small = [], []

        def forward(self, batch, return_weights=False, return_losses=False):
            output = super().forward(batch, return_weights, return_losses)
            if return_losses:
                self.seen.append((output.losses["labels"].detach(), (batch["labels"] >= 0).sum(1)))
                output.losses["small"] = output.logits[:, 0, 0].square()
            return output

        def total(self, sums, words, posts):
            total = super().total(sums, words, posts)
            labels, count = self.seen[-1]
            assert (words, posts) == (count.sum(), len(count)) and sums[0] == labels.sum()
            torch.testing.assert_close(total, labels.sum() / words + 0.5 * sums[1] / posts)
            self.small.append(sums[1].item())
            return total

    flags = [*flags, "--fusion", "film", "--epochs", 1]
    plain = run(flags, tmp_path / "plain")
    monkeypatch.setitem(SYSTEMS, "bert-resnet50", replace(SYSTEMS["bert-resnet50"], model=More))
    capsys.readouterr()
    more = run(flags, tmp_path / "more", "--model", "bert-resnet50")
    (line,), (without,) = json_lines(more / "log.jsonl"), json_lines(plain / "log.jsonl")
    assert line["loss_small"] == pytest.approx(sum(More.small) / 24, rel=1e-5) and "loss_small" not in without
    labels, words = (torch.cat([step[i] for step in More.seen]) for i in (0, 1))
    assert line["loss"] == pytest.approx((labels.sum() / words.sum()).item(), rel=1e-5)
    biases = [load_file(folder / "model.safetensors")["head.linear.bias"] for folder in (more, plain)]
    assert biases[0].ne(biases[1]).any()
    # Three steps, none of them warmup: 1, 2/3 and 1/3 of the rates.
    assert line["lr"] == pytest.approx(1e-3 / 3) and line["fusion_lr"] == pytest.approx(1.1e-3 / 3)
    said = f"epoch 1/1  loss {line['loss']:.4f}  small {line['loss_small']:.4f}  lr 0.00033  valid entity F1"
    assert said in capsys.readouterr().out


def test_alignment_is_trained_beside_the_labels_on_the_texts_before_the_fusion(flags, tmp_path, monkeypatch):
    """What is logged is the loss of align.py of each batch, by hand from the states that the encoder gave."""
    seen, weights = [], {"contrastive": 0.1, "matching": 0.5, "local": 2.0}

    class Watched(model.TextRegions):
        @torch.no_grad()
        def by_hand(self, batch):
            text = self.eval().encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            self.train()
            regions = unit_length(clean(batch["regions"].float(), batch["region_mask"]))
            inputs = text, batch["own_mask"], regions, batch["region_mask"], batch["photo_row"]
            special = torch.isin(batch["input_ids"], torch.tensor([0, 2, 3]))  # [PAD], [CLS], [SEP]
            assert torch.equal(batch["own_mask"], ~special)
            return {name: alignment(*inputs) for name, alignment in self.align.items()}

        def forward(self, batch, return_weights=False, return_losses=False):
            output = super().forward(batch, return_weights, return_losses)
            if return_losses:
                seen.append((self.by_hand(batch), output.losses))
            return output

    monkeypatch.setitem(SYSTEMS, "bert-resnet50", replace(SYSTEMS["bert-resnet50"], model=Watched))
    more = ("--model", "bert-resnet50", "--fusion", "film", "--no-standardise", "--dropout", 0, "--epochs", 1,
            "--batch-size", 6,
            "--align", *(f"{name}={weight}" for name, weight in weights.items()))  # fmt: skip
    folder = run(flags, tmp_path / "run", *more)
    (log,) = json_lines(folder / "log.jsonl")
    for name in weights:
        for by_hand, losses in seen:
            torch.testing.assert_close(by_hand[name], losses[name].detach(), rtol=1e-4, atol=1e-5)
        mean = sum(losses[name].sum().item() for _, losses in seen) / 24
        assert log[f"loss_{name}"] == pytest.approx(mean, rel=1e-4)
    loaded, _, config = load_run(folder)
    assert config["align"] == weights and loaded.loss_weights == {"labels": 1.0} | weights


def test_a_share_of_train_is_drawn_by_the_seed(flags, tmp_path, data_dir, capsys, monkeypatch):
    ids = [example.id for example in load_dataset("demo", data_dir).examples["train"]]
    shares, make = [], opening.make_posts

    def watched(config, tokenizer, examples, split, *more):
        shares.extend([[example.id for example in examples]] if split == "train" else [])
        return make(config, tokenizer, examples, split, *more)

    monkeypatch.setattr(opening, "make_posts", watched)
    for i, seed in enumerate((1, 1, 2)):
        more = ("--fusion", "none", "--epochs", 1, "--seed", seed, "--train-share", 0.3)
        run(flags, tmp_path / str(i), *more)
    first, again, other = shares
    assert len(first) == 8 and first == again != other and first == [i for i in ids if i in first]
    assert "train      8 posts" in capsys.readouterr().out


def test_a_pyramid_with_a_visual_crf_is_trained_read_back_and_looked_at(flags, tmp_path, data_dir):
    """By evaluate.py, predict.py and report.py, from the run folder alone."""
    more = ("--fusion", "pyramid", "--decoder", "visual-crf", "--align", "local=0.1")
    folder = run(flags, tmp_path / "run", *more)
    weights = load_file(folder / "model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if not name.startswith("encoder."))
    model, config, _, posts = open_run(folder, "test", "cpu")
    examples, recorded = posts.examples, read_predictions(folder / "predictions-test.jsonl")
    batch = posts.batch(range(len(posts)))
    with torch.inference_mode():
        bias = model.head.photo_bias(batch["regions"], batch["region_mask"])
        best, chances = model.head.crf.decode(model(batch).logits, batch["word_starts"] >= 0, bias)
        attended = model(batch, return_weights=True).weights
    for labels, chance, record in zip(best, chances.tolist(), recorded, strict=True):
        assert record["predicted"] == [config["labels"][k] for k in labels[: len(record["words"])]]
        assert record["probability"] == pytest.approx(chance[: len(record["words"])], abs=1e-5)
    assert bias.any()
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1", "--device", "cpu"])
    check = json.loads((folder / "image-check-test.json").read_text())
    assert main_score(check["true"]) == main_score(score(recorded))
    images = data_dir / "demo" / "images"
    asked = [{"words": list(e.words), "image": str(images / f"{e.image_id}.jpg")} for e in examples]
    answers = predictor.Predictor(folder, "cpu")(asked)
    for answer, record in zip(answers, recorded, strict=True):
        found = {(entity["type"], *entity["words"]) for entity in answer["entities"]}
        assert found == entity_spans(record["predicted"])
    page = embedded(report.main(["--run", str(folder)]))
    shown = {post["id"]: post["maps"]["places"] for post in page["posts"]}
    assert page["rest"] == "coarser views of it" and "decoder visual-crf" in page["facts"]["System"]
    for example, row, weight in zip(examples, posts.rows, attended, strict=True):
        assert shown[example.id] == pytest.approx(weight[row["word_starts"]].sum(-1).tolist(), abs=2e-3)


def test_words_are_aligned_with_both_finer_scales_of_a_pyramid(data_dir, cache_dir, encoder_dir):
    dataset, cache = load_dataset("demo", data_dir), FeatureCache(cache_dir / "demo-resnet50-64.h5")
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.0)
    config = {"labels": dataset.labels, "fusion": "pyramid", "dropout": 0,
              "align": {"local": 1, "contrastive": 1}, "region_dim": cache.region_dim}  # fmt: skip
    pyramid, examples = model.TextRegions(encoder, CONFIG | config).eval(), dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    photos = [*[example.image_id for example in examples[1:]], None]
    batch = collate(rows, tokenizer.pad_token_id) | cache.read(photos)
    with torch.no_grad():
        losses = pyramid(batch, return_losses=True).losses
        text = pyramid.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        regions, real = batch["regions"].float(), batch["region_mask"]
        assert batch["region_grid"][:-1].eq(2).all() and not real[-1].any()
        cells = F.adaptive_avg_pool2d(regions.mT.unflatten(-1, (2, 2)), 3).flatten(2).mT
        scales = [(unit_length(cells), real.any(1, keepdim=True).expand(-1, 9)), (unit_length(regions), real)]
        local, whole = pyramid.align["local"], pyramid.align["contrastive"]
        fine = [local(text, batch["own_mask"], *scale, batch["photo_row"]) for scale in scales]
        torch.testing.assert_close(losses["local"], (fine[0] + fine[1]) / 2, rtol=1e-4, atol=1e-4)
        assert (fine[0] - fine[1])[:-1].abs().min() > 1e-4 and losses["local"][-1] == 0
        wanted = whole(text, batch["own_mask"], *scales[1], batch["photo_row"])
        torch.testing.assert_close(losses["contrastive"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", ["bert-resnet50", *PARTS])
def test_what_trains_and_what_is_frozen_is_said(flags, tmp_path, data_dir, cache_dir, system, capsys):
    more = system_flags(system, data_dir) if system in PARTS else ["--model", system]
    folder = run([*flags, *more], tmp_path / "run", "--epochs", 1)
    out, (model, _, config) = capsys.readouterr().out, load_run(folder)
    lines = [line.split() for line in out.splitlines() if " parameters" in line and line[:6] != "in all"]
    said = {part: int(count.replace(",", "")) for part, count, *_ in lines}
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    counts = {part: count for part, count in counts.items() if count}  # no alignment was asked for
    frozen = FeatureCache(config["features"]).attrs["parameters"]
    assert said == counts | ({"frozen": frozen} if frozen else {}) and (system == "vilt") == (frozen == 0)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if system == "bert-resnet50":
        assert frozen == 23_508_032  # ResNet50 without its classifier


def test_regions_are_standardised_by_the_photos_of_train(flags, tmp_path, capsys):
    folder = run(flags, tmp_path / "run", "--fusion", "film", "--standardise")
    weights, model = load_file(folder / "model.safetensors"), load_run(folder)[0]
    posts = open_run(folder, "test", "cpu")[3]
    train_ids = {example.image_id for example in load_dataset("demo", flags[1]).examples["train"]}
    regions = [posts.cache.regions[posts.cache.rows[i], 0].astype(np.float32).mean(0) for i in train_ids]
    assert np.allclose(weights["standardise.mean"], np.mean(regions, 0), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.standardise.deviation, weights["standardise.deviation"])
    batch = posts.batch(range(4))
    with torch.no_grad():
        logits = model(batch).logits
        by_hand = (batch["regions"].float() - model.standardise.mean) / model.standardise.deviation
        model.standardise = None
        assert torch.allclose(model(batch | {"regions": by_hand}).logits, logits, atol=1e-5)
        assert not torch.allclose(model(batch).logits, logits, atol=1e-5)
    assert "film-raw" in train.parse_args(["--no-standardise"]).run_dir


def test_pretrained_and_new_layers_have_their_own_rate_and_biases_no_decay(flags, tmp_path):
    """And a layer that says so has a rate of its own."""
    model, _, _ = load_run(run(flags, tmp_path / "run", "--epochs", 1, "--fusion", "cross-attention"))
    model.fusion.rate = 4.0
    args = train.parse_args(["--lr", "0.25", "--fusion-lr", "0.5", "--weight-decay", "0.1"])
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in train.parameter_groups(model, args) for parameter in group["params"]
    }  # fmt: skip
    assert len(settings) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decayed = not name.endswith("bias") and ".norm" not in name and "LayerNorm" not in name
        rate = {"encoder": 0.25, "fusion": 2.0, "head": 0.5}[name.split(".")[0]]
        assert settings[id(parameter)] == (rate, 0.1 * decayed), name


def test_a_parameter_that_cannot_learn_is_named():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "idle": torch.nn.Linear(2, 1)})
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="parameter idle.weight got no gradient"):
        train.check_all_train(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="parameter used.bias is in no optimizer group"):
        train.check_all_train(model, torch.optim.AdamW([model["used"].weight]))
    model["idle"].requires_grad_(False)
    train.check_all_train(model, torch.optim.AdamW(model["used"].parameters()))


def test_an_encoder_with_an_unused_part_stops_at_the_first_step(flags, tmp_path, monkeypatch):
    load = opening.load_text_encoder

    def with_idle_part(*args):
        encoder, tokenizer = load(*args)
        encoder.idle = torch.nn.Linear(2, 2)
        return encoder, tokenizer

    monkeypatch.setattr(opening, "load_text_encoder", with_idle_part)
    with pytest.raises(ValueError, match="parameter encoder.idle.weight got no gradient in the first step"):
        run(flags, tmp_path / "run")


def test_hidden_photos_train_nothing(flags, tmp_path):
    """With every photo hidden, film's generator keeps its zeros: a missing photo has no gradient."""
    hidden = load_file(run(flags, tmp_path / "a", "--photo-dropout", 1) / "model.safetensors")
    shown = load_file(run(flags, tmp_path / "b", "--photo-dropout", 0) / "model.safetensors")
    assert not hidden["fusion.generator.weight"].any() and shown["fusion.generator.weight"].any()


@pytest.mark.parametrize("augment", [True, False])
def test_training_draws_all_views_and_all_else_reads_the_plain_one(flags, tmp_path, monkeypatch, augment):
    read, seen = FeatureCache.read, {"train": [], "rest": []}

    def watched(self, photos, views=None):
        for photo, view in zip(photos, [0] * len(photos) if views is None else views, strict=True):
            seen["train" if photo.startswith("train") else "rest"].append(int(view))
        return read(self, photos, views)

    monkeypatch.setattr(FeatureCache, "read", watched)
    run(flags, tmp_path / "run", "--no-standardise", "--photo-dropout", 0,
        "--augment" if augment else "--no-augment")  # fmt: skip
    assert len(seen["train"]) == 2 * 24 and set(seen["train"]) == ({0, 1} if augment else {0})
    assert set(seen["rest"]) == {0}


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_are_those_of_the_epoch_that_is_kept(flags, keep, tmp_path):
    folder = run(flags, tmp_path / "run", "--epochs", 3, "--keep", keep)
    log, metrics = json_lines(folder / "log.jsonl"), json.loads((folder / "metrics-valid.json").read_text())
    scores = [line["valid_main_f1"] for line in log]
    chosen = 3 if keep == "last" else 1 + scores.index(max(scores))
    assert log[-1]["best_epoch"] == chosen and main_score(metrics) == pytest.approx(scores[chosen - 1])


def test_shuffled_photos_are_the_same_wrong_ones_always(flags, tmp_path, monkeypatch, capsys):
    """Training and scoring read what `shuffled_photos` says of each split, in every epoch; test once."""
    read, seen = FeatureCache.read, []

    def watched(self, photos, views=None):
        seen.append(list(photos))
        return read(self, photos, views)

    monkeypatch.setattr(FeatureCache, "read", watched)
    more = ("--shuffle-photos", "--no-standardise", "--photo-dropout", 0, "--batch-size", 1,
            "--eval-batch-size", 1)  # fmt: skip
    folder = run(flags, tmp_path / "run", *more)
    model, config, dataset, posts = open_run(folder, "test", "cpu")
    wrong = {split: shuffled_photos([e.image_id for e in examples], posts.cache, 1337)
             for split, examples in dataset.examples.items()}  # fmt: skip
    assert config["shuffle_photos"] and "SHUFFLED" in capsys.readouterr().out
    expected = [*wrong["train"].values()] * 2 + [*wrong["valid"].values()] * 3 + [*wrong["test"].values()]
    assert sorted(photo for batch in seen for photo in batch) == sorted(expected)
    records = read_predictions(folder / "predictions-test.jsonl")
    assert [r["image_id"] for r in records] == [e.image_id for e in posts.examples]
    again = predict_posts(model, posts.showing(wrong["test"]), config["labels"], 1, "cpu", "float32")
    assert [r["probability"] for r in again] == [r["probability"] for r in records]
    evaluate.main(["--image-check", "--run", str(folder)])
    assert "trained on shuffled photos" in capsys.readouterr().out
    evaluate.main(["--run", str(folder)])
    assert "TRAINED AND SCORED WITH OTHER POSTS' PHOTOS" in capsys.readouterr().out
    page = report.main(["--run", str(folder)]).read_text(encoding="utf-8")
    assert "Trained and scored with other posts' photos" in page


def test_a_run_in_bfloat16_answers_in_float32_on_a_cpu(flags, tmp_path, monkeypatch):
    folder, used = run(flags, tmp_path / "run", "--precision", "bfloat16", "--epochs", 1), []

    def watched(device, precision):
        used.append(precision)
        return torch.autocast("cpu", enabled=False)

    monkeypatch.setattr("parts.posts.autocast", watched)
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1", "--device", "cpu"])
    predictor.Predictor(folder, "cpu")([{"text": "Jordan"}])
    assert set(used) == {"float32"}


def test_a_diverged_run_stops(flags, tmp_path):
    """With the first step that went wrong and its posts; the state from before it is kept."""
    bad = ("--lr", 1e30, "--max-grad-norm", "inf", "--warmup-ratio", 0, "--epochs", 3, "--save-every", 0)
    message = r"epoch 1, step \d: the loss or its gradient is not finite .posts (train_\d+(, )?){8}.; lower"
    with pytest.raises(ValueError, match=message) as error:
        run(flags, tmp_path / "run", *bad)
    assert "--lr (1e+30)" in str(error.value) and not list((tmp_path / "run").glob("metrics-*"))
    progress = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]
    assert f"step {progress['step'] + 1}:" in str(error.value) and np.isfinite(progress["loss"])


def test_the_photo_is_what_tells(tmp_path, capsys):
    """End to end: on the demo data every system reads the photo, and text alone cannot."""
    demo.write_dataset(tmp_path / "demo", posts=(280, 60, 80))
    places = [*("--dataset", "demo"), *("--data-dir", tmp_path), *("--cache-dir", tmp_path)]
    for kind in backbone_flags(tmp_path, views=1):
        extract_features.main([str(arg) for arg in [*places, *kind]])
    flags = [*places, "--img-size", 64, "--text-encoder", tmp_path / "demo" / "encoder", "--epochs", 15,
             "--lr", 1e-3]  # fmt: skip
    runs = {"none": ["--fusion", "none"], "film": ["--fusion", "film"]}
    runs |= {system: system_flags(system, tmp_path) for system in PARTS}
    runs["bert-caption"] += ["--fusion", "cross-attention"]
    scores = {}
    for name, more in runs.items():
        folder = run([*flags, *more], tmp_path / name)
        evaluate.main(["--image-check", "--device", "cpu", "--run", str(folder)])
        check = json.loads((tmp_path / name / "image-check-test.json").read_text())
        scores[name] = {kind: main_score(check[kind]) for kind in ("true", "none")}
        scores[name]["shuffled"] = [main_score(metrics) for metrics in check["shuffled"]]
    text_only = scores.pop("none")
    assert text_only["true"] == text_only["none"] <= 0.80 and "text only" in capsys.readouterr().out
    for name, score_of in scores.items():
        assert score_of["true"] >= (0.95 if name == "film" else 0.90), (name, score_of)
        assert len(score_of["shuffled"]) == 3, name
        assert max(*score_of["shuffled"], score_of["none"]) <= text_only["true"] + 0.07, (name, score_of)
    # The check's true photos are the run's own score; a shuffle is what shuffled_photos says it is.
    metrics = json.loads((tmp_path / "film" / "metrics-test.json").read_text())
    assert scores["film"]["true"] == main_score(metrics)
    model, config, _, posts = open_run(tmp_path / "film", "test", "cpu")
    swap = shuffled_photos([example.image_id for example in posts.examples], posts.cache, 0)
    again = predict_posts(model, posts.showing(swap), config["labels"], 12, "cpu", "float32")
    assert main_score(score(again)) == scores["film"]["shuffled"][0]


# ---------------------------------------------------------------------------------------------------- --track


CALLS = []
MODULE = """
from test_train import CALLS
def call(name):
    def function(*args, **more):
        CALLS.append((name, args, more))
        if name in BROKEN:
            raise RuntimeError("no network")
    return function
init, log, finish = map(call, ("init", "log", "finish"))
"""


@pytest.mark.parametrize("broken", [(), ("init", "log", "finish")])
def test_numbers_go_to_a_module_of_ones_own_whose_failures_stop_nothing(
    flags, tmp_path, monkeypatch, capsys, broken
):
    (tmp_path / "mytracker.py").write_text(f"BROKEN = {broken}\n{MODULE}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mytracker", raising=False)
    CALLS.clear()
    more = ("--fusion", "film", "--align", "contrastive=0.1")
    plain = run(flags, tmp_path / "plain", *more)
    folder = run(flags, tmp_path / "run", *more, "--track", "mytracker")
    for name in ("log.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert [name for name, *_ in CALLS] == ["init", *["log"] * 5, "finish"]
    about, logs = CALLS[0][2], [(args[0], more["step"]) for name, args, more in CALLS if name == "log"]
    assert (about["project"], about["name"], about["config"]["fusion"]) == ("demo", "run", "film")
    lines = json_lines(folder / "log.jsonl")
    for (step, at), (epoch, end), line in zip(logs[:4:2], logs[1:4:2], lines, strict=True):
        assert epoch == line and at == end == 3 * line["epoch"]
        assert step == {key: line[key] for key in ("loss", "loss_contrastive", "lr", "fusion_lr")}
    for split in ("valid", "test"):
        metrics = json.loads((folder / f"metrics-{split}.json").read_text())
        assert logs[4][0][f"best_{split}_main_f1"] == main_score(metrics)
    out = capsys.readouterr().out
    assert out.count("--track mytracker: init failed (no network); the run goes on") == bool(broken)
    assert out.count("failed (no network)") == bool(broken)
    assert ("--track mytracker: 7 calls of it failed" in out) == bool(broken)


def test_a_module_that_is_not_there_is_one_line(flags, tmp_path):
    with pytest.raises(ValueError, match="^--track nowhere: cannot be imported .No module.*; install it, or"):
        run(flags, tmp_path / "run", "--track", "nowhere")
    assert not (tmp_path / "run").exists()
