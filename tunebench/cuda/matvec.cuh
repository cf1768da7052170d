// Products of few rows (1 to 16) with a weight matrix, on tensor cores: 16 outputs are the rows of a tile, the
// rows of x its columns. A lane reads 16 bytes of weights of one output; which k a slot of the product stands
// for does not matter as long as weights and activations agree, so the stored order needs no shuffling.

namespace tb {

// y[M, N] = x[M, K] w[N, K]^T (+ residual). BITS of a weight; its scale is one half for each GROUP along k.
// A thread block makes 16 R outputs; its WARPS share k; a lane has the loads of U steps of 64 bytes in flight.
// SPREAD (M <= 2): a group's lane has a column of its own, so that scales multiply sums and not weights.
template <int BITS, int GROUP, int M, int N, int K, int R, int WARPS, int U, bool SPREAD, bool RESIDUAL, typename Out>
__device__ __forceinline__ int matvec(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y) {
  constexpr int PER_WORD = 32 / BITS, PER_LANE = 4 * PER_WORD, STEP = 4 * PER_LANE;  // weights
  constexpr int STEPS = K / STEP, ROW_BYTES = K / 8 * BITS, PAIRS = Word<BITS>::PAIRS;
  constexpr int SHARE = (STEPS + WARPS - 1) / WARPS;
  constexpr int TILES = (M + 7) / 8;
  static_assert(K % STEP == 0 && N % (16 * R) == 0 && (!SPREAD || M <= 2), "shape");
  __shared__ float sums[WARPS][16 * R][M];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int n0 = blockIdx.x * 16 * R;
  const char* rows = static_cast<const char*>(w) + static_cast<size_t>(n0 + g) * ROW_BYTES + c * 16;
  const int first = warp * SHARE, last = min(STEPS, first + SHARE);

  float acc[R][TILES][4] = {};
  for (int start = first; start < last; start += U) {
    uint4 raw[U][R][2];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int r = 0; r < 2 * R; ++r)
        if (start + u < last) raw[u][r / 2][r % 2] = stream(rows + static_cast<size_t>(r * 8) * ROW_BYTES + (start + u) * 64);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (start + u >= last) break;
      const int k = (start + u) * STEP + c * PER_LANE;  // this lane's first weight
      u32 b[TILES][4 * PAIRS];
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const int m = SPREAD ? g / 4 : 8 * t + g;
        const bool mine = m < M && (!SPREAD || g % 4 == c);
        const __half* from = x + static_cast<size_t>(m) * K + k;
#pragma unroll
        for (int i = 0; i < 4 * PAIRS; ++i) b[t][i] = 0;
        if (mine) {
          if constexpr (BITS == 4) {
#pragma unroll
            for (int j = 0; j < 4; ++j) Word<4>::pair(load16(from + 8 * j), &b[t][4 * j]);
          } else {
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
              const uint4 v = load16(from + 8 * j);
              b[t][4 * j] = v.x; b[t][4 * j + 1] = v.y; b[t][4 * j + 2] = v.z; b[t][4 * j + 3] = v.w;
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int n = n0 + 16 * r + g;
        u32 s0 = 0, s1 = 0;  // a lane's own group, for its two outputs
        float part[4] = {};
        if constexpr (BITS < 16 && !SPREAD) {
          s0 = twice(scale[static_cast<size_t>(n) * (K / GROUP) + k / GROUP]);
          s1 = twice(scale[static_cast<size_t>(n + 8) * (K / GROUP) + k / GROUP]);
        }
        const u32* w0 = &raw[u][r][0].x;
        const u32* w1 = &raw[u][r][1].x;
        u32 a0[4 * PAIRS], a1[4 * PAIRS];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Word<BITS>::unpack(w0[j], a0 + PAIRS * j);
          Word<BITS>::unpack(w1[j], a1 + PAIRS * j);
        }
        if constexpr (BITS < 16 && !SPREAD) {
#pragma unroll
          for (int i = 0; i < 4 * PAIRS; ++i) {
            a0[i] = bits(__hmul2(halves(a0[i]), halves(s0)));
            a1[i] = bits(__hmul2(halves(a1[i]), halves(s1)));
          }
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int i = 0; i < 4 * PAIRS; i += 2)
            mma(SPREAD ? part : acc[r][t], a0[i], a1[i], a0[i + 1], a1[i + 1], b[t][i], b[t][i + 1]);
        if constexpr (SPREAD) {  // columns 2c, 2c + 1 are the groups of lanes 2c % 4 and 2c % 4 + 1
          if constexpr (BITS < 16) {
            constexpr int LANES = GROUP / PER_LANE;  // lanes that share a group: 1, or 2 at 8 bits
            const int base = (start + u) * (STEP / GROUP);
            const size_t at = static_cast<size_t>(n) * (K / GROUP) + base, below = at + static_cast<size_t>(8) * (K / GROUP);
            const int first_group = (2 * c % 4) / LANES, second = (2 * c % 4 + 1) / LANES;
            acc[r][0][0] += part[0] * __half2float(scale[at + first_group]);
            acc[r][0][1] += part[1] * __half2float(scale[at + second]);
            acc[r][0][2] += part[2] * __half2float(scale[below + first_group]);
            acc[r][0][3] += part[3] * __half2float(scale[below + second]);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[r][0][i] += part[i];
          }
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    if constexpr (SPREAD) {  // the four columns of one row of x lie in two neighbouring lanes
      float top = acc[r][0][0] + acc[r][0][1], low = acc[r][0][2] + acc[r][0][3];
      top += __shfl_xor_sync(0xffffffffu, top, 1);
      low += __shfl_xor_sync(0xffffffffu, low, 1);
      if (c % 2 == 0 && c / 2 < M) {
        sums[warp][16 * r + g][c / 2] = top;
        sums[warp][16 * r + g + 8][c / 2] = low;
      }
    } else {
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = 8 * t + 2 * c + i % 2;
          if (m < M) sums[warp][16 * r + g + i / 2 * 8][m] = acc[r][t][i];
        }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * R * M; i += 32 * WARPS) {
    const int row = i % (16 * R), m = i / (16 * R);
    float total = 0;
#pragma unroll
    for (int j = 0; j < WARPS; ++j) total += sums[j][row][m];
    const size_t at = static_cast<size_t>(m) * N + n0 + row;
    if constexpr (RESIDUAL) total += __half2float(residual[at]);
    store(y + at, total);
  }
  return 0;
}

}  // namespace tb
