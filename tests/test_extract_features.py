"""The feature file: numbers against torchvision's forward pass, bytes through every kind of trouble."""

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

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
from parts.photos import Photos, shared_memory
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
