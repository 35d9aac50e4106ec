"""The operators: time, peak memory and error beside other forms, and as a part of the least time."""

from collections.abc import Callable

import msda
import sps
import torch
from torch import Tensor

from gpu_parts import per_channel
from gpu_parts.card import known_rates
from gpu_parts.rates import set_tf32
from gpu_parts.results import Cell, Part, first_line
from gpu_parts.sizes import Sizes
from querymask.common.measuring import device_time
from querymask.common.ops import multi_scale_deformable_attention, sparse_conv2d

PRECISIONS = {
    "fp32": (torch.float32, False),
    "TF32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}
COLUMNS = (
    "form",
    "forward ms",
    "% of bound",
    "backward ms",
    "% of bound ",
    "forward MiB",
    "with backward MiB",
    "error",
)
Form = Callable[..., Tensor]


def run_msda(part: Part, sizes: Sizes) -> None:
    """Multi-scale deformable attention beside ``grid_sample``, its compiled form, and one thread per channel."""
    rates = known_rates(part.results)
    part.note(
        f"Inputs as in `benchmarks/msda.py`: locations are pixel centres plus offsets of two pixels. Bounds: memory "
        f"and L1 of {rates.source}. Medians of {sizes.repeat} runs of the device's own time, with cold caches; "
        "backward is the difference of both passes and the forward one. MiB: peak beyond the inputs. Error: of the "
        "output, relative to its largest value."
    )
    forms, missing = msda_forms(sizes)
    encoders = [msda.Case(image, None, sizes.batch) for image in sizes.images]
    decoder = msda.Case(sizes.images[0], sizes.queries, sizes.batch)
    for case in (encoders[0], decoder, *encoders[1:]):
        for name in ("fp32", "bf16", "fp16"):
            dtype = PRECISIONS[name][0]
            bounds = msda.bounds(case, dtype, rates)
            title = f"{case.name}, {name}; bounds {bounds[0].least:.3f} and {bounds[1].least:.3f} ms"
            row = part.table(title, *COLUMNS)
            for form, function in forms.items():
                if "compile" in form and (case is not encoders[0] or name == "fp16"):
                    continue  # compiling takes longer than all else
                if part.is_over(row, form):
                    continue
                with part.attempt(f"{title}: {form}", row, form):
                    found = msda.measure(function, case, dtype, "cuda", sizes.repeat)
                    row(form, *cells(found, bounds[0].least, bounds[1].least))
            for form, reason in missing.items():
                row(form, f"skipped: {reason}")


def msda_forms(sizes: Sizes) -> tuple[dict[str, Form], dict[str, str]]:
    """The forms to measure, and those that cannot be, with the reason."""
    forms: dict[str, Form] = {
        "this operator": multi_scale_deformable_attention,
        "grid_sample, stacked": msda.stacked,
        "grid_sample, accumulated": msda.accumulated,
    }
    missing = {}
    if sizes.pretended:
        reason = "the device is pretended"
        missing = {"grid_sample, torch.compile": reason, "one thread per channel": reason}
        return forms, missing
    forms["grid_sample, torch.compile"] = torch.compile(msda.accumulated, dynamic=False)
    try:
        forms["one thread per channel"] = per_channel.build()
    except (FileNotFoundError, RuntimeError) as error:
        missing["one thread per channel"] = first_line(error)
    return forms, missing


def run_sps(part: Part, sizes: Sizes) -> None:
    """Convolution on a sparse map beside a gather with one product of cuBLAS, and cuDNN on the dense map."""
    rates = known_rates(part.results)
    part.note(
        f"Inputs as in `benchmarks/sps.py`, 3 x 3. Bound: products, neighbours' rows through L2, memory of "
        f"{rates.source}; of the backward pass twice that. Other columns as for MSDA."
    )
    for channels in sizes.channels:
        for name, (dtype, tf32) in PRECISIONS.items():
            case = sps.Case(sizes.active, channels, 1, dtype, "cuda")
            bound = sps.bound(case, dtype, name, rates)
            row = part.table(f"{case.name}, {name}; bound {1e3 * bound:.1f} us", *COLUMNS)
            before = set_tf32(tf32)
            try:
                for form, functions in sps.FORMS.items():
                    if part.is_over(row, form):
                        continue
                    with part.attempt(f"{case.name}, {name}: {form}", row, form):
                        row(form, *cells(sps.measure(functions, case, "cuda", sizes.repeat), bound, 2 * bound))
            finally:
                set_tf32(before)


def cells(found: msda.Measurement | sps.Measurement, forward_bound: float, backward_bound: float) -> tuple[Cell, ...]:
    """A row of ``COLUMNS`` but its first; no part of a bound where the clock could not tell the backward pass."""
    backward = found.both - found.forward
    return (
        found.forward,
        100 * forward_bound / found.forward,
        backward,
        100 * backward_bound / backward if backward > 0 else None,
        found.forward_memory,
        found.both_memory,
        f"{found.error:.1e}",
    )


def run_deterministic(part: Part, sizes: Sizes) -> None:
    """Time and bits of backward passes, as usual and under ``torch.use_deterministic_algorithms``."""
    part.note(
        f"Both passes, medians of {sizes.repeat} runs of the device's own time. Bits: of all gradients, in three runs."
    )
    row = part.table("Backward passes", "operator", "usual ms", "bits", "deterministic ms", "bits ", "ratio")
    for name in ("fp32", "bf16"):
        dtype = PRECISIONS[name][0]
        for image, queries in ((sizes.images[0], None), (sizes.images[0], sizes.queries)):
            case = msda.Case(image, queries, sizes.batch)
            value, shapes, *sampling = case.make(dtype, "cuda")
            leaves = [tensor.requires_grad_() for tensor in (value, *sampling)]

            def attend(leaves: list[Tensor] = leaves, shapes: list[tuple[int, int]] = shapes) -> Tensor:
                return multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:])

            compare_modes(part, row, f"MSDA, {case.name}, {name}", attend, leaves, sizes.repeat)
        sparse = sps.Case(sizes.active, sizes.channels[0], 1, dtype, "cuda")
        leaves = [tensor.detach().requires_grad_() for tensor in (sparse.features, sparse.weight, sparse.bias)]

        def convolve(leaves: list[Tensor] = leaves, sparse: sps.Case = sparse) -> Tensor:
            return sparse_conv2d(leaves[0], sparse.index_map, sparse.cells, *leaves[1:], sparse.dilation)

        compare_modes(part, row, f"SPS, {sparse.name}, {name}", convolve, leaves, sizes.repeat)


def compare_modes(
    part: Part, row: Callable[..., None], name: str, forward: Callable[[], Tensor], leaves: list[Tensor], repeat: int
) -> None:
    """A row; it is a failure if the deterministic mode gives different bits, but none if it refuses."""
    found: list[Cell] = []
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help to find faults, which takes time
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            milliseconds, equal = time_and_bits(forward, leaves, repeat)
            found += [milliseconds, "equal" if equal else "differ"]
            if deterministic and not equal:
                part.fail(f"{name}: deterministic gradients", "differ from run to run")
        except RuntimeError as error:
            if "deterministic" not in str(error):
                part.fail(name, str(error))
            found += [None, f"refused: {first_line(error)}"]
        finally:
            torch.use_deterministic_algorithms(False)
    usual, deterministic_time = found[0], found[2]
    ratio = deterministic_time / usual if isinstance(usual, float) and isinstance(deterministic_time, float) else None
    row(name, *found, ratio)


def time_and_bits(forward: Callable[[], Tensor], leaves: list[Tensor], repeat: int) -> tuple[float, bool]:
    """Milliseconds of both passes, and whether three runs give the same gradients bit by bit."""
    grad_output = torch.randn_like(forward().detach())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, grad_output)

    first, *others = (gradients() for _ in range(3))
    equal = all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    return device_time(gradients, "cuda", repeat), equal
