"""What every pool is: pages of one device in one buffer, and views of it for each layer."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import torch

from ..kernels.cpu.huge_pages import advise_huge_pages
from ..shapes import check_int
from ..spec import KVCacheSpec, MLACacheSpec

__all__ = ["PageBuffer", "PagePool"]

_Spec = TypeVar("_Spec", KVCacheSpec, MLACacheSpec)
_Views = TypeVar("_Views")


class PageBuffer(Generic[_Spec, _Views]):
    """`num_pages` uninitialised pages for the layers of a spec, on large memory pages where the system gives them.

    A kind of pool says which spec it is for, what lies where in the buffer, and, if that is not the spec's, the
    buffer's dtype.
    """

    _spec_type: ClassVar[type]

    def __init__(self, spec: _Spec, num_pages: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(spec, self._spec_type):
            wanted = self._spec_type.__name__
            article = "an" if wanted.startswith("M") else "a"
            raise TypeError(f"spec must be {article} {wanted}, got {type(spec).__name__}.")
        check_int("num_pages", num_pages, minimum=1)
        self.spec: _Spec = spec
        self.num_pages = num_pages
        num_elements = num_pages * (self.bytes_per_page // spec.dtype.itemsize)
        # Outside inference mode, so that the pool can be written both inside and outside of it later.
        with torch.inference_mode(False):
            self.buffer = torch.empty(num_elements, dtype=self._buffer_dtype(), device=device)
        advise_huge_pages(self.buffer)
        self._views = self._layer_views()

    def _layer_views(self) -> list[_Views]:
        """The views of each layer."""
        raise NotImplementedError

    def _buffer_dtype(self) -> torch.dtype:
        return self.spec.dtype

    def __getstate__(self) -> dict[str, Any]:
        # As bytes: torch cannot load a pickled tensor of every dtype that a pool may have.
        state = {name: value for name, value in vars(self).items() if name != "_views"}
        return {**state, "buffer": self.buffer.view(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Views that travelled by themselves would no longer be views of the buffer.
        vars(self).update(state)
        self.buffer = self.buffer.view(self._buffer_dtype())
        self._views = self._layer_views()

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page."""
        return self.spec.bytes_per_page

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def _layer(self, layer: int) -> _Views:
        self._check_layer(layer)
        return self._views[layer]

    def _check_layer(self, layer: int) -> None:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"layer must be an int, got {type(layer).__name__}.")
        if not 0 <= layer < len(self._views):
            raise ValueError(f"layer must be in 0..{len(self._views) - 1}, got {layer}.")

    def _contents(self) -> str:
        """What the pages hold, in words."""
        return str(self.spec)

    def __repr__(self) -> str:
        where = f"num_pages={self.num_pages}, device={str(self.device)!r}, {self.num_bytes / 2**20:.1f} MiB"
        return f"{type(self).__name__}({where}, {self._contents()})"


class PagePool(PageBuffer[_Spec, _Views]):
    """A page holds `page_size` tokens of every layer."""

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self.spec.page_size
