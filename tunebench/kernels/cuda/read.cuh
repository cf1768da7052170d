// Kernels of the probe, which read memory as fast as it can be read. What they find is the sum of all 32-bit words,
// modulo 2^32, in a part for each thread.

namespace tb {

__device__ __forceinline__ u32 added(uint4 v) { return v.x + v.y + v.z + v.w; }

// N vectors of words that look random: word i is i times a constant.
template <int N, int THREADS> __device__ __forceinline__ int fill_words(void* data) {
  constexpr u32 FACTOR = 2654435761u;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < N; i += gridDim.x * THREADS) {
    const u32 first = 4u * i * FACTOR;
    static_cast<uint4*>(data)[i] = make_uint4(first, first + FACTOR, first + 2 * FACTOR, first + 3 * FACTOR);
  }
  return 0;
}

// N vectors by plain loads, of which a thread has AT_ONCE on their way.
template <int N, int AT_ONCE, int THREADS>
__device__ __forceinline__ int read_words(const void* __restrict__ data, u32* __restrict__ sums) {
  static_assert(N % (AT_ONCE * THREADS) == 0, "shape");
  u32 sum = 0;
  for (int tile = blockIdx.x; tile < N / (AT_ONCE * THREADS); tile += gridDim.x) {
    const uint4* from = static_cast<const uint4*>(data) + static_cast<size_t>(tile) * (AT_ONCE * THREADS) + threadIdx.x;
    uint4 v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) v[i] = stream(from + i * THREADS);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) sum += added(v[i]);
  }
  sums[blockIdx.x * THREADS + threadIdx.x] = sum;
  return 0;
}

// N vectors by bulk copies to a ring of STAGES pieces of BYTES in shared memory, which the first warp keeps full and the
// others add up. Hopper and later.
template <int N, int STAGES, int BYTES, int THREADS>
__device__ __forceinline__ int read_ring(const void* __restrict__ data, u32* __restrict__ sums, void* shared) {
  constexpr int PIECES = N / (BYTES / 16), READERS = THREADS - 32;
  static_assert(N % (BYTES / 16) == 0 && BYTES / 16 % READERS == 0, "shape");
  __shared__ u64 full[STAGES], empty[STAGES];
  char* const ring = reinterpret_cast<char*>((reinterpret_cast<size_t>(shared) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], READERS / 32);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  u32 sum = 0;
  if (threadIdx.x == 0) {
    for (int piece = blockIdx.x, step = 0; piece < PIECES; piece += gridDim.x, ++step) {
      const int stage = step % STAGES;
      if (step >= STAGES) barrier_wait(&empty[stage], (step / STAGES - 1) & 1);
      copy_bulk(ring + stage * BYTES, static_cast<const char*>(data) + static_cast<size_t>(piece) * BYTES, BYTES, &full[stage]);
    }
  } else if (threadIdx.x >= 32) {
    for (int piece = blockIdx.x, step = 0; piece < PIECES; piece += gridDim.x, ++step) {
      const int stage = step % STAGES;
      const uint4* from = reinterpret_cast<const uint4*>(ring + stage * BYTES) + threadIdx.x - 32;
      barrier_wait(&full[stage], step / STAGES & 1);
#pragma unroll
      for (int i = 0; i < BYTES / 16 / READERS; ++i) sum += added(from[i * READERS]);
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(&empty[stage]);
    }
  }
  sums[blockIdx.x * THREADS + threadIdx.x] = sum;
  return 0;
}

}  // namespace tb
