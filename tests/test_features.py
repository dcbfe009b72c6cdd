"""The feature file: what is read is what was written; what is damaged, cut or another's is refused."""

import errno
import multiprocessing
import os
import secrets
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import features
from encoding import collate
from features import FeatureCache
from parts.feature_photos import point_out_alike, require_photos
from parts.posts import read_photos


@pytest.fixture
def made(cache_dir, tmp_path):
    """A copy to damage, what h5py reads of it, and its image ids."""
    path = Path(shutil.copy(cache_dir / "demo-resnet50-64.h5", tmp_path))
    with h5py.File(path) as file:
        return path, file["regions"][:], [image_id.decode() for image_id in file["image_id"][:]]


def change_rows(path, ids, rows):
    """Have rows, {row: (status, regions, grid)}, say so, with the checksum they should have."""
    with h5py.File(path, "r+") as file:
        for row, (status, count, grid) in rows.items():
            file["status"][row], file["num_regions"][row], file["grid"][row] = status, count, grid
            about = ids[row], count, grid, status, ""
            file["crc32"][row] = features.row_crc32(file["regions"][row], *about)


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
    assert [cache.attrs[key] for key in ("dataset", "img_size", "format")] == ["demo", 64, features.FORMAT]
    values = [v for value in cache.attrs.values() for v in (value if type(value) is list else [value])]
    assert {type(value) for value in values} == {str, int, float}


def test_regions_kept_on_a_device_are_those_of_the_file(made):
    path, _, ids = made
    change_rows(path, ids, {2: (features.MISSING, 0, [2, 2])})
    mapped, kept = FeatureCache(path), FeatureCache(path)
    kept.keep_on("cpu")
    some = [ids[5], None, ids[2], ids[5]], [1, 0, 1, 0]
    for photos, views in (some, ([ids[39], ids[0]], None), ([None], None)):
        expected, found = mapped.read(photos, views), kept.read(photos, views)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    with open(path, "r+b") as file:
        file.seek(h5py.File(path)["regions"].id.get_offset() + 7 * kept.regions[0].nbytes)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=f"photo {ids[7]} are damaged .some view."):
        FeatureCache(path).keep_on("cpu")


@pytest.mark.parametrize("views", [None, [1, 0, 1, 1, 0, 1]])
def test_collate_with_photos(made, views):
    path, stored, ids = made
    # Rows 1 and 2 say that there was no photo but hold regions, which must not come through.
    change_rows(path, ids, {1: (features.MISSING, 4, (2, 2)), 2: (features.UNREADABLE, 4, (2, 2)),
                            3: (features.OK, 3, (1, 3))})  # fmt: skip
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


@pytest.mark.parametrize("views", [None, [1, 0, 1, 1, 0]])
@pytest.mark.parametrize("resident", [False, True])
def test_regions_of_several_photos_stand_one_after_the_other(made, views, resident):
    """As each of them is read alone. Row 1 has no photo, row 3 one row of three regions."""
    path, _, ids = made
    change_rows(path, ids, {1: (features.MISSING, 4, (2, 2)), 3: (features.OK, 3, (1, 3))})
    cache, chosen = FeatureCache(path), [(4, 1, 2), (1,), (), (3, 5), (0, 2)]
    if resident:
        cache.keep_on("cpu")
    posts = [tuple(ids[i] for i in rows) or None for rows in chosen]
    batch = read_photos(cache, posts, views)
    assert batch["regions"].shape == (5, 3 * 4, 2048) and batch["region_mask"].shape == (5, 12)
    for i, rows in enumerate(chosen):
        alone = [cache.read([ids[row]], None if views is None else [views[i]]) for row in rows]
        expected = [part["regions"][part["region_mask"]] for part in alone] or [torch.zeros(0, 2048).half()]
        assert torch.equal(batch["regions"][i][batch["region_mask"][i]], torch.cat(expected))
    # Grids of 3 and of 2 columns do not stack.
    assert batch["region_grid"].tolist() == [[4, 2], [0, 0], [0, 0], [0, 0], [4, 2]]
    assert batch["photo_row"].tolist() == [4, -1, -1, 3, 0]
    assert [cache.has_photo(post) for post in posts] == [True, False, False, True, True]
    with pytest.raises(ValueError, match="no row for 1 of own's 2 photos .first: z"):
        require_photos(cache, [(ids[0], "z"), None], "own")


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


IDS = ("a", "b", "c")


@pytest.fixture
def small(tmp_path):
    """A small whole feature file, to be made anew by hand where it is crafted."""
    path, settings = tmp_path / "small.h5", {"format": features.FORMAT, "backbone": "clip", "mean": [0.5]}
    features.create_file(path, list(IDS), [7] * 3, (3, 2, 3, 8), "float16", settings)
    writer = features.FeatureWriter(path, os.open(path, os.O_RDWR), settings, IDS)
    for row, value in enumerate((1, 2, 1)):
        writer.write(row, np.full((2, 3, 8), value, "float16"), (1, 3), features.OK, "")
    writer.close()
    return path


def lay(name, shape, stored, compact=False, external=None):
    """Put a column of HDF5's type `stored` in the place of one."""

    def change(file):
        layout, _ = h5py.h5p.create(h5py.h5p.DATASET_CREATE), file.pop(name)
        if compact:
            layout.set_layout(h5py.h5d.COMPACT)
        elif external:
            layout.set_external(external, 0, h5py.h5f.UNLIMITED)
        else:
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        kind = h5py.h5t.py_create(np.dtype(stored)) if isinstance(stored, str) else stored
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), layout)

    return edit(change)


POINTERS = h5py.h5t.create(h5py.h5t.OPAQUE, 8)
POINTERS.set_tag(b"NUMPY:|O")  # which h5py takes for objects: their bytes would be addresses


def put_link(link):
    def change(file):
        file.move("regions", "other")
        file["regions"] = link

    return edit(change)


def put_virtual(file):
    layout = h5py.VirtualLayout((3, 2, 3, 8), "<f2")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "regions", (3, 2, 3, 8))
    del file["regions"]
    file.create_virtual_dataset("regions", layout)


def put_filter(file):
    file.create_dataset("crc32", data=file.pop("crc32")[:], compression="gzip")


def put_group(file):
    del file["regions"]
    file.create_group("regions")


def lengthen(path):
    """Have the header of the regions say that each has 2**33 numbers: 300 GB of a file of 3 kB."""
    shape = np.array([3, 2, 3, 8], "<u8").tobytes()
    raw = path.read_bytes()
    assert shape in raw
    path.write_bytes(raw.replace(shape, np.array([3, 2, 3, 2**33], "<u8").tobytes()))


@pytest.mark.parametrize("craft, reason", [
    (lay("regions", (3, 2, 3, 2), POINTERS), "column regions: not "),
    (lay("status", (3,), POINTERS), "column status: not .u1 of "),
    (lay("image_id", (3,), h5py.h5t.py_create(h5py.string_dtype(), logical=True)), "column image_id: not "),
    (lay("regions", (3, 2, 3, 8), ">f2"), "column regions: not "),
    (lay("regions", (3, 2, 3, 8), "<i2"), "column regions: not "),
    (lay("regions", (3, 2, 3, 8), "<f8"), "column regions: not "),
    (lay("regions", (3, 2, 24), "<f2"), "column regions: of shape .3, 2, 24."),
    (lay("regions", (3, 2, 0, 8), "<f2"), "column regions: "),
    (lay("crc32", (4, 2), "<u4"), "column crc32: not <u4 of shape .3, 2."),
    (lay("reason", (3,), "S9000000"), "column reason: not S200 "),
    (lay("reason", (3,), "S200", external=b"/etc/passwd"), "column reason: not one block of this file"),
    (lay("status", (3,), "|u1", compact=True), "column status: not one block"),
    (put_link(h5py.SoftLink("/other")), "column regions: a link"),
    (put_link(h5py.ExternalLink("/etc/elsewhere.h5", "/regions")), "column regions: a link"),
    (edit(put_virtual), "column regions: not one block"), (edit(put_filter), "column crc32: not one block"),
    (edit(put_group), "not a readable HDF5 file .*not a dataset"), (lengthen, "make it anew"),
    (edit(lambda file: file.attrs.update(more="text")), "attribute 'more' is no number or text"),
    (edit(lambda file: h5py.h5a.create(file.id, b"more", POINTERS, h5py.h5s.create(h5py.h5s.SCALAR))),
     "'more' is no"),
    (edit(lambda file: file.attrs.update(more=np.zeros(2000, "<u4"))), "'more' is no"),
    (edit(lambda file: file.attrs.update(more=h5py.Empty("<f8"))), "small.h5: "),
    (lambda path: (path.unlink(), os.mkfifo(path)), "not a readable HDF5 file .not a file.; name another"),
])  # fmt: skip
def test_a_crafted_file_is_one_line_before_a_column_is_read(small, monkeypatch, craft, reason):
    craft(small)
    monkeypatch.setattr(features, "read_columns", None)  # nothing comes so far
    monkeypatch.setattr(np, "memmap", None)
    for open_file in (FeatureCache, lambda path: features.refuse_other_settings(path, {})):
        with pytest.raises(ValueError, match=reason) as error:
            open_file(small)
        assert str(error.value).startswith(f"{small}: ") and "\n" not in str(error.value)


def test_a_row_whose_numbers_cannot_be_is_named(small):
    assert FeatureCache(small).whole(0)
    with h5py.File(small, "r+") as file:
        file["regions"][:] = np.array([np.nan, 0, 0])[:, None, None, None]
    rows = (3, (1, 3)), (3, (60000, 60000)), (4, (1, 3))
    change_rows(small, IDS, {row: (features.OK, *about) for row, about in enumerate(rows)})
    cache = FeatureCache(small)
    for photo, what in zip(IDS, ("not finite, so damaged", "damaged", "damaged"), strict=True):
        with pytest.raises(ValueError, match=f"small.h5: the features of photo {photo} are {what} .view 0."):
            cache.read([photo])


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_the_system_says_is_no_damage(small, monkeypatch, code):
    """Whether Python meets it or HDF5, and no memory is no memory."""
    def refuse(*args, **kwargs):
        raise error

    for error in (OSError(code, os.strerror(code), str(small)), MemoryError(),
                  OSError(f"Unable to open file (file read failed: errno = {code}, ...)")):  # fmt: skip
        monkeypatch.setattr(h5py, "File", refuse)
        with pytest.raises(type(error)) as caught:
            FeatureCache(small)
        assert "anew" not in str(caught.value)
        if not isinstance(error, MemoryError):
            assert (caught.value.errno, caught.value.filename) == (code, str(small))


def test_equal_photos_are_counted_by_their_checksums_alone(small, tmp_path, monkeypatch, capsys):
    point_out_alike(FeatureCache(small))
    assert not capsys.readouterr().out  # two are too few
    path, settings, rng = tmp_path / "many.h5", {"format": features.FORMAT}, np.random.default_rng(0)
    ids = [f"photo {i}" for i in range(300)]
    features.create_file(path, ids, [7] * 300, (300, 2, 2, 8), "float16", settings)
    writer = features.FeatureWriter(path, os.open(path, os.O_RDWR), settings, ids)
    for row in range(300):
        regions = rng.standard_normal((2, 2, 8)).astype("float16")
        regions[0] = 7 if row % 100 == 5 else regions[0]  # in view 0 alone, and not in the other columns
        writer.write(row, regions, (1, 2), features.OK, "x" * (row // 100))
    writer.close()
    point_out_alike(FeatureCache(path))
    assert "WARNING: 3 of 300 photos are one picture (first: photo 5); " in capsys.readouterr().out


def test_an_empty_file_is_not_made_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0")
    (tmp_path / "x.h5.0.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        features.create_file(tmp_path / "x.h5", ["a"], [7], (1, 1, 1, 1), "uint8", {"format": 4})
    assert not (tmp_path / "mine").exists()


def test_require(made):
    path, _, ids = made
    cache = FeatureCache(path)
    assert require_photos(cache, ids, "demo") is None
    message = r": no row for 2 of mnre's 42 photos \(first: y\); it was made for demo\. "
    with pytest.raises(ValueError, match=message):
        require_photos(cache, [*ids, "y", "x"], "mnre")
    assert require_photos(cache, ids, "another name for the same photos") is None


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


# Regions [R, D] of some photos, a R each, None for a photo without any.
SIZES = st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=5).filter(any)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.sampled_from(["float16", "float32", "float64", "uint8"]), st.data())
def test_regions_of_ones_own_are_read_back_as_float16(tmp_path_factory, sizes, width, kind, data):
    path = tmp_path_factory.mktemp("own") / "mine.h5"
    values = st.integers(0, 255) if kind == "uint8" else st.floats(-65504, 65504, width=16)
    photos = {f"é {row}.jpg": None if size is None else
              np.array(data.draw(st.lists(values, min_size=size * width, max_size=size * width)), kind)
              .reshape(size, width) for row, size in enumerate(sizes)}  # fmt: skip
    features.write_features(path, photos, source="a model of mine")
    cache = FeatureCache(path)
    batch = cache.read(list(photos))
    assert cache.attrs["weights"] == "a model of mine" and cache.attrs["backbone"] == "elsewhere"
    assert cache.region_dim == width and batch["regions"].dtype == torch.float16
    assert not batch["region_grid"].any()
    for row, (photo, regions) in enumerate(photos.items()):
        assert cache.has_photo(photo) == (regions is not None) and cache.whole(row)
        real = batch["regions"][row][batch["region_mask"][row]].numpy()
        assert np.array_equal(real, np.zeros((0, width)) if regions is None else regions.astype("float16"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("regions, reason", [
    (np.ones((2, 4)), "4 wide, others 3"),
    ([[1, 2, np.nan]], "not finite as float16"), ([[1, 2, 1e5]], "not finite as float16"),
    (np.ones((0, 3)), "of shape .0, 3., not "), (np.ones((3, 0)), "of shape .3, 0."),
    (np.ones(3), "of shape .3., not .1 to 65535, width.; give None"),
    (np.ones((2**16, 3), "float16"), "of shape .65536, 3."),
    ([["a", "b", "c"]], "no array of numbers"), ([[1, 2], [3]], "no array of numbers"),
])  # fmt: skip
def test_regions_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, regions, reason):
    with pytest.raises(ValueError, match=f"photo 2.jpg: its regions are {reason}") as error:
        features.write_features(tmp_path / "mine.h5", {"1.jpg": np.ones((1, 3)), "2.jpg": regions})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "mine.h5"
    with pytest.raises(ValueError, match="mine.h5: no photo has regions"):
        features.write_features(path, {"1.jpg": None})
    path.write_text("mine")
    with pytest.raises(ValueError, match="mine.h5: is there already"):
        features.write_features(path, {"1.jpg": np.ones((1, 3))})
    assert path.read_text() == "mine"
