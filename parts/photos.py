"""Photos found by id, opened, decoded into views, in batches made ahead; captions read and made ids.

    photos = Photos(["1"], {"1": Path("1.jpg")}, backbone, views=1, seed=0)  # backbones.py
    views, status, reason = photos.read(0)  # uint8 [V, 3, H, W]
"""

import contextlib
import ctypes
import hashlib
import io
import os
import re
import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin
from torch.utils.data import DataLoader

from data import fold, read_lines
from features import MISSING, OK, UNREADABLE
from parts.datasets import SPLITS, locate

# Where the public releases put photos, {d} = data set.
IMAGE_PLACES = (
    "{d}/images", "{d}_images", "{d}/{d}_images", "{d}/{d}_image", "{d}_image", "{d}/img_org", "{d}_img_org",
    "img_org",
)  # fmt: skip
# Of photos, the first preferred; what a file really is, its content tells.
ENDINGS = ".jpg .jpeg .png .webp .gif .bmp .jfif .jpe .tif .tiff .avif .heic .heif".split()
# What Pillow may take a file for; HEIF once pillow-heif is registered.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF")
VISION = ("resnet50", "auto", "clip", "blip")  # backbones whose regions are a vision encoder's states
FITS = ("processor", "squash", "pad")  # how a photo becomes a square for them (framing.py)
WORDED = ("caption", "phrases")  # backbones that read what is said of a photo, and not the photo
LARGEST, MOST_CHUNKS = 2**30, 2**17  # bytes of a PNG and its parts, at most; libpng's hold 8 kB each
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
        raise FileNotFoundError(f"no image folder {roots[0]}: put photos there or name theirs with --images")
    return folders


def find_photos(image_ids, folders, reasons=None):
    """{image id: path, or None where there is no photo}.

    Looks ids up `by_name` among the names in the folders, so that no id can lead anywhere else. `reasons` is
    a dict that is told, by id, what lies there under a name like a missing photo's, or that a photo has
    another ending.
    """
    paths, names, below = dict.fromkeys(image_ids), {}, []
    for folder in folders:
        there = {}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            below += [Path(entry.path)] if entry.is_dir() and Path(entry.path) not in folders else []
            if entry.name.startswith("._"):  # what macOS keeps beside a file, under its name
                continue
            # A folder is no photo, unless named as one.
            if not entry.is_dir() or name_stem(entry.name) != fold(entry.name):
                there[entry.name] = Path(entry.path)
        paths |= by_name([image_id for image_id, path in paths.items() if path is None], there)
        names = there | names
    if reasons is not None:
        near = {}  # what stands before a dot of a name: the name
        for name in names:
            for dot in re.finditer(r"\.", fold(name)):
                near.setdefault(fold(name)[: dot.start()], name)
        for folder in below if None in paths.values() else ():
            for name in sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else ():
                near.setdefault(name_stem(name), f"{folder.name}/{name}")
        for image_id, path in paths.items():
            stem, folded = name_stem(image_id), fold(image_id)
            if path is None and stem in near:
                reasons[image_id] = f"no such file; {near[stem]!r} lies there"
            elif path is not None and stem != folded and not fold(path.name).startswith(folded):
                reasons[image_id] = f"taken from {path.name!r}"
    return paths


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
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise ValueError(f"over {LARGEST:,} bytes")
        count = 0
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            end, count = start + 12 + size, count + 1
            if count > MOST_CHUNKS:
                raise ValueError(f"a PNG of over {MOST_CHUNKS:,} chunks")
            if kind in (b"iCCP", b"zTXt", b"iTXt", b"tEXt"):
                text = file.read(min(size, most + 1))
                stream = re.search(rb"\0(\x78[\x01\x5e\x9c\xda].*)", text, re.DOTALL)
                unpacker = zlib.decompressobj()
                with contextlib.suppress(zlib.error):
                    unpacker.decompress(stream[1] if stream else b"", most)
                if size > most or unpacker.unconsumed_tail:
                    long.append((start, end))
            start = file.seek(end)
        if not long:
            return path
        parts, begin = [], 0
        for start, end in long:  # never held
            file.seek(begin)
            parts.append(file.read(start - begin))
            begin = end
        file.seek(begin)
        return io.BytesIO(b"".join([*parts, file.read()]))


def name_stem(name):
    """A folded name of a photo without its ending and what downloads add to it."""
    folded = fold(name)
    match = ADDED.search(folded)
    return folded[: match.start()] if match and match.start() else folded


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
    values = {}
    for image_id in image_ids:
        keys = [stem + end for stem in (image_id, fold(image_id)) for end in ("", *ENDINGS)]
        # Of the same stem: what begins as the id first, then by ending.
        alike = like.get(name_stem(image_id), ())
        ranked = [(not fold(entry[2]).startswith(fold(image_id)), entry) for entry in alike]
        keys += [min(ranked)[1][2]] if ranked else []
        values[image_id] = next((folded[key] for key in keys if key in folded), None)
    return values


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


def decode(file):
    """Decode an open picture; what is to be said of it: that a JPEG is cut off, and how far; else nothing.

    A JPEG may lack a tenth of its rows, which come out grey, and a progressive one the finest detail. OSError
    if more is missing.
    """
    read, ends = getattr(file, "load_read", None), []
    if isinstance(file, JpegImagePlugin.JpegImageFile):
        file.load_read = lambda size: read(size) or ends.append(size) or b"\xff\xd9"  # its end, made up
    file.load()
    if not ends:
        return ""
    width, height = file.size
    rows = height // 10 + 1
    end = np.asarray(file.crop((0, height - rows, width, height))).reshape(rows, width, -1)
    grey = ((end >= 127) & (end <= 129)).all(-1)  # what libjpeg puts where nothing is
    lost = np.logical_and.accumulate(grey[::-1]).sum() / (width * height)
    if lost > 0.1 or (file.info.get("progressive") and lacks_detail(file)):
        raise OSError("image file is truncated: over a tenth of it is missing")
    return f"cut off: lacks {lost:.0%} of its rows" if lost >= 0.005 else "cut off: lacks next to nothing"


def lacks_detail(file):
    """Whether a progressive JPEG that is cut off lacks more than part of its last scan, of one bit a number.

    Each scan sends some bits of some of the 64 numbers of a component's blocks; all but the last are whole.
    """
    raw = Path(file.filename).read_bytes()
    raw = raw[raw.rfind(b"\xff\xc2\0") :]  # behind a thumbnail's
    bits = np.full((256, 64), 8)  # [component, number]: that are still missing
    scans = list(re.finditer(rb"\xff\xda\0[\x08\x0a\x0c\x0e]([\1-\4])", raw))
    for scan in scans[:-1]:
        components, rest = raw[scan.end() :][: 2 * scan[1][0] : 2], raw[scan.end() + 2 * scan[1][0] :]
        bits[list(components), rest[0] : rest[1] + 1] = rest[2] & 15
    return bits[[layer[0] for layer in file.layer]].max() > 1


def upright(file):
    """A decoded picture of any kind -> RGB photo, turned as its EXIF data say; of an animation the first.

    What is transparent is seen on white.
    """
    # In place, and converted only if need be: each copy may be 270 MB.
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode.startswith("I"):  # 16 bits a pixel: convert would clip all but the darkest to white
        file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
    if file.has_transparency_data:
        file = file if file.mode in ("RGBA", "LA") else file.convert("RGBA")
        photo = Image.new("RGB", file.size, "white")
        photo.paste(file, mask=file)
        return photo
    return file if file.mode == "RGB" else file.convert("RGB")


def view_sha256(views):
    """SHA-256 of the plain view of a photo, uint8 [V, 3, H, W]: that of a picture which looks the same."""
    return hashlib.sha256(views[0].numpy().tobytes()).hexdigest()


class Photos:
    """Decodes photos: item (list of rows) -> list of (views [V, 3, H, W] uint8 or None, status, reason).

    `paths`: {image id: path, or an opened PIL image, or None}; `reasons`: {image id: what `find_photos` says
    of a photo that is missing, or has another name}. A photo whose plain view has the `view_sha256`
    `placeholder` counts as missing.
    """

    def __init__(self, image_ids, paths, backbone, views, seed, reasons=None, placeholder=None):
        self.image_ids, self.paths, self.reasons = image_ids, paths, reasons or {}
        self.views, self.seed, self.placeholder = views, seed, placeholder
        # Not the backbone's model: workers get a copy of this.
        self.prepare, self.resample = backbone.prepare, backbone.resample

    def augmented(self, photo, height, width):
        """A random part, 0.6 of the photo or more, perhaps mirrored, its colours shifted. uint8 [3, H, W]"""
        from torchvision import transforms as T  # a second of each start that only this should wait for

        aspect = width / height
        return T.Compose([
            T.RandomResizedCrop((height, width), (0.6, 1.0), (3 / 4 * aspect, 4 / 3 * aspect), self.resample),
            T.RandomHorizontalFlip(),
            T.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            T.PILToTensor(),
        ])(photo)  # fmt: skip

    def all_views(self, photo, image_id):
        """uint8 [V, 3, H, W]: view 0 is plain, the others depend on (seed, image id, view) alone."""
        views = [self.prepare(photo)]
        for view in range(1, self.views):
            digest = hashlib.sha256(f"{self.seed}/{image_id}/{view}".encode()).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                views.append(self.augmented(photo, *views[0].shape[1:]))
        return torch.stack(views)

    def read(self, row):
        image_id, path = self.image_ids[row], self.paths[self.image_ids[row]]
        is_image = isinstance(path, Image.Image)
        if not is_image and (path is None or not os.path.lexists(path)):
            return None, MISSING, self.reasons.get(image_id, "no such file")
        if not is_image and not os.path.isfile(path):  # to open a pipe would be to wait for ever
            return None, UNREADABLE, "not a file"
        try:
            with open_picture(path) as file:  # `decode` says it
                remarks = [self.reasons.get(image_id), decode(file)]
                views = self.all_views(upright(file), image_id)
        except Exception as error:  # decoders meet and raise anything; the reason is recorded
            reason = f"{type(error).__name__}: {error}"
            # The same on every machine.
            return None, UNREADABLE, reason if is_image else reason.replace(f"{path.parent}{os.sep}", "")
        if self.placeholder and view_sha256(views) == self.placeholder:
            return None, MISSING, "placeholder picture"
        return views, OK, "; ".join(filter(None, remarks))

    def __getitem__(self, rows):
        return [self.read(row) for row in rows]


def low_priority(worker):
    """Let the forward pass go first: its threads wait for the slowest of them."""
    os.nice(10)


def shared_memory(processes):
    """Bytes of shared memory for the queues of each of so many processes: half of what is free."""
    return shutil.disk_usage("/dev/shm").free // (2 * processes) if os.path.isdir("/dev/shm") else 2**62


def queues(workers, batch_bytes, room):
    """(workers, batches each makes ahead) whose queues fit into `room` bytes; Docker gives 64 MB of them."""
    fitting = min(workers, room // batch_bytes)
    return fitting, min(2, max(1, room // (batch_bytes * max(1, fitting))))


def batch_loader(reader, batches, workers, ahead=2):
    """Reads batches of rows of `Photos` or `Captions` in so many processes (0: none), each `ahead`."""
    return DataLoader(
        reader, batch_size=None, sampler=batches, collate_fn=list, num_workers=workers,
        worker_init_fn=low_priority, prefetch_factor=ahead if workers else None,
    )  # fmt: skip


def load_ahead(reader, batches, workers, batch_bytes, processes):
    """`batch_loader` of at most so many workers: as many as have a batch to make, and room for its bytes."""
    most = min(workers, len(batches))
    fitting, ahead = queues(most, batch_bytes, shared_memory(processes))
    if fitting < most:
        reason = "/dev/shm has no room for more batches (docker run --shm-size 1g makes some)"
        print(f"{fitting} of {most} workers: {reason}")
    return batch_loader(reader, batches, fitting, ahead)


def thumbnail(path, side=240):
    """RGB photo of at most `side` pixels, upright, of a file as extraction reads it: its pixels alone."""
    with open_picture(path) as file:
        # A JPEG is decoded at a fraction of its size: several times as fast.
        file.draft("RGB", (2 * side, 2 * side))
        decode(file)
        photo = upright(file)
        photo.thumbnail((side, side))
        photo.info = {}  # comments, places and profiles, which saving would pass on
        return photo.copy()
