"""Peak memory of ISDA's inference on CPU, beside resizing all masks at once.

    python benchmarks/isda_memory.py [--height 800] [--width 1333]

Every variant runs in a process of its own, because the peak of a process never falls. Random weights, R50, float32, one
image, 100 detections.
"""

import multiprocessing
import resource
import sys
import time

import torch
from tabulate import tabulate

from querymask.command_line import load_config, make_parser
from querymask.common.measured_models import random_model
from querymask.isda import masks

CONFIG = "projects/isda/configs/isda_r50.yaml"
VARIANTS = {"a few masks at a time": masks.CHUNK_ELEMENTS, "all masks at once": sys.maxsize}


def peak_mib() -> float:
    """Largest resident memory of this process so far (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(chunk: int, height: int, width: int, queue: multiprocessing.Queue) -> None:
    """Put (peak of the libraries, and what building, network and detections added to it, their seconds and number)."""
    libraries = peak_mib()
    model = random_model(load_config(CONFIG, device="cpu")).eval()
    masks.CHUNK_ELEMENTS = chunk
    peaks = [libraries, peak_mib()]
    with torch.no_grad():
        images = model.preprocess([{"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8)}])
        predictions, kernels = model.predict(images)
        peaks.append(peak_mib())
        start = time.perf_counter()
        (found,) = model.detect(predictions, kernels, images.image_sizes)
        seconds = time.perf_counter() - start
    peaks.append(peak_mib())
    queue.put((libraries, *(peak - libraries for peak in peaks[1:]), seconds, len(found)))


def main() -> None:
    """Run all variants and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for name, chunk in VARIANTS.items():
        queue = context.Queue()
        process = context.Process(target=measure, args=(chunk, args.height, args.width, queue))
        process.start()
        *peaks, seconds, count = queue.get()
        process.join()
        rows.append((name, count, *(f"{peak:.0f}" for peak in peaks), f"{seconds:.2f}"))
    header = ("resizing", "detections", "libraries, MiB", "+ model", "+ network", "+ detections", "detections, s")
    print(f"peak resident memory, one image of {args.height}x{args.width}, {torch.get_num_threads()} thread(s)")
    print("columns with + count from the peak of the libraries alone")
    print(tabulate(rows, headers=header, tablefmt="pipe"))


if __name__ == "__main__":
    main()
