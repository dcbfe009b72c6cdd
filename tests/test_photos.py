"""Photos found by their ids, under the names that downloads give them, and decoded; captions read."""

import itertools
import os
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write

from features import OK, UNREADABLE
from parts import photos
from parts.backbones import load_backbone
from parts.datasets import load_dataset
from parts.photos import ENDINGS, Photos, by_name, find_photos, image_folders, queues, read_captions


@pytest.mark.parametrize("name, folder", [
    ("twitter2017", "twitter2017/images"), ("twitter2017", "twitter2017_images"), ("mnre", "mnre_image"),
    *(("mnre", f"{parent}img_org/{split}") for parent in ("", "mnre/") for split in ("train", "val", "test")),
])  # fmt: skip
def test_image_layouts(tmp_path, name, folder):
    photo, other = write(tmp_path / folder / "1.jpg", ""), write(tmp_path / "elsewhere" / "1.jpg", "")
    assert find_photos(["1"], image_folders(name, tmp_path)) == {"1": photo}
    assert find_photos(["1"], image_folders(name, tmp_path, other.parent)) == {"1": other}
    for images, sought in ((None, Path("no", name, "images")), ("none", "none")):
        with pytest.raises(FileNotFoundError, match=f"no image folder {sought}: put photos there .*--image"):
            image_folders(name, "no", images)


@pytest.mark.parametrize("image_id, expected", [
    ("1", "a/1.jpg"), ("1.jpg", "a/1.jpg"), ("2", "a/2.PNG"), ("2.png", "a/2.PNG"),
    ("train_3", "b/TRAIN_3.JPEG"), ("4", "a/4"),
    ("Y", "b/Y.jpg"), ("y", "b/y.jpg"),  # the last two are two photos
    *((image_id, None)
        for image_id in ("5", "6", "outside", "../outside", "../outside.jpg", "../b/Y", ".", "..", "")),
])  # fmt: skip
def test_find_photos(tmp_path, image_id, expected):
    for name in "a/1.jpg a/2.PNG a/4 a/5.txt b/1.jpg b/TRAIN_3.JPEG b/Y.jpg b/y.jpg outside.jpg".split():
        write(tmp_path / name, "")
    absolute, folders = str(tmp_path / "outside.jpg"), [tmp_path / "a", tmp_path / "b"]
    expected = tmp_path / expected if expected else None
    assert find_photos([image_id, absolute], folders) == {image_id: expected, absolute: None}


NFD = unicodedata.normalize("NFD", "rev\u00e9")
NFC = unicodedata.normalize("NFC", NFD)


@pytest.mark.parametrize("image_id, names, expected", [
    *(("x", f"x{ending}", f"x{ending}") for ending in (*ENDINGS, ".JPG", ".Tiff")),
    *(("x", f"x.jpg{more}", f"x.jpg{more}")
        for more in ("_large", ":large", ":orig", "?name=large", ".jpg", ".1", ".12", " ")),
    ("x", "x.png:900x900", "x.png:900x900"), ("x", "x?format=jpg&name=large", "x?format=jpg&name=large"),
    ("x", "X.JPG_LARGE", "X.JPG_LARGE"), (NFC, f"{NFD}.jpg", f"{NFD}.jpg"), (NFD, f"{NFC}.jpg", f"{NFC}.jpg"),
    (NFC.upper(), f"{NFD}.jpg.1", f"{NFD}.jpg.1"), ("x.jpg", "x.png", "x.png"), ("x.jpg", "x", "x"),
    ("x.jpg", "x.jpg.jpg", "x.jpg.jpg"), ("copy (1)", "copy (1).jpg|copy.jpg", "copy (1).jpg"),
    ("copy", "copy (1).jpg", None), ("x", "._x.jpg", None), ("x", "._x", None), ("._x", "._x.jpg", None),
    ("x", "x.mp4|x.txt|x.jpg.part|xy.jpg|y_x.jpg|x_large|x.1", None), ("1", "01.jpg|11.jpg|1 (1).jpg", None),
    # Of several: the exact name, then a fixed order of endings, and only then a like name.
    ("x", "x.png|x.jpg|X.jpg", "x.jpg"), ("x.png", "x.jpg|x.png|x.png.jpg", "x.png"),
    ("x.png", "x.jpg|x.png.jpg", "x.png.jpg"), ("x", "x.webp|x.gif|x.tif", "x.webp"),
    ("x", "x.jpg.1|x.heic", "x.heic"), ("x", "x.jpg.1|X.avif", "X.avif"),
    ("x", "x.png_large|x.jpg.1|x.jpg.jpg.1", "x.jpg.1"), ("x.jpg", "x.bmp|x.gif", "x.gif"),
])  # fmt: skip
def test_names_of_photos(tmp_path, image_id, names, expected):
    for order in itertools.permutations(names.split("|")[:3]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in [*order, *names.split("|")[3:], "other.jpg"]:
            write(folder / name, "")
        photos = {image_id: expected and folder / expected, "other": folder / "other.jpg"}
        assert find_photos([image_id, "other"], [folder]) == photos
    names = {name: name for name in ["other.jpg", *names.split("|")] if not name.startswith("._")}
    assert by_name([image_id], names) == {image_id: expected}  # as captions are found


def test_why_a_photo_is_missing(tmp_path):
    names = "a.mp4 B.jpg.part ._c.jpg d.png sub/e.jpg train/f.jpg sub/g.JPG_large g.txt k/._k.jpg"
    for name in names.split():
        write(tmp_path / "images" / name, "")
    (tmp_path / "images" / "closed").mkdir(mode=0)
    folders, reasons = image_folders("x", images=tmp_path / "images"), {}
    found = find_photos([*"abcefgk", "d.jpg", "../images/d", "absent"], folders, reasons)
    there = {image_id: path.name for image_id, path in found.items() if path}
    assert there == {"f": "f.jpg", "d.jpg": "d.png"}
    assert reasons == {
        "a": "no such file; 'a.mp4' lies there", "b": "no such file; 'B.jpg.part' lies there",
        "d.jpg": "taken from 'd.png'", "e": "no such file; 'sub/e.jpg' lies there",
        "g": "no such file; 'g.txt' lies there",
    }  # fmt: skip


def test_all_usual_places_are_searched(tmp_path):
    (tmp_path / "mnre" / "images").mkdir(parents=True)
    first = write(tmp_path / "mnre" / "img_org" / "train" / "1.jpg", "")
    second = write(tmp_path / "mnre_image" / "2.jpg", "")
    write(tmp_path / "img_org" / "val" / "1.jpg", "")
    assert find_photos(["1", "2"], image_folders("mnre", tmp_path)) == {"1": first, "2": second}
    only = image_folders("mnre", tmp_path, tmp_path / "mnre" / "img_org")
    assert only == [first.parent.parent, first.parent]
    assert find_photos(["1", "2"], only) == {"1": first, "2": None}


def test_a_data_sets_own_folder_comes_first_and_mnres_is_no_others(tmp_path):
    own = write(tmp_path / "twitter2017" / "images" / "16.png", "")
    mnre = write(tmp_path / "img_org" / "train" / "16.jpg", "")
    second = write(tmp_path / "twitter2017_images" / "16.jpg", "")
    folders = image_folders("twitter2017", tmp_path)
    assert folders == [own.parent, second.parent]
    assert find_photos(["16", "17"], folders) == {"16": own, "17": None}
    assert find_photos(["16"], image_folders("mnre", tmp_path)) == {"16": mnre}


def test_read_captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeff1.jpg :a dog : brown\r\n\n2.PNG\ta\u00a0cat :x\n3.jpg :\n".encode())
    captions = read_captions(path)
    assert captions == {"1.jpg": "a dog : brown", "2.PNG": "a\u00a0cat :x", "3.jpg": ""}
    assert by_name(["1", "2", "3.jpg", "4"], captions) == {
        "1": "a dog : brown", "2": "a\u00a0cat :x", "3.jpg": "", "4": None}  # fmt: skip
    expected, again = ":1: expected '<photo> :<caption>'", ":2: a has a caption already"
    for text, message in (("x", expected), ("a :b\na :c", again)):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_captions(path)


# --------------------------------------------------------------------------------------------------- pictures


def test_views_depend_on_seed_id_and_view_alone(data_dir, resnet50):
    ids = load_dataset("demo", data_dir).image_ids()
    paths = {image_id: data_dir / "demo" / "images" / f"{image_id}.jpg" for image_id in ids}
    views, _, _ = Photos(ids, paths, resnet50, 4, seed=1).read(5)
    torch.rand(3)  # the global generator has no say, and is left as it was
    state = torch.random.get_rng_state()
    again, _, _ = Photos(ids[5:], paths, resnet50, 3, seed=1).read(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again, views[:3])
    assert all(not torch.equal(views[a], views[b]) for a in range(4) for b in range(a))
    other, _, _ = Photos(ids, paths, resnet50, 4, seed=2).read(5)
    assert torch.equal(other[0], views[0]) and not torch.equal(other[1], views[1])
    plain = np.asarray(Image.open(paths[ids[5]]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(views[0].permute(1, 2, 0), plain)


@pytest.fixture(scope="module")
def resnet50():
    return load_backbone("resnet50", "random", 64)


@pytest.fixture
def read(resnet50):
    """A function that reads one file as a photo of 64 pixels: (view [3, 64, 64] or None, status, reason)."""

    def read_one(path):
        views, status, reason = Photos(["x"], {"x": path}, resnet50, 1, seed=0).read(0)
        return (None if views is None else views[0]), status, reason

    return read_one


@pytest.mark.parametrize("mode, side, status", [("RGBA", 9400, OK), ("L", 9500, UNREADABLE)])
def test_no_pictures_take_a_gigabyte(read, tmp_path, mode, side, status):
    """Nor do two, in two threads."""
    Image.new(mode, (side, side), 7).save(tmp_path / "large.png", compress_level=1)

    def kilobytes(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with ThreadPoolExecutor(2) as pool:
        assert {answer[1] for answer in pool.map(read, [tmp_path / "large.png"] * 2)} == {status}
    assert kilobytes("VmHWM") - before < 1_000_000


def chunk(kind, content):
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


LONG = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind, content", [
    (b"zTXt", b"comment\0\0" + LONG), (b"iTXt", b"comment\0\1\0en\0k\0" + LONG),
    (b"iCCP", b"profile\0\0" + LONG), (b"iTXt", b"comment\0\0\0en\0k\0" + b"x" * 2_000_000),
    (b"tEXt", b"comment\0" + b"x" * 70_000_000),
])  # fmt: skip
def test_a_png_with_much_text_is_its_pixels(read, tmp_path, place, kind, content):
    """And what else it says holds: how it is turned, in a text of ordinary length."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    photo.save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    turn = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\"3\"/>"
    at = 33 if place == "before" else raw.index(b"IEND") - 4
    parts = raw[:33], chunk(b"iTXt", turn), raw[33:at], chunk(kind, content), raw[at:]
    (tmp_path / "a.png").write_bytes(b"".join(parts))
    photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b.png")
    (view, status, reason), (expected, _, _) = read(tmp_path / "a.png"), read(tmp_path / "b.png")
    assert (status, reason) == (OK, "") and torch.equal(view, expected)


CLEAR = Image.new("RGBA", (9, 9), (0, 0, 0, 0))


@pytest.mark.parametrize("kind, picture, options", [
    ("PNG", CLEAR, {}), ("WEBP", CLEAR, {}), ("GIF", CLEAR, {}), ("TIFF", CLEAR, {}),
    ("PNG", Image.new("LA", (9, 9), (0, 0)), {}), ("PNG", Image.new("L", (9, 9), 7), {"transparency": 7}),
    ("PNG", Image.new("RGB", (9, 9)).quantize(2), {"transparency": 0}),
    ("PNG", Image.new("RGB", (9, 9), (1, 2, 3)), {"transparency": (1, 2, 3)}),
])  # fmt: skip
def test_what_is_transparent_is_seen_on_white(read, tmp_path, kind, picture, options):
    picture.save(tmp_path / "a.png", kind, **options)
    assert (read(tmp_path / "a.png")[0] == 255).all()
    with Image.open(tmp_path / "a.png") as opened:  # by the program that asks; not ours to change
        assert (read(opened)[0] == 255).all() and opened.size == (9, 9)


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_as_they_were(read, tmp_path):
    rng = np.random.default_rng(0)
    pixels, alpha = rng.integers(0, 255, (64, 64, 3)), rng.choice([0, 99, 255], (64, 64, 1))
    Image.fromarray(np.concatenate([pixels, alpha], 2).astype(np.uint8)).save(tmp_path / "a.png")
    expected = torch.from_numpy((pixels * alpha + 255 * (255 - alpha)) / 255).permute(2, 0, 1)
    view = read(tmp_path / "a.png")[0]
    torch.testing.assert_close(view.double(), expected, rtol=0, atol=1)
    opaque = torch.from_numpy(alpha[..., 0] == 255)
    assert torch.equal(view[:, opaque].double(), expected[:, opaque])


@pytest.mark.parametrize("mode, progressive", [("RGB", False), ("L", False), ("CMYK", False), ("RGB", True)])
def test_a_jpeg_that_lacks_its_end_is_read_if_next_to_nothing_is_missing(read, tmp_path, mode, progressive):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).convert(mode)
    photo.save(tmp_path / "a.jpg", quality=90, progressive=progressive)
    raw, (whole, _, _) = (tmp_path / "a.jpg").read_bytes(), read(tmp_path / "a.jpg")
    for missing, status in ((2, OK), (9, OK), (0.06, OK), (0.15, UNREADABLE), (0.5, UNREADABLE)):
        if progressive and missing == 0.15:
            continue  # of its last scan: what it adds is one bit of each number
        (tmp_path / "a.jpg").write_bytes(raw[: -missing if missing > 1 else int(len(raw) * (1 - missing))])
        view, found, reason = read(tmp_path / "a.jpg")
        assert found == status
        assert reason.startswith("cut off: lacks" if status == OK else "OSError: image file is truncated")
        if status == OK:
            rows = (view.int() - whole.int()).abs().amax((0, 2)) > 40
            assert rows.sum() <= 64 * 0.1 + 2 and (mode != "RGB" or not rows[:57].any())
            assert ("of its rows" in reason) == (missing < 1 and not progressive)


@pytest.mark.parametrize("kind", ["QOI", "ICO", "TGA", "PPM", "EPS", "PCX"])
def test_pictures_of_other_formats_are_not_opened(read, tmp_path, kind):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg", kind)
    said = "UnidentifiedImageError: cannot identify image file 'a.jpg'"
    assert read(tmp_path / "a.jpg")[1:] == (UNREADABLE, said)
    with Image.open(tmp_path / "a.jpg") as opened:  # by the program that asks
        said = f"ValueError: a {kind}, not one of JPEG, PNG, GIF, WEBP, BMP, TIFF, AVIF"
        assert read(opened)[1:] == (UNREADABLE, said)


def test_threads_hold_one_large_picture_at_a_time(monkeypatch):
    """Small ones do not wait for it; nor does a child that was forked while one was held."""
    monkeypatch.setattr(photos, "LARGE", 99)
    large, small = Image.new("RGB", (10, 10)), Image.new("RGB", (9, 9))

    def size(picture):
        with photos.open_picture(picture) as file:
            return file.size

    with ThreadPoolExecutor(2) as pool:
        with photos.open_picture(large):
            waiting = pool.submit(size, large)
            assert pool.submit(size, small).result(60) == (9, 9) and not waiting.done()
            if not (child := os.fork()):
                os._exit(size(large) != (10, 10))
            assert os.waitpid(child, 0)[1] == 0 and not waiting.done()
        assert waiting.result(60) == (10, 10)


@pytest.mark.parametrize("photos_held, workers", [(0, 0), (1, 1), (3, 3), (4, 4), (7, 4), (8, 4), (1000, 4)])
def test_queues_of_decoded_photos_fit_the_shared_memory(photos_held, workers):
    size = 10**6
    fitting, ahead = queues(4, size, room=photos_held * size + 5)
    assert fitting == workers and ahead in (1, 2) and fitting * ahead * size <= photos_held * size + 5
    assert ahead == 2 or photos_held < 2 * fitting or not fitting  # no less than there is room for


@pytest.mark.parametrize("count, size, message", [
    (2**17 + 1, 0, "a PNG of over 131,072 chunks"), (0, 2**30 + 1, "over 1,073,741,824 bytes"),
])  # fmt: skip
def test_a_png_of_many_chunks_or_a_huge_one_is_given_up(tmp_path, count, size, message):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\0\0\0\0" * count)
    os.truncate(path, max(size, path.stat().st_size))
    with pytest.raises(ValueError, match=message), photos.open_picture(path):
        pass
