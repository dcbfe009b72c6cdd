"""Where the photos of a data set lie, how one is opened, and what a file of captions says of them, by id."""

import contextlib
import ctypes
import io
import os
import re
import struct
import threading
import zlib
from pathlib import Path

from PIL import Image, PngImagePlugin

from data import SPLITS, fold, locate, read_lines

# Where the public releases put photos, {d} = data set.
IMAGE_PLACES = (
    "{d}/images", "{d}_images", "{d}/{d}_images", "{d}/{d}_image", "{d}_image", "{d}/img_org", "{d}_img_org",
    "img_org",
)  # fmt: skip
# Of photos, the first preferred; what a file really is, its content tells.
ENDINGS = ".jpg .jpeg .png .webp .gif .bmp .jfif .jpe .tif .tiff .avif .heic .heif".split()
# What Pillow may take a file for; HEIF once pillow-heif is registered.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF")
LARGE = 2**24  # pixels; of larger pictures threads hold one at a time, a few hundred MB
TURN = threading.Semaphore()
os.register_at_fork(after_in_child=TURN.__init__)  # the thread that held it is not in the child
# Endings and what downloads add to them: x.jpg.jpg, x.jpg_large, x.jpg:large, x.jpg?name=large, x?format=jpg,
# x.jpg.1
SIZES = r"[_:](thumb|small|medium|large|orig|\d+x\d+)"
ADDED = re.compile(rf"({'|'.join(map(re.escape, ENDINGS))})+({SIZES}|[?@].*|\.\d+)?$|\?.*$")


def image_folders(name, data_dir="data", images=None):
    """Folders that hold the photos: `images`, or all places a release uses, with their split folders."""
    name, data_dir = locate(name, data_dir)
    places = [place for place in IMAGE_PLACES if "{d}" in place or name == "mnre"]  # a bare img_org is MNRE's
    roots = [Path(images)] if images else [Path(data_dir) / place.format(d=name) for place in places]
    parts = ("", *(split for names in SPLITS.values() for split in names))
    folders = [root / part for root in roots for part in parts if (root / part).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"no image folder {roots[0]}: put the photos there or name theirs with --images"
        )
    return folders


def find_photos(image_ids, folders, reasons=None):
    """{image id: path, or None where there is no photo}.

    Looks ids up `by_name` among the names in the folders, so that no id can lead anywhere else. `reasons` is
    a dict that is told, by id, what lies there under a name like a missing photo's, or that a photo has
    another ending.
    """
    found, names, below = dict.fromkeys(image_ids), {}, []
    for folder in folders:
        there = {}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            below += [Path(entry.path)] if entry.is_dir() and Path(entry.path) not in folders else []
            if entry.name.startswith("._"):  # what macOS keeps beside a file, under its name
                continue
            # A folder is no photo, unless named as one.
            if not entry.is_dir() or name_stem(entry.name) != fold(entry.name):
                there[entry.name] = Path(entry.path)
        found |= by_name([image_id for image_id, path in found.items() if path is None], there)
        names = there | names
    if reasons is not None:
        near = {}  # what stands before a dot of a name: the name
        for name in names:
            for dot in re.finditer(r"\.", fold(name)):
                near.setdefault(fold(name)[: dot.start()], name)
        for folder in below if None in found.values() else ():
            for name in sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else ():
                near.setdefault(name_stem(name), f"{folder.name}/{name}")
        for image_id, path in found.items():
            stem, folded = name_stem(image_id), fold(image_id)
            if path is None and stem in near:
                reasons[image_id] = f"no such file; {near[stem]!r} lies there"
            elif path is not None and stem != folded and not fold(path.name).startswith(folded):
                reasons[image_id] = f"taken from {path.name!r}"
    return found


@contextlib.contextmanager
def open_picture(source):
    """The open picture of a file, or a copy of a PIL image, and its pixels for as long as the block lasts.

    ValueError or OSError if it is of none of `FORMATS`, or has more pixels than Pillow thinks safe: over 1 GB
    to decode. Large ones wait until no other thread has one.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    is_image = isinstance(source, Image.Image)
    if is_image and source.format not in (None, "MPO", *formats):
        raise ValueError(f"a {source.format}, not one of {', '.join(formats)}")
    file = source if is_image else Image.open(without_long_texts(source), formats=formats)
    if file.width * file.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels are too many")
    large = file.width * file.height > LARGE
    with TURN if large else contextlib.nullcontext():
        picture = file.copy() if is_image else file
        try:
            yield picture
        finally:
            picture.close()
            if large:  # glibc would keep its memory, once for each thread
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)


def without_long_texts(path):
    """The path of a picture; of a PNG that holds more text or profile than Pillow takes, a file without it.

    Pillow refuses a chunk that unpacks to over 1 MB. Shorter ones stay: they may say how a photo is turned.
    """
    long, most, start = [], PngImagePlugin.MAX_TEXT_CHUNK, 8
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return path
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            end = start + 12 + size
            if kind in (b"iCCP", b"zTXt", b"iTXt", b"tEXt"):
                text = file.read(min(size, os.fstat(file.fileno()).st_size))
                stream = re.search(rb"\0(\x78[\x01\x5e\x9c\xda].*)", text, re.DOTALL)
                unpacker = zlib.decompressobj()
                with contextlib.suppress(zlib.error):
                    unpacker.decompress(stream[1] if stream else b"", most)
                if len(text) > most or unpacker.unconsumed_tail:
                    long.append((start, end))
            start = file.seek(end)
        if not long:
            return path
        file.seek(0)
        raw = file.read()
    for start, end in reversed(long):
        raw = raw[:start] + raw[end:]
    return io.BytesIO(raw)


def name_stem(name):
    """A folded name of a photo without its ending and what downloads add to it."""
    folded = fold(name)
    found = ADDED.search(folded)
    return folded[: found.start()] if found and found.start() else folded


def by_name(image_ids, names):
    """{image id: what `names` has for it, or None}.

    The first there is of: `<id>`, `<id>.jpg` and such in the order of `ENDINGS`; the same `fold`ed; a name of
    the same stem, with an ending twice, another than the id's, or what downloads add (see `ADDED`).
    """
    folded = {fold(name): value for name, value in reversed(names.items())} | names  # the first of equals
    like = {}
    for name in names:
        ending = fold(name)[len(name_stem(name)) :]
        order = next((i for i, end in enumerate(ENDINGS) if ending.startswith(end)), len(ENDINGS))
        like.setdefault(name_stem(name), []).append((order, len(ending), name))
    found = {}
    for image_id in image_ids:
        keys = [stem + end for stem in (image_id, fold(image_id)) for end in ("", *ENDINGS)]
        # Of the same stem: what begins as the id first, then by ending.
        alike = like.get(name_stem(image_id), ())
        ranked = [(not fold(entry[2]).startswith(fold(image_id)), entry) for entry in alike]
        keys += [min(ranked)[1][2]] if ranked else []
        found[image_id] = next((folded[key] for key in keys if key in folded), None)
    return found


def read_captions(path):
    """{photo's name: caption} of a UTF-8 file with `<name> :<caption>` or `<name><TAB><caption>` lines.

    Raises ValueError with file and line; a photo captioned twice is one.
    """
    captions = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        name, separator, caption = line.partition("\t" if "\t" in line else " :")
        if not separator:
            raise ValueError(f"{path}:{number}: expected '<photo> :<caption>', found {line[:80]!r}")
        if name in captions:
            raise ValueError(f"{path}:{number}: {name} has a caption already; keep one")
        captions[name] = caption.strip()
    return captions
