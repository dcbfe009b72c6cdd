"""Which text encoders `train.py --text-encoder` takes: each kind built tiny, trained and read back.

    python benchmarks/encoders.py                 # some minutes on one core; writes benchmarks/ENCODERS.md
    python benchmarks/encoders.py --only gpt2 esm # prints these rows alone

A kind that works is trained for one epoch on a few demo posts without photos, and the run, loaded again,
gives the same predictions. What ends in anything but that or one clear line is an error, and the script ends
with status 1.
"""

import argparse
import contextlib
import io
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

import demo
import train
from data import RELATIONS
from parts.console import command_line
from parts.datasets import load_dataset
from parts.opening import open_run
from parts.posts import predict_posts
from parts.scores import mentions, read_predictions

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


def build_tokenizer(kind, words):
    """A tokenizer of `words`, made as `KINDS` says, special tokens first: padding, if any, is 0."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    if kind == "words":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"
    names = dict(zip(tokens, special, strict=True))
    if kind == "words":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
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
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND",
                        help="print the rows of these kinds alone")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("benchmarks/ENCODERS.md"))
    args = parser.parse_args(argv)
    lines = [INTRO.format(torch.__version__, transformers.__version__)]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        words = write_data(place)
        tables = ("Encoders", ENCODERS), ("Left-to-right decoders", DECODERS), ("Others", OTHERS)
        for title, kinds in tables:
            lines.append(f"\n| {title} | named entities | relations, where not the same |")
            lines.append("| --- | --- | --- |")
            for kind in args.only or kinds:
                if kind not in kinds:
                    continue
                folder, result = place / kind, ["not in this transformers", ""]
                if kind in CONFIG_MAPPING:
                    try:
                        build(kind, folder / "encoder", words)
                        datasets = "demo", "mnre"
                        result = [try_kind(kind, dataset, folder / "encoder", folder) for dataset in datasets]
                    except ImportError as error:
                        result = [f"not tried: {str(error).strip().splitlines()[0]}", ""]
                    except Exception as error:  # any: it is what this script is here to find
                        result = [f"**fails**: {type(error).__name__}: {error}".splitlines()[0], ""]
                lines.append(f"| {kind} | {result[0]} | {'' if result[1] == result[0] else result[1]} |")
                print(lines[-1], flush=True)
    if not args.only:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any("**fails**" in line for line in lines):
        raise SystemExit(1)


INTRO = """# Text encoders tried

Written by `benchmarks/encoders.py`, torch {}, transformers {}. Each is tiny, of random weights, with a
tokenizer made on the spot: what is tried is whether its kind trains, saves and loads, not how well it does.
"works": one epoch of `train.py` on the demo data, and the run, loaded again, gives the same predictions.
"frozen": parts that nothing here uses, or that the encoder itself keeps fixed. "left to right": a word's
state knows nothing of what comes after it. "refused": in that one line, before anything is written."""

if __name__ == "__main__":
    command_line(main)
