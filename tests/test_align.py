"""Alignment losses in closed form, against plain loops; what must change none: padding, order, no photo."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import run_together

from align import ALIGNMENTS, Alignment

D, DV = 12, 10
every_loss = pytest.mark.parametrize("name", ALIGNMENTS)


class Careless(Alignment):
    """A loss of one's own that knows of no mask."""

    def __init__(self, text_dim, region_dim, width):
        super().__init__()
        self.linear = torch.nn.Linear(region_dim, text_dim, bias=False)

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        return (text.sum(1) + self.linear(regions.sum(1))).square().mean(1)


def make(name):
    torch.manual_seed(0)
    return (ALIGNMENTS | {"careless": Careless})[name](D, DV, width=8)


def batch():
    """Ragged posts over ragged photos; the third has no photo, the last two share one, and two classes."""
    generator = torch.Generator().manual_seed(1)
    text, regions = torch.randn(6, 5, D, generator=generator), torch.randn(6, 4, DV, generator=generator)
    own_mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 4])[:, None]
    region_mask = torch.arange(4) < torch.tensor([4, 1, 0, 2, 3, 3])[:, None]
    regions[5] = regions[4]
    return {"text": text, "own_mask": own_mask, "regions": regions, "region_mask": region_mask,
            "photos": torch.tensor([3, 1, 0, 7, 5, 5]),
            "classes": torch.tensor([0, 1, 0, 0, 1, 1])}  # fmt: skip


@pytest.mark.parametrize("name", [*ALIGNMENTS, "careless"])
def test_padding_and_photoless_posts_change_nothing_whatever_they_hold(name):
    loss, given = make(name), batch()
    wanted = loss(**given)
    assert wanted.shape == (6,) and wanted[2] == 0 and (wanted[[0, 1, 3]] > 0).all()
    for garbage in (1e30, math.inf, math.nan):
        other = {key: value.clone() for key, value in given.items()}
        other["text"][~given["own_mask"]] = garbage
        other["regions"][~given["region_mask"]] = garbage
        other["text"][2] = garbage  # of the post without photo all of it
        other["photos"][2], other["classes"][2] = 3, 1
        for key in ("text", "regions"):
            other[key].requires_grad_()
        made = loss(**other)
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
        made.sum().backward()
        assert all(p.grad.isfinite().all() for p in (other["regions"], *loss.parameters()))
    numbers = {key: given[key].long() for key in ("own_mask", "region_mask")}
    assert torch.equal(loss(**given | numbers), wanted)
    ones = {key: torch.ones_like(mask).bool() for key, mask in numbers.items()}
    assert torch.equal(loss(**given | dict.fromkeys(ones)), loss(**given | ones))  # None: all are real
    wide = {key: F.pad(given[key], (0, 0, 0, 3) if given[key].ndim == 3 else (0, 3), value=0) for key in
            ("text", "own_mask", "regions", "region_mask")}  # fmt: skip
    torch.testing.assert_close(loss(**given | wide), wanted, rtol=1e-5, atol=1e-6)


@every_loss
def test_posts_and_regions_have_no_order(name):
    loss, given = make(name), batch()
    wanted = loss(**given)
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    moved = loss(**{key: value[order] for key, value in given.items()})
    if name != "matching":  # there the next photo of the batch is the wrong one: another order, another one
        torch.testing.assert_close(moved, wanted[order], rtol=1e-5, atol=1e-6)
    turned = given | {"regions": given["regions"].flip(1), "region_mask": given["region_mask"].flip(1)}
    torch.testing.assert_close(loss(**turned), wanted, rtol=1e-5, atol=1e-6)


@every_loss
def test_one_photo_alone_or_shared_by_all_is_nothing_to_learn_from(name):
    loss, given = make(name), batch()
    one = given | {"region_mask": given["region_mask"] & (torch.arange(6) == 3)[:, None]}
    same = given | {"photos": torch.full((6,), 5)}
    nothing = given | {"region_mask": torch.zeros(6, 4, dtype=torch.bool)}
    for case in (one, same, nothing):
        made = loss(**case)
        assert made.abs().max() < 1e-6
        made.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


@every_loss
def test_every_parameter_learns_and_bfloat16_autocast_changes_nothing(name):
    loss, given = make(name), batch()
    wanted = loss(**given)
    wanted.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(**given), wanted)


def means(given):
    """(mean of each post's own tokens, mean of its regions or None)."""
    texts = [x[m].mean(0) for x, m in zip(given["text"], given["own_mask"], strict=True)]
    pairs = zip(given["regions"], given["region_mask"], strict=True)
    return texts, [x[m].mean(0) if m.any() else None for x, m in pairs]


def compared(given, i):
    """The posts that one with a photo is compared with; none for another."""
    real, photos = given["region_mask"].any(1), given["photos"]
    return [j for j in range(6) if real[i] and real[j] and (i == j or photos[i] != photos[j])]


def test_contrast_is_that_of_a_plain_loop():
    loss, given = make("contrastive"), batch()
    texts, photos = means(given)
    t = [F.normalize(loss.text(x), dim=0) for x in texts]
    v = [None if x is None else F.normalize(loss.image(x), dim=0) for x in photos]
    wanted = torch.zeros(6)
    for i in range(6):
        if others := compared(given, i):
            rows, columns = (torch.stack([a[i] @ b[j] / 0.179 for j in others]) for a, b in ((t, v), (v, t)))
            sides = (0.7, rows), (0.3, columns)
            wanted[i] = sum(w * (s.logsumexp(0) - s[others.index(i)]) for w, s in sides)
    torch.testing.assert_close(loss(**given), wanted)


def test_local_is_that_of_a_plain_loop_and_bounded():
    loss, given = make("local"), batch()
    words, places = (
        [F.normalize(linear(x[m]), dim=-1) for x, m in zip(given[key], given[mask], strict=True)]
        for linear, key, mask in ((loss.text, "text", "own_mask"), (loss.image, "regions", "region_mask"))
    )

    def z(i, j):
        near = []
        for word in words[i]:
            weights = (places[j] @ word / 0.25).softmax(0)
            near.append(F.cosine_similarity(word, weights @ places[j], dim=0) / 0.2)
        return 0.2 * (torch.stack(near).logsumexp(0) - math.log(len(near))) / 0.1

    wanted = torch.zeros(6)
    for i in range(6):
        others = compared(given, i)
        for scores in ([z(i, j) for j in others], [z(j, i) for j in others]):
            if others:
                scores = torch.stack(scores)
                assert scores.abs().max() <= 10 + 1e-4
                wanted[i] += (scores.logsumexp(0) - scores[others.index(i)]) / 2
    torch.testing.assert_close(loss(**given), wanted, rtol=1e-4, atol=1e-5)


def test_matching_takes_the_next_other_photo():
    loss, given = make("matching"), batch()
    texts, photos = means(given)
    t = [loss.bilinear(loss.text(x)) for x in texts]
    v = [None if x is None else loss.image(x) for x in photos]
    following = {0: 1, 1: 3, 3: 4, 4: 0, 5: 0}  # 4 and 5 share a photo, 2 has none
    for i, j in following.items():
        wanted = F.softplus(-(t[i] @ v[i])) + F.softplus(t[i] @ v[j])
        torch.testing.assert_close(loss(**given)[i], wanted)


def test_supervised_is_that_of_a_plain_loop():
    """A post without partner has 0."""
    loss, given = make("supervised"), batch()
    pairs = [torch.cat((t, torch.zeros(DV) if v is None else v)) for t, v in zip(*means(given), strict=True)]
    z, wanted = [F.normalize(loss.pair(pair), dim=0) for pair in pairs], torch.zeros(6)
    for i in range(6):
        others = [j for j in compared(given, i) if j != i]
        partners = [j for j in others if given["classes"][i] == given["classes"][j]]
        if partners:
            total = torch.stack([z[i] @ z[j] / 0.1 for j in others]).logsumexp(0)
            wanted[i] = -sum(z[i] @ z[j] / 0.1 - total for j in partners) / len(partners)
    torch.testing.assert_close(loss(**given), wanted)


TOGETHER = """
import os, sys, torch
sys.path[:0] = [{project!r}, {tests!r}]
from test_align import batch, make
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
given = batch()
for name in ("contrastive", "matching", "supervised"):
    loss = make(name)
    if processes == 1:
        whole = loss(**given)
        whole.sum().backward()
        torch.save((whole, [p.grad for p in loss.parameters()]), f"{{sys.argv[1]}}/{{name}}.pt")
        continue
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    whole, grads = torch.load(f"{{sys.argv[1]}}/{{name}}.pt")
    own = loss(**{{key: value[rank::processes] for key, value in given.items()}})
    torch.testing.assert_close(own, whole[rank::processes])
    (own.sum() * processes).backward()
    for p, wanted in zip(loss.parameters(), grads):
        torch.distributed.all_reduce(p.grad)
        torch.testing.assert_close(p.grad / processes, wanted, rtol=1e-4, atol=1e-6)
print("equal")
"""


def test_any_number_of_processes_gives_the_losses_and_gradients_of_one(tmp_path):
    """Four processes have two, two, one and one of six posts."""
    script = tmp_path / "together.py"
    script.write_text(
        TOGETHER.format(project=str(Path(__file__).parents[1]), tests=str(Path(__file__).parent))
    )
    for processes in (1, 4):
        done = run_together(processes, tmp_path, script, tmp_path)
        assert [(one.returncode, one.stdout) for one in done] == [(0, "equal\n")] * processes, done
