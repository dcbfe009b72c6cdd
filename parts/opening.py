"""All inputs of a run opened and checked: its posts with photos, notes and second pictures, its text encoder.

    dataset, encoder, tokenizer, posts, facts = open_inputs(args, device)  # of a new run, on the console
    model, config, dataset, posts = open_run(run_dir, "test", device)  # what a finished run was scored on
"""

from pathlib import Path

import numpy as np
import torch

from encoding import encode
from features import FeatureCache
from fusion import FUSIONS, Fusion
from parts.datasets import DATASETS, load_dataset
from parts.notes import Notes, reads_relevance
from parts.photos import WORDED, find_photos, image_folders
from parts.posts import Posts, cut_train, shuffled_photos
from parts.run_files import load_run
from parts.runs import RUN_FORMAT
from parts.systems import SYSTEMS
from parts.text_encoder import check_soft_tokens, load_text_encoder, longest_input

# ---------------------------------------------------------------------------------------------- for a new run


def open_inputs(args, device):
    """All that a run of train.py with arguments `args` reads; what of it is there is said on the console.

    (dataset, encoder, tokenizer, {split: `Posts`}, facts for the run's configuration). Begins at torch's
    present random state: the encoder may have parts that start at random. FileNotFoundError or ValueError if
    something is not there, broken, or does not fit the rest.
    """
    # The posts.
    dataset = load_dataset(args.dataset, args.data_dir)
    if args.train_share < 1:
        cut_train(dataset, args.train_share, args.seed)
    prints = dataset.fingerprints()
    for split, examples in dataset.examples.items():
        made = prints[split]
        print(f"{split:<10} {len(examples)} posts, {made['variant']} ({made['sha256'][:16]})")
    for note in dataset.notes:
        print(f"           {note}")

    # Their photos.
    cache = open_features(args, dataset)
    generated = open_generated(args, dataset, cache)
    for features in filter(None, (cache, generated)):
        if device.startswith("cuda") and features.regions.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            features.keep_on(device)
            print(f"           {features.path} kept on {device}, {features.regions.nbytes:,} bytes")

    # The text encoder, and the posts as it reads them.
    encoder, tokenizer = load_text_encoder(
        args.text_encoder, SYSTEMS[args.model].checkpoint, dataset.task, args.dropout
    )
    check_length(args, encoder, tokenizer)
    if soft_tokens := FUSIONS.get(args.fusion, Fusion).soft_tokens:
        check_soft_tokens(encoder, tokenizer, args.text_encoder, soft_tokens)
    rows = {}
    for split, examples in dataset.examples.items():
        rows[split], counts = encode(tokenizer, examples, dataset.labels, args.max_len)
        if any(counts.values()):
            said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
            print(f"           {split}: {said}")

    # What others say of them, and all of it together.
    notes = open_notes(args, dataset, rows, tokenizer, encoder)
    median = median_relevance(args, dataset, rows, notes, cache) if notes and notes.relevance else None
    posts = {
        split: Posts(examples, rows[split], tokenizer.pad_token_id, cache, notes, generated)
        for split, examples in dataset.examples.items()
    }
    if args.shuffle_photos:
        for part in posts.values():
            ids = [example.image_id for example in part.examples]
            part.swap = shuffled_photos(ids, cache, args.seed, notes)
        if not any(posts["train"].swap.values()):
            said = "of no post of train there is a photo, or a note on one, to shuffle"
            raise ValueError(f"--shuffle-photos: {said}; leave it out")
        print("photos     SHUFFLED: each post is shown another's, in every split")

    facts = {
        "run_format": RUN_FORMAT,
        "task": dataset.task,
        "labels": list(dataset.labels),
        "data": prints,
        "region_dim": cache.region_dim if cache else None,
        "features_made": cache.attrs | {"sha256": cache.sha256} if cache else None,
        "generated_made": generated.attrs | {"sha256": generated.sha256} if generated else None,
        "notes_sha256": notes.sha256 if notes else None,
        "relevance_median": median,
    }
    return dataset, encoder, tokenizer, posts, facts


def open_features(args, dataset):
    """The feature cache, None for text only; how many posts have a photo is said on the console."""
    if args.fusion == "none":
        return None
    if not dataset.image_ids():
        raise ValueError(f"no post of {dataset.name} names a photo; --fusion none trains on the text alone")
    cache = FeatureCache(args.features)
    cache.require(dataset.image_ids(), dataset.name)
    made, backbone = cache.attrs, SYSTEMS[args.model].backbone
    if made["backbone"] != backbone:
        raise ValueError(
            f"{args.features}: made with --backbone {made['backbone']}, {args.model} needs {backbone}; name"
            " another"
        )
    places = "region_grid" in FUSIONS.get(args.fusion, Fusion).reads
    if places and cache.num_regions.any() and not cache.grid.any():
        raise ValueError(
            f"--fusion {args.fusion}: {args.model}'s regions are no places in a photo; choose another --fusion"
        )
    made_from = made.get("made_from", "an unknown folder")
    print(f"features   {args.features}: {cache.views} views, made from {made_from}")
    if backbone not in WORDED:
        try:
            paths = find_photos(cache.ids, image_folders(args.dataset, args.data_dir, args.images))
        except FileNotFoundError:
            if args.images:
                raise
            paths = {}
        if not cache.photo_bytes.any():
            print("           made by an earlier version, which kept no photo's size: not compared with the"
                  " photos here")  # fmt: skip
        if absent := cache.compare_photos(paths):
            print(f"           {absent} of its photos are not here (--images names their folder): nothing"
                  f" tells whether they are {dataset.name}'s")  # fmt: skip
        cache.point_out_alike()
    if made["parameters"]:
        of = f"{backbone} (weights {made['weights']})"
        print(f"frozen     {made['parameters']:,} parameters of {of}, in that file")
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
    longest, soft = longest_input(encoder, tokenizer), FUSIONS.get(args.fusion, Fusion).soft_tokens
    if args.max_len + extra + soft > longest:
        asked = [f"--max-len {args.max_len}"] + [f"--extra-len {args.extra_len}"] * bool(extra)
        asked += [f"the {soft} soft tokens of --fusion {args.fusion}"] * bool(soft)
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
        raise ValueError(
            "--align supervised: leave it out; its classes are relevances below train's median and others,"
            f" and none of {args.notes} is below it, {np.median(of_train):g}"
        )
    return float(np.median(of_train)) if supervised else None


def open_generated(args, dataset, cache):
    """The feature cache of second pictures, None without, and on the console how many posts have one.

    ValueError if it is another data set's, or made otherwise than that of the photos: one map reads both.
    """
    if not args.generated:
        if "generated" in FUSIONS.get(args.fusion, Fusion).reads:
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
    """The `Notes` of the data set, attached to its encoded `rows`, None without; the console says what of.

    ValueError if they do not fit the data set, or the encoder: its longest input, or that it reads left to
    right.
    """
    if args.notes is None:
        return None
    if args.extra != "none" and getattr(encoder, "left_to_right", False):
        raise ValueError(f"--extra {args.extra}: {args.text_encoder} reads left to right, so no word would"
                         " know of what stands after the post; take another --text-encoder")  # fmt: skip
    notes = Notes(args.notes, tokenizer, args.extra, args.extra_len, reads_relevance(vars(args)))
    if notes.segments:
        check_length(args, encoder, tokenizer, notes.segments.longest)
    for i, line in enumerate(notes.coverage(dataset.examples)):
        print(f"{'           ' if i else 'notes      '}{line}")
    for split, examples in dataset.examples.items():
        notes.attach(rows[split], examples, split)
        if args.shuffle_notes and notes.shuffle(rows[split], args.seed) < 2 and split == "train":
            raise ValueError("--shuffle-notes: fewer than 2 posts of train have an about_post in"
                             f" {args.notes}; leave it out")  # fmt: skip
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


# ------------------------------------------------------------------------------------------ of a finished run


def dataset_now(config, data_dir=None):
    """(name, --data-dir) of a run's data set.

    `data_dir`: where it is now. Of the user's own, that is its parent folder, or itself under another name.
    """
    name = config["dataset"]
    if data_dir and name not in DATASETS:
        inside = Path(data_dir) / Path(name).name
        name = str(inside if inside.is_dir() else Path(data_dir))
    return name, data_dir or config["data_dir"]


def run_notes(config, tokenizer, rows, examples, split, path=None):
    """The `Notes` of a run, attached to encoded `rows` of `examples` as in training; None if it read none.

    `path`: where they are now. ValueError if they have changed.
    """
    if config["notes"] is None:
        if path:
            raise ValueError(f"--notes {path}: the run read none; leave it out")
        return None
    more = config["extra"], config["extra_len"], reads_relevance(config)
    notes = Notes(path or config["notes"], tokenizer, *more)
    if notes.sha256 != (wanted := config["notes_sha256"]):
        raise ValueError(
            f"{notes.path}: not the notes the run was trained with ({wanted[:16]}); restore them"
        )
    notes.attach(rows, examples, split)
    if config["shuffle_notes"]:
        notes.shuffle(rows, config["seed"])
    return notes


def run_cache(run_dir, config, name, path, image_ids, dataset):
    """The `FeatureCache` that a run was trained on, of its option `name`, "features" or "generated".

    `path`: where it is now, if not where it was. ValueError if it has changed.
    """
    cache = FeatureCache(path or config[name])
    cache.require(image_ids, dataset)
    if cache.sha256 != config[f"{name}_made"]["sha256"]:
        raise ValueError(f"{cache.path}: not the features {run_dir} was trained on; restore them")
    return cache


def open_run(run_dir, split, device, data_dir=None, features=None, notes=None, generated=None):
    """A run and what it was scored on: (model, config, dataset, `Posts` of `split`, each with its own photo).

    `data_dir`, `features`, `notes`, `generated`: where they are now, if no longer where the run was trained.
    ValueError if they have changed.
    """
    model, tokenizer, config = load_run(run_dir, device)
    dataset = load_dataset(*dataset_now(config, data_dir))
    if config["train_share"] < 1:
        cut_train(dataset, config["train_share"], config["seed"])
    made = config["data"][split]
    if dataset.fingerprints().get(split, {}).get("sha256") != made["sha256"]:
        raise ValueError(
            f"{made['file']}: not the file of {run_dir} any more ({made['sha256'][:16]}); restore it"
        )
    examples = dataset.examples[split]
    rows, _ = encode(tokenizer, examples, config["labels"], config["max_len"])
    posts = Posts(examples, rows, tokenizer.pad_token_id)
    photos = [example.image_id for example in examples]
    if config["fusion"] != "none":
        posts.cache = run_cache(run_dir, config, "features", features, photos, dataset.name)
    if generated and not config["generated"]:
        raise ValueError(f"--generated {generated}: the run read no second picture; leave it out")
    if config["generated"]:
        posts.generated = run_cache(run_dir, config, "generated", generated, photos, dataset.name)
    posts.notes = run_notes(config, tokenizer, rows, examples, split, notes)
    return model, config, dataset, posts
