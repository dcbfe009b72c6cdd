"""Pretrained text encoders of any kind and their tokenizers: loaded, tried out, and told what they are."""

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModel, AutoTokenizer

from encoding import MARKERS, PROBE, special_ends, split_pieces, takes_words, word_pieces
from parts.console import first_line
from parts.processes import out_of_memory

# What kinds of encoders call their rate of dropout.
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embd_pdrop",
    "attn_pdrop", "resid_pdrop",
)  # fmt: skip
# The commits of the hub's models that are defaults: what is downloaded is what it was when it was looked at.
REVISIONS = {
    "roberta-base": "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
    "bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "openai/clip-vit-base-patch32": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "Salesforce/blip-itm-base-coco": "bed8ad38cb2d04a5a4bdf2d071b3c3c0a4aa724c",
    "Qwen/Qwen2.5-VL-3B-Instruct": "66285546d2b821cf421d4f5eb2576359d3770cd3",
}
# What is raised at encoders of kinds that cannot be used.
UNUSABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def as_data(source):
    """How `from_pretrained` reads a hub's model or a folder: no code of it is run, a default is pinned."""
    return {"trust_remote_code": False, "revision": REVISIONS.get(str(source), "main")}


def load_pretrained(kind, source, option, config=None, part="", dtype=torch.float32):
    """The `part` of a transformers model of class `kind` at `source`, a hub's name or a folder, in `dtype`.

    `part` "image": the tower that reads images, of a model of one tower all of it. ValueError names the
    command line's `option` if it cannot be loaded, or a weight of the part is missing.
    """
    try:
        # dtype: some are stored as float16
        model, info = kind.from_pretrained(
            source, config=config, output_loading_info=True, dtype=dtype, **as_data(source)
        )
    except (OSError, ImportError, SafetensorError, *UNUSABLE) as error:
        reason = f"cannot be loaded ({first_line(error)}); name a local folder or a hub's model"
        raise ValueError(f"{option} {source}: {reason}") from None
    module = model.get_encoder("image") if part == "image" else model.get_submodule(part)
    name = next(name for name, other in model.named_modules() if other is module)
    missing = [key for key in info["missing_keys"] if key.startswith(name) and "pooler" not in key]
    if missing:
        lacks = f"{len(missing)} weights missing (first: {missing[0]})"
        raise ValueError(f"{option} {source}: {lacks}; wrong kind?")
    # GTE's query, key and value are loaded as views of one block: no file holds such.
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return module


def load_tokenizer(source, **more):
    """The tokenizer at `source`; RoBERTa's kind with a space before each word, as in a sentence."""
    tokenizer = AutoTokenizer.from_pretrained(source, **as_data(source), **more)
    if takes_words(tokenizer):
        return tokenizer
    spaced = AutoTokenizer.from_pretrained(source, add_prefix_space=True, **as_data(source), **more)
    # Some ignore it (ModernBERT's), or put spaces inside words too (Qwen's): `split_pieces` reads sentences.
    in_sentence = tokenizer(" " + " ".join(PROBE), add_special_tokens=False)["input_ids"]
    return spaced if word_pieces(spaced, [PROBE])[0][0] == in_sentence else tokenizer


def add_markers(encoder, tokenizer):
    """Teach a tokenizer and its encoder the entity `MARKERS`; those known already stay as they are.

    New ones start at right angles to each other and at the median length of the other embeddings.
    transformers' own start is so close to the mean embedding that head and tail markers are one vector, and a
    relation has no direction.
    """
    known, rows = tokenizer.get_vocab(), len(encoder.get_input_embeddings().weight)
    # In a sentence the space before a marker is the marker's, so that it is no piece of its own.
    markers = [AddedToken(marker, lstrip=True, special=True) for marker in MARKERS]
    tokenizer.add_tokens(markers, special_tokens=True)
    if len(tokenizer) > rows:
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = tokenizer.convert_tokens_to_ids([marker for marker in MARKERS if marker not in known])
    weight = encoder.get_input_embeddings().weight
    if new:
        with torch.no_grad():
            directions = nn.init.orthogonal_(weight.new_empty(len(new), weight.shape[1]))
            weight[new] = weight[:rows].norm(dim=1).median() * directions


def load_text_encoder(source, checkpoint, task, dropout):
    """Pretrained (encoder, tokenizer) from a hub's name or a local folder, tried out.

    `checkpoint`: the kind that a joint system wants, "blip" or "vilt"; "" for any plain text encoder.

    What the encoder does not use itself is frozen. One that reads left to right is taken, and that is said.
    ValueError if it is of another kind, cannot be used, or if a weight or the tokenizer is missing.
    """
    option = "--text-encoder"
    try:
        config = AutoConfig.from_pretrained(source, **as_data(source))
        tokenizer = load_tokenizer(source)
    except (OSError, ImportError, StrictDataclassError, *UNUSABLE) as error:
        message = first_line(error)
        if "tiktoken" in message:  # what transformers tries where it cannot read SentencePiece's files
            message = "a SentencePiece file that cannot be read; pip install sentencepiece protobuf"
        reason = f"cannot be loaded ({message}); name a local folder or a hub's model"
        raise ValueError(f"{option} {source}: {reason}") from None
    of_text = hasattr(config, "hidden_size") and not hasattr(config, "patch_size")
    plain = of_text and not config.is_encoder_decoder
    if config.model_type != checkpoint if checkpoint else not plain:
        kinds = f"it is a {config.model_type}, not a {checkpoint or 'plain text encoder'}"
        raise ValueError(f"{option} {source}: cannot be loaded ({kinds})")
    text_config = config.get_text_config()  # BLIP has two
    for name in DROPOUTS:
        if isinstance(getattr(text_config, name, None), float):
            setattr(text_config, name, dropout)
    if checkpoint == "blip":  # BlipTextModel.from_pretrained would find no weight under its name
        kind = transformers.BlipForImageTextRetrieval
        encoder = load_pretrained(kind, source, option, config, "text_encoder")
    else:
        encoder = load_pretrained(AutoModel, source, option, config)
    drop_pooler(encoder)
    try:
        vocabulary = len(tokenizer) - len(tokenizer.get_added_vocab())
        rows = len(encoder.get_input_embeddings().weight)
        if not rows / 2 <= vocabulary <= rows:
            sizes = f"({vocabulary} pieces) is not the encoder's ({rows} embeddings)"
            raise ValueError(f"its tokenizer {sizes}; are the tokenizer's files there?")
        if task == "relation":
            add_markers(encoder, tokenizer)
        elif len(tokenizer) > rows:
            encoder.resize_token_embeddings(len(tokenizer))
        if not checkpoint:  # those are given image states too
            try_out(encoder, tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError("its tokenizer has no padding token; are the tokenizer's files there?")
    except UNUSABLE as error:
        if out_of_memory(error):
            raise
        reason = f"a {config.model_type} cannot be used as a text encoder here ({first_line(error)})"
        raise ValueError(f"{option} {source}: {reason}") from None
    return encoder, tokenizer


def try_out(encoder, tokenizer):
    """Run a new encoder, on words and backwards, as training will; leave it as it was but for four things.

    Parameters that get no gradient are frozen: they are parts of the encoder that nothing here uses. Whether
    it reads left to right is seen from which states another last sub-token changes, said, and kept as
    `left_to_right`. Such a one is padded with its end token if it has no padding: what stands behind a word
    changes nothing. Raises whatever it raises.
    """
    (prefix, suffix), pieces = special_ends(tokenizer), split_pieces(tokenizer, [PROBE])[0][0]
    if len(pieces) < 4:
        raise ValueError(f"its tokenizer finds {len(pieces)} sub-tokens in {len(PROBE)} words")
    ids, encoder = torch.tensor([prefix + pieces[:16] + suffix] * 2), encoder.eval()
    # Training draws the same numbers, whatever this draws.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        states = []  # [1, T, D] each: as it is, with another first sub-token, with another last one
        for place in (None, 0, -1):
            changed = ids[:1].clone()
            if place is not None:
                changed[0, place] = (changed[0, place] + 1) % len(encoder.get_input_embeddings().weight)
            with torch.no_grad():
                output = encoder(input_ids=changed, attention_mask=torch.ones_like(changed))
            states.append(output.last_hidden_state)
        left_to_right = torch.allclose(states[2][:, :-1], states[0][:, :-1], 1e-5, 1e-5)
        if left_to_right and torch.allclose(states[1][:, 1:], states[0][:, 1:], 1e-5, 1e-5):
            raise ValueError("on this machine no word's state knows of another word")
        if tokenizer.pad_token_id is None and left_to_right:
            tokenizer.pad_token = tokenizer.eos_token
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        padded = ids.where(mask > 0, tokenizer.pad_token_id or 0)
        states = encoder(input_ids=padded, attention_mask=mask).last_hidden_state
        if states.shape != (*ids.shape, encoder.config.hidden_size):
            raise ValueError(f"{tuple(ids.shape)} sub-tokens give states {tuple(states.shape)}, not one each")
        states[mask > 0].sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    encoder.zero_grad(set_to_none=True)
    encoder.left_to_right = left_to_right
    if left_to_right:
        print(f"encoder    {encoder.config.model_type} reads left to right: a word's state knows nothing of"
              " what comes after it; expect lower scores")  # fmt: skip


def check_soft_tokens(encoder, tokenizer, source, count):
    """ValueError unless the encoder reads `count` vectors of no word behind a text, as of `stages.Prefix`.

    It must take embeddings for ids and make the same states of them, masked vectors of zero behind them or
    not. One that reads left to right would never know of what stands behind. The encoder is in eval mode.
    """
    what, other = f"--fusion prefix: {source}, a {encoder.config.model_type},", "take another --text-encoder"
    if encoder.left_to_right:
        raise ValueError(f"{what} reads left to right, so no word would know of the photo; {other}")
    (prefix, suffix), pieces = special_ends(tokenizer), split_pieces(tokenizer, [PROBE])[0][0]
    ids = torch.tensor([prefix + pieces[:16] + suffix])
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            plain = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            whole = F.pad(encoder.get_input_embeddings()(ids), (0, 0, 0, count))
            states = encoder(inputs_embeds=whole, attention_mask=F.pad(mask, (0, count))).last_hidden_state
        same = torch.allclose(states[:, : ids.shape[1]], plain, 1e-4, 1e-4)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{what} takes no embeddings in place of ids ({reason}); {other}") from None
    if not same:
        raise ValueError(f"{what} makes other states of embeddings, masked ones behind, than of ids; {other}")


def drop_pooler(encoder):
    """Take away the sentence pooler, which nothing here reads.

    Something has to stand in its place: SqueezeBERT calls it.
    """
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()


def longest_input(encoder, tokenizer):
    """How many sub-tokens, special ones included, the encoder has positions for."""
    positions = getattr(encoder.config, "max_position_embeddings", 0)
    positions = positions if positions > 0 else 10**9  # relative positions: as long as memory lasts
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa's kind counts from padding_idx + 1
        positions -= table.padding_idx + 1
    return min(positions, tokenizer.model_max_length)
