from types import NotImplementedType

from torch import Tensor

def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    /,
) -> Tensor | NotImplementedType: ...
