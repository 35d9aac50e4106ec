"""Calls of all kernels, few and small, for compute-sanitizer: python -m gpu_parts.sanitized."""

import itertools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from querymask.common.ops import multi_scale_deformable_attention, sparse_conv2d

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def msda_calls() -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """(name, inputs, output) of MSDA: queries that are the tokens and others, widths with and without vectors."""
    shapes = [(9, 7), (4, 5), (1, 1)]
    tokens = sum(height * width for height, width in shapes)
    for dtype, channels, queries in itertools.product(TYPES, (32, 7), (tokens, 5)):
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        value = torch.randn(2, tokens, 3, channels, device="cuda").to(dtype).requires_grad_()
        sampled = (2, queries, 3, len(shapes), 4)
        locations = (1.6 * torch.rand(*sampled, 2, device="cuda") - 0.3).to(exact).requires_grad_()
        weights = torch.rand(sampled, device="cuda").to(dtype).requires_grad_()
        output = multi_scale_deformable_attention(value, shapes, locations, weights)
        yield f"MSDA, {dtype}, {channels} channels, {queries} queries", [value, locations, weights], output


def sps_calls() -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """(name, inputs, output) of SPS: with and without widths for tensor cores, cells at borders."""
    for dtype, (inputs, outputs), dilation in itertools.product(TYPES, ((32, 32), (7, 5)), (1, 3)):
        features = torch.randn(50, inputs, device="cuda").to(dtype).requires_grad_()
        index_map = torch.randint(50, (2, 9, 11), device="cuda", dtype=torch.int32)
        cells = torch.stack([torch.randint(side, (75,), device="cuda", dtype=torch.int32) for side in (2, 9, 11)], 1)
        weight = torch.randn(outputs, inputs, 3, 3, device="cuda").to(dtype).requires_grad_()
        bias = torch.randn(outputs, device="cuda").to(dtype).requires_grad_()
        output = sparse_conv2d(features, index_map, cells, weight, bias, dilation)
        yield f"SPS, {dtype}, {inputs} to {outputs}, dilation {dilation}", [features, weight, bias], output


def main() -> int:
    """Make all calls, forward and backward; returns how many."""
    count = 0
    for name, inputs, output in itertools.chain(msda_calls(), sps_calls()):
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        torch.cuda.synchronize()
        print(f"done: {name}", flush=True)
        count += 1
    return count


if __name__ == "__main__":
    main()
    os._exit(0)  # the end of autograd's threads aborts the process under memcheck; main has waited for all kernels
