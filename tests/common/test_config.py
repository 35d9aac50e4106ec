"""Old keys are refused with the name of the new one, in config files and on the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from querymask import get_cfg
from querymask.common.engine.unused_keys import leaves
from querymask.effseg.config import RENAMED as EFFSEG
from querymask.isda.config import RENAMED as ISDA
from querymask.istr.config import RENAMED as ISTR
from querymask.solq.config import RENAMED as SOLQ

RENAMED = {
    old: (new, "") if isinstance(new, str) else new
    for table in (SOLQ, ISDA, ISTR, EFFSEG)
    for old, new in table.items()
}
VALUES = {"MODEL.SOLQ.MASK_ON": "False is NAME none", "MODEL.EFFSEG.MASK_HEAD": "pointrend PointRendBranch"}


def test_every_old_key_is_gone_and_its_new_one_is_there() -> None:
    keys = dict(leaves(get_cfg()))
    assert not set(RENAMED) & set(keys)
    assert {new for new, _ in RENAMED.values()} <= set(keys)


@pytest.mark.parametrize("key", RENAMED)
def test_old_key_in_a_file(key: str, tmp_path: Path) -> None:
    """As a whole config is written: in sections, beside keys that are still there."""
    method, name = key.split(".")[1:]
    path = tmp_path / "config.yaml"
    path.write_text(f"MODEL:\n  {method}:\n    NUM_QUERIES: 7\n    {name}: 1\n")
    check(lambda cfg: cfg.merge_from_file(str(path)), key)


@pytest.mark.parametrize("key", RENAMED)
def test_old_key_on_the_command_line(key: str) -> None:
    check(lambda cfg: cfg.merge_from_list(["SEED", "3", key, "1"]), key)
    check(lambda cfg: cfg.clone().merge_from_list([key, "1"]), key)


def check(merge: Callable[[CfgNode], None], key: str) -> None:
    new, values = RENAMED[key]
    with pytest.raises(KeyError) as error:
        merge(get_cfg())
    message = str(error.value)
    assert key in message and f"renamed to {new};" in message and values in message
    assert VALUES.get(key, "") in message


def test_key_that_went_is_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Configs that runs have written hold it."""
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.MASK_RESIZE", "any"])
    assert "MASK_RESIZE" not in cfg.INPUT
    assert "Deprecated config key (ignoring): INPUT.MASK_RESIZE" in caplog.text
