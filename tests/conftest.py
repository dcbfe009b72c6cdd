"""Tiny data sets, tiny models and their feature files, made once a session; no network, no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a name that is no folder fails at once

import random

import pytest
import torch

import demo
import extract_features

torch.set_num_threads(2)
RELATIONS = ("None", "/per/per/peer", "/per/org/member_of")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A --data-dir with `demo` (24 / 8 / 8 posts) and `mnre` (24 / 8 rows, no test file) over its photos."""
    root = tmp_path_factory.mktemp("data")
    demo.write_dataset(root / "demo", posts=(24, 8, 8))
    rng = random.Random(0)
    (root / "mnre").mkdir()
    for split, count in (("train", 24), ("val", 8)):
        rows = []
        for i in range(count):
            words = [rng.choice(["Messi", "BBC", "Tokyo", "so", "good", "#", "today"]) for _ in range(rng.randint(4, 9))]
            head, tail = rng.sample(range(len(words)), 2)
            rows.append({
                "token": words, "h": {"name": words[head], "pos": [head, head + 1]},
                "t": {"name": words[tail], "pos": [tail, tail + 1]},
                "img_id": f"train_{i // 2:04d}.jpg", "relation": RELATIONS[i % 3],
            })  # fmt: skip
        (root / "mnre" / f"mnre_{split}.txt").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (root / "mnre" / "images").symlink_to(root / "demo" / "images")
    return root


@pytest.fixture(scope="session")
def encoder_dir(data_dir):
    """A tiny BERT with random weights and a WordPiece tokenizer."""
    return data_dir / "demo" / "encoder"


@pytest.fixture(scope="session")
def cache_dir(data_dir, tmp_path_factory):
    """A --cache-dir with the feature files of both data sets: 64 pixels, 2 x 2 regions, 2 views, random weights."""
    folder = tmp_path_factory.mktemp("features")
    for dataset in ("demo", "mnre"):
        extract_features.main(
            ["--dataset", dataset, "--data-dir", str(data_dir), "--cache-dir", str(folder), "--weights", "random",
             "--img-size", "64", "--views", "2", "--workers", "0"]
        )  # fmt: skip
    return folder
