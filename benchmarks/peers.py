"""This project beside transformers' Trainer, its pipeline, and a ResNet50 called photo by photo.

Ratios to what one would take instead, each measured side by side in one run.

    python benchmarks/peers.py                                      # demo data, a tiny encoder: no figures
    python benchmarks/peers.py --dataset twitter2017 --encoder ENCODER --lr 1e-4 --fusion-lr 1e-3
    python benchmarks/peers.py ... --only training --epochs 5 --seeds 1 2 3         # whole runs, with F1
    python benchmarks/peers.py ... --profile                        # where a training step's time goes

Both sides train one encoder of the same weights on the same posts, with the same batch size, rates, warm-up,
weight decay and clipping; both answer with the same weights. --output keeps the rows as JSON. On a machine
that does something else besides, no figure here means anything.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from speed import Training, in_turn, measure, ratio, row  # puts the project on the path
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments, get_linear_schedule_with_warmup, pipeline

import demo
import extract_features
import train
from encoding import IGNORE, collate, encode, length_batches, to_device
from parts.datasets import load_dataset
from parts.posts import Posts as Split
from parts.checks import paired_bootstrap
from parts.console import bounded, command_line
from parts.model import TextRegions
from parts.photos import find_photos, image_folders
from parts.posts import predict_posts
from parts.processes import autocast, check_device, default_device, pick_precision
from parts.scores import main_score, mentions, read_predictions, score
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder
from predict import Predictor

STRATEGIES = {"random": "Trainer", "group_by_length": "Trainer, by length"}  # what it calls orders of posts


# ---------------------------------------------------------------------------------------------- the two sides


def flags(args, *more):
    """train.py's command line, as a list."""
    given = {"dataset": args.dataset, "data-dir": args.data_dir, "text-encoder": args.encoder, "lr": args.lr}
    given |= {"fusion-lr": args.fusion_lr, "batch-size": args.batch_size, "device": args.device}
    made = [part for name, value in given.items() for part in (f"--{name}", value)]
    return [str(flag) for flag in (*made, *more)]


def train_quietly(args, *more):
    """A run of train.py, without what it says; its folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main(flags(args, *more))


def parts(model):
    """(encoder, linear layer over its states) of a model of ours or an AutoModelForTokenClassification."""
    if isinstance(model, TextRegions):
        return model.encoder, model.head.linear
    return model.base_model, model.classifier


def copy_weights(source, target):
    for theirs, own in zip(parts(source), parts(target), strict=True):
        own.load_state_dict(theirs.state_dict())


def peer_model(encoder, labels):
    """AutoModelForTokenClassification of the encoder's kind, weights random. ValueError if made otherwise."""
    config = copy.deepcopy(encoder.config)
    config.num_labels, config.id2label = len(labels), dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    model = AutoModelForTokenClassification.from_config(config)
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise ValueError(
            f"--encoder: transformers' classifier of a {config.model_type} is no linear layer; name another"
        )
    return model


def optimizer_of(model, settings):
    """train.py's AdamW for a model of either side."""
    named = nn.ModuleDict(dict(zip(("encoder", "head"), parts(model), strict=True)))
    return torch.optim.AdamW(train.parameter_groups(named, settings), fused=True)


def token_labels(row):
    """A row of `encode` for transformers: a word's label at its first sub-token, IGNORE elsewhere."""
    labels = [IGNORE] * len(row["input_ids"])
    for start, label in zip(row["word_starts"], row["labels"], strict=True):
        if start >= 0:
            labels[start] = label
    return {"input_ids": row["input_ids"], "attention_mask": [1] * len(labels), "labels": labels}


class Counting:
    """A collator, and how many posts, real and padded sub-tokens it has batched."""

    def __init__(self, collator):
        self.collator, self.posts, self.real, self.padded = collator, 0, 0, 0

    def __call__(self, rows):
        batch = self.collator(rows)
        self.posts += len(rows)
        self.real += int(batch["attention_mask"].sum())
        self.padded += batch["attention_mask"].numel()
        return batch


class Posts:
    """A data set as both sides read it, and the settings of train.py."""

    def __init__(self, args):
        self.settings = train.parse_args(flags(args, "--fusion", "none"))
        self.dataset = load_dataset(args.dataset, args.data_dir)
        if self.dataset.task != "ner":
            raise ValueError(
                f"--dataset {args.dataset}: these are relations; name a data set of named entities"
            )
        self.labels, self.device = list(self.dataset.labels), args.device
        self.settings.precision = pick_precision("auto", args.device)
        torch.manual_seed(self.settings.seed)
        system = SYSTEMS[self.settings.model]
        self.encoder, self.tokenizer = load_text_encoder(
            args.encoder, system.checkpoint, self.dataset.task, self.settings.dropout
        )
        self.rows = {
            split: encode(self.tokenizer, examples, self.labels, self.settings.max_len)[0]
            for split, examples in self.dataset.examples.items()
        }

    def collate(self, rows):
        return collate(rows, self.tokenizer.pad_token_id)

    def peer_collator(self):
        return DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORE)


class Ours(Training):
    """Text only, softmax, trained as train.py does."""

    def __init__(self, posts):
        super().__init__(posts.encoder, "none", posts.labels, posts.device, dropout=posts.settings.dropout)
        self.posts, self.batches = posts, Counting(posts.collate)
        self.optimizer = optimizer_of(self.model, posts.settings)

    def epoch(self, rows, turn):
        """Seconds of an epoch."""
        settings, began = self.posts.settings, time.perf_counter()
        order = np.random.default_rng([settings.seed, turn])
        batches = length_batches([len(row["input_ids"]) for row in rows], settings.batch_size, order)
        scheduler = get_linear_schedule_with_warmup(
            self.optimizer, int(len(batches) * settings.warmup_ratio), len(batches)
        )
        for chosen in batches:
            self.step(self.batches([rows[i] for i in chosen]))
            scheduler.step()
        return time.perf_counter() - began


class Watch(TrainerCallback):
    """Seconds of each epoch of a Trainer, start-up left out; `after(model)` comes after, outside of them."""

    def __init__(self, after=None):
        self.seconds, self.after = [], after

    def on_epoch_begin(self, args, state, control, **more):
        self.began = time.perf_counter()

    def on_epoch_end(self, args, state, control, model=None, **more):
        self.seconds.append(time.perf_counter() - self.began)
        if self.after:
            self.after(model)


class Theirs:
    """transformers' Trainer as documented, with dynamic padding; its optimizer is given: it has two rates."""

    def __init__(self, posts, model, rows, place, strategy, epochs=1, seed=0, after=None):
        settings, steps = posts.settings, epochs * -(-len(rows) // posts.settings.batch_size)
        self.batches, self.watch = Counting(posts.peer_collator()), Watch(after)
        arguments = TrainingArguments(
            output_dir=str(place), per_device_train_batch_size=settings.batch_size, num_train_epochs=epochs,
            warmup_steps=int(steps * settings.warmup_ratio), max_grad_norm=settings.max_grad_norm, seed=seed,
            train_sampling_strategy=strategy, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=posts.device == "cpu", bf16=settings.precision == "bfloat16",
        )  # fmt: skip
        model.to(posts.device)
        self.trainer = Trainer(
            model=model, args=arguments, train_dataset=[token_labels(row) for row in rows],
            callbacks=[self.watch], data_collator=self.batches, processing_class=posts.tokenizer,
            optimizers=(optimizer_of(model, settings), None),
        )  # fmt: skip

    def train(self):
        """Seconds of its epochs."""
        before = len(self.watch.seconds)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its summary
            self.trainer.train()
        return sum(self.watch.seconds[before:])


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def first_losses(posts, ours, model):
    """(ours, theirs): the loss of the first posts, dropout off."""
    rows = posts.rows["train"][: posts.settings.batch_size]
    batch, theirs = posts.collate(rows), posts.peer_collator()([token_labels(row) for row in rows])
    losses = ours.eval()(to_device(batch, posts.device), return_losses=True).losses
    own = ours.total([losses["labels"].sum()], int((batch["labels"] != IGNORE).sum()), len(rows))
    return own.item(), model.eval()(**to_device(theirs, posts.device)).loss.item()


def training(args, place):
    """An epoch of --steps steps of both, in turn; with --epochs whole runs, and their scores."""
    if args.epochs:
        yield from whole_runs(args, place)
        return
    posts = Posts(args)
    rows, ours, peers = posts.rows["train"][: args.steps * args.batch_size], Ours(posts), {}
    for strategy, name in STRATEGIES.items():
        model = peer_model(posts.encoder, posts.labels)
        copy_weights(ours.model, model)
        losses = first_losses(posts, ours.model, model.to(args.device))
        peers[name] = Theirs(posts, model, rows, place, strategy)
    what = "loss of the first batch, Trainer's model / ours, dropout off"
    yield row(what, losses[1] / losses[0], "1, to 1e-4", f"{losses[0]:.6f}")
    taken = {name: [] for name in ("ours", *peers)}  # not in_turn's: Trainer's start-up is in those
    cases = {"ours": lambda turn: taken["ours"].append(ours.epoch(rows, turn))}
    ours.model.train()
    cases |= {name: lambda turn, n=name: taken[n].append(peers[n].train()) for name in peers}
    in_turn(cases, args.rounds, args.device)
    for name in peers:
        seconds = statistics.median(taken["ours"][1:]) / -(-len(rows) // args.batch_size)
        note = f"batch {args.batch_size}, {args.rounds} rounds of {len(rows)} posts"
        note += f", ours {seconds:.4f} s a step"
        yield row(f"training step, {name} / ours", ratio(taken[name][1:], taken["ours"][1:]), ">= 1", note)
    for name, side in ({"ours": ours} | peers).items():
        seen = side.batches
        note = f"{seen.posts} posts, {seen.real} sub-tokens"
        yield row(f"real / padded sub-tokens, {name}", seen.real / seen.padded, "shown", note)
        if name != "ours":
            yield row(f"sub-tokens seen, {name} / ours", seen.real / ours.batches.real, "1", "the same posts")


def whole_runs(args, place):
    """Runs of --epochs epochs of both: seconds of training, and entity F1 of the best epoch on valid."""
    posts = Posts(args)
    examples, device = posts.dataset.examples, posts.device
    scored, known = Ours(posts).model, mentions(examples["train"])
    splits = [split for split in ("valid", "test") if split in examples]
    start = copy.deepcopy(posts.encoder.state_dict())
    records, taken = {name: {split: [] for split in splits} for name in ("ours", *STRATEGIES.values())}, {}

    def answers(split):
        shown = Split(examples[split], posts.rows[split], posts.tokenizer.pad_token_id)
        size = posts.settings.eval_batch_size
        return predict_posts(scored, shown, posts.labels, size, device, "float32", known)

    for seed in args.seeds:
        run_dir = train_quietly(args, "--fusion", "none", "--epochs", args.epochs, "--seed", seed,
                                "--run-dir", place / f"ours-{seed}")  # fmt: skip
        timing = [json.loads(line)["train_s"] for line in (run_dir / "timing.jsonl").read_text().splitlines()]
        taken.setdefault("ours", []).append(sum(timing))
        for split in splits:
            records["ours"][split].append(list(read_predictions(run_dir / f"predictions-{split}.jsonl")))
        for strategy, name in STRATEGIES.items():
            torch.manual_seed(seed)
            model, best = peer_model(posts.encoder, posts.labels), {"f1": -1.0}
            model.base_model.load_state_dict(start)

            def keep_best(model, best=best):
                copy_weights(model, scored)
                if (f1 := main_score(score(answers("valid")))) > best["f1"]:
                    best |= {"f1": f1, "weights": copy.deepcopy(scored.state_dict())}
                model.train()

            rows = posts.rows["train"]
            trainer = Theirs(posts, model, rows, place, strategy, args.epochs, seed, keep_best)
            taken.setdefault(name, []).append(trainer.train())
            scored.load_state_dict(best["weights"])
            for split in splits:
                records[name][split].append(answers(split))
    for name in STRATEGIES.values():
        seconds = statistics.median(taken["ours"])
        note = f"{args.epochs} epochs, {len(rows)} posts, ours {seconds:.1f} s, {len(args.seeds)} seeds"
        yield row(f"training, {name} / ours", ratio(taken[name], taken["ours"]), ">= 1", note)
        for split in splits:
            found = paired_bootstrap(records["ours"][split], records[name][split])
            interval = found["difference"], found["low"], found["high"]
            yield row(f"{split} entity F1, ours - {name}", interval, "holds 0",
                      f"ours {found['a']:.4f}, theirs {found['b']:.4f}; 95% interval")  # fmt: skip


# -------------------------------------------------------------------------------------------------- answering


def peer_pipeline(predictor, strategy):
    """transformers' pipeline with the weights of a run."""
    model = peer_model(predictor.model.encoder, predictor.config["labels"])
    copy_weights(predictor.model, model)
    return pipeline("token-classification", model=model.eval(), tokenizer=predictor.tokenizer,
                    aggregation_strategy=strategy, device=predictor.device)  # fmt: skip


def label_words(predictor, examples, precision):
    """(rows, records) of a run's answers to examples, in a precision."""
    labels = predictor.config["labels"]
    rows, _ = encode(predictor.tokenizer, examples, labels, predictor.config["max_len"])
    posts = Split(examples, rows, predictor.tokenizer.pad_token_id)
    return rows, predict_posts(predictor.model, posts, labels, 12, predictor.device, precision)


def agreement(predictor, examples, texts):
    """Share of words that a run and a pipeline of its weights label alike, each by its first sub-token."""
    rows, records = label_words(predictor, examples, "float32")
    same = []
    for encoded, record, found in zip(rows, records, peer_pipeline(predictor, "none")(texts), strict=True):
        labelled = {entity["index"]: entity["entity"] for entity in found}  # those labelled O are left out
        same += [
            labelled.get(start, "O") == label
            for start, label in zip(encoded["word_starts"], record["predicted"], strict=True)
            if start >= 0
        ]
    return statistics.mean(same)


def prediction(args, place):
    """Entities of posts: `Predictor` and the pipeline, with the weights of one run, of one epoch or --run."""
    flags = "--fusion", "none", "--epochs", 1, "--run-dir", place / "run"
    run_dir = args.run or train_quietly(args, *flags)
    predictor = Predictor(run_dir, args.device)
    if [predictor.config[key] for key in ("fusion", "extra", "decoder")] != ["none", "none", "softmax"]:
        raise ValueError(f"--run {run_dir}: the pipeline knows text and softmax alone; name such a run")
    all_of = load_dataset(args.dataset, args.data_dir).examples["valid"]
    examples = all_of[: args.posts]
    posts, texts = [{"words": list(e.words)} for e in examples], [" ".join(e.words) for e in examples]
    alike = agreement(predictor, examples, texts)
    yield row("words that both label alike", alike, "1", f"{len(posts)} posts")
    short = Predictor(run_dir, args.device, precision="bfloat16")
    records = [[label_words(predictor, all_of, precision)[1]] for precision in ("bfloat16", "float32")]
    found = paired_bootstrap(*records)
    interval = found["difference"], found["low"], found["high"]
    yield row("valid entity F1, bfloat16 - float32", interval, "holds 0",
              f"{found['a']:.4f}, {found['b']:.4f}; 95% interval")  # fmt: skip
    cases = {"ours": lambda turn: predictor(posts), "ours in bfloat16": lambda turn: short(posts)}
    for strategy, size in itertools.product(("simple", "first"), (12, 1)):
        pipe = peer_pipeline(predictor, strategy)
        name = f'pipeline, "{strategy}", batch {size}'
        cases[name] = lambda turn, pipe=pipe, size=size: pipe(texts, batch_size=size)
    taken = in_turn(cases, args.rounds, args.device)
    ours = taken.pop("ours")
    for name, seconds in taken.items():
        note = f"ours {len(posts) / statistics.median(ours):.0f} posts/s, {len(posts)} posts"
        yield row(f"prediction, {name} / ours", ratio(seconds, ours), ">= 1", note)


def photos(args, place):
    """Entities of posts with new photos: `Predictor` with film; pipeline, and ResNet50 photo by photo."""
    dataset = load_dataset(args.dataset, args.data_dir)
    paths = find_photos(dataset.image_ids(), image_folders(args.dataset, args.data_dir, args.images))
    chosen = {split: [e for e in dataset.examples[split] if paths.get(e.image_id)][: args.posts]
              for split in ("train", "valid")}  # fmt: skip
    folder = place / "posts"  # a data set of these alone: features of all photos would take long
    (folder / "images").mkdir(parents=True)
    types = {label for example in chosen["train"] for label in example.labels}
    chosen["valid"] = [example for example in chosen["valid"] if types.issuperset(example.labels)]
    if not all(chosen.values()):
        raise ValueError(f"{args.dataset}: no photos of its posts; name their folder with --images")
    for split, examples in chosen.items():
        opened = (Image.open(paths[e.image_id]).convert("RGB") for e in examples)
        posts = [(e.words, e.labels, photo) for e, photo in zip(examples, opened, strict=True)]
        demo.write_split(folder, split, posts)
    with contextlib.redirect_stdout(io.StringIO()):
        extract_features.main(["--dataset", str(folder), "--weights", "random", "--cache-dir", str(place),
                               "--workers", "0", "--device", args.device])  # fmt: skip
    run_dir = train_quietly(args, "--dataset", folder, "--fusion", "film", "--epochs", 1,
                            "--run-dir", place / "run",
                            "--features", place / "posts-resnet50-224.h5")  # fmt: skip
    predictor, pictures = Predictor(run_dir, args.device), sorted((folder / "images").glob("valid_*"))
    posts = [{"words": list(e.words), "image": str(path)}
             for e, path in zip(chosen["valid"], pictures, strict=True)]  # fmt: skip
    texts, pipe = [" ".join(post["words"]) for post in posts], peer_pipeline(predictor, "simple")
    resnet = torchvision.models.resnet50().eval().to(args.device)
    prepare = torchvision.models.ResNet50_Weights.DEFAULT.transforms()

    def theirs(turn):
        pipe(texts, batch_size=12)
        with torch.inference_mode():
            for path in pictures:
                resnet(prepare(Image.open(path).convert("RGB"))[None].to(args.device)).cpu()

    taken = in_turn({"ours": lambda turn: predictor(posts), "theirs": theirs}, args.rounds, args.device)
    note = f"ours {len(posts) / statistics.median(taken['ours']):.1f} posts/s, {len(posts)} posts, film"
    what = "prediction with photos, pipeline and ResNet50 / ours"
    yield row(what, ratio(taken["theirs"], taken["ours"]), ">= 1", note)


# ----------------------------------------------------------------------------------- where a step's time goes


def least(work, device, times=7):
    """The fewest seconds that one of so many calls takes."""
    return min(in_turn({"work": lambda turn: work()}, times, device)["work"])


def arithmetic(encoder, batch_rows, dtype=torch.float32):
    """(floating-point operations, seconds) of the matrix products of a step on these posts without padding.

    Forward and backward (twice as much) of each nn.Linear of the encoder on all sub-tokens together, and
    attention post by post; seconds at the rate that this machine reaches on each of these shapes alone. The
    head is too small to count.
    """
    lengths, device = [len(row["input_ids"]) for row in batch_rows], next(encoder.parameters()).device.type
    tokens, config = sum(lengths), encoder.config
    shapes = Counter(
        (layer.in_features, layer.out_features) for layer in encoder.modules() if isinstance(layer, nn.Linear)
    )
    operations = seconds = 0.0
    for (wide, out), count in shapes.items():
        sizes = (tokens, wide), (out, wide), (tokens, out)
        x, w, y = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
        operations += count * 6 * tokens * wide * out
        products = (lambda: F.linear(x, w)), (lambda: y @ w), (lambda: y.T @ x)
        seconds += count * sum(least(product, device) for product in products)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    for length, count in Counter(lengths).items():
        a = torch.randn(count * heads, length, config.hidden_size // heads, device=device, dtype=dtype)
        weights = a @ a.mT
        operations += layers * 12 * a.numel() * length
        seconds += layers * 3 * (least(lambda: a @ a.mT, device) + least(lambda: weights @ a, device))
    return operations, seconds


def profile(args):
    """Print where the time of a training step of ours goes: medians over --steps steps."""
    posts = Posts(args)
    ours, settings = Ours(posts), posts.settings
    rows, table = posts.rows["train"], posts.encoder.get_input_embeddings().weight
    both = [], []  # groups of the word embeddings, and of all else
    for group in ours.optimizer.param_groups:
        for side, words in zip(both, (True, False), strict=True):
            if kept := [parameter for parameter in group["params"] if (parameter is table) == words]:
                side.append({"params": kept, "lr": group["lr"], "weight_decay": group["weight_decay"]})
    embeddings, rest = (torch.optim.AdamW(groups, fused=True) for groups in both)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = length_batches(lengths, settings.batch_size, np.random.default_rng(0))
    batches = (batches * args.steps)[: args.steps + 3]
    spent, real, padded, distinct = {}, [], [], []

    def lap(name):
        nonlocal began
        if args.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent.setdefault(name, []).append(now - began)
        began = time.perf_counter()

    ours.model.train()
    for chosen in batches:
        began = time.perf_counter()
        batch = posts.collate([rows[i] for i in chosen])
        words = int((batch["labels"] != IGNORE).sum())
        lap("collate, Python")
        batch = to_device(batch, args.device)
        with autocast(args.device, settings.precision):
            losses = ours.model(batch, return_losses=True).losses
        total = ours.model.total([losses["labels"].sum()], words, len(chosen))
        lap("forward, loss")
        total.backward()
        lap("backward")
        nn.utils.clip_grad_norm_(ours.model.parameters(), settings.max_grad_norm)
        lap("clip")
        embeddings.step()
        lap("AdamW, word embeddings")
        rest.step()
        lap("AdamW, the rest")
        ours.model.zero_grad()
        lap("zero_grad")
        real.append(int(batch["attention_mask"].sum()))
        padded.append(batch["attention_mask"].numel())
        distinct.append(len(batch["input_ids"].unique()))
    medians = {name: statistics.median(seconds[3:]) for name, seconds in spent.items()}
    whole = sum(medians.values())
    least_work = [arithmetic(posts.encoder, [rows[i] for i in chosen]) for chosen in batches[3:8]]
    operations, floor = (statistics.median(values) for values in zip(*least_work, strict=True))
    medians |= {"all": whole, "arithmetic alone": floor}
    print(f"| {args.encoder}, batch {settings.batch_size} | ms | share |\n| --- | --- | --- |")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e3:.2f} | {seconds / whole:.1%} |")
    print(f"\n{operations / 1e9:.2f} GFLOP a step in matrix products, {operations / floor / 1e9:.0f} GFLOP/s"
          f" in their shapes alone; a batch has {statistics.mean(real):.0f} real and"
          f" {statistics.mean(padded):.0f} padded sub-tokens, {statistics.mean(distinct):.0f} of {len(table)}"
          f" word embeddings; {torch.get_num_threads()} threads, {len(batches) - 3} steps")  # fmt: skip


PARTS = {part.__name__: part for part in (training, prediction, photos)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, bounded(int, 1)
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--profile", action="store_true", help="print where a training step's time goes, and nothing else")
    add("--dataset", help="with --encoder; default: demo data and its tiny encoder, written for this run")
    add("--encoder", help="of both sides: a hub's name or a local folder")
    add("--data-dir", default="data")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir")
    add("--epochs", type=bounded(int, 0), default=0, help="train so long, and score; 0: time --steps steps")
    add("--seeds", type=count, nargs="+", default=[1337], help="of the runs with --epochs")
    add("--run", type=Path, help="a finished run, text only, to answer with; default: one of one epoch")
    add("--steps", type=count, default=24, help="of a round: of few posts Trainer groups few by length")
    add("--rounds", type=count, default=7, help="after one to warm up")
    add("--posts", type=count, default=128, help="to be answered, at most; and photos")
    add("--batch-size", type=count, default=8)
    add("--lr", type=bounded(float, 0), default=3e-5)
    add("--fusion-lr", type=bounded(float, 0), default=1.1e-3)
    add("--device", default=default_device())
    add("--output", type=Path, help="JSON file that keeps the rows")
    args = parser.parse_args(argv)
    if (args.dataset is None) != (args.encoder is None):
        parser.error("--dataset and --encoder go together")
    check_device(args.device)
    with tempfile.TemporaryDirectory() as place:
        if args.dataset is None:
            demo.write_dataset(Path(place) / "demo")
            args.dataset, args.data_dir, args.encoder = "demo", place, str(Path(place) / "demo" / "encoder")
        if args.profile:
            profile(args)
        else:
            measure(PARTS, args)


if __name__ == "__main__":
    command_line(main)
