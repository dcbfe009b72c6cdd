"""All inputs of a run opened and checked: its posts with photos, notes and second pictures, its text encoder.

    dataset, encoder, tokenizer, posts, facts = open_inputs(args, device)  # of a new run, on the console
    model, config, dataset, posts = open_run(run_dir, "test", device)  # what a finished run was scored on
"""

from pathlib import Path

import numpy as np
import torch

from features import ELSEWHERE, FeatureCache
from parts.datasets import DATASETS, load_dataset
from parts.feature_photos import compare_photos, point_out_alike, require_photos
from parts.notes import Notes, reads_relevance
from parts.photos import WORDED, find_photos, image_folders
from parts.posts import cut_train, make_posts, shuffled_photos
from parts.processes import uncollected
from parts.run_files import load_run
from parts.runs import RUN_FORMAT
from parts.systems import SYSTEMS, backbones_of, fusion_of
from parts.text_encoder import check_soft_tokens, load_text_encoder, longest_input
from parts.words import rule_of

# ---------------------------------------------------------------------------------------------- for a new run


@uncollected()
def open_inputs(args, device):
    """All that a run of train.py with arguments `args` reads; what of it is there is said on the console.

    (dataset, encoder, tokenizer, {split: `Posts`}, facts for the run's configuration). Begins at torch's
    present random state: the encoder may have parts that start at random. FileNotFoundError or ValueError if
    something is not there, broken, or does not fit the rest.
    """
    # The posts.
    dataset = load_dataset(args.dataset, args.data_dir, args.word_rule)
    word_rule, remarks = dataset.word_rule, dataset.notes
    if word_rule is None:  # posts came as words
        word_rule, remark = rule_of([post.words for post in dataset.examples["train"]], args.word_rule)
        remarks = (*remarks, remark)
    if args.train_share < 1:
        cut_train(dataset, args.train_share, args.seed)
    prints = dataset.fingerprints()
    for split, examples in dataset.examples.items():
        of_file = prints[split]
        print(f"{split:<10} {len(examples)} posts, {of_file['variant']} ({of_file['sha256'][:16]})")
    for note in remarks:
        print(f"           {note}")

    # Their photos.
    cache = open_features(args, dataset)
    generated = open_generated(args, dataset, cache)
    for features in filter(None, (cache, generated)):
        if device.startswith("cuda") and features.regions.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            features.keep_on(device)
            print(f"           {features.path} kept on {device}, {features.regions.nbytes:,} bytes")

    # The text encoder, and what others say of the posts.
    encoder, tokenizer = load_text_encoder(args.text_encoder, SYSTEMS[args.model].checkpoint, dataset.task,
                                           args.dropout)  # fmt: skip
    check_length(args, encoder, tokenizer)
    if soft_tokens := fusion_of(args.fusion).soft_tokens:
        check_soft_tokens(encoder, tokenizer, args.text_encoder, soft_tokens)
    notes = open_notes(args, dataset, tokenizer, encoder)

    # All of it together.
    posts, config = {}, vars(args) | {"labels": dataset.labels}
    for split, examples in dataset.examples.items():
        posts[split], cuts = make_posts(config, tokenizer, examples, split, cache, notes, generated)
        if any(cuts.values()):
            counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in cuts.items())
            print(f"           {split}: {counts}")
    check_segments(args, posts)
    median = median_relevance(args, posts) if notes and notes.relevance else None
    if args.shuffle_photos:
        posts = {split: shuffle_photos(part, args.seed) for split, part in posts.items()}
        if not any(posts["train"].swap.values()):
            raise ValueError("--shuffle-photos: of no post of train there is a photo, or a note on one, to"
                             " shuffle; leave it out")  # fmt: skip
        print("photos     SHUFFLED: each post is shown another's, in every split")

    facts = {
        "run_format": RUN_FORMAT,
        "task": dataset.task,
        "labels": list(dataset.labels),
        "word_rule": word_rule,
        "data": prints,
        "region_dim": cache.region_dim if cache else None,
        "features_made": cache.attrs | {"sha256": cache.sha256} if cache else None,
        "generated_made": generated.attrs | {"sha256": generated.sha256} if generated else None,
        "notes_sha256": notes.sha256 if notes else None,
        "relevance_median": median,
    }
    return dataset, encoder, tokenizer, posts, facts


def shuffle_photos(posts, seed):
    """`Posts`, each shown another's photo."""
    ids = [example.image_id for example in posts.examples]
    return posts.showing(shuffled_photos(ids, posts.cache, seed, posts.notes))


def open_features(args, dataset):
    """The feature cache, None for text only; how many posts have a photo is said on the console."""
    if args.fusion == "none":
        return None
    if not dataset.image_ids():
        raise ValueError(f"no post of {dataset.name} names a photo; --fusion none trains on the text alone")
    cache = FeatureCache(args.features)
    require_photos(cache, dataset.image_ids(), dataset.name)
    attrs, backbone = cache.attrs, cache.attrs["backbone"]
    if backbone not in (needed := backbones_of(SYSTEMS[args.model])):
        raise ValueError(f"{args.features}: made with --backbone {backbone}, {args.model} needs"
                         f" {' or '.join(needed)}; name another")  # fmt: skip
    places = "region_grid" in fusion_of(args.fusion).reads
    if places and cache.num_regions.any() and not cache.grid.any():
        raise ValueError(f"--fusion {args.fusion}: the regions of {args.features} are no places in a photo;"
                         " choose another")  # fmt: skip
    several = sum(isinstance(e.image_id, tuple) for posts in dataset.examples.values() for e in posts)
    if several and args.model == "vilt":
        raise ValueError(f"--model vilt reads one photo a post, {several} posts have several; take another")
    maker = f"made from {attrs.get('made_from', 'an unknown folder')}"
    if backbone == ELSEWHERE:
        maker = f"made elsewhere ({attrs['weights']}), {cache.region_dim} wide; of which photos nothing tells"
    print(f"features   {args.features}: {cache.views} views, {maker}")
    if cache.boxes:
        count = (cache.num_regions[cache.num_regions > 0] - 1).sum()
        print(f"           a region for each whole photo, and one for each of {count} boxes")
    if backbone not in (*WORDED, ELSEWHERE):
        try:
            paths = find_photos(cache.ids, image_folders(args.dataset, args.data_dir, args.images))
        except FileNotFoundError:
            if args.images:
                raise
            paths = {}
        if absent := compare_photos(cache, paths):
            print(f"           {absent} of its photos are not here (--images names their folder): nothing"
                  f" tells whether they are {dataset.name}'s")  # fmt: skip
    if backbone not in WORDED:
        point_out_alike(cache)
    if attrs.get("parameters"):
        of = f"{attrs.get('encoder', backbone)} (weights {attrs['weights']})"
        print(f"frozen     {attrs['parameters']:,} parameters of {of}, in that file")
    kind = {"caption": "a caption", "phrases": "phrases"}.get(backbone, "a photo")
    for split, examples in dataset.examples.items():
        with_photo = sum(cache.has_photo(example.image_id) for example in examples)
        print(f"           {split}: {with_photo} of {len(examples)} posts have {kind}")
        if not with_photo:
            print(f"WARNING    no post of {split} has {kind}: its scores are those of text only")
    if args.augment and cache.views == 1 and backbone not in (*WORDED, ELSEWHERE):
        print("           one view only: no augmentation (extract_features.py --views 4 makes more)")
    return cache


def check_length(args, encoder, tokenizer, extra=0):
    """ValueError if the encoder has too few positions for a post, `extra` of notes and soft tokens."""
    longest, soft_tokens = longest_input(encoder, tokenizer), fusion_of(args.fusion).soft_tokens
    parts = [f"--max-len {args.max_len}"]
    if extra:
        parts.append(f"--extra-len {args.extra_len}")
    if soft_tokens:
        parts.append(f"the {soft_tokens} soft tokens of --fusion {args.fusion}")
    if args.max_len + extra + soft_tokens > longest:
        raise ValueError(f"{' and '.join(parts)}: {args.text_encoder} takes {longest} in all")


def median_relevance(args, posts):
    """The median of the relevances of train's posts with a photo, for --align supervised; None without it.

    `posts`: {split: `Posts`}. How many are given is said on the console. ValueError if none of train is, or
    if the median parts nothing.
    """
    rest = {"given": "that of the others is predicted", "predicted": "that of all is predicted"}
    for split, part in posts.items():
        notes = [part.notes.known(i, photo) for i, photo in enumerate(part.notes.photos)
                 if part.cache.has_photo(photo)]  # fmt: skip
        relevances = [note["relevance"] for note in notes if "relevance" in note]
        print(f"           {split}: relevance given of {len(relevances)} of {len(notes)} posts with a photo,"
              f" {rest.get(args.relevance, 'the others take no part in supervised alignment')}")  # fmt: skip
        if split == "train":
            of_train = np.float32(relevances)  # as batches have them
    supervised = "supervised" in args.align
    if not len(of_train) and (supervised or args.relevance == "given" or args.extra == "none"):
        raise ValueError(f"{args.notes}: no relevance of any post of train that has a photo; add it to the"
                         " notes, or leave out what reads it")  # fmt: skip
    if supervised and (of_train >= np.median(of_train)).all():
        raise ValueError("--align supervised: leave it out; its classes are relevances below train's median"
                         f" and others, and none of {args.notes} is below it,"
                         f" {np.median(of_train):g}")  # fmt: skip
    return float(np.median(of_train)) if supervised else None


def open_generated(args, dataset, cache):
    """The feature cache of second pictures, None without, and on the console how many posts have one.

    ValueError if it is another data set's, or made otherwise than that of the photos: one map reads both.
    """
    if not args.generated:
        if "generated" in fusion_of(args.fusion).reads:
            print(f"generated  no second pictures (--generated): {args.fusion} reads the photo alone")
        return None
    if not Path(args.generated).exists():
        raise FileNotFoundError(f"--generated {args.generated}: no such feature file; extract_features.py"
                                " makes one of the pictures in --images, in another --cache-dir")  # fmt: skip
    generated = FeatureCache(args.generated)
    require_photos(generated, dataset.image_ids(), dataset.name)
    attrs = [side.attrs | {"region width": side.region_dim} for side in (generated, cache)]
    for key in ("backbone", "region width", "weights_sha256", "img_size"):
        ours, theirs = (side.get(key, "unknown") for side in attrs)
        if ours != theirs:
            raise ValueError(f"{args.generated}: made with {key.replace('_', ' ')} {ours}, {cache.path} with"
                             f" {theirs}; one map reads both pictures, so extract both alike")  # fmt: skip
    made_from = generated.attrs.get("made_from", "an unknown folder")
    print(f"generated  {args.generated}: {generated.views} views, made from {made_from}")
    for split, examples in dataset.examples.items():
        count = sum(generated.has_photo(example.image_id) for example in examples)
        print(f"           {split}: {count} of {len(examples)} posts have one, {len(examples) - count} none")
    if generated.sha256 == cache.sha256:
        print("WARNING    these are the photos themselves: what hides or changes photos leaves them here")
    return generated


def open_notes(args, dataset, tokenizer, encoder):
    """The `Notes` of --notes, None without; what they tell of each split is said on the console.

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
    first, *lines = notes.coverage(dataset.examples)
    print(f"notes      {first}", *lines, sep="\n           ")
    return notes


def check_segments(args, posts):
    """Say how many of {split: `Posts`} have a second segment; ValueError if there are none to shuffle."""
    for split, part in posts.items():
        if args.shuffle_notes and split == "train" and len(part.notes.with_text()) < 2:
            raise ValueError("--shuffle-notes: fewer than 2 posts of train have an about_post in"
                             f" {args.notes}; leave it out")  # fmt: skip
        if args.extra == "none":
            continue
        rows = [part.shown(i)[1] for i in range(len(part))]
        with_note, cut = (sum(bool(row.get(key)) for row in rows) for key in ("text_length", "note_cut"))
        cuts = f", {cut} of them cut to --extra-len {args.extra_len}" if cut else ""
        print(f"           {split}: {with_note} of {len(part)} posts have a second segment{cuts}")
        if not with_note:
            print(f"WARNING    no post of {split} has a second segment: its scores are those without notes")
    if args.shuffle_notes:
        print("notes      SHUFFLED: each post is given what was said of another, in every split")


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


def run_notes(config, tokenizer, path=None):
    """The `Notes` of a run as it read them, None if it read none; `path`: where they are now.

    ValueError if they have changed.
    """
    if config["notes"] is None:
        if path:
            raise ValueError(f"--notes {path}: the run read none; leave it out")
        return None
    path = path or config["notes"]
    notes = Notes(path, tokenizer, config["extra"], config["extra_len"], reads_relevance(config))
    if notes.sha256 != (digits := config["notes_sha256"]):
        raise ValueError(f"{notes.path}: not the notes the run was trained with ({digits[:16]}); restore"
                         " them")  # fmt: skip
    return notes


def run_cache(run_dir, config, name, path, image_ids, dataset):
    """The `FeatureCache` that a run was trained on, of its option `name`, "features" or "generated".

    `path`: where it is now, if not where it was. ValueError if it has changed.
    """
    cache = FeatureCache(path or config[name])
    require_photos(cache, image_ids, dataset)
    if cache.sha256 != config[f"{name}_made"]["sha256"]:
        raise ValueError(f"{cache.path}: not the features {run_dir} was trained on; restore them")
    return cache


@uncollected()
def open_run(run_dir, split, device, data_dir=None, features=None, notes=None, generated=None):
    """A run and what it was scored on: (model, config, dataset, `Posts` of `split`, each with its own photo).

    `data_dir`, `features`, `notes`, `generated`: where they are now, if no longer where the run was trained.
    ValueError if they have changed.
    """
    model, tokenizer, config = load_run(run_dir, device)
    dataset = load_dataset(*dataset_now(config, data_dir), config["word_rule"] or "auto")
    if config["train_share"] < 1:
        cut_train(dataset, config["train_share"], config["seed"])
    stored = config["data"][split]
    if split not in dataset.files or dataset.fingerprints()[split]["sha256"] != stored["sha256"]:
        raise ValueError(f"{stored['file']}: not the file of {run_dir} any more ({stored['sha256'][:16]});"
                         " restore it")  # fmt: skip
    if generated and not config["generated"]:
        raise ValueError(f"--generated {generated}: the run read no second picture; leave it out")
    examples, caches = dataset.examples[split], {"features": None, "generated": None}
    photos = [example.image_id for example in examples]
    for name, path in (("features", features), ("generated", generated)):
        if config[f"{name}_made"]:
            caches[name] = run_cache(run_dir, config, name, path, photos, dataset.name)
    notes = run_notes(config, tokenizer, notes)
    posts, _ = make_posts(config, tokenizer, examples, split, caches["features"], notes, caches["generated"])
    return model, config, dataset, posts
