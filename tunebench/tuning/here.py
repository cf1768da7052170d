"""Which database is for which device of this machine, by its name alone."""

from __future__ import annotations

from pathlib import Path

from tunebench import environment
from tunebench.tuning import files
from tunebench.tuning.entry import Provenance
from tunebench.tuning.files import Glance


def used_by(found: Glance, replaced: bool = False) -> str:
    """The options that choose a database here, or why none does; no device is opened, and TVM not imported.

    `replaced`: it comes with TuneBench, and the work folder has one of the same name.
    """
    made, here = found.made, environment.versions()["tvm"]
    if made is None:
        return "nothing: what it is for is not known"
    if not found.target_name:
        return f"nothing: no target's folder has that name, but <target>{files.folder_name('', made)} is one"
    if not _is_named_here(made):
        return f"another device: {made.device}"
    if made.tvm != here:
        return f"nothing: made with TVM {made.tvm}, and this is {here}"
    if replaced:
        return "nothing: the work folder has its own"
    threads = f" --threads {made.threads}" if made.threads not in (0, environment.usable_cores()) else ""
    return f"--target {found.target_name}{threads}"


def _is_named_here(made: Provenance) -> bool:
    """Whether this machine has a device of that name. Only NVIDIA's GPUs tell theirs unopened."""
    if made.threads:
        name = environment.cpu_name()
        return made.device == name or made.device.startswith(f"{name} (")
    slug = environment.device_slug
    return slug(made.device) in {slug(gpu["name"]) for gpu in environment.gpus()}


def others(work_dir: Path, packed: Path, own: str, target_name: str) -> list[Path]:
    """Databases of the same target that are for other devices than `own`, the folder name of this machine's."""
    roots = (work_dir / "tuning_logs", packed)
    found = [files.glance(folder) for root in roots for folder in files.databases(root) if folder.name != own]
    return [each.folder for each in found if each.target_name == target_name]
