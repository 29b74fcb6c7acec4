"""What the documents promise."""

import re
from pathlib import Path

import pytest

from dino_d2 import model_zoo

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("projects/*/*.md"),
    ]
)
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.detectron2
def test_yacs_example():
    (block,) = [block for block in BLOCKS if "detectron2" in block]
    names: dict = {}
    exec(block, names)
    assert type(names["model"]).__name__ == "DINO"


def test_plain_example(capsys):
    (block,) = [block for block in BLOCKS if "detectron2" not in block]
    exec(block, {})
    assert "[1, 100, 4]" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_files_and_configs_that_exist(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link
    for config in re.findall(r"\bdino/dino_\w+", text):
        assert config in model_zoo.list_configs()


def test_project_lists_every_config():
    for name in model_zoo.list_configs():
        project, stem = name.split("/")
        assert f"`{stem}`" in (ROOT / "projects" / project / "README.md").read_text()
