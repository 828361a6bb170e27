"""A fingerprint is of the values: not of how they lie in memory, nor of adapters on the model."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tether
from tether import Fingerprint, LoraConfig, fingerprints
from tether.errors import BaseMismatchError
from tether.fingerprints import check_fingerprint, fingerprint_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values (24, 36), laid out differently."""
    wide = torch.zeros(48, 72, dtype=tensor.dtype)
    wide[::2, ::2] = tensor
    shifted = torch.zeros(24 * 36 + 3, dtype=tensor.dtype)
    shifted[3:] = tensor.reshape(-1)
    return {
        "transposed": tensor.T.contiguous().T,
        "strided": wide[::2, ::2],
        "offset": shifted[3:].view(24, 36),
        "flipped twice": tensor.flip(0).flip(0),
        "parameter": nn.Parameter(tensor),
        "copy": tensor.clone(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_values_in_any_layout_have_the_same_fingerprint(dtype):
    tensor = torch.randn(24, 36).to(dtype)
    expected = fingerprint_tensor(tensor)
    for name, other in layouts(tensor).items():
        assert torch.equal(other, tensor)
        assert fingerprint_tensor(other) == expected, name


def test_it_is_the_sha256_of_the_bytes_in_row_major_order():
    values = np.arange(6, dtype="<f4").reshape(2, 3) / 7
    found = fingerprint_tensor(torch.from_numpy(values.T.copy()).T)
    assert (found.shape, found.dtype) == ((2, 3), "float32")
    assert found.sha256 == hashlib.sha256(values.tobytes()).hexdigest()
    rounded = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    assert found.sha256_bfloat16 == hashlib.sha256(rounded.tobytes()).hexdigest()
    assert found.norm == pytest.approx(float(np.linalg.norm(values.astype("f8"))), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_that_is_known_is_taken_and_not_taken_again(dtype):
    tensor = torch.randn(24, 36).to(dtype)
    expected = fingerprint_tensor(tensor)
    found = fingerprint_tensor(tensor, fingerprints.sha256(tensor))
    assert (found, found.norm) == (expected, expected.norm)
    own = {torch.bfloat16: "sha256_bfloat16", torch.float16: "sha256_float16"}.get(dtype)
    given = {"sha256": "known"} | ({own: "known"} if own else {})
    assert fingerprint_tensor(tensor, "known") == replace(expected, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_digest_alone_is_that_of_the_fingerprint(dtype):
    tensor = torch.randn(24, 36).to(dtype)
    for name, other in layouts(tensor).items():
        assert fingerprints.sha256(other) == fingerprint_tensor(tensor).sha256, name


@pytest.mark.parametrize("chunk", [1, 7, 864, 10**6])
def test_the_size_of_a_piece_changes_nothing(chunk, monkeypatch):
    tensor = torch.randn(24, 36)
    expected = fingerprint_tensor(tensor)
    monkeypatch.setattr(fingerprints, "_CHUNK", chunk)
    found = fingerprint_tensor(tensor)
    assert found.norm == pytest.approx(expected.norm, rel=1e-14)
    assert replace(found, norm=expected.norm) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_or_another_shape_order_or_dtype_makes_another_fingerprint(dtype):
    tensor = torch.randn(3, 4).to(dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[2, 3] ^= 1
    other = torch.float16 if dtype != torch.float16 else torch.float32
    for change in (flipped, tensor.reshape(4, 3), tensor.flip(0), tensor.to(other)):
        assert fingerprint_tensor(change) != fingerprint_tensor(tensor)
    zeros = torch.zeros(3, 4, dtype=dtype)
    assert fingerprint_tensor(zeros) != fingerprint_tensor(-zeros)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)], ids=str)
def test_any_shape(shape):
    found = fingerprint_tensor(torch.ones(shape))
    assert found.shape == shape
    assert found.sha256 == hashlib.sha256(np.ones(shape, "<f4").tobytes()).hexdigest()


def test_the_tensor_is_only_read():
    tensor = torch.randn(24, 36, requires_grad=True).T
    before, version = tensor.detach().clone(), tensor._version
    fingerprint_tensor(tensor)
    assert torch.equal(tensor, before)
    assert tensor._version == version
    assert tensor.grad_fn is not None


# A checkpoint, the precision in which the adapter was made, and the one in which it is used.
SAME = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float64, torch.bfloat16),
    (torch.float32, torch.float64, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float16),
]


@pytest.mark.parametrize(("checkpoint", "made", "used"), SAME, ids=str)
def test_the_same_checkpoint_in_another_precision_passes(checkpoint, made, used):
    weights = torch.randn(100, 200).to(checkpoint)
    check_fingerprint("m", weights.to(used), fingerprint_tensor(weights.to(made)))


@pytest.mark.parametrize("made", [torch.float32, torch.float64], ids=str)
def test_a_float32_checkpoint_loaded_in_float16_passes(made):
    """Rounding twice, to float16 and then to bfloat16, is not rounding once."""
    weights = torch.randn(100, 200)
    check_fingerprint("m", weights.half(), fingerprint_tensor(weights.to(made)))
    check_fingerprint("m", weights.to(made), fingerprint_tensor(weights.half()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_weight_in_the_same_precision_does_not_pass(dtype):
    """Though it rounds to the same bfloat16."""
    weights = torch.randn(10, 20).bfloat16().to(dtype)
    other = weights.clone()
    other[3, 4] *= 1.001 if dtype != torch.bfloat16 else 2
    with pytest.raises(BaseMismatchError):
        check_fingerprint("m", other, fingerprint_tensor(weights))


@pytest.mark.parametrize("used", DTYPES, ids=str)
def test_another_weight_in_another_precision_does_not_pass(used):
    weights = torch.randn(10, 20)
    made = torch.bfloat16 if used != torch.bfloat16 else torch.float32
    expected = fingerprint_tensor(weights.to(made))
    for other in (weights * 1.01, weights.reshape(20, 10), weights.flip(1)):
        with pytest.raises(BaseMismatchError):
            check_fingerprint("m", other.to(used), expected)


def test_where_the_bytes_are_the_same_nothing_else_is_looked_at(monkeypatch):
    tensor = torch.randn(10, 20)
    expected = fingerprint_tensor(tensor)
    looked = []

    def spy(tensor: Tensor, sha256: str | None = None) -> Fingerprint:
        looked.append(sha256)
        return fingerprint_tensor(tensor, sha256)

    monkeypatch.setattr(fingerprints, "fingerprint_tensor", spy)
    check_fingerprint("m", tensor, expected)
    check_fingerprint("m", expected, expected)
    assert not looked
    # In another precision the digest of its own bytes says nothing yet.
    check_fingerprint("m", tensor.bfloat16(), expected)
    assert looked == [None]
    with pytest.raises(BaseMismatchError, match=r"float32 \(20, 10\)"):
        check_fingerprint("m", tensor.reshape(20, 10), expected)
    other = tensor.clone()
    other[3, 4] += 1
    with pytest.raises(BaseMismatchError, match=fingerprints.sha256(other)[:12]):
        check_fingerprint("m", other, expected)
    assert looked[1:] == [expected.sha256, fingerprints.sha256(other)]


def test_a_mismatch_names_the_site_both_values_and_what_to_do():
    expected = fingerprint_tensor(torch.zeros(2, 3))
    with pytest.raises(BaseMismatchError) as caught:
        check_fingerprint("layers.0.up", torch.ones(3, 2).bfloat16(), expected)
    found = fingerprint_tensor(torch.ones(3, 2).bfloat16())
    for word in (
        "site 'layers.0.up'",
        f"bfloat16 (3, 2) sha256 {found.sha256[:12]}",
        f"float32 (2, 3) sha256 {expected.sha256[:12]}",
        "verify=False",
    ):
        assert word in str(caught.value)


def test_a_whole_model(tiny_llama):
    model = tiny_llama()
    found = tether.fingerprint(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(isinstance(value, Fingerprint) for value in found.values())
    assert found == tether.fingerprint(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    other = tether.fingerprint(model)
    assert {name for name in found if found[name] != other[name]} == {
        "model.layers.1.mlp.up_proj.weight"
    }


def test_attached_adapters_are_not_part_of_the_model(tiny_llama):
    model = tiny_llama()
    before = tether.fingerprint(model)
    handles = [
        tether.attach(model, LoraConfig(init=init, rank=2), name=init) for init in ("pissa", "lora")
    ]
    for parameter in handles[0].parameters():
        parameter.data += 1
    assert tether.fingerprint(model) == before
    assert handles[0].snapshot().provenance.fingerprints == {
        path: before[f"{path}.weight"] for path in handles[0].sites
    }
    for handle in handles:
        handle.detach()
    assert tether.fingerprint(model) == before


def test_only_floating_parameters_count():
    model = nn.Linear(2, 2)
    model.whole = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model.register_buffer("state", torch.ones(2))
    assert set(tether.fingerprint(model)) == {"weight", "bias"}
