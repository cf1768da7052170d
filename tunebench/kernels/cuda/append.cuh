// Rotary embedding and the cache.

namespace tb {

// qkv[b, M, H + 2G, D] -> rotated q[b, M, H, D]; rotated keys and values go into the cache [b, G, C, D] at `position`.
// A thread has VEC elements and VEC that lie `apart`: of the first ROTARY, half of them, by which these are rotated; of the
// others too. With NORM, queries and keys are normalised before, by weights [D], a head's threads being neighbours.
template <int D, int H, int G, int C, int M, int THREADS, int VEC, int ROTARY = D, bool NORM = false>
__device__ __forceinline__ int append(
    const __half* __restrict__ qkv, const int* __restrict__ position, const float* __restrict__ rope_cos_sin,
    __half* __restrict__ keys, __half* __restrict__ values, __half* __restrict__ q,
    const __half* __restrict__ query_norm = nullptr, const __half* __restrict__ key_norm = nullptr, float epsilon = 0) {
  constexpr int TURNED = ROTARY / 2, EVERY = H + 2 * G, PARTS = D / 2 / VEC;
  static_assert(TURNED % VEC == 0 && D / 2 % VEC == 0 && (!NORM || 32 % PARTS == 0), "shape");
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= PARTS * EVERY * M) return 0;
  const int pair = at % PARTS * VEC, h = at / PARTS % EVERY, m = at / PARTS / EVERY;
  const bool turns = ROTARY == D || pair < TURNED;
  const int d = turns ? pair : pair + TURNED, apart = turns ? TURNED : D / 2 - TURNED;
  begin();
  const int batch = blockIdx.y, t = static_cast<int>(fresh_word(position)) + m;
  const __half* from = qkv + ((static_cast<size_t>(batch) * M + m) * EVERY + h) * D + d;
  __half* to = h < H ? q + ((static_cast<size_t>(batch) * M + m) * H + h) * D + d
                     : (h < H + G ? keys : values) + ((static_cast<size_t>(batch) * G + (h - H) % G) * C + t) * D + d;
  Halves<VEC> low, high;
#pragma unroll
  for (int i = 0; i < VEC; i += 2) {
    *reinterpret_cast<u32*>(&low.v[i]) = fresh_word(from + i);
    *reinterpret_cast<u32*>(&high.v[i]) = fresh_word(from + apart + i);
  }
  float factor = 1;
  if constexpr (NORM) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float a = __half2float(low.v[i]), b = __half2float(high.v[i]);
      sum += a * a + b * b;
    }
    const u32 mates = PARTS == 32 ? 0xffffffffu : ((1u << PARTS) - 1u) << (threadIdx.x % 32 / PARTS * PARTS);
#pragma unroll
    for (int step = PARTS / 2; step > 0; step /= 2) sum += __shfl_xor_sync(mates, sum, step);
    factor = rsqrtf(sum / D + epsilon);
  }
  if (h < H + G) {
    const float* turn = rope_cos_sin + static_cast<size_t>(t) * TURNED + d;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const __half* weight = (h < H ? query_norm : key_norm) + d + i;
      const float a = __half2float(low.v[i]) * (NORM ? factor * __half2float(weight[0]) : 1.f);
      const float b = __half2float(high.v[i]) * (NORM ? factor * __half2float(weight[apart]) : 1.f);
      const float cosine = turns ? turn[i] : 1.f, sine = turns ? turn[static_cast<size_t>(C) * TURNED + i] : 0.f;
      low.v[i] = __float2half_rn(a * cosine - b * sine);
      high.v[i] = __float2half_rn(b * cosine + a * sine);
    }
  }
  *reinterpret_cast<Halves<VEC>*>(to) = low;
  *reinterpret_cast<Halves<VEC>*>(to + apart) = high;
  return 0;
}

}  // namespace tb
