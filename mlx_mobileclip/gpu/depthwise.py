"""A custom depthwise convolution kernel, in one source for Metal and CUDA.

MLX's kernel rounds each product to half precision before adding, and loads a weight for each
product (MLX 0.32.4 mlx/backend/metal/kernels/conv.metal). This one accumulates in float32. Each
thread computes a strip of positions in four channels, which reuses loaded values, and adds the
biases after the convolution before it rounds.

It is off by default, until `bench mac` shows that it is faster on a chip;
$MLX_MOBILECLIP_DEPTHWISE=own turns it on.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from ..device import backend
from ..errors import ModelError

SWITCH = "MLX_MOBILECLIP_DEPTHWISE"
CHOICES = ("mlx", "own")
# Device names, as MLX reports them, on which `bench mac` has shown this kernel to be faster than
# MLX's. None so far.
FASTER_ON: frozenset[str] = frozenset()
THREADS = 256  # per threadgroup
WIDTHS = {1: 8, 2: 4}  # positions per thread, by stride
MAX_INDEX = 2**31 - 1  # element index; the kernel uses 32-bit indices
MIN_SIZE = 8  # elements; MLX passes smaller inputs in another address space

# Template: T, element type; K, kernel size; S, stride; M, outputs per channel; BIASES, number of
# biases; WIDTH, positions per thread. Inputs: x (B, H, W, C), w (K * K, M * C)
# and biases (BIASES, M * C). Output: out (BIASES, B, Ho, Wo, M * C).
SOURCE = """
const int H = x_shape[1], W = x_shape[2], C = x_shape[3], O = M * C;
const int Ho = (H + S - 1) / S, Wo = (W + S - 1) / S;
const int strips = (Wo + WIDTH - 1) / WIDTH, images = x_shape[0];
int rest = thread_position_in_grid.x;
if (rest >= images * Ho * strips * (O / 4)) return;
const int o = 4 * (rest % (O / 4));
rest /= O / 4;
const int first = WIDTH * (rest % strips);
rest /= strips;
const int row = rest % Ho, image = rest / Ho;

constexpr int READ = (WIDTH - 1) * S + K;
float4 sums[WIDTH];
UNROLL
for (int i = 0; i < WIDTH; i++) sums[i] = zero4();
for (int kh = 0; kh < K; kh++) {
  const int h = row * S + kh - K / 2;
  if (h < 0 || h >= H) continue;
  float4 values[READ];
  UNROLL
  for (int j = 0; j < READ; j++) {
    const int column = first * S + j - K / 2;
    const int position = (image * H + h) * W + column;
    if (column < 0 || column >= W) values[j] = zero4();
    else if (M == 1) values[j] = load4(x + position * C + o);
    else values[j] = load_pairs(x + position * C + o / 2);
  }
  UNROLL
  for (int kw = 0; kw < K; kw++) {
    const float4 weight = load4(w + (kh * K + kw) * O + o);
    UNROLL
    for (int i = 0; i < WIDTH; i++) sums[i] = multiply_add(values[i * S + kw], weight, sums[i]);
  }
}
for (int n = 0; n < BIASES; n++) {
  const float4 bias = load4(biases + n * O + o);
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    if (first + i >= Wo) continue;
    const int position = ((n * images + image) * Ho + row) * Wo + first + i;
    store4(out + position * O + o, add4(sums[i], bias));
  }
}
"""

METAL_HEADER = """
#define UNROLL _Pragma("clang loop unroll(full)")
inline float4 zero4() { return float4(0); }
inline float4 add4(float4 a, float4 b) { return a + b; }
inline float4 multiply_add(float4 a, float4 b, float4 c) { return fma(a, b, c); }
template <typename T>
inline float4 load4(const device T* from) { return float4(*(const device vec<T, 4>*)from); }
template <typename T>
inline float4 load_pairs(const device T* from) {
  const float2 pair = float2(*(const device vec<T, 2>*)from);
  return float4(pair.x, pair.x, pair.y, pair.y);
}
template <typename T>
inline void store4(device T* to, float4 value) { *(device vec<T, 4>*)to = vec<T, 4>(value); }
"""

# Valid C++ once FUNCTION, UNROLL, float4 and thread_position_in_grid are defined.
PORTABLE_HEADER = """
template <typename T, int N> struct alignas(N * sizeof(T)) Elements { T of[N]; };
FUNCTION float4 zero4() { return float4{0, 0, 0, 0}; }
FUNCTION float4 add4(float4 a, float4 b) {
  return float4{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
FUNCTION float4 multiply_add(float4 a, float4 b, float4 c) {
  return float4{fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y), fmaf(a.z, b.z, c.z),
                fmaf(a.w, b.w, c.w)};
}
template <typename T> FUNCTION float4 load4(const T* from) {
  const auto e = *reinterpret_cast<const Elements<T, 4>*>(from);
  return float4{float(e.of[0]), float(e.of[1]), float(e.of[2]), float(e.of[3])};
}
template <typename T> FUNCTION float4 load_pairs(const T* from) {
  const auto e = *reinterpret_cast<const Elements<T, 2>*>(from);
  return float4{float(e.of[0]), float(e.of[0]), float(e.of[1]), float(e.of[1])};
}
template <typename T> FUNCTION void store4(T* to, float4 value) {
  *reinterpret_cast<Elements<T, 4>*>(to) =
      Elements<T, 4>{{T(value.x), T(value.y), T(value.z), T(value.w)}};
}
"""

CUDA_HEADER = (
    """
#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define thread_position_in_grid (uint3{blockIdx.x * blockDim.x + threadIdx.x, 0, 0})
"""
    + PORTABLE_HEADER
)


def use_own() -> bool:
    """Whether depthwise convolutions use this kernel instead of MLX's.

    Raises:
        ModelError: the environment variable is neither "own" nor "mlx".
    """
    choice = os.environ.get(SWITCH)
    if choice and choice not in CHOICES:
        raise ModelError(f"{SWITCH} is {choice[:20]!r}; set it to {' or '.join(CHOICES)}")
    if backend() == "cpu" or not (choice or FASTER_ON):
        return False
    return choice == "own" if choice else mx.device_info().get("device_name") in FASTER_ON


def supports(x: mx.array, kernel: mx.array, outputs: int) -> bool:
    """Whether the kernel supports this convolution, with one or two biases.

    Args:
        x: (B, H, W, C).
        kernel: (C, k, k, 1); only its dtype is used.
        outputs: Per channel, 1 or 2.
    """
    channels = outputs * x.shape[3]
    return (
        x.dtype == kernel.dtype
        and channels % 4 == 0
        and min(x.size, channels) >= MIN_SIZE
        and 2 * outputs * x.size <= MAX_INDEX
    )


def arranged(kernels: list[mx.array]) -> mx.array:
    """Arrange one or two kernels (C, k, k, 1) of M outputs per channel as (k * k, M * C)."""
    channels = kernels[0].shape[0]
    return mx.contiguous(mx.stack(kernels, axis=1).reshape(len(kernels) * channels, -1).T)


def depthwise_conv(x: mx.array, weight: mx.array, biases: mx.array, stride: int) -> mx.array:
    """Convolve with "same" padding, and add each bias to a copy of the result.

    Args:
        x: (B, H, W, C), for which `supports` is true.
        weight: From `arranged`, (k * k, M * C).
        biases: float32 (N, M * C).
        stride: 1 or 2.

    Returns:
        (N, B, H/s, W/s, M * C), sizes rounded up, in the dtype of x.
    """
    B, H, W, C = x.shape
    outputs, size = weight.shape[1] // C, round(weight.shape[0] ** 0.5)
    width = WIDTHS[stride]
    shape = (len(biases), B, -(-H // stride), -(-W // stride), outputs * C)
    threads = B * shape[2] * -(-shape[3] // width) * (shape[4] // 4)
    template = {"T": x.dtype, "K": size, "S": stride, "M": outputs}
    template |= {"BIASES": len(biases), "WIDTH": width}
    (result,) = _kernel(backend())(
        inputs=[x, weight, biases],
        template=list(template.items()),
        grid=(threads, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[x.dtype],
    )
    return result


@cache
def _kernel(backend: str) -> Callable[..., Any]:
    create: Any = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return create(
        name="mobileclip_depthwise",
        input_names=["x", "w", "biases"],
        output_names=["out"],
        source=SOURCE,
        header=METAL_HEADER if backend == "metal" else CUDA_HEADER,
    )
