"""Two sound layouts of the feature file, measured side by side: one contiguous block, and a chunk an image.

    python benchmarks/feature_file.py

Reads random batches of 8 rows of 2,000 x 49 x 2048 float16 (401 MB): the block through a memory map, the
chunks through h5py row by row, and the same rows from an array in memory. The file is in the page cache for
all three.
"""

import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

ROWS, BATCH, ROUNDS = 2000, 8, 400


def seconds(read, rows):
    """Median seconds a batch."""
    taken = []
    for batch in rows:
        start = time.perf_counter()
        read(batch)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def main():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, 49, 2048), np.float32).astype(np.float16)
    rows = rng.integers(ROWS, size=(ROUNDS, BATCH))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layouts.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("block", data=values)
            file.create_dataset("chunks", data=values, chunks=(1, 49, 2048))
        with h5py.File(path) as file:
            block, chunks = file["block"], file["chunks"]
            mapped = np.memmap(path, np.float16, "r", block.id.get_offset(), block.shape)
            readers = {
                "array in memory": lambda batch: np.stack([values[i] for i in batch]),
                "block, memory map": lambda batch: np.stack([mapped[i] for i in batch]),
                "chunk an image, h5py": lambda batch: np.stack([chunks[i] for i in batch]),
            }
            for read in readers.values():
                seconds(read, rows)  # into the page cache
            taken = {name: seconds(read, rows) for name, read in readers.items()}
            for name, took in taken.items():
                speed = taken["array in memory"] / took
                print(f"{name:<22} {took * 1e3:7.3f} ms a batch of {BATCH}   {speed:5.2f} of memory speed")


if __name__ == "__main__":
    main()
