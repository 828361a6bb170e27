"""Bases that bitsandbytes and torchao quantised."""
