"""The table at the end of a run."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate

TASK_NAMES = {"bbox": "box", "segm": "mask", "boundary": "boundary", "segm_lvis": "mask*", "boundary_lvis": "boundary*"}
TASK_NAMES |= {"panoptic_seg": "segments", "panoptic_boundary": "boundaries of segments"}
"""How tasks are called in tables; with a star: against LVIS's annotations."""
PANOPTIC_NAMES = {"panoptic_seg": "", "panoptic_boundary": "boundary "}
"""Tasks of panoptic quality, and what their metrics are called by in tables."""


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """AP of boxes, masks and boundaries side by side, overall and by class, as text; or panoptic quality.

    Args:
        results: {"bbox": {"AP": 12.3, ..., "AP-circle": 4.5, ...}, "segm": ...} as Detectron2's evaluators give it; or
            {"panoptic_seg": {"PQ": 12.3, ..., "PQ_th": 4.5, ..., "PQ-sky": 6.7, ...}}.

    Returns:
        Two tables; the second one (by class) is left out where there are no class results. Empty for no results.
    """
    results = {task: scores for task, scores in results.items() if isinstance(scores, Mapping)}
    if not results:
        return ""
    if set(results) <= set(PANOPTIC_NAMES):
        return _panoptic_table(results)
    metrics = list(dict.fromkeys(name for scores in results.values() for name in scores if "-" not in name))
    rows = [["", *metrics]]
    rows += [[TASK_NAMES.get(task, task), *(_show(scores, m) for m in metrics)] for task, scores in results.items()]
    text = _align(rows)
    classes = list(dict.fromkeys(n for scores in results.values() for n in scores if n.startswith("AP-")))
    if classes:
        rows = [["class", *(f"{TASK_NAMES.get(task, task)} AP" for task in results)]]
        rows += [[name.removeprefix("AP-"), *(_show(s, name) for s in results.values())] for name in classes]
        text += "\n\n" + _align(rows)
    return text


def _panoptic_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """PQ, SQ and RQ over all classes, things and stuff, and of each class."""
    metrics = ("PQ", "SQ", "RQ")
    columns = [(scores, m, f"{PANOPTIC_NAMES[task]}{m}") for task, scores in results.items() for m in metrics]
    rows = [["", *(name for *_, name in columns)]]
    for title, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        rows.append([title, *(_show(scores, metric + suffix) for scores, metric, _ in columns)])
    text = _align(rows)
    classes = [name.removeprefix("PQ-") for name in next(iter(results.values())) if name.startswith("PQ-")]
    if classes:
        rows = [["class", *(name for *_, name in columns)]]
        rows += [[name, *(_show(scores, f"{metric}-{name}") for scores, metric, _ in columns)] for name in classes]
        text += "\n\n" + _align(rows)
    return text


def _show(scores: Mapping[str, float], metric: str) -> str:
    return f"{scores[metric]:.2f}" if metric in scores else "-"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first one flush left, numbers flush right."""
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colglobalalign="right", colalign=("left",))
