"""The options of train.py: defaults, presets, names of runs, refusals, what another run's file sets."""

import argparse
import json

import pytest
from conftest import CONFIG, PARTS

import demo
import evaluate
import extract_features
import predict
import report
import train
import write_notes
from fusion import FUSIONS
from parts.options import parse_args
from parts.systems import PRESETS

NAME = "runs/twitter2017-roberta-resnet50"


def test_defaults_are_the_reference_settings():
    args = parse_args(["--fusion", "film", "--seed", "1337", "--device", "cpu"])
    expected = {
        "dataset": "twitter2017", "model": "roberta-resnet50", "text_encoder": "roberta-base", "epochs": 5,
        "seed": 1337, "batch_size": 8, "eval_batch_size": 12, "max_len": 128, "lr": 3e-5, "fusion_lr": 1.1e-3,
        "weight_decay": 0.01, "warmup_ratio": 0.1, "dropout": 0.1, "heads": 8, "img_size": 224,
        "augment": True, "photo_dropout": 0.1, "precision": "auto",
        "features": "features/twitter2017-resnet50-224.h5", "run_dir": f"{NAME}-film-s1337",
    }  # fmt: skip
    assert {key: getattr(args, key) for key in expected} == expected
    args = parse_args(["--dataset", "mnre", "--device", "cuda"])
    assert (args.model, args.text_encoder, args.precision) == ("bert-resnet50", "bert-base-uncased", "auto")


def test_defaults_of_the_other_systems():
    settings = {}
    for system in PARTS:
        args = parse_args(["--dataset", "mnre", "--model", system])
        settings[system] = (args.text_encoder, args.fusion, args.max_len, args.features, args.run_dir)
    bert, film = "bert-base-uncased", "film-s1337"
    assert settings == {
        "bert-caption": (bert, "film", 128, "features/mnre-caption-64.h5", f"runs/mnre-bert-caption-{film}"),
        "clip-bert": (bert, "film", 128, "features/mnre-clip-224.h5", f"runs/mnre-clip-bert-{film}"),
        "blip": ("Salesforce/blip-itm-base-coco", None, 128, "features/mnre-blip-384.h5",
                 "runs/mnre-blip-s1337"),
        "vilt": ("dandelin/vilt-b32-mlm", None, 40, "features/mnre-pixels-384.h5", "runs/mnre-vilt-s1337"),
    }  # fmt: skip


class Walked(Exception):
    """Stops a command at its parser."""


@pytest.mark.parametrize("script", [demo, evaluate, extract_features, predict, report, train, write_notes])
def test_every_option_has_a_line_of_help_that_shows_its_default(script, monkeypatch):
    def stop(parser, *_):
        raise Walked(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Walked) as walked:
        script.main([])
    (parser,) = walked.value.args
    told = [group for group in parser._action_groups if "default:" in (group.title or "")]
    needed = [group for group in parser._mutually_exclusive_groups if group.required]
    exempt = [action for group in told + needed for action in group._group_actions]
    for action in parser._actions:
        assert action.help, action.dest
        line = parser._get_formatter()._expand_help(action)
        assert action.nargs == 0 or action.required or action in exempt or "default:" in line, line
        assert "default: None" not in line and "default: []" not in line


# ------------------------------------------------------------------------------------------------ runs' names


@pytest.mark.parametrize("options, name", [
    ("--lr 1e-5", "film-lr1e-05"), ("--fusion-lr 0.01", "film-fusion-lr0.01"), ("--epochs 3", "film-epochs3"),
    ("--batch-size 32", "film-batch32"), ("--photo-dropout 0", "film-photo-dropout0"),
    ("--max-len 64", "film-len64"), ("--dropout 0.2", "film-dropout0.2"), ("--img-size 256", "film-img256"),
    ("--no-augment", "film-no-augment"), ("--precision float32", "film-float32"),
    ("--weight-decay 0", "film-decay0"), ("--warmup-ratio 0", "film-warmup0"),
    ("--max-grad-norm inf", "film-norminf"), ("--shuffle-photos", "film-shuffled"),
    ("--lr 3e-5 --max-len 128 --heads 8 --fusion cross-attention", "cross-attention"),
    ("--fusion pyramid --heads 4", "pyramid-heads4"), ("--init runs/mine-s3", "film-from-mine"),
    ("--fusion pyramid --heads 4 --decoder crf", "pyramid-crf-heads4"), ("--keep last", "film-last"),
    ("--fusion pyramid --heads 4 --decoder visual-crf", "pyramid-visual-crf-heads4"),
    ("--text-encoder roberta-base", "film"), ("--text-encoder vinai/bertweet-base", "bertweet-base-film"),
    ("--text-encoder models/mine", "mine-film"), ("--text-encoder models/mine/", "mine-film"),
    ("--align contrastive=0.1 matching=0.5 local=2", "film-contrastive0.1-matching0.5-local2"),
    ("--relevance predicted", "film-relevance-predicted"), ("--fusion prefix --heads 4", "prefix-heads4"),
    ("--relevance predicted --notes n", "film-relevance-predicted-notes"),
    ("--relevance given --notes n --relevance-loss 1", "film-relevance-given-loss1"),
    ("--align supervised=.1 --notes n --extra post", "film-supervised0.1-extra-post"),
])  # fmt: skip
def test_what_differs_from_the_defaults_is_in_a_runs_name(options, name):
    assert parse_args(options.split()).run_dir == f"{NAME}-{name}-s1337"


# --------------------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize("options, message", [
    *((f"--model {model} --fusion {fusion}", f"--fusion {fusion}: {model} has a fusion of its own")
      for model in ("blip", "vilt") for fusion in FUSIONS),
    ("--align contrastive", "invalid"), ("--align local=-1", "not from 0"),
    ("--align clip=1", "NAME is one of contrastive, local, matching, supervised"),
    ("--align local=1 local=2", "named twice"), ("--align local=1 --fusion none", "no cached regions"),
    ("--align local=1 --model vilt", "no cached regions"),
    ("--decoder visual-crf --dataset mnre", "visual-crf: labels of words are decoded together"),
    ("--decoder visual-crf --model blip", "visual-crf: blip has no cached regions"),
    ("--decoder visual-crf --model vilt", "visual-crf: vilt has no cached regions"),
    ("--decoder visual-crf --fusion none", "visual-crf: --fusion none has no cached regions"),
    ("--img-size 64 --features x.h5", "--img-size and --features: either tells which feature file"),
    ("--model bert-caption --images x", "--images: bert-caption reads captions"),
    ("--shuffle-photos --fusion none", "--fusion none is shown no photo"),
    ("--resume --overwrite", "--resume and --overwrite: one goes on with a run"),
    ("--fusion none --relevance predicted", "--relevance: --fusion none has no layer behind"),
    ("--fusion prefix --relevance predicted", "--fusion prefix has no layer behind the encoder"),
    ("--model blip --relevance predicted", "--relevance: blip has no layer"),
    ("--fusion prefix --bottleneck 1", "--bottleneck: --fusion prefix takes no codes"),
    ("--relevance given", "--relevance given: taken from notes; add --notes FILE"),
    ("--align supervised=1 --extra post", "--extra post and --align supervised: taken from notes"),
    ("--relevance-loss 1", "--relevance-loss: it teaches what --notes give"),
    ("--relevance predicted --relevance-loss 1", "--relevance-loss: it teaches"),
    ("--notes n --align contrastive=1", "--notes: nothing reads them; add --extra post, --"),
    ("--model blip --align supervised=1 --notes n", "--align: blip has no cached regions"),
    ("--fusion pyramid --generated x", "reads no second picture; choose --fusion saliency, or"),
    *((f"{flag} {value}", f"argument {flag}: ") for flag, value in (
        ("--lr", "nan"), ("--lr", "-1"), ("--photo-dropout", "7"), ("--warmup-ratio", "5"), ("--epochs", "0"),
        ("--heads", "0"), ("--max-grad-norm", "0"), ("--batch-size", "x"), ("--seed", "-1"),
        ("--relevance-loss", "-1"))),
])  # fmt: skip
def test_options_that_do_not_go_together_or_are_out_of_range_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options, unread", [
    ("--fusion none --images x --features y.h5 --heads 4", ["images", "features", "heads"]),
    ("--fusion none --img-size 64 --features y.h5", ["features"]), ("--heads 4", ["heads"]),
    *((f"--fusion {name} --heads 4", [] if layer.has_heads else ["heads"])
      for name, layer in FUSIONS.items()),
    ("--model vilt --heads 4", ["heads"]), ("--fusion bimodal --heads 4 --images x", []),
    ("--bottleneck 0.1 --heads 4", []),
])  # fmt: skip
def test_what_a_fusion_does_not_read_is_said_and_left_out_so_that_a_loop_over_fusions_works(
    options, unread, capsys
):
    args = parse_args(options.split())
    reader = "vilt" if args.model == "vilt" else f"--fusion {args.fusion}"
    assert capsys.readouterr().out.splitlines() == [f"--{name}: {reader} does not read it" for name in unread]
    assert args.heads == (4 if "heads" not in unread and "--heads" in options else 8)
    assert "heads4" not in args.run_dir or "heads" not in unread
    assert "images" not in unread or args.images is None


# ---------------------------------------------------------------------------------------------- another run's


def config_of(tmp_path, options, **values):
    """config.json of a run trained with some options."""
    facts = {key: CONFIG[key] for key in CONFIG.keys() - vars(parse_args([])).keys()}
    config = vars(parse_args(options.split())) | facts | {"precision": "float32", "word_rule": "mnre"}
    config |= values
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("options", [
    "--seed 7", "--fusion none --lr 1e-5", "--model vilt --no-augment", "--img-size 256 --shuffle-photos",
    "--features mine.h5 --fusion pyramid --decoder visual-crf --align local=0.5 contrastive=0.1",
    "--dataset mnre --text-encoder models/mine --max-grad-norm inf --save-every 5 --init runs/x-s1",
    "--system tia --notes n.jsonl --dropout 0.2", "--system dha --align none --batch-size 8",
    "--system tia --notes n.jsonl --relevance none --decoder softmax --align none",
    "--dataset demo --max-len 64 --heads 2 --fusion bimodal --bottleneck 0.1 --cache-dir f --data-dir data",
])  # fmt: skip
def test_a_config_repeats_its_run(options, tmp_path):
    """The same arguments, the same folder; what is of that run or machine alone is not taken over."""
    path = config_of(tmp_path, options, device="meta", track="os", overwrite=True)
    expected = vars(parse_args([*options.split(), "--device", "cpu"]))
    assert vars(parse_args(["--config", path, "--device", "cpu"])) == expected | {"config": path}


def test_options_that_are_given_win_over_a_config(tmp_path):
    options = "--seed 7 --lr 1e-5 --fusion bimodal --heads 4 --img-size 64 --word-rule spaces"
    path = config_of(tmp_path, options, word_rule="spaces", word_rule_auto=False)

    def args(*more):
        return parse_args(["--config", path, *more])

    assert args("--seed", "8").run_dir == f"{NAME}-bimodal-words-spaces-lr1e-05-heads4-img64-s8"
    assert args("--features", "x.h5").features == "x.h5"
    assert args("--img-size", "96").features.endswith("-96.h5")
    other = args("--model", "bert-resnet50", "--no-augment")  # its own text encoder, by default
    assert (other.text_encoder, other.augment, other.lr) == ("bert-base-uncased", False, 1e-5)
    preset = args("--system", "tia", "--notes", "n")
    assert (preset.fusion, preset.relevance, preset.heads) == (PRESETS["tia"]["fusion"], "given", 4)
    own = config_of(tmp_path, "--features x.h5")
    assert parse_args(["--config", own, "--img-size", "96"]).features.endswith("twitter2017-resnet50-96.h5")


@pytest.mark.parametrize("values, message", [
    ({"lr": "fast"}, "argument --lr: invalid float value: 'fast'; correct it, or give that option"),
    ({"augment": 3}, "argument --augment/--no-augment: ignored explicit argument '3'"),
    ({"dataset": "gone"}, "argument --dataset: 'gone' is neither a folder nor one of"),
    ({"decoder": "?"}, "decoder must be one of"), ({"fusion": "add"}, "fusion add is not known here; import"),
    ({"seed": None}, "seed must be"),
])  # fmt: skip
def test_a_config_with_a_wrong_value_is_one_line(values, message, tmp_path):
    path = config_of(tmp_path, "--seed 7", **values)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        parse_args(["--config", path])
    assert path in str(error.value) and "\n" not in str(error.value)
    if "dataset" in values:  # where it is given, nobody asks for that of the file
        assert parse_args(["--config", path, "--dataset", "mnre"]).seed == 7


def test_a_file_that_is_no_config_is_one_line(tmp_path):
    path = tmp_path / "other.json"
    for text, message in (("{", "not JSON"), ('{"model_type": "bert"}', "not the configuration of a run")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
            parse_args(["--config", str(path)])
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        parse_args(["--config", "nowhere.json"])
