"""What every test may use: a fixed random state and a small model."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh

# The tensors here are small: more threads only wait for each other.
torch.set_num_threads(1)

# No test reads or fills the user's own anchor cache; neither do the processes it starts.
os.environ["TETHER_NO_CACHE"] = "1"


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., transformers.LlamaForCausalLM]:
    """Make the same random Llama of two layers every time."""

    def make(**settings: object) -> transformers.LlamaForCausalLM:
        config = {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | settings))

    return make


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A device mesh of this one process."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
