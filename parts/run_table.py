"""Finished runs as a table: the seeds of a system in one row, valid beside test, the choice made on valid.

    table = run_table(["runs/mine-*"], by=("fusion_lr",), baseline="runs/mine-none-s*")
    print(*table.lines(), sep="\n")

A system is all that a run's configuration says but its seed, paths and machine. Valid chooses among systems;
test is only shown beside it.
"""

import glob
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from parts.checks import paired_bootstrap, score_of, score_title
from parts.files import check_output, replacing
from parts.run_files import predictions_file, read_config
from parts.runs import differing, system_settings
from parts.scores import gold_fingerprint, read_predictions

# Of a configuration, what follows from the options and the files they name. It is shown only where no option
# tells two rows apart.
FACTS = {"data", "features_made", "generated_made", "notes_sha256", "region_dim", "run_format", "labels"}
CONTROLS = ("shuffle_photos", "shuffle_notes")


@dataclass
class Row:
    """The runs of one system.

    `folders`: {seed: run folder}; `settings`: {name: value} of all that makes the system; `records` and
    `scores`: {split: {seed: predictions, or their score}}; `gain`: the `paired_bootstrap` over a baseline,
    with `shared`, how many seeds both have; None without; `chosen`: whether it is the best on valid.
    """

    folders: dict
    settings: dict
    records: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    gain: dict | None = None
    chosen: bool = False


@dataclass
class Table:
    """Rows in order, the names of the settings they differ in, the splits with scores, notes in words."""

    title: str
    rows: list
    keys: list
    splits: list
    notes: list

    def cells(self):
        """(header, [cells of a row]), all text."""
        gain = any(row.gain for row in self.rows)
        header = ["", *(key.replace("_", "-") for key in self.keys), "seeds", *self.splits]
        body = []
        for row in self.rows:
            scores = [spread(row.scores.get(split, {}).values()) for split in self.splits]
            count = "one seed" if len(row.folders) == 1 else str(len(row.folders))
            settings = [shown_value(row.settings.get(key)) for key in self.keys]
            body.append(["*" if row.chosen else "", *settings, count, *scores])
            if gain:
                body[-1].append(shown_gain(row.gain, len(row.folders)))
        return [*header, *(["gain [95% interval]"] if gain else [])], body

    def lines(self):
        """The table as lines of text, its notes below."""
        header, body = self.cells()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in (header, *body)]  # fmt: skip
        return [self.title, *table, *self.notes]

    def csv_rows(self):
        """Rows of numbers for a spreadsheet; the first is the header."""
        of_splits = [f"{split}{part}" for split in self.splits for part in ("", "_deviation")]
        yield [*self.keys, "seeds", *of_splits, "gain", "gain_low", "gain_high", "gain_seeds", "chosen"]
        for row in self.rows:
            scores = []
            for split in self.splits:
                values = list(row.scores.get(split, {}).values())
                scores.append(statistics.mean(values) if values else "")
                scores.append(statistics.stdev(values) if len(values) > 1 else "")
            gain = [(row.gain or {}).get(key, "") for key in ("difference", "low", "high", "shared")]
            settings = [row.settings.get(key) for key in self.keys]
            yield [*settings, len(row.folders), *scores, *gain, int(row.chosen)]


# ------------------------------------------------------------------------------------------------ run folders


def matching(pattern):
    """The folders that a name or a quoted pattern such as 'runs/x-s*' names; FileNotFoundError if none."""
    paths = [Path(pattern)] if Path(pattern).is_dir() else sorted(map(Path, glob.glob(str(pattern))))
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{pattern}: no such run folder")
    return folders


def seeds_of(pattern):
    """{seed: run folder} of the runs of one system, that a folder's name or a pattern names.

    A pattern without "shuffled" in it leaves runs on shuffled photos or notes out: '-s*' begins their names
    too. ValueError if the runs differ in more than seed, paths and machine, or two have one seed.
    """
    configs = {folder: read_config(folder) for folder in matching(pattern)}
    if len(configs) > 1 and "shuffled" not in Path(pattern).name:
        configs = {folder: config for folder, config in configs.items() if not is_control(config)}
    if not configs:
        raise FileNotFoundError(f"{pattern}: only runs on shuffled photos or notes; name them as such")
    (first, wanted), *others = configs.items()
    seeds = {wanted["seed"]: first}
    for folder, config in others:
        if other := differing(system_settings(wanted), system_settings(config)):
            raise ValueError(f"{pattern}: {first.name} and {folder.name} differ in"
                             f" {', '.join(other.values())[:300]}; name runs of one kind")  # fmt: skip
        add_seed(seeds, config["seed"], folder)
    return seeds


def is_control(config):
    """Whether a run was trained with other posts' photos or notes."""
    return any(config[key] for key in CONTROLS)


def add_seed(seeds, seed, folder):
    """Put a folder among those of its system; ValueError if its seed is there already."""
    if seed in seeds:
        raise ValueError(f"{seeds[seed]} and {folder}: one system and one seed; name one of them")
    seeds[seed] = folder


# ----------------------------------------------------------------------------------------------------- tables


def run_table(patterns, by=(), name="f1", baseline=None):
    """The `Table` of all finished runs that patterns name, scored by `name`, a key of `SCORES`.

    `by`: settings that were swept: the best on valid is marked for each of the other settings; without, one
    is marked in all. `baseline`: a run or pattern of one system; each row's gain over it is told, on test
    where there is one. ValueError if the runs were scored on other posts.
    """
    rows, notes = grouped(patterns)
    by = [key.replace("-", "_") for key in by]
    keys = setting_names(rows, by)
    rows.sort(key=lambda row: [in_order(row.settings.get(key)) for key in keys])
    splits = [split for split in ("valid", "test") if any(split in row.records for row in rows)]
    check_posts(rows, splits)
    for row in rows:
        for split, records in row.records.items():
            row.scores[split] = {seed: score_of(records[seed], name) for seed in records}
    candidates, fixed = {}, [key for key in keys if by and key not in by]
    for row in rows:
        if not is_control(row.settings):
            candidates.setdefault(str([row.settings.get(key) for key in fixed]), []).append(row)
    for group in candidates.values():
        max(group, key=lambda row: statistics.mean(row.scores["valid"].values())).chosen = len(group) > 1
    if baseline:
        notes.append(add_gains(rows, baseline, splits[-1], name))
    relations = not isinstance(next(iter(rows[0].records["valid"].values()))[0]["gold"], list)
    title = f"{score_title(name, relations)}: mean ± standard deviation over seeds"
    return Table(title, rows, keys, splits, [*reading_notes(rows, splits), *notes])


def grouped(patterns):
    """([`Row`], notes on folders that were left out) of what patterns name."""
    rows, left_out = {}, []
    for folder in dict.fromkeys(folder for pattern in patterns for folder in matching(pattern)):
        if not (folder / "config.json").exists():
            left_out.append(f"{folder} (no run)")
            continue
        config = read_config(folder)
        splits = [split for split in ("valid", "test") if split in config["data"]]
        if not all((folder / f"predictions-{split}.jsonl").exists() for split in splits):
            left_out.append(f"{folder} (not finished)")
            continue
        settings = system_settings(config)
        row = rows.setdefault(json.dumps(settings, sort_keys=True), Row({}, settings))
        add_seed(row.folders, config["seed"], folder)
        for split in splits:
            records = read_predictions(predictions_file(folder, split))
            row.records.setdefault(split, {})[config["seed"]] = records
    if not rows:
        raise ValueError(f"{' '.join(map(str, patterns))}: no finished run; {', '.join(left_out)[:300]}")
    return list(rows.values()), [f"left out: {', '.join(left_out)}"] if left_out else []


def setting_names(rows, by):
    """The settings that rows differ in, those of `by` last but for whether a row is a control."""
    values = {}
    for row in rows:
        for key, value in row.settings.items():
            values.setdefault(key, set()).add(json.dumps(value))
    several = [key for key in values if len(values[key]) > 1 or not all(key in row.settings for row in rows)]
    several.sort(key=CONTROLS.__contains__)  # whether a row is a control stands last
    options = [key for key in several if key.partition(".")[0] not in FACTS
               and not key.endswith("_parameters")]  # fmt: skip
    for key in by:
        if key not in several:
            kind = "the same in all of these runs" if key in values else "no setting of these runs"
            raise ValueError(f"--by {key}: {kind}; they differ in {', '.join(options) or 'nothing'}")
    labels = {json.dumps([row.settings.get(key) for key in options]) for row in rows}
    keys = set(by).union(options if len(labels) == len(rows) else several)
    keys = [key for key in several if key in keys]
    return sorted(keys, key=lambda key: (key in CONTROLS, key in by))


def in_order(value):
    """A sort key for values of any kind: numbers, then text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if is_number else (1, 0, "" if value is None else str(value))


def check_posts(rows, splits):
    """ValueError if two rows were scored on other posts."""
    for split in splits:
        prints = {}
        for row in rows:
            for seed, records in row.records.get(split, {}).items():
                prints.setdefault(gold_fingerprint(records), row.folders[seed])
        if len(prints) > 1:
            first, second, *_ = prints.values()
            raise ValueError(f"{first} and {second}: scored on other posts or gold labels of {split}; name"
                             " runs of one data set")  # fmt: skip


def add_gains(rows, baseline, split, name):
    """Give each row its gain over a baseline of the same seeds; returns what to say of that in words."""
    seeds = seeds_of(baseline)
    others = {seed: read_predictions(predictions_file(folder, split)) for seed, folder in seeds.items()}
    for row in rows:
        if row.folders != seeds:
            row.gain = gain_over(row.records.get(split, {}), others, name)
    first = next(iter(others.values()))
    unit = "posts" if isinstance(first[0]["gold"], list) else "photos"
    return (f"gain: over {Path(baseline).name} on {split}, paired bootstrap over its {unit}, the same seeds"
            " on both sides (n, where some lack); an interval that holds 0 tells nothing apart")  # fmt: skip


def gain_over(runs, others, name="f1"):
    """The `paired_bootstrap` of runs against others of the same seeds, {seed: records} each, with `shared`.

    None where they have no seed in common.
    """
    shared = [seed for seed in runs if seed in others]
    if not shared:
        return None
    sides = [[side[seed] for seed in shared] for side in (runs, others)]
    return paired_bootstrap(*sides, name) | {"shared": len(shared)}


def reading_notes(rows, splits):
    """What a reader of a table has to know, in words."""
    notes = []
    if any(row.chosen for row in rows):
        notes.append("* the best on valid, which makes the choice; test is not looked at for it")
    counts = {len(row.folders) for row in rows}
    if counts == {1}:
        notes.append("one seed each: another seed may change a score by more than these differ")
    elif len(counts) > 1:
        notes.append("some rows have fewer seeds: train the same seeds of each before you choose")
    if "test" not in splits:
        notes.append("no test file: valid chose the epoch, too, so its scores are too high")
    return notes


# ------------------------------------------------------------------------------------------------------- text


def spread(values):
    """Mean ± standard deviation, as text; "" of nothing."""
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def shown_value(value):
    """A setting as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown_gain(gain, seeds):
    """A `gain_over` as text, of a row of so many `seeds`; "" where there is none."""
    if gain is None:
        return ""
    fewer = f" n={gain['shared']}" if gain["shared"] < seeds else ""
    return f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]{fewer}"


def latex(title, header, body):
    """A table as lines of LaTeX."""
    signs = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "*": "$*$"}

    def line(cells):
        return " & ".join("".join(signs.get(sign, sign) for sign in cell) for cell in cells) + r" \\"

    caption = "".join(signs.get(sign, sign) for sign in title)
    return [
        r"\begin{table}", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{'l' * len(header)}}}", r"\hline",
        line(header), r"\hline", *map(line, body), r"\hline", r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- figure

SCALE = 2  # pixels of a point
LINE = 22  # points between rows
SOFTWARE = "evaluate.py --table"  # what its pictures say of themselves


def write_figure(table, path):
    """A picture of a `Table` as PNG: a row each, valid hollow, test filled, a bar of one deviation each way.

    ValueError if a file is there that is no such picture.
    """
    check_output(path, "--png", is_figure)
    font = ImageFont.load_default(11 * SCALE)
    labels = [", ".join(f"{key.replace('_', '-')} {shown_value(row.settings.get(key))}" for key in table.keys)
              for row in table.rows]  # fmt: skip
    labels = [f"{label} {'*' if row.chosen else ''}" for label, row in zip(labels, table.rows, strict=True)]
    left = SCALE * 20 + int(max(map(font.getlength, labels)))
    right, top = left + SCALE * 320, SCALE * LINE * 2
    bottom = top + SCALE * LINE * len(labels)
    image = Image.new("RGB", (right + SCALE * 30, bottom + SCALE * LINE * 2), "white")
    pen = ImageDraw.Draw(image)

    # The scale: some five ticks of a round step.
    ends = [value for row in table.rows for scores in row.scores.values() for value in reach(scores.values())]
    low, high = min(ends), max(ends)
    step = 10 ** math.floor(math.log10(max(high - low, 1e-3) / 2))
    step *= next(factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= 6)
    low, high = math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step

    def across(value):
        return left + (value - low) / (high - low) * (right - left)

    digits = max(0, -math.floor(math.log10(step)))
    for i in range(round((high - low) / step) + 1):
        x = across(low + i * step)
        pen.line((x, top, x, bottom), "#dddddd", SCALE)
        pen.text((x, bottom + SCALE * 4), f"{low + i * step:.{digits}f}", "black", font, "ma")
    pen.text((SCALE * 10, SCALE * 8), table.title, "black", font)
    pen.text((SCALE * 10, bottom + SCALE * LINE), "filled: test; hollow: valid; bars: one standard deviation"
             " over seeds; * best on valid", "black", font)  # fmt: skip
    for i, (label, row) in enumerate(zip(labels, table.rows, strict=True)):
        pen.text((SCALE * 10, top + SCALE * LINE * (i + 0.5)), label, "black", font, "lm")
        for split, shift, fill in (("valid", 0.3, "white"), ("test", 0.7, "#1c5caa")):
            if not (values := row.scores.get(split)):
                continue
            y, (start, end) = top + SCALE * LINE * (i + shift), map(across, reach(values.values()))
            x, radius = (start + end) / 2, SCALE * 3
            pen.line((start, y, end, y), "#1c5caa", SCALE)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, "#1c5caa", SCALE)
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=about)


def reach(values):
    """(mean - deviation, mean + deviation) of the scores of some seeds."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return statistics.mean(values) - deviation, statistics.mean(values) + deviation


def is_figure(path):
    """Whether a file is a picture that `write_figure` made."""
    with open(path, "rb") as file:
        return SOFTWARE.encode() in file.read(1000)
