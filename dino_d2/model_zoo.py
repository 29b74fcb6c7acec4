"""The shipped configs, from a checkout or from the installed package."""

from pathlib import Path


def root() -> Path:
    """The folder that holds `configs/` and `projects/`."""
    package = Path(__file__).resolve().parent
    installed = package / "zoo"
    return installed if installed.is_dir() else package.parent


def list_configs(suffix: str = ".py") -> list[str]:
    """Names of all configs, such as "dino/dino_r50_4scale_12ep"; ".yaml": of those for yacs."""
    files = sorted((root() / "projects").glob(f"*/configs/*{suffix}"))
    return [f"{file.parents[1].name}/{file.stem}" for file in files]


def get_config_file(name: str) -> str:
    """The path of a config by its name; a file's path stays as it is.

    Args:
        name: of a LazyConfig, with or without ".py"; with ".yaml", of a config for yacs.

    Raises:
        KeyError: there is no such config; the message lists those there are.
    """
    if Path(name).is_file():
        return str(name)
    suffix = ".yaml" if name.endswith(".yaml") else ".py"
    project, _, stem = name.removesuffix(suffix).partition("/")
    path = root() / "projects" / project / "configs" / f"{stem}{suffix}"
    if not stem or not path.is_file():
        raise KeyError(f"no config {name!r}; there are {', '.join(list_configs(suffix))}")
    return str(path)


def get_config(name: str):
    """The LazyConfig of a name or a file; needs Detectron2.

    Raises:
        KeyError: see `get_config_file`.
        ImportError: Detectron2 is not installed.
    """
    path = get_config_file(name)
    try:
        from detectron2.config import LazyConfig
    except ImportError as error:
        raise ImportError(
            "configs are Detectron2 LazyConfigs; install dino_d2[detectron2]"
        ) from error
    return LazyConfig.load(path)
