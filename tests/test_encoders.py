"""Kinds of text encoders, built tiny here: what they save, what trains, how their tokenizers cut words."""

import copy
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import Slow
from encoders import KINDS, SIZE, build, build_tokenizer
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AddedToken, AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers import PreTrainedTokenizerFast

import train
from data import RELATIONS, RelationExample
from encoding import MARKERS, PROBE, collate, encode, special_ends, split_pieces, text_pieces
from parts.datasets import load_dataset
from parts.opening import open_run
from parts.posts import predict_posts
from parts.run_files import load_run
from parts.scores import mentions, read_predictions
from parts.text_encoder import load_text_encoder, load_tokenizer
from parts import text_encoder

TWEETS = (
    "so excited about Paris today ! | RT @fan : BBC again 😍😍 | don't stop thinking about #StarWars2016 ,"
    " it's GREAT ...\n"
    '    | naïve café-goers ( x2 ) http://t.co/Ab1cD | they’re GO!! & "quoted" | a'
    " | 30pts 4 KD's team 💪🏽 | : ) | Zürich 東京 дом"
)
WORDS = [*TWEETS.split(), *PROBE]
SENTENCES = [random.Random(i).choices(WORDS, k=1 + i % 14) for i in range(60)]
PROJECT = Path(__file__).parents[1]


def encoder_of(kind, folder):
    """A folder with a tiny encoder of one of `KINDS`."""
    build(kind, folder, WORDS)
    return folder


def run(data_dir, encoder, run_dir, *more):
    """Train on the demo posts, text only; returns the run folder."""
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--text-encoder", encoder, "--fusion", "none",
             "--max-len", 64, "--epochs", 2, "--lr", 1e-3, "--run-dir", run_dir, *more]  # fmt: skip
    return train.main([str(flag) for flag in flags])


def answers_again(run_dir):
    """(what a run answers when it is loaded again, what it answered when it was trained)."""
    loaded, config, dataset, posts = open_run(run_dir, "test", "cpu")
    known = mentions(dataset.examples["train"])
    again = predict_posts(loaded, posts, config["labels"], 12, "cpu", "float32", known)
    return again, list(read_predictions(run_dir / "predictions-test.jsonl"))


# ------------------------------------------------------------------------------------------ weights and parts


def views_of_one_block(encoder):
    """Make query, key and value weights of a BERT parts of one tensor, as transformers loads GTE's."""
    for layer in encoder.encoder.layer:
        attention = layer.attention.self
        parts = [attention.query, attention.key, attention.value]
        for part, view in zip(parts, torch.cat([part.weight.data for part in parts]).chunk(3), strict=True):
            part.weight.data = view
    return encoder


def test_parameters_that_share_storage_train_save_and_load(data_dir, encoder_dir, tmp_path, monkeypatch):
    load = AutoModel.from_pretrained

    def sharing(*args, **kwargs):
        encoder, info = load(*args, **kwargs)
        return views_of_one_block(encoder), info

    plain = run(data_dir, encoder_dir, tmp_path / "plain")
    monkeypatch.setattr(AutoModel, "from_pretrained", sharing)
    folder = run(data_dir, encoder_dir, tmp_path / "run")
    again, answered = answers_again(folder)
    assert again == answered
    ours, expected = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


def unused_parts(folder):
    """{name} of the parameters to which transformers' own model of a folder gives no gradient."""
    encoder = AutoModel.from_pretrained(folder).train()
    encoder(input_ids=torch.randint(5, 50, (2, 20))).last_hidden_state.square().sum().backward()
    bare = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    return {name for name in bare if "pooler" not in name}


@pytest.mark.parametrize("kind", ["xlnet", "markuplm"])
def test_what_an_encoder_does_not_use_is_frozen_and_said(data_dir, tmp_path, kind, capsys):
    source = encoder_of(kind, tmp_path / kind)
    unused, before = unused_parts(source), dict(AutoModel.from_pretrained(source).named_parameters())
    folder = run(data_dir, source, tmp_path / "run")
    out, (trained, _, _) = capsys.readouterr().out, load_run(folder)
    after = dict(trained.encoder.named_parameters())
    assert unused and {name for name in after if torch.equal(after[name], before[name])} == unused
    count = sum(before[name].numel() for name in unused)
    first = next(name for name in before if name in unused)
    total = sum(parameter.numel() for parameter in after.values())
    assert f"encoder    {total:,} parameters, {total - count:,} trained at 0.001\n" in out
    assert f"\n           {count:,} frozen: " in out and f"(first: encoder.{first})\n" in out
    assert "all trained" in next(line for line in out.splitlines() if line.startswith("head"))
    again, answered = answers_again(folder)
    assert again == answered


def test_a_run_with_frozen_parts_is_stopped_and_resumed(data_dir, tmp_path, monkeypatch, capsys):
    source = encoder_of("markuplm", tmp_path / "markuplm")
    folder = run(data_dir, source, tmp_path / "run")

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:  # stopped in the first epoch, a state saved after each step
        patch.setattr(train, "score", stop)
        with pytest.raises(InterruptedError):
            run(data_dir, source, tmp_path / "stopped", "--save-every", 0)
    run(data_dir, source, tmp_path / "stopped", "--resume")
    assert "resuming   in epoch 1" in capsys.readouterr().out
    for name in ("model.safetensors", "predictions-test.jsonl", "log.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (folder / name).read_bytes()


def test_trying_an_encoder_out_leaves_no_trace(encoder_dir, monkeypatch):
    def loaded():
        torch.manual_seed(3)
        encoder, tokenizer = load_text_encoder(str(encoder_dir), "", "relation", 0.1)
        return encoder, tokenizer, torch.get_rng_state()

    encoder, tokenizer, state = loaded()
    monkeypatch.setattr(text_encoder, "try_out", lambda *_: None)
    untried, other, untried_state = loaded()
    assert torch.equal(state, untried_state) and tokenizer.get_vocab() == other.get_vocab()
    assert encoder.training == untried.training
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    expected = untried.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("kind, reason", [
    ("bros", "You have to specify bbox"), ("canine", "get_input_embeddings"), ("reformer", "not one each"),
    ("t5", "it is a t5, not a plain text encoder"),
])  # fmt: skip
def test_what_cannot_be_used_is_one_line_before_anything_is_written(data_dir, tmp_path, kind, reason):
    source = encoder_of(kind, tmp_path / kind)
    with pytest.raises(ValueError, match=f"^--text-encoder {source}: .*{reason}") as error:
        run(data_dir, source, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_configuration_with_a_value_of_a_wrong_kind_is_one_line(encoder_dir, tmp_path):
    config = json.loads((encoder_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": "x"}))
    with pytest.raises(ValueError, match="^--text-encoder .*cannot be loaded .*'vocab_size'") as error:
        load_text_encoder(str(tmp_path), "", "ner", 0.1)
    assert "\n" not in str(error.value)


def test_states_that_know_no_other_word_are_refused(encoder_dir, tmp_path):
    """As those of kinds whose attention is a CUDA kernel are, without one (MRA)."""
    source = AutoModel.from_pretrained(encoder_dir)
    for layer in source.encoder.layer:
        torch.nn.init.zeros_(layer.attention.self.value.weight)
    source.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a bert cannot be used .*no word's state knows of another"):
        load_text_encoder(str(tmp_path), "", "ner", 0.1)


def test_an_encoder_whose_pooler_is_always_called(data_dir, tmp_path):
    source = encoder_of("layoutlm", tmp_path / "encoder")
    again, answered = answers_again(run(data_dir, source, tmp_path / "run"))
    assert again == answered


def test_every_kind_has_its_row():
    rows = (PROJECT / "benchmarks" / "ENCODERS.md").read_text(encoding="utf-8")
    kinds = [line.split(" | ")[0].removeprefix("| ") for line in rows.splitlines() if line.startswith("| ")]
    assert [kind for kind in kinds if kind in KINDS] == list(KINDS) and "fails" not in rows


# ---------------------------------------------------------------------------------------------- left to right


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_is_taken_and_said(data_dir, tmp_path, kind, capsys):
    source = encoder_of(kind, tmp_path / kind)
    assert AutoTokenizer.from_pretrained(source).pad_token_id is None
    folder = run(data_dir, source, tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "left to right" in line]
    assert len(said) == 1 and said[0].startswith(f"encoder    {kind} reads left to right")
    again, answered = answers_again(folder)
    assert again == answered
    loaded, tokenizer, config = load_run(folder)
    assert tokenizer.pad_token == tokenizer.eos_token and special_ends(tokenizer) == ([], [])
    dataset = load_dataset("demo", data_dir)
    rows, _ = encode(tokenizer, dataset.examples["test"], config["labels"], 64)
    with torch.no_grad():
        together = loaded(collate(rows, tokenizer.pad_token_id)).logits  # padded with a token of meaning
        for row, logits in zip(rows, together, strict=True):
            alone = loaded(collate([row], tokenizer.pad_token_id)).logits[0]
            torch.testing.assert_close(logits[: len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_left_to_right_is_what_an_encoder_does_not_what_it_is_called(tmp_path, encoder_dir, capsys):
    for is_decoder in (False, True):
        config = BertConfig.from_pretrained(encoder_dir, is_decoder=is_decoder)
        BertModel(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(encoder_dir).save_pretrained(tmp_path)
        load_text_encoder(str(tmp_path), "", "ner", 0.1)
        assert ("bert reads left to right" in capsys.readouterr().out) == is_decoder


def test_an_encoder_without_padding_is_refused(tmp_path, encoder_dir):
    AutoModel.from_pretrained(encoder_dir).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has no padding token"):
        load_text_encoder(str(tmp_path), "", "ner", 0.1)


# ------------------------------------------------------------------------------------------------- tokenizers


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizers():
    """{name: fast tokenizer}: all but WordPiece glue a list's words, SentencePiece's kind as it is set."""
    level, split = pre_tokenizers.ByteLevel, pre_tokenizers.Split(Regex(QWEN), "isolated")
    made = {"WordPiece": build_tokenizer("words", WORDS), "byte-level": build_tokenizer("bytes", WORDS)}
    for name, pre_tokenizer in {
        "byte-level, offsets with spaces": level(add_prefix_space=False, trim_offsets=False),
        "byte-level after digits": pre_tokenizers.Sequence([
            pre_tokenizers.Digits(True), level(add_prefix_space=False)]),
        "Qwen": pre_tokenizers.Sequence([split, level(add_prefix_space=False, use_regex=False)]),
        "Qwen, prefixed": pre_tokenizers.Sequence([split, level(add_prefix_space=True, use_regex=False)]),
    }.items():
        made[name] = copy.deepcopy(made["byte-level"])
        made[name].backend_tokenizer.pre_tokenizer = pre_tokenizer
    for scheme in ("always", "first", "never"):
        letters = sorted({letter for word in WORDS for letter in word})
        pieces = [("<unk>", -9.0), ("▁", -2.0), *((c, -5.0) for c in letters), ("▁to", -3.0)]
        metaspace = Tokenizer(models.Unigram([*pieces, ("<s>", 0.0), ("</s>", 0.0)], 0))
        metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made[f"SentencePiece, {scheme}"] = PreTrainedTokenizerFast(
            tokenizer_object=metaspace, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    return made


TOKENIZERS = tokenizers()
ODD = [
    ["a", "", "b"], ["\u00a0", "b"], ["😍", "a b", "\u200b", "GO"], ["#", "#"], ["x"], ["<s>", "a"], ["", ""],
]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("slow", [False, True])
def test_words_have_the_pieces_of_their_sentence(name, slow):
    fast = TOKENIZERS[name]
    tokenizer = Slow(fast) if slow else fast
    for words, (ids, word_of) in zip(SENTENCES, split_pieces(tokenizer, SENTENCES), strict=True):
        assert ids == fast(" ".join(words), add_special_tokens=False)["input_ids"]
        assert word_of == sorted(word_of) and set(word_of) == set(range(len(words)))
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        offsets = fast(" ".join(words), **options)["offset_mapping"]
        # Where each word ends in the sentence.
        ends = [len(" ".join(words[: n + 1])) for n in range(len(words))]
        if not slow:
            for word, (start, end) in zip(word_of, offsets, strict=True):
                assert (ends[word - 1] if word else 0) <= start and end <= ends[word]
    for words, (ids, word_of) in zip(ODD, split_pieces(tokenizer, ODD), strict=True):
        assert len(ids) == len(word_of) and word_of == sorted(word_of)
        assert set(word_of) <= set(range(len(words)))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("slow", [False, True])
def test_words_that_spell_control_tokens_are_words(name, slow):
    fast = copy.deepcopy(TOKENIZERS[name])
    fast.add_tokens([AddedToken(marker, lstrip=True, special=True) for marker in MARKERS])
    tokenizer = Slow(fast) if slow else fast
    spelled = [token for token in fast.all_special_tokens if token != fast.unk_token]
    words = ["to", *spelled, *(f"t{token}o" for token in spelled), *MARKERS, "to"]
    control = {*fast.convert_tokens_to_ids([*spelled, *MARKERS])}
    ((ids, word_of),) = split_pieces(tokenizer, [words])
    assert control.isdisjoint(ids) and word_of == sorted(word_of)
    assert set(word_of) == set(range(len(words)))
    assert control.isdisjoint(text_pieces(tokenizer, " ".join(words)))
    # Of a relation the markers around head and tail are there, and no others.
    example = RelationExample("", "", tuple(words), (1, 2), (2, len(words)), RELATIONS[0])
    (row,), _ = encode(tokenizer, [example], RELATIONS, 500)
    own = row["input_ids"][slice(*row["own"])]
    markers = [fast.convert_ids_to_tokens(i) for i in own if i in control]
    assert markers == ["[E1]", "[/E1]", "[E2]", "[/E2]"]
    for key, marker in (("head_index", "[E1]"), ("tail_index", "[E2]")):
        assert row["input_ids"][row[key]] == fast.convert_tokens_to_ids(marker)


@pytest.mark.parametrize("kind", ["modernbert", "qwen2"])
def test_pieces_are_the_same_when_a_run_is_loaded_again(tmp_path, kind):
    source, saved = encoder_of(kind, tmp_path / kind), tmp_path / "saved"
    published = AutoTokenizer.from_pretrained(source)
    _, tokenizer = load_text_encoder(str(source), "", "relation", 0.1)
    tokenizer.save_pretrained(saved)
    again = load_tokenizer(saved)
    rows = split_pieces(tokenizer, SENTENCES)
    assert rows == split_pieces(again, SENTENCES)
    sentences = [" ".join(words) for words in SENTENCES]
    assert [ids for ids, _ in rows] == published(sentences, add_special_tokens=False)["input_ids"]
    examples = [RelationExample("", "", tuple(words), (0, 1), (len(words) - 1, len(words)), RELATIONS[0])
                for words in SENTENCES]  # fmt: skip
    marked, _ = encode(again, examples, RELATIONS, 100)
    assert marked == encode(tokenizer, examples, RELATIONS, 100)[0]
    markers = set(again.convert_tokens_to_ids(list(MARKERS)))
    prefix, suffix = special_ends(again)
    for example, row in zip(examples, marked, strict=True):
        starts = [row["input_ids"][row[key]] for key in ("head_index", "tail_index")]
        assert again.convert_ids_to_tokens(starts) == ["[E1]", "[E2]"]
        inner = row["input_ids"][len(prefix) : len(row["input_ids"]) - len(suffix)]
        rest = [i for i in inner if i not in markers]
        # Between markers words keep their pieces; the first now stands after a marker and a space.
        assert rest == published(" " + " ".join(example.words), add_special_tokens=False)["input_ids"]


# As published: the file's name, what its special pieces are, and tokenizer_config.json.
ENDS = {"bos_id": 1, "eos_id": 2}
SENTENCEPIECE = {
    "deberta-v2": ("spm.model", {
        "pad_id": 0, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]",
        "unk_piece": "[UNK]", **ENDS,
    }, {"vocab_type": "spm", "do_lower_case": False}),
    "xlm-roberta": ("sentencepiece.bpe.model", ENDS, {}),
    "albert": ("spiece.model", {
        "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": "[CLS],[SEP],[MASK]",
    }, {"do_lower_case": False, "keep_accents": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_an_encoder_that_is_published_with_a_sentencepiece_file_alone(tmp_path, kind):
    (name, special, settings), model = SENTENCEPIECE[kind], io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words) for words in SENTENCES), model_writer=model, vocab_size=200,
        hard_vocab_limit=False, minloglevel=2, **special,
    )  # fmt: skip
    sizes = SIZE | KINDS[kind][1] | {"vocab_size": 200}
    AutoModel.from_config(CONFIG_MAPPING[kind](**sizes)).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    _, tokenizer = load_text_encoder(str(tmp_path), "", "relation", 0.1)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for words, (ids, _) in zip(SENTENCES, split_pieces(tokenizer, SENTENCES), strict=True):
        pieces = [reference.id_to_piece(i) for i in reference.encode(" ".join(words))]
        assert tokenizer.convert_ids_to_tokens(ids) == pieces
    spelled = tokenizer.all_special_tokens
    ((ids, word_of),) = split_pieces(tokenizer, [spelled])
    assert {*ids} & {*tokenizer.all_special_ids} <= {tokenizer.unk_token_id}
    assert {*word_of} == {*range(len(spelled))}
    tokenizer.save_pretrained(tmp_path / "run")
    assert split_pieces(load_tokenizer(tmp_path / "run"), SENTENCES) == split_pieces(tokenizer, SENTENCES)


@pytest.mark.parametrize("source, revision", [
    ("roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"), ("somebody/model", "main"),
])  # fmt: skip
def test_a_hubs_model_is_read_as_data_and_a_default_is_pinned(monkeypatch, source, revision):
    seen = []

    def read(kind):
        def from_pretrained(source, **options):
            seen.append((kind, options["revision"], options["trust_remote_code"]))
            raise OSError("no hub here")

        return from_pretrained

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(getattr(text_encoder, kind), "from_pretrained", read(kind))
    for load in (lambda: text_encoder.load_text_encoder(source, "", "ner", 0.1),
                 lambda: text_encoder.load_tokenizer(source)):  # fmt: skip
        with pytest.raises((ValueError, OSError), match="no hub here"):
            load()
    assert seen == [("AutoConfig", revision, False), ("AutoTokenizer", revision, False)]
