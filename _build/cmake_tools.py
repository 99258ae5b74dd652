"""Finds cmake and ninja: on PATH, or beside the Python that runs the build.

A virtual environment that is used without being activated (``.venv/bin/pip install ...``) has both
in its ``bin`` and none of them on PATH.

Run as a script it prints what to install, as pip wants it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig

#: The cmake_minimum_required of CMakeLists.txt.
CMAKE_MINIMUM = (3, 24)


def find(tool: str) -> str | None:
    """Returns the path of ``cmake`` or ``ninja``, or None; a cmake that is too old is none."""
    for folder in (sysconfig.get_path("scripts"), None):
        path = shutil.which(tool, path=folder)
        if path is not None and (tool != "cmake" or _recent(path)):
            return path
    return None


def missing() -> list[str]:
    """Returns the requirements to install for the tools that are not there."""
    wanted = {"cmake": f"cmake>={CMAKE_MINIMUM[0]}.{CMAKE_MINIMUM[1]}", "ninja": "ninja"}
    return [requirement for tool, requirement in wanted.items() if find(tool) is None]


def _recent(cmake: str) -> bool:
    # A cmake installed by pip into an environment that is gone leaves a script that cannot run.
    said = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)\.(\d+)", said.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= CMAKE_MINIMUM


if __name__ == "__main__":
    print(*missing())
