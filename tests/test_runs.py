"""The folder of a run: what may be begun there, what --overwrite leaves alone, what kills and stops leave."""

import json
import os
import pickle
import shutil
import signal

import pytest
import torch
import transformers
from conftest import PARTS, contents, json_lines, run, system_flags
from safetensors.torch import load_file

import train
from parts import runs
from parts.console import command_line
from parts.processes import Stopped, lock
from parts.run_files import load_run


@pytest.fixture(scope="module")
def flags(flags):
    """Arguments of a still quicker run."""
    return [*flags, "--fusion", "none", "--epochs", 1]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    return run(flags, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def same_results(folder, whole):
    for name in ("log.jsonl", "predictions-valid.jsonl", "predictions-test.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), (folder, name)


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
            patch.setattr(runs, "settle", settle)
            with pytest.raises(Kill):
                run(flags, copy, "--overwrite")
        left, moved = float("inf"), not (copy / runs.COMING).exists()
        if moved:
            break
        kills += 1
        run(flags, copy, "--resume")
        same_results(copy, whole)
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


def test_what_may_be_done_in_the_folder_of_a_run(flags, folder, tmp_path, data_dir, capsys):
    before = contents(folder)
    with pytest.raises(ValueError, match="run already; name another folder with --run-dir, or .*--resume"):
        run(flags, folder)
    for more, message in (
        (("--epochs", 3), r"epochs .run: 1, now: 3.; its rates have gone down to 0: --init .*run --run-dir"),
        (("--epochs", 2, "--lr", 0.5), r"epochs .run: 1, now: 2.; lr .run: 0.001, now: 0.5.; give those, or"),
    ):
        with pytest.raises(ValueError, match=f"begun with other settings or data: {message}"):
            run(flags, folder, "--resume", *more)
    held = lock(folder)
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(ValueError, match="run: another process is writing it; wait for it or stop it"):
            run(flags, folder, flag)
    os.close(held)
    run(flags, folder, "--resume")
    assert "is finished; left alone" in capsys.readouterr().out
    assert contents(folder) == before and len(json_lines(folder / "log.jsonl")) == 1
    shutil.copytree(data_dir / "demo", tmp_path / "demo")
    moved = [*flags, "--data-dir", tmp_path, "--resume"]
    run(moved, tmp_path / "new")
    assert f"{tmp_path / 'new'}: nothing there to resume; the run begins" in capsys.readouterr().out
    with open(tmp_path / "demo" / "valid.txt", "a", encoding="utf-8") as file:
        file.write("IMGID:valid_0000\nnew\tO\n")
    with pytest.raises(ValueError, match=r"data.valid.sha256 \(run: [0-9a-f]+, now: [0-9a-f]+\); give those"):
        run(moved, tmp_path / "new")


@pytest.mark.parametrize("system", ["film", "vilt"])
def test_a_stopped_run_goes_on_and_ends_the_same(flags, tmp_path, data_dir, monkeypatch, system, capsys):
    """Stopped at every kind of moment: in each epoch, between epochs, as a state or weights are written."""
    more = system_flags(system, data_dir) if system in PARTS else ["--fusion", system]
    flags = [*flags[:-4], *more, "--save-every", 0, "--epochs", 3]  # without --fusion none
    whole = run(flags, tmp_path / "whole")
    assert not (whole / "state.pt").exists()
    places = [(os, "replace"), (runs, "save_weights"), (train, "save_state"), (train, "score"),
              (train, "write_json_lines"), (runs, "write_json_lines")]  # fmt: skip
    calls, stop_at = 0, 0

    class Stop(BaseException):
        pass

    def stopping(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop
            return real(*args, **kwargs)

        return call

    for module, name in places:
        monkeypatch.setattr(module, name, stopping(getattr(module, name)))
    run(flags, tmp_path / "counted")
    total = calls
    for first in range(2, total, 11 if system == "film" else 29):
        for stop_at in (first, first // 2 + 1, 0):  # stopped twice, then left alone
            calls = 0
            try:
                run(flags, tmp_path / f"stopped{first}", "--resume")
            except Stop:
                continue
        same_results(tmp_path / f"stopped{first}", whole)
        assert {p.name for p in (tmp_path / f"stopped{first}").iterdir()} == {p.name for p in whole.iterdir()}
    assert total > 25 and "resuming   in epoch" in capsys.readouterr().out


class Harm:
    """What a stranger's pickle may hold: code that runs when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_strangers_run_folder_cannot_run_code(flags, folder, tmp_path):
    mark = tmp_path / "ran"
    for save in (
        lambda path: torch.save({"progress": Harm(mark)}, path),
        lambda path: path.write_bytes(pickle.dumps(Harm(mark))),
    ):
        save(folder / "state.pt")
        with pytest.raises(ValueError, match="not a state to resume from"):
            run(flags, folder, "--resume")
        weights = (folder / "model.safetensors").read_bytes()
        save(folder / "model.safetensors")
        with pytest.raises(ValueError, match="the run does not load"):
            load_run(folder)
        (folder / "model.safetensors").write_bytes(weights)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------ stops


def signals(monkeypatch, place, name, numbers, at):
    """Have some signals come when the `at`-th call of a function of train.py is done."""
    real, calls = getattr(place, name), []

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(name)
        for number in numbers if len(calls) == at else ():
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize("number, place, name, at, said", [
    (signal.SIGINT, train, "add_up", 2, "in epoch 1 after 2 steps"),
    (signal.SIGTERM, train, "add_up", 4, "in epoch 2 after 1 steps"),
    (signal.SIGTERM, train, "score", 1, "in epoch 1 after 3 steps"),
    (signal.SIGINT, runs, "save_weights", 1, "in epoch 2 after 0 steps"),
    (signal.SIGINT, train, "score", 3, "while it was scored"),
])  # fmt: skip
def test_a_signal_leaves_a_state_that_lacks_no_step(
    flags, tmp_path, monkeypatch, capsys, number, place, name, at, said
):
    flags = [*flags, "--epochs", 2]
    whole, handlers = run(flags, tmp_path / "whole"), [signal.getsignal(n) for n in (2, 15)]
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"run: stopped {said}; the") as stop:
        signals(patch, place, name, [number], at)
        run(flags, tmp_path / "run")
    assert stop.value.number == number and [signal.getsignal(n) for n in (2, 15)] == handlers
    assert str(stop.value).endswith("the same command with --resume goes on")
    progress = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]
    if name == "add_up":
        assert (progress["epoch"], progress["step"]) == ((1, 2) if at == 2 else (2, 1))
    capsys.readouterr()
    run(flags, tmp_path / "run", "--resume")
    assert "resuming   in epoch" in capsys.readouterr().out
    same_results(tmp_path / "run", whole)


def test_a_second_ctrl_c_stops_at_once(flags, tmp_path, monkeypatch):
    signals(monkeypatch, train, "add_up", [signal.SIGINT, signal.SIGINT], 2)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(flags, tmp_path / "run")
    assert not isinstance(stop.value, Stopped) and not (tmp_path / "run" / "state.pt").exists()


def test_what_is_said_of_a_stop(monkeypatch, capsys, flags):
    monkeypatch.setattr("sys.argv", ["train.py"])
    for stop, said, status in ((Stopped(15, "how to go on"), "train.py: how to go on\n", 143),
                               (Stopped(2), "", 130), (KeyboardInterrupt(), "train.py: interrupted\n", 130)):

        def main(stop=stop):
            raise stop

        with pytest.raises(SystemExit) as ended:
            command_line(main)
        assert (ended.value.code, capsys.readouterr().err) == (status, said)
    args = train.parse_args(["--overwrite"])
    said = train.how_to_go_on(args, {"epoch": 1, "step": 2})
    assert said.endswith("the same command with --resume in place of --overwrite goes on")


# ----------------------------------------------------------------------------------------------------- --init


def test_a_run_may_start_from_the_weights_of_another(flags, folder, tmp_path, capsys):
    """With rates of 0 it stays what it was; with another fusion all else does."""
    still = [*flags, "--init", folder, "--lr", 0, "--fusion-lr", 0]
    weights = load_file(folder / "model.safetensors")
    same = load_file(run(still, tmp_path / "same") / "model.safetensors")
    assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in same)
    assert f"init       {folder}: {len(weights)} of {len(weights)} tensors\n" in capsys.readouterr().out
    more = load_file(run(still, tmp_path / "more", "--fusion", "film") / "model.safetensors")
    new = more.keys() - weights.keys()
    out = capsys.readouterr().out
    assert f"{len(weights)} of {len(more)} tensors\n" in out
    assert new == {name for name in more if name.startswith(("fusion", "standardise"))}
    assert f"           {len(new)} start from scratch (first: {min(new)})" in out
    assert all(torch.equal(more[name], weights[name]) for name in weights)
    run([*flags, "--init", tmp_path / "more"], tmp_path / "less")
    assert f"{len(new)} of that run have no place here (first: {min(new)})" in capsys.readouterr().out
    assert run([*flags, "--init", folder], tmp_path / "on") and json.loads(
        (tmp_path / "on" / "config.json").read_text()
    )["init"] == str(folder)


@pytest.mark.parametrize("more, message", [
    (("--dataset", "mnre"), "its labels are O B-LOC .*, and not None .*; name another run"),
    (("--text-encoder", "vocabulary"), "another vocabulary than .*; add --text-encoder .*encoder"),
    (("--text-encoder", "width"), r"embeddings.\S+ is \(.*64\) there and \(.*32\) here; choose the options"),
])  # fmt: skip
def test_a_run_of_other_labels_vocabulary_or_widths_is_no_start(
    flags, folder, tmp_path, encoder_dir, more, message
):
    if "--text-encoder" in more:
        other = shutil.copytree(encoder_dir, tmp_path / more[1])
        config = transformers.AutoConfig.from_pretrained(other)
        if more[1] == "width":
            config.hidden_size = config.intermediate_size = 32
            transformers.AutoModel.from_config(config).save_pretrained(other)
        else:
            tokenizer = json.loads((other / "tokenizer.json").read_text())
            vocabulary = tokenizer["model"]["vocab"]
            a, b = list(vocabulary)[-2:]
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
            (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        more = ("--text-encoder", other)
    with pytest.raises(ValueError, match=f"^--init {folder}: .*{message}") as error:
        run([*flags, "--init", folder], tmp_path / "new", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()
