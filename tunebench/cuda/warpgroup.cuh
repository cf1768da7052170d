// Products on Hopper's warpgroup tensor instructions: weights unpacked into registers, x read from shared memory by the
// tensor cores themselves.

namespace tb {

using u64 = unsigned long long;

#define TB_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define TB_SIXTEEN(i) TB_FOUR(i), TB_FOUR((i) + 4), TB_FOUR((i) + 8), TB_FOUR((i) + 12)
#define TB_SUMS_8 TB_FOUR(0)
#define TB_SUMS_16 TB_FOUR(0), TB_FOUR(4)
#define TB_SUMS_32 TB_SIXTEEN(0)
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
#define TB_D_8 "%0, %1, %2, %3"
#define TB_D_16 TB_D_8 ", %4, %5, %6, %7"
#define TB_D_32 TB_D_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TB_D_64 TB_D_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TB_D_128 TB_D_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
TB_WARPGROUP(8, TB_D_8, "%4", "%5", "%6", "%7", "%8")
TB_WARPGROUP(16, TB_D_16, "%8", "%9", "%10", "%11", "%12")
TB_WARPGROUP(32, TB_D_32, "%16", "%17", "%18", "%19", "%20")
TB_WARPGROUP(64, TB_D_64, "%32", "%33", "%34", "%35", "%36")
TB_WARPGROUP(128, TB_D_128, "%64", "%65", "%66", "%67", "%68")

__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Rows of 64 halves in shared memory, 8 rows to 1024 bytes, their 16-byte parts exchanged by the row's last three bits.
__device__ __forceinline__ u64 matrix(const void* p) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(p));
  return static_cast<u64>((at & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <int BYTES>
__device__ __forceinline__ void copy_few_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::
               "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "n"(BYTES) : "memory");
}

// y[M, N] = x[M, K] w[N, K]^T (+ residual), of 4-bit weights with a scale for each 32 along k.
// A block makes 64 ACROSS outputs of TOKENS rows of x. It has ACROSS x ALONG warpgroups; ALONG of them share k, 64 of it
// each at a time. STAGES such steps of x, weights and scales are on their way or in `shared`.
template <int M, int N, int K, int TOKENS, int ACROSS, int ALONG, int STAGES, bool RESIDUAL, typename Out>
__device__ __forceinline__ int warpgroups(
    const __half* __restrict__ x, const void* __restrict__ w, const __half* __restrict__ scale,
    const __half* __restrict__ residual, Out* __restrict__ y, void* shared) {
  constexpr int THREADS = 128 * ACROSS * ALONG, ROWS = 64 * ACROSS, STEPS = K / (64 * ALONG);
  constexpr int X_BYTES = TOKENS * 128 * ALONG, W_BYTES = ROWS * 32 * ALONG, SCALE_BYTES = ROWS * 4 * ALONG;
  constexpr bool EVEN = M % TOKENS == 0;
  static_assert(K % (64 * ALONG) == 0 && N % ROWS == 0 && STAGES >= 3 && STEPS >= STAGES, "shape");
  char* const held_x = reinterpret_cast<char*>((reinterpret_cast<size_t>(shared) + 1023) / 1024 * 1024);
  char* const held_w = held_x + STAGES * X_BYTES;
  char* const held_scale = held_w + STAGES * W_BYTES;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, c = lane % 4;
  const int across = threadIdx.x / 128 % ACROSS, along = threadIdx.x / 128 / ACROSS;
  const int m0 = blockIdx.x * TOKENS, n0 = blockIdx.y * ROWS, row = across * 64 + warp * 16 + g;

  auto fetch_w = [&](int step) {
    const int stage = step % STAGES;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * 2 * ALONG; i += THREADS) {
      const int r = i / (2 * ALONG), part = i % (2 * ALONG), place = part % 2 ^ (r >> 2 & 1);
      copy_async(held_w + stage * W_BYTES + (part / 2 * ROWS + r) * 32 + place * 16,
                 static_cast<const char*>(w) + static_cast<size_t>(n0 + r) * (K / 2) + (step * 2 * ALONG + part) * 16);
    }
    if (THREADS == ROWS || threadIdx.x < ROWS)
      copy_few_async<4 * ALONG>(held_scale + stage * SCALE_BYTES + threadIdx.x * 4 * ALONG,
                                scale + static_cast<size_t>(n0 + threadIdx.x) * (K / 32) + step * 2 * ALONG);
  };
  auto fetch_x = [&](int step) {
    const int stage = step % STAGES;
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * 8 * ALONG; i += THREADS) {
      const int t = i / (8 * ALONG), part = i % (8 * ALONG), place = part % 8 ^ (t & 7);
      if (EVEN || m0 + t < M)
        copy_async(held_x + stage * X_BYTES + (part / 8 * TOKENS + t) * 128 + place * 16,
                   x + static_cast<size_t>(m0 + t) * K + (step * 8 * ALONG + part) * 8);
    }
  };
  // Byte c of a word, which is this lane's two weights, in both halves: one keeps its low nibble, the other its high.
  const u32 byte = c | 4 << 4 | c << 8 | 4 << 12;
  const __half2 places = __floats2half2_rn(1.f, 0.0625f), zero = __floats2half2_rn(-1031.f, -71.f);
  auto unpack = [&](u32 word, __half2 s) {
    const u32 two = mask_or<0x00f0000fu, 0x64006400u>(__byte_perm(word, 0, byte));
    return bits(__hmul2(__hfma2(halves(two), places, zero), s));
  };
  auto dequantize = [&](u32 (&a)[4][4], int step) {
    const int stage = step % STAGES;
    const char* words = held_w + stage * W_BYTES + (along * ROWS + row) * 32;
    const __half2* scales = reinterpret_cast<const __half2*>(held_scale + stage * SCALE_BYTES);
    const __half2 two[2] = {scales[row * ALONG + along], scales[(row + 8) * ALONG + along]};
#pragma unroll
    for (int r = 0; r < 2; ++r)  // rows that are 8 apart keep their halves in the same order
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const uint4 v = *reinterpret_cast<const uint4*>(words + r * 8 * 32 + (group ^ (row >> 2 & 1)) * 16);
        const __half2 s = __half2half2(group ? __high2half(two[r]) : __low2half(two[r]));
        a[2 * group][r] = unpack(v.x, s);
        a[2 * group][r + 2] = unpack(v.y, s);
        a[2 * group + 1][r] = unpack(v.z, s);
        a[2 * group + 1][r + 2] = unpack(v.w, s);
      }
  };
  auto arrived = [&] {  // a step is in shared memory, for the tensor cores too
    await<STAGES - 3>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  };

#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch_w(step);
  if constexpr (!EVEN)
    for (int i = threadIdx.x; i < STAGES * X_BYTES / 16; i += THREADS)
      if (m0 + i / 8 % TOKENS >= M) reinterpret_cast<uint4*>(held_x)[i] = make_uint4(0, 0, 0, 0);
  begin();  // weights do not depend on the kernel before; all else does
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    fetch_x(step);
    commit();
  }
  float acc[TOKENS / 2] = {};
  u32 even[4][4], odd[4][4];
  await<STAGES - 2>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  dequantize(even, 0);
  auto multiply = [&](u32 (&now)[4][4], u32 (&next)[4][4], int step) {
    const u64 b = matrix(held_x + step % STAGES * X_BYTES + along * TOKENS * 128);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) Warpgroup<TOKENS>::mma(acc, now[i], b + 2 * i);
    warpgroup_commit();
    if (step + 1 < STEPS) {
      arrived();
      if (step + STAGES - 1 < STEPS) {  // into the place of the last step, which all have done with
        fetch_w(step + STAGES - 1);
        fetch_x(step + STAGES - 1);
      }
      commit();
      dequantize(next, step + 1);
    }
    warpgroup_wait();
  };
#pragma unroll 1
  for (int step = 0; step < STEPS; step += 2) {
    multiply(even, odd, step);
    if (STEPS % 2 == 0 || step + 1 < STEPS) multiply(odd, even, step + 1);
  }

  constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32, PITCH = ROWS + 4;  // rows of x that go through shared memory at once
  float* const sums = reinterpret_cast<float*>(held_x);
  await<0>();
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(along * CHUNK + 8 * j + 2 * c + i % 2) * PITCH + row + i / 2 * 8] = acc[(chunk * CHUNK / 8 + j) * 4 + i];
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK * ROWS / 8; i += THREADS) {
      const int t = i / (ROWS / 8), n = i % (ROWS / 8) * 8;
      if (!EVEN && m0 + chunk * CHUNK + t >= M) break;
      const size_t at = static_cast<size_t>(m0 + chunk * CHUNK + t) * N + n0 + n;
      float total[8] = {};
      if constexpr (RESIDUAL) floats(fresh(residual + at), total);
#pragma unroll
      for (int part = 0; part < ALONG; ++part)
#pragma unroll
        for (int j = 0; j < 8; ++j) total[j] += sums[(part * CHUNK + t) * PITCH + n + j];
      if constexpr (sizeof(Out) == 2) {
        uint4 v;
        u32* words = &v.x;
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = bits(__floats2half2_rn(total[2 * j], total[2 * j + 1]));
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
