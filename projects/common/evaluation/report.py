"""The table at the end of a run."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate

TASK_NAMES = {"bbox": "box", "segm": "mask", "boundary": "boundary", "segm_lvis": "mask*", "boundary_lvis": "boundary*"}
"""How tasks are called in tables; with a star: against LVIS's annotations."""


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """AP of boxes, masks and boundaries side by side, overall and by class, as text.

    Args:
        results: {"bbox": {"AP": 12.3, ..., "AP-circle": 4.5, ...}, "segm": ...} as Detectron2's evaluators give it.

    Returns:
        Two tables; the second one (by class) is left out where there are no class results. Empty for no results.
    """
    results = {task: scores for task, scores in results.items() if isinstance(scores, Mapping)}
    if not results:
        return ""
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


def _show(scores: Mapping[str, float], metric: str) -> str:
    return f"{scores[metric]:.2f}" if metric in scores else "-"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first one flush left, numbers flush right."""
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colglobalalign="right", colalign=("left",))
