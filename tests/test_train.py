"""Training and scoring as a user runs them, on tiny data: what lands in a run folder, and what is refused."""

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARTS, backbone_flags
from forked import run_script
from PIL import Image
from safetensors.torch import load_file

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
from parts.posts import Posts, predict_posts, shuffled_photos
from parts.processes import lock
from parts.run_files import load_run
from parts.scores import entity_spans, main_score, read_predictions, score
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder
from parts import model, opening


@pytest.fixture(scope="module")
def flags(data_dir, cache_dir, encoder_dir):
    """Arguments of a quick run on tiny data, run folder left out."""
    return ["--data-dir", data_dir, "--cache-dir", cache_dir, "--text-encoder", encoder_dir, "--img-size", 64,
            "--epochs", 2, "--lr", 1e-3]  # fmt: skip


def run(flags, run_dir, *more):
    """Train; returns the run folder."""
    return train.main([str(arg) for arg in [*flags, "--dataset", "demo", "--run-dir", run_dir, *more]])


def system_flags(system, data_dir):
    """What to add to `flags` for one of `PARTS`."""
    _, size, _, text = PARTS[system]
    return ["--model", system, "--img-size", size, "--text-encoder", data_dir / "demo" / text]


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("fusion", [*FUSIONS, *PARTS])
@pytest.mark.parametrize("dataset", ["demo", "mnre"])
def test_a_run_folder_tells_the_whole_run(flags, tmp_path, dataset, fusion, data_dir, capsys):
    more = system_flags(fusion, data_dir) if fusion in PARTS else ["--fusion", fusion]
    folder = run([*flags, *more], tmp_path / "run", "--dataset", dataset, "--max-len", 40)
    out = capsys.readouterr().out
    examples = load_dataset(dataset, data_dir).examples
    scored = [split for split in ("valid", "test") if split in examples]
    names = {"config.json", "encoder", "model.safetensors", "log.jsonl", "timing.jsonl"}
    assert {path.name for path in folder.iterdir()} == names | {
        f"{kind}-{split}.json{'l' * (kind == 'predictions')}"
        for kind in ("metrics", "predictions") for split in scored
    }
    assert ("mnre has no test file" in out) == ("test" not in examples)
    assert ("posts have a photo" in out) == (fusion not in ("none", "bert-caption"))
    assert ("posts have a caption" in out) == (fusion == "bert-caption")
    for split in scored:
        records = read_predictions(folder / f"predictions-{split}.jsonl")
        assert [r["id"] for r in records] == [example.id for example in examples[split]]
        for record, example in zip(records, examples[split], strict=True):
            gold = list(example.labels) if dataset == "demo" else example.label
            assert (record["words"], record["gold"]) == (list(example.words), gold)
            assert (
                dataset == "mnre"
                or len(record["predicted"]) == len(record["probability"]) == len(example.words)
            )
        metrics = json.loads((folder / f"metrics-{split}.json").read_text())
        data = metrics.pop("data")
        assert metrics == score(records) and data["sha256"] in (folder / "config.json").read_text()
    log = json_lines(folder / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2] and all(np.isfinite(line["loss"]) for line in log)
    # The scores reported are those of the best epoch on valid, the earlier one of equals.
    valid = [line["valid_main_f1"] for line in log]
    assert log[-1]["best_epoch"] == 1 + valid.index(max(valid))
    assert main_score(json.loads((folder / "metrics-valid.json").read_text())) == pytest.approx(max(valid))
    # A run loads from its folder alone and answers the same.
    model, tokenizer, config = load_run(folder)
    rows, _ = encode(tokenizer, examples["valid"], config["labels"], config["max_len"])
    cache = FeatureCache(config["features"]) if fusion != "none" else None
    posts = Posts(examples["valid"], rows, tokenizer.pad_token_id, cache)
    again = predict_posts(model, posts, config["labels"], 3, "cpu", "float32")
    assert [r["predicted"] for r in again] == [
        r["predicted"] for r in read_predictions(folder / "predictions-valid.jsonl")
    ]


def test_same_seed_same_run_digit_for_digit(flags, tmp_path):
    first, second, other = (run(flags, tmp_path / str(i), "--seed", seed) for i, seed in enumerate((1, 1, 2)))
    for name in ("log.jsonl", "predictions-valid.jsonl", "predictions-test.jsonl", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "log.jsonl").read_bytes() != (other / "log.jsonl").read_bytes()


def test_the_loop_trains_and_logs_whatever_losses_a_system_has(flags, tmp_path, monkeypatch):
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
            made = super().total(sums, words, posts)
            labels, count = self.seen[-1]
            assert (words, posts) == (count.sum(), len(count)) and sums[0] == labels.sum()
            torch.testing.assert_close(made, labels.sum() / words + 0.5 * sums[1] / posts)
            self.small.append(sums[1].item())
            return made

    plain = run(flags, tmp_path / "plain", "--fusion", "film", "--epochs", 1)
    system = SYSTEMS["bert-resnet50"]
    monkeypatch.setitem(SYSTEMS, "bert-resnet50", replace(system, model=More))
    more = run(flags, tmp_path / "more", "--fusion", "film", "--epochs", 1, "--model", "bert-resnet50")
    (line,), (without,) = json_lines(more / "log.jsonl"), json_lines(plain / "log.jsonl")
    assert line["loss_small"] == pytest.approx(sum(More.small) / 24, rel=1e-5) and "loss_small" not in without
    labels, words = (torch.cat([step[i] for step in More.seen]) for i in (0, 1))
    assert line["loss"] == pytest.approx((labels.sum() / words.sum()).item(), rel=1e-5)
    assert (
        load_file(more / "model.safetensors")["head.linear.bias"]
        .ne(load_file(plain / "model.safetensors")["head.linear.bias"])
        .any()
    )


def test_alignment_is_trained_beside_the_labels_on_the_texts_before_the_fusion(flags, tmp_path):
    """What is logged is the loss of align.py of each batch, by hand from the states that the encoder gave."""
    seen, fusion = [], model.TextRegions

    class Watched(fusion):
        def forward(self, batch, return_weights=False, return_losses=False):
            output = super().forward(batch, return_weights, return_losses)
            if return_losses:
                with torch.no_grad():
                    was = self.training
                    text = self.eval().encoder(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                    ).last_hidden_state
                    self.train(was)
                    regions = unit_length(clean(batch["regions"].float(), batch["region_mask"]))
                    given = (text, batch["own_mask"], regions, batch["region_mask"], batch["photo_row"])
                    seen.append(
                        {name: (alignment(*given), output.losses[name]) for name, alignment in self.align.items()}
                    )
                    for row, own in zip(batch["input_ids"], batch["own_mask"], strict=True):
                        special = torch.isin(row, torch.tensor([0, 2, 3]))  # [PAD], [CLS], [SEP]
                        assert torch.equal(own, ~special)
            return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "bert-resnet50", replace(SYSTEMS["bert-resnet50"], model=Watched))
        more = (
            "--model", "bert-resnet50", "--fusion", "film",
            "--align", "contrastive=0.1", "matching=0.5", "local=2", "--dropout", 0,
        )  # fmt: skip
        folder = run(flags, tmp_path / "run", *more, "--epochs", 1, "--batch-size", 6)
    (log,) = json_lines(folder / "log.jsonl")
    for name in ("contrastive", "matching", "local"):
        for step in seen:
            torch.testing.assert_close(step[name][0], step[name][1].detach(), rtol=1e-4, atol=1e-5)
        assert log[f"loss_{name}"] == pytest.approx(
            sum(step[name][1].sum().item() for step in seen) / 24, rel=1e-4
        )
    loaded, _, config = load_run(folder)
    assert config["align"] == {"contrastive": 0.1, "matching": 0.5, "local": 2.0}
    assert loaded.loss_weights == {"labels": 1.0, "contrastive": 0.1, "matching": 0.5, "local": 2.0}
    assert train.parse_args([*map(str, more), "--seed", "1"]).run_dir.endswith(
        "film-contrastive0.1-matching0.5-local2-dropout0-s1"
    )


@pytest.mark.parametrize(
    "more, said",
    [
        (("--align", "contrastive"), "invalid"),
        (("--align", "clip=1"), "NAME is one of contrastive, local, matching, supervised"),
        (("--align", "local=-1"), "not from 0"), (("--align", "local=1", "local=2"), "named twice"),
        (("--align", "local=1", "--fusion", "none"), "no cached regions"),
        (("--align", "local=1", "--model", "vilt"), "no cached regions"),
    ],
)  # fmt: skip
def test_alignments_that_cannot_be_are_refused(more, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(list(more))
    assert said in capsys.readouterr().err


def test_a_share_of_train_is_drawn_by_the_seed(flags, tmp_path, data_dir, capsys):
    posts, trained = load_dataset("demo", data_dir).examples["train"], []
    make = opening.make_posts

    def watched(config, tokenizer, examples, *more):
        trained.append([example.id for example in examples])
        return make(config, tokenizer, examples, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "make_posts", watched)
        for seed in (1, 1, 2):
            run(
                flags, tmp_path / str(len(trained)), "--fusion", "none", "--epochs", 1, "--seed", seed,
                "--train-share", 0.3,
            )  # fmt: skip
    first, again, other = trained[::3]
    assert len(first) == 8 and set(first) < {example.id for example in posts}
    assert first == again != other and first == [e.id for e in posts if e.id in set(first)]
    assert "train      8 posts" in capsys.readouterr().out


def test_a_crf_is_trained_scored_and_read_back(flags, tmp_path):
    folder = run(flags, tmp_path / "crf", "--fusion", "film", "--decoder", "crf")
    weights = load_file(folder / "model.safetensors")
    assert all(weights[f"head.crf.{name}"].abs().max() > 0 for name in ("start", "transitions", "end"))
    loaded, config, _, posts = open_run(folder, "test", "cpu")
    recorded = read_predictions(folder / "predictions-test.jsonl")
    batch = posts.batch(range(len(posts)))
    with torch.inference_mode():
        best, probability = loaded.head.crf.decode(loaded(batch).logits, batch["word_starts"] >= 0)
    for record, labels, chance in zip(recorded, best.tolist(), probability.tolist(), strict=True):
        reached = [p is not None for p in record["probability"]]
        said = [config["labels"][k] if ok else "O" for k, ok in zip(labels, reached, strict=False)]
        assert record["predicted"] == said
        wanted = [p for p, ok in zip(chance, reached, strict=False) if ok]
        assert [p for p in record["probability"] if p is not None] == pytest.approx(wanted, abs=1e-5)


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
        best, _ = model.head.crf.decode(model(batch).logits, batch["word_starts"] >= 0, bias)
        attended = model(batch, return_weights=True).weights
    for labels, record in zip(best, recorded, strict=True):
        assert record["predicted"] == [config["labels"][k] for k in labels[: len(record["words"])]]
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
    page = report.main(["--run", str(folder)]).read_text(encoding="utf-8")
    page = page.partition('<script type="application/json" id="data">')[2]
    page = json.loads(page.partition("</script>")[0])
    shown = {post["id"]: post["maps"]["places"] for post in page["posts"]}
    assert page["rest"] == "coarser views of it" and "decoder visual-crf" in page["facts"]["System"]
    for example, row, weight in zip(examples, posts.rows, attended, strict=True):
        assert shown[example.id] == pytest.approx(weight[row["word_starts"]].sum(-1).tolist(), abs=2e-3)


def test_words_are_aligned_with_both_finer_scales_of_a_pyramid(data_dir, cache_dir, encoder_dir):
    dataset, cache = load_dataset("demo", data_dir), FeatureCache(cache_dir / "demo-resnet50-64.h5")
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.0)
    config = {"task": "ner", "labels": dataset.labels, "fusion": "pyramid", "decoder": "softmax", "heads": 8,
              "dropout": 0, "align": {"local": 1, "contrastive": 1}, "region_dim": cache.region_dim,
              }  # fmt: skip
    made, examples = model.TextRegions(encoder, config).eval(), dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    photos = [*[example.image_id for example in examples[1:]], None]
    batch = collate(rows, tokenizer.pad_token_id) | cache.read(photos)
    with torch.no_grad():
        losses = made(batch, return_losses=True).losses
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        text = made.encoder(**given).last_hidden_state
        regions, real = batch["regions"].float(), batch["region_mask"]
        assert batch["region_grid"][:-1].eq(2).all() and not real[-1].any()
        cells = F.adaptive_avg_pool2d(regions.mT.unflatten(-1, (2, 2)), 3).flatten(2).mT
        scales = [(unit_length(cells), real.any(1, keepdim=True).expand(-1, 9)), (unit_length(regions), real)]
        local, whole = made.align["local"], made.align["contrastive"]
        fine = [local(text, batch["own_mask"], *scale, batch["photo_row"]) for scale in scales]
        torch.testing.assert_close(losses["local"], (fine[0] + fine[1]) / 2, rtol=1e-4, atol=1e-4)
        assert (fine[0] - fine[1])[:-1].abs().min() > 1e-4 and losses["local"][-1] == 0
        wanted = whole(text, batch["own_mask"], *scales[1], batch["photo_row"])
        torch.testing.assert_close(losses["contrastive"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more, said",
    [
        (("--dataset", "mnre"), "--decoder visual-crf: labels of words are decoded together"),
        (("--model", "blip"), "--decoder visual-crf: blip has no cached regions"),
        (("--model", "vilt"), "--decoder visual-crf: vilt has no cached regions"),
        (("--fusion", "none"), "--decoder visual-crf: --fusion none has no cached regions"),
    ],
)
def test_a_visual_crf_is_refused_where_it_sees_nothing(more, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--decoder", "visual-crf", *more])
    assert said in capsys.readouterr().err


def test_captions_have_no_places_for_a_pyramid(flags, tmp_path, data_dir):
    message = r"\A--fusion pyramid: the regions of \S+ are no places in a photo; .*\Z"
    with pytest.raises(ValueError, match=message):
        run([*flags, *system_flags("bert-caption", data_dir)], tmp_path / "run", "--fusion", "pyramid")
    assert not (tmp_path / "run").exists()


def test_run_folders_tell_decoders_and_fusions_apart():
    for decoder, part in (("softmax", ""), ("crf", "-crf"), ("visual-crf", "-visual-crf")):
        made = train.parse_args(["--fusion", "pyramid", "--heads", "4", "--decoder", decoder])
        assert made.run_dir == f"runs/twitter2017-roberta-resnet50-pyramid{part}-heads4-s1337"


def test_defaults_are_the_reference_settings():
    args = train.parse_args(["--fusion", "film", "--seed", "1337", "--device", "cpu"])
    expected = {
        "dataset": "twitter2017", "model": "roberta-resnet50", "text_encoder": "roberta-base", "epochs": 5,
        "seed": 1337, "batch_size": 8, "eval_batch_size": 12, "max_len": 128, "lr": 3e-5, "fusion_lr": 1.1e-3,
        "weight_decay": 0.01, "warmup_ratio": 0.1, "dropout": 0.1, "heads": 8, "img_size": 224,
        "augment": True, "photo_dropout": 0.1, "precision": "auto",
        "features": "features/twitter2017-resnet50-224.h5",
        "run_dir": "runs/twitter2017-roberta-resnet50-film-s1337",
    }  # fmt: skip
    assert {key: getattr(args, key) for key in expected} == expected
    args = train.parse_args(["--dataset", "mnre", "--device", "cuda"])
    assert (args.model, args.text_encoder, args.precision) == ("bert-resnet50", "bert-base-uncased", "auto")


def test_defaults_of_the_other_systems():
    found = {}
    for system in PARTS:
        args = train.parse_args(["--dataset", "mnre", "--model", system])
        found[system] = (args.text_encoder, args.fusion, args.max_len, args.features, args.run_dir)
    assert found == {
        "bert-caption": ("bert-base-uncased", "film", 128,
                         "features/mnre-caption-64.h5", "runs/mnre-bert-caption-film-s1337"),
        "clip-bert": ("bert-base-uncased", "film", 128,
                      "features/mnre-clip-224.h5", "runs/mnre-clip-bert-film-s1337"),
        "blip": ("Salesforce/blip-itm-base-coco", None, 128,
                 "features/mnre-blip-384.h5", "runs/mnre-blip-s1337"),
        "vilt": ("dandelin/vilt-b32-mlm", None, 40,
                 "features/mnre-pixels-384.h5", "runs/mnre-vilt-s1337"),
    }  # fmt: skip


@pytest.mark.parametrize("model", ["blip", "vilt"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_is_refused_where_there_is_none_to_choose(model, fusion, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--model", model, "--fusion", fusion])
    assert f"--fusion {fusion}: {model} has a fusion of its own" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["bert-resnet50", *PARTS])
def test_what_trains_and_what_is_frozen_is_said(flags, tmp_path, data_dir, cache_dir, system, capsys):
    more = system_flags(system, data_dir) if system in PARTS else ["--model", system]
    folder = run([*flags, *more], tmp_path / "run", "--epochs", 1)
    out, (model, _, config) = capsys.readouterr().out, load_run(folder)
    said = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in out.splitlines() if " parameters" in line and not line.startswith("in all")
    }
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    counts = {part: count for part, count in counts.items() if count}  # no alignment was asked for
    frozen = FeatureCache(config["features"]).attrs["parameters"]
    assert said == counts | ({"frozen": frozen} if frozen else {}) and (system == "vilt") == (frozen == 0)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if system == "bert-resnet50":
        assert frozen == 23_508_032  # ResNet50 without its classifier


RESULTS = ("log.jsonl", "predictions-valid.jsonl", "predictions-test.jsonl", "model.safetensors")


@pytest.mark.parametrize("system", ["film", "vilt"])
def test_a_stopped_run_goes_on_and_ends_the_same(flags, tmp_path, data_dir, monkeypatch, system, capsys):
    """Stopped at every kind of moment: in each epoch, between epochs, as a state or weights are written."""
    more = system_flags(system, data_dir) if system in PARTS else ["--fusion", system]
    flags = [*flags, *more, "--save-every", 0, "--epochs", 3]
    whole = run(flags, tmp_path / "whole")
    assert not (whole / "state.pt").exists()
    places = {
        "replace": os, "save_weights": train, "save_state": train, "write_json_lines": train, "score": train,
    }  # fmt: skip
    calls, stop_at = 0, 0

    class Stop(BaseException):
        pass

    def stopping(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop
            return real(*args, **kwargs)

        return call

    for name, module in places.items():
        monkeypatch.setattr(module, name, stopping(getattr(module, name)))
    run(flags, tmp_path / "counted")
    total = calls
    for first in range(2, total, 11 if system == "film" else 29):
        for stop_at in (first, first // 2 + 1, 0):  # stopped twice, then left alone
            calls = 0
            try:
                run(flags, tmp_path / f"stopped{first}", "--resume")
            except Stop:
                continue
        for name in RESULTS:
            assert (
                (tmp_path / f"stopped{first}" / name).read_bytes() == (whole / name).read_bytes()
            ), (first, name)
        assert {p.name for p in (tmp_path / f"stopped{first}").iterdir()} == {p.name for p in whole.iterdir()}
    assert total > 25 and "resuming   in epoch" in capsys.readouterr().out


def test_resume_is_refused_with_other_settings_and_leaves_a_finished_run_alone(flags, tmp_path, capsys):
    folder = run(flags, tmp_path / "run", "--resume", "--epochs", 1)
    assert f"{folder}: nothing there to resume; the run begins" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    run(flags, folder, "--resume", "--epochs", 1)
    assert "is finished; left alone" in capsys.readouterr().out
    with pytest.raises(
        ValueError,
        match=r"begun with other settings or data: epochs .run: 1, now: 2.; lr .run: 0.001, now: 0.5",
    ):
        run(flags, folder, "--resume", "--lr", 0.5)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
    (folder / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="state.pt: not a state to resume from"):
        run(flags, folder, "--resume", "--epochs", 1)
    with pytest.raises(SystemExit):
        train.parse_args(["--resume", "--overwrite"])


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
    assert "standardised" in train.parse_args(["--standardise"]).run_dir
    run(flags, tmp_path / "none", "--fusion", "none", "--standardise", "--epochs", 1)  # a loop over fusions
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "vilt", "--standardise"])
    assert "--standardise: vilt reads" in capsys.readouterr().err


def test_two_runs_into_one_folder(flags, tmp_path):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    before = (folder / "model.safetensors").read_bytes()
    held = lock(folder)
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(ValueError, match="run: another process is writing it; wait for it or stop it"):
            run(flags, folder, flag, "--epochs", 1)
    os.close(held)
    assert (folder / "model.safetensors").read_bytes() == before


class Harm:
    """What a stranger's pickle may hold: code that runs when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_strangers_run_folder_cannot_run_code(flags, tmp_path):
    folder, mark = run(flags, tmp_path / "run", "--epochs", 1), tmp_path / "ran"
    for save in (
        lambda path: torch.save({"progress": Harm(mark)}, path),
        lambda path: path.write_bytes(pickle.dumps(Harm(mark))),
    ):
        save(folder / "state.pt")
        with pytest.raises(ValueError, match="not a state to resume from"):
            run(flags, folder, "--resume", "--epochs", 1)
        weights = (folder / "model.safetensors").read_bytes()
        save(folder / "model.safetensors")
        with pytest.raises(ValueError, match="the run does not load"):
            load_run(folder)
        (folder / "model.safetensors").write_bytes(weights)
    assert not mark.exists()


def test_pretrained_and_new_layers_have_their_own_rate_and_biases_no_decay(flags, tmp_path):
    model, _, _ = load_run(run(flags, tmp_path / "run", "--epochs", 1, "--fusion", "cross-attention"))
    args = train.parse_args(["--lr", "0.25", "--fusion-lr", "0.5", "--weight-decay", "0.1"])
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in train.parameter_groups(model, args) for parameter in group["params"]
    }  # fmt: skip
    assert len(settings) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decayed = not name.endswith("bias") and ".norm" not in name and "LayerNorm" not in name
        assert settings[id(parameter)] == (0.25 if "encoder" in name else 0.5, 0.1 * decayed), name


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
    run(flags, tmp_path / "run", "--photo-dropout", 0, "--augment" if augment else "--no-augment")
    assert len(seen["train"]) == 2 * 24 and set(seen["train"]) == ({0, 1} if augment else {0})
    assert set(seen["rest"]) == {0}


def test_one_view_is_said_in_one_line(flags, tmp_path, data_dir, capsys):
    extract_features.main([
        "--dataset", "demo", "--data-dir", str(data_dir), "--cache-dir", str(tmp_path), "--weights", "random",
        "--img-size", "32", "--views", "1", "--workers", "0",
    ])  # fmt: skip
    capsys.readouterr()
    run(flags, tmp_path / "run", "--cache-dir", tmp_path, "--img-size", 32, "--epochs", 1)
    assert capsys.readouterr().out.count("one view only: no augmentation") == 1


def test_test_is_scored_once_with_the_best_epoch(flags, tmp_path, monkeypatch):
    calls = []

    def watched(model, posts, *args):
        calls.append(posts.examples[0].id.split("_")[0])
        return predict_posts(model, posts, *args)

    monkeypatch.setattr(train, "predict_posts", watched)
    run(flags, tmp_path / "run", "--epochs", 3)
    assert calls == ["valid"] * 3 + ["valid", "test"]


def test_photos_that_are_missing_are_counted(flags, tmp_path, data_dir, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("train_0000.jpg", "valid_0001.jpg"):
        (images / name).symlink_to(data_dir / "demo" / "images" / name)
    extract_features.main([
        "--dataset", "demo", "--data-dir", str(data_dir), "--cache-dir", str(tmp_path), "--weights", "random",
        "--img-size", "64", "--images", str(images), "--workers", "0",
    ])  # fmt: skip
    capsys.readouterr()
    folder = run(flags, tmp_path / "run", "--cache-dir", tmp_path, "--epochs", 1)
    out = capsys.readouterr().out
    assert "train: 1 of 24 posts have a photo" in out and "test: 0 of 8 posts have a photo" in out
    assert "no post of test has a photo" in out
    assert json.loads((folder / "metrics-valid.json").read_text())["posts_without_photo"] == 7
    assert [r["photo"] for r in read_predictions(folder / "predictions-valid.jsonl")] == [
        i == 1 for i in range(8)
    ]


@pytest.mark.parametrize("train_posts, valid_posts, kinds", [
    (["a B-PER"], ["a B-PER"], 3),  # one post of one word
    (["a O", "b O"], ["a O"], 1),  # nothing but O: one label to choose from
    (["\u200b B-PER"] * 9, ["\u200b O", "a B-PER"], 3),  # no word has a sub-token: the loss is over nothing
    (["a B-PER b O"] * 9, ["a B-PER " + "b O " * 10_000], 3),  # a post of 10,001 words
])  # fmt: skip
def test_odd_data_sets_train_and_are_scored(flags, tmp_path, train_posts, valid_posts, kinds, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for split, posts in (("train", train_posts), ("valid", valid_posts), ("test", valid_posts)):
        fields = [post.split(" ") for post in posts]
        texts = ["\n".join(f"{w} {y}" for w, y in zip(f[::2], f[1::2], strict=False)) for f in fields]
        (own / f"{split}.txt").write_text(
            "\n\n".join(f"IMGID:{i}\n{text}" for i, text in enumerate(texts)), encoding="utf-8"
        )
    folder = run(flags, tmp_path / "run", "--dataset", own, "--fusion", "none", "--epochs", 1)
    metrics = json.loads((folder / "metrics-test.json").read_text())
    assert metrics["words"] == sum(len(post.split()) // 2 for post in valid_posts)
    assert len(json.loads((folder / "config.json").read_text())["labels"]) == kinds
    assert 0 <= metrics["token"]["accuracy"] <= 1 and np.isfinite(json_lines(folder / "log.jsonl")[0]["loss"])


def limited(folder, megabytes, *command):
    """Run a script where no file may grow past a size, as on a full disk: (status, error lines, stderr)."""
    done = run_script(folder, *command, limit=int(megabytes * 1e6))
    return done.returncode, [line for line in done.stderr.splitlines() if "error: " in line], done.stderr


def test_a_full_disk_is_one_clear_line_and_earlier_results_stay(flags, tmp_path, data_dir):
    """Writing stops in weights, in a state, in features; nothing half-written gets a finished name."""
    arguments = [
        *flags, "--dataset", "demo", "--fusion", "none", "--run-dir", tmp_path / "run", "--epochs", 1,
    ]  # fmt: skip
    status, said, all_said = limited(tmp_path, 0.2, "train.py", *arguments)
    assert status == 1 and len(said) == 1 and "Traceback" not in all_said, all_said
    assert (
        not list((tmp_path / "run").glob("*.safetensors*"))
        and not list((tmp_path / "run").glob("predictions*"))
    )
    status, said, all_said = limited(tmp_path, 0.6, "train.py", *arguments, "--resume", "--save-every", 0)
    assert status == 1 and len(said) == 1 and not list((tmp_path / "run").glob("state.pt*")), all_said
    folder = run(flags, tmp_path / "run", "--fusion", "none", "--epochs", 1, "--resume")  # with room again
    assert (folder / "metrics-test.json").exists()
    extract = ["extract_features.py", "--dataset", "demo", "--data-dir", data_dir, "--cache-dir", tmp_path,
               "--weights", "random", "--img-size", 64, "--views", 1, "--workers", 0]  # fmt: skip
    status, said, all_said = limited(tmp_path, 0.3, *extract)
    assert status == 1 and len(said) == 1 and not list(tmp_path.glob("*.h5")), all_said
    path = extract_features.main(list(map(str, extract[1:])))
    assert all(map(FeatureCache(path).whole, range(40)))


def test_a_folder_that_cannot_be_written_is_one_clear_line(data_dir):
    """/sys takes no new folder, from root neither."""
    places = ["--dataset", "demo", "--data-dir", data_dir]
    for command in (
        ["train.py", *places, "--fusion", "none", "--text-encoder", data_dir / "demo" / "encoder",
         "--run-dir", "/sys/run"],
        ["extract_features.py", *places, "--weights", "random", "--img-size", 64,
         "--cache-dir", "/sys/features"],
    ):  # fmt: skip
        status, said, all_said = limited("/", 100, *command)
        assert status == 1 and len(said) == 1 and "/sys/" in said[0] and "Traceback" not in all_said, all_said


def test_shuffled_photos_are_the_same_wrong_ones_always(flags, tmp_path, monkeypatch, capsys):
    """Training and scoring read what `shuffled_photos` says of each split, in every epoch."""
    read, seen = FeatureCache.read, []

    def watched(self, photos, views=None):
        seen.append(list(photos))
        return read(self, photos, views)

    monkeypatch.setattr(FeatureCache, "read", watched)
    folder = run(
        flags, tmp_path / "run", "--shuffle-photos", "--photo-dropout", 0,
        "--batch-size", 1, "--eval-batch-size", 1,
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    cache, dataset = FeatureCache(config["features"]), load_dataset("demo", config["data_dir"])
    wrong = {
        split: shuffled_photos([e.image_id for e in examples], cache, 1337)
        for split, examples in dataset.examples.items()
    }
    assert config["shuffle_photos"] and "SHUFFLED" in capsys.readouterr().out
    own = [photo for batch in seen for photo in batch]
    assert sorted(own) == sorted(
        [*wrong["train"].values()] * 2 + [*wrong["valid"].values()] * 3 + [*wrong["test"].values()]
    )
    by_words = {tuple(e.words): e.image_id for e in dataset.examples["test"]}
    records = read_predictions(folder / "predictions-test.jsonl")
    assert (
        [r["image_id"] for r in records] == [e.image_id for e in dataset.examples["test"]]
        and len(by_words) > 1
    )
    model, tokenizer, _ = load_run(folder)
    rows, _ = encode(tokenizer, dataset.examples["test"], config["labels"], config["max_len"])
    posts = Posts(dataset.examples["test"], rows, 0, cache, swap=wrong["test"])
    again = predict_posts(model, posts, config["labels"], 1, "cpu", "float32")
    assert [r["probability"] for r in again] == [r["probability"] for r in records]
    evaluate.main(["--image-check", "--run", str(folder)])
    assert "trained on shuffled photos" in capsys.readouterr().out
    evaluate.main(["--run", str(folder)])
    assert "TRAINED AND SCORED WITH OTHER POSTS' PHOTOS" in capsys.readouterr().out
    assert (
        "Trained and scored with other posts' photos"
        in report.main(["--run", str(folder)]).read_text(encoding="utf-8")
    )


def test_run_folders_tell_encoders_apart():
    for encoder, name in (
        ("roberta-base", ""), ("vinai/bertweet-base", "-bertweet-base"),
        ("models/mine", "-mine"), ("models/mine/", "-mine"),
    ):  # fmt: skip
        args = train.parse_args(["--text-encoder", encoder, "--fusion", "none"])
        assert args.run_dir == f"runs/twitter2017-roberta-resnet50{name}-none-s1337"


OF_TRAINING = [
    (["--img-size", "64", "--features", "x.h5"],
        "--img-size and --features: either tells which feature file"),
    (["--model", "bert-caption", "--images", "x"], "--images: bert-caption reads captions"),
]  # fmt: skip
OF_EVALUATION = [
    (["--run", "r", "--score", "f1"], "--score goes with --compare"),
    (["--run", "r", "--shuffles", "2"], "--shuffles goes with"),
    (["--predictions", "p", "--split", "test"], "--split goes with"),
    (["--run", "r", "--images", "i"], "--images goes with"),
    (["--compare", "a", "b", "--data-dir", "d"], "--data-dir goes with"),
    (["--run", "r", "--features", "f"], "--features goes with"),
]


@pytest.mark.parametrize("args, message", OF_TRAINING + OF_EVALUATION)
def test_options_that_do_not_go_together_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        (evaluate if (args, message) in OF_EVALUATION else train).parse_args(args)
    assert message in capsys.readouterr().err


def own_folder(folder, colour, photos=6):
    """A folder of one's own: posts whose photos have one colour, and a size that differs with it."""
    (folder / "images").mkdir(parents=True)
    for split in ("train", "valid"):
        (folder / f"{split}.txt").write_text(
            "".join(f"IMGID:{i}\nAnn\tB-PER\nsaw\tO\n\n" for i in range(photos))
        )
    for i in range(photos):
        Image.new("RGB", (40 + i, 40 + colour), (colour, i, 0)).save(folder / "images" / f"{i}.png")
    return str(folder)


def test_features_of_another_folder_of_the_same_name_are_not_taken(flags, tmp_path, encoder_dir, capsys):
    """Also not after photos were replaced; a data set that was only renamed goes on with its features."""
    a, b = (own_folder(tmp_path / name / "data", colour) for name, colour in (("a", 10), ("b", 90)))
    places = ["--cache-dir", str(tmp_path), "--img-size", "32"]
    path = extract_features.main(
        [*places, "--dataset", a, "--weights", "random", "--views", "1", "--workers", "0"]
    )
    flags = ["--cache-dir", tmp_path, "--text-encoder", encoder_dir, "--epochs", 1]
    run([*flags, "--img-size", 32], tmp_path / "run-a", "--dataset", a)
    assert f"made from {a}/images" in capsys.readouterr().out
    other = f"made of other photos than those here: .*made from {a}/images"
    with pytest.raises(ValueError, match=other):
        run([*flags, "--img-size", 32], tmp_path / "run-b", "--dataset", b)
    with pytest.raises(ValueError, match=other):
        extract_features.main(
            [*places, "--dataset", b, "--weights", "random", "--views", "1", "--workers", "0"]
        )
    shutil.copytree(a, tmp_path / "renamed")
    run(flags, tmp_path / "run-c", "--dataset", tmp_path / "renamed", "--features", path)
    shutil.rmtree(tmp_path / "renamed" / "images")
    capsys.readouterr()
    run(flags, tmp_path / "run-d", "--dataset", tmp_path / "renamed", "--features", path)
    assert "6 of its photos are not here (--images names their folder)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=other):
        run(
            flags, tmp_path / "run-e", "--dataset", tmp_path / "renamed", "--features", path,
            "--images", f"{b}/images",
        )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no image folder .*imagse"):
        run(
            flags, tmp_path / "run-g", "--dataset", tmp_path / "renamed", "--features", path,
            "--images", f"{a}/imagse",
        )  # fmt: skip
    evaluate.main(
        ["--run", str(tmp_path / "run-a"), "--image-check", "--data-dir", str(tmp_path / "renamed")]
    )
    Image.new("RGB", (9, 9)).save(Path(a) / "images" / "3.png")
    with pytest.raises(ValueError, match=other):
        run([*flags, "--img-size", 32], tmp_path / "run-f", "--dataset", a)


def test_resume_after_the_data_changed_shows_what_differs(flags, tmp_path, data_dir):
    shutil.copytree(data_dir / "demo", tmp_path / "demo")
    flags = [*flags, "--data-dir", tmp_path, "--epochs", 1]
    folder = run(flags, tmp_path / "run")
    with open(tmp_path / "demo" / "valid.txt", "a", encoding="utf-8") as file:
        file.write("IMGID:valid_0000\nnew\tO\n")
    with pytest.raises(
        ValueError,
        match=(
            r"begun with other settings or data: data.valid.sha256 \(run: [0-9a-f]+, now: [0-9a-f]+\);"
            r" give those"
        ),
    ):
        run(flags, folder, "--resume")


def test_a_run_in_bfloat16_answers_in_float32_on_a_cpu(flags, tmp_path, monkeypatch):
    folder, used = run(flags, tmp_path / "run", "--precision", "bfloat16", "--epochs", 1), []
    monkeypatch.setattr(
        "parts.posts.autocast",
        lambda device, precision: used.append(precision) or torch.autocast("cpu", enabled=False),
    )
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1", "--device", "cpu"])
    predictor.Predictor(folder, "cpu")([{"text": "Jordan"}])
    assert set(used) == {"float32"}


def test_shuffled_runs_have_a_name_of_their_own(capsys):
    args = train.parse_args(["--shuffle-photos", "--dataset", "mnre", "--model", "vilt"])
    assert args.run_dir == "runs/mnre-vilt-shuffled-s1337"
    with pytest.raises(SystemExit):
        train.parse_args(["--shuffle-photos", "--fusion", "none"])
    assert "--fusion none is shown no photo" in capsys.readouterr().err


def test_your_own_data_in_every_script(flags, tmp_path, data_dir, capsys):
    """A folder with labels of its own, space separated, in several scripts, a post longer than --max-len."""
    own, photos = tmp_path / "own", data_dir / "demo" / "images"
    (own / "images").mkdir(parents=True)
    posts = {"train": ["東 京 が 好き", "Ада пишет"] * 8, "valid": ["Ада в 東"] * 3,
             "test": ["مرحبا Ада", "東 " * 60, "x"]}  # fmt: skip
    for split, texts in posts.items():
        lines = []
        for i, text in enumerate(texts):
            shutil.copy(photos / "train_0000.jpg", own / "images" / f"{split}{i}.jpg")
            lines += [
                f"IMGID:{split}{i}",
                *(f"{w} {'B-地名' if w == '東' else 'B-имя' if w == 'Ада' else 'O'}" for w in text.split()),
                "",
            ]
        (own / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    path = extract_features.main(
        [*places, "--weights", "random", "--img-size", "32", "--views", "1", "--workers", "0"]
    )
    assert path.name == "own-resnet50-32.h5"
    folder = run(flags, tmp_path / "run", *places, "--img-size", 32, "--max-len", 32)
    out = capsys.readouterr().out
    assert "test: 1 cut posts, 30 cut words" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["labels"] == ["O", "B-имя", "I-имя", "B-地名", "I-地名"]
    metrics = json.loads((folder / "metrics-test.json").read_text())
    assert metrics["entity"]["gold"] == 61 and metrics["words"] == 63  # gold is counted from the data set
    for command in (
        ["--run", folder], ["--run", folder, "--image-check"], ["--leak-check", own],
        ["--compare", folder, folder],
    ):  # fmt: skip
        evaluate.main([str(part) for part in command])
    report.main(["--run", str(folder)])
    predictor.main(["--run", str(folder), "--text", "Ада в 東京", "--image", str(photos / "train_0000.jpg")])
    (tmp_path / "moved").mkdir()
    own.rename(tmp_path / "moved" / "own")
    with pytest.raises(FileNotFoundError, match="no train file of own"):
        evaluate.main(["--run", str(folder), "--image-check"])
    evaluate.main(["--run", str(folder), "--image-check", "--data-dir", str(tmp_path / "moved")])
    assert (folder / "report-test.html").exists() and "runs" not in {p.name for p in tmp_path.iterdir()}


def test_your_own_relations_in_every_script(flags, tmp_path, data_dir, capsys):
    """A folder of rows with relations of its own, most with a photo; the system follows from train.txt."""
    own, rng = tmp_path / "own", random.Random(0)
    for split, count in (("train", 24), ("dev", 6), ("test", 7)):
        (own / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            words = rng.choices(["Messi", "joins", "BBC", "today"], k=4)
            rows.append({
                "token": words, "h": {"name": words[0], "pos": [0, 1]},
                "t": {"name": words[3], "pos": [3, 4]}, "img_id": f"{split}{i}.jpg" if i else None,
                "relation": ("worksFor", "NA", "bornIn")[i % 3],
            })  # fmt: skip
            shutil.copy(data_dir / "demo" / "images" / "train_0000.jpg", own / "images" / f"{split}{i}.png")
        (own / f"{split}.txt").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    assert train.parse_args(places).model == "bert-resnet50"
    path = extract_features.main(
        [*places, "--weights", "random", "--img-size", "32", "--views", "1", "--workers", "0"]
    )
    assert f"{path}: 34 photos, 34 ok, 0 missing" in (out := capsys.readouterr().out)
    assert (
        "ok, but: train1.jpg (taken from 'train1.png')" in out and "train: 1 of 24 rows name no photo" in out
    )
    folder = run(flags, tmp_path / "run", *places, "--img-size", 32, "--fusion", "bimodal")
    out = capsys.readouterr().out
    assert (
        "           train: 'NA' read as 'None', no relation (8 rows)\n" in out
        and "train: 23 of 24 posts have a photo" in out
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["task"], config["labels"]) == ("relation", ["None", "bornIn", "worksFor"])
    assert json.loads((folder / "metrics-test.json").read_text())["relation"]["gold"] == 5
    records = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
    assert (records[0]["id"], records[0]["image_id"], records[0]["photo"]) == ("row 1", None, False)
    assert (records[1]["id"], records[1]["gold"], records[1]["photo"]) == ("test1.jpg@2", "None", True)
    for command in (
        ["--run", folder], ["--run", folder, "--image-check"], ["--leak-check", own],
        ["--compare", folder, folder],
    ):  # fmt: skip
        evaluate.main([str(part) for part in command])
    report.main(["--run", str(folder)])
    predictor.main(
        ["--run", str(folder), "--words", "Messi", "joins", "BBC", "--head", "0", "1", "--tail", "2", "3"]
    )
    assert any(label in capsys.readouterr().out for label in config["labels"])


def test_posts_without_photo_in_every_script(flags, tmp_path, capsys):
    """Files without IMGID lines, in IOB1, split by lines of a tab."""
    own = tmp_path / "own"
    own.mkdir()
    for split in ("train", "valid", "test"):
        (own / f"{split}.txt").write_text(
            "Messi\tI-PER\njoins\tO\n\t\nBBC\tI-ORG\n\t\n" * 4, encoding="utf-8"
        )
    places = ["--dataset", str(own), "--cache-dir", str(tmp_path)]
    folder = run(flags, tmp_path / "run", *places, "--fusion", "none")
    out = capsys.readouterr().out
    assert (
        out.count("train: no IMGID line: 8 posts without photo\n")
        == out.count("train: IOB1 labels read as BIO, 8 changed\n")
        == 1
    )
    records = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
    assert [(r["id"], r["image_id"], r["gold"]) for r in records[:2]] == [
        ("line 1", None, ["B-PER", "O"]), ("line 4", None, ["B-ORG"]),
    ]  # fmt: skip
    for command in (
        ["--run", folder], ["--run", folder, "--image-check"], ["--leak-check", own],
        ["--compare", folder, folder],
    ):  # fmt: skip
        evaluate.main([str(part) for part in command])
    report.main(["--run", str(folder)])
    assert "0 photos;" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="no post of own names a photo; --fusion none trains on the text alone"
    ):
        run(flags, tmp_path / "film", *places, "--fusion", "film")
    with pytest.raises(ValueError, match="no post of .*own names a photo: there is nothing to extract"):
        extract_features.main(places)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--img-size", 224], "no feature file .*demo-resnet50-224.h5; make it with extract_features.py"),
        (["--features", "mnre-resnet50-64.h5"], "no row for .*; it was made for mnre. "),
        (["--features", "demo-clip-96.h5"], "made with --backbone clip, roberta-resnet50 needs resnet50"),
        (["--model", "vilt", "--features", "demo-pixels-96.h5"], "it is a bert, not a vilt"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (["--device", "meta"], "--device meta: cannot be used here"),
        (["--data-dir", "absent"], "no train file of demo under absent/"),
        (["--text-encoder", "absent/encoder"], "--text-encoder absent/encoder: cannot be loaded"),
        (["--max-len", 600], "--max-len 600: .* takes 512"),
        (["--max-len", 5], "--max-len 5 leaves 3 sub-tokens"),
        (["--heads", 7, "--fusion", "bimodal"], "7 heads do not divide token states of width 64"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(flags, tmp_path, cache_dir, more, message):
    more = [cache_dir / arg if str(arg).endswith(".h5") else arg for arg in more]
    flags = flags[:6] + flags[8:] if "--features" in more else flags  # without --img-size
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(flags, tmp_path / "run", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_users_mistake_is_one_line_and_no_traceback(data_dir, tmp_path):
    demo_dir = tmp_path / "demo"
    demo_dir.mkdir()
    for split in ("train", "valid"):
        (demo_dir / f"{split}.txt").write_bytes((data_dir / "demo" / f"{split}.txt").read_bytes())
    with open(demo_dir / "valid.txt", "a", encoding="utf-8") as file:
        file.write("IMGID:x\nword B-PER\n")
    line = 2 + (data_dir / "demo" / "valid.txt").read_text(encoding="utf-8").count("\n")
    result = run_script(tmp_path, "train.py", "--dataset", "demo", "--data-dir", tmp_path)
    expected = f"train.py: error: {demo_dir}/valid.txt:{line}: expected word<TAB>label, found 'word B-PER'\n"
    assert (result.returncode, result.stderr, result.stdout) == (1, expected, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def test_evaluate_scores_a_run_again(flags, tmp_path, capsys):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    expected = (folder / "metrics-test.json").read_bytes()
    (folder / "metrics-test.json").unlink()
    capsys.readouterr()
    evaluate.main(["--run", str(folder)])
    out = capsys.readouterr().out
    assert (folder / "metrics-test.json").read_bytes() == expected
    for part in (
        "entity level, whole spans", "strict IOB2", "token level, weighted", "always 'O'",
        "of a known release",
    ):  # fmt: skip
        assert part in out
    with pytest.raises(FileNotFoundError, match="no config.json"):
        evaluate.main(["--run", str(tmp_path)])


def test_image_check_refuses_other_data_and_other_features(flags, tmp_path, data_dir):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    config = json.loads((folder / "config.json").read_text())
    for part, key, message in (
        ("data", "test", "not the file of"), ("features_made", "sha256", "not the features")
    ):
        changed = json.loads(json.dumps(config))
        changed[part][key] = {"sha256": "0", "file": "f"} if part == "data" else "0"
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            evaluate.main(["--run", str(folder), "--image-check"])


def test_a_run_that_moved_is_checked_where_its_data_are_now(flags, tmp_path, data_dir, cache_dir, capsys):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data_dir": "gone", "features": "gone.h5"}))
    with pytest.raises(FileNotFoundError, match="under gone/"):
        evaluate.main(["--run", str(folder), "--image-check"])
    now = ["--data-dir", str(data_dir), "--features", str(cache_dir / "demo-resnet50-64.h5")]
    evaluate.main(["--run", str(folder), "--image-check", "--shuffles", "1", *now])
    check = json.loads((folder / "image-check-test.json").read_text())
    assert check["photos"] == 8 and len(check["shuffled"]) == 1
    assert check["true"] == {
        k: v for k, v in json.loads((folder / "metrics-test.json").read_text()).items() if k != "data"
    }


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "", "config.json: not JSON"), ("config.json", "[]", "config.json: not the configuration"),
    ("model.safetensors", "", "the run does not load"), ("model.safetensors", None, "no model.safetensors"),
    ("encoder/config.json", "{}", "the run does not load"),
    ("encoder/tokenizer.json", None, "the run does not load"),
])  # fmt: skip
def test_a_broken_run_is_one_clear_line(flags, tmp_path, name, content, message):
    folder = run(flags, tmp_path / "run", "--epochs", 1)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        evaluate.main(["--run", str(folder), "--image-check"])
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_diverged_run_stops(flags, tmp_path):
    """With the first step that went wrong and its posts; the state from before it is kept."""
    bad = [
        *flags, "--lr", 1e30, "--max-grad-norm", "inf", "--warmup-ratio", 0, "--epochs", 3, "--save-every", 0,
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"epoch 1, step \d: the loss or its gradient is not finite .posts train_"
    ) as error:
        run(bad, tmp_path / "run")
    assert "lower --lr (1e+30)" in str(error.value) and not list((tmp_path / "run").glob("metrics-*"))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (
        f"step {state['progress']['step'] + 1}:" in str(error.value)
        and np.isfinite(state["progress"]["loss"])
    )
    named = str(error.value).split("(posts ")[1].split(")")[0].split(", ")
    assert len(named) == 8 and all(name.startswith("train_") for name in named)


@pytest.mark.parametrize("flag, value", [
    ("--lr", "nan"), ("--lr", "-1"), ("--photo-dropout", "7"), ("--warmup-ratio", "5"), ("--epochs", "0"),
    ("--heads", "0"), ("--max-grad-norm", "0"), ("--batch-size", "x"), ("--seed", "-1"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([flag, value])
    assert f"argument {flag}: " in capsys.readouterr().err


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
        evaluate.main(
            ["--image-check", "--device", "cpu", "--run", str(run([*flags, *more], tmp_path / name))]
        )
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
    assert scores["film"]["true"] == main_score(
        json.loads((tmp_path / "film" / "metrics-test.json").read_text())
    )
    cache = FeatureCache(tmp_path / "demo-resnet50-64.h5")
    examples = load_dataset("demo", tmp_path).examples["test"]
    model, tokenizer, config = load_run(tmp_path / "film")
    rows, _ = encode(tokenizer, examples, config["labels"], 128)
    swap = shuffled_photos([example.image_id for example in examples], cache, 0)
    shown = Posts(examples, rows, 0, cache, swap=swap)
    again = predict_posts(model, shown, config["labels"], 12, "cpu", "float32")
    assert main_score(score(again)) == scores["film"]["shuffled"][0]
