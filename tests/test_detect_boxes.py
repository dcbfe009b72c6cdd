"""Boxes by any detector of transformers: tiny random ones, and what extract_features.py makes of them."""

import json

import detect_boxes
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor
from transformers import OwlViTProcessor, YolosConfig, YolosForObjectDetection, YolosImageProcessor, pipeline

import extract_features
from features import FeatureCache
from parts.boxes import check_boxes
from parts.files import read_by_id

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """{kind: folder} of a YOLOS of three classes and of an OWL-ViT that is asked for words."""
    torch.manual_seed(0)
    folders = {kind: tmp_path_factory.mktemp("detectors") / kind for kind in ("yolos", "owlvit")}
    vision = {"patch_size": 16, **SMALL}
    yolos = YolosConfig(image_size=[64, 64], num_detection_tokens=5, num_labels=3, **vision)
    YolosForObjectDetection(yolos).save_pretrained(folders["yolos"])
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folders["yolos"])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.model_max_length = 16
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53,
            "pad_token_id": 53, **SMALL}  # fmt: skip
    owl = OwlViTConfig(text_config=text, vision_config={"image_size": 64, **vision}, projection_dim=16)
    OwlViTForObjectDetection(owl).save_pretrained(folders["owlvit"])
    size = {"height": 64, "width": 64}
    processor = OwlViTProcessor(OwlViTImageProcessor(size=size, crop_size=size), tokenizer)
    processor.save_pretrained(folders["owlvit"])
    return folders


@pytest.mark.parametrize("kind, words, threshold", [("yolos", [], 0.2), ("owlvit", ["cat", "red dog"], 0.4)])
def test_boxes_are_those_of_the_pipeline_of_transformers(
    detectors, data_dir, tmp_path, kind, words, threshold
):
    """And go on where they were stopped; extract_features.py takes them."""
    out = tmp_path / "boxes.jsonl"
    flags = ["--dataset", "demo", "--data-dir", str(data_dir), "--model", str(detectors[kind]), "--threshold",
             str(threshold), "--output", str(out), "--device", "cpu"]  # fmt: skip
    flags += ["--words", *words] if words else []
    detect_boxes.main(flags)
    whole = out.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    task = "zero-shot-object-detection" if words else "object-detection"
    detector = pipeline(task, str(detectors[kind]), device="cpu")
    for line in lines[:6]:
        photo = Image.open(data_dir / "demo" / "images" / f"{line['image']}.jpg")
        asked = {"candidate_labels": words} if words else {}
        expected = detector(photo, threshold=threshold, **asked)
        rows = list(zip(line["scores"], line["labels"], line["boxes"], strict=True))
        # The pipeline asks word by word, and gives a place once for each word.
        assert 0 < len(rows) <= len(expected) and (words or len(rows) == len(expected))
        for score, label, box in rows:
            assert any(
                score == pytest.approx(row["score"], abs=1e-3) and label == row["label"]
                and box == pytest.approx(list(row["box"].values()), abs=1.1)
                for row in expected
            ), (score, label, box)  # fmt: skip

    out.write_bytes(whole[: whole.find(b"\n", len(whole) // 2) + 20])
    detect_boxes.main(flags)
    assert out.read_bytes() == whole
    with pytest.raises(ValueError, match="threshold 0.[24], here 0.9.: .* were others; name another"):
        detect_boxes.main([*flags, "--threshold", "0.9"])
    counts = [min(len(boxes.corners), 16) for boxes in read_by_id(out, "image", check_boxes).values()]
    path = extract_features.main([
        "--dataset", "demo", "--data-dir", str(data_dir), "--cache-dir", str(tmp_path), "--weights", "random",
        "--img-size", "32", "--views", "1", "--workers", "0", "--limit", "3", "--boxes", str(out),
    ])  # fmt: skip
    assert (FeatureCache(path).num_regions <= [1 + count for count in counts[:3]]).all()
    assert FeatureCache(path).num_regions.sum() > 3


def test_a_photo_that_cannot_be_read_has_no_boxes_and_is_counted(detectors, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (70, 50), "red").save(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "2.jpg").write_text("no picture")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("".join(f"IMGID:{i}\nso\tO\n\n" for i in (1, 2, 3)))
    flags = ["--dataset", str(tmp_path), "--model", str(detectors["yolos"]), "--threshold", "0"]
    detect_boxes.main([*flags, "--output", str(tmp_path / "boxes.jsonl")])
    out = capsys.readouterr().out
    assert "2 of 3 photos, 0 done before; 5 boxes found now, 1 photos cannot be read" in out
    boxes = read_by_id(tmp_path / "boxes.jsonl", "image", check_boxes)
    assert [of_photo.count for of_photo in boxes.values()] == [5, 0]
    with pytest.raises(ValueError, match="--model absent: cannot be loaded"):
        detect_boxes.main([*flags, "--model", "absent", "--output", str(tmp_path / "other.jsonl")])
