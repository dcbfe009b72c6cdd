"""A fusion, a loss and a system of one's own, with nothing of the project edited.

    python examples/own.py train --system mine --dataset demo
    python examples/own.py evaluate --image-check --run RUN

A copy elsewhere wants the project's folder in PYTHONPATH; a data.py beside it is not taken for the
project's. A run that needs it is read by scripts called through it.
"""

import sys
from pathlib import Path

sys.path += [sys.path.pop(0), str(Path(__file__).resolve().parents[1])]  # what lies beside this comes last
if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import torch  # noqa: E402

from align import ALIGNMENTS, Alignment, masked_mean  # noqa: E402
from fusion import FUSIONS, Fusion, RegionStates  # noqa: E402
from parts.console import command_line  # noqa: E402
from parts.systems import PRESETS  # noqa: E402


class Add(Fusion):
    """The mean region, added to each token."""

    def __init__(self, text_dim, region_dim, dropout=0.1):
        super().__init__()
        self.image = RegionStates(region_dim, text_dim)
        self.gate = torch.nn.Parameter(torch.zeros(text_dim))  # begin as text only

    def fuse(self, words, text_mask, regions, region_mask, need_weights):
        mean = self.image(regions).sum(1) / region_mask.sum(1, keepdim=True).clamp(min=1)
        return words + (self.gate * mean)[:, None], None


class Near(Alignment):
    """The squared distance [B] of text and photo at one place."""

    def __init__(self, text_dim, region_dim):
        super().__init__()
        self.map = torch.nn.Linear(region_dim, text_dim)

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        return (masked_mean(text, own_mask) - self.map(masked_mean(regions, region_mask))).square().mean(1)


FUSIONS["add"], ALIGNMENTS["near"] = Add, Near
PRESETS["mine"] = {"model": "bert-resnet50", "fusion": "add", "align": {"near": 0.1}, "decoder": "crf"}

if __name__ == "__main__":
    if sys.argv[1:2] not in (["train"], ["evaluate"], ["report"], ["predict"]):
        sys.exit("own.py: which script, train, evaluate, report or predict?")
    command_line(lambda: __import__(sys.argv[1]).main(sys.argv[2:]))
