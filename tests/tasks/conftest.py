"""Verdicts are what is tested here, not how fast they come: coverage makes the workers several times slower."""

import pytest


@pytest.fixture(autouse=True)
def unhurried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """More CPU time for an answer than a run allows, except where the limit itself is the matter."""
    if request.module.__name__.rpartition(".")[2] not in ("test_hostile", "test_verifier_properties"):
        monkeypatch.setattr("r1zero.tasks.verifier.CPU_SECONDS", 1.5)
