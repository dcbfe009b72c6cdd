"""Run a frozen vision backbone over every photo of a data set, once, and keep the region features in one HDF5 file.

    python extract_features.py --dataset twitter2017
    torchrun --nproc-per-node 8 extract_features.py --dataset twitter2017    # eight GPUs, one file
    python extract_features.py --dataset twitter2017 --backbone caption --captions captions.txt    # no photo needed
    python extract_features.py --dataset twitter2017 --backbone phrases --captions notes.jsonl     # nor here

The file is allocated up front, and rows are written with `os.pwrite` at their offsets: regions first, `status` last.
HDF5's own metadata is never touched again, so a run that is killed leaves a file that opens and says which rows are
done; the same command resumes it. Photos are worked on in batches fixed by their index, and a batch with a row
missing is computed whole, so that an interrupted run gives the same bytes as an uninterrupted one, and so do several
processes of as many threads that share the batches.

Why contiguous and not a chunk an image: docs/DATA.md, "The feature file".
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import PIL
import torch
import torchvision
import transformers
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones import BACKBONES, Captions, Compiled, Photos, load_backbone
from commands import alone_in, bounded, command_line, default_device, join_processes, lock, progress_bar, wait_for_all
from data import DATASETS, dataset_name, load_dataset
from features import FORMAT, MISSING, OK, UNREADABLE, FeatureCache, FeatureWriter, create_file, photo_bytes
from features import refuse_other_photos, refuse_other_settings
from model import WORDED
from notes import said_of_photos
from photos import by_name, find_photos, image_folders, read_captions

COMPILE_FROM = 8000  # images; on CPU ResNet50 then is up to 20 ms an image faster, but first compiles for 4 to 40 s


# --------------------------------------------------------------------------------------------------------- main


def low_priority(worker):
    """Let the forward pass go first: its threads wait for the slowest of them."""
    os.nice(10)


def shared_memory(processes):
    """Bytes of shared memory for the queues of each of so many processes: half of what is free."""
    return shutil.disk_usage("/dev/shm").free // (2 * processes) if os.path.isdir("/dev/shm") else 2**62


def queues(workers, batch_bytes, room):
    """(workers, batches each decodes ahead) whose queues fit into `room` bytes of shared memory: Docker gives 64 MB of it."""
    fitting = min(workers, room // batch_bytes)
    return fitting, min(2, max(1, room // (batch_bytes * max(1, fitting))))


def batch_loader(reader, batches, workers, ahead=2):
    """Decodes batches of rows of `Photos` or `Captions` ahead, in so many processes, each `ahead` batches."""
    return DataLoader(
        reader, batch_size=None, sampler=batches, collate_fn=list, num_workers=workers, worker_init_fn=low_priority,
        prefetch_factor=ahead if workers else None,
    )  # fmt: skip


@torch.inference_mode()
def extract(backbone, writer, loader, batches, device, progress):
    """Fill the rows of `batches`: pixels -> regions [V, n, D] each."""
    for rows, photos in zip(batches, loader, strict=True):
        pixels = [views for views, _, _ in photos if views is not None]
        made = iter(())
        if pixels:
            regions = backbone.regions(torch.cat(pixels).to(device)).cpu().numpy()  # [B * V, n, D]
            if not np.isfinite(regions).all():
                raise ValueError(f"features of batch {rows[0]}-{rows[-1]} do not fit float16; check --weights")
            made = iter(regions.reshape(len(pixels), -1, *regions.shape[1:]))
        for row, (views, status, reason) in zip(rows, photos, strict=True):
            regions = next(made) if views is not None else None
            grid = backbone.grid(views) if views is not None else [0, 0]
            if writer.status[row] == 0:  # a batch computed again for one row leaves the others as they are
                writer.write(row, regions, grid, status, reason)
        progress.update(len(rows))


def verify(path):
    """Compare every row with its checksums; ValueError if some are damaged: these are then not done, the file unfinished."""
    cache = FeatureCache(path)
    damaged = [row for row in tqdm(range(len(cache.ids)), unit="row", mininterval=1) if not cache.whole(row)]
    if not damaged:
        print(f"{path}: all {len(cache.ids)} rows are as they were written")
        return
    with h5py.File(path, "r", locking=False) as file:
        offset = file["status"].id.get_offset()
    fd = lock(path, os.O_RDWR)
    try:
        os.replace(path, path.with_name(path.name + ".partial"))  # first: no finished name over rows that are not done
        for row in damaged:
            os.pwrite(fd, b"\0", offset + row)
    finally:
        os.close(fd)
    raise ValueError(
        f"{path}: {len(damaged)} of {len(cache.ids)} rows are damaged ({', '.join(cache.ids[row] for row in damaged[:20])});"
        " the same command without --verify computes them again, and nothing else"
    )


def report(path):
    """Say what became of the photos; the file holds the full list (`status`, `reason`)."""
    cache = FeatureCache(path)
    counts = {name: int((cache.status == code).sum()) for name, code in
              (("ok", OK), ("missing", MISSING), ("unreadable", UNREADABLE))}  # fmt: skip
    print(f"{path}: {len(cache.status)} photos, " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    ids, noted = list(cache.rows), np.array([bool(reason) for reason in cache.reasons])
    for name, code in (("missing", MISSING), ("unreadable", UNREADABLE), ("ok, but", OK)):
        rows = np.flatnonzero((cache.status == code) & noted)
        for row in rows[:20]:
            print(f"  {name}: {ids[row]} ({cache.reasons[row]})")
        if len(rows) > 20:
            print(f"  {name}: and {len(rows) - 20} more")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    add("--dataset", type=dataset_name, default="twitter2017", help=f"{', '.join(DATASETS)} or a folder of your own")
    add("--data-dir", default="data", help="folder that holds the data sets")
    add("--images", help="folder of the photos, where it is not in a usual place under --data-dir")
    add("--cache-dir", default="features", help="where feature files go")
    add("--backbone", choices=BACKBONES, default="resnet50", help="clip for clip-bert, blip for blip, pixels for vilt")
    add("--weights", "--text-encoder", help="resnet50: imagenet (default), imagenet-v2, random or a .pth / .safetensors"
        " file; clip, blip, pixels, caption and phrases (a text encoder): a hub's model or a local folder"
        " (default: the published base)")
    add("--captions", help="for --backbone caption or phrases: a file of '<photo> :<caption>' lines, which"
        " phrases cuts at function words (backbones.py); or for phrases a notes file with phrases (notes.py)")
    add("--placeholder", help="a caption that describes a placeholder picture: photos with it count as missing")
    add("--img-size", type=bounded(int, 1, 4096), help="of resnet50, squared (default: 224); of caption, sub-tokens"
        " (default: 64); of phrases, most of a photo (default: 32); the others know their own")
    add("--views", type=bounded(int, 1, 1000), help="view 0 is plain, the others are augmented (default: 4; a caption has 1)")
    add("--seed", type=bounded(int, 0, 2**32), default=1337, help="of the augmented views and of random weights")
    add("--batch-size", type=bounded(int, 1), help="images per forward pass, views counted (default: 8, 64 on cuda)")
    add("--compile", action=argparse.BooleanOptionalAction, help="the forward pass with torch's inductor (default: if it"
        " pays)")
    add("--workers", type=bounded(int, 0), default=min(4, os.cpu_count() or 1), help="that decode photos")
    add("--device", default=default_device())
    add("--limit", type=bounded(int, 1), help="only the first so many photos, into NAME-first<LIMIT>.h5")
    add("--overwrite", action="store_true", help="make the file anew if there is one")
    add("--verify", action="store_true", help="compare a finished file with its checksums; the same command without it"
        " then repairs what is damaged")
    # fmt: on
    args = parser.parse_args(argv)
    captions = args.backbone in WORDED
    if captions != bool(args.captions):
        parser.error("--backbone caption or phrases and --captions FILE go together")
    if captions and args.images:
        parser.error(f"--images: --backbone {args.backbone} reads --captions, no photo; leave it out")
    if args.compile and args.backbone in ("pixels", *WORDED):
        parser.error(f"--compile: --backbone {args.backbone} has no forward pass of one shape; leave it out")
    if args.verify and args.overwrite:
        parser.error("--verify and --overwrite: one looks at the file, the other deletes it; leave one out")
    args.batch_size = args.batch_size or (64 if args.device.startswith("cuda") else 8)  # 8 stays in a CPU's caches
    args.views = args.views or (1 if captions else 4)
    if captions and args.views > 1:
        parser.error("--views: a caption has one view; leave it out")
    return args


def begin(args, path, image_ids, sizes, shape, kind, attrs, found):
    """Make the unfinished file at `path`.partial if there is none; ValueError if the disk has no room for it."""
    partial = path.with_name(path.name + ".partial")
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    held = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(path.parent).free
    what = "found" if not args.captions else "captions" if args.backbone == "caption" else "with phrases"
    print(f"{attrs['dataset']}: {shape[0]} photos, {found} {what}, x {shape[1]} views; {path} takes {size:,} bytes")
    if size - held > free:
        raise ValueError(f"{path.parent}: {size - held:,} bytes needed, {free:,} free; make room or lower --views")
    if args.overwrite:
        if partial.exists():
            os.close(lock(partial, os.O_RDWR))  # refused while another process is filling it
            partial.unlink()
        path.unlink(missing_ok=True)
    if not partial.exists():
        create_file(partial, image_ids, sizes, shape, kind, attrs)


def find_inputs(args, dataset, image_ids):
    """({image id: its photo's path, its caption or phrases, None for none}, the `reasons` of `find_photos`).

    ValueError if no post names a photo, FileNotFoundError if none is there.
    """
    if not image_ids:
        raise ValueError(f"no post of {args.dataset} names a photo: there is nothing to extract; train with --fusion none")
    place, reasons = args.captions, {}
    if args.captions:
        inputs = by_name(image_ids, read_captions(args.captions)) if args.backbone == "caption" else {}
        if args.backbone == "phrases":
            said = said_of_photos(args.captions, dataset)
            inputs = {image_id: said[image_id] for image_id in image_ids}
    else:
        folders = image_folders(args.dataset, args.data_dir, args.images)
        place, inputs = ", ".join(map(str, folders)), find_photos(image_ids, folders, reasons)
    found = [value for value in inputs.values() if value is not None]
    if not found:
        near = next((f" ({image_id}: {reason})" for image_id, reason in reasons.items()), "")
        raise FileNotFoundError(
            f"none of the {len(image_ids)} photos is in {place}{near}; name another with --images or --captions"
        )
    if args.captions:
        said, count = Counter(found).most_common(1)[0]
        if isinstance(said, str) and count > max(10, len(found) / 100) and not args.placeholder:
            print(f"WARNING: {count} of {len(found)} captions are {said!r}; if it describes a placeholder picture, name it"
                  " with --placeholder, and these photos count as missing")  # fmt: skip
        if args.placeholder and args.placeholder not in found:
            raise ValueError(f"--placeholder {args.placeholder!r}: no caption is that; copy it as it stands in the file")
    return inputs, reasons


def main(argv=None):
    args = parse_args(argv)
    rank, processes, device = join_processes(args.device)
    dataset = load_dataset(args.dataset, args.data_dir)
    for note in dataset.notes:
        print(note)
    image_ids = dataset.image_ids()[: args.limit]
    inputs, reasons = find_inputs(args, dataset, image_ids)
    found = sum(value is not None for value in inputs.values())
    backbone = load_backbone(args.backbone, args.weights, args.img_size, args.seed)
    shape = (len(image_ids), args.views, *backbone.shape)
    settings = {
        "format": FORMAT, "dataset": dataset.name, "backbone": args.backbone, **backbone.settings,
        "views": args.views, "seed": args.seed,
        "images_sha256": hashlib.sha256("\n".join(image_ids).encode()).hexdigest(),
    }  # fmt: skip
    if args.captions:
        settings |= {"captions_sha256": hashlib.sha256(Path(args.captions).read_bytes()).hexdigest()}
        settings |= {"placeholder": args.placeholder or "none"}
    compiling = args.compile
    if compiling is None and args.backbone == "resnet50" and device == "cpu" and len(image_ids) * args.views >= COMPILE_FROM:
        compiling = shutil.which(os.environ.get("CXX", "g++")) is not None
        if not compiling:
            print("no C++ compiler here: the forward pass is not compiled")
    sizes = [0] * len(image_ids) if args.captions else photo_bytes(inputs)
    recorded = {  # said in the file, not compared with what is asked
        "made_from": args.captions or str(next(filter(None, inputs.values())).parent),
        "weights_sha256": backbone.weights_sha256, "parameters": backbone.parameters, "batch_size": args.batch_size,
        "engine": "inductor" if compiling else "eager",
        **{f"version_{m.__name__}": str(m.__version__) for m in (torch, torchvision, transformers, h5py, np, PIL)},
    }  # fmt: skip

    part = f"-first{args.limit}" if args.limit else ""
    path = Path(args.cache_dir) / f"{dataset.name}-{args.backbone}-{settings['img_size']}{part}.h5"
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.verify and not path.exists():
        raise FileNotFoundError(f"{path}: no finished file to verify")
    if path.exists() and not args.overwrite:
        refuse_other_settings(path, settings)
        if args.verify:
            return verify(path)
        print(f"{path} is finished; left alone (--overwrite makes it anew)")
        report(path)
        cache = FeatureCache(path)
        absent = [i for i in image_ids if cache.status[cache.rows[i]] == MISSING]
        if back := [i for i in absent if inputs[i] is not None and inputs[i] != args.placeholder]:
            print(f"  {len(back)} photos recorded as missing are there now (first: {back[0]}); --overwrite reads them")
        if not args.captions and (gone := cache.compare_photos(inputs)):
            print(f"  {gone} of the photos it was made of are not here, so they are not compared")
        return path

    if rank == 0:
        with alone_in(path.parent):
            begin(args, path, image_ids, sizes, shape, backbone.dtype, settings | recorded, found)
            writer = FeatureWriter(partial, lock(partial, os.O_RDWR), settings, image_ids)
    wait_for_all(processes)
    if rank:
        writer = FeatureWriter(partial, os.open(partial, os.O_RDWR), settings, image_ids)  # the first process has the lock
    with contextlib.closing(writer):
        if not args.captions:
            refuse_other_photos(partial, writer.attrs, image_ids, writer.photo_bytes, inputs)
        for key in ("batch_size", "engine"):  # another one would change the last bits
            if writer.attrs[key] != recorded[key]:
                print(f"resuming with the {key.replace('_', ' ')} the file was begun with, {writer.attrs[key]}")
        batch_size, engine = writer.attrs["batch_size"], writer.attrs["engine"]
        per_batch = max(1, batch_size // args.views) if backbone.same_size else 1
        batches = [list(range(i, min(i + per_batch, len(image_ids)))) for i in range(0, len(image_ids), per_batch)]
        todo = [rows for rows in batches[rank::processes] if (writer.status[rows] == 0).any()]
        worked = sum(len(rows) for rows in batches if (writer.status[rows] == 0).any())
        if worked < len(image_ids):
            print(f"resuming: {len(image_ids) - worked} photos are done")
        if args.captions:
            reader = Captions(image_ids, inputs, backbone, args.placeholder, args.backbone)
            workers, ahead = 0, 1
        else:
            reader = Photos(image_ids, inputs, backbone, args.views, args.seed, reasons)
            asked = min(args.workers, len(todo))
            # A photo that keeps its shape is at most 5 : 3 here.
            workers, ahead = queues(asked, per_batch * args.views * 5 * settings["img_size"] ** 2, shared_memory(processes))
            if workers < asked:
                print(f"{workers} of {asked} workers: /dev/shm has no room for more batches (docker run --shm-size 1g makes some)")
        loader = batch_loader(reader, todo, workers, ahead)
        backbone.regions.to(device, memory_format=torch.channels_last)
        if engine == "inductor":
            side = settings["img_size"]
            compiled = Compiled(backbone.regions, (per_batch * args.views, 3, side, side), device)
            backbone = replace(backbone, regions=compiled)
        started = time.perf_counter()
        with progress_bar(sum(map(len, todo)), "photo", disable=rank > 0) as progress:
            extract(backbone, writer, loader, todo, device, progress)
        os.fsync(writer.fd)
        wait_for_all(processes)
        if rank == 0:
            os.replace(partial, path)
    wait_for_all(processes)
    seconds = time.perf_counter() - started
    rate = worked * args.views / seconds
    print(f"{worked} photos in {seconds:.1f} s on {processes} x {device}, {engine}: {rate:.1f} images/s, views counted")
    report(path)
    return path


if __name__ == "__main__":
    command_line(main, lower="lower --batch-size")
