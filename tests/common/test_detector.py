"""Selection of detections against sorting in Python."""

import torch

from querymask.common.detector import select_top_scores


def test_select_top_scores() -> None:
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    best, queries, classes = select_top_scores(scores, 12)
    pairs = sorted(((scores[q, c].item(), q, c) for q in range(6) for c in range(5)), reverse=True)[:12]
    assert list(zip(best.tolist(), queries.tolist(), classes.tolist(), strict=True)) == pairs
    assert len(set(queries.tolist())) < 12, "a query must be able to appear with several classes"


def test_fewer_pairs_than_asked_for() -> None:
    scores = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    best, queries, classes = select_top_scores(scores, 100)
    assert sorted(zip(queries.tolist(), classes.tolist(), strict=True)) == [(q, c) for q in range(3) for c in range(2)]
    assert (best.diff() <= 0).all()
    assert all(len(result) == 0 for result in select_top_scores(scores[:0], 100))
