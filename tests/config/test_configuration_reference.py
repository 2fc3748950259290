"""The reference of the configuration keys says what the dataclasses say, and of every key."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.paths import ROOT

from tools.configuration import reference, sections, texts

PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_what_the_generator_prints() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == reference(), "run: python -m tools.configuration > docs/configuration.md"


@pytest.mark.parametrize("value", [v for _, v in sections()], ids=[n for n, _ in sections()])
def test_every_key_has_a_line_and_every_line_a_key(value: Any) -> None:
    keys = [field.name for field in dataclasses.fields(value)]
    assert list(texts(type(value))) == keys, type(value).__name__
