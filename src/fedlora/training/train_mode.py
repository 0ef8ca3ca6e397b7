"""What a network does in training or evaluation beside its forward pass: fused kernels, running statistics."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def disable_fast_paths(network: nn.Module) -> None:
    """Make torch's transformer layers call their linear layers in evaluation, too.

    Otherwise a fused kernel reads the weights of these layers and leaves out their adapters.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own sign that an activation has no fused kernel
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def set_train_mode(network: nn.Module) -> None:
    """Set the network to training, except for normalisations with running statistics, which stay as they are.

    The base is frozen, and the statistics belong to it: no client sends them, and clients share one network.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.eval()
