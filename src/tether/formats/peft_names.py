"""The names that PEFT gives its files and keys."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
CARD = "README.md"
FILES = frozenset({CONFIG, WEIGHTS, CARD})

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"
BIAS, SITE_BIAS, SITE_WEIGHT = ".bias", ".base_layer.bias", ".base_layer.weight"
