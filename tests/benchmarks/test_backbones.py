"""The table of docs/backbones.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import backbones


def test_a_page_gets_its_table_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- python -m benchmarks backbones -->\nold\n<!-- end -->\n\nafter\n")
    monkeypatch.setattr("sys.argv", ["backbones", "visformer", "--docs", str(page)])
    backbones.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\n\nafter\n") and "old" not in text
    assert "| visformer | `visformer_tiny` | 9.9 | 384 x 7 x 7 | no |" in text
    assert "visformer_tiny" in capsys.readouterr().out


def test_of_several_networks_the_smallest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["test_vit", "vit_base_patch16_224", "vit_small_patch32_224", "vit_tiny_patch16_224"]
    monkeypatch.setattr(backbones.timm, "list_models", lambda module: names)
    assert backbones.smallest("vision_transformer")[0] == "vit_tiny_patch16_224"
