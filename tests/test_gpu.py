"""benchmarks/gpu.py in tiny sizes on a CPU: every part runs, so that it is known to work on the first card."""

import json
import math

import gpu


def test_every_part_runs_and_what_it_checks_holds_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch._dynamo.config, "recompile_limit", 8)  # put back what it sets
    out = tmp_path / "gpu-here.json"
    gpu.main(["--device", "cpu", "--size", "tiny", "--output", str(out)])
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    rows = {row["what"]: row for part in parts.values() for row in part["rows"]}
    values = {what: row["value"] for what, row in rows.items()}
    assert all(math.isfinite(value) and value >= 0 for what, value in values.items() if "F1, bf" not in what)
    for what, value in {
        "loss in float32, here / on a CPU, largest distance from 1": 0,
        "norm of the gradient in float32, here / on a CPU, largest distance from 1": 0,
        "batches of features kept on the device are those of the file": 1,
        "extraction, here less on a CPU, of the largest value": 0,
        "loss of an epoch, killed and --resume less never stopped, largest": 0,
        "new posts answered as on a CPU": 1, "lines said when there is no memory": 1,
        "words that both label alike": 1, "sub-tokens seen, Trainer / ours": 1,
    }.items():  # fmt: skip
        assert values[what] == value, (what, rows[what])
    assert "out of memory" in rows["lines said when there is no memory"]["note"]
    timed = [what for what in values if what.startswith(("a step", "an epoch", "training step"))]
    assert len(timed) >= 30 and not [what for what in timed if "memory" not in what and values[what] <= 0
                                     and "does not run" not in rows[what]["note"]]  # fmt: skip
    page = (tmp_path / "GPU.md").read_text()
    assert all(f": {name}\n" in page for name in parts) and all(f"| {what} |" in page for what in values)


def test_parts_alone_keep_what_others_measured(tmp_path):
    out = tmp_path / "gpu-here.json"
    out.write_text(json.dumps({"parts": {"tries": {"machine": "m", "threads": 1, "versions": "v", "rows": []}}}))
    gpu.main(["--device", "cpu", "--size", "tiny", "--only", "step", "--output", str(out)])
    assert list(json.loads(out.read_text())["parts"]) == ["step", "tries"]
