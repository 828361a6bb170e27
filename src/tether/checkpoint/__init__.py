"""A model folder on disk, read tensor by tensor: no tensor is read before it is asked for.

Files from others are data: the index names plain files of the folder, nothing is unpickled, and
a link out of the folder is not followed (but into the hub's own cache, where all files are links).
"""

from tether.checkpoint.folder import CONFIG, DTYPES, INDEX, WEIGHTS, check_inside
from tether.checkpoint.tensors import Checkpoint

__all__ = ["CONFIG", "DTYPES", "INDEX", "WEIGHTS", "Checkpoint", "check_inside"]
