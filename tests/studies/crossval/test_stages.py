"""A backbone in two pieces is the same function as in one."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.models import build_backbone
from fpcn_dist.models.modes import evaluating
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.crossval.stages import split_last_stage


@pytest.mark.parametrize(
    ("name", "share"), [("mobilenet_v2", 0.69), ("tf_efficientnet_lite0", 0.73), ("resnet18", 0.42)]
)
def test_the_last_stage_follows_what_comes_before_it(name: str, share: float) -> None:
    backbone = build_backbone(name)
    before, stage = split_last_stage(backbone, 64)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), evaluating(backbone):
        maps = before(images)
        torch.testing.assert_close(stage(maps), backbone(images), atol=1e-5, rtol=1e-5)
        assert maps.shape[-1] == stage(maps).shape[-1] == 2
    weights = [sum(p.numel() for p in part.parameters()) for part in (stage, backbone)]
    assert weights[0] / weights[1] == pytest.approx(share, abs=0.01)


def test_a_network_of_another_make_is_refused() -> None:
    with pytest.raises(UserError, match=r"--networks .* its layers do not follow one another"):
        split_last_stage(build_backbone("test_resnet"), 160)
