"""Rules that cut text into words: nothing is lost, and the one that a data set follows is found and kept."""

import contextlib
import io
import json
import re
import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from parts.run_files import read_config
from parts.words import MOST_TRIED, RULES, as_written, choose_rule, cut_words, rule_of
from predict import Predictor

# Text as typed, its words as Twitter-2015/2017 has them, and as MNRE has them.
TYPED = [
    ("RT @jehnny_b: What a day! #NewYorkMets VS #Sa…", "RT @ jehnny_b : What a day ! # NewYorkMets VS # Sa …",
     "RT @jehnny_b : What a day ! # NewYorkMets VS # Sa …"),
    ("I don't know Donald's $10,000.", "I don ' t know Donald ' s $ 10,000 .",
     "I do n't know Donald 's $ 10,000 ."),
    ("2nd, 7:30 pm (Q-polls) ...", "2 nd , 7 : 30 pm ( Q - polls ) . . .", "2nd , 7:30 pm ( Q - polls ) ..."),
    (".@POTUS met J. Cole in the U.S. :)", ". @ POTUS met J . Cole in the U . S . :)",
     ".@POTUS met J. Cole in the U.S. :)"),
    ("see https://t.co/aB-c?d=1, ok", "see https://t.co/aB-c?d=1 , ok", "see https://t.co/aB-c?d=1 , ok"),
    ("في نيويورك اليوم مَدينة", "في نيويورك اليوم مَدينة", "في نيويورك اليوم مَدينة"),
    ("हिन्दी 東京へ", "हिन्दी 東京へ", "हिन्दी 東京へ"),
    ("go🔥🔥👍🏽❤️", "go 🔥 🔥 👍 🏽 ❤ ️", "go 🔥 🔥 👍 🏽 ❤ ️"),
]  # fmt: skip


def words_of(text, rule, cuts=()):
    return [text[start:end] for start, end in cut_words(text, rule, cuts)]


@pytest.mark.parametrize("text, twitter, mnre", TYPED)
def test_words_are_those_of_the_data_sets(text, twitter, mnre):
    assert words_of(text, "twitter") == twitter.split(" ") and words_of(text, "mnre") == mnre.split(" ")
    assert words_of(text, "spaces") == text.split()


@pytest.mark.parametrize("rule, words", [
    ("punctuation", "I ' m at 北 京 , x2 : 5 % हिन्दी"), ("spaces", "I'm at 北京, x2: 5% हिन्दी"),
    ("characters", "I ' m a t 北 京 , x 2 : 5 % हि न् दी"),
])  # fmt: skip
def test_words_of_the_other_rules(rule, words):
    assert words_of("I'm at 北京, x2: 5% हिन्दी", rule) == words.split(" ")


@given(st.one_of(st.text(max_size=60), st.text("aZ1_@#'’.n t:/-|)(😀\u0301\u200d東", max_size=30),
                 st.sampled_from([row[0] for row in TYPED])), st.sampled_from([*RULES]))  # fmt: skip
def test_no_character_is_lost_and_words_split_no_further(text, rule):
    words = words_of(text, rule)
    assert "".join(words) == re.sub(r"\s", "", text) and not any(re.search(r"\s", word) for word in words)
    assert words_of(" ".join(words), rule) == words


@given(st.text("ab .'@1", min_size=2, max_size=20), st.data(), st.sampled_from([*RULES]))
def test_no_word_goes_across_a_cut(text, data, rule):
    cut = data.draw(st.integers(1, len(text) - 1))
    assert not any(start < cut < end for start, end in cut_words(text, rule, [cut]))
    assert "".join(words_of(text, rule, [cut])) == text.replace(" ", "")


def test_long_nonsense_is_split_in_no_time():
    started = time.perf_counter()
    for part in ("a", "@_", "x'", "www.", "A. ", "http://", "1.", "1_", "_", ".", "n't", "\u0301", "東"):
        for rule in RULES:
            assert len(cut_words(part + part[-1:] * 10**5 + part * 10**5, rule, most=2001)) <= 2001
    assert time.perf_counter() - started < 10


# ----------------------------------------------------------------------------------------- the rule of a file


@pytest.mark.parametrize("words, text", [
    ('" Go ! " he said ( twice )', '"Go!" he said (twice)'), ("# Paris , @ Ann : hi", "#Paris, @Ann: hi"),
    ("do n't , Ann 's 5 %", "don't, Ann's 5%"), ("don ' t say ' no '", "don't say' no'"),
    ("我 在 北 京 at 5 。", "我在北京 at 5。"), ("Wait . . . $ 5 ?", "Wait... $5?"),
    ("Jordan, 23", "Jordan, 23"), ("用 i O S", "用iOS"),
])  # fmt: skip
def test_text_is_put_together_as_a_person_writes_it(words, text):
    assert as_written(words.split(" ")) == text and as_written([]) == ""


SENTENCES = (
    "RT @ann: can't wait for #Paris, it's the 2nd time!", "Kevin Durant (Thunder) scored 30 - wow :)",
    "see www.x.org, \"Star Wars\" in the U.S. on 5.5.", "nothing here", "Obama's speech... so good",
)  # fmt: skip


@pytest.mark.parametrize("rule", ["twitter", "mnre", "spaces"])
def test_the_rule_that_cut_the_words_is_found(rule):
    posts = [words_of(text, rule) for text in SENTENCES]
    assert choose_rule(posts) == (rule, 1.0)
    message = f"new texts are cut by the rule {rule}, which gives 100% of train's posts back"
    assert rule_of(posts) == (rule, message)


@pytest.mark.parametrize("rule", ["punctuation", "characters"])
def test_the_rule_of_chinese_posts_is_found(rule):
    texts = ["我在北京大学读书。", "李明和王芳去了上海", "他用iPhone拍照！"]
    assert choose_rule([words_of(text, rule) for text in texts]) == (rule, 1.0)


def test_words_of_a_segmenter_follow_no_rule():
    posts = [["我", "在", "北京大学", "读书", "。"], ["李明", "和", "王芳", "去", "了", "上海"], ["好"]]
    rule, message = rule_of(posts)
    assert rule is None
    assert message.startswith("no rule cuts texts as train's posts are cut (the best, twitter,")
    assert "does 33% of them): predict.py will ask for words" in message
    message = "new texts are cut by the rule spaces, which gives 33% of train's posts back"
    assert rule_of(posts, "spaces") == ("spaces", message)


def test_of_a_huge_file_a_part_is_tried():
    posts = [words_of(text, "twitter") for text in SENTENCES] * MOST_TRIED
    started = time.perf_counter()
    assert choose_rule(posts[: MOST_TRIED // 2])[0] == "twitter"
    few = time.perf_counter() - started
    assert choose_rule(posts)[0] == "twitter" and time.perf_counter() - started < 6 * few + 0.5


@pytest.fixture(scope="module")
def spaced(tmp_path_factory, encoder_dir):
    """(run on posts that `str.split` cut, what it said, texts of valid): "Paris!" is one word."""
    root = tmp_path_factory.mktemp("words")
    names = {"Jordan": "PER", "Paris": "LOC", "Google": "ORG", "Grammys": "MISC"}
    templates = "so excited about {}!", "@fan: {}, what a day", "no words for {}...", "it's {} again"
    posts = [(template.format(name), name) for template in templates for name in names]
    (root / "own").mkdir()
    lines = []
    for text, name in posts:
        labels = [f"B-{names[name]}" if name in word else "O" for word in text.split()]
        lines += [*map("\t".join, zip(text.split(), labels, strict=True)), ""]
    for split in ("train", "valid"):
        (root / "own" / f"{split}.txt").write_text("\n".join(lines))
    flags = ["--dataset", root / "own", "--text-encoder", encoder_dir, "--fusion", "none", "--epochs", 20]
    flags += ["--batch-size", 4, "--lr", 3e-3, "--device", "cpu", "--run-dir", root / "run"]
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        run = train.main([str(flag) for flag in flags])
    return run, console.getvalue(), [text for text, _ in posts]


def spans_of(answer):
    return [(entity["type"], entity["words"]) for entity in answer["entities"]]


def test_a_text_is_answered_as_its_words_are(spaced):
    """The rule is found in train's posts, kept with the run, and entities point into the text as it was."""
    run, said, texts = spaced
    assert "new texts are cut by the rule spaces, which gives 100% of train's posts back" in said
    assert read_config(run)["word_rule"] == "spaces"
    predictor = Predictor(run, "cpu")
    typed = predictor([{"text": text} for text in texts])
    spans = [spans_of(answer) for answer in predictor([{"words": text.split()} for text in texts])]
    assert [spans_of(answer) for answer in typed] == spans and sum(map(len, spans)) > 8
    for answer, text in zip(typed, texts, strict=True):
        for entity in answer["entities"]:
            assert text[slice(*entity["chars"])] == entity["text"] == text.split()[entity["words"][0]]


def test_a_run_of_no_rule_asks_for_words_and_one_that_knows_none_has_its_tasks(spaced, tmp_path):
    run = shutil.copytree(spaced[0], tmp_path / "run")
    path, config = run / "config.json", json.loads((run / "config.json").read_text())
    path.write_text(json.dumps(config | {"word_rule": None}))
    text, words = Predictor(run, "cpu")([{"text": "so good"}, {"words": ["so", "good"]}])
    assert "entities" in words and text["error"] == (
        "the words of the run's data follow no known rule, so no text can be cut as they are; give the post"
        " its words, or train with --word-rule"
    )
    path.write_text(json.dumps(config | {"word_rule": "by hand"}))
    with pytest.raises(ValueError, match="word_rule must be one of twitter, .*, or null, not 'by hand'"):
        Predictor(run, "cpu")
    del config["word_rule"]
    for task, rule in (("ner", "twitter"), ("relation", "mnre")):
        path.write_text(json.dumps(config | {"task": task}))
        assert read_config(run)["word_rule"] == rule


def test_a_rule_is_set_by_a_flag():
    args = train.parse_args(["--dataset", "twitter2017", "--word-rule", "spaces"])
    assert args.word_rule == "spaces"
    assert args.run_dir == "runs/twitter2017-roberta-resnet50-film-words-spaces-s1337"
    assert "words" not in train.parse_args(["--dataset", "twitter2017"]).run_dir
