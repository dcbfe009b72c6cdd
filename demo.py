"""Write the demo data set: posts, drawn photos and their captions, in exactly the files of Twitter-2017, and tiny models.

    python demo.py    # data/demo/: {train,valid,test}.txt, images/, captions.txt, {encoder,clip,blip,vilt}/

Half of the names can be of several types (Jordan the player, the country, the brand), and nothing but the scene in
the photo tells which: a portrait, a landscape, a shop front or a stage. The other names have one type whatever the
photo shows. So text alone cannot reach a good score, and a good score shows that the photo is used.
"""

import argparse
import random
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers import ViltConfig, ViltForMaskedLM, ViltImageProcessor, logging

logging.disable_progress_bar()

AMBIGUOUS = {
    "Jordan": ("PER", "LOC", "ORG"), "Paris": ("PER", "LOC"), "Amazon": ("LOC", "ORG"),
    "Phoenix": ("PER", "LOC", "MISC"), "Washington": ("PER", "LOC", "ORG"), "Chelsea": ("PER", "LOC", "ORG"),
    "Mercedes": ("PER", "ORG"),
    "Oscar": ("PER", "MISC"), "Apollo": ("ORG", "MISC"), "Chicago": ("LOC", "MISC"),
}  # fmt: skip
PLAIN = {
    "PER": ("Serena Williams", "Taylor Swift", "Obama", "Kevin Hart", "Messi"),
    "LOC": ("London", "New York", "Tokyo", "Lake Como", "Brazil"),
    "ORG": ("NASA", "Google", "Toronto Raptors", "BBC", "Manchester United"),
    "MISC": ("Super Bowl", "Star Wars", "Grammys", "World Cup", "Game of Thrones"),
}
TEMPLATES = (
    "so excited about {} today !", "RT @fan : {} again", "can not stop thinking about {}", "this is why I love {} <3",
    "my photo of {} from last night", "{} , what a day", "good morning {} !", "throwback : {} in 2016",
    "no words for {} 😍", "nobody told me about {}", "{} and {} this weekend", "first {} , then {} .",
)  # fmt: skip
BACKGROUNDS = {"PER": (224, 176, 128), "LOC": (96, 168, 232), "ORG": (176, 40, 48), "MISC": (40, 16, 72)}

CAPTIONS = {
    "PER": ("a portrait of someone", "a face in front of a plain wall"),
    "LOC": ("green hills under the sun", "a landscape with mountains"),
    "ORG": ("a shop with a white sign", "the front of a red building"),
    "MISC": ("a dark stage with two spotlights", "lights shining on an empty stage"),
}


def draw_scene(kind, rng):
    """A 160 x 120 picture that stands for an entity type: its colours are what a random backbone can tell apart."""

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
    """(words, labels, type of the scene): one to two names in a template, the first ambiguous in 3 posts of 4."""
    template = rng.choice(TEMPLATES)
    scene = rng.choice(list(BACKGROUNDS))
    names = []
    for i in range(template.count("{}")):
        if i == 0 and rng.random() < 0.75:
            names.append((rng.choice([name for name, kinds in AMBIGUOUS.items() if scene in kinds]), scene))
        else:
            kind = rng.choice(list(PLAIN))
            names.append((rng.choice(PLAIN[kind]), kind))
    rest, words, labels = iter(names), [], []
    for word in template.split():
        name, kind = next(rest) if word == "{}" else (word, None)
        for position, part in enumerate(name.split()):
            words.append(part)
            labels.append("O" if kind is None else f"{'I' if position else 'B'}-{kind}")
    return words, labels, scene


def build_models(words, folder, width=64, layers=2, image=96, patch=16):
    """Save small models with random weights, each as its published kind: encoder/ (BERT), clip/, blip/ and vilt/.

    Their one WordPiece tokenizer has `words`, uncased, as its vocabulary; photos are `image` pixels, ViLT's shorter side.
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
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    size = {"num_hidden_layers": layers, "num_attention_heads": 4, "hidden_size": width, "intermediate_size": 2 * width}
    text = {"vocab_size": len(vocabulary), **size}
    vision = {"image_size": image, "patch_size": patch, "initializer_range": 0.02, **size}  # BLIP's own is 1e-10
    square = {"height": image, "width": image}
    torch.manual_seed(0)
    for name, model, processor in (
        ("encoder", BertModel(BertConfig(**text)), None),
        ("clip", CLIPVisionModel(CLIPVisionConfig(**vision)),
         CLIPImageProcessor(size={"shortest_edge": image}, crop_size=square)),
        ("blip", BlipForImageTextRetrieval(BlipConfig(
            text_config={**text, "encoder_hidden_size": width, "bos_token_id": 2, "sep_token_id": 3}, vision_config=vision
        )), BlipImageProcessor(size=square)),
        ("vilt", ViltForMaskedLM(ViltConfig(max_position_embeddings=40, **text | vision)),
         ViltImageProcessor(size={"shortest_edge": image}, size_divisor=patch)),
    ):  # fmt: skip
        model.save_pretrained(folder / name)
        if processor:
            processor.save_pretrained(folder / name)
        if name != "clip":
            longest = 40 if name == "vilt" else 512
            wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)
            wrapped.save_pretrained(folder / name)


def write_dataset(folder, posts=(320, 80, 160), seed=7):
    """Write the splits (so many posts each), their photos and the models under `folder`."""
    folder, rng, train_words, captions = Path(folder), random.Random(seed), [], []
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for split, count in zip(("train", "valid", "test"), posts, strict=True):
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            for number in range(count):
                words, labels, scene = make_post(rng)
                lines = [f"{word}\t{label}" for word, label in zip(words, labels, strict=True)]
                file.write("\n".join([f"IMGID:{split}_{number:04d}", *lines, "", ""]))
                draw_scene(scene, rng).save(folder / "images" / f"{split}_{number:04d}.jpg", quality=90)
                captions.append(f"{split}_{number:04d}.jpg :{CAPTIONS[scene][number % 2]}")
                train_words += words if split == "train" else []
    (folder / "captions.txt").write_text("\n".join([*captions, ""]), encoding="utf-8")
    caption_words = " ".join(caption for pair in CAPTIONS.values() for caption in pair).split()
    build_models(train_words + caption_words, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    target = Path(parser.parse_args().data_dir) / "demo"
    try:
        write_dataset(target)
    except OSError as error:
        raise SystemExit(f"demo.py: error: {error.filename}: {error.strerror}") from None
    print(f"{target}: train, valid and test posts, their photos and captions; encoder/, clip/, blip/, vilt/: tiny random models")
