"""benchmarks/peers.py on demo posts: that both sides do the same work, and what it prints."""

import argparse
import json

import peers
import pytest
import torch


@pytest.fixture
def flags(data_dir, encoder_dir):
    return ["--dataset", "demo", "--data-dir", str(data_dir), "--encoder", str(encoder_dir), "--lr", "1e-3"]


def test_rows(flags, tmp_path):
    made = tmp_path / "rows.json"
    peers.main([*flags, "--steps", "3", "--rounds", "1", "--posts", "8", "--output", str(made)])
    parts = json.loads(made.read_text())["parts"]
    rows = {row["what"]: row for part in parts.values() for row in part["rows"]}
    assert list(parts) == ["training", "prediction", "photos"]
    assert (
        rows["loss of the first batch, Trainer's model / ours, dropout off"]["value"]
        == pytest.approx(1, abs=1e-4)
    )
    assert rows["words that both label alike"]["value"] == 1
    for name in ("Trainer", "Trainer, by length"):
        assert rows[f"sub-tokens seen, {name} / ours"]["value"] == 1
        assert (
            rows[f"real / padded sub-tokens, {name}"]["note"]
            == rows["real / padded sub-tokens, ours"]["note"]
        )
    timed = [row for what, row in rows.items() if what.startswith(("training step", "prediction"))]
    assert len(timed) == 2 + 4 + 1 + 1 and all(0 < row["low"] <= row["value"] <= row["high"] for row in timed)


def test_whole_runs(flags, tmp_path):
    made = tmp_path / "rows.json"
    peers.main([*flags, "--only", "training", "--epochs", "1", "--output", str(made)])
    rows = {row["what"]: row for row in json.loads(made.read_text())["parts"]["training"]["rows"]}
    for name in ("Trainer", "Trainer, by length"):
        assert rows[f"training, {name} / ours"]["value"] > 0
        for split in ("valid", "test"):
            row = rows[f"{split} entity F1, ours - {name}"]
            ours, theirs = (float(part.split()[1]) for part in row["note"].split(";")[0].split(", "))
            assert row["value"] == pytest.approx(ours - theirs, abs=2e-4) and row["low"] <= row["high"]


def test_both_take_the_same_steps(flags, tmp_path):
    """Dropout off, one batch again and again: the same loss after each step, to rounding."""
    parsed = dict(zip(("dataset", "data_dir", "encoder"), flags[1::2], strict=False))
    args = argparse.Namespace(**parsed, device="cpu", batch_size=8, lr=1e-3, fusion_lr=1e-2)
    posts = peers.Posts(args)
    ours, model, rows = (
        peers.Ours(posts), peers.peer_model(posts.encoder, posts.labels), posts.rows["train"][:8]
    )
    peers.copy_weights(ours.model, model)
    for module in (*ours.model.modules(), *model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer, losses = peers.Theirs(posts, model, rows, tmp_path, "random"), []
    for turn in range(4):
        own, theirs = peers.first_losses(posts, ours.model, model)
        assert theirs == pytest.approx(own, rel=1e-4)
        losses.append(own)
        ours.model.train()
        ours.epoch(rows, turn)
        trainer.train()
    assert losses[-1] < losses[0] / 2


def test_profile(flags, capsys):
    peers.main([*flags, "--profile", "--steps", "2"])
    table, said = capsys.readouterr().out.split("\n\n")
    cells = {name: float(share.rstrip("%")) for name, _, share in
             (line.strip("| ").split(" | ") for line in table.splitlines()[2:])}  # fmt: skip
    *spent, whole, arithmetic = cells.values()
    assert sum(spent) == pytest.approx(whole, abs=0.5) and 0 < arithmetic
    assert "a batch has" in said
