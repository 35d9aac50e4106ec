"""The deformable transformer: padding, refinement, two stages, checkpointing, compilation, initialisation."""

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy.special import logit
from torch import nn

from querymask.common.deformable_attention import DeformableAttention
from querymask.common.deformable_transformer import (
    DeformableTransformer,
    EncoderLayer,
    TransformerOutput,
    proposal_boxes,
    refine_box,
)
from querymask.common.layers import recompute_layers

WIDTH, QUERIES, CLASSES = 32, 5, 3
SHAPES = ((8, 10), (4, 5), (2, 3))  # of the padded batch
VALID = ((5, 7), (3, 4), (2, 2))  # of its first image


def make_transformer(num_proposals: int = 0, **overrides: object) -> DeformableTransformer:
    """In float64, evaluation mode, with weights that leave no term negligible."""
    torch.manual_seed(0)
    arguments = {"enc_layers": 2, "dec_layers": 2, "dim_feedforward": 24, "num_levels": 3, "enc_points": 2, **overrides}
    transformer = DeformableTransformer(WIDTH, num_heads=4, dec_points=3, num_proposals=num_proposals, **arguments)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 1:  # biases, and the weights of norms, which are 1
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=0.3)
    return transformer.double().eval()


class Heads(nn.Module):
    """What a detector gives to the transformer: queries, refinement and heads of the proposals."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(QUERIES, 2 * WIDTH))
        self.deltas = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))
        self.proposal_class = nn.Linear(WIDTH, CLASSES)
        self.proposal_box = nn.Linear(WIDTH, 4)
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.double()

    def refine(self, layer: int, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return refine_box(self.deltas[layer](hidden), reference)

    def run(
        self,
        transformer: DeformableTransformer,
        levels: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        refine: bool = True,
        padded: bool = True,
    ) -> TransformerOutput:
        return transformer(
            levels,
            masks,
            None if transformer.num_proposals else self.queries,
            refine=self.refine if refine else None,
            proposal_heads=(self.proposal_class, self.proposal_box),
            padded=padded,
        )


def pyramids() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Levels and masks of an image alone; and of a batch of it, garbage on its padding, with a full-sized image."""
    generator = torch.Generator().manual_seed(2)
    alone, batch, no_padding, padding = [], [], [], []
    for (height, width), (h, w) in zip(SHAPES, VALID, strict=True):
        level = torch.randn(2, WIDTH, height, width, dtype=torch.float64, generator=generator) * 3
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[0, h:] = mask[0, :, w:] = True
        alone.append(level[:1, :, :h, :w])
        batch.append(level)
        no_padding.append(mask[:1, :h, :w])
        padding.append(mask)
    return alone, no_padding, batch, padding


def valid_tokens(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Indices of the first image's tokens that are not padding."""
    return (~torch.cat([mask[0].flatten() for mask in masks])).nonzero().flatten()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.shape == expected.shape, name
    assert torch.allclose(actual, expected, rtol=0, atol=1e-11), f"{name}: off by {(actual - expected).abs().max()}"


@pytest.mark.parametrize("num_proposals", [0, 2])
@pytest.mark.parametrize("refine", [True, False])
def test_padding_changes_nothing(num_proposals: int, refine: bool) -> None:
    """Given equal levels, an image alone and the image in a padded batch agree in every output, to rounding.

    All of the transformer is exact: values on padding are zero like what lies outside of a map, positions are relative
    to the valid part, offsets count in cells or relative to a box. Memory on padding itself means nothing. The
    two-stage form scores padded tokens, too, all alike: it is exact as long as they are not among the best.
    """
    transformer, heads = make_transformer(num_proposals), Heads()
    alone, no_padding, batch, padding = pyramids()
    with torch.no_grad():
        expected = heads.run(transformer, alone, no_padding, refine)
        actual = heads.run(transformer, batch, padding, refine)
    tokens = valid_tokens(padding)
    assert_same(actual.memory[:1, tokens], expected.memory, "memory")
    assert (actual.memory[0].std(0) > 0.1).all(), "memory must depend on the token"
    if num_proposals:
        best = actual.proposals.logits[0, :, 0].topk(num_proposals).indices
        assert torch.isin(best, tokens).all(), "padded tokens are among the best: choose another seed"
        assert_same(actual.proposals.logits[:1, tokens], expected.proposals.logits, "logits of proposals")
        assert_same(actual.proposals.boxes[:1, tokens], expected.proposals.boxes, "boxes of proposals")
    assert_same(actual.hidden[:, :1], expected.hidden, "hidden")
    for layer, reference in enumerate(expected.references):
        assert_same(actual.references[layer][:1], reference, f"reference {layer}")
    if refine:
        assert_same(actual.boxes[:, :1], expected.boxes, "boxes")
    else:
        assert actual.boxes is None


@pytest.mark.parametrize("num_proposals", [0, 4])
def test_no_masking_where_nothing_is_padded(num_proposals: int) -> None:
    transformer, heads = make_transformer(num_proposals), Heads()
    alone, no_padding, _, _ = pyramids()
    results = []
    for padded in (True, False):
        transformer.zero_grad()
        output = heads.run(transformer, alone, no_padding, padded=padded)
        output.hidden.square().sum().backward()
        gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
        results.append((output, copy.deepcopy(gradients)))
    (masked, masked_gradients), (plain, plain_gradients) = results
    for name in ("memory", "hidden", "boxes"):
        assert torch.equal(getattr(masked, name), getattr(plain, name)), name
    assert masked_gradients.keys() == plain_gradients.keys()
    for name, gradient in masked_gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name


def test_checkpointing_gives_the_same_gradients() -> None:
    """With dropout, whose random numbers the second pass must repeat."""
    heads = Heads()
    _, _, batch, padding = pyramids()
    results = []
    for use_checkpoint in (False, True):
        transformer = make_transformer(dropout=0.3).train()
        if use_checkpoint:
            recompute_layers(transformer)
        calls = []
        transformer.encoder.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        inputs = [level.clone().requires_grad_() for level in batch]
        torch.manual_seed(3)
        output = heads.run(transformer, inputs, padding)
        output.hidden.square().sum().backward()
        assert len(calls) == 1 + use_checkpoint, "the layer must run again in the backward pass, and only then"
        gradients = {name: p.grad for name, p in transformer.named_parameters()}
        results.append((output.hidden, gradients, [level.grad for level in inputs]))
    (hidden, gradients, levels), (again, gradients_again, levels_again) = results
    assert torch.equal(hidden, again)
    assert any(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert all(torch.equal(a, b) for a, b in zip(levels, levels_again, strict=True))


def test_dropout_in_training_only() -> None:
    transformer, heads = make_transformer(dropout=0.3), Heads()
    alone, no_padding, _, _ = pyramids()

    def hidden() -> torch.Tensor:
        return heads.run(transformer, alone, no_padding).hidden

    assert torch.equal(hidden(), hidden())
    transformer.train()
    assert not torch.allclose(hidden(), hidden())


def run_with_deltas(transformer: DeformableTransformer, deltas: Sequence[torch.Tensor]) -> TransformerOutput:
    heads = Heads()
    alone, no_padding, _, _ = pyramids()
    return transformer(
        alone, no_padding, heads.queries, refine=lambda layer, _, reference: refine_box(deltas[layer], reference)
    )


def test_references_are_refined_without_gradient() -> None:
    """A layer's box reaches its own delta only, and in the first layer the initial reference."""
    transformer = make_transformer()
    deltas = [torch.randn(1, QUERIES, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    output = run_with_deltas(transformer, deltas)
    assert [tuple(reference.shape) for reference in output.references] == [(1, QUERIES, c) for c in (2, 4, 4)]
    assert [reference.requires_grad for reference in output.references] == [True, False, False]
    for layer in range(2):
        assert torch.equal(output.references[layer + 1], output.boxes[layer])
        expected = (deltas[layer] + pad_logit(output.references[layer].detach())).sigmoid()
        assert_same(output.boxes[layer], expected, f"boxes of layer {layer}")
        leaves = [*deltas, transformer.reference_points.weight]
        gradients = torch.autograd.grad(output.boxes[layer].sum(), leaves, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == [layer == 0, layer == 1, layer == 0]


def pad_logit(reference: torch.Tensor) -> torch.Tensor:
    """Logit of (..., 2 or 4), with zeros for width and height of a point."""
    return torch.cat(
        (torch.from_numpy(logit(reference.numpy())), torch.zeros(*reference.shape[:-1], 4 - reference.shape[-1])),
        dim=-1,
    )


@pytest.mark.parametrize("coordinates", [2, 4])
def test_refine_box(coordinates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    reference = torch.rand(3, coordinates, generator=generator, dtype=torch.float64)
    assert_same(refine_box(delta, reference), (delta + pad_logit(reference)).sigmoid(), "box")


def test_proposal_boxes() -> None:
    """At the centres of the cells relative to the valid part, with sides 0.05 * 2^level; usable within (0.01, 0.99)."""
    masks = []
    for height, width, (h, w) in ((60, 4, (55, 3)), (2, 3, (2, 3)), *[(1, 1, (1, 1))] * 4):
        mask = torch.ones(1, height, width, dtype=torch.bool)
        mask[:, :h, :w] = False
        masks.append(mask)
    boxes, usable = proposal_boxes(masks, tuple((m.shape[1], m.shape[2]) for m in masks), torch.float64)
    expected, expected_usable = [], []
    for level, mask in enumerate(masks):
        valid_height, valid_width = (~mask[0]).any(1).sum().item(), (~mask[0]).any(0).sum().item()
        for i in range(mask.shape[1]):
            for j in range(mask.shape[2]):
                side = 0.05 * 2**level
                box = [(j + 0.5) / valid_width, (i + 0.5) / valid_height, side, side]
                expected.append(box)
                expected_usable.append(all(0.01 < c < 0.99 for c in box) and not mask[0, i, j])
    assert_same(boxes[0], torch.tensor(expected, dtype=torch.float64), "boxes")
    assert usable[0, :, 0].tolist() == expected_usable
    assert not usable[0, 0], "the first of 55 rows is too near to the border"
    assert not usable[0, -1], "a side of 0.05 * 2^5 is larger than the image"


def slow_proposals(
    transformer: DeformableTransformer,
    heads: Heads,
    memory: torch.Tensor,
    masks: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Two-stage form, token by token, for one image's memory (S, C) and masks (H_l, W_l).

    Returns:
        logits (S, K) and boxes (S, 4) of all tokens; content, position and reference of the queries, best first.
    """

    def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * layer.weight + layer.bias

    logits, boxes = [], []
    for level, mask in enumerate(masks):
        height, width = mask.shape
        rows, columns = (~mask[:, 0]).sum().item(), (~mask[0]).sum().item()
        for i in range(height):
            for j in range(width):
                prior = [(j + 0.5) / columns, (i + 0.5) / rows, 0.05 * 2**level, 0.05 * 2**level]
                usable = not mask[i, j] and all(0.01 < c < 0.99 for c in prior)
                token = memory[len(logits)] if usable else torch.zeros(WIDTH, dtype=torch.float64)
                output = transformer.enc_output.weight @ token + transformer.enc_output.bias
                output = norm(output, transformer.enc_output_norm)
                logits.append(heads.proposal_class.weight @ output + heads.proposal_class.bias)
                delta = heads.proposal_box.weight @ output + heads.proposal_box.bias
                box = [1.0] * 4
                if usable:
                    box = [1 / (1 + math.exp(-d - math.log(c / (1 - c)))) for d, c in zip(delta.tolist(), prior)]
                boxes.append(torch.tensor(box, dtype=torch.float64))
    ranking = sorted(range(len(logits)), key=lambda s: -logits[s][0].item())
    content, position, reference = [], [], []
    for s in ranking[: transformer.num_proposals]:
        encoding = []
        for coordinate in boxes[s].tolist():
            for c in range(WIDTH // 2):
                angle = coordinate * 2 * math.pi / 10000 ** (2 * (c // 2) / (WIDTH // 2))
                encoding.append(math.sin(angle) if c % 2 == 0 else math.cos(angle))
        encoding = torch.tensor(encoding, dtype=torch.float64)
        both = norm(transformer.pos_trans.weight @ encoding + transformer.pos_trans.bias, transformer.pos_trans_norm)
        position.append(both[:WIDTH])
        content.append(both[WIDTH:])
        reference.append(boxes[s])
    return tuple(torch.stack(values) for values in (logits, boxes, content, position, reference))


@pytest.mark.parametrize("num_proposals", [6, 1000])
def test_two_stage(num_proposals: int) -> None:
    """Also where there are fewer tokens than proposals wanted, so that there are as many queries as tokens."""
    transformer, heads = make_transformer(num_proposals), Heads()
    _, _, batch, padding = pyramids()
    seen: list[tuple[torch.Tensor, ...]] = []
    transformer.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    with torch.no_grad():
        output = heads.run(transformer, batch, padding)
        count = sum(height * width for height, width in SHAPES)
        assert output.hidden.shape == (2, 2, min(num_proposals, count), WIDTH)
        for b in range(2):
            expected = slow_proposals(transformer, heads, output.memory[b], [mask[b] for mask in padding])
            assert_same(output.proposals.logits[b], expected[0], "logits")
            assert_same(output.proposals.boxes[b], expected[1], "boxes")
            for actual, value, name in zip(
                seen[0][:3], expected[2:], ("content", "position", "reference"), strict=True
            ):
                assert_same(actual[b], value, name)
    assert output.boxes.shape[-1] == output.references[0].shape[-1] == 4


def test_gradient_of_two_stages() -> None:
    """Queries are made of detached boxes: hidden states do not reach the heads of the proposals."""
    transformer, heads = make_transformer(6), Heads()
    _, _, batch, padding = pyramids()
    output = heads.run(transformer, batch, padding)
    proposal_heads = [*heads.proposal_class.parameters(), *heads.proposal_box.parameters()]
    reached = torch.autograd.grad(output.hidden.sum(), proposal_heads, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in reached)
    own = torch.autograd.grad(output.proposals.logits.sum() + output.proposals.boxes.sum(), proposal_heads)
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in own)


def test_missing_arguments() -> None:
    alone, no_padding, _, _ = pyramids()
    with pytest.raises(ValueError, match="one-stage form needs query_embed"):
        make_transformer()(alone, no_padding)
    with pytest.raises(ValueError, match="two-stage form needs proposal_heads"):
        make_transformer(4)(alone, no_padding)
    with pytest.raises(ValueError, match="width 30 must be a multiple of 4"):
        DeformableTransformer(30, num_heads=5)


@pytest.mark.parametrize("num_proposals", [0, 4])
def test_initialisation(num_proposals: int) -> None:
    """Xavier for every matrix but those of deformable attention that start at zero."""
    torch.manual_seed(0)
    transformer = DeformableTransformer(64, 8, 1, 2, 96, num_levels=4, num_proposals=num_proposals)
    zero = [
        f"{name}.{kind}.weight"
        for name, module in transformer.named_modules()
        if isinstance(module, DeformableAttention)
        for kind in ("sampling_offsets", "attention_weights")
    ]
    assert len(zero) == 6
    for name, parameter in transformer.named_parameters():
        if name == "level_embed":
            assert parameter.shape == (4, 64)
            assert parameter.std().item() == pytest.approx(1, abs=0.15) and abs(parameter.mean().item()) < 0.2
        elif name in zero:
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
        elif "linear" in name:  # a feed-forward network keeps PyTorch's biases
            fan_in = 64 if "linear1" in name else 96
            assert 0.8 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5, name
        elif "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
    assert hasattr(transformer, "reference_points") == (not num_proposals)
    if not num_proposals:
        assert not transformer.reference_points.bias.any()


def test_encoder_layer_compiles() -> None:
    """As one graph, with the gradients of eager execution; what it leaves behind is usable outside of the graph."""
    torch.manual_seed(0)
    layer = EncoderLayer(WIDTH, 24, dropout=0.0, num_heads=4, num_levels=2, num_points=2)
    compiled: Callable[..., torch.Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = ((7, 6), (4, 3))  # met by no other test
    x, position = torch.randn(2, 2, 54, WIDTH)
    reference = torch.rand(2, 54, 2, 2)
    results = []
    for function in (compiled, layer):
        value = x.clone().requires_grad_()
        layer.zero_grad()
        output = function(value, position, reference, shapes, torch.rand(2, 54) < 0)
        output.square().sum().backward()
        results.append((output, value.grad, *(p.grad.clone() for p in layer.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
