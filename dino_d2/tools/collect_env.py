"""Print versions, and which implementation of the operators is in use and why."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

from .. import __version__, model_zoo
from ..ops import load_native

PACKAGES = (
    "torchvision",
    "timm",
    "fvcore",
    "scipy",
    "pycocotools",
    "numpy",
    "safetensors",
    "matplotlib",
)


def collect() -> dict[str, str]:
    """Facts by name, in the order to print."""
    status = load_native()
    return {
        "dino_d2": f"{__version__}, from {os.path.dirname(os.path.dirname(__file__))}",
        "configs": f"{len(model_zoo.list_configs())}, from {model_zoo.root()}",
        "operators on the CPU": _operator("cpu"),
        "operators on CUDA": _operator("cuda"),
        "built against": _built(status.build),
        "Python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "Detectron2": _detectron2(),
        **{name: _version(name) for name in PACKAGES},
        "GPUs": _gpus(),
        "nvcc": _tool("nvcc", r"release ([\d.]+)"),
        "C++ compiler": _tool(os.environ.get("CXX", "c++"), r"([\d.]+)$"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }


def _operator(device_type: str) -> str:
    status = load_native()
    if not status.loaded:
        return f"plain PyTorch: {status.reason}"
    if device_type == "cuda" and not status.cuda:
        return f"plain PyTorch: built without CUDA, {status.build.get('cuda_reason') or 'unknown'}"
    chosen = os.environ.get("DINO_D2_ISA") if device_type == "cpu" else None
    return "compiled kernels" + (f", limited to {chosen} by DINO_D2_ISA" if chosen else "")


def _built(record: dict) -> str:
    if not record.get("torch"):
        return "nothing"
    cuda = f"CUDA {record['cuda']}" if record["cuda"] else f"no CUDA ({record['cuda_reason']})"
    return f"PyTorch {record['torch']} with {record['compiler']}, {cuda}"


def _detectron2() -> str:
    if importlib.util.find_spec("detectron2") is None:
        return "not installed"
    try:
        import detectron2
    except Exception as error:
        return f"installed but fails to import: {error!r}"
    compiled = importlib.util.find_spec("detectron2._C") is not None
    suffix = "" if compiled else ", without its compiled part"
    return f"{detectron2.__version__}, from {os.path.dirname(detectron2.__file__)}{suffix}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(
        f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory >> 30} GiB)" for d in devices
    )


def _tool(command: str, pattern: str) -> str:
    path = shutil.which(command)
    if path is None:
        return f"no {command} on the PATH"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(pattern, answer, re.MULTILINE)
    return f"{found[1] if found else 'version unknown'}, {path}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argparse.ArgumentParser(
        prog="python -m dino_d2.tools.collect_env", description=__doc__
    ).parse_args(argv)
    facts = collect()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")


if __name__ == "__main__":
    main()
