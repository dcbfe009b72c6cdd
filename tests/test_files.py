"""Files written whole: what was there stays until then, nothing goes through a link, the umask counts."""

import io
import os
import stat
import tracemalloc

import pytest

from parts.files import bounded_lines, check_output, replacing, write_json, write_text


def others(folder, *names):
    """What lies in a folder beside `names`: nothing, if a write has cleaned up."""
    return {path.name for path in folder.iterdir()} - set(names)


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"f1": 1})
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == '{\n  "f1": 1\n}\n'
        raise RuntimeError("in the middle")
    assert path.read_text() == '{\n  "f1": 1\n}\n'
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode() and not others(tmp_path, "scores.json")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    """Whatever the writer did: safetensors for one puts a file of mode 0600 in place of ours."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "weights") as temporary:
            other = tmp_path / "other"
            other.write_bytes(b"weights")
            other.chmod(0o640)
            other.replace(temporary)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode


def make_target(kind, path):
    """Something at `path` that is no file of ours; returns a look at what must still be there afterwards."""
    secret = path.with_name("secret")
    secret.write_text("mine")
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return lambda: (path.lstat().st_mode, secret.read_text(), path.with_name("nowhere").exists())


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_and_untouched(tmp_path, kind):
    path = tmp_path / "out.json"
    look = make_target(kind, path)
    before = look()
    with pytest.raises(ValueError, match="is a link" if "link" in kind else "is no regular file"):
        write_json(path, {})
    with pytest.raises(ValueError, match="name another --output"):
        check_output(path, "--output")
    assert look() == before and not others(tmp_path, "out.json", "secret")


def test_only_files_of_its_own_kind_are_an_output(tmp_path):
    def ours(path):
        return path.read_text().startswith("ours")

    path = tmp_path / "page.html"
    check_output(path, "--output", ours)  # a new name
    path.write_text("theirs")
    with pytest.raises(ValueError, match="page.html: holds something else .* name another --output"):
        check_output(path, "--output", ours)
    path.write_text("ours, older")
    check_output(path, "--output", ours)


def test_a_link_beside_the_file_is_never_written_through(tmp_path):
    """A folder of a stranger's may hold links at names that writers use by habit, NAME.tmp for one."""
    target = tmp_path / "bashrc"
    target.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json.tmp").symlink_to(target)
    write_json(folder / "metrics.json", {"label": "B-$(command)"})
    assert target.read_text() == "mine"


def test_bounded_lines_hold_no_line_over_the_bound():
    lines = bounded_lines(io.BytesIO(b"aaaa\naaaaa\naaaaaa\n\naaaaaaaaaaaa\na"), 5)
    assert list(lines) == [b"aaaa\n", b"aaaaa\n", None, b"\n", None, b"a"]

    class Endless(io.RawIOBase):
        left = 100 * 2**20

        def readable(self):
            return True

        def readinto(self, buffer):
            count = min(len(buffer), self.left)
            buffer[:count] = b"a" * count
            self.left -= count
            return count

    tracemalloc.start()
    assert list(bounded_lines(io.BufferedReader(Endless()), 2**20)) == [None]
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
