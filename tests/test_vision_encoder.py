"""Vision encoders against transformers' and timm's own models; what gives no regions is refused."""

import json
import math
import pickle
import shutil
from urllib.error import URLError

import encoders
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from conftest import PARTS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, BlipForImageTextRetrieval, CLIPVisionModel

import evaluate
import extract_features
import report
import train
from features import UNREADABLE, FeatureCache
from parts.backbones import load_backbone
from parts.new_posts import NewPhotos, run_backbone
from parts.photos import Photos
from parts.vision_encoder import exact_convolutions, find_places
from predict import Predictor


def reference_states(name, folder, photo):
    """What transformers itself makes of one photo, [R, D]: its own processor, its own forward pass."""
    given = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")
    with torch.no_grad():
        if name == "clip":
            return CLIPVisionModel.from_pretrained(folder).eval()(**given).last_hidden_state[0, 1:]
        blip = BlipForImageTextRetrieval.from_pretrained(folder).eval()
        return blip.vision_model(**given).last_hidden_state[0]


@pytest.mark.parametrize("name, regions, grid", [("clip", 36, [6, 6]), ("blip", 37, [6, 6])])
def test_cached_regions_are_the_models_own_states(data_dir, cache_dir, name, regions, grid):
    cache = FeatureCache(cache_dir / f"demo-{name}-96.h5")
    assert cache.shape == (40, 2, regions, 64)
    assert (cache.grid == grid).all() and (cache.num_regions == regions).all()
    for image_id in ("train_0000", "train_0001", "valid_0003", "test_0001"):  # upright, wide
        photo = Image.open(data_dir / "demo" / "images" / f"{image_id}.jpg").convert("RGB")
        expected = reference_states(name, data_dir / "demo" / name, photo)
        found = cache.read([image_id])["regions"][0]
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-3 * expected.abs().max())


def test_cached_pixels_are_all_that_vilts_processor_makes(data_dir, cache_dir):
    """Patches back in place, normalised as the file says, are the processor's pixel_values and mask."""
    cache = FeatureCache(cache_dir / "demo-pixels-96.h5")
    processor = AutoImageProcessor.from_pretrained(data_dir / "demo" / "vilt")
    grids = set()
    for image_id in cache.rows:
        photo = Image.open(data_dir / "demo" / "images" / f"{image_id}.jpg").convert("RGB")
        given = processor(photo, return_tensors="pt")
        regions, mask, grid, _ = (value[0] for value in cache.read([image_id]).values())
        rows, columns = grid.tolist()
        patches = regions[mask].unflatten(0, (rows, columns)).unflatten(-1, (3, 16, 16))  # [h, w, 3, 16, 16]
        pixels = patches.permute(2, 0, 3, 1, 4).reshape(3, rows * 16, columns * 16)
        assert regions.dtype == torch.uint8 and not regions[~mask].any() and given["pixel_mask"].all()
        assert given["pixel_values"].shape[1:] == pixels.shape
        mean, std = (torch.tensor(cache.attrs[key])[:, None, None] for key in ("mean", "std"))
        normalised = (pixels / 255 - mean) / std
        torch.testing.assert_close(normalised, given["pixel_values"][0], rtol=1e-5, atol=1e-5)
        grids.add((rows, columns))
    assert len(grids) > 2 and len({rows * columns for rows, columns in grids}) > 2
    assert cache.shape[2] >= max(cache.num_regions) and cache.attrs["parameters"] == 0


@pytest.mark.parametrize("size", [96, 160, 384])
def test_no_photo_has_more_patches_than_the_file_has_room_for(data_dir, tmp_path, size):
    processor = AutoImageProcessor.from_pretrained(data_dir / "demo" / "vilt")
    processor.size, processor.size_divisor = {"shortest_edge": size}, 32
    processor.save_pretrained(tmp_path)
    backbone = load_backbone("pixels", str(tmp_path))
    shapes = [(1000, 1000 + 20 * i) for i in range(60)]
    counts = [backbone.regions(backbone.prepare(Image.new("RGB", shape))[None]).shape[1] for shape in shapes]
    assert max(counts) <= backbone.shape[0] <= 1.2 * max(counts)


def test_a_strip_of_a_photo_is_recorded_and_not_guessed(data_dir, tmp_path):
    Image.new("RGB", (3000, 9)).save(tmp_path / "strip.png")
    backbone = load_backbone("pixels", str(data_dir / "demo" / "vilt"))
    views, status, reason = Photos(["a"], {"a": tmp_path / "strip.png"}, backbone, 1, 0).read(0)
    assert (views, status) == (None, UNREADABLE) and reason


def test_augmented_views_have_the_plain_ones_size_and_keep_its_aspect(data_dir):
    """A crop of a wide photo is wide before it is resized: a centred square stays about square."""
    photo = Image.new("RGB", (300, 200))
    photo.paste((255, 255, 255), (100, 50, 200, 150))
    backbone = load_backbone("pixels", str(data_dir / "demo" / "vilt"))
    maker = Photos([], {}, backbone, 40, 0)
    views = maker.all_views(photo, "a")
    assert views.shape == (40, 3, 96, 144)
    whole = [view for view in views.float().mean(1)
             if not max(*view[[0, -1]].max(1).values, *view[:, [0, -1]].max(0).values) > 99]  # fmt: skip
    sides = [((view > 99).any(0).sum() / (view > 99).any(1).sum()).item() for view in whole]
    assert len(sides) > 10 and 0.9 < np.exp(np.mean(np.log(sides))) < 1.1
    assert all(0.6 < side < 1.7 for side in sides)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_a_missing_vision_weight_is_an_error(data_dir, tmp_path, name):
    shutil.copytree(data_dir / "demo" / name, tmp_path / name)
    weights = load_file(tmp_path / name / "model.safetensors")
    del weights[next(key for key in weights if "text" not in key and "self_attn" in key)]
    save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="--weights .*: 1 weights missing .first: .*self_attn"):
        load_backbone(name, str(tmp_path / name))


@pytest.mark.parametrize("name", ["clip", "blip", "pixels"])
def test_what_is_no_such_model_is_one_clear_line(data_dir, name, tmp_path):
    folder = data_dir / "demo" / next(part[2] for part in PARTS.values() if part[0] == name)
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for args, message in (
        (("absent/folder",), "--weights absent/folder: "),
        ((str(data_dir / "demo" / "encoder"),), "--weights .*encoder: "),
        ((str(tmp_path / "bare"),), "--weights .*bare: no image processor"),
        ((str(folder), 224), "--img-size 224: .* takes photos of 96; leave the option out"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(name, *args)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_a_model_of_another_kind_is_said_to_be_one(data_dir, tmp_path, name):
    shutil.copytree(data_dir / "demo" / name, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match=f"--weights .*other: it is a siglip, not a {name}; name"):
        load_backbone(name, str(tmp_path / "other"))


def test_a_processor_that_does_not_fit_its_model_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir / "demo" / "blip", tmp_path / "blip")
    path = tmp_path / "blip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 64}}))
    with pytest.raises(ValueError, match="a blip gives no regions of a photo .it takes 96 pixels.*64"):
        load_backbone("blip", str(tmp_path / "blip"))
    with pytest.raises(ValueError, match="its image processor is not ViLT's"):
        load_backbone("pixels", str(tmp_path / "blip"))


# ------------------------------------------------------------------------------------------------ any encoder

# Of each: tokens before the places, the class tokens kept of them, rows of places at 64 pixels; None: a map.
KINDS = {
    "clip": (1, 1, 4), "siglip": (0, 0, 4), "vit": (1, 1, 4), "deit": (2, 1, 4), "beit": (1, 1, 4),
    "dinov2_with_registers": (5, 1, 4), "swin": (0, 0, 2), "convnext": (None, 0, 2), "llava": (1, 1, 4),
}  # fmt: skip
TIMM = {
    "vit_tiny_patch16_224": (1, 1, 4), "deit_tiny_distilled_patch16_224": (2, 1, 4),
    "vit_small_patch14_reg4_dinov2": (5, 1, 4), "vit_little_patch16_reg1_gap_256": (1, 0, 4),
    "swin_tiny_patch4_window7_224": (None, 0, 2), "convnext_atto": (None, 0, 2),
}  # fmt: skip
STAGES = {"depths": [1] * 4}
SIZES = {"vit": {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64},
         "swin": STAGES | {"embed_dim": 16, "num_heads": [1, 2, 4, 4], "img_size": 64, "window_size": 2},
         "convnext": STAGES | {"dims": [8, 16, 24, 32]}}  # fmt: skip
SIZES["deit"] = SIZES["vit"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A function that gives the folder of a tiny model of a kind, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(kind):
        if not (root / kind).exists():
            if kind in TIMM:
                encoders.build_timm(kind, root / kind, **SIZES[kind.split("_")[0]])
            else:
                encoders.build_image_model(kind, root / kind)
        return root / kind

    return make


def extract(data_dir, cache_dir, weights, *more):
    """The feature file of demo photos by any encoder at 64 pixels."""
    flags = ["--dataset", "demo", "--data-dir", data_dir, "--cache-dir", cache_dir, "--workers", 0,
             "--views", 1, "--backbone", "auto", "--weights", weights, "--img-size", 64, *more]  # fmt: skip
    return extract_features.main([str(flag) for flag in flags])


def own_states(kind, folder, photo):
    """What transformers or timm make of a photo at 64 pixels: the last states of its own preprocessing."""
    with torch.no_grad():
        if kind in TIMM:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
            data = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=model)
            pixels = timm.data.create_transform(**data)(photo)[None]
            states = model.forward_features(pixels)
            return states.movedim(3, 1) if kind.startswith("swin") else states  # its channels are last
        processor = AutoImageProcessor.from_pretrained(folder)
        config = json.loads(processor.to_json_string())
        sizes = {name: {key: round(value * 64 / 224) for key, value in config[name].items() if value}
                 for name in ("size", "crop_size") if config.get(name)}  # fmt: skip
        if kind == "convnext":
            sizes = {"size": {"shortest_edge": 64}}
        pixels = processor(photo, return_tensors="pt", **sizes)["pixel_values"]
        return AutoModel.from_pretrained(folder).eval().get_encoder("image")(pixels).last_hidden_state


@pytest.mark.parametrize("kind, layout", [*KINDS.items(), *TIMM.items()])
def test_regions_of_any_encoder_are_its_own_states(data_dir, tmp_path, model_of, kind, layout):
    before, classes, rows = layout
    path = extract(data_dir, tmp_path, model_of(kind), "--limit", 3)
    cache = FeatureCache(path)
    assert path.name == f"demo-{kind}-64-first3.h5" and cache.grid.tolist() == [[rows, rows]] * 3
    assert cache.attrs["encoder"] == (f"timm {kind}" if kind in TIMM else kind)
    for image_id in cache.ids:
        photo = Image.open(data_dir / "demo" / "images" / f"{image_id}.jpg").convert("RGB")
        states = own_states(kind, model_of(kind), photo)
        if before is None:
            expected = states.flatten(2).mT[0]
        else:
            expected = torch.cat((states[0, :classes], states[0, before:]))
        found = cache.read([image_id])["regions"][0]
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2e-3 * expected.abs().max())


@pytest.mark.parametrize("kind", ["clip", "deit", "dinov2_with_registers", "swin", "vit_tiny_patch16_224"])
def test_a_place_is_where_its_pixels_are(model_of, kind):
    """Other pixels in one place change its own state most, beside what they change on the whole."""
    backbone, rows = load_backbone("auto", str(model_of(kind)), 64), (KINDS | TIMM)[kind][2]
    side, generator = 64 // rows, torch.Generator().manual_seed(0)
    photo = torch.randint(100, 156, (1, 3, 64, 64), dtype=torch.uint8, generator=generator)
    photos = photo.repeat(rows**2, 1, 1, 1)
    for place, changed in enumerate(photos):
        row, column = divmod(place, rows)
        changed[:, row * side : (row + 1) * side, column * side : (column + 1) * side] ^= 255
    with torch.inference_mode():
        states = [backbone.regions(pixels)[:, -(rows**2) :].float() for pixels in (photos, photo)]
    moved = (states[0] - states[1]).norm(dim=2).log()  # [changed place, place]
    moved = moved - moved.mean(0) - moved.mean(1, keepdim=True)
    assert moved.argmax(1).tolist() == moved.argmax(0).tolist() == list(range(rows**2))


@pytest.mark.parametrize("count, side, patch, found", [
    (257, 224, 14, (1, 16)), (261, 224, 14, (5, 16)), (201, 224, 16, (5, 14)), (196, 224, 16, (0, 14)),
    (50, 224, 32, (1, 7)), (198, 224, 16, (2, 14)), (49, 224, 4, (0, 7)), (50, 100, 14, (1, 7)),
    (26, 64, 16, (10, 4)),  # RADIO's: 5 x 5 would fit the count, not the patches
    (49, 224, None, (0, 7)), (50, 224, None, (1, 7)),
    (117, 64, 16, None), (300, 64, 16, None), (580, 384, None, None), (3, 64, 16, (2, 1)),
])  # fmt: skip
def test_the_places_among_the_tokens(count, side, patch, found):
    if found:
        assert find_places(count, side, patch) == found
        return
    with pytest.raises(ValueError, match=f"its {count} states of a photo of {side} pixels are no square"):
        find_places(count, side, patch)


def test_padding_is_no_region_and_a_grid_is_a_mean(data_dir, model_of):
    """By hand: the model over the photo on the mean colour, its places cut to the photo, then averaged."""
    folder, photo = str(model_of("dinov2_with_registers")), Image.linear_gradient("L").resize((300, 110))
    photo = photo.convert("RGB")
    padded, both = (load_backbone("auto", folder, 64, fit="pad", grid=grid) for grid in (None, 2))
    pixels = padded.prepare(photo)
    assert pixels.shape == (3, 23, 64) and not padded.same_size and padded.shape == (17, 32)
    assert padded.grid(pixels[None]) == [2, 4] and both.grid(pixels[None]) == [2, 2]
    mean, std = (torch.tensor(padded.settings[key])[:, None, None] for key in ("mean", "std"))
    square = mean.expand(3, 64, 64).clone()
    square[:, :23] = pixels / 255
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder).eval()
        states = model(((square - mean) / std)[None]).last_hidden_state[0]
    places = states[5:].view(4, 4, 32)[:2]
    expected = torch.cat((states[:1], places.flatten(0, 1)))
    pooled = torch.cat((states[:1], places.view(2, 2, 2, 32).mean(2).flatten(0, 1)))
    for backbone, regions in ((padded, expected), (both, pooled)):
        with torch.inference_mode():
            found = backbone.look([pixels[None]], "cpu", 1)[0][0]
        np.testing.assert_allclose(found, regions, rtol=2**-10, atol=2e-3 * regions.abs().max())
    assert both.shape == (5, 32) and both.settings | {"grid": None} == padded.settings


@pytest.mark.parametrize("options", [(), ("--fit", "pad", "--grid", 3), ("--fit", "squash"), ("--grid", 1)])
def test_new_photos_are_prepared_as_the_file_says(data_dir, tmp_path, model_of, options):
    folder, images = model_of("dinov2_with_registers"), data_dir / "demo" / "images"
    cache = FeatureCache(extract(data_dir, tmp_path, folder, "--batch-size", 1, "--limit", 4, *options))
    backbone = run_backbone(cache.attrs, str(folder))
    for image_id in cache.ids:
        photo = {image_id: str(images / f"{image_id}.jpg")}
        found = NewPhotos(photo, cache.attrs, backbone, "cpu", Here()).read([image_id])
        kept = cache.read([image_id])
        for key in ("regions", "region_mask", "region_grid"):
            assert torch.equal(found[key], kept[key])
    with pytest.raises(ValueError, match="made with a local auto .file-.*; name it with --weights"):
        run_backbone(cache.attrs)
    with pytest.raises(ValueError, match="not what the run's features were made with: .*weights_sha256"):
        run_backbone(cache.attrs, str(model_of("siglip")))


class Here:
    """A pool of no threads."""

    map = staticmethod(map)


def test_a_run_on_any_encoder_from_photos_to_new_posts(data_dir, tmp_path, model_of, capsys):
    encoder = model_of("dinov2_with_registers")
    features = extract(data_dir, tmp_path, encoder, "--views", 2, "--fit", "pad")
    assert features.name == "demo-dinov2_with_registers-64-pad.h5"
    run = train.main([str(flag) for flag in [
        "--dataset", "demo", "--data-dir", data_dir, "--model", "bert-vision", "--features", features,
        "--fusion", "cross-attention", "--epochs", 1, "--text-encoder", data_dir / "demo" / "encoder",
        "--run-dir", tmp_path / "run",
    ]])  # fmt: skip
    assert "parameters of dinov2_with_registers (weights file-" in capsys.readouterr().out
    evaluate.main(["--run", str(run), "--image-check", "--shuffles", "1"])
    page = report.main(["--run", str(run)]).read_text(encoding="utf-8")
    page = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert "dinov2_with_registers features, size 64, fit pad, weights file-" in page["facts"]["Photos"]
    wide = page["photos"]["test_0001"][1]  # 300 x 100: 21 of 64 pixels, so two of four places, to pixel 32
    assert wide == [0, 0, 1, round(32 / 21, 4)]
    assert all({"rows", "columns"} <= post["maps"].keys() for post in page["posts"])
    photo = str(data_dir / "demo" / "images" / "test_0001.jpg")
    answer = Predictor(run, "cpu", str(encoder))({"text": "Jordan", "image": photo})
    assert answer["photo"] and "note" not in answer


def test_a_run_on_any_encoder_says_which(capsys):
    args = ["--model", "bert-vision", "--seed", "1"]
    path = "features/twitter2017-siglip2-base-224-grid7.h5"
    run_dir = "runs/twitter2017-bert-vision-siglip2-base-224-grid7-film-s1"
    assert train.parse_args([*args, "--features", path]).run_dir == run_dir
    assert train.parse_args([*args, "--fusion", "none"]).run_dir == "runs/twitter2017-bert-vision-none-s1"
    with pytest.raises(SystemExit):
        train.parse_args(args)
    assert "--model bert-vision: name its feature file with --features (" in capsys.readouterr().err


def broken(kind, folder, model_of):
    """A folder with the model of a kind in which something is not as it should be."""
    of, change = kind.split(": ")
    if of in ("detr", "yolos"):
        sizes = encoders.tiny_sizes(encoders.CONFIG_MAPPING[of]())
        if of == "detr":
            stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "embedding_size": 8}
            sizes["backbone_config"] = transformers.ResNetConfig(**stages).to_dict()
        AutoModel.from_config(encoders.CONFIG_MAPPING[of](**sizes)).save_pretrained(folder)
        encoders.image_processor(of).save_pretrained(folder)
        return folder
    shutil.copytree(model_of(of), folder)
    weights = load_file(folder / "model.safetensors")
    if change == "a weight is missing":
        del weights["embeddings.cls_token"]
    elif change == "a weight is infinite":
        weights["embeddings.cls_token"] += math.inf
    elif change == "no processor":
        (folder / "preprocessor_config.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind, options, message", [
    ("vit: a weight is missing", {}, "1 weights missing .first: embeddings.cls_token"),
    ("vit: a weight is infinite", {}, "a vit gives no regions of a photo .its states are no finite numbers"),
    ("vit: no processor", {}, "no image processor"),
    ("vit_mae: as it is", {}, "a vit_mae gives no regions .* .it answers the same photo twice in two ways"),
    ("vit: another size", {"img_size": 96}, "--img-size 96: .* takes photos of 64; leave the option out"),
    ("detr: as it is", {"fit": "squash"}, "a detr gives .*its last states are not those of a photo's places"),
    ("yolos: as it is", {"fit": "pad"}, "a yolos gives .*its 117 states of .* 64 pixels are no square"),
    ("siglip2: as it is", {}, "photos cannot be prepared .*its image processor makes .256, 768. of a photo"),
    ("blip: another size", {"img_size": 96}, "--img-size 96: .* takes photos of 64; leave the option out"),
])  # fmt: skip
def test_what_gives_no_regions_is_one_clear_line(tmp_path, model_of, kind, options, message):
    folder = str(broken(kind, tmp_path / "model", model_of))
    if "another size" in kind:  # its own is 64
        path = tmp_path / "model" / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 64}}))
        load_backbone("auto", folder)
    with pytest.raises(ValueError, match=message) as error:
        load_backbone("auto", folder, **{"img_size": 64} | options)
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_options_that_say_too_little_or_too_much(data_dir, model_of, tmp_path, monkeypatch):
    for name, folder in (("pixels", "vilt"), ("caption", "encoder"), ("phrases", "encoder")):
        for option in ({"fit": "squash"}, {"grid": 2}):
            with pytest.raises(ValueError, match=f"--{next(iter(option))}: {name} has no choice of it"):
                load_backbone(name, str(data_dir / "demo" / folder), **option)
    with pytest.raises(ValueError, match="--backbone auto: name its encoder with --weights"):
        load_backbone("auto")
    with pytest.raises(ValueError, match="a .*bert gives no|no image processor"):
        load_backbone("auto", str(data_dir / "demo" / "encoder"))
    absent = (lambda: False, "{0} requires the timm library but it was not found")
    monkeypatch.setitem(transformers.utils.import_utils.BACKENDS_MAPPING, "timm", absent)
    with pytest.raises(ValueError, match="a model of timm, which is not installed; pip install") as error:
        load_backbone("auto", str(model_of("convnext_atto")))
    assert "\n" not in str(error.value)


def test_tf32_is_off_while_a_backbone_looks_and_then_as_it_was():
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        with pytest.raises(KeyError), exact_convolutions("cuda:0"):
            assert setting.fp32_precision == "ieee"
            raise KeyError
        assert setting.fp32_precision == "tf32"
        with exact_convolutions("cpu"):
            assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


class Bomb:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return self.proof.touch, ()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_do_not_fit(tmp_path):
    state = torchvision.models.resnet50().state_dict() | {"fc.bias": torch.zeros(7)}
    path, proof = tmp_path / "weights.pth", tmp_path / "ran"
    with pytest.raises(ValueError, match="no such file"):
        load_backbone("resnet50", str(path))
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


def test_imagenet_is_torchvisions_v1_and_needs_the_network_once(monkeypatch):
    asked = []

    def download(self, **kwargs):
        asked.append(self.name)
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", download)
    for weights in ("imagenet", "imagenet-v2"):
        with pytest.raises(ValueError, match="cannot download .*no route.*--weights PATH"):
            load_backbone("resnet50", weights)
    assert asked == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
