"""How the processes of a run are laid out: the accelerate configurations that ship, or one of your own."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from ..declaration import nearest

RESUMABLE = {"NO", "MULTI_GPU", "FSDP"}
"""Ways of distribution whose checkpoints this package resumes from and reads guides from."""


@dataclass(frozen=True)
class Launcher:
    """How processes are laid out.

    Attributes:
        processes: Processes, one per GPU.
        machines: Nodes.
        sharded: Weights, gradients and moments are spread over the processes (FSDP).
        file: The accelerate configuration, or None for one process.
        port: Where the processes of one machine meet, if the configuration says so; None for any free one.
    """

    processes: int = 1
    machines: int = 1
    sharded: bool = False
    file: Path | None = None
    port: int | None = None


def launcher_names() -> list[str]:
    """Names of the accelerate configurations that ship with the package."""
    folder = resources.files("npo_core.runs") / "launchers"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_launcher(name: str) -> Launcher:
    """Layout of an accelerate configuration: one that ships, or a YAML file; the empty name is one process.

    Raises:
        ValueError: Neither, or a file that `accelerate config` would not write.
    """
    if not name:
        return Launcher()
    shipped = Path(str(resources.files("npo_core.runs") / "launchers" / f"{name}.yaml"))
    file = shipped if name in launcher_names() else Path(name).expanduser()
    if not file.is_file():
        raise ValueError(
            f"launcher is {name!r}{nearest(name, launcher_names())} Allowed: {', '.join(launcher_names())}, or a YAML "
            "file that `accelerate config` wrote."
        )
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    missing = [key for key in ("num_processes", "num_machines", "distributed_type") if key not in (content or {})]
    if missing:
        raise ValueError(f"{file} says nothing about {', '.join(missing)}; write it with `accelerate config`.")
    kind, fsdp = content["distributed_type"], content.get("fsdp_config") or {}
    if kind not in RESUMABLE or (
        kind == "FSDP" and (fsdp.get("fsdp_version"), fsdp.get("fsdp_state_dict_type")) != (2, "FULL_STATE_DICT")
    ):
        raise ValueError(
            f"{file} has distributed_type {kind}, fsdp_version {fsdp.get('fsdp_version')}, fsdp_state_dict_type "
            f"{fsdp.get('fsdp_state_dict_type')}. Its checkpoints could not be rolled back to or read as guides; "
            "allowed: NO, MULTI_GPU, and FSDP with version 2 and FULL_STATE_DICT."
        )
    return Launcher(
        processes=content["num_processes"],
        machines=content["num_machines"],
        sharded=content["distributed_type"] == "FSDP",
        file=file,
        port=content.get("main_process_port"),
    )
