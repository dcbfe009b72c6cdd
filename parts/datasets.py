"""The data sets: where the files of one lie, what is read of them, which labels there are.

    dataset = load_dataset("twitter2017")          # under data/
    dataset = load_dataset("path/to/my_folder")    # train.txt, valid.txt, test.txt of one's own
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from data import NONE, RELATIONS, bio_labels, fold, photo_names, read_lines, read_mnre, read_ner, text_file
from parts.json_posts import Reader, json_posts, text_rule

# Per data set: its task and every label a release of it may hold. The original Twitter-2015 says OTHER, the
# relabelled one MISC; which of them it is, is read from its files.
DATASETS = {
    "twitter2015": ("ner", bio_labels(("LOC", "MISC", "ORG", "OTHER", "PER"))),
    "twitter2017": ("ner", bio_labels(("LOC", "MISC", "ORG", "PER"))),
    "mnre": ("relation", RELATIONS),
    "demo": ("ner", bio_labels(("LOC", "MISC", "ORG", "PER"))),
    "demo-notes": ("ner", bio_labels(("LOC", "MISC", "ORG", "PER"))),
}

# Where the public releases put things, {d} = data set, {s} = split. One release really has "mnre_val .txt".
TEXT_PLACES = [
    f"{folder}/{name}"
    for folder in ("{d}", "{d}/{d}_txt", "{d}_txt", "{d}/txt")
    for name in ("{s}.txt", "{d}_{s}.txt", "{d}_{s} .txt", "ours_{s}.txt")
] + ["{d}/{s}.jsonl", "{d}/{s}.json"]
# Our names of the splits -> those of files.
SPLITS = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}
# SHA-256 (16 digits) of the files as released: scores on two variants of one data set are not comparable.
VARIANTS = {
    "a6246e37aa1c8acd": "Twitter-2015 train, UMT release",
    "9dcc7f9df7331de3": "Twitter-2015 valid, UMT release",
    "edb2665b89bfe58b": "Twitter-2015 test, UMT release",
    "66c1336f27fe8545": "Twitter-2015 train, relabelled release",
    "51e003ec71c202d7": "Twitter-2015 valid, relabelled release",
    "a4ef7f191a456021": "Twitter-2015 test, relabelled release",
    "801e149e8635b19d": "Twitter-2017 train, UMT release",
    "41b5db90cb32059c": "Twitter-2017 valid, UMT release",
    "a7d9e172ae85bd3e": "Twitter-2017 test, UMT release",
    "1cc34438a00e2a2d": "MNRE train, v2",
    "c76865179b567816": "MNRE valid, v2",
    "f53c2f9b7739bea7": "MNRE test, v2",
}


@dataclass(frozen=True)
class Dataset:
    """A data set as read: `files` and `examples` by split (train, valid and, where there is one, test)."""

    name: str  # one of `DATASETS`, or the name of the user's own folder
    task: str  # "ner" or "relation"
    files: dict
    examples: dict
    labels: tuple[str, ...]  # what a model may answer, the "nothing here" label first
    notes: tuple[str, ...] = ()  # what was read otherwise than it stands there, to be said
    word_rule: str | None = None  # of parts/words.py: how texts were cut, None where posts came as words

    def image_ids(self):
        """Every photo the posts name, once, in order of first use."""
        ids = dict.fromkeys(example.image_id for split in self.examples.values() for example in split)
        return list(dict.fromkeys(name for image_id in ids for name in photo_names(image_id)))

    def fingerprints(self):
        """{split: {"file", "sha256", "variant"}}: which release of the data set this is."""
        prints = {}
        for split, path in self.files.items():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            variant = VARIANTS.get(digest[:16], "not a file of a known release")
            prints[split] = {"file": str(path), "sha256": digest, "variant": variant}
        return prints


def locate(name, data_dir):
    """(name, parent folder) of a data set: one of `DATASETS`, or the folder `name` of the user's own."""
    path = Path(name).resolve()
    return (name, data_dir) if name in DATASETS else (path.name, path.parent)


def first_existing(places, name, data_dir, split_names=("",)):
    """The first of `places` that exists under `data_dir`, or None."""
    paths = [Path(data_dir) / place.format(d=name, s=split) for place in places for split in split_names]
    return next((path for path in paths if path.exists()), None)


def file_kind(path):
    """What a file of one's own holds: "conll" lines, "mnre" rows, or JSON of "ner" or "relation" posts."""
    with text_file(path).open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(2**20)
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    # A word may be a bracket; then a label ends the line.
    labelled = re.search(r"\t(O|[A-Z]-[^\t]+)$| (O|[A-Z]-\S+)$", first)
    if labelled or not first.startswith(("{", "[")):
        return "conll"
    keys = set(re.findall(r"""["'](\w+)["']\s*:""", text if first.startswith("[") else first))
    if keys & {"h", "t"}:
        return "mnre"
    pairs = re.search(r"""["']relations["']\s*:\s*\[\s*\{""", text)
    return "relation" if "relation" in keys or pairs else "ner"


def data_task(name, data_dir="data"):
    """The task, "ner" or "relation", of one of `DATASETS`, or of the user's own, whose train file tells."""
    if name in DATASETS:
        return DATASETS[name][0]
    path = first_existing(TEXT_PLACES, *locate(name, data_dir), SPLITS["train"])
    if path is None:
        return "ner"  # `find_files` says what is missing
    return {"conll": "ner", "mnre": "relation"}.get(kind := file_kind(path), kind)


def find_files(name, data_dir):
    """{split: its file} of a data set; FileNotFoundError names what lies there if train or valid does not."""
    files = {split: first_existing(TEXT_PLACES, name, data_dir, names) for split, names in SPLITS.items()}
    for split in ("train", "valid"):
        if files[split] is None:
            folder = Path(data_dir) / name
            others = [path.name for start in SPLITS[split] for path in sorted(folder.glob(f"{start}.*"))]
            lies = f", where {', '.join(others)} is not read (write JSON lines)" if others else ""
            raise FileNotFoundError(
                f"no {split} file of {name} under {data_dir}/{lies}; put it at {folder / split}.txt or .jsonl"
                " (docs/DATA.md lists what is read) or point --data-dir at its parent folder"
            )
    return {split: path for split, path in files.items() if path is not None}


def read_own(files, task, word_rule):
    """({split: examples}, notes, rule that cut texts or None) of files of one's own, of any kind."""
    kinds = {split: file_kind(path) for split, path in files.items()}
    parsed = {split: json_posts(files[split]) for split, kind in kinds.items() if kind in ("ner", "relation")}
    posts = {split: posts for split, (posts, _) in parsed.items()}
    rule, remark = text_rule(posts.get("train", ()), task, word_rule)
    if rule is None:  # no text in train: the others tell
        rule, remark = text_rule([post for part in posts.values() for post in part], task, word_rule)
    names = files["train"].with_name("names.txt")
    names = [line.strip() for _, line in read_lines(names) if line.strip()] if names.exists() else []
    reader, examples = Reader(rule, names), {}
    notes = [remark] if remark else []
    for split, path in files.items():
        if split in posts:
            examples[split], of_split = reader.read(path, task, posts[split])
            of_split += parsed[split][1]
        else:
            of_split = []
            examples[split] = (read_ner if task == "ner" else read_mnre)(path, None, of_split)
        notes += [f"{split}: {note}" for note in of_split]
    return examples, notes, rule


def look_alike(names):
    """A line for each group of names that differ only in case or in what the eye does not see."""
    groups = {}
    for name in sorted(names):
        visible = "".join(c for c in fold(name) if c.isprintable() and c != " ")
        groups.setdefault(visible, []).append(repr(name))
    alike = [" and ".join(group) for group in groups.values() if len(group) > 1]
    return [f"{group} differ in case or in what cannot be seen; are they one?" for group in alike]


def load_dataset(name, data_dir="data", word_rule="auto"):
    """Read all splits of a data set, one of `DATASETS` under `data_dir` or a folder of the user's own.

    Train and valid must be there; FileNotFoundError says where they were sought. Labels are those of the
    release, whether train has them all or not; of one's own, those of train. `word_rule`: of parts/words.py,
    cuts posts that come as text; auto: the one that train's spans end at. ValueError for what cannot be read,
    for labels of one's own that train does not have, and for a Twitter-2015 of two releases.
    """
    task, known = data_task(name, data_dir), DATASETS[name][1] if name in DATASETS else None
    name, data_dir = locate(name, data_dir)
    files, examples, notes, rule = find_files(name, data_dir), {}, [], None
    if known is None:
        examples, notes, rule = read_own(files, task, word_rule)
    for split, path in files.items() if known else ():
        of_split = []
        examples[split] = (read_ner if task == "ner" else read_mnre)(path, known, of_split)
        notes += [f"{split}: {note}" for note in of_split]
    used = {}
    for split, part in examples.items():
        if not part:
            raise ValueError(f"{files[split]}: no posts in it; the {split} split cannot be empty")
        used[split] = {y for e in part for y in (e.labels if task == "ner" else [e.label])}
    labels = known
    if known is None and task == "ner":
        labels = bio_labels(sorted({label[2:] for label in used["train"] - {"O"}}))
    elif known is None:
        labels = (NONE, *sorted(used["train"] - {NONE}))
    elif name == "twitter2015":
        says = {kind: [path for split, path in files.items() if {f"B-{kind}", f"I-{kind}"} & used[split]]
                for kind in ("OTHER", "MISC")}  # fmt: skip
        if says["OTHER"] and says["MISC"]:
            original = f"{says['OTHER'][0]} says OTHER as the original; take all files from one of them"
            raise ValueError(f"{says['MISC'][-1]}: says MISC as the relabelled release does, {original}")
        if not says["OTHER"] and not says["MISC"]:
            notes.append("neither OTHER nor MISC occurs: taken for the original release, which says OTHER")
        labels = tuple(y for y in known if y[2:] != ("OTHER" if says["MISC"] else "MISC"))
    kinds = {y[2:] if task == "ner" else y for of_split in used.values() for y in of_split - {"O"}}
    alike, unseen = look_alike(kinds) if known is None else [], [y for y in labels if y not in used["train"]]
    for split, of_split in used.items():
        if new := of_split - set(labels):
            unknown = f"labels that train does not have: {' '.join(sorted(new))}"
            raise ValueError(f"{files[split]}: {'; '.join([f'{unknown}; correct them', *alike])}")
    if known and unseen:
        notes.append(f"train never shows {len(unseen)} of the {len(labels)} labels: {' '.join(unseen)}")
    return Dataset(name, task, files, examples, labels, (*notes, *alike), rule)
