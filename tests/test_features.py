"""The feature file: what is read is what was written; what is damaged, cut or another's is refused."""

import multiprocessing
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import features
from encoding import collate
from features import FeatureCache


@pytest.fixture
def made(cache_dir, tmp_path):
    """A copy to damage, what h5py reads of it, and its image ids."""
    path = Path(shutil.copy(cache_dir / "demo-resnet50-64.h5", tmp_path))
    with h5py.File(path) as file:
        return path, file["regions"][:], [image_id.decode() for image_id in file["image_id"][:]]


def test_cache_reads_what_h5py_reads(made):
    path, stored, ids = made
    cache = FeatureCache(path)
    assert (cache.shape, cache.views, cache.region_dim, list(cache.rows)) == (stored.shape, 2, 2048, ids)
    for views in (None, [0, 1] * 20):
        regions, mask, grid, place = cache.read(ids[::-1], views).values()
        assert place.tolist() == list(range(40))[::-1]
        assert np.array_equal(regions, stored[::-1][range(40), views or 0]) and regions.any(-1).all()
        assert mask.all() and mask.shape == (40, 4) and regions.dtype == torch.float16
        assert grid.tolist() == [[2, 2]] * 40
    assert (cache.attrs["dataset"], cache.attrs["img_size"], cache.attrs["format"]) == (
        "demo", 64, features.FORMAT,
    )  # fmt: skip
    values = [v for value in cache.attrs.values() for v in (value if type(value) is list else [value])]
    assert {type(value) for value in values} == {str, int, float}


def test_regions_kept_on_a_device_are_those_of_the_file(made):
    path, _, ids = made
    with h5py.File(path, "r+") as file:  # a photo that was not there
        file["status"][2], file["num_regions"][2], file["regions"][2] = features.MISSING, 0, 0
        file["crc32"][2] = features.row_crc32(file["regions"][2], ids[2], 0, [2, 2], features.MISSING, "")
    mapped, kept = FeatureCache(path), FeatureCache(path)
    kept.keep_on("cpu")
    for photos, views in (
        ([ids[5], None, ids[2], ids[5]], [1, 0, 1, 0]), ([ids[39], ids[0]], None), ([None], None)
    ):
        expected, found = mapped.read(photos, views), kept.read(photos, views)
        assert expected.keys() == found.keys() and all(
            torch.equal(expected[key], found[key]) for key in expected
        )
    with open(path, "r+b") as file:
        file.seek(h5py.File(path)["regions"].id.get_offset() + 7 * kept.regions[0].nbytes)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=f"photo {ids[7]} are damaged .some view."):
        FeatureCache(path).keep_on("cpu")


@pytest.mark.parametrize("views", [None, [1, 0, 1, 1, 0, 1]])
def test_collate_with_photos(made, views):
    path, stored, ids = made
    # Rows 1 and 2 say that there was no photo but hold regions, which must not come through.
    with h5py.File(path, "r+") as file:
        file["status"][1], file["status"][2], file["num_regions"][3] = (
            features.MISSING, features.UNREADABLE, 3
        )
        for row, count, status in (
            (1, 4, features.MISSING), (2, 4, features.UNREADABLE), (3, 3, features.OK)
        ):
            file["crc32"][row] = features.row_crc32(stored[row], ids[row], count, [2, 2], status, "")
    cache, chosen = FeatureCache(path), [4, 1, None, 2, 3, 0]
    assert [bool(cache.has_photo(image_id)) for image_id in ids[:5]] == [True, False, False, True, True]
    rows = [{"input_ids": [2], "own": (0, 1), "word_starts": [-1], "labels": [0]}] * 6
    batch = collate(rows, 0) | cache.read([ids[i] if i is not None else None for i in chosen], views)
    expected, mask = np.zeros((6, 4, 2048), "float16"), np.zeros((6, 4), bool)
    for i, count in ((0, 4), (4, 3), (5, 4)):
        expected[i], mask[i, :count] = stored[chosen[i], views[i] if views else 0], True
    assert np.array_equal(batch["regions"], expected) and np.array_equal(batch["region_mask"], mask)
    assert batch["photo_row"].tolist() == [4, -1, -1, -1, 3, 0]
    assert (batch["regions"].dtype, batch["region_mask"].dtype) == (torch.float16, torch.bool)


def edit(change):
    """Damage done through h5py."""

    def damage(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def chunk(file):
    file.create_dataset("regions", data=file.pop("regions")[:], chunks=(1, 2, 4, 2048))


def cut(keep):
    return lambda path: path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("damage, error, reason", [
    (lambda path: path.unlink(), FileNotFoundError, "no feature file .*; make it"),
    (lambda path: path.rename(f"{path}.partial"), FileNotFoundError, "no feature file .* resume"),
    (lambda path: path.write_text("PK"), ValueError, "not a readable HDF5 file"),
    (lambda path: (path.unlink(), path.mkdir()), ValueError, "not a readable HDF5 file"),
    *((cut(keep), ValueError, "not a readable HDF5 file|cut off") for keep in (-1, -2000, 700_000, 2000, 0)),
    (edit(lambda file: file.attrs.modify("format", 2)), ValueError, "format 2, expected 4"),
    (edit(lambda file: file.attrs.pop("format")), ValueError, "format none, expected 4"),
    (edit(lambda file: file.pop("crc32")), ValueError, "make it anew"),
    (edit(chunk), ValueError, "make it anew"),
    (edit(lambda file: file["status"].__setitem__(slice(2), 0)), ValueError, "2 photos not done"),
    (edit(lambda file: file.attrs.modify("seed", 1)), ValueError, "what it says of itself is damaged"),
    # Another program's file, with text as h5py stores it by itself.
    (lambda path: h5py.File(path, "w").attrs.update(creator="keras"), ValueError, "format none"),
])  # fmt: skip
def test_cache_errors(made, damage, error, reason):
    damage(made[0])
    with pytest.raises(error, match=reason) as caught:
        FeatureCache(made[0])
    assert str(made[0]) in str(caught.value) and "\n" not in str(caught.value)


def test_require(made):
    path, _, ids = made
    cache = FeatureCache(path)
    assert cache.require(ids, "demo") is None
    message = (
        rf"\A{re.escape(str(path))}: no row for 2 of mnre's 42 photos \(first: y\); it was made for demo\. "
    )
    with pytest.raises(ValueError, match=message):
        cache.require([*ids, "y", "x"], "mnre")
    assert cache.require(ids, "another name for the same photos") is None


# torch cannot send tensors out of a forked process that has used threads.
def read_bytes(cache, photos, views):
    return [tensor.numpy().tobytes() for tensor in cache.read(photos, views).values()]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reading_in_a_child_process(made, method):
    path, stored, ids = made
    task = FeatureCache(path), [ids[7], ids[0], ids[39]], [1, 0, 1]
    with multiprocessing.get_context(method).Pool(1) as pool:
        regions, mask, grid, _ = pool.apply_async(read_bytes, task).get(timeout=120)
    assert regions == stored[[7, 0, 39], [1, 0, 1]].tobytes() and mask == b"\1" * 12
    assert grid == np.full((3, 2), 2).tobytes()
