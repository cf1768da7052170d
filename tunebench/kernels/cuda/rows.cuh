// The product of one row with a weight matrix, without tensor cores: a warp has whole outputs, its lanes share k.

namespace tb {

// y[N] = x[K] w[N, K]^T (+ bias) (+ residual). Weights as in `matvec`; a minimum multiplies a sum of activations.
// A warp has R outputs; a lane 16 bytes of weights of each at a time, of U such steps at once and the next U ahead.
// Activations lie in shared memory, in the order in which lanes read them and paired as weights unpack.
template <int BITS, int GROUP, int N, int K, int R, int WARPS, int U, bool RESIDUAL, typename Out,
          int ZERO = middle(BITS), bool BIAS = false>
__device__ __forceinline__ int rows(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y, const __half* __restrict__ offset = nullptr,
    const __half* __restrict__ bias = nullptr) {
  constexpr int PER_LANE = 4 * 32 / BITS, STEP = 32 * PER_LANE, STEPS = (K + STEP - 1) / STEP;  // weights
  constexpr int CHUNKS = PER_LANE / 8, WORDS = 4 / CHUNKS, PAIRS = Word<BITS>::PAIRS;  // 8 activations; their words
  constexpr bool EVEN = K % STEP == 0;
  static_assert(N % (R * WARPS) == 0 && K % 8 == 0, "shape");
  __shared__ uint4 held[STEPS * CHUNKS * 32];
  __shared__ float totals[ZERO == MINIMUM ? STEPS * 32 : 1];  // of the activations of a lane's 16 bytes of weights

  const int lane = threadIdx.x % 32, n0 = (blockIdx.x * WARPS + threadIdx.x / 32) * R;
  const char* from = static_cast<const char*>(w) + static_cast<size_t>(n0) * (K / 8 * BITS) + lane * 16;
  uint4 raw[2][U][R];
  __half scales[2][U][R], offsets[2][U][R];
  auto fetch = [&](int buffer, int start) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int k = (start + u) * STEP + lane * PER_LANE;
        const bool in = EVEN ? start + u < STEPS : k < K;
        raw[buffer][u][r] = in ? stream(from + static_cast<size_t>(r) * (K / 8 * BITS) + (start + u) * 512)
                               : make_uint4(0, 0, 0, 0);
        const size_t group = static_cast<size_t>(n0 + r) * (K / GROUP) + k / GROUP;
        if constexpr (BITS < 16) scales[buffer][u][r] = in ? constant(scale + group) : __float2half_rn(0.f);
        if constexpr (BITS < 16 && ZERO < 0) offsets[buffer][u][r] = in ? constant(offset + group) : __float2half_rn(0.f);
      }
  };
  fetch(0, 0);
  begin();  // weights do not depend on the kernel before; all else does
  for (int i = threadIdx.x; i < STEPS * CHUNKS * 32; i += 32 * WARPS) {
    const int to = (i / (32 * CHUNKS) * CHUNKS + i % CHUNKS) * 32 + i / CHUNKS % 32;
    uint4 v = EVEN || i * 8 < K ? fresh(x + i * 8) : make_uint4(0, 0, 0, 0);
    if constexpr (BITS == 4) {
      u32 p[4];
      Word<4>::pair(v, p);
#pragma unroll
      for (int j = 0; j < 4; ++j) p[j] = bits(__hmul2(halves(p[j]), __float2half2_rn(0.0625f)));  // see below
      v = make_uint4(p[0], p[1], p[2], p[3]);
    }
    held[to] = v;
  }
  __syncthreads();
  if constexpr (ZERO == MINIMUM) {
    for (int i = threadIdx.x; i < STEPS * 32; i += 32 * WARPS) {
      totals[i] = 0;
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        float f[8];
        floats(held[(i / 32 * CHUNKS + j) * 32 + i % 32], f);
#pragma unroll
        for (int e = 0; e < 8; ++e) totals[i] += f[e];
      }
    }
    __syncthreads();
  }

  float acc[R] = {};
#pragma unroll
  for (int start = 0; start < STEPS; start += U) {
    const int buffer = start / U % 2;
    if (start + U < STEPS) fetch(buffer ^ 1, start + U);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (start + u >= STEPS) break;
      float part[R] = {};
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        const uint4 v = held[((start + u) * CHUNKS + j) * 32 + lane];
        const u32* pairs = &v.x;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const u32* words = &raw[buffer][u][r].x + j * WORDS;
          u32 h[4];
#pragma unroll
          for (int i = 0; i < WORDS; ++i)
            Word<BITS>::template unpack<ZERO>(words[i], h + PAIRS * i, __half2half2(offsets[buffer][u][r]));
          if constexpr (BITS > 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 a = __half22float2(halves(h[i])), b = __half22float2(halves(pairs[i]));
              part[r] += a.x * b.x + a.y * b.y;
            }
          } else {  // four products in half precision, then on in single; of a sixteenth of x, lest they overflow
            __half2 sum = __hmul2(halves(h[0]), halves(pairs[0]));
#pragma unroll
            for (int i = 1; i < 4; ++i) sum = __hfma2(halves(h[i]), halves(pairs[i]), sum);
            const float2 two = __half22float2(sum);
            part[r] += two.x + two.y;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        constexpr float SHRUNK = BITS == 4 ? 16.f : 1.f;
        acc[r] += BITS < 16 ? part[r] * SHRUNK * __half2float(scales[buffer][u][r]) : part[r];
        if constexpr (ZERO == MINIMUM)
          acc[r] += totals[(start + u) * 32 + lane] * SHRUNK * __half2float(offsets[buffer][u][r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) acc[r] += __shfl_xor_sync(0xffffffffu, acc[r], step);
    if (lane == r) {
      float total = acc[r];
      if constexpr (BIAS) total += __half2float(fresh_half(bias + n0 + r));
      if constexpr (RESIDUAL) total += __half2float(fresh_half(residual + n0 + r));
      store(y + n0 + r, total);
    }
  }
  return 0;
}

}  // namespace tb
