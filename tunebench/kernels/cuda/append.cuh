// Rotary embedding and the cache.

namespace tb {

// qkv[b, M, H + 2G, D] -> rotated q[b, M, H, D]; rotated keys and values go into the cache [b, G, C, D] at `position`.
// A thread has VEC elements d and the VEC that lie D / 2 further.
template <int D, int H, int G, int C, int M, int THREADS, int VEC>
__device__ __forceinline__ int append(
    const __half* __restrict__ qkv, const int* __restrict__ position, const float* __restrict__ rope_cos_sin,
    __half* __restrict__ keys, __half* __restrict__ values, __half* __restrict__ q) {
  constexpr int HALF = D / 2, EVERY = H + 2 * G, PARTS = HALF / VEC;
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= PARTS * EVERY * M) return 0;
  const int d = at % PARTS * VEC, h = at / PARTS % EVERY, m = at / PARTS / EVERY;
  begin();
  const int batch = blockIdx.y, t = static_cast<int>(fresh_word(position)) + m;
  const __half* from = qkv + ((static_cast<size_t>(batch) * M + m) * EVERY + h) * D + d;
  __half* to = h < H ? q + ((static_cast<size_t>(batch) * M + m) * H + h) * D + d
                     : (h < H + G ? keys : values) + ((static_cast<size_t>(batch) * G + (h - H) % G) * C + t) * D + d;
  Halves<VEC> low, high;
#pragma unroll
  for (int i = 0; i < VEC; i += 2) {
    *reinterpret_cast<u32*>(&low.v[i]) = fresh_word(from + i);
    *reinterpret_cast<u32*>(&high.v[i]) = fresh_word(from + HALF + i);
  }
  if (h < H + G) {
    const float* turn = rope_cos_sin + static_cast<size_t>(t) * HALF + d;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float a = __half2float(low.v[i]), b = __half2float(high.v[i]);
      const float cosine = turn[i], sine = turn[static_cast<size_t>(C) * HALF + i];
      low.v[i] = __float2half_rn(a * cosine - b * sine);
      high.v[i] = __float2half_rn(b * cosine + a * sine);
    }
  }
  *reinterpret_cast<Halves<VEC>*>(to) = low;
  *reinterpret_cast<Halves<VEC>*>(to + HALF) = high;
  return 0;
}

}  // namespace tb
