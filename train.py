"""Fine-tune a text encoder with cached photo features fused in, and score it.

    python train.py --fusion film --seed 1337
    torchrun --nproc-per-node 4 train.py --fusion film    # the same run, each batch shared by four processes

Everything a run is lands in runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>/: config.json, encoder/
(configuration and tokenizer), model.safetensors (of the best epoch on valid), log.jsonl, timing.jsonl,
predictions-*.jsonl, metrics-*.json. While it trains also state.pt, from which the same command with --resume
goes on after a stop: it ends in the log, predictions and weights of a run that was never stopped, digit for
digit on CPU. Ctrl-C and SIGTERM leave a state that lacks no step.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import contextlib
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

from encoding import IGNORE, length_batches, to_device
from parts.console import command_line, progress_bar
from parts.files import write_json, write_json_lines
from parts.opening import open_inputs
from parts.options import parse_args
from parts.posts import mean_regions, predict_posts
from parts.processes import Stop, Stopped, autocast, fit_threads, gather, join_processes, keep_heap
from parts.processes import pick_precision, wait_for_all
from parts.run_files import start_from
from parts.runs import begin, check_folder, load_state, save_state, save_weights, settle
from parts.scores import format_scores, main_score, mentions, score
from parts.systems import SYSTEMS
from parts.tracking import Tracker


def parameter_groups(model, args):
    """AdamW groups: pretrained or from scratch x decayed or not (biases and norms are not decayed)."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("encoder."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    rates = {True: args.lr, False: args.fusion_lr}
    return [
        {"params": group, "lr": rates[pretrained], "weight_decay": args.weight_decay * decayed}
        for (pretrained, decayed), group in groups.items()
    ]


def check_all_train(model, optimizer):
    """After the first backward pass: a trainable parameter that cannot learn is a mistake, and is named."""
    in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in in_groups:
            raise ValueError(f"parameter {name} is in no optimizer group, so it would never train")
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(
                f"parameter {name} got no gradient in the first step: nothing uses it; freeze or remove it"
            )


def check_finite(first_bad, posts, batches, epoch, args):
    """ValueError if some step's loss or gradient was not finite; `first_bad`: the first one, inf for none."""
    if first_bad == math.inf:
        return
    chosen = batches[int(first_bad) - 1]
    for cache, photos in ((posts.cache, [posts.shown(i)[0] for i in chosen]),
                          (posts.generated, [posts.examples[i].image_id for i in chosen])):  # fmt: skip
        for photo in [name for of_post in photos for name in cache.photos_of(of_post)] if cache else ():
            if not np.isfinite(cache.regions[cache.rows[photo]]).all():
                raise ValueError(f"{cache.path}: the features of photo {photo} are no finite numbers, so the"
                                 " loss is none; extract them again, or leave the photo out")  # fmt: skip
    ids = ", ".join(posts.examples[i].id for i in chosen)
    raise ValueError(
        f"epoch {epoch}, step {int(first_bad)}: the loss or its gradient is not finite (posts {ids});"
        f" lower --lr ({args.lr:g}) or --fusion-lr ({args.fusion_lr:g})"
    )


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
            rate = args.lr if part == "encoder" else args.fusion_lr
            print(f"{part:<10} {count:,} parameters, {trained} at {rate:g}")
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


def share(posts, chosen, choices, rank, processes):
    """(batch, weight) of this process: every `processes`-th post of a batch, and the `choices` for it.

    A process that none is left for still takes part, with the first post, no pictures and no weight.
    """
    mine, weight = list(range(rank, len(chosen), processes)) or [0], float(rank < len(chosen))
    choices = {name: values[mine] for name, values in choices.items()}
    return posts.batch([chosen[i] for i in mine], **choices, pictures=bool(weight)), weight


class Training:
    """A model in training: what moves its weights, and `progress`, how far it has come. A state keeps all.

    `posts`: those of train. `rank`: the number of this process among `processes`, which share each batch.
    """

    def __init__(self, model, posts, args, device, rank, processes):
        self.model, self.parallel, self.posts, self.args, self.device = model, model, posts, args, device
        self.rank, self.processes = rank, processes
        if processes > 1:
            self.parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)  # 7 times as fast
        self.lengths = posts.showing(None).lengths()  # with own photos: a control has the batches of its run
        self.labels = np.array([np.not_equal(row["labels"], IGNORE).sum() for row in posts.rows])  # of a post
        steps = args.epochs * len(length_batches(self.lengths, args.batch_size))
        warmup = int(steps * args.warmup_ratio)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, steps)
        self.progress = {"best": -1.0, "best_epoch": 0, "log": [], "timing": []}
        self.begin_epoch(1)
        self.due = time.monotonic() + min(60, args.save_every)  # the next state

    def begin_epoch(self, number):
        nothing = {"step": 0, "loss": [0.0] * len(self.model.loss_weights), "labelled": 0}
        self.progress |= {"epoch": number} | nothing

    def step(self, number, chosen, choices):
        """One step of all processes over the posts `chosen`: (sum of each loss over them, gradient norm).

        The norm is that before gradients are clipped.
        """
        args, model, count = self.args, self.model, int(self.labels[chosen].sum())
        batch, weight = share(self.posts, chosen, choices, self.rank, self.processes)
        if self.processes > 1:  # dropout of its own for each, the same again after --resume
            seeds = np.random.default_rng([args.seed, self.progress["epoch"], number, self.rank])
            torch.manual_seed(seeds.integers(2**63))
        with autocast(self.device, args.precision):
            losses = self.parallel(to_device(batch, self.device), return_losses=True).losses  # {name: [B]}
        sums = torch.stack([losses[name].sum() for name in model.loss_weights])
        # Gradients are averaged over processes, hence times their number.
        loss = model.total(sums, count, len(chosen)) * (weight * self.processes)
        loss.backward()
        if self.scheduler.last_epoch == 0:  # the run's first step
            check_all_train(model, self.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        sums = sums.detach() * weight
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        return sums, norm

    def epoch(self, folder, stop, tracker):
        """Train to the end of the epoch, where a state is kept; returns how many posts that were.

        `Stopped`, after a state, where a signal has come to `stop`.
        """
        args, progress, posts, before = self.args, self.progress, self.posts, self.progress["step"]
        rng = np.random.default_rng([args.seed, progress["epoch"]])
        batches = length_batches(self.lengths, args.batch_size, rng)
        loss_sum, labelled = torch.tensor(progress["loss"], device=self.device), progress["labelled"]
        first_bad = torch.tensor(math.inf, device=self.device)  # step whose loss or gradient is not finite
        done, name = sum(map(len, batches[:before])), f"epoch {progress['epoch']}"
        self.model.train()
        with progress_bar(len(posts), "post", True, initial=done, desc=name, disable=self.rank > 0) as bar:
            for step, chosen in enumerate(batches, 1):
                choices = draw(rng, len(chosen), posts, args)
                if step <= before:  # done before the stop; its random numbers had to be drawn
                    continue
                sums, norm = self.step(step, chosen, choices)
                loss_sum, labelled = loss_sum + sums, labelled + int(self.labels[chosen].sum())
                bad = ~torch.isfinite(sums.sum() + norm)
                first_bad = torch.where(bad, first_bad.clamp(max=step), first_bad)
                bar.update(len(chosen))
                signal, last = stop.agreed(), step == len(batches)
                save = signal or last or self.rank == 0 and time.monotonic() >= self.due
                # Not each step: reading a value makes the device wait. A bad step only stops the run: the
                # weights have taken it in, the last state has not.
                if save or step % 50 == 0:
                    check_finite(first_bad.item(), posts, batches, progress["epoch"], args)
                    progress |= {"step": step, "loss": loss_sum.tolist(), "labelled": labelled}
                    seen = sum(map(len, batches[:step]))
                    losses = self.losses(seen)
                    bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                    tracker.log(losses | self.rates(), self.scheduler.last_epoch)
                if save:
                    self.save(folder)
                if signal:
                    wait_for_all(self.processes)  # the first process has written the state
                    raise Stopped(signal)
        return len(posts) - done

    def losses(self, posts):
        """{name: mean of a loss since the epoch began, over its `posts`}; of the labels' loss over labels."""
        sums = dict(zip(self.model.loss_weights, self.progress["loss"], strict=True))
        losses = {"loss": sums.pop("labels") / max(1, self.progress["labelled"])}
        return losses | {f"loss_{name}": value / posts for name, value in sums.items()}

    def rates(self):
        """The learning rates of the last step."""
        share = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch - 1)
        return {"lr": self.args.lr * share, "fusion_lr": self.args.fusion_lr * share}

    def log_epoch(self, metrics, seconds):
        """Add the epoch, scored on valid, to the progress; returns whether it is the best, and a line on it.

        `seconds`: of training and scoring.
        """
        progress, losses, rates = self.progress, self.losses(len(self.posts)), self.rates()
        main_f1, accuracy = main_score(metrics), metrics.get("token", metrics.get("row"))["accuracy"]
        best, epoch = main_f1 > progress["best"], progress["epoch"]
        if best:
            progress |= {"best": main_f1, "best_epoch": epoch}
        log = {"epoch": epoch} | losses | rates | {"valid_main_f1": main_f1, "valid_accuracy": accuracy}
        progress["log"].append(log | {"best_epoch": progress["best_epoch"]})
        progress["timing"].append({"epoch": epoch, "train_s": seconds[0], "valid_s": seconds[1]})
        name = "entity" if metrics["task"] == "ner" else "micro"
        parts = [f"{key.removeprefix('loss_')} {value:.4f}" for key, value in losses.items()]
        parts += [f"lr {rates['lr']:.2g}", f"valid {name} F1 {main_f1:.4f}, accuracy {accuracy:.4f}"]
        return best, "  ".join(parts)

    def save(self, folder):
        """Write the state, in the first process."""
        if self.rank == 0:
            self.due = time.monotonic() + self.args.save_every
            path = folder / "state.pt"
            save_state(path, self.progress, self.model, self.optimizer, self.scheduler, self.device)

    def load(self, folder):
        """Go on from a state."""
        path = folder / "state.pt"
        self.progress = load_state(path, self.model, self.optimizer, self.scheduler, self.device)
        print(f"resuming   in epoch {self.progress['epoch']} after {self.progress['step']} steps")


def score_splits(model, dataset, answers, run_dir, epoch, prints, rank):
    """Score valid and test, once, with the weights of the best epoch: records and metrics into the folder.

    Returns {split: metrics}.
    """
    load_model(model, str(run_dir / "model.safetensors"))
    scores = {}
    for split in ("valid", "test"):
        if split not in dataset.examples:
            print(f"{dataset.name} has no {split} file: no {split} scores")
            continue
        records = answers(split)
        scores[split] = score(records) | {"data": prints[split]}
        if rank == 0:
            write_json_lines(run_dir / f"predictions-{split}.jsonl", records)
            write_json(run_dir / f"metrics-{split}.json", scores[split])
        print(format_scores(scores[split], f"\n{run_dir.name} {split}, epoch {epoch}"))
    return scores


def how_to_go_on(args, progress):
    """What is said of a run that Ctrl-C or SIGTERM has stopped."""
    place = f"in epoch {progress['epoch']} after {progress['step']} steps"
    if progress["epoch"] > args.epochs:
        place = "while its best epoch was scored"
    command = "the same command"
    if not args.resume:
        command += " with --resume in place of --overwrite" if args.overwrite else " with --resume"
    return f"{args.run_dir}: stopped {place}; {command} goes on"


def run(args, stack):
    """Train and score one run; returns its folder. What must be closed at the end goes on `stack`."""
    keep_heap()
    rank, processes, device = join_processes(args.device)
    args.precision, run_dir = pick_precision(args.precision, device), Path(args.run_dir)
    check_folder(run_dir, args)
    if processes > 1 and "local" in args.align:
        raise ValueError("--align local: needs all posts of a batch in one process; leave torchrun out")
    tracker = Tracker(args.track if rank == 0 else None)
    torch.manual_seed(args.seed)
    dataset, encoder, tokenizer, posts, facts = open_inputs(args, device)
    config = vars(args) | facts | {"word_rule_auto": args.word_rule == "auto"}
    config |= {"versions": versions(), "processes": processes}
    model = SYSTEMS[args.model].model(encoder, config).to(device)
    if args.init:
        start_from(args.init, model, tokenizer, config)
    if args.standardise and args.fusion != "none":
        photos = dict.fromkeys(example.image_id for example in posts["train"].examples)
        means, real = mean_regions(posts["train"].cache, photos)
        if not real.any():
            raise ValueError("--standardise: no post of train has a photo; leave it out")
        model.standardise.fit(torch.from_numpy(means[real]))
    config |= tell_parameters(model, args)
    training = Training(model, posts["train"], args, device, rank, processes)
    folder = begin(args, config, encoder, tokenizer, rank, processes, stack)
    if folder is None:  # finished
        return run_dir
    known = mentions(dataset.examples["train"])

    def answers(split):
        mine = posts[split].part(range(rank, len(posts[split]), processes))
        settings = dataset.labels, args.eval_batch_size, device, args.precision
        name = split if rank == 0 else ""  # of the bar; without, there is none
        return gather(predict_posts(model, mine, *settings, known, name), processes)

    if (folder / "state.pt").exists():
        training.load(folder)
    tracker.begin(dataset.name, run_dir.name, config, stack)
    stop, progress = Stop(stack, processes), training.progress
    try:
        while progress["epoch"] <= args.epochs:
            times, epoch = [time.perf_counter()], progress["epoch"]
            with stop.held():
                count = training.epoch(folder, stop, tracker)
            times.append(time.perf_counter())
            metrics = score(answers("valid"))
            times.append(time.perf_counter())
            with stop.held():
                seconds = times[1] - times[0], times[2] - times[1]
                best, line = training.log_epoch(metrics, seconds)
                if rank == 0:
                    if best:
                        save_weights(model, folder)
                    for name in ("log", "timing"):
                        write_json_lines(folder / f"{name}.jsonl", progress[name])
                    if folder != run_dir:  # it has something to show now: the old run makes room
                        folder = settle(run_dir)
                tracker.log(progress["log"][-1], training.scheduler.last_epoch)
                speed = f"{count / seconds[0]:.1f} posts/s{'  (best)' if best else ''}"
                print(f"epoch {epoch}/{args.epochs}  {line}  {speed}", flush=True)
                training.begin_epoch(epoch + 1)
        wait_for_all(processes)
        scores = score_splits(model, dataset, answers, run_dir, progress["best_epoch"], config["data"], rank)
    except Stopped as error:
        raise Stopped(error.number, how_to_go_on(args, progress) if rank == 0 else "") from None
    tracker.log({f"best_{split}_main_f1": main_score(metrics) for split, metrics in scores.items()}, None)
    if rank == 0:
        (run_dir / "state.pt").unlink(missing_ok=True)  # finished
    return run_dir


def main(argv=None):
    with contextlib.ExitStack() as stack:
        return run(parse_args(argv, __doc__.splitlines()[0]), stack)


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size or --eval-batch-size")
