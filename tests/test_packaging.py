"""The package as it is built, shipped and installed; and the build where something is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from dino_d2 import __version__, model_zoo

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.py", "train_net.py")
FOLDERS = ("configs", "dino_d2", "ops", "projects")
NO_TORCH = "PyTorch was missing; install it first, or try --no-build-isolation"
OURS = ("DINO_D2_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX")


# An editable install's finder would answer for what the package under test lacks.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "dino_d2" not in getattr(f, "__module__", "")]
"""


def run_python(*arguments, cwd, path="", **environment):
    """The answer of another interpreter in a clean environment; fails with its error output."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS and k != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(path), "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer


def copy_sources(target):
    target.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def pip_install(package, target, **environment):
    options = ("--no-deps", "--no-build-isolation", "--target", target)
    run_python("-m", "pip", "install", *options, package, cwd=target.parent, **environment)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_sources(folder / "source")
    built = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = source / "build" / built / "dino_d2" / "gone.py"  # left by an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    options = ("--no-deps", "--no-build-isolation", "-w", folder)
    run_python("-m", "pip", "wheel", *options, ".", cwd=source, DINO_D2_CUDA="0")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    return pip_install(wheel, wheel.parent / "site")


@pytest.mark.compiled
def test_wheel_carries_all(wheel):
    assert re.fullmatch(rf"dino_d2-{__version__}-cp310-abi3-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {str(f.relative_to(ROOT)) for f in (ROOT / "dino_d2").rglob("*.py")}
    zoo = [ROOT / "train_net.py", *(f for d in ("configs", "projects") for f in files(ROOT / d))]
    expected = python | {f"dino_d2/zoo/{f.relative_to(ROOT)}" for f in zoo}
    expected |= {"dino_d2/_C.abi3.so", "dino_d2/_build.json"}
    assert {name for name in names if ".dist-info/" not in name} == expected


def files(folder):
    return [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]


INSPECT = """
import json, sys
sys.modules["detectron2"] = None  # slow to import
import dino_d2
from dino_d2 import model_zoo
from dino_d2.ops import load_native
configs = model_zoo.list_configs()
print(json.dumps([dino_d2.__file__, str(model_zoo.root()), configs, load_native()]))
"""


@pytest.mark.compiled
def test_installed_package_in_an_empty_directory(installed, tmp_path):
    answer = run_python("-c", ALONE + INSPECT, cwd=tmp_path, path=installed)
    file, root, configs, (loaded, cuda, _, record) = json.loads(answer.stdout)
    assert Path(file).parent == installed / "dino_d2"
    assert Path(root) == installed / "dino_d2" / "zoo"
    assert configs == model_zoo.list_configs()
    assert (loaded, cuda) == (True, False)
    assert record.pop("compiler")
    assert record == {
        "reason": "",
        "torch": torch.__version__,
        "cuda": "",
        "cuda_reason": "DINO_D2_CUDA=0 forbade CUDA",
    }


LOAD_ALL = """
import runpy
from dino_d2 import model_zoo
for name in model_zoo.list_configs():
    cfg = model_zoo.get_config(name)
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(cfg), name
script = runpy.run_path(str(model_zoo.root() / "train_net.py"), run_name="script")
print(script["model_zoo"].__file__)
"""


@pytest.mark.detectron2
def test_installed_configs_and_train_net_load(installed, tmp_path):
    answer = run_python("-c", ALONE + LOAD_ALL, cwd=tmp_path, path=installed)
    assert Path(answer.stdout.strip()) == installed / "dino_d2" / "model_zoo.py"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist as b; b({str(folder)!r})"
    run_python("-c", code, cwd=copy_sources(folder / "source"))
    (built,) = folder.glob("*.tar.gz")
    return built


def test_sdist_carries_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [f for name in FOLDERS for f in files(ROOT / name) if f.name != "_build.json"]
    expected = {str(f.relative_to(ROOT)) for f in needed if f.suffix != ".so"} | {*SOURCES}
    assert expected <= names


USE = """
import json, sys, torch, warnings
sys.modules["detectron2"] = None  # slow to import
from dino_d2.ops import load_native, ms_deform_attn
arguments = torch.rand(1, 5, 2, 8), [(2, 2), (1, 1)], torch.rand(1, 3, 2, 2, 1, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    shapes = [ms_deform_attn(*arguments, torch.rand(1, 3, 2, 2, 1)).shape for _ in range(2)]
ours = [str(w.message) for w in caught if "ms_deform_attn" in str(w.message)]
print(json.dumps([shapes, ours, load_native()]))
"""


def test_without_a_compiler(sdist, tmp_path):
    """Installs from the sdist, works, and says once why it is slow."""
    site = pip_install(sdist, tmp_path / "site", PATH=str(tmp_path))
    answer = run_python("-c", ALONE + USE, cwd=tmp_path, path=site)
    shapes, said, (loaded, _, reason, record) = json.loads(answer.stdout)
    assert shapes == [[1, 3, 16]] * 2
    assert not loaded
    assert re.match(r"the operators were not built: there is no C\+\+ compiler: '.+'", reason)
    assert record["reason"] == reason
    assert len(said) == 1
    assert reason in said[0]
    zoo = site / "dino_d2" / "zoo"
    assert len(list(zoo.glob("projects/*/configs/*.py"))) == len(model_zoo.list_configs())


@pytest.fixture
def script(monkeypatch):
    """A function that loads setup.py in a given environment."""

    def load(**environment):
        for name in OURS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        arguments = {}
        monkeypatch.setattr(setuptools, "setup", arguments.update)
        spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.arguments = arguments
        return module

    return load


def fake_nvcc(folder, body, release="13.0"):
    """A CUDA_HOME whose nvcc knows its version and otherwise runs some lines of shell."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda tools, release {release}" && exit\n{body}\n'
    )
    nvcc.chmod(0o755)
    return folder / "cuda"


def test_find_torch(script):
    found, version, cuda = script().find_torch()
    assert found == Path(torch.__file__).parent
    assert (version, cuda) == (torch.__version__, torch.version.cuda or "")


def test_find_torch_under_build_isolation(script, monkeypatch, tmp_path):
    """Pip shows the build a package path of its own."""
    (tmp_path / "torch.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setup = script()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert setup.find_torch()[1] == torch.__version__


def test_an_old_torch(script, monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'; cuda = None")
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    setup = script()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(RuntimeError, match=r"^PyTorch 2\.9\.1\+cpu is older than 2\.11$"):
        setup.find_torch()


def test_find_nvcc(script, tmp_path):
    home = fake_nvcc(tmp_path, "", release="99.4")
    assert script(CUDA_HOME=home).find_nvcc("99.1") == (home / "bin" / "nvcc", "99.4")
    with pytest.raises(RuntimeError, match=r"^no nvcc for CUDA 98.0 was found.*nvcc is CUDA 99.4"):
        script(CUDA_HOME=home).find_nvcc("98.0")
    with pytest.raises(RuntimeError, match=r"^this PyTorch is built without CUDA$"):
        script(CUDA_HOME=home).find_nvcc("")
    with pytest.raises(RuntimeError, match=r"^DINO_D2_CUDA=0 forbade CUDA$"):
        script(CUDA_HOME=home, DINO_D2_CUDA=0).find_nvcc("99.1")


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        (" 8.0; 9.0a,", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]),
        ("12.0+PTX", [f"arch=compute_120,code={kind}_120" for kind in ("sm", "compute")]),
    ],
)
def test_chosen_architectures(script, chosen, options):
    pairs = [word for option in options for word in ("-gencode", option)]
    assert script(TORCH_CUDA_ARCH_LIST=chosen).architectures("nvcc") == pairs


def test_architectures_of_this_machine_or_of_nvcc(script, monkeypatch, tmp_path):
    home = fake_nvcc(tmp_path, "echo compute_75; echo compute_90; echo compute_900", release="13.0")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 8.6; echo 8.6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    nvcc = home / "bin" / "nvcc"
    assert script().architectures(nvcc) == ["-gencode", "arch=compute_86,code=sm_86"]
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    names = [option for option in script().architectures(nvcc) if option != "-gencode"]
    assert names == ["arch=compute_75,code=sm_75", "arch=compute_90,code=sm_90"]


def failing(folder, name, *lines):
    """A compiler that prints some lines and fails."""
    tool = folder / name
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in lines) + "exit 3\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (
            ["In file included from errors.h", "", " k.cu(3): error: no", "1 error"],
            "k.cu(3): error: no",
        ),
        (
            ["a note", "nvcc fatal   : Unsupported architecture"],
            "nvcc fatal   : Unsupported architecture",
        ),
        (["/bin/ld: cannot find -ltorch", "collect2: error: ld"], "/bin/ld: cannot find -ltorch"),
        (["a note", "the last line", ""], "the last line"),
        ([], "it does not say why"),
    ],
)
def test_why_a_compiler_failed(script, tmp_path, lines, why):
    tool = failing(tmp_path, "tool", *lines)
    with pytest.raises(RuntimeError) as failure:
        script().execute([tool, "-c", Path("ops/launch.cu"), "-O3"])
    assert str(failure.value) == f"tool failed on launch.cu (exit 3): {why}"
    with pytest.raises(RuntimeError, match=r"^tool failed on the library \(exit 3\): "):
        script().execute([tool, "a.o", "-o", "library.so"])


def build(setup, folder, monkeypatch, compile_cpp=False, link_fails=False):
    """Run setup.py's build_ext, up to the C++ compiler; what it recorded, and what it would build.

    A library is there already, as after an earlier build.
    """
    monkeypatch.chdir(ROOT)
    compiled = []

    def build_extension(command, extension):
        if extension.extra_objects and link_fails:
            raise RuntimeError("the linker failed")
        compiled[:] = [extension]
        library.write_text("new")

    if not compile_cpp:
        monkeypatch.setattr(setup.build_ext, "build_extension", build_extension)
    command = setup.BuildOperators(setuptools.Distribution(setup.arguments))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    library = Path(command.get_ext_fullpath("dino_d2._C"))
    library.parent.mkdir(parents=True)
    library.write_text("old")
    command.run()
    record = json.loads((library.parent / "_build.json").read_text())
    state = library.read_text() if library.exists() else "none"
    return record, state, compiled


def hide_torch(setup, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    absent = subprocess.CompletedProcess((), 1, "", "")
    monkeypatch.setattr(setup, "run", lambda *command, **options: absent)


def pretend_torch(setup, monkeypatch, cuda="13.0"):
    monkeypatch.setattr(setup, "find_torch", lambda: (Path("torch"), "2.15.0", cuda))


def test_build_without_a_compiler(script, tmp_path, monkeypatch):
    record, library, _ = build(script(CXX="/nowhere/c++"), tmp_path, monkeypatch)
    why = "the operators were not built: there is no C++ compiler: '/nowhere/c++' was not found"
    assert record == {"reason": why, "torch": "", "compiler": "", "cuda": "", "cuda_reason": ""}
    assert library == "none"


def test_build_with_a_failing_compiler(script, tmp_path, monkeypatch):
    compiler = failing(tmp_path, "g++", "torch.h:1:2: error: no such thing")
    setup = script(CXX=compiler)
    pretend_torch(setup, monkeypatch, cuda="")
    record, library, _ = build(setup, tmp_path, monkeypatch, compile_cpp=True)
    why = r"g\+\+ failed on \w+\.cpp \(exit 3\): torch\.h:1:2: error: no such thing"
    assert re.fullmatch(f"the operators were not built: {why}", record["reason"])
    assert library == "none"


def test_build_with_gcc_where_python_names_another(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "to be restored")
    setup = script()
    monkeypatch.setitem(sysconfig.get_config_vars(), "CXX", "/nowhere/clang++ -pthread")
    compiler = tmp_path / "g++"
    compiler.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    pretend_torch(setup, monkeypatch, cuda="")
    record, library, _ = build(setup, tmp_path, monkeypatch)
    assert (record["reason"], record["compiler"], library) == ("", "g++", "new")


def test_build_without_torch(script, tmp_path, monkeypatch):
    setup = script()
    hide_torch(setup, monkeypatch)
    record, library, _ = build(setup, tmp_path, monkeypatch)
    assert record["reason"] == f"the operators were not built: {NO_TORCH}"
    assert library == "none"


def test_build_with_cuda(script, tmp_path, monkeypatch):
    home = fake_nvcc(tmp_path, """[ "$1" = --dryrun ] && echo '"-L/toolkit/lib64"' >&2; exit 0""")
    setup = script(CUDA_HOME=home, CXX=sys.executable, TORCH_CUDA_ARCH_LIST="9.0")
    pretend_torch(setup, monkeypatch)
    record, library, (extension,) = build(setup, tmp_path, monkeypatch)
    assert record == {
        "reason": "",
        "torch": "2.15.0",
        "compiler": sys.executable,
        "cuda": "13.0",
        "cuda_reason": "",
    }
    assert library == "new"
    assert ("DINO_D2_WITH_CUDA", None) in extension.define_macros
    assert len(extension.extra_objects) == len(list(ROOT.glob("ops/*/cuda/*.cu")))
    assert "/toolkit/lib64" in extension.library_dirs


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (
            "echo 'nvcc fatal: no licence' >&2; exit 1",
            r"nvcc failed on \w+\.cu \(exit 1\): nvcc .*",
        ),
        ("exit 0", "the linker failed"),
    ],
)
def test_cuda_that_fails_leaves_a_build_without(script, tmp_path, monkeypatch, lines, why):
    setup = script(CUDA_HOME=fake_nvcc(tmp_path, lines), CXX=sys.executable)
    pretend_torch(setup, monkeypatch)
    record, library, (extension,) = build(setup, tmp_path, monkeypatch, link_fails=True)
    assert record["cuda"] == record["reason"] == ""
    assert re.fullmatch(why, record["cuda_reason"])
    assert library == "new"
    assert extension.extra_objects == []
    assert dict(extension.define_macros).keys() == {"TORCH_TARGET_VERSION"}
    assert extension.libraries == ["torch", "torch_cpu", "c10"]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("nvcc fails", r"nvcc failed on \w+\.cu \(exit 1\): nvcc fatal: no licence"),
        ("no nvcc", r"no nvcc for CUDA 98.0 was found.*"),
        ("no compiler", r"there is no C\+\+ compiler: '/nowhere/c\+\+' was not found"),
        ("no torch", NO_TORCH),
    ],
)
def test_demanded_cuda_that_fails_is_an_error(script, tmp_path, monkeypatch, fault, why):
    home = fake_nvcc(tmp_path, "echo 'nvcc fatal: no licence' >&2; exit 1")
    compiler = "/nowhere/c++" if fault == "no compiler" else sys.executable
    setup = script(DINO_D2_CUDA=1, CUDA_HOME=home, CXX=compiler)
    if fault == "no torch":
        hide_torch(setup, monkeypatch)
    else:
        pretend_torch(setup, monkeypatch, "98.0" if fault == "no nvcc" else "13.0")
    with pytest.raises(SystemExit) as failure:
        build(setup, tmp_path, monkeypatch)
    assert re.fullmatch(rf"dino_d2: DINO_D2_CUDA=1 demands CUDA, but {why}", str(failure.value))


def test_an_unknown_value_of_the_switch(script):
    with pytest.raises(SystemExit, match="DINO_D2_CUDA must be 0 or 1, but is 'off'"):
        script(DINO_D2_CUDA="off")


def test_versions_agree(script):
    """PyTorch's oldest version and the package's own each stand in several files."""
    setup = script()
    major, minor = setup.OLDEST_TORCH
    assert int(setup.STABLE_ABI, 16) == (major << 56) | (minor << 48)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{__version__}"' in project
    for text in (project, (ROOT / "Makefile").read_text()):
        assert set(re.findall(r"torch>=([\d.]+)", text)) == {f"{major}.{minor}"}
        assert re.search(r"setuptools>=77\b", text)
