"""One codec a file; the file's name is the codec's name. Found by looking in this folder, never listed."""

from fedlora import registry as finding
from fedlora.engines.comm.codecs._base import Codec
from fedlora.registry import unknown


def names() -> list[str]:
    """The names of all codecs."""
    return finding.names(__path__)


def load(name: str) -> type[Codec]:
    """The codec's class. ``ValueError`` names the nearest one."""
    if name not in names():  # what a user may write besides is no codec: the numbers as they are
        raise ValueError(unknown("codec", name, ["float32", *names()], "codecs"))
    return finding.load(__name__, name, names(), Codec, "codec")
