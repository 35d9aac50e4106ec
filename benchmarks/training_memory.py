"""Memory of a training step of each method on the CPU, as it is and with activation checkpointing.

    python benchmarks/training_memory.py [CONFIG ...] [--height 480] [--width 640] [--save FILE]

Every row is a process of its own, because memory that one model leaves would hide that of the next. Random weights,
float32; gradients of all weights are there before the step, as from the second iteration on.
"""

import multiprocessing

import torch

from querymask.command_line import add_save, load_config, make_parser, markdown_table, show_page
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.measured_models import make_batch, random_model
from querymask.common.measuring import machine, peak_memory, resident

CONFIGS = tuple(
    f"projects/{method}/configs/{name}.yaml"
    for method, name in (("solq", "solq_r50"), ("isda", "isda_r50"), ("istr", "istr_r50"), ("effseg", "effseg_v2_r50"))
)


def measure(
    config: str, overrides: list, batch: int, size: tuple[int, int], instances: int, queue: multiprocessing.Queue
) -> None:
    """Put MiB of weights and gradients, and beyond these what the forward pass leaves and the peak of the step."""
    cfg = load_config(config, overrides, device="cpu")
    model = random_model(cfg).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    fixed = sum(tensor.nbytes for tensor in model.state_dict().values()) + sum(x.grad.nbytes for x in trained)
    items = make_batch(batch, size, instances, get_key(cfg, num_classes_key(cfg)))
    kept = []

    def step() -> None:
        before = resident("VmRSS")
        loss = sum(model(items).values())
        kept.append((resident("VmRSS") - before) / 2**10)
        loss.backward()

    step()  # what libraries allocate once is not the step's
    peak = peak_memory(step, "cpu")
    queue.put((fixed / 2**20, kept[-1], peak))


def main() -> None:
    """Measure all configs and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--instances", type=int, default=10)
    add_save(parser)
    args = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for config in args.configs:
        for checkpointed in (False, True):
            overrides, size, queue = ["MODEL.USE_CHECKPOINT", checkpointed], (args.height, args.width), context.Queue()
            process = context.Process(target=measure, args=(config, overrides, args.batch, size, args.instances, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{config} was not measured")
            found = queue.get()
            name = config.rpartition("/")[2].removesuffix(".yaml")
            rows.append([name, "yes" if checkpointed else "no", *(f"{value:.0f}" for value in found)])
    header = ["model", "checkpointing", "weights and gradients, MiB", "+ kept for backward", "+ peak of the step"]
    text = (
        f"{args.batch} image(s) of {args.height}x{args.width} with {args.instances} instances. {machine('cpu')}\n\n"
        f"{markdown_table(rows, header)}"
    )
    show_page("Memory of a training step", "benchmarks/training_memory.py", text, args.save)


if __name__ == "__main__":
    main()
