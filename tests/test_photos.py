"""Photos found by their ids, under the names that downloads give them; captions read."""

import itertools
import unicodedata
from pathlib import Path

import pytest
from test_data import write

from parts.photos import ENDINGS, by_name, find_photos, image_folders, read_captions


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
