"""The feature file: an HDF5 file of the region features of a data set's photos; made, filled, read, checked.

    cache = FeatureCache("features/twitter2017-resnet50-224.h5")
    batch = cache.read(["17_06_4705", None])    # regions [B, R, D], region_mask [B, R] (True = real), ...

    settings = {"format": FORMAT}               # and how they are made, by name: checked when filling goes on
    create_file(path, image_ids, photo_bytes, (N, views, R, D), "float16", settings)
    writer = FeatureWriter(path, os.open(path, os.O_RDWR), settings, image_ids)
    writer.write(row, regions, (rows, columns), OK, "")     # regions [views, r, D], r <= R

    write_features("mine.h5", {"1.jpg": array, "2.jpg": None})    # regions [r, D] that you made yourself

Needs torch, numpy and h5py only, and nothing else of this project: copy the file and use it.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch

FORMAT = 4  # version of the feature file's layout
OK, MISSING, UNREADABLE = 1, 2, 3  # `status`; 0 = not done
REASON_WIDTH = 200  # bytes kept of why a photo could not be read
BOX_COLUMNS = ("boxes", "box_labels")  # of a file whose regions are those of boxes
LABEL_WIDTH = 40  # bytes kept of what a box holds
LARGEST = 2**16  # bytes of an attribute, at most
ELSEWHERE = "elsewhere"  # the "backbone" of regions that `write_features` was given


def columns_of(shape, kind, width, boxes=False):
    """{column: (shape, dtype)} of a file of regions [N, V, R, D] of dtype `kind` and ids of `width` bytes.

    `boxes`: whether each region is a part of the photo, which the last two columns name.
    """
    rows, views, most, _ = shape
    of_boxes = {"boxes": ((rows, most, 4), "<f4"), "box_labels": ((rows, most), f"S{LABEL_WIDTH}")}
    return {
        "regions": (shape, kind), "num_regions": ((rows,), "<u2"), "grid": ((rows, 2), "<u2"),
        "image_id": ((rows,), f"S{width}"), "status": ((rows,), "|u1"),
        "reason": ((rows,), f"S{REASON_WIDTH}"), "crc32": ((rows, views), "<u4"),
        "photo_bytes": ((rows,), "<i8"), **(of_boxes if boxes else {}),
    }  # fmt: skip


def unfinished(path):
    """The name of the feature file `path`, a Path, until all its rows are done."""
    return path.with_name(path.name + ".partial")


def is_type(stored, dtype):
    """Whether a type of HDF5 is exactly that of a numpy dtype: class, size, order of bytes."""
    return stored.equal(h5py.h5t.py_create(np.dtype(dtype)))


def read_attrs(file):
    """How an open feature file was made: {name: str, int, float or list}; text has a fixed length there.

    ValueError if it is of another format, or an attribute of another type.
    """
    attrs = {}
    for number in range(h5py.h5a.get_num_attrs(file)):
        attr = h5py.h5a.open(file, index=number)
        stored, size = attr.get_type(), math.prod(attr.shape)
        dtypes = [kind for kind in ("<i8", "<f8", f"S{stored.get_size()}") if is_type(stored, kind)]
        value = None
        if dtypes and 0 < size * stored.get_size() == attr.get_storage_size() <= LARGEST:
            array = np.empty(attr.shape, dtypes[0])
            attr.read(array)
            value = array.tolist()
        attrs[attr.name.decode()] = value.decode() if isinstance(value, bytes) else value
    if (version := attrs.get("format")) != FORMAT:
        other = f"format {version or 'none'}, expected {FORMAT}"
        raise ValueError(f"{other}; name a file that this version of extract_features.py made")
    for name, value in attrs.items():
        if value is None:
            raise ValueError(f"its attribute {name!r} is no number or text; make it anew")
    return attrs


def find_column(file, name):
    """(data set of HDF5, shape, byte offset) of a column: one plain block of bytes of the open feature file.

    ValueError otherwise, before anything is read of it and before any other file is opened.
    """
    if not file.links.exists(name):
        raise ValueError(f"no column {name.decode()}; make it anew")
    if file.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"column {name.decode()}: a link; make it anew")
    column = h5py.h5d.open(file, name)
    layout = column.get_create_plist()
    plain = layout.get_layout() == h5py.h5d.CONTIGUOUS and not layout.get_nfilters()
    if not plain or layout.get_external_count() or column.get_offset() is None:
        raise ValueError(f"column {name.decode()}: not one block of this file; make it anew")
    return column, column.shape, column.get_offset()


def read_layout(path):
    """(attributes, {column: (byte offset, shape, dtype)}) of the feature file at `path`, a Path.

    Each column is one block inside the file, of exactly the shape and type that `create_file` lays out, so
    that nothing a file says of itself has numpy read what is no number, another file, or more than is there.
    Raises FileNotFoundError, PermissionError and their like as they are, ValueError for bytes that are no
    feature file.
    """
    if path.exists() and not path.is_file():  # to open a pipe would be to wait for ever
        raise ValueError(f"{path}: not a readable HDF5 file (not a file); name another")
    try:
        with open(path, "rb") as raw, h5py.File(path, "r", locking=False) as file:  # locks: the caller's
            length, attrs, columns = os.fstat(raw.fileno()).st_size, read_attrs(file.id), {}
            regions, shape, _ = find_column(file.id, b"regions")
            kind = "<f2" if is_type(regions.get_type(), "<f2") else "|u1"
            if len(shape) != 4 or not all(shape):
                raise ValueError(f"column regions: of shape {shape}; make it anew")
            width = find_column(file.id, b"image_id")[0].get_type().get_size()
            boxes = any(file.id.links.exists(name.encode()) for name in BOX_COLUMNS)
            for name, (size, dtype) in columns_of(shape, kind, width, boxes).items():
                column, lengths, offset = find_column(file.id, name.encode())
                if lengths != size or not is_type(column.get_type(), dtype):
                    raise ValueError(f"column {name}: not {dtype} of shape {size}; make it anew")
                if offset + math.prod(size) * np.dtype(dtype).itemsize > length:
                    raise ValueError(f"shorter than its {size} {name} need; it was cut off, make it anew")
                columns[name] = offset, size, np.dtype(dtype)
    except (OSError, RuntimeError, LookupError, TypeError, OverflowError, UnicodeDecodeError) as error:
        code = re.search(r"errno = (\d+)", str(error))
        if isinstance(error, OSError) and (error.filename or code):  # the system's word, not the file's fault
            code = error.errno if error.filename else int(code[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable HDF5 file ({reason}); make it anew") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return attrs, columns


def read_columns(path, columns):
    """{column: array} of all columns but the regions, as `read_layout` found them."""
    arrays = {}
    with open(path, "rb") as file:
        for name, (offset, shape, dtype) in columns.items():
            if name != "regions":
                arrays[name] = np.empty(shape, dtype)
                file.seek(offset)
                if file.readinto(arrays[name]) < arrays[name].nbytes:
                    raise ValueError(f"{path}: cut off while it was read; make it anew")
    return arrays


def finite(regions):
    """Whether no number of regions, float16 or uint8, is infinite or NaN; many times as fast as numpy's."""
    return regions.dtype == np.uint8 or (regions.view(np.uint16) & 0x7FFF).max() < 0x7C00


def about_crc32(image_id, num_regions, grid, status, reason, *boxes):
    """Checksum of all columns of a row but its regions; `boxes`: those of boxes, of a file that has them."""
    about = json.dumps([image_id, int(num_regions), *map(int, grid), int(status), reason])
    return zlib.crc32(b"".join([about.encode(), *(column.tobytes() for column in boxes)]))


def row_crc32(regions, *about):
    """[V] checksums of a row of a feature file, one a view: of its regions [V, R, D], all other columns."""
    start = about_crc32(*about)
    return [zlib.crc32(np.ascontiguousarray(view).view(np.uint8), start) for view in regions]


def attrs_crc32(attrs):
    """Checksum of how a feature file was made, itself left out."""
    others = {key: value for key, value in attrs.items() if key != "attrs_crc32"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def photos_sha256(image_ids, sizes):
    """SHA-256 over the names and sizes of photos: which photos they are."""
    return hashlib.sha256(repr([*zip(image_ids, map(int, sizes), strict=True)]).encode()).hexdigest()


def reserve(path, size, flags=0):
    """Take `size` bytes on disk for a file, opened with `flags`; OSError if there is not so much."""
    fd = os.open(path, os.O_RDWR | flags, 0o644)
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some file systems take none ahead
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            need = f"no room for {size:,} bytes ({error.strerror})"
            raise OSError(f"{path.parent}: {need}; make room or lower --views") from None
        os.ftruncate(fd, max(size, os.fstat(fd).st_size))
    finally:
        os.close(fd)


def create_file(path, image_ids, sizes, shape, kind, attrs, boxes=False):
    """Make an empty feature file at `path`: all space laid out, every row's status 0.

    `sizes` [N]: bytes of each photo, 0 = unknown; `shape` (N, views, R, D) and `kind`, a dtype: the regions';
    `attrs`: how they are made, with "format": FORMAT; `boxes`: whether they are those of boxes.

    Built under another name and renamed, since a kill while HDF5 writes its metadata leaves a file that does
    not open. Without time stamps, two runs give identical bytes. A disk that is too small is noticed now.
    """
    names = np.array([image_id.encode() for image_id in image_ids])
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        new = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # a link of this name would lead elsewhere
        reserve(temporary, math.prod(shape) * np.dtype(kind).itemsize, new)  # HDF5 says it less clearly
        with h5py.File(temporary, "w") as file:
            for name, (size, dtype) in columns_of(shape, kind, names.dtype.itemsize, boxes).items():
                layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # gives the data a fixed offset in the file
                layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                layout.set_obj_track_times(False)
                stored, space = h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(size)
                h5py.h5d.create(file.id, name.encode(), stored, space, layout)
                if name != "regions":
                    file[name][:] = {"image_id": names, "photo_bytes": sizes}.get(name, np.zeros(size, dtype))
            attrs = attrs | {"photos_sha256": photos_sha256(image_ids, sizes)}
            attrs |= {"attrs_crc32": attrs_crc32(attrs)}
            for key, value in attrs.items():  # h5py would store a str as a variable-length object
                file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
        reserve(temporary, temporary.stat().st_size)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class FeatureWriter:
    """Fills the rows of a file made by `create_file` with `settings`; ValueError if it was made with others.

    `fd`: the file, open for writing; closed with the writer. Several may fill one file, each other rows.
    """

    def __init__(self, path, fd, settings, image_ids):
        self.path, self.fd, self.image_ids = path, fd, image_ids
        try:
            self.attrs, self.columns = refuse_other_settings(path, settings)
            columns = read_columns(path, self.columns)
            self.status, self.photo_bytes = columns["status"], columns["photo_bytes"]
        except (OSError, ValueError):
            self.close()
            raise

    def close(self):
        os.close(self.fd)

    def put(self, name, row, value):
        offset, shape, dtype = self.columns[name]
        raw, row_bytes = np.asarray(value, dtype).tobytes(), dtype.itemsize * math.prod(shape[1:])
        assert len(raw) == row_bytes, (name, len(raw), row_bytes)
        at = offset + row * row_bytes
        while raw:  # a write may be cut short, by a full disk for one; the next then raises
            try:
                count = os.pwrite(self.fd, raw, at)
            except OSError as error:
                reason = f"{error.strerror}; make room, and the same command goes on"
                raise OSError(f"{self.path}: {reason}") from None
            raw, at = raw[count:], at + count

    def write(self, row, regions, grid, status, reason, boxes=()):
        """One photo: regions [V, n, D] or None, their (rows, columns), the rest, its status last of all.

        `boxes`, of a file that has them: [n, 4] in shares of the photo and n labels, as bytes.
        """
        _, (_, views, most, dim), kind = self.columns["regions"]
        regions = np.zeros((views, 0, dim), kind) if regions is None else regions
        count, reason = regions.shape[1], reason.encode()[:REASON_WIDTH].decode(errors="ignore")
        stored = np.pad(regions, ((0, 0), (0, most - count), (0, 0)))
        about = {"image_id": self.image_ids[row], "num_regions": count, "grid": grid}
        of_boxes, names = {}, [name for name in BOX_COLUMNS if name in self.columns]
        for name, values in zip(names, boxes, strict=True):
            of_boxes[name] = np.zeros(self.columns[name][1][1:], self.columns[name][2])
            of_boxes[name][: len(values)] = values
        self.put("regions", row, stored)
        for name, value in (about | of_boxes).items():
            self.put(name, row, value.encode() if name == "image_id" else value)
        self.put("crc32", row, row_crc32(stored, *about.values(), status, reason, *of_boxes.values()))
        self.put("reason", row, reason.encode())
        self.put("status", row, status)
        self.status[row] = status


def refuse_other_settings(path, settings):
    """`read_layout`; ValueError that names every setting in which the file differs from those asked for.

    A setting of None: the file has none of that name.
    """
    attrs, columns = read_layout(path)
    others = [f"{key} (file: {attrs.get(key, 'none')}, asked: {value})"
              for key, value in settings.items() if attrs.get(key) != value]  # fmt: skip
    if others:
        reason = f"made with other settings: {'; '.join(others)}"
        raise ValueError(f"{path}: {reason}; another --cache-dir keeps both")
    return attrs, columns


def as_regions(image_id, values, width=None):
    """Values [R, D] of a photo as float16; ValueError if they are no regions, or not `width` wide."""
    fault = ""
    try:
        with np.errstate(over="ignore"):  # what does not fit is infinite then
            regions = np.asarray(values, np.float32).astype(np.float16)
        if regions.ndim != 2 or not 0 < len(regions) < 2**16 or not regions.shape[1]:
            fault = f"of shape {list(regions.shape)}, not [1 to 65535, width]; give None for a photo without"
        elif width not in (None, regions.shape[1]):
            fault = f"{regions.shape[1]} wide, others {width}"
        elif not finite(regions):
            fault = "not finite as float16, up to 65504; scale them"
    except (TypeError, ValueError) as error:
        fault = f"no array of numbers ({error})"
    if fault:
        raise ValueError(f"photo {image_id}: its regions are {fault}")
    return regions


def write_features(path, photos, source="unknown"):
    """Make a feature file of your own regions, for train.py --model bert-vision --features PATH.

    `photos`: {photo id, as the posts name it: array [R, D], or None where there is none}; R may differ from
    photo to photo. Each is read twice, so a mapping may load it when asked for. `source`: what made them.
    ValueError names a photo whose regions do not fit, or `path` if it is there.
    """
    path, most, width = Path(path), 0, None
    if path.exists() or unfinished(path).exists():
        raise ValueError(f"{path}: is there already, or begun; name another file, or move it away")
    for image_id, values in photos.items():
        if values is not None:
            rows, width = as_regions(image_id, values, width).shape
            most = max(most, rows)
    if not most:
        raise ValueError(f"{path}: no photo has regions; give some")
    settings = {"format": FORMAT, "backbone": ELSEWHERE, "weights": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, ids = unfinished(path), list(photos)
    create_file(partial, ids, [0] * len(ids), (len(ids), 1, most, width), "float16", settings)
    writer = FeatureWriter(partial, os.open(partial, os.O_RDWR), settings, ids)
    for row, (image_id, values) in enumerate(photos.items()):
        regions = None if values is None else as_regions(image_id, values, width)[None]
        writer.write(row, regions, (0, 0), *((MISSING, "none given") if values is None else (OK, "")))
    writer.close()
    os.replace(partial, path)


class Regions:
    """Regions of photos, one row a photo, as arrays; batches read from them.

    Attributes: `rows` {image id: row}, `regions` [N, V, R, D] and their `shape`, `status` [N], `num_regions`
    [N] and `grid` [N, 2], the rows and columns of places that the last regions of a photo stand for, row by
    row; regions before them (a class token) are of the photo as a whole.
    """

    resident = None  # all regions on a device, where they are kept on one

    views = property(lambda self: self.shape[1])
    region_dim = property(lambda self: self.shape[3])

    def check(self, rows, views):
        """Called before views of rows are read: ValueError if one is damaged."""

    def photos_of(self, image_id):
        """The ids of a post's photos: none, one, or several, in a tuple that is no photo's id itself."""
        if isinstance(image_id, tuple) and image_id not in self.rows:
            return list(image_id)
        return [] if image_id is None else [image_id]

    def has_photo(self, image_id):
        """Whether a photo was there and readable, or one of several; None is no photo."""
        return any(self.status[self.rows[photo]] == OK for photo in self.photos_of(image_id))

    def read(self, photos, views=None):
        """What a batch holds of its photos, image ids or None for none; `views`: which to read, default 0.

        regions [B, R, D] in the file's type, region_mask [B, R] (True = real), region_grid [B, 2] (rows,
        columns), photo_row [B], which photo it is, -1 for none.
        """
        rows = np.array([0 if photo is None else self.rows[photo] for photo in photos])  # None's is hidden
        views = np.zeros(len(photos), int) if views is None else np.asarray(views)
        shown = np.array([photo is not None for photo in photos])
        self.check(rows[shown], views[shown])
        real = shown & (self.status[rows] == OK)
        mask = np.arange(self.shape[2]) < np.where(real, self.num_regions[rows], 0)[:, None]
        grid = np.where(real[:, None], self.grid[rows], 0)
        about = {"region_mask": mask, "region_grid": grid, "photo_row": np.where(real, rows, -1)}
        about = {key: torch.from_numpy(values) for key, values in about.items()}
        if self.resident is None:
            flat = np.asarray(self.regions).reshape(-1, *self.shape[2:])  # [N * V, R, D]
            values = flat.take(rows * self.views + views, 0)  # numpy's fastest way to copy rows
            if not real.all():
                values[~real] = 0
            return {"regions": torch.from_numpy(values)} | about
        device = self.resident.device
        how = {"device": device, "non_blocking": device.type == "cuda"}  # elsewhere as in `to_device`
        about = {key: value.to(**how) for key, value in about.items()}  # a few kB
        rows, views, real = (torch.from_numpy(values).to(**how) for values in (rows, views, real))
        return {"regions": self.resident[rows, views].masked_fill(~real[:, None, None], 0)} | about


class FeatureCache(Regions):
    """Read side of a feature file made by extract_features.py.

    The regions are contiguous in the file, so they are mapped into memory at their offset: nothing is copied
    before it is asked for, the pages are shared by all processes, and reading is safe under fork and spawn
    alike. A view is compared with its checksum when it is first read.

    Attributes beside those of `Regions`: `attrs` (how the file was made); `boxes`: [] or, of a file of boxes,
    which part of its photo each region is, [N, R, 4] left, top, right, bottom in shares of it, and labels
    [N, R], bytes.
    Raises FileNotFoundError or ValueError when the file is absent, unfinished, truncated or no feature file.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            partial = " (an unfinished one is there: run the same command again to resume it)"
            hint = partial if unfinished(self.path).exists() else ""
            advice = "make it with extract_features.py, name another with --features, or add --fusion none"
            raise FileNotFoundError(f"no feature file {path}{hint}; {advice}")
        self.attrs, columns = read_layout(self.path)
        arrays = read_columns(self.path, columns)
        names = "status", "num_regions", "crc32", "photo_bytes"
        self.status, self.num_regions, self.crc32, self.photo_bytes = (arrays[name] for name in names)
        self.grid = arrays["grid"].astype(np.int64)
        self.boxes = [arrays[name] for name in BOX_COLUMNS if name in arrays]
        missing = (self.status == 0).sum()
        try:
            self.ids = [name.decode() for name in arrays["image_id"].tolist()]
            self.reasons = [reason.decode() for reason in arrays["reason"].tolist()]
            whole = photos_sha256(self.ids, self.photo_bytes) == self.attrs.get("photos_sha256")
        except UnicodeDecodeError:
            whole = False
        if missing or not whole or self.attrs.get("attrs_crc32") != attrs_crc32(self.attrs):
            fault = f"{missing} photos not done" if missing else "what it says of itself is damaged"
            raise ValueError(f"{path}: {fault}; make it anew with extract_features.py --overwrite")
        offset, self.shape, dtype = columns["regions"]
        self.rows = {image_id: row for row, image_id in enumerate(self.ids)}
        self.checked = np.zeros(self.shape[:2], bool)
        self.regions = np.memmap(self.path, dtype, mode="r", offset=offset, shape=self.shape)

    @property
    def sha256(self):
        """Of the checksums of all rows: two files share it exactly when they hold the same features."""
        return hashlib.sha256(self.crc32.tobytes()).hexdigest()

    def __reduce__(self):
        return FeatureCache, (self.path,)  # a worker opens the file: a pickled map would carry all its bytes

    def whole(self, row, views=slice(None)):
        """Whether a row is as it was written, of finite numbers, with no more places than regions."""
        regions, count = self.regions[row, views], self.num_regions[row]
        about = self.ids[row], count, self.grid[row], self.status[row], self.reasons[row]
        of_boxes = [column[row] for column in self.boxes]
        fits = self.status[row] != OK or self.grid[row].prod() <= count <= self.shape[2]
        shares = not of_boxes or bool(((of_boxes[0] >= 0) & (of_boxes[0] <= 1)).all())
        same = row_crc32(regions, *about, *of_boxes) == self.crc32[row, views].tolist()
        return bool(same and fits and shares and finite(regions))

    def check(self, rows, views):
        new = ~self.checked[rows, views]
        # Of missing photos too: their status may be damaged.
        for row, view in zip(rows[new], views[new], strict=True):
            if not self.whole(row, slice(view, view + 1)):
                raise self.damaged(row, f"view {view}")
            self.checked[row, view] = True

    def damaged(self, row, view):
        """The error for a row that is not `whole`."""
        fault = "damaged" if finite(self.regions[row]) else "not finite, so damaged"
        where = f"{self.path}: the features of photo {self.ids[row]} are {fault} ({view})"
        advice = "--verify finds all such rows, and the same command without it then repairs them"
        return ValueError(f"{where}; extract_features.py {advice}; make others' files anew")

    def keep_on(self, device):
        """Copy all regions to a device, every row checked; `read` then takes them there, where they stay."""
        with ThreadPoolExecutor() as pool:
            whole = np.array(list(pool.map(self.whole, range(len(self.ids)))))
        if not whole.all():
            raise self.damaged(np.flatnonzero(~whole)[0], "some view")
        self.checked[:] = True
        self.resident = torch.from_numpy(self.regions[:0].copy()).new_empty(self.shape, device=device)
        for row in range(len(self.ids)):
            self.resident[row] = torch.from_numpy(self.regions[row].copy())
