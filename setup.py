"""Builds ops/ into dino_d2._C where PyTorch and a C++ compiler are at hand, with CUDA kernels where
an nvcc of PyTorch's CUDA major version is. PyTorch is never imported here: the extension needs its
headers and libraries only (LibTorch stable ABI), so build isolation does no harm.

DINO_D2_CUDA=0 forbids CUDA, DINO_D2_CUDA=1 demands it and makes every failure an error.
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") chooses architectures; default: the GPUs of this machine, or
all that nvcc knows of the list below. All other metadata is in pyproject.toml.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)  # the first with everything that ops/ uses of the stable ABI
STABLE_ABI = "0x020b000000000000"  # that version, as PyTorch's headers want it
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
SHIPPED = ("configs", "projects", "train_net.py")  # in the repository's layout, to dino_d2/zoo
CUDA_WANTED = os.environ.get("DINO_D2_CUDA", "")
if CUDA_WANTED not in ("", "0", "1"):
    raise SystemExit(f"dino_d2: DINO_D2_CUDA must be 0 or 1, but is {CUDA_WANTED!r}")


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a command and keep what it prints."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def find_torch() -> tuple[Path, str, str]:
    """(directory, version, CUDA version or "") of the PyTorch the package will run with."""
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        location = Path(spec.submodule_search_locations[0])
    else:  # pip's build isolation hides it through PYTHONPATH: ask the same interpreter without it
        code = "from importlib.util import find_spec as f; print(f('torch').origin)"
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        answer = run(sys.executable, "-c", code, env=env)
        if answer.returncode != 0:
            raise RuntimeError("PyTorch was missing; install it first, or try --no-build-isolation")
        location = Path(answer.stdout.strip()).parent
    facts = runpy.run_path(str(location / "version.py"))
    version = str(facts["__version__"])
    if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise RuntimeError("PyTorch {} is older than {}.{}".format(version, *OLDEST_TORCH))
    return location, version, facts.get("cuda") or ""


def find_nvcc(torch_cuda: str) -> tuple[Path, str]:
    """(nvcc, its version); raises RuntimeError with the reason for a build without CUDA."""
    if CUDA_WANTED == "0":
        raise RuntimeError("DINO_D2_CUDA=0 forbade CUDA")
    if not torch_cuda:
        raise RuntimeError("this PyTorch is built without CUDA")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    seen = []
    for nvcc in filter(Path.is_file, candidates):
        match = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version").stdout)
        if match and match[1] == torch_cuda.split(".")[0]:
            return nvcc, f"{match[1]}.{match[2]}"
        seen.append(f"{nvcc} is CUDA {match[1]}.{match[2]}" if match else f"{nvcc} did not answer")
    raise RuntimeError("; ".join([f"no nvcc for CUDA {torch_cuda} was found", *seen]))


def architectures(nvcc: Path) -> list[str]:
    """nvcc's -gencode options."""
    chosen = re.findall(r"[^;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not chosen:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = run(*query).stdout if shutil.which(query[0]) else ""
        chosen = sorted(set(re.findall(r"^\d+\.\d+$", answer, re.M)))
    if not chosen:
        known = re.findall(r"compute_(\d+)\b", run(nvcc, "--list-gpu-arch").stdout)
        chosen = [a for a in DEFAULT_ARCHITECTURES if re.sub(r"\.|\+PTX", "", a) in known]
    options = []
    for name in chosen:
        number = name.removesuffix("+PTX").replace(".", "")
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return options


def execute(command: list, **_):
    """Run a compiler; raises RuntimeError with the first error of its many lines."""
    answer = run(*command)
    print(*command, answer.stdout + answer.stderr, file=sys.stderr)
    if answer.returncode != 0:
        sources = [Path(word).name for word in command if str(word).endswith((".cpp", ".cu"))]
        what = f"{Path(command[0]).name} failed on {[*sources, 'the library'][0]}"
        lines = re.findall(r"\S.*", answer.stderr) or ["it does not say why"]
        is_error = re.compile(r"\b(error|fatal)\s*:|cannot find|undefined reference").search
        why = next(filter(is_error, lines), lines[-1])[:300]
        raise RuntimeError(f"{what} (exit {answer.returncode}): {why}")


class BuildOperators(build_ext):
    """Builds what can be built, and records what was and why the rest was not."""

    def run(self):
        self.force = True  # what an earlier build left may be of another PyTorch, or without CUDA
        self.record = {"reason": "", "torch": "", "compiler": "", "cuda": "", "cuda_reason": ""}
        its_own = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        if not shutil.which(its_own) and shutil.which("g++"):
            os.environ.setdefault("CXX", "g++")  # Python came from a machine with another compiler
        super().run()
        library = Path(self.get_ext_fullpath("dino_d2._C"))
        library.parent.mkdir(parents=True, exist_ok=True)
        if not self.extensions:  # an earlier build's would be taken for this one's
            library.unlink(missing_ok=True)
        (library.parent / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extensions(self):
        (extension,) = self.extensions
        try:
            self.build_native(extension)
        except Exception as error:  # a compiler may fail in any way; only a demanded build may not
            if CUDA_WANTED == "1":
                raise SystemExit(f"dino_d2: DINO_D2_CUDA=1 demands CUDA, but {error}") from error
            self.record["reason"] = f"the operators were not built: {error}"
            self.extensions = []
            print(f"dino_d2: {self.record['reason']}; plain PyTorch will be used", file=sys.stderr)

    def build_native(self, extension):
        torch, version, torch_cuda = find_torch()
        compiler = " ".join(self.compiler.compiler_cxx[:1])
        if not shutil.which(compiler):
            raise RuntimeError(f"there is no C++ compiler: {compiler!r} was not found")
        self.compiler.call = self.compiler.spawn = execute  # newer setuptools, older setuptools
        self.record.update(torch=version, compiler=compiler)
        extension.include_dirs += [str(torch / "include")]
        extension.library_dirs += [str(torch / "lib")]
        extension.libraries += ["torch", "torch_cpu", "c10"]
        extension.extra_compile_args += ["-O3", "-std=c++17", "-fvisibility=hidden"]
        extension.define_macros += [("TORCH_TARGET_VERSION", STABLE_ABI)]
        without_cuda = {k: list(v) for k, v in vars(extension).items() if isinstance(v, list)}
        try:
            self.add_cuda(extension, torch, torch_cuda)
            super().build_extension(extension)
        except Exception as error:
            if CUDA_WANTED == "1":
                raise
            vars(extension).update(without_cuda)
            self.record.update(cuda="", cuda_reason=str(error))
            super().build_extension(extension)

    def add_cuda(self, extension, torch, torch_cuda):
        nvcc, version = find_nvcc(torch_cuda)
        headers = torch.parent / "nvidia" / f"cu{version.split('.')[0]}" / "include"
        self.mkpath(self.build_temp)
        for source in sorted(ROOT.glob("ops/*/cuda/*.cu")):
            built = os.path.join(self.build_temp, f"{source.parents[1].name}.{source.stem}.o")
            command = [nvcc, "-c", source, "-o", built, "-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
            command += ["--threads", "0", *architectures(nvcc)]
            # PyTorch's wheels carry headers that a slim toolkit lacks; the toolkit's come first.
            execute(command + (["-isystem", headers] if headers.is_dir() else []))
            extension.extra_objects.append(built)
        # The toolkit's library directories as nvcc itself uses them; it may be a wrapper script.
        extension.library_dirs += re.findall(r'"-L([^"]+)"', run(nvcc, "--dryrun", "_.cu").stderr)
        extension.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
        extension.define_macros += [("DINO_D2_WITH_CUDA", None), ("USE_CUDA", None)]
        self.record["cuda"] = version


def ship(names: tuple[str, ...], target: Path):
    """Copies files and folders of the repository."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, target)
        else:
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, ignore=without, dirs_exist_ok=True)


class BuildPython(build_py):
    """Ships what the model zoo needs inside the package; an editable one finds it in place."""

    def run(self):
        package = Path(self.build_lib) / "dino_d2"
        shutil.rmtree(package, ignore_errors=True)  # an earlier build's, with files gone since
        super().run()
        ship(SHIPPED, package / "zoo")


class SourceDistribution(sdist):
    """Everything a build from source needs."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        ship((*SHIPPED, "ops"), Path(base_dir))


setup(
    ext_modules=[
        Extension(
            "dino_d2._C",
            sources=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("ops/**/*.cpp"))],
            depends=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("ops/**/*.[hc]*"))],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildOperators, "build_py": BuildPython, "sdist": SourceDistribution},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
