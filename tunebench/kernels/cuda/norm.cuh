// Normalisation of rows.

namespace tb {

// What all threads of a block have, added up.
template <int THREADS> __device__ __forceinline__ float added_up(float sum, float* sums) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int j = 0; j < THREADS / 32; ++j) sum += sums[j];
  return sum;
}

// out[rows, WIDTH] = x / sqrt(mean(x^2) + epsilon) * weight, one block a row; of CENTERED rows less their mean. To it is
// ADDED [WIDTH], or a row of [rows, WIDTH] where ROWS.
template <int WIDTH, int THREADS, bool CENTERED = false, bool ADDED = false, bool ROWS = false>
__device__ __forceinline__ int rms_norm(
    const __half* __restrict__ x, const __half* __restrict__ weight, __half* __restrict__ out, float epsilon,
    const __half* __restrict__ added = nullptr) {
  constexpr int EACH = (WIDTH / 8 + THREADS - 1) / THREADS;
  __shared__ float sums[THREADS / 32], means[THREADS / 32];
  const __half* row = x + static_cast<size_t>(blockIdx.x) * WIDTH;
  begin();
  float f[EACH][8], scale[EACH][8], sum = 0, mean = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int at = (j * THREADS + threadIdx.x) * 8;
    if (at >= WIDTH) break;
    floats(fresh(row + at), f[j]);
    floats(fresh(weight + at), scale[j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += f[j][i] * (CENTERED ? 1.f : f[j][i]);
  }
  sum = added_up<THREADS>(sum, sums);
  if constexpr (CENTERED) {
    mean = sum / WIDTH;
    sum = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if ((j * THREADS + threadIdx.x) * 8 < WIDTH) f[j][i] -= mean, sum += f[j][i] * f[j][i];
    sum = added_up<THREADS>(sum, means);
  }
  const float factor = rsqrtf(sum / WIDTH + epsilon);
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int at = (j * THREADS + threadIdx.x) * 8;
    if (at >= WIDTH) break;
    float more[8] = {};
    if constexpr (ADDED) floats(fresh(added + (ROWS ? static_cast<size_t>(blockIdx.x) * WIDTH : 0) + at), more);
#pragma unroll
    for (int i = 0; i < 8; ++i) more[i] += f[j][i] * factor * scale[j][i];
    uint4 v;
    u32* w = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = bits(__floats2half2_rn(more[2 * i], more[2 * i + 1]));
    *reinterpret_cast<uint4*>(out + static_cast<size_t>(blockIdx.x) * WIDTH + at) = v;
  }
  return 0;
}

}  // namespace tb
