"""What a GPU does with all of this, in one command: is it right, how fast, what makes it faster. No network.

    python benchmarks/gpu.py                                # some 8 minutes on one card
    python benchmarks/gpu.py --only equal step tries        # parts alone
    python benchmarks/gpu.py --device cpu --size tiny       # shows that it runs; its figures mean nothing

Posts and photos are drawn here in the sizes of Twitter-2017, text encoders have the shape of roberta-base and
random weights, since time does not depend on weights. Writes benchmarks/gpu-<card>.json (parts left out keep
what they last measured) and the page benchmarks/GPU.md of all such files. Ratios are of what was measured
side by side; on a machine that does something else besides no figure here means anything.
"""

import argparse
import contextlib
import copy
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
import speed  # puts the project on the path
import torch
import torch.nn.functional as F
from encoders import build_tokenizer
from PIL import Image
from speed import MOVED, PROJECT, Posts, Training, in_turn, measure, pad_to, ratio, row, shown, text_encoder
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import RobertaConfig

import demo
import extract_features
import train
from encoding import IGNORE, to_device
from features import FeatureCache
from fusion import FUSIONS
from parts.backbones import load_backbone
from parts.console import bounded, command_line, first_line
from parts.files import write_text
from parts.photos import Photos
from parts.processes import check_device, default_device, pick_precision
from parts.scores import main_score
from predict import Predictor

TYPES = ("PER", "LOC", "ORG", "MISC")
SIZES = {
    "base": {"posts": (3373, 723, 723), "demo": (320, 80, 160), "photos": 160, "pieces": 30_000,
             "rounds": 100, "epochs": 15, "answers": 256, "config": {"vocab_size": 50_265}},
    "tiny": {"posts": (48, 16, 16), "demo": (8, 4, 4), "photos": 2, "pieces": 400, "rounds": 1, "epochs": 1,
             "answers": 8, "config": {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "intermediate_size": 64}},
}  # fmt: skip
HUNGRY = """
import sys, torch
sys.path.insert(0, {project!r})
from parts.console import command_line
def main():
    if {device!r} != "cpu":
        torch.cuda.set_per_process_memory_fraction(0.01)
    torch.empty(2**48, device={device!r})
command_line(main, lower="lower --batch-size")
"""


# ------------------------------------------------------------------------------------------------ the inputs


def write_inputs(folder, size):
    """data/twitter2017/, photos/ of its first posts of train and valid, and encoder/, under a folder."""
    rng, pieces = np.random.default_rng(0), size["pieces"]
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(pieces)]
    labels = np.array(["O", *(f"B-{kind}" for kind in TYPES)])
    (folder / "data" / "twitter2017").mkdir(parents=True)
    (folder / "photos").mkdir()
    for split, count in zip(("train", "valid", "test"), size["posts"], strict=True):
        posts = []
        for number in range(count):
            length = int(np.clip(rng.normal(15.7, 5.2), 4, 50))  # Twitter-2017's words a post
            drawn = rng.choice(words, length), rng.choice(labels, length, p=(0.8, 0.05, 0.05, 0.05, 0.05))
            lines = [f"{word}\t{label}" for word, label in zip(*drawn, strict=True)]
            posts.append("\n".join([f"IMGID:{split}{number}", *lines, "", ""]))
        write_text(folder / "data" / "twitter2017" / f"{split}.txt", "".join(posts))
    for number in range(size["photos"]):
        name = f"{('train', 'valid')[number % 2]}{number // 2}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8))
        coarse.resize((1024, 768), Image.Resampling.BICUBIC).save(folder / "photos" / name, quality=90)
    tokenizer = build_tokenizer("words", words, pieces)
    config = RobertaConfig(pad_token_id=tokenizer.pad_token_id, max_position_embeddings=514, **size["config"])
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "encoder")
    text_encoder(config).save_pretrained(folder / "encoder")
    return config


def quietly(script, *flags):
    """What a script's `main` returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main([str(flag) for flag in flags])


def wanted(args, target):
    """The target of a figure that a tiny model cannot reach."""
    return target if args.size == "base" else ""


def beside_trainer(args, **more):
    """Arguments of parts of peers.py."""
    given = {"dataset": "twitter2017", "data_dir": args.data_dir, "encoder": args.text_encoder, "epochs": 0,
             "device": args.device, "images": args.images, "batch_size": 8, "lr": 3e-5, "fusion_lr": 1.1e-3,
             "run": None, "posts": SIZES[args.size]["answers"], "rounds": min(5, args.rounds)}  # fmt: skip
    return argparse.Namespace(**given | more)


# ------------------------------------------------------------------------------------------------ (a) checks


def equal(args, place):
    """Loss and gradient of a batch, float32, dropout off, here and on a CPU; regions read and extracted."""
    posts, encoder, apart = args.inputs, text_encoder(args.config), {}
    for name in FUSIONS:
        sides, more = [], {"decoder": "crf", "align": {} if name == "none" else {"contrastive": 0.1}}
        for device in ("cpu", args.device):  # one encoder: it goes from one to the other
            torch.manual_seed(0)
            model = Training(encoder, name, posts.dataset.labels, device, **more).model.eval()
            losses = model(to_device(posts.batch(0), device), return_losses=True).losses
            total = model.total([losses[key].sum() for key in model.loss_weights], 100, 8)
            model.zero_grad()
            total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            sides.append((total.item(), norm.item()))
        apart[name] = [abs(here / there - 1) for there, here in zip(*sides, strict=True)]
    for i, (what, most) in enumerate((("loss", 1e-4), ("norm of the gradient", 1e-3))):
        worst = max(apart, key=lambda name: apart[name][i])
        yield row(f"{what} in float32, here / on a CPU, largest distance from 1", apart[worst][i],
                  f"<= {most:g}", f"{len(apart)} fusions with a CRF; largest: {worst}")  # fmt: skip
    one, other = (FeatureCache(args.place / "twitter2017.h5") for _ in range(2))
    other.keep_on(args.device)
    photos = [*one.ids[:63], None]
    read, kept = (to_device(cache.read(photos), args.device) for cache in (one, other))
    same = [read[key].equal(kept[key]) for key in read]
    yield row("batches of features kept on the device are those of the file", statistics.mean(same), "1")
    files = []
    for device in ("cpu", args.device):
        flags = ["--dataset", "twitter2017", "--data-dir", args.data_dir, "--images", args.images,
                 "--weights", "random", "--views", 1, "--limit", 8, "--workers", 0]  # fmt: skip
        quietly(extract_features, *flags, "--device", device, "--cache-dir", place / f"{device}-{len(files)}")
        files += (place / f"{device}-{len(files)}").glob("*.h5")
    there, here = (np.float32(FeatureCache(path).regions) for path in files)
    yield row("extraction, here less on a CPU, of the largest value",
              float(np.abs(here - there).max() / there.max()), "<= 0.002", "ResNet50, random weights")


def learns(args, place):
    """The demo's table in bfloat16; a run killed and gone on with; answers to new posts; no memory left."""
    size, runs = SIZES[args.size], {}
    demo.write_dataset(place / "data" / "demo", size["demo"])
    shape = ["--dataset", "demo", "--data-dir", place / "data", "--cache-dir", place, "--img-size", 96,
             "--device", args.device]  # fmt: skip
    quietly(extract_features, *shape, "--weights", "random", "--views", 2, "--workers", 0)
    flags = [*shape, "--text-encoder", place / "data" / "demo" / "encoder", "--epochs", size["epochs"],
             "--lr", 1e-3, "--fusion-lr", 1e-3, "--precision", "bfloat16"]  # fmt: skip
    for fusion, target in (("none", "<= 0.75"), ("film", ">= 0.97")):
        runs[fusion] = quietly(train, *flags, "--fusion", fusion, "--run-dir", place / fusion)
        metrics = json.loads((runs[fusion] / "metrics-test.json").read_text())
        yield row(f"demo, {fusion}, bfloat16: test entity F1", main_score(metrics), wanted(args, target))
    killed = [*flags, "--fusion", "film", "--run-dir", place / "killed", "--save-every", 0]
    command = [sys.executable, PROJECT / "train.py", *killed]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (place / "killed" / "state.pt").exists():
        time.sleep(0.01)
    process.kill()
    if process.wait():  # else it has ended before
        quietly(train, *killed, "--resume")
    logs = [[json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (runs["film"], place / "killed")]  # fmt: skip
    yield row("loss of an epoch, killed and --resume less never stopped, largest",
              np.abs(np.subtract(*logs)).max(), "0 on a CPU, <= 0.01")  # fmt: skip
    photos = sorted((place / "data" / "demo" / "images").glob("test_*.jpg"))
    posts = [{"text": "Jordan and Paris this weekend", "image": str(photo)} for photo in photos]
    sides = []
    for device in ("cpu", args.device):
        answers = Predictor(runs["film"], device, precision="float32")(posts)
        sides.append([[(e["type"], e["words"]) for e in answer["entities"]] for answer in answers])
    yield row("new posts answered as on a CPU", statistics.mean(map(list.__eq__, *sides)), ">= 0.99",
              f"{len(posts)} posts, film")  # fmt: skip
    code = HUNGRY.format(project=str(PROJECT), device=args.device)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = ended.stderr.strip()
    yield row("lines said when there is no memory", len(message.splitlines()), "1", message[:60])


# ---------------------------------------------------------------------------------------------- (b) measures


def step(args, place):
    """A step text only and with film: seconds, launches, memory, and how far it is from its floor."""
    posts, encoder, on_gpu = args.inputs, text_encoder(args.config), args.device != "cpu"
    batches = [posts.batch(turn) for turn in range(args.rounds + 1)]
    block = torch.empty(2**26 if args.size == "base" else 2**20, device=args.device)
    rate = 2 * block.nbytes / peers.least(lambda: block.clone(), args.device)
    for name in ("none", "film"):
        training = Training(encoder, name, posts.dataset.labels, args.device)
        taken = in_turn({name: lambda turn, t=training: t.step(batches[turn])}, args.rounds, args.device)
        seconds = statistics.median(taken[name])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile() as seen:
            training.step(batches[1])
        kind = "LaunchKernel" if on_gpu else "aten::"
        launches = sum(event.count for event in seen.key_averages() if kind in event.key)
        rows = [posts.rows["train"][i] for i in posts.batches[1]]
        dtype = torch.bfloat16 if on_gpu else torch.float32
        operations, least = peers.arithmetic(training.model.encoder, rows, dtype)
        moved = sum(p.numel() for p in training.model.parameters()) * MOVED
        floor = least + moved / rate
        what, peak = f"a step, {name}", torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0
        yield row(f"{what}, ms", 1e3 * seconds, "", f"batch {len(rows)}, {args.rounds} batches")
        yield row(f"{what}: launches" if on_gpu else f"{what}: operators", launches, "")
        yield row(f"{what} / its floor", seconds / floor, "<= 2.5",
                  f"{operations / 1e9:.0f} GFLOP so shaped {1e3 * least:.2f} ms, {moved / 1e9:.1f} GB at"
                  f" {rate / 1e9:.0f} GB/s {1e3 * moved / rate:.2f} ms")  # fmt: skip
        yield row(f"{what}: peak memory of the device, MB", peak, "")


def epoch(args, place):
    """An epoch of train.py, film, on as many posts as Twitter-2017 has, the second of two."""
    began = time.perf_counter()
    run = quietly(train, "--data-dir", args.data_dir, "--text-encoder", args.text_encoder, "--epochs", 2,
                  "--features", args.place / "twitter2017.h5", "--device", args.device,
                  "--run-dir", place / "run")  # fmt: skip
    whole = time.perf_counter() - began
    timing = json.loads((run / "timing.jsonl").read_text().splitlines()[1])
    count = len(args.inputs.rows["train"])
    yield row("an epoch of training, s", timing["train_s"], wanted(args, "<= 6"),
              f"{count} posts, {count / timing['train_s']:.0f} a second; valid {timing['valid_s']:.2f} s;"
              f" start, two epochs and scores {whole:.1f} s")  # fmt: skip


def trainer(args, place):
    """transformers' `Trainer` in the same process, both in the precision that train.py picks."""
    steps = min(100, len(args.inputs.batches))
    yield from peers.training(beside_trainer(args, steps=steps), place)


def extraction(args, place):
    """Extraction over its forward pass alone and over a naive loop; what one process decodes."""
    yield from speed.extraction(args, place)
    paths = sorted(args.images.glob("*.jpg"))
    reader = Photos([path.stem for path in paths], {path.stem: path for path in paths},
                    load_backbone("resnet50", "random"), 1, 0)  # fmt: skip
    began = time.perf_counter()
    for number in range(len(paths)):
        reader.read(number)
    rate = len(paths) / (time.perf_counter() - began)
    yield row("photos of 1024 x 768 decoded a second by one process", rate, "",
              "decoding is the bound where this, times the workers, is below the forward pass's rate")


def answers(args, place):
    """`Predictor` beside transformers' pipeline: text alone, and with new photos."""
    yield from peers.prediction(beside_trainer(args), place / "text")
    yield from peers.photos(beside_trainer(args), place / "photos")


# ------------------------------------------------------------------------------------------------- (c) tries


def bucketed(batch, pad_id, width=32):
    """The batch with sub-tokens and words padded to multiples of `width`: few shapes to compile for."""
    batch = pad_to(batch, -(-batch["input_ids"].shape[1] // width) * width, pad_id)
    more = -batch["labels"].shape[1] % width
    fills = {"word_starts": -1, "labels": IGNORE}
    padded = {key: F.pad(batch[key], (0, more), value=value) for key, value in fills.items()}
    return {key: batch[key] for key in batch if key != "own_mask"} | padded


def merged(posts, turn, times):
    """A batch of so many batches' posts."""
    chosen = [posts.batches[(turn * times + i) % len(posts.batches)] for i in range(times)]
    whole = copy.copy(posts)
    whole.batches = [sorted(sum(chosen, []), key=lambda i: posts.lengths[i])]
    return whole.batch(0)


def tries(args, place):
    """What may lift a step that waits for launches: time of the step as it is over that of each, a post."""
    posts, compiler = args.inputs, "inductor" if args.device != "cpu" else "aot_eager"
    torch._dynamo.config.recompile_limit = 64  # a shape each
    batches = [posts.batch(turn) for turn in range(args.rounds + 1)]
    few_shapes = [bucketed(batch, posts.tokenizer.pad_token_id) for batch in batches]

    def make(prepare=lambda model: None, batches=batches, context=contextlib.nullcontext):
        training = Training(text_encoder(args.config), "film", posts.dataset.labels, args.device)
        prepare(training.model)

        def work(turn):
            with context():
                training.step(batches[turn])

        return work

    modes = {} if args.device == "cpu" else {"mode": "reduce-overhead"}
    as_it_is = make()
    variants = {
        "padded to multiples of 32": lambda: make(batches=few_shapes),
        "so padded, compiled, reduce-overhead": lambda: make(
            lambda m: m.compile(backend=compiler, dynamic=False, **modes), few_shapes),
        "attention written out": lambda: make(lambda m: m.encoder.set_attn_implementation("eager")),
        **{f"attention, {kind.name.lower()}": lambda kind=kind: make(context=lambda: sdpa_kernel(kind))
           for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)},
        **{f"batch {8 * times}": lambda times=times: make(
            batches=[merged(posts, turn, times) for turn in range(args.rounds + 1)]) for times in (2, 4)},
    }  # fmt: skip
    for name, variant in variants.items():
        what, began = f"a step as it is / {name}, a post", time.perf_counter()
        try:
            work = variant()
            for turn in range(args.rounds + 1):  # every shape once: compiling is not what is timed
                work(turn)
        except (RuntimeError, ImportError, ValueError) as error:  # no such kernel, or no compiler
            yield row(what, 0.0, "", f"does not run: {first_line(error)[:80]}")
            continue
        first = time.perf_counter() - began
        taken = in_turn({"as it is": as_it_is, name: work}, args.rounds, args.device)
        times = int(name.split()[1]) / 8 if name.startswith("batch") else 1
        yield row(what, ratio([times * seconds for seconds in taken["as it is"]], taken[name]), "> 1 gains",
                  f"{1e3 * statistics.median(taken[name]):.2f} ms a step; {first:.0f} s to begin")
        torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- the page


PARTS = {
    part.__name__: part
    for part in (equal, learns, step, speed.fusion, speed.systems, epoch, trainer, extraction, answers, tries)
}


def page(folder):
    """GPU.md, of all gpu-*.json in a folder."""
    text = ["# What a GPU does", "", "Made by `python benchmarks/gpu.py`, which says what each part is.", ""]
    for path in sorted(folder.glob("gpu-*.json")):
        for name, part in json.loads(path.read_text())["parts"].items():
            title = f"## {part['machine']}: {name}"
            text += [title, "", (PARTS[name].__doc__ or "").splitlines()[0], "", part["versions"], ""]
            text += ["| what | median (range) | aim | |", "| --- | --- | --- | --- |"]
            text += [*map(shown, part["rows"]), ""]
    write_text(folder / "GPU.md", "\n".join(text))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--size", choices=SIZES, default="base", help="tiny shows that everything runs")
    add("--rounds", type=bounded(int, 1), help="timed steps; default: 100, 1 of tiny")
    add("--device", default=default_device())
    add("--output", type=Path, help="default: benchmarks/gpu-<card>.json; the page stands beside it")
    args = parser.parse_args(argv)
    check_device(args.device)
    card = torch.cuda.get_device_name() if args.device != "cpu" else f"cpu-{args.size}"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    args.output = args.output or PROJECT / "benchmarks" / f"gpu-{name}.json"
    args.rounds = args.rounds or SIZES[args.size]["rounds"]
    with tempfile.TemporaryDirectory() as place:
        args.place, args.data_dir = Path(place), f"{place}/data"
        args.images, args.text_encoder = args.place / "photos", f"{place}/encoder"
        args.config = write_inputs(args.place, SIZES[args.size])
        args.inputs = Posts(args, args.place)  # with its feature file, twitter2017.h5, for all parts
        print(f"precision {pick_precision('auto', args.device)}, inputs of size {args.size}")
        measure(PARTS, args)
    page(args.output.parent)


if __name__ == "__main__":
    command_line(main)
