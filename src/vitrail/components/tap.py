"""Named places in a model where one can look and intervene.

A [`Tap`][] is a parameter-free identity module. Models pass activations through it, always as
`x = self.tap(x)`, so what is seen is what is used. Because a tap has no parameters it never appears in a
state dictionary, and because nothing listens by default it costs one Python call.

`record` and `edit` are the only ways to use taps. Others call the idea hook points (TransformerLens) or
output capturing (transformers); there the model is a second copy or a global flag, here it is the model
itself.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Tap(nn.Module):
    """Identity at a fixed name; `watched` is true while somebody records or edits here."""

    @property
    def watched(self) -> bool:
        """Whether a `record` or `edit` is active on this tap."""
        return bool(self._forward_hooks)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` itself (any shape)."""
        return x


def taps(model: nn.Module) -> dict[str, Tap]:
    """All taps of a model by name, in the order in which the modules were defined."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Tap)}


@contextmanager
def record(model: nn.Module, *patterns: str) -> Iterator[dict[str, Tensor]]:
    """Keep what passes through the taps that match, e.g. `record(model, "blocks.*.attn.weights")`.

    Args:
        model: Any Vitrail model; not a compiled one (hooks added after compilation may be ignored).
        patterns: Shell-style patterns over tap names (`taps(model)` lists them).

    Yields:
        A dictionary, filled during the forward pass in its order: tap name to the tensor itself, with its
        gradient history. A tap passed more than once keeps its last value.

    Raises:
        ValueError: A pattern matches no tap, or the model is compiled.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen.pop(name, None)
            seen[name] = output

        return hook

    with _hooked(model, {name: keep(name) for name in _matching(model, patterns)}):
        yield seen


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace what passes through taps: `edit(model, {"blocks.3.attn.weights": torch.zeros_like})`.

    Args:
        model: Any Vitrail model; not a compiled one.
        edits: Pattern over tap names to a function of the tensor that returns a tensor of the same shape.

    Raises:
        ValueError: A pattern matches no tap, the model is compiled, or an edit changes the shape.
    """

    def replace(name: str, change: Edit) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            changed = change(output)
            if changed.shape != output.shape:
                raise ValueError(
                    f"edit of tap {name!r} changed the shape from {tuple(output.shape)} to "
                    f"{tuple(changed.shape)}; return a tensor of the same shape"
                )
            return changed

        return hook

    hooks = {
        name: replace(name, change)
        for pattern, change in edits.items()
        for name in _matching(model, [pattern])
    }
    with _hooked(model, hooks):
        yield


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    found = taps(model)
    handles = [found[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matching(model: nn.Module, patterns: Any) -> list[str]:
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "this model is compiled, and hooks added after compilation may be ignored; "
            "pass the model that was given to torch.compile instead"
        )
    names = list(taps(model))
    matched: list[str] = []
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            hint = f"; the nearest are {', '.join(near)}" if near else "; this model has no taps"
            raise ValueError(f"no tap matches {pattern!r}{hint}")
        matched += [name for name in hits if name not in matched]
    return matched
