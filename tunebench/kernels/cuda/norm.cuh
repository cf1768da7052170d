// Normalisation of rows.

namespace tb {

// out[rows, WIDTH] = x / sqrt(mean(x^2) + epsilon) * weight; one block a row.
template <int WIDTH, int THREADS>
__device__ __forceinline__ int rms_norm(
    const __half* __restrict__ x, const __half* __restrict__ weight, __half* __restrict__ out, float epsilon) {
  constexpr int EACH = (WIDTH / 8 + THREADS - 1) / THREADS;
  __shared__ float sums[THREADS / 32];
  const __half* row = x + static_cast<size_t>(blockIdx.x) * WIDTH;
  begin();
  float f[EACH][8], scale[EACH][8], sum = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int at = (j * THREADS + threadIdx.x) * 8;
    if (at >= WIDTH) break;
    floats(fresh(row + at), f[j]);
    floats(fresh(weight + at), scale[j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += f[j][i] * f[j][i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int j = 0; j < THREADS / 32; ++j) sum += sums[j];
  const float factor = rsqrtf(sum / WIDTH + epsilon);
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int at = (j * THREADS + threadIdx.x) * 8;
    if (at >= WIDTH) break;
    uint4 v;
    u32* w = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = bits(__floats2half2_rn(f[j][2 * i] * factor * scale[j][2 * i], f[j][2 * i + 1] * factor * scale[j][2 * i + 1]));
    *reinterpret_cast<uint4*>(out + static_cast<size_t>(blockIdx.x) * WIDTH + at) = v;
  }
  return 0;
}

}  // namespace tb
