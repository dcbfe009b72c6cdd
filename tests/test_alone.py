"""Files that promise to work without the rest of the project do so in an empty folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
HEAVY = {"transformers", "tokenizers", "torchvision", "h5py"}
# What a stranger copies, and a first use of the first file; features.py alone may import h5py.
USES = {
    "data": """
open("train.txt", "w").write("IMGID:1\\nRT\\tO\\nKevin\\tB-PER\\n\\n")
(post,) = data.read_ner("train.txt", ("O", "B-PER"))
assert post.words == ("RT", "Kevin") and "torch" not in sys.modules
""",
    "encoding": """
rows = [{"input_ids": [1, 5, 2], "own": (1, 2), "word_starts": [1], "labels": [0]}, \
{"input_ids": [1, 2], "own": (1, 1), "word_starts": [-1], "labels": [encoding.IGNORE]}]
assert encoding.collate(rows, 0)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
""",
    "features": """
import numpy as np, os
settings = {"format": features.FORMAT}
features.create_file(features.Path("f.h5"), ["a"], np.zeros(1, np.int64), (1, 1, 2, 3), "float16", settings)
writer = features.FeatureWriter(features.Path("f.h5"), os.open("f.h5", os.O_RDWR), settings, ["a"])
writer.write(0, np.ones((1, 2, 3), np.float16), (1, 2), features.OK, "")
writer.close()
batch = features.FeatureCache("f.h5").read(["a", None])
assert batch["regions"].sum((1, 2)).tolist() == [6, 0] and batch["region_mask"].sum(1).tolist() == [2, 0]
features.write_features("own.h5", {"a": np.ones((2, 3)), "b": None})
assert features.FeatureCache("own.h5").read(["a", "b"])["regions"].sum((1, 2)).tolist() == [6, 0]
""",
    "fusion": """
for layer in fusion.FUSIONS.values():
    more = {"region_grid": torch.full((2, 2), 2)} if "region_grid" in layer.reads else {}
    fused = layer(16, 5)(text, torch.ones(2, 3).bool(), regions, torch.ones(2, 4).bool(), **more)
    assert fused.shape == text.shape and fused.isfinite().all()
""",
    "stages fusion": """
assert not stages.PhotoBias(5, 3)(regions, torch.ones(2, 4).bool()).any()
assert stages.Bottleneck(16, 5, 4)(text, torch.ones(2, 3).bool())[0].shape == text.shape
""",
    "crf": """
assert crf.Crf(3).decode(torch.eye(3)[None, :2], torch.ones(1, 2).bool())[0].tolist() == [[0, 1]]
""",
    "align": """
assert "contrastive" in align.ALIGNMENTS
""",
}  # fmt: skip


@pytest.mark.parametrize("names", USES)
def test_works_alone(names, tmp_path):
    copied = names.split()
    for name in copied:
        shutil.copy(PROJECT / f"{name}.py", tmp_path)
    foreign = (
        {path.stem for path in PROJECT.glob("*.py")} - set(copied)
        | HEAVY - ({"h5py"} if names == "features" else set())
    )
    tensors = (
        "import torch\ntext, regions = torch.randn(2, 3, 16), torch.randn(2, 4, 5)\n" * (names != "data")
    )
    script = f"""
import sys
sys.path.insert(0, ".")  # -I keeps the working folder and PYTHONPATH out
import {copied[0]}
{tensors}{USES[names]}
assert not {foreign!r} & set(sys.modules)
print({copied[0]}.__file__)
"""
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / run.stdout.strip()).resolve() == (tmp_path / f"{copied[0]}.py").resolve()
