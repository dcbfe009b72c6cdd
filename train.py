"""Fine-tune a text encoder with cached photo features fused in, and score it.

    python train.py --fusion film --seed 1337
    torchrun --nproc-per-node 4 train.py --fusion film    # the same run, each batch shared by four processes

Everything a run is lands in runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>/: config.json, encoder/
(configuration and tokenizer), model.safetensors (of the epoch that --keep says), log.jsonl, timing.jsonl,
predictions-*.jsonl, metrics-*.json. While it trains also state.pt, from which the same command with --resume
goes on after a stop: it ends in the log, predictions and weights of a run that was never stopped, digit for
digit on CPU. Ctrl-C and SIGTERM leave a state that lacks no step.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import contextlib
import functools
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from encoding import IGNORE, length_batches, to_device
from parts.console import command_line, progress_bar
from parts.files import write_json, write_json_lines
from parts.model_card import write_card
from parts.opening import open_inputs
from parts.options import ENOUGH, parse_args
from parts.posts import mean_regions, predict_posts
from parts.processes import Stop, add_up, autocast, fit_threads, gather, join_processes, keep_heap
from parts.processes import pick_precision, wait_for_all
from parts.run_files import start_from
from parts.runs import begin, check_folder, load_state, save_epoch, save_state
from parts.scores import format_scores, main_score, mentions, score
from parts.systems import SYSTEMS
from parts.tracking import Tracker


def rate_of(part, model, args):
    """The learning rate of a part of the model, by its name."""
    if part == "encoder":
        return args.lr
    return args.fusion_lr * getattr(getattr(model, part), "rate", 1)


def parameter_groups(model, args):
    """AdamW groups: learning rate x decayed or not (biases and norms are not decayed)."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = rate_of(name.split(".")[0], model, args), args.weight_decay * (parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def check_all_train(model, optimizer):
    """After the first backward pass: a trainable parameter that cannot learn is a mistake, and is named."""
    in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in in_groups:
            raise ValueError(f"parameter {name} is in no optimizer group, so it would never train")
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(f"parameter {name} got no gradient in the first step: nothing uses it; freeze"
                             " or remove it")  # fmt: skip


def check_finite(first_bad, posts, batches, epoch, args):
    """ValueError if some step's loss or gradient was not finite; `first_bad`: the first one, inf for none."""
    if first_bad == math.inf:
        return
    indices = batches[int(first_bad) - 1]
    for cache, photos in ((posts.cache, [posts.shown(i)[0] for i in indices]),
                          (posts.generated, [posts.examples[i].image_id for i in indices])):  # fmt: skip
        for photo in [name for of_post in photos for name in cache.photos_of(of_post)] if cache else ():
            if not np.isfinite(cache.regions[cache.rows[photo]]).all():
                raise ValueError(f"{cache.path}: the features of photo {photo} are no finite numbers, so the"
                                 " loss is none; extract them again, or leave the photo out")  # fmt: skip
    ids = ", ".join(posts.examples[i].id for i in indices)
    raise ValueError(f"epoch {epoch}, step {int(first_bad)}: the loss or its gradient is not finite (posts"
                     f" {ids}); lower --lr ({args.lr:g}) or --fusion-lr ({args.fusion_lr:g})")  # fmt: skip


def versions():
    """{name: version} of what computes."""
    modules = {module.__name__: str(module.__version__) for module in (torch, transformers, np)}
    return modules | {"python": platform.python_version()}


def tell_parameters(model, args):
    """{part of the model: its parameters; threads}, and on the console how many of them are trained."""
    counts = {}
    for part, module in model.named_children():
        counts[f"{part}_parameters"] = count = sum(parameter.numel() for parameter in module.parameters())
        frozen = {name: p.numel() for name, p in module.named_parameters() if not p.requires_grad}
        if count:
            trained = f"{count - sum(frozen.values()):,} trained" if frozen else "all trained"
            print(f"{part:<10} {count:,} parameters, {trained} at {rate_of(part, model, args):g}")
        if frozen:
            print(f"           {sum(frozen.values()):,} frozen: nothing uses them, or they are fixed (first:"
                  f" {part}.{next(iter(frozen))})")  # fmt: skip
    threads = fit_threads(model)  # another number sums in another order: the last digits differ
    print(f"in all     {sum(counts.values()):,} parameters; CPU threads: {threads}")
    return counts | {"threads": threads}


def draw(rng, count, posts, args):
    """What chance decides of a batch's posts, as arguments of `Posts.batch`: hidden photos, views to read."""
    choices = {"hidden": rng.random(count) < args.photo_dropout}
    for name, cache in (("views", posts.cache), ("second_views", posts.generated)):
        if cache and args.augment:
            choices[name] = rng.integers(cache.views, size=count)
    return choices


def share(posts, indices, choices, rank, processes):
    """(batch, weight) of this process: every `processes`-th post of a batch, and the `choices` for it.

    A process that none is left for still takes part, with the first post, no pictures and no weight.
    """
    mine, weight = list(range(rank, len(indices), processes)) or [0], float(rank < len(indices))
    choices = {name: values[mine] for name, values in choices.items()}
    return posts.batch([indices[i] for i in mine], **choices, pictures=bool(weight)), weight


def answer_split(model, dataset, posts, args, device, rank, processes, split):
    """The records of `predict_posts` for a split, in all processes, each of which answers its share."""
    mine = posts[split].part(range(rank, len(posts[split]), processes))
    known, name = mentions(dataset.examples["train"]), split if rank == 0 else ""
    settings = dataset.labels, args.eval_batch_size, device, args.precision
    return gather(predict_posts(model, mine, *settings, known, name), processes)


def mean_losses(model, progress, posts):
    """{name: mean of a loss since the epoch began, over its `posts`}; of the labels' loss over labels."""
    sums = dict(zip(model.loss_weights, progress["loss"], strict=True))
    losses = {"loss": sums.pop("labels") / max(1, progress["labelled"])}
    return losses | {f"loss_{name}": value / posts for name, value in sums.items()}


def rates_of(scheduler, args):
    """The learning rates of the last step."""
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch - 1)
    return {"lr": args.lr * factor, "fusion_lr": args.fusion_lr * factor}


def log_epoch(progress, args, losses, rates, metrics, seconds, posts):
    """Add an epoch, scored on valid, to the progress, and say so.

    `seconds`: of training and scoring; `posts`: how many were trained on in that time.
    """
    epoch, main_f1 = progress["epoch"], main_score(metrics)
    accuracy = metrics.get("token", metrics.get("row"))["accuracy"]
    best = main_f1 > progress["best"]
    if best or args.keep == "last":  # the epoch that is kept, by either rule
        progress |= {"best": main_f1, "best_epoch": epoch}
    log = {"epoch": epoch} | losses | rates | {"valid_main_f1": main_f1, "valid_accuracy": accuracy}
    progress["log"].append(log | {"best_epoch": progress["best_epoch"]})
    progress["timing"].append({"epoch": epoch, "train_s": seconds[0], "valid_s": seconds[1]})
    name = "entity" if metrics["task"] == "ner" else "micro"
    parts = [f"{key.removeprefix('loss_')} {value:.4f}" for key, value in losses.items()]
    parts += [f"lr {rates['lr']:.2g}", f"valid {name} F1 {main_f1:.4f}, accuracy {accuracy:.4f}"]
    speed = f"{posts / seconds[0]:.1f} posts/s{'  (best)' if best and args.keep == 'best' else ''}"
    print(f"epoch {epoch}/{args.epochs}", *parts, speed, sep="  ", flush=True)


def score_splits(model, dataset, answers, run_dir, epoch, prints, rank):
    """Score valid and test, once, with the weights that are kept: records and metrics into the folder.

    Returns {"best_SPLIT_main_f1": score}.
    """
    load_model(model, str(run_dir / "model.safetensors"))
    scores = {}
    for split in ("valid", "test"):
        if split not in dataset.examples:
            print(f"{dataset.name} has no {split} file: no {split} scores")
            continue
        records = answers(split)
        metrics = score(records) | {"data": prints[split]}
        scores[f"best_{split}_main_f1"] = main_score(metrics)
        if rank == 0:
            write_json_lines(run_dir / f"predictions-{split}.jsonl", records)
            write_json(run_dir / f"metrics-{split}.json", metrics)
        print(format_scores(metrics, f"\n{run_dir.name} {split}, epoch {epoch}"))
    return scores


def how_to_go_on(args, progress):
    """What is said of a run that Ctrl-C or SIGTERM has stopped."""
    place = f"in epoch {progress['epoch']} after {progress['step']} steps"
    if progress["epoch"] > args.epochs:
        place = "while it was scored"
    command = "the same command"
    if not args.resume:
        command += " with --resume in place of --overwrite" if args.overwrite else " with --resume"
    return f"{args.run_dir}: stopped {place}; {command} goes on"


def set_up(args, run_dir, device, processes):
    """(model, tokenizer, data set, {split: `Posts`}, configuration) of a run."""
    check_folder(run_dir, args)
    if processes > 1 and "local" in args.align:
        raise ValueError("--align local: needs all posts of a batch in one process; leave torchrun out")
    keep_heap()
    torch.manual_seed(args.seed)
    dataset, encoder, tokenizer, posts, facts = open_inputs(args, device)
    if args.keep == "auto":
        args.keep = "best" if len(posts["valid"]) >= ENOUGH else "last"
        print(f"weights    of the {args.keep} epoch: valid has {len(posts['valid'])} posts")
    config = vars(args) | facts | {"word_rule_auto": args.word_rule == "auto"}
    config |= {"versions": versions(), "processes": processes}
    model = SYSTEMS[args.model].model(encoder, config).to(device)
    if args.init:
        start_from(args.init, model, tokenizer, config)
    if getattr(model, "standardise", None) is not None:
        photos = dict.fromkeys(example.image_id for example in posts["train"].examples)
        means, real = mean_regions(posts["train"].cache, photos)
        if real.any():
            model.standardise.fit(torch.from_numpy(means[real]))
    return model, tokenizer, dataset, posts, config | tell_parameters(model, args)


def run(args, stack):
    """Train and score one run; returns its folder. What must be closed at the end goes on `stack`."""
    rank, processes, device = join_processes(args.device)  # which share each batch
    args.precision, run_dir = pick_precision(args.precision, device), Path(args.run_dir)
    tracker = Tracker(args.track if rank == 0 else None)
    model, tokenizer, dataset, posts, config = set_up(args, run_dir, device, processes)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if processes > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)  # 7 times as fast
    train = posts["train"]
    lengths = train.showing(None).lengths()  # with own photos: a control has the batches of its run
    labels = np.array([np.not_equal(row["labels"], IGNORE).sum() for row in train.rows])  # of a post
    steps = args.epochs * len(length_batches(lengths, args.batch_size))
    scheduler = get_linear_schedule_with_warmup(optimizer, int(steps * args.warmup_ratio), steps)
    folder = begin(args, config, model.encoder, tokenizer, rank, processes, stack)
    if folder is None:  # finished
        return run_dir
    fresh = {"step": 0, "loss": [0.0] * len(model.loss_weights), "labelled": 0}  # in an epoch
    progress = {"best": -1.0, "best_epoch": 0, "log": [], "timing": [], "epoch": 1} | fresh
    if (folder / "state.pt").exists():
        progress = load_state(folder / "state.pt", model, optimizer, scheduler, device)
    answers = functools.partial(answer_split, model, dataset, posts, args, device, rank, processes)
    tracker.begin(dataset.name, run_dir.name, config, stack)
    stop = Stop(stack, processes, lambda: how_to_go_on(args, progress) if rank == 0 else "")
    due = time.monotonic() + min(60, args.save_every)  # the next state

    while (epoch := progress["epoch"]) <= args.epochs:
        times, rng = [time.perf_counter()], np.random.default_rng([args.seed, epoch])
        batches, before = length_batches(lengths, args.batch_size, rng), progress["step"]
        position = first = sum(map(len, batches[:before]))  # posts
        sums, labelled = torch.tensor(progress["loss"], device=device), progress["labelled"]
        bad = torch.tensor(math.inf, device=device)  # the first step whose loss or gradient is not finite
        bar = progress_bar(len(train), "post", True, initial=first, desc=f"epoch {epoch}", disable=rank > 0)
        model.train()
        with stop.held(), bar:
            for step, indices in enumerate(batches, 1):
                choices, count = draw(rng, len(indices), train, args), int(labels[indices].sum())
                if step <= before:  # done before the stop; its random numbers had to be drawn
                    continue
                batch, weight = share(train, indices, choices, rank, processes)
                if processes > 1:  # dropout of its own for each, the same again after --resume
                    torch.manual_seed(np.random.default_rng([args.seed, epoch, step, rank]).integers(2**63))
                with autocast(device, args.precision):
                    losses = parallel(to_device(batch, device), return_losses=True).losses  # {name: [B]}
                own = torch.stack([losses[name].sum() for name in model.loss_weights])
                # Gradients are averaged over processes, hence times their number.
                loss = model.total(own, count, len(indices)) * (weight * processes)
                loss.backward()
                if scheduler.last_epoch == 0:  # the run's first step
                    check_all_train(model, optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                of_step = add_up(own.detach() * weight, processes)
                sums, labelled, position = sums + of_step, labelled + count, position + len(indices)
                bad = torch.where(torch.isfinite(of_step.sum() + norm), bad, bad.clamp(max=step))
                bar.update(len(indices))
                signal = stop.agreed()
                save = signal or step == len(batches) or rank == 0 and time.monotonic() >= due
                # Not each step: reading a value makes the device wait. No state has taken in a bad step.
                if save or step % 50 == 0:
                    check_finite(bad.item(), train, batches, epoch, args)
                    progress |= {"step": step, "loss": sums.tolist(), "labelled": labelled}
                    losses = mean_losses(model, progress, position)
                    bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                    tracker.log(losses | rates_of(scheduler, args), scheduler.last_epoch)
                if save and rank == 0:
                    save_state(folder / "state.pt", progress, model, optimizer, scheduler, device)
                    due = time.monotonic() + args.save_every
                if signal:
                    wait_for_all(processes)  # the first process has written the state; `held` raises
                    break
        times.append(time.perf_counter())
        metrics = score(answers("valid"))
        times.append(time.perf_counter())
        with stop.held():  # at whose end all have waited for the files of the first
            numbers = mean_losses(model, progress, len(train)), rates_of(scheduler, args)
            log_epoch(progress, args, *numbers, metrics, np.diff(times).tolist(), len(train) - first)
            if rank == 0:
                folder = save_epoch(run_dir, folder, progress, model)
            tracker.log(progress["log"][-1], scheduler.last_epoch)
            progress |= fresh | {"epoch": epoch + 1}

    scores = score_splits(model, dataset, answers, run_dir, progress["best_epoch"], config["data"], rank)
    tracker.log(scores, None)
    if rank == 0:
        (run_dir / "state.pt").unlink(missing_ok=True)  # finished
        write_card(run_dir)
    return run_dir


def main(argv=None):
    with contextlib.ExitStack() as stack:
        return run(parse_args(argv, __doc__.splitlines()[0]), stack)


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size or --eval-batch-size")
