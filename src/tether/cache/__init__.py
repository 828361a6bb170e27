"""Anchors found once are kept: content-addressed, in a folder that may be shared.

Finding an anchor is expensive, and depends on nothing but the base weight's bytes and the method.
`Key` names those; an entry is the start at one rank and one scaling:

    {folder}/{first two hex digits}/{sha256 of the key}/r16-s1.0.safetensors

A cache cannot make an adapter wrong. The displacement from an anchor starts at zero, so whatever
finite values an entry holds, training starts at the base model's own outputs (unless they are so
large that they overflow), and files carry the anchor that was used. An entry of wrong values would
be a worse start, no more. Entries are checked on every read all the same, digests included; what
fails a check is as good as missing, and replaced. The digests find damage, not intent: share a
folder with people whose anchors, and whose fingerprints of a base in other precisions, you accept.

`TETHER_CACHE` moves the folder, `TETHER_NO_CACHE=1` switches the cache off.
"""

from tether.cache.entry import Entry
from tether.cache.key import VERSION, Key
from tether.cache.store import AnchorCache, cache_folder, enabled, folder
from tether.cache.upkeep import Bad, Info, Pruned, Verified, info, prune, verify

__all__ = [
    "VERSION",
    "AnchorCache",
    "Bad",
    "Entry",
    "Info",
    "Key",
    "Pruned",
    "Verified",
    "cache_folder",
    "enabled",
    "folder",
    "info",
    "prune",
    "verify",
]
