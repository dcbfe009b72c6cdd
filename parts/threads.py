"""How long OpenMP's threads spin while they wait, unless somebody has said so; imported before torch.

    if __name__ == "__main__":
        from parts import threads

On cores that others use too, a thread that spins takes a core from the one it waits for: training a small
model fell to a hundredth (benchmarks/SPEED.md). A program that only uses us is left as it is.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's library, some microseconds
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's, milliseconds
