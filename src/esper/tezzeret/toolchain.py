"""What compiled code is compiled by and for; a form made elsewhere is rebuilt, never trusted to fit."""

from __future__ import annotations

import os
import platform
import shutil

import torch


def toolchain(device: torch.device | str = "cpu") -> str:
    """Name torch's version, the device and its instruction set, as in "torch 2.13.0+cpu, x86_64 AVX2"."""
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        target = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    elif device.type == "cpu":
        target = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    else:
        target = device.type
    return f"torch {torch.__version__}, {target}"


def native_compiler() -> str | None:
    """Say that no C++ compiler was found, or None; Triton needs one as well, for its launchers."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    if any(shutil.which(name) for name in wanted):
        return None
    return f"no C++ compiler found (looked for {', '.join(wanted)}); install one or set CXX"
