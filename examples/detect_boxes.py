"""The objects in a data set's photos, found by any object detection model of transformers, for --boxes.

    python examples/detect_boxes.py --dataset twitter2017 --model facebook/detr-resnet-50 --output boxes.jsonl
    python examples/detect_boxes.py --dataset twitter2017 --model google/owlv2-base-patch16-ensemble \\
        --words person car "football shirt" --output boxes.jsonl    # words of one's own: a zero-shot model
    python extract_features.py --dataset twitter2017 --boxes boxes.jsonl

The same command goes on where it was stopped.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import torch  # noqa: E402
from transformers import AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection  # noqa: E402
from transformers import AutoImageProcessor, AutoProcessor  # noqa: E402

from parts.console import bounded, command_line, dataset_name, progress_bar  # noqa: E402
from parts.datasets import load_dataset  # noqa: E402
from parts.files import resume_lines  # noqa: E402
from parts.photos import decode, find_photos, image_folders, open_picture, upright  # noqa: E402
from parts.processes import default_device, open_output  # noqa: E402
from parts.text_encoder import as_data, load_pretrained  # noqa: E402


@torch.inference_mode()
def detect(model, processor, photo, words, threshold):
    """The boxes of an RGB photo, as parts/boxes.py reads them: those with scores over `threshold`."""
    given = {"text": [words]} if words else {}
    inputs = processor(images=photo, return_tensors="pt", **given).to(model.device)
    size = [(photo.height, photo.width)]
    if words:
        more = {"threshold": threshold, "target_sizes": size, "text_labels": [words]}
        (found,) = processor.post_process_grounded_object_detection(model(**inputs), **more)
        labels = found["text_labels"]
    else:
        (found,) = processor.post_process_object_detection(model(**inputs), threshold, size)
        labels = [model.config.id2label[label] for label in found["labels"].tolist()]
    boxes = [[round(corner, 1) for corner in box] for box in found["boxes"].tolist()]
    return {"boxes": boxes, "labels": labels, "scores": [round(s, 4) for s in found["scores"].tolist()]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", type=dataset_name, required=True)
    add("--data-dir", default="data", help="folder that holds the data sets")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir")
    add("--model", required=True, help="hub name or local folder")
    add("--words", nargs="+", help="what to look for, in words of one's own, with a zero-shot model")
    add("--threshold", type=bounded(float, 0, 1), default=0.3, help="of scores; default: 0.3")
    add("--output", required=True, help="JSON lines, one a photo")
    add("--device", default=default_device())
    args = parser.parse_args(argv)
    ids = load_dataset(args.dataset, args.data_dir).image_ids()
    paths = find_photos(ids, image_folders(args.dataset, args.data_dir, args.images))
    paths = {image_id: path for image_id, path in paths.items() if path is not None}
    kind = AutoModelForZeroShotObjectDetection if args.words else AutoModelForObjectDetection
    model = load_pretrained(kind, args.model, "--model").eval().to(args.device)
    processor = (AutoProcessor if args.words else AutoImageProcessor).from_pretrained(
        args.model, **as_data(args.model)
    )
    how = {"model": args.model, "words": args.words, "threshold": args.threshold}
    boxes = unreadable = 0
    with open_output(args.output) as out:
        expected = ({"image": image_id} | how for image_id in paths)
        others = "the data set, --model, --words or --threshold"
        done = resume_lines(out, args.output, 2**24, expected, others)
        for image_id, path in progress_bar(len(paths) - done, "photo", iterable=list(paths.items())[done:]):
            try:
                with open_picture(path) as file:
                    decode(file)
                    photo = upright(file).copy()
            except Exception as error:  # decoders meet and raise anything
                found, unreadable = {"boxes": [], "error": str(error)}, unreadable + 1
            else:
                found = detect(model, processor, photo, args.words, args.threshold)
            boxes += len(found["boxes"])
            out.write(json.dumps({"image": image_id} | how | found).encode() + b"\n")
            out.flush()
    print(f"{args.output}: {len(paths)} of {len(ids)} photos, {done} done before; {boxes} boxes found now,"
          f" {unreadable} photos cannot be read")  # fmt: skip


if __name__ == "__main__":
    command_line(main)
