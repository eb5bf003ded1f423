"""The extension: private, positional-only, C does the checking. `bnbq.ops` has the documentation."""

from typing import Any, Final, TypedDict

# On the CPU: numpy.ndarray, torch.Tensor, or anything with __dlpack__. On a GPU: torch.Tensor; all of a call's
# arguments lie on that GPU, and the functions that go backward take none.
_Tensor = Any

class _Row(TypedDict):
    family: str
    isa: str
    level: str
    needs: tuple[str, ...]
    missing: tuple[str, ...]
    in_use: bool
    bf16_min_m: int  # 4-bit: the product of bf16 rounds weights or codebook to bf16 for so many rows of x,
    bf16_max_m: int  # up to so many; 0, 0: never

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: str | None
    cuda_archs: str
    sanitize: str
    asserts: bool

BLOCKSIZES: Final[tuple[int, ...]]
ABSMAX_BLOCK: Final[int]

# Arguments named *_out, and `out`, are written to. An int for `out` (None for the int8 functions)
# returns a new tensor like x or gy with that many columns; otherwise the result is None.
def quantize_4bit(
    w: _Tensor, qweight_out: _Tensor, absmax_out: _Tensor, quant_type: str, blocksize: int, /
) -> None: ...
def dequantize_4bit(
    qweight: _Tensor,
    absmax: _Tensor,
    absmax2: _Tensor | None,
    absmax_offset: _Tensor | None,
    out: _Tensor,
    quant_type: str,
    blocksize: int,
    /,
) -> None: ...
def quantize_absmax(
    absmax: _Tensor, codes_out: _Tensor, absmax2_out: _Tensor, offset_out: _Tensor, /
) -> None: ...
def dequantize_absmax(codes: _Tensor, absmax2: _Tensor, absmax_offset: _Tensor, out: _Tensor, /) -> None: ...
def quantize_8bit(w: _Tensor, qweight_out: _Tensor, absmax_out: _Tensor, blocksize: int, /) -> None: ...
def dequantize_8bit(qweight: _Tensor, absmax: _Tensor, out: _Tensor, blocksize: int, /) -> None: ...
def linear4bit(
    x: _Tensor,
    qweight: _Tensor,
    absmax: _Tensor,
    absmax2: _Tensor | None,
    absmax_offset: _Tensor | None,
    bias: _Tensor | None,
    out: _Tensor | int,
    quant_type: str,
    blocksize: int,
    compute_dtype: str | None,
    activations: str | None,
    /,
) -> _Tensor | None: ...
def linear4bit_backward(
    gy: _Tensor,
    qweight: _Tensor,
    absmax: _Tensor,
    absmax2: _Tensor | None,
    absmax_offset: _Tensor | None,
    out: _Tensor | int,
    quant_type: str,
    blocksize: int,
    compute_dtype: str | None,
    /,
) -> _Tensor | None: ...
def linear8bitlt(
    x: _Tensor,
    qweight: _Tensor,
    absmax: _Tensor,
    bias: _Tensor | None,
    out: _Tensor | int | None,
    threshold: float,
    blocksize: int,
    /,
) -> _Tensor | None: ...
def linear8bitlt_backward(
    gy: _Tensor, qweight: _Tensor, absmax: _Tensor, out: _Tensor | int | None, blocksize: int, /
) -> _Tensor | None: ...
def linear4bit_experts(
    x: _Tensor,
    ends: list[int],
    qweight: _Tensor,
    absmax: _Tensor,
    absmax2: _Tensor | None,
    absmax_offset: _Tensor | None,
    bias: _Tensor | None,
    out: _Tensor | int,
    quant_type: str,
    blocksize: int,
    compute_dtype: str | None,
    activations: str | None,
    /,
) -> _Tensor | None: ...
def linear4bit_experts_backward(
    gy: _Tensor,
    ends: list[int],
    qweight: _Tensor,
    absmax: _Tensor,
    absmax2: _Tensor | None,
    absmax_offset: _Tensor | None,
    out: _Tensor | int,
    quant_type: str,
    blocksize: int,
    compute_dtype: str | None,
    /,
) -> _Tensor | None: ...
def linear8bitlt_experts(
    x: _Tensor,
    ends: list[int],
    qweight: _Tensor,
    absmax: _Tensor,
    bias: _Tensor | None,
    out: _Tensor | int | None,
    threshold: float,
    blocksize: int,
    /,
) -> _Tensor | None: ...
def linear8bitlt_experts_backward(
    gy: _Tensor, ends: list[int], qweight: _Tensor, absmax: _Tensor, out: _Tensor | int | None, blocksize: int, /
) -> _Tensor | None: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def rows() -> list[_Row]: ...
def cpu_features() -> tuple[str, ...]: ...
def thread_count() -> int: ...
def set_thread_limit(threads: int, /) -> None: ...
def thread_backend() -> str: ...
def set_batch_invariant(on: bool, /) -> None: ...
def batch_invariant() -> bool: ...
def formats() -> tuple[str, ...]: ...
def build_info() -> _BuildInfo: ...
