"""The ways a text encoder can load, or fail to: its weights, tokenizer, markers, dropout, soft tokens."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from encoders import build
from safetensors.torch import load_file, save_file
from test_model import WORDS, make
from tokenizers import pre_tokenizers
from transformers import AutoModel, RobertaConfig, RobertaModel

from data import RELATIONS
from encoding import MARKERS, collate, encode
from parts.datasets import load_dataset
from parts.systems import SYSTEMS
from parts.text_encoder import check_soft_tokens, load_text_encoder, longest_input


def test_byte_level_bpe_encoder(tmp_path, data_dir):
    """RoBERTa's kind: word lists need add_prefix_space, and two positions are spent on padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġt", "Ġto"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt o\n")
    config = RobertaConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    photos = {"regions": torch.zeros(24, 1, 2048).half(), "region_mask": torch.ones(24, 1).bool()}
    for name in ("demo", "mnre"):
        dataset = load_dataset(name, data_dir)
        model, tokenizer = make(tmp_path, dataset, "film")
        assert longest_input(model.encoder, tokenizer) == 62
        rows, counts = encode(tokenizer, dataset.examples["train"], dataset.labels, 62)
        assert counts["words_without_piece"] == 0
        if name == "demo":
            example, row = dataset.examples["train"][0], rows[0]
            starts = [*row["word_starts"], len(row["input_ids"]) - 1]
            for word, start, end in zip(example.words, starts, starts[1:], strict=False):
                assert tokenizer.decode(row["input_ids"][start:end]) == f" {word}"
        assert model(collate(rows, tokenizer.pad_token_id) | photos).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 2, 8])
def test_entity_markers_start_apart(encoder_dir, data_dir, tmp_path, padded):
    """Also where an encoder has rows to spare, which nothing has trained: two, or enough for all markers."""
    source = AutoModel.from_pretrained(encoder_dir)
    trained = source.get_input_embeddings().num_embeddings
    source.resize_token_embeddings(trained + padded)
    source.get_input_embeddings().weight[trained:] = 0
    source.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder_dir / name, tmp_path)
    encoder, tokenizer = load_text_encoder(str(tmp_path), "", "relation", 0.0)
    weight, ids = encoder.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids(list(MARKERS))
    rows, norm = weight[ids], weight[:trained].norm(dim=1).median()
    assert (F.cosine_similarity(rows[:, None], rows[None], dim=-1) - torch.eye(4)).abs().max() < 0.5
    assert ((rows.norm(dim=1) > norm / 2) & (rows.norm(dim=1) < 2 * norm)).all()
    (row,), _ = encode(tokenizer, load_dataset("mnre", data_dir).examples["train"][:1], RELATIONS, 128)
    swap = dict(zip(ids, (ids[2], ids[3], ids[0], ids[1]), strict=True))  # head for tail
    sides = row["input_ids"], [swap.get(i, i) for i in row["input_ids"]]
    states, swapped = (encoder(torch.tensor([side])).last_hidden_state for side in sides)
    assert (states - swapped).norm() > 0.1 * states.norm()


def test_an_encoder_is_prepared_and_stored_again_it_stays(encoder_dir, tmp_path):
    """Its markers too; stored in half precision it trains in float32."""
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "relation", 0.25)
    assert not list(encoder.pooler.parameters()) and encoder.config.hidden_dropout_prob == 0.25
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == list(range(len(tokenizer) - 4, len(tokenizer)))
    tokenizer.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    again, _ = load_text_encoder(str(tmp_path), "", "relation", 0.0)
    assert torch.equal(again.get_input_embeddings().weight, encoder.get_input_embeddings().weight)
    encoder.half().save_pretrained(tmp_path)
    loaded, _ = load_text_encoder(str(tmp_path), "", "ner", 0.1)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("system, folder, part", [
    ("bert-resnet50", "encoder", "attention"), ("blip", "blip", "text_encoder"),
    ("blip", "blip", "crossattention"), ("vilt", "vilt", "encoder.layer"),
])  # fmt: skip
def test_an_encoder_loads_whole_or_not_at_all(data_dir, tmp_path, system, folder, part):
    shutil.copytree(data_dir / "demo" / folder, tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    lost = next(key for key in weights if part in key)
    del weights[lost]
    save_file(weights, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights missing .first: ") as error:
        load_text_encoder(str(tmp_path / "encoder"), SYSTEMS[system].checkpoint, "ner", 0.1)
    assert system != "bert-resnet50" or lost in str(error.value)


def test_a_tokenizer_that_is_not_the_encoders_is_refused(encoder_dir, tmp_path):
    shutil.copytree(encoder_dir, tmp_path / "encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="its tokenizer .* is not the encoder's|cannot be loaded"):
        load_text_encoder(str(tmp_path / "encoder"), "", "ner", 0.1)


@pytest.mark.parametrize("system, folder, message", [
    ("clip-bert", "vilt", "it is a vilt, not a plain text encoder"),
    ("clip-bert", "blip", "it is a blip, not a plain"),
    ("blip", "encoder", "it is a bert, not a blip"), ("vilt", "encoder", "it is a bert, not a vilt"),
    ("vilt", "clip", "cannot be loaded"), ("blip", "absent", "cannot be loaded"),
    ("bert-resnet50", "absent", "cannot be loaded"),
])  # fmt: skip
def test_another_kind_of_encoder_is_refused(data_dir, system, folder, message):
    for source in (str(data_dir / "demo" / folder), *(["absent/folder"] if folder == "absent" else [])):
        with pytest.raises(ValueError, match=f"--text-encoder {source}: .*{message}") as error:
            load_text_encoder(source, SYSTEMS[system].checkpoint, "ner", 0.1)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("system", ["", "blip", "vilt", "gpt2"])
def test_dropout_reaches_every_kind_of_encoder(data_dir, tmp_path, system):
    folder, checkpoint = data_dir / "demo" / (system or "encoder"), system
    if system == "gpt2":
        folder, checkpoint = tmp_path, ""
        build(system, folder, WORDS)
    encoder, _ = load_text_encoder(str(folder), checkpoint, "ner", 0.25)
    rates = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize("kind, reason", [
    ("convbert", "makes other states of embeddings, masked ones behind, than of ids"),  # its convolution
    ("ibert", "takes no embeddings in place of ids"),
    ("gpt2", "reads left to right, so no word would know of the photo"),
])  # fmt: skip
def test_an_encoder_that_cannot_read_soft_tokens_is_one_line(tmp_path, kind, reason):
    build(kind, tmp_path, WORDS)
    encoder, tokenizer = load_text_encoder(str(tmp_path), "", "ner", 0.1)
    message = f"^--fusion prefix: here, a {kind}, {reason}.*; take another --text-encoder$"
    with pytest.raises(ValueError, match=message) as error:
        check_soft_tokens(encoder, tokenizer, "here", 4)
    assert "\n" not in str(error.value)
