"""A split of a data set as a model sees it, with photos, notes and second pictures; and the answers for it.

    posts, cuts = make_posts(config, tokenizer, examples, "train", cache, notes)
    batch = posts.batch([0, 1, 2])
    records = predict_posts(model, posts, labels, batch_size, device, precision)
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from encoding import collate, encode, length_batches, to_device
from features import Regions
from parts.console import progress_bar
from parts.notes import PostNotes
from parts.processes import autocast
from parts.scores import seen_spans


@dataclass(frozen=True)
class Posts:
    """The posts of one split with all that is shown with them.

    `rows`: those of `encode`, of `examples`. `cache` and `generated`: the `Regions` of the photos and
    those of second pictures; `notes`: the `PostNotes`; each None where there is none. `swap`: {image id: the
    one to show in its place, None for no photo}; None: each post is shown its own photo.
    """

    examples: list
    rows: list
    pad_id: int
    cache: Regions | None = None
    notes: PostNotes | None = None
    generated: Regions | None = None
    swap: dict | None = None

    def __len__(self):
        return len(self.rows)

    def showing(self, swap):
        """The same posts with other photos."""
        return replace(self, swap=swap)

    def part(self, indices):
        """Some of the posts, by their numbers."""
        rows, examples = ([side[i] for i in indices] for side in (self.rows, self.examples))
        notes = self.notes.part(indices) if self.notes else None
        return replace(self, rows=rows, examples=examples, notes=notes)

    def shown(self, i, hidden=False):
        """(id of the photo that post `i` is shown, or None; its row, with the notes that go with it)."""
        photo = self.examples[i].image_id
        if self.swap is not None:
            photo = self.swap[photo]
        if hidden:
            photo = None
        return photo, self.notes.shown(self.rows[i], i, photo) if self.notes else self.rows[i]

    def lengths(self):
        """Sub-tokens of each post, notes included: posts of like length share a batch."""
        return [len(self.shown(i)[1]["input_ids"]) for i in range(len(self))]

    def batch(self, indices, hidden=None, views=None, second_views=None, pictures=True):
        """What a model reads of some posts, by their numbers: `collate`, with what the feature caches read.

        `hidden` [B]: whose photo is not shown. `views`, `second_views` [B]: which view of a photo and of a
        second picture is read, None for the first. `pictures` False: neither of them is shown.
        """
        hidden = [False] * len(indices) if hidden is None else hidden
        shown = [self.shown(i, hide or not pictures) for i, hide in zip(indices, hidden, strict=True)]
        photos, rows = zip(*shown, strict=True)
        batch = collate(rows, self.pad_id)
        if self.cache:
            batch |= read_photos(self.cache, photos, views)
        if self.generated:  # made from the text, it stays with its post whatever photo is shown
            ids = [self.examples[i].image_id if pictures else None for i in indices]
            batch |= read_generated(self.generated, ids, second_views)
        return batch


def read_photos(cache, photos, views=None):
    """`Regions.read` of posts with up to P photos, a tuple of ids: regions [B, P * R, D], photo after photo.

    Their places are one grid where the photos' grids are as wide and all their regions are places; else none
    is a place: region_grid 0. photo_row is the first's that is there.
    """
    several = [cache.photos_of(photo) for photo in photos]
    count, most = len(several), max(map(len, several))
    if most <= 1:
        return cache.read([next(iter(ids), None) for ids in several], views)
    padded = [photo for ids in several for photo in [*ids, *[None] * (most - len(ids))]]
    batch = cache.read(padded, None if views is None else np.repeat(views, most))
    grids = batch["region_grid"].view(count, most, 2)  # 0 where there is no photo
    regions = batch["region_mask"].sum(1).view(count, most)
    columns = grids[..., 1].amax(1, keepdim=True)
    whole = ((grids[..., 1] == columns) | (regions == 0)) & (grids.prod(2) == regions)
    rows = batch["photo_row"].view(count, most)
    return {
        "regions": batch["regions"].view(count, -1, cache.region_dim),
        "region_mask": batch["region_mask"].view(count, -1),
        "region_grid": torch.stack((grids[..., 0].sum(1), columns[:, 0]), 1) * whole.all(1, keepdim=True),
        "photo_row": rows.gather(1, (rows >= 0).long().argmax(1, keepdim=True))[:, 0],
    }


def read_generated(cache, photos, views=None):
    """`read_photos` of second pictures: generated [B, R, D], generated_mask [B, R], generated_row [B]."""
    batch = read_photos(cache, photos, views)
    names = {"regions": "generated", "region_mask": "generated_mask", "photo_row": "generated_row"}
    return {name: batch[key] for key, name in names.items()}


def make_posts(config, tokenizer, examples, split="", cache=None, notes=None, generated=None):
    """(`Posts` of examples as a run of `config` reads them, {what was cut off: how often}).

    `notes`: the `Notes` that it reads; `split`: whose they are looked up.
    """
    rows, cuts = encode(tokenizer, examples, config["labels"], config["max_len"])
    if notes is not None:
        notes = notes.of(examples, split)
        if config["shuffle_notes"]:
            notes = notes.shuffled(config["seed"])
    return Posts(examples, rows, tokenizer.pad_token_id, cache, notes, generated), cuts


def predict_posts(model, posts, labels, batch_size, device, precision, known=(), name=""):
    """Predictions for `Posts`, one record a post, in their order.

    `known`: the `mentions` of train. `name`: what a progress bar over the posts is called; none without. A
    word the model has no state for (cut off, or no sub-token) is answered `O` with probability null.
    """

    def answer(batch):
        best, probability = model.answer(batch)
        return zip(best.tolist(), probability.tolist(), strict=True)

    answers = in_batches(model, answer, posts, batch_size, device, precision, name)
    return [record_of(posts, i, *answer, labels, known) for i, answer in enumerate(answers)]


def label_probabilities(model, posts, batch_size, device, precision, name=""):
    """The probability of every label for `Posts`: a post's words [W, labels], or a relation [labels], each.

    As `predict_posts` otherwise; W is no less than the words that the model has a state for.
    """
    return in_batches(model, lambda batch: model.probabilities(batch).cpu(), posts, batch_size, device,
                      precision, name)  # fmt: skip


def in_batches(model, ask, posts, batch_size, device, precision, name):
    """What `ask` says of each of `Posts`, in their order; it is given batches and answers post by post."""
    model.eval()
    answers = [None] * len(posts)
    bar = progress_bar(len(posts), "post", True, desc=name, disable=not name)
    with bar, torch.inference_mode(), autocast(device, precision):
        for indices in length_batches(posts.lengths(), batch_size):
            for i, answer in zip(indices, ask(to_device(posts.batch(indices), device)), strict=True):
                answers[i] = answer
            bar.update(len(indices))
    return answers


def record_of(posts, i, answer, chance, labels, known):
    """What is kept of the prediction for post `i`.

    `answer`: label indices of its words, or one index; `chance`: their probabilities.
    """
    example, (photo, row) = posts.examples[i], posts.shown(i)
    record = {"id": example.id, "image_id": example.image_id, "words": list(example.words)}
    if posts.cache is not None:
        record["photo"] = photo is not None and posts.cache.has_photo(photo)
    if posts.generated is not None:
        record["generated"] = posts.generated.has_photo(example.image_id)
    if posts.notes is not None and posts.notes.file.segments:
        record["extra"] = "text_length" in row
    if posts.notes is not None and posts.notes.file.relevance:
        record["relevance"] = row.get("relevance")  # the one given, None where none is
    if "word_starts" not in row:
        record |= {"head": list(example.head), "tail": list(example.tail), "gold": example.label}
        return record | {"predicted": labels[answer], "probability": round(chance, 6)}
    reached = [start >= 0 for start in row["word_starts"]]
    words = list(zip(reached, answer, chance, strict=False))  # the batch is as wide as its longest post
    record["gold"] = list(example.labels)
    record["predicted"] = [labels[k] if ok else "O" for ok, k, _ in words]
    record["probability"] = [round(p, 6) if ok else None for ok, _, p in words]
    return record | {"seen": seen_spans(record["words"], known)}


def mean_regions(cache, image_ids):
    """([N, D] float32, the mean region of each photo's first view, or zeros; [N] True = there is one)."""
    batches = [read_photos(cache, [image_id]) for image_id in image_ids]
    masks = torch.cat([batch["region_mask"] for batch in batches])
    means = [batch["regions"][0][batch["region_mask"][0]].float().mean(0) for batch in batches]
    return torch.stack(means).nan_to_num(0).numpy(), masks.any(1).numpy()


def shuffled_photos(image_ids, cache, seed, notes=None):
    """{image id: another post's image id}, by one random cycle through the photos: none stays where it was.

    Works on photos, not posts: rows that share a photo share the wrong one. A photo is what cache or notes
    have of one. An id without a photo keeps having none; a lone photo has no other to change with.
    """
    sources = [source for source in (cache, notes) if source is not None]
    with_photo = [i for i in dict.fromkeys(image_ids) if any(source.has_photo(i) for source in sources)]
    order = [with_photo[i] for i in np.random.default_rng(seed).permutation(len(with_photo))]
    return {image_id: None for image_id in image_ids} | dict(zip(order, order[1:] + order[:1], strict=True))


def cut_train(dataset, share, seed):
    """Keep a share of a data set's training posts, drawn by the seed, in their order."""
    posts = dataset.examples["train"]
    order = np.random.default_rng(seed).permutation(len(posts))
    dataset.examples["train"] = [posts[i] for i in sorted(order[: math.ceil(share * len(posts))])]
