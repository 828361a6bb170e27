"""Adapters that peft trained on a residual model, told as changes of the base, beside peft's own.

Nothing of peft or of a model is used to rescue them. The truth is the live model's:
W_res + s·B·A − W, in float64.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tether
from tether import rescue
from tether.errors import (
    ConfigError,
    NotAnAdapterError,
    RescueError,
    TetherError,
    UnsupportedAdapterError,
)

from .conftest import (
    IDS,
    LINEAR,
    VOCAB,
    change,
    disturb,
    gpt2,
    llama,
    notices_silenced,
    output,
    peft_factors,
    peft_layers,
    peft_load,
    peft_model,
    peft_save,
    relative,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning",
    r"ignore:\w+ changes the base weights of the model:UserWarning",
    "ignore:Full backward hook is firing when gradients:UserWarning",
)
INITS = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 3}}


@dataclass(frozen=True)
class Run:
    """What somebody has on disk after training with peft, and what the live model was."""

    base: Path
    start: Path
    adapter: Path
    residual: Path
    change: dict[str, Tensor]
    output: Tensor
    build: Callable[[], nn.Module]

    def sources(self) -> dict[str, dict[str, Path]]:
        return {
            "anchor": {"anchor": self.start},
            "residual": {"residual": self.residual, "base": self.base},
            "base": {"base": self.base},
        }

    def error(self, adapter: tether.Adapter) -> float:
        """The largest relative error of any site's change."""
        assert adapter.layers.keys() == self.change.keys()
        return max(relative(change(layer), self.change[s]) for s, layer in adapter.layers.items())


def start(base: nn.Module, init: str, **settings: object) -> peft.PeftModel:
    """peft's model at its start, preprocessed where the start asks for it."""
    extra = {
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }.get(init, {})
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | extra | settings
    config = peft.LoraConfig(init_lora_weights=init, **chosen)
    ids = torch.randint(VOCAB, (32, 12), generator=torch.Generator().manual_seed(3))
    if init == "corda":
        # peft imports a package here that it does not require, for this one name.
        with mock.patch.dict(sys.modules, {"attr": dataclasses}):
            from peft.tuners.lora.corda import preprocess_corda
        preprocess_corda(base, config, run_model=lambda: [output(base, row[None]) for row in ids])
    if init == "lora_ga":
        preprocess_loraga(base, config, lambda: train_loss(base, ids).backward())
    with notices_silenced():
        return peft.get_peft_model(base, config).eval()


def train_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        train_loss(model, IDS).backward()
        optimizer.step()


def run(
    folder: Path,
    init: str,
    build: Callable[[], nn.Module] = llama,
    move: Callable[[nn.Module], None] = train,
    **settings: object,
) -> Run:
    base = build()
    base.save_pretrained(folder / "base")
    before = {name: p.detach().double().clone() for name, p in base.named_parameters()}
    model = start(base, init, **settings)
    peft_save(model, folder / "start", save_embedding_layers=False)
    move(model)
    peft_save(model, folder / "adapter", save_embedding_layers=False)
    live = output(model)
    moved = {}
    for site, layer in peft_layers(model).items():
        if hasattr(layer, "get_delta_weight"):
            layer.to(torch.float64)
            delta = layer.get_delta_weight("default").detach()
            moved[site] = layer.base_layer.weight.detach() + delta - before[f"{site}.weight"]
            layer.to(torch.float32)
    dtype = next(build().parameters()).dtype
    model.unload().to(dtype).save_pretrained(folder / "residual")
    names = ("base", "start", "adapter", "residual")
    return Run(*(folder / name for name in names), moved, live, build)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    made: dict[str, Run] = {}

    def get(init: str) -> Run:
        if init not in made:
            made[init] = run(tmp_path_factory.mktemp(init), init)
        return made[init]

    return get


def state(*folders: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file."""
    files = [f for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()]
    return {
        str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files
    }


@pytest.mark.parametrize(
    ("init", "source", "tolerance"),
    [(init, source, 1e-5) for init in INITS for source in ("anchor", "residual")]
    + [("pissa", "base", 3e-4), ("olora", "base", 1e-5)],
)
def test_every_start_from_every_source(
    init: str, source: str, tolerance: float, runs: Callable[[str], Run], tmp_path: Path
) -> None:
    done = runs(init)
    before = state(done.base, done.start, done.adapter, done.residual)
    adapter = rescue.load(done.adapter, **done.sources()[source])
    assert all(layer.anchor is not None for layer in adapter.layers.values())
    assert done.error(adapter) < tolerance
    base = done.build()
    untouched = output(base)
    assert relative(done.output, untouched) > 0.01
    handle = tether.attach(base, adapter)
    assert relative(output(base), done.output) < tolerance
    with handle.disabled():
        assert torch.equal(output(base), untouched)
    # And as a plain LoRA in peft itself.
    tether.save_as_lora(adapter, tmp_path / "plain")
    assert relative(output(peft_load(done.build(), tmp_path / "plain")), done.output) < tolerance
    assert adapter.provenance.method == init
    known = set() if source == "anchor" else done.change.keys()
    assert adapter.provenance.fingerprints.keys() == known
    assert state(done.base, done.start, done.adapter, done.residual) == before


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_like_peft_s_conversion_where_it_works(
    init: str, runs: Callable[[str], Run], tmp_path: Path
) -> None:
    done = runs(init)
    live = live_again(done, init)
    shutil.copytree(done.start, tmp_path / "start")  # peft rewrites its settings
    peft_save(
        live, tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert state(tmp_path / "start") != state(done.start)
    ours = rescue.load(done.adapter, anchor=done.start)
    theirs = tether.load(tmp_path / "theirs")
    for site, layer in ours.layers.items():
        assert relative(change(theirs.layers[site]), change(layer)) < 1e-5


def live_again(done: Run, init: str, **settings: object) -> peft.PeftModel:
    """The live model: its residual weights, with the trained factors on them."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | settings
    model = peft_model(done.build(), **chosen)
    trained, residual = weights(done.adapter), load_file(done.residual / "model.safetensors")
    for site, layer in peft_layers(model).items():
        layer.base_layer.weight.data = residual[f"{site}.weight"]
        stem = f"base_model.model.{site}.lora_"
        for side in ("A", "B"):
            if "embed" in site:
                getattr(layer, f"lora_embedding_{side}")["default"].data = trained[
                    f"{stem}embedding_{side}"
                ]
            else:
                getattr(layer, f"lora_{side}")["default"].weight.data = trained[
                    f"{stem}{side}.weight"
                ]
    model.peft_config["default"].init_lora_weights = init
    assert relative(output(model), done.output) < 1e-6
    return model


def errors(done: Run, adapter: tether.Adapter) -> list[float]:
    return [relative(change(layer), done.change[s]) for s, layer in adapter.layers.items()]


def peft_convert(model: peft.PeftModel, target: Path, start: str | Path) -> None:
    with notices_silenced():
        model.save_pretrained(target, path_initial_model_for_weight_conversion=str(start))


@pytest.mark.parametrize("own_setting", ["pissa", True])
def test_a_start_in_a_folder_named_like_the_live_adapter(
    own_setting: str | bool, runs: Callable[[str], Run], tmp_path: Path
) -> None:
    """peft loads it over the live adapter, then deletes that: it raises, or saves no change."""
    done = runs("pissa")
    shutil.copytree(done.start, tmp_path / "default")
    live = live_again(done, "pissa")
    live.peft_config["default"].init_lora_weights = own_setting
    if own_setting is True:
        peft_convert(live, tmp_path / "theirs", tmp_path / "default")
        assert errors(done, tether.load(tmp_path / "theirs")) == pytest.approx([1.0] * 14)
    else:
        with pytest.raises(ValueError, match="should be set to `True`"):
            peft_convert(live, tmp_path / "theirs", tmp_path / "default")
    assert not live.peft_config  # the trained adapter is gone
    assert all(not layer.lora_A for layer in peft_layers(live).values())

    shutil.copytree(done.start, tmp_path / "ours" / "default")
    assert done.error(rescue.load(done.adapter, anchor=tmp_path / "ours" / "default")) < 1e-5


def test_ways_to_name_the_start_s_folder(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = runs("pissa")
    shutil.copytree(done.start, tmp_path / "start")
    live = live_again(done, "pissa")
    with pytest.raises(ValueError, match="Adapter  does not exist"):
        peft_convert(live, tmp_path / "theirs", f"{tmp_path / 'start'}/")
    with pytest.raises(Exception, match="Repo id must be"):
        peft_convert(live, tmp_path / "theirs", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for name in (f"{done.start}/", "start", "./start/", "../" + tmp_path.name + "/start"):
        assert done.error(rescue.load(done.adapter, anchor=name)) < 1e-5
    with pytest.raises(NotAnAdapterError, match=r"nowhere: there is no adapter_config\.json in it"):
        rescue.load(done.adapter, anchor=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("init", "source"),
    [("pissa", "anchor"), ("pissa", "base"), ("olora", "residual"), ("lora_ga", "residual")],
)
def test_rslora_with_patterns(init: str, source: str, tmp_path: Path) -> None:
    done = run(tmp_path, init, **PATTERNS)
    live = live_again(done, init, **PATTERNS)
    with pytest.raises(ValueError, match="not supported when using `rank_pattern`"):
        peft_convert(live, tmp_path / "theirs", tmp_path / "start")
    adapter = rescue.load(done.adapter, **done.sources()[source])
    assert done.error(adapter) < 3e-4
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    assert (layer.rank, layer.scaling) == (6, pytest.approx(6 / 6**0.5))
    tether.save_as_lora(adapter, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 12)
    assert relative(output(peft_load(llama(), tmp_path / "plain")), done.output) < 3e-4


@pytest.mark.parametrize("source", ["anchor", "residual", "base"])
def test_embeddings_are_kept(source: str, tmp_path: Path) -> None:
    """peft gives them its default start; its conversion leaves them out without a word."""
    settings = {"target_modules": ["embed_tokens", "q_proj"]}
    done = run(tmp_path, "pissa", move=lambda m: disturb(peft_factors(m), 0.01), **settings)
    shutil.copytree(done.start, tmp_path / "initial")
    live = live_again(done, "pissa", **settings)
    peft_convert(live, tmp_path / "theirs", tmp_path / "initial")
    assert not any("embed" in key for key in weights(tmp_path / "theirs"))
    adapter = rescue.load(done.adapter, **done.sources()[source])
    assert done.error(adapter) < 1e-4
    assert any("embed" in site for site in adapter.layers)
    base = llama()
    tether.attach(base, adapter)
    assert relative(output(base), done.output) < 1e-4


WHOLES = {
    "dora": (llama, {"use_dora": True}),
    "module": (llama, {"modules_to_save": ["lm_head"]}),
    "biases": (gpt2, {"bias": "all", "target_modules": ["c_attn", "c_fc"]}),
    "all": (gpt2, {"bias": "all", "target_modules": ["c_attn"], "use_dora": True,
                   "modules_to_save": ["mlp.c_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("source", ["anchor", "residual", "base"])
@pytest.mark.parametrize("case", WHOLES)
def test_what_is_trained_whole_comes_along(case: str, source: str, tmp_path: Path) -> None:
    """peft's conversion leaves all of it out, and says nothing."""
    build, settings = WHOLES[case]
    done = run(tmp_path, "pissa", build, **settings)
    job = rescue.open_rescue(
        done.adapter, *(done.sources()[source].get(n) for n in ("anchor", "base", "residual"))
    )
    rescue.write(job, tmp_path / "native.safetensors")
    rescue.write(job, tmp_path / "plain")
    base = build()
    assert relative(done.output, output(base)) > 0.01
    handle = tether.attach(base, tether.load(tmp_path / "native.safetensors"))
    assert relative(output(base), done.output) < 3e-4
    handle.detach()
    assert torch.equal(output(base), output(build()))
    assert relative(output(peft_load(build(), tmp_path / "plain")), done.output) < 3e-4
    value = rescue.load(done.adapter, **done.sources()[source])
    assert any(layer.magnitude is not None for layer in value.layers.values()) is (
        "use_dora" in settings
    )
    assert bool(value.biases) is ("bias" in settings)
    assert bool(value.modules) is ("modules_to_save" in settings)


@pytest.mark.parametrize("source", ["anchor", "residual", "base"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "lora_ga"])
def test_conv1d_of_gpt2(init: str, source: str, tmp_path: Path) -> None:
    done = run(
        tmp_path,
        init,
        gpt2,
        lambda model: disturb(peft_factors(model), 0.01),
        target_modules=["c_attn", "c_proj", "c_fc"],
    )
    if source == "base" and init != "pissa":
        with pytest.raises(UnsupportedAdapterError, match="cannot be computed again"):
            rescue.load(done.adapter, base=done.base)
        return
    assert done.error(rescue.load(done.adapter, **done.sources()[source])) < 3e-4


@pytest.mark.parametrize("source", ["anchor", "residual", "base"])
def test_olora_on_square_conv1d_is_refused(source: str, tmp_path: Path) -> None:
    """peft subtracts the transpose there: the model is another one before the first step."""
    base = gpt2()
    before = output(base)
    model = start(base, "olora", target_modules=["attn.c_proj"])
    assert relative(output(model), before) > 0.1
    done = run(tmp_path, "olora", gpt2, target_modules=["attn.c_proj"])
    with pytest.raises(UnsupportedAdapterError, match="subtracts the transpose"):
        rescue.load(done.adapter, **done.sources()[source])


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("pissa_niter_4", "it draws random numbers"),
        ("corda", "data that its covariances were taken from"),
        ("lora_ga", "gradients of the batches"),
    ],
)
def test_the_base_alone_does_not_tell_a_random_start(
    init: str, why: str, runs: Callable[[str], Run]
) -> None:
    """peft computes it again all the same, and gets another one, or the default start."""
    done = runs(init)
    with pytest.raises(UnsupportedAdapterError, match=why) as caught:
        rescue.load(done.adapter, base=done.base)
    assert "--anchor DIR" in str(caught.value)
    assert "the base model alone" not in str(caught.value)
    if init == "corda":
        with pytest.raises(ValueError, match="eigens"):
            peft_load(llama(), done.adapter)
    else:
        base = llama()
        torch.manual_seed(9)
        assert relative(output(peft_load(base, done.adapter)), done.output) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """W_res is rounded: by that the live model differs from base + ΔW, of whatever rank."""
    done = run(tmp_path, "pissa", lambda: llama(dtype=dtype))
    unit = torch.finfo(dtype).eps / 2
    found = {name: rescue.load(done.adapter, **given) for name, given in done.sources().items()}
    error = {name: done.error(adapter) for name, adapter in found.items()}
    ratio = min(
        float(done.change[s].norm() / (layer.scaling * layer.anchor.B @ layer.anchor.A).norm())
        for s, layer in found["anchor"].layers.items()
    )
    assert error["anchor"] < 2 * unit / ratio
    # The residual tells a part of the rounding too: nearer to the live model than its own start.
    assert error["residual"] < error["anchor"]
    report = rescue.open_rescue(done.adapter, None, done.base, done.residual)
    for site in report.sites():
        assert 0.05 * unit < site.report.left_over < 2 * unit
        wanted = relative(change(site.layer), done.change[site.path])
        assert site.report.uncertainty == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("stored", ["adapter", "start"])
def test_one_folder_in_bfloat16(stored: str, runs: Callable[[str], Run], tmp_path: Path) -> None:
    done = runs("pissa")
    folders = {"adapter": tmp_path / "adapter", "start": tmp_path / "start"}
    for name, folder in folders.items():
        shutil.copytree(getattr(done, name), folder)
    file = folders[stored] / "adapter_model.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(file).items()}, file)
    job = rescue.open_rescue(folders["adapter"], folders["start"], None, None)
    for site in job.sites():
        error = relative(change(site.layer), done.change[site.path])
        assert 0.1 * site.report.uncertainty < error < site.report.uncertainty
        product = {
            name: [load_file(folder / "adapter_model.safetensors")[key].double() for key in (
                f"base_model.model.{site.path}.lora_B.weight",
                f"base_model.model.{site.path}.lora_A.weight",
            )]
            for name, folder in folders.items()
        }  # fmt: skip
        B, A = product["adapter"]
        B0, A0 = product["start"]
        assert relative(change(site.layer), site.layer.scaling * (B @ A - B0 @ A0)) < 1e-5


def test_files_of_something_else_are_refused(runs: Callable[[str], Run], tmp_path: Path) -> None:
    done, other = runs("pissa"), runs("olora")
    torch.manual_seed(5)
    strange = llama()
    for parameter in strange.parameters():
        nn.init.normal_(parameter, std=0.15)
    strange.save_pretrained(tmp_path / "strange")
    for given, words in (
        ({"base": tmp_path / "strange"}, "they did not start there"),
        ({"base": tmp_path / "strange", "residual": done.residual}, "is not of rank 4"),
        ({"base": done.base, "residual": tmp_path / "strange"}, "is not of rank 4"),
        ({"base": done.residual, "residual": done.base}, "swapped"),
        ({"anchor": other.start}, "started from 'pissa', .* from 'olora'"),
        ({"anchor": done.adapter}, "is the trained adapter itself"),
    ):
        with pytest.raises(TetherError, match=words):
            rescue.load(done.adapter, **given)
    # A start of another base, by all its settings the right one.
    run(tmp_path / "other", "pissa", lambda: strange)
    with pytest.raises(RescueError, match="no more than by chance"):
        rescue.load(done.adapter, anchor=tmp_path / "other" / "start")
    shutil.copytree(done.start, tmp_path / "copy")
    with pytest.raises(RescueError, match="no site has changed"):
        rescue.load(done.start, anchor=tmp_path / "copy")


def test_peft_s_recipe_of_a_setting_changed_by_hand(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    """Its documentation sets init_lora_weights to True to save the start; it then stays so."""
    done = runs("pissa")
    for name in ("start", "adapter"):
        shutil.copytree(getattr(done, name), tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))
    # Nothing in the file says that this is no plain LoRA; the base alone cannot tell it either.
    with pytest.raises(ConfigError, match="a plain LoRA: leave out base"):
        rescue.load(tmp_path / "adapter", base=done.base)
    for given in ({"anchor": tmp_path / "start"}, done.sources()["residual"]):
        adapter = rescue.load(tmp_path / "adapter", **given)
        assert done.error(adapter) < 1e-5
        assert adapter.provenance.method == "unknown"
