"""Two processes that share the work, against one that does it alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from forked import PROJECT, ended, run_script, run_together, start_together
from safetensors.torch import load_file
from torch.testing import assert_close


def alone(script, *args):
    """Run a script; returns what it printed."""
    ended = run_script(PROJECT, script, *args)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shared(script, *args):
    """The same in two processes, with the environment of torchrun."""
    both = run_together(2, PROJECT, script, *args)
    assert [ended.returncode for ended in both] == [0, 0], both
    return "".join(ended.stdout for ended in both)


def under_torchrun(script, *args):
    """The same by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*map(str, [*command, PROJECT / script, *args])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# 24 posts: with 23 a step the last step has one, and the second process none.
@pytest.mark.parametrize("start, dataset, batch_size, more", [
    (shared, "demo", 7, ["--decoder", "crf", "--align", "contrastive=0.5", "supervised=0.5",
                         "--relevance", "given", "--notes"]),
    (under_torchrun, "mnre", 23, ["--align", "matching=0.5"]),
])  # fmt: skip
def test_two_processes_train_as_one_does(start, dataset, batch_size, more, flags, tmp_path):
    if "--notes" in more:  # of every second post of train
        notes = [json.dumps({"id": f"train_{i:04d}", "relevance": i / 24}) for i in range(0, 24, 2)]
        (tmp_path / "notes.jsonl").write_text("\n".join(notes))
        more = [*more, tmp_path / "notes.jsonl"]
    fixed = [*flags, "--dataset", dataset, "--epochs", 3, "--dropout", 0, "--batch-size", batch_size, *more]
    said = [run("train.py", *fixed, "--run-dir", tmp_path / str(n))
            for n, run in enumerate((alone, start), 1)]  # fmt: skip
    assert said[0].count("epoch 3/3") == said[1].count("epoch 3/3") == 1  # one of them speaks
    logs, weights, predictions = [], [], []
    for folder in (tmp_path / "1", tmp_path / "2"):
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
        weights.append(load_file(folder / "model.safetensors"))
        predictions.append(
            [json.loads(line) for line in (folder / "predictions-valid.jsonl").read_text().splitlines()]
        )
    assert {path.name for path in (tmp_path / "1").iterdir()} == {
        path.name for path in (tmp_path / "2").iterdir()
    }
    for one, two in zip(*logs, strict=True):
        losses = {key for key in one if key.startswith("loss")}
        assert len(losses) == (4 if dataset == "demo" else 2)
        assert all(two[key] == pytest.approx(one[key], rel=1e-5) for key in losses)
    assert_close(weights[1], weights[0], rtol=1e-3, atol=2e-5)  # Adam divides by gradients, small ones too
    for one, two in zip(*predictions, strict=True):
        assert (two["id"], two["words"], two["predicted"]) == (one["id"], one["words"], one["predicted"])


def test_a_signal_to_one_process_stops_both_after_the_same_step(flags, tmp_path):
    """Also to the one that writes no state; what they go on with is what they would have had."""
    fixed = [*flags, "--dataset", "demo", "--epochs", 400, "--run-dir", tmp_path / "run"]
    both, state = start_together(2, PROJECT, "train.py", *fixed), tmp_path / "run" / "state.pt"
    try:
        while not state.exists():
            assert all(script.poll() is None for script in both)
            time.sleep(0.05)
        os.kill(both[1].pid, signal.SIGTERM)
    finally:
        results = ended(*both)
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2, results
    assert results[0].stderr.count("the same command with --resume goes on") == 1
    assert "stopped" not in results[1].stderr and "Traceback" not in results[0].stderr + results[1].stderr
    progress = torch.load(state, weights_only=True)["progress"]
    epoch, step = progress["epoch"], progress["step"]
    end = f"|{epoch + 1} after 0" if step == 3 else ""  # between two epochs
    assert re.search(f"in epoch ({epoch} after {step}{end}) steps", results[0].stderr)


def test_two_processes_extract_the_bytes_of_one(data_dir, tmp_path):
    fixed = ["--dataset", "demo", "--data-dir", data_dir, "--weights", "random", "--img-size", 64,
             "--views", 2, "--batch-size", 6, "--workers", 1]  # fmt: skip
    said = [run("extract_features.py", *fixed, "--cache-dir", tmp_path / str(n))
            for n, run in enumerate((alone, shared), 1)]  # fmt: skip
    assert [text.count("40 photos in") for text in said] == [1, 1]
    made = [list((tmp_path / str(n)).iterdir()) for n in (1, 2)]
    assert [[path.name for path in paths] for paths in made] == [["demo-resnet50-64.h5"]] * 2
    assert made[0][0].read_bytes() == made[1][0].read_bytes()
