"""Fine-tune a text encoder with cached photo features fused in, and score it.

    python train.py --fusion film --seed 1337
    torchrun --nproc-per-node 4 train.py --fusion film    # the same run, each batch shared by four processes

Everything a run is lands in runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>/: config.json, encoder/
(configuration and tokenizer), model.safetensors (of the best epoch on valid), log.jsonl, timing.jsonl,
predictions-*.jsonl, metrics-*.json. While it trains also state.pt, from which the same command with --resume
goes on after a stop: it ends in the log, predictions and weights of a run that was never stopped, digit for
digit on CPU.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
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

from align import ALIGNMENTS
from encoding import IGNORE, length_batches, to_device
from fusion import FUSIONS
from parts.console import bounded, command_line, dataset_name, progress_bar
from parts.datasets import DATASETS, data_task, locate
from parts.files import write_json, write_json_lines
from parts.model import TextRegions
from parts.notes import EXTRAS
from parts.opening import open_inputs
from parts.posts import predict_posts
from parts.processes import autocast, default_device, fit_threads, gather, join_processes, keep_heap
from parts.processes import pick_precision, wait_for_all
from parts.runs import begin, check_folder, load_state, save_state, save_weights, settle
from parts.scores import format_scores, main_score, mentions, score
from parts.systems import PRESETS, SYSTEMS, mistake, run_name
from parts.words import RULES


def alignment(text):
    """argparse type: NAME=WEIGHT of an alignment loss, or none, to take those of a --system away."""
    name, _, weight = text.partition("=")
    if text == "none":
        return text, 0.0
    if name not in ALIGNMENTS:
        raise argparse.ArgumentTypeError(f"{text}: NAME is one of {', '.join(ALIGNMENTS)}")
    return name, bounded(float, 0)(weight)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults there are; "None" would be none."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def make_parser(description):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]", description=description, formatter_class=Defaults
    )
    # fmt: off
    add = parser.add_argument_group("what is trained").add_argument
    add("--dataset", type=dataset_name, default="twitter2017",
        help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--system", choices=PRESETS,
        help="a published system: sets the flags it is made of, those given excepted")
    add("--model", choices=SYSTEMS,
        help="default: roberta-resnet50 for named entities, bert-resnet50 for relations")
    add("--text-encoder", help="hub name or local folder; default: the model's own")
    add("--max-len", type=bounded(int, 1),
        help="sub-tokens a post, special ones included; default: 128, 40 for vilt")
    add("--decoder", choices=("softmax", "crf", "visual-crf"), default="softmax", help="what decides on the"
        " labels of a post's words: each by itself, all together (crf.py), or all and the photo (stages.py)")
    add("--word-rule", choices=("auto", *RULES), default="auto", help="how predict.py cuts a text into words"
        " (docs/DATA.md); auto: as train's words are cut")
    add("--train-share", type=bounded(float, 1e-9, 1), default=1.0,
        help="train on this share of its posts, drawn with --seed")

    add = parser.add_argument_group("the photo").add_argument
    add("--fusion", choices=FUSIONS, help="none = text only; prefix: soft tokens of the photo"
        " that the text encoder reads; default: film. blip and vilt bring their own")
    add("--heads", type=bounded(int, 1),
        help="of cross-attention, bimodal, pyramid, prefix and --bottleneck; default: 8")
    add("--photo-dropout", type=bounded(float, 0, 1), default=0.1,
        help="share of training posts shown no photo")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="train on all views of a photo")
    add("--shuffle-photos", action="store_true", help="show each post another's photo, the same one always:"
        " the control that tells what the photos are worth")
    add("--align", type=alignment, nargs="+", default=[], metavar="NAME=WEIGHT", help="losses beside the"
        " labels' that pull text and photo of a post together (align.py): contrastive, local, matching, and,"
        " by the relevance in --notes, supervised; or none")
    add("--relevance", choices=("none", "given", "predicted"), default="none", help="give a post the fusion"
        " as far as its photo belongs to it: by --notes, where they say, or always as the model sees it")
    add("--relevance-loss", type=bounded(float, 0),
        help="weight of the loss that teaches the model the relevance in --notes; default: 0.5")
    add("--bottleneck", type=bounded(float, 0), default=0.0, metavar="WEIGHT", help="a noisy code of text and"
        " photo in place of both, before --align and --fusion (stages.py); what it says of them is a loss of"
        " this weight; 0 = none")
    add("--generated", metavar="FEATURES",
        help="feature file of second pictures, generated from the texts; for --fusion saliency")

    add = parser.add_argument_group("what others say of a post").add_argument
    add("--notes", help="JSON lines of what others said of each post (notes.py, write_notes.py)")
    add("--extra", choices=EXTRAS, default="none", help="what of --notes the text encoder reads after the"
        " post: what was said of the post, of the photo, or both")
    add("--extra-len", type=bounded(int, 1), default=128, help="sub-tokens of that, at most")
    add("--shuffle-notes", action="store_true", help="give each post what was said of another: the control"
        " that tells what --extra post is worth")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--seed", type=bounded(int, 0, 2**32), default=1337)
    add("--epochs", type=bounded(int, 1), default=5)
    add("--batch-size", type=bounded(int, 1), default=8, help="posts a step, over all processes")
    add("--eval-batch-size", type=bounded(int, 1), default=12)
    add("--lr", type=bounded(float, 0), default=3e-5, help="of the pretrained text encoder")
    add("--fusion-lr", type=bounded(float, 0), default=1.1e-3,
        help="of what starts from scratch: fusion, head")
    add("--weight-decay", type=bounded(float, 0), default=0.01)
    add("--warmup-ratio", type=bounded(float, 0, 1), default=0.1,
        help="share of the steps, then linear decay to 0")
    add("--max-grad-norm", type=bounded(float, 1e-9), default=1.0, help="of gradients, clipped; inf = never")
    add("--dropout", type=bounded(float, 0, 1), default=0.1)
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on NVIDIA's GPUs from Ampere on, float32 elsewhere, on Apple's mps too")
    add("--device", default=default_device())

    add = parser.add_argument_group("where things are").add_argument
    add("--data-dir", default="data")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir: they are"
        " compared, by name and size, with those the features were made of")
    add("--cache-dir", default="features", help="where feature files are")
    add("--img-size", type=bounded(int, 1), help="which feature file: the size its photos were resized to;"
        " default: 224, 384 for blip and vilt")
    add("--features", help="feature file, where it is not the usual one in --cache-dir")
    add("--run-dir", help="default: runs/<dataset>-<system>[-<encoder>][...]-s<seed>, or, without --system or"
        " with flags of its own changed, runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>")
    add("--overwrite", action="store_true", help="put the new run in the place of the one in the run folder,"
        " when its first epoch is over; files of your own there stay")
    add("--resume", action="store_true",
        help="go on with the run in the run folder where it was stopped, if it was")
    add("--save-every", type=bounded(float, 0), default=600,
        help="seconds from one state to resume from to the next; the first comes after a minute, and one"
        " more at each epoch's end")
    # fmt: on
    return parser


def parse_args(argv, description=None):
    """The arguments of train.py, defaults and presets filled in; exits with one line if some do not fit."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.system:
        parser.set_defaults(**PRESETS[args.system])
        args = parser.parse_args(argv)
    task, (dataset, _) = data_task(args.dataset, args.data_dir), locate(args.dataset, args.data_dir)
    args.model = args.model or ("roberta-resnet50" if task == "ner" else "bert-resnet50")
    system = SYSTEMS[args.model]
    regions = issubclass(system.model, TextRegions)
    if regions:
        args.fusion = args.fusion or "film"
    args.align, asked = dict(args.align), len(args.align)
    if len(args.align) < asked:
        parser.error("--align: one loss is named twice; leave one out")
    args.align = {name: weight for name, weight in args.align.items() if weight}
    if wrong := mistake(args, task, system, regions):
        parser.error(wrong)
    args.heads = args.heads or 8
    args.relevance_loss = 0.5 if args.relevance_loss is None else args.relevance_loss
    args.img_size, args.max_len = args.img_size or system.img_size, args.max_len or system.max_len
    args.text_encoder = args.text_encoder or system.text_encoder
    args.features = args.features or f"{args.cache_dir}/{dataset}-{system.backbone}-{args.img_size}.h5"
    defaults = vars(parser.parse_args([])) | {"heads": 8}
    defaults |= {"img_size": system.img_size, "max_len": system.max_len}
    args.run_dir = args.run_dir or f"runs/{run_name(args, defaults, dataset, system)}"
    return args


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
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
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
        for photo in photos if cache else ():
            if photo is not None and not np.isfinite(cache.regions[cache.rows[photo]]).all():
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
    found = {}
    for part, module in model.named_children():
        found[f"{part}_parameters"] = count = sum(parameter.numel() for parameter in module.parameters())
        frozen = {name: p.numel() for name, p in module.named_parameters() if not p.requires_grad}
        if count:
            trained = f"{count - sum(frozen.values()):,} trained" if frozen else "all trained"
            rate = args.lr if part == "encoder" else args.fusion_lr
            print(f"{part:<10} {count:,} parameters, {trained} at {rate:g}")
        if frozen:
            print(f"           {sum(frozen.values()):,} frozen: nothing uses them, or they are fixed (first:"
                  f" {part}.{next(iter(frozen))})")  # fmt: skip
    threads = fit_threads(model)  # another number sums in another order: the last digits differ
    print(f"in all     {sum(found.values()):,} parameters; CPU threads: {threads}")
    return found | {"threads": threads}


def draw(rng, count, posts, args):
    """What chance decides of a batch's posts, as arguments of `Posts.batch`: hidden photos, views to read."""
    drawn = {"hidden": rng.random(count) < args.photo_dropout}
    for name, cache in (("views", posts.cache), ("second_views", posts.generated)):
        if cache and args.augment:
            drawn[name] = rng.integers(cache.views, size=count)
    return drawn


def share(posts, chosen, drawn, rank, processes):
    """(batch, weight) of this process: every `processes`-th post of a batch, and what was `drawn` for it.

    A process that none is left for still takes part, with the first post, no pictures and no weight.
    """
    mine, weight = list(range(rank, len(chosen), processes)) or [0], float(rank < len(chosen))
    drawn = {name: values[mine] for name, values in drawn.items()}
    return posts.batch([chosen[i] for i in mine], **drawn, pictures=bool(weight)), weight


def train_step(model, losses, optimizer, scheduler, weight, labelled, posts, args):
    """One step of all processes, of the `losses` {name: [B]} of this one; returns (sum of each, norm).

    `weight`: 0 for a process that had no post; `labelled`, `posts`: labels and posts of the whole batch. The
    norm is that of the gradients before they are clipped.
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    summed = torch.stack([losses[name].sum() for name in model.loss_weights])
    # Gradients are averaged over processes, hence times their number.
    loss = model.total(summed, labelled, posts) * (weight * processes)
    loss.backward()
    if scheduler.last_epoch == 0:  # the run's first step
        check_all_train(model, optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    summed = summed.detach() * weight
    if processes > 1:
        torch.distributed.all_reduce(summed)
    return summed, norm


def log_epoch(progress, model, loss_sum, labelled, posts, metrics, seconds):
    """Add an epoch to the `progress` of a run; returns whether it is the best so far, and a line on it.

    `loss_sum`: of each loss over the `posts` of train; `labelled`: labels among them; `seconds`: of training
    and scoring.
    """
    main_f1, accuracy = main_score(metrics), metrics.get("token", metrics.get("row"))["accuracy"]
    best, epoch = main_f1 > progress["best"], progress["epoch"]
    if best:
        progress |= {"best": main_f1, "best_epoch": epoch}
    sums = dict(zip(model.loss_weights, loss_sum.tolist(), strict=True))
    log = {"epoch": epoch, "loss": sums.pop("labels") / max(1, labelled)}  # a label's; others: a post's
    log |= {"valid_main_f1": main_f1, "valid_accuracy": accuracy}
    log |= {f"loss_{name}": value / posts for name, value in sums.items()}
    progress["log"].append(log | {"best_epoch": progress["best_epoch"]})
    progress["timing"].append({"epoch": epoch, "train_s": seconds[0], "valid_s": seconds[1]})
    name = "entity" if metrics["task"] == "ner" else "micro"
    return best, f"loss {log['loss']:.4f}  valid {name} F1 {main_f1:.4f}, accuracy {accuracy:.4f}"


def score_splits(model, dataset, answers, run_dir, epoch, prints, rank):
    """Score valid and test, once, with the weights of the best epoch: records and metrics into the folder."""
    load_model(model, str(run_dir / "model.safetensors"))
    for split in ("valid", "test"):
        if split not in dataset.examples:
            print(f"{dataset.name} has no {split} file: no {split} scores")
            continue
        records = answers(split)
        metrics = score(records) | {"data": prints[split]}
        if rank == 0:
            write_json_lines(run_dir / f"predictions-{split}.jsonl", records)
            write_json(run_dir / f"metrics-{split}.json", metrics)
        print(format_scores(metrics, f"\n{run_dir.name} {split}, epoch {epoch}"))
    if rank == 0:
        (run_dir / "state.pt").unlink(missing_ok=True)  # finished


def run(args, stack):
    """Train and score one run; returns its folder. What must be closed at the end goes on `stack`."""
    keep_heap()
    rank, processes, device = join_processes(args.device)
    args.precision, run_dir = pick_precision(args.precision, device), Path(args.run_dir)
    check_folder(run_dir, args)
    if processes > 1 and "local" in args.align:
        raise ValueError("--align local: needs all posts of a batch in one process; leave torchrun out")
    torch.manual_seed(args.seed)
    dataset, encoder, tokenizer, posts, facts = open_inputs(args, device)
    config = vars(args) | facts | {"versions": versions(), "processes": processes}
    model = SYSTEMS[args.model].model(encoder, config).to(device)
    config |= tell_parameters(model, args)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if processes > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)  # one pass: 7 times as fast
    train, known = posts["train"], mentions(dataset.examples["train"])
    lengths = train.showing(None).lengths()  # with own photos: a control has the batches of the run itself
    labels = np.array([np.not_equal(row["labels"], IGNORE).sum() for row in train.rows])  # of each post
    steps = args.epochs * len(length_batches(lengths, args.batch_size))
    scheduler = get_linear_schedule_with_warmup(optimizer, int(steps * args.warmup_ratio), steps)
    folder = begin(args, config, encoder, tokenizer, rank, processes, stack)
    if folder is None:  # finished
        return run_dir

    def answers(split):
        mine = posts[split].part(range(rank, len(posts[split]), processes))
        settings = dataset.labels, args.eval_batch_size, device, args.precision
        name = split if rank == 0 else ""  # of the bar; without, there is none
        return gather(predict_posts(model, mine, *settings, known, name), processes)

    begun = {"step": 0, "loss": [0.0] * len(model.loss_weights), "labelled": 0}  # of an epoch
    progress = {"epoch": 1, "best": -1.0, "best_epoch": 0, "log": [], "timing": []} | begun
    due = time.monotonic() + min(60, args.save_every)  # the next state; one more at each epoch's end
    if (folder / "state.pt").exists():
        progress = load_state(folder / "state.pt", model, optimizer, scheduler, device)
        print(f"resuming   in epoch {progress['epoch']} after {progress['step']} steps")
    for epoch in range(progress["epoch"], args.epochs + 1):
        started, rng = time.perf_counter(), np.random.default_rng([args.seed, epoch])
        batches, before = length_batches(lengths, args.batch_size, rng), progress["step"]
        loss_sum, labelled = torch.tensor(progress["loss"], device=device), progress["labelled"]
        first_bad = torch.tensor(math.inf, device=device)  # step whose loss or gradient is not finite
        done = sum(map(len, batches[:before]))
        bar = progress_bar(len(train), "post", True, initial=done, desc=f"epoch {epoch}", disable=rank > 0)
        stack.callback(bar.close)  # else an error would stand on its line
        model.train()
        for step, chosen in enumerate(batches, 1):
            drawn = draw(rng, len(chosen), train, args)
            if step <= before:  # done before the stop; its random numbers had to be drawn
                continue
            batch, weight = share(train, chosen, drawn, rank, processes)
            if processes > 1:  # dropout of its own for each, the same again after --resume
                torch.manual_seed(np.random.default_rng([args.seed, epoch, step, rank]).integers(2**63))
            count = int(labels[chosen].sum())
            with autocast(device, args.precision):
                losses = parallel(to_device(batch, device), return_losses=True).losses
            summed, norm = train_step(model, losses, optimizer, scheduler, weight, count, len(chosen), args)
            loss_sum, labelled = loss_sum + summed, labelled + count
            first_bad = torch.where(torch.isfinite(summed.sum() + norm), first_bad, first_bad.clamp(max=step))
            bar.update(len(chosen))
            save = rank == 0 and time.monotonic() >= due
            # Not each step: reading a value makes the device wait. A bad step only stops the run: the weights
            # have taken it in, the last state has not.
            if save or step % 50 == 0 or step == len(batches):
                check_finite(first_bad.item(), train, batches, epoch, args)
                bar.set_postfix(loss=f"{loss_sum[0].item() / max(1, labelled):.4f}", refresh=False)
            if save:
                progress |= {"epoch": epoch, "step": step, "loss": loss_sum.tolist(), "labelled": labelled}
                save_state(folder / "state.pt", progress, model, optimizer, scheduler, device)
                due = time.monotonic() + args.save_every
        bar.close()
        trained = time.perf_counter()
        metrics = score(answers("valid"))
        seconds = trained - started, time.perf_counter() - trained
        best, message = log_epoch(progress, model, loss_sum, labelled, len(train), metrics, seconds)
        if rank == 0:
            if best:
                save_weights(model, folder)
            for name in ("log", "timing"):
                write_json_lines(folder / f"{name}.jsonl", progress[name])
            if folder != run_dir:  # it has something to show now: the old run makes room
                folder = settle(run_dir)
        rate = f"{(len(train) - done) / seconds[0]:.1f} posts/s{'  (best)' if best else ''}"
        print(f"epoch {epoch}/{args.epochs}  {message}  {rate}", flush=True)
        progress |= {"epoch": epoch + 1} | begun
        if rank == 0:
            save_state(folder / "state.pt", progress, model, optimizer, scheduler, device)
            due = time.monotonic() + args.save_every
    wait_for_all(processes)
    score_splits(model, dataset, answers, run_dir, progress["best_epoch"], config["data"], rank)
    return run_dir


def main(argv=None):
    with contextlib.ExitStack() as stack:
        return run(parse_args(argv, __doc__.splitlines()[0]), stack)


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size or --eval-batch-size")
