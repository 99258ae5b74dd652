"""The generator and the dropout mask, against published vectors and against probability."""

import pytest
import torch

from gauge_ext.ops import reference

# Known-answer vectors of Philox4x32-10 from the Random123 distribution (kat_vectors).
ZEROS, ONES = "00000000 00000000", "ffffffff ffffffff"
PI = "243f6a88 85a308d3 13198a2e 03707344"
KNOWN = [
    (f"{ZEROS} {ZEROS}", ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (f"{ONES} {ONES}", ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI, "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = _words(key)
    unsigned = low | (high << 32)
    signed = unsigned - 2**64 if unsigned >= 2**63 else unsigned
    words = reference.philox(torch.tensor(_words(counter)), torch.tensor(signed))
    assert words.tolist() == _words(expected)


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share_and_the_expectation(dropout_p: float) -> None:
    mask = reference.dropout_mask(500, 1000, dropout_p, torch.tensor(7))
    kept = (mask != 0).double().mean().item()
    deviation = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    # p is rounded to a multiple of 2**-16, which is at most 2**-17 off.
    assert abs(kept - (1 - dropout_p)) < 5 * deviation + 2**-17
    rounded = round(dropout_p * 65536) / 65536
    assert mask[mask != 0].unique().tolist() == [pytest.approx(1 / (1 - rounded), rel=1e-15)]


def test_mask_depends_on_seed_row_and_column_alone() -> None:
    wide = reference.dropout_mask(20, 300, 0.5, torch.tensor(3))
    narrow = reference.dropout_mask(7, 130, 0.5, torch.tensor(3))
    assert torch.equal(wide[:7, :130], narrow)
    other = reference.dropout_mask(20, 300, 0.5, torch.tensor(4))
    agreement = (wide == other).double().mean().item()
    assert 0.45 < agreement < 0.55


def test_mask_has_no_correlation_between_neighbours() -> None:
    kept = (reference.dropout_mask(400, 1024, 0.5, torch.tensor(11)) != 0).double() - 0.5
    for lag in (1, 2, 15, 16, 17, 64, 127, 128):
        along_columns = (kept[:, lag:] * kept[:, :-lag]).mean().item() * 4
        along_rows = (kept[lag:] * kept[:-lag]).mean().item() * 4
        assert abs(along_columns) < 0.01
        assert abs(along_rows) < 0.01


@pytest.mark.parametrize(("dropout_p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_mask_at_the_ends(dropout_p: float, value: float) -> None:
    mask = reference.dropout_mask(3, 5, dropout_p, torch.tensor(0))
    assert torch.equal(mask, torch.full((3, 5), value, dtype=torch.float64))


def test_lora_linear_by_hand() -> None:
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.5, -0.5])
    lora_A, lora_B = torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0], [4.0]])
    # A x = 3 - 2 = 1, B A x = (2, 4), times 0.25.
    y = reference.lora_linear(x, weight, bias, lora_A, lora_B, 0.25)
    assert torch.equal(y, torch.tensor([[1.0 + 0.5 + 0.5, 2.0 - 0.5 + 1.0]]))


def test_dropout_without_seed_is_refused() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="seed must be"):
        reference.lora_linear(ones, ones, None, ones, ones, 1.0, 0.5)
