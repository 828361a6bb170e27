"""Adapters on quantised bases: the start, training, files, and what the base keeps."""

import copy

import pytest
import torch
from torch import nn

import tether
from tether.errors import UnsupportedModuleError
from tether.start import Search, find, site

from .bases import INPUT, MAKERS, batch, floats, four_bit, net, stored


def train(handle: tether.Handle, steps: int = 8) -> list[float]:
    inputs, targets = batch()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (handle.model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora", "milora", "lora"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_life(name, init, settings, tmp_path):
    model, inputs = MAKERS[name](net()), batch()[0]
    base, before = model(inputs).detach(), stored(model)
    objects = dict(model.named_parameters())
    handle = tether.attach(model, tether.LoraConfig(init=init, rank=4, **settings))
    assert torch.equal(model(inputs), base)
    losses = train(handle)
    assert losses[-1] < 0.9 * losses[0]
    live = model(inputs).detach()
    assert (live - base).abs().max() > 0.1
    with handle.disabled():
        assert torch.equal(model(inputs), base)
    handle.save(tmp_path / "adapter.safetensors")
    other = tether.attach(MAKERS[name](net()), tether.load(tmp_path / "adapter.safetensors"))
    assert torch.equal(other.model(inputs), live)
    report = tether.save_as_lora(handle, tmp_path / "lora", verify=inputs)
    assert report.verification.error < 1e-5  # rounding of float32
    handle.detach()
    assert torch.equal(model(inputs), base)
    assert stored(model) == before
    assert dict(model.named_parameters()).keys() == objects.keys()
    assert all(p is objects[n] for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "torchao int8"])
def test_half_precision(name, dtype):
    model = MAKERS[name](net().to(dtype))
    for module in model:
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    inputs = batch()[0].to(dtype)
    base = model(inputs)
    handle = tether.attach(model, tether.LoraConfig(rank=4))
    output = model(inputs)
    assert output.dtype == dtype
    assert torch.equal(output, base)
    output.float().square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith(".dB"))
    handle.detach()


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_reach_the_factors_through_the_quantised_layers(name):
    """Beside the same values in plain layers."""
    quantised = MAKERS[name](net())
    plain, (inputs, targets) = floats(quantised), batch()
    adapter = tether.init(quantised, tether.LoraConfig(rank=4))
    found = []
    for model in (quantised, plain):
        tether.attach(model, adapter, verify=False)
        (model(inputs) - targets).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if ".tether." in n})
    assert len(found[0]) == 4
    for key, gradient in found[0].items():
        other = found[1][key]
        error = torch.linalg.vector_norm(gradient - other) / torch.linalg.vector_norm(other)
        # bitsandbytes rounds the input of an int8 layer to 8 bits too.
        assert error < (0.05 if name == "bitsandbytes int8" else 1e-5)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_anchors_are_those_of_the_values(name, init):
    quantised = MAKERS[name](net())
    config = tether.LoraConfig(init=init, rank=4)
    mine, plain = tether.init(quantised, config), tether.init(floats(quantised), config)
    for path, layer in mine.layers.items():
        pair = (layer.anchor, plain.layers[path].anchor)
        if name == "bitsandbytes int8":  # whose last bit it rounds otherwise
            products = [factors.B @ factors.A for factors in pair]
            torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(pair[0].A, pair[1].A)
            assert torch.equal(pair[0].B, pair[1].B)
    assert not mine.provenance.gaps


def test_dora_measures_the_rows_of_the_quantised_weight():
    model = four_bit(net())
    adapter = tether.init(model, tether.LoraConfig(rank=4, use_dora=True))
    lengths = torch.linalg.vector_norm(floats(model)[0].weight.double(), dim=1).float()
    assert torch.equal(adapter.layers["0"].magnitude.anchor, lengths)
    handle = tether.attach(model, adapter)
    train(handle, 3)
    # W' = m·(W + ΔW)/|W + ΔW| on the values in plain layers.
    twin = tether.attach(floats(model), handle.snapshot())
    torch.testing.assert_close(twin.model(batch()[0]), model(batch()[0]), rtol=1e-5, atol=1e-6)


def test_anchors_are_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_NO_CACHE", "0")
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    monkeypatch.setattr(site, "_CACHED", 1)
    config = tether.LoraConfig(rank=4)
    for name, make in MAKERS.items():
        first = find(make(net()), config, Search())
        assert first.cached == 0, name  # no kind is taken for another
        again = find(make(net()), config, Search())
        assert again.cached == 2
        assert again.adapter.provenance.fingerprints == first.adapter.provenance.fingerprints
        for path, layer in first.adapter.layers.items():
            assert torch.equal(layer.anchor.A, again.adapter.layers[path].anchor.A)
        tether.attach(make(net()), again.adapter).detach()
    assert find(net(), config, Search()).cached == 0


@pytest.mark.parametrize("name", MAKERS)
def test_merging_into_a_quantised_weight_is_refused(name):
    model = MAKERS[name](net())
    before = stored(model)
    handle = tether.attach(model, tether.LoraConfig(rank=4))
    train(handle, 2)
    live = model(batch()[0])
    with pytest.raises(UnsupportedModuleError, match=r"site '0': weight in .* is quantised \("):
        tether.merge(model, "default")
    assert torch.equal(model(batch()[0]), live)
    handle.detach()
    assert stored(model) == before


@pytest.mark.parametrize("name", MAKERS)
def test_a_quantised_module_is_not_trained_whole(name):
    config = tether.LoraConfig(rank=4, target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(UnsupportedModuleError, match=r"2.weight: .* cannot be trained whole"):
        tether.init(MAKERS[name](net()), config)


@pytest.mark.parametrize("name", MAKERS)
def test_two_adapters_a_copy_and_a_place_elsewhere(name):
    model, inputs = MAKERS[name](net()), batch()[0]
    base = model(inputs).detach()
    first = tether.attach(model, tether.LoraConfig(rank=4), name="first")
    train(first, 3)
    one = model(inputs).detach()
    second = tether.attach(model, tether.LoraConfig(rank=2, init="olora"), name="second")
    assert torch.equal(model(inputs), one)
    with tether.only(model, "second"):
        assert torch.equal(model(inputs), base)
        train(second, 3)
        assert not torch.equal(model(inputs), base)
    second.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs), one)
    first.offload()
    assert torch.equal(model(inputs), base)
    first.restore()
    tether.activate(model, "first")
    assert torch.equal(model(inputs), one)
    assert tether.handles(model)["first"].verify(inputs) is None
    assert "first" in str(first.memory())
    first.detach()
    assert torch.equal(model(inputs), base)


def test_a_conv_or_embedding_beside_quantised_layers_is_adapted_too():
    model = nn.Sequential(nn.Embedding(8, INPUT), *four_bit(net()))
    tokens = torch.arange(8)
    base = model(tokens)
    config = tether.LoraConfig(rank=4, target_modules=["0", "1", "3"])
    adapter = tether.init(model, config)
    assert adapter.provenance.quantization == ("bitsandbytes nf4",)
    assert adapter.provenance.fingerprints["0"].dtype == "float32"
    tether.attach(model, adapter)
    assert torch.equal(model(tokens), base)
