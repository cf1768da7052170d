// Attention over a cache of keys and values [b, G, C, D]; H / G query heads share one of its heads.

namespace tb {

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A float in the shared memory of another block of the cluster, where this block has `p`.
__device__ __forceinline__ float remote(const float* p, int rank) {
  float v = 0;
#if __CUDA_ARCH__ >= 900
  u32 at = shared_address(p), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
#endif
  return v;
}

// Scores as powers of two: q k^T times `factor`, and then capped, cap tanh(s / cap), if CAPPED.
template <int D, bool CAPPED> struct Score {
  float factor, cap;
  __device__ __forceinline__ Score(float scale, float softcap)
      : factor((scale != 0 ? scale : rsqrtf(static_cast<float>(D))) * (CAPPED ? 2 * LOG2E / softcap : LOG2E)),
        cap(LOG2E * softcap) {}
  __device__ __forceinline__ float capped(float s) const { return CAPPED ? cap - 2 * cap / (1 + exp2f(s)) : s; }
};

__device__ constexpr int lanes_of(int vectors) { return vectors <= 1 ? 1 : 2 * lanes_of((vectors + 1) / 2); }

// One token a sequence: out[b, H, D] = softmax(q k^T scale) v over positions 0 to `position`, or the last WINDOW of them;
// scale 0 is 1 / sqrt(D). With SINKS each head's takes part in the softmax, and has no value.
// Block (split, b H / REP): a cluster of SPLITS blocks shares a head's positions and combines through its shared memory.
// D / 8 lanes work on one position, rounded up; each such group of lanes runs its own sum over U positions at a time.
template <int D, int H, int G, int C, int SPLITS, int WARPS, int U, int REP = H / G, int WINDOW = 0, bool CAPPED = false,
          bool SINKS = false>
__device__ __forceinline__ int attend_one(
    const __half* __restrict__ q, const __half* __restrict__ keys, const __half* __restrict__ values,
    const int* __restrict__ position, __half* __restrict__ out, float scale = 0, float softcap = 0,
    const float* __restrict__ sinks = nullptr) {
  constexpr int LANES = lanes_of(D / 8), PER_WARP = 32 / LANES, STREAMS = WARPS * PER_WARP;
  __shared__ float tops[STREAMS][REP], sums[STREAMS][REP];
  __shared__ float mixed[WARPS][REP][D];
  __shared__ float whole[REP][D + 2];  // this block's mix, its largest score and its sum

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int set = warp * PER_WARP + lane / LANES;
  const bool idle = lane % LANES * 8 >= D;  // a lane without elements, which does as if it had the first ones
  const int part = idle ? 0 : lane % LANES;
  const Score<D, CAPPED> of_products(scale, softcap);
  begin();
  const int length = static_cast<int>(fresh_word(position)) + 1, first = WINDOW ? max(0, length - WINDOW) : 0;
  const int share = (length - first + SPLITS - 1) / SPLITS;
  const int low = first + blockIdx.x * share, high = min(length, low + share);
  const size_t head = static_cast<size_t>(blockIdx.y * REP / (H / G)) * C * D;

  float query[REP][8], acc[REP][8] = {}, top[REP], sum[REP] = {};
#pragma unroll
  for (int r = 0; r < REP; ++r) {
    floats(fresh(q + (static_cast<size_t>(blockIdx.y) * REP + r) * D + part * 8), query[r]);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[r][i] *= idle ? 0.f : of_products.factor;
    top[r] = -1e30f;
  }
  for (int start = low + set; start < high; start += STREAMS * U) {
    uint4 k[U], v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int t = min(start + u * STREAMS, high - 1);
      k[u] = fresh_stream(keys + head + static_cast<size_t>(t) * D + part * 8);
      v[u] = fresh_stream(values + head + static_cast<size_t>(t) * D + part * 8);
    }
    float score[U][REP];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float f[8];
      floats(k[u], f);
#pragma unroll
      for (int r = 0; r < REP; ++r) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) s += f[i] * query[r][i];
        score[u][r] = s;
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int r = 0; r < REP; ++r) {
        // lanes of the other stream may have left the loop: only this stream's take part
        const u32 mates = LANES == 32 ? 0xffffffffu : ((1u << LANES) - 1u) << (lane / LANES * LANES);
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) score[u][r] += __shfl_xor_sync(mates, score[u][r], step);
        score[u][r] = start + u * STREAMS >= high ? -1e30f : of_products.capped(score[u][r]);
      }
    float weight[U][REP];
#pragma unroll
    for (int r = 0; r < REP; ++r) {
      float best = top[r];
#pragma unroll
      for (int u = 0; u < U; ++u) best = fmaxf(best, score[u][r]);
      const float shrink = exp2f(top[r] - best);
      top[r] = best;
      sum[r] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[r][i] *= shrink;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        weight[u][r] = score[u][r] <= -1e30f ? 0.f : exp2f(score[u][r] - best);
        sum[r] += weight[u][r];
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float f[8];
      floats(v[u], f);
#pragma unroll
      for (int r = 0; r < REP; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[r][i] += weight[u][r] * f[i];
    }
  }
  if (lane % LANES == 0)
#pragma unroll
    for (int r = 0; r < REP; ++r) tops[set][r] = top[r], sums[set][r] = sum[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < REP; ++r) {
    float best = -1e30f;
    for (int i = 0; i < STREAMS; ++i) best = fmaxf(best, tops[i][r]);
    const float shrink = exp2f(top[r] - best);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[r][i] *= shrink;
#pragma unroll
      for (int step = LANES; step < 32; step *= 2) acc[r][i] += __shfl_xor_sync(0xffffffffu, acc[r][i], step);
      if (lane < LANES && !idle) mixed[warp][r][part * 8 + i] = acc[r][i];
    }
    if (threadIdx.x == 0) {
      float total = 0;
      for (int i = 0; i < STREAMS; ++i) total += sums[i][r] * exp2f(tops[i][r] - best);
      whole[r][D] = best;
      whole[r][D + 1] = total;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < REP * D; i += 32 * WARPS) {
    float total = 0;
#pragma unroll
    for (int j = 0; j < WARPS; ++j) total += mixed[j][i / D][i % D];
    whole[i / D][i % D] = total;
  }
  if constexpr (SPLITS > 1) cluster_sync(); else __syncthreads();
  for (int i = blockIdx.x * 32 * WARPS + threadIdx.x; i < REP * D; i += SPLITS * 32 * WARPS) {
    const int r = i / D, d = i % D;
    __half* to = out + (static_cast<size_t>(blockIdx.y) * REP + r) * D + d;
    const float sink = SINKS ? sinks[(blockIdx.y * REP + r) % H] * LOG2E : 0.f;
    if constexpr (SPLITS == 1) {
      store(to, whole[r][d] / (whole[r][D + 1] + (SINKS ? exp2f(sink - whole[r][D]) : 0.f)));
    } else {
      float best[SPLITS], top_of_all = -1e30f, total = 0, mix = 0;
#pragma unroll
      for (int j = 0; j < SPLITS; ++j) best[j] = remote(&whole[r][D], j), top_of_all = fmaxf(top_of_all, best[j]);
#pragma unroll
      for (int j = 0; j < SPLITS; ++j) {
        const float shrink = exp2f(best[j] - top_of_all);
        total += shrink * remote(&whole[r][D + 1], j);
        mix += shrink * remote(&whole[r][d], j);
      }
      store(to, mix / (total + (SINKS ? exp2f(sink - top_of_all) : 0.f)));
    }
  }
  if constexpr (SPLITS > 1) cluster_sync();  // nobody leaves while others read
  return 0;
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32* r, const void* from) {
  const u32 at = shared_address(from);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// A chunk of M tokens at `position`: out[b, M, H, D], each token over the positions up to its own; see `attend_one`.
// Block (tile of 16 WARPS tokens, b H). KEYS positions a step lie in shared memory; a warp has 16 tokens.
template <int D, int H, int G, int C, int M, int WARPS, int KEYS, int WINDOW = 0, bool CAPPED = false, bool SINKS = false>
__device__ __forceinline__ int attend_piece(
    const __half* __restrict__ q, const __half* __restrict__ keys, const __half* __restrict__ values,
    const int* __restrict__ position, __half* __restrict__ out, float scale = 0, float softcap = 0,
    const float* __restrict__ sinks = nullptr) {
  constexpr int WIDTH = D + 8;  // of a row in shared memory, so that ldmatrix meets no bank twice
  __shared__ __align__(16) __half k_tile[KEYS * WIDTH], v_tile[KEYS * WIDTH];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int batch = blockIdx.y / H, h = blockIdx.y % H;
  begin();
  const int tile = gridDim.x - 1 - blockIdx.x;  // the longest first
  const int row = tile * 16 * WARPS + warp * 16 + g, at = static_cast<int>(fresh_word(position));
  const size_t head = (static_cast<size_t>(batch) * G + h / (H / G)) * C * D;
  const int end = min(at + (tile + 1) * 16 * WARPS, C), steps = (end + KEYS - 1) / KEYS;
  const int first = WINDOW ? max(0, at + tile * 16 * WARPS + 1 - WINDOW) / KEYS : 0;

  auto fetch = [&](__half* tile_of, const __half* from, int step) {
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * D / 8; i += 32 * WARPS) {
      const int t = i / (D / 8), d = i % (D / 8) * 8;
      copy_async(tile_of + t * WIDTH + d, from + head + static_cast<size_t>(min(step * KEYS + t, C - 1)) * D + d);
    }
    commit();
  };
  fetch(k_tile, keys, first);

  u32 a[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const size_t from = ((static_cast<size_t>(batch) * M + row + j % 2 * 8) * H + h) * D + i * 16 + j / 2 * 8 + c * 2;
      a[i][j] = fresh_word(q + from);
    }
  const Score<D, CAPPED> of_products(scale, softcap);
  float acc[D / 8][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
  for (int step = first; step < steps; ++step) {
    await<0>();
    __syncthreads();
    fetch(v_tile, values, step);
    float score[KEYS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < KEYS / 16; ++j) {
        u32 b[4];  // (keys 0-7, d 0-7), (keys 0-7, d 8-15), (keys 8-15, d 0-7), (keys 8-15, d 8-15)
        load_matrices<false>(b, k_tile + (j * 16 + lane / 16 * 8 + lane % 8) * WIDTH + i * 16 + lane / 8 % 2 * 8);
        mma(score[2 * j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
        mma(score[2 * j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
      }
    const int lowest = at + tile * 16 * WARPS + warp * 16;  // of the warp's tokens
    const bool full = (step + 1) * KEYS <= lowest + 1 && (!WINDOW || step * KEYS > lowest + 15 - WINDOW);
    float best[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = step * KEYS + j * 8 + 2 * c + i % 2, token = at + row + i / 2 * 8;
        const bool seen = full || (key <= token && (!WINDOW || key > token - WINDOW));
        score[j][i] = seen ? of_products.capped(score[j][i] * of_products.factor) : -1e30f;
        best[i / 2] = fmaxf(best[i / 2], score[j][i]);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
      best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
      const float shrink = exp2f(top[i] - best[i]);
      top[i] = best[i];
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) acc[j][2 * i] *= shrink, acc[j][2 * i + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[j][i] = exp2f(score[j][i] - top[i / 2]);
        sum[i / 2] += score[j][i];
      }
    await<0>();
    __syncthreads();
    if (step + 1 < steps) fetch(k_tile, keys, step + 1);
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      const u32 p0 = bits(__floats2half2_rn(score[2 * j][0], score[2 * j][1]));
      const u32 p1 = bits(__floats2half2_rn(score[2 * j][2], score[2 * j][3]));
      const u32 p2 = bits(__floats2half2_rn(score[2 * j + 1][0], score[2 * j + 1][1]));
      const u32 p3 = bits(__floats2half2_rn(score[2 * j + 1][2], score[2 * j + 1][3]));
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        u32 b[4];  // (keys 0-7, d 0-7), (keys 8-15, d 0-7), (keys 0-7, d 8-15), (keys 8-15, d 8-15), along the keys
        load_matrices<true>(b, v_tile + (j * 16 + lane / 8 % 2 * 8 + lane % 8) * WIDTH + i * 16 + lane / 16 * 8);
        mma(acc[2 * i], p0, p1, p2, p3, b[0], b[1]);
        mma(acc[2 * i + 1], p0, p1, p2, p3, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    if constexpr (SINKS) sum[i] += exp2f(sinks[h] * LOG2E - top[i]);
    const size_t to = ((static_cast<size_t>(batch) * M + row + i * 8) * H + h) * D + 2 * c;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<__half2*>(out + to + j * 8) =
          __floats2half2_rn(acc[j][2 * i] / sum[i], acc[j][2 * i + 1] / sum[i]);
  }
  return 0;
}

}  // namespace tb
