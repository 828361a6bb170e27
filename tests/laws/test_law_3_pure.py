"""Law 3: saving, converting, measuring and checking change nothing."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import tether
from laws.cases import bits, factors_of, law, state_of
from tether import algebra


@law(examples=1, wholes=True)
def test_saving_converting_and_measuring_change_nothing(case):
    model, batch = case.model(), case.batch()
    handle = case.trained(model)
    sum(output.float().square().sum() for output in model(*batch)).backward()
    model.train().linear.eval()
    before = state_of(model)
    adapter = handle.snapshot()
    values = {name: bits(tensor) for name, tensor in factors_of(adapter).items()}
    with TemporaryDirectory() as folder:
        file, plain = Path(folder, "a.safetensors"), Path(folder, "plain")
        handle.save(file)
        report = tether.save_as_lora(handle, plain)
        written = {p: p.read_bytes() for p in (file, *plain.iterdir())}
        tether.load(file)
        tether.load(plain)
        tether.save_as_lora(tether.load(file), Path(folder, "again"), rank=1)
        assert {p: p.read_bytes() for p in written} == written
    assert report.path == plain
    tether.to_lora(adapter, tolerance=0.3)
    for layer in adapter.layers.values():
        (
            algebra.delta(layer, torch.ones(layer.trainable.shape)),
            algebra.norm(layer),
            algebra.anchor_norm(layer),
        )
    tether.fingerprint(model), tether.handles(model), repr(handle)
    handle.verify({"x": batch[0], "ids": batch[1]})
    assert state_of(model) == before
    assert {name: bits(tensor) for name, tensor in factors_of(adapter).items()} == values


@law(examples=1, wholes=True)
def test_a_snapshot_shares_nothing_with_the_model(case):
    model = case.model()
    handle = case.trained(model)
    adapter = handle.snapshot()
    before = {name: bits(tensor) for name, tensor in factors_of(adapter).items()}
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1)
    assert {name: bits(tensor) for name, tensor in factors_of(adapter).items()} == before
    attached = tether.attach(model, adapter, name="other").snapshot()
    for parameter in tether.handles(model)["other"].parameters():
        parameter.data.add_(1)
    assert {name: bits(tensor) for name, tensor in factors_of(adapter).items()} == before
    assert {name: bits(tensor) for name, tensor in factors_of(attached).items()} == before
