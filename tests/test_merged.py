"""base + ΔW as a model folder: the numbers, the files, and what is refused."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tether
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance, algebra, fs
from tether.checkpoint import Checkpoint
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    HeaderError,
    ModelError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedModuleError,
    WriteError,
)
from tether.merged import arithmetic, save_merged
from tether.merged.plan import EMBEDDINGS, HEAD
from tether.value import Trained

IDS = torch.arange(12).reshape(2, 6)
PROVENANCE = Provenance("pissa", tether_version="0")


def gpt2(**settings):
    config = {"vocab_size": 33, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | settings))


def random(shape, size, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def moved(adapter, size=0.1):
    """The same adapter after some training."""

    def shifted(name, value):
        if value is None:
            return None
        return replace(value, trainable=random(value.trainable.shape, size, len(name)))

    layers = {}
    for seed, (path, layer) in enumerate(adapter.layers.items()):
        a, b = layer.trainable.A.shape, layer.trainable.B.shape
        shift = Factors(random(a, size, 2 * seed), random(b, size, 2 * seed + 1))
        lengths = shifted(path, layer.magnitude)
        layers[path] = replace(layer, trainable=shift, magnitude=lengths)
    biases = {path: shifted(path, bias) for path, bias in adapter.biases.items()}
    modules = {
        path: {name: shifted(path + name, value) for name, value in state.items()}
        for path, state in adapter.modules.items()
    }
    return replace(adapter, layers=layers, biases=biases, modules=modules)


def made(model, *targets, size=0.1, **settings):
    config = tether.LoraConfig(rank=2, target_modules=list(targets), **settings)
    return moved(tether.init(model, config), size)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def live_logits(model, adapter):
    handle = tether.attach(model, adapter, trainable=False)
    result = logits(model)
    handle.detach()
    return result


def loaded(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def saved(model, folder, size="50GB"):
    model.save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("size", ["50GB", "4KB"])
@pytest.mark.parametrize(
    ("family", "tied", "targets"),
    [
        ("llama", True, ["all-linear"]),
        ("llama", True, ["all-linear", "embed_tokens"]),
        ("llama", True, ["q_proj", "lm_head"]),
        ("llama", True, ["embed_tokens", "lm_head"]),
        ("llama", False, ["embed_tokens", "lm_head", "down_proj"]),
        ("gpt2", True, ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", True, ["c_attn", "wte", "wpe", "lm_head"]),
    ],
)
def test_the_merged_model_gives_the_logits_of_the_live_one(
    tiny_llama, tmp_path, family, tied, targets, size
):
    settings = {"tie_word_embeddings": tied}
    model = tiny_llama(**settings) if family == "llama" else gpt2(**settings)
    adapter = made(model, *targets)
    base = saved(model, tmp_path / "base", size)
    before, wanted = digests(base), live_logits(model, adapter)
    assert (wanted - logits(model)).abs().max() > 1e-3
    report = save_merged(base, adapter, tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert (logits(merged) - wanted).abs().max() < 2e-6
    assert digests(base) == before
    both = {"embed_tokens", "wte", "lm_head"}
    assert report.untied == (tied and not both.isdisjoint(targets))
    assert merged.config.tie_word_embeddings == (tied and not report.untied)
    files = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert set(report.changes) == set(adapter.layers)
    # What the adapter does not change is the base's own, bit for bit.
    here, there = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert set(there.names) - set(here.names) == ({HEAD} if report.untied else set())
    assert list(here.shards) == list(there.shards)
    changed = {f"{path}.weight" for path in adapter.layers}
    for file, names in here.shards.items():
        assert set(names) <= set(there.shards[file])
        for name in names:
            assert torch.equal(here.tensor(name), there.tensor(name)) == (name not in changed)


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("llama", ["all-linear"], {"use_dora": True}),
        ("llama", ["q_proj", "embed_tokens"], {"use_dora": True}),
        ("gpt2", ["c_attn", "c_proj"], {"use_dora": True, "bias": "lora_only"}),
        ("gpt2", ["c_fc"], {"bias": "all", "modules_to_save": ["ln_f"]}),
        ("llama", ["q_proj"], {"modules_to_save": ["lm_head", "norm"]}),
        ("llama", ["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dora_biases_and_modules_trained_whole_as_the_live_model_has_them(
    tiny_llama, tmp_path, family, targets, settings, stored
):
    model = (tiny_llama() if family == "llama" else gpt2()).to(stored)
    adapter = made(model, *targets, **settings)
    base = saved(model, tmp_path / "base")
    save_merged(base, adapter, tmp_path / "out", dtype=torch.float32)
    wide = loaded(base)
    wanted = live_logits(wide, adapter)
    assert (wanted - logits(wide)).abs().max() > 5e-3
    assert (logits(loaded(tmp_path / "out")) - wanted).abs().max() < 5e-6


KINDS = {
    "linear": (Layout("linear", (12, 7)), torch.nn.Linear(7, 12, bias=False)),
    "transposed": (Layout("transposed", (7, 12)), None),
    "embedding": (Layout("embedding", (9, 5)), torch.nn.Embedding(9, 5)),
    "conv": (Layout("conv", (6, 3, 2, 2)), torch.nn.Conv2d(3, 6, 2, bias=False)),
}


def layer_of(layout, anchored, magnitude=None, size=1.0, dtype=torch.float32):
    out, width = layout.out_features, layout.in_features
    parts = [random(s, size, n).to(dtype) for n, s in enumerate([(2, width), (out, 2)] * 2)]
    anchor = Factors(*parts[2:]) if anchored else None
    return LayerAdapter(Factors(*parts[:2]), anchor, 0.7, layout, magnitude=magnitude)


def exact(weight, layer):
    """(W + ΔW, ΔW) in float64, in the weight's own shape; under DoRA m·(W+ΔW)/|W+ΔW|."""
    wide = replace(
        layer,
        trainable=layer.trainable.to(torch.float64),
        anchor=layer.anchor and layer.anchor.to(torch.float64),
        magnitude=None,
    )
    old = layer.layout.matrix(weight.double())
    new = old + algebra.delta(wide)
    if layer.magnitude is not None:
        new = layer.magnitude.current.double()[:, None] * new / new.norm(dim=1, keepdim=True)
    return layer.layout.stored(new), layer.layout.stored(new - old)


@pytest.mark.parametrize("block", [1, 8, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("stored", "written"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_sum_is_right_to_one_rounding(
    monkeypatch, block, kind, dora, anchored, stored, written
):
    monkeypatch.setattr(arithmetic, "_BLOCK", block)
    layout = KINDS[kind][0]
    weight = random(layout.shape, 1.0, 9).to(stored)
    lengths = random((layout.out_features,), 0.1, 10).abs() + 1
    magnitude = Trained(random(lengths.shape, 0.2, 11), lengths) if dora else None
    layer = layer_of(layout, anchored, magnitude)
    wanted, delta = exact(weight, layer)
    result, change = arithmetic.add(weight.clone(), layer, written, "w")
    assert (result.dtype, result.shape) == (written, weight.shape)
    # Half a step of the written dtype, and some steps of the dtype that it was made in.
    work = torch.promote_types(stored, torch.float32)
    largest = float(wanted.abs().max() + delta.abs().max())
    half_step = wanted.abs() * torch.finfo(written).eps / 2
    assert bool(
        ((result.double() - wanted).abs() <= half_step + largest * 8 * torch.finfo(work).eps).all()
    )
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    lost = float((result.double() - weight.double() - delta).norm() / delta.norm())
    assert change.error == pytest.approx(lost, rel=1e-3, abs=4e-7)


def test_the_result_is_rounded_once_and_the_error_is_what_rounding_took():
    """A change far below the weight's own steps is lost in bfloat16, and the report says so."""
    layout = Layout("linear", (64, 64))
    weight = random((64, 64), 1.0, 1).bfloat16()
    layer = layer_of(layout, True, size=1e-3)
    result, change = arithmetic.add(weight.clone(), layer, torch.bfloat16, "w")
    assert torch.equal(result, (weight.float() + algebra.delta(layer)).bfloat16())
    assert change.error > 0.9
    assert arithmetic.add(weight.clone(), layer, torch.float32, "w")[1].error < 0.05


def test_rows_of_zeros_stay_zero_under_dora():
    layout = Layout("linear", (3, 4))
    layer = layer_of(layout, False, Trained(torch.ones(3), None))
    b = layer.trainable.B.clone()
    b[1] = 0
    layer = replace(layer, trainable=Factors(layer.trainable.A, b))
    weight = random((3, 4), 1.0, 1)
    weight[1] = 0
    result, _ = arithmetic.add(weight, layer, torch.float32, "w")
    assert result[1].tolist() == [0, 0, 0, 0]
    assert torch.allclose(result[[0, 2]].norm(dim=1), torch.ones(2))


def whole_model(tiny_llama, tmp_path):
    model = gpt2()
    return model, saved(model, tmp_path / "base"), made(model, "c_attn")


@pytest.mark.parametrize("anchored", [False, True])
def test_biases_and_modules_trained_whole(tiny_llama, tmp_path, anchored):
    model, base, adapter = whole_model(tiny_llama, tmp_path)
    state, new = model.state_dict(), {}

    def trained(name):
        shift = random(state[name].shape, 0.5, len(name))
        new[name] = state[name] + shift
        return Trained(shift, state[name].clone()) if anchored else Trained(new[name], None)

    norm, attention = "transformer.ln_f", "transformer.h.1.attn.c_attn"
    adapter = replace(
        adapter,
        biases={attention: trained(f"{attention}.bias")},
        modules={norm: {name: trained(f"{norm}.{name}") for name in ("weight", "bias")}},
    )
    report = save_merged(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, value in new.items():
        assert torch.allclose(merged[name], value, atol=1e-6)
        change = report.changes[name]
        assert change.norm == pytest.approx(float((value - state[name]).norm()), rel=1e-4)
        assert change.error < 1e-6
    assert set(report.changes) == {*new, *adapter.layers}


def test_a_parameter_trained_from_other_values_is_refused(tiny_llama, tmp_path):
    model, base, adapter = whole_model(tiny_llama, tmp_path)
    weight = model.transformer.ln_f.weight.detach()
    other = Trained(torch.ones(16), weight + 1)
    adapter = replace(adapter, modules={"transformer.ln_f": {"weight": other}})
    with pytest.raises(BaseMismatchError, match=r"'transformer.ln_f.weight': was trained from oth"):
        save_merged(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_merged(base, adapter, tmp_path / "out", verify=False)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged["transformer.ln_f.weight"], weight + 1)
    # The same values, rounded on one side, are the same.
    rounded = Trained(torch.zeros(16), (weight * 1.003).bfloat16().float())
    model.transformer.ln_f.weight.data.mul_(1.003)
    saved(model, tmp_path / "scaled")
    adapter = replace(adapter, modules={"transformer.ln_f": {"weight": rounded}})
    save_merged(tmp_path / "scaled", adapter, tmp_path / "out2")


def test_a_tied_head_trained_whole(tiny_llama, tmp_path):
    """modules_to_save=["lm_head"]: the embedding stays the base's."""
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    head = random((32, 16), 0.3, 5)
    adapter = replace(adapter, modules={"lm_head": {"weight": Trained(head, None)}})
    report = save_merged(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged[HEAD], head)
    embedding = model.model.embed_tokens.weight
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert report.untied
    assert "lm_head.weight" in report.changes


def test_a_checkpoint_saved_without_the_models_prefix(tmp_path):
    """As GPT-2 lies on the hub: `h.0.attn`, no head, no word on tying."""
    model = gpt2()
    base, adapter = saved(model, tmp_path / "base"), made(model, "c_attn", "wte")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    wanted = live_logits(model, adapter)
    assert save_merged(base, adapter, tmp_path / "out").untied
    assert (logits(loaded(tmp_path / "out")) - wanted).abs().max() < 2e-6


def test_a_head_that_is_stored_beside_its_twin(tiny_llama, tmp_path):
    """Some checkpoints hold both of a tied pair: the merged two differ, and must not be tied."""
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "embed_tokens")
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert save_merged(base, adapter, tmp_path / "out").untied
    merged = loaded(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    assert (logits(merged) - live_logits(model, adapter)).abs().max() < 2e-6


def test_a_model_without_a_head_has_nothing_tied(tiny_llama, tmp_path):
    model = tiny_llama().model
    base, adapter = saved(model, tmp_path / "base"), made(model, "embed_tokens")
    report = save_merged(base, adapter, tmp_path / "out")
    assert not report.untied
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out")
    handle = tether.attach(model, adapter, trainable=False)
    with torch.no_grad():
        wanted, found = model(IDS).last_hidden_state, merged(IDS).last_hidden_state
    handle.detach()
    assert (wanted - found).abs().max() < 1e-5


def test_the_head_of_every_family_that_is_untied_has_that_name():
    """In the installed transformers: an embedding on the list is tied to `lm_head` or to none."""
    embedding = "|".join(map(re.escape, EMBEDDINGS))
    pair = re.compile(rf'"([\w.]+)": "(?:{embedding})\.weight"')
    heads = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for part in re.split(r"\nclass ", file.read_text()):
            if re.match(r"\w+(ForCausalLM|LMHeadModel)\(", part) and (found := pair.search(part)):
                heads[part[: part.index("(")]] = found[1]
    assert len(heads) > 100
    others = {name for name, head in heads.items() if head != HEAD}
    assert others == {"WhisperForCausalLM", "TrOCRForCausalLM"}


def test_which_tensors_are_the_vocabularys(tiny_llama, tmp_path):
    """A layer may be as wide as the vocabulary; an embedding is told by its name too."""
    wide = tiny_llama(intermediate_size=32)
    base, adapter = saved(wide, tmp_path / "base"), made(wide, "up_proj")
    assert not save_merged(base, adapter, tmp_path / "out").untied
    retold(base, vocab_size=None)
    assert save_merged(base, made(wide, "embed_tokens"), tmp_path / "out2").untied
    # Another table with a row for each token: what it may be tied to is not known.
    retold(base, vocab_size=32)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.prior.weight": torch.ones(32, 16)}, base / "model.safetensors")
    prior = {"model.prior": {"weight": Trained(torch.zeros(32, 16), None)}}
    with pytest.raises(UnsupportedModuleError, match=r"changes 'model\.prior\.weight'"):
        save_merged(base, replace(adapter, modules=prior), tmp_path / "out3")


def test_the_metadata_that_transformers_wants_and_the_same_bytes_each_time(tiny_llama, tmp_path):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    own = {"by": "é", **{f"key {n}": f"{n}" for n in range(9)}}
    save_file(load_file(base / "model.safetensors"), base / "model.safetensors", own)
    written = set()
    for number in range(5):
        save_merged(base, adapter, tmp_path / f"out{number}")
        metadata = Checkpoint.open(tmp_path / f"out{number}").metadata
        assert metadata == {"model.safetensors": {"format": "pt", **own}}
        written.add(tuple(digests(tmp_path / f"out{number}").items()))
    assert len(written) == 1


def retold(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["WhisperForCausalLM"]}, "of WhisperForCausalLM may be one tensor"),
        ({"architectures": ["LlamaForConditionalGeneration"]}, "may be one tensor"),
        ({"architectures": ["A", "B"]}, "of this model may be one tensor"),
        ({"architectures": None}, "of this model may be one tensor"),
        ({"is_encoder_decoder": True}, "may be one tensor"),
    ],
)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_head_that_may_be_tied_in_other_ways_is_refused(
    tiny_llama, tmp_path, changes, words, target
):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, target)
    retold(base, **changes)
    with pytest.raises(UnsupportedModuleError, match=words):
        save_merged(base, adapter, tmp_path / "out")
    retold(base, tie_word_embeddings=False)
    if target == "embed_tokens":
        assert not save_merged(base, adapter, tmp_path / "out").untied
    else:
        with pytest.raises(UnknownNameError, match=r"has no tensor 'lm_head\.weight'"):
            save_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_a_quantised_base_is_refused(tiny_llama, tmp_path, config):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    retold(base, **config)
    with pytest.raises(
        UnsupportedModuleError, match=r"is quantised \((bits|gptq|compr).*unquantised"
    ):
        save_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_weight_that_is_not_floating_is_refused(tiny_llama, tmp_path, dtype):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, base / "model.safetensors")
    with pytest.raises(
        UnsupportedModuleError, match=f"{re.escape(name)}.* is {dtype}, not floating"
    ):
        save_merged(base, adapter, tmp_path / "out")


def test_another_base_is_refused_unless_insisted(tiny_llama, tmp_path):
    model = tiny_llama()
    adapter = made(model, "q_proj")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    base = saved(model, tmp_path / "base")
    with pytest.raises(BaseMismatchError, match=r"site 'model.layers.1.self_attn.q_proj'.*sha256"):
        save_merged(base, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    save_merged(base, adapter, tmp_path / "out", verify=False)
    assert (
        logits(loaded(tmp_path / "out")) - live_logits_unchecked(model, adapter)
    ).abs().max() < 2e-6


def live_logits_unchecked(model, adapter):
    handle = tether.attach(model, adapter, trainable=False, verify=False)
    result = logits(model)
    handle.detach()
    return result


def one_site(layout, path="m", **more):
    return Adapter({path: layer_of(layout, False)}, PROVENANCE, **more)


@pytest.mark.parametrize(
    ("adapter", "error", "words"),
    [
        (
            one_site(Layout("linear", (16, 15)), "lm_head"),
            ShapeMismatchError,
            r"\(32, 16\).*\(16, 15",
        ),
        (one_site(Layout("linear", (16, 16)), "m"), UnknownNameError, "no tensor 'm.weight'"),
        (
            one_site(
                Layout("linear", (16, 16)),
                "model.layers.0.self_attn.q_proj",
                biases={"model.layers.0.self_attn.q_proj": Trained(torch.ones(16), None)},
            ),
            UnknownNameError,
            "has no tensor 'model.layers.0.self_attn.q_proj.bias'",
        ),
        (
            one_site(
                Layout("linear", (16, 16)),
                "model.layers.0.self_attn.q_proj",
                modules={
                    "layers.0.self_attn.q_proj": {"weight": Trained(torch.ones(16, 16), None)}
                },
            ),
            ConfigError,
            "changes 'model.layers.0.self_attn.q_proj.weight' twice: .*'layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(tiny_llama, tmp_path, adapter, error, words):
    base = saved(tiny_llama(tie_word_embeddings=False), tmp_path / "base")
    with pytest.raises(error, match=words):
        save_merged(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "right"), [("llama", "linear"), ("gpt2", "transposed")])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize("native", [False, True])
def test_a_square_weight_from_a_peft_folder_must_be_stored_as_the_others(
    tiny_llama, tmp_path, family, right, kind, native
):
    model, path = (
        (tiny_llama(), "model.layers.0.self_attn.q_proj")
        if family == "llama"
        else (gpt2(), "transformer.h.0.attn.c_proj")
    )
    base = saved(model, tmp_path / "base")
    adapter = one_site(Layout(kind, (16, 16)), path)
    if not native:
        adapter = adapter.with_provenance(tether_version=None)
    if native or kind == right:
        save_merged(base, adapter, tmp_path / "out")
    else:
        with pytest.raises(ShapeMismatchError, match="is square, and the adapter's fan_in_fan_out"):
            save_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_another_dtype_for_all_floating_tensors(tiny_llama, tmp_path, stored, dtype):
    model = tiny_llama().to(stored)
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    tensors = load_file(base / "model.safetensors")
    tensors["steps"] = torch.tensor([7])
    save_file(tensors, base / "model.safetensors")
    retold(base, torch_dtype="float64", vision_config={"dtype": "float64", "width": 3})
    save_merged(base, adapter, tmp_path / "out", dtype=dtype)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged.pop("steps"), tensors["steps"])
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    for name, tensor in merged.items():
        layer = adapter.layers.get(name.removesuffix(".weight"))
        wanted = tensors[name] if layer is None else exact(tensors[name], layer)[0]
        assert torch.allclose(
            tensor.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=1e-7
        )
    name = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (name, name)
    assert config["vision_config"] == {"dtype": name, "width": 3}
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert auto.dtype == dtype


def test_values_that_do_not_fit_the_dtype_are_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[3] = 1e6
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' in torch.float16: 1 of 16"):
        save_merged(base, adapter, tmp_path / "out", dtype=torch.float16)
    model.model.norm.weight.data[3] = 1
    base, large = saved(model, tmp_path / "base"), made(model, "q_proj", size=1e3)
    with pytest.raises(NonFiniteError, match=r"q_proj.weight' merged, in torch.float16: "):
        save_merged(base, large, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype torch.float64 is none of torch.float32"):
        save_merged(base, adapter, tmp_path / "out", dtype=torch.float64)
    assert not (tmp_path / "out").exists()


def test_files_beside_the_weights(tiny_llama, tmp_path):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    kept = {"tokenizer.json": "{}", "vocab.txt": "a", "LICENSE": "b", "modeling_x.py": "c = 1"}
    dropped = ["pytorch_model.bin", "rust_model.ot.bin", "consolidated.safetensors", "x.gguf"]
    dropped += ["adapter_config.json", "adapter_model.safetensors", "training_args.bin", "old.pt"]
    for name, text in kept.items():
        (base / name).write_text(text)
    for name in [*dropped, ".gitattributes"]:
        (base / name).write_text("pickle")
    (base / "onnx").mkdir()
    report = save_merged(base, adapter, tmp_path / "out")
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert written.keys() == {"model.safetensors", "config.json", "generation_config.json", *kept}
    for name in written.keys() - {"model.safetensors"}:
        assert written[name] == (base / name).read_bytes()
    assert set(report.left_out) == {*dropped, "onnx"}
    assert set(report.copied) == {"generation_config.json", *kept}
    size = sum(t.nbytes for t in load_file(tmp_path / "out/model.safetensors").values())
    assert report.size == size
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["size"] == size


def test_a_link_out_of_the_base_is_not_copied(tiny_llama, tmp_path):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    (tmp_path / "secret").write_text("key")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(HeaderError, match=r"vocab\.txt: is a link out of the folder"):
        save_merged(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_index_lists_every_tensor_and_its_bytes(tiny_llama, tmp_path):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base", "4KB"), made(model, "embed_tokens")
    report = save_merged(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = {
        name: file.name
        for file in (tmp_path / "out").glob("*.safetensors")
        for name in load_file(file)
    }
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == report.size
    assert report.size == sum(
        tensor.nbytes
        for file in (tmp_path / "out").glob("*.safetensors")
        for tensor in load_file(file).values()
    )


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("base", "lies in the folder of the base model"),
        ("base/out", "lies in the folder of the base model"),
        ("link/out", "lies in the folder of the base model"),
        ("full", "holds 'mine.txt'; give a new folder"),
        ("full/mine.txt", "is a file"),
    ],
)
def test_a_place_that_is_not_free_is_refused(tiny_llama, tmp_path, place, words):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(WriteError, match=words):
        save_merged(base, adapter, tmp_path / place)
    assert digests(tmp_path) == before


def test_a_folder_without_a_config_is_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base"), made(model, "q_proj")
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        save_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_at_any_tensor_leaves_nothing(tiny_llama, tmp_path, monkeypatch, there, error):
    model = tiny_llama()
    base, adapter = saved(model, tmp_path / "base", "4KB"), made(model, "q_proj")
    before, out = digests(tmp_path), tmp_path / "out"
    if there:
        out.mkdir()
    total = len(Checkpoint.open(base).names)
    steps, fail_at = [], [0]

    def watched(done, of):
        assert of == total
        assert not any(out.iterdir()) if there else not out.exists()
        steps.append(done)
        if done == fail_at[0]:
            raise error

    for fail_at[0] in (1, total // 2, total):
        with pytest.raises(WriteError if isinstance(error, OSError) else KeyboardInterrupt):
            save_merged(base, adapter, out, progress=watched)
        assert digests(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == (
            ["base", "out"] if there else ["base"]
        )
    for name in ("copy_file", "write_text", "_sync", "_swap"):
        with monkeypatch.context() as patch:
            patch.setattr(fs, name, lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises((WriteError, KeyboardInterrupt)):
                save_merged(base, adapter, out)
        assert digests(tmp_path) == before
    fail_at[0] = 0
    steps.clear()
    save_merged(base, adapter, out, progress=watched)
    assert steps == list(range(1, total + 1))
