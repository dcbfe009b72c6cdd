"""What the photo costs, and how long the machine waits: ratios, each measured side by side in one run.

    python benchmarks/speed.py --images PHOTOS --text-encoder ENCODER      # some 25 minutes on 2 cores
    python benchmarks/speed.py --only extraction memory

Writes benchmarks/speed-<device>.json (parts left out keep what they last measured) and prints it as one
table. Text is that of Twitter-2017 under --data-dir; encoders have the shape of roberta-base or
bert-base-uncased and random weights, since time does not depend on weights; --text-encoder gives the
tokenizer, so the real lengths, and what start-up loads. On a machine that does something else besides, no
figure here means anything.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from torchvision import transforms as T
from tqdm import tqdm
from transformers import AutoModel, BertConfig, RobertaConfig

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import demo  # noqa: E402
from encoding import IGNORE, collate, encode, length_batches, to_device  # noqa: E402
from extract_features import extract  # noqa: E402
from features import FORMAT, OK, FeatureCache, FeatureWriter, create_file  # noqa: E402
from fusion import FUSIONS  # noqa: E402
from parts.datasets import load_dataset  # noqa: E402
from parts.posts import Posts as Split  # noqa: E402
from parts.backbones import load_backbone  # noqa: E402
from parts.console import command_line  # noqa: E402
from parts.files import write_json  # noqa: E402
from parts.model import TextRegions  # noqa: E402
from parts.notes import Notes  # noqa: E402
from parts.photos import Photos, batch_loader  # noqa: E402
from parts.posts import predict_posts, read_generated  # noqa: E402
from parts.processes import autocast, check_device, default_device  # noqa: E402
from parts.scores import main_score  # noqa: E402
from parts.systems import PRESETS  # noqa: E402
from parts.text_encoder import drop_pooler, load_tokenizer  # noqa: E402

BATCH, REGIONS, DIM = 8, 49, 2048  # ResNet50 at 224 pixels
# Bytes that a step in bfloat16 moves for a parameter. AdamW reads weight, gradient and two moments and
# writes three; clipping reads and writes the gradient, the backward pass writes it; the cast reads 4 bytes
# and writes 2, and forward and backward read these.
MOVED = 7 * 4 + 3 * 4 + 6 + 4


# ---------------------------------------------------------------------------------------------- measuring


def in_turn(cases, rounds, device="cpu"):
    """{name: [seconds a round]} of functions called in turn, round by round, so that noise meets them all."""
    taken = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, work in cases.items():
            start = time.perf_counter()
            work(turn)
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(above, below):
    """(median, lowest, highest) of the ratios round by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def row(what, value, target, note=""):
    """A line of the table; `value` is a number, or (median, lowest, highest) over rounds."""
    made = {"what": what, "target": target, "note": note}
    if not isinstance(value, tuple):
        return made | {"value": value}
    return made | dict(zip(("value", "low", "high"), value, strict=True))


def peak_anonymous(command, folder):
    """Highest RssAnon, in MB, of a process: what it has allocated, the pages of mapped files left out."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process, peak = subprocess.Popen(command, cwd=folder, text=True, **pipes), 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) / 1000)
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(process.stderr.read()[-500:])
    return peak


def run(folder, *command, env=None):
    """Run one of our scripts, with more variables in `env`; RuntimeError with what it said if it fails."""
    command, env = [str(part) for part in command], os.environ | (env or {})
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-500:])
    return ended.stdout


# ---------------------------------------------------------------------------------------- what is measured on


def write_features(path, dataset, image_ids, views=1, shape=(REGIONS, DIM)):
    """A feature file of random regions, such as extract_features.py makes of ResNet50's."""
    attrs = {"format": FORMAT, "dataset": dataset, "backbone": "resnet50", "views": views,
             "weights": "random-0", "img_size": 224, "seed": 0}  # fmt: skip
    attrs |= {"weights": "none", "parameters": 0}
    create_file(path, image_ids, [0] * len(image_ids), (len(image_ids), views, *shape), "float16", attrs)
    values = np.random.default_rng(0).standard_normal(views * shape[0] * shape[1] + 997).astype(np.float16)
    with contextlib.closing(FeatureWriter(path, os.open(path, os.O_RDWR), {}, image_ids)) as writer:
        for number in range(len(image_ids)):
            start = number % 997
            regions = values[start : start + views * shape[0] * shape[1]].reshape(views, *shape)
            writer.write(number, regions, [7, 7] if shape[0] == 49 else [1, shape[0]], OK, "")
    return FeatureCache(path)


class Posts:
    """Twitter-2017 encoded, a feature file for it, and batches of its training posts."""

    def __init__(self, args, place):
        self.dataset = load_dataset("twitter2017", args.data_dir)
        self.tokenizer = load_tokenizer(args.text_encoder)
        self.rows = {split: encode(self.tokenizer, examples, self.dataset.labels, 128)[0]
                     for split, examples in self.dataset.examples.items()}  # fmt: skip
        self.lengths = [len(row["input_ids"]) for row in self.rows["train"]]
        self.cache = write_features(place / "twitter2017.h5", "twitter2017", self.dataset.image_ids())
        self.batches = length_batches(self.lengths, BATCH, np.random.default_rng(0))

    def batch(self, number, notes=None, generated=False):
        """CPU batch `number` of an epoch, as train.py makes it; with `PostNotes`, with second pictures."""
        chosen = self.batches[number]
        photos = [self.dataset.examples["train"][i].image_id for i in chosen]
        rows = [self.rows["train"][i] for i in chosen]
        if notes:
            rows = [notes.shown(row, i, photo) for row, i, photo in zip(rows, chosen, photos, strict=True)]
        batch = collate(rows, self.tokenizer.pad_token_id) | self.cache.read(photos)
        return batch | (read_generated(self.cache, photos) if generated else {})


def pad_to(batch, length, pad_id):
    """The batch padded to `length` sub-tokens instead of to its longest post."""
    more = length - batch["input_ids"].shape[1]
    return batch | {"input_ids": F.pad(batch["input_ids"], (0, more), value=pad_id),
                    "attention_mask": F.pad(batch["attention_mask"], (0, more))}  # fmt: skip


# What a model is made with, of a run's configuration, where nothing more is said.
PLAIN = {"decoder": "softmax", "align": {}, "relevance": "none", "relevance_loss": 0.5, "notes": None,
         "relevance_median": None, "generated": None, "bottleneck": 0.0, "standardise": False,
         "pooling": "mean", "heads": 8, "dropout": 0.1}  # fmt: skip


class Training:
    """A model of the given text shape, and train.py's steps of it; `more`: of its configuration."""

    def __init__(self, encoder, fusion, labels, device, region_dim=DIM, **more):
        config = PLAIN | {"fusion": fusion, "region_dim": region_dim, "task": "ner", "labels": labels} | more
        self.model = TextRegions(encoder, config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.device = device

    def step(self, batch):
        words, posts = int((batch["labels"] != IGNORE).sum()), len(batch["labels"])
        batch = to_device(batch, self.device)
        with autocast(self.device, "float32" if self.device == "cpu" else "bfloat16"):
            losses = self.model(batch, return_losses=True).losses
        self.model.total([losses[name].sum() for name in self.model.loss_weights], words, posts).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def text_encoder(config):
    encoder = AutoModel.from_config(config)
    drop_pooler(encoder)
    return encoder


def photos_in(folder, most):
    """Paths of at most so many photos; ValueError if there is none."""
    endings = ".jpg", ".jpeg", ".png"
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)[:most]
    if not paths:
        raise ValueError(f"{folder}: no photos in it; name a folder with --images")
    return paths


# ---------------------------------------------------------------------------------------------- the parts


def fusion(args, place):
    """A step with each fusion over the same step without; and what a step waits for its data."""
    posts = Posts(args, place)
    encoder, labels = text_encoder(args.config), posts.dataset.labels  # one encoder for all: half the memory
    names = [name for name, layer in FUSIONS.items() if not layer.soft_tokens]
    trained = {name: Training(encoder, name, labels, args.device) for name in names}
    trained["crf"] = Training(encoder, "none", labels, args.device, decoder="crf")
    rounds = args.rounds
    batches = [posts.batch(number) for number in range(rounds + 1)]
    cases = {name: lambda turn, t=training: t.step(batches[turn]) for name, training in trained.items()}
    taken = in_turn(cases, rounds, args.device)
    data = in_turn({"data": posts.batch}, rounds)["data"]

    def checksums(turn):
        return [posts.cache.whole(BATCH * turn + i) for i in range(BATCH)]

    checked = in_turn({"checksums": checksums}, rounds)["checksums"]
    targets = {"film": 1.03, "attention": 1.08, "cross-attention": 1.12, "bimodal": 1.15,
               "co-attention": 1.15, "pyramid": 1.2, "saliency": 1.15, "crf": 1.05}  # fmt: skip
    text = statistics.median(taken["none"])
    for name in targets:
        target = f"<= {targets[name] if args.device == 'cpu' else 1.15}"
        yield row(f"training step, {name} / text only", ratio(taken[name], taken["none"]), target,
                  f"roberta-base's shape, batch {BATCH}, {rounds} batches, text only {text:.3f} s"
                  " a step")  # fmt: skip
    yield row("waiting for data / training step (film)", ratio(data, taken["film"]), "< 0.02",
              "batch made, features read")  # fmt: skip
    yield row("checksums at first read / training step (film)", ratio(checked, taken["film"]), "< 0.02",
              "each row once")  # fmt: skip
    real = padded = 0
    for epoch in range(1, 6):
        for chosen in length_batches(posts.lengths, BATCH, np.random.default_rng([1337, epoch])):
            lengths = [posts.lengths[i] for i in chosen]
            real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
    yield row("real / padded tokens", real / padded, ">= 0.90",
              f"batch {BATCH}, 5 epochs, mean length {np.mean(posts.lengths):.1f}")  # fmt: skip


def systems(args, place):
    """A step of each published system over the same posts' step text only.

    tia and icka read eleven words of notes more a post: over the step of text and notes without fusion, too.
    """
    posts, encoder, path = Posts(args, place), text_encoder(args.config), place / "notes.jsonl"
    examples, rounds = posts.dataset.examples["train"], args.rounds
    with open(path, "w", encoding="utf-8") as file:
        for example, other in zip(examples, examples[1:] + examples[:1], strict=True):
            said = " ".join(other.words[:11])
            note = {"id": example.image_id, "about_post": said, "about_photo": said, "relevance": 0.5}
            file.write(json.dumps(note) + "\n")
    told, plain = ("tia", "icka"), Training(encoder, "none", posts.dataset.labels, args.device)
    notes = Notes(path, posts.tokenizer, "post", 128).of(examples, "train")
    cases = {"none": (plain, None, False), "notes": (plain, notes, False)}
    for name, preset in PRESETS.items():
        more = {key: value for key, value in preset.items() if key not in ("model", "fusion", "batch_size")}
        notes = None
        if name in told:
            notes = Notes(path, posts.tokenizer, preset["extra"], 128, relevance=name == "tia")
            notes = notes.of(examples, "train")
        more |= {"notes": notes and str(path), "relevance_median": 0.5, "generated": name == "minige" or None}
        training = Training(encoder, preset["fusion"], posts.dataset.labels, args.device, **more)
        cases[name] = training, notes, name == "minige"

    def step(name):
        training, notes, generated = cases[name]
        return lambda turn: training.step(posts.batch(turn, notes, generated))

    taken = in_turn({name: step(name) for name in cases}, rounds, args.device)
    for name in PRESETS:
        target = "shown" if name == "icka" else "<= 1.35"
        yield row(f"training step, --system {name} / text only", ratio(taken[name], taken["none"]), target,
                  f"roberta-base's shape, batch {BATCH}, {rounds} batches, data included")  # fmt: skip
    for name in told:
        what = f"training step, --system {name} / text and notes without fusion"
        yield row(what, ratio(taken[name], taken["notes"]), "<= 1.35", "the same words on both sides")


def loop(args, place):
    """The usual loop of this field, bert-base's shape, against ours: padding and cache apart."""
    posts, encoder = Posts(args, place), text_encoder(BertConfig())
    training = Training(encoder, "film", posts.dataset.labels, args.device)
    resnet = torchvision.models.resnet50().eval().requires_grad_(False).to(args.device)
    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = T.Compose([T.Resize((224, 224)), T.ToTensor(), normalize])
    paths = photos_in(args.images, 320)

    def looked_at(batch, turn, photos):
        """The batch with regions of `photos` photos a post, read, resized and computed in the step."""
        chosen = [paths[(turn * BATCH * photos + i) % len(paths)] for i in range(BATCH * photos)]
        pixels = torch.stack([prepare(Image.open(path).convert("RGB")) for path in chosen]).to(args.device)
        regions = body(pixels).flatten(2).transpose(1, 2)
        # The fusion gets one photo a post: what is compared is the looking.
        return batch | {"regions": regions[::photos]}

    def usual(turn, photos, pad=True):
        batch = posts.batch(turn)
        if pad:
            batch = pad_to(batch, 128, posts.tokenizer.pad_token_id)
        training.step(looked_at(batch, turn, photos))

    cases = {
        "ours": lambda turn: training.step(posts.batch(turn)),
        "padded": lambda turn: training.step(pad_to(posts.batch(turn), 128, posts.tokenizer.pad_token_id)),
        "looking": lambda turn: usual(turn, 1, pad=False),
        "usual": lambda turn: usual(turn, 1),
        "usual, 4 photos": lambda turn: usual(turn, 4),
    }
    taken = in_turn(cases, 10, args.device)
    note = f"ours {statistics.median(taken['ours']):.3f} s a step, film, bert-base's shape, batch {BATCH}"
    yield row("usual loop (pad to 128, ResNet50 in the step) / ours", ratio(taken["usual"], taken["ours"]),
              ">= 5", note)  # fmt: skip
    yield row("the same with four photos a post / ours", ratio(taken["usual, 4 photos"], taken["ours"]),
              "shown")  # fmt: skip
    yield row("padding to 128 alone / ours", ratio(taken["padded"], taken["ours"]), "shown")
    yield row("ResNet50 in the step alone / ours", ratio(taken["looking"], taken["ours"]), "shown")


def reading(args, place):
    """Random batches from the feature file against copies of the same rows in memory."""
    cache = write_features(place / "reading.h5", "demo", [str(i) for i in range(2000)])
    values, rng = np.array(cache.regions), np.random.default_rng(0)
    for number in range(len(cache.ids)):
        cache.read([str(number)])  # compared with its checksum, and in the page cache
    chosen = rng.integers(2000, size=(21, 50, BATCH))
    names = [[[str(i) for i in batch] for batch in turn] for turn in chosen]

    def from_file(turn):
        for batch in names[turn]:
            cache.read(batch)

    def from_memory(turn):
        for batch in chosen[turn]:
            values[batch, 0]

    mapped = np.asarray(cache.regions)[:, 0]

    def rows_alone(turn):
        for batch in chosen[turn]:
            mapped.take(batch, 0)

    taken = in_turn({"file": from_file, "rows": rows_alone, "memory": from_memory}, 20)
    for name, what in (
        ("file", "reading batches from the feature file"), ("rows", "copying their rows from the map alone"),
    ):  # fmt: skip
        note = f"{statistics.median(taken[name]) / 50 * 1e3:.3f} ms a batch of {BATCH}"
        yield row(f"memory copy / {what}", ratio(taken["memory"], taken[name]), ">= 0.8", note)


def extraction(args, place):
    """Extraction against its forward pass alone, and against a loop that takes one photo at a time."""
    paths, workers = photos_in(args.images, 120), min(4, os.cpu_count() or 1)
    resnet = torchvision.models.resnet50().eval()
    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = T.Compose([T.Resize((224, 224)), T.ToTensor(), normalize])
    backbone, per_batch = load_backbone("resnet50", "random"), 8 if args.device == "cpu" else 64
    backbone.regions.to(args.device, memory_format=torch.channels_last)

    def naive(turn):
        with h5py.File(place / "naive.h5", "w") as file, torch.no_grad():
            file.create_dataset("regions", (len(paths), REGIONS, DIM), "float16")
            for number, path in enumerate(paths):
                pixels = prepare(Image.open(path).convert("RGB"))[None].to(args.device)
                file["regions"][number] = body(pixels).flatten(2).transpose(1, 2)[0].half().cpu().numpy()

    def whole(views):
        """As many images whatever the views, so that the workers' start weighs the same."""
        ids = [str(i) for i in range(len(paths) * 4 // views)]
        chosen = {image_id: paths[i % len(paths)] for i, image_id in enumerate(ids)}
        reader = Photos(ids, chosen, backbone, views, 0)
        rows, size = list(range(len(ids))), per_batch // views
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        shape = (len(ids), views, REGIONS, DIM)

        def work(turn):
            path = place / f"extracted-{views}.h5"
            settings = {"format": FORMAT, "views": views}
            create_file(path, ids, [0] * len(ids), shape, "float16", settings)
            writer = FeatureWriter(path, os.open(path, os.O_RDWR), settings, ids)
            with contextlib.closing(writer), tqdm(disable=True) as progress:
                loader = batch_loader(reader, batches, workers)
                extract(backbone, writer, loader, batches, args.device, progress)

        return work

    ids = [str(i) for i in range(len(paths))]
    reader = Photos(ids, dict(zip(ids, paths, strict=True)), backbone, 1, 0)
    pixels = [torch.cat([reader.read(i)[0] for i in range(start, min(start + per_batch, len(ids)))])
              for start in range(0, len(ids), per_batch)]  # fmt: skip

    def forward(turn):
        with torch.inference_mode():
            for photos in pixels * 4:
                backbone.regions(photos.to(args.device)).cpu()

    cases = {"naive": naive, "forward": forward, "1": whole(1), "4": whole(4)}
    taken, images = in_turn(cases, min(3, args.rounds), args.device), 4 * len(paths)
    naive_rate = len(paths) / statistics.median(taken["naive"])
    for views, name in (("1", "1 view"), ("4", "4 views")):
        rate = images / statistics.median(taken[views])
        yield row(f"extraction / its forward pass alone, {name}", ratio(taken["forward"], taken[views]),
                  ">= 0.88", f"{rate:.1f} images/s, {images} of them, {workers} workers")  # fmt: skip
    as_many = [4 * seconds for seconds in taken["naive"]]
    yield row("extraction / naive loop", ratio(as_many, taken["1"]), ">= 1.6",
              f"naive {naive_rate:.1f} photos/s, 1 view")  # fmt: skip


def memory(args, place):
    """Anonymous memory of train.py with a feature file ten times as large."""
    demo.write_dataset(place / "data" / "demo")
    ids, peaks = load_dataset("demo", place / "data").image_ids(), {1: [], 10: []}
    for views in peaks:
        write_features(place / f"{views}.h5", "demo", ids, views)
    for turn in range(3):
        for views in peaks:
            command = [
                sys.executable, str(PROJECT / "train.py"), "--dataset", "demo",
                "--text-encoder", "data/demo/encoder", "--lr", "1e-3", "--epochs", "3",
                "--features", f"{views}.h5", "--run-dir", f"runs/{views}-{turn}",
            ]  # fmt: skip
            peaks[views].append(peak_anonymous(command, place))
    sizes = [f"{(place / f'{views}.h5').stat().st_size / 1e6:.0f}" for views in peaks]
    small, large = (f"{statistics.median(peaks[views]):.0f}" for views in (1, 10))
    yield row("peak anonymous memory, feature file ten times as large", ratio(peaks[10], peaks[1]),
              "0.95 to 1.05", f"{small} MB with {sizes[0]} MB, {large} with {sizes[1]}")  # fmt: skip


STARTED = """
import sys, os, json
sys.path.insert(0, {project!r})
import train
def first_batch(*args):
    os._exit(0)  # everything up to the first step is done
train.collate = first_batch
train.main(json.loads(sys.argv[1]))
"""
IMPORTS = "import sys, torch, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"


def startup(args, place):
    """train.py to its first step, over a process that imports the libraries and loads the same encoder."""
    encoder, config = place / "encoder", RobertaConfig()
    text_encoder(config).save_pretrained(encoder)
    tokenizer = load_tokenizer(args.text_encoder)
    tokenizer.save_pretrained(encoder)
    config.vocab_size = len(tokenizer)  # as the tokenizer has it
    text_encoder(config).save_pretrained(encoder)
    write_features(place / "start.h5", "twitter2017", load_dataset("twitter2017", args.data_dir).image_ids())
    flags = [
        "--data-dir", str(Path(args.data_dir).resolve()), "--text-encoder", str(encoder),
        "--features", str(place / "start.h5"), "--device", args.device, "--overwrite",
        "--run-dir", str(place / "runs" / "start"),
    ]  # fmt: skip
    ours = [sys.executable, "-c", STARTED.format(project=str(PROJECT)), json.dumps(flags)]
    imports = [sys.executable, "-c", IMPORTS, str(encoder)]
    taken = in_turn({"ours": lambda turn: run(place, *ours), "imports": lambda turn: run(place, *imports)}, 7)
    whole, needed = (f"{statistics.median(taken[name]):.1f} s" for name in ("ours", "imports"))
    yield row("train.py to its first step / imports and loading the encoder",
              ratio(taken["ours"], taken["imports"]), "<= 1.3",
              f"{whole} and {needed}, Twitter-2017, film")  # fmt: skip


def neighbour(args, place):
    """Commands alone and beside a process that keeps a core busy, by what the threads of OpenMP are told."""
    all_cores = {"OMP_NUM_THREADS": str(os.cpu_count())}  # else the small model takes one
    settings = {
        "as it is": {}, "all cores": all_cores, "one thread": {"OMP_NUM_THREADS": "1"},
        "all cores, OpenMP's default spin": all_cores | {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    }  # fmt: skip
    demo.write_dataset(place / "data" / "demo")
    examples = load_dataset("demo", place / "data").examples["train"]
    posts = [{"words": post.words, "image": f"data/demo/images/{post.image_id}.jpg"} for post in examples]
    (place / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    shape = ["--dataset", "demo", "--img-size", "96"]
    small = [*shape, "--text-encoder", "data/demo/encoder", "--fusion", "film"]
    large = ["--dataset", "twitter2017", "--data-dir", Path(args.data_dir).resolve(), "--train-share", "0.05",
             "--text-encoder", args.text_encoder, "--fusion", "none"]  # fmt: skip

    def extract(env):
        flags = ["--weights", "random", "--views", "1", "--overwrite"]
        said = run(place, sys.executable, PROJECT / "extract_features.py", *shape, *flags, env=env)
        return float(said.partition(" photos in ")[2].split()[0])

    def train(flags, folder, env):
        flags = [*flags, "--epochs", "1", "--overwrite", "--run-dir", folder]
        run(place, sys.executable, PROJECT / "train.py", *flags, env=env)
        return json.loads((place / folder / "timing.jsonl").read_text())["train_s"]

    def predict(env):
        """Less what the same command takes that finds all posts answered."""
        command, taken = [sys.executable, PROJECT / "predict.py", "--run", "small"], []
        (place / "answers.jsonl").unlink(missing_ok=True)
        for _ in range(2):
            began = time.perf_counter()
            run(place, *command, "--input", "posts.jsonl", "--output", "answers.jsonl", env=env)
            taken.append(time.perf_counter() - began)
        return taken[0] - taken[1]

    work = {
        "extract, ResNet50": extract, "train, the demo's encoder": lambda env: train(small, "small", env),
        f"train, {Path(args.text_encoder).name}": lambda env: train(large, "large", env),
        "predict, the demo's encoder and ResNet50": predict,
    }  # fmt: skip
    taken = {}
    for _ in range(2):
        for busy in (False, True):
            beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for name, env in settings.items():
                    for what, seconds in work.items():
                        taken.setdefault((what, busy, name), []).append(seconds(env))
            finally:
                if busy:
                    beside.kill()
                    beside.wait()
    for (what, busy, name), seconds in sorted(taken.items()):
        alone = taken[what, False, "as it is"]
        yield row(f"{what}: {name}, {'beside a neighbour' if busy else 'alone'} / as it is, alone",
                  ratio(seconds, alone), "<= 2" if busy and name == "as it is" else "",
                  f"{statistics.median(seconds):.1f} s")  # fmt: skip


def growth(args, place):
    """Seconds of each part with 200, 2,000 and 20,000 posts; benchmarks/speed-growth.png."""
    import matplotlib  # a requirement of this part alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gc.collect()
    gc.freeze()  # to search the imports for garbage again and again is not what grows
    demo.write_dataset(place / "grown" / "demo", posts=(200, 20, 20))
    examples = (place / "grown" / "demo" / "train.txt").read_text().split("\n\n")[:200]
    encoder = AutoModel.from_pretrained(place / "grown" / "demo" / "encoder")
    drop_pooler(encoder)
    tokenizer, sizes, grown = load_tokenizer(place / "grown" / "demo" / "encoder"), (200, 2000, 20_000), {}
    for size in sizes:
        with open(place / "grown" / "demo" / "train.txt", "w") as file:
            for number in range(size):
                file.write("\n".join([f"IMGID:{number}", *examples[number % 200].split("\n")[1:], "", ""]))
        began = time.perf_counter()
        dataset = load_dataset("demo", place / "grown")
        rows, _ = encode(tokenizer, dataset.examples["train"], dataset.labels, 128)
        start = time.perf_counter() - began
        began = time.perf_counter()
        write_features(place / "grown.h5", "demo", dataset.image_ids(), shape=(4, 64))
        written = time.perf_counter() - began
        began = time.perf_counter()
        cache = FeatureCache(place / "grown.h5")
        batches = length_batches([len(row["input_ids"]) for row in rows], BATCH, np.random.default_rng(0))
        start += time.perf_counter() - began
        training = Training(encoder, "film", dataset.labels, "cpu", region_dim=64)
        train = dataset.examples["train"]

        def step(turn, batches=batches, rows=rows, cache=cache, training=training, train=train):
            photos = [train[i].image_id for i in batches[turn]]
            text = collate([rows[i] for i in batches[turn]], tokenizer.pad_token_id)
            training.step(text | cache.read(photos))

        steps = in_turn({"step": step}, min(24, len(batches) - 1))["step"]
        began = time.perf_counter()
        posts = Split(train, rows, tokenizer.pad_token_id, cache)
        predict_posts(training.model, posts, dataset.labels, 12, "cpu", "float32")
        grown[size] = {
            "extraction, bookkeeping": written, "start-up, data": start,
            "evaluation": time.perf_counter() - began, "one training step": statistics.median(steps),
        }  # fmt: skip
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name in grown[sizes[0]]:
        seconds = [grown[size][name] for size in sizes]
        axes.loglog(sizes, seconds, "o-", label=name)
        target = "flat" if name == "one training step" else "linear: <= 10"
        note = " ".join(f"{taken:.3f}" for taken in seconds) + " s"
        yield row(f"{name}: 20,000 / 2,000 posts", seconds[2] / seconds[1], target, note)
    axes.set(xlabel="posts", ylabel="seconds")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(args.output.with_name("speed-growth.png"), dpi=120)


def scores(args, place):
    """Do fast ways change scores? Demo data, film, three seeds each way, stopped while scores differ."""
    flags = ["--dataset", "demo", "--img-size", "64", "--text-encoder", "data/demo/encoder", "--epochs", "3",
             "--lr", "1e-3", "--fusion-lr", "1e-3"]  # fmt: skip
    run(place, sys.executable, PROJECT / "demo.py")
    how = ["--dataset", "demo", "--weights", "random", "--img-size", "64"]
    run(place, sys.executable, PROJECT / "extract_features.py", *how)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {
        "as it is": ([sys.executable], []),
        "two processes (torchrun)": (two, []),
        "bfloat16": ([sys.executable], ["--precision", "bfloat16"]),
    }
    for number, (way, (launch, more)) in enumerate(ways.items()):
        reached = []
        for seed in (1, 2, 3):
            folder = place / "runs" / f"{number}-{seed}"
            run(place, *launch, PROJECT / "train.py", *flags, *more, "--seed", seed, "--run-dir", folder)
            reached.append(main_score(json.loads((folder / "metrics-test.json").read_text())))
        span = statistics.mean(reached), min(reached), max(reached)
        yield row(f"demo entity F1, {way}", span, "the same",
                  f"film, 3 seeds, standard deviation {statistics.stdev(reached):.4f}")  # fmt: skip


def floor(args, place):
    """What 5 epochs of roberta-base on Twitter-2017 take at least on an H100, by arithmetic; not measured."""
    posts, config = Posts(args, place), RobertaConfig()
    encoder = text_encoder(config)
    embeddings = sum(p.numel() for p in encoder.embeddings.parameters())
    parameters, tokens = sum(p.numel() for p in encoder.parameters()), sum(posts.lengths) * 5
    steps = 5 * len(posts.batches)
    arithmetic = 6 * (parameters - embeddings) * tokens / 989e12  # forward and backward, dense bfloat16
    moved = steps * parameters * MOVED / 3.35e12
    yield row("floor of 5 epochs, roberta-base, Twitter-2017, one H100, seconds", arithmetic + moved,
              "measured <= 2.5 times",
              f"arithmetic {arithmetic:.2f} s (989 TFLOP/s), memory {moved:.2f} s (3.35 TB/s), {steps} steps;"
              " no GPU was at hand to measure on")  # fmt: skip


PARTS = {
    part.__name__: part
    for part in (fusion, systems, loop, reading, extraction, memory, startup, neighbour, growth, scores,
                 floor)
}


def shown(row):
    digits = 3 if row["value"] > 0.1 else 4
    value = f"{row['value']:.{digits}f}"
    if "low" in row:
        value += f" ({row['low']:.{digits}f} to {row['high']:.{digits}f})"
    return f"| {row['what']} | {value} | {row['target']} | {row['note']} |"


def measure(parts, args):
    """Run those of `parts` that args.only names and print their rows as one table.

    They are kept in args.output, if it is given; parts left out keep what they last measured there.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{len(names)} x {names[0]}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    versions += f", Python {platform.python_version()}"
    print(f"{machine}, {torch.get_num_threads()} threads, {versions}\n")
    print("| what | median (range) | target | |\n| --- | --- | --- | --- |")
    made = json.loads(args.output.read_text())["parts"] if args.output and args.output.exists() else {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as place:
            rows = []
            for line in parts[name](args, Path(place)):
                rows.append(line)
                print(shown(line), flush=True)
        made[name] = {"machine": machine, "threads": torch.get_num_threads()}
        made[name] |= {"versions": versions, "rows": rows}
        if args.output:
            write_json(args.output, {"parts": {part: made[part] for part in parts if part in made}})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", default="data/twitter2017/images",
                        help="folder of real photos, some 160 or more")  # fmt: skip
    parser.add_argument("--text-encoder", default="roberta-base", help="whose tokenizer splits the text")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--output", type=Path, help="default: benchmarks/speed-<device>.json")
    args = parser.parse_args(argv)
    check_device(args.device)
    args.output = args.output or PROJECT / "benchmarks" / f"speed-{args.device}.json"
    args.config, args.rounds = RobertaConfig(), 24 if args.device == "cpu" else 200
    measure(PARTS, args)


if __name__ == "__main__":
    command_line(main)
