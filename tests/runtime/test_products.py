from __future__ import annotations

import pytest
import torch

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.products import default_matmul, multiplying
from fpcn_dist.training.run import TrainingRun

SETTING = torch.backends.cuda.matmul


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_setting_lasts_for_a_block(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    was = SETTING.fp32_precision
    try:
        SETTING.fp32_precision = before
        with multiplying("high"):
            assert SETTING.fp32_precision == "tf32"
            with multiplying("highest"):
                assert SETTING.fp32_precision == "ieee"
        with pytest.raises(RuntimeError), multiplying("high"):
            raise RuntimeError
        assert SETTING.fp32_precision == before
    finally:
        SETTING.fp32_precision = was


@pytest.mark.parametrize(
    "precision, capability, expected",
    [("bf16", (8, 0), "high"), ("bf16", (7, 5), "highest"), ("fp32", (9, 0), "highest")],
)
def test_default_on_gpus(
    precision: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_matmul(precision, torch.device("cuda")) == expected
    assert default_matmul(precision, torch.device("cpu")) == "highest"


@pytest.mark.parametrize("matmul, expected", [(None, "ieee"), ("highest", "ieee"), ("high", "tf32")])
def test_a_training_step_multiplies_as_its_recipe_says(
    matmul: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step: forward, backward, update."""
    seen = []
    training = object.__new__(TrainingRun)
    training.recipe = Recipe().changed(**{"train.matmul": matmul})
    training.ranks = type("Ranks", (), {"device": torch.device("cpu"), "rank": 0})()
    monkeypatch.setattr(TrainingRun, "_train", lambda *arguments: seen.append(SETTING.fp32_precision))
    training.train(None, 0, 0.0)
    assert seen == [expected]
