"""What a page shows of a finished run: where words looked, photos, notes, the image check in a sentence."""

import base64
import hashlib
import io
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from data import NONE, NerExample, RelationExample
from encoding import length_batches, to_device
from features import ELSEWHERE
from parts.captions import phrases_of
from parts.checks import verdict
from parts.console import progress_bar
from parts.datasets import load_dataset
from parts.framing import seen_part
from parts.notes import EXTRAS, note_text, reads_relevance, said_of_photos
from parts.opening import dataset_now, run_cache, run_notes
from parts.photos import find_photos, thumbnail
from parts.posts import make_posts
from parts.processes import autocast, precision_on
from parts.scores import main_score
from parts.systems import fusion_of

QUALITY = 70  # of the thumbnails, as JPEG: some 10 kB a photo
PLACES = 256  # of an attention map, 16 x 16: finer grids are averaged down, or BLIP's would fill the page
MISSING = "no such file"


def load_photos(image_ids, folders, provenance):
    """{image id: (JPEG as bytes, its `seen_part`), or the reason why there is none}.

    `provenance`: what the feature file says of how it was made.
    """
    photos, reasons = {}, {}
    paths = find_photos(image_ids, folders, reasons)
    for image_id, path in progress_bar(len(paths), "photo", True, iterable=paths.items()):
        if path is None:
            photos[image_id] = reasons.get(image_id, MISSING)
            continue
        try:
            photo, buffer = thumbnail(path), io.BytesIO()
            photo.save(buffer, "JPEG", quality=QUALITY, optimize=True)
        except Exception as error:  # decoders raise of any kind at a file of any kind; the reason is shown
            photos[image_id] = f"cannot be read ({type(error).__name__})"
            continue
        photos[image_id] = buffer.getvalue(), seen_part(*photo.size, provenance)
    return photos


def place_maps(weights, grid):
    """weights [n, R] over the regions -> maps uint8 [n, h, w], shares of places [n] and of the whole [n].

    `grid`: rows and columns that the last rows * columns regions stand for; the regions before them are of
    the photo as a whole. A map has at most `PLACES` places, each in 255ths of the map's own maximum.
    """
    rows, columns = grid
    whole, places = weights.split([weights.shape[1] - rows * columns, rows * columns], 1)
    # Phrases, one row of them, are no places to be averaged.
    step = 1 if rows == 1 else math.ceil(math.sqrt(rows * columns / PLACES))
    maps = places.unflatten(1, (rows, columns))
    maps = F.adaptive_avg_pool2d(maps, (math.ceil(rows / step), math.ceil(columns / step)))
    maps = 255 * maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return maps.round().byte(), places.sum(1), whole.sum(1)


def open_regions(run, config, records, features):
    """The feature cache of a run whose words weigh places or boxes in its photos, or phrases; else None.

    Captions have no places. ValueError if the features are not those the run was trained on.
    """
    weighs = config["fusion"] is None or fusion_of(config["fusion"]).weighs  # None: blip, vilt
    if not weighs or config["shuffle_photos"]:
        return None
    photos = [record["image_id"] for record in records]
    cache = run_cache(run, config, "features", features, photos, Path(config["dataset"]).name)
    listed = cache.attrs["backbone"] == "phrases"
    if cache.attrs["backbone"] == ELSEWHERE:
        listed = cache.shape[2] <= PLACES  # more would fill the page
    return cache if cache.grid.any() or cache.boxes or listed else None


def shown_boxes(cache):
    """{image id: what its regions are called, as "phrases", and their "boxes"} of a feature file of boxes.

    The first region is the whole photo. A box is [left, top, width, height] in shares of the photo.
    """
    shown = {}
    for image_id, row in cache.rows.items():
        corners, labels = (column[row, : cache.num_regions[row]].tolist() for column in cache.boxes)
        labels = [label.decode(errors="replace") for label in labels]
        names = [f"{i} {label}".strip() if i else label for i, label in enumerate(labels)]
        boxes = [[round(share, 4) for share in (x0, y0, x1 - x0, y1 - y0)] for x0, y0, x1, y1 in corners]
        shown[image_id] = {"phrases": names, "boxes": boxes}
    return shown


def shown_regions(cache):
    """What `shown_boxes` gives, of regions that lie nobody knows where: numbers for names, and no boxes."""
    return {
        image_id: {"phrases": [f"region {i + 1}" for i in range(cache.num_regions[row])], "boxes": []}
        for image_id, row in cache.rows.items()
    }  # fmt: skip


def shown_phrases(config, cache, data_dir, path):
    """{image id: its "phrases", one for each of its regions} of the photos that a run on phrases was shown.

    `path`: where the file that they were made of is now. A photo is left out if its phrases are not as many
    as its regions: one without a sub-token has none. FileNotFoundError or ValueError if the file or the data
    set is not there, or has changed.
    """
    provenance = config["features_made"]
    path = Path(path or provenance["made_from"])
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, of which the run's phrases are; name it with --captions")
    if hashlib.sha256(path.read_bytes()).hexdigest() != (digits := provenance["captions_sha256"]):
        raise ValueError(f"{path}: not what the run's phrases were made of ({digits[:16]}); restore it")
    texts_of = said_of_photos(path, load_dataset(*dataset_now(config, data_dir), "characters"))
    phrases = {}
    for image_id, row in cache.rows.items():
        texts = phrases_of(texts_of.get(image_id) or ())[: cache.shape[2]]
        if cache.has_photo(image_id) and len(texts) == cache.num_regions[row]:
            phrases[image_id] = {"phrases": texts}
    return phrases


def posts_of(config, tokenizer, records, split, cache, path):
    """(`Posts` that a run answered with `records`, what of notes was shown with each as {key: text}).

    `path`: where the notes are now. Of a run on shuffled photos posts and texts are without what was written
    with a photo in view: that was another's. FileNotFoundError or ValueError if the notes are not there, or
    changed.
    """
    label = config["labels"][0]  # `encode` wants labels, what a word attends to does not depend on them
    ner = config["task"] == "ner"
    examples = [
        NerExample(r["id"], r["image_id"], tuple(r["words"]), (label,) * len(r["words"])) if ner else
        RelationExample(r["id"], r["image_id"], tuple(r["words"]), tuple(r["head"]), tuple(r["tail"]), label)
        for r in records
    ]  # fmt: skip
    notes = run_notes(config, tokenizer, path)
    posts, _ = make_posts(config, tokenizer, examples, split, cache, notes)
    if config["shuffle_photos"]:
        posts = posts.showing(dict.fromkeys(example.image_id for example in examples))
    if notes is None:
        return posts, [{}] * len(posts)
    known = [posts.notes.known(i, posts.shown(i)[0]) for i in range(len(posts))]
    keys = EXTRAS[config["extra"]]
    return posts, [{key: text for key in keys if (text := note_text(note, key))} for note in known]


def attention(model, config, posts, device):
    """{number of the post: what each of its words (of a relation: its head and tail) weighed in the photo}.

    Phrases are a map of one row. Of a word it is the first sub-token's, of head and tail their start
    markers': what the model's head reads. Posts without a photo, or with several, are left out.
    """
    maps_of, ner, cache = {}, config["task"] == "ner", posts.cache
    batches = length_batches(posts.lengths(), config["eval_batch_size"])
    for indices in progress_bar(len(batches), "batch", True, iterable=batches, desc="attention"):
        batch = to_device(posts.batch(indices), device)
        with torch.inference_mode(), autocast(device, precision_on(device, config)):
            weights = model(batch, return_weights=True).weights
        for i, weight in zip(indices, weights.float().cpu(), strict=True):  # [T, R]
            photo, row = posts.shown(i)
            if not cache.has_photo(photo) or len(cache.photos_of(photo)) > 1:
                continue
            at = cache.rows[photo]
            starts = torch.tensor(row["word_starts"] if ner else [row["head_index"], row["tail_index"]])
            weight = weight[starts.clamp(min=0), : cache.num_regions[at]]
            weight = weight * (starts >= 0)[:, None]  # of a word that was not read, 0
            grid = cache.grid[at].tolist() if cache.grid[at].any() else [1, weight.shape[1]]
            maps, places, whole = place_maps(weight, grid)
            maps_of[i] = {
                "rows": maps.shape[1], "columns": maps.shape[2],
                "bytes": base64.b64encode(maps.numpy()).decode(),
                "places": [round(share, 3) for share in places.tolist()],
                "whole": [round(share, 3) for share in whole.tolist()],
            }  # fmt: skip
    return maps_of


def image_check_line(config, check):
    """What `evaluate.py --image-check` found, as a sentence."""
    true, none, *shuffled = [main_score(metrics)
                             for metrics in (check["true"], check["none"], *check["shuffled"])]  # fmt: skip
    spread = f" ± {statistics.stdev(shuffled):.3f}" if len(shuffled) > 1 else ""
    name = "entity F1" if check["true"]["task"] == "ner" else f"micro-F1 without {NONE}"
    return (f"{name} {true:.3f} with each post's own photo, {statistics.mean(shuffled):.3f}{spread} with"
            f" another's (n = {len(shuffled)}), {none:.3f} with none; {verdict(config, check)}")  # fmt: skip


def notes_line(config, records):
    """What a run read of notes, and for how many of its posts they had something, as a sentence."""
    if config["notes"] is None:
        return "not used"
    count, unit = len(records), "posts" if config["task"] == "ner" else "rows"
    parts = []
    if config["extra"] != "none":
        with_note = sum(record.get("extra") is True for record in records)
        share = f"{with_note} of {count} {unit} with a note, {count - with_note} without"
        parts.append(f"--extra {config['extra']}: {share}")
    if reads_relevance(config):
        with_relevance = sum(record.get("relevance") is not None for record in records)
        parts.append(f"relevance of the photo: of {with_relevance} of {count} {unit} given")
    if config["shuffle_notes"]:
        parts.append("SHUFFLED: each post was given what was said of another")
    return f"{Path(config['notes']).name} ({config['notes_sha256'][:16]}), {'; '.join(parts)}"
