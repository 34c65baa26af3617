"""The GPU depthwise kernel's source, compiled as C++ and run on the CPU, one thread after another.

`mlx_mobileclip.gpu.depthwise` compiles the same source for CUDA and, with another header, Metal.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mobileclip.gpu import depthwise

# Definitions that GPU compilers provide, and one function per set of template arguments.
PROGRAM = """
#include <cmath>
#define FUNCTION inline
#define UNROLL
struct alignas(16) float4 { float x, y, z, w; };
static thread_local struct { unsigned x; } thread_position_in_grid;
%s
template <typename T, int K, int S, int M, int BIASES, int WIDTH>
void kernel(const T* x, const int* x_shape, const T* w, const float* biases, T* out) {
%s
}
#define RUN(NAME, T, K, S, M, BIASES, WIDTH) extern "C" void NAME( \\
    const T* x, const int* x_shape, const T* w, const float* biases, T* out, unsigned threads) { \\
  for (unsigned i = 0; i < threads; i++) { \\
    thread_position_in_grid.x = i; \\
    kernel<T, K, S, M, BIASES, WIDTH>(x, x_shape, w, biases, out); \\
  } \\
}
"""
TYPES = {mx.float32: "float", mx.float16: "_Float16"}
# Every convolution of an image tower: size, stride, outputs per channel, number of biases.
FORMS = ((3, 1, 1, 2), (7, 1, 1, 1), (3, 2, 1, 1), (7, 2, 2, 1), (3, 1, 2, 1))


def _name(dtype: mx.Dtype, *form: int) -> str:
    return "_".join(("run", TYPES[dtype], *map(str, form)))


class CppKernel:
    """Replaces the callable that `mx.fast.metal_kernel` returns."""

    def __init__(self, folder: Path, forms: Sequence[tuple[int, ...]] = FORMS):
        """Compile the source for all forms; skips the test where there is no compiler."""
        if shutil.which("g++") is None:
            pytest.skip("there is no g++ to compile the kernel's source for the CPU")
        forms = [(*form, depthwise.WIDTHS[form[1]]) for form in forms]
        runs = [
            f"RUN({_name(dtype, *form)}, {label}, {', '.join(map(str, form))})"
            for form in forms
            for dtype, label in TYPES.items()
        ]
        source = PROGRAM % (depthwise.PORTABLE_HEADER, depthwise.SOURCE) + "\n".join(runs) + "\n"
        (folder / "kernel.cpp").write_text(source)
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        command = ["g++", *options, "kernel.cpp", "-o", "kernel.so"]
        subprocess.run(command, cwd=folder, check=True)
        self._library = ctypes.CDLL(str(folder / "kernel.so"))

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        grid: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        **_: Any,
    ) -> list[mx.array]:
        """Run the kernel; outputs that it does not write are NaN."""
        dtype, *form = (value for _, value in template)
        x, w, biases = (np.ascontiguousarray(np.array(array)) for array in inputs)
        assert x.dtype == w.dtype and biases.dtype == np.float32
        out = np.full(output_shapes[0], np.nan, x.dtype)
        shape = np.array(x.shape, np.int32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, shape, w, biases, out)]
        threads = -(-grid[0] // depthwise.THREADS) * depthwise.THREADS  # whole blocks, as in CUDA
        getattr(self._library, _name(dtype, *form))(*pointers, ctypes.c_uint(threads))
        return [mx.array(out)]
