"""The feature file: numbers against torchvision's forward pass, bytes through every kind of trouble."""

import errno
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import encoders
import faults
import h5py
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

import extract_features
from extract_features import main
from features import MISSING, OK, UNREADABLE, FeatureCache, FeatureWriter
from parts.backbones import load_backbone
from parts.datasets import load_dataset
from parts.photos import Photos, queues, shared_memory
from parts import photos
from parts.vision_encoder import state_hash


@pytest.fixture
def run(data_dir, tmp_path):
    """Extract the demo photos into tmp_path; more arguments override. Returns the path of the file."""

    def extract(*args):
        fixed = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", tmp_path, "--weights", "random",
                 "--img-size", 64, "--views", 2, "--batch-size", 8, "--workers", 0,
                 "--limit", 10]  # fmt: skip
        return main([str(arg) for arg in [*fixed, *args]])

    return extract


def random_resnet50(seed=1337):
    torch.manual_seed(seed)
    return torchvision.models.resnet50(zero_init_residual=True)


def plain_features(path, size, model=None):
    """torchvision's own pipeline and forward pass, one photo, default memory layout: [R, D] float32."""
    pipeline = transforms.Compose([
        transforms.Resize((size, size)), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    kept, model = [], model or random_resnet50().eval()
    model.layer4.register_forward_hook(lambda module, given, made: kept.append(made))
    with torch.no_grad():
        model(pipeline(Image.open(path).convert("RGB"))[None])
    return kept[0][0].permute(1, 2, 0).flatten(0, 1)


@pytest.mark.parametrize("size, side", [(64, 2), (100, 4), (224, 7), (256, 8)])
def test_regions_are_the_last_map_of_resnet50_row_by_row(run, data_dir, size, side):
    cache = FeatureCache(run("--img-size", size, "--limit", 2, "--views", 1))
    assert cache.shape == (2, 1, side * side, 2048) and cache.grid.tolist() == [[side, side]] * 2
    for image_id, row in cache.rows.items():
        expected = plain_features(data_dir / "demo" / "images" / f"{image_id}.jpg", size)
        close(cache.regions[row, 0], expected)


def close(found, expected):
    """Within float16 rounding of float32 sums in another order; the smallest cancel from larger ones."""
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-3 * float(abs(expected).max()))


def test_folded_batch_norms_are_those_of_training(run, data_dir, tmp_path):
    """With statistics and scales as training leaves them, unlike the zeros and ones of a random model."""
    model = random_resnet50().eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values, (low, high) in (
                (norm.running_mean, (-0.2, 0.2)), (norm.running_var, (0.5, 2)),
                (norm.weight, (0.3, 1)), (norm.bias, (-0.2, 0.2)),
            ):  # fmt: skip
                torch.nn.init.uniform_(values, low, high)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    cache = FeatureCache(run("--weights", tmp_path / "weights.safetensors", "--limit", 3, "--views", 1))
    for image_id, row in cache.rows.items():
        expected = plain_features(data_dir / "demo" / "images" / f"{image_id}.jpg", 64, model)
        close(cache.regions[row, 0], expected)


def test_file_says_how_it_was_made_and_holds_no_objects(run, data_dir):
    path = run()
    with h5py.File(path) as file:
        names = "regions", "num_regions", "grid", "image_id", "status", "reason", "crc32", "photo_bytes"
        assert set(file) == set(names)
        assert all(file[name].dtype.kind != "O" and file[name].chunks is None for name in file)
        texts = [h5py.check_string_dtype(file.attrs.get_id(key).dtype) for key in file.attrs]
        assert all(text is None or text.length for text in texts)
        assert file["regions"].dtype == np.float16 and file["regions"].shape == (10, 2, 4, 2048)
        ids = [name.decode() for name in file["image_id"]]
    assert ids == load_dataset("demo", data_dir).image_ids()[:10]
    attrs = FeatureCache(path).attrs
    body = torch.nn.Sequential(*list(random_resnet50().children())[:-2])
    assert attrs["weights_sha256"] == state_hash(body)
    assert attrs["weights"] == f"random-{attrs['weights_sha256'][:12]}"
    assert [attrs[key] for key in ("dataset", "backbone", "img_size", "views")] == ["demo", "resnet50", 64, 2]
    assert attrs["version_torch"] == str(torch.__version__) and attrs["mean"] == [0.485, 0.456, 0.406]


def test_views_depend_on_seed_id_and_view_alone(run, data_dir):
    ids = load_dataset("demo", data_dir).image_ids()
    paths = {image_id: data_dir / "demo" / "images" / f"{image_id}.jpg" for image_id in ids}
    backbone = load_backbone("resnet50", "random", 64)
    views, _, _ = Photos(ids, paths, backbone, 4, seed=1).read(5)
    torch.rand(3)  # the global generator has no say, and is left as it was
    state = torch.random.get_rng_state()
    again, _, _ = Photos(ids[5:], paths, backbone, 3, seed=1).read(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again, views[:3])
    assert all(not torch.equal(views[a], views[b]) for a in range(4) for b in range(a))
    other, _, _ = Photos(ids, paths, backbone, 4, seed=2).read(5)
    assert torch.equal(other[0], views[0]) and not torch.equal(other[1], views[1])
    plain = np.asarray(Image.open(paths[ids[5]]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(views[0].permute(1, 2, 0), plain)


def test_same_bytes_whatever_the_workers_and_the_day(run):
    first = run().read_bytes()
    time.sleep(1.1)  # HDF5 time stamps have a resolution of one second
    assert run("--overwrite", "--workers", 2).read_bytes() == first


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny DINOv2 with registers."""
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    encoders.build_image_model("dinov2_with_registers", folder)
    return folder


@pytest.mark.parametrize("rows_done, options", [
    (1, ()), (9, ()), (5, ("auto",)), (2, ("auto", "--fit", "pad", "--grid", 3)),
])  # fmt: skip
def test_interrupted_runs_end_the_same(run, tmp_path, monkeypatch, rows_done, options, dinov2, capsys):
    if options:
        run = functools.partial(run, "--weights", dinov2, "--backbone", *options)
    whole = run()
    expected = whole.read_bytes()
    whole.unlink()
    put, calls = FeatureWriter.put, []

    def killed(self, name, row, value):
        if name == "status":
            if len(calls) == rows_done:
                raise KeyboardInterrupt  # between the row's bytes and its status, the worst moment
            calls.append(row)
        put(self, name, row, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureWriter, "put", killed)
        run()
    assert [path.name for path in tmp_path.iterdir()] == [f"{whole.name}.partial"]
    with h5py.File(tmp_path / f"{whole.name}.partial") as file:
        assert (file["status"][:] == OK).sum() == rows_done
    with pytest.raises(FileNotFoundError, match="resume"):
        FeatureCache(whole)
    # The file's own batch size is kept: another one would change the last bit of some sums.
    assert run("--batch-size", 4).read_bytes() == expected
    assert "batch size the file was begun with, 8" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_finished_file_is_left_alone_and_other_settings_are_named(run):
    path = run()
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert run() == path and (path.read_bytes(), path.stat().st_mtime_ns) == before
    with pytest.raises(ValueError) as error:
        run("--views", 3, "--seed", 2)
    for part in ("views (file: 2, asked: 3)", "seed (file: 1337, asked: 2)", "weights (file: random-"):
        assert part in str(error.value)
    assert "img_size" not in str(error.value) and path.read_bytes() == before[0]
    assert FeatureCache(run("--views", 3, "--overwrite")).views == 3


def test_a_file_says_how_photos_are_framed_where_that_is_not_as_usual(run, tmp_path):
    """In its name and in what is compared when extraction goes on; squashed is ResNet50's usual way."""
    plain, other = run(), run("--fit", "pad", "--grid", 1)
    assert run("--fit", "squash") == plain and not {"fit", "grid"} & FeatureCache(plain).attrs.keys()
    assert other.name == "demo-resnet50-64-pad-grid1-first10.h5"
    attrs = FeatureCache(other).attrs
    assert (attrs["fit"], attrs["grid"], attrs["places"]) == ("pad", 1, 2)
    crop = FeatureCache(run("--fit", "processor")).attrs["resizing"]
    assert json.loads(crop)["size"] == {"shortest_edge": 73}  # 256 of 224
    other.rename(plain)
    with pytest.raises(ValueError, match="fit .file: pad, asked: None.*grid .file: 1, asked: None"):
        run()


@pytest.fixture
def run_pixels(run, data_dir):
    """The same without a model, in no time."""
    pixels = ["--backbone", "pixels", "--weights", data_dir / "demo" / "vilt", "--img-size", 96, "--views", 1]
    return lambda *args: run(*pixels, *args)


def stop_after(monkeypatch, rows):
    """Have extraction end, as by Ctrl-C, when so many rows are written."""
    write, left = FeatureWriter.write, [rows]

    def stopping(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(FeatureWriter, "write", stopping)


def test_an_unfinished_file_of_other_settings_is_refused_if_it_holds_a_row(run, monkeypatch):
    for rows in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, rows)
            run("--seed", rows)
    with pytest.raises(ValueError, match=r"partial: made with other settings: views \(file: 2, asked: 3\)"):
        run("--views", 3, "--seed", 1)


def test_what_is_written_over_stays_until_the_new_file_is_whole(run_pixels, monkeypatch, capsys):
    """And an interrupted --overwrite goes on if what it was asked for is the same."""
    path = run_pixels("--seed", 1)
    partial, old = Path(f"{path}.partial"), path.read_bytes()

    def stopped(*args):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 3)
            run_pixels(*args, "--overwrite")
        assert path.read_bytes() == old
        return capsys.readouterr().out

    stopped("--seed", 2)
    run_pixels("--seed", 1)
    assert f"{partial} is there too: with --overwrite, the command that began it" in capsys.readouterr().out
    out = stopped("--seed", 3)
    assert "begun anew, not gone on with: " in out and "seed (file: 2, asked: 3)" in out
    run_pixels("--seed", 3, "--overwrite")
    assert "resuming: 3 photos are done" in (out := capsys.readouterr().out) and "anew" not in out
    assert path.read_bytes() != old and not partial.exists()


def test_only_a_feature_file_is_written_over(run_pixels, tmp_path):
    name = tmp_path / "demo-pixels-96-first10.h5"
    (tmp_path / "other").write_bytes(b"mine")
    for place in (name, tmp_path / f"{name.name}.partial"):
        for lay in (lambda path: path.write_bytes(b"mine"), lambda path: path.symlink_to("other"),
                    lambda path: h5py.File(path, "w").close(), lambda path: path.mkdir()):  # fmt: skip
            lay(place)
            with pytest.raises(ValueError, match="; name another --cache-dir"):
                run_pixels("--overwrite")
            assert place.is_dir() or len(place.read_bytes()) in (4, 800)
            place.rmdir() if place.is_dir() else place.unlink()
    assert (tmp_path / "other").read_bytes() == b"mine"


def test_second_process_on_one_file_stops(run, monkeypatch):
    def second(*args):
        for more in ([], ["--overwrite"]):
            with pytest.raises(ValueError, match="another process"):
                run(*more)
        raise KeyboardInterrupt

    monkeypatch.setattr(extract_features, "extract", second)
    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with the data sets `odd` and `clean` of `faults`; which of their photos are pictures."""
    folder = tmp_path_factory.mktemp("odd")
    faults.write_odd_files(folder, large=False)
    return folder, {path.stem for path in (folder / "clean" / "images").iterdir()}


def test_photos_of_every_kind(run, odd):
    folder, pictures = odd
    cache, clean = (
        FeatureCache(run("--dataset", folder / name, "--limit", 99, "--views", 1))
        for name in ("odd", "clean")
    )
    assert len(pictures) == 21 and len(cache.rows) == 21 + 10 + 1  # files that are none, and an absent one
    for image_id, row in cache.rows.items():
        status = OK if image_id in pictures else MISSING if image_id == "absent" else UNREADABLE
        assert cache.status[row] == status and bool(cache.reasons[row]) == (status != OK), image_id
        assert str(folder) not in cache.reasons[row]
        assert np.array_equal(cache.regions[row], clean.regions[row]), image_id
    for alike in ("mixed case", "upper case"):
        assert np.array_equal(cache.regions[cache.rows[alike], 0], cache.regions[cache.rows["PNG"], 0])
    deep = folder / "odd" / "images" / "16 bits.jpg"
    resnet = load_backbone("resnet50", "random", 64)
    # 16 bits a pixel become 8, not white.
    decoded, _, _ = Photos(["x"], {"x": deep}, resnet, 1, seed=0).read(0)
    grey = Image.fromarray((np.asarray(Image.open(deep)) // 256).astype(np.uint8))
    small = grey.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(decoded[0].permute(1, 2, 0), small)
    for name, said in (("cut JPEG", "truncated"), ("text", "identify"), ("bomb", "DecompressionBombError")):
        assert said in cache.reasons[cache.rows[name]]
    # A photo that is not there is no picture at all: zeros and a mask of False, never a grey image.
    regions, mask, grid, _ = cache.read(["absent", "cut JPEG", "PNG"]).values()
    assert not regions[:2].any() and not mask[:2].any() and mask[2].all() and regions[2].any()
    assert grid.tolist() == [[0, 0], [0, 0], [2, 2]]


def test_a_disk_that_fills_in_mid_write_is_said_and_nothing_is_lost(run, tmp_path, monkeypatch):
    whole = run().read_bytes()
    pwrite, left = os.pwrite, 40

    def filling(fd, raw, at):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        # Half of what was asked, as a nearly full disk may.
        return pwrite(fd, raw[: max(1, len(raw) // 2)], at)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(OSError, match="-first10.h5.partial: No space left on device; make room"):
        run("--overwrite")
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert (path := run("--overwrite")).read_bytes() == whole and [*tmp_path.iterdir()] == [path]


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


def test_photos_that_are_one_picture_are_pointed_out_and_can_count_as_missing(run_pixels, tmp_path, capsys):
    reds, images = (0, 0, 0, 0, 0, 60, 120, 180), tmp_path / "own" / "images"
    images.mkdir(parents=True)
    for i, red in enumerate(reds):
        ending = "bmp" if i == 4 else "png"  # other bytes, the same picture
        Image.new("RGB", (40, 40), (red, 9, 9)).save(images / f"{i}.{ending}")
    for split in ("train", "valid"):
        posts = "".join(f"IMGID:{i}\nword\tO\n\n" for i in range(8))
        (tmp_path / "own" / f"{split}.txt").write_text(posts)
    own = ["--dataset", tmp_path / "own"]
    path = run_pixels(*own)
    said = "WARNING: 5 of 8 photos are one picture (first: 0); "
    assert said in capsys.readouterr().out
    run_pixels(*own)
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with other settings: placeholder .file: none, asked: "):
        run_pixels(*own, "--placeholder", images / "0.png")
    cache = FeatureCache(run_pixels(*own, "--placeholder", images / "0.png", "--overwrite"))
    out = capsys.readouterr().out
    assert "WARNING" not in out and "missing: 4 (placeholder picture)" in out
    assert cache.status.tolist() == [MISSING] * 5 + [OK] * 3 and not cache.regions[:5].any()
    run_pixels(*own, "--placeholder", images / "0.png")
    assert "are there now" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="placeholder .file: .*, asked: None"):
        run_pixels(*own)
    with pytest.raises(ValueError, match="--placeholder absent.png: no such file"):
        run_pixels(*own, "--placeholder", "absent.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    run_pixels(*own, "--placeholder", tmp_path / "white.png", "--overwrite")
    assert "WARNING: no photo looks like the --placeholder" in capsys.readouterr().out and path.exists()


def test_report_lists_what_is_missing(run, data_dir, tmp_path, capsys):
    images = tmp_path / "photos"
    shutil.copytree(data_dir / "demo" / "images", images)
    (images / "train_0003.jpg").unlink()
    (images / "train_0004.jpg").write_text("no picture")
    path = run("--images", images)
    out = capsys.readouterr().out
    assert "10 photos, 9 found, x 2 views" in out and f"{10 * 2 * 4 * 2048 * 2:,} bytes" in out
    assert f"{path}: 10 photos, 8 ok, 1 missing, 1 unreadable" in out
    assert "missing: train_0003 (no such file)" in out
    assert "unreadable: train_0004 (UnidentifiedImageError" in out
    shutil.copy(images / "train_0002.jpg", images / "train_0003.jpg")
    run("--images", images)
    assert "1 photos recorded as missing are there now (first: train_0003)" in capsys.readouterr().out


def test_full_disk_is_said_before_starting(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="327,680 bytes needed, 1,000 free"):
        run()
    assert not list(tmp_path.iterdir())


def test_no_photo_at_all_is_an_error(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="none of the 10 photos is in .*nothing; .*--images"):
        run("--images", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no image folder .*absent"):
        run("--images", tmp_path / "absent")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_from_a_file(run, tmp_path, ending):
    expected = FeatureCache(run())
    state, file = random_resnet50().state_dict(), tmp_path / f"weights.{ending}"
    save_file(state, file) if ending == "safetensors" else torch.save({"state_dict": state}, file)
    cache = FeatureCache(run("--weights", file, "--overwrite", "--seed", 1337))
    assert np.array_equal(cache.regions, expected.regions)
    assert cache.attrs["weights"] == expected.attrs["weights"].replace("random", "file")


class Bomb:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return self.proof.touch, ()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_do_not_fit(run, tmp_path):
    state = random_resnet50().state_dict() | {"fc.bias": torch.zeros(7)}
    path, proof = tmp_path / "weights.pth", tmp_path / "ran"
    with pytest.raises(ValueError, match="no such file"):
        run("--weights", path)
    for content, message in (
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "ResNet50's: 264 tensors missing, 0 more .first: bn1"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, "not ResNet50's .size mismatch for conv1.weight"),
        (torch.zeros(3), "265 tensors missing"),
        (state | {"layer3.6.bn1.bias": torch.zeros(9)}, " 1 more .first: layer3.6.bn1"),  # ResNet152
        ({"model": state}, " 1 more .first: model"),
        ({f"backbone.{key}": value for key, value in state.items()}, "more .first: backbone.conv1.weight"),
        ({1: 2}, "more .first: 1.; give the state dict of torch"),
        (Bomb(proof), "not a state dict that loads as data alone"),
    ):
        path.write_bytes(pickle.dumps(content)) if isinstance(content, Bomb) else torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_backbone("resnet50", str(path))
    assert not proof.exists()


def test_imagenet_is_torchvisions_v1_and_needs_the_network_once(run, monkeypatch):
    asked = []

    def download(self, **kwargs):
        asked.append(self.name)
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", download)
    for weights in ("imagenet", "imagenet-v2"):
        with pytest.raises(ValueError, match="cannot download .*no route.*--weights PATH"):
            run("--weights", weights)
    assert asked == ["IMAGENET1K_V1", "IMAGENET1K_V2"]


@pytest.fixture
def run_captions(data_dir, tmp_path):
    """A function that extracts the demo's captions, changed by `edit` before."""

    def extract(*more, edit=lambda lines: lines):
        lines = (data_dir / "demo" / "captions.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / "captions.txt").write_text("\n".join(edit(lines)), encoding="utf-8")
        given = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", tmp_path,
                 "--backbone", "caption", "--captions", tmp_path / "captions.txt",
                 "--text-encoder", data_dir / "demo" / "encoder", "--overwrite", *more]  # fmt: skip
        return main([str(arg) for arg in given])

    return extract


def test_captions_need_no_photo_and_are_counted(run_captions, capsys):
    def edit(lines):
        return [*lines[3:-1], lines[-1].split(":")[0] + ":nothing to see"]

    path = run_captions("--placeholder", "nothing to see", edit=edit)
    cache, out = FeatureCache(path), capsys.readouterr().out
    assert path.name == "demo-caption-64.h5" and "demo: 40 photos, 37 captions, x 1 views" in out
    assert cache.status.tolist() == [MISSING] * 3 + [OK] * 36 + [MISSING]
    assert "36 ok, 4 missing" in out and "(no caption)" in out and "(caption of a placeholder picture)" in out
    captions = path.with_name("captions.txt").read_bytes()
    assert cache.attrs["captions_sha256"] == hashlib.sha256(captions).hexdigest()
    again = path.read_bytes()
    run_captions("--placeholder", "nothing to see", edit=edit)
    assert path.read_bytes() == again


def test_captions_that_stand_often_are_pointed_out_and_long_ones_cut(run_captions, capsys):
    cache = FeatureCache(run_captions(edit=lambda lines: [line.split(":")[0] + ":a wall" for line in lines]))
    assert "WARNING: 40 of 40 captions are 'a wall'; if it describes a placeholder" in capsys.readouterr().out
    assert (cache.status == OK).all()
    cache = FeatureCache(run_captions("--img-size", 6))
    assert cache.shape[2] == 6 and cache.num_regions.max() == 6
    assert "ok, but: train_" in capsys.readouterr().out and set(cache.reasons) == {"", "cut: 8 sub-tokens"}


@pytest.mark.parametrize("edit, more, message", [
    (lambda lines: lines, ["--placeholder", "absent"], "no caption is that; copy it as it stands"),
    (lambda lines: ["x :y"], [], "none of the 40 photos is in .*captions.txt"),
    (lambda lines: ["no separator"], [], "captions.txt:1: expected '<photo> :<caption>'"),
])  # fmt: skip
def test_captions_that_cannot_be_used(run_captions, edit, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_captions(*more, edit=edit)


@pytest.mark.parametrize("args", [
    ["--backbone", "caption"], ["--captions", "x"],
    ["--backbone", "caption", "--captions", "x", "--views", "2"],
])  # fmt: skip
def test_caption_flags_go_together(args, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert "go together" in (err := capsys.readouterr().err) or "a caption has one view" in err


def test_a_flipped_bit_anywhere_in_a_row_is_found_when_it_is_read(run, tmp_path):
    """In the regions of the view that is read, or in any other column of the row."""
    path = run()
    with h5py.File(path) as file:
        places = {name: (file[name].id.get_offset(), file[name].nbytes, len(file[name])) for name in file}
    whole, rng = path.read_bytes(), random.Random(0)
    ids = FeatureCache(path).ids
    for name, (start, size, rows) in places.items():
        for _ in range(12):
            at = rng.randrange(size)
            row, inside = divmod(at, size // rows)
            flipped = bytearray(whole)
            flipped[start + at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            view = inside * 2 // (size // rows) if name in ("regions", "crc32") else rng.randrange(2)
            try:
                cache = FeatureCache(path)
                assert not cache.whole(row), (name, at)
                with pytest.raises(ValueError, match=r"are damaged .view \d.; extract_features.py --verify"):
                    cache.read([cache.ids[row]], [view])
                cache.read([ids[(row + 1) % rows]])  # the others are as they were
            except (ValueError, UnicodeDecodeError, KeyError) as error:
                # An id or a status that cannot be: refused on opening.
                assert name in ("image_id", "status", "reason", "photo_bytes"), (name, at, error)
    path.write_bytes(whole)
    assert all(map(FeatureCache(path).whole, range(10)))


def test_verify_names_damaged_rows_and_only_they_are_done_again(run, capsys, monkeypatch):
    path = run()
    whole = path.read_bytes()
    run("--verify")
    assert "all 10 rows are as they were written" in capsys.readouterr().out
    with h5py.File(path) as file:
        start, size = file["regions"].id.get_offset(), file["regions"].nbytes // 10
        name = file["num_regions"].id.get_offset()
    damaged = bytearray(whole)
    damaged[start + 2 * size + 5] ^= 16
    damaged[name + 2 * 7] ^= 1
    path.write_bytes(damaged)
    # In the middle of marking: a finished name never stands over rows not done.
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("--verify")
    assert not path.exists()
    run()
    with pytest.raises(ValueError, match="2 of 10 rows are damaged .train_0002, train_0007.; the same"):
        run("--verify")
    assert not path.exists()
    written, write = [], FeatureWriter.write

    def watched(self, row, *args):
        written.append(row)
        write(self, row, *args)

    monkeypatch.setattr(FeatureWriter, "write", watched)
    run()
    assert written == [2, 7] and path.read_bytes() == whole
    with pytest.raises(FileNotFoundError, match="no finished file to verify"):
        run("--verify", "--img-size", 96)


def test_photos_changed_behind_a_finished_file_are_refused(run, data_dir, tmp_path, capsys):
    images = tmp_path / "photos"
    shutil.copytree(data_dir / "demo" / "images", images)
    path = run("--images", images)
    shutil.copytree(images, tmp_path / "copy")
    assert run("--images", tmp_path / "copy") == path  # the same photos elsewhere
    (images / "train_0004.jpg").unlink()
    assert run("--images", images) == path
    assert "1 of the photos it was made of are not here" in capsys.readouterr().out
    Image.new("RGB", (50, 50)).save(images / "train_0003.jpg")  # one that is there is enough
    message = f"other photos than those here: 1 differ in size .first: train_0003; it was made from {images}"
    with pytest.raises(ValueError, match=message):
        run("--images", images)


def test_an_unfinished_file_is_not_filled_with_other_photos(run, data_dir, tmp_path, monkeypatch):
    images = tmp_path / "photos"
    shutil.copytree(data_dir / "demo" / "images", images)
    photo = (images / "train_0000.jpg").read_bytes()
    (images / "train_0000.jpg").unlink()
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            run("--images", images)
    Image.new("RGB", (50, 50)).save(images / "train_0003.jpg")
    (images / "train_0000.jpg").write_bytes(photo)
    with pytest.raises(ValueError, match="h5.partial: made of other photos than those here: 1 differ"):
        run("--images", images)
    shutil.copy(data_dir / "demo" / "images" / "train_0003.jpg", images)
    status = FeatureCache(run("--images", images)).status
    assert status[0] == MISSING and (status[1:] == OK).all()  # as the photos were when it was read


@pytest.mark.parametrize("photos_held, workers", [(0, 0), (1, 1), (3, 3), (4, 4), (7, 4), (8, 4), (1000, 4)])
def test_queues_of_decoded_photos_fit_the_shared_memory(photos_held, workers):
    size = 10**6
    fitting, ahead = queues(4, size, room=photos_held * size + 5)
    assert fitting == workers and ahead in (1, 2) and fitting * ahead * size <= photos_held * size + 5
    assert ahead == 2 or photos_held < 2 * fitting or not fitting  # no less than there is room for


def test_photos_are_decoded_here_where_no_queue_fits(run, tmp_path, monkeypatch, capsys):
    path = run()
    usage = shutil.disk_usage(tmp_path)
    full, is_dir = usage._replace(free=1000), os.path.isdir
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full if place == "/dev/shm" else usage)
    monkeypatch.setattr(os.path, "isdir", lambda place: place == "/dev/shm" or is_dir(place))
    assert [shared_memory(processes) for processes in (1, 5)] == [500, 100]
    (tmp_path / "other").mkdir()
    other = run("--workers", 2, "--cache-dir", tmp_path / "other")
    assert "0 of 2 workers: /dev/shm has no room" in capsys.readouterr().out
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("trouble", ["not there", "not supported"])
def test_space_is_laid_out_where_none_can_be_reserved(run, tmp_path, monkeypatch, trouble):
    """As on macOS, and on file systems that take none ahead."""
    path = run()
    if trouble == "not there":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        def refuse(fd, offset, size):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    (tmp_path / "other").mkdir()
    assert run("--cache-dir", tmp_path / "other").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count, size, message", [
    (2**17 + 1, 0, "a PNG of over 131,072 chunks"), (0, 2**30 + 1, "over 1,073,741,824 bytes"),
])  # fmt: skip
def test_a_png_of_many_chunks_or_a_huge_one_is_given_up(tmp_path, count, size, message):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\0\0\0\0" * count)
    os.truncate(path, max(size, path.stat().st_size))
    with pytest.raises(ValueError, match=message), photos.open_picture(path):
        pass
