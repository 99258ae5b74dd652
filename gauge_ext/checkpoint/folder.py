"""The two files of an adapter's folder, before anything in them is understood; without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gauge_ext.checkpoint.format import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from gauge_ext.errors import AdapterFormatError


def require_adapter(folder: Path, weights_name: str = WEIGHTS_NAME) -> None:
    """Refuse what is not a folder with an adapter's two files, and say what it may be instead.

    Args:
        folder: The folder.
        weights_name: The file that has to hold its tensors.

    Raises:
        AdapterFormatError: It is not.
    """
    if not folder.exists():
        raise AdapterFormatError(
            f"{folder} does not exist.", hint="Give the folder that holds the adapter."
        )
    if not folder.is_dir():
        raise AdapterFormatError(
            f"{folder} is a file, and an adapter is a folder.",
            hint=f"Give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.",
        )
    if not (folder / CONFIG_NAME).is_file():
        below = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
        raise AdapterFormatError(
            f"{folder} holds no {CONFIG_NAME}, so it is no adapter.",
            hint=f"There are adapters below it: {', '.join(below)}." if below else None,
        )
    if not (folder / weights_name).is_file():
        pickled = (folder / PICKLE_NAME).is_file()
        raise AdapterFormatError(
            f"{folder} holds no {WEIGHTS_NAME}" + (f", only {PICKLE_NAME}." if pickled else "."),
            hint=(
                f"{PICKLE_NAME} is a pickle, which can run code when it is opened. In Python, "
                "allow_pickle=True has its tensors alone read; or turn it into a safe file: "
                f'safetensors.torch.save_file(torch.load("{PICKLE_NAME}", '
                f'weights_only=True), "{WEIGHTS_NAME}").'
            )
            if pickled
            else None,
        )


def read_config(file: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is.

    Raises:
        AdapterFormatError: It cannot be read, or is no JSON object.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFormatError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterFormatError(f"{file} is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{file} must hold a JSON object, got {type(raw).__name__}.")
    return raw
