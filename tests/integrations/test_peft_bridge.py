"""The bridge to peft: what it keeps, what it notices, what it refuses, and all or nothing."""

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tether
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    HeaderError,
    MergedError,
    NotAnAdapterError,
    PickleRefusedError,
    ShapeMismatchError,
    TruncatedFileError,
    UnknownNameError,
    UnsupportedAdapterError,
    UntrackedError,
)
from tether.integrations.peft import adopt, is_peft, read, save_as_lora, snapshot, track

from .peft_models import (
    Make,
    Net,
    Q,
    add,
    delta,
    distance,
    layers,
    logits,
    save,
    state_of,
    train,
    truth,
    wrap,
)

# What is kept.


def test_the_start_is_kept_on_the_model_and_nowhere_else(untied: Make) -> None:
    model = wrap(untied())
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    parameters = [id(p) for p in model.parameters()]
    tracker = track(model)
    assert repr(tracker) == "<Tracker: {'default': 6} sites>"
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert [id(p) for p in model.parameters()] == parameters
    part = tracker.adapters["default"].parts[Q]
    live = layers(model)[Q].lora_A["default"].weight
    assert torch.equal(part.factors.A, live)
    assert part.factors.A.data_ptr() != live.data_ptr()
    assert not part.factors.A.requires_grad


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_take_it_along(untied: Make, how: str) -> None:
    model = wrap(untied())
    track(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    train(twin)
    change = snapshot(twin).layers[Q]
    assert distance(delta(change), truth(twin, untied(), Q)) < 1e-5
    assert not delta(snapshot(model).layers[Q]).any()


def test_tracking_again_keeps_the_first_start(untied: Make) -> None:
    model = wrap(untied())
    track(model)
    train(model)
    track(model)
    assert distance(delta(snapshot(model).layers[Q]), truth(model, untied(), Q)) < 1e-5


def test_an_adapter_added_later_is_tracked_later(untied: Make) -> None:
    model = wrap(untied())
    track(model)
    train(model)
    add(model, "late")
    with pytest.raises(UntrackedError, match=r"adapter 'late' was made with init.*'pissa'"):
        snapshot(model, "late")
    track(model)
    model.set_adapter("late")
    train(model)
    base = untied()
    lacking = truth(model, base, Q, "late")
    start = layers(model)[Q]
    adapter = snapshot(model)
    taken = snapshot(model, "default").layers[Q].anchor
    part = start.scaling["default"] * (taken.B.double() @ taken.A.double())
    assert distance(delta(adapter.layers[Q]), lacking + part) < 1e-5


def test_one_adapter_can_be_tracked_by_name(untied: Make) -> None:
    model = wrap(untied())
    add(model, "other")
    track(model, "other")
    assert snapshot(model, "other").anchored
    with pytest.raises(UntrackedError, match="'default'"):
        snapshot(model, "default")
    with pytest.raises(UnknownNameError, match=r"no adapter 'othr'. Nearest: 'other'"):
        track(model, "othr")


def test_an_adapter_made_again_under_its_name_is_another_one(untied: Make) -> None:
    model = wrap(untied())
    add(model, "kept", True)
    track(model)
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("default")
    add(model, "default")
    with pytest.raises(UntrackedError, match="'default'"):
        snapshot(model, "default")
    track(model)
    model.set_adapter("default")
    train(model)
    # The part of the deleted one is still missing in the weight, and comes back too.
    handle = adopt(model)
    report = handle.restored[Q]
    found, base = handle.model.get_submodule(Q).weight, untied().get_submodule(Q).weight
    assert distance(found, base) < report.error < 3e-6


def test_biases_and_their_start(tiny_llama: Make) -> None:
    def make() -> nn.Module:
        base = tiny_llama(attention_bias=True, tie_word_embeddings=False).eval()
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.data += torch.linspace(0.1, 1, len(parameter))
        return base

    model = wrap(make(), bias="lora_only")
    track(model)
    train(model)
    adapter = snapshot(model)
    assert set(adapter.biases) == {p for p in adapter.layers if "up_proj" not in p}
    for path, bias in adapter.biases.items():
        assert torch.equal(bias.anchor, make().get_submodule(path).bias)
        assert torch.equal(bias.anchor + bias.trainable, layers(model)[path].base_layer.bias)
        assert bias.trainable.abs().min() > 0

    forgotten = wrap(make(), True, bias="lora_only")
    train(forgotten)
    values = snapshot(forgotten).biases
    assert all(bias.anchor is None for bias in values.values())
    assert torch.equal(values[Q].trainable, layers(forgotten)[Q].base_layer.bias)
    before = state_of(forgotten)
    with pytest.raises(UntrackedError, match=r"bias of '.*q_proj' is trained.*base="):
        adopt(forgotten)
    assert state_of(forgotten) == before


def test_what_tether_cannot_tell_apart_without_peft() -> None:
    code = (
        "import sys, torch, tether.integrations.peft as bridge; "
        "print(bridge.read(torch.nn.Linear(1, 1)), bridge.read(None), 'peft' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["None", "None", "False"]


def test_read_takes_peft_models_with_a_lora_only(untied: Make) -> None:
    model = wrap(untied())
    with pytest.raises(UntrackedError):
        read(model)
    track(model)
    assert set(read(model).layers) == set(layers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        other = peft.get_peft_model(untied(), config)
    for source in (other, untied(), snapshot(model), "model"):
        assert not is_peft(source)
        assert read(source) is None
    with pytest.raises(ConfigError, match="LlamaForCausalLM is no peft model with a LoRA"):
        snapshot(untied())


def test_a_compiled_model_is_looked_into(untied: Make) -> None:
    model = wrap(untied())
    track(torch.compile(model))
    assert set(read(torch.compile(model)).layers) == set(layers(model))


def test_which_adapter_is_meant(untied: Make) -> None:
    model = wrap(untied(), True)
    add(model, "other", True)
    assert snapshot(model).layers[Q].rank == 3
    model.set_adapter("other")
    assert snapshot(model).layers[Q].rank == 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnknownNameError, match=r"\['default', 'other'\] are active; name one"):
        snapshot(model)


# What is noticed.


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("lr", [1e-2, 2e-5])
def test_training_that_has_begun_is_noticed(untied: Make, init: str, lr: float) -> None:
    model = wrap(untied(), init)
    track(model)
    model = wrap(untied(), init)
    optimizer = train(model, 1, lr)
    with pytest.raises(UntrackedError, match="have gradients, so training may have begun"):
        track(model)
    optimizer.zero_grad()
    with pytest.raises(UntrackedError, match="not those that it started with"):
        track(model)
    assert "_tether_tracker" not in vars(model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_trained_adapter_that_was_loaded_is_noticed(
    untied: Make, init: str, tmp_path: Path
) -> None:
    """As on resuming: peft splits the base anew and puts trained factors beside it."""
    model = wrap(untied(), init)
    train(model)
    save(model, tmp_path / "trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(untied(), tmp_path / "trained", is_trainable=True)
    with pytest.raises(UntrackedError, match="a trained adapter was loaded"):
        track(again)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_the_recipe_that_hides_the_start_is_noticed(untied: Make, init: str) -> None:
    """peft's own for saving the initial adapter: init_lora_weights = True on the live one."""
    model = wrap(untied(), init)
    model.peft_config["default"].init_lora_weights = True
    tracked = copy.deepcopy(model)
    track(tracked)
    train(tracked)
    assert distance(delta(snapshot(tracked).layers[Q]), truth(tracked, untied(), Q)) < 1e-5
    train(model)
    with pytest.raises(UntrackedError, match=r"'k_proj'|k_proj' the base's weight lacks as many"):
        snapshot(model)


def test_a_trained_plain_adapter_may_be_tracked(untied: Make) -> None:
    model = wrap(untied(), True)
    optimizer = train(model)
    optimizer.zero_grad()
    track(model)
    train(model)
    adapter = snapshot(model)
    assert not adapter.anchored
    assert distance(delta(adapter.layers[Q]), truth(model, untied(), Q)) < 1e-6


def test_a_merged_adapter(untied: Make) -> None:
    model = wrap(untied())
    track(model)
    model.merge_adapter()
    for call in (snapshot, track, adopt):
        with pytest.raises(MergedError, match=r"\['default'\] are merged.*unmerge_adapter"):
            call(model)
    model.unmerge_adapter()
    assert snapshot(model).anchored


def test_a_scaling_that_was_changed(untied: Make) -> None:
    model = wrap(untied())
    track(model)
    layers(model)[Q].set_scale("default", 2)
    with pytest.raises(UnsupportedAdapterError, match=r"scaling is 2\.66667 now and was 1\.33333"):
        snapshot(model)
    layers(model)[Q].set_scale("default", 1)
    assert snapshot(model).layers[Q].scaling == pytest.approx(4 / 3)
    plain = wrap(untied(), True)
    layers(plain)[Q].set_scale("default", 2)
    assert snapshot(plain).layers[Q].scaling == pytest.approx(8 / 3)


# The base's folder.


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("how", ["snapshot", "track"])
def test_the_start_is_found_beside_the_base(
    untied: Make, init: str, how: str, folder: Path
) -> None:
    """Nothing was tracked or saved: what is missing in the weights says how training began."""
    model = wrap(untied(), init)
    start = {
        p: layer.lora_A["default"].weight.detach().clone() for p, layer in layers(model).items()
    }
    train(model)
    if how == "track":
        track(model, base=folder)
        adapter = snapshot(model)
    else:
        adapter = snapshot(model, base=folder)
    for path, layer in adapter.layers.items():
        wanted = truth(model, untied(), path)
        assert distance(delta(layer), wanted) < 1e-5
        # Nearest to A: the displacement is no larger than what training moved.
        moved = (layers(model)[path].lora_A["default"].weight - start[path]).norm()
        assert layer.trainable.A.norm() <= 1.01 * moved
        found = adapter.provenance.fingerprints[path]
        assert found.sha256 == tether.fingerprint(untied())[f"{path}.weight"].sha256
    handle = tether.attach(untied(), adapter)  # which checks the fingerprints
    assert distance(logits(handle.model), logits(model)) < 1e-5


def test_a_wrong_base_is_refused(untied: Make, folder: Path) -> None:
    other = untied()
    with torch.no_grad():
        other.get_submodule(Q).weight[3, 5] += 1e-4
    for init in ("pissa", True):
        model = wrap(copy.deepcopy(other), init)
        for call in (track, snapshot, adopt):
            before = state_of(model)
            with pytest.raises(BaseMismatchError, match=rf"'{Q}'.*rounding explains"):
                call(model, base=folder)
            assert state_of(model) == before
    smaller = wrap(untied(intermediate_size=20), True)
    with pytest.raises(ShapeMismatchError, match=r"up_proj.weight: \(20, 16\) in the model"):
        snapshot(smaller, base=folder)


def test_two_untracked_parts_cannot_be_told_apart(
    untied: Make, folder: Path, tmp_path: Path
) -> None:
    model = wrap(untied())
    save(model, tmp_path / "init")
    add(model, "other")
    train(model)
    with pytest.raises(UntrackedError, match=r"\['default', 'other'\] both took a part"):
        snapshot(model, base=folder)
    track(
        model,
        "default",
        anchor=tmp_path / "init",
    )
    one, other = snapshot(model, "default", base=folder), snapshot(model, "other", base=folder)
    assert not delta(other.layers[Q]).norm() > 1e-5 * delta(one.layers[Q]).norm()
    assert delta(one.layers[Q]).norm() > 1e-2


# The folder of the untrained adapter.


def change_config(**changes: object) -> Callable[[Path], None]:
    def edit(init: Path) -> None:
        import json

        path = init / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def change_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(init: Path) -> None:
        path = init / "adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        edit(tensors)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)

    return apply


KEY = f"base_model.model.{Q}.lora_A.weight"
DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), NotAnAdapterError, "no adapter_config"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        NotAnAdapterError,
        "there is no such file",
    ),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        PickleRefusedError,
        "can run code",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-7]
        ),
        TruncatedFileError,
        "cut off",
    ),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), HeaderError, "not valid"),
    "no lora": (change_config(peft_type="IA3"), NotAnAdapterError, "not the configuration"),
    "another rank": (change_config(r=4), ConfigError, "r=4, the live adapter with 3"),
    "another alpha": (change_config(lora_alpha=5), ConfigError, "lora_alpha=5"),
    "rslora": (change_config(use_rslora=True), ConfigError, "use_rslora=True"),
    "biases": (change_config(bias="all"), UnsupportedAdapterError, "bias='all'"),
    "another shape": (
        change_tensors(lambda t: t.update({KEY: t[KEY][:, :-1]})),
        ShapeMismatchError,
        r"\(3, 15\), in the live adapter \(3, 16\)",
    ),
    "bfloat16": (
        change_tensors(lambda t: t.update({KEY: t[KEY].bfloat16()})),
        ConfigError,
        "smaller than the rounding",
    ),
    "a site less": (
        change_tensors(lambda t: t.pop(KEY)),
        UnknownNameError,
        r"q_proj.lora_A.weight' the live adapter has, but not this folder",
    ),
    "a site more": (
        change_tensors(lambda t: t.update({KEY.replace("q_", "o_"): t[KEY].clone()})),
        UnknownNameError,
        r"o_proj.lora_A.weight' is in this folder, but not in the live adapter",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_is_not_the_start(
    untied: Make, damage: Callable, error: type, message: str, tmp_path: Path
) -> None:
    model = wrap(untied())
    init = save(model, tmp_path / "init")
    train(model)
    assert distance(delta(snapshot(model, anchor=init).layers[Q]), truth(model, untied(), Q)) < 1e-5
    damage(init)
    with pytest.raises(error, match=message):
        snapshot(model, anchor=init)
    with pytest.raises(error, match=message):
        track(model, anchor=init)
    assert "_tether_tracker" not in vars(model)


def test_a_folder_of_trained_factors_shows_beside_the_base(
    untied: Make, folder: Path, tmp_path: Path
) -> None:
    """As the callbacks that save the "initial" adapter on resuming write it."""
    model = wrap(untied())
    train(model)
    save(model, tmp_path / "not the start")
    train(model)
    with pytest.raises(BaseMismatchError, match="not the factors that the adapter started with"):
        snapshot(model, anchor=tmp_path / "not the start", base=folder)
    assert distance(delta(snapshot(model, base=folder).layers[Q]), truth(model, untied(), Q)) < 1e-5


# What is refused by name.


REFUSED = {
    "bias of lora_B": ({"lora_bias": True}, r"lora_bias=True"),
    "a parameter": ({"target_parameters": ["raw.table"]}, r"target_parameters=\['raw.table"),
    "another tuner": ({"use_qalora": True}, "use_qalora=True"),
    "dilation": ({"target_modules": ["odd"]}, "'odd'.*dilation"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_lora_cannot_say(settings: dict, message: str) -> None:
    model = wrap(Net(), True, **{"target_modules": ["first"]} | settings)
    for call in (snapshot, adopt):
        with pytest.raises(UnsupportedAdapterError, match=message):
            call(model)


def test_a_module_trained_whole_with_a_lora_in_it() -> None:
    model = wrap(Net(), True, target_modules=["head.0"])
    add(model, "other", True, target_modules=["first"], modules_to_save=["head"])
    with pytest.raises(UnsupportedAdapterError, match=r"'head' is trained whole.*changed twice"):
        snapshot(model, "other")


def test_tokens_trained_alone_are_refused(untied: Make) -> None:
    model = wrap(untied(), True, trainable_token_indices=[1, 2])
    with pytest.raises(UnsupportedAdapterError, match="TrainableTokensWrapper of peft is no LoRA"):
        snapshot(model)


def test_buffers_of_a_whole_module() -> None:
    model = wrap(Net(), True, target_modules=["first"], modules_to_save=["norm"])
    assert set(snapshot(model).modules) == {"norm"}
    model.train()
    model(torch.randn(2, 5, 8))
    with pytest.raises(UnsupportedAdapterError, match=r"'norm'.*buffer 'running_mean' changed"):
        snapshot(model)


def test_factors_that_are_not_here(untied: Make) -> None:
    model = wrap(untied(), True)
    weight = layers(model)[Q].lora_A["default"].weight
    weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(tether.errors.ShardedWeightError, match=f"'{Q}'.*GatheredParameters"):
        snapshot(model)
    model.to("meta")
    with pytest.raises(tether.errors.MetaTensorError, match="meta device"):
        snapshot(model)


def test_the_saved_lora_is_for_the_original_base(untied: Make, tmp_path: Path) -> None:
    model = wrap(untied())
    track(model)
    train(model)
    report = save_as_lora(model, tmp_path / "lora", rank=2, dtype=torch.bfloat16)
    assert report.rank == 2
    assert {t.dtype for t in load_file(tmp_path / "lora/adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
