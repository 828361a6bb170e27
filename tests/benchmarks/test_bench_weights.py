"""The matrices, the truth about them, and errors against it: as numpy has them."""

import numpy as np
import pytest
import torch

from tether.integrations import smollm2


def numpy_best(weight, rank):
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def test_a_spectrum_is_resampled_log_linearly_between_quantiles(script, values):
    weights = script("weights")
    assert torch.equal(weights.resample(values, 40).log().exp(), weights.resample(values, 40))
    torch.testing.assert_close(weights.resample(values, 40), values)
    for count in (7, 100):
        at = (np.arange(count) + 0.5) / count * 40 - 0.5
        wanted = np.exp(np.interp(at, np.arange(40), values.log().numpy()))
        np.testing.assert_allclose(weights.resample(values, count).numpy(), wanted, rtol=1e-13)


def test_a_made_matrix_has_the_spectrum_and_the_same_bits_every_time(script, values):
    weights = script("weights")
    one, two = (weights.make((90, 60), values, seed=3) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, weights.make((90, 60), values, seed=4).weight)
    found = np.linalg.svd(one.weight.double().numpy(), compute_uv=False)
    # float32 factors and product: a few units of 6e-8 of the largest.
    np.testing.assert_allclose(found, weights.resample(values, 60).numpy(), atol=1e-6 * found[0])


def test_the_truth_of_a_large_matrix_is_numpys(script, values, monkeypatch):
    weights = script("weights")
    monkeypatch.setattr(weights, "SMALL", 0)
    monkeypatch.setattr(weights, "LEADING", 60)
    matrix = weights.make((150, 120), values)
    u, s, vt = numpy_best(matrix.weight, 20)
    assert matrix.s.shape == (20,)
    np.testing.assert_allclose(matrix.s.numpy(), s, rtol=1e-12)
    for rank in (1, 5, 20):
        best = matrix.best(rank)
        wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
        error = np.linalg.norm((best.left @ best.right).numpy() - wanted)
        assert error <= 1e-7 * np.linalg.norm(wanted)


def test_the_truth_forgives_where_it_started(script, monkeypatch):
    weights = script("weights")
    monkeypatch.setattr(weights, "SMALL", 0)
    steep = torch.logspace(0, -6, 120, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, 120, dtype=torch.float64))[0] for n in (150, 120))
    # Off by 1e-3; two rounds of WᵀW divide that by (s20 / s60)^4 = 1e8.
    start = v[:, :60] + 1e-3 * torch.randn(120, 60, dtype=torch.float64)
    found = weights._leading((u * steep) @ v.T, start)[1]
    np.testing.assert_allclose(found.numpy(), steep[:20].numpy(), rtol=1e-12)


def test_a_truth_that_is_none_is_refused(script, monkeypatch):
    weights = script("weights")
    monkeypatch.setattr(weights, "SMALL", 0)
    matrix = torch.randn(150, 120)
    with pytest.raises(ValueError, match=r"matrix \(150, 120\) have a residual of .* is needed"):
        weights._leading(matrix, torch.randn(120, 60))


def test_a_models_own_matrices_are_found_by_shape(script, tiny_smollm2):
    weights = script("weights")
    file = smollm2.folder() / "model.safetensors"
    shapes = weights.shapes(file)
    assert sorted(shapes.values()) == [(8, 16), (16, 16), (16, 24), (24, 16)]
    for part, shape in shapes.items():
        matrix = weights.real(file, part, part)
        assert torch.equal(matrix.weight, tiny_smollm2.get_submodule(part).weight)
        assert matrix.weight.shape == shape
        np.testing.assert_allclose(matrix.s.numpy(), numpy_best(matrix.weight, min(shape))[1])
    with pytest.raises(ValueError, match=r"holds no weight named \*no_such\*\.weight"):
        weights.spectrum(file, "no_such")


def test_the_middle_layer_is_the_middle_by_number(script, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({f"layers.{n}.up.weight": torch.full((2, 2), float(n)) for n in range(30)}, file)
    assert float(script("weights").spectrum(file, "up")[0]) == pytest.approx(28)
    assert script("weights").shapes(file) == {"layers.14.up": (2, 2)}


def factors_near(matrix, rank, size):
    generator = torch.Generator().manual_seed(5)
    best = matrix.best(rank)
    noise = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) * size
        for t in (best.left, best.right)
    ]
    return best.left + noise[0], best.right + noise[1], best


def test_errors_are_those_of_dense_algebra(script, values):
    weights = script("weights")
    matrix = weights.make((90, 60), values)
    b, a, best = factors_near(matrix, 5, 0.05)
    found = weights.accuracy(matrix.weight, b, a, best)
    w, product = matrix.weight.double().numpy(), (b @ a).numpy()
    u, s, vt = numpy_best(matrix.weight, 5)
    wanted = (u * s) @ vt
    norm = np.linalg.norm
    # Where nothing cancels, dense algebra in float64 has twelve digits and more.
    assert found["product error"] == pytest.approx(norm(product - wanted) / norm(wanted), rel=1e-10)
    assert found["excess"] == pytest.approx(norm(w - product) / norm(w - wanted) - 1, rel=1e-10)
    cosines = np.linalg.svd(np.linalg.qr(a.numpy().T)[0].T @ vt.T, compute_uv=False)
    assert found["angle"] == pytest.approx(np.arccos(cosines.min()), rel=1e-8)
    assert 0.01 < found["angle"] < 1


def test_small_errors_do_not_drown_in_rounding(script, values):
    weights = script("weights")
    matrix = weights.make((90, 60), values)
    best = matrix.best(5)
    exact = weights.accuracy(matrix.weight, best.left, best.right, best)
    assert max(map(abs, exact.values())) < 1e-14
    # One singular value off by δ adds δ² to |W − P|²; one vector turned by δ, an angle of δ.
    lost = float(np.linalg.norm(matrix.weight.double() - best.left @ best.right))
    left = best.left.clone()
    left[:, 0] += 1e-5 * lost * matrix.u[:, 0]
    found = weights.accuracy(matrix.weight, left, best.right, best)
    assert found["excess"] == pytest.approx(0.5e-10, rel=1e-3)
    assert found["product error"] == pytest.approx(1e-5 * lost / float(matrix.s[:5].norm()))
    right = best.right.clone()
    right[4] += 1e-9 * matrix.vt[5]
    assert weights.largest_angle(right, best.right) == pytest.approx(1e-9, rel=1e-3)


def test_panels_change_nothing(script, values, monkeypatch):
    weights = script("weights")
    matrix = weights.make((90, 60), values)
    b, a, best = factors_near(matrix, 5, 1e-3)
    whole = weights.accuracy(matrix.weight, b, a, best)
    monkeypatch.setattr(weights, "PANEL", 7)
    assert weights.accuracy(matrix.weight, b, a, best) == pytest.approx(whole, rel=1e-6)


def test_olora_is_judged_by_the_leading_part_of_numpys_qr(script):
    best = script("weights").qr_best(weight := torch.randn(50, 40), 6)
    q, r = np.linalg.qr(weight.double().numpy())
    np.testing.assert_allclose((best.left @ best.right).numpy(), q[:, :6] @ r[:6], atol=1e-12)
