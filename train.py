"""Fine-tune a text encoder with cached photo features fused in, and score it.

    python train.py --fusion film --seed 1337

Everything a run is lands in runs/<dataset>-<model>-<fusion>-s<seed>/: config.json, encoder/ (configuration and
tokenizer), model.safetensors (of the best epoch on valid), log.jsonl, timing.jsonl, predictions-*.jsonl,
metrics-*.json.
"""

import argparse
import json
import math
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

from data import DATASETS, IGNORE, OWN_DATA, FeatureCache, bounded, check_device, collate, command_line, dataset_name
from data import default_device, encode, length_batches, load_dataset, locate
from evaluate import predict, shuffled_photos
from fusion import FUSIONS
from model import SYSTEMS, TextRegions, autocast, load_text_encoder, longest_input, save_weights, to_device
from scores import format_scores, main_score, mentions, score, write_json, write_json_lines


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # fmt: off
    add = parser.add_argument
    add("--dataset", type=dataset_name, default="twitter2017", help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--model", choices=SYSTEMS, help="default: roberta-resnet50 for named entities, bert-resnet50 for relations")
    add("--fusion", choices=FUSIONS, help="none = text only; default: film. blip and vilt bring their own")
    add("--text-encoder", help="hub name or local folder; default: the model's own")
    add("--seed", type=bounded(int, 0, 2**32), default=1337)
    add("--epochs", type=bounded(int, 1), default=5)
    add("--batch-size", type=bounded(int, 1), default=8)
    add("--eval-batch-size", type=bounded(int, 1), default=12)
    add("--max-len", type=bounded(int, 1), help="sub-tokens a post, special ones included; default: 128, 40 for vilt")
    add("--lr", type=bounded(float, 0), default=3e-5, help="of the pretrained text encoder")
    add("--fusion-lr", type=bounded(float, 0), default=1.1e-3, help="of what starts from scratch: fusion, head")
    add("--weight-decay", type=bounded(float, 0), default=0.01)
    add("--warmup-ratio", type=bounded(float, 0, 1), default=0.1, help="share of the steps, then linear decay to 0")
    add("--max-grad-norm", type=bounded(float, 1e-9), default=1.0, help="of gradients, clipped; inf = never")
    add("--dropout", type=bounded(float, 0, 1), default=0.1)
    add("--heads", type=bounded(int, 1), default=8)
    add("--img-size", type=bounded(int, 1), help="which feature file: the size its photos were resized to; default: 224,"
        " 384 for blip and vilt")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="train on all views of a photo")
    add("--photo-dropout", type=bounded(float, 0, 1), default=0.1, help="share of training posts shown no photo")
    add("--shuffle-photos", action="store_true", help="show each post another's photo, the same one always: the control"
        " that tells what the photos are worth")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda")
    add("--device", default=default_device())
    add("--data-dir", default="data")
    add("--cache-dir", default="features", help="where feature files are")
    add("--features", help="feature file, where it is not the usual one in --cache-dir")
    add("--run-dir", help="default: runs/<dataset>-<model>-<fusion>[-shuffled]-s<seed>")
    add("--overwrite", action="store_true", help="delete what is in the run folder first")
    # fmt: on
    args = parser.parse_args(argv)
    (task, _), (dataset, _) = DATASETS.get(args.dataset, OWN_DATA), locate(args.dataset, args.data_dir)
    args.model = args.model or ("roberta-resnet50" if task == "ner" else "bert-resnet50")
    system = SYSTEMS[args.model]
    if system.model is TextRegions:
        args.fusion = args.fusion or "film"
    elif args.fusion:
        parser.error(f"--fusion {args.fusion}: {args.model} has a fusion of its own and no other; leave it out")
    args.img_size, args.max_len = args.img_size or system.img_size, args.max_len or system.max_len
    args.text_encoder = args.text_encoder or system.text_encoder
    args.features = args.features or f"{args.cache_dir}/{dataset}-{system.backbone}-{args.img_size}.h5"
    name = "-".join([dataset, args.model, *filter(None, [args.fusion]), *["shuffled"] * args.shuffle_photos])
    args.run_dir = args.run_dir or f"runs/{name}-s{args.seed}"
    if args.shuffle_photos and args.fusion == "none":
        parser.error("--shuffle-photos: --fusion none is shown no photo; leave one of them out")
    if args.precision == "auto":
        args.precision = "bfloat16" if args.device.startswith("cuda") else "float32"
    return args


def open_features(args, dataset):
    """The feature cache and, said on the console, how many posts of each split have a photo; None for text only."""
    if args.fusion == "none":
        return None
    cache = FeatureCache(args.features)
    cache.require(dataset.image_ids(), dataset.name)
    made, backbone = cache.attrs, SYSTEMS[args.model].backbone
    if made["backbone"] != backbone:
        raise ValueError(
            f"{args.features}: made with --backbone {made['backbone']}, {args.model} needs {backbone}; name another"
        )
    print(f"features   {args.features}: {cache.views} views")
    if made["parameters"]:
        print(f"frozen     {made['parameters']:,} parameters of {backbone} (weights {made['weights']}), in that file")
    what = "caption" if backbone == "caption" else "photo"
    for split, examples in dataset.examples.items():
        with_photo = sum(cache.has_photo(example.image_id) for example in examples)
        print(f"           {split}: {with_photo} of {len(examples)} posts have a {what}")
        if not with_photo:
            print(f"WARNING    no post of {split} has a {what}: its scores are those of text only")
    if args.augment and cache.views == 1 and what == "photo":
        print("           one view only: no augmentation (extract_features.py --views 4 makes more)")
    return cache


def parameter_groups(model, args):
    """AdamW groups: pretrained or from scratch x decayed or not (biases and norms are not decayed)."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("encoder."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": group, "lr": args.lr if pretrained else args.fusion_lr, "weight_decay": args.weight_decay * decayed}
        for (pretrained, decayed), group in groups.items()
    ]


def check_all_train(model, optimizer):
    """After the first backward pass: a trainable parameter that cannot learn is a mistake, and is named."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(f"parameter {name} is in no optimizer group, so it would never train")
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(
                f"parameter {name} got no gradient in the first step: nothing uses it; freeze or remove it"
            )


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    run_dir = Path(args.run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / "config.json").exists():
            raise ValueError(f"{run_dir} holds files, but no run to overwrite; name another folder with --run-dir")
        if not args.overwrite:
            raise ValueError(
                f"{run_dir} holds a run already; name another with --run-dir or delete it with --overwrite"
            )
    dataset = load_dataset(args.dataset, args.data_dir)
    prints = dataset.fingerprints()
    for split, examples in dataset.examples.items():
        print(f"{split:<10} {len(examples)} posts, {prints[split]['variant']} ({prints[split]['sha256'][:16]})")
    cache = open_features(args, dataset)

    torch.manual_seed(args.seed)
    system = SYSTEMS[args.model]
    encoder, tokenizer = load_text_encoder(args.text_encoder, system, dataset.task, args.dropout)
    if args.max_len > longest_input(encoder, tokenizer):
        raise ValueError(f"--max-len {args.max_len}: {args.text_encoder} takes {longest_input(encoder, tokenizer)}")
    rows = {}
    for split, examples in dataset.examples.items():
        rows[split], counts = encode(tokenizer, examples, dataset.labels, args.max_len)
        if any(counts.values()):
            print(f"           {split}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, np)}
    config = vars(args) | {
        "task": dataset.task,
        "labels": list(dataset.labels),
        "data": prints,
        "region_dim": cache.region_dim if cache else None,
        "features_made": cache.attrs | {"sha256": cache.sha256} if cache else None,
        "versions": versions | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),  # another number sums in another order: the last digits differ
    }
    model = system.model(encoder, config).to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)  # one pass over memory: 7 times as fast
    lengths = [len(row["input_ids"]) for row in rows["train"]]
    steps = args.epochs * len(length_batches(lengths, args.batch_size))
    scheduler = get_linear_schedule_with_warmup(optimizer, int(steps * args.warmup_ratio), steps)
    for part, module in model.named_children():
        config[f"{part}_parameters"] = count = sum(parameter.numel() for parameter in module.parameters())
        if count:
            print(f"{part:<10} {count:,} parameters, all trained at {args.lr if part == 'encoder' else args.fusion_lr:g}")

    if run_dir.exists() and args.overwrite:
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)
    encoder.config.save_pretrained(run_dir / "encoder")
    tokenizer.save_pretrained(run_dir / "encoder")

    wrong, known = {}, mentions(dataset.examples["train"])
    if args.shuffle_photos:
        for split, examples in dataset.examples.items():
            wrong[split] = shuffled_photos([example.image_id for example in examples], cache, args.seed)
        print("photos     SHUFFLED: each post is shown another's, in every split")

    def answers(split):
        return predict(
            model, rows[split], dataset.examples[split], dataset.labels, tokenizer.pad_token_id, args.eval_batch_size,
            args.device, args.precision, cache, wrong.get(split), known,
        )  # fmt: skip

    best, best_epoch = -1.0, 0
    for epoch in range(1, args.epochs + 1):
        started = time.perf_counter()
        rng = np.random.default_rng([args.seed, epoch])
        model.train()
        loss_sum, labelled = torch.zeros((), device=args.device), torch.zeros((), device=args.device)
        for chosen in length_batches(lengths, args.batch_size, rng):
            hidden = rng.random(len(chosen)) < args.photo_dropout
            own = [None if h else dataset.examples["train"][i].image_id for i, h in zip(chosen, hidden, strict=True)]
            photos = [wrong["train"].get(photo) for photo in own] if wrong else own
            views = rng.integers(cache.views, size=len(chosen)) if cache and args.augment else None
            batch = collate([rows["train"][i] for i in chosen], tokenizer.pad_token_id, cache, photos, views)
            batch = to_device(batch, args.device)
            with autocast(args.device, args.precision):
                logits = model(batch)  # [B, W, labels] or [B, labels]
            summed = F.cross_entropy(
                logits.float().flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
            )
            count = (batch["labels"] != IGNORE).sum()
            (summed / count.clamp(min=1)).backward()
            if scheduler.last_epoch == 0:
                check_all_train(model, optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loss_sum += summed.detach()
            labelled += count
        loss = (loss_sum / labelled.clamp(min=1)).item()
        if not math.isfinite(loss):
            raise ValueError(
                f"epoch {epoch}: the loss is {loss}; lower --lr ({args.lr:g}) or --fusion-lr ({args.fusion_lr:g})"
            )
        trained = time.perf_counter()
        metrics = score(answers("valid"))
        main_f1, accuracy = main_score(metrics), metrics.get("token", metrics.get("row"))["accuracy"]
        kept = main_f1 > best
        if kept:
            best, best_epoch = main_f1, epoch
            save_weights(model, run_dir)
        log = {
            "epoch": epoch,
            "loss": loss,
            "valid_main_f1": main_f1,
            "valid_accuracy": accuracy,
            "best_epoch": best_epoch,
        }
        timing = {"epoch": epoch, "train_s": trained - started, "valid_s": time.perf_counter() - trained}
        for name, record in (("log.jsonl", log), ("timing.jsonl", timing)):
            with open(run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        print(
            f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  valid {'entity' if dataset.task == 'ner' else 'micro'} F1"
            f" {main_f1:.4f}, accuracy {accuracy:.4f}  {len(lengths) / timing['train_s']:.1f} posts/s"
            f"{'  (best)' if kept else ''}",
            flush=True,
        )  # fmt: skip

    load_model(model, str(run_dir / "model.safetensors"))  # the best epoch on valid; test is scored once, with it
    for split in ("valid", "test"):
        if split not in rows:
            print(f"{dataset.name} has no {split} file: no {split} scores")
            continue
        records = answers(split)
        metrics = score(records) | {"data": prints[split]}
        write_json_lines(run_dir / f"predictions-{split}.jsonl", records)
        write_json(run_dir / f"metrics-{split}.json", metrics)
        print(format_scores(metrics, f"\n{run_dir.name} {split}, epoch {best_epoch}"))
    return run_dir


if __name__ == "__main__":
    command_line(main)
