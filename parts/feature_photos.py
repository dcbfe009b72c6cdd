"""Whether a feature file is of these photos: all there, of the same size, and no picture more than once."""

import os
import shutil
import zlib

import numpy as np

from features import ELSEWHERE, OK, about_crc32


def require_room(path, size):
    """ValueError if the disk has no room for `size` bytes at `path`, less what a file there holds already."""
    needed = size - (path.stat().st_blocks * 512 if path.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(f"{path.parent}: {needed:,} bytes needed, {free:,} free; make room or lower --views")


def photo_bytes(paths):
    """The size of each photo at `paths`, {image id: path or None}, in bytes; 0 where there is none."""
    there = (path is not None and os.path.isfile(path) for path in paths.values())
    return [os.path.getsize(path) if is_file else 0 for path, is_file in zip(paths.values(), there)]


def refuse_other_photos(path, attrs, image_ids, sizes, paths):
    """ValueError if photos at `paths`, {image id: path or None}, have not the `sizes` of a feature file's.

    Sizes are in bytes, 0 = unknown.
    """
    here = photo_bytes({image_id: paths.get(image_id) for image_id in image_ids})
    other = [image_id for image_id, a, b in zip(image_ids, sizes, here, strict=True) if a and b and a != b]
    if other:
        origin = f"first: {other[0]}; it was made from {attrs.get('made_from', 'an unknown folder')}"
        advice = "name the photos with --images, the file with --features, or take another --cache-dir"
        reason = f"made of other photos than those here: {len(other)} differ in size ({origin})"
        raise ValueError(f"{path}: {reason}; {advice}")


def compare_photos(cache, paths):
    """How many of the photos the file was made of are not among `paths`, {image id: path or None}.

    ValueError if some that are have another size: they are of another folder, or were replaced since.
    """
    refuse_other_photos(cache.path, cache.attrs, cache.ids, cache.photo_bytes, paths)
    made_of = [image_id for image_id, size in zip(cache.ids, cache.photo_bytes, strict=True) if size > 0]
    return sum(paths.get(image_id) is None for image_id in made_of)


def require_photos(cache, image_ids, dataset):
    """ValueError if the file lacks photos of a data set: it is another's, or of a part of this one."""
    photos = (photo for image_id in image_ids for photo in cache.photos_of(image_id))
    absent = [photo for photo in photos if photo not in cache.rows]
    if not absent:
        return
    reason = f"no row for {len(absent)} of {dataset}'s {len(image_ids)} photos (first: {absent[0]})"
    advice = (f"it was made for {cache.attrs.get('dataset')}. Was the text another, or --limit set? Name"
              f" {dataset}'s own file, or make it: extract_features.py --dataset {dataset}")  # fmt: skip
    if cache.attrs.get("backbone") == ELSEWHERE:
        advice = f"give write_features all, None for one without; it has {', '.join(cache.ids[:3])} ..."
    raise ValueError(f"{cache.path}: {reason}; {advice}")


def point_out_alike(cache):
    """Say it if the photos of many rows are one picture, such as a server sends in place of a lost one.

    Their regions are the same, which the checksums tell alone: CRC-32 is linear, so what a row's other
    columns add to its regions' depends on their checksum and the regions' length, and is taken out.
    """
    zeros, rows = bytes(cache.regions[0, 0].nbytes), np.flatnonzero(cache.status == OK)
    shifts = np.array([zlib.crc32(zeros, 1 << bit) for bit in range(32)], np.uint32) ^ zlib.crc32(zeros)
    columns = (cache.ids, cache.num_regions, cache.grid, cache.status, cache.reasons, *cache.boxes)
    about = np.array([about_crc32(*(column[row] for column in columns)) for row in rows], np.uint32)
    bits = (about[:, None] >> np.arange(32, dtype=np.uint32)) & 1  # [rows, 32]
    bare = cache.crc32[rows, 0] ^ np.bitwise_xor.reduce(bits * shifts, 1)
    _, first, counts = np.unique(bare, return_index=True, return_counts=True)
    if len(rows) and counts.max() > 2 and counts.max() >= len(rows) / 100:
        name = cache.ids[rows[first[counts.argmax()]]]
        advice = "extract_features.py --placeholder FILE counts them as missing"
        print(f"WARNING: {counts.max()} of {len(rows)} photos are one picture (first: {name}); if it stands"
              f" for a photo that is lost, {advice}")  # fmt: skip
