"""What the README says of one's own fusion, loss and system, done from outside the project."""

import json
import re

from forked import PROJECT, run_script


def test_a_fusion_a_loss_and_a_system_of_ones_own(data_dir, cache_dir, tmp_path):
    """The README's lines, as they stand there, in a folder of their own: trained, checked and looked at."""
    code = re.search(r"```python\n# mine\.py\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 30
    (tmp_path / "mine.py").write_text(code)
    places = ["--data-dir", data_dir, "--cache-dir", cache_dir]
    encoder = ["--text-encoder", data_dir / "demo" / "encoder", "--img-size", "64", "--epochs", "1"]

    def mine(*arguments):
        run = run_script(tmp_path, tmp_path / "mine.py", *arguments)
        assert run.returncode == 0, run.stderr
        return run.stdout

    said = mine("train", "--dataset", "demo", "--system", "mine", *places, *encoder)
    assert "fusion" in said and "align" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "demo-mine-encoder-s1337"
    config = json.loads((folder / "config.json").read_text())
    assert (config["fusion"], config["align"], config["decoder"]) == ("add", {"near": 0.1}, "crf")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss_near"] > 0
    checked = mine("evaluate", "--run", folder, "--image-check", "--shuffles", "1")
    assert "demo-mine-encoder-s1337" in checked and "true - shuffled" in checked
    assert "8 of 8 posts, 0 with attention" in mine("report", "--run", folder)
