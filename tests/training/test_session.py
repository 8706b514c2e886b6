"""The order in which a trainer process ends."""

from pathlib import Path

import pytest
from accelerate import PartialState

from r1zero import recipe as recipes
from r1zero.reporting import trackers
from r1zero.training.session import session
from tests.conftest import PROJECT
from tests.training.conftest import one_process, write_recipe


@pytest.mark.parametrize("fails", [False, True])
def test_what_takes_long_is_over_before_the_others_hear_of_a_failure(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They then end, which ends this process: it would not come to say its own error."""
    ended: list[str] = []
    monkeypatch.setattr(trackers.WandbRun, "start", lambda *_: None)
    monkeypatch.setattr(trackers.WandbRun, "record", lambda *_: None)
    monkeypatch.setattr(trackers.WandbRun, "finish", lambda *_: ended.append("tracker"))
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_: ended.append("process group"))
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").write_text("{}")
    recipe = recipes.load(write_recipe(tmp_path / "recipe.yaml", tmp_path, tmp_path, report_to="wandb"), [])
    with one_process():
        if fails:
            with pytest.raises(ValueError, match="its own"), session(recipe, tmp_path / "run", PROJECT):
                raise ValueError("its own")
        else:
            with session(recipe, tmp_path / "run", PROJECT):
                pass
    assert ended == (["tracker", "process group"] if fails else ["process group", "tracker"])
