from typing import Any

from typing_extensions import Buffer

def build_info() -> dict[str, Any]: ...
def requantize_rows(
    *,
    codes: Buffer,
    scales: Buffer,
    zero_points: Buffer | None,
    left: Buffer,
    right: Buffer,
    magnitude: Buffer | None,
    bits: int,
    block_size: int,
    scale_format: str,
    packed_zero_points: bool,
) -> tuple[float, float, float, bool]: ...
