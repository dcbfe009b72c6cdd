"""The model against transformers' own classes, and the ways a text encoder can fail to load."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARTS
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoImageProcessor, AutoModel, BertForTokenClassification, BlipForImageTextRetrieval
from transformers import RobertaConfig, RobertaModel, ViltForTokenClassification

from data import RELATIONS
from encoding import MARKERS, collate, encode
from features import FeatureCache
from fusion import FUSIONS
from parts.blip_vilt import Vilt
from parts.datasets import load_dataset
from parts.model import LEFT_OUT
from parts.run_files import load_run, read_config
from parts.runs import save_weights
from parts.systems import SYSTEMS
from parts.text_encoder import load_text_encoder, longest_input
from parts import run_files


def make(encoder_dir, dataset, fusion=None, system="bert-resnet50", cache=None):
    """(model with noise on all new parameters, in eval mode; tokenizer)."""
    torch.manual_seed(0)
    encoder, tokenizer = load_text_encoder(str(encoder_dir), SYSTEMS[system].checkpoint, dataset.task, 0.1)
    config = {"fusion": fusion, "task": dataset.task, "labels": dataset.labels, "heads": 8, "dropout": 0.1,
              "text_encoder": str(encoder_dir), "region_dim": cache.region_dim if cache else 2048,
              "features_made": cache.attrs if cache else None}  # fmt: skip
    config = LEFT_OUT | config
    model = SYSTEMS[system].model(encoder, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += 0.2 * torch.randn_like(parameter)
    return model, tokenizer


def make_system(system, data_dir, cache_dir, dataset):
    """(model, tokenizer, cache) of one of `PARTS`."""
    backbone, size, _, text = PARTS[system]
    cache = FeatureCache(cache_dir / f"{dataset.name}-{backbone}-{size}.h5")
    fusion = "cross-attention" if system in ("clip-bert", "bert-caption") else None
    return *make(data_dir / "demo" / text, dataset, fusion, system, cache), cache


@pytest.fixture(params=["demo", "mnre"])
def dataset(request, data_dir):
    return load_dataset(request.param, data_dir)


def test_text_only_is_transformers_token_classifier(encoder_dir, data_dir):
    dataset = load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    reference = BertForTokenClassification.from_pretrained(encoder_dir, num_labels=len(dataset.labels)).eval()
    reference.classifier.load_state_dict(model.head.linear.state_dict())
    rows, _ = encode(tokenizer, dataset.examples["test"], dataset.labels, 128)
    with torch.no_grad():
        logits = model(collate(rows, tokenizer.pad_token_id)).logits
        for i, example in enumerate(dataset.examples["test"]):
            given = tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
            expected = reference(**given).logits[0]
            for word in range(len(example.words)):
                torch.testing.assert_close(
                    logits[i, word], expected[given.word_to_tokens(word).start], rtol=1e-4, atol=1e-5
                )


@torch.no_grad()
def test_relation_head_reads_both_start_markers(encoder_dir, data_dir):
    dataset = load_dataset("mnre", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "none")
    rows, _ = encode(tokenizer, dataset.examples["valid"], dataset.labels, 128)
    logits = model(collate(rows, tokenizer.pad_token_id)).logits
    assert logits.shape == (8, len(dataset.labels))
    for row, found in zip(rows, logits, strict=True):
        ids = torch.tensor([row["input_ids"]])
        states = model.encoder(input_ids=ids).last_hidden_state[0]
        start, end = (
            row["input_ids"].index(tokenizer.convert_tokens_to_ids(marker))
            for marker in (MARKERS[0], MARKERS[2])
        )
        torch.testing.assert_close(
            found, model.head.linear(torch.cat((states[start], states[end]))), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_batched_equals_single_and_the_photo_counts(encoder_dir, dataset, cache_dir, fusion):
    model, tokenizer = make(encoder_dir, dataset, fusion)
    cache = FeatureCache(cache_dir / f"{dataset.name}-resnet50-64.h5")
    examples = dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    photos = [example.image_id for example in examples]
    pad = tokenizer.pad_token_id
    logits = model(collate(rows, pad) | cache.read(photos)).logits
    without, text_only = (
        model(collate(rows, pad) | cache.read([None] * len(rows))).logits, make(encoder_dir, dataset, "none")[0]
    )
    text_only.head.load_state_dict(model.head.state_dict())
    for i, row in enumerate(rows):
        alone = model(collate([row], pad) | cache.read(photos[i : i + 1])).logits[0]
        together = logits[i, : len(alone)] if dataset.task == "ner" else logits[i]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    # No photo is exactly text only.
    torch.testing.assert_close(without, text_only(collate(rows, pad)).logits, rtol=0, atol=0)
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
        logits = model(collate([row], tokenizer.pad_token_id)).logits
    assert logits.shape[1] == len(odd.words) and logits.isfinite().all()


def test_byte_level_bpe_encoder(tmp_path, data_dir):
    """RoBERTa's kind: word lists need add_prefix_space, and two positions are spent on padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġt", "Ġto"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt o\n")
    config = RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
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
        batch |= {
            "regions": torch.zeros(24, 1, 2048, dtype=torch.float16),
            "region_mask": torch.ones(24, 1).bool(),
        }
        assert model(batch).logits.isfinite().all()


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
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert (cosines - torch.eye(4)).abs().max() < 0.5
    assert ((rows.norm(dim=1) > norm / 2) & (rows.norm(dim=1) < 2 * norm)).all()
    row = encode(
        tokenizer, load_dataset("mnre", data_dir).examples["train"][:1], RELATIONS, 128
    )[0][0]["input_ids"]
    swap = dict(zip(ids, (ids[2], ids[3], ids[0], ids[1]), strict=True))  # head for tail
    states, swapped = (
        encoder(torch.tensor([side])).last_hidden_state for side in (row, [swap.get(i, i) for i in row])
    )
    assert (states - swapped).norm() > 0.1 * states.norm()


def test_markers_of_a_trained_encoder_stay(encoder_dir, tmp_path):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "relation", 0.0)
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer = load_text_encoder(str(tmp_path), "", "relation", 0.0)
    assert torch.equal(again.get_input_embeddings().weight, encoder.get_input_embeddings().weight)


def test_encoder_loads_whole_or_not_at_all(encoder_dir, tmp_path):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "relation", 0.25)
    assert not list(encoder.pooler.parameters()) and encoder.config.hidden_dropout_prob == 0.25
    assert encoder.embeddings.dropout.p == 0.25
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == list(range(len(tokenizer) - 4, len(tokenizer)))
    for path in encoder_dir.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(encoder_dir / "model.safetensors")
    lost = next(key for key in weights if "attention" in key)
    save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"1 weights missing .first: {lost}"):
        load_text_encoder(str(tmp_path), "", "ner", 0.1)
    for source in ("absent/folder", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=f"--text-encoder {source}: cannot be loaded") as error:
            load_text_encoder(source, "", "ner", 0.1)
        assert "\n" not in str(error.value)


def test_an_encoder_stored_in_half_precision_trains_in_float32(encoder_dir, tmp_path):
    encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "ner", 0.1)
    encoder.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_text_encoder(str(tmp_path), "", "ner", 0.1)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_tokenizer_that_is_not_the_encoders_is_refused(encoder_dir, tmp_path):
    for path in encoder_dir.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="its tokenizer .* is not the encoder's|cannot be loaded"):
        load_text_encoder(str(tmp_path), "", "ner", 0.1)


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


@pytest.fixture(scope="module")
def finished(encoder_dir, data_dir, tmp_path_factory):
    """A run folder with the weights of no training."""
    folder, dataset = tmp_path_factory.mktemp("finished"), load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "film")
    config = {"dataset": "demo", "data_dir": str(data_dir), "model": "bert-resnet50", "fusion": "film",
              "task": "ner", "labels": dataset.labels, "heads": 8, "dropout": 0.1, "max_len": 128,
              "text_encoder": str(encoder_dir), "region_dim": 2048, "seed": 1, "data": {},
              "features_made": {"backbone": "resnet50", "weights": "random-1", "sha256": "0",
                                "img_size": 64, "seed": 1}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model.encoder.config.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    save_weights(model, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_opens_as_it_was_saved_and_draws_nothing(finished):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, _, _ = load_run(finished)
    assert torch.equal(torch.get_rng_state(), state)
    saved = load_file(finished / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    # What is in no file, such as positions, is there too.
    ids = model.encoder.embeddings.position_ids[0]
    assert torch.equal(ids, torch.arange(len(ids))) and not model.training


@pytest.mark.parametrize("values, message", [
    ({"model": []}, "model must be text"), ({"max_len": "128"}, "max_len must be a whole"),
    ({"max_len": True}, "max_len must be"), ({"labels": []}, "labels must be a list of labels"),
    ({"dropout": float("nan")}, "dropout must be a number from 0 to 1"), ({"fusion": {}}, "fusion must be"),
    ({"region_dim": 10**12}, "region_dim must be"), ({"align": {"local": "1"}}, "align must be"),
    ({"features_made": {"backbone": 1}}, "features_made must be what a feature file says of itself"),
    ({"features_made": {"backbone": "clip", "weights": "none", "sha256": "0", "img_size": 10**9}},
        "features_made must be"),
    ({"features_made": {"backbone": "own", "weights": "none", "sha256": "0"}}, "features_made must be"),
    ({"features_made": {"backbone": "clip", "weights": "none", "sha256": "0", "seed": 1}},
        "features_made must be"),
])  # fmt: skip
def test_a_run_whose_configuration_has_a_value_of_a_wrong_kind(copied, values, message):
    change(copied / "config.json", **values)
    with pytest.raises(ValueError, match=f"^{copied}/config.json: {message}") as error:
        load_run(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [
    "config.json", "encoder/config.json", "encoder/tokenizer_config.json", "encoder/tokenizer.json",
    "model.safetensors",
])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"[" * 200_000, b"{", b"[1]", b"\xff\xfe\x00"])
def test_a_run_with_a_broken_file_is_one_line(copied, name, content):
    (copied / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{copied}.*(restore|train it again)") as error:
        load_run(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "encoder/tokenizer.json", "model.safetensors"])
def test_a_run_with_a_pipe_in_place_of_a_file_does_not_wait_for_it(copied, name):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(ValueError, match=f"^{copied / name}: no regular file"):
        load_run(copied)


@pytest.mark.parametrize("values", [
    {"num_hidden_layers": 1_000_000}, {"num_hidden_layers": 9000}, {"hidden_size": 10**9},
    {"vocab_size": 10**12}, {"max_position_embeddings": 10**10}, {"model_type": "timm_wrapper"},
    {"model_type": "bert2"}, {"model_type": None}, {"vocab_size": "x"}, {"num_labels": 10**9},
    {"layer_norm_eps": float("nan")},
])  # fmt: skip
def test_an_encoder_that_is_not_the_weights_is_refused_before_it_is_made(copied, values, monkeypatch):
    change(copied / "encoder" / "config.json", **values)
    build = run_files.build

    def on_meta(*args):
        assert torch.get_default_device().type == "meta"
        return build(*args)

    monkeypatch.setattr(run_files, "build", on_meta)
    with pytest.raises(ValueError, match=f"^{copied}: the run does not load .*restore") as error:
        load_run(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_named_by_an_encoders_configuration_are_not_asked_for(copied, key):
    change(copied / "encoder" / "config.json", **{key: "somebody/kernels"})
    model, _, _ = load_run(copied)
    assert model.encoder.config._attn_implementation == "sdpa"


def test_an_encoder_of_its_own_code_is_not_run(copied, monkeypatch):
    """Nor is anybody asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copied / "encoder" / "own.py").write_text("raise SystemExit('run')")
    names = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    change(copied / "encoder" / "config.json", auto_map=names)
    change(copied / "encoder" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    load_run(copied)
    with pytest.raises(ValueError, match="--text-encoder .*cannot be loaded"):
        change(copied / "encoder" / "config.json", model_type="own")
        load_text_encoder(str(copied / "encoder"), "", "ner", 0.1)


def test_a_run_without_its_encoder_asks_no_hub(copied, monkeypatch):
    shutil.rmtree(copied / "encoder")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=f"^{copied}: no encoder/config.json"):
        load_run(copied)


def test_a_tokenizer_reads_nothing_outside_of_its_folder(copied):
    change(copied / "encoder" / "tokenizer_config.json", vocab_file="/etc/hostname")
    with pytest.raises(ValueError, match="vocab_file is outside of it"):
        load_run(copied)


@pytest.mark.parametrize("size, name", [(2**26 + 1, "tokenizer.json"), (2**20 + 1, "config.json")])
def test_a_file_of_an_encoder_that_is_too_large_is_not_read(copied, size, name):
    os.truncate(copied / "encoder" / name, size)
    with pytest.raises(ValueError, match=f"{copied}/encoder/{name}: over {size - 1:,} bytes"):
        load_run(copied)


def test_a_tokenizer_that_is_not_the_encoders_does_not_load(copied):
    for path in (copied / "encoder").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="its tokenizer .* is not the encoder's"):
        load_run(copied)


def test_a_tokenizer_on_which_its_library_breaks_down_is_one_line(copied):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    change(copied / "encoder" / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(ValueError, match=f"^{copied}: the run does not load "):
        load_run(copied)


def test_more_words_than_an_encoder_takes_are_no_max_len(copied):
    change(copied / "config.json", max_len=10**6)
    with pytest.raises(ValueError, match="max_len is 1000000, and its encoder takes"):
        load_run(copied)


def test_a_run_on_photos_says_how_their_features_are_made(copied):
    change(copied / "config.json", fusion="film", features_made=None)
    with pytest.raises(ValueError, match=f"^{copied}/config.json: features_made is missing"):
        load_run(copied)


def test_weights_with_too_many_names_are_not_listed(copied):
    raw = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes((2**24 + 1).to_bytes(8, "little") + raw[8:])
    with pytest.raises(ValueError, match="model.safetensors says over 16,777,216 bytes of itself"):
        load_run(copied)


def test_weights_of_another_type_are_refused(copied):
    weights = {name: value.to(torch.int8) for name, value in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match=" is of type I8 in model.safetensors"):
        load_run(copied)


def test_weights_that_are_no_numbers_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    weights["head.linear.weight"][1, 2] = float("nan")
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match="head.linear.weight has numbers that are not finite"):
        load_run(copied)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("name", ["config.json", "encoder/tokenizer.json", "model.safetensors"])
def test_what_the_system_says_of_a_runs_file_is_not_called_broken(copied, monkeypatch, code, name):
    opened = Path.open

    def refuse(path, *args):
        if path == copied / name:
            raise OSError(code, os.strerror(code))
        return opened(path, *args)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        load_run(copied)
    assert error.value.errno == code and error.value.filename == str(copied / name)


@pytest.mark.parametrize("raised", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    PermissionError(errno.EACCES, "Permission denied", "x"), SafetensorError("denied (os error 13)"),
])  # fmt: skip
def test_no_memory_or_no_permission_while_a_run_is_loaded(copied, monkeypatch, raised):
    def fail(*_):
        raise raised

    monkeypatch.setattr(run_files, "load_model", fail)
    with pytest.raises((MemoryError, RuntimeError, PermissionError)) as error:
        load_run(copied)
    assert "train" not in str(error.value)


def test_every_system_names_its_parts():
    assert {
        name: (system.text_encoder, system.backbone, system.img_size) for name, system in SYSTEMS.items()
    } == {
        "roberta-resnet50": ("roberta-base", "resnet50", 224),
        "bert-resnet50": ("bert-base-uncased", "resnet50", 224),
        "clip-bert": ("bert-base-uncased", "clip", 224),
        "roberta-caption": ("roberta-base", "caption", 64),
        "bert-caption": ("bert-base-uncased", "caption", 64),
        "roberta-phrases": ("roberta-base", "phrases", 32),
        "bert-phrases": ("bert-base-uncased", "phrases", 32),
        "blip": ("Salesforce/blip-itm-base-coco", "blip", 384),
        "vilt": ("dandelin/vilt-b32-mlm", "pixels", 384),
    }


# ----------------------------------------------------------------------------------- CLIP+BERT, BLIP and ViLT


def open_photo(data_dir, image_id):
    return Image.open(data_dir / "demo" / "images" / f"{image_id.removesuffix('.jpg')}.jpg").convert("RGB")


def close(found, expected):
    """Equal but for the regions' float16, whose half unit in the last place is 2 ** -11."""
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@torch.no_grad()
def test_blip_is_transformers_image_text_encoder(data_dir, cache_dir, dataset):
    """The states under the head are BlipForImageTextRetrieval's, given the photo itself, a post at a time."""
    model, tokenizer, cache = make_system("blip", data_dir, cache_dir, dataset)
    folder, examples = data_dir / "demo" / "blip", dataset.examples["valid"]
    reference, processor = (
        BlipForImageTextRetrieval.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder),
    )
    reference.text_encoder.resize_token_embeddings(len(tokenizer))
    # The markers' new rows.
    reference.text_encoder.embeddings.load_state_dict(model.encoder.embeddings.state_dict())
    rows, _ = encode(tokenizer, examples, dataset.labels, 128)
    logits = model(collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])).logits
    for row, example, found in zip(rows, examples, logits, strict=True):
        pixels = processor(open_photo(data_dir, example.image_id), return_tensors="pt")["pixel_values"]
        states = reference(input_ids=torch.tensor([row["input_ids"]]), pixel_values=pixels).question_embeds
        expected = model.head(states, collate([row], 0))[0]
        close(found[: len(expected)] if dataset.task == "ner" else found, expected)


@torch.no_grad()
def test_vilt_is_transformers_token_classifier(data_dir, cache_dir, dataset):
    """Cached pixels give what its processor's give ViltForTokenClassification, for photos of any shape."""
    model, tokenizer, cache = make_system("vilt", data_dir, cache_dir, dataset)
    folder, examples = (
        data_dir / "demo" / "vilt", dataset.examples["valid"] + dataset.examples.get("test", [])
    )
    reference = ViltForTokenClassification.from_pretrained(folder, num_labels=len(dataset.labels)).eval()
    reference.resize_token_embeddings(len(tokenizer))
    reference.vilt.load_state_dict(model.encoder.state_dict(), strict=False)  # the markers' new rows
    reference.classifier = model.head.linear if dataset.task == "ner" else torch.nn.Identity()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    batch = collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])
    logits = model(batch).logits
    # All at once, padded as transformers pads words and pixels; then each post alone.
    photos = processor([open_photo(data_dir, e.image_id) for e in examples], return_tensors="pt")
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    states = reference(**text, **photos).logits
    assert len(set(map(tuple, batch["region_grid"].tolist()))) > 1 or dataset.task == "relation"
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        photo = processor(open_photo(data_dir, example.image_id), return_tensors="pt")
        alone = reference(input_ids=torch.tensor([row["input_ids"]]), **photo).logits[0]
        if dataset.task == "ner":
            for word, start in enumerate(row["word_starts"]):
                for expected in (states[i, start], alone[start]):
                    torch.testing.assert_close(logits[i, word], expected, rtol=1e-4, atol=1e-4)
        else:
            for expected in (states[i], alone):
                pair = torch.cat((expected[row["head_index"]], expected[row["tail_index"]]))
                torch.testing.assert_close(logits[i], model.head.linear(pair), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 6), (6, 10), (10, 6), (1, 7), (7, 1), (1, 1), (2, 3)])
def test_vilts_places_are_interpolated_as_transformers_does(data_dir, cache_dir, grid):
    model, _, cache = make_system("vilt", data_dir, cache_dir, load_dataset("demo", data_dir))
    assert isinstance(model, Vilt)
    h, w = grid
    torch.manual_seed(0)
    pixels = torch.randint(256, (1, 3, 16 * h, 16 * w), dtype=torch.uint8)
    patches = (
        pixels.unflatten(3, (w, 16)).unflatten(2, (h, 16)).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w, 768)
    )
    regions, mask = torch.zeros(1, 60, 768, dtype=torch.uint8), torch.zeros(1, 60, dtype=torch.bool)
    regions[:, : h * w], mask[:, : h * w] = patches, True
    found = model.embed(regions, mask, torch.tensor([grid]))
    values, ones = pixels / 255 * 2 - 1, torch.ones(1, 16 * h, 16 * w, dtype=torch.long)
    expected, _, _ = model.encoder.embeddings.visual_embed(values, ones, max_image_length=-1)
    # Where all patches are real transformers gives them in a random order: match each with its nearest.
    nearest = torch.cdist(found[0, : h * w + 1], expected[0]).argmin(1)
    assert sorted(nearest.tolist()) == list(range(h * w + 1)) and nearest[0] == 0
    torch.testing.assert_close(found[0, : h * w + 1], expected[0, nearest], rtol=1e-4, atol=1e-4)
    assert not found[:, h * w + 1 :].any()


@pytest.mark.parametrize("system", PARTS)
def test_batched_equals_single_for_every_system(data_dir, cache_dir, dataset, system):
    model, tokenizer, cache = make_system(system, data_dir, cache_dir, dataset)
    examples, pad = dataset.examples["valid"], tokenizer.pad_token_id
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    photos = [None if i % 3 == 2 else example.image_id for i, example in enumerate(examples)]
    with torch.no_grad():
        logits, weights, _ = model(collate(rows, pad) | cache.read(photos), return_weights=True)
        for i, row in enumerate(rows):
            alone = model(collate([row], pad) | cache.read(photos[i : i + 1])).logits[0]
            together = logits[i, : len(alone)] if dataset.task == "ner" else logits[i]
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
            real = weights[i, : len(row["input_ids"])]
            photo = cache.read(photos[i : i + 1])["region_mask"][0]
            assert not real[:, ~photo].any()
            if system == "vilt":
                assert (real.sum(1) < 1).all() and (real[:, photo] > 0).all()
            else:
                torch.testing.assert_close(real.sum(1), torch.full((len(real),), float(photo.any())))


@pytest.mark.parametrize("system", PARTS)
def test_a_post_without_photo_depends_on_no_image_state(data_dir, cache_dir, dataset, system):
    """Whatever stands in its place, NaN included, and it has no gradient; with a photo both are otherwise."""
    model, tokenizer, cache = make_system(system, data_dir, cache_dir, dataset)
    examples = dataset.examples["valid"]
    rows, _ = encode(tokenizer, examples, dataset.labels, 40)
    batch = collate(rows, tokenizer.pad_token_id) | cache.read([e.image_id for e in examples])
    real = batch["labels"] >= 0
    shown = model(batch).logits[real]
    batch["region_mask"] = torch.zeros_like(batch["region_mask"])
    batch["region_grid"] = torch.zeros_like(batch["region_grid"])
    expected = model(batch).logits[real]
    assert expected.isfinite().all() and (shown != expected).any(-1).all()
    torch.manual_seed(0)
    if system == "vilt":
        batch["regions"] = torch.randint_like(batch["regions"], 256)
    else:
        batch["regions"] = torch.full_like(batch["regions"], float("nan"))
    assert torch.equal(model(batch).logits[real], expected)
    batch["regions"] = batch["regions"].float().nan_to_num(1).requires_grad_()
    model(batch).logits[real].sum().backward()
    assert not batch["regions"].grad.any()


@pytest.mark.parametrize("system, folder, message", [
    ("clip-bert", "vilt", "it is a vilt, not a plain text encoder"),
    ("clip-bert", "blip", "it is a blip, not a plain"),
    ("blip", "encoder", "it is a bert, not a blip"), ("vilt", "encoder", "it is a bert, not a vilt"),
    ("vilt", "clip", "cannot be loaded"), ("blip", "absent", "cannot be loaded"),
])  # fmt: skip
def test_another_kind_of_encoder_is_refused(data_dir, system, folder, message):
    source = data_dir / "demo" / folder
    with pytest.raises(ValueError, match=f"--text-encoder {source}: .*{message}") as error:
        load_text_encoder(str(source), SYSTEMS[system].checkpoint, "ner", 0.1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "system, part", [("blip", "text_encoder"), ("blip", "crossattention"), ("vilt", "encoder.layer")]
)
def test_a_missing_encoder_weight_is_an_error(data_dir, tmp_path, system, part):
    shutil.copytree(data_dir / "demo" / system, tmp_path / system)
    weights = load_file(tmp_path / system / "model.safetensors")
    lost = next(key for key in weights if part in key)
    save_file(
        {k: v for k, v in weights.items() if k != lost},
        tmp_path / system / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="1 weights missing"):
        load_text_encoder(str(tmp_path / system), SYSTEMS[system].checkpoint, "ner", 0.1)


@pytest.mark.parametrize("system, message", [
    ("blip", "attends to image states of width 64, the feature file has 2048"),
    ("vilt", "takes patches of 768 values, the feature file has 2048"),
])  # fmt: skip
def test_features_of_another_width_are_refused(data_dir, cache_dir, system, message):
    dataset = load_dataset("demo", data_dir)
    with pytest.raises(ValueError, match=message):
        make(
            data_dir / "demo" / system, dataset, None, system, FeatureCache(cache_dir / "demo-resnet50-64.h5")
        )


def test_dropout_reaches_every_kind_of_encoder(data_dir):
    for system in ("blip", "vilt"):
        encoder, _ = load_text_encoder(str(data_dir / "demo" / system), system, "ner", 0.25)
        rates = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.25}


@pytest.mark.parametrize("key, value", [("fusion", "add"), ("model", "mine")])
def test_a_run_of_a_layer_that_is_not_registered_says_so(copied, key, value):
    """Its scores can be read all the same."""
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert read_config(copied)[key] == value
    with pytest.raises(ValueError, match=f"{key}, '{value}', is not known here; call the script that"):
        load_run(copied)
