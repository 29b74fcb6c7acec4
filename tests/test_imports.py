"""Who may import whom: the layers of the package, read from its sources."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every module or package right under dino_d2, in the order of the layers, with its third parties.
BASE = {name: {"torch"} for name in ("ops", "types", "box_ops", "errors", "processes", "transfer")}
BASE["files"] = set()
LAYERS = {"layers": {"torch"}}
STAGES = {
    "transformer": {"torch"},
    "heads": {"torch"},
    "losses": {"torch", "numpy", "scipy"},
    "co_heads": {"torch", "torchvision"},
    "postprocess": {"torch", "torchvision"},
    "preprocess": {"torch"},
    "backbones": {"torch", "torchvision", "timm"},
}
MODELS = {"models": {"torch"}}
RIM = {
    "checkpoint": {"torch", "numpy", "safetensors"},
    "data": {"torch", "numpy", "PIL", "pycocotools"},
    "diagnostics": {"torch", "numpy", "PIL", "matplotlib"},
    "model_zoo": set(),
}
TOOLS = {"tools": {"torch", "numpy", "PIL", "matplotlib", "safetensors"}}
DETECTRON2 = {"detectron2", "fvcore", "omegaconf", "yaml"}  # and its needs
ADAPTER = {"d2": {"torch", "numpy", "pycocotools", *DETECTRON2}}
INSIDE_FUNCTIONS = {"d2": {"cv2", "lvis"}, "tools": DETECTRON2, "model_zoo": DETECTRON2}

THIRD_PARTIES = {**BASE, **LAYERS, **STAGES, **MODELS, **RIM, **TOOLS, **ADAPTER}
NEIGHBOURS = {
    **{unit: {*BASE, "_C"} for unit in BASE},
    **{unit: {*BASE} for unit in LAYERS},
    **{unit: {*BASE, *LAYERS} for unit in STAGES},
    **{unit: {*BASE, *LAYERS, *STAGES} for unit in MODELS},
    **{unit: {*BASE, *LAYERS, *STAGES, *MODELS, *RIM} for unit in RIM},
    "data": {*BASE, *LAYERS, *STAGES, *MODELS},  # others at the rim build on it
    **{unit: {*THIRD_PARTIES, "__version__"} - {"d2"} for unit in TOOLS},
    **{unit: {*BASE, *LAYERS, *STAGES, *MODELS, *RIM} for unit in ADAPTER},
    "__init__": {"d2"},
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def sources(*folders, root=ROOT):
    return sorted(f for folder in folders for f in (root / folder).rglob("*.py"))


def imports(file, root):
    """(line, absolute dotted name, is inside a function) of everything that a file imports."""
    package = file.relative_to(root).parent.parts

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                origin = package[: len(package) + 1 - child.level] if child.level else ()
                origin = [*origin, *([child.module] if child.module else [])]
                for alias in child.names:
                    yield child.lineno, ".".join([*origin, alias.name]), inside
            elif isinstance(child, ast.Call) and "import_module" in ast.unparse(child.func):
                yield child.lineno, str(ast.literal_eval(child.args[0])), inside
            yield from visit(child, inside or isinstance(child, FUNCTIONS))

    return list(visit(ast.parse(file.read_text()), False))


def layer_violations(root):
    found = []
    for file in sources("dino_d2", root=root):
        unit = file.relative_to(root).with_suffix("").parts[1]
        for line, name, inside in imports(file, root):
            top, *rest = name.split(".")
            if top == "dino_d2":
                fine = not rest or rest[0] in NEIGHBOURS[unit] | {unit}
                fine &= bool(rest) or unit == "tools"
            else:
                fine = top in sys.stdlib_module_names or top in THIRD_PARTIES.get(unit, ())
                fine |= inside and top in INSIDE_FUNCTIONS.get(unit, ())
            if not fine:
                found.append(f"{file.relative_to(root)}:{line} imports {name}")
    return found


def test_layers():
    assert layer_violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "culprit"),
    [
        ("heads.py", "from .losses import focal", "dino_d2.losses.focal"),
        ("losses/matcher.py", "def f():\n  from .. import heads", "dino_d2.heads"),
        ("layers/mlp.py", "import numpy", "numpy"),
        ("models/dino.py", "from ..d2 import DINO", "dino_d2.d2.DINO"),
        ("models/dino.py", "import dino_d2", "dino_d2"),
        ("data/coco.py", "def f():\n  from detectron2.config import get_cfg", "detectron2.config"),
        ("data/writing.py", "from ..checkpoint.io import peek", "dino_d2.checkpoint.io.peek"),
        ("files.py", "import torch", "torch"),
        ("tools/demo.py", "from omegaconf import OmegaConf", "omegaconf.OmegaConf"),
        ("d2/data.py", "from ..tools import demo", "dino_d2.tools.demo"),
        ("ops/native.py", "importlib.import_module('dino_d2.layers')", "dino_d2.layers"),
    ],
)
def test_a_violation_is_found(tmp_path, file, code, culprit):
    source = tmp_path / "dino_d2" / file
    source.parent.mkdir(parents=True)
    source.write_text(code)
    (violation,) = layer_violations(tmp_path)
    assert violation.startswith(f"dino_d2/{file}:{len(code.splitlines())} imports {culprit}")


def test_every_unit_of_the_package_has_a_layer():
    package = ROOT / "dino_d2"
    units = {f.relative_to(package).with_suffix("").parts[0] for f in sources("dino_d2")}
    assert units - {"__init__"} <= set(THIRD_PARTIES)


def test_third_parties_are_declared_dependencies():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1]
    declared = {re.match(r"\w+", line)[0] for line in re.findall(r'"(.*)"', block)}
    used = set().union(*THIRD_PARTIES.values()) - DETECTRON2
    assert {"pillow" if name == "PIL" else name for name in used} == declared


def test_configs_import_no_other_project():
    found = []
    for file in [*sources("configs", "projects"), ROOT / "train_net.py"]:
        folder = file.relative_to(ROOT).parent.parts
        assert folder[:1] != ("projects",) or folder[2:] == ("configs",), "a project has no modules"
        for line, name, _ in imports(file, ROOT):
            parts = tuple(name.split("."))
            fine = parts[0] in {"dino_d2", "torch", *DETECTRON2, *sys.stdlib_module_names}
            fine |= parts[:2] == ("configs", "common") and folder != ()
            fine |= folder[:1] == ("projects",) and parts[:3] == folder
            if not fine:
                found.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert found == []


def test_forbidden_calls_and_modules():
    """Nothing chooses CUDA for the user, unpickles code, or needs pkg_resources, which is gone."""
    found = []
    for file in [*sources("dino_d2", "configs", "projects"), ROOT / "train_net.py"]:
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call):
                target = ast.unparse(call.func)
                safe = "weights_only=True" in map(ast.unparse, call.keywords)
                unsafe = re.search(r"\.cuda$|^pickle\.loads?$", target)
                if unsafe or (target == "torch.load" and not safe):
                    found.append(f"{file.relative_to(ROOT)}:{call.lineno} calls {target}")
        for line, name, _ in imports(file, ROOT):
            if re.match(r"pkg_resources|detectron2\.model_zoo|pickle\.", name):
                found.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert found == []


def test_native_sources_use_the_stable_headers_only():
    native = [file for file in (ROOT / "ops").rglob("*") if file.suffix in (".cpp", ".cu", ".h")]
    included = {name for f in native for name in re.findall(r"#include <(.*)>", f.read_text())}
    ours = {name for name in included if "/" in name}
    assert ours, "the pattern finds nothing"
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in ours)


IMPORT_ALL = """
import importlib, sys
for name in ("detectron2", "fvcore", "omegaconf"):
    sys.modules[name] = None  # to Python, not installed
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1, "imported")
"""


def run_python(*arguments, path=ROOT):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [path, ROOT]))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def test_all_but_the_adapter_imports_without_detectron2():
    files = [f.relative_to(ROOT).with_suffix("") for f in sources("dino_d2")]
    modules = [".".join(f.parts).removesuffix(".__init__") for f in files if f.parts[1] != "d2"]
    answer = run_python("-c", IMPORT_ALL, *modules)
    assert answer.stdout == f"{len(modules)} imported\n", answer.stderr


def test_a_broken_detectron2_is_a_warning(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise RuntimeError('libcudart is missing')")
    code = "import torch, dino_d2.models; print('works')"
    answer = run_python("-c", code, path=tmp_path)
    assert answer.stdout == "works\n", answer.stderr
    assert "its adapter is off: RuntimeError('libcudart is missing')" in answer.stderr
