"""The model against transformers' own classes, and the ways a text encoder can fail to load."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import BertForTokenClassification, RobertaConfig, RobertaModel

from data import MARKERS, FeatureCache, collate, encode, load_dataset
from fusion import FUSIONS
from model import SYSTEMS, build_model, load_run, load_text_encoder, longest_input, save_weights


def make(encoder_dir, dataset, fusion, region_dim=2048):
    """(model with noise on all new parameters, in eval mode; tokenizer)."""
    torch.manual_seed(0)
    encoder, tokenizer = load_text_encoder(str(encoder_dir), dataset.task, 0.1)
    config = {"model": "roberta-resnet50", "fusion": fusion, "task": dataset.task, "labels": dataset.labels,
              "region_dim": region_dim, "heads": 8, "dropout": 0.1}  # fmt: skip
    model = build_model(config, encoder).eval()
    with torch.no_grad():
        for part in (model.fusion, model.head):
            for parameter in part.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model, tokenizer


@pytest.fixture(params=["demo", "mnre"])
def dataset(request, data_dir):
    return load_dataset(request.param, data_dir)


def test_text_only_is_transformers_token_classifier(encoder_dir, data_dir):
    dataset = load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    reference = BertForTokenClassification.from_pretrained(encoder_dir, num_labels=len(dataset.labels)).eval()
    reference.classifier.load_state_dict(model.head.state_dict())
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    with torch.no_grad():
        logits = model(collate(rows, tokenizer.pad_token_id))
        for i, example in enumerate(dataset.examples["test"]):
            given = tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
            expected = reference(**given).logits[0]
            for word in range(len(example.words)):
                torch.testing.assert_close(logits[i, word], expected[given.word_to_tokens(word).start], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_relation_head_reads_both_start_markers(encoder_dir, data_dir):
    dataset = load_dataset("mnre", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    rows, _ = encode(tokenizer, dataset.examples["valid"], dataset.labels, 128)
    logits = model(collate(rows, tokenizer.pad_token_id))
    assert logits.shape == (8, len(dataset.labels))
    for row, found in zip(rows, logits, strict=True):
        ids = torch.tensor([row["input_ids"]])
        states = model.encoder(input_ids=ids).last_hidden_state[0]
        start, end = (row["input_ids"].index(tokenizer.convert_tokens_to_ids(marker)) for marker in (MARKERS[0], MARKERS[2]))
        torch.testing.assert_close(found, model.head(torch.cat((states[start], states[end]))), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_batched_equals_single_and_the_photo_counts(encoder_dir, dataset, cache_dir, fusion):
    model, tokenizer = make(encoder_dir, dataset, fusion)
    cache = FeatureCache(cache_dir / f"{dataset.name}-resnet50-64.h5")
    examples = dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    photos = [example.image_id for example in examples]
    pad = tokenizer.pad_token_id
    logits = model(collate(rows, pad, cache, photos))
    without, text_only = model(collate(rows, pad, cache, [None] * len(rows))), make(encoder_dir, dataset, "none")[0]
    text_only.head.load_state_dict(model.head.state_dict())
    for i, row in enumerate(rows):
        alone = model(collate([row], pad, cache, photos[i : i + 1]))[0]
        together = logits[i, : len(alone)] if dataset.task == "ner" else logits[i]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(without, text_only(collate(rows, pad)), rtol=0, atol=0)  # no photo is exactly text only
    real = collate(rows, pad)["labels"] >= 0
    assert (fusion == "none") == bool(torch.equal(logits[real], without[real]))


def test_a_word_without_a_piece_has_no_say(encoder_dir, data_dir):
    """What stands in the place of a word with no sub-token neither trains nor is answered."""
    dataset = load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    example = dataset.examples["test"][0]
    odd = type(example)(example.id, example.image_id, (*example.words, "\u200b"), (*example.labels, "B-PER"))
    (row,), counts = encode(tokenizer, [odd], dataset.labels, 128)
    assert counts["words_without_piece"] == 1 and row["word_starts"][-1] == -1 and row["labels"][-1] == -100
    with torch.no_grad():
        logits = model(collate([row], tokenizer.pad_token_id))
    assert logits.shape[1] == len(odd.words) and logits.isfinite().all()


def test_byte_level_bpe_encoder(tmp_path, data_dir):
    """RoBERTa's kind: word lists need add_prefix_space, and two positions are spent on padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġt", "Ġto"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt o\n")
    config = RobertaConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=64, pad_token_id=1)  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
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
        batch = collate(rows, tokenizer.pad_token_id)
        batch |= {"regions": torch.zeros(24, 1, 2048, dtype=torch.float16), "region_mask": torch.ones(24, 1).bool()}
        assert model(batch).isfinite().all()


def test_encoder_loads_whole_or_not_at_all(encoder_dir, tmp_path):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "relation", 0.25)
    assert encoder.pooler is None and encoder.config.hidden_dropout_prob == 0.25
    assert encoder.embeddings.dropout.p == 0.25
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == list(range(len(tokenizer) - 4, len(tokenizer)))
    for path in encoder_dir.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(encoder_dir / "model.safetensors")
    lost = next(key for key in weights if "attention" in key)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights missing .first: {lost}"):
        load_text_encoder(str(tmp_path), "ner", 0.1)
    for source in ("absent/folder", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=f"--text-encoder {source}: cannot be loaded") as error:
            load_text_encoder(source, "ner", 0.1)
        assert "\n" not in str(error.value)


def test_an_encoder_stored_in_half_precision_trains_in_float32(encoder_dir, tmp_path):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "ner", 0.1)
    encoder.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_text_encoder(str(tmp_path), "ner", 0.1)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_tokenizer_that_is_not_the_encoders_is_refused(encoder_dir, tmp_path):
    for path in encoder_dir.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="its tokenizer .* is not the encoder's|cannot be loaded"):
        load_text_encoder(str(tmp_path), "ner", 0.1)


def test_weights_are_saved_whole(encoder_dir, data_dir, tmp_path):
    model, _ = make(encoder_dir, load_dataset("demo", data_dir), "bimodal")
    save_weights(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(np.array_equal(saved[key], value) for key, value in model.state_dict().items())


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_run(tmp_path)


def test_every_system_names_its_parts():
    assert SYSTEMS["roberta-resnet50"].text_encoder == "roberta-base"
    assert SYSTEMS["bert-resnet50"].text_encoder == "bert-base-uncased"
    assert {system.backbone for system in SYSTEMS.values()} == {"resnet50"}
