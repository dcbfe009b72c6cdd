"""Files written whole, in place of one of our own kind or under a new name, and never through a link.

    with replacing("runs/x/log.jsonl") as temporary:    # what was there stays until the block has ended
        temporary.write_text("...")

Nothing here says what a file means: who writes one says, with `ours`, which files are of its kind.
"""

import contextlib
import json
import os
import re
import secrets
import stat
from pathlib import Path

from data import read_lines


def check_output(path, option="", ours=None):
    """ValueError unless `path` is a new name or a regular file of our own kind: nothing else is replaced.

    `ours(path)`: whether a file that is there is of that kind; None: any is. `option`: of the command line,
    named in the error. A link is refused, whatever it points at, so that nothing is written elsewhere.
    """
    path, other = Path(path), f"; name another {option}" if option else "; move it away"
    if not os.path.lexists(path):
        return
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path}: is a link, and nothing is written through links{other}")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is no regular file{other}")
    if ours is not None and not ours(path):
        raise ValueError(f"{path}: holds something else than this command writes there{other}")


@contextlib.contextmanager
def replacing(path):
    """A new, empty file beside `path`; when the block has ended well, it stands in the place of `path`.

    Yields its name, for whatever writes to names. A reader sees the old file or the new one, never a part,
    after a power cut too. The name is drawn, and the file made by us alone, so no link can stand there. The
    umask says who may read it. ValueError as `check_output` says.
    """
    path = Path(path)
    check_output(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(new).st_mode)
    os.close(new)
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fchmod(fd, mode)  # safetensors puts a file there that its owner alone can read
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path):
    """Whether a file is one that `replacing` draws names for: a kill leaves it behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", path.name) is not None


def sync_folder(folder):
    """Have the names in a folder on disk; some file systems know no such call for folders."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path, text):
    """A UTF-8 file, as `replacing` says."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path, records):
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def is_text(value):
    """Whether a value is text that UTF-8 can hold: half a surrogate pair is a str to Python, and no text."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_span(value):
    """Whether a value is a span [start, end)."""
    two = isinstance(value, list | tuple) and len(value) == 2 and all(type(place) is int for place in value)
    return two and 0 <= value[0] < value[1]


def read_by_id(path, id_key, check):
    """{id, a text under `id_key`: check(object)} of a file of one JSON object a line.

    ValueError with file and line: no such object, an id for the second time, what `check` says.
    """
    values = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); write one JSON object a line") from None
        if not isinstance(value, dict) or not is_text(value.get(id_key)):
            raise ValueError(f"{where}: not a JSON object with {id_key!r}, an id that is text")
        if value[id_key] in values:
            raise ValueError(f"{where}: a second line for {value[id_key]:.100}; keep one")
        try:
            values[value[id_key]] = check(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return values


def bounded_lines(file, most):
    """Lines of an open binary file with their ends; None for one of over `most` bytes, never held."""
    while line := file.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(most)
        yield None


def resume_lines(out, path, most, expected, others):
    """How many lines of the open file `out` are those `expected`; one that a kill tore is cut off its end.

    `most`: bytes of a line; `expected` yields {key: value} that each line of JSON holds, of which it begins
    with the first; `others`: what may have been others if one does not. ValueError then names the line, and
    the file is left as it was.
    """
    done = end = 0
    for line in bounded_lines(out, most):
        here = next(expected, None)
        first = dict([*(here or {}).items()][:1])
        begins = json.dumps(first, ensure_ascii=False)[:-1].encode() + b", "
        if here and line and not line.endswith(b"\n") and line[: len(begins)] == begins[: len(line)]:
            break
        try:
            record, here = json.loads(line or b""), here or {"id": "no post"}
            differing = (f"{key} {record[key]}, here {here[key]}" for key in here if record[key] != here[key])
            other = next(differing, None)
        except (ValueError, TypeError, KeyError, RecursionError):
            other = "no line of this script"
        if other:
            message = f"not what this command writes there ({other}): {others} were others"
            raise ValueError(f"{path}:{done + 1}: {message}; name another --output")
        done, end = done + 1, end + len(line)
    out.truncate(end)
    out.seek(end)
    return done
