"""The cast of a network's weights to half precision."""

import re

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

HALF = (torch.bfloat16, torch.float16)
KEPT = "_keep_in_fp32_modules_strict"  # of a network of transformers: patterns of weights that stay in float32


def cast_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating parameters of a network in place, as ``from_pretrained`` of transformers would load them.

    Buffers keep their dtype: rotary frequencies lose the position of distant tokens in bfloat16. So do the parameters
    that the network names itself, such as the biases of a router, and those beside running statistics, whose kernels
    need one dtype.
    """
    kept = [_compile(pattern) for pattern in getattr(network, KEPT, None) or ()]
    for path, module in network.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            continue
        for name, x in module.named_parameters(path, recurse=False):
            if x.is_floating_point() and not any(pattern.search(name) for pattern in kept):
                x.data = x.data.to(dtype)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*"))
