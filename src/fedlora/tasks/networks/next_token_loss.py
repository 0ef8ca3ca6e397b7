"""Cross-entropy of predicted tokens, without the logits of all positions at once.

The hidden states of learnt positions pass through the network's head in chunks. The head is the network's own forward
pass with its body (all layers up to the last hidden states) replaced by these states, so that soft-caps, scales of
logits, biases and tied weights apply. If nothing in the head is trained, the gradient of a chunk is computed in the
forward pass, and its logits are freed at once; otherwise chunks are recomputed in the backward pass.

``prepare_loss`` tests once, on the network itself, whether it can be divided like that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from fedlora.tasks.data.tokens import IGNORED

CHUNK = 2**25  # logits that are computed at once
ROWS = 2  # learnt positions of a chunk when a network is tested
# Relative, of loss and gradient in float32: a wrong head was at 6e-3, and rounding at 1.5e-4 (Gemma 3 270M, where the
# gradient is a sum over 262,144 words that nearly cancel).
TOLERANCE = 1e-3
COARSE = 2e-2  # in bfloat16 and for quantised weights: products of other sizes are rounded in another way
# A network that cannot be divided, or that needs other inputs, may fail anywhere in its own code.
FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Inputs = Mapping[str, Any]  # keyword arguments of a network, without labels


@dataclass(frozen=True)
class AllLogits:
    """Computes the logits of all positions, then selects the learnt ones; right for every network.

    ``positions (n,)`` are indices into the network's positions, rows one after another, and ``targets (n,)`` the tokens
    that are predicted there.
    """

    def mean(self, network: nn.Module, inputs: Inputs, positions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets, a differentiable scalar in float32."""
        return _mean(self._logits(network, inputs, positions), targets)

    def each(self, network: nn.Module, inputs: Inputs, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each target (n,), differentiable, and whether it is the likeliest token (n,)."""
        return _score(self._logits(network, inputs, positions), targets)

    def _logits(self, network: nn.Module, inputs: Inputs, positions: Tensor) -> Tensor:
        logits: Tensor = network(**inputs).logits
        return logits.flatten(0, 1)[positions]


@dataclass(frozen=True)
class SelectedLogits(AllLogits):
    """Computes the logits of learnt positions only, all at once, by a selection before the output embeddings."""

    def each(self, network: nn.Module, inputs: Inputs, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # per-sample gradients of an adapted head need all inputs, row by row
            return AllLogits().each(network, inputs, positions, targets)
        return super().each(network, inputs, positions, targets)

    def _logits(self, network: Any, inputs: Inputs, positions: Tensor) -> Tensor:
        def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0].flatten(0, 1)[positions.to(args[0].device)][None], *args[1:]

        handle = network.get_output_embeddings().register_forward_pre_hook(select)
        try:
            (logits,) = network(**inputs).logits
        finally:
            handle.remove()
        selected: Tensor = logits
        return selected


@dataclass(frozen=True)
class ChunkedLogits(AllLogits):
    """Computes the logits of learnt positions in chunks; ``body`` is the path of the module with all other layers."""

    body: str
    size: int = CHUNK

    def mean(self, network: nn.Module, inputs: Inputs, positions: Tensor, targets: Tensor) -> Tensor:
        head = Head.after(network, self.body, inputs)
        if self._is_one_chunk(head, positions):  # the bits of ``AllLogits``
            return _mean(head.logits(positions), targets)
        if head.is_trained:
            return self._recompute(head, positions, targets)[0].sum() / len(positions)
        return self._differentiate(head, positions, targets, len(positions))[0].sum()

    def each(self, network: nn.Module, inputs: Inputs, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        head = Head.after(network, self.body, inputs)
        if self._is_one_chunk(head, positions):
            return _score(head.logits(positions), targets)
        if head.is_trained:
            return self._recompute(head, positions, targets)
        return self._differentiate(head, positions, targets, 1)

    def _is_one_chunk(self, head: "Head", positions: Tensor) -> bool:
        rows = head.hidden.shape[:2].numel() if head.is_trained else len(positions)
        return rows * head.words <= self.size

    def _differentiate(self, head: "Head", positions: Tensor, targets: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
        """Compute gradients in the forward pass; the cross-entropies are divided by ``divisor``."""
        rows = max(1, self.size // head.words)
        values, hits = _GradientInForward.apply(head.select(positions), targets, divisor, rows, head)
        return values, hits

    def _recompute(self, head: "Head", positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute chunks anew in the backward pass. A chunk has all rows: per-sample gradients need them apart."""
        hidden = head.hidden
        labels = torch.full(hidden.shape[:2], IGNORED, device=hidden.device)
        labels.view(-1)[positions] = targets.to(hidden.device)
        columns = max(1, self.size // (len(hidden) * head.words))

        def score(part: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            values, hits = _score(head(part.contiguous()).flatten(0, 1), own.flatten())
            return values.view(own.shape), hits.view(own.shape)

        parts = zip(hidden.split(columns, 1), labels.split(columns, 1))
        scores = [checkpoint(score, *part, use_reentrant=False) for part in parts]
        values, hits = (torch.cat(x, 1).flatten()[positions] for x in zip(*scores))
        return values, hits


@dataclass(frozen=True)
class Head:
    """What a network computes from its last hidden states ``hidden (b t d)``: a function of (b t d) to (b t words)."""

    network: Any
    body: nn.Module
    output: type[ModelOutput]  # of the body
    hidden: Tensor
    words: int
    is_trained: bool  # whether a gradient flows into the head's own weights

    @classmethod
    def after(cls, network: nn.Module, body: str, inputs: Inputs) -> "Head":
        """Run a network's body; its head computes the first positions only, and no gradient of its inputs."""
        outputs: list[Any] = []

        # Contiguous: in bfloat16, torch multiplies a slice of each row with a copy of the weights of its own.
        def keep_first_positions(module: nn.Module, args: Any, output: Any) -> Any:
            outputs.append(output)
            return type(output)(last_hidden_state=output.last_hidden_state[:, :1].detach().contiguous())

        module = network.get_submodule(body)
        handle = module.register_forward_hook(keep_first_positions)
        try:
            logits = network(**inputs).logits
        finally:
            handle.remove()
        (output,) = outputs
        return cls(network, module, type(output), output.last_hidden_state, logits.shape[-1], logits.requires_grad)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (b t words) of hidden states (b t d)."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.network.config.is_encoder_decoder:
            inputs = {"encoder_outputs": (hidden,), "decoder_input_ids": ids}
        with _replace_forward(self.body, lambda *args, **kwargs: self.output(last_hidden_state=hidden)):
            logits: Tensor = self.network(**inputs, use_cache=False).logits
        return logits

    def select(self, positions: Tensor) -> Tensor:
        """Return the hidden states (n, d) of some positions."""
        return self.hidden.flatten(0, 1)[positions.to(self.hidden.device)]

    def logits(self, positions: Tensor) -> Tensor:
        """Return the logits (n, words) of some positions at once."""
        if self.is_trained:  # row by row, as per-sample gradients need it
            return self(self.hidden).flatten(0, 1)[positions]
        return self(self.select(positions)[None])[0]


class _GradientInForward(torch.autograd.Function):
    """Cross-entropies of chunks, each with its gradient with respect to the hidden states, in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, divisor: int, rows: int, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return each target's cross-entropy divided by ``divisor`` (n,), and whether it is the likeliest (n,)."""
        values, hits, grads = [], [], []
        for part, own in zip(hidden.split(rows), targets.split(rows)):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                x = part.detach().requires_grad_(ctx.needs_input_grad[0])
                value, hit = _score(head(x[None])[0], own)
                value = value / divisor  # before the backward pass, as in a mean
                total = value.sum()
            if ctx.needs_input_grad[0]:
                with torch.autocast(x.device.type, enabled=False):  # as outside of the forward pass
                    grads += torch.autograd.grad(total, x)
            values.append(value.detach())
            hits.append(hit)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        found = torch.cat(values), torch.cat(hits)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grads * outputs[0][:, None]).to(grads.dtype), None, None, None, None


def _mean(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets.to(logits.device))


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each target (n,) in float32, and whether it is the likeliest token (n,)."""
    logits, targets = logits.float(), targets.to(logits.device)
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@contextmanager
def _replace_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward pass of one module, whose attributes stay in reach."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def select_learnt(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions (n,) of learnt tokens in labels (b t), rows one after another, and these tokens (n,)."""
    flat = labels.flatten()
    positions = (flat != IGNORED).nonzero()[:, 0]
    return positions, flat[positions]


def loss_of(network: nn.Module) -> AllLogits:
    """Return the computation that ``prepare_loss`` chose for a network; that of all logits if it was never called."""
    loss: AllLogits = getattr(network, "next_token_loss", AllLogits())
    return loss


def prepare_loss(network: Any, inputs: Inputs) -> None:
    """Choose the computation of a network's loss that needs least memory and gives the values of ``AllLogits``.

    ``inputs`` are a small batch, on which it is tested. The choice is kept with the network.
    """
    network.next_token_loss = AllLogits()
    with _test_mode(network):
        inputs = {**inputs, "use_cache": False}
        try:
            body = find_body(network, inputs)
            test = _Test.of(network, inputs, body)
        except FAILURES:  # it may need inputs that are not here
            return
        ways = [*([] if body is None else [ChunkedLogits(body)]), SelectedLogits()]
        network.next_token_loss = next((way for way in ways if test.passes(way)), AllLogits())


def assume_chunks(network: Any, inputs: Inputs) -> None:
    """Choose chunks without a test, for the memory estimate of a network whose weights have no values."""
    try:
        body = find_body(network, inputs)
    except FAILURES:
        body = None
    network.next_token_loss = AllLogits() if body is None else ChunkedLogits(body)


def find_body(network: nn.Module, inputs: Inputs) -> str | None:
    """Return the path of a network's body: the last module that it calls itself and that returns hidden states."""
    depth, bodies = 0, []

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(path: str, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0 and isinstance(output, ModelOutput) and getattr(output, "last_hidden_state", None) is not None:
            bodies.append(path)

    with ExitStack() as hooks, torch.no_grad():
        for path, module in network.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                after = module.register_forward_hook(lambda module, args, output, path=path: leave(path, output))
                hooks.callback(after.remove)
        network(**inputs)
    return bodies[-1] if bodies else None


@contextmanager
def _test_mode(network: nn.Module) -> Iterator[None]:
    """Set a network to evaluation, with no gradient of its weights."""
    training, trained = network.training, [x for x in network.parameters() if x.requires_grad]
    network.eval()
    network.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        network.train(training)
        for x in trained:
            x.requires_grad_(True)


@dataclass(frozen=True)
class _Test:
    """A small batch, some of its positions, and the values of ``AllLogits`` there."""

    network: Any
    inputs: Inputs
    body: str | None
    positions: Tensor
    targets: Tensor
    right: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, network: Any, inputs: Inputs, body: str | None) -> "_Test":
        ids = inputs.get("decoder_input_ids", inputs["input_ids"])
        positions = torch.arange(0, ids.numel(), 2, device=ids.device)
        test = cls(network, inputs, body, positions, ids.flatten()[positions])
        return replace(test, right=test.values(AllLogits()))

    def passes(self, way: AllLogits) -> bool:
        """Whether loss, gradient and each token's cross-entropy are right."""
        if isinstance(way, ChunkedLogits):
            way = replace(way, size=ROWS * self.network.config.get_text_config().vocab_size)
        try:
            values = self.values(way)
        except FAILURES:
            return False
        weights = [x for x in self.network.parameters() if x.is_floating_point()]
        is_coarse = getattr(self.network, "is_quantized", False) or any(x.dtype != torch.float32 for x in weights)
        bound = COARSE if is_coarse else TOLERANCE
        return all(bool((x - y).norm() <= bound * y.norm()) for x, y in zip(values, self.right, strict=True))

    def values(self, way: AllLogits) -> tuple[Tensor, ...]:
        """Return the mean loss, its gradient at the body's output if there is a body, and the cross-entropies."""
        leaves: list[Tensor] = []

        def replace_by_leaf(module: nn.Module, args: Any, output: Any) -> Any:
            if leaves:  # the head's pass
                return output
            leaves.append(output.last_hidden_state.detach().requires_grad_())
            return replace(output, last_hidden_state=leaves[0])

        arguments = (self.network, self.inputs, self.positions, self.targets)
        with ExitStack() as hooks:
            if self.body is not None:
                hooks.callback(self.network.get_submodule(self.body).register_forward_hook(replace_by_leaf).remove)
            loss = way.mean(*arguments)
            gradient = torch.autograd.grad(loss, leaves) if leaves else ()
        with torch.no_grad():
            each, _ = way.each(*arguments)
        return tuple(x.detach().float() for x in (loss, *gradient, each))
