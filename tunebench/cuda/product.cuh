// Products of many rows with a weight matrix, on tensor cores, weights unpacked from shared memory into registers.

namespace tb {

// y[M, N] = x[M, K] w[N, K]^T (+ residual), a block BM x BN of it. BITS 4 or 16; one scale for each GROUP along k.
// 8 warps, 2 x 4 of them, each BM / 2 x BN / 4; DEPTH along k at a time, the next on its way meanwhile.
//
// In a group of 32 along k, lane c of four takes activations and weights 8c to 8c + 7 for two products: which slot of a
// product they fill does not matter as long as both agree. So a lane's part of x is one read of 16 bytes, and its part
// of four-bit weights one word; x is stored in the pairs in which that word unpacks.
template <int BITS, int GROUP, int M, int N, int K, int BM, int BN, int DEPTH, bool RESIDUAL, typename Out>
__device__ __forceinline__ int product(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y) {
  constexpr int THREADS = 256, CHUNKS = DEPTH / 8, GROUPS = DEPTH / 32;  // 16 bytes of a row of x; groups of 32
  constexpr int X_EACH = BM * CHUNKS / THREADS;                           // reads of a thread
  constexpr int W_BYTES = DEPTH / 8 * BITS, W_CHUNKS = BN * W_BYTES / 16;
  constexpr int TALL = BM / 32, WIDE = BN / 32;  // tiles of 16 rows, and of 8 outputs, of a warp
  static_assert(M % BM == 0 && N % BN == 0 && K % DEPTH == 0 && BM * CHUNKS % THREADS == 0, "shape");
  static_assert((BITS == 4 && GROUP == 32) || BITS == 16, "weights");
  __shared__ uint4 x_held[2][BM * CHUNKS];
  __shared__ __align__(16) char w_held[2][BN * W_BYTES];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  const int row0 = warp % 2 * (BM / 2), column0 = warp / 2 * (BN / 4);

  // Rows that differ in their last bit keep their groups of 64 bytes in another order: no bank is met twice.
  auto place = [](int row, int chunk) { return row * CHUNKS + (CHUNKS >= 8 ? chunk ^ (row & 1) * 4 : chunk); };

  uint4 ahead[X_EACH];
  auto fetch_x = [&](int k) {
#pragma unroll
    for (int i = 0; i < X_EACH; ++i) {
      const int at = i * THREADS + threadIdx.x;
      ahead[i] = fresh(x + static_cast<size_t>(m0 + at / CHUNKS) * K + k + at % CHUNKS * 8);
    }
  };
  auto keep_x = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < X_EACH; ++i) {
      const int at = i * THREADS + threadIdx.x;
      uint4 v = ahead[i];
      if constexpr (BITS == 4) {
        u32 p[4];
        Word<4>::pair(v, p);
        v = make_uint4(p[0], p[1], p[2], p[3]);
      }
      x_held[buffer][place(at / CHUNKS, at % CHUNKS)] = v;
    }
  };
  auto fetch_w = [&](int buffer, int k) {
#pragma unroll
    for (int i = threadIdx.x; i < W_CHUNKS; i += THREADS) {
      const int row = i / (W_BYTES / 16), part = i % (W_BYTES / 16) * 16;
      copy_async(
          w_held[buffer] + row * W_BYTES + part,
          static_cast<const char*>(w) + static_cast<size_t>(n0 + row) * (K / 8 * BITS) + k / 8 * BITS + part);
    }
    commit();
  };

  fetch_w(0, 0);
  begin();  // weights do not depend on the kernel before; all else does
  fetch_x(0);
  keep_x(0);
  await<0>();
  __syncthreads();
  float acc[TALL][WIDE][4] = {};
  for (int k = 0; k < K; k += DEPTH) {
    const int now = k / DEPTH % 2;
    if (k + DEPTH < K) {
      fetch_w(now ^ 1, k + DEPTH);
      fetch_x(k + DEPTH);
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      u32 b[WIDE][4];
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        const int column = column0 + 8 * j + g;
        const char* from = w_held[now] + column * W_BYTES + (group * 4 + c) * BITS;  // of 8 weights, BITS bytes
        if constexpr (BITS == 4) {
          Word<4>::unpack(*reinterpret_cast<const u32*>(from), b[j]);
          const __half2 s = __half2half2(constant(scale + static_cast<size_t>(n0 + column) * (K / GROUP) + k / GROUP + group));
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j][i] = bits(__hmul2(halves(b[j][i]), s));
        } else {
          const uint4 v = *reinterpret_cast<const uint4*>(from);
          b[j][0] = v.x; b[j][1] = v.y; b[j][2] = v.z; b[j][3] = v.w;
        }
      }
#pragma unroll
      for (int i = 0; i < TALL; ++i) {
        const uint4 top = x_held[now][place(row0 + 16 * i + g, group * 4 + c)];
        const uint4 low = x_held[now][place(row0 + 16 * i + g + 8, group * 4 + c)];
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          mma(acc[i][j], top.x, low.x, top.y, low.y, b[j][0], b[j][1]);
          mma(acc[i][j], top.z, low.z, top.w, low.w, b[j][2], b[j][3]);
        }
      }
    }
    if (k + DEPTH < K) keep_x(now ^ 1);
    await<0>();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < TALL; ++i)
#pragma unroll
    for (int j = 0; j < WIDE; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const size_t at = static_cast<size_t>(m0 + row0 + 16 * i + g + 8 * half) * N + n0 + column0 + 8 * j + 2 * c;
        float a = acc[i][j][2 * half], b = acc[i][j][2 * half + 1];
        if constexpr (RESIDUAL) {
          const float2 more = __half22float2(halves(fresh_word(residual + at)));
          a += more.x;
          b += more.y;
        }
        if constexpr (sizeof(Out) == 2) {
          *reinterpret_cast<u32*>(y + at) = bits(__floats2half2_rn(a, b));
        } else {
          store(y + at, a);
          store(y + at + 1, b);
        }
      }
  return 0;
}

}  // namespace tb
