"""What a backbone is given: photos decoded into views, or captions made ids, found and in batches made ahead.

    photos = Photos(["1"], {"1": Path("1.jpg")}, backbone, views=1, seed=0)  # backbones.py
    views, status, reason = photos.read(0)  # uint8 [V, 3, H, W]
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch.utils.data import DataLoader
from torchvision import transforms as T

from features import MISSING, OK, UNREADABLE
from parts.notes import said_of_photos
from parts.photos import by_name, find_photos, image_folders, open_picture, read_captions


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

    def __len__(self):
        return len(self.image_ids)


class Captions:
    """What `Photos` is, for captions: item (list of rows) -> list of (ids [1, n] or None, status, reason).

    `captions`: {image id: caption or None}. One equal to `placeholder` says nothing of the photo, which
    counts as missing. For phrases, `kind`, ids are [1, P, n], of a list of phrases or a caption that is cut
    into some; no phrases are missing.
    """

    def __init__(self, image_ids, captions, backbone, placeholder=None, kind="caption"):
        self.image_ids, self.captions, self.placeholder, self.kind = image_ids, captions, placeholder, kind
        self.prepare = backbone.prepare

    def read(self, row):
        caption = self.captions[self.image_ids[row]]
        if caption is None or (self.kind == "phrases" and not caption):
            return None, MISSING, f"no {self.kind}"
        if caption == self.placeholder:
            return None, MISSING, "caption of a placeholder picture"
        ids, cut = self.prepare(caption)
        if not len(ids):
            return None, UNREADABLE, f"empty {self.kind}"
        return ids[None], OK, cut

    def __getitem__(self, rows):
        return [self.read(row) for row in rows]

    def __len__(self):
        return len(self.image_ids)


def find_inputs(args, dataset, image_ids):
    """({image id: its photo's path, its caption or phrases, None for none}, the `reasons` of `find_photos`).

    ValueError if no post names a photo, FileNotFoundError if none is there.
    """
    if not image_ids:
        raise ValueError(
            f"no post of {args.dataset} names a photo: there is nothing to extract; train with --fusion none"
        )
    place, reasons = args.captions, {}
    if args.backbone == "caption":
        inputs = by_name(image_ids, read_captions(place))
    elif args.backbone == "phrases":
        said = said_of_photos(place, dataset)
        inputs = {image_id: said[image_id] for image_id in image_ids}
    else:
        folders = image_folders(args.dataset, args.data_dir, args.images)
        place, inputs = ", ".join(map(str, folders)), find_photos(image_ids, folders, reasons)
    found = [value for value in inputs.values() if value is not None]
    if not found:
        near = next((f" ({image_id}: {reason})" for image_id, reason in reasons.items()), "")
        raise FileNotFoundError(
            f"none of the {len(image_ids)} photos is in {place}{near}; name another with --images or"
            " --captions"
        )
    if args.captions:
        check_placeholder(found, args.placeholder)
    return inputs, reasons


def check_placeholder(captions, placeholder):
    """Point out a caption of suspiciously many photos; ValueError if no photo has that of a placeholder."""
    said, count = Counter(captions).most_common(1)[0]
    often = count > max(10, len(captions) / 100)
    if isinstance(said, str) and often and not placeholder:
        print(
            f"WARNING: {count} of {len(captions)} captions are {said!r}; if it describes a placeholder"
            " picture, name it with --placeholder, and these photos count as missing"
        )
    if placeholder and placeholder not in captions:
        raise ValueError(
            f"--placeholder {placeholder!r}: no caption is that; copy it as it stands in the file"
        )


# ------------------------------------------------------------------------------------------------- made ahead


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
    asked = min(workers, len(batches))
    fitting, ahead = queues(asked, batch_bytes, shared_memory(processes))
    if fitting < asked:
        print(
            f"{fitting} of {asked} workers: /dev/shm has no room for more batches"
            " (docker run --shm-size 1g makes some)"
        )
    return batch_loader(reader, batches, fitting, ahead)
