"""Starts of a model without values, its weights read from its folder one by one."""

import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tether
from tether import errors, formats
from tether.checkpoint import Checkpoint
from tether.integrations import hub
from tether.start import Search, find
from tether.start import adapter as adapters
from tether.start.site import Job, Start

from .cases import counting, everything, llama, stack

CONFIG = tether.LoraConfig(rank=4, use_dora=True)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=["10GB", "200KB"])
def folder(request, dtype, tmp_path_factory) -> Path:
    """A saved Llama, in one file or in several; not to be changed."""
    path = tmp_path_factory.mktemp("llama") / "model"
    llama().to(dtype).save_pretrained(path, max_shard_size=request.param)
    shards = len(list(path.glob("*.safetensors")))
    assert shards == 1 if request.param == "10GB" else shards > 2
    return path


@pytest.fixture
def copied(tmp_path) -> Path:
    """A saved Llama that may be changed."""
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, name: str, tensor: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors if tensor is None else tensors | {name: tensor}, path, {"format": "pt"})


@pytest.mark.parametrize("init", ["pissa", "olora", "milora", "lora"])
def test_the_adapter_is_that_of_the_loaded_model(init, folder, dtype):
    config = tether.LoraConfig(init=init, rank=4, use_dora=True, rank_pattern={"q_proj": 7})
    loaded = hub.load_model(str(folder), dtype, "cpu")
    expected = everything(tether.init(loaded, config))
    skeleton = hub.skeleton(str(folder))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    for workers in (1, 3):
        found = everything(tether.init(skeleton, config, weights_from=folder, workers=workers))
        assert found == expected
    provenance = expected["provenance"]
    assert provenance.base_model == str(folder)
    assert provenance.base_class.endswith(".LlamaForCausalLM")
    assert {f.dtype for f in provenance.fingerprints.values()} == {str(dtype)[6:]}


def test_the_adapter_attaches_to_the_loaded_model(folder, dtype):
    adapter = tether.init(hub.skeleton(str(folder)), CONFIG, weights_from=str(folder))
    model = hub.load_model(str(folder), dtype, "cpu")
    ids = torch.arange(8)[None]
    before = model(ids).logits
    tether.attach(model, adapter)
    assert torch.equal(model(ids).logits, before)


def test_what_is_read_from_a_folder_is_cached_for_the_loaded_model(folder, dtype, anchors):
    first = find(hub.skeleton(str(folder)), CONFIG, Search(weights_from=folder))
    loaded = hub.load_model(str(folder), dtype, "cpu")
    with counting() as calls:
        second = find(loaded, CONFIG, Search())
    # k_proj and v_proj have fewer values than are cached.
    assert (first.cached, second.cached) == (0, 10)
    assert {path.rsplit(".", 1)[-1] for path in calls} == {"k_proj", "v_proj"}
    assert everything(first.adapter) == everything(second.adapter)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_weight_a_worker_is_in_memory(workers, folder, monkeypatch):
    read, living, most, lock = [], set(), [], threading.Lock()
    tensor = Checkpoint.tensor

    def spy(self: Checkpoint, name: str) -> Tensor:
        found = tensor(self, name)
        with lock:
            read.append(name)
            living.add(name)
            most.append(len(living))
            weakref.finalize(found, living.discard, name)
        return found

    monkeypatch.setattr(Checkpoint, "tensor", spy)
    adapter = tether.init(hub.skeleton(str(folder)), CONFIG, weights_from=folder, workers=workers)
    assert sorted(read) == sorted(f"{path}.weight" for path in adapter.layers)
    assert max(most) <= workers
    assert not living


def test_gpt2_stores_its_weights_transposed_and_under_shorter_names(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    wanted = tether.LoraConfig(rank=4, use_dora=True, target_modules=["all-linear", "wte"])
    loaded = hub.load_model(str(tmp_path), torch.float32, "cpu")
    found = tether.init(hub.skeleton(str(tmp_path)), wanted, weights_from=tmp_path)
    assert everything(found) == everything(tether.init(loaded, wanted))
    kinds = {layer.layout.kind for layer in found.layers.values()}
    assert kinds == {"transposed", "embedding"}


def test_any_module_will_do(tmp_path):
    model = stack()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = stack_without_values()
    found = tether.init(empty, CONFIG, weights_from=tmp_path)
    assert everything(found) == everything(tether.init(model, CONFIG))


def stack_without_values() -> nn.Module:
    return nn.ModuleList(nn.Linear(m.in_features, m.out_features) for m in stack())


def skeleton_error(folder: Path, config: tether.LoraConfig = CONFIG, **search: object) -> str:
    """The error of a start from a folder; no site may have been begun."""
    with counting() as calls, pytest.raises(errors.TetherError) as caught:
        tether.init(skeleton(), config, weights_from=search.pop("weights_from", folder), **search)
    assert not calls
    return f"{type(caught.value).__name__}: {caught.value}"


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return llama()


Q = "model.layers.1.self_attn.q_proj"


def test_a_tied_head_is_named(copied):
    said = skeleton_error(copied, tether.LoraConfig(rank=4, target_modules=["lm_head"]))
    assert said.startswith(f"UnknownNameError: {copied}: has no 'lm_head.weight' of its own: the ")
    assert "Untie it" in said


def test_a_missing_tensor_is_named(copied):
    change_weights(copied, f"{Q}.weight", None)
    said = skeleton_error(copied)
    assert said.startswith(f"UnknownNameError: {copied}: has no tensor '{Q}.weight'. Nearest: ")


def test_the_folder_of_another_model_is_named(copied):
    change_weights(copied, f"{Q}.weight", torch.ones(128, 130))
    assert skeleton_error(copied) == (
        f"ShapeMismatchError: site {Q!r}: the model's weight is (128, 128), that of {copied} is "
        "(128, 130). Give the folder of the same model."
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_weight_is_found_out_before_the_work(dtype, copied):
    change_weights(copied, f"{Q}.weight", torch.ones(128, 128).to(dtype))
    assert skeleton_error(copied) == (
        f"UnsupportedModuleError: site {Q!r}: the weight in {copied} is {dtype}, which is "
        "quantised. Give the folder of the model before quantisation, or exclude the module."
    )


def test_a_nan_on_disk_is_named(copied):
    change_weights(copied, f"{Q}.weight", torch.full((128, 128), torch.nan))
    with pytest.raises(errors.NonFiniteError, match=rf"^site '{Q}': weight \(128, 128\): 16384 of"):
        tether.init(skeleton(), CONFIG, weights_from=copied)


def test_pickles_and_missing_folders_are_refused(copied):
    missing = copied / "none"
    said = skeleton_error(copied, weights_from=missing)
    assert said == f"ModelError: {missing}: is not a folder. Give the folder of a model."
    (copied / "model.safetensors").unlink()
    assert skeleton_error(copied).startswith(f"ModelError: {copied}: holds neither")
    torch.save({}, copied / "pytorch_model.bin")
    said = skeleton_error(copied)
    assert said.startswith(f"PickleRefusedError: {copied / 'pytorch_model.bin'}: is a pickle")


@pytest.mark.parametrize(
    "settings", [{"bias": "all"}, {"modules_to_save": ["model.norm"]}], ids=["bias", "modules"]
)
def test_what_is_trained_whole_needs_the_model_itself(settings, copied):
    config = tether.LoraConfig(rank=4, **settings)
    said = skeleton_error(copied, config)
    assert said.startswith("MetaTensorError: ")
    for words in (
        f"bias={config.bias!r} and modules_to_save={list(config.modules_to_save)}",
        f"from {copied} only the weights of the sites are read",
        "Load the model with its values, or use bias='none' and no modules_to_save",
    ):
        assert words in said


def test_a_model_with_values_can_train_parameters_whole_beside_weights_from_disk(copied):
    config = tether.LoraConfig(rank=4, modules_to_save=["model.norm"])
    found = tether.init(llama(), config, weights_from=copied)
    assert list(found.modules) == ["model.norm"]
    assert everything(found)["tensors"] == everything(tether.init(llama(), config))["tensors"]


def test_a_model_without_values_and_a_folder_is_refused():
    with pytest.raises(errors.MetaTensorError, match="is on the meta device, without values"):
        tether.init(skeleton(), CONFIG)


def test_whole_parameters_are_checked_before_the_work():
    model = llama(attention_bias=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[0] = torch.nan
    with counting() as calls, pytest.raises(errors.NonFiniteError, match=r"q_proj.bias: 1 of 128"):
        tether.init(model, tether.LoraConfig(rank=4, bias="all"))
    assert not calls


def test_weights_from_disk_are_found_on_the_cpu_wherever_the_model_is(copied, monkeypatch):
    seen = []
    real = adapters.find_all

    def spy(jobs: list[Job], find: object, workers: int, progress: object) -> dict[str, Start]:
        seen.append(workers)
        return real(jobs, find, workers, progress)

    monkeypatch.setattr(adapters, "find_all", spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    # What a GPU's parameter says of itself.
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda:0"), raising=False)
    tether.init(llama(), CONFIG, weights_from=copied)
    tether.init(llama(), tether.LoraConfig(rank=2, target_modules=["q_proj"]))
    assert seen == [3, 1]


def test_the_file_of_a_skeletons_adapter_is_the_same(copied, tmp_path):
    adapter = tether.init(hub.skeleton(str(copied)), CONFIG, weights_from=copied)
    formats.save(adapter, tmp_path / "a.safetensors")
    loaded = tether.load(tmp_path / "a.safetensors")
    assert everything(loaded) == everything(adapter)
    assert json.dumps(dict(loaded.config)) == json.dumps(CONFIG.to_dict())


def test_a_sharded_folder_without_a_shard_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    sharded = shutil.copytree(tmp_path / "model", tmp_path / "cut")
    gone = sorted(sharded.glob("*.safetensors"))[0]
    gone.unlink()
    said = skeleton_error(sharded)
    assert said.startswith(f"HeaderError: {gone}: there is no such file.")
