// Weights back to halves, for kernels that know no others.

namespace tb {

// out[ROWS, K] = rows FIRST to FIRST + ROWS of w[N, K], as their groups say. A thread has a word.
template <int BITS, int GROUP, int K, int FIRST, int ROWS, int THREADS, int ZERO = middle(BITS)>
__device__ __forceinline__ int dequantize(
    const u32* __restrict__ w, const __half* __restrict__ scale, __half* __restrict__ out,
    const __half* __restrict__ offset = nullptr) {
  constexpr int PER_WORD = 32 / BITS, WORDS = K / PER_WORD;
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= ROWS * WORDS) return 0;
  begin();
  const int row = at / WORDS, word = at % WORDS;
  const u32 raw = w[static_cast<size_t>(FIRST + row) * WORDS + word];
  const size_t group = static_cast<size_t>(FIRST + row) * (K / GROUP) + word * PER_WORD / GROUP;
  const __half2 s = __half2half2(scale[group]), o = __half2half2(ZERO < 0 ? offset[group] : scale[group]);
  u32 h[4];
  Word<BITS>::template unpack<ZERO>(raw, h, o);
#pragma unroll
  for (int i = 0; i < PER_WORD / 2; ++i) h[i] = scaled<ZERO>(h[i], s, o);
  __half* to = out + static_cast<size_t>(row) * K + word * PER_WORD;
  if constexpr (BITS == 4)  // pairs (0, 4), (1, 5), (2, 6), (3, 7)
    *reinterpret_cast<uint4*>(to) = make_uint4(
        __byte_perm(h[0], h[1], 0x5410), __byte_perm(h[2], h[3], 0x5410),
        __byte_perm(h[0], h[1], 0x7632), __byte_perm(h[2], h[3], 0x7632));
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(h[0], h[1]);
  return 0;
}

// y[M, N] = bias[N] (+ residual), for a product that is added to what is there.
template <int M, int N, int THREADS, bool RESIDUAL, typename Out>
__device__ __forceinline__ int spread(
    const __half* __restrict__ bias, const __half* __restrict__ residual, Out* __restrict__ y) {
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at < M * N) store(y + at, __half2float(bias[at % N]) + (RESIDUAL ? __half2float(residual[at]) : 0.f));
  return 0;
}

}  // namespace tb
