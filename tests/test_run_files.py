"""A run's folder read: what was saved comes back, and whatever is broken or hostile is one line."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIG
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_model import make

from parts import run_files
from parts.datasets import load_dataset
from parts.run_files import load_run, read_config
from parts.runs import save_weights
from parts.text_encoder import load_text_encoder

FEATURES = {"backbone": "resnet50", "weights": "random-1", "sha256": "0", "img_size": 64, "seed": 1}


@pytest.fixture(scope="module")
def finished(encoder_dir, data_dir, tmp_path_factory):
    """A run folder with the weights of no training."""
    folder, dataset = tmp_path_factory.mktemp("finished"), load_dataset("demo", data_dir)
    model, tokenizer = make(encoder_dir, dataset, "film")
    config = CONFIG | {"data_dir": str(data_dir), "labels": dataset.labels, "region_dim": 2048,
                       "text_encoder": str(encoder_dir), "features_made": FEATURES}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model.encoder.config.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    save_weights(model, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# What config.json of the first runs holds that is read again.
FIRST = (
    "align bottleneck cache_dir data data_dir dataset decoder dropout eval_batch_size extra extra_len"
    " features features_made fusion generated generated_made heads img_size labels max_len model notes"
    " notes_sha256 precision region_dim relevance relevance_loss relevance_median seed shuffle_notes"
    " shuffle_photos task text_encoder train_share"
).split()


def test_a_run_from_before_an_option_was_there_loads(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({key: config[key] for key in FIRST}))
    model, _, config = load_run(copied)
    assert config["word_rule"] == "twitter" and config["init"] is None and not config["standardise"]
    for key in FIRST:
        (copied / "config.json").write_text(json.dumps({k: config[k] for k in FIRST if k != key}))
        with pytest.raises(ValueError, match=f"config.json: no {key}, so not the configuration of a run"):
            read_config(copied)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_opens_as_it_was_saved_and_draws_nothing(finished):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, _, _ = load_run(finished)
    assert torch.equal(torch.get_rng_state(), state)
    saved = load_file(finished / "model.safetensors")
    assert (finished / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    # What is in no file, such as positions, is there too.
    ids = model.encoder.embeddings.position_ids[0]
    assert torch.equal(ids, torch.arange(len(ids))) and not model.training


def features(**values):
    return {"features_made": FEATURES | values}


@pytest.mark.parametrize("values, message", [
    ({"model": []}, "model must be text"), ({"max_len": "128"}, "max_len must be a whole"),
    ({"max_len": True}, "max_len must be"), ({"labels": []}, "labels must be a list of labels"),
    ({"dropout": float("nan")}, "dropout must be a number from 0 to 1"), ({"fusion": {}}, "fusion must be"),
    ({"region_dim": 10**12}, "region_dim must be"), ({"align": {"local": "1"}}, "align must be"),
    (features(backbone=1), "features_made must be what a feature file says of itself"),
    (features(img_size=10**9), "features_made must be"), (features(backbone="own"), "features_made must be"),
    (features(img_size=None), "features_made must be"), ({"features_made": None}, "features_made is missing"),
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


def lose_tokenizer(run):
    for path in (run / "encoder").glob("tokenizer*"):
        path.unlink()


def of_json(name, **values):
    return lambda run: change(run / name, **values)


def of_size(name, size):
    return lambda run: os.truncate(run / name, size)


def of_weights(harm):
    """Harm done to the weights {name: tensor} of a run."""

    def rewrite(run):
        weights = load_file(run / "model.safetensors")
        save_file({name: harm(name, tensor) for name, tensor in weights.items()}, run / "model.safetensors")

    return rewrite


def long_header(run):
    raw = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes((2**24 + 1).to_bytes(8, "little") + raw[8:])


@pytest.mark.parametrize("harm, error, message", [
    (lambda run: (run / "config.json").unlink(), FileNotFoundError, "no config.json"),
    (lambda run: (run / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
    (lose_tokenizer, ValueError, ".*its tokenizer .* is not the encoder's"),
    (of_json("encoder/tokenizer_config.json", vocab_file="/etc/hostname"), ValueError, ".*is outside of it"),
    (of_json("encoder/tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
     ValueError, "the run does not load "),  # its library breaks down on it
    (of_size("encoder/tokenizer.json", 2**26 + 1), ValueError, "over 67,108,864 bytes"),
    (of_size("encoder/config.json", 2**20 + 1), ValueError, ".*over 1,048,576 bytes"),
    (of_json("config.json", max_len=10**6), ValueError, ".*max_len is 1000000, and its encoder takes"),
    (long_header, ValueError, ".*model.safetensors says over 16,777,216 bytes of itself"),
    (of_weights(lambda _, tensor: tensor.to(torch.int8)), ValueError, ".* is of type I8 in model.safeten"),
    (of_weights(lambda name, tensor: tensor.index_fill(0, torch.tensor([1]), math.nan)
                if name == "head.linear.weight" else tensor),
     ValueError, ".*head.linear.weight has numbers that are not finite"),
])  # fmt: skip
def test_what_else_may_be_wrong_with_a_run_is_one_line(copied, harm, error, message):
    harm(copied)
    with pytest.raises(error, match=f"^{copied}[^:]*: {message}") as caught:
        load_run(copied)
    assert "\n" not in str(caught.value)


def test_a_run_without_its_encoder_asks_no_hub(copied, monkeypatch):
    shutil.rmtree(copied / "encoder")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=f"^{copied}: no encoder/config.json"):
        load_run(copied)


@pytest.mark.parametrize("key, value, name", [
    ("fusion", "add", "fusion add"), ("model", "mine", "model mine"),
    ("align", {"near": 1}, "alignment near"),
])  # fmt: skip
def test_a_run_of_a_layer_that_is_not_registered_says_so(copied, key, value, name):
    """Its scores can be read all the same."""
    change(copied / "config.json", **{key: value})
    assert read_config(copied)[key] == value
    with pytest.raises(ValueError, match=f"{name} is not known here; import the script that registers it"):
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
