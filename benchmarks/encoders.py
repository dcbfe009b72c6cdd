"""Which encoders are taken: each kind built tiny, used and read back.

    python benchmarks/encoders.py                     # of text: some minutes on one core; writes ENCODERS.md
    python benchmarks/encoders.py --images            # of photos, timm's too: the same; writes VISION.md
    python benchmarks/encoders.py --only gpt2 esm     # prints these rows alone

A kind of text encoder that works is trained for one epoch on a few demo posts without photos, and the run,
loaded again, gives the same predictions. One of photos makes the features of the demo's photos; some go on to
a run with them, its image check and new posts. What ends in anything but that or one clear line is an error,
and the script ends with status 1.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import demo
import evaluate
import extract_features
import train
from data import RELATIONS
from features import FeatureCache
from parts.console import command_line
from parts.datasets import load_dataset
from parts.opening import open_run
from parts.posts import predict_posts
from parts.framing import Processed
from parts.scores import mentions, read_predictions
from parts.vision_encoder import find_places, last_states, patch_size
from predict import Predictor

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {"num_key_value_heads": 2, "head_dim": 8}
OFFSET = {"max_position_embeddings": 130, "pad_token_id": 0}  # positions counted from the padding's id + 1
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}

# Per kind: its tokenizer and what its configuration needs besides `SIZE`. "words": WordPiece with [CLS] and
# [SEP]; "bytes": byte-level BPE with <s> and </s>, words of a list glued; "text": the same without either,
# and without padding.
ENCODERS = {
    "albert": ("words", {"embedding_size": 16}), "bert": ("words", {}), "bert-generation": ("words", {}),
    "big_bird": ("words", {}), "bros": ("words", {}), "camembert": ("bytes", OFFSET), "canine": ("words", {}),
    "convbert": ("words", {"embedding_size": 32}), "data2vec-text": ("bytes", OFFSET),
    "deberta": ("bytes", {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    }),
    "deberta-v2": ("words", {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    }),
    "distilbert": ("words", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "electra": ("words", {"embedding_size": 16}), "ernie": ("words", {}),
    "esm": ("words", {"position_embedding_type": "rotary", "mask_token_id": 4, "pad_token_id": 0}),
    "eurobert": ("bytes", LLAMA),
    "flaubert": ("words", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0}),
    "fnet": ("words", {}),
    "funnel": ("words", {
        "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    }),
    "gte": ("words", {}), "ibert": ("bytes", OFFSET), "jina_embeddings_v3": ("bytes", OFFSET),
    "layoutlm": ("words", {}), "layoutlmv2": ("words", {}), "layoutlmv3": ("words", {}),
    "lilt": ("bytes", OFFSET | {"hidden_size": 48}),
    "longformer": ("bytes", OFFSET | {"attention_window": 8}),
    "luke": ("bytes", OFFSET | {"entity_vocab_size": 10}), "markuplm": ("words", OFFSET),
    "megatron-bert": ("words", {}),
    "mobilebert": ("words", {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    "modernbert": ("bytes", {"global_attn_every_n_layers": 2, "local_attention": 16}),
    "mpnet": ("words", OFFSET), "mra": ("words", {}), "nomic_bert": ("words", {}),
    "nystromformer": ("words", {}),
    "perceiver": ("words", {"d_model": 32, "d_latents": 32, "num_latents": 8}),
    "reformer": ("words", {
        "attn_layers": ["local", "lsh"], "attention_head_size": 8, "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16], "num_buckets": 2, "feed_forward_size": 64,
    }),
    "rembert": ("words", {"input_embedding_size": 16, "output_embedding_size": 16}),
    "roberta": ("bytes", OFFSET), "roberta-prelayernorm": ("bytes", OFFSET),
    "roc_bert": ("words", {"pronunciation_vocab_size": 16, "shape_vocab_size": 16}),
    "roformer": ("words", {"embedding_size": 32}), "splinter": ("words", {}),
    "squeezebert": ("words", {"embedding_size": 32}), "tapas": ("words", {}),
    "xlm": ("words", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0}),
    "xlm-roberta": ("bytes", OFFSET), "xlm-roberta-xl": ("bytes", OFFSET),
    "xlnet": ("words", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0}),
    "xmod": ("bytes", OFFSET | {"languages": ["en_XX"], "default_language": "en_XX"}), "yoso": ("words", {}),
}  # fmt: skip
DECODERS = {
    "biogpt": ("text", {}), "bloom": ("text", {"n_layer": 2, "n_head": 4}),
    "clip_text_model": ("words", {"eos_token_id": 3}), "ctrl": ("text", {"dff": 64}), "falcon": ("text", {}),
    "gemma": ("text", LLAMA), "gemma2": ("text", LLAMA), "gemma3_text": ("text", LLAMA),
    "gpt2": ("text", {"n_positions": 128}),
    "gpt_neo": ("text", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}),
    "gpt_neox": ("text", {}), "llama": ("text", LLAMA), "mamba": ("text", {"state_size": 4}),
    "mistral": ("text", LLAMA), "mixtral": ("text", LLAMA | {"num_local_experts": 4}),
    "modernbert-decoder": ("bytes", {"bos_token_id": 2, "eos_token_id": 3}), "olmo2": ("text", {}),
    "openai-gpt": ("text", {"n_layer": 2, "n_head": 4}),
    "opt": ("text", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}), "phi": ("text", {}),
    "qwen2": ("text", LLAMA), "qwen3": ("text", LLAMA),
    "qwen3_moe": ("text", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "smollm3": ("text", LLAMA),
}  # fmt: skip
OTHERS = {  # of another make: refused
    "bart": ("bytes", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                       "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
    "clip": ("words", {}), "mt5": ("words", T5), "t5": ("words", T5), "vit": ("words", {}),
}  # fmt: skip
KINDS = ENCODERS | DECODERS | OTHERS

# What makes an image model tiny, by the names that configurations have for it: at most so much, or so much a
# stage.
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": [1, 2, 4, 4], "intermediate_size": 64,
    "image_size": 64, "patch_size": 16, "vocab_size": 99, "projection_dim": 16, "num_key_value_heads": 4,
    "head_dim": 8, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4],
    "hidden_sizes": [8, 16, 24, 32], "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
# What some need besides; None: they stay as they are.
SMALL_NET = {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 64}
MORE = {
    "align": {"vision_config": SMALL_NET}, "bit": {"num_groups": 4, "embedding_size": 8},
    "donut-swin": {"window_size": 2}, "edgetam": None, "edgetam_vision_model": None, "efficientloftr": None,
    "efficientnet": SMALL_NET,
    "gemma3n_vision": {"architecture": "mobilenetv3_small_100"}, "maskformer-swin": {"window_size": 2},
    "kosmos-2": {"text_config": {"embed_dim": 64, "layers": 2}},
    "perceiver": {"d_latents": 32, "num_self_attends_per_block": 2}, "swin": {"window_size": 2},
    "swinv2": {"window_size": 2},
}  # fmt: skip
UNBUILT = ("pp_ocrv6_medium_det",)  # their own defaults build no model in transformers 5.24
# Models of images and text whose image tower is used; the table before has all that read images alone.
TOWERS = (
    "align", "aimv2", "altclip", "blip", "blip-2", "chinese_clip", "clip", "clipseg", "flava", "gemma3",
    "groupvit", "instructblip", "internvl", "llava", "metaclip_2", "owlv2", "owlvit", "paligemma",
    "qwen2_vl", "siglip", "siglip2", "tipsv2", "vilt", "vision-text-dual-encoder", "xclip",
)  # fmt: skip
OF_TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3", "vit_little_patch16_reg1_gap_256", "vit_base_patch16_siglip_224",
    "vit_base_patch32_clip_224", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "convnext_atto", "resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite2",
    "hiera_tiny_224", "maxvit_pico_rw_256", "pvt_v2_b0", "naflexvit_base_patch16_gap",
)  # fmt: skip
TO_THE_END = ("dinov2_with_registers", "convnext", "swin", "siglip", "resnet18", "vit_tiny_patch16_224")


def build_tokenizer(kind, words, pieces=300):
    """A tokenizer of `words`, made as `KINDS` says, special tokens first: padding, if any, is 0.

    `pieces`: at most so many word pieces, of the kind "words".
    """
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    if kind == "words":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"
    names = dict(zip(tokens, special, strict=True))
    if kind == "words":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=pieces, special_tokens=special, show_progress=False)
    else:
        special, names = (["<|end|>"], {"eos_token": "<|end|>"}) if kind == "text" else (special, names)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    if kind != "text":
        ends = [(token, tokenizer.token_to_id(token)) for token in special[2:4]]
        single = f"{special[2]} $A {special[3]}"
        forms = {"single": single, "pair": f"{single} $B {special[3]}"}
        tokenizer.post_processor = processors.TemplateProcessing(**forms, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def build(model_type, folder, words):
    """Save a tiny encoder of one of `KINDS` with random weights, and a tokenizer of `words`, to `folder`."""
    tokenizer_kind, more = KINDS[model_type]
    tokenizer = build_tokenizer(tokenizer_kind, words)
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")]
    ids = {name: getattr(tokenizer, name) for name in names}
    size = {} if model_type == "funnel" else SIZE  # it has other names, and refuses these
    config = CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **size, **ids, **more})
    config.architectures = []  # funnel looks for its own here
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder):
    """A --data-dir with a few `demo` posts and as many rows of `mnre`; returns the words of train."""
    demo.write_dataset(folder / "demo", posts=(24, 8, 8))
    posts, rng = load_dataset("demo", folder).examples, random.Random(0)
    (folder / "mnre").mkdir()
    for split, examples in posts.items():
        rows = []
        for example in examples:
            head, tail = rng.sample(range(len(example.words)), 2)
            places = {"h": {"name": "", "pos": [head, head + 1]}, "t": {"name": "", "pos": [tail, tail + 1]}}
            for place in places.values():
                place["name"] = example.words[place["pos"][0]]
            relation = rng.choice(RELATIONS[:2])
            rows.append({"token": list(example.words), **places, "img_id": "1.jpg", "relation": relation})
        (folder / "mnre" / f"{split}.txt").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return [word for example in posts["train"] for word in example.words]


def try_kind(model_type, dataset, encoder, folder):
    """What became of one epoch of `train.py` with `encoder` on `dataset`, in words: "works", or why not."""
    said, run_dir = io.StringIO(), folder / f"run-{dataset}"
    flags = ["--dataset", dataset, "--data-dir", folder.parent, "--text-encoder", encoder, "--fusion", "none",
             "--max-len", 64, "--epochs", 1, "--lr", 1e-3, "--device", "cpu",
             "--run-dir", run_dir]  # fmt: skip
    try:
        with contextlib.redirect_stdout(said):
            train.main([str(flag) for flag in flags])
    except ValueError as error:
        if run_dir.exists() or "\n" in str(error):
            return f"**fails**: {type(error).__name__}: {error}"
        return "refused: " + str(error).removeprefix(f"--text-encoder {encoder}: ")
    model, config, data, posts = open_run(run_dir, "test", "cpu")
    settings = config["labels"], config["eval_batch_size"], "cpu", "float32"
    again = predict_posts(model, posts, *settings, mentions(data.examples["train"]))
    if again != list(read_predictions(run_dir / "predictions-test.jsonl")):
        return "**fails**: the run, loaded again, gives other predictions"
    result = "works" + ", left to right" * ("reads left to right" in said.getvalue())
    frozen = re.search(r"([\d,]+) frozen: .*first: encoder\.(\S+)\)", said.getvalue())
    return f"{result}; {frozen[1]} parameters frozen (first: `{frozen[2]}`)" if frozen else result


def text_row(kind, folder, words):
    """What became of a kind of text encoder with named entities, and with relations where not the same."""
    build(kind, folder / "encoder", words)
    results = [try_kind(kind, dataset, folder / "encoder", folder) for dataset in ("demo", "mnre")]
    return [results[0], "" if results[1] == results[0] else results[1]]


# --------------------------------------------------------------------------------------------- image encoders


def image_kinds():
    """Kinds of models that `AutoModel` builds and that read images alone, but for timm's."""
    for kind, names in MODEL_MAPPING_NAMES.items():
        if kind.startswith("timm"):
            continue
        model = getattr(transformers, names if isinstance(names, str) else names[0], None)
        with contextlib.suppress(ImportError):  # raised by what stands for a model that needs a library
            reads = getattr(model, "input_modalities", "")
            if tuple(reads) == ("image",) or getattr(model, "main_input_name", "") == "pixel_values":
                yield kind


def tiny_sizes(usual):
    """What makes the configuration `usual` tiny, its parts' sizes included."""
    sizes, values = {}, usual.to_dict()
    for name, size in TINY.items():
        value = values.get(name)
        stages = size if isinstance(size, list) else [size]
        if isinstance(value, list | tuple):
            most = stages + stages[-1:] * len(value)
            sizes[name] = [min(pair) for pair in zip(value, most, strict=False)]
        elif value is not None:
            sizes[name] = min(value, max(stages))
    if sizes.get("patch_size") == 14:
        sizes["patch_size"] = 16  # which divides 64
    for name in usual.sub_configs:
        part = getattr(usual, name, None)
        # Convolutional ones stay: what follows them knows their widths.
        if part is not None and (name != "backbone_config" or hasattr(part, "patch_size")):
            sizes[name] = tiny_sizes(part) | ({"model_type": part.model_type} if part.model_type else {})
    return sizes


def image_processor(kind):
    """The image processor of a kind, as its first release has it; CLIP's where it has none of its own."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {"torchvision": "CLIPImageProcessor"}
    return getattr(transformers, names.get("torchvision") or names["pil"])()


def build_image_model(kind, folder):
    """Save a tiny image model with random weights, and its image processor as it is, to `folder`."""
    more = MORE.get(kind, {})
    sizes = {} if more is None else tiny_sizes(CONFIG_MAPPING[kind]()) | more
    torch.manual_seed(0)
    AutoModel.from_config(CONFIG_MAPPING[kind](**sizes)).save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)


def build_timm(name, folder, **sizes):
    """Save a model of timm with random weights to `folder`, as timm's own are at the hub."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **sizes)
    framing = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    known = {key: model.pretrained_cfg[key] for key in framing if key in model.pretrained_cfg}
    config = {"architecture": name, "num_classes": 0, "num_features": model.num_features}
    config |= {"pretrained_cfg": known, "model_args": sizes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def usual_places(kind):
    """(pixels, states, rows of places, width) of a kind as its configuration's defaults are; nothing runs."""
    config, side = CONFIG_MAPPING[kind](), 0
    with torch.device("meta"), torch.inference_mode():
        model = AutoModel.from_config(config).eval().get_encoder("image")
        if kind in IMAGE_PROCESSOR_MAPPING_NAMES:
            side = Processed(image_processor(kind))(Image.new("RGB", (512, 512))).shape[-1]
        side = side or model.config.image_size
        states = last_states(model, torch.empty(1, 3, side, side))
    if states.ndim == 4:
        return side, states.shape[1] ** 2, states.shape[1], states.shape[3]
    before, rows = find_places(states.shape[1], side, patch_size(model))
    return side, min(1, before) + rows**2, rows, states.shape[2]


def image_row(kind, folder, words):
    """What became of an image model: [result, pixels, regions, their width, kB a photo]."""
    encoder, cache_dir, of_timm = folder / "encoder", folder / "features", kind in OF_TIMM
    if kind in UNBUILT:
        return ["not tried: its own defaults build no model", "", "", "", ""]
    if of_timm:
        build_timm(kind, encoder)
    else:
        build_image_model(kind, encoder)
    data = ["--dataset", "demo", "--data-dir", folder.parent, "--device", "cpu"]
    flags = [*data, "--cache-dir", cache_dir, "--workers", 0, "--views", 1, "--backbone", "auto"]
    flags += ["--weights", encoder] + ([] if of_timm else ["--img-size", 64])
    to_the_end = kind in TO_THE_END
    try:
        path = call(extract_features, *flags, *([] if to_the_end else ["--limit", 2]))
    except ValueError as error:
        if cache_dir.exists() or "\n" in str(error):
            raise
        message = str(error).removeprefix(f"--weights {encoder}: ").replace(str(encoder), "it")
        return [f"refused: {message}", "", "", "", ""]
    cache = FeatureCache(path)
    if to_the_end:
        run = call(train, *data, "--model", "bert-vision", "--features", path, "--fusion", "cross-attention",
                   "--text-encoder", folder.parent / "demo" / "encoder", "--epochs", 1, "--run-dir",
                   folder / "run")  # fmt: skip
        call(evaluate, "--run", run, "--image-check", "--shuffles", 1, "--device", "cpu")
        photo = folder.parent / "demo" / "images" / f"{cache.ids[0]}.jpg"
        answer = Predictor(run, "cpu", str(encoder))({"text": "Jordan today", "image": str(photo)})
        if not answer["photo"]:
            raise ValueError(f"a new post's photo was not looked at: {answer}")
    side, (rows, _), regions, width = cache.attrs["img_size"], cache.grid[0], *cache.shape[2:]
    if not of_timm:
        try:
            side, regions, rows, width = usual_places(kind)
        except Exception as error:  # some models look at their numbers, and there are none
            print(f"{kind}: {type(error).__name__} where nothing runs", file=sys.stderr)
            side = regions = rows = width = ""
    kilobytes = f"{2 * regions * width / 1000:,.0f}" if regions else ""
    places = f"{rows} x {rows}" if regions else ""
    places = f"1 + {places}" if regions and regions > rows**2 else places
    return ["works, to new posts" if to_the_end else "works", side, places, width, kilobytes]


def call(script, *flags):
    """What the `main` of a script returns; what it says is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return script.main([str(flag) for flag in flags])


# ------------------------------------------------------------------------------------------------------- main


def try_row(kind, make, folder, words, width):
    """The columns of a kind's row: what `make` says of it, or that it fails, or why it is not tried."""
    try:
        return make(kind, folder, words)
    except ImportError as error:
        result = f"not tried: {str(error).strip().splitlines()[0]}"
    except KeyError as error:
        result = f"**fails**: KeyError: {error}"
        if kind not in CONFIG_MAPPING and kind not in OF_TIMM:
            result = "not in this transformers"
    except Exception as error:  # any: it is what this script is here to find
        result = f"**fails**: {type(error).__name__}: {error}".splitlines()[0]
    return [result] + [""] * (width - 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", action="store_true", help="encoders of photos, not of text")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="print the rows of these kinds alone")
    parser.add_argument("--output", type=Path, help="default: benchmarks/VISION.md or ENCODERS.md")
    args = parser.parse_args(argv)
    make, intro, columns = text_row, INTRO, ["named entities", "relations, where not the same"]
    tables = {"Encoders": ENCODERS, "Left-to-right decoders": DECODERS, "Others": OTHERS}
    if args.images:
        make, intro, columns = image_row, INTRO_IMAGES, ["", "pixels", "regions", "width", "kB a photo"]
        tables = {"Models of images": [*image_kinds()], "Models of images and text": TOWERS, "timm": OF_TIMM}
    lines = [intro.format(torch.__version__, transformers.__version__, timm.__version__)]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        words = write_data(place)
        for title, kinds in tables.items():
            lines.append(f"\n| {title} | {' | '.join(columns)} |")
            lines.append("| --- " * (1 + len(columns)) + "|")
            for kind in args.only or kinds:
                if kind in kinds:
                    row = try_row(kind, make, place / kind, words, len(columns))
                    lines.append(f"| {kind} | {' | '.join(map(str, row))} |")
                    print(lines[-1], flush=True)
                    shutil.rmtree(place / kind, ignore_errors=True)
    if not args.only:
        output = args.output or Path("benchmarks/VISION.md" if args.images else "benchmarks/ENCODERS.md")
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any("**fails**" in line for line in lines):
        raise SystemExit(1)


INTRO = """# Text encoders tried

Written by `benchmarks/encoders.py`, torch {}, transformers {}. Each is tiny, of random weights, with a
tokenizer made on the spot: what is tried is whether its kind trains, saves and loads, not how well it does.
"works": one epoch of `train.py` on the demo data, and the run, loaded again, gives the same predictions.
"frozen": parts that nothing here uses, or that the encoder itself keeps fixed. "left to right": a word's
state knows nothing of what comes after it. "refused": in that one line, before anything is written."""

INTRO_IMAGES = """# Vision encoders tried

Written by `benchmarks/encoders.py --images`, torch {}, transformers {}, timm {}. Those of
transformers are tiny, of random weights, at 64 pixels; timm's are whole, of random weights, at their own
size. What is tried is whether `extract_features.py --backbone auto` takes a kind, not how good it is.
"works": it makes features of two demo photos. "works, to new posts": of all of them, and a run is trained
with them, checked with wrong photos and asked about a new post. "refused": in that one line, before anything
is written. Pixels, regions (1: a class token), width and kB a photo and view are those of the kind's usual
configuration, mostly its base size; empty where they cannot be told without running that."""

if __name__ == "__main__":
    command_line(main)
