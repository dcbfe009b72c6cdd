"""The README.md of a run's folder: what the run is, of what, and its scores, for whoever gets the folder.

    write_card("runs/twitter2017-roberta-resnet50-film-s1337")
"""

import os
from pathlib import Path

from features import ELSEWHERE
from parts.files import write_text
from parts.options import command_of
from parts.run_files import read_config, read_object
from parts.runs import CARD, is_card
from parts.scores import main_score

NOT_CHECKED = "not done; `evaluate.py --image-check --run` writes here what it finds"


def photos_line(config):
    """How a run looked at photos."""
    made = config["features_made"]
    if not made:
        return "none: text only"
    if made["backbone"] == ELSEWHERE:
        looked = f"regions made elsewhere ({made['weights']})"
    else:
        sizes = {"size": made["img_size"]} | {key: made[key] for key in ("fit", "grid") if key in made}
        looked = f"{made.get('encoder', made['backbone'])}, weights {made['weights']}"
        looked += "".join(f", {key} {value}" for key, value in sizes.items())
    if "boxes_sha256" in made:
        looked += ", a region for each box"
    if config["shuffle_photos"]:
        looked += "; **a control: other posts' photos were shown**"
    return f"{looked}; features {made['sha256'][:16]}"


def score_rows(run_dir, config):
    """Rows of the table of scores, those of always answering the most frequent label below each."""
    name = "token" if config["task"] == "ner" else "row"
    for split in ("valid", "test"):
        path = run_dir / f"metrics-{split}.json"
        if not path.exists():
            continue
        metrics = read_object(path)
        base, of_run = metrics["baseline"], metrics[name]
        for who, f1, scores in ((f"**{split}**, {metrics['posts']} posts", main_score(metrics), of_run),
                                (f"always `{base['label']}`", base["main_f1"], base)):  # fmt: skip
            yield f"| {who} | {f1:.4f} | {scores['accuracy']:.4f} | {scores['f1']:.4f} |"


def card_text(run_dir, config):
    """The text of the card of a finished run."""
    ner, base = config["task"] == "ner", config["text_encoder"]
    head = ["---", "tags: [multimodal, social-media]"]
    head += ["pipeline_tag: token-classification"] if ner else []
    head += [] if Path(base).is_dir() else [f"base_model: {base}"]
    what = "Named entities in" if ner else "The relation of two entities in"
    data = [f"{split} `{file['sha256']}`, {file['variant']}" for split, file in config["data"].items()]
    score = "entity F1" if ner else "micro F1 without None"
    notes = f"; notes {config['notes_sha256'][:16]}" if config["notes_sha256"] else ""
    lines = [
        *head, "---", CARD, f"# {run_dir.resolve().name}", "",
        f"{what} posts with a photo. Best epoch on valid; test was scored once.", "",
        f"- Base model: {base if not Path(base).is_dir() else f'a local folder, {Path(base).name}'}",
        f"- System: {config['model']}, fusion {config['fusion'] or 'its own'}, decoder {config['decoder']},"
        f" seed {config['seed']}",
        f"- Data: {Path(config['dataset']).name}, SHA-256 of {'; '.join(data)}{notes}",
        f"- Photos: {photos_line(config)}",
        "- Licence: not stated yet. Put `license:` into the head of this file; base model, posts and photos"
        " have terms of their own", "",
        f"| | {score} | accuracy | weighted F1 |", "| --- | --- | --- | --- |",
        *score_rows(run_dir, config), "",
        *([f"Image check, {[*config['data']][-1]}: {NOT_CHECKED}", ""] if config["features_made"] else []),
        "    from predict import Predictor", "",
        '    Predictor("USER/NAME")([{"text": "Kevin Durant in Oakland", "image": "kd.jpg"}])', "",
        "`config.json`, `encoder/` and `model.safetensors` are all it takes. Predictions and report pages"
        " hold posts and photos: leave them out where you may not pass those on. Made by", "",
        f"    {command_of(run_dir / 'config.json')}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def write_card(run_dir):
    """Write the card of a finished run, unless a README.md that is none stands there; that is said."""
    path = Path(run_dir) / "README.md"
    if os.path.lexists(path) and not is_card(path):
        print(f"{path}: not a model card of train.py; left as it is")
        return
    write_text(path, card_text(Path(run_dir), read_config(run_dir)))


def add_check(run_dir, split, verdict):
    """Put what the image check says into the card of a run, if it has one; all else there stays."""
    path = Path(run_dir) / "README.md"
    if is_card(path):
        start = f"Image check, {split}: "
        lines = path.read_text(encoding="utf-8").split("\n")
        write_text(path, "\n".join(start + verdict if line.startswith(start) else line for line in lines))
