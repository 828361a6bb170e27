"""Values -> one self-contained HTML page: inline data and scripts, no network, opens from disk.

A page is a title, sentences, and sections of figures, tables and texts (`page`). Figures are made
from values by the files of `figures`, which are the only ones that import matplotlib.
"""
