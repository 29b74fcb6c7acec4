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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)  # the first with everything that ops/ uses of the stable ABI
STABLE_ABI = "0x020b000000000000"  # that version, as PyTorch's headers want it
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
DEMANDED = os.environ.get("DINO_D2_CUDA") == "1"
SHIPPED = ("configs", "projects")


class UnavailableError(Exception):
    """Something the build needs is missing; the message says what, for the build record."""


def find_torch() -> tuple[Path, str, str]:
    """(directory, version, CUDA version or "") of the PyTorch the package will run with."""
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        location = spec.submodule_search_locations[0]
    else:  # pip's build isolation hides it through PYTHONPATH: ask the same interpreter without it
        code = "from importlib.util import find_spec as f; print(f('torch').origin)"
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, env=env, capture_output=True, text=True)
        if answer.returncode != 0:
            raise UnavailableError("PyTorch was not found when dino_d2 was installed")
        location = Path(answer.stdout.strip()).parent
    facts = runpy.run_path(str(Path(location) / "version.py"))
    version = str(facts["__version__"])
    if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UnavailableError(
            f"PyTorch {version} is installed, the operators need {oldest} or newer"
        )
    return Path(location), version, facts.get("cuda") or ""


def find_nvcc(torch_cuda: str) -> tuple[Path, str]:
    """(nvcc, its version); raises Unavailable with the reason for a build without CUDA."""
    if os.environ.get("DINO_D2_CUDA") == "0":
        raise UnavailableError("DINO_D2_CUDA=0 forbade CUDA")
    if not torch_cuda:
        raise UnavailableError("this PyTorch is built without CUDA")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    seen = []
    for nvcc in filter(Path.is_file, candidates):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        if match and match[1] == torch_cuda.split(".")[0]:
            return nvcc, f"{match[1]}.{match[2]}"
        seen.append(f"{nvcc} is CUDA {match[1]}.{match[2]}" if match else f"{nvcc} did not answer")
    raise UnavailableError(
        f"no nvcc for CUDA {torch_cuda} was found" + "".join(f"; {s}" for s in seen)
    )


def architectures(nvcc: Path) -> list[str]:
    """nvcc's -gencode options."""
    chosen = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if chosen == [""]:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = shutil.which(query[0]) and subprocess.run(query, capture_output=True, text=True)
        chosen = sorted(set(re.findall(r"^\d+\.\d+$", found.stdout, re.M))) if found else []
    if not chosen:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = set(re.findall(r"compute_(\d+)\b", listing))
        chosen = [
            a for a in DEFAULT_ARCHITECTURES if a.replace("+PTX", "").replace(".", "") in known
        ]
    options = []
    for name in chosen:
        number = name.removesuffix("+PTX").replace(".", "")
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return options


def toolkit_libraries(nvcc: Path) -> list[str]:
    """The toolkit's library directories as nvcc itself uses them; nvcc may be a wrapper script."""
    report = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', report)


class BuildOperators(build_ext):
    """Builds what can be built, and records what was and why the rest was not."""

    record: dict

    def run(self):
        self.record = {"reason": "", "torch": "", "compiler": "", "cuda": "", "cuda_reason": ""}
        super().run()
        package = self.get_finalized_command("build_py").get_package_dir("dino_d2")
        target = Path(package) if self.inplace else Path(self.build_lib) / "dino_d2"
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extensions(self):
        (extension,) = self.extensions
        try:
            self.build_native(extension)
        except Exception as error:  # a compiler may fail in any way; only a demanded build may not
            if DEMANDED:
                raise
            self.record["reason"] = f"the operators were not built: {error}"
            self.extensions = []
            print(f"dino_d2: {self.record['reason']}; plain PyTorch will be used", file=sys.stderr)

    def build_native(self, extension):
        torch, version, torch_cuda = find_torch()
        if not shutil.which(self.compiler.compiler_cxx[0]):
            raise UnavailableError(f"there is no C++ compiler ({self.compiler.compiler_cxx[0]})")
        self.record["torch"] = version
        self.record["compiler"] = " ".join(self.compiler.compiler_cxx[:1])
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
            if DEMANDED:
                raise
            vars(extension).update(without_cuda)
            self.record.update(cuda="", cuda_reason=str(error))
            super().build_extension(extension)

    def add_cuda(self, extension, torch, torch_cuda):
        nvcc, version = find_nvcc(torch_cuda)
        headers = torch.parent / "nvidia" / f"cu{version.split('.')[0]}" / "include"
        target = Path(self.build_temp)
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(ROOT.glob("ops/*/cuda/*.cu")):
            built = target / f"{source.parents[1].name}.{source.stem}.o"
            command = [nvcc, "-c", source, "-o", built, "-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
            command += ["--threads", "0", *architectures(nvcc)]
            # PyTorch's wheels carry headers that a slim toolkit lacks; the toolkit's come first.
            command += ["-isystem", headers] if headers.is_dir() else []
            subprocess.run(list(map(str, command)), check=True)
            extension.extra_objects.append(str(built))
        extension.library_dirs += toolkit_libraries(nvcc)
        extension.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
        extension.define_macros += [("DINO_D2_WITH_CUDA", None), ("USE_CUDA", None)]
        self.record["cuda"] = version


class BuildPython(build_py):
    """Ships configs/ and projects/ inside the package, in the layout of the repository."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                target = Path(self.build_lib) / "dino_d2" / "zoo" / name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))


class SourceDistribution(sdist):
    """Everything a build from source needs."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for name in (*SHIPPED, "ops"):
            shutil.copytree(ROOT / name, Path(base_dir) / name, dirs_exist_ok=True)


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
