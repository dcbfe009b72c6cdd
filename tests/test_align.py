"""Alignment losses in closed form, against plain loops; what must change none: padding, order, no photo."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import run_together

from align import ALIGNMENTS, match

D, DV = 12, 10
every_loss = pytest.mark.parametrize("name", ALIGNMENTS)


def make(name, **more):
    torch.manual_seed(0)
    return ALIGNMENTS[name](D, DV, width=8, **more)


def batch(seed=1, posts=6):
    """Ragged posts over ragged photos; the third has no photo, the last two share one, and two classes."""
    generator = torch.Generator().manual_seed(seed)
    text, regions = (
        torch.randn(posts, 5, D, generator=generator), torch.randn(posts, 4, DV, generator=generator)
    )
    own_mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 4])[:posts, None]
    region_mask = torch.arange(4) < torch.tensor([4, 1, 0, 2, 3, 3])[:posts, None]
    regions[5] = regions[4]
    return {"text": text, "own_mask": own_mask, "regions": regions, "region_mask": region_mask,
            "photos": torch.tensor([3, 1, 0, 7, 5, 5])[:posts],
            "classes": torch.tensor([0, 1, 0, 0, 1, 1])[:posts]}  # fmt: skip


@every_loss
def test_padding_and_photoless_posts_change_nothing_whatever_they_hold(name):
    loss, given = make(name), batch()
    wanted = loss(**given)
    assert (
        wanted.shape == (6,) and wanted.isfinite().all() and wanted[2] == 0 and (wanted[[0, 1, 3]] > 0).all()
    )
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
        assert (
            other["regions"].grad.isfinite().all()
            and all(p.grad.isfinite().all() for p in loss.parameters())
        )
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


def test_contrast_in_closed_form():
    """Orthonormal pairs give log(1 + (n - 1) e^(-1 / tau)), one vector for all log n."""
    n, tau = 5, 0.179
    places, allowed = torch.arange(n), torch.ones(n, n, dtype=torch.bool)
    torch.testing.assert_close(
        match(torch.eye(n) / tau, allowed, places),
        torch.full((n,), math.log(1 + (n - 1) * math.exp(-1 / tau))),
    )
    loss = make("contrastive")
    text, regions = torch.ones(n, 3, D), torch.ones(n, 2, DV)
    made = loss(
        text, torch.ones(n, 3, dtype=torch.bool), regions, torch.ones(n, 2, dtype=torch.bool), torch.arange(n)
    )
    torch.testing.assert_close(made, torch.full((n,), math.log(n)))


def test_contrast_is_that_of_a_plain_loop():
    loss, given = make("contrastive"), batch()
    t = [
        F.normalize(loss.text(x[m].mean(0)), dim=0)
        for x, m in zip(given["text"], given["own_mask"], strict=True)
    ]
    v = [
        F.normalize(loss.image(x[m].mean(0)), dim=0) if m.any() else None
        for x, m in zip(given["regions"], given["region_mask"], strict=True)
    ]
    wanted = []
    for i in range(6):
        others = [
            j for j in range(6)
            if v[i] is not None and v[j] is not None and (i == j or given["photos"][i] != given["photos"][j])
        ]
        if not others:
            wanted.append(torch.tensor(0.0))
            continue
        rows, columns = (torch.stack([a[i] @ b[j] / 0.179 for j in others]) for a, b in ((t, v), (v, t)))
        wanted.append(
            sum(w * (s.logsumexp(0) - s[others.index(i)]) for w, s in ((0.7, rows), (0.3, columns)))
        )
    torch.testing.assert_close(loss(**given), torch.stack(wanted))


def test_local_is_that_of_a_plain_loop_and_bounded():
    loss, given = make("local"), batch()
    words = [
        F.normalize(loss.text(x[m]), dim=-1)
        for x, m in zip(given["text"], given["own_mask"], strict=True)
    ]
    places = [
        F.normalize(loss.image(x[m]), dim=-1)
        for x, m in zip(given["regions"], given["region_mask"], strict=True)
    ]

    def z(i, j):
        near = []
        for word in words[i]:
            weights = (places[j] @ word / 0.25).softmax(0)
            near.append(F.cosine_similarity(word, weights @ places[j], dim=0) / 0.2)
        return 0.2 * (torch.stack(near).logsumexp(0) - math.log(len(near))) / 0.1

    wanted = torch.zeros(6)
    for i in range(6):
        others = [
            j for j in range(6)
            if len(places[i]) and len(places[j]) and (i == j or given["photos"][i] != given["photos"][j])
        ]
        for scores in ([z(i, j) for j in others], [z(j, i) for j in others]):
            if others:
                scores = torch.stack(scores)
                assert scores.abs().max() <= 10 + 1e-4
                wanted[i] += (scores.logsumexp(0) - scores[others.index(i)]) / 2
    torch.testing.assert_close(loss(**given), wanted, rtol=1e-4, atol=1e-5)


def test_local_does_not_prefer_long_posts():
    """A post that says one word four times is as near to each photo as one that says it once."""
    loss = make("local")
    torch.manual_seed(3)
    word, regions = torch.randn(1, D), torch.randn(2, 3, DV)
    text = word.expand(2, 4, D)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    made = loss(
        text, mask, regions[:1].expand(2, -1, -1), torch.ones(2, 3, dtype=torch.bool), torch.arange(2)
    )
    torch.testing.assert_close(made, torch.full((2,), math.log(2)))


def test_matching_takes_the_next_other_photo_and_learns_what_an_additive_score_cannot():
    loss, given = make("matching"), batch()
    t = [
        loss.bilinear(loss.text(x[m].mean(0)))
        for x, m in zip(given["text"], given["own_mask"], strict=True)
    ]
    v = [loss.image(x[m].mean(0)) for x, m in zip(given["regions"], given["region_mask"], strict=True)]
    following = {0: 1, 1: 3, 3: 4, 4: 0, 5: 0}  # 4 and 5 share a photo, 2 has none
    for i, j in following.items():
        wanted = F.softplus(-(t[i] @ v[i])) + F.softplus(t[i] @ v[j])
        torch.testing.assert_close(loss(**given)[i], wanted)
    torch.manual_seed(0)
    kinds, mask = torch.randint(4, (64,)), torch.ones(64, 1, dtype=torch.bool)
    text, regions = F.one_hot(kinds, D).float()[:, None], F.one_hot(kinds, DV).float()[:, None]
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for step in range(150):
        chosen = torch.randperm(64)[:16]
        # So that the next is of another kind.
        chosen = chosen[torch.cat((torch.tensor([True]), kinds[chosen][1:] != kinds[chosen][:-1]))]
        if kinds[chosen[0]] == kinds[chosen[-1]]:
            chosen = chosen[:-1]
        made = loss(
            text[chosen], mask[chosen], regions[chosen], mask[chosen], torch.arange(len(chosen))
        ).mean()
        optimizer.zero_grad()
        made.backward()
        optimizer.step()
    assert made < 0.1 < 2 * math.log(2)


def test_supervised_in_closed_form_and_by_a_plain_loop():
    """Two classes of m posts each, orthogonal: log(m - 1 + m e^(-1 / tau)); a post without partner has 0."""
    loss, given = make("supervised"), batch()
    both = [
        torch.cat((x[m].mean(0), r[k].mean(0) if k.any() else torch.zeros(DV)))
        for x, m, r, k in zip(
            given["text"], given["own_mask"], given["regions"], given["region_mask"], strict=True
        )
    ]
    z = [F.normalize(loss.pair(x), dim=0) for x in both]
    real, photos, classes = given["region_mask"].any(1), given["photos"], given["classes"]
    wanted = torch.zeros(6)
    for i in range(6):
        others = [j for j in range(6) if j != i and real[i] and real[j] and photos[i] != photos[j]]
        partners = [j for j in others if classes[i] == classes[j]]
        if partners:
            total = torch.stack([z[i] @ z[j] / 0.1 for j in others]).logsumexp(0)
            wanted[i] = -sum(z[i] @ z[j] / 0.1 - total for j in partners) / len(partners)
    torch.testing.assert_close(loss(**given), wanted)

    class Given(torch.nn.Module):
        def forward(self, means):
            return means[:, :2]

    loss.pair, m = Given(), 3
    kinds = torch.tensor([0, 1] * m)
    text = F.pad(F.one_hot(kinds, 2).float(), (0, D - 2))[:, None]
    ones = torch.ones(2 * m, 1, dtype=torch.bool)
    made = loss(text, ones, torch.ones(2 * m, 1, DV), ones, torch.arange(2 * m), kinds)
    torch.testing.assert_close(made, torch.full((2 * m,), math.log(m - 1 + m * math.exp(-10))))
    alone = loss(text, ones, torch.ones(2 * m, 1, DV), ones, torch.arange(2 * m), torch.arange(2 * m))
    assert not alone.any()


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
