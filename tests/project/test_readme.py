"""The Python of the README and the guides runs as it stands, on a smaller world."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import TESTS

ROOT = TESTS.parent
README = ROOT / "README.md"
# The README's examples come first: the guides' go on from them.
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def examples() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(
        r"<!-- run by tests/project/test_readme.py -->\n```python\n(.*?)```", text, re.S
    )
    assert len(found) == 3, "the guides have lost an example"
    return found


def test_the_first_example_fits_in_twelve_lines() -> None:
    assert len(examples()[0].strip().splitlines()) <= 12
    assert examples()[0].index("pipe(") < examples()[0].index("train(")


def test_the_doors_stay_short() -> None:
    """What is longer belongs into a guide."""
    for page, most in ((README, 150), (ROOT / "CONTRIBUTING.md", 120)):
        assert len(page.read_text(encoding="utf-8").splitlines()) <= most, page.name


def test_the_readme_leads_to_every_guide() -> None:
    linked = re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text(encoding="utf-8"))
    guides = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))
    assert sorted(set(linked)) == guides


def test_the_examples_run(tmp_path: Path) -> None:
    import soundfile

    code = "\n".join(examples())
    few_steps = '={table}", "training.max_steps=3"]'
    for given, smaller in (("clips=400", "clips=12"), ('={table}"]', few_steps)):
        assert given in code
        code = code.replace(given, smaller)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for name, seconds in (("bell.wav", 2), ("0.wav", 2), ("1.wav", 4), ("2.wav", 2)):
        wave, rate = soundfile.read(tmp_path / name)
        assert (len(wave), rate) == (8000 * seconds, 8000)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_and_heading_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", there.read_text(encoding="utf-8"))
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


def test_every_test_that_the_docs_name_exists() -> None:
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    named, file = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text), ""
    assert len(named) > 20
    for there, test in named:
        file = there or file
        assert f"def {test}(" in files[file].read_text(encoding="utf-8"), f"{file}::{test}"
