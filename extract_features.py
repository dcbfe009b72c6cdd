"""Run a frozen vision backbone over all photos of a data set, once: region features in one HDF5 file.

    python extract_features.py --dataset twitter2017
    torchrun --nproc-per-node 8 extract_features.py --dataset twitter2017    # eight GPUs, one file
    python extract_features.py --dataset twitter2017 --backbone auto --weights facebook/dinov2-base
    python extract_features.py --dataset twitter2017 --backbone caption --captions captions.txt    # no photos
    python extract_features.py --dataset twitter2017 --backbone phrases --captions notes.jsonl     # nor here

The file is allocated up front (docs/DATA.md, "The feature file", says why contiguous and not a chunk an
image), and rows are written with `os.pwrite` at their offsets: regions first, `status` last. HDF5's own
metadata is never touched again, so a run that is killed leaves a file that opens and says which rows are
done; the same command resumes it. Photos are worked on in batches fixed by their index, and a batch with a
row missing is computed whole, so that an interrupted run gives the same bytes as an uninterrupted one, and so
do several processes of as many threads that share the batches.
"""

if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import argparse
import contextlib
import hashlib
import os
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import PIL
import torch
import torchvision
import transformers

from features import FORMAT, MISSING, OK, UNREADABLE, FeatureCache, FeatureWriter, create_file
from features import photos_sha256, read_columns, read_layout, refuse_other_settings, unfinished
from parts.backbones import BACKBONES, load_backbone
from parts.boxes import MOST, BoxedPhotos, boxes_of, tell_boxes, with_boxes
from parts.captions import Captions
from parts.console import Defaults, bounded, command_line, dataset_name, progress_bar
from parts.datasets import DATASETS, load_dataset
from parts.feature_photos import compare_photos, photo_bytes, point_out_alike, refuse_other_photos
from parts.feature_photos import require_room
from parts.files import check_output
from parts.notes import said_of_photos
from parts.photos import FITS, WORDED, Photos, by_name, find_photos, image_folders, load_ahead, read_captions
from parts.photos import view_sha256
from parts.processes import alone_in, default_device, join_processes, lock, wait_for_all


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Defaults)
    # fmt: off
    add = parser.add_argument
    add("--dataset", type=dataset_name, default="twitter2017",
        help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--data-dir", default="data", help="folder that holds the data sets")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir")
    add("--cache-dir", default="features", help="where feature files go")
    add("--backbone", choices=BACKBONES, default="resnet50",
        help="auto: any image model of transformers or timm, by --weights; clip for clip-bert, blip for blip,"
        " pixels for vilt")
    add("--weights", "--text-encoder", help="resnet50: imagenet (default), imagenet-v2, random or a .pth /"
        " .safetensors file; auto: a hub's image model or a local folder, timm's too; clip, blip, pixels,"
        " caption and phrases (a text encoder): the same (default: the published base)")
    add("--captions", help="for --backbone caption or phrases: a file of '<photo> :<caption>' lines, which"
        " phrases cuts at function words (captions.py); or for phrases a notes file with phrases (notes.py)")
    add("--boxes", help="a file of the boxes of objects in each photo (boxes.py): the regions are the whole"
        " photo and each box, into NAME-boxes.h5")
    add("--placeholder", help="a file of a picture that stands for lost photos (of captions, its caption):"
        " photos that look the same count as missing")
    add("--img-size", type=bounded(int, 1, 4096), help="pixels, squared, of resnet50 (default: 224) and of"
        " models that take another size than their own; of caption, sub-tokens (default: 64); of phrases,"
        " most of a photo (default: 32)")
    add("--fit", choices=FITS, help="how a photo becomes a square: as the model's own image processor does,"
        " which may crop its centre (default, but for resnet50); squashed (resnet50's default); padded")
    add("--grid", type=bounded(int, 1, 64), metavar="N", help="average a photo's places to N x N regions")
    add("--views", type=bounded(int, 1, 1000),
        help="view 0 is plain, the others are augmented (default: 4; a caption has 1)")
    add("--seed", type=bounded(int, 0, 2**32), default=1337,
        help="of the augmented views and of random weights")
    add("--batch-size", type=bounded(int, 1),
        help="images per forward pass, views counted (default: 8, 64 on cuda)")
    add("--workers", type=bounded(int, 0), default=min(4, os.cpu_count() or 1), help="that decode photos")
    add("--device", default=default_device(), help="that computes: cpu, cuda, cuda:1, mps ...")
    add("--limit", type=bounded(int, 1), help="only the first so many photos, into NAME-first<LIMIT>.h5")
    add("--overwrite", action="store_true",
        help="make the file anew if there is one, which stays until the new one is whole")
    add("--verify", action="store_true", help="compare a finished file with its checksums; the same command"
        " without it then repairs what is damaged")
    # fmt: on
    args = parser.parse_args(argv)
    captions = args.backbone in WORDED
    if captions != bool(args.captions):
        parser.error("--backbone caption or phrases and --captions FILE go together")
    if captions and args.images:
        parser.error(f"--images: --backbone {args.backbone} reads --captions, no photo; leave it out")
    if args.boxes and args.backbone in (*WORDED, "pixels"):
        parser.error(f"--boxes: --backbone {args.backbone} makes no region of a picture; leave it out")
    if args.boxes and (args.fit == "pad" or args.grid):
        parser.error("--boxes: each is one region, of a square; leave --fit pad and --grid out")
    if args.verify and args.overwrite:
        parser.error("--verify and --overwrite: one looks at the file, the other replaces it; leave one out")
    if captions and (args.views or 1) > 1:
        parser.error("--views: a caption has one view; leave it out")
    args.views = args.views or (1 if captions else 4)
    if args.batch_size is None:  # 8 stays in a CPU's caches
        args.batch_size = 64 if args.device.startswith("cuda") else 8
    return args


def is_ours(path):
    """Whether a file is a feature file, of any version, whole or broken: not another program's."""
    try:
        read_layout(path)
    except ValueError as error:
        with open(path, "rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n" and "format none" not in str(error)
    return True


def drop_begun(args, partial, settings, image_ids, sizes):
    """Delete an unfinished file that holds no row or, with --overwrite, is of other settings or photos.

    ValueError while another process is filling it.
    """
    fd = lock(partial, os.O_RDWR)
    try:
        attrs, columns = read_layout(partial)
        done = read_columns(partial, columns)["status"].any()
        if done and args.overwrite:
            refuse_other_settings(partial, settings)
            if attrs.get("photos_sha256") != photos_sha256(image_ids, sizes):
                raise ValueError(f"{partial}: made of other photos than those here")
    except ValueError as error:
        if not args.overwrite:
            raise
        done = False
        print(f"begun anew, not gone on with: {error}")
    finally:
        os.close(fd)
    if not done:
        partial.unlink()


def begin(args, path, inputs, shape, kind, settings, recorded):
    """Make the unfinished file of `path`, unless there is one to go on with.

    ValueError if the disk has no room for it, or if what lies there is none of ours.
    """
    partial, size = unfinished(path), int(np.prod(shape)) * np.dtype(kind).itemsize
    present = sum(value is not None for value in inputs.values())
    what = {"caption": "captions", "phrases": "with phrases"}.get(args.backbone, "found")
    counts = f"{shape[0]} photos, {present} {what}, x {shape[1]} views"
    print(f"{settings['dataset']}: {counts}; {path} takes {size:,} bytes")
    for place in (path, partial):
        check_output(place, "--cache-dir", is_ours)
    require_room(partial, size)
    sizes = [0] * len(inputs) if args.captions else photo_bytes(inputs)
    if partial.exists():
        drop_begun(args, partial, settings, list(inputs), sizes)
    if not partial.exists():
        attrs = {key: value for key, value in (settings | recorded).items() if value is not None}
        create_file(partial, list(inputs), sizes, shape, kind, attrs, bool(args.boxes))


def find_inputs(args, dataset, image_ids):
    """({image id: its photo's path, its caption or phrases, None for none}, the `reasons` of `find_photos`).

    ValueError if no post names a photo, FileNotFoundError if none is there.
    """
    if not image_ids:
        reason = f"no post of {args.dataset} names a photo: there is nothing to extract"
        raise ValueError(f"{reason}; train with --fusion none")
    place, reasons = args.captions, {}
    if args.backbone == "caption":
        inputs = by_name(image_ids, read_captions(place))
    elif args.backbone == "phrases":
        phrases = said_of_photos(place, dataset)
        inputs = {image_id: phrases[image_id] for image_id in image_ids}
    else:
        folders = image_folders(args.dataset, args.data_dir, args.images)
        place, inputs = ", ".join(map(str, folders)), find_photos(image_ids, folders, reasons)
    present = [value for value in inputs.values() if value is not None]
    if not present:
        near = next((f" ({image_id}: {reason})" for image_id, reason in reasons.items()), "")
        reason = f"none of the {len(image_ids)} photos is in {place}{near}"
        raise FileNotFoundError(f"{reason}; name another with --images or --captions")
    if args.captions:
        check_placeholder(present, args.placeholder)
    return inputs, reasons


def check_placeholder(captions, placeholder):
    """Point out a caption of suspiciously many photos; ValueError if no photo has that of a placeholder."""
    caption, count = Counter(captions).most_common(1)[0]
    often = count > max(10, len(captions) / 100)
    if isinstance(caption, str) and often and not placeholder:
        print(f"WARNING: {count} of {len(captions)} captions are {caption!r}; if it describes a placeholder"
              " picture, name it with --placeholder, and these photos count as missing")  # fmt: skip
    if placeholder and placeholder not in captions:
        reason = "no caption is that; copy it as it stands in the file"
        raise ValueError(f"--placeholder {placeholder!r}: {reason}")


def file_name(args, dataset, settings):
    """The feature file's name: data set, encoder and size, and what else was chosen."""
    encoder = Path(args.weights).absolute().name if args.backbone == "auto" else args.backbone
    parts = [dataset, encoder, settings["img_size"], settings.get("fit"), args.grid and f"grid{args.grid}",
             args.boxes and "boxes", args.limit and f"first{args.limit}"]  # fmt: skip
    return "-".join(str(part) for part in parts if part)


@torch.inference_mode()
def extract(backbone, writer, loader, batches, device, progress):
    """Fill the rows of `batches`: pixels -> regions [V, n, D] each."""
    each = writer.attrs["views"]
    for rows, photos in zip(batches, loader, strict=True):
        pixels = [views for views, *_ in photos if views is not None]
        of_photos = iter(backbone.look(pixels, device, each) if pixels else ())
        for row, (views, status, reason, *boxes) in zip(rows, photos, strict=True):
            regions = next(of_photos) if views is not None else None
            if regions is not None and not np.isfinite(regions).all():
                name = writer.image_ids[row]
                raise ValueError(f"features of photo {name} do not fit float16; check --weights")
            grid = backbone.grid(views) if views is not None else [0, 0]
            if writer.status[row] == 0:  # a batch computed again for one row leaves the others as they are
                writer.write(row, regions, grid, status, reason, *boxes)
        progress.update(len(rows))


def verify(cache):
    """Compare a finished file with its checksums; ValueError names damaged rows, which are then not done."""
    damaged = []
    with progress_bar(len(cache.ids), "row") as bar:
        for row in range(len(cache.ids)):
            if not cache.whole(row):
                damaged.append(row)
            bar.update()
    if not damaged:
        print(f"{cache.path}: all {len(cache.ids)} rows are as they were written")
        return
    writer = FeatureWriter(cache.path, lock(cache.path, os.O_RDWR), cache.attrs, cache.ids)
    with contextlib.closing(writer):
        os.replace(cache.path, unfinished(cache.path))  # not to stand over rows that are not done
        for row in damaged:
            writer.put("status", row, 0)
    names = ", ".join(cache.ids[row] for row in damaged[:20])
    reason = f"{len(damaged)} of {len(cache.ids)} rows are damaged ({names})"
    advice = "the same command without --verify computes them again, and nothing else"
    raise ValueError(f"{cache.path}: {reason}; {advice}")


def read_placeholder(path, backbone):
    """The `view_sha256` of the picture that stands for lost photos; ValueError if it cannot be read."""
    views, _, reason = Photos([""], {"": path}, backbone, 1, 0).read(0)
    if views is None:
        raise ValueError(f"--placeholder {path}: {reason}")
    return view_sha256(views)


def report(cache):
    """Say what became of the photos; the file holds the full list (`status`, `reason`)."""
    ok, missing, unreadable = ((cache.status == code).sum() for code in (OK, MISSING, UNREADABLE))
    counts = f"{ok} ok, {missing} missing, {unreadable} unreadable"
    print(f"{cache.path}: {len(cache.ids)} photos, {counts}")
    remarked = np.array([bool(reason) for reason in cache.reasons])
    for name, code in (("missing", MISSING), ("unreadable", UNREADABLE), ("ok, but", OK)):
        rows = np.flatnonzero((cache.status == code) & remarked)
        for row in rows[:20]:
            print(f"  {name}: {cache.ids[row]} ({cache.reasons[row]})")
        if len(rows) > 20:
            print(f"  {name}: and {len(rows) - 20} more")
    if cache.attrs["backbone"] not in WORDED:
        point_out_alike(cache)
        if "placeholder" in cache.attrs and "placeholder picture" not in cache.reasons:
            print("WARNING: no photo looks like the --placeholder")
        if cache.boxes:
            tell_boxes(cache)


def tell_finished(path, inputs, captions):
    """Say of a finished file what is in it, and what of `inputs` here is not; `captions`: no photos."""
    print(f"{path} is finished; left alone")
    if unfinished(path).exists():
        print(f"  {unfinished(path)} is there too: with --overwrite, the command that began it goes on")
    report(cache := FeatureCache(path))
    absent = [row for row in np.flatnonzero(cache.status == MISSING) if inputs[cache.ids[row]]]
    back = [cache.ids[row] for row in absent if "placeholder" not in cache.reasons[row]]
    if back:
        there = f"{len(back)} photos recorded as missing are there now (first: {back[0]})"
        print(f"  {there}; extract into another --cache-dir to read them")
    if not captions and (gone := compare_photos(cache, inputs)):
        print(f"  {gone} of the photos it was made of are not here, so they are not compared")


def main(argv=None):
    args = parse_args(argv)
    rank, processes, device = join_processes(args.device)
    dataset = load_dataset(args.dataset, args.data_dir, "characters")  # photos alone count: all spans fit
    for note in dataset.notes:
        print(note)
    image_ids = dataset.image_ids()[: args.limit]
    inputs, reasons = find_inputs(args, dataset, image_ids)
    boxes = boxes_of(args.boxes, image_ids) if args.boxes else {}
    backbone = load_backbone(args.backbone, args.weights, args.img_size, args.seed, args.fit, args.grid)
    if args.boxes:
        backbone = with_boxes(backbone)
    side, shape = backbone.settings["img_size"], (len(image_ids), args.views, *backbone.shape)
    settings = {
        "format": FORMAT, "dataset": dataset.name, "backbone": args.backbone, **backbone.settings,
        "views": args.views, "seed": args.seed,
        "images_sha256": hashlib.sha256("\n".join(image_ids).encode()).hexdigest(),
    }  # fmt: skip
    if args.captions:
        settings["captions_sha256"] = hashlib.sha256(Path(args.captions).read_bytes()).hexdigest()
        settings["placeholder"] = args.placeholder or "none"
    else:
        picture = args.placeholder and Path(args.placeholder)
        settings["placeholder"] = read_placeholder(picture, backbone) if picture else None
    if args.boxes:
        settings["boxes_sha256"] = hashlib.sha256(Path(args.boxes).read_bytes()).hexdigest()
    recorded = {  # said in the file, not compared with what is asked
        "made_from": args.captions or str(next(filter(None, inputs.values())).parent),
        "weights_sha256": backbone.weights_sha256, "parameters": backbone.parameters,
        "batch_size": args.batch_size,
        "engine": "eager",  # earlier versions also compiled it
        **{f"version_{library.__name__}": str(library.__version__)
           for library in (torch, torchvision, transformers, h5py, np, PIL)},
    }  # fmt: skip

    path = Path(args.cache_dir) / f"{file_name(args, dataset.name, backbone.settings)}.h5"
    partial = unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.verify and not path.exists():
        raise FileNotFoundError(f"{path}: no finished file to verify")
    if path.exists() and not args.overwrite:
        refuse_other_settings(path, settings)
        if args.verify:
            return verify(FeatureCache(path))
        tell_finished(path, inputs, bool(args.captions))
        return path

    if rank == 0:
        with alone_in(path.parent):
            begin(args, path, inputs, shape, backbone.dtype, settings, recorded)
            writer = FeatureWriter(partial, lock(partial, os.O_RDWR), settings, image_ids)
    wait_for_all(processes)
    if rank:  # the first process has the lock
        writer = FeatureWriter(partial, os.open(partial, os.O_RDWR), settings, image_ids)
    with contextlib.closing(writer):
        if not args.captions:
            refuse_other_photos(partial, writer.attrs, image_ids, writer.photo_bytes, inputs)
        batch_size = writer.attrs["batch_size"]
        if batch_size != args.batch_size:  # another changes the last bits
            print(f"resuming with the batch size the file was begun with, {batch_size}")
        pictures = args.views * (1 + MOST if args.boxes else 1)  # of a photo, at most
        per_batch = max(1, batch_size // pictures) if backbone.same_size else 1
        rows = list(range(len(image_ids)))
        batches = [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]
        todo = [rows for rows in batches[rank::processes] if (writer.status[rows] == 0).any()]
        worked = sum(len(rows) for rows in batches if (writer.status[rows] == 0).any())
        if worked < len(image_ids):
            print(f"resuming: {len(image_ids) - worked} photos are done")
        if args.captions:
            args.workers, reader = 0, Captions(image_ids, inputs, backbone, args.placeholder, args.backbone)
        else:
            alike = settings["placeholder"]
            photos = image_ids, inputs, backbone, args.views, args.seed, reasons, alike
            reader = BoxedPhotos(boxes, *photos) if args.boxes else Photos(*photos)
        # A photo that keeps its shape is at most 5 : 3 here.
        loader = load_ahead(reader, todo, args.workers, per_batch * pictures * 5 * side**2, processes)
        backbone.regions.to(device, memory_format=torch.channels_last)
        started = time.perf_counter()
        with progress_bar(sum(map(len, todo)), "photo", disable=rank > 0) as progress:
            extract(backbone, writer, loader, todo, device, progress)
        os.fsync(writer.fd)
        wait_for_all(processes)
        if rank == 0:
            os.replace(partial, path)
    wait_for_all(processes)
    seconds = time.perf_counter() - started
    counted = "views counted, boxes not" if args.boxes else "views counted"
    rate = f"{worked * args.views / seconds:.1f} images/s, {counted}"
    print(f"{worked} photos in {seconds:.1f} s on {processes} x {device}: {rate}")
    report(FeatureCache(path))
    return path


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size")
