"""docs/PAPER.md: its commands, as typed, in a copy of the project."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def test_the_page_from_my_posts_to_a_papers_table(tmp_path):
    """With one epoch and one seed, each command in its order; any that fails ends the page."""
    for name in ("parts", "docs"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, tmp_path)
    page = (tmp_path / "docs" / "PAPER.md").read_text()
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    env = os.environ | {"EPOCHS": "1", "SEEDS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    typed = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", commands], cwd=tmp_path, env=env, text=True,
                           capture_output=True, timeout=600)  # fmt: skip
    assert typed.returncode == 0, typed.stderr[-2000:]
    out, runs = typed.stdout, tmp_path / "runs"
    assert out.count("texts are cut by the rule twitter") == 6 and '"word_rule": "twitter"' in out
    assert "40 posts" in out and "train: 40 of 40 posts have a photo" in out
    rows = list(csv.DictReader((runs / "table.csv").open()))
    assert [row["fusion"] for row in rows].count("film") == 2 and len(rows) == 3
    assert (runs / "table.tex").read_text().count(r"\\") > 3
    assert "paired bootstrap over 10 posts" in out and "true - shuffled" in out
    config = json.loads((runs / "further" / "config.json").read_text())
    assert config["init"] == "runs/paper-film-s1" and "ledger: closed" in out
    card = (runs / "paper-colours-s1" / "README.md").read_text()
    assert "colours of 4 x 3 places" in card and "Image check, test: entity F1" in card and card in out
