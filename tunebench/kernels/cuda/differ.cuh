// How far outputs are from what they should be.

namespace tb {

__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(__half v) { return __half2float(v); }

// found[block] = the largest |a - b|, infinite where either is NaN, and found[gridDim.x + block] = the largest |b|, of the
// block's share of N elements.
template <typename T, int N, int THREADS>
__device__ __forceinline__ int differ(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ found) {
  __shared__ float worst[THREADS], largest[THREADS];
  float far = 0, top = 0;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < N; i += gridDim.x * THREADS) {
    const float want = number(b[i]), off = fabsf(number(a[i]) - want);
    far = off <= 3.4e38f ? fmaxf(far, off) : __int_as_float(0x7f800000);
    top = fmaxf(top, fabsf(want));
  }
  worst[threadIdx.x] = far;
  largest[threadIdx.x] = top;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      worst[threadIdx.x] = fmaxf(worst[threadIdx.x], worst[threadIdx.x + half]);
      largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
    }
  }
  if (threadIdx.x == 0) {
    found[blockIdx.x] = worst[0];
    found[gridDim.x + blockIdx.x] = largest[0];
  }
  return 0;
}

}  // namespace tb
