"""A graph into its file, and whether that file is valid."""

from __future__ import annotations

from pathlib import Path

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.disk.files import data_name, require_space, write_errors
from gauge_ext.export.trace.graph import Graph

# A protobuf file ends at 2 GiB and is parsed into memory whole; below half of that, one file is
# handier than two.
EXTERNAL_DATA_ABOVE = 2**30
PROTOBUF_LIMIT = 2**31
_PAGE = 4096  # weights that start on a page can be mapped instead of read


def save_graph(graph: Graph, draft: Path, target: Path, external_data: bool | None) -> None:
    """Write a graph where it is drafted, named as it will be where it belongs.

    Args:
        graph: What is written.
        draft: The file to write.
        target: Where it will stand; the data file is named after it.
        external_data: Whether the weights go into a file of their own; None: above 1 GiB.

    Raises:
        ConfigError: a single file is asked for, and the weights exceed protobuf's limit.
        WriteError: there is no room, or the file cannot be written.
    """
    import onnx_ir as ir

    size = graph.nbytes
    if external_data is False and size >= PROTOBUF_LIMIT:
        raise ConfigError(
            f"external_data=False, and the weights take {size / 2**30:.1f} GiB: a single ONNX file "
            "ends at 2 GiB.",
            hint="Leave external_data out.",
        )
    external = size > EXTERNAL_DATA_ABOVE if external_data is None else external_data
    require_space(target, size)
    with write_errors(target):
        ir.save(
            graph.model,
            draft,
            external_data=data_name(target) if external else None,
            alignment=_PAGE,
            align_threshold=_PAGE,
        )


def check_file(path: Path) -> None:
    """Refuse a file that is not valid ONNX, also where onnxruntime would accept it.

    Raises:
        ExportError: it is not.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exporter made an invalid graph: {error}") from error
