"""Attaching to a model that is wrapped or sharded already: refused, with what to do instead."""

import logging

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tether
from tether.errors import DistributedError, ShardedWeightError

CONFIG = tether.LoraConfig(init="lora", rank=2)
FSDP1_NOTICE = pytest.mark.filterwarnings("ignore:.*FSDP:FutureWarning", "ignore:FSDP:UserWarning")


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def refusals(model: nn.Module, error: type[Exception], words: str) -> None:
    """Every way to attach raises, and leaves the model as it is."""
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    adapter = tether.init(make_model(), CONFIG, distributed=False)
    for call in (
        lambda: tether.attach(model, CONFIG),
        lambda: tether.attach(model, adapter, trainable=False),
        lambda: tether.init(model, CONFIG),
    ):
        with pytest.raises(error, match=words):
            call()
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert not tether.handles(model)


def test_after_ddp(mesh):
    model = DistributedDataParallel(make_model())
    words = r"the model is a DistributedDataParallel, .* Attach to the model itself, then wrap it\."
    refusals(model, DistributedError, words)
    inside = nn.Sequential(model)
    refusals(inside, DistributedError, r"module '0' is a DistributedDataParallel")


def test_after_fully_shard(mesh):
    model = make_model()
    fully_shard(model[1], mesh=mesh)
    refusals(model, ShardedWeightError, r"module '1' is sharded by fully_shard.*Attach before")
    fully_shard(model, mesh=mesh)
    refusals(model, ShardedWeightError, r"the model is sharded by fully_shard.*Attach before")


def test_after_fully_shard_while_the_weights_are_gathered(mesh):
    model = make_model()
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model(torch.ones(1, 8))
    # No DTensor, and yet no parameter that a new adapter could be trained beside.
    assert type(model[0].weight.data) is torch.Tensor
    refusals(model, ShardedWeightError, "the model is sharded by fully_shard")


@FSDP1_NOTICE
def test_after_fsdp1(mesh):
    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    refusals(model, ShardedWeightError, r"FSDP1.*shard it with fully_shard \(FSDP2\)")


@FSDP1_NOTICE
def test_what_fsdp1_has_flattened_is_not_read(mesh, tmp_path):
    model = make_model()
    handle = tether.attach(model, CONFIG)
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    words = r"site '0': A is in a FullyShardedDataParallel \(FSDP1\).*fully_shard \(FSDP2\)"
    calls = (handle.snapshot, handle.detach, handle.source, lambda: handle.save(tmp_path / "a"))
    for call in (*calls, lambda: tether.save_as_lora(handle, tmp_path / "lora")):
        with pytest.raises(ShardedWeightError, match=words):
            call()
    assert handle.attached
    assert not list(tmp_path.iterdir())


def test_after_zero_3():
    model = make_model()
    model[1].weight.ds_id = 3  # as DeepSpeed marks what it partitions
    words = r"1\.weight is partitioned by DeepSpeed \(ZeRO-3\).* call deepspeed\.initialize after"
    refusals(model, ShardedWeightError, words)


def test_what_zero_3_has_partitioned_is_not_read():
    model = make_model()
    handle = tether.attach(model, CONFIG)
    factor = model[1].get_parameter("tether.default.A")
    value, factor.ds_id = factor.data, 5
    handle.snapshot()
    factor.data = torch.empty(0)
    words = r"site '1': A is partitioned by DeepSpeed.*GatheredParameters\(list\(handle\.param"
    with pytest.raises(ShardedWeightError, match=words):
        handle.snapshot()
    factor.data = value
    handle.snapshot()


def test_a_limit_leaves_a_sharded_adapter_where_it_is(mesh, tmp_path, caplog):
    model = make_model()
    tether.attach(model, CONFIG, "a", trainable=False)
    tether.attach(model, CONFIG, "b", trainable=False)
    tether.activate(model, "a")
    fully_shard(model, mesh=mesh)
    with caplog.at_level(logging.WARNING, "tether"):
        assert tether.limit(model, 1, to=tmp_path) == []
    assert "adapter 'b' stays on the model: site '0': A is a DTensor" in caplog.text
    assert not tether.handles(model)["b"].offloaded


def test_an_optimizer_made_after_an_evaluation_trains_what_is_sharded(mesh):
    model = make_model()
    handle = tether.attach(model, CONFIG)
    fully_shard(model, mesh=mesh)
    sharded = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        model(torch.ones(1, 8))  # after which FSDP2 keeps copies of the parameters gathered
    assert {id(parameter) for parameter in model.parameters()}.isdisjoint(sharded)
    assert {id(parameter) for parameter in handle.parameters()} <= sharded
