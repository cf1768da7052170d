// Products of few rows (1 to 16) with a weight matrix, on tensor cores: 16 outputs are the rows of a tile, the
// rows of x its columns. A lane reads 16 bytes of weights of one output; which k a slot of the product stands
// for does not matter as long as weights and activations agree, so the stored order needs no shuffling.

namespace tb {

// What a warp reads before it needs it: U steps of 64 bytes of weights of each of 16 R outputs, and X times 8 halves of
// x for each of them.
template <int BITS, int R, int U, int X>
struct Ahead {
  uint4 w[U][R][2];
  __half scale[U][R][2], offset[U][R][2];
  uint4 x[U][X];
};

// Where a warp finds x when it needs it: in memory, in shared memory (4 bits only: already in pairs), or read ahead.
enum Place { IN_MEMORY, STAGED, AHEAD };

// y[M, N] = x[M, K] w[N, K]^T (+ bias) (+ residual). BITS of a weight; its scale is one half for each GROUP along k, and
// so is `offset`, its zero or minimum, where ZERO says so.
// A thread block has ACROSS x ALONG warps: ACROSS of them side by side, each with 16 R outputs, ALONG sharing k.
template <int BITS, int GROUP, int M, int N, int K, int R, int ACROSS, int ALONG, int U, int PLACE, bool RESIDUAL,
          typename Out, int ZERO = middle(BITS), bool BIAS = false>
__device__ __forceinline__ int matvec(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y, const __half* __restrict__ offset = nullptr,
    const __half* __restrict__ bias = nullptr) {
  constexpr int PER_LANE = 4 * 32 / BITS, STEP = 4 * PER_LANE;  // weights
  constexpr int STEPS = K / STEP, ROW_BYTES = K / 8 * BITS, PAIRS = Word<BITS>::PAIRS;
  constexpr int SHARE = (STEPS + ALONG - 1) / ALONG, TILES = (M + 7) / 8, WIDE = 16 * R * ACROSS;
  constexpr int THREADS = 32 * ACROSS * ALONG;
  static_assert(K % STEP == 0 && N % WIDE == 0 && (PLACE != STAGED || BITS == 4), "shape");
  __shared__ float sums[ALONG][WIDE][M];
  __shared__ uint4 held[PLACE == STAGED ? K / 8 * M : 1];  // [step, word of a lane, lane of four, m]

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int across = warp % ACROSS * 16 * R, along = warp / ACROSS;
  const int n0 = blockIdx.x * WIDE + across + g;
  const char* rows = static_cast<const char*>(w) + static_cast<size_t>(n0) * ROW_BYTES + c * 16;
  const int first = along * SHARE, last = min(STEPS, first + SHARE);

  using Ahead = Ahead<BITS, R, U, PLACE == AHEAD ? TILES * PAIRS : 1>;
  auto fetch = [&](Ahead& to, int start) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int r = 0; r < 2 * R; ++r)
        if (start + u < last) {
          to.w[u][r / 2][r % 2] = stream(rows + static_cast<size_t>(r * 8) * ROW_BYTES + (start + u) * 64);
          const size_t group =
              static_cast<size_t>(n0 + 8 * r) * (K / GROUP) + ((start + u) * STEP + c * PER_LANE) / GROUP;
          if constexpr (BITS < 16) to.scale[u][r / 2][r % 2] = constant(scale + group);
          if constexpr (BITS < 16 && ZERO < 0) to.offset[u][r / 2][r % 2] = constant(offset + group);
        }
  };

  auto read = [&](int t, int j, int step) {  // 8 halves of x for tile t, as they are
    const int m = 8 * t + g, k = step * STEP + c * PER_LANE + 8 * j;
    return M % 8 == 0 || m < M ? fresh(x + static_cast<size_t>(m) * K + k) : make_uint4(0, 0, 0, 0);
  };
  auto fetch_x = [&](Ahead& to, int start) {
    if constexpr (PLACE == AHEAD)
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < TILES * PAIRS; ++i)
          if (start + u < last) to.x[u][i] = read(i / PAIRS, i % PAIRS, start + u);
  };

  Ahead now, next;
  fetch(now, first);
  begin();  // weights do not depend on the kernel before; all else does
  fetch_x(now, first);
  if constexpr (PLACE == STAGED) {
    for (int i = threadIdx.x; i < K / 8 * M; i += THREADS) {
      const int m = i / (K / 8), word = i % (K / 8);
      u32 p[4];
      Word<4>::pair(fresh(x + static_cast<size_t>(m) * K + word * 8), p);
      held[(word / 16 * 16 + word % 4 * 4 + word / 4 % 4) * M + m] = make_uint4(p[0], p[1], p[2], p[3]);
    }
    __syncthreads();
  }
  float acc[R][TILES][4] = {};
  for (int start = first; start < last; start += U) {
    fetch(next, start + U);
    fetch_x(next, start + U);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (start + u >= last) break;
      u32 b[TILES][4 * PAIRS];
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if constexpr (PLACE == STAGED) {
            if (M % 8 == 0 || 8 * t + g < M) v = held[((start + u) * 16 + j * 4 + c) * M + 8 * t + g];
          } else if constexpr (PLACE == AHEAD) {
            v = now.x[u][t * PAIRS + j];
          } else {
            v = read(t, j, start + u);
          }
          if constexpr (BITS == 4 && PLACE != STAGED) {
            Word<4>::pair(v, &b[t][4 * j]);
          } else {
            b[t][4 * j] = v.x; b[t][4 * j + 1] = v.y; b[t][4 * j + 2] = v.z; b[t][4 * j + 3] = v.w;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const u32* w0 = &now.w[u][r][0].x;
        const u32* w1 = &now.w[u][r][1].x;
        u32 a0[4 * PAIRS], a1[4 * PAIRS];
        const __half2 o0 = __half2half2(now.offset[u][r][0]), o1 = __half2half2(now.offset[u][r][1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Word<BITS>::template unpack<ZERO>(w0[j], a0 + PAIRS * j, o0);
          Word<BITS>::template unpack<ZERO>(w1[j], a1 + PAIRS * j, o1);
        }
        if constexpr (BITS < 16) {
          const __half2 s0 = __half2half2(now.scale[u][r][0]), s1 = __half2half2(now.scale[u][r][1]);
#pragma unroll
          for (int i = 0; i < 4 * PAIRS; ++i) {
            a0[i] = scaled<ZERO>(a0[i], s0, o0);
            a1[i] = scaled<ZERO>(a1[i], s1, o1);
          }
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int i = 0; i < 4 * PAIRS; i += 2)
            mma(acc[r][t], a0[i], a1[i], a0[i + 1], a1[i + 1], b[t][i], b[t][i + 1]);
      }
    }
    now = next;
  }

#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = 8 * t + 2 * c + i % 2;
        if (m < M) sums[along][across + 16 * r + g + i / 2 * 8][m] = acc[r][t][i];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < WIDE * M; i += THREADS) {
    const int row = i % WIDE, m = i / WIDE;
    float total = 0;
#pragma unroll
    for (int j = 0; j < ALONG; ++j) total += sums[j][row][m];
    const size_t at = static_cast<size_t>(m) * N + blockIdx.x * WIDE + row;
    if constexpr (BIAS) total += __half2float(fresh_half(bias + blockIdx.x * WIDE + row));
    if constexpr (RESIDUAL) total += __half2float(fresh_half(residual + at));
    store(y + at, total);
  }
  return 0;
}

}  // namespace tb
