"""The folder of a run: what may be begun there, what --overwrite leaves alone, and what a kill leaves."""

import json
import os
import shutil

import pytest
import torch
from test_train import json_lines, run

import train
from parts import runs
from parts.run_files import load_run


@pytest.fixture(scope="module")
def flags(data_dir, cache_dir, encoder_dir):
    """Arguments of a quick run on tiny data, run folder left out."""
    return ["--data-dir", data_dir, "--text-encoder", encoder_dir, "--fusion", "none", "--epochs", 1]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    return run(flags, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    """{path: bytes, or where a link points} of all that lies in a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()
    }  # fmt: skip


def make_foreign(kind, folder, finished):
    """A folder that is no run of train.py, or one with a link in it."""
    folder.mkdir()
    if kind == "model":  # of a hub
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
        (folder / "model.safetensors").write_bytes(b"weights")
    elif kind == "repository":
        (folder / ".git").mkdir()
        (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
        (folder / "thesis.tex").write_text("text")
    elif kind == "broken":
        (folder / "config.json").write_text("{")
    elif kind == "link to an empty folder":
        (folder / "elsewhere").mkdir()
        (folder / "link").symlink_to(folder / "elsewhere")
        return folder / "link"
    else:
        (folder / "elsewhere").mkdir()
        shutil.copytree(finished, folder / "elsewhere" / "run")
        if kind == "link to a run":
            (folder / "link").symlink_to(folder / "elsewhere" / "run")
            return folder / "link"
        place = folder / "elsewhere" / "run" / kind
        os.replace(place, folder / "mine")
        place.symlink_to(folder / "mine")
        return folder / "elsewhere" / "run"
    return folder


@pytest.mark.parametrize("kind", ["model", "repository", "broken", "link to a run", "encoder", "log.jsonl",
                                  "link to an empty folder", "encoder/config.json"])  # fmt: skip
def test_what_is_no_run_of_ours_is_never_touched(flags, tmp_path, finished, kind):
    folder = make_foreign(kind, tmp_path / "place", finished)
    before = contents(tmp_path / "place")
    for option in ((), ("--overwrite",), ("--resume",)):
        with pytest.raises(ValueError, match="--run-dir"):
            run(flags, folder, *option)
    reason = "is a link" if folder.name in ("link", "run") else "no run of train.py"
    with pytest.raises(ValueError, match=reason):
        run(flags, folder, "--overwrite")
    assert contents(tmp_path / "place") == before


def test_overwrite_removes_what_the_scripts_wrote_and_nothing_else(flags, folder, capsys):
    (folder / "figures").mkdir()
    for name in ("notes.md", "figures/plot.png", "encoder/mine.txt"):
        (folder / name).write_text("mine")
    for name in ("report-test.html", "image-check-test.json", "state.pt"):
        (folder / name).write_text("of the old run")
    run(flags, folder, "--overwrite", "--seed", 1)
    assert "left as they are, since no run wrote them: figures, notes.md" in capsys.readouterr().out
    for name in ("notes.md", "figures/plot.png", "encoder/mine.txt"):
        assert (folder / name).read_text() == "mine"
    left = {path.name for path in folder.iterdir()}
    assert not left & {"report-test.html", "image-check-test.json", "state.pt", runs.COMING}
    assert load_run(folder)[2]["seed"] == 1


def test_the_old_run_is_whole_until_the_new_one_has_an_epoch(flags, folder, monkeypatch):
    before = contents(folder)
    with pytest.raises(ValueError, match="is not finite"):
        run(flags, folder, "--overwrite", "--lr", 1e30)
    assert contents(folder) == before
    seen = []

    def look(*args):
        now = contents(folder)
        seen.append({name: now.get(name) for name in before} == before)
        return score(*args)

    score = train.score
    monkeypatch.setattr(train, "score", look)
    run(flags, folder, "--overwrite", "--seed", 1, "--epochs", 2)
    assert seen == [True, False, False, False]  # valid of two epochs, valid and test at the end


def test_a_kill_while_the_new_run_moves_up_loses_neither(flags, folder, tmp_path, monkeypatch):
    """At each step of the move: what is left is the old run, whole, or a new one that goes on."""

    class Kill(BaseException):
        pass

    flags = [*flags, "--seed", 1, "--save-every", 0]
    whole = run(flags, tmp_path / "whole")
    left = float("inf")  # calls until the kill

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Kill
            return real(*args, **kwargs)

        return call

    def settle(run_dir):
        nonlocal left
        left = stop
        return real_settle(run_dir)

    real_settle, kills = runs.settle, 0
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for stop in range(0, 30, 3):
        copy = shutil.copytree(folder, tmp_path / f"stopped{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(train, "settle", settle)
            with pytest.raises(Kill):
                run(flags, copy, "--overwrite")
        left, moved = float("inf"), not (copy / runs.COMING).exists()
        if moved:
            break
        kills += 1
        run(flags, copy, "--resume")
        for name in ("log.jsonl", "model.safetensors", "predictions-test.jsonl"):
            assert (copy / name).read_bytes() == (whole / name).read_bytes(), (stop, name)
        assert not (copy / runs.COMING).exists()
    assert kills >= 4 and moved


def test_a_state_is_there_after_the_first_minute_and_at_each_epochs_end(flags, tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    real = train.save_state

    def save(path, progress, *more):
        saved.append((progress["epoch"], progress["step"]))
        real(path, progress, *more)

    def share(*args):
        clock[0] += 25  # seconds a step; 24 posts are four steps
        return real_share(*args)

    real_share = train.share
    monkeypatch.setattr(train, "save_state", save)
    monkeypatch.setattr(train, "share", share)
    run(flags, tmp_path / "run", "--epochs", 2, "--batch-size", 6)
    assert saved == [(1, 3), (1, 4), (2, 4)]
    saved.clear()
    monkeypatch.setattr(train, "share", real_share)  # all in the first minute
    run(flags, tmp_path / "quick", "--epochs", 2)
    assert saved == [(1, 3), (2, 3)]


@pytest.mark.parametrize("settings", [("--seed", 7), ("--seed", 1337)])
def test_resume_goes_on_with_what_was_begun_by_overwrite_before_its_first_state(
    flags, folder, tmp_path, monkeypatch, capsys, settings
):
    def share(*args):
        shutil.copytree(folder, tmp_path / "killed")
        raise InterruptedError

    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(train, "share", share)
        with pytest.raises(InterruptedError):
            run(flags, folder, "--overwrite", *settings)
    assert contents(folder) == before
    other = shutil.copytree(tmp_path / "killed", tmp_path / "other")
    with pytest.raises(ValueError, match="begun with other settings"):
        run(flags, other, "--resume", "--seed", 8)
    run(flags, tmp_path / "killed", "--resume", *settings)
    assert "stopped before its first state; the run begins anew" in capsys.readouterr().out
    assert runs.read_config(tmp_path / "killed")["seed"] == settings[1]
    assert not (tmp_path / "killed" / runs.COMING).exists()
    if settings[1] == 7:  # the old one can still be meant
        run(flags, other, "--resume")
        assert "finished; left alone" in capsys.readouterr().out


def test_what_says_nothing_of_the_state_does_not_call_it_broken(flags, folder, monkeypatch):
    shutil.copytree(folder, folder.with_name("before"))
    (folder / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a state to resume from .* --overwrite"):
        run(flags, folder, "--resume")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), PermissionError(13, "Permission denied"),
                  OSError(116, "Stale file handle"), MemoryError()):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)) as raised:
                run(flags, folder, "--resume")
        assert raised.value is error


def test_a_begun_run_is_told_to_take_another_folder_first(flags, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="run already; name another folder with --run-dir, or .*--resume"):
        run(flags, folder)
    with pytest.raises(ValueError, match=r"settings or data: epochs \(run: 1, now: 3\); .* --init .*run --run-dir"):
        run(flags, folder, "--resume", "--epochs", 3)
    assert contents(folder) == before
    run(flags, folder, "--resume")
    assert contents(folder) == before and len(json_lines(folder / "log.jsonl")) == 1


@pytest.mark.parametrize("option, part", [
    ("--lr 1e-5", "lr1e-05"), ("--fusion-lr 0.01", "fusion-lr0.01"), ("--epochs 3", "epochs3"),
    ("--batch-size 32", "batch32"), ("--photo-dropout 0", "photo-dropout0"), ("--max-len 64", "len64"),
    ("--dropout 0.2", "dropout0.2"), ("--img-size 256", "img256"), 
    ("--no-augment", "no-augment"), ("--precision float32", "float32"),
    ("--weight-decay 0", "decay0"), ("--warmup-ratio 0", "warmup0"), ("--max-grad-norm inf", "norminf"),
    ("--lr 3e-5 --max-len 128 --heads 8 --fusion cross-attention", "cross-attention"),
])  # fmt: skip
def test_what_differs_from_the_defaults_is_in_a_runs_name(option, part):
    args = train.parse_args(["--fusion", "film", *option.split()])
    fusion = "" if part == "cross-attention" else "film-"
    assert args.run_dir == f"runs/twitter2017-roberta-resnet50-{fusion}{part}-s1337"
