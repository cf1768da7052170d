// Products on Hopper's warpgroup tensor instructions: weights unpacked into registers, x read from shared memory by the
// tensor cores themselves, where bulk copies put it.

namespace tb {

#define TB_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define TB_SIXTEEN(i) TB_FOUR(i), TB_FOUR((i) + 4), TB_FOUR((i) + 8), TB_FOUR((i) + 12)
#define TB_SUMS_64 TB_SIXTEEN(0), TB_SIXTEEN(16)
#define TB_SUMS_128 TB_SIXTEEN(0), TB_SIXTEEN(16), TB_SIXTEEN(32), TB_SIXTEEN(48)

// d[64, TOKENS] += a[64, 16] b[TOKENS, 16]^T for a warpgroup, which has a warp for each 16 rows; there, a and d lie as in
// `mma`, d in blocks of 8 columns. b is described by `matrix`.
template <int TOKENS> struct Warpgroup;

#define TB_WARPGROUP(TOKENS, SUMS, A0, A1, A2, A3, B)                                                                 \
  template <> struct Warpgroup<TOKENS> {                                                                              \
    static __device__ __forceinline__ void mma(float* d, const u32* a, u64 b) {                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32.f16.f16 {" SUMS "}, {" A0 ", " A1 ", " A2     \
                   ", " A3 "}, " B ", 1, 1, 1, 0;"                                                                    \
                   : TB_SUMS_##TOKENS                                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
    }                                                                                                                 \
  };
#define TB_D_64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TB_D_128 TB_D_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
TB_WARPGROUP(64, TB_D_64, "%32", "%33", "%34", "%35", "%36")
TB_WARPGROUP(128, TB_D_128, "%64", "%65", "%66", "%67", "%68")

__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Rows of 64 halves in shared memory, 8 rows to 1024 bytes, their 16-byte parts exchanged by the row's last three bits.
__device__ __forceinline__ u64 matrix(const void* p) {
  return static_cast<u64>((shared_address(p) & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// x[M, K] -> to[M / TOKENS, K / 128, 2, TOKENS, 64]: what a block of `warpgroups` copies at a time, as `matrix` wants it,
// and along k in the order in which weights unpack. Of 128 along k, lane c of four has 32c to 32c + 31 of an output's
// weights, in four words; a word makes the pairs (0, 4), (1, 5) for one product, (2, 6), (3, 7) for another.
template <int M, int K, int TOKENS, int THREADS>
__device__ __forceinline__ int arrange(const __half* __restrict__ x, __half* __restrict__ to) {
  const int at = blockIdx.x * THREADS + threadIdx.x;  // 8 halves
  if (at >= M * K / 8) return 0;
  const int row = at / 8 % TOKENS, half = at / 8 / TOKENS % 2, block = at / 16 / TOKENS % (K / 128);
  const int tile = at / 16 / TOKENS / (K / 128), part = at % 8 ^ (row & 7), product = 4 * half + part / 2;
  const int first = product / 2 * 8 + product % 2 * 2 + part % 2;  // of a lane's 32
  const __half* from = x + static_cast<size_t>(tile * TOKENS + row) * K + block * 128 + first;
  begin();
  Halves<8> v;
#pragma unroll
  for (int i = 0; i < 8; ++i) v.v[i] = fresh_half(from + i / 2 * 32 + i % 2 * 4);
  reinterpret_cast<Halves<8>*>(to)[at] = v;
  return 0;
}

// y[M, N] = x[M, K] w[N, K]^T (+ bias) (+ residual), of 4-bit weights as in `matvec`; x as `arrange` makes it.
// A block has ACROSS warpgroups, each with 64 outputs of TOKENS rows. STAGES steps of 128 along k of x are on their way or
// in `shared`; weights go from memory to registers, a step ahead.
template <int M, int N, int K, int TOKENS, int ACROSS, int STAGES, bool RESIDUAL, typename Out, int ZERO = middle(4),
          bool BIAS = false, int GROUP = 32>
__device__ __forceinline__ int warpgroups(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y, void* shared, const __half* __restrict__ offset = nullptr,
    const __half* __restrict__ bias = nullptr) {
  constexpr int THREADS = 128 * ACROSS, ROWS = 64 * ACROSS, STEPS = K / 128, X_BYTES = TOKENS * 256;
  static_assert(K % 128 == 0 && N % ROWS == 0 && M % TOKENS == 0 && STEPS >= STAGES, "shape");
  __shared__ u64 full[STAGES], empty[STAGES];
  char* const held = reinterpret_cast<char*>((reinterpret_cast<size_t>(shared) + 1023) / 1024 * 1024);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, row = threadIdx.x / 32 * 16 + g;
  const int n0 = blockIdx.y * ROWS;

  const char* words = static_cast<const char*>(w) + static_cast<size_t>(n0 + row) * (K / 2) + c * 16;
  const size_t groups = static_cast<size_t>(n0 + row) * (K / GROUP) + c * 32 / GROUP;
  uint4 now[2], next[2];
  __half2 now_scale, next_scale, now_offset, next_offset;  // of output `row` and of the one 8 further
  auto of_groups = [&](const __half* from, int step) {
    from += groups + step * (128 / GROUP);
    return __halves2half2(constant(from), constant(from + 8 * (K / GROUP)));
  };
  auto fetch = [&](uint4 (&to)[2], __half2& to_scale, __half2& to_offset, int step) {
    to[0] = stream(words + step * 64);
    to[1] = stream(words + 8 * (K / 2) + step * 64);
    to_scale = of_groups(scale, step);
    if constexpr (ZERO < 0) to_offset = of_groups(offset, step);
  };
  auto unpack = [&](u32 (&a)[4][4], int half) {  // 64 along k
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const __half2 s = __half2half2(r ? __high2half(now_scale) : __low2half(now_scale));
      const __half2 o = __half2half2(r ? __high2half(now_offset) : __low2half(now_offset));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        u32 h[4];
        Word<4>::unpack<ZERO>((&now[r].x)[2 * half + j], h, o);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 * j + i / 2][r + i % 2 * 2] = scaled<ZERO>(h[i], s, o);
      }
    }
  };
  const char* const from = reinterpret_cast<const char*>(x) + static_cast<size_t>(blockIdx.x) * STEPS * X_BYTES;
  auto fetch_x = [&](int step) {
    const int stage = step % STAGES;
    copy_bulk(held + stage * X_BYTES, from + static_cast<size_t>(step) * X_BYTES, X_BYTES, &full[stage]);
  };

  fetch(now, now_scale, now_offset, 0);
  fetch(next, next_scale, next_offset, 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], 4 * ACROSS);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  begin();  // weights do not depend on the kernel before; all else does
  if (threadIdx.x == 0)
    for (int step = 0; step < STAGES; ++step) fetch_x(step);

  float acc[TOKENS / 2] = {};
  u32 first[4][4], second[4][4];
  unpack(first, 0);
  auto multiply = [&](u32 (&a)[4][4], const char* b) {
    const u64 described = matrix(b);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) Warpgroup<TOKENS>::mma(acc, a[i], described + 2 * i);
    warpgroup_commit();
  };
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    const int stage = step % STAGES;
    const char* b = held + stage * X_BYTES;
    barrier_wait(&full[stage], step / STAGES & 1);
    multiply(first, b);
    warpgroup_wait<1>();
    if (step > 0) {  // the last step's x has been read
      const int last = (step - 1) % STAGES;
      if (lane == 0) barrier_arrive(&empty[last]);
      if (threadIdx.x == 0 && step - 1 + STAGES < STEPS) {
        barrier_wait(&empty[last], (step - 1) / STAGES & 1);
        fetch_x(step - 1 + STAGES);
      }
      __syncwarp();
    }
    unpack(second, 1);
    multiply(second, b + X_BYTES / 2);
    now[0] = next[0];
    now[1] = next[1];
    now_scale = next_scale;
    now_offset = next_offset;
    if (step + 2 < STEPS) fetch(next, next_scale, next_offset, step + 2);
    warpgroup_wait<1>();
    unpack(first, 0);  // after the last step of nothing that is used
  }
  warpgroup_wait<0>();

  constexpr int CHUNK = 32, PITCH = ROWS + 4;  // rows of x that go through shared memory at once
  float* const sums = reinterpret_cast<float*>(held);
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(8 * j + 2 * c + i % 2) * PITCH + row + i / 2 * 8] = acc[(chunk * CHUNK / 8 + j) * 4 + i];
    __syncthreads();
#pragma unroll
    for (int part = 0; part < CHUNK * ROWS / 8 / THREADS; ++part) {
      const int i = part * THREADS + threadIdx.x, t = i / (ROWS / 8), n = i % (ROWS / 8) * 8;
      const size_t at = static_cast<size_t>(blockIdx.x * TOKENS + chunk * CHUNK + t) * N + n0 + n;
      float total[8] = {};
      if constexpr (RESIDUAL) floats(fresh(residual + at), total);
      if constexpr (BIAS) {
        float added[8];
        floats(fresh(bias + n0 + n), added);
#pragma unroll
        for (int j = 0; j < 8; ++j) total[j] += added[j];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += sums[t * PITCH + n + j];
      if constexpr (sizeof(Out) == 2) {
        uint4 v;
        u32* halves_of = &v.x;
#pragma unroll
        for (int j = 0; j < 4; ++j) halves_of[j] = bits(__floats2half2_rn(total[2 * j], total[2 * j + 1]));
        *reinterpret_cast<uint4*>(y + at) = v;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) store(y + at + j, total[j]);
      }
    }
  }
  return 0;
}

}  // namespace tb
