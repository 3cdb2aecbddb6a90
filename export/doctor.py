"""Whether what is installed on this machine fits a target, and the line that mends what does not.

``diagnose`` judges facts and touches nothing, so every case of it can be tested anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from compress.config.targets import Component, Requirement, Target, load_target
from export.installed import Installed, inspect_installed

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
MINIMUM = {
    "python": ">=3.10",
    "torch": ">=2.10",
    "torchvision": ">=0.25",
    "onnx": ">=1.16",
    "onnxruntime": ">=1.20",
}
"""What this package needs on any machine; a test compares it with the package's metadata."""
DRIVER_FOR_CUDA = {11: ">=450", 12: ">=525", 13: ">=580"}
"""Drivers that serve a major version of CUDA (NVIDIA, CUDA minor version compatibility)."""

_CPU = "CPUExecutionProvider"
_TORCH = "pip install --upgrade torch torchvision"
_ONNXRUNTIME = "pip install --upgrade onnxruntime-gpu"
_BUILDERS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu12"}
_MENDS = {
    "python": "a virtual environment of a Python that fits",
    "torch": _TORCH,
    "torchvision": _TORCH,
    "onnx": "pip install --upgrade onnx",
    "onnxruntime": _ONNXRUNTIME,
    "cudnn": _TORCH,
    "gpu": "run this on a machine with such a GPU",
    "driver": "install such a driver of NVIDIA, on the host if this is a container",
}


@dataclass(frozen=True)
class Finding:
    """What was found of one component, and whether it fits."""

    component: str
    """What was looked at."""
    found: str
    """What is there."""
    needed: str
    """What should be there; empty where anything will do."""
    fits: bool | None
    """None where it is not needed, or cannot be judged without a GPU."""
    why: str | None = None
    """For a misfit: half a sentence that says what follows from it, where the target knows."""
    mend: str | None = None
    """For a misfit: the line that mends it."""


def run_doctor(target_name: str | None = None) -> dict[str, Any]:
    """Look at this machine and judge it for a target.

    Returns:
        The document of ``compress doctor --json``; docs/install.md describes it.

    Raises:
        ConfigError: there is no such target.
    """
    target = None if target_name is None else load_target(target_name)
    installed = inspect_installed()
    findings = diagnose(installed, target)
    return {
        "schema_version": SCHEMA_VERSION,
        "target": target.name if target else None,
        "fits": fit(findings),
        "findings": [asdict(finding) for finding in findings],
        "installed": installed.to_dict(),
    }


def diagnose(installed: Installed, target: Target | None) -> list[Finding]:
    """Judge what is installed for a target; None asks whether this package works at all.

    A GPU target is judged without a GPU as well: then the GPU is a misfit, the execution provider
    and the driver are left open, and the rest is what it is.
    """
    return [
        _version(installed, target, "python", installed.python),
        _version(installed, target, "torch", installed.torch),
        _architectures(installed, target),
        _version(installed, target, "torchvision", installed.torchvision),
        _version(installed, target, "onnx", installed.onnx),
        _onnxruntime(installed, target),
        *_providers(installed, target),
        _cudnn(installed, target),
        *_builders(installed, target),
        _gpu(installed, target),
        *_torch_on_gpu(installed, target),
        _driver(installed, target),
    ]


def fit(findings: Iterable[Finding]) -> bool:
    """Return whether no finding is a misfit."""
    return all(finding.fits is not False for finding in findings)


def covers(architectures: Iterable[str], sm: str) -> bool:
    """Return whether code compiled for some architectures runs on a compute capability.

    Machine code (``sm_80``) runs on the same major version from its minor version on, PTX
    (``compute_80``) on everything newer; with a letter at the end, on exactly that GPU.
    """
    wanted = tuple(map(int, sm.split(".")))
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if not match:
            continue
        kind, letter = match.group(1, 4)
        has = (int(match.group(2)), int(match.group(3)))
        if has == wanted or (
            not letter and has < wanted and (kind == "compute" or has[0] == wanted[0])
        ):
            return True
    return False


def _needs_gpu(target: Target | None) -> bool:
    return target is not None and target.onnxruntime[0] != _CPU


def _requirement(target: Target | None, component: str) -> Requirement | None:
    return dict(target.requires).get(component) if target else None  # type: ignore[call-overload]


def _misfit(target: Target | None, component: str, found: str, needed: str) -> Finding:
    """Return a misfit with the target's reason and mend, or else the usual mend."""
    asked = _requirement(target, component)
    why, mend = (asked.why, asked.mend) if asked else (None, _MENDS.get(component))
    return Finding(component, found, needed, False, why, mend)


def _ranges(target: Target | None, component: str) -> str:
    asked = _requirement(target, component)
    return _joined(MINIMUM.get(component), asked.versions if asked else None)


def _joined(*ranges: str | None) -> str:
    """Return the range inside of all these: each clause once, and of the lowest the highest."""
    clauses = [clause for text in ranges for clause in (text or "").split(",") if clause]
    lowest = sorted((c for c in clauses if c.startswith(">=")), key=lambda c: Version(c[2:]))
    return ",".join(dict.fromkeys((*lowest[-1:], *(c for c in clauses if c not in lowest))))


def _within(version: str, ranges: str) -> bool:
    try:
        return SpecifierSet(ranges).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _version(
    installed: Installed, target: Target | None, component: str, version: str | None
) -> Finding:
    """Judge a component that every machine needs by its version."""
    needed = _ranges(target, component)
    problem = installed.problems.get(component)
    if problem or version is None:
        found = f"{version or 'installed'}, broken: {problem}" if problem else "missing"
        return _misfit(target, component, found, needed)
    if not _within(version, needed):
        return _misfit(target, component, version, needed)
    return Finding(component, version, needed, True)


def _architectures(installed: Installed, target: Target | None) -> Finding:
    found = " ".join(installed.architectures) or "none, a CPU build"
    sms = [target.sm] if target and target.sm else [gpu.sm for gpu in installed.gpus if gpu.sm]
    needed = " ".join(f"sm_{sm.replace('.', '')}" for sm in dict.fromkeys(sms))
    component = "torch's CUDA code"
    if not _needs_gpu(target) or not sms or installed.torch is None:
        return Finding(component, found, "", None)
    if all(covers(installed.architectures, sm) for sm in sms):
        return Finding(component, found, needed, True)
    misfit = _misfit(target, "torch", found, needed)
    return Finding(component, found, needed, False, misfit.why, misfit.mend)


def _onnxruntime(installed: Installed, target: Target | None) -> Finding:
    owners = installed.onnxruntime_distributions
    if len(owners) > 1:
        found = f"{installed.onnxruntime} from {' and '.join(owners)}"
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in owners else owners[0]
        mend = f"pip uninstall --yes {' '.join(owners)} && pip install {keep}"
        why = "they own the same module, and which of them is loaded is chance"
        return Finding("onnxruntime", found, "one distribution", False, why, mend)
    return _version(installed, target, "onnxruntime", installed.onnxruntime)


def _providers(installed: Installed, target: Target | None) -> list[Finding]:
    wanted = target.onnxruntime if target else (_CPU,)
    others = [name for name in installed.usable_providers if name not in wanted]
    return [
        *(_provider(installed, target, name) for name in wanted if installed.onnxruntime),
        *(Finding(_title(name), "works", "", None) for name in others),
    ]


def _provider(installed: Installed, target: Target | None, name: str) -> Finding:
    needed = "works"
    if name in installed.usable_providers:
        return Finding(_title(name), "works", needed, True)
    if name in installed.providers and name != _CPU and not installed.gpus:
        return Finding(_title(name), "built in, not tried: there is no GPU", needed, None)
    found = "not built in"
    if name in installed.providers:
        found = installed.problems.get(name, "it computes wrong sums")
    misfit = _misfit(target, "onnxruntime", found, needed)
    return Finding(_title(name), found, needed, False, misfit.why, misfit.mend)


def _title(provider: str) -> str:
    return f"onnxruntime on {provider.removesuffix('ExecutionProvider')}"


def _cudnn(installed: Installed, target: Target | None) -> Finding:
    needed = _ranges(target, "cudnn")
    found = installed.cudnn or "missing"
    if not needed:
        return Finding("cudnn", found, "", None)
    if installed.cudnn is None or not _within(installed.cudnn, needed):
        return _misfit(target, "cudnn", found, needed)
    return Finding("cudnn", found, needed, True)


def _builders(installed: Installed, target: Target | None) -> list[Finding]:
    """Judge the library that builds the target's engines; the other one is information."""
    versions: dict[Component, str | None] = {
        "tensorrt": installed.tensorrt,
        "tensorrt_rtx": installed.tensorrt_rtx,
    }
    findings = []
    for name, version in versions.items():
        problem = installed.problems.get(name)
        found = f"{version or 'installed'}, broken: {problem}" if problem else version or "missing"
        needed = (target.tensorrt or "") if target and target.builder == name else ""
        if not needed:
            findings.append(Finding(name, found, "", None))
        elif problem or version is None or not _within(version, needed):
            misfit = _misfit(target, name, found, needed)
            usual = f"pip install '{_BUILDERS[name]}{needed}'"
            findings.append(misfit if misfit.mend else replace(misfit, mend=usual))
        else:
            findings.append(Finding(name, found, needed, True))
    return findings


def _gpu(installed: Installed, target: Target | None) -> Finding:
    found = ", ".join(f"{gpu.name} (SM {gpu.sm or 'unknown'})" for gpu in installed.gpus) or "none"
    if target is None or not _needs_gpu(target):
        return Finding("gpu", found, "", None)
    ranges = f"=={target.sm}" if target.sm else _ranges(target, "gpu")
    needed = f"SM {target.sm or ranges}" if ranges else "one of NVIDIA"
    if any(gpu.sm and _within(gpu.sm, ranges) for gpu in installed.gpus):
        return Finding("gpu", found, needed, True)
    return _misfit(target, "gpu", found, needed)


def _torch_on_gpu(installed: Installed, target: Target | None) -> list[Finding]:
    if not installed.gpus or not _needs_gpu(target) or installed.torch is None:
        return []
    if installed.torch_gpus:
        found = f"{installed.torch_gpus} of {len(installed.gpus)} GPUs"
        return [Finding("torch on the GPU", found, "works", True)]
    why = "the GPU is hidden (CUDA_VISIBLE_DEVICES), or the driver is too old for torch's CUDA"
    misfit = _misfit(target, "torch", "finds no GPU that it can use", "works")
    return [Finding("torch on the GPU", misfit.found, "works", False, why, misfit.mend)]


def _driver(installed: Installed, target: Target | None) -> Finding:
    found = installed.driver or "none"
    by_cuda = DRIVER_FOR_CUDA.get(int(installed.cuda.split(".")[0])) if installed.cuda else None
    needed = _joined(_ranges(target, "driver"), by_cuda) if _needs_gpu(target) else ""
    if not needed or (installed.driver is None and not installed.gpus):
        return Finding("driver", found, needed, None)
    if installed.driver is None or not _within(installed.driver, needed):
        return _misfit(target, "driver", found, needed)
    return Finding("driver", found, needed, True)


def render_findings(document: Mapping[str, Any]) -> Table:
    """Return ``run_doctor``'s document as a table for people; ``mend_lines`` belong below it."""
    from rich.table import Table
    from rich.text import Text

    title = f"this machine for {document['target']}" if document["target"] else "this machine"
    table = Table("component", "found", "needed", "fits", title=title)
    words = {True: Text("yes"), False: Text("NO", style="bold red"), None: Text("-")}
    for row in document["findings"]:
        found, needed = Text(row["found"]), Text(row["needed"])  # no markup, whatever they say
        table.add_row(row["component"], found, needed, words[row["fits"]])
    return table


def mend_lines(document: Mapping[str, Any]) -> list[str]:
    """Return two lines for each misfit: what follows from it, and what mends it.

    They are to be printed as they are: a table would break a command in two.
    """
    lines = []
    for row in document["findings"]:
        if row["fits"] is False:
            lines += [
                f"{row['component']}: {row['why'] or 'it does not fit'}",
                f"    {row['mend']}",
            ]
    return lines
