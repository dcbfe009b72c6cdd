"""How a text becomes words: by a rule with a name, the one that a data set's own words follow.

    name, share = choose_rule([post.words for post in posts])    # "twitter", 0.99
    spans = cut_words("Kevin Durant in Oakland!", name)          # [(0, 5), (6, 12), ...]
"""

import re
import unicodedata
from itertools import islice, pairwise

# A word's accents are a part of it: `\w` has no combining marks, and Hindi and Arabic write with them.
MARKS = "".join(chr(c) for c in range(0x300, 0x2000) if unicodedata.category(chr(c))[0] == "M")
W = rf"[\w{MARKS}]"
LINK = r"(?:[Hh]ttps?://|www\.)\S*[^\s.,!?;:…)\]}'\"’”]"
ENDING = rf"(?:['’](?:[sSmMdD]|re|ve|ll|RE|VE|LL)|n['’]t|N['’]T)(?!{W})"
# Chinese characters and Japanese kana: these scripts put no space between words.
UNSPACED = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
RULES = {
    # Of Twitter-2015 and Twitter-2017: links whole; "#", "@", "'" and every dot apart; letters apart from the
    # digits before them ("2 nd").
    "twitter": rf"{LINK} | :-?[()/] | \d+[.,]\d+ | \d+ | [^\W\d_]{W}* | \S",
    # Of MNRE: links and "@user" whole, "'s" and "n't" apart from their word, runs of dots whole, "U.S." and
    # "John J. Quinn" as they are.
    "mnre": rf"""{LINK} | \.?@\w*[^\W_] | :'?-?[()] | \.\.+ | //+ | --+ | \|\|+
        | (?:[A-Za-z]\.){{2,}} | (?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|Rep|Sen|Gov|Gen|Prof|[A-Z])\.(?=\s+\S)
        | {ENDING} | [^\W_]{W}*?(?={ENDING}) | \d+(?:[.,:/]\d+)*(?:{W}*[^\W_])?
        | [^\W_](?:['’]?{W})*(?<!_) | \S""",
    # Letters and digits together, any other character by itself, and each character of `UNSPACED`.
    "punctuation": rf"{UNSPACED} | (?:(?!{UNSPACED}){W})+ | \S",
    "spaces": r"\S+",
    "characters": rf"\S[{MARKS}]*",
}
RULES = {name: re.compile(rule, re.VERBOSE) for name, rule in RULES.items()}
OF_TASK = {"ner": "twitter", "relation": "mnre"}  # of runs that know of no rule
ENOUGH = 0.5  # share of posts that a rule must give back to be a data set's
MOST_TRIED = 2000  # posts

# A person puts no space before what closes, after what opens, and between characters of `UNSPACED`.
CLOSES = re.compile(rf"[,.!?;%…)\]}}”»、。，！？：；）」]|[:'’]\Z|{ENDING}")
OPENS = re.compile(r"[(\[{#@$£€“‘«（「]\Z")
AFTER_APOSTROPHE = re.compile(r"(?:[sSmMdDtT]|re|ve|ll|RE|VE|LL)\Z")


def cut_words(text, rule, cuts=(), most=None):
    """[(start, end)] of the words of a text by the rule of that name, the first `most` of them.

    No word goes across one of the places `cuts`.
    """
    edges = [0, *sorted(cuts), len(text)]
    words = (match.span() for a, b in pairwise(edges) for match in RULES[rule].finditer(text, a, b))
    return list(islice(words, most))


def as_written(words):
    """The text of a post as a person would write it, from its words."""
    text, quotes = "", 0
    for before, word in pairwise(["", *words]):
        quotes += word == '"'
        opened = before == '"' and (quotes - (word == '"')) % 2 == 1
        joined = opened or OPENS.match(before) or CLOSES.match(word) or (word == '"' and quotes % 2 == 0)
        joined = joined or (before in ("'", "’") and AFTER_APOSTROPHE.match(word))
        joined = joined or (re.match(UNSPACED, before[-1:]) and re.match(UNSPACED, word))
        joined = joined or re.fullmatch(r"\w{2}", before + word)  # letters one by one, as `characters` cuts
        text += word if joined or not text else f" {word}"
    return text


def share_given_back(rule, posts):
    """The share of posts, lists of words, whose words the rule makes of their text."""
    posts = posts[:: len(posts) // MOST_TRIED + 1]
    texts = [as_written(words) for words in posts]
    back = ([text[a:b] for a, b in cut_words(text, rule)] == [*words] for text, words in zip(texts, posts))
    return sum(back) / len(posts)


def choose_rule(posts):
    """(name of the rule that gives most posts their words back, the share of posts that it does)."""
    shares = {rule: share_given_back(rule, posts) for rule in RULES}
    best = max(shares, key=shares.get)
    return best, shares[best]


def rule_of(posts, name="auto"):
    """(rule that new texts are cut by, None if none fits, what to say of it) of posts, lists of words.

    `name`: the rule asked for, or "auto" for the one that fits best.
    """
    best, share = choose_rule(posts) if name == "auto" else (name, share_given_back(name, posts))
    if name == "auto" and share < ENOUGH:
        return None, (f"no rule cuts texts as train's posts are cut (the best, {best}, does {share:.0%} of"
                      " them): predict.py will ask for words, or name one with --word-rule")  # fmt: skip
    return best, f"new texts are cut by the rule {best}, which gives {share:.0%} of train's posts back"
