"""Fine-tune a text encoder with cached photo features fused in, and score it.

    python train.py --fusion film --seed 1337
    torchrun --nproc-per-node 4 train.py --fusion film    # the same run, each batch shared by four processes

Everything a run is lands in runs/<dataset>-<model>[-<encoder>]-<fusion>[-...]-s<seed>/: config.json, encoder/ (configuration and
tokenizer), model.safetensors (of the best epoch on valid), log.jsonl, timing.jsonl, predictions-*.jsonl,
metrics-*.json. While it trains also state.pt, from which the same command with --resume goes on after a stop: it ends in
the log, predictions and weights of a run that was never stopped, digit for digit on CPU.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

from arguments import parse_args
from commands import command_line, first_line, gather, join_processes, lock, pick_precision, progress_bar, wait_for_all
from data import cut_train, load_dataset
from encoding import IGNORE, collate, encode, length_batches, to_device
from evaluate import predict, shuffled_photos
from features import FeatureCache
from fusion import FUSIONS
from model import MACHINE, RUN_FORMAT, SYSTEMS, WORDED, WRITING, autocast, differing, flat, read_config, save_weights
from notes import Notes, reads_relevance
from photos import find_photos, image_folders
from scores import format_scores, main_score, mentions, score, write_json, write_json_lines
from stages import Prefix
from text_encoder import check_soft_tokens, load_text_encoder, longest_input


def open_features(args, dataset):
    """The feature cache and, said on the console, how many posts of each split have a photo; None for text only."""
    if args.fusion == "none":
        return None
    if not dataset.image_ids():
        raise ValueError(f"no post of {dataset.name} names a photo; --fusion none trains on the text alone")
    cache = FeatureCache(args.features)
    cache.require(dataset.image_ids(), dataset.name)
    made, backbone = cache.attrs, SYSTEMS[args.model].backbone
    if made["backbone"] != backbone:
        raise ValueError(
            f"{args.features}: made with --backbone {made['backbone']}, {args.model} needs {backbone}; name another"
        )
    if args.fusion == "pyramid" and cache.num_regions.any() and not cache.grid.any():
        raise ValueError(
            f"--fusion pyramid: {args.model}'s regions are no places in a photo; choose another --fusion"
        )
    print(f"features   {args.features}: {cache.views} views, made from {made.get('made_from', 'an unknown folder')}")
    if backbone not in WORDED:
        try:
            paths = find_photos(cache.ids, image_folders(args.dataset, args.data_dir, args.images))
        except FileNotFoundError:
            if args.images:
                raise
            paths = {}
        if not cache.photo_bytes.any():
            print("           made by an earlier version, which kept no photo's size: not compared with the photos here")
        if absent := cache.compare_photos(paths):
            print(f"           {absent} of its photos are not here (--images names their folder): nothing tells whether they are"
                  f" {dataset.name}'s")  # fmt: skip
    if made["parameters"]:
        print(f"frozen     {made['parameters']:,} parameters of {backbone} (weights {made['weights']}), in that file")
    what = {"caption": "a caption", "phrases": "phrases"}.get(backbone, "a photo")
    for split, examples in dataset.examples.items():
        with_photo = sum(cache.has_photo(example.image_id) for example in examples)
        print(f"           {split}: {with_photo} of {len(examples)} posts have {what}")
        if not with_photo:
            print(f"WARNING    no post of {split} has {what}: its scores are those of text only")
    if args.augment and cache.views == 1 and backbone not in WORDED:
        print("           one view only: no augmentation (extract_features.py --views 4 makes more)")
    return cache


def check_length(args, encoder, tokenizer, extra=0):
    """ValueError if the encoder has too few positions for a post, `extra` of notes and soft tokens."""
    longest, soft = longest_input(encoder, tokenizer), Prefix.count * (args.fusion == "prefix")
    if args.max_len + extra + soft > longest:
        asked = [f"--max-len {args.max_len}"] + [f"--extra-len {args.extra_len}"] * bool(extra)
        asked += [f"the {soft} soft tokens of --fusion prefix"] * bool(soft)
        raise ValueError(f"{' and '.join(asked)}: {args.text_encoder} takes {longest} in all")


def median_relevance(args, dataset, rows, notes, cache):
    """The median of the relevances of train's posts with a photo, for --align supervised; None without it.

    How many are given is said on the console. ValueError if none of train is, or if the median parts nothing.
    """
    for split in dataset.examples:
        known = [notes.known(row, row["image_id"]) for row in rows[split] if cache.has_photo(row["image_id"])]
        given = [note["relevance"] for note in known if "relevance" in note]
        rest = {"given": "that of the others is predicted", "predicted": "that of all is predicted"}
        print(f"           {split}: relevance given of {len(given)} of {len(known)} posts with a photo,"
              f" {rest.get(args.relevance, 'the others take no part in supervised alignment')}")  # fmt: skip
        if split == "train":
            of_train = np.float32(given)  # as batches have them
    supervised = "supervised" in args.align
    if not len(of_train) and (supervised or args.relevance == "given" or args.extra == "none"):
        raise ValueError(f"{args.notes}: no relevance of any post of train that has a photo; add it to the"
                         " notes, or leave out what reads it")  # fmt: skip
    if supervised and (of_train >= np.median(of_train)).all():
        raise ValueError("--align supervised: leave it out; its classes are relevances below train's median and"
                         f" others, and none of {args.notes} is below it, {np.median(of_train):g}")  # fmt: skip
    return float(np.median(of_train)) if supervised else None


def open_generated(args, dataset, cache):
    """The feature cache of second pictures, None without, and on the console how many posts have one.

    ValueError if it is another data set's, or made otherwise than that of the photos: one map reads both.
    """
    if not args.generated:
        if "generated" in getattr(FUSIONS.get(args.fusion), "reads", ()):
            print(f"generated  no second pictures (--generated): {args.fusion} reads the photo alone")
        return None
    if not Path(args.generated).exists():
        raise FileNotFoundError(
            f"--generated {args.generated}: no such feature file; extract_features.py makes one of pictures"
            " in the folder --images names, in another --cache-dir"
        )
    generated = FeatureCache(args.generated)
    generated.require(dataset.image_ids(), dataset.name)
    made = [side.attrs | {"region width": side.region_dim} for side in (generated, cache)]
    for key in ("backbone", "region width", "weights_sha256", "img_size"):
        here, wanted = (side.get(key, "unknown") for side in made)
        if here != wanted:
            raise ValueError(
                f"{args.generated}: made with {key.replace('_', ' ')} {here}, {cache.path} with {wanted}; one"
                " map reads both pictures, so extract both alike"
            )
    made_from = generated.attrs.get("made_from", "an unknown folder")
    print(f"generated  {args.generated}: {generated.views} views, made from {made_from}")
    for split, examples in dataset.examples.items():
        count = sum(generated.has_photo(example.image_id) for example in examples)
        print(f"           {split}: {count} of {len(examples)} posts have one, {len(examples) - count} none")
    if generated.sha256 == cache.sha256:
        print("WARNING    these are the photos themselves: what hides or changes photos leaves them here")
    return generated


def open_notes(args, dataset, rows, tokenizer, encoder):
    """The `Notes` of the data set, attached to its encoded `rows`, and on the console what they cover; None without.

    ValueError if they do not fit the data set, or the encoder: its longest input, or that it reads left to right.
    """
    if args.notes is None:
        return None
    if args.extra != "none" and getattr(encoder, "left_to_right", False):
        raise ValueError(f"--extra {args.extra}: {args.text_encoder} reads left to right, so no word would know of what stands after"
                         " the post; take another --text-encoder")  # fmt: skip
    notes = Notes(args.notes, tokenizer, args.extra, args.extra_len, reads_relevance(vars(args)))
    if notes.segments:
        check_length(args, encoder, tokenizer, notes.segments.longest)
    for i, line in enumerate(notes.coverage(dataset.examples)):
        print(f"{'           ' if i else 'notes      '}{line}")
    for split, examples in dataset.examples.items():
        notes.attach(rows[split], examples, split)
        if args.shuffle_notes and notes.shuffle(rows[split], args.seed) < 2 and split == "train":
            raise ValueError(f"--shuffle-notes: fewer than 2 posts of train have an about_post in {args.notes}; leave it out")
        if notes.segments is None:
            continue
        shown = [notes.shown(row, row["image_id"]) for row in rows[split]]
        with_note, cut = (sum(bool(row.get(key)) for row in shown) for key in ("text_length", "note_cut"))
        said = f", {cut} of them cut to --extra-len {args.extra_len}" * bool(cut)
        print(f"           {split}: {with_note} of {len(examples)} posts have a second segment{said}")
        if not with_note:
            print(f"WARNING    no post of {split} has a second segment: its scores are those without notes")
    if args.shuffle_notes:
        print("notes      SHUFFLED: each post is given what was said of another, in every split")
    return notes


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


def check_folder(run_dir, args):
    """ValueError if the run folder holds something that the arguments do not allow to touch."""
    held = [path for path in run_dir.iterdir() if path.suffix != ".tmp"] if run_dir.exists() else []
    if held and not (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir} holds files, but no run to overwrite; name another folder with --run-dir")
    if held and not (args.overwrite or args.resume):
        raise ValueError(
            f"{run_dir} holds a run already; go on with it with --resume, delete it with --overwrite or name another"
            " folder with --run-dir"
        )


def check_same_run(run_dir, config):
    """ValueError if the run in the folder was begun with other settings or data than `config`; another machine is only said."""
    free = WRITING | {"run_dir"}
    made, asked = ({key: value for key, value in flat(side).items() if key not in free}
                   for side in (read_config(run_dir), json.loads(json.dumps(config))))  # fmt: skip
    changed = differing(made, asked, ("run", "now"))
    if other := [said for key, said in changed.items() if key.partition(".")[0] not in MACHINE]:
        raise ValueError(f"{run_dir}: begun with other settings or data: {'; '.join(other)[:500]}; --overwrite starts it anew")
    for said in changed.values():
        print(f"WARNING    begun on another machine, {said}: the last digits may differ")


def save_state(path, progress, model, optimizer, scheduler, device):
    """All that going on needs, in one file: a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    state = {"progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state(device) if device.startswith("cuda") else None}  # fmt: skip
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:
        raise OSError(f"{temporary}: cannot be written ({first_line(error)}); make room, then --resume") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path, model, optimizer, scheduler, device):
    """Put everything back as `save_state` found it; returns the progress. ValueError if the file is broken."""
    try:
        state = torch.load(path, "cpu", weights_only=True)  # data alone: no pickled code is run
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return state["progress"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path}: not a state to resume from ({first_line(error)[:150]}); --overwrite starts anew") from None


def main(argv=None):
    with contextlib.ExitStack() as stack:
        return run(parse_args(argv, __doc__.splitlines()[0]), stack)


def run(args, stack):
    """Train and score one run; returns its folder. What must be closed at the end goes on `stack`."""
    rank, processes, device = join_processes(args.device)
    args.precision = pick_precision(args.precision, device)
    run_dir = Path(args.run_dir)
    check_folder(run_dir, args)
    dataset = load_dataset(args.dataset, args.data_dir)
    if args.train_share < 1:
        cut_train(dataset, args.train_share, args.seed)
    prints = dataset.fingerprints()
    for split, examples in dataset.examples.items():
        print(f"{split:<10} {len(examples)} posts, {prints[split]['variant']} ({prints[split]['sha256'][:16]})")
    for note in dataset.notes:
        print(f"           {note}")
    cache = open_features(args, dataset)
    generated = open_generated(args, dataset, cache)
    for features in filter(None, (cache, generated)):
        if device.startswith("cuda") and features.regions.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            features.keep_on(device)
            print(f"           {features.path} kept on {device}, {features.regions.nbytes:,} bytes")

    torch.manual_seed(args.seed)
    system = SYSTEMS[args.model]
    if processes > 1 and "local" in args.align:
        raise ValueError("--align local: it needs all posts of a batch in one process; run it without torchrun")
    encoder, tokenizer = load_text_encoder(args.text_encoder, system, dataset.task, args.dropout)
    check_length(args, encoder, tokenizer)
    if args.fusion == "prefix":
        check_soft_tokens(encoder, tokenizer, args.text_encoder, Prefix.count)
    rows = {}
    for split, examples in dataset.examples.items():
        rows[split], counts = encode(tokenizer, examples, dataset.labels, args.max_len)
        if any(counts.values()):
            print(f"           {split}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
    notes, wrong = open_notes(args, dataset, rows, tokenizer, encoder), {}
    median = median_relevance(args, dataset, rows, notes, cache) if notes and notes.relevance else None
    if args.shuffle_photos:
        for split, examples in dataset.examples.items():
            wrong[split] = shuffled_photos([example.image_id for example in examples], cache, args.seed, notes)
        if not any(wrong["train"].values()):
            raise ValueError("--shuffle-photos: of no post of train there is a photo, or a note on one, to shuffle; leave it out")
        print("photos     SHUFFLED: each post is shown another's, in every split")
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, np)}
    config = vars(args) | {
        "run_format": RUN_FORMAT,
        "task": dataset.task,
        "labels": list(dataset.labels),
        "data": prints,
        "region_dim": cache.region_dim if cache else None,
        "features_made": cache.attrs | {"sha256": cache.sha256} if cache else None,
        "generated_made": generated.attrs | {"sha256": generated.sha256} if generated else None,
        "notes_sha256": notes.sha256 if notes else None,
        "relevance_median": median,
        "versions": versions | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),  # another number sums in another order: the last digits differ
        "processes": processes,
    }
    model = system.model(encoder, config).to(device)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if processes > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)  # one pass over memory: 7 times as fast
    whole = [notes.shown(row, row["image_id"]) for row in rows["train"]] if notes else rows["train"]
    lengths = [len(row["input_ids"]) for row in whole]
    counts = np.array([np.not_equal(row["labels"], IGNORE).sum() for row in rows["train"]])  # of what the loss is over
    steps = args.epochs * len(length_batches(lengths, args.batch_size))
    scheduler = get_linear_schedule_with_warmup(optimizer, int(steps * args.warmup_ratio), steps)
    for part, module in model.named_children():
        config[f"{part}_parameters"] = count = sum(parameter.numel() for parameter in module.parameters())
        frozen = {name: parameter.numel() for name, parameter in module.named_parameters() if not parameter.requires_grad}
        if count:
            trained = f"{count - sum(frozen.values()):,} trained" if frozen else "all trained"
            print(f"{part:<10} {count:,} parameters, {trained} at {args.lr if part == 'encoder' else args.fusion_lr:g}")
        if frozen:
            print(f"           {sum(frozen.values()):,} frozen: nothing uses them, or they are fixed (first: {part}.{next(iter(frozen))})")

    run_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        stack.callback(os.close, lock(run_dir))
    state, last = run_dir / "state.pt", "test" if "test" in rows else "valid"
    if args.resume and (run_dir / "config.json").exists():
        check_same_run(run_dir, config)
        if (run_dir / f"metrics-{last}.json").exists() and not state.exists():
            print(f"{run_dir} is finished; left alone (--overwrite trains it anew)")
            return run_dir
    elif args.resume:
        print(f"{run_dir}: nothing there to resume; the run begins")
    wait_for_all(processes)  # all have seen the folder as it was
    if rank == 0:
        for path in run_dir.iterdir() if args.overwrite else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(run_dir / "config.json", config)
        encoder.config.save_pretrained(run_dir / "encoder")
        tokenizer.save_pretrained(run_dir / "encoder")
    wait_for_all(processes)

    known = mentions(dataset.examples["train"])

    def answers(split):
        own = slice(rank, None, processes)
        records = predict(
            model, rows[split][own], dataset.examples[split][own], dataset.labels, tokenizer.pad_token_id,
            args.eval_batch_size, device, args.precision, cache, wrong.get(split), known, notes, generated,
        )  # fmt: skip
        return gather(records, processes)

    begun = {"step": 0, "loss": [0.0] * len(model.loss_weights), "labelled": 0.0}  # of an epoch
    progress = {"epoch": 1, "best": -1.0, "best_epoch": 0, "log": [], "timing": []} | begun
    saved = time.monotonic()
    if state.exists():
        progress = load_state(state, model, optimizer, scheduler, device)
        print(f"resuming   in epoch {progress['epoch']} after {progress['step']} steps")
    for epoch in range(progress["epoch"], args.epochs + 1):
        started = time.perf_counter()
        rng = np.random.default_rng([args.seed, epoch])
        model.train()
        loss_sum, labelled = torch.tensor(progress["loss"], device=device), progress["labelled"]
        first_bad = torch.tensor(math.inf, device=device)  # step whose loss or gradient is not finite
        batches, before = length_batches(lengths, args.batch_size, rng), progress["step"]
        done = sum(map(len, batches[:before]))
        bar = progress_bar(len(lengths), "post", True, initial=done, desc=f"epoch {epoch}", disable=rank > 0)
        stack.callback(bar.close)  # an error is not to stand behind it
        for step, chosen in enumerate(batches, 1):
            hidden = rng.random(len(chosen)) < args.photo_dropout
            views = rng.integers(cache.views, size=len(chosen)) if cache and args.augment else None
            second_views = rng.integers(generated.views, size=len(chosen)) if generated and args.augment else None
            if step <= before:  # done before the stop; its random numbers had to be drawn
                continue
            # This process's share of the posts. One without any still takes part, with the first and no weight.
            mine, weight = list(range(rank, len(chosen), processes)) or [0], float(rank < len(chosen))
            own = [None if hidden[i] or not weight else dataset.examples["train"][chosen[i]].image_id for i in mine]
            photos = [wrong["train"].get(photo) for photo in own] if wrong else own
            posts = [rows["train"][chosen[i]] for i in mine]
            if notes:
                posts = [notes.shown(row, photo) for row, photo in zip(posts, photos, strict=True)]
            views = views[mine] if views is not None else None
            batch = collate(posts, tokenizer.pad_token_id, cache, photos, views)
            if generated:  # made from the text, it stays with its post whatever photo is shown
                ids = [dataset.examples["train"][chosen[i]].image_id if weight else None for i in mine]
                batch |= generated.read_generated(ids, second_views[mine] if second_views is not None else None)
            batch = to_device(batch, device)
            if processes > 1:  # dropout of its own
                torch.manual_seed(np.random.default_rng([args.seed, epoch, step, rank]).integers(2**63))
            with autocast(device, args.precision):
                _, losses = parallel(batch, losses=True)  # {name: [B]}
            # Over all that the batch has labelled, not the mean of the processes' means: gradients are averaged over them.
            summed, count = torch.stack([losses[name].sum() for name in model.loss_weights]), int(counts[chosen].sum())
            (model.total(summed, count, len(chosen)) * (weight * processes)).backward()
            summed = summed.detach() * weight  # [losses]
            if processes > 1:
                torch.distributed.all_reduce(summed)
            if scheduler.last_epoch == 0:
                check_all_train(model, optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loss_sum = loss_sum + summed
            labelled += count
            bar.update(len(chosen))
            first_bad = torch.where(torch.isfinite(summed.sum() + norm), first_bad, first_bad.clamp(max=step))
            save = rank == 0 and time.monotonic() - saved >= args.save_every
            if save or step % 50 == 0 or step == len(batches):  # not each step: reading a value makes the device wait
                if (bad := first_bad.item()) < math.inf:
                    ids = ", ".join(dataset.examples["train"][i].id for i in batches[int(bad) - 1])
                    raise ValueError(
                        f"epoch {epoch}, step {int(bad)}: the loss or its gradient is not finite (posts {ids}); lower --lr"
                        f" ({args.lr:g}) or --fusion-lr ({args.fusion_lr:g})"
                    )
                bar.set_postfix(loss=f"{loss_sum[0].item() / max(1, labelled):.4f}", refresh=False)
            if save:
                progress |= {"epoch": epoch, "step": step, "loss": loss_sum.tolist(), "labelled": labelled}
                save_state(state, progress, model, optimizer, scheduler, device)
                saved = time.monotonic()
        bar.close()
        (loss, *others), trained = loss_sum.tolist(), time.perf_counter()
        loss /= max(1, labelled)
        metrics = score(answers("valid"))
        main_f1, accuracy = main_score(metrics), metrics.get("token", metrics.get("row"))["accuracy"]
        kept = main_f1 > progress["best"]
        if kept:
            progress |= {"best": main_f1, "best_epoch": epoch}
            if rank == 0:
                save_weights(model, run_dir)
        log = {"epoch": epoch, "loss": loss, "valid_main_f1": main_f1, "valid_accuracy": accuracy}
        log |= {f"loss_{name}": value / len(lengths) for name, value in zip([*model.loss_weights][1:], others, strict=True)}
        timing = {"epoch": epoch, "train_s": trained - started, "valid_s": time.perf_counter() - trained}
        for name, record in (("log", log | {"best_epoch": progress["best_epoch"]}), ("timing", timing)):
            progress[name].append(record)
            if rank == 0:
                write_json_lines(run_dir / f"{name}.jsonl", progress[name])
        print(
            f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  valid {'entity' if dataset.task == 'ner' else 'micro'} F1"
            f" {main_f1:.4f}, accuracy {accuracy:.4f}  {sum(map(len, batches[before:])) / timing['train_s']:.1f} posts/s"
            f"{'  (best)' if kept else ''}",
            flush=True,
        )  # fmt: skip
        progress |= {"epoch": epoch + 1} | begun
        if rank == 0 and time.monotonic() - saved >= args.save_every:
            save_state(state, progress, model, optimizer, scheduler, device)
            saved = time.monotonic()

    wait_for_all(processes)
    load_model(model, str(run_dir / "model.safetensors"))  # the best epoch on valid; test is scored once, with it
    for split in ("valid", "test"):
        if split not in rows:
            print(f"{dataset.name} has no {split} file: no {split} scores")
            continue
        records = answers(split)
        metrics = score(records) | {"data": prints[split]}
        if rank == 0:
            write_json_lines(run_dir / f"predictions-{split}.jsonl", records)
            write_json(run_dir / f"metrics-{split}.json", metrics)
        print(format_scores(metrics, f"\n{run_dir.name} {split}, epoch {progress['best_epoch']}"))
    if rank == 0:
        state.unlink(missing_ok=True)  # finished
    return run_dir


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size or --eval-batch-size")
