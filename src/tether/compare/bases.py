"""Were two adapters made on one base? As far as both remember it."""

from tether.errors import BaseMismatchError
from tether.fingerprints import check_fingerprint
from tether.value import Adapter


def check_bases(
    a: Adapter, b: Adapter, names: tuple[str, str] = ("the first", "the second")
) -> int:
    """Raise if the base's weights were others where both adapters changed them.

    Args:
        a: an adapter.
        b: another.
        names: what to call them.

    Returns:
        how many sites could be checked: those of which both have a fingerprint. A file of another
        library has none.

    Raises:
        BaseMismatchError: naming the first site whose weights were others.
    """
    mine, theirs = a.provenance.fingerprints, b.provenance.fingerprints
    shared = [path for path in mine if path in theirs]
    for path in shared:
        one, other = mine[path], theirs[path]
        try:
            check_fingerprint(path, other, one)
        except BaseMismatchError:
            raise BaseMismatchError(
                f"site {path!r}: {names[0]} was made on {one.dtype} {one.shape} sha256 "
                f"{one.sha256[:12]}…, {names[1]} on {other.dtype} {other.shape} sha256 "
                f"{other.sha256[:12]}…. Compare adapters of one base model, or insist with "
                "--no-verify."
            ) from None
    return len(shared)
