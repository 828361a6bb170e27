import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tether import sites
from tether.errors import (
    MetaTensorError,
    NoSiteError,
    ShardedWeightError,
    UnknownNameError,
    UnsupportedModuleError,
)
from tether.value import Layout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "c_attn": Conv1D(8, 6)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(6, 4), "norm": nn.LayerNorm(6)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 4, 2)
        self.lm_head = nn.Linear(6, 9)


def paths(*args: object, model: nn.Module | None = None, **kwargs: object) -> list[str]:
    return [site.path for site in sites.find(model or Model(), *args, **kwargs)]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "layers.0.attn.q_proj", True),
        ("attn.q_proj", "layers.0.attn.q_proj", True),
        ("layers.0.attn.q_proj", "layers.0.attn.q_proj", True),
        ("proj", "layers.0.attn.q_proj", False),
        ("attn", "layers.0.attn.q_proj", False),
        ("Q_proj", "q_proj", False),
        ("*.q_proj", "layers.0.attn.q_proj", True),
        ("q_*", "layers.0.attn.q_proj", False),
        ("layers.[01].*.q_proj", "layers.1.attn.q_proj", True),
        ("layers.?.attn.?_proj", "layers.1.attn.q_proj", True),
        ("*.Q_proj", "layers.0.attn.q_proj", False),
        ("layers.0", "layers.00", False),
        ("a.b", "a_b", False),
    ],
)
def test_a_pattern_is_a_path_or_its_end_or_a_glob(pattern, path, expected):
    assert sites.matches(pattern, path) is expected


ALL = [
    "layers.0.attn.q_proj",
    "layers.0.attn.c_attn",
    "layers.0.mlp.up_proj",
    "layers.1.attn.q_proj",
    "layers.1.attn.c_attn",
    "layers.1.mlp.up_proj",
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": "all-linear"}, ALL),
        ({"targets": ["all-linear"]}, ALL),
        ({"targets": ["all-linear", "embed", "lm_head"]}, ["embed", *ALL, "lm_head"]),
        ({"targets": "q_proj"}, [ALL[0], ALL[3]]),
        ({"targets": ["up_proj", "q_proj"]}, [ALL[0], ALL[2], ALL[3], ALL[5]]),
        ({"targets": "layers.1.*proj"}, [ALL[3], ALL[5]]),
        ({"targets": ["conv"]}, ["conv"]),
        ({"targets": "all-linear", "exclude": ["attn.q_proj", "*.1.*"]}, ALL[1:3]),
        ({"targets": "all-linear", "layers": [1]}, ALL[3:]),
        ({"targets": "all-linear", "layers": [0, 1]}, ALL),
        ({"targets": ["embed", "q_proj"], "layers": [0]}, [ALL[0]]),
    ],
)
def test_find_selects_in_the_models_order(arguments, expected):
    assert paths(**arguments) == expected


@pytest.mark.parametrize("head", ["lm_head", "score", "classifier", "qa_outputs", "embed_out"])
def test_all_linear_leaves_out_output_heads(head):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), head: nn.Linear(2, 2)})
    assert paths("all-linear", model=model) == ["body"]
    assert paths(["all-linear", head], model=model) == ["body", head]
    nested = nn.ModuleDict({"model": nn.ModuleDict({head: nn.Linear(2, 2), "x": nn.Linear(2, 2)})})
    assert paths("all-linear", model=nested) == ["model.x"]


def test_all_linear_leaves_out_the_models_own_output_embeddings(tiny_llama):
    model = tiny_llama()
    model.other = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.other
    found = paths("all-linear", model=model)
    assert len(found) == 2 * 7
    assert "other" not in found


def test_a_shared_module_is_one_site_and_attached_adapters_are_none():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert paths("all-linear", model=model) == ["a"]
    shared.add_module("tether", nn.ModuleDict({"x": nn.Linear(2, 2)}))
    assert paths("all-linear", model=model) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "q_prj"}, r"target_modules: 'q_prj' matches no .*Nearest: 'q_proj'"),
        ({"targets": ["q_proj", "*.nope"]}, r"target_modules: '\*.nope' matches no"),
        ({"targets": "all_linear"}, "target_modules: 'all_linear'.*'all-linear'"),
        ({"targets": "all-linear", "exclude": ["up_prj"]}, "exclude_modules: 'up_prj'.*'up_proj'"),
        ({"targets": "all-linear", "layers": [0, 2]}, "no layer 2; the model's layers are 0 to 1"),
        ({"targets": ""}, "target_modules: '' matches no"),
    ],
)
def test_names_that_select_nothing_are_refused_with_the_nearest(arguments, message):
    with pytest.raises(UnknownNameError, match=message):
        sites.find(Model(), **arguments)


def test_a_layer_of_a_model_without_numbers_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(UnknownNameError, match="no layer 0; the model's layers are not numbered"):
        sites.find(model, "all-linear", layers=[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "q_proj", "exclude": ["q_proj"]}, r"\['q_proj'\] without .*\['q_proj'\]"),
        ({"targets": "embed", "layers": [1]}, r"\['embed'\].* in layers \[1\] select no weight"),
    ],
)
def test_selecting_nothing_is_refused(arguments, message):
    with pytest.raises(NoSiteError, match=message):
        sites.find(Model(), **arguments)


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Linear(6, 4), Layout("linear", (4, 6))),
        (Conv1D(4, 6), Layout("transposed", (6, 4))),
        (nn.Embedding(9, 4, padding_idx=0), Layout("embedding", (9, 4))),
        (nn.Conv1d(3, 4, 2, stride=2, padding=1), Layout("conv", (4, 3, 2))),
        (nn.Conv2d(3, 4, (2, 5)), Layout("conv", (4, 3, 2, 5))),
        (nn.Conv3d(3, 4, 2), Layout("conv", (4, 3, 2, 2, 2))),
        (nn.Conv2d(3, 4, 2, dilation=(1, 2)), Layout("conv", (4, 3, 2, 2), common=False)),
        (nn.Conv1d(3, 4, 2, padding_mode="circular"), Layout("conv", (4, 3, 2), common=False)),
    ],
)
def test_a_modules_layout_is_how_it_stores_its_weight(module, layout):
    assert sites.layout_of("here", module) == layout
    assert sites.base_weight("here", module) is module.weight


class Doubled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


class NotTransformers(nn.Module):
    """A class that only shares its name with transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))


NotTransformers.__name__ = "Conv1D"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LayerNorm(4), "LayerNorm cannot carry an adapter. Name its Linear"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups 2; only groups 1 .* Exclude it"),
        (nn.ConvTranspose1d(4, 4, 1), "ConvTranspose1d cannot carry"),
        (nn.Embedding(4, 4, max_norm=1.5), "max_norm 1.5 rewrites its own weight.* max_norm to"),
        (Doubled(4, 4), "Doubled changes what nn.Embedding computes.* Exclude it"),
        (nn.EmbeddingBag(4, 4), "EmbeddingBag cannot carry"),
        (NotTransformers(), "Conv1D cannot carry"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential cannot carry"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_refused(module, message):
    model = nn.ModuleDict({"here": module})
    with pytest.raises(UnsupportedModuleError, match=f"^site 'here': .*{message}"):
        sites.find(model, "here")


def test_the_projection_that_multihead_attention_never_calls_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    with pytest.raises(
        UnsupportedModuleError, match=r"site 'attn.out_proj'.*exclude_modules=\['attn.out_proj'\]"
    ):
        sites.find(model, "all-linear")
    assert paths("all-linear", ["attn.out_proj"], model=model) == ["up"]


def test_a_weight_that_cannot_be_read_is_refused():
    linear = nn.Linear(4, 3)
    with pytest.raises(MetaTensorError, match=r"site 'here': weight \(3, 4\) is on the meta"):
        sites.base_weight("here", nn.Linear(4, 3, device="meta"))
    linear.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModuleError, match=r"site 'here': .*torch.int8 in Linear"):
        sites.base_weight("here", linear)
    del linear.weight
    with pytest.raises(UnsupportedModuleError, match="site 'here': Linear has no weight tensor"):
        sites.base_weight("here", linear)


def test_a_sharded_weight_is_refused(mesh):
    from torch.distributed.tensor import distribute_tensor

    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    with pytest.raises(ShardedWeightError, match=r"site 'here'.*Attach before fully_shard"):
        sites.base_weight("here", linear)


@pytest.mark.parametrize(
    ("path", "index"),
    [("model.layers.3.mlp.0", 3), ("h.11.attn", 11), ("lm_head", None), ("layer3.x", None)],
)
def test_the_index_of_a_layer_is_the_first_number_in_its_path(path, index):
    assert sites.layer_index(path) == index


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (ALL, ("c_attn", "q_proj", "up_proj")),
        ([ALL[0], ALL[3], ALL[5]], ("layers.1.mlp.up_proj", "q_proj")),
        (["embed", "lm_head"], ("embed", "lm_head")),
    ],
)
def test_short_targets_are_the_shortest_names_that_select_the_sites(chosen, expected):
    targets, besides = sites.short_targets(Model(), chosen)
    assert (targets, besides) == (expected, ())
    assert sorted(paths(targets)) == sorted(chosen)


@pytest.mark.parametrize(
    ("chosen", "targets", "besides"),
    [
        (["0", "1.0"], ("0", "1.0"), ()),
        (["0"], ("0",), ("1.0",)),
        (["1.0"], ("1.0",), ()),
    ],
)
def test_what_a_whole_path_selects_besides_is_told(chosen, targets, besides):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert sites.short_targets(model, chosen) == (targets, besides)
    assert paths(targets, besides, model=model) == chosen
