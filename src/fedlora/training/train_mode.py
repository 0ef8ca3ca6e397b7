"""What a network does in training or evaluation beside its forward pass: fused kernels, running statistics, buffers."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Buffers = dict[str, tuple[int, int]]  # name -> identity and version of the tensor


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


def read_buffers(network: nn.Module) -> Buffers:
    """Return what identifies the content of the buffers that belong to a checkpoint, without a copy.

    Other buffers, such as the frequencies of a positional encoding, follow from the input.
    """
    return {
        f"{path}.{name}".lstrip("."): (id(x), x._version)
        for path, module in network.named_modules()
        for name, x in module._buffers.items()
        if x is not None and name not in module._non_persistent_buffers_set
    }


def check_buffers(network: nn.Module, before: Buffers) -> None:
    """Raise ``ValueError`` if a buffer has changed, which would go from one client to the next and never be sent."""
    changed = [name for name, place in read_buffers(network).items() if before.get(name) != place]
    if changed:
        raise ValueError(
            f"the model changes its buffer {changed[0]!r} when it is trained, and buffers are not sent; make it a "
            "parameter and name its module in head, or keep it fixed in training."
        )
