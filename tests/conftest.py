"""Tiny data sets, tiny models and their feature files, made once a session; no network, no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a name that is no folder fails at once
# Before torch is: models of this size gain nothing from more, and beside a busy neighbour they wait for them.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import random
import signal

import pytest
from PIL import Image

import demo
import extract_features
import train
from parts import console
from parts.options import parse_args

console.quiet_libraries()
# A shell's background job ignores Ctrl-C, and all that it starts: tests of it would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Per system: its backbone, its features' size here, and the folders of the demo's models with its two parts.
PARTS = {
    "bert-caption": ("caption", 64, "encoder", "encoder"),
    "clip-bert": ("clip", 96, "clip", "encoder"),
    "blip": ("blip", 96, "blip", "blip"),
    "vilt": ("pixels", 96, "vilt", "vilt"),
}
# What config.json of a run says, all of it.
CONFIG = vars(parse_args(["--dataset", "demo", "--device", "cpu", "--no-standardise"])) | {
    "task": "ner", "labels": ["O"], "data": {}, "region_dim": None, "features_made": None,
    "generated_made": None, "notes_sha256": None, "relevance_median": None, "word_rule": "twitter",
}  # fmt: skip
RELATIONS = ("None", "/per/per/peer", "/per/org/member_of")


class Slow:
    """A fast tokenizer that offers only what a slow one does: no word_ids and no word lists."""

    is_fast = False

    def __init__(self, fast):
        self.fast, self.tokenize, self.convert_tokens_to_ids = fast, fast.tokenize, fast.convert_tokens_to_ids
        self.all_special_ids, self.unk_token_id = fast.all_special_ids, fast.unk_token_id
        self.added_tokens_decoder = fast.added_tokens_decoder

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self.fast(text, add_special_tokens=add_special_tokens)["input_ids"]}


def backbone_flags(data_dir, views=2):
    """Arguments of extract_features.py for each backbone, with the demo's models as weights."""
    kinds = [["--weights", "random", "--img-size", 64]]
    kinds += [["--backbone", part[0], "--weights", data_dir / "demo" / part[2]] for part in PARTS.values()]
    captions = ["--captions", data_dir / "demo" / "captions.txt"]
    return [kind + (captions if "caption" in kind else ["--views", views]) for kind in kinds]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A --data-dir with `demo` (24 / 8 / 8 posts) and `mnre` (24 / 8 rows, no test file) over its photos.

    Photos differ in shape: two upright, a square one, and one so wide that ViLT shrinks its shorter side.
    """
    root = tmp_path_factory.mktemp("data")
    demo.write_dataset(root / "demo", posts=(24, 8, 8))
    sizes = {"train_0000": (90, 160), "train_0002": (99, 99), "valid_0003": (64, 200),
             "test_0001": (300, 100)}  # fmt: skip
    for name, size in sizes.items():
        path = root / "demo" / "images" / f"{name}.jpg"
        Image.open(path).resize(size).save(path)
    rng = random.Random(0)
    (root / "mnre").mkdir()
    for split, count in (("train", 24), ("val", 8)):
        rows = []
        for i in range(count):
            words = [rng.choice(["Messi", "BBC", "Tokyo", "so", "good", "#", "today"])
                     for _ in range(rng.randint(4, 9))]  # fmt: skip
            head, tail = rng.sample(range(len(words)), 2)
            rows.append({
                "token": words, "h": {"name": words[head], "pos": [head, head + 1]},
                "t": {"name": words[tail], "pos": [tail, tail + 1]},
                "img_id": f"train_{i // 2:04d}.jpg", "relation": RELATIONS[i % 3],
            })  # fmt: skip
        (root / "mnre" / f"mnre_{split}.txt").write_text(
            "".join(f"{row}\n" for row in rows), encoding="utf-8"
        )
    (root / "mnre" / "images").symlink_to(root / "demo" / "images")
    return root


@pytest.fixture(scope="session")
def encoder_dir(data_dir):
    """A tiny BERT with random weights and a WordPiece tokenizer."""
    return data_dir / "demo" / "encoder"


@pytest.fixture(scope="session")
def cache_dir(data_dir, tmp_path_factory):
    """A --cache-dir with the feature files of both data sets, 2 views: ResNet50's and those of `PARTS`.
    ResNet50's are of 64 pixels, 2 x 2 regions, random weights."""
    folder = tmp_path_factory.mktemp("features")
    for dataset in ("demo", "mnre"):
        fixed = ["--dataset", dataset, "--data-dir", data_dir, "--cache-dir", folder, "--workers", 0]
        for kind in backbone_flags(data_dir):
            extract_features.main([str(arg) for arg in fixed + kind])
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """The folder of tiny random chat models: vision/ and text/."""
    from chats import save_models  # here: to import what it needs takes seconds

    root = tmp_path_factory.mktemp("chats")
    save_models(root)
    return root


@pytest.fixture
def serve(monkeypatch):
    """A function (reply) -> `chats.Server`; no key and no proxy is set in the environment."""
    from chats import Server

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="session")
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


def contents(folder):
    """{path: bytes, or where a link points} of all that lies in a folder."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}  # fmt: skip
