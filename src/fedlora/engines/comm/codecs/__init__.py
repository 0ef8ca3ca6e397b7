"""Codecs, one a file. The file's name is the codec's name."""

from fedlora.engines.comm.codecs._base import Codec
from fedlora.registry import Registry

# "float32" is no codec: tensors are sent unchanged.
CODECS = Registry(Codec, "codec", group="fedlora.codecs", package=__name__, reserved=("float32",))
