"""The tiny model and its text on disk."""

from tiny_model import model_folder, one_core, text_file

__all__ = ["model_folder", "one_core", "text_file"]
