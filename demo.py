"""Write two demo data sets, in exactly the files of Twitter-2017, and tiny models.

    python demo.py    # data/demo/: {train,valid,test}.txt, images/, captions.txt, {encoder,clip,blip,vilt}/
                      # data/demo-notes/: the same, but notes.jsonl and generated/ for captions.txt

demo: half of the names can be of several types (Jordan the player, the country, the brand). Only the scene in
the photo tells which: a portrait, a landscape, a shop front or a stage. The other names have one type,
whatever the photo shows. Text alone cannot reach a good score, so a good score shows that the photo is used.

demo-notes: a photo shows what its post's first name is, but a fifth of the photos are another post's. There a
name of several types has its usual one. A model that knows which photos are wrong can be right; one that does
not is misled. Some names are made up for one post, in letters that no model here knows. Its own photo tells
what such a name is; so do a list of names (about_post) and a picture drawn from the text (generated/). Of a
name of several types the picture shows the usual one, and the list says none.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers import ViltConfig, ViltForMaskedLM, ViltImageProcessor, logging

from parts.console import Defaults, command_line
from parts.files import write_text

logging.disable_progress_bar()

AMBIGUOUS = {  # the usual type first
    "Jordan": ("PER", "LOC", "ORG"), "Paris": ("LOC", "PER"), "Amazon": ("ORG", "LOC"),
    "Phoenix": ("LOC", "PER", "MISC"), "Washington": ("LOC", "PER", "ORG"), "Chelsea": ("ORG", "PER", "LOC"),
    "Mercedes": ("ORG", "PER"),
    "Oscar": ("PER", "MISC"), "Apollo": ("MISC", "ORG"), "Chicago": ("LOC", "MISC"),
}  # fmt: skip
PLAIN = {
    "PER": ("Serena Williams", "Taylor Swift", "Obama", "Kevin Hart", "Messi"),
    "LOC": ("London", "New York", "Tokyo", "Lake Como", "Brazil"),
    "ORG": ("NASA", "Google", "Toronto Raptors", "BBC", "Manchester United"),
    "MISC": ("Super Bowl", "Star Wars", "Grammys", "World Cup", "Game of Thrones"),
}
TEMPLATES = (
    "so excited about {} today !", "RT @fan : {} again", "can not stop thinking about {}",
    "this is why I love {} <3", "my photo of {} from last night", "{} , what a day", "good morning {} !",
    "throwback : {} in 2016", "no words for {} 😍", "nobody told me about {}", "{} and {} this weekend",
    "first {} , then {} .",
)  # fmt: skip
BACKGROUNDS = {"PER": (224, 176, 128), "LOC": (96, 168, 232), "ORG": (176, 40, 48), "MISC": (40, 16, 72)}

CAPTIONS = {
    "PER": ("a portrait of someone", "a face in front of a plain wall"),
    "LOC": ("green hills under the sun", "a landscape with mountains"),
    "ORG": ("a shop with a white sign", "the front of a red building"),
    "MISC": ("a dark stage with two spotlights", "lights shining on an empty stage"),
}
KINDS = {"PER": "person", "LOC": "place", "ORG": "organisation", "MISC": "other"}  # as notes call them


def draw_scene(kind, rng):
    """A 160 x 120 picture of an entity type, in colours that a random backbone tells apart."""

    def near(colour, spread=16):
        return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)

    photo = Image.new("RGB", (160, 120), near(BACKGROUNDS[kind]))
    pen = ImageDraw.Draw(photo)
    x, y = rng.randint(50, 110), rng.randint(40, 60)
    if kind == "PER":  # a face above shoulders
        pen.ellipse((x - 45, y + 30, x + 45, y + 140), fill=near((96, 64, 48)))
        pen.ellipse((x - 26, y - 36, x + 26, y + 36), fill=near((240, 200, 160)))
        pen.pieslice((x - 28, y - 40, x + 28, y + 20), 180, 360, fill=near((64, 40, 24)))
    elif kind == "LOC":  # hills under a sun
        pen.ellipse((x - 14, 8, x + 14, 36), fill=near((255, 236, 140)))
        for step in range(-30, 190, 55):
            height = y + rng.randint(0, 30)
            pen.polygon([(step - 60, 120), (step, height), (step + 60, 120)], fill=near((64, 144, 72)))
    elif kind == "ORG":  # a shop front with a sign
        pen.rectangle((20, y, 140, 120), fill=near((200, 196, 192)))
        pen.rectangle((30, y - 24, 130, y - 4), fill=near((250, 250, 250)))
        for left in range(28, 130, 28):
            pen.rectangle((left, y + 14, left + 18, y + 44), fill=near((120, 32, 36)))
    else:  # a dark stage with two spotlights
        for lamp in (30, 130):
            pen.polygon([(lamp, 0), (x - 20, 112), (x + 20, 112)], fill=near((144, 72, 200)))
        pen.ellipse((x - 34, 104, x + 34, 118), fill=near((248, 220, 96)))
    return photo


def make_post(rng):
    """(words, labels, type of the scene): one or two names in a template, the first mostly ambiguous."""
    template = rng.choice(TEMPLATES)
    scene = rng.choice(list(BACKGROUNDS))
    names = []
    for i in range(template.count("{}")):
        if i == 0 and rng.random() < 0.75:
            names.append((rng.choice([name for name, kinds in AMBIGUOUS.items() if scene in kinds]), scene))
        else:
            kind = rng.choice(list(PLAIN))
            names.append((rng.choice(PLAIN[kind]), kind))
    return *fill(template, names), scene


def fill(template, names):
    """(words, labels) of a template with names, [(name, type)], in its gaps."""
    rest, words, labels = iter(names), [], []
    for word in template.split():
        name, kind = next(rest) if word == "{}" else (word, None)
        for position, part in enumerate(name.split()):
            words.append(part)
            labels.append("O" if kind is None else f"{'I' if position else 'B'}-{kind}")
    return words, labels


def make_noted_post(rng, own):
    """(words, labels, [(name, type)]); `own`: with its own photo, so a name can be of any of its types."""
    template, names, luck = rng.choice(TEMPLATES), [], rng.random()
    for i in range(template.count("{}")):
        kind = rng.choice(list(PLAIN))
        if i == 0 and luck < 0.4:
            name = rng.choice(list(AMBIGUOUS))
            kind = rng.choice(AMBIGUOUS[name]) if own else AMBIGUOUS[name][0]
        elif i == 0 and luck < 0.5:
            name = "".join(rng.choice("βγδκλμνπρτ") + rng.choice("αειου") for _ in range(3)).capitalize()
        else:
            name = rng.choice(PLAIN[kind])
        names.append((name, kind))
    return *fill(template, names), names


def build_models(words, folder, width=64, layers=2, image=96, patch=16):
    """Save small models with random weights: encoder/ (BERT), clip/, blip/ and vilt/.

    Their one WordPiece tokenizer has `words`, uncased, as its vocabulary; photos are `image` pixels,
    ViLT's shorter side.
    """
    known = sorted({word.lower() for word in words})
    letters = sorted({letter for word in known for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *known])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"
    names = dict(zip(tokens, special, strict=True))
    size = {"num_hidden_layers": layers, "num_attention_heads": 4}
    size |= {"hidden_size": width, "intermediate_size": 2 * width}
    text = {"vocab_size": len(vocabulary), **size}
    # BLIP's own initializer_range is 1e-10.
    vision = {"image_size": image, "patch_size": patch, "initializer_range": 0.02, **size}
    square = {"height": image, "width": image}
    torch.manual_seed(0)
    for name, model, processor in (
        ("encoder", BertModel(BertConfig(**text)), None),
        ("clip", CLIPVisionModel(CLIPVisionConfig(**vision)),
         CLIPImageProcessor(size={"shortest_edge": image}, crop_size=square)),
        ("blip", BlipForImageTextRetrieval(BlipConfig(
            text_config={**text, "encoder_hidden_size": width, "bos_token_id": 2, "sep_token_id": 3},
            vision_config=vision,
        )), BlipImageProcessor(size=square)),
        ("vilt", ViltForMaskedLM(ViltConfig(max_position_embeddings=40, **text | vision)),
         ViltImageProcessor(size={"shortest_edge": image}, size_divisor=patch)),
    ):  # fmt: skip
        model.save_pretrained(folder / name)
        if processor:
            processor.save_pretrained(folder / name)
        if name != "clip":
            longest = 40 if name == "vilt" else 512
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)
            fast.save_pretrained(folder / name)


def check_folder(folder):
    """ValueError where a folder holds a data set of somebody's own, or is a link."""
    files = [path for path in folder.glob("*") if not path.is_dir()]
    train = folder / "train.txt"
    if files and not (train.is_file() and train.read_bytes().startswith(b"IMGID:train_0000\n")):
        raise ValueError(f"{folder}: holds files of your own; give the demo another --data-dir")
    for path in (folder, *(path for path in folder.glob("*") if path.is_dir())):
        if path.is_symlink():
            raise ValueError(f"{path}: is a link, which nothing is written through; name another --data-dir")


def make_folder(folder):
    """A folder for pictures, without those that an earlier demo wrote there; others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jpg"):
        if re.fullmatch(r"(train|valid|test)_\d{4}", path.stem):
            path.unlink()


def write_split(folder, split, posts):
    """Write posts, [(words, labels, photo)], as a Twitter-2017 file and their photos in images/."""
    text = ""
    for i, (words, labels, photo) in enumerate(posts):
        lines = [f"{word}\t{label}" for word, label in zip(words, labels, strict=True)]
        text += "\n".join([f"IMGID:{split}_{i:04d}", *lines, "", ""])
        photo.save(folder / "images" / f"{split}_{i:04d}.jpg", quality=90)
    write_text(folder / f"{split}.txt", text)


def write_dataset(folder, posts=(320, 80, 160), seed=7):
    """Write `demo` under `folder`: the splits (so many posts each), their photos, captions and the models."""
    folder, rng, train_words, captions = Path(folder), random.Random(seed), [], []
    make_folder(folder / "images")
    for split, count in zip(("train", "valid", "test"), posts, strict=True):
        rows = []  # posts with their photos
        for i in range(count):
            words, labels, scene = make_post(rng)
            rows.append((words, labels, draw_scene(scene, rng)))
            captions.append(f"{split}_{i:04d}.jpg :{CAPTIONS[scene][i % 2]}")
            train_words += words if split == "train" else []
        write_split(folder, split, rows)
    write_text(folder / "captions.txt", "\n".join([*captions, ""]))
    caption_words = " ".join(caption for pair in CAPTIONS.values() for caption in pair).split()
    build_models(train_words + caption_words, folder)


def write_noted_dataset(folder, posts=(480, 160, 320), seed=7):
    """Write `demo-notes`: as `demo`, with notes and pictures drawn from the text in place of captions."""
    folder, rng, notes = Path(folder), random.Random(seed), []
    for name in ("images", "generated"):
        make_folder(folder / name)
    for split, count in zip(("train", "valid", "test"), posts, strict=True):
        wrong = set(rng.sample(range(count), count // 5))
        rows = [make_noted_post(rng, i not in wrong) for i in range(count)]
        scenes = [names[0][1] for _, _, names in rows]
        photos, order = [draw_scene(scene, rng) for scene in scenes], list(range(count))
        for i in sorted(wrong):
            order[i] = rng.choice([j for j in range(count) if scenes[j] != scenes[i]])
        write_split(folder, split, [(*post[:2], photos[j]) for post, j in zip(rows, order, strict=True)])
        for i, (words, _, names) in enumerate(rows):
            usual = AMBIGUOUS.get(names[0][0], names[0][1:])[0]
            picture = draw_scene(usual, random.Random(" ".join(words)))  # the text alone decides on it
            picture.save(folder / "generated" / f"{split}_{i:04d}.jpg", quality=90)
            entities = [name if name in AMBIGUOUS else f"{name} ({KINDS[kind]})" for name, kind in names]
            caption = CAPTIONS[scenes[order[i]]][order[i] % 2]
            phrases = re.split(" (?:of|in front of|under|with|on) ", caption)
            note = {"id": f"{split}_{i:04d}", "about_post": "; ".join(entities), "about_photo": caption}
            notes.append(json.dumps(note | {"relevance": int(order[i] == i), "phrases": phrases}))
    write_text(folder / "notes.jsonl", "\n".join([*notes, ""]))
    texts = [*TEMPLATES, *AMBIGUOUS, *KINDS.values(), *sum([*PLAIN.values(), *CAPTIONS.values()], ()), "();"]
    build_models(re.findall(r"\w+|[^\w\s]", " ".join(texts)), folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Defaults)
    parser.add_argument("--data-dir", default="data", type=Path, help="where the two data sets go")
    target = parser.parse_args(argv).data_dir
    for name in ("demo", "demo-notes"):
        check_folder(target / name)
    write_dataset(target / "demo")
    write_noted_dataset(target / "demo-notes")
    for name, more in (("demo", "captions"), ("demo-notes", "notes, pictures drawn from the text")):
        print(f"{target / name}: train, valid and test posts, their photos, {more}; tiny random models")


if __name__ == "__main__":
    command_line(main)
