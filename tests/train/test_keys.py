"""The page of config keys is what the code says, and lacks none."""

from dataclasses import fields
from pathlib import Path

import pytest

from zeroi2v.train import keys

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_fresh():
    assert PAGE.read_text() == keys.page(), "python -m zeroi2v.train.keys > docs/config.md"


@pytest.mark.parametrize("section", keys.SECTIONS)
def test_every_field_is_there_with_its_meaning(section):
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    for field in fields(keys.SECTIONS[section][0]):
        line = next(x for x in text.splitlines() if x.startswith(f"- `{section}.{field.name}` ("))
        assert len(line.split("): ")[1]) > 10


def test_defaults_are_as_yaml_has_them():
    text = PAGE.read_text()
    assert "- `model.num_classes` (`int | null`, default `null`): " in text
    assert "- `optim.lr` (`float`, default `0.0003`): " in text
    assert "- `data.train_list` (`str`, required): " in text
    assert "- `optim.offload` (`bool`, default `false`): " in text
