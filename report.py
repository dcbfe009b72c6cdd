"""A finished run -> one HTML file to look at: scores, confusions, curves, posts with their photos and notes.

    python report.py --run runs/twitter2017-roberta-resnet50-cross-attention-s1337

The page works offline, from the file alone; its template is parts/report.html. What came from posts is data:
JSON that no markup can end, shown as text.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

from data import NONE, photo_names
from features import ELSEWHERE
from parts.console import bounded, command_line
from parts.datasets import SPLITS, TEXT_PLACES, first_existing, locate
from parts.files import check_output, replacing
from parts.notes import reads_relevance
from parts.opening import dataset_now
from parts.photos import image_folders
from parts.processes import check_device, default_device
from parts.report_data import MISSING, attention, image_check_line, load_photos, notes_line, open_regions
from parts.report_data import posts_of, shown_boxes, shown_phrases, shown_regions
from parts.run_files import find_run, load_run, predictions_file, read_bytes, read_config
from parts.run_files import read_image_check, read_log
from parts.run_table import is_control
from parts.scores import entity_spans, rate_text, read_predictions, score

KINDS = ("missed", "spurious", "wrong type", "wrong boundary")
NOTHING = "(none)"  # in the confusion matrix: no entity with just this span
# ------------------------------------------------------------------------------------------------- comparison


def compare_spans(gold, predicted):
    """[(start, end, gold type or None, predicted type or None, kind)] of two sets of spans, in order.

    kind: "correct", or of `KINDS`: "wrong type" = the same span with another type; "wrong boundary" = not
    that, but a span of the other side overlaps; else "missed" (gold) or "spurious" (predicted).
    """
    types = [{(start, end): kind for kind, start, end in spans} for spans in (gold, predicted)]
    compared = []
    for start, end in sorted(types[0] | types[1]):
        a, b = (side.get((start, end)) for side in types)
        if a is not None and b is not None:
            kind = "correct" if a == b else "wrong type"
        elif any(s < end and start < e for s, e in types[0 if a is None else 1]):
            kind = "wrong boundary"
        else:
            kind = "missed" if b is None else "spurious"
        compared.append((start, end, a, b, kind))
    return compared


def relation_kind(gold, predicted):
    """The error kind of a relation, or "correct". Its two entities are given, so no boundary can be wrong."""
    if gold == predicted:
        return "correct"
    return "missed" if predicted == NONE else "spurious" if gold == NONE else "wrong type"


def post_of(record):
    """What the page holds of one prediction.

    `spans`: rows of `compare_spans`, each with the probability of what was predicted, None where there is
    none to tell; of a relation one row, start and end 0, and its `ends`, the spans of head and tail.
    """
    photo = next(iter(photo_names(record["image_id"])), None)  # of several the first is shown
    post = {"id": str(record["id"]), "photo": photo and str(photo), "words": record["words"]}
    post["blind"] = record.get("photo") is False
    gold, predicted, chance = record["gold"], record["predicted"], record.get("probability")
    if isinstance(gold, str):
        spans = [(0, 0, gold, predicted, relation_kind(gold, predicted), chance)]
        return post | {"spans": spans, "ends": [record["head"], record["tail"]]}
    post["spans"] = []
    for span in compare_spans(entity_spans(gold), entity_spans(predicted)):
        start, end, _, answer, _ = span
        known = [p for p in (chance or [])[start:end] if p is not None and answer is not None]
        post["spans"].append((*span, min(known, default=None)))  # an entity is as sure as its least sure word
    return post


def confusion(posts, order):
    """{"labels", "counts"}: counts[i][j] of gold label i answered with j; those of `order` that occur."""
    pairs = Counter((gold or NOTHING, answer or NOTHING)
                    for post in posts for _, _, gold, answer, _, _ in post["spans"])  # fmt: skip
    labels = [label for label in order if any(label in pair for pair in pairs)]
    return {"labels": labels, "counts": [[pairs[a, b] for b in labels] for a in labels]}


# ----------------------------------------------------------------------------------------------------- tables


def table(title, note, columns, rows):
    """A table for the page; `rows` {name: scores}, numbers as text, empty where a score is not there."""

    def cell(scores, column):
        value = scores.get(column, "")
        return rate_text(scores, column) if isinstance(value, float) else str(value)

    return {
        "title": title,
        "note": note,
        "columns": [column.replace("f1", "F1").replace("_", " ") for column in columns],
        "rows": [[name, *(cell(scores, column) for column in columns)] for name, scores in rows.items()],
    }


def score_tables(metrics):
    """Both families of scores, each headed by its baseline, then the types."""
    ner, base = metrics["task"] == "ner", metrics["baseline"]
    main, level = ("entity", "token") if ner else ("relation", "row")
    labels = ("accuracy", "precision", "recall", "f1", "macro_f1")
    of_type = ("precision", "recall", "f1", "gold", "predicted")
    spans = (*of_type[:3], "macro_f1", *of_type[3:])
    names = {
        "entity": "micro (CoNLL)", "entity_strict": "strict IOB2", "relation": "this run, micro",
        "entity_seen": "mentions seen in train", "entity_unseen": "mentions not seen in train",
    }  # fmt: skip
    always = f"baseline: always {base['label']}"
    rows = {names[key]: metrics[key] for key in names if key in metrics}
    rule = f"{NONE} earns nothing here."
    if ner:
        rule = "An entity counts when its whole span and its type are right."
    weighted = (
        f"The label of each {'word' if ner else 'row'}, {base['label']} included, weighted by how often it"
        " occurs (so weighted recall is accuracy). High from the start: compare it with its baseline, not"
        " with the other table."
    )
    return [
        table("Entity level" if ner else f"Relations without {NONE}",
              f"{rule} What the literature reports.", spans,
              {always: {"f1": float(base["main_f1"])}} | rows),
        table("Token level" if ner else "All rows", weighted, labels,
              {always: base, "this run": metrics[level]}),
        table("By type", "Entity level, whole spans." if ner else "", of_type, metrics[main]["types"]),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- main


def number_of_posts(text):
    """argparse type: a whole number from 1 on, or None for "all"."""
    return None if text == "all" else bounded(int, 1)(text)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("--run", type=find_run, nargs="+", required=True, help="run of train.py, or USER/NAME at a hub; of"
        " several the best on valid")
    add("--split", choices=("test", "valid"), help="what was answered (default: test if there is one)")
    add("--output", type=Path, metavar="FILE", help="the page (default: RUN/report-SPLIT.html)")
    add("--posts", type=number_of_posts, default=1000, metavar="N|all", help="shown, most errors first"
        " (default: 1000)")
    add("--device", default=default_device(), help="that runs the model (default: %(default)s here)")
    add = parser.add_argument_group("where things are (default: where the run was trained)").add_argument
    add("--data-dir", metavar="DIR", help="of the data set of the photos")
    add("--images", metavar="DIR", help="the photos, if at no usual place in --data-dir")
    add("--features", metavar="FILE", help="the run's features")
    add("--notes", metavar="FILE", help="the run's notes")
    add("--captions", metavar="FILE", help="what a run's phrases were made of")
    # fmt: on
    return parser.parse_args(argv)


def best_run(runs):
    """Of several run folders the best on valid; runs on shuffled inputs are no choice."""
    choices = [run for run in runs if not is_control(read_config(run))] or runs
    logs = {run: read_log(run) for run in choices}
    best = max(choices, key=lambda run: logs[run][int(logs[run][-1]["best_epoch"]) - 1]["valid_main_f1"])
    if len(runs) > 1:
        print(f"{best}: the best on valid of {len(choices)} runs")
    return best


def what_was_read(args, run, config, records, split, indices, warnings):
    """([what notes said of each post], {its number: where its words looked}, {image id: phrases or boxes}).

    Attention is that of the posts `indices`; phrases are None of a run whose regions are places. A file that
    is not there and was not named costs a line of `warnings`; one that was named is a FileNotFoundError.
    """
    cache, maps = open_regions(run, config, records, args.features), {}
    on_phrases = config["features_made"] is not None and config["features_made"]["backbone"] == "phrases"
    phrases = {} if on_phrases else None
    if args.captions and not on_phrases:
        raise ValueError(f"--captions {args.captions}: the run read no phrases; leave it out")
    if cache is not None and cache.boxes:
        phrases = shown_boxes(cache)
    elif cache is not None and cache.attrs["backbone"] == ELSEWHERE:
        phrases = shown_regions(cache)
    try:
        if cache is not None and on_phrases:
            phrases = shown_phrases(config, cache, args.data_dir, args.captions)
    except FileNotFoundError as error:
        if args.captions:
            raise
        warnings.append(f"Phrases not shown, nor attention: {error}.")
    notes = [{} for _ in records]
    if cache is None and config["notes"] is None and not args.notes:
        return notes, maps, phrases
    model, tokenizer, _ = load_run(run, args.device)
    try:
        inputs, texts_of = posts_of(config, tokenizer, records, split, cache, args.notes)
    except FileNotFoundError as error:
        if args.notes:
            raise
        warnings.append(f"Notes not shown{', nor attention' if cache is not None else ''}: {error}.")
        return notes, maps, phrases
    if cache is not None:
        maps = attention(model, config, inputs.part(indices), args.device)
        maps = {indices[i]: map_of for i, map_of in maps.items()}
    for i, texts in enumerate(texts_of):
        notes[i] = {"said": texts, "cut": inputs.shown(i)[1].get("note_cut", False)} if texts else {}
    return notes, maps, phrases


def facts_of(run, config, split, records, log, page_posts):
    """{name: text} of what a run is, was given and scored on; `page_posts`: how many posts the page has."""
    features, data = config["features_made"], config["data"][split]
    count, unit = len(records), "posts" if config["task"] == "ner" else "rows"
    parts = {
        "fusion": config["fusion"], "text encoder": config["text_encoder"],
        **{f"align {name}": f"{weight:g}" for name, weight in config["align"].items()},
        "bottleneck": f"{config['bottleneck']:g}" if config["bottleneck"] else None,
        "relevance": config["relevance"] if config["relevance"] != "none" else None,
        "decoder": config["decoder"], "seed": config["seed"],
    }  # fmt: skip
    system = [config["model"], *(f"{name} {value}" for name, value in parts.items() if value is not None)]
    regions = "not used"
    if features and features["backbone"] == ELSEWHERE:
        regions = f"regions made elsewhere ({features['weights']}); where they lie in a photo is not known"
    elif features:
        regions = ", ".join([
            f"{features.get('encoder', features['backbone'])} features", f"size {features['img_size']}",
            *(f"{key} {features[key]}" for key in ("fit", "grid") if key in features),
            f"weights {features['weights']}",
        ])  # fmt: skip
    choice = "the last" if config["keep"] == "last" else "the best on valid"
    facts = {
        "Data": f"{Path(config['dataset']).name} {split}, {count} {unit} ({data['variant']},"
        f" {data['sha256'][:16]})",
        "System": ", ".join(system),
        "Photos": regions,
        "Notes": notes_line(config, records),
        "Epoch": f"{log[-1]['best_epoch']} of {len(log)}, {choice}",
    }
    if left_out := count - page_posts:
        rest = f"{left_out} are left out (--posts all shows them)"
        facts["Shown"] = f"{page_posts}, those with most errors first; {rest}"
    if config["generated"]:
        pictures = sum(record.get("generated") is True for record in records)
        name, digits = Path(config["generated"]).name, config["generated_made"]["sha256"][:16]
        pictures = f"{pictures} of {count} {unit} with one; not shown here"
        facts["Generated pictures"] = f"{name} ({digits}): {pictures}"
    check = run / f"image-check-{split}.json"
    if check.exists():
        facts["Image check"] = image_check_line(config, read_image_check(check))
    return facts


def is_page(path):
    """Whether a file is a page of ours, of an earlier version too."""
    with open(path, "rb") as file:
        head = file.read(1000)
    return head.startswith(b"<!doctype html>") and all(
        mark in head for mark in (b"script-src 'sha256-", b"<title>Report</title>")
    )


def write_page(page, photos, output):
    """Put a page's data into the template; its script is the only one the browser is allowed to run.

    `photos`: those of `load_photos`. Each is a block of its own behind the script, so that a page of many
    opens before they are read; the page's data has its number and what was seen of it.
    """
    names = [image_id for image_id, photo in photos.items() if not isinstance(photo, str)]
    frames = {image_id: [number, photos[image_id][1]] for number, image_id in enumerate(names)}
    page = page | {"photos": photos | frames}
    text = json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = (Path(__file__).parent / "parts" / "report.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head, _, rest = template.replace("{{HASH}}", f"sha256-{digest}").partition("{{DATA}}")
    middle, _, end = rest.partition("{{PHOTOS}}")
    try:
        with replacing(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines((head, text.replace("<", "\\u003c"), middle))
            for number, image_id in enumerate(names):
                jpeg = base64.b64encode(photos[image_id][0]).decode()
                file.write(f'<script type="text/plain" id="photo-{number}">{jpeg}</script>\n')
            file.write(end)
    except OSError as error:
        reason = f"the page cannot be stored there ({error.strerror}); name another place with --output"
        raise OSError(f"{output}: {reason}") from None


def photo_folders(config, split, args):
    """The folders of a run's photos; FileNotFoundError if they are not there.

    A run may be a stranger's: a folder that it names itself counts only if the posts there are those that it
    was scored on.
    """
    name, data_dir = dataset_now(config, args.data_dir)
    if not (args.data_dir or args.images):
        path = first_existing(TEXT_PLACES, *locate(name, data_dir), SPLITS[split])
        digest = path and hashlib.sha256(read_bytes(path, 2**31)).hexdigest()
        if digest != config["data"][split]["sha256"]:
            raise FileNotFoundError(f"{name} has not the posts of this run; name them with --data-dir or"
                                    " --images")  # fmt: skip
    return image_folders(name, data_dir, args.images)


def page_warnings(config, metrics, photos, absent):
    """What to know before a page is read: that photos or notes were others', what was not seen or read.

    `absent`: ["3 missing", ...] of its `photos`.
    """
    warnings = []
    if config["shuffle_photos"]:
        unseen = ", and of notes nothing that was written with a photo in view" if config["notes"] else ""
        warnings.append("Trained and scored with other posts' photos (--shuffle-photos). The photos shown"
                        " here are the posts' own, which the model did not see; so there is no attention to"
                        f" show{unseen}.")  # fmt: skip
    if config["shuffle_notes"]:
        warnings.append("Trained and scored with what was said of other posts (--shuffle-notes): shown"
                        " here, too.")  # fmt: skip
    if absent:
        warnings.append(f"{' and '.join(absent)} of {len(photos)} photos: their posts say 'no photo here'.")
    if count := metrics["posts_without_photo"]:
        warnings.append(f"{count} posts were answered without a photo: the features have none of them.")
    if count := metrics.get("words_answered_without_model"):
        warnings.append(f"{count} words, cut off or without a sub-token, were answered O without being read.")
    return warnings


def add_notes_and_maps(posts, records, config, notes, maps, phrases, photos):
    """Put what was read of notes, and where words looked, into the posts; how many maps found no place."""
    lacking = 0
    for i, (post, record) in enumerate(zip(posts, records, strict=True)):
        post |= notes[i]
        # On shuffled photos it is another photo's.
        if record.get("relevance") is not None and not config["shuffle_photos"]:
            post["said"] = post.get("said", {}) | {"relevance": f"{record['relevance']:.3f}"}
        if i not in maps:
            continue
        if phrases is None:
            if not isinstance(photos[post["photo"]], str):
                post["maps"] = maps[i]
        elif post["photo"] in phrases:
            post |= {"maps": maps[i]} | phrases[post["photo"]]
        elif phrases:
            lacking += 1
    return lacking


def note_titles(config):
    """What a page calls each kind of note."""
    titles = {"about_post": f"Said of {'another' if config['shuffle_notes'] else 'the'} post",
              "about_photo": "Said of the photo"}  # fmt: skip
    if reads_relevance(config):
        own = "; the run used its own" if config["relevance"] == "predicted" else ""
        titles["relevance"] = f"Relevance of the photo, as given{own}"
    return titles


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    run = best_run(args.run)
    config = read_config(run)
    path = predictions_file(run, args.split)
    split = path.stem.removeprefix("predictions-")
    output = args.output or run / f"report-{split}.html"
    check_output(output, "--output", is_page)
    records = read_predictions(path, task=config["task"])
    log, metrics = read_log(run), score(records)
    ner, warnings = metrics["task"] == "ner", list(metrics["warnings"])

    try:
        folders = photo_folders(config, split, args)
    except FileNotFoundError as error:
        if args.images:
            raise
        folders = []
        warnings.append(f"Photos not shown: {error}.")
    posts = [post_of(record) for record in records]
    order = [*metrics["entity"]["types"], NOTHING] if ner else [NONE, *metrics["relation"]["types"]]
    confusions = confusion(posts, order)
    errors = [sum(span[4] != "correct" for span in post["spans"]) for post in posts]
    indices = sorted(range(len(posts)), key=lambda i: -errors[i])[: args.posts]
    image_ids = dict.fromkeys(posts[i]["photo"] for i in indices if posts[i]["photo"] is not None)
    photos = load_photos(image_ids, folders, config["features_made"] or {})
    reasons = [photo for photo in photos.values() if isinstance(photo, str)]
    kinds = Counter("missing" if reason.startswith(MISSING) else "unreadable" for reason in reasons)
    absent = [f"{count} {kind}" for kind, count in sorted(kinds.items())]

    warnings += page_warnings(config, metrics, photos, absent)
    notes, maps, phrases = what_was_read(args, run, config, records, split, indices, warnings)
    if lacking := add_notes_and_maps(posts, records, config, notes, maps, phrases, photos):
        warnings.append(f"Of {lacking} posts the phrases are not shown, nor attention: one has no sub-token.")
    posts = [posts[i] for i in indices]
    page = {
        "title": f"{run.resolve().name}, {split}", "ner": ner,
        "facts": facts_of(run, config, split, records, log, len(posts)), "warnings": warnings,
        "tables": score_tables(metrics), "kinds": [kind for kind in KINDS if ner or kind != "wrong boundary"],
        "confusion": confusions, "log": log, "posts": posts,
        "extra_len": config["extra_len"], "said": note_titles(config),
        # Where attention went that is on no region.
        "rest": "coarser views of it" if config["fusion"] == "pyramid" else "words",
    }  # fmt: skip
    write_page(page, photos, output)
    print(f"{output}: {len(posts)} of {len(records)} {'posts' if ner else 'rows'},"
          f" {sum('maps' in post for post in posts)} with attention, {sum('said' in post for post in posts)}"
          f" with notes; {', '.join([f'{len(photos)} photos', *absent])}; {output.stat().st_size / 1e6:.1f}"
          " MB")  # fmt: skip
    return output


if __name__ == "__main__":
    command_line(main)
